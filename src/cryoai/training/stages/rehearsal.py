"""The Rehearsal stage: the run repeated on particles whose truth is known, and on none at all."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryoai.confidence import RIGHT_IN_DEGREES, Confidence, features_of_fit
from cryoai.formats.files import reserve
from cryoai.fourier import fourier_shell_correlation
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses
from cryoai.reconstruction import HalfSets
from cryoai.symmetry.averaging import symmetrized_half_sets
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
from cryoai.training.stages.base import Controls, Estimate, chunks_of_halves
from cryoai.training.stages.blocks import BlockPosing, PosedBlock
from cryoai.volumes import SampledVolume

__all__ = ["Rehearsal", "RehearsalMetrics"]

_N_IMAGES = 1000
# A fit that so many of the images of noise do not reach is no noise.
_QUANTILE_OF_NOISE = 0.95
_CHUNK = 256
# Share of the particles whose pose was found that fit so badly that they lose confidence.
_WORST_FITS = 0.005


@dataclass(frozen=True)
class RehearsalMetrics:
    """What a step reports; NaN for what is known at the end."""

    better_than_noise: float

    @property
    def headline(self) -> str:
        if math.isnan(self.better_than_noise):
            return "posing synthetic particles and images of noise"
        return f"{self.better_than_noise:.0%} of the particles fit better than 95 % of images of noise"


class Rehearsal:
    """Poses synthetic particles of the map, and images of nothing but noise, as the run posed its own.

    From the first it is learned how sure a pose is; the second are the control that nothing is seen
    where nothing is. As another control, some of the run's own images are reconstructed with their poses
    interchanged.

    Parameters
    ----------
    particles
        Those that the maps were made from.
    rows
        Theirs in the estimate, which may hold more.
    group
        Under which poses count as equal.
    scratch
        File for the images.
    """

    name = "rehearsal"

    def __init__(
        self,
        particles: PreparedParticles,
        rows: Tensor,
        estimate: Estimate,
        half_set: Tensor,
        posing: BlockPosing,
        group: PointGroup,
        scratch: Path,
        *,
        generator: torch.Generator,
    ) -> None:
        if estimate.particles is None or estimate.half_sets is None or estimate.half_maps is None:
            raise ValueError("rehearsal needs placed particles")
        if estimate.noise is None:
            raise ValueError("rehearsal needs the noise that refinement finds")
        index = rows.to(estimate.particles.from_encoder.device)
        self.particles = particles
        self.estimate = estimate
        self.poses = estimate.particles.poses[index]
        self.fit_of_all = estimate.particles.fit.z_scores
        self.noise = estimate.noise
        self.half_set = half_set[rows]
        self.posing = posing
        self.group = group
        self.scratch = scratch
        self.generator = generator
        self.mask = estimate.half_maps.mask
        self.density = estimate.half_maps.combined(estimate.half_sets) * self.mask
        self.controls: Controls | None = None
        self.n_steps = 0
        self.work = self._work()

    @property
    def finished(self) -> bool:
        return self.controls is not None

    @property
    def progress(self) -> float:
        n_chunks = 2 * (1 + 2 * _N_IMAGES // _CHUNK)
        return 1.0 if self.finished else min(0.99, self.n_steps / n_chunks)

    @torch.no_grad()
    def step(self) -> RehearsalMetrics:
        next(self.work, None)
        self.n_steps += 1
        return RehearsalMetrics(math.nan if self.controls is None else self.controls.better_than_noise)

    def result(self) -> Estimate:
        return replace(self.estimate, controls=self.controls)

    def state(self) -> None:
        """It takes seconds, and begins again."""

    def restore(self, state: None) -> None:
        """There is nothing to go on from."""

    def _work(self) -> Iterator[None]:
        n = min(_N_IMAGES, self.particles.n_particles)
        rows = torch.randperm(self.particles.n_particles, generator=self.generator)[:n].sort().values
        halves = torch.arange(n) % 2
        truth = self.poses[rows.to(self.poses.rotations.device)]
        synthetic = yield from self._posed(self._made(rows, truth), halves)
        noise = yield from self._posed(self._made(rows, None), halves)
        distance = symmetric_distance_in_degrees(
            synthetic.particles.poses.rotations, truth.rotations, self.group.to(truth.rotations.device)
        )
        found, right = synthetic.particles.fit, distance < RIGHT_IN_DEGREES
        fit_of_noise = noise.particles.fit.z_scores
        self.controls = Controls(
            n_images=n,
            noise_only=_of_more(self._correlation(noise.half_sets), self._n_posed / n),
            shuffled_poses=self._correlation(self._shuffled(rows)),
            confidence=Confidence.learn(features_of_fit(found), found.z_scores, right, worst=_WORST_FITS),
            found_of_synthetic=float(right.float().mean()),
            fit_of_synthetic=float(found.z_scores.median()),
            better_than_noise=self._share_better_than(fit_of_noise),
        )

    def _posed(self, block: PreparedParticles, half_set: Tensor) -> Generator[None, None, PosedBlock]:
        """What comes of a block of particles (B,), with a pause after each chunk."""
        work = self.posing.begin(block, half_set)
        while not work.finished:
            work.step()
            yield
        return work.result()

    def _share_better_than(self, fit_of_noise: Tensor) -> float:
        limit = torch.quantile(fit_of_noise, _QUANTILE_OF_NOISE)
        return float((self.fit_of_all[~self.fit_of_all.isnan()] > limit).float().mean())

    def _made(self, rows: Tensor, poses: Poses | None) -> PreparedParticles:
        """Particles with the optics of ``rows`` (n,): of the map at poses (n,), or of nothing but noise."""
        disc, sign = self.particles.disc, self.particles.contrast.sign
        imaging = self.particles.imaging(disc.max_radius)
        volume = SampledVolume.from_map(self.density, disc.max_radius)
        # Of one kind of coefficient a complex normal of variance one has half in each part.
        deviation = (self.noise.variance[imaging.shells] / 2).sqrt()
        shape = (len(rows), imaging.n_coefficients, 2)
        reserve(self.scratch, 2 * math.prod(shape))
        stored = np.memmap(self.scratch, dtype=np.float16, mode="r+", shape=shape)
        optics = self.particles.optics[rows]
        for index in torch.arange(len(rows)).split(_CHUNK):
            noise = torch.randn(len(index), *shape[1:], generator=self.generator)
            images = deviation * torch.view_as_complex(noise).to(deviation.device)
            if poses is not None:
                on_device = index.to(poses.rotations.device)
                images = images + imaging.predict(volume, poses[on_device], optics[index].to(deviation.device))
            stored[index.numpy()] = torch.view_as_real(sign * images).cpu().numpy()
        stored.flush()
        return replace(
            self.particles,
            path=self.scratch,
            optics=optics,
            n_stored=imaging.n_coefficients,
            stack_rows=torch.arange(len(rows)),
            faults=(),
        )

    def _shuffled(self, rows: Tensor) -> HalfSets:
        """Half sets of images, each at the pose of the next of its half."""
        sets = HalfSets.empty(self.particles.n_pixels, device=self.particles.disc.device)
        imaging = self.particles.imaging(self.particles.disc.max_radius)
        precision = self.noise.precision(imaging)
        for chunk in chunks_of_halves(self.half_set[rows]):
            index = rows[chunk]
            others = self.poses[index.roll(1).to(self.poses.rotations.device)]
            sets.sums[int(self.half_set[index[0]])].add(self.particles.batch(index), others, imaging, precision)
        return symmetrized_half_sets(sets, self.posing.group)

    @property
    def _n_posed(self) -> int:
        return int((~self.fit_of_all.isnan()).sum())

    def _correlation(self, sets: HalfSets) -> Tensor:
        first, second = (density * self.mask for density in sets.solved())
        return fourier_shell_correlation(first, second).float()


def _of_more(correlation: Tensor, times: float) -> Tensor:
    """What a correlation (n,) of half maps is when there are so many times as many images.

    What they have in common adds up, noise averages out (Rosenthal & Henderson 2003): a ratio of signal to noise
    ``F / (1 - F)`` grows with their number. Applied to what images of noise have from the map that they were laid over.
    """
    positive = correlation.clamp_min(0)
    return torch.where(correlation > 0, times * positive / (1 + (times - 1) * positive), correlation)
