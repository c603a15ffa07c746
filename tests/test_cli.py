import json
import shutil
from types import SimpleNamespace

import mrcfile
import numpy as np
import pytest
import tomli_w
import torch

import cryoai
from cryoai.cli import main
from cryoai.formats.mrc import read_map, write_map
from cryoai.fourier import resize_map
from cryoai.particle_stack import ParticleStack
from cryoai.runs import RunFolder
from cryoai.training.settings import Settings
from stacks import OPTICS, files_in, loop_text, particle_columns, write_images, write_star

N, BOX = 24, 32
IMAGES = np.random.default_rng(0).normal(size=(N, BOX, BOX)).astype(np.float32)
COLUMNS = particle_columns(N)


def without(columns, name):
    return {key: cells for key, cells in columns.items() if key != name}


def with_row(columns, name, row, cell):
    return columns | {name: [cell if i == row - 1 else c for i, c in enumerate(columns[name])]}


def good_particles(folder, columns=COLUMNS, optics=OPTICS, images=IMAGES):
    path = write_images(folder / "images.mrcs", np.nan_to_num(images, posinf=0))
    # mrcfile warns of what is not finite; the images follow its header of 1024 bytes.
    np.memmap(path, np.float32, "r+", offset=1024, shape=images.shape)[:] = images
    return write_star(folder / "p.star", columns, optics)


def image_17_with(value):
    images = IMAGES.copy()
    images[16, 3, 4] = value
    return images


# ------------------------------------------------------------------------------ reconstruct, bad particles


BAD_PARTICLES = {
    "an image beyond the stack": ({"columns": with_row(COLUMNS, "rlnImageName", 5, "000025@images.mrcs")}, "row 5"),
    "image number 0": ({"columns": with_row(COLUMNS, "rlnImageName", 5, "000000@images.mrcs")}, "row 5"),
    "a stack that is not there": ({"columns": with_row(COLUMNS, "rlnImageName", 3, "1@gone.mrcs")}, "gone.mrcs"),
    "no defocus": ({"columns": without(COLUMNS, "rlnDefocusU")}, "rlnDefocusU"),
    "no defocus angle": ({"columns": without(COLUMNS, "rlnDefocusAngle")}, "rlnDefocusAngle"),
    "no voltage": ({"optics": without(OPTICS, "rlnVoltage")}, "rlnVoltage"),
    "no amplitude contrast": ({"optics": without(OPTICS, "rlnAmplitudeContrast")}, "rlnAmplitudeContrast"),
    "no pixel size": ({"optics": without(OPTICS, "rlnImagePixelSize")}, "rlnImagePixelSize"),
    "no image names": ({"columns": without(COLUMNS, "rlnImageName")}, "rlnImageName"),
    "a defocus that is no number": ({"columns": with_row(COLUMNS, "rlnDefocusV", 7, "none")}, "row 7"),
    "an unknown optics group": ({"columns": with_row(COLUMNS, "rlnOpticsGroup", 2, 9)}, "row 2"),
    "a voltage of 0": ({"optics": OPTICS | {"rlnVoltage": [0]}}, "rlnVoltage"),
    "no rows": ({"columns": {name: [] for name in COLUMNS}}, "p.star"),
    "too few particles": ({"columns": {name: cells[:19] for name, cells in COLUMNS.items()}}, "19 particles"),
    "an odd box": ({"images": np.pad(IMAGES, ((0, 0), (0, 1), (0, 1)))}, "33 pixels"),
    "images that are not square": ({"images": np.pad(IMAGES, ((0, 0), (0, 0), (0, 2)))}, "34 x 32"),
    "a box that is too small": ({"images": IMAGES[:, :30, :30]}, "30 pixels"),
    "an image with NaN": ({"images": image_17_with(np.nan)}, "row 17"),
    "an image with infinity": ({"images": image_17_with(np.inf)}, "row 17"),
    "a constant image": ({"images": np.where(np.arange(N)[:, None, None] == 16, 0, IMAGES)}, "row 17"),
}


@pytest.mark.parametrize(("changes", "named"), BAD_PARTICLES.values(), ids=BAD_PARTICLES)
def test_particles_that_cannot_be_used_are_refused_in_one_line_and_nothing_is_written(
    tmp_path, complaint, changes, named
):
    star = good_particles(tmp_path, **changes)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = complaint("reconstruct", star, tmp_path / "run")
    assert named in message
    assert str(tmp_path) in message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [None, "", "just some text\n", loop_text("particles", {"rlnA": [1, 2]})])
def test_a_file_that_is_missing_or_no_star_file_is_refused_by_name(tmp_path, complaint, content):
    star = tmp_path / "p.star"
    if content is not None:
        star.write_text(content)
    assert str(star) in complaint("reconstruct", star, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"not an MRC file", "cut short"])
