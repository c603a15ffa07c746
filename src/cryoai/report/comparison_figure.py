"""Figure: how two results differ - rotations and shifts of their particles, shells of their maps."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cryoai.comparison import AlignedMaps, Comparison, MapComparison, PoseComparison
from cryoai.errors import InputError
from cryoai.formats.files import atomic_path

__all__ = ["draw_comparison"]

_FORMATS = (".png", ".pdf", ".svg")
_BLUE, _GREY, _RED = "#3b7dd8", "#8a8f98", "#c8452d"
_SMALLEST_ROTATION = 0.1  # degrees; smaller errors are counted there


def draw_comparison(path: Path, comparison: Comparison) -> None:
    """Draw histograms of the rotation and shift errors, and the Fourier shell correlation; what there is of them.

    Raises
    ------
    InputError
        If the suffix is none of a picture.
    """
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"{path}: pictures are written as .png, .pdf or .svg; give a name that ends so")
    poses, maps = comparison.poses, comparison.maps
    n_panels = (2 if poses is not None else 0) + (1 if maps is not None else 0)
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(1.8 + 4.2 * n_panels, 4.6), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(1, n_panels, squeeze=False)[0])
        if poses is not None:
            _draw_rotations(panels[0], poses)
            _draw_shifts(panels[1], poses)
        if maps is not None:
            _draw_fsc(panels[-1], maps)
        hand = ", mirrored," if comparison.frame.mirrored else ""
        figure.suptitle(f"{_short(comparison.first)}{hand} against\n{_short(comparison.second)}", fontsize=11)
        with atomic_path(path) as temporary:
            figure.savefig(temporary)


def _short(path: Path) -> str:
    """The end of a path, as much as a title has room for."""
    name = str(path)
    return name if len(name) <= 56 else f"…{name[-55:]}"


def _draw_rotations(axis: Axes, poses: PoseComparison) -> None:
    values = poses.rotation_errors_in_degrees.double().numpy()
    bins = np.geomspace(_SMALLEST_ROTATION, 180, 50)
    axis.hist(values.clip(_SMALLEST_ROTATION, 180), bins=list(bins), color=_BLUE)
    axis.set_xscale("log")
    axis.set_xlim(_SMALLEST_ROTATION, 180)
    ticks = [0.1, 0.3, 1, 3, 10, 30, 180]
    axis.set_xticks(ticks, ["≤ 0.1", *(f"{tick:g}" for tick in ticks[1:])])
    axis.minorticks_off()
    axis.set_xlabel("difference in rotation (degrees)")
    axis.set_ylabel("particles")
    errors = poses.errors
    _mark_median(axis, errors.median_rotation_error_in_degrees, "°")
    axis.set_title(
        f"{errors.n_particles:,} particles: {errors.within_5_degrees:.1%} within 5°, "
        f"{errors.within_10_degrees:.1%} within 10°",
        fontsize=10,
    )


def _draw_shifts(axis: Axes, poses: PoseComparison) -> None:
    values = poses.shift_errors_in_angstroms.double().numpy()
    # The last bin holds the few that are far out.
    limit = max(float(np.quantile(values, 0.99)) * 1.1, 0.1)
    axis.hist(values.clip(0, limit), bins=50, range=(0, limit), color=_BLUE)
    axis.set_xlabel("difference in shift (Å)")
    axis.set_ylabel("particles")
    axis.set_xlim(0, limit)
    _mark_median(axis, poses.errors.median_shift_error_in_angstroms, " Å")
    beyond = float((values > limit).mean())
    axis.set_title(f"{beyond:.1%} beyond, in the last bar" if beyond else "shifts", fontsize=10)


def _mark_median(axis: Axes, median: float, unit: str) -> None:
    axis.axvline(median, color=_RED, linewidth=1.2, label=f"median {median:.2f}{unit}")
    axis.legend(frameon=False, loc="upper right")


def _draw_fsc(axis: Axes, maps: MapComparison) -> None:
    extent = maps.n_pixels * maps.pixel_size_in_angstroms
    for aligned, colour, name in ((maps.best, _BLUE, "this hand"), (maps.other_hand, _GREY, "the other hand")):
        fsc = aligned.errors.fsc.double().numpy()
        axis.plot(
            np.arange(len(fsc)) / extent, fsc, color=colour, label=f"{name}: {_resolutions(aligned)}", linewidth=1.8
        )
    for threshold in (0.5, 0.143):
        axis.axhline(threshold, color=_RED, linewidth=0.8, linestyle=":")
        axis.annotate(f"{threshold:g}", (1.0, threshold), xycoords=("axes fraction", "data"), color=_RED, va="center")
    last = maps.n_pixels // 2 / extent
    axis.set_xlim(0, last)
    axis.set_ylim(min(-0.05, float(maps.best.errors.fsc.min())), 1.04)
    shown = np.linspace(0, last, 6)[1:]
    axis.set_xticks(shown, [f"1/{1 / k:.3g}" for k in shown])
    axis.set_xlabel("spatial frequency (1/Å)")
    axis.set_ylabel("Fourier shell correlation")
    how = "in the frame of the poses" if maps.framed_by_poses else "aligned with each other"
    axis.set_title(f"maps, {how}", fontsize=10)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), fontsize=9)


def _resolutions(aligned: AlignedMaps) -> str:
    found = aligned.errors
    periods = (found.resolution_at_half_in_angstroms, found.resolution_at_0143_in_angstroms)
    return ", ".join(
        f"{threshold} at {period:.1f} Å" if np.isfinite(period) else f"never above {threshold}"
        for threshold, period in zip(("0.5", "0.143"), periods, strict=True)
    )
