import pytest
import torch

from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel, slice_points
from cryoai.poses import Poses
from oracles import make_optics, random_rotations, textbook_ctf
from properties import assert_batch_equals_loop, unchanged

PIXEL = 3.0


@pytest.fixture(params=[24, 25])
def imaging(request):
    return ImagingModel(FourierDisc.of_box(request.param), PIXEL, 9)


def random_poses(*shape, seed=0):
    rotations = random_rotations(torch.Size(shape).numel(), seed).float().reshape(*shape, 3, 3)
    return Poses(rotations, 4 * torch.randn(*shape, 2))


def volume_of(phantom, imaging):
    return lambda frequencies: phantom.transform(frequencies, imaging.disc.n_pixels).to(torch.complex64)


def test_a_slice_is_read_where_the_rotation_takes_the_image_plane():
    rotations, coordinates = random_rotations(5), torch.randn(7, 2, dtype=torch.float64)
    points = slice_points(rotations, coordinates)
    in_plane = torch.cat([coordinates, torch.zeros(7, 1)], dim=1)
    for rotation, found in zip(rotations, points, strict=True):
        torch.testing.assert_close(found, torch.stack([rotation @ k for k in in_plane]))


def test_a_prediction_is_the_projection_seen_through_the_ctf(phantom, imaging):
    poses, optics = random_poses(3), make_optics(defocus_u_in_angstroms=[9000.0, 12000.0, 16000.0])
    n, volume = imaging.disc.n_pixels, volume_of(phantom, imaging)
    with unchanged(poses, optics, imaging.disc):
        predicted = imaging.predict(volume, poses, optics)
    for i, u in enumerate(optics.defocus_u_in_angstroms.tolist()):
        # The content sits at minus the origin.
        image = phantom.projection(n, poses.rotations[i], -poses.shifts_in_angstroms[i] / PIXEL)
        disc = FourierDisc.of_box(n, dtype=torch.float64)
        coefficients = disc.from_images(image)[: imaging.n_coefficients]
        exact = coefficients * textbook_ctf(imaging.coordinates, defocus_u_in_angstroms=u)
        # The CTF is within 3e-3; the image is cut off by the edge of the box at about 1e-3.
        assert (predicted[i] - exact).abs().max() < 4e-3 * coefficients.abs().max()


def test_other_pixel_sizes_scale_the_frequencies_and_shifts(phantom, imaging):
    poses, sizes = random_poses(2), torch.tensor([2.5, 3.6])
    optics = make_optics(pixel_size_in_angstroms=sizes)
    predicted = imaging.predict(volume_of(phantom, imaging), poses, optics)
    for i, size in enumerate(sizes.tolist()):
        # Physical frequencies in cycles per pixel of the volume.
        k = imaging.coordinates.double() * PIXEL / size
        displacement = -poses.shifts_in_angstroms[i] / PIXEL
        exact = phantom.image_coefficients(k, imaging.disc.n_pixels, poses.rotations[i], displacement)
        exact = exact * textbook_ctf(imaging.coordinates, pixel_size_in_angstroms=size)
        assert (predicted[i] - exact).abs().max() < 4e-3 * exact.abs().max()


@pytest.mark.parametrize("hypotheses", [(), (4,), (2, 3)])
def test_a_batch_of_hypotheses_equals_a_loop(phantom, imaging, hypotheses):
    poses = random_poses(3, *hypotheses)
    optics = make_optics(defocus_u_in_angstroms=[9000.0, 12000.0, 16000.0], pixel_size_in_angstroms=[3.0, 3.2, 3.0])
    volume = volume_of(phantom, imaging)

    def predict(rows, rotations, shifts):
        return imaging.predict(volume, Poses(rotations, shifts), optics[rows])

    # The CTF is in single precision, and a batch is divided by microscope.
    assert_batch_equals_loop(predict, torch.arange(3), poses.rotations, poses.shifts_in_angstroms, atol=1e-3)
    together = imaging.predict(volume, poses, optics).reshape(3, -1, imaging.n_coefficients)
    flat = Poses(poses.rotations.reshape(3, -1, 3, 3), poses.shifts_in_angstroms.reshape(3, -1, 2))
    for h in range(together.shape[1]):
        torch.testing.assert_close(together[:, h], imaging.predict(volume, flat[:, h], optics))


def test_turning_images_by_pi_conjugates_their_prediction(phantom, imaging):
    poses, optics = random_poses(4), make_optics(4)
    volume = volume_of(phantom, imaging)
    straight, turned = (imaging.predict(volume, p, optics) for p in (poses, poses.turned_by_pi()))
    torch.testing.assert_close(turned, straight.conj())


def test_the_band_limit_selects_a_prefix(imaging):
    assert imaging.shells.max() == 9
    assert len(imaging.coordinates) == len(imaging.shells) == imaging.n_coefficients
    assert imaging.ctf(make_optics(2)).shape == (2, imaging.n_coefficients)
