import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryoai.fourier import fourier_shell_correlation
from cryoai.poses import rotations_from_euler_angles
from cryoai.reconstruction import particle_mask
from cryoai.symmetry.groups import PointGroup
from cryoai.validation.masks import automatic_mask
from cryoai.validation.orientations import conical_correlation, orientation_distribution
from known_maps import made_up_complex, noise, noisy_halves, radius, reconstruction
from oracles import random_rotations
from properties import unchanged

AXIS = torch.tensor([1.0, 2.0, 2.0]) / 3


def seen_along(axis, within_degrees, n, seed=0):
    """Rotations (n, 3, 3) whose views are uniform in a cap about an axis."""
    generator = np.random.default_rng(seed)
    tilt = np.rad2deg(np.arccos(generator.uniform(math.cos(math.radians(within_degrees)), 1, n)))
    rot, psi = generator.uniform(0, 360, (2, n))
    near_z = Rotation.from_euler("ZYZ", np.stack([rot, tilt, psi], axis=1), degrees=True)
    to_axis, _ = Rotation.align_vectors(axis.numpy()[None], np.array([[0, 0, 1.0]]))
    return torch.from_numpy((to_axis * near_z).as_matrix()).float()


def angle_in_degrees(first, second):
    return float(torch.rad2deg(torch.arccos((first @ second).clamp(-1, 1))))


# ------------------------------------------------------------------------------ poses


@pytest.mark.parametrize("n", [500, 2000, 20_000, 100_000])
def test_uniform_views_are_not_preferred(n):
    for seed in range(10 if n < 10_000 else 2):
        found = orientation_distribution(random_rotations(n, seed).float())
        assert not found.is_preferred
        assert not found.is_collapsed
        assert len(found.peaks) == 0
        assert found.densest_tenth_share == pytest.approx(0.1, abs=1.2 / math.sqrt(n))
        # The number of pairs in a cell scatters by the root of twice the number of cells, whatever the particles.
        assert found.effective_share == pytest.approx(1, abs=4 * math.sqrt(2 * 500) / n)
        assert found.counts.sum() == found.n_particles == n


