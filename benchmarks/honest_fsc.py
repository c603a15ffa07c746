"""Is the resolution that runs report ever better than the truth bears out?

    python benchmarks/honest_fsc.py RESULT.json

RESULT is a file of ``robustness.py``. The resolution by the half maps, their FSC at 0.143, is compared with that at
which the map agrees with the true one, their FSC at 0.5, which it estimates. Both are counted in shells of the Fourier
transform of the box: one more is the next finer resolution that can be told.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TOLERANCE_IN_SHELLS", "Claim", "claims", "table_of"]

TOLERANCE_IN_SHELLS = 1


@dataclass(frozen=True)
class Claim:
    """The last shells to which a run says that its map is right, and to which it is; 0 where it is right nowhere."""

    condition: str
    seed: int
    verdict: str | None
    extent_in_angstroms: float
    reported_shell: int
    true_shell: int

    @property
    def excess(self) -> int:
        """By how many shells the run reports too much."""
        return self.reported_shell - self.true_shell

    @property
    def is_honest(self) -> bool:
        return self.excess <= TOLERANCE_IN_SHELLS


def claims(report: dict[str, Any]) -> list[Claim]:
    """Of all runs that report a resolution and of which the true map is known."""
    return [
        Claim(
            condition,
            run["seed"],
            run["verdict"],
            run["extent_in_angstroms"],
            shell_of(run["reported_resolution_in_angstroms"], run["extent_in_angstroms"]),
            shell_of(run["true_resolution_in_angstroms"], run["extent_in_angstroms"]),
        )
        for condition, runs in report["runs"].items()
        for run in runs
        if run.get("reported_resolution_in_angstroms") is not None and "true_resolution_in_angstroms" in run
    ]


def shell_of(resolution_in_angstroms: float | None, extent_in_angstroms: float) -> int:
    """The shell of this period in a box of this side; 0 for none.

    Examples
    --------
    >>> shell_of(11.0, 352.0), shell_of(None, 352.0)
    (32, 0)
    """
    return 0 if resolution_in_angstroms is None else round(extent_in_angstroms / resolution_in_angstroms)


def table_of(found: list[Claim]) -> str:
    """All claims as a table in Markdown, and how many of them are too good."""
    lines = ["| condition | seed | verdict | reported | true | too much by |", "|---|---|---|---|---|---|"]
    for claim in found:
        periods = (period(shell, claim.extent_in_angstroms) for shell in (claim.reported_shell, claim.true_shell))
        said = claim.verdict or "none"
        lines.append(f"| {claim.condition} | {claim.seed} | {said} | {' | '.join(periods)} | {claim.excess:+d} |")
    return "\n".join([*lines, "", summary_of(found)])


def period(shell: int, extent_in_angstroms: float) -> str:
    return f"{extent_in_angstroms / shell:.1f} Å (shell {shell})" if shell else "none"


def summary_of(found: list[Claim]) -> str:
    """How many claims are too good, and how many of those of runs that call themselves solved."""
    bad = [claim for claim in found if not claim.is_honest]
    solved = [claim for claim in bad if claim.verdict == "solved"]
    return (
        f"{len(bad)} of {len(found)} runs report a resolution that is better than the truth by more than "
        f"{TOLERANCE_IN_SHELLS} shell; {len(solved)} of them call their map solved."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    print(table_of(claims(json.loads(parser.parse_args().result.read_text()))))


if __name__ == "__main__":
    main()
