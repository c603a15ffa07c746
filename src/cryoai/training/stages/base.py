"""What all stages share: the interface, and the estimate that they hand on.

A stage is stepped until it is finished and then adds what it found to the :class:`Estimate`, which
the next stage starts from. The loop does not know which stage it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cryoai.bootstrap import Reference
from cryoai.confidence import Confidence
from cryoai.half_maps import HalfMaps
from cryoai.model import CryoAI
from cryoai.noise import Fit, NoiseSpectrum
from cryoai.particle_stack import Fault
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses, assign_poses, blank_poses
from cryoai.reconstruction import HalfSets
from cryoai.symmetry.detection import SymmetryCandidate

__all__ = [
    "Controls",
    "Estimate",
    "Metrics",
    "ParticlePoses",
    "Stage",
    "StartAgreement",
    "chunks_of_halves",
    "half_sets_at",
    "reliable_from",
    "scatter",
]

_CHUNK = 256
# Starts from noise agree on next to no pose, two that found the structure on most.
_ALIKE = 0.5
# Maps of noise share 0.2 to 0.3 beyond chance, and wrong ones that share more agree on a few per cent of the poses.
_SOME, _NEARLY_ALIKE = 0.15, 0.85


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
    defocus_change : (N,) or None
        In Å, to be added along both axes; None if defocus was not refined.
    fit : Fit
        (N,), of the images to the map of the half that they are not part of; not a number without Refinement.
    """

    poses: Poses
    from_encoder: Tensor
    searched: Tensor
    sources_agree: Tensor
    encoder: Poses | None
    start: Poses
    fit: Fit
    defocus_change: Tensor | None = None

    def among(self, rows: Tensor, n_particles: int) -> ParticlePoses:
        """A table of ``n_particles`` with these in its ``rows``, and no answer for the others."""
        device = self.poses.rotations.device
        from_encoder, searched, agree = torch.zeros((3, n_particles), dtype=torch.bool, device=device)
        encoder = None if self.encoder is None else blank_poses(n_particles, device)
        poses, start = blank_poses(n_particles, device), blank_poses(n_particles, device)
        fit = Fit.blank(n_particles, device)
        changes = None if self.defocus_change is None else torch.zeros(n_particles)
        table = ParticlePoses(poses, from_encoder, searched, agree, encoder, start, fit, changes)
        scatter(table, self, rows)
        return table


@dataclass(frozen=True)
class StartAgreement:
    """How well the two best agreeing starts of Bootstrap agree, their maps laid over each other.

    Attributes
    ----------
    poses
        Share of held-out particles that both pose within 20° of each other, counting poses as equal that are so by the
        symmetry of the maps.
    maps
        Fourier shell correlation of their maps beyond that of the same maps in random orientations, averaged over the
        band: from 0 to 1.
    """

    poses: float
    maps: float

    @property
    def is_one_structure(self) -> bool:
        """Whether both found the same."""
        # Of maps that share more symmetry than is known of them few poses agree, and the maps all the more.
        return self.poses > _ALIKE or (self.poses > _SOME and self.maps > _NEARLY_ALIKE)


