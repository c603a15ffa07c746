import pytest
import torch

from cryoai.alignment import FrameChange, align_maps, align_poses, change_frame
from cryoai.fourier import FourierDisc, fourier_shell_correlation
from cryoai.poses import Poses, angular_distance_in_degrees
from oracles import random_rotations
from properties import unchanged

hands = pytest.mark.parametrize("mirrored", [False, True])


def random_change(mirrored, seed=7):
    return FrameChange(random_rotations(1, seed)[0].float(), mirrored, torch.tensor([1.4, -0.8, 0.6]))


def random_poses(n):
    return Poses(random_rotations(n).float(), 3 * torch.randn(n, 2))


def assert_same_change(found, truth, *, degrees, shift):
    assert found.mirrored == truth.mirrored
    assert angular_distance_in_degrees(found.rotation, truth.rotation) < degrees
    assert (found.shift - truth.shift).norm() < shift


@hands
def test_changed_poses_of_a_changed_particle_see_the_same_images(phantom, mirrored):
    change, poses = random_change(mirrored), random_poses(5)
    with unchanged(change.rotation, change.shift, poses):
        changed = change.of_poses(poses)
    particle = phantom.moved(change.rotation, mirrored, change.shift)
    k = FourierDisc.of_box(24).coordinates
    for i in range(5):
        before = phantom.image_coefficients(k, 24, poses.rotations[i], -poses.shifts_in_angstroms[i])
        after = particle.image_coefficients(k, 24, changed.rotations[i], -changed.shifts_in_angstroms[i])
        assert (after - before).abs().max() < 1e-5 * before.abs().max()


@hands
def test_aligning_poses_recovers_the_frame(mirrored):
    change, moving = random_change(mirrored), random_poses(100)
    reference = change.of_poses(moving)
    with unchanged(moving, reference):
        found = align_poses(moving, reference)
    assert_same_change(found, change, degrees=0.1, shift=1e-3)


@hands
def test_aligning_poses_resists_a_third_of_outliers(mirrored):
    change, moving = random_change(mirrored), random_poses(300)
    reference = change.of_poses(moving)
    rotations, shifts = reference.rotations.clone(), reference.shifts_in_angstroms.clone()
    rotations[::3] = random_rotations(100, seed=11).float()
    # Half of the wild shifts come with wild rotations.
    shifts[::6] += 30
    shifts[1::6] += 30
    assert_same_change(align_poses(moving, Poses(rotations, shifts)), change, degrees=0.5, shift=0.1)


@hands
@pytest.mark.parametrize("n", [24, 25])
def test_a_changed_map_is_that_of_the_changed_particle(phantom, n, mirrored):
    change, density = random_change(mirrored), phantom.density(n).float()
    with unchanged(density):
        found = change_frame(density, change)
    truth = phantom.moved(change.rotation, mirrored, change.shift).density(n)
    assert (found - truth).norm() < 2e-2 * truth.norm()


@hands
def test_aligning_maps_recovers_the_frame(phantom, mirrored):
    change = random_change(mirrored)
    moving = phantom.density(24).float()
    reference = phantom.moved(change.rotation, mirrored, change.shift).density(24).float()
    with unchanged(moving, reference):
        found = align_maps(moving, 3 * reference, max_radius=8)
    assert_same_change(found, change, degrees=0.5, shift=0.05)
    fsc = fourier_shell_correlation(change_frame(moving, found), reference)
    assert (fsc[:8] > 0.99).all()


def test_without_trying_the_mirror_the_hand_is_kept(phantom):
    change = random_change(True)
    moving = phantom.density(25).float()
    reference = phantom.moved(change.rotation, True, change.shift).density(25).float()
    assert not align_maps(moving, reference, max_radius=4, try_mirror=False).mirrored


def test_a_shift_of_many_pixels_is_found(phantom):
    change = FrameChange(random_rotations(1, 3)[0].float(), False, torch.tensor([6.0, -5.0, 4.0]))
    moving = phantom.density(32).float()
    reference = phantom.moved(change.rotation, False, change.shift).density(32).float()
    found = align_maps(moving, reference, max_radius=8, try_mirror=False)
    assert_same_change(found, change, degrees=0.5, shift=0.05)
