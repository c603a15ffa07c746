"""The files of other programs through the front doors: read as by another program, or refused in one true line."""

import bz2
import gzip
import os
import time
import tracemalloc
import warnings

import gemmi
import mrcfile
import numpy as np
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

from cryoai.formats.mrc import open_stack, read_map
from cryoai.formats.particle_files import read_particles
from cryoai.particle_stack import ParticleStack
from cryoai.pose_files import read_poses
from stacks import (
    SHARED,
    loop_text,
    particle_columns,
    refusal,
    third_party_pickle,
    write_images,
    write_star,
    zoo,
)
from test_star import READABLE

SECONDS = 3 if os.environ.get("CI") else 1
RANDOM = np.random.default_rng(0)
IMAGES = (20 * RANDOM.normal(size=(5, 32, 32))).round()
CUBE = RANDOM.normal(size=(12, 12, 12)).astype(np.float32)
POSES_OF_CRYOSPARC = {"cryodrgn_cryosparc_P12_J24_001_particles.cs"}
POSES_OF_CRYODRGN = {"cryodrgn_pose.cs.pkl", "cryodrgn_pose.star.pkl", "cryodrgn_toy_rot_trans.pkl",
                     "cryodrgn_toy_angles.pkl", "drgnai_hand_pose.pkl"}  # fmt: skip
CUBES = {"mrcfile_EMD-3197.map", "mrcfile_emd_3197.map.gz", "sfftk_tiny1.map", "sfftk_tiny2.map", "sfftk_tiny3.map"}
# What a person is told that can be mended, by the words that say how.
SAID = {
    "mrc/LFSPOINTER_iccp_particles_1000_128.mrcs": "a Git LFS pointer, not the file itself; fetch it with",
    "mrc/cctbx_non_zero_origin_map.ccp4": "a map of 32 x 40 x 30 voxels, not images of particles",
    "mrc/gitannex_pointer_aspire_rln_proj_65.mrcs": "a link to ../../../tests/saved_test_data/rln_proj_65.mrcs kept as",
    "mrc/imp_1oel_10_weird_ispg.mrc": "a map of 116 x 114 x 69 voxels, not images of particles",
    "mrc/leopardem_zero_bytes.mrc": "the file is empty",
    "mrc/mrcfile_EMD-3001.map": "a map of 73 x 43 x 25 voxels, not images of particles",
    "mrc/mrcfile_EMD-3001.map.bz2": "it is compressed; decompress it",
    "mrc/pytom_header_only.mrc": "(132096 bytes), the file has 1024 bytes; it was cut short: copy it again",
    "mrc/spider_sav_data_no_voxel.mrcs": "images without defocus, voltage and pixel size, which are never assumed",
    "cs/cryosparctools_4k_dataset.cs": "the dataset has no rows",
    "cs/t20s_P9_J209_volume.csg": "and these are no particles; give the .cs file of particles",
    "star/aspire_sample.star": "no table has a column rlnImageName",
    "star/cryodrgn_toy_projections_13.star": "rlnOpticsGroup is missing from the table data_particles; add it",
    "star/sfftk_test_data3.star": "no table has a column rlnImageName",
    "star/sfftk_test_data6.star": "the table data_refined_volume has two loops; join them",
    "star/starfile_hist_multi_line_c_engine.star": "two tables are called data_block_3",
    "star/xmipp_symop.star": "no table has a column rlnImageName",
}
SAID_OF_MAPS = {
    "LFSPOINTER_iccp_particles_1000_128.mrcs": "a Git LFS pointer",
    "aspire_sample_one_image_2d.mrcs": "an image of 200 x 200 pixels, not a map",
    "imp_mini_8bytes.map": "not a readable MRC file (8 bytes, of which a header alone has 1024)",
    "leopardem_zero_bytes.mrc": "not a readable MRC file (it is empty)",
    "mrcfile_EMD-3001.map.bz2": "the map has 73 x 43 x 25 voxels; a cube is needed",
    "mrcfile_emd_3197.png.gz": "not a readable MRC file (it has no MRC header)",
    "xmipp_smallStack.mrcs": "a stack of 4 images of 64 x 64 pixels, not a map",
}
WHOLE_ZOO = [path for folder in ("cs", "mrc", "other", "pkl", "star") for path in zoo(folder)]


def in_time(function, *arguments, **options):
    started = time.perf_counter()
    found = function(*arguments, **options)
    assert time.perf_counter() - started < SECONDS
    return found


# ------------------------------------------------------------------------------ the whole zoo


