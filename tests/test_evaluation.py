import math

import pytest
import roma
import torch

from cryoai.alignment import FrameChange
from cryoai.evaluation import map_errors, pose_errors, resolution_in_angstroms
from cryoai.poses import Poses
from oracles import random_rotations
from properties import unchanged

N = 200


@pytest.fixture
def truth():
    return Poses(random_rotations(N).float(), 5 * torch.randn(N, 2))


def perturbed(truth, degrees, angstroms):
    axes, directions = torch.randn(N, 3), torch.randn(N, 2)
    turns = roma.rotvec_to_rotmat(torch.deg2rad(degrees)[:, None] * axes / axes.norm(dim=1, keepdim=True))
    moves = angstroms * directions / directions.norm(dim=1, keepdim=True)
    return Poses(turns @ truth.rotations, truth.shifts_in_angstroms + moves)


@pytest.mark.parametrize("mirrored", [False, True])
def test_errors_do_not_depend_on_the_frame_or_the_hand(truth, mirrored):
    # Errors of 1 to 4 degrees, with a median of 2.5.
    found = perturbed(truth, torch.linspace(1, 4, N), 0.5)
    frame = FrameChange(random_rotations(1, seed=5)[0].float(), mirrored, torch.tensor([8.0, -5.0, 11.0]))
    elsewhere = frame.of_poses(found)
    with unchanged(elsewhere, truth):
        errors = pose_errors(elsewhere, truth)
    assert errors.n_particles == N
    assert errors.mirrored == mirrored
    assert errors.median_rotation_error_in_degrees == pytest.approx(2.5, abs=0.2)
    assert errors.mean_rotation_error_in_degrees == pytest.approx(2.5, abs=0.2)
    assert errors.median_shift_error_in_angstroms == pytest.approx(0.5, abs=0.1)
    assert errors.within_5_degrees == 1


def test_the_same_poses_have_no_errors(truth):
    errors = pose_errors(truth, truth)
    assert errors.median_rotation_error_in_degrees < 0.1
    assert errors.median_shift_error_in_angstroms < 1e-3
    assert not errors.mirrored
    assert errors.within_5_degrees == errors.within_10_degrees == 1


def test_shares_count_particles_within_5_and_10_degrees(truth):
    # 60 % nearly right, 20 % off by 7 degrees and 20 % far away.
    degrees = torch.tensor([0.1, 7.0, 90.0]).repeat_interleave(torch.tensor([120, 40, 40]))
    errors = pose_errors(perturbed(truth, degrees, 0.0), truth)
    assert errors.within_5_degrees == pytest.approx(0.6)
    assert errors.within_10_degrees == pytest.approx(0.8)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_map_in_another_frame_is_the_same_map(phantom, mirrored):
    shift_in_pixels, pixel_size = torch.tensor([1.5, -1.0, 0.5]), 3.0
    rotation = random_rotations(1, seed=3)[0]
    truth = phantom.moved(rotation, mirrored, shift_in_pixels).density(32).float()
    frame = FrameChange(rotation.float(), mirrored, shift_in_pixels * pixel_size)
    errors = map_errors(phantom.density(32).float(), truth, pixel_size, frame)
    assert (errors.fsc[:9] > 0.99).all()
    assert errors.resolution_at_0143_in_angstroms <= errors.resolution_at_half_in_angstroms <= 32 * pixel_size / 8
    wrong_hand = FrameChange(frame.rotation, not mirrored, frame.shift)
    elsewhere = map_errors(phantom.density(32).float(), truth, pixel_size, wrong_hand)
    assert elsewhere.fsc[3:8].mean() < 0.9


@pytest.mark.parametrize(
    ("fsc", "threshold", "resolution"),
    [
        ([1.0, 0.9, 0.8, 0.3, 0.6], 0.5, 8.0),
        ([1.0, 0.9, 0.8, 0.3, 0.6], 0.143, 4.0),
        ([1.0, 0.1, 0.9, 0.9, 0.9], 0.143, math.inf),
        ([0.0, 0.5, 0.2, 0.2, 0.1], 0.143, 16 / 3),
    ],
)
def test_the_resolution_is_where_the_correlation_falls_for_the_first_time(fsc, threshold, resolution):
    assert resolution_in_angstroms(torch.tensor(fsc), threshold, 2.0) == pytest.approx(resolution)
