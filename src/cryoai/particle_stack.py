"""Particle stacks on disk: from a particle file to its images."""

from __future__ import annotations

import hashlib
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryoai.errors import InputError
from cryoai.formats.files import file_fingerprint, shown
from cryoai.formats.mrc import MrcStack, open_stack
from cryoai.formats.particle_files import FileKind, file_kind, read_particles
from cryoai.formats.star import rewrite_star, write_star
from cryoai.formats.table import ParticleTable
from cryoai.image_paths import find_image_file, image_roots, places_tried
from cryoai.limits import LARGEST_VALUE, SMALLEST_BOX
from cryoai.optics import Optics
from cryoai.pose_files import pose_columns, poses_from_columns
from cryoai.poses import Poses
from cryoai.working_box import commonest_image

__all__ = ["Fault", "ParticleSource", "ParticleStack"]

_OPEN_FILES = 64
# What was read through memory maps counts as memory of this process until they are closed.
_MAPPED_BYTES = 2**28
# Images that are looked at to see whether they are the same.
_N_FINGERPRINTED = 64


@dataclass(frozen=True)
class Fault:
    """An image that cannot be used: its row in the particle file, counted from 0, its name, and why."""

    row: int
    image: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row + 1} ({self.image}) {self.reason}"


@dataclass(frozen=True)
class ParticleSource:
    """The files that particles come from; see :meth:`ParticleStack.open`."""

    path: Path
    data_dir: Path | None = None
    ctf: Path | None = None
    passthrough: tuple[Path, ...] = ()

    def read(self) -> ParticleTable:
        """The table of the particles, without a look at their images."""
        return read_particles(self.path, ctf=self.ctf, passthrough=self.passthrough)

    def absolute(self) -> ParticleSource:
        """The same, whatever the working folder is."""
        data_dir, ctf = (None if path is None else path.absolute() for path in (self.data_dir, self.ctf))
        return ParticleSource(self.path.absolute(), data_dir, ctf, tuple(path.absolute() for path in self.passthrough))


