import math

import pytest
import torch

from cryoai.fourier import FourierDisc, fourier_shell_correlation
from cryoai.half_maps import HalfMaps
from cryoai.imaging import ImagingModel
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses
from cryoai.reconstruction import HalfSets, particle_mask
from cryoai.validation.correlation import CorrelationCurve, HalfMapCorrelation
from cryoai.volumes import SampledVolume
from oracles import make_optics, random_rotations
from properties import unchanged

BOX, PIXEL, N = 32, 3.0, 800


def half_sets_of(phantom, noise_deviation, signal=1.0):
    """Two halves of images at known poses, with white noise of this deviation."""
    imaging = ImagingModel(FourierDisc.of_box(BOX), PIXEL, BOX // 2)
    volume = SampledVolume.from_map(phantom.density(BOX).float(), BOX // 2)
    poses = Poses(random_rotations(N).float(), 4 * torch.randn(N, 2))
    optics = make_optics(N, defocus_u_in_angstroms=torch.linspace(8000, 22000, N))
    clean = imaging.predict(volume, poses, optics)
    images = signal * clean + noise_deviation * torch.randn_like(clean)
    sets = HalfSets.empty(BOX)
    precision = (imaging.shells > 0) / noise_deviation**2
    for half, sums in enumerate(sets.sums):
        rows = torch.arange(half, N, 2)
        sums.add(ParticleBatch(rows, images[rows], optics[rows]), poses[rows], imaging, precision)
    return sets


def test_halves_agree_where_there_is_signal_and_nowhere_else(phantom):
    sets = half_sets_of(phantom, 1.0)
    with unchanged(*sets.sums):
        maps = HalfMaps.of(sets, PIXEL)
    assert maps.first.shape == maps.second.shape == maps.mask.shape == (BOX, BOX, BOX)
    assert maps.fsc.shape == (BOX // 2 + 1,)
    # The phantom is a sum of Gaussians and fades away with frequency.
    assert (maps.fsc[1:4] > 0.9).all()
    assert maps.fsc[-3:].abs().max() < 0.5
    last = maps.n_resolved_shells
    assert 4 <= last < BOX // 2
    assert (maps.fsc[1 : last + 1] >= 0.143).all()
    assert maps.fsc[last + 1] < 0.143
    assert maps.resolution_in_angstroms == pytest.approx(BOX * PIXEL / last)


def test_less_noise_resolves_more(phantom):
    shells = [HalfMaps.of(half_sets_of(phantom, d), PIXEL).n_resolved_shells for d in (4.0, 1.0, 0.1)]
    assert shells[0] < shells[1] < shells[2]


def test_the_fsc_is_taken_within_the_mask_and_corrected_for_it(phantom):
    sets = half_sets_of(phantom, 1.0)
    for mask in (None, particle_mask(BOX)):
        maps = HalfMaps.of(sets, PIXEL, mask)
        assert mask is None or maps.mask is mask
        masked = fourier_shell_correlation(maps.first * maps.mask, maps.second * maps.mask)
        torch.testing.assert_close(maps.correlation.masked.values.float(), masked.float())
        # The true phases are left alone where they are known well; beyond, the mask's own part is taken off.
        spared = maps.correlation.randomised_from + 2
        torch.testing.assert_close(maps.fsc[:spared], masked[:spared].float())
        chance = maps.correlation.randomised.values[spared:].float()
        torch.testing.assert_close(maps.fsc[spared:] * (1 - chance) + chance, masked[spared:].float())


def test_the_mask_that_is_found_holds_the_particle_and_less_than_the_sphere(phantom):
    maps = HalfMaps.of(half_sets_of(phantom, 0.3), PIXEL)
    truth = phantom.density(BOX)
    assert (truth * maps.mask).sum() > 0.97 * truth.sum()
    assert maps.mask.sum() < 0.75 * particle_mask(BOX).sum()
    assert (maps.mask.min(), maps.mask.max()) == (0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_halves_of_nothing_but_noise_resolve_next_to_nothing(phantom, seed):
    torch.manual_seed(seed)
    maps = HalfMaps.of(half_sets_of(phantom, 1.0, signal=0.0), PIXEL)
    assert maps.n_resolved_shells <= 3
    assert maps.fsc[4:].abs().mean() < 0.2


def test_the_map_of_all_particles_is_nearer_the_truth_than_either_half(phantom):
    sets = half_sets_of(phantom, 1.0)
    maps = HalfMaps.of(sets, PIXEL)
    with unchanged(*sets.sums, maps):
        combined = maps.combined(sets)
    mask, truth = particle_mask(BOX), phantom.density(BOX)
    last = maps.n_resolved_shells
    whole, first, second = (
        fourier_shell_correlation(m * mask, truth * mask)[1 : last + 1] for m in (combined, maps.first, maps.second)
    )
    assert (whole > torch.maximum(first, second) - 1e-3).all()
    assert whole.mean() > first.mean() + 0.01
    # And as a density, because what is noise was weighted down.
    errors = [((m - truth) * mask).norm() / (truth * mask).norm() for m in (combined, maps.first, maps.second)]
    assert errors[0] < 0.5 * min(errors[1:])
    # The FSC of the halves foretells that of the whole with the truth: sqrt(2 f / (1 + f)), in the mask that it is of.
    foretold = (2 * maps.fsc / (1 + maps.fsc)).clamp_min(0).sqrt()[1 : last + 1]
    within = fourier_shell_correlation(combined * maps.mask, truth * maps.mask)[1 : last + 1]
    torch.testing.assert_close(within.float(), foretold, atol=0.1, rtol=0)


def test_weighting_the_shells_by_their_fsc_brings_the_map_nearer_the_truth(phantom):
    sets = half_sets_of(phantom, 1.0)
    maps = HalfMaps.of(sets, PIXEL)
    both = sets.sums[0] + sets.sums[1]
    unweighted = both.solve(torch.zeros(BOX // 2 + 1), max_radius=maps.n_resolved_shells)
    truth = phantom.density(BOX) * maps.mask
    weighted_error, unweighted_error = ((m * maps.mask - truth).norm() for m in (maps.combined(sets), unweighted))
    assert weighted_error < 0.95 * unweighted_error


def test_nothing_is_left_in_the_combined_map_beyond_the_resolved_shells(phantom):
    sets = half_sets_of(phantom, 1.0)
    maps = HalfMaps.of(sets, PIXEL)
    lattices = [SampledVolume.from_map(m, BOX // 2 - 1, oversampling=1) for m in (maps.combined(sets), maps.first)]
    radii = lattices[0].lattice.radii()
    beyond = (radii > maps.n_resolved_shells + 2) & (radii < BOX // 2)
    combined, unfiltered = (lattice.values[beyond, 0].abs().square().mean() for lattice in lattices)
    # The correction of the falloff spreads a little over the edge of the band.
    assert combined < 1e-2 * unfiltered


def test_references_are_the_halves_own_maps(phantom):
    sets = half_sets_of(phantom, 1.0)
    maps = HalfMaps.of(sets, PIXEL)
    first, second = maps.references(sets, 8)
    assert (first * (1 - (maps.mask > 0).float())).abs().max() == 0
    own, other = (fourier_shell_correlation(first, half * maps.mask)[2:8].mean() for half in (maps.first, maps.second))
    assert own > other
    # Only the weights of the shells come from the other half: without it they are the same sums.
    altered = HalfSets((sets.sums[0], half_sets_of(phantom, 4.0).sums[1]))
    again, changed = maps.references(altered, 8)
    assert torch.equal(again, first)
    assert not torch.equal(changed, second)


@pytest.mark.parametrize(("period", "n_above"), [(12.0, 8), (6.0, 16), (math.inf, 0)])
def test_the_resolution_is_that_of_the_corrected_curve(period, n_above):
    empty, good = torch.zeros(BOX, BOX, BOX), (torch.arange(BOX // 2 + 1) <= n_above).double()
    good[0] = 1
    curve, other = CorrelationCurve(good, period, 99.0), CorrelationCurve(torch.ones(BOX // 2 + 1), 1.0, 1.0)
    maps = HalfMaps(empty, empty, empty, HalfMapCorrelation(other, other, other, curve, 5))
    assert maps.resolution_in_angstroms == period
    assert maps.n_resolved_shells == n_above
    assert maps.fsc.dtype == torch.float32
