"""The Bootstrap stage: stochastic searches from several random starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cryoai.bootstrap import (
    BootstrapSchedule,
    Reference,
    StochasticSearch,
    agreement,
    held_out_poses,
    search_box,
)
from cryoai.particles import PreparedParticles
from cryoai.search import Candidates
from cryoai.training.stages.base import Estimate

__all__ = ["AGREEMENT_OF_EQUAL_MAPS", "Bootstrap", "BootstrapMetrics"]

AGREEMENT_OF_EQUAL_MAPS = 0.5
"""Share of held-out particles that two starts must pose alike to count as the same map."""


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
        return any(value is not None and value > AGREEMENT_OF_EQUAL_MAPS for value in agreements)

    def _agreement_with(self, index: int) -> float | None:
        """How well the start that agrees best with this one does; None if there is no other."""
        others = [poses for i, (_, poses) in enumerate(self.ended) if i != index]
        return max((agreement(other, self.ended[index][1]) for other in others), default=None)
