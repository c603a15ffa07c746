"""The verdict on a run, in plain words: solved, ambiguous with what disagrees, or failed with the likely cause.

A run is solved if the same structure was found twice from nothing, the particles fit it as they should
and images of noise do not, its two halves agree, and it has none of the shapes that failures have.
It has failed if one of the first three is clearly not so. Everything between is ambiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cryoai.validation.defects import MapDefect

__all__ = ["Doubt", "Evidence", "Verdict", "judge"]

# Of images of noise one in twenty fits better than 95 % of them, of particles of a wrong map hardly more.
_LITTLE_BETTER, _MUCH_BETTER = 0.25, 0.6
# Of particles of the map itself, so many should be found again.
_FOUND_AGAIN = 0.5
# So many deviations worse than particles of the map do, the run's own may fit it.
_MISFIT = -2.0
_FEWEST_SHELLS = 4
_FEW_SURE = 0.5
# Of fewer sure poses nothing can be made, of hardly any there is no map.
_ENOUGH_SURE, _HARDLY_ANY = 0.2, 0.05
_VERY_ANISOTROPIC = 0.2


@dataclass(frozen=True)
class Evidence:
    """What a verdict goes by; what was not measured is None.

    Attributes
    ----------
    starts_agree
        Whether two independent starts found one structure.
    halves_are_independent
        From the first image on.
    n_resolved_shells
        Of the half maps, corrected for the mask.
    better_than_noise
        Share of the particles that fit better than 95 % of images of noise.
    found_of_synthetic
        Share of synthetic particles of the map whose pose was found again.
    misfit
        Median fit of the particles less that of synthetic ones, in standard deviations.
    sure
        Share of the particles with a confidence over 0.5.
    symmetry_asked, symmetry_share
        The point group that was imposed, and the share of the signal that obeyed it before.
    likely_symmetry
        Of a map that none was imposed on.
    poses_were_given
        From elsewhere: nothing was found from nothing, once or twice.
    given_halves_are_new
        Half sets were drawn anew for poses that may come from one map of all particles.
    """

    starts_agree: bool | None
    halves_are_independent: bool
    n_resolved_shells: int
    better_than_noise: float | None
    found_of_synthetic: float | None
    misfit: float | None
    sure: float | None
    orientations_are_preferred: bool
    orientations_are_collapsed: bool
    resolution_is_anisotropic: bool
    cone_area_ratio: float
    defects: tuple[MapDefect, ...]
    contrast_is_clear: bool
    likely_symmetry: str | None
    symmetry_asked: str | None = None
    symmetry_share: float | None = None
    poses_were_given: bool = False
    given_halves_are_new: bool = False


@dataclass(frozen=True)
class Doubt:
    """Something that speaks against a map: what, and what to do about it."""

    what: str
    advice: str
    is_fatal: bool

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


@dataclass(frozen=True)
class Verdict:
    """What to think of a run, and why."""

    status: Literal["solved", "ambiguous", "failed"]
    doubts: tuple[Doubt, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The doubts in words, the gravest first."""
        return tuple(str(doubt) for doubt in self.doubts)


def judge(evidence: Evidence) -> Verdict:
    """Weigh the evidence.

    Examples
    --------
    >>> found = Evidence(
    ...     starts_agree=True, halves_are_independent=True, n_resolved_shells=20, better_than_noise=1.0,
    ...     found_of_synthetic=1.0, misfit=0.1, sure=0.99, orientations_are_preferred=False,
    ...     orientations_are_collapsed=False, resolution_is_anisotropic=False, cone_area_ratio=0.9,
    ...     defects=(), contrast_is_clear=True, likely_symmetry=None,
    ... )
    >>> judge(found).status
    'solved'
    """
    doubts = sorted(_doubts(evidence), key=lambda doubt: not doubt.is_fatal)
    status: Literal["solved", "ambiguous", "failed"] = "ambiguous" if doubts else "solved"
    return Verdict("failed" if any(doubt.is_fatal for doubt in doubts) else status, tuple(doubts))


def _doubts(evidence: Evidence) -> Iterator[Doubt]:
    yield from _doubts_of_starts(evidence)
    yield from _doubts_of_fit(evidence)
    yield from _doubts_of_map(evidence)
    yield from _doubts_of_symmetry(evidence)


