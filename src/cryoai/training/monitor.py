"""What a run tells while it runs: a progress bar or plain lines, a log, metrics and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from cryoai.runs import RunFolder
from cryoai.training.stages import Metrics

__all__ = ["Monitor", "MonitorState"]

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class MonitorState:
    """Seconds of the run so far, of the stages done, of the one that is not; what was written of its numbers."""

    seconds: float = 0.0
    seconds_per_stage: dict[str, float] = field(default_factory=dict)
    seconds_of_stage: float = 0.0
    n_steps_of_stage: int = 0
    n_bytes_of_metrics: int = 0


class Monitor:
    """Follows stage after stage. On a terminal a bar with the time left; elsewhere a line now and then.

    Of a run that goes on, what was measured after its last checkpoint is forgotten, because it is done again.
    """

    def __init__(self, run: RunFolder, before: MonitorState = MonitorState()) -> None:
        self._before = before
        self.started_at = time.monotonic() - before.seconds
        self._log: IO[str] = run.log.open("a", encoding="utf-8")
        self._metrics: IO[str] = run.metrics.open("a", encoding="utf-8")
        self._metrics.truncate(before.n_bytes_of_metrics)
        self._metrics.seek(before.n_bytes_of_metrics)  # truncation leaves the position, beyond the end
        self._board = SummaryWriter(str(run.tensorboard))
        self._console = Console(stderr=False)
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[headline]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._stage_started_at = self.started_at
        self._last_line_at = self.started_at
        self._n_steps = 0
        self.seconds_per_stage = dict(before.seconds_per_stage)

    def __enter__(self) -> Monitor:
        self._bar.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        # On a full disk the error that there is says more than another one here.
        if error is not None:
            with suppress(OSError):
                self._write(f"stopped: {type(error).__name__}: {error}")
        for file in (self._log, self._metrics, self._board):
            with suppress(OSError):
                file.close()

    def say(self, text: str) -> None:
        """A line for the screen and the log."""
        self._write(text)
        self._console.print(text, highlight=False, soft_wrap=True)

    def state(self) -> MonitorState:
        """For a monitor of the same run to go on from."""
        self._metrics.flush()
        now = time.monotonic()
        return MonitorState(
            now - self.started_at,
            dict(self.seconds_per_stage),
            now - self._stage_started_at,
            self._n_steps,
            self._metrics.tell(),
        )

    def begin(self, stage: str) -> None:
        self._stage, self._stage_started_at = stage, time.monotonic()
        self._last_line_at = self._stage_started_at
        self._n_steps = 0
        self._task = self._bar.add_task(stage, total=1.0, headline="")

    def go_on(self, stage: str) -> None:
        """Begin the stage that was on its way when the run was stopped."""
        self.begin(stage)
        self._stage_started_at -= self._before.seconds_of_stage
        self._n_steps = self._before.n_steps_of_stage

    def update(self, metrics: Metrics, progress: float) -> None:
        """Record the numbers of a step."""
        values = {k: v for k, v in vars(metrics).items() if isinstance(v, int | float) and math.isfinite(v)}
        self._n_steps += 1
        seconds = round(time.monotonic() - self.started_at, 3)
        self._metrics.write(json.dumps({"stage": self._stage, "seconds": seconds, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{self._stage}/{name}", value, self._n_steps)
        self.advance(progress, metrics.headline)

    def advance(self, progress: float, headline: str = "") -> None:
        """Show how far the stage has come, 0 to 1."""
        assert self._task is not None
        self._bar.update(self._task, completed=progress, headline=headline)
        now = time.monotonic()
        if now - self._last_line_at > _SECONDS_BETWEEN_LINES:
            self._last_line_at = now
            elapsed = now - self._stage_started_at
            left = elapsed * (1 - progress) / progress if progress > 0 else math.nan
            line = f"{self._stage:<10} {progress:4.0%}  {elapsed:4.0f} s, about {left:.0f} s left  {headline}"
            self._write(line)
            if not self._console.is_terminal:
                print(line, file=sys.stdout, flush=True)

    def end(self, headline: str) -> None:
        """The stage is done."""
        assert self._task is not None
        seconds = time.monotonic() - self._stage_started_at
        self.seconds_per_stage[self._stage] = round(self.seconds_per_stage.get(self._stage, 0.0) + seconds, 2)
        self._bar.remove_task(self._task)
        self.say(f"{self._stage:<10} done in {seconds:.0f} s  {headline}")

    def _write(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        self._log.flush()
