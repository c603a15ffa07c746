import numpy as np
import pytest
import starfile

from cryoai.formats.star import read_star, read_star_poses, rewrite_star
from cryoai.formats.table import PoseColumns
from stacks import OPTICS, SHARED, loop_text, needs_shared_data, particle_columns, plain_parse, refusal, write_star, zoo

MICROSCOPE_30 = {
    "rlnVoltage": [300] * 3,
    "rlnSphericalAberration": [2.7] * 3,
    "rlnAmplitudeContrast": [0.1] * 3,
    "rlnDetectorPixelSize": [15.0] * 3,
    "rlnMagnification": [60000] * 3,
}
ANGLES = np.array([[10.1234564, 20.0, -30.5], [179.9999996, 0.0, 0.0], [-0.0000004, 90.0, 45.25]])
ORIGINS = np.array([[1.25, -2.5], [0.0, 7.1234561], [-3.3, 4.4]])

# The files of the zoo that describe particles completely, and how many.
READABLE = {
    "aspire_sample_particles_relion30.star": 17,
    "aspire_sample_particles_relion31.star": 17,
    "aspire_sample_relion_one_image.star": 1,
    "aspire_sample_relion_symmetry_group_D4.star": 17,
    "cryodrgn_empiar_10076_7.star": 7,
    "cryodrgn_relion31.6opticsgroups.star": 139,
    "cryodrgn_relion31.star": 5,
    "cryodrgn_relion31.v2.star": 5,
    "cryodrgn_relion5.star": 17,
    "cryodrgn_sta_testing_bin8.star": 219,
    "cryojax_heterogeneous_relion_dataset.star": 100,
    "cryojax_test_starfile.star": 3,
    "cryolike_relion_style_particles.star": 106,
    "drgnai_M_particles_sub10.star": 10,
    "ioSPI_test.star": 452,
    "isecc_test_zernike_brackets.star": 1,
    "relion_tests_ap_s_c2d_red.star": 9,
    "scipion_esrf_input_particles.star": 2021,
    "simplecryoem_pyem_onerow.star": 1,
    "starfile_hist_optics_group_inter1965.star": 1,
}


def rewrite(path, table, poses, extra):
    rewrite_star(path, table, table.star, poses, extra)


def assert_read_as_by_a_plain_parser(path, n_particles):
    table = read_star(path)
    assert len(table) == n_particles
    cells = plain_parse(path)[table.star.block]
    names = [name.rsplit("@", 1) for name in cells["rlnImageName"]]
    np.testing.assert_array_equal(table.images.index, [int(name[0]) - 1 if name[1:] else 0 for name in names])
    assert [table.images.names[s] for s in table.images.stack] == [name[-1] for name in names]
    np.testing.assert_array_equal(table.defocus_u_in_angstroms, np.array(cells["rlnDefocusU"], dtype=float))
    np.testing.assert_array_equal(table.defocus_angle_in_degrees, np.array(cells["rlnDefocusAngle"], dtype=float))
    if table.poses is not None:
        rot = np.array(cells["rlnAngleRot"], dtype=float)
        np.testing.assert_array_equal(table.poses.angles_in_degrees[:, 0], rot)
    if table.poses is not None and "rlnOriginXAngst" in cells:
        x = np.array(cells["rlnOriginXAngst"], dtype=float)
        np.testing.assert_array_equal(table.poses.origins_in_angstroms[:, 0], x)


@pytest.mark.parametrize("path", zoo("star"))
def test_a_file_of_the_zoo_is_read_as_by_a_plain_parser_or_refused_in_one_line(path):
    if path.name in READABLE:
        assert_read_as_by_a_plain_parser(path, READABLE[path.name])
    else:
        assert refusal(read_star, path).startswith(f"{path}: ")


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "n_particles"),
    [("aspire_starfile_2019", 3796), ("relion_tests_ap_s_c2d", 8915), ("empiar10028_particles_1000_128", 1000)],
)
def test_files_of_thousands_of_particles_are_read_as_by_a_plain_parser(name, n_particles):
    assert_read_as_by_a_plain_parser(SHARED / "metadata" / f"{name}.star", n_particles)


