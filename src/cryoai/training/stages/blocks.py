"""Posing particles that the maps of a run were not made from."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryoai.noise import Fit, NoiseSpectrum
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses, assign_poses, blank_poses
from cryoai.reconstruction import HalfSets
from cryoai.refinement import refine_coarse_to_fine
from cryoai.search import TrialPoses
from cryoai.training.stages.base import Estimate, ParticlePoses, chunks_of_halves
from cryoai.training.stages.placement import Placement
from cryoai.volumes import SampledVolume

__all__ = ["BlockPosing", "PosedBlock", "fit_to_other_half"]


@dataclass(frozen=True, eq=False)
class PosedBlock:
    """What came of a block: its table of poses (B,), and its half sets at them."""

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
    n_placement_iterations, n_iterations
        Local refinement steps; see the stages Placement and Refinement.
    """

    def __init__(
        self,
        estimate: Estimate,
        particles: PreparedParticles,
        trials: TrialPoses | None,
        *,
        n_placement_iterations: int,
        n_iterations: int,
    ) -> None:
        if estimate.half_sets is None or estimate.half_maps is None or estimate.reference is None:
            raise ValueError("only a run with half maps can pose further particles")
        self.trials = trials
        self.noise = estimate.noise
        self.n_placement_iterations = n_placement_iterations
        self.n_iterations = n_iterations
        half_maps = estimate.half_maps
        self.band_limit = max(4, min(particles.disc.max_radius, half_maps.n_resolved_shells + 1))
        references = half_maps.references(estimate.half_sets, self.band_limit)
        self.volumes = tuple(
            SampledVolume.from_map(density, self.band_limit, with_gradient=True) for density in references
        )
        first, second = (replace(estimate.reference, density=density) for density in references)
        self.start = Estimate(reference=estimate.reference, half_references=(first, second), model=estimate.model)

    def pose(self, block: PreparedParticles, half_set: Tensor) -> Generator[None, None, PosedBlock]:
        """Work through a block of particles (B,) of given half sets (B,); pauses now and then."""
        placement = Placement(block, self.start, half_set, self.trials, n_iterations=self.n_placement_iterations)
        while not placement.finished:
            placement.step()
            yield
        placed = placement.result().particles
        assert placed is not None
        return self._refined(block, placed, half_set)

    @torch.no_grad()
    def _refined(self, block: PreparedParticles, placed: ParticlePoses, half_set: Tensor) -> PosedBlock:
        device = block.disc.device
        poses, fit = blank_poses(block.n_particles, device), Fit.blank(block.n_particles, device)
        sums = HalfSets.empty(block.n_pixels, device=device)
        imaging, full = block.imaging(self.band_limit), block.imaging(block.disc.max_radius)
        noise = self.noise or block.power(torch.arange(block.n_particles), full.max_radius)
        for rows in chunks_of_halves(half_set):
            half, batch = int(half_set[rows[0]]), block.batch(rows)
            start = placed.poses[rows.to(device)]
            refined = refine_coarse_to_fine(batch, start, self.volumes[half], imaging, noise, self.n_iterations).poses
            sums.sums[half].add(batch, refined, full, noise.precision(full))
            assign_poses(poses, rows, refined)
            fit.assign(rows, fit_to_other_half(block, rows, refined, self.volumes[1 - half], self.band_limit, noise))
        return PosedBlock(replace(placed, poses=poses, fit=fit), sums)


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
