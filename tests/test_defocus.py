from dataclasses import fields, replace

import pytest
import torch

from cryoai.defocus import _slope_by_defocus, refine_defocus, with_defocus_changed
from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.particles import ParticleBatch
from cryoai.poses import Poses
from oracles import MICROSCOPE, GaussianPhantom, make_optics, random_rotations, textbook_ctf
from properties import unchanged

BOX, PIXEL, RADIUS, N = 48, 2.2, 21, 150
PRIOR = 300.0
DEFOCI = torch.linspace(9000, 21000, N)

CHANGES = {
    "pixel_size_in_angstroms": 2.4,
    "voltage_in_kilovolts": 200.0,
    "spherical_aberration_in_mm": 0.01,
    "amplitude_contrast": 0.3,
    "defocus_u_in_angstroms": 18000.0,
    "defocus_angle_in_degrees": -60.0,
    "phase_shift_in_degrees": 70.0,
    "contrast_scale": 1.7,
    "b_factor_in_square_angstroms": 80.0,
}


@pytest.fixture
def imaging():
    return ImagingModel(FourierDisc.of_box(BOX), PIXEL, RADIUS)


@pytest.fixture
def atoms():
    """The phantom of the other tests, as sharp as the frequencies that show the defocus need it."""
    example = GaussianPhantom.example()
    return GaussianPhantom(example.centres, example.amplitudes, example.widths / 3)


@pytest.fixture
def volume(atoms):
    return lambda points: atoms.transform(points, BOX).to(torch.complex64)


@pytest.fixture
def poses():
    return Poses(random_rotations(N).float(), 6 * torch.randn(N, 2))


def listed_optics():
    return make_optics(N, pixel_size_in_angstroms=PIXEL, defocus_u_in_angstroms=DEFOCI, defocus_v_in_angstroms=DEFOCI)


def closed_form_slices(atoms, imaging, poses):
    """Images (N, p) without a CTF, in double precision."""
    k = imaging.coordinates.double()
    pairs = zip(poses.rotations, poses.shifts_in_angstroms, strict=True)
    return torch.stack([atoms.image_coefficients(k, BOX, rotation, -shift / PIXEL) for rotation, shift in pairs])


def textbook_ctfs(imaging, optics, changes):
    """CTFs (N, p) of particles whose defocus is changed, in double precision, one after the other."""
    rows = [{name: float(values[i]) for name, values in vars(optics).items()} for i in range(len(optics))]
    for row, change in zip(rows, changes.tolist(), strict=True):
        row["defocus_u_in_angstroms"] += change
        row["defocus_v_in_angstroms"] += change
    return torch.stack([textbook_ctf(imaging.coordinates.double(), **row) for row in rows])


def noisy_batch(images, optics, deviation):
    noise = deviation * torch.randn(images.shape, dtype=torch.complex128)
    return ParticleBatch(torch.arange(len(images)), (images + noise).to(torch.complex64), optics)


def white(imaging, deviation):
    return torch.where(imaging.shells > 0, deviation**-2, 0.0)


def information(slices, imaging, optics, changes, precision):
    """Fisher information (N,) of the defocus at its true value, from finite differences."""
    step = 1.0
    above, below = (textbook_ctfs(imaging, optics, changes + sign * step) for sign in (1, -1))
    slopes = (above - below) / (2 * step)
    # The real and the imaginary part of a coefficient each have half of its variance.
    return 2 * (slopes.square() * slices.abs().square() * precision).sum(1)


def typical_power(slices, imaging, optics):
    """Mean power of a coefficient."""
    return (textbook_ctfs(imaging, optics, torch.zeros(N)) * slices).abs().square().mean()


def test_the_same_change_is_added_along_both_axes_and_nothing_else_changes():
    optics = make_optics(3, defocus_u_in_angstroms=14000.0, defocus_v_in_angstroms=11000.0)
    with unchanged(optics):
        changed = with_defocus_changed(optics, torch.tensor([0.0, 250.0, -400.0]))
    assert changed.defocus_u_in_angstroms.tolist() == [14000, 14250, 13600]
    assert changed.defocus_v_in_angstroms.tolist() == [11000, 11250, 10600]
    for item in fields(optics):
        if item.name not in ("defocus_u_in_angstroms", "defocus_v_in_angstroms"):
            assert torch.equal(getattr(changed, item.name), getattr(optics, item.name))


