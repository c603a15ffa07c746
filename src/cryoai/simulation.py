"""Particle stacks with known answers: from a map, or from a model made up for the purpose.

Slices are exact: the map is transformed to the rotated frequencies by a non-uniform FFT, a route
that shares no code with the interpolation that reconstruction uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import finufft
import numpy as np
import roma
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryoai.errors import InputError
from cryoai.formats.mrc import MrcMap, StackWriter, write_map
from cryoai.formats.star import write_star
from cryoai.formats.table import ImageReferences, ParticleTable
from cryoai.fourier import FourierDisc, invert_transform, translation_phases
from cryoai.optics import Optics, contrast_transfer_function
from cryoai.pose_files import pose_columns
from cryoai.poses import Poses

__all__ = ["Microscope", "Simulation", "exact_transform", "protein_like_phantom", "resample_map", "simulate"]

_CHUNK = 500
_PILOT = 1000


@dataclass(frozen=True)
class Microscope:
    """How particles are seen. Defoci are drawn from the range, or from rows (u, v, angle) of the table."""

    voltage_in_kilovolts: float = 300.0
    spherical_aberration_in_mm: float = 2.7
    amplitude_contrast: float = 0.1
    defocus_range_in_angstroms: tuple[float, float] = (8_000.0, 25_000.0)
    defocus_table: NDArray[np.floating] | None = None

    def draw(self, n_particles: int, pixel_size_in_angstroms: float, generator: torch.Generator) -> Optics:
        """Optics of ``n_particles`` random particles."""
        if self.defocus_table is None:
            low, high = self.defocus_range_in_angstroms
            mean = low + (high - low) * torch.rand(n_particles, generator=generator)
            # Two per cent of astigmatism, about that of a well-aligned microscope.
            half = 0.01 * mean
            angle = 180 * torch.rand(n_particles, generator=generator)
            u, v = mean + half, mean - half
        else:
            rows = torch.randint(len(self.defocus_table), (n_particles,), generator=generator)
            u, v, angle = torch.from_numpy(self.defocus_table).float()[rows].T.contiguous()
        constant = torch.ones(n_particles)
        return Optics(
            pixel_size_in_angstroms=constant * pixel_size_in_angstroms,
            voltage_in_kilovolts=constant * self.voltage_in_kilovolts,
            spherical_aberration_in_mm=constant * self.spherical_aberration_in_mm,
            amplitude_contrast=constant * self.amplitude_contrast,
            defocus_u_in_angstroms=u,
            defocus_v_in_angstroms=v,
            defocus_angle_in_degrees=angle,
            phase_shift_in_degrees=constant * 0,
            b_factor_in_square_angstroms=constant * 0,
            contrast_scale=constant,
        )


@dataclass(frozen=True)
class Simulation:
    """What was written, and the signal-to-noise ratio that it turned out to have."""

    particles: Path
    truth: Path
    true_map: Path
    measured_snr: float


def exact_transform(source: MrcMap, frequencies_per_angstrom: Tensor) -> Tensor:
    """Fourier transform (...) of a map at frequencies (..., 3), (x, y, z), in cycles per Å.

    ``V(k) = sum_r density(r) exp(-2 pi i k . (r - c))``, to six digits, and zero beyond the Nyquist
    frequency of the map in any axis.
    """
    radians = (frequencies_per_angstrom.double() * (2 * math.pi * source.pixel_size_in_angstroms)).reshape(-1, 3)
    inside = (radians.abs() < math.pi).all(-1)
    x, y, z = radians[inside].numpy().T.copy()
    # finufft counts the modes of a box of n from -(n // 2), and so do we: no phase is due.
    values = finufft.nufft3d2(z, y, x, source.density.astype(np.complex128), eps=1e-7, isign=-1)
    result = torch.zeros(len(radians), dtype=torch.complex64)
    result[inside] = torch.from_numpy(values).to(torch.complex64)
    return result.reshape(frequencies_per_angstrom.shape[:-1])


def resample_map(source: MrcMap, n_pixels: int, pixel_size_in_angstroms: float) -> MrcMap:
    """The map on another grid, centre on centre, band-limited to the Nyquist sphere of both grids."""
    lattice = torch.arange(n_pixels) - n_pixels // 2
    half = torch.arange(n_pixels // 2 + 1)
    z, y, x = torch.meshgrid(lattice, lattice, half, indexing="ij")
    indices = torch.stack([x, y, z], dim=-1)
    inside = 4 * indices.square().sum(-1) < n_pixels**2
    spectrum = torch.zeros(inside.shape, dtype=torch.complex64)
    spectrum[inside] = exact_transform(source, indices[inside] / (n_pixels * pixel_size_in_angstroms))
    # invert_transform expects 1/n of the sum; and the sum holds more voxels of the source than of the result
    volume_ratio = (pixel_size_in_angstroms / source.pixel_size_in_angstroms) ** 3
    density = invert_transform(spectrum / n_pixels, n_pixels) / volume_ratio
    return MrcMap(density.numpy(), pixel_size_in_angstroms)


def protein_like_phantom(seed: int, *, n_domains: int = 6, pixel_size_in_angstroms: float = 1.75) -> MrcMap:
    """An asymmetric complex of helical domains that never existed, as a map of 128 pixels.

    Each domain is a bundle of alpha helices (1.5 Å rise, 100° and 2.3 Å radius a residue, a side
    chain at 5 Å) about its own axis; domains of different sizes touch their neighbours. Seeds give
    different complexes; one seed always gives the same.
    """
    generator = np.random.default_rng(seed)
    centres, radii = _touching_spheres(generator, n_domains)
    atoms = np.concatenate([c + _helix_bundle(generator, r) for c, r in zip(centres, radii, strict=True)])
    atoms -= atoms.mean(axis=0)
    return _gaussian_density(atoms, 128, pixel_size_in_angstroms, standard_deviation_in_angstroms=1.4)


def _touching_spheres(
    generator: np.random.Generator, n_spheres: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres (n, 3) and radii (n,) in Å of a compact, branched cluster of spheres."""
    radii = np.sort(generator.uniform(15, 27, n_spheres))[::-1]
    centres = np.zeros((1, 3))
    while len(centres) < n_spheres:
        parent = generator.integers(len(centres))
        direction = generator.normal(size=3)
        reach = 0.85 * (radii[parent] + radii[len(centres)])
        candidate = centres[parent] + reach * direction / np.linalg.norm(direction)
        gaps = np.linalg.norm(centres - candidate, axis=1) / (radii[: len(centres)] + radii[len(centres)])
        if gaps.min() > 0.8 and np.linalg.norm(candidate) < 65:
            centres = np.vstack([centres, candidate])
    return centres, radii


