from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cryoai.bootstrap import (
    BootstrapSchedule,
    Reference,
    StochasticSearch,
    contrast_by_search,
    search_box,
    tempered_weights,
)
from cryoai.contrast import ContrastSign
from cryoai.fourier import FourierDisc
from cryoai.noise import NoiseSpectrum
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles, prepare_particles
from cryoai.poses import Poses
from cryoai.search import Candidates
from cryoai.simulation import protein_like_phantom, simulate
from cryoai.volumes import SampledVolume
from oracles import make_optics, positions
from properties import unchanged


def candidates_with(log_likelihoods):
    shape = log_likelihoods.shape
    return Candidates(Poses(torch.eye(3).expand(*shape, 3, 3), torch.zeros(*shape, 2)), log_likelihoods)


@given(st.integers(1, 60), st.integers(2, 10), st.integers(0, 20))
def test_the_schedule_goes_from_its_first_values_to_its_last_and_never_back(n_steps, first_radius, growth):
    schedule = BootstrapSchedule(n_steps=n_steps, first_radius=first_radius, last_radius=first_radius + growth)
    radii = [schedule.radius(step) for step in range(n_steps + 1)]
    spreads = [schedule.spread(step) for step in range(n_steps + 1)]
    assert (radii[0], radii[-1]) == (first_radius, first_radius + growth)
    assert (spreads[0], spreads[-1]) == pytest.approx((32, 2))
    assert radii == sorted(radii)
    assert spreads == sorted(spreads, reverse=True)


def test_everything_has_changed_after_four_fifths_of_the_schedule():
    schedule = BootstrapSchedule(n_steps=100)
    assert schedule.progress(40) == 0.5
    assert schedule.progress(80) == schedule.progress(100) == 1
    assert schedule.spread(40) == pytest.approx(8)
    assert schedule.radius(79) == schedule.radius(80) == 16


@pytest.mark.parametrize("spread", [2.0, 8.0, 32.0])
def test_tempered_weights_reach_the_effective_number_of_candidates(spread):
    scores = (40 * torch.randn(50, 128)).sort(dim=1, descending=True).values
    candidates = candidates_with(scores - 1000)
    with unchanged(candidates):
        weights = tempered_weights(candidates, spread)
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    # A posterior that is broader by itself stays so.
    wanted = (1 / torch.softmax(scores, dim=1).square().sum(1)).clamp_min(spread)
    torch.testing.assert_close(1 / weights.square().sum(1), wanted, rtol=1e-2, atol=0)
    assert (weights.diff(dim=1) <= 0).all()


def test_a_posterior_that_is_broad_enough_is_not_tempered():
    scores = (0.1 * torch.randn(20, 64)).sort(dim=1, descending=True).values
    torch.testing.assert_close(tempered_weights(candidates_with(scores), 4.0), torch.softmax(scores, dim=1))


def test_a_spread_of_one_leaves_the_posterior_as_it_is():
    scores = (3 * torch.randn(20, 64)).sort(dim=1, descending=True).values
    torch.testing.assert_close(tempered_weights(candidates_with(scores), 1.0), torch.softmax(scores, dim=1))


@pytest.mark.parametrize(("last_radius", "n_pixels", "box"), [(16, 64, 40), (16, 32, 32), (8, 24, 24), (4, 65, 16)])
def test_the_search_box_is_a_little_wider_than_the_band_and_no_wider_than_the_images(last_radius, n_pixels, box):
    assert search_box(last_radius, n_pixels) == box


def test_a_reference_on_another_grid_is_the_same_reference(phantom):
    noise = NoiseSpectrum(torch.ones(7))
    reference = Reference(phantom.density(24).float(), 6, noise)
    finer = reference.at_box(32)
    points = torch.randn(50, 3)
    points = 6 * torch.rand(50, 1) * points / points.norm(dim=1, keepdim=True)
    exact = phantom.transform(points / 24, 24)
    for found, n in ((reference, 24), (finer, 32)):
        values, gradients = found.sampled().with_gradient(points / n)
        assert (values - exact).norm() < 1e-2 * exact.norm()
        assert gradients.shape == (50, 3)
    assert reference.sampled(3).lattice.max_radius == 3
    assert reference.sampled(100).lattice.max_radius == 6


@pytest.mark.parametrize("n", [24, 25])
def test_a_step_of_the_search_leaves_the_map_positive_and_its_mass_at_the_centre(phantom, tmp_path, n):
    disc = FourierDisc.of_box(n)
    image = disc.from_images(phantom.projection(n, torch.eye(3), (4.0, -3.0)).float())
    path = tmp_path / "particles"
    np.asarray(torch.view_as_real(image)[None].numpy(), dtype=np.float16).tofile(path)
    particles = PreparedParticles(
        path, disc, make_optics(1), 3.0, ContrastSign(1, 9.0), disc.n_coefficients(), torch.arange(1), ()
    )
    schedule = BootstrapSchedule(n_steps=2, batch_size=2, first_radius=4, last_radius=4, n_rotations=100)
    search = StochasticSearch(particles, torch.zeros(1, dtype=torch.long), schedule, torch.Generator().manual_seed(1))
    while not search.finished:
        search.step()
        assert (search.density >= 0).all()
        for axis in range(3):
            profile = search.density.double().sum(dim=[a for a in range(3) if a != axis])
            assert abs((profile * positions(n)).sum() / profile.sum()) <= 0.5 + 1e-3
    assert isinstance(search.reference().sampled(), SampledVolume)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_search_with_both_signs_finds_the_contrast_against_wrong_statistics(tmp_path, sign):
    made = simulate(
        protein_like_phantom(1), tmp_path, n_particles=300, n_pixels=32, pixel_size_in_angstroms=7.0, snr=0.5, seed=1
    )
    particles = prepare_particles(ParticleStack.open(made.particles), 32, tmp_path / "c.f16", sign=1)
    images = replace(particles, contrast=ContrastSign(-1, -3.0)) if sign < 0 else particles
    # What is taken for the sign of the images so far has no influence.
    found = contrast_by_search(images, torch.Generator().manual_seed(0))
    assert found.sign == 1
    assert found.search_z_score > 10
    assert found.z_score == images.contrast.z_score


def test_the_contrast_of_dark_particles_is_found_by_search(tmp_path):
    made = simulate(
        protein_like_phantom(1), tmp_path, n_particles=300, n_pixels=32, pixel_size_in_angstroms=7.0, snr=0.5, seed=1
    )
    np.memmap(tmp_path / "particles.mrcs", np.float32, "r+", offset=1024)[:] *= -1
    particles = prepare_particles(ParticleStack.open(made.particles), 32, tmp_path / "c.f16", sign=1)
    found = contrast_by_search(particles, torch.Generator().manual_seed(0))
    assert (found.sign, found.search_z_score < -10) == (-1, True)


def test_statistics_are_clear_where_neither_chance_nor_a_slight_gradient_explains_them():
    assert ContrastSign(1, 9.0).is_clear(100)
    assert ContrastSign(-1, -100.0).is_clear(10_000)
    assert not ContrastSign(1, 7.0).is_clear(100)
    assert not ContrastSign(1, 40.0).is_clear(10_000)