def test_relion_31_takes_what_the_particles_lack_from_their_optics_group(tmp_path):
    optics = {
        "rlnOpticsGroup": [7, 2],
        "rlnVoltage": [300, 200],
        "rlnSphericalAberration": [2.7, 1.4],
        "rlnAmplitudeContrast": [0.1, 0.07],
        "rlnImagePixelSize": [1.5, 2.5],
    }
    particles = particle_columns(3) | {"rlnOpticsGroup": [2, 7, 2], "rlnPhaseShift": [0, 90, 45]}
    table = read_star(write_star(tmp_path / "p.star", particles, optics))
    np.testing.assert_array_equal(table.voltage_in_kilovolts, [200, 300, 200])
    np.testing.assert_array_equal(table.spherical_aberration_in_mm, [1.4, 2.7, 1.4])
    np.testing.assert_array_equal(table.amplitude_contrast, [0.07, 0.1, 0.07])
    np.testing.assert_array_equal(table.pixel_size_in_angstroms, [2.5, 1.5, 2.5])
    np.testing.assert_array_equal(table.phase_shift_in_degrees, [0, 90, 45])
    np.testing.assert_array_equal(table.b_factor_in_square_angstroms, 0)
    assert table.poses is None


def test_a_value_of_the_particle_comes_before_that_of_its_group(tmp_path):
    particles = particle_columns(3) | {"rlnImagePixelSize": [1, 2, 3], "rlnVoltage": [100, 200, 300]}
    table = read_star(write_star(tmp_path / "p.star", particles))
    np.testing.assert_array_equal(table.pixel_size_in_angstroms, [1, 2, 3])
    np.testing.assert_array_equal(table.voltage_in_kilovolts, [100, 200, 300])


def test_image_pixel_size_comes_before_pixel_size(tmp_path):
    table = read_star(write_star(tmp_path / "p.star", particle_columns(2), OPTICS | {"rlnPixelSize": [9.0]}))
    np.testing.assert_array_equal(table.pixel_size_in_angstroms, [3, 3])


def test_relion_30_gives_origins_in_pixels_of_the_detector_over_the_magnification(tmp_path):
    pose = {"rlnAngleRot": [1, 2, 3], "rlnAngleTilt": [4, 5, 6], "rlnAnglePsi": [7, 8, 9], "rlnOriginX": [1, -2, 4]}
    table = read_star(write_star(tmp_path / "p.star", particle_columns(3) | MICROSCOPE_30 | pose, None))
    # 15 um on the detector at a magnification of 60,000 are 2.5 A on the specimen.
    np.testing.assert_allclose(table.pixel_size_in_angstroms, 2.5)
    np.testing.assert_array_equal(table.poses.angles_in_degrees, [[1, 4, 7], [2, 5, 8], [3, 6, 9]])
    np.testing.assert_allclose(table.poses.origins_in_angstroms, [[2.5, 0], [-5, 0], [10, 0]])


def test_images_are_named_by_number_and_stack_and_a_name_alone_is_the_first_image(tmp_path):
    particles = particle_columns(4) | {"rlnImageName": ["3@b/x.mrcs", "000001@a.mrcs", "single.mrc", "2@b/x.mrcs"]}
    images = read_star(write_star(tmp_path / "p.star", particles)).images
    assert [images.names[s] for s in images.stack] == ["b/x.mrcs", "a.mrcs", "single.mrc", "b/x.mrcs"]
    np.testing.assert_array_equal(images.index, [2, 0, 0, 1])


def test_files_with_foreign_line_ends_tabs_comments_and_quotes_are_read(tmp_path):
    columns = particle_columns(3) | MICROSCOPE_30 | {"rlnImageName": [f"'{i}@my stack.mrcs'" for i in (1, 2, 3)]}
    path = write_star(tmp_path / "p.star", columns, None)
    path.write_bytes(b"\xef\xbb\xbf# Written by cisTEM\n" + path.read_bytes().replace(b"\n", b" \r\n"))
    table = read_star(path)
    assert table.images.names == ("my stack.mrcs",)
    np.testing.assert_array_equal(table.defocus_v_in_angstroms, [11000, 11100, 11200])


