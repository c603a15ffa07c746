"""Damaged files are read right or refused in one line; and what the harness found once stays mended."""

import os
import pickle
import time
import warnings

import mrcfile
import numpy as np
import pytest
import torch

from cryoai.errors import InputError
from cryoai.formats.cryodrgn import read_cryodrgn_ctf, read_cryodrgn_poses
from cryoai.formats.cryosparc import read_cryosparc
from cryoai.formats.mrc import open_stack, read_map
from cryoai.formats.particle_files import read_particles
from cryoai.formats.star import read_star, rewrite_star, write_star
from cryoai.formats.star.lines import tokens
from cryoai.formats.table import PoseColumns
from cryoai.particle_stack import ParticleStack
from fuzz import inputs
from fuzz.fuzz_readers import KINDS, make_input, run, run_isolated
from fuzz.seeds import CTF, dataset_bytes, dataset_columns, star_texts
from stacks import OPTICS, loop_text, particle_columns, plain_parse, refusal, write_images
from stacks import write_star as write_star_file

N_PER_KIND = 300


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_right_or_refused_in_one_line(kind):
    tally = run([(kind, number) for number in range(N_PER_KIND)], seed=0)
    assert tally.findings == []
    # Enough of both, so that neither the readers nor the refusals go untried.
    assert tally.read[kind] > N_PER_KIND / 20
    assert tally.refused[kind] > N_PER_KIND / 5


# ------------------------------------------------------------------------------ the harness itself


def test_an_input_follows_from_its_number():
    for kind in KINDS:
        made = [make_input(kind, 3, number) for number in range(20)]
        assert made == [make_input(kind, 3, number) for number in range(20)]
        assert len({one.content for one in made}) > 10
        assert made != [make_input(kind, 4, number) for number in range(20)]


def raising(error):
    def read(*_arguments, **_options):
        raise error

    return read


def busy(*_arguments, **_options):
    while True:
        pass


def swallowing_all(*_arguments, **_options):
    try:
        busy()
    except Exception:
        raise InputError("/: damaged") from None


def warning(*_arguments, **_options):
    warnings.warn("of something", RuntimeWarning, stacklevel=1)
    raise InputError("--ctf: no")


def with_a_value_that_is_not_finite(path, **_options):
    table = read_star(path)
    table.defocus_u_in_angstroms[0] = np.nan
    return table


