import pytest
import torch

from cryoai.fourier import FourierDisc
from cryoai.optics import contrast_transfer_function
from oracles import MICROSCOPE, make_optics, textbook_ctf
from properties import assert_batch_equals_loop, unchanged

# The accuracy that the package states for single precision.
TOLERANCE = 3e-3

CHANGES = {
    "pixel_size_in_angstroms": 2.4,
    "voltage_in_kilovolts": 200.0,
    "spherical_aberration_in_mm": 0.01,
    "amplitude_contrast": 0.3,
    "defocus_u_in_angstroms": 18000.0,
    "defocus_v_in_angstroms": 7000.0,
    "defocus_angle_in_degrees": -60.0,
    "phase_shift_in_degrees": 70.0,
    "contrast_scale": 1.7,
    "b_factor_in_square_angstroms": 80.0,
}


def along_x(disc, ctf):
    """The profile of a CTF along the x axis, by Fourier pixel."""
    return ctf[..., (disc.indices[:, 1] == 0).nonzero().flatten()]


def first_zero(disc, ctf):
    return int((along_x(disc, ctf) < 0).int().argmax())


@pytest.mark.parametrize("n", [64, 65])
@pytest.mark.parametrize("name", [None, *CHANGES])
def test_the_ctf_is_the_textbook_formula(n, name):
    changes = {} if name is None else {name: CHANGES[name]}
    disc, optics = FourierDisc.of_box(n, dtype=torch.float64), make_optics(**changes)
    with unchanged(optics):
        ctf = contrast_transfer_function(optics, disc)[0].double()
    assert (ctf - textbook_ctf(disc.coordinates, **changes)).abs().max() < TOLERANCE


def test_the_ctf_is_the_textbook_formula_at_high_resolution_and_defocus():
    changes = {"pixel_size_in_angstroms": 1.1, "defocus_u_in_angstroms": 30000.0, "defocus_v_in_angstroms": 28000.0}
    disc = FourierDisc.of_box(192, dtype=torch.float64)
    ctf = contrast_transfer_function(make_optics(**changes), disc)[0].double()
    assert (ctf - textbook_ctf(disc.coordinates, **changes)).abs().max() < TOLERANCE


def test_every_parameter_changes_the_ctf():
    assert CHANGES.keys() == MICROSCOPE.keys()
    disc = FourierDisc.of_box(64)
    standard = contrast_transfer_function(make_optics(), disc)
    for name, value in CHANGES.items():
        changed = contrast_transfer_function(make_optics(**{name: value}), disc)
        assert (changed - standard).abs().max() > 10 * TOLERANCE, name


def test_naming_the_smaller_defocus_first_turns_the_axis_by_a_right_angle():
    disc = FourierDisc.of_box(64)
    first = make_optics(
        defocus_u_in_angstroms=9000.0, defocus_v_in_angstroms=15000.0, defocus_angle_in_degrees=[0.0, 25.0, 130.0]
    )
    second = make_optics(
        defocus_u_in_angstroms=15000.0, defocus_v_in_angstroms=9000.0, defocus_angle_in_degrees=[90.0, 115.0, 220.0]
    )
    a, b = contrast_transfer_function(first, disc), contrast_transfer_function(second, disc)
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_the_axis_of_defocus_u_is_counted_from_x():
    disc = FourierDisc.of_box(64)
    astigmatic = make_optics(
        defocus_u_in_angstroms=15000.0, defocus_v_in_angstroms=9000.0, defocus_angle_in_degrees=0.0
    )
    round_ = make_optics(defocus_u_in_angstroms=15000.0, defocus_v_in_angstroms=15000.0)
    profile, expected = (along_x(disc, contrast_transfer_function(o, disc)) for o in (astigmatic, round_))
    torch.testing.assert_close(profile, expected, atol=TOLERANCE, rtol=0)


