import os
import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cryoai.errors import InputError
from cryoai.formats.cryodrgn import CryodrgnCtf, CryodrgnPoses, read_cryodrgn_ctf, read_cryodrgn_poses
from stacks import SHARED, needs_shared_data, plain_parse, refusal, third_party_pickle, zoo

# What the files of the zoo hold, and of how many particles.
CTF = {
    "cryodrgn_ctf1.pkl": 5,
    "cryodrgn_ctf2.pkl": 2019,
    "cryodrgn_test_ctf.100.pkl": 100,
    "drgnai_M_ctf.pkl": 10,
    "drgnai_hand_ctf.pkl": 500,
}
POSES = {
    "cryodrgn_pose.cs.pkl": 2019,
    "cryodrgn_pose.star.pkl": 5,
    "cryodrgn_toy_angles.pkl": 1000,
    "cryodrgn_toy_rot_trans.pkl": 1000,
    "drgnai_hand_pose.pkl": 100,
}
OTHERS = {
    "cryodrgn_ind100.pkl": "holds a list of particle numbers, an array of shape (100,) and type int64",
    "cryodrgn_toy_trans.zero.pkl": "holds an array of shape (1000, 2) and type float32",
    "cryodrgn_zvals_het-2_1k.pkl": "holds an array of shape (1319, 2) and type float32",
    "drgnai_hand-ind3.pkl": "holds a list of particle numbers, an array of shape (3,) and type int64",
}
RANDOM = np.random.default_rng(0)
N = 4
ROTATIONS = Rotation.random(N, rng=1).as_matrix()
SHIFTS = RANDOM.uniform(-0.1, 0.1, size=(N, 2))
ROWS = np.array([[64, 1.5, 15000, 14000, 10, 300, 2.7, 0.1, 0], [64, 1.5, 1e4, 9e3, -80, 300, 2.7, 0.1, 90]])


def dump(path, value, protocol=pickle.DEFAULT_PROTOCOL):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def rotations(poses):
    return Rotation.from_euler("ZYZ", poses.angles_in_degrees, degrees=True).as_matrix()


def ctf_columns(ctf):
    return np.stack([getattr(ctf, name) for name in CryodrgnCtf.__dataclass_fields__], axis=1)


@pytest.mark.parametrize("path", zoo("pkl"))
def test_a_file_of_the_zoo_is_read_as_by_numpy_or_refused_for_what_it_is(path):
    started = time.monotonic()
    if path.name in CTF:
        found = read_cryodrgn_ctf(path)
        assert len(found) == CTF[path.name]
        np.testing.assert_array_equal(ctf_columns(found), third_party_pickle("..", "parser_zoo", "pkl", path.name))
    else:
        assert refusal(read_cryodrgn_ctf, path).startswith(f"{path}: holds a")
    if path.name in POSES:
        found, stored = read_cryodrgn_poses(path), third_party_pickle("..", "parser_zoo", "pkl", path.name)
        assert len(found) == POSES[path.name]
        rotation, shift = stored if isinstance(stored, tuple) else (stored, None)
        np.testing.assert_allclose(rotations(found), rotation.transpose(0, 2, 1), atol=1e-6)
        np.testing.assert_array_equal(found.origins_in_boxes, shift)
    else:
        assert refusal(read_cryodrgn_poses, path).startswith(f"{path}: holds a")
    if path.name in OTHERS:
        assert refusal(read_cryodrgn_poses, path).startswith(f"{path}: {OTHERS[path.name]}; give cryoDRGN's pose.pkl")
    assert path.name in {**CTF, **POSES, **OTHERS}
    assert time.monotonic() - started < 1


