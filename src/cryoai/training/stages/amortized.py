"""The Amortized stage: encoder and implicit volume trained together, awake and asleep.

*Wake*: a batch of particles; the loss of the best hypothesis trains encoder and volume.
*Sleep*: particles are made up from the current volume, with poses, shifts, optics and noise like
those of the data; their poses are known and train the encoder (Hinton et al. 1995 for the name).

The band limit of both can grow with the steps, from the few shells in which there are few wrong maps to
lock on. Beyond it the precision of the images is zero.

A step whose loss or gradient is not finite is not made. Training goes back to its weights of up to 100 steps before,
and on without the images that cause it; if there are none, with half of the learning rate. Where memory does not
suffice for a batch its hypotheses are compared with it in parts.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

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
from cryoai.training.stages.amortized_state import AmortizedMetrics, AmortizedState, Training
from cryoai.training.stages.base import Estimate
from cryoai.training.stages.fitting import Target, fit_step
from cryoai.training.stages.trouble import NonFiniteBatch, Note, is_out_of_memory
from cryoai.volumes import SampledVolume

__all__ = ["Amortized", "parameter_groups"]

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
# The weights of every so many steps are kept to go back to, which may happen so often without an image to blame.
_KEPT_EVERY = 100
_MAX_RETURNS = 3
_NAMED = 5
_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class _Descent:
    """What the gradients of a step are of: its losses, NaN for what was not computed, and the rows of its images."""

    wake: float
    sleep: float
    finite: bool
    rows: Tensor


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
        self.left_out = torch.zeros(0, dtype=torch.long)
        self.drawn_from = torch.arange(particles.n_particles)
        self.slowdown = 1.0
        self.n_returns = 0
        self.n_parts = 1
        self.kept: Training | None = None
        self.notes: list[Note] = []
        # Of the buffers those that training changes: the statistics of the encoder's BatchNorm.
        lasting = model.state_dict().keys()
        self.statistics = [buffer for name, buffer in model.named_buffers() if name in lasting]
        self.target = None if estimate.reference is None else Target.of(estimate.reference, model)
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
        if self.kept is None:
            self.kept = copy.deepcopy(self._training())
        if self.fit_steps_left:
            return self._step_of_fit()
        radius = self.radius
        # What is kept is what a step was made from that turned out well.
        due = self.steps_done > 0 and self.steps_done % _KEPT_EVERY == 0
        before = copy.deepcopy(self._training()) if due else None
        awake = self.sleep_batch_size == 0 or self.steps_done % self.wake_interval == 0
        descent = self._descend_within_memory(awake)
        if not descent.finite:
            return self._go_back(descent.rows)
        self.kept = before or self.kept
        self.optimizer.step()
        self.schedule.step()
        if awake:
            # The volume has moved: the synthetic images of the steps to come are made from the new one.
            self.asleep_with = None
        self.steps_done += 1
        return AmortizedMetrics(self.steps_done, radius, descent.wake, descent.sleep, math.nan, notes=self._noted())

    def result(self) -> Estimate:
        self.model.eval()
        reference = self.estimate.reference
        if reference is None:
            radius = self.last_radius
            reference = Reference(self.model.volume.to_map(radius), radius, self.noise)
        return replace(self.estimate, model=self.model, reference=reference)

    def state(self) -> AmortizedState:
        return AmortizedState(self._training(), self.kept, self.left_out, self.slowdown, self.n_returns, self.n_parts)

    def restore(self, state: AmortizedState) -> None:
        self.kept, self.slowdown = state.kept, state.slowdown
        self.n_returns, self.n_parts = state.n_returns, state.n_parts
        self._leave_out(state.left_out)
        self._take_up(state.training)

    def _training(self) -> Training:
        return Training(
            self.steps_done,
            self.fit_steps_left,
            self.model.state_dict(),
            self.optimizer.state_dict(),
            self.fit_optimizer.state_dict(),
            self.schedule.state_dict(),
            self.asleep_with,
        )

    def _take_up(self, training: Training) -> None:
        """Go on from there, with the present slowdown. What is given is worked on."""
        self.steps_done, self.fit_steps_left = training.steps_done, training.fit_steps_left
        self.model.load_state_dict(training.weights)
        self.optimizer.load_state_dict(training.optimizer)
        self.fit_optimizer.load_state_dict(training.fit_optimizer)
        self.schedule.load_state_dict(training.schedule)
        self.asleep_with = training.asleep_with
        self._set_rates()

    def _set_rates(self) -> None:
        """Learning rates as the schedule and the slowdown have them."""
        for group, rate in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = rate * self._learning_rate_factor(self.steps_done)
        for group in self.fit_optimizer.param_groups:
            group["lr"] = _FIT_LEARNING_RATE * self.slowdown

    def _leave_out(self, rows: Tensor) -> None:
        """Draw these rows (C,) no more."""
        self.left_out = rows
        drawn = torch.ones(self.particles.n_particles, dtype=torch.bool)
        drawn[rows] = False
        self.drawn_from = drawn.nonzero().flatten()

    def _draw(self, n: int) -> Tensor:
        """Rows (n,) at random."""
        return self.drawn_from[torch.randint(len(self.drawn_from), (n,), generator=self.generator)]

    # ------------------------------------------------------------------------------ one step

    def _descend_within_memory(self, awake: bool) -> _Descent:
        """The gradients of a step, in as few parts as memory has room for.

        Raises
        ------
        MemoryError
            If there is no room for a single image.
        """
        n_parts, generator = self.n_parts, self.generator.get_state()
        statistics = [buffer.clone() for buffer in self.statistics]
        while True:
            try:
                descent = self._descend(awake)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.n_parts >= max(self.wake_batch_size, self.sleep_batch_size):
                    raise MemoryError(
                        "amortized: not even one image at a time fits; a smaller --amortized.wake-batch-size, "
                        "--amortized.sleep-batch-size or --amortized.box would take less"
                    ) from error
            else:
                if self.n_parts > n_parts:
                    self.notes.append(Note(self._about_parts()))
                return descent
            # Here, because the error held on to all that there was when it came.
            self.n_parts *= 2
            self.generator.set_state(generator)
            for buffer, before in zip(self.statistics, statistics, strict=True):
                buffer.copy_(before)

    def _descend(self, awake: bool) -> _Descent:
        """Draw the images of a step and add up the gradients of its losses."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        networks = (self.model.encoder, self.model.volume)
        wake, sleep = math.nan, math.nan
        numbers: list[float] = []
        rows: list[Tensor] = []
        if awake:
            rows.append(self._draw(self.wake_batch_size).sort().values)
            wake = self._backward(*self._wake_losses(rows[-1], self._sampled_volume()))
            numbers.append(wake)
        if self.sleep_batch_size:
            rows.append(self._draw(self.sleep_batch_size))
            sleep = self._backward(*self._sleep_losses(rows[-1]))
            numbers.append(sleep)
        numbers += [float(nn.utils.clip_grad_norm_(part.parameters(), _GRADIENT_NORM)) for part in networks]
        return _Descent(wake, sleep, all(map(math.isfinite, numbers)), torch.cat(rows))

    def _backward(self, losses: Tensor, scores: Tensor) -> float:
        """Add the gradient of the mean of losses (B,) and of scores (B,); returns the mean of the losses."""
        loss = losses.mean()
        (loss + _SCORE_WEIGHT * scores.mean()).backward()
        return float(loss.detach())

    def _sampled_volume(self) -> SampledVolume:
        with self._aside(), fast_matrices(self.full_precision.device):
            return self.model.volume.sampled(self.radius)

    def _aside(self) -> AbstractContextManager[object]:
        """Where memory is short, what a gradient needs of the way there waits in the memory of the host."""
        return torch.autograd.graph.save_on_cpu() if self.n_parts > 1 else nullcontext()

    def _parts(self, n: int) -> list[slice]:
        size = math.ceil(n / self.n_parts)
        return [slice(first, first + size) for first in range(0, n, size)]

    def _wake_losses(self, rows: Tensor, volume: SampledVolume) -> tuple[Tensor, Tensor]:
        """Losses (B,) of the best hypotheses for images of the data, and of what the encoder said of these."""
        return self._judged(self.particles.batch(rows, self.model.imaging.max_radius), volume)

    def _judged(self, batch: ParticleBatch, volume: SampledVolume) -> tuple[Tensor, Tensor]:
        # The encoder has to see the whole batch: BatchNorm makes of an image what it is among the others. It is the
        # predictions, many to an image, that take the room.
        with self._aside():
            hypotheses = self.model.propose(batch, self.precision)
            readings = [
                self.model.judge(_part(batch, part), hypotheses.poses[part], volume, self.precision)
                for part in self._parts(len(batch))
            ]
        choice = torch.cat([reading.hypothesis for reading in readings])
        return torch.cat([reading.loss for reading in readings]), score_loss(hypotheses, choice)

    def _sleep_losses(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (B,) of the nearest hypotheses for synthetic images, and of what the encoder said of these."""
        batch, truth = self._dream(rows)
        # Of a synthetic image the half turn teaches nothing new: ask about the image alone.
        with self._aside():
            hypotheses = self.model.encode(batch, self.precision)
        extent = self.particles.n_pixels * self.particles.pixel_size_in_angstroms
        best = pose_loss(
            hypotheses.poses,
            truth,
            shift_unit_in_angstroms=_SHIFT_UNIT_IN_BOXES * extent,
            mean_weight=_MEAN_OVER_HEADS,
        )
        return best.loss, score_loss(hypotheses, best.choice)

    @torch.no_grad()
    def _dream(self, rows: Tensor) -> tuple[ParticleBatch, Poses]:
        """Synthetic particles of the current volume with the optics of ``rows`` (B,), and their poses (B,)."""
        if self.asleep_with is None:
            # By way of the map, because a coarse lattice that is good enough to learn from has ghosts.
            self.asleep_with = SampledVolume.from_map(self.model.volume.to_map(self.radius), self.last_radius)
        n, device, volume = len(rows), self.full_precision.device, self.asleep_with
        poses = Poses(
            roma.random_rotmat(n, generator=self.generator),
            self.shift_std_in_angstroms * torch.randn(n, 2, generator=self.generator),
        ).to(device)
        optics = self.particles.optics[rows].to(device)
        predict = self.model.imaging.predict
        clean = torch.cat([predict(volume, poses[part], optics[part]) for part in self._parts(n)])
        noise = torch.view_as_complex(torch.randn(*clean.shape, 2, generator=self.generator)).to(device)
        return ParticleBatch(rows, clean + self.deviation * noise, optics), poses

    def _step_of_fit(self) -> AmortizedMetrics:
        self.fit_steps_left -= 1
        error = self._fit()
        if not math.isfinite(error):
            return self._go_back(self.drawn_from[:0])
        return AmortizedMetrics(0, self.last_radius, math.nan, math.nan, error)

    def _fit(self) -> float:
        """One step of the volume towards the map of the estimate; returns the relative error."""
        assert self.target is not None
        choice = torch.randint(len(self.target.points), (_FIT_BATCH,), generator=self.generator)
        return fit_step(self.model.volume, self.target, choice, self.fit_optimizer)

    def _learning_rate_factor(self, step: int) -> float:
        position = step / self.n_steps
        risen = min(1.0, (position + 1 / self.n_steps) / _WARM_UP)
        return self.slowdown * risen * (0.51 + 0.49 * math.cos(math.pi * min(1, position)))

    # ------------------------------------------------------------------------------ trouble

    def _noted(self) -> tuple[Note, ...]:
        """What there is to say; it is said once."""
        notes, self.notes = tuple(self.notes), []
        return notes

    def _about_parts(self) -> str:
        return (
            f"amortized: memory does not suffice for all images of a step at once; from step {self.steps_done + 1} on "
            f"they are compared with their hypotheses in {self.n_parts} parts: slower, and the same otherwise"
        )

    def _go_back(self, rows: Tensor) -> AmortizedMetrics:
        """Undo the steps since the weights were last kept, and leave out what was wrong with ``rows`` (B,).

        Raises
        ------
        RunFailedError
            If it was none of the images too often.
        """
        assert self.kept is not None
        step = self.steps_done + 1
        self._take_up(copy.deepcopy(self.kept))
        rows = rows.unique()
        losses, fine = self._judged_alone(rows)
        culprits = rows[:0]
        # Where no image is fine it is not the images.
        if fine.any() and not fine.all():
            culprits = torch.cat([rows[~fine], self._without_numbers()]).unique()
            self._leave_out(torch.cat([self.left_out, culprits]).unique())
            text = self._about_culprits(culprits)
        elif self.n_returns == _MAX_RETURNS:
            raise RunFailedError(
                f"amortized: the loss of step {step} is not finite, after {self.n_returns} returns to earlier weights "
                "with half of the learning rate each; try another --seed or a lower --amortized.learning-rate"
            )
        else:
            self.n_returns += 1
            self.slowdown /= 2
            self._set_rates()
            text = f"no image is to blame: the learning rate is {self.slowdown:g} of what it was"
        text = f"amortized: the loss or gradient of step {step} is not finite; back to step {self.steps_done}; {text}"
        self.notes.append(Note(text, NonFiniteBatch(step, rows, losses, culprits)))
        return AmortizedMetrics(self.steps_done, self.radius, math.nan, math.nan, math.nan, notes=self._noted())

    def _about_culprits(self, rows: Tensor) -> str:
        some = ", ".join(str(int(row) + 1) for row in self.particles.stack_rows[rows[:_NAMED]])
        more = "" if len(rows) <= _NAMED else f" and {len(rows) - _NAMED:,} more"
        return f"left out of training from here on, counted among the images at the working box: {some}{more}"

    def _judged_alone(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (B,) of the images of ``rows`` (B,), each by itself, and which (B,) have a finite one and gradient."""
        # In evaluation BatchNorm takes each image by itself.
        self.model.eval()
        with torch.no_grad():
            volume = self._sampled_volume()
        losses, fine = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
        for some in rows.split(max(1, self.wake_batch_size // self.n_parts)) if len(rows) else ():
            batch = self.particles.batch(some, self.last_radius)
            coefficients = batch.coefficients.requires_grad_()
            loss, score = self._judged(batch, volume)
            total = loss + _SCORE_WEIGHT * score
            (slope,) = torch.autograd.grad(total.sum(), coefficients)
            losses.append(loss.detach().cpu())
            fine.append((total.isfinite() & slope.isfinite().all(dim=1)).cpu())
        return torch.cat(losses), torch.cat(fine)

    def _without_numbers(self) -> Tensor:
        """Rows of all images that have coefficients which are not finite: one seldom comes alone."""
        batches = self.particles.batches(self.drawn_from, _CHUNK, self.last_radius)
        found = torch.cat([~batch.coefficients.isfinite().all(dim=1).cpu() for batch in batches])
        return self.drawn_from[found]


def _part(batch: ParticleBatch, part: slice) -> ParticleBatch:
    return ParticleBatch(batch.indices[part], batch.coefficients[part], batch.optics[part])


def _white_noise(model: CryoAI) -> NoiseSpectrum:
    """The noise of normalised images as long as there is no map: all coefficients count alike, as published."""
    return NoiseSpectrum(torch.ones(model.imaging.max_radius + 1, device=model.imaging.coordinates.device))


def parameter_groups(model: CryoAI, learning_rate: float, volume_learning_rate: float) -> list[dict[str, object]]:
    """Every trainable parameter of the model, once."""
    return [
        {"params": list(model.encoder.parameters()), "lr": learning_rate},
        {"params": list(model.volume.parameters()), "lr": volume_learning_rate},
    ]
