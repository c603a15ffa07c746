import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from cryoai.encoder import (
    ConvolutionalEncoder,
    EncoderArchitecture,
    GaussianLowPassBank,
    PolarEncoder,
    PoseEncoder,
    SymmetrizedEncoder,
    polar_samples,
)
from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.poses import Hypotheses, Poses
from cryoai.volumes import SampledVolume
from oracles import GaussianPhantom, direct_image_transform, make_optics, random_rotations
from properties import assert_batch_equals_loop, unchanged


def small_encoder(n_pixels=32, **options):
    values = {"n_hypotheses": 3, "max_shift_in_angstroms": 20.0, "width": 4, **options}
    return ConvolutionalEncoder(FourierDisc.of_box(n_pixels), **values)


def small_polar_encoder(n_pixels=32, max_radius=12, **options):
    values = {"n_hypotheses": 16, "max_shift_in_angstroms": 20.0, "width": 16, **options}
    return PolarEncoder(FourierDisc.of_box(n_pixels), max_radius, **values)


def random_coefficients(n, n_pixels=32):
    return FourierDisc.of_box(n_pixels).from_images(torch.randn(n, n_pixels, n_pixels))


@torch.no_grad()
def settled(encoder, coefficients):
    """The encoder ready for evaluation: BatchNorm knows what the features of images like these are like."""
    for _ in range(60):
        encoder(coefficients)
    return encoder.eval()


def assert_rotations_and_shifts_within(poses, bound):
    rotations = poses.rotations.double()
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotations)
    torch.testing.assert_close(rotations @ rotations.transpose(-1, -2), identity, atol=1e-5, rtol=0)
    ones = torch.ones(rotations.shape[:-2], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.det(rotations), ones, atol=1e-5, rtol=0)
    assert (poses.shifts_in_angstroms.abs() <= bound * (1 + 1e-5)).all()
    assert poses.shifts_in_angstroms.abs().max() > 0


def assert_probabilities(log_probabilities):
    assert (log_probabilities <= 1e-6).all()
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(len(log_probabilities)))


