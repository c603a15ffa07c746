"""The particle table to cryoSPARC datasets: one that was read, with new poses, or a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryoai.errors import InputError
from cryoai.formats.cryosparc.dataset import Dataset, load_records
from cryoai.formats.cryosparc.reading import ABERRATIONS, image_references
from cryoai.formats.files import atomic_path
from cryoai.formats.table import FloatColumn, ImageReferences, ParticleTable, PoseColumns

__all__ = ["rewrite_cryosparc", "write_cryosparc", "write_cryosparc_group"]

# All fields of an alignment, and what each is where nothing is known: cryoSPARC expects the whole set.
_ALIGNMENT: dict[str, tuple[str, int, float]] = {
    "split": ("<u4", 1, 0),
    "shift": ("<f4", 2, 0),
    "pose": ("<f4", 3, 0),
    "psize_A": ("<f4", 1, 0),
    "error": ("<f4", 1, 0),
    "error_min": ("<f4", 1, 0),
    "resid_pow": ("<f4", 1, 0),
    "slice_pow": ("<f4", 1, 0),
    "image_pow": ("<f4", 1, 0),
    "cross_cor": ("<f4", 1, 0),
    "alpha": ("<f4", 1, 1),
    "alpha_min": ("<f4", 1, 1),
    "weight": ("<f4", 1, 0),
    "pose_ess": ("<f4", 1, 0),
    "shift_ess": ("<f4", 1, 0),
    "class_posterior": ("<f4", 1, 1),
    "class": ("<u4", 1, 0),
    "class_ess": ("<f4", 1, 1),
}
# Single precision tells no two defoci apart that differ by less.
_ROUNDING_IN_ANGSTROMS = 1e-3
_SLOTS = ("blob", "ctf", "alignments2D", "alignments3D", "location", "pick_stats")


def rewrite_cryosparc(
    path: Path,
    table: ParticleTable,
    poses: PoseColumns,
    *,
    half_set: NDArray[np.integer] | None = None,
    confidence: FloatColumn | None = None,
    passthrough: Sequence[Path] = (),
    folder: Path | None = None,
) -> None:
    """Write the dataset of a table again with these poses, and the table's defocus where it is another one.

    Uids and all else stay as they were read.

    Fields of the passthrough files are written too, so that the new dataset is complete. Of the rows, those of the
    table are written, in its order.

    Parameters
    ----------
    half_set : (N,)
        1 or 2, as in RELION; without it the halves of the dataset stay.
    confidence : (N,)
        Probability of each pose, which becomes ``alignments3D/class_posterior``.
    folder
        Where the paths start from that are marked as relative to the dataset; where the table is a copy's, the folder
        of the original.

    Raises
    ------
    InputError
        If the dataset has changed since it was read.
    """
    data = Dataset.open(table.path, passthrough)
    if not _same_images(image_references(data), table):
        raise InputError(f"{table.path}: it has changed since it was read; nothing was written: start again")
    fields = data.fields
    new = _alignment(table, poses, half_set, confidence)
    if half_set is None and "alignments3D/split" in fields:
        new["alignments3D/split"] = data.column("alignments3D/split")[table.rows]
    for name, defocus in (
        ("ctf/df1_A", table.defocus_u_in_angstroms),
        ("ctf/df2_A", table.defocus_v_in_angstroms),
    ):
        new[name] = _changed(data.column(name)[table.rows], defocus)
    for name, kind in fields.items():
        if name.startswith("alignments3D/"):
            # Nothing stays of the old alignment that could be taken for part of the new one.
            new.setdefault(name, np.zeros(len(table), dtype=kind))
        elif name.endswith("path"):
            new[name] = _relocated(data.column(name)[table.rows], folder or table.path.parent, path.parent)
    types = {**fields, **_types(new)}
    _write(path, types, (new[name] if name in new else data.column(name)[table.rows] for name in types))


def write_cryosparc(
    path: Path,
    table: ParticleTable,
    n_pixels: NDArray[np.integer],
    poses: PoseColumns,
    *,
    contrast_sign: int,
    half_set: NDArray[np.integer] | None = None,
    confidence: FloatColumn | None = None,
    paths: Sequence[str] | None = None,
) -> None:
    """Write a table as a new cryoSPARC dataset, with uids that follow from the names and numbers of the images.

    Parameters
    ----------
    n_pixels : (N,)
        Side of each particle's image.
    contrast_sign
        +1 where protein is bright in the images, -1 where it is dark.
    half_set : (N,)
        1 or 2, as in RELION; without it all particles are in the first half.
    confidence : (N,)
        Probability of each pose, which becomes ``alignments3D/class_posterior``.
    paths
        Of the stacks, in the order of their names, where other ones are to be written than these.
    """
    names = np.array([name.encode() for name in (table.images.names if paths is None else paths)])
    microscopes = (table.voltage_in_kilovolts, table.spherical_aberration_in_mm, table.amplitude_contrast)
    group = np.unique(np.stack([*microscopes, table.pixel_size_in_angstroms], axis=1), axis=0, return_inverse=True)[1]
    floats: dict[str, FloatColumn] = {
        "blob/psize_A": table.pixel_size_in_angstroms,
        "blob/sign": np.full(len(table), float(contrast_sign)),
        **dict(zip(("ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast"), microscopes, strict=True)),
        "ctf/df1_A": table.defocus_u_in_angstroms,
        "ctf/df2_A": table.defocus_v_in_angstroms,
        "ctf/df_angle_rad": np.deg2rad(table.defocus_angle_in_degrees),
        "ctf/phase_shift_rad": np.deg2rad(table.phase_shift_in_degrees),
        "ctf/scale": np.ones(len(table)),
        "ctf/scale_const": np.zeros(len(table)),
        **{name: np.zeros((len(table), size)) for name, (_, size) in ABERRATIONS.items()},
        "ctf/bfactor": table.b_factor_in_square_angstroms,
    }
    columns: dict[str, NDArray[Any]] = {
        "uid": _uids(table.images),
        "blob/path": names[table.images.stack],
        "blob/idx": table.images.index.astype("<u4"),
        "blob/shape": np.stack([n_pixels, n_pixels], axis=1).astype("<u4"),
        "ctf/type": np.full(len(table), b"imported"),
        "ctf/exp_group_id": group.ravel().astype("<u4"),
        **{name: values.astype("<f4") for name, values in floats.items()},
        **_alignment(table, poses, half_set, confidence),
    }
    _write(path, _types(columns), columns.values())


def write_cryosparc_group(path: Path, dataset: Path) -> None:
    """Write the group file (.csg) by which cryoSPARC's "Import Result Group" takes a dataset of particles.

    Parameters
    ----------
    dataset
        In the folder of ``path``.
    """
    records = load_records(dataset)
    prefixes = {name.partition("/")[0] for name in records.dtype.names or ()}
    lines = [f"created: {datetime.now(UTC).replace(tzinfo=None).isoformat(sep=' ')}", "group:"]
    lines += ["  description: Particles posed by cryoai", "  name: particles", "  title: Particles", "  type: particle"]
    lines.append("results:")
    for slot in _SLOTS:
        if slot in prefixes:
            lines += [f"  {slot}:", f"    metafile: '>{dataset.name}'"]
            lines += [f"    num_items: {len(records)}", f"    type: particle.{slot}"]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*lines, "version: v4.0.0"]) + "\n", encoding="utf-8")


def _same_images(found: ImageReferences, table: ParticleTable) -> bool:
    known = table.images
    if found.names != known.names or table.rows.max() >= len(found.index):
        return False
    same = (found.index[table.rows] == known.index) & (found.stack[table.rows] == known.stack)
    return bool(same.all())


def _alignment(
    table: ParticleTable,
    poses: PoseColumns,
    half_set: NDArray[np.integer] | None,
    confidence: FloatColumn | None,
) -> dict[str, NDArray[Any]]:
    """All fields of the alignment, with nothing in those that only cryoSPARC can compute."""
    n = len(table)
    columns = {
        f"alignments3D/{name}": np.full((n,) if size == 1 else (n, size), value, dtype=kind)
        for name, (kind, size, value) in _ALIGNMENT.items()
    }
    rotations = Rotation.from_euler("ZYZ", poses.angles_in_degrees, degrees=True)
    columns["alignments3D/pose"][:] = rotations.as_rotvec()
    columns["alignments3D/shift"][:] = poses.origins_in_angstroms / table.pixel_size_in_angstroms[:, None]
    columns["alignments3D/psize_A"][:] = table.pixel_size_in_angstroms
    if half_set is not None:
        columns["alignments3D/split"][:] = np.asarray(half_set) - 1
    if confidence is not None:
        columns["alignments3D/class_posterior"][:] = confidence
    return columns


def _changed(stored: NDArray[Any], values: FloatColumn) -> NDArray[Any]:
    """Stored numbers (N,), replaced where the values (N,) are others and not only written with fewer digits."""
    return np.where(np.abs(stored - values) > _ROUNDING_IN_ANGSTROMS, values, stored).astype(stored.dtype)


def _uids(images: ImageReferences) -> NDArray[np.uint64]:
    """Numbers that are the same for the same images in every run, and differ between particles."""
    names = [int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") for name in images.names]
    # Where an image is listed again, which time it is.
    image = images.stack.astype(np.uint64) << np.uint64(32) | images.index.astype(np.uint64)
    order = np.argsort(image, kind="stable")
    first = np.flatnonzero(np.concatenate([[True], np.diff(image[order]) != 0]))
    repeats = np.empty(len(image), dtype=np.int64)
    repeats[order] = np.arange(len(image)) - np.repeat(first, np.diff(np.append(first, len(image))))
    number = images.index.astype(np.uint64) | repeats.astype(np.uint64) << np.uint64(32)
    # Multiplication by an odd number and a shift within a word are one to one (the mixer of splitmix64).
    odd, odder = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9], dtype=np.uint64)[:, None]
    mixed = np.array(names, dtype=np.uint64)[images.stack] + number * odd
    mixed = (mixed ^ mixed >> np.uint64(30)) * odder
    return mixed ^ mixed >> np.uint64(27)


def _relocated(values: NDArray[Any], source: Path, target: Path) -> NDArray[Any]:
    """Paths that start from the folder of the dataset, made to start from its new one."""
    if values.dtype.kind != "S" or source.resolve() == target.resolve() or not np.char.startswith(values, b">").any():
        return values
    names, which = np.unique(values, return_inverse=True)
    way = relpath(source.resolve(), target.resolve()).encode()
    moved = [b">" + way + b"/" + name[1:] if name.startswith(b">") else name for name in names.tolist()]
    return np.array(moved)[which]


def _types(columns: Mapping[str, NDArray[Any]]) -> dict[str, np.dtype[Any]]:
    return {name: np.dtype((values.dtype, values.shape[1:])) for name, values in columns.items()}


def _write(path: Path, types: Mapping[str, np.dtype[Any]], columns: Iterable[NDArray[Any]]) -> None:
    """Write fields of these names and types, one column in memory at a time beside the whole."""
    records: NDArray[np.void] | None = None
    for name, values in zip(types, columns, strict=True):
        if records is None:
            records = np.empty(len(values), dtype=list(types.items()))
        records[name] = values
    assert records is not None
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, records, allow_pickle=False)
