"""How sure a pose is, learned from particles whose poses are known."""

import dataclasses
import itertools
import math

import pytest
import torch

from cryoai.confidence import Confidence, features_of_fit
from cryoai.inference import _features
from cryoai.model import Placing
from cryoai.noise import Fit
from cryoai.poses import Poses
from properties import unchanged

N, WORST = 6000, 0.02


def learned(placing, right):
    return Confidence.learn(_features(placing), placing.fit, right, worst=WORST)


def asked(confidence, placing):
    return confidence(_features(placing), placing.fit)


def placings(fit, probability=None, lead=None):
    n = len(fit)
    poses = Poses(torch.eye(3).expand(n, 3, 3), torch.zeros(n, 2))
    probability = torch.rand(n) if probability is None else probability
    lead = 50 * torch.rand(n) if lead is None else lead
    evidence = {"fit": fit, "probability": probability, "lead": lead}
    # All else that a placing holds are poses, which confidence does not look at.
    return Placing(**{field.name: evidence.get(field.name, poses) for field in dataclasses.fields(Placing)})


@pytest.mark.parametrize(("middle", "slope"), [(-3.0, 1.0), (0.0, 0.5), (-6.0, 2.0), (2.0, 1.0)])
def test_confidence_is_the_probability_to_be_right_where_that_is_a_logistic_function_of_the_fit(middle, slope):
    def draw():
        fit = -3 + 3 * torch.randn(N)
        truth = torch.sigmoid(slope * (fit - middle))
        return placings(fit), truth, torch.rand(N) < truth

    known, _, right = draw()
    held_out, truth, was_right = draw()
    found = asked(learned(known, right), held_out)
    assert found.shape == (N,)
    assert found.min() >= 0
    assert found.max() <= 1
    assert float((found - truth).abs().mean()) < 0.03
    edges = torch.linspace(0, 1, 6)
    for low, high in itertools.pairwise(edges):
        members = (found >= low) & (found < high)
        n = int(members.sum())
        if n > 50:
            share = float(was_right[members].float().mean())
            # Three standard errors of the share, and two hundredths for the parameters.
            assert float(found[members].mean()) == pytest.approx(share, abs=0.02 + 1.5 / math.sqrt(n))


def test_what_says_nothing_of_the_pose_does_not_move_the_confidence_and_what_does_moves_it():
    fit, probability = torch.randn(N), torch.rand(N)
    right = torch.rand(N) < probability
    confidence = learned(placings(fit, probability), right)
    same = torch.zeros(3)
    by_probability = asked(confidence, placings(same, torch.tensor([0.1, 0.5, 0.9]), same + 9))
    assert by_probability.tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.05)
    by_lead = asked(confidence, placings(same, same + 0.5, torch.tensor([0.0, 10.0, 50.0])))
    assert float(by_lead.max() - by_lead.min()) < 0.12


