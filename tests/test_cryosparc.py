import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cryoai.errors import InputError
from cryoai.formats.cryosparc import (
    is_cryosparc,
    read_cryosparc,
    read_cryosparc_poses,
    rewrite_cryosparc,
    write_cryosparc,
    write_cryosparc_group,
)
from cryoai.formats.star import read_star
from cryoai.formats.table import ImageReferences, ParticleTable, PoseColumns
from stacks import (
    OPTICS,
    SHARED,
    files_in,
    needs_shared_data,
    particle_columns,
    refusal,
    third_party_pickle,
    write_star,
    zoo,
)

CS = SHARED / "parser_zoo" / "cs"
PAIR = CS / "cryodrgn_cryosparc_P12_J24_001_particles.cs"
LARGE = SHARED / "metadata" / "t20s_cryosparc_P9_J209_000_particles.cs"
# The files of the zoo that describe particles completely, and how many.
READABLE = {
    "cryodrgn_cryosparc_J2_particles_exported.cs": 22,
    "cryodrgn_cryosparc_P12_J24_001_particles.cs": 2019,
    "cryodrgn_empiar_10076_7.cs": 7,
}
REASONS = {
    "LFSPOINTER_cryosparc_P25_J1069_00042_particles.cs": "a Git LFS pointer",
    "LFSPOINTER_gP25W6J1497_passthrough_particles_all_classes.cs": "a Git LFS pointer",
    "cryosparctools_4k_dataset.cs": "the dataset has no rows",
    "t20s_P9_J209_mask.csg": "a cryoSPARC group file, which only names cryosparc_P9_J209_005_volume_mask_refine.cs, "
    "and these are no particles",
    "t20s_P9_J209_particles.csg": "a cryoSPARC group file, which only names P9_J209_passthrough_particles.cs, "
    "cryosparc_P9_J209_005_particles.cs; give cryosparc_P9_J209_005_particles.cs "
    "--passthrough P9_J209_passthrough_particles.cs",
    "t20s_P9_J209_volume.csg": "a cryoSPARC group file, which only names cryosparc_P9_J209_005_volume_map.cs, ",
    "t20s_cryosparc_P9_J209_000_volume_map.cs": "blob/path is missing, the images of particles (there are map)",
    "t20s_cryosparc_P9_J209_000_volume_map_half_A.cs": "blob/path is missing, the images of particles",
    "t20s_cryosparc_P9_J209_000_volume_mask_fsc.cs": "blob/path is missing, the images of particles",
}
RANDOM = np.random.default_rng(0)
N = 5
COLUMNS = {
    "uid": np.array([11, 7, 2**64 - 1, 3, 5], dtype="u8"),
    "blob/path": np.array([b"b.mrc", b">a/x.mrcs", b"b.mrc", b"b.mrc", b"\xc3\xa9.mrc"]),
    "blob/idx": np.array([4, 0, 2, 1, 9], dtype="u4"),
    "blob/shape": np.full((N, 2), 64, dtype="u4"),
    "blob/psize_A": np.array([1.5, 1.5, 2, 2, 1], dtype="f4"),
    "ctf/accel_kv": np.array([300, 300, 200, 200, 120], dtype="f4"),
    "ctf/cs_mm": np.full(N, 2.7, dtype="f4"),
    "ctf/amp_contrast": np.full(N, 0.07, dtype="f4"),
    "ctf/df1_A": np.linspace(9000, 21000, N, dtype="f4"),
    "ctf/df2_A": np.linspace(8000, 20000, N, dtype="f4"),
    "ctf/df_angle_rad": np.linspace(-2, 2, N, dtype="f4"),
    "ctf/phase_shift_rad": np.linspace(0, 3, N, dtype="f4"),
    "ctf/bfactor": np.linspace(0, 40, N, dtype="f4"),
    "ctf/tilt_A": np.zeros((N, 2), dtype="f4"),
    "ctf/anisomag": np.zeros((N, 4), dtype="f4"),
    "alignments3D/split": np.array([0, 1, 1, 0, 1], dtype="u4"),
    "alignments3D/shift": RANDOM.normal(size=(N, 2)).astype("f4"),
    "alignments3D/pose": RANDOM.normal(size=(N, 3)).astype("f4"),
    "alignments3D/psize_A": np.array([3, 3, 4, 4, 2], dtype="f4"),
}
POSES = PoseColumns(RANDOM.uniform(-180, 180, size=(N, 3)), RANDOM.normal(size=(N, 2)))


def save(path, columns):
    fields = [(name, values.dtype, values.shape[1:]) for name, values in columns.items()]
    records = np.empty(len(columns["uid"]), dtype=fields)
    for name, values in columns.items():
        records[name] = values
    with path.open("wb") as file:
        np.save(file, records)
    return path


def without(columns, *names):
    return {name: values for name, values in columns.items() if name not in names}


def rotations(poses):
    return Rotation.from_euler("ZYZ", poses.angles_in_degrees, degrees=True).as_matrix()


def assert_same_tables(first, second):
    for item in dataclasses.fields(first):
        a, b = getattr(first, item.name), getattr(second, item.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=item.name)
    assert first.images.names == second.images.names
    np.testing.assert_array_equal(first.images.stack, second.images.stack)
    np.testing.assert_array_equal(first.images.index, second.images.index)
    np.testing.assert_array_equal(first.poses.angles_in_degrees, second.poses.angles_in_degrees)
    np.testing.assert_array_equal(first.poses.origins_in_angstroms, second.poses.origins_in_angstroms)


