"""The particles of a finished run for another program: a RELION STAR file or a cryoSPARC dataset.

What the particles came in with stays as it was; poses and half sets are those of the run. Before a file appears
under its name it is read back, and the images that it names, at the poses that it holds, must give the map of the
run again: a wrong sign, a wrong unit or images of other particles cannot pass.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cryoai.errors import InputError, RunFailedError
from cryoai.formats.cryosparc import read_cryosparc, rewrite_cryosparc, write_cryosparc, write_cryosparc_group
from cryoai.formats.files import atomic_path
from cryoai.formats.mrc import open_stack
from cryoai.formats.particle_files import read_particles
from cryoai.formats.star import rewrite_star
from cryoai.particle_stack import ParticleStack
from cryoai.read_back import ReadBack, read_back
from cryoai.run_particles import RunParticles
from cryoai.runs import RunFolder

__all__ = ["ExportTarget", "Exported", "export_run"]

ExportTarget = Literal["relion", "cryosparc"]

_SUFFIXES: dict[ExportTarget, str] = {"relion": ".star", "cryosparc": ".cs"}
# With the map of the run; and where that was made from others too, with that of the same images, and with the run's.
_LEAST_FSC, _LEAST_FSC_OF_SOME = 0.95, 0.5
# In the name of a stack, what ends it in a STAR file.
_AWKWARD = re.compile(r"[\s\"'#]")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    n_left_out
        Particles whose image could not be used, and which have no pose.
    n_unsure
        Particles whose pose was not sure enough.
    image_folder
        Folder that the image names start from, where it is known and they are no whole paths.
    check
        None where the images were not found.
    missing_stack
        The first stack that was not found.
    """

    path: Path
    target: ExportTarget
    n_particles: int
    n_left_out: int
    n_unsure: int
    image_folder: Path | None
    check: ReadBack | None
    missing_stack: str | None
    protein_is_dark: bool

    def lines(self) -> tuple[str, ...]:
        """What a person wants to know of it, a line each."""
        left_out = f"; {self.n_left_out:,} without a usable image left out" if self.n_left_out else ""
        unsure = f"; {self.n_unsure:,} that are less sure left out" if self.n_unsure else ""
        found = [f"{self.path}: {self.n_particles:,} particles{left_out}{unsure}"]
        if self.target == "cryosparc":
            found.append(f"{self.path.with_suffix('.csg')}: what cryoSPARC's Import Result Group takes")
        if self.target == "relion" and self.protein_is_dark:
            found.append(
                "protein is dark in these images, and RELION takes it to be bright: invert them there "
                "(relion_image_handler --multiply_constant -1)"
            )
        if self.image_folder is not None:
            found.append(f"image names start from {self.image_folder}")
        if self.check is None:
            found.append(
                f"not read back, because {self.missing_stack} was not found: give the folder that the image names "
                "start from with --data-dir to have the poses checked"
            )
        else:
            worst = f"{_rounded_down(self.check.worst_fsc)} to {self.check.period_in_angstroms:.1f} Å"
            same = ""
            if self.check.worst_fsc_of_same is not None:
                same = f"{_rounded_down(self.check.worst_fsc_of_same)} to that of the same images in the run, and "
            found.append(
                f"read back: FSC {same}to the run's map at least {worst} "
                f"(inside its mask, from {self.check.n_images:,} images)"
            )
        return tuple(found)


def _rounded_down(correlation: float) -> str:
    return f"{math.floor(1000 * correlation) / 1000:.3f}"