def test_a_stack_that_is_no_mrc_file_is_refused_by_name(tmp_path, complaint, content):
    star = good_particles(tmp_path)
    stack = tmp_path / "images.mrcs"
    stack.write_bytes(stack.read_bytes()[:-5000] if content == "cut short" else content)
    assert str(stack) in complaint("reconstruct", star, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ reconstruct, bad places and options


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_where_nothing_can_be_written_is_refused(tmp_path, complaint, place):
    star = good_particles(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / place) in complaint("reconstruct", star, tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_folder_that_holds_anything_is_left_untouched(tmp_path, complaint):
    star = good_particles(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "map.mrc").write_text("last week's")
    assert str(tmp_path / "run") in complaint("reconstruct", star, tmp_path / "run")
    assert files_in(tmp_path / "run") == ["map.mrc"]
    assert (tmp_path / "run" / "map.mrc").read_text() == "last week's"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--box", 64], "--box 64"),
        (["--box", 31], "setting box"),
        (["--amortized.box", 64], "amortized.box"),
        (["--bootstrap.n-steps", 3], "setting bootstrap.n_steps"),
        (["--bootstrap.n-steps", "many"], "setting bootstrap.n_steps"),
        (["--stages", "refinement"], "stages"),
        (["--seed", -1], "setting seed"),
        (["--device", "tpu"], "device"),
        (["--preset", "fast"], "--preset"),
        (["--frobnicate", 1], "--frobnicate"),
        (["--bootstrap.frobnicate", 1], "frobnicate"),
        (["--settings", "nowhere.toml"], "--settings nowhere.toml"),
        (["--data-dir", "nowhere"], "--data-dir nowhere"),
        (["superfluous"], "superfluous"),
    ],
)
def test_a_wrong_flag_is_refused_by_name_and_nothing_is_written(tmp_path, complaint, flags, named):
    star = good_particles(tmp_path)
    assert named in complaint("reconstruct", star, tmp_path / "run", *flags)
    assert files_in(tmp_path) == ["images.mrcs", "p.star"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused(tmp_path, complaint):
    assert "--device cuda" in complaint("reconstruct", good_particles(tmp_path), tmp_path / "run", "--device", "cuda")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "named"),
    [({"bootstrap": {"n_step": 50}}, "bootstrap.n_step"), ({"amortized": {"learning_rate": 2}}, "learning_rate")],
)
def test_a_settings_file_with_a_wrong_key_is_refused_by_the_key(tmp_path, complaint, values, named):
    file = tmp_path / "s.toml"
    file.write_text(tomli_w.dumps(values))
    star = good_particles(tmp_path)
    assert named in complaint("reconstruct", star, tmp_path / "run", "--settings", file)
    file.write_text("not = = toml")
    assert f"--settings {file}" in complaint("reconstruct", star, tmp_path / "run", "--settings", file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["reconstruct"], ["reconstruct", "p.star"], ["simulate", "m.mrc"]]
)
def test_a_command_that_is_unknown_or_incomplete_is_refused(complaint, arguments):
    assert complaint(*arguments)


# ------------------------------------------------------------------------------ the verdict as exit status


@pytest.mark.parametrize(("verdict", "status"), [("solved", 0), ("ambiguous", 3), ("failed", 1)])
def test_the_exit_status_of_a_run_is_its_verdict(tmp_path, monkeypatch, capsys, verdict, status):
    asked = []

    def reconstruct(stack, run_dir, settings):
        asked.append((stack.n_particles, run_dir, settings.seed))
        return SimpleNamespace(verdict=SimpleNamespace(status=verdict))

    monkeypatch.setattr("cryoai.commands.running.reconstruct", reconstruct)
    monkeypatch.setattr("cryoai.commands.running.check_before_run", lambda *_arguments, **_options: None)
    star, run = good_particles(tmp_path), tmp_path / "run"
    assert main(["reconstruct", str(star), str(run), "--seed", "7"]) == status
    assert asked == [(N, run, 7)]
    # The reasons have been said by then: an exit status is no error of usage.
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------ help


def test_help_version_and_info_are_had_without_any_files(output):
    assert output("--version").strip() == cryoai.__version__
    text = output("--help")
    for verb in ("demo", "simulate", "reconstruct", "infer", "evaluate", "info"):
        assert verb in text
        assert f"cryoai {verb}" in output(verb, "--help")
    info = output("info")
    assert cryoai.__version__ in info
    assert torch.__version__.split("+")[0] in info


