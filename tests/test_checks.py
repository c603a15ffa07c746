import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy import constants

from cryoai.checks import QUICK_SAMPLE, CheckReport, Finding, Measurements, check_particles
from cryoai.checks.resources import estimate_need
from cryoai.formats.mrc import MrcMap
from cryoai.formats.star import read_star
from cryoai.particle_stack import ParticleStack
from cryoai.particles import prepare_particles
from cryoai.simulation import protein_like_phantom, simulate
from stacks import SHARED, loop_text, needs_shared_data, plain_parse, write_images, write_star, zoo

N, BOX, PIXEL_SIZE = 150, 32, 7.0


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    """A folder of particles with nothing wrong: the columns of its STAR file, and its images."""
    folder = tmp_path_factory.mktemp("clean")
    simulate(
        protein_like_phantom(0),
        folder,
        n_particles=N,
        n_pixels=BOX,
        pixel_size_in_angstroms=PIXEL_SIZE,
        snr=0.5,
        seed=0,
        shift_standard_deviation_in_angstroms=4.0,
    )
    with mrcfile.open(folder / "particles.mrcs") as file:
        images = np.array(file.data)
    return folder, plain_parse(folder / "particles.star"), images


class Particles:
    """A copy of the clean particles, to be spoiled."""

    def __init__(self, folder, columns, images):
        self.folder = folder
        self.columns = {name: list(cells) for name, cells in columns["particles"].items()}
        self.optics = {name: list(cells) for name, cells in columns["optics"].items()}
        self.images = images.copy()
        self.star = folder / "p.star"
        self.stack = folder / "particles.mrcs"
        self.pixel_size = PIXEL_SIZE

    def write(self):
        self.stack.unlink(missing_ok=True)
        write_images(self.stack, np.nan_to_num(self.images, posinf=0, neginf=0), self.pixel_size)
        # mrcfile warns of what is not finite; the images follow its header of 1024 bytes.
        np.memmap(self.stack, np.float32, "r+", offset=1024, shape=self.images.shape)[:] = self.images
        return write_star(self.star, self.columns, self.optics)

    def check(self, **options):
        self.write()
        return check_particles(self.star, **options)

    def set(self, name, value, rows=None):
        cells = self.columns.get(name, ["0"] * len(next(iter(self.columns.values()))))
        self.columns[name] = [value if rows is None or i + 1 in rows else cell for i, cell in enumerate(cells)]


@pytest.fixture
def particles(clean, tmp_path):
    _, columns, images = clean
    return Particles(tmp_path, columns, images)


def found(report, level, topic):
    return [finding for finding in report.findings if (finding.level, finding.topic) == (level, topic)]


def the_only(report, level, topic):
    """The one finding that is no praise, checked to be one line."""
    needing_action = [f for f in report.findings if f.level in ("error", "warning")]
    findings = found(report, level, topic)
    assert len(findings) == 1, [(f.level, f.topic, f.message) for f in report.findings]
    assert level not in ("error", "warning") or needing_action == findings
    assert "\n" not in findings[0].message
    assert report.ok == (level != "error")
    assert report.exit_status == (2 if level == "error" else 0)
    return findings[0]


# ------------------------------------------------------------------------------ nothing wrong


def test_particles_with_nothing_wrong_pass_without_error_or_warning(clean):
    folder, _, _ = clean
    report = check_particles(folder / "particles.star")
    assert {f.level for f in report.findings} == {"ok"}
    topics = {f.topic for f in report.findings}
    assert topics == {
        *("table", "files", "headers", "rows", "images", "optics", "contrast", "CTF", "box", "noise"),
        *("disk", "memory", "time"),
    }
    measured = report.measurements
    assert (measured.n_particles, measured.n_pixels, measured.pixel_size_in_angstroms) == (N, BOX, PIXEL_SIZE)
    assert measured.n_images_read == N
    assert measured.contrast_z_score > 10
    assert measured.ctf_z_score > 5
    assert report.ok
    assert report.exit_status == 0
    assert report.verdict == "nothing wrong: a run can start"
    assert report.complaint == ""


def test_a_table_that_was_read_already_is_checked_too(clean):
    folder, _, _ = clean
    path = folder / "particles.star"
    assert check_particles(read_star(path)).findings == check_particles(path).findings


