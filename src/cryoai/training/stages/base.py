"""What all stages share: the interface, and the estimate that they hand on.

A stage is stepped until it is finished and then adds what it found to the :class:`Estimate`, which
the next stage starts from. The loop does not know which stage it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cryoai.bootstrap import Reference
from cryoai.model import CryoAI
from cryoai.poses import Poses, assign_poses, blank_poses
from cryoai.reconstruction import HalfSets

__all__ = [
    "Estimate",
    "Metrics",
    "ParticlePoses",
    "Stage",
    "chunks_of_halves",
    "scatter",
]

_CHUNK = 256


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
        Whether the start was the encoder's; otherwise the search had a likelier one.
    searched : (N,) bool
        Whether there was a search at all.
    sources_agree : (N,) bool
        Whether encoder and search led to the same answer within 10°, where both were asked.
    encoder : Poses or None
        The encoder's own (N,), before any refinement.
    start : Poses
        (N,), when all particles had been placed.
    """

    poses: Poses
    from_encoder: Tensor
    searched: Tensor
    sources_agree: Tensor
    encoder: Poses | None
    start: Poses

    def among(self, rows: Tensor, n_particles: int) -> ParticlePoses:
        """A table of ``n_particles`` with these in its ``rows``, and no answer for the others."""
        device = self.poses.rotations.device
        from_encoder, searched, agree = torch.zeros((3, n_particles), dtype=torch.bool, device=device)
        encoder = None if self.encoder is None else blank_poses(n_particles, device)
        poses, start = blank_poses(n_particles, device), blank_poses(n_particles, device)
        table = ParticlePoses(poses, from_encoder, searched, agree, encoder, start)
        scatter(table, self, rows)
        return table


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is known of the map and the poses; every stage adds to it.

    ``start_losses`` are the wake losses of competing starts of Amortized at the end of their trials.
    """

    reference: Reference | None = None
    start_agreement: float | None = None
    start_losses: tuple[float, ...] = ()
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


def chunks_of_halves(half_set: Tensor) -> list[Tensor]:
    """Rows in chunks that never mix the half sets."""

    def chunks() -> Iterator[Tensor]:
        for half in (0, 1):
            yield from (half_set == half).nonzero().flatten().split(_CHUNK)

    return list(chunks())


def scatter(table: ParticlePoses, found: ParticlePoses, rows: Tensor) -> None:
    """Write what was found for some particles into the table of all, in place."""
    index = rows.to(table.from_encoder.device)
    for name in ("from_encoder", "searched", "sources_agree"):
        getattr(table, name)[index] = getattr(found, name)
    assign_poses(table.poses, rows, found.poses)
    assign_poses(table.start, rows, found.start)
    if table.encoder is not None and found.encoder is not None:
        assign_poses(table.encoder, rows, found.encoder)