@pytest.mark.parametrize("path", WHOLE_ZOO)
def test_a_file_of_the_zoo_without_its_images_is_refused_in_one_line_and_nothing_is_written(path, tmp_path, complaint):
    message = in_time(complaint, "reconstruct", path, tmp_path / "run")
    assert message.startswith(f"{path}: ")
    assert SAID.get(f"{path.parent.name}/{path.name}", "") in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", WHOLE_ZOO)
def test_poses_of_the_zoo_are_those_of_another_reader_or_refused_in_one_line(path):
    if path.parent.name == "star" and (expected := poses_by_starfile(path)) is not None:
        found = in_time(read_poses, path)
        np.testing.assert_allclose(found.rotations, expected[0], atol=1e-5)
        np.testing.assert_allclose(found.shifts_in_angstroms, expected[1], atol=1e-4)
    elif path.name in POSES_OF_CRYOSPARC:
        stored = np.load(path)
        found = in_time(read_poses, path)
        expected = Rotation.from_rotvec(stored["alignments3D/pose"]).as_matrix()
        np.testing.assert_allclose(found.rotations, expected, atol=1e-5)
        shifts = stored["alignments3D/shift"] * stored["alignments3D/psize_A"][:, None]
        np.testing.assert_allclose(found.shifts_in_angstroms, shifts, rtol=1e-5)
    elif path.name in POSES_OF_CRYODRGN:
        stored = third_party_pickle("..", "parser_zoo", "pkl", path.name)
        rotations, shifts = stored if isinstance(stored, tuple) else (stored, np.zeros((len(stored), 2)))
        found = in_time(read_poses, path, extent_in_angstroms=200.0)
        np.testing.assert_allclose(found.rotations, rotations.transpose(0, 2, 1), atol=1e-5)
        np.testing.assert_allclose(found.shifts_in_angstroms, 200 * shifts, atol=1e-4)
    else:
        assert in_time(refusal, read_poses, path).startswith(f"{path}: ")


MALFORMED = {"sfftk_test_data6.star", "sfftk_test_data7.star", "starfile_hist_multi_line_c_engine.star",
             "cryosparctools_job096_run_data.LFSPOINTER.star", "cryodrgn_toy_projections_13.star"}  # fmt: skip
ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]


def table_by_starfile(path):
    """The columns of the one table of particles, with what its optics groups say; None where there is none."""
    if path.name in MALFORMED or b"_rlnImageName" not in path.read_bytes():
        return None
    tables = starfile.read(path, always_dict=True)
    with_images = [table for table in tables.values() if "rlnImageName" in table]
    if len(with_images) != 1:
        return None
    columns, optics = as_columns(with_images[0]), as_columns(tables.get("optics", {}))
    if "rlnOpticsGroup" in optics:
        rows = [optics["rlnOpticsGroup"].tolist().index(group) for group in columns["rlnOpticsGroup"]]
        columns = {name: cells[rows] for name, cells in optics.items()} | columns
    return columns


def as_columns(table):
    """A loop or a table of single items."""
    return {name: np.atleast_1d(np.asarray(table[name])) for name in table}


def pixel_size_by_starfile(columns):
    for name in ("rlnImagePixelSize", "rlnPixelSize"):
        if name in columns:
            return columns[name].astype(float)
    return 1e4 * columns["rlnDetectorPixelSize"] / columns["rlnMagnification"]


def poses_by_starfile(path):
    columns = table_by_starfile(path)
    if columns is None or not set(ANGLES) <= set(columns):
        return None
    rotations = Rotation.from_euler("ZYZ", np.stack([columns[name] for name in ANGLES], axis=1), degrees=True)
    shifts = np.zeros((len(columns["rlnAngleRot"]), 2))
    for k, axis in enumerate("XY"):
        if f"rlnOrigin{axis}Angst" in columns:
            shifts[:, k] = columns[f"rlnOrigin{axis}Angst"]
        elif f"rlnOrigin{axis}" in columns:
            shifts[:, k] = columns[f"rlnOrigin{axis}"] * pixel_size_by_starfile(columns)
    return rotations.as_matrix(), shifts


