"""The Amortized stage from several starts: a wrong map that fits itself is left behind early.

From scratch, encoder and volume can lock on a map that is wrong and agrees with the poses that it leads to.
It predicts the images worse than the right one, long before either is done: of several independent
starts the one with the lowest wake loss goes on (``docs/method.md`` has the figures).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cryoai.training.stages.amortized import Amortized
from cryoai.training.stages.amortized_state import AmortizedMetrics, AmortizedState
from cryoai.training.stages.base import Estimate

__all__ = ["Contest", "ContestMetrics", "ContestState"]

# Share of a start's steps after which it is judged, by the mean over the last quarter of these.
_TRIAL = 0.2
_JUDGED = 0.25


@dataclass(frozen=True)
class ContestMetrics(AmortizedMetrics):
    """Those of a step, and which start, counted from 1, made it."""

    start: int

    @property
    def headline(self) -> str:
        return f"start {self.start}, {super().headline}"


@dataclass(frozen=True, eq=False)
class ContestState:
    """The losses of all starts on trial so far, those of the one on its way, and the states of it and of the best."""

    losses: tuple[float, ...]
    wake_losses: tuple[float, ...]
    best: AmortizedState | None
    current: AmortizedState


class Contest:
    """Gives each of several starts a trial, one after the other, and the best of them the rest of its steps.

    Parameters
    ----------
    starts
        Make a start each, alike but for their random numbers. Only the best so far and the one on trial exist.
    """

    name = "amortized"

    def __init__(self, starts: Sequence[Callable[[], Amortized]]) -> None:
        self._starts = starts
        self._current = starts[0]()
        self._wake_losses: list[float] = []
        self._best = self._current
        self.losses: list[float] = []
        self._n_trial_steps = max(1, round(_TRIAL * self._current.n_steps))

    @property
    def finished(self) -> bool:
        return self._decided and self._current.finished

    @property
    def progress(self) -> float:
        n_steps = self._current.n_steps
        total = n_steps + (len(self._starts) - 1) * self._n_trial_steps
        # Once one goes on, it is the others that were tried beside it.
        others = len(self._starts) - 1 if self._decided else len(self.losses)
        return (others * self._n_trial_steps + self._current.steps_done) / total

    @property
    def _decided(self) -> bool:
        return len(self.losses) == len(self._starts)

    def step(self) -> ContestMetrics:
        n_before = self._current.steps_done
        metrics = self._current.step()
        number = self.losses.index(min(self.losses)) + 1 if self._decided else len(self.losses) + 1
        if not self._decided:
            # A start that went back makes these steps again.
            n_undone = max(0, n_before - self._current.steps_done)
            self._wake_losses = [*self._wake_losses[: len(self._wake_losses) - n_undone], metrics.wake_loss]
            if self._current.steps_done == self._n_trial_steps:
                self._judge()
        return ContestMetrics(**vars(metrics), start=number)

    def result(self) -> Estimate:
        return replace(self._current.result(), start_losses=tuple(self.losses))

    def state(self) -> ContestState:
        best = None if self._best is self._current else self._best.state()
        return ContestState(tuple(self.losses), tuple(self._wake_losses), best, self._current.state())

    def restore(self, state: ContestState) -> None:
        self.losses, self._wake_losses = list(state.losses), list(state.wake_losses)
        # A start is what its weights are, whichever maker they were first drawn by.
        if state.best is not None:
            self._best.restore(state.best)
            self._current = self._starts[len(self.losses)]()
        self._current.restore(state.current)

    def _judge(self) -> None:
        """End the trial of the current start; begin that of the next, or go on with the best."""
        last = self._wake_losses[-max(1, round(_JUDGED * len(self._wake_losses))) :]
        measured = [loss for loss in last if math.isfinite(loss)]
        loss = sum(measured) / len(measured) if measured else math.inf
        if loss < min(self.losses, default=math.inf):
            self._best = self._current
        self.losses.append(loss)
        self._wake_losses = []
        self._current = self._best if self._decided else self._starts[len(self.losses)]()
