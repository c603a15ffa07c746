"""The noise of the images and the likelihood it implies.

Noise is Gaussian, independent between coefficients, with one variance per shell:
``log p(y | X) = - sum_k |y_k - X_k|^2 / s_k^2 + const`` over the half disc.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.fourier import shell_mean
from cryoai.imaging import ImagingModel

__all__ = ["Fit", "NoiseSpectrum", "fit_z_scores", "log_likelihood"]


@dataclass(frozen=True, eq=False)
class NoiseSpectrum:
    """Variance (n_shells,) of the noise in every shell of the images."""

    variance: Tensor

    @classmethod
    def of_residuals(cls, residuals: Tensor, imaging: ImagingModel) -> NoiseSpectrum:
        """Mean power per shell of complex residuals (B, p)."""
        power = residuals.abs().square().mean(0)
        return cls(shell_mean(power, imaging.shells, imaging.max_radius + 1))

    def precision(self, imaging: ImagingModel) -> Tensor:
        """Weight (p,) of every coefficient in a squared distance: ``1 / s^2``, and 0 at the origin.

        The origin is left out because the mean of an image was subtracted with its background.
        """
        precision = 1 / self.variance[imaging.shells]
        return torch.where(imaging.shells > 0, precision, 0.0)

    def blended(self, other: NoiseSpectrum, weight: float) -> NoiseSpectrum:
        """Move the shells that ``other`` has a fraction ``weight`` of the way towards it."""
        n = len(other.variance)
        variance = self.variance.clone()
        variance[:n].lerp_(other.variance, weight)
        return NoiseSpectrum(variance)


def log_likelihood(observed: Tensor, predicted: Tensor, precision: Tensor) -> Tensor:
    """Log-likelihood (...), up to a constant, of coefficients (..., p) given their prediction."""
    return -((observed - predicted).abs().square() * precision).sum(-1)


def fit_z_scores(observed: Tensor, predicted: Tensor, precision: Tensor) -> Tensor:
    """How well coefficients (..., p) fit a prediction, compared with those that it is right for.

    Over an empty image a prediction ``X`` gains ``2 Re <y, X> - |X|^2`` in log-likelihood (products
    weighted by the precision). For images of ``X`` itself that is normal with mean ``|X|^2`` and
    variance ``2 |X|^2``; the result (...) is the distance from that mean in standard deviations: near
    zero where the prediction is right, very negative for a wrong pose, another molecule or noise.

    Examples
    --------
    >>> import torch
    >>> predicted = 10 * torch.ones(1, 4, dtype=torch.complex64)
    >>> fit_z_scores(torch.cat([predicted, 0 * predicted]), predicted, torch.ones(4)).round(decimals=1)
    tensor([  0.0000, -28.3000])
    """
    energy = (predicted.abs().square() * precision).sum(-1)
    gain = 2 * ((observed * predicted.conj()).real * precision).sum(-1) - energy
    return (gain - energy) / (2 * energy).sqrt().clamp_min(1e-6)


@dataclass(frozen=True, eq=False)
class Fit:
    """How images and their predictions fit each other.

    Attributes
    ----------
    z_scores : (N,)
        See :func:`fit_z_scores`.
    energies : (N,)
        Of the predictions, over the noise: the log-likelihood that a right one gains on average.
    noise_scales : (N,)
        Mean power of what is left, over that of the noise: 1 where the noise is as in the other images.
    """

    z_scores: Tensor
    energies: Tensor
    noise_scales: Tensor

    @classmethod
    def of(cls, observed: Tensor, predicted: Tensor, precision: Tensor) -> Fit:
        """Of coefficients (N, p) and their prediction."""
        energies = (predicted.abs().square() * precision).sum(-1)
        residuals = -log_likelihood(observed, predicted, precision) / (precision > 0).sum()
        return cls(fit_z_scores(observed, predicted, precision), energies, residuals)

    @classmethod
    def blank(cls, n: int, device: torch.device | str) -> Fit:
        """A table for n images; not a number."""
        return cls(*torch.full((3, n), torch.nan, device=device))

    def assign(self, rows: Tensor, found: Fit) -> None:
        """Write what was found for some images into this table, in place."""
        index = rows.to(self.z_scores.device)
        for name, table in vars(self).items():
            table[index] = getattr(found, name)

    def __getitem__(self, index: Tensor) -> Fit:
        return Fit(self.z_scores[index], self.energies[index], self.noise_scales[index])
