"""Is what the particle file says physically possible, and in the units that it should be in?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryoai.checks.findings import Finding, Level, at_rows, said
from cryoai.formats.table import FloatColumn, ParticleTable

__all__ = ["judge_aberrations", "judge_optics", "judge_origins", "judge_pixel_sizes"]

_FEW = 20
_LARGEST_SHIFT_IN_BOXES = 0.25
_SUSPICIOUS_RATIO = 1.5

_Values = Callable[[ParticleTable], FloatColumn]


@dataclass(frozen=True)
class _Rule:
    """What no value of a column should be. Of the rules of one column, the first that is broken speaks."""

    column: str
    unit: str
    values: _Values
    broken: Callable[[FloatColumn], NDArray[np.bool_]]
    level: Level
    why: str
    fix: str


def _farther_defocus(table: ParticleTable) -> FloatColumn:
    """Of the two defoci of each particle, the one that is farther from zero."""
    u, v = table.defocus_u_in_angstroms, table.defocus_v_in_angstroms
    return np.where(np.abs(u) >= np.abs(v), u, v)


def _voltage(table: ParticleTable) -> FloatColumn:
    return table.voltage_in_kilovolts


def _aberration(table: ParticleTable) -> FloatColumn:
    return table.spherical_aberration_in_mm


def _contrast(table: ParticleTable) -> FloatColumn:
    return table.amplitude_contrast


_RULES = (
    _Rule(
        "defocus", "Å", _farther_defocus, lambda x: (np.abs(x) < 50) & (x != 0), "error",
        "that looks like micrometres", "multiply the defoci by 10,000",
    ),
    _Rule(
        "defocus", "Å", _farther_defocus, lambda x: np.abs(x) > 1e7, "error",
        "more than a millimetre", "see whether the column is the defocus, in Å",
    ),
    _Rule(
        "defocus", "Å", _farther_defocus, lambda x: x == 0, "warning",
        "that leaves a contrast transfer function with next to no contrast", "estimate the CTF first",
    ),
    _Rule(
        "defocus", "Å", _farther_defocus, lambda x: x < 0, "warning",
        "underfocus is positive here, as in RELION and cryoSPARC", "reverse their sign unless it is overfocus",
    ),
    _Rule(
        "defocus", "Å", _farther_defocus, lambda x: x > 100_000, "warning",
        "more than 10 micrometres", "see whether the unit is Å, and leave out failed CTF fits",
    ),
    _Rule(
        "astigmatism |U - V|", "Å",
        lambda table: np.abs(table.defocus_u_in_angstroms - table.defocus_v_in_angstroms),
        lambda x: x > 5_000, "warning",
        "more than 5,000 Å comes from a failed CTF fit", "leave these micrographs out or fit them again",
    ),
    _Rule(
        "defocus angle", "°", lambda table: table.defocus_angle_in_degrees, lambda x: np.abs(x) > 360, "warning",
        "beyond a full turn", "see whether the column is the angle, in degrees",
    ),
    _Rule(
        "voltage", "kV", _voltage, lambda x: x >= 10_000, "error", "that looks like volts",
        "divide the voltage by 1,000",
    ),
    _Rule(
        "voltage", "kV", _voltage, lambda x: x < 1, "error", "no microscope has so little",
        "give the voltage in kilovolts, mostly 200 or 300",
    ),
    _Rule(
        "voltage", "kV", _voltage, lambda x: (x < 60) | (x > 400), "warning",
        "microscopes of particles have 60 to 400 kV", "see whether the unit is kV",
    ),
    _Rule(
        "spherical aberration", "mm", _aberration, lambda x: np.abs(x) > 10, "error",
        "that looks like micrometres or Å", "give millimetres; most microscopes have 1.4 to 2.7",
    ),
    _Rule(
        "spherical aberration", "mm", _aberration, lambda x: x < 0, "warning", "it is not negative in any microscope",
        "see whether its sign was reversed",
    ),
    _Rule(
        "spherical aberration", "mm", _aberration, lambda x: x == 0, "note",
        "right for a corrected microscope only", "give that of the microscope if it has no corrector",
    ),
    _Rule(
        "amplitude contrast", "", _contrast, lambda x: np.abs(x) > 1, "error",
        "that looks like per cent; a fraction is needed",
        "divide it by 100",
    ),
    _Rule(
        "amplitude contrast", "", _contrast, lambda x: (x < 0) | (x > 0.5), "warning",
        "of frozen particles it is a fraction from 0.05 to 0.2", "see whether the column is the amplitude contrast",
    ),
    _Rule(
        "phase shift", "°", lambda table: table.phase_shift_in_degrees, lambda x: (x < 0) | (x > 360), "warning",
        "beyond 0 to 360", "see whether the column is the phase shift, in degrees",
    ),
    _Rule(
        "phase shift", "°", lambda table: table.phase_shift_in_degrees,
        lambda x: (x != 0) & (x == x) & (np.max(x, initial=0) <= 3.2), "note",
        "that may be radians", "multiply it by 57.2958 if it is in radians",
    ),
    _Rule(
        "pixel size", "Å", lambda table: table.pixel_size_in_angstroms, lambda x: (x < 0.01) | (x > 1000), "error",
        "no image of particles has such pixels", "give it in Å",
    ),
    _Rule(
        "pixel size", "Å", lambda table: table.pixel_size_in_angstroms, lambda x: (x < 0.1) | (x > 20), "warning",
        "images of particles have 0.1 to 20 Å", "see whether the unit is Å",
    ),
)  # fmt: skip


def judge_optics(table: ParticleTable) -> list[Finding]:
    """What the file says of the microscope, against what microscopes are like."""
    findings = []
    spoken: set[str] = set()
    for rule in _RULES:
        values = rule.values(table)
        broken = np.flatnonzero(rule.broken(values))
        if not len(broken) or rule.column in spoken:
            continue
        spoken.add(rule.column)
        words, rows = at_rows(table, broken)
        low, high = values[broken].min(), values[broken].max()
        unit = f" {rule.unit}" if rule.unit not in ("", "°") else rule.unit
        value = f"{low:g}{unit}" if low == high else f"{low:g} to {high:g}{unit}"
        message = f"{table.path}: {rule.column} of {words} is {value}: {rule.why}"
        findings.append(Finding(rule.level, "optics", message, rule.fix, rows))
    if len(table) >= _FEW and len(np.unique(table.defocus_u_in_angstroms)) == 1 and "defocus" not in spoken:
        message = f"{table.path}: all {len(table):,} rows have one defocus, {table.defocus_u_in_angstroms[0]:g} Å"
        fix = "estimate the CTF of each micrograph, unless all come from one"
        findings.append(Finding("note", "optics", message, fix))
    if not any(finding.level in ("error", "warning") for finding in findings):
        findings.append(Finding("ok", "optics", f"{table.path}: {_described(table)}"))
    return findings


def _described(table: ParticleTable) -> str:
    def listed(values: FloatColumn, unit: str) -> str:
        return ", ".join(f"{value:g}" for value in np.unique(values)[:4]) + unit

    defocus = (table.defocus_u_in_angstroms + table.defocus_v_in_angstroms) / 2
    return (
        f"{listed(table.voltage_in_kilovolts, ' kV')}, Cs {listed(table.spherical_aberration_in_mm, ' mm')}, amplitude "
        f"contrast {listed(table.amplitude_contrast, '')}, defocus {defocus.min():,.0f} to {defocus.max():,.0f} Å"
    )


def judge_pixel_sizes(table: ParticleTable, boxes: NDArray[np.int64], working_box: int) -> Iterator[Finding]:
    """Pixel sizes of several values, and whether the coarsest serves the working box; 0 is an unknown box."""
    sizes, counts = np.unique(table.pixel_size_in_angstroms, return_counts=True)
    if len(sizes) == 1:
        return
    listed = ", ".join(
        f"{size:g} Å ({said(int(count), 'row')})" for size, count in zip(sizes[:4], counts, strict=False)
    )
    several = f"{table.path}: {len(sizes)} pixel sizes: {listed}"
    main = np.flatnonzero(boxes > 0)
    if len(main) and working_box:
        kinds = np.stack([table.pixel_size_in_angstroms[main], boxes[main]], axis=1)
        values, numbers = np.unique(kinds, axis=0, return_counts=True)
        pixel_size, box = values[numbers.argmax()]
        possible = 2 * int(pixel_size * box / sizes[-1] / 2)
        if possible < working_box:
            words, rows = at_rows(table, np.flatnonzero(table.pixel_size_in_angstroms == sizes[-1]))
            message = (
                f"{several}; {words} with pixels of {sizes[-1]:g} Å are too coarse for {working_box} pixels in "
                f"{pixel_size * box:.0f} Å"
            )
            yield Finding("error", "pixel size", message, f"give finer images, or --box {possible}", rows)
            return
    if sizes[-1] > _SUSPICIOUS_RATIO * sizes[0]:
        yield Finding("warning", "pixel size", several, "see whether one of them is wrong, or of another binning")
    else:
        yield Finding("note", "pixel size", several, "nothing: they are brought to one extent")


def judge_origins(table: ParticleTable, boxes: NDArray[np.int64]) -> list[Finding]:
    """Shifts in the file that are too large for the box, or look like pixels taken for Å."""
    if table.poses is None:
        return []
    findings = []
    origins = table.poses.origins_in_angstroms
    extents = boxes * table.pixel_size_in_angstroms
    shifts = np.hypot(origins[:, 0], origins[:, 1])
    far = np.flatnonzero((extents > 0) & (shifts > _LARGEST_SHIFT_IN_BOXES * extents))
    if len(far):
        words, rows = at_rows(table, far)
        message = (
            f"{table.path}: shifts of {words} are up to {shifts[far].max():.0f} Å, "
            f"more than a quarter of the box of {extents[far].min():.0f} Å"
        )
        findings.append(Finding("warning", "origins", message, "extract again, centred on these shifts", rows))
    in_angstroms = table.star is not None and "rlnOriginXAngst" in table.star.columns
    whole = bool(origins.any()) and bool((origins == np.round(origins)).all())
    if in_angstroms and whole and (np.abs(table.pixel_size_in_angstroms - 1) > 0.05).any() and len(table) > 1:
        message = f"{table.path}: all origins are whole numbers of Å, as if they were pixels"
        fix = "multiply rlnOriginXAngst and rlnOriginYAngst by the pixel size, if they are pixels"
        findings.append(Finding("warning", "origins", message, fix))
    if not findings:
        largest = f"shifts in the file up to {shifts.max():.1f} Å; a run does not use them"
        findings = [Finding("ok", "origins", f"{table.path}: {largest}")]
    return findings


def judge_aberrations(table: ParticleTable) -> list[Finding]:
    """What the file says about the images and is left out of the calculation."""
    return [
        Finding("warning", "aberrations", f"{table.path}: {line}", "nothing, unless better than about 4 Å is expected")
        for line in table.ignored
    ]
