"""Bootstrap: a low-resolution map from nothing, by annealed stochastic search of poses.

Every step draws a few hundred images and searches all rotations and shifts for each of them against
the current map. Poses are then drawn from the posterior, tempered so that it is spread over a stated
effective number of rotations, many at first and few at the end: without that, the first accidental
map is fitted ever better and never left. The images enter running sums that forget exponentially,
and a new map is solved for, masked, made positive and centred. The band limit grows with the steps.

The cost depends on the number of steps, not on the number of particles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import roma
import torch
from torch import Tensor

from cryoai.contrast import ContrastSign
from cryoai.fourier import resize_map, soft_sphere
from cryoai.imaging import ImagingModel
from cryoai.noise import NoiseSpectrum
from cryoai.particles import ParticleBatch, PreparedParticles
from cryoai.poses import Poses
from cryoai.reconstruction import ReconstructionSums
from cryoai.search import Candidates, Templates, TrialPoses, search_poses, shift_grid
from cryoai.volumes import SampledVolume

__all__ = [
    "BootstrapSchedule",
    "Reference",
    "SearchState",
    "StochasticSearch",
    "contrast_by_search",
    "held_out_poses",
    "search_box",
]

# Relative to the mean information of a shell: a tenth of it stands for a signal-to-noise ratio of 10.
_PRIOR = 0.1
_KEPT = 128
_NOISE_MEMORY = 0.9


@dataclass(frozen=True)
class BootstrapSchedule:
    """How a stochastic search goes from its first step to its last.

    Attributes
    ----------
    n_steps, batch_size
        Images seen are the product of the two.
    first_radius, last_radius
        Band limit in Fourier pixels; it grows linearly over the first 80 % of the steps.
    n_rotations
        Of the search grid, half turns included.
    first_spread, last_spread
        Effective number of rotations that the tempered posterior of an image is spread over at
        least; it falls geometrically over the first 80 % of the steps. A last spread of 1 leaves
        the posterior as it is.
    shift_step_in_boxes, n_shift_steps
        Trial shifts lie on a square grid of this step, in units of the box, within a circle.
    memory
        Share of the sums kept from one step to the next.
    """

    n_steps: int = 200
    batch_size: int = 200
    first_radius: int = 4
    last_radius: int = 16
    n_rotations: int = 4608
    first_spread: float = 32.0
    last_spread: float = 2.0
    shift_step_in_boxes: float = 0.02
    n_shift_steps: int = 3
    memory: float = 0.9

    def progress(self, step: int) -> float:
        """Position of a step in the part of the schedule in which things change, 0 to 1."""
        return min(1.0, step / (0.8 * self.n_steps))

    def radius(self, step: int) -> int:
        grown = self.progress(step) * (self.last_radius + 1 - self.first_radius)
        return min(self.last_radius, self.first_radius + int(grown))

    def trials(self, extent_in_angstroms: float, device: torch.device) -> TrialPoses:
        """The search grid for images of this extent."""
        shifts = shift_grid(self.shift_step_in_boxes * extent_in_angstroms, self.n_shift_steps, device=device)
        return TrialPoses.grid(self.n_rotations // 2, shifts)

    def spread(self, step: int) -> float:
        return float(self.first_spread * (self.last_spread / self.first_spread) ** self.progress(step))


@dataclass(frozen=True, eq=False)
class Reference:
    """A map to pose particles against: density (n, n, n), its band limit, the noise of the images."""

    density: Tensor
    max_radius: int
    noise: NoiseSpectrum

    def at_box(self, n_pixels: int) -> Reference:
        """The reference on a finer or coarser grid of the same extent."""
        return Reference(resize_map(self.density, n_pixels), self.max_radius, self.noise)

    def sampled(self, max_radius: int | None = None) -> SampledVolume:
        """Its transform, with gradient, out to a band limit (default: its own)."""
        radius = self.max_radius if max_radius is None else min(max_radius, self.max_radius)
        return SampledVolume.from_map(self.density, radius, with_gradient=True)


def search_box(last_radius: int, n_pixels: int) -> int:
    """The box in which a search up to a radius is done: a little wider than the band needs."""
    return min(n_pixels, 2 * (last_radius + 4))


@dataclass(frozen=True, eq=False)
class SearchState:
    """How far a search has come."""

    steps_done: int
    log_likelihood: float
    sums: ReconstructionSums
    noise: NoiseSpectrum
    density: Tensor


class StochasticSearch:
    """One search from one random start; :meth:`step` advances it.

    Parameters
    ----------
    particles
        Cropped to :func:`search_box`.
    subset : (m,) int
        Rows that may be drawn.
    generator
        On the CPU; the only source of randomness.
    """

    def __init__(
        self, particles: PreparedParticles, subset: Tensor, schedule: BootstrapSchedule, generator: torch.Generator
    ) -> None:
        self.particles = particles
        self.subset = subset
        self.schedule = schedule
        self.generator = generator
        self.steps_done = 0
        self.log_likelihood = 0.0
        n, device = particles.n_pixels, particles.disc.device
        self.trials = schedule.trials(n * particles.pixel_size_in_angstroms, device)
        self.mask = soft_sphere(n, 0.45 * n - 3, 3, device=device)
        self.sums = ReconstructionSums.empty(n, schedule.last_radius, device=device)
        # Before there is a map everything is noise.
        self.noise = particles.power(subset, schedule.last_radius)
        self.density = torch.zeros((n, n, n), device=device)

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.schedule.n_steps

    def step(self) -> None:
        """Draw a batch, pose it, and update the map and the noise."""
        imaging = self.particles.imaging(self.schedule.radius(self.steps_done))
        batch = self._draw_batch(imaging)
        precision = self.noise.precision(imaging)
        poses = self._random_poses(batch) if self.steps_done == 0 else self._draw_poses(batch, imaging, precision)
        self.sums.forget(self.schedule.memory)
        self.sums.add(batch, poses, imaging, precision, weight=1 / poses.rotations.shape[1])
        density = self.sums.solve(_PRIOR * self.sums.mean_weight(), max_radius=imaging.max_radius)
        self.density = _centred(density.clamp_min(0) * self.mask)
        if self.steps_done > 0:
            self._update_noise(batch, poses, imaging)
        self.steps_done += 1

    def state(self) -> SearchState:
        return SearchState(self.steps_done, self.log_likelihood, self.sums, self.noise, self.density)

    def restore(self, state: SearchState) -> None:
        """Go on from the state of a search of the same particles and schedule."""
        self.steps_done, self.log_likelihood = state.steps_done, state.log_likelihood
        self.sums, self.noise, self.density = state.sums, state.noise, state.density

    def reference(self) -> Reference:
        """The current map, to be posed against."""
        return Reference(self.density, self.schedule.radius(self.steps_done), self.noise)

    def _draw_batch(self, imaging: ImagingModel) -> ParticleBatch:
        size = min(self.schedule.batch_size, len(self.subset))
        choice = torch.randint(len(self.subset), (size,), generator=self.generator)
        return self.particles.batch(self.subset[choice].sort().values, imaging.max_radius)

    def _random_poses(self, batch: ParticleBatch) -> Poses:
        rotations = roma.random_rotmat((len(batch), 1), generator=self.generator)
        return Poses(rotations, torch.zeros(len(batch), 1, 2)).to(self.density.device)

    def _draw_poses(self, batch: ParticleBatch, imaging: ImagingModel, precision: Tensor) -> Poses:
        """Two poses (B, 2) a particle from its tempered posterior on a randomly turned grid."""
        # Turned as a whole, so that over the steps no orientation is privileged.
        turn = roma.random_rotmat(generator=self.generator).to(self.density.device)
        volume = SampledVolume.from_map(self.density, imaging.max_radius)
        templates = Templates.of(volume, self.trials.turned(turn), imaging)
        candidates = search_poses(batch, templates, imaging, precision, _KEPT)
        self.log_likelihood = float(candidates.log_likelihoods[:, 0].mean())
        weights = tempered_weights(candidates, self.schedule.spread(self.steps_done))
        choice = torch.multinomial(weights.cpu(), 2, replacement=True, generator=self.generator)
        return candidates.poses.take(choice.to(weights.device))

    def _update_noise(self, batch: ParticleBatch, poses: Poses, imaging: ImagingModel) -> None:
        volume = SampledVolume.from_map(self.density, imaging.max_radius)
        predicted = imaging.predict(volume, poses, batch.optics)
        residuals = batch.coefficients[:, None] - predicted
        self.noise = self.noise.blended(NoiseSpectrum.of_residuals(residuals.flatten(0, 1), imaging), 1 - _NOISE_MEMORY)


def tempered_weights(candidates: Candidates, spread: float) -> Tensor:
    """Posterior weights (B, K), tempered to an effective number of candidates of at least ``spread``.

    ``w ~ exp(b log p)`` with the largest ``b <= 1`` for which ``1 / sum w^2 >= spread``.
    """
    scores = candidates.log_likelihoods - candidates.log_likelihoods[:, :1]
    # Bisection for log b; the effective number falls as b grows.
    low = torch.full_like(scores[:, :1], -20.0)
    high = torch.zeros_like(low)
    for _ in range(16):
        middle = (low + high) / 2
        effective = 1 / torch.softmax(middle.exp() * scores, dim=1).square().sum(1, keepdim=True)
        low, high = torch.where(effective > spread, middle, low), torch.where(effective > spread, high, middle)
    return torch.softmax(high.exp() * scores, dim=1)


def _centred(density: Tensor) -> Tensor:
    """The map rolled by whole pixels so that its centre of mass is at the centre."""
    n = density.shape[-1]
    axis = torch.arange(n, device=density.device) - n // 2
    mass = density.sum().clamp_min(1e-12)
    offsets = [float((density.sum(dim=other) * axis).sum() / mass) for other in ((1, 2), (0, 2), (0, 1))]
    return density.roll([-round(offset) for offset in offsets], dims=(0, 1, 2))


def held_out_poses(particles: PreparedParticles, rows: Tensor, reference: Reference, trials: TrialPoses) -> Candidates:
    """The best pose (m, 1) of particles that the reference was not made from."""
    imaging = particles.imaging(reference.max_radius)
    templates = Templates.of(SampledVolume.from_map(reference.density, imaging.max_radius), trials, imaging)
    precision = reference.noise.precision(imaging)
    parts = [
        search_poses(batch, templates, imaging, precision, 1)
        for batch in particles.batches(rows, 200, imaging.max_radius)
    ]
    return Candidates(Poses.cat([part.poses for part in parts]), torch.cat([part.log_likelihoods for part in parts]))


def contrast_by_search(particles: PreparedParticles, generator: torch.Generator) -> ContrastSign:
    """Whether protein is bright or dark, by a short search for a map of either sign.

    A density is not negative, so that images of the wrong sign lead to no map: the sign is the one
    under whose map particles that it was not made from are likelier.
    """
    schedule = BootstrapSchedule(n_steps=60, last_radius=min(10, particles.disc.max_radius), n_rotations=2304)
    small = particles.cropped(search_box(schedule.last_radius, particles.n_pixels))
    shuffled = torch.randperm(particles.n_particles, generator=generator)[:3000]
    held_out, subset = shuffled[: min(500, len(shuffled) // 3)], shuffled[min(500, len(shuffled) // 3) :]
    seed = int(torch.randint(2**31, (1,), generator=generator))
    likelihoods = []
    for sign in (1, -1):
        signed = replace(small, contrast=replace(small.contrast, sign=sign))
        # The same draws for both.
        search = StochasticSearch(signed, subset, schedule, torch.Generator().manual_seed(seed))
        while not search.finished:
            search.step()
        found = held_out_poses(signed, held_out.sort().values, search.reference(), search.trials)
        likelihoods.append(found.log_likelihoods[:, 0])
    deviation, mean = torch.std_mean(likelihoods[0] - likelihoods[1])
    z_score = float(mean / (deviation / math.sqrt(len(held_out))).clamp_min(1e-12))
    return replace(particles.contrast, sign=1 if z_score > 0 else -1, search_z_score=z_score)
