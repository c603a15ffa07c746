import math

import pytest
import torch

from cryoai.formats.atoms import read_model_as_map
from cryoai.simulation import resample_map
from cryoai.validation.defects import MapDefect, MapDefects, map_defects
from known_maps import (
    MOLECULES,
    cut,
    filtered,
    made_up,
    made_up_complex,
    molecule,
    noisy_halves,
    radius,
    reconstruction,
)
from oracles import random_rotations
from properties import unchanged
from stacks import SHARED, needs_shared_data

RESOLUTIONS = (11, 18, 30)
MODELS = ("1wcm_rnapol2.pdb", "4hhb.cif", "6vxx.cif", "7pbl_RuvB_HJ.pdb", "8bk7.cif")


def of_one(density, pixel_size, resolution):
    return map_defects(density, density, pixel_size, resolution)


def assert_sound(truth, pixel_size):
    for resolution in RESOLUTIONS:
        if resolution >= 2 * pixel_size:
            assert of_one(cut(truth, pixel_size, resolution), pixel_size, resolution).found == ()
            halves = noisy_halves(truth, pixel_size, resolution, seed=resolution)
            assert map_defects(*halves, pixel_size, resolution).found == ()


@needs_shared_data
@pytest.mark.parametrize("name", MOLECULES)
def test_maps_of_molecules_are_sound(name):
    assert_sound(*molecule(name))


@needs_shared_data
@pytest.mark.parametrize("name", MODELS)
def test_models_of_molecules_are_sound(name):
    pytest.importorskip("gemmi")
    source = read_model_as_map(SHARED / "models" / name, 2.0)
    # The box has half as much room again as the molecule needs.
    pixel_size = 1.5 * source.density.shape[0] * 2.0 / 64
    assert_sound(torch.from_numpy(resample_map(source, 64, pixel_size).density.copy()), pixel_size)


@pytest.mark.parametrize("seed", range(0, 21, 3))
def test_made_up_complexes_are_sound(seed):
    truth, pixel_size = made_up_complex(seed)
    assert of_one(cut(truth, pixel_size, 30), pixel_size, 30).found == ()
    assert map_defects(*noisy_halves(truth, pixel_size, 11, seed), pixel_size, 11).found == ()


@pytest.fixture(params=[(0, 12), (0, 25), (3, 16)], ids=str)
def sound(request):
    """A sound map, its pixel size and its resolution."""
    seed, resolution = request.param
    truth, pixel_size = made_up_complex(seed)
    return cut(truth, pixel_size, resolution), pixel_size, resolution


def test_an_inverted_map_is_dark(sound):
    density, pixel_size, resolution = sound
    right, wrong = of_one(*sound), of_one(-density, pixel_size, resolution)
    assert right.found == ()
    assert wrong.found == (MapDefect.NEGATIVE_CONTRAST,)
    assert wrong.contrast_asymmetry == pytest.approx(-right.contrast_asymmetry, abs=1e-3)
    # All else is measured in the right sign.
    assert wrong.hollowness == pytest.approx(right.hollowness, abs=1e-3)
    assert wrong.rim_share == right.rim_share
    assert wrong.largest_part_share == pytest.approx(right.largest_part_share, abs=1e-3)


def test_scale_offset_and_a_small_shift_change_nothing(sound):
    density, pixel_size, resolution = sound
    before = of_one(*sound)
    after = of_one(7 * torch.roll(density, (2, -3, 1), (0, 1, 2)) + 2, pixel_size, resolution)
    for name, value in vars(before).items():
        assert getattr(after, name) == pytest.approx(value, abs=0.03), name
    assert after.found == ()


def rough(density, resolution, pixel_size, amount, seed=0):
    """The map times one plus noise of the finest resolved details."""
    texture = cut(torch.randn(density.shape, generator=torch.Generator().manual_seed(seed)), pixel_size, resolution)
    return density * (1 + amount * texture / texture.std())


@pytest.mark.parametrize("amount", [0, 0.1])
@pytest.mark.parametrize(("pixel_size", "resolution"), [(3.0, 12.0), (3.0, 25.0), (5.5, 25.0)])
def test_balls_and_shells_are_told_from_molecules(pixel_size, resolution, amount):
    r = radius(64).float()
    for ball in (torch.exp(-(r**2) / 2 / 9**2), torch.sigmoid((18 - r) / 1.5)):
        found = of_one(rough(ball, resolution, pixel_size, amount), pixel_size, resolution)
        assert found.found == (MapDefect.FEATURELESS_BALL,)
    shell = rough(torch.exp(-((r - 19) ** 2) / 2 / 3**2), resolution, pixel_size, 3 * amount)
    assert of_one(shell, pixel_size, resolution).found == (MapDefect.HOLLOW_SHELL,)


