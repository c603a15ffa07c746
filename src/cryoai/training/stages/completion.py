"""The Completion stage: the particles that the map and the encoder were not made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from cryoai.half_maps import HalfMaps
from cryoai.particle_stack import Fault, ParticleStack
from cryoai.particles import PreparedParticles, prepare_particles
from cryoai.training.stages.base import Estimate, scatter
from cryoai.training.stages.blocks import BlockPosing

__all__ = ["Completion", "CompletionMetrics"]


@dataclass(frozen=True)
class CompletionMetrics:
    """What a step reports."""

    n_done: int

    @property
    def headline(self) -> str:
        return f"{self.n_done:,} more particles posed and added to the half maps"


class Completion:
    """Poses all particles that were left out so far, in one pass, and adds them to the half maps.

    They come in blocks as large as the set that was trained on, so that scratch space and memory do
    not grow with their number. Each block is posed against the half maps as they were before this stage
    (:class:`~cryoai.training.stages.blocks.BlockPosing`), and added to the sums.

    Parameters
    ----------
    estimate
        Of all particles of the stack; those that were left out have no poses yet.
    left
        (L,), rows of the stack of those.
    half_set : (N,) int
        Of all particles of the stack.
    trained
        The particles that were not left out; says how the others are prepared.
    scratch
        File for the images of a block.
    """

    name = "completion"

    def __init__(
        self,
        stack: ParticleStack,
        left: Tensor,
        trained: PreparedParticles,
        estimate: Estimate,
        half_set: Tensor,
        posing: BlockPosing,
        scratch: Path,
    ) -> None:
        if estimate.particles is None or estimate.half_sets is None:
            raise ValueError("completion needs placed particles")
        self.stack = stack
        self.trained = trained
        self.estimate = estimate
        self.half_set = half_set
        self.posing = posing
        self.scratch = scratch
        self.half_sets = estimate.half_sets
        self.found = estimate.particles
        self.blocks = left.split(trained.n_particles)
        self.n_left, self.n_done = len(left), 0
        self.faults: list[Fault] = []
        self.work = self._work()

    @property
    def finished(self) -> bool:
        return self.n_done >= self.n_left

    @property
    def progress(self) -> float:
        return self.n_done / self.n_left

    def step(self) -> CompletionMetrics:
        next(self.work, None)
        return CompletionMetrics(self.n_done)

    def result(self) -> Estimate:
        half_maps = HalfMaps.of(self.half_sets, self.trained.pixel_size_in_angstroms)
        return replace(self.estimate, particles=self.found, half_sets=self.half_sets, half_maps=half_maps)

    def _work(self) -> Iterator[None]:
        """One block after the other, with many pauses."""
        for rows in self.blocks:
            block = prepare_particles(
                self.stack.take(rows),
                self.trained.n_pixels,
                self.scratch,
                sign=self.trained.contrast.sign,
                # After all the work that is done, nothing stops the run: what cannot be used is noted.
                max_faulty_share=1.0,
                device=self.trained.disc.device,
            )
            self.faults += block.faults
            usable = rows[block.stack_rows]
            if len(usable):
                posed = yield from self.posing.pose(block, self.half_set[usable])
                scatter(self.found, posed.particles, usable)
                self.half_sets = self.half_sets + posed.half_sets
            self.n_done += len(rows)
            yield