@pytest.mark.parametrize("box", [48, 49])
@pytest.mark.parametrize("name", [None, *CHANGES])
def test_the_slope_of_the_ctf_is_that_of_the_textbook_formula(box, name):
    changes = {} if name is None else {name: CHANGES[name]}
    parameters = {**MICROSCOPE, **changes}
    imaging = ImagingModel(FourierDisc.of_box(box), PIXEL, 20)
    slope = _slope_by_defocus(make_optics(1, **changes), imaging)[0].double()
    k, step = imaging.coordinates.double(), 0.1
    u, v = (parameters[f"defocus_{axis}_in_angstroms"] for axis in "uv")
    above, below = (
        textbook_ctf(k, **{**parameters, "defocus_u_in_angstroms": u + d, "defocus_v_in_angstroms": v + d})
        for d in (step, -step)
    )
    expected = (above - below) / (2 * step)
    # As exact as the CTF itself.
    assert (slope - expected).abs().max() < 3e-3 * expected.abs().max()


@pytest.mark.parametrize("snr", [1.0, 0.03])
def test_defoci_are_found_as_precisely_as_the_images_allow(atoms, volume, imaging, poses, snr):
    optics = listed_optics()
    errors = PRIOR * torch.randn(N)
    slices = closed_form_slices(atoms, imaging, poses)
    deviation = float((typical_power(slices, imaging, optics) / snr).sqrt())
    precision = white(imaging, deviation)
    batch = noisy_batch(textbook_ctfs(imaging, optics, errors) * slices, optics, deviation)
    with unchanged(batch, poses, precision):
        found = refine_defocus(batch, poses, volume, imaging, precision, prior_std_in_angstroms=PRIOR, n_iterations=5)
    # With errors drawn from the prior no estimate is closer to the truth in the mean square.
    bound = (information(slices, imaging, optics, errors, precision) + PRIOR**-2).rsqrt()
    deviations = (found - errors) / bound
    assert deviations.square().mean().sqrt() == pytest.approx(1, abs=0.15)
    assert deviations.abs().max() < 4.5
    # The two cases are what they are called: the images say nearly all, or little more than the prior.
    assert (bound.median() < 0.1 * PRIOR) == (snr == 1.0)
    assert (bound.median() > 0.3 * PRIOR) == (snr == 0.03)


def test_particles_of_all_kinds_of_microscopes_are_refined_together(atoms, volume, imaging, poses):
    optics = listed_optics()
    for name, value in CHANGES.items():
        if name != "pixel_size_in_angstroms":
            changed = torch.where(
                torch.arange(N) % len(CHANGES) == list(CHANGES).index(name), value, vars(optics)[name]
            )
            optics = replace(optics, **{name: changed})
    errors = torch.linspace(-600, 600, N)
    clean = textbook_ctfs(imaging, optics, errors) * closed_form_slices(atoms, imaging, poses)
    batch = noisy_batch(clean, optics, 0.0)
    precision = white(imaging, 1e-3 * float(clean.abs().square().mean().sqrt()))
    found = refine_defocus(batch, poses, volume, imaging, precision, prior_std_in_angstroms=PRIOR, n_iterations=8)
    # The CTF of the package is exact to 3e-3.
    torch.testing.assert_close(found, errors, atol=3.0, rtol=0)


def test_only_what_is_within_the_band_limit_is_looked_at(atoms, volume, imaging, poses):
    optics = listed_optics()
    clean = textbook_ctfs(imaging, optics, torch.full((N,), 200.0)) * closed_form_slices(atoms, imaging, poses)
    batch = noisy_batch(clean, optics, 0.0)
    coarse = replace(imaging, max_radius=12)
    spoiled = batch.coefficients.clone()
    spoiled[:, coarse.n_coefficients :] = 1e3
    options = {"prior_std_in_angstroms": PRIOR, "n_iterations": 3}
    found, again = (
        refine_defocus(
            ParticleBatch(batch.indices, images, optics), poses, volume, coarse, white(coarse, 0.01), **options
        )
        for images in (batch.coefficients, spoiled)
    )
    assert torch.equal(found, again)
    assert found.median() == pytest.approx(200, abs=20)