class ParticleStack:
    """The particles of a file; their images stay on disk until asked for.

    Examples
    --------
    >>> particles = ParticleStack.open("particles.star")        # doctest: +SKIP
    >>> particles.n_particles, particles.n_pixels               # doctest: +SKIP
    (10000, 64)
    >>> particles.images(torch.tensor([7, 3])).shape            # doctest: +SKIP
    torch.Size([2, 64, 64])
    """

    def __init__(
        self, table: ParticleTable, stacks: tuple[MrcStack, ...], source: ParticleSource | None = None
    ) -> None:
        self.table = table
        self.source = source or ParticleSource(table.path)
        self._stacks = stacks
        self._open: OrderedDict[int, np.memmap] = OrderedDict()
        self._n_bytes_read = 0

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        data_dir: str | Path | None = None,
        ctf: str | Path | None = None,
        passthrough: Sequence[str | Path] = (),
    ) -> ParticleStack:
        """Open a particle file and check that its images can be had.

        Parameters
        ----------
        path
            RELION STAR file, cryoSPARC ``.cs``, bare stack or list of stacks. It needs the values of the contrast
            transfer function and the pixel size; poses are not needed.
        ctf
            For bare stacks: the contrast transfer functions as a cryoDRGN pickle.
        passthrough
            For a ``.cs``: its passthrough files, which hold the fields that it lacks.
        data_dir
            Folder that the image paths are relative to; without it the folder of the particle file,
            its parents and the working folder are tried.

        Raises
        ------
        InputError
            If a file, column or value is missing or wrong, with the row and the fix.
        """
        return cls.of_source(
            ParticleSource(
                Path(path),
                None if data_dir is None else Path(data_dir),
                None if ctf is None else Path(ctf),
                tuple(Path(file) for file in passthrough),
            )
        )

    @classmethod
    def of_source(cls, source: ParticleSource, table: ParticleTable | None = None) -> ParticleStack:
        """The particles of a source, whose ``table`` may have been read already; see :meth:`open`."""
        table = table or source.read()
        if source.data_dir is not None and not source.data_dir.is_dir():
            raise InputError(
                f"--data-dir {source.data_dir}: no such folder; give the folder the image paths start from"
            )
        roots = image_roots(table.path, source.data_dir)
        stacks = tuple(open_stack(_found(name, roots, table.path)) for name in table.images.names)
        _check_stacks(table, stacks)
        return cls(table, stacks, source)

    def take(self, indices: Tensor) -> ParticleStack:
        """The particles of rows ``indices`` (B,) only, in that order."""
        chosen = indices.cpu().numpy()
        return ParticleStack(self.table.take(chosen), self._stacks, self.source)

    def keep_table(self, copy: Path) -> ParticleStack:
        """The same particles with a copy of their table, beside ``copy`` with the suffix of its kind.

        It is what :meth:`write` goes by, so that the file itself may change or vanish. Stacks are not copied.
        """
        kind = file_kind(self.table.path)
        if kind not in (FileKind.STAR, FileKind.CRYOSPARC):
            return self
        target = copy.with_suffix(".star" if kind is FileKind.STAR else ".cs")
        shutil.copyfile(self.table.path, target)
        if self.table.star is None:
            return self
        star = replace(self.table.star, path=target, fingerprint=file_fingerprint(target))
        return ParticleStack(replace(self.table, star=star), self._stacks, self.source)

    @property
    def n_particles(self) -> int:
        return len(self.table)

    def order_of_images(self) -> Tensor:
        """Rows (N,) in the order of the names and numbers of their images, which the order of the file leaves alone."""
        images = self.table.images
        names = sorted(range(len(images.names)), key=lambda i: (Path(images.names[i]).name, images.names[i]))
        rank = np.empty(len(names), dtype=np.int64)
        rank[names] = np.arange(len(names))
        return torch.from_numpy(np.lexsort((images.index, rank[images.stack])))

    def fingerprint(self) -> str:
        """Of all that is known of the particles, and of some of their images: the same for the same particles."""
        table = self.table
        digest = hashlib.sha256(repr(table.images.names).encode())
        columns = [values for values in vars(table).values() if isinstance(values, np.ndarray)]
        columns += [table.images.stack, table.images.index]
        if table.poses is not None:
            columns += [table.poses.angles_in_degrees, table.poses.origins_in_angstroms]
        for values in columns:
            digest.update(np.ascontiguousarray(values).data)
        for row in torch.linspace(0, len(table) - 1, min(len(table), _N_FINGERPRINTED)).long():
            digest.update(self.stored_images(row[None]).numpy().data)
        return digest.hexdigest()

    def fingerprint_of_images(self) -> str:
        """Of all that their coefficients and optics depend on, poses and half sets aside.

        Another one, too, once a stack was written again, whatever is in it now.
        """
        table = replace(self.table, poses=None, half_set=None)
        digest = hashlib.sha256(ParticleStack(table, self._stacks, self.source).fingerprint().encode())
        for stack in np.unique(table.images.stack):
            digest.update(repr(file_fingerprint(self._stacks[stack].path)).encode())
        return digest.hexdigest()

    @property
    def image_sizes(self) -> NDArray[np.int64]:
        """Side (N,) of each particle's image in pixels."""
        sizes = np.array([stack.n_rows for stack in self._stacks])
        if (sizes == sizes[0]).all():
            return np.broadcast_to(sizes[0], len(self.table))
        return sizes[self.table.images.stack]

    @property
    def n_pixels(self) -> int:
        """Side of the images in pixels; where they differ, that of the largest optics group."""
        return self._commonest_image[1]

    @property
    def pixel_size_in_angstroms(self) -> float:
        """Pixel size of the images, which is that of the maps made from them; of the largest optics group."""
        return self._commonest_image[0]

    @property
    def optics_group(self) -> Tensor:
        """Number (N,) of the microscope and kind of image of each particle, counted from 0."""
        table = self.table
        kinds = (
            table.voltage_in_kilovolts,
            table.spherical_aberration_in_mm,
            table.amplitude_contrast,
            table.pixel_size_in_angstroms,
            self.image_sizes,
        )
        group = np.zeros(len(table), dtype=np.int64)
        for values in kinds:
            # One column after the other, so that no table of all of them is made.
            group = np.unique(group * len(table) + np.unique(values, return_inverse=True)[1], return_inverse=True)[1]
        return torch.from_numpy(group)

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
            np.broadcast_to(1.0, len(table)),
        )
        return Optics(*map(_tensor, columns))

    @property
    def poses(self) -> Poses | None:
        """Poses in the file, if it has any."""
        return None if self.table.poses is None else poses_from_columns(self.table.poses)

    def images(self, indices: Tensor) -> Tensor:
        """Images (B, n, n) as they are in the file, in the order of ``indices`` (B,).

        Raises
        ------
        InputError
            If an image holds a value that is not finite, or was cut off.
        """
        images = self.stored_images(indices)
        finite = images.isfinite().all(dim=2).all(dim=1)
        if not bool(finite.all()):
            first = int(finite.long().argmin())
            raise InputError(f"{self.table.path}: {self.fault(int(indices[first]), images[first])}; remove the row")
        return images

    def stored_images(self, indices: Tensor) -> Tensor:
        """Images (B, n, n) of one size as they are in the file; NaN where the stack was cut off before them."""
        references = self.table.images
        wanted = indices.cpu().numpy()
        stack_of, place = references.stack[wanted], references.index[wanted]
        n = self._stacks[stack_of[0]].n_rows
        result = np.full((len(wanted), n, n), np.nan, dtype=np.float32)
        for stack in np.unique(stack_of):
            here = np.flatnonzero((stack_of == stack) & (place < self._stacks[stack].n_whole))
            result[here] = self._map(int(stack))[place[here]]
        self._n_bytes_read += result.nbytes
        if self._n_bytes_read > _MAPPED_BYTES:
            self._open.clear()
            self._n_bytes_read = 0
        return torch.from_numpy(result)

    def fault(self, index: int, image: Tensor) -> Fault:
        """What is wrong with the image (n, n) of a particle that cannot be used."""
        references = self.table.images
        stack = self._stacks[references.stack[index]]
        number = int(references.index[index])
        reason = "has no noise in its background: masked images cannot be normalised"
        if number >= stack.n_whole:
            reason = "is missing: the stack was cut short"
        elif not bool(image.isfinite().all()):
            reason = "has values that are not finite"
        elif bool((image == image[0, 0]).all()):
            reason = "is constant"
        elif float(image.abs().max()) >= LARGEST_VALUE:
            reason = "has values beyond all measure"
        return Fault(int(self.table.rows[index]), self._name(references.stack[index], number), reason)

    def named_anew(self, faults: Sequence[Fault]) -> tuple[Fault, ...]:
        """Faults of particles of this stack with their images named as they are found now."""
        rows, references = self.table.rows, self.table.images
        order = np.argsort(rows)
        indices = order[np.searchsorted(rows[order], np.array([fault.row for fault in faults], dtype=np.int64))]
        return tuple(
            replace(fault, image=self._name(references.stack[index], references.index[index]))
            for fault, index in zip(faults, indices, strict=True)
        )

    def _name(self, stack: int, number: int) -> str:
        return f"{number + 1}@{self._stacks[stack].path}"

    @cached_property
    def _commonest_image(self) -> tuple[float, int]:
        return commonest_image(self.table.pixel_size_in_angstroms, self.image_sizes)

    def write(
        self, path: Path, poses: Poses, extra: Mapping[str, NDArray[np.generic]], faults: Sequence[Fault] = ()
    ) -> None:
        """Write the input as a STAR file with these poses and extra columns, every row in its place.

        Where there are ``faults``, a column ``cryoaiQuarantined`` is 1 for the particles concerned.
        """
        columns = dict(extra)
        if faults:
            aside = np.isin(self.table.rows, [fault.row for fault in faults])
            columns["cryoaiQuarantined"] = aside.astype(np.int64)
        if self.table.star is None:
            write_star(path, self.table, self.image_sizes, pose_columns(poses), columns)
        else:
            rewrite_star(path, self.table, self.table.star, pose_columns(poses), columns)

    def _map(self, stack: int) -> np.memmap:
        """Memory map of a stack, keeping the most recent ones open."""
        if stack not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[stack] = self._stacks[stack].map_images()
        self._open.move_to_end(stack)
        return self._open[stack]