def n_parameters(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_the_kernels_of_the_bank_are_gaussians_of_mass_one():
    kernels = GaussianLowPassBank().kernels
    assert kernels.shape == (5, 1, 11, 11)
    torch.testing.assert_close(kernels.sum((1, 2, 3)), torch.ones(5))
    for channel, variance in enumerate([0.01, 0.1, 1.0, 10.0, 100.0]):
        # One pixel from the centre, in units of the centre.
        ratio = kernels[channel, 0, 5, 6] / kernels[channel, 0, 5, 5]
        assert float(ratio) == pytest.approx(float(torch.tensor(-0.5 / variance).exp()), abs=1e-6)


def test_the_bank_leaves_images_alone_in_channel_0_and_blurs_them_ever_more_in_the_others():
    images = torch.randn(3, 32, 32)
    with unchanged(images):
        channels = GaussianLowPassBank()(images)
    assert channels.shape == (3, 5, 32, 32)
    torch.testing.assert_close(channels[:, 0], images, atol=1e-6, rtol=0)
    deviations = channels.std(dim=(2, 3))
    # A variance of 10 is already as broad as the kernel.
    assert (deviations.diff(dim=1)[:, 1:3] < 0).all()
    assert (deviations[:, 4] < 0.2 * deviations[:, 0]).all()


# ------------------------------------------------------------------------------ as published


def test_at_published_size_the_encoder_has_the_published_number_of_parameters():
    disc = FourierDisc.of_box(128)
    encoder = ConvolutionalEncoder(disc, n_hypotheses=1, max_shift_in_angstroms=20.0, width=64)
    assert n_parameters(encoder.features) == 4_101_312
    assert n_parameters(encoder.rotation_heads) == 657_152 + 1_542
    assert n_parameters(encoder.shift_head) == 656_642
    assert n_parameters(encoder) == 5_416_648


@pytest.mark.parametrize("n_pixels", [32, 48, 64, 66])
def test_poses_are_rotations_and_bounded_shifts_for_any_box(n_pixels):
    encoder = small_encoder(n_pixels, max_shift_in_angstroms=7.0)
    hypotheses = encoder(100 * random_coefficients(4, n_pixels))
    assert hypotheses.poses.rotations.shape == (4, 3, 3, 3)
    assert hypotheses.poses.shifts_in_angstroms.shape == (4, 3, 2)
    assert hypotheses.log_probabilities.shape == (4, 3)
    assert_rotations_and_shifts_within(hypotheses.poses, 7.0)
    assert_probabilities(hypotheses.log_probabilities)


def test_shifts_stay_within_their_bound_whatever_the_head_says():
    encoder = small_encoder(max_shift_in_angstroms=7.0)
    with torch.no_grad():
        encoder.shift_head[-1].bias.copy_(torch.tensor([100.0, -100.0]))
        shifts = encoder(random_coefficients(4)).poses.shifts_in_angstroms
    torch.testing.assert_close(shifts, torch.tensor([7.0, -7.0]).expand(4, 3, 2))


def test_a_single_hypothesis_is_certain_and_has_no_head_for_its_probability():
    encoder = small_encoder(n_hypotheses=1)
    assert torch.equal(encoder(random_coefficients(4)).log_probabilities, torch.zeros(4, 1))
    assert not [name for name, _ in encoder.named_parameters() if "score" in name]
    assert [name for name, _ in small_encoder(n_hypotheses=2).named_parameters() if "score" in name]


def test_the_head_for_the_probabilities_decides_them():
    encoder = small_encoder()
    with torch.no_grad():
        encoder.score_head.weight.zero_()
        encoder.score_head.bias.copy_(torch.tensor([1.0, 2.0, 5.0]).log())
        found = encoder(random_coefficients(4)).log_probabilities
    torch.testing.assert_close(found.exp(), torch.tensor([0.125, 0.25, 0.625]).expand(4, 3))


def test_the_convolutional_encoder_sees_the_image_that_has_the_coefficients():
    encoder = small_encoder()
    seen = []
    encoder.bank.register_forward_pre_hook(lambda _bank, arguments: seen.append(arguments[0]))
    # Smooth enough for the disc to hold all of them.
    images = torch.stack([SMOOTH.projection(32, rotation) for rotation in random_rotations(2)]).float()
    encoder(encoder.disc.from_images(images))
    torch.testing.assert_close(seen[0], images, atol=1e-4 * float(images.max()), rtol=0)


def test_in_evaluation_a_batch_is_read_like_its_images_one_by_one():
    coefficients = random_coefficients(5)
    encoder = settled(small_encoder(), coefficients)
    with torch.no_grad():
        assert_batch_equals_loop(lambda x: encoder(x).poses.rotations, coefficients, atol=1e-4)
        assert_batch_equals_loop(lambda x: encoder(x).poses.shifts_in_angstroms, coefficients, atol=1e-3)
        assert_batch_equals_loop(lambda x: encoder(x).log_probabilities, coefficients, atol=1e-4)
        # Not because all images were read alike.
        assert encoder(coefficients).poses.rotations.std(dim=0).max() > 0.1
        assert encoder(coefficients).log_probabilities.std(dim=0).max() > 0.01


def test_the_encoder_is_blind_to_brightness_and_contrast_but_not_to_a_half_turn():
    coefficients = random_coefficients(4)
    encoder = settled(small_encoder(), coefficients)
    brighter = 40 * coefficients
    # A constant is in the coefficient of the origin alone.
    brighter[:, 0] += 7 * 32
    with torch.no_grad():
        seen, rescaled, turned = (encoder(x).poses.rotations for x in (coefficients, brighter, coefficients.conj()))
    torch.testing.assert_close(rescaled, seen, atol=1e-3, rtol=0)
    assert (turned - seen).norm(dim=(-2, -1)).min() > 0.05


@pytest.mark.parametrize("make", [small_encoder, small_polar_encoder])
def test_a_constant_image_gets_finite_poses_and_gradients(make):
    encoder = make()
    images = random_coefficients(4)
    images[:2] = 0
    hypotheses = encoder(images)
    poses = hypotheses.poses
    (poses.rotations.sum() + poses.shifts_in_angstroms.sum() + hypotheses.log_probabilities[:, 0].sum()).backward()
    assert torch.isfinite(poses.rotations).all()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


# ------------------------------------------------------------------------------ half turns


class KnownEncoder(PoseEncoder):
    """Knows the poses (N, M) of some images (N, p), and of those images turned by 180 degrees."""

    def __init__(self, images, poses, probabilities):
        super().__init__()
        self.images = torch.cat([images, images.conj()])
        turned = poses.turned_by_pi()
        self.poses = Poses(
            torch.cat([poses.rotations, turned.rotations]),
            torch.cat([poses.shifts_in_angstroms, turned.shifts_in_angstroms]),
        )
        self.log_probabilities = torch.cat([probabilities, probabilities.flip(0)]).log()
        self.n_hypotheses = poses.rotations.shape[1]

    def forward(self, coefficients):
        rows = torch.cdist(torch.view_as_real(coefficients.resolve_conj()).flatten(1), self.flat()).argmin(1)
        return Hypotheses(self.poses[rows], self.log_probabilities[rows])

    def flat(self):
        return torch.view_as_real(self.images.resolve_conj()).flatten(1)


def test_the_pose_of_a_turned_image_is_turned_back_to_that_of_the_image(phantom):
    imaging = ImagingModel(FourierDisc.of_box(32), 3.0, 8)
    volume = SampledVolume.from_map(phantom.density(32).float(), 8)
    optics = make_optics(6)
    truth = Poses(random_rotations(6).float()[:, None], 5 * torch.randn(6, 1, 2))
    images = imaging.predict(volume, truth, optics)[:, 0]
    # A turn by 180 degrees about the centre conjugates the transform.
    turned = imaging.predict(volume, truth.turned_by_pi(), optics)[:, 0]
    torch.testing.assert_close(turned, images.conj(), atol=1e-3, rtol=1e-3)
    encoder = SymmetrizedEncoder(KnownEncoder(images, truth, torch.ones(6, 1)))
    assert encoder.n_hypotheses == 2
    with unchanged(images):
        poses = encoder(images).poses
    assert poses.rotations.shape == (6, 2, 3, 3)
    for half in (0, 1):
        torch.testing.assert_close(poses.rotations[:, half], truth.rotations[:, 0])
        torch.testing.assert_close(poses.shifts_in_angstroms[:, half], truth.shifts_in_angstroms[:, 0])


def test_hypotheses_from_the_image_come_first_and_untouched_and_share_the_probability_with_the_others():
    images = torch.randn(4, 20, dtype=torch.complex64)
    probabilities = torch.rand(4, 3) + 0.1
    probabilities /= probabilities.sum(1, keepdim=True)
    poses = Poses(random_rotations(12).float().reshape(4, 3, 3, 3), torch.randn(4, 3, 2))
    encoder = SymmetrizedEncoder(KnownEncoder(images, poses, probabilities))
    found, direct = encoder(images), encoder.direct(images)
    assert torch.equal(found.poses.rotations[:, :3], poses.rotations)
    assert torch.equal(found.poses.shifts_in_angstroms[:, :3], poses.shifts_in_angstroms)
    assert torch.equal(direct.poses.rotations, poses.rotations)
    assert_probabilities(found.log_probabilities)
    torch.testing.assert_close(found.log_probabilities.exp()[:, :3], probabilities / 2)
    torch.testing.assert_close(found.log_probabilities.exp()[:, 3:], probabilities.flip(0) / 2)
    torch.testing.assert_close(direct.log_probabilities.exp(), probabilities)


# ------------------------------------------------------------------------------ equivariant

# Contained in a box of 32 pixels, and gone at 12 Fourier pixels.
SMOOTH = GaussianPhantom(
    torch.tensor([[3.0, 0.5, -1.0], [-2.5, 2.2, 0.5], [0.3, -3.1, 1.8], [-1.7, 1.0, -2.7]], dtype=torch.float64),
    torch.tensor([1.0, 0.8, 1.2, 0.6], dtype=torch.float64),
    torch.tensor([2.0, 2.2, 1.9, 2.1], dtype=torch.float64),
)


def about_z(degrees):
    return torch.from_numpy(Rotation.from_euler("z", degrees, degrees=True).as_matrix())


def views_turned(degrees, n=5, n_pixels=32):
    """Coefficients, from the closed form, of ``n`` views of the smooth phantom, turned in the plane, x towards y."""
    disc = FourierDisc.of_box(n_pixels, dtype=torch.float64)
    turn = about_z(degrees)
    displacements = 1.5 * torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    # Seen from a direction turned the other way, the content turns.
    images = [
        SMOOTH.image_coefficients(disc.coordinates, n_pixels, rotation @ turn.T, turn[:2, :2] @ displacement)
        for rotation, displacement in zip(random_rotations(n, seed=3), displacements, strict=True)
    ]
    return torch.stack(images).to(torch.complex64)


def assert_same_hypotheses(found, expected, atol=2e-3):
    torch.testing.assert_close(found.poses.rotations, expected.poses.rotations, atol=atol, rtol=0)
    torch.testing.assert_close(
        found.poses.shifts_in_angstroms, expected.poses.shifts_in_angstroms, atol=20 * atol, rtol=0
    )
    torch.testing.assert_close(found.log_probabilities, expected.log_probabilities, atol=10 * atol, rtol=0)


def turned_by_places(hypotheses, k, degrees):
    """What an equivariant encoder must say of images turned by ``degrees``, which are ``k`` places."""
    turn = about_z(degrees).float()
    return Hypotheses(
        Poses(
            hypotheses.poses.rotations.roll(k, 1) @ turn.T,
            hypotheses.poses.shifts_in_angstroms.roll(k, 1) @ turn[:2, :2].T,
        ),
        hypotheses.log_probabilities.roll(k, 1),
    )


def test_views_from_the_closed_form_turn_as_images_do():
    """The ruler itself: a quarter turn of the image in real space, about pixel 16."""
    disc = FourierDisc.of_box(32)
    straight, turned = (disc.to_images(views_turned(degrees)) for degrees in (0.0, 90.0))
    # x towards y is from the second axis of the array towards the first; row 0 has no partner.
    by_hand = torch.zeros_like(straight)
    for y in range(1, 32):
        for x in range(1, 32):
            by_hand[:, x, 32 - y] = straight[:, y, x]
    torch.testing.assert_close(turned[:, 1:, 1:], by_hand[:, 1:, 1:], atol=1e-4 * float(straight.max()), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("n_hypotheses", "k"), [(16, 1), (16, 5), (16, 8), (16, -3), (64, 7), (4, 1), (2, 1), (8, 0)])
def test_a_turn_of_the_image_moves_the_hypotheses_by_places_and_turns_their_poses(n_hypotheses, k):
    encoder = settled(small_polar_encoder(n_hypotheses=n_hypotheses), views_turned(0.0, n=20))
    degrees = 360.0 * k / n_hypotheses
    straight, turned = encoder(views_turned(0.0)), encoder(views_turned(degrees))
    assert_same_hypotheses(turned, turned_by_places(straight, k, degrees))
    # Not because all images are answered alike, nor all places.
    assert straight.poses.rotations.std(dim=0).max() > 0.1
    assert straight.log_probabilities.std(dim=1).min() > 0.05
    if k:
        assert (turned.log_probabilities - straight.log_probabilities).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_quarter_turn_of_noise_in_real_space_moves_the_hypotheses_by_a_quarter_of_the_places(k):
    """In an odd box, whose pixels a quarter turn about the centre maps onto one another."""
    images = torch.randn(6, 33, 33)
    # From the second axis (x) towards the first (y).
    turned = images.rot90(k, (2, 1))
    assert torch.equal(turned[:, 16, 16], images[:, 16, 16])
    assert k != 1 or torch.equal(turned[:, 20, 16], images[:, 16, 20])
    disc = FourierDisc.of_box(33)
    encoder = settled(small_polar_encoder(33), disc.from_images(images))
    straight, moved = (encoder(disc.from_images(i)) for i in (images, turned))
    assert_same_hypotheses(moved, turned_by_places(straight, 4 * k, 90.0 * k))


@torch.no_grad()
def test_of_the_half_turned_image_the_polar_encoder_says_the_same_set_of_poses_half_turned():
    encoder = settled(small_polar_encoder(), views_turned(0.0, n=20))
    images = views_turned(0.0)
    straight, turned = encoder(images), encoder(images.conj())
    back = Hypotheses(turned.poses.turned_by_pi(), turned.log_probabilities)
    rolled = Hypotheses(
        Poses(back.poses.rotations.roll(8, 1), back.poses.shifts_in_angstroms.roll(8, 1)),
        back.log_probabilities.roll(8, 1),
    )
    assert_same_hypotheses(rolled, straight)


@pytest.mark.parametrize(("n_pixels", "max_radius"), [(32, 12), (33, 16), (24, 11), (48, 6), (32, 15)])
def test_polar_samples_are_the_transform_of_the_image_at_the_polar_points(n_pixels, max_radius):
    n_angles = 32
    disc = FourierDisc.of_box(n_pixels)
    p = disc.n_coefficients(max_radius)
    # Of an image without coefficients beyond, so that those up to the radius are the whole image.
    known = FourierDisc.of_box(n_pixels, dtype=torch.float64).from_images(
        torch.randn(3, n_pixels, n_pixels, dtype=torch.float64)
    )[:, :p]
    images = FourierDisc.of_box(n_pixels, dtype=torch.float64).to_images(known)
    samples = polar_samples(disc, max_radius, n_angles)
    assert samples.shape == (2 * p, 2 * max_radius * n_angles)
    found = torch.cat([known.real, known.imag], dim=1).float() @ samples
    real, imaginary = found.reshape(3, 2, max_radius, n_angles).unbind(1)
    angle = 2 * math.pi * torch.arange(n_angles, dtype=torch.float64) / n_angles
    for ring in range(max_radius):
        points = (ring + 1) / n_pixels * torch.stack([angle.cos(), angle.sin()], dim=-1)
        for i, image in enumerate(images):
            expected = direct_image_transform(image, points)
            torch.testing.assert_close(
                torch.complex(real, imaginary)[i, ring].to(expected), expected, atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("n_hypotheses", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("max_radius", [4, 12, 16])
def test_the_polar_encoder_has_as_many_hypotheses_as_places_whatever_the_band_limit(n_hypotheses, max_radius):
    encoder = small_polar_encoder(max_radius=max_radius, n_hypotheses=n_hypotheses, max_shift_in_angstroms=7.0, width=4)
    hypotheses = encoder(100 * random_coefficients(4))
    assert hypotheses.poses.rotations.shape == (4, n_hypotheses, 3, 3)
    assert hypotheses.log_probabilities.shape == (4, n_hypotheses)
    # Of a place each axis is bounded; the axes are turned.
    assert_rotations_and_shifts_within(hypotheses.poses, 7.0 * math.sqrt(2))
    assert_probabilities(hypotheses.log_probabilities)


def test_shifts_of_the_polar_encoder_stay_within_their_bound_whatever_the_head_says():
    encoder = small_polar_encoder(n_hypotheses=4, max_shift_in_angstroms=7.0)
    with torch.no_grad():
        encoder.head[-1].bias[6:8] = torch.tensor([1000.0, -1000.0])
        shifts = encoder(random_coefficients(4)).poses.shifts_in_angstroms
    # The same answer at every place, turned with the place.
    corners = torch.tensor([[7.0, -7.0], [7.0, 7.0], [-7.0, 7.0], [-7.0, -7.0]])
    torch.testing.assert_close(shifts, corners.expand(4, 4, 2), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_polar_encoder_is_blind_to_contrast_the_mean_and_what_is_beyond_its_band_limit():
    coefficients = random_coefficients(4)
    encoder = settled(small_polar_encoder(), coefficients)
    p = FourierDisc.of_box(32).n_coefficients(12)
    beyond = coefficients.clone()
    beyond[:, p:] *= -5
    seen = encoder(coefficients)
    assert torch.equal(encoder(beyond).poses.rotations, seen.poses.rotations)
    assert torch.equal(encoder(coefficients[:, :p]).poses.rotations, seen.poses.rotations)
    assert_same_hypotheses(encoder(1e-3 * coefficients), seen)
    within = coefficients.clone()
    within[:, p - 10 : p] *= -5
    assert (encoder(within).poses.rotations - seen.poses.rotations).norm(dim=(-2, -1)).max() > 0.05


def test_in_evaluation_the_polar_encoder_reads_a_batch_like_its_images_one_by_one():
    coefficients = random_coefficients(5)
    encoder = settled(small_polar_encoder(), coefficients)
    with torch.no_grad():
        assert_batch_equals_loop(lambda x: encoder(x).poses.rotations, coefficients, atol=1e-4)
        assert_batch_equals_loop(lambda x: encoder(x).poses.shifts_in_angstroms, coefficients, atol=1e-3)
        assert_batch_equals_loop(lambda x: encoder(x).log_probabilities, coefficients, atol=1e-4)


def test_what_is_computed_and_not_learned_is_not_among_the_weights():
    encoder = small_polar_encoder()
    learned = {name for name, _ in encoder.named_parameters()}
    statistics = {name for name in encoder.state_dict() if "running" in name or "num_batches" in name}
    assert set(encoder.state_dict()) == learned | statistics


@pytest.mark.parametrize("kind", ["polar", "convolutional"])
@pytest.mark.parametrize("symmetrization", ["none", "half-turn"])
def test_an_architecture_builds_the_encoder_that_it_describes(kind, symmetrization):
    architecture = EncoderArchitecture(kind, 4, 8, 5.0, symmetrization)
    encoder = architecture.build(FourierDisc.of_box(32), 10)
    assert isinstance(encoder, SymmetrizedEncoder) == (symmetrization == "half-turn")
    inner = encoder.encoder if symmetrization == "half-turn" else encoder
    assert isinstance(inner, {"polar": PolarEncoder, "convolutional": ConvolutionalEncoder}[kind])
    assert encoder.n_hypotheses == (8 if symmetrization == "half-turn" else 4)
    hypotheses = encoder(random_coefficients(3))
    assert hypotheses.log_probabilities.shape == (3, encoder.n_hypotheses)
    assert_rotations_and_shifts_within(hypotheses.poses, 5.0 * math.sqrt(2))
