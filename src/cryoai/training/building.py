"""From settings to stages: the only place where a setting becomes an argument."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cryoai.bootstrap import BootstrapSchedule
from cryoai.encoder import EncoderArchitecture
from cryoai.inference import encoder_inputs
from cryoai.model import CryoAI
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles
from cryoai.runs import RunFolder
from cryoai.search import TrialPoses
from cryoai.training.settings import AmortizedSettings, Settings
from cryoai.training.stages import (
    Amortized,
    Bootstrap,
    Completion,
    Contest,
    Estimate,
    Placement,
    Refinement,
    Stage,
    trial_poses,
)
from cryoai.volumes import AbstractVolume, FourierNetVolume, VoxelVolume

__all__ = ["build_completion", "build_stage", "encoder_architecture", "stage_names"]


def stage_names(settings: Settings) -> list[str]:
    """The stages to run: those chosen, and Placement before poses are refined or written."""
    names: list[str] = [name for name in settings.stages if name != "refinement"]
    return [*names, "placement", *settings.stages[len(names) :]]


def build_stage(
    name: str,
    particles: PreparedParticles,
    estimate: Estimate,
    half_set: Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> Stage:
    """The stage called ``name``, with the settings spelled out as arguments."""
    schedule = _schedule(particles, settings)
    if name == "bootstrap":
        return Bootstrap(
            particles,
            schedule,
            n_starts=settings.bootstrap.n_starts,
            max_starts=settings.bootstrap.max_starts,
            max_images=settings.bootstrap.max_images,
            generator=generator,
        )
    if name == "amortized":
        return _build_amortized(particles, estimate, settings, generator)
    if name == "placement":
        trials = _placement_trials(particles, settings)
        return Placement(particles, estimate, half_set, trials, n_iterations=settings.placement.n_iterations)
    return Refinement(
        particles,
        estimate,
        half_set,
        max_rounds=settings.refinement.max_rounds,
        n_iterations=settings.refinement.n_iterations,
    )


def _schedule(particles: PreparedParticles, settings: Settings) -> BootstrapSchedule:
    return BootstrapSchedule(
        n_steps=settings.bootstrap.n_steps,
        batch_size=settings.bootstrap.batch_size,
        last_radius=min(settings.bootstrap.last_radius, particles.disc.max_radius),
        n_rotations=settings.bootstrap.n_rotations,
    )


def _placement_trials(particles: PreparedParticles, settings: Settings) -> TrialPoses | None:
    """Poses to search where there was a search from the start; else the encoder stands alone."""
    if "bootstrap" not in settings.stages:
        return None
    return trial_poses(particles, _schedule(particles, settings), settings.placement.n_rotations)


def build_completion(
    stack: ParticleStack,
    left: Tensor,
    particles: PreparedParticles,
    estimate: Estimate,
    half_set: Tensor,
    settings: Settings,
    folder: RunFolder,
) -> Completion:
    """The stage that poses the particles that were left out at first."""
    return Completion(
        stack,
        left,
        particles,
        estimate,
        half_set,
        _placement_trials(particles, settings),
        folder.prepared_block,
        n_placement_iterations=settings.placement.n_iterations,
        # Without Refinement no pose is refined against a half map, here neither.
        n_iterations=settings.refinement.n_iterations if "refinement" in settings.stages else 0,
    )


def _build_amortized(
    particles: PreparedParticles, estimate: Estimate, settings: Settings, generator: torch.Generator
) -> Stage:
    small = particles.cropped(settings.amortized.box)
    starts = [
        functools.partial(_build_start, number, small, estimate, settings, generator)
        for number in range(settings.amortized.n_starts)
    ]
    return Contest(starts) if len(starts) > 1 else starts[0]()


def _build_start(
    number: int,
    particles: PreparedParticles,
    estimate: Estimate,
    settings: Settings,
    generator: torch.Generator,
) -> Amortized:
    chosen = settings.amortized
    extent = particles.n_pixels * particles.pixel_size_in_angstroms
    return Amortized(
        particles,
        estimate,
        _build_model(number, particles, settings),
        n_steps=chosen.n_steps,
        n_fit_steps=chosen.n_fit_steps,
        wake_batch_size=chosen.wake_batch_size,
        sleep_batch_size=chosen.sleep_batch_size,
        wake_interval=chosen.wake_interval,
        first_radius=chosen.first_radius or chosen.max_radius,
        learning_rate=chosen.learning_rate,
        volume_learning_rate=chosen.volume_learning_rate,
        shift_std_in_angstroms=chosen.shift_std_in_boxes * extent,
        generator=generator,
    )


def _build_model(number: int, particles: PreparedParticles, settings: Settings) -> CryoAI:
    chosen = settings.amortized
    # Weights are drawn from the global generator: seed it, differently for each start, and leave it as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 2**31 * number)
        encoder = encoder_architecture(particles, chosen).build(particles.disc, chosen.max_radius)
        volume = _build_volume(particles, chosen)
    model = CryoAI(encoder, volume, particles.imaging(chosen.max_radius), encoder_inputs[chosen.encoder_input])
    return model.to(particles.disc.device)


def encoder_architecture(particles: PreparedParticles, chosen: AmortizedSettings) -> EncoderArchitecture:
    """The encoder that the settings ask for, for particles at its box."""
    extent = particles.n_pixels * particles.pixel_size_in_angstroms
    return EncoderArchitecture(
        kind=chosen.encoder,
        n_hypotheses=chosen.n_hypotheses,
        width=chosen.encoder_width,
        max_shift_in_angstroms=chosen.max_shift_in_boxes * extent,
        symmetrization=chosen.symmetrization,
    )


def _build_volume(particles: PreparedParticles, chosen: AmortizedSettings) -> AbstractVolume:
    n = particles.n_pixels
    pilot = particles.batch(torch.arange(min(1000, particles.n_particles)), chosen.max_radius).coefficients
    scale = float(pilot.abs().square().mean().sqrt())
    if chosen.volume == "voxels":
        return VoxelVolume(1e-3 * scale * torch.randn(n, n, n), sampling_oversampling=chosen.volume_oversampling)
    return FourierNetVolume(n, width=chosen.volume_width, scale=scale, sampling_oversampling=chosen.volume_oversampling)
