"""Runs that are killed at random moments, and on whose disk things go wrong: do all come to the same end?

    python benchmarks/chaos.py OUT.json [--runs 40] [--disk-full 10] [--damaged 10] [--vanished 5] [--seed 0]

One small run is made without disturbance. Then, each in a folder of its own:

- **killed**: SIGKILL at random moments, again and again, and ``cryoai resume`` until it is done.
- **disk full**: on a file system (tmpfs, which needs the right to mount) that is filled at a random moment; it is to
  end with status 1 and one line; after room is made, it is resumed.
- **damaged**: killed, then the newest checkpoint is cut at a random length, and the run resumed.
- **vanished**: the image stack is moved away at a random moment; if the run ends it is to be with one line; the stack
  is put back, and the run resumed.

All are to end with the maps and poses of the undisturbed run, bit for bit (CPU, one thread).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoai.simulation import protein_like_phantom, simulate
from cryoai.training.settings import Settings
from provenance import provenance

COMPARED = ("particles.star", "map.mrc", "half_map_1.mrc", "half_map_2.mrc", "fsc.csv", "encoder.safetensors")
MOST_KILLS = 5
SMALL = {
    "device": "cpu",
    "max_particles": 400,
    "checkpoint_seconds": 0.1,
    "bootstrap": {"n_steps": 20, "batch_size": 50, "n_rotations": 1152, "n_starts": 2, "max_starts": 2},
    "amortized": {
        "n_steps": 60,
        "n_fit_steps": 20,
        "wake_batch_size": 16,
        "sleep_batch_size": 64,
        "encoder_width": 8,
        "n_hypotheses": 4,
        "volume_width": 64,
    },
    "placement": {"n_rotations": 1152},
    "refinement": {"max_rounds": 3},
}


@dataclass
class Outcome:
    """What became of a disturbed run: its words at the end of each process, and whether it is as it should be."""

    disturbance: str
    n_processes: int = 0
    stopped_in: list[str] = field(default_factory=list)
    last_words: list[str] = field(default_factory=list)
    is_equal: bool = False


class Runner:
    """Begins and resumes one run in processes of one thread."""

    def __init__(self, particles: Path, folder: Path, kind: str) -> None:
        self.particles = particles
        self.folder = folder
        self.run = folder / "run"
        self.outcome = Outcome(kind)

    def begin(self) -> subprocess.Popen[str]:
        """The next process: of a new run, or of one that is there."""
        arguments = ["resume", self.run] if (self.run / "origin.json").is_file() else None
        if arguments is None:
            shutil.rmtree(self.run, ignore_errors=True)
            settings = self.folder / "settings.toml"
            settings.write_text(Settings.assemble("auto", None, SMALL).to_toml())
            arguments = ["reconstruct", self.particles, self.run, "--settings", settings]
        self.outcome.n_processes += 1
        return subprocess.Popen(
            [sys.executable, "-m", "cryoai", *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill_after(self, seconds: float) -> bool:
        """Begin a process and kill it; whether it came to its end before."""
        process = self.begin()
        try:
            self.end_of(process, seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self.outcome.stopped_in.append(self.stage())
            return False
        return True

    def end_of(self, process: subprocess.Popen[str], limit: float | None = None) -> int:
        """Wait for a process; its exit status."""
        _, said = process.communicate(timeout=limit)
        self.outcome.last_words += [line.replace(str(self.folder), "") for line in said.strip().splitlines()]
        return process.returncode

    def finish(self) -> None:
        """Resume until it is done."""
        for _ in range(MOST_KILLS):
            if (self.run / "summary.json").is_file():
                return
            self.end_of(self.begin())

    def stage(self) -> str:
        """The stage that the run is in, by its metrics."""
        metrics = self.run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        whole = [line for line in lines if line.endswith("}")]
        return str(json.loads(whole[-1])["stage"]) if whole else "beginning"


def killed(runner: Runner, random_time: Callable[[], float]) -> None:
    for _ in range(MOST_KILLS):
        if runner.kill_after(random_time()):
            return
    runner.finish()


def damaged(runner: Runner, random_time: Callable[[], float]) -> None:
    while not list((runner.run / "checkpoints").glob("checkpoint_*")):
        shutil.rmtree(runner.run, ignore_errors=True)
        if runner.kill_after(random_time()):
            shutil.rmtree(runner.run)
    newest = max((runner.run / "checkpoints").glob("checkpoint_*"))
    content = newest.read_bytes()
    newest.write_bytes(content[: int(random.random() * len(content))])
    runner.finish()


def vanished(runner: Runner, random_time: Callable[[], float]) -> None:
    stack = runner.folder / "particles" / "particles.mrcs"
    process = runner.begin()
    try:
        runner.end_of(process, random_time())
    except subprocess.TimeoutExpired:
        stack.rename(stack.with_suffix(".away"))
        runner.outcome.stopped_in.append(runner.stage())
        runner.end_of(process)
        stack.with_suffix(".away").rename(stack)
    runner.finish()


def disk_full(runner: Runner, random_time: Callable[[], float]) -> None:
    process, ballast = runner.begin(), runner.folder / "ballast"
    try:
        runner.end_of(process, random_time())
    except subprocess.TimeoutExpired:
        runner.outcome.stopped_in.append(runner.stage())
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(65536)):
                pass
        runner.end_of(process)
        ballast.unlink(missing_ok=True)
    runner.finish()


DISTURBANCES: dict[str, Callable[[Runner, Callable[[], float]], None]] = {
    "killed": killed,
    "disk full": disk_full,
    "damaged": damaged,
    "vanished": vanished,
}


def disturbed(kind: str, particles: Path, folder: Path, whole: Path, random_time: Callable[[], float]) -> Outcome:
    """One run, disturbed in one way, and compared with the undisturbed one."""
    folder.mkdir()
    if kind == "disk full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], check=True)
    try:
        shutil.copytree(particles.parent, folder / "particles")
        runner = Runner(folder / "particles" / particles.name, folder, kind)
        DISTURBANCES[kind](runner, random_time)
        runner.outcome.is_equal = all(content(runner.run / name) == content(whole / name) for name in COMPARED)
        return runner.outcome
    finally:
        if kind == "disk full":
            subprocess.run(["umount", "-l", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def content(path: Path) -> bytes:
    """Of a file; of a map without its header, which holds the time."""
    return path.read_bytes()[1024 if path.suffix == ".mrc" else 0 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--disk-full", type=int, default=10)
    parser.add_argument("--damaged", type=int, default=10)
    parser.add_argument("--vanished", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    counts = {"killed": given.runs, "disk full": given.disk_full, "damaged": given.damaged, "vanished": given.vanished}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options = {"n_pixels": 32, "pixel_size_in_angstroms": 7.0, "shift_standard_deviation_in_angstroms": 5.0}
        (folder / "particles").mkdir()
        particles = simulate(
            protein_like_phantom(0), folder / "particles", n_particles=1000, snr=1.0, seed=0, **options
        ).particles
        runner = Runner(particles, folder, "none")
        started = time.monotonic()
        runner.finish()
        seconds = time.monotonic() - started
        report: dict[str, Any] = {**provenance(), "seconds_undisturbed": round(seconds, 1), "seed": given.seed}
        outcomes: list[Outcome] = []
        for kind, n in counts.items():
            for number in range(n):
                name = f"{kind.replace(' ', '_')}_{number}"
                try:
                    found = disturbed(
                        kind, particles, folder / name, runner.run, lambda: random.uniform(0, 1.1 * seconds)
                    )
                except subprocess.CalledProcessError as error:
                    report[f"not run: {kind}"] = str(error).replace(scratch, "")
                    break
                outcomes.append(found)
                print(found, flush=True)
                report["outcomes"] = [vars(outcome) for outcome in outcomes]
                report["equal"] = f"{sum(outcome.is_equal for outcome in outcomes)} of {len(outcomes)}"
                given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(report["equal"])


if __name__ == "__main__":
    main()
