"""The Refinement stage: rounds of local refinement with independent half sets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryoai.noise import NoiseSpectrum
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses, assign_poses, selected_poses
from cryoai.reconstruction import HalfSets
from cryoai.refinement import refine_poses
from cryoai.training.stages.base import Estimate, chunks_of_halves
from cryoai.volumes import SampledVolume

__all__ = ["Refinement", "RefinementMetrics"]


@dataclass(frozen=True)
class RefinementMetrics:
    """What a step reports."""

    round: int
    band_limit: int
    resolution_in_angstroms: float

    @property
    def headline(self) -> str:
        return f"round {self.round}, half maps agree to {self.resolution_in_angstroms:.1f} Å"


class Refinement:
    """Rounds of local refinement of every pose against the map of the particle's own half set.

    A round is one pass over the particles: pose, then add to the next maps. Between rounds the half
    maps are compared; the band limit of a round is one shell beyond the last resolved one and grows
    by at most four shells. The stage ends when it grows no more.
    """

    name = "refinement"
    _GROWTH = 4

    def __init__(
        self,
        particles: PreparedParticles,
        estimate: Estimate,
        half_set: Tensor,
        *,
        max_rounds: int,
        n_iterations: int,
    ) -> None:
        if estimate.particles is None or estimate.half_sets is None or estimate.reference is None:
            raise ValueError("refinement needs placed particles")
        self.particles = particles
        self.estimate = estimate
        self.half_set = half_set
        self.max_rounds = max_rounds
        self.n_iterations = n_iterations
        self.poses = Poses(
            estimate.particles.poses.rotations.clone(), estimate.particles.poses.shifts_in_angstroms.clone()
        )
        self.chunks = chunks_of_halves(half_set)
        self.full = particles.imaging(particles.disc.max_radius)
        self.noise = particles.power(torch.arange(particles.n_particles), self.full.max_radius)
        self.round = 0
        self.finished = False
        self.half_sets = estimate.half_sets
        self.half_maps = self.half_sets.half_maps()
        self.band_limit = self._next_band_limit(estimate.reference.max_radius)
        self._begin_round()

    @property
    def progress(self) -> float:
        if self.finished:
            return 1.0
        # As many rounds as the band limit needs to grow to the Nyquist frequency, as far as known.
        to_grow = max(0, self.full.max_radius - self.band_limit) / self._GROWTH
        done = self.round + self.n_chunks_done / len(self.chunks)
        return done / max(done, min(self.max_rounds, self.round + 1 + to_grow))

    @torch.no_grad()
    def step(self) -> RefinementMetrics:
        rows = self.chunks[self.n_chunks_done]
        half = int(self.half_set[rows[0]])
        batch = self.particles.batch(rows)
        imaging = self.particles.imaging(self.band_limit)
        precision = self.noise.precision(imaging)
        refined = refine_poses(
            batch, selected_poses(self.poses, rows), self.volumes[half], imaging, precision, self.n_iterations
        )
        assign_poses(self.poses, rows, refined.poses)
        self.next_sets.sums[half].add(batch, refined.poses, self.full, self.noise.precision(self.full))
        predicted = self.full.predict(self.volumes[half], refined.poses, batch.optics)
        residual = NoiseSpectrum.of_residuals(batch.coefficients - predicted, self.full)
        self.residual_power += residual.variance * (len(rows) / self.particles.n_particles)
        self.n_chunks_done += 1
        if self.n_chunks_done == len(self.chunks):
            self._end_round()
        resolution = self.half_maps.resolution_in_angstroms(self.particles.pixel_size_in_angstroms)
        return RefinementMetrics(self.round, self.band_limit, resolution)

    def result(self) -> Estimate:
        assert self.estimate.particles is not None
        return replace(
            self.estimate, particles=replace(self.estimate.particles, poses=self.poses), half_sets=self.half_sets
        )

    def _begin_round(self) -> None:
        first, second = self.half_sets.references(self.half_maps, self.band_limit)
        self.volumes = tuple(
            SampledVolume.from_map(density, self.band_limit, with_gradient=True) for density in (first, second)
        )
        self.next_sets = HalfSets.empty(self.particles.n_pixels, device=self.particles.disc.device)
        self.residual_power = torch.zeros_like(self.noise.variance)
        self.n_chunks_done = 0

    def _end_round(self) -> None:
        self.round += 1
        self.noise = NoiseSpectrum(self.residual_power)
        self.half_sets = self.next_sets
        self.half_maps = self.half_sets.half_maps()
        band_limit = self._next_band_limit(self.band_limit + self._GROWTH)
        self.finished = self.round >= self.max_rounds or band_limit <= self.band_limit
        if not self.finished:
            self.band_limit = band_limit
            self._begin_round()

    def _next_band_limit(self, most: int) -> int:
        return max(4, min(self.full.max_radius, self.half_maps.n_resolved_shells + 1, most))
