"""docs/benchmarks.md and its pictures, from result files of ``peers.py`` and ``robustness.py`` (hard, small stacks).

    python benchmarks/page.py [--peers RESULT.json] [--robustness RESULT.json] [--honesty RESULT.json] [--out docs]

Nothing on the page is written by hand: to change it, run a benchmark again or change this file. A result file that is
not there leaves its part of the page out.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from honest_fsc import Claim, claims, summary_of
from robustness import CONDITIONS

ROOT = Path(__file__).resolve().parents[1]
# A wrong map of a ribosome agrees with the true one to no better than half of its diameter.
RIGHT_IN_ANGSTROMS = 30.0
TITLES = {
    "cryoai": "cryoai reconstruct",
    "relion-start": "RELION, initial model",
    "relion-refine": "RELION, auto-refine",
    "cryodrgn": "cryoDRGN abinit",
}
WORDS = {
    "snr_0.3": "SNR 0.3",
    "snr_0.1": "SNR 0.1, the reference",
    "snr_0.03": "SNR 0.03",
    "snr_0.01": "SNR 0.01",
    "preferred": "half of the particles within 25° of one axis",
    "noise_20": "20 % images of pure noise",
    "foreign_20": "20 % particles of another molecule",
    "shifts_15": "shifts of 15 Å in each axis",
    "defocus_500": "defocus errors of 500 Å",
    "noise_only": "nothing but noise",
}
HEAD = """# Benchmarks

