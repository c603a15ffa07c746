import math

import pytest
import torch

from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.noise import NoiseSpectrum, fit_z_scores, log_likelihood
from properties import assert_batch_equals_loop, unchanged


@pytest.fixture(params=[24, 25])
def imaging(request):
    return ImagingModel(FourierDisc.of_box(request.param), 3.0, 8)


def test_white_noise_of_unit_variance_has_unit_power_in_every_shell(imaging):
    n = imaging.disc.n_pixels
    residuals = imaging.disc.from_images(torch.randn(2000, n, n))[:, : imaging.n_coefficients]
    noise = NoiseSpectrum.of_residuals(residuals, imaging)
    # Shells have 1, 4 and more independent coefficients; the power of n complex ones scatters by 1 / sqrt(n).
    n_samples = 2000 * torch.bincount(imaging.shells)
    assert ((noise.variance - 1).abs() < 5 * math.sqrt(2) / n_samples.sqrt()).all()


def test_the_spectrum_is_the_mean_power_of_each_shell(imaging):
    level = torch.rand(imaging.max_radius + 1) + 0.5
    phases = torch.exp(2j * math.pi * torch.rand(5, imaging.n_coefficients))
    residuals = phases * level[imaging.shells].sqrt()
    with unchanged(residuals):
        noise = NoiseSpectrum.of_residuals(residuals, imaging)
    torch.testing.assert_close(noise.variance, level)


def test_the_precision_is_the_inverse_variance_and_leaves_the_origin_out(imaging):
    variance = torch.rand(imaging.max_radius + 3) + 0.5
    precision = NoiseSpectrum(variance).precision(imaging)
    assert precision[0] == 0
    torch.testing.assert_close(precision[1:] * variance[imaging.shells[1:]], torch.ones(imaging.n_coefficients - 1))


def test_blending_moves_the_shells_that_both_have():
    old, new = NoiseSpectrum(torch.tensor([1.0, 2.0, 3.0])), NoiseSpectrum(torch.tensor([3.0, 2.0]))
    with unchanged(old, new):
        blended = old.blended(new, 0.25)
    assert blended.variance.tolist() == [1.5, 2.0, 3.0]


def test_the_log_likelihood_is_that_of_independent_gaussians():
    observed, predicted = torch.randn(4, 7, dtype=torch.complex128), torch.randn(4, 7, dtype=torch.complex128)
    variance = torch.rand(7, dtype=torch.float64) + 0.5
    # A complex coefficient of variance s^2 has real and imaginary parts of variance s^2 / 2.
    normal = torch.distributions.Normal(torch.view_as_real(predicted), (variance / 2).sqrt()[:, None])
    constant = torch.log(math.pi * variance).sum()
    truth = normal.log_prob(torch.view_as_real(observed)).sum((-1, -2)) + constant
    torch.testing.assert_close(log_likelihood(observed, predicted, 1 / variance), truth)
    assert_batch_equals_loop(lambda a, b: log_likelihood(a, b, 1 / variance), observed, predicted)


def noise_like(shape, variance):
    """Complex normal of this variance (p,): half of it in each part."""
    return (variance / 2).sqrt() * torch.complex(torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("strength", [0.05, 0.5, 3.0])
def test_the_fit_to_images_of_the_prediction_itself_is_standard_normal(strength):
    n, p = 20_000, 60
    variance = torch.rand(p) + 0.3
    predicted = strength * torch.randn(p, dtype=torch.complex64)
    observed = predicted + noise_like((n, p), variance)
    with unchanged(observed, predicted):
        scores = fit_z_scores(observed, predicted, 1 / variance)
    assert scores.shape == (n,)
    # Five standard errors of the mean, the deviation and the skewness.
    assert abs(float(scores.mean())) < 5 / math.sqrt(n)
    assert abs(float(scores.std()) - 1) < 5 / math.sqrt(2 * n)
    assert abs(float(((scores - scores.mean()) / scores.std()).pow(3).mean())) < 5 * math.sqrt(6 / n)
    within = (scores.abs() < 1.96).float().mean()
    assert float(within) == pytest.approx(0.95, abs=0.01)


def test_the_fit_of_noise_and_of_another_particle_is_as_bad_as_the_prediction_is_strong():
    n, p = 2000, 60
    variance = torch.rand(p) + 0.3
    predicted, other = 3 * torch.randn(2, p, dtype=torch.complex64)
    power = (predicted.abs().square() / variance).sum()
    noise = noise_like((n, p), variance)
    scores = fit_z_scores(noise, predicted, 1 / variance)
    # Noise misses the mean |X|^2 of the right images by twice that; their deviation is sqrt(2) |X|.
    assert float(scores.mean()) == pytest.approx(-math.sqrt(2 * power), rel=0.01)
    assert scores.max() < -20
    assert fit_z_scores(other + noise, predicted, 1 / variance).max() < -10
    # The worst fit is to the negative.
    assert (fit_z_scores(noise - predicted, predicted, 1 / variance) < scores).float().mean() == 1


def test_the_fit_leaves_out_what_has_no_precision_and_is_finite_for_an_empty_prediction():
    precision = torch.tensor([0.0, 1.0, 2.0])
    predicted = torch.tensor([5.0, 1.0 - 2.0j, 3.0j])
    observed = torch.randn(4, 3, dtype=torch.complex64)
    changed = observed.clone()
    changed[:, 0] += 100
    assert torch.equal(fit_z_scores(changed, predicted, precision), fit_z_scores(observed, predicted, precision))
    assert torch.equal(fit_z_scores(observed, 0 * predicted, precision), torch.zeros(4))
    assert_batch_equals_loop(lambda x: fit_z_scores(x, predicted, precision), observed)
