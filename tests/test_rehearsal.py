"""Further particles posed on the maps of a run, and the controls: synthetic ones, images of noise, shuffled poses."""

import dataclasses

import numpy as np
import pytest
import torch

from cryoai.bootstrap import BootstrapSchedule
from cryoai.confidence import features_of_fit
from cryoai.noise import NoiseSpectrum
from cryoai.poses import angular_distance_in_degrees
from cryoai.symmetry.averaging import symmetrized_half_sets, symmetrized_map
from cryoai.symmetry.groups import PointGroup
from cryoai.training.stages import BlockPosing, Estimate, Refinement, Rehearsal, trial_poses
from cryoai.volumes import SampledVolume
from posed_particles import (
    BOX,
    clean_images,
    finish,
    noisy,
    particles_of,
    placed_estimate,
    protein,
    random_poses,
    reference_of,
    sums_at,
)
from properties import unchanged

N, N_NEW = 400, 200
HALF_SET = torch.arange(N) % 2
NEW_HALF_SET = (torch.arange(N_NEW) % 5 < 2).long()
SCHEDULE = BootstrapSchedule(n_rotations=4608, shift_step_in_boxes=0.03, n_shift_steps=2)
NO_SYMMETRY = PointGroup.named("C1")


def noise_of(deviation):
    return NoiseSpectrum(torch.full((BOX // 2 + 1,), deviation**2))


class Known:
    """A run that ended with right poses: particles, estimate, and what poses more of them."""

    def __init__(self, folder, deviation, density=None):
        self.folder, self.deviation = folder, deviation
        self.density = protein() if density is None else density
        torch.manual_seed(1)
        self.truth = random_poses(N, seed=1)
        images = noisy(clean_images(self.density, self.truth), deviation)
        self.particles = particles_of(images, folder / "images")
        self.trials = trial_poses(self.particles, SCHEDULE, SCHEDULE.n_rotations)
        estimate = placed_estimate(
            self.particles,
            self.truth,
            HALF_SET,
            reference_of(self.density, deviation),
            noise=noise_of(deviation),
        )
        stage = Refinement(self.particles, estimate, HALF_SET, (), NO_SYMMETRY, max_rounds=1, n_iterations=1)
        finish(stage)
        self.estimate = stage.result()
        self.posing = posing(self.estimate, self.particles, self.trials)

    def new_particles(self, seed=2):
        """Others of the same kind, and their poses."""
        torch.manual_seed(seed)
        truth = random_poses(N_NEW, seed=seed)
        images = noisy(clean_images(self.density, truth), self.deviation)
        return particles_of(images, self.folder / f"new{seed}"), truth, images

    def rehearsal(self, group=NO_SYMMETRY, seed=0, estimate=None):
        return Rehearsal(
            self.particles,
            torch.arange(N),
            estimate or self.estimate,
            HALF_SET,
            self.posing,
            group,
            self.folder / "scratch",
            generator=torch.Generator().manual_seed(seed),
        )


def posing(estimate, particles, trials, group=NO_SYMMETRY):
    return BlockPosing(estimate, particles, trials, group, n_placement_iterations=1, n_iterations=2)


def posed(found, particles, half_set):
    """What came of a block in one go."""
    work = found.begin(particles, half_set)
    while not work.finished:
        work.step()
    return work.result()


def rehearsed(stage):
    finish(stage)
    return stage.result().controls


@pytest.fixture(scope="module")
def clear(tmp_path_factory):
    return Known(tmp_path_factory.mktemp("clear"), 0.5)


@pytest.fixture(scope="module")
def dim(tmp_path_factory):
    """So much noise that a good part of the poses is not found."""
    return Known(tmp_path_factory.mktemp("dim"), 3.0)


@pytest.fixture(autouse=True, scope="module")
def _few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryoai.training.stages.rehearsal._N_IMAGES", 300)
        yield


# ------------------------------------------------------------------------------ blocks


def test_particles_that_the_run_has_not_seen_are_posed_as_well_as_its_own(clear):
    particles, truth, _ = clear.new_particles()
    with unchanged(*clear.estimate.half_sets.sums, clear.estimate.half_maps, clear.estimate.particles.poses):
        block = posed(clear.posing, particles, NEW_HALF_SET)
    errors = angular_distance_in_degrees(block.particles.poses.rotations, truth.rotations)
    assert (errors < 5).float().mean() > 0.95
    assert block.particles.searched.all()
    # Every one of them is in the sums of its half, at its pose, once.
    full = particles.imaging(BOX)
    for half in (0, 1):
        rows = (half == NEW_HALF_SET).nonzero().flatten()
        again = type(block.half_sets).empty(BOX).sums[half]
        again.add(particles.batch(rows), block.particles.poses[rows], full, clear.estimate.noise.precision(full))
        found = block.half_sets.sums[half].sums
        torch.testing.assert_close(found, again.sums, rtol=1e-3, atol=1e-4 * float(again.sums.abs().max()))


def test_a_block_enters_the_sums_with_the_symmetry_that_they_have(clear):
    particles, _, _ = clear.new_particles()
    group = PointGroup.named("D2")
    plain = posed(clear.posing, particles, NEW_HALF_SET)
    symmetric = posed(posing(clear.estimate, particles, clear.trials, group), particles, NEW_HALF_SET)
    for found, expected in zip(
        symmetric.half_sets.sums, symmetrized_half_sets(plain.half_sets, group).sums, strict=True
    ):
        torch.testing.assert_close(found.sums, expected.sums)
    assert not torch.allclose(symmetric.half_sets.sums[0].sums, plain.half_sets.sums[0].sums)


def test_the_fit_of_a_particle_is_that_to_the_map_of_the_other_half(clear):
    particles, _, _ = clear.new_particles()
    block = posed(clear.posing, particles, NEW_HALF_SET)
    limit = clear.posing.band_limit
    imaging = particles.imaging(limit)
    references = clear.estimate.half_maps.references(clear.estimate.half_sets, limit)
    batch, precision = particles.batch(torch.arange(N_NEW), limit), clear.estimate.noise.precision(imaging)
    for half in (0, 1):
        rows = half == NEW_HALF_SET
        volume = SampledVolume.from_map(references[1 - half], limit)
        predicted = imaging.predict(volume, block.particles.poses, batch.optics)
        energy = (predicted.abs().square() * precision).sum(1)
        gain = 2 * ((batch.coefficients * predicted.conj()).real * precision).sum(1) - energy
        torch.testing.assert_close(
            block.particles.fit.z_scores[rows], ((gain - energy) / (2 * energy).sqrt())[rows], rtol=1e-3, atol=1e-2
        )


def test_a_half_of_a_block_is_posed_without_the_other(clear):
    particles, _, images = clear.new_particles()
    changed = torch.where((NEW_HALF_SET == 0)[:, None], images.roll(7, 0), images)
    other = particles_of(changed, clear.folder / "changed")
    first, second = (posed(clear.posing, block, NEW_HALF_SET) for block in (particles, other))
    same = NEW_HALF_SET == 1
    assert torch.equal(first.particles.poses.rotations[same], second.particles.poses.rotations[same])
    assert torch.equal(first.half_sets.sums[1].sums, second.half_sets.sums[1].sums)
    assert not torch.equal(first.half_sets.sums[0].sums, second.half_sets.sums[0].sums)


def test_only_a_run_with_half_maps_can_pose_further_particles(clear):
    with pytest.raises(ValueError, match="half maps"):
        posing(Estimate(reference=clear.estimate.reference), clear.particles, clear.trials)


# ------------------------------------------------------------------------------ controls at a good signal


@pytest.fixture(scope="module")
def controls(clear):
    return rehearsed(clear.rehearsal())


def test_synthetic_particles_of_the_map_are_found_and_fit_as_they_should(controls):
    assert controls.n_images == 300
    assert controls.found_of_synthetic > 0.97
    assert abs(controls.fit_of_synthetic) < 6


def test_nearly_every_particle_fits_better_than_noise(controls):
    assert controls.better_than_noise > 0.98


def test_images_at_the_poses_of_others_make_half_maps_that_do_not_agree(clear, controls):
    """Beyond the shells in which the map is nearly round; those at their own poses do."""
    assert controls.shuffled_poses.shape == (BOX // 2 + 1,)
    assert clear.estimate.half_maps.fsc[8:14].min() > 0.7
    assert controls.shuffled_poses[8:].abs().mean() < 0.15
    assert controls.shuffled_poses[8:].abs().max() < 0.35


def test_images_of_noise_make_maps_that_agree_less_than_those_of_particles(clear, controls):
    """They do agree: noise that is laid over a map takes its shape (Henderson 2013)."""
    assert (controls.noise_only < clear.estimate.half_maps.fsc)[2:14].all()


def test_the_confidence_of_real_particles_is_high_and_that_of_foreign_ones_and_noise_low(clear, controls):
    particles, truth, _ = clear.new_particles()
    torch.manual_seed(0)
    others = {
        "noise": 0.5 * torch.randn(N_NEW, particles.disc.n_coefficients(), dtype=torch.complex64),
        "foreign": noisy(clean_images(protein(1), truth), 0.5),
    }
    fit = posed(clear.posing, particles, NEW_HALF_SET).particles.fit
    confidence = controls.confidence(features_of_fit(fit), fit.z_scores)
    assert confidence.median() > 0.95
    for name, images in others.items():
        fit = posed(clear.posing, particles_of(images, clear.folder / name), NEW_HALF_SET).particles.fit
        assert (controls.confidence(features_of_fit(fit), fit.z_scores) < 0.1).float().mean() > 0.95, name


def test_a_rehearsal_leaves_the_run_as_it_is_and_can_be_repeated_to_the_last_bit(clear, controls):
    with unchanged(*clear.estimate.half_sets.sums, clear.estimate.half_maps, clear.estimate.particles.poses):
        again = rehearsed(clear.rehearsal())
    for name in ("noise_only", "shuffled_poses"):
        assert torch.equal(getattr(again, name), getattr(controls, name))
    assert torch.equal(again.confidence.weights, controls.confidence.weights)
    assert again.better_than_noise == controls.better_than_noise
    other = rehearsed(clear.rehearsal(seed=1))
    assert not torch.equal(other.noise_only, controls.noise_only)


def test_particles_without_a_usable_image_do_not_count(clear, controls):
    """Of two thousand in the table, the rest have no fit."""
    wider = dataclasses.replace(clear.estimate, particles=clear.estimate.particles.among(torch.arange(N), 2000))
    stage = clear.rehearsal(estimate=wider)
    assert rehearsed(stage).better_than_noise == pytest.approx(controls.better_than_noise, abs=1e-6)


@pytest.mark.parametrize("lacking", ["particles", "half_sets", "half_maps", "noise"])
def test_a_rehearsal_needs_a_refined_run(clear, lacking):
    with pytest.raises(ValueError, match="rehearsal needs"):
        clear.rehearsal(estimate=dataclasses.replace(clear.estimate, **{lacking: None}))


# ------------------------------------------------------------------------------ controls where it is difficult


def test_with_much_noise_the_rehearsal_foretells_which_poses_are_right(dim):
    """On particles of the true map that nobody has seen; the rehearsal was with those of the run's own map."""
    controls = rehearsed(dim.rehearsal())
    confidence, right = [], []
    for seed in (2, 3):
        particles, truth, _ = dim.new_particles(seed)
        found = posed(dim.posing, particles, NEW_HALF_SET).particles
        confidence.append(controls.confidence(features_of_fit(found.fit), found.fit.z_scores))
        right.append(angular_distance_in_degrees(found.poses.rotations, truth.rotations) < 10)
    confidence, right = torch.cat(confidence), torch.cat(right)
    share = float(right.float().mean())
    assert 0.2 < share < 0.9
    assert controls.found_of_synthetic == pytest.approx(share, abs=0.12)
    assert float(confidence.mean()) == pytest.approx(share, abs=0.12)
    order = confidence.argsort()
    worse, better = right[order[: len(order) // 2]], right[order[len(order) // 2 :]]
    assert better.float().mean() > worse.float().mean() + 0.1


def test_of_a_symmetric_molecule_equivalent_poses_are_found(tmp_path):
    group = PointGroup.named("C3")
    known = Known(tmp_path, 0.5, symmetrized_map(protein(), group))
    with_group = rehearsed(known.rehearsal(group))
    without = rehearsed(known.rehearsal())
    assert with_group.found_of_synthetic > 0.95
    assert without.found_of_synthetic == pytest.approx(1 / 3, abs=0.1)


def test_particles_of_nothing_fit_a_map_of_nothing_no_better_than_other_images_of_noise(tmp_path):
    torch.manual_seed(3)
    n_coefficients = clean_images(protein(), random_poses(1)).shape[1]
    particles = particles_of(torch.randn(N, n_coefficients, dtype=torch.complex64), tmp_path / "noise")
    start = random_poses(N)
    reference = reference_of(sums_at(particles, start, HALF_SET).solved()[0], 1.0)
    estimate = placed_estimate(particles, start, HALF_SET, reference, noise=noise_of(1.0))
    stage = Refinement(particles, estimate, HALF_SET, (), NO_SYMMETRY, max_rounds=3, n_iterations=2)
    finish(stage)
    found = stage.result()
    rehearsal = Rehearsal(
        particles,
        torch.arange(N),
        found,
        HALF_SET,
        posing(found, particles, trial_poses(particles, SCHEDULE, SCHEDULE.n_rotations)),
        NO_SYMMETRY,
        tmp_path / "scratch",
        generator=torch.Generator().manual_seed(0),
    )
    controls = rehearsed(rehearsal)
    assert controls.better_than_noise < 0.25
    assert np.isfinite(controls.fit_of_synthetic)
