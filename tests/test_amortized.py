import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from cryoai.bootstrap import Reference
from cryoai.encoder import PoseEncoder
from cryoai.errors import RunFailedError
from cryoai.fourier import FourierDisc
from cryoai.model import CryoAI
from cryoai.noise import NoiseSpectrum
from cryoai.particles import ContrastSign, PreparedParticles
from cryoai.poses import Poses
from cryoai.training.stages import Estimate
from cryoai.training.stages.amortized import Amortized, parameter_groups
from cryoai.volumes import FourierNetVolume, SampledVolume
from oracles import make_optics, random_rotations

BOX, PIXEL, RADIUS, N = 32, 3.0, 8, 40
NOISE = 0.5


@pytest.fixture
def particles(phantom, tmp_path):
    disc = FourierDisc.of_box(BOX)
    optics = make_optics(N, defocus_u_in_angstroms=torch.linspace(8000, 20000, N))
    prepared = PreparedParticles(tmp_path / "images", disc, optics, PIXEL, ContrastSign(1, 9.0), disc.n_coefficients())
    volume = SampledVolume.from_map(phantom.density(BOX).float(), BOX // 2)
    poses = Poses(random_rotations(N).float(), 3 * torch.randn(N, 2))
    clean = prepared.imaging(BOX).predict(volume, poses, optics)
    images = clean + NOISE * torch.randn_like(clean)
    torch.view_as_real(images).numpy().astype(np.float16).tofile(prepared.path)
    return prepared


@pytest.fixture
def reference(phantom):
    return Reference(phantom.density(BOX).float(), RADIUS, NoiseSpectrum(torch.full((RADIUS + 1,), NOISE**2)))


def make_model(particles, n_hypotheses=3):
    encoder = PoseEncoder(BOX, n_hypotheses=n_hypotheses, max_shift_in_angstroms=10.0, width=4)
    scale = float(particles.batch(torch.arange(N), RADIUS).coefficients.abs().square().mean().sqrt())
    volume = FourierNetVolume(BOX, width=32, scale=scale, sampling_oversampling=1)
    return CryoAI(encoder, volume, particles.imaging(RADIUS))


def make_stage(particles, model, reference=None, **options):
    values = {
        "n_steps": 4,
        "n_fit_steps": 0,
        "wake_batch_size": 8,
        "sleep_batch_size": 8,
        "learning_rate": 1e-3,
        "volume_learning_rate": 1e-4,
        "shift_std_in_angstroms": 2.0,
        "generator": torch.Generator().manual_seed(1),
    }
    return Amortized(particles, Estimate(reference=reference), model, **{**values, **options})


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


def test_one_step_gives_every_parameter_a_gradient_and_moves_it(particles, reference):
    model = make_model(particles)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_stage(particles, model, reference).step()
    without_effect = feeds_a_batch_norm(model)
    assert len(without_effect) == 11
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if name in without_effect:
            # The mean over the batch takes the bias out; that it moves at all is rounding.
            continue
        assert parameter.grad.abs().max() > 0, name
        assert not torch.equal(parameter, before[name]), name


def test_the_wake_moves_the_volume_and_the_sleep_does_not(particles, reference):
    stage = make_stage(particles, make_model(particles), reference)
    volume = stage.model.volume.sampled(RADIUS)
    for loss, moved in ((stage._wake_loss(volume), True), (stage._sleep_loss(volume), False)):
        stage.model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        assert all((p.grad is not None) == moved for p in stage.model.volume.parameters())
        assert all(p.grad is not None for p in stage.model.encoder.shift_head.parameters())


def test_fitting_brings_the_volume_nearer_to_the_map(particles, reference):
    stage = make_stage(particles, make_model(particles), reference, n_fit_steps=150)
    before = [p.detach().clone() for p in stage.model.encoder.parameters()]
    metrics = [stage.step() for _ in range(150)]
    assert all(math.isnan(m.wake_loss) for m in metrics)
    errors = [m.volume_fit_loss for m in metrics]
    assert np.mean(errors[-10:]) < 0.6 * np.mean(errors[:10])
    assert all(torch.equal(p, b) for p, b in zip(stage.model.encoder.parameters(), before, strict=True))
    assert stage.steps_done == 0
    assert math.isfinite(stage.step().wake_loss)


def test_synthetic_images_look_like_the_data(particles, reference):
    stage = make_stage(particles, make_model(particles), reference, sleep_batch_size=400)
    volume = reference.sampled()
    batch, poses = stage._dream(volume)
    clean = stage.model.imaging.predict(volume, poses, batch.optics)
    noise = batch.coefficients - clean
    assert float(noise.abs().square().mean()) == pytest.approx(NOISE**2, rel=0.02)
    assert float(poses.shifts_in_angstroms.std()) == pytest.approx(2.0, rel=0.1)
    data = particles.batch(torch.arange(N), RADIUS).coefficients[:, 1:].abs().square().mean()
    assert float(batch.coefficients[:, 1:].abs().square().mean()) == pytest.approx(float(data), rel=0.1)
    assert torch.isin(batch.optics.defocus_u_in_angstroms, particles.optics.defocus_u_in_angstroms).all()


def test_without_a_map_to_start_from_everything_is_noise_and_the_volume_becomes_the_reference(particles):
    stage = make_stage(particles, make_model(particles), n_fit_steps=50)
    images = particles.batch(torch.arange(N), RADIUS).coefficients
    expected = NoiseSpectrum.of_residuals(images, particles.imaging(RADIUS))
    torch.testing.assert_close(stage.noise.variance, expected.variance)
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


@pytest.mark.parametrize(("n_hypotheses", "sleep_batch_size"), [(1, 0), (1, 8), (3, 0)])
def test_one_hypothesis_will_do_and_so_will_no_synthetic_images(particles, n_hypotheses, sleep_batch_size):
    stage = make_stage(particles, make_model(particles, n_hypotheses), sleep_batch_size=sleep_batch_size)
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


def test_training_that_diverges_ends_with_its_reason(particles, monkeypatch):
    stage = make_stage(particles, make_model(particles))
    monkeypatch.setattr(stage, "_wake_loss", lambda _volume: torch.tensor(float("nan")))
    with pytest.raises(RunFailedError, match="is not finite"):
        stage.step()
