"""The one home of conventions: centred Fourier transforms, the half disc, the half lattice, shells.

Arrays are indexed ``[z, y, x]`` and the centre of a box of ``n`` pixels is index ``n // 2``.
Frequencies are in cycles per pixel, ordered ``(x, y)`` or ``(x, y, z)``; a *Fourier pixel* is
``1 / n`` cycles per pixel, and radii are measured in Fourier pixels. With ``c = n // 2`` the
transforms are

* of an image:  ``F(k) = 1/n   sum_r image(r)   exp(-2 pi i k . (r - c))``
* of a map:     ``V(k) = 1/n   sum_r density(r) exp(-2 pi i k . (r - c))``

so that white noise of unit variance has coefficients of unit variance whatever the box, and the
central slice of ``V`` *is* the transform of the projection, without a factor.

Real images have Hermitian transforms, ``F(-k) = conj F(k)`` (Friedel's law), so that half of the
coefficients carry everything. :class:`FourierDisc` keeps that half in two dimensions, sorted by
radius; :class:`HalfLattice` keeps it in three, on a grid from which slices are interpolated and
into which they are inserted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FourierDisc",
    "HalfLattice",
    "fourier_shell_correlation",
    "invert_transform",
    "n_shells_above",
    "resize_map",
    "shell_mean",
    "shell_sum",
    "shells_of_volume",
    "soft_sphere",
    "transform_map",
    "translation_phases",
    "trilinear_falloff",
]


def _complex_dtype(real: torch.dtype) -> torch.dtype:
    return torch.complex128 if real == torch.float64 else torch.complex64


def _centring_phases(indices: Tensor, n_pixels: int, dtype: torch.dtype) -> Tensor:
    """Phases that move the origin of a transform from index 0 to index ``n // 2``."""
    # The product is an integer, and so is its remainder: the phase is exact for any box.
    turns = (indices.sum(-1) * (n_pixels // 2)) % n_pixels
    angle = turns.double() * (2 * math.pi / n_pixels)
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


@dataclass(frozen=True, eq=False)
class FourierDisc:
    """The independent Fourier coefficients of a square real image, sorted by radius.

    An image is a vector of ``n_coefficients`` complex numbers, those with ``kx > 0``, or
    ``kx = 0`` and ``ky >= 0``, and radius below ``n / 2``. Because they are sorted by radius, a
    band limit is a prefix, and so is Fourier cropping: the disc of a smaller box is the beginning
    of the disc of a larger one.

    Attributes
    ----------
    n_pixels
        Side of the image in pixels, odd or even.
    coordinates : (P, 2) float
        Frequency ``(kx, ky)`` of each coefficient in cycles per pixel.
    radii : (P,) float
        Length of the frequency in Fourier pixels, ascending.
    shells : (P,) int
        Radius rounded to the nearest integer.
    friedel_weights : (P,) float
        How many coefficients of the full transform each stands for: 1 at the origin, 2 elsewhere.
    indices : (P, 2) int
        Frequency ``(jx, jy)`` in Fourier pixels.

    Examples
    --------
    >>> disc = FourierDisc.of_box(64)
    >>> image = torch.randn(3, 64, 64)
    >>> coefficients = disc.from_images(image)
    >>> coefficients.shape == (3, disc.n_coefficients())
    True
    >>> band_limited = coefficients[..., : disc.n_coefficients(radius=12)]
    """

    n_pixels: int
    coordinates: Tensor
    radii: Tensor
    shells: Tensor
    friedel_weights: Tensor
    indices: Tensor
    _ends: tuple[int, ...]  # number of coefficients up to and including each shell

    @classmethod
    def of_box(
        cls, n_pixels: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> FourierDisc:
        """Build the disc of a box of ``n_pixels`` by ``n_pixels``.

        Raises
        ------
        ValueError
            If the box has fewer than four pixels.
        """
        if n_pixels < 4:
            raise ValueError(f"a Fourier disc needs a box of at least 4 pixels, got {n_pixels=}")
        half = (n_pixels + 1) // 2
        jy, jx = torch.meshgrid(torch.arange(-half, half + 1), torch.arange(half + 1), indexing="ij")
        jx, jy = jx.flatten(), jy.flatten()
        squared = jx**2 + jy**2
        keep = ((jx > 0) | (jy >= 0)) & (4 * squared < n_pixels**2)
        jx, jy, squared = jx[keep], jy[keep], squared[keep]
        # Ties are broken by the coordinates, never by the box: the prefix property needs it.
        order = torch.argsort(squared * (4 * half**2) + (jx * 2 * half + jy + half), stable=True)
        indices = torch.stack([jx, jy], dim=-1)[order]
        radii = squared[order].double().sqrt()
        shells = (radii + 0.5).floor().long()
        ends = torch.bincount(shells).cumsum(0).tolist()
        return cls(
            n_pixels=n_pixels,
            coordinates=(indices.double() / n_pixels).to(device, dtype),
            radii=radii.to(device, dtype),
            shells=shells.to(device),
            friedel_weights=torch.where(radii > 0, 2.0, 1.0).to(device, dtype),
            indices=indices.to(device),
            _ends=tuple(ends),
        )

    @property
    def max_radius(self) -> int:
        """The last shell."""
        return len(self._ends) - 1

    @property
    def device(self) -> torch.device:
        return self.coordinates.device

    def n_coefficients(self, radius: int | None = None) -> int:
        """Number of coefficients in shells 0 to ``radius`` (default: all)."""
        if radius is None:
            return self._ends[-1]
        return self._ends[max(0, min(radius, self.max_radius))]

    def from_images(self, images: Tensor) -> Tensor:
        """Transform images (..., m, m), ``m >= n``, to coefficients (..., P).

        A larger image is Fourier-cropped to the disc's box: its surplus frequencies are dropped.

        Raises
        ------
        ValueError
            If the images are not square or smaller than the disc's box.
        """
        m = images.shape[-1]
        if images.shape[-2] != m or m < self.n_pixels:
            raise ValueError(
                f"images must be square and at least {self.n_pixels} pixels wide, got {tuple(images.shape)}"
            )
        spectrum = torch.fft.rfft2(images)
        index = (self.indices[:, 1] % m) * (m // 2 + 1) + self.indices[:, 0]
        phases = _centring_phases(self.indices, m, spectrum.dtype) / m
        return spectrum.flatten(-2)[..., index] * phases

    def to_images(self, coefficients: Tensor) -> Tensor:
        """Transform coefficients (..., p), ``p <= P``, to images (..., n, n); the rest are zero."""
        n = self.n_pixels
        indices = self.indices[: coefficients.shape[-1]]
        phases = _centring_phases(indices, n, coefficients.dtype).conj() * n
        values = coefficients * phases
        spectrum = coefficients.new_zeros((*coefficients.shape[:-1], n * (n // 2 + 1)))
        spectrum[..., (indices[:, 1] % n) * (n // 2 + 1) + indices[:, 0]] = values
        # The column kx = 0 holds both signs of ky; the disc keeps only one of each pair.
        on_axis = torch.nonzero((indices[:, 0] == 0) & (indices[:, 1] > 0)).flatten()
        partner = (-indices[on_axis, 1] % n) * (n // 2 + 1)
        spectrum[..., partner] = values[..., on_axis].conj()
        return torch.fft.irfft2(spectrum.unflatten(-1, (n, n // 2 + 1)), s=(n, n))


def translation_phases(displacements_in_pixels: Tensor, coordinates: Tensor) -> Tensor:
    """Factors (..., P) that move the content of images by ``displacements`` (..., 2), ordered (x, y).

    ``exp(-2 pi i k . d)``: content at ``r`` moves to ``r + d``. ``coordinates`` (..., P, 2) are in
    cycles per pixel. A shift stored as RELION's origin displaces the content by minus the origin.

    Examples
    --------
    >>> disc = FourierDisc.of_box(8)
    >>> image = torch.zeros(8, 8); image[4, 4] = 1
    >>> moved = disc.from_images(image) * translation_phases(torch.tensor([2.0, -1.0]), disc.coordinates)
    >>> bool(disc.to_images(moved)[3, 6] == disc.to_images(moved).max())
    True
    """
    # cycles per pixel * pixels = cycles; radians = 2 pi * cycles
    cycles = (coordinates @ displacements_in_pixels[..., None])[..., 0]
    angle = cycles * (-2 * math.pi)
    return torch.complex(torch.cos(angle), torch.sin(angle))


def shell_sum(values: Tensor, shells: Tensor, n_shells: int) -> Tensor:
    """Sum values (..., P) over the members of each shell, giving (..., n_shells)."""
    result = values.new_zeros((*values.shape[:-1], n_shells))
    return result.index_add(-1, shells, values)


def shell_mean(values: Tensor, shells: Tensor, n_shells: int) -> Tensor:
    """Average values (..., P) over the members of each shell, giving (..., n_shells).

    Empty shells give zero.
    """
    counts = shell_sum(torch.ones_like(shells, dtype=values.dtype), shells, n_shells)
    return shell_sum(values, shells, n_shells) / counts.clamp_min(1)


# ------------------------------------------------------------------------------ three dimensions


def transform_map(density: Tensor, oversampling: int = 1) -> Tensor:
    """Centred half transform of a map (n, n, n), zero-padded ``oversampling`` times.

    Returns
    -------
    (N, N, N // 2 + 1) complex, ``N = n * oversampling``
        ``V(k)`` as in the head of this module, with z and y running from ``-(N // 2)`` upwards and
        x from 0, in steps of ``1 / N`` cycles per pixel.
    """
    n = density.shape[-1]
    size = n * oversampling
    before = size // 2 - n // 2
    padding = (before, size - n - before) * 3
    spectrum = torch.fft.rfftn(torch.fft.ifftshift(F.pad(density, padding))) / n
    return torch.fft.fftshift(spectrum, dim=(0, 1))


def invert_transform(spectrum: Tensor, n_pixels: int) -> Tensor:
    """Map (n, n, n) whose padded half transform is ``spectrum``; inverse of :func:`transform_map`."""
    size = spectrum.shape[0]
    padded = torch.fft.irfftn(torch.fft.ifftshift(spectrum, dim=(0, 1)), s=(size, size, size))
    before = size // 2 - n_pixels // 2
    inside = slice(before, before + n_pixels)
    return torch.fft.fftshift(padded)[inside, inside, inside] * n_pixels


def resize_map(density: Tensor, n_pixels: int) -> Tensor:
    """Map (n, n, n) of the same extent on ``n_pixels`` voxels a side: Fourier cropping or padding.

    The transform, in the normalisation of this module, keeps its values.
    """
    n = density.shape[-1]
    # An even box holds one of the two Nyquist planes: leave both out.
    lattice = HalfLattice(n, (min(n, n_pixels) - 1) // 2 - 1, 1)
    values = lattice.cut_out(transform_map(density))
    return invert_transform(replace(lattice, n_pixels=n_pixels).fill_in(values), n_pixels)


def shells_of_volume(n_pixels: int, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Shell and Friedel weight (n, n, n // 2 + 1) of each value of an unpadded half transform.

    The shell of a frequency is its radius in Fourier pixels rounded to the nearest integer, as in
    RELION and cryoSPARC. The weight is 2 where a value stands for its Friedel mate too, 1 on the
    plane x = 0, which holds both, and 0 from the Nyquist sphere outwards: the disc of an image ends
    there as well.
    """
    j = torch.arange(n_pixels, device=device) - n_pixels // 2
    x = torch.arange(n_pixels // 2 + 1, device=device)
    squared = j[:, None, None] ** 2 + j[:, None] ** 2 + x**2
    shells = (squared.double().sqrt() + 0.5).floor().long()
    weights = torch.where(4 * squared < n_pixels**2, 2.0, 0.0).double()
    weights[..., 0] /= 2
    return shells, weights


def soft_sphere(n_pixels: int, radius: float, edge: float, *, device: torch.device | str = "cpu") -> Tensor:
    """Mask (n, n, n): 1 within ``radius`` pixels of the centre, falling to 0 as a cosine over ``edge``."""
    j = torch.arange(n_pixels, device=device) - n_pixels // 2
    distance = (j[:, None, None] ** 2 + j[:, None] ** 2 + j**2).sqrt()
    ramp = ((distance - radius) / edge).clamp(0, 1)
    return 0.5 + 0.5 * torch.cos(math.pi * ramp)


def trilinear_falloff(n_pixels: int, oversampling: int, *, device: torch.device | str = "cpu") -> Tensor:
    """What trilinear interpolation of a transform does to the map (n, n, n): a product of sinc^2.

    Interpolating with a triangle one lattice step wide multiplies the map by the transform of the
    triangle; a map to be sliced is divided by it beforehand, an inserted one afterwards.
    """
    x = (torch.arange(n_pixels, device=device) - n_pixels // 2) / (n_pixels * oversampling)
    profile = torch.sinc(x) ** 2
    return profile[:, None, None] * profile[:, None] * profile


def fourier_shell_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Fourier shell correlation of two maps (n, n, n), for shells 0 to ``n // 2``.

    ``FSC(s) = Re sum_s F1 conj(F2) / sqrt(sum_s |F1|^2 sum_s |F2|^2)`` over hard shells of one
    Fourier pixel (Harauz & van Heel 1986), the definition of RELION and cryoSPARC.

    Raises
    ------
    ValueError
        If the maps differ in shape or are not cubes.

    Examples
    --------
    >>> density = torch.randn(16, 16, 16)
    >>> torch.allclose(fourier_shell_correlation(density, 3 * density), torch.ones(9, dtype=torch.float64))
    True
    """
    if first.shape != second.shape or first.ndim != 3 or len(set(first.shape)) != 1:
        raise ValueError(f"FSC needs two cubes of one size, got {tuple(first.shape)} and {tuple(second.shape)}")
    n = first.shape[0]
    shells, weights = shells_of_volume(n, device=first.device)
    inside = weights > 0
    shells, weights = shells[inside], weights[inside]
    a = transform_map(first.double())[inside]
    b = transform_map(second.double())[inside]

    def total(values: Tensor) -> Tensor:
        return shell_sum(values * weights, shells, n // 2 + 1)

    power = total(a.abs() ** 2) * total(b.abs() ** 2)
    return total((a * b.conj()).real) / power.sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def n_shells_above(correlation: Tensor, threshold: float) -> int:
    """Number of shells, from 1 on, before a correlation (n // 2 + 1,) first falls below the threshold.

    Examples
    --------
    >>> n_shells_above(torch.tensor([1.0, 0.9, 0.8, 0.3, 0.6]), 0.5)
    2
    """
    below = (correlation[1:] < threshold).nonzero().flatten()
    return int(below[0]) if len(below) else len(correlation) - 1


@dataclass(frozen=True)
class HalfLattice:
    """A regular grid over the half ``kx >= 0`` of Fourier space, out to a band limit.

    Points are interpolated from and inserted into the grid trilinearly; a point with ``kx < 0`` is
    served by its Friedel mate. Values are stored flat, in rows (n_points, channels), so that one
    gather (``embedding_bag``) reads all channels of a corner at once.

    Attributes
    ----------
    n_pixels
        Box of the map whose transform the grid samples.
    max_radius
        Band limit in Fourier pixels. The grid holds one more; reads outside it give zero, writes are dropped.
    oversampling
        Grid points per Fourier pixel, which is the factor of zero padding of the map.
    """

    n_pixels: int
    max_radius: int
    oversampling: int

    @property
    def half_width(self) -> int:
        # One spare Fourier pixel, so that the last shell (radius + 1/2) has all of its corners.
        return self.oversampling * (self.max_radius + 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of grid points along (z, y, x)."""
        m = self.half_width
        return (2 * m + 1, 2 * m + 1, m + 1)

    @property
    def n_points(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def _corner_offsets(self) -> list[int]:
        _, ny, nx = self.shape
        return [(dz * ny + dy) * nx + dx for dz in (0, 1) for dy in (0, 1) for dx in (0, 1)]

    def frequencies(self, *, device: torch.device | str = "cpu") -> Tensor:
        """Frequency (n_points, 3), ordered (x, y, z), of every grid point in cycles per pixel."""
        m = self.half_width
        full = torch.arange(-m, m + 1, device=device)
        z, y, x = torch.meshgrid(full, full, torch.arange(m + 1, device=device), indexing="ij")
        grid = torch.stack([x, y, z], dim=-1).reshape(-1, 3)
        return grid / (self.n_pixels * self.oversampling)

    def radii(self, *, device: torch.device | str = "cpu") -> Tensor:
        """Radius (n_points,) of every grid point in Fourier pixels."""
        return self.frequencies(device=device).double().norm(dim=-1).float() * self.n_pixels

    def _corners(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First grid row (M,), trilinear weights (8, M) and mirrored flags (M,) of points (M, 3).

        Axes of points come last in memory: a weight per corner and point is one contiguous pass.
        """
        m = self.half_width
        _, ny, nx = self.shape
        # grid steps = cycles per pixel * (pixels * steps per Fourier pixel)
        steps = points.T.contiguous() * (self.n_pixels * self.oversampling)
        mirrored = steps[0] < 0
        x, y, z = steps * torch.where(mirrored, -1.0, 1.0)
        inside = torch.maximum(torch.maximum(x, y.abs()), z.abs()) < m  # beyond it all weights are 0
        x, y, z = (torch.where(inside, t, 0.0) for t in (x, y + m, z + m))
        # Just inside the edge the addition of m can round up to the edge itself.
        x0, y0, z0 = (
            x.detach().floor(),
            y.detach().floor().clamp(max=2 * m - 1),
            z.detach().floor().clamp(max=2 * m - 1),
        )
        first = (z0.int() * ny + y0.int()) * nx + x0.int()
        fx, fy, fz = x - x0, y - y0, z - z0
        upper = torch.where(inside, fz, 0.0)
        lower = torch.where(inside, 1 - fz, 0.0)
        zy = torch.stack([lower - lower * fy, lower * fy, upper - upper * fy, upper * fy])
        zyx = torch.stack([zy - zy * fx, zy * fx], dim=1)
        return first, zyx.flatten(0, 1), mirrored

    def read(self, values: Tensor, points: Tensor) -> Tensor:
        """Interpolate complex ``values`` (n_points, C) at frequencies ``points`` (..., 3).

        Returns (..., C), complex. Differentiable in the values and in the points.
        """
        first, weights, mirrored = self._corners(points.reshape(-1, 3))
        offsets = torch.tensor(self._corner_offsets, dtype=torch.int32, device=points.device)
        table = torch.view_as_real(values).flatten(1)
        flat = F.embedding_bag(first[:, None] + offsets, table, per_sample_weights=weights.T.contiguous(), mode="sum")
        found = torch.view_as_complex(flat.unflatten(1, (-1, 2)))
        found = torch.where(mirrored[:, None], found.conj(), found)
        return found.reshape(*points.shape[:-1], -1)

    def insert(self, samples: Tensor, weights: Tensor, points: Tensor, into: Tensor) -> None:
        """Add samples (...), complex, and their weights (...) at frequencies (..., 3), in place.

        ``into`` (3, n_points) holds the real and imaginary part of the sum of the samples and the
        sum of the weights. The adjoint of :meth:`read` up to :meth:`fold`, which is due once after
        the last insertion.
        """
        first, corner_weights, mirrored = self._corners(points.reshape(-1, 3))
        offsets = torch.tensor(self._corner_offsets, device=points.device)
        rows = (first + offsets[:, None]).flatten()
        samples = samples.reshape(-1)
        imaginary = torch.where(mirrored, -samples.imag, samples.imag)
        # One channel at a time: scattering scalars is several times faster than scattering rows.
        for channel, values in zip(into, (samples.real, imaginary, weights.reshape(-1)), strict=True):
            channel.scatter_add_(0, rows, (corner_weights * values).flatten())

    def fold(self, sums: Tensor) -> Tensor:
        """Inserted sums (3, n_points) with Friedel symmetry restored on the plane x = 0.

        A sample beside that plane belongs, with its mate, to both halves of it.
        """
        grid = sums.reshape(3, *self.shape).clone()
        mates = grid[..., 0].flip(1, 2)
        grid[..., 0] += mates * torch.tensor([1.0, -1.0, 1.0], device=sums.device)[:, None, None]
        return grid.reshape(sums.shape)

    def cut_out(self, spectrum: Tensor) -> Tensor:
        """The grid's values (n_points,) out of the half transform of a padded map.

        ``spectrum`` comes from :func:`transform_map` with this oversampling.
        """
        size, m = spectrum.shape[0], self.half_width
        j = torch.arange(-m, m + 1, device=spectrum.device)
        # Of an even box the spectrum holds -N/2 but not +N/2, which equals it.
        rows = ((j + size // 2) % size)[j.abs() <= size // 2]
        reach = len(rows) // 2
        result = spectrum.new_zeros(self.shape)
        inside = slice(m - reach, m + reach + 1)
        columns = min(m, size // 2) + 1
        result[inside, inside, :columns] = spectrum[rows][:, rows, :columns]
        return result.flatten()

    def fill_in(self, values: Tensor) -> Tensor:
        """Half transform (N, N, N // 2 + 1) with the grid's values (n_points,), zero elsewhere."""
        size, m = self.n_pixels * self.oversampling, self.half_width
        reach = min(m, (size - 1) // 2)
        spectrum = values.new_zeros((size, size, size // 2 + 1))
        outer = slice(size // 2 - reach, size // 2 + reach + 1)
        inner = slice(m - reach, m + reach + 1)
        spectrum[outer, outer, : reach + 1] = values.reshape(self.shape)[inner, inner, : reach + 1]
        return spectrum
