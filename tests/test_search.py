import pytest
import torch

from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.noise import log_likelihood
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses, angular_distance_in_degrees, half_turn
from cryoai.search import Templates, TrialPoses, matrix_dtype, search_poses, shift_grid
from cryoai.volumes import SampledVolume
from oracles import make_optics, random_rotations
from properties import unchanged

PIXEL = 3.0
N_IMAGES = 24


@pytest.fixture(params=[24, 25])
def imaging(request):
    return ImagingModel(FourierDisc.of_box(request.param), PIXEL, 8)


@pytest.fixture
def problem(phantom, imaging):
    """Noise-free images at poses of the grid, half of them at half turns, and the templates."""
    trials = TrialPoses.grid(400, shift_grid(PIXEL, 2))
    rotations = trials.rotations[torch.arange(N_IMAGES) * 16]
    rotations[1::2] = half_turn(rotations[1::2])
    poses = Poses(rotations, trials.shifts_in_angstroms[torch.arange(N_IMAGES) % len(trials.shifts_in_angstroms)])
    optics = make_optics(defocus_u_in_angstroms=torch.linspace(8000, 20000, N_IMAGES))
    volume = SampledVolume.from_map(phantom.density(imaging.disc.n_pixels).float(), imaging.max_radius)
    batch = ParticleBatch(torch.arange(N_IMAGES), imaging.predict(volume, poses, optics), optics)
    precision = torch.where(imaging.shells > 0, 1 / (1.0 + imaging.shells), 0.0)
    return batch, poses, volume, trials, precision


def test_the_shift_grid_fills_a_circle():
    shifts = shift_grid(1.5, 3)
    assert len(shifts) == 29
    assert shifts.norm(dim=1).max() == pytest.approx(4.5)
    assert any(shift == [0.0, 0.0] for shift in shifts.tolist())
    assert len(shifts.unique(dim=0)) == 29


def test_turning_the_grid_turns_every_rotation():
    trials, turn = TrialPoses.grid(10, shift_grid(1.0, 1)), random_rotations(1)[0].float()
    before = angular_distance_in_degrees(trials.rotations[:-1], trials.rotations[1:])
    turned = trials.turned(turn)
    torch.testing.assert_close(turned.rotations[3], turn @ trials.rotations[3])
    after = angular_distance_in_degrees(turned.rotations[:-1], turned.rotations[1:])
    torch.testing.assert_close(after, before, atol=0.1, rtol=0)


def test_the_search_finds_the_true_poses(problem, imaging):
    batch, poses, volume, trials, precision = problem
    with unchanged(batch.coefficients, batch.optics, trials, precision, volume.values):
        best = search_poses(batch, Templates.of(volume, trials, imaging), imaging, precision, 5)
    assert best.log_likelihoods.shape == (N_IMAGES, 5)
    assert (best.log_likelihoods.diff(dim=1) <= 0).all()
    torch.testing.assert_close(best.poses.rotations[:, 0], poses.rotations)
    torch.testing.assert_close(best.poses.shifts_in_angstroms[:, 0], poses.shifts_in_angstroms)


def test_reported_log_likelihoods_are_those_of_the_reported_poses(problem, imaging):
    batch, _, volume, trials, precision = problem
    templates = Templates.of(volume, trials, imaging)
    found = search_poses(batch, templates, imaging, precision, 100)
    observed = batch.coefficients[:, None]
    predicted = imaging.predict(volume, found.poses, batch.optics)
    direct = log_likelihood(observed, predicted, precision) - log_likelihood(observed, 0 * predicted, precision)
    # Rounding to u: the factors of every product, the two sums of products, and the sum of the two, doubled.
    u = torch.finfo(matrix_dtype(precision.device)).eps / 2
    real_products = (observed.real * predicted.real).abs() + (observed.imag * predicted.imag).abs()
    shifted = (observed.abs() * predicted.abs()).maximum(real_products)
    tolerance = 2 * 4 * u * (shifted * precision).sum(-1) * 2**0.5 + 1e-4 * direct.abs()
    assert ((found.log_likelihoods - direct).abs() <= tolerance).all()
    # The bound is sharp enough to mean something.
    assert (tolerance < 0.1 * direct.abs().max(dim=1, keepdim=True).values).all()


def test_searching_a_batch_equals_searching_one_by_one(problem, imaging):
    batch, _, volume, trials, precision = problem
    templates = Templates.of(volume, trials, imaging)
    together = search_poses(batch, templates, imaging, precision, 1)
    for i in range(0, N_IMAGES, 5):
        one = ParticleBatch(batch.indices[i : i + 1], batch.coefficients[i : i + 1], batch.optics[i : i + 1])
        alone = search_poses(one, templates, imaging, precision, 1)
        torch.testing.assert_close(alone.poses.rotations[0], together.poses.rotations[i])
        torch.testing.assert_close(alone.log_likelihoods[0], together.log_likelihoods[i], rtol=1e-2, atol=0)


def test_no_more_candidates_are_returned_than_there_are_rotations(problem, imaging):
    batch, _, volume, _, precision = problem
    templates = Templates.of(volume, TrialPoses.grid(3, shift_grid(1.0, 0)), imaging)
    found = search_poses(batch, templates, imaging, precision, 50)
    assert found.log_likelihoods.shape == (N_IMAGES, 6)
    assert angular_distance_in_degrees(found.poses.rotations[:, :1], found.poses.rotations[:, 1:]).min() > 1
