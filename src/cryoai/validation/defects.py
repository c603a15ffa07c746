"""The shapes that failed reconstructions have, told from those of molecules.

The limits lie between what 30 maps of molecules and of made-up complexes show at 11 to 30 Å, and what goes wrong: see
docs/validation.md. A map without any of these defects need not be right.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from scipy import ndimage
from torch import Tensor

from cryoai.fourier import (
    fourier_shell_correlation,
    n_shells_above,
    shell_mean,
    shell_sum,
    shells_of_volume,
    transform_map,
)
from cryoai.reconstruction import particle_mask
from cryoai.validation.masks import solvent_level
from cryoai.validation.shells import low_passed, scaled_shells

__all__ = ["MapDefect", "MapDefects", "map_defects"]

_FINEST_IN_ANGSTROMS, _FINEST_IN_PIXELS = 15.0, 3.0
_OF_THE_RESOLUTION = 1.5
_COARSEST_OF_THE_BOX = 0.25
_RIM = (0.44, 0.48)
_AT_THE_RIM_OF_THE_TOP = 0.15
_PART_OF_THE_TOP = 0.25
_CLEAR_OF_NOISE = 4.0
_RESOLVED = 0.143
_FIRST_SHELL = 4

_CUT = 0.03
_SCATTERED = 0.5
_FEATURELESS = 0.97
_HOLLOW, _ROUND = 0.85, 0.6
_STREAKY = 0.35


class MapDefect(Enum):
    """What is wrong with the shape of a map, in words."""

    BOX_TOO_SMALL = "the molecule reaches the edge of the box"
    NEGATIVE_CONTRAST = "the molecule is darker than the solvent"
    HOLLOW_SHELL = "a hollow shell: density in a round rim, and none inside"
    FEATURELESS_BALL = "a featureless ball"
    SCATTERED = "separate spots instead of one molecule"
    STREAKS = "streaks: the map is made of few directions"


@dataclass(frozen=True)
class MapDefects:
    """What the shape of a map shows, measured after smoothing to the resolution or beyond; the solvent is zero.

    Attributes
    ----------
    contrast_asymmetry
        ``sum d^3 / sum |d|^3`` of the density: near 1 where the molecule is brighter than the solvent, near -1 where
        it is darker. The others are measured with the sign that this gives.
    rim_share
        The share of a sphere just inside the box where the density is more than 15 % of the highest, and four standard
        deviations of the noise.
    largest_part_share
        Of the density above a quarter of the highest, and above as much noise, the share in the largest connected part.
    spherical_share
        The share of the variance that the average over all rotations about the centre of mass explains.
    hollowness
        How much less density there is within half of the radius at which the average over rotations is highest,
        relative to that maximum: 1 for an empty shell, 0 for a solid body.
    participation
        ``<|F|^2>^2 / <|F|^4>`` within a shell, averaged from shell 4 to the resolution: one half for the random
        coefficients of a molecule, and in proportion less if few of them hold the power. One half too if there is no
        such shell.
    """

    contrast_asymmetry: float
    rim_share: float
    largest_part_share: float
    spherical_share: float
    hollowness: float
    participation: float

    @property
    def found(self) -> tuple[MapDefect, ...]:
        """The defects that the numbers amount to."""
        at_the_edge = self.rim_share > _CUT
        featureless = self.spherical_share > _FEATURELESS
        hollow = self.hollowness > _HOLLOW and self.spherical_share > _ROUND
        tests = {
            MapDefect.BOX_TOO_SMALL: at_the_edge,
            # Where there is little solvent, it is taken for the molecule.
            MapDefect.NEGATIVE_CONTRAST: self.contrast_asymmetry < 0 and not at_the_edge,
            MapDefect.HOLLOW_SHELL: hollow,
            MapDefect.FEATURELESS_BALL: featureless and not hollow,
            MapDefect.SCATTERED: self.largest_part_share < _SCATTERED,
            # The coefficients of a smooth ball, too, are few.
            MapDefect.STREAKS: self.participation < _STREAKY and not featureless,
        }
        return tuple(defect for defect, is_there in tests.items() if is_there)


def map_defects(
    first: Tensor, second: Tensor, pixel_size_in_angstroms: float, resolution_in_angstroms: float
) -> MapDefects:
    """Measure the shape that two half maps (n, n, n) show together; where there is but one map, give it twice.

    Their average is weighted by ``2 FSC / (1 + FSC)``, up to where that is first below 0.143. The measures see it
    smoothed to 15 Å, 3 pixels or 1.5 times the resolution, whichever is coarsest, ``spherical_share`` to the resolution
    itself; nothing is smoothed to more than a quarter of the box. Half the difference of the maps, filtered alike, says
    how large the noise is.

    Raises
    ------
    ValueError
        If the maps differ in shape or are not cubes.

    Examples
    --------
    >>> x = torch.arange(32) - 16.0
    >>> radius = (x[:, None, None] ** 2 + x[:, None] ** 2 + x**2).sqrt()
    >>> ball = torch.exp(-(radius**2) / 32)
    >>> [defect.name for defect in map_defects(ball, ball, 5.0, 15.0).found]
    ['FEATURELESS_BALL']
    """
    n = first.shape[-1]
    coarsest = _COARSEST_OF_THE_BOX * n * pixel_size_in_angstroms
    finest = max(_FINEST_IN_ANGSTROMS, _FINEST_IN_PIXELS * pixel_size_in_angstroms)
    inside = _radius(n, torch.zeros(3, device=first.device)) < n / 2
    weights, n_resolved = _weights_of_signal(first, second)

    def smoothed(density: Tensor, period: float) -> Tensor:
        smooth = low_passed(density, min(period, coarsest), pixel_size_in_angstroms)
        return torch.where(inside, smooth - solvent_level(smooth[inside]), 0)

    average, difference = (scaled_shells(m, weights) for m in ((first + second) / 2, (first - second) / 2))
    shape_period = max(finest, _OF_THE_RESOLUTION * resolution_in_angstroms)
    shape = smoothed(average, shape_period)
    noise = _CLEAR_OF_NOISE * smoothed(difference, shape_period)[inside].std()
    asymmetry = float(shape.pow(3).sum() / shape.abs().pow(3).sum().clamp_min(torch.finfo(shape.dtype).tiny))
    sign = -1 if asymmetry < 0 else 1
    shape, detail = sign * shape, sign * smoothed(average, resolution_in_angstroms)
    centre = _centre_of_mass(shape)
    resolved = min(n_resolved, int(n * pixel_size_in_angstroms / resolution_in_angstroms + 1e-6))
    return MapDefects(
        contrast_asymmetry=asymmetry,
        rim_share=_rim_share(shape, noise),
        largest_part_share=_largest_part_share(shape, noise),
        spherical_share=_spherical_share(detail, centre),
        hollowness=_hollowness(shape, centre),
        participation=_participation(average, resolved),
    )


def _weights_of_signal(first: Tensor, second: Tensor) -> tuple[Tensor, int]:
    """The Wiener filter (n // 2 + 1,) of the average of two half maps, and how many shells it leaves."""
    mask = particle_mask(first.shape[-1], device=first.device)
    fsc = fourier_shell_correlation(first * mask, second * mask).to(first)
    n_resolved = n_shells_above(fsc, _RESOLVED)
    weights = 2 * fsc / (1 + fsc)
    weights[n_resolved + 1 :] = 0
    # The sign of the mean of a map says nothing.
    weights[0] = 1
    return weights, n_resolved


def _radius(n_pixels: int, centre: Tensor) -> Tensor:
    """Distance (n, n, n) from a point (3,), (z, y, x) relative to the middle of the box, in pixels."""
    z, y, x = (torch.arange(n_pixels, device=centre.device) - n_pixels // 2 - c for c in centre)
    return (z[:, None, None] ** 2 + y[:, None] ** 2 + x**2).sqrt()


def _centre_of_mass(density: Tensor) -> Tensor:
    """Of the positive density, in pixels (z, y, x) from the middle of the box."""
    mass = density.clamp_min(0)
    j = torch.arange(density.shape[-1], device=density.device, dtype=density.dtype) - density.shape[-1] // 2
    moments = torch.stack([(mass.sum(axes) * j).sum() for axes in ((1, 2), (0, 2), (0, 1))])
    return moments / mass.sum().clamp_min(torch.finfo(density.dtype).tiny)


def _rim_share(density: Tensor, noise: Tensor) -> float:
    n = density.shape[-1]
    radius = _radius(n, torch.zeros(3, device=density.device))
    rim = density[(radius > _RIM[0] * n) & (radius < _RIM[1] * n)].abs()
    limit = torch.maximum(_AT_THE_RIM_OF_THE_TOP * density.abs().max(), noise)
    return float((rim > limit).double().mean())


def _largest_part_share(density: Tensor, noise: Tensor) -> float:
    limit = torch.maximum(_PART_OF_THE_TOP * density.max(), noise)
    # Connected parts are scipy's, which works on the host.
    values = density.cpu().numpy()
    labels, n_parts = ndimage.label((density > limit).cpu().numpy())
    masses = ndimage.sum_labels(values, labels, range(1, n_parts + 1))
    return float(masses.max() / masses.sum()) if n_parts else 1.0


def _profile(density: Tensor, weights: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shell (n, n, n) of each voxel about a centre, and mean (S,) and weight (S,) of the shells."""
    shells = (_radius(density.shape[-1], centre) + 0.5).floor().long()
    n_shells = int(shells.max()) + 1
    flat = shells.flatten()
    weight = shell_sum(weights.flatten(), flat, n_shells)
    mean = shell_sum((weights * density).flatten(), flat, n_shells) / weight.clamp_min(1e-6)
    return shells, mean, weight


def _spherical_share(density: Tensor, centre: Tensor) -> float:
    weights = particle_mask(density.shape[-1], device=density.device)
    _, mean, weight = _profile(density, weights, centre)
    overall = (weight * mean).sum() / weight.sum()
    variance = (weights * (density - overall).square()).sum()
    return float((weight * (mean - overall).square()).sum() / variance.clamp_min(torch.finfo(variance.dtype).tiny))


def _hollowness(density: Tensor, centre: Tensor) -> float:
    shells, mean, _ = _profile(density, torch.ones_like(density), centre)
    # Far from the centre a shell is the corner of a box.
    peak = int(mean[: density.shape[-1] // 2].argmax())
    inner = density[shells <= max(1, peak // 2)].mean()
    return float(1 - inner / mean[peak]) if mean[peak] > 0 else 0.0


def _participation(density: Tensor, n_resolved: int) -> float:
    n = density.shape[-1]
    shells, weights = shells_of_volume(n, device=density.device)
    inside = weights > 0
    power = transform_map(density.double())[inside].abs().square()
    mean, mean_square = (shell_mean(p, shells[inside], n // 2 + 1) for p in (power, power.square()))
    used = slice(_FIRST_SHELL, min(n // 2, n_resolved + 1))
    shares = mean[used].square() / mean_square[used].clamp_min(torch.finfo(power.dtype).tiny)
    return float(shares.mean()) if len(shares) else 0.5