def test_a_sample_is_spread_evenly_and_said_to_be_one(clean):
    folder, _, _ = clean
    seen = []
    report = check_particles(folder / "particles.star", sample=40, progress=lambda *counts: seen.append(counts))
    assert report.measurements.n_images_read == 40
    assert seen[-1] == (40, 40)
    assert "40 images read of 150" in found(report, "ok", "images")[0].message
    assert check_particles(folder / "particles.star", sample=None).measurements.n_images_read == N


# ------------------------------------------------------------------------------ files


def test_everything_wrong_is_found_at_once(particles):
    names = [f"{i + 1:06d}@particles.mrcs" for i in range(N)]
    for row, stack in ((2, "a.mrcs"), (3, "b/b.mrcs"), (4, "b/b.mrcs"), (5, "c.mrcs")):
        names[row - 1] = f"1@{stack}"
    particles.columns["rlnImageName"] = names
    particles.images[9, 3, 4] = np.nan
    particles.set("rlnDefocusU", "-9000", {7})
    report = particles.check(max_faulty_share=0)
    missing = found(report, "error", "files")
    assert [f.rows for f in missing] == [(2,), (3, 4), (5,)]
    for finding, name in zip(missing, ("a.mrcs", "b/b.mrcs", "c.mrcs"), strict=True):
        assert name in finding.message
        assert str(particles.folder / name) in finding.message
        assert "--data-dir" in finding.fix
    (nan,) = found(report, "error", "images")
    assert nan.rows == (10,)
    assert "row 10" in nan.message
    assert f"10@{particles.stack}" in nan.message
    (defocus,) = found(report, "warning", "optics")
    assert defocus.rows == (7,)
    assert report.exit_status == 2
    # All other images are read nevertheless.
    assert report.measurements.n_images_read == N - 4
    assert report.measurements.contrast_z_score > 5


@pytest.mark.parametrize("content", [None, "", "just some text\n", loop_text("particles", {"rlnImageName": ["1@a"]})])
def test_a_table_that_cannot_be_read_is_the_only_finding(tmp_path, content):
    star = tmp_path / "p.star"
    if content is not None:
        star.write_text(content)
    report = check_particles(star)
    assert [(f.level, f.topic) for f in report.findings] == [("error", "table")]
    assert str(star) in report.findings[0].message
    assert report.exit_status == 2
    assert report.complaint == report.findings[0].message
    assert json.loads(report.to_json())["measurements"]["n_particles"] is None


def test_a_folder_of_images_that_is_not_there_is_refused(particles):
    report = particles.check(data_dir="nowhere")
    assert "--data-dir nowhere" in found(report, "error", "files")[0].message
    assert not report.ok


def test_images_are_found_from_the_given_folder(particles):
    particles.write()
    (particles.folder / "deep").mkdir()
    particles.stack.rename(particles.folder / "deep" / "particles.mrcs")
    assert not check_particles(particles.star).ok
    assert check_particles(particles.star, data_dir=particles.folder / "deep").ok


def test_too_few_particles_are_an_error(particles):
    particles.columns = {name: cells[:12] for name, cells in particles.columns.items()}
    finding = the_only(particles.check(), "error", "table")
    assert "12 particles" in finding.message


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not a readable MRC file"),
        (b"no MRC file" * 200, "not a readable MRC file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
)
def test_a_stack_that_is_no_stack_is_named(particles, content, word):
    particles.write()
    particles.stack.write_bytes(content)
    report = check_particles(particles.star)
    (finding,) = found(report, "error", "files")
    assert str(particles.stack) in finding.message
    assert word in finding.message
    assert "all 150 rows" in finding.message


# ------------------------------------------------------------------------------ headers and rows


def test_a_stack_cut_short_loses_the_rows_behind_the_cut(particles):
    particles.write()
    image = 4 * BOX**2
    with particles.stack.open("r+b") as file:
        file.truncate(1024 + 148 * image + 100)
    finding = the_only(check_particles(particles.star), "warning", "headers")
    assert finding.rows == (149, 150)
    assert "148 of the 150 images" in finding.message
    assert "rows 149 and 150" in finding.message
    with particles.stack.open("r+b") as file:
        file.truncate(1024 + 100 * image)
    finding = the_only(check_particles(particles.star), "error", "headers")
    assert finding.rows == tuple(range(101, 151))


def test_bytes_beyond_the_announced_images_are_counted(particles):
    particles.write()
    with particles.stack.open("ab") as file:
        file.write(bytes(2 * 4 * BOX**2))
    finding = the_only(check_particles(particles.star), "warning", "headers")
    assert "8,192 bytes" in finding.message
    assert "2 more images" in finding.message


