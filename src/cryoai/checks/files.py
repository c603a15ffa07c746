"""Are the image stacks there, are they what their headers say, and do the rows fit them?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryoai.checks.findings import Finding, Level, Rows, at_rows, said
from cryoai.errors import InputError
from cryoai.formats.files import check_not_a_pointer
from cryoai.formats.mrc import MrcStack, open_stack
from cryoai.formats.table import ImageReferences, ParticleTable
from cryoai.image_paths import find_image_file, image_roots, places_tried
from cryoai.limits import SMALLEST_BOX
from cryoai.working_box import commonest_image, default_working_box

__all__ = ["FoundStacks", "find_stacks", "judge_headers", "judge_references"]

_SAME_PIXEL_SIZE = 0.01
_NAMED = 3


@dataclass(frozen=True, eq=False)
class FoundStacks:
    """The stacks that a particle table names, as far as they could be opened.

    Attributes
    ----------
    stacks
        One for each name of the table; None where it is missing or cannot be read.
    in_file : (N,) bool
        Whether the stack of a particle was found and announces its image.
    readable : (N,) bool
        Whether the image of a particle is there as well, whole.
    boxes : (N,)
        Side of each particle's image in pixels; 0 where it is not known.
    """

    table: ParticleTable
    stacks: tuple[MrcStack | None, ...]
    in_file: NDArray[np.bool_]
    readable: NDArray[np.bool_]
    boxes: NDArray[np.int64]

    @classmethod
    def of_table(cls, table: ParticleTable, stacks: tuple[MrcStack | None, ...]) -> FoundStacks:
        def of_each_particle(values: list[int]) -> NDArray[np.int64]:
            return np.array(values, dtype=np.int64)[table.images.stack]

        known = [stack for stack in stacks if stack is not None]
        whole = of_each_particle([0 if stack is None else stack.n_whole for stack in stacks])
        announced = of_each_particle([0 if stack is None else stack.n_images for stack in stacks])
        square = {id(stack) for stack in known if stack.n_rows == stack.n_columns}
        boxes = of_each_particle([stack.n_rows if stack is not None and id(stack) in square else 0 for stack in stacks])
        index = table.images.index
        return cls(table, stacks, index < announced, (index < whole) & (boxes > 0), boxes)

    @cached_property
    def places_of_stacks(self) -> list[Rows]:
        """Places in the table of the particles of each stack."""
        return _places_of_stacks(self.table.images)

    @cached_property
    def identities(self) -> NDArray[np.int64]:
        """Number (N,) that is the same for particles of the same image, under whatever name of its file."""
        references = self.table.images
        places = [
            Path(name) if stack is None else stack.path.resolve()
            for name, stack in zip(references.names, self.stacks, strict=True)
        ]
        number_of = {place: number for number, place in enumerate(places)}
        file = np.array([number_of[place] for place in places], dtype=np.int64)
        return file[references.stack] << 32 | references.index

    @property
    def worth_reading(self) -> NDArray[np.bool_]:
        """Whether the image of a particle is there and large enough to be used."""
        return self.readable & (self.boxes >= SMALLEST_BOX)

    @property
    def opened(self) -> list[MrcStack]:
        """Those that could be opened."""
        return [stack for stack in self.stacks if stack is not None]

    @property
    def commonest_box(self) -> int:
        """Side of the images of most particles in pixels; 0 where none is known and large enough."""
        return self.commonest_image[1]

    @cached_property
    def commonest_image(self) -> tuple[float, int]:
        """Pixel size in Å and side in pixels of most images; a side of 0 where none is known and large enough."""
        known = self.boxes >= SMALLEST_BOX
        if known.any():
            return commonest_image(self.table.pixel_size_in_angstroms[known], self.boxes[known])
        return commonest_image(self.table.pixel_size_in_angstroms, np.zeros_like(self.boxes))

    @property
    def default_working_box(self) -> int:
        """The box of a run that does not ask for one; 0 where no box is known."""
        known = self.boxes >= SMALLEST_BOX
        return default_working_box(self.table.pixel_size_in_angstroms[known], self.boxes[known]) if known.any() else 0

    def of_particles(self, chosen: Rows) -> tuple[ParticleTable, tuple[MrcStack, ...]]:
        """Some particles whose images are readable, and the stacks that hold them."""
        table = self.table.take(chosen)
        used = np.unique(table.images.stack)
        names = tuple(table.images.names[stack] for stack in used)
        places = np.searchsorted(used, table.images.stack).astype(np.int32)
        stacks = tuple(stack for place in used if (stack := self.stacks[place]) is not None)
        assert len(stacks) == len(names)
        return replace(table, images=ImageReferences(names, places, table.images.index)), stacks


def find_stacks(table: ParticleTable, data_dir: Path | None) -> tuple[FoundStacks, list[Finding]]:
    """Look for every stack and open it; what is wrong with those that are missing or unreadable."""
    names = table.images.names
    if data_dir is not None and not data_dir.is_dir():
        message = f"--data-dir {data_dir}: no such folder"
        missing = Finding("error", "files", message, "give the folder that the image paths start from")
        return FoundStacks.of_table(table, (None,) * len(names)), [missing]
    roots = image_roots(table.path, data_dir)
    stacks: list[MrcStack | None] = []
    findings = []
    for name, places in zip(names, _places_of_stacks(table.images), strict=True):
        stack, finding = _open(name, roots, table.path)
        stacks.append(stack)
        if finding is not None:
            words, rows = at_rows(table, places)
            findings.append(replace(finding, message=f"{finding.message} ({words})", rows=rows))
    if not findings:
        findings = [Finding("ok", "files", f"{table.path}: {said(len(names), 'image stack')}, all found")]
    return FoundStacks.of_table(table, tuple(stacks)), findings


def _open(name: str, roots: list[Path], table: Path) -> tuple[MrcStack | None, Finding | None]:
    """A stack, or what is wrong with it."""
    path = find_image_file(name, roots)
    if path is None:
        message = f"{table}: image stack {name} not found; tried {places_tried(name, roots)}"
        fix = "give the folder that the image paths start from with --data-dir, or mend the paths"
        return None, Finding("error", "files", message, fix)
    try:
        return open_stack(path), None
    except InputError as error:
        return None, Finding("error", "files", _unreadable(path, error))


def _places_of_stacks(images: ImageReferences) -> list[Rows]:
    order = np.argsort(images.stack, kind="stable")
    ends = np.searchsorted(images.stack[order], np.arange(1, len(images.names)))
    return np.split(order, ends)


def _unreadable(path: Path, error: InputError) -> str:
    try:
        with path.open("rb") as file:
            check_not_a_pointer(path, file.read(256))
    except InputError as better:
        return str(better)
    except OSError as better:
        return f"{path}: cannot be read ({better.strerror})"
    return str(error)


# ------------------------------------------------------------------------------ headers


def judge_headers(found: FoundStacks, level_of_unusable: Level) -> list[Finding]:
    """The headers against the bytes on disk, against the table, and against what a run needs.

    ``level_of_unusable`` is that of images that are not there.
    """
    findings = [
        finding
        for number, stack in enumerate(found.stacks)
        if stack is not None
        for finding in (*_judge_shape(stack), *_judge_length(found, number, stack, level_of_unusable))
    ]
    findings += _judge_header_pixel_sizes(found)
    kinds = Counter((stack.n_rows, stack.dtype.name) for stack in found.opened if stack.n_rows == stack.n_columns)
    seen = ", ".join(f"{n} px {dtype} ({said(count, 'stack')})" for (n, dtype), count in kinds.most_common())
    if len({n for n, _ in kinds}) > 1:
        message = f"{found.table.path}: images of several box sizes: {seen}"
        findings.append(Finding("note", "headers", message, "nothing: they are brought to one extent"))
    if kinds and not any(finding.level in ("error", "warning") for finding in findings):
        findings.append(Finding("ok", "headers", f"{found.table.path}: {seen}; none cut short"))
    return findings


def _judge_shape(stack: MrcStack) -> Iterator[Finding]:
    n = stack.n_rows
    if stack.n_columns != n:
        rule, fix = f"images of {stack.n_columns} x {n} pixels, which are not square", "crop them square"
    elif n % 2:
        rule, fix = f"odd box of {n} pixels; an even box is needed", "crop or pad by a pixel"
    elif n < SMALLEST_BOX:
        rule, fix = f"box of {n} pixels; at least {SMALLEST_BOX} are needed", "extract with a larger box"
    else:
        return
    yield Finding("error", "headers", f"{stack.path}: {rule}", fix)


def _judge_length(found: FoundStacks, number: int, stack: MrcStack, level_of_unusable: Level) -> Iterator[Finding]:
    if stack.n_whole < stack.n_images:
        places = found.places_of_stacks[number]
        lost = places[found.in_file[places] & (found.table.images.index[places] >= stack.n_whole)]
        words, rows = at_rows(found.table, lost) if len(lost) else ("no row", ())
        message = (
            f"{stack.path}: cut short: {stack.n_whole:,} of the {stack.n_images:,} images announced are there; "
            f"lost: {words}"
        )
        yield Finding(level_of_unusable if len(lost) else "warning", "headers", message, "copy it again", rows)
    image = stack.n_rows * stack.n_columns * stack.dtype.itemsize
    surplus = stack.path.stat().st_size - stack.data_offset_in_bytes - stack.n_images * image
    if surplus > 0:
        whole = f", the size of {said(surplus // image, 'more image')}" if surplus % image == 0 else ""
        message = f"{stack.path}: {surplus:,} bytes beyond the {said(stack.n_images, 'image')} announced{whole}"
        yield Finding(
            "warning", "headers", message, "see whether what wrote it came to its end; those bytes are not read"
        )


def _judge_header_pixel_sizes(found: FoundStacks) -> Iterator[Finding]:
    """Pixel sizes of headers against those of the table; headers are often wrong, and are not used."""
    different: list[str] = []
    n_unset = 0
    for stack, places in zip(found.stacks, found.places_of_stacks, strict=True):
        if stack is None:
            continue
        size = stack.pixel_size_in_angstroms
        wanted = float(found.table.pixel_size_in_angstroms[places[0]])
        if size <= 0 or size == 1.0:
            n_unset += 1
        elif abs(size - wanted) > _SAME_PIXEL_SIZE * wanted:
            different.append(f"{stack.path} {size:.4g} Å where the table has {wanted:.4g} Å")
    if different:
        more = f" and {len(different) - _NAMED:,} more" if len(different) > _NAMED else ""
        message = f"{found.table.path}: pixel sizes in headers differ: {'; '.join(different[:_NAMED])}{more}"
        yield Finding("note", "headers", message, "nothing, if the table is right: it is the one that is used")
    if n_unset:
        message = f"{found.table.path}: {said(n_unset, 'header')} without a pixel size; that of the table is used"
        yield Finding("note", "headers", message)


# ------------------------------------------------------------------------------ rows


def judge_references(found: FoundStacks) -> list[Finding]:
    """Image numbers beyond the end of their stack, and images that several particles share."""
    table = found.table
    findings = []
    for stack, places in zip(found.stacks, found.places_of_stacks, strict=True):
        beyond = places[~found.in_file[places]]
        if stack is not None and len(beyond):
            words, rows = at_rows(table, beyond)
            last = int(table.images.index[beyond].max()) + 1
            message = f"{table.path}: {words}: images up to {last} of {stack.path}, which has {stack.n_images}"
            fix = "give the stack that belongs to this file; these two do not belong together"
            findings.append(Finding("error", "rows", message, fix, rows))
    shared, example = _shared_images(found)
    if len(shared):
        message = (
            f"{table.path}: {said(len(shared), 'row')} share an image with another row, such as "
            f"{at_rows(table, example)[0]}; half maps that share images agree too well"
        )
        findings.append(Finding("warning", "rows", message, "keep one row of each image", at_rows(table, shared)[1]))
    if not findings:
        findings = [Finding("ok", "rows", f"{table.path}: {said(len(table), 'row')}, no image twice")]
    return findings


def _shared_images(found: FoundStacks) -> tuple[Rows, Rows]:
    """Places of all particles that share an image with another, and those that share the first such image."""
    _, image, counts = np.unique(found.identities, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(counts[image] > 1)
    return shared, shared[image[shared] == image[shared[0]]] if len(shared) else shared
