"""The pose encoder of CryoAI: low-pass bank, convolutional network, rotation and shift heads.

Levy et al. (ECCV 2022), section 3.2 and supplement. Two things are added: several rotation heads, so
that an ambiguous image can be given several hypotheses, and a bound on the shift.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryoai.poses import Poses, rotations_from_s2s2

__all__ = ["GaussianLowPassBank", "PoseEncoder"]

# Convolutions and the pooling after each block of the published network (VGG16-like).
_BLOCKS = ((2, 1, nn.MaxPool2d), (2, 2, nn.MaxPool2d), (3, 4, nn.MaxPool2d), (2, 4, nn.AvgPool2d), (2, 4, nn.AvgPool2d))


class GaussianLowPassBank(nn.Module):
    """An image seen through five fixed Gaussians: images (B, n, n) to channels (B, 5, n, n).

    Kernels of 11 x 11 pixels with variances 0.01, 0.1, 1, 10 and 100 square pixels.
    """

    n_channels = 5

    def __init__(self) -> None:
        super().__init__()
        squared = torch.arange(-5, 6).square()
        variances = 0.01 * 10.0 ** torch.arange(self.n_channels)
        kernels = torch.exp(-(squared[:, None] + squared) / (2 * variances[:, None, None]))
        kernels = kernels / kernels.sum((1, 2), keepdim=True)
        self.register_buffer("kernels", kernels[:, None], persistent=False)
        self.kernels: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(F.pad(images[:, None], (5, 5, 5, 5), mode="reflect"), self.kernels)


class PoseEncoder(nn.Module):
    """Images (B, n, n) to ``n_hypotheses`` poses (B, M) each.

    Parameters
    ----------
    n_pixels
        Side of the images, at least 32.
    n_hypotheses
        Number of rotation heads; the published encoder has one.
    max_shift_in_angstroms
        Shifts are bounded to this in each axis.
    width
        Channels of the first block; 64 as published.

    Examples
    --------
    >>> encoder = PoseEncoder(32, n_hypotheses=4, max_shift_in_angstroms=20.0, width=16)
    >>> encoder(torch.randn(2, 32, 32)).rotations.shape
    torch.Size([2, 4, 3, 3])
    """

    def __init__(self, n_pixels: int, *, n_hypotheses: int, max_shift_in_angstroms: float, width: int = 64) -> None:
        super().__init__()
        self.max_shift_in_angstroms = max_shift_in_angstroms
        self.bank = GaussianLowPassBank()
        self.features = _convolutions(n_pixels, width)
        with torch.no_grad():
            latent = self.features.eval()(torch.zeros(1, self.bank.n_channels, n_pixels, n_pixels)).numel()
        self.train()
        self.rotation_heads = nn.ModuleList(_rotation_head(latent) for _ in range(n_hypotheses))
        self.shift_head = nn.Sequential(*_linear_relu(latent, 512), *_linear_relu(512, 256), nn.Linear(256, 2))

    def forward(self, images: Tensor) -> Poses:
        channels = self.bank(images)
        # Each channel to the mean and the deviation of the published network's input.
        deviation, mean = torch.std_mean(channels, dim=(2, 3), keepdim=True)
        channels = (channels - mean) / deviation.clamp_min(1e-6) * 0.226 + 0.45
        latent = self.features(channels.contiguous(memory_format=torch.channels_last)).flatten(1)
        vectors = torch.stack([head(latent) for head in self.rotation_heads], dim=1)
        # Gram-Schmidt needs all digits, whatever the network was computed in.
        rotations = rotations_from_s2s2(vectors.float())
        shifts = self.max_shift_in_angstroms * torch.tanh(self.shift_head(latent).float())
        return Poses(rotations, shifts[:, None].expand(-1, len(self.rotation_heads), -1))


def _convolutions(n_pixels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels, size = GaussianLowPassBank.n_channels, n_pixels
    for n_convolutions, factor, pooling in _BLOCKS:
        for _ in range(n_convolutions):
            layers += [
                nn.Conv2d(channels, factor * width, 3, padding=1),
                nn.BatchNorm2d(factor * width),
                nn.ReLU(inplace=True),
            ]
            channels = factor * width
        layers.append(pooling(2))
        size //= 2
    if size > 1:  # a box of 32 pixels is down to one already
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _rotation_head(latent: int) -> nn.Sequential:
    hidden = [*_linear_relu(latent, 512), nn.BatchNorm1d(512), *_linear_relu(512, 256)]
    return nn.Sequential(*hidden, nn.Linear(256, 6))


def _linear_relu(n_inputs: int, n_outputs: int) -> list[nn.Module]:
    linear = nn.Linear(n_inputs, n_outputs)
    nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
    nn.init.uniform_(linear.bias, -1, 1)
    return [linear, nn.ReLU(inplace=True)]
