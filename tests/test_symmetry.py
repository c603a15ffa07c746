"""Point groups and averaging over them, against scipy, closed forms and RELION's programs."""

import re
import subprocess

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryoai.formats.mrc import MrcMap, read_map, write_map
from cryoai.fourier import FourierDisc, fourier_shell_correlation, soft_sphere
from cryoai.imaging import ImagingModel
from cryoai.particle_stack import ParticleStack
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses, angular_distance_in_degrees, rotations_from_euler_angles
from cryoai.reconstruction import ReconstructionSums
from cryoai.simulation import simulate
from cryoai.symmetry.averaging import symmetrized_map, symmetrized_sums
from cryoai.symmetry.groups import PointGroup, equivalent_poses, symmetric_distance_in_degrees
from oracles import GaussianPhantom, make_optics, random_rotations
from properties import unchanged
from stacks import needs_relion, particle_columns, plain_parse, refusal, run_relion, write_star

every_family = pytest.mark.parametrize("name", ["C1", "C2", "C3", "C7", "D2", "D3", "D8", "T", "O", "I"])


def same_rotations(first, second, atol):
    """Whether two sets of matrices (G, 3, 3) are one."""
    distance = (first[:, None].double() - second.double()).abs().amax((-1, -2))
    return len(first) == len(second) and distance.amin(0).max() < atol and distance.amin(1).max() < atol


def symmetric_phantom(phantom, group):
    """The phantom put at every operator, in closed form."""
    copies = [phantom.moved(operator) for operator in group.operators]
    n = len(copies)
    return GaussianPhantom(
        torch.cat([copy.centres for copy in copies]), phantom.amplitudes.repeat(n), phantom.widths.repeat(n)
    )


# ------------------------------------------------------------------------------ groups


@every_family
def test_groups_are_those_of_scipy_up_to_their_orientation(name):
    operators = PointGroup.named(name).operators
    theirs = torch.from_numpy(Rotation.create_group(name).as_matrix())
    assert operators.dtype == torch.float32
    assert torch.equal(operators[0], torch.eye(3))
    # The angles of the rotations are the same, and products stay within the group.
    traces = [m.diagonal(dim1=-2, dim2=-1).sum(-1).double().sort().values for m in (operators, theirs)]
    torch.testing.assert_close(*traces, atol=1e-5, rtol=0)
    products = (operators[:, None] @ operators).reshape(-1, 3, 3)
    nearest = (products[:, None] - operators).abs().amax((-1, -2)).amin(1)
    assert nearest.max() < 1e-5


