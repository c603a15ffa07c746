from dataclasses import replace

import pytest
import roma
import torch

from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.noise import NoiseSpectrum, log_likelihood
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.refinement import RefinedPoses, refine_coarse_to_fine, refine_poses
from cryoai.volumes import SampledVolume
from oracles import make_optics, random_rotations, textbook_ctf
from properties import unchanged

BOX, PIXEL, RADIUS, N = 32, 3.0, 10, 24


@pytest.fixture
def imaging():
    return ImagingModel(FourierDisc.of_box(BOX), PIXEL, RADIUS)


@pytest.fixture
def volume(phantom):
    return SampledVolume.from_map(phantom.density(BOX).float(), RADIUS, with_gradient=True)


@pytest.fixture
def precision(imaging):
    return (imaging.shells > 0).float()


@pytest.fixture
def truth():
    return Poses(random_rotations(N).float(), 6 * torch.randn(N, 2))


@pytest.fixture
def batch(phantom, imaging, truth):
    """Noise-free images from the closed form."""
    k = imaging.coordinates.double()
    ctf = textbook_ctf(k)
    images = [
        ctf * phantom.image_coefficients(k, BOX, rotation, -shift / PIXEL)
        for rotation, shift in zip(truth.rotations, truth.shifts_in_angstroms, strict=True)
    ]
    return ParticleBatch(torch.arange(N), torch.stack(images).to(torch.complex64), make_optics(N))


def perturbed(poses, degrees, angstroms):
    axes, directions = torch.randn(N, 3), torch.randn(N, 2)
    turns = roma.rotvec_to_rotmat(torch.deg2rad(torch.tensor(degrees)) * axes / axes.norm(dim=1, keepdim=True))
    moves = angstroms * directions / directions.norm(dim=1, keepdim=True)
    return Poses(turns @ poses.rotations, poses.shifts_in_angstroms + moves)


def noisy(batch, scale):
    noise = scale * batch.coefficients.abs().square().mean().sqrt() * torch.randn_like(batch.coefficients)
    return ParticleBatch(batch.indices, batch.coefficients + noise, batch.optics)


def test_poses_off_by_3_degrees_and_a_pixel_are_recovered(batch, truth, volume, imaging, precision):
    start = perturbed(truth, 3.0, PIXEL)
    with unchanged(batch, start, volume, precision):
        found = refine_poses(batch, start, volume, imaging, precision, 8)
    errors = angular_distance_in_degrees(found.poses.rotations, truth.rotations)
    # What is left is what interpolation makes of the map.
    assert errors.median() < 0.05
    assert errors.max() < 0.2
    assert (found.poses.shifts_in_angstroms - truth.shifts_in_angstroms).norm(dim=1).max() < 0.02 * PIXEL


def test_on_images_of_the_very_volume_the_steps_end_at_the_truth(truth, volume, imaging, precision):
    optics = make_optics(N)
    batch = ParticleBatch(torch.arange(N), imaging.predict(volume, truth, optics), optics)
    found = refine_poses(batch, perturbed(truth, 3.0, PIXEL), volume, imaging, precision, 8)
    assert angular_distance_in_degrees(found.poses.rotations, truth.rotations).max() < 0.1
    torch.testing.assert_close(found.poses.shifts_in_angstroms, truth.shifts_in_angstroms, atol=1e-2, rtol=0)


@pytest.mark.parametrize("n_iterations", [1, 2, 5])
def test_no_pose_ends_less_likely_than_it_started(batch, volume, imaging, precision, n_iterations):
    images = noisy(batch, 1.0)
    # As far from the truth as can be, so that many steps go astray.
    start = Poses(random_rotations(N, seed=7).float(), 20 * torch.randn(N, 2))
    at_start = refine_poses(images, start, volume, imaging, precision, 0)
    found = refine_poses(images, start, volume, imaging, precision, n_iterations)
    assert (found.log_likelihoods >= at_start.log_likelihoods).all()
    assert (found.log_likelihoods > at_start.log_likelihoods).float().mean() > 0.8
    rotations = found.poses.rotations.double()
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotations)
    torch.testing.assert_close(rotations @ rotations.transpose(-1, -2), identity, atol=1e-5, rtol=0)
    assert (torch.linalg.det(rotations) > 0).all()


