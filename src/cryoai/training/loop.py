"""The loop: from particles to a run folder, stage by stage."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from cryoai.bootstrap import Reference, contrast_by_search
from cryoai.contrast import ContrastSign
from cryoai.errors import InputError
from cryoai.formats.files import atomic_path
from cryoai.hardware import choose_device
from cryoai.inference import TrainedEncoder
from cryoai.limits import FEWEST_PARTICLES
from cryoai.noise import NoiseSpectrum, fit_z_scores
from cryoai.particle_stack import Fault, ParticleStack
from cryoai.particles import PreparedParticles, prepare_particles
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.reconstruction import HalfMaps
from cryoai.runs import RunFolder, finite_or_none
from cryoai.training.building import build_completion, build_stage, encoder_architecture, stage_names
from cryoai.training.monitor import Monitor
from cryoai.training.settings import Settings
from cryoai.training.stages import (
    AGREEMENT_OF_EQUAL_MAPS,
    Estimate,
    Stage,
)
from cryoai.working_box import default_working_box

__all__ = ["PoseSources", "Reconstruction", "reconstruct"]

_SIGNS = {"auto": None, "bright": 1, "dark": -1}
_MOVED_IN_DEGREES = 1.0
_SAMPLE = 1000
# Of images that are set aside, so many are named on the screen.
_NAMED = 5


@dataclass(frozen=True)
class PoseSources:
    """How many particles took their pose from where.

    Every pose starts at the encoder's answer, refined locally. Particles that it does not fit well enough
    are searched for too, and count for the search where it found a likelier pose; where both led to
    the same answer within 10° they count in ``encoder_and_search_agree`` as well.
    ``moved_by_refinement`` counts poses that ended more than 1° from their start.
    """

    from_encoder: int
    from_search: int
    searched: int
    encoder_and_search_agree: int
    moved_by_refinement: int


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What came out of a run.

    Attributes
    ----------
    map, half_maps
        Densities (n, n, n) at the working box.
    poses
        (N,), in the order of the particles.
    half_map_agreement_in_angstroms
        Period at which the FSC of the half maps falls below 0.143, within a soft sphere; infinite if
        no shell agrees.
    halves_are_independent
        False where no Refinement was run: the poses then come from one common map, half maps agree
        whatever it is, and their agreement is no resolution.
    start_agreement
        Share of held-out particles that the two best agreeing starts of Bootstrap pose alike; None
        if there was only one.
    faults
        Images that could not be used; their particles have a pose of zeros and are flagged in ``particles.star``.
    """

    map: Tensor
    half_maps: HalfMaps
    poses: Poses
    pixel_size_in_angstroms: float
    half_map_agreement_in_angstroms: float
    halves_are_independent: bool
    start_agreement: float | None
    sources: PoseSources
    faults: tuple[Fault, ...]
    run: RunFolder

    @property
    def resolution_in_angstroms(self) -> float | None:
        """The agreement of the half maps, if they are independent."""
        return self.half_map_agreement_in_angstroms if self.halves_are_independent else None


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
    folder = RunFolder.create(Path(run))
    try:
        return _run(particles, folder, settings, box, device)
    except InputError:
        folder.discard()
        raise
    finally:
        for scratch in (folder.prepared_images, folder.prepared_block):
            scratch.unlink(missing_ok=True)


def _run(stack: ParticleStack, folder: RunFolder, settings: Settings, box: int, device: torch.device) -> Reconstruction:
    generator = torch.Generator().manual_seed(settings.seed)
    # All that is drawn is drawn for the images and not for the rows, so that the order of the rows changes nothing.
    order = stack.order_of_images()
    half_set = _random_halves(order, generator)
    chosen = _chosen_particles(order, settings.max_particles, generator)
    folder.write_text(folder.settings, settings.to_toml())
    # The run's own copy of the table is what is written again at the end, whatever becomes of the file.
    stack = stack.keep_table(folder.input_particles)
    with Monitor(folder) as monitor:
        particles = _prepare(stack, chosen, folder, settings, box, device, monitor)
        kept, faults = chosen[particles.stack_rows], list(particles.faults)
        estimate = Estimate()
        for name in stage_names(settings):
            stage = build_stage(name, particles, estimate, half_set[kept], settings, generator)
            estimate = _carry_out(stage, monitor)
        assert estimate.particles is not None
        estimate = replace(estimate, particles=estimate.particles.among(kept, stack.n_particles))
        left = _rest(order, chosen)
        if len(left):
            completion = build_completion(stack, left, particles, estimate, half_set, settings, folder)
            estimate = _carry_out(completion, monitor)
            faults += completion.faults
            _say_faults(completion.faults, folder, monitor)
        result = _conclude(particles, estimate, faults, settings, folder)
        _write(result, stack, particles, estimate, half_set, monitor)
        if estimate.model is not None:
            trained = _trained_encoder(estimate, particles, result.map, result.poses[kept], settings)
            trained.save(folder.encoder_weights)
            _save_weights(estimate.model.volume, folder.volume_weights)
        monitor.say(_verdict(result))
    return result


