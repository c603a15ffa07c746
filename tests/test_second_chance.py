"""Particles that were placed wrongly are found again, and those that were placed rightly stay."""

import pytest
import torch

from cryoai.bootstrap import BootstrapSchedule
from cryoai.noise import NoiseSpectrum
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.second_chance import SearchPlan, SecondChance
from cryoai.symmetry.averaging import symmetrized_map
from cryoai.symmetry.groups import PointGroup
from cryoai.training.stages import Refinement, trial_poses
from oracles import random_rotations
from posed_particles import (
    BOX,
    NOISE,
    clean_images,
    finish,
    noisy,
    off_by,
    particles_of,
    placed_estimate,
    protein,
    random_poses,
    reference_of,
)
from properties import unchanged

N = 120
HALF_SET = torch.arange(N) % 2
LOST = torch.arange(N) % 6 == 0
SCHEDULE = BootstrapSchedule(n_rotations=4608, shift_step_in_boxes=0.03, n_shift_steps=2)
NO_SYMMETRY = PointGroup.named("C1")


def errors(poses, truth):
    return angular_distance_in_degrees(poses.rotations, truth.rotations)


def with_some_lost(truth):
    """Poses of which a sixth, in both halves, are anywhere."""
    guesses = random_rotations(N, seed=99).float()
    near = off_by(truth, 2.0, angstroms=1.0)
    return Poses(torch.where(LOST[:, None, None], guesses, near.rotations), near.shifts_in_angstroms)


# ------------------------------------------------------------------------------ one search


@pytest.fixture
def truth():
    return random_poses(N)


