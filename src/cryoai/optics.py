"""What the microscope did to each particle: the contrast transfer function."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch_ctf import calculate_ctf_2d

from cryoai.fourier import FourierDisc

__all__ = ["Optics", "contrast_transfer_function"]


@dataclass(frozen=True, eq=False)
class Optics:
    """Optical parameters of a batch of particles, each a tensor (N,), in RELION's conventions.

    Attributes
    ----------
    pixel_size_in_angstroms
        Pixel size of the images that the coefficients were made from, after any cropping.
    voltage_in_kilovolts, spherical_aberration_in_mm
    amplitude_contrast
        Fraction, 0 to 1.
    defocus_u_in_angstroms, defocus_v_in_angstroms
        Underfocus along the major and minor axis, positive.
    defocus_angle_in_degrees
        Angle from the x axis to the axis of ``defocus_u``.
    phase_shift_in_degrees
        Of a phase plate; 0 without one.
    b_factor_in_square_angstroms
        Envelope ``exp(-B k^2 / 4)``; 0 for none.
    contrast_scale
        Strength of the signal over the noise, compared with other particles of the same stack.
    """

    pixel_size_in_angstroms: Tensor
    voltage_in_kilovolts: Tensor
    spherical_aberration_in_mm: Tensor
    amplitude_contrast: Tensor
    defocus_u_in_angstroms: Tensor
    defocus_v_in_angstroms: Tensor
    defocus_angle_in_degrees: Tensor
    phase_shift_in_degrees: Tensor
    b_factor_in_square_angstroms: Tensor
    contrast_scale: Tensor

    def __len__(self) -> int:
        return self.pixel_size_in_angstroms.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Optics:
        return Optics(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> Optics:
        return Optics(*(getattr(self, f.name).to(device) for f in fields(self)))

    def at_box(self, n_pixels: Tensor | int, new_n_pixels: int) -> Optics:
        """Optics of the same images Fourier-cropped from ``n_pixels`` to ``new_n_pixels``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["pixel_size_in_angstroms"] = self.pixel_size_in_angstroms * (n_pixels / new_n_pixels)
        return Optics(**values)


def contrast_transfer_function(optics: Optics, disc: FourierDisc, max_radius: int | None = None) -> Tensor:
    """Contrast transfer function (N, p) at the coefficients of a disc, up to ``max_radius``.

    ``CTF = scale (sqrt(1 - w^2) sin g + w cos g) exp(-B k^2 / 4)`` with
    ``g = pi lambda df k^2 - pi/2 Cs lambda^3 k^4 + phase shift`` and
    ``df = (u + v) / 2 + (u - v) / 2 cos 2(theta - angle)``: RELION's sign, positive at low frequency
    for underfocus and bright protein. Computed by torch-ctf in single precision; within 3e-3 of the
    formula in double precision.

    Examples
    --------
    >>> one = torch.ones(1)
    >>> optics = Optics(
    ...     2 * one, 300 * one, 2.7 * one, 0.1 * one, 15e3 * one, 14e3 * one, 30 * one, 0 * one, 0 * one, one
    ... )
    >>> disc = FourierDisc.of_box(64)
    >>> round(float(contrast_transfer_function(optics, disc)[0, 0]), 3)  # the amplitude contrast
    0.1
    """
    radius = disc.max_radius if max_radius is None else min(max_radius, disc.max_radius)
    indices = disc.indices[: disc.n_coefficients(radius)]
    # The smallest even box whose transform holds the disc: the same frequencies, fewer of them.
    box = 2 * (radius + 1)
    flat_index = (indices[:, 1] % box) * (box // 2 + 1) + indices[:, 0]
    result = torch.empty((len(optics), len(indices)), device=disc.device)
    for members in _groups_of_equal_microscope(optics):
        group = optics[members]
        ctf = _ctf_of_one_microscope(group, box, disc.n_pixels / box)
        result[members] = ctf.flatten(1)[:, flat_index]
    if bool((optics.b_factor_in_square_angstroms != 0).any()):
        k = disc.radii[: len(indices)] / (disc.n_pixels * optics.pixel_size_in_angstroms[:, None])
        result = result * torch.exp(-optics.b_factor_in_square_angstroms[:, None] / 4 * k**2)
    return result * optics.contrast_scale[:, None]


def _groups_of_equal_microscope(optics: Optics) -> list[Tensor]:
    """Indices of the particles that share all that torch-ctf computes faster as a scalar."""
    if not len(optics):
        return []
    shared = torch.stack(
        [
            optics.pixel_size_in_angstroms,
            optics.voltage_in_kilovolts,
            optics.spherical_aberration_in_mm,
            optics.amplitude_contrast,
            optics.phase_shift_in_degrees,
        ],
        dim=1,
    )
    if bool((shared == shared[0]).all()):
        return [torch.arange(len(optics), device=shared.device)]
    _, group = torch.unique(shared, dim=0, return_inverse=True)
    return [torch.nonzero(group == g).flatten() for g in range(int(group.max()) + 1)]


def _ctf_of_one_microscope(optics: Optics, box: int, magnification: float) -> Tensor:
    """Half-transform CTF (N, box, box // 2 + 1) of particles from one microscope."""
    # torch-ctf takes half the difference of the defoci and returns NaN where it is negative:
    # name the larger defocus u, and turn its axis by 90 degrees where that swaps them.
    u, v = optics.defocus_u_in_angstroms, optics.defocus_v_in_angstroms
    angle = torch.where(u < v, optics.defocus_angle_in_degrees + 90, optics.defocus_angle_in_degrees)
    return calculate_ctf_2d(
        defocus=(u + v) / 2 * 1e-4,  # angstroms to micrometres
        astigmatism=(u - v).abs() / 2 * 1e-4,
        astigmatism_angle=angle,
        voltage=float(optics.voltage_in_kilovolts[0]),
        spherical_aberration=float(optics.spherical_aberration_in_mm[0]),
        amplitude_contrast=float(optics.amplitude_contrast[0]),
        phase_shift=float(optics.phase_shift_in_degrees[0]),
        pixel_size=float(optics.pixel_size_in_angstroms[0]) * magnification,
        image_shape=(box, box),
        rfft=True,
        fftshift=False,
    )
