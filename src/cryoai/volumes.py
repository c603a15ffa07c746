"""Volumes: what is asked for its Fourier transform at given frequencies.

A volume is a function from frequencies (..., 3), ordered (x, y, z), in cycles per pixel, to complex
values (...). :class:`FourierNetVolume` and :class:`VoxelVolume` are learned; :class:`SampledVolume`
is any of them, or a map, read off a lattice by interpolation, which is what makes slices cheap.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cryoai.fourier import HalfLattice, invert_transform, transform_map, trilinear_falloff

__all__ = ["AbstractVolume", "FourierNetVolume", "SampledVolume", "VoxelVolume"]


@dataclass(frozen=True, eq=False)
class SampledVolume:
    """A transform known on the points of a lattice.

    Attributes
    ----------
    values : (n_points, C) complex
        In column 0 the transform; in columns 1 to 3, if present, -i times its gradient with respect
        to the frequency (x, y, z) in cycles per pixel. All are Hermitian.
    """

    lattice: HalfLattice
    values: Tensor

    @classmethod
    def from_map(
        cls, density: Tensor, max_radius: int, *, oversampling: int = 2, with_gradient: bool = False
    ) -> SampledVolume:
        """Sample the transform of a map (n, n, n) out to ``max_radius`` Fourier pixels."""
        n = density.shape[-1]
        lattice = HalfLattice(n, max_radius, oversampling)
        corrected = density / trilinear_falloff(n, oversampling, device=density.device)
        maps = [corrected]
        if with_gradient:
            # d/dk of exp(-2 pi i k . r) brings down a factor of -2 pi i r
            r = (torch.arange(n, device=density.device) - n // 2) * (-2 * math.pi)
            maps += [corrected * r, corrected * r[:, None], corrected * r[:, None, None]]
        columns = [lattice.cut_out(transform_map(m, oversampling)) for m in maps]
        return cls(lattice, torch.stack(columns, dim=-1))

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Values (...) at frequencies (..., 3); zero outside the lattice, a shell beyond the band limit."""
        return self.lattice.read(self.values[:, :1], frequencies)[..., 0]

    def with_gradient(self, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Values (...) and gradients (..., 3) at frequencies (..., 3)."""
        found = self.lattice.read(self.values, frequencies)
        # The factor i is left until here: without it the columns are Hermitian, as the lattice needs.
        return found[..., 0], 1j * found[..., 1:]


class AbstractVolume(nn.Module, ABC):
    """A learned volume. Its transform is Hermitian: ``V(-k) = conj V(k)``."""

    n_pixels: int
    sampling_oversampling: int
    """Lattice points per Fourier pixel when slices are interpolated."""

    @abstractmethod
    def forward(self, frequencies: Tensor) -> Tensor:
        """Values (...), complex, at frequencies (..., 3) in cycles per pixel."""

    @abstractmethod
    def sampled(self, max_radius: int) -> SampledVolume:
        """The volume on a lattice, from which any number of slices costs little. Differentiable."""

    @abstractmethod
    def to_map(self, max_radius: int) -> Tensor:
        """The density (n, n, n), band-limited to ``max_radius``; without gradient."""


class FourierNetVolume(AbstractVolume):
    """The implicit volume of CryoAI: a SIREN modulant times the exponential of a SIREN envelope.

    ``V(k) = exp(E_re(k)) M_re(k) + i exp(E_im(k)) M_im(k)`` (Levy et al. 2022, section 3.3), with
    frequencies scaled so that Nyquist is 1. Half of the space is evaluated and the other half is
    its conjugate, so that Friedel's law holds exactly.

    Parameters
    ----------
    n_pixels
        Box of the map.
    width
        Units of a hidden layer; 256 as published, which makes 332,036 parameters.
    scale
        Fixed factor of the output, so that the networks work on numbers of order one.
    sampling_oversampling
        Lattice points per Fourier pixel when slices are interpolated.
    """

    def __init__(self, n_pixels: int, *, width: int = 256, scale: float = 1.0, sampling_oversampling: int = 2) -> None:
        super().__init__()
        self.n_pixels = n_pixels
        self.scale = scale
        self.sampling_oversampling = sampling_oversampling
        self.modulant = _Siren(width, n_hidden=3, frequency=40.0)
        self.envelope = _Siren(width, n_hidden=2, frequency=30.0)

    def forward(self, frequencies: Tensor) -> Tensor:
        # The published coordinates run from -1 to 1 between the Nyquist frequencies.
        k = 2 * frequencies
        x, y, z = k.unbind(-1)
        mirrored = (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))
        k = torch.where(mirrored[..., None], -k, k)
        value = self.scale * torch.exp(self.envelope(k)) * self.modulant(k)
        real, imaginary = value.unbind(-1)
        at_origin = (k == 0).all(-1)
        sign = torch.where(mirrored, -1.0, 1.0) * torch.where(at_origin, 0.0, 1.0)
        return torch.complex(real, imaginary * sign)

    @torch.no_grad()
    def to_map(self, max_radius: int) -> Tensor:
        lattice = HalfLattice(self.n_pixels, max_radius, 1)
        device = next(self.parameters()).device
        inside = lattice.radii(device=device) < max_radius + 0.5
        values = torch.zeros(lattice.n_points, dtype=torch.complex64, device=device)
        values[inside] = self(lattice.frequencies(device=device)[inside])
        density = invert_transform(lattice.fill_in(values), self.n_pixels)
        # What was trained is what interpolation makes of the lattice.
        return density * trilinear_falloff(self.n_pixels, self.sampling_oversampling, device=device)

    def sampled(self, max_radius: int) -> SampledVolume:
        lattice = HalfLattice(self.n_pixels, max_radius, self.sampling_oversampling)
        device = next(self.parameters()).device
        # Beyond the corners of the last shell no slice reads the lattice.
        needed = lattice.radii(device=device) < max_radius + 0.5 + 2 / self.sampling_oversampling
        points = lattice.frequencies(device=device)[needed]
        values = torch.zeros(lattice.n_points, dtype=torch.complex64, device=device)
        rows = needed.nonzero().flatten()
        return SampledVolume(lattice, values.index_put((rows,), self(points))[:, None])


class VoxelVolume(AbstractVolume):
    """The explicit alternative: a grid of densities, one parameter a voxel."""

    def __init__(self, density: Tensor, *, sampling_oversampling: int = 2) -> None:
        super().__init__()
        self.n_pixels = density.shape[-1]
        self.sampling_oversampling = sampling_oversampling
        self.density = nn.Parameter(density.clone())

    def forward(self, frequencies: Tensor) -> Tensor:
        radius = math.ceil(float(frequencies.detach().abs().max()) * math.sqrt(3) * self.n_pixels)
        return self.sampled(min(radius, self.n_pixels // 2))(frequencies)

    @torch.no_grad()
    def to_map(self, max_radius: int) -> Tensor:
        lattice = HalfLattice(self.n_pixels, max_radius, 1)
        values = lattice.cut_out(transform_map(self.density))
        inside = lattice.radii(device=values.device) < max_radius + 0.5
        return invert_transform(lattice.fill_in(torch.where(inside, values, 0)), self.n_pixels)

    def sampled(self, max_radius: int) -> SampledVolume:
        return SampledVolume.from_map(self.density, max_radius, oversampling=self.sampling_oversampling)


class _Sine(nn.Module):
    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x)


class _Siren(nn.Module):
    """Sinusoidal network 3 -> 2 with the initialisation of Sitzmann et al. (2020)."""

    def __init__(self, width: int, *, n_hidden: int, frequency: float) -> None:
        super().__init__()
        bound = math.sqrt(6 / width) / frequency
        self.input = _uniform_linear(3, width, 1 / 3)
        hidden = [[_uniform_linear(width, width, bound), _Sine(frequency)] for _ in range(n_hidden)]
        self.hidden = nn.Sequential(_Sine(frequency), *(layer for pair in hidden for layer in pair))
        self.output = _uniform_linear(width, 2, bound)

    def forward(self, k: Tensor) -> Tensor:
        # Phases of many radians and exponents do not bear the rounding of an autocast layer.
        with torch.autocast(k.device.type, enabled=False):
            phases = self.input(k)
        features = self.hidden(phases)
        with torch.autocast(k.device.type, enabled=False):
            return self.output(features.float() if k.dtype == torch.float32 else features)


def _uniform_linear(n_inputs: int, n_outputs: int, bound: float) -> nn.Linear:
    linear = nn.Linear(n_inputs, n_outputs)
    nn.init.uniform_(linear.weight, -bound, bound)
    return linear