def test_a_header_with_another_pixel_size_is_noted(particles):
    particles.pixel_size = 3.5
    finding = the_only(particles.check(), "note", "headers")
    assert "3.5 Å where the table has 7 Å" in finding.message
    particles.pixel_size = 0
    assert "without a pixel size" in the_only(particles.check(), "note", "headers").message
    particles.pixel_size = 7.01
    assert not found(particles.check(), "note", "headers")


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ((BOX + 1, BOX + 1), "odd box of 33"),
        ((BOX, BOX + 2), "34 x 32"),
        ((30, 30), "box of 30"),
        ((3, 3), "odd box of 3"),
        ((2, 2), "box of 2"),
        ((1, 1), "odd box of 1"),
    ],
)
def test_images_of_a_shape_that_is_no_use_are_an_error(particles, shape, word):
    rng = np.random.default_rng(0)
    particles.images = rng.normal(size=(N, *shape)).astype(np.float32)
    (finding,) = found(particles.check(), "error", "headers")
    assert str(particles.stack) in finding.message
    assert word in finding.message


def test_several_boxes_and_pixel_sizes_are_allowed_and_reported(particles):
    write_images(particles.folder / "large.mrcs", np.random.default_rng(0).normal(size=(10, 40, 40)), 5.6)
    for i in range(10):
        particles.columns["rlnImageName"][i] = f"{i + 1}@large.mrcs"
        particles.columns["rlnOpticsGroup"][i] = "2"
    particles.optics = {name: cells * 2 for name, cells in particles.optics.items()}
    particles.optics["rlnOpticsGroup"] = ["1", "2"]
    particles.optics["rlnImagePixelSize"] = ["7.0", "5.6"]
    report = particles.check()
    assert report.ok
    assert "32 px" in found(report, "note", "headers")[0].message
    assert "40 px" in found(report, "note", "headers")[0].message
    assert "5.6 Å (10 rows), 7 Å (140 rows)" in found(report, "note", "pixel size")[0].message
    particles.optics["rlnImagePixelSize"] = ["7.0", "10.5"]
    finding = found(particles.check(), "error", "pixel size")[0]
    # 32 pixels of 7 Å are 224 Å, which 10.5 Å divide into 21.3: the even number below is 20.
    assert "--box 20" in finding.fix
    assert finding.rows == tuple(range(1, 11))


@pytest.mark.parametrize("mode", [np.int8, np.int16, np.uint16, np.float16])
def test_every_type_of_pixel_is_read(particles, mode):
    particles.write()
    low = 0 if mode == np.uint16 else -100
    values = np.clip(20 * particles.images + (100 if mode == np.uint16 else 0), low, 120).astype(mode)
    with mrcfile.new(particles.stack, overwrite=True) as file:
        file.set_data(values)
        file.set_image_stack()
        file.voxel_size = PIXEL_SIZE
    report = check_particles(particles.star)
    assert {f.level for f in report.findings} == {"ok"}
    assert np.dtype(mode).name in found(report, "ok", "headers")[0].message
    assert report.measurements.contrast_z_score > 10


def test_image_numbers_beyond_the_stack_are_an_error(particles):
    particles.columns["rlnImageName"][3] = "151@particles.mrcs"
    particles.columns["rlnImageName"][8] = "400@particles.mrcs"
    finding = the_only(particles.check(), "error", "rows")
    assert finding.rows == (4, 9)
    assert "up to 400" in finding.message
    assert "has 150" in finding.message


def test_an_image_that_two_rows_share_is_reported(particles):
    particles.columns["rlnImageName"][7] = particles.columns["rlnImageName"][2]
    finding = the_only(particles.check(), "warning", "rows")
    assert finding.rows == (3, 8)
    # Under another name of the file, too.
    particles.columns["rlnImageName"][7] = "3@link.mrcs"
    (particles.folder / "link.mrcs").symlink_to("particles.mrcs")
    assert the_only(particles.check(), "warning", "rows").rows == (3, 8)


# ------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite"), (None, "constant")]
)
def test_an_image_without_use_is_a_warning_while_a_run_sets_it_aside(particles, value, word):
    if value is None:
        particles.images[16] = 1e6 + 0.1
    else:
        particles.images[16, 5, 6] = value
    finding = the_only(particles.check(), "warning", "images")
    assert finding.rows == (17,)
    assert word in finding.message
    assert "sets it aside" in finding.fix
    assert "17@" in the_only(particles.check(max_faulty_share=0), "error", "images").message


