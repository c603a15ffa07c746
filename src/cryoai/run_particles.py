"""The particles of a finished run: what came in, with the poses, half sets and confidences that it gave them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryoai.errors import InputError
from cryoai.formats.star import read_star
from cryoai.formats.star.lines import star_lines, tokens, unquoted
from cryoai.formats.table import FloatColumn, ParticleTable
from cryoai.limits import FEWEST_PARTICLES
from cryoai.pose_files import poses_from_columns
from cryoai.poses import Poses
from cryoai.runs import RunFolder

__all__ = ["RunParticles"]


@dataclass(frozen=True, eq=False)
class RunParticles:
    """The particles of a run that have a pose.

    Attributes
    ----------
    copy
        The run's copy of the particle file; None for bare stacks.
    original
        The particle file, as the user gave it.
    table
        From the run's ``particles.star``.
    half_set : (N,)
        1 or 2.
    confidence : (N,)
        Of each pose, from 0 to 1, if there is one.
    n_left_out
        Particles whose image could not be used, and which have no pose.
    n_rows
        Of the particle file.
    """

    run: RunFolder
    copy: Path | None
    original: Path
    contrast_sign: int
    table: ParticleTable
    half_set: NDArray[np.int64]
    confidence: FloatColumn | None
    n_left_out: int
    n_rows: int

    @classmethod
    def open(cls, run: RunFolder) -> RunParticles:
        original, sign = _read_summary(run)
        copies = [path for path in run.path.glob("input_particles.*") if path.suffix.lower() in (".star", ".cs")]
        if not copies and original.suffix.lower() in (".star", ".cs"):
            name = run.input_particles.with_suffix(original.suffix).name
            raise InputError(f"{run.path}: {name} is missing, the run's copy of {original}; restore it")
        table = read_star(run.particles)
        if table.poses is None:
            raise InputError(f"{run.particles}: no poses; restore the file that the run wrote")
        half_set = table.half_set
        if half_set is None or (half_set < 0).any():
            raise InputError(f"{run.particles}: no half set (rlnRandomSubset); restore the file that the run wrote")
        confidence = _column(table, "rlnParticleFigureOfMerit")
        if confidence is not None and not ((confidence >= 0) & (confidence <= 1)).all():
            confidence = None
        aside = _column(table, "cryoaiQuarantined")
        kept = np.arange(len(table)) if aside is None else np.flatnonzero(aside == 0)
        return cls(
            run,
            copies[0] if copies else None,
            original,
            sign,
            table.take(kept),
            half_set[kept] + 1,
            None if confidence is None else confidence[kept],
            len(table) - len(kept),
            len(table),
        )

    @property
    def n_posed(self) -> int:
        """All that the run gave a pose, and that its map was made from."""
        return self.n_rows - self.n_left_out

    @property
    def poses(self) -> Poses:
        """Those (N,) that the run gave them."""
        assert self.table.poses is not None
        return poses_from_columns(self.table.poses)

    def surest(self, least: float) -> RunParticles:
        """Those whose pose is right with at least this probability.

        Raises
        ------
        InputError
            If it is no probability, the run has not said how sure poses are, or hardly any is so sure.
        """
        if not 0 < least <= 1:
            raise InputError(f"--keep-confident {least}: must be more than 0 and at most 1")
        if _read_json(self.run.summary).get("confidence") is None or self.confidence is None:
            raise InputError(
                f"--keep-confident {least}: {self.run.path} does not say how sure its poses are "
                "(rlnParticleFigureOfMerit), as runs with refinement do; leave it out"
            )
        kept = np.flatnonzero(self.confidence >= least)
        if len(kept) < FEWEST_PARTICLES:
            raise InputError(
                f"--keep-confident {least}: {len(kept)} of {len(self.table):,} particles are so sure of their pose; "
                f"at least {FEWEST_PARTICLES} are needed: give less"
            )
        table, half_set, confidence = self.table.take(kept), self.half_set[kept], self.confidence[kept]
        return replace(self, table=table, half_set=half_set, confidence=confidence)


def _read_summary(run: RunFolder) -> tuple[Path, int]:
    """The particle file of a run, and the sign of the contrast of its images."""
    summary = _read_json(run.summary)
    try:
        return Path(summary["particles"]), int(summary["contrast"]["sign"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run.summary}: not as a run writes it ({error}); restore the file") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not as a run writes it ({error}); restore the file") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not as a run writes it; restore the file")
    return values


def _column(table: ParticleTable, name: str) -> FloatColumn | None:
    """A column (N,) of numbers of the file of a table, or None if it has none of this name."""
    layout = table.star
    assert layout is not None
    if name not in layout.columns:
        return None
    place = layout.columns.index(name)
    rows = (line.text for line in star_lines(layout.path) if line.kind == "row" and line.block == layout.block)
    try:
        values = np.array([float(unquoted(tokens(text)[place])) for text in rows])
    except ValueError as error:
        raise InputError(f"{layout.path}: {name}: {error}; restore the file that the run wrote") from None
    return values
