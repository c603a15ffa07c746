"""The Placement stage: the first pose of every particle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryoai.bootstrap import BootstrapSchedule, Reference, search_box
from cryoai.half_maps import HalfMaps
from cryoai.imaging import ImagingModel
from cryoai.model import CryoAI
from cryoai.noise import Fit, NoiseSpectrum, fit_z_scores
from cryoai.particles import ParticleBatch, PreparedParticles
from cryoai.poses import Poses, assign_poses, blank_poses
from cryoai.reconstruction import HalfSets
from cryoai.refinement import RefinedPoses, refine_coarse_to_fine
from cryoai.search import Templates, TrialPoses, search_poses
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
from cryoai.training.stages.base import Estimate, ParticlePoses, chunks_of_halves, reliable_from
from cryoai.volumes import SampledVolume

__all__ = ["Placement", "PlacementMetrics", "PlacementState", "trial_poses"]

# Two poses of one particle nearer than this are one answer.
_SAME_ANSWER_IN_DEGREES = 10.0
# So many particles are asked of both encoder and search, to learn from which fit on the encoder can be
# relied upon: that above which the search finds something better for at most this share.
_PILOT = 2000
_MISSED = 0.001


@dataclass(frozen=True, eq=False)
class PlacementState:
    """How far the pass over the particles has come; tables are (N,)."""

    n_chunks_done: int
    n_placed: int
    good_fit: float | None
    poses: Poses
    encoder_poses: Poses | None
    from_encoder: Tensor
    sources_agree: Tensor
    searched: Tensor
    fit: Tensor
    missed: Tensor
    half_sets: HalfSets


@dataclass(frozen=True)
class PlacementMetrics:
    """What a step reports."""

    n_placed: int
    from_encoder: float
    searched: float

    @property
    def headline(self) -> str:
        return f"{self.from_encoder:.0%} posed by the encoder, {self.searched:.0%} also searched"


class Placement:
    """The first pose of every particle: the encoder's where it fits, else the likelier of it and a search's.

    One pass over the particles. Every proposal is refined locally against the reference of the particle's
    half before it is judged. Of the first two thousand, spread over the stack, all are searched too; from then
    on only those whose fit to the encoder's pose is such that the search had something better to
    offer. The images enter the sums of their half sets on the way.

    Parameters
    ----------
    half_set : (N,) int
        0 or 1 for every particle.
    trials
        Poses to search; None to rely on the encoder.
    group
        Under which poses count as the same answer.
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
        group: PointGroup,
        *,
        n_iterations: int,
    ) -> None:
        if estimate.reference is None or (trials is None and estimate.model is None):
            raise ValueError("placement needs a reference, and trial poses or an encoder")
        self.particles = particles
        self.estimate = estimate
        references = estimate.half_references or (estimate.reference, estimate.reference)
        self.max_radius = min(reference.max_radius for reference in references)
        self.n_iterations = n_iterations
        self.half_set = half_set
        self.group = group.to(particles.disc.device)
        self.chunks = _spread(chunks_of_halves(half_set))
        self.n_chunks_done = 0
        self.n_placed = 0
        self.coarse = particles.cropped(search_box(self.max_radius, particles.n_pixels))
        self.imaging = self.coarse.imaging(self.max_radius)
        self.sides = [_Side.of(reference, trials, self.imaging) for reference in references]
        device = particles.disc.device
        n = particles.n_particles
        self.full = particles.imaging(particles.disc.max_radius)
        self.full_precision = particles.power(torch.arange(n), self.full.max_radius).precision(self.full)
        self.half_sets = HalfSets.empty(particles.n_pixels, device=device)
        self.poses = blank_poses(n, device)
        self.encoder = None if estimate.model is None else _Encoder.of(estimate.model, particles, references)
        self.from_encoder = torch.zeros(n, dtype=torch.bool, device=device)
        self.sources_agree = torch.zeros(n, dtype=torch.bool, device=device)
        self.searched = torch.zeros(n, dtype=torch.bool, device=device)
        self.fit = torch.full((n,), -torch.inf, device=device)
        self.missed = torch.zeros(n, dtype=torch.bool, device=device)
        self.good_fit: float | None = None

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
            float(self.searched.sum()) / self.n_placed,
        )

    def result(self) -> Estimate:
        encoder_poses = None if self.encoder is None else self.encoder.poses
        fit = Fit.blank(self.particles.n_particles, self.particles.disc.device)
        placed = ParticlePoses(
            self.poses, self.from_encoder, self.searched, self.sources_agree, encoder_poses, self.poses, fit
        )
        half_maps = HalfMaps.of(self.half_sets, self.particles.pixel_size_in_angstroms)
        return replace(self.estimate, particles=placed, half_sets=self.half_sets, half_maps=half_maps)

    def state(self) -> PlacementState:
        return PlacementState(
            self.n_chunks_done,
            self.n_placed,
            self.good_fit,
            self.poses,
            None if self.encoder is None else self.encoder.poses,
            self.from_encoder,
            self.sources_agree,
            self.searched,
            self.fit,
            self.missed,
            self.half_sets,
        )

    def restore(self, state: PlacementState) -> None:
        self.n_chunks_done, self.n_placed, self.good_fit = state.n_chunks_done, state.n_placed, state.good_fit
        self.poses, self.half_sets = state.poses, state.half_sets
        self.from_encoder, self.sources_agree = state.from_encoder, state.sources_agree
        self.searched, self.fit, self.missed = state.searched, state.fit, state.missed
        if self.encoder is not None:
            assert state.encoder_poses is not None
            self.encoder = replace(self.encoder, poses=state.encoder_poses)

    def _place(self, rows: Tensor) -> RefinedPoses:
        half = int(self.half_set[rows[0]])
        side = self.sides[half]
        batch = self.coarse.batch(rows, self.max_radius)
        index = batch.indices
        if self.encoder is None:
            self.searched[index] = True
            return self._searched(batch, side)
        encoded = self._refined(batch, self.encoder.place(rows, half), side)
        self.from_encoder[index] = True
        if side.templates is None:
            return encoded
        self.fit[index] = self._fit(batch, encoded.poses, side)
        doubtful = self._doubtful(index)
        if bool(doubtful.any()):
            searched = self._searched(batch[doubtful], side)
            self._compare(index[doubtful], encoded[doubtful], searched)
            encoded = encoded.with_better(doubtful, searched)
        return encoded

    def _doubtful(self, index: Tensor) -> Tensor:
        """Which (B,) of the particles just posed by the encoder are to be searched for."""
        if self.n_placed < _PILOT:
            return torch.ones_like(index, dtype=torch.bool)
        if self.good_fit is None:
            self.good_fit = reliable_from(self.fit[self.searched], self.missed[self.searched], _MISSED)
        return self.fit[index] < self.good_fit

    def _compare(self, index: Tensor, encoded: RefinedPoses, searched: RefinedPoses) -> None:
        """Write down for the particles ``index`` which source was right."""
        likelier = searched.log_likelihoods > encoded.log_likelihoods
        distance = symmetric_distance_in_degrees(encoded.poses.rotations, searched.poses.rotations, self.group)
        self.searched[index] = True
        self.sources_agree[index] = distance < _SAME_ANSWER_IN_DEGREES
        self.missed[index] = likelier & (distance >= _SAME_ANSWER_IN_DEGREES)
        self.from_encoder[index] = ~likelier

    def _searched(self, batch: ParticleBatch, side: _Side) -> RefinedPoses:
        assert side.templates is not None
        precision = side.noise.precision(self.imaging)
        found = search_poses(batch, side.templates, self.imaging, precision, 1).poses[:, 0]
        return self._refined(batch, found, side)

    def _fit(self, batch: ParticleBatch, poses: Poses, side: _Side) -> Tensor:
        predicted = self.imaging.predict(side.volume, poses, batch.optics)
        return fit_z_scores(batch.coefficients, predicted, side.noise.precision(self.imaging))

    def _refined(self, batch: ParticleBatch, start: Poses, side: _Side) -> RefinedPoses:
        return refine_coarse_to_fine(batch, start, side.volume, self.imaging, side.noise, self.n_iterations)


