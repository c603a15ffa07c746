"""Any file of particles to the particle table: which kind it is, by what is in it before its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import numpy as np

from cryoai.errors import InputError
from cryoai.formats.cryodrgn import read_cryodrgn_ctf
from cryoai.formats.cryosparc import is_cryosparc, read_cryosparc
from cryoai.formats.files import check_is_file, check_not_a_pointer, is_file, read_start, shown
from cryoai.formats.mrc import MrcStack, open_stack
from cryoai.formats.star import read_star
from cryoai.formats.table import ImageReferences, ParticleTable

__all__ = ["FileKind", "file_kind", "read_particles"]

_KNOWN = "a RELION STAR file, a cryoSPARC .cs file, or a stack (.mrcs, or .txt with one stack a line) with --ctf"
_STACK_SUFFIXES = (".mrcs", ".mrc", ".st", ".map", ".ccp4")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"PK\x03\x04", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
# What other programs keep particles in, and how to get from there to a file that is read.
_FOREIGN = {
    ".xmd": "Xmipp metadata; export the particles in RELION's format (Scipion: relion - export particles)",
    ".emx": "an EMX file; export the particles in RELION's format",
    ".img": "an IMAGIC or SPIDER stack; convert it to .mrcs (e2proc2d.py, relion_image_handler)",
    ".hed": "the header of an IMAGIC stack; convert the stack to .mrcs (e2proc2d.py, relion_image_handler)",
    ".spi": "a SPIDER image or stack; convert it to .mrcs (e2proc2d.py, relion_image_handler)",
    ".stk": "a SPIDER or Xmipp stack; convert it to .mrcs (e2proc2d.py, relion_image_handler)",
    ".xmp": "an Xmipp stack; convert it to .mrcs (e2proc2d.py, relion_image_handler)",
    ".hdf": "an EMAN2 file; export the particles as .mrcs with a RELION STAR file",
    ".lst": "a list of EMAN2; export the particles as .mrcs with a RELION STAR file",
    ".par": "FREALIGN parameters; convert them to a RELION STAR file",
}


class FileKind(Enum):
    """What a file holds."""

    STAR = "STAR file"
    CRYOSPARC = "cryoSPARC dataset"
    STACK = "stack of images"
    LIST = "list of stacks"
    PICKLE = "pickle"


_SUFFIXES = {
    ".star": FileKind.STAR,
    ".cs": FileKind.CRYOSPARC,
    ".csg": FileKind.CRYOSPARC,
    **dict.fromkeys(_STACK_SUFFIXES, FileKind.STACK),
    ".txt": FileKind.LIST,
    ".pkl": FileKind.PICKLE,
    ".pickle": FileKind.PICKLE,
}


def file_kind(path: Path) -> FileKind:
    """Say what a file holds.

    Raises
    ------
    InputError
        If it is missing, empty or not of any of these kinds; what is known of it is said.
    """
    check_is_file(path, _KNOWN)
    start = _readable_start(path)
    suffix = path.suffix.lower()
    is_text = b"\0" not in start
    if is_cryosparc(path):
        return FileKind.CRYOSPARC
    if start[208:211] == b"MAP" and not is_text:
        return FileKind.STACK
    if suffix in _FOREIGN:
        raise InputError(f"{path}: {_FOREIGN[suffix]}")
    if is_text and re.search(rb"^\s*data_", start, re.MULTILINE):
        return FileKind.STAR
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    # The second byte is the version of the format.
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return FileKind.PICKLE
    raise InputError(f"{path}: not a file of particles of a kind that is known; give {_KNOWN}")


def _readable_start(path: Path) -> bytes:
    """The beginning of a file that holds something, in a form that can be read."""
    start = read_start(path, 4096)
    if not start.strip():
        raise InputError(f"{path}: the file is empty; give {_KNOWN}")
    check_not_a_pointer(path, start)
    if start.startswith(_COMPRESSED):
        raise InputError(f"{path}: it is compressed; decompress it")
    if start.startswith(b"\x89HDF"):
        raise InputError(f"{path}: {_FOREIGN['.hdf']}")
    return start


def read_particles(path: Path, *, ctf: Path | None = None, passthrough: Sequence[Path] = ()) -> ParticleTable:
    """Read the particles of a STAR file, a cryoSPARC dataset, or bare stacks of images.

    Parameters
    ----------
    path
        A stack of images or, with one stack a line, a list of them, needs ``ctf``.
    ctf
        cryoDRGN's ctf.pkl, with a row for each image. Its pixel size is scaled to the box of the images.
    passthrough
        Further cryoSPARC datasets of the same particles, for the fields that ``path`` lacks.

    Raises
    ------
    InputError
        If a file is missing, damaged or of another kind, or does not go with the others; or a value that the physics
        needs is missing: nothing physical is ever assumed.
    """
    kind = file_kind(path)
    if passthrough and kind is not FileKind.CRYOSPARC:
        raise InputError(f"--passthrough {passthrough[0]}: is for a cryoSPARC .cs file, which {path} is not; remove it")
    if ctf is not None and kind in (FileKind.STAR, FileKind.CRYOSPARC):
        raise InputError(f"--ctf {ctf}: is for bare stacks of images; {path}, a {kind.value}, has its own: remove it")
    if kind is FileKind.STAR:
        return read_star(path).compacted()
    if kind is FileKind.CRYOSPARC:
        return read_cryosparc(path, passthrough).compacted()
    if kind is FileKind.PICKLE:
        raise InputError(
            f"{path}: a pickle, which holds no images; give the stack of images, and with --ctf cryoDRGN's ctf.pkl"
        )
    stacks = [_open_images(path, ctf)] if kind is FileKind.STACK else _listed_stacks(path, ctf)
    if ctf is None:
        raise InputError(
            f"{path}: images without defocus, voltage and pixel size, which are never assumed; "
            "give a STAR or .cs file of them, or with --ctf cryoDRGN's ctf.pkl"
        )
    return _bare_images(path, stacks, ctf).compacted()


def _open_images(path: Path, ctf: Path | None) -> MrcStack:
    stack = open_stack(path)
    n_columns, n_rows, n_images = stack.n_columns, stack.n_rows, stack.n_images
    # Many programs mark stacks as volumes, and some volumes as stacks; but images are square.
    is_map = stack.is_volume or path.suffix.lower() in (".map", ".ccp4")
    if n_images == n_rows == n_columns:
        is_map |= ctf is None and path.suffix.lower() not in (".mrcs", ".st")
    elif n_rows == n_columns or n_images == 1:
        is_map = False
    if is_map:
        size = f"{n_columns} x {n_rows} x {n_images}"
        raise InputError(f"{path}: a map of {size} voxels, not images of particles; give {_KNOWN}")
    return stack


def _listed_stacks(path: Path, ctf: Path | None) -> list[MrcStack]:
    """The stacks that a text names, one a line, relative to its own folder."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; give {_KNOWN}") from None
    opened: dict[Path, MrcStack] = {}
    stacks = []
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        stack = path.parent / name
        if stack.suffix.lower() not in _STACK_SUFFIXES or not is_file(stack):
            fault = "is no stack (.mrcs)" if stack.suffix.lower() not in _STACK_SUFFIXES else "is not there"
            raise InputError(
                f"{path}: '{shown(name)}' of line {number} {fault}; "
                "one stack a line is needed, relative to the folder of the list"
            )
        if stack not in opened:
            _readable_start(stack)
            opened[stack] = _open_images(stack, ctf)
        stacks.append(opened[stack])
    if not stacks:
        raise InputError(f"{path}: the list names no stack; give one a line")
    return stacks


