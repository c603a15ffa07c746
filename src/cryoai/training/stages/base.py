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
from cryoai.poses import Poses
from cryoai.reconstruction import HalfSets

__all__ = [
    "Estimate",
    "Metrics",
    "ParticlePoses",
    "Stage",
    "assign_poses",
    "blank_poses",
    "chunks_of_halves",
    "selected_poses",
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


def blank_poses(n_particles: int, device: torch.device) -> Poses:
    """A table of poses (N,) to be filled: no rotation, no shift."""
    identity = torch.eye(3, device=device).expand(n_particles, 3, 3).clone()
    return Poses(identity, torch.zeros(n_particles, 2, device=device))


def selected_poses(poses: Poses, rows: Tensor) -> Poses:
    """Rows (B,) of a table (N,), wherever each of them is."""
    return poses[rows.to(poses.rotations.device)]


def assign_poses(table: Poses, rows: Tensor, poses: Poses) -> None:
    """Write poses (B,) into rows of a table (N,), in place."""
    index = rows.to(table.rotations.device)
    table.rotations[index] = poses.rotations
    table.shifts_in_angstroms[index] = poses.shifts_in_angstroms
