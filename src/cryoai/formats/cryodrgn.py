"""cryoDRGN's pickled arrays: contrast transfer functions and poses. Nothing in a pickle is ever run."""

from __future__ import annotations

import codecs
import pickle
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryoai.errors import InputError
from cryoai.formats.files import check_is_file, check_not_a_pointer, read_start, shown
from cryoai.formats.numbers import LARGEST, SMALLEST, is_number, is_positive
from cryoai.formats.table import FloatColumn, PoseColumns

__all__ = ["CryodrgnCtf", "CryodrgnPoses", "read_cryodrgn_ctf", "read_cryodrgn_poses"]

_CTF = "cryoDRGN's ctf.pkl"
_POSES = "cryoDRGN's pose.pkl"
_LARGEST_BOX = 1 << 20
_CTF_COLUMNS = (
    "box size",
    "pixel size",
    "defocus U",
    "defocus V",
    "defocus angle",
    "voltage",
    "spherical aberration",
    "amplitude contrast",
    "phase shift",
)


@dataclass(frozen=True, eq=False)
class CryodrgnCtf:
    """Contrast transfer functions (N,) of particles.

    The sign of cryoDRGN's function is opposite to ours, and it turns the images over too: its columns mean the same.

    Attributes
    ----------
    n_pixels : (N,)
        Side of the images that the pixel size is of; a stack of fewer pixels spans the same extent.
    """

    n_pixels: NDArray[np.int64]
    pixel_size_in_angstroms: FloatColumn
    defocus_u_in_angstroms: FloatColumn
    defocus_v_in_angstroms: FloatColumn
    defocus_angle_in_degrees: FloatColumn
    voltage_in_kilovolts: FloatColumn
    spherical_aberration_in_mm: FloatColumn
    amplitude_contrast: FloatColumn
    phase_shift_in_degrees: FloatColumn

    def __len__(self) -> int:
        return len(self.n_pixels)

    @property
    def extent_in_angstroms(self) -> FloatColumn:
        """Side (N,) of the images, however finely sampled."""
        return self.n_pixels * self.pixel_size_in_angstroms


@dataclass(frozen=True, eq=False)
class CryodrgnPoses:
    """Poses (N,) as cryoDRGN keeps them, in RELION's conventions.

    Attributes
    ----------
    angles_in_degrees : (N, 3)
        RELION's, ordered (rot, tilt, psi).
    origins_in_boxes : (N, 2)
        RELION's origins (x, y) as fractions of the side of the box; None where the file has rotations only.
    """

    angles_in_degrees: FloatColumn
    origins_in_boxes: FloatColumn | None

    def __len__(self) -> int:
        return len(self.angles_in_degrees)

    def columns(self, extent_in_angstroms: float | FloatColumn) -> PoseColumns:
        """The poses of images of this side, or these sides (N,); without shifts in the file they are centred."""
        origins = self.origins_in_boxes
        if origins is None:
            return PoseColumns(self.angles_in_degrees, np.zeros((len(self), 2)))
        return PoseColumns(self.angles_in_degrees, origins * np.reshape(extent_in_angstroms, (-1, 1)))


def read_cryodrgn_ctf(path: Path) -> CryodrgnCtf:
    """Read a table of contrast transfer functions.

    Raises
    ------
    InputError
        If the file is missing, no pickle of arrays, or no such table; or a value is not finite or impossible.
    """
    value = _load(path, _CTF)
    if not (_is_array(value, 2) and value.shape[1] == len(_CTF_COLUMNS)):
        raise InputError(f"{path}: holds {_described(value)}; give {_CTF}, 9 numbers for each particle")
    columns = _doubles(value).T
    for name, column in zip(_CTF_COLUMNS, columns, strict=True):
        _check_numbers(path, name, column, positive=name in ("box size", "pixel size", "voltage"))
    whole = np.rint(columns[0])
    bad = np.flatnonzero((np.abs(columns[0] - whole) > 1e-3) | (whole > _LARGEST_BOX))
    if len(bad):
        raise InputError(f"{path}: the box size of row {bad[0] + 1} is {columns[0][bad[0]]:g} pixels; give {_CTF}")
    return CryodrgnCtf(whole.astype(np.int64), *columns[1:])


def _check_numbers(path: Path, name: str, column: FloatColumn, *, positive: bool) -> None:
    bad = np.flatnonzero(~is_number(column))
    if len(bad):
        rule = f"a finite number is needed, of at most {LARGEST:g}"
        raise InputError(f"{path}: the {name} of row {bad[0] + 1} is {column[bad[0]]}; {rule}")
    bad = np.flatnonzero(~is_positive(column)) if positive else bad
    if len(bad):
        rule = f"it must be positive, at least {SMALLEST:g}"
        raise InputError(f"{path}: the {name} of row {bad[0] + 1} is {column[bad[0]]:g}; {rule}")


