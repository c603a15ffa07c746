"""Assertions about any function: adjoints, gradients, symmetry, batches, purity."""

import dataclasses
from contextlib import contextmanager

import torch


def inner(a, b):
    """Real inner product: of real and imaginary parts where the arguments are complex."""
    return (a * b.conj()).real.sum() if a.is_complex() else (a * b).sum()


def assert_adjoint(forward, adjoint, x, y, rtol=1e-10):
    """``<forward(x), y> == <x, adjoint(y)>``."""
    left, right = inner(forward(x), y), inner(x, adjoint(y))
    scale = forward(x).abs().square().sum().sqrt() * y.abs().square().sum().sqrt()
    assert abs(left - right) <= rtol * scale
    assert scale > 0


def assert_gradient_matches_differences(function, x, step=1e-5, rtol=1e-6, n_directions=3):
    """The gradient of the real scalar ``function`` at ``x`` (double) against central differences."""
    variable = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(variable), variable)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    for _ in range(n_directions):
        direction = torch.randn_like(x)
        with torch.no_grad():
            difference = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
        assert abs(inner(gradient, direction) - difference) <= rtol * gradient.norm() * direction.norm()


def assert_hermitian(function, points):
    """``function(-k) == conj(function(k))``, to the last bit."""
    assert torch.equal(function(-points), function(points).conj())


def assert_batch_equals_loop(function, *batches, rtol=1e-5, atol=1e-6):
    """Every row of the result is what the row of the arguments gives alone."""
    together = function(*batches)
    alone = torch.cat([function(*(b[i : i + 1] for b in batches)) for i in range(len(together))])
    torch.testing.assert_close(together, alone, rtol=rtol, atol=atol)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [t for field in dataclasses.fields(value) for t in _tensors(getattr(value, field.name))]
    return []


@contextmanager
def unchanged(*arguments):
    """The tensors of the arguments are the same after the block as before."""
    tensors = [t for argument in arguments for t in _tensors(argument)]
    assert tensors
    before = [t.clone() for t in tensors]
    yield
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
