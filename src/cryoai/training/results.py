"""From the last estimate of a run to its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cryoai.confidence import features_of_fit
from cryoai.findings import MapFindings
from cryoai.half_maps import HalfMaps
from cryoai.noise import Fit
from cryoai.particle_stack import Fault
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.runs import RunFolder
from cryoai.training.stages import Controls, Estimate, ParticlePoses, StartAgreement
from cryoai.verdict import Evidence, Verdict, judge

__all__ = ["GivenPoses", "PoseSources", "Reconstruction", "conclude"]

_MOVED_IN_DEGREES = 1.0
_SURE = 0.5


@dataclass(frozen=True)
class PoseSources:
    """How many particles took their pose from where.

    Every pose starts at the encoder's answer, refined locally. Particles that it does not fit well enough
    are searched for too, and count for the search where it found a likelier pose; where both led to
    the same answer within 10° they count in ``encoder_and_search_agree`` as well.
    ``moved_by_refinement`` counts poses that ended more than 1° from their start. Poses that came with the
    particles are ``given``, and neither from the encoder nor from a search.
    """

    from_encoder: int
    from_search: int
    searched: int
    encoder_and_search_agree: int
    moved_by_refinement: int
    given: int = 0


@dataclass(frozen=True)
class GivenPoses:
    """Where poses came from that were not found here, and whether their half sets are new or those of the file."""

    file: Path
    half_sets: Literal["file", "new"]


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What came out of a run.

    Attributes
    ----------
    verdict
        Whether to believe it.
    map
        Density (n, n, n) at the working box.
    half_maps
        With their mask and correlation.
    poses
        (N,), in the order of the particles.
    confidence
        (N,), the probability that a pose is within 10° of the right one; None without Refinement.
    halves_are_independent
        False where no Refinement was run, or half sets were drawn anew for given poses: the poses then come from
        one common map, half maps agree whatever it is, and their agreement is no resolution.
    halves_began_apart
        Whether each half found its first map by itself, from nothing.
    given_poses
        Where the poses came from that a refinement began with; None where they were found here.
    start_agreement
        Of the two best agreeing starts of Bootstrap; None if there was only one.
    findings
        What map and poses show.
    controls
        What became of synthetic particles and of images of noise; None without Refinement.
    faults
        Images that could not be used; their particles have a pose of zeros and are flagged in ``particles.star``.
    """

    verdict: Verdict
    map: Tensor
    half_maps: HalfMaps
    poses: Poses
    confidence: Tensor | None
    pixel_size_in_angstroms: float
    halves_are_independent: bool
    halves_began_apart: bool
    start_agreement: StartAgreement | None
    sources: PoseSources
    findings: MapFindings
    controls: Controls | None
    faults: tuple[Fault, ...]
    run: RunFolder
    given_poses: GivenPoses | None = None

    @property
    def half_map_agreement_in_angstroms(self) -> float:
        """Period at which the FSC of the half maps falls below 0.143, within the mask and corrected for it.

        Infinite if no shell agrees.
        """
        return self.half_maps.resolution_in_angstroms

    @property
    def resolution_in_angstroms(self) -> float | None:
        """The agreement of the half maps, if they are independent; None for a failed run, whatever agrees there."""
        means_something = self.halves_are_independent and self.verdict.status != "failed"
        return self.half_map_agreement_in_angstroms if means_something else None


def conclude(
    estimate: Estimate,
    findings: MapFindings,
    faults: list[Fault],
    run: RunFolder,
    *,
    pixel_size_in_angstroms: float,
    contrast_is_clear: bool,
    symmetry_asked: str | None,
    symmetry_share: float | None,
    given_poses: GivenPoses | None = None,
) -> Reconstruction:
    """The results of a run, judged."""
    placed, half_sets, half_maps = estimate.particles, estimate.half_sets, estimate.half_maps
    assert placed is not None
    assert half_sets is not None
    assert half_maps is not None
    controls, agreement = estimate.controls, estimate.start_agreement
    confidence = None if controls is None else _confidence(placed, controls)
    began_apart = estimate.half_references is not None and estimate.noise is not None
    likely = findings.likely_symmetry
    evidence = Evidence(
        starts_agree=None if agreement is None else agreement.is_one_structure,
        halves_are_independent=began_apart,
        n_resolved_shells=half_maps.n_resolved_shells,
        better_than_noise=None if controls is None else controls.better_than_noise,
        found_of_synthetic=None if controls is None else controls.found_of_synthetic,
        misfit=None if controls is None else _misfit(placed.fit, controls),
        sure=None if confidence is None else float((confidence > _SURE).float().mean()),
        orientations_are_preferred=findings.orientations.is_preferred,
        orientations_are_collapsed=findings.orientations.is_collapsed,
        resolution_is_anisotropic=findings.conical.is_anisotropic,
        cone_area_ratio=findings.conical.area_ratio,
        defects=findings.defects.found,
        contrast_is_clear=contrast_is_clear,
        likely_symmetry=None if likely is None else likely.group.name,
        symmetry_asked=symmetry_asked,
        symmetry_share=symmetry_share,
        poses_were_given=given_poses is not None,
        given_halves_are_new=given_poses is not None and given_poses.half_sets == "new",
    )
    return Reconstruction(
        verdict=judge(evidence),
        map=half_maps.combined(half_sets),
        half_maps=half_maps,
        poses=placed.poses.to("cpu"),
        confidence=confidence,
        pixel_size_in_angstroms=pixel_size_in_angstroms,
        halves_are_independent=estimate.noise is not None and not evidence.given_halves_are_new,
        halves_began_apart=began_apart,
        start_agreement=agreement,
        sources=_pose_sources(placed, len(faults), given_poses),
        findings=findings,
        controls=controls,
        faults=tuple(sorted(faults, key=lambda fault: fault.row)),
        run=run,
        given_poses=given_poses,
    )


def _pose_sources(placed: ParticlePoses, n_faults: int, given: GivenPoses | None) -> PoseSources:
    moved = angular_distance_in_degrees(placed.poses.rotations, placed.start.rotations)
    n_from_encoder = int(placed.from_encoder.sum())
    n_others = len(placed.poses) - n_faults - n_from_encoder
    return PoseSources(
        n_from_encoder,
        n_others if given is None else 0,
        int(placed.searched.sum()),
        int(placed.sources_agree.sum()),
        int((moved > _MOVED_IN_DEGREES).sum()),
        0 if given is None else n_others,
    )


def _confidence(placed: ParticlePoses, controls: Controls) -> Tensor:
    """Probability (N,) that each pose is right; 0 for particles without a usable image."""
    known = ~placed.fit.z_scores.isnan()
    confidence = torch.zeros(len(known), device=known.device)
    fit = placed.fit[known]
    confidence[known] = controls.confidence(features_of_fit(fit), fit.z_scores)
    return confidence.cpu()


def _misfit(fit: Fit, controls: Controls) -> float:
    """How much worse the particles fit than synthetic ones, in standard deviations of a fit."""
    return float(fit.z_scores.nanmedian()) - controls.fit_of_synthetic
