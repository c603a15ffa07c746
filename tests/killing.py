"""Killing runs at a chosen moment, to see that they go on."""

import pytest

from cryoai.training.monitor import Monitor

__all__ = ["killed_at"]


class Killed(BaseException):
    """What no code expects."""


def killed_at(step, begin):
    """Begin something and kill it at the n-th step of a stage."""
    update, n = Monitor.update, 0

    def count(self, metrics, progress):
        nonlocal n
        n += 1
        if n == step:
            raise Killed
        update(self, metrics, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "update", count)
        with pytest.raises(Killed):
            begin()