def test_writing_keeps_every_other_cell_and_the_order_of_rows_and_columns(tmp_path):
    odd_text = {"rlnMicrographName": ["a/b.mrc", "007", "1e3"], "rlnNote": ['"two words"', "NA", "None"]}
    odd_numbers = {"rlnCtfMaxResolution": ["3.10", "0003.1", "3.1E+00"], "rlnAngleRot": ["1.50", "2", "3"]}
    rest = {"rlnAngleTilt": [0, 0, 0], "rlnAnglePsi": [0, 0, 0], "rlnOriginXAngst": [0, 0, 0], "rlnLast": [1, 2, 3]}
    particles = odd_text | particle_columns(3) | odd_numbers | rest
    path = write_star(tmp_path / "p.star", particles)
    table = read_star(path)
    rewrite(tmp_path / "q.star", table, PoseColumns(ANGLES, ORIGINS), {"cryoaiScore": np.array([0.5, 1, 2])})
    again = starfile.read(tmp_path / "q.star", parse_as_string=[*particles, "rlnOriginYAngst", "cryoaiScore"])
    assert list(again) == ["optics", "particles"]
    assert plain_parse(tmp_path / "q.star")["optics"] == plain_parse(path)["optics"]
    written = again["particles"]
    assert list(written) == [*particles, "rlnOriginYAngst", "cryoaiScore"]
    for column in odd_text | particle_columns(3) | {"rlnCtfMaxResolution": None, "rlnLast": None}:
        assert written[column].tolist() == [str(cell).strip('"') for cell in particles[column]], column
    assert written["rlnAngleRot"].tolist() == ["10.123456", "180.000000", "-0.000000"]
    assert written["cryoaiScore"].tolist() == ["0.500000", "1.000000", "2.000000"]


@pytest.mark.parametrize("version", ["3.0", "3.1"])
def test_poses_written_are_the_poses_read_to_six_decimals(tmp_path, version):
    particles = particle_columns(3) if version == "3.1" else particle_columns(3) | MICROSCOPE_30
    path = write_star(tmp_path / "p.star", particles, OPTICS if version == "3.1" else None)
    rewrite(tmp_path / "q.star", read_star(path), PoseColumns(ANGLES, ORIGINS), {})
    table = read_star(tmp_path / "q.star")
    np.testing.assert_allclose(table.poses.angles_in_degrees, ANGLES, atol=5.1e-7, rtol=0)
    np.testing.assert_allclose(table.poses.origins_in_angstroms, ORIGINS, atol=2.6e-6, rtol=0)
    origins = plain_parse(tmp_path / "q.star")["particles"]
    if version == "3.0":
        np.testing.assert_allclose(np.array(origins["rlnOriginX"], dtype=float) * 2.5, ORIGINS[:, 0], atol=2.6e-6)
        assert "rlnOriginXAngst" not in origins
    else:
        np.testing.assert_allclose(np.array(origins["rlnOriginXAngst"], dtype=float), ORIGINS[:, 0], atol=5.1e-7)
        assert "rlnOriginX" not in origins


def test_both_kinds_of_origin_stay_in_step(tmp_path):
    path = write_star(tmp_path / "p.star", particle_columns(3) | {"rlnOriginX": [0] * 3, "rlnOriginXAngst": [0] * 3})
    rewrite(tmp_path / "q.star", read_star(path), PoseColumns(ANGLES, ORIGINS), {})
    written = plain_parse(tmp_path / "q.star")["particles"]
    np.testing.assert_allclose(np.array(written["rlnOriginX"], dtype=float), ORIGINS[:, 0] / 3, atol=5.1e-7)
    np.testing.assert_allclose(np.array(written["rlnOriginXAngst"], dtype=float), ORIGINS[:, 0], atol=5.1e-7)


