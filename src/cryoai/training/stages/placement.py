"""The Placement stage: the first pose of every particle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryoai.bootstrap import BootstrapSchedule, Reference, search_box
from cryoai.model import CryoAI
from cryoai.particles import ParticleBatch, PreparedParticles
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.reconstruction import HalfSets
from cryoai.refinement import RefinedPoses, refine_poses
from cryoai.search import Templates, TrialPoses, search_poses, shift_grid
from cryoai.training.stages.base import Estimate, ParticlePoses, assign_poses, blank_poses, chunks_of_halves
from cryoai.volumes import SampledVolume

__all__ = ["Placement", "PlacementMetrics", "trial_poses"]

# Two poses of one particle nearer than this are one answer.
_SAME_ANSWER_IN_DEGREES = 10.0


@dataclass(frozen=True)
class PlacementMetrics:
    """What a step reports."""

    n_placed: int
    from_encoder: float
    sources_agree: float

    @property
    def headline(self) -> str:
        return f"{self.from_encoder:.0%} posed by the encoder, {self.sources_agree:.0%} by both alike"


class Placement:
    """The first pose of every particle: the likeliest of all that encoder and search propose.

    One pass over the particles. Every proposal is refined locally against the common reference
    before it is judged. The images enter the sums of their half sets on the way.

    Parameters
    ----------
    half_set : (N,) int
        0 or 1 for every particle.
    trials
        Poses to search; None to rely on the encoder.
    n_iterations
        Steps of local refinement of each proposal at each of three band limits; 0 for none.
    """

    name = "placement"

    def __init__(
        self,
        particles: PreparedParticles,
        estimate: Estimate,
        half_set: Tensor,
        trials: TrialPoses | None,
        *,
        n_iterations: int,
    ) -> None:
        if estimate.reference is None or (trials is None and estimate.model is None):
            raise ValueError("placement needs a reference, and trial poses or an encoder")
        self.particles = particles
        self.estimate = estimate
        self.reference = estimate.reference
        self.n_iterations = n_iterations
        self.half_set = half_set
        self.chunks = chunks_of_halves(half_set)
        self.n_chunks_done = 0
        self.n_placed = 0
        self.coarse = particles.cropped(search_box(self.reference.max_radius, particles.n_pixels))
        self.volume = self.reference.at_box(self.coarse.n_pixels).sampled()
        radius = self.reference.max_radius
        self.radii = sorted({max(4, radius // 2), max(4, 3 * radius // 4), radius})
        device = particles.disc.device
        imaging = self.coarse.imaging(radius)
        self.templates = None if trials is None else Templates.of(self.volume, trials, imaging)
        n = particles.n_particles
        self.full = particles.imaging(particles.disc.max_radius)
        self.full_precision = particles.power(torch.arange(n), self.full.max_radius).precision(self.full)
        self.half_sets = HalfSets.empty(particles.n_pixels, device=device)
        self.poses = blank_poses(n, device)
        self.encoder = None if estimate.model is None else _Encoder.of(estimate.model, particles, self.reference)
        self.from_encoder = torch.zeros(n, dtype=torch.bool, device=device)
        self.sources_agree = torch.zeros(n, dtype=torch.bool, device=device)

    @property
    def finished(self) -> bool:
        return self.n_chunks_done >= len(self.chunks)

    @property
    def progress(self) -> float:
        return self.n_chunks_done / len(self.chunks)

    @torch.no_grad()
    def step(self) -> PlacementMetrics:
        rows = self.chunks[self.n_chunks_done]
        best = self._place(rows)
        assign_poses(self.poses, rows, best.poses)
        sums = self.half_sets.sums[int(self.half_set[rows[0]])]
        sums.add(self.particles.batch(rows), best.poses, self.full, self.full_precision)
        self.n_chunks_done += 1
        self.n_placed += len(rows)
        return PlacementMetrics(
            self.n_placed,
            float(self.from_encoder.sum()) / self.n_placed,
            float(self.sources_agree.sum()) / self.n_placed,
        )

    def result(self) -> Estimate:
        encoder_poses = None if self.encoder is None else self.encoder.poses
        placed = ParticlePoses(self.poses, self.from_encoder, self.sources_agree, encoder_poses, self.poses)
        return replace(self.estimate, particles=placed, half_sets=self.half_sets)

    def _place(self, rows: Tensor) -> RefinedPoses:
        batch = self.coarse.batch(rows, self.reference.max_radius)
        proposals = []
        if self.templates is not None:
            proposals.append(self._refined(batch, self._searched(batch, self.templates)))
        if self.encoder is not None:
            proposals.append(self._refined(batch, self.encoder.place(rows)))
        index = rows.to(self.poses.rotations.device)
        if len(proposals) == 1:
            self.from_encoder[index] = self.templates is None
            return proposals[0]
        searched, encoded_refined = proposals
        self.from_encoder[index] = encoded_refined.log_likelihoods > searched.log_likelihoods
        distance = angular_distance_in_degrees(encoded_refined.poses.rotations, searched.poses.rotations)
        self.sources_agree[index] = distance < _SAME_ANSWER_IN_DEGREES
        return searched.better_of(encoded_refined)

    def _searched(self, batch: ParticleBatch, templates: Templates) -> Poses:
        imaging = self.coarse.imaging(self.reference.max_radius)
        precision = self.reference.noise.precision(imaging)
        return search_poses(batch, templates, imaging, precision, 1).poses[:, 0]

    def _refined(self, batch: ParticleBatch, start: Poses) -> RefinedPoses:
        poses = start
        for radius in self.radii if self.n_iterations else ():
            imaging = self.coarse.imaging(radius)
            precision = self.reference.noise.precision(imaging)
            poses = refine_poses(batch, poses, self.volume, imaging, precision, self.n_iterations).poses
        imaging = self.coarse.imaging(self.reference.max_radius)
        return refine_poses(batch, poses, self.volume, imaging, self.reference.noise.precision(imaging), 0)


@dataclass(frozen=True, eq=False)
class _Encoder:
    """The model with all that it needs to place particles, and the table (N,) of where it placed them."""

    model: CryoAI
    particles: PreparedParticles
    volume: SampledVolume
    precision: Tensor
    poses: Poses

    @classmethod
    def of(cls, model: CryoAI, particles: PreparedParticles, reference: Reference) -> _Encoder:
        imaging = model.imaging
        box = imaging.disc.n_pixels
        return cls(
            model,
            particles.cropped(box),
            # Lattices are in cycles per pixel: the same physical map, at the encoder's box.
            reference.at_box(box).sampled(imaging.max_radius),
            reference.noise.precision(imaging),
            blank_poses(particles.n_particles, particles.disc.device),
        )

    def place(self, rows: Tensor) -> Poses:
        """The likeliest hypothesis for each of the particles; it also enters the table."""
        batch = self.particles.batch(rows, self.model.imaging.max_radius)
        hypotheses = self.model.propose(batch, self.precision)
        poses = self.model.judge(batch, hypotheses, self.volume, self.precision).poses
        assign_poses(self.poses, rows, poses)
        return poses


def trial_poses(particles: PreparedParticles, schedule: BootstrapSchedule, n_rotations: int) -> TrialPoses:
    """The search grid of a schedule, with another number of rotations."""
    extent = particles.n_pixels * particles.pixel_size_in_angstroms
    shifts = shift_grid(schedule.shift_step_in_boxes * extent, schedule.n_shift_steps, device=particles.disc.device)
    return TrialPoses.grid(n_rotations // 2, shifts)