def test_a_particle_that_fits_worse_than_all_that_were_found_is_not_believed_whatever_else_speaks_for_it():
    fit = torch.randn(N)
    confidence = learned(placings(fit, torch.ones(N)), torch.ones(N, dtype=torch.bool))
    worst = float(fit.min())
    sure = torch.ones(4)
    found = asked(confidence, placings(torch.tensor([worst - 0.01, worst - 5, -1e6, 0.0]), sure, 50 * sure))
    assert found[:3].tolist() == [0, 0, 0]
    assert found[3] > 0.9
    # Only the worst fiftieth of those that were found loses any.
    ranked = asked(confidence, placings(fit.sort().values, torch.ones(N), torch.full((N,), 50.0)))
    assert (ranked[N // 40 :] > 0.9).all()
    assert (ranked[: N // 100] < 0.55).all()


@pytest.mark.parametrize("n", [1, 7, 6000])
@pytest.mark.parametrize("right", [True, False])
def test_nothing_but_right_poses_and_nothing_but_wrong_ones_leave_confidence_finite(n, right):
    fit = torch.linspace(-40, 20, n)
    confidence = learned(placings(fit), torch.full((n,), right))
    assert confidence.weights.isfinite().all()
    extreme = placings(torch.tensor([-1e9, -40.0, 0.0, 5.0, 20.0, 1e9]), torch.tensor([0, 1e-9, 0.5, 0.9, 1, 1.0001]))
    found = asked(confidence, extreme)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    if n > 1000:
        assert (found[4] > 0.9) if right else (found.max() < 0.1)


def test_what_separates_right_from_wrong_without_a_doubt_leaves_confidence_finite():
    fit = torch.cat([torch.full((N // 2,), -20.0), torch.full((N // 2,), 0.0)])
    confidence = learned(placings(fit), fit == 0)
    assert confidence.weights.isfinite().all()
    half = torch.full((2,), 0.5)
    found = asked(confidence, placings(torch.tensor([-20.0, 0.1]), half, 20 * half))
    assert found[0] == 0
    assert found[1] > 0.95


# ------------------------------------------------------------------------------ by the fit alone


def fits(n):
    """Fits of particles of which there was much or little to be fitted."""
    return Fit(2 * torch.randn(n) - 1, 60 * torch.rand(n) + 5, torch.ones(n))


def test_the_features_of_a_fit_are_of_order_one_and_finite_whatever_the_fit():
    fit = Fit(torch.tensor([0.0, -1e9, 1e9, -5.0]), torch.tensor([1.0, 0.0, 1e9, 1e-30]), torch.ones(4))
    with unchanged(fit):
        features = features_of_fit(fit)
    assert features.shape[0] == 4
    assert features.isfinite().all()
    assert features.abs().max() < 30
    # A constant is among them.
    assert (features[:, 0] == 1).all()


def test_of_two_equal_fits_that_of_the_stronger_prediction_can_count_for_more():
    """Right with a probability that depends on the fit only where there was something to be fitted."""
    known, held_out = fits(4 * N), fits(N)

    def truth(fit):
        return torch.sigmoid((fit.z_scores + 1) * fit.energies.log() / 2 + 0.5)

    right = torch.rand(4 * N) < truth(known)
    confidence = Confidence.learn(features_of_fit(known), known.z_scores, right, worst=0.005)
    found = confidence(features_of_fit(held_out), held_out.z_scores)
    assert float((found - truth(held_out)).abs().mean()) < 0.03
    for strong, which in ((False, held_out.energies < 15), (True, held_out.energies > 45)):
        members = which & (held_out.z_scores > 0.5)
        assert float(found[members].mean()) == pytest.approx(float(truth(held_out)[members].mean()), abs=0.02), strong


@pytest.mark.parametrize("worst", [0.005, 0.02, 0.2])
def test_the_worst_share_of_those_found_loses_confidence_in_the_order_of_their_fit(worst):
    known = fits(N)
    confidence = Confidence.learn(features_of_fit(known), known.z_scores, torch.rand(N) < 0.99, worst=worst)
    ordered = Fit(known.z_scores.sort().values, torch.full((N,), 30.0), torch.ones(N))
    with unchanged(confidence, ordered):
        penalised = confidence(features_of_fit(ordered), ordered.z_scores)
    bare = dataclasses.replace(confidence, fits=torch.full((1001,), -torch.inf, dtype=torch.float64))
    plain = bare(features_of_fit(ordered), ordered.z_scores)
    factor = penalised / plain
    n = round(worst * N)
    assert (factor[n + 12 :] == 1).all()
    # Those that were not found are among all of them, hence one per cent of play.
    expected = torch.arange(n) / n
    torch.testing.assert_close(factor[:n], expected, atol=0.02 + 0.002 / worst, rtol=0)


def test_noise_is_not_believed_and_one_particle_is_judged_as_among_many():
    known = fits(N)
    confidence = Confidence.learn(features_of_fit(known), known.z_scores, torch.rand(N) < 0.95, worst=0.005)
    others = fits(50)
    # Images of noise miss the mean by sqrt(2 |X|^2) deviations: the more there is to be fitted, the further.
    noise = Fit(-(2 * others.energies).sqrt() - 1, others.energies, others.noise_scales)[others.energies > 45]
    assert confidence(features_of_fit(noise), noise.z_scores).max() < 0.01
    together = confidence(features_of_fit(others), others.z_scores)
    alone = [confidence(features_of_fit(others[i : i + 1]), others[i : i + 1].z_scores) for i in range(50)]
    torch.testing.assert_close(together, torch.cat(alone))