def export_run(
    run: RunFolder,
    target: ExportTarget,
    out: Path,
    *,
    data_dir: Path | None = None,
    passthrough: Sequence[Path] = (),
    keep_confident: float | None = None,
    device: torch.device | str = "cpu",
) -> Exported:
    """Write the particles of a run, with its poses and half sets, for another program, and read them back.

    Rows, their order and all that the input says of them stay. Left out are particles whose image could not be
    used: they have no pose, and no other program knows of the column that says so.

    * A STAR file written for RELION, and a dataset written for cryoSPARC, keep their image names; the dataset its uids.
    * A dataset written for RELION, and a STAR file for cryoSPARC, name their images by paths that start from the
      folder of ``out``, or by whole paths where they are not below it. RELION takes stacks only by names that end
      in ``.mrcs`` and have no white space: others get links, in the folder ``NAME_stacks`` beside ``out``.
    * Defocus that the run refined is written instead of the one that came in.
    * ``rlnParticleFigureOfMerit``, where all of it is from 0 to 1, becomes cryoSPARC's ``class_posterior``.

    Parameters
    ----------
    out
        For RELION a ``.star`` file; for cryoSPARC a ``.cs`` file, with a ``.csg`` beside it.
    data_dir
        Folder that the image names start from; without it that of the particle file of the run, those above it, the
        working folder, and those above the run are tried.
    passthrough
        Where the particle file was a ``.cs``: its passthrough files, whose fields are written too.
    keep_confident
        Write only particles whose pose is right with at least this probability, ``rlnParticleFigureOfMerit``.

    Raises
    ------
    InputError
        If ``out`` is there or cannot be, the run is not whole, or a file that is needed is not there; nothing is left.
    RunFailedError
        If the file that was written does not give the map of the run; it is removed.
    """
    _check_output(out, target)
    particles = RunParticles.open(run)
    if keep_confident is not None:
        particles = particles.surest(keep_confident)
    keeps_names = particles.copy is not None and particles.copy.suffix.lower() == _SUFFIXES[target]
    if passthrough and not (keeps_names and target == "cryosparc"):
        raise InputError(f"--passthrough {passthrough[0]}: is for cryoSPARC from a .cs file alone; remove it")
    roots = _image_roots(particles, data_dir)
    images = _Images.find(particles.table.images.names, roots)
    if images.missing is not None and not keeps_names:
        raise InputError(
            f"{particles.table.path}: image stack {images.missing} not found, which the new file has to lead to; "
            "give the folder that the image names start from with --data-dir"
        )
    links = _folder_of_links(out)
    with _removed_on_failure(links), atomic_path(out) as temporary:
        if target == "relion":
            _write_relion(temporary, particles, None if keeps_names else images, links)
        elif keeps_names:
            _rewrite_dataset(temporary, particles, images.folder or roots[0], passthrough)
        else:
            _write_dataset(temporary, particles, images)
        check, folder = None, images.folder
        if images.missing is None:
            stack = _open_again(temporary, images.found if keeps_names else {})
            if not keeps_names:
                relative = any(not Path(name).is_absolute() for name in stack.table.images.names)
                folder = out.parent.absolute() if relative else None
            check = _read_back(stack, particles, device)
            _require_agreement(check, out, images)
    if target == "cryosparc":
        write_cryosparc_group(out.with_suffix(".csg"), out)
    return Exported(
        path=out,
        target=target,
        n_particles=len(particles.table),
        n_left_out=particles.n_left_out,
        n_unsure=particles.n_posed - len(particles.table),
        image_folder=folder,
        check=check,
        missing_stack=images.missing,
        protein_is_dark=particles.contrast_sign < 0,
    )


def _check_output(out: Path, target: ExportTarget) -> None:
    suffix = _SUFFIXES[target]
    if out.suffix != suffix:
        raise InputError(f"{out}: --to {target} writes a {suffix} file; give a name that ends in {suffix}")
    beside = [out.with_suffix(".csg")] if target == "cryosparc" else [_folder_of_links(out)]
    for path in (out, *beside):
        if path.exists() or path.is_symlink():
            raise InputError(f"{path}: is there already; give another name or remove it")
    if not out.parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}; give a file in a folder that exists")


def _folder_of_links(out: Path) -> Path:
    return out.parent / f"{_AWKWARD.sub('_', out.stem)}_stacks"


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------ images


@dataclass(frozen=True, eq=False)
class _Images:
    """Where the stacks are.

    Attributes
    ----------
    found
        Path of each stack that was found, by its name.
    missing
        Name of the first that was not.
    folder
        Folder that all relative names start from, if there is one.
    """

    found: Mapping[str, Path]
    missing: str | None
    folder: Path | None

    @classmethod
    def find(cls, names: Sequence[str], roots: Sequence[Path]) -> _Images:
        """Look for stacks below each folder in turn, and by their names alone in the first."""
        found = {}
        for name in names:
            candidates = [*(root / name for root in roots), roots[0] / Path(name).name]
            place = next((path for path in candidates if path.is_file()), None)
            if place is not None:
                found[name] = place
        missing = next((name for name in names if name not in found), None)
        relative = [name for name in names if not Path(name).is_absolute()]
        folders = (root for root in roots if relative and all(found.get(name) == root / name for name in relative))
        return cls(found, missing, next(folders, None))


def _image_roots(particles: RunParticles, data_dir: Path | None) -> list[Path]:
    if data_dir is not None:
        if not data_dir.is_dir():
            raise InputError(f"--data-dir {data_dir}: no such folder; give the folder the image names start from")
        return [data_dir.resolve()]
    original, run = particles.original.resolve().parent, particles.run.path.resolve()
    return list(dict.fromkeys([original, *original.parents, Path.cwd(), run, *run.parents]))


def _from_folder(folder: Path, path: Path) -> Path:
    """The path of a file from a folder, if it is below it; otherwise the whole path."""
    # The file may be a link, and its name is what is wanted; the folders may be links on either side.
    whole = path.parent.resolve() / path.name
    return whole.relative_to(folder) if whole.is_relative_to(folder) else whole


# ------------------------------------------------------------------------------ writing


