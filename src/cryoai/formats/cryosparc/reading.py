"""cryoSPARC datasets to the particle table."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryoai.errors import InputError
from cryoai.formats.cryosparc.dataset import Dataset
from cryoai.formats.files import shown
from cryoai.formats.table import FloatColumn, ImageReferences, ParticleTable, PoseColumns, half_set_of

__all__ = ["ABERRATIONS", "image_references", "read_cryosparc", "read_cryosparc_poses"]

# Aberrations that the calculation leaves out: what a person calls them. All are zero where there are none, the
# matrix of the magnification too: it is kept less the identity.
ABERRATIONS = {
    "ctf/tilt_A": ("beam tilt", 2),
    "ctf/shift_A": ("shift of the image by the beam tilt", 2),
    "ctf/trefoil_A": ("trefoil", 2),
    "ctf/tetra_A": ("tetrafoil", 4),
    "ctf/anisomag": ("anisotropic magnification", 4),
}


def read_cryosparc(path: Path, passthrough: Sequence[Path] = ()) -> ParticleTable:
    """Read the particles of a cryoSPARC dataset.

    Parameters
    ----------
    passthrough
        Further datasets of the same particles, for the fields that ``path`` lacks; joined on their uid.

    Raises
    ------
    InputError
        If a file is missing or no plain dataset, or a field or value that the physics needs is missing: nothing
        physical is ever assumed.
    """
    data = Dataset.open(path, passthrough)
    return ParticleTable(
        path=path,
        rows=np.arange(len(data)),
        images=image_references(data),
        pixel_size_in_angstroms=data.positive("blob/psize_A"),
        voltage_in_kilovolts=data.positive("ctf/accel_kv"),
        spherical_aberration_in_mm=data.required("ctf/cs_mm"),
        amplitude_contrast=data.required("ctf/amp_contrast"),
        defocus_u_in_angstroms=data.required("ctf/df1_A"),
        defocus_v_in_angstroms=data.required("ctf/df2_A"),
        defocus_angle_in_degrees=_degrees(data.required("ctf/df_angle_rad")),
        # Old versions leave these two out, which came with the phase plate and with refinement of the CTF.
        phase_shift_in_degrees=_degrees(data.optional("ctf/phase_shift_rad", 0.0)),
        b_factor_in_square_angstroms=data.optional("ctf/bfactor", 0.0),
        poses=_poses(data),
        star=None,
        ignored=tuple(
            f"not applied: {kind} ({name})" for name, (kind, _) in ABERRATIONS.items() if _is_set(data, name)
        ),
        half_set=_half_set(data),
    )


def _degrees(radians: FloatColumn) -> FloatColumn:
    """Angles in degrees, to as many digits as single-precision radians hold: what was 36.7° is 36.7° again."""
    return np.rad2deg(radians).round(4)


def read_cryosparc_poses(path: Path, passthrough: Sequence[Path] = ()) -> PoseColumns | None:
    """The poses of a cryoSPARC dataset, which need hold nothing else; None where it has none.

    Raises
    ------
    InputError
        If a file is missing or no plain dataset, or the poses are damaged.
    """
    return _poses(Dataset.open(path, passthrough))


def image_references(data: Dataset) -> ImageReferences:
    """Where the images of a dataset are.

    Raises
    ------
    InputError
        If it does not say, or not in the right types.
    """
    if "blob/path" not in data:
        kinds = shown(", ".join(sorted({name.partition("/")[0] for name in data.fields} - {"uid"})), 200)
        raise InputError(
            f"{data.path}: blob/path is missing, the images of particles (there are {kinds}); give a .cs file of "
            "particles, or the passthrough file of the same job with --passthrough FILE"
        )
    data.require("blob/idx")
    paths, index = data.column("blob/path"), data.column("blob/idx")
    if paths.dtype.kind not in "SU" or paths.ndim != 1 or index.dtype.kind not in "iu" or index.ndim != 1:
        raise InputError(
            f"{data.path}: blob/path and blob/idx are of types {paths.dtype} and {index.dtype}; "
            "a name and a whole number are needed: export it again"
        )
    bad = np.flatnonzero((index < 0) | (index >= 2**31))
    if len(bad):
        raise InputError(f"{data.path}: blob/idx of particle row {bad[0] + 1} is {index[bad[0]]}; export it again")
    if paths.dtype.kind == "U" and not _is_text(paths):
        raise InputError(f"{data.path}: blob/path holds what are no characters; it is damaged: export it again")
    # Particles of one stack mostly stand together: one look at each run of them.
    starts = np.flatnonzero(np.concatenate([[True], paths[1:] != paths[:-1]]))
    stacks: dict[str, int] = {}
    numbers = [stacks.setdefault(_image_name(data.path, row, paths[row]), len(stacks)) for row in starts.tolist()]
    stack = np.repeat(np.array(numbers, dtype=np.int32), np.diff(np.append(starts, len(paths))))
    return ImageReferences(tuple(stacks), stack, index.astype(np.int32))


def _is_text(words: NDArray[np.str_]) -> bool:
    """Whether all characters are such: NumPy does not see to it."""
    codes = np.ascontiguousarray(words, dtype=words.dtype.newbyteorder("=")).view(np.uint32)
    return bool(((codes < 0xD800) | ((codes > 0xDFFF) & (codes <= 0x10FFFF))).all())


def _image_name(path: Path, row: int, stored: bytes | str) -> str:
    stored = bytes(stored) if isinstance(stored, bytes) else str(stored)
    try:
        name = stored.decode() if isinstance(stored, bytes) else stored
    except UnicodeDecodeError:
        name = ""
    # This marks a path that starts from the folder of the dataset.
    name = name.removeprefix(">")
    if not name:
        raise InputError(
            f"{path}: blob/path of particle row {row + 1} is {stored!r}; a path is needed: export it again"
        )
    return name


def _is_set(data: Dataset, name: str) -> bool:
    return name in data and (values := data.column(name)).dtype.kind in "fiu" and bool(values.any())


def _poses(data: Dataset) -> PoseColumns | None:
    if "alignments3D/pose" not in data:
        return None
    vectors = data.required("alignments3D/pose", 3)
    pixel_size = data.positive("alignments3D/psize_A")
    origins = data.required("alignments3D/shift", 2) * pixel_size[:, None]
    with warnings.catch_warnings():
        # At tilt 0, where rot and psi are one angle, which is what it warns of.
        warnings.simplefilter("ignore", UserWarning)
        angles = Rotation.from_rotvec(vectors).as_euler("ZYZ", degrees=True)
    return PoseColumns(angles, origins)


def _half_set(data: Dataset) -> NDArray[np.int64] | None:
    """Half sets (N,) of the particles: what is wrong with them matters only to those who ask for them."""
    if "alignments3D/split" not in data:
        return None
    stored = data.column("alignments3D/split")
    is_column = stored.dtype.kind in "fiu" and stored.ndim == 1
    return half_set_of(stored if is_column else np.full(len(data), np.nan), (0, 1))
