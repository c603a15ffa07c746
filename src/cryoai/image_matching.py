"""Which rows of two particle files stand for the same images, by the names of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cryoai.errors import InputError
from cryoai.formats.table import ImageReferences

__all__ = ["ListedImages", "Matching", "match_images"]


@dataclass(frozen=True, eq=False)
class ListedImages:
    """The images of the N rows of a file; ``references`` are None where it names none."""

    path: Path
    n_rows: int
    references: ImageReferences | None

    def names(self, rows: NDArray[np.int64]) -> list[str]:
        """Of some rows: number@stack, or the row where there are no names."""
        images = self.references
        if images is None:
            return [f"row {row + 1}" for row in rows.tolist()]
        numbers, stacks = images.index[rows].tolist(), images.stack[rows].tolist()
        return [f"{number + 1}@{images.names[stack]}" for number, stack in zip(numbers, stacks, strict=True)]


@dataclass(frozen=True, eq=False)
class Matching:
    """The rows (M,) of two files that stand for the same images, in the order of the first.

    Attributes
    ----------
    by_name
        False where a file names no images, and the order of the rows had to do.
    n_ambiguous
        Stacks of images left out, because a stack of that file name is in several folders.
    n_without_pose
        Images in both of which one file says that it has no pose, and which were left out.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    n_only_in_first: int
    n_only_in_second: int
    by_name: bool
    n_ambiguous: int
    n_without_pose: int = 0

    def only(self, posed: NDArray[np.bool_]) -> Matching:
        """Of the matched images (M,) those that have a pose."""
        n_without_pose = self.n_without_pose + int((~posed).sum())
        return replace(self, first=self.first[posed], second=self.second[posed], n_without_pose=n_without_pose)

    def __len__(self) -> int:
        return len(self.first)

    def __str__(self) -> str:
        how = "image name" if self.by_name else "row order, since not both files name their images"
        text = f"{len(self):,} in both, by {how}"
        if self.n_only_in_first or self.n_only_in_second:
            text += f"; {self.n_only_in_first:,} only in the first, {self.n_only_in_second:,} only in the second"
        if self.n_ambiguous:
            text += f"; {self.n_ambiguous:,} stacks left out, whose name is in several folders"
        if self.n_without_pose:
            text += f"; {self.n_without_pose:,} left out, whose image was unusable"
        return text


def match_images(first: ListedImages, second: ListedImages) -> Matching:
    """Find the rows of the same images.

    An image is its number in a stack. Stacks are the same if all of their path is, or else the last folders and the
    file, as many as it takes to tell them apart: at the least the file name, if that is in one folder only.

    Raises
    ------
    InputError
        If no image is in both, or one is listed twice; or images have no names, and the files not as many rows.
    """
    n, m = first.n_rows, second.n_rows
    if first.references is None or second.references is None:
        if n != m:
            nameless = first.path if first.references is None else second.path
            raise InputError(
                f"{first.path}: {n} particles, but {second.path} has {m}, and {nameless} names no images to tell "
                "which; give the same particles in the same order"
            )
        return Matching(np.arange(n), np.arange(n), 0, 0, by_name=False, n_ambiguous=0)
    stacks, n_ambiguous = _common_stacks(first.references.names, second.references.names)
    mine, theirs = _keys(first, first.references, stacks[0]), _keys(second, second.references, stacks[1])
    _, here, there = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
    if not len(here):
        row = np.zeros(1, dtype=np.int64)
        raise InputError(
            f"{first.path}: shares no image with {second.path} (the first of each are {first.names(row)[0]} and "
            f"{second.names(row)[0]}); give files of the same particles"
        )
    order = np.argsort(here)
    return Matching(here[order], there[order], n - len(here), m - len(here), by_name=True, n_ambiguous=n_ambiguous)


def _keys(listed: ListedImages, images: ImageReferences, stacks: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number (N,) for each image, the same for the same image in both files."""
    keys = stacks[images.stack] << 32 | images.index.astype(np.int64)
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(again):
        rows = order[again[0] : again[0] + 2]
        raise InputError(
            f"{listed.path}: rows {rows[0] + 1} and {rows[1] + 1} are both {listed.names(rows)[0]}; "
            "remove one, since nothing says which of them to compare"
        )
    return keys


def _common_stacks(
    first: Sequence[str], second: Sequence[str]
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], int]:
    """Numbers for the stacks of two files, the same for the same stack, and how many cannot be told apart."""
    mine, theirs = ([_parts(name) for name in names] for names in (first, second))
    numbers = {parts: number for number, parts in enumerate(dict.fromkeys(mine))}
    found = {parts: numbers[parts] for parts in theirs if parts in numbers}
    free = [parts for parts in numbers if parts not in found]
    wanted = [parts for parts in dict.fromkeys(theirs) if parts not in found]
    n_ambiguous = 0
    for depth in range(max(map(len, free + wanted), default=0), 0, -1):
        candidates, askers = _by_ending(free, depth), _by_ending(wanted, depth)
        for ending in askers.keys() & candidates.keys():
            if len(askers[ending]) == len(candidates[ending]) == 1:
                found[askers[ending][0]] = numbers[candidates[ending][0]]
            elif depth == 1:
                n_ambiguous += len(askers[ending])
        taken = set(found.values())
        free = [parts for parts in free if numbers[parts] not in taken]
        wanted = [parts for parts in wanted if parts not in found]
    found |= {parts: len(numbers) + number for number, parts in enumerate(wanted)}
    keys = [numbers[parts] for parts in mine], [found[parts] for parts in theirs]
    return (np.array(keys[0], dtype=np.int64), np.array(keys[1], dtype=np.int64)), n_ambiguous


def _by_ending(names: Sequence[tuple[str, ...]], depth: int) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Names by their last ``depth`` parts; shorter ones by all they have."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for parts in names:
        found.setdefault(parts[-depth:], []).append(parts)
    return found


def _parts(name: str) -> tuple[str, ...]:
    """Folders and file of a stack, without cryoSPARC's > and whether it is called .mrc or .mrcs.

    Examples
    --------
    >>> _parts(">J7/extract/a.mrc") == _parts("./J7/extract/a.mrcs") == ("J7", "extract", "a.mrc")
    True
    """
    path = PurePosixPath(name.removeprefix(">"))
    file = path.with_suffix(".mrc") if path.suffix == ".mrcs" else path
    return tuple(part for part in file.parts if part != "/")