def test_too_many_images_without_use_are_errors(particles):
    particles.images[[3, 50, 120, 149], 0, 0] = np.nan
    report = particles.check()
    assert [f.rows for f in found(report, "error", "images")] == [(4,), (51,), (121,), (150,)]
    # Found in a sample, they speak for the others.
    report = particles.check(sample=75, max_faulty_share=0.02)
    assert not report.ok


def masked(images, radius):
    offset = np.arange(BOX) - BOX // 2
    return np.where(offset[:, None] ** 2 + offset**2 <= radius**2, images, 0)


def test_masked_images_are_recognised(particles):
    images = particles.images
    particles.images = masked(images, BOX / 2)
    finding = the_only(particles.check(), "warning", "images")
    assert "corners of all 150 rows" in finding.message
    particles.images = masked(images, 0.8 * BOX / 2)
    finding = found(particles.check(), "error", "images")[0]
    assert "background of all 150 rows is constant" in finding.message
    particles.images = images
    particles.images[4] = masked(images[4:5], 0.8 * BOX / 2)[0]
    assert the_only(particles.check(), "warning", "images").rows == (5,)


def test_an_image_with_the_pixels_of_another_is_reported(particles):
    particles.images[20] = particles.images[5]
    particles.images[21] = particles.images[5]
    finding = the_only(particles.check(), "warning", "images")
    assert finding.rows == (6, 21, 22)
    assert "rows 6, 21 and 22" in finding.message


def test_images_unlike_the_others_are_noted(particles):
    particles.images[3] *= 5
    particles.images[11] += 3
    finding = the_only(particles.check(), "note", "images")
    assert finding.rows == (4, 12)


@pytest.mark.parametrize("value", [1e6, 1e18])
def test_an_image_that_overwhelms_the_others_is_reported_and_left_out(particles, value):
    particles.images[7, 5, 5] = value
    report = particles.check()
    finding = the_only(report, "warning", "images")
    assert finding.rows == (8,)
    assert report.measurements.contrast_z_score > 10


# ------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize(
    ("column", "value", "level", "word"),
    [
        ("rlnDefocusU", "1.5", "error", "micrometres"),
        ("rlnDefocusU", "-12000", "warning", "underfocus"),
        ("rlnDefocusU", "150000", "warning", "micrometres"),
        ("rlnDefocusU", "1e14", "error", "millimetre"),
        ("rlnDefocusU", "0", "warning", "next to no contrast"),
        ("rlnDefocusAngle", "1200", "warning", "full turn"),
        ("rlnPhaseShift", "400", "warning", "360"),
        ("rlnPhaseShift", "-30", "warning", "360"),
        ("rlnPhaseShift", "1.57", "note", "radians"),
    ],
)
def test_a_value_of_a_particle_out_of_range_is_named(particles, column, value, level, word):
    particles.set(column, value, {6})
    if column == "rlnDefocusU":
        particles.set("rlnDefocusV", value, {6})
    report = particles.check()
    finding = found(report, level, "optics")[0]
    assert "row 6" in finding.message
    assert word in finding.message
    assert f"{float(value):g}" in finding.message
    assert finding.rows == (6,)
    assert finding.fix
    assert report.ok == (level != "error")
    # What the others show is measured without it.
    assert report.measurements.contrast_z_score > 10


@pytest.mark.parametrize(
    ("column", "value", "level", "word"),
    [
        ("rlnVoltage", "300000", "error", "volts"),
        ("rlnVoltage", "0.3", "error", "so little"),
        ("rlnVoltage", "30", "warning", "60 to 400"),
        ("rlnSphericalAberration", "2.7e7", "error", "Å"),
        ("rlnSphericalAberration", "2700", "error", "micrometres"),
        ("rlnSphericalAberration", "-2.7", "warning", "negative"),
        ("rlnSphericalAberration", "0", "note", "corrected"),
        ("rlnAmplitudeContrast", "7", "error", "per cent"),
        ("rlnAmplitudeContrast", "0.8", "warning", "fraction"),
        ("rlnAmplitudeContrast", "-0.1", "warning", "fraction"),
        ("rlnImagePixelSize", "7e-10", "error", "such pixels"),
        ("rlnImagePixelSize", "0.05", "warning", "0.1 to 20"),
        ("rlnImagePixelSize", "70", "warning", "0.1 to 20"),
    ],
)
def test_a_value_of_the_microscope_out_of_range_is_named(particles, column, value, level, word):
    particles.optics[column] = [value]
    report = particles.check()
    finding = found(report, level, "optics")[0]
    assert "all 150 rows" in finding.message
    assert word in finding.message
    assert finding.rows == ()
    assert report.ok == (level != "error")
    if level == "error":
        assert "see optics" in found(report, "note", "contrast")[0].message


