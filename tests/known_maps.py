"""Half maps with known truths, for the tests of validation."""

import functools
import math

import torch

from cryoai.formats.mrc import read_map
from cryoai.fourier import (
    FourierDisc,
    HalfLattice,
    invert_transform,
    shell_mean,
    shells_of_volume,
    transform_map,
    trilinear_falloff,
)
from cryoai.simulation import protein_like_phantom, resample_map
from cryoai.volumes import SampledVolume
from stacks import SHARED

# Files, and the pixel size at which the molecule fills a box of 64 as it would be extracted.
MOLECULES = {
    "80S": ("80S_4ug0_4A_80.mrc", 5.5),
    "70S": ("70S_4v4r_5A_92.mrc", 5.5),
    "CAND1": ("CAND1_1u6g_5A_71.mrc", 4.0),
    "betagal": ("betagal_D2_3.54A_100.mrc", 4.5),
}


def molecule(name, n=64):
    """A map (n, n, n) that others made, and its pixel size."""
    file, pixel_size = MOLECULES[name]
    found = resample_map(read_map(SHARED / "volumes" / file), n, pixel_size)
    return torch.from_numpy(found.density.copy()), pixel_size


made_up = functools.cache(protein_like_phantom)


def made_up_complex(seed, n=64, pixel_size=3.7):
    found = resample_map(made_up(seed), n, pixel_size)
    return torch.from_numpy(found.density.copy()), pixel_size


def radius(n):
    x = torch.arange(n) - n // 2
    return (x[:, None, None] ** 2 + x[:, None] ** 2 + x**2).double().sqrt()


def filtered(density, factors):
    """The map with each shell times its factor (n // 2 + 1,), nothing beyond."""
    n = density.shape[-1]
    shells, weights = shells_of_volume(n)
    padded = torch.cat([factors, torch.zeros(n)])
    return invert_transform(transform_map(density) * padded[shells] * (weights > 0), n)


def cut(density, pixel_size, resolution):
    n = density.shape[-1]
    return filtered(density, (torch.arange(n // 2 + 1) <= n * pixel_size / resolution).float())


def noise(n, generator):
    """Noise that grows with frequency, as that of a reconstruction from slices: its power is the shell's radius."""
    # Our transform of a map of white noise has power n.
    return filtered(torch.randn(n, n, n, generator=generator), ((torch.arange(n // 2 + 1) + 0.5) / n).sqrt())


def noisy_halves(truth, pixel_size, resolution, seed=0):
    """Half maps whose correlation falls from 0.8 at 1.5 times the resolution to 0.143 at the resolution."""
    n = truth.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    shells, weights = shells_of_volume(n)
    inside = weights > 0
    power = shell_mean(transform_map(truth)[inside].abs().square(), shells[inside], n // 2 + 1)
    s = torch.arange(n // 2 + 1)
    last = min(n // 2 - 1, round(n * pixel_size / resolution))
    first = round(last / 1.5)
    signal, early = (power[i - 1 : i + 2].mean() / (i + 0.5) for i in (last, first))
    # Signal to noise is 4 where the correlation is 0.8, and 1/6 where it is 0.143.
    fall = max(0.0, math.log(24 * signal / early)) / (last**2 - first**2)
    blurred = filtered(truth, torch.exp(-fall * s**2 / 2))
    scale = (6 * signal * math.exp(-fall * last**2)).sqrt()
    return tuple(blurred + scale * noise(n, generator) for _ in range(2))


def reconstruction(density, rotations, *, max_radius, noise_to_signal=0.0, seed=0):
    """What projections (without a CTF) along rotations (N, 3, 3) give back; the noise is white in each image."""
    n = density.shape[-1]
    disc = FourierDisc.of_box(n)
    points = disc.coordinates[: disc.n_coefficients(max_radius)] @ rotations[:, :, :2].transpose(1, 2)
    slices = SampledVolume.from_map(density, disc.max_radius)(points)
    scale = noise_to_signal * slices.abs().square().mean().sqrt()
    slices = slices + scale * torch.randn(
        slices.shape, generator=torch.Generator().manual_seed(seed), dtype=slices.dtype
    )
    lattice = HalfLattice(n, max_radius, 2)
    sums = torch.zeros(3, lattice.n_points)
    lattice.insert(slices, torch.ones(slices.shape), points, sums)
    real, imaginary, weight = lattice.fold(sums)
    spectrum = lattice.fill_in(torch.complex(real, imaginary) / (weight + 0.3))
    return invert_transform(spectrum, n) / trilinear_falloff(n, 2)
