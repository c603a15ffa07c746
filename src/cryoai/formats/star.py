"""RELION STAR files (3.0 and 3.1) to and from a typed particle table.

Every cell is read as text and only the columns that are understood become numbers, so that what is
written back differs from what was read in nothing but the columns that changed.
"""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from cryoai.errors import InputError
from cryoai.formats.files import atomic_path

__all__ = ["ImageReferences", "ParticleTable", "PoseColumns", "read_particles", "write_particles"]

FloatColumn = NDArray[np.float64]

_MICROSCOPE = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
_DEFOCUS = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


@dataclass(frozen=True, eq=False)
class ImageReferences:
    """Where each particle's image is: ``names[stack[i]]``, image ``index[i]``, counted from 0."""

    names: tuple[str, ...]
    stack: NDArray[np.int64]
    index: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PoseColumns:
    """RELION angles (N, 3), ordered (rot, tilt, psi), in degrees; origins (N, 2), (x, y), in Å."""

    angles_in_degrees: FloatColumn
    origins_in_angstroms: FloatColumn


@dataclass(frozen=True, eq=False)
class ParticleTable:
    """A particle STAR file: one entry a row, in the order of the file.

    ``blocks`` holds the text of every cell, for writing the file again.
    """

    path: Path
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
    blocks: dict[str, pd.DataFrame]
    particle_block: str

    def __len__(self) -> int:
        return len(self.pixel_size_in_angstroms)

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
        particles = self.blocks[self.particle_block].iloc[rows].reset_index(drop=True)
        blocks = {**self.blocks, self.particle_block: particles}
        return replace(self, images=images, poses=poses, blocks=blocks, **chosen)


def read_particles(path: Path) -> ParticleTable:
    """Read the particles of a RELION 3.0 or 3.1 STAR file.

    Raises
    ------
    InputError
        If the file is missing, empty or malformed, or a column or value that the physics needs is
        missing: nothing physical is ever assumed.
    """
    blocks = _read_blocks(path)
    name = _particle_block(path, blocks)
    columns = _Columns(path, blocks, name)
    pixel_size = _pixel_size(columns)
    return ParticleTable(
        path=path,
        images=_image_references(columns),
        pixel_size_in_angstroms=pixel_size,
        voltage_in_kilovolts=columns.positive(_MICROSCOPE[0]),
        spherical_aberration_in_mm=columns.required(_MICROSCOPE[1]),
        amplitude_contrast=columns.required(_MICROSCOPE[2]),
        defocus_u_in_angstroms=columns.required(_DEFOCUS[0]),
        defocus_v_in_angstroms=columns.required(_DEFOCUS[1]),
        defocus_angle_in_degrees=columns.required(_DEFOCUS[2]),
        # RELION writes these two only where there is a phase plate or an envelope.
        phase_shift_in_degrees=columns.optional("rlnPhaseShift", 0.0),
        b_factor_in_square_angstroms=columns.optional("rlnCtfBfactor", 0.0),
        poses=_poses(columns, pixel_size),
        blocks=blocks,
        particle_block=name,
    )


def write_particles(
    path: Path, table: ParticleTable, poses: PoseColumns, extra: Mapping[str, NDArray[np.generic]]
) -> None:
    """Write the table again with these poses and extra columns; all else stays as it was read.

    A RELION 3.0 file (no optics table) gets its origins in pixels, a 3.1 file in Å.
    """
    particles = table.blocks[table.particle_block].copy()
    updates: dict[str, NDArray[np.generic]] = dict(zip(_ANGLES, poses.angles_in_degrees.T, strict=True))
    for axis, origin in zip("XY", poses.origins_in_angstroms.T, strict=True):
        in_pixels = origin / table.pixel_size_in_angstroms
        if "optics" in table.blocks:
            updates[f"rlnOrigin{axis}Angst"] = origin
        if "optics" not in table.blocks or f"rlnOrigin{axis}" in particles:
            updates[f"rlnOrigin{axis}"] = in_pixels
    for column, values in {**updates, **extra}.items():
        number = "{:.6f}" if np.issubdtype(values.dtype, np.floating) else "{}"
        particles[column] = [number.format(v) for v in values.tolist()]
    write_blocks(path, {**table.blocks, table.particle_block: particles})


def write_blocks(path: Path, blocks: dict[str, pd.DataFrame]) -> None:
    """Write data blocks, replacing the file at once and only when all is written."""
    with atomic_path(path) as temporary:
        # starfile reads the text nan as a missing value; RELION reads its <NA> as no number at all.
        starfile.write(blocks, temporary, na_rep="nan")


