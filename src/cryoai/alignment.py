"""The unknown frame: the best rotation, shift and hand between two pose sets or two maps.

Ab initio reconstruction leaves the frame of the particle open. Two results can be compared once the
frame of one is changed to that of the other, ``r' = Q J r + t``: ``J`` reverses z where the hands
differ, ``Q`` is a rotation, ``t`` a shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import roma
import torch
from torch import Tensor

from cryoai.fourier import HalfLattice, invert_transform, transform_map, translation_phases
from cryoai.poses import Poses, angular_distance_in_degrees, rotation_grid
from cryoai.volumes import SampledVolume

__all__ = ["FrameChange", "align_maps", "align_poses", "change_frame"]

_N_CANDIDATES = 300
_N_VOTERS = 1000


@dataclass(frozen=True, eq=False)
class FrameChange:
    """A change of the particle's frame: mirror z if ``mirrored``, rotate, then shift.

    ``rotation`` is (3, 3), ``shift`` (3,), ordered (x, y, z): in Å for poses, in pixels for maps.
    """

    rotation: Tensor
    mirrored: bool
    shift: Tensor

    def of_poses(self, poses: Poses) -> Poses:
        """The poses of the same images with respect to the changed particle."""
        rotations = self.rotation.to(poses.rotations) @ (_mirror(poses.rotations) if self.mirrored else poses.rotations)
        # A particle moved by t is seen moved by the first two components of R^T t, and its origin
        # with it: the image itself stays where it is.
        moved = (rotations.transpose(-1, -2) @ self.shift.to(rotations))[..., :2]
        return Poses(rotations, poses.shifts_in_angstroms + moved)


def _mirror(rotations: Tensor) -> Tensor:
    """Rotations for the mirror image of the particle: ``J R J`` with ``J = diag(1, 1, -1)``."""
    signs = torch.tensor([1.0, 1.0, -1.0], dtype=rotations.dtype, device=rotations.device)
    return signs[:, None] * rotations * signs


def align_poses(moving: Poses, reference: Poses) -> FrameChange:
    """The frame change that brings ``moving`` poses closest to ``reference`` poses of the same particles.

    Robust to outliers: the rotation is the one on which most particles agree within 15°, then the
    mean over those within 1.5 times the median error; the shift is fitted to the same particles.
    Both hands are tried. Poses are (N,), N at least 3.
    """
    best: tuple[float, FrameChange] | None = None
    for mirrored in (False, True):
        rotations = _mirror(moving.rotations) if mirrored else moving.rotations
        rotation = _consensus_rotation(reference.rotations @ rotations.transpose(-1, -2))
        change = FrameChange(rotation, mirrored, torch.zeros(3))
        errors = angular_distance_in_degrees(change.of_poses(moving).rotations, reference.rotations)
        score = float((errors < 20).float().mean()) - float(errors.median()) / 360
        if best is None or score > best[0]:
            best = (score, FrameChange(rotation, mirrored, _fit_shift(change.of_poses(moving), reference, errors)))
    assert best is not None
    return best[1]


def _consensus_rotation(relative: Tensor) -> Tensor:
    """The rotation (3, 3) that most of the relative rotations (N, 3, 3) are near to."""
    n = len(relative)
    candidates = relative[torch.linspace(0, n - 1, min(_N_CANDIDATES, n)).long()]
    voters = relative[torch.linspace(0, n - 1, min(_N_VOTERS, n)).long()]
    # trace(A^T B) = 1 + 2 cos(angle)
    cosine = (torch.einsum("aij,bij->ab", candidates, voters) - 1) / 2
    votes = (cosine > math.cos(math.radians(15))).sum(1)
    rotation = candidates[votes.argmax()]
    for _ in range(5):
        distance = angular_distance_in_degrees(rotation.expand_as(relative), relative)
        near = distance <= max(5.0, 1.5 * float(distance.median()))
        rotation = roma.special_procrustes(relative[near].mean(0))
    return rotation


def _fit_shift(moving: Poses, reference: Poses, errors: Tensor) -> Tensor:
    """Least-squares frame shift (3,) from the particles whose rotations agree."""
    near = errors <= max(5.0, 1.5 * float(errors.median()))
    axes = moving.rotations[near][:, :, :2].transpose(1, 2).reshape(-1, 3).double()
    differences = (reference.shifts_in_angstroms - moving.shifts_in_angstroms)[near].flatten().double()
    weights = torch.ones_like(differences)
    shift = torch.zeros(3, dtype=torch.float64)
    for _ in range(10):
        # Iteratively reweighted towards the median, so that a few wild shifts do not pull the frame.
        normal = (axes * weights[:, None]).T @ axes
        ridge = 1e-9 * torch.eye(3, dtype=torch.float64) * normal.trace()
        shift = torch.linalg.solve(normal + ridge, (axes * weights[:, None]).T @ differences)
        residual = (differences - axes @ shift).abs()
        weights = 1 / residual.clamp_min(max(float(residual.median()), 1e-6))
    return shift.float()


# ------------------------------------------------------------------------------ maps


def change_frame(density: Tensor, change: FrameChange) -> Tensor:
    """The map (n, n, n) mirrored, rotated and shifted (pixels) about its centre."""
    n = density.shape[-1]
    lattice = HalfLattice(n, n // 2, 1)
    points = lattice.frequencies(device=density.device)
    inside = lattice.radii(device=density.device) < n / 2
    values = torch.zeros(len(points), dtype=torch.complex64, device=density.device)
    values[inside] = _read_in_frame(SampledVolume.from_map(density, n // 2), points[inside], change)
    return invert_transform(lattice.fill_in(values), n)


def _read_in_frame(volume: SampledVolume, points: Tensor, change: FrameChange) -> Tensor:
    """Transform of the changed map at frequencies (P, 3): ``exp(-2 pi i k.t) V(J Q^T k)``."""
    source = points @ change.rotation.to(points)
    if change.mirrored:
        source = source * torch.tensor([1.0, 1.0, -1.0], device=points.device)
    return volume(source) * translation_phases(change.shift.to(points), points)


def align_maps(moving: Tensor, reference: Tensor, *, max_radius: int, try_mirror: bool = True) -> FrameChange:
    """The frame change (shift in pixels) that brings one map (n, n, n) onto another.

    Maximises the correlation of the transforms in shells 1 to ``max_radius``: exhaustively at low
    resolution over about 4,600 rotations (and hands), all shifts at once by a Fourier transform;
    then by gradient from the five best of each hand. On the CPU, whatever device the maps are on: the
    transforms are many and small.
    """
    moving, reference = moving.cpu(), reference.cpu()
    coarse_radius = min(max_radius, 8)
    starts: list[tuple[float, FrameChange]] = []
    for mirrored in (False, True) if try_mirror else (False,):
        # Of each hand its own: at low resolution the wrong hand can fit almost as well as the right one.
        starts += _coarse_alignments(moving, reference, coarse_radius, mirrored)[:5]
    refined = [_refine_alignment(moving, reference, max_radius, change) for _, change in starts]
    return max(refined, key=lambda result: result[0])[1]


def _half_space_points(lattice: HalfLattice, max_radius: int) -> tuple[Tensor, Tensor]:
    radii = lattice.radii()
    inside = (radii > 0.5) & (radii < max_radius + 0.5)
    return lattice.frequencies()[inside], inside


def _coarse_alignments(
    moving: Tensor, reference: Tensor, max_radius: int, mirrored: bool
) -> list[tuple[float, FrameChange]]:
    n = moving.shape[-1]
    lattice = HalfLattice(n, max_radius, 1)
    points, inside = _half_space_points(lattice, max_radius)
    target = lattice.cut_out(transform_map(reference))[inside]
    source = SampledVolume.from_map(moving, max_radius)
    # The smallest box that holds the band: the correlation for every shift is one small transform.
    small = 2 * (lattice.half_width + 1)
    small_lattice = HalfLattice(small, max_radius, 1)
    rotations = rotation_grid(4608)
    found = []
    for chunk in rotations.split(128):
        signs = torch.tensor([1.0, 1.0, -1.0 if mirrored else 1.0])
        values = source((points @ chunk) * signs)
        products = torch.zeros((len(chunk), lattice.n_points), dtype=torch.complex64)
        products[:, inside] = target * values.conj()
        score, shift = _best_shift(products, small_lattice)
        score = score / (values.abs().square().sum(1).sqrt() + 1e-12)
        for i in score.topk(min(3, len(chunk))).indices.tolist():
            change = FrameChange(chunk[i], mirrored, shift[i] * (n / small))
            found.append((float(score[i]), change))
    found.sort(key=lambda item: -item[0])
    return found[:10]


def _best_shift(products: Tensor, lattice: HalfLattice) -> tuple[Tensor, Tensor]:
    """Peak (B,) and its shift (B, 3), (x, y, z) in pixels, of correlations given by their transforms."""
    small = lattice.n_pixels
    spectra = torch.stack([lattice.fill_in(product) for product in products])
    correlation = torch.fft.irfftn(torch.fft.ifftshift(spectra, dim=(1, 2)), s=(small,) * 3)
    peak, index = correlation.flatten(1).max(1)
    zyx = torch.stack(torch.unravel_index(index, (small,) * 3), dim=-1)
    signed = (zyx + small // 2) % small - small // 2
    return peak, signed.flip(-1).float()


def _refine_alignment(
    moving: Tensor, reference: Tensor, max_radius: int, start: FrameChange
) -> tuple[float, FrameChange]:
    lattice = HalfLattice(moving.shape[-1], max_radius, 1)
    points, inside = _half_space_points(lattice, max_radius)
    target = lattice.cut_out(transform_map(reference))[inside]
    source = SampledVolume.from_map(moving, max_radius)
    # Scaled so that a unit step in either moves the outermost shell by about a radian.
    parameters = torch.zeros(6, requires_grad=True)
    pixel = moving.shape[-1] / (2 * math.pi * max_radius)

    def current() -> FrameChange:
        rotation = roma.rotvec_to_rotmat(parameters[:3] / max_radius) @ start.rotation
        return FrameChange(rotation, start.mirrored, start.shift + parameters[3:] * pixel)

    def correlation() -> Tensor:
        values = _read_in_frame(source, points, current())
        return (target.conj() * values).real.sum() / (target.norm() * values.norm())

    optimizer = torch.optim.LBFGS([parameters], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -correlation()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        change = current()
        return float(correlation()), FrameChange(change.rotation.detach(), change.mirrored, change.shift.detach())
