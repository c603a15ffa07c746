"""Refinement of poses that came with the particles: no search and no encoder, but half maps and all that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryoai.errors import InputError
from cryoai.formats.mrc import read_map
from cryoai.fourier import fourier_shell_correlation, n_shells_above, resize_map
from cryoai.half_maps import HalfMaps
from cryoai.hardware import choose_device
from cryoai.model import CryoAI
from cryoai.noise import Fit, log_likelihood
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses, selected_poses
from cryoai.reconstruction import HalfSets, particle_mask
from cryoai.symmetry.averaging import symmetrized_half_sets
from cryoai.symmetry.groups import PointGroup
from cryoai.symmetry.self_correlation import SelfCorrelation
from cryoai.training.building import build_refinement, build_rehearsal_of_refinement
from cryoai.training.course import Course
from cryoai.training.monitor import Monitor
from cryoai.training.origin import Origin
from cryoai.training.results import GivenPoses, Reconstruction, conclude
from cryoai.training.session import Session, new_run, work_on
from cryoai.training.settings import RefineSettings
from cryoai.training.stages import Estimate, ParticlePoses
from cryoai.training.stages.base import half_sets_at
from cryoai.training.steps import (
    Drawn,
    choose_box,
    contrast_is_clear,
    examine_result,
    finish,
    prepare,
)
from cryoai.volumes import SampledVolume

__all__ = ["GivenInput", "carry_on_refining", "refine"]

# Of a pixel: a header rounds its size.
_SAME_PIXEL = 0.005
# What is stored with few digits, or was resampled, goes a little beyond.
_BEYOND_A_MASK = 0.01
_INSIDE_A_MASK = 0.5
# So many images are looked at with their own poses and with those of others.
_N_COMPARED = 4000
_BATCH = 256
# Of files whose poses have nothing to do with the images three in ten thousand are above.
_LEAST_Z_SCORE = 4.0
# Shells that a symmetry is told by.
_FEWEST_SHELLS, _MOST_SHELLS = 5, 32


def refine(particles: ParticleStack, run: str | Path, settings: RefineSettings | None = None) -> Reconstruction:
    """Refine the poses that particles came with, and write the maps and all that was found to ``run``.

    All particles are refined, each against the map of its own half. Poses that the images fit no better than those of
    other images are refused.

    Raises
    ------
    InputError
        If the particles, their poses or half sets, the mask or the settings cannot be used; nothing is left behind.

    Examples
    --------
    >>> particles = ParticleStack.open("run_data.star")         # doctest: +SKIP
    >>> refine(particles, "runs/refined").verdict.status        # doctest: +SKIP
    'solved'
    """
    settings = settings or RefineSettings()
    PointGroup.named(settings.symmetry)
    if particles.table.poses is None:
        needed = "alignments3D/pose, which may be in a --passthrough FILE"
        if particles.table.star is not None:
            needed = "rlnAngleRot, rlnAngleTilt, rlnAnglePsi"
        raise InputError(
            f"{particles.table.path}: no poses to refine ({needed}); give a file with poses, or find them with "
            "cryoai reconstruct"
        )
    given = GivenInput.of(particles, settings)
    device = choose_device(settings.device)
    with new_run(Path(run)) as folder:
        Origin.of("refine", particles, settings.to_toml()).write(folder)
        stack = particles.keep_table(folder.input_particles)
        with work_on(folder, device, settings.checkpoint_seconds) as session:
            return carry_on_refining(stack, session, settings, given)


def carry_on_refining(
    stack: ParticleStack, session: Session, settings: RefineSettings, given: GivenInput
) -> Reconstruction:
    """Refine from the beginning, or from the checkpoint that the session goes on from."""
    drawn = Drawn.of(stack, settings.seed, max_particles=stack.n_particles)
    order, generator = drawn.order, drawn.generator
    group, folder = PointGroup.named(settings.symmetry), session.folder
    particles = prepare(
        stack,
        order,
        session,
        given.box,
        cache=settings.cache,
        contrast=settings.contrast,
        max_faulty_share=settings.max_faulty_share,
        search=torch.Generator().manual_seed(settings.seed),
    )
    session.monitor.say(f"half sets  {given.why_no_half_set or 'those of the file'}")
    half_set = drawn.half_set if given.half_set is None else given.half_set
    kept, pixel_size = order[particles.stack_rows], particles.pixel_size_in_angstroms
    mask = None if given.mask is None else given.mask.to(session.device)
    begin, share = _begin(stack, kept, particles, half_set[kept], group, mask, generator, session.monitor)
    course = Course(session, generator, _no_model)
    course.change(lambda _: begin)
    course.carry_out(lambda e: build_refinement(particles, e, half_set[kept], mask, settings))
    course.change(lambda e: e.among(kept, stack.n_particles))
    findings = examine_result(course.estimate, stack, particles.faults, pixel_size, group, session.monitor)
    of_map = findings.group_of_map(group)
    course.carry_out(
        lambda e: build_rehearsal_of_refinement(particles, kept, e, half_set, of_map, settings, folder, generator)
    )
    estimate = course.estimate
    result = conclude(
        estimate,
        findings,
        list(particles.faults),
        folder,
        pixel_size_in_angstroms=pixel_size,
        contrast_is_clear=contrast_is_clear(particles, settings.contrast),
        symmetry_share=share,
        symmetry_asked=None if len(group) == 1 else group.name,
        given_poses=GivenPoses(stack.table.path, "new" if given.half_set is None else "file"),
    )
    finish(result, stack, particles, estimate, half_set, session.monitor)
    return result


def _no_model() -> CryoAI:
    raise ValueError("a refinement has no model")


@dataclass(frozen=True, eq=False)
class GivenInput:
    """What comes with the poses: half sets (N,), or why there are none, a mask (box, box, box), and the working box."""

    half_set: Tensor | None
    why_no_half_set: str
    mask: Tensor | None
    box: int

    @classmethod
    def of(cls, stack: ParticleStack, settings: RefineSettings) -> GivenInput:
        """As far as it can be used.

        Raises
        ------
        InputError
            If a part of it cannot be.
        """
        box = choose_box(stack, settings.box)
        mask = None if settings.mask is None else _read_mask(settings.mask, stack, box)
        return cls(*_half_set_of_file(stack, settings), mask, box)


def _begin(
    stack: ParticleStack,
    rows: Tensor,
    particles: PreparedParticles,
    half_set: Tensor,
    group: PointGroup,
    mask: Tensor | None,
    generator: torch.Generator,
    monitor: Monitor,
) -> tuple[Estimate, float | None]:
    """Half maps at the given poses of ``rows`` (N,), and how much of their signal obeys the symmetry as yet.

    Raises
    ------
    InputError
        If the images do not fit these poses.
    """
    monitor.begin("poses")
    assert stack.poses is not None
    device, pixel_size = particles.disc.device, particles.pixel_size_in_angstroms
    poses = stack.poses[rows].to(device)
    sets = half_sets_at(poses, particles, half_set)
    half_maps = HalfMaps.of(sets, pixel_size, mask)
    z_score = _advantage_of_own_poses(particles, poses, half_set, sets, half_maps, generator)
    if not z_score >= _LEAST_Z_SCORE:
        raise InputError(
            f"{stack.table.path}: its poses do not fit its images, which agree with the half maps made at them no "
            f"better than with poses interchanged (z = {z_score:.1f}, {_LEAST_Z_SCORE:.0f} is needed); give the file "
            "that the poses of these very images are in, or find them with cryoai reconstruct"
        )
    share = _share_that_obeys(group, half_maps)
    if len(group) > 1:
        sets = symmetrized_half_sets(sets, group.to(device))
        half_maps = HalfMaps.of(sets, pixel_size, mask)
    obeys = "" if share is None else f"; {min(share, 1):.0%} of the signal obeys {group.name}"
    agreement = f"half maps agree to {half_maps.resolution_in_angstroms:.1f} Å"
    monitor.end(f"{agreement}; images prefer their own poses to others, z = {z_score:.1f}{obeys}")
    none = torch.zeros(len(rows), dtype=torch.bool, device=device)
    placed = ParticlePoses(poses, none, none, none, None, poses, Fit.blank(len(rows), device))
    return Estimate(particles=placed, half_sets=sets, half_maps=half_maps), share


@torch.no_grad()
def _advantage_of_own_poses(
    particles: PreparedParticles,
    poses: Poses,
    half_set: Tensor,
    sets: HalfSets,
    half_maps: HalfMaps,
    generator: torch.Generator,
) -> float:
    """How much likelier images are at their own rotations than at those of others, in standard errors of the mean.

    Each is compared with the map of the half that it is not part of, made at the poses (N,): if the rotations have
    nothing to do with the images the result is normal with mean 0 and deviation 1. The shifts stay with the images:
    they may be right where rotations are not.
    """
    limit = max(4, min(particles.disc.max_radius, half_maps.n_resolved_shells + 2))
    imaging = particles.imaging(limit)
    references = half_maps.references(sets, limit)
    volumes = [SampledVolume.from_map(density, limit) for density in references]
    precision = particles.power(torch.arange(particles.n_particles), limit).precision(imaging)
    chosen = torch.randperm(particles.n_particles, generator=generator)[:_N_COMPARED]
    gains = []
    for half in (0, 1):
        rows = chosen[half_set[chosen] == half]
        for own, others in zip(rows.split(_BATCH), rows.roll(1).split(_BATCH), strict=True):
            batch, at_own = particles.batch(own, limit), selected_poses(poses, own)
            at_others = Poses(selected_poses(poses, others).rotations, at_own.shifts_in_angstroms)
            likelier, likely = (
                log_likelihood(batch.coefficients, imaging.predict(volumes[1 - half], which, batch.optics), precision)
                for which in (at_own, at_others)
            )
            gains.append((likelier - likely).double())
    deviation, mean = torch.std_mean(torch.cat(gains))
    return float(mean / deviation.clamp_min(1e-12)) * math.sqrt(len(chosen))


def _share_that_obeys(group: PointGroup, half_maps: HalfMaps) -> float | None:
    """The least share of the reproducible signal that an operator leaves unchanged; None where too little is seen."""
    if len(group) == 1:
        return None
    sphere = particle_mask(half_maps.first.shape[-1], device=half_maps.first.device)
    first, second = half_maps.first * sphere, half_maps.second * sphere
    n_shells = n_shells_above(fourier_shell_correlation(first, second), 0.5)
    max_radius = min(n_shells, _MOST_SHELLS, first.shape[-1] // 2 - 1)
    if max_radius < _FEWEST_SHELLS:
        return None
    correlation = SelfCorrelation.of_half_maps(first, second, max_radius)
    operators = group.operators[1:].to(first)
    in_place = torch.zeros(1, 3).to(first)
    return min(float(correlation.shares(part, in_place.expand(len(part), 3)).min()) for part in operators.split(4))


# ------------------------------------------------------------------------------ what is given beside the poses


def _half_set_of_file(stack: ParticleStack, settings: RefineSettings) -> tuple[Tensor | None, str]:
    """Half sets (N,) that came with the particles; or None, and why they are drawn anew."""
    if settings.half_sets == "new":
        return None, "drawn anew, as stated"
    try:
        return torch.from_numpy(np.array(stack.table.usable_half_set())), ""
    except InputError as error:
        if settings.half_sets == "file":
            raise
        return None, f"drawn anew: {str(error).split('; ')[0]}"


def _read_mask(path: Path, stack: ParticleStack, box: int) -> Tensor:
    """A mask (box, box, box) from a file, which has it at this box or at that of the images.

    Raises
    ------
    InputError
        If it is of another box or pixel size, or no mask.
    """
    found = read_map(path)
    n, size = len(found.density), found.pixel_size_in_angstroms
    extent = stack.n_pixels * stack.pixel_size_in_angstroms
    fitting = {stack.n_pixels: extent / stack.n_pixels, box: extent / box}
    if n not in fitting or abs(size / fitting[n] - 1) > _SAME_PIXEL:
        needed = " or ".join(f"{side} voxels of {pixel:.4g} Å" for side, pixel in fitting.items())
        raise InputError(f"--mask {path}: {n} voxels of {size:.4g} Å a side; {needed} are needed: resample it")
    low, high = float(found.density.min()), float(found.density.max())
    if low < -_BEYOND_A_MASK or high > 1 + _BEYOND_A_MASK:
        raise InputError(
            f"--mask {path}: its values are from {low:.3g} to {high:.3g}; a mask is 1 inside and 0 outside: make one"
        )
    if high < _INSIDE_A_MASK:
        raise InputError(f"--mask {path}: it is empty, no voxel is above {_INSIDE_A_MASK}; give the mask of a molecule")
    mask = torch.from_numpy(found.density)
    if n != box:
        # That keeps the values of the transform, which is the sum of the voxels over the side of the box.
        mask = resize_map(mask, box) * (box / n) ** 2
    return mask.clamp(0, 1)
