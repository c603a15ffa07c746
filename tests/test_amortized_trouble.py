"""Training that meets what is no number, and training without enough memory."""

import math

import numpy as np
import pytest
import torch

from cryoai.errors import RunFailedError
from cryoai.formats.snapshots import read_snapshot, write_snapshot
from cryoai.imaging import ImagingModel
from cryoai.model import CryoAI
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles
from cryoai.simulation import protein_like_phantom, simulate
from cryoai.training.loop import reconstruct
from cryoai.training.resuming import resume
from cryoai.training.settings import Settings
from cryoai.training.stages import Contest
from killing import killed_at
from small_training import N, make_model, make_stage, noisy_images, reference_of, stored


@pytest.fixture
def particles(phantom, tmp_path):
    return stored(noisy_images(phantom, tmp_path / "none"), tmp_path / "images")


@pytest.fixture
def reference(phantom):
    return reference_of(phantom)


def write_into(particles, row, value):
    """Change the first coefficients of a prepared image to what is no number."""
    values = np.memmap(particles.path, dtype=np.float16, mode="r+").reshape(N, -1)
    values[row, :20] = value
    values.flush()


def new_stage(particles, reference=None, kind="polar", **options):
    """A stage with the same weights and random numbers every time."""
    torch.manual_seed(5)
    return make_stage(particles, make_model(particles, kind=kind), reference, **options)


def finished(stage):
    """What the stage reported until it was finished."""
    metrics = []
    while not stage.finished:
        metrics.append(stage.step())
    return metrics


def notes_of(metrics):
    return [note for m in metrics for note in m.notes]


def weights_of(stage):
    return {name: p.detach().clone() for name, p in stage.model.state_dict().items()}


def is_same(stage, other):
    mine, theirs = weights_of(stage), weights_of(other)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def all_finite(stage):
    return all(value.isfinite().all() for value in stage.model.state_dict().values())


# ------------------------------------------------------------------------------ images to blame


@pytest.mark.parametrize("kind", ["polar", "convolutional"])
def test_images_that_are_no_numbers_are_found_named_and_drawn_no_more(particles, monkeypatch, kind):
    stage = new_stage(particles, kind=kind, n_steps=12)
    write_into(particles, 7, np.inf)
    write_into(particles, 30, np.nan)
    drawn, read = [], PreparedParticles.batch

    def batch(self, rows, max_radius=None):
        drawn.append(rows)
        return read(self, rows, max_radius)

    monkeypatch.setattr(PreparedParticles, "batch", batch)
    metrics = finished(stage)
    (note,) = notes_of(metrics)
    at = next(i for i, m in enumerate(metrics) if m.notes)
    assert note.text.endswith("working box: 8, 31")
    assert "\n" not in note.text
    assert math.isnan(metrics[at].wake_loss)
    # The beginning, and all twelve steps from there.
    assert metrics[at].step == 0
    assert len(metrics) == at + 1 + 12
    assert all(math.isfinite(m.wake_loss) for m in metrics[at + 1 :])
    assert stage.slowdown == 1
    assert stage.n_returns == 0
    assert all_finite(stage)
    assert not torch.isin(torch.cat(drawn[-12:]), torch.tensor([7, 30])).any()
    # One of the two was in the batch; alone it is the only one without a loss.
    assert note.batch.step == at + 1
    assert note.batch.culprits.tolist() == [7, 30]
    bad = torch.isin(note.batch.rows, note.batch.culprits)
    assert 1 <= bad.sum() <= 2
    assert torch.equal(~note.batch.losses.isfinite(), bad)


def with_a_slope_beyond_all_numbers(row):
    judge = CryoAI.judge

    def judged(self, batch, *given):
        reading = judge(self, batch, *given)
        here = (batch.indices == row).nonzero().flatten()
        # Zero, with an infinite derivative.
        nothing = (reading.loss - reading.loss.detach())[here].sqrt()
        return type(reading)(reading.poses, reading.hypothesis, reading.loss.index_add(0, here, nothing))

    return judged


def test_an_image_whose_loss_is_finite_and_whose_gradient_is_not_is_found_too(particles, reference, monkeypatch):
    monkeypatch.setattr(CryoAI, "judge", with_a_slope_beyond_all_numbers(12))
    stage = new_stage(particles, reference, n_steps=12)
    (note,) = notes_of(finished(stage))
    assert note.batch.culprits.tolist() == [12]
    assert note.batch.losses.isfinite().all()
    assert all_finite(stage)


