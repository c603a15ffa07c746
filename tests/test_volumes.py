import pytest
import torch

from cryoai.fourier import FourierDisc, fourier_shell_correlation
from cryoai.imaging import slice_points
from cryoai.volumes import FourierNetVolume, SampledVolume, VoxelVolume
from oracles import direct_map_transform, random_rotations
from properties import assert_adjoint, assert_gradient_matches_differences, assert_hermitian, unchanged

BAND = 8


def random_slices(n, n_rotations=6, radius=BAND):
    disc = FourierDisc.of_box(n, dtype=torch.float64)
    return slice_points(random_rotations(n_rotations), disc.coordinates[: disc.n_coefficients(radius)])


# ------------------------------------------------------------------------------ sampled


@pytest.mark.parametrize("n", [24, 25])
# Trilinear interpolation errs as the square of the step: measured 4.6e-2, 1.1e-2 and 2.6e-3, mostly at the origin.
@pytest.mark.parametrize(("oversampling", "tolerance"), [(1, 6e-2), (2, 1.5e-2), (4, 4e-3)])
def test_slices_of_a_sampled_map_are_the_closed_form(phantom, n, oversampling, tolerance):
    density, points = phantom.density(n), random_slices(n)
    with unchanged(density, points):
        found = SampledVolume.from_map(density, BAND, oversampling=oversampling)(points)
    exact = phantom.transform(points, n)
    assert (found - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("n", [24, 25])
# Measured 8.9e-3 and 2.3e-3.
@pytest.mark.parametrize(("oversampling", "tolerance"), [(2, 1.5e-2), (4, 4e-3)])
def test_gradients_of_a_sampled_map_are_those_of_the_closed_form(phantom, n, oversampling, tolerance):
    points = random_slices(n)
    volume = SampledVolume.from_map(phantom.density(n), BAND, oversampling=oversampling, with_gradient=True)
    values, gradients = volume.with_gradient(points)
    torch.testing.assert_close(values, volume(points))
    step = 1e-5
    for axis in range(3):
        offset = step * torch.eye(3, dtype=torch.float64)[axis]
        difference = (phantom.transform(points + offset, n) - phantom.transform(points - offset, n)) / (2 * step)
        assert (gradients[..., axis] - difference).norm() < tolerance * difference.norm()


def test_a_sampled_map_is_hermitian(phantom):
    volume = SampledVolume.from_map(phantom.density(24), BAND)
    points = random_slices(24)
    assert_hermitian(volume, points[points[..., 0] != 0])
    torch.testing.assert_close(volume(-points), volume(points).conj())


# ------------------------------------------------------------------------------ neural


def test_the_fourier_net_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in FourierNetVolume(64).parameters()) == 332_036


def test_the_fourier_net_is_exactly_hermitian():
    volume, points = FourierNetVolume(16, width=32), torch.rand(200, 3) - 0.5
    # The cases on the boundary between the half that is evaluated and its mate.
    points[:50, 0] = 0
    points[20:50, 1] = 0
    points[40:50, 2] = 0
    with torch.no_grad(), unchanged(points):
        assert_hermitian(volume, points)
        assert (volume(torch.zeros(3)).imag == 0).all()


@pytest.mark.parametrize("n", [16, 17])
def test_the_sampled_fourier_net_agrees_with_the_net_on_the_lattice(n):
    volume = FourierNetVolume(n, width=32)
    with torch.no_grad():
        sampled = volume.sampled(5)
        points = sampled.lattice.frequencies()
        # Slices read nothing beyond the corners of the last shell.
        points = points[sampled.lattice.radii() < 5.5]
        for sign in (1, -1):
            torch.testing.assert_close(sampled(sign * points), volume(sign * points), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [16, 17])
@pytest.mark.parametrize("oversampling", [1, 2])
def test_the_sampled_fourier_net_is_interpolated_between_the_eight_corners_up_to_the_last_shell(n, oversampling):
    volume, steps_per_cycle = FourierNetVolume(n, width=32, sampling_oversampling=oversampling), n * oversampling
    directions = torch.randn(500, 3)
    points = torch.linspace(0, 5.5 / n, 500)[:, None] * directions / directions.norm(dim=1, keepdim=True)
    points[:, 0] = points[:, 0].abs()
    steps = points * steps_per_cycle
    expected = torch.zeros(500, dtype=torch.complex64)
    with torch.no_grad():
        for corner in torch.cartesian_prod(*[torch.arange(2)] * 3):
            fraction = steps - steps.floor()
            weight = torch.where(corner == 1, fraction, 1 - fraction).prod(1)
            expected += weight * volume((steps.floor() + corner) / steps_per_cycle)
        found = volume.sampled(5)(points)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(volume.sampled(5)(-points), found.conj())


def test_every_parameter_of_the_fourier_net_learns_from_sampled_slices():
    volume = FourierNetVolume(16, width=16)
    (volume.sampled(5)(random_slices(16, radius=5).float()).abs() ** 2).sum().backward()
    for name, parameter in volume.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


# ------------------------------------------------------------------------------ voxels


def test_slices_are_linear_in_the_voxels_and_their_gradient_is_the_adjoint():
    n = 10
    points = random_slices(n, radius=3)
    target = torch.randn(points.shape[:-1], dtype=torch.complex128)

    def forward(density):
        return SampledVolume.from_map(density, 3)(points)

    def adjoint(samples):
        density = torch.zeros(n, n, n, dtype=torch.float64, requires_grad=True)
        (forward(density) * samples.conj()).real.sum().backward()
        return density.grad

    density = torch.randn(n, n, n, dtype=torch.float64)
    assert_adjoint(forward, adjoint, density, target)
    assert_gradient_matches_differences(lambda d: (forward(d) - target).abs().square().sum(), density)


def test_a_voxel_volume_learns_its_own_copy_of_the_map():
    density = torch.randn(10, 10, 10)
    volume = VoxelVolume(density)
    with unchanged(density):
        volume(random_slices(10, radius=3).float()).abs().square().sum().backward()
        with torch.no_grad():
            volume.density -= volume.density.grad
    assert volume.density.grad.abs().max() > 0


@pytest.mark.parametrize("n", [24, 25])
def test_a_voxel_volume_gives_the_transform_and_the_band_limited_map(phantom, n):
    volume, points = VoxelVolume(phantom.density(n).float()), random_slices(n).float()
    exact = phantom.transform(points, n)
    with torch.no_grad():
        torch.testing.assert_close(volume(points), volume.sampled(BAND)(points))
        assert (volume(points) - exact).norm() < 1.5e-2 * exact.norm()
    density = volume.to_map(BAND)
    assert (fourier_shell_correlation(density, phantom.density(n))[: BAND + 1] > 0.999).all()
    beyond = random_slices(n, radius=n)[:, FourierDisc.of_box(n).n_coefficients(BAND + 1) :].reshape(-1, 3)[::50]
    # On the lattice nothing is left beyond the band: take its points only.
    on_lattice = (beyond * n).round() / n
    on_lattice = on_lattice[(on_lattice * n).norm(dim=-1) >= BAND + 0.5]
    assert (direct_map_transform(density, on_lattice).abs() < 1e-6 * exact.abs().max()).all()
