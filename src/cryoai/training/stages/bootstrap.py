"""The Bootstrap stage: stochastic searches from random starts, in two halves that know nothing of each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import roma
import torch
from torch import Tensor

from cryoai.alignment import FrameChange, align_maps, change_frame
from cryoai.bootstrap import (
    BootstrapSchedule,
    Reference,
    SearchState,
    StochasticSearch,
    held_out_poses,
    search_box,
)
from cryoai.fourier import fourier_shell_correlation, soft_sphere
from cryoai.particles import PreparedParticles
from cryoai.search import Candidates
from cryoai.symmetry.detection import find_symmetry, place_symmetry
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
from cryoai.training.stages.base import Estimate, StartAgreement

__all__ = ["Bootstrap", "BootstrapMetrics", "BootstrapState"]

# With fewer particles in a half, a start needs all of them, and the halves then have it in common.
_FEWEST_IN_A_HALF = 500
_HELD_OUT = 500
_PATIENCE = 3
_N_TURNS = 8
# Shells before it tell where the density is and not what it is like.
_FIRST_SHELL = 2
_ALIKE_IN_DEGREES = 20.0
# Maps of noise can be laid over each other so that a spot of one covers a spot of the other; the poses then tell.
_SIMILAR = 0.5
# Maps are aligned at low resolution, where the search for the rotation is fine enough.
_ALIGNMENT_RADIUS = 10


@dataclass(frozen=True)
class BootstrapMetrics:
    """What a step reports."""

    start: int
    step: int
    band_limit: int
    log_likelihood: float

    @property
    def headline(self) -> str:
        return f"start {self.start}, log-likelihood {self.log_likelihood:.1f}"


@dataclass(frozen=True, eq=False)
class _Start:
    """Where a start ended: its map, the poses of held-out particles by it, the half that it was made from."""

    reference: Reference
    held_out: Candidates
    half: int

    @property
    def log_likelihood(self) -> float:
        return float(self.held_out.log_likelihoods.mean())


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two starts, the likelier one first, and the change that brings the second to the frame of the first."""

    first: _Start
    second: _Start
    change: FrameChange
    moved: Tensor
    agreement: StartAgreement

    @classmethod
    def of(cls, first: _Start, second: _Start, pixel_size_in_angstroms: float, asked: PointGroup) -> _Pair:
        if second.log_likelihood > first.log_likelihood:
            first, second = second, first
        a, b = first.reference.density, second.reference.density
        radius = min(first.reference.max_radius, second.reference.max_radius)
        change = align_maps(b, a, max_radius=min(radius, _ALIGNMENT_RADIUS))
        moved = change_frame(b, change)
        in_angstroms = replace(change, shift=change.shift * pixel_size_in_angstroms)
        there = in_angstroms.of_poses(second.held_out.poses[:, 0])
        maps = float(_excess_correlation(a, moved)[_FIRST_SHELL : radius + 1].clamp_min(0).mean())
        group = _group_of_both(a, moved, asked) if maps > _SIMILAR else PointGroup.named("C1").to(a.device)
        distance = symmetric_distance_in_degrees(there.rotations, first.held_out.poses[:, 0].rotations, group)
        agreement = StartAgreement(
            poses=float((distance < _ALIKE_IN_DEGREES).float().mean()),
            maps=maps,
        )
        return cls(first, second, change, moved, agreement)

    def half_references(self) -> tuple[Reference, Reference]:
        """The maps of half 0 and half 1, in the frame of the first start."""
        maps = {self.first.half: self.first.reference}
        maps[self.second.half] = replace(self.second.reference, density=self.moved)
        return maps[0], maps[1]


@dataclass(frozen=True, eq=False)
class BootstrapState:
    """The starts that have ended, how many there shall be, and the one that is on its way."""

    ended: list[_Start]
    n_planned: int
    search: SearchState


