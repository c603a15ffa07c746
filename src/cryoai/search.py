"""Exhaustive search of poses, as matrix products.

For images ``y``, CTFs ``c``, templates ``X_r`` (slices at trial rotations) and trial shifts ``s``,

``log p(i, s, r) = 2 Re <c_i X_r, y_i e^{-i phi_s}> / s^2 - <c_i^2, |X_r|^2> / s^2 + const``,

which is one real matrix product between shifted images and templates, and a smaller one for the
norms. The slice at a rotation followed by a half turn is the complex conjugate, so that the real
and the imaginary parts of the product, added and subtracted, serve two rotations for the price of
one: the symmetrised pair of CryoAI.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.fourier import translation_phases
from cryoai.hardware import matrix_dtype
from cryoai.imaging import ImagingModel, Volume, slice_points
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses, half_turn, rotation_grid

__all__ = ["Candidates", "Templates", "TrialPoses", "search_poses", "shift_grid"]


def shift_grid(step_in_angstroms: float, n_steps: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Square grid of shifts (S, 2) within a circle of ``n_steps`` steps."""
    axis = torch.arange(-n_steps, n_steps + 1, device=device)
    grid = torch.cartesian_prod(axis, axis)
    return grid[grid.square().sum(1) <= n_steps**2] * step_in_angstroms


@dataclass(frozen=True, eq=False)
class TrialPoses:
    """Rotations (R, 3, 3), each standing for its half turn too, and shifts (S, 2) in Å."""

    rotations: Tensor
    shifts_in_angstroms: Tensor

    @classmethod
    def grid(cls, n_rotations: int, shifts_in_angstroms: Tensor) -> TrialPoses:
        """A near-uniform grid of ``2 * n_rotations`` rotations and the given shifts."""
        return cls(rotation_grid(n_rotations, device=shifts_in_angstroms.device), shifts_in_angstroms)

    def turned(self, rotation: Tensor) -> TrialPoses:
        """The grid rotated by ``rotation`` (3, 3) as a whole."""
        return TrialPoses(rotation @ self.rotations, self.shifts_in_angstroms)


@dataclass(frozen=True, eq=False)
class Templates:
    """Slices of a volume at trial poses, ready for the products."""

    trials: TrialPoses
    real: Tensor  # (p, R)
    imaginary: Tensor  # (p, R)
    power: Tensor  # (p, R)
    phases: Tensor  # (S, p), which undo the trial shifts

    @classmethod
    def of(cls, volume: Volume, trials: TrialPoses, imaging: ImagingModel) -> Templates:
        slices = volume(slice_points(trials.rotations, imaging.coordinates)).T
        dtype = matrix_dtype(slices.device)
        displacements = trials.shifts_in_angstroms / imaging.pixel_size_in_angstroms
        return cls(
            trials,
            slices.real.to(dtype),
            slices.imag.to(dtype),
            slices.abs().square(),
            translation_phases(displacements, imaging.coordinates),
        )


@dataclass(frozen=True, eq=False)
class Candidates:
    """The best poses (B, K) of each particle, best first, and their log-likelihoods (B, K).

    The log-likelihoods are relative to that of an empty image.
    """

    poses: Poses
    log_likelihoods: Tensor


def search_poses(
    batch: ParticleBatch, templates: Templates, imaging: ImagingModel, precision: Tensor, n_best: int
) -> Candidates:
    """The ``n_best`` rotations of the grid for every particle, each with its best shift.

    Pixel sizes that differ between particles are taken to be equal here; refinement is exact.
    """
    ctf = imaging.ctf(batch.optics)
    trials = templates.trials
    n_rotations = len(trials.rotations)
    matched = ctf * precision * batch.coefficients[:, : imaging.n_coefficients]
    shifted = matched[:, None] * templates.phases
    # Products of real parts and of imaginary parts (B, S, R): their sum is the score of the
    # rotation, their difference that of its half turn.
    real = shifted.real.to(templates.real.dtype) @ templates.real
    imaginary = shifted.imag.to(templates.real.dtype) @ templates.imaginary
    norms = (ctf.square() * precision) @ templates.power
    score = 2 * torch.cat([(real + imaginary).amax(1).float(), (real - imaginary).amax(1).float()], dim=1)
    score -= norms.repeat(1, 2)
    log_likelihoods, index = score.topk(min(n_best, score.shape[1]), dim=1)
    turned, index = index >= n_rotations, index % n_rotations
    chosen = index[:, None].expand(-1, real.shape[1], -1)
    sign = torch.where(turned, -1.0, 1.0)[:, None]
    best_shift = (real.gather(2, chosen) + sign * imaginary.gather(2, chosen)).argmax(1)
    rotations = trials.rotations[index]
    rotations = torch.where(turned[..., None, None], half_turn(rotations), rotations)
    return Candidates(Poses(rotations, trials.shifts_in_angstroms[best_shift]), log_likelihoods)
