"""check: what is wrong with a particle set, before hours are spent on it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress

from cryoai.checks import QUICK_SAMPLE, check_particles
from cryoai.commands.flags import require
from cryoai.errors import InputError
from cryoai.formats.table import ParticleTable
from cryoai.training.settings import Settings

__all__ = ["check", "check_before_run"]

_SIGNS = {"auto": None, "bright": 1, "dark": -1}


def check(
    particles: Path,
    *,
    data_dir: Path | None = None,
    ctf: Path | None = None,
    passthrough: tuple[Path, ...] = (),
    sample: int = 5000,
    every: Annotated[bool, Parameter(name="--all", negative="")] = False,
    box: int | None = None,
    run_dir: Path = Path(),
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Find every fault of a particle set before hours are spent on it.

    Paths, headers, images, CTF values, contrast, box, and what a run will need. Ends with status 2 if
    something has to be mended first; warnings are no reason for that.

    Parameters
    ----------
    particles
        Anything that reconstruct takes.
    data_dir
        Folder that the image paths start from.
    ctf
        For bare stacks: the contrast transfer functions, as cryoDRGN writes them (ctf.pkl).
    passthrough
        For a .cs: the passthrough file of the same job. May be repeated.
    sample
        Images to read at most, evenly spread.
    every
        Read every image.
    box
        Working box of the run, in pixels.
    run_dir
        Where the run will write: its disk is looked at.
    as_json
        Print JSON in place of a table.
    """
    require(sample > 0, f"--sample {sample}: must be positive")
    require(box is None or (box >= 32 and box % 2 == 0), f"--box {box}: an even number of at least 32 is needed")
    on_terminal = sys.stdout.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading images", total=None)
        report = check_particles(
            particles,
            data_dir=data_dir,
            ctf=ctf,
            passthrough=passthrough,
            sample=None if every else sample,
            working_box=box,
            run_dir=run_dir,
            progress=lambda done, n: bar.update(task, completed=done, total=n),
        )
    width = shutil.get_terminal_size().columns if on_terminal else None
    print(report.to_json() if as_json else report.to_text(marks=on_terminal, width=width))
    if not report.ok:
        raise InputError(f"{particles}: {report.verdict}")


def check_before_run(table: ParticleTable, run_dir: Path, settings: Settings, *, data_dir: Path | None) -> None:
    """The quick part of the check: refuse what cannot go well, and print what should be known.

    Raises
    ------
    InputError
        With the first thing to mend.
    """
    report = check_particles(
        table,
        data_dir=data_dir,
        sample=QUICK_SAMPLE,
        working_box=settings.box,
        max_particles=settings.max_particles,
        max_faulty_share=settings.max_faulty_share,
        sign=_SIGNS[settings.contrast],
        run_dir=run_dir,
        cache=settings.cache,
    )
    if not report.ok:
        raise InputError(report.complaint)
    if report.of_level("warning"):
        print(report.to_text(marks=sys.stdout.isatty(), levels=("warning",)), flush=True)
