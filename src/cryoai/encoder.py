"""Pose encoders: from the Fourier coefficients of an image to hypotheses of its pose.

* :class:`ConvolutionalEncoder`, the published one (Levy et al., ECCV 2022, section 3.2 and supplement):
  low-pass bank, convolutional network, rotation and shift heads. Two things are added: several
  rotation heads, so that an ambiguous image can be given several hypotheses, and a bound on the shift.
* :class:`PolarEncoder`, which knows what an in-plane rotation is and need not learn it. With the
  right volume given it learns as much from a thousand images as the other from ten thousand
  (``benchmarks/encoder.py``).

Both are asked about the coefficients (B, p) of a :class:`~cryoai.fourier.FourierDisc`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryoai.fourier import FourierDisc
from cryoai.poses import Hypotheses, Poses, rotations_about_z, rotations_from_s2s2

__all__ = [
    "ConvolutionalEncoder",
    "EncoderArchitecture",
    "GaussianLowPassBank",
    "PolarEncoder",
    "PoseEncoder",
    "SymmetrizedEncoder",
]


class PoseEncoder(nn.Module, ABC):
    """Coefficients (B, p) to ``n_hypotheses`` poses (B, M) each, with the probability that each is the best."""

    n_hypotheses: int

    @abstractmethod
    def forward(self, coefficients: Tensor) -> Hypotheses: ...

    def direct(self, coefficients: Tensor) -> Hypotheses:
        """Hypotheses for the image as it is, whatever else is asked of an image in training."""
        hypotheses: Hypotheses = self(coefficients)
        return hypotheses


class SymmetrizedEncoder(PoseEncoder):
    """Asks another encoder twice, about the image and about the image turned by 180°: hypotheses (B, 2M).

    An encoder early in training is often right up to a half turn of the image. The better of the two
    answers is trained: the symmetrized loss of CryoAI (Levy et al. 2022, equation 8). The first half
    of the hypotheses saw the image, the second the image turned.
    """

    def __init__(self, encoder: PoseEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.n_hypotheses = 2 * encoder.n_hypotheses

    def forward(self, coefficients: Tensor) -> Hypotheses:
        # A turn by 180 degrees about the centre conjugates the transform.
        both: Hypotheses = self.encoder(torch.cat([coefficients, coefficients.conj()]))
        n = len(coefficients)
        return Hypotheses(
            both.poses[:n].beside(both.poses[n:].turned_by_pi()),
            torch.cat(both.log_probabilities.split(n), dim=1) - math.log(2),
        )

    def direct(self, coefficients: Tensor) -> Hypotheses:
        return self.encoder.direct(coefficients)


@dataclass(frozen=True)
class EncoderArchitecture:
    """All that it takes to make an encoder, but its weights.

    ``symmetrization`` "half-turn" makes a :class:`SymmetrizedEncoder` of it; the other values are
    arguments of the encoders.
    """

    kind: Literal["polar", "convolutional"]
    n_hypotheses: int
    width: int
    max_shift_in_angstroms: float
    symmetrization: Literal["none", "half-turn"]

    def build(self, disc: FourierDisc, max_radius: int) -> PoseEncoder:
        """An encoder with random weights (of the global generator) for images on ``disc``."""
        encoder: PoseEncoder
        if self.kind == "polar":
            encoder = PolarEncoder(
                disc,
                max_radius,
                n_hypotheses=self.n_hypotheses,
                max_shift_in_angstroms=self.max_shift_in_angstroms,
                width=self.width,
            )
        else:
            encoder = ConvolutionalEncoder(
                disc,
                n_hypotheses=self.n_hypotheses,
                max_shift_in_angstroms=self.max_shift_in_angstroms,
                width=self.width,
            )
        return encoder if self.symmetrization == "none" else SymmetrizedEncoder(encoder)


# ------------------------------------------------------------------------------ as published

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


class ConvolutionalEncoder(PoseEncoder):
    """The published encoder: a VGG-like network on the image in real space.

    Parameters
    ----------
    disc
        Of the images, at least 32 pixels wide.
    n_hypotheses
        Number of rotation heads; the published encoder has one.
    max_shift_in_angstroms
        Shifts are bounded to this in each axis.
    width
        Channels of the first block; 64 as published.

    Examples
    --------
    >>> disc = FourierDisc.of_box(32)
    >>> encoder = ConvolutionalEncoder(disc, n_hypotheses=4, max_shift_in_angstroms=20.0, width=16)
    >>> encoder(disc.from_images(torch.randn(2, 32, 32))).poses.rotations.shape
    torch.Size([2, 4, 3, 3])
    """

    def __init__(self, disc: FourierDisc, *, n_hypotheses: int, max_shift_in_angstroms: float, width: int = 64) -> None:
        super().__init__()
        self.disc = disc
        self.n_hypotheses = n_hypotheses
        self.max_shift_in_angstroms = max_shift_in_angstroms
        self.bank = GaussianLowPassBank()
        self.features = _convolutions(disc.n_pixels, width)
        with torch.no_grad():
            latent = self.features.eval()(torch.zeros(1, self.bank.n_channels, disc.n_pixels, disc.n_pixels)).numel()
        self.train()
        self.rotation_heads = nn.ModuleList(_rotation_head(latent) for _ in range(n_hypotheses))
        self.shift_head = nn.Sequential(*_linear_relu(latent, 512), *_linear_relu(512, 256), nn.Linear(256, 2))
        # Of a single hypothesis there is nothing to say.
        self.score_head = nn.Linear(latent, n_hypotheses) if n_hypotheses > 1 else None

    def forward(self, coefficients: Tensor) -> Hypotheses:
        channels = self.bank(self.disc.to_images(coefficients))
        # Each channel to the mean and the deviation of the published network's input.
        deviation, mean = torch.std_mean(channels, dim=(2, 3), keepdim=True)
        channels = (channels - mean) / deviation.clamp_min(1e-6) * 0.226 + 0.45
        latent = self.features(channels.contiguous(memory_format=torch.channels_last)).flatten(1)
        vectors = torch.stack([head(latent) for head in self.rotation_heads], dim=1)
        # Gram-Schmidt needs all digits, whatever the network was computed in.
        rotations = rotations_from_s2s2(vectors.float())
        shifts = self.max_shift_in_angstroms * torch.tanh(self.shift_head(latent).float())
        scores = latent.new_zeros((len(latent), 1)) if self.score_head is None else self.score_head(latent)
        return Hypotheses(
            Poses(rotations, shifts[:, None].expand(-1, self.n_hypotheses, -1)), scores.float().log_softmax(dim=1)
        )


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


# ------------------------------------------------------------------------------ equivariant


class PolarEncoder(PoseEncoder):
    """An encoder for which a turn of the image in its plane is a shift of its features.

    The transform of the image is read on a polar grid; rings are channels, and convolutions run around
    the circle with kernels that close on themselves. A turn of the image by ``360° / n_hypotheses``
    moves the features of the last layer by one place. One head, the same at every place, predicts the
    pose *relative to the direction of that place*, and the probability that the place is the right
    one to ask. So every rotation in the plane comes for free, the half turn of the symmetrized loss
    among them, and the network learns viewing directions only. (Of equivariant encoders for CryoAI:
    de Ruijter and Cesa 2024, arXiv 2406.01630.)

    Parameters
    ----------
    disc
        Of the images.
    max_radius
        Band limit in Fourier pixels: that many rings are read.
    n_hypotheses
        Places of the last layer, a power of two from 2 to 64.
    max_shift_in_angstroms
        Shifts are bounded to this in each axis of the place.
    width
        Channels of a layer.

    Examples
    --------
    >>> disc = FourierDisc.of_box(32)
    >>> encoder = PolarEncoder(disc, 12, n_hypotheses=16, max_shift_in_angstroms=20.0, width=32)
    >>> encoder(disc.from_images(torch.randn(2, 32, 32))).log_probabilities.shape
    torch.Size([2, 16])
    """

    def __init__(
        self, disc: FourierDisc, max_radius: int, *, n_hypotheses: int, max_shift_in_angstroms: float, width: int = 128
    ) -> None:
        super().__init__()
        self.n_hypotheses = n_hypotheses
        self.max_shift_in_angstroms = max_shift_in_angstroms
        self.n_angles = max(2 * n_hypotheses, _n_angles(max_radius))
        samples = polar_samples(disc, max_radius, self.n_angles)
        self.register_buffer("samples", samples, persistent=False)
        self.samples: Tensor
        layers: list[nn.Module] = [_CircularConvolution(2 * max_radius, width, 9, stride=2)]
        for _ in range(int(math.log2(self.n_angles // n_hypotheses)) - 1):
            layers += [_CircularConvolution(width, width, 5), _CircularConvolution(width, width, 5, stride=2)]
        layers += [_CircularConvolution(width, width, 5)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            _CircularConvolution(width, 2 * width, 1),
            _CircularConvolution(2 * width, 2 * width, 1),
            nn.Conv2d(2 * width, 9, 1),
        )
        turns = torch.arange(n_hypotheses) * (2 * math.pi / n_hypotheses)
        self.register_buffer("turns", rotations_about_z(turns), persistent=False)
        self.turns: Tensor

    def forward(self, coefficients: Tensor) -> Hypotheses:
        p = self.samples.shape[0] // 2
        parts = torch.cat([coefficients[:, :p].real, coefficients[:, :p].imag], dim=1)
        parts = parts / parts.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        rings = (parts @ self.samples).unflatten(1, (-1, 1, self.n_angles))
        features = self.features(rings.contiguous(memory_format=torch.channels_last))
        said = self.head(features)[:, :, 0].transpose(1, 2).float()
        # Rotations need all digits, whatever the network was computed in.
        with torch.autocast(said.device.type, enabled=False):
            vectors, shifts, scores = said.split([6, 2, 1], dim=-1)
            rotations = rotations_from_s2s2(vectors) @ self.turns.transpose(-1, -2)
            bounded = self.max_shift_in_angstroms * torch.tanh(shifts)
            shifts = (self.turns[:, :2, :2] @ bounded[..., None])[..., 0]
        return Hypotheses(Poses(rotations, shifts), scores[..., 0].log_softmax(dim=1))


class _CircularConvolution(nn.Module):
    """Convolution around a circle (B, C, 1, L), BatchNorm and ReLU; adds its input where the shapes allow."""

    def __init__(self, n_inputs: int, n_outputs: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        # In two dimensions, one of them empty, because that is what libraries are fast in.
        self.convolution = nn.Conv2d(n_inputs, n_outputs, (1, width), (1, stride), bias=False)
        self.norm = nn.BatchNorm2d(n_outputs)
        self.residual = n_inputs == n_outputs and stride == 1
        self.margin = width // 2

    def forward(self, x: Tensor) -> Tensor:
        m = self.margin
        wrapped = F.pad(x, (m, m, 0, 0), mode="circular") if m else x
        y = F.relu(self.norm(self.convolution(wrapped)))
        return x + y if self.residual else y


def _n_angles(max_radius: int) -> int:
    """Samples around the circle: twice the angular frequencies of a particle of 0.7 of the box at the last ring."""
    return 2 ** math.ceil(math.log2(2 * math.pi * 0.7 * max_radius))


def polar_samples(disc: FourierDisc, max_radius: int, n_angles: int) -> Tensor:
    """Matrix (2p, 2 * max_radius * n_angles) that reads the transform of an image on a polar grid.

    It takes real and imaginary parts of the coefficients up to ``max_radius`` to the real parts, then the
    imaginary parts, at radii of 1 to ``max_radius`` Fourier pixels and at angles around the full
    circle. The interpolation is exact for images that are zero outside of their box.
    """
    device = disc.coordinates.device
    p, n = disc.n_coefficients(max_radius), disc.n_pixels
    angles = torch.arange(n_angles, device=device) * (2 * math.pi / n_angles)
    radii = torch.arange(1, max_radius + 1, device=device)[:, None] / n
    points = torch.stack([radii * angles.cos(), radii * angles.sin()], dim=-1).flatten(0, 1)[:, None]
    known = disc.coordinates[:p]
    # The half disc stands for the whole: each coefficient also counts, conjugated, at minus its frequency.
    once = disc.friedel_weights[:p] / 2
    direct, mirrored = once * _dirichlet(points - known, n), once * _dirichlet(points + known, n)
    total, difference = (direct + mirrored).T, (direct - mirrored).T
    return torch.cat(
        [torch.cat([total.real, total.imag], dim=1), torch.cat([-difference.imag, difference.real], dim=1)]
    )


def _dirichlet(frequencies: Tensor, n_pixels: int) -> Tensor:
    """Transform (...) of a box of ones, divided by its size, at frequencies (..., 2) in cycles per pixel."""
    centre = torch.arange(n_pixels, device=frequencies.device).double().mean() - n_pixels // 2
    f = frequencies.double()
    ratio = torch.where(f == 0, 1.0, torch.sin(math.pi * n_pixels * f) / (n_pixels * torch.sin(math.pi * f))).prod(-1)
    return (ratio * torch.exp(-2j * math.pi * centre * f.sum(-1))).to(torch.complex64)
