"""MRC maps and MRCS stacks: memory-mapped reading, checked headers, atomic writing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
from mrcfile.utils import data_dtype_from_header
from numpy.typing import NDArray

from cryoai.errors import InputError
from cryoai.formats.files import atomic_path

__all__ = ["MrcMap", "MrcStack", "StackWriter", "open_stack", "read_map", "write_map"]

_HEADER_BYTES = 1024


@dataclass(frozen=True)
class MrcStack:
    """A stack on disk: its header is read, its pixels are mapped when asked for.

    Of the ``n_images`` that the header announces the first ``n_whole`` are there: a stack may have been cut short.
    """

    path: Path
    n_images: int
    n_whole: int
    n_rows: int
    n_columns: int
    dtype: np.dtype[np.generic]
    data_offset_in_bytes: int

    def map_images(self) -> np.memmap:
        """Memory map (n_whole, n_rows, n_columns) in the type of the file."""
        return np.memmap(
            self.path,
            dtype=self.dtype,
            mode="r",
            offset=self.data_offset_in_bytes,
            shape=(self.n_whole, self.n_rows, self.n_columns),
        )


@dataclass(frozen=True)
class MrcMap:
    """A map (n, n, n), indexed [z, y, x], with its pixel size."""

    density: NDArray[np.float32]
    pixel_size_in_angstroms: float


def open_stack(path: Path) -> MrcStack:
    """Read the header of an MRC stack or single image and check it against the bytes on disk.

    Raises
    ------
    InputError
        If the file is no MRC file, holds not even one whole image, or complex values.
    """
    header, dtype = _read_header(path)
    offset = _HEADER_BYTES + int(header.nsymbt)
    n_images, n_rows, n_columns = int(header.nz), int(header.ny), int(header.nx)
    n_whole = min(n_images, (path.stat().st_size - offset) // (n_rows * n_columns * dtype.itemsize))
    stack = MrcStack(path, n_images, max(0, n_whole), n_rows, n_columns, dtype, offset)
    if n_whole < 1:
        raise InputError(_cut_short(stack))
    return stack


def _cut_short(stack: MrcStack) -> str:
    image = stack.n_columns * stack.n_rows * stack.dtype.itemsize
    return (
        f"{stack.path}: the header announces {stack.n_images} images of {stack.n_columns} x {stack.n_rows} pixels "
        f"({stack.data_offset_in_bytes + stack.n_images * image} bytes), the file has {stack.path.stat().st_size} "
        "bytes; it was cut short: copy it again"
    )


def _read_header(path: Path) -> tuple[np.recarray, np.dtype[np.generic]]:
    try:
        _check_start(path)
        with warnings.catch_warnings():
            # Permissive mode warns of harmless oddities, such as a wrong machine stamp.
            warnings.simplefilter("ignore", RuntimeWarning)
            with mrcfile.open(path, permissive=True, header_only=True) as file:
                header = file.header.copy()
        dtype = data_dtype_from_header(header)
        sizes = (int(header.nx), int(header.ny), int(header.nz))
    except (ValueError, OSError, AttributeError) as error:
        raise InputError(f"{path}: not a readable MRC file ({error}); give an .mrc or .mrcs file") from None
    if min(sizes) < 1:
        raise InputError(f"{path}: the MRC header announces sizes {sizes}; they must be positive: copy it again")
    if np.issubdtype(dtype, np.complexfloating):
        raise InputError(f"{path}: holds complex values (MRC mode {int(header.mode)}); real-space images are needed")
    return header, dtype


def _check_start(path: Path) -> None:
    """Refuse what mrcfile would unpack, or reserve memory for, before it finds fault with it."""
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    if start.startswith((b"\x1f\x8b", b"BZh")):
        raise ValueError("it is compressed: decompress it")
    # In the byte order of the file; the other makes a small number large.
    extended_header = min(int.from_bytes(start[92:96], "little"), int.from_bytes(start[92:96], "big"))
    if extended_header > path.stat().st_size:
        raise ValueError("its header announces more than the file holds")


def read_map(path: Path) -> MrcMap:
    """Read a cubic map as float32, with axes in the order [z, y, x].

    Raises
    ------
    InputError
        If the file is missing or unreadable, the map is not a cube, its pixel size is missing or
        differs between axes, its axes are permuted, or a value is not finite.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a map in MRC format")
    stack = open_stack(path)
    if stack.n_whole < stack.n_images:
        raise InputError(_cut_short(stack))
    header, _ = _read_header(path)
    n = stack.n_columns
    if not stack.n_images == stack.n_rows == n:
        raise InputError(
            f"{path}: the map has {n} x {stack.n_rows} x {stack.n_images} voxels; a cube is needed: pad it to one"
        )
    if (int(header.mapc), int(header.mapr), int(header.maps)) not in {(1, 2, 3), (0, 0, 0)}:
        raise InputError(f"{path}: its axes are stored in another order than x, y, z; resave it in that order")
    cell = np.array([header.cella.x, header.cella.y, header.cella.z], dtype=float)
    voxel = cell / np.array([header.mx, header.my, header.mz], dtype=float).clip(min=1)
    if voxel.min() <= 0 or np.ptp(voxel) > 1e-3 * voxel.max():
        raise InputError(f"{path}: the header gives voxels of {voxel.tolist()} Å; one positive size is needed: set it")
    density = np.array(stack.map_images(), dtype=np.float32)
    if not np.isfinite(density).all():
        raise InputError(f"{path}: the map holds values that are not finite; replace them")
    return MrcMap(density, float(voxel[0]))


def write_map(path: Path, density: NDArray[np.float32], pixel_size_in_angstroms: float) -> None:
    """Write a map (n, n, n), replacing the file at once and only when all is written."""
    with atomic_path(path) as temporary, mrcfile.new(temporary, overwrite=True) as file:
        file.set_data(np.asarray(density, dtype=np.float32))
        file.set_volume()
        file.voxel_size = pixel_size_in_angstroms


class StackWriter:
    """Write a stack of images piece by piece, never holding more than one piece in memory.

    A context manager around a temporary file; the stack appears under its name when the block ends
    without an error.
    """

    def __init__(self, path: Path, n_images: int, n_pixels: int, pixel_size_in_angstroms: float) -> None:
        self._place = atomic_path(path)
        self._shape = (n_images, n_pixels, n_pixels)
        self._pixel_size = pixel_size_in_angstroms

    def __enter__(self) -> StackWriter:
        temporary = self._place.__enter__()
        self._file = mrcfile.new_mmap(temporary, shape=self._shape, mrc_mode=2, overwrite=True)
        self._file.set_image_stack()
        self._file.voxel_size = self._pixel_size
        return self

    def write(self, start: int, images: NDArray[np.float32]) -> None:
        """Store images (m, n, n) at positions ``start`` to ``start + m``."""
        self._file.data[start : start + len(images)] = images

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._place.__exit__(*error)  # type: ignore[arg-type]
