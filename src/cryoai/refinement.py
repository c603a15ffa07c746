"""Local refinement: every pose moved to the nearest maximum of its likelihood, by second-order steps.

The residual of an image is nearly linear in a small rotation and a small shift, and the transform of
a map has a gradient that costs as little to interpolate as its values. So a few Gauss-Newton steps
in five parameters take the place of many gradient steps: with ``J`` the derivative of the prediction
and ``r`` the residual, both divided by the standard deviation of the noise, a step solves
``(J^T J + damping) step = J^T r`` (Levenberg 1944; Nocedal & Wright, Numerical Optimization, 10.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import roma
import torch
from torch import Tensor

from cryoai.imaging import ImagingModel
from cryoai.noise import NoiseSpectrum, log_likelihood
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses
from cryoai.volumes import SampledVolume

__all__ = ["RefinedPoses", "refine_coarse_to_fine", "refine_poses"]

_DAMPING = 0.05
# A shift may move the outermost shell by a sixth of a period in one step.
_SHIFT_STEP_IN_PERIODS = 1 / 6


@dataclass(frozen=True, eq=False)
class RefinedPoses:
    """Poses (B,) and their log-likelihoods (B,), up to a constant of each image."""

    poses: Poses
    log_likelihoods: Tensor

    def better_of(self, other: RefinedPoses) -> RefinedPoses:
        """For every particle the likelier of the two."""
        wins = other.log_likelihoods > self.log_likelihoods
        poses = Poses(
            torch.where(wins[:, None, None], other.poses.rotations, self.poses.rotations),
            torch.where(wins[:, None], other.poses.shifts_in_angstroms, self.poses.shifts_in_angstroms),
        )
        return RefinedPoses(poses, torch.where(wins, other.log_likelihoods, self.log_likelihoods))

    def __getitem__(self, index: Tensor) -> RefinedPoses:
        return RefinedPoses(self.poses[index], self.log_likelihoods[index])

    def with_better(self, where: Tensor, other: RefinedPoses) -> RefinedPoses:
        """These, with the likelier of the two at the particles ``where`` (B,); ``other`` holds only those."""
        best = self[where].better_of(other)
        rotations, shifts = self.poses.rotations.clone(), self.poses.shifts_in_angstroms.clone()
        log_likelihoods = self.log_likelihoods.clone()
        rotations[where], shifts[where] = best.poses.rotations, best.poses.shifts_in_angstroms
        log_likelihoods[where] = best.log_likelihoods
        return RefinedPoses(Poses(rotations, shifts), log_likelihoods)


def refine_poses(
    batch: ParticleBatch,
    start: Poses,
    volume: SampledVolume,
    imaging: ImagingModel,
    precision: Tensor,
    n_iterations: int,
) -> RefinedPoses:
    """The likeliest of the poses (B,) met on ``n_iterations`` steps from ``start`` (B,).

    Never worse than the start. ``volume`` needs its gradient columns
    (:meth:`SampledVolume.from_map` with ``with_gradient=True``); ``precision`` (p,) is ``1 / s^2``.
    Rotations come back orthonormal.
    """
    observed = batch.coefficients[:, : imaging.n_coefficients]
    ctf = imaging.ctf(batch.optics)
    best: RefinedPoses | None = None
    poses = start
    for _ in range(n_iterations):
        met, poses = _gauss_newton_step(observed, ctf, poses, batch, volume, imaging, precision)
        best = met if best is None else best.better_of(met)
    predicted = imaging.predict(volume, poses, batch.optics)
    last = RefinedPoses(poses, log_likelihood(observed, predicted, precision))
    return last if best is None else best.better_of(last)


def refine_coarse_to_fine(
    batch: ParticleBatch,
    start: Poses,
    volume: SampledVolume,
    imaging: ImagingModel,
    noise: NoiseSpectrum,
    n_iterations: int,
) -> RefinedPoses:
    """Refine at half, three quarters and all of the band limit of ``imaging``, in that order.

    Each at ``n_iterations`` steps; the coarser the band, the further the maximum is seen from. The
    log-likelihoods are those of the whole band, and never worse than the start's. Without steps it is only judged.
    """
    radius, poses = imaging.max_radius, start
    for limit in sorted({max(4, radius // 2), max(4, 3 * radius // 4), radius}) if n_iterations else ():
        coarse = replace(imaging, max_radius=min(limit, radius))
        poses = refine_poses(batch, poses, volume, coarse, noise.precision(coarse), n_iterations).poses
    ends = [refine_poses(batch, end, volume, imaging, noise.precision(imaging), 0) for end in (start, poses)]
    return ends[0].better_of(ends[1])


def _gauss_newton_step(
    observed: Tensor,
    ctf: Tensor,
    poses: Poses,
    batch: ParticleBatch,
    volume: SampledVolume,
    imaging: ImagingModel,
    precision: Tensor,
) -> tuple[RefinedPoses, Poses]:
    """The poses with their log-likelihood, and the poses one step further."""
    points = imaging.points(poses.rotations, batch.optics)
    values, gradients = volume.with_gradient(points)
    transfer = ctf * imaging.shift_phases(poses.shifts_in_angstroms, batch.optics)
    predicted = transfer * values
    residual = observed - predicted
    # R -> exp(w) R moves a frequency k by w x k, and V by w . (k x grad V).
    by_rotation = torch.linalg.cross(points.to(gradients.dtype), gradients) * transfer[..., None]
    # radians = 2 pi * cycles per pixel * (pixels per angstrom) * angstroms
    per_angstrom = imaging.coordinates / batch.optics.pixel_size_in_angstroms[:, None, None]
    by_shift = predicted[..., None] * (2j * math.pi * per_angstrom)
    jacobian = torch.cat([by_rotation, by_shift], dim=-1) * precision.sqrt()[:, None]
    step = _damped_solution(jacobian, residual * precision.sqrt())
    radius = imaging.max_radius
    turn = _clipped(step[:, :3], torch.as_tensor(1 / radius))
    extent = batch.optics.pixel_size_in_angstroms * imaging.disc.n_pixels
    move = _clipped(step[:, 3:], (_SHIFT_STEP_IN_PERIODS * extent / radius)[:, None])
    here = RefinedPoses(poses, log_likelihood(observed, predicted, precision))
    rotations = roma.special_gramschmidt((roma.rotvec_to_rotmat(turn) @ poses.rotations)[..., :2])
    return here, Poses(rotations, poses.shifts_in_angstroms + move)


def _damped_solution(jacobian: Tensor, residual: Tensor) -> Tensor:
    """Least-squares steps (B, q) for jacobians (B, p, q) and residuals (B, p), both complex."""
    columns = torch.view_as_real(jacobian.transpose(1, 2).contiguous()).flatten(2)
    target = torch.view_as_real(residual.contiguous()).flatten(1)
    normal = columns @ columns.transpose(1, 2)
    right = (columns @ target[..., None])[..., 0]
    diagonal = torch.diagonal(normal, dim1=1, dim2=2)
    # The constant keeps an image that says nothing, such as one before an empty map, where it is.
    damped = normal + torch.diag_embed(_DAMPING * diagonal + 1e-6)
    return torch.linalg.solve(damped, right)


def _clipped(steps: Tensor, longest: Tensor) -> Tensor:
    """Steps (B, q) shortened to at most ``longest``."""
    length = steps.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return steps * (longest.to(steps) / length).clamp(max=1)
