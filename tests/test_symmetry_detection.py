"""The point group of a map in any frame, from noisy half maps of particles whose group is known."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryoai.alignment import FrameChange, change_frame
from cryoai.formats.mrc import read_map, write_map
from cryoai.fourier import (
    FourierDisc,
    HalfLattice,
    fourier_shell_correlation,
    shells_of_volume,
    soft_sphere,
    transform_map,
)
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.symmetry.averaging import symmetrized_map
from cryoai.symmetry.axes import AxisMap
from cryoai.symmetry.detection import adjust_symmetry, find_symmetry, place_symmetry
from cryoai.symmetry.groups import PointGroup, equivalent_poses
from cryoai.symmetry.self_correlation import SelfCorrelation
from cryoai.volumes import SampledVolume
from oracles import GaussianPhantom, direct_map_transform, random_rotations
from properties import assert_gradient_matches_differences, unchanged
from stacks import needs_relion, run_relion

N = 32
ROTATION = random_rotations(1, seed=5)[0]
SHIFT = (1.7, -1.2, 0.8)


def gaussians(group, n_units=6, seed=0):
    """Gaussians of 1.5 pixels at all operators of a group, 4 to 12 pixels from the centre."""
    generator = np.random.default_rng(seed)
    directions = torch.from_numpy(generator.normal(size=(n_units, 3)))
    radii = torch.from_numpy(generator.uniform(4, 12, size=(n_units, 1)))
    centres = directions / directions.norm(dim=1, keepdim=True) * radii
    every = (centres @ group.operators.double().transpose(-1, -2)).reshape(-1, 3)
    return GaussianPhantom(every, torch.ones(len(every)).double(), torch.full((len(every),), 1.5).double())


def half_maps(density, last_shell, seed=0):
    """Two copies with white noise as strong as the signal in the last shell: there their FSC is 0.5."""
    n, generator = density.shape[-1], torch.Generator().manual_seed(seed)
    shells, weights = shells_of_volume(n)
    there = weights * (shells == last_shell)
    power = (transform_map(density.double()).abs().square() * there).sum() / there.sum()
    # 1 / n times the sum over n^3 voxels of unit variance has the variance n.
    return tuple((density + (power / n).sqrt() * torch.randn(density.shape, generator=generator)).float() for _ in "12")


def likely(candidates):
    return [candidate.group.name for candidate in candidates if candidate.is_likely]


# ------------------------------------------------------------------------------ parts


def test_the_share_is_that_of_sums_over_shells(phantom):
    first, second = half_maps(phantom.density(24), 6)
    turn, displacement = random_rotations(1, seed=2)[0], torch.tensor([0.7, -0.4, 1.1]).double()
    found = SelfCorrelation.of_half_maps(first, second, 6).shares(turn[None].float(), displacement[None].float())

    lattice = HalfLattice(24, 6, 1)
    radii = lattice.radii().double()
    inside = (radii > 0.5) & (radii < 6.5)
    k, shells = lattice.frequencies()[inside].double(), (radii[inside] + 0.5).floor().long()
    # The mates of the plane x = 0 are there, those of the others are not.
    mates = torch.where(k[:, 0] == 0, 1.0, 2.0)
    a, b, turned = (direct_map_transform(m, p) for m, p in ((first, k), (second, k), (second, k @ turn)))
    turned = turned * torch.exp(-2j * torch.pi * (k @ displacement))

    def total(values, shell):
        return (mates * values)[shells == shell].sum()

    above = below = 0
    for s in range(1, 7):
        powers = (total(a.abs() ** 2, s) * total(b.abs() ** 2, s)).sqrt()
        fsc, fsc_turned = (float(total((a * other.conj()).real, s) / powers) for other in (b, turned))
        above += float(total(torch.ones(len(k)), s)) * fsc * fsc_turned
        below += float(total(torch.ones(len(k)), s)) * fsc**2
    assert float(found) == pytest.approx(above / below, abs=0.02)


def test_the_best_displacement_is_the_one_applied_and_shares_have_the_right_gradient(phantom):
    density = phantom.density(24).float()
    turn, shift = random_rotations(1, seed=4)[0].float(), torch.tensor([2.0, -3.0, 1.0])
    turned = change_frame(density, FrameChange(turn, False, shift))
    correlation = SelfCorrelation.of_half_maps(turned, density, 6)
    share, displacement = correlation.largest_shares(turn[None], sampling=3)
    assert share > correlation.largest_shares(random_rotations(20, seed=1).float())[0].max()
    assert (displacement - shift).norm() < 24 / (2 * 8 * 3)
    torch.testing.assert_close(correlation.shares(turn[None], displacement), share, atol=1e-4, rtol=0)
    volume = SampledVolume(correlation.volume.lattice, correlation.volume.values.to(torch.complex128))
    exact = SelfCorrelation(24, 6, correlation.points.double(), correlation.target.to(torch.complex128), volume)
    at = displacement.double() + 0.3
    assert_gradient_matches_differences(lambda d: exact.shares(turn[None].double(), d).sum(), at)


def test_directions_cover_the_hemisphere_and_the_nearest_is_found():
    grid = AxisMap.of_map(_nothing(), 2, 0.3)
    asked = torch.randn(500, 3)
    asked /= asked.norm(dim=1, keepdim=True)
    cosines = (asked @ grid.directions.T).abs()
    # Axes: a direction and its opposite are one.
    chosen = cosines.gather(1, grid.nearest(asked)[:, None])[:, 0]
    assert torch.rad2deg(torch.acos(chosen)).max() < torch.rad2deg(torch.tensor(0.3 / 2))
    assert torch.equal(grid.nearest(grid.directions), torch.arange(len(grid.directions)))


def _nothing():
    empty = torch.zeros(16, 16, 16)
    return SelfCorrelation.of_half_maps(empty, empty, 3)


# ------------------------------------------------------------------------------ phantoms


@pytest.mark.parametrize("name", ["C1", "C3", "C7", "D2", "D5", "O", "I"])
def test_the_group_of_a_phantom_is_named_first_and_its_axes_are_found(name):
    group = PointGroup.named(name)
    particle = gaussians(group).moved(ROTATION, shift=SHIFT)
    first, second = half_maps(particle.density(N), 10)
    with unchanged(first, second):
        found = find_symmetry(first, second, 7)
    assert (likely(found) or ["C1"])[0] == name
    if name == "C1":
        return
    best = found[0]
    assert best.share > 0.95
    assert not best.frame.mirrored
    # Aligned, the particle is the same at all equivalent poses: axes, centre and poses agree.
    aligned = particle.moved(best.frame.rotation, shift=best.frame.shift)
    start = Poses(random_rotations(1, seed=8).float(), torch.tensor([[0.4, -0.9]]))
    poses = equivalent_poses(best.frame.of_poses(start), group)
    k = FourierDisc.of_box(N).coordinates[:200]
    seen = particle.image_coefficients(k, N, start.rotations[0], -start.shifts_in_angstroms[0])
    for rotation, shift in zip(poses.rotations[0], poses.shifts_in_angstroms[0], strict=True):
        again = aligned.image_coefficients(k, N, rotation, -shift)
        assert (again - seen).norm() < 0.05 * seen.norm()


def test_a_featureless_ball_has_no_group():
    assert find_symmetry(*half_maps(soft_sphere(24, 6, 4), 6), 5) == ()


def test_a_smooth_ring_has_only_the_axes_in_its_plane():
    unit = torch.tensor([7.0, 0.0, 0.0]).double()
    centres = PointGroup.named("C40").operators.double() @ unit
    ring = GaussianPhantom(centres, torch.ones(40).double(), torch.full((40,), 1.5).double())
    found = find_symmetry(*half_maps(ring.moved(ROTATION, shift=SHIFT).density(N), 8), 5)
    assert likely(found) == ["C2"]
    # The axis found is across that of the ring.
    assert abs(found[0].frame.rotation[2] @ ROTATION[:, 2].float()) < 0.05


def test_noise_alone_has_no_group():
    first, second = torch.randn(2, 32, 32, 32)
    assert find_symmetry(first, second) == ()


@pytest.mark.parametrize("name", ["D3", "T"])
@needs_relion
def test_an_aligned_map_has_the_symmetry_in_the_orientation_of_relion(tmp_path, name):
    particle = gaussians(PointGroup.named(name)).moved(ROTATION, shift=SHIFT).density(N).float()
    best = find_symmetry(*half_maps(particle, 10), 7)[0]
    assert best.group.name == name
    aligned = change_frame(particle, best.frame)
    write_map(tmp_path / "in.mrc", aligned.numpy(), 1.0)
    run_relion("relion_image_handler", tmp_path, "--i", "in.mrc", "--o", "out.mrc", "--sym", name)
    for symmetric in (torch.from_numpy(read_map(tmp_path / "out.mrc").density), symmetrized_map(aligned, best.group)):
        assert fourier_shell_correlation(aligned, symmetric)[1:9].min() > 0.98
    # Not so without the alignment.
    assert fourier_shell_correlation(particle, symmetrized_map(particle, best.group))[1:9].min() < 0.7


# Turns about the axes of a lattice need no interpolation; axes near them must not be drawn to them.
@pytest.mark.parametrize("tilt_in_degrees", [0.0, 0.5, 1.0])
def test_axes_that_are_slightly_off_are_adjusted(tilt_in_degrees):
    group = PointGroup.named("D2")
    turn = Rotation.from_rotvec(tilt_in_degrees * np.array([0.6, 0.64, 0.48]), degrees=True).as_matrix()
    tilted = gaussians(group).moved(torch.from_numpy(turn), shift=(0.3, -0.2, 0.1)).density(N).float()
    frame = adjust_symmetry(*half_maps(tilted, 11), group).frame
    left = angular_distance_in_degrees(frame.rotation.T, torch.from_numpy(turn).float())
    # 0.09 for all of them: what the noise of the half maps leaves.
    assert left < 0.15
    assert torch.allclose(frame.shift, -frame.rotation @ torch.tensor([0.3, -0.2, 0.1]), atol=0.1)


def test_a_given_group_is_placed_where_it_belongs_and_then_adjusted():
    group = PointGroup.named("D2")
    particle = gaussians(group).moved(ROTATION, shift=SHIFT)
    density = particle.density(N).float()
    placed = place_symmetry(*half_maps(density, 7), group)
    assert placed.share > 0.95
    aligned = particle.moved(placed.frame.rotation, shift=placed.frame.shift)
    slightly = Rotation.from_rotvec([2.0, -1.5, 2.5], degrees=True).as_matrix()
    tilted = aligned.moved(torch.from_numpy(slightly), shift=(0.3, -0.2, 0.1)).density(N).float()
    adjusted = adjust_symmetry(*half_maps(tilted, 7), group)
    assert adjusted.share > 0.95
    assert angular_distance_in_degrees(adjusted.frame.rotation.T, torch.from_numpy(slightly).float()) < 1
    # A group that the particle has not is placed too, and its share says so.
    assert place_symmetry(*half_maps(density, 7), PointGroup.named("C5")).share < 0.5