def _helix_bundle(generator: np.random.Generator, radius: float) -> NDArray[np.float64]:
    """Positions (n, 3) in Å of the residues of a ball of nearly parallel helices."""
    spacing = 10.0
    steps = np.arange(-3, 4) * spacing
    u, v = np.meshgrid(steps, steps * math.sqrt(3) / 2)
    u = u + (np.arange(len(steps)) % 2)[:, None] * spacing / 2
    helices = []
    for axis in np.stack([u.ravel(), v.ravel()], axis=1) + generator.normal(scale=1.0, size=(u.size, 2)):
        half_length = math.sqrt(max(radius**2 - float(axis @ axis), 0.0)) * generator.uniform(0.7, 1.0)
        if half_length > 6:
            helices.append(_helix(generator, axis, half_length))
    orientation = roma.random_rotmat(generator=torch.Generator().manual_seed(int(generator.integers(2**31))))
    return np.concatenate(helices) @ orientation.double().numpy().T


def _helix(generator: np.random.Generator, axis: NDArray[np.float64], half_length: float) -> NDArray[np.float64]:
    z = np.arange(-half_length, half_length, 1.5)
    turn = np.deg2rad(100) * np.arange(len(z)) + generator.uniform(0, 2 * math.pi)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    tilt = generator.normal(scale=0.12, size=2)
    path = axis + z[:, None] * tilt
    backbone = np.column_stack([path + 2.3 * circle, z])
    side_chains = np.column_stack([path + 5.0 * circle, z])
    return np.concatenate([backbone, side_chains[generator.random(len(z)) < 0.7]])


def _gaussian_density(
    positions_in_angstroms: NDArray[np.float64],
    n_pixels: int,
    pixel_size_in_angstroms: float,
    standard_deviation_in_angstroms: float,
) -> MrcMap:
    """Density of equal Gaussians at positions (m, 3), ordered (x, y, z), about the centre of the box."""
    radians = positions_in_angstroms * (2 * math.pi / (n_pixels * pixel_size_in_angstroms))
    x, y, z = radians.T.copy()
    modes = finufft.nufft3d1(z, y, x, np.ones(len(x), dtype=np.complex128), (n_pixels,) * 3, eps=1e-7, isign=-1)
    k = (np.arange(n_pixels) - n_pixels // 2) / (n_pixels * pixel_size_in_angstroms)
    envelope = np.exp(-2 * (math.pi * standard_deviation_in_angstroms * k) ** 2)
    modes *= envelope[:, None, None] * envelope[:, None] * envelope
    density = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(modes)).real)
    return MrcMap(density.astype(np.float32), pixel_size_in_angstroms)


