"""CryoAI: particles to poses to predicted images; the only place where encoder and physics meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cryoai.alignment import FrameChange
from cryoai.encoder import PoseEncoder
from cryoai.hardware import fast_matrices
from cryoai.imaging import ImagingModel
from cryoai.losses import best_hypothesis
from cryoai.noise import NoiseSpectrum, fit_z_scores, log_likelihood
from cryoai.particles import ParticleBatch
from cryoai.poses import Hypotheses, Poses
from cryoai.refinement import refine_coarse_to_fine, refine_poses
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
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
# The same where each is refined first: what is rough by itself may be the best then.
_REFINED = 8
_LARGEST_LEAD = 50.0
_NO_SYMMETRY = PointGroup.named("C1")


@dataclass(frozen=True, eq=False)
class Placing:
    """The likeliest hypothesis for each particle, and what speaks for it.

    Attributes
    ----------
    poses
        (B,), refined if that was asked for.
    fit : (B,)
        :func:`~cryoai.noise.fit_z_scores` of the image and its prediction.
    probability : (B,)
        That the encoder gives to this answer: the sum over all hypotheses within 20° of it or of an equivalent pose.
    lead : (B,)
        Log-likelihood by which it is ahead of the best different answer, at most 50. Equivalent poses are one answer.
    """

    poses: Poses
    fit: Tensor
    probability: Tensor
    lead: Tensor

    def replaced(self, where: Tensor, other: Placing) -> Placing:
        """These, with others (n,) in the place of the n chosen by ``where`` (B,)."""

        def mixed(mine: Tensor, theirs: Tensor) -> Tensor:
            result = mine.clone()
            result[where] = theirs
            return result

        return Placing(
            Poses(
                mixed(self.poses.rotations, other.poses.rotations),
                mixed(self.poses.shifts_in_angstroms, other.poses.shifts_in_angstroms),
            ),
            mixed(self.fit, other.fit),
            mixed(self.probability, other.probability),
            mixed(self.lead, other.lead),
        )

    @classmethod
    def cat(cls, parts: Sequence[Placing]) -> Placing:
        """The placings of one batch after the other."""
        return cls(
            Poses.cat([part.poses for part in parts]),
            torch.cat([part.fit for part in parts]),
            torch.cat([part.probability for part in parts]),
            torch.cat([part.lead for part in parts]),
        )


class CryoAI(nn.Module):
    """Encoder, volume and image formation.

    What the model proposes is in the frame that it learnt in, which is that of its volume. The maps of the run may
    be in another one by then: :meth:`place` brings the proposals there, by ``frame``.

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
        self.register_buffer("frame_rotation", torch.eye(3))
        self.register_buffer("frame_shift", torch.zeros(3))
        self.frame_rotation: Tensor
        self.frame_shift: Tensor

    @property
    def frame(self) -> FrameChange:
        """What brings the encoder's poses to the frame of the maps; its shift in Å."""
        return FrameChange(self.frame_rotation, mirrored=False, shift=self.frame_shift)

    def moved(self, change: FrameChange) -> CryoAI:
        """The same encoder and volume, for maps whose frame is changed once more, by a turn and a shift in Å."""
        if change.mirrored:
            raise ValueError("an encoder cannot be brought to the other hand by a frame")
        moved = CryoAI(self.encoder, self.volume, self.imaging, self.encoder_input)
        turn = change.rotation.to(self.frame_rotation)
        moved.frame_rotation = turn @ self.frame_rotation
        moved.frame_shift = turn @ self.frame_shift + change.shift.to(self.frame_shift)
        return moved.train(self.training)

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
        noise: NoiseSpectrum,
        n_iterations: int,
        others: Poses | None = None,
        group: PointGroup = _NO_SYMMETRY,
    ) -> Placing:
        """The likeliest under ``volume`` of the encoder's most probable hypotheses, and of ``others`` (B, K).

        Volume and poses are in the frame of the maps, and ``group`` is the symmetry that they have there.
        With ``n_iterations`` each of these is first refined locally at half of the band limit, where a
        likelihood is broad enough to judge a rough pose by, and the best then at all of it.
        """
        proposed = self.propose(batch, noise.precision(self.imaging))
        everything = replace(proposed, poses=self.frame.of_poses(proposed.poses))
        judged = everything.likeliest(_REFINED if n_iterations else _JUDGED).poses
        if others is not None:
            judged = judged.beside(others)
        if n_iterations:
            judged = _refined_hypotheses(batch, judged, volume, self._half_band(), noise, n_iterations)
        poses, lead = self._best(batch, judged, volume, noise, group)
        if n_iterations:
            poses = refine_coarse_to_fine(batch, poses, volume, self.imaging, noise, n_iterations).poses
        near = symmetric_distance_in_degrees(everything.poses.rotations, poses.rotations[:, None], group)
        predicted = self.imaging.predict(volume, poses, batch.optics)
        observed = batch.coefficients[:, : self.imaging.n_coefficients]
        return Placing(
            poses,
            fit_z_scores(observed, predicted, noise.precision(self.imaging)),
            (everything.log_probabilities.exp() * (near < _DIFFERENT_IN_DEGREES)).sum(dim=1),
            lead,
        )

    def _best(
        self,
        batch: ParticleBatch,
        hypotheses: Poses,
        volume: SampledVolume,
        noise: NoiseSpectrum,
        group: PointGroup,
    ) -> tuple[Poses, Tensor]:
        """The likeliest (B,) of hypotheses (B, K), and its lead (B,) over the best different one."""
        observed = batch.coefficients[:, : self.imaging.n_coefficients]
        predicted = self.imaging.predict(volume, hypotheses, batch.optics)
        scores = log_likelihood(observed[:, None], predicted, noise.precision(self.imaging))
        best, choice = scores.max(dim=1)
        poses = hypotheses.take(choice[:, None])
        distance = symmetric_distance_in_degrees(hypotheses.rotations, poses.rotations, group)
        runner_up = torch.where(distance >= _DIFFERENT_IN_DEGREES, scores, -torch.inf).amax(dim=1)
        return poses[:, 0], (best - runner_up).clamp(max=_LARGEST_LEAD)

    def _half_band(self) -> ImagingModel:
        return replace(self.imaging, max_radius=max(4, self.imaging.max_radius // 2))


def _refined_hypotheses(
    batch: ParticleBatch,
    hypotheses: Poses,
    volume: SampledVolume,
    imaging: ImagingModel,
    noise: NoiseSpectrum,
    n_iterations: int,
) -> Poses:
    """Every one of hypotheses (B, K) refined by itself."""
    n, k = hypotheses.shifts_in_angstroms.shape[:2]
    rows = torch.arange(n, device=batch.coefficients.device).repeat_interleave(k)
    repeated = ParticleBatch(
        batch.indices[rows], batch.coefficients[rows, : imaging.n_coefficients], batch.optics[rows]
    )
    flat = Poses(hypotheses.rotations.flatten(0, 1), hypotheses.shifts_in_angstroms.flatten(0, 1))
    refined = refine_poses(repeated, flat, volume, imaging, noise.precision(imaging), n_iterations).poses
    return Poses(refined.rotations.unflatten(0, (n, k)), refined.shifts_in_angstroms.unflatten(0, (n, k)))
