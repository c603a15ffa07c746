"""Two optics groups that differ in voltage, aberration, pixel size and box: each alone, and both together.

    python benchmarks/optics_groups.py OUT.json MAP [--n-particles 5000] [--flags ...]

Together they must be solved as well as either alone: the errors of the poses of each group are reported for both runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryoai.evaluation import PoseErrors, pose_errors
from cryoai.pose_files import read_poses
from provenance import provenance
from same_particles import columns_of, write_loops

# Of the same molecule; the extents differ too, 352 Å and 338 Å.
GROUPS = {
    "300 kV": {"--voltage": 300, "--spherical-aberration": 2.7, "--pixel-size": 5.5, "--box": 64, "--seed": 1},
    "200 kV": {"--voltage": 200, "--spherical-aberration": 1.4, "--pixel-size": 4.7, "--box": 72, "--seed": 2},
}


def cryoai(*arguments: object) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "cryoai", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def joined(folders: list[Path], path: Path) -> Path:
    """One STAR file of the particles of several, each in a group of its own."""
    optics: dict[str, list[str]] = {}
    particles: dict[str, list[str]] = {}
    for number, folder in enumerate(folders, 1):
        here, rows = columns_of(folder)
        here["rlnOpticsGroup"] = [str(number)]
        rows["rlnOpticsGroup"] = [str(number)] * len(rows["rlnImageName"])
        rows["rlnImageName"] = [name.replace("@", f"@{folder.name}/") for name in rows["rlnImageName"]]
        for table, more in ((optics, here), (particles, rows)):
            for name, cells in more.items():
                table.setdefault(name, []).extend(cells)
    return write_loops(path, {"optics": optics, "particles": particles})


def figures(errors: PoseErrors) -> dict[str, float]:
    return {
        "median_rotation_error_in_degrees": round(errors.median_rotation_error_in_degrees, 3),
        "within_5_degrees": round(errors.within_5_degrees, 4),
        "median_shift_error_in_angstroms": round(errors.median_shift_error_in_angstroms, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("map", type=Path)
    parser.add_argument("--n-particles", type=int, default=5000)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--shift-std", type=float, default=6.3)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="passed on to cryoai reconstruct")
    given = parser.parse_args()
    shared = ("--n-particles", given.n_particles, "--snr", given.snr, "--shift-std", given.shift_std)
    report: dict[str, object] = {**provenance(), "groups": GROUPS, "snr": given.snr, "flags": given.flags}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folders = []
        for group, options in GROUPS.items():
            folder = work / group.replace(" ", "")
            cryoai("simulate", given.map, folder, *shared, *(word for pair in options.items() for word in pair))
            seconds = cryoai("reconstruct", folder / "particles.star", folder / "run", *given.flags)
            errors = pose_errors(read_poses(folder / "run" / "particles.star"), read_poses(folder / "truth.star"))
            report[f"{group} alone"] = {"seconds": round(seconds, 1), **figures(errors)}
            folders.append(folder)
        seconds = cryoai("reconstruct", joined(folders, work / "both.star"), work / "run", *given.flags)
        found = read_poses(work / "run" / "particles.star")
        summary = json.loads((work / "run" / "summary.json").read_text())
        both = {"seconds": round(seconds, 1), "resolution_in_angstroms": summary["resolution_in_angstroms"]}
        for number, (group, folder) in enumerate(zip(GROUPS, folders, strict=True)):
            rows = slice(number * given.n_particles, (number + 1) * given.n_particles)
            both[group] = figures(pose_errors(found[rows], read_poses(folder / "truth.star")))
        report["both together"] = both
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
