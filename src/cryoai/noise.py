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

__all__ = ["NoiseSpectrum", "fit_z_scores", "log_likelihood"]


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
