"""Which numbers of a file can be calculated with: those that single precision holds, and their products."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "SMALLEST", "is_number", "is_positive"]

LARGEST = 1e15
SMALLEST = 1e-15


def is_number(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Whether each value is finite and no larger than :data:`LARGEST`, of either sign."""
    return np.abs(values) <= LARGEST


def is_positive(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Whether each value is from :data:`SMALLEST` to :data:`LARGEST`."""
    return (values >= SMALLEST) & (values <= LARGEST)
