"""The Amortized stage: encoder and implicit volume trained together, awake and asleep.

*Wake*: a batch of particles; the loss of the best hypothesis trains encoder and volume.
*Sleep*: particles are made up from the current volume, with poses, shifts, optics and noise like
those of the data; their poses are known and train the encoder (Hinton et al. 1995 for the name).

The band limit of both can grow with the steps, from the few shells in which there are few wrong maps to
lock on. Beyond it the precision of the images is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import roma
import torch
from torch import Tensor, nn

from cryoai.bootstrap import Reference
from cryoai.errors import RunFailedError
from cryoai.hardware import fast_matrices
from cryoai.losses import pose_loss, score_loss
from cryoai.model import CryoAI
from cryoai.noise import NoiseSpectrum
from cryoai.particles import ParticleBatch, PreparedParticles
from cryoai.poses import Poses
from cryoai.training.stages.base import Estimate
from cryoai.volumes import AbstractVolume, SampledVolume

__all__ = ["Amortized", "AmortizedMetrics", "AmortizedState", "parameter_groups"]

_WARM_UP = 0.05
_GRADIENT_NORM = 1.0
_MEAN_OVER_HEADS = 0.02
_SCORE_WEIGHT = 0.2
# Share of the steps after which the whole band is used.
_MARCH = 0.5
# A shift error of this fraction of the box counts like a rotation error of norm one.
_SHIFT_UNIT_IN_BOXES = 0.05
_FIT_LEARNING_RATE = 1e-4
_FIT_BATCH = 2048


@dataclass(frozen=True)
class AmortizedMetrics:
    """What a step reports; NaN for what it did not compute."""

    step: int
    band_limit: int
    wake_loss: float
    sleep_loss: float
    volume_fit_loss: float

    @property
    def headline(self) -> str:
        if not math.isnan(self.volume_fit_loss):
            return f"fitting the volume, relative error {self.volume_fit_loss:.2f}"
        losses = {"wake loss": f"{self.wake_loss:.4f}", "sleep loss": f"{self.sleep_loss:.2f}"}
        return ", ".join(f"{name} {value}" for name, value in losses.items() if value != "nan")


@dataclass(frozen=True, eq=False)
class AmortizedState:
    """Weights, optimizers and schedule as they stand, and the volume that synthetic images are made from."""

    steps_done: int
    fit_steps_left: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    fit_optimizer: dict[str, Any]
    schedule: dict[str, Any]
    asleep_with: SampledVolume | None


class Amortized:
    """Trains a :class:`CryoAI` model.

    Parameters
    ----------
    particles
        At the box of the encoder.
    wake_batch_size, sleep_batch_size
        Images of a step; no synthetic images if the latter is 0.
    wake_interval
        Only every so many steps are awake, and move the volume.
    first_radius
        Band limit of the first step, in Fourier pixels.
    n_fit_steps
        Steps that first fit the volume to the map of the estimate, if it has one.
    shift_std_in_angstroms
        Of the synthetic images, in each axis.
    """

    name = "amortized"

    def __init__(
        self,
        particles: PreparedParticles,
        estimate: Estimate,
        model: CryoAI,
        *,
        n_steps: int,
        n_fit_steps: int,
        wake_batch_size: int,
        sleep_batch_size: int,
        wake_interval: int,
        first_radius: int,
        learning_rate: float,
        volume_learning_rate: float,
        shift_std_in_angstroms: float,
        generator: torch.Generator,
    ) -> None:
        self.particles = particles
        self.estimate = estimate
        self.model = model
        self.n_steps = n_steps
        self.wake_batch_size = min(wake_batch_size, particles.n_particles)
        self.sleep_batch_size = sleep_batch_size
        self.wake_interval = wake_interval
        self.first_radius = first_radius
        self.shift_std_in_angstroms = shift_std_in_angstroms
        self.generator = generator
        self.steps_done = 0
        self.target = None if estimate.reference is None else _target(estimate.reference, model)
        self.n_fit_steps = self.fit_steps_left = 0 if self.target is None else n_fit_steps
        self.noise = _white_noise(model) if estimate.reference is None else estimate.reference.noise
        self.full_precision = self.noise.precision(model.imaging)
        self.asleep_with: SampledVolume | None = None
        # Of one kind of coefficient a complex normal of variance one has half in each part.
        self.deviation = (self.noise.variance[model.imaging.shells] / 2).sqrt()
        self.fit_optimizer = torch.optim.Adam(model.volume.parameters(), lr=_FIT_LEARNING_RATE, fused=True)
        self.optimizer = torch.optim.Adam(
            parameter_groups(model, learning_rate, volume_learning_rate), amsgrad=True, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate_factor)

    @property
    def last_radius(self) -> int:
        """Band limit of the last step."""
        return self.model.imaging.max_radius

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.n_steps

    @property
    def progress(self) -> float:
        # The steps that fit the volume take about as long as the others.
        done = self.steps_done + self.n_fit_steps - self.fit_steps_left
        return done / (self.n_steps + self.n_fit_steps)

    @property
    def radius(self) -> int:
        """Band limit of the current step."""
        grown = self.first_radius + (1 + self.last_radius - self.first_radius) * self.steps_done / self.n_steps / _MARCH
        return min(self.last_radius, int(grown))

    @property
    def precision(self) -> Tensor:
        """Of the coefficients (p,); zero beyond the band limit of the current step."""
        return torch.where(self.model.imaging.shells <= self.radius, self.full_precision, 0.0)

    def step(self) -> AmortizedMetrics:
        if self.fit_steps_left:
            self.fit_steps_left -= 1
            return AmortizedMetrics(0, self.last_radius, math.nan, math.nan, self._fit())
        self.model.train()
        awake = self.sleep_batch_size == 0 or self.steps_done % self.wake_interval == 0
        radius = self.radius
        wake, sleep = math.nan, math.nan
        self.optimizer.zero_grad(set_to_none=True)
        if awake:
            with fast_matrices(self.full_precision.device):
                volume = self.model.volume.sampled(radius)
            wake = self._descend(*self._wake_losses(volume))
        if self.sleep_batch_size:
            sleep = self._descend(*self._sleep_losses())
        nn.utils.clip_grad_norm_(self.model.encoder.parameters(), _GRADIENT_NORM)
        nn.utils.clip_grad_norm_(self.model.volume.parameters(), _GRADIENT_NORM)
        self.optimizer.step()
        self.schedule.step()
        if awake:
            # The volume has moved: the synthetic images of the steps to come are made from the new one.
            self.asleep_with = None
        self.steps_done += 1
        return AmortizedMetrics(self.steps_done, radius, wake, sleep, math.nan)

    def result(self) -> Estimate:
        self.model.eval()
        reference = self.estimate.reference
        if reference is None:
            radius = self.last_radius
            reference = Reference(self.model.volume.to_map(radius), radius, self.noise)
        return replace(self.estimate, model=self.model, reference=reference)

    def state(self) -> AmortizedState:
        return AmortizedState(
            self.steps_done,
            self.fit_steps_left,
            self.model.state_dict(),
            self.optimizer.state_dict(),
            self.fit_optimizer.state_dict(),
            self.schedule.state_dict(),
            self.asleep_with,
        )

    def restore(self, state: AmortizedState) -> None:
        self.steps_done, self.fit_steps_left = state.steps_done, state.fit_steps_left
        self.model.load_state_dict(state.weights)
        self.optimizer.load_state_dict(state.optimizer)
        self.fit_optimizer.load_state_dict(state.fit_optimizer)
        self.schedule.load_state_dict(state.schedule)
        self.asleep_with = state.asleep_with

    def _descend(self, loss: Tensor, score: Tensor) -> float:
        """Add the gradient of a loss and of its score; returns the loss."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RunFailedError(
                f"amortized: the loss of step {self.steps_done + 1} is not finite; "
                "try another --seed or a lower --amortized.learning-rate"
            )
        (loss + _SCORE_WEIGHT * score).backward()
        return value

    def _wake_losses(self, volume: SampledVolume) -> tuple[Tensor, Tensor]:
        rows = torch.randint(self.particles.n_particles, (self.wake_batch_size,), generator=self.generator)
        batch = self.particles.batch(rows.sort().values, self.model.imaging.max_radius)
        hypotheses = self.model.propose(batch, self.precision)
        reading = self.model.judge(batch, hypotheses.poses, volume, self.precision)
        return reading.loss.mean(), score_loss(hypotheses, reading.hypothesis).mean()

    def _sleep_losses(self) -> tuple[Tensor, Tensor]:
        batch, truth = self._dream()
        # Of a synthetic image the half turn teaches nothing new: ask about the image alone.
        hypotheses = self.model.encode(batch, self.precision)
        extent = self.particles.n_pixels * self.particles.pixel_size_in_angstroms
        best = pose_loss(
            hypotheses.poses,
            truth,
            shift_unit_in_angstroms=_SHIFT_UNIT_IN_BOXES * extent,
            mean_weight=_MEAN_OVER_HEADS,
        )
        return best.loss.mean(), score_loss(hypotheses, best.choice).mean()

    @torch.no_grad()
    def _dream(self) -> tuple[ParticleBatch, Poses]:
        """Synthetic particles of the current volume, and their poses (B,)."""
        if self.asleep_with is None:
            # By way of the map, because a coarse lattice that is good enough to learn from has ghosts.
            self.asleep_with = SampledVolume.from_map(self.model.volume.to_map(self.radius), self.last_radius)
        n, device = self.sleep_batch_size, self.full_precision.device
        rows = torch.randint(self.particles.n_particles, (n,), generator=self.generator)
        poses = Poses(
            roma.random_rotmat(n, generator=self.generator),
            self.shift_std_in_angstroms * torch.randn(n, 2, generator=self.generator),
        ).to(device)
        optics = self.particles.optics[rows].to(device)
        clean = self.model.imaging.predict(self.asleep_with, poses, optics)
        noise = torch.view_as_complex(torch.randn(*clean.shape, 2, generator=self.generator)).to(device)
        return ParticleBatch(rows, clean + self.deviation * noise, optics), poses

    def _fit(self) -> float:
        """One step of the volume towards the map of the estimate; returns the relative error."""
        assert self.target is not None
        choice = torch.randint(len(self.target.points), (_FIT_BATCH,), generator=self.generator)
        return fit_step(self.model.volume, self.target, choice, self.fit_optimizer)

    def _learning_rate_factor(self, step: int) -> float:
        position = step / self.n_steps
        return min(1.0, (position + 1 / self.n_steps) / _WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * min(1, position)))


