"""The course of a run: its stages, one after the other, saved on the way and taken up again where they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from cryoai.formats.snapshots import write_snapshot
from cryoai.model import CryoAI
from cryoai.training.checkpoints import Checkpoint
from cryoai.training.session import Session
from cryoai.training.stages import Estimate, Metrics, NotedMetrics, Stage

__all__ = ["Course"]


class Course:
    """Carries out stages and keeps the estimate that each hands on.

    ``estimate`` is what the next stage begins with; of a run that goes on, what the stage on its way began with.

    Of a run that goes on, the stages that are behind its checkpoint are passed over, and the one that was on its
    way is made anew and takes up its state: with one thread the result is the same to the last bit.

    Parameters
    ----------
    session
        Says where to go on, and when to stop.
    generator
        All random numbers of the stages.
    build_model
        Makes the model that the weights of a checkpoint belong to.
    """

    def __init__(self, session: Session, generator: torch.Generator, build_model: Callable[[], CryoAI]) -> None:
        self._session = session
        self._begun = session.begun
        self._monitor = session.monitor
        self._generator = generator
        self.estimate = Estimate() if self._begun is None else _estimate_of(self._begun, build_model)
        self._n_done = 0

    def change(self, what: Callable[[Estimate], Estimate]) -> None:
        """Change the estimate between two stages; nothing where that lies behind the checkpoint."""
        if self._begun is None:
            self.estimate = what(self.estimate)

    def carry_out(self, build: Callable[[Estimate], Stage]) -> None:
        """Make a stage of the estimate and step it until it is finished."""
        if self._begun is not None and self._n_done < self._begun.n_done:
            self._n_done += 1
            return
        begun, self._begun = self._begun, None
        if begun is not None:
            self._generator.set_state(begun.generator_at_start)
        at_start = self._generator.get_state()
        stage = build(self.estimate)
        if begun is not None and begun.stage is not None:
            stage.restore(begun.stage)
            self._generator.set_state(begun.generator)
            self._monitor.go_on(stage.name)
        else:
            self._monitor.begin(stage.name)
        headline = ""
        while not stage.finished:
            if self._session.is_to_stop or self._session.checkpoints.is_due:
                self._save(stage, at_start)
            if self._session.is_to_stop:
                raise self._session.stopped()
            metrics = stage.step()
            self._tell(metrics)
            headline = metrics.headline
            self._monitor.update(metrics, stage.progress)
        self._monitor.end(headline)
        self.estimate = stage.result()
        self._n_done += 1

    def _tell(self, metrics: Metrics) -> None:
        """Say what a stage has to say beside its numbers, and keep the batch that it speaks of."""
        for note in metrics.notes if isinstance(metrics, NotedMetrics) else ():
            where = ""
            if note.batch is not None:
                path = self._session.folder.non_finite_batch
                write_snapshot(path, note.batch)
                where = f" (the batch: {path})"
            self._monitor.say(f"{note.text}{where}")

    def _save(self, stage: Stage, generator_at_start: torch.Tensor) -> None:
        model = self.estimate.model
        self._session.checkpoints.save(
            Checkpoint(
                self._n_done,
                replace(self.estimate, model=None),
                None if model is None else model.state_dict(),
                generator_at_start,
                self._generator.get_state(),
                stage.state(),
                self._monitor.state(),
            )
        )


def _estimate_of(begun: Checkpoint, build_model: Callable[[], CryoAI]) -> Estimate:
    if begun.weights is None:
        return begun.estimate
    model = build_model()
    model.load_state_dict(begun.weights)
    model.eval()
    return replace(begun.estimate, model=model)