def _tensor(column: NDArray[np.float64]) -> Tensor:
    """A column in single precision; one of equal values takes no memory here either."""
    if column.strides == (0,):
        return torch.tensor([column[0]], dtype=torch.float32).expand(len(column))
    return torch.from_numpy(column).float()


def _found(name: str, roots: list[Path], table: Path) -> Path:
    path = find_image_file(name, roots)
    if path is None:
        raise InputError(
            f"{table}: image stack {shown(name, 200)} not found; tried {places_tried(name, roots)}: "
            "give the folder it is relative to with --data-dir"
        )
    return path


def _check_stacks(table: ParticleTable, stacks: tuple[MrcStack, ...]) -> None:
    for stack in stacks:
        n = stack.n_rows
        if stack.n_columns != n:
            raise InputError(f"{stack.path}: images of {stack.n_columns} x {n} pixels; crop them square")
        if n % 2:
            raise InputError(f"{stack.path}: odd box of {n} pixels; an even box is needed: crop or pad by a pixel")
        if n < SMALLEST_BOX:
            raise InputError(
                f"{stack.path}: box of {n} pixels; at least {SMALLEST_BOX} are needed: extract with a larger box"
            )
    counts = np.array([stack.n_images for stack in stacks])
    beyond = np.flatnonzero(table.images.index >= counts[table.images.stack])
    if len(beyond):
        row = beyond[0]
        stack = stacks[table.images.stack[row]]
        raise InputError(
            f"{table.path}: particle row {table.rows[row] + 1} wants image {int(table.images.index[row]) + 1} of "
            f"{stack.path}, which has {stack.n_images}; the two files do not belong together"
        )
