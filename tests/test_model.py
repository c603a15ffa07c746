import pytest
import torch

from cryoai.alignment import FrameChange
from cryoai.encoder import ConvolutionalEncoder, PoseEncoder, SymmetrizedEncoder
from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.model import CryoAI, Placing, matched_filter, unfiltered
from cryoai.noise import NoiseSpectrum
from cryoai.particles import ParticleBatch
from cryoai.poses import Hypotheses, Poses, angular_distance_in_degrees
from cryoai.symmetry.averaging import symmetrized_map
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
from cryoai.volumes import SampledVolume, VoxelVolume
from oracles import make_optics, random_rotations, textbook_ctf
from properties import unchanged

BOX, RADIUS, HEADS = 32, 10, 3


@pytest.fixture(autouse=True)
def _in_full_precision(monkeypatch):
    monkeypatch.setattr("cryoai.hardware.matrix_dtype", lambda _device: torch.float32)


@pytest.fixture
def model(phantom):
    disc = FourierDisc.of_box(BOX)
    encoder = ConvolutionalEncoder(disc, n_hypotheses=HEADS, max_shift_in_angstroms=10.0, width=4)
    imaging = ImagingModel(disc, 3.0, RADIUS)
    made = CryoAI(SymmetrizedEncoder(encoder), VoxelVolume(phantom.density(BOX).float()), imaging)
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
    all_of_them, direct = proposed.poses, encoded.poses
    assert all_of_them.rotations.shape == (5, 2 * HEADS, 3, 3)
    assert direct.rotations.shape == (5, HEADS, 3, 3)
    torch.testing.assert_close(all_of_them.rotations[:, :HEADS], direct.rotations, atol=1e-4, rtol=0)
    assert direct.rotations.std(dim=0).max() > 0.1
    torch.testing.assert_close(
        all_of_them.shifts_in_angstroms[:, :HEADS], direct.shifts_in_angstroms, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        2 * proposed.log_probabilities.exp()[:, :HEADS], encoded.log_probabilities.exp(), atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_a_turned_image_is_proposed_the_same_poses_turned_with_the_two_halves_changed_over(model, precision):
    _, batch = truth_and_images(model, 5)
    straight = model.propose(batch, precision).poses
    turned = model.propose(conjugated(batch), precision).poses.turned_by_pi()
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
    seen, changed = (model.encode(b, precision).poses for b in (batch, other))
    assert torch.equal(changed.rotations, seen.rotations)
    assert torch.equal(changed.shifts_in_angstroms, seen.shifts_in_angstroms)


@torch.no_grad()
def test_the_sign_of_the_ctf_does_not_reach_the_encoder(model, precision):
    """Two particles whose images differ in nothing but the sign of the CTF give the same input."""
    _, batch = truth_and_images(model, 4)
    ctf = model.imaging.ctf(batch.optics)
    signal = torch.randn(4, model.imaging.n_coefficients, dtype=torch.complex64)
    seen = [ParticleBatch(batch.indices, sign * ctf * signal, batch.optics) for sign in (1, -1)]
    first, second = (matched_filter(b, model.imaging, precision) for b in seen)
    torch.testing.assert_close(first, ctf.square() * signal * precision)
    torch.testing.assert_close(second, -first)


def test_the_matched_filter_multiplies_by_the_ctf_of_each_particle_and_by_the_precision(model, precision):
    _, batch = truth_and_images(model, 3)
    found = matched_filter(batch, model.imaging, precision)
    assert found.shape == (3, model.imaging.n_coefficients)
    for row, defocus in enumerate(batch.optics.defocus_u_in_angstroms.tolist()):
        ctf = textbook_ctf(model.imaging.coordinates.double(), defocus_u_in_angstroms=defocus)
        expected = batch.coefficients[row, : len(ctf)] * ctf.float() * precision
        torch.testing.assert_close(found[row], expected, atol=1e-3, rtol=1e-3)


def test_unfiltered_is_the_image_wherever_it_has_any_precision(model, precision):
    _, batch = truth_and_images(model, 3)
    within = batch.coefficients[:, : model.imaging.n_coefficients]
    without_origin = torch.where(model.imaging.shells > 0, within, 0)
    assert torch.equal(unfiltered(batch, model.imaging, precision), without_origin)
    assert torch.equal(unfiltered(batch, model.imaging, 7 * precision), without_origin)
    outer = torch.where(model.imaging.shells <= 4, precision, 0)
    assert (unfiltered(batch, model.imaging, outer)[:, model.imaging.shells > 4] == 0).all()
    assert within.shape[1] < batch.coefficients.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("chosen", [matched_filter, unfiltered])
def test_the_encoder_is_shown_what_the_chosen_input_makes_of_the_particles(model, precision, chosen):
    _, batch = truth_and_images(model, 4)
    again = CryoAI(model.encoder, model.volume, model.imaging, chosen).eval()
    shown = chosen(batch, model.imaging, precision)
    for asked, expected in ((again.encode, model.encoder.direct(shown)), (again.propose, model.encoder(shown))):
        found = asked(batch, precision)
        assert torch.equal(found.poses.rotations, expected.poses.rotations)
        assert torch.equal(found.log_probabilities, expected.log_probabilities)


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
    encoder = model.encoder.encoder
    assert encoder.features[0].weight.grad.abs().max() > 0
    winners = set((reading.hypothesis % HEADS).tolist())
    for index, head in enumerate(encoder.rotation_heads):
        reached = head[-1].weight.grad.abs().max() > 0
        assert reached == (index in winners)


# ------------------------------------------------------------------------------ placing


class FixedEncoder(PoseEncoder):
    """Says the same whatever it is shown."""

    def __init__(self, rotations, shifts, probabilities):
        super().__init__()
        self.hypotheses = Hypotheses(Poses(rotations, shifts), probabilities.log())
        self.n_hypotheses = rotations.shape[1]

    def forward(self, coefficients):
        assert len(coefficients) == len(self.hypotheses.log_probabilities)
        return self.hypotheses


def apart(n, seed):
    """Rotations (n, 3, 3), each more than 40 degrees from all others."""
    kept = []
    for rotation in random_rotations(500, seed=seed).float():
        cosines = [float(((rotation * other).sum() - 1) / 2) for other in kept]
        if all(cosine < 0.76 for cosine in cosines):
            kept.append(rotation)
    assert len(kept) >= n
    return torch.stack(kept[:n])


def about_x(rotation, degrees):
    angle = torch.deg2rad(torch.tensor(degrees))
    c, s = angle.cos(), angle.sin()
    return rotation @ torch.tensor([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def placed(model, precision, rotations, probabilities, truth_rotation, n_iterations=0):
    """One noise-free particle at a pose, placed by an encoder with these hypotheses (M,), unshifted."""
    optics = make_optics(1, defocus_u_in_angstroms=14000.0)
    volume = SampledVolume.from_map(model.volume.density.detach(), RADIUS, with_gradient=True)
    noise = NoiseSpectrum((1 / precision.max()).expand(RADIUS + 1))
    truth = Poses(truth_rotation[None], torch.zeros(1, 2))
    with torch.no_grad():
        image = model.imaging.predict(volume, truth, optics)
        encoder = FixedEncoder(rotations[None], torch.zeros(1, len(rotations), 2), torch.tensor([probabilities]))
        asked = CryoAI(encoder, model.volume, model.imaging)
        return asked.place(ParticleBatch(torch.arange(1), image, optics), volume, noise, n_iterations), image[0]


def test_of_the_most_probable_hypotheses_the_one_that_fits_the_image_is_taken(model, precision):
    precision = 20 * precision
    rotations = apart(6, seed=1)
    probabilities = [0.3, 0.05, 0.25, 0.2, 0.15, 0.05]
    for right in (0, 2, 3, 4):
        placing, _ = placed(model, precision, rotations, probabilities, rotations[right])
        assert torch.equal(placing.poses.rotations[0], rotations[right])
        assert float(placing.fit) == pytest.approx(0, abs=0.05)
        assert float(placing.probability) == pytest.approx(probabilities[right], abs=1e-5)
        assert float(placing.lead) > 0
    # The two that the encoder believes in least are not looked at.
    for wrong in (1, 5):
        placing, _ = placed(model, precision, rotations, probabilities, rotations[wrong])
        assert not torch.equal(placing.poses.rotations[0], rotations[wrong])
        assert float(placing.fit) < -2


def test_the_probability_of_an_answer_is_that_of_all_hypotheses_within_20_degrees_of_it(model, precision):
    first, second = apart(2, seed=2)
    rotations = torch.stack([first, about_x(first, 19.0), about_x(first, 21.0), second, about_x(first, -10.0)])
    placing, _ = placed(model, precision, rotations, [0.3, 0.2, 0.15, 0.25, 0.1], first)
    assert float(placing.probability) == pytest.approx(0.3 + 0.2 + 0.1, abs=1e-5)


def test_the_lead_is_the_log_likelihood_ahead_of_the_best_answer_more_than_20_degrees_away(model, precision):
    first, second, third = apart(3, seed=4)
    rotations = torch.stack([first, about_x(first, 3.0), second, third])
    placing, image = placed(model, precision, rotations, [0.4, 0.3, 0.2, 0.1], first)
    optics = make_optics(1, defocus_u_in_angstroms=14000.0)
    with torch.no_grad():
        poses = Poses(rotations[None], torch.zeros(1, 4, 2))
        predicted = model.imaging.predict(model.volume.sampled(RADIUS), poses, optics)[0]
    distances = ((image - predicted).abs().square() * precision).sum(-1)
    chosen = int(distances.argmin())
    expected = float(distances[2:].min() - distances[0])
    # The nearer rival is the same answer.
    assert float(distances[1] - distances[0]) < 0.5 * expected
    assert chosen == 0
    assert float(placing.lead) == pytest.approx(expected, rel=1e-3)
    assert expected < 50


def test_an_answer_without_a_rival_has_the_largest_lead_there_is(model, precision):
    first = apart(1, seed=5)[0]
    rotations = torch.stack([first, about_x(first, 5.0), about_x(first, -5.0)])
    placing, _ = placed(model, precision, rotations, [0.4, 0.3, 0.3], first)
    assert float(placing.lead) == 50.0
    assert float(placing.probability) == pytest.approx(1, abs=1e-5)


def test_what_is_refined_is_the_answer_and_the_fit_is_that_of_the_refined_pose(model, precision):
    precision = 20 * precision
    first, second = apart(2, seed=6)
    start = about_x(first, 6.0)
    rotations, probabilities = torch.stack([second, start]), [0.6, 0.4]
    as_it_is, _ = placed(model, precision, rotations, probabilities, first)
    refined, _ = placed(model, precision, rotations, probabilities, first, n_iterations=4)
    assert torch.equal(as_it_is.poses.rotations[0], start)
    assert float(angular_distance_in_degrees(refined.poses.rotations[0], first)) < 0.5
    assert float(as_it_is.fit) < -0.5
    assert float(refined.fit) == pytest.approx(0, abs=0.05)


def test_hypotheses_are_judged_after_they_were_refined_if_they_are_at_all(model, precision):
    # The better of two rough hypotheses need not be the nearer to an optimum.
    first, second = apart(2, seed=6)
    rotations, probabilities = torch.stack([second, about_x(first, 12.0)]), [0.9, 0.1]
    refined, _ = placed(model, 20 * precision, rotations, probabilities, first, n_iterations=5)
    assert float(angular_distance_in_degrees(refined.poses.rotations[0], first)) < 1
    assert float(refined.probability) == pytest.approx(0.1, abs=1e-5)


def test_placings_are_joined_in_their_order():
    parts = [Placing(Poses(random_rotations(n, seed=n).float(), torch.randn(n, 2)), *torch.randn(3, n)) for n in (2, 3)]
    joined = Placing.cat(parts)
    assert torch.equal(joined.poses.rotations[2:], parts[1].poses.rotations)
    assert torch.equal(joined.poses.shifts_in_angstroms[:2], parts[0].poses.shifts_in_angstroms)
    for name in ("fit", "probability", "lead"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(part, name) for part in parts]))


def test_some_placings_take_the_place_of_others_and_leave_them_as_they_were():
    whole, part = (
        Placing(Poses(random_rotations(n, seed=n).float(), torch.randn(n, 2)), *torch.randn(3, n)) for n in (5, 2)
    )
    where = torch.tensor([False, True, False, False, True])
    kept = whole.fit.clone()
    mixed = whole.replaced(where, part)
    for name in ("fit", "probability", "lead"):
        assert torch.equal(getattr(mixed, name)[where], getattr(part, name))
        assert torch.equal(getattr(mixed, name)[~where], getattr(whole, name)[~where])
    assert torch.equal(mixed.poses.rotations[where], part.poses.rotations)
    assert torch.equal(mixed.poses.shifts_in_angstroms[~where], whole.poses.shifts_in_angstroms[~where])
    assert torch.equal(whole.fit, kept)


def test_other_hypotheses_are_judged_beside_the_encoder_s(model, precision):
    right, wrong = apart(2, seed=7)
    optics = make_optics(1, defocus_u_in_angstroms=14000.0)
    volume = SampledVolume.from_map(model.volume.density.detach(), RADIUS, with_gradient=True)
    noise = NoiseSpectrum((1 / (20 * precision.max())).expand(RADIUS + 1))
    with torch.no_grad():
        image = model.imaging.predict(volume, Poses(right[None], torch.zeros(1, 2)), optics)
    asked = CryoAI(FixedEncoder(wrong[None, None], torch.zeros(1, 1, 2), torch.ones(1, 1)), model.volume, model.imaging)
    batch = ParticleBatch(torch.arange(1), image, optics)
    others = Poses(right[None, None], torch.zeros(1, 1, 2))
    assert torch.equal(asked.place(batch, volume, noise, 0).poses.rotations[0], wrong)
    found = asked.place(batch, volume, noise, 0, others)
    assert torch.equal(found.poses.rotations[0], right)
    assert float(found.fit) == pytest.approx(0, abs=0.05)
    assert float(found.probability) == 0


# ------------------------------------------------------------------------------ frames and symmetry


def a_frame(seed):
    return FrameChange(random_rotations(1, seed)[0].float(), mirrored=False, shift=3 * torch.randn(3))


@torch.no_grad()
def test_proposals_are_brought_to_the_frame_of_the_maps(phantom, precision):
    """The particle is moved twice in closed form; the encoder learnt before."""
    pixel_size = 3.0
    truth = Poses(apart(4, seed=9)[None], 2 * torch.randn(1, 4, 2))
    encoder = FixedEncoder(truth.rotations, truth.shifts_in_angstroms, torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    imaging = ImagingModel(FourierDisc.of_box(BOX), pixel_size, RADIUS)
    learnt = CryoAI(encoder, VoxelVolume(phantom.density(BOX).float()), imaging)
    model, particle = learnt, phantom
    for seed in (11, 12):
        frame = a_frame(seed)
        with unchanged(*model.state_dict().values()):
            model = model.moved(frame)
        particle = particle.moved(frame.rotation, shift=frame.shift.double() / pixel_size)
    volume = SampledVolume.from_map(particle.density(BOX).float(), RADIUS)
    noise = NoiseSpectrum((1 / (20 * precision.max())).expand(RADIUS + 1))
    optics = make_optics(1, defocus_u_in_angstroms=14000.0)
    for answer in range(4):
        expected = model.frame.of_poses(truth[:, answer])
        image = imaging.predict(learnt.volume.sampled(RADIUS), truth[:, answer], optics)
        batch = ParticleBatch(torch.arange(1), image, optics)
        placing = model.place(batch, volume, noise, 0)
        torch.testing.assert_close(placing.poses.rotations, expected.rotations)
        torch.testing.assert_close(placing.poses.shifts_in_angstroms, expected.shifts_in_angstroms)
        # Two lattices of the same map are off by 1 %.
        assert abs(float(placing.fit)) < 1
        assert float(learnt.place(batch, volume, noise, 0).fit) < -4
        # What is learnt and judged with the volume of the model stays in its own frame.
        assert torch.equal(model.propose(batch, precision).poses.rotations, truth.rotations)


def test_the_frame_is_kept_with_the_weights(model):
    frame = a_frame(13)
    moved = model.moved(frame).eval()
    fresh = CryoAI(model.encoder, model.volume, model.imaging)
    fresh.load_state_dict(moved.state_dict())
    assert torch.equal(fresh.frame.rotation, frame.rotation)
    assert torch.equal(fresh.frame.shift, frame.shift)
    assert torch.equal(model.frame.rotation, torch.eye(3))
    assert not moved.encoder.training
    with pytest.raises(ValueError, match="other hand"):
        model.moved(FrameChange(torch.eye(3), mirrored=True, shift=torch.zeros(3)))


@torch.no_grad()
def test_equivalent_poses_are_one_answer(model, precision):
    group = PointGroup.named("D2")
    symmetric = SampledVolume.from_map(symmetrized_map(model.volume.density, group), RADIUS)
    first, second = apart(2, seed=2)
    assert symmetric_distance_in_degrees(first, second, group) > 20
    rotations = torch.stack([first, group.operators[1] @ about_x(first, 5.0), group.operators[2] @ first, second])
    encoder = FixedEncoder(rotations[None], torch.zeros(1, 4, 2), torch.tensor([[0.1, 0.4, 0.3, 0.2]]))
    asked = CryoAI(encoder, model.volume, model.imaging)
    noise, optics = NoiseSpectrum((1 / precision.max()).expand(RADIUS + 1)), make_optics(1)
    image = model.imaging.predict(symmetric, Poses(first[None], torch.zeros(1, 2)), optics)
    batch = ParticleBatch(torch.arange(1), image, optics)
    alone, together = (asked.place(batch, symmetric, noise, 0, group=g) for g in (PointGroup.named("C1"), group))
    assert float(together.probability) == pytest.approx(0.8, abs=1e-5)
    assert float(alone.probability) < 0.4
    residual = (image - model.imaging.predict(symmetric, Poses(second[None], torch.zeros(1, 2)), optics)).abs().square()
    runner_up = float((residual * precision).sum())
    assert 0.5 < runner_up < 50
    assert float(together.lead) == pytest.approx(runner_up, rel=1e-2)
    # Without symmetry, a mate is a rival that is as good.
    assert float(alone.lead) < 0.02 * runner_up