@pytest.mark.parametrize("n", [500, 10_000])
def test_half_of_the_particles_on_one_side_are_noticed(n):
    rotations = torch.cat([seen_along(AXIS, 25, n // 2), random_rotations(n - n // 2, 1).float()])
    rotations = rotations[torch.randperm(n)]
    with unchanged(rotations):
        found = orientation_distribution(rotations)
    assert found.is_preferred
    assert not found.is_collapsed
    assert found.densest_tenth_share == pytest.approx(0.55, abs=0.04)
    assert len(found.peaks) == 1
    assert angle_in_degrees(found.peaks[0], AXIS) < 6


def test_several_peaks_are_told_apart_the_strongest_first():
    other = torch.tensor([1.0, 0.0, 0.0])
    rotations = torch.cat([seen_along(AXIS, 10, 600), seen_along(other, 10, 400), random_rotations(1000).float()])
    peaks = orientation_distribution(rotations).peaks
    assert len(peaks) == 2
    assert angle_in_degrees(peaks[0], AXIS) < 6
    assert angle_in_degrees(peaks[1], other) < 6


def test_few_directions_are_a_collapse():
    axes = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    rotations = torch.cat([seen_along(axis, 3, 100, seed) for seed, axis in enumerate(axes)])
    found = orientation_distribution(rotations)
    assert found.is_collapsed
    assert found.is_preferred
    # Five caps of some cells each, of 500.
    assert 5 / 500 < found.effective_share < 0.05


def test_a_strong_preference_is_no_collapse():
    uniform = random_rotations(800).float()
    found = orientation_distribution(torch.cat([seen_along(torch.tensor([0.0, 0.0, 1.0]), 25, 1200, 0), uniform]))
    assert found.is_preferred
    assert not found.is_collapsed


def test_of_a_symmetric_molecule_every_view_counts_with_its_mates():
    group = PointGroup.named("D3")
    axis = torch.nn.functional.normalize(torch.tensor([0.5, 0.3, 0.4]), dim=0)
    rotations = seen_along(axis, 5, 300, 0)
    found = orientation_distribution(rotations, group.operators)
    mates = [orientation_distribution(operator @ rotations).counts for operator in group.operators]
    assert (found.counts == sum(mates)).all()
    assert found.n_particles == 6 * 300


def test_a_view_is_relions_direction_and_turning_the_image_changes_nothing():
    angles = torch.tensor([[30.0, 70.0, 0.0], [30.0, 70.0, 200.0], [30.0, 70.0, -45.0], [30.0, 70.0, 10.0]])
    found = orientation_distribution(rotations_from_euler_angles(angles))
    rot, tilt = (math.radians(float(angle)) for angle in angles[0, :2])
    view = torch.tensor([math.sin(tilt) * math.cos(rot), math.sin(tilt) * math.sin(rot), math.cos(tilt)])
    (cell,) = found.counts.nonzero().flatten().tolist()
    assert found.counts[cell] == 4
    assert cell == int((found.cells @ view).argmax())


def test_cells_have_equal_areas():
    found = orientation_distribution(random_rotations(1000).float())
    points = torch.nn.functional.normalize(torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    nearest = torch.cat([(part @ found.cells.T).argmax(1) for part in points.split(20_000)])
    areas = torch.bincount(nearest, minlength=500) * (500 / 200_000)
    # The counts themselves scatter by 5 %.
    assert areas.std() < 0.08
    assert areas.min() > 0.6


def test_too_few_particles_have_no_distribution():
    with pytest.raises(ValueError, match="at least 4"):
        orientation_distribution(random_rotations(3).float())


# ------------------------------------------------------------------------------ maps


@pytest.fixture(scope="module")
def complex_in_noise():
    truth, pixel_size = made_up_complex(1)
    first, second = noisy_halves(truth, pixel_size, 12)
    return first, second, automatic_mask(first, second, pixel_size, 12), pixel_size


def test_a_map_alike_in_all_directions_has_a_ratio_near_one(complex_in_noise):
    first, second, mask, pixel_size = complex_in_noise
    with unchanged(first, second, mask):
        found = conical_correlation(first, second, mask, pixel_size)
    assert found.area_ratio > 0.8
    assert not found.is_anisotropic
    assert found.resolutions_in_angstroms.max() < 1.4 * found.resolutions_in_angstroms.min()
    assert found.n_clear_shells >= 12


def halves_seen_from(rotations, noise_to_signal):
    truth, pixel_size = made_up_complex(1, 48, 4.9)
    halves = (
        reconstruction(truth, rotations[i::2], max_radius=23, noise_to_signal=noise_to_signal, seed=i) for i in (0, 1)
    )
    return *halves, particle_mask(48), pixel_size


@pytest.mark.parametrize("noise_to_signal", [1, 4])
def test_views_from_all_sides_know_all_directions_alike(noise_to_signal):
    found = conical_correlation(*halves_seen_from(random_rotations(1500, 1).float(), noise_to_signal))
    assert found.area_ratio > 0.6
    assert not found.is_anisotropic


@pytest.mark.parametrize("noise_to_signal", [1, 4])
@pytest.mark.parametrize("within", [25, 45])
def test_a_missing_cone_is_found_where_it_is(within, noise_to_signal):
    # The slice of a view is perpendicular to it: what lies nearer to the axis than 90° less the cap is never seen.
    found = conical_correlation(*halves_seen_from(seen_along(AXIS, within, 1500), noise_to_signal))
    assert found.area_ratio < 0.45
    assert found.is_anisotropic
    worst = found.values[:, 1:].mean(1).argmin()
    missing = (found.directions @ AXIS).abs() > math.cos(math.radians(90 - within))
    assert missing[worst]
    seen = (found.directions @ AXIS).abs() < 0.3
    assert found.resolutions_in_angstroms[worst] > 1.5 * found.resolutions_in_angstroms[seen].median()


@pytest.mark.parametrize("n", [24, 25])
def test_each_curve_is_the_correlation_within_its_cone(n):
    first, second, mask = (torch.randn(n, n, n) for _ in range(3))
    found = conical_correlation(first, first + second, mask, 3.0)
    a, b = (np.fft.fftshift(np.fft.fftn((m * mask).double().numpy())) for m in (first, first + second))
    zyx = np.stack(np.meshgrid(*[np.arange(n) - n // 2] * 3, indexing="ij"), axis=-1)
    length = np.linalg.norm(zyx, axis=-1)
    for i in (0, 60, 127):
        along = np.abs(zyx[..., ::-1] @ found.directions[i].double().numpy()) / np.maximum(length, 1)
        for s in (5, 8, 11):
            inside = (np.floor(length + 0.5) == s) & (along >= math.cos(math.radians(20))) & (2 * length < n)
            expected = (a * b.conj())[inside].sum().real / np.sqrt(
                (np.abs(a[inside]) ** 2).sum() * (np.abs(b[inside]) ** 2).sum()
            )
            assert float(found.values[i, s]) == pytest.approx(expected, abs=1e-9)


def test_an_empty_cone_takes_the_whole_shell():
    first, second = torch.randn(24, 24, 24), torch.randn(24, 24, 24)
    found = conical_correlation(first, first + second, torch.ones(24, 24, 24), 3.0)
    whole = fourier_shell_correlation(first, first + second)
    # The first shell holds axes and the diagonals of faces: none is within 20° of a diagonal of the cube.
    corner = torch.full((3,), 1 / math.sqrt(3))
    i = (found.directions @ corner).abs().argmax()
    assert angle_in_degrees(found.directions[i], corner) < 10
    assert float(found.values[i, 1]) == pytest.approx(float(whole[1]))


def test_halves_that_are_one_map_are_known_everywhere_to_nyquist():
    density = torch.randn(32, 32, 32)
    found = conical_correlation(density, density, torch.ones(32, 32, 32), 2.0)
    assert found.area_ratio == pytest.approx(1)
    assert (found.resolutions_in_angstroms == 4).all()


def test_noise_is_not_called_anisotropic():
    first, second = (noise(32, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found = conical_correlation(first, second, (radius(32) < 13).float(), 4.0)
    assert found.n_clear_shells < 6
    assert not found.is_anisotropic


def test_conical_correlation_needs_one_size():
    with pytest.raises(ValueError, match="of one size"):
        conical_correlation(torch.zeros(8, 8, 8), torch.zeros(8, 8, 8), torch.zeros(9, 9, 9), 2.0)
