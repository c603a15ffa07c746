"""Optics groups that differ in pixel size, box and strength of the signal, brought to one working box."""

import numpy as np
import pytest
import torch

from cryoai.contrast import PowerOfGroups
from cryoai.fourier import FourierDisc
from cryoai.optics import contrast_transfer_function
from cryoai.particle_stack import ParticleStack
from cryoai.particles import prepare_particles
from cryoai.working_box import default_working_box
from oracles import direct_image_transform, make_optics
from stacks import OPTICS, particle_columns, write_images, write_star

BOX, PIXEL = 48, 3.0
EXTENT = BOX * PIXEL


def noise(n, n_pixels, seed=0):
    return np.random.default_rng(seed).normal(size=(n, n_pixels, n_pixels)).astype(np.float32)


def two_groups(folder, images, pixel_size):
    """A stack of 5 images of BOX pixels of PIXEL Å, and of given images (M, n, n) of another optics group."""
    write_images(folder / "a.mrcs", noise(5, BOX), PIXEL)
    write_images(folder / "b.mrcs", images, pixel_size)
    names = [f"{i + 1}@a.mrcs" for i in range(5)] + [f"{i + 1}@b.mrcs" for i in range(len(images))]
    optics = {name: cells * 2 for name, cells in OPTICS.items()}
    optics |= {"rlnOpticsGroup": [1, 2], "rlnImagePixelSize": [PIXEL, pixel_size]}
    groups = {"rlnImageName": names, "rlnOpticsGroup": [1] * 5 + [2] * len(images)}
    # The second group comes first in the file.
    order = np.argsort(groups["rlnOpticsGroup"], kind="stable")[::-1]
    columns = {name: [cells[i] for i in order] for name, cells in (particle_columns(len(names)) | groups).items()}
    return ParticleStack.open(write_star(folder / "p.star", columns, optics))


def normalised(image):
    n = image.shape[-1]
    offset = np.arange(n) - n // 2
    outside = image[offset[:, None] ** 2 + offset**2 > (0.9 * n / 2) ** 2].astype(np.float64)
    return torch.from_numpy((image.astype(np.float64) - outside.mean()) / outside.std(ddof=1))


# Same extent with finer pixels; larger and smaller extents; pixels that do not fit a whole number of times.
GROUPS = [(96, 1.5), (64, 3.0), (40, 3.0), (64, 2.5), (58, 2.9), (36, 3.7)]


@pytest.mark.parametrize(("n_pixels", "pixel_size"), GROUPS)
def test_images_of_another_group_are_transformed_at_the_same_frequencies_per_angstrom(tmp_path, n_pixels, pixel_size):
    images = noise(3, n_pixels, seed=1)
    stack = two_groups(tmp_path, images, pixel_size)
    assert (stack.n_pixels, stack.pixel_size_in_angstroms) == (BOX, PIXEL)
    assert stack.image_sizes.tolist() == [n_pixels] * 3 + [BOX] * 5
    working_box = 32
    prepared = prepare_particles(stack, working_box, tmp_path / "c.f16", sign=1)
    found = prepared.batch(torch.arange(3))
    disc = prepared.disc
    per_angstrom = disc.indices.double() / EXTENT
    kept = min(n_pixels, 2 * int(EXTENT / pixel_size / 2))
    margin = n_pixels // 2 - kept // 2
    for i in range(3):
        image = normalised(images[2 - i])[margin : margin + kept, margin : margin + kept]
        expected = direct_image_transform(image, per_angstrom * pixel_size)
        # Stored in half precision.
        torch.testing.assert_close(found.coefficients[i].to(torch.complex128), expected, atol=4e-3, rtol=2e-3)
    torch.testing.assert_close(found.optics.pixel_size_in_angstroms, torch.full((3,), EXTENT / working_box))


@pytest.mark.parametrize(("n_pixels", "pixel_size"), GROUPS)
def test_white_noise_keeps_its_variance(tmp_path, n_pixels, pixel_size):
    stack = two_groups(tmp_path, noise(300, n_pixels, seed=2), pixel_size)
    # The second group is the larger one here.
    assert stack.pixel_size_in_angstroms == pixel_size
    prepared = prepare_particles(stack, 32, tmp_path / "c.f16", sign=1)
    power = prepared.batch(torch.arange(300)).coefficients[:, 1:].abs().square().mean()
    assert power == pytest.approx(1, rel=0.02)


def test_pixels_too_coarse_for_the_working_box_are_named(tmp_path):
    stack = two_groups(tmp_path, noise(3, 36, seed=1), 4.0)
    with pytest.raises(Exception, match=r"particle row 1 has pixels of 4 Å, too coarse for 48 pixels in 144 Å"):
        prepare_particles(stack, 48, tmp_path / "c.f16")


def test_groups_are_told_apart_by_microscope_and_image(tmp_path):
    stack = two_groups(tmp_path, noise(3, 64, seed=1), PIXEL)
    group = stack.optics_group
    assert len(group.unique()) == 2
    assert (group[:3] == group[0]).all()
    assert (group[3:] == group[3]).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_strength_of_the_signal_in_a_group_is_found(scale):
    disc = FourierDisc.of_box(32)
    generator = torch.Generator().manual_seed(0)
    n = 3000
    group = torch.arange(n) % 3 // 2  # two thirds in the first group
    strength = torch.where(group == 1, scale, 1.0)
    optics = make_optics(
        defocus_u_in_angstroms=8000 + 12000 * torch.rand(n, generator=generator),
        voltage_in_kilovolts=torch.where(group == 1, 200.0, 300.0),
        pixel_size_in_angstroms=5.0,
    )
    spectrum = 4 * torch.exp(-((disc.radii / 4) ** 2))

    def white():
        return torch.view_as_complex(torch.randn(n, disc.n_coefficients(), 2, generator=generator)) / 2**0.5

    signal = spectrum * white() * contrast_transfer_function(optics, disc)
    power = PowerOfGroups(group, disc)
    power.add(torch.arange(n), strength[:, None] * signal + white(), optics)
    found = power.scales()
    assert (found[group == 0] == 1).all()
    assert found[group == 1].unique().item() == pytest.approx(scale, rel=0.08)


def test_one_group_has_scale_one_and_costs_nothing():
    power = PowerOfGroups(torch.zeros(5, dtype=torch.long), FourierDisc.of_box(32))
    assert (power.scales() == 1).all()


def test_the_default_working_box_has_the_frequencies_of_all_images():
    many, few = np.full(10, 3.0), np.full(3, 4.0)
    sizes = np.full(13, 64)
    assert default_working_box(many, np.full(10, 64)) == 64
    assert default_working_box(many, np.full(10, 300)) == 128
    # 64 pixels of 3 A are 48 of 4 A.
    assert default_working_box(np.concatenate([many, few]), sizes) == 48
    assert default_working_box(np.concatenate([many, np.full(3, 1.5)]), sizes) == 64
    # 192 A / 3.9 A = 49.2: an even number of pixels.
    assert default_working_box(np.concatenate([many, np.full(3, 3.9)]), sizes) == 48
    for pixel_size in (1.05, 0.637, 3.822, 5.5):
        assert default_working_box(np.full(4, pixel_size), np.full(4, 98)) == 98
