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

__all__ = ["NoiseSpectrum", "log_likelihood"]


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
