"""What every kind of run goes through: its folder, preparation, stages, and what is found out about the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cryoai.bootstrap import contrast_by_search
from cryoai.contrast import ContrastSign
from cryoai.errors import InputError
from cryoai.findings import MapFindings, examine
from cryoai.formats.snapshots import DamagedSnapshotError, read_snapshot, write_snapshot
from cryoai.image_cache import CachedImages
from cryoai.limits import FEWEST_PARTICLES
from cryoai.particle_stack import Fault, ParticleStack
from cryoai.particles import PreparedParticles, prepare_particles
from cryoai.symmetry.groups import PointGroup
from cryoai.training.monitor import Monitor
from cryoai.training.results import Reconstruction
from cryoai.training.session import Session
from cryoai.training.stages import Estimate
from cryoai.training.writing import write_results
from cryoai.working_box import default_working_box

__all__ = [
    "Contrast",
    "Drawn",
    "choose_box",
    "contrast_is_clear",
    "examine_result",
    "finish",
    "prepare",
    "say_faults",
]

Contrast = Literal["auto", "bright", "dark"]

_SIGNS: dict[Contrast, int | None] = {"auto": None, "bright": 1, "dark": -1}
# Of images that are set aside, so many are named on the screen.
_NAMED = 5


def choose_box(particles: ParticleStack, asked: int | None) -> int:
    """The working box: the one that was asked for, or else that of the images, within limits.

    Raises
    ------
    InputError
        If it is larger than the images, or there are too few particles for anything.
    """
    if particles.n_particles < FEWEST_PARTICLES:
        raise InputError(
            f"{particles.table.path}: {particles.n_particles} particles; at least {FEWEST_PARTICLES} are needed"
        )
    box = asked or default_working_box(particles.table.pixel_size_in_angstroms, particles.image_sizes)
    if box > particles.n_pixels:
        raise InputError(f"--box {box}: the images have {particles.n_pixels} pixels; give at most that")
    return box


def _draw_halves(order: Tensor, generator: torch.Generator) -> Tensor:
    """Half set (N,), 0 or 1, of every particle: equal in number, drawn at random along ``order`` (N,)."""
    half_set = torch.zeros(len(order), dtype=torch.long)
    half_set[order[torch.randperm(len(order), generator=generator)[: len(order) // 2]]] = 1
    return half_set


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is drawn when a run begins.

    Attributes
    ----------
    order : (N,)
        Rows in the order of their images. All is drawn along it, so that the order of the rows changes nothing.
    half_set : (N,)
        0 or 1, of every row.
    chosen : (M,)
        Rows that map and encoder are made from, as in ``order``.
    generator
        All further random numbers.
    """

    order: Tensor
    half_set: Tensor
    chosen: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, stack: ParticleStack, seed: int, max_particles: int) -> Drawn:
        """At most ``max_particles`` are chosen; where there are no more than that, all."""
        order, generator = stack.order_of_images(), torch.Generator().manual_seed(seed)
        half_set = _draw_halves(order, generator)
        if len(order) <= max_particles:
            return cls(order, half_set, order, generator)
        some = torch.randperm(len(order), generator=generator)[:max_particles].sort().values
        return cls(order, half_set, order[some], generator)


def prepare(
    stack: ParticleStack,
    chosen: Tensor,
    session: Session,
    box: int,
    *,
    cache: Path | None,
    contrast: Contrast,
    max_faulty_share: float,
    search: torch.Generator | None,
) -> PreparedParticles:
    """The particles of rows ``chosen`` (B,) at the working box, kept in the folder of the run or in a ``cache``.

    Where the statistics of the images leave a doubt about their contrast, both signs are tried if there is a source
    of randomness to ``search`` with.

    Raises
    ------
    InputError
        If too many images cannot be used.
    """
    folder, monitor = session.folder, session.monitor
    monitor.begin("prepare")

    def advance(n_done: int) -> None:
        monitor.advance(n_done / len(chosen))
        if session.is_to_stop:
            raise session.stopped()

    particles = _prepared_before(session, cache)
    if particles is None:
        wanted = stack.take(chosen)
        if cache is None:
            particles = prepare_particles(
                wanted,
                box,
                folder.prepared_images,
                device=session.device,
                max_faulty_share=max_faulty_share,
                progress=advance,
            )
        else:
            place = CachedImages.place(cache, wanted, box, max_faulty_share=max_faulty_share, device=session.device)
            particles = _from_cache(place, monitor, advance)
        particles = replace(particles, contrast=particles.contrast.stated(_SIGNS[contrast]))
        if search is not None and not contrast_is_clear(particles, contrast):
            particles = replace(particles, contrast=contrast_by_search(particles, search))
        folder.prepared.parent.mkdir(exist_ok=True)
        write_snapshot(folder.prepared, particles)
    n = particles.n_particles
    some = "" if n == stack.n_particles else f" of {stack.n_particles:,}"
    monitor.end(
        f"{n:,}{some} particles of {stack.n_pixels} px, working box {box} px of "
        f"{particles.pixel_size_in_angstroms:.2f} Å; {_about_contrast(particles.contrast, contrast)}"
    )
    say_faults(particles.faults, session)
    return particles


