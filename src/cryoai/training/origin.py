"""Where a run began: what it was given, to be given it again when it goes on, and to be sure that it is the same."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cryoai.errors import InputError
from cryoai.formats.particle_files import read_particles
from cryoai.formats.table import ParticleTable
from cryoai.particle_stack import ParticleSource, ParticleStack
from cryoai.runs import RunFolder

__all__ = ["Origin"]


@dataclass(frozen=True)
class Origin:
    """What a run was given.

    Attributes
    ----------
    command
        What is done with the particles.
    source
        Where they are.
    fingerprint
        Of the particles and some of their images.
    settings
        As TOML.
    """

    command: Literal["reconstruct", "refine"]
    source: ParticleSource
    fingerprint: str
    settings: str

    @classmethod
    def of(cls, command: Literal["reconstruct", "refine"], stack: ParticleStack, settings: str) -> Origin:
        return cls(command, stack.source.absolute(), stack.fingerprint(), settings)

    def write(self, run: RunFolder) -> None:
        """Write it, and the settings by themselves, to the folder of the run."""
        source = self.source
        values = {
            "command": self.command,
            "particles": str(source.path),
            "data_dir": None if source.data_dir is None else str(source.data_dir),
            "ctf": None if source.ctf is None else str(source.ctf),
            "passthrough": [str(path) for path in source.passthrough],
            "fingerprint": self.fingerprint,
            "settings": self.settings,
        }
        run.write_text(run.settings, self.settings)
        run.write_json(run.origin, values)

    @classmethod
    def read(cls, run: RunFolder) -> Origin:
        """Of a run that is to go on.

        Raises
        ------
        InputError
            If the file is damaged, or the settings are not those that the run began with.
        """
        try:
            values: dict[str, Any] = json.loads(run.origin.read_text(encoding="utf-8"))
            source = ParticleSource(
                Path(values["particles"]),
                None if values["data_dir"] is None else Path(values["data_dir"]),
                None if values["ctf"] is None else Path(values["ctf"]),
                tuple(Path(path) for path in values["passthrough"]),
            )
            origin = cls(values["command"], source, values["fingerprint"], values["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{run.origin}: damaged ({error!r}); begin a new run") from None
        now = run.settings.read_text(encoding="utf-8") if run.settings.is_file() else ""
        if now != origin.settings:
            changes = difflib.unified_diff(origin.settings.splitlines(), now.splitlines(), n=0, lineterm="")
            lines = [line for line in changes if line[:1] in "+-" and line[:3] not in ("+++", "---")]
            raise InputError(
                f"{run.settings}: changed since the run began: {'; '.join(lines[:6])}; restore it, or begin a new run"
            )
        return origin

    def open(self, run: RunFolder) -> ParticleStack:
        """The particles, if they are those that the run began with.

        Raises
        ------
        InputError
            If they cannot be had, or are not.
        """
        stack = ParticleStack.of_source(self.source)
        if stack.fingerprint() == self.fingerprint:
            return stack
        raise InputError(
            f"{self.source.path}: not the particles that the run in {run.path} began with: "
            f"{self._difference(stack.table, run)}; restore them, or begin a new run"
        )

    def _difference(self, now: ParticleTable, run: RunFolder) -> str:
        copy = next(run.path.glob(f"{run.input_particles.name}.*"), None)
        if copy is None:
            return "other images, or other values"
        then = read_particles(copy, passthrough=self.source.passthrough)
        if len(now) != len(then):
            return f"{len(now):,} rows, and {len(then):,} then"
        for name, before, after in _columns(then, now):
            different = np.flatnonzero(np.any(np.atleast_2d(before.T != after.T), axis=0))
            if len(different):
                row = different[0]
                return f"{name} of row {then.rows[row] + 1} is {after[row]}, and was {before[row]}"
        return "the images have changed"


def _columns(then: ParticleTable, now: ParticleTable) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The columns of two tables, each with its name."""

    def of(table: ParticleTable) -> dict[str, np.ndarray]:
        found = {item.name: getattr(table, item.name) for item in fields(table)}
        columns = {name: values for name, values in found.items() if isinstance(values, np.ndarray)}
        columns["image"] = np.array(
            [f"{i + 1}@{s}" for i, s in zip(table.images.index, table.images.stack, strict=True)]
        )
        if table.poses is not None:
            columns["angles"] = table.poses.angles_in_degrees
            columns["origin"] = table.poses.origins_in_angstroms
        return columns

    before, after = of(then), of(now)
    return [(name, before[name], after[name]) for name in before if name in after]
