"""Where a map has symmetry axes: every direction of a hemisphere, for every fold.

Directions lie on a grid of the three faces of half a cube, so that the one nearest to any direction is
found by arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import roma
import torch
from torch import Tensor

from cryoai.symmetry.self_correlation import SelfCorrelation

__all__ = ["AxisMap", "turns_about"]


@dataclass(frozen=True, eq=False)
class AxisMap:
    """What one turn, ``360 / fold`` degrees, about each direction leaves unchanged.

    Attributes
    ----------
    directions : (D, 3)
        Unit vectors of a hemisphere.
    shares : (D,)
        Shares of the reproducible signal, at the best displacement.
    displacements : (D, 3)
        In pixels.
    """

    fold: int
    directions: Tensor
    shares: Tensor
    displacements: Tensor

    @classmethod
    def of_map(cls, correlation: SelfCorrelation, fold: int, step_in_radians: float) -> AxisMap:
        """Turn the map about directions so dense that neighbouring turns differ by about the step."""
        # Two turns by an angle about axes apart by d differ by 2 sin(angle / 2) d.
        between = step_in_radians / (2 * math.sin(math.pi / fold))
        n_bins = math.ceil(math.pi / 2 / between)
        directions = _axis_directions(n_bins).to(correlation.points)
        shares, displacements = correlation.largest_shares(turns_about(directions, fold))
        return cls(fold, directions, shares, displacements)

    def nearest(self, directions: Tensor) -> Tensor:
        """Rows (...) of the grid directions nearest to axes along directions (..., 3)."""
        n_bins = math.isqrt(len(self.directions) // 3)
        face = directions.abs().argmax(-1, keepdim=True)
        main = directions.gather(-1, face)
        others = (directions / main).gather(-1, (face + torch.tensor([1, 2], device=face.device)) % 3)
        bins = ((torch.atan(others) * (2 / math.pi) + 0.5) * n_bins).long().clamp(0, n_bins - 1)
        return (face[..., 0] * n_bins + bins[..., 0]) * n_bins + bins[..., 1]


def _axis_directions(n_bins: int) -> Tensor:
    """Unit vectors (3 n_bins^2, 3) at equal angles along both sides of three faces of a cube.

    Examples
    --------
    >>> _axis_directions(1)
    tensor([[1., 0., 0.], [0., 1., 0.], [0., 0., 1.]])
    """
    centres = torch.tan(((torch.arange(n_bins) + 0.5) / n_bins - 0.5) * (math.pi / 2))
    first, second = torch.meshgrid(centres, centres, indexing="ij")
    face = torch.stack([torch.ones_like(first), first, second], dim=-1).reshape(-1, 3)
    # Coordinates (main, next, next but one), main being x, y and z in turn.
    directions = torch.cat([face.roll(axis, dims=1) for axis in range(3)])
    return directions / directions.norm(dim=1, keepdim=True)


def turns_about(directions: Tensor, fold: int) -> Tensor:
    """Rotations (..., 3, 3) by ``360 / fold`` degrees about unit vectors (..., 3)."""
    turns: Tensor = roma.rotvec_to_rotmat(directions * (2 * math.pi / fold))
    return turns