def without(columns, *names):
    return {name: cells for name, cells in columns.items() if name not in names}


REFUSED = {
    "no rows": (without(particle_columns(0)), OPTICS, "the particle table data_particles has no rows"),
    "no images": (without(particle_columns(2), "rlnImageName"), OPTICS, "no table has a column rlnImageName"),
    "no defocus": (without(particle_columns(2), "rlnDefocusV"), OPTICS, "column rlnDefocusV is missing"),
    "no voltage": (particle_columns(2), without(OPTICS, "rlnVoltage"), "column rlnVoltage is missing"),
    "no aberration": (
        particle_columns(2),
        without(OPTICS, "rlnSphericalAberration"),
        "column rlnSphericalAberration is missing",
    ),
    "no amplitude contrast": (
        particle_columns(2),
        without(OPTICS, "rlnAmplitudeContrast"),
        "column rlnAmplitudeContrast is missing",
    ),
    "no pixel size": (particle_columns(2), without(OPTICS, "rlnImagePixelSize"), "the pixel size is missing; add"),
    "negative pixel size": (
        particle_columns(2),
        OPTICS | {"rlnImagePixelSize": [-1.5]},
        "rlnImagePixelSize of particle row 1 is -1.5; it must be positive",
    ),
    "not a number": (
        particle_columns(3) | {"rlnDefocusU": [1, 2, "wide"]},
        OPTICS,
        "rlnDefocusU of particle row 3 is 'wide'; a finite number",
    ),
    "infinite": (
        particle_columns(3) | {"rlnDefocusU": [1, "inf", 3]},
        OPTICS,
        "rlnDefocusU of particle row 2 is 'inf'; a finite number",
    ),
    "number in the optics": (
        particle_columns(1),
        OPTICS | {"rlnVoltage": ["high"]},
        "rlnVoltage of optics row 1 is 'high'; a finite number",
    ),
    "group not listed": (
        particle_columns(3) | {"rlnOpticsGroup": [1, 1, 4]},
        OPTICS,
        "particle row 3 is in optics group 4, which data_optics does not list",
    ),
    "group listed twice": (
        particle_columns(2),
        {name: cells * 2 for name, cells in OPTICS.items()},
        "data_optics lists an rlnOpticsGroup twice",
    ),
    "group column misnamed": (
        particle_columns(2),
        without(OPTICS, "rlnOpticsGroup") | {"rlnOpticsGroup1": [1]},
        "rlnOpticsGroup is missing from the table data_optics; add it",
    ),
    "images counted from 0": (
        particle_columns(2) | {"rlnImageName": ["1@a.mrcs", "000@a.mrcs"]},
        OPTICS,
        "rlnImageName of particle row 2 is '000@a.mrcs'; number@stack is needed, counted from 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_wrong_is_named(tmp_path, case):
    particles, optics, message = REFUSED[case]
    path = write_star(tmp_path / "p.star", particles, optics)
    assert refusal(read_star, path).startswith(f"{path}: {message}")


def test_a_missing_file_is_named(tmp_path):
    assert refusal(read_star, tmp_path / "p.star").startswith(f"{tmp_path / 'p.star'}: no such file; give")


@pytest.mark.parametrize("content", [bytes(range(256)) * 4, "data_µ".encode("latin1"), b""])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "p.star").write_bytes(content)
    assert "give a " in refusal(read_star, tmp_path / "p.star")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("17", "row 3 of the table data_particles has 1 values for 5 columns"),
        ("000003@images.mrcs 1 1 2", "row 3 of the table data_particles has 4 values for 5 columns"),
        ("000003@images.mrcs 1 1 2 3 4", "row 3 of the table data_particles has 6 values for 5 columns"),
    ],
    ids=["a lone number", "a short row", "a long row"],
)
def test_a_ragged_row_is_refused(tmp_path, row, message):
    path = write_star(tmp_path / "p.star", particle_columns(4))
    path.write_text(path.read_text().replace("000003@", f"{row}\n000003@"))
    assert message in refusal(read_star, path)


