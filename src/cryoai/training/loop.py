"""The loop: from particles to a run folder, stage by stage."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from cryoai.errors import InputError
from cryoai.formats.snapshots import write_tensors
from cryoai.hardware import choose_device
from cryoai.particle_stack import ParticleStack
from cryoai.symmetry.groups import PointGroup
from cryoai.training.building import (
    build_completion,
    build_model,
    build_rehearsal,
    build_stage,
    build_trained_encoder,
    stage_names,
)
from cryoai.training.course import Course
from cryoai.training.origin import Origin
from cryoai.training.results import Reconstruction, conclude
from cryoai.training.session import Session, new_run, work_on
from cryoai.training.settings import Settings
from cryoai.training.steps import (
    Drawn,
    choose_box,
    contrast_is_clear,
    examine_result,
    finish,
    prepare,
    say_faults,
)

__all__ = ["carry_on", "reconstruct", "working_box"]


def reconstruct(particles: ParticleStack, run: str | Path, settings: Settings | None = None) -> Reconstruction:
    """Reconstruct a map and every pose from particles, and write all that was found to ``run``.

    Raises
    ------
    InputError
        If the particles or the settings cannot be used; nothing is left behind.
    RunFailedError
        If training diverges.

    Examples
    --------
    >>> particles = ParticleStack.open("particles.star")        # doctest: +SKIP
    >>> result = reconstruct(particles, "runs/first")           # doctest: +SKIP
    >>> result.resolution_in_angstroms                          # doctest: +SKIP
    11.0
    """
    settings = (settings or Settings()).checked()
    box = working_box(particles, settings)
    device = choose_device(settings.device)
    with new_run(Path(run)) as folder:
        Origin.of("reconstruct", particles, settings.to_toml()).write(folder)
        # The run's own copy of the table is what is written again at the end, whatever becomes of the file.
        stack = particles.keep_table(folder.input_particles)
        with work_on(folder, device, settings.checkpoint_seconds) as session:
            return carry_on(stack, session, settings, box)


def carry_on(stack: ParticleStack, session: Session, settings: Settings, box: int) -> Reconstruction:
    """Reconstruct from the beginning, or from the checkpoint that the session goes on from."""
    drawn = Drawn.of(stack, settings.seed, settings.max_particles)
    half_set, chosen, generator = drawn.half_set, drawn.chosen, drawn.generator
    particles = prepare(
        stack,
        chosen,
        session,
        box,
        cache=settings.cache,
        contrast=settings.contrast,
        max_faulty_share=settings.max_faulty_share,
        search=torch.Generator().manual_seed(settings.seed) if "bootstrap" in settings.stages else None,
    )
    kept, left = chosen[particles.stack_rows], _rest(drawn.order, chosen)
    folder, pixel_size = session.folder, particles.pixel_size_in_angstroms
    course = Course(session, generator, lambda: build_model(particles, settings))
    for name in stage_names(settings):
        build = functools.partial(build_stage, half_set=half_set[kept], settings=settings, generator=generator)
        course.carry_out(functools.partial(build, name, particles))
    course.change(lambda e: e.among(kept, stack.n_particles))
    if len(left):
        course.carry_out(lambda e: build_completion(stack, left, particles, e, half_set, settings, folder))
        say_faults(course.estimate.faults, session)
    asked, faults = PointGroup.named(settings.symmetry), [*particles.faults, *course.estimate.faults]
    findings = examine_result(course.estimate, stack, faults, pixel_size, asked, session.monitor)
    group = findings.group_of_map(asked)
    if course.estimate.noise is not None:
        course.carry_out(lambda e: build_rehearsal(particles, kept, e, half_set, group, settings, folder, generator))
    estimate = course.estimate
    result = conclude(
        estimate,
        findings,
        faults,
        folder,
        pixel_size_in_angstroms=pixel_size,
        contrast_is_clear=contrast_is_clear(particles, settings.contrast),
        symmetry_share=None if estimate.symmetry is None else estimate.symmetry.share,
        symmetry_asked=None if settings.symmetry == "C1" else settings.symmetry,
    )
    if estimate.model is not None:
        trained = build_trained_encoder(particles, estimate, result.map, result.poses[kept], group, settings)
        trained.save(folder.encoder_weights)
        write_tensors(folder.volume_weights, estimate.model.volume.state_dict(), {})
    finish(result, stack, particles, estimate, half_set, session.monitor)
    return result


def working_box(particles: ParticleStack, settings: Settings) -> int:
    """The working box, in which the encoder's has room.

    Raises
    ------
    InputError
        If there is none.
    """
    box = choose_box(particles, settings.box)
    if "amortized" in settings.stages and settings.amortized.box > box:
        raise InputError(
            f"setting amortized.box: {settings.amortized.box} pixels for a working box of {box}; give at most that"
        )
    return box


def _rest(order: Tensor, chosen: Tensor) -> Tensor:
    """The rows that are not among the chosen ones, as in ``order``."""
    left = torch.ones(len(order), dtype=torch.bool)
    left[chosen] = False
    return order[left[order]]
