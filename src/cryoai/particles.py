"""Particles in Fourier space: from the images of a stack to batches of coefficients at a working box."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryoai.contrast import ContrastSign, PowerOfGroups, correlate_with_blob, decide_sign
from cryoai.errors import InputError
from cryoai.formats.files import reserve
from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.limits import BACKGROUND_RADIUS, LARGEST_VALUE
from cryoai.noise import NoiseSpectrum
from cryoai.optics import Optics
from cryoai.particle_stack import Fault, ParticleStack

__all__ = [
    "ParticleBatch",
    "PreparedParticles",
    "Quarantine",
    "prepare_particles",
    "stream_particles",
]

_CHUNK = 256
_PILOT = 2000
# A box that is off by so many pixels is the box of the images.
_SAME_BOX = 0.05
# Of images that cannot be used, so many are named where they are too many.
_NAMED = 5


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


@dataclass(frozen=True, eq=False)
class PreparedParticles:
    """Normalised particles at the working box: a file of coefficients, sorted by radius.

    A band-limited batch reads the beginning of each row only. Memory does not grow with the number
    of particles, beyond their optics.

    Attributes
    ----------
    stack_rows : (N,)
        Rows of the particles in the stack that they were made from.
    faults
        The images of the stack that could not be used.
    """

    path: Path
    disc: FourierDisc
    optics: Optics
    pixel_size_in_angstroms: float
    contrast: ContrastSign
    n_stored: int
    stack_rows: Tensor
    faults: tuple[Fault, ...]

    @property
    def n_particles(self) -> int:
        return len(self.optics)

    @property
    def n_pixels(self) -> int:
        """The working box."""
        return self.disc.n_pixels

    @property
    def n_bytes(self) -> int:
        """Of the file, at least: it has room for those that could not be used."""
        return 4 * self.n_stored * (self.n_particles + len(self.faults))

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
        # In the file they are as in the images; here protein is bright.
        coefficients = self.contrast.sign * torch.view_as_complex(torch.from_numpy(values).float())
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
    max_faulty_share: float = 0.0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda _n_done: None,
) -> PreparedParticles:
    """Normalise, Fourier-crop and store all particles, in chunks and in one pass.

    Every image has the mean of its background subtracted and is divided by the standard deviation
    of its background, the area outside 0.9 of the inscribed circle. Images of another pixel size or box than the
    most common one are transformed at the same frequencies per Å, exactly, and the strength of the signal in each
    optics group is measured.

    Parameters
    ----------
    n_pixels
        The working box, at most that of the images.
    path
        File to write: half-precision coefficients, 4 bytes each.
    sign
        +1 where protein is bright, -1 where it is dark, None to decide it from the data.
    max_faulty_share
        Of the images, so many may be missing, not finite or constant; they are left out.
    progress
        Called with the number of particles done.

    Raises
    ------
    InputError
        If more images than that cannot be used.
    """
    disc = FourierDisc.of_box(n_pixels, device=device)
    extent = stack.pixel_size_in_angstroms * stack.n_pixels
    optics, boxes = _common_extent(stack, n_pixels, extent)
    reserve(path, 4 * stack.n_particles * disc.n_coefficients())
    power = PowerOfGroups(stack.optics_group, disc)
    blob_correlations, usable, faults = [], [], Quarantine(stack, max_faulty_share)
    # Written and not mapped: pages of a map would count as memory of this process.
    with path.open("r+b") as file:
        for indices in torch.arange(stack.n_particles).split(_CHUNK):
            part = faults.sift(_normalised_coefficients(stack, indices, boxes, disc))
            here = optics[part.indices].to(device)
            blob_correlations.append(correlate_with_blob(part.coefficients, here, disc))
            power.add(part.indices, part.coefficients, here)
            limit = float(np.finfo(np.float16).max)
            halves = torch.view_as_real(part.coefficients).clamp(-limit, limit).half()
            file.write(halves.cpu().numpy().data)
            usable.append(part.indices)
            progress(int(indices[-1]) + 1)
        file.flush()
        os.fsync(file.fileno())
    contrast = decide_sign(torch.cat(blob_correlations), sign)
    stack_rows = torch.cat(usable)
    return PreparedParticles(
        path,
        disc,
        replace(optics, contrast_scale=power.scales())[stack_rows],
        extent / n_pixels,
        contrast,
        disc.n_coefficients(),
        stack_rows,
        tuple(faults.found),
    )


def stream_particles(
    stack: ParticleStack,
    n_pixels: int,
    *,
    extent_in_angstroms: float,
    sign: int,
    batch_size: int,
    quarantine: Quarantine,
    device: torch.device | str = "cpu",
) -> Iterator[ParticleBatch]:
    """All usable particles in their order, normalised at a working box of this extent; read once and not stored.

    Normalised like :func:`prepare_particles`, with the sign of the contrast given. Images that cannot be used are
    noted in ``quarantine``.

    Raises
    ------
    InputError
        If the pixels of a particle are too coarse for the working box, or too many images cannot be used.
    """
    disc = FourierDisc.of_box(n_pixels, device=device)
    optics, boxes = _common_extent(stack, n_pixels, extent_in_angstroms)
    for indices in torch.arange(stack.n_particles).split(batch_size):
        part = quarantine.sift(_normalised_coefficients(stack, indices, boxes, disc))
        if len(part.indices):
            yield ParticleBatch(part.indices.to(device), sign * part.coefficients, optics[part.indices].to(device))


@dataclass(frozen=True, eq=False)
class _Normalised:
    """Coefficients (B, P) of the particles ``indices`` (B,) of a stack, and the images among them without use."""

    indices: Tensor
    coefficients: Tensor
    faults: tuple[Fault, ...]
    usable: Tensor


class Quarantine:
    """Sets aside the images that cannot be used, and stops where they are too many.

    Attributes
    ----------
    found
        What was set aside so far, in the order of the stack.
    """

    def __init__(self, stack: ParticleStack, max_faulty_share: float) -> None:
        self._path = stack.table.path
        self._n_particles = stack.n_particles
        self._most = max_faulty_share * stack.n_particles
        self.found: list[Fault] = []

    def note(self, faults: Sequence[Fault]) -> None:
        """Add some that were found elsewhere.

        Raises
        ------
        InputError
            If all that were found are more than the share that is allowed.
        """
        self.found += faults
        if len(self.found) > self._most:
            some = "; ".join(map(str, self.found[:_NAMED]))
            more = "" if len(self.found) <= _NAMED else f"; and {len(self.found) - _NAMED} more so far"
            raise InputError(
                f"{self._path}: too many images cannot be used: {some}{more}; {self._most / self._n_particles:.1%} "
                f"of {self._n_particles} are tolerated: remove the rows, or see cryoai check"
            )

    def sift(self, part: _Normalised) -> _Normalised:
        """The usable ones of some images.

        Raises
        ------
        InputError
            If all that were found are more than the share that is allowed.
        """
        self.note(part.faults)
        if not part.faults:
            return part
        device = part.coefficients.device
        return _Normalised(
            part.indices[part.usable], part.coefficients[part.usable.to(device)], (), part.usable[part.usable]
        )


def _common_extent(stack: ParticleStack, n_pixels: int, extent_in_angstroms: float) -> tuple[Optics, Tensor]:
    """Optics at the working box, and the pixels (N,), not always a whole number, in the common extent."""
    optics = stack.optics
    sizes, exact = stack.image_sizes, extent_in_angstroms / stack.table.pixel_size_in_angstroms
    boxes = torch.from_numpy(np.where(np.abs(exact - sizes) < _SAME_BOX, sizes, exact))
    if float(boxes.min()) < n_pixels - _SAME_BOX:
        row = int(boxes.argmin())
        pixel_size = float(optics.pixel_size_in_angstroms[row])
        raise InputError(
            f"{stack.table.path}: particle row {stack.table.rows[row] + 1} has pixels of {pixel_size:g} Å, "
            f"too coarse for {n_pixels} pixels in {extent_in_angstroms:.0f} Å; give finer images or a working box "
            f"(--box) of {2 * int(boxes.min() / 2)} or fewer pixels"
        )
    return optics.at_box(boxes.float(), n_pixels), boxes


def _normalised_coefficients(stack: ParticleStack, indices: Tensor, boxes: Tensor, disc: FourierDisc) -> _Normalised:
    result = torch.zeros((len(indices), disc.n_coefficients()), dtype=torch.complex64, device=disc.device)
    usable = torch.zeros(len(indices), dtype=torch.bool)
    faults = []
    sizes = torch.from_numpy(stack.image_sizes[indices.numpy()]).double()
    kinds = torch.stack([sizes, boxes[indices]], dim=1)
    for size, box in kinds.unique(dim=0).tolist():
        members = ((kinds[:, 0] == size) & (kinds[:, 1] == box)).nonzero().flatten()
        images = stack.stored_images(indices[members])
        normalised, fine = _normalised(images.to(disc.device))
        result[members.to(disc.device)] = _transformed(normalised, box, disc)
        usable[members] = fine.cpu()
        faults += [stack.fault(int(indices[members[i]]), images[i]) for i in (~fine.cpu()).nonzero().flatten().tolist()]
    return _Normalised(indices, result, tuple(sorted(faults, key=lambda fault: fault.row)), usable)


def _normalised(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, n, n) with a background of mean 0 and variance 1, and which (B,) of them have one."""
    n = images.shape[-1]
    offset = torch.arange(n, device=images.device) - n // 2
    background = offset[:, None] ** 2 + offset**2 > (BACKGROUND_RADIUS * n / 2) ** 2
    deviation, mean = torch.std_mean(images[:, background], dim=1)
    result = (images - mean[:, None, None]) / deviation[:, None, None]
    # Comparisons with what is not finite are false.
    largest = torch.maximum(images.abs().amax(dim=(1, 2)), result.abs().amax(dim=(1, 2)))
    usable = (deviation > 0) & (largest < LARGEST_VALUE)
    return torch.where(usable[:, None, None], result, 0.0), usable


