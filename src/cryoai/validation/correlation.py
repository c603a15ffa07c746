"""The Fourier shell correlation of two half maps, and what of it is the mask's doing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.fourier import fourier_shell_correlation, invert_transform, n_shells_above, shells_of_volume, transform_map
from cryoai.validation.shells import period_in_angstroms

__all__ = ["CorrelationCurve", "HalfMapCorrelation", "correlate_half_maps"]

_RANDOMISE_BELOW = 0.8
# Beside the first shell of random phases the mask carries the true ones over.
_SHELLS_SPARED = 2


@dataclass(frozen=True, eq=False)
class CorrelationCurve:
    """A correlation by shell, and where it first falls below the two customary thresholds.

    Attributes
    ----------
    values : (n // 2 + 1,)
        For shells 0 to ``n // 2``.
    resolution_at_0143_in_angstroms, resolution_at_half_in_angstroms
        Period of the last shell before; infinite if that is none, twice the pixel size if it never falls.
    """

    values: Tensor
    resolution_at_0143_in_angstroms: float
    resolution_at_half_in_angstroms: float


@dataclass(frozen=True, eq=False)
class HalfMapCorrelation:
    """The correlation of two half maps, with and without a mask.

    Attributes
    ----------
    unmasked, masked
        Of the maps as they are, and times the mask.
    randomised
        Of the maps times the mask after their phases were made random, from shell ``randomised_from`` on and in each
        on its own: what the mask alone makes of nothing.
    corrected
        ``(masked - randomised) / (1 - randomised)`` from two shells above that on, and below ``masked`` (Chen et al.,
        Ultramicroscopy 2013, as RELION has it).
    randomised_from
        The first shell whose unmasked correlation is below 0.8; ``n // 2 + 1``, and no phase random, if there is none.
    """

    unmasked: CorrelationCurve
    masked: CorrelationCurve
    randomised: CorrelationCurve
    corrected: CorrelationCurve
    randomised_from: int


def correlate_half_maps(
    first: Tensor, second: Tensor, mask: Tensor, pixel_size_in_angstroms: float, seed: int
) -> HalfMapCorrelation:
    """Compare two half maps (n, n, n), unmasked as reconstruction left them, inside a soft mask (n, n, n).

    ``seed`` decides the random phases: one seed gives one result, the same on every device up to rounding.

    Raises
    ------
    ValueError
        If the maps and the mask differ in shape or are not cubes.

    Examples
    --------
    >>> density, noise = torch.randn(2, 16, 16, 16)
    >>> whole = torch.ones(16, 16, 16)
    >>> found = correlate_half_maps(density, density + 3 * noise, whole, pixel_size_in_angstroms=2.0, seed=0)
    >>> bool((found.masked.values == found.unmasked.values).all())
    True
    """
    if mask.shape != first.shape:
        raise ValueError(f"a mask must be as large as its maps, got {tuple(mask.shape)} for {tuple(first.shape)}")
    unmasked = fourier_shell_correlation(first, second)
    masked = fourier_shell_correlation(first * mask, second * mask)
    start = 1 + n_shells_above(unmasked, _RANDOMISE_BELOW)
    generator = torch.Generator().manual_seed(seed)
    blurred = [_with_random_phases(density, start, generator) * mask for density in (first, second)]
    randomised = fourier_shell_correlation(*blurred)
    corrected = masked.clone()
    beyond = slice(start + _SHELLS_SPARED, None)
    corrected[beyond] = (masked[beyond] - randomised[beyond]) / (1 - randomised[beyond])

    extent_in_angstroms = first.shape[-1] * pixel_size_in_angstroms

    def curve(values: Tensor) -> CorrelationCurve:
        return CorrelationCurve(
            values, *(period_in_angstroms(values, limit, extent_in_angstroms) for limit in (0.143, 0.5))
        )

    return HalfMapCorrelation(curve(unmasked), curve(masked), curve(randomised), curve(corrected), start)


def _with_random_phases(density: Tensor, start: int, generator: torch.Generator) -> Tensor:
    """The map (n, n, n) with its amplitudes, and from shell ``start`` on the phases of white noise."""
    n = density.shape[-1]
    shells, _ = shells_of_volume(n, device=density.device)
    spectrum = transform_map(density.double())
    # The transform of real noise has uniform phases, and the symmetry that a real map needs.
    noise = transform_map(torch.randn(density.shape, generator=generator, dtype=torch.float64).to(density.device))
    beyond = (shells >= start) & (start <= n // 2)
    return invert_transform(torch.where(beyond, spectrum.abs() * torch.sgn(noise), spectrum), n)
