"""The run folder: the name and the writer of every file that a run leaves behind."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import shutil
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cryoai.errors import InputError
from cryoai.formats.files import atomic_path, make_empty_folder
from cryoai.formats.mrc import write_map
from cryoai.particle_stack import Fault

__all__ = ["FscColumns", "RunFolder", "finite_or_none"]


def finite_or_none(value: float | None) -> float | None:
    """The value to three digits after the point; None for what JSON cannot hold."""
    return round(value, 3) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, eq=False)
class FscColumns:
    """Correlations of half maps (n // 2 + 1,) by shell; ``fsc`` is the one that counts, the others stand beside it."""

    fsc: Tensor
    unmasked: Tensor | None = None
    masked: Tensor | None = None
    phases_randomised: Tensor | None = None
    noise_only: Tensor | None = None
    shuffled_poses: Tensor | None = None


@dataclass(frozen=True)
class RunFolder:
    """A run folder; every file is written whole or not at all."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make the folder.

        Raises
        ------
        InputError
            If it holds anything already, or cannot be made or written to.
        """
        run = cls(path)
        if run.origin.is_file():
            raise InputError(f"{path}: holds a run that was stopped; go on with it: cryoai resume {path}, or remove it")
        make_empty_folder(path)
        run.write_text(run.command, shlex.join(sys.argv) + "\n")
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A folder that holds a finished run.

        Raises
        ------
        InputError
            If it does not.
        """
        run = cls(path)
        if not run.summary.is_file():
            raise InputError(f"{path}: not the folder of a finished run (no {run.summary.name}); give one")
        return run

    @classmethod
    def unfinished(cls, path: Path) -> RunFolder:
        """A folder that holds a run that was stopped on its way.

        Raises
        ------
        InputError
            If it does not.
        """
        run = cls(path)
        if run.summary.is_file():
            raise InputError(f"{path}: this run is finished; its results are there")
        if not run.origin.is_file():
            raise InputError(f"{path}: not the folder of a run that was stopped (no {run.origin.name}); give one")
        return run

    @property
    def command(self) -> Path:
        return self.path / "command.txt"

    @property
    def settings(self) -> Path:
        return self.path / "settings.toml"

    @property
    def origin(self) -> Path:
        """What the run was given, as long as it is not finished."""
        return self.path / "origin.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of what the run needs to go on; removed when it is finished."""
        return self.path / "checkpoints"

    @property
    def prepared(self) -> Path:
        """What belongs to the images at the working box; removed likewise."""
        return self.checkpoints / "prepared.safetensors"

    @property
    def lock(self) -> Path:
        """Locked while a process is at work in the folder."""
        return self.path / "at_work.lock"

    @property
    def symmetry(self) -> str:
        """The point group that the run imposed; those of earlier versions did not know of any.

        Raises
        ------
        InputError
            If the settings of the run cannot be read.
        """
        try:
            return str(tomllib.loads(self.settings.read_text(encoding="utf-8")).get("symmetry", "C1"))
        except FileNotFoundError:
            raise InputError(f"{self.settings}: no such file; restore the file that the run wrote") from None
        except ValueError as error:
            raise InputError(f"{self.settings}: not as a run writes it ({error}); restore the file") from None

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def prepared_images(self) -> Path:
        """Scratch file of the images at the working box; removed when the run is finished."""
        return self.path / "prepared_images.f16"

    @property
    def prepared_block(self) -> Path:
        """Scratch file of the images of a block of particles that were left out at first; removed likewise."""
        return self.path / "prepared_block.f16"

    @property
    def map(self) -> Path:
        return self.path / "map.mrc"

    @property
    def half_maps(self) -> tuple[Path, Path]:
        return self.path / "half_map_1.mrc", self.path / "half_map_2.mrc"

    @property
    def mask(self) -> Path:
        return self.path / "mask.mrc"

    @property
    def sharpened_map(self) -> Path:
        return self.path / "map_sharpened.mrc"

    @property
    def local_resolution(self) -> Path:
        """In Å; 0 outside the mask."""
        return self.path / "local_resolution.mrc"

    @property
    def fsc(self) -> Path:
        return self.path / "fsc.csv"

    @property
    def validation_figure(self) -> Path:
        return self.path / "validation.png"

    @property
    def particles(self) -> Path:
        return self.path / "particles.star"

    @property
    def input_particles(self) -> Path:
        """Copy of the particle file, with its own suffix."""
        return self.path / "input_particles"

    @property
    def encoder_particles(self) -> Path:
        """The encoder's own poses, before any refinement."""
        return self.path / "encoder_particles.star"

    @property
    def encoder_weights(self) -> Path:
        return self.path / "encoder.safetensors"

    @property
    def volume_weights(self) -> Path:
        return self.path / "volume.safetensors"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def quarantine(self) -> Path:
        """The images that could not be used, if there were any."""
        return self.path / "quarantine.csv"

    @property
    def non_finite_batch(self) -> Path:
        """The last batch of training whose loss was not finite, if there was one."""
        return self.path / "non_finite_batch.safetensors"

    def write_text(self, path: Path, text: str) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, path: Path, values: dict[str, Any]) -> None:
        self.write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")

    def write_map(self, path: Path, density: Tensor, pixel_size_in_angstroms: float) -> None:
        write_map(path, density.cpu().numpy().astype(np.float32), pixel_size_in_angstroms)

    def write_fsc(self, columns: FscColumns, pixel_size_in_angstroms: float) -> None:
        """Columns: shell, its period in Å, and the correlations that there are."""
        curves = {name: curve for name, curve in vars(columns).items() if curve is not None}
        extent = 2 * (len(columns.fsc) - 1) * pixel_size_in_angstroms
        rows = [",".join(["shell", "period_in_angstroms", *curves])]
        for shell, values in enumerate(zip(*(curve.tolist() for curve in curves.values()), strict=True)):
            period = extent / shell if shell else math.inf
            rows.append(",".join([str(shell), f"{period:.4f}", *(f"{value:.6f}" for value in values)]))
        self.write_text(self.fsc, "\n".join(rows) + "\n")

    def write_quarantine(self, faults: Sequence[Fault]) -> None:
        """Columns: row in the particle file, counted from 1, image, reason."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "image", "reason"])
        writer.writerows([fault.row + 1, fault.image, fault.reason] for fault in faults)
        self.write_text(self.quarantine, text.getvalue())

    def tidy(self) -> None:
        """Remove what only a run that is not finished needs."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for scratch in (self.prepared_images, self.prepared_block, self.origin):
            scratch.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder and all that the run wrote."""
        shutil.rmtree(self.path, ignore_errors=True)
