"""Posing particles that the maps of a run were not made from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryoai.noise import Fit, NoiseSpectrum
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses, assign_poses, blank_poses, selected_poses
from cryoai.reconstruction import HalfSets
from cryoai.refinement import refine_coarse_to_fine
from cryoai.search import TrialPoses
from cryoai.symmetry.averaging import symmetrized_half_sets
from cryoai.symmetry.groups import PointGroup
from cryoai.training.stages.base import Estimate, ParticlePoses, chunks_of_halves
from cryoai.training.stages.placement import Placement, PlacementState
from cryoai.volumes import SampledVolume

__all__ = ["BlockPosing", "BlockRefinementState", "PosedBlock", "Posing", "fit_to_other_half"]


@dataclass(frozen=True, eq=False)
class PosedBlock:
    """What came of a block: its table of poses (B,), and its half sets at them, with the symmetry."""

    particles: ParticlePoses
    half_sets: HalfSets


class BlockPosing:
    """Poses blocks of particles as those of the run were: placed, then refined against the map of their half.

    Parameters
    ----------
    estimate
        Of a run with half maps; the blocks change nothing in it.
    particles
        Those that it is of; says how they were prepared.
    trials
        Poses to search; None to rely on the encoder.
    group
        The symmetry that the half maps were given.
    n_placement_iterations, n_iterations
        Local refinement steps; see the stages Placement and Refinement.
    """

    def __init__(
        self,
        estimate: Estimate,
        particles: PreparedParticles,
        trials: TrialPoses | None,
        group: PointGroup,
        *,
        n_placement_iterations: int,
        n_iterations: int,
    ) -> None:
        if estimate.half_sets is None or estimate.half_maps is None or estimate.reference is None:
            raise ValueError("only a run with half maps can pose further particles")
        self.trials = trials
        self.group = group
        self.noise = estimate.noise
        self.n_placement_iterations = n_placement_iterations
        self.n_iterations = n_iterations
        half_maps = estimate.half_maps
        self.band_limit = max(4, min(particles.disc.max_radius, half_maps.n_resolved_shells + 1))
        references = half_maps.references(estimate.half_sets, self.band_limit)
        first_volume, second_volume = (
            SampledVolume.from_map(density, self.band_limit, with_gradient=True) for density in references
        )
        self.volumes = (first_volume, second_volume)
        first, second = (replace(estimate.reference, density=density) for density in references)
        self.start = Estimate(reference=estimate.reference, half_references=(first, second), model=estimate.model)

    def begin(self, block: PreparedParticles, half_set: Tensor) -> Posing:
        """The work on a block of particles (B,) of given half sets (B,)."""
        n_iterations = self.n_placement_iterations
        placement = Placement(block, self.start, half_set, self.trials, self.group, n_iterations=n_iterations)
        noise = self.noise or block.power(torch.arange(block.n_particles), block.disc.max_radius)
        return Posing(placement, self.volumes, noise, self.band_limit, self.n_iterations)


@dataclass(frozen=True, eq=False)
class BlockRefinementState:
    """How many chunks of a block (B,) are refined, and what came of them; that is written in place."""

    n_chunks_done: int
    placed: ParticlePoses
    poses: Poses
    fit: Fit
    half_sets: HalfSets

    @classmethod
    def at_start(cls, placed: ParticlePoses, block: PreparedParticles) -> BlockRefinementState:
        n, device = block.n_particles, block.disc.device
        sums = HalfSets.empty(block.n_pixels, device=device)
        return cls(0, placed, blank_poses(n, device), Fit.blank(n, device), sums)


class Posing:
    """A block of particles on its way: placed, then refined; made by :meth:`BlockPosing.begin`.

    Parameters
    ----------
    volumes
        Of the halves, up to the band limit.
    """

    def __init__(
        self,
        placement: Placement,
        volumes: tuple[SampledVolume, SampledVolume],
        noise: NoiseSpectrum,
        band_limit: int,
        n_iterations: int,
    ) -> None:
        self.placement = placement
        self.volumes = volumes
        self.noise = noise
        self.band_limit = band_limit
        self.n_iterations = n_iterations
        self.block, self.half_set = placement.particles, placement.half_set
        self.chunks = chunks_of_halves(self.half_set)
        self.refined: BlockRefinementState | None = None

    @property
    def finished(self) -> bool:
        return self.refined is not None and self.refined.n_chunks_done >= len(self.chunks)

    @torch.no_grad()
    def step(self) -> None:
        """Place or refine one chunk of particles."""
        if self.refined is not None:
            self._refine(self.refined)
            return
        self.placement.step()
        if self.placement.finished:
            placed = self.placement.result().particles
            assert placed is not None
            self.refined = BlockRefinementState.at_start(placed, self.block)

    def result(self) -> PosedBlock:
        """What came of the block."""
        assert self.refined is not None
        found = self.refined
        half_sets = symmetrized_half_sets(found.half_sets, self.placement.group)
        return PosedBlock(replace(found.placed, poses=found.poses, fit=found.fit), half_sets)

    def state(self) -> PlacementState | BlockRefinementState:
        """All that has changed since the work began; see :class:`~cryoai.training.stages.base.Stage`."""
        return self.refined or self.placement.state()

    def restore(self, state: PlacementState | BlockRefinementState) -> None:
        """Go on from the state of work that was begun in the same way."""
        if isinstance(state, PlacementState):
            self.placement.restore(state)
        else:
            self.refined = state

    def _refine(self, found: BlockRefinementState) -> None:
        """Refine one chunk, and add it to what was found."""
        rows = self.chunks[found.n_chunks_done]
        block, half, noise = self.block, int(self.half_set[rows[0]]), self.noise
        imaging, full = block.imaging(self.band_limit), block.imaging(block.disc.max_radius)
        batch, start = block.batch(rows), selected_poses(found.placed.poses, rows)
        poses = refine_coarse_to_fine(batch, start, self.volumes[half], imaging, noise, self.n_iterations).poses
        found.half_sets.sums[half].add(batch, poses, full, noise.precision(full))
        assign_poses(found.poses, rows, poses)
        found.fit.assign(rows, fit_to_other_half(block, rows, poses, self.volumes[1 - half], self.band_limit, noise))
        self.refined = replace(found, n_chunks_done=found.n_chunks_done + 1)


def fit_to_other_half(
    particles: PreparedParticles,
    rows: Tensor,
    poses: Poses,
    other: SampledVolume,
    band_limit: int,
    noise: NoiseSpectrum,
) -> Fit:
    """How particles ``rows`` (B,), all of one half, fit the map of the other half, which knows nothing of them."""
    imaging = particles.imaging(band_limit)
    batch = particles.batch(rows, band_limit)
    predicted = imaging.predict(other, poses, batch.optics)
    return Fit.of(batch.coefficients, predicted, noise.precision(imaging))
