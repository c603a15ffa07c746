"""Particle stacks on disk: from a particle file to its images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryoai.errors import InputError
from cryoai.formats.mrc import MrcStack, open_stack
from cryoai.formats.star import read_star, rewrite_star
from cryoai.formats.table import ParticleTable
from cryoai.optics import Optics
from cryoai.pose_files import pose_columns, poses_from_columns
from cryoai.poses import Poses

__all__ = ["ParticleStack"]

_SMALLEST_BOX = 32
_OPEN_FILES = 64


class ParticleStack:
    """The particles of a STAR file; their images stay on disk until asked for.

    Examples
    --------
    >>> particles = ParticleStack.open("particles.star")        # doctest: +SKIP
    >>> particles.n_particles, particles.n_pixels               # doctest: +SKIP
    (10000, 64)
    >>> particles.images(torch.tensor([7, 3])).shape            # doctest: +SKIP
    torch.Size([2, 64, 64])
    """

    def __init__(self, table: ParticleTable, stacks: tuple[MrcStack, ...]) -> None:
        self.table = table
        self._stacks = stacks
        self._open: OrderedDict[int, np.memmap] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, *, data_dir: str | Path | None = None) -> ParticleStack:
        """Open a RELION 3.0 or 3.1 STAR file and check that its images can be had.

        Parameters
        ----------
        path
            The STAR file. It needs the columns of the contrast transfer function and the pixel
            size; poses are not needed.
        data_dir
            Folder that the image paths are relative to; without it the folder of the STAR file,
            its parents and the working folder are tried.

        Raises
        ------
        InputError
            If a file, column or value is missing or wrong, with the row and the fix.
        """
        table = read_star(Path(path))
        roots = _image_roots(Path(path), None if data_dir is None else Path(data_dir))
        stacks = tuple(open_stack(_find_stack(name, roots, table.path)) for name in table.images.names)
        _check_stacks(table, stacks)
        return cls(table, stacks)

    def take(self, indices: Tensor) -> ParticleStack:
        """The particles of rows ``indices`` (B,) only, in that order."""
        chosen = indices.cpu().numpy()
        return ParticleStack(self.table.take(chosen), self._stacks)

    @property
    def n_particles(self) -> int:
        return len(self.table)

    @property
    def n_pixels(self) -> int:
        """Side of the images in pixels."""
        return self._stacks[0].n_rows

    @property
    def pixel_size_in_angstroms(self) -> float:
        """The most common pixel size, which is that of the maps made from the stack."""
        values, counts = np.unique(self.table.pixel_size_in_angstroms, return_counts=True)
        return float(values[counts.argmax()])

    @property
    def optics(self) -> Optics:
        """Optical parameters (N,) of all particles at the box of the images."""
        table = self.table
        columns = (
            table.pixel_size_in_angstroms,
            table.voltage_in_kilovolts,
            table.spherical_aberration_in_mm,
            table.amplitude_contrast,
            table.defocus_u_in_angstroms,
            table.defocus_v_in_angstroms,
            table.defocus_angle_in_degrees,
            table.phase_shift_in_degrees,
            table.b_factor_in_square_angstroms,
        )
        return Optics(*(torch.from_numpy(column).float() for column in columns))

    @property
    def poses(self) -> Poses | None:
        """Poses in the file, if it has any."""
        return None if self.table.poses is None else poses_from_columns(self.table.poses)

    def images(self, indices: Tensor) -> Tensor:
        """Images (B, n, n) as they are in the file, in the order of ``indices`` (B,).

        Raises
        ------
        InputError
            If an image holds a value that is not finite.
        """
        references = self.table.images
        wanted = indices.cpu().numpy()
        result = np.empty((len(wanted), self.n_pixels, self.n_pixels), dtype=np.float32)
        stack_of = references.stack[wanted]
        for stack in np.unique(stack_of):
            here = np.flatnonzero(stack_of == stack)
            result[here] = self._map(int(stack))[references.index[wanted[here]]]
        finite = np.isfinite(result).all(axis=(1, 2))
        if not finite.all():
            raise InputError(f"{self._name_image(wanted[~finite][0])} has values that are not finite; remove the row")
        return torch.from_numpy(result)

    def write(self, path: Path, poses: Poses, extra: Mapping[str, NDArray[np.generic]]) -> None:
        """Write the input again with these poses and extra columns, every row in its place."""
        assert self.table.star is not None
        rewrite_star(path, self.table, self.table.star, pose_columns(poses), extra)

    def _map(self, stack: int) -> np.memmap:
        """Memory map of a stack, keeping the most recent ones open."""
        if stack not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[stack] = self._stacks[stack].map_images()
        self._open.move_to_end(stack)
        return self._open[stack]

    def _name_image(self, row: int) -> str:
        references = self.table.images
        stack = self._stacks[references.stack[row]].path
        return f"{self.table.path}: the image of row {self.table.rows[row] + 1}, {references.index[row] + 1}@{stack},"


def _image_roots(star: Path, data_dir: Path | None) -> list[Path]:
    if data_dir is not None:
        if not data_dir.is_dir():
            raise InputError(f"--data-dir {data_dir}: no such folder; give the folder the image paths start from")
        return [data_dir]
    # RELION paths start at the project's root, which is some folder above the STAR file.
    folder = star.resolve().parent
    return [folder, *folder.parents, Path.cwd()]


def _find_stack(name: str, roots: list[Path], star: Path) -> Path:
    candidates = [root / name for root in roots] + [roots[0] / Path(name).name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{star}: image stack {name} not found; tried {candidates[0]}, {candidates[-1]} and the folders above: "
        "give the folder it is relative to with --data-dir"
    )


def _check_stacks(table: ParticleTable, stacks: tuple[MrcStack, ...]) -> None:
    box = stacks[0].n_rows
    for stack in stacks:
        if stack.n_rows != stack.n_columns:
            raise InputError(f"{stack.path}: images of {stack.n_columns} x {stack.n_rows} pixels; crop them square")
        if stack.n_rows != box:
            raise InputError(
                f"{stack.path}: box of {stack.n_rows} pixels, but {stacks[0].path} has {box}; "
                "one box size is needed: rescale one of them"
            )
    if box % 2:
        raise InputError(f"{stacks[0].path}: odd box of {box} pixels; an even box is needed: crop or pad by a pixel")
    if box < _SMALLEST_BOX:
        raise InputError(
            f"{stacks[0].path}: box of {box} pixels; at least {_SMALLEST_BOX} are needed: extract with a larger box"
        )
    counts = np.array([stack.n_images for stack in stacks])
    beyond = np.flatnonzero(table.images.index >= counts[table.images.stack])
    if len(beyond):
        row = beyond[0]
        stack = stacks[table.images.stack[row]]
        raise InputError(
            f"{table.path}: particle row {row + 1} wants image {table.images.index[row] + 1} of {stack.path}, "
            f"which has {stack.n_images}; the two files do not belong together"
        )