class Bootstrap:
    """Stochastic searches from random starts, each in one half of the particles.

    Odd and even starts see different halves, so that two that agree have found the same structure
    twice, without a common word: the gold standard of half maps, from nothing. The pair that agrees
    best wins; its second map is turned, as a whole, to the frame of the first. Small sets are not
    divided: every start then sees all particles, and the likeliest wins.

    Parameters
    ----------
    half_set : (N,) int
        0 or 1 for every particle.
    group
        Symmetry of the molecule, as far as it is known: poses that it makes equal count as equal.
    n_starts, max_starts
        Starts that are always made, and starts at most: more are made while no two agree, each of three times
        the steps, because what short starts miss is mostly found by longer ones.
    max_images
        Random images that all starts together may draw from.
    """

    name = "bootstrap"

    def __init__(
        self,
        particles: PreparedParticles,
        half_set: Tensor,
        schedule: BootstrapSchedule,
        group: PointGroup,
        *,
        n_starts: int,
        max_starts: int,
        max_images: int,
        generator: torch.Generator,
    ) -> None:
        self.particles = particles.cropped(search_box(schedule.last_radius, particles.n_pixels))
        self.schedule = schedule
        self.group = group
        self.max_starts = max_starts
        self.generator = generator
        self.n_starts = self.n_planned = n_starts
        shuffled = torch.randperm(particles.n_particles, generator=generator)[:max_images]
        n_held_out = min(_HELD_OUT, max(len(shuffled) // 10, min(len(shuffled) // 3, 100)))
        self.held_out = shuffled[:n_held_out].sort().values
        rest = shuffled[n_held_out:].sort().values
        halves = [rest[half_set[rest] == half] for half in (0, 1)]
        divided = n_starts > 1 and min(map(len, halves)) >= _FEWEST_IN_A_HALF
        self.subsets = halves if divided else [rest]
        self.ended: list[_Start] = []
        self.pairs: list[_Pair] = []
        self.search = self._new_search()

    @property
    def finished(self) -> bool:
        return len(self.ended) >= self.n_planned

    @property
    def progress(self) -> float:
        steps = self.n_starts + _PATIENCE * (self.n_planned - self.n_starts)
        begun = 0.0 if self.finished else self.search.steps_done / self.schedule.n_steps
        ended = min(len(self.ended), self.n_starts) + _PATIENCE * max(0, len(self.ended) - self.n_starts)
        return (ended + begun) / steps

    def step(self) -> BootstrapMetrics:
        self.search.step()
        done = self.search.steps_done
        radius = self.search.schedule.radius(done)
        metrics = BootstrapMetrics(len(self.ended) + 1, done, radius, self.search.log_likelihood)
        if self.search.finished:
            self._end_start()
        return metrics

    def result(self) -> Estimate:
        best = self._best_pair()
        if best is None or len(self.subsets) == 1:
            likeliest = max(self.ended, key=lambda start: start.log_likelihood)
            if best is None:
                return Estimate(reference=likeliest.reference)
            # What two have found is more than what one finds likely.
            found = best.first if best.agreement.is_one_structure else likeliest
            return Estimate(reference=found.reference, start_agreement=best.agreement)
        return Estimate(
            reference=best.first.reference,
            half_references=best.half_references(),
            start_agreement=best.agreement,
        )

    def state(self) -> BootstrapState:
        return BootstrapState(self.ended, self.n_planned, self.search.state())

    def restore(self, state: BootstrapState) -> None:
        for start in state.ended:
            self._enter(start)
        self.n_planned = state.n_planned
        self.search = self._new_search()
        self.search.restore(state.search)

    def _new_search(self) -> StochasticSearch:
        subset = self.subsets[len(self.ended) % len(self.subsets)]
        longer = _PATIENCE if len(self.ended) >= self.n_starts else 1
        schedule = replace(self.schedule, n_steps=longer * self.schedule.n_steps)
        return StochasticSearch(self.particles, subset, schedule, self.generator)

    @torch.no_grad()
    def _end_start(self) -> None:
        reference = self.search.reference()
        found = held_out_poses(self.particles, self.held_out, reference, self.search.trials)
        start = _Start(reference, found, half=len(self.ended) % len(self.subsets))
        self._enter(start)
        best = self._best_pair()
        if self.finished and self.n_planned < self.max_starts and not (best and best.agreement.is_one_structure):
            self.n_planned += 1
        if not self.finished:
            self.search = self._new_search()

    @torch.no_grad()
    def _enter(self, start: _Start) -> None:
        """Compare a start with those before it that know nothing of it, and join it to them."""
        partners = [other for other in self.ended if len(self.subsets) == 1 or other.half != start.half]
        pixel_size = self.particles.pixel_size_in_angstroms
        self.pairs += [_Pair.of(other, start, pixel_size, self.group) for other in partners]
        self.ended.append(start)

    def _best_pair(self) -> _Pair | None:
        return max(self.pairs, key=lambda pair: pair.agreement.poses + pair.agreement.maps, default=None)


def _group_of_both(first: Tensor, second: Tensor, asked: PointGroup) -> PointGroup:
    """The symmetry of what two maps have in common, in their frame: the one asked for, or found; else C1."""
    if len(asked) > 1:
        placed = place_symmetry(first, second, asked)
        return PointGroup.named("C1").to(first.device) if placed is None else placed.group_of_map
    likely = next((candidate for candidate in find_symmetry(first, second) if candidate.is_likely), None)
    if likely is None:
        return PointGroup.named("C1").to(first.device)
    return likely.group_of_map


def _excess_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Fourier shell correlation (n // 2 + 1,) of two maps beyond that of the same maps in random orientations.

    Whatever is in the middle of a box and round correlates with everything else that is.
    """
    n = first.shape[-1]
    mask = soft_sphere(n, 0.42 * n, 0.08 * n, device=first.device)
    turns = roma.random_rotmat(_N_TURNS, generator=torch.Generator().manual_seed(0))
    unmoved = torch.zeros(3)
    turned = [change_frame(second, FrameChange(turn, mirrored=False, shift=unmoved)) for turn in turns]
    chance = torch.stack([fourier_shell_correlation(first * mask, other * mask) for other in turned]).mean(0)
    found = fourier_shell_correlation(first * mask, second * mask)
    return (found - chance) / (1 - chance).clamp_min(1e-3)
