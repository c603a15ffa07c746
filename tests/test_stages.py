import dataclasses

import numpy as np
import pytest
import roma
import torch

from cryoai.bootstrap import BootstrapSchedule, Reference
from cryoai.contrast import ContrastSign
from cryoai.encoder import PolarEncoder
from cryoai.fourier import FourierDisc
from cryoai.model import CryoAI
from cryoai.noise import NoiseSpectrum
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.reconstruction import HalfSets
from cryoai.simulation import protein_like_phantom, resample_map
from cryoai.training.stages import Bootstrap, Estimate, ParticlePoses, Placement, Refinement, trial_poses
from cryoai.training.stages.base import chunks_of_halves
from cryoai.training.stages.placement import PlacementMetrics, reliable_from
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
    return PreparedParticles(
        path, disc, optics(), PIXEL, ContrastSign(1, 9.0), disc.n_coefficients(), torch.arange(len(optics())), ()
    )


def particles_of(images, path):
    torch.view_as_real(images).numpy().astype(np.float16).tofile(path)
    return prepared(path, FourierDisc.of_box(BOX))


def make_model(particles):
    encoder = PolarEncoder(particles.disc, RADIUS, n_hypotheses=2, max_shift_in_angstroms=10.0, width=4)
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
    assert placed.searched.all()
    assert (last.from_encoder, last.searched) == (0, 1)
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
    assert placed.searched.all()
    # An encoder that has learned nothing is seldom right, and never to the harm of the poses.
    assert placed.from_encoder.float().mean() < 0.5
    assert (angular_distance_in_degrees(placed.poses.rotations, truth.rotations) < 5).float().mean() > 0.9
    alone = place(particles, reference, model=model, searches=False)
    finish(alone)
    assert alone.result().particles.from_encoder.all()
    assert not alone.result().particles.searched.any()
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


class KnownEncoder:
    """Stands for the encoder of a Placement: proposes known poses (N,) and remembers whom it was asked about."""

    def __init__(self, poses):
        self.poses = poses
        self.asked = []

    def place(self, rows):
        self.asked += rows.tolist()
        return self.poses[rows]


@pytest.fixture
def small_pilot(monkeypatch):
    monkeypatch.setattr("cryoai.training.stages.placement._PILOT", 32)
    return 32


def place_with(encoder_poses, particles, reference, **options):
    """A finished Placement whose encoder proposes these poses (N,)."""
    stage = place(particles, reference, model=make_model(particles), **options)
    stage.encoder = KnownEncoder(encoder_poses)
    searched, found = [], stage._searched
    stage._searched = lambda batch: (searched.extend(batch.indices.tolist()), found(batch))[1]
    last = finish(stage)
    assert sorted(stage.encoder.asked) == list(range(N))
    placed = stage.result().particles
    # What is said to have been searched for was, once, and nothing else.
    assert sorted(searched) == placed.searched.nonzero().flatten().tolist()
    assert last.searched == pytest.approx(float(placed.searched.float().mean()))
    assert last.from_encoder == pytest.approx(float(placed.from_encoder.float().mean()))
    return placed, stage