def _from_cache(place: CachedImages, monitor: Monitor, advance: Callable[[int], None]) -> PreparedParticles:
    def say(line: str) -> None:
        monitor.say(f"{'prepare':<10} {line}")

    found = place.find()
    if found is None:
        return place.make(progress=advance, say=say)
    say(f"images at the working box found in {place.path}")
    return found


def _prepared_before(session: Session, cache: Path | None) -> PreparedParticles | None:
    """The particles as they were prepared when the run began, if that is still all there."""
    folder = session.folder
    try:
        particles: PreparedParticles = read_snapshot(folder.prepared, session.device)
        # The folder may have been moved.
        path = folder.prepared_images if cache is None else particles.path
        size = path.stat().st_size
    except (DamagedSnapshotError, OSError):
        return None
    return replace(particles, path=path) if size == particles.n_bytes else None


def contrast_is_clear(particles: PreparedParticles, contrast: Contrast) -> bool:
    """Whether it was stated, or the images leave no doubt about it."""
    return contrast != "auto" or particles.contrast.is_clear(particles.n_particles)


def _about_contrast(found: ContrastSign, asked: Contrast) -> str:
    how = "detected" if asked == "auto" else "as stated"
    search = "" if found.search_z_score is None else f"; both signs tried, z = {found.search_z_score:.1f}"
    return f"protein is {'bright' if found.sign > 0 else 'dark'} ({how}; z = {found.z_score:.1f}{search})"


def say_faults(faults: Sequence[Fault], session: Session) -> None:
    """Name the first of the images that were set aside."""
    for fault in faults[:_NAMED]:
        session.monitor.say(f"{'':<10} set aside: {fault}")
    if len(faults) > _NAMED:
        more = f"{len(faults) - _NAMED:,} more; see {session.folder.quarantine}"
        session.monitor.say(f"{'':<10} set aside: {more}")


def examine_result(
    estimate: Estimate,
    stack: ParticleStack,
    faults: Sequence[Fault],
    pixel_size_in_angstroms: float,
    group: PointGroup,
    monitor: Monitor,
) -> MapFindings:
    """What the final half maps show, and the poses of all particles but those without a usable image."""
    assert estimate.half_maps is not None
    assert estimate.particles is not None
    monitor.begin("validation")
    poses = estimate.particles.poses
    posed = torch.from_numpy(~np.isin(stack.table.rows, [fault.row for fault in faults]))
    posed = posed.to(poses.rotations.device)
    findings = examine(estimate.half_maps, poses[posed], pixel_size_in_angstroms, group)
    monitor.end(findings.headline)
    return findings


def finish(
    result: Reconstruction,
    stack: ParticleStack,
    particles: PreparedParticles,
    estimate: Estimate,
    half_set: Tensor,
    monitor: Monitor,
) -> None:
    """Write all that was found, and say what to think of it."""
    write_results(result, stack, particles, estimate, half_set, monitor)
    period = f"{result.half_map_agreement_in_angstroms:.1f} Å"
    apart = " that began apart" if result.halves_began_apart else ""
    found = f"resolution {period} by independent half maps{apart}"
    if not result.halves_are_independent:
        found = f"half maps agree to {period}, but all poses come from one common map: no claim of resolution"
    elif result.verdict.status == "failed":
        found = f"half maps agree to {period}, which says nothing here"
    monitor.say(f"{result.verdict.status}: {found}; see {result.run.path}")
    for reason in result.verdict.reasons:
        monitor.say(f"  - {reason}")
