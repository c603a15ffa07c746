import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cryoai.fourier import FourierDisc
from cryoai.poses import (
    Hypotheses,
    Poses,
    angular_distance_in_degrees,
    half_turn,
    rotation_grid,
    rotations_about_z,
    rotations_from_euler_angles,
    rotations_from_s2s2,
    rotations_to_euler_angles,
)
from oracles import random_rotations
from properties import unchanged


def assert_rotations(matrices, atol):
    eye = torch.eye(3, dtype=matrices.dtype).expand_as(matrices)
    torch.testing.assert_close(matrices.transpose(-1, -2) @ matrices, eye, atol=atol, rtol=0)
    torch.testing.assert_close(
        torch.linalg.det(matrices), torch.ones(matrices.shape[:-2]).to(matrices), atol=atol, rtol=0
    )


@pytest.fixture
def euler_angles():
    general = np.random.default_rng(0).uniform([-180, 0, -180], [180, 180, 180], size=(50, 3))
    special = [[10, 0, 20], [10, 180, 20], [0, 0, 0], [-170, 1e-3, 35], [-90, 90, 180], [40, -30, 0]]
    return np.concatenate([general, special])


def test_euler_angles_are_those_of_scipy(euler_angles):
    scipy = Rotation.from_euler("ZYZ", euler_angles, degrees=True).as_matrix()
    torch.testing.assert_close(rotations_from_euler_angles(torch.from_numpy(euler_angles)), torch.from_numpy(scipy))