def test_the_help_of_reconstruct_explains_every_setting(output):
    text = " ".join(output("reconstruct", "--help").split())
    for flag in ("--stages", "--box", "--seed", "--bootstrap.n-steps", "--amortized.n-hypotheses"):
        assert flag in text
    assert "--refinement.max-rounds" in text
    assert "Optimizer steps." in text


def test_debug_adds_the_traceback_and_keeps_the_last_line(capsys):
    assert main(["reconstruct", "nowhere.star", "run", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("cryoai: error: nowhere.star: ")


# ------------------------------------------------------------------------------ simulate

ENOUGH = ["--n-particles", 5, "--box", 32, "--pixel-size", 3.0, "--snr", 0.5]


@pytest.fixture
def source(phantom, tmp_path):
    path = tmp_path / "source.mrc"
    write_map(path, phantom.density(24).float().numpy(), 3.0)
    return path


def changed(flag, value):
    arguments = list(ENOUGH)
    if flag in arguments:
        arguments[arguments.index(flag) + 1] = value
        return arguments
    return [*arguments, flag, value]


def test_particles_are_simulated_from_a_map(tmp_path, source, output):
    out = tmp_path / "out"
    text = output("simulate", source, out, *ENOUGH, "--shift-std", 4.0, "--seed", 3)
    assert "5 particles of 32 px" in text
    assert files_in(out) == ["particles.mrcs", "particles.star", "truth.mrc", "truth.star"]
    particles = ParticleStack.open(out / "particles.star")
    assert (particles.n_particles, particles.n_pixels, particles.pixel_size_in_angstroms) == (5, 32, 3.0)
    assert particles.poses is None
    assert ParticleStack.open(out / "truth.star").poses.shifts_in_angstroms.abs().max() > 1
    truth = read_map(out / "truth.mrc")
    expected = resize_map(torch.from_numpy(read_map(source).density), 24).numpy()
    assert truth.density.shape == (32, 32, 32)
    inner = truth.density[4:28, 4:28, 4:28]
    assert np.corrcoef(inner.ravel(), expected.ravel())[0, 1] > 0.99


def test_particles_are_simulated_from_a_model(tmp_path, output):
    pytest.importorskip("gemmi")
    positions = [(3.8 * i, (i % 3) * 4.0, (i % 2) * 5.0) for i in range(1, 13)]
    lines = [
        f"ATOM  {i:5d}  CA  ALA A{i:4d}    {x:8.3f}{y:8.3f}{z:8.3f}{1:6.2f}{20:6.2f}{'C':>12}\n"
        for i, (x, y, z) in enumerate(positions, 1)
    ]
    model = tmp_path / "m.pdb"
    model.write_text("".join(lines) + "END\n")
    output("simulate", model, tmp_path / "out", *ENOUGH)
    assert files_in(tmp_path / "out") == ["particles.mrcs", "particles.star", "truth.mrc", "truth.star"]
    truth = read_map(tmp_path / "out" / "truth.mrc").density
    assert truth[16, 16, 16] > 0.2 * truth.max()


def test_one_seed_gives_one_stack(tmp_path, source, output):
    stacks = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output("simulate", source, tmp_path / name, *ENOUGH, "--seed", seed)
        with mrcfile.open(tmp_path / name / "particles.mrcs") as file:
            stacks.append(np.array(file.data))
    np.testing.assert_array_equal(stacks[0], stacks[1])
    assert not np.array_equal(stacks[0], stacks[2])


def test_defoci_come_from_the_table(tmp_path, source, output):
    table = np.array([[9000.0, 8500.0, 10.0], [21000.0, 20000.0, 70.0]])
    np.save(tmp_path / "defoci.npy", table)
    output("simulate", source, tmp_path / "out", *ENOUGH, "--defocus-table", tmp_path / "defoci.npy")
    defoci = ParticleStack.open(tmp_path / "out" / "particles.star").optics.defocus_u_in_angstroms
    assert set(defoci.tolist()) <= {9000.0, 21000.0}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--snr", -1),
        ("--snr", 0),
        ("--snr", "nan"),
        ("--n-particles", 0),
        ("--n-particles", "many"),
        ("--pixel-size", -3),
        ("--box", 33),
        ("--box", 30),
        ("--frobnicate", 1),
    ],
)
def test_a_simulation_that_makes_no_sense_is_refused_by_the_flag(tmp_path, source, complaint, flag, value):
    assert flag in complaint("simulate", source, tmp_path / "out", *changed(flag, value))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "table", [np.zeros((3, 2)), np.zeros(3), np.zeros((0, 3)), np.full((1, 3), np.nan), "text", "missing"]
)
def test_a_defocus_table_of_another_kind_is_refused(tmp_path, source, complaint, table):
    path = tmp_path / "defoci.npy"
    if isinstance(table, np.ndarray):
        np.save(path, table)
    elif table == "text":
        path.write_text("9000 8500 10\n")
    assert f"--defocus-table {path}" in complaint(
        "simulate", source, tmp_path / "out", *ENOUGH, "--defocus-table", path
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nowhere.mrc", "nowhere.pdb", "noise.mrc"])
def test_a_source_that_is_missing_or_no_map_is_refused(tmp_path, complaint, name):
    (tmp_path / "noise.mrc").write_bytes(b"no map")
    assert name in complaint("simulate", tmp_path / name, tmp_path / "out", *ENOUGH)
    assert not (tmp_path / "out").exists()


def test_particles_are_simulated_into_empty_folders_only(tmp_path, source, complaint):
    before = files_in(tmp_path)
    assert str(tmp_path) in complaint("simulate", source, tmp_path, *ENOUGH)
    assert str(source / "out") in complaint("simulate", source, source / "out", *ENOUGH)
    assert files_in(tmp_path) == before


# ------------------------------------------------------------------------------ demo and evaluate


@pytest.mark.parametrize("place", ["file", "file/demo", "full"])
def test_the_demonstration_needs_an_empty_place(tmp_path, complaint, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    assert str(tmp_path / place) in complaint("demo", "--out", tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"
    assert files_in(tmp_path / "full") == ["notes"]


@pytest.fixture
def finished(tmp_path, source, output):
    """The folder of a run that found the truth, and the truth."""
    truth = tmp_path / "truth"
    arguments = ["--n-particles", 40, "--box", 32, "--pixel-size", 3.0, "--snr", 0.5, "--shift-std", 2.0]
    output("simulate", source, truth, *arguments)
    run = RunFolder.create(tmp_path / "run")
    shutil.copy(truth / "truth.star", run.particles)
    shutil.copy(truth / "truth.mrc", run.map)
    run.write_json(run.summary, {"n_particles": 40})
    run.write_text(run.settings, Settings().to_toml())
    return run, truth


def test_a_run_is_compared_with_the_truth(finished, source, output):
    run, truth = finished
    text = output("evaluate", run.path, "--truth", truth / "truth.star")
    assert "as in the truth" in text
    report = json.loads(output("evaluate", run.path, "--truth", truth / "truth.star", "--map", source, "--json"))
    assert report == json.loads(run.evaluation.read_text())
    assert report["poses"]["n_particles"] == 40
    assert report["poses"]["median_rotation_error_in_degrees"] < 0.1
    assert report["poses"]["within_5_degrees"] == 1
    assert "encoder_poses" not in report
    # The true map has another box, and is brought to that of the run.
    assert report["map"]["nyquist_in_angstroms"] == 6.0
    assert report["map"]["resolution_at_fsc_0.5"] <= 8
    assert "map_within_mask" not in report
    shutil.copy(run.particles, run.encoder_particles)
    assert "encoder's own" in output("evaluate", run.path, "--truth", truth / "truth.star")


def test_a_map_is_compared_with_the_truth_within_the_mask_of_the_run_too(finished, source, output):
    run, truth = finished
    density = read_map(run.map).density
    # Half of it is something else.
    spoilt = density.copy()
    spoilt[16:] = np.random.default_rng(0).normal(scale=density.std(), size=spoilt[16:].shape)
    write_map(run.map, spoilt, 3.0)
    mask = np.zeros_like(density)
    mask[:14] = 1
    write_map(run.mask, mask, 3.0)
    arguments = ("evaluate", run.path, "--truth", truth / "truth.star", "--map", source)
    report = json.loads(output(*arguments, "--json"))
    assert report["map_within_mask"]["resolution_at_fsc_0.143"] < report["map"]["resolution_at_fsc_0.143"]
    text = output(*arguments)
    assert "within a soft sphere: FSC 0.5 at" in text
    assert "within the mask of the run: FSC 0.5 at" in text


def test_a_truth_that_does_not_fit_the_run_is_refused(finished, tmp_path, complaint):
    run, truth = finished
    assert "no poses" in complaint("evaluate", run.path, "--truth", truth / "particles.star")
    columns = particle_columns(7) | {name: [0] * 7 for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")}
    other = write_star(tmp_path / "other.star", columns)
    message = complaint("evaluate", run.path, "--truth", other)
    assert "shares no image with" in message
    assert "nowhere.mrc" in complaint("evaluate", run.path, "--truth", truth / "truth.star", "--map", "nowhere.mrc")
    assert str(truth) in complaint("evaluate", truth, "--truth", truth / "truth.star")
    assert not run.evaluation.exists()


def test_an_interrupted_command_says_that_it_stopped(monkeypatch, capsys):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("cryoai.commands.judging.choose_device", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "cryoai: stopped\n"
