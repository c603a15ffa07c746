"""Particles of a made-up protein at known poses, prepared as a run does it, few and small enough for a test."""

from functools import cache

import numpy as np
import roma
import torch

from cryoai.bootstrap import Reference
from cryoai.contrast import ContrastSign
from cryoai.fourier import FourierDisc
from cryoai.half_maps import HalfMaps
from cryoai.noise import Fit, NoiseSpectrum
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses
from cryoai.reconstruction import HalfSets
from cryoai.simulation import protein_like_phantom, resample_map
from cryoai.training.stages import Estimate, ParticlePoses
from cryoai.volumes import SampledVolume
from oracles import make_optics, random_rotations

BOX, PIXEL, RADIUS = 32, 7.0, 10
NOISE = 0.5


@cache
def protein(seed=0):
    """A protein whose coefficients in the images have unit power in the mean."""
    return torch.from_numpy(resample_map(protein_like_phantom(seed), BOX, PIXEL).density) / 0.045


def random_poses(n, seed=0):
    return Poses(random_rotations(n, seed).float(), 4 * torch.randn(n, 2))


def off_by(poses, degrees, angstroms=3.0):
    """Each turned by so much about an axis of its own, and shifted a little."""
    axes = torch.randn(len(poses), 3)
    turns = roma.rotvec_to_rotmat(torch.deg2rad(torch.tensor(degrees)) * axes / axes.norm(dim=1, keepdim=True))
    return Poses(turns @ poses.rotations, poses.shifts_in_angstroms + angstroms * torch.randn(len(poses), 2))


def optics(n):
    u = torch.linspace(8000, 20000, n)
    return make_optics(pixel_size_in_angstroms=PIXEL, defocus_u_in_angstroms=u, defocus_v_in_angstroms=u)


def prepared(path, n):
    """Particles whose coefficients are in a file."""
    disc = FourierDisc.of_box(BOX)
    return PreparedParticles(
        path, disc, optics(n), PIXEL, ContrastSign(1, 9.0), disc.n_coefficients(), torch.arange(n), ()
    )


def particles_of(images, path):
    """Particles with these coefficients (N, P), written to a file."""
    torch.view_as_real(images).numpy().astype(np.float16).tofile(path)
    return prepared(path, len(images))


def clean_images(density, poses):
    """Coefficients (N, P) of a map (n, n, n) at poses (N,)."""
    volume = SampledVolume.from_map(density, BOX // 2)
    return prepared(None, len(poses)).imaging(BOX).predict(volume, poses, optics(len(poses)))


def noisy(images, deviation=NOISE):
    return images + deviation * torch.randn_like(images)


def reference_of(density, deviation=NOISE):
    return Reference(density, RADIUS, NoiseSpectrum(torch.full((RADIUS + 1,), deviation**2)))


def placed(poses, encoder=None):
    """A table of particles at poses (N,), all from a search."""
    nobody = torch.zeros(len(poses), dtype=torch.bool)
    return ParticlePoses(poses, nobody, ~nobody, nobody, encoder, poses, Fit.blank(len(poses), "cpu"))


def sums_at(particles, poses, half_set):
    """Half sets of particles at poses (N,), in one piece."""
    full = particles.imaging(BOX)
    sets = HalfSets.empty(BOX)
    for half, sums in enumerate(sets.sums):
        rows = (half_set == half).nonzero().flatten()
        sums.add(particles.batch(rows), poses[rows], full, (full.shells > 0).float())
    return sets


def placed_estimate(particles, poses, half_set, reference, noise=None, **more):
    """What a run knows of particles that were placed at poses (N,)."""
    sets = sums_at(particles, poses, half_set)
    return Estimate(
        reference=reference,
        particles=placed(poses),
        half_sets=sets,
        half_maps=HalfMaps.of(sets, PIXEL),
        noise=noise,
        **more,
    )


def finish(stage):
    """Step a stage to its end; its last metrics."""
    progress = [stage.progress]
    while not stage.finished:
        last = stage.step()
        progress.append(stage.progress)
    assert all(0 <= p <= 1 for p in progress)
    assert progress[-1] == 1
    return last