def _carry_out(stage: Stage, monitor: Monitor) -> Estimate:
    monitor.begin(stage.name)
    while not stage.finished:
        metrics = stage.step()
        monitor.update(metrics, stage.progress)
    monitor.end(metrics.headline)
    return stage.result()


def _working_box(particles: ParticleStack, settings: Settings) -> int:
    if particles.n_particles < FEWEST_PARTICLES:
        raise InputError(
            f"{particles.table.path}: {particles.n_particles} particles; at least {FEWEST_PARTICLES} are needed"
        )
    box = settings.box or default_working_box(particles.table.pixel_size_in_angstroms, particles.image_sizes)
    if box > particles.n_pixels:
        raise InputError(f"--box {box}: the images have {particles.n_pixels} pixels; give at most that")
    if "amortized" in settings.stages and settings.amortized.box > box:
        raise InputError(
            f"setting amortized.box: {settings.amortized.box} pixels for a working box of {box}; give at most that"
        )
    return box


def _random_halves(order: Tensor, generator: torch.Generator) -> Tensor:
    """Half set (N,), 0 or 1, of every particle: equal in number, drawn at random along ``order`` (N,)."""
    half_set = torch.zeros(len(order), dtype=torch.long)
    half_set[order[torch.randperm(len(order), generator=generator)[: len(order) // 2]]] = 1
    return half_set


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


def _prepare(
    stack: ParticleStack,
    chosen: Tensor,
    folder: RunFolder,
    settings: Settings,
    box: int,
    device: torch.device,
    monitor: Monitor,
) -> PreparedParticles:
    monitor.begin("prepare")
    particles = prepare_particles(
        stack.take(chosen),
        box,
        folder.prepared_images,
        sign=_SIGNS[settings.contrast],
        device=device,
        max_faulty_share=settings.max_faulty_share,
        progress=lambda n_done: monitor.advance(n_done / len(chosen)),
    )
    n = particles.n_particles
    some = "" if n == stack.n_particles else f" of {stack.n_particles:,}"
    clear = settings.contrast != "auto" or particles.contrast.is_clear(particles.n_particles)
    if not clear and "bootstrap" in settings.stages:
        by_search = contrast_by_search(particles, torch.Generator().manual_seed(settings.seed))
        particles = replace(particles, contrast=by_search)
    monitor.end(
        f"{n:,}{some} particles of {stack.n_pixels} px, working box {box} px of "
        f"{particles.pixel_size_in_angstroms:.2f} Å; {_contrast(particles.contrast, settings)}"
    )
    _say_faults(particles.faults, folder, monitor)
    return particles


def _contrast(found: ContrastSign, settings: Settings) -> str:
    how = "detected" if settings.contrast == "auto" else "as stated"
    search = "" if found.search_z_score is None else f"; both signs tried, z = {found.search_z_score:.1f}"
    return f"protein is {'bright' if found.sign > 0 else 'dark'} ({how}; z = {found.z_score:.1f}{search})"


def _say_faults(faults: Sequence[Fault], folder: RunFolder, monitor: Monitor) -> None:
    for fault in faults[:_NAMED]:
        monitor.say(f"{'':<10} set aside: {fault}")
    if len(faults) > _NAMED:
        monitor.say(f"{'':<10} set aside: {len(faults) - _NAMED:,} more; see {folder.quarantine}")


# ------------------------------------------------------------------------------ results


def _conclude(
    particles: PreparedParticles, estimate: Estimate, faults: list[Fault], settings: Settings, folder: RunFolder
) -> Reconstruction:
    placed, half_sets = estimate.particles, estimate.half_sets
    assert placed is not None
    assert half_sets is not None
    half_maps = half_sets.half_maps()
    moved = angular_distance_in_degrees(placed.poses.rotations, placed.start.rotations)
    n_from_encoder = int(placed.from_encoder.sum())
    return Reconstruction(
        map=half_sets.combined(half_maps),
        half_maps=half_maps,
        poses=placed.poses.to("cpu"),
        pixel_size_in_angstroms=particles.pixel_size_in_angstroms,
        half_map_agreement_in_angstroms=half_maps.resolution_in_angstroms(particles.pixel_size_in_angstroms),
        halves_are_independent="refinement" in settings.stages,
        start_agreement=estimate.start_agreement,
        sources=PoseSources(
            n_from_encoder,
            len(placed.poses) - len(faults) - n_from_encoder,
            int(placed.searched.sum()),
            int(placed.sources_agree.sum()),
            int((moved > _MOVED_IN_DEGREES).sum()),
        ),
        faults=tuple(sorted(faults, key=lambda fault: fault.row)),
        run=folder,
    )


def _write(
    result: Reconstruction,
    stack: ParticleStack,
    particles: PreparedParticles,
    estimate: Estimate,
    half_set: Tensor,
    monitor: Monitor,
) -> None:
    run, pixel_size = result.run, result.pixel_size_in_angstroms
    subset = {"rlnRandomSubset": (half_set + 1).numpy().astype(np.int64)}
    run.write_map(run.map, result.map, pixel_size)
    for path, density in zip(run.half_maps, (result.half_maps.first, result.half_maps.second), strict=True):
        run.write_map(path, density, pixel_size)
    run.write_map(run.mask, result.half_maps.mask, pixel_size)
    run.write_fsc(result.half_maps.fsc, pixel_size)
    stack.write(run.particles, result.poses, subset, result.faults)
    if estimate.particles is not None and estimate.particles.encoder is not None:
        stack.write(run.encoder_particles, estimate.particles.encoder.to("cpu"), subset, result.faults)
    if result.faults:
        run.write_quarantine(result.faults)
    run.write_json(
        run.summary,
        {
            "cryoai": version("cryoai"),
            "particles": str(stack.table.path.resolve()),
            "n_particles": stack.n_particles,
            "n_quarantined": len(result.faults),
            "hand_flipped": False,
            "box_in_pixels": particles.n_pixels,
            "pixel_size_in_angstroms": pixel_size,
            "resolution_in_angstroms": finite_or_none(result.resolution_in_angstroms),
            "half_map_agreement_in_angstroms": finite_or_none(result.half_map_agreement_in_angstroms),
            "halves_are_independent": result.halves_are_independent,
            "start_agreement": result.start_agreement,
            "start_losses": [round(loss, 4) for loss in estimate.start_losses],
            "contrast": asdict(particles.contrast),
            "pose_sources": asdict(result.sources),
            "seconds_per_stage": monitor.seconds_per_stage,
            "seconds": round(time.monotonic() - monitor.started_at, 2),
            "peak_memory_in_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "device": str(particles.disc.device),
            "n_threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy", "roma")},
        },
    )


def _trained_encoder(
    estimate: Estimate, particles: PreparedParticles, density: Tensor, poses: Poses, settings: Settings
) -> TrainedEncoder:
    """The encoder, and what the final map (n, n, n) and poses (K,) say of the particles that it learned from."""
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
        architecture=encoder_architecture(small, chosen),
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
    )


def _save_weights(module: nn.Module, path: Path) -> None:
    with atomic_path(path) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in module.state_dict().items()}, temporary)


def _verdict(result: Reconstruction) -> str:
    period = f"{result.half_map_agreement_in_angstroms:.1f} Å"
    found = f"resolution {period} by independent half maps"
    if not result.halves_are_independent:
        found = f"half maps agree to {period}, but all poses come from one common map: no claim of resolution"
    agreement = result.start_agreement
    starts = ""
    if agreement is not None:
        starts = f"; two starts from nothing agree on {agreement:.0%} of the poses"
        if agreement < AGREEMENT_OF_EQUAL_MAPS:
            starts += " (too few: trust this map only if the molecule is symmetric)"
    return f"{found}{starts}; see {result.run.path}"
