"""Figures: particles beside the map that came out of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from cryoai.formats.files import atomic_path
from cryoai.formats.mrc import MrcMap

__all__ = ["draw_particles_and_map"]

_LIGHT = np.array([-0.4, -0.5, 0.77])


def draw_particles_and_map(path: Path, images: NDArray[np.float32], density: MrcMap, title: str) -> None:
    """Write a PNG: up to 12 particle images on the left, two views of the map's surface on the right.

    ``images`` are (m, n, n). The surface encloses the voxels of the highest density that hold most of
    the positive mass.
    """
    with mpl.rc_context({"font.size": 11, "axes.titlesize": 11}):
        figure = Figure(figsize=(12, 4.6), dpi=130)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1, 2, width_ratios=[1.05, 1.6])
        _draw_images(figure.add_subfigure(grid[0]), images[:12])
        _draw_surface(figure.add_subfigure(grid[1]), density, title)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_images(figure: SubFigure, images: NDArray[np.float32]) -> None:
    axes = figure.subplots(3, 4, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, images, strict=False):
        low, high = np.percentile(image, [1, 99])
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    figure.suptitle("particles")


def _draw_surface(figure: SubFigure, density: MrcMap, title: str) -> None:
    vertices, faces = _surface(density)
    limits = np.abs(vertices).max() * 0.72
    for column, (elevation, azimuth) in enumerate([(15, -60), (15, 30)]):
        axis = figure.add_subplot(1, 2, column + 1, projection="3d")
        assert isinstance(axis, Axes3D)
        triangles = vertices[faces]
        axis.add_collection3d(Poly3DCollection(triangles, facecolors=_shades(triangles), edgecolors="none"))
        axis.set(xlim=(-limits, limits), ylim=(-limits, limits), zlim=(-limits, limits))
        axis.view_init(elev=elevation, azim=azimuth)
        axis.set_box_aspect((1, 1, 1), zoom=1.35)
        axis.set_axis_off()
    figure.subplots_adjust(left=0, right=1, bottom=0, top=0.95, wspace=0)
    figure.suptitle(title)


def _surface(density: MrcMap) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vertices (v, 3), (x, y, z) in Å about the centre, and faces (f, 3)."""
    values = density.density
    level = _level(values)
    zyx, faces, _, _ = marching_cubes(values, level)
    xyz = (zyx[:, ::-1] - values.shape[0] // 2) * density.pixel_size_in_angstroms
    return xyz, faces


def _level(values: NDArray[np.float32]) -> float:
    """Threshold above which lies four fifths of the density that stands out of the background."""
    spread = 1.4826 * np.median(np.abs(values - np.median(values)))
    signal = np.sort(values[values > 3 * spread])
    if len(signal) < 10:
        return float((values.min() + values.max()) / 2)
    mass = np.cumsum(signal[::-1])
    return float(signal[::-1][np.searchsorted(mass, 0.8 * mass[-1])])


def _shades(triangles: NDArray[np.float64]) -> NDArray[np.float64]:
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(min=1e-12)
    # Faces are lit from both sides: the orientation of marching cubes' triangles does not matter.
    brightness = 0.35 + 0.65 * np.abs(normals @ (_LIGHT / np.linalg.norm(_LIGHT)))
    return np.clip(brightness[:, None] * np.array([0.36, 0.62, 0.86]), 0, 1)
