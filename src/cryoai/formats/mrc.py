"""MRC maps and MRCS stacks: memory-mapped reading, checked headers, atomic writing."""

from __future__ import annotations

import bz2
import gzip
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import NDArray

from cryoai.errors import InputError
from cryoai.formats.files import atomic_path, check_is_file, check_not_a_pointer, read_start, shown
from cryoai.formats.numbers import is_positive

__all__ = ["MrcMap", "MrcStack", "StackWriter", "open_stack", "read_map", "write_map"]

_HEADER_BYTES = 1024
_MAP_WORD, _STAMP = 208, 212  # offsets
_TYPES: dict[int, str] = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
# Of an image in pixels; read in the wrong byte order a side is far larger.
_LARGEST_SIDE = 1 << 20
_MOST_UNPACKED_BYTES = 1 << 32
_PIECE = 1 << 20


@dataclass(frozen=True)
class MrcStack:
    """A stack on disk: its header is read, its pixels are mapped when asked for.

    Of the ``n_images`` that the header announces the first ``n_whole`` are there: a stack may have been cut short.
    The pixel size is that of the header, which may be wrong, or 0 where it says none; so may be what it says it is.
    """

    path: Path
    n_images: int
    n_whole: int
    n_rows: int
    n_columns: int
    dtype: np.dtype[np.generic]
    data_offset_in_bytes: int
    pixel_size_in_angstroms: float
    is_volume: bool

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
    check_is_file(path, "an .mrc or .mrcs file")
    start = read_start(path, _HEADER_BYTES)
    if _unpacker(start) is not None:
        raise InputError(f"{path}: not a readable MRC file (it is compressed: decompress it)")
    header = _Header.parse(path, start)
    n_bytes = path.stat().st_size
    image = header.n_columns * header.n_rows * header.dtype.itemsize
    n_whole = max(0, min(header.n_sections, (n_bytes - header.data_offset_in_bytes) // image))
    if n_whole < 1:
        raise InputError(_cut_short(path, header, n_bytes))
    size = header.voxel_in_angstroms[0]
    return MrcStack(
        path,
        n_images=header.n_sections,
        n_whole=n_whole,
        n_rows=header.n_rows,
        n_columns=header.n_columns,
        dtype=header.dtype,
        data_offset_in_bytes=header.data_offset_in_bytes,
        pixel_size_in_angstroms=float(size) if np.isfinite(size) and size > 0 else 0.0,
        is_volume=header.space_group != 0,
    )


def read_map(path: Path) -> MrcMap:
    """Read a cubic map as float32, with axes in the order [z, y, x]; it may be compressed (gzip, bzip2).

    Raises
    ------
    InputError
        If the file is missing or unreadable, the map is not a cube, its pixel size is missing or
        differs between axes, its axes are permuted, or a value is not finite.
    """
    check_is_file(path, "a map in MRC format")
    start = read_start(path, _HEADER_BYTES)
    unpack = _unpacker(start)
    if unpack is not None:
        header, values = _unpacked_map(path, unpack)
    else:
        header = _Header.parse(path, start)
        if path.stat().st_size < header.end_in_bytes:
            raise InputError(_cut_short(path, header, path.stat().st_size))
        _check_map(path, header)
        values = np.fromfile(path, header.dtype, header.n_columns**3, offset=header.data_offset_in_bytes)
    density = values.reshape((header.n_columns,) * 3).astype(np.float32)
    if not np.isfinite(density).all():
        raise InputError(f"{path}: the map holds values that are not finite; replace them")
    return MrcMap(density, float(header.voxel_in_angstroms[0]))


def _cut_short(path: Path, header: _Header, n_bytes: int, has: str = "the file has") -> str:
    return (
        f"{path}: the header announces {header.n_sections} images of {header.n_columns} x {header.n_rows} pixels "
        f"({header.end_in_bytes} bytes), {has} {n_bytes} bytes; it was cut short: copy it again"
    )


# ------------------------------------------------------------------------------ headers


@dataclass(frozen=True, eq=False)
class _Header:
    """What is used of the header of a file; voxel sizes (3,) are 0 along the axes where it gives none."""

    n_columns: int
    n_rows: int
    n_sections: int
    dtype: np.dtype[np.generic]
    data_offset_in_bytes: int
    axes: tuple[int, int, int]
    voxel_in_angstroms: NDArray[np.float64]
    space_group: int

    @property
    def end_in_bytes(self) -> int:
        """Where the data end."""
        n_values = self.n_columns * self.n_rows * self.n_sections
        return self.data_offset_in_bytes + n_values * self.dtype.itemsize

    @classmethod
    def parse(cls, path: Path, start: bytes) -> _Header:
        """The header that a file begins with.

        Raises
        ------
        InputError
            If it is none, or announces what cannot be or is not read.
        """
        check_not_a_pointer(path, start)
        if re.fullmatch(rb"\.{0,2}/[^\s\0]+\s*", start):
            target = shown(start.decode(errors="replace").strip(), 200)
            raise InputError(f"{path}: a link to {target} kept as a text, not the file itself; fetch that file")
        if len(start) < _HEADER_BYTES:
            length = f"{len(start)} bytes, of which a header alone has {_HEADER_BYTES}" if start else "it is empty"
            raise InputError(f"{path}: not a readable MRC file ({length}); give an .mrc or .mrcs file")
        fields = _in_byte_order(start)
        mode, n_extended = int(fields["mode"]), int(fields["nsymbt"])
        n_columns, n_rows, n_sections = (int(fields[name]) for name in ("nx", "ny", "nz"))
        if mode in (3, 4):
            raise InputError(f"{path}: holds complex values (MRC mode {mode}); real-space images are needed")
        if mode not in _TYPES:
            is_mrc = start[_MAP_WORD : _MAP_WORD + 3] == b"MAP"
            fault = f"its mode is {mode}; 0, 1, 2, 6 and 12 are read" if is_mrc else "it has no MRC header"
            raise InputError(f"{path}: not a readable MRC file ({fault}); give an .mrc or .mrcs file")
        if min(n_columns, n_rows, n_sections) < 1:
            sizes = (n_columns, n_rows, n_sections)
            raise InputError(f"{path}: the MRC header announces sizes {sizes}; they must be positive: copy it again")
        if n_extended < 0:
            raise InputError(f"{path}: the MRC header announces {n_extended} bytes to follow it; copy it again")
        cell, steps = (np.array(fields[name].tolist(), dtype=np.float64) for name in ("cella", ["mx", "my", "mz"]))
        return cls(
            n_columns=n_columns,
            n_rows=n_rows,
            n_sections=n_sections,
            dtype=np.dtype(_TYPES[mode]).newbyteorder(fields.dtype["mode"].byteorder),
            data_offset_in_bytes=_HEADER_BYTES + n_extended,
            axes=(int(fields["mapc"]), int(fields["mapr"]), int(fields["maps"])),
            voxel_in_angstroms=np.where(steps > 0, cell, 0) / steps.clip(min=1),
            space_group=int(fields["ispg"]),
        )


def _in_byte_order(start: bytes) -> np.void:
    """The fields of a header, in the byte order that its machine stamp says unless only the other makes sense."""
    stamped = ">" if start[_STAMP : _STAMP + 2] == b"\x11\x11" else "<"
    first, second = (
        np.frombuffer(start, HEADER_DTYPE.newbyteorder(order))[0] for order in (stamped, "<>"[stamped == "<"])
    )
    return second if _makes_sense(second) and not _makes_sense(first) else first


def _makes_sense(fields: np.void) -> bool:
    sides = int(fields["nx"]), int(fields["ny"])
    return int(fields["mode"]) in (*_TYPES, 3, 4) and min(sides) > 0 and max(sides) < _LARGEST_SIDE


def _check_map(path: Path, header: _Header) -> None:
    """See that the header is that of a map with one meaning."""
    n, n_rows, n_sections = header.n_columns, header.n_rows, header.n_sections
    if n_sections == 1 or (header.space_group == 0 and n == n_rows != n_sections):
        kind = "an image" if n_sections == 1 else f"a stack of {n_sections} images"
        raise InputError(f"{path}: {kind} of {n} x {n_rows} pixels, not a map; give a map")
    if not n == n_rows == n_sections:
        raise InputError(f"{path}: the map has {n} x {n_rows} x {n_sections} voxels; a cube is needed: pad it to one")
    if header.axes not in {(1, 2, 3), (0, 0, 0)}:
        raise InputError(f"{path}: its axes are stored in another order than x, y, z; resave it in that order")
    voxel = header.voxel_in_angstroms
    if not is_positive(voxel).all() or np.ptp(voxel) > 1e-3 * voxel.max():
        raise InputError(f"{path}: the header gives voxels of {voxel.tolist()} Å; one positive size is needed: set it")


# ------------------------------------------------------------------------------ compressed maps

_Unpacker = Callable[[Path], gzip.GzipFile | bz2.BZ2File]


def _unpacker(start: bytes) -> _Unpacker | None:
    """What opens a file that begins so, if it is compressed; sides of images may begin like it."""
    if start[_MAP_WORD : _MAP_WORD + 3] == b"MAP":
        return None
    return gzip.GzipFile if start.startswith(b"\x1f\x8b") else bz2.BZ2File if start.startswith(b"BZh") else None


def _unpacked_map(path: Path, unpack: _Unpacker) -> tuple[_Header, NDArray[np.generic]]:
    """The header and the values of a compressed map; no more is unpacked than the header announces."""
    try:
        with unpack(path) as file:
            header = _Header.parse(path, file.read(_HEADER_BYTES))
            _check_map(path, header)
            if header.end_in_bytes > _MOST_UNPACKED_BYTES:
                size = f"its header announces {header.end_in_bytes} bytes, which is too much to do in memory"
                raise InputError(f"{path}: {size}: decompress it")
            content = bytearray()
            # In pieces: what is not there takes no memory.
            while len(content) < header.end_in_bytes - _HEADER_BYTES and (piece := file.read(_PIECE)):
                content += piece
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be decompressed ({error}); copy it again") from None
    if len(content) < header.end_in_bytes - _HEADER_BYTES:
        raise InputError(_cut_short(path, header, _HEADER_BYTES + len(content), "decompressed it has"))
    start = header.data_offset_in_bytes - _HEADER_BYTES
    return header, np.frombuffer(content, header.dtype, header.n_columns**3, offset=start)


# ------------------------------------------------------------------------------ writing


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
