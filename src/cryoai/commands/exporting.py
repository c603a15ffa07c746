"""export: the particles of a run for another program."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cryoai.export import ExportTarget, export_run
from cryoai.hardware import choose_device
from cryoai.runs import RunFolder

__all__ = ["export"]


def export(
    run_dir: Path,
    out: Path,
    *,
    to: ExportTarget,
    data_dir: Path | None = None,
    passthrough: tuple[Path, ...] = (),
    keep_confident: float | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Write the particles of a run, with its poses and half sets, for RELION or cryoSPARC, and read them back.

    Before the file appears, its images are reconstructed at its poses, 20,000 of them where these suffice, and have
    to give the run's map again: FSC 0.95 or more. If not, there is no file and the exit status is 1. Particles whose
    image could not be used are left out.

    Parameters
    ----------
    run_dir
        Folder of a finished run.
    out
        New .star file for RELION; new .cs file for cryoSPARC, which gets a .csg beside it for Import Result Group.
    to
        relion: the input's columns and image names where it was a STAR file. cryosparc: the input's uids and fields
        where it was a .cs.
    data_dir
        Folder that the image names start from.
    passthrough
        For cryosparc from a .cs: the passthrough file of the same job, whose fields are written too. May be repeated.
    keep_confident
        Write only particles whose pose is right with at least this probability (rlnParticleFigureOfMerit), say 0.5.
    """
    run = RunFolder.open(run_dir)
    exported = export_run(
        run,
        to,
        out,
        data_dir=data_dir,
        passthrough=passthrough,
        keep_confident=keep_confident,
        device=choose_device(device),
    )
    print("\n".join(exported.lines()))
