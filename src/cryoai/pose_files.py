"""Poses to and from files."""

from __future__ import annotations

from pathlib import Path

import torch

from cryoai.errors import InputError
from cryoai.formats.star import read_star
from cryoai.formats.table import PoseColumns
from cryoai.poses import Poses, rotations_from_euler_angles, rotations_to_euler_angles

__all__ = ["pose_columns", "poses_from_columns", "read_poses"]


def read_poses(path: Path) -> Poses:
    """The poses (N,) in a STAR file, whose images need not be there.

    Raises
    ------
    InputError
        If the file is no particle STAR file or has no poses.
    """
    columns = read_star(path).poses
    if columns is None:
        raise InputError(f"{path}: no poses (rlnAngleRot, rlnAngleTilt, rlnAnglePsi); give a file that has them")
    return poses_from_columns(columns)


def poses_from_columns(columns: PoseColumns) -> Poses:
    """Poses (N,) of what stands in a file."""
    rotations = rotations_from_euler_angles(torch.from_numpy(columns.angles_in_degrees))
    return Poses(rotations.float(), torch.from_numpy(columns.origins_in_angstroms).float())


def pose_columns(poses: Poses) -> PoseColumns:
    """Poses (N,) as they stand in a file."""
    return PoseColumns(rotations_to_euler_angles(poses.rotations).numpy(), poses.shifts_in_angstroms.double().numpy())
