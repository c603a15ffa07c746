"""The particle table to RELION STAR files: one that was read, with new poses, or a new one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from cryoai.errors import InputError
from cryoai.formats.files import atomic_path, file_fingerprint, shown
from cryoai.formats.star.lines import star_lines, tokens
from cryoai.formats.star.names import ANGLES, IMAGE, MICROSCOPE, ORIGINS
from cryoai.formats.table import ParticleTable, PoseColumns, StarLayout

__all__ = ["rewrite_star", "write_star"]

_CHUNK = 20_000


def rewrite_star(
    path: Path,
    table: ParticleTable,
    layout: StarLayout,
    poses: PoseColumns,
    extra: Mapping[str, NDArray[np.generic]],
) -> None:
    """Write the STAR file of a table again with these poses and extra columns; all else stays as it was read.

    A RELION 3.0 file (no optics table) gets its origins in pixels, a 3.1 file in Å; where a file has both, both
    change. Of the rows, those of the table are written, in its order.

    Raises
    ------
    InputError
        If the file has changed since it was read.
    """
    updates = dict(zip(ANGLES, poses.angles_in_degrees.T, strict=True))
    for axis, origin in zip("XY", poses.origins_in_angstroms.T, strict=True):
        if layout.has_optics or f"rlnOrigin{axis}Angst" in layout.columns:
            updates[f"rlnOrigin{axis}Angst"] = origin
        if not layout.has_optics or f"rlnOrigin{axis}" in layout.columns:
            updates[f"rlnOrigin{axis}"] = origin / table.pixel_size_in_angstroms
    if layout.fingerprint != file_fingerprint(layout.path):
        raise InputError(f"{layout.path}: it has changed since it was read; nothing was written: start again")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        _copy_with(out, layout, table.rows, {**updates, **extra})


def write_star(
    path: Path,
    table: ParticleTable,
    n_pixels: NDArray[np.integer],
    poses: PoseColumns | None,
    extra: Mapping[str, NDArray[np.generic]],
) -> None:
    """Write a table as a new STAR file of RELION 3.1, with an optics group for each kind of microscope and image.

    Parameters
    ----------
    n_pixels : (N,)
        Side of each particle's image.
    """
    microscopes = np.stack(
        [
            table.voltage_in_kilovolts,
            table.spherical_aberration_in_mm,
            table.amplitude_contrast,
            table.pixel_size_in_angstroms,
            n_pixels,
        ],
        axis=1,
    )
    kinds, group = np.unique(microscopes, axis=0, return_inverse=True)
    numbers = np.arange(1, len(kinds) + 1)
    optics = {
        "rlnOpticsGroup": numbers,
        "rlnOpticsGroupName": np.array([f"opticsGroup{number}" for number in numbers]),
        **dict(zip((*MICROSCOPE, "rlnImagePixelSize"), kinds.T, strict=False)),
        "rlnImageSize": kinds[:, 4].astype(np.int64),
        "rlnImageDimensionality": np.full(len(kinds), 2),
    }
    particles: dict[str, NDArray[np.generic]] = {
        "rlnOpticsGroup": group.ravel() + 1,
        "rlnDefocusU": table.defocus_u_in_angstroms,
        "rlnDefocusV": table.defocus_v_in_angstroms,
        "rlnDefocusAngle": table.defocus_angle_in_degrees,
    }
    if table.phase_shift_in_degrees.any():
        particles["rlnPhaseShift"] = table.phase_shift_in_degrees
    if table.b_factor_in_square_angstroms.any():
        particles["rlnCtfBfactor"] = table.b_factor_in_square_angstroms
    if poses is not None:
        particles |= dict(zip(ANGLES, poses.angles_in_degrees.T, strict=True))
        particles |= dict(zip(ORIGINS, poses.origins_in_angstroms.T, strict=False))
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        _write_loop(out, "optics", optics)
        _write_loop(out, "particles", {IMAGE: _ImageNames(table), **particles, **extra})


def _copy_with(
    out: TextIO, layout: StarLayout, rows: NDArray[np.int64], updates: Mapping[str, NDArray[np.generic]]
) -> None:
    """Copy a STAR file, its particles reduced to ``rows`` with the columns ``updates`` changed or added."""
    added = [name for name in updates if name not in layout.columns]
    n_columns, rows_written = 0, False
    for kind, block, text in star_lines(layout.path):
        if block != layout.block or kind not in ("column", "item", "row"):
            out.write(f"{text}\n")
        elif kind == "row":
            if not rows_written:
                _write_rows(out, layout, rows, updates)
            rows_written = True
        else:
            name = text.split()[0][1:]
            known = kind == "item" and name in updates
            out.write(f"_{name} {_formatted(updates[name])[0]}\n" if known else f"{text}\n")
            n_columns += 1
            if n_columns == len(layout.columns):
                for number, new in enumerate(added, n_columns + 1):
                    out.write(f"_{new} " + (f"#{number}\n" if kind == "column" else f"{_formatted(updates[new])[0]}\n"))


def _write_rows(
    out: TextIO, layout: StarLayout, rows: NDArray[np.int64], updates: Mapping[str, NDArray[np.generic]]
) -> None:
    places = {name: i for i, name in enumerate([*layout.columns, *(n for n in updates if n not in layout.columns)])}
    source = _rows_in_order(layout, rows)
    for start in range(0, len(rows), _CHUNK):
        chunk = [[*cells, *[""] * (len(places) - len(cells))] for cells in islice(source, _CHUNK)]
        for name, values in updates.items():
            for cells, value in zip(chunk, _formatted(values[start : start + _CHUNK]), strict=True):
                cells[places[name]] = value
        out.writelines(" ".join(cells) + "\n" for cells in chunk)


def _rows_in_order(layout: StarLayout, rows: NDArray[np.int64]) -> Iterator[list[str]]:
    """Values of the particles ``rows``; held in memory only where their order is not that of the file."""
    texts = (line.text for line in star_lines(layout.path) if line.block == layout.block and line.kind == "row")
    if (np.diff(rows) > 0).all():
        wanted = iter(rows.tolist())
        following = next(wanted, None)
        for row, text in enumerate(texts):
            if row == following:
                yield tokens(text)
                following = next(wanted, None)
    else:
        members = set(rows.tolist())
        kept = {row: text for row, text in enumerate(texts) if row in members}
        yield from (tokens(kept[row]) for row in rows.tolist())


@dataclass(frozen=True)
class _ImageNames:
    """The column of image names, made as it is written."""

    table: ParticleTable

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, some: slice) -> NDArray[np.str_]:
        images = self.table.images
        pairs = zip(images.index[some].tolist(), images.stack[some].tolist(), strict=True)
        return np.array([self._cell(index, images.names[stack]) for index, stack in pairs])

    def _cell(self, index: int, stack: str) -> str:
        cell = _quoted(f"{index + 1:06d}@{stack}")
        if cell is None:
            raise InputError(
                f"{self.table.path}: a STAR file cannot hold '{shown(stack, 200)}' as the name of a stack; rename it"
            )
        return cell


def _write_loop(out: TextIO, name: str, columns: Mapping[str, NDArray[np.generic] | _ImageNames]) -> None:
    out.write(f"data_{name}\n\nloop_\n")
    out.writelines(f"_{column} #{number}\n" for number, column in enumerate(columns, 1))
    n_rows = len(next(iter(columns.values())))
    for start in range(0, n_rows, _CHUNK):
        cells = [_formatted(values[start : start + _CHUNK]) for values in columns.values()]
        out.writelines(" ".join(row) + "\n" for row in zip(*cells, strict=True))
    out.write("\n")


def _quoted(word: str) -> str | None:
    """A value as it stands in a row: in quotes, where it has white space; None where they would end before it does."""
    if not re.search(r"\s", word):
        return word
    for quote in "\"'":
        if not re.search(rf"{quote}\s|[\r\n]", word):
            return f"{quote}{word}{quote}"
    return None


def _formatted(values: NDArray[np.generic]) -> list[str]:
    number = "{:.6f}" if np.issubdtype(values.dtype, np.floating) else "{}"
    return [number.format(value) for value in values.tolist()]
