import pytest
import torch

from cryoai.fourier import FourierDisc, fourier_shell_correlation, shell_sum, shells_of_volume, transform_map
from cryoai.imaging import ImagingModel
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses
from cryoai.reconstruction import ReconstructionSums
from oracles import GaussianPhantom, make_optics, random_rotations, textbook_ctf
from properties import unchanged

PIXEL = 3.0
RADIUS = 8


@pytest.fixture(params=[24, 25])
def imaging(request):
    return ImagingModel(FourierDisc.of_box(request.param), PIXEL, RADIUS)


def noise_free_images(phantom, imaging, n_images):
    """Shifted images at random rotations and eight defoci, from the closed form."""
    defoci = torch.linspace(8000, 22000, 8)[torch.arange(n_images) % 8]
    optics = make_optics(defocus_u_in_angstroms=defoci, defocus_v_in_angstroms=defoci)
    poses = Poses(random_rotations(n_images).float(), 5 * torch.randn(n_images, 2))
    k, n = imaging.coordinates.double(), imaging.disc.n_pixels
    ctfs = {u: textbook_ctf(k, defocus_u_in_angstroms=u, defocus_v_in_angstroms=u) for u in defoci[:8].tolist()}
    coefficients = [
        phantom.image_coefficients(k, n, rotation, -shift / PIXEL) * ctfs[u]
        for rotation, shift, u in zip(poses.rotations, poses.shifts_in_angstroms, defoci.tolist(), strict=True)
    ]
    return ParticleBatch(torch.arange(n_images), torch.stack(coefficients).to(torch.complex64), optics), poses


def part(batch, poses, rows):
    return ParticleBatch(batch.indices[rows], batch.coefficients[rows], batch.optics[rows]), poses[rows]


def summed(batch, poses, imaging, **options):
    sums = ReconstructionSums.empty(imaging.disc.n_pixels, imaging.max_radius)
    sums.add(batch, poses, imaging, torch.ones(imaging.n_coefficients), **options)
    return sums


def test_noise_free_images_at_known_poses_give_the_map_back(phantom, imaging):
    n = imaging.disc.n_pixels
    batch, poses = noise_free_images(phantom, imaging, 1200)
    sums, precision = ReconstructionSums.empty(n, RADIUS), torch.ones(imaging.n_coefficients)
    with unchanged(batch, poses, precision):
        sums.add(batch, poses, imaging, precision)
    with unchanged(sums):
        density = sums.solve(torch.zeros(RADIUS + 1))
    truth = phantom.density(n)
    assert (fourier_shell_correlation(density, truth)[: RADIUS + 1] > 0.99).all()
    # The scale is right too, not only the correlation: the phantom has next to nothing beyond the band.
    assert (density - truth).norm() < 0.1 * truth.norm()


def test_matter_far_from_the_centre_is_not_dimmed_by_the_interpolation(imaging):
    # At 7 pixels from the centre of the box the falloff of the interpolation is 7 %.
    spot = GaussianPhantom(*(torch.tensor(v, dtype=torch.float64) for v in ([[7.0, 0.0, 0.0]], [1.0], [1.5])))
    batch, poses = noise_free_images(spot, imaging, 2000)
    density = summed(batch, poses, imaging).solve(torch.zeros(RADIUS + 1))
    truth = spot.density(imaging.disc.n_pixels)
    assert (density * truth).sum() / truth.square().sum() == pytest.approx(1, abs=0.03)


def test_a_quarter_turn_of_the_frame_turns_the_map(phantom, imaging):
    # So few images leave gaps: they show whether the plane x = 0 is treated as any other.
    batch, poses = noise_free_images(phantom, imaging, 10)
    turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    turned_poses, prior = Poses(turn @ poses.rotations, poses.shifts_in_angstroms), torch.ones(RADIUS + 1)
    # Index 0 of an even box has no partner across the centre.
    first = 1 - imaging.disc.n_pixels % 2
    straight, turned = (summed(batch, p, imaging).solve(prior)[first:, first:, first:] for p in (poses, turned_poses))
    torch.testing.assert_close(turned, straight.transpose(1, 2).flip(2), atol=1e-4, rtol=0)