def simulate(
    source: MrcMap,
    out_dir: Path,
    *,
    n_particles: int,
    n_pixels: int,
    pixel_size_in_angstroms: float,
    snr: float,
    seed: int,
    microscope: Microscope = Microscope(),
    shift_standard_deviation_in_angstroms: float = 0.0,
    rotations: Tensor | None = None,
    progress: Callable[[int], object] = lambda _n_done: None,
) -> Simulation:
    """Write ``particles.mrcs``, ``particles.star`` (no poses), ``truth.star`` and ``truth.mrc``.

    Orientations are uniform unless they are given, shifts normal in each axis, noise white and
    Gaussian with unit variance.

    Parameters
    ----------
    snr
        Variance of the signal after the CTF over the variance of the noise, both over the whole box.
    rotations : (n_particles, 3, 3)
        Orientations to use, such as those of particles that lie on one side.

    Raises
    ------
    InputError
        If there are not as many rotations as particles, or a file cannot be written.
    """
    if rotations is not None and rotations.shape != (n_particles, 3, 3):
        raise InputError(f"rotations of shape {tuple(rotations.shape)}: give ({n_particles}, 3, 3), one a particle")
    generator = torch.Generator().manual_seed(seed)
    disc = FourierDisc.of_box(n_pixels)
    optics = microscope.draw(n_particles, pixel_size_in_angstroms, generator)
    poses = Poses(
        roma.random_rotmat(n_particles, generator=generator) if rotations is None else rotations.float(),
        shift_standard_deviation_in_angstroms * torch.randn(n_particles, 2, generator=generator),
    )

    def clean_images(index: slice) -> Tensor:
        return disc.to_images(_project(source, poses[index], optics[index], disc))

    pilot = clean_images(slice(0, _PILOT)).var(dim=(1, 2)).mean()
    if not pilot > 0:
        raise InputError("the map is empty: its projections have no variance; give one with density")
    gain = float((snr / pilot).sqrt())
    signal_power = 0.0
    stack = out_dir / "particles.mrcs"
    with StackWriter(stack, n_particles, n_pixels, pixel_size_in_angstroms) as writer:
        for start in range(0, n_particles, _CHUNK):
            images = gain * clean_images(slice(start, start + _CHUNK))
            signal_power += float(images.var(dim=(1, 2)).sum())
            writer.write(start, (images + torch.randn(images.shape, generator=generator)).numpy())
            progress(start + len(images))
    truth = resample_map(source, n_pixels, pixel_size_in_angstroms)
    write_map(out_dir / "truth.mrc", truth.density, pixel_size_in_angstroms)
    table = _particle_table(out_dir / "particles.star", stack.name, optics)
    sizes = np.full(n_particles, n_pixels)
    write_star(table.path, table, sizes, None, {})
    write_star(out_dir / "truth.star", table, sizes, pose_columns(poses), {})
    return Simulation(
        out_dir / "particles.star", out_dir / "truth.star", out_dir / "truth.mrc", signal_power / n_particles
    )


def _project(source: MrcMap, poses: Poses, optics: Optics, disc: FourierDisc) -> Tensor:
    """Noise-free coefficients (B, P) of particles seen through their optics."""
    pixel_size = optics.pixel_size_in_angstroms
    per_angstrom = disc.coordinates / pixel_size[:, None, None]
    points = per_angstrom @ poses.rotations[:, :, :2].transpose(1, 2)
    slices = exact_transform(source, points)
    # The content of an image sits at minus the origin.
    shifts = translation_phases(-poses.shifts_in_angstroms / pixel_size[:, None], disc.coordinates)
    return slices * shifts * contrast_transfer_function(optics, disc)


def _particle_table(path: Path, stack_name: str, optics: Optics) -> ParticleTable:
    n = len(optics)
    names = {item.name for item in fields(ParticleTable)}
    columns = {name: getattr(optics, name).double().numpy() for name in vars(optics) if name in names}
    images = ImageReferences((stack_name,), np.zeros(n, dtype=np.int32), np.arange(n, dtype=np.int32))
    return ParticleTable(path=path, rows=np.arange(n), images=images, poses=None, star=None, ignored=(), **columns)
