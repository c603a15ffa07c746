"""A soft mask around the molecule, from the two half maps alone."""

from __future__ import annotations

import math

import torch
from scipy import ndimage
from torch import Tensor

from cryoai.fourier import soft_sphere
from cryoai.reconstruction import particle_mask
from cryoai.validation.shells import low_passed

__all__ = ["automatic_mask", "solvent_level"]

_FINEST_IN_ANGSTROMS = 15.0
_OF_THE_RESOLUTION = 1.5
_SMOOTHINGS = (1.0, 4 / 3, 16 / 9, 64 / 27)
# A molecule is told from its surroundings if it is several resolution elements wide.
_COARSEST_OF_THE_BOX = 0.25
# The highest of ten thousand normal deviates is below 5.
_STANDS_OUT = 10.0
_EDGE_OF_THE_TOP, _EDGE_IN_DEVIATIONS = 0.1, 3.0
_PEAK_OF_THE_TOP, _PEAK_IN_DEVIATIONS = 0.2, 5.0
_LEAST_OF_THE_LARGEST = 0.02
_LEAST_MARGIN_IN_PIXELS, _LEAST_EDGE_IN_PIXELS = 1.0, 4.0
_RIM_IN_PIXELS = 4.0


def automatic_mask(
    first: Tensor, second: Tensor, pixel_size_in_angstroms: float, resolution_in_angstroms: float
) -> Tensor:
    """Soft mask (n, n, n) around the molecule that two half maps (n, n, n) show.

    1. The average and half the difference of the maps, which holds nothing but noise and as much of it, are smoothed
       to 15 Å or 1.5 times the resolution, whichever is coarser; further, in steps of a third, until the highest
       density stands out from the solvent by ten deviations. The solvent is the shortest interval that holds half of
       the voxels; its deviation is that of the density below it, or of the difference, whichever is larger.
    2. What is above 10 % of the highest density, and above three deviations, falls into connected parts. Those with
       less than 2 % of the mass of the largest, or without a clear peak, are left out.
    3. The parts grow by a quarter of the resolution (at least a pixel), and end in a cosine edge three quarters of the
       resolution wide (at least four pixels). Nothing reaches beyond the sphere that touches the box.

    Where nothing stands out, or the resolution is a sixth of the box or worse, it is
    :func:`~cryoai.reconstruction.particle_mask`.

    Raises
    ------
    ValueError
        If the maps differ in shape.

    Examples
    --------
    >>> molecule = torch.zeros(48, 48, 48)
    >>> molecule[18:30, 18:30, 20:28] = 1.0
    >>> mask = automatic_mask(molecule, molecule, pixel_size_in_angstroms=4.0, resolution_in_angstroms=10.0)
    >>> bool((mask[18:30, 18:30, 20:28] == 1).all()), bool(mask.sum() < 12 * molecule.sum())
    (True, True)
    """
    if first.shape != second.shape:
        raise ValueError(f"half maps must be of one size, got {tuple(first.shape)} and {tuple(second.shape)}")
    n = first.shape[-1]
    coarsest = _COARSEST_OF_THE_BOX * n * pixel_size_in_angstroms
    finest = max(_FINEST_IN_ANGSTROMS, _OF_THE_RESOLUTION * resolution_in_angstroms)
    within = soft_sphere(n, n / 2 - _RIM_IN_PIXELS, _RIM_IN_PIXELS, device=first.device)
    for smoothing in _SMOOTHINGS:
        if smoothing * finest > coarsest:
            break
        average, difference = (
            low_passed(density, smoothing * finest, pixel_size_in_angstroms)
            for density in ((first + second) / 2, (first - second) / 2)
        )
        average = torch.where(within > 0, average - solvent_level(average[within > 0]), 0)
        deviation = _deviation(average[within > 0], difference[within > 0])
        if average.max() > _STANDS_OUT * deviation:
            parts = _significant_parts(average, deviation)
            in_pixels = resolution_in_angstroms / pixel_size_in_angstroms
            return _softened(parts, in_pixels / 4, 0.75 * in_pixels).to(first) * within
    return particle_mask(n, device=first.device)


def solvent_level(values: Tensor) -> Tensor:
    """Density of the solvent, from voxels (m,) of which more than half show it.

    The mean of the shortest interval that holds half of the voxels (the shorth, Andrews et al. 1972): the molecule,
    which is on one side, does not pull it.

    Examples
    --------
    >>> solvent_level(torch.cat([torch.linspace(-1, 1, 60), torch.linspace(5, 9, 40)])).abs() < 0.2
    tensor(True)
    """
    ordered = values.sort().values
    half = len(ordered) // 2
    start = int((ordered[half:] - ordered[: len(ordered) - half]).argmin())
    return ordered[start : start + half + 1].mean()


def _deviation(average: Tensor, difference: Tensor) -> Tensor:
    """Standard deviation of the solvent, which is zero, of an average (m,), and at least that of the noise (m,)."""
    # Of a normal distribution the median distance from the mean is 0.6745 deviations. The molecule is above.
    below = average[average < 0]
    spread = -below.median() / 0.6745 if len(below) else difference.new_zeros(())
    return torch.maximum(spread, difference.std())


def _significant_parts(density: Tensor, deviation: Tensor) -> Tensor:
    """Which voxels (n, n, n) of a map above solvent belong to a part of the molecule."""
    top = density.max()
    edge = torch.maximum(_EDGE_OF_THE_TOP * top, _EDGE_IN_DEVIATIONS * deviation)
    peak = float(torch.maximum(_PEAK_OF_THE_TOP * top, _PEAK_IN_DEVIATIONS * deviation))
    # Connected parts, and distances below, are scipy's, which works on the host.
    labels, n_parts = ndimage.label((density > edge).cpu().numpy())
    values, parts = density.cpu().numpy(), range(1, n_parts + 1)
    masses, peaks = ndimage.sum_labels(values, labels, parts), ndimage.maximum(values, labels, parts)
    keep = torch.tensor(
        [False] + [m > _LEAST_OF_THE_LARGEST * masses.max() and p > peak for m, p in zip(masses, peaks, strict=True)]
    )
    return keep[torch.from_numpy(labels).long()]


def _softened(parts: Tensor, margin_in_pixels: float, edge_in_pixels: float) -> Tensor:
    """Mask (n, n, n): 1 up to a margin around the parts, then falling to 0 as a cosine."""
    distance = torch.from_numpy(ndimage.distance_transform_edt(~parts.numpy()))
    margin, edge = max(margin_in_pixels, _LEAST_MARGIN_IN_PIXELS), max(edge_in_pixels, _LEAST_EDGE_IN_PIXELS)
    return 0.5 + 0.5 * torch.cos(math.pi * ((distance - margin) / edge).clamp(0, 1))
