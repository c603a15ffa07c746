"""Refinement and Completion stopped between any two steps and made anew: the same result, to the last bit."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cryoai.bootstrap import BootstrapSchedule, Reference
from cryoai.encoder import PolarEncoder
from cryoai.formats.snapshots import read_snapshot, write_snapshot
from cryoai.half_maps import HalfMaps
from cryoai.model import CryoAI
from cryoai.particle_stack import ParticleStack
from cryoai.particles import prepare_particles
from cryoai.pose_files import read_poses
from cryoai.poses import Poses
from cryoai.second_chance import SearchPlan
from cryoai.simulation import protein_like_phantom, simulate
from cryoai.symmetry.averaging import symmetrized_map
from cryoai.symmetry.groups import PointGroup
from cryoai.training.stages import BlockPosing, Completion, Estimate, Refinement, trial_poses
from cryoai.training.stages.base import half_sets_at
from cryoai.training.stages.blocks import BlockRefinementState
from cryoai.training.stages.placement import PlacementState
from cryoai.training.stages.rounds import JudgementState, PassState, SecondSearchState
from cryoai.volumes import VoxelVolume
from oracles import random_rotations
from posed_particles import (
    BOX,
    PIXEL,
    RADIUS,
    clean_images,
    noisy,
    off_by,
    particles_of,
    placed,
    placed_estimate,
    protein,
    random_poses,
    reference_of,
)
from stacks import refusal

SCHEDULE = BootstrapSchedule(last_radius=RADIUS, n_rotations=600, shift_step_in_boxes=0.03, n_shift_steps=1)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr("cryoai.training.stages.base._CHUNK", 16)
    monkeypatch.setattr("cryoai.training.stages.rounds._PILOT", 20)


def bits(value):
    """All that is in a tree of dataclasses, to the last bit."""
    if dataclasses.is_dataclass(value):
        return {field.name: bits(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [bits(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.shape, value.numpy().tobytes()
    return value


def stored(state, folder):
    """The state as it comes back from the disk."""
    write_snapshot(folder / "state.safetensors", state)
    return read_snapshot(folder / "state.safetensors")


def uninterrupted(make):
    """The result, and what every step reported."""
    stage, reports = make(), []
    while not stage.finished:
        reports.append(stage.step())
    return bits(stage.result()), reports


def stopped_after(make, n_steps, folder):
    """The result of a stage that was made anew after so many steps."""
    first = make()
    for _ in range(n_steps):
        first.step()
    state, progress = stored(first.state(), folder), first.progress
    # What it does from now on is lost.
    if not first.finished:
        first.step()
    stage = make()
    stage.restore(state)
    assert stage.progress == progress
    return uninterrupted(lambda: stage)[0]


def stopped_after_every_step(make, folder):
    """The result of a stage that was made anew before every step and at the end, the reports, and the states."""
    stage, reports, states = make(), [], []
    while True:
        states.append(stored(stage.state(), folder))
        stage = make()
        stage.restore(stored(states[-1], folder))
        if stage.finished:
            return bits(stage.result()), reports, states
        reports.append(stage.step())


# ------------------------------------------------------------------------------ refinement


N = 60
HALF_SET = (torch.arange(N) * 7 % 12 >= 7).long()
C3 = PointGroup.named("C3")


@pytest.fixture
def refinement(tmp_path):
    """Makes one with two searches, a symmetry, and defocus to be refined."""
    truth = random_poses(N)
    lost, near = torch.arange(N) % 5 == 0, off_by(truth, 4.0)
    guesses = torch.where(lost[:, None, None], random_rotations(N, 99).float(), near.rotations)
    density = symmetrized_map(protein(), C3)
    particles = particles_of(noisy(clean_images(density, truth)), tmp_path / "images")
    start = Poses(guesses, near.shifts_in_angstroms)
    estimate = placed_estimate(particles, start, HALF_SET, reference_of(density))
    trials = trial_poses(particles, SCHEDULE, 600)
    searches = [SearchPlan(1, 8, trials, worst_share=None), SearchPlan(2, 10, trials, worst_share=0.4)]

    def make():
        return Refinement(
            particles,
            estimate,
            HALF_SET,
            searches,
            C3,
            max_rounds=3,
            n_iterations=1,
            defocus_std_in_angstroms=300.0,
        )

    return make


def test_refinement_goes_on_after_any_step_as_if_nothing_had_happened(refinement, tmp_path):
    expected, expected_reports = uninterrupted(refinement)
    found, reports, states = stopped_after_every_step(refinement, tmp_path)
    assert found == expected
    assert reports == expected_reports
    # It was stopped in every part of every round, and within a sample as well as beyond it.
    passes, searches = (
        {(s.round.number, s.part.n_chunks_done) for s in states if isinstance(s.part, kind)}
        for kind in (PassState, SecondSearchState)
    )
    assert passes == {(number, n_done) for number in (0, 1, 2) for n_done in range(5)}
    n_of_sample = 2
    assert {(1, n_done) for n_done in range(n_of_sample + 2)} | {(2, 0)} <= searches
    assert isinstance(states[-1].part, JudgementState)
    assert 20 < reports[-1].given_a_second_chance < 2 * N
    assert reports[-1].moved_by_it > 5
    for n_steps in (0, len(reports) // 2, len(reports)):
        assert stopped_after(refinement, n_steps, tmp_path) == expected


# ------------------------------------------------------------------------------ completion


N_TRAINED, N_LEFT = 40, 100
# In the first of three blocks, and all but two of the second.
FAULTY = [45, *range(80, 120)]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Particles of which some images are of no use."""
    folder = tmp_path_factory.mktemp("particles")
    options = {"n_pixels": BOX, "pixel_size_in_angstroms": PIXEL, "shift_standard_deviation_in_angstroms": 4.0}
    made = simulate(protein_like_phantom(0), folder, n_particles=N_TRAINED + N_LEFT, snr=1.0, seed=0, **options)
    spoil(made, FAULTY)
    return made


