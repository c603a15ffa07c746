import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cryoai.fourier import (
    FourierDisc,
    HalfLattice,
    fourier_shell_correlation,
    invert_transform,
    resize_map,
    shell_mean,
    shell_sum,
    shells_of_volume,
    soft_sphere,
    transform_map,
    translation_phases,
)
from oracles import direct_image_transform, direct_map_transform, positions, random_rotations
from properties import assert_adjoint, assert_batch_equals_loop, assert_gradient_matches_differences, unchanged

odd_and_even = pytest.mark.parametrize("n", [12, 13])


def double_disc(n):
    return FourierDisc.of_box(n, dtype=torch.float64)


def half_grid_frequencies(size):
    """Frequencies of the values of a half transform, in cycles per pixel, ordered (x, y, z)."""
    j = torch.arange(size) - size // 2
    z, y, x = torch.meshgrid(j, j, torch.arange(size // 2 + 1), indexing="ij")
    return torch.stack([x, y, z], dim=-1).reshape(-1, 3).double() / size


# ------------------------------------------------------------------------------ the disc


@odd_and_even
def test_coefficients_are_the_direct_fourier_sum(n):
    disc, images = double_disc(n), torch.randn(2, n, n, dtype=torch.float64)
    for image, coefficients in zip(images, disc.from_images(images), strict=True):
        torch.testing.assert_close(coefficients, direct_image_transform(image, disc.coordinates))


@odd_and_even
def test_coefficients_of_a_projection_are_the_closed_form(phantom, n):
    n += 12
    disc, rotation = double_disc(n), random_rotations(1)[0]
    coefficients = disc.from_images(phantom.projection(n, rotation, (1.3, -0.8)))
    exact = phantom.image_coefficients(disc.coordinates, n, rotation, (1.3, -0.8))
    # What is left is aliasing of the narrowest Gaussian at Nyquist and its cut-off at the edge of the box.
    assert (coefficients - exact).abs().max() < 1e-3 * exact.abs().max()


@odd_and_even
def test_coefficients_survive_the_trip_to_an_image_and_back(n):
    disc = double_disc(n)
    coefficients = disc.from_images(torch.randn(3, n, n, dtype=torch.float64))
    with unchanged(coefficients):
        images = disc.to_images(coefficients)
    torch.testing.assert_close(disc.from_images(images), coefficients)
    torch.testing.assert_close(disc.to_images(disc.from_images(images)), images)


@odd_and_even
def test_a_prefix_gives_the_band_limited_image(n):
    disc, p = double_disc(n), double_disc(n).n_coefficients(3)
    coefficients = disc.from_images(torch.randn(n, n, dtype=torch.float64))
    low = torch.where(torch.arange(len(coefficients)) < p, coefficients, 0)
    torch.testing.assert_close(disc.to_images(coefficients[:p]), disc.to_images(low))
    assert (disc.radii[:p] < 3.5).all()
    assert (disc.radii[p:] >= 3.5).all()


@odd_and_even
def test_friedel_weights_make_parseval_hold(n):
    disc = double_disc(n)
    coefficients = disc.from_images(torch.randn(n, n, dtype=torch.float64))
    power = (disc.friedel_weights * coefficients.abs() ** 2).sum()
    torch.testing.assert_close(power, disc.to_images(coefficients).square().sum())


@given(st.integers(4, 48), st.integers(4, 48))
def test_the_disc_of_a_smaller_box_is_the_beginning_of_a_larger_ones(a, b):
    small, large = FourierDisc.of_box(min(a, b)), FourierDisc.of_box(max(a, b))
    assert torch.equal(large.indices[: len(small.indices)], small.indices)
    assert (large.radii.diff() >= 0).all()
    assert small.n_coefficients() == len(small.indices)


@pytest.mark.parametrize(("large", "small"), [(16, 12), (16, 11), (15, 12), (15, 11)])
def test_a_smaller_disc_crops_a_larger_image(large, small):
    image = torch.randn(2, large, large, dtype=torch.float64)
    cropped = double_disc(small).from_images(image)
    torch.testing.assert_close(cropped, double_disc(large).from_images(image)[..., : cropped.shape[-1]])


def test_the_disc_rejects_tiny_boxes_and_unfit_images():
    with pytest.raises(ValueError, match="at least 4 pixels"):
        FourierDisc.of_box(3)
    for shape in [(8, 9), (7, 7)]:
        with pytest.raises(ValueError, match="must be square and at least 8"):
            FourierDisc.of_box(8).from_images(torch.zeros(shape))


@odd_and_even
def test_translation_phases_move_the_content(phantom, n):
    n += 12
    disc, eye = double_disc(n), torch.eye(3)
    still = disc.from_images(phantom.projection(n, eye))
    displacement = torch.tensor([1.7, -2.3], dtype=torch.float64)
    moved = disc.to_images(still * translation_phases(displacement, disc.coordinates))
    truth = phantom.projection(n, eye, displacement)
    assert (moved - truth).abs().max() < 1e-3 * truth.max()


def test_translation_phases_of_a_batch_equal_those_of_its_members():
    coordinates = FourierDisc.of_box(12).coordinates
    assert_batch_equals_loop(lambda d: translation_phases(d, coordinates), 5 * torch.randn(4, 3, 2))


# ------------------------------------------------------------------------------ shells


def test_shell_sums_and_means_of_a_small_case():
    values, shells = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([0, 1, 1, 3])
    assert shell_sum(values, shells, 4).tolist() == [[1, 6, 0, 8]]
    assert shell_mean(values, shells, 4).tolist() == [[1, 3, 0, 8]]


@odd_and_even
def test_shell_weights_count_every_frequency_of_the_nyquist_sphere_once(n):
    shells, weights = shells_of_volume(n)
    j = torch.arange(-n, n + 1).double()
    radius = (j[:, None, None] ** 2 + j[:, None] ** 2 + j**2).sqrt()
    radius = radius[radius < n / 2]
    counted = shell_sum(weights.flatten(), shells.flatten(), int(shells.max()) + 1)
    for shell in range(n // 2 + 1):
        assert counted[shell] == ((radius >= shell - 0.5) & (radius < shell + 0.5)).sum()


@odd_and_even
def test_the_soft_sphere_is_one_inside_zero_outside_and_half_at_mid_edge(n):
    mask, c = soft_sphere(n, 2.0, 2.0), n // 2
    profile = mask[c, c, c:]
    torch.testing.assert_close(profile[:5], torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0]))
    assert torch.equal(mask, mask.permute(2, 0, 1))


# ------------------------------------------------------------------------------ maps


@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("oversampling", [1, 2])
def test_the_transform_of_a_map_is_the_direct_fourier_sum(n, oversampling):
    density = torch.randn(n, n, n, dtype=torch.float64)
    spectrum = transform_map(density, oversampling)
    direct = direct_map_transform(density, half_grid_frequencies(n * oversampling))
    torch.testing.assert_close(spectrum.flatten(), direct)


@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("oversampling", [1, 2])
def test_inverting_the_transform_gives_the_map_back(n, oversampling):
    density = torch.randn(n, n, n, dtype=torch.float64)
    with unchanged(density):
        spectrum = transform_map(density, oversampling)
    torch.testing.assert_close(invert_transform(spectrum, n), density)


@odd_and_even
def test_the_transform_of_gaussians_is_the_closed_form(phantom, n):
    n += 12
    k = half_grid_frequencies(n)
    exact = phantom.transform(k, n)
    assert (transform_map(phantom.density(n)).flatten() - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize(("n", "new"), [(12, 16), (12, 17), (13, 16), (13, 17), (12, 12), (13, 10), (12, 11)])
def test_resizing_keeps_the_transform_of_band_limited_content(n, new):
    band = (min(n, new) - 1) // 2
    lattice = HalfLattice(n, band - 1, 1)
    values = lattice.cut_out(transform_map(torch.randn(n, n, n, dtype=torch.float64)))
    density = invert_transform(lattice.fill_in(values), n)
    with unchanged(density):
        resized = resize_map(density, new)
    assert resized.shape == (new, new, new)
    torch.testing.assert_close(HalfLattice(new, band - 1, 1).cut_out(transform_map(resized)), values)
    torch.testing.assert_close(resize_map(resized, n), density)


# ------------------------------------------------------------------------------ FSC


@odd_and_even
def test_a_map_correlates_perfectly_with_itself_at_any_scale(n):
    density = torch.randn(n, n, n)
    one = torch.ones(n // 2 + 1, dtype=torch.float64)
    torch.testing.assert_close(fourier_shell_correlation(density, density), one)
    torch.testing.assert_close(fourier_shell_correlation(density, -0.01 * density), -one)


@given(st.integers(4, 9), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_fsc_is_bounded_symmetric_and_blind_to_scale(n, seed, scale):
    first, second = torch.randn(2, n, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fsc = fourier_shell_correlation(first, second)
    assert fsc.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(fourier_shell_correlation(second, scale * first), fsc)


@odd_and_even
def test_fsc_of_waves_is_what_the_hand_computes(n):
    angle = 2 * math.pi * positions(n) / n
    along_x, along_z = (3 * angle).expand(n, n, n), (3 * angle)[:, None, None].expand(n, n, n)
    shifted = fourier_shell_correlation(along_x.cos(), (along_x + 0.7).cos())
    assert shifted[3] == pytest.approx(math.cos(0.7))
    # Half of the power of the second map is the first; the plane x = 0 holds both Friedel mates, x = 3 but one.
    mixed = fourier_shell_correlation(along_x.cos(), along_x.cos() + along_z.cos())
    assert mixed[3] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(("first", "second"), [((4, 4, 4), (5, 5, 5)), ((4, 4, 5), (4, 4, 5)), ((4, 4), (4, 4))])
def test_fsc_rejects_maps_that_are_not_cubes_of_one_size(first, second):
    with pytest.raises(ValueError, match="two cubes of one size"):
        fourier_shell_correlation(torch.zeros(first), torch.zeros(second))


# ------------------------------------------------------------------------------ the lattice

lattices = pytest.mark.parametrize("lattice", [HalfLattice(10, 3, 2), HalfLattice(11, 3, 1)], ids=["even", "odd"])


def hermitian_values(lattice):
    density = torch.randn((lattice.n_pixels,) * 3, dtype=torch.float64)
    return lattice.cut_out(transform_map(density, lattice.oversampling))[:, None]


def random_points(lattice, n_points=200):
    """Frequencies within the lattice, on both sides of its plane x = 0."""
    reach = lattice.half_width / (lattice.n_pixels * lattice.oversampling)
    return (2 * torch.rand(n_points, 3, dtype=torch.float64) - 1) * reach


@lattices
def test_a_function_linear_in_frequency_is_read_exactly(lattice):
    slope = torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64)
    values = torch.complex(torch.full((lattice.n_points,), 2.0).double(), lattice.frequencies().double() @ slope)
    points = random_points(lattice)
    found = lattice.read(values[:, None], points)[:, 0]
    torch.testing.assert_close(
        found, torch.complex(torch.full((200,), 2.0).double(), points @ slope), atol=1e-6, rtol=0
    )


@lattices
def test_reading_is_hermitian_and_keeps_the_shape_of_the_points(lattice):
    values, points = hermitian_values(lattice), random_points(lattice).reshape(4, 50, 3)
    with unchanged(values, points):
        found = lattice.read(values, points)
    assert found.shape == (4, 50, 1)
    torch.testing.assert_close(lattice.read(values, -points), found.conj())
    assert_batch_equals_loop(lambda p: lattice.read(values, p), points, rtol=0, atol=0)


@lattices
def test_nothing_is_read_or_written_outside_the_lattice(lattice):
    reach = (lattice.max_radius + 1) / lattice.n_pixels
    outside = 1.01 * reach * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    assert (lattice.read(hermitian_values(lattice), outside) == 0).all()
    into = torch.zeros(3, lattice.n_points, dtype=torch.float64)
    lattice.insert(torch.ones(6, dtype=torch.complex128), torch.ones(6, dtype=torch.float64), outside, into)
    assert (into == 0).all()


@lattices
def test_reading_has_the_gradients_of_finite_differences(lattice):
    values, points = hermitian_values(lattice), random_points(lattice)
    target = torch.randn(200, 1, dtype=torch.complex128)
    assert_gradient_matches_differences(lambda v: (lattice.read(v, points) * target).real.sum(), values)
    # Trilinear values have kinks on the planes of the grid: stay in the middle half of the cells.
    steps = (points * lattice.n_pixels * lattice.oversampling).floor() + 0.25 + 0.5 * torch.rand(200, 3).double()
    in_cells = steps / (lattice.n_pixels * lattice.oversampling)
    assert_gradient_matches_differences(lambda p: (lattice.read(values, p) * target).real.sum(), in_cells)


@lattices
def test_insertion_is_the_adjoint_of_reading(lattice):
    points, weights = random_points(lattice), torch.rand(200, dtype=torch.float64)

    def insert(samples):
        into = torch.zeros(3, lattice.n_points, dtype=torch.float64)
        with unchanged(samples, weights, points):
            lattice.insert(samples, weights, points, into)
        assert into[2].sum() == pytest.approx(weights.sum())
        return torch.complex(into[0], into[1])

    def read(values):
        return lattice.read(values[:, None], points)[:, 0]

    free = torch.randn(lattice.n_points, dtype=torch.complex128)
    samples = torch.randn(200, dtype=torch.complex128)
    assert_adjoint(read, insert, free, samples)

    def insert_and_fold(samples):
        sums = torch.zeros(3, lattice.n_points, dtype=torch.float64)
        lattice.insert(samples, weights, points, sums)
        with unchanged(sums):
            folded = lattice.fold(sums)
        # The plane x = 0 holds both mates after folding: each stands for half of the pair.
        half = torch.where(lattice.frequencies()[:, 0] == 0, 0.5, 1.0)
        return torch.complex(folded[0], folded[1]) * half

    assert_adjoint(read, insert_and_fold, hermitian_values(lattice)[:, 0], samples)


@lattices
def test_folded_sums_do_not_depend_on_which_friedel_mate_was_inserted(lattice):
    points, weights = random_points(lattice), torch.rand(200, dtype=torch.float64)
    samples = torch.randn(200, dtype=torch.complex128)
    first, second = torch.zeros(2, 3, lattice.n_points, dtype=torch.float64)
    lattice.insert(samples, weights, points, first)
    lattice.insert(samples.conj(), weights, -points, second)
    torch.testing.assert_close(lattice.fold(first), lattice.fold(second))


@pytest.mark.parametrize(("n", "oversampling"), [(10, 1), (11, 1), (10, 2), (11, 2)])
def test_values_survive_the_trip_through_the_half_transform(n, oversampling):
    lattice = HalfLattice(n, 3, oversampling)
    values = hermitian_values(lattice)[:, 0]
    torch.testing.assert_close(lattice.cut_out(lattice.fill_in(values)), values)
    if oversampling == 1:
        direct = direct_map_transform(invert_transform(lattice.fill_in(values), n), lattice.frequencies())
        torch.testing.assert_close(direct, values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [8, 9])
def test_a_lattice_beyond_nyquist_holds_the_whole_transform_and_zeros(n):
    lattice = HalfLattice(n, n // 2, 1)
    density = torch.randn(n, n, n, dtype=torch.float64)
    k = lattice.frequencies()
    within = (k.abs() * n <= n // 2 + 1e-3).all(-1)
    values = lattice.cut_out(transform_map(density))
    torch.testing.assert_close(values[within], direct_map_transform(density, k[within]), atol=1e-4, rtol=0)
    assert (values[~within] == 0).all()


def test_a_point_that_rounds_to_the_edge_of_the_lattice_is_read_and_inserted_safely():
    lattice = HalfLattice(64, 16, 2)
    edge = torch.tensor(17 / 64, dtype=torch.float32)
    point = torch.stack([torch.zeros(()), torch.nextafter(edge, torch.zeros(())), -edge])[None]
    values = torch.ones((lattice.n_points, 1), dtype=torch.complex64)
    assert torch.isfinite(torch.view_as_real(lattice.read(values, point))).all()
    sums = torch.zeros(3, lattice.n_points)
    lattice.insert(torch.ones(1, dtype=torch.complex64), torch.ones(1), point, sums)
    assert torch.isfinite(sums).all()
