"""Quality and time of whole runs: simulated particles of known maps, several seeds, default settings.

    python benchmarks/reconstruction.py OUT.json MAP... [--seeds 0 1 2 3 4] [--snr 0.1] [--n-particles 10000]

For every map a stack is simulated once and reconstructed from every seed by the commands that a user
would type. The result file holds every figure with commit, hardware and settings.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from provenance import provenance


def cryoai(*arguments: object) -> float:
    """Run a command; the seconds that it took."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "cryoai", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def measure(particles: Path, truth: Path, true_map: Path, seed: int, run: Path, flags: list[str]) -> dict[str, object]:
    seconds = cryoai("reconstruct", particles, run, "--seed", seed, *flags)
    cryoai("evaluate", run, "--truth", truth, "--map", true_map)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["map"].pop("fsc")
    summary = json.loads((run / "summary.json").read_text())
    kept = (
        "resolution_in_angstroms",
        "start_agreement",
        "pose_sources",
        "seconds_per_stage",
        "peak_memory_in_megabytes",
    )
    return {"seed": seed, "seconds": round(seconds, 1), **evaluation, **{key: summary[key] for key in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("maps", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--n-particles", type=int, default=10_000)
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--pixel-size", type=float, default=5.5)
    parser.add_argument("--shift-std", type=float, default=6.3)
    parser.add_argument("--defocus-table", type=Path)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="passed on to cryoai reconstruct")
    given = parser.parse_args()

    report: dict[str, object] = {
        **provenance("cuda" if torch.cuda.is_available() else "cpu"),
        "settings": {
            k: v.name if isinstance(v, Path) else str(v) for k, v in vars(given).items() if k not in ("out", "maps")
        },
    }
    for source in given.maps:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            table = [] if given.defocus_table is None else ["--defocus-table", given.defocus_table]
            sizes = ["--n-particles", given.n_particles, "--box", given.box, "--pixel-size", given.pixel_size]
            cryoai("simulate", source, data, *sizes, "--snr", given.snr, "--shift-std", given.shift_std, *table)
            results = []
            for seed in given.seeds:
                run = Path(folder) / f"run{seed}"
                files = (data / "particles.star", data / "truth.star", data / "truth.mrc")
                results.append(measure(*files, seed, run, given.flags))
                report[source.stem] = results
                # After every run, so that an interrupted benchmark keeps what it has.
                given.out.write_text(json.dumps(report, indent=1) + "\n")
                print(source.stem, json.dumps(results[-1]["poses"]), results[-1]["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
