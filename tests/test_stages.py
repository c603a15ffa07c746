"""Placement and Refinement on particles whose poses are known."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from cryoai.bootstrap import BootstrapSchedule
from cryoai.encoder import PolarEncoder
from cryoai.fourier import fourier_shell_correlation
from cryoai.half_maps import HalfMaps
from cryoai.model import CryoAI
from cryoai.noise import Fit
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.reconstruction import HalfSets, particle_mask
from cryoai.symmetry.groups import PointGroup
from cryoai.training.stages import Estimate, Placement, Refinement, trial_poses
from cryoai.training.stages.base import chunks_of_halves, reliable_from
from cryoai.training.stages.placement import PlacementMetrics
from cryoai.training.stages.rounds import _weights
from cryoai.volumes import SampledVolume, VoxelVolume
from oracles import random_rotations
from posed_particles import (
    BOX,
    NOISE,
    RADIUS,
    clean_images,
    finish,
    noisy,
    off_by,
    particles_of,
    placed_estimate,
    protein,
    random_poses,
    reference_of,
    sums_at,
)
from properties import unchanged

N = 120
SCHEDULE = BootstrapSchedule(last_radius=RADIUS, n_rotations=4608, shift_step_in_boxes=0.03, n_shift_steps=2)
# Uneven on purpose: 70 in the one half and 50 in the other.
HALF_SET = (torch.arange(N) * 7 % 12 >= 7).long()
NO_SYMMETRY = PointGroup.named("C1")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr("cryoai.training.stages.base._CHUNK", 16)


@pytest.fixture(scope="module")
def density():
    return protein()


@pytest.fixture
def truth():
    return random_poses(N)


@pytest.fixture
def images(density, truth):
    """Coefficients (N, P) of noisy images of the protein."""
    return noisy(clean_images(density, truth))


@pytest.fixture
def reference(density):
    return reference_of(density)


def make_model(particles):
    encoder = PolarEncoder(particles.disc, RADIUS, n_hypotheses=2, max_shift_in_angstroms=10.0, width=4)
    return CryoAI(encoder, VoxelVolume(torch.zeros(BOX, BOX, BOX)), particles.imaging(RADIUS)).eval()


def place(particles, reference, *, model=None, searches=True, n_iterations=2, half_references=None):
    trials = trial_poses(particles, SCHEDULE, SCHEDULE.n_rotations) if searches else None
    estimate = Estimate(reference=reference, model=model, half_references=half_references)
    return Placement(particles, estimate, HALF_SET, trials, PointGroup.named("C1"), n_iterations=n_iterations)


def refinement(particles, estimate, *, searches=(), group=NO_SYMMETRY, max_rounds=1, n_iterations=2, half_set=HALF_SET):
    return Refinement(particles, estimate, half_set, searches, group, max_rounds=max_rounds, n_iterations=n_iterations)


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


def test_each_half_is_placed_against_its_own_reference(density, images, truth, reference, tmp_path):
    """The map of half 1 is given in another frame: its particles, and no others, end up in that frame."""
    particles = particles_of(images, tmp_path / "images")
    turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    # A quarter turn about z takes (x, y) to (-y, x): exact about the centre of the box, except for its first plane.
    turned = torch.zeros_like(density)
    turned[:, 1:, 1:] = density[:, 1:, 1:].transpose(1, 2).flip(2)
    stage = place(particles, reference, half_references=(reference, reference_of(turned)))
    finish(stage)
    found = stage.result().particles.poses.rotations
    expected = torch.where((HALF_SET == 1)[:, None, None], turn @ truth.rotations, truth.rotations)
    assert (angular_distance_in_degrees(found, expected) < 5).float().mean() > 0.9
    plain = place(particles, reference)
    finish(plain)
    first = HALF_SET == 0
    assert torch.equal(plain.result().particles.poses.rotations[first], found[first])


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

    def place(self, rows, half):
        assert (HALF_SET[rows] == half).all()
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
    stage._searched = lambda batch, side: (searched.extend(batch.indices.tolist()), found(batch, side))[1]
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


def test_refinement_improves_the_poses_and_the_half_maps_and_comes_to_an_end(images, truth, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    estimate = placed_estimate(particles, off_by(truth, 6.0), HALF_SET, reference)
    with unchanged(estimate.particles.poses, *estimate.half_sets.sums, estimate.half_maps):
        stage = refinement(particles, estimate, max_rounds=6, n_iterations=3)
        limits = [stage.round.band_limit]
        while not stage.finished:
            stage.step()
            limits.append(stage.round.band_limit)
            assert 0 <= stage.progress <= 1
    assert stage.progress == 1
    assert 1 <= stage.round.number <= 6
    assert limits == sorted(limits)
    assert all(later <= 1.5 * earlier for earlier, later in itertools.pairwise(limits))
    result = stage.result()
    start, end = (
        angular_distance_in_degrees(poses.rotations, truth.rotations).median()
        for poses in (estimate.particles.poses, result.particles.poses)
    )
    assert start > 5
    assert end < 0.6 * start
    assert result.half_maps.n_resolved_shells >= estimate.half_maps.n_resolved_shells
    assert result.half_maps.fsc[4:14].mean() > estimate.half_maps.fsc[4:14].mean()
    # The start of every pose is remembered.
    assert result.particles.start is estimate.particles.start


def finish_with_one_noise(stages):
    """Finish stages with the noise that the first one began with, of which the halves share one number in a shell."""
    noise = stages[0].round.noise
    for stage in stages:
        begun = stage.state()
        stage.restore(dataclasses.replace(begun, round=dataclasses.replace(begun.round, noise=noise)))
        finish(stage)


def test_a_round_poses_each_half_against_its_own_map(images, truth, reference, tmp_path):
    plain = particles_of(images, tmp_path / "plain")
    negated = particles_of(torch.where((HALF_SET == 0)[:, None], -images, images), tmp_path / "negated")
    estimate = placed_estimate(plain, off_by(truth, 4.0), HALF_SET, reference)
    stages = [refinement(particles, estimate) for particles in (plain, negated)]
    finish_with_one_noise(stages)
    first, second = (stage.result() for stage in stages)
    other = HALF_SET == 1
    assert torch.equal(first.particles.poses.rotations[other], second.particles.poses.rotations[other])
    assert torch.equal(first.half_sets.sums[1].sums, second.half_sets.sums[1].sums)
    assert not torch.equal(first.half_sets.sums[0].sums, second.half_sets.sums[0].sums)


class FirstNegated(HalfMaps):
    """Half maps of which the first gives a wrong reference."""

    def references(self, sets, max_radius):
        first, second = super().references(sets, max_radius)
        return -first, second


def test_the_map_of_a_half_moves_the_poses_of_that_half_only(images, truth, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    estimate = placed_estimate(particles, off_by(truth, 4.0), HALF_SET, reference)
    wrong = dataclasses.replace(estimate, half_maps=FirstNegated(**vars(estimate.half_maps)))
    stages = [refinement(particles, known) for known in (estimate, wrong)]
    finish_with_one_noise(stages)
    first, second = (stage.result().particles.poses.rotations for stage in stages)
    assert torch.equal(first[HALF_SET == 1], second[HALF_SET == 1])
    assert (first != second).flatten(1).any(1)[HALF_SET == 0].float().mean() > 0.9


def test_the_fit_of_an_image_is_that_to_the_map_of_the_other_half(images, truth, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    stage = refinement(particles, placed_estimate(particles, truth, HALF_SET, reference), max_rounds=2)
    finish(stage)
    result = stage.result()
    imaging = particles.imaging(stage.round.band_limit)
    references = result.half_maps.references(result.half_sets, stage.round.band_limit)
    precision = result.noise.precision(imaging)
    batch = particles.batch(torch.arange(N), imaging.max_radius)
    for half in (0, 1):
        volume = SampledVolume.from_map(references[1 - half], imaging.max_radius)
        predicted = imaging.predict(volume, result.particles.poses, batch.optics)
        power = (predicted.abs().square() * precision).sum(1)
        gained = (batch.coefficients.abs().square() * precision).sum(1)
        gained = gained - ((batch.coefficients - predicted).abs().square() * precision).sum(1)
        # For images of the prediction itself: mean |X|^2, variance 2 |X|^2.
        expected = (gained - power) / (2 * power).sqrt()
        rows = half == HALF_SET
        torch.testing.assert_close(result.particles.fit.z_scores[rows], expected[rows], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(result.particles.fit.energies[rows], power[rows], rtol=1e-3, atol=1e-2)
    # Of right poses, to maps that are weighted down where they are noisy.
    assert -1 < result.particles.fit.z_scores.median() < 6


def test_the_noise_that_refinement_finds_is_that_of_the_images(images, truth, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    stage = refinement(particles, placed_estimate(particles, truth, HALF_SET, reference), max_rounds=2)
    finish(stage)
    found = stage.result().noise.variance[1:] / NOISE**2
    # Well within the band of the first rounds.
    assert (found[:10] - 1).abs().max() < 0.1
    # What the maps do not show yet is taken for noise, and some of the noise for the map.
    assert found.min() > 0.9
    assert found.max() < 1.8


# ------------------------------------------------------------------------------ weights

N_MANY = 300
BAD = torch.arange(N_MANY) % 5 == 0


def refined_with_bad_ones(spoil, tmp_path, max_rounds=3):
    """The end of a refinement in which a fifth of the images, in both halves, are not what they should be."""
    truth, half_set = random_poses(N_MANY), torch.arange(N_MANY) % 2
    images = noisy(clean_images(protein(), truth))
    images[BAD] = spoil(images, truth)[BAD]
    particles = particles_of(images, tmp_path / "images")
    estimate = placed_estimate(particles, off_by(truth, 3.0), half_set, reference_of(protein()))
    stage = refinement(particles, estimate, half_set=half_set, max_rounds=max_rounds)
    finish(stage)
    return stage, particles, half_set


def only_noise(images, _truth):
    return NOISE * torch.randn_like(images)


def another_molecule(_images, truth):
    return noisy(clean_images(protein(1), truth))


def far_from_its_pose(images, _truth):
    return images.roll(5, 0)


@pytest.mark.parametrize("spoil", [only_noise, another_molecule, far_from_its_pose])
def test_an_image_that_does_not_fit_has_little_weight_and_the_map_is_better_for_it(spoil, tmp_path):
    stage, particles, half_set = refined_with_bad_ones(spoil, tmp_path)
    result = stage.result()
    weights = _weights(result.particles.fit)
    assert weights[BAD].median() < 0.1
    assert weights[BAD].mean() < 0.25 * weights[~BAD].mean()
    good = weights[~BAD] / weights[~BAD].median()
    assert ((good > 0.5) & (good < 1.5)).float().mean() > 0.95
    # The map of all images at the same poses, with equal weights, is further from the truth.
    equal = sums_at(particles, result.particles.poses, half_set)
    mask, truth = particle_mask(BOX), protein()
    weighted_fsc, equal_fsc = (
        fourier_shell_correlation(sum(sets.solved()) * mask, truth * mask) for sets in (result.half_sets, equal)
    )
    assert weighted_fsc[6:14].mean() > equal_fsc[6:14].mean() + 0.005


def test_an_image_with_more_noise_counts_by_the_inverse_of_its_power(tmp_path):
    stage, _, _ = refined_with_bad_ones(lambda images, _truth: noisy(images, NOISE * 3**0.5), tmp_path)
    weights = _weights(stage.result().particles.fit)
    # Four times the power of the others.
    assert float(weights[BAD].median() / weights[~BAD].median()) == pytest.approx(0.25, abs=0.08)


def test_before_anything_is_known_of_the_images_they_all_count_alike():
    assert torch.equal(_weights(Fit.blank(7, "cpu")), torch.ones(7))
    alike = Fit(torch.full((7,), -1.5), torch.full((7,), 20.0), torch.ones(7))
    assert _weights(alike).std() < 1e-6
    assert _weights(alike)[0] > 0.9


def test_refinement_needs_placed_particles(images, reference, tmp_path):
    particles = particles_of(images, tmp_path / "images")
    with pytest.raises(ValueError, match="placed"):
        refinement(particles, Estimate(reference=reference))
