"""The fall of amplitudes with resolution, and a map with it undone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.fourier import shell_mean, shells_of_volume, transform_map
from cryoai.validation.shells import scaled_shells

__all__ = ["SharpenedMap", "guinier_b_factor", "sharpened_map"]

# At lower resolution the amplitudes are those of the shape of the molecule, not of its atoms.
_FIRST_PERIOD_IN_ANGSTROMS = 10.0
_WORST_IN_ANGSTROMS = 8.0
_FEWEST_SHELLS = 5
_LEAST_CORRELATION = 1e-4
_EDGE_IN_SHELLS = 2


@dataclass(frozen=True, eq=False)
class SharpenedMap:
    """A map (n, n, n) for the eye, and the B factor that was taken off it: None if it was not sharpened."""

    density: Tensor
    b_factor_in_square_angstroms: float | None


def guinier_b_factor(
    density: Tensor, fsc: Tensor, pixel_size_in_angstroms: float, resolution_in_angstroms: float
) -> float | None:
    """B factor in Å² with which amplitudes fall as ``exp(-B k^2 / 4)``, from a straight line in the Guinier plot.

    The logarithm of the mean amplitude of each shell of the map (n, n, n), weighted by ``sqrt(2 FSC / (1 + FSC))``,
    is fitted against ``k^2`` from 10 Å to the resolution (Rosenthal & Henderson, J. Mol. Biol. 2003; RELION reports
    ``-B``). Mask the map as for the correlation ``fsc`` (n // 2 + 1,) that is given.

    Only beyond 10 Å do the atoms of a protein scatter as if placed at random, which is what makes the plot a line.
    Where the resolution is worse than 8 Å, or fewer than 5 shells remain, there is nothing to fit: None.
    """
    n = density.shape[-1]
    extent = n * pixel_size_in_angstroms
    first, last = math.ceil(extent / _FIRST_PERIOD_IN_ANGSTROMS), _last_shell(n, extent, resolution_in_angstroms)
    weights = _signal_weights(fsc)
    last = min(last, int((weights > 0).sum()) - 1)
    if resolution_in_angstroms > _WORST_IN_ANGSTROMS or last - first + 1 < _FEWEST_SHELLS:
        return None
    shells, friedel = shells_of_volume(n, device=density.device)
    inside = friedel > 0
    amplitudes = shell_mean(transform_map(density.double())[inside].abs(), shells[inside], n // 2 + 1)
    k_squared = (torch.arange(first, last + 1, device=density.device).double() / extent) ** 2
    logarithms = (amplitudes * weights)[first : last + 1].log()
    k_squared = k_squared - k_squared.mean()
    return -4 * float((k_squared * logarithms).sum() / k_squared.square().sum())


def sharpened_map(
    first: Tensor,
    second: Tensor,
    mask: Tensor,
    fsc: Tensor,
    pixel_size_in_angstroms: float,
    resolution_in_angstroms: float,
) -> SharpenedMap:
    """The average of two half maps (n, n, n), weighted by their correlation, sharpened, and cut at the resolution.

    Every shell is multiplied by ``sqrt(2 FSC / (1 + FSC))``, the correlation of the average with a perfect map, and by
    ``exp(B k^2 / 4)``, with ``B`` fitted inside the mask (n, n, n); a cosine two shells wide ends it at the resolution.
    Where :func:`guinier_b_factor` finds nothing to fit, the map is weighted and cut and not sharpened. It is not
    masked. ``fsc`` (n // 2 + 1,) is the corrected correlation inside the mask.

    Examples
    --------
    >>> density = torch.randn(32, 32, 32)
    >>> whole, one = torch.ones(32, 32, 32), torch.ones(17)
    >>> sharpened_map(density, density, whole, one, 5.0, 12.0).b_factor_in_square_angstroms is None
    True
    """
    n = first.shape[-1]
    average = (first + second) / 2
    b_factor = guinier_b_factor(average * mask, fsc, pixel_size_in_angstroms, resolution_in_angstroms)
    shells = torch.arange(n // 2 + 1, device=first.device)
    extent = n * pixel_size_in_angstroms
    ramp = ((shells - _last_shell(n, extent, resolution_in_angstroms)) / _EDGE_IN_SHELLS).clamp(0, 1)
    low_pass = 0.5 + 0.5 * torch.cos(math.pi * ramp)
    sharpening = torch.exp((b_factor or 0.0) / 4 * (shells / extent) ** 2)
    return SharpenedMap(scaled_shells(average, _signal_weights(fsc) * low_pass * sharpening), b_factor)


def _last_shell(n_pixels: int, extent_in_angstroms: float, resolution_in_angstroms: float) -> int:
    return min(n_pixels // 2, int(extent_in_angstroms / resolution_in_angstroms + 1e-6))


def _signal_weights(fsc: Tensor) -> Tensor:
    """Weight (n // 2 + 1,) of each shell: the correlation of the average with a perfect map, until it is first zero."""
    weights = (2 * fsc.clamp(0, 1) / (1 + fsc.clamp(0, 1))).sqrt()
    # The sign of the mean of a map, in shell 0, says nothing.
    alive = (fsc >= _LEAST_CORRELATION) | (torch.arange(len(fsc), device=fsc.device) == 0)
    return weights * alive.cummin(0).values
