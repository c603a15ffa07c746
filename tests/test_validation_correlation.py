"""Correlation of half maps, local resolution and sharpening."""

import math

import numpy as np
import pytest
import starfile
import torch

from cryoai.formats.mrc import write_map
from cryoai.fourier import fourier_shell_correlation, shell_mean, shells_of_volume, transform_map
from cryoai.validation.correlation import correlate_half_maps
from cryoai.validation.local_resolution import local_resolution
from cryoai.validation.masks import automatic_mask
from cryoai.validation.sharpening import guinier_b_factor, sharpened_map
from known_maps import filtered, made_up_complex, noise, noisy_halves, radius
from properties import unchanged
from stacks import needs_relion, run_relion


def white(n, seed):
    return torch.randn(n, n, n, generator=torch.Generator().manual_seed(seed))


def noise_from(shell, n, seed, amplitude):
    """White noise that begins at a shell."""
    return filtered(white(n, seed), amplitude * (torch.arange(n // 2 + 1) >= shell).float())


def amplitudes(density):
    n = density.shape[-1]
    shells, weights = shells_of_volume(n)
    inside = weights > 0
    return shell_mean(transform_map(density.double())[inside].abs(), shells[inside], n // 2 + 1)


# ------------------------------------------------------------------------------ half maps


@pytest.fixture(scope="module")
def halves():
    truth, pixel_size = made_up_complex(1)
    first, second = noisy_halves(truth, pixel_size, 12)
    return first, second, automatic_mask(first, second, pixel_size, 12), pixel_size


def post_processed(folder, first, second, mask, pixel_size, *arguments):
    """What relion_postprocess says of half maps: its table of general values, and that of correlations."""
    for name, density in (("half1", first), ("half2", second), ("mask", mask)):
        write_map(folder / f"{name}.mrc", density.numpy(), pixel_size)
    (folder / "out").mkdir()
    given = ["--i", "half1.mrc", "--i2", "half2.mrc", "--mask", "mask.mrc", "--angpix", f"{pixel_size}"]
    run_relion("relion_postprocess", folder, *given, "--o", "out/post", *arguments)
    tables = starfile.read(folder / "out" / "post.star")
    return tables["general"], tables["fsc"]


@needs_relion
def test_all_curves_agree_with_relion(tmp_path, halves):
    with unchanged(*halves[:3]):
        found = correlate_half_maps(*halves, seed=0)
    general, fsc = post_processed(tmp_path, *halves)

    def difference(curve, column):
        # RELION counts the plane x = 0 twice, and in its last shell the corners too.
        return np.abs(curve.values.numpy() - fsc[column].to_numpy())[3:-1]

    assert general["rlnRandomiseFrom"] == pytest.approx(64 * halves[3] / found.randomised_from, rel=1e-5)
    assert difference(found.unmasked, "rlnFourierShellCorrelationUnmaskedMaps").max() < 0.01
    assert difference(found.masked, "rlnFourierShellCorrelationMaskedMaps").max() < 0.01
    # Other random phases: the correlation of noise in this mask scatters by some 0.05 in a shell.
    noise_free = "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"
    assert difference(found.randomised, noise_free)[found.randomised_from :].mean() < 0.06
    corrected = difference(found.corrected, "rlnFourierShellCorrelationCorrected")
    assert corrected[: found.randomised_from - 3].max() < 0.01
    assert corrected.mean() < 0.04
    assert corrected.max() < 0.15
    # RELION's resolution is that of the corrected curve: one shell of difference at most.
    shells = [
        64 * halves[3] / r for r in (general["rlnFinalResolution"], found.corrected.resolution_at_0143_in_angstroms)
    ]
    assert abs(shells[0] - shells[1]) < 1.01


@needs_relion
def test_the_b_factor_is_that_of_relion(tmp_path):
    truth, pixel_size = made_up_complex(0, 96, 1.8)
    blurred = filtered(truth, torch.exp(-150 / 4 * (torch.arange(49) / (96 * pixel_size)) ** 2))
    first, second = noisy_halves(blurred, pixel_size, 4.2)
    mask = automatic_mask(first, second, pixel_size, 4.2)
    general, fsc = post_processed(tmp_path, first, second, mask, pixel_size, "--auto_bfac", "--autob_highres", "5")
    curve = torch.from_numpy(fsc["rlnFourierShellCorrelationCorrected"].to_numpy().copy())
    # RELION fits the maps without their mask.
    found = guinier_b_factor((first + second) / 2, curve, pixel_size, 5.0)
    assert found == pytest.approx(-general["rlnBfactorUsedForSharpening"], rel=0.01)


def test_what_a_tight_mask_makes_of_noise_is_taken_off():
    n = 48
    blob = (radius(n) < 12).float()
    # In common the halves have their lowest shells only; all else is noise.
    common = 60 * filtered(blob, (torch.arange(n // 2 + 1) < 5).float())
    first, second = common + white(n, 1), common + white(n, 2)
    sharp = (radius(n) < 9).float()
    found = correlate_half_maps(first, second, sharp, 3.0, seed=3)
    beyond = slice(found.randomised_from + 4, None)
    assert found.unmasked.values[beyond].abs().mean() < 0.05
    assert found.masked.values[beyond].mean() > 0.2
    assert (found.randomised.values - found.masked.values)[beyond].abs().mean() < 0.08
    assert abs(found.corrected.values[beyond].mean()) < 0.05
    assert found.masked.resolution_at_0143_in_angstroms < found.corrected.resolution_at_0143_in_angstroms


def test_correction_is_the_formula_and_leaves_two_shells_more(halves):
    found = correlate_half_maps(*halves, seed=1)
    start = found.randomised_from
    assert found.unmasked.values[1:start].min() >= 0.8 > found.unmasked.values[start]
    assert torch.equal(found.corrected.values[: start + 2], found.masked.values[: start + 2])
    masked, nothing, corrected = (
        curve.values[start + 2 :] for curve in (found.masked, found.randomised, found.corrected)
    )
    torch.testing.assert_close(corrected * (1 - nothing) + nothing, masked)


def test_curves_without_phases_are_the_correlations_of_the_maps(halves):
    first, second, mask, _ = halves
    found = correlate_half_maps(*halves, seed=1)
    assert torch.equal(found.unmasked.values, fourier_shell_correlation(first, second))
    assert torch.equal(found.masked.values, fourier_shell_correlation(first * mask, second * mask))


def test_a_seed_is_a_result(halves):
    curves = [correlate_half_maps(*halves, seed=seed).randomised.values for seed in (0, 0, 1)]
    assert torch.equal(curves[0], curves[1])
    assert not torch.equal(curves[0], curves[2])


@pytest.mark.parametrize("n", [32, 33])
def test_resolution_is_where_the_halves_part(n):
    common = filtered(white(n, 0), (torch.arange(n // 2 + 1) <= 9).float())
    first, second = (common + noise_from(10, n, seed, 1.0) for seed in (1, 2))
    found = correlate_half_maps(first, second, torch.ones(n, n, n), 2.5, seed=0)
    assert found.randomised_from == 10
    for curve in (found.unmasked, found.masked, found.randomised, found.corrected):
        assert curve.resolution_at_half_in_angstroms == pytest.approx(n * 2.5 / 9)
    assert found.unmasked.resolution_at_0143_in_angstroms == pytest.approx(n * 2.5 / 9)


def test_halves_that_never_part_are_not_corrected():
    density = white(32, 0)
    found = correlate_half_maps(density, density + 0.1 * white(32, 1), (radius(32) < 10).float(), 2.0, seed=0)
    assert found.randomised_from == 17
    torch.testing.assert_close(found.randomised.values, found.masked.values)
    assert torch.equal(found.corrected.values, found.masked.values)
    assert found.corrected.resolution_at_0143_in_angstroms == 4.0


def test_noise_is_not_resolved():
    found = correlate_half_maps(white(32, 0), white(32, 1), torch.ones(32, 32, 32), 2.0, seed=0)
    assert found.randomised_from == 1
    assert found.unmasked.resolution_at_half_in_angstroms == math.inf


def test_a_mask_must_be_as_large_as_the_maps():
    with pytest.raises(ValueError, match="as large as its maps"):
        correlate_half_maps(white(8, 0), white(8, 0), torch.ones(9, 9, 9), 2.0, seed=0)


# ------------------------------------------------------------------------------ local resolution


def window_shell(pixel_size):
    """Width in 1/Å of a shell of the windows: how finely they can tell."""
    return 1 / (max(20, 75 / pixel_size) * pixel_size)


@pytest.mark.parametrize("pixel_size", [3.0, 5.5])
def test_two_regions_have_their_two_resolutions(pixel_size):
    n = 64
    common = white(n, 0)
    left = (torch.arange(n) < n // 2).float().expand(n, n, n)
    truths = [3 * pixel_size, 6 * pixel_size]
    first, second = (
        common
        + sum(
            side * noise_from(math.ceil(n * pixel_size / truth), n, 10 * half + region, 3.0)
            for region, (side, truth) in enumerate(zip((left, 1 - left), truths, strict=True))
        )
        for half in (1, 2)
    )
    mask = (radius(n) < 28).float()
    with unchanged(first, second, mask):
        found = local_resolution(first, second, mask, pixel_size)
    away = max(10, round(75 / pixel_size / 2))
    for side, truth in ((slice(0, n // 2 - away), truths[0]), (slice(n // 2 + away, n), truths[1])):
        values = found[..., side][mask[..., side] > 0]
        # Noise that begins at once leaks into the shell before.
        assert 0 <= 1 / truth - 1 / values.median() < window_shell(pixel_size)


def test_alike_everywhere_it_is_the_resolution_at_half():
    truth, pixel_size = made_up_complex(1)
    first, second = noisy_halves(filtered(white(64, 5), amplitudes(truth).float()), pixel_size, 12)
    whole = (radius(64) < 28).float()
    expected = correlate_half_maps(first, second, whole, pixel_size, seed=0).unmasked.resolution_at_half_in_angstroms
    found = local_resolution(first, second, whole, pixel_size)[whole > 0]
    assert abs(1 / expected - 1 / found.median()) < window_shell(pixel_size)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(("n", "pixel_size"), [(40, 4.0), (41, 4.0), (16, 6.0)])
def test_halves_that_agree_reach_nyquist_and_outside_nothing_is_said(n, pixel_size):
    mask = (radius(n) < 0.4 * n).float()
    density = white(n, 0)
    found = local_resolution(density, density, mask, pixel_size)
    assert torch.isnan(found[mask == 0]).all()
    torch.testing.assert_close(found[mask == 1], torch.full_like(found[mask == 1], 2 * pixel_size))


def test_halves_that_share_nothing_have_no_resolution():
    mask = torch.ones(32, 32, 32)
    found = local_resolution(white(32, 0), white(32, 1), mask, 4.0)
    assert not torch.isnan(found).any()
    # A first shell of few coefficients agrees by chance here and there.
    assert torch.isinf(found).double().mean() > 0.4
    assert found.min() > 20


def test_an_empty_mask_is_all_outside():
    assert torch.isnan(local_resolution(white(24, 0), white(24, 0), torch.zeros(24, 24, 24), 4.0)).all()


def test_local_resolution_needs_one_size():
    with pytest.raises(ValueError, match="of one size"):
        local_resolution(white(8, 0), white(8, 0), torch.ones(9, 9, 9), 2.0)


# ------------------------------------------------------------------------------ sharpening


def atoms_at_random(b_factor, n=96, pixel_size=1.5):
    """Points at random in a ball under a known B factor: Wilson's statistics hold at all frequencies."""
    generator = np.random.default_rng(0)
    points = generator.integers(-20, 20, (6000, 3))
    points = points[(points**2).sum(1) < 20**2] + n // 2
    density = torch.zeros(n, n, n)
    density[tuple(points.T)] = 1
    return filtered(density, torch.exp(-b_factor / 4 * (torch.arange(n // 2 + 1) / (n * pixel_size)) ** 2))


@pytest.mark.parametrize("b_factor", [0, 80, 250])
def test_a_known_b_factor_is_found(b_factor):
    found = guinier_b_factor(atoms_at_random(b_factor), torch.ones(49), 1.5, 3.0)
    assert found == pytest.approx(b_factor, abs=6)


def test_further_blur_is_found_exactly():
    density, k = made_up_complex(3, 96, 1.8)[0], torch.arange(49) / (96 * 1.8)
    before, after = (
        guinier_b_factor(filtered(density, torch.exp(-b / 4 * k**2)), torch.ones(49), 1.8, 4.0) for b in (0, 150)
    )
    assert after - before == pytest.approx(150, abs=1)


def test_sharpening_takes_the_blur_off_and_cuts_at_the_resolution():
    n, pixel_size = 96, 1.5
    blurred = atoms_at_random(120)
    fsc = torch.linspace(1, 0.2, 49)
    whole = torch.ones(n, n, n)
    with unchanged(blurred, whole, fsc):
        found = sharpened_map(blurred, blurred, whole, fsc, pixel_size, 4.0)
    last = int(n * pixel_size / 4)
    b_factor = found.b_factor_in_square_angstroms
    assert b_factor == guinier_b_factor(blurred, fsc, pixel_size, 4.0)
    k_squared = (torch.arange(49).double() / (n * pixel_size)) ** 2
    expected = amplitudes(blurred) * (2 * fsc / (1 + fsc)).sqrt() * torch.exp(b_factor / 4 * k_squared)
    seen = amplitudes(found.density)
    torch.testing.assert_close(seen[: last + 1], expected[: last + 1], rtol=1e-3, atol=1e-4)
    assert float(seen[last + 1]) == pytest.approx(0.5 * float(expected[last + 1]), rel=1e-2)
    assert seen[last + 2 :].max() < 1e-4
    # Flat in the Guinier plot, up to the noise of random atoms.
    assert guinier_b_factor(found.density, torch.ones(49), pixel_size, 4.0) == pytest.approx(0, abs=1)


@pytest.mark.parametrize("resolution", [9.0, 15.0, math.inf])
def test_at_low_resolution_there_is_no_b_factor(resolution):
    density = made_up_complex(0)[0]
    fsc = torch.linspace(1, 0.2, 33)
    found = sharpened_map(density, density, torch.ones_like(density), fsc, 3.7, resolution)
    assert found.b_factor_in_square_angstroms is None
    last = 0 if resolution == math.inf else int(64 * 3.7 / resolution)
    weighted = (2 * fsc / (1 + fsc)).sqrt() * amplitudes(density)
    torch.testing.assert_close(amplitudes(found.density)[: last + 1], weighted[: last + 1], rtol=1e-4, atol=1e-4)


def test_few_shells_are_no_line():
    # At 7 Å in a box of 60 Å there are three shells beyond 10 Å.
    assert guinier_b_factor(white(40, 0), torch.ones(21), 1.5, 7.0) is None


def test_what_the_halves_do_not_share_is_left_out():
    n = 48
    density = white(n, 0)
    fsc = torch.ones(25)
    fsc[10], fsc[0] = -0.1, -1
    seen = amplitudes(sharpened_map(density, density, torch.ones(n, n, n), fsc, 6.0, 12.0).density)
    assert seen[1:10].min() > 0.5
    assert seen[10:].max() < 1e-5


def test_noise_in_the_solvent_does_not_enter_the_fit():
    blurred = atoms_at_random(120)
    mask = (radius(96) < 26).float()
    generator = torch.Generator().manual_seed(1)
    noisy = blurred + (1 - mask) * 1e-4 * noise(96, generator)
    fsc = torch.ones(49)
    inside, clean = (sharpened_map(m, m, mask, fsc, 1.5, 3.0).b_factor_in_square_angstroms for m in (noisy, blurred))
    assert inside == pytest.approx(clean, abs=1e-3)
