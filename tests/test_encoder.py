import pytest
import torch

from cryoai.encoder import GaussianLowPassBank, PoseEncoder
from properties import assert_batch_equals_loop, unchanged


def small_encoder(n_pixels=32, **options):
    return PoseEncoder(n_pixels, **{"n_hypotheses": 3, "max_shift_in_angstroms": 20.0, "width": 4, **options})


@torch.no_grad()
def settled(encoder, images):
    """The encoder ready for evaluation: BatchNorm knows what the features of images like these are like."""
    for _ in range(60):
        encoder(images)
    return encoder.eval()


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


def test_at_published_size_the_encoder_has_the_published_number_of_parameters():
    encoder = PoseEncoder(128, n_hypotheses=1, max_shift_in_angstroms=20.0, width=64)
    assert n_parameters(encoder.features) == 4_101_312
    assert n_parameters(encoder.rotation_heads) == 657_152 + 1_542
    assert n_parameters(encoder.shift_head) == 656_642
    assert n_parameters(encoder) == 5_416_648


@pytest.mark.parametrize("n_pixels", [32, 48, 64, 66])
def test_poses_are_rotations_and_bounded_shifts_for_any_box(n_pixels):
    encoder = small_encoder(n_pixels, max_shift_in_angstroms=7.0)
    poses = encoder(100 * torch.randn(4, n_pixels, n_pixels))
    assert poses.rotations.shape == (4, 3, 3, 3)
    assert poses.shifts_in_angstroms.shape == (4, 3, 2)
    rotations = poses.rotations.double()
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotations)
    torch.testing.assert_close(rotations @ rotations.transpose(-1, -2), identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(4, 3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (poses.shifts_in_angstroms.abs() <= 7.0).all()
    assert poses.shifts_in_angstroms.abs().max() > 0


def test_shifts_stay_within_their_bound_whatever_the_head_says():
    encoder = small_encoder(max_shift_in_angstroms=7.0)
    with torch.no_grad():
        encoder.shift_head[-1].bias.copy_(torch.tensor([100.0, -100.0]))
        shifts = encoder(torch.randn(4, 32, 32)).shifts_in_angstroms
    torch.testing.assert_close(shifts, torch.tensor([7.0, -7.0]).expand(4, 3, 2))


def test_in_evaluation_a_batch_is_read_like_its_images_one_by_one():
    images = torch.randn(5, 32, 32)
    encoder = settled(small_encoder(), images)
    with torch.no_grad():
        assert_batch_equals_loop(lambda x: encoder(x).rotations, images, atol=1e-4)
        assert_batch_equals_loop(lambda x: encoder(x).shifts_in_angstroms, images, atol=1e-3)
        # Not because all images were read alike.
        assert encoder(images).rotations.std(dim=0).max() > 0.1


def test_the_encoder_is_blind_to_brightness_and_contrast_but_not_to_a_half_turn():
    images = torch.randn(4, 32, 32)
    encoder = settled(small_encoder(), images)
    with torch.no_grad():
        seen, rescaled, turned = (encoder(x).rotations for x in (images, 40 * images + 7, images.flip(-1, -2)))
    torch.testing.assert_close(rescaled, seen, atol=1e-3, rtol=0)
    assert (turned - seen).norm(dim=(-2, -1)).min() > 0.05


def test_a_constant_image_gets_finite_poses_and_gradients():
    encoder = small_encoder()
    poses = encoder(torch.cat([torch.zeros(2, 32, 32), torch.randn(2, 32, 32)]))
    (poses.rotations.sum() + poses.shifts_in_angstroms.sum()).backward()
    assert torch.isfinite(poses.rotations).all()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