def _white_noise(model: CryoAI) -> NoiseSpectrum:
    """The noise of normalised images as long as there is no map: all coefficients count alike, as published."""
    return NoiseSpectrum(torch.ones(model.imaging.max_radius + 1, device=model.imaging.coordinates.device))


@dataclass(frozen=True, eq=False)
class Target:
    """Values (P,) that a volume should take at points (P, 3), and the weight (P,) of each error."""

    points: Tensor
    values: Tensor
    weights: Tensor


def fit_step(volume: AbstractVolume, target: Target, choice: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step of a volume towards its target at the points ``choice``; the relative error before it."""
    device = target.points.device
    choice = choice.to(device)
    with fast_matrices(device):
        values = volume(target.points[choice])
    weights = target.weights[choice]
    error = ((values - target.values[choice]).abs().square() * weights).mean()
    scale = (target.values[choice].abs().square() * weights).mean()
    optimizer.zero_grad(set_to_none=True)
    (error / scale).backward()
    optimizer.step()
    return float((error / scale).detach())


def parameter_groups(model: CryoAI, learning_rate: float, volume_learning_rate: float) -> list[dict[str, object]]:
    """Every trainable parameter of the model, once."""
    return [
        {"params": list(model.encoder.parameters()), "lr": learning_rate},
        {"params": list(model.volume.parameters()), "lr": volume_learning_rate},
    ]


def _target(reference: Reference, model: CryoAI) -> Target:
    """The reference on the lattice that the model's volume will be read from, whitened by shell."""
    radius = model.imaging.max_radius
    volume = model.volume
    density = reference.at_box(volume.n_pixels).density
    sampled = SampledVolume.from_map(density, radius, oversampling=volume.sampling_oversampling)
    radii = sampled.lattice.radii(device=sampled.values.device)
    inside = radii < radius + 1
    values = sampled.values[inside, 0]
    shells = (radii[inside] + 0.5).floor().long().clamp(max=radius)
    return Target(
        sampled.lattice.frequencies(device=values.device)[inside], values, 1 / reference.noise.variance[shells]
    )
