"""The same stack through cryoai, RELION and cryoDRGN: time, poses and map, each by the same clock and judge.

    python benchmarks/peers.py OUT_DIR STACK.star TRUTH.star TRUTH.mrc [--max-minutes M] [--threads N]

The stages are ``cryoai`` (reconstruct), ``relion-start`` (an initial model by stochastic gradient descent),
``relion-refine`` (auto-refinement, from RELION's own initial model if that is done, else from our map) and
``cryodrgn`` (abinit). Each may use N threads and M minutes. What is not done by then is stopped and reported as a
lower bound, with an extrapolation by its own rate, and its last map and poses are judged. The same command again
goes on where it was, with more minutes; all is kept in OUT_DIR. Nothing else should run on the machine meanwhile;
seconds of processor time are given too, which suffer less where it does. RELION is that of Debian (``relion``);
cryoDRGN is to have an environment of its own, with PyTorch for the CPU installed first.

``--result`` names the file of the results, of which ``page.py`` makes docs/benchmarks.md.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryoai.alignment import FrameChange
from cryoai.comparison import AlignedMaps, compare, compare_maps
from cryoai.errors import InputError
from cryoai.evaluation import PoseErrors
from cryoai.formats.mrc import read_map
from cryoai.particle_stack import ParticleStack
from cryoai.runs import finite_or_none
from peer_programs import CryoaiRun, CryodrgnRun, Program, RelionRefinement, RelionStart, Task
from provenance import provenance
from watched import Timetable, run_watched

STAGES = ("cryoai", "relion-start", "relion-refine", "cryodrgn")
# The radius of the mask that cryoDRGN puts on the images, as a share of half the box; RELION gets the same.
MASK = 0.85


def program_of(stage: str, task: Task, given: argparse.Namespace) -> Program | str:
    """The program of a stage, or why it cannot run."""
    folder = given.out / stage
    if stage == "cryoai":
        return CryoaiRun(task, folder)
    if stage == "cryodrgn":
        if shutil.which(given.cryodrgn) is None:
            return f"no program {given.cryodrgn}; give cryoDRGN's with --cryodrgn"
        return CryodrgnRun(task, folder, given.cryodrgn)
    for program in ("refine", "refine_mpi"):
        if shutil.which(given.relion_prefix + program) is None:
            return f"no program {given.relion_prefix}{program}; give the start of its path with --relion-prefix"
    start = RelionStart(task, given.out / "relion-start", given.relion_prefix)
    if stage == "relion-start":
        return start
    references = [CryoaiRun(task, given.out / "cryoai").map()]
    if Timetable.read(start.folder / "times.json").finished:
        references.insert(0, start.map())
    for reference in references:
        if reference is not None:
            return RelionRefinement(task, folder, given.relion_prefix, given.mpirun, reference)
    return "no map to start from; let cryoai or relion-start come to an end first"


def run(program: Program, limit_in_seconds: float) -> tuple[Timetable, str | None]:
    """Start a program or go on with it, unless it is done or its time is up; its times, and how it failed."""
    program.folder.mkdir(parents=True, exist_ok=True)
    times = program.folder / "times.json"
    timetable = Timetable.read(times)
    if timetable.finished or timetable.seconds >= limit_in_seconds:
        return timetable, None
    timetable.rewind(program.checkpoint())
    program.prepare()
    command = program.command()
    if not program.checkpoint():
        # Files by their names alone.
        words = [Path(word).name if word.startswith("/") else word for word in command]
        (program.folder / "command.txt").write_text(shlex.join(words) + "\n")
    log = program.folder / f"log_{len(list(program.folder.glob('log_*.txt'))) + 1}.txt"
    status = run_watched(
        command,
        timetable,
        times,
        place=lambda: program.place(log),
        ended_well=program.ended_well,
        stop_file=program.stop_file,
        limit_in_seconds=limit_in_seconds,
        cwd=program.task.stack.parent,
        environment=program.environment,
        log=log,
    )
    failed = status is not None and not timetable.finished
    return timetable, f"exit status {status}, see {log.name}" if failed else None


# ------------------------------------------------------------------------------ judging


def judged(program: Program, truth: Path, true_map: Path, extent_in_angstroms: float) -> dict[str, Any]:
    """Errors of the last poses and the last map of a program, as far as there are any."""
    errors = None
    poses, density = program.poses(), program.map()
    found: dict[str, Any] = {"poses": None, "map": None}
    if poses is not None:
        try:
            comparison = compare(poses, truth, extent_in_angstroms=extent_in_angstroms).poses
        except InputError as error:
            found["poses_refused"] = str(error).replace(str(poses), poses.name)
        else:
            assert comparison is not None
            errors = comparison.errors
            found["poses"] = rounded(errors)
    if density is not None:
        found["map"] = map_figures(density, true_map, errors)
    return found


def rounded(errors: PoseErrors) -> dict[str, Any]:
    found = {key: value for key, value in asdict(errors).items() if key != "frame"}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def map_figures(density: Path, true_map: Path, errors: PoseErrors | None) -> dict[str, Any]:
    """Agreement with the true map in the frame in which it is better: that of the poses, or that of the maps."""
    maps = read_map(density), read_map(true_map)
    if not np.ptp(maps[0].density) > 0:
        return {"file": density.name, "refused": "all its voxels are the same"}
    frames: dict[str, FrameChange | None] = {"maps": None}
    if errors is not None and errors.within_10_degrees > 0.5:
        frames["poses"] = errors.frame
    best: dict[str, AlignedMaps] = {name: compare_maps(*maps, frame).best for name, frame in frames.items()}
    name = max(best, key=lambda name: float(best[name].errors.fsc.sum()))
    found = best[name].errors
    return {
        "file": density.name,
        "frame_of": name,
        "resolution_at_fsc_0.5": finite_or_none(found.resolution_at_half_in_angstroms),
        "resolution_at_fsc_0.143": finite_or_none(found.resolution_at_0143_in_angstroms),
        "correlation": round(best[name].correlation, 4),
        "fsc": [round(float(value), 4) for value in found.fsc],
    }


def figures(program: Program, timetable: Timetable) -> dict[str, Any]:
    """How far a program came in which time, and in which it would all."""
    phases = program.phases
    n_steps = sum(len(phase.images_of_steps) for phase in phases)
    total = timetable.extrapolated_seconds(phases)
    return {
        "program": program.version(),
        "start": program.start,
        "command": (program.folder / "command.txt").read_text().strip(),
        "finished": timetable.finished,
        "seconds": round(timetable.seconds, 1),
        "cpu_seconds": round(timetable.cpu_seconds, 1),
        "steps_done": round(timetable.place, 3),
        "n_steps": n_steps or None,
        "seconds_per_image": {name: round(x, 5) for name, x in timetable.seconds_per_image(phases).items()},
        "extrapolated_seconds": None if timetable.finished or total is None else round(total),
        "seconds_of_steps": [round(step.seconds, 1) for step in timetable.steps],
    }


# ------------------------------------------------------------------------------ command


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for all that the programs write")
    parser.add_argument("stack", type=Path, help="STAR file without poses, its stack beside it")
    parser.add_argument("truth", type=Path, help="STAR file of the same particles with their true poses")
    parser.add_argument("true_map", type=Path)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="of each stage, over all its runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mask-diameter", type=float, help=f"in Å, for RELION; default: {MASK} of the box")
    parser.add_argument("--relion-prefix", default="relion_", help="start of the names of RELION's programs")
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--cryodrgn", default="cryodrgn", help="path of cryoDRGN's program")
    parser.add_argument("--result", type=Path, help="JSON file; default: peers.json in the folder")
    given = parser.parse_args()
    for name in ("out", "stack", "truth", "true_map"):
        setattr(given, name, getattr(given, name).absolute())
    given.result = given.result or given.out / "peers.json"
    return given


def check_same_task(out: Path, task: dict[str, Any]) -> None:
    """One folder is for one task: times of different ones cannot be added up."""
    path = out / "task.json"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(task) + "\n")
    elif (held := json.loads(path.read_text())) != task:
        names = ", ".join(name for name in task if held.get(name) != task[name])
        sys.exit(f"{out}: was made with another {names}; give another folder, or the same settings")


def main() -> None:
    given = parsed()
    # A peer that runs must be stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if hasattr(os, "sched_setaffinity"):
        # No thread more than is given, whatever a program makes of its settings.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    torch.set_num_threads(given.threads)
    stack = ParticleStack.open(given.stack)
    n_pixels, pixel_size = int(stack.image_sizes[0]), float(stack.table.pixel_size_in_angstroms[0])
    diameter = given.mask_diameter or round(MASK * n_pixels * pixel_size)
    task = Task(given.stack, stack.n_particles, n_pixels, diameter, given.threads, given.seed)
    settings = asdict(task) | {"stack": f"{given.stack.parent.name}/{given.stack.name}"}
    check_same_task(given.out, settings)
    kept = json.loads(given.result.read_text())["stages"] if given.result.is_file() else {}
    report = {**provenance(), "settings": settings | {"pixel_size_in_angstroms": pixel_size}, "stages": kept}
    for stage in given.stages:
        program = program_of(stage, task, given)
        if isinstance(program, str):
            print(f"{stage}: left out: {program}", flush=True)
            continue
        timetable, failure = run(program, 60 * given.max_minutes)
        found = figures(program, timetable) | {"failure": failure}
        report["stages"][stage] = found | judged(program, given.truth, given.true_map, n_pixels * pixel_size)
        given.result.write_text(json.dumps(report, indent=1) + "\n")
        print(stage, json.dumps({k: v for k, v in report["stages"][stage].items() if k != "command"}), flush=True)


if __name__ == "__main__":
    main()