@pytest.mark.parametrize("n_views", [3, 10, 25])
def test_few_views_leave_streaks(n_views):
    truth, pixel_size = made_up_complex(0)
    streaky = reconstruction(truth, random_rotations(n_views, 4).float(), max_radius=19)
    found = of_one(streaky, pixel_size, 64 * pixel_size / 19)
    assert MapDefect.STREAKS in found.found
    assert found.participation < 0.3


def test_many_views_leave_none():
    truth, pixel_size = made_up_complex(0)
    whole = reconstruction(truth, random_rotations(400, 4).float(), max_radius=19)
    assert of_one(whole, pixel_size, 64 * pixel_size / 19).found == ()


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("times", [1.2, 1.4])
def test_a_molecule_larger_than_the_box_reaches_its_edge(seed, times):
    source = made_up(seed)
    reach = float(radius(128)[torch.from_numpy(source.density) > 0.1 * source.density.max()].max())
    pixel_size = reach * source.pixel_size_in_angstroms / (32 * times)
    middle = slice(32, 96)
    larger = torch.from_numpy(resample_map(source, 128, pixel_size).density.copy())[middle, middle, middle].clone()
    resolution = max(12, 2.2 * pixel_size)
    assert MapDefect.BOX_TOO_SMALL in of_one(cut(larger, pixel_size, resolution), pixel_size, resolution).found


def test_spots_are_not_one_molecule():
    r = radius(64)
    generator = torch.Generator().manual_seed(0)
    spots = torch.zeros(64, 64, 64)
    for _ in range(8):
        z, y, x = (20 * torch.rand(3, generator=generator) - 10).mul(1.6).round().int().tolist()
        spots += torch.roll(torch.exp(-(r**2) / 2 / 2**2), (z, y, x), (0, 1, 2)).float()
    noisy = [spots + 0.05 * torch.randn(64, 64, 64, generator=generator) for _ in range(2)]
    found = map_defects(*noisy, 5.5, 22.0)
    assert found.found == (MapDefect.SCATTERED,)
    assert found.largest_part_share < 0.4


def test_noise_in_the_halves_is_not_taken_for_a_shape():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(48, 48, 48, generator=generator) for _ in range(2))
    found = map_defects(first, second, 4.0, math.inf)
    assert MapDefect.STREAKS not in found.found
    assert all(math.isfinite(value) for value in vars(found).values())
    blank = torch.zeros(32, 32, 32)
    assert map_defects(blank, blank, 4.0, 20.0).found == ()


@pytest.mark.parametrize("n", [48, 49])
def test_the_numbers_are_what_they_say(n):
    r = radius(n).float()
    assert of_one(torch.exp(-(r**2) / 50), 4.0, 8.0).spherical_share == pytest.approx(1, abs=0.01)
    shell = of_one(torch.exp(-((r - 16) ** 2) / 8), 4.0, 8.0)
    assert shell.hollowness == pytest.approx(1, abs=0.05)
    # Random coefficients without any order: <x>^2 / <x^2> of an exponential distribution.
    white = torch.randn(n, n, n, generator=torch.Generator().manual_seed(0))
    assert of_one(white, 4.0, 8.0).participation == pytest.approx(0.5, abs=0.02)
    x = torch.arange(n) - n // 2
    plane = filtered(white, torch.ones(n // 2 + 1)).mean(0, keepdim=True).expand(n, n, n)
    thin = plane * torch.exp(-(x.float()[:, None, None] ** 2) / 2 / 12**2)
    assert of_one(thin.contiguous(), 4.0, 8.0).participation < 0.2
    two = torch.zeros(n, n, n)
    for shift, size in ((-10, 5), (10, 5)):
        two += torch.roll((r < size).float(), shift, 2)
    assert of_one(two, 4.0, 8.0).largest_part_share == pytest.approx(0.5, abs=0.02)


def test_arguments_stay_as_they_are():
    first, second = noisy_halves(*made_up_complex(0), 12)
    with unchanged(first, second):
        map_defects(first, second, 3.7, 12)


def test_the_list_follows_from_the_numbers():
    sound = {
        "contrast_asymmetry": 1.0,
        "rim_share": 0.0,
        "largest_part_share": 1.0,
        "spherical_share": 0.5,
        "hollowness": 0.0,
        "participation": 0.5,
    }
    assert MapDefects(**sound).found == ()
    assert MapDefects(**sound | {"rim_share": 0.3, "contrast_asymmetry": -1}).found == (MapDefect.BOX_TOO_SMALL,)
    assert MapDefects(**sound | {"spherical_share": 0.99, "hollowness": 1}).found == (MapDefect.HOLLOW_SHELL,)
    assert MapDefects(**sound | {"hollowness": 1}).found == ()
    assert MapDefects(**sound | {"spherical_share": 0.99, "participation": 0.1}).found == (MapDefect.FEATURELESS_BALL,)
    assert len({defect.value for defect in MapDefect}) == len(MapDefect)
