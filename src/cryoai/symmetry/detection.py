"""Which point group a map obeys, found from the half maps of a run without symmetry.

Such a map has its axes anywhere, and they meet some pixels off the centre of the box. One turn of
every fold is tried about every direction of a hemisphere, with all displacements at once; a group is
then a set of axes that are all there, found over a grid of its orientations by looking its axes up;
and its orientation and centre are refined by gradient on a few of its operators. A map of 64 pixels takes
5 s on one core.

A map is compared with itself by its two half maps (:mod:`cryoai.symmetry.self_correlation`), so that
noise does not count: of a symmetric particle every operator keeps all of the reproducible signal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import roma
import torch
from torch import Tensor

from cryoai.alignment import FrameChange, change_frame
from cryoai.fourier import fourier_shell_correlation, n_shells_above, resize_map
from cryoai.poses import rotation_grid
from cryoai.reconstruction import particle_mask
from cryoai.symmetry.axes import AxisMap, turns_about
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
from cryoai.symmetry.self_correlation import SelfCorrelation

__all__ = ["SymmetryCandidate", "adjust_symmetry", "find_symmetry", "place_symmetry"]

# Shells used, in Fourier pixels: by the search over directions, by the refinement, and at most.
_SEARCH_RADIUS, _FINE_RADIUS, _LARGEST_RADIUS = 10, 16, 32
# With fewer shells any particle is a blob, and a blob has many symmetries.
_LEAST_RADIUS = 5
# Radians about x, y and z; no axis of a group then lies along one of the lattice.
_AWAY = (0.31, -0.47, 0.59)
# Between neighbouring turns of the search, as a share of 1 / radius: the nearest keeps 0.85 of what the axis does.
_STEP = 0.7
# Orientations that are 3° apart. Of a group of G operators one in G is enough.
_N_ORIENTATIONS = 600_000
# Of what a true group keeps, its worst axis on the grid keeps 0.63 and more.
_LEAST_SHARE_ON_GRID = 0.4
# A candidate keeps so much, and so much more than turns half-way between its operators.
_LEAST_SHARE, _LEAST_CONTRAST = 0.5, 0.1
# A likely one keeps so much, so many standard deviations above random rotations. Measured: particles that have the
# symmetry 0.94 to 1.02 and 5 to 220; haemoglobin as D2 0.77 at 13 Å, the RuvB hexamer on its junction as C6 0.77
# at 24 Å.
_LIKELY_SHARE, _LIKELY_Z_SCORE = 0.9, 4.0
_N_REFINED = 4
_N_RANDOM = 64


@dataclass(frozen=True, eq=False)
class SymmetryCandidate:
    """A point group that a map may have.

    Attributes
    ----------
    group
        In its standard orientation.
    share
        The least share of the reproducible signal that an operator of the group leaves unchanged: 1 for the
        symmetry of the particle, less for one that the particle only resembles.
    share_between
        The largest share that a turn half-way between two operators about one axis leaves unchanged.
    z_score
        How many standard deviations ``share`` lies above the mean over random rotations.
    frame
        What brings the map, shift in pixels, to the axes of the group and their meeting point to the centre. Along
        the axis of a cyclic group the map stays where it is.
    """

    group: PointGroup
    share: float
    share_between: float
    z_score: float
    frame: FrameChange

    @property
    def is_likely(self) -> bool:
        """Whether the map obeys the group, and not only resembles it."""
        return self.share >= _LIKELY_SHARE and self.z_score >= _LIKELY_Z_SCORE

    @property
    def group_of_map(self) -> PointGroup:
        """The group with its axes where the map has them."""
        turn = self.frame.rotation
        return PointGroup(self.group.name, turn.T @ self.group.operators.to(turn) @ turn)


@dataclass(frozen=True, eq=False)
class _Placement:
    """Where a group sits in a map: its axes turned by ``rotation`` (3, 3), meeting at ``centre`` (3,) in pixels."""

    rotation: Tensor
    centre: Tensor

    def shares(self, operators: Tensor, correlation: SelfCorrelation) -> Tensor:
        """Shares (M,) that rotations (M, 3, 3), given in the orientation of the group, leave unchanged."""
        turns = self.rotation @ operators @ self.rotation.T
        return correlation.shares(turns, self.centre - turns @ self.centre)

    def change(self, pixels: float) -> FrameChange:
        """What brings the map to the axes of the group, for a map of so many pixels per pixel of this one."""
        return FrameChange(self.rotation.T, False, -pixels * (self.rotation.T @ self.centre))


@torch.no_grad()
def find_symmetry(
    first: Tensor, second: Tensor, max_radius: int | None = None, *, largest_fold: int = 8
) -> tuple[SymmetryCandidate, ...]:
    """The point groups that a map obeys or resembles, from its half maps (n, n, n), the likely ones first.

    Likely groups are sorted by their order, so that a group comes before its subgroups; then come
    those that the particle resembles, such as pseudo-symmetries, by their share. Without a likely
    group the particle is asymmetric as far as can be seen.

    A group counts only if turns half-way between its operators break the map. A featureless ball, of
    which every rotation is a symmetry, has no group, and a ring whose units are not resolved is not
    given a number of them.

    Parameters
    ----------
    max_radius
        Last shell compared. Default: the last before the half maps' FSC falls below 0.5, at most 32. With fewer
        than 5 shells there are no candidates.
    largest_fold
        Of the cyclic and dihedral groups.
    """
    views = _Views.of(first, second, max_radius)
    if views is None:
        return ()
    folds = range(2, largest_fold + 1)
    axis_maps = views.axis_maps(folds)
    found = []
    for group in _groups(folds):
        start = _place_on_grid(group.to(first.device), axis_maps, _LEAST_SHARE_ON_GRID)
        if start is not None:
            found.append(views.judged(group, views.refined(start, group)))
    kept = [c for c in found if c.share >= _LEAST_SHARE and c.share - c.share_between >= _LEAST_CONTRAST]
    return tuple(sorted(kept, key=_rank))


@torch.no_grad()
def place_symmetry(first: Tensor, second: Tensor, group: PointGroup) -> SymmetryCandidate | None:
    """Where a group suits a map best, from its half maps (n, n, n), however badly; None if nothing is resolved."""
    views = _Views.of(first, second, None)
    if views is None:
        return None
    start = _place_on_grid(group.to(first.device), views.axis_maps(sorted(set(_axes_of(group)[1]))), -math.inf)
    assert start is not None
    return views.judged(group, views.refined(start, group))


@torch.no_grad()
def adjust_symmetry(first: Tensor, second: Tensor, group: PointGroup) -> SymmetryCandidate | None:
    """As :func:`place_symmetry`, of half maps (n, n, n) whose axes are nearly where they belong."""
    # Turned away from the axes of the lattice: turns about these need no interpolation, which dims all others, so that
    # axes within a degree of them would be drawn to them.
    turn = roma.rotvec_to_rotmat(torch.tensor(_AWAY, device=first.device))
    away = FrameChange(turn, mirrored=False, shift=torch.zeros(3, device=first.device))
    views = _Views.of(change_frame(first, away), change_frame(second, away), None)
    if views is None:
        return None
    found = views.judged(group, views.refined(_Placement(turn, away.shift), group))
    return replace(found, frame=replace(found.frame, rotation=found.frame.rotation @ turn))


@dataclass(frozen=True, eq=False)
class _Views:
    """Two half maps compared with themselves turned, in three bands: for the search, for refinement, and for judgement.

    ``pixels`` of the maps are one of the box that the comparison is made in.
    """

    coarse: SelfCorrelation
    fine: SelfCorrelation
    whole: SelfCorrelation
    pixels: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor, max_radius: int | None) -> _Views | None:
        """None if fewer shells are resolved than a symmetry can be told by."""
        n = first.shape[-1]
        mask = particle_mask(n, device=first.device)
        halves = [(half * mask).float() for half in (first, second)]
        if max_radius is None:
            max_radius = min(n_shells_above(fourier_shell_correlation(*halves), 0.5), _LARGEST_RADIUS)
        max_radius = min(max_radius, n // 2 - 1)
        if max_radius < _LEAST_RADIUS:
            return None
        # No larger a box than the shells need.
        n_needed = min(n, 2 * (max_radius + 4))
        one, other = (resize_map(half, n_needed) for half in halves)
        coarse, fine, whole = (
            SelfCorrelation.of_half_maps(one, other, min(radius, max_radius))
            for radius in (_SEARCH_RADIUS, _FINE_RADIUS, max_radius)
        )
        return cls(coarse, fine, whole, n / n_needed)

    def axis_maps(self, folds: Sequence[int]) -> dict[int, AxisMap]:
        return {fold: AxisMap.of_map(self.coarse, fold, _STEP / self.coarse.max_radius) for fold in folds}

    def refined(self, start: _Placement, group: PointGroup) -> _Placement:
        return _refine(_refine(start, group, self.coarse), group, self.fine)

    def judged(self, group: PointGroup, placement: _Placement) -> SymmetryCandidate:
        return _judged(group, placement, self.whole, self.random, self.pixels)

    @cached_property
    def random(self) -> Tensor:
        """Shares (R,) that random rotations leave unchanged."""
        shares, _ = self.whole.largest_shares(rotation_grid(_N_RANDOM, device=self.whole.points.device))
        return shares


def _rank(candidate: SymmetryCandidate) -> tuple[bool, int, float]:
    """Likely candidates first, the largest group of them first; the others by their share."""
    order = len(candidate.group) if candidate.is_likely else 0
    return (not candidate.is_likely, -order, -candidate.share)


def _groups(folds: Sequence[int]) -> list[PointGroup]:
    names = [f"{family}{fold}" for family in "CD" for fold in folds] + ["T", "O", "I"]
    return [PointGroup.named(name) for name in names]


def _axes_of(group: PointGroup) -> tuple[Tensor, list[int]]:
    """Direction (J, 3) and fold of every operator that is one turn, ``360 / fold`` degrees."""
    vectors = roma.rotmat_to_rotvec(group.operators[1:].double())
    folds = 2 * math.pi / vectors.norm(dim=1)
    is_one_turn = (folds - folds.round()).abs() < 1e-3
    directions = vectors[is_one_turn] / vectors[is_one_turn].norm(dim=1, keepdim=True)
    return directions.float(), [round(fold) for fold in folds[is_one_turn].tolist()]


def _place_on_grid(group: PointGroup, axis_maps: dict[int, AxisMap], least_share: float) -> _Placement | None:
    """Where the axes of a group keep most on average; None if one of them keeps less than the least share there."""
    axes, folds = _axes_of(group)
    if not set(folds) <= set(axis_maps):
        return None
    maps = [axis_maps[fold] for fold in folds]
    if group.name.startswith("C"):
        # The lowest fold has the densest directions.
        orientations = _with_z_along(axis_maps[min(folds)].directions)
    else:
        orientations = rotation_grid(_N_ORIENTATIONS // len(group), device=axes.device)
    directions = torch.einsum("mab,jb->jma", orientations, axes)
    rows = torch.stack([axis_map.nearest(along) for axis_map, along in zip(maps, directions, strict=True)])
    shares = torch.stack([axis_map.shares[row] for axis_map, row in zip(maps, rows, strict=True)])
    best = shares.mean(0).argmax()
    if shares[:, best].min() < least_share:
        return None
    # A turn S about a point c displaces by c - S c. Along the axis of a cyclic group c stays 0.
    found = list(zip(maps, rows[:, best], strict=True))
    turns = torch.stack([turns_about(axis_map.directions[row], axis_map.fold) for axis_map, row in found])
    displacements = torch.stack([axis_map.displacements[row] for axis_map, row in found])
    equations = (torch.eye(3).to(turns) - turns).reshape(-1, 3)
    return _Placement(orientations[best], torch.linalg.pinv(equations, rtol=0.2) @ displacements.flatten())


def _with_z_along(directions: Tensor) -> Tensor:
    """Rotations (M, 3, 3) that take z to the directions (M, 3)."""
    least = torch.eye(3).to(directions)[directions.abs().argmin(1)]
    x = torch.linalg.cross(least, directions)
    x = x / x.norm(dim=1, keepdim=True)
    return torch.stack([x, torch.linalg.cross(directions, x), directions], dim=-1)


def _refine(start: _Placement, group: PointGroup, correlation: SelfCorrelation) -> _Placement:
    """The placement near the start at which a few operators of the group keep most."""
    rows = torch.linspace(1, len(group) - 1, min(_N_REFINED, len(group) - 1)).round().long()
    operators = group.operators[rows].to(start.rotation)
    # Scaled so that a unit step in either moves the outermost shell by about a radian.
    parameters = torch.zeros(6, device=start.rotation.device, requires_grad=True)
    pixel = correlation.n_pixels / (2 * math.pi * correlation.max_radius)

    def current() -> _Placement:
        turn = roma.rotvec_to_rotmat(parameters[:3] / correlation.max_radius)
        return _Placement(turn @ start.rotation, start.centre + parameters[3:] * pixel)

    optimizer = torch.optim.LBFGS([parameters], max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = -current().shares(operators, correlation).mean()
            loss.backward()
        return loss

    optimizer.step(closure)
    return current()


def _judged(
    group: PointGroup, placement: _Placement, correlation: SelfCorrelation, random: Tensor, pixels: float
) -> SymmetryCandidate:
    """The candidate, given the shares (R,) that random rotations leave unchanged."""
    share = min(float(placement.shares(part.to(random), correlation).min()) for part in group.operators[1:].split(4))
    between = max(float(placement.shares(part.to(random), correlation).max()) for part in _between(group).split(4))
    z_score = float((share - random.mean()) / random.std())
    return SymmetryCandidate(group, share, between, z_score, placement.change(pixels))


def _between(group: PointGroup) -> Tensor:
    """Turns (M, 3, 3) half-way from the identity to the first operator about each axis."""
    axes, folds = _axes_of(group)
    halves = torch.stack([turns_about(axis, 2 * fold) for axis, fold in zip(axes, folds, strict=True)])
    # Half of a third of a turn about a 6-fold axis is an operator.
    identity = torch.eye(3).expand_as(halves)
    return halves[symmetric_distance_in_degrees(identity, halves, group) > 1]
