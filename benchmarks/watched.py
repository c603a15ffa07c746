"""A program that takes hours, under a clock: the time of every step, a stop at a limit, and more after a resumption.

Steps are what the program itself calls so, iterations or epochs. Its place is how many are done, with a fraction for
the present one. Time is kept step by step, in a file: what is lost by a stop and done again counts once.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

__all__ = ["Phase", "StepTime", "Timetable", "run_watched", "session_cpu_seconds"]

_PATIENCE_IN_SECONDS = 120
_POLL_IN_SECONDS = 1.0


@dataclass(frozen=True)
class Phase:
    """Steps that cost alike, by the number of images that each of them treats.

    ``like`` names the phase whose rate stands in for that of this one until this one is reached.
    """

    name: str
    images_of_steps: tuple[int, ...]
    like: str | None = None


@dataclass
class StepTime:
    """What was spent on a step, of which a share is done."""

    share: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class Timetable:
    """The time that each step took, over all resumptions.

    ``unfinished`` was spent, at the end of the last run, on what was not yet seen to be done.
    """

    steps: list[StepTime] = field(default_factory=list)
    unfinished: StepTime = field(default_factory=StepTime)
    finished: bool = False

    @classmethod
    def read(cls, path: Path) -> "Timetable":
        """The one in a file; an empty one where there is none."""
        if not path.is_file():
            return cls()
        held = json.loads(path.read_text())
        return cls([StepTime(*step) for step in held["steps"]], StepTime(*held["unfinished"]), held["finished"])

    def write(self, path: Path) -> None:
        *steps, unfinished = [
            [round(x, 4) for x in (step.share, step.seconds, step.cpu_seconds)]
            for step in (*self.steps, self.unfinished)
        ]
        held = {"steps": steps, "unfinished": unfinished, "finished": self.finished}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(held) + "\n")
        temporary.replace(path)

    @property
    def place(self) -> float:
        return len(self.steps) - 1 + self.steps[-1].share if self.steps else 0.0

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in (*self.steps, self.unfinished))

    @property
    def cpu_seconds(self) -> float:
        return sum(step.cpu_seconds for step in (*self.steps, self.unfinished))

    def rewind(self, n_steps: int) -> None:
        """Forget all after the first steps, which will be done again."""
        del self.steps[n_steps:]
        self.unfinished = StepTime()

    def advance(self, place: float, seconds: float, cpu_seconds: float) -> None:
        """Note the time that it took from the present place to this one, in equal parts where it spans steps."""
        start = self.place
        while (here := self.place) < place - 1e-9:
            if here == len(self.steps):
                self.steps.append(StepTime())
            end = min(place, float(len(self.steps)))
            part = (end - here) / (place - start)
            step = self.steps[-1]
            step.share = end - (len(self.steps) - 1)
            step.seconds += part * seconds
            step.cpu_seconds += part * cpu_seconds

    def seconds_per_image(self, phases: Sequence[Phase]) -> dict[str, float]:
        """By phase, of those that were reached."""
        rates = {}
        first = 0
        for phase in phases:
            steps = self.steps[first : first + len(phase.images_of_steps)]
            images = sum(step.share * n for step, n in zip(steps, phase.images_of_steps, strict=False))
            if images > 0:
                rates[phase.name] = sum(step.seconds for step in steps) / images
            first += len(phase.images_of_steps)
        return rates

    def extrapolated_seconds(self, phases: Sequence[Phase]) -> float | None:
        """Of the whole, if every image that is left takes as long as those of its phase so far.

        None where there is a phase without a rate, of its own or of one that it is like, and where the steps are not
        known beforehand.
        """
        rates = self.seconds_per_image(phases)
        total, first = 0.0, 0
        for phase in phases:
            rate = rates.get(phase.name, rates.get(phase.like or ""))
            if rate is None:
                return None
            rates[phase.name] = rate
            total += rate * sum(phase.images_of_steps)
            first += len(phase.images_of_steps)
        return total if first else None


def run_watched(
    command: Sequence[str],
    timetable: Timetable,
    kept_in: Path,
    *,
    place: Callable[[], float],
    ended_well: Callable[[int], bool],
    stop_file: Path | None,
    limit_in_seconds: float,
    cwd: Path,
    environment: dict[str, str],
    log: Path,
) -> int | None:
    """Run a program until it ends or the time of its steps reaches the limit; what it prints goes to the log.

    At the limit, or when this program is interrupted, it is asked to stop by a file, if it looks for one, then told
    to, then made to.

    Returns
    -------
    int or None
        Its exit status; None if it was stopped.
    """
    with log.open("w") as output:
        process = _start(command, cwd, environment, output)
        timetable.unfinished = StepTime()
        status = None
        try:
            status = _watch(process, timetable, kept_in, place, limit_in_seconds)
        finally:
            if status is None:
                _stop(process, stop_file)
            timetable.finished = status is not None and ended_well(status)
            timetable.write(kept_in)
    return status


def _start(command: Sequence[str], cwd: Path, environment: dict[str, str], output: TextIO) -> "subprocess.Popen[bytes]":
    # In a session of its own, by which all that it starts is found.
    return subprocess.Popen(
        command, cwd=cwd, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
    )


def _watch(
    process: "subprocess.Popen[bytes]",
    timetable: Timetable,
    kept_in: Path,
    place: Callable[[], float],
    limit_in_seconds: float,
) -> int | None:
    last, last_cpu, cpu = time.monotonic(), 0.0, 0.0
    while True:
        # Before it is asked whether it has ended: then it is gone, and its time with it.
        cpu = max(cpu, session_cpu_seconds(process.pid))
        status, now = process.poll(), time.monotonic()
        reached = place()
        if reached > timetable.place + 1e-9:
            timetable.advance(reached, now - last, cpu - last_cpu)
            last, last_cpu = now, cpu
        timetable.unfinished = StepTime(0.0, now - last, cpu - last_cpu)
        timetable.write(kept_in)
        if status is not None:
            return status
        if timetable.seconds >= limit_in_seconds:
            return None
        time.sleep(_POLL_IN_SECONDS)


def _stop(process: "subprocess.Popen[bytes]", stop_file: Path | None) -> None:
    ways = [(stop_file.touch, _PATIENCE_IN_SECONDS)] if stop_file else []
    for way, patience in (*ways, (process.terminate, 30), (process.kill, None)):
        way()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        return


def session_cpu_seconds(session: int) -> float:
    """Seconds that all processes of a session have computed, and those that they waited for; 0 where nothing says."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, can hold anything.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")
