"""Rules that flags of several commands obey."""

from __future__ import annotations

from cryoai.errors import InputError

__all__ = ["require", "require_seed"]


def require(fulfilled: bool, rule: str) -> None:
    """Refuse with the rule what does not fulfil it."""
    if not fulfilled:
        raise InputError(rule)


def require_seed(seed: int) -> None:
    """Refuse what is no seed."""
    require(0 <= seed < 2**31, f"--seed {seed}: must be from 0 to {2**31 - 1}")