def test_protein_is_bright_at_low_frequency_and_the_origin_shows_the_amplitude_contrast():
    disc = FourierDisc.of_box(64)
    ctf = contrast_transfer_function(make_optics(amplitude_contrast=[0.07, 0.1, 0.2]), disc)
    torch.testing.assert_close(ctf[:, 0], torch.tensor([0.07, 0.1, 0.2]), atol=1e-6, rtol=0)
    assert (ctf[:, : disc.n_coefficients(5)] > 0).all()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # More of each adds phase, fewer volts make longer waves, and smaller boxes have coarser Fourier pixels.
        ("defocus_u_in_angstroms", [12000.0, 18000.0, 24000.0]),
        ("phase_shift_in_degrees", [0.0, 45.0, 90.0]),
        ("amplitude_contrast", [0.05, 0.4, 0.8]),
        ("voltage_in_kilovolts", [300.0, 200.0, 100.0]),
        ("pixel_size_in_angstroms", [5.0, 4.0, 3.0]),
    ],
)
def test_the_first_zero_comes_at_an_ever_lower_fourier_pixel(name, values):
    disc = FourierDisc.of_box(128)
    profiles = contrast_transfer_function(make_optics(**{name: values, "defocus_angle_in_degrees": 0.0}), disc)
    zeros = [first_zero(disc, profile) for profile in profiles]
    assert zeros[0] > zeros[1] > zeros[2]


def test_spherical_aberration_works_against_underfocus():
    disc = FourierDisc.of_box(128)
    microscope = {"voltage_in_kilovolts": 100.0, "pixel_size_in_angstroms": 1.5, "defocus_angle_in_degrees": 0.0}
    optics = make_optics(**microscope, defocus_u_in_angstroms=3000.0, spherical_aberration_in_mm=[0.0, 2.7])
    without, with_ = contrast_transfer_function(optics, disc)
    assert first_zero(disc, with_) > first_zero(disc, without)


def test_the_b_factor_damps_as_a_gaussian():
    disc = FourierDisc.of_box(64)
    sharp, damped = contrast_transfer_function(make_optics(b_factor_in_square_angstroms=[0.0, 100.0]), disc)
    k = disc.radii / (64 * 3.0)
    torch.testing.assert_close(damped, sharp * torch.exp(-25 * k**2))


@pytest.mark.parametrize("max_radius", [None, 9, 100])
def test_mixed_microscopes_in_one_batch_equal_one_by_one(max_radius):
    disc = FourierDisc.of_box(33)
    optics = make_optics(
        voltage_in_kilovolts=[300.0, 200.0, 300.0, 300.0],
        pixel_size_in_angstroms=[3.0, 3.0, 2.5, 3.0],
        phase_shift_in_degrees=[0.0, 0.0, 0.0, 90.0],
        defocus_u_in_angstroms=[9000.0, 14000.0, 12000.0, 20000.0],
        b_factor_in_square_angstroms=[0.0, 50.0, 0.0, 20.0],
    )
    assert_batch_equals_loop(
        lambda i: contrast_transfer_function(optics[i], disc, max_radius), torch.arange(4), atol=TOLERANCE
    )


@pytest.mark.parametrize("n", [64, 65])
def test_a_band_limited_ctf_is_the_beginning_of_the_whole(n):
    disc, optics = FourierDisc.of_box(n), make_optics()
    whole, part = contrast_transfer_function(optics, disc), contrast_transfer_function(optics, disc, 10)
    assert part.shape == (1, disc.n_coefficients(10))
    torch.testing.assert_close(part, whole[:, : part.shape[1]], atol=TOLERANCE, rtol=0)


def test_fourier_cropping_keeps_the_ctf():
    large, small, optics = FourierDisc.of_box(64), FourierDisc.of_box(48), make_optics()
    cropped = contrast_transfer_function(optics.at_box(64, 48), small)
    assert optics.at_box(64, 48).pixel_size_in_angstroms.item() == pytest.approx(4.0)
    whole = contrast_transfer_function(optics, large)[:, : cropped.shape[1]]
    torch.testing.assert_close(cropped, whole, atol=TOLERANCE, rtol=0)
