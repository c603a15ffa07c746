"""Poses for particles that a run has never seen, and how much they are to be believed."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from cryoai.alignment import FrameChange
from cryoai.bootstrap import Reference
from cryoai.encoder import EncoderArchitecture
from cryoai.formats.mrc import MrcMap, read_map
from cryoai.fourier import FourierDisc
from cryoai.inference import PosePredictor, TrainedEncoder, _features, infer_file
from cryoai.model import CryoAI
from cryoai.noise import NoiseSpectrum
from cryoai.particle_stack import ParticleStack
from cryoai.particles import Quarantine, prepare_particles
from cryoai.pose_files import read_poses
from cryoai.poses import angular_distance_in_degrees
from cryoai.runs import RunFolder
from cryoai.simulation import protein_like_phantom, simulate
from cryoai.symmetry.averaging import symmetrized_map
from cryoai.symmetry.detection import place_symmetry
from cryoai.symmetry.groups import PointGroup
from cryoai.training.loop import reconstruct
from cryoai.training.settings import Settings
from cryoai.training.stages import Amortized, Estimate
from cryoai.volumes import VoxelVolume
from oracles import make_optics, random_rotations
from stacks import OPTICS, files_in, particle_columns, plain_parse, refusal, write_images, write_star

# ------------------------------------------------------------------------------ the encoder's file

BOX, RADIUS = 32, 8


def an_encoder(kind="polar", symmetrization="none", n_hypotheses=4):
    """Random weights, and statistics of some images, and everything else different from its neighbours."""
    architecture = EncoderArchitecture(kind, n_hypotheses, 4, 10.0, symmetrization)
    disc = FourierDisc.of_box(BOX)
    network = architecture.build(disc, RADIUS)
    with torch.no_grad():
        # BatchNorm learns what the features are like; before that an encoder says the same of every image.
        for _ in range(40):
            network(disc.from_images(torch.randn(8, BOX, BOX)))
    trained = TrainedEncoder(
        architecture=architecture,
        input="plain",
        weights=network.state_dict(),
        n_pixels=BOX,
        pixel_size_in_angstroms=3.1,
        max_radius=RADIUS,
        contrast_sign=-1,
        noise=NoiseSpectrum(1 + torch.rand(RADIUS + 1)),
        residual_noise=NoiseSpectrum(2 + torch.rand(RADIUS + 1)),
        optics=make_optics(5, defocus_u_in_angstroms=torch.linspace(9000, 20000, 5)),
        shift_std_in_angstroms=2.3,
        fit_centre=-0.4,
        fit_spread=1.7,
        frame=FrameChange(random_rotations(1, seed=2)[0].float(), mirrored=False, shift=torch.tensor([1.0, 2.0, -3.0])),
        group=PointGroup.named("T"),
    )
    return trained, network.eval()


@torch.no_grad()
@pytest.mark.parametrize("symmetrization", ["none", "half-turn"])
@pytest.mark.parametrize(("kind", "n_hypotheses"), [("polar", 4), ("convolutional", 3), ("convolutional", 1)])
def test_an_encoder_comes_back_from_its_file_with_all_that_it_knows(tmp_path, kind, n_hypotheses, symmetrization):
    trained, network = an_encoder(kind, symmetrization, n_hypotheses)
    trained.save(tmp_path / "e.safetensors")
    assert files_in(tmp_path) == ["e.safetensors"]
    again = TrainedEncoder.load(tmp_path / "e.safetensors")
    for name in ("architecture", "input", "n_pixels", "pixel_size_in_angstroms", "max_radius", "contrast_sign"):
        assert getattr(again, name) == getattr(trained, name)
    assert again.shift_std_in_angstroms == 2.3
    assert (again.fit_centre, again.fit_spread) == (-0.4, 1.7)
    assert torch.equal(again.noise.variance, trained.noise.variance)
    assert torch.equal(again.residual_noise.variance, trained.residual_noise.variance)
    for name, value in vars(trained.optics).items():
        assert torch.equal(getattr(again.optics, name), value)
    assert torch.equal(again.frame.rotation, trained.frame.rotation)
    assert torch.equal(again.frame.shift, trained.frame.shift)
    assert again.group.name == "T"
    assert torch.equal(again.group.operators, trained.group.operators)

    disc = FourierDisc.of_box(BOX)
    images = disc.from_images(torch.randn(6, BOX, BOX))
    asked = again.build(disc)
    assert not asked.training
    found, expected = asked(images), network(images)
    assert torch.equal(found.poses.rotations, expected.poses.rotations)
    assert torch.equal(found.poses.shifts_in_angstroms, expected.poses.shifts_in_angstroms)
    assert torch.equal(found.log_probabilities, expected.log_probabilities)
    assert expected.poses.rotations.std(dim=0).max() > 0.01


def test_an_encoder_of_an_earlier_version_has_no_symmetry_and_the_frame_of_its_map(tmp_path):
    path = tmp_path / "e.safetensors"
    trained, _ = an_encoder()
    trained.save(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["cryoai"])
    tensors = safetensors.torch.load_file(path)
    del about["symmetry"]
    for name in ("symmetry_operators", "frame.rotation", "frame.shift"):
        del tensors[name]
    safetensors.torch.save_file(tensors, path, {"cryoai": json.dumps(about)})
    again = TrainedEncoder.load(path)
    assert (again.group.name, len(again.group)) == ("C1", 1)
    assert torch.equal(again.group.operators[0], torch.eye(3))
    assert torch.equal(again.frame.rotation, torch.eye(3))
    assert torch.equal(again.frame.shift, torch.zeros(3))
    assert again.fit_spread == trained.fit_spread


def test_an_encoder_that_is_missing_or_none_of_ours_is_refused_in_one_line(tmp_path):
    assert f"{tmp_path}: the run has no encoder" in refusal(TrainedEncoder.load, tmp_path / "encoder.safetensors")
    path = tmp_path / "e.safetensors"
    trained, _ = an_encoder()
    trained.save(path)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load(whole)
    incomplete = {name: value for name, value in tensors.items() if name != "noise"}
    contents = {
        "empty": b"",
        "garbage": b"this was never an encoder\n" * 40,
        "cut short": whole[: len(whole) // 2],
        "weights alone": safetensors.torch.save(tensors),
        "of another program": safetensors.torch.save(tensors, {"format": "pt"}),
        "metadata of another kind": safetensors.torch.save(tensors, {"cryoai": "[1, 2]"}),
        "metadata that is no JSON": safetensors.torch.save(tensors, {"cryoai": "{"}),
        "metadata of another version": safetensors.torch.save(tensors, {"cryoai": '{"architecture": {"depth": 3}}'}),
        "a tensor missing": safetensors.torch.save(incomplete, metadata),
    }
    for content in contents.values():
        path.write_bytes(content)
        assert refusal(TrainedEncoder.load, path).startswith(f"{path}: not an encoder of this program")


# ------------------------------------------------------------------------------ a run as it comes

FINE = {
    "stages": ("amortized",),
    "device": "cpu",
    "amortized": {
        "n_steps": 30,
        "n_fit_steps": 2,
        "wake_batch_size": 8,
        "sleep_batch_size": 32,
        "encoder_width": 8,
        "n_hypotheses": 4,
        "volume_width": 16,
    },
    "placement": {"n_iterations": 0},
}
N_NEW = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps on 60 particles of 32 pixels of 7 Å."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("few")
    options = {"n_pixels": 32, "pixel_size_in_angstroms": 7.0}
    made = simulate(protein_like_phantom(1), folder, n_particles=60, snr=1.0, seed=0, **options)
    return reconstruct(ParticleStack.open(made.particles), folder / "run", Settings.assemble("auto", None, FINE)).run


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """Particles that the run has not seen: shuffled, with columns of their own and poses of somebody else."""
    folder = tmp_path_factory.mktemp("new")
    options = {"n_pixels": 32, "pixel_size_in_angstroms": 7.0}
    made = simulate(protein_like_phantom(1), folder, n_particles=N_NEW, snr=1.0, seed=1, **options)
    blocks = plain_parse(made.particles)
    order = np.random.default_rng(0).permutation(N_NEW)
    columns = {name: [cells[i] for i in order] for name, cells in blocks["particles"].items()}
    columns |= {
        "rlnMicrographName": [f"mic{i}.mrc" for i in range(N_NEW)],
        "rlnAngleRot": ["11.000000"] * N_NEW,
        "rlnAngleTilt": ["22.000000"] * N_NEW,
        "rlnAnglePsi": ["33.000000"] * N_NEW,
    }
    return write_star(folder / "new.star", columns, blocks["optics"])


@pytest.fixture
def few_rehearsals(monkeypatch):
    monkeypatch.setattr("cryoai.inference._N_SYNTHETIC", 200)


@pytest.fixture
def in_full_precision(monkeypatch):
    monkeypatch.setattr("cryoai.hardware.matrix_dtype", lambda _device: torch.float32)


POSE = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"]


def test_new_particles_come_back_row_by_row_with_poses_and_figures_of_merit(run, new, tmp_path, output):
    before = {path: path.read_bytes() for folder in (run.path, new.parent) for path in folder.glob("*.*")}
    line = output("infer", run.path, new, tmp_path / "out.star")
    assert line.startswith(f"{tmp_path / 'out.star'}: {N_NEW} particles posed, ")
    assert line.count("\n") == 1
    assert files_in(tmp_path) == ["out.star"]
    assert all(path.read_bytes() == content for path, content in before.items())
    old, found = plain_parse(new), plain_parse(tmp_path / "out.star")
    assert found["optics"] == old["optics"]
    for name in set(old["particles"]) - set(POSE):
        assert found["particles"][name] == old["particles"][name]
    assert set(found["particles"]) == set(old["particles"]) | {*POSE, "rlnParticleFigureOfMerit"}
    merit = np.array(found["particles"]["rlnParticleFigureOfMerit"], dtype=float)
    assert merit.shape == (N_NEW,)
    assert merit.min() >= 0
    assert merit.max() <= 1
    assert set(found["particles"]["rlnAngleRot"]) != {"11.000000"}


def test_one_command_gives_one_result_to_the_last_digit(run, new, tmp_path, output):
    for name in ("a.star", "b.star"):
        output("infer", run.path, new, tmp_path / name)
    assert plain_parse(tmp_path / "a.star") == plain_parse(tmp_path / "b.star")


@pytest.mark.usefixtures("few_rehearsals")
def test_a_file_that_is_there_is_replaced(run, new, tmp_path, output):
    (tmp_path / "out.star").write_text("last week's")
    output("infer", run.path, new, tmp_path / "out.star")
    assert len(read_poses(tmp_path / "out.star")) == N_NEW


@pytest.mark.usefixtures("few_rehearsals", "in_full_precision")
@pytest.mark.parametrize("n_iterations", [0, 1])
def test_the_poses_are_those_of_one_image_at_a_time(run, new, monkeypatch, n_iterations):
    predictor = PosePredictor.of_run(run, n_iterations=n_iterations, device=torch.device("cpu"))
    stack = ParticleStack.open(new)
    done = []
    together = predictor.infer(stack, progress=done.append)
    assert done == [N_NEW]
    monkeypatch.setattr("cryoai.inference._BATCH", 1)
    alone = predictor.infer(stack, progress=done.append)
    assert done[1:] == list(range(1, N_NEW + 1))
    assert angular_distance_in_degrees(alone.poses.rotations, together.poses.rotations).max() < 0.1
    torch.testing.assert_close(
        alone.poses.shifts_in_angstroms, together.poses.shifts_in_angstroms, atol=1e-2, rtol=1e-3
    )
    torch.testing.assert_close(alone.confidence, together.confidence, atol=1e-3, rtol=1e-3)
    distance = angular_distance_in_degrees(together.poses.rotations[:, None], together.poses.rotations)
    assert distance.median() > 5


@pytest.mark.usefixtures("few_rehearsals")
def test_refinement_is_asked_for_with_a_flag(run, new, tmp_path, output):
    output("infer", run.path, new, tmp_path / "a.star")
    output("infer", run.path, new, tmp_path / "b.star", "--refine", 1)
    found, refined = (read_poses(tmp_path / name) for name in ("a.star", "b.star"))
    moved = angular_distance_in_degrees(found.rotations, refined.rotations)
    assert (moved > 0.1).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("few_rehearsals", "in_full_precision")
def test_the_encoder_of_a_symmetric_run_is_saved_with_its_group_and_the_frame_of_the_map(tmp_path, monkeypatch):
    """The axes are placed anew after the encoder has learnt, as in a run without Bootstrap."""
    monkeypatch.setattr("cryoai.training.stages.axes.adjust_symmetry", place_symmetry)
    phantom, group = protein_like_phantom(0), PointGroup.named("D2")
    density = symmetrized_map(torch.from_numpy(phantom.density), group).numpy()
    source = MrcMap(density, phantom.pixel_size_in_angstroms)
    made = simulate(source, tmp_path, n_particles=200, n_pixels=32, pixel_size_in_angstroms=7.0, snr=1.0, seed=0)
    settings = FINE | {
        "stages": ("bootstrap", "amortized", "refinement"),
        "symmetry": "D2",
        "bootstrap": {"n_steps": 40, "batch_size": 100, "n_rotations": 1152, "n_starts": 1, "max_starts": 1},
        "placement": {"n_rotations": 1152, "n_iterations": 1},
        "refinement": {"max_rounds": 3, "n_iterations": 1},
    }
    stack = ParticleStack.open(made.particles)
    run = reconstruct(stack, tmp_path / "run", Settings.assemble("auto", None, settings)).run
    trained = TrainedEncoder.load(run.encoder_weights)
    assert trained.group.name == "D2"
    assert torch.equal(trained.group.operators, group.operators)
    assert angular_distance_in_degrees(trained.frame.rotation, torch.eye(3)) > 30
    predictor = PosePredictor.of_run(run, n_iterations=0, device=torch.device("cpu"))
    batch = next(predictor._stream(stack, Quarantine(stack, 0)))
    with torch.no_grad():
        proposed = predictor.model.propose(batch, trained.noise.precision(predictor.model.imaging)).poses
    # What the run says that the encoder said is among its proposals, in their new frame.
    chosen = read_poses(run.encoder_particles)
    near, far = (
        angular_distance_in_degrees(poses.rotations, chosen.rotations[:, None]).amin(1)
        for poses in (trained.frame.of_poses(proposed), proposed)
    )
    assert near.median() < 0.2
    assert far.median() > 5
    placed = predictor.place(batch).poses
    assert (angular_distance_in_degrees(placed.rotations, chosen.rotations) < 1).float().mean() > 0.5


# ------------------------------------------------------------------------------ commands that must be refused


def write_particles(folder, n_pixels=32, pixel_size=7.0, n=3):
    write_images(folder / "images.mrcs", np.random.default_rng(0).normal(size=(n, n_pixels, n_pixels)))
    optics = OPTICS | {"rlnImagePixelSize": [pixel_size]}
    return write_star(folder / "p.star", particle_columns(n), optics)


@pytest.mark.parametrize(
    ("n_pixels", "pixel_size", "named"),
    [
        (32, 7.1, ["pixels of 7.1 Å", "7 Å"]),
        (64, 14.0, ["pixels of 14 Å", "7 Å"]),
        (62, 3.4, ["a box of 211 Å", "224 Å", "at least 66 pixels"]),
        (40, 3.5, ["a box of 140 Å", "224 Å", "at least 64 pixels"]),
    ],
)
@pytest.mark.usefixtures("few_rehearsals")
def test_images_that_are_too_coarse_or_too_small_are_refused(run, tmp_path, complaint, n_pixels, pixel_size, named):
    star = write_particles(tmp_path, n_pixels, pixel_size)
    message = complaint("infer", run.path, star, tmp_path / "out.star")
    assert message.startswith(f"{star}: ")
    assert all(part in message for part in named)
    assert not (tmp_path / "out.star").exists()


@pytest.mark.parametrize(("n_pixels", "pixel_size"), [(32, 7.0), (64, 3.5), (80, 3.5), (64, 3.45), (100, 3.0)])
@pytest.mark.usefixtures("few_rehearsals")
def test_images_of_finer_pixels_and_larger_boxes_are_posed(run, tmp_path, output, n_pixels, pixel_size):
    star = write_particles(tmp_path, n_pixels, pixel_size)
    assert "3 particles posed" in output("infer", run.path, star, tmp_path / "out.star")


@pytest.mark.parametrize("where", ["p.star", "../{name}/p.star", "link.star"])
@pytest.mark.usefixtures("few_rehearsals")
def test_the_input_is_never_written_over(run, tmp_path, complaint, where):
    star = write_particles(tmp_path)
    before = star.read_bytes()
    (tmp_path / "link.star").symlink_to(star)
    out = tmp_path / where.format(name=tmp_path.name)
    assert f"{out}: is the input" in complaint("infer", run.path, star, out)
    assert star.read_bytes() == before


@pytest.mark.parametrize("where", ["images.mrcs", "nowhere/out.star", "p.star/out.star", "folder"])
@pytest.mark.usefixtures("few_rehearsals")
def test_a_place_where_the_result_cannot_go_is_refused_before_any_particle_is_posed(
    run, tmp_path, complaint, monkeypatch, where
):
    star = write_particles(tmp_path)
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setattr(PosePredictor, "infer", lambda *_arguments: pytest.fail("particles were posed in vain"))
    assert str(tmp_path / where) in complaint("infer", run.path, star, tmp_path / where)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert files_in(tmp_path) == ["folder", "images.mrcs", "p.star"]


def test_a_run_without_an_encoder_and_what_is_no_run_are_refused(run, new, tmp_path, complaint):
    bare = tmp_path / "bare"
    shutil.copytree(run.path, bare)
    (bare / "encoder.safetensors").unlink()
    assert f"{bare}: the run has no encoder" in complaint("infer", bare, new, tmp_path / "out.star")
    (bare / "encoder.safetensors").write_bytes(b"garbage")
    assert f"{bare / 'encoder.safetensors'}: not an encoder" in complaint("infer", bare, new, tmp_path / "out.star")
    assert str(new.parent) in complaint("infer", new.parent, new, tmp_path / "out.star")
    shutil.copy(run.encoder_weights, bare)
    (bare / "map.mrc").unlink()
    assert str(bare / "map.mrc") in complaint("infer", bare, new, tmp_path / "out.star")
    assert not (tmp_path / "out.star").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["NEW"], "infer: give RUN_DIR NEW.star OUT.star"),
        ([], "infer: give RUN_DIR NEW.star OUT.star"),
        (["NEW", "OUT", "more"], "infer: give RUN_DIR NEW.star OUT.star"),
        (["--watch", "DIR"], "with --watch DIR give RUN_DIR and the folder"),
        (["NEW", "OUT", "--watch", "DIR"], "with --watch DIR give RUN_DIR and the folder"),
        (["NEW", "OUT", "--until-idle", 5], "--until-idle"),
        (["OUT", "--watch", "DIR", "--until-idle", 0], "--until-idle 0"),
        (["OUT", "--watch", "DIR", "--until-idle", -1], "--until-idle -1"),
        (["OUT", "--watch", "DIR", "--until-idle", "nan"], "--until-idle nan"),
        (["NEW", "OUT", "--refine", -1], "--refine -1"),
        (["NEW", "OUT", "--refine", 21], "--refine 21"),
        (["NEW", "OUT", "--refine", "much"], "--refine"),
        (["NEW", "OUT", "--device", "tpu"], "--device"),
        (["NEW", "OUT.star", "--data-dir", "nowhere"], "--data-dir nowhere"),
        (["nowhere.star", "OUT.star"], "nowhere.star"),
        (["NEW", "OUT"], "ends in .star"),
        (["OUT", "--watch", "nowhere"], "--watch nowhere"),
        (["DIR", "--watch", "DIR"], "same folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("few_rehearsals")
def test_a_wrong_call_is_refused_by_what_is_wrong_with_it(run, new, tmp_path, complaint, arguments, named):
    (tmp_path / "DIR").mkdir()
    places = {"NEW": new, "OUT": tmp_path / "OUT", "OUT.star": tmp_path / "OUT.star", "DIR": tmp_path / "DIR"}
    assert named in complaint("infer", run.path, *(places.get(a, a) for a in arguments))
    assert not (tmp_path / "OUT").is_file()
    assert not (tmp_path / "OUT.star").exists()
    assert files_in(tmp_path / "DIR") == []


@pytest.mark.usefixtures("few_rehearsals")
def test_a_bad_image_is_named_and_nothing_is_written(run, tmp_path, complaint):
    star = write_particles(tmp_path)
    np.memmap(tmp_path / "images.mrcs", np.float32, "r+", offset=1024, shape=(3, 32, 32))[1] = 0.25
    assert "too many images cannot be used: row 2 (2@" in complaint("infer", run.path, star, tmp_path / "out.star")
    assert files_in(tmp_path) == ["images.mrcs", "p.star"]


# ------------------------------------------------------------------------------ watching


@pytest.mark.usefixtures("few_rehearsals")
def test_a_folder_is_watched_until_nothing_new_comes(run, new, tmp_path, output):
    arriving = tmp_path / "arriving"
    arriving.mkdir()
    shutil.copy(new, arriving / "a.star")
    shutil.copy(new.parent / "particles.mrcs", arriving)
    (arriving / "half.star").write_text(new.read_text().replace("particles.mrcs", "later.mrcs"))
    lines = output("infer", run.path, tmp_path / "posed", "--watch", arriving, "--until-idle", 1).splitlines()
    assert files_in(tmp_path / "posed") == ["a.star"]
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path / 'posed' / 'a.star'}: {N_NEW} particles posed")
    assert lines[1].startswith("half.star is left until it is whole: ")
    assert "later.mrcs" in lines[1]
    output("infer", run.path, new, tmp_path / "one.star")
    assert plain_parse(tmp_path / "posed" / "a.star") == plain_parse(tmp_path / "one.star")


# ------------------------------------------------------------------------------ an encoder worth its name

N_TEST, SHIFT = 300, 4.0
EXTENT = 224.0


@pytest.fixture(scope="module")
def practised(tmp_path_factory):
    """The folder of a run that knows the true map, and whose encoder has learnt most of it in sleep.

    Beside it ``test`` has particles of 64 pixels of 3.5 Å in the frame of the map that the encoder has
    not seen, ``noise`` the same without any particle, ``dark`` the same with the contrast reversed.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("practised")
    made = {}
    for seed, (name, n) in enumerate([("train", 200), ("test", N_TEST)]):
        (folder / name).mkdir()
        options = {"snr": 0.5, "n_pixels": 64, "pixel_size_in_angstroms": 3.5}
        made[name] = simulate(
            protein_like_phantom(0),
            folder / name,
            n_particles=n,
            seed=seed,
            shift_standard_deviation_in_angstroms=SHIFT,
            **options,
        )
    images = ParticleStack.open(made["test"].particles).images(torch.arange(N_TEST)).numpy()
    for name, content in (("noise", np.random.default_rng(0).normal(size=images.shape)), ("dark", -images)):
        (folder / name).mkdir()
        shutil.copy(made["test"].particles, folder / name)
        write_images(folder / name / "particles.mrcs", content)
    train(folder, made["train"])
    return folder