def _bare_images(path: Path, stacks: list[MrcStack], ctf: Path) -> ParticleTable:
    """The table of all images of some stacks, one stack after the other."""
    counts = [stack.n_images for stack in stacks]
    table = read_cryodrgn_ctf(ctf)
    n = len(table)
    if n != sum(counts):
        raise InputError(f"--ctf {ctf}: {n} rows for the {sum(counts)} images of {path}; give that of the same images")
    # Whole paths: a stack stands where it stands, from wherever the results are read.
    names = [str(stack.path.absolute()) for stack in stacks]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    stack_of = np.repeat(np.array([numbers[name] for name in names], dtype=np.int32), counts)
    index = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    n_pixels = np.repeat([stack.n_columns for stack in stacks], counts)
    return ParticleTable(
        path=path,
        rows=np.arange(n),
        images=ImageReferences(tuple(numbers), stack_of, index),
        pixel_size_in_angstroms=table.extent_in_angstroms / n_pixels,
        voltage_in_kilovolts=table.voltage_in_kilovolts,
        spherical_aberration_in_mm=table.spherical_aberration_in_mm,
        amplitude_contrast=table.amplitude_contrast,
        defocus_u_in_angstroms=table.defocus_u_in_angstroms,
        defocus_v_in_angstroms=table.defocus_v_in_angstroms,
        defocus_angle_in_degrees=table.defocus_angle_in_degrees,
        phase_shift_in_degrees=table.phase_shift_in_degrees,
        b_factor_in_square_angstroms=np.zeros(n),
        poses=None,
        star=None,
        ignored=(),
    )
