"""Maps filtered by shell, and the period at which a curve over shells falls: what the judgements share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryoai.fourier import invert_transform, n_shells_above, shells_of_volume, transform_map

__all__ = ["check_one_size", "low_passed", "period_in_angstroms", "scaled_shells"]


def check_one_size(first: Tensor, second: Tensor, mask: Tensor) -> None:
    """See that two half maps and a mask are of one shape.

    Raises
    ------
    ValueError
        If they are not.
    """
    if not first.shape == second.shape == mask.shape:
        shapes = ", ".join(str(tuple(array.shape)) for array in (first, second, mask))
        raise ValueError(f"half maps and mask must be of one size, got {shapes}")


def scaled_shells(density: Tensor, factors: Tensor) -> Tensor:
    """Map (n, n, n) with every shell multiplied by its factor (n // 2 + 1,); empty beyond the Nyquist sphere."""
    n = density.shape[-1]
    shells, weights = shells_of_volume(n, device=density.device)
    by_value = torch.where(weights > 0, factors.to(density)[shells.clamp(max=n // 2)], 0.0)
    return invert_transform(transform_map(density) * by_value, n)


def low_passed(density: Tensor, resolution_in_angstroms: float, pixel_size_in_angstroms: float) -> Tensor:
    """Map (n, n, n) under a Gaussian that is one half at the resolution: nothing rings.

    Examples
    --------
    >>> density = torch.zeros(32, 32, 32)
    >>> density[16, 16, 16] = 1
    >>> smooth = low_passed(density, resolution_in_angstroms=20.0, pixel_size_in_angstroms=2.0)
    >>> bool(smooth.min() > -1e-6), bool((smooth.sum() - 1).abs() < 1e-5)
    (True, True)
    """
    n = density.shape[-1]
    j = torch.arange(n, device=density.device) - n // 2
    x = torch.arange(n // 2 + 1, device=density.device)
    squared = j[:, None, None] ** 2 + j[:, None] ** 2 + x**2
    # Of each frequency itself: steps from shell to shell would ring.
    rate = math.log(2) * (resolution_in_angstroms / (n * pixel_size_in_angstroms)) ** 2
    return invert_transform(transform_map(density) * torch.exp(-rate * squared), n)


def period_in_angstroms(correlation: Tensor, threshold: float, extent_in_angstroms: float) -> float:
    """Period of the last shell before a correlation (n // 2 + 1,) first falls below the threshold.

    Infinite if that is no shell; of the last shell if the correlation never falls.

    Examples
    --------
    >>> period_in_angstroms(torch.tensor([1.0, 0.9, 0.8, 0.3, 0.6]), 0.5, extent_in_angstroms=16.0)
    8.0
    """
    last = n_shells_above(correlation, threshold)
    return extent_in_angstroms / last if last else math.inf
