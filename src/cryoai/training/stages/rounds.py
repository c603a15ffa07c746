"""The parts of a round of Refinement: a search, the pass over the particles, and in the end the judgement of them.

Each works through its chunks of particles and can be left after any of them. What it goes by does not change
while it lasts (:class:`Task`, :class:`Round`); what it has found, with how far it is, is its state, and of that
it can be made again. Only the poses are shared: searches and passes write them in place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cryoai.defocus import refine_defocus, with_defocus_changed
from cryoai.half_maps import HalfMaps
from cryoai.imaging import ImagingModel
from cryoai.noise import Fit, NoiseSpectrum
from cryoai.particles import ParticleBatch, PreparedParticles
from cryoai.poses import Poses, assign_poses, selected_poses
from cryoai.reconstruction import HalfSets
from cryoai.refinement import refine_poses
from cryoai.second_chance import SearchPlan, SecondChance
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
from cryoai.training.stages.base import chunks_of_halves, reliable_from
from cryoai.training.stages.blocks import fit_to_other_half
from cryoai.volumes import SampledVolume

__all__ = ["Judgement", "JudgementState", "Pass", "PassState", "Round", "SecondSearch", "SecondSearchState", "Task"]

# So many particles are searched for first, to learn from which fit on nothing better is to be found: that
# above which the search improved on at most this share of them.
_PILOT, _MISSED = 1000, 0.002
_OTHER_ANSWER_IN_DEGREES = 10.0
# A fit so many standard deviations below the usual halves the weight of an image in the map.
_HALF_WEIGHT_AT = -3.0
# One in fifty of the right ones fits so many deviations below the usual.
_BADLY = -2.0


@dataclass(frozen=True, eq=False)
class Task:
    """What is refined and how, in all rounds.

    Attributes
    ----------
    particles
        With the defocus that was stated.
    half_set : (N,) int
        0 or 1 for every particle.
    defocus_std_in_angstroms
        How far off the stated defocus may be; 0 to leave it.
    """

    particles: PreparedParticles
    half_set: Tensor
    group: PointGroup
    n_iterations: int
    defocus_std_in_angstroms: float

    @cached_property
    def chunks(self) -> list[Tensor]:
        """All particles, the halves apart."""
        return chunks_of_halves(self.half_set)

    @property
    def full(self) -> ImagingModel:
        """The images up to the Nyquist frequency."""
        return self.particles.imaging(self.particles.disc.max_radius)

    def half_of(self, rows: Tensor) -> int:
        """The half set of particles that are all of one."""
        return int(self.half_set[rows[0]])


@dataclass(frozen=True, eq=False)
class Round:
    """What a round begins with.

    Attributes
    ----------
    number
        Of the rounds before.
    half_sets, half_maps
        That the particles are posed against.
    fit : (N,)
        Of the images to the maps; not a number before the first round.
    defocus_changes_in_angstroms : (N,)
        To be added to what was stated.
    n_searched, n_moved
        Particles that were searched for so far, and those of them that were found elsewhere.
    """

    number: int
    band_limit: int
    half_sets: HalfSets
    half_maps: HalfMaps
    noise: NoiseSpectrum
    fit: Fit
    defocus_changes_in_angstroms: Tensor
    n_searched: int
    n_moved: int

    def references(self) -> tuple[Tensor, Tensor]:
        """The map (n, n, n) of each half."""
        return self.half_maps.references(self.half_sets, self.band_limit)

    def particles(self, task: Task) -> PreparedParticles:
        """The particles with their defocus as it is known by now."""
        stated = task.particles
        return replace(stated, optics=with_defocus_changed(stated.optics, self.defocus_changes_in_angstroms))


@dataclass(frozen=True, eq=False)
class SecondSearchState:
    """How many chunks are done, and which particles (N,) were found elsewhere; that is written in place."""

    n_chunks_done: int
    missed: Tensor

    @classmethod
    def at_start(cls, n_particles: int) -> SecondSearchState:
        return cls(0, torch.zeros(n_particles, dtype=torch.bool))


class SecondSearch:
    """Searches from scratch for particles that do not fit, and keeps what is likelier.

    For the worst of them; or for a sample first, and then for all that fit so badly that something better was
    found for those of the sample that do.
    """

    def __init__(self, task: Task, current: Round, poses: Poses, plan: SearchPlan, state: SecondSearchState) -> None:
        self.task = task
        self.fit = current.fit
        self.poses = poses
        self.worst_share = plan.worst_share
        self.state = state
        self.searches = [
            SecondChance.against(
                density,
                current.particles(task),
                current.noise,
                plan.trials,
                max_radius=current.band_limit,
                search_radius=min(plan.max_radius, current.band_limit),
            )
            for density in current.references()
        ]
        self.chunks = self._known_chunks()

    @property
    def finished(self) -> bool:
        return self.state.n_chunks_done >= len(self.chunks)

    @property
    def n_searched(self) -> int:
        return sum(map(len, self.chunks[: self.state.n_chunks_done]))

    @property
    def n_moved(self) -> int:
        return int(self.state.missed.sum())

    def step(self) -> None:
        """Search for one chunk."""
        rows, missed = self.chunks[self.state.n_chunks_done], self.state.missed
        search = self.searches[self.task.half_of(rows)]
        had = search.judge(rows, selected_poses(self.poses, rows))
        best = had.better_of(search(rows, self.task.n_iterations))
        distance = symmetric_distance_in_degrees(best.poses.rotations, had.poses.rotations, self.task.group)
        missed[rows] = (distance > _OTHER_ANSWER_IN_DEGREES).cpu()
        assign_poses(self.poses, rows, best.poses)
        self.state = replace(self.state, n_chunks_done=self.state.n_chunks_done + 1)
        if self.finished:
            self.chunks = self._known_chunks()

    def _known_chunks(self) -> list[Tensor]:
        """The particles to search for: as long as there is a sample to be done, no others are known."""
        if self.worst_share is not None:
            return self._chunks(_worst(self.fit, self.worst_share).cpu())
        sample = _spread_over(self.task.particles.n_particles)
        chunks = self._chunks(sample)
        if self.state.n_chunks_done < len(chunks):
            return chunks
        fit = self.fit.z_scores.cpu()
        doubtful = fit < reliable_from(fit[sample], self.state.missed[sample], _MISSED)
        return chunks + self._chunks(doubtful & ~sample)

    def _chunks(self, which: Tensor) -> list[Tensor]:
        """The particles ``which`` (N,), the halves apart."""
        rows = which.nonzero().flatten()
        return [rows[part] for part in chunks_of_halves(self.task.half_set[rows])]


@dataclass(frozen=True, eq=False)
class PassState:
    """What a pass has found; written in place.

    Attributes
    ----------
    half_sets
        Of the particles that are done, at their new poses.
    power_left : (n // 2 + 1,)
        In each shell what their predictions leave unexplained of them, summed.
    fit : (N,)
        Of the images to their predictions.
    defocus_changes_in_angstroms : (N,)
        To be added to what was stated.
    """

    n_chunks_done: int
    half_sets: HalfSets
    power_left: Tensor
    fit: Fit
    defocus_changes_in_angstroms: Tensor

    @classmethod
    def at_start(cls, particles: PreparedParticles) -> PassState:
        n, device = particles.n_particles, particles.disc.device
        half_sets = HalfSets.empty(particles.n_pixels, device=device)
        power_left = torch.zeros(particles.disc.max_radius + 1, device=device)
        return cls(0, half_sets, power_left, Fit.blank(n, device), torch.zeros(n))


class Pass:
    """Refines all poses, each against the map of its half, and gathers the next maps and the noise."""

    def __init__(self, task: Task, current: Round, poses: Poses, state: PassState) -> None:
        self.task = task
        self.poses = poses
        self.state = state
        self.particles = current.particles(task)
        self.volumes = [
            SampledVolume.from_map(density, current.band_limit, with_gradient=True) for density in current.references()
        ]
        self.weights = _weights(current.fit)
        self.full, self.imaging = task.full, self.particles.imaging(current.band_limit)
        self.full_precision = current.noise.precision(self.full)
        self.precision = current.noise.precision(self.imaging)

    @property
    def finished(self) -> bool:
        return self.state.n_chunks_done >= len(self.task.chunks)

    @property
    def progress(self) -> float:
        """Share of it that is done."""
        return self.state.n_chunks_done / len(self.task.chunks)

    def step(self) -> None:
        """Refine one chunk, and add it to what was found."""
        found, rows = self.state, self.task.chunks[self.state.n_chunks_done]
        half = self.task.half_of(rows)
        batch, start = self.particles.batch(rows), selected_poses(self.poses, rows)
        volume, n_iterations = self.volumes[half], self.task.n_iterations
        refined = refine_poses(batch, start, volume, self.imaging, self.precision, n_iterations).poses
        assign_poses(self.poses, rows, refined)
        if self.task.defocus_std_in_angstroms:
            batch = self._with_defocus_refined(batch, refined, volume)
        weights = self.weights[batch.indices]
        found.half_sets.sums[half].add(batch, refined, self.full, self.full_precision, weights)
        predicted = self.full.predict(volume, refined, batch.optics)
        found.fit.assign(rows, Fit.of(batch.coefficients, predicted, self.full_precision))
        left = NoiseSpectrum.of_residuals(batch.coefficients - predicted, self.full)
        found.power_left.add_(left.variance * len(rows))
        self.state = replace(found, n_chunks_done=found.n_chunks_done + 1)

    def _with_defocus_refined(self, batch: ParticleBatch, poses: Poses, volume: SampledVolume) -> ParticleBatch:
        """The particles with their defocus refined, and noted; the prior is about the one that was stated."""
        rows = batch.indices.cpu()
        optics = self.task.particles.optics[rows].to(batch.indices.device)
        changes = refine_defocus(
            replace(batch, optics=optics),
            poses,
            volume,
            self.imaging,
            self.precision,
            prior_std_in_angstroms=self.task.defocus_std_in_angstroms,
            n_iterations=self.task.n_iterations,
        )
        self.state.defocus_changes_in_angstroms[rows] = changes.cpu()
        return replace(batch, optics=with_defocus_changed(optics, changes))


@dataclass(frozen=True, eq=False)
class JudgementState:
    """How many chunks are done, and the fits (N,) of their images; those are written in place."""

    n_chunks_done: int
    fit: Fit

    @classmethod
    def at_start(cls, particles: PreparedParticles) -> JudgementState:
        return cls(0, Fit.blank(particles.n_particles, particles.disc.device))


class Judgement:
    """Sees how every image fits the map of the half that it is not part of."""

    def __init__(self, task: Task, current: Round, poses: Poses, state: JudgementState) -> None:
        self.task = task
        self.current = current
        self.poses = poses
        self.state = state
        self.particles = current.particles(task)
        self.volumes = [SampledVolume.from_map(density, current.band_limit) for density in current.references()]

    @property
    def finished(self) -> bool:
        return self.state.n_chunks_done >= len(self.task.chunks)

    def step(self) -> None:
        """Judge one chunk."""
        rows = self.task.chunks[self.state.n_chunks_done]
        other, poses = self.volumes[1 - self.task.half_of(rows)], selected_poses(self.poses, rows)
        band_limit, noise = self.current.band_limit, self.current.noise
        self.state.fit.assign(rows, fit_to_other_half(self.particles, rows, poses, other, band_limit, noise))
        self.state = replace(self.state, n_chunks_done=self.state.n_chunks_done + 1)


def _spread_over(n_particles: int) -> Tensor:
    """Some particles (N,), spread over all."""
    sample = torch.zeros(n_particles, dtype=torch.bool)
    sample[torch.linspace(0, n_particles - 1, min(_PILOT, n_particles)).long()] = True
    return sample


def _worst(fit: Fit, share: float) -> Tensor:
    """The particles (N,) that fit worst, at most a share of them, if they fit worse than they should."""
    relative = _relative_fit(fit)
    return relative < torch.quantile(relative, share).clamp(max=_BADLY)


def _weights(fit: Fit) -> Tensor:
    """Weight (N,) of each image in the map; 1 as long as nothing is known of them."""
    if bool(fit.z_scores.isnan().any()):
        return torch.ones_like(fit.z_scores)
    return torch.sigmoid(_relative_fit(fit) - _HALF_WEIGHT_AT) / fit.noise_scales.clamp_min(1e-3)


def _relative_fit(fit: Fit) -> Tensor:
    """Fits (N,) in deviations from the usual one."""
    centre = fit.z_scores.median()
    # Of a normal distribution the median deviation is 0.6745 standard deviations.
    spread = ((fit.z_scores - centre).abs().median() / 0.6745).clamp_min(1e-3)
    return (fit.z_scores - centre) / spread