def test_the_pilot_is_searched_for_and_little_else_where_the_encoder_is_right(
    images, truth, reference, tmp_path, small_pilot
):
    placed, stage = place_with(truth, particles_of(images, tmp_path / "images"), reference)
    first = torch.cat(stage.chunks[: small_pilot // 16])
    assert placed.searched[first].all()
    rest = torch.ones(N, dtype=torch.bool)
    rest[first] = False
    assert placed.searched[rest].float().mean() < 0.2
    assert placed.from_encoder[~placed.searched].all()
    # Where both were asked they agree; where not there was nothing to agree.
    assert placed.sources_agree[placed.searched].float().mean() > 0.9
    assert not placed.sources_agree[~placed.searched].any()
    assert (angular_distance_in_degrees(placed.poses.rotations, truth.rotations) < 5).float().mean() > 0.95


def test_everything_is_searched_for_where_the_encoder_is_useless(images, truth, reference, tmp_path, small_pilot):
    guesses = Poses(random_rotations(N, seed=99).float(), torch.zeros(N, 2))
    particles = particles_of(images, tmp_path / "images")
    assert small_pilot < N
    placed, _ = place_with(guesses, particles, reference)
    assert placed.searched.float().mean() > 0.95
    assert placed.from_encoder.float().mean() < 0.3
    by_search = place(particles, reference)
    finish(by_search)
    # No worse than without an encoder.
    errors, errors_by_search = (
        angular_distance_in_degrees(poses.rotations, truth.rotations)
        for poses in (placed.poses, by_search.result().particles.poses)
    )
    assert (errors < 5).sum() >= (errors_by_search < 5).sum()
    assert (errors < 5).float().mean() > 0.9


def test_after_the_pilot_those_are_searched_for_whose_encoder_was_wrong(
    images, truth, reference, tmp_path, small_pilot
):
    wrong = torch.arange(N) % 3 == 0
    guesses = random_rotations(N, seed=99).float()
    poses = Poses(torch.where(wrong[:, None, None], guesses, truth.rotations), truth.shifts_in_angstroms)
    # By chance or by refinement a guess may lead to the truth.
    far = wrong & (angular_distance_in_degrees(guesses, truth.rotations) > 60)
    placed, stage = place_with(poses, particles_of(images, tmp_path / "images"), reference)
    rest = torch.ones(N, dtype=torch.bool)
    rest[torch.cat(stage.chunks[: small_pilot // 16])] = False
    assert placed.searched[rest & far].float().mean() > 0.95
    assert placed.searched[rest & ~wrong].float().mean() < 0.4
    assert placed.from_encoder[~wrong].float().mean() > 0.5
    assert placed.from_encoder[far].float().mean() < 0.1
    assert (angular_distance_in_degrees(placed.poses.rotations, truth.rotations) < 5).float().mean() > 0.9


def test_as_long_as_the_pilot_lasts_everything_is_searched_for(images, truth, reference, tmp_path):
    placed, _ = place_with(truth, particles_of(images, tmp_path / "images"), reference)
    assert placed.searched.all()


def test_the_order_of_the_chunks_begins_all_over_the_stack_and_keeps_the_halves_apart(
    images, reference, tmp_path, monkeypatch
):
    monkeypatch.setattr("cryoai.training.stages.base._CHUNK", 5)
    stage = place(particles_of(images, tmp_path / "images"), reference)
    in_order = chunks_of_halves(HALF_SET)
    assert sorted(chunk.tolist() for chunk in stage.chunks) == sorted(chunk.tolist() for chunk in in_order)
    beginning = torch.cat(stage.chunks[:6])
    assert HALF_SET[beginning].float().mean() == pytest.approx(float(HALF_SET.float().mean()), abs=0.25)
    assert beginning.max() - beginning.min() > 0.6 * N


def test_placement_tells_who_posed_the_particles():
    assert PlacementMetrics(10, 0.75, 0.5).headline == "75% posed by the encoder, 50% also searched"


@pytest.mark.parametrize(
    ("fit", "missed", "share", "expected"),
    [
        # The worst fit of all, where nothing was missed.
        ([0.0, -3.0, 1.0, -1.0], [0, 0, 0, 0], 0.0, -3.0),
        # Not a fit more than those without a miss, in whatever order they come.
        ([-2.0, 0.0, -3.0, -1.0], [1, 0, 0, 0], 0.0, -1.0),
        # One of four may be missed, so the first miss, fourth of the fits, does no harm, and the next does.
        ([3.0, 2.0, 1.0, 0.0, -1.0], [0, 0, 0, 1, 1], 0.25, 0.0),
        # A miss among the best is diluted by the many after it.
        ([5.0, 4.0, 3.0, 2.0, 1.0], [1, 0, 0, 0, 0], 0.25, 1.0),
        ([5.0, 4.0, 3.0], [1, 0, 0], 0.25, np.inf),
        ([5.0, 4.0], [1, 1], 0.5, np.inf),
        ([5.0, 4.0], [1, 1], 1.0, 4.0),
        ([7.0], [0], 0.0, 7.0),
        ([], [], 0.5, np.inf),
    ],
)
def test_the_fit_from_which_on_the_encoder_is_reliable(fit, missed, share, expected):
    fit, missed = torch.tensor(fit), torch.tensor(missed, dtype=torch.bool)
    with unchanged(fit, missed):
        found = reliable_from(fit, missed, share)
    assert found == expected


def test_of_the_particles_that_fit_reliably_few_enough_were_missed_and_a_lower_limit_would_let_too_many_in():
    generator = torch.Generator().manual_seed(0)
    for share in (0.01, 0.1, 0.4):
        fit = torch.randn(500, generator=generator)
        missed = torch.rand(500, generator=generator) < torch.sigmoid(-3 * fit)
        limit = reliable_from(fit, missed, share)
        assert missed[fit >= limit].float().mean() <= share
        lower = [float(missed[fit >= other].float().mean()) for other in fit[fit < limit]]
        assert min(lower) > share


# ------------------------------------------------------------------------------ refinement


def placed_estimate(particles, poses, reference):
    full = particles.imaging(BOX)
    sets = HalfSets.empty(BOX)
    for half, sums in enumerate(sets.sums):
        rows = (half == HALF_SET).nonzero().flatten()
        sums.add(particles.batch(rows), poses[rows], full, (full.shells > 0).float())
    nobody = torch.zeros(N, dtype=torch.bool)
    return Estimate(
        reference=reference, particles=ParticlePoses(poses, nobody, nobody, nobody, None, poses), half_sets=sets
    )


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
