"""The contrast of the images: whether protein is bright or dark, and how strong it is in each optics group."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryoai.fourier import FourierDisc, shell_mean
from cryoai.optics import Optics, contrast_transfer_function

__all__ = ["ContrastSign", "PowerOfGroups", "correlate_with_blob", "decide_sign"]

# The shells in which a particle of half the box differs from noise.
_LAST_SHELL = 8
_LARGEST_SCALE = 5.0
# In standard errors of the mean, and in standard deviations of one image.
_CLEAR_Z_SCORE, _CLEAR_CORRELATION = 8.0, 0.5
_CLEAR_SEARCH = 8.0


@dataclass(frozen=True)
class ContrastSign:
    """Whether protein is bright (+1) or dark (-1) in the images, and how sure the data are.

    ``z_score`` is the mean correlation of the images with a blob seen through their CTF, in
    standard errors; it is positive where protein is bright. ``search_z_score`` is the same of the
    log-likelihood that a search gains from bright protein over dark, None if there was no search.
    """

    sign: int
    z_score: float
    search_z_score: float | None = None

    def is_clear(self, n_particles: int) -> bool:
        """Whether the search with both signs decided it, or the statistics of the images did.

        Those are clear if neither chance nor, where images are many, a slight gradient of the ice explains them.
        """
        if self.search_z_score is not None and abs(self.search_z_score) > _CLEAR_SEARCH:
            return True
        return abs(self.z_score) > max(_CLEAR_Z_SCORE, _CLEAR_CORRELATION * math.sqrt(n_particles))

    def stated(self, sign: int | None) -> ContrastSign:
        """The same statistics with the sign that was given; where none was, with that which they speak for."""
        return replace(self, sign=sign or (-1 if self.z_score < 0 else 1))


def correlate_with_blob(coefficients: Tensor, optics: Optics, disc: FourierDisc) -> Tensor:
    """Correlation (B,) of each image (B, P) with a centred ball seen through its CTF."""
    p = disc.n_coefficients(_LAST_SHELL)
    ctf = contrast_transfer_function(optics, disc, _LAST_SHELL)
    # Gaussian of standard deviation n / 7, the size of a large particle in its box: of such a one the
    # transform is negative from two Fourier pixels on, where a smaller blob would look for it.
    blob = torch.exp(-2 * (math.pi * disc.radii[:p] / 7) ** 2)
    power = (coefficients[:, :p].abs() ** 2).mean(0)
    return (coefficients[:, :p].real * ctf * blob / power).sum(1)


def decide_sign(correlations: Tensor, sign: int | None) -> ContrastSign:
    """The sign that the correlations (N,) speak for, if none is given."""
    z_score = 0.0
    if len(correlations) > 1:
        deviation, mean = torch.std_mean(correlations)
        z_score = float(mean / (deviation / math.sqrt(len(correlations))).clamp_min(1e-12))
    return ContrastSign(1, z_score).stated(sign)


class PowerOfGroups:
    """Mean power of the images and of their CTF by optics group, gathered batch by batch.

    Images are normalised by their noise. Where microscopes differ, the same molecule is stronger over
    the noise in one group than in another: :meth:`scales` says by how much.
    """

    def __init__(self, group: Tensor, disc: FourierDisc) -> None:
        self._group = group
        self._n_groups = int(group.max()) + 1
        self._disc = disc
        self._shells = (disc.radii + 0.5).floor().long()
        self._n_shells = disc.max_radius + 1
        self._power = torch.zeros(self._n_groups, self._n_shells, device=disc.device)
        self._ctf = torch.zeros_like(self._power)
        self._n_images = torch.zeros(self._n_groups, 1, device=disc.device)

    def add(self, indices: Tensor, coefficients: Tensor, optics: Optics) -> None:
        """Count images (B, P) of the particles ``indices`` (B,)."""
        if self._n_groups == 1:
            return
        power = shell_mean(coefficients.abs().square(), self._shells, self._n_shells)
        ctf = contrast_transfer_function(optics, self._disc).square()
        group = self._group[indices.cpu()].to(power.device)
        self._power.index_add_(0, group, power)
        self._ctf.index_add_(0, group, shell_mean(ctf, self._shells, self._n_shells))
        self._n_images.index_add_(0, group, torch.ones(len(group), 1, device=power.device))

    def scales(self) -> Tensor:
        """Strength (N,) of the signal in the images of each particle, one in the largest group.

        The signal is the power above that of the outermost quarter of the shells; divided by the power
        of the CTF, it is the same for all groups but for the square of the scale.
        """
        if self._n_groups == 1:
            return torch.ones(len(self._group))
        n = self._n_images.clamp_min(1)
        power, ctf = self._power / n, self._ctf / n
        noise = power[:, 3 * self._n_shells // 4 :].mean(dim=1, keepdim=True)
        inner = slice(2, _LAST_SHELL + 1)
        signal = (power - noise)[:, inner]
        largest = int(self._n_images.argmax())
        expected = signal[largest] / ctf[largest, inner].clamp_min(1e-3) * ctf[:, inner]
        squared = (signal * expected).sum(dim=1) / expected.square().sum(dim=1).clamp_min(1e-12)
        limits = 1 / _LARGEST_SCALE**2, _LARGEST_SCALE**2
        return squared.clamp(*limits).sqrt().cpu()[self._group]
