"""What each part of the method is worth: the preset `paper` with one part changed at a time.

    python benchmarks/ablations.py OUT.json STACK... [--seeds 0 1 2] [--variants ...] [--flags ...]

A STACK is a folder made by ``cryoai simulate``. Every variant is trained from scratch from every seed, and the
encoder's own poses, before any refinement, are compared with the truth. OUT.json is written after every
run and taken up again, so that an interrupted benchmark goes on where it was; the table, in Markdown,
is printed at the end.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import provenance

CONVOLUTIONAL = ("--amortized.encoder", "convolutional", "--amortized.encoder-width", "16")
VARIANTS: dict[str, tuple[str, ...]] = {
    "paper: polar encoder, 16 turns": (),
    "4 turns": ("--amortized.n-hypotheses", "4"),
    "published encoder, 1 head, half turn": (
        *CONVOLUTIONAL, "--amortized.n-hypotheses", "1", "--amortized.symmetrization", "half-turn",
    ),
    "published encoder, 1 head, plain loss": (*CONVOLUTIONAL, "--amortized.n-hypotheses", "1"),
    "published encoder, 8 heads, half turn": (
        *CONVOLUTIONAL, "--amortized.n-hypotheses", "8", "--amortized.symmetrization", "half-turn",
    ),
    "sleep": ("--amortized.sleep-batch-size", "64"),
    "no marching": ("--amortized.first-radius", "12"),
    "voxels": ("--amortized.volume", "voxels", "--amortized.volume-learning-rate", "1e-2"),
    "plain input": ("--amortized.encoder-input", "plain"),
}  # fmt: skip


def cryoai(*arguments: object) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "cryoai", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def measure(stack: Path, variant: str, seed: int, flags: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        chosen = ("--preset", "paper", *VARIANTS[variant], *flags)
        seconds = cryoai("reconstruct", stack / "particles.star", run, "--seed", seed, *chosen)
        cryoai("evaluate", run, "--truth", stack / "truth.star")
        poses = json.loads((run / "evaluation.json").read_text())["encoder_poses"]
        found = {
            "median_in_degrees": round(poses["median_rotation_error_in_degrees"], 2),
            "within_10_degrees": round(poses["within_10_degrees"], 4),
            "seconds": round(seconds, 1),
            "seconds_of_training": json.loads((run / "summary.json").read_text())["seconds_per_stage"]["amortized"],
        }
    print(stack.name, variant, seed, found, flush=True)
    return found


def table(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Median and range over the seeds, variants in rows and stacks in columns."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for variant in next(iter(results.values())):
        cells = []
        for of_stack in results.values():
            values = sorted(found["median_in_degrees"] for found in of_stack.get(variant, {}).values())
            middle = f"{statistics.median(values):.1f}° ({values[0]:.1f}–{values[-1]:.1f})" if values else "–"
            cells.append(middle)
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stacks", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="passed on to cryoai reconstruct")
    given = parser.parse_args()
    report = {
        **provenance(),
        "settings": {"flags": given.flags},
        "results": json.loads(given.out.read_text())["results"] if given.out.is_file() else {},
    }
    for variant in given.variants:
        for seed in given.seeds:
            for stack in given.stacks:
                found = report["results"].setdefault(stack.name, {}).setdefault(variant, {})
                if str(seed) not in found:
                    found[str(seed)] = measure(stack, variant, seed, given.flags)
                    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["results"]))


if __name__ == "__main__":
    main()