def test_what_is_left_out_stays_out_of_a_stage_that_is_taken_up_again(particles, reference, tmp_path, monkeypatch):
    monkeypatch.setattr("cryoai.training.stages.amortized._KEPT_EVERY", 3)
    whole = new_stage(particles, reference, n_steps=12)
    stages = [new_stage(particles, reference, n_steps=12) for _ in range(6)]
    write_into(particles, 7, np.nan)
    n_steps = len(finished(whole))
    assert whole.left_out.tolist() == [7]
    for n_before in (1, n_steps // 2, n_steps - 1):
        first, second = stages.pop(), stages.pop()
        for _ in range(n_before):
            first.step()
        path = tmp_path / "state.safetensors"
        write_snapshot(path, (first.state(), first.generator.get_state()))
        state, generator = read_snapshot(path)
        second.restore(state)
        second.generator.set_state(generator)
        finished(second)
        assert is_same(second, whole)
        assert second.left_out.tolist() == [7]


# ------------------------------------------------------------------------------ weights to blame


def spoil(stage, at):
    """Make the weights no numbers after some of the steps of the optimizer, counted from 1."""
    n = 0

    def spoiled(*_):
        nonlocal n
        n += 1
        if n in at:
            with torch.no_grad():
                next(stage.model.encoder.parameters()).fill_(torch.nan)

    stage.optimizer.register_step_post_hook(spoiled)


def test_weights_that_are_no_numbers_are_those_of_earlier_again_and_learn_at_half_the_rate(
    particles, reference, monkeypatch
):
    monkeypatch.setattr("cryoai.training.stages.amortized._KEPT_EVERY", 3)
    stage, undisturbed = (new_stage(particles, reference, n_steps=12, first_radius=4) for _ in range(2))
    spoil(stage, {5})
    for _ in range(3):
        undisturbed.step()
    metrics = [stage.step() for _ in range(6)]
    (note,) = notes_of(metrics)
    assert metrics[-1].step == stage.steps_done == 3
    assert "step 6 is not finite; back to step 3; no image is to blame" in note.text
    assert len(note.batch.culprits) == 0
    assert is_same(stage, undisturbed)
    rates = [group["lr"] for group in stage.optimizer.param_groups]
    assert rates == pytest.approx([group["lr"] / 2 for group in undisturbed.optimizer.param_groups])
    assert len(finished(stage)) == 9
    assert all_finite(stage)
    last = stage.schedule.base_lrs[0] * stage._learning_rate_factor(12)
    assert stage.optimizer.param_groups[0]["lr"] == pytest.approx(last)
    assert stage._learning_rate_factor(12) == undisturbed._learning_rate_factor(12) / 2


def test_weights_that_never_stay_numbers_end_the_run_with_its_reason(particles):
    stage = new_stage(particles)
    spoil(stage, range(1, 100))
    assert [len(stage.step().notes) for _ in range(7)] == [0, 1, 0, 1, 0, 1, 0]
    with pytest.raises(RunFailedError, match="is not finite, after 3 returns") as caught:
        stage.step()
    assert "\n" not in str(caught.value)
    assert stage.slowdown == 1 / 8


def test_a_fit_of_the_volume_that_is_no_number_begins_again_at_half_the_rate(particles, reference, monkeypatch):
    stage = new_stage(particles, reference, n_fit_steps=6)
    fit, n = stage._fit, 0

    def broken():
        nonlocal n
        n += 1
        error = fit()
        if n != 4:
            return error
        with torch.no_grad():
            next(stage.model.volume.parameters()).fill_(torch.nan)
        return math.nan

    monkeypatch.setattr(stage, "_fit", broken)
    metrics = finished(stage)
    (_,) = notes_of(metrics)
    assert len(metrics) == 4 + 6 + 4
    assert n == 10
    assert stage.fit_optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-4)
    assert all_finite(stage)


def test_a_start_that_went_back_is_judged_by_the_steps_that_count(particles, monkeypatch):
    monkeypatch.setattr("cryoai.training.stages.amortized._KEPT_EVERY", 2)
    stages = [new_stage(particles, n_steps=20) for _ in range(2)]
    contest = Contest([lambda stage=stage: stage for stage in stages])
    spoil(stages[0], {3})
    losses = []
    while stages[0].steps_done < 3 or not stages[0].slowdown < 1:
        losses.append(contest.step().wake_loss)
    assert len(contest.state().wake_losses) - np.isnan(contest.state().wake_losses).sum() == stages[0].steps_done
    while not contest.finished:
        contest.step()
    assert all(map(math.isfinite, contest.losses))


# ------------------------------------------------------------------------------ memory


def no_room(kind):
    if kind == "gpu":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")


def with_room_for(n, monkeypatch, kind="gpu"):
    """Let no more images than that be predicted at once; returns the sizes that were asked for."""
    predict, asked = ImagingModel.predict, []

    def limited(self, volume, poses, optics):
        asked.append(len(poses.rotations))
        if len(poses.rotations) > n:
            raise no_room(kind)
        return predict(self, volume, poses, optics)

    monkeypatch.setattr(ImagingModel, "predict", limited)
    return asked