def assert_read_as_by_numpy(path, n_particles):
    table, stored = read_cryosparc(path), np.load(path)
    assert len(table) == n_particles == len(stored)
    np.testing.assert_array_equal(table.images.index, stored["blob/idx"])
    names = [table.images.names[s] for s in table.images.stack]
    assert names == [name.decode().replace(">", "") for name in stored["blob/path"]]
    np.testing.assert_array_equal(table.pixel_size_in_angstroms, stored["blob/psize_A"])
    np.testing.assert_array_equal(table.voltage_in_kilovolts, stored["ctf/accel_kv"])
    np.testing.assert_array_equal(table.spherical_aberration_in_mm, stored["ctf/cs_mm"])
    np.testing.assert_array_equal(table.amplitude_contrast, stored["ctf/amp_contrast"])
    np.testing.assert_array_equal(table.defocus_u_in_angstroms, stored["ctf/df1_A"])
    np.testing.assert_array_equal(table.defocus_v_in_angstroms, stored["ctf/df2_A"])
    np.testing.assert_allclose(table.defocus_angle_in_degrees, stored["ctf/df_angle_rad"] * 57.29578, rtol=0, atol=1e-4)
    assert table.ignored == ()
    if table.poses is not None:
        expected = Rotation.from_rotvec(stored["alignments3D/pose"]).as_matrix()
        np.testing.assert_allclose(rotations(table.poses), expected, atol=1e-6)
        origins = stored["alignments3D/shift"] * stored["alignments3D/psize_A"][:, None]
        np.testing.assert_allclose(table.poses.origins_in_angstroms, origins, rtol=1e-6)


# ------------------------------------------------------------------------------ files of cryoSPARC


@pytest.mark.parametrize("path", zoo("cs"))
def test_a_file_of_the_zoo_is_read_as_by_numpy_or_refused_for_what_it_is(path):
    started = time.monotonic()
    if path.name in READABLE:
        assert_read_as_by_numpy(path, READABLE[path.name])
    else:
        assert refusal(read_cryosparc, path).startswith(f"{path}: {REASONS[path.name]}")
    assert time.monotonic() - started < 1


@needs_shared_data
def test_a_large_dataset_is_read_as_by_numpy():
    assert_read_as_by_numpy(LARGE, 11764)


