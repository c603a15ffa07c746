"""The Completion stage: the particles that the map and the encoder were not made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cryoai.particle_stack import Fault, ParticleStack
from cryoai.particles import PreparedParticles, prepare_particles
from cryoai.poses import Poses, assign_poses, blank_poses
from cryoai.reconstruction import HalfSets
from cryoai.refinement import refine_coarse_to_fine
from cryoai.search import TrialPoses
from cryoai.training.stages.base import Estimate, chunks_of_halves, scatter
from cryoai.training.stages.placement import Placement
from cryoai.volumes import SampledVolume

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
    not grow with their number. Each block is placed like the particles before it
    (:class:`~cryoai.training.stages.Placement`), refined against the half maps as they were before
    this stage, and added to the sums.

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
    n_iterations
        Local refinement steps; see the stages Placement and Refinement.
    """

    name = "completion"

    def __init__(
        self,
        stack: ParticleStack,
        left: Tensor,
        trained: PreparedParticles,
        estimate: Estimate,
        half_set: Tensor,
        trials: TrialPoses | None,
        scratch: Path,
        *,
        n_placement_iterations: int,
        n_iterations: int,
    ) -> None:
        if estimate.particles is None or estimate.half_sets is None or estimate.reference is None:
            raise ValueError("completion needs placed particles")
        self.stack = stack
        self.trained = trained
        self.estimate = estimate
        self.half_set = half_set
        self.trials = trials
        self.scratch = scratch
        self.n_placement_iterations = n_placement_iterations
        self.n_iterations = n_iterations
        self.half_sets = estimate.half_sets
        half_maps = self.half_sets.half_maps()
        self.band_limit = max(4, min(trained.disc.max_radius, half_maps.n_resolved_shells + 1))
        self.volumes = tuple(
            SampledVolume.from_map(density, self.band_limit, with_gradient=True)
            for density in self.half_sets.references(half_maps, self.band_limit)
        )
        self.reference = replace(estimate.reference, density=self.half_sets.combined(half_maps))
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
        return next(self.work)

    def result(self) -> Estimate:
        return replace(self.estimate, particles=self.found, half_sets=self.half_sets)

    def _work(self) -> Iterator[CompletionMetrics]:
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
            if not len(usable):
                self.n_done += len(rows)
                yield CompletionMetrics(self.n_done)
                continue
            start = Estimate(reference=self.reference, model=self.estimate.model)
            placement = Placement(
                block, start, self.half_set[usable], self.trials, n_iterations=self.n_placement_iterations
            )
            while not placement.finished:
                placement.step()
                yield CompletionMetrics(self.n_done)
            placed = placement.result().particles
            assert placed is not None
            refined, sums = self._refined(block, placed.poses, self.half_set[usable])
            scatter(self.found, replace(placed, poses=refined), usable)
            self.half_sets = self.half_sets + sums
            self.n_done += len(rows)
            yield CompletionMetrics(self.n_done)

    @torch.no_grad()
    def _refined(self, block: PreparedParticles, start: Poses, half_set: Tensor) -> tuple[Poses, HalfSets]:
        """Poses (B,) refined against the map of each particle's half set, and the sums of the block."""
        poses = blank_poses(block.n_particles, block.disc.device)
        sums = HalfSets.empty(block.n_pixels, device=block.disc.device)
        imaging, full = block.imaging(self.band_limit), block.imaging(block.disc.max_radius)
        noise = block.power(torch.arange(block.n_particles), full.max_radius)
        for rows in chunks_of_halves(half_set):
            half, batch = int(half_set[rows[0]]), block.batch(rows)
            here = start[rows.to(start.rotations.device)]
            refined = refine_coarse_to_fine(batch, here, self.volumes[half], imaging, noise, self.n_iterations).poses
            sums.sums[half].add(batch, refined, full, noise.precision(full))
            assign_poses(poses, rows, refined)
        return poses, sums
