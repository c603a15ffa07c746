"""The stages of a reconstruction, each an object with the same small interface.

A stage is stepped until it is finished and then adds what it found to the :class:`Estimate`, which
the next stage starts from. The loop does not know which stage it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cryoai.bootstrap import (
    BootstrapSchedule,
    Reference,
    StochasticSearch,
    agreement,
    held_out_poses,
    search_box,
)
from cryoai.model import CryoAI
from cryoai.noise import NoiseSpectrum
from cryoai.particles import ParticleBatch, PreparedParticles
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.reconstruction import HalfMaps, HalfSets
from cryoai.refinement import RefinedPoses, refine_poses
from cryoai.search import Candidates, Templates, TrialPoses, search_poses, shift_grid
from cryoai.volumes import SampledVolume

__all__ = ["Bootstrap", "Estimate", "Metrics", "Placement", "Refinement", "Stage", "trial_poses"]

_CHUNK = 256
# Two poses of one particle nearer than this are one answer.
_SAME_ANSWER_IN_DEGREES = 10.0
_AGREEMENT_OF_EQUAL_MAPS = 0.5


class Metrics(Protocol):
    """What a step reports: a frozen dataclass of numbers."""

    @property
    def headline(self) -> str:
        """The most telling of the numbers, for the progress line."""


@dataclass(frozen=True, eq=False)
class ParticlePoses:
    """A pose for every particle and where its start came from.

    Attributes
    ----------
    poses
        (N,), the current ones.
    from_encoder : (N,) bool
        Whether the likelier start was the encoder's; otherwise it was the search's.
    sources_agree : (N,) bool
        Whether both starts led to the same answer within 10°.
    encoder : Poses or None
        The encoder's own (N,), before any refinement.
    start : Poses
        (N,), when all particles had been placed.
    """

    poses: Poses
    from_encoder: Tensor
    sources_agree: Tensor
    encoder: Poses | None
    start: Poses


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is known of the map and the poses; every stage adds to it."""

    reference: Reference | None = None
    start_agreement: float | None = None
    model: CryoAI | None = None
    particles: ParticlePoses | None = None
    half_sets: HalfSets | None = None


class Stage(Protocol):
    """One stage; ``name`` is for people."""

    name: str

    @property
    def progress(self) -> float:
        """Share of the work that is done, 0 to 1."""

    @property
    def finished(self) -> bool: ...

    def step(self) -> Metrics:
        """Advance by one batch."""

    def result(self) -> Estimate:
        """The estimate that the stage started from, with its own findings."""


# ------------------------------------------------------------------------------ bootstrap


@dataclass(frozen=True)
class BootstrapMetrics:
    start: int
    step: int
    band_limit: int
    log_likelihood: float

    @property
    def headline(self) -> str:
        return f"start {self.start}, log-likelihood {self.log_likelihood:.1f}"