def test_large_astigmatism_is_reported(particles):
    particles.set("rlnDefocusU", "16000", {3})
    particles.set("rlnDefocusV", "10500", {3})
    finding = the_only(particles.check(), "warning", "optics")
    assert "5500 Å" in finding.message
    assert finding.rows == (3,)


def test_one_defocus_for_all_is_noted(particles):
    particles.set("rlnDefocusU", "15000")
    particles.set("rlnDefocusV", "14500")
    report = particles.check()
    assert "one defocus, 15000 Å" in found(report, "note", "optics")[0].message


def test_shifts_out_of_proportion_and_in_pixels_are_reported(particles):
    for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"):
        particles.set(name, "0")
    particles.set("rlnOriginXAngst", "3.25")
    particles.set("rlnOriginYAngst", "-1.5")
    assert "3.6 Å" in the_only(particles.check(), "ok", "origins").message
    particles.set("rlnOriginXAngst", "60.5", {9})
    finding = the_only(particles.check(), "warning", "origins")
    assert finding.rows == (9,)
    assert "box of 224 Å" in finding.message
    particles.set("rlnOriginXAngst", "3.0")
    particles.set("rlnOriginYAngst", "-2")
    assert "pixels" in the_only(particles.check(), "warning", "origins").message


def test_aberrations_that_are_left_out_are_named(particles):
    particles.optics["rlnBeamTiltX"] = ["0.4"]
    finding = the_only(particles.check(), "warning", "aberrations")
    assert "beam tilt" in finding.message


def test_defocus_that_the_box_cannot_hold_is_reported_with_the_box_that_can(particles):
    particles.set("rlnDefocusU", "90000", {4})
    particles.set("rlnDefocusV", "90000", {4})
    energy = 300e3 * constants.e
    rest = constants.m_e * constants.c**2
    wavelength = 1e10 * constants.h * constants.c / math.sqrt(energy * (energy + 2 * rest))
    frequency = 1 / (2 * PIXEL_SIZE)
    distance = wavelength * 90000 * frequency - 2.7e7 * wavelength**3 * frequency**3
    assert distance > BOX * PIXEL_SIZE / 2
    finding = the_only(particles.check(), "warning", "CTF")
    assert finding.rows == (4,)
    assert f"{distance:.0f} Å" in finding.message
    assert f"at least {2 * math.ceil(distance / PIXEL_SIZE)} pixels" in finding.fix


# ------------------------------------------------------------------------------ what the images show


def test_the_sign_of_the_contrast_is_told(particles):
    particles.images = -particles.images
    report = particles.check()
    assert "protein is dark" in the_only(report, "ok", "contrast").message
    finding = the_only(particles.check(sign=1), "warning", "contrast")
    assert "stated to be bright" in finding.message
    assert particles.check(sign=-1).findings == report.findings


def test_noise_alone_leaves_contrast_size_and_ctf_unsure(particles):
    particles.images = np.random.default_rng(0).normal(size=particles.images.shape).astype(np.float32)
    report = particles.check()
    assert "--contrast bright or dark" in found(report, "warning", "contrast")[0].fix
    assert "own rows" in found(report, "warning", "CTF")[0].message
    assert found(report, "note", "box")
    assert report.measurements.particle_diameter_in_angstroms is None
    assert report.ok
    assert found(particles.check(sign=1), "note", "contrast")


def test_rows_in_another_order_than_the_images_are_noticed(particles):
    order = np.random.default_rng(0).permutation(N)
    for name in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"):
        particles.columns[name] = [particles.columns[name][i] for i in order]
    finding = the_only(particles.check(), "warning", "CTF")
    assert "same order" in finding.fix
    # Whole rows may come in any order.
    particles.columns["rlnImageName"] = [particles.columns["rlnImageName"][i] for i in order]
    assert particles.check().measurements.ctf_z_score > 5


