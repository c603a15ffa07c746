"""Poses to and from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cryoai.errors import InputError
from cryoai.formats.cryodrgn import read_cryodrgn_poses
from cryoai.formats.cryosparc import read_cryosparc_poses
from cryoai.formats.particle_files import FileKind, file_kind
from cryoai.formats.star import read_star_poses
from cryoai.formats.table import FloatColumn, PoseColumns
from cryoai.poses import Poses, rotations_from_euler_angles, rotations_to_euler_angles

__all__ = ["pose_columns", "poses_from_columns", "read_poses"]


def read_poses(
    path: Path, *, extent_in_angstroms: float | FloatColumn | None = None, passthrough: Sequence[Path] = ()
) -> Poses:
    """The poses (N,) in a file, whose images need not be there.

    Parameters
    ----------
    path
        STAR file, cryoSPARC dataset, or cryoDRGN's pose.pkl.
    extent_in_angstroms
        Side of the images, or sides (N,): what cryoDRGN's shifts are fractions of. Other files need none.
    passthrough
        Further cryoSPARC datasets of the same particles.

    Raises
    ------
    InputError
        If the file cannot be read or has no poses.
    """
    kind = file_kind(path)
    if kind is FileKind.PICKLE:
        return poses_from_columns(_cryodrgn_columns(path, extent_in_angstroms))
    if kind is FileKind.CRYOSPARC:
        columns, names = read_cryosparc_poses(path, passthrough), "alignments3D/pose"
    elif kind is FileKind.STAR:
        columns, names = read_star_poses(path), "rlnAngleRot, rlnAngleTilt, rlnAnglePsi"
    else:
        raise InputError(f"{path}: a {kind.value} has no poses; give a STAR file, .cs file or cryoDRGN's pose.pkl")
    if columns is None:
        raise InputError(f"{path}: no poses ({names}); give a file that has them")
    return poses_from_columns(columns)


def _cryodrgn_columns(path: Path, extent_in_angstroms: float | FloatColumn | None) -> PoseColumns:
    poses = read_cryodrgn_poses(path)
    if extent_in_angstroms is None:
        if poses.origins_in_boxes is not None:
            raise InputError(
                f"{path}: its shifts are fractions of the box, whose side in Å is not known here; "
                "give the poses as a STAR or .cs file"
            )
        extent_in_angstroms = 0.0
    return poses.columns(extent_in_angstroms)


def poses_from_columns(columns: PoseColumns) -> Poses:
    """Poses (N,) of what stands in a file."""
    rotations = rotations_from_euler_angles(torch.from_numpy(columns.angles_in_degrees))
    return Poses(rotations.float(), torch.from_numpy(columns.origins_in_angstroms).float())


def pose_columns(poses: Poses) -> PoseColumns:
    """Poses (N,) as they stand in a file."""
    return PoseColumns(rotations_to_euler_angles(poses.rotations).numpy(), poses.shifts_in_angstroms.double().numpy())
