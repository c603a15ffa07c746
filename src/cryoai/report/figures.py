"""Figures: particles beside the map that came out of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from cryoai.formats.files import atomic_path
from cryoai.formats.mrc import MrcMap
from cryoai.fourier import resize_map

__all__ = ["draw_particles_and_map", "render_surface"]

_LIGHT = np.array([-0.45, -0.55, -0.7])  # (x, y, z); the viewer looks along +z
_SHOWN = 0.75  # of the box; particles end well within it
_COLOUR = np.array([0.36, 0.62, 0.86])


def draw_particles_and_map(path: Path, images: NDArray[np.float32], density: MrcMap, title: str) -> None:
    """Write a PNG: up to 12 particle images on the left, two views of the map's surface on the right.

    ``images`` are (m, n, n).
    """
    with mpl.rc_context({"font.size": 11}):
        figure = Figure(figsize=(12, 4.4), dpi=130)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1, 2, width_ratios=[1.15, 1.6], wspace=0)
        _draw_images(figure.add_subfigure(grid[0]), images[:12])
        _draw_views(figure.add_subfigure(grid[1]), density, title)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_images(figure: SubFigure, images: NDArray[np.float32]) -> None:
    axes = figure.subplots(3, 4, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=0.9)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, images, strict=False):
        low, high = np.percentile(image, [1, 99])
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    figure.suptitle("particles")


def _draw_views(figure: SubFigure, density: MrcMap, title: str) -> None:
    for axis, turn in zip(figure.subplots(1, 2), (0.0, 90.0), strict=True):
        axis.imshow(render_surface(density.density, Rotation.from_euler("xy", [20, turn], degrees=True)))
        axis.set_axis_off()
    figure.subplots_adjust(left=0, right=1, bottom=0, top=0.92, wspace=0)
    figure.suptitle(title)


def render_surface(density: NDArray[np.float32], view: Rotation, *, n_pixels: int = 300) -> NDArray[np.float64]:
    """Picture (m, m, 4), RGBA, of the surface of a map (n, n, n) turned by ``view``, seen along z.

    The surface encloses the densest voxels that hold three fifths of the mass above the background. It
    is shaded by its normals, and darker the further away.
    """
    # Fourier padding: a smooth surface needs more than one voxel a pixel.
    fine = resize_map(torch.from_numpy(density), max(density.shape[0], 128)).numpy()
    turned = _turned(fine, view, n_pixels)
    level = _level(fine)
    inside = turned > level
    hit = inside.any(axis=0)
    front = inside.argmax(axis=0)
    normals = _normals(turned, front)
    light = _LIGHT / np.linalg.norm(_LIGHT)
    brightness = 0.25 + 0.75 * np.clip(normals @ light, 0, 1)
    depth = front / n_pixels
    fog = 1 - 0.6 * (depth - depth[hit].min(initial=1.0))
    picture = np.zeros((n_pixels, n_pixels, 4))
    picture[..., :3] = np.clip((brightness * fog)[..., None] * _COLOUR * 1.15, 0, 1)
    picture[..., 3] = hit
    return picture


def _turned(density: NDArray[np.float32], view: Rotation, n_pixels: int) -> NDArray[np.float32]:
    """The map resampled on a turned grid of ``n_pixels`` voxels a side, centre on centre."""
    n = density.shape[0]
    matrix = view.as_matrix()[::-1, ::-1] * (_SHOWN * n / n_pixels)  # for axes (z, y, x)
    centre = np.full(3, n_pixels // 2)
    result: NDArray[np.float32] = affine_transform(
        density, matrix, offset=n // 2 - matrix @ centre, output_shape=(n_pixels,) * 3, order=1
    )
    return result


def _normals(turned: NDArray[np.float32], front: NDArray[np.int64]) -> NDArray[np.float64]:
    """Unit normals (m, m, 3), (x, y, z), that point to where the density falls."""
    n = len(turned)
    y, x = np.indices(front.shape)
    step = 2  # voxels; a little smoothing

    def fall(dz: int, dy: int, dx: int) -> NDArray[np.float64]:
        behind = np.clip(front - dz, 0, n - 1), np.clip(y - dy, 0, n - 1), np.clip(x - dx, 0, n - 1)
        ahead = np.clip(front + dz, 0, n - 1), np.clip(y + dy, 0, n - 1), np.clip(x + dx, 0, n - 1)
        return turned[behind].astype(np.float64) - turned[ahead]

    normals = np.stack([fall(0, 0, step), fall(0, step, 0), fall(step, 0, 0)], axis=-1)
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True).clip(min=1e-12)


def _level(values: NDArray[np.float32]) -> float:
    """Threshold above which lies three fifths of the density that stands out of the background."""
    spread = 1.4826 * np.median(np.abs(values - np.median(values)))
    signal = np.sort(values[values > 3 * spread])[::-1]
    if len(signal) < 10:
        return float((values.min() + values.max()) / 2)
    mass = np.cumsum(signal, dtype=np.float64)
    return float(signal[np.searchsorted(mass, 0.6 * mass[-1])])
