"""What a check found, for people and for programs."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cryoai.formats.table import ParticleTable

__all__ = ["CheckReport", "Finding", "Level", "Measurements", "Rows", "at_rows", "said"]

Level = Literal["error", "warning", "note", "ok"]

Rows = NDArray[np.int64]

_LEVELS: tuple[Level, ...] = ("error", "warning", "note", "ok")
_MARKS = {"error": "✗", "warning": "!", "note": "·", "ok": "✓"}
_SHOWN_OF_A_KIND = 5


@dataclass(frozen=True)
class Finding:
    """One thing that a check found out.

    Attributes
    ----------
    level
        error: a run cannot use the particles. warning: it can, and the result may suffer. note: worth
        knowing. ok: the topic was looked at and is in order.
    topic
        What it is about, in one or two words.
    message
        One line: the file, the row and the rule.
    fix
        What to do; empty where there is nothing to do.
    rows
        The particles it is about, counted from 1 as in the messages; empty where it is about the file
        or about all of them.
    """

    level: Level
    topic: str
    message: str
    fix: str = ""
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Measurements:
    """Numbers found on the way; None where something stood in the way of measuring them.

    Attributes
    ----------
    n_images_read
        How many of the particles' images were looked at.
    contrast_z_score
        Positive where protein is bright; see :class:`~cryoai.particles.ContrastSign`.
    ctf_z_score
        High where the images show the CTF of their own rows; near 0 where rows are in another order than images.
    particle_diameter_in_angstroms
        Of the particle with its shifts, to about a fifth.
    scratch_in_bytes, memory_in_bytes, seconds
        What a run will need, roughly.
    """

    n_particles: int | None = None
    n_pixels: int | None = None
    pixel_size_in_angstroms: float | None = None
    n_images_read: int = 0
    contrast_z_score: float | None = None
    ctf_z_score: float | None = None
    particle_diameter_in_angstroms: float | None = None
    working_box: int | None = None
    scratch_in_bytes: int | None = None
    memory_in_bytes: int | None = None
    seconds: int | None = None


@dataclass(frozen=True)
class CheckReport:
    """All that was found, worst first.

    Examples
    --------
    >>> bad = Finding("error", "files", "p.star: row 3: gone.mrcs is missing", "give --data-dir", (3,))
    >>> report = CheckReport(Path("p.star"), (Finding("ok", "optics", "p.star: in range"), bad), Measurements())
    >>> print(report.to_text(marks=False))
    p.star
    <BLANKLINE>
    error    files   row 3: gone.mrcs is missing
                     fix: give --data-dir
    ok       optics  in range
    <BLANKLINE>
    1 error: mend the error before a run
    >>> report.exit_status
    2
    """

    path: Path
    findings: tuple[Finding, ...]
    measurements: Measurements

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.findings, key=lambda finding: _LEVELS.index(finding.level)))
        object.__setattr__(self, "findings", ordered)

    @property
    def ok(self) -> bool:
        """Whether a run can start: there is no error, though perhaps a warning."""
        return not self.of_level("error")

    @property
    def exit_status(self) -> int:
        return 0 if self.ok else 2

    def of_level(self, level: Level) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == level)

    @property
    def complaint(self) -> str:
        """The first error and its fix in one line, for a program that stops at it."""
        errors = self.of_level("error")
        if not errors:
            return ""
        more = f" ({len(errors) - 1} more: run cryoai check {self.path})" if len(errors) > 1 else ""
        return "; ".join(filter(None, (errors[0].message, errors[0].fix))) + more

    @property
    def verdict(self) -> str:
        """How many errors and warnings there are, in one line."""
        n_errors, n_warnings = len(self.of_level("error")), len(self.of_level("warning"))
        found = " and ".join(
            said(number, thing) for number, thing in ((n_errors, "error"), (n_warnings, "warning")) if number
        )
        if n_errors:
            return f"{found}: mend the {'error' if n_errors == 1 else 'errors'} before a run"
        return f"no error, {found}: a run can start" if found else "nothing wrong: a run can start"

    def to_json(self) -> str:
        """Everything, for programs."""
        counts = Counter(finding.level for finding in self.findings)
        values = {
            "particles": str(self.path),
            "ok": self.ok,
            "counts": {level: counts[level] for level in _LEVELS},
            "measurements": asdict(self.measurements),
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(values, indent=2, allow_nan=False)

    def to_text(self, *, marks: bool, width: int | None = None, levels: Sequence[Level] = _LEVELS) -> str:
        """A table for people: what needs action first.

        Parameters
        ----------
        marks
            Signs for the levels in place of words.
        width
            Columns to wrap at; None for one line a finding, which suits a file.
        levels
            Those to show.
        """
        shown = [finding for finding in self.findings if finding.level in levels]
        topic_width = max((len(finding.topic) for finding in shown), default=0)
        lines = []
        for kind, group in groupby(shown, key=lambda finding: (finding.level, finding.topic)):
            members = list(group)
            label = _MARKS[kind[0]] if marks else f"{kind[0]:<7}"
            head = f"{label}  {kind[1]:<{topic_width}}  "
            some = members[:_SHOWN_OF_A_KIND]
            for finding, following in zip(some, [*some[1:], None], strict=True):
                # The heading names the file.
                lines += _wrapped(head, finding.message.removeprefix(f"{self.path}: "), width)
                if finding.fix and (following is None or following.fix != finding.fix):
                    lines += _wrapped(" " * len(head), f"fix: {finding.fix}", width)
            if len(members) > len(some):
                lines.append(f"{head}... and {len(members) - len(some):,} more like these; --json lists all")
        return "\n".join([self._heading(), "", *lines, "", self.verdict])

    def _heading(self) -> str:
        found = self.measurements
        parts = [str(self.path)]
        if found.n_particles is not None:
            parts.append(f": {said(found.n_particles, 'particle')}")
        if found.n_pixels is not None and found.pixel_size_in_angstroms is not None:
            parts.append(f" of {found.n_pixels} px, {found.pixel_size_in_angstroms:.4g} Å a pixel")
        return "".join(parts)


def _wrapped(head: str, text: str, width: int | None) -> list[str]:
    if width is None:
        return [head + text]
    width = max(width, len(head) + 30)
    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def said(number: int, thing: str) -> str:
    """A number of things in words.

    Examples
    --------
    >>> said(1, "row"), said(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def at_rows(table: ParticleTable, chosen: Rows) -> tuple[str, tuple[int, ...]]:
    """Some particles, given by their places in the table, in words and as rows counted from 1.

    All of them are not listed.
    """
    rows = tuple((table.rows[chosen] + 1).tolist())
    if len(rows) == len(table) > 1:
        return f"all {len(rows):,} rows", ()
    if len(rows) == 1:
        return f"row {rows[0]}", rows
    if len(rows) <= 3:
        return f"rows {', '.join(map(str, rows[:-1]))} and {rows[-1]}", rows
    return f"rows {', '.join(map(str, rows[:3]))} and {len(rows) - 3:,} more", rows