def _write_relion(path: Path, particles: RunParticles, images: _Images | None, links: Path) -> None:
    """Write the particles of the run as they stand in its own file, with names of ``images`` if they are given."""
    table = particles.table
    assert table.star is not None
    assert table.poses is not None
    columns: dict[str, NDArray[np.generic]] = {}
    if images is not None:
        names = _names_for_relion([images.found[name] for name in table.images.names], links)
        pairs = zip(table.images.index.tolist(), table.images.stack.tolist(), strict=True)
        columns["rlnImageName"] = np.array([f"{index + 1:06d}@{names[stack]}" for index, stack in pairs])
    rewrite_star(path, table, table.star, table.poses, columns)


def _names_for_relion(stacks: Sequence[Path], links: Path) -> list[str]:
    """Names of stacks from the folder that holds ``links``, which are made for those that RELION would not take.

    It takes names that end in ``.mrcs`` and have no white space.
    """
    folder = links.parent.resolve()
    names = {stack: str(_from_folder(folder, stack)) for stack in stacks}
    others = [stack for stack, name in names.items() if stack.suffix != ".mrcs" or _AWKWARD.search(name)]
    if others:
        links.mkdir()
    stems = [_AWKWARD.sub("_", stack.stem) for stack in others]
    if len(set(stems)) < len(stems):
        stems = [f"{number}_{stem}" for number, stem in enumerate(stems, 1)]
    for stack, stem in zip(others, stems, strict=True):
        link = links / f"{stem}.mrcs"
        link.symlink_to(stack.resolve())
        names[stack] = f"{links.name}/{link.name}"
    return [names[stack] for stack in stacks]


def _rewrite_dataset(path: Path, particles: RunParticles, folder: Path, passthrough: Sequence[Path]) -> None:
    """Write the dataset that the run came from with the poses of the run, and the defocus if it refined that."""
    assert particles.copy is not None
    ours = particles.table
    assert ours.poses is not None
    table = read_cryosparc(particles.copy, passthrough)
    if len(table) != particles.n_rows:
        raise InputError(
            f"{particles.copy}: {len(table)} rows, but the run has {particles.n_rows}; restore the file that the run "
            "wrote"
        )
    refined = replace(
        table.take(ours.rows),
        defocus_u_in_angstroms=ours.defocus_u_in_angstroms,
        defocus_v_in_angstroms=ours.defocus_v_in_angstroms,
    )
    rewrite_cryosparc(
        path,
        refined,
        ours.poses,
        half_set=particles.half_set,
        confidence=particles.confidence,
        passthrough=passthrough,
        folder=folder,
    )


def _write_dataset(path: Path, particles: RunParticles, images: _Images) -> None:
    """Write a new dataset, whose uids follow from the image names of the run."""
    table = particles.table
    assert table.poses is not None
    found = [images.found[name] for name in table.images.names]
    places = [_from_folder(path.parent.resolve(), stack) for stack in found]
    write_cryosparc(
        path,
        table,
        ParticleStack(table, tuple(open_stack(stack) for stack in found)).image_sizes,
        table.poses,
        contrast_sign=particles.contrast_sign,
        half_set=particles.half_set,
        confidence=particles.confidence,
        paths=[str(place) if place.is_absolute() else f">{place}" for place in places],
    )


# ------------------------------------------------------------------------------ reading back


def _open_again(path: Path, known: Mapping[str, Path]) -> ParticleStack:
    """The particles of a new file; stacks that are not known by their names are looked for from its folder."""
    table = read_particles(path)
    new = _Images.find([name for name in table.images.names if name not in known], [path.parent])
    if new.missing is not None:
        raise RunFailedError(f"nothing written: image stack {new.missing}, as the new file names it, is not there")
    places = {**known, **new.found}
    return ParticleStack(table, tuple(open_stack(places[name]) for name in table.images.names))


def _read_back(stack: ParticleStack, particles: RunParticles, device: torch.device | str) -> ReadBack:
    return read_back(
        stack,
        particles.run,
        contrast_sign=particles.contrast_sign,
        n_particles_of_run=particles.n_posed,
        # Particles that do not belong have changed the map of the run, and were left out here.
        poses_of_run=None if len(particles.table) == particles.n_posed else particles.poses,
        device=device,
    )


def _require_agreement(check: ReadBack, out: Path, images: _Images) -> None:
    judged = [(check.worst_fsc, _LEAST_FSC)]
    if check.worst_fsc_of_same is not None:
        judged = [(check.worst_fsc_of_same, _LEAST_FSC), (check.worst_fsc, _LEAST_FSC_OF_SOME)]
    first = next(iter(images.found.values()))
    for found, least in judged:
        if found >= least:
            continue
        raise RunFailedError(
            f"{out}: not written, because what it says gives another map than the run's: read back, FSC "
            f"{found:.2f} within {check.period_in_angstroms:.1f} Å, where {least} is needed; see that "
            f"{first} holds the images of the run, or give the folder that their names start from with --data-dir"
        )