@pytest.mark.parametrize("path", zoo("star"))
def test_optics_of_the_zoo_are_those_that_starfile_reads(path):
    if path.name not in READABLE:
        assert in_time(refusal, read_particles, path).startswith(f"{path}: ")
        return
    table, columns = in_time(read_particles, path), table_by_starfile(path)
    expected = {
        "rlnVoltage": table.voltage_in_kilovolts,
        "rlnSphericalAberration": table.spherical_aberration_in_mm,
        "rlnAmplitudeContrast": table.amplitude_contrast,
        "rlnDefocusU": table.defocus_u_in_angstroms,
        "rlnDefocusV": table.defocus_v_in_angstroms,
        "rlnDefocusAngle": table.defocus_angle_in_degrees,
        "rlnPhaseShift": table.phase_shift_in_degrees,
        "rlnCtfBfactor": table.b_factor_in_square_angstroms,
    }
    for name, found in expected.items():
        np.testing.assert_array_equal(found, columns.get(name, np.zeros(len(table))), err_msg=name)
    np.testing.assert_allclose(table.pixel_size_in_angstroms, pixel_size_by_starfile(columns), rtol=1e-12)


# ------------------------------------------------------------------------------ maps


@pytest.mark.parametrize("path", zoo("mrc"))
def test_maps_of_the_zoo_are_those_that_gemmi_reads(path):
    if path.name not in CUBES:
        message = in_time(refusal, read_map, path)
        assert message.startswith(f"{path}: {SAID_OF_MAPS.get(path.name, '')}")
        return
    found = in_time(read_map, path)
    if path.name.startswith("sfftk"):
        # Too few labels for gemmi's taste.
        with warnings.catch_warnings(action="ignore"), mrcfile.open(path, permissive=True) as file:
            density, pixel_size = file.data, float(file.voxel_size.x)
    else:
        stored = gemmi.read_ccp4_map(str(path))
        density, pixel_size = stored.grid.array.transpose(2, 1, 0), stored.grid.unit_cell.a / stored.grid.nu
    np.testing.assert_array_equal(found.density, density)
    assert found.pixel_size_in_angstroms == pytest.approx(pixel_size, rel=1e-6)


def write_map_file(path, density, pixel_size=1.5):
    with mrcfile.new(path) as file:
        file.set_data(density)
        file.set_volume()
        file.voxel_size = pixel_size
    return path


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gzip", "bzip2"])
@pytest.mark.parametrize("dtype", ["i1", "f2", "<f4", ">f4"])
def test_a_compressed_map_is_read_as_the_map_itself(tmp_path, pack, dtype):
    plain = write_map_file(tmp_path / "a.mrc", (30 * CUBE).round().astype(dtype))
    (tmp_path / "a.mrc.packed").write_bytes(pack(plain.read_bytes()))
    found = read_map(tmp_path / "a.mrc.packed")
    np.testing.assert_array_equal(found.density, mrcfile.read(plain))
    assert found.pixel_size_in_angstroms == read_map(plain).pixel_size_in_angstroms == 1.5


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gzip", "bzip2"])
def test_a_compressed_map_that_is_damaged_is_refused(tmp_path, pack):
    path, plain = tmp_path / "a.map", write_map_file(tmp_path / "a.mrc", CUBE).read_bytes()
    path.write_bytes(pack(plain)[:-2000])
    assert refusal(read_map, path).startswith(f"{path}: cannot be decompressed (")
    path.write_bytes(pack(plain[:-4]))
    assert f"({len(plain)} bytes), decompressed it has {len(plain) - 4} bytes; it was cut short" in refusal(
        read_map, path
    )
    path.write_bytes(pack(b"no map\n" * 300))
    assert refusal(read_map, path).startswith(f"{path}: not a readable MRC file (it has no MRC header)")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gzip", "bzip2"])
def test_no_more_is_decompressed_than_the_header_announces(tmp_path, pack):
    plain = write_map_file(tmp_path / "a.mrc", CUBE).read_bytes()
    (tmp_path / "bomb.map").write_bytes(pack(plain + bytes(100_000_000)))
    announced = bytearray(plain)
    for offset in (0, 4, 8, 28, 32, 36):
        announced[offset : offset + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "announced.map").write_bytes(pack(bytes(announced)))
    tracemalloc.start()
    np.testing.assert_array_equal(read_map(tmp_path / "bomb.map").density, CUBE)
    assert "(4000001024 bytes), decompressed it has 7936 bytes" in refusal(read_map, tmp_path / "announced.map")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e7


def test_a_compressed_map_larger_than_a_map_may_be_is_not_begun(tmp_path):
    plain = bytearray(write_map_file(tmp_path / "a.mrc", CUBE).read_bytes())
    for offset in (0, 4, 8, 28, 32, 36):
        plain[offset : offset + 4] = (2000).to_bytes(4, "little")
    (tmp_path / "a.map.gz").write_bytes(gzip.compress(bytes(plain)))
    assert "announces 32000001024 bytes, which is too much to do in memory: decompress it" in refusal(
        read_map, tmp_path / "a.map.gz"
    )