@needs_relion
@pytest.mark.parametrize("name", ["C1", "C5", "D2", "D3", "D7", "T", "O", "I"])
def test_operators_are_those_that_relion_prints(tmp_path, name):
    command = ["relion_refine", "--sym", name, "--print_symmetry_ops", "--o", "out"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    rows = re.findall(r"R\(\d+\)=\s*\n((?:.*\n){3})", text)
    theirs = torch.tensor([float(number) for block in rows for number in block.split()]).reshape(-1, 3, 3)
    assert same_rotations(PointGroup.named(name).operators, theirs, atol=2e-5)


@pytest.mark.parametrize("name", [" d4 ", "i", "c01"])
def test_names_are_read_in_any_case(name):
    assert PointGroup.named(name).name in {"D4", "I", "C1"}


@pytest.mark.parametrize(
    "name", ["", "X", "C", "D", "C0", "D1", "C61", "D999999999999", "C-2", "C2.5", "T3", "I1", "Ⅽ3"]
)
def test_groups_that_do_not_exist_are_refused(name):
    message = refusal(PointGroup.named, name)
    assert message.startswith(f"--symmetry {name}: ")
    assert message.endswith("; use C1, Cn, Dn, T, O or I")


# ------------------------------------------------------------------------------ poses


def test_equivalent_poses_see_the_same_images_of_a_symmetric_particle(phantom):
    group = PointGroup.named("T")
    particle = symmetric_phantom(phantom, group)
    poses = Poses(random_rotations(2).float(), torch.tensor([[1.5, -2.0], [0.3, 0.7]]))
    with unchanged(poses, group):
        equivalent = equivalent_poses(poses, group)
    assert equivalent.rotations.shape == (2, 12, 3, 3)
    k = FourierDisc.of_box(24).coordinates
    for i in range(2):
        images = torch.stack(
            [
                particle.image_coefficients(k, 24, rotation, -shift)
                for rotation, shift in zip(equivalent.rotations[i], equivalent.shifts_in_angstroms[i], strict=True)
            ]
        )
        assert (images - images[0]).abs().max() < 1e-4 * images.abs().max()
    # They are different poses.
    distance = angular_distance_in_degrees(equivalent.rotations[0, :, None], equivalent.rotations[0])
    assert (distance + 360 * torch.eye(12)).min() > 80


@pytest.mark.parametrize("name", ["C3", "D2", "O", "I"])
def test_distances_are_those_of_a_search_over_the_operators(name):
    group = PointGroup.named(name)
    first, second = Rotation.random(20, rng=1), Rotation.random(20, rng=2)
    operators = Rotation.from_matrix(group.operators.double().numpy())
    truth = np.rad2deg([[(b.inv() * g * a).magnitude() for g in operators] for a, b in zip(first, second, strict=True)])
    a, b = (torch.from_numpy(r.as_matrix()).float() for r in (first, second))
    found = symmetric_distance_in_degrees(a, b, group)
    np.testing.assert_allclose(found, truth.min(1), atol=0.05)
    # One of the equivalent poses is as good as another.
    equivalent = equivalent_poses(Poses(a, torch.zeros(20, 2)), group).rotations
    np.testing.assert_allclose(symmetric_distance_in_degrees(equivalent, a[:, None], group), 0, atol=0.05)


@needs_relion
def test_equivalent_poses_are_those_of_relion_symmetry_expand(tmp_path):
    angles = torch.tensor([[10.0, 20.0, 30.0], [100.0, 70.0, -50.0], [-140.0, 120.0, 5.0]], dtype=torch.float64)
    names = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    columns = dict(zip(names, angles.T.tolist(), strict=True))
    origins = {"rlnOriginXAngst": [0] * 3, "rlnOriginYAngst": [0] * 3}
    write_star(tmp_path / "in.star", {**particle_columns(3), **columns, **origins})
    run_relion("relion_particle_symmetry_expand", tmp_path, "--i", "in.star", "--o", "out.star", "--sym", "D3")
    expanded = plain_parse(tmp_path / "out.star")["particles"]
    theirs = rotations_from_euler_angles(torch.tensor([[float(x) for x in expanded[name]] for name in names]).T)
    image = np.array(expanded["rlnImageName"])
    ours = equivalent_poses(Poses(rotations_from_euler_angles(angles), torch.zeros(3, 2)), PointGroup.named("D3"))
    for i, name in enumerate(particle_columns(3)["rlnImageName"]):
        assert same_rotations(ours.rotations[i], theirs[torch.from_numpy(image == name)], atol=1e-4)


# ------------------------------------------------------------------------------ maps


@pytest.mark.parametrize("n", [24, 25])
@pytest.mark.parametrize("name", ["C1", "C5", "T", "I"])
def test_a_symmetrized_map_is_the_mean_of_the_turned_particle(phantom, name, n):
    group, density = PointGroup.named(name), phantom.density(n).float()
    with unchanged(density, group):
        found = symmetrized_map(density, group)
    truth = symmetric_phantom(phantom, group).density(n) / len(group)
    assert (found - truth).norm() < 0.012 * truth.norm()  # 0.3 % to 0.8 %


@needs_relion
@pytest.mark.parametrize("name", ["C3", "D5", "T", "O", "I"])
def test_relion_symmetrizes_a_map_alike(tmp_path, phantom, name):
    density = phantom.density(32).float()
    write_map(tmp_path / "in.mrc", density.numpy(), 1.0)
    run_relion("relion_image_handler", tmp_path, "--i", "in.mrc", "--o", "out.mrc", "--sym", name)
    theirs = torch.from_numpy(read_map(tmp_path / "out.mrc").density)
    ours = symmetrized_map(density, PointGroup.named(name))
    # RELION turns the map in real space by linear interpolation.
    fsc = fourier_shell_correlation(ours, theirs)[:8]
    assert fsc.min() > 0.99


# ------------------------------------------------------------------------------ sums

BOX, PIXEL, RADIUS = 24, 3.0, 8


def summed(particle, poses, at, noise=0.0):
    """Sums of images taken at poses (N,) and inserted at poses (N, ...)."""
    imaging = ImagingModel(FourierDisc.of_box(BOX), PIXEL, RADIUS)
    optics, k = make_optics(len(poses)), imaging.coordinates.double()
    slices = [
        particle.image_coefficients(k, BOX, rotation, -shift / PIXEL)
        for rotation, shift in zip(poses.rotations, poses.shifts_in_angstroms, strict=True)
    ]
    images = imaging.ctf(optics) * torch.stack(slices).to(torch.complex64)
    strength = noise * images.abs().square().mean().sqrt()
    images = images + strength * torch.randn(images.shape, dtype=images.dtype, generator=torch.manual_seed(1))
    sums = ReconstructionSums.empty(BOX, RADIUS)
    batch = ParticleBatch(torch.arange(len(poses)), images, optics)
    sums.add(batch, at, imaging, torch.ones(imaging.n_coefficients))
    return sums


def few_poses(n):
    return Poses(random_rotations(n).float(), 3 * torch.randn(n, 2))


@pytest.mark.parametrize("name", ["C2", "C4", "D2", "D4", "O"])
def test_operators_that_map_the_lattice_onto_itself_give_the_sums_of_all_equivalent_poses(phantom, name):
    group = PointGroup.named(name)
    particle, poses = symmetric_phantom(phantom, group), few_poses(30)
    once, every = summed(particle, poses, poses), summed(particle, poses, equivalent_poses(poses, group))
    with unchanged(once, group):
        found = symmetrized_sums(once, group)
    # Sums are compared as they are used: folded, within the band.
    within = once.lattice.radii() < RADIUS + 0.5
    ours, theirs = (sums.lattice.fold(sums.sums)[:, within] for sums in (found, every))
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["C3", "D3", "T", "I"])
def test_sums_read_at_turned_points_give_the_map_of_all_equivalent_poses(phantom, name):
    group = PointGroup.named(name)
    particle, poses = symmetric_phantom(phantom, group), few_poses(60)
    ball, truth = soft_sphere(BOX, 9, 2), particle.density(BOX).float()

    def solved(sums):
        return sums.solve(1e-3 * sums.mean_weight()) * ball

    def mean_fsc(density):
        return fourier_shell_correlation(density, truth * ball)[1 : RADIUS + 1].mean()

    once, every = summed(particle, poses, poses), summed(particle, poses, equivalent_poses(poses, group))
    found = symmetrized_sums(once, group)
    torch.testing.assert_close(found.mean_weight()[1:], every.mean_weight()[1:], rtol=0.1, atol=0)
    full = solved(every)
    assert (solved(found) - full).norm() < 0.05 * full.norm()
    assert (solved(found) * full).sum() / full.square().sum() == pytest.approx(0.98, abs=0.01)  # dimmed

    # Inserted once, at all poses, and read: C3 0.699, 0.804, 0.811; I 0.608, 0.827, 0.830.
    once = summed(particle, poses, poses, noise=1.0)
    every = summed(particle, poses, equivalent_poses(poses, group), noise=1.0)
    fsc = mean_fsc(solved(symmetrized_sums(once, group)))
    assert fsc > mean_fsc(solved(every)) - 0.005
    assert fsc > mean_fsc(solved(once)) + 0.1


