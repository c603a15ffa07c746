"""Poses: rotations, in-plane shifts, and their conversion to and from RELION.

A rotation ``R`` maps image coordinates to the particle: the central slice of an image is read at
the frequencies ``R [kx, ky, 0]^T``. ``R`` is the transpose of RELION's Euler matrix ``A``, and
equals ``scipy.spatial.transform.Rotation.from_euler("ZYZ", [rot, tilt, psi])``.

A shift is stored as RELION's origin, ordered (x, y), in Å: the content of the image sits at *minus*
the origin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import roma
import torch
from torch import Tensor

__all__ = [
    "Hypotheses",
    "Poses",
    "angular_distance_in_degrees",
    "assign_poses",
    "blank_poses",
    "half_turn",
    "rotation_grid",
    "rotations_about_z",
    "rotations_from_euler_angles",
    "rotations_from_s2s2",
    "rotations_to_euler_angles",
    "selected_poses",
]


@dataclass(frozen=True, eq=False)
class Poses:
    """Rotations (..., 3, 3) and shifts (..., 2) in Å of a batch of particles."""

    rotations: Tensor
    shifts_in_angstroms: Tensor

    def __post_init__(self) -> None:
        r, t = self.rotations.shape, self.shifts_in_angstroms.shape
        if r[-2:] != (3, 3) or t[-1:] != (2,) or r[:-2] != t[:-1]:
            raise ValueError(f"poses need rotations (..., 3, 3) and shifts (..., 2), got {tuple(r)} and {tuple(t)}")

    def __len__(self) -> int:
        return self.rotations.shape[0]

    def __getitem__(self, index: Tensor | slice | tuple[slice, int]) -> Poses:
        return Poses(self.rotations[index], self.shifts_in_angstroms[index])

    @classmethod
    def cat(cls, parts: Sequence[Poses]) -> Poses:
        """One batch after the other."""
        return cls(
            torch.cat([part.rotations for part in parts]), torch.cat([part.shifts_in_angstroms for part in parts])
        )

    def to(self, device: torch.device | str) -> Poses:
        return Poses(self.rotations.to(device), self.shifts_in_angstroms.to(device))

    def take(self, index: Tensor) -> Poses:
        """Of poses (B, K), those chosen by ``index`` (B, D) for each particle, as poses (B, D)."""
        row = torch.arange(len(self), device=index.device)[:, None]
        return Poses(self.rotations[row, index], self.shifts_in_angstroms[row, index])

    def beside(self, others: Poses) -> Poses:
        """Poses (B, K) and others (B, L) of the same particles, as (B, K + L)."""
        return Poses(
            torch.cat([self.rotations, others.rotations], dim=1),
            torch.cat([self.shifts_in_angstroms, others.shifts_in_angstroms], dim=1),
        )

    def turned_by_pi(self) -> Poses:
        """Poses of the same particles after every image is turned by 180° about its centre."""
        return Poses(half_turn(self.rotations), -self.shifts_in_angstroms)


@dataclass(frozen=True, eq=False)
class Hypotheses:
    """Several poses (B, M) for each particle, and the logarithm (B, M) of the probability that each is the best."""

    poses: Poses
    log_probabilities: Tensor

    def likeliest(self, n: int) -> Hypotheses:
        """The ``n`` most probable of each particle, the most probable first; all if there are no more."""
        log_probabilities, index = self.log_probabilities.topk(min(n, self.log_probabilities.shape[1]), dim=1)
        return Hypotheses(self.poses.take(index), log_probabilities)


def rotations_about_z(angles: Tensor) -> Tensor:
    """Rotations (..., 3, 3) about the z axis by angles (...) in radians, x towards y.

    Examples
    --------
    >>> (rotations_about_z(torch.tensor(math.pi / 3)) @ torch.tensor([1.0, 0.0, 0.0])).round(decimals=3)
    tensor([0.5000, 0.8660, 0.0000])
    """
    zero = torch.zeros_like(angles)
    rotations: Tensor = roma.rotvec_to_rotmat(torch.stack([zero, zero, angles], dim=-1))
    return rotations


def rotations_from_s2s2(vectors: Tensor) -> Tensor:
    """Rotations (..., 3, 3) from two directions, vectors (..., 6), by Gram-Schmidt.

    The first two columns of the rotation are the images of the x and y axes of the detector: the
    S2 x S2 parametrisation of CryoAI (Levy et al. 2022, section 3.1; Zhou et al. 2019).
    """
    columns = vectors.unflatten(-1, (2, 3)).transpose(-1, -2)
    return roma.special_gramschmidt(columns, epsilon=1e-12)


def rotations_from_euler_angles(angles_in_degrees: Tensor) -> Tensor:
    """Rotations (..., 3, 3) from RELION's angles (..., 3), ordered (rot, tilt, psi), in degrees.

    Examples
    --------
    >>> (rotations_from_euler_angles(torch.tensor([0.0, 0.0, 90.0])) @ torch.tensor([1.0, 0, 0])).round(decimals=5)
    tensor([0., 1., 0.])
    """
    return roma.euler_to_rotmat("ZYZ", angles_in_degrees.double(), degrees=True).to(angles_in_degrees.dtype)


def rotations_to_euler_angles(rotations: Tensor) -> Tensor:
    """RELION's angles (..., 3), ordered (rot, tilt, psi), in degrees; inverse of the above.

    At tilt 0 and 180, where only a combination of rot and psi is defined, psi is 0.
    """
    # In double: near tilt 0 a float32 arc cosine loses half of its digits.
    angles: Tensor = roma.rotmat_to_euler("ZYZ", rotations.double(), degrees=True)
    return angles


def angular_distance_in_degrees(first: Tensor, second: Tensor) -> Tensor:
    """Geodesic distance (...) between rotations (..., 3, 3), from 0 to 180 degrees."""
    return torch.rad2deg(roma.rotmat_geodesic_distance(first, second))


def half_turn(rotations: Tensor) -> Tensor:
    """Rotations of the particles seen after a turn of the image by 180° in its plane."""
    flip = torch.tensor([-1.0, -1.0, 1.0], dtype=rotations.dtype, device=rotations.device)
    return rotations * flip


def rotation_grid(n_rotations: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Near-uniform rotations (n_rotations, 3, 3) on a super-Fibonacci spiral (Alexa, CVPR 2022).

    Examples
    --------
    >>> rotation_grid(100).shape
    torch.Size([100, 3, 3])
    """
    # The constants of the paper: phi = sqrt(2), and psi the positive root of psi^4 = psi + 4.
    phi, psi = math.sqrt(2), 1.533751168755204288118041
    s = torch.arange(n_rotations, dtype=torch.float64, device=device) + 0.5
    alpha, beta = 2 * math.pi * s / phi, 2 * math.pi * s / psi
    inner, outer = (s / n_rotations).sqrt(), (1 - s / n_rotations).sqrt()
    quaternions = torch.stack(
        [inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()], dim=-1
    )
    return roma.unitquat_to_rotmat(quaternions).float()


def blank_poses(n_particles: int, device: torch.device) -> Poses:
    """A table of poses (N,) to be filled: no rotation, no shift."""
    identity = torch.eye(3, device=device).expand(n_particles, 3, 3).clone()
    return Poses(identity, torch.zeros(n_particles, 2, device=device))


def selected_poses(poses: Poses, rows: Tensor) -> Poses:
    """Rows (B,) of a table (N,), wherever each of them is."""
    return poses[rows.to(poses.rotations.device)]


def assign_poses(table: Poses, rows: Tensor, poses: Poses) -> None:
    """Write poses (B,) into rows of a table (N,), in place."""
    index = rows.to(table.rotations.device)
    table.rotations[index] = poses.rotations
    table.shifts_in_angstroms[index] = poses.shifts_in_angstroms
