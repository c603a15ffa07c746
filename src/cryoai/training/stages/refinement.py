"""The Refinement stage: rounds of local refinement with independent half sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryoai.half_maps import HalfMaps
from cryoai.noise import Fit, NoiseSpectrum
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses, selected_poses
from cryoai.reconstruction import HalfSets
from cryoai.second_chance import SearchPlan
from cryoai.symmetry.averaging import symmetrized_half_sets
from cryoai.symmetry.groups import PointGroup
from cryoai.training.stages.base import Estimate
from cryoai.training.stages.rounds import (
    Judgement,
    JudgementState,
    Pass,
    PassState,
    Round,
    SecondSearch,
    SecondSearchState,
    Task,
)
from cryoai.volumes import SampledVolume

__all__ = ["Refinement", "RefinementMetrics", "RefinementState"]

# Poses that are right at one band limit are near enough at this many times it.
_GROWTH = 1.5
_FEWEST_ROUNDS = 3
_NOISE_PILOT = 2000


@dataclass(frozen=True, eq=False)
class RefinementState:
    """The round, the poses (N,), and the part of the round that is on its way."""

    round: Round
    poses: Poses
    part: SecondSearchState | PassState | JudgementState


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
        self.estimate = estimate
        self.searches = {plan.after_rounds: plan for plan in searches}
        self.mask = mask
        self.max_rounds = max_rounds
        self.task = Task(particles, half_set, group.to(particles.disc.device), n_iterations, defocus_std_in_angstroms)
        placed = estimate.particles.poses
        self.poses = Poses(placed.rotations.clone(), placed.shifts_in_angstroms.clone())
        self.round = self._first_round(estimate.half_sets, estimate.half_maps)
        self.part = self._first_part()
        self._settle()

    @property
    def finished(self) -> bool:
        return isinstance(self.part, Judgement) and self.part.finished

    @property
    def progress(self) -> float:
        if self.finished:
            return 1.0
        # As many rounds as the band limit needs to grow to the Nyquist frequency, as far as known.
        to_grow = math.log(self.task.full.max_radius / self.round.band_limit, _GROWTH)
        done = self.round.number + (self.part.progress if isinstance(self.part, Pass) else 0)
        return done / max(done, min(self.max_rounds, self.round.number + 1 + to_grow))

    @torch.no_grad()
    def step(self) -> RefinementMetrics:
        self.part.step()
        self._settle()
        current = self._known()
        return RefinementMetrics(
            current.number,
            current.band_limit,
            current.half_maps.resolution_in_angstroms,
            current.n_searched,
            current.n_moved,
        )

    def result(self) -> Estimate:
        assert self.estimate.particles is not None
        assert isinstance(self.part, Judgement)
        last = self.round
        changes = last.defocus_changes_in_angstroms if self.task.defocus_std_in_angstroms else None
        fit = self.part.state.fit
        refined = replace(self.estimate.particles, poses=self.poses, fit=fit, defocus_change=changes)
        sets, maps = last.half_sets, last.half_maps
        return replace(self.estimate, particles=refined, half_sets=sets, half_maps=maps, noise=last.noise)

    def state(self) -> RefinementState:
        return RefinementState(self.round, self.poses, self.part.state)

    def restore(self, state: RefinementState) -> None:
        self.round, self.poses = state.round, state.poses
        self.part = self._part(state.part)

    def _settle(self) -> None:
        """Go on to a part in which there is something left to do, if any is."""
        while self.part.finished and not self.finished:
            if isinstance(self.part, Pass):
                self.part = self._after(self.part.state)
            else:
                self.round = self._known()
                self.part = self._part(PassState.at_start(self.task.particles))

    def _part(self, state: SecondSearchState | PassState | JudgementState) -> SecondSearch | Pass | Judgement:
        """The part of the round that has come so far."""
        if isinstance(state, SecondSearchState):
            return SecondSearch(self.task, self.round, self.poses, self.searches[self.round.number], state)
        if isinstance(state, PassState):
            return Pass(self.task, self.round, self.poses, state)
        return Judgement(self.task, self.round, self.poses, state)

    def _first_part(self) -> SecondSearch | Pass | Judgement:
        if self.round.number in self.searches:
            return self._part(SecondSearchState.at_start(self.task.particles.n_particles))
        return self._part(PassState.at_start(self.task.particles))

    def _after(self, found: PassState) -> SecondSearch | Pass | Judgement:
        """What comes after a pass: the next round, or the end."""
        particles, before = self.task.particles, self.round
        half_sets = symmetrized_half_sets(found.half_sets, self.task.group)
        half_maps = HalfMaps.of(half_sets, particles.pixel_size_in_angstroms, self.mask)
        number = before.number + 1
        band_limit = self._next_band_limit(half_maps, int(_GROWTH * before.band_limit))
        ends = number >= self.max_rounds or (number >= _FEWEST_ROUNDS and band_limit <= before.band_limit)
        self.round = replace(
            before,
            number=number,
            # At the end as far as the maps go, which is how far any other image will be compared with them.
            band_limit=self._next_band_limit(half_maps, self.task.full.max_radius)
            if ends
            else max(band_limit, before.band_limit),
            half_sets=half_sets,
            half_maps=half_maps,
            noise=NoiseSpectrum(found.power_left / particles.n_particles),
            fit=found.fit,
            defocus_changes_in_angstroms=found.defocus_changes_in_angstroms,
        )
        return self._part(JudgementState.at_start(particles)) if ends else self._first_part()

    def _known(self) -> Round:
        """The round, with the counts of the search if it is on its way."""
        search, before = self.part, self.round
        if not isinstance(search, SecondSearch):
            return before
        n_searched, n_moved = before.n_searched + search.n_searched, before.n_moved + search.n_moved
        return replace(before, n_searched=n_searched, n_moved=n_moved)

    def _first_round(self, half_sets: HalfSets, half_maps: HalfMaps) -> Round:
        """As the particles were placed."""
        n, device = self.task.particles.n_particles, self.task.particles.disc.device
        reference = self.estimate.reference
        known = half_maps.n_resolved_shells if reference is None else reference.max_radius
        band_limit = self._next_band_limit(half_maps, known)
        noise = self._noise_left(half_maps.references(half_sets, band_limit), band_limit)
        return Round(0, band_limit, half_sets, half_maps, noise, Fit.blank(n, device), torch.zeros(n), 0, 0)

    @torch.no_grad()
    def _noise_left(self, references: tuple[Tensor, Tensor], band_limit: int) -> NoiseSpectrum:
        """What the first maps leave of some images."""
        particles, full = self.task.particles, self.task.full
        volumes = [SampledVolume.from_map(density, band_limit) for density in references]
        chunks = self.task.chunks
        left, n = torch.zeros(full.max_radius + 1, device=particles.disc.device), 0
        for rows in chunks[:: max(1, len(chunks) * len(chunks[0]) // _NOISE_PILOT)]:
            batch = particles.batch(rows)
            poses = selected_poses(self.poses, rows)
            predicted = full.predict(volumes[self.task.half_of(rows)], poses, batch.optics)
            left += NoiseSpectrum.of_residuals(batch.coefficients - predicted, full).variance * len(rows)
            n += len(rows)
        return NoiseSpectrum(left / n)

    def _next_band_limit(self, half_maps: HalfMaps, most: int) -> int:
        return max(4, min(self.task.full.max_radius, half_maps.n_resolved_shells + 1, most))
