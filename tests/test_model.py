import pytest
import torch

from cryoai.encoder import PoseEncoder
from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.model import CryoAI
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses
from cryoai.volumes import VoxelVolume
from oracles import make_optics, random_rotations
from properties import unchanged

BOX, RADIUS, HEADS = 32, 10, 3


@pytest.fixture(autouse=True)
def _in_full_precision(monkeypatch):
    monkeypatch.setattr("cryoai.hardware.matrix_dtype", lambda _device: torch.float32)


@pytest.fixture
def model(phantom):
    encoder = PoseEncoder(BOX, n_hypotheses=HEADS, max_shift_in_angstroms=10.0, width=4)
    imaging = ImagingModel(FourierDisc.of_box(BOX), 3.0, RADIUS)
    made = CryoAI(encoder, VoxelVolume(phantom.density(BOX).float()), imaging)
    _, batch = truth_and_images(made, 16)
    with torch.no_grad():
        # BatchNorm learns what the features are like; before that an encoder in evaluation sees next to nothing.
        for _ in range(60):
            made.propose(batch, precision_of(imaging))
    return made.eval()


@pytest.fixture
def precision(model):
    return precision_of(model.imaging)


def precision_of(imaging):
    return (imaging.shells > 0).float() / 2


def truth_and_images(model, n):
    """Poses, and noise-free particles of the model's volume, with more coefficients than it looks at."""
    poses = Poses(random_rotations(n).float(), 3 * torch.randn(n, 2))
    optics = make_optics(n, defocus_u_in_angstroms=torch.linspace(8000, 20000, n))
    with torch.no_grad():
        known = model.imaging.predict(model.volume.sampled(RADIUS), poses, optics)
    beyond = torch.randn(n, model.imaging.disc.n_coefficients() - known.shape[1], dtype=known.dtype)
    return poses, ParticleBatch(torch.arange(n), torch.cat([known, beyond], dim=1), optics)


def conjugated(batch):
    return ParticleBatch(batch.indices, batch.coefficients.conj().resolve_conj(), batch.optics)


@torch.no_grad()
def test_twice_as_many_hypotheses_are_proposed_as_there_are_heads_and_the_first_are_of_the_image_itself(
    model, precision
):
    _, batch = truth_and_images(model, 5)
    with unchanged(batch, precision):
        proposed, encoded = model.propose(batch, precision), model.encode(batch, precision)
    assert proposed.rotations.shape == (5, 2 * HEADS, 3, 3)
    assert encoded.rotations.shape == (5, HEADS, 3, 3)
    torch.testing.assert_close(proposed.rotations[:, :HEADS], encoded.rotations, atol=1e-4, rtol=0)
    assert encoded.rotations.std(dim=0).max() > 0.1
    torch.testing.assert_close(proposed.shifts_in_angstroms[:, :HEADS], encoded.shifts_in_angstroms, atol=1e-3, rtol=0)


@torch.no_grad()
def test_a_turned_image_is_proposed_the_same_poses_turned_with_the_two_halves_changed_over(model, precision):
    _, batch = truth_and_images(model, 5)
    straight = model.propose(batch, precision)
    turned = model.propose(conjugated(batch), precision).turned_by_pi()
    torch.testing.assert_close(turned.rotations.roll(HEADS, 1), straight.rotations, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        turned.shifts_in_angstroms.roll(HEADS, 1), straight.shifts_in_angstroms, atol=1e-3, rtol=0
    )


@torch.no_grad()
def test_the_encoder_sees_no_coefficient_beyond_the_band_limit_or_without_precision(model, precision):
    _, batch = truth_and_images(model, 4)
    changed = batch.coefficients.clone()
    changed[:, model.imaging.n_coefficients :] = 1e3
    changed[:, 0] = 1e3
    other = ParticleBatch(batch.indices, changed, batch.optics)
    assert torch.equal(model.encode(other, precision).rotations, model.encode(batch, precision).rotations)


@torch.no_grad()
def test_the_sign_of_the_ctf_does_not_reach_the_encoder(model, precision):
    """Two particles whose images differ in nothing but the sign of the CTF give the same input."""
    _, batch = truth_and_images(model, 4)
    ctf = model.imaging.ctf(batch.optics)
    signal = torch.randn(4, model.imaging.n_coefficients, dtype=torch.complex64)
    seen = [ParticleBatch(batch.indices, sign * ctf * signal, batch.optics) for sign in (1, -1)]
    first, second = (model._matched(b, precision) for b in seen)
    torch.testing.assert_close(first, ctf.square() * signal * precision)
    torch.testing.assert_close(second, -first)


@torch.no_grad()
def test_the_true_pose_is_picked_among_hypotheses(model, precision):
    truth, batch = truth_and_images(model, 6)
    hypotheses = Poses(random_rotations(30, seed=8).float().reshape(6, 5, 3, 3), torch.zeros(6, 5, 2))
    place = torch.tensor([0, 4, 2, 3, 1, 2])
    rows = torch.arange(6)
    hypotheses.rotations[rows, place] = truth.rotations
    hypotheses.shifts_in_angstroms[rows, place] = truth.shifts_in_angstroms
    volume = model.volume.sampled(RADIUS)
    with unchanged(batch, hypotheses, volume):
        reading = model.judge(batch, hypotheses, volume, precision)
    assert torch.equal(reading.hypothesis, place)
    assert torch.equal(reading.poses.rotations, truth.rotations)
    assert torch.equal(reading.poses.shifts_in_angstroms, truth.shifts_in_angstroms)
    power = (batch.coefficients[:, : model.imaging.n_coefficients].abs().square() * precision).mean(1)
    assert (reading.loss < 1e-6 * power).all()


def test_a_reading_leaves_no_trace_in_evaluation(model, precision):
    _, batch = truth_and_images(model, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with unchanged(batch, precision):
        first, second = model(batch, precision), model(batch, precision)
    assert torch.equal(first.poses.rotations, second.poses.rotations)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.hypothesis, second.hypothesis)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(first.loss) == 5


def test_the_loss_reaches_the_volume_and_of_the_encoder_only_the_heads_that_won(model, precision):
    _, batch = truth_and_images(model, 8)
    reading = model(batch, precision)
    reading.loss.sum().backward()
    assert model.volume.density.grad.abs().max() > 0
    assert model.encoder.features[0].weight.grad.abs().max() > 0
    winners = set((reading.hypothesis % HEADS).tolist())
    for index, head in enumerate(model.encoder.rotation_heads):
        reached = head[-1].weight.grad.abs().max() > 0
        assert reached == (index in winners)
