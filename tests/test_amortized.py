import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from cryoai.model import matched_filter, unfiltered
from cryoai.training.stages.amortized import parameter_groups
from cryoai.training.stages.amortized_state import AmortizedMetrics
from cryoai.volumes import SampledVolume
from small_training import BOX, NOISE, RADIUS, N, make_model, make_stage, noisy_images, reference_of, stored


@pytest.fixture
def images(phantom, tmp_path):
    return noisy_images(phantom, tmp_path / "none")


@pytest.fixture
def particles(images, tmp_path):
    return stored(images, tmp_path / "images")


@pytest.fixture
def reference(phantom):
    return reference_of(phantom)


def copied(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def unmoved(module, before):
    return all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def feeds_a_batch_norm(model):
    """Names of the biases that BatchNorm subtracts again: their gradient is rounding noise."""
    names = set()
    for prefix, module in model.named_modules():
        children = list(module.named_children()) if isinstance(module, nn.Sequential) else []
        for (name, child), (_, following) in itertools.pairwise(children):
            if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                names.add(f"{prefix}.{name}.bias")
    return names


def test_every_parameter_of_the_model_is_in_exactly_one_group(particles):
    model = make_model(particles)
    encoder, volume = parameter_groups(model, 1e-3, 1e-4)
    grouped = [id(p) for group in (encoder, volume) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    assert (encoder["lr"], volume["lr"]) == (1e-3, 1e-4)
    assert {id(p) for p in volume["params"]} == {id(p) for p in model.volume.parameters()}


@pytest.mark.parametrize(
    ("kind", "symmetrization", "n_without_effect"),
    [
        ("polar", "none", 0),
        ("polar", "half-turn", 0),
        ("convolutional", "none", 11),
        ("convolutional", "half-turn", 11),
    ],
)
def test_one_step_gives_every_parameter_a_gradient_and_moves_it(
    particles, reference, kind, symmetrization, n_without_effect
):
    model = make_model(particles, kind=kind, symmetrization=symmetrization)
    before = copied(model)
    make_stage(particles, model, reference).step()
    without_effect = feeds_a_batch_norm(model)
    assert len(without_effect) == n_without_effect
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if name in without_effect:
            # The mean over the batch takes the bias out; that it moves at all is rounding.
            continue
        assert parameter.grad.abs().max() > 0, name
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("kind", ["polar", "convolutional"])
def test_the_wake_moves_the_volume_and_the_sleep_does_not(particles, reference, kind):
    stage = make_stage(particles, make_model(particles, kind=kind), reference)
    volume = stage.model.volume.sampled(RADIUS)
    rows = torch.arange(8)
    for losses, moved in ((stage._wake_losses(rows, volume), True), (stage._sleep_losses(rows), False)):
        stage.model.zero_grad(set_to_none=True)
        sum(losses).mean().backward()
        assert all((p.grad is not None) == moved for p in stage.model.volume.parameters())
        assert all(p.grad is not None for p in stage.model.encoder.parameters())


@pytest.mark.parametrize("kind", ["polar", "convolutional"])
def test_sleeping_alone_gives_every_parameter_of_the_encoder_a_gradient(particles, reference, kind):
    stage = make_stage(particles, make_model(particles, kind=kind), reference)
    loss, score = stage._sleep_losses(torch.arange(8))
    (loss + score).mean().backward()
    without_effect = feeds_a_batch_norm(stage.model.encoder)
    for name, parameter in stage.model.encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert name in without_effect or parameter.grad.abs().max() > 0, name


def test_what_is_said_of_the_poses_learns_from_the_loss_and_what_is_said_of_the_probabilities_from_the_score(
    particles, reference
):
    stage = make_stage(particles, make_model(particles, kind="convolutional"), reference)
    encoder = stage.model.encoder
    for index, (of_poses, of_probabilities) in enumerate([(True, False), (False, True)]):
        rows = torch.arange(8)
        for losses in (stage._wake_losses(rows, stage.model.volume.sampled(RADIUS)), stage._sleep_losses(rows)):
            stage.model.zero_grad(set_to_none=True)
            losses[index].mean().backward()
            assert all((p.grad is not None) == of_poses for p in encoder.shift_head.parameters())
            assert all((p.grad is not None) == of_probabilities for p in encoder.score_head.parameters())


def test_fitting_brings_the_volume_nearer_to_the_map(particles, reference):
    stage = make_stage(particles, make_model(particles), reference, n_fit_steps=150)
    before = copied(stage.model.encoder)
    metrics = [stage.step() for _ in range(150)]
    assert all(math.isnan(m.wake_loss) for m in metrics)
    errors = [m.volume_fit_loss for m in metrics]
    assert np.mean(errors[-10:]) < 0.6 * np.mean(errors[:10])
    assert unmoved(stage.model.encoder, before)
    assert stage.steps_done == 0
    assert all(m.band_limit == RADIUS for m in metrics)
    assert math.isfinite(stage.step().wake_loss)


def test_synthetic_images_look_like_the_data(particles, reference):
    stage = make_stage(particles, make_model(particles), reference)
    volume = stage.asleep_with = reference.sampled()
    batch, poses = stage._dream(stage._draw(400))
    clean = stage.model.imaging.predict(volume, poses, batch.optics)
    noise = batch.coefficients - clean
    assert float(noise.abs().square().mean()) == pytest.approx(NOISE**2, rel=0.02)
    assert float(poses.shifts_in_angstroms.std()) == pytest.approx(2.0, rel=0.1)
    data = particles.batch(torch.arange(N), RADIUS).coefficients[:, 1:].abs().square().mean()
    assert float(batch.coefficients[:, 1:].abs().square().mean()) == pytest.approx(float(data), rel=0.1)
    assert torch.isin(batch.optics.defocus_u_in_angstroms, particles.optics.defocus_u_in_angstroms).all()


def test_without_a_map_to_start_from_all_coefficients_count_alike_and_the_volume_becomes_the_reference(particles):
    stage = make_stage(particles, make_model(particles), n_fit_steps=50)
    # But for the origin, which an image lost with its mean.
    assert torch.equal(stage.precision, (particles.imaging(RADIUS).shells > 0).float())
    batch, poses = stage._dream(stage._draw(400))
    noise = batch.coefficients - stage.model.imaging.predict(stage.asleep_with, poses, batch.optics)
    assert float(noise.abs().square().mean()) == pytest.approx(1, rel=0.02)
    assert math.isfinite(stage.step().wake_loss)
    result = stage.result()
    assert result.model is stage.model
    assert not result.model.training
    assert result.reference.density.shape == (BOX, BOX, BOX)
    assert result.reference.max_radius == RADIUS
    assert torch.equal(result.reference.density, stage.model.volume.to_map(RADIUS))


def test_a_map_to_start_from_stays_the_reference(particles, reference):
    stage = make_stage(particles, make_model(particles), reference, n_steps=1)
    stage.step()
    assert stage.result().reference is reference


@pytest.mark.parametrize(
    ("kind", "n_hypotheses", "sleep_batch_size"),
    [("convolutional", 1, 0), ("convolutional", 1, 8), ("convolutional", 3, 0), ("polar", 2, 8), ("polar", 16, 0)],
)
def test_one_hypothesis_will_do_and_so_will_no_synthetic_images(particles, kind, n_hypotheses, sleep_batch_size):
    model = make_model(particles, n_hypotheses, kind)
    stage = make_stage(particles, model, sleep_batch_size=sleep_batch_size)
    progress = []
    while not stage.finished:
        metrics = stage.step()
        progress.append(stage.progress)
        assert math.isfinite(metrics.wake_loss)
        assert (metrics.sleep_loss > 0) == (sleep_batch_size > 0)
    assert progress == [0.25, 0.5, 0.75, 1.0]


def test_one_seed_gives_one_model(particles, reference):
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        stage = make_stage(particles, make_model(particles), reference, n_fit_steps=2)
        while not stage.finished:
            stage.step()
        made.append(stage.model.state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_the_learning_rate_rises_and_falls_and_never_reaches_zero(particles):
    stage = make_stage(particles, make_model(particles), n_steps=100)
    factors = [stage._learning_rate_factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == pytest.approx(1, abs=0.01)
    assert factors[:5] == sorted(factors[:5])
    assert factors[6:] == sorted(factors[6:], reverse=True)
    assert factors[100] == pytest.approx(0.02)


# ------------------------------------------------------------------------------ awake and asleep


def test_on_a_step_that_is_asleep_the_volume_does_not_move_and_the_encoder_does(particles, reference):
    stage = make_stage(particles, make_model(particles), reference, n_steps=8, wake_interval=3)
    awake = []
    while not stage.finished:
        volume, encoder = copied(stage.model.volume), copied(stage.model.encoder)
        metrics = stage.step()
        awake.append(math.isfinite(metrics.wake_loss))
        assert unmoved(stage.model.volume, volume) == (not awake[-1])
        assert not unmoved(stage.model.encoder, encoder)
        assert math.isfinite(metrics.sleep_loss)
    assert awake == [True, False, False, True, False, False, True, False]


def test_without_synthetic_images_every_step_is_awake(particles):
    stage = make_stage(particles, make_model(particles), wake_interval=3, sleep_batch_size=0)
    while not stage.finished:
        volume = copied(stage.model.volume)
        metrics = stage.step()
        assert math.isfinite(metrics.wake_loss)
        assert math.isnan(metrics.sleep_loss)
        assert not unmoved(stage.model.volume, volume)


def test_asleep_no_image_of_the_data_is_looked_at(particles, reference):
    stage = make_stage(particles, make_model(particles), reference, wake_interval=2)
    stage.step()
    particles.path.unlink()
    assert math.isnan(stage.step().wake_loss)
    with pytest.raises(FileNotFoundError):
        stage.step()


def test_asleep_synthetic_images_are_made_from_the_volume_as_the_last_awake_step_left_it(particles, reference):
    stage = make_stage(particles, make_model(particles), reference, wake_interval=3, volume_learning_rate=1e-2)

    def slices_of_the_map():
        return SampledVolume.from_map(stage.model.volume.to_map(RADIUS), RADIUS).values

    before = slices_of_the_map()
    stage.step()
    after = slices_of_the_map()
    assert (after - before).norm() > 0.01 * before.norm()
    stage.step()
    assert (stage.asleep_with.values - after).norm() < 0.01 * (after - before).norm()


# ------------------------------------------------------------------------------ the band limit


def test_the_band_limit_grows_from_the_first_to_the_last_over_the_first_half_of_the_steps(particles):
    stage = make_stage(
        particles, make_model(particles), n_steps=60, first_radius=3, wake_batch_size=2, sleep_batch_size=2
    )
    assert stage.last_radius == RADIUS
    limits = []
    while not stage.finished:
        expected = stage.radius
        outside = stage.model.imaging.shells > expected
        assert (stage.precision[outside] == 0).all()
        assert torch.equal(stage.precision[~outside], stage.full_precision[~outside])
        limits.append(stage.step().band_limit)
        assert limits[-1] == expected
    # Six band limits share thirty steps.
    assert limits == [radius for radius in range(3, RADIUS + 1) for _ in range(5)] + 30 * [RADIUS]


def test_without_growth_the_whole_band_is_used_from_the_first_step(particles):
    stage = make_stage(particles, make_model(particles))
    assert [stage.step().band_limit for _ in range(4)] == 4 * [RADIUS]


@pytest.mark.parametrize("encoder_input", [matched_filter, unfiltered])
@pytest.mark.parametrize("kind", ["polar", "convolutional"])
@pytest.mark.parametrize(("first_radius", "same"), [(4, True), (RADIUS, False)])
def test_coefficients_beyond_the_band_limit_of_a_step_change_neither_its_loss_nor_what_the_encoder_learns(
    particles, images, reference, tmp_path, encoder_input, kind, first_radius, same
):
    changed = torch.where(particles.disc.shells > 4, -images, images)
    metrics, weights = [], []
    for data in (particles, stored(changed, tmp_path / "changed")):
        torch.manual_seed(5)
        model = make_model(particles, kind=kind, encoder_input=encoder_input)
        stage = make_stage(data, model, reference, first_radius=first_radius, n_steps=1000)
        metrics.append(stage.step())
        weights.append(copied(model))
    assert metrics[0].band_limit == first_radius
    assert (metrics[0].wake_loss == metrics[1].wake_loss) == same
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) == same


# ------------------------------------------------------------------------------ what is told


def test_a_step_tells_of_the_losses_that_it_computed_and_of_no_others():
    def headline(wake, sleep, fit):
        return AmortizedMetrics(3, 8, wake, sleep, fit).headline

    assert headline(1.25, 0.5, math.nan) == "wake loss 1.2500, sleep loss 0.50"
    assert headline(math.nan, 0.5, math.nan) == "sleep loss 0.50"
    assert headline(1.25, math.nan, math.nan) == "wake loss 1.2500"
    assert headline(math.nan, math.nan, 0.3) == "fitting the volume, relative error 0.30"
