"""Particles in Fourier space: from the images of a stack to batches of coefficients at a working box."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryoai.errors import InputError
from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.noise import NoiseSpectrum
from cryoai.optics import Optics, contrast_transfer_function
from cryoai.particle_stack import ParticleStack

__all__ = [
    "ContrastSign",
    "ParticleBatch",
    "PreparedParticles",
    "prepare_particles",
    "stream_particles",
]

_CHUNK = 256
_PILOT = 2000
# Outside this fraction of half the box an image is taken to show no particle.
_BACKGROUND_RADIUS = 0.9


@dataclass(frozen=True, eq=False)
class ParticleBatch:
    """Some particles in Fourier space.

    Attributes
    ----------
    indices : (B,) int
        Rows of the particles in their file, counted from 0.
    coefficients : (B, p) complex
        The images on a prefix of the working disc; noise of unit variance has unit power.
    optics
        Of these particles at the working box.
    """

    indices: Tensor
    coefficients: Tensor
    optics: Optics

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Tensor) -> ParticleBatch:
        return ParticleBatch(self.indices[index], self.coefficients[index], self.optics[index])

    def to(self, device: torch.device | str) -> ParticleBatch:
        return ParticleBatch(self.indices.to(device), self.coefficients.to(device), self.optics.to(device))


@dataclass(frozen=True)
class ContrastSign:
    """Whether protein is bright (+1) or dark (-1) in the images, and how sure the data are.

    ``z_score`` is the mean correlation of the images with a blob seen through their CTF, in
    standard errors; it is positive where protein is bright.
    """

    sign: int
    z_score: float


@dataclass(frozen=True, eq=False)
class PreparedParticles:
    """Normalised particles at the working box: a file of coefficients, sorted by radius.

    A band-limited batch reads the beginning of each row only. Memory does not grow with the number
    of particles, beyond their optics.
    """

    path: Path
    disc: FourierDisc
    optics: Optics
    pixel_size_in_angstroms: float
    contrast: ContrastSign
    n_stored: int

    @property
    def n_particles(self) -> int:
        return len(self.optics)

    @property
    def n_pixels(self) -> int:
        """The working box."""
        return self.disc.n_pixels

    def cropped(self, n_pixels: int) -> PreparedParticles:
        """The same particles Fourier-cropped to a smaller box, which costs nothing."""
        return replace(
            self,
            disc=FourierDisc.of_box(n_pixels, device=self.disc.device),
            optics=self.optics.at_box(self.n_pixels, n_pixels),
            pixel_size_in_angstroms=self.pixel_size_in_angstroms * self.n_pixels / n_pixels,
        )

    def imaging(self, max_radius: int) -> ImagingModel:
        """The imaging model of these particles up to a band limit."""
        return ImagingModel(self.disc, self.pixel_size_in_angstroms, min(max_radius, self.disc.max_radius))

    def power(self, rows: Tensor, max_radius: int) -> NoiseSpectrum:
        """Mean power of at most 2,000 of the given particles: the noise, as long as there is no map."""
        batch = self.batch(rows[:_PILOT], max_radius)
        return NoiseSpectrum.of_residuals(batch.coefficients, self.imaging(max_radius))

    def batch(self, indices: Tensor, max_radius: int | None = None) -> ParticleBatch:
        """The particles of rows ``indices`` (B,), in that order, up to a band limit."""
        shape = (self.n_particles, self.n_stored, 2)
        rows = np.memmap(self.path, dtype=np.float16, mode="r", shape=shape)
        values = rows[indices.cpu().numpy(), : self.disc.n_coefficients(max_radius)]
        coefficients = torch.view_as_complex(torch.from_numpy(values).float())
        device = self.disc.device
        return ParticleBatch(indices.to(device), coefficients.to(device), self.optics[indices.cpu()].to(device))

    def batches(self, indices: Tensor, batch_size: int, max_radius: int | None = None) -> Iterator[ParticleBatch]:
        """Consecutive batches of the rows ``indices`` (B,)."""
        for part in indices.split(batch_size):
            yield self.batch(part, max_radius)


def prepare_particles(
    stack: ParticleStack,
    n_pixels: int,
    path: Path,
    *,
    sign: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda _n_done: None,
) -> PreparedParticles:
    """Normalise, Fourier-crop and store all particles, in chunks and in one pass.

    Every image has the mean of its background subtracted and is divided by the standard deviation
    of its background, the area outside 0.9 of the inscribed circle. Images whose pixel size differs
    from the most common one are first cropped or padded to the same physical extent.

    Parameters
    ----------
    n_pixels
        The working box, at most that of the images.
    path
        File to write: half-precision coefficients, 4 bytes each.
    sign
        +1 where protein is bright, -1 where it is dark, None to decide it from the data.
    progress
        Called with the number of particles done.

    Raises
    ------
    InputError
        If an image is not finite or constant.
    """
    disc = FourierDisc.of_box(n_pixels, device=device)
    extent = stack.pixel_size_in_angstroms * stack.n_pixels
    optics, extents = _common_extent(stack, n_pixels, extent)
    shape = (stack.n_particles, disc.n_coefficients(), 2)
    rows = np.memmap(path, dtype=np.float16, mode="w+", shape=shape)
    blob_correlations = []
    for indices in torch.arange(stack.n_particles).split(_CHUNK):
        coefficients = _normalised_coefficients(stack, indices, extents, disc)
        blob_correlations.append(_correlate_with_blob(coefficients, optics[indices].to(device), disc))
        limit = float(np.finfo(np.float16).max)
        halves = torch.view_as_real(coefficients).clamp(-limit, limit).half()
        rows[indices[0] : indices[-1] + 1] = halves.cpu().numpy()
        progress(int(indices[-1]) + 1)
    contrast = _decide_sign(torch.cat(blob_correlations), sign)
    if contrast.sign < 0:
        for start in range(0, len(rows), _CHUNK):
            rows[start : start + _CHUNK] *= -1
    rows.flush()
    pixel_size = stack.pixel_size_in_angstroms * stack.n_pixels / n_pixels
    return PreparedParticles(path, disc, optics, pixel_size, contrast, disc.n_coefficients())


def stream_particles(
    stack: ParticleStack,
    n_pixels: int,
    *,
    extent_in_angstroms: float,
    sign: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[ParticleBatch]:
    """All particles in their order, normalised at a working box of this extent; read once and not stored.

    Normalised like :func:`prepare_particles`, with the sign of the contrast given.

    Raises
    ------
    InputError
        If the pixels of a particle are too coarse for the working box, or an image is not finite or constant.
    """
    disc = FourierDisc.of_box(n_pixels, device=device)
    optics, boxes = _common_extent(stack, n_pixels, extent_in_angstroms)
    for indices in torch.arange(stack.n_particles).split(batch_size):
        coefficients = sign * _normalised_coefficients(stack, indices, boxes, disc)
        yield ParticleBatch(indices.to(device), coefficients, optics[indices].to(device))


def _common_extent(stack: ParticleStack, n_pixels: int, extent_in_angstroms: float) -> tuple[Optics, Tensor]:
    """Optics at the working box, and the box (N,) that gives each particle the common extent."""
    optics = stack.optics
    extent = extent_in_angstroms
    # Even boxes, like the images, so that the centre n // 2 stays where it is.
    boxes = 2 * (extent / optics.pixel_size_in_angstroms / 2).round().long()
    unchanged = (boxes - stack.n_pixels).abs() < 2
    boxes = torch.where(unchanged, stack.n_pixels, boxes)
    if int(boxes.min()) < n_pixels:
        row = int(boxes.argmin())
        pixel_size = float(optics.pixel_size_in_angstroms[row])
        raise InputError(
            f"{stack.table.path}: particle row {stack.table.rows[row] + 1} has pixels of {pixel_size:g} Å, "
            f"too coarse for {n_pixels} pixels in {extent:.0f} Å; give finer images or a working box (--box) "
            f"of {int(boxes.min())} or fewer pixels"
        )
    return optics.at_box(boxes, n_pixels), boxes


def _normalised_coefficients(stack: ParticleStack, indices: Tensor, boxes: Tensor, disc: FourierDisc) -> Tensor:
    images = stack.images(indices).to(disc.device)
    n = stack.n_pixels
    offset = torch.arange(n, device=disc.device) - n // 2
    background = offset[:, None] ** 2 + offset**2 > (_BACKGROUND_RADIUS * n / 2) ** 2
    outside = images[:, background]
    deviation, mean = torch.std_mean(outside, dim=1)
    if bool((deviation <= 0).any()):
        row = int(indices[int((deviation <= 0).nonzero()[0])])
        raise InputError(f"{stack._name_image(row)} is constant; remove the row")
    images = (images - mean[:, None, None]) / deviation[:, None, None]
    result = torch.empty((len(indices), disc.n_coefficients()), dtype=torch.complex64, device=disc.device)
    for box in boxes[indices].unique().tolist():
        members = (boxes[indices] == box).nonzero().flatten().to(disc.device)
        result[members] = disc.from_images(_window(images[members], box))
    return result


def _window(images: Tensor, n_pixels: int) -> Tensor:
    """Crop or zero-pad images (B, n, n) about their centre."""
    before = n_pixels // 2 - images.shape[-1] // 2
    after = n_pixels - images.shape[-1] - before
    return torch.nn.functional.pad(images, (before, after, before, after))


def _correlate_with_blob(coefficients: Tensor, optics: Optics, disc: FourierDisc) -> Tensor:
    """Correlation (B,) of each image with a centred ball seen through its CTF."""
    radius = 8  # the shells in which a ball of half the box differs from noise
    p = disc.n_coefficients(radius)
    ctf = contrast_transfer_function(optics, disc, radius)
    # Gaussian of standard deviation n / 7, the size of a large particle in its box: of such a one the
    # transform is negative from two Fourier pixels on, where a smaller blob would look for it.
    blob = torch.exp(-2 * (math.pi * disc.radii[:p] / 7) ** 2)
    power = (coefficients[:, :p].abs() ** 2).mean(0)
    return (coefficients[:, :p].real * ctf * blob / power).sum(1)


def _decide_sign(correlations: Tensor, sign: int | None) -> ContrastSign:
    deviation, mean = torch.std_mean(correlations)
    z_score = float(mean / (deviation / math.sqrt(len(correlations))).clamp_min(1e-12))
    if sign is None:
        sign = -1 if z_score < 0 else 1
    return ContrastSign(sign, z_score)