def train(folder, simulation, radius=10, n_steps=500):
    stack = ParticleStack.open(simulation.particles)
    particles = prepare_particles(stack, 64, folder / "images.f16", sign=1).cropped(32)
    imaging, truth = particles.imaging(radius), read_poses(simulation.truth)
    density = torch.from_numpy(read_map(simulation.true_map).density)
    flat = NoiseSpectrum(torch.ones(radius + 1))
    batch = particles.batch(torch.arange(len(truth)), radius)
    clean = imaging.predict(Reference(density, radius, flat).at_box(32).sampled(), truth, batch.optics)
    gain = float((clean.conj() * batch.coefficients).real.sum() / clean.abs().square().sum())
    noise = [NoiseSpectrum.of_residuals(batch.coefficients - gain * clean, imaging) for _ in range(2)]
    reference = Reference(gain * density, radius, noise[0]).at_box(32)
    architecture = EncoderArchitecture("polar", 16, 32, 0.1 * EXTENT, "none")
    model = CryoAI(architecture.build(particles.disc, radius), VoxelVolume(reference.density), imaging)
    stage = Amortized(
        particles,
        Estimate(reference=reference),
        model,
        n_steps=n_steps,
        n_fit_steps=0,
        wake_batch_size=16,
        sleep_batch_size=96,
        wake_interval=n_steps,
        first_radius=radius,
        learning_rate=8e-3,
        volume_learning_rate=1e-30,
        shift_std_in_angstroms=SHIFT,
        generator=torch.Generator().manual_seed(0),
    )
    while not stage.finished:
        stage.step()
    run = RunFolder.create(folder / "run")
    weights = model.encoder.state_dict()
    about = (32, particles.pixel_size_in_angstroms, radius, 1, *noise, particles.optics, SHIFT, 0.0, 1.0)
    frame, group = FrameChange(torch.eye(3), mirrored=False, shift=torch.zeros(3)), PointGroup.named("C1")
    TrainedEncoder(architecture, "matched", weights, *about, frame, group).save(run.encoder_weights)
    run.write_map(run.map, gain * density, 3.5)
    run.write_json(run.summary, {})