PLANTED = {
    "another error": (raising(KeyError("rlnVoltage")), "KeyError: 'rlnVoltage'"),
    "two lines": (lambda path, **_: raising(InputError(f"{path}: one\ntwo"))(), "is not one line that can be printed"),
    "no file": (raising(InputError("something is wrong")), "does not start with a file"),
    "a long message": (lambda path, **_: raising(InputError(f"{path}: {'x' * 9000}"))(), "is too long"),
    "terabytes": (lambda *_, **__: np.ones(2**37), "MemoryError"),
    "no end": (busy, "OverTimeError: more than 0.05 s of computing"),
    "no end, hidden": (swallowing_all, "OverTimeError: more than 0.05 s of computing"),
    "a warning": (warning, "RuntimeWarning: of something"),
    "not finite": (with_a_value_that_is_not_finite, "'defocus_u_in_angstroms', 'not finite'"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_the_harness_finds_what_a_reader_does_wrong(monkeypatch, tmp_path, case):
    reader, message = PLANTED[case]
    intact = inputs.Input("star", 7, ".star", star_texts()[0].encode())
    monkeypatch.setattr("fuzz.fuzz_readers.make_input", lambda *_: intact)
    assert run([("star", 7)], seed=0).findings == []
    monkeypatch.setattr(inputs, "read_particles", reader)
    (finding,) = run([("star", 7)], seed=0, keep=tmp_path, seconds=0.05).findings
    assert finding.startswith("star 7: ")
    assert message in finding
    assert (tmp_path / "star-7.star").read_bytes() == intact.content
    assert message in (tmp_path / "star-7.finding").read_text()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_harness_goes_on_after_an_input_that_ends_the_process(monkeypatch):
    def ending(path, **_options):
        return os._exit(9) if b"\nthe end" in path.read_bytes() else read_star(path)

    contents = [star_texts()[0], "data_\nthe end\n", star_texts()[0]]
    monkeypatch.setattr(inputs, "read_particles", ending)
    made = [inputs.Input("star", number, ".star", content.encode()) for number, content in enumerate(contents)]
    monkeypatch.setattr("fuzz.fuzz_readers.make_input", lambda _kind, _seed, number: made[number])
    tally = run_isolated([("star", number) for number in range(3)], seed=0, keep=None)
    assert tally.findings == ["star 1: the process ended with status 9"]
    assert tally.read["star"] == 2


# ------------------------------------------------------------------------------ what it found


def test_a_number_of_thousands_of_digits_is_refused(tmp_path):
    columns = particle_columns(2) | {"rlnImageName": ["1@a.mrcs", "9" * 5000 + "@a.mrcs"]}
    message = refusal(read_star, write_star_file(tmp_path / "p.star", columns))
    assert f"rlnImageName of particle row 2 is '{'9' * 60}...'; number@stack is needed" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rlnDefocusU": [1, "1e39"]}, "rlnDefocusU of particle row 2 is '1e39'; a finite number is needed, of at"),
        ({"rlnVoltage": ["1e-40", 1]}, "rlnVoltage of particle row 1 is 1e-40; it must be positive, at least 1e-15"),
        ({"rlnMagnification": [1, "1e-14"]}, "rlnMagnification of particle row 2 is 5e+18; it must be at most 1e+15"),
    ],
)
def test_numbers_that_single_precision_cannot_hold_are_refused(tmp_path, changes, message):
    optics = {name: cells for name, cells in OPTICS.items() if name != "rlnImagePixelSize"}
    detector = {"rlnDetectorPixelSize": [5, 5], "rlnMagnification": [10_000, 10_000]}
    path = write_star_file(tmp_path / "p.star", particle_columns(2) | detector | changes, optics)
    assert message in refusal(read_star, path)


