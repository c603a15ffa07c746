"""The particle table: what every particle file comes down to, whatever program wrote it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryoai.errors import InputError

__all__ = ["FloatColumn", "ImageReferences", "ParticleTable", "PoseColumns", "StarLayout", "half_set_of"]

FloatColumn = NDArray[np.float64]

_NO_HALF = -1
# Of all particles; a half of fewer has no map to be compared with.
_LEAST_SHARE_OF_A_HALF = 0.1


@dataclass(frozen=True, eq=False)
class ImageReferences:
    """Where each particle's image is: ``names[stack[i]]``, image ``index[i]``, counted from 0."""

    names: tuple[str, ...]
    stack: NDArray[np.int32]
    index: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class PoseColumns:
    """RELION angles (N, 3), ordered (rot, tilt, psi), in degrees; origins (N, 2), (x, y), in Å."""

    angles_in_degrees: FloatColumn
    origins_in_angstroms: FloatColumn


@dataclass(frozen=True)
class StarLayout:
    """Where in a STAR file the particles stand, for writing it again.

    Attributes
    ----------
    path
        The file, or a copy of it.
    fingerprint
        Of the file when it was read, by :func:`~cryoai.formats.files.file_fingerprint`.
    block
        Name of the table of particles.
    columns
        Of that table, in their order.
    has_optics
        Whether there is a table of optics groups, which makes it a file of RELION 3.1 or later.
    """

    path: Path
    fingerprint: tuple[int, int]
    block: str
    columns: tuple[str, ...]
    has_optics: bool


@dataclass(frozen=True, eq=False)
class ParticleTable:
    """The particles of a file, in its order, in RELION's conventions and units.

    Attributes
    ----------
    path
        The file, as the user gave it.
    rows : (N,)
        Row of each particle in the file, counted from 0.
    poses
        None where the file has none.
    star
        For a STAR file: all that is needed to write it again with nothing lost.
    ignored
        Of what the file says about the images and is left out of the calculation: one line each.
    half_set : (N,)
        0 or 1, and -1 where the file says something else; None where it says nothing. :meth:`usable_half_set` is for
        those who go by it.
    """

    path: Path
    rows: NDArray[np.int64]
    images: ImageReferences
    pixel_size_in_angstroms: FloatColumn
    voltage_in_kilovolts: FloatColumn
    spherical_aberration_in_mm: FloatColumn
    amplitude_contrast: FloatColumn
    defocus_u_in_angstroms: FloatColumn
    defocus_v_in_angstroms: FloatColumn
    defocus_angle_in_degrees: FloatColumn
    phase_shift_in_degrees: FloatColumn
    b_factor_in_square_angstroms: FloatColumn
    poses: PoseColumns | None
    star: StarLayout | None
    ignored: tuple[str, ...]
    half_set: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def usable_half_set(self) -> NDArray[np.int64]:
        """The half set (N,) of every particle, 0 or 1, if two halves can be made of them.

        Raises
        ------
        InputError
            If the file has none, one is no half set, or nearly all particles are in one half.
        """
        name, one, other = ("alignments3D/split", 0, 1) if self.star is None else ("rlnRandomSubset", 1, 2)
        half_set = self.half_set
        if half_set is None:
            raise InputError(f"{self.path}: no half sets ({name}); give --half-sets new")
        unknown = np.flatnonzero(half_set == _NO_HALF)
        if len(unknown):
            which = f"{name} of particle row {self.rows[unknown[0]] + 1}"
            raise InputError(f"{self.path}: {which} is neither {one} nor {other}; mend it, or give --half-sets new")
        fewest, name_of_fewest = min((int((half_set == half).sum()), half + one) for half in (0, 1))
        if fewest < _LEAST_SHARE_OF_A_HALF * len(self):
            raise InputError(
                f"{self.path}: {name} is {name_of_fewest} for {fewest} of {len(self)} particles; "
                f"{_LEAST_SHARE_OF_A_HALF:.0%} of them at least are needed in each half: give --half-sets new"
            )
        return half_set

    def compacted(self) -> ParticleTable:
        """The same table; a column in which all values are equal takes no memory."""
        columns: dict[str, Any] = {
            item.name: np.broadcast_to(values[:1].copy(), values.shape)
            for item in fields(self)
            if isinstance(values := getattr(self, item.name), np.ndarray) and (values == values[0]).all()
        }
        return replace(self, **columns)

    def take(self, rows: NDArray[np.int64]) -> ParticleTable:
        """The table of some rows, in that order."""
        chosen = {
            item.name: getattr(self, item.name)[rows]
            for item in fields(self)
            if isinstance(getattr(self, item.name), np.ndarray)
        }
        images = ImageReferences(self.images.names, self.images.stack[rows], self.images.index[rows])
        poses = self.poses
        if poses is not None:
            poses = PoseColumns(poses.angles_in_degrees[rows], poses.origins_in_angstroms[rows])
        return replace(self, images=images, poses=poses, **chosen)


def half_set_of(values: NDArray[Any], names: tuple[int, int]) -> NDArray[np.int64]:
    """Half sets (N,) of a column of numbers (N,), given what the two halves are called in it; -1 for all else.

    Examples
    --------
    >>> half_set_of(np.array([2.0, 1.0, 3.0, np.nan]), (1, 2))
    array([ 1,  0, -1, -1])
    """
    first, second = names
    return np.select([values == first, values == second], [0, 1], _NO_HALF).astype(np.int64)