@needs_shared_data
def test_poses_and_ctf_are_what_cryodrgn_makes_of_the_same_dataset():
    """Its rotation is the transpose of ours, its shift RELION's origin over the box (see test_cryodrgn)."""
    table = read_cryosparc(PAIR)
    rotation, shift = third_party_pickle("..", "parser_zoo", "pkl", "cryodrgn_pose.cs.pkl")
    ctf = third_party_pickle("..", "parser_zoo", "pkl", "cryodrgn_ctf2.pkl").T
    np.testing.assert_allclose(rotations(table.poses), rotation.transpose(0, 2, 1), atol=1e-6)
    np.testing.assert_allclose(table.poses.origins_in_angstroms, shift * 180 * 2.95, rtol=1e-5, atol=1e-5)
    ours = (
        table.pixel_size_in_angstroms,
        table.defocus_u_in_angstroms,
        table.defocus_v_in_angstroms,
        table.defocus_angle_in_degrees,
        table.voltage_in_kilovolts,
        table.spherical_aberration_in_mm,
        table.amplitude_contrast,
        table.phase_shift_in_degrees,
    )
    for found, expected in zip(ours, ctf[1:], strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@needs_shared_data
def test_a_dataset_and_a_star_file_of_the_same_particles_say_the_same():
    """One was imported from the other."""
    folder = SHARED / "stacks" / "50S_empiar10076_cryodrgn"
    first, second = read_cryosparc(folder / "empiar_10076_7.cs"), read_star(folder / "empiar_10076_7.star")
    assert first.images.names == second.images.names
    np.testing.assert_array_equal(first.images.index, second.images.index)
    for item in dataclasses.fields(first):
        values = getattr(first, item.name)
        if isinstance(values, np.ndarray):
            np.testing.assert_allclose(values, getattr(second, item.name), rtol=1e-6, err_msg=item.name)


# ------------------------------------------------------------------------------ reading


def test_shifts_are_in_pixels_of_the_alignment_and_paths_lose_the_mark_of_an_import(tmp_path):
    path = save(tmp_path / "p.cs", COLUMNS)
    table = read_cryosparc(path)
    assert [table.images.names[s] for s in table.images.stack] == ["b.mrc", "a/x.mrcs", "b.mrc", "b.mrc", "é.mrc"]
    assert len(table.images.names) == 3
    expected = COLUMNS["alignments3D/shift"] * np.array([3, 3, 4, 4, 2])[:, None]
    np.testing.assert_allclose(table.poses.origins_in_angstroms, expected, rtol=1e-6)
    np.testing.assert_allclose(
        table.phase_shift_in_degrees, np.rad2deg(COLUMNS["ctf/phase_shift_rad"]), rtol=0, atol=1e-4
    )
    np.testing.assert_array_equal(table.b_factor_in_square_angstroms, COLUMNS["ctf/bfactor"])


def test_text_may_be_of_either_kind_and_numbers_of_any_size_and_byte_order(tmp_path):
    table = read_cryosparc(save(tmp_path / "p.cs", COLUMNS))
    columns = {
        name: values.astype(">f8") if values.dtype.kind == "f" else values.astype(">i8") for name, values in
        without(COLUMNS, "uid", "blob/path").items()
    }  # fmt: skip
    columns["blob/path"] = np.array([name.decode() for name in COLUMNS["blob/path"]])
    other = read_cryosparc(save(tmp_path / "q.cs", {"uid": COLUMNS["uid"].astype(">u8"), **columns}))
    assert_same_tables(table, dataclasses.replace(other, path=table.path))


def test_without_poses_there_are_none_and_two_fields_mean_zero_where_old_versions_lack_them(tmp_path):
    names = [name for name in COLUMNS if name.startswith("alignments3D")]
    table = read_cryosparc(save(tmp_path / "p.cs", without(COLUMNS, "ctf/phase_shift_rad", "ctf/bfactor", *names)))
    assert table.poses is None
    np.testing.assert_array_equal(table.phase_shift_in_degrees, 0)
    np.testing.assert_array_equal(table.b_factor_in_square_angstroms, 0)


def test_poses_are_read_from_a_dataset_that_holds_nothing_else(tmp_path):
    names = [name for name in COLUMNS if not name.startswith("alignments3D")]
    table = read_cryosparc(save(tmp_path / "p.cs", COLUMNS))
    poses = read_cryosparc_poses(save(tmp_path / "q.cs", {"uid": COLUMNS["uid"], **without(COLUMNS, *names)}))
    np.testing.assert_array_equal(poses.angles_in_degrees, table.poses.angles_in_degrees)
    np.testing.assert_array_equal(poses.origins_in_angstroms, table.poses.origins_in_angstroms)
    assert read_cryosparc_poses(save(tmp_path / "r.cs", {"uid": COLUMNS["uid"]})) is None


def test_half_sets_are_read_and_faults_matter_only_to_those_who_ask_for_them(tmp_path):
    table = read_cryosparc(save(tmp_path / "p.cs", COLUMNS))
    np.testing.assert_array_equal(table.half_set, COLUMNS["alignments3D/split"])
    np.testing.assert_array_equal(table.usable_half_set(), COLUMNS["alignments3D/split"])
    split = COLUMNS["alignments3D/split"].copy()
    split[3] = 2
    for name, values, message in (
        ("third", split, "alignments3D/split of particle row 4 is neither 0 nor 1; mend it, or give --half-sets new"),
        ("one", np.ones(N, dtype="u4"), f"alignments3D/split is 0 for 0 of {N} particles; 10% of them at least"),
        ("pairs", np.zeros((N, 2), dtype="u4"), "alignments3D/split of particle row 1 is neither 0 nor 1; mend it"),
    ):
        path = save(tmp_path / f"{name}.cs", COLUMNS | {"alignments3D/split": values})
        assert refusal(read_cryosparc(path).usable_half_set).startswith(f"{path}: {message}")
    path = save(tmp_path / "none.cs", without(COLUMNS, "alignments3D/split"))
    assert read_cryosparc(path).half_set is None
    assert refusal(read_cryosparc(path).usable_half_set).startswith(f"{path}: no half sets (alignments3D/split)")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ctf/tilt_A", "not applied: beam tilt (ctf/tilt_A)"),
        ("ctf/shift_A", "not applied: shift of the image by the beam tilt (ctf/shift_A)"),
        ("ctf/trefoil_A", "not applied: trefoil (ctf/trefoil_A)"),
        ("ctf/tetra_A", "not applied: tetrafoil (ctf/tetra_A)"),
        ("ctf/anisomag", "not applied: anisotropic magnification (ctf/anisomag)"),
    ],
)
def test_aberrations_that_are_left_out_are_named(tmp_path, name, line):
    values = np.zeros((N, 4 if name in ("ctf/tetra_A", "ctf/anisomag") else 2), dtype="f4")
    assert read_cryosparc(save(tmp_path / "p.cs", {**COLUMNS, name: values})).ignored == ()
    values[3, 1] = 0.001
    assert read_cryosparc(save(tmp_path / "p.cs", {**COLUMNS, name: values})).ignored == (line,)


def test_a_dataset_of_more_fields_than_numpy_allows_by_itself_is_read(tmp_path):
    classes = {f"alignments_class_{i}/class_posterior": np.zeros(N, dtype="f4") for i in range(300)}
    path = save(tmp_path / "p.cs", {**COLUMNS, **classes})
    with pytest.raises(ValueError, match="Header info length"):
        np.load(path)
    assert len(read_cryosparc(path)) == N


BLOB = [name for name in COLUMNS if name.startswith("blob")]
OTHERS = [name for name in COLUMNS if name != "uid" and not name.startswith("blob")]


