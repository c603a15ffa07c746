"""From where the particles were seen, and what a map lost because of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.fourier import n_shells_above, shell_sum, shells_of_volume, transform_map
from cryoai.validation.shells import check_one_size, period_in_angstroms

__all__ = ["ConicalCorrelation", "OrientationDistribution", "conical_correlation", "orientation_distribution"]

_CELLS = 500
_CAP = math.cos(math.radians(20))
_AROUND_A_PEAK = math.cos(math.radians(30))
_APART = math.cos(math.radians(40))
_DENSE_SHARE = 0.1
_PREFERRED, _COLLAPSED = 0.3, 0.05
_MOST_PEAKS = 4
_PEAK_RATIO, _PEAK_IN_DEVIATIONS = 2.0, 5.0
_CHUNK = 16384

_CONES = 128
_CONE = math.cos(math.radians(20))
_ANISOTROPIC = 0.5
_CLEAR, _FEWEST_CLEAR_SHELLS = 0.8, 6


@dataclass(frozen=True, eq=False)
class OrientationDistribution:
    """How viewing directions are spread over the sphere.

    A viewing direction is that of the beam in the frame of the particle, ``R (0, 0, 1)``; turns in the plane of the
    image do not matter.

    Attributes
    ----------
    n_particles
        How many views there were.
    cells : (500, 3)
        Directions (x, y, z) of the middles of cells of equal area, a Fibonacci spiral.
    counts : (500,)
        Particles nearest to each.
    effective_share
        The share of the sphere that the particles cover: ``1 / (500 sum p^2)`` with ``p`` the probability of a cell
        (Hill's number of order two), the sum estimated without bias from pairs of particles. 1 for a uniform
        distribution, whatever the number of particles.
    densest_tenth_share
        The share of the particles in the tenth of the directions where they are densest: 0.1 for a uniform
        distribution. The directions are chosen by one half of the particles, the others counted, and the other way
        round: nothing is gained from chance.
    peaks : (K, 3)
        At most four directions that are clearly preferred, the strongest first: within 20° there are more than twice
        as many particles as in a uniform distribution, and five standard deviations more than that.
    """

    n_particles: int
    cells: Tensor
    counts: Tensor
    effective_share: float
    densest_tenth_share: float
    peaks: Tensor

    @property
    def is_preferred(self) -> bool:
        """Whether more than 30 % of the particles are in a tenth of the directions."""
        return self.densest_tenth_share > _PREFERRED

    @property
    def is_collapsed(self) -> bool:
        """Whether less than a twentieth of the directions is in use: a failure of pose estimation, not a preference."""
        return self.effective_share < _COLLAPSED


def orientation_distribution(rotations: Tensor, operators: Tensor | None = None) -> OrientationDistribution:
    """Judge the rotations (N, 3, 3) of particles, which map image coordinates to the particle.

    Of symmetric molecules every view counts as often as there are ``operators`` (G, 3, 3), as all that they make of it.

    Raises
    ------
    ValueError
        If there are fewer than four particles.

    Examples
    --------
    >>> from cryoai.poses import rotation_grid
    >>> spread = orientation_distribution(rotation_grid(2000))
    >>> spread.is_preferred, spread.is_collapsed, round(spread.densest_tenth_share, 1), len(spread.peaks)
    (False, False, 0.1, 0)
    """
    n = len(rotations)
    if n < 4:
        raise ValueError(f"a distribution of orientations needs at least 4 particles, got {n}")
    cells = _fibonacci_sphere(_CELLS, rotations.device)
    operators = torch.eye(3)[None] if operators is None else operators
    # The mates of a particle are all in one half: they know of each other.
    views = rotations[:, :, 2].to(cells)
    halves = [_counts(views[start::2], operators.to(cells), cells) for start in (0, 1)]
    counts = halves[0] + halves[1]
    n *= len(operators)
    pairs = (counts.double() * (counts - 1)).sum() / (n * (n - 1))
    near = (cells @ cells.T > _CAP).double()
    densest = [
        float(other[(near @ half.double()).topk(round(_DENSE_SHARE * _CELLS)).indices].sum() / other.sum())
        for half, other in (halves, reversed(halves))
    ]
    return OrientationDistribution(
        n_particles=n,
        cells=cells,
        counts=counts,
        effective_share=min(1.0, 1 / (_CELLS * float(pairs))) if pairs > 0 else 1.0,
        densest_tenth_share=sum(densest) / 2,
        peaks=_peaks(cells, counts.double(), near),
    )


def _counts(views: Tensor, operators: Tensor, cells: Tensor) -> Tensor:
    """Of what the operators (G, 3, 3) make of the views (N, 3), how many (C,) are nearest to each cell (C, 3)."""
    counts = torch.zeros(len(cells), dtype=torch.long, device=cells.device)
    for part in views.split(max(1, _CHUNK // len(operators))):
        mates = torch.einsum("gij,nj->gni", operators, part).flatten(0, 1)
        counts += torch.bincount((mates @ cells.T).argmax(1), minlength=len(cells))
    return counts


def _fibonacci_sphere(n: int, device: torch.device, *, part: float = 1.0) -> Tensor:
    """Directions (n, 3) on a spiral of equal areas from the pole z = 1 down over a part of the sphere."""
    i = torch.arange(n, dtype=torch.float64, device=device)
    z = 1 - 2 * part * (i + 0.5) / n
    turn = i * (math.pi * (3 - math.sqrt(5)))
    in_plane = (1 - z**2).sqrt()
    return torch.stack([in_plane * turn.cos(), in_plane * turn.sin(), z], dim=1).float()


def _peaks(cells: Tensor, counts: Tensor, near: Tensor) -> Tensor:
    """The directions (K, 3) of clear maxima of the number of particles within a cap."""
    expected = near.sum(1) * counts.mean()
    least = _PEAK_RATIO * expected + _PEAK_IN_DEVIATIONS * expected.sqrt()
    within = near @ counts
    found: list[Tensor] = []
    for _ in range(_MOST_PEAKS):
        best = (within - least).argmax()
        if within[best] <= least[best]:
            break
        found.append(_middle(cells, counts.to(cells), cells[best]))
        within = torch.where(cells @ cells[best] > _APART, 0, within)
    return torch.stack(found) if found else cells.new_zeros((0, 3))


def _middle(cells: Tensor, counts: Tensor, start: Tensor) -> Tensor:
    """The mean direction (3,) of the particles around a direction, which moves there."""
    direction = start
    for _ in range(5):
        mean = (counts * (cells @ direction > _AROUND_A_PEAK)) @ cells
        direction = mean / mean.norm()
    return direction


# ------------------------------------------------------------------------------ the map


@dataclass(frozen=True, eq=False)
class ConicalCorrelation:
    """The correlation of two half maps within cones about many directions.

    Attributes
    ----------
    directions : (128, 3)
        Axes (x, y, z) of the cones, spread evenly over half of the sphere: the other half mirrors it.
    values : (128, n // 2 + 1)
        Fourier shell correlation of the coefficients within 20° of each.
    resolutions_in_angstroms : (128,)
        Where each first falls below 0.143.
    area_ratio
        The smallest area under a curve, over the largest: cryoSPARC's cFAR. 1 for a map alike in all directions, 0
        where nothing is known along one of them.
    n_clear_shells
        For how many shells the curves stay above 0.8 in the best tenth of the directions.
    """

    directions: Tensor
    values: Tensor
    resolutions_in_angstroms: Tensor
    area_ratio: float
    n_clear_shells: int

    @property
    def is_anisotropic(self) -> bool:
        """Whether the ratio is below 0.5, and not by chance.

        With fewer than six clear shells the few coefficients of a cone scatter so much that maps alike in all
        directions have ratios below 0.5 as well: then it cannot be told, and the answer is no.
        """
        return self.area_ratio < _ANISOTROPIC and self.n_clear_shells >= _FEWEST_CLEAR_SHELLS


def conical_correlation(
    first: Tensor, second: Tensor, mask: Tensor, pixel_size_in_angstroms: float
) -> ConicalCorrelation:
    """Compare half maps (n, n, n) inside a mask (n, n, n) direction by direction.

    The conical Fourier shell correlation of Diebolder et al. (J. Struct. Biol. 2015) and Tan et al. (Nature Methods
    2017), over cones of half-angle 20°. A cone that holds no coefficient of a shell, as happens in the first ones,
    takes the correlation of the whole shell.

    A mask smears the transform: within a tight one, missing directions are filled with what leaks from their
    neighbours, the same in both halves, and the ratio is too good. A soft sphere
    (:func:`~cryoai.reconstruction.particle_mask`) leaks least.

    Raises
    ------
    ValueError
        If the maps and the mask differ in shape.
    """
    check_one_size(first, second, mask)
    n = first.shape[-1]
    n_shells = n // 2 + 1
    shells, weights = shells_of_volume(n, device=first.device)
    inside = weights > 0
    shells, weights = shells[inside], weights[inside]
    a, b = (transform_map((density * mask).double())[inside] for density in (first, second))
    terms = weights * torch.stack([(a * b.conj()).real, a.abs().square(), b.abs().square(), torch.ones_like(weights)])
    units = _frequency_directions(n, inside)
    directions = _fibonacci_sphere(_CONES, first.device, part=0.5)

    def curve(chosen: Tensor) -> tuple[Tensor, Tensor]:
        cross, *powers, weight = shell_sum(terms[:, chosen], shells[chosen], n_shells)
        power = (powers[0] * powers[1]).sqrt()
        return cross / power.clamp_min(torch.finfo(power.dtype).tiny), weight > 0

    whole, _ = curve(torch.arange(len(shells), device=first.device))
    curves = []
    for direction in directions:
        values, has_members = curve(((units @ direction).abs() >= _CONE).nonzero().flatten())
        curves.append(torch.where(has_members, values, whole))
    values = torch.stack(curves)
    areas = values[:, 1:].mean(1)
    extent = n * pixel_size_in_angstroms
    resolutions = [period_in_angstroms(values_of_one, 0.143, extent) for values_of_one in curves]
    clear = sorted(n_shells_above(values_of_one, _CLEAR) for values_of_one in curves)
    return ConicalCorrelation(
        directions=directions,
        values=values,
        resolutions_in_angstroms=torch.tensor(resolutions, device=first.device),
        area_ratio=max(0.0, float(areas.min() / areas.max())) if areas.max() > 0 else 0.0,
        n_clear_shells=clear[round(0.9 * _CONES)],
    )


def _frequency_directions(n_pixels: int, inside: Tensor) -> Tensor:
    """Direction (P, 3), (x, y, z), of those values of a half transform that are inside; none at the origin."""
    j = torch.arange(n_pixels, device=inside.device) - n_pixels // 2
    x = torch.arange(n_pixels // 2 + 1, device=inside.device)
    zyx = torch.stack(torch.meshgrid(j, j, x, indexing="ij"), dim=-1)[inside].float()
    return zyx.flip(-1) / zyx.norm(dim=-1, keepdim=True).clamp_min(1)
