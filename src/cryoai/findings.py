"""What a finished map and its poses show: everything that is judged without looking at an image again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cryoai.half_maps import HalfMaps
from cryoai.poses import Poses
from cryoai.reconstruction import particle_mask
from cryoai.symmetry.detection import SymmetryCandidate, find_symmetry
from cryoai.symmetry.groups import PointGroup
from cryoai.validation.defects import MapDefects, map_defects
from cryoai.validation.local_resolution import local_resolution
from cryoai.validation.orientations import (
    ConicalCorrelation,
    OrientationDistribution,
    conical_correlation,
    orientation_distribution,
)
from cryoai.validation.sharpening import SharpenedMap, sharpened_map

__all__ = ["MapFindings", "examine"]


@dataclass(frozen=True, eq=False)
class MapFindings:
    """See the functions that each field comes from.

    Attributes
    ----------
    local_resolution_in_angstroms : (n, n, n)
    symmetries
        Empty where a symmetry was asked for: a map cannot be questioned about what it was made to have.
    """

    sharpened: SharpenedMap
    local_resolution_in_angstroms: Tensor
    orientations: OrientationDistribution
    conical: ConicalCorrelation
    defects: MapDefects
    symmetries: tuple[SymmetryCandidate, ...]

    @property
    def likely_symmetry(self) -> SymmetryCandidate | None:
        """The largest point group that the map obeys, if there is one."""
        return next((candidate for candidate in self.symmetries if candidate.is_likely), None)

    @property
    def headline(self) -> str:
        """In a line: what the map shows beside its resolution."""
        likely = self.likely_symmetry
        found = [f"symmetry {likely.group.name} ({likely.share:.0%} of the signal)"] if likely else []
        if self.orientations.is_collapsed:
            found.append("nearly all orientations in a few directions")
        elif self.orientations.is_preferred:
            share = self.orientations.densest_tenth_share
            found.append(f"preferred orientations ({share:.0%} of the particles in a tenth of the directions)")
        found += [defect.value for defect in self.defects.found]
        return "; ".join(found) or "no symmetry, no preferred orientation, no known defect"

    def group_of_map(self, asked: PointGroup) -> PointGroup:
        """The group under which poses count as equal, in the frame of the map: the one asked for, or found."""
        likely = self.likely_symmetry
        return asked if len(asked) > 1 or likely is None else likely.group_of_map


def examine(half_maps: HalfMaps, poses: Poses, pixel_size_in_angstroms: float, group: PointGroup) -> MapFindings:
    """Examine half maps and the poses (N,) that they were made at, under an assumed symmetry."""
    first, second, mask = half_maps.first, half_maps.second, half_maps.mask
    resolution = half_maps.resolution_in_angstroms
    return MapFindings(
        sharpened_map(first, second, mask, half_maps.fsc, pixel_size_in_angstroms, resolution),
        local_resolution(first, second, mask, pixel_size_in_angstroms),
        orientation_distribution(poses.rotations, group.operators),
        # Inside a tight mask, what leaks into directions without data agrees in both halves.
        conical_correlation(first, second, particle_mask(len(mask), device=mask.device), pixel_size_in_angstroms),
        map_defects(first, second, pixel_size_in_angstroms, resolution),
        find_symmetry(first, second) if len(group) == 1 else (),
    )