@dataclass(frozen=True, eq=False)
class Controls:
    """What becomes of particles whose truth is known, and of images of nothing, when they are posed in the same way.

    Attributes
    ----------
    n_images
        Of each kind.
    noise_only, shuffled_poses : (n // 2 + 1,)
        Fourier shell correlation within the mask of half maps from as many images of noise as there are particles, as
        estimated from fewer, and from images of the run whose poses were interchanged.
    confidence
        From the fit of an image to the probability that its pose is right.
    found_of_synthetic
        Share of synthetic particles of the map whose pose was found.
    fit_of_synthetic
        Median fit of those, a z-score.
    better_than_noise
        Share of the run's particles that fit better than 95 % of the images of noise.
    """

    n_images: int
    noise_only: Tensor
    shuffled_poses: Tensor
    confidence: Confidence
    found_of_synthetic: float
    fit_of_synthetic: float
    better_than_noise: float


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is known of the map and the poses; every stage adds to it.

    Attributes
    ----------
    reference
        The map that the encoder learns from.
    half_references
        Maps that the two halves of the particles are posed against, made from that half alone and in one frame; None
        if both are posed against ``reference``.
    start_losses
        The wake losses of competing starts of Amortized at the end of their trials.
    half_sets, half_maps
        The sums of the two halves of the particles at their poses, and their maps.
    symmetry
        How well the group that was asked for suited the map before it was imposed.
    noise
        What Refinement left unexplained of the images, at the working box.
    faults
        Images without use among those that Completion was to pose.
    """

    reference: Reference | None = None
    half_references: tuple[Reference, Reference] | None = None
    start_agreement: StartAgreement | None = None
    start_losses: tuple[float, ...] = ()
    model: CryoAI | None = None
    particles: ParticlePoses | None = None
    half_sets: HalfSets | None = None
    half_maps: HalfMaps | None = None
    noise: NoiseSpectrum | None = None
    controls: Controls | None = None
    symmetry: SymmetryCandidate | None = None
    faults: tuple[Fault, ...] = ()

    def among(self, rows: Tensor, n_particles: int) -> Estimate:
        """The same, its particles in the ``rows`` of a table of ``n_particles``, in which the others have no answer."""
        assert self.particles is not None
        return replace(self, particles=self.particles.among(rows, n_particles))


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

    def state(self) -> Any:
        """All that has changed since the stage was made, as dataclasses of tensors and numbers; None to begin again.

        Together with the state of the generator it lets a stage that is made anew, of the same estimate, go on
        as if nothing had happened.
        """

    def restore(self, state: Any) -> None:
        """Go on from the state of a stage that was made in the same way."""


def chunks_of_halves(half_set: Tensor) -> list[Tensor]:
    """Rows in chunks that never mix the half sets, none of them empty."""
    chunks = [chunk for half in (0, 1) for chunk in (half_set == half).nonzero().flatten().split(_CHUNK)]
    return [chunk for chunk in chunks if len(chunk)]


@torch.no_grad()
def half_sets_at(poses: Poses, particles: PreparedParticles, half_set: Tensor) -> HalfSets:
    """The sums of both halves of the particles at poses (N,), every image with the same weight."""
    sets = HalfSets.empty(particles.n_pixels, device=particles.disc.device)
    imaging = particles.imaging(particles.disc.max_radius)
    precision = particles.power(torch.arange(particles.n_particles), imaging.max_radius).precision(imaging)
    for rows in chunks_of_halves(half_set):
        here = poses[rows.to(poses.rotations.device)]
        sets.sums[int(half_set[rows[0]])].add(particles.batch(rows), here, imaging, precision)
    return sets


def reliable_from(fit: Tensor, missed: Tensor, share: float) -> float:
    """The lowest fit (n,) such that of the particles that fit as well or better at most a share was missed (n,).

    Infinite if not even the best fit is reliable.

    Examples
    --------
    >>> reliable_from(torch.tensor([0.0, -1.0, -2.0, -3.0]), torch.tensor([False, False, True, True]), 0.1)
    -1.0
    """
    ordered, order = fit.sort(descending=True)
    missed_so_far = missed[order].cumsum(0) / torch.arange(1, len(fit) + 1, device=fit.device)
    reliable = (missed_so_far <= share).nonzero()
    return float(ordered[reliable[-1, 0]]) if len(reliable) else torch.inf


def scatter(table: ParticlePoses, found: ParticlePoses, rows: Tensor) -> None:
    """Write what was found for some particles into the table of all, in place."""
    index = rows.to(table.from_encoder.device)
    for name in ("from_encoder", "searched", "sources_agree"):
        getattr(table, name)[index] = getattr(found, name)
    assign_poses(table.poses, rows, found.poses)
    assign_poses(table.start, rows, found.start)
    table.fit.assign(rows, found.fit)
    if table.defocus_change is not None and found.defocus_change is not None:
        table.defocus_change[rows] = found.defocus_change
    if table.encoder is not None and found.encoder is not None:
        assign_poses(table.encoder, rows, found.encoder)
