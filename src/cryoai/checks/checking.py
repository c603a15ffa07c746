"""The whole check: everything that can be looked at is, whatever else is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryoai.checks.files import FoundStacks, find_stacks, judge_headers, judge_references
from cryoai.checks.findings import CheckReport, Finding, Level, Measurements, said
from cryoai.checks.images import ImageStatistics, judge_images, read_images, sampled_rows
from cryoai.checks.metadata import judge_aberrations, judge_optics, judge_origins, judge_pixel_sizes
from cryoai.checks.resources import Need, estimate_need, judge_need
from cryoai.checks.signal import Signal, judge_delocalisation, judge_signal, measure_signal
from cryoai.errors import InputError
from cryoai.formats.particle_files import read_particles
from cryoai.formats.table import ParticleTable
from cryoai.limits import FEWEST_PARTICLES

__all__ = ["QUICK_SAMPLE", "check_particles"]

QUICK_SAMPLE = 500
"""Images that a check reads which must not cost anything."""


def check_particles(
    particles: str | Path | ParticleTable,
    *,
    data_dir: str | Path | None = None,
    ctf: str | Path | None = None,
    passthrough: Sequence[str | Path] = (),
    sample: int | None = 5000,
    working_box: int | None = None,
    max_particles: int = 50_000,
    max_faulty_share: float = 0.02,
    sign: int | None = None,
    run_dir: str | Path = ".",
    cache: Path | None = None,
    progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> CheckReport:
    """Find every fault of a particle set.

    Parameters
    ----------
    particles
        A particle file, or its table.
    data_dir, ctf, passthrough
        As for opening the file.
    sample
        Images to read at most, evenly spread; None for all.
    working_box, max_particles, max_faulty_share, sign
        As the run will have them: box in pixels (default: that of the images, at most 128), particles that the map is
        made from, share of the images that may be set aside, and contrast (+1 bright, -1 dark, None to be decided).
    run_dir
        Where the run will write.
    cache
        Folder outside it that will hold the images at the working box, if the run is given one.
    progress
        Called with the number of images read and of all to read.
    """
    path = particles.path if isinstance(particles, ParticleTable) else Path(particles)
    try:
        table = particles
        if not isinstance(table, ParticleTable):
            others = [Path(file) for file in passthrough]
            table = read_particles(path, ctf=None if ctf is None else Path(ctf), passthrough=others)
    except InputError as error:
        return CheckReport(path, (Finding("error", "table", str(error)),), Measurements())
    except OSError as error:
        finding = Finding("error", "table", f"{path}: cannot be read ({error.strerror})", "see its permissions")
        return CheckReport(path, (finding,), Measurements())
    found, findings = find_stacks(table, None if data_dir is None else Path(data_dir))
    seen = read_images(found, sampled_rows(found.worth_reading, sample), progress)
    level = _level_of_unusable(found, seen, max_faulty_share)
    findings = [*_judge_number(table), *findings, *judge_headers(found, level), *judge_references(found)]
    findings += judge_images(found, seen, level) if len(seen.places) else []
    box = working_box or found.default_working_box
    optics = judge_optics(table)
    has_ctf = _has_ctf(table, optics)
    findings += [*optics, *judge_pixel_sizes(table, found.boxes, box)]
    findings += [*judge_origins(table, found.boxes), *judge_aberrations(table)]
    signal, failure = _measured(found, seen, has_ctf)
    if signal is not None:
        findings += judge_signal(path, signal, sign)
    else:
        findings.append(Finding("note", "contrast", f"{path}: not measured, and neither are size and noise: {failure}"))
    pixel_size = found.commonest_image[0]
    need = None
    if box:
        boxes = np.where(has_ctf, found.boxes, 0)
        findings += judge_delocalisation(table, boxes, box, found.commonest_box * pixel_size)
        findings += _judge_box(path, box, found.commonest_box)
        need = estimate_need(len(table), box, max_particles, cache)
        findings += judge_need(need, Path(run_dir), box)
    return CheckReport(path, tuple(findings), _measurements(found, seen, signal, need, box, pixel_size))


def _level_of_unusable(found: FoundStacks, seen: ImageStatistics, max_faulty_share: float) -> Level:
    """Whether a run sets aside the images that it cannot use, or stops for their number."""
    n_cut_off = int((found.in_file & ~found.readable & (found.boxes > 0)).sum())
    n_bad = int((~seen.usable).sum())
    # What was read speaks for what was not.
    expected = n_bad * found.worth_reading.sum() / max(len(seen.places), 1)
    return "error" if n_cut_off + expected > max_faulty_share * len(found.table) else "warning"


def _judge_number(table: ParticleTable) -> list[Finding]:
    n = len(table)
    if n < FEWEST_PARTICLES:
        message = f"{table.path}: {said(n, 'particle')}; at least {FEWEST_PARTICLES} are needed for a reconstruction"
        return [Finding("error", "table", message, "give more particles")]
    return [Finding("ok", "table", f"{table.path}: {said(n, 'particle')}")]


def _judge_box(path: Path, box: int, image_box: int) -> list[Finding]:
    if 0 < image_box < box:
        message = f"{path}: --box {box}: the images have {image_box} pixels"
        return [Finding("error", "box", message, "give at most that")]
    return []


def _has_ctf(table: ParticleTable, optics: list[Finding]) -> NDArray[np.bool_]:
    """Of which particles (N,) the values of the CTF may be right."""
    errors = [finding for finding in optics if finding.level == "error"]
    if any(not finding.rows for finding in errors):
        return np.zeros(len(table), dtype=bool)
    wrong = [row - 1 for finding in errors for row in finding.rows]
    return ~np.isin(table.rows, wrong)


def _measured(found: FoundStacks, seen: ImageStatistics, has_ctf: NDArray[np.bool_]) -> tuple[Signal | None, str]:
    """What the images show together, or why that is not known."""
    if not has_ctf.any():
        return None, "the CTF is wrong, see optics"
    try:
        signal = measure_signal(found, seen, has_ctf)
    except InputError as error:
        return None, str(error)
    if signal is not None and not math.isfinite(signal.contrast.z_score):
        return None, "their values are beyond all measure"
    return signal, "too few images that can be used" if signal is None else ""


def _measurements(
    found: FoundStacks, seen: ImageStatistics, signal: Signal | None, need: Need | None, box: int, pixel_size: float
) -> Measurements:
    diameter = None if signal is None else signal.diameter_in_angstroms
    own_ctf = None if signal is None else signal.ctf_z_score
    return Measurements(
        n_particles=len(found.table),
        n_pixels=found.commonest_box or None,
        pixel_size_in_angstroms=pixel_size,
        n_images_read=len(seen.places),
        contrast_z_score=None if signal is None else round(signal.contrast.z_score, 3),
        ctf_z_score=None if own_ctf is None else round(own_ctf, 3),
        particle_diameter_in_angstroms=None if diameter is None else round(diameter, 1),
        working_box=box or None,
        scratch_in_bytes=None if need is None else need.scratch_in_bytes,
        memory_in_bytes=None if need is None else need.memory_in_bytes,
        seconds=None if need is None else need.seconds,
    )
