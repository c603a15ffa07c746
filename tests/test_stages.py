import dataclasses

import numpy as np
import pytest
import roma
import torch

from cryoai.bootstrap import BootstrapSchedule, Reference
from cryoai.encoder import PoseEncoder
from cryoai.fourier import FourierDisc
from cryoai.model import CryoAI
from cryoai.noise import NoiseSpectrum
from cryoai.particles import ContrastSign, PreparedParticles
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.reconstruction import HalfSets
from cryoai.simulation import protein_like_phantom, resample_map
from cryoai.training.stages import Bootstrap, Estimate, ParticlePoses, Placement, Refinement, trial_poses
from cryoai.volumes import SampledVolume, VoxelVolume
from oracles import make_optics, random_rotations
from properties import unchanged

BOX, PIXEL, RADIUS, N = 32, 7.0, 10, 120
NOISE = 0.5
SCHEDULE = BootstrapSchedule(
    n_steps=10, batch_size=30, last_radius=RADIUS, n_rotations=4608, shift_step_in_boxes=0.03, n_shift_steps=2
)
# Uneven on purpose: 70 in the one half and 50 in the other.
HALF_SET = (torch.arange(N) * 7 % 12 >= 7).long()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr("cryoai.training.stages.base._CHUNK", 16)


@pytest.fixture(scope="module")
def density():
    """A protein whose coefficients in the images have unit power in the mean."""
    return torch.from_numpy(resample_map(protein_like_phantom(0), BOX, PIXEL).density) / 0.045


@pytest.fixture
def truth():
    return Poses(random_rotations(N).float(), 4 * torch.randn(N, 2))


