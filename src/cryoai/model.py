"""CryoAI: particles to poses to predicted images; the only place where encoder and physics meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cryoai.encoder import PoseEncoder
from cryoai.hardware import fast_matrices
from cryoai.imaging import ImagingModel
from cryoai.losses import best_hypothesis
from cryoai.noise import fit_z_scores, log_likelihood
from cryoai.particles import ParticleBatch
from cryoai.poses import Hypotheses, Poses, angular_distance_in_degrees
from cryoai.volumes import AbstractVolume, SampledVolume

__all__ = ["CryoAI", "EncoderInput", "Placing", "Reading", "matched_filter", "unfiltered"]

EncoderInput = Callable[[ParticleBatch, ImagingModel, Tensor], Tensor]
"""Particles, imaging model and precision (p,) to what the encoder is shown of each (B, p)."""


def matched_filter(batch: ParticleBatch, imaging: ImagingModel, precision: Tensor) -> Tensor:
    """``CTF y / s^2``, which undoes the contrast reversals of the microscope and leaves out what is noise."""
    return batch.coefficients[:, : imaging.n_coefficients] * imaging.ctf(batch.optics) * precision


def unfiltered(batch: ParticleBatch, imaging: ImagingModel, precision: Tensor) -> Tensor:
    """The image as it is where it has any precision, as published."""
    return batch.coefficients[:, : imaging.n_coefficients] * (precision > 0)


@dataclass(frozen=True, eq=False)
class Reading:
    """What the model makes of a batch: the best pose (B,) of each particle and its loss (B,).

    ``hypothesis`` (B,) says which of those proposed it is.
    """

    poses: Poses
    hypothesis: Tensor
    loss: Tensor


# Hypotheses further apart are different answers.
_DIFFERENT_IN_DEGREES = 20.0
# Of an encoder's hypotheses, the most probable ones that are compared with the image.
_JUDGED = 4
_LARGEST_LEAD = 50.0


@dataclass(frozen=True, eq=False)
class Placing:
    """The likeliest hypothesis for each particle, and what speaks for it.

    Attributes
    ----------
    poses
        (B,).
    fit : (B,)
        :func:`~cryoai.noise.fit_z_scores` of the image and its prediction.
    probability : (B,)
        That the encoder gives to this answer: the sum over all hypotheses within 20° of it.
    lead : (B,)
        Log-likelihood by which it is ahead of the best different answer, at most 50.
    """

    poses: Poses
    fit: Tensor
    probability: Tensor
    lead: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Placing]) -> Placing:
        """The placings of one batch after the other."""
        return cls(
            Poses(
                torch.cat([part.poses.rotations for part in parts]),
                torch.cat([part.poses.shifts_in_angstroms for part in parts]),
            ),
            torch.cat([part.fit for part in parts]),
            torch.cat([part.probability for part in parts]),
            torch.cat([part.lead for part in parts]),
        )


class CryoAI(nn.Module):
    """Encoder, volume and image formation.

    Parameters
    ----------
    imaging
        Of the particles at the encoder's box, up to the band limit of training.
    encoder_input
        What of a particle the encoder is shown.
    """

    def __init__(
        self,
        encoder: PoseEncoder,
        volume: AbstractVolume,
        imaging: ImagingModel,
        encoder_input: EncoderInput = matched_filter,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.volume = volume
        self.imaging = imaging
        self.encoder_input = encoder_input

    def encode(self, batch: ParticleBatch, precision: Tensor) -> Hypotheses:
        """Hypotheses (B, M) for the images as they are."""
        with fast_matrices(precision.device):
            return self.encoder.direct(self.encoder_input(batch, self.imaging, precision))

    def propose(self, batch: ParticleBatch, precision: Tensor) -> Hypotheses:
        """All hypotheses (B, M), those for the images turned by 180° included if the encoder is symmetrized."""
        with fast_matrices(precision.device):
            hypotheses: Hypotheses = self.encoder(self.encoder_input(batch, self.imaging, precision))
        return hypotheses

    def forward(self, batch: ParticleBatch, precision: Tensor) -> Reading:
        """Propose, predict and judge. Only the best hypothesis of each particle has a gradient."""
        hypotheses = self.propose(batch, precision)
        volume = self.volume.sampled(self.imaging.max_radius)
        return self.judge(batch, hypotheses.poses, volume, precision)

    def judge(self, batch: ParticleBatch, hypotheses: Poses, volume: SampledVolume, precision: Tensor) -> Reading:
        """The best of hypotheses (B, K) for each particle."""
        observed = batch.coefficients[:, : self.imaging.n_coefficients]
        with torch.no_grad():
            predicted = self.imaging.predict(volume, hypotheses, batch.optics)
            choice = best_hypothesis(observed, predicted, precision).choice
        poses = hypotheses.take(choice[:, None])
        winner = self.imaging.predict(volume, poses, batch.optics)
        return Reading(poses[:, 0], choice, best_hypothesis(observed, winner, precision).loss)

    @torch.no_grad()
    def place(
        self,
        batch: ParticleBatch,
        volume: SampledVolume,
        precision: Tensor,
        refine: Callable[[ParticleBatch, Poses], Poses] | None = None,
    ) -> Placing:
        """The likeliest under ``volume`` of the encoder's most probable hypotheses, refined if so wished."""
        everything = self.propose(batch, precision)
        judged = everything.likeliest(_JUDGED).poses
        observed = batch.coefficients[:, : self.imaging.n_coefficients]
        predicted = self.imaging.predict(volume, judged, batch.optics)
        scores = log_likelihood(observed[:, None], predicted, precision)
        best, choice = scores.max(dim=1)
        poses = judged.take(choice[:, None])
        near = angular_distance_in_degrees(everything.poses.rotations, poses.rotations) < _DIFFERENT_IN_DEGREES
        other = angular_distance_in_degrees(judged.rotations, poses.rotations) >= _DIFFERENT_IN_DEGREES
        runner_up = torch.where(other, scores, -torch.inf).amax(dim=1)
        winner = predicted.take_along_dim(choice[:, None, None], dim=1)[:, 0]
        final = poses[:, 0]
        if refine is not None:
            final = refine(batch, final)
            winner = self.imaging.predict(volume, final, batch.optics)
        return Placing(
            final,
            fit_z_scores(observed, winner, precision),
            (everything.log_probabilities.exp() * near).sum(dim=1),
            (best - runner_up).clamp(max=_LARGEST_LEAD),
        )
