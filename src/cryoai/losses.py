"""What training minimises.

* Wake: the squared residual of the best of several hypotheses, the half turns of
  :class:`~cryoai.encoder.SymmetrizedEncoder` among them.
* Sleep: the distance of the nearest hypothesis to the known pose of a synthetic image.
* Both: how surprised the encoder is to learn which of its hypotheses was the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cryoai.noise import log_likelihood
from cryoai.poses import Hypotheses, Poses

__all__ = ["BestHypothesis", "best_hypothesis", "pose_loss", "score_loss"]


@dataclass(frozen=True, eq=False)
class BestHypothesis:
    """Mean squared, whitened residual (B,) of the best hypothesis of each image, and which (B,) it is."""

    loss: Tensor
    choice: Tensor


def best_hypothesis(observed: Tensor, predicted: Tensor, precision: Tensor) -> BestHypothesis:
    """The best of predictions (B, K, p) of observed coefficients (B, p), with its mean squared residual.

    ``precision`` (p,) is ``1 / s^2``. The gradient reaches the best hypothesis only.

    Examples
    --------
    >>> import torch
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


def score_loss(hypotheses: Hypotheses, best: Tensor) -> Tensor:
    """Cross entropy (B,) between the encoder's probabilities and which hypothesis (B,) was the best.

    Examples
    --------
    >>> import torch
    >>> poses = Poses(torch.eye(3).expand(1, 2, 3, 3), torch.zeros(1, 2, 2))
    >>> sure = Hypotheses(poses, torch.tensor([[0.9, 0.1]]).log())
    >>> [round(float(score_loss(sure, torch.tensor([best]))), 2) for best in (0, 1)]
    [0.11, 2.3]
    """
    return F.nll_loss(hypotheses.log_probabilities, best, reduction="none")