@pytest.mark.parametrize("n_iterations", [1, 4])
def test_steps_that_lead_away_are_taken_back(batch, truth, volume, imaging, precision, n_iterations):
    # A gradient of the wrong sign turns every particle the wrong way.
    signs = torch.tensor([1.0, -1.0, -1.0, -1.0])
    misleading = SampledVolume(volume.lattice, volume.values * signs)
    start = perturbed(truth, 3.0, 0.0)
    at_start = refine_poses(batch, start, volume, imaging, precision, 0)
    found = refine_poses(batch, start, misleading, imaging, precision, n_iterations)
    # Up to rounding: the likelihood of a step is a by-product of its derivatives.
    assert (found.log_likelihoods >= at_start.log_likelihoods * (1 + 1e-4)).all()
    assert torch.equal(found.poses.rotations[0], start.rotations[0])


def test_the_likelihood_returned_is_that_of_the_pose_returned(batch, truth, volume, imaging, precision):
    images = noisy(batch, 0.5)
    found = refine_poses(images, perturbed(truth, 5.0, 5.0), volume, imaging, precision, 3)
    predicted = imaging.predict(volume, found.poses, images.optics)
    expected = log_likelihood(images.coefficients, predicted, precision)
    torch.testing.assert_close(found.log_likelihoods, expected, rtol=1e-4, atol=1e-2)


def test_without_iterations_the_start_comes_back_with_its_likelihood(batch, truth, volume, imaging, precision):
    start = perturbed(truth, 3.0, PIXEL)
    found = refine_poses(batch, start, volume, imaging, precision, 0)
    assert torch.equal(found.poses.rotations, start.rotations)
    assert torch.equal(found.poses.shifts_in_angstroms, start.shifts_in_angstroms)
    predicted = imaging.predict(volume, start, batch.optics)
    assert torch.equal(found.log_likelihoods, log_likelihood(batch.coefficients, predicted, precision))


def test_before_an_empty_map_poses_stay_where_they_are(batch, truth, imaging, precision):
    empty = SampledVolume.from_map(torch.zeros(BOX, BOX, BOX), RADIUS, with_gradient=True)
    found = refine_poses(batch, truth, empty, imaging, precision, 3)
    torch.testing.assert_close(found.poses.rotations, truth.rotations, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.poses.shifts_in_angstroms, truth.shifts_in_angstroms)


def test_of_two_answers_each_particle_takes_the_likelier(truth):
    other = perturbed(truth, 90.0, 10.0)
    first = RefinedPoses(truth, torch.zeros(N))
    scores = torch.where(torch.arange(N) % 3 == 0, 1.0, -1.0)
    best = first.better_of(RefinedPoses(other, scores))
    wins = scores > 0
    assert torch.equal(best.poses.rotations[wins], other.rotations[wins])
    assert torch.equal(best.poses.shifts_in_angstroms[~wins], truth.shifts_in_angstroms[~wins])
    assert torch.equal(best.log_likelihoods, scores.clamp_min(0))


def test_particles_are_selected_with_their_likelihoods(truth):
    scores = torch.randn(N)
    where = scores > 0
    chosen = RefinedPoses(truth, scores)[where]
    assert torch.equal(chosen.log_likelihoods, scores[where])
    assert torch.equal(chosen.poses.rotations, truth.rotations[where])
    assert torch.equal(chosen.poses.shifts_in_angstroms, truth.shifts_in_angstroms[where])


