import bz2
import gzip
import pickle
import shutil
import time

import mrcfile
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryoai.errors import InputError
from cryoai.formats.particle_files import FileKind, file_kind, read_particles
from cryoai.formats.table import ParticleTable
from cryoai.pose_files import read_poses
from stacks import (
    OPTICS,
    SHARED,
    needs_shared_data,
    particle_columns,
    refusal,
    third_party_pickle,
    write_images,
    write_star,
    zoo,
)

RANDOM = np.random.default_rng(0)
N = 6
IMAGES = RANDOM.normal(size=(N, 32, 32))
CTF = np.column_stack(
    [
        np.full(N, 64),
        np.full(N, 1.5),
        np.linspace(1e4, 2e4, N),
        np.linspace(9e3, 1.9e4, N),
        np.linspace(-90, 80, N),
        np.full(N, 300),
        np.full(N, 2.7),
        np.full(N, 0.1),
        np.linspace(0, 90, N),
    ]
)
ANGLES = {"rlnAngleRot": [1, 2], "rlnAngleTilt": [3, 4], "rlnAnglePsi": [5, 6], "rlnOriginXAngst": [7, 8]}
NAMED = {
    "cryodrgn_toy_projections.txt": "'toy_projections.mrcs' of line 1 is not there; one stack a line is needed",
    "cryodrgn_toy_projections_2.txt": "'toy_projections.mrcs' of line 1 is not there; one stack a line is needed",
    "scipion_xmipp3CTFEstimation.emx": "an EMX file; export the particles in RELION's format",
    "xmipp_singleImage_swap.spi": "a SPIDER image or stack; convert it to .mrcs",
    "xmipp_smallStack.hed": "the header of an IMAGIC stack; convert the stack to .mrcs",
    "xmipp_smallStack.img": "an IMAGIC or SPIDER stack; convert it to .mrcs",
    "xmipp_smallStack.stk": "a SPIDER or Xmipp stack; convert it to .mrcs",
    "xmipp_smallVolumeStackCorrupted.stk": "a SPIDER or Xmipp stack; convert it to .mrcs",
    "xmippmeta_input_particles.xmd": "Xmipp metadata; export the particles in RELION's format",
}


