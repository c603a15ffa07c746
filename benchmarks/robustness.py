"""Hard stacks: is a map found, and if not, does the program say so?

    python benchmarks/robustness.py OUT.json MAP --foreign OTHER_MAP --defocus-table TABLE [--conditions ...]

For every condition and seed a stack is simulated, reconstructed by the command that a user would type, and judged:
poses and map against the truth, which the run cannot see, the verdict and the resolution that the run reports, and
its seconds. The same command again does what is not yet in OUT.json. The conditions are in ``CONDITIONS``: all but
one thing as in ``reconstruction.py``. ``honest_fsc.py`` reads the same file.

Particles that are not of the molecule, noise or another one, are left out of the errors of the poses. If the run
gives each particle a confidence, the share of them is reported that falls below what 95 % of the others have.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import roma
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryoai.formats.mrc import read_map
from cryoai.poses import rotations_from_euler_angles
from cryoai.simulation import Microscope, simulate
from provenance import provenance

_CAP_IN_DEGREES = 25.0


@dataclass(frozen=True)
class Condition:
    """What is hard about a stack.

    Attributes
    ----------
    share_near_one_axis
        Of the particles, seen from within 25° of an axis; the others are seen from anywhere.
    share_noise, share_foreign
        Of the images, of nothing and of another molecule.
    defocus_error_in_angstroms
        Standard deviation of what the particle file says.
    """

    snr: float = 0.1
    shift_std_in_angstroms: float = 6.3
    share_near_one_axis: float = 0.0
    share_noise: float = 0.0
    share_foreign: float = 0.0
    defocus_error_in_angstroms: float = 0.0


CONDITIONS = {
    "snr_0.3": Condition(snr=0.3),
    "snr_0.1": Condition(),
    "snr_0.03": Condition(snr=0.03),
    "snr_0.01": Condition(snr=0.01),
    "preferred": Condition(share_near_one_axis=0.5),
    "noise_20": Condition(share_noise=0.2),
    "foreign_20": Condition(share_foreign=0.2),
    "shifts_15": Condition(shift_std_in_angstroms=15.0),
    "defocus_500": Condition(defocus_error_in_angstroms=500.0),
    "noise_only": Condition(share_noise=1.0),
}


@dataclass(frozen=True)
class Size:
    """Of all stacks."""

    n_particles: int
    n_pixels: int
    pixel_size_in_angstroms: float

    @property
    def extent_in_angstroms(self) -> float:
        return self.n_pixels * self.pixel_size_in_angstroms


@dataclass(frozen=True, eq=False)
class Made:
    """A stack: what the run is given, what it is not, and which particles (N,) are not of the molecule."""

    particles: Path
    truth: Path
    true_map: Path
    false: NDArray[np.bool_]


# ------------------------------------------------------------------------------ stacks


def make_stack(condition: Condition, seed: int, size: Size, given: argparse.Namespace, folder: Path) -> Made:
    """Simulate a stack in the folder: ``particles`` is for the run, ``hidden`` is not."""
    hidden, shown = folder / "hidden", folder / "particles"
    microscope = Microscope(defocus_table=None if given.defocus_table is None else np.load(given.defocus_table))

    def simulate_map(path: Path, out: Path) -> None:
        out.mkdir(parents=True)
        simulate(
            read_map(path),
            out,
            n_particles=size.n_particles,
            n_pixels=size.n_pixels,
            pixel_size_in_angstroms=size.pixel_size_in_angstroms,
            snr=condition.snr,
            seed=seed,
            microscope=microscope,
            shift_standard_deviation_in_angstroms=condition.shift_std_in_angstroms,
            rotations=rotations_near_one_axis(size.n_particles, condition.share_near_one_axis, seed),
        )

    generator = np.random.default_rng(seed)
    n_false = round((condition.share_noise + condition.share_foreign) * size.n_particles)
    false = generator.permutation(size.n_particles) < n_false
    simulate_map(given.map, hidden)
    if condition.share_noise:
        fill(hidden / "particles.mrcs", false, lambda shape: generator.standard_normal(shape, dtype=np.float32))
    if condition.share_foreign:
        # One seed gives the same optics, so that the rows of the particle file hold for either molecule.
        simulate_map(given.foreign, folder / "foreign")
        with mrcfile.mmap(folder / "foreign" / "particles.mrcs") as file:
            fill(hidden / "particles.mrcs", false, lambda _shape: file.data[false])
        shutil.rmtree(folder / "foreign")
    shown.mkdir()
    shutil.move(hidden / "particles.mrcs", shown / "particles.mrcs")
    errors = generator.normal(scale=condition.defocus_error_in_angstroms, size=size.n_particles)
    copy_rows(hidden / "particles.star", shown / "particles.star", shift={"rlnDefocusU": errors, "rlnDefocusV": errors})
    copy_rows(hidden / "truth.star", hidden / "true_particles.star", left_out=false)
    return Made(shown / "particles.star", hidden / "true_particles.star", hidden / "truth.mrc", false)


def rotations_near_one_axis(n: int, share: float, seed: int) -> Tensor | None:
    """Rotations (n, 3, 3) of which a share looks along directions within 25° of one; None for a share of 0."""
    if share == 0:
        return None
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    rotations = roma.random_rotmat(n, generator=generator)
    n_near = round(share * n)
    # Uniform on the cap about z, any angle in the plane, then turned with the cap.
    cosine = 1 - torch.rand(n_near, generator=generator) * (1 - np.cos(np.deg2rad(_CAP_IN_DEGREES)))
    about, within = (360 * torch.rand(n_near, generator=generator) for _ in range(2))
    angles = torch.stack([about, torch.rad2deg(torch.arccos(cosine)), within], dim=1)
    axis = roma.random_rotmat(generator=generator)
    rotations[:n_near] = axis @ rotations_from_euler_angles(angles)
    return rotations[torch.randperm(n, generator=generator)]


def fill(stack: Path, rows: NDArray[np.bool_], images: Callable[[tuple[int, ...]], NDArray[np.float32]]) -> None:
    """Put other images in some rows of a stack; they are asked for by their shape."""
    with mrcfile.mmap(stack, mode="r+") as file:
        file.data[rows] = images((int(rows.sum()), *file.data.shape[1:]))


def copy_rows(
    source: Path,
    target: Path,
    *,
    left_out: NDArray[np.bool_] | None = None,
    shift: dict[str, NDArray[np.float64]] | None = None,
) -> None:
    """Copy a STAR file of particles without some rows (N,), or with numbers (N,) added to columns."""
    places, n, lines = columns(source), 0, []
    for line in source.read_text().splitlines():
        if "@" not in line:
            lines.append(line)
            continue
        words = line.split()
        for name, added in (shift or {}).items():
            words[places[name]] = f"{float(words[places[name]]) + added[n]:.6f}"
        if left_out is None or not left_out[n]:
            lines.append(" ".join(words))
        n += 1
    target.write_text("\n".join(lines) + "\n")


def columns(path: Path) -> dict[str, int]:
    """Place in a row of each column of the particles of a STAR file."""
    found: dict[str, int] = {}
    for line in path.read_text().splitlines():
        if line.startswith("data_"):
            found = {}
        elif line.startswith("_"):
            found[line.split()[0][1:]] = len(found)
        elif "@" in line:
            break
    return found


# ------------------------------------------------------------------------------ runs


def run(made: Made, seed: int, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Reconstruct in a process of its own and judge what comes of it."""
    out = folder / "run"
    command = [sys.executable, "-m", "cryoai", "reconstruct", made.particles, out, "--seed", seed, *given.flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
    started = time.monotonic()
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=False)
    seconds = time.monotonic() - started
    last_words = ended.stderr.strip().splitlines()[-1:]
    if ended.returncode == 2:  # what was given is at fault, and no result of the program
        sys.exit(f"{made.particles}: refused: {last_words}")
    found: dict[str, Any] = {
        "seed": seed,
        "commit": provenance()["commit"],
        "seconds": round(seconds, 1),
        "exit_status": ended.returncode,
        "message": last_words[0].replace(str(folder), "") if ended.returncode and last_words else None,
    }
    if (out / "summary.json").is_file():
        found |= reported(json.loads((out / "summary.json").read_text()))
        if not made.false.all():
            found |= truth_about(out, made, environment)
        found["false_particles"] = caught(out / "particles.star", made.false)
    return found


