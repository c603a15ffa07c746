"""From settings to stages: the only place where a setting becomes an argument."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from cryoai.bootstrap import BootstrapSchedule, Reference
from cryoai.encoder import EncoderArchitecture
from cryoai.inference import TrainedEncoder, encoder_inputs
from cryoai.model import CryoAI
from cryoai.noise import NoiseSpectrum, fit_z_scores
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses
from cryoai.runs import RunFolder
from cryoai.search import TrialPoses
from cryoai.second_chance import SearchPlan
from cryoai.symmetry.groups import PointGroup
from cryoai.training.settings import AmortizedSettings, PlacementSettings, RefineSettings, Settings
from cryoai.training.stages import (
    Amortized,
    Axes,
    BlockPosing,
    Bootstrap,
    Completion,
    Contest,
    Estimate,
    Placement,
    Refinement,
    Rehearsal,
    Stage,
    trial_poses,
)
from cryoai.volumes import AbstractVolume, FourierNetVolume, VoxelVolume

__all__ = [
    "build_completion",
    "build_model",
    "build_refinement",
    "build_rehearsal",
    "build_rehearsal_of_refinement",
    "build_stage",
    "build_trained_encoder",
    "stage_names",
]

_SAMPLE = 1000


def stage_names(settings: Settings) -> list[str]:
    """The stages to run: those chosen, Placement before poses are refined or written, and Axes for a symmetry."""
    names: list[str] = [name for name in settings.stages if name != "refinement"]
    if settings.symmetry == "C1":
        return [*names, "placement", *settings.stages[len(names) :]]
    # Right after Bootstrap, if there is one, so that the encoder learns in the frame of the group.
    first = ["bootstrap", "axes"] if "bootstrap" in names else []
    others = [name for name in names if name != "bootstrap"]
    return [*first, *others, "placement", "axes", "refinement"]


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
            half_set,
            schedule,
            PointGroup.named(settings.symmetry),
            n_starts=settings.bootstrap.n_starts,
            max_starts=settings.bootstrap.max_starts,
            max_images=settings.bootstrap.max_images,
            generator=generator,
        )
    if name == "axes":
        return Axes(particles, estimate, half_set, PointGroup.named(settings.symmetry))
    if name == "amortized":
        return _build_amortized(particles, estimate, settings, generator)
    if name == "placement":
        trials, group = _placement_trials(particles, settings), PointGroup.named(settings.symmetry)
        n_iterations = settings.placement.n_iterations
        return Placement(particles, estimate, half_set, trials, group, n_iterations=n_iterations)
    return Refinement(
        particles,
        estimate,
        half_set,
        _second_searches(particles, settings),
        PointGroup.named(settings.symmetry),
        max_rounds=settings.refinement.max_rounds,
        n_iterations=settings.refinement.n_iterations,
        defocus_std_in_angstroms=settings.refinement.defocus_std_in_angstroms,
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


def _second_searches(particles: PreparedParticles, settings: Settings) -> tuple[SearchPlan, ...]:
    """Twice, for particles that the first search did not find.

    First with shifts twice as far; later, when the maps are better, for the worst few with finer rotations.
    """
    if "bootstrap" not in settings.stages:
        return ()
    schedule, n = _schedule(particles, settings), settings.placement.n_rotations
    wider = replace(schedule, n_shift_steps=2 * schedule.n_shift_steps)
    return (
        SearchPlan(1, 12, trial_poses(particles, wider, 4 * n), worst_share=None),
        SearchPlan(2, 16, trial_poses(particles, schedule, 16 * n), worst_share=0.1),
    )


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
    posing = _build_posing(particles, estimate, settings)
    return Completion(
        stack,
        left,
        particles,
        estimate,
        half_set,
        posing,
        folder.prepared_block,
        max_faulty_share=settings.max_faulty_share,
    )


def build_rehearsal(
    particles: PreparedParticles,
    rows: Tensor,
    estimate: Estimate,
    half_set: Tensor,
    group: PointGroup,
    settings: Settings,
    folder: RunFolder,
    generator: torch.Generator,
) -> Rehearsal:
    """The stage that poses particles whose truth is known, and images of noise."""
    posing = _build_posing(particles, estimate, settings)
    scratch = folder.prepared_block
    return Rehearsal(particles, rows, estimate, half_set, posing, group, scratch, generator=generator)


def build_refinement(
    particles: PreparedParticles,
    estimate: Estimate,
    half_set: Tensor,
    mask: Tensor | None,
    settings: RefineSettings,
) -> Refinement:
    """The stage that refines given poses, and searches for none."""
    return Refinement(
        particles,
        estimate,
        half_set,
        (),
        PointGroup.named(settings.symmetry),
        max_rounds=settings.max_rounds,
        n_iterations=settings.n_iterations,
        defocus_std_in_angstroms=settings.defocus_std_in_angstroms,
        mask=mask,
    )


def build_rehearsal_of_refinement(
    particles: PreparedParticles,
    rows: Tensor,
    estimate: Estimate,
    half_set: Tensor,
    group: PointGroup,
    settings: RefineSettings,
    folder: RunFolder,
    generator: torch.Generator,
) -> Rehearsal:
    """As :func:`build_rehearsal`, where poses were given: the map that was made of them is what is searched."""
    schedule, placement = BootstrapSchedule(), PlacementSettings()
    half_sets, half_maps, noise = estimate.half_sets, estimate.half_maps, estimate.noise
    assert half_sets is not None
    assert half_maps is not None
    assert noise is not None
    radius = max(schedule.first_radius, min(schedule.last_radius, half_maps.n_resolved_shells))
    posing = BlockPosing(
        replace(estimate, reference=Reference(half_maps.combined(half_sets), radius, noise)),
        particles,
        trial_poses(particles, schedule, placement.n_rotations),
        PointGroup.named(settings.symmetry),
        n_placement_iterations=placement.n_iterations,
        n_iterations=settings.n_iterations,
    )
    scratch = folder.prepared_block
    return Rehearsal(particles, rows, estimate, half_set, posing, group, scratch, generator=generator)


def _build_posing(particles: PreparedParticles, estimate: Estimate, settings: Settings) -> BlockPosing:
    return BlockPosing(
        estimate,
        particles,
        _placement_trials(particles, settings),
        PointGroup.named(settings.symmetry),
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
        build_model(particles, settings, number),
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


def build_model(particles: PreparedParticles, settings: Settings, number: int = 0) -> CryoAI:
    """The encoder and volume of a start, at their box, with the first weights."""
    chosen = settings.amortized
    particles = particles.cropped(chosen.box)
    # Weights are drawn from the global generator: seed it, differently for each start, and leave it as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 2**31 * number)
        encoder = _encoder_architecture(particles, chosen).build(particles.disc, chosen.max_radius)
        volume = _build_volume(particles, chosen)
    model = CryoAI(encoder, volume, particles.imaging(chosen.max_radius), encoder_inputs[chosen.encoder_input])
    return model.to(particles.disc.device)


def _encoder_architecture(particles: PreparedParticles, chosen: AmortizedSettings) -> EncoderArchitecture:
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
    scale = float(pilot[pilot.isfinite().all(1)].abs().square().mean().sqrt())
    if chosen.volume == "voxels":
        return VoxelVolume(1e-3 * scale * torch.randn(n, n, n), sampling_oversampling=chosen.volume_oversampling)
    return FourierNetVolume(n, width=chosen.volume_width, scale=scale, sampling_oversampling=chosen.volume_oversampling)


def build_trained_encoder(
    particles: PreparedParticles,
    estimate: Estimate,
    density: Tensor,
    poses: Poses,
    group: PointGroup,
    settings: Settings,
) -> TrainedEncoder:
    """The encoder, and what the final map (n, n, n) and poses (K,) say of the particles that it learned from.

    ``group`` is the one under which poses count as equal, with its axes where the map has them.
    """
    model, reference, chosen = estimate.model, estimate.reference, settings.amortized
    assert model is not None
    assert reference is not None
    imaging = model.imaging
    small = particles.cropped(imaging.disc.n_pixels)
    noise = NoiseSpectrum(reference.noise.variance[: imaging.max_radius + 1])
    rows = torch.linspace(0, small.n_particles - 1, min(_SAMPLE, small.n_particles)).long()
    batch = small.batch(rows, imaging.max_radius)
    volume = Reference(density, imaging.max_radius, noise).at_box(small.n_pixels).sampled()
    predicted = imaging.predict(volume, poses[rows].to(batch.coefficients.device), batch.optics)
    fit = fit_z_scores(batch.coefficients, predicted, noise.precision(imaging))
    centre = fit.median()
    return TrainedEncoder(
        architecture=_encoder_architecture(small, chosen),
        input=chosen.encoder_input,
        weights=model.encoder.state_dict(),
        n_pixels=small.n_pixels,
        pixel_size_in_angstroms=small.pixel_size_in_angstroms,
        max_radius=imaging.max_radius,
        contrast_sign=particles.contrast.sign,
        noise=noise,
        residual_noise=NoiseSpectrum.of_residuals(batch.coefficients - predicted, imaging),
        optics=batch.optics,
        shift_std_in_angstroms=chosen.shift_std_in_boxes * small.n_pixels * small.pixel_size_in_angstroms,
        fit_centre=float(centre),
        # Of a normal distribution the median deviation is 0.6745 standard deviations.
        fit_spread=max(float((fit - centre).abs().median()) / 0.6745, 1e-3),
        frame=model.frame,
        group=group,
    )
