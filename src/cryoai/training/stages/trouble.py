"""What goes wrong in long training, told apart and told of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["NonFiniteBatch", "Note", "NotedMetrics", "is_out_of_memory"]

# Of the allocator of the CPU, and of the libraries on a GPU that allocate by themselves.
_SHORTAGES = ("not enough memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True, eq=False)
class NonFiniteBatch:
    """The images of a step whose loss or gradient was not a finite number.

    Attributes
    ----------
    step
        Counted from 1.
    rows : (B,)
        Of the images among the particles of the stage.
    losses : (B,)
        Of every image judged alone, by the weights that training went back to.
    culprits : (C,)
        The rows that are left out from here on, those of other images with coefficients that are not finite included.
    """

    step: int
    rows: Tensor
    losses: Tensor
    culprits: Tensor


@dataclass(frozen=True, eq=False)
class Note:
    """Something that a stage has to say in plain words, and the batch that it speaks of, to be kept in a file."""

    text: str
    batch: NonFiniteBatch | None = None


@dataclass(frozen=True)
class NotedMetrics:
    """Metrics of a stage that may have something to say beside its numbers."""

    notes: tuple[Note, ...] = field(default=(), kw_only=True)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory does not suffice.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"))
    True
    >>> is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    False
    """
    return isinstance(error, torch.OutOfMemoryError) or any(shortage in str(error) for shortage in _SHORTAGES)
