"""The records of a cryoSPARC dataset, joined with those of its passthrough files, and its fields as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cryoai.errors import InputError
from cryoai.formats.files import check_is_file, check_not_a_pointer, read_start, shown
from cryoai.formats.numbers import LARGEST, SMALLEST, is_number, is_positive
from cryoai.formats.table import FloatColumn

__all__ = ["Dataset", "is_cryosparc", "load_records"]

_NUMPY = b"\x93NUMPY"
# A dataset of many classes has more fields than numpy's own limit of 10,000 characters has room for.
_LONGEST_HEADER = 1_000_000
_SMALL = 1 << 20


def is_cryosparc(path: Path) -> bool:
    """Whether a file is a cryoSPARC dataset, or a group file that names some, whatever its suffix."""
    start = read_start(path, 4096)
    known = start.startswith((_NUMPY, b"PAR1")) or start[1:6] == b"CSDAT"
    return known or _is_group(start)


def _is_group(start: bytes) -> bool:
    return b"\0" not in start and any(line.lstrip().startswith(b"metafile:") for line in start.splitlines())


@dataclass(frozen=True, eq=False)
class _Part:
    """The records of a file, and which of them (N,) belong to the particles."""

    path: Path
    records: NDArray[np.void]
    rows: NDArray[np.int64]

    @property
    def names(self) -> tuple[str, ...]:
        return self.records.dtype.names or ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """The fields of the particles of a file, and those that passthrough files add."""

    path: Path
    parts: tuple[_Part, ...]

    @classmethod
    def open(cls, path: Path, passthrough: Sequence[Path]) -> Dataset:
        records = load_records(path)
        main = _Part(path, records, np.arange(len(records)))
        uids = _uid_column(main)
        return cls(path, (main, *(_join(main, uids, other) for other in passthrough)))

    def __len__(self) -> int:
        return len(self.parts[0].rows)

    def __contains__(self, name: str) -> bool:
        return any(name in part.names for part in self.parts)

    def column(self, name: str) -> NDArray[Any]:
        """The values (N, ...) of a field, from the first file that has it."""
        part = next(part for part in self.parts if name in part.names)
        return np.asarray(part.records[name][part.rows])

    @property
    def fields(self) -> dict[str, np.dtype[Any]]:
        """Names and types of all fields, those of the first file first."""
        found: dict[str, np.dtype[Any]] = {}
        for part in self.parts:
            for name in part.names:
                found.setdefault(name, part.records.dtype[name])
        return found

    def require(self, *names: str) -> None:
        """See that fields are there.

        Raises
        ------
        InputError
            Of the first that is not, with where else it may be.
        """
        for name in names:
            if name not in self:
                fix = "it may be in the passthrough file of the same job: give that with --passthrough FILE"
                if len(self.parts) > 1:
                    fix = "it is in none of the passthrough files either; give the right ones"
                raise InputError(f"{self.path}: {name} is missing; {fix}")

    def required(self, name: str, size: int = 1) -> FloatColumn:
        """A field of finite numbers, (N,) or (N, size)."""
        self.require(name)
        stored = self.column(name)
        shape = (len(self),) if size == 1 else (len(self), size)
        if stored.dtype.kind not in "fiu" or stored.shape != shape:
            raise InputError(
                f"{self.path}: {name} is of type {stored.dtype} and shape {stored.shape[1:]} for each particle; "
                f"{'a number is' if size == 1 else f'{size} numbers are'} needed: export it again"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            values = stored.astype(np.float64)
        bad = np.flatnonzero(~is_number(values).reshape(len(self), -1).all(axis=1))
        if len(bad):
            word = " ".join(f"{value:g}" for value in np.atleast_1d(values[bad[0]]))
            raise InputError(
                f"{self.path}: {name} of particle row {bad[0] + 1} is {word}; "
                f"finite values are needed, of at most {LARGEST:g}: remove the row"
            )
        return values

    def positive(self, name: str) -> FloatColumn:
        values = self.required(name)
        bad = np.flatnonzero(~is_positive(values))
        if len(bad):
            raise InputError(
                f"{self.path}: {name} of particle row {bad[0] + 1} is {values[bad[0]]:g}; "
                f"it must be positive, at least {SMALLEST:g}"
            )
        return values

    def optional(self, name: str, default: float) -> FloatColumn:
        return self.required(name) if name in self else np.full(len(self), default)


def load_records(path: Path) -> NDArray[np.void]:
    """The records (N,) of a dataset, mapped where they are many.

    Raises
    ------
    InputError
        If the file is missing, of another kind, damaged, or has no rows.
    """
    check_is_file(path, "the .cs file of a cryoSPARC job")
    _check_start(path, read_start(path, 1 << 16))
    mode: Literal["r"] | None = "r" if path.stat().st_size > _SMALL else None
    try:
        records = np.load(path, mmap_mode=mode, allow_pickle=False, max_header_size=_LONGEST_HEADER)
    except Exception as error:  # a damaged header can raise anything
        fault = "it holds Python objects" if "pickle" in str(error) else "it is damaged or was cut short"
        raise InputError(f"{path}: not a readable cryoSPARC dataset: {fault}; export it again") from None
    if records.dtype.names is None or records.ndim != 1:
        raise InputError(f"{path}: a plain NumPy array without named fields; give the .cs file of a cryoSPARC job")
    if not len(records):
        raise InputError(f"{path}: the dataset has no rows; give at least one particle")
    return records


def _check_start(path: Path, start: bytes) -> None:
    """Refuse by its name what has the suffix of a dataset, or is taken for one."""
    check_not_a_pointer(path, start)
    if _is_group(start):
        raise InputError(_about_group(path, start.decode("utf-8", errors="replace")))
    if start[1:6] == b"CSDAT" or start.startswith(b"PAR1"):
        kind = "compressed" if start[1:6] == b"CSDAT" else "Parquet"
        raise InputError(
            f"{path}: a {kind} dataset; save it as plain NumPy with cryosparc-tools: Dataset.load(path).save(new_path)"
        )
    if not start.startswith(_NUMPY):
        found = "not a cryoSPARC dataset" if start.strip() else "the file is empty"
        raise InputError(f"{path}: {found}; give the .cs file of a cryoSPARC job")


def _about_group(path: Path, text: str) -> str:
    pairs = [line.strip().partition(":")[::2] for line in text.splitlines()]
    files = [value.strip().strip("'\"").removeprefix(">") for key, value in pairs if key == "metafile"]
    named = list(dict.fromkeys(shown(name, 200) for name in files))
    listed = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    fault = f"{path}: a cryoSPARC group file, which only names {listed}"
    if not any(key == "type" and value.strip().startswith("particle") for key, value in pairs):
        return f"{fault}, and these are no particles; give the .cs file of particles"
    more = [name for name in named if "passthrough" in name]
    main = [name for name in named if name not in more] or named[:1]
    flags = [f"--passthrough {name}" for name in (main[1:] + more)[:3]]
    return f"{fault}; give {' '.join([main[0], *flags])}"


def _uid_column(part: _Part) -> NDArray[np.uint64]:
    if "uid" not in part.names:
        raise InputError(f"{part.path}: no field uid; give the .cs file of a cryoSPARC job")
    uids = part.records["uid"]
    if uids.dtype.kind not in "iu" or uids.ndim != 1:
        raise InputError(f"{part.path}: uid is of type {uids.dtype}; whole numbers are needed: export it again")
    return uids.astype(np.uint64)


def _join(main: _Part, uids: NDArray[np.uint64], path: Path) -> _Part:
    """The records of a passthrough file, found by their uid."""
    records = load_records(path)
    theirs = _uid_column(_Part(path, records, np.arange(len(records))))
    order = np.argsort(theirs, kind="stable")
    place = np.searchsorted(theirs, uids, sorter=order).clip(max=len(theirs) - 1)
    n_missing = int((theirs[order[place]] != uids).sum())
    if n_missing:
        raise InputError(
            f"--passthrough {path}: has no row for {n_missing} of the {len(uids)} particles of {main.path}; "
            "give that of the same job"
        )
    following = order[(place + 1).clip(max=len(theirs) - 1)]
    repeated = (theirs[following] == uids) & (following != order[place])
    if repeated.any():
        raise InputError(f"--passthrough {path}: lists {int(repeated.sum())} particles twice; remove the repeated rows")
    return _Part(path, records, order[place])
