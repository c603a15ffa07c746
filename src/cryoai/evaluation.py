"""How far poses and maps are from the truth, once the unknown frame is settled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.alignment import FrameChange, align_poses, change_frame
from cryoai.fourier import fourier_shell_correlation
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.reconstruction import particle_mask
from cryoai.symmetry.groups import PointGroup, nearest_mates
from cryoai.validation.shells import period_in_angstroms

__all__ = ["MapErrors", "PoseErrors", "map_errors", "pose_errors", "resolution_in_angstroms", "up_to_symmetry"]


@dataclass(frozen=True, eq=False)
class PoseErrors:
    """Errors of poses after the best global rotation, shift and hand.

    ``mirrored`` says that the hand of the result is opposite to that of the truth, which images alone
    cannot tell; ``frame`` is the change that was applied.
    """

    n_particles: int
    median_rotation_error_in_degrees: float
    mean_rotation_error_in_degrees: float
    within_5_degrees: float
    within_10_degrees: float
    median_shift_error_in_angstroms: float
    mirrored: bool
    frame: FrameChange


def up_to_symmetry(found: Poses, truth: Poses, group: PointGroup) -> Poses:
    """Poses (N,) of a symmetric particle, each replaced by that of its equivalents that is nearest to the truth (N,).

    The axes of the group are where they belong in the frame of what was found; that of the truth is unknown.
    """
    frame = align_poses(found, truth)
    back = FrameChange(frame.rotation.T, mirrored=False, shift=torch.zeros(3))
    mirror = FrameChange(torch.eye(3), mirrored=frame.mirrored, shift=torch.zeros(3))
    return nearest_mates(found, mirror.of_poses(back.of_poses(truth)), group)


def pose_errors(found: Poses, truth: Poses) -> PoseErrors:
    """Compare poses (N,) of the same particles.

    Examples
    --------
    >>> import torch
    >>> from cryoai.poses import rotation_grid
    >>> truth = Poses(rotation_grid(100), torch.zeros(100, 2))
    >>> turned = Poses(rotation_grid(100)[7] @ truth.rotations, truth.shifts_in_angstroms)
    >>> round(pose_errors(turned, truth).within_5_degrees, 3)
    1.0
    """
    frame = align_poses(found, truth)
    aligned = frame.of_poses(found)
    rotation = angular_distance_in_degrees(aligned.rotations, truth.rotations)
    shift = (aligned.shifts_in_angstroms - truth.shifts_in_angstroms).norm(dim=1)
    return PoseErrors(
        n_particles=len(truth),
        median_rotation_error_in_degrees=float(rotation.median()),
        mean_rotation_error_in_degrees=float(rotation.mean()),
        within_5_degrees=float((rotation < 5).float().mean()),
        within_10_degrees=float((rotation < 10).float().mean()),
        median_shift_error_in_angstroms=float(shift.median()),
        mirrored=frame.mirrored,
        frame=frame,
    )


@dataclass(frozen=True, eq=False)
class MapErrors:
    """Agreement of a map with the true one: FSC (n // 2 + 1,) within a mask, and where it falls."""

    fsc: Tensor
    resolution_at_half_in_angstroms: float
    resolution_at_0143_in_angstroms: float


def map_errors(
    found: Tensor, truth: Tensor, pixel_size_in_angstroms: float, frame: FrameChange, mask: Tensor | None = None
) -> MapErrors:
    """Compare a map (n, n, n), brought into the true frame, with the truth (n, n, n).

    The frame comes from poses (shift in Å), so that the map itself is fitted to nothing. ``mask`` (n, n, n) is in the
    frame of ``found``; without one both are compared within a soft sphere.
    """
    in_pixels = FrameChange(frame.rotation, frame.mirrored, frame.shift / pixel_size_in_angstroms)
    mask = particle_mask(truth.shape[-1]) if mask is None else change_frame(mask, in_pixels)
    fsc = fourier_shell_correlation(change_frame(found, in_pixels) * mask, truth * mask)
    return MapErrors(
        fsc,
        resolution_in_angstroms(fsc, 0.5, pixel_size_in_angstroms),
        resolution_in_angstroms(fsc, 0.143, pixel_size_in_angstroms),
    )


def resolution_in_angstroms(fsc: Tensor, threshold: float, pixel_size_in_angstroms: float) -> float:
    """Period of the last shell before a correlation (n // 2 + 1,) first falls below the threshold.

    Infinite if that is the first shell; twice the pixel size if it never falls.

    Examples
    --------
    >>> import torch
    >>> resolution_in_angstroms(torch.tensor([1.0, 0.9, 0.8, 0.3, 0.6]), 0.5, pixel_size_in_angstroms=2.0)
    8.0
    """
    return period_in_angstroms(fsc, threshold, 2 * (len(fsc) - 1) * pixel_size_in_angstroms)