def test_new_origins_reach_a_file_without_optics_that_has_them_in_angstroms(tmp_path):
    rest = {name: cells * 2 for name, cells in OPTICS.items()} | {"rlnOriginXAngst": [5, 5], "rlnOriginYAngst": [6, 6]}
    angles = {name: [0, 0] for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")}
    path = write_star_file(tmp_path / "p.star", particle_columns(2) | rest | angles, None)
    poses = PoseColumns(np.zeros((2, 3)), np.array([[1.5, -2.5], [0.25, 3.0]]))
    table = read_star(path)
    rewrite_star(tmp_path / "q.star", table, table.star, poses, {})
    np.testing.assert_array_equal(read_star(tmp_path / "q.star").poses.origins_in_angstroms, poses.origins_in_angstroms)
    # A program that looks for pixels finds the same.
    written = plain_parse(tmp_path / "q.star")["particles"]
    np.testing.assert_allclose(np.array(written["rlnOriginX"], dtype=float) * 3, [1.5, 0.25], atol=2e-6)


@pytest.mark.parametrize("name", ["n" * 300 + ".mrcs", "d/" * 3000 + "a.mrcs", "a\x1b[2Jb.mrcs"])
def test_a_name_that_no_file_can_have_is_not_found(tmp_path, name):
    columns = particle_columns(2) | {"rlnImageName": [f"1@{name}"] * 2}
    message = refusal(ParticleStack.open, write_star_file(tmp_path / "p.star", columns))
    assert message.startswith(f"{tmp_path / 'p.star'}: image stack ")
    assert "not found; tried " in message
    assert message.isprintable()
    (tmp_path / "list.txt").write_text(name)
    message = refusal(read_particles, tmp_path / "list.txt")
    assert message.startswith(f"{tmp_path / 'list.txt'}: '")
    assert "of line 1 is not there; one stack a line is needed" in message
    assert message.isprintable()


def test_an_image_number_at_the_end_of_its_range_is_beyond_the_stack(tmp_path):
    write_images(tmp_path / "images.mrcs", np.zeros((2, 32, 32)))
    columns = particle_columns(2) | {"rlnImageName": ["1@images.mrcs", f"{2**31 - 1}@images.mrcs"]}
    path = write_star_file(tmp_path / "p.star", columns)
    assert f"row 2 wants image {2**31 - 1} of {tmp_path / 'images.mrcs'}, which has 2" in refusal(
        ParticleStack.open, path
    )
    columns = dataset_columns() | {"blob/idx": np.array([0, 1, 2**31 - 1, 0, 0], dtype="u4")}
    (tmp_path / "p.cs").write_bytes(dataset_bytes(columns))
    (tmp_path / "my stack.mrcs").write_bytes((tmp_path / "images.mrcs").read_bytes())
    with warnings.catch_warnings(action="error"):
        assert f"row 3 wants image {2**31} of" in refusal(ParticleStack.open, tmp_path / "p.cs")


@pytest.mark.parametrize(
    "much",
    [
        "data_a\nloop_\n_x\n" + "'a " * 200_000,
        "data_a\n" + "".join(f"_item{i} 1\n" for i in range(40_000)),
        "data_a\nloop_\n" + "".join(f"_column{i}\n" for i in range(40_000)),
    ],
    ids=["quotes that are not closed", "items", "columns"],
)
def test_much_of_one_thing_takes_no_more_than_its_share_of_time(tmp_path, much):
    (tmp_path / "p.star").write_text(loop_text("optics", OPTICS) + loop_text("particles", particle_columns(2)) + much)
    started = time.process_time()
    assert len(read_star(tmp_path / "p.star")) == 2
    assert time.process_time() - started < 3


def test_a_row_of_many_quotes_is_split_as_one_of_few():
    words = ["'a b'", '"c \'d e"', "f'g", "h", "'i\"  j'", "''", '"', "k", '"l"', "'"]
    few = tokens(" ".join(words))
    assert few == ["'a b'", '"c \'d e"', "f'g", "h", "'i\"  j'", "''", '" k "l"', "'"]
    assert tokens("  ".join([*words[:6], "m"] * 9)) == [*words[:6], "m"] * 9
    assert tokens("'n " * 20) == ["'n"] * 20


def test_a_group_file_of_empty_lines_is_refused_at_once(tmp_path):
    (tmp_path / "p.csg").write_text("metafile: a.cs\n" + "\n" * 100_000 + " " * 100_000)
    started = time.process_time()
    message = refusal(read_cryosparc, tmp_path / "p.csg")
    assert message.startswith(f"{tmp_path / 'p.csg'}: a cryoSPARC group file, which only names a.cs, and these are no")
    assert time.process_time() - started < 1


def test_names_of_what_are_no_characters_are_refused(tmp_path):
    columns = dataset_columns()
    names = columns["blob/path"].astype("U")
    names.view(np.uint32)[3] = 0x7FFFFFFF
    (tmp_path / "p.cs").write_bytes(dataset_bytes(columns | {"blob/path": names}))
    assert "blob/path holds what are no characters; it is damaged" in refusal(read_cryosparc, tmp_path / "p.cs")


@pytest.mark.parametrize("name", ["a b.mrcs", "'a' b.mrcs", '"a" b.mrcs', "a\u2028b.mrcs"])
def test_names_of_stacks_with_white_space_and_quotes_are_written_so_that_they_are_read_back(tmp_path, name):
    columns = dataset_columns() | {"blob/path": np.full(5, name.encode())}
    (tmp_path / "p.cs").write_bytes(dataset_bytes(columns))
    table = read_cryosparc(tmp_path / "p.cs")
    write_star(tmp_path / "p.star", table, np.full(5, 32), None, {})
    assert read_star(tmp_path / "p.star").images.names == (name,)


def test_a_name_of_a_stack_that_no_star_file_can_hold_is_refused(tmp_path):
    (tmp_path / "p.cs").write_bytes(dataset_bytes(dataset_columns() | {"blob/path": np.full(5, b"a\nb.mrcs")}))
    table = read_cryosparc(tmp_path / "p.cs")
    message = refusal(write_star, tmp_path / "p.star", table, np.full(5, 32), None, {})
    assert message == f"{tmp_path / 'p.cs'}: a STAR file cannot hold 'a\\nb.mrcs' as the name of a stack; rename it"
    assert not (tmp_path / "p.star").exists()


def test_a_pickle_that_would_end_the_process_in_numpy_is_read_as_the_numbers_it_holds(tmp_path):
    content = pickle.dumps(CTF, protocol=2)
    # The state of its type loses an item, which numpy.dtype.__setstate__ takes badly.
    shorter = content.replace(
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t", b"NJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    )
    assert len(shorter) == len(content) - 2
    (tmp_path / "ctf.pkl").write_bytes(shorter)
    np.testing.assert_array_equal(read_cryodrgn_ctf(tmp_path / "ctf.pkl").defocus_u_in_angstroms, CTF[:, 2])


def test_an_array_longer_than_all_memory_is_refused_and_nothing_is_printed(tmp_path, capfd):
    content = bytearray(pickle.dumps(CTF, protocol=5))
    length = content.index(b"\x96") + 1
    assert int.from_bytes(content[length : length + 8], "little") == CTF.nbytes
    content[length + 6] = 0x40
    (tmp_path / "ctf.pkl").write_bytes(content)
    assert "not a pickle, or a damaged one" in refusal(read_cryodrgn_ctf, tmp_path / "ctf.pkl")
    assert capfd.readouterr() == ("", "")


class Announced:
    """Pickled as an array of this shape that is never filled."""

    def __init__(self, *shape):
        self.shape = shape

    def __reduce__(self):
        return np.ndarray, (self.shape,)


def test_an_array_that_is_announced_and_not_there_takes_no_memory(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Announced(10**9, 9)))
    assert "not a pickle, or a damaged one" in refusal(read_cryodrgn_ctf, tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps((Announced(10**9, 3, 3), np.zeros((1, 2)))))
    assert "not a pickle, or a damaged one" in refusal(read_cryodrgn_poses, tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (40, np.float32(np.nan)),
        (44, np.float32(np.inf)),
        (48, np.float32(1e-40)),
        (28, np.int32(0)),
        (32, np.int32(-8)),
    ],
    ids=["nan", "inf", "next to nothing", "no steps", "negative steps"],
)
def test_a_map_without_a_voxel_size_that_is_one_is_refused(tmp_path, offset, value):
    path = tmp_path / "a.mrc"
    with mrcfile.new(path) as file:
        file.set_data(np.zeros((8, 8, 8), dtype="f4"))
        file.set_volume()
        file.voxel_size = 1.5
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = value.tobytes()
    path.write_bytes(content)
    with warnings.catch_warnings(action="error"):
        assert "one positive size is needed: set it" in refusal(read_map, path)


def test_an_extended_header_of_negative_length_is_refused(tmp_path):
    path = write_images(tmp_path / "a.mrcs", np.zeros((2, 8, 8)))
    content = bytearray(path.read_bytes())
    content[92:96] = b"\0\0\0\xff"  # which is 255 in the other byte order
    path.write_bytes(content)
    assert "the MRC header announces -16777216 bytes to follow it" in refusal(open_stack, path)


def test_a_folder_is_called_so_by_every_reader(tmp_path):
    (tmp_path / "a").mkdir()
    for read in (read_star, read_cryosparc, read_cryodrgn_ctf, read_map, open_stack, read_particles):
        assert refusal(read, tmp_path / "a").startswith(f"{tmp_path / 'a'}: a folder; give ")
    with pytest.raises(InputError, match="cannot be read \\(File name too long\\); give"):
        read_particles(tmp_path / ("n" * 300))
    assert torch.get_num_threads() == 1
