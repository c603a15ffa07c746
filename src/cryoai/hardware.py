"""What the machine is and in which types it multiplies matrices fastest."""

from __future__ import annotations

import torch

from cryoai.errors import InputError

__all__ = ["choose_device", "fast_matrices", "matrix_dtype"]


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"`` is a CUDA device if there is one, else the CPU.

    Raises
    ------
    InputError
        If a CUDA device is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: no CUDA device is available; use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def matrix_dtype(device: torch.device) -> torch.dtype:
    """The type in which ``device`` multiplies matrices fastest: bfloat16 where it has the hardware."""
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def fast_matrices(device: torch.device) -> torch.autocast:
    """Context in which networks multiply matrices and convolve in :func:`matrix_dtype`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=matrix_dtype(device) == torch.bfloat16)