def test_stacks_stay_on_disk_and_so_must_be_decompressed(tmp_path):
    write_images(tmp_path / "images.mrcs", IMAGES)
    packed = gzip.compress((tmp_path / "images.mrcs").read_bytes())
    (tmp_path / "images.mrcs").write_bytes(packed)
    star = write_star(tmp_path / "p.star", particle_columns(3))
    assert refusal(ParticleStack.open, star) == (
        f"{tmp_path / 'images.mrcs'}: not a readable MRC file (it is compressed: decompress it)"
    )


# ------------------------------------------------------------------------------ images of every mode


def write_stack(path, images, dtype, order):
    """A stack by mrcfile, with its header in this byte order even where the data have none."""
    with mrcfile.new(path) as file:
        file.set_data(images.astype(order + dtype))
        file.set_image_stack()
    if dtype == "i1" and order == ">":
        content = bytearray(path.read_bytes())
        content[:208] = np.frombuffer(content[:208], dtype="<u4").byteswap().tobytes()
        content[212:214] = b"\x11\x11"
        path.write_bytes(content)
    with mrcfile.open(path) as file:
        assert file.header.mode.dtype.str[0] == order
        assert file.header.nz == len(images)
    return path


MODES = [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("mode", "dtype"), MODES)
def test_images_of_every_mode_and_byte_order_are_those_that_mrcfile_reads(tmp_path, mode, dtype, order):
    images = np.abs(IMAGES) if mode == 6 else IMAGES
    path = write_stack(tmp_path / "images.mrcs", images, dtype, order)
    with mrcfile.open(path) as file:
        assert int(file.header.mode) == mode
    particles = ParticleStack.open(write_star(tmp_path / "p.star", particle_columns(5)))
    found = particles.images(torch.tensor([4, 0, 2]))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found, mrcfile.read(path)[[4, 0, 2]].astype("f4"))
    np.testing.assert_array_equal(found, images[[4, 0, 2]])


STAMPS = [b"\x11\x11\0\0", b"\0\0\0\0", b"\x44\0\0\0", b"\x44\x11\0\0", b"\x44\x44\0\0", b"\x44\x20\x20\x20"]


@pytest.mark.parametrize("dtype", ["i1", "f4"])
@pytest.mark.parametrize("stamp", STAMPS)
@pytest.mark.parametrize("order", "<>")
def test_images_are_read_in_the_byte_order_that_makes_sense_whatever_the_machine_stamp(tmp_path, order, stamp, dtype):
    path = write_stack(tmp_path / "images.mrcs", IMAGES, dtype, order)
    content = bytearray(path.read_bytes())
    content[212:216] = stamp
    path.write_bytes(content)
    np.testing.assert_array_equal(open_stack(path).map_images(), IMAGES)


@pytest.mark.parametrize("name", ["{}.mrc", "1@{}.mrc", "000001@{}.mrc"])
def test_each_particle_may_have_a_file_of_its_own_with_a_single_image(tmp_path, name):
    for i, image in enumerate(IMAGES):
        with mrcfile.new(tmp_path / f"{i}.mrc") as file:
            file.set_data(image.astype("f4"))  # two axes
    columns = particle_columns(5) | {"rlnImageName": [name.format(i) for i in range(5)]}
    particles = ParticleStack.open(write_star(tmp_path / "p.star", columns))
    np.testing.assert_array_equal(particles.images(torch.arange(5)), IMAGES)


@pytest.mark.parametrize(("mode", "message"), [(3, "complex values (MRC mode 3)"), (4, "complex values (MRC mode 4)"),
                         (101, "its mode is 101; 0, 1, 2, 6 and 12 are read"), (-1, "its mode is -1")])  # fmt: skip
def test_modes_that_are_no_images_of_numbers_are_refused(tmp_path, mode, message):
    content = bytearray(write_images(tmp_path / "images.mrcs", IMAGES).read_bytes())
    content[12:16] = mode.to_bytes(4, "little", signed=True)
    (tmp_path / "images.mrcs").write_bytes(content)
    star = write_star(tmp_path / "p.star", particle_columns(3))
    assert message in refusal(ParticleStack.open, star)


# ------------------------------------------------------------------------------ malformations that users report


def good(folder):
    write_images(folder / "images.mrcs", IMAGES)
    return write_star(folder / "p.star", particle_columns(3)).read_text()