def ball(diameter_in_angstroms):
    """A ball that is rough inside, so that it looks different from every side."""
    n, pixel_size = 96, 3.5
    offset = np.arange(n) - n // 2
    radius = pixel_size * np.sqrt(offset[:, None, None] ** 2 + offset[:, None] ** 2 + offset**2)
    rough = np.random.default_rng(0).normal(size=(n, n, n))
    rough = np.fft.ifftn(np.fft.fftn(rough) * np.exp(-200 * np.add.outer(
        np.add.outer(np.fft.fftfreq(n) ** 2, np.fft.fftfreq(n) ** 2), np.fft.fftfreq(n) ** 2
    ))).real  # fmt: skip
    return MrcMap(((radius < diameter_in_angstroms / 2) * (1 + rough / rough.std())).astype(np.float32), pixel_size)


@pytest.mark.parametrize(
    ("diameter", "n_pixels", "level"),
    [(75, 60, "warning"), (120, 32, "ok"), (160, 34, "ok"), (230, 34, "warning")],
)
def test_the_diameter_of_the_particle_is_measured(tmp_path, diameter, n_pixels, level):
    made = simulate(
        ball(diameter), tmp_path, n_particles=200, n_pixels=n_pixels, pixel_size_in_angstroms=7.0, snr=0.3, seed=1
    )
    report = check_particles(made.particles)
    # Beyond the box there is nothing to measure.
    visible = min(diameter, n_pixels * 7.0)
    assert report.measurements.particle_diameter_in_angstroms == pytest.approx(visible, rel=0.2, abs=28)
    assert found(report, level, "box")


def test_images_without_high_frequencies_are_noticed(particles):
    spectrum = np.fft.rfft2(particles.images)
    y, x = np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX)
    particles.images = np.fft.irfft2(spectrum * (np.hypot(x, y) < 9.5 / BOX), s=(BOX, BOX)).astype(np.float32)
    finding = the_only(particles.check(), "warning", "noise")
    assert f"{BOX * PIXEL_SIZE / 10:.1f} Å" in finding.message
    assert "--box 20" in finding.fix


def test_coloured_noise_is_noted(particles):
    spectrum = np.fft.rfft2(particles.images)
    y, x = np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX)
    particles.images = np.fft.irfft2(spectrum / (0.03 + x**2 + y**2), s=(BOX, BOX)).astype(np.float32)
    assert "shell by shell" in found(particles.check(), "note", "noise")[0].message


# ------------------------------------------------------------------------------ resources


def test_the_scratch_file_is_as_large_as_foretold(clean, tmp_path):
    folder, _, _ = clean
    scratch = tmp_path / "images.f16"
    prepare_particles(ParticleStack.open(folder / "particles.star"), BOX, scratch)
    assert estimate_need(N, BOX, 50_000).scratch_in_bytes == scratch.stat().st_size
    assert check_particles(folder / "particles.star").measurements.scratch_in_bytes == scratch.stat().st_size
    # A second block as large as the first holds what is left over.
    assert estimate_need(N, BOX, 100).scratch_in_bytes == scratch.stat().st_size
    assert estimate_need(1000, BOX, 100).scratch_in_bytes == scratch.stat().st_size * 200 // N


def test_the_time_follows_the_stated_formula():
    assert torch.get_num_threads() == 1
    assert estimate_need(10_000, 64, 50_000).seconds == 220 + 95
    assert estimate_need(60_000, 128, 50_000).seconds == 220 + 4 * (475 + 38)
    assert estimate_need(10_000, 64, 50_000).memory_in_bytes == 1_050_000_000


def test_a_full_disk_is_an_error(particles, monkeypatch):
    usage = shutil.disk_usage(particles.folder)
    asked = []

    def full(place):
        asked.append(Path(place))
        return usage._replace(free=1000)

    monkeypatch.setattr("shutil.disk_usage", full)
    finding = the_only(particles.check(run_dir=particles.folder / "runs" / "first"), "error", "disk")
    assert asked == [particles.folder]
    assert "1 kB free" in finding.message


def test_a_working_box_larger_than_the_images_is_an_error(particles):
    assert "--box 64" in the_only(particles.check(working_box=64), "error", "box").message


# ------------------------------------------------------------------------------ the report