@needs_shared_data
def test_poses_and_ctf_are_those_of_the_star_file_that_cryodrgn_made_them_of():
    """Origins and their sign, rotations, and the order of the columns."""
    zoo_folder = SHARED / "parser_zoo"
    star = plain_parse(zoo_folder / "star" / "cryodrgn_FinalRefinement-OriginalParticles-PfCRT.star")["images"]

    def columns(*names):
        return np.array([star[name] for name in names], dtype=float).T

    poses = read_cryodrgn_poses(zoo_folder / "pkl" / "cryodrgn_pose.star.pkl")
    euler = columns("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    expected = Rotation.from_euler("ZYZ", euler, degrees=True).as_matrix()
    np.testing.assert_allclose(rotations(poses), expected, atol=1e-9)
    pixel_size = 1.035
    found = poses.columns(300 * pixel_size)
    origins = columns("rlnOriginX", "rlnOriginY") * pixel_size
    np.testing.assert_allclose(found.origins_in_angstroms, origins, rtol=1e-9)
    ctf = ctf_columns(read_cryodrgn_ctf(zoo_folder / "pkl" / "cryodrgn_ctf1.pkl"))
    names = ("rlnDetectorPixelSize", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnVoltage")
    np.testing.assert_allclose(ctf[:, 1:7], columns(*names, "rlnSphericalAberration"), rtol=1e-6)
    np.testing.assert_array_equal(ctf[:, 0], 300)
    np.testing.assert_array_equal(ctf[:, 8], columns("rlnPhaseShift")[:, 0])


# ------------------------------------------------------------------------------ contrast transfer functions


def test_the_extent_is_the_same_however_finely_the_images_are_sampled(tmp_path):
    ctf = read_cryodrgn_ctf(dump(tmp_path / "ctf.pkl", ROWS.astype(np.float32)))
    np.testing.assert_array_equal(ctf.n_pixels, [64, 64])
    np.testing.assert_array_equal(ctf.extent_in_angstroms, [96, 96])
    np.testing.assert_array_equal(ctf.phase_shift_in_degrees, [0, 90])
    assert ctf.defocus_u_in_angstroms.dtype == np.float64


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (1, 0, 0, "the box size of row 2 is 0; it must be positive"),
        (1, 0, 64.5, "the box size of row 2 is 64.5 pixels; give cryoDRGN's ctf.pkl"),
        (1, 0, 1e9, "the box size of row 2 is 1e+09 pixels; give cryoDRGN's ctf.pkl"),
        (0, 1, -1, "the pixel size of row 1 is -1; it must be positive"),
        (0, 2, np.nan, "the defocus U of row 1 is nan; a finite number is needed"),
        (1, 4, np.inf, "the defocus angle of row 2 is inf; a finite number is needed"),
        (0, 5, 0, "the voltage of row 1 is 0; it must be positive"),
    ],
)
def test_an_impossible_value_is_named(tmp_path, row, column, value, message):
    rows = ROWS.copy()
    rows[row, column] = value
    path = dump(tmp_path / "ctf.pkl", rows)
    assert refusal(read_cryodrgn_ctf, path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "value",
    [ROWS[:, :8], ROWS[:0], ROWS[0], ROWS.astype("S8"), ROWS.astype("c16"), (ROWS,), [], None, "ctf", {"ctf": 1}],
    ids=["eight columns", "no rows", "one row", "text", "complex", "tuple", "empty", "nothing", "word", "dictionary"],
)
def test_what_is_no_table_is_described(tmp_path, value):
    path = dump(tmp_path / "ctf.pkl", value)
    message = refusal(read_cryodrgn_ctf, path)
    assert message.startswith(f"{path}: holds a")
    assert message.endswith("; give cryoDRGN's ctf.pkl, 9 numbers for each particle")


# ------------------------------------------------------------------------------ poses


def test_rotations_alone_are_those_of_centred_images(tmp_path):
    for value in (ROTATIONS, (ROTATIONS,), [ROTATIONS]):
        poses = read_cryodrgn_poses(dump(tmp_path / "pose.pkl", value))
        assert poses.origins_in_boxes is None
        np.testing.assert_allclose(rotations(poses), ROTATIONS.transpose(0, 2, 1), atol=1e-9)
        np.testing.assert_array_equal(poses.columns(100.0).origins_in_angstroms, np.zeros((N, 2)))


def test_shifts_are_fractions_of_the_box_of_each_image():
    extents = np.array([100.0, 200, 300, 400])
    found = CryodrgnPoses(np.zeros((N, 3)), SHIFTS)
    np.testing.assert_array_equal(found.columns(extents).origins_in_angstroms, SHIFTS * extents[:, None])
    np.testing.assert_array_equal(found.columns(50).origins_in_angstroms, SHIFTS * 50)


def test_a_tilt_of_zero_is_read_without_a_word(tmp_path):
    turns = Rotation.from_euler("Z", [[10], [0], [-170], [90]], degrees=True).as_matrix()
    poses = read_cryodrgn_poses(dump(tmp_path / "pose.pkl", (turns, SHIFTS)))
    np.testing.assert_allclose(rotations(poses), turns.transpose(0, 2, 1), atol=1e-9)


NO_ROTATIONS = {
    "mirror": ROTATIONS * np.array([1, 1, -1]),
    "scaled": ROTATIONS * 1.01,
    "sheared": ROTATIONS + np.eye(3)[None, :, ::-1] * 0.01,
    "not a number": ROTATIONS * np.nan,
    "zero": ROTATIONS * 0,
}


@pytest.mark.parametrize("case", NO_ROTATIONS)
def test_a_matrix_that_is_no_rotation_is_named(tmp_path, case):
    matrices = ROTATIONS.copy()
    matrices[2] = NO_ROTATIONS[case][2]
    path = dump(tmp_path / "pose.pkl", (matrices, SHIFTS))
    assert refusal(read_cryodrgn_poses, path).startswith(f"{path}: the matrix of row 3 is no rotation")