def dump(path, value):
    path.write_bytes(pickle.dumps(value))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two stacks, of four and two images, a list of them, their ctf.pkl, and a STAR file."""
    (tmp_path / "more").mkdir()
    write_images(tmp_path / "a.mrcs", IMAGES[:4])
    write_images(tmp_path / "more" / "b.mrcs", IMAGES[4:])
    (tmp_path / "list.txt").write_text("more/b.mrcs\n\n a.mrcs \r\n")
    dump(tmp_path / "ctf.pkl", CTF)
    dump(tmp_path / "ctf4.pkl", CTF[:4])
    dump(tmp_path / "pose.pkl", (np.stack([np.eye(3)] * 4), np.full((4, 2), 0.25)))
    write_star(tmp_path / "p.star", particle_columns(2) | ANGLES)
    dataset = np.zeros(2, dtype=[("uid", "u8"), ("alignments3D/pose", "f4", 3), ("alignments3D/shift", "f4", 2),
                                 ("alignments3D/psize_A", "f4")])  # fmt: skip
    dataset["alignments3D/pose"], dataset["alignments3D/shift"] = [[0, 0, 1], [1, 0, 0]], [[1, 2], [3, 4]]
    dataset["alignments3D/psize_A"] = 2
    with (tmp_path / "p.cs").open("wb") as file:
        np.save(file, dataset)
    return tmp_path


def read_images(table):
    """The images of a table, by mrcfile."""
    stacks = [mrcfile.read(name) for name in table.images.names]
    return np.stack([stacks[s][i] for s, i in zip(table.images.stack, table.images.index, strict=True)])


# ------------------------------------------------------------------------------ files of others


@pytest.mark.parametrize("path", [path for name in ("cs", "mrc", "other", "pkl", "star") for path in zoo(name)])
def test_any_file_of_the_zoo_is_read_or_refused_in_one_line_and_at_once(path):
    started = time.monotonic()
    try:
        outcome = read_particles(path)
    except InputError as error:
        outcome = str(error)
    assert time.monotonic() - started < 1
    if path.parent.name in ("mrc", "other", "pkl"):
        assert isinstance(outcome, str)
    if isinstance(outcome, str):
        assert outcome.startswith(f"{path}: ")
        assert "\n" not in outcome
    else:
        assert isinstance(outcome, ParticleTable)
        assert len(outcome) > 0


@pytest.mark.parametrize("path", zoo("other"))
def test_files_of_other_programs_are_named_with_what_to_do(path):
    assert refusal(read_particles, path).startswith(f"{path}: {NAMED[path.name]}")


@pytest.mark.parametrize("path", zoo("pkl"))
def test_pickles_are_no_particles(path):
    assert "a pickle, which holds no images; give the stack of images, and with --ctf" in refusal(read_particles, path)


@needs_shared_data
def test_the_stack_and_ctf_of_cryodrgns_toy_are_read():
    toy = SHARED / "stacks" / "cryodrgn_toy"
    table = read_particles(toy / "toy_projections.mrcs", ctf=toy / "test_ctf.pkl")
    stored = third_party_pickle("cryodrgn_toy", "test_ctf.pkl")
    assert len(table) == 1000
    np.testing.assert_array_equal(table.pixel_size_in_angstroms, 1)
    np.testing.assert_array_equal(table.phase_shift_in_degrees, stored[:, 8])
    np.testing.assert_array_equal(table.spherical_aberration_in_mm, stored[:, 6])


@needs_shared_data
def test_lists_of_the_zoo_beside_their_stack_are_read(tmp_path):
    toy = SHARED / "stacks" / "cryodrgn_toy"
    (tmp_path / "toy_projections.mrcs").symlink_to(toy / "toy_projections.mrcs")
    for name, n_times in (("cryodrgn_toy_projections.txt", 1), ("cryodrgn_toy_projections_2.txt", 2)):
        shutil.copy(SHARED / "parser_zoo" / "other" / name, tmp_path / "list.txt")
        ctf = dump(tmp_path / "ctf.pkl", np.tile(third_party_pickle("cryodrgn_toy", "test_ctf.pkl"), (n_times, 1)))
        table = read_particles(tmp_path / "list.txt", ctf=ctf)
        assert table.images.names == (str(tmp_path / "toy_projections.mrcs"),)
        np.testing.assert_array_equal(table.images.index, list(range(1000)) * n_times)


@needs_shared_data
@pytest.mark.parametrize("name", ["80S_4ug0_4A_80", "betagal_D2_3.54A_100"])
def test_a_map_is_not_taken_for_particles(name):
    path = SHARED / "volumes" / f"{name}.mrc"
    assert "voxels, not images of particles" in refusal(read_particles, path)


@needs_shared_data
def test_a_stack_that_is_marked_as_a_volume_is_still_a_stack():
    path = SHARED / "stacks" / "50S_empiar10076_cryodrgn" / "empiar_10076_7.mrc"
    assert "images without defocus, voltage and pixel size" in refusal(read_particles, path)


# ------------------------------------------------------------------------------ bare stacks


def test_a_stack_takes_its_ctf_from_cryodrgn(folder):
    table = read_particles(folder / "a.mrcs", ctf=folder / "ctf4.pkl")
    np.testing.assert_array_equal(read_images(table), IMAGES[:4].astype("f4"))
    # 64 pixels of 1.5 A in 32 pixels.
    np.testing.assert_allclose(table.pixel_size_in_angstroms, 3)
    columns = (
        table.defocus_u_in_angstroms,
        table.defocus_v_in_angstroms,
        table.defocus_angle_in_degrees,
        table.voltage_in_kilovolts,
        table.spherical_aberration_in_mm,
        table.amplitude_contrast,
        table.phase_shift_in_degrees,
    )
    np.testing.assert_array_equal(np.stack(columns, axis=1), CTF[:4, 2:])
    np.testing.assert_array_equal(table.b_factor_in_square_angstroms, 0)
    assert (table.poses, table.star, table.ignored) == (None, None, ())


def test_a_list_gives_the_images_of_its_stacks_in_its_order(folder):
    table = read_particles(folder / "list.txt", ctf=folder / "ctf.pkl")
    np.testing.assert_array_equal(read_images(table), IMAGES[[4, 5, 0, 1, 2, 3]].astype("f4"))
    np.testing.assert_array_equal(table.defocus_u_in_angstroms, CTF[:, 2])
    assert table.images.names == (str(folder / "more" / "b.mrcs"), str(folder / "a.mrcs"))


def test_a_list_may_name_whole_paths_and_a_stack_twice(folder):
    (folder / "list.txt").write_text(f"{folder}/more/b.mrcs\na.mrcs\nmore/b.mrcs")
    table = read_particles(folder / "list.txt", ctf=dump(folder / "ctf.pkl", CTF[[0, 1, 2, 3, 4, 5, 0, 1]]))
    np.testing.assert_array_equal(read_images(table), IMAGES[[4, 5, 0, 1, 2, 3, 4, 5]].astype("f4"))
    assert len(table.images.names) == 2


def test_a_stack_is_found_from_any_working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder / "more")
    table = read_particles(
        (folder / "more" / "b.mrcs").relative_to(folder / "more"), ctf=dump(folder / "c.pkl", CTF[:2])
    )
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(read_images(table), IMAGES[4:].astype("f4"))


@pytest.mark.parametrize("name", ["a.mrcs", "list.txt"])
def test_images_alone_are_refused_because_nothing_is_assumed(folder, name):
    message = refusal(read_particles, folder / name)
    assert message == (
        f"{folder / name}: images without defocus, voltage and pixel size, which are never assumed; "
        "give a STAR or .cs file of them, or with --ctf cryoDRGN's ctf.pkl"
    )


def test_as_many_rows_as_images_are_needed(folder):
    message = refusal(read_particles, folder / "a.mrcs", ctf=folder / "ctf.pkl")
    assert message.startswith(f"--ctf {folder / 'ctf.pkl'}: 6 rows for the 4 images of {folder / 'a.mrcs'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mrcs\nb.mrcs\n", "'b.mrcs' of line 2 is not there; one stack a line is needed"),
        ("p.star\n", "'p.star' of line 1 is no stack (.mrcs); one stack a line is needed"),
        ("\ufeff\n\n", "the list names no stack; give one a line"),
        ("more\n", "'more' of line 1 is no stack (.mrcs)"),
    ],
)
def test_a_list_that_names_no_stacks_is_refused(folder, text, message):
    (folder / "list.txt").write_text(text, encoding="utf-8")
    assert refusal(read_particles, folder / "list.txt", ctf=folder / "ctf.pkl").startswith(
        f"{folder / 'list.txt'}: {message}"
    )


def test_a_list_of_noise_is_refused(folder):
    (folder / "list.txt").write_bytes(b"\xff\xfe\xff")
    assert "not a text file" in refusal(read_particles, folder / "list.txt", ctf=folder / "ctf.pkl")


def test_a_pointer_in_a_list_is_named(folder):
    (folder / "a.mrcs").write_text("version https://git-lfs.github.com/spec/v1\n")
    message = refusal(read_particles, folder / "list.txt", ctf=folder / "ctf.pkl")
    assert message.startswith(f"{folder / 'a.mrcs'}: a Git LFS pointer")


def write_cube(path, n=32, *, as_volume):
    with mrcfile.new(path) as file:
        file.set_data(np.zeros((n, n, n), dtype="f4"))
        file.set_volume() if as_volume else file.set_image_stack()
    return path


def test_as_many_images_as_pixels_may_be_a_stack_or_a_map(tmp_path):
    ctf = dump(tmp_path / "ctf.pkl", CTF[np.zeros(32, dtype=int)])
    stack = write_cube(tmp_path / "stack.mrc", as_volume=False)
    assert len(read_particles(stack, ctf=ctf)) == 32
    assert "a map of 32 x 32 x 32 voxels, not images" in refusal(read_particles, stack)
    volume = write_cube(tmp_path / "map.mrcs", as_volume=True)
    assert "a map of 32 x 32 x 32 voxels, not images" in refusal(read_particles, volume, ctf=ctf)


# ------------------------------------------------------------------------------ kinds


def test_what_is_in_a_file_counts_more_than_its_name(folder):
    for old, new, kind in (
        ("p.star", "star.txt", FileKind.STAR),
        ("p.star", "star.cs", FileKind.STAR),
        ("p.cs", "dataset.npy", FileKind.CRYOSPARC),
        ("p.cs", "dataset.star", FileKind.CRYOSPARC),
        ("a.mrcs", "images.img", FileKind.STACK),
        ("a.mrcs", "images.txt", FileKind.STACK),
        ("ctf.pkl", "ctf", FileKind.PICKLE),
    ):
        shutil.copy(folder / old, folder / new)
        assert file_kind(folder / new) is kind, new
    assert len(read_particles(folder / "star.txt")) == 2


def test_a_stack_of_640_pixels_is_no_pickle_though_it_begins_like_one(tmp_path):
    path = write_images(tmp_path / "a.mrcs", np.zeros((1, 640, 640)))
    content = bytearray(path.read_bytes())
    content[208:212] = bytes(4)  # as old programs leave it
    path.write_bytes(content)
    assert content[:2] == b"\x80\x02"
    assert file_kind(path) is FileKind.STACK


REFUSED = {
    "a folder": ("x", lambda path: path.mkdir(), "a folder; give a RELION STAR file"),
    "nothing": ("x.star", lambda path: None, "no such file; give a RELION STAR file, a cryoSPARC .cs file, or"),  # noqa: ARG005
    "empty": ("x.star", lambda path: path.write_bytes(b" \n"), "the file is empty; give a RELION STAR file"),
    "pointer": ("x.mrcs", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS"),
    "annex": ("x.mrcs", lambda path: path.write_text("/annex/objects/MD5-s1\n"), "a git-annex pointer"),
    "gzip": ("x.star", lambda path: path.write_bytes(gzip.compress(b"data_")), "it is compressed; decompress it"),
    "bzip2": ("x.mrcs", lambda path: path.write_bytes(bz2.compress(b"data_")), "it is compressed; decompress it"),
    "HDF5": ("x.mrcs", lambda path: path.write_bytes(b"\x89HDF\r\n"), "an EMAN2 file; export the particles as .mrcs"),
    "noise": ("x.dat", lambda path: path.write_bytes(bytes(range(256))), "not a file of particles of a kind that is"),
    "text": ("x.md", lambda path: path.write_text("particles"), "not a file of particles of a kind that is known"),
    "no STAR": ("x.star", lambda path: path.write_text("particles"), "line 1 belongs to no table"),
    "no dataset": ("x.cs", lambda path: path.write_text("particles"), "not a cryoSPARC dataset"),
    "compressed dataset": ("x.cs", lambda path: path.write_bytes(b"\x95CSDAT"), "a compressed dataset"),
    "no group": ("x.csg", lambda path: path.write_text("particles"), "not a cryoSPARC dataset"),
    "no stack": ("x.mrcs", lambda path: path.write_text("particles"), "not a readable MRC file"),
    "FREALIGN": ("x.par", lambda path: path.write_text("C  1 2 3"), "FREALIGN parameters; convert them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_file_of_particles_is_refused(tmp_path, case):
    name, make, message = REFUSED[case]
    make(tmp_path / name)
    assert refusal(read_particles, tmp_path / name).startswith(f"{tmp_path / name}: {message}")


@pytest.mark.parametrize(("name", "kind"), [("p.star", "STAR file"), ("p.cs", "cryoSPARC dataset")])
def test_a_ctf_file_is_for_bare_stacks_only(folder, name, kind):
    message = refusal(read_particles, folder / name, ctf=folder / "ctf.pkl")
    assert message.startswith(
        f"--ctf {folder / 'ctf.pkl'}: is for bare stacks of images; {folder / name}, a {kind}, has"
    )


@pytest.mark.parametrize("name", ["p.star", "a.mrcs", "list.txt", "ctf.pkl"])
def test_a_passthrough_file_is_for_cryosparc_only(folder, name):
    message = refusal(read_particles, folder / name, passthrough=[folder / "p.cs"])
    assert message.startswith(
        f"--passthrough {folder / 'p.cs'}: is for a cryoSPARC .cs file, which {folder / name} is not"
    )


# ------------------------------------------------------------------------------ poses


def test_poses_of_each_kind_of_file_are_read(folder):
    star = read_poses(folder / "p.star")
    expected = Rotation.from_euler("ZYZ", [[1, 3, 5], [2, 4, 6]], degrees=True).as_matrix()
    np.testing.assert_allclose(star.rotations, expected, atol=1e-6)
    np.testing.assert_array_equal(star.shifts_in_angstroms, [[7, 0], [8, 0]])
    dataset = read_poses(folder / "p.cs")
    np.testing.assert_allclose(dataset.rotations, Rotation.from_rotvec([[0, 0, 1], [1, 0, 0]]).as_matrix(), atol=1e-6)
    np.testing.assert_array_equal(dataset.shifts_in_angstroms, [[2, 4], [6, 8]])
    cryodrgn = read_poses(folder / "pose.pkl", extent_in_angstroms=96)
    np.testing.assert_allclose(cryodrgn.rotations, np.stack([np.eye(3)] * 4), atol=1e-6)
    np.testing.assert_array_equal(cryodrgn.shifts_in_angstroms, np.full((4, 2), 24))
    assert star.rotations.dtype == dataset.rotations.dtype == cryodrgn.rotations.dtype == torch.float32


@needs_shared_data
def test_poses_of_the_same_particles_from_cryosparc_and_cryodrgn_are_the_same():
    folder = SHARED / "parser_zoo"
    first = read_poses(folder / "cs" / "cryodrgn_cryosparc_P12_J24_001_particles.cs")
    second = read_poses(folder / "pkl" / "cryodrgn_pose.cs.pkl", extent_in_angstroms=180 * 2.95)
    np.testing.assert_allclose(first.rotations, second.rotations, atol=2e-6)
    np.testing.assert_allclose(first.shifts_in_angstroms, second.shifts_in_angstroms, rtol=1e-5, atol=1e-4)


def test_shifts_of_cryodrgn_need_the_box(folder):
    assert "its shifts are fractions of the box, whose side in Å is not known here" in refusal(
        read_poses, folder / "pose.pkl"
    )
    rotations = dump(folder / "rotations.pkl", np.stack([np.eye(3)] * 4))
    np.testing.assert_array_equal(read_poses(rotations).shifts_in_angstroms, np.zeros((4, 2)))


def test_poses_in_a_passthrough_file_are_found(folder):
    with (folder / "main.cs").open("wb") as file:
        np.save(file, np.array([(7,), (7,)], dtype=[("uid", "u8")]))
    assert "no poses (alignments3D/pose)" in refusal(read_poses, folder / "main.cs")
    stored = np.load(folder / "p.cs")
    stored["uid"] = [5, 7]
    with (folder / "p.cs").open("wb") as file:
        np.save(file, stored)
    found = read_poses(folder / "main.cs", passthrough=[folder / "p.cs"])
    np.testing.assert_array_equal(found.shifts_in_angstroms, [[6, 8], [6, 8]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.mrcs", "a stack of images has no poses; give a STAR file, .cs file or cryoDRGN's pose.pkl"),
        ("list.txt", "a list of stacks has no poses"),
        ("ctf.pkl", "holds an array of shape (6, 9) and type float64; give cryoDRGN's pose.pkl"),
        ("none.star", "no poses (rlnAngleRot, rlnAngleTilt, rlnAnglePsi); give a file that has them"),
        ("nothing", "no such file"),
    ],
)
def test_a_file_without_poses_is_refused(folder, name, message):
    write_star(folder / "none.star", particle_columns(2), OPTICS)
    assert refusal(read_poses, folder / name).startswith(f"{folder / name}: {message}")
