"""refine: from particles with poses to half maps, better poses, and a verdict on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from cryoai.commands.checking import check_before_run
from cryoai.commands.running import EXIT_STATUS
from cryoai.particle_stack import ParticleSource, ParticleStack
from cryoai.training.refining import refine
from cryoai.training.settings import RefineSettings, Settings

__all__ = ["refine_particles"]

_SETTINGS = Group("Settings")


def refine_particles(
    particles: Path,
    run_dir: Path,
    *,
    data_dir: Path | None = None,
    passthrough: tuple[Path, ...] = (),
    settings: Annotated[RefineSettings, Parameter(name="*", group=_SETTINGS)] = RefineSettings(),
) -> int:
    """Refine the poses of particles, and make half maps, map and all else that reconstruct makes, but no encoder.

    Poses may come from reconstruct, RELION or cryoSPARC. Nothing is searched for: they should be right to some
    degrees. Poses that have nothing to do with the images are refused. All particles are used.

    Ends with a verdict, and with exit status 0 if the run is solved, 3 if it is ambiguous, 1 if it failed.

    Parameters
    ----------
    particles
        RELION particle STAR file or cryoSPARC .cs, with poses.
    run_dir
        New folder for all results.
    data_dir
        Folder that the image paths in the particle file start from.
    passthrough
        For a .cs: the passthrough file of the same job, which holds the fields that it lacks. May be repeated.
    """
    source = ParticleSource(particles, data_dir, passthrough=passthrough)
    table = source.read()
    of_check = Settings(
        box=settings.box,
        contrast=settings.contrast,
        cache=settings.cache,
        max_faulty_share=settings.max_faulty_share,
        max_particles=max(len(table), 100),
    )
    check_before_run(table, run_dir, of_check, data_dir=data_dir)
    result = refine(ParticleStack.of_source(source, table), run_dir, settings)
    return EXIT_STATUS[result.verdict.status]
