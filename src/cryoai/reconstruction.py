"""From images with known poses to a map, in closed form.

The maximum-a-posteriori map under Gaussian noise and a Gaussian prior is, at every frequency,
``V = sum_i (w_i c_i y_i / s^2) / (sum_i w_i c_i^2 / s^2 + 1 / t^2)`` over the images whose slices
pass there: ``y_i`` their coefficients moved back to the centre, ``c_i`` their CTF, ``w_i`` weights,
``s^2`` the variance of the noise and ``t^2`` that of the signal (Scheres, J. Mol. Biol. 2012).
Bootstrap and Refinement share the sums.

Two halves of the particles, never mixed from Refinement on, make two half maps, and their Fourier
shell correlation says how much of each shell is signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cryoai.fourier import (
    HalfLattice,
    invert_transform,
    shell_mean,
    soft_sphere,
    trilinear_falloff,
)
from cryoai.imaging import ImagingModel
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses

__all__ = ["HalfSets", "ReconstructionSums", "particle_mask"]

# Below this fraction of its shell's mean, a lattice point is too poorly seen to be divided by its
# own weight: RELION's limit for the same purpose.
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True, eq=False)
class ReconstructionSums:
    """The two sums of the closed form on a lattice; :meth:`add` accumulates in place.

    ``sums`` (3, n_points) holds the numerator, real and imaginary, and the denominator.
    """

    lattice: HalfLattice
    sums: Tensor

    @classmethod
    def empty(
        cls, n_pixels: int, max_radius: int, *, oversampling: int = 2, device: torch.device | str = "cpu"
    ) -> ReconstructionSums:
        lattice = HalfLattice(n_pixels, max_radius, oversampling)
        return cls(lattice, torch.zeros((3, lattice.n_points), device=device))

    def add(
        self, batch: ParticleBatch, poses: Poses, imaging: ImagingModel, precision: Tensor, weight: float | Tensor = 1.0
    ) -> None:
        """Add particles at their poses (B, ...).

        ``precision`` (p,) is ``1 / s^2`` of every coefficient, and ``weight``, one or (B,), a further factor of it for
        each pose of a particle.
        """
        observed = batch.coefficients[:, : imaging.n_coefficients]
        ctf = imaging.ctf(batch.optics)
        precisions = torch.as_tensor(weight, device=observed.device).reshape(-1, 1) * precision
        matched, information = precisions * ctf * observed, precisions * ctf.square()
        extra = poses.rotations.ndim - 3
        shape = (len(batch), *(1,) * extra, -1)
        centred = matched.reshape(shape) * imaging.shift_phases(poses.shifts_in_angstroms, batch.optics).conj()
        points = imaging.points(poses.rotations, batch.optics)
        self.lattice.insert(centred, information.reshape(shape).expand(centred.shape), points, self.sums)

    def forget(self, factor: float) -> None:
        """Scale what has been seen so far, in place."""
        self.sums.mul_(factor)

    def __add__(self, other: ReconstructionSums) -> ReconstructionSums:
        return ReconstructionSums(self.lattice, self.sums + other.sums)

    @cached_property
    def _shells(self) -> Tensor:
        # Kept, because every solution needs it. The one spare shell beyond the band limit collects the
        # corners of the lattice.
        radii = self.lattice.radii(device=self.sums.device)
        return (radii + 0.5).floor().long().clamp(max=self.lattice.max_radius + 1)

    def mean_weight(self) -> Tensor:
        """Mean denominator (max_radius + 1,) of each shell: the information gathered there."""
        return self._mean_weight(self.lattice.fold(self.sums))

    def _mean_weight(self, folded: Tensor) -> Tensor:
        return shell_mean(folded[2], self._shells, self.lattice.max_radius + 2)[:-1]

    def solve(self, prior_precision: Tensor, *, max_radius: int | None = None) -> Tensor:
        """The map (n, n, n), given ``1 / t^2`` (max_radius + 1,) for every shell.

        Shells beyond ``max_radius`` (default: the lattice's) are left empty.
        """
        limit = self.lattice.max_radius if max_radius is None else max_radius
        shells = self._shells
        folded = self.lattice.fold(self.sums)
        # A shell without any weight, such as the unused origin, is 0 / epsilon = 0.
        floor = (_LEAST_WEIGHT * self._mean_weight(folded)).clamp_min(1e-12)
        inside = shells <= limit
        shells = shells[inside]
        weight = torch.maximum(folded[2, inside], floor[shells]) + prior_precision[shells]
        values = torch.zeros(self.lattice.n_points, dtype=torch.complex64, device=folded.device)
        values[inside] = torch.complex(folded[0, inside], folded[1, inside]) / weight
        n = self.lattice.n_pixels
        density = invert_transform(self.lattice.fill_in(values), n)
        return density / trilinear_falloff(n, self.lattice.oversampling, device=density.device)


@dataclass(frozen=True, eq=False)
class HalfSets:
    """The sums of two independent halves of the particles, out to the Nyquist frequency."""

    sums: tuple[ReconstructionSums, ReconstructionSums]

    @classmethod
    def empty(cls, n_pixels: int, *, device: torch.device | str = "cpu") -> HalfSets:
        radius = n_pixels // 2
        first, second = (ReconstructionSums.empty(n_pixels, radius, device=device) for _ in range(2))
        return cls((first, second))

    def __add__(self, other: HalfSets) -> HalfSets:
        return HalfSets((self.sums[0] + other.sums[0], self.sums[1] + other.sums[1]))

    def solved(self) -> tuple[Tensor, Tensor]:
        """Both maps (n, n, n), without a prior."""
        no_prior = torch.zeros(self.sums[0].lattice.n_pixels // 2 + 1, device=self.sums[0].sums.device)
        first, second = (sums.solve(no_prior) for sums in self.sums)
        return first, second


def particle_mask(n_pixels: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Soft sphere (n, n, n) that holds any particle centred in its box."""
    return soft_sphere(n_pixels, 0.42 * n_pixels, 0.08 * n_pixels, device=device)