def test_before_an_empty_map_every_defocus_stays_what_it_is(imaging, poses):
    images = torch.randn(N, imaging.n_coefficients, dtype=torch.complex128)
    batch = noisy_batch(images, listed_optics(), 0.0)
    empty = lambda points: torch.zeros(points.shape[:-1], dtype=torch.complex64)  # noqa: E731
    precision = white(imaging, 1.0)
    found = refine_defocus(batch, poses, empty, imaging, precision, prior_std_in_angstroms=PRIOR, n_iterations=3)
    assert torch.equal(found, torch.zeros(N))


def test_images_that_say_little_leave_the_defocus_near_what_it_is(atoms, volume, imaging, poses):
    optics = listed_optics()
    slices = closed_form_slices(atoms, imaging, poses)
    snr = 1e-3
    deviation = float((typical_power(slices, imaging, optics) / snr).sqrt())
    precision = white(imaging, deviation)
    errors = PRIOR * torch.randn(N)
    batch = noisy_batch(textbook_ctfs(imaging, optics, errors) * slices, optics, deviation)
    found = refine_defocus(batch, poses, volume, imaging, precision, prior_std_in_angstroms=PRIOR, n_iterations=5)
    gained = information(slices, imaging, optics, errors, precision) * PRIOR**2
    assert gained.median() < 0.4
    # Of the variance of the prior, what the images explain is found, and no more.
    explained = (gained / (1 + gained)).mean()
    assert found.square().mean() / PRIOR**2 == pytest.approx(float(explained), rel=0.4)


def defoci_at_an_extremum(shell):
    """Defoci (N,) of which the CTF is all but 1 or -1 in a shell: its slope there says nothing, or misleads."""
    candidates = torch.linspace(9000, 21000, 2000)
    k = torch.tensor([[shell / BOX, 0.0]])
    microscope = {"pixel_size_in_angstroms": PIXEL}
    ctf = [
        textbook_ctf(k, defocus_u_in_angstroms=u, defocus_v_in_angstroms=u, **microscope) for u in candidates.tolist()
    ]
    near = candidates[torch.cat(ctf).abs() > 0.98]
    return near[torch.randint(len(near), (N,))]


@pytest.mark.parametrize("n_iterations", [0, 1, 2, 5])
def test_no_defocus_ends_less_likely_than_it_started(imaging, n_iterations):
    shell, prior, deviation = 12, 1000.0, 0.3
    defoci = defoci_at_an_extremum(shell)
    optics = replace(listed_optics(), defocus_u_in_angstroms=defoci, defocus_v_in_angstroms=defoci)
    poses = Poses(random_rotations(N).float(), torch.zeros(N, 2))

    def one_frequency(points):
        return ((points.norm(dim=-1) * BOX - shell).abs() < 0.02).to(torch.complex64)

    slices = one_frequency(imaging.points(poses.rotations, optics))
    assert (slices.abs().sum(1) == 2).all()
    images = textbook_ctfs(imaging, optics, prior * torch.randn(N)) * slices
    batch, precision = noisy_batch(images, optics, deviation), white(imaging, deviation)
    found = refine_defocus(
        batch, poses, one_frequency, imaging, precision, prior_std_in_angstroms=prior, n_iterations=n_iterations
    )

    def posterior(changes):
        left = batch.coefficients - imaging.ctf(with_defocus_changed(optics, changes)) * slices
        return -(left.abs().square() * precision).double().sum(1) - changes.double().square() / (2 * prior**2)

    at_start, at_end = posterior(torch.zeros(N)), posterior(found)
    # A sixth of first steps, not taken back, would end less likely, and some though the image fits better there.
    assert (at_end >= at_start - 1e-5 * at_start.abs()).all()
    assert ((at_end > at_start + 0.5).float().mean() > 0.3) == (n_iterations > 0)


def test_no_particle_is_looked_for_thousands_of_angstroms_away(atoms, volume, imaging, poses):
    optics = listed_optics()
    clean = textbook_ctfs(imaging, optics, torch.full((N,), 5000.0)) * closed_form_slices(atoms, imaging, poses)
    batch, precision = noisy_batch(clean, optics, 0.0), white(imaging, 1e-3)
    for prior in (100.0, PRIOR):
        found = refine_defocus(batch, poses, volume, imaging, precision, prior_std_in_angstroms=prior, n_iterations=9)
        assert found.abs().max() <= 4 * prior
