"""Time and memory against the number of particles.

    python benchmarks/scaling.py OUT.json STACK [--numbers 10000 100000 1000000] [--max-particles 10000]

STACK is a folder made by ``cryoai simulate``. Larger stacks are made by links: the rows of its STAR file are
repeated, the image file is the same. Each number is reconstructed with map and encoder made from at
most --max-particles; the others are posed in the final pass (stage completion). ``infer`` then poses all
of them with the encoder of the first run. The peak is that of the process's resident memory, and is also
given without what the STAR table alone takes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import provenance


def repeated(stack: Path, n: int, folder: Path) -> Path:
    """A folder like STACK with ``n`` particles."""
    folder.mkdir()
    (folder / "particles.mrcs").symlink_to((stack / "particles.mrcs").resolve())
    lines = (stack / "particles.star").read_text().splitlines()
    rows = [line for line in lines if "@" in line]
    first = lines.index(rows[0])
    with (folder / "particles.star").open("w") as file:
        file.write("\n".join(lines[:first]) + "\n")
        file.writelines(rows[i % len(rows)] + "\n" for i in range(n))
    return folder / "particles.star"


def child(code: str, *arguments: object) -> tuple[float, int]:
    """Run Python code in a process of its own; its seconds and its peak of resident memory in bytes."""
    measured = code + "\nimport resource; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", measured, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    peak = int(done.stdout.rsplit("peak", 1)[1])
    return time.monotonic() - started, 1024 * peak


READ = "import sys; from cryoai.formats.star import read_star; from pathlib import Path; import cryoai\n"
READ += "table = read_star(Path(sys.argv[1]))"
RUN = "import sys; from cryoai.cli import main; assert main(sys.argv[1:]) == 0"


def measure(
    star: Path, n: int, given: argparse.Namespace, scratch: Path, encoder_run: Path | None
) -> dict[str, object]:
    _, table = child(READ, star)
    report: dict[str, object] = {"n": n, "peak_of_reading_the_table_in_megabytes": table >> 20}
    if n <= given.reconstruct_up_to:
        run = scratch / f"run_{n}"
        flags = ["--max-particles", given.max_particles, *given.flags]
        seconds, peak = child(RUN, "reconstruct", star, run, *flags)
        summary = json.loads((run / "summary.json").read_text())
        stages = summary["seconds_per_stage"]
        report["reconstruct"] = {
            "seconds": round(seconds, 1),
            "seconds_of_all_but_the_final_pass": round(sum(v for k, v in stages.items() if k != "completion"), 1),
            "seconds_per_stage": stages,
            "peak_in_megabytes": peak >> 20,
        }
        encoder_run = encoder_run or run
    assert encoder_run is not None
    seconds, peak = child(RUN, "infer", encoder_run, star, scratch / f"out_{n}.star")
    report["infer"] = {"seconds": round(seconds, 1), "peak_in_megabytes": peak >> 20}
    print(json.dumps(report), flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stack", type=Path)
    parser.add_argument("--numbers", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--max-particles", type=int, default=10_000)
    parser.add_argument("--reconstruct-up-to", type=int, default=1_000_000, help="larger stacks are only inferred")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="passed on to cryoai reconstruct")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch, points = Path(name), []
        for n in given.numbers:
            star = repeated(given.stack, n, scratch / f"stack_{n}")
            encoder_run = scratch / f"run_{given.numbers[0]}" if points else None
            points.append(measure(star, n, given, scratch, encoder_run))
    report = {
        **provenance(),
        "peak_of_this_process_in_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "settings": {k: str(v) for k, v in vars(given).items() if k not in ("out", "stack")},
        "points": points,
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
