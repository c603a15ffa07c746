import math

import mrcfile
import numpy as np
import pytest
import torch

from cryoai.errors import InputError
from cryoai.formats.mrc import MrcMap, read_map
from cryoai.formats.star import read_star
from cryoai.fourier import FourierDisc, HalfLattice, transform_map
from cryoai.imaging import ImagingModel
from cryoai.particle_stack import ParticleStack
from cryoai.poses import Poses, angular_distance_in_degrees, rotation_grid, rotations_from_euler_angles
from cryoai.simulation import Microscope, exact_transform, protein_like_phantom, resample_map, simulate
from cryoai.volumes import SampledVolume
from stacks import correlations, files_in, plain_parse

OPTIONS = {"n_pixels": 64, "pixel_size_in_angstroms": 3.5, "shift_standard_deviation_in_angstroms": 5.0}


@pytest.fixture(scope="module")
def phantom():
    return protein_like_phantom(0)


def images_of(simulation):
    with mrcfile.open(simulation.particles.parent / "particles.mrcs") as file:
        return np.array(file.data)


@pytest.mark.parametrize("n", [11, 12])
def test_the_exact_transform_is_the_sum_over_voxels_up_to_nyquist_and_zero_beyond(n):
    generator = np.random.default_rng(0)
    density, voxel = generator.normal(size=(n, n, n)).astype(np.float32), 1.7
    frequencies = generator.uniform(-0.6, 0.6, size=(200, 3)) / voxel
    r = (np.arange(n) - n // 2) * voxel
    waves = [np.exp(-2j * math.pi * k[:, None] * r) for k in frequencies.T]
    expected = np.einsum("px,py,pz,zyx->p", *waves, density.astype(np.float64))
    inside = (np.abs(frequencies) < 0.5 / voxel).all(axis=1)
    found = exact_transform(MrcMap(density, voxel), torch.from_numpy(frequencies)).numpy()
    assert np.abs(found - expected)[inside].max() < 1e-5 * np.abs(expected).max()
    assert 0 < inside.sum() < 200
    assert (found[~inside] == 0).all()


def test_all_files_are_written_and_nothing_else(phantom, tmp_path):
    simulation = simulate(phantom, tmp_path, n_particles=12, snr=0.1, seed=0, **OPTIONS)
    assert files_in(tmp_path) == ["particles.mrcs", "particles.star", "truth.mrc", "truth.star"]
    assert (simulation.particles, simulation.truth, simulation.true_map) == tuple(
        tmp_path / name for name in ("particles.star", "truth.star", "truth.mrc")
    )
    assert read_map(simulation.true_map).pixel_size_in_angstroms == pytest.approx(3.5)
    assert images_of(simulation).shape == (12, 64, 64)


def test_the_particles_have_no_poses_and_otherwise_equal_the_truth(phantom, tmp_path):
    simulation = simulate(phantom, tmp_path, n_particles=5, snr=0.1, seed=0, **OPTIONS)
    blind, truth = (plain_parse(path)["particles"] for path in (simulation.particles, simulation.truth))
    hidden = {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"}
    assert set(truth) - set(blind) == hidden
    assert {name: truth[name] for name in blind} == blind
    assert read_star(simulation.particles).poses is None


@pytest.mark.parametrize("snr", [0.05, 1.0])
def test_the_signal_to_noise_ratio_is_the_one_asked_for(phantom, tmp_path, snr):
    clean = simulate(phantom, tmp_path, n_particles=300, snr=1e8, seed=3, **OPTIONS)
    signal = images_of(clean) / 1e4
    noisy = simulate(phantom, tmp_path, n_particles=300, snr=snr, seed=3, **OPTIONS)
    # One seed makes the same particles: what remains when the signal is taken away is the noise.
    noise = images_of(noisy) - signal * math.sqrt(snr)
    assert noise.var() == pytest.approx(1, rel=0.01)
    assert (images_of(noisy).var(axis=(1, 2)) - noise.var(axis=(1, 2))).mean() == pytest.approx(snr, rel=0.03)
    assert noisy.measured_snr == pytest.approx(snr, rel=0.03)


def test_one_seed_always_gives_the_same_particles_and_another_others(phantom, tmp_path):
    def run(name, seed):
        (tmp_path / name).mkdir()
        simulation = simulate(phantom, tmp_path / name, n_particles=8, snr=0.1, seed=seed, **OPTIONS)
        return images_of(simulation), plain_parse(simulation.truth)

    first, again, other = run("first", 0), run("again", 0), run("other", 1)
    assert first[0].tobytes() == again[0].tobytes()
    assert first[1] == again[1]
    assert abs(np.corrcoef(first[0].ravel(), other[0].ravel())[0, 1]) < 0.5
    assert first[1]["particles"]["rlnAngleRot"] != other[1]["particles"]["rlnAngleRot"]


def test_the_true_map_at_the_true_poses_predicts_the_images(phantom, tmp_path):
    simulation = simulate(phantom, tmp_path, n_particles=40, snr=1e4, seed=2, **OPTIONS)
    stack = ParticleStack.open(simulation.truth)
    disc = FourierDisc.of_box(64)
    imaging = ImagingModel(disc, 3.5, disc.max_radius)
    volume = SampledVolume.from_map(torch.from_numpy(read_map(simulation.true_map).density), disc.max_radius)
    predicted = disc.to_images(imaging.predict(volume, stack.poses, stack.optics))
    assert correlations(predicted, stack.images(torch.arange(40))).min() > 0.999


def test_orientations_that_are_given_are_those_of_the_particles(phantom, tmp_path):
    generator = torch.Generator().manual_seed(5)
    # Looked at along an axis of its own, and turned in the plane of the image.
    angles = torch.stack([torch.full((30,), 20.0), torch.full((30,), 65.0), 360 * torch.rand(30, generator=generator)])
    rotations = rotations_from_euler_angles(angles.T)
    simulation = simulate(phantom, tmp_path, n_particles=30, snr=1e4, seed=2, rotations=rotations, **OPTIONS)
    stack = ParticleStack.open(simulation.truth)
    assert angular_distance_in_degrees(stack.poses.rotations, rotations).max() < 1e-2
    disc = FourierDisc.of_box(64)
    volume = SampledVolume.from_map(torch.from_numpy(read_map(simulation.true_map).density), disc.max_radius)
    poses = Poses(rotations, stack.poses.shifts_in_angstroms)
    predicted = disc.to_images(ImagingModel(disc, 3.5, disc.max_radius).predict(volume, poses, stack.optics))
    assert correlations(predicted, stack.images(torch.arange(30))).min() > 0.999


def test_rotations_of_another_number_of_particles_are_refused(phantom, tmp_path):
    with pytest.raises(InputError, match=r"rotations of shape \(3, 3, 3\): give \(4, 3, 3\), one a particle"):
        simulate(phantom, tmp_path, n_particles=4, snr=1, seed=0, rotations=torch.eye(3).expand(3, 3, 3), **OPTIONS)
    assert files_in(tmp_path) == []


def test_shifts_have_the_deviation_and_defoci_the_range_asked_for(phantom, tmp_path):
    microscope = Microscope(defocus_range_in_angstroms=(5000.0, 6000.0), voltage_in_kilovolts=200.0)
    options = OPTIONS | {"n_pixels": 32, "pixel_size_in_angstroms": 7.0}
    simulation = simulate(phantom, tmp_path, n_particles=1500, snr=1, seed=0, microscope=microscope, **options)
    table = read_star(simulation.truth)
    assert table.poses.origins_in_angstroms.std(axis=0) == pytest.approx(np.array([5, 5]), rel=0.06)
    mean = (table.defocus_u_in_angstroms + table.defocus_v_in_angstroms) / 2
    assert (mean.min() > 4999, mean.max() < 6001) == (True, True)
    assert set(table.voltage_in_kilovolts) == {200.0}


def test_defoci_are_drawn_from_the_rows_of_a_table(phantom, tmp_path):
    rows = np.array([[10000, 9000, 10], [20000, 19500, 50], [15000, 14000, 170]], dtype=np.float64)
    microscope = Microscope(defocus_table=rows)
    simulation = simulate(phantom, tmp_path, n_particles=60, snr=1, seed=0, microscope=microscope, **OPTIONS)
    table = read_star(simulation.truth)
    columns = (table.defocus_u_in_angstroms, table.defocus_v_in_angstroms, table.defocus_angle_in_degrees)
    assert set(zip(*columns, strict=True)) == set(map(tuple, rows))


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_no_rotation_maps_a_phantom_on_itself_or_on_its_mirror_image(seed):
    density = torch.from_numpy(protein_like_phantom(seed).density)
    # 10 Fourier pixels of 224 A: 22 A, where the helices are a blur and the domains are not.
    lattice = HalfLattice(128, 10, 1)
    radii = lattice.radii()
    points = lattice.frequencies()[(radii > 0) & (radii < 10)]
    volume = SampledVolume.from_map(density, 11)
    rotations = rotation_grid(1500)
    turned = torch.stack([volume(points @ rotation.T) for rotation in rotations])

    def correlation(reference):
        power = turned.abs().square().sum(1) * reference.abs().square().sum()
        return (turned * reference.conj()).real.sum(1) / power.sqrt()

    angle = angular_distance_in_degrees(rotations, torch.eye(3).expand(1500, 3, 3))
    assert correlation(volume(points))[angle > 30].max() < 0.9
    assert correlation(volume(points * torch.tensor([1.0, 1.0, -1.0]))).max() < 0.9
    assert correlation(volume(points))[angle < 15].max() > 0.9


def test_a_phantom_depends_on_its_seed_alone():
    first, again, other = (protein_like_phantom(seed).density for seed in (0, 0, 1))
    assert first.tobytes() == again.tobytes()
    assert np.corrcoef(first.ravel(), other.ravel())[0, 1] < 0.6


def test_a_phantom_has_positive_mass_within_its_box_and_is_centred():
    phantom = protein_like_phantom(0)
    assert phantom.density.shape == (128, 128, 128)
    assert phantom.density.sum() > 1000
    # What is below zero are the ripples of a density cut off at Nyquist.
    assert phantom.density.min() > -0.01 * phantom.density.max()
    shell = np.ones((128, 128, 128), dtype=bool)
    shell[4:-4, 4:-4, 4:-4] = False
    assert np.abs(phantom.density[shell]).max() < 0.01 * phantom.density.max()
    r = np.arange(128) - 64
    mass = phantom.density.astype(np.float64)
    centre = [(mass.sum(axis=axes) * r).sum() / mass.sum() for axes in ((0, 1), (0, 2), (1, 2))]
    assert np.abs(centre).max() < 0.1
    assert float(transform_map(torch.from_numpy(phantom.density))[64, 64, 0].real) > 0


@pytest.mark.parametrize(("n_pixels", "pixel_size"), [(64, 3.5), (65, 3.4), (96, 2.0)])
def test_resampling_keeps_the_transform_at_every_frequency_both_grids_have(phantom, n_pixels, pixel_size):
    resampled = resample_map(phantom, n_pixels, pixel_size)
    assert resampled.density.shape == (n_pixels,) * 3
    assert resampled.pixel_size_in_angstroms == pixel_size
    generator = torch.Generator().manual_seed(0)
    # A box that cuts nothing off the phantom, so that frequencies between those of the grid agree too.
    frequencies = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    lengths = torch.linspace(0, 0.4 / pixel_size, 500)
    frequencies *= (lengths / frequencies.norm(dim=1))[:, None]
    before = exact_transform(phantom, frequencies) * phantom.pixel_size_in_angstroms**3
    after = exact_transform(resampled, frequencies) * pixel_size**3
    assert (before - after).abs().max() < 2e-3 * before.abs().max()