def _read_blocks(path: Path) -> dict[str, pd.DataFrame]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a RELION particle STAR file")
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line for line in map(str.strip, file) if line.startswith(("_", "data_"))]
        columns = sorted({line.split()[0][1:] for line in lines if line.startswith("_")})
        names = [line for line in lines if line.startswith("data_")]
        # starfile reads by way of a cache of lines, which outlives a file that it could not parse.
        linecache.clearcache()
        blocks = starfile.read(path, always_dict=True, parse_as_string=columns)
    except (ValueError, IndexError, KeyError, TypeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: not a readable STAR file ({reason}); give a RELION particle STAR file") from None
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two tables are called {max(names, key=names.count)}; rename or join them")
    for name, block in blocks.items():
        if isinstance(block, pd.DataFrame) and block.columns.has_duplicates:
            column = block.columns[block.columns.duplicated()][0]
            raise InputError(f"{path}: the table data_{name} names column {column} twice; remove one of the two")
    # A block of single "_name value" lines is a table of one row.
    return {
        name: block if isinstance(block, pd.DataFrame) else pd.DataFrame([block], dtype=str)
        for name, block in blocks.items()
        if block is not None
    }


def _particle_block(path: Path, blocks: dict[str, pd.DataFrame]) -> str:
    candidates = [name for name, block in blocks.items() if "rlnImageName" in block]
    if not candidates:
        raise InputError(f"{path}: no table has a column rlnImageName; give a STAR file of particles")
    if len(candidates) > 1:
        raise InputError(f"{path}: tables {', '.join(candidates)} all have rlnImageName; keep one of them")
    if blocks[candidates[0]].empty:
        raise InputError(f"{path}: the particle table data_{candidates[0]} has no rows; give at least one particle")
    return candidates[0]


class _Columns:
    """Numeric columns of the particle table, looked up in the optics table where they are not in it."""

    def __init__(self, path: Path, blocks: dict[str, pd.DataFrame], particle_block: str) -> None:
        self.path = path
        self.particles = blocks[particle_block]
        self.optics = blocks.get("optics")
        self._optics_row = self._match_optics_groups()

    def __contains__(self, name: str) -> bool:
        return name in self.particles or (self.optics is not None and name in self.optics)

    def text(self, name: str) -> pd.Series:
        return self.particles[name].astype(str)

    def required(self, name: str) -> FloatColumn:
        if name not in self:
            raise InputError(f"{self.path}: column {name} is missing; add it, its value is never assumed")
        if name in self.particles:
            return self._numbers(self.particles[name], name, "particle")
        assert self.optics is not None
        return self._numbers(self.optics[name], name, "optics")[self._optics_row]

    def positive(self, name: str) -> FloatColumn:
        values = self.required(name)
        bad = np.flatnonzero(values <= 0)
        if len(bad):
            raise InputError(
                f"{self.path}: {name} of particle row {bad[0] + 1} is {values[bad[0]]:g}; it must be positive"
            )
        return values

    def optional(self, name: str, default: float) -> FloatColumn:
        return self.required(name) if name in self else np.full(len(self.particles), default)

    def _numbers(self, column: pd.Series, name: str, kind: str) -> FloatColumn:
        values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, copy=True)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise InputError(
                f"{self.path}: {name} of {kind} row {bad[0] + 1} is '{column.iloc[bad[0]]}'; a finite number is needed"
            )
        return values

    def _match_optics_groups(self) -> NDArray[np.int64]:
        """Row of the optics table for each particle."""
        if self.optics is None:
            return np.zeros(0, dtype=np.int64)
        if "rlnOpticsGroup" not in self.optics or "rlnOpticsGroup" not in self.particles:
            raise InputError(f"{self.path}: rlnOpticsGroup is missing from data_optics or the particle table; add it")
        groups = pd.Index(self._numbers(self.optics["rlnOpticsGroup"], "rlnOpticsGroup", "optics"))
        if groups.has_duplicates:
            raise InputError(f"{self.path}: data_optics lists an rlnOpticsGroup twice; number the groups apart")
        wanted = self._numbers(self.particles["rlnOpticsGroup"], "rlnOpticsGroup", "particle")
        rows = groups.get_indexer(pd.Index(wanted))
        bad = np.flatnonzero(rows < 0)
        if len(bad):
            raise InputError(
                f"{self.path}: particle row {bad[0] + 1} is in optics group {wanted[bad[0]]:g}, "
                "which data_optics does not list; add the group"
            )
        return rows.astype(np.int64)


def _pixel_size(columns: _Columns) -> FloatColumn:
    for name in ("rlnImagePixelSize", "rlnPixelSize"):
        if name in columns:
            return columns.positive(name)
    if "rlnDetectorPixelSize" in columns and "rlnMagnification" in columns:
        # micrometres on the detector * 1e4 = angstroms on the detector; / magnification = on the specimen
        return columns.positive("rlnDetectorPixelSize") * 1e4 / columns.positive("rlnMagnification")
    raise InputError(
        f"{columns.path}: the pixel size is missing; add rlnImagePixelSize (RELION 3.1), "
        "or rlnDetectorPixelSize and rlnMagnification (3.0)"
    )


def _image_references(columns: _Columns) -> ImageReferences:
    parts = columns.text("rlnImageName").str.extract(r"^(?:(?P<number>\d+)@)?(?P<file>.+)$")
    number = pd.to_numeric(parts["number"], errors="coerce").fillna(1).to_numpy(dtype=np.float64)
    bad = np.flatnonzero((number < 1) | (number > np.iinfo(np.int32).max) | parts["file"].isna().to_numpy())
    if len(bad):
        name = columns.text("rlnImageName").iloc[bad[0]]
        raise InputError(
            f"{columns.path}: rlnImageName of particle row {bad[0] + 1} is '{name}'; "
            "number@stack is needed, counted from 1"
        )
    stack, names = pd.factorize(parts["file"])
    return ImageReferences(tuple(map(str, names)), stack.astype(np.int64), number.astype(np.int64) - 1)


def _poses(columns: _Columns, pixel_size: FloatColumn) -> PoseColumns | None:
    if not all(name in columns for name in _ANGLES):
        return None
    origins = []
    for axis in "XY":
        if f"rlnOrigin{axis}Angst" in columns:
            origins.append(columns.required(f"rlnOrigin{axis}Angst"))
        else:
            # RELION 3.0 stores origins in pixels, and leaves them out where they are zero.
            origins.append(columns.optional(f"rlnOrigin{axis}", 0.0) * pixel_size)
    angles = [columns.required(name) for name in _ANGLES]
    return PoseColumns(np.stack(angles, axis=1), np.stack(origins, axis=1))
