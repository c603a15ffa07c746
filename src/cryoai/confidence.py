"""Confidence: the probability that a pose is within 10° of the right one.

What it goes by is turned into a probability by logistic regression on synthetic particles of the run's
own map, whose poses are known (Platt 1999). Particles that fit worse than nearly all of those whose pose
was found do not belong to the map at all, and lose their confidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.noise import Fit

__all__ = ["Confidence", "features_of_fit"]

RIGHT_IN_DEGREES = 10.0
"""Poses nearer to the truth than this are right."""
_RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class Confidence:
    """From what speaks for a pose to the probability that it is right.

    ``weights`` (f,) belong to the features; ``fits`` (q,) are evenly spaced quantiles of the fit of particles
    whose pose was found; of those, the share ``worst`` fits so badly that it loses confidence.
    """

    weights: Tensor
    fits: Tensor
    worst: float

    @classmethod
    def learn(cls, features: Tensor, fit: Tensor, right: Tensor, *, worst: float) -> Confidence:
        """From particles (n,) of which it is known which were right (n,).

        Parameters
        ----------
        features : (n, f)
            What speaks for each pose, of order one, a constant among them.
        fit : (n,)
            :func:`~cryoai.noise.fit_z_scores`, by which those are told that do not belong.
        """
        features, target = features.double(), right.double()
        weights = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
        ridge = _RIDGE * len(features) * torch.eye(len(weights), dtype=torch.float64, device=features.device)
        for _ in range(30):  # Newton; the ridge keeps it finite where the classes do not overlap
            p = torch.sigmoid(features @ weights)
            hessian = (features.T * (p * (1 - p)).clamp_min(1e-6)) @ features + ridge
            weights = weights + torch.linalg.solve(hessian, features.T @ (target - p) - ridge @ weights)
        found = fit[right] if bool(right.any()) else fit
        return cls(weights, torch.quantile(found.double(), torch.linspace(0, 1, 1001).to(found).double()), worst)

    def __call__(self, features: Tensor, fit: Tensor) -> Tensor:
        """Probabilities (B,) that poses with features (B, f) and fits (B,) are right."""
        probability = torch.sigmoid(features.double() @ self.weights)
        rank = torch.searchsorted(self.fits, fit.double().contiguous()) / (len(self.fits) - 1)
        return (probability * (rank / self.worst).clamp(max=1)).float()


def features_of_fit(fit: Fit) -> Tensor:
    """Features (N, 4) of poses of which the fit is known: that, and how much there was to be fitted."""
    z = fit.z_scores.clamp(-30, 10) / 5
    energy = fit.energies.clamp_min(1e-3).log() / 5
    return torch.stack([torch.ones_like(z), z, energy, z * energy], dim=-1)
