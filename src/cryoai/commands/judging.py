"""evaluate, info: how good it is, and what there is."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from cryoai import __version__
from cryoai.alignment import FrameChange
from cryoai.comparison import compare_poses
from cryoai.evaluation import PoseErrors, map_errors
from cryoai.formats.mrc import read_map
from cryoai.hardware import choose_device, matrix_dtype
from cryoai.runs import RunFolder, finite_or_none
from cryoai.simulation import resample_map

__all__ = ["evaluate", "evaluate_run", "info"]


def evaluate(
    run_dir: Path,
    *,
    truth: Path,
    true_map: Annotated[Path | None, Parameter(name="--map")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Compare the poses and the map of a run with the truth, up to rotation, shift, hand, and the symmetry of the run.

    Also written to evaluation.json in the run folder.

    Parameters
    ----------
    truth
        File with the true poses; particles are matched by the names of their images.
    true_map
        True map; any box and pixel size.
    as_json
        Print JSON in place of a table.
    """
    evaluate_run(RunFolder.open(run_dir), truth, true_map, as_json=as_json)


def info() -> None:
    """Say what this machine offers and which versions are installed."""
    device = choose_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"cryoai   {__version__}")
    print(f"device   {device} ({name}), {torch.get_num_threads()} threads, networks in {matrix_dtype(device)}")
    print(f"python   {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "numpy", "scipy", "mrcfile", "roma", "torch-ctf", "finufft"):
        print(f"{package:<8} {version(package)}")


def evaluate_run(run: RunFolder, truth: Path, true_map: Path | None, *, as_json: bool = False) -> None:
    """Compare a run with the truth; print it and write it to the run folder."""
    final = compare_poses(run.particles, truth, run.symmetry).errors
    report: dict[str, Any] = {"poses": _numbers(final)}
    rows = [("final poses", final)]
    if run.encoder_particles.is_file():
        encoder = compare_poses(run.encoder_particles, truth, run.symmetry).errors
        report["encoder_poses"] = _numbers(encoder)
        rows.append(("encoder's own", encoder))
    if true_map is not None:
        report["map"] = _map_report(run, true_map, final.frame, None)
        if run.mask.is_file():
            mask = torch.from_numpy(read_map(run.mask).density)
            report["map_within_mask"] = _map_report(run, true_map, final.frame, mask)
    run.write_json(run.evaluation, report)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(f"\n{'':<14} {'median':>8} {'< 5°':>7} {'< 10°':>7} {'shift':>8}")
    for label, e in rows:
        print(
            f"{label:<14} {e.median_rotation_error_in_degrees:7.2f}° {e.within_5_degrees:7.1%} "
            f"{e.within_10_degrees:7.1%} {e.median_shift_error_in_angstroms:6.2f} Å"
        )
    print(f"hand: {'mirrored (images alone cannot tell)' if final.mirrored else 'as in the truth'}")
    for name, where in (("map", "a soft sphere"), ("map_within_mask", "the mask of the run")):
        if name in report:
            at = [report[name][f"resolution_at_fsc_{threshold}"] for threshold in ("0.5", "0.143")]
            half, low = ("no shell" if period is None else f"{period:.1f} Å" for period in at)
            print(f"map against truth within {where}: FSC 0.5 at {half}, 0.143 at {low}")


def _numbers(errors: PoseErrors) -> dict[str, float | bool]:
    return {k: v for k, v in asdict(errors).items() if k != "frame"}


def _map_report(run: RunFolder, true_map: Path, frame: FrameChange, mask: torch.Tensor | None) -> dict[str, Any]:
    found, truth = read_map(run.map), read_map(true_map)
    n, pixel_size = found.density.shape[0], found.pixel_size_in_angstroms
    if truth.density.shape[0] != n or abs(truth.pixel_size_in_angstroms - pixel_size) > 1e-3 * pixel_size:
        truth = resample_map(truth, n, pixel_size)
    errors = map_errors(torch.from_numpy(found.density), torch.from_numpy(truth.density), pixel_size, frame, mask)
    return {
        "resolution_at_fsc_0.5": finite_or_none(errors.resolution_at_half_in_angstroms),
        "resolution_at_fsc_0.143": finite_or_none(errors.resolution_at_0143_in_angstroms),
        "nyquist_in_angstroms": 2 * pixel_size,
        "fsc": [round(float(value), 5) for value in errors.fsc],
    }