def read_cryodrgn_poses(path: Path) -> CryodrgnPoses:
    """Read poses: rotations and shifts, or rotations alone.

    Raises
    ------
    InputError
        If the file is missing, no pickle of arrays, or holds no poses; or a value is not finite, no rotation, or a
        shift of more than a box.
    """
    value = _load(path, _POSES)
    # Rotations alone are an array, or the only one of a tuple.
    parts = value if isinstance(value, tuple | list) else (value,)
    rotations, shifts = (*parts, None)[:2] if len(parts) in (1, 2) else (None, None)
    if not _is_array(rotations, 3) or rotations.shape[1:] != (3, 3):
        raise InputError(f"{path}: holds {_described(value)}; give {_POSES}, a 3 x 3 rotation for each particle")
    if shifts is not None and not (_is_array(shifts, 2) and shifts.shape == (len(rotations), 2)):
        raise InputError(f"{path}: holds {_described(value)}; give {_POSES}, with a shift (x, y) for each rotation")
    matrices = _rotations(path, _doubles(rotations))
    with warnings.catch_warnings():
        # At tilt 0, where rot and psi are one angle, which is what it warns of.
        warnings.simplefilter("ignore", UserWarning)
        # Its rotations take the particle to the image, ours the image to the particle.
        angles = Rotation.from_matrix(matrices.transpose(0, 2, 1)).as_euler("ZYZ", degrees=True)
    return CryodrgnPoses(angles, None if shifts is None else _shifts(path, _doubles(shifts)))


def _rotations(path: Path, matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    # What is not a number, or overflows, is no rotation either.
    with np.errstate(all="ignore"):
        errors = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
        bad = np.flatnonzero(~((errors < 1e-3) & (np.linalg.det(matrices) > 0)))
    if len(bad):
        raise InputError(f"{path}: the matrix of row {bad[0] + 1} is no rotation; give {_POSES}")
    return matrices


def _shifts(path: Path, shifts: NDArray[np.float64]) -> NDArray[np.float64]:
    bad = np.flatnonzero(~(np.abs(shifts) <= 1).all(axis=1))
    if len(bad):
        x, y = shifts[bad[0]]
        raise InputError(
            f"{path}: the shift of row {bad[0] + 1} is ({x:g}, {y:g}), which is no fraction of the box: "
            "versions before 0.3 wrote pixels; parse the poses again with a later one"
        )
    return shifts


# ------------------------------------------------------------------------------ pickles


class _ArrayUnpickler(pickle.Unpickler):
    """A pickle may call whatever it names; this one may build arrays of numbers and nothing else.

    Not even with NumPy's own functions, some of which a damaged pickle can make write where they should not.
    """

    def find_class(self, module: str, name: str) -> Any:
        wanted = (module.replace("numpy._core", "numpy.core"), name)
        if wanted not in _BUILDERS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        build = _BUILDERS[wanted]
        # A function of its own, so that nothing that the pickle does to it outlives the pickle.
        return lambda *arguments: build(*arguments)


class _Type:
    """The type of the numbers of an array: its name, then its byte order."""

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"numpy.{self.dtype.name}-array")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array, empty until its state is known."""

    def __init__(self) -> None:
        self.values: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, in_columns, content = state
        # The oldest pickles hold bytes as text.
        content = _latin1(content) if isinstance(content, str) else content
        self.values = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if in_columns else "C")


def _array_of_buffer(buffer: bytes, kind: _Type, shape: tuple[int, ...], order: str, axes: Any = None) -> _Array:
    found = _Array()
    if axes is None:
        found.values = np.frombuffer(buffer, kind.dtype).reshape(shape, order="F" if order == "F" else "C")
    else:
        found.values = np.frombuffer(buffer, kind.dtype).reshape(shape).transpose(axes)
    return found


def _latin1(text: str, _encoding: str = "latin1") -> bytes:
    return codecs.latin_1_encode(text)[0]


_BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): lambda name, *_: _Type(name),
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.numeric", "_frombuffer"): _array_of_buffer,
    # How the oldest kinds of pickle spell bytes.
    ("_codecs", "encode"): _latin1,
}


def _load(path: Path, wanted: str) -> Any:
    check_is_file(path, wanted)
    start = read_start(path, 4096)
    if not start.strip():
        raise InputError(f"{path}: the file is empty; give {wanted}")
    check_not_a_pointer(path, start)
    with path.open("rb") as file:
        try:
            if start.startswith(b"\x80"):
                # CPython prints a traceback of its own where an array is announced that is longer than all memory.
                for _ in pickletools.genops(file):
                    pass
                file.seek(0)
            return _with_arrays(_ArrayUnpickler(file, encoding="latin1").load())
        except pickle.UnpicklingError as error:
            words = str(error).split()
            fault = f"holds a {shown(words[0])}, not plain arrays" if len(words) == 1 else "not a pickle"
        except Exception:  # a damaged pickle can raise anything
            fault = "not a pickle, or a damaged one"
    raise InputError(f"{path}: {fault}; give {wanted}")


def _with_arrays(value: Any) -> Any:
    """What was loaded, with arrays in it, which are alone or next to each other."""
    if isinstance(value, tuple | list):
        return type(value)(part.values if isinstance(part, _Array) else part for part in value)
    return value.values if isinstance(value, _Array) else value


def _doubles(array: NDArray[Any]) -> FloatColumn:
    # What overflows is found to be no number.
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float64)


def _is_array(value: Any, n_axes: int) -> bool:
    """Whether it is an array of numbers with so many axes and at least one row."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.ndim == n_axes and len(value) > 0


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        kind = "a list of particle numbers, " if value.ndim == 1 and value.dtype.kind in "iu" else ""
        return shown(f"{kind}an array of shape {value.shape} and type {value.dtype}", 200)
    if isinstance(value, tuple | list):
        # Of what is in it, no more than arrays: it may be deep, or hold itself.
        parts = [_described(part) if isinstance(part, np.ndarray) else f"a {type(part).__name__}" for part in value[:3]]
        return f"a {type(value).__name__} of {len(value)}" + (f": {', '.join(parts)}" if parts else "")
    return f"a {type(value).__name__}"
