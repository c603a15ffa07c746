"""prepare: the images at the working box, once and for all runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from cryoai.hardware import choose_device
from cryoai.image_cache import CachedImages
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles
from cryoai.training.settings import Settings
from cryoai.training.steps import Drawn, choose_box

__all__ = ["prepare_images"]


def prepare_images(
    particles: Path,
    cache_dir: Path,
    *,
    box: int | None = None,
    max_particles: int = Settings().max_particles,
    seed: int = 0,
    max_faulty_share: float = Settings().max_faulty_share,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    data_dir: Path | None = None,
    ctf: Path | None = None,
    passthrough: tuple[Path, ...] = (),
) -> None:
    """Put the images at the working box on a fast disk, once, for runs with --cache CACHE_DIR.

    cryoai prepare particles.star /fast/cache

    cryoai reconstruct particles.star runs/first --cache /fast/cache

    Runs do this by themselves; prepare does it ahead. Done before, it does nothing. A run finds the images if its
    particles, box and max-particles are the same, and, only where there are more particles than that, its seed.
    Contrast, symmetry and all other settings do not matter.

    Parameters
    ----------
    particles
        Anything that reconstruct takes.
    cache_dir
        Folder for the images, which take 1.6 bytes a pixel of the working box.
    box
        Working box in pixels. Default: that of reconstruct.
    max_particles
        As of the run. For refine, which uses all particles, give no fewer than there are.
    seed
        Of the run.
    max_faulty_share
        Images that are missing, not finite or constant are left out, up to this share.
    device
        Where to compute.
    data_dir
        Folder that the image paths start from.
    ctf
        For bare stacks: the contrast transfer functions, as cryoDRGN writes them (ctf.pkl).
    passthrough
        For a .cs: the passthrough file of the same job. May be repeated.
    """
    given = {"max_particles": max_particles, "seed": seed, "max_faulty_share": max_faulty_share, "device": device}
    settings = Settings.assemble("auto", None, {**given, "box": box})
    stack = ParticleStack.open(particles, data_dir=data_dir, ctf=ctf, passthrough=passthrough)
    working_box = choose_box(stack, settings.box)
    chosen = Drawn.of(stack, settings.seed, settings.max_particles).chosen
    place = CachedImages.place(
        cache_dir,
        stack.take(chosen),
        working_box,
        max_faulty_share=settings.max_faulty_share,
        device=choose_device(settings.device),
    )
    found = place.find()
    if found is not None:
        print(f"{_size(found)} are there already: {place.path}")
        return
    began, n_read = time.monotonic(), 0
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("preparing images", total=len(chosen))

        def advance(n_done: int) -> None:
            nonlocal n_read
            n_read = n_done
            bar.update(task, completed=n_done)

        made = place.make(progress=advance, say=lambda line: print(line, flush=True))
    seconds = time.monotonic() - began
    how = f"in {seconds:.1f} s, {n_read / seconds:,.0f} images per second" if n_read else "made by the other process"
    print(f"{_size(made)}, {how}: {place.path}")
    if made.faults:
        print(f"{len(made.faults):,} images that cannot be used are set aside; a run names them")


def _size(images: PreparedParticles) -> str:
    box = f"{images.n_pixels} px of {images.pixel_size_in_angstroms:.2f} Å"
    return f"{images.n_particles:,} images at the working box, {box}, {images.n_bytes / 1e9:,.3g} GB"
