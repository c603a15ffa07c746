"""The loop: from particles to a run folder, stage by stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from cryoai.errors import InputError
from cryoai.formats.files import atomic_path
from cryoai.hardware import choose_device
from cryoai.particle_stack import ParticleStack
from cryoai.runs import RunFolder
from cryoai.symmetry.groups import PointGroup
from cryoai.training.building import (
    build_completion,
    build_rehearsal,
    build_stage,
    build_trained_encoder,
    stage_names,
)
from cryoai.training.monitor import Monitor
from cryoai.training.results import Reconstruction, conclude
from cryoai.training.settings import Settings
from cryoai.training.stages import Estimate
from cryoai.training.steps import (
    carry_out,
    choose_box,
    contrast_is_clear,
    draw_halves,
    examine_result,
    finish,
    new_run,
    prepare,
    say_faults,
)

__all__ = ["reconstruct"]


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
    box = _working_box(particles, settings)
    device = choose_device(settings.device)
    with new_run(Path(run)) as folder:
        return _run(particles, folder, settings, box, device)


def _run(stack: ParticleStack, folder: RunFolder, settings: Settings, box: int, device: torch.device) -> Reconstruction:
    generator = torch.Generator().manual_seed(settings.seed)
    # All that is drawn is drawn for the images and not for the rows, so that the order of the rows changes nothing.
    order = stack.order_of_images()
    half_set = draw_halves(order, generator)
    chosen = _chosen_particles(order, settings.max_particles, generator)
    folder.write_text(folder.settings, settings.to_toml())
    # The run's own copy of the table is what is written again at the end, whatever becomes of the file.
    stack = stack.keep_table(folder.input_particles)
    with Monitor(folder) as monitor:
        particles = prepare(
            stack,
            chosen,
            folder,
            box,
            device,
            monitor,
            contrast=settings.contrast,
            max_faulty_share=settings.max_faulty_share,
            search=torch.Generator().manual_seed(settings.seed) if "bootstrap" in settings.stages else None,
        )
        kept, faults = chosen[particles.stack_rows], list(particles.faults)
        estimate = Estimate()
        for name in stage_names(settings):
            stage = build_stage(name, particles, estimate, half_set[kept], settings, generator)
            estimate = carry_out(stage, monitor)
        assert estimate.particles is not None
        estimate = replace(estimate, particles=estimate.particles.among(kept, stack.n_particles))
        left = _rest(order, chosen)
        if len(left):
            completion = build_completion(stack, left, particles, estimate, half_set, settings, folder)
            estimate = carry_out(completion, monitor)
            faults += completion.faults
            say_faults(completion.faults, folder, monitor)
        asked, pixel_size = PointGroup.named(settings.symmetry), particles.pixel_size_in_angstroms
        findings = examine_result(estimate, stack, faults, pixel_size, asked, monitor)
        if estimate.noise is not None:
            group = findings.group_of_map(asked)
            rehearsal = build_rehearsal(particles, kept, estimate, half_set, group, settings, folder, generator)
            estimate = carry_out(rehearsal, monitor)
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
            trained = build_trained_encoder(particles, estimate, result.map, result.poses[kept], settings)
            trained.save(folder.encoder_weights)
            _save_weights(estimate.model.volume, folder.volume_weights)
        finish(result, stack, particles, estimate, half_set, monitor)
    return result


def _working_box(particles: ParticleStack, settings: Settings) -> int:
    box = choose_box(particles, settings.box)
    if "amortized" in settings.stages and settings.amortized.box > box:
        raise InputError(
            f"setting amortized.box: {settings.amortized.box} pixels for a working box of {box}; give at most that"
        )
    return box


def _chosen_particles(order: Tensor, at_most: int, generator: torch.Generator) -> Tensor:
    """Rows that map and encoder are made from, as in ``order`` (N,): all, or as many as allowed, drawn at random."""
    if len(order) <= at_most:
        return order
    return order[torch.randperm(len(order), generator=generator)[:at_most].sort().values]


def _rest(order: Tensor, chosen: Tensor) -> Tensor:
    """The rows that are not among the chosen ones, as in ``order``."""
    left = torch.ones(len(order), dtype=torch.bool)
    left[chosen] = False
    return order[left[order]]


def _save_weights(module: nn.Module, path: Path) -> None:
    with atomic_path(path) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in module.state_dict().items()}, temporary)
