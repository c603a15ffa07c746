"""The Axes stage: everything that is known turned to the axes of the symmetry that was asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryoai.alignment import FrameChange, change_frame
from cryoai.bootstrap import Reference
from cryoai.half_maps import HalfMaps
from cryoai.particles import PreparedParticles
from cryoai.symmetry.detection import adjust_symmetry, place_symmetry
from cryoai.symmetry.groups import PointGroup
from cryoai.training.stages.base import Estimate, half_sets_at

__all__ = ["Axes", "AxesMetrics"]


@dataclass(frozen=True)
class AxesMetrics:
    """What a step reports."""

    share: float

    @property
    def headline(self) -> str:
        return f"{self.share:.0%} of the signal obeys the symmetry"


class Axes:
    """Finds the axes of a point group in the map, and turns maps and poses so that they are where they belong.

    An encoder that has learnt already stays as it is; what it proposes is brought to the new frame.
    Done twice: with the map of Bootstrap, so that the encoder learns in the frame of the group, and
    once more, finer, before Refinement begins to impose it.
    """

    name = "axes"

    def __init__(self, particles: PreparedParticles, estimate: Estimate, half_set: Tensor, group: PointGroup) -> None:
        self.particles = particles
        self.estimate = estimate
        self.half_set = half_set
        self.group = group
        self.finished = False

    @property
    def progress(self) -> float:
        return float(self.finished)

    @torch.no_grad()
    def step(self) -> AxesMetrics:
        self.finished = True
        first, second = self._halves()
        place = place_symmetry if self.estimate.symmetry is None else adjust_symmetry
        found = place(first, second, self.group)
        if found is None:
            return AxesMetrics(0.0)
        # Shifts of a map are in its own pixels, those of poses in Å.
        pixel_size = self.particles.n_pixels * self.particles.pixel_size_in_angstroms / first.shape[-1]
        frame = replace(found.frame, shift=found.frame.shift * pixel_size)
        self.estimate = replace(self._moved(frame), symmetry=found)
        return AxesMetrics(found.share)

    def result(self) -> Estimate:
        return self.estimate

    def state(self) -> None:
        """None: there is one step."""

    def restore(self, state: None) -> None:
        """There is nothing to go on from."""

    def _halves(self) -> tuple[Tensor, Tensor]:
        """What is known of both halves: their maps, or else their references."""
        estimate = self.estimate
        if estimate.half_maps is not None:
            return estimate.half_maps.first, estimate.half_maps.second
        assert estimate.reference is not None
        first, second = estimate.half_references or (estimate.reference, estimate.reference)
        return first.density, second.density

    def _moved(self, frame: FrameChange) -> Estimate:
        """The estimate in another frame (shift in Å)."""
        old = self.estimate
        extent = self.particles.n_pixels * self.particles.pixel_size_in_angstroms

        def turned(reference: Reference) -> Reference:
            n = reference.density.shape[-1]
            in_pixels = replace(frame, shift=frame.shift * (n / extent))
            return replace(reference, density=change_frame(reference.density, in_pixels))

        estimate = replace(
            old,
            reference=None if old.reference is None else turned(old.reference),
            half_references=None
            if old.half_references is None
            else (turned(old.half_references[0]), turned(old.half_references[1])),
            model=None if old.model is None else old.model.moved(frame),
        )
        if old.particles is None:
            return estimate
        placed = replace(
            old.particles,
            poses=frame.of_poses(old.particles.poses),
            start=frame.of_poses(old.particles.start),
            encoder=None if old.particles.encoder is None else frame.of_poses(old.particles.encoder),
        )
        sets = half_sets_at(placed.poses, self.particles, self.half_set)
        half_maps = HalfMaps.of(sets, self.particles.pixel_size_in_angstroms)
        return replace(estimate, particles=placed, half_sets=sets, half_maps=half_maps)
