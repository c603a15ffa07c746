"""All that a run knows, turned to the axes of the symmetry that was asked for."""

from dataclasses import replace

import pytest
import torch

from cryoai.alignment import FrameChange, change_frame
from cryoai.encoder import PoseEncoder
from cryoai.fourier import fourier_shell_correlation
from cryoai.model import CryoAI
from cryoai.poses import Hypotheses, angular_distance_in_degrees
from cryoai.reconstruction import particle_mask
from cryoai.symmetry.averaging import symmetrized_map
from cryoai.symmetry.groups import PointGroup
from cryoai.training.stages import Axes, Estimate
from cryoai.volumes import SampledVolume, VoxelVolume
from oracles import random_rotations
from posed_particles import (
    BOX,
    PIXEL,
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
)
from properties import unchanged

N = 300
HALF_SET = torch.arange(N) % 2
TURN = random_rotations(1, seed=4)[0].float()
SHIFT = torch.tensor([1.3, -0.8, 0.9])
GROUPS = ["C3", "D2"]


class Remembering(PoseEncoder):
    """Says the poses (N,) that it was given, one for each particle, whatever it is shown."""

    n_hypotheses = 1

    def __init__(self, poses):
        super().__init__()
        self.poses = poses[:, None]

    def forward(self, coefficients):
        assert len(coefficients) == len(self.poses)
        return Hypotheses(self.poses, torch.zeros(len(coefficients), 1))


def in_angstroms(frame):
    return replace(frame, shift=frame.shift * PIXEL)


def agreement(first, second, last=11):
    mask = particle_mask(BOX)
    return fourier_shell_correlation(first * mask, second * mask)[1 : last + 1]


def obeys(density, group):
    """The least correlation in any shell, but the first two, of a map with itself turned by an operator."""
    unmoved = torch.zeros(3)
    turned = [change_frame(density, FrameChange(g, mirrored=False, shift=unmoved)) for g in group.operators[1:]]
    return min(float(agreement(density, other, 9)[2:].min()) for other in turned)


@pytest.fixture(scope="module", params=GROUPS)
def askew(request, tmp_path_factory):
    """A run on a symmetric molecule, with the axes anywhere and the centre off: group, particles, estimate."""
    torch.manual_seed(0)
    group = PointGroup.named(request.param)
    straight, poses = symmetrized_map(protein(), group), random_poses(N)
    folder = tmp_path_factory.mktemp("askew")
    particles = particles_of(noisy(clean_images(straight, poses), 0.3), folder / "images")
    frame = FrameChange(TURN, mirrored=False, shift=SHIFT)
    turned = change_frame(straight, frame)
    estimate = placed_estimate(particles, in_angstroms(frame).of_poses(poses), HALF_SET, reference_of(turned))
    table = replace(
        estimate.particles,
        start=off_by(estimate.particles.poses, 5.0),
        encoder=off_by(estimate.particles.poses, 20.0),
    )
    volume = VoxelVolume(estimate.reference.density)
    model = CryoAI(Remembering(estimate.particles.poses), volume, particles.imaging(RADIUS)).eval()
    return group, particles, replace(estimate, particles=table, model=model)


@pytest.fixture(scope="module")
def moved(askew):
    group, particles, estimate = askew
    table = estimate.particles
    poses = (table.poses, table.start, table.encoder)
    with unchanged(*estimate.half_sets.sums, estimate.half_maps, estimate.reference, *poses):
        stage = Axes(particles, estimate, HALF_SET, group)
        metrics = finish(stage)
    return stage.result(), metrics


def test_the_axes_end_where_they_belong(askew, moved):
    group, _, estimate = askew
    result, metrics = moved
    assert obeys(estimate.half_maps.first, group) < 0.5
    for density in (*(vars(result.half_maps)[name] for name in ("first", "second")), result.reference.density):
        assert obeys(density, group) > 0.9
    assert metrics.share > 0.9
    assert result.symmetry.share == metrics.share
    assert f"{metrics.share:.0%} of the signal obeys" in metrics.headline


def test_the_map_of_the_moved_poses_is_the_moved_map(askew, moved):
    _, _, estimate = askew
    result, _ = moved
    frame = result.symmetry.frame
    for name in ("first", "second"):
        expected = change_frame(vars(estimate.half_maps)[name], frame)
        assert agreement(vars(result.half_maps)[name], expected, 8).min() > 0.98
    assert agreement(result.reference.density, change_frame(estimate.reference.density, frame)).min() > 0.999