def with_both_pixel_sizes(text):
    names = "_rlnImagePixelSize #6\n"
    return text.replace(names, f"{names}_rlnPixelSize #7\n").replace(" 3.0\n", " 3.0 9.0\n")


MENDED = {
    "cisTEM": lambda text: "# cisTEM\n" + text.replace("00000", "'00000").replace(".mrcs", ".mrcs'"),
    "both pixel sizes": with_both_pixel_sizes,
    "blank lines in the loop": lambda text: text.replace("\n000002@", "\n\n  \n000002@"),
    "no line end": lambda text: text.rstrip(),
    "windows": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
}
BROKEN = {
    "optics group twice": ("_rlnOpticsGroupName", "_rlnOpticsGroup", "names column rlnOpticsGroup twice; remove one"),
    "optics group numbered": ("_rlnOpticsGroup #1", "_rlnOpticsGroup1 #1", "rlnOpticsGroup is missing from the table"),
    "counted from 0": ("000001@", "000@", "particle row 1 is '000@images.mrcs'; number@stack is needed, counted from"),
    "a stray number": ("\n000002@", "\n17\n000002@", "row 2 of the table data_particles has 1 values for 5 columns"),
    "a table twice": ("data_optics", "data_particles", "two tables are called data_particles; rename or join them"),
}


@pytest.mark.parametrize("case", MENDED)
def test_what_users_report_and_has_one_meaning_is_read(tmp_path, case):
    (tmp_path / "p.star").write_bytes(MENDED[case](good(tmp_path)).encode())
    particles = ParticleStack.open(tmp_path / "p.star")
    np.testing.assert_array_equal(particles.images(torch.arange(3)), IMAGES[:3])
    assert particles.pixel_size_in_angstroms == 3.0
    np.testing.assert_array_equal(particles.table.defocus_u_in_angstroms, [12000, 12100, 12200])


@pytest.mark.parametrize("case", BROKEN)
def test_what_users_report_and_has_no_one_meaning_is_refused(tmp_path, complaint, case):
    old, new, message = BROKEN[case]
    text = good(tmp_path)
    assert old in text
    (tmp_path / "p.star").write_text(text.replace(old, new))
    assert message in complaint("reconstruct", tmp_path / "p.star", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_tables_that_are_not_read_does_not_matter(tmp_path):
    text = good(tmp_path)
    (tmp_path / "p.star").write_text(
        loop_text("general", {"rlnA": [1, 2]})
        + "loop_\n_rlnB\n1\n\ndata_odd\nloop_\n_a\n_a\n1 2 3\n"
        + text
        + "\ndata_odd\nloop_\n_a\n1\n"
    )
    assert len(ParticleStack.open(tmp_path / "p.star").table) == 3


def test_a_row_may_begin_with_a_path_that_begins_as_tables_do(tmp_path):
    columns = {"rlnMicrographName": ["data_1/a.mrc"] * 3} | particle_columns(3)
    write_images(tmp_path / "images.mrcs", IMAGES)
    assert len(ParticleStack.open(write_star(tmp_path / "p.star", columns)).table) == 3


def test_poses_and_shapes_may_stand_in_the_passthrough_file_alone(tmp_path):
    path = SHARED / "parser_zoo" / "cs" / next(iter(POSES_OF_CRYOSPARC))
    if not path.is_file():
        pytest.skip("needs third-party data")
    stored = np.load(path)
    others = [n for n in stored.dtype.names if n.startswith("alignments3D") or n in ("blob/shape", "uid")]
    rest = [n for n in stored.dtype.names if n not in others or n == "uid"]
    for name, fields in (("main.cs", rest), ("passthrough.cs", others)):
        part = np.empty(len(stored), dtype=[(field, stored.dtype[field]) for field in fields])
        for field in fields:
            part[field] = stored[field]
        with (tmp_path / name).open("wb") as file:
            np.save(file, part[::-1] if name == "passthrough.cs" else part)
    whole = read_particles(path)
    joined = read_particles(tmp_path / "main.cs", passthrough=[tmp_path / "passthrough.cs"])
    np.testing.assert_array_equal(joined.poses.angles_in_degrees, whole.poses.angles_in_degrees)
    np.testing.assert_array_equal(joined.poses.origins_in_angstroms, whole.poses.origins_in_angstroms)
    assert read_particles(tmp_path / "main.cs").poses is None
    assert "no poses (alignments3D/pose)" in refusal(read_poses, tmp_path / "main.cs")
