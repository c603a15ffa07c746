"""reconstruct, infer: from particles to maps and poses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from cryoai.commands.checking import check_before_run
from cryoai.commands.flags import require
from cryoai.hardware import choose_device
from cryoai.inference import PosePredictor, check_output, infer_file
from cryoai.particle_stack import ParticleSource, ParticleStack
from cryoai.runs import RunFolder
from cryoai.training.loop import reconstruct
from cryoai.training.resuming import resume
from cryoai.training.settings import Preset, Settings
from cryoai.watching import FollowedFolder

__all__ = ["EXIT_STATUS", "infer", "reconstruct_particles", "resume_run"]

EXIT_STATUS = {"solved": 0, "ambiguous": 3, "failed": 1}
"""Of a run, by its verdict."""
_SETTINGS = Group("Settings", help="Each can also stand in a TOML file given with --settings.")


def reconstruct_particles(
    particles: Path,
    run_dir: Path,
    *,
    preset: Preset = "auto",
    settings_file: Annotated[Path | None, Parameter(name="--settings")] = None,
    data_dir: Path | None = None,
    ctf: Path | None = None,
    passthrough: tuple[Path, ...] = (),
    settings: Annotated[Settings, Parameter(name="*", group=_SETTINGS)] = Settings(),
) -> int:
    """Reconstruct a map, half maps and every pose from particles with unknown orientations.

    Ends with a verdict, and with exit status 0 if the run is solved, 3 if it is ambiguous, 1 if it failed: with the
    reasons, which are in summary.json too. The files are written whatever the verdict.

    Parameters
    ----------
    particles
        RELION particle STAR file (3.0, 3.1 or later), cryoSPARC .cs, or with --ctf a bare stack (.mrcs) or a text file
        with one stack a line; poses in it are not used.
    run_dir
        New folder for all results.
    preset
        auto: search, encoder and refinement. paper: the published CryoAI, encoder and volume only.
    settings_file
        settings.toml of an earlier run, to repeat it; flags given beside it win.
    data_dir
        Folder that the image paths in the particle file start from.
    ctf
        For bare stacks: the contrast transfer functions, as cryoDRGN writes them (ctf.pkl).
    passthrough
        For a .cs: the passthrough file of the same job, which holds the fields that it lacks. May be repeated.
    """
    chosen = Settings.assemble(preset, settings_file, settings.model_dump(exclude_unset=True))
    source = ParticleSource(particles, data_dir, ctf, passthrough)
    table = source.read()
    check_before_run(table, run_dir, chosen, data_dir=data_dir)
    result = reconstruct(ParticleStack.of_source(source, table), run_dir, chosen)
    return EXIT_STATUS[result.verdict.status]


def resume_run(run_dir: Path) -> int:
    """Go on with a run of reconstruct or refine that was stopped: by Ctrl-C, a queue, a crash or a full disk.

    Particles and settings must be as they were. On the CPU with one thread (OMP_NUM_THREADS=1) the result is the same
    to the last bit as that of a run that was never stopped. The exit status is that of reconstruct.

    Parameters
    ----------
    run_dir
        Folder of the run.
    """
    return EXIT_STATUS[resume(run_dir).verdict.status]


def infer(
    run_dir: Path,
    *paths: Path,
    watch: Path | None = None,
    until_idle: float = math.inf,
    refine: int = 0,
    data_dir: Path | None = None,
    ctf: Path | None = None,
    passthrough: tuple[Path, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Pose particles that a run has never seen, with its encoder, each with a confidence.

    cryoai infer RUN_DIR NEW.star OUT.star

    cryoai infer RUN_DIR OUT_DIR --watch DIR

    NEW is anything that reconstruct takes. OUT.star is the same with poses and rlnParticleFigureOfMerit, the
    probability that the pose is within 10° of the right one. Particles that do not belong to the map of the run have
    one near 0. The images must be of the run's kind: the same contrast, a box as large or larger, pixels as fine as
    its encoder's or finer.

    Parameters
    ----------
    run_dir
        Folder of a finished run with an encoder.
    paths
        Particle file and file to write, or with --watch the folder to write to.
    watch
        Folder to follow during data collection: every STAR file in it is posed once it is whole.
    until_idle
        With --watch, end when nothing new has come for so many seconds.
    refine
        Steps of local refinement of every pose at each of three band limits, 3 are plenty, and a search for those that
        do not fit. Slower and finer.
    data_dir
        Folder that the image paths in the particle file start from.
    ctf
        For bare stacks: the contrast transfer functions, as cryoDRGN writes them (ctf.pkl).
    passthrough
        For a .cs: the passthrough file of the same job. May be repeated.
    """
    require(0 <= refine <= 20, f"--refine {refine}: from 0 to 20 steps")
    require(until_idle > 0, f"--until-idle {until_idle}: must be positive")
    if watch is None:
        require(len(paths) == 2, "infer: give RUN_DIR NEW.star OUT.star, or RUN_DIR OUT_DIR --watch DIR")
        require(until_idle == math.inf, "--until-idle: is for --watch DIR")
    else:
        require(len(paths) == 1, "infer: with --watch DIR give RUN_DIR and the folder to write to")
    if watch is None:
        check_output(*paths)
    run = RunFolder.open(run_dir)
    predictor = PosePredictor.of_run(run, n_iterations=refine, device=choose_device(device))

    def pose(source: Path, out: Path) -> None:
        line = infer_file(predictor, source, out, data_dir=data_dir, ctf=ctf, passthrough=passthrough)
        print(line, flush=True)

    if watch is None:
        pose(*paths)
    else:
        FollowedFolder(watch, paths[0], pose, print).follow(until_idle)