def _transformed(images: Tensor, box: float, disc: FourierDisc) -> Tensor:
    """Coefficients (B, P) of images (B, n, n) cropped or padded to ``box`` pixels; white noise keeps its variance."""
    n = images.shape[-1]
    kept = min(n, 2 * int(box / 2))
    if box == 2 * round(box / 2):
        return disc.from_images(_window(images, int(box))) * (box / kept)
    images = _window(images, kept)
    offset = torch.arange(kept, device=images.device) - kept // 2
    indices = disc.indices
    radius = int(indices.abs().max())
    k = torch.arange(-radius, radius + 1, device=images.device)
    # cycles per box * pixels / pixels per box = cycles
    angle = -2 * math.pi * k[:, None].double() * offset / box
    waves = torch.complex(angle.cos(), angle.sin()).to(torch.complex64)
    spectrum = waves @ images.to(torch.complex64) @ waves[radius:].T
    return spectrum[:, indices[:, 1] + radius, indices[:, 0]] / kept


def _window(images: Tensor, n_pixels: int) -> Tensor:
    """Crop or zero-pad images (B, n, n) about their centre."""
    before = n_pixels // 2 - images.shape[-1] // 2
    after = n_pixels - images.shape[-1] - before
    return torch.nn.functional.pad(images, (before, after, before, after))
