"""A process at work on a run: its folder, its clock, what it goes on from, and how it ends."""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cryoai.errors import InputError, RunFailedError
from cryoai.interruption import InterruptedRunError, StopRequest
from cryoai.runs import RunFolder
from cryoai.training.checkpoints import Checkpoint, Checkpoints
from cryoai.training.monitor import Monitor, MonitorState
from cryoai.training.stages.trouble import is_out_of_memory

__all__ = ["Session", "new_run", "work_on"]


@dataclass(frozen=True, eq=False)
class Session:
    """What the parts of a run have in common as long as a process is at work on it.

    Attributes
    ----------
    begun
        The checkpoint that it goes on from; None from the beginning.
    """

    folder: RunFolder
    device: torch.device
    monitor: Monitor
    checkpoints: Checkpoints
    begun: Checkpoint | None
    stop: StopRequest

    @property
    def is_to_stop(self) -> bool:
        """Whether somebody asked for it."""
        return self.stop.number is not None

    def stopped(self) -> InterruptedRunError:
        """What is said of a run that was asked to stop, after its work was saved."""
        assert self.stop.number is not None
        name = signal.Signals(self.stop.number).name
        return InterruptedRunError(self.stop.number, f"stopped by {name}, its work is saved; {_how(self.folder)}")


@contextmanager
def new_run(path: Path) -> Iterator[RunFolder]:
    """A new folder for a run: gone again if the input turns out to be bad before anything was done."""
    folder = RunFolder.create(path)
    try:
        yield folder
    except InputError:
        if not any(folder.checkpoints.glob("checkpoint_*")):
            folder.discard()
        raise


@contextmanager
def work_on(folder: RunFolder, device: torch.device, seconds_between_checkpoints: float) -> Iterator[Session]:
    """Begin or go on with a run; when it is finished, all that was kept for going on is removed.

    Raises
    ------
    InputError
        If another process is at work in the folder.
    RunFailedError
        If a disk is full, a file has vanished, or memory does not suffice: with what can be done about it.
    """
    checkpoints = Checkpoints(folder.checkpoints, seconds_between_checkpoints, device)
    with _locked(folder), StopRequest() as stop:
        begun, damage = checkpoints.newest()
        with Monitor(folder, MonitorState() if begun is None else begun.monitor) as monitor:
            for line in damage:
                monitor.say(f"checkpoint left out, {line}")
            if begun is not None:
                monitor.say(f"{'resume':<10} going on after {begun.monitor.seconds:.0f} s of work")
            try:
                yield Session(folder, device, monitor, checkpoints, begun, stop)
            except OSError as error:
                fault = f"{error.filename or folder.path}: {error.strerror or error}"
                raise RunFailedError(f"{fault}; mend that, then {_how(folder)}") from error
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                raise RunFailedError(f"memory does not suffice ({error}); free some, then {_how(folder)}") from error
    folder.tidy()


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Keep other processes out of the folder; a lock ends with the process that holds it, however that ends."""
    with folder.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder.path}: another process is at work on this run; wait for it or stop it") from None
        yield
        folder.lock.unlink(missing_ok=True)


def _how(folder: RunFolder) -> str:
    return f"go on with: cryoai resume {folder.path}"
