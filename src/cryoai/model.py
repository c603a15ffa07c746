"""CryoAI: particles to poses to predicted images; the only place where encoder and physics meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cryoai.encoder import PoseEncoder
from cryoai.hardware import fast_matrices
from cryoai.imaging import ImagingModel
from cryoai.losses import best_hypothesis, symmetrized
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses
from cryoai.volumes import AbstractVolume, SampledVolume

__all__ = ["CryoAI", "Reading"]


@dataclass(frozen=True, eq=False)
class Reading:
    """What the model makes of a batch: the best pose (B,) of each particle and its loss (B,).

    ``hypothesis`` (B,) counts the heads that saw the image first, then those that saw it turned.
    """

    poses: Poses
    hypothesis: Tensor
    loss: Tensor


class CryoAI(nn.Module):
    """Encoder, volume and image formation.

    Parameters
    ----------
    imaging
        Of the particles at the encoder's box, up to the band limit of training.
    """

    def __init__(self, encoder: PoseEncoder, volume: AbstractVolume, imaging: ImagingModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.volume = volume
        self.imaging = imaging

    def encode(self, batch: ParticleBatch, precision: Tensor) -> Poses:
        """Hypotheses (B, M) of the heads for the images as they are.

        The encoder sees the matched filter of the image, ``CTF y / s^2``, which undoes the contrast
        reversals of the microscope and leaves out what is noise.
        """
        return self._encode(self._matched(batch, precision))

    def propose(self, batch: ParticleBatch, precision: Tensor) -> Poses:
        """Hypotheses (B, 2M) of the heads for the images and for the images turned by 180°."""
        matched = self._matched(batch, precision)
        # A turn by 180 degrees about the centre conjugates the transform.
        poses = self._encode(torch.cat([matched, matched.conj()]))
        n = len(batch)
        return symmetrized(poses[:n], poses[n:])

    def _matched(self, batch: ParticleBatch, precision: Tensor) -> Tensor:
        return batch.coefficients[:, : self.imaging.n_coefficients] * self.imaging.ctf(batch.optics) * precision

    def _encode(self, coefficients: Tensor) -> Poses:
        images = self.imaging.disc.to_images(coefficients)
        with fast_matrices(images.device):
            poses: Poses = self.encoder(images)
        return poses

    def forward(self, batch: ParticleBatch, precision: Tensor) -> Reading:
        """Propose, predict and judge. Only the best hypothesis of each particle has a gradient."""
        hypotheses = self.propose(batch, precision)
        volume = self.volume.sampled(self.imaging.max_radius)
        return self.judge(batch, hypotheses, volume, precision)

    def judge(self, batch: ParticleBatch, hypotheses: Poses, volume: SampledVolume, precision: Tensor) -> Reading:
        """The best of hypotheses (B, K) for each particle."""
        observed = batch.coefficients[:, : self.imaging.n_coefficients]
        with torch.no_grad():
            predicted = self.imaging.predict(volume, hypotheses, batch.optics)
            choice = best_hypothesis(observed, predicted, precision).choice
        poses = hypotheses.take(choice[:, None])
        winner = self.imaging.predict(volume, poses, batch.optics)
        return Reading(poses[:, 0], choice, best_hypothesis(observed, winner, precision).loss)