def test_symmetrized_sums_of_halves_are_those_of_the_whole(phantom):
    group, poses = PointGroup.named("C3"), few_poses(20)
    first, second = (summed(phantom, part, part) for part in (poses[:8], poses[8:]))
    together = symmetrized_sums(first + second, group)
    apart = symmetrized_sums(first, group) + symmetrized_sums(second, group)
    torch.testing.assert_close(together.sums, apart.sums, atol=1e-3, rtol=1e-4)


def test_no_symmetry_changes_nothing(phantom):
    sums = summed(phantom, few_poses(10), few_poses(10))
    found = symmetrized_sums(sums, PointGroup.named("C1"))
    torch.testing.assert_close(
        found.solve(torch.ones(RADIUS + 1)), sums.solve(torch.ones(RADIUS + 1)), atol=1e-5, rtol=1e-4
    )


@needs_relion
def test_relion_reconstructs_with_symmetry_alike(tmp_path, phantom):
    group, n, box, pixel = PointGroup.named("D3"), 200, 32, 3.0
    source = MrcMap(symmetric_phantom(phantom, group).density(box).float().numpy(), pixel)
    simulation = simulate(source, tmp_path, n_particles=n, n_pixels=box, pixel_size_in_angstroms=pixel, snr=1.0, seed=0)
    arguments = ["--i", "truth.star", "--o", "out.mrc", "--ctf", "--pad", "2", "--sym", "D3"]
    run_relion("relion_reconstruct", tmp_path, *arguments)
    theirs = torch.from_numpy(read_map(tmp_path / "out.mrc").density)
    stack, disc = ParticleStack.open(simulation.truth), FourierDisc.of_box(box)
    imaging = ImagingModel(disc, pixel, disc.max_radius)
    batch = ParticleBatch(torch.arange(n), disc.from_images(stack.images(torch.arange(n))), stack.optics)
    sums = ReconstructionSums.empty(box, disc.max_radius)
    sums.add(batch, stack.poses, imaging, torch.ones(disc.n_coefficients()))
    found = symmetrized_sums(sums, group)
    ball = soft_sphere(box, 12, 2)
    fsc = fourier_shell_correlation(found.solve(1e-6 * found.mean_weight()) * ball, theirs * ball)
    assert fsc[1:13].min() > 0.98  # 0.985; beyond is nothing but noise