def reported(summary: dict[str, Any]) -> dict[str, Any]:
    """What a run says of itself."""
    verdict = summary.get("verdict") or {}
    return {
        "verdict": verdict.get("status"),
        "reasons": verdict.get("reasons", []),
        "extent_in_angstroms": summary["box_in_pixels"] * summary["pixel_size_in_angstroms"],
        # None where it makes no claim; what the half maps agree to is then not one.
        "reported_resolution_in_angstroms": summary["resolution_in_angstroms"],
        "half_map_agreement_in_angstroms": summary["half_map_agreement_in_angstroms"],
    }


def truth_about(out: Path, made: Made, environment: dict[str, str]) -> dict[str, Any]:
    """Errors of poses and map, by ``cryoai evaluate``."""
    command = [sys.executable, "-m", "cryoai", "evaluate", out, "--truth", made.truth, "--map", made.true_map]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, env=environment)
    evaluation = json.loads((out / "evaluation.json").read_text())
    errors = {key: round(x, 4) if isinstance(x, float) else x for key, x in evaluation["poses"].items()}
    # Like with like: the run reports what its half maps have in common within its mask.
    within_mask = evaluation.get("map_within_mask", evaluation["map"])
    return {
        "poses": errors,
        "true_resolution_in_angstroms": within_mask["resolution_at_fsc_0.5"],
        "true_resolution_in_sphere_in_angstroms": evaluation["map"]["resolution_at_fsc_0.5"],
    }


