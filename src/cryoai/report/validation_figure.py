"""Figure: whether to believe a map - correlation of its halves beside the controls, orientations, confidence."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cryoai.formats.files import atomic_path
from cryoai.runs import FscColumns
from cryoai.validation.orientations import OrientationDistribution

__all__ = ["draw_validation"]

_BLUE, _GREY, _RED, _GREEN, _ORANGE = "#3b7dd8", "#8a8f98", "#c8452d", "#2f8f5b", "#d08a1d"


def draw_validation(
    path: Path,
    curves: FscColumns,
    pixel_size_in_angstroms: float,
    orientations: OrientationDistribution,
    confidence: Tensor | None,
    title: str,
) -> None:
    """Draw the correlations (n // 2 + 1,), the viewing directions, and the confidence (N,) if there is one."""
    n_panels = 2 if confidence is None else 3
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(1.2 + 4.6 * n_panels, 4.8), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        _draw_curves(figure.add_subplot(1, n_panels, 1), curves, pixel_size_in_angstroms)
        _draw_directions(figure.add_subplot(1, n_panels, 2, projection="mollweide"), orientations, figure)
        if confidence is not None:
            _draw_confidence(figure.add_subplot(1, n_panels, 3), confidence)
        figure.suptitle(title, fontsize=11)
        with atomic_path(path) as temporary:
            figure.savefig(temporary)


def _draw_curves(axis: Axes, curves: FscColumns, pixel_size_in_angstroms: float) -> None:
    styles: tuple[tuple[str, Tensor | None, str, str, float], ...] = (
        ("corrected for the mask", curves.fsc, _BLUE, "-", 2.4),
        ("within the mask", curves.masked, _GREY, "-", 1.2),
        ("without mask", curves.unmasked, _GREY, "--", 1.2),
        ("phases randomised", curves.phases_randomised, _RED, "-", 1.0),
        ("control: images of noise", curves.noise_only, _ORANGE, ":", 1.6),
        ("control: poses interchanged", curves.shuffled_poses, _GREEN, ":", 1.6),
    )
    n_shells = len(curves.fsc)
    extent = 2 * (n_shells - 1) * pixel_size_in_angstroms
    frequencies = np.arange(1, n_shells) / extent
    for name, curve, colour, line, width in styles:
        if curve is not None:
            values = curve[1:].double().cpu().numpy()
            axis.plot(frequencies, values, line, color=colour, linewidth=width, label=name)
    axis.axhline(0.143, color="black", linewidth=0.7, linestyle=(0, (2, 4)))
    axis.annotate("0.143", (1.0, 0.143), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axis.set_xlim(0, frequencies[-1])
    axis.set_ylim(-0.1, 1.04)
    shown = np.linspace(0, frequencies[-1], 6)[1:]
    axis.set_xticks(shown, [f"1/{1 / k:.3g}" for k in shown])
    axis.set_xlabel("spatial frequency (1/Å)")
    axis.set_ylabel("Fourier shell correlation of the half maps")
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_directions(axis: Axes, orientations: OrientationDistribution, figure: Figure) -> None:
    cells = orientations.cells.double().cpu().numpy()
    relative = orientations.counts.double().cpu().numpy()
    relative = relative / max(relative.mean(), 1e-9)
    longitude, latitude = np.arctan2(cells[:, 1], cells[:, 0]), np.arcsin(cells[:, 2].clip(-1, 1))
    points = axis.scatter(longitude, latitude, c=relative, s=26, cmap="viridis", vmin=0, vmax=max(2.0, relative.max()))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(f"viewing directions, {orientations.n_particles:,} particles", fontsize=10)
    figure.colorbar(points, ax=axis, orientation="horizontal", shrink=0.7, label="particles, relative to uniform")


def _draw_confidence(axis: Axes, confidence: Tensor) -> None:
    values = confidence.double().cpu().numpy()
    axis.hist(values, bins=40, range=(0, 1), color=_BLUE)
    axis.set_xlim(0, 1)
    axis.set_yscale("log")
    axis.set_ylim(0.5, 2 * len(values))
    axis.set_xlabel("confidence: probability that a pose is within 10°")
    axis.set_ylabel("particles")
    axis.set_title(f"{(values > 0.5).mean():.1%} of the poses more likely right than wrong", fontsize=10)
