"""Two results side by side: runs, particle files with poses, or maps.

Neither is the truth. The first is brought into the frame of the second - rotation, shift and hand, which
images leave open - and what then still differs is said: of poses for every particle that both have,
found by the name of its image and not by its row; of maps shell by shell, for the better hand and for
the other one.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryoai.alignment import FrameChange, align_maps, change_frame
from cryoai.errors import InputError
from cryoai.evaluation import MapErrors, PoseErrors, map_errors, pose_errors, up_to_symmetry
from cryoai.formats.cryodrgn import read_cryodrgn_poses
from cryoai.formats.cryosparc.dataset import Dataset
from cryoai.formats.cryosparc.reading import image_references
from cryoai.formats.files import atomic_path
from cryoai.formats.mrc import MrcMap, read_map
from cryoai.formats.particle_files import FileKind, file_kind
from cryoai.formats.star import read_star
from cryoai.formats.star.lines import star_lines, tokens
from cryoai.formats.table import FloatColumn, ImageReferences, ParticleTable
from cryoai.fourier import resize_map
from cryoai.image_matching import ListedImages, Matching, match_images
from cryoai.particle_stack import ParticleStack
from cryoai.pose_files import poses_from_columns, read_poses
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.reconstruction import particle_mask
from cryoai.runs import RunFolder, finite_or_none
from cryoai.simulation import resample_map
from cryoai.symmetry.groups import PointGroup

__all__ = ["AlignedMaps", "Comparison", "MapComparison", "PoseComparison", "compare", "compare_maps", "compare_poses"]

_FEWEST_PARTICLES = 3
_QUARANTINED = "cryoaiQuarantined"
_MAP_SUFFIXES = (".mrc", ".map", ".ccp4", ".rec")
# Maps are aligned at low resolution, which leaves a few hundredths of a degree, and compared in no larger a box.
_ALIGNED_BOX, _ALIGNED_RADIUS = 64, 16
_LARGEST_BOX = 256
# Poses of which fewer agree within 10°, and hands whose mean shell correlations differ by less, say nothing.
_FEW, _ALIKE = 0.05, 0.02


# ------------------------------------------------------------------------------ what is found


@dataclass(frozen=True, eq=False)
class PoseComparison:
    """Poses of the same images, the first ones brought into the frame of the second ones.

    Attributes
    ----------
    images
        Of each matched particle, M of them: number@stack, or its row where no file names images.
    rotation_errors_in_degrees, shift_errors_in_angstroms
        (M,).
    errors
        Medians, shares and the frame.
    """

    matching: Matching
    images: Sequence[str]
    rotation_errors_in_degrees: Tensor
    shift_errors_in_angstroms: Tensor
    errors: PoseErrors


@dataclass(frozen=True, eq=False)
class AlignedMaps:
    """Two maps in one frame (shift in Å), and how far they agree; the correlation is that of their densities."""

    frame: FrameChange
    errors: MapErrors
    correlation: float


@dataclass(frozen=True, eq=False)
class MapComparison:
    """Two maps on one grid, inside a soft sphere.

    Attributes
    ----------
    best
        In the frame of the poses where there are some, and the maps themselves are fitted to nothing; else in
        that where the maps agree best.
    other_hand
        As well as they agree at the other hand.
    """

    n_pixels: int
    pixel_size_in_angstroms: float
    framed_by_poses: bool
    best: AlignedMaps
    other_hand: AlignedMaps

    @property
    def advantage_of_hand(self) -> float:
        """By how much the mean over all shells of the correlation is higher at the better hand."""
        return float((self.best.errors.fsc - self.other_hand.errors.fsc).mean())


@dataclass(frozen=True, eq=False)
class Comparison:
    """What two results have in common: poses, a map each, or both."""

    first: Path
    second: Path
    poses: PoseComparison | None
    maps: MapComparison | None

    @property
    def frame(self) -> FrameChange:
        """The change of the first's frame to the second's; shift in Å."""
        if self.poses is not None:
            return self.poses.errors.frame
        assert self.maps is not None
        return self.maps.best.frame

    def as_json(self) -> dict[str, Any]:
        """All but the errors of single particles, in what JSON can hold."""
        frame = self.frame
        report: dict[str, Any] = {
            "first": str(self.first),
            "second": str(self.second),
            "frame": {
                "rotation": [[round(x, 6) for x in row] for row in frame.rotation.tolist()],
                "shift_in_angstroms": [round(x, 3) for x in frame.shift.tolist()],
                "mirrored": frame.mirrored,
            },
        }
        if self.poses is not None:
            report["poses"] = _pose_numbers(self.poses)
        if self.maps is not None:
            report["map"] = _map_numbers(self.maps)
        return report

    def __str__(self) -> str:
        """The same for people, in a few lines."""
        lines = [f"first       {self.first}", f"second      {self.second}"]
        if self.poses is not None:
            lines.append(f"particles   {self.poses.matching}")
        lines += [_frame_line(self.frame), f"hand        {self._hand()}"]
        if self.poses is not None:
            lines += _pose_lines(self.poses.errors)
        if self.maps is not None:
            lines += _map_lines(self.maps)
        return "\n".join(lines)

    def _hand(self) -> str:
        if self.poses is not None and self.poses.errors.within_10_degrees < _FEW:
            return "not known, as the frame: the poses have nothing in common"
        if self.poses is None and self.maps is not None and self.maps.advantage_of_hand < _ALIKE:
            return "not known: these maps agree as well at both"
        return "opposite: the first was mirrored (images alone cannot tell)" if self.frame.mirrored else "the same"

    def write_csv(self, path: Path) -> None:
        """Write the errors of every particle: image, rotation error in degrees, shift error in Å.

        Raises
        ------
        InputError
            If there are none, because only maps were compared.
        """
        poses = self.poses
        if poses is None:
            raise InputError(f"{path}: maps were compared, which have no particles to list; leave it out")
        degrees, angstroms = poses.rotation_errors_in_degrees.tolist(), poses.shift_errors_in_angstroms.tolist()
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", "rotation_error_in_degrees", "shift_error_in_angstroms"])
            for image, rotation, shift in zip(poses.images, degrees, angstroms, strict=True):
                writer.writerow([image, f"{rotation:.4f}", f"{shift:.4f}"])


def _pose_numbers(poses: PoseComparison) -> dict[str, Any]:
    errors, matching = poses.errors, poses.matching
    return {
        "n_matched": len(matching),
        "n_only_in_first": matching.n_only_in_first,
        "n_only_in_second": matching.n_only_in_second,
        "n_ambiguous_stacks": matching.n_ambiguous,
        "n_without_pose": matching.n_without_pose,
        "matched_by": "image name" if matching.by_name else "row order",
        "median_rotation_error_in_degrees": finite_or_none(errors.median_rotation_error_in_degrees),
        "mean_rotation_error_in_degrees": finite_or_none(errors.mean_rotation_error_in_degrees),
        "within_5_degrees": errors.within_5_degrees,
        "within_10_degrees": errors.within_10_degrees,
        "median_shift_error_in_angstroms": finite_or_none(errors.median_shift_error_in_angstroms),
    }


def _map_numbers(maps: MapComparison) -> dict[str, Any]:
    return {
        "box_in_pixels": maps.n_pixels,
        "pixel_size_in_angstroms": finite_or_none(maps.pixel_size_in_angstroms),
        "nyquist_in_angstroms": finite_or_none(2 * maps.pixel_size_in_angstroms),
        "aligned_by": "poses" if maps.framed_by_poses else "map",
        **_hand_numbers(maps.best),
        "other_hand": _hand_numbers(maps.other_hand),
    }


def _hand_numbers(aligned: AlignedMaps) -> dict[str, Any]:
    return {
        "mirrored": aligned.frame.mirrored,
        "resolution_at_fsc_0.5": finite_or_none(aligned.errors.resolution_at_half_in_angstroms),
        "resolution_at_fsc_0.143": finite_or_none(aligned.errors.resolution_at_0143_in_angstroms),
        "correlation": finite_or_none(aligned.correlation),
        "fsc": [round(float(value), 5) for value in aligned.errors.fsc],
    }


def _frame_line(frame: FrameChange) -> str:
    turn = Rotation.from_matrix(frame.rotation.double().numpy()).as_rotvec(degrees=True)
    angle = float(np.linalg.norm(turn))
    axis = " about ({:.2f}, {:.2f}, {:.2f})".format(*turn / angle) if angle > 0.01 else ""
    shift = ", ".join(f"{x:.1f}" for x in frame.shift.tolist())
    return f"frame       turned by {angle:.1f}°{axis}, moved by ({shift}) Å"


def _pose_lines(errors: PoseErrors) -> list[str]:
    rotation = f"{errors.median_rotation_error_in_degrees:.2f}°"
    shift = f"{errors.median_shift_error_in_angstroms:.2f} Å"
    return [
        "",
        f"{'':<12}{'median':>9}{'< 5°':>9}{'< 10°':>9}",
        f"{'rotation':<12}{rotation:>9}{errors.within_5_degrees:>9.1%}{errors.within_10_degrees:>9.1%}",
        f"{'shift':<12}{shift:>9}",
    ]


def _map_lines(maps: MapComparison) -> list[str]:
    how = "in the frame of the poses" if maps.framed_by_poses else "aligned with each other"
    lines = [
        "",
        f"map         {how}; {maps.n_pixels} px of {maps.pixel_size_in_angstroms:.2f} Å",
        f"{'':<12}{'FSC 0.5':>9}{'0.143':>9}{'correlation':>13}",
    ]
    for label, aligned in (("this hand", maps.best), ("other hand", maps.other_hand)):
        found = aligned.errors
        periods = (found.resolution_at_half_in_angstroms, found.resolution_at_0143_in_angstroms)
        cells = "".join(f"{f'{p:.1f} Å' if np.isfinite(p) else 'none':>9}" for p in periods)
        lines.append(f"{label:<12}{cells}{aligned.correlation:>13.3f}")
    return lines


# ------------------------------------------------------------------------------ what is compared


def compare(
    first: Path, second: Path, *, extent_in_angstroms: float | None = None, passthrough: Sequence[Path] = ()
) -> Comparison:
    """Compare two runs, particle files with poses, or maps.

    Parameters
    ----------
    first, second
        Run folder, STAR file, cryoSPARC dataset, cryoDRGN's pose.pkl or map. Of a run its final poses and its map
        are compared, as far as the other has them.
    extent_in_angstroms
        Side of the images, of which cryoDRGN's shifts are fractions; needed where the other is no run and its
        images cannot be found.
    passthrough
        Further cryoSPARC datasets, where the one given does not name its images.

    Raises
    ------
    InputError
        If one cannot be read, or they have nothing in common.
    """
    sides = _Side.of(first), _Side.of(second)
    poses = maps = None
    if sides[0].particles is not None and sides[1].particles is not None:
        found, reference = (_read_posed(*pair, extent_in_angstroms, passthrough) for pair in (sides, sides[::-1]))
        poses = _compare_poses(found, reference, PointGroup.named("C1"))
    if sides[0].map is not None and sides[1].map is not None:
        densities = _read_density(sides[0].map), _read_density(sides[1].map)
        maps = compare_maps(*densities, None if poses is None else poses.errors.frame)
    if poses is None and maps is None:
        raise InputError(f"{first}, {second}: one has poses, the other is a map; give two maps or two with poses")
    return Comparison(first, second, poses, maps)


def compare_poses(first: Path, second: Path, symmetry: str = "C1") -> PoseComparison:
    """Compare the poses in two files of particles, up to the symmetry of the first; see :func:`compare`."""
    sides = _Side(first, first, None), _Side(second, second, None)
    found, reference = (_read_posed(*pair, None, ()) for pair in (sides, sides[::-1]))
    return _compare_poses(found, reference, PointGroup.named(symmetry))


@dataclass(frozen=True)
class _Side:
    """What there is to be compared of one of the two."""

    path: Path
    particles: Path | None
    map: Path | None

    @classmethod
    def of(cls, path: Path) -> _Side:
        if path.is_dir():
            run = RunFolder.open(path)
            return cls(path, run.particles, run.map)
        if path.suffix.lower() in _MAP_SUFFIXES:
            return cls(path, None, path)
        return cls(path, path, None)

    def extent_in_angstroms(self) -> float | FloatColumn | None:
        """Side of its images, or sides (N,); None where nothing says."""
        if self.map is not None:
            density = read_map(self.map)
            return len(density.density) * density.pixel_size_in_angstroms
        assert self.particles is not None
        try:
            stack = ParticleStack.open(self.particles)
        except InputError:
            return None
        return stack.image_sizes * stack.table.pixel_size_in_angstroms


@dataclass(frozen=True, eq=False)
class _Posed:
    """Poses (N,) of a file, which of them (N,) are to be used, and the images that they belong to."""

    poses: Poses
    used: NDArray[np.bool_]
    images: ListedImages

    @classmethod
    def of(
        cls, path: Path, poses: Poses, references: ImageReferences | None, unused: NDArray[np.bool_] | None = None
    ) -> _Posed:
        used = np.ones(len(poses), dtype=bool) if unused is None else ~unused
        return cls(poses, used, ListedImages(path, len(poses), references))


def _read_posed(side: _Side, other: _Side, extent_in_angstroms: float | None, passthrough: Sequence[Path]) -> _Posed:
    path = side.particles
    assert path is not None
    kind = file_kind(path)
    if kind is FileKind.PICKLE:
        found = read_cryodrgn_poses(path)
        extent = other.extent_in_angstroms() if extent_in_angstroms is None else extent_in_angstroms
        if found.origins_in_boxes is not None and extent is None:
            raise InputError(f"{path}: its shifts are fractions of the box; give its side in Å with --extent")
        if extent is None or (isinstance(extent, np.ndarray) and len(extent) != len(found)):
            extent = 0.0  # there are no shifts, or not as many particles, which is refused when they are matched
        return _Posed.of(path, poses_from_columns(found.columns(extent)), None)
    if kind is FileKind.CRYOSPARC:
        references = image_references(Dataset.open(path, passthrough))
        return _Posed.of(path, read_poses(path, passthrough=passthrough), references)
    if kind is FileKind.STAR:
        table = read_star(path)
        if table.poses is not None:
            return _Posed.of(path, poses_from_columns(table.poses), table.images, _quarantined(table))
    return _Posed.of(path, read_poses(path), None)  # which refuses, and says what is missing


def _quarantined(table: ParticleTable) -> NDArray[np.bool_] | None:
    """Which particles (N,) of a STAR file a run has set aside, because of their images; they have no pose."""
    layout = table.star
    if layout is None or _QUARANTINED not in layout.columns:
        return None
    place = layout.columns.index(_QUARANTINED)
    rows = (line.text for line in star_lines(layout.path) if line.kind == "row" and line.block == layout.block)
    return np.array([tokens(text)[place] != "0" for text in rows])


def _compare_poses(first: _Posed, second: _Posed, group: PointGroup) -> PoseComparison:
    matching = match_images(first.images, second.images)
    matching = matching.only(first.used[matching.first] & second.used[matching.second])
    if len(matching) < _FEWEST_PARTICLES:
        raise InputError(
            f"{first.images.path}: shares only {len(matching)} images with {second.images.path}; "
            f"at least {_FEWEST_PARTICLES} are needed: give files of the same particles"
        )
    found = first.poses[torch.from_numpy(matching.first)]
    reference = second.poses[torch.from_numpy(matching.second)]
    if len(group) > 1:
        found = up_to_symmetry(found, reference, group)
    errors = pose_errors(found, reference)
    aligned = errors.frame.of_poses(found)
    named = (second.images, matching.second) if first.images.references is None else (first.images, matching.first)
    return PoseComparison(
        matching,
        named[0].names(named[1]),
        angular_distance_in_degrees(aligned.rotations, reference.rotations),
        (aligned.shifts_in_angstroms - reference.shifts_in_angstroms).norm(dim=1),
        errors,
    )


# ------------------------------------------------------------------------------ maps


def _read_density(path: Path) -> MrcMap:
    density = read_map(path)
    if np.ptp(density.density) == 0:
        raise InputError(
            f"{path}: all voxels of the map are {density.density.flat[0]:g}; give one with a particle in it"
        )
    return density


def compare_maps(first: MrcMap, second: MrcMap, frame: FrameChange | None) -> MapComparison:
    """Compare two maps of any box and pixel size, on the grid of the one with the coarser pixels.

    Parameters
    ----------
    frame
        Of the poses that belong to the maps; shift in Å. Without it both hands are aligned, and the better one found.
    """
    coarser = max(first, second, key=lambda m: (m.pixel_size_in_angstroms, -len(m.density)))
    n = min(len(coarser.density), _LARGEST_BOX)
    pixel_size = coarser.pixel_size_in_angstroms * len(coarser.density) / n
    moving, reference = (_on_grid(density, n, pixel_size) for density in (first, second))

    def judged(change: FrameChange) -> AlignedMaps:
        errors = map_errors(moving, reference, pixel_size, change)
        in_pixels = FrameChange(change.rotation, change.mirrored, change.shift / pixel_size)
        return AlignedMaps(change, errors, _correlation(change_frame(moving, in_pixels), reference))

    hands = (False, True) if frame is None else (not frame.mirrored,)
    found = [judged(_aligned(moving, reference, pixel_size, mirrored)) for mirrored in hands]
    if frame is not None:
        found.append(judged(frame))
    else:
        found.sort(key=lambda aligned: float(aligned.errors.fsc.sum()))
    other_hand, best = found
    return MapComparison(n, pixel_size, frame is not None, best, other_hand)


def _on_grid(density: MrcMap, n_pixels: int, pixel_size_in_angstroms: float) -> Tensor:
    """The voxels (n, n, n) of a map, resampled centre on centre; what is outside of the box is cut off first."""
    n, pixel_size = len(density.density), density.pixel_size_in_angstroms
    if n == n_pixels and abs(pixel_size - pixel_size_in_angstroms) < 1e-3 * pixel_size:
        return torch.from_numpy(density.density)
    # Resampling repeats a map like a crystal: beyond the box it would come back on the other side.
    kept = min(n, int(n_pixels * pixel_size_in_angstroms / pixel_size + 1e-6))
    inside = slice(n // 2 - kept // 2, n // 2 - kept // 2 + kept)
    cut = MrcMap(np.ascontiguousarray(density.density[inside, inside, inside]), pixel_size)
    return torch.from_numpy(resample_map(cut, n_pixels, pixel_size_in_angstroms).density)


def _aligned(moving: Tensor, reference: Tensor, pixel_size_in_angstroms: float, mirrored: bool) -> FrameChange:
    """The frame change (shift in Å) to one of the hands at which two maps (n, n, n) agree best."""
    n = len(moving)
    small = min(n, _ALIGNED_BOX)
    if small < n:
        moving, reference = resize_map(moving, small), resize_map(reference, small)
    if mirrored:
        moving = change_frame(moving, FrameChange(torch.eye(3), True, torch.zeros(3)))
    radius = min(_ALIGNED_RADIUS, small // 2 - 2)
    found = align_maps(moving, reference, max_radius=radius, try_mirror=False)
    return FrameChange(found.rotation, mirrored, found.shift * (pixel_size_in_angstroms * n / small))


def _correlation(first: Tensor, second: Tensor) -> float:
    """Pearson correlation of two maps (n, n, n) inside the soft sphere of a particle."""
    mask = particle_mask(len(first)).double()
    a, b = ((density - (density * mask).sum() / mask.sum()) * mask.sqrt() for density in (first, second))
    return float((a * b).sum() / (a.norm() * b.norm()))
