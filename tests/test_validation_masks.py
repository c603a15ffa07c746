import math

import pytest
import torch

from cryoai.reconstruction import particle_mask
from cryoai.validation.correlation import correlate_half_maps
from cryoai.validation.masks import automatic_mask, solvent_level
from known_maps import MOLECULES, filtered, made_up_complex, molecule, noise, noisy_halves, radius
from properties import unchanged
from stacks import needs_shared_data


def gaussian(density, pixel_size, resolution):
    n = density.shape[-1]
    return filtered(density, 0.5 ** (torch.arange(n // 2 + 1) * resolution / (n * pixel_size)) ** 2)


def assert_holds_the_molecule(mask, truth, pixel_size, resolution, *, within):
    # Without the ripples of a sharp band limit, and the noise that one of these maps holds.
    density = gaussian(truth, pixel_size, 3 * pixel_size).clamp_min(0)
    density[density < 0.05 * density.max()] = 0
    assert (mask * density).sum() > 0.999 * density.sum()
    envelope = gaussian(truth, pixel_size, max(15, resolution))
    assert mask.sum() < within * (envelope > 0.1 * envelope.max()).sum()
    assert mask.min() >= 0
    assert mask.max() == 1


@needs_shared_data
@pytest.mark.parametrize("resolution", [12, 15, 20])
@pytest.mark.parametrize("name", MOLECULES)
def test_the_mask_holds_the_molecule_and_little_else(name, resolution):
    truth, pixel_size = molecule(name)
    first, second = noisy_halves(truth, pixel_size, resolution)
    with unchanged(first, second):
        mask = automatic_mask(first, second, pixel_size, resolution)
    assert_holds_the_molecule(mask, truth, pixel_size, resolution, within=2.3)


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_holds_complexes_of_thin_domains(seed):
    truth, pixel_size = made_up_complex(seed)
    halves = noisy_halves(truth, pixel_size, 12, seed)
    assert_holds_the_molecule(automatic_mask(*halves, pixel_size, 12), truth, pixel_size, 12, within=3)


def test_maps_without_noise_have_a_mask_too():
    truth, pixel_size = made_up_complex(0)
    mask = automatic_mask(truth, truth, pixel_size, 2 * pixel_size)
    assert_holds_the_molecule(mask, truth, pixel_size, 2 * pixel_size, within=3)


def test_the_mask_by_itself_correlates_little():
    truth, pixel_size = made_up_complex(1)
    halves = noisy_halves(truth, pixel_size, 12)
    found = correlate_half_maps(*halves, automatic_mask(*halves, pixel_size, 12), pixel_size, seed=0)
    beyond = found.randomised.values[found.randomised_from + 4 :]
    assert beyond.mean() < 0.1
    assert beyond.max() < 0.25


def test_scale_and_offset_change_nothing():
    truth, pixel_size = made_up_complex(2)
    first, second = noisy_halves(truth, pixel_size, 12)
    mask = automatic_mask(first, second, pixel_size, 12)
    again = automatic_mask(5 * first + 3, 5 * second + 3, pixel_size, 12)
    # Rounding may move a voxel across the threshold.
    assert (again - mask).abs().mean() < 1e-4


@pytest.mark.parametrize("power", [0, 1])
@pytest.mark.parametrize("resolution", [15, 25, 40])
def test_noise_alone_gives_the_sphere(power, resolution):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        first, second = (
            noise(64, generator) if power else torch.randn(64, 64, 64, generator=generator) for _ in range(2)
        )
        assert torch.equal(automatic_mask(first, second, 5.5, resolution), particle_mask(64))


def test_a_map_that_is_not_resolved_gives_the_sphere():
    truth, pixel_size = made_up_complex(0)
    assert torch.equal(automatic_mask(truth, truth, pixel_size, math.inf), particle_mask(64))
    assert torch.equal(automatic_mask(torch.zeros(32, 32, 32), torch.zeros(32, 32, 32), 4.0, 10), particle_mask(32))


@pytest.mark.parametrize("n", [48, 49])
def test_a_detached_domain_is_kept_and_a_speck_is_not(n):
    r = radius(n)

    def ball(size, *shifts):
        return (torch.roll(r, shifts, (0, 1, 2)) < size).float()

    density = ball(8, 0, 0, -8) + ball(5, 0, 0, 12) + 0.6 * ball(1.5, 0, 14, 0)
    mask = automatic_mask(density, density, 5.0, 10.0)
    c = n // 2
    assert mask[c, c, c - 8] == mask[c, c, c + 12] == 1
    assert mask[c, c + 14, c] == 0


def test_the_edge_falls_as_a_cosine_and_ends_within_the_box():
    r = radius(48)
    density = (r < 10).float()
    mask = automatic_mask(density, density, 5.0, 30.0)[24, 24, 24:]
    falling = mask[(mask > 0) & (mask < 1)]
    # Three quarters of 30 Å are 4.5 pixels.
    assert 4 <= len(falling) <= 5
    assert (falling.diff() < 0).all()
    large = (r < 23).float()
    assert automatic_mask(large, large, 5.0, 10.0)[r >= 24].max() == 0


def test_half_maps_must_be_of_one_size():
    with pytest.raises(ValueError, match="of one size"):
        automatic_mask(torch.zeros(8, 8, 8), torch.zeros(9, 9, 9), 4.0, 10.0)


@pytest.mark.parametrize("share", [0.05, 0.25, 0.4])
def test_the_solvent_is_found_beside_a_molecule(share):
    generator = torch.Generator().manual_seed(0)
    n = 20000
    solvent = 7 + torch.randn(n, generator=generator)
    solvent[: int(share * n)] += 10
    assert solvent_level(solvent) == pytest.approx(7, abs=0.15)
