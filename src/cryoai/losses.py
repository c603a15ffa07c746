"""What training minimises.

* Wake: the symmetrized loss of CryoAI over several hypotheses. An encoder early in training is often
  right up to a half turn of the image, so it is asked twice, about the image and about the image
  turned by 180°, and the better answer is trained (Levy et al. 2022, equation 8).
* Sleep: the distance of hypotheses to known poses of synthetic images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.noise import log_likelihood
from cryoai.poses import Poses

__all__ = ["BestHypothesis", "best_hypothesis", "pose_loss", "symmetrized"]


@dataclass(frozen=True, eq=False)
class BestHypothesis:
    """Mean squared, whitened residual (B,) of the best hypothesis of each image, and which (B,) it is."""

    loss: Tensor
    choice: Tensor


def symmetrized(direct: Poses, turned: Poses) -> Poses:
    """Hypotheses (B, 2M) for images: (B, M) from the images, (B, M) from the images turned by 180°."""
    back = turned.turned_by_pi()
    return Poses(
        torch.cat([direct.rotations, back.rotations], dim=1),
        torch.cat([direct.shifts_in_angstroms, back.shifts_in_angstroms], dim=1),
    )


def best_hypothesis(observed: Tensor, predicted: Tensor, precision: Tensor) -> BestHypothesis:
    """The best of predictions (B, K, p) of observed coefficients (B, p), with its mean squared residual.

    ``precision`` (p,) is ``1 / s^2``. The gradient reaches the best hypothesis only.

    Examples
    --------
    >>> observed = torch.ones(1, 3, dtype=torch.complex64)
    >>> predicted = torch.stack([0 * observed, 0.5 * observed], dim=1)
    >>> best = best_hypothesis(observed, predicted, torch.ones(3))
    >>> best.choice.tolist(), best.loss.tolist()
    ([1], [0.25])
    """
    distances = -log_likelihood(observed[:, None], predicted, precision) / observed.shape[-1]
    loss, choice = distances.min(dim=1)
    return BestHypothesis(loss, choice)


def pose_loss(hypotheses: Poses, truth: Poses, *, shift_unit_in_angstroms: float, mean_weight: float) -> BestHypothesis:
    """Loss (B,) of hypotheses (B, M) for true poses (B,), and the nearest hypothesis (B,).

    ``min_m |R_m - R|_F^2 + |t_m - t|^2 / unit^2``, plus ``mean_weight`` times the mean over the heads of
    the first term, so that no head is left without a gradient.
    """
    rotation = (hypotheses.rotations - truth.rotations[:, None]).square().sum((-2, -1))
    shift = (hypotheses.shifts_in_angstroms - truth.shifts_in_angstroms[:, None]).square().sum(-1)
    nearest, choice = (rotation + shift / shift_unit_in_angstroms**2).min(dim=1)
    return BestHypothesis(nearest + mean_weight * rotation.mean(dim=1), choice)