@pytest.mark.parametrize(
    ("kind", "encoder", "n_wake", "n_sleep"),
    [("gpu", "polar", 8, 8), ("cpu", "polar", 7, 0), ("gpu", "convolutional", 4, 10)],
)
def test_where_memory_is_short_the_same_steps_are_made_in_parts(
    particles, reference, monkeypatch, kind, encoder, n_wake, n_sleep
):
    options = {"wake_batch_size": n_wake, "sleep_batch_size": n_sleep, "wake_interval": 2, "kind": encoder}
    whole, parts = (new_stage(particles, reference, **options) for _ in range(2))
    expected = finished(whole)
    asked = with_room_for(3, monkeypatch, kind)
    found = finished(parts)
    (note,) = notes_of(found)
    assert found[0].notes == (note,)
    assert f"in {parts.n_parts} parts" in note.text
    assert note.batch is None
    assert parts.n_parts == 4
    # What did not fit was not tried again.
    assert sum(n > 3 for n in asked) == 2
    assert torch.equal(parts.generator.get_state(), whole.generator.get_state())
    # The first step is that of the whole batch; Adam makes much of how the gradients of the first are rounded.
    for mine, theirs, precision in zip(found, expected, (1e-5, 0.05, 0.05, 0.05), strict=True):
        assert mine.wake_loss == pytest.approx(theirs.wake_loss, rel=precision, nan_ok=True)
        assert mine.sleep_loss == pytest.approx(theirs.sleep_loss, rel=precision, nan_ok=True)


def test_a_step_that_is_made_again_leaves_the_statistics_of_a_single_one(particles, reference, monkeypatch):
    whole, parts = (new_stage(particles, reference, kind="convolutional") for _ in range(2))
    whole._descend_within_memory(awake=True)
    with_room_for(3, monkeypatch)
    parts._descend_within_memory(awake=True)
    assert len(parts.statistics) > 9
    for mine, theirs in zip(parts.statistics, whole.statistics, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encoder", ["polar", "convolutional"])
def test_the_gradient_is_the_same_in_any_number_of_parts(particles, reference, encoder):
    gradients = []
    for n_parts in (1, 2, 3, 8, 100):
        stage = new_stage(particles, reference, kind=encoder)
        stage.n_parts = n_parts
        stage._descend(awake=True)
        gradients.append(torch.cat([p.grad.flatten() for p in stage.model.parameters()]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_a_stage_that_is_taken_up_again_knows_how_much_there_is_room_for(particles, reference, monkeypatch):
    stage, again = (new_stage(particles, reference) for _ in range(2))
    asked = with_room_for(3, monkeypatch)
    stage.step()
    again.restore(stage.state())
    del asked[:]
    assert again.step().notes == ()
    assert max(asked) <= 3


def test_without_room_for_one_image_training_ends_with_its_reason(particles, reference, monkeypatch):
    stage = new_stage(particles, reference)
    asked = with_room_for(0, monkeypatch)
    with pytest.raises(MemoryError, match="not even one image at a time fits"):
        stage.step()
    assert asked == [8, 4, 2, 1]


def test_other_errors_are_not_taken_for_want_of_memory(particles, reference, monkeypatch):
    stage = new_stage(particles, reference)
    monkeypatch.setattr(stage.model, "propose", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        stage.step()
    assert stage.n_parts == 1


# ------------------------------------------------------------------------------ in a run

QUICK = {
    "device": "cpu",
    "checkpoint_seconds": 0,
    "stages": ("amortized",),
    "amortized": {
        "n_steps": 8,
        "wake_interval": 2,
        "wake_batch_size": 4,
        "sleep_batch_size": 4,
        "encoder_width": 4,
        "n_hypotheses": 2,
        "volume_width": 16,
    },
    "placement": {"n_rotations": 600, "n_iterations": 0},
    "refinement": {"max_rounds": 1, "n_iterations": 1},
}


@pytest.fixture
def stack(tmp_path):
    options = {"n_pixels": 32, "pixel_size_in_angstroms": 7.0, "shift_standard_deviation_in_angstroms": 5.0}
    made = simulate(protein_like_phantom(0), tmp_path, n_particles=120, snr=1.0, seed=0, **options)
    return ParticleStack.open(made.particles)


@pytest.mark.slow
def test_a_run_tells_of_it_keeps_the_batch_and_goes_on_to_the_same_result_when_it_is_killed(
    stack, tmp_path, monkeypatch
):
    judge = CryoAI.judge

    def judged(self, batch, *given):
        """Every seventh image has no loss."""
        reading = judge(self, batch, *given)
        loss = torch.where(batch.indices % 7 == 0, torch.nan, reading.loss)
        return type(reading)(reading.poses, reading.hypothesis, loss)

    monkeypatch.setattr(CryoAI, "judge", judged)
    settings = Settings.assemble("auto", None, QUICK)
    whole = reconstruct(stack, tmp_path / "whole", settings)
    log = whole.run.log.read_text(encoding="utf-8")
    path = whole.run.path / "non_finite_batch.safetensors"
    assert log.count("is not finite; back to step 0; left out of training") >= 1
    assert str(path) in log
    kept = read_snapshot(path)
    assert (kept.culprits % 7 == 0).all()
    assert len(kept.culprits)
    run = tmp_path / "killed"
    killed_at(6, lambda: reconstruct(stack, run, settings))
    assert torch.equal(resume(run).map, whole.map)