def test_shells_beyond_a_lower_limit_are_left_empty(phantom, imaging):
    batch, poses = noise_free_images(phantom, imaging, 300)
    n, sums, prior = imaging.disc.n_pixels, summed(batch, poses, imaging), torch.zeros(RADIUS + 1)
    low, whole = sums.solve(prior, max_radius=4), sums.solve(prior)
    assert (fourier_shell_correlation(low, whole)[:4] > 0.99).all()
    shells, weights = shells_of_volume(n)
    power = [
        shell_sum((transform_map(density).abs() ** 2 * weights).flatten(), shells.flatten(), int(shells.max()) + 1)
        for density in (low, whole)
    ]
    # The correction of the falloff and the cut-off of the padding spread a little over the edge of the band.
    assert (power[0][6 : RADIUS + 1] < 0.1 * power[1][6 : RADIUS + 1]).all()


def test_two_halves_sum_to_the_whole(phantom, imaging):
    batch, poses = noise_free_images(phantom, imaging, 40)
    whole = summed(batch, poses, imaging)
    halves = [summed(*part(batch, poses, rows), imaging) for rows in (torch.arange(0, 40, 2), torch.arange(1, 40, 2))]
    with unchanged(*halves):
        torch.testing.assert_close((halves[0] + halves[1]).sums, whole.sums, atol=1e-4, rtol=1e-4)
    again = ReconstructionSums.empty(imaging.disc.n_pixels, RADIUS)
    for rows in (slice(0, 10), slice(10, 40)):
        again.add(*part(batch, poses, rows), imaging, torch.ones(imaging.n_coefficients))
    torch.testing.assert_close(again.sums, whole.sums, atol=1e-4, rtol=1e-4)


def test_weights_scale_the_sums_and_several_poses_share_an_image(phantom, imaging):
    batch, poses = noise_free_images(phantom, imaging, 20)
    whole = summed(batch, poses, imaging)
    torch.testing.assert_close(summed(batch, poses, imaging, weight=0.25).sums, 0.25 * whole.sums)
    twice = Poses(poses.rotations[:, None].expand(-1, 2, -1, -1), poses.shifts_in_angstroms[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(summed(batch, twice, imaging, weight=0.5).sums, whole.sums, atol=1e-4, rtol=1e-4)
    remembered = summed(batch, poses, imaging)
    remembered.forget(0.9)
    torch.testing.assert_close(remembered.sums, 0.9 * whole.sums)


def test_the_prior_shrinks_each_shell_by_its_share_of_the_information(phantom, imaging):
    batch, poses = noise_free_images(phantom, imaging, 200)
    sums = summed(batch, poses, imaging)
    mean_weight = sums.mean_weight()
    assert (mean_weight > 0).all()
    without = sums.solve(torch.zeros(RADIUS + 1))
    strong = sums.solve(1e6 * mean_weight)
    assert strong.norm() < 1e-5 * without.norm()
    # Only the ratio of information and prior matters.
    doubled = ReconstructionSums(sums.lattice, 2 * sums.sums)
    torch.testing.assert_close(doubled.mean_weight(), 2 * mean_weight)
    torch.testing.assert_close(doubled.solve(2 * mean_weight), sums.solve(mean_weight))


def test_an_unused_origin_gathers_no_information_and_leaves_the_map_finite(phantom, imaging):
    batch, poses = noise_free_images(phantom, imaging, 200)
    sums = ReconstructionSums.empty(imaging.disc.n_pixels, RADIUS)
    sums.add(batch, poses, imaging, (imaging.shells > 0).float())
    assert sums.mean_weight()[0] == 0
    assert (sums.mean_weight()[1:] > 0).all()
    assert torch.isfinite(sums.solve(torch.zeros(RADIUS + 1))).all()
