"""What the Amortized stage tells of a step, and what it goes on from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cryoai.training.stages.trouble import NotedMetrics
from cryoai.volumes import SampledVolume

__all__ = ["AmortizedMetrics", "AmortizedState", "Training"]


@dataclass(frozen=True)
class AmortizedMetrics(NotedMetrics):
    """What a step reports; NaN for what it did not compute."""

    step: int
    band_limit: int
    wake_loss: float
    sleep_loss: float
    volume_fit_loss: float

    @property
    def headline(self) -> str:
        if not math.isnan(self.volume_fit_loss):
            return f"fitting the volume, relative error {self.volume_fit_loss:.2f}"
        losses = {"wake loss": f"{self.wake_loss:.4f}", "sleep loss": f"{self.sleep_loss:.2f}"}
        return ", ".join(f"{name} {value}" for name, value in losses.items() if value != "nan")


@dataclass(frozen=True, eq=False)
class Training:
    """Weights, optimizers and schedule as they stand, and the volume that synthetic images are made from."""

    steps_done: int
    fit_steps_left: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    fit_optimizer: dict[str, Any]
    schedule: dict[str, Any]
    asleep_with: SampledVolume | None


@dataclass(frozen=True, eq=False)
class AmortizedState:
    """How far training has come, and what troubles there were.

    Attributes
    ----------
    kept
        What training goes back to; None before the first step.
    left_out : (C,)
        Rows of the images that are not drawn any more.
    slowdown
        Factor of the learning rates.
    n_returns
        How often training went back without an image to blame.
    n_parts
        Into so many a batch is divided where hypotheses are compared with it.
    """

    training: Training
    kept: Training | None
    left_out: Tensor
    slowdown: float
    n_returns: int
    n_parts: int
