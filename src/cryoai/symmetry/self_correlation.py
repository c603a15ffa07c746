"""How much of a map is left unchanged by a rotation: the correlation of one half map with the other turned.

With ``F1`` and ``F2`` the transforms of two independent half maps, ``FSC(s)`` their correlation in
shell ``s`` and ``N(s)`` its number of coefficients, the share of the reproducible signal that a
rotation leaves unchanged is

``sum_s N FSC(s) FSC(s; turned) / sum_s N FSC(s)^2``,

``FSC(s; turned)`` being the correlation of ``F1`` with ``F2`` turned. It is 1 for a symmetry of the
particle whatever the noise of the half maps, which are independent of each other, and a shell
counts for what it knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.fourier import (
    HalfLattice,
    fourier_shell_correlation,
    shell_sum,
    transform_map,
    translation_phases,
)
from cryoai.volumes import SampledVolume

__all__ = ["SelfCorrelation"]

_CHUNK = 64


@dataclass(frozen=True, eq=False)
class SelfCorrelation:
    """Shares of the reproducible signal that rotations about any centre leave unchanged.

    Attributes
    ----------
    n_pixels
        Box of the maps.
    points : (P, 3)
        Frequencies in cycles per pixel, of half of the space.
    target : (P,) complex
        The first half map, weighted such that its inner product with the second is the share.
    volume
        The second half map.
    """

    n_pixels: int
    max_radius: int
    points: Tensor
    target: Tensor
    volume: SampledVolume

    @classmethod
    def of_half_maps(cls, first: Tensor, second: Tensor, max_radius: int) -> SelfCorrelation:
        """Compare half maps (n, n, n), masked, in shells 1 to ``max_radius``."""
        n, device = first.shape[-1], first.device
        lattice = HalfLattice(n, max_radius, 1)
        radii = lattice.radii(device=device)
        inside = (radii > 0.5) & (radii < max_radius + 0.5)
        points = lattice.frequencies(device=device)[inside]
        shells = (radii[inside] + 0.5).floor().long()
        # The plane x = 0 holds both of each pair of mates.
        mates = torch.where(points[:, 0] == 0, 1.0, 2.0)

        def total(values: Tensor) -> Tensor:
            return shell_sum(mates * values, shells, max_radius + 1)

        a, b = (lattice.cut_out(transform_map(half))[inside] for half in (first, second))
        correlation = fourier_shell_correlation(first, second)[: max_radius + 1].float().clamp_min(0)
        amplitude = (total(a.abs().square()) * total(b.abs().square())).sqrt().clamp_min(torch.finfo(a.real.dtype).tiny)
        counts = total(torch.ones_like(mates))
        known = (counts * correlation.square()).sum().clamp_min(1e-12)
        weights = counts * correlation / (amplitude * known)
        return cls(n, max_radius, points, mates * weights[shells] * a, SampledVolume.from_map(second, max_radius))

    def shares(self, rotations: Tensor, displacements: Tensor) -> Tensor:
        """Shares (M,) that agree with the map rotated (M, 3, 3), then displaced (M, 3) in pixels.

        Differentiable in both.
        """
        turned = self.volume(self.points @ rotations)
        phases = translation_phases(displacements, self.points)
        return (self.target.conj() * turned * phases).real.sum(-1)

    def largest_shares(self, rotations: Tensor, *, sampling: int = 1) -> tuple[Tensor, Tensor]:
        """The largest share (M,) over all displacements, and that displacement (M, 3) in pixels.

        Displacements are tried in steps of ``n_pixels / (2 (max_radius + 2) sampling)`` pixels.
        """
        size = 2 * (self.max_radius + 2) * sampling
        indices = (self.points * self.n_pixels).round().long()
        rows = ((indices[:, 2] % size) * size + indices[:, 1] % size) * (size // 2 + 1) + indices[:, 0]
        # The inverse transform counts both mates of every pair.
        halves = self.target * torch.where(indices[:, 0] == 0, 1.0, 0.5)
        shares, displacements = [], []
        for chunk in rotations.split(_CHUNK):
            spectra = torch.zeros((len(chunk), size * size * (size // 2 + 1)), dtype=halves.dtype, device=halves.device)
            spectra[:, rows] = halves * self.volume(self.points @ chunk).conj()
            grid = torch.fft.irfftn(spectra.unflatten(1, (size, size, size // 2 + 1)), s=(size,) * 3, norm="forward")
            share, index = grid.flatten(1).max(1)
            zyx = torch.stack(torch.unravel_index(index, (size,) * 3), dim=-1)
            signed = (zyx + size // 2) % size - size // 2
            shares.append(share)
            displacements.append(signed.flip(-1) * (self.n_pixels / size))
        return torch.cat(shares), torch.cat(displacements)