def shuffled_with_more(columns, seed=1):
    """The same particles in another order, among others that nobody asked for."""
    more = {name: np.concatenate([values, values]) for name, values in columns.items()}
    more["uid"] = np.concatenate([columns["uid"], columns["uid"] // np.uint64(2) + np.uint64(1000)])
    order = np.random.default_rng(seed).permutation(2 * N)
    return {name: values[order] for name, values in more.items()}


def test_passthrough_files_are_joined_by_uid_not_by_row(tmp_path):
    whole = read_cryosparc(save(tmp_path / "whole.cs", COLUMNS))
    main = save(tmp_path / "main.cs", without(COLUMNS, *BLOB))
    passthrough = save(tmp_path / "passthrough.cs", shuffled_with_more(without(COLUMNS, *OTHERS)))
    assert_same_tables(whole, dataclasses.replace(read_cryosparc(main, [passthrough]), path=whole.path))
    three = save(tmp_path / "three.cs", without(COLUMNS, *BLOB, "alignments3D/pose"))
    poses = save(tmp_path / "poses.cs", shuffled_with_more(without(COLUMNS, *BLOB, *OTHERS[:-3]), seed=2))
    assert_same_tables(whole, dataclasses.replace(read_cryosparc(three, [passthrough, poses]), path=whole.path))


def test_fields_of_the_main_file_come_before_those_of_the_passthrough(tmp_path):
    main = save(tmp_path / "main.cs", without(COLUMNS, *BLOB))
    other = {name: values * 2 if values.dtype.kind == "f" else values for name, values in COLUMNS.items()}
    table = read_cryosparc(main, [save(tmp_path / "passthrough.cs", other)])
    np.testing.assert_array_equal(table.defocus_u_in_angstroms, COLUMNS["ctf/df1_A"])
    np.testing.assert_array_equal(table.pixel_size_in_angstroms, 2 * COLUMNS["blob/psize_A"])


def test_particles_that_the_passthrough_lacks_are_counted(tmp_path):
    main = save(tmp_path / "main.cs", without(COLUMNS, *BLOB))
    few = {name: values[1:4] for name, values in without(COLUMNS, *OTHERS).items()}
    passthrough = save(tmp_path / "passthrough.cs", few)
    message = refusal(read_cryosparc, main, [passthrough])
    assert message.startswith(f"--passthrough {passthrough}: has no row for 2 of the 5 particles of {main}")


def test_a_passthrough_that_lists_a_particle_twice_is_refused(tmp_path):
    main = save(tmp_path / "main.cs", without(COLUMNS, *BLOB))
    twice = {name: np.concatenate([values, values[1:3]]) for name, values in without(COLUMNS, *OTHERS).items()}
    assert "lists 2 particles twice" in refusal(read_cryosparc, main, [save(tmp_path / "passthrough.cs", twice)])


def test_a_particle_listed_twice_in_the_main_file_is_read_twice(tmp_path):
    twice = {name: np.concatenate([values, values[1:3]]) for name, values in without(COLUMNS, *BLOB).items()}
    passthrough = save(tmp_path / "passthrough.cs", without(COLUMNS, *OTHERS))
    table = read_cryosparc(save(tmp_path / "main.cs", twice), [passthrough])
    np.testing.assert_array_equal(table.images.index, [*COLUMNS["blob/idx"], *COLUMNS["blob/idx"][1:3]])


def changed(name, row, value):
    values = COLUMNS[name].copy()
    values[row] = value
    return {**COLUMNS, name: values}


FIX = "it may be in the passthrough file of the same job: give that with --passthrough FILE"
REFUSED = {
    "no images": (without(COLUMNS, "blob/path"), "blob/path is missing, the images of particles (there are alignments"),
    "no index": (without(COLUMNS, "blob/idx"), f"blob/idx is missing; {FIX}"),
    "no pixel size": (without(COLUMNS, "blob/psize_A"), f"blob/psize_A is missing; {FIX}"),
    "no defocus": (without(COLUMNS, "ctf/df2_A"), f"ctf/df2_A is missing; {FIX}"),
    "no angle of it": (without(COLUMNS, "ctf/df_angle_rad"), f"ctf/df_angle_rad is missing; {FIX}"),
    "no voltage": (without(COLUMNS, "ctf/accel_kv"), f"ctf/accel_kv is missing; {FIX}"),
    "no aberration": (without(COLUMNS, "ctf/cs_mm"), f"ctf/cs_mm is missing; {FIX}"),
    "no amplitude contrast": (without(COLUMNS, "ctf/amp_contrast"), f"ctf/amp_contrast is missing; {FIX}"),
    "poses without shifts": (without(COLUMNS, "alignments3D/shift"), f"alignments3D/shift is missing; {FIX}"),
    "poses without pixels": (without(COLUMNS, "alignments3D/psize_A"), f"alignments3D/psize_A is missing; {FIX}"),
    "not a number": (changed("ctf/df1_A", 2, np.nan), "ctf/df1_A of particle row 3 is nan; finite values are needed"),
    "infinite": (changed("ctf/bfactor", 4, np.inf), "ctf/bfactor of particle row 5 is inf; finite values are needed"),
    "pose": (changed("alignments3D/pose", 1, [0, np.nan, 1]), "alignments3D/pose of particle row 2 is 0 nan 1; finite"),
    "pixel size": (changed("blob/psize_A", 1, 0), "blob/psize_A of particle row 2 is 0; it must be positive"),
    "voltage": (changed("ctf/accel_kv", 0, -3), "ctf/accel_kv of particle row 1 is -3; it must be positive"),
    "empty path": (changed("blob/path", 3, b""), "blob/path of particle row 4 is b''; a path is needed"),
    "mark alone": (changed("blob/path", 3, b">"), "blob/path of particle row 4 is b'>'; a path is needed"),
    "path of noise": (changed("blob/path", 3, b"\xff"), "blob/path of particle row 4 is b'\\xff'; a path is needed"),
    "index": (changed("blob/idx", 3, 2**31), "blob/idx of particle row 4 is 2147483648; export it again"),
    "text for a number": (
        {**COLUMNS, "ctf/cs_mm": np.full(N, b"2.7")},
        "ctf/cs_mm is of type |S3 and shape () for each particle; a number is needed",
    ),
    "two numbers for one": (
        {**COLUMNS, "ctf/cs_mm": np.ones((N, 2), dtype="f4")},
        "ctf/cs_mm is of type float32 and shape (2,) for each particle; a number is needed",
    ),
    "pose of two angles": (
        {**COLUMNS, "alignments3D/pose": np.ones((N, 2), dtype="f4")},
        "alignments3D/pose is of type float32 and shape (2,) for each particle; 3 numbers are needed",
    ),
    "index as a fraction": (
        {**COLUMNS, "blob/idx": np.ones(N, dtype="f4")},
        "blob/path and blob/idx are of types |S9 and float32; a name and a whole number are needed",
    ),
    "uid of text": ({**COLUMNS, "uid": np.full(N, b"a")}, "uid is of type |S1; whole numbers are needed"),
    "no rows": ({name: values[:0] for name, values in COLUMNS.items()}, "the dataset has no rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_wrong_is_named(tmp_path, case):
    columns, message = REFUSED[case]
    path = save(tmp_path / "p.cs", columns)
    assert refusal(read_cryosparc, path).startswith(f"{path}: {message}")


def test_what_the_passthrough_lacks_too_is_named_so(tmp_path):
    main = save(tmp_path / "main.cs", without(COLUMNS, "ctf/cs_mm"))
    passthrough = save(tmp_path / "passthrough.cs", without(COLUMNS, *OTHERS))
    assert refusal(read_cryosparc, main, [passthrough]).startswith(
        f"{main}: ctf/cs_mm is missing; it is in none of the passthrough files either"
    )


def saved(array, **options):
    def make(path):
        with path.open("wb") as file:
            np.save(file, array, **options)

    return make


def header(text):
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


NO_DATASET = {
    "nothing": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("data_\nloop_\n"), "not a cryoSPARC dataset"),
    "plain array": (saved(np.zeros(3)), "a plain NumPy array without named fields"),
    "array of records": (saved(np.zeros((2, 2), dtype=[("uid", "u8")])), "a plain NumPy array without named fields"),
    "no uid": (saved(np.zeros(2, dtype=[("a", "u8")])), "no field uid"),
    "objects": (saved(np.array([(1, {})], dtype=[("uid", "u8"), ("a", "O")])), "not a readable cryoSPARC dataset: it "
                "holds Python objects"),
    "old compressed": (lambda path: path.write_bytes(b"\x94CSDAT\0\0\0\0"), "a compressed dataset; save it as plain"),
    "new compressed": (lambda path: path.write_bytes(b"\x95CSDAT\0\0\0\0"), "a compressed dataset; save it as plain"),
    "parquet": (lambda path: path.write_bytes(b"PAR1\0\0"), "a Parquet dataset; save it as plain NumPy"),
    "header alone": (lambda path: path.write_bytes(b"\x93NUMPY\1\0"), "not a readable cryoSPARC dataset: it is"),
    "no header": (lambda path: path.write_bytes(header(b"{'descr': ((((")), "not a readable cryoSPARC dataset"),
    "version": (lambda path: path.write_bytes(b"\x93NUMPY\7\0\0\0"), "not a readable cryoSPARC dataset"),
    "endless": (
        lambda path: path.write_bytes(
            header(b"{'descr': [('uid', '<u8')], 'fortran_order': False, 'shape': (%d,)}" % 10**15)
        ),
        "not a readable cryoSPARC dataset: it is damaged or was cut short",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_DATASET)
def test_what_is_no_dataset_is_refused(tmp_path, case):
    make, message = NO_DATASET[case]
    make(tmp_path / "p.cs")
    assert refusal(read_cryosparc, tmp_path / "p.cs").startswith(f"{tmp_path / 'p.cs'}: {message}")


@pytest.mark.parametrize("n_rows", [5, 50_000], ids=["small", "mapped"])
def test_a_dataset_that_was_cut_short_is_refused(tmp_path, n_rows):
    rows = np.arange(n_rows) % N
    path = save(tmp_path / "p.cs", {name: values[rows] for name, values in COLUMNS.items()})
    assert len(read_cryosparc(path)) == n_rows
    path.write_bytes(path.read_bytes()[:-1])
    assert "it is damaged or was cut short" in refusal(read_cryosparc, path)


@given(st.data())
def test_a_damaged_dataset_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.cs"
    content = bytearray(save(path, COLUMNS).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        outcome = read_cryosparc(path)
    except InputError as error:
        outcome = str(error)
    assert len(outcome) > 0
    assert isinstance(outcome, ParticleTable) or "\n" not in outcome


def test_datasets_are_known_by_their_content(tmp_path):
    assert is_cryosparc(save(tmp_path / "p.txt", COLUMNS))
    (tmp_path / "q.cs").write_text("data_\n")
    assert not is_cryosparc(tmp_path / "q.cs")


# ------------------------------------------------------------------------------ writing


def assert_alignment(stored, poses, pixel_size):
    """By NumPy and SciPy alone: rotations, and origins in Å."""
    expected = rotations(poses)
    np.testing.assert_allclose(Rotation.from_rotvec(stored["alignments3D/pose"]).as_matrix(), expected, atol=1e-6)
    origins = stored["alignments3D/shift"] * stored["alignments3D/psize_A"][:, None]
    np.testing.assert_allclose(origins, poses.origins_in_angstroms, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stored["alignments3D/psize_A"], pixel_size, rtol=1e-6)
    assert stored.dtype["alignments3D/pose"] == np.dtype(("<f4", (3,)))
    assert stored.dtype["alignments3D/shift"] == np.dtype(("<f4", (2,)))
    assert stored.dtype["alignments3D/split"] == np.dtype("<u4")


@needs_shared_data
def test_a_dataset_written_again_keeps_every_field_of_every_row(tmp_path):
    table, stored = read_cryosparc(LARGE), np.load(LARGE)
    angles = np.random.default_rng(0).uniform(-180, 180, size=(len(table), 3))
    poses = PoseColumns(angles, np.random.default_rng(1).normal(size=(len(table), 2)))
    rewrite_cryosparc(tmp_path / "q.cs", table, poses)
    again = np.load(tmp_path / "q.cs")
    assert again.dtype.names == stored.dtype.names
    assert again.dtype == stored.dtype
    for name in stored.dtype.names:
        if not name.startswith("alignments3D/") or name == "alignments3D/split":
            np.testing.assert_array_equal(again[name], stored[name], err_msg=name)
    assert_alignment(again, poses, stored["blob/psize_A"])
    assert not again["alignments3D/error"].any()
    assert (again["alignments3D/alpha"] == 1).all()


@needs_shared_data
def test_the_fields_of_a_new_alignment_are_those_of_cryosparc(tmp_path):
    table = read_cryosparc(SHARED / "parser_zoo" / "cs" / "cryodrgn_empiar_10076_7.cs")
    poses = PoseColumns(np.zeros((7, 3)), np.zeros((7, 2)))
    rewrite_cryosparc(tmp_path / "a.cs", table, poses)
    write_cryosparc(tmp_path / "b.cs", table, np.full(7, 320), poses, contrast_sign=-1)
    theirs = {name: kind for name, kind in np.load(LARGE).dtype.fields.items() if name.startswith("alignments3D")}
    for name in ("a.cs", "b.cs"):
        ours = np.load(tmp_path / name).dtype
        for field, (kind, *_) in theirs.items():
            assert ours[field] == kind, field
    # All fields of the images and the microscope that cryoSPARC's own import has, but for its mark of the import.
    fields = np.load(table.path).dtype.fields
    ours = np.load(tmp_path / "b.cs").dtype
    assert set(fields) - set(ours.names) == {"blob/import_sig"}
    for name in set(fields) - {"blob/import_sig", "blob/path", "ctf/type"}:
        assert ours[name] == fields[name][0], name
    # And what it has in them, it has from the same STAR file.
    imported, written = np.load(table.path), np.load(tmp_path / "b.cs")
    for name in set(fields) - {"uid", "blob/import_sig", "ctf/exp_group_id"}:
        if imported[name].dtype.kind == "S":
            np.testing.assert_array_equal(written[name], imported[name])
        else:
            np.testing.assert_allclose(written[name], imported[name], rtol=1e-6, err_msg=name)


def test_of_a_part_of_the_particles_the_part_is_written_in_its_order(tmp_path):
    table = read_cryosparc(save(tmp_path / "p.cs", COLUMNS))
    rows = np.array([4, 0, 3])
    part = PoseColumns(POSES.angles_in_degrees[rows], POSES.origins_in_angstroms[rows])
    rewrite_cryosparc(
        tmp_path / "q.cs", table.take(rows), part, half_set=np.array([2, 1, 1]), confidence=np.array([0.25, 0.5, 1.0])
    )
    stored = np.load(tmp_path / "q.cs")
    for name in ("uid", *BLOB, "ctf/df1_A", "ctf/tilt_A"):
        np.testing.assert_array_equal(stored[name], COLUMNS[name][rows])
    assert_alignment(stored, part, COLUMNS["blob/psize_A"][rows])
    np.testing.assert_array_equal(stored["alignments3D/split"], [1, 0, 0])
    np.testing.assert_array_equal(stored["alignments3D/class_posterior"], [0.25, 0.5, 1])


def test_without_half_sets_those_of_the_dataset_stay(tmp_path):
    rewrite_cryosparc(tmp_path / "q.cs", read_cryosparc(save(tmp_path / "p.cs", COLUMNS)), POSES)
    stored = np.load(tmp_path / "q.cs")
    np.testing.assert_array_equal(stored["alignments3D/split"], COLUMNS["alignments3D/split"])
    np.testing.assert_array_equal(stored["alignments3D/class_posterior"], 1)


def test_nothing_stays_of_the_old_alignment(tmp_path):
    columns = {**COLUMNS, "alignments3D/error": np.ones(N, "f4"), "alignments3D/localpose": np.ones((N, 3), "f4")}
    rewrite_cryosparc(tmp_path / "q.cs", read_cryosparc(save(tmp_path / "p.cs", columns)), POSES)
    stored = np.load(tmp_path / "q.cs")
    np.testing.assert_array_equal(stored["alignments3D/error"], 0)
    np.testing.assert_array_equal(stored["alignments3D/localpose"], np.zeros((N, 3)))


def test_fields_of_the_passthrough_files_are_written_too(tmp_path):
    main = save(tmp_path / "main.cs", without(COLUMNS, *BLOB))
    passthrough = save(tmp_path / "passthrough.cs", shuffled_with_more(without(COLUMNS, *OTHERS)))
    rewrite_cryosparc(tmp_path / "q.cs", read_cryosparc(main, [passthrough]), POSES, passthrough=[passthrough])
    stored = np.load(tmp_path / "q.cs")
    for name in COLUMNS:
        if not name.startswith("alignments3D"):
            np.testing.assert_array_equal(stored[name], COLUMNS[name], err_msg=name)
    assert len(read_cryosparc(tmp_path / "q.cs")) == N


def test_paths_from_the_folder_of_the_dataset_lead_to_the_same_files_from_another(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "run" / "one").mkdir(parents=True)
    path = save(tmp_path / "export" / "p.cs", COLUMNS)
    rewrite_cryosparc(tmp_path / "export" / "q.cs", read_cryosparc(path), POSES)
    np.testing.assert_array_equal(np.load(tmp_path / "export" / "q.cs")["blob/path"], COLUMNS["blob/path"])
    rewrite_cryosparc(tmp_path / "run" / "one" / "q.cs", read_cryosparc(path), POSES)
    found = np.load(tmp_path / "run" / "one" / "q.cs")["blob/path"]
    expected = [b"b.mrc", b">../../export/a/x.mrcs", b"b.mrc", b"b.mrc", b"\xc3\xa9.mrc"]
    np.testing.assert_array_equal(found, expected)


def test_a_dataset_that_has_changed_is_not_written_over(tmp_path):
    path = save(tmp_path / "p.cs", COLUMNS)
    table = read_cryosparc(path)
    order = np.arange(N)[::-1]
    save(path, {name: values[order] for name, values in COLUMNS.items()})
    assert "it has changed since it was read" in refusal(rewrite_cryosparc, tmp_path / "q.cs", table, POSES)
    save(path, {name: values[:3] for name, values in COLUMNS.items()})
    assert "it has changed since it was read" in refusal(rewrite_cryosparc, tmp_path / "q.cs", table, POSES)
    assert files_in(tmp_path) == ["p.cs"]


def test_a_dataset_may_be_replaced_by_itself_with_new_poses(tmp_path):
    path = save(tmp_path / "p.cs", COLUMNS)
    rewrite_cryosparc(path, read_cryosparc(path), POSES)
    assert_alignment(np.load(path), POSES, COLUMNS["blob/psize_A"])
    assert files_in(tmp_path) == ["p.cs"]


def star_table(folder, names=None, **more):
    columns = particle_columns(N) | more
    if names is not None:
        columns |= {"rlnImageName": names}
    return read_star(write_star(folder / "p.star", columns, OPTICS))


def test_a_star_file_becomes_a_dataset_that_numpy_and_scipy_read_back(tmp_path):
    table = star_table(tmp_path, rlnPhaseShift=[0, 10, 20, 30, 40], rlnCtfBfactor=[5, 4, 3, 2, 1])
    half_set = np.array([1, 2, 2, 1, 1])
    write_cryosparc(tmp_path / "q.cs", table, np.full(N, 64), POSES, contrast_sign=1, half_set=half_set)
    stored = np.load(tmp_path / "q.cs", allow_pickle=False)
    assert stored["blob/path"].tolist() == [b"images.mrcs"] * N
    np.testing.assert_array_equal(stored["blob/idx"], range(N))
    np.testing.assert_array_equal(stored["blob/shape"], [[64, 64]] * N)
    np.testing.assert_array_equal(stored["blob/sign"], 1)
    np.testing.assert_array_equal(stored["ctf/df1_A"], [12000, 12100, 12200, 12300, 12400])
    np.testing.assert_allclose(np.rad2deg(stored["ctf/df_angle_rad"]), [0, 10, 20, 30, 40], rtol=1e-6)
    np.testing.assert_allclose(np.rad2deg(stored["ctf/phase_shift_rad"]), [0, 10, 20, 30, 40], rtol=1e-6)
    np.testing.assert_array_equal(stored["ctf/bfactor"], [5, 4, 3, 2, 1])
    np.testing.assert_array_equal(stored["alignments3D/split"], half_set - 1)
    assert_alignment(stored, POSES, 3)
    again = read_cryosparc(tmp_path / "q.cs")
    assert again.images.names == table.images.names
    for item in dataclasses.fields(table):
        if isinstance(values := getattr(table, item.name), np.ndarray):
            np.testing.assert_allclose(getattr(again, item.name), values, rtol=1e-6, err_msg=item.name)
    np.testing.assert_allclose(rotations(again.poses), rotations(POSES), atol=1e-6)


def uids(path, table):
    write_cryosparc(path, table, np.full(len(table), 64), POSES, contrast_sign=-1)
    return np.load(path)["uid"]


def test_uids_follow_from_the_images_alone(tmp_path):
    names = ["1@a.mrcs", "2@a.mrcs", "1@b.mrcs", "1@a.mrcs", "2@b.mrcs"]
    first = uids(tmp_path / "q.cs", star_table(tmp_path, names))
    assert first.dtype == np.uint64
    assert len(set(first.tolist())) == N  # the image that is listed twice has two
    again = uids(tmp_path / "q.cs", star_table(tmp_path, names, rlnDefocusU=[1, 2, 3, 4, 5]))
    np.testing.assert_array_equal(again, first)
    order = [4, 2, 1, 0, 3]
    np.testing.assert_array_equal(
        uids(tmp_path / "q.cs", star_table(tmp_path, [names[i] for i in order])), first[order]
    )


def test_uids_of_many_images_are_all_different(tmp_path):
    n, n_stacks = 200_000, 400
    table = star_table(tmp_path).take(np.zeros(n, dtype=np.int64))
    stack = np.arange(n, dtype=np.int32) % n_stacks
    images = ImageReferences(
        tuple(f"{i}.mrc" for i in range(n_stacks)), stack, np.arange(n, dtype=np.int32) // n_stacks
    )
    poses = PoseColumns(np.zeros((n, 3)), np.zeros((n, 2)))
    table = dataclasses.replace(table, images=images)
    write_cryosparc(tmp_path / "q.cs", table, np.full(n, 64), poses, contrast_sign=-1)
    assert len(np.unique(np.load(tmp_path / "q.cs")["uid"])) == n


def test_kinds_of_microscope_become_groups(tmp_path):
    columns = particle_columns(N) | {"rlnVoltage": [300, 200, 300, 200, 300], "rlnImagePixelSize": [1, 1, 2, 1, 1]}
    table = read_star(write_star(tmp_path / "p.star", columns, OPTICS))
    write_cryosparc(tmp_path / "q.cs", table, np.full(N, 64), POSES, contrast_sign=-1)
    group = np.load(tmp_path / "q.cs")["ctf/exp_group_id"]
    assert group[0] == group[4]
    assert group[1] == group[3]
    assert sorted(set(group.tolist())) == [0, 1, 2]


def test_the_group_file_names_the_dataset_for_each_of_its_parts(tmp_path):
    write_cryosparc(tmp_path / "q.cs", star_table(tmp_path), np.full(N, 64), POSES, contrast_sign=-1)
    write_cryosparc_group(tmp_path / "q.csg", tmp_path / "q.cs")
    lines = (tmp_path / "q.csg").read_text().splitlines()
    assert [line.strip(" :") for line in lines if line.startswith("  ") and line.endswith(":")] == [
        "blob",
        "ctf",
        "alignments3D",
    ]
    assert lines.count("    metafile: '>q.cs'") == 3
    assert lines.count("    num_items: 5") == 3
    assert "    type: particle.alignments3D" in lines
    assert refusal(read_cryosparc, tmp_path / "q.csg").endswith("which only names q.cs; give q.cs")


@needs_shared_data
def test_the_group_file_has_the_form_of_cryosparcs_own(tmp_path):
    write_cryosparc_group(tmp_path / "q.csg", LARGE)

    def form(path):
        return {line.split(":")[0] for line in path.read_text().splitlines()}

    theirs = form(CS / "t20s_P9_J209_particles.csg")
    assert form(tmp_path / "q.csg") == theirs - {"  alignments2D", "  location", "  pick_stats"}


angles = st.tuples(st.floats(-180, 180), st.floats(0, 180), st.floats(-180, 180))
particle = st.tuples(
    angles,
    st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
    st.floats(0.5, 8),
    st.tuples(st.floats(-5e4, 5e4), st.floats(-5e4, 5e4), st.floats(-360, 360), st.floats(0, 180)),
    st.tuples(st.sampled_from(["a.mrcs", "x/y é.mrc", "/z"]), st.integers(0, 10**6)),
)


@given(st.lists(particle, min_size=1, max_size=20))
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "round.cs"
    euler, origins, pixel_size, ctf, images = (list(column) for column in zip(*rows, strict=True))
    u, v, angle, phase = np.array(ctf).T
    names = tuple(dict.fromkeys(name for name, _ in images))
    table = dataclasses.replace(
        star_table(tmp_path_factory.getbasetemp()).take(np.zeros(len(rows), dtype=np.int64)),
        rows=np.arange(len(rows)),
        images=ImageReferences(
            names, np.array([names.index(name) for name, _ in images], "i4"), np.array([i for _, i in images], "i4")
        ),
        pixel_size_in_angstroms=np.array(pixel_size),
        defocus_u_in_angstroms=u,
        defocus_v_in_angstroms=v,
        defocus_angle_in_degrees=angle,
        phase_shift_in_degrees=phase,
    )
    poses = PoseColumns(np.array(euler), np.array(origins))
    write_cryosparc(path, table, np.full(len(rows), 64), poses, contrast_sign=-1)
    found = read_cryosparc(path)
    assert found.images.names == names
    np.testing.assert_array_equal(found.images.stack, table.images.stack)
    np.testing.assert_array_equal(found.images.index, table.images.index)
    for name in ("pixel_size", "defocus_u", "defocus_v"):
        given_values = getattr(table, f"{name}_in_angstroms")
        np.testing.assert_allclose(getattr(found, f"{name}_in_angstroms"), given_values, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(found.defocus_angle_in_degrees, angle, rtol=0, atol=1e-4)
    np.testing.assert_allclose(rotations(found.poses), rotations(poses), atol=1e-6)
    np.testing.assert_allclose(found.poses.origins_in_angstroms, origins, rtol=1e-6, atol=1e-5)
    assert len(np.unique(np.load(path)["uid"])) == len(rows)
    # Written again, its poses are the same to the last bit, and so are its uids.
    rewrite_cryosparc(path.with_name("again.cs"), found, found.poses)
    again = np.load(path.with_name("again.cs"))
    np.testing.assert_array_equal(again["uid"], np.load(path)["uid"])
    np.testing.assert_allclose(again["alignments3D/shift"], np.load(path)["alignments3D/shift"], rtol=1e-6)