def caught(particles: Path, false: NDArray[np.bool_]) -> dict[str, Any] | None:
    """Which share of the particles that are not of the molecule has less confidence than 95 % of the others."""
    place = columns(particles).get("rlnParticleFigureOfMerit")
    if place is None or not 0 < false.sum() < len(false):
        return None
    merit = np.array([float(line.split()[place]) for line in particles.read_text().splitlines() if "@" in line])
    least = float(np.quantile(merit[~false], 0.05))
    share = float((merit[false] < least).mean())
    return {"n": int(false.sum()), "confidence_of_95_percent_of_the_others": round(least, 5), "caught": round(share, 4)}


# ------------------------------------------------------------------------------ command


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("map", type=Path)
    parser.add_argument("--foreign", type=Path, help="map of the other molecule; for foreign_20")
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--n-particles", type=int, default=10_000)
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--pixel-size", type=float, default=5.5)
    parser.add_argument("--defocus-table", type=Path)
    parser.add_argument("--keep", type=Path, help="folder where stacks and runs are kept; default: none are")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="passed on to cryoai reconstruct")
    given = parser.parse_args()
    if "foreign_20" in given.conditions and given.foreign is None:
        parser.error("foreign_20 needs the map of another molecule; give it with --foreign, or other --conditions")
    return given


def opened(given: argparse.Namespace) -> dict[str, Any]:
    """The report so far, or a new one; of other settings it must not be."""
    names = ("n_particles", "box", "pixel_size", "threads", "flags")
    settings = {name: getattr(given, name) for name in names}
    for name in ("map", "foreign", "defocus_table"):
        path: Path | None = getattr(given, name)
        settings[name] = None if path is None else path.name
    if not given.out.is_file():
        return {**provenance(), "settings": settings, "runs": {}}
    report: dict[str, Any] = json.loads(given.out.read_text())
    different = [name for name, value in settings.items() if report["settings"].get(name) != value]
    if different:
        sys.exit(f"{given.out}: was made with another {', '.join(different)}; give another file, or the same settings")
    return report


def main() -> None:
    given = parsed()
    # So that what it runs ends with it, and the scratch folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    report = opened(given)
    size = Size(given.n_particles, given.box, given.pixel_size)
    torch.set_num_threads(given.threads)
    # Seed by seed, so that an interrupted benchmark has something of every condition.
    for seed in given.seeds:
        for name in given.conditions:
            runs = report["runs"].setdefault(name, [])
            if any(found["seed"] == seed for found in runs):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) if given.keep is None else given.keep / f"{name}_{seed}"
                if given.keep is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                found = run(make_stack(CONDITIONS[name], seed, size, given, folder), seed, given, folder)
            runs.append(found)
            given.out.write_text(json.dumps(report, indent=1) + "\n")
            print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
