"""Image formation: volume, poses and optics to predicted Fourier coefficients.

``prediction(k) = CTF(k) exp(+2 pi i k . origin) V(R [kx, ky, 0]^T)``: the central slice theorem,
RELION's origin (the content sits at minus the origin) and the contrast transfer function, all
element-wise on the half disc of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cryoai.fourier import FourierDisc, translation_phases
from cryoai.optics import Optics, contrast_transfer_function
from cryoai.poses import Poses

__all__ = ["ImagingModel", "Volume", "slice_points"]

Volume = Callable[[Tensor], Tensor]
"""Frequencies (..., 3) in cycles per pixel to complex values (...)."""


def slice_points(rotations: Tensor, coordinates: Tensor) -> Tensor:
    """Frequencies (..., P, 3) of central slices: ``R [kx, ky, 0]^T``.

    ``rotations`` are (..., 3, 3); ``coordinates`` (P, 2) or (..., P, 2), in cycles per pixel.
    """
    return coordinates @ rotations[..., :2].transpose(-1, -2)


def _per_hypothesis(values: Tensor, n_hypothesis_axes: int) -> Tensor:
    """Give (B, ...) values axes of length one after the first, for hypotheses to broadcast over."""
    return values.reshape(values.shape[0], *(1,) * n_hypothesis_axes, *values.shape[1:])


@dataclass(frozen=True, eq=False)
class ImagingModel:
    """Predicts the coefficients of particles up to a band limit.

    Poses may carry axes of hypotheses after the first: rotations (B, ..., 3, 3) for B particles.

    Attributes
    ----------
    disc
        The half disc of the images.
    pixel_size_in_angstroms
        Of the volume. A particle with another pixel size has its frequencies scaled to match.
    max_radius
        Band limit in Fourier pixels of the images.
    """

    disc: FourierDisc
    pixel_size_in_angstroms: float
    max_radius: int

    @property
    def n_coefficients(self) -> int:
        return self.disc.n_coefficients(self.max_radius)

    @property
    def coordinates(self) -> Tensor:
        """Frequencies (p, 2) in cycles per pixel of the volume, for images of the same pixel size."""
        return self.disc.coordinates[: self.n_coefficients]

    @property
    def shells(self) -> Tensor:
        return self.disc.shells[: self.n_coefficients]

    def ctf(self, optics: Optics) -> Tensor:
        """Contrast transfer functions (B, p)."""
        return contrast_transfer_function(optics, self.disc, self.max_radius)

    def points(self, rotations: Tensor, optics: Optics) -> Tensor:
        """Frequencies (B, ..., p, 3) that the slices at rotations (B, ..., 3, 3) read."""
        # cycles per image pixel * (volume pixels per image pixel) = cycles per volume pixel
        scale = self.pixel_size_in_angstroms / optics.pixel_size_in_angstroms
        hypotheses = rotations.ndim - 3
        scaled = _per_hypothesis(scale[:, None, None] * self.coordinates, hypotheses)
        return slice_points(rotations, scaled)

    def shift_phases(self, shifts_in_angstroms: Tensor, optics: Optics) -> Tensor:
        """Factors (B, ..., p) that put centred content where the shifts (B, ..., 2) say it is."""
        pixel_size = _per_hypothesis(optics.pixel_size_in_angstroms[:, None], shifts_in_angstroms.ndim - 2)
        return translation_phases(-shifts_in_angstroms / pixel_size, self.coordinates)

    def predict(self, volume: Volume, poses: Poses, optics: Optics) -> Tensor:
        """Predicted coefficients (B, ..., p) of particles at poses (B, ...)."""
        slices = volume(self.points(poses.rotations, optics))
        ctf = _per_hypothesis(self.ctf(optics), poses.rotations.ndim - 3)
        return ctf * slices * self.shift_phases(poses.shifts_in_angstroms, optics)