Made by `python benchmarks/page.py` from the files in `benchmarks/results`, which hold the commit, the hardware and all
settings; how to make those stands in `benchmarks/README.md`.
"""


def where(report: dict[str, Any]) -> str:
    return f"{report['hardware']}; {report['date']}, commit `{report['commit'][:7] or 'unknown'}`."


# ------------------------------------------------------------------------------ peers


def peers_part(report: dict[str, Any], images: Path) -> str:
    """Other programs: table and picture."""
    settings, stages = report["settings"], report["stages"]
    n, box, pixel = (settings[key] for key in ("n_particles", "n_pixels", "pixel_size_in_angstroms"))
    ours = stages.get("cryoai")
    lines = [
        "## The same particles through other programs",
        "",
        f"{n:,} simulated particles of {box} px of {pixel:g} Å (`{settings['stack']}`), one program after the other, "
        f"each with {settings['n_threads']} thread(s). {where(report)}",
        "",
        "| | time | of ours | within 5° | median error | map, FSC 0.5 | FSC 0.143 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stage in stages.items():
        poses, density = stage["poses"] or {}, stage["map"] or {}
        cells = [
            f"{TITLES[name]}, {stage['start']} ({stage['program']})",
            time_cell(stage),
            ratio_cell(stage, ours),
            f"{poses['within_5_degrees']:.1%}" if poses else "–",
            f"{poses['median_rotation_error_in_degrees']:.2f}°" if poses else "–",
            *(period_cell(density, key) for key in ("resolution_at_fsc_0.5", "resolution_at_fsc_0.143")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    draw_times(stages, images / "peers.png")
    return "\n".join(
        [
            *lines,
            "",
            "A time with ≥ is a lower bound: the program was stopped there, and its last poses and map were judged. "
            "What it would take in all is extrapolated by its own time for an image so far, and is the grey bar.",
            "",
            "![Minutes of each program](images/peers.png)",
            "",
            "The commands:",
            "",
            *(f"* {TITLES[name]}, {stage['start']}: `{stage['command']}`" for name, stage in stages.items()),
            "",
        ]
    )


def time_cell(stage: dict[str, Any]) -> str:
    """Minutes, and if it was stopped how far it came."""
    if stage["finished"]:
        return minutes(stage["seconds"])
    of = f" of {stage['n_steps']}" if stage["n_steps"] else ""
    cell = f"≥ {minutes(stage['seconds'])}, {stage['steps_done']:.1f}{of} steps"
    total = stage["extrapolated_seconds"]
    return cell if total is None else f"{cell}; in all about {minutes(total)}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def ratio_cell(stage: dict[str, Any], ours: dict[str, Any] | None) -> str:
    if ours is None or not ours["finished"]:
        return "–"
    return f"{'' if stage['finished'] else '≥ '}{stage['seconds'] / ours['seconds']:.3g} ×"


def period_cell(density: dict[str, Any], key: str) -> str:
    found = density.get(key)
    return "–" if found is None else f"{found:.1f} Å"


def draw_times(stages: dict[str, Any], path: Path) -> None:
    """Bars of minutes, on a logarithmic axis: measured, and extrapolated behind."""
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.5 * len(stages)), layout="constrained")
    for row, (name, stage) in enumerate(stages.items()):
        total = stage["extrapolated_seconds"]
        if total is not None:
            axes.barh(row, total / 60, color="0.85")
        axes.barh(row, stage["seconds"] / 60, color="tab:blue" if name == "cryoai" else "tab:gray")
        text = minutes(stage["seconds"]) if stage["finished"] else f"≥ {minutes(stage['seconds'])}"
        axes.annotate(
            text, (stage["seconds"] / 60, row), xytext=(-4, 0), textcoords="offset points", ha="right", va="center",
            color="white", fontsize=8,
        )  # fmt: skip
    axes.set(xscale="log", xlim=(1, None), xlabel="minutes", yticks=range(len(stages)))
    axes.set_yticklabels([TITLES[name] for name in stages])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


# ------------------------------------------------------------------------------ hard stacks


def robustness_part(report: dict[str, Any], _images: Path) -> str:
    """Hard stacks: what becomes of them, and what the runs say of it."""
    settings = report["settings"]
    size = f"{settings['n_particles']:,} particles of {settings['box']} px of {settings['pixel_size']:g} Å"
    lines = [
        "## Hard stacks",
        "",
        f"{size} of `{settings['map']}`, one run a seed. A map is right if its FSC with the truth is "
        f"above 0.5 to {RIGHT_IN_ANGSTROMS:g} Å. {where(report)}",
        "",
        "| | runs | right maps | verdicts | within 5° | median error | false particles caught |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = (condition_cells(name, runs) for name in CONDITIONS if (runs := report["runs"].get(name)))
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    everything = [run for runs in report["runs"].values() for run in runs]
    wrong = [run for run in everything if run.get("verdict") == "solved" and not right(run)]
    return "\n".join(
        [
            *lines,
            "",
            f"Wrong maps that are called solved: {len(wrong)}. False particles are caught if their confidence is below "
            "what 95 % of the others have.",
            "",
        ]
    )


# ------------------------------------------------------------------------------ honesty


def honesty_part(report: dict[str, Any], images: Path) -> str:
    """Reported against true resolution, of stacks whose images go further than they resolve."""
    settings, found = report["settings"], claims(report)
    size = f"{settings['n_particles']:,} particles of {settings['box']} px of {settings['pixel_size']:g} Å"
    at_nyquist = sum(claim.true_shell >= settings["box"] // 2 for claim in found)
    draw_claims(found, images / "honest_fsc.png")
    return "\n".join(
        [
            "## Is the resolution true?",
            "",
            f"{size} of `{settings['map']}`, one run a seed. {summary_of(found)} {at_nyquist} of the "
            "maps are right up to the Nyquist limit of their images, where nothing can be told. Of a wrong map the "
            "truth bears out nothing, whatever its half maps say. Filled marks are runs that call their map solved. "
            f"{where(report)}",
            "",
            "![Resolution that runs report against the true one](images/honest_fsc.png)",
            "",
        ]
    )


def right(run: dict[str, Any]) -> bool:
    true = run.get("true_resolution_in_angstroms")
    return true is not None and true <= RIGHT_IN_ANGSTROMS


def condition_cells(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """The row of a condition: counts, and medians over the runs."""
    verdicts = Counter(verdict_of(run) for run in runs)
    poses = [run["poses"] for run in runs if "poses" in run]
    caught = [run["false_particles"]["caught"] for run in runs if run.get("false_particles")]
    return [
        WORDS[name],
        str(len(runs)),
        "–" if name == "noise_only" else str(sum(map(right, runs))),
        ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())),
        f"{median(p['within_5_degrees'] for p in poses):.1%}" if poses else "–",
        f"{median(p['median_rotation_error_in_degrees'] for p in poses):.2f}°" if poses else "–",
        f"{median(caught):.0%}" if caught else "–",
    ]


def verdict_of(run: dict[str, Any]) -> str:
    """What the run says of itself, or how it ended if it says nothing."""
    if run.get("verdict"):
        return str(run["verdict"])
    return "no verdict" if run["exit_status"] == 0 else f"exit status {run['exit_status']}"


def draw_claims(found: list[Claim], path: Path) -> None:
    """Reported against true shells; what lies above the band is too good to be true. Filled: it says it is solved."""
    figure, axes = plt.subplots(figsize=(5, 4.5), layout="constrained")
    top = max((max(claim.reported_shell, claim.true_shell) for claim in found), default=1) + 2
    axes.fill_between([0, top], [0, top], [1, top + 1], color="0.9", label="one shell")
    axes.plot([0, top], [0, top], color="0.5", linewidth=1)
    for number, name in enumerate(dict.fromkeys(claim.condition for claim in found)):
        those = [claim for claim in found if claim.condition == name]
        colour = f"C{number}"
        axes.scatter(
            [claim.true_shell for claim in those],
            [claim.reported_shell for claim in those],
            marker="osD^vP*Xph"[number % 10],
            edgecolors=colour,
            facecolors=[colour if claim.verdict == "solved" else "none" for claim in those],
            label=WORDS[name],
            clip_on=False,
        )
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="last shell with FSC 0.5 with the truth")
    axes.set_ylabel("last shell with FSC 0.143 of the half maps")
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of the library, so that the same results give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def write_page(peers: Path, robustness: Path, honesty: Path, out: Path) -> Path:
    """Write the page and its pictures below ``out``."""
    mpl.use("Agg")
    parts = [HEAD]
    for path, part in ((peers, peers_part), (robustness, robustness_part), (honesty, honesty_part)):
        if path.is_file():
            parts.append(part(json.loads(path.read_text()), out / "images"))
    page = out / "benchmarks.md"
    page.write_text("\n".join(parts))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--peers", type=Path, default=results / "peers_cpu.json")
    parser.add_argument("--robustness", type=Path, default=results / "robustness_cpu.json")
    parser.add_argument("--honesty", type=Path, default=results / "honest_fsc_cpu.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    print(write_page(given.peers, given.robustness, given.honesty, given.out))


if __name__ == "__main__":
    main()