@pytest.fixture(scope="module")
def predictor(practised):
    return PosePredictor.of_run(RunFolder.open(practised / "run"), n_iterations=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def refining(practised):
    return PosePredictor.of_run(RunFolder.open(practised / "run"), n_iterations=2, device=torch.device("cpu"))


def stack_in(folder):
    return ParticleStack.open(folder / "particles.star")


def rotation_errors(found, folder):
    return angular_distance_in_degrees(found.poses.rotations, read_poses(folder / "test" / "truth.star").rotations)


def test_most_poses_of_an_encoder_that_has_learnt_its_map_are_right_and_it_knows_which(practised, predictor):
    found = predictor.infer(stack_in(practised / "test"))
    right = rotation_errors(found, practised) < 10
    share = float(right.float().mean())
    assert share > 0.65
    sure = found.confidence > 0.9
    assert sure.float().mean() > 0.2
    assert right[sure].float().mean() > 0.9
    assert right[~sure].float().mean() < share
    assert float(found.confidence.mean()) == pytest.approx(share, abs=0.1)


def test_refinement_brings_them_within_a_degree_or_two_and_raises_confidence(practised, predictor, refining):
    coarse, fine = (p.infer(stack_in(practised / "test")) for p in (predictor, refining))
    errors = rotation_errors(fine, practised)
    assert errors.median() < 1.5
    assert errors.median() < 0.5 * rotation_errors(coarse, practised).median()
    truth = read_poses(practised / "test" / "truth.star").shifts_in_angstroms
    assert (fine.poses.shifts_in_angstroms - truth).norm(dim=1).median() < 1.0
    assert fine.confidence.mean() > coarse.confidence.mean()
    assert float(fine.confidence.mean()) == pytest.approx(float((errors < 10).float().mean()), abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize("particles", ["test", "noise", "dark"])
def test_refinement_hardly_ever_makes_a_pose_less_likely(practised, predictor, refining, particles):
    stack = stack_in(practised / particles)
    batch = next(predictor._stream(stack, Quarantine(stack, 0)))
    imaging = predictor.model.imaging

    def squared_distance(poses):
        residual = batch.coefficients[:, : imaging.n_coefficients] - imaging.predict(
            predictor.volume, poses, batch.optics
        )
        whitened = residual.abs().square() / predictor.trained.noise.variance[imaging.shells]
        return whitened[:, imaging.shells > 0].double().sum(1)

    start, end = predictor.place(batch).poses, refining.place(batch).poses
    assert angular_distance_in_degrees(start.rotations, end.rotations).median() > 0.1
    before, after = squared_distance(start), squared_distance(end)
    worse = after > before + 1e-5 * before
    # Other hypotheses may win once all are refined; of what does not belong some end lower.
    assert worse.float().mean() < 0.05
    assert (after < before).float().mean() > 0.8


@pytest.mark.parametrize("particles", ["noise", "dark"])
@pytest.mark.parametrize("which", ["predictor", "refining"])
def test_images_without_the_molecule_or_with_the_other_contrast_are_not_believed(
    practised, request, tmp_path, which, particles
):
    predictor = request.getfixturevalue(which)
    real = predictor.infer(stack_in(practised / "test")).confidence
    other = predictor.infer(stack_in(practised / particles)).confidence
    assert other.max() < 0.1
    assert (real > other.max()).float().mean() > 0.9
    line = infer_file(predictor, practised / particles / "particles.star", tmp_path / "out.star", data_dir=None)
    assert "0% with a confidence over 0.9 (few: are these particles of the run's molecule" in line
    assert "few" not in infer_file(
        predictor, practised / "test" / "particles.star", tmp_path / "out.star", data_dir=None
    )


@pytest.mark.parametrize(("name", "right"), [("C1", 0.25), ("D2", 1.0)])
def test_poses_of_a_symmetric_particle_are_right_up_to_its_symmetry_and_it_knows_that(
    practised, tmp_path, monkeypatch, name, right
):
    """On a map of D2, whose encoder knows nothing of it, so that the poses are those of the search."""
    monkeypatch.setattr("cryoai.inference._N_SYNTHETIC", 200)
    known, run = RunFolder(practised / "run"), RunFolder.create(tmp_path / "run")
    density = torch.from_numpy(read_map(known.map).density)
    run.write_map(run.map, 3 * symmetrized_map(density, PointGroup.named("D2")), 3.5)
    trained = TrainedEncoder.load(known.encoder_weights)
    dataclasses.replace(trained, group=PointGroup.named(name)).save(run.encoder_weights)
    predictor = PosePredictor.of_run(run, n_iterations=2, device=torch.device("cpu"))
    rehearsed, found = predictor._rehearse(200, seed=1)
    assert float(found.float().mean()) == pytest.approx(right, abs=0.1)
    sure = predictor.confidence(_features(rehearsed), rehearsed.fit)
    assert float(sure.mean()) == pytest.approx(right, abs=0.12)


def test_an_encoder_of_dark_protein_reads_images_of_dark_protein(practised, predictor):
    dark = dataclasses.replace(predictor, trained=dataclasses.replace(predictor.trained, contrast_sign=-1))
    bright = predictor.infer(stack_in(practised / "test"))
    found = dark.infer(stack_in(practised / "dark"))
    assert torch.equal(found.poses.rotations, bright.poses.rotations)
    assert torch.equal(found.confidence, bright.confidence)
