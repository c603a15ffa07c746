"""Point groups in RELION's orientation, and what they do to poses.

A particle has the symmetry of a group if each operator ``g`` maps it onto itself. An image at pose
``R`` then equals the one at every ``g R``: the particle has as many equivalent poses as the group
has operators.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import roma
import torch
from torch import Tensor

from cryoai.errors import InputError
from cryoai.poses import Poses, angular_distance_in_degrees, rotations_about_z

__all__ = ["PointGroup", "equivalent_poses", "nearest_mates", "symmetric_distance_in_degrees"]

_LARGEST_FOLD = 60
_CHOICES = "use C1, Cn, Dn, T, O or I"
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
# Two rotations that generate each group, as (fold, axis), in the orientation that RELION 3.1 prints:
# relion_refine --sym T --print_symmetry_ops
_GENERATORS = {
    "T": ((3, (0.0, 0.0, 1.0)), (2, (0.0, math.sqrt(2), 1.0))),
    "O": ((4, (0.0, 0.0, 1.0)), (3, (1.0, 1.0, 1.0))),
    "I": ((2, (0.0, 0.0, 1.0)), (5, (1.0, 0.0, _GOLDEN_RATIO))),
}


@dataclass(frozen=True, eq=False)
class PointGroup:
    """A finite group of rotations.

    Attributes
    ----------
    name
        In capitals: C1, C2, ..., D2, ..., T, O or I.
    operators : (G, 3, 3) float
        The rotations of a particle onto itself, the identity first.
    """

    name: str
    operators: Tensor

    @classmethod
    def named(cls, name: str) -> PointGroup:
        """The group of a name, in capitals or not, oriented as in RELION.

        Cn and Dn have their n-fold axis along z, Dn a 2-fold axis along x; T has a 3-fold axis along
        z; O has 4-fold axes along x, y and z; I has 2-fold axes along x, y and z and a 5-fold axis
        between x and z, which RELION calls I or I2.

        Raises
        ------
        InputError
            If there is no such group.

        Examples
        --------
        >>> PointGroup.named("d7").operators.shape
        torch.Size([14, 3, 3])
        """
        found = re.fullmatch(r"([CD])([0-9]{1,9})|([TOI])", name.strip().upper())
        if found is None:
            raise InputError(f"--symmetry {name}: no such point group; {_CHOICES}")
        family, digits, polyhedral = found.groups()
        if polyhedral:
            return cls(polyhedral, _polyhedral(polyhedral))
        fold, least = int(digits), 1 if family == "C" else 2
        if not least <= fold <= _LARGEST_FOLD:
            raise InputError(f"--symmetry {name}: n of {family}n is from {least} to {_LARGEST_FOLD}; {_CHOICES}")
        return cls(f"{family}{fold}", _cyclic(fold) if family == "C" else _dihedral(fold))

    def __len__(self) -> int:
        return len(self.operators)

    def to(self, device: torch.device | str) -> PointGroup:
        return PointGroup(self.name, self.operators.to(device))


def _cyclic(fold: int) -> Tensor:
    angles = torch.arange(fold, dtype=torch.float64) * (2 * math.pi / fold)
    return _tidy(rotations_about_z(angles))


def _dihedral(fold: int) -> Tensor:
    about_z = _cyclic(fold)
    return torch.cat([about_z, about_z * torch.tensor([1.0, -1.0, -1.0])])


def _polyhedral(name: str) -> Tensor:
    """Operators (G, 3, 3) of the group that the generators make."""
    generators = [_turn(fold, axis) for fold, axis in _GENERATORS[name]]
    operators = [torch.eye(3, dtype=torch.float64)]
    # The list grows while it is read, until no product is new.
    for operator in operators:
        for generator in generators:
            product = generator @ operator
            if not any(torch.allclose(product, known, atol=1e-6) for known in operators):
                operators.append(product)
    return _tidy(torch.stack(operators))


def _turn(fold: int, axis: tuple[float, float, float]) -> Tensor:
    direction = torch.tensor(axis, dtype=torch.float64)
    turn: Tensor = roma.rotvec_to_rotmat(direction / direction.norm() * (2 * math.pi / fold))
    return turn


def _tidy(operators: Tensor) -> Tensor:
    # What should be 0 or 1 is, so that a lattice is mapped onto itself where it can be.
    return operators.round(decimals=12).float() + 0.0


def equivalent_poses(poses: Poses, group: PointGroup) -> Poses:
    """All poses (N, G) at which a symmetric particle gives the images of poses (N,): ``g R``.

    The shifts stay: symmetry axes pass through the origin.

    Examples
    --------
    >>> from cryoai.poses import rotation_grid
    >>> poses = Poses(rotation_grid(5), torch.zeros(5, 2))
    >>> equivalent_poses(poses, PointGroup.named("D3")).rotations.shape
    torch.Size([5, 6, 3, 3])
    """
    rotations = group.operators.to(poses.rotations) @ poses.rotations[:, None]
    shifts = poses.shifts_in_angstroms[:, None].expand(-1, len(group), -1)
    return Poses(rotations, shifts)


def nearest_mates(poses: Poses, reference: Poses, group: PointGroup) -> Poses:
    """Of the equivalent poses of each of (N,), the one whose rotation is nearest to that of a reference pose (N,)."""
    mates = equivalent_poses(poses, group)
    distance = angular_distance_in_degrees(mates.rotations, reference.rotations[:, None])
    return mates.take(distance.argmin(1, keepdim=True))[:, 0]


def symmetric_distance_in_degrees(first: Tensor, second: Tensor, group: PointGroup) -> Tensor:
    """Smallest angle (...) between rotations (..., 3, 3) that a symmetric particle cannot tell apart.

    ``min over g of angle(g R1, R2)``.

    Examples
    --------
    >>> from cryoai.poses import rotations_from_euler_angles
    >>> turned = rotations_from_euler_angles(torch.tensor([[0.0, 0.0, 0.0], [130.0, 0.0, 0.0]]))
    >>> symmetric_distance_in_degrees(turned[0], turned[1], PointGroup.named("C3")).round()
    tensor(10.)
    """
    operators = group.operators.to(first)
    # trace(R2^T g R1) = 1 + 2 cos(angle)
    traces = torch.einsum("gik,...ik->...g", operators, second @ first.transpose(-1, -2))
    nearest = operators[traces.argmax(-1)]
    return angular_distance_in_degrees(nearest @ first, second)
