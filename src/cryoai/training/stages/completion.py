"""The Completion stage: the particles that the map and the encoder were not made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cryoai.half_maps import HalfMaps
from cryoai.particle_stack import Fault, ParticleStack
from cryoai.particles import PreparedParticles, Quarantine, prepare_particles
from cryoai.reconstruction import HalfSets
from cryoai.training.stages.base import Estimate, ParticlePoses, scatter
from cryoai.training.stages.blocks import BlockPosing, BlockRefinementState, Posing
from cryoai.training.stages.placement import PlacementState

__all__ = ["Completion", "CompletionMetrics", "CompletionState"]


@dataclass(frozen=True)
class CompletionMetrics:
    """What a step reports."""

    n_done: int

    @property
    def headline(self) -> str:
        return f"{self.n_done:,} more particles posed and added to the half maps"


@dataclass(frozen=True, eq=False)
class CompletionState:
    """What came of the blocks that are done, and how far the next one is, if it was begun.

    Attributes
    ----------
    found : (N,)
        The table of all particles.
    half_sets
        The sums that they were added to.
    faults
        Of the blocks that are done.
    rows, posing
        (B,), the rows of the next block, those that can be used, and the work on them.
    """

    n_blocks_done: int
    found: ParticlePoses
    half_sets: HalfSets
    faults: tuple[Fault, ...]
    rows: Tensor | None
    posing: PlacementState | BlockRefinementState | None


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
    max_faulty_share
        Of those that were left out, so many may be missing, not finite or constant; they are noted, and have no poses.
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
        *,
        max_faulty_share: float,
    ) -> None:
        if estimate.particles is None or estimate.half_sets is None:
            raise ValueError("completion needs placed particles")
        n_particles = len(estimate.particles.poses)
        self.stack = stack
        self.trained = trained
        self.estimate = estimate
        self.half_set = half_set
        self.posing = posing
        self.scratch = scratch
        self.max_faulty_share = max_faulty_share
        self.half_sets = estimate.half_sets
        # A copy, because blocks are written into it.
        self.found = estimate.particles.among(torch.arange(n_particles), n_particles)
        self.faults: tuple[Fault, ...] = ()
        self.blocks = left.split(trained.n_particles)
        self.left, self.n_blocks_done = left, 0
        self.current: _Block | None = None

    @property
    def finished(self) -> bool:
        return self.n_blocks_done >= len(self.blocks)

    @property
    def n_done(self) -> int:
        """Particles in the blocks that are done."""
        return sum(map(len, self.blocks[: self.n_blocks_done]))

    @property
    def progress(self) -> float:
        return self.n_done / len(self.left)

    def step(self) -> CompletionMetrics:
        """Prepare a block, or pose a chunk of it.

        Raises
        ------
        InputError
            If too many images cannot be used.
        """
        if self.current is None:
            self._begin_block()
        else:
            self.current.posing.step()
            if self.current.posing.finished:
                self._end_block(self.current)
        return CompletionMetrics(self.n_done)

    def result(self) -> Estimate:
        half_maps = HalfMaps.of(self.half_sets, self.trained.pixel_size_in_angstroms)
        faults = self.estimate.faults + self.faults
        found, sets = self.found, self.half_sets
        return replace(self.estimate, particles=found, half_sets=sets, half_maps=half_maps, faults=faults)

    def state(self) -> CompletionState:
        block = self.current
        rows, posing = (None, None) if block is None else (block.rows, block.posing.state())
        return CompletionState(self.n_blocks_done, self.found, self.half_sets, self.faults, rows, posing)

    def restore(self, state: CompletionState) -> None:
        self.n_blocks_done, self.faults = state.n_blocks_done, state.faults
        self.found, self.half_sets = state.found, state.half_sets
        if state.rows is None or state.posing is None:
            return
        self._begin_block()
        # Otherwise other images can be used than before: the block begins again.
        if self.current is not None and torch.equal(self.current.rows, state.rows):
            self.current.posing.restore(state.posing)

    def _begin_block(self) -> None:
        rows = self.blocks[self.n_blocks_done]
        particles = prepare_particles(
            self.stack.take(rows),
            self.trained.n_pixels,
            self.scratch,
            sign=self.trained.contrast.sign,
            # They are counted over all blocks.
            max_faulty_share=1.0,
            device=self.trained.disc.device,
        )
        Quarantine(self.stack.take(self.left), self.max_faulty_share).note(self.faults + particles.faults)
        usable = rows[particles.stack_rows]
        if len(usable):
            self.current = _Block(usable, particles.faults, self.posing.begin(particles, self.half_set[usable]))
        else:
            self._go_on(particles.faults)

    def _end_block(self, block: _Block) -> None:
        posed = block.posing.result()
        scatter(self.found, posed.particles, block.rows)
        self.half_sets = self.half_sets + posed.half_sets
        self._go_on(block.faults)

    def _go_on(self, faults: tuple[Fault, ...]) -> None:
        """To the next block, after one with these faults."""
        self.faults += faults
        self.n_blocks_done += 1
        self.current = None


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows (B,) of the stack, the images without use that were between them, and the work on the rows."""

    rows: Tensor
    faults: tuple[Fault, ...]
    posing: Posing
