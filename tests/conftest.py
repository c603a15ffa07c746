import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("properties")

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
