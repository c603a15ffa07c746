"""Commands that set results side by side, and that mirror one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from cryoai.commands.flags import require
from cryoai.comparison import compare
from cryoai.formats.files import atomic_path, make_empty_folder
from cryoai.hand import flip_hand
from cryoai.report.comparison_figure import draw_comparison
from cryoai.runs import RunFolder

__all__ = ["compare_results", "flip_hand_of_run"]


def compare_results(
    first: Path,
    second: Path,
    *,
    out: Path | None = None,
    plot: Path | None = None,
    csv_file: Annotated[Path | None, Parameter(name="--csv")] = None,
    extent: float | None = None,
    passthrough: Annotated[tuple[Path, ...], Parameter(negative="")] = (),
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Compare two results: runs, particle files with poses, or maps.

    The first is brought into the frame of the second: rotation, shift and hand, which images leave open. Particles are
    matched by the names of their images; where a file has no names, by row.

    Parameters
    ----------
    first
        Run folder, STAR file, cryoSPARC dataset, cryoDRGN's pose.pkl, or map.
    second
        Likewise; any box and pixel size.
    out
        New folder for comparison.json, comparison.png and, if there are particles, errors.csv.
    plot
        Picture to write: .png, .pdf or .svg.
    csv_file
        Table of the errors of every particle to write.
    extent
        Side of the images in Å, of which cryoDRGN's shifts are fractions; needed if nothing else tells it.
    passthrough
        Further cryoSPARC dataset with the image names that the one given lacks; can be given more than once.
    as_json
        Print JSON in place of a table.
    """
    require(extent is None or 0 < extent < math.inf, f"--extent {extent}: must be positive and finite")
    comparison = compare(first, second, extent_in_angstroms=extent, passthrough=passthrough)
    report = json.dumps(comparison.as_json(), indent=2, allow_nan=False)
    if out is not None:
        make_empty_folder(out)
        with atomic_path(out / "comparison.json") as temporary:
            temporary.write_text(report + "\n", encoding="utf-8")
        draw_comparison(out / "comparison.png", comparison)
        if comparison.poses is not None:
            comparison.write_csv(out / "errors.csv")
    if plot is not None:
        draw_comparison(plot, comparison)
    if csv_file is not None:
        comparison.write_csv(csv_file)
    print(report if as_json else comparison)


def flip_hand_of_run(run_dir: Path) -> None:
    """Give a finished run the other hand: map, half maps, poses, encoder and volume are mirrored together.

    Images alone cannot tell the hand. Flipped again, every file is what it was to the last byte.

    Parameters
    ----------
    run_dir
        Folder of a finished run.
    """
    print(flip_hand(RunFolder.open(run_dir)))
