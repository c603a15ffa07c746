"""The box that all images of a set are brought to, where their optics groups differ."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cryoai.limits import LARGEST_DEFAULT_BOX, SMALLEST_BOX

__all__ = ["commonest_image", "default_working_box"]

# Of two pixels: extents that differ by less are the same.
_ROUNDING = 0.05


def commonest_image(pixel_sizes: NDArray[np.float64], sizes: NDArray[np.int64]) -> tuple[float, int]:
    """Pixel size in Å and side in pixels of the images of most of the particles (N,)."""
    kinds, counts = np.unique(np.stack([pixel_sizes, sizes], axis=1), axis=0, return_counts=True)
    pixel_size, size = kinds[counts.argmax()]
    return float(pixel_size), int(size)


def default_working_box(pixel_sizes: NDArray[np.float64], sizes: NDArray[np.int64]) -> int:
    """The largest even box, within limits, whose frequencies all images have, at the extent of the commonest ones."""
    pixel_size, size = commonest_image(pixel_sizes, sizes)
    fewest_pixels = pixel_size * size / float(pixel_sizes.max())
    return max(SMALLEST_BOX, min(LARGEST_DEFAULT_BOX, 2 * int((fewest_pixels + _ROUNDING) / 2)))