class Bootstrap:
    """Stochastic searches from several random starts; the best by held-out likelihood wins.

    Parameters
    ----------
    n_starts, max_starts
        Starts that are always made, and starts at most: more are made while no two agree.
    """

    name = "bootstrap"

    def __init__(
        self,
        particles: PreparedParticles,
        schedule: BootstrapSchedule,
        *,
        n_starts: int,
        max_starts: int,
        max_images: int,
        generator: torch.Generator,
    ) -> None:
        self.particles = particles.cropped(search_box(schedule.last_radius, particles.n_pixels))
        self.schedule = schedule
        self.max_starts = max_starts
        self.generator = generator
        self.n_planned = n_starts
        n = particles.n_particles
        shuffled = torch.randperm(n, generator=generator)[:max_images]
        n_held_out = min(500, max(len(shuffled) // 10, min(len(shuffled) // 3, 100)))
        self.held_out = shuffled[:n_held_out].sort().values
        self.subset = shuffled[n_held_out:].sort().values
        self.ended: list[tuple[Reference, Candidates]] = []
        self.search = self._new_search()

    @property
    def finished(self) -> bool:
        return len(self.ended) >= self.n_planned

    @property
    def progress(self) -> float:
        done = len(self.ended) + (0 if self.finished else self.search.steps_done / self.schedule.n_steps)
        return done / self.n_planned

    def step(self) -> BootstrapMetrics:
        self.search.step()
        done = self.search.steps_done
        metrics = BootstrapMetrics(len(self.ended) + 1, done, self.schedule.radius(done), self.search.log_likelihood)
        if self.search.finished:
            self._end_start()
        return metrics

    def result(self) -> Estimate:
        likelihoods = [float(candidates.log_likelihoods.mean()) for _, candidates in self.ended]
        best = max(range(len(self.ended)), key=likelihoods.__getitem__)
        return Estimate(reference=self.ended[best][0], start_agreement=self._agreement_with(best))

    def _new_search(self) -> StochasticSearch:
        return StochasticSearch(self.particles, self.subset, self.schedule, self.generator)

    def _end_start(self) -> None:
        reference = self.search.reference()
        self.ended.append((reference, held_out_poses(self.particles, self.held_out, reference, self.search.trials)))
        if self.finished and self.n_planned < self.max_starts and not self._some_agree():
            self.n_planned += 1
        if not self.finished:
            self.search = self._new_search()

    def _some_agree(self) -> bool:
        agreements = [self._agreement_with(index) for index in range(len(self.ended))]
        return any(value is not None and value > _AGREEMENT_OF_EQUAL_MAPS for value in agreements)

    def _agreement_with(self, index: int) -> float | None:
        """How well the start that agrees best with this one does; None if there is no other."""
        others = [poses for i, (_, poses) in enumerate(self.ended) if i != index]
        return max((agreement(other, self.ended[index][1]) for other in others), default=None)


# ------------------------------------------------------------------------------ placement


@dataclass(frozen=True)
class PlacementMetrics:
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
    searches
        Whether to search at all, beside the encoder; needed where there is no encoder.
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
        self.trials = trials
        self.n_iterations = n_iterations
        self.half_set = half_set
        self.chunks = _chunks_of_halves(half_set)
        self.n_chunks_done = 0
        self.n_placed = 0
        self.coarse = particles.cropped(search_box(self.reference.max_radius, particles.n_pixels))
        self.coarse_reference = self.reference.at_box(self.coarse.n_pixels)
        self.volume = self.coarse_reference.sampled()
        radius = self.reference.max_radius
        self.radii = sorted({max(4, radius // 2), max(4, 3 * radius // 4), radius})
        device = particles.disc.device
        imaging = self.coarse.imaging(radius)
        self.templates = None if trials is None else Templates.of(self.volume, trials, imaging)
        self.power = NoiseSpectrum.of_residuals(
            particles.batch(torch.arange(min(2000, particles.n_particles))).coefficients,
            particles.imaging(particles.disc.max_radius),
        )
        n = particles.n_particles
        self.half_sets = HalfSets.empty(particles.n_pixels, device=device)
        self.poses = _blank_poses(n, device)
        self.encoder_poses = None if estimate.model is None else _blank_poses(n, device)
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
        _assign(self.poses, rows, best.poses)
        full = self.particles.imaging(self.particles.disc.max_radius)
        sums = self.half_sets.sums[int(self.half_set[rows[0]])]
        sums.add(self.particles.batch(rows), best.poses, full, self.power.precision(full))
        self.n_chunks_done += 1
        self.n_placed += len(rows)
        return PlacementMetrics(
            self.n_placed,
            float(self.from_encoder.sum()) / self.n_placed,
            float(self.sources_agree.sum()) / self.n_placed,
        )

    def result(self) -> Estimate:
        placed = ParticlePoses(self.poses, self.from_encoder, self.sources_agree, self.encoder_poses, self.poses)
        return replace(self.estimate, particles=placed, half_sets=self.half_sets)

    def _place(self, rows: Tensor) -> RefinedPoses:
        batch = self.coarse.batch(rows, self.reference.max_radius)
        proposals = []
        if self.templates is not None:
            proposals.append(self._refined(batch, self._searched(batch)))
        if self.estimate.model is not None:
            encoded = self._encoded(rows)
            assert self.encoder_poses is not None
            _assign(self.encoder_poses, rows, encoded)
            proposals.append(self._refined(batch, encoded))
        index = rows.to(self.poses.rotations.device)
        if len(proposals) == 1:
            self.from_encoder[index] = self.templates is None
            return proposals[0]
        searched, encoded_refined = proposals
        self.from_encoder[index] = encoded_refined.log_likelihoods > searched.log_likelihoods
        distance = angular_distance_in_degrees(encoded_refined.poses.rotations, searched.poses.rotations)
        self.sources_agree[index] = distance < _SAME_ANSWER_IN_DEGREES
        return searched.better_of(encoded_refined)

    def _searched(self, batch: ParticleBatch) -> Poses:
        imaging = self.coarse.imaging(self.reference.max_radius)
        assert self.templates is not None
        precision = self.reference.noise.precision(imaging)
        return search_poses(batch, self.templates, imaging, precision, 1).poses[:, 0]

    def _encoded(self, rows: Tensor) -> Poses:
        model = self.estimate.model
        assert model is not None
        small = self.particles.cropped(model.imaging.disc.n_pixels)
        batch = small.batch(rows, model.imaging.max_radius)
        precision = self.reference.noise.precision(model.imaging)
        hypotheses = model.propose(batch, precision)
        # The same physical map; its lattice is in cycles per pixel of the encoder's box.
        volume = self.reference.at_box(model.imaging.disc.n_pixels).sampled(model.imaging.max_radius)
        return model.judge(batch, hypotheses, volume, precision).poses

    def _refined(self, batch: ParticleBatch, start: Poses) -> RefinedPoses:
        poses = start
        for radius in self.radii if self.n_iterations else ():
            imaging = self.coarse.imaging(radius)
            precision = self.reference.noise.precision(imaging)
            poses = refine_poses(batch, poses, self.volume, imaging, precision, self.n_iterations).poses
        imaging = self.coarse.imaging(self.reference.max_radius)
        return refine_poses(batch, poses, self.volume, imaging, self.reference.noise.precision(imaging), 0)


# ------------------------------------------------------------------------------ refinement


@dataclass(frozen=True)
class RefinementMetrics:
    round: int
    n_refined: int
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
        self.chunks = _chunks_of_halves(half_set)
        self.full = particles.imaging(particles.disc.max_radius)
        self.noise = NoiseSpectrum.of_residuals(
            particles.batch(torch.arange(min(2000, particles.n_particles))).coefficients, self.full
        )
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
            batch, _selected(self.poses, rows), self.volumes[half], imaging, precision, self.n_iterations
        )
        _assign(self.poses, rows, refined.poses)
        self.next_sets.sums[half].add(batch, refined.poses, self.full, self.noise.precision(self.full))
        predicted = self.full.predict(self.volumes[half], refined.poses, batch.optics)
        residual = NoiseSpectrum.of_residuals(batch.coefficients - predicted, self.full)
        self.residual_power += residual.variance * (len(rows) / self.particles.n_particles)
        self.n_chunks_done += 1
        if self.n_chunks_done == len(self.chunks):
            self._end_round()
        return RefinementMetrics(
            self.round, int(self.n_chunks_done * _CHUNK), self.band_limit, self._resolution(self.half_maps)
        )

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

    def _resolution(self, half_maps: HalfMaps) -> float:
        return half_maps.resolution_in_angstroms(self.particles.pixel_size_in_angstroms)


# ------------------------------------------------------------------------------ shared


def _chunks_of_halves(half_set: Tensor) -> list[Tensor]:
    """Rows in chunks that never mix the half sets."""

    def chunks() -> Iterator[Tensor]:
        for half in (0, 1):
            yield from (half_set == half).nonzero().flatten().split(_CHUNK)

    return list(chunks())


def _blank_poses(n_particles: int, device: torch.device) -> Poses:
    identity = torch.eye(3, device=device).expand(n_particles, 3, 3).clone()
    return Poses(identity, torch.zeros(n_particles, 2, device=device))


def _selected(poses: Poses, rows: Tensor) -> Poses:
    return poses[rows.to(poses.rotations.device)]


def _assign(table: Poses, rows: Tensor, poses: Poses) -> None:
    """Write poses (B,) into rows of a table (N,), in place."""
    index = rows.to(table.rotations.device)
    table.rotations[index] = poses.rotations
    table.shifts_in_angstroms[index] = poses.shifts_in_angstroms


def trial_poses(particles: PreparedParticles, schedule: BootstrapSchedule, n_rotations: int) -> TrialPoses:
    """The search grid of a schedule, with another number of rotations."""
    extent = particles.n_pixels * particles.pixel_size_in_angstroms
    shifts = shift_grid(schedule.shift_step_in_boxes * extent, schedule.n_shift_steps, device=particles.disc.device)
    return TrialPoses.grid(n_rotations // 2, shifts)
