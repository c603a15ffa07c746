"""Resolution that differs from place to place: half maps compared in many small windows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cryoai.fourier import shell_mean, shell_sum, shells_of_volume, soft_sphere, transform_map
from cryoai.validation.shells import check_one_size, scaled_shells

__all__ = ["local_resolution"]

_WINDOW_IN_ANGSTROMS = 75.0
_LEAST_WINDOW_IN_PIXELS = 20
_CENTRES_A_WINDOW = 6
_THRESHOLD = 0.5
_INSIDE = 0.5
_VOXELS_AT_ONCE = 1 << 22


def local_resolution(first: Tensor, second: Tensor, mask: Tensor, pixel_size_in_angstroms: float) -> Tensor:
    """Local resolution (n, n, n) in Å from half maps (n, n, n), where the mask (n, n, n) is at least one half.

    The shells of both maps are scaled to one power, so that strong low frequencies do not leak into their neighbours.
    Around each centre of a coarse grid the maps are cut out under a spherical Hann window, 75 Å and at least 20 pixels
    wide, and their Fourier shell correlation gives the frequency, between two shells if need be, at which it first
    falls below 0.5 (Cardone, Heymann & Steven, J. Struct. Biol. 2013). Frequencies are interpolated trilinearly
    between the centres. Details finer than half of the window are not told apart.

    Returns
    -------
    (n, n, n)
        NaN outside the mask, where nothing was measured; infinite where it was and the halves share nothing.

    Raises
    ------
    ValueError
        If the maps and the mask differ in shape.
    """
    check_one_size(first, second, mask)
    n = first.shape[-1]
    width = max(_LEAST_WINDOW_IN_PIXELS, 2 * math.ceil(_WINDOW_IN_ANGSTROMS / pixel_size_in_angstroms / 2))
    width = min(width, n // 2 * 2)
    spacing = max(1, width // _CENTRES_A_WINDOW)
    needed = _needed_centres(mask >= _INSIDE, spacing)
    # Centre i is at voxel i * spacing, which the padding makes the middle of the window that starts there.
    before, after = width // 2, width // 2 + needed.shape[0] * spacing - n
    whitened = [F.pad(density, (before, after) * 3) for density in _whitened(first, second)]
    coarse = torch.zeros(needed.shape, device=first.device)
    corners = needed.nonzero() * spacing
    found = [
        _agreeing_frequency(*(_windows(density, part, width) for density in whitened))
        for part in corners.split(max(1, _VOXELS_AT_ONCE // width**3))
        if len(part)
    ]
    coarse[needed] = torch.cat(found) if found else coarse.new_zeros(0)
    size = (needed.shape[0] - 1) * spacing + 1
    frequencies = F.interpolate(coarse[None, None], size=(size,) * 3, mode="trilinear", align_corners=True)[0, 0]
    periods = pixel_size_in_angstroms / frequencies[:n, :n, :n]
    return torch.where(mask >= _INSIDE, periods, math.nan)


def _needed_centres(inside: Tensor, spacing: int) -> Tensor:
    """Which centres (m, m, m) of the coarse grid are corners of a cell with a voxel (n, n, n) inside."""
    n = inside.shape[-1]
    n_cells = math.ceil((n - 1) / spacing)
    padded = F.pad(inside.float(), (0, n_cells * spacing + 1 - n) * 3)
    # A cell holds the voxels of both of its faces, so that centre i serves i - 1 to i + 1.
    reach = 2 * spacing - 1
    return F.max_pool3d(padded[None, None], reach, stride=spacing, padding=spacing - 1)[0, 0] > 0


def _whitened(first: Tensor, second: Tensor) -> list[Tensor]:
    """Both maps (n, n, n), every shell divided by the root mean square of both."""
    n = first.shape[-1]
    shells, weights = shells_of_volume(n, device=first.device)
    inside = weights > 0
    power = sum(
        shell_mean(transform_map(m)[inside].abs().square(), shells[inside], n // 2 + 1) for m in (first, second)
    )
    assert isinstance(power, Tensor)
    power[0] = 0
    factors = torch.where(power > 1e-12 * power.max(), power.clamp_min(1e-30).rsqrt(), 0)
    return [scaled_shells(density, factors) for density in (first, second)]


def _windows(density: Tensor, corners: Tensor, width: int) -> Tensor:
    """Cubes (B, width, width, width) of a map from their first voxels (B, 3), under a Hann window."""
    j = torch.arange(width, device=density.device)
    z, y, x = (corner[:, None] + j for corner in corners.T)
    cubes = density[z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]
    return cubes * soft_sphere(width, 0, width / 2, device=density.device)


def _agreeing_frequency(first: Tensor, second: Tensor) -> Tensor:
    """Frequency (B,), in cycles per pixel, at which the correlation of windows (B, w, w, w) first falls below 0.5."""
    width = first.shape[-1]
    shells, weights = shells_of_volume(width, device=first.device)
    inside = weights > 0
    shells, weights = shells[inside], weights[inside].to(first)
    a, b = (
        torch.fft.fftshift(torch.fft.rfftn(windows, dim=(1, 2, 3)), dim=(1, 2))[:, inside]
        for windows in (first, second)
    )

    def total(values: Tensor) -> Tensor:
        return shell_sum(values * weights, shells, width // 2 + 1)[:, 1:]

    power = total(a.abs().square()) * total(b.abs().square())
    fsc = total((a * b.conj()).real) / power.sqrt().clamp_min(1e-30)
    return _crossing(fsc) / width


def _crossing(fsc: Tensor) -> Tensor:
    """Shell (B,), between two if need be, where correlations (B, S) of shells 1 to S first fall below 0.5.

    0 if the first shell is below it, S if none is.
    """
    n_shells = fsc.shape[1]
    below = fsc < _THRESHOLD
    last = torch.where(below.any(1), below.int().argmax(1), n_shells)
    upper = fsc.gather(1, (last - 1).clamp_min(0)[:, None])[:, 0]
    lower = fsc.gather(1, last.clamp_max(n_shells - 1)[:, None])[:, 0]
    # How far the correlation falls towards the next shell before it is below.
    part = (upper - _THRESHOLD) / (upper - lower).clamp_min(1e-12)
    return torch.where((last > 0) & (last < n_shells), last + part, last.to(fsc))
