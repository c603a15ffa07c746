"""What the images hold: read once, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryoai.checks.files import FoundStacks
from cryoai.checks.findings import Finding, Level, Rows, at_rows, said
from cryoai.formats.mrc import MrcStack
from cryoai.formats.table import FloatColumn
from cryoai.limits import BACKGROUND_RADIUS

__all__ = ["ImageStatistics", "judge_images", "read_images", "sampled_rows"]

_BYTES_OF_A_CHUNK = 1 << 25
# As in the normalisation: outside this fraction of half the box an image is taken to show no particle.
# Of the deviation of an image: a region that varies less holds no noise.
_FLAT = 1e-3
_OUTLYING = 8.0
_OVERWHELMING = 100.0
_FEWEST_TO_COMPARE = 10
# Of the deviation of an image: smaller differences are of no interest, however exactly the others agree.
_WORTH_MENTIONING = 0.2
_NAMED = 3


@dataclass(frozen=True, eq=False)
class ImageStatistics:
    """Of the images that were read, in the order of the table.

    Attributes
    ----------
    places : (M,)
        Places of the particles in the table.
    mean, deviation : (M,)
        Of all pixels; NaN where a pixel is not finite.
    background_deviation, corner_deviation : (M,)
        Of the pixels outside 0.9 of the inscribed circle, and outside that circle.
    digests : (M,) bytes
        Of the pixels as they are in the file.
    """

    places: Rows
    mean: FloatColumn
    deviation: FloatColumn
    background_deviation: FloatColumn
    corner_deviation: FloatColumn
    digests: NDArray[np.bytes_]

    @property
    def finite(self) -> NDArray[np.bool_]:
        return np.isfinite(self.deviation)

    @property
    def constant(self) -> NDArray[np.bool_]:
        return self.deviation == 0

    @property
    def no_background(self) -> NDArray[np.bool_]:
        """Whether nothing but the background is constant."""
        return self.finite & (self.background_deviation == 0) & ~self.constant

    @cached_property
    def outlying(self) -> NDArray[np.bool_]:
        """Whether the mean or deviation of a usable image is far from those of the others."""
        usable = self.usable
        result = np.zeros(len(usable), dtype=bool)
        if usable.sum() < _FEWEST_TO_COMPARE:
            return result
        scale = float(np.median(self.deviation[usable]))
        for values in (self.mean, self.deviation):
            distance = np.abs(values - np.median(values[usable]))
            # Of a normal distribution the median deviation is 0.6745 standard deviations.
            robust = float(np.median(distance[usable])) / 0.6745
            result |= usable & (distance > max(_OUTLYING * robust, _WORTH_MENTIONING * scale))
        return result

    @property
    def masked(self) -> NDArray[np.bool_]:
        """Whether the corners hold no noise, or the whole background next to none."""
        outside = np.minimum(self.corner_deviation, self.background_deviation)
        return self.usable & ~self.outlying & (outside < _FLAT * self.deviation)

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Whether a run can normalise an image."""
        return self.finite & (self.background_deviation > 0)


def sampled_rows(readable: NDArray[np.bool_], at_most: int | None) -> Rows:
    """Places of particles to read, evenly spread over those that can be read."""
    rows = np.flatnonzero(readable)
    if at_most is None or len(rows) <= at_most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, at_most).round().astype(np.int64)]


def read_images(
    found: FoundStacks, places: Rows, progress: Callable[[int, int], object] = lambda _done, _total: None
) -> ImageStatistics:
    """Look at the images of the particles ``places`` (M,), all readable; stack by stack, each once.

    ``progress`` is called with the number of images done and of all.
    """
    references = found.table.images
    order = np.lexsort((references.index[places], references.stack[places]))
    numbers = np.empty((len(places), 4))
    digests = np.empty(len(places), dtype="S16")
    n_done = 0
    ends = np.flatnonzero(np.diff(references.stack[places][order])) + 1
    for members in np.split(order, ends) if len(places) else []:
        stack = found.stacks[references.stack[places[members[0]]]]
        assert stack is not None
        pixels = stack.map_images()
        in_chunk = max(1, _BYTES_OF_A_CHUNK // (4 * stack.n_rows**2))
        for start in range(0, len(members), in_chunk):
            chunk = members[start : start + in_chunk]
            raw = np.asarray(pixels[references.index[places[chunk]]])
            digests[chunk] = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in raw]
            numbers[chunk] = _statistics(torch.from_numpy(raw.astype(np.float32)))
            n_done += len(chunk)
            progress(n_done, len(places))
    mean, deviation, background, corners = numbers.T
    return ImageStatistics(places, mean, deviation, background, corners, digests)


def _statistics(images: Tensor) -> NDArray[np.float64]:
    """Mean and deviation (B,) of images (B, n, n), and the deviation of their background and corners, as columns."""
    n = images.shape[-1]
    offset = torch.arange(n) - n // 2
    squared = offset[:, None] ** 2 + offset**2
    deviation, mean = torch.std_mean(images.flatten(1), dim=1, correction=0)
    regions = [squared > (fraction * n / 2) ** 2 for fraction in (BACKGROUND_RADIUS, 1.0)]
    outside = [_deviation(images[:, region]) for region in regions]
    # Rounding leaves some deviation to a large constant.
    constant = images.flatten(1).amin(1) == images.flatten(1).amax(1)
    deviation = torch.where(constant, 0.0, deviation)
    return torch.stack([mean, deviation, *outside], dim=1).double().numpy()