def test_euler_angles_transpose_relions_matrix():
    rot, tilt, psi = np.deg2rad([20.0, 50.0, -70.0])
    ca, sa, cb, sb, cg, sg = (f(a) for a in (rot, tilt, psi) for f in (np.cos, np.sin))
    relion = [
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ]
    ours = rotations_from_euler_angles(torch.tensor([20.0, 50.0, -70.0], dtype=torch.float64))
    torch.testing.assert_close(ours.T, torch.tensor(relion, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotations_survive_the_trip_through_euler_angles(euler_angles, dtype):
    rotations = torch.from_numpy(Rotation.from_euler("ZYZ", euler_angles, degrees=True).as_matrix()).to(dtype)
    with unchanged(rotations):
        angles = rotations_to_euler_angles(rotations)
    assert torch.isfinite(angles).all()
    again = rotations_from_euler_angles(angles).to(dtype)
    torch.testing.assert_close(again, rotations, atol=10 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize(("tilt", "rot"), [(0.0, 30.0), (180.0, -10.0)])
def test_psi_is_zero_where_only_a_combination_is_defined(tilt, rot):
    rotation = rotations_from_euler_angles(torch.tensor([10.0, tilt, 20.0], dtype=torch.float64))
    expected = torch.tensor([rot, tilt, 0.0], dtype=torch.float64)
    torch.testing.assert_close(rotations_to_euler_angles(rotation), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [24, 25])
def test_a_half_turn_turns_the_image(phantom, n):
    rotation, displacement = random_rotations(1)[0], torch.tensor([1.2, -0.7])
    image = phantom.projection(n, rotation, displacement)
    # Index 0 of an even box has no partner across the centre.
    first = 1 - n % 2
    turned = phantom.projection(n, half_turn(rotation), -displacement)
    torch.testing.assert_close(turned[first:, first:], image[first:, first:].flip(0, 1))
    disc = FourierDisc.of_box(n, dtype=torch.float64)
    poses = Poses(rotation[None], displacement[None]).turned_by_pi()
    coefficients = phantom.image_coefficients(disc.coordinates, n, poses.rotations[0], poses.shifts_in_angstroms[0])
    straight = phantom.image_coefficients(disc.coordinates, n, rotation, displacement)
    torch.testing.assert_close(coefficients, straight.conj())


@given(st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=6, max_size=6))
def test_two_directions_give_a_rotation(numbers):
    vectors = torch.tensor(numbers, dtype=torch.float64)
    first, second = vectors.unflatten(0, (2, 3))
    assume(torch.linalg.cross(first, second).norm() > 1e-3 * first.norm() * second.norm() > 1e-9)
    rotation = rotations_from_s2s2(vectors)
    assert_rotations(rotation, atol=1e-9)
    torch.testing.assert_close(rotation[:, 0], first / first.norm())
    assert rotation[:, 1] @ second > 0


def test_two_directions_have_a_finite_gradient_even_when_they_coincide():
    vectors = torch.randn(20, 6, requires_grad=True)
    degenerate = torch.tensor([[1.0, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], requires_grad=True)
    for v in (vectors, degenerate):
        (rotations_from_s2s2(v) * torch.randn(3, 3)).sum().backward()
        assert torch.isfinite(v.grad).all()


def test_the_distance_of_rotations_is_the_angle_between_them():
    a, b = random_rotations(100), random_rotations(100, seed=1)
    scipy = np.rad2deg((Rotation.from_matrix(a.numpy()).inv() * Rotation.from_matrix(b.numpy())).magnitude())
    torch.testing.assert_close(angular_distance_in_degrees(a, b), torch.from_numpy(scipy))
    assert (angular_distance_in_degrees(a, a) == 0).all()
    torch.testing.assert_close(angular_distance_in_degrees(a, half_turn(a)), torch.full((100,), 180.0).double())


def test_the_rotation_grid_is_proper_and_leaves_no_large_gaps():
    grid = rotation_grid(4608)
    assert_rotations(grid, atol=1e-5)
    cosine = (torch.einsum("aij,bij->ab", random_rotations(500).float(), grid) - 1) / 2
    gap = torch.rad2deg(torch.acos(cosine.amax(1).clamp(-1, 1)))
    # 4608 balls that share the rotations equally have a radius of 9.9 degrees.
    assert gap.max() < 17
    assert gap.mean() < 10


def test_poses_select_and_take_members():
    rotations, shifts = random_rotations(6).reshape(2, 3, 3, 3), torch.randn(2, 3, 2)
    poses = Poses(rotations, shifts)
    taken = poses.take(torch.tensor([[2, 0], [1, 1]]))
    assert torch.equal(taken.rotations[0, 0], rotations[0, 2])
    assert torch.equal(taken.shifts_in_angstroms[1], shifts[1, [1, 1]])
    assert len(poses) == 2
    assert torch.equal(poses[:, 0].shifts_in_angstroms, shifts[:, 0])


@pytest.mark.parametrize(("rotations", "shifts"), [((4, 3, 3), (5, 2)), ((4, 3, 3), (4, 3)), ((4, 3, 2), (4, 2))])
def test_poses_reject_shapes_that_do_not_match(rotations, shifts):
    with pytest.raises(ValueError, match="poses need rotations"):
        Poses(torch.zeros(rotations), torch.zeros(shifts))


def test_rotations_about_z_are_those_of_scipy_and_turn_x_towards_y():
    angles = torch.linspace(-7, 7, 50, dtype=torch.float64)
    scipy = torch.from_numpy(Rotation.from_euler("z", angles.numpy()[:, None]).as_matrix())
    with unchanged(angles):
        found = rotations_about_z(angles)
    torch.testing.assert_close(found, scipy)
    torch.testing.assert_close(rotations_about_z(angles.reshape(5, 10)), scipy.reshape(5, 10, 3, 3))
    turned = rotations_about_z(torch.tensor(0.1)) @ torch.tensor([1.0, 0.0, 0.0])
    assert turned[1] > 0


def test_the_likeliest_hypotheses_come_in_the_order_of_their_probabilities():
    rotations, shifts = random_rotations(8).reshape(2, 4, 3, 3), torch.randn(2, 4, 2)
    hypotheses = Hypotheses(Poses(rotations, shifts), torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.1, 0.2]]).log())
    with unchanged(hypotheses):
        found = hypotheses.likeliest(3)
    torch.testing.assert_close(found.log_probabilities.exp(), torch.tensor([[0.4, 0.3, 0.2], [0.7, 0.2, 0.1]]))
    for row, order in enumerate([[1, 3, 2], [0, 3, 2]]):
        assert torch.equal(found.poses.rotations[row], rotations[row, order])
        assert torch.equal(found.poses.shifts_in_angstroms[row], shifts[row, order])
    everything = hypotheses.likeliest(10)
    assert everything.log_probabilities.shape == (2, 4)
    assert torch.equal(everything.poses.rotations[0], rotations[0, [1, 3, 2, 0]])


def test_poses_stand_beside_and_after_others():
    first, second = (Poses(torch.randn(2, k, 3, 3), torch.randn(2, k, 2)) for k in (3, 1))
    both = first.beside(second)
    assert torch.equal(both[:, 3].rotations, second.rotations[:, 0])
    assert torch.equal(both.shifts_in_angstroms[:, :3], first.shifts_in_angstroms)
    after = Poses.cat([first, first])
    assert torch.equal(after.rotations[2:], first.rotations)
    assert torch.equal(after.shifts_in_angstroms[:2], first.shifts_in_angstroms)
