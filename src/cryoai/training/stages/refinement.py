"""The Refinement stage: rounds of local refinement with independent half sets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
from cryoai.symmetry.averaging import symmetrized_half_sets
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
from cryoai.training.stages.base import Estimate, chunks_of_halves, reliable_from
from cryoai.training.stages.blocks import fit_to_other_half
from cryoai.volumes import SampledVolume

__all__ = ["Refinement", "RefinementMetrics"]

# Poses that are right at one band limit are near enough at this many times it.
_GROWTH = 1.5
_FEWEST_ROUNDS = 3
# So many particles are searched for first, to learn from which fit on nothing better is to be found: that
# above which the search improved on at most this share of them.
_PILOT, _MISSED = 1000, 0.002
_OTHER_ANSWER_IN_DEGREES = 10.0
_NOISE_PILOT = 2000
# A fit so many standard deviations below the usual halves the weight of an image in the map.
_HALF_WEIGHT_AT = -3.0
# One in fifty of the right ones fits so many deviations below the usual.
_BADLY = -2.0


@dataclass(frozen=True)
class RefinementMetrics:
    """What a step reports."""

    round: int
    band_limit: int
    resolution_in_angstroms: float
    given_a_second_chance: int
    moved_by_it: int

    @property
    def headline(self) -> str:
        found = f"round {self.round}, half maps agree to {self.resolution_in_angstroms:.1f} Å"
        if not self.given_a_second_chance:
            return found
        return f"{found}; {self.given_a_second_chance:,} searched for again, {self.moved_by_it:,} found elsewhere"


class Refinement:
    """Rounds of local refinement of every pose against the map of the particle's own half set.

    A round is one pass over the particles: pose, then add to the next maps. Between rounds the half
    maps are compared; the band limit of a round is one shell beyond the last resolved one and grows
    by at most half. The stage ends when it grows no more. Between rounds, particles that
    do not fit well are searched for in the map of their half, all over again.

    An image enters its map with a weight: less where there is more noise in it than in the others,
    and little where it does not fit at all, as one that shows something else.

    Parameters
    ----------
    half_set : (N,) int
        0 or 1 for every particle.
    searches
        For particles that do not fit.
    group
        Symmetry that the maps are given, with its axes where they belong.
    defocus_std_in_angstroms
        How far off the stated defocus may be; each particle's is refined then. 0 to leave it.
    mask : (n, n, n)
        In which half maps are compared; found from them where none is given.
    """

    name = "refinement"

    def __init__(
        self,
        particles: PreparedParticles,
        estimate: Estimate,
        half_set: Tensor,
        searches: Sequence[SearchPlan],
        group: PointGroup,
        *,
        max_rounds: int,
        n_iterations: int,
        defocus_std_in_angstroms: float = 0.0,
        mask: Tensor | None = None,
    ) -> None:
        if estimate.particles is None or estimate.half_sets is None or estimate.half_maps is None:
            raise ValueError("refinement needs placed particles")
        self.particles = particles
        self.estimate = estimate
        self.half_set = half_set
        self.searches = {plan.after_rounds: plan for plan in searches}
        self.group = group.to(particles.disc.device)
        self.mask = mask
        self.max_rounds = max_rounds
        self.n_iterations = n_iterations
        self.defocus_std_in_angstroms = defocus_std_in_angstroms
        self.stated_optics = particles.optics
        self.defocus_changes = torch.zeros(particles.n_particles)
        placed = estimate.particles.poses
        self.poses = Poses(placed.rotations.clone(), placed.shifts_in_angstroms.clone())
        self.fit = Fit.blank(particles.n_particles, particles.disc.device)
        self.chunks = chunks_of_halves(half_set)
        self.full = particles.imaging(particles.disc.max_radius)
        self.round = self.n_chunks_done = self.n_searched = self.n_moved = 0
        self.finished = False
        self.half_sets = estimate.half_sets
        self.half_maps = estimate.half_maps
        known = self.half_maps.n_resolved_shells if estimate.reference is None else estimate.reference.max_radius
        self.band_limit = self._next_band_limit(known)
        self.noise = self._noise_left()
        self.work = self._work()

    @property
    def progress(self) -> float:
        if self.finished:
            return 1.0
        # As many rounds as the band limit needs to grow to the Nyquist frequency, as far as known.
        to_grow = math.log(self.full.max_radius / self.band_limit, _GROWTH)
        done = self.round + self.n_chunks_done / len(self.chunks)
        return done / max(done, min(self.max_rounds, self.round + 1 + to_grow))

    @torch.no_grad()
    def step(self) -> RefinementMetrics:
        self.finished = next(self.work, None) is None
        return RefinementMetrics(
            self.round, self.band_limit, self.half_maps.resolution_in_angstroms, self.n_searched, self.n_moved
        )

    def result(self) -> Estimate:
        assert self.estimate.particles is not None
        changes = self.defocus_changes if self.defocus_std_in_angstroms else None
        refined = replace(self.estimate.particles, poses=self.poses, fit=self.fit, defocus_change=changes)
        sets, maps = self.half_sets, self.half_maps
        return replace(self.estimate, particles=refined, half_sets=sets, half_maps=maps, noise=self.noise)

    def _work(self) -> Iterator[int]:
        """One chunk of particles after the other, round after round."""
        while True:
            references = self.half_maps.references(self.half_sets, self.band_limit)
            if self.round in self.searches:
                yield from self._second_chances(references, self.searches[self.round])
            yield from self._pass(references)
            self.round += 1
            band_limit = self._next_band_limit(int(_GROWTH * self.band_limit))
            if self.round >= self.max_rounds or (self.round >= _FEWEST_ROUNDS and band_limit <= self.band_limit):
                break
            self.band_limit = max(band_limit, self.band_limit)
        yield from self._judge()

    def _pass(self, references: tuple[Tensor, Tensor]) -> Iterator[int]:
        """Refine all poses, and make the next maps and the next estimate of the noise."""
        imaging = self.particles.imaging(self.band_limit)
        volumes = [SampledVolume.from_map(density, self.band_limit, with_gradient=True) for density in references]
        weigh = _weights(self.fit)
        sets = HalfSets.empty(self.particles.n_pixels, device=self.particles.disc.device)
        left = torch.zeros_like(self.noise.variance)
        precision, full_precision = self.noise.precision(imaging), self.noise.precision(self.full)
        for rows in self.chunks:
            half = int(self.half_set[rows[0]])
            batch = self.particles.batch(rows)
            start = selected_poses(self.poses, rows)
            refined = refine_poses(batch, start, volumes[half], imaging, precision, self.n_iterations).poses
            assign_poses(self.poses, rows, refined)
            if self.defocus_std_in_angstroms:
                batch = self._with_defocus_refined(batch, refined, volumes[half], imaging, precision)
            sets.sums[half].add(batch, refined, self.full, full_precision, weigh[batch.indices])
            predicted = self.full.predict(volumes[half], refined, batch.optics)
            self.fit.assign(rows, Fit.of(batch.coefficients, predicted, full_precision))
            left += NoiseSpectrum.of_residuals(batch.coefficients - predicted, self.full).variance * len(rows)
            self.n_chunks_done += 1
            yield len(rows)
        self.n_chunks_done = 0
        self.particles = replace(self.particles, optics=with_defocus_changed(self.stated_optics, self.defocus_changes))
        self.noise = NoiseSpectrum(left / self.particles.n_particles)
        self.half_sets = symmetrized_half_sets(sets, self.group)
        self.half_maps = HalfMaps.of(self.half_sets, self.particles.pixel_size_in_angstroms, self.mask)

    def _with_defocus_refined(
        self, batch: ParticleBatch, poses: Poses, volume: SampledVolume, imaging: ImagingModel, precision: Tensor
    ) -> ParticleBatch:
        """The particles with their defocus refined, and noted; the prior is about the one that was stated."""
        rows = batch.indices.cpu()
        optics = self.stated_optics[rows].to(batch.indices.device)
        changes = refine_defocus(
            replace(batch, optics=optics),
            poses,
            volume,
            imaging,
            precision,
            prior_std_in_angstroms=self.defocus_std_in_angstroms,
            n_iterations=self.n_iterations,
        )
        self.defocus_changes[rows] = changes.cpu()
        return replace(batch, optics=with_defocus_changed(optics, changes))

    def _judge(self) -> Iterator[int]:
        """See how every image fits the map of the half that it is not part of."""
        references = self.half_maps.references(self.half_sets, self.band_limit)
        volumes = [SampledVolume.from_map(density, self.band_limit) for density in references]
        for rows in self.chunks:
            other = volumes[1 - int(self.half_set[rows[0]])]
            poses = selected_poses(self.poses, rows)
            fit = fit_to_other_half(self.particles, rows, poses, other, self.band_limit, self.noise)
            self.fit.assign(rows, fit)
            yield len(rows)

    def _second_chances(self, references: tuple[Tensor, Tensor], plan: SearchPlan) -> Iterator[int]:
        """Search for particles that do not fit, from scratch."""
        searches = [
            SecondChance.against(
                density,
                self.particles,
                self.noise,
                plan.trials,
                max_radius=self.band_limit,
                search_radius=min(plan.max_radius, self.band_limit),
            )
            for density in references
        ]
        missed = torch.zeros(self.particles.n_particles, dtype=torch.bool)
        if plan.worst_share is None:
            pilot = self._pilot()
            yield from self._search(pilot, searches, missed)
            fit = self.fit.z_scores.cpu()
            doubtful = (fit < reliable_from(fit[pilot], missed[pilot], _MISSED)) & ~pilot
        else:
            doubtful = self._worst(plan.worst_share)
        yield from self._search(doubtful, searches, missed)

    def _pilot(self) -> Tensor:
        """Some particles (N,), spread over all."""
        n = self.particles.n_particles
        pilot = torch.zeros(n, dtype=torch.bool)
        pilot[torch.linspace(0, n - 1, min(_PILOT, n)).long()] = True
        return pilot

    def _worst(self, share: float) -> Tensor:
        """The particles (N,) that fit worst, at most a share of them, if they fit worse than they should."""
        relative = _relative_fit(self.fit).cpu()
        return relative < torch.quantile(relative, share).clamp(max=_BADLY)

    def _search(self, which: Tensor, searches: list[SecondChance], missed: Tensor) -> Iterator[int]:
        """Search for particles ``which`` (N,), keep what is likelier, note in ``missed`` (N,) what was elsewhere."""
        for half, search in enumerate(searches):
            # Of nothing split leaves one empty part.
            for rows in filter(len, (which & (self.half_set == half)).nonzero().flatten().split(256)):
                had = search.judge(rows, selected_poses(self.poses, rows))
                best = had.better_of(search(rows, self.n_iterations))
                distance = symmetric_distance_in_degrees(best.poses.rotations, had.poses.rotations, self.group)
                missed[rows] = (distance > _OTHER_ANSWER_IN_DEGREES).cpu()
                assign_poses(self.poses, rows, best.poses)
                self.n_searched += len(rows)
                self.n_moved += int(missed[rows].sum())
                yield len(rows)

    @torch.no_grad()
    def _noise_left(self) -> NoiseSpectrum:
        """What the first maps leave of some images."""
        references = self.half_maps.references(self.half_sets, self.band_limit)
        volumes = [SampledVolume.from_map(density, self.band_limit) for density in references]
        chunks = self.chunks[:: max(1, len(self.chunks) * len(self.chunks[0]) // _NOISE_PILOT)]
        left, n = torch.zeros(self.full.max_radius + 1, device=self.particles.disc.device), 0
        for rows in chunks:
            batch = self.particles.batch(rows)
            volume = volumes[int(self.half_set[rows[0]])]
            predicted = self.full.predict(volume, selected_poses(self.poses, rows), batch.optics)
            left += NoiseSpectrum.of_residuals(batch.coefficients - predicted, self.full).variance * len(rows)
            n += len(rows)
        return NoiseSpectrum(left / n)

    def _next_band_limit(self, most: int) -> int:
        return max(4, min(self.full.max_radius, self.half_maps.n_resolved_shells + 1, most))


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
