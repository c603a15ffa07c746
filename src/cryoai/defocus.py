"""Local refinement of defocus: one number for every particle, by second-order steps under a prior.

Particles lie at different heights in the ice, and the defocus of their micrograph is that of none of
them. At a fixed pose the prediction of an image is ``c(d) s``: its slice ``s`` times its CTF ``c``,
which alone depends on the change of defocus ``d``. With ``g`` the phase in the CTF,

``d g / d d = pi lambda k^2``  and  ``d c / d g = sqrt(1 - w^2) cos g - w sin g``,

the CTF at a phase advanced by 90°. Under a normal prior of variance ``t^2`` about the defocus that is
listed, a Gauss-Newton step (Nocedal & Wright, Numerical Optimization, 10.3) is the ratio

``(sum_k 2 c' Re((y - c s) s*) / s_k^2 - d / t^2) / (sum_k 2 c'^2 |s|^2 / s_k^2 + 1 / t^2)``,

whose denominator is the precision of the answer (Cramér-Rao). RELION and cryoSPARC refine one defocus
for every particle likewise (Zivanov et al., eLife 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch_ctf import calculate_relativistic_electron_wavelength

from cryoai.imaging import ImagingModel, Volume
from cryoai.optics import Optics
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses

__all__ = ["refine_defocus", "with_defocus_changed"]

# No particle is looked for further away; beyond, it is not the same particle, or not its CTF.
_FURTHEST_IN_STANDARD_DEVIATIONS = 4.0


def with_defocus_changed(optics: Optics, changes_in_angstroms: Tensor) -> Optics:
    """Optics (N,) with the same change (N,) added to the defocus along both axes."""
    return replace(
        optics,
        defocus_u_in_angstroms=optics.defocus_u_in_angstroms + changes_in_angstroms,
        defocus_v_in_angstroms=optics.defocus_v_in_angstroms + changes_in_angstroms,
    )


def refine_defocus(
    batch: ParticleBatch,
    poses: Poses,
    volume: Volume,
    imaging: ImagingModel,
    precision: Tensor,
    *,
    prior_std_in_angstroms: float,
    n_iterations: int,
) -> Tensor:
    """The likeliest of the changes of defocus (B,) in Å met on ``n_iterations`` steps from none.

    To be added along both axes, as :func:`with_defocus_changed` does. The likelihood is that of the images at
    ``poses`` (B,), times a normal prior about no change; the answer is never less likely than no change, and
    no further away than four standard deviations of the prior. ``precision`` (p,) is ``1 / s^2``.
    """
    slices = volume(imaging.points(poses.rotations, batch.optics))
    slices = slices * imaging.shift_phases(poses.shifts_in_angstroms, batch.optics)
    observed = batch.coefficients[:, : imaging.n_coefficients]
    posterior = _Posterior(
        batch.optics,
        imaging,
        (observed * slices.conj()).real * precision,
        slices.abs().square() * precision,
        prior_std_in_angstroms**-2,
    )
    furthest = _FURTHEST_IN_STANDARD_DEVIATIONS * prior_std_in_angstroms
    changes = best = torch.zeros_like(batch.optics.defocus_u_in_angstroms)
    best_value = torch.full_like(best, -torch.inf)
    for _ in range(n_iterations):
        value, steps = posterior.value_and_step(changes)
        best, best_value = torch.where(value > best_value, changes, best), torch.maximum(value, best_value)
        changes = (changes + steps).clamp(-furthest, furthest)
    return torch.where(posterior.value(changes) > best_value, changes, best)


@dataclass(frozen=True, eq=False)
class _Posterior:
    """Log-posterior of changes of defocus (B,): ``sum_k (2 c m - c^2 e) - d^2 / 2 t^2``, up to a constant.

    Only the CTF ``c`` depends on the change: what is left of the images are the real numbers ``matched``
    (B, p), ``Re(y s*) / s_k^2``, and ``energies`` (B, p), ``|s|^2 / s_k^2``.
    """

    optics: Optics
    imaging: ImagingModel
    matched: Tensor
    energies: Tensor
    prior_precision: float

    def value(self, changes: Tensor) -> Tensor:
        """The logarithm (B,) at changes (B,)."""
        ctf = self.imaging.ctf(with_defocus_changed(self.optics, changes))
        return self._value(ctf, changes)

    def value_and_step(self, changes: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm (B,) at changes (B,), and the step (B,) from there."""
        optics = with_defocus_changed(self.optics, changes)
        ctf = self.imaging.ctf(optics)
        slope = _slope_by_defocus(optics, self.imaging)
        gradient = 2 * (slope * (self.matched - ctf * self.energies)).sum(1) - self.prior_precision * changes
        curvature = 2 * (slope.square() * self.energies).sum(1) + self.prior_precision
        return self._value(ctf, changes), gradient / curvature

    def _value(self, ctf: Tensor, changes: Tensor) -> Tensor:
        gain = (ctf * (2 * self.matched - ctf * self.energies)).sum(1)
        return gain - self.prior_precision / 2 * changes.square()


def _slope_by_defocus(optics: Optics, imaging: ImagingModel) -> Tensor:
    """Derivative (B, p) of the CTF with respect to the defocus, per Å."""
    advanced = replace(optics, phase_shift_in_degrees=optics.phase_shift_in_degrees + 90)
    radii = imaging.disc.radii[: imaging.n_coefficients]
    # cycles per Å = Fourier pixels / (pixels * Å per pixel)
    k = radii / (imaging.disc.n_pixels * optics.pixel_size_in_angstroms[:, None])
    # Volts in, metres out.
    wavelength = 1e10 * calculate_relativistic_electron_wavelength(1e3 * optics.voltage_in_kilovolts)
    return math.pi * wavelength[:, None] * k.square() * imaging.ctf(advanced)
