"""A learned volume fitted to a map that is there already."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.bootstrap import Reference
from cryoai.hardware import fast_matrices
from cryoai.model import CryoAI
from cryoai.volumes import AbstractVolume, SampledVolume

__all__ = ["Target", "fit_step"]


@dataclass(frozen=True, eq=False)
class Target:
    """Values (P,) that a volume should take at points (P, 3), and the weight (P,) of each error."""

    points: Tensor
    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, reference: Reference, model: CryoAI) -> Target:
        """The reference on the lattice that the model's volume will be read from, whitened by shell."""
        radius = model.imaging.max_radius
        volume = model.volume
        density = reference.at_box(volume.n_pixels).density
        sampled = SampledVolume.from_map(density, radius, oversampling=volume.sampling_oversampling)
        radii = sampled.lattice.radii(device=sampled.values.device)
        inside = radii < radius + 1
        values = sampled.values[inside, 0]
        shells = (radii[inside] + 0.5).floor().long().clamp(max=radius)
        points = sampled.lattice.frequencies(device=values.device)[inside]
        return cls(points, values, 1 / reference.noise.variance[shells])


def fit_step(volume: AbstractVolume, target: Target, choice: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step of a volume towards its target at the points ``choice``; the relative error before it."""
    device = target.points.device
    choice = choice.to(device)
    with fast_matrices(device):
        values = volume(target.points[choice])
    weights = target.weights[choice]
    error = ((values - target.values[choice]).abs().square() * weights).mean()
    scale = (target.values[choice].abs().square() * weights).mean()
    optimizer.zero_grad(set_to_none=True)
    (error / scale).backward()
    optimizer.step()
    return float((error / scale).detach())
