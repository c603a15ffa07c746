"""RELION STAR files (3.0, 3.1, 5) to the particle table.

A file is read line by line: only the columns that are understood are kept, as numbers, so that a
million rows fit in little memory (docs/decisions/0005).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryoai.errors import InputError
from cryoai.formats.files import check_text_file, file_fingerprint, shown
from cryoai.formats.numbers import LARGEST, SMALLEST, is_number, is_positive
from cryoai.formats.star.lines import star_lines, tokens, unquoted
from cryoai.formats.star.names import (
    ABERRATIONS,
    ANGLES,
    DEFOCUS,
    DETECTOR,
    HALF_SET,
    IMAGE,
    MICROSCOPE,
    NUMBERS,
    PIXEL_SIZES,
)
from cryoai.formats.table import FloatColumn, ImageReferences, ParticleTable, PoseColumns, StarLayout, half_set_of

__all__ = ["read_star", "read_star_poses"]

_CHUNK = 20_000


def read_star(path: Path) -> ParticleTable:
    """Read the particles of a RELION STAR file.

    Raises
    ------
    InputError
        If the file is missing, empty or malformed, or a column or value that the physics needs is
        missing: nothing physical is ever assumed.
    """
    tables, fingerprint = _open(path)
    particles = _particle_table(path, tables)
    columns = _Columns(path, particles, tables.get("optics"))
    pixel_size = _pixel_size(columns)
    return ParticleTable(
        path=path,
        rows=np.arange(particles.n_rows),
        images=particles.images.references(),
        pixel_size_in_angstroms=pixel_size,
        voltage_in_kilovolts=columns.positive(MICROSCOPE[0]),
        spherical_aberration_in_mm=columns.required(MICROSCOPE[1]),
        amplitude_contrast=columns.required(MICROSCOPE[2]),
        defocus_u_in_angstroms=columns.required(DEFOCUS[0]),
        defocus_v_in_angstroms=columns.required(DEFOCUS[1]),
        defocus_angle_in_degrees=columns.required(DEFOCUS[2]),
        # RELION writes these two only where there is a phase plate or an envelope.
        phase_shift_in_degrees=columns.optional("rlnPhaseShift", 0.0),
        b_factor_in_square_angstroms=columns.optional("rlnCtfBfactor", 0.0),
        poses=_poses(columns, pixel_size),
        star=StarLayout(path, fingerprint, particles.name, tuple(particles.columns), "optics" in tables),
        ignored=columns.ignored(),
        half_set=_half_set(particles),
    )


def read_star_poses(path: Path) -> PoseColumns | None:
    """The poses of a RELION STAR file, which need not say anything of its optics; None if it has none.

    Raises
    ------
    InputError
        If the file is missing, empty or malformed, or has origins in pixels and no pixel size.
    """
    tables, _ = _open(path)
    columns = _Columns(path, _particle_table(path, tables), tables.get("optics"))
    in_pixels = any(f"rlnOrigin{axis}Angst" not in columns and f"rlnOrigin{axis}" in columns for axis in "XY")
    return _poses(columns, _pixel_size(columns) if in_pixels else np.ones(columns.particles.n_rows))


def _open(path: Path) -> tuple[dict[str, _Table], tuple[int, int]]:
    """All tables of a file, and its fingerprint."""
    check_text_file(path, "a RELION particle STAR file")
    fingerprint = file_fingerprint(path)
    try:
        return _read_tables(path), fingerprint
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; give a RELION particle STAR file") from None


@dataclass(eq=False)
class _Images:
    """The references to images, gathered row by row."""

    stacks: dict[str, int] = field(default_factory=dict)
    stack: list[NDArray[np.int32]] = field(default_factory=list)
    index: list[NDArray[np.int32]] = field(default_factory=list)
    n_rows: int = 0

    def add(self, path: Path, words: list[str]) -> None:
        stack, index = np.empty(len(words), dtype=np.int32), np.empty(len(words), dtype=np.int32)
        for i, word in enumerate(words):
            number, at, name = word.partition("@")
            if not at:
                number, name = "1", word
            is_whole = len(number) <= 12 and number.isascii() and number.isdigit()
            if not (is_whole and 1 <= int(number) < 2**31 and name):
                raise InputError(
                    f"{path}: {IMAGE} of particle row {self.n_rows + i + 1} is '{shown(word)}'; "
                    "number@stack is needed, counted from 1"
                )
            stack[i] = self.stacks.setdefault(name, len(self.stacks))
            index[i] = int(number) - 1
        self.stack.append(stack)
        self.index.append(index)
        self.n_rows += len(words)

    def references(self) -> ImageReferences:
        return ImageReferences(tuple(self.stacks), np.concatenate(self.stack), np.concatenate(self.index))


@dataclass(eq=False)
class _Numbers:
    """A column of numbers, gathered chunk by chunk; the first that is none, or not finite, is remembered."""

    chunks: list[FloatColumn] = field(default_factory=list)
    n_rows: int = 0
    bad: tuple[int, str] | None = None

    def add(self, words: list[str]) -> None:
        try:
            values = np.array(words, dtype=np.float64)
        except ValueError:
            values = np.array([_number(word) for word in words])
        wrong = np.flatnonzero(~is_number(values))
        if len(wrong) and self.bad is None:
            self.bad = (self.n_rows + int(wrong[0]), words[wrong[0]])
        self.chunks.append(values)
        self.n_rows += len(words)

    @property
    def values(self) -> FloatColumn:
        return np.concatenate(self.chunks) if self.chunks else np.zeros(0)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return np.nan


@dataclass(eq=False)
class _Table:
    """One table of a file: the numbers and images that are understood, and the names of all columns.

    Of a malformed table the fault is kept, and of what follows the names of columns: it matters only where the
    table is one that is read.
    """

    path: Path
    name: str
    columns: dict[str, None] = field(default_factory=dict)
    numbers: dict[str, _Numbers] = field(default_factory=dict)
    # Of the columns of aberrations, those in which some value is not the one that means there is none.
    aberrant: set[str] = field(default_factory=set)
    images: _Images = field(default_factory=_Images)
    n_rows: int = 0
    is_loop: bool = False
    fault: str | None = None
    pending: list[list[str]] = field(default_factory=list)

    def add_line(self, kind: str, text: str) -> None:
        if kind == "loop":
            if self.columns:
                self.fail(f"the table data_{shown(self.name)} has two loops; join them, or make them two tables")
            self.is_loop = True
        elif kind == "row":
            self.pending.append(tokens(text))
            if len(self.pending) >= _CHUNK:
                self.flush()
        else:
            name, *values = tokens(text)
            self._add_column(name[1:])
            if kind == "item":
                # Single lines of a name and a value make a table of one row.
                self.pending = self.pending or [[]]
                self.pending[0] += values[:1]

    def flush(self) -> None:
        """Turn the pending rows into numbers."""
        rows, self.pending = self.pending, []
        for i, row in enumerate(rows):
            if len(row) != len(self.columns):
                self.fail(
                    f"row {self.n_rows + i + 1} of the table data_{shown(self.name)} has {len(row)} values "
                    f"for {len(self.columns)} columns; the file is damaged: write it again"
                )
        if self.fault is not None:
            return
        for position, name in enumerate(self.columns):
            if name in self.numbers:
                self.numbers[name].add([unquoted(row[position]) for row in rows])
            elif name == IMAGE:
                self.images.add(self.path, [unquoted(row[position]) for row in rows])
            elif name in ABERRATIONS and name not in self.aberrant and any(_aberrant(name, r[position]) for r in rows):
                self.aberrant.add(name)
        self.n_rows += len(rows)

    def fail(self, fault: str) -> None:
        """Remember what is wrong with the table, if nothing has been before."""
        self.fault = self.fault or fault

    def check(self) -> None:
        """See that nothing is wrong with the table.

        Raises
        ------
        InputError
            If it is malformed.
        """
        if self.fault is not None:
            raise InputError(f"{self.path}: {self.fault}")

    def _add_column(self, name: str) -> None:
        if name in self.columns:
            self.fail(f"the table data_{shown(self.name)} names column {shown(name)} twice; remove one of the two")
        self.columns[name] = None
        if name in NUMBERS and name not in self.numbers:
            self.numbers[name] = _Numbers()


def _aberrant(name: str, cell: str) -> bool:
    values = [_number(word) for word in re.split(r"[\[\],\s]+", unquoted(cell)) if word]
    return any(value != ABERRATIONS[name][1] for value in values)


def _read_tables(path: Path) -> dict[str, _Table]:
    """All tables of a file, in one pass."""
    tables: dict[str, _Table] = {}
    for kind, block, text in star_lines(path):
        if kind == "other":
            continue
        if kind == "block":
            if block in tables:
                tables[block].flush()
                tables[block].fail(f"two tables are called data_{shown(block)}; rename or join them")
            else:
                tables[block] = _Table(path, block)
        elif block not in tables:
            raise InputError(f"{path}: '{shown(text, 40)}' stands before any table (data_...); write the file again")
        else:
            tables[block].add_line(kind, text)
    for table in tables.values():
        table.flush()
    return tables


def _particle_table(path: Path, tables: dict[str, _Table]) -> _Table:
    candidates = [table for table in tables.values() if IMAGE in table.columns]
    if not candidates:
        raise InputError(f"{path}: no table has a column {IMAGE}; give a STAR file of particles")
    if len(candidates) > 1:
        names = ", ".join(shown(table.name) for table in candidates[:3]) + (", ..." if len(candidates) > 3 else "")
        raise InputError(f"{path}: tables {names} all have {IMAGE}; keep one of them")
    particles = candidates[0]
    particles.check()
    if not particles.n_rows:
        name = shown(particles.name)
        raise InputError(f"{path}: the particle table data_{name} has no rows; give at least one particle")
    return particles


class _Columns:
    """Numeric columns of the particle table, looked up in the optics table where they are not in it."""

    def __init__(self, path: Path, particles: _Table, optics: _Table | None) -> None:
        self.path = path
        self.particles = particles
        self.optics = optics
        if optics is not None:
            optics.check()
        self._optics_row = self._match_optics_groups()

    def __contains__(self, name: str) -> bool:
        return name in self.particles.numbers or (self.optics is not None and name in self.optics.numbers)

    def required(self, name: str) -> FloatColumn:
        if name not in self:
            raise InputError(f"{self.path}: column {name} is missing; add it, its value is never assumed")
        if name in self.particles.numbers:
            return self._values(self.particles, name, "particle")
        assert self.optics is not None
        return self._values(self.optics, name, "optics")[self._optics_row]

    def positive(self, name: str) -> FloatColumn:
        values = self.required(name)
        self.check_positive(name, values)
        return values

    def check_positive(self, name: str, values: FloatColumn) -> None:
        bad = np.flatnonzero(~is_positive(values))
        if len(bad):
            rule = f"at most {LARGEST:g}" if values[bad[0]] > LARGEST else f"positive, at least {SMALLEST:g}"
            raise InputError(
                f"{self.path}: {name} of particle row {bad[0] + 1} is {values[bad[0]]:g}; it must be {rule}"
            )

    def optional(self, name: str, default: float) -> FloatColumn:
        return self.required(name) if name in self else np.full(self.particles.n_rows, default)

    def ignored(self) -> tuple[str, ...]:
        """One line for each kind of aberration that some particle has."""
        tables = [self.particles] if self.optics is None else [self.particles, self.optics]
        found = {ABERRATIONS[name][0]: name for table in tables for name in sorted(table.aberrant)}
        return tuple(f"not applied: {kind} ({name})" for kind, name in found.items())

    def _values(self, table: _Table, name: str, kind: str) -> FloatColumn:
        column = table.numbers[name]
        if column.bad is not None:
            row, word = column.bad
            raise InputError(
                f"{self.path}: {name} of {kind} row {row + 1} is '{shown(word)}'; "
                f"a finite number is needed, of at most {LARGEST:g}"
            )
        return column.values

    def _match_optics_groups(self) -> NDArray[np.int64]:
        """Row of the optics table for each particle."""
        name = "rlnOpticsGroup"
        if self.optics is None:
            return np.zeros(0, dtype=np.int64)
        for table in (self.optics, self.particles):
            if name not in table.numbers:
                where = f"the table data_{shown(table.name)}"
                raise InputError(f"{self.path}: {name} is missing from {where}; add it, or write the file again")
        groups = self._values(self.optics, name, "optics")
        wanted = self._values(self.particles, name, "particle")
        order = np.argsort(groups, kind="stable")
        if len(np.unique(groups)) < len(groups):
            raise InputError(f"{self.path}: data_optics lists an {name} twice; number the groups apart")
        position = np.searchsorted(groups, wanted, sorter=order).clip(max=len(groups) - 1)
        rows = order[position] if len(groups) else np.zeros(len(wanted), dtype=np.int64)
        bad = np.flatnonzero(groups[rows] != wanted) if len(groups) else np.arange(len(wanted))
        if len(bad):
            raise InputError(
                f"{self.path}: particle row {bad[0] + 1} is in optics group {wanted[bad[0]]:g}, "
                "which data_optics does not list; add the group"
            )
        return rows


def _pixel_size(columns: _Columns) -> FloatColumn:
    for name in PIXEL_SIZES:
        if name in columns:
            return columns.positive(name)
    if all(name in columns for name in DETECTOR):
        # micrometres on the detector * 1e4 = angstroms on the detector; / magnification = on the specimen
        size = columns.positive(DETECTOR[0]) * 1e4 / columns.positive(DETECTOR[1])
        columns.check_positive("the pixel size by rlnDetectorPixelSize and rlnMagnification", size)
        return size
    raise InputError(
        f"{columns.path}: the pixel size is missing; add rlnImagePixelSize (RELION 3.1), "
        "or rlnDetectorPixelSize and rlnMagnification (3.0)"
    )


def _poses(columns: _Columns, pixel_size: FloatColumn) -> PoseColumns | None:
    if not all(name in columns for name in ANGLES):
        return None
    origins = []
    for axis in "XY":
        if f"rlnOrigin{axis}Angst" in columns:
            origins.append(columns.required(f"rlnOrigin{axis}Angst"))
        else:
            # RELION 3.0 stores origins in pixels, and leaves them out where they are zero.
            origins.append(columns.optional(f"rlnOrigin{axis}", 0.0) * pixel_size)
    angles = [columns.required(name) for name in ANGLES]
    return PoseColumns(np.stack(angles, axis=1), np.stack(origins, axis=1))


def _half_set(particles: _Table) -> NDArray[np.int64] | None:
    """Half sets (N,) of the table of particles: what is wrong with them matters only to those who ask for them."""
    if HALF_SET not in particles.numbers:
        return None
    return half_set_of(particles.numbers[HALF_SET].values, (1, 2))
