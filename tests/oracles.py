"""Slow and obviously right answers, in double precision, sharing no code with the package."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from cryoai.optics import Optics


def random_rotations(n, seed=0):
    return torch.from_numpy(Rotation.random(n, rng=seed).as_matrix())


def positions(n):
    """Coordinates of the pixels of one axis relative to the centre."""
    return torch.arange(n, dtype=torch.float64) - n // 2


def direct_image_transform(image, frequencies):
    """``1/n sum_r image(r) exp(-2 pi i k . r)`` at frequencies (P, 2), ordered (x, y)."""
    n = image.shape[-1]
    r = positions(n)
    x = torch.exp(-2j * math.pi * frequencies[:, :1] * r)
    y = torch.exp(-2j * math.pi * frequencies[:, 1:] * r)
    return torch.einsum("py,px,yx->p", y, x, image.to(torch.complex128)) / n


def direct_map_transform(density, frequencies):
    """``1/n sum_r density(r) exp(-2 pi i k . r)`` at frequencies (P, 3), ordered (x, y, z)."""
    n = density.shape[-1]
    x, y, z = (torch.exp(-2j * math.pi * k[:, None] * positions(n)) for k in frequencies.double().T)
    return torch.einsum("pz,py,px,zyx->p", z, y, x, density.to(torch.complex128)) / n


@dataclass(frozen=True)
class GaussianPhantom:
    """A sum of isotropic 3-D Gaussians; lengths in pixels, centres (G, 3) ordered (x, y, z)."""

    centres: torch.Tensor
    amplitudes: torch.Tensor
    widths: torch.Tensor

    @classmethod
    def example(cls):
        centres = [[2.5, 0.0, -1.0], [-2.0, 2.2, 0.5], [0.3, -2.6, 1.8], [-0.7, 1.0, -2.7], [1.2, 1.5, 2.4]]
        return cls(
            torch.tensor(centres, dtype=torch.float64),
            torch.tensor([1.0, 0.8, 1.2, 0.6, 0.9], dtype=torch.float64),
            torch.tensor([1.4, 1.5, 1.35, 1.6, 1.45], dtype=torch.float64),
        )

    def moved(self, rotation, mirrored=False, shift=(0.0, 0.0, 0.0)):
        """Reverse z if mirrored, rotate, then shift."""
        centres = self.centres * torch.tensor([1.0, 1.0, -1.0 if mirrored else 1.0], dtype=torch.float64)
        moved = centres @ rotation.double().T + torch.as_tensor(shift, dtype=torch.float64)
        return GaussianPhantom(moved, self.amplitudes, self.widths)

    def density(self, n):
        r = positions(n)
        x, y, z = (
            torch.exp(-((r - c[:, None]) ** 2) / (2 * self.widths[:, None] ** 2)) for c in self.centres.T.contiguous()
        )
        return torch.einsum("g,gz,gy,gx->zyx", self.amplitudes, z, y, x)

    def transform(self, frequencies, n):
        """Transform of the density, divided by ``n``, at frequencies (..., 3) in cycles per pixel."""
        k = frequencies.double()
        masses = self.amplitudes * (2 * math.pi * self.widths**2) ** 1.5
        envelope = torch.exp(-2 * math.pi**2 * self.widths**2 * k.square().sum(-1, keepdim=True))
        return (masses * envelope * torch.exp(-2j * math.pi * (k @ self.centres.T))).sum(-1) / n

    def projection(self, n, rotation, displacement=(0.0, 0.0)):
        """Line integrals along the view, of the content displaced by (x, y) pixels."""
        # The rotation takes image axes to the particle, so its transpose brings the particle to the image.
        seen = (self.centres @ rotation.double())[:, :2] + torch.as_tensor(displacement, dtype=torch.float64)
        r = positions(n)
        x, y = (torch.exp(-((r - c[:, None]) ** 2) / (2 * self.widths[:, None] ** 2)) for c in seen.T.contiguous())
        return torch.einsum("g,gy,gx->yx", self.amplitudes * math.sqrt(2 * math.pi) * self.widths, y, x)

    def image_coefficients(self, frequencies, n, rotation, displacement=(0.0, 0.0)):
        """Closed-form transform of :meth:`projection` at frequencies (P, 2)."""
        k = frequencies.double()
        slices = self.transform(k @ rotation.double()[:, :2].T, n)
        return slices * torch.exp(-2j * math.pi * (k @ torch.as_tensor(displacement, dtype=torch.float64)))


# Defaults of a 300 kV microscope, without phase plate or envelope.
MICROSCOPE = {
    "pixel_size_in_angstroms": 3.0,
    "voltage_in_kilovolts": 300.0,
    "spherical_aberration_in_mm": 2.7,
    "amplitude_contrast": 0.1,
    "defocus_u_in_angstroms": 12000.0,
    "defocus_v_in_angstroms": 11000.0,
    "defocus_angle_in_degrees": 25.0,
    "phase_shift_in_degrees": 0.0,
    "b_factor_in_square_angstroms": 0.0,
    "contrast_scale": 1.0,
}


def make_optics(n=None, **changes):
    """Optics of ``n`` particles (default: as many as the longest change has); numbers apply to all."""
    values = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in {**MICROSCOPE, **changes}.items()}
    n = n or max(value.numel() for value in values.values())
    return Optics(**{name: value.expand(n).clone() for name, value in values.items()})


def textbook_ctf(frequencies, **changes):
    """RELION's formula (P,) at frequencies (P, 2) in cycles per pixel, for one particle."""
    p = {**MICROSCOPE, **changes}
    k = frequencies.double().numpy() / p["pixel_size_in_angstroms"]
    squared = (k**2).sum(-1)
    angle = np.arctan2(k[:, 1], k[:, 0]) - np.deg2rad(p["defocus_angle_in_degrees"])
    volts = p["voltage_in_kilovolts"] * 1e3
    wavelength = 12.2643247 / np.sqrt(volts * (1 + volts * 0.978466e-6))
    u, v = p["defocus_u_in_angstroms"], p["defocus_v_in_angstroms"]
    defocus = u * np.cos(angle) ** 2 + v * np.sin(angle) ** 2
    aberration = p["spherical_aberration_in_mm"] * 1e7
    phase = np.pi * wavelength * defocus * squared - np.pi / 2 * aberration * wavelength**3 * squared**2
    phase += np.deg2rad(p["phase_shift_in_degrees"]) + np.arcsin(p["amplitude_contrast"])
    return p["contrast_scale"] * torch.from_numpy(
        np.sin(phase) * np.exp(-p["b_factor_in_square_angstroms"] / 4 * squared)
    )
