"""A second chance for particles that were placed wrongly: a search against the map of their own half."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryoai.fourier import resize_map
from cryoai.imaging import ImagingModel
from cryoai.noise import NoiseSpectrum, log_likelihood
from cryoai.particles import PreparedParticles
from cryoai.poses import Poses
from cryoai.refinement import RefinedPoses, refine_coarse_to_fine, refine_poses
from cryoai.search import Templates, TrialPoses, search_poses
from cryoai.volumes import SampledVolume

__all__ = ["SearchPlan", "SecondChance"]

_N_CANDIDATES = 8


@dataclass(frozen=True, eq=False)
class SearchPlan:
    """When, how, and for whom to search again.

    Attributes
    ----------
    after_rounds
        Of local refinement.
    max_radius
        Band limit of the search, in Fourier pixels.
    trials
        Poses to search.
    worst_share
        Of the particles at most so many are searched for, of those whose fit is two deviations below the usual; None if
        a sample shall tell for whom something better is to be found.
    """

    after_rounds: int
    max_radius: int
    trials: TrialPoses
    worst_share: float | None


@dataclass(frozen=True, eq=False)
class SecondChance:
    """Searches all poses of a particle against a map (n, n, n) at low resolution, and refines the best.

    The best of the grid are refined there, the likeliest of them then up to the whole band. The caller keeps
    it where it is likelier than what it had.
    """

    particles: PreparedParticles
    coarse: PreparedParticles
    noise: NoiseSpectrum
    band: ImagingModel
    low: ImagingModel
    volume: SampledVolume
    low_volume: SampledVolume
    templates: Templates

    @classmethod
    def against(
        cls,
        density: Tensor,
        particles: PreparedParticles,
        noise: NoiseSpectrum,
        trials: TrialPoses,
        *,
        max_radius: int,
        search_radius: int,
    ) -> SecondChance:
        """Of particles whose noise is known, up to ``max_radius``; the search up to ``search_radius``."""
        coarse = particles.cropped(min(particles.n_pixels, 2 * (search_radius + 4)))
        low = coarse.imaging(search_radius)
        small = resize_map(density, coarse.n_pixels)
        low_volume = SampledVolume.from_map(small, search_radius, with_gradient=True)
        return cls(
            particles,
            coarse,
            noise,
            particles.imaging(max_radius),
            low,
            SampledVolume.from_map(density, max_radius, with_gradient=True),
            low_volume,
            Templates.of(low_volume, trials, low),
        )

    @torch.no_grad()
    def __call__(self, rows: Tensor, n_iterations: int) -> RefinedPoses:
        """The likeliest pose found for particles ``rows`` (B,), refined with so many steps at each band limit."""
        small = self.coarse.batch(rows, self.low.max_radius)
        precision = self.noise.precision(self.low)
        candidates = search_poses(small, self.templates, self.low, precision, _N_CANDIDATES).poses
        best: RefinedPoses | None = None
        for k in range(candidates.rotations.shape[1]):
            refined = refine_poses(small, candidates[:, k], self.low_volume, self.low, precision, n_iterations)
            best = refined if best is None else best.better_of(refined)
        assert best is not None
        batch = self.particles.batch(rows, self.band.max_radius)
        return refine_coarse_to_fine(batch, best.poses, self.volume, self.band, self.noise, n_iterations)

    @torch.no_grad()
    def judge(self, rows: Tensor, poses: Poses) -> RefinedPoses:
        """Given poses (B,) with their log-likelihood under the same map."""
        batch = self.particles.batch(rows, self.band.max_radius)
        predicted = self.band.predict(self.volume, poses, batch.optics)
        return RefinedPoses(poses, log_likelihood(batch.coefficients, predicted, self.noise.precision(self.band)))
