"""Particles, models and stages that are small enough to train in a moment."""

import numpy as np
import torch

from cryoai.bootstrap import Reference
from cryoai.contrast import ContrastSign
from cryoai.encoder import EncoderArchitecture
from cryoai.fourier import FourierDisc
from cryoai.model import CryoAI, matched_filter
from cryoai.noise import NoiseSpectrum
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses
from cryoai.training.stages import Estimate
from cryoai.training.stages.amortized import Amortized
from cryoai.volumes import FourierNetVolume, SampledVolume
from oracles import make_optics, random_rotations

BOX, PIXEL, RADIUS, N = 32, 3.0, 8, 40
NOISE = 0.5


def noisy_images(phantom, path):
    """Coefficients (N, P) of noisy images of the phantom."""
    prepared = stored(None, path)
    volume = SampledVolume.from_map(phantom.density(BOX).float(), BOX // 2)
    poses = Poses(random_rotations(N).float(), 3 * torch.randn(N, 2))
    clean = prepared.imaging(BOX).predict(volume, poses, prepared.optics)
    return clean + NOISE * torch.randn_like(clean)


def reference_of(phantom):
    return Reference(phantom.density(BOX).float(), RADIUS, NoiseSpectrum(torch.full((RADIUS + 1,), NOISE**2)))


def stored(images, path):
    disc = FourierDisc.of_box(BOX)
    optics = make_optics(N, defocus_u_in_angstroms=torch.linspace(8000, 20000, N))
    if images is not None:
        torch.view_as_real(images).numpy().astype(np.float16).tofile(path)
    return PreparedParticles(
        path, disc, optics, PIXEL, ContrastSign(1, 9.0), disc.n_coefficients(), torch.arange(len(optics)), ()
    )


def make_model(particles, n_hypotheses=4, kind="polar", symmetrization="none", encoder_input=matched_filter):
    architecture = EncoderArchitecture(kind, n_hypotheses, 4, 10.0, symmetrization)
    scale = float(particles.batch(torch.arange(N), RADIUS).coefficients.abs().square().mean().sqrt())
    volume = FourierNetVolume(BOX, width=32, scale=scale, sampling_oversampling=1)
    encoder = architecture.build(particles.disc, RADIUS)
    return CryoAI(encoder, volume, particles.imaging(RADIUS), encoder_input)


def make_stage(particles, model, reference=None, **options):
    values = {
        "n_steps": 4,
        "n_fit_steps": 0,
        "wake_batch_size": 8,
        "sleep_batch_size": 8,
        "wake_interval": 1,
        "first_radius": RADIUS,
        "learning_rate": 1e-3,
        "volume_learning_rate": 1e-4,
        "shift_std_in_angstroms": 2.0,
        "generator": torch.Generator().manual_seed(1),
    }
    return Amortized(particles, Estimate(reference=reference), model, **{**values, **options})