def test_the_likelier_of_two_answers_is_taken_where_there_is_a_second_one(truth):
    where = torch.arange(N) % 2 == 1
    other = perturbed(truth, 90.0, 10.0)[where]
    scores = torch.where(torch.arange(len(other)) % 3 == 0, 1.0, -1.0)
    first = RefinedPoses(truth, torch.zeros(N))
    second = RefinedPoses(other, scores)
    with unchanged(first, second, where):
        best = first.with_better(where, second)
    rows = where.nonzero().flatten()
    taken = rows[scores > 0]
    assert torch.equal(best.poses.rotations[taken], other.rotations[scores > 0])
    assert torch.equal(best.poses.shifts_in_angstroms[taken], other.shifts_in_angstroms[scores > 0])
    assert torch.equal(best.log_likelihoods[taken], torch.ones(len(taken)))
    left = torch.ones(N, dtype=torch.bool)
    left[taken] = False
    assert torch.equal(best.poses.rotations[left], truth.rotations[left])
    assert torch.equal(best.poses.shifts_in_angstroms[left], truth.shifts_in_angstroms[left])
    assert torch.equal(best.log_likelihoods[left], torch.zeros(int(left.sum())))


NOISE = NoiseSpectrum(torch.linspace(0.5, 2.0, RADIUS + 1))


def test_from_coarse_to_fine_poses_are_found_from_further_away(batch, truth, volume, imaging):
    start = perturbed(truth, 40.0, 3 * PIXEL)
    with unchanged(batch, start, volume):
        found = refine_coarse_to_fine(batch, start, volume, imaging, NOISE, 3)
    at_once = refine_poses(batch, start, volume, imaging, NOISE.precision(imaging), 9)
    n_found, n_at_once = (
        int((angular_distance_in_degrees(refined.poses.rotations, truth.rotations) < 1).sum())
        for refined in (found, at_once)
    )
    assert n_found > 2 * n_at_once
    assert n_found > 0.5 * N


def test_from_coarse_to_fine_the_likelihood_is_that_of_the_whole_band(batch, truth, volume, imaging):
    images = noisy(batch, 0.5)
    found = refine_coarse_to_fine(images, perturbed(truth, 5.0, 5.0), volume, imaging, NOISE, 2)
    predicted = imaging.predict(volume, found.poses, images.optics)
    precision = torch.where(imaging.shells > 0, 1 / NOISE.variance[imaging.shells], 0.0)
    expected = log_likelihood(images.coefficients, predicted, precision)
    torch.testing.assert_close(found.log_likelihoods, expected, rtol=1e-4, atol=1e-2)
    rotations = found.poses.rotations.double()
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotations)
    torch.testing.assert_close(rotations @ rotations.transpose(-1, -2), identity, atol=1e-5, rtol=0)


def test_from_coarse_to_fine_without_steps_the_start_is_only_judged(batch, truth, volume, imaging):
    start = perturbed(truth, 3.0, PIXEL)
    found = refine_coarse_to_fine(batch, start, volume, imaging, NOISE, 0)
    assert torch.equal(found.poses.rotations, start.rotations)
    assert torch.equal(found.poses.shifts_in_angstroms, start.shifts_in_angstroms)
    predicted = imaging.predict(volume, start, batch.optics)
    assert torch.equal(found.log_likelihoods, log_likelihood(batch.coefficients, predicted, NOISE.precision(imaging)))


def test_from_coarse_to_fine_the_coarse_steps_come_first_and_never_exceed_the_band(
    batch, truth, volume, imaging, monkeypatch
):
    radii = []

    def spy(batch, poses, volume, imaging, precision, n_iterations):
        radii.append(imaging.max_radius)
        assert len(precision) == imaging.n_coefficients
        return refine_poses(batch, poses, volume, imaging, precision, n_iterations)

    monkeypatch.setattr("cryoai.refinement.refine_poses", spy)
    refine_coarse_to_fine(batch, truth, volume, imaging, NOISE, 1)
    # The last two judge the start and the end on the whole band.
    assert radii == [5, 7, 10, 10, 10]
    radii.clear()
    refine_coarse_to_fine(batch, truth, volume, replace(imaging, max_radius=3), NOISE, 1)
    assert set(radii) == {3}