@dataclass(frozen=True, eq=False)
class _Side:
    """What one half of the particles is posed against."""

    volume: SampledVolume
    noise: NoiseSpectrum
    templates: Templates | None

    @classmethod
    def of(cls, reference: Reference, trials: TrialPoses | None, imaging: ImagingModel) -> _Side:
        volume = reference.at_box(imaging.disc.n_pixels).sampled(imaging.max_radius)
        templates = None if trials is None else Templates.of(volume, trials, imaging)
        return cls(volume, reference.noise, templates)


@dataclass(frozen=True, eq=False)
class _Encoder:
    """The model with all that it needs to place particles, and the table (N,) of where it placed them."""

    model: CryoAI
    particles: PreparedParticles
    volumes: tuple[SampledVolume, SampledVolume]
    noises: tuple[NoiseSpectrum, NoiseSpectrum]
    poses: Poses

    @classmethod
    def of(cls, model: CryoAI, particles: PreparedParticles, references: tuple[Reference, Reference]) -> _Encoder:
        imaging = model.imaging
        box = imaging.disc.n_pixels
        # Lattices are in cycles per pixel: the same physical map, at the encoder's box.
        first, second = (reference.at_box(box).sampled(imaging.max_radius) for reference in references)
        return cls(
            model,
            particles.cropped(box),
            (first, second),
            (references[0].noise, references[1].noise),
            blank_poses(particles.n_particles, particles.disc.device),
        )

    def place(self, rows: Tensor, half: int) -> Poses:
        """The likeliest hypothesis for each of the particles, all of one half; it also enters the table."""
        batch = self.particles.batch(rows, self.model.imaging.max_radius)
        # Not refined, because a search costs less than to refine many hypotheses of every particle.
        poses = self.model.place(batch, self.volumes[half], self.noises[half], n_iterations=0).poses
        assign_poses(self.poses, rows, poses)
        return poses


def _spread(chunks: list[Tensor]) -> list[Tensor]:
    """The chunks in an order whose beginning is spread over all of them."""
    stride = max(1, len(chunks) // 4)
    return [chunk for offset in range(stride) for chunk in chunks[offset::stride]]


def trial_poses(particles: PreparedParticles, schedule: BootstrapSchedule, n_rotations: int) -> TrialPoses:
    """The search grid of a schedule, with another number of rotations."""
    extent = particles.n_pixels * particles.pixel_size_in_angstroms
    return replace(schedule, n_rotations=n_rotations).trials(extent, particles.disc.device)