@pytest.mark.parametrize("value", [3.5, -3.5, np.nan])
def test_shifts_in_pixels_are_refused(tmp_path, value):
    shifts = SHIFTS.copy()
    shifts[1, 0] = value
    path = dump(tmp_path / "pose.pkl", (ROTATIONS, shifts))
    assert refusal(read_cryodrgn_poses, path).startswith(f"{path}: the shift of row 2 is ({value:g}, ")


@pytest.mark.parametrize(
    "value",
    [(ROTATIONS, SHIFTS[:3]), (ROTATIONS, SHIFTS.T), (ROTATIONS, SHIFTS, SHIFTS), (), (ROTATIONS, "x"), ROWS],
    ids=["fewer shifts", "turned shifts", "three parts", "empty", "text", "ctf"],
)
def test_what_are_no_poses_is_described(tmp_path, value):
    path = dump(tmp_path / "pose.pkl", value)
    assert refusal(read_cryodrgn_poses, path).startswith(f"{path}: holds a")


@given(st.lists(st.tuples(*[st.floats(-1, 1)] * 6), min_size=1, max_size=20), st.sampled_from(["f4", "f8"]))
def test_poses_that_are_written_are_read_in_every_version_of_the_format(tmp_path_factory, rows, kind):
    path = tmp_path_factory.getbasetemp() / "pose.pkl"
    values = np.array(rows)
    matrices = Rotation.from_rotvec(values[:, :3] * 3).as_matrix().astype(kind)
    shifts = values[:, 3:5].astype(kind)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found = read_cryodrgn_poses(dump(path, (matrices, shifts), protocol))
        np.testing.assert_allclose(rotations(found), matrices.transpose(0, 2, 1), atol=1e-6)
        np.testing.assert_array_equal(found.origins_in_boxes, shifts)


def test_arrays_of_columns_first_and_other_byte_orders_are_read_in_every_version_of_the_format(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in (np.asfortranarray(ROWS), ROWS.astype(">f4"), ROWS.astype("f2"), ROWS[:, ::-1][:, ::-1]):
            found = read_cryodrgn_ctf(dump(tmp_path / "ctf.pkl", value, protocol))
            np.testing.assert_array_equal(ctf_columns(found), value)


# ------------------------------------------------------------------------------ pickles that do harm


class Call:
    """Pickled as a call that is made when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_pickle_is_run(tmp_path, protocol):
    for value in (
        Call(os.mkdir, str(tmp_path / "made")),
        Call(eval, f"__import__('os').mkdir({str(tmp_path / 'made')!r})"),
        (ROTATIONS, Call(os.mkdir, str(tmp_path / "made"))),
        np.array([Call(os.mkdir, str(tmp_path / "made"))], dtype=object),
        Call(np.memmap, str(tmp_path / "made"), "u1", "w+", 0, 1),
        Call(np.save, str(tmp_path / "made"), 1),
    ):
        path = dump(tmp_path / "pose.pkl", value, protocol)
        assert "not plain arrays; give cryoDRGN's pose.pkl" in refusal(read_cryodrgn_poses, path)
        assert "not plain arrays; give cryoDRGN's ctf.pkl" in refusal(read_cryodrgn_ctf, path)
        assert [file.name for file in tmp_path.iterdir()] == ["pose.pkl"]


def test_what_a_pickle_would_run_is_named(tmp_path):
    path = dump(tmp_path / "pose.pkl", Call(eval, "1"))
    assert refusal(read_cryodrgn_poses, path) == (
        f"{path}: holds a builtins.eval, not plain arrays; give cryoDRGN's pose.pkl"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"data_\nloop_\n", "not a pickle"),
        (b"\x80\x04\x95", "not a pickle"),
        (b"\x93NUMPY\1\0", "not a pickle"),
        (pickle.dumps(ROWS)[:-20], "not a pickle"),
        (b"\x80\x04\x8c\x02no\x8c\x04\xff\xff\xff\xff\x93.", "not a pickle"),
        (b"(" * 100_000 + b"t" * 100_000 + b".", "holds a tuple of 1: a tuple"),
    ],
    ids=["empty", "pointer", "text", "head", "NumPy", "cut short", "noise", "deep"],
)
def test_what_is_no_pickle_is_refused(tmp_path, content, message):
    path = tmp_path / "ctf.pkl"
    path.write_bytes(content)
    assert refusal(read_cryodrgn_ctf, path).startswith(f"{path}: {message}")


def test_a_missing_file_is_named(tmp_path):
    assert refusal(read_cryodrgn_ctf, tmp_path / "a.pkl") == (
        f"{tmp_path / 'a.pkl'}: no such file; give cryoDRGN's ctf.pkl"
    )


@given(st.data())
def test_a_damaged_pickle_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    content = bytearray(pickle.dumps((ROTATIONS[:1], SHIFTS[:1])))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        outcome = read_cryodrgn_poses(path)
    except InputError as error:
        outcome = str(error)
    assert len(outcome) > 0
    assert isinstance(outcome, CryodrgnPoses) or "\n" not in outcome