def test_two_tables_of_particles_are_refused(tmp_path):
    path = write_star(tmp_path / "p.star", particle_columns(2))
    path.write_text(path.read_text() + loop_text("more", particle_columns(1)))
    assert "tables particles, more all have rlnImageName" in refusal(read_star, path)


def test_a_column_named_twice_is_refused(tmp_path):
    path = write_star(tmp_path / "p.star", particle_columns(2))
    path.write_text(path.read_text().replace("_rlnOpticsGroupName", "_rlnOpticsGroup"))
    assert "the table data_optics names column rlnOpticsGroup twice" in refusal(read_star, path)


def test_a_table_given_twice_is_refused(tmp_path):
    path = write_star(tmp_path / "p.star", particle_columns(2))
    path.write_text(path.read_text() + loop_text("particles", particle_columns(3)))
    assert "two tables are called data_particles" in refusal(read_star, path)


def test_cells_that_are_not_a_number_are_written_as_they_were_read(tmp_path):
    path = write_star(tmp_path / "p.star", particle_columns(3) | {"rlnLogLikeliContribution": ["1.50", "nan", "nan"]})
    rewrite(tmp_path / "q.star", read_star(path), PoseColumns(ANGLES, ORIGINS), {})
    assert plain_parse(tmp_path / "q.star")["particles"]["rlnLogLikeliContribution"] == ["1.50", "nan", "nan"]


def test_an_image_number_beyond_any_stack_is_refused(tmp_path):
    columns = particle_columns(2) | {"rlnImageName": ["1@a.mrcs", "99999999999999999999@a.mrcs"]}
    path = write_star(tmp_path / "p.star", columns)
    assert "rlnImageName of particle row 2 is '99999999999999999999@a.mrcs'" in refusal(read_star, path)


def test_poses_alone_can_be_read_from_a_file_without_optics(tmp_path):
    columns = without(particle_columns(3), "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnOpticsGroup")
    angles = {"rlnAngleRot": [1, 2, 3], "rlnAngleTilt": [4, 5, 6], "rlnAnglePsi": [7, 8, 9]}
    path = write_star(tmp_path / "p.star", columns | angles | {"rlnOriginXAngst": [1.5, 2, 3]}, None)
    poses = read_star_poses(path)
    np.testing.assert_array_equal(poses.angles_in_degrees, [[1, 4, 7], [2, 5, 8], [3, 6, 9]])
    np.testing.assert_array_equal(poses.origins_in_angstroms, [[1.5, 0], [2, 0], [3, 0]])
    in_pixels = write_star(tmp_path / "q.star", columns | angles | {"rlnOriginX": [1.5, 2, 3]}, None)
    assert "the pixel size is missing" in refusal(read_star_poses, in_pixels)
    assert read_star_poses(write_star(tmp_path / "r.star", columns, None)) is None


def test_half_sets_are_read_as_0_and_1(tmp_path):
    table = read_star(write_star(tmp_path / "p.star", particle_columns(4) | {"rlnRandomSubset": [2, "1", "2.0", 1]}))
    assert table.half_set.tolist() == table.usable_half_set().tolist() == [1, 0, 1, 0]
    assert table.take(np.array([2, 1])).half_set.tolist() == [1, 0]
    assert read_star(write_star(tmp_path / "q.star", particle_columns(4))).half_set is None


HALF_SETS = {
    "missing": (None, "no half sets (rlnRandomSubset); give"),
    "0": ([1, 2, 1, 0], "rlnRandomSubset of particle row 4 is neither 1 nor 2; mend it"),
    "3": ([1, 3, 1, 2], "rlnRandomSubset of particle row 2 is neither 1 nor 2; mend it"),
    "a fraction": ([1, 2, 1.5, 2], "rlnRandomSubset of particle row 3 is neither 1 nor 2; mend it"),
    "a word": (["A", "B", "A", "B"], "rlnRandomSubset of particle row 1 is neither 1 nor 2; mend it"),
    "infinite": ([1, 2, 1, "inf"], "rlnRandomSubset of particle row 4 is neither 1 nor 2; mend it"),
    "an empty half": ([1, 1, 1, 1], "rlnRandomSubset is 2 for 0 of 4 particles; 10% of them at least"),
    "too small a half": ([2] * 19 + [1], "rlnRandomSubset is 1 for 1 of 20 particles; 10% of them at least"),
}