@pytest.fixture
def search(truth, tmp_path):
    """Against the true map, of particles whose noise is known."""
    particles = particles_of(noisy(clean_images(protein(), truth)), tmp_path / "images")
    return SecondChance.against(
        protein(),
        particles,
        NoiseSpectrum(torch.full((BOX // 2 + 1,), NOISE**2)),
        trial_poses(particles, SCHEDULE, 4608),
        max_radius=14,
        search_radius=10,
    )


def test_a_search_from_nothing_finds_the_pose_of_nearly_every_particle(search, truth):
    rows = torch.arange(N)
    with unchanged(search.noise, search.volume, search.low_volume):
        found = search(rows, 2)
    assert (errors(found.poses, truth) < 3).float().mean() > 0.95
    shifts = (found.poses.shifts_in_angstroms - truth.shifts_in_angstroms).norm(dim=1)
    assert shifts.median() < 1.0
    # What it says of its poses is what a judge of given poses says of them.
    judged = search.judge(rows, found.poses)
    torch.testing.assert_close(judged.log_likelihoods, found.log_likelihoods, rtol=1e-4, atol=0.1)


def test_the_likelihood_is_that_of_the_images_up_to_the_band_limit(search, truth):
    rows = torch.tensor([5, 3, 80])
    judged = search.judge(rows, truth[rows])
    imaging = search.particles.imaging(14)
    batch = search.particles.batch(rows, 14)
    residuals = batch.coefficients - imaging.predict(search.volume, truth[rows], batch.optics)
    expected = -(residuals.abs().square() / NOISE**2)[:, imaging.shells > 0].sum(1)
    torch.testing.assert_close(judged.log_likelihoods, expected)
    # Each coefficient of the noise misses by one deviation.
    assert float(expected.mean()) == pytest.approx(-int((imaging.shells > 0).sum()), rel=0.1)


def test_only_what_is_likelier_moves(search, truth):
    """The right poses are as likely as any to be found; the wrong ones are not."""
    rows = torch.arange(N)
    poses = with_some_lost(truth)
    had = search.judge(rows, poses)
    best = had.better_of(search(rows, 2))
    assert (best.log_likelihoods >= had.log_likelihoods).all()
    assert (errors(best.poses, truth)[LOST] < 3).float().mean() > 0.9
    assert (errors(best.poses, truth)[~LOST] < 3).float().mean() > 0.98


def test_the_order_and_the_company_of_the_particles_change_nothing(search):
    together = search(torch.tensor([3, 40, 7]), 1)
    alone = search(torch.tensor([7]), 1)
    assert angular_distance_in_degrees(together.poses.rotations[2:], alone.poses.rotations).max() < 0.1


# ------------------------------------------------------------------------------ as part of a refinement


def refined(tmp_path, truth, start, plans, density=None, group=NO_SYMMETRY, max_rounds=2):
    density = protein() if density is None else density
    particles = particles_of(noisy(clean_images(density, truth)), tmp_path / "images")
    estimate = placed_estimate(particles, start, HALF_SET, reference_of(density))
    searches = [
        SearchPlan(after, 12, trial_poses(particles, SCHEDULE, n), worst_share=share) for after, n, share in plans
    ]
    stage = Refinement(particles, estimate, HALF_SET, searches, group, max_rounds=max_rounds, n_iterations=2)
    metrics = finish(stage)
    return stage, metrics


# Of those that are searched for only if they fit worse than two deviations below the usual, some fit better.
@pytest.mark.parametrize(("plan", "found_again"), [((1, 4608, None), 0.95), ((1, 4608, 0.4), 0.7)])
def test_lost_particles_are_found_again_and_the_others_are_left_alone(tmp_path, truth, plan, found_again):
    start = with_some_lost(truth)
    stage, metrics = refined(tmp_path, truth, start, [plan])
    found = errors(stage.result().particles.poses, truth)
    lost_for_good, _ = refined(tmp_path, truth, start, [])
    assert (errors(lost_for_good.result().particles.poses, truth)[LOST] > 20).float().mean() > 0.8
    # The maps are of sixty images.
    assert (found[LOST] < 8).float().mean() >= found_again
    assert (found[~LOST] < 8).float().mean() > 0.98
    assert found_again * int(LOST.sum()) - 1 <= metrics.moved_by_it <= int(LOST.sum()) + 3
    n_searched = N if plan[2] is None else metrics.given_a_second_chance
    assert metrics.given_a_second_chance == n_searched
    # Of a set smaller than the sample that tells who is doubtful, all are searched for.
    assert plan[2] is None or found_again * int(LOST.sum()) <= n_searched <= 0.4 * N + 1
    assert f"{metrics.moved_by_it:,} found elsewhere" in metrics.headline


@pytest.mark.parametrize("plan", [(1, 4608, None), (1, 4608, 0.2)])
def test_where_nobody_was_lost_nobody_is_moved_far(tmp_path, truth, plan):
    stage, metrics = refined(tmp_path, truth, off_by(truth, 2.0, angstroms=1.0), [plan])
    assert metrics.moved_by_it <= 2
    assert (errors(stage.result().particles.poses, truth) < 5).float().mean() > 0.98


def test_a_sample_tells_for_whom_it_is_worth_while_to_search(tmp_path, truth, monkeypatch):
    monkeypatch.setattr("cryoai.training.stages.rounds._PILOT", 40)
    stage, metrics = refined(tmp_path, truth, with_some_lost(truth), [(1, 4608, None)])
    assert int(LOST.sum()) + 20 < metrics.given_a_second_chance < N
    assert (errors(stage.result().particles.poses, truth)[LOST] < 8).float().mean() > 0.9


def test_equivalent_poses_of_a_symmetric_molecule_are_no_other_answer(tmp_path, truth):
    group = PointGroup.named("C3")
    density = symmetrized_map(protein(), group)
    turned = group.operators[torch.arange(N) % 3] @ truth.rotations
    start = off_by(Poses(turned, truth.shifts_in_angstroms), 2.0, angstroms=1.0)
    _, metrics = refined(tmp_path, truth, start, [(1, 4608, None)], density, group)
    assert metrics.given_a_second_chance == N
    assert metrics.moved_by_it <= 4


def test_a_search_that_comes_after_the_last_round_is_not_made(tmp_path, truth):
    _, metrics = refined(tmp_path, truth, off_by(truth, 2.0), [(5, 600, None)])
    assert metrics.given_a_second_chance == 0
    assert "searched" not in metrics.headline
