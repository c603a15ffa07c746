"""Checkpoints: all that a run needs to go on as if it had never been stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryoai.formats.snapshots import DamagedSnapshotError, read_snapshot, write_snapshot
from cryoai.training.monitor import MonitorState
from cryoai.training.stages import Estimate

__all__ = ["Checkpoint", "Checkpoints"]

_N_KEPT = 2
# So many times as long as it took to write the last one is work, before the next.
_SHARE_OF_WORK = 50


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A moment of a run.

    Attributes
    ----------
    n_done
        Stages that are behind it.
    estimate
        What the stage that is on its way began with; without the model, which its weights stand for.
    weights
        Of the model of the estimate, if it has one.
    generator_at_start, generator
        State of the random numbers when the stage was made, and now.
    stage
        State of the stage; None if it is to begin again.
    monitor
        What the log and the clock had come to.
    """

    n_done: int
    estimate: Estimate
    weights: dict[str, Tensor] | None
    generator_at_start: Tensor
    generator: Tensor
    stage: Any
    monitor: MonitorState


class Checkpoints:
    """Those of one run, in a folder of their own: the last two, numbered.

    Parameters
    ----------
    seconds_between
        At least; more where writing one takes long.
    """

    def __init__(self, folder: Path, seconds_between: float, device: torch.device) -> None:
        self._folder = folder
        self._seconds_between = seconds_between
        self._device = device
        self._last_at = time.monotonic()
        self._pause = seconds_between

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next."""
        return time.monotonic() - self._last_at >= self._pause

    def save(self, checkpoint: Checkpoint) -> None:
        """Write one, and remove all but the last two."""
        started = time.monotonic()
        self._folder.mkdir(exist_ok=True)
        number = 1 + max((_number(path) for path in self._files()), default=0)
        write_snapshot(self._folder / f"checkpoint_{number:06d}.safetensors", checkpoint)
        for path in self._files()[:-_N_KEPT]:
            path.unlink(missing_ok=True)
        self._last_at = time.monotonic()
        self._pause = max(self._seconds_between, _SHARE_OF_WORK * (self._last_at - started))

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest that is whole, None if there is none, and what is wrong with those after it."""
        damage = []
        for path in reversed(self._files()):
            try:
                found: Checkpoint = read_snapshot(path, self._device)
            except DamagedSnapshotError as error:
                damage.append(str(error))
            else:
                return found, damage
        return None, damage

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint_*.safetensors"), key=_number)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint_"))
