import math

import pytest
import torch

from cryoai.losses import best_hypothesis, pose_loss, score_loss
from cryoai.poses import Hypotheses, Poses
from oracles import random_rotations
from properties import assert_gradient_matches_differences, unchanged


def random_poses(*shape):
    n = int(torch.tensor(shape).prod())
    return Poses(random_rotations(n, seed=n).float().reshape(*shape, 3, 3), 5 * torch.randn(*shape, 2))


def test_the_best_hypothesis_wins_and_alone_gets_a_gradient():
    observed = torch.randn(5, 20, dtype=torch.complex64)
    precision = torch.rand(20)
    winners = torch.tensor([2, 0, 3, 1, 2])
    predicted = observed[:, None] + torch.randn(5, 4, 20, dtype=torch.complex64)
    rows = torch.arange(5)
    predicted[rows, winners] = observed + 0.1 * torch.randn(5, 20, dtype=torch.complex64)
    predicted.requires_grad_()
    best = best_hypothesis(observed, predicted, precision)
    assert torch.equal(best.choice, winners)
    residual = (observed - predicted[rows, winners]).abs().square() * precision
    torch.testing.assert_close(best.loss, residual.mean(1))
    best.loss.sum().backward()
    reached = predicted.grad.abs().amax(-1) > 0
    assert torch.equal(reached, torch.nn.functional.one_hot(winners, 4).bool())


def test_coefficients_without_precision_do_not_count():
    observed, predicted = torch.ones(1, 4, dtype=torch.complex64), torch.ones(1, 2, 4, dtype=torch.complex64)
    predicted[0, 0, 0], predicted[0, 1, 1] = 100, 2
    best = best_hypothesis(observed, predicted, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert best.choice.item() == 0
    assert best.loss.item() == 0


def test_the_pose_loss_is_zero_where_one_of_the_heads_is_right():
    truth, heads = random_poses(6), random_poses(6, 4)
    choice = torch.tensor([0, 3, 1, 2, 2, 0])
    rows = torch.arange(6)
    heads.rotations[rows, choice] = truth.rotations
    heads.shifts_in_angstroms[rows, choice] = truth.shifts_in_angstroms
    with unchanged(heads, truth):
        found = pose_loss(heads, truth, shift_unit_in_angstroms=4.0, mean_weight=0.0)
    assert torch.equal(found.choice, choice)
    assert torch.equal(found.loss, torch.zeros(6))
    # The mean over the heads is that of their rotations alone.
    with_mean = pose_loss(heads, truth, shift_unit_in_angstroms=4.0, mean_weight=0.5)
    distances = (heads.rotations - truth.rotations[:, None]).square().sum((-2, -1))
    torch.testing.assert_close(with_mean.loss, 0.5 * distances.mean(1))


def test_a_half_turn_costs_eight_and_a_shift_by_the_unit_costs_one():
    truth = Poses(torch.eye(3)[None], torch.zeros(1, 2))
    flipped = Poses(torch.diag(torch.tensor([1.0, -1.0, -1.0]))[None, None], torch.tensor([[[0.0, 4.0]]]))
    found = pose_loss(flipped, truth, shift_unit_in_angstroms=4.0, mean_weight=0.0)
    assert found.loss.item() == pytest.approx(8 + 1)


@pytest.mark.parametrize(("mean_weight", "all_heads"), [(0.0, False), (0.05, True)])
def test_a_weight_on_the_mean_gives_every_head_a_gradient(mean_weight, all_heads):
    truth, heads = random_poses(3), random_poses(3, 5)
    heads.rotations.requires_grad_()
    found = pose_loss(heads, truth, shift_unit_in_angstroms=4.0, mean_weight=mean_weight)
    found.loss.sum().backward()
    reached = heads.rotations.grad.abs().amax((-2, -1)) > 0
    assert reached[torch.arange(3), found.choice].all()
    assert reached.all().item() == all_heads
    assert reached.sum() == (15 if all_heads else 3)


def test_the_gradient_of_the_pose_loss_is_right():
    truth = Poses(random_rotations(3), torch.randn(3, 2, dtype=torch.float64))
    rotations = random_rotations(6, seed=4).reshape(3, 2, 3, 3)

    def loss(shifts):
        found = pose_loss(Poses(rotations, shifts), truth, shift_unit_in_angstroms=2.0, mean_weight=0.1)
        return found.loss.sum()

    assert_gradient_matches_differences(loss, torch.randn(3, 2, 2, dtype=torch.float64))


def test_the_score_loss_is_the_surprise_at_the_best_hypothesis():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    hypotheses = Hypotheses(random_poses(2, 3), probabilities.log())
    with unchanged(hypotheses):
        found = score_loss(hypotheses, torch.tensor([1, 2]))
    assert found.tolist() == pytest.approx([math.log(5), math.log(2)])


def test_no_hypotheses_are_scored_better_than_with_the_shares_in_which_they_were_best():
    best = torch.tensor([0, 0, 0, 1, 2, 0, 1, 0])
    shares = torch.tensor([5 / 8, 2 / 8, 1 / 8])
    poses = random_poses(8, 3)

    def loss(probabilities):
        return float(score_loss(Hypotheses(poses, probabilities.log().expand(8, 3)), best).mean())

    for other in torch.distributions.Dirichlet(torch.ones(3)).sample((50,)):
        assert loss(shares) <= loss(other)


def test_the_gradient_of_the_score_loss_is_the_probability_beyond_what_happened():
    scores = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    best = torch.tensor([0, 3, 4, 3])
    poses = Poses(random_rotations(20).reshape(4, 5, 3, 3).requires_grad_(), torch.zeros(4, 5, 2).double())
    score_loss(Hypotheses(poses, scores.log_softmax(1)), best).sum().backward()
    happened = torch.nn.functional.one_hot(best, 5)
    torch.testing.assert_close(scores.grad, (scores.detach().exp() / scores.detach().exp().sum(1, True)) - happened)
    # It says nothing of the poses.
    assert poses.rotations.grad is None