@pytest.fixture
def images(density, truth):
    """Coefficients (N, P) of noisy images of the protein."""
    disc = FourierDisc.of_box(BOX)
    volume = SampledVolume.from_map(density, BOX // 2)
    clean = prepared(None, disc).imaging(BOX).predict(volume, truth, optics())
    return clean + NOISE * torch.randn_like(clean)


@pytest.fixture
def reference(density):
    return Reference(density, RADIUS, NoiseSpectrum(torch.full((RADIUS + 1,), NOISE**2)))


def optics():
    u = torch.linspace(8000, 20000, N)
    return make_optics(pixel_size_in_angstroms=PIXEL, defocus_u_in_angstroms=u, defocus_v_in_angstroms=u)


def prepared(path, disc):
    return PreparedParticles(path, disc, optics(), PIXEL, ContrastSign(1, 9.0), disc.n_coefficients())


def particles_of(images, path):
    torch.view_as_real(images).numpy().astype(np.float16).tofile(path)
    return prepared(path, FourierDisc.of_box(BOX))


def make_model(particles):
    encoder = PoseEncoder(BOX, n_hypotheses=2, max_shift_in_angstroms=10.0, width=4)
    return CryoAI(encoder, VoxelVolume(torch.zeros(BOX, BOX, BOX)), particles.imaging(RADIUS)).eval()


def place(particles, reference, *, model=None, searches=True, n_iterations=2):
    trials = trial_poses(particles, SCHEDULE, SCHEDULE.n_rotations) if searches else None
    estimate = Estimate(reference=reference, model=model)
    return Placement(particles, estimate, HALF_SET, trials, n_iterations=n_iterations)


def finish(stage):
    progress = [stage.progress]
    while not stage.finished:
        last = stage.step()
        progress.append(stage.progress)
    assert all(0 <= p <= 1 for p in progress)
    assert progress[-1] == 1
    return last


# ------------------------------------------------------------------------------ bootstrap


@pytest.mark.parametrize(("n_starts", "max_starts", "n_made"), [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_starts_are_made_until_two_agree_or_enough_are_made(images, tmp_path, n_starts, max_starts, n_made):
    stage = Bootstrap(
        particles_of(images, tmp_path / "images"),
        SCHEDULE,
        n_starts=n_starts,
        max_starts=max_starts,
        max_images=100,
        generator=torch.Generator().manual_seed(0),
    )
    n_steps, progress = 0, []
    while not stage.finished:
        stage.step()
        n_steps += 1
        progress.append(stage.progress)
    assert n_steps == n_made * SCHEDULE.n_steps
    assert len(stage.ended) == n_made
    assert progress[-1] == 1
    result = stage.result()
    assert (result.start_agreement is None) == (n_made == 1)
    assert result.reference.max_radius == RADIUS
    best = max(stage.ended, key=lambda ended: float(ended[1].log_likelihoods.mean()))
    assert result.reference is best[0]


def test_held_out_particles_are_never_drawn_and_no_more_are_read_than_allowed(images, tmp_path):
    options = {"n_starts": 1, "max_starts": 1, "max_images": 60, "generator": torch.Generator().manual_seed(0)}
    stage = Bootstrap(particles_of(images, tmp_path / "images"), SCHEDULE, **options)
    assert not torch.isin(stage.held_out, stage.subset).any()
    assert len(stage.held_out) + len(stage.subset) == 60
    assert len(stage.held_out) == 20


# ------------------------------------------------------------------------------ placement


def test_every_particle_is_placed_once_and_in_its_row(images, truth, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    stage = place(particles, reference)
    rows = torch.cat(stage.chunks)
    assert torch.equal(rows.sort().values, torch.arange(N))
    assert all(len(HALF_SET[chunk].unique()) == 1 for chunk in stage.chunks)
    last = finish(stage)
    assert last.n_placed == N
    placed = stage.result().particles
    errors = angular_distance_in_degrees(placed.poses.rotations, truth.rotations)
    assert errors.median() < 2
    assert (errors < 5).float().mean() > 0.9
    assert not placed.from_encoder.any()
    assert placed.encoder is None
    # What was summed is every particle at its pose, no more and no less.
    full = particles.imaging(BOX)
    again = HalfSets.empty(BOX)
    for half, sums in enumerate(again.sums):
        chosen = (half == HALF_SET).nonzero().flatten()
        sums.add(
            particles.batch(chosen),
            placed.poses[chosen],
            full,
            particles.power(torch.arange(particles.n_particles), full.max_radius).precision(full),
        )
        found = stage.result().half_sets.sums[half].sums
        torch.testing.assert_close(found, sums.sums, rtol=1e-3, atol=1e-4 * float(sums.sums.abs().max()))


def test_the_images_of_one_half_do_not_reach_the_other(images, reference, tmp_path):
    stages = []
    for name, sign in (("plain", 1), ("negated", -1)):
        # The power of the images, which both halves share, stays the same to the last bit.
        changed = torch.where((HALF_SET == 0)[:, None], sign * images, images)
        stages.append(place(particles_of(changed, tmp_path / name), reference))
        finish(stages[-1])
    plain, negated = (stage.result() for stage in stages)
    assert torch.equal(plain.half_sets.sums[1].sums, negated.half_sets.sums[1].sums)
    assert not torch.equal(plain.half_sets.sums[0].sums, negated.half_sets.sums[0].sums)
    other = HALF_SET == 1
    assert torch.equal(plain.particles.poses.rotations[other], negated.particles.poses.rotations[other])


def test_the_likelier_of_encoder_and_search_is_taken(images, truth, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    model = make_model(particles)
    stage = place(particles, reference, model=model)
    finish(stage)
    placed = stage.result().particles
    # An encoder that has learned nothing is seldom right, and never to the harm of the poses.
    assert placed.from_encoder.float().mean() < 0.5
    assert (angular_distance_in_degrees(placed.poses.rotations, truth.rotations) < 5).float().mean() > 0.9
    alone = place(particles, reference, model=model, searches=False)
    finish(alone)
    assert alone.result().particles.from_encoder.all()
    assert torch.equal(alone.result().particles.encoder.rotations, placed.encoder.rotations)
    assert placed.start is placed.poses


def test_without_iterations_the_encoder_s_own_poses_are_taken(images, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    stage = place(particles, reference, model=make_model(particles), searches=False, n_iterations=0)
    finish(stage)
    placed = stage.result().particles
    assert torch.equal(placed.poses.rotations, placed.encoder.rotations)
    assert torch.equal(placed.poses.shifts_in_angstroms, placed.encoder.shifts_in_angstroms)


def test_placement_needs_a_map_and_someone_to_propose(images, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    with pytest.raises(ValueError, match="reference"):
        place(particles, None)
    with pytest.raises(ValueError, match="encoder"):
        place(particles, reference, searches=False)


# ------------------------------------------------------------------------------ refinement


def placed_estimate(particles, poses, reference):
    full = particles.imaging(BOX)
    sets = HalfSets.empty(BOX)
    for half, sums in enumerate(sets.sums):
        rows = (half == HALF_SET).nonzero().flatten()
        sums.add(particles.batch(rows), poses[rows], full, (full.shells > 0).float())
    nobody = torch.zeros(N, dtype=torch.bool)
    return Estimate(reference=reference, particles=ParticlePoses(poses, nobody, nobody, None, poses), half_sets=sets)


def off_by(truth, degrees):
    axes = torch.randn(N, 3)
    turns = roma.rotvec_to_rotmat(torch.deg2rad(torch.tensor(degrees)) * axes / axes.norm(dim=1, keepdim=True))
    return Poses(turns @ truth.rotations, truth.shifts_in_angstroms + 3 * torch.randn(N, 2))


def test_refinement_improves_the_poses_and_the_half_maps_and_comes_to_an_end(images, truth, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    estimate = placed_estimate(particles, off_by(truth, 6.0), reference)
    with unchanged(estimate.particles, *estimate.half_sets.sums):
        stage = Refinement(particles, estimate, HALF_SET, max_rounds=6, n_iterations=3)
        before = stage.half_maps.n_resolved_shells
        limits = [stage.band_limit]
        while not stage.finished:
            stage.step()
            limits.append(stage.band_limit)
            assert 0 <= stage.progress <= 1
    assert 1 <= stage.round <= 6
    assert limits == sorted(limits)
    assert max(np.diff(limits)) <= 4
    result = stage.result()
    start, end = (
        angular_distance_in_degrees(poses.rotations, truth.rotations).median()
        for poses in (estimate.particles.poses, result.particles.poses)
    )
    assert start > 5
    assert end < 0.6 * start
    assert result.half_sets.half_maps().n_resolved_shells >= before
    # The start of every pose is remembered.
    assert result.particles.start is estimate.particles.start


def test_a_round_poses_each_half_against_its_own_map(images, truth, reference, tmp_path):
    start = off_by(truth, 4.0)
    plain = particles_of(images, tmp_path / "plain")
    estimate = placed_estimate(plain, start, reference)
    changed = torch.where((HALF_SET == 0)[:, None], -images, images)
    stages = []
    for particles in (plain, particles_of(changed, tmp_path / "negated")):
        stages.append(Refinement(particles, estimate, HALF_SET, max_rounds=1, n_iterations=2))
        finish(stages[-1])
    first, second = (stage.result() for stage in stages)
    other = HALF_SET == 1
    assert torch.equal(first.particles.poses.rotations[other], second.particles.poses.rotations[other])
    assert torch.equal(first.half_sets.sums[1].sums, second.half_sets.sums[1].sums)
    assert not torch.equal(first.half_sets.sums[0].sums, second.half_sets.sums[0].sums)


def test_the_map_of_a_half_moves_the_poses_of_that_half_only(images, truth, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    estimate = placed_estimate(particles, off_by(truth, 4.0), reference)
    stages = [Refinement(particles, estimate, HALF_SET, max_rounds=1, n_iterations=2) for _ in range(2)]
    wrong = dataclasses.replace(stages[1].volumes[0], values=-stages[1].volumes[0].values)
    stages[1].volumes = (wrong, stages[1].volumes[1])
    for stage in stages:
        finish(stage)
    first, second = (stage.result().particles.poses.rotations for stage in stages)
    assert torch.equal(first[HALF_SET == 1], second[HALF_SET == 1])
    assert (first != second).flatten(1).any(1)[HALF_SET == 0].float().mean() > 0.9


def test_refinement_needs_placed_particles(images, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    with pytest.raises(ValueError, match="placed"):
        Refinement(particles, Estimate(reference=reference), HALF_SET, max_rounds=1, n_iterations=1)
