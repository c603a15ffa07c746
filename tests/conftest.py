import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("properties")

from cryoai.cli import main  # noqa: E402
from oracles import GaussianPhantom  # noqa: E402

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def phantom():
    """Chiral and off-centre, and contained in a box of 24 pixels."""
    return GaussianPhantom.example()


@pytest.fixture
def complaint(capsys):
    """Run a command that must be refused; returns its one line without the name of the program."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("cryoai: error: ")
        return lines[0].removeprefix("cryoai: error: ")

    return run


@pytest.fixture
def output(capsys):
    """Run a command that must succeed; returns what it printed."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run
