"""From the results of a run to the files of its folder."""

from __future__ import annotations

import platform
import resource
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles
from cryoai.report.validation_figure import draw_validation
from cryoai.runs import FscColumns, finite_or_none
from cryoai.training.monitor import Monitor
from cryoai.training.results import Reconstruction
from cryoai.training.stages import Estimate

__all__ = ["write_results"]


def write_results(
    result: Reconstruction,
    stack: ParticleStack,
    particles: PreparedParticles,
    estimate: Estimate,
    half_set: Tensor,
    monitor: Monitor,
) -> None:
    """Write maps, curves, poses and the summary; the summary last, because it says that all is there."""
    run = result.run
    _write_maps(result)
    _write_particles(result, stack, estimate, half_set)
    if result.faults:
        run.write_quarantine(result.faults)
    about = {
        "particles": str(stack.table.path.resolve()),
        "n_particles": stack.n_particles,
        "box_in_pixels": particles.n_pixels,
        "contrast": asdict(particles.contrast),
        "start_losses": [finite_or_none(loss) for loss in estimate.start_losses],
    }
    run.write_json(run.summary, _judgement(result) | about | _circumstances(particles, monitor))


def _write_maps(result: Reconstruction) -> None:
    run, pixel_size, halves, found = result.run, result.pixel_size_in_angstroms, result.half_maps, result.findings
    run.write_map(run.map, result.map, pixel_size)
    for path, density in zip(run.half_maps, (halves.first, halves.second), strict=True):
        run.write_map(path, density, pixel_size)
    run.write_map(run.mask, halves.mask, pixel_size)
    run.write_map(run.sharpened_map, found.sharpened.density, pixel_size)
    # A map has no place for what is not a number: outside the mask it is 0.
    local = found.local_resolution_in_angstroms
    run.write_map(run.local_resolution, torch.where(local.isfinite(), local, 0.0), pixel_size)
    curves = _curves(result)
    run.write_fsc(curves, pixel_size)
    period = f"{result.half_map_agreement_in_angstroms:.1f} Å"
    title = f"{result.verdict.status}: half maps agree to {period}"
    draw_validation(run.validation_figure, curves, pixel_size, found.orientations, result.confidence, title)


def _curves(result: Reconstruction) -> FscColumns:
    curves, controls = result.half_maps.correlation, result.controls
    return FscColumns(
        fsc=curves.corrected.values,
        unmasked=curves.unmasked.values,
        masked=curves.masked.values,
        phases_randomised=curves.randomised.values,
        noise_only=None if controls is None else controls.noise_only,
        shuffled_poses=None if controls is None else controls.shuffled_poses,
    )


def _write_particles(result: Reconstruction, stack: ParticleStack, estimate: Estimate, half_set: Tensor) -> None:
    run = result.run
    columns: dict[str, Any] = {"rlnRandomSubset": (half_set + 1).numpy().astype(np.int64)}
    if estimate.particles is not None and estimate.particles.encoder is not None:
        stack.write(run.encoder_particles, estimate.particles.encoder.to("cpu"), columns, result.faults)
    if result.confidence is not None:
        columns["rlnParticleFigureOfMerit"] = result.confidence.double().numpy()
    if estimate.particles is not None and estimate.particles.defocus_change is not None:
        changes, table = estimate.particles.defocus_change.double().numpy(), stack.table
        columns["rlnDefocusU"] = table.defocus_u_in_angstroms + changes
        columns["rlnDefocusV"] = table.defocus_v_in_angstroms + changes
    stack.write(run.particles, result.poses, columns, result.faults)


def _judgement(result: Reconstruction) -> dict[str, Any]:
    curves, found, controls = result.half_maps.correlation, result.findings, result.controls
    confidence = result.confidence
    orientations = found.orientations
    return {
        "cryoai": version("cryoai"),
        "verdict": {"status": result.verdict.status, "reasons": list(result.verdict.reasons)},
        "resolution_in_angstroms": finite_or_none(result.resolution_in_angstroms),
        "half_map_agreement_in_angstroms": finite_or_none(result.half_map_agreement_in_angstroms),
        "halves_are_independent": result.halves_are_independent,
        "halves_began_apart": result.halves_began_apart,
        "resolutions_in_angstroms": {
            name: {
                "at_fsc_0.143": finite_or_none(curve.resolution_at_0143_in_angstroms),
                "at_fsc_0.5": finite_or_none(curve.resolution_at_half_in_angstroms),
            }
            for name, curve in vars(curves).items()
            if name != "randomised_from"
        },
        "b_factor_in_square_angstroms": finite_or_none(found.sharpened.b_factor_in_square_angstroms),
        "pixel_size_in_angstroms": result.pixel_size_in_angstroms,
        "start_agreement": None if result.start_agreement is None else asdict(result.start_agreement),
        "given_poses": None
        if (given := result.given_poses) is None
        else {"file": str(given.file.resolve()), "half_sets": given.half_sets},
        "n_quarantined": len(result.faults),
        "hand_flipped": False,
        "pose_sources": asdict(result.sources),
        "confidence": None
        if confidence is None
        else {
            "mean": round(float(confidence.mean()), 4),
            "share_over_0.5": round(float((confidence > 0.5).float().mean()), 4),
            "share_over_0.9": round(float((confidence > 0.9).float().mean()), 4),
        },
        "controls": None
        if controls is None
        else {
            "n_images": controls.n_images,
            "better_than_noise": round(controls.better_than_noise, 4),
            "found_of_synthetic": round(controls.found_of_synthetic, 4),
            "fit_of_synthetic": round(controls.fit_of_synthetic, 3),
        },
        "orientations": {
            "effective_share": round(orientations.effective_share, 4),
            "densest_tenth_share": round(orientations.densest_tenth_share, 4),
            "cone_area_ratio": round(found.conical.area_ratio, 4),
        },
        "map_defects": [defect.name.lower() for defect in found.defects.found],
        "symmetries": [
            {
                "group": candidate.group.name,
                "share": round(candidate.share, 3),
                "z_score": round(candidate.z_score, 1),
                "is_likely": candidate.is_likely,
            }
            for candidate in found.symmetries
        ],
    }


def _circumstances(particles: PreparedParticles, monitor: Monitor) -> dict[str, Any]:
    return {
        "seconds_per_stage": monitor.seconds_per_stage,
        "seconds": round(time.monotonic() - monitor.started_at, 2),
        "peak_memory_in_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "device": str(particles.disc.device),
        "n_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy", "roma")},
    }