def spoil(made, rows, value=np.nan):
    images = np.memmap(made.particles.with_suffix(".mrcs"), np.float32, "r+", offset=1024)
    images.reshape(-1, BOX, BOX)[rows, 3, 5] = value
    images.flush()


@pytest.fixture
def completion(simulated, tmp_path):
    """Makes one, of a run that ended with right poses; and what it began with."""
    stack = ParticleStack.open(simulated.particles)
    truth, half_set = read_poses(simulated.truth), torch.arange(N_TRAINED + N_LEFT) % 2
    rows = torch.arange(N_TRAINED)
    trained = prepare_particles(stack.take(rows), BOX, tmp_path / "images", sign=1)
    sets = half_sets_at(truth[rows], trained, half_set[rows])
    half_maps, noise = HalfMaps.of(sets, PIXEL), trained.power(rows, BOX // 2)
    encoder = PolarEncoder(trained.disc, RADIUS, n_hypotheses=2, max_shift_in_angstroms=10.0, width=4)
    model = CryoAI(encoder, VoxelVolume(torch.zeros(BOX, BOX, BOX)), trained.imaging(RADIUS)).eval()
    estimate = Estimate(
        reference=Reference(half_maps.combined(sets), RADIUS, noise),
        model=model,
        particles=placed(truth[rows], truth[rows]),
        half_sets=sets,
        half_maps=half_maps,
        noise=noise,
    ).among(rows, N_TRAINED + N_LEFT)

    def make(max_faulty_share=0.5):
        trials = trial_poses(trained, SCHEDULE, 600)
        posing = BlockPosing(
            estimate, trained, trials, PointGroup.named("C1"), n_placement_iterations=1, n_iterations=1
        )
        left = torch.arange(N_TRAINED, N_TRAINED + N_LEFT)
        scratch = tmp_path / "block"
        return Completion(stack, left, trained, estimate, half_set, posing, scratch, max_faulty_share=max_faulty_share)

    return SimpleNamespace(make=make, estimate=estimate, truth=truth)


def test_completion_goes_on_after_any_step_as_if_nothing_had_happened(completion, tmp_path):
    make = completion.make
    known = completion.estimate.particles, completion.estimate.half_sets
    before = bits(known)
    expected, expected_reports = uninterrupted(make)
    found, reports, states = stopped_after_every_step(make, tmp_path)
    assert found == expected
    assert reports == expected_reports
    for n_steps in (0, len(reports) // 2, len(reports)):
        assert stopped_after(make, n_steps, tmp_path) == expected
    assert bits(known) == before
    assert {state.n_blocks_done for state in states} == {0, 1, 2, 3}
    for kind in (type(None), PlacementState, BlockRefinementState):
        assert {0, 2} <= {state.n_blocks_done for state in states if isinstance(state.posing, kind)}


def test_what_cannot_be_used_is_noted_and_the_others_are_posed(completion):
    stage = completion.make()
    while not stage.finished:
        last = stage.step()
    result = stage.result()
    assert [fault.row for fault in result.faults] == FAULTY
    assert last.n_done == N_LEFT
    posed = torch.ones(N_TRAINED + N_LEFT, dtype=torch.bool)
    posed[:N_TRAINED] = posed[FAULTY] = False
    assert torch.equal(~result.particles.fit.z_scores.isnan(), posed)
    again = dataclasses.replace(completion.estimate, faults=result.faults[:1])
    stage.estimate = again
    assert stage.result().faults == (result.faults[0], *result.faults)


def test_too_many_images_without_use_are_refused_over_all_blocks(completion, simulated):
    """In no block by itself are there more than are tolerated of the particles that were left."""
    assert uninterrupted(lambda: completion.make(0.41))[1]
    stage = completion.make(0.405)
    message = refusal(uninterrupted, lambda: stage)
    assert message.startswith(f"{simulated.particles}: too many images cannot be used: row 46 (")
    assert "and 36 more so far; 40.5% of 100 are tolerated" in message
    # The first block was done.
    assert stage.n_blocks_done == 1


def test_a_block_of_which_other_images_can_be_used_by_now_begins_again(completion, simulated, tmp_path):
    stage = completion.make()
    for _ in range(3):
        stage.step()
    state = stored(stage.state(), tmp_path)
    assert state.posing.n_chunks_done == 2
    assert len(state.rows) == N_TRAINED - 1
    try:
        spoil(simulated, FAULTY[0], 0.0)
        expected, _ = uninterrupted(completion.make)
        stage = completion.make()
        stage.restore(state)
        found, _ = uninterrupted(lambda: stage)
    finally:
        spoil(simulated, FAULTY[0])
    assert found == expected
    assert len(expected["faults"]) == len(FAULTY) - 1