def _doubts_of_starts(evidence: Evidence) -> Iterator[Doubt]:
    if evidence.given_halves_are_new:
        yield Doubt(
            "the half sets were drawn anew, so that the given poses may come from one map of both halves, and what "
            "that had of noise is in both",
            "give a file with the half sets that the poses were found in",
            is_fatal=False,
        )
    if evidence.poses_were_given:
        return
    if evidence.starts_agree is None:
        yield Doubt(
            "the structure was found once, from one start",
            "repeat with another --seed and compare, or leave --bootstrap.n-starts at 2",
            is_fatal=False,
        )
    elif not evidence.starts_agree:
        yield Doubt(
            "no two of the independent starts found the same structure: there is too little signal, or too little in "
            "common between the particles",
            "clean the particles (2-D classes), take more of them, or give --bootstrap.n-steps 1000",
            is_fatal=True,
        )
    if not evidence.halves_are_independent:
        yield Doubt(
            "both halves of the particles began with one map, so that their agreement says less",
            "with 1,200 particles or more, and the stages bootstrap and refinement, each half finds its own",
            is_fatal=False,
        )


def _doubts_of_fit(evidence: Evidence) -> Iterator[Doubt]:
    better = evidence.better_than_noise
    if better is not None and better < _MUCH_BETTER:
        yield Doubt(
            f"only {better:.0%} of the particles fit the map better than 95 % of images of pure noise do",
            "look at the particles: is there something in them? Is the pixel size, the defocus right?",
            is_fatal=better < _LITTLE_BETTER,
        )
    again = evidence.found_of_synthetic
    if again is not None and again < _FOUND_AGAIN:
        yield Doubt(
            f"of synthetic particles of this very map only {again:.0%} were posed rightly",
            "take more or better particles",
            is_fatal=False,
        )
    if evidence.misfit is not None and evidence.misfit < _MISFIT:
        yield Doubt(
            f"the particles fit the map {-evidence.misfit:.1f} standard deviations worse than particles of it would",
            "they may hold something else beside it, move, or have another pixel size or defocus than stated",
            is_fatal=False,
        )
    if evidence.sure is not None and evidence.sure < _FEW_SURE:
        enough = evidence.sure >= _ENOUGH_SURE
        advice = "export those with --keep-confident 0.5 and go on with them" if enough else "take more particles"
        if evidence.poses_were_given:
            advice = f"{advice}, or find all poses with cryoai reconstruct"
        yield Doubt(
            f"only {evidence.sure:.0%} of the poses are more likely right than wrong",
            advice,
            is_fatal=evidence.sure < _HARDLY_ANY and again is not None and again < _HARDLY_ANY,
        )


def _doubts_of_map(evidence: Evidence) -> Iterator[Doubt]:
    if evidence.n_resolved_shells < _FEWEST_SHELLS:
        yield Doubt(
            f"the half maps agree in {evidence.n_resolved_shells} shells only",
            "there is no structure in this map",
            is_fatal=True,
        )
    for defect in evidence.defects:
        advice = {
            MapDefect.BOX_TOO_SMALL: "extract the particles with a larger box",
            MapDefect.NEGATIVE_CONTRAST: "try --contrast with the other sign",
        }.get(defect, "look at the map before believing it, and try another --seed")
        yield Doubt(f"the map shows a known failure: {defect.value}", advice, is_fatal=False)
    if evidence.orientations_are_collapsed:
        yield Doubt(
            "nearly all particles were given the same few orientations",
            "try another --seed, and look for edges, gold or ice in the images",
            is_fatal=False,
        )
    elif evidence.orientations_are_preferred and evidence.resolution_is_anisotropic:
        yield Doubt(
            f"the orientations are preferred so much that the resolution differs by direction (area ratio "
            f"{evidence.cone_area_ratio:.2f})",
            "collect with a tilted stage, or another support film",
            is_fatal=False,
        )
    elif evidence.resolution_is_anisotropic and evidence.cone_area_ratio < _VERY_ANISOTROPIC:
        yield Doubt(
            f"the resolution differs by direction (area ratio {evidence.cone_area_ratio:.2f})",
            "look for streaks in the map",
            is_fatal=False,
        )
    if not evidence.contrast_is_clear:
        yield Doubt(
            "the images do not say clearly whether protein is bright or dark in them",
            "state it with --contrast",
            is_fatal=False,
        )


def _doubts_of_symmetry(evidence: Evidence) -> Iterator[Doubt]:
    if evidence.symmetry_asked is not None and evidence.symmetry_share is None:
        yield Doubt(
            f"{evidence.symmetry_asked} was imposed, and before too little was seen of the map to say whether it obeys",
            "run without --symmetry and see which groups are named",
            is_fatal=False,
        )
    if evidence.symmetry_share is not None and evidence.symmetry_share < 0.9:
        yield Doubt(
            f"before {evidence.symmetry_asked} was imposed, only {evidence.symmetry_share:.0%} of the signal obeyed it",
            "run without --symmetry and see which groups are named",
            is_fatal=False,
        )
