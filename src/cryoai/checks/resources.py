"""What a run on these particles will take of this machine: disk, memory, time."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from cryoai.checks.findings import Finding, said
from cryoai.fourier import FourierDisc

__all__ = ["Need", "estimate_need", "judge_need"]

# Measured on one core of a machine of 2026, see benchmarks/results (ribosomes_and_cand1_cpu, scaling_cpu), at
# a working box of 64 pixels: what does not depend on the particles, and for each particle that the map is
# made from or that is posed afterwards.
_FIXED_SECONDS = 220.0
_SECONDS_OF_A_PARTICLE = 9.5e-3
_SECONDS_OF_A_LATER_PARTICLE = 3.8e-3
_BOX_OF_THE_MEASUREMENT = 64
_FIXED_BYTES = 1.0e9
_BYTES_OF_A_PARTICLE = 5e3
# Sums, half maps and oversampled transforms.
_BYTES_OF_A_VOXEL = 400
_BYTES_OF_A_COEFFICIENT = 4
_MAPS = 5


@dataclass(frozen=True)
class Need:
    """What a run will need: space for its folder while it runs, memory, and time on this many cores."""

    folder_in_bytes: int
    scratch_in_bytes: int
    memory_in_bytes: int
    seconds: int
    n_cores: int


def estimate_need(n_particles: int, working_box: int, max_particles: int, cache: Path | None = None) -> Need:
    """Roughly: the space of prepared images is exact, the other two follow measured runs.

    Time is ``220 s + (9.5 ms a particle that the map is made from + 3.8 ms a particle beyond max_particles)
    (box / 64)^2`` on one core, and is taken to be inverse to the number of cores. Memory is
    ``1 GB + 5 kB a particle + 400 B (box^3 - 64^3)``. With a ``cache`` the images that the map is made from are there,
    perhaps already, and not in the folder of the run.
    """
    first = min(n_particles, max_particles)
    later = n_particles - first
    coefficients = FourierDisc.of_box(working_box).n_coefficients()
    # Particles beyond the first come in blocks as large as the first.
    n_stored = min(later, max_particles) + (first if cache is None else 0)
    scratch = _BYTES_OF_A_COEFFICIENT * coefficients * n_stored
    voxels = working_box**3
    by_particle = _SECONDS_OF_A_PARTICLE * first + _SECONDS_OF_A_LATER_PARTICLE * later
    n_cores = torch.get_num_threads()
    seconds = _FIXED_SECONDS + by_particle * (working_box / _BOX_OF_THE_MEASUREMENT) ** 2
    surplus = max(0, voxels - _BOX_OF_THE_MEASUREMENT**3)
    return Need(
        folder_in_bytes=scratch + _MAPS * 4 * voxels,
        scratch_in_bytes=scratch,
        memory_in_bytes=int(_FIXED_BYTES + _BYTES_OF_A_PARTICLE * n_particles + _BYTES_OF_A_VOXEL * surplus),
        seconds=round(seconds / n_cores),
        n_cores=n_cores,
    )


def judge_need(need: Need, run_dir: Path, working_box: int) -> list[Finding]:
    """The needs of a run that writes to ``run_dir`` against what there is."""
    place = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    message = f"a run at a working box of {working_box} px needs {_size(need.folder_in_bytes)} of disk"
    if need.folder_in_bytes > free:
        fix = "write the run to another disk, or give a smaller --box or --max-particles"
        disk = Finding("error", "disk", f"{message}; {place} has {_size(free)} free", fix)
    else:
        disk = Finding("ok", "disk", f"{message}; {_size(free)} are free in {place}")
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    message = f"about {_size(need.memory_in_bytes)} needed of {_size(installed)}"
    memory = Finding("ok", "memory", message)
    if need.memory_in_bytes > installed:
        memory = Finding("warning", "memory", message, "give a smaller --box, or use a larger machine")
    time = f"very roughly {_duration(need.seconds)} on {said(need.n_cores, 'core')} without a GPU"
    return [disk, memory, Finding("ok", "time", time)]


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 36000 else f"{round(seconds / 3600)} hours"
