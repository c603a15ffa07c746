"""What the images show together: contrast, the size of the particle, the noise, and the CTF against the box."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryoai.checks.files import FoundStacks
from cryoai.checks.findings import Finding, Rows, at_rows, said
from cryoai.checks.images import ImageStatistics
from cryoai.contrast import ContrastSign
from cryoai.formats.table import FloatColumn, ParticleTable
from cryoai.fourier import FourierDisc, shell_mean
from cryoai.optics import contrast_transfer_function
from cryoai.particle_stack import ParticleStack
from cryoai.particles import prepare_particles

__all__ = ["Signal", "judge_delocalisation", "judge_signal", "measure_signal"]

_AT_MOST = 2000
_FEWEST = 10
# Coefficients at this box hold the size of a particle and the sign of its contrast.
_SMALL_BOX = 32
_SURE = 3.0
# Relative spread of the squared CTF over the rows: where it is less, all are taken to be one.
_SAME_CTF = 0.05
_FEWEST_TO_COMPARE_CTFS = 100
# Of the power in the middle of the box: where the profile falls below it, the particle ends.
_EDGE = 0.1
_CLEAR_OF_NOISE = 10.0
_LARGEST_FILLING, _SMALLEST_FILLING = 0.9, 0.3
_WHITE, _COLOURED, _EMPTY = 2.0, 5.0, 1e-3
_IMAGES_OF_THE_SPECTRUM = 200
_CHUNK = 50


@dataclass(frozen=True, eq=False)
class Signal:
    """What some of the images, all of one box and pixel size, show together.

    Attributes
    ----------
    masked
        Whether the background of most images was cut away.
    diameter_in_angstroms
        Of the particle with its shifts; None where noise drowns it, or the background is missing.
    ctf_z_score
        How much better images show the CTF of their own row than that of other rows, in standard errors; None where
        the rows have one and the same.
    power : (n // 2,)
        Mean power by shell of images of unit variance.
    """

    n_images: int
    n_pixels: int
    pixel_size_in_angstroms: float
    contrast: ContrastSign
    masked: bool
    diameter_in_angstroms: float | None
    ctf_z_score: float | None
    power: Tensor

    @property
    def extent_in_angstroms(self) -> float:
        return self.n_pixels * self.pixel_size_in_angstroms


def measure_signal(found: FoundStacks, seen: ImageStatistics, has_ctf: NDArray[np.bool_]) -> Signal | None:
    """Measure it on at most 2,000 usable and not outlying images of the most common kind; None if too few.

    ``has_ctf`` (N,) says of which particles the CTF may be used.

    Raises
    ------
    InputError
        If the images turn out to be of no use together.
    """
    places = _of_one_kind(found, seen.places[seen.usable & ~seen.outlying & has_ctf[seen.places]])
    if len(places) < _FEWEST or found.boxes[places[0]] % 2 or found.boxes[places[0]] < _SMALL_BOX:
        return None
    if len(places) > _AT_MOST:
        places = places[np.linspace(0, len(places) - 1, _AT_MOST).round().astype(np.int64)]
    stack = ParticleStack(*found.of_particles(places))
    masked = bool(np.isin(places, seen.places[seen.masked]).mean() > 0.5)
    extent = stack.n_pixels * stack.pixel_size_in_angstroms
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_particles(stack, _SMALL_BOX, Path(folder) / "images.f16")
        batch = prepared.batch(torch.arange(prepared.n_particles))
    ctf = contrast_transfer_function(batch.optics, prepared.disc)
    filling = None if masked else _filling(batch.coefficients * ctf, prepared.disc)
    return Signal(
        n_images=len(places),
        n_pixels=stack.n_pixels,
        pixel_size_in_angstroms=stack.pixel_size_in_angstroms,
        contrast=prepared.contrast,
        masked=masked,
        diameter_in_angstroms=None if filling is None else filling * extent,
        ctf_z_score=_agreement_with_own_ctf(batch.coefficients, ctf, prepared.disc),
        power=_power(stack),
    )


def _of_one_kind(found: FoundStacks, places: Rows) -> Rows:
    """Those of some particles that have the most common box and pixel size."""
    kinds = np.stack([found.boxes[places], found.table.pixel_size_in_angstroms[places]], axis=1)
    if not len(places):
        return places
    _, kind, counts = np.unique(kinds, axis=0, return_inverse=True, return_counts=True)
    return places[kind.ravel() == counts.argmax()]


def _filling(coefficients: Tensor, disc: FourierDisc) -> float | None:
    """Diameter of the particle over the side of the box, None where it does not stand out.

    Coefficients (B, P) are those of the images multiplied by their CTF, which gathers what it spread; the
    particle ends where their mean power, above that of the corners, has fallen to a few per cent of its maximum.
    """
    n = disc.n_pixels
    power = disc.to_images(coefficients).square().mean(0)
    offset = torch.arange(n) - n // 2
    radius = (offset[:, None] ** 2 + offset**2).float().sqrt()
    ring = radius.round().long().flatten()
    corners = power[radius >= n / 2]
    profile = shell_mean(power.flatten() - corners.median(), ring, int(ring.max()) + 1)
    # The innermost ring is a single pixel, and the outermost ones are cut by the corners.
    profile = profile[1 : n // 2 + 5]
    peak, at = profile[: n // 2].max(dim=0)
    # Without a particle, a ring of so many pixels differs this much from another.
    spread = float(corners.std()) / math.sqrt(n)
    if not float(peak) > _CLEAR_OF_NOISE * spread:
        return None
    below = (profile[int(at) :] < max(_EDGE, 2 * spread / float(peak)) * peak).nonzero().flatten()
    if not len(below):
        return 2 * (len(profile) + 1) / n
    last = int(at) + int(below[0])
    inner, outer = float(profile[last - 1] / peak), float(profile[last] / peak)
    return 2 * (last + (inner - _EDGE) / max(inner - outer, 1e-6)) / n


def _agreement_with_own_ctf(coefficients: Tensor, ctf: Tensor, disc: FourierDisc) -> float | None:
    """How much better the power of images (B, P) follows their own squared CTF than the mean over all, in errors."""
    shells = (disc.radii + 0.5).floor().long()
    powers, expected = (
        shell_mean(values.abs().square(), shells, disc.max_radius + 1)[:, 2:] for values in (coefficients, ctf)
    )
    if float((expected.std(0) / expected.mean(0).clamp_min(1e-6)).max()) < _SAME_CTF:
        return None
    gain = ((powers - powers.mean(0)) / powers.std(0).clamp_min(1e-12) * (expected - expected.mean(0))).sum(1)
    return float(gain.mean() / (gain.std() / math.sqrt(len(gain))).clamp_min(1e-12))


def _power(stack: ParticleStack) -> Tensor:
    """Mean power (n // 2,) by shell of some images, divided by the variance of their pixels."""
    disc = FourierDisc.of_box(stack.n_pixels)
    shells = (disc.radii + 0.5).floor().long()
    rows = torch.linspace(0, stack.n_particles - 1, min(stack.n_particles, _IMAGES_OF_THE_SPECTRUM)).long()
    total = torch.zeros(disc.max_radius + 1, dtype=torch.float64)
    for part in rows.split(_CHUNK):
        images = stack.images(part)
        images = images - images.mean(dim=(1, 2), keepdim=True)
        images = images / images.std(dim=(1, 2), keepdim=True)
        power = disc.from_images(images).abs().square().double().sum(0)
        total += shell_mean(power, shells, len(total))
    return total / len(rows)


# ------------------------------------------------------------------------------ findings


def judge_signal(path: Path, signal: Signal, sign: int | None) -> list[Finding]:
    """Contrast, size of the particle and noise; ``sign`` is that of the contrast where it is stated."""
    return [
        _judge_contrast(path, signal, sign),
        *_judge_own_ctf(path, signal),
        _judge_diameter(path, signal),
        *_judge_noise(path, signal),
    ]


def _judge_contrast(path: Path, signal: Signal, sign: int | None) -> Finding:
    score = f"z = {signal.contrast.z_score:.1f} from {said(signal.n_images, 'image')}"
    seen = "bright" if signal.contrast.z_score > 0 else "dark"
    if abs(signal.contrast.z_score) < _SURE:
        message = f"{path}: whether protein is bright or dark cannot be told ({score}; {_SURE:g} is needed)"
        if sign is not None:
            stated = "bright" if sign > 0 else "dark"
            return Finding("note", "contrast", f"{message}; {stated} as stated")
        fix = "check more images (--all), or look at class averages and state it: --contrast bright or dark"
        return Finding("warning", "contrast", message, fix)
    if sign is not None and sign * signal.contrast.z_score < 0:
        stated = "bright" if sign > 0 else "dark"
        message = f"{path}: protein is stated to be {stated}, but is {seen} in the images ({score})"
        return Finding("warning", "contrast", message, f"leave out --contrast, or give --contrast {seen}")
    return Finding("ok", "contrast", f"{path}: protein is {seen} ({score})")


def _judge_own_ctf(path: Path, signal: Signal) -> Iterator[Finding]:
    """Rows in another order than the images have the CTF of other images."""
    if signal.ctf_z_score is None:
        return
    score = f"z = {signal.ctf_z_score:.1f} from {said(signal.n_images, 'image')}"
    if signal.ctf_z_score >= _SURE:
        yield Finding("ok", "CTF", f"{path}: images show the CTF of their own rows ({score})")
    elif signal.n_images >= _FEWEST_TO_COMPARE_CTFS:
        message = f"{path}: images do not show the CTF of their own rows any better than that of others ({score})"
        fix = "see whether rows and images are in the same order, and whether the defoci are right"
        yield Finding("warning", "CTF", message, fix)


def _judge_diameter(path: Path, signal: Signal) -> Finding:
    diameter, extent = signal.diameter_in_angstroms, signal.extent_in_angstroms
    if diameter is None:
        why = f"in {said(signal.n_images, 'image')} it does not stand out of the noise, or fills the whole box"
        if signal.masked:
            why = "the background is missing"
        return Finding("note", "box", f"{path}: the size of the particle cannot be measured: {why}")
    size = f"particle of about {diameter:.0f} Å in a box of {extent:.0f} Å"
    if diameter > _LARGEST_FILLING * extent:
        wanted = 2 * math.ceil(1.5 * diameter / signal.pixel_size_in_angstroms / 2)
        message = f"{path}: {size}, which leaves no room for its shifts and what the CTF spreads"
        return Finding("warning", "box", message, f"extract again with a box of about {wanted} pixels")
    if diameter < _SMALLEST_FILLING * extent:
        wanted = 2 * math.ceil(1.5 * diameter / signal.pixel_size_in_angstroms / 2)
        message = f"{path}: {size}, which is mostly noise and costs resolution at the working box"
        return Finding("warning", "box", message, f"extract again with a box of about {wanted} pixels")
    return Finding("ok", "box", f"{path}: {size}")


def _judge_noise(path: Path, signal: Signal) -> Iterator[Finding]:
    """The power of the outer shells, where there is next to nothing but noise."""
    power = signal.power
    outer = power[len(power) // 3 :]
    full = (power > _EMPTY * power[1:].median()).nonzero().flatten()
    first_empty = int(full[-1]) + 1 if len(full) else len(power)
    if first_empty < len(power):
        box = 2 * first_empty
        message = (
            f"{path}: images hold nothing beyond {signal.extent_in_angstroms / first_empty:.1f} Å: "
            "they were low-pass filtered, enlarged, or are free of noise"
        )
        yield Finding("warning", "noise", message, f"give the unfiltered images; --box {box} loses nothing of these")
        return
    factor = float(outer.max() / outer.min().clamp_min(1e-12))
    reach = signal.extent_in_angstroms / (len(power) // 3)
    found = f"{path}: the power of the noise varies by a factor of {factor:.1f} beyond {reach:.0f} Å"
    if factor > _COLOURED:
        yield Finding("note", "noise", f"{found}; it is measured shell by shell")
    else:
        white = "white" if factor < _WHITE else "nearly white"
        yield Finding("ok", "noise", f"{found}: {white}")


def judge_delocalisation(
    table: ParticleTable, boxes: NDArray[np.int64], working_box: int, main_extent_in_angstroms: float
) -> list[Finding]:
    """Particles whose CTF oscillates faster, at the edge of the working disc, than their box can represent.

    Detail of frequency ``k`` lies ``lambda df k - Cs lambda^3 k^3`` away from where it belongs; in a box
    of side ``L`` distances up to ``L / 2`` can be told.
    """
    known = np.flatnonzero(boxes > 0)
    if not len(known) or not working_box:
        return []
    frequency = working_box / (2 * main_extent_in_angstroms)
    wavelength = _wavelength_in_angstroms(table.voltage_in_kilovolts[known])
    defocus = np.maximum(np.abs(table.defocus_u_in_angstroms), np.abs(table.defocus_v_in_angstroms))[known]
    aberration = table.spherical_aberration_in_mm[known] * 1e7
    distance = np.abs(wavelength * defocus * frequency - aberration * wavelength**3 * frequency**3)
    pixel_size = table.pixel_size_in_angstroms[known]
    beyond = np.flatnonzero(distance > boxes[known] * pixel_size / 2)
    if not len(beyond):
        largest = f"detail of {1 / frequency:.1f} Å is spread over at most {distance.max():.0f} Å by the CTF"
        return [Finding("ok", "CTF", f"{table.path}: {largest}; the box holds it")]
    words, rows = at_rows(table, known[beyond])
    message = (
        f"{table.path}: the CTF of {words} spreads detail of {1 / frequency:.1f} Å over up to {distance.max():.0f} Å, "
        f"more than half the box of {(boxes[known] * pixel_size)[beyond].min():.0f} Å: it is aliased"
    )
    needed = 2 * math.ceil(float((distance / pixel_size)[beyond].max()))
    # Distance is next to proportional to frequency, and so to the working box.
    possible = 2 * int(working_box * float((boxes[known] * pixel_size / 2 / distance)[beyond].min()) / 2)
    smaller = f", or give --box {possible}" if possible >= _SMALL_BOX else ""
    fix = f"extract again with a box of at least {needed} pixels{smaller}"
    return [Finding("warning", "CTF", message, fix, rows)]


def _wavelength_in_angstroms(voltage_in_kilovolts: FloatColumn) -> FloatColumn:
    """Of electrons: ``h / sqrt(2 m e V (1 + e V / 2 m c^2))``."""
    volts = 1e3 * voltage_in_kilovolts
    return np.asarray(12.2643 / np.sqrt(volts * (1 + 0.978466e-6 * volts)))