def test_every_image_looks_as_before_from_its_new_pose_on_the_new_map(askew, moved):
    _, particles, estimate = askew
    result, _ = moved
    imaging = particles.imaging(10)
    optics = particles.optics
    for name in ("poses", "start", "encoder"):
        before, after = (
            imaging.predict(SampledVolume.from_map(e.reference.density, 10), vars(e.particles)[name], optics)
            for e in (estimate, result)
        )
        # The maps are read between their lattice points twice.
        assert (after - before).norm() < 0.06 * before.norm()
    wrong = imaging.predict(SampledVolume.from_map(result.reference.density, 10), estimate.particles.poses, optics)
    right = imaging.predict(SampledVolume.from_map(result.reference.density, 10), result.particles.poses, optics)
    assert (wrong - right).norm() > 0.5 * right.norm()


def test_all_poses_are_turned_alike(askew, moved):
    _, _, estimate = askew
    result, _ = moved
    for name in ("poses", "start", "encoder"):
        relative = vars(result.particles)[name].rotations @ vars(estimate.particles)[name].rotations.mT
        assert angular_distance_in_degrees(relative, relative[:1].expand_as(relative)).max() < 0.1
    assert torch.equal(result.particles.from_encoder, estimate.particles.from_encoder)


@torch.no_grad()
def test_an_encoder_that_has_learnt_proposes_poses_on_the_new_map(askew, moved):
    _, particles, estimate = askew
    result, _ = moved
    batch = particles.batch(torch.arange(N), RADIUS)
    volume = result.reference.sampled()
    placings = [e.model.place(batch, volume, result.reference.noise, 0) for e in (result, estimate)]
    poses = result.particles.poses
    torch.testing.assert_close(placings[0].poses.rotations, poses.rotations, atol=1e-5, rtol=0)
    torch.testing.assert_close(placings[0].poses.shifts_in_angstroms, poses.shifts_in_angstroms, atol=1e-4, rtol=0)
    # Those of the model as it was belong to the map as it was.
    assert torch.equal(placings[1].poses.rotations, estimate.particles.poses.rotations)
    assert placings[0].fit.median() > placings[1].fit.median() + 5
    assert result.model.encoder is estimate.model.encoder


def test_axes_that_are_nearly_right_are_adjusted_to_the_nearest(askew, moved):
    """Again, from a few degrees off: not to another of the equivalent places."""
    group, particles, _ = askew
    result, _ = moved
    tilt = FrameChange(
        torch.linalg.matrix_exp(torch.tensor([[0.0, 0.0, 0.06], [0.0, 0.0, 0.04], [-0.06, -0.04, 0.0]])),
        mirrored=False,
        shift=torch.zeros(3),
    )
    off = placed_estimate(
        particles, tilt.of_poses(result.particles.poses), HALF_SET, result.reference, symmetry=result.symmetry
    )
    stage = Axes(particles, off, HALF_SET, group)
    finish(stage)
    again = stage.result()
    distance = angular_distance_in_degrees(again.particles.poses.rotations, result.particles.poses.rotations)
    # About its axis, a cyclic group may stay as it is.
    assert distance.median() < 1.5
    assert obeys(again.half_maps.first, group) > 0.9


def test_before_there_are_poses_the_references_are_turned_both_by_one_turn(askew):
    group, particles, estimate = askew
    noise = [0.03 * torch.randn(BOX, BOX, BOX) for _ in range(2)]
    halves = tuple(replace(estimate.reference, density=estimate.reference.density + n) for n in noise)
    stage = Axes(particles, Estimate(reference=halves[0], half_references=halves), HALF_SET, group)
    finish(stage)
    result = stage.result()
    assert result.particles is None
    assert result.half_maps is None
    frame = result.symmetry.frame
    for before, after in zip(halves, result.half_references, strict=True):
        torch.testing.assert_close(after.density, change_frame(before.density, frame), atol=1e-4, rtol=1e-3)
        assert obeys(after.density, group) > 0.7
    assert torch.equal(result.reference.density, result.half_references[0].density)
    # The box of a search is smaller than that of the particles: a shift of pixels is one of Å.
    small = tuple(reference.at_box(24) for reference in halves)
    stage = Axes(particles, Estimate(reference=small[0], half_references=small), HALF_SET, group)
    finish(stage)
    mask = particle_mask(24)
    moved, expected = stage.result().reference.density, change_frame(small[0].density, stage.result().symmetry.frame)
    assert fourier_shell_correlation(moved * mask, expected * mask)[1:10].min() > 0.99


def test_where_nothing_is_resolved_nothing_is_turned(askew):
    group, particles, _ = askew
    torch.manual_seed(1)
    halves = tuple(reference_of(torch.randn(BOX, BOX, BOX)) for _ in range(2))
    estimate = Estimate(reference=halves[0], half_references=halves)
    stage = Axes(particles, estimate, HALF_SET, group)
    metrics = finish(stage)
    assert metrics.share == 0
    assert stage.result() is estimate