def _deviation(pixels: Tensor) -> Tensor:
    constant = pixels.amin(1) == pixels.amax(1)
    return torch.where(constant, 0.0, pixels.std(dim=1, correction=0))


def judge_images(found: FoundStacks, seen: ImageStatistics, level_of_unusable: Level) -> list[Finding]:
    """Images without use, masked, twice there, or unlike all others.

    ``level_of_unusable`` is that of images that a run cannot use.
    """
    findings = [
        *_judge_values(found, seen, level_of_unusable),
        *_judge_backgrounds(found, seen, level_of_unusable),
        *_judge_copies(found, seen),
        *_judge_outliers(found, seen),
    ]
    n, n_readable = len(seen.places), int(found.worth_reading.sum())
    read = f"{found.table.path}: {said(n, 'image')} read"
    if n < n_readable:
        read += f" of {n_readable:,}, evenly spread (--all reads every one)"
    if n and not any(finding.level in ("error", "warning") for finding in findings):
        findings.append(Finding("ok", "images", f"{read}: all finite, none constant or twice there"))
    elif n < n_readable:
        findings.append(Finding("note", "images", read))
    return findings


def _judge_values(found: FoundStacks, seen: ImageStatistics, level: Level) -> list[Finding]:
    """One finding for each image that is not finite or constant."""
    findings = []
    for bad, why in ((~seen.finite, "has values that are not finite"), (seen.constant, "is constant")):
        for place in seen.places[bad]:
            row = int(found.table.rows[place]) + 1
            message = f"{found.table.path}: the image of row {row}, {_name(found, int(place))}, {why}"
            findings.append(Finding(level, "images", message, _fix("remove the row", level), (row,)))
    return findings


def _judge_backgrounds(found: FoundStacks, seen: ImageStatistics, level: Level) -> list[Finding]:
    """Images that were masked, so that the noise around the particle is missing."""
    findings = []
    constant = np.flatnonzero(seen.no_background)
    if len(constant):
        words, rows = at_rows(found.table, seen.places[constant])
        message = (
            f"{found.table.path}: the background of {words} is constant: these images were masked or are free of "
            "noise, and images are normalised by their background"
        )
        findings.append(Finding(level, "images", message, _fix("extract again without a mask", level), rows))
    if seen.masked.any():
        words, rows = at_rows(found.table, seen.places[seen.masked])
        message = (
            f"{found.table.path}: the corners of {words} hold no noise: these images were masked with a circle, or "
            "are free of noise; the strength of their noise is misjudged"
        )
        findings.append(Finding("warning", "images", message, "extract again without a mask", rows))
    return findings


def _judge_copies(found: FoundStacks, seen: ImageStatistics) -> list[Finding]:
    """Images whose pixels are those of another one in another place."""
    table = found.table
    fine = np.flatnonzero(seen.finite & ~seen.constant)
    places = seen.places[fine]
    _, content = np.unique(seen.digests[fine], return_inverse=True)
    # Rows that name one image are another matter.
    different = np.unique(np.stack([content, found.identities[places]], axis=1), axis=0)
    copied = np.flatnonzero(np.bincount(different[:, 0], minlength=1)[content] > 1)
    if not len(copied):
        return []
    first = copied[content[copied] == content[copied[0]]]
    message = (
        f"{table.path}: {said(len(copied), 'image')} with the very pixels of another one, such as "
        f"{at_rows(table, places[first])[0]}; half maps that share images agree too well"
    )
    rows = at_rows(table, places[copied])[1]
    return [Finding("warning", "images", message, "keep one row of each image", rows)]


def _judge_outliers(found: FoundStacks, seen: ImageStatistics) -> Iterator[Finding]:
    scale = float(np.median(seen.deviation[seen.usable])) if seen.usable.any() else 0.0
    overwhelming = seen.outlying & (seen.deviation > _OVERWHELMING * scale)
    kinds: tuple[tuple[NDArray[np.bool_], Level, str], ...] = (
        (overwhelming, "warning", f"more than {_OVERWHELMING:g} times that of the others: they overwhelm these"),
        (seen.outlying & ~overwhelming, "note", "far from those of the others"),
    )
    for chosen, level, size in kinds:
        if chosen.any():
            words, rows = at_rows(found.table, seen.places[chosen])
            what = "the spread" if level == "warning" else "mean or spread"
            message = f"{found.table.path}: {what} of the pixels in {words} is {size}"
            fix = "look at them, and remove what is ice, carbon, damaged or normalised in another way"
            yield Finding(level, "images", message, fix, rows)


def _fix(action: str, level: Level) -> str:
    return action if level == "error" else f"{action}; a run sets it aside"


def _name(found: FoundStacks, place: int) -> str:
    references = found.table.images
    stack: MrcStack | None = found.stacks[references.stack[place]]
    assert stack is not None
    return f"{references.index[place] + 1}@{stack.path}"