@pytest.mark.parametrize("case", HALF_SETS)
def test_unusable_half_sets_matter_only_to_those_who_ask_for_them(tmp_path, case):
    cells, message = HALF_SETS[case]
    columns = particle_columns(4 if cells is None else len(cells))
    path = write_star(tmp_path / "p.star", columns if cells is None else columns | {"rlnRandomSubset": cells})
    table = read_star(path).compacted()
    said = refusal(table.usable_half_set)
    assert said.startswith(f"{path}: {message}")
    assert said.endswith("give --half-sets new")


def test_of_some_rows_the_row_in_the_file_is_named(tmp_path):
    path = write_star(tmp_path / "p.star", particle_columns(4) | {"rlnRandomSubset": [1, 2, 1, 7]})
    assert "particle row 4 is neither" in refusal(read_star(path).take(np.array([0, 1, 3])).usable_half_set)


def test_a_file_that_has_changed_since_it_was_read_is_not_written_again(tmp_path):
    path = write_star(tmp_path / "p.star", particle_columns(3))
    table = read_star(path)
    path.write_text(path.read_text().replace("12000", "13000 "))
    assert "it has changed since it was read" in refusal(
        rewrite, tmp_path / "q.star", table, PoseColumns(ANGLES, ORIGINS), {}
    )
    assert not (tmp_path / "q.star").exists()


def test_rows_are_written_in_the_order_of_the_table(tmp_path):
    notes = {"rlnNote": ["'first one'", "second", "third"]}
    path = write_star(tmp_path / "p.star", particle_columns(3) | notes)
    rows = np.array([2, 0])
    table = read_star(path).take(rows)
    rewrite(tmp_path / "q.star", table, PoseColumns(ANGLES[rows], ORIGINS[rows]), {})
    lines = [line for line in (tmp_path / "q.star").read_text().splitlines() if "@" in line]
    assert [line.split()[0] for line in lines] == ["000003@images.mrcs", "000001@images.mrcs"]
    assert "third" in lines[0]
    assert "'first one'" in lines[1]


def test_a_table_of_single_items_is_written_again(tmp_path):
    items = "".join(f"_{name} {cells[0]}\n" for name, cells in particle_columns(1).items())
    path = tmp_path / "p.star"
    path.write_text(loop_text("optics", OPTICS) + f"data_particles\n\n{items}_rlnAngleRot 5\n")
    rewrite(tmp_path / "q.star", read_star(path), PoseColumns(ANGLES[:1], ORIGINS[:1]), {"cryoaiScore": np.array([7])})
    again = read_star(tmp_path / "q.star")
    np.testing.assert_allclose(again.poses.angles_in_degrees, ANGLES[:1], atol=1e-6)
    assert "_cryoaiScore 7" in (tmp_path / "q.star").read_text()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rlnBeamTiltX": [0.1, 0, 0]}, "not applied: beam tilt (rlnBeamTiltX)"),
        ({"rlnOddZernike": ["[0,0,1.5]"] * 3}, "not applied: odd Zernike coefficients (rlnOddZernike)"),
        ({"rlnMagMat00": [1.01, 1, 1]}, "not applied: anisotropic magnification (rlnMagMat00)"),
        ({"rlnBeamTiltX": [0.0] * 3, "rlnMagMat11": [1.0] * 3, "rlnEvenZernike": ["[0,0]"] * 3}, None),
    ],
)
def test_aberrations_that_are_left_out_are_named(tmp_path, columns, message):
    ignored = read_star(write_star(tmp_path / "p.star", particle_columns(3) | columns)).ignored
    assert ignored == (() if message is None else (message,))
