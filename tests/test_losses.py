import pytest
import torch

from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.losses import best_hypothesis, pose_loss, symmetrized
from cryoai.poses import Poses
from cryoai.volumes import SampledVolume
from oracles import make_optics, random_rotations
from properties import assert_gradient_matches_differences, unchanged


def random_poses(*shape):
    n = int(torch.tensor(shape).prod())
    return Poses(random_rotations(n, seed=n).float().reshape(*shape, 3, 3), 5 * torch.randn(*shape, 2))


def test_the_pose_of_a_turned_image_is_turned_back_to_that_of_the_image(phantom):
    imaging = ImagingModel(FourierDisc.of_box(32), 3.0, 8)
    volume = SampledVolume.from_map(phantom.density(32).float(), 8)
    optics, truth = make_optics(6), random_poses(6, 1)
    images = imaging.predict(volume, truth, optics)
    # A turn by 180 degrees about the centre conjugates the transform.
    turned = truth.turned_by_pi()
    torch.testing.assert_close(imaging.predict(volume, turned, optics), images.conj(), atol=1e-3, rtol=1e-3)
    with unchanged(truth, turned):
        hypotheses = symmetrized(random_poses(6, 1), turned)
    assert hypotheses.rotations.shape == (6, 2, 3, 3)
    torch.testing.assert_close(hypotheses.rotations[:, 1], truth.rotations[:, 0])
    torch.testing.assert_close(hypotheses.shifts_in_angstroms[:, 1], truth.shifts_in_angstroms[:, 0])


def test_hypotheses_from_the_image_come_first_and_untouched():
    direct, turned = random_poses(4, 3), random_poses(4, 3)
    hypotheses = symmetrized(direct, turned)
    assert torch.equal(hypotheses.rotations[:, :3], direct.rotations)
    assert torch.equal(hypotheses.shifts_in_angstroms[:, :3], direct.shifts_in_angstroms)


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