def test_the_report_is_valid_and_complete_json(particles):
    particles.images[[3, 50, 120, 149], 0, 0] = np.nan
    particles.optics["rlnBeamTiltX"] = ["0.4"]
    report = particles.check()
    values = json.loads(report.to_json())
    assert values["particles"] == str(particles.star)
    assert values["ok"] is False
    assert values["measurements"]["n_particles"] == N
    assert sum(values["counts"].values()) == len(values["findings"]) == len(report.findings)
    assert values["counts"]["error"] == 4
    for written, finding in zip(values["findings"], report.findings, strict=True):
        assert Finding(**written | {"rows": tuple(written["rows"])}) == finding


def test_json_has_no_numbers_that_are_none(particles):
    particles.images[:] = np.nan
    particles.optics["rlnAmplitudeContrast"] = ["10"]
    values = json.loads(particles.check().to_json(), parse_constant=pytest.fail)
    assert values["measurements"]["contrast_z_score"] is None


def test_the_table_puts_first_what_needs_action_and_cuts_repetitions(particles):
    particles.images[:20, 0, 0] = np.nan
    particles.optics["rlnBeamTiltX"] = ["0.4"]
    report = particles.check()
    lines = report.to_text(marks=False).splitlines()
    assert lines[0] == f"{particles.star}: 150 particles of 32 px, 7 Å a pixel"
    levels = [line.split()[0] for line in lines[2:-2] if not line.startswith(" ")]
    assert levels == sorted(levels, key=["error", "warning", "note", "ok"].index)
    assert "... and 15 more like these; --json lists all" in lines[2 + 6]
    assert lines[-1] == "20 errors and 1 warning: mend the errors before a run"
    assert sum(line.strip().startswith("fix: ") for line in lines) == 2
    # The file is named once.
    assert sum(str(particles.star) in line for line in lines) == 1
    short = report.to_text(marks=True, width=100, levels=("error",))
    # A single word, such as the path of a file, may be longer.
    assert all(len(line) <= 100 or len(line.split()) == 1 for line in short.splitlines()[2:])
    assert "✗  images  the image of row 1," in short
    assert "ok" not in short.split()


def test_a_program_that_stops_at_the_first_error_has_a_line_to_say(particles):
    particles.images[:20, 0, 0] = np.nan
    complaint = particles.check(sample=QUICK_SAMPLE).complaint
    assert "\n" not in complaint
    assert complaint.startswith(f"{particles.star}: the image of row 1")
    assert f"(19 more: run cryoai check {particles.star})" in complaint
    one = CheckReport(Path("p"), (Finding("error", "files", "p: gone", "find it"),), Measurements())
    assert one.complaint == "p: gone; find it"


# ------------------------------------------------------------------------------ files of others


@needs_shared_data
@pytest.mark.parametrize("name", ["betagal_101_box64.star", "betagal_101_box96.star"])
def test_real_particles_are_in_order_and_dark(name):
    report = check_particles(SHARED / "stacks" / "betagal_empiar10061" / name)
    assert {f.level for f in report.findings} <= {"ok", "note"}
    assert report.measurements.contrast_z_score < -5
    assert report.measurements.ctf_z_score > 10
    # Beta-galactosidase is 180 Å long.
    assert 150 < report.measurements.particle_diameter_in_angstroms < 200


@needs_shared_data
def test_seventeen_real_particles_are_only_too_few():
    report = check_particles(SHARED / "stacks" / "aspire_sample" / "sample_particles_relion31.star")
    assert "17 particles" in the_only(report, "error", "table").message
    assert report.measurements.contrast_z_score > 3


@needs_shared_data
def test_the_same_images_are_found_through_a_cryosparc_file():
    folder = SHARED / "stacks" / "50S_empiar10076_cryodrgn"
    reports = [check_particles(folder / f"empiar_10076_7.{suffix}") for suffix in ("star", "cs")]
    assert "7 particles" in the_only(reports[0], "error", "table").message
    assert [f.topic for f in reports[0].findings] == [f.topic for f in reports[1].findings]
    for value, other in zip(
        asdict(reports[0].measurements).values(), asdict(reports[1].measurements).values(), strict=True
    ):
        assert value == pytest.approx(other)


@pytest.mark.parametrize("file", [*zoo("star"), *zoo("cs"), *zoo("other")])
def test_every_file_of_the_zoo_is_reported_on(file):
    report = check_particles(file, sample=50)
    assert report.exit_status == 2
    for finding in report.findings:
        assert "\n" not in finding.message + finding.fix
        assert finding.level in ("error", "warning") or finding.message
    assert json.loads(report.to_json())["ok"] is False
