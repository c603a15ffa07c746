"""The other hand: map, poses, encoder and volume mirrored together, and back again to the byte."""

import json
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import safetensors.torch
import torch

from cryoai.alignment import FrameChange
from cryoai.encoder import EncoderArchitecture
from cryoai.evaluation import pose_errors
from cryoai.formats.mrc import read_map, write_map
from cryoai.fourier import FourierDisc, fourier_shell_correlation
from cryoai.hand import flip_hand
from cryoai.imaging import ImagingModel
from cryoai.inference import PosePredictor, TrainedEncoder
from cryoai.noise import NoiseSpectrum
from cryoai.particle_stack import ParticleStack
from cryoai.particles import ParticleBatch
from cryoai.pose_files import read_poses
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.reconstruction import ReconstructionSums, particle_mask
from cryoai.runs import FscColumns, RunFolder
from cryoai.symmetry.averaging import symmetrized_map
from cryoai.symmetry.groups import PointGroup, equivalent_poses
from cryoai.volumes import FourierNetVolume, VoxelVolume
from oracles import GaussianPhantom, make_optics, random_rotations
from stacks import OPTICS, files_in, particle_columns, plain_parse, refusal, write_images, write_star
from test_symmetry import symmetric_phantom

N, BOX, RADIUS, PIXEL = 400, 32, 8, 3.0
ARCHITECTURES = [("polar", "none"), ("polar", "half-turn"), ("convolutional", "none"), ("convolutional", "half-turn")]
AWKWARD = ["0.000000", "-0.000000", "180.000000", "-180.000000", "0.000001", "-0.000001", "179.999999", "-179.999999"]
AWKWARD += ["90.000000", "180", "-0", "0", "-180.0", "7", "-33.3", "0.0000000001", "100.00", "-180.00000000000"]


def contents(run):
    return {path.relative_to(run.path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def inverted(phantom):
    return GaussianPhantom(-phantom.centres, phantom.amplitudes, phantom.widths)


def mirrored(rotations):
    """Rotations that see of the mirrored particle what the given ones see of the particle."""
    return rotations * torch.tensor([-1.0, -1.0, 1.0])


def an_encoder(kind="polar", symmetrization="none"):
    """Random weights that do not say the same of every image."""
    architecture = EncoderArchitecture(kind, 4, 4, 10.0, symmetrization)
    disc = FourierDisc.of_box(BOX)
    network = architecture.build(disc, RADIUS)
    with torch.no_grad():
        for _ in range(20):
            network(disc.from_images(torch.randn(8, BOX, BOX)))
    return TrainedEncoder(
        architecture=architecture,
        input="plain",
        weights=network.state_dict(),
        n_pixels=BOX,
        pixel_size_in_angstroms=PIXEL,
        max_radius=RADIUS,
        contrast_sign=1,
        noise=NoiseSpectrum(torch.ones(RADIUS + 1)),
        residual_noise=NoiseSpectrum(torch.ones(RADIUS + 1)),
        optics=make_optics(5),
        shift_std_in_angstroms=2.0,
        fit_centre=0.0,
        fit_spread=1.0,
        frame=FrameChange(random_rotations(1, seed=9)[0].float(), mirrored=False, shift=torch.tensor([4.0, -7.0, 5.0])),
        group=PointGroup.named("C1"),
    )


def save_volume(path, volume):
    safetensors.torch.save_file({name: value.contiguous() for name, value in volume.state_dict().items()}, path)


def reconstructed(images, poses):
    """The map of images without a CTF, in closed form."""
    disc = FourierDisc.of_box(BOX)
    imaging = ImagingModel(disc, PIXEL, disc.max_radius)
    # Amplitude contrast alone at no defocus: a CTF of 1.
    optics = make_optics(
        len(poses),
        amplitude_contrast=1.0,
        spherical_aberration_in_mm=0.0,
        defocus_u_in_angstroms=0.0,
        defocus_v_in_angstroms=0.0,
    )
    sums = ReconstructionSums.empty(BOX, disc.max_radius)
    batch = ParticleBatch(torch.arange(len(poses)), disc.from_images(images), optics)
    sums.add(batch, poses, imaging, torch.ones(imaging.n_coefficients))
    return sums.solve(torch.full((disc.max_radius + 1,), 1e-3))


@pytest.fixture
def run(phantom, tmp_path):
    """A run whose map is the reconstruction from noise-free images at its poses."""
    folder = RunFolder.create(tmp_path / "run")
    rotations, shifts = random_rotations(N), 2 * torch.randn(N, 2)
    images = torch.stack(
        [phantom.projection(BOX, r, -t / PIXEL) for r, t in zip(rotations, shifts.double(), strict=True)]
    ).float()
    # A trace of noise, because images are normalised by their noise.
    images = images + 0.01 * images.std() * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    write_images(tmp_path / "images.mrcs", images, PIXEL)
    stack = ParticleStack.open(write_star(tmp_path / "p.star", particle_columns(N)))
    poses = Poses(rotations.float(), shifts)
    density = reconstructed(images, poses)
    folder.write_map(folder.map, density, PIXEL)
    for path in folder.half_maps:
        folder.write_map(path, density + torch.randn_like(density), PIXEL)
    folder.write_map(folder.mask, torch.rand(BOX, BOX, BOX), PIXEL)
    folder.write_map(folder.sharpened_map, density - 0.5 * torch.roll(density, 1, 2), PIXEL)
    folder.write_map(folder.local_resolution, 7 + torch.rand(BOX, BOX, BOX), PIXEL)
    folder.write_fsc(FscColumns(torch.linspace(1, 0, BOX // 2 + 1)), PIXEL)
    subset = {"rlnRandomSubset": np.arange(N) % 2 + 1}
    stack.write(folder.particles, poses, subset)
    stack.write(folder.encoder_particles, Poses(random_rotations(N, 1).float(), shifts), subset)
    an_encoder().save(folder.encoder_weights)
    save_volume(folder.volume_weights, FourierNetVolume(BOX, width=16))
    folder.write_json(folder.summary, {"n_particles": N, "seconds": 1.25, "contrast": {"sign": 1}})
    folder.write_json(folder.evaluation, {"poses": {"mirrored": False}, "encoder_poses": {"mirrored": True}})
    folder.write_text(folder.log, "what was said\n")
    shutil.copy(folder.particles, folder.path / "input_particles.star")
    return folder


# ------------------------------------------------------------------------------ there and back


def test_two_flips_give_every_file_its_bytes_back_and_one_changes_all_that_know_a_hand(run):
    before = contents(run)
    first = flip_hand(run)
    between = contents(run)
    second = flip_hand(run)
    assert contents(run) == before
    assert between.keys() == before.keys()
    changed = {str(name) for name in before if before[name] != between[name]}
    knows_no_hand = {"command.txt", "log.txt", "fsc.csv", "input_particles.star"}
    assert changed == set(files_in(run.path)) - knows_no_hand
    assert set(first.files) == set(second.files) == changed
    assert (first.flipped, second.flipped) == (True, False)
    assert not first.finished_an_earlier_one
    assert "now has the other hand" in str(first)
    assert "now has the hand that it came out with" in str(second)


def write_angles(path, angles):
    """A STAR file with these angles as psi, and in reverse order as rot."""
    n = len(angles)
    tilt = [["0.000000", "180.000000", "-0.000000", "77.1"][i % 4] for i in range(n)]
    columns = {"rlnAngleRot": angles[::-1], "rlnAngleTilt": tilt, "rlnAnglePsi": angles}
    return write_star(path, particle_columns(n) | columns)


def test_awkward_and_random_angles_come_back_as_they_were_written(run):
    random = np.random.default_rng(0)
    digits = random.integers(0, 13, 3000)
    angles = AWKWARD + [f"{a:.{d}f}" for a, d in zip(random.uniform(-180, 180, 3000), digits, strict=True)]
    angles += [f"{a:.6f}" for a in random.integers(-4, 5, 200) * 45.0]
    write_angles(run.particles, angles)
    before = contents(run)
    given = plain_parse(run.particles)["particles"]
    flip_hand(run)
    between = plain_parse(run.particles)["particles"]
    found = between.pop("rlnAnglePsi")
    assert given.pop("rlnAnglePsi") == angles
    assert between == given
    turn = np.array(found, dtype=float) - np.array(angles, dtype=float)
    np.testing.assert_allclose(np.abs(turn), 180, atol=1e-9)
    assert all(abs(float(angle)) <= 180 for angle in found)
    assert [len(angle.partition(".")[2]) for angle in found] == [len(a.partition(".")[2]) for a in angles]
    flip_hand(run)
    assert contents(run) == before


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_whatever_else_stands_in_a_star_file_stays_where_it_is(run, newline):
    text = (
        "# a remark\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n_rlnVoltage #3\n"
        "_rlnSphericalAberration #4\n_rlnAmplitudeContrast #5\n_rlnImagePixelSize #6\n"
        "1 'a group' 300 2.7 0.1 3.0\n\ndata_particles\n\nloop_\n_rlnAnglePsi #1\n_rlnImageName #2\n"
        "_rlnAngleRot #3\n_rlnAngleTilt #4\n_rlnOpticsGroup #5\n_rlnDefocusU #6\n_rlnDefocusV #7\n"
        "_rlnDefocusAngle #8\n_rlnMicrographName #9\n"
        "  10.5\t1@s.mrcs   10.5 20.25 1 10.5 10.5  10.5 'a name with 10.5'  # 10.5\n"
        '10.5 2@s.mrcs -0.0 10.5 1 10.5 10.5 10.5 "10.5" \n\ndata_other\n\nloop_\n_rlnAnglePsi #1\n10.5\n'
    ).replace("\n", newline)
    run.particles.write_bytes(b"\xef\xbb\xbf" + text.encode())
    before = contents(run)
    flip_hand(run)
    expected = text.replace("  10.5\t1@s.mrcs   10.5 ", "  -169.5\t1@s.mrcs   10.5 ")
    expected = expected.replace("10.5 2@s.mrcs -0.0 ", "-169.5 2@s.mrcs -0.0 ")
    assert run.particles.read_bytes() == b"\xef\xbb\xbf" + expected.encode()
    flip_hand(run)
    assert contents(run) == before


@pytest.mark.parametrize(("kind", "symmetrization"), ARCHITECTURES)
@pytest.mark.parametrize("voxels", [False, True])
def test_networks_of_every_kind_come_back(run, kind, symmetrization, voxels):
    trained = an_encoder(kind, symmetrization)
    for weight in trained.weights.values():
        # Zeros of both signs, and what is no number.
        if weight.dtype == torch.float32 and weight.numel() > 3:
            weight.view(-1)[:3] = torch.tensor([0.0, -0.0, torch.nan])
    trained.save(run.encoder_weights)
    volume = VoxelVolume(torch.randn(BOX, BOX, BOX)) if voxels else FourierNetVolume(BOX, width=16)
    save_volume(run.volume_weights, volume)
    before = contents(run)
    flip_hand(run)
    for name in (run.encoder_weights.name, run.volume_weights.name):
        assert contents(run)[Path(name)] != before[Path(name)]
        assert len(contents(run)[Path(name)]) == len(before[Path(name)])
    flip_hand(run)
    assert contents(run) == before


@pytest.mark.parametrize("n", [24, 25])
@pytest.mark.parametrize("mode", [np.float32, np.int16, np.float16])
def test_a_map_keeps_its_header_and_its_voxels(run, n, mode):
    values = np.random.default_rng(0).normal(scale=100, size=(n, n, n)).astype(mode)
    with mrcfile.new(run.map, overwrite=True) as file:
        file.set_data(values)
        file.set_volume()
        file.voxel_size = PIXEL
        file.set_extended_header(np.arange(100, dtype=np.uint8).view("V100"))
        file.add_label("kept")
        file.header.origin.x = 12.5
    before = run.map.read_bytes()
    flip_hand(run)
    after = run.map.read_bytes()
    assert after[: 1024 + 100] == before[: 1024 + 100]
    with mrcfile.open(run.map) as file:
        found = np.array(file.data)
    # Of an even box the first planes stay where they are.
    assert np.array_equal(found, np.roll(values[::-1, ::-1, ::-1], 1 - n % 2, axis=(0, 1, 2)))
    flip_hand(run)
    assert run.map.read_bytes() == before


def test_a_summary_says_whether_the_hand_is_flipped(run):
    before = run.summary.read_bytes()
    flip_hand(run)
    said = json.loads(run.summary.read_text())
    assert said == json.loads(before) | {"hand_flipped": True}
    run.write_json(run.summary, {"n_particles": N, "hand_flipped": False, "seconds": 1})
    written = run.summary.read_bytes()
    assert flip_hand(run).flipped
    assert json.loads(run.summary.read_text())["hand_flipped"] is True
    assert not flip_hand(run).flipped
    assert run.summary.read_bytes() == written


# ------------------------------------------------------------------------------ what a flip means


@pytest.mark.parametrize("n", [24, 25])
def test_the_maps_become_those_of_the_mirrored_particle(phantom, run, n):
    paths = (run.map, *run.half_maps, run.mask, run.sharpened_map, run.local_resolution)
    for factor, path in enumerate(paths, 1):
        write_map(path, factor * phantom.density(n).float().numpy(), PIXEL)
    flip_hand(run)
    for factor, path in enumerate(paths, 1):
        expected = factor * inverted(phantom).density(n)
        found = torch.from_numpy(read_map(path).density)
        # Nothing of the particle is on the first plane, which has no partner.
        assert (found - expected).abs().max() < 1e-4 * expected.max()


def test_the_mirrored_particle_seen_from_the_new_poses_makes_the_same_images(phantom, run):
    before = read_poses(run.particles)
    flip_hand(run)
    after = read_poses(run.particles)
    assert torch.equal(after.shifts_in_angstroms, before.shifts_in_angstroms)
    other = inverted(phantom)
    for i in range(10):
        image = phantom.projection(BOX, before.rotations[i], -before.shifts_in_angstroms[i] / PIXEL)
        again = other.projection(BOX, after.rotations[i], -after.shifts_in_angstroms[i] / PIXEL)
        assert (again - image).abs().max() < 1e-5 * image.max()
        # The old poses do not.
        wrong = other.projection(BOX, before.rotations[i], -before.shifts_in_angstroms[i] / PIXEL)
        assert (wrong - image).abs().max() > 0.1 * image.max()


@pytest.mark.parametrize("name", ["C2", "C3", "C5", "D2", "D3", "D7", "T", "O", "I"])
def test_a_symmetric_particle_has_the_same_group_with_the_same_axes(phantom, run, name):
    group, box = PointGroup.named(name), 24
    particle = symmetric_phantom(phantom, group)
    for path in (run.map, *run.half_maps, run.mask):
        write_map(path, particle.density(box).float().numpy(), PIXEL)
    before = read_poses(run.particles)
    flip_hand(run)
    for path in (run.map, *run.half_maps, run.mask):
        found = torch.from_numpy(read_map(path).density)
        assert (symmetrized_map(found, group) - found).norm() < 0.015 * found.norm()
    after = equivalent_poses(read_poses(run.particles)[:2], group)
    other, k = inverted(particle), FourierDisc.of_box(box).coordinates
    for i in range(2):
        shift = -before.shifts_in_angstroms[i] / PIXEL
        image = particle.image_coefficients(k, box, before.rotations[i], shift)
        for rotation in after.rotations[i]:
            again = other.image_coefficients(k, box, rotation, shift)
            assert (again - image).abs().max() < 1e-4 * image.abs().max()


def test_reconstruction_from_the_new_poses_gives_the_new_map(run):
    images = ParticleStack.open(run.path.parent / "p.star").images(torch.arange(N))
    old = torch.from_numpy(read_map(run.map).density)
    flip_hand(run)
    new = torch.from_numpy(read_map(run.map).density)
    again = reconstructed(images, read_poses(run.particles))
    mask = particle_mask(BOX)
    assert fourier_shell_correlation(again * mask, new * mask)[1:].min() > 0.99
    assert fourier_shell_correlation(again * mask, old * mask)[3:10].mean() < 0.9


def test_poses_differ_from_the_truth_by_the_other_hand_and_by_nothing_else(run):
    truth = Poses(random_rotations(N).float(), read_poses(run.particles).shifts_in_angstroms)
    flip_hand(run)
    errors = pose_errors(read_poses(run.particles), truth)
    assert errors.mirrored
    assert errors.median_rotation_error_in_degrees < 0.1
    assert json.loads(run.evaluation.read_text()) == {"poses": {"mirrored": True}, "encoder_poses": {"mirrored": False}}


@pytest.mark.parametrize(("kind", "symmetrization"), ARCHITECTURES)
def test_the_encoder_says_the_mirrored_pose_of_every_image(run, kind, symmetrization):
    an_encoder(kind, symmetrization).save(run.encoder_weights)
    disc = FourierDisc.of_box(BOX)
    coefficients = disc.from_images(torch.randn(20, BOX, BOX))
    with torch.no_grad():
        before = TrainedEncoder.load(run.encoder_weights).build(disc)(coefficients)
        flip_hand(run)
        after = TrainedEncoder.load(run.encoder_weights).build(disc)(coefficients)
    torch.testing.assert_close(after.poses.rotations, mirrored(before.poses.rotations), atol=1e-6, rtol=0)
    assert torch.equal(after.poses.shifts_in_angstroms, before.poses.shifts_in_angstroms)
    assert torch.equal(after.log_probabilities, before.log_probabilities)
    assert angular_distance_in_degrees(before.poses.rotations, before.poses.rotations[:1]).max() > 1


@pytest.mark.parametrize("n_iterations", [0, 5])
def test_new_particles_are_posed_on_the_new_map_as_they_were_on_the_old_one(run, tmp_path, monkeypatch, n_iterations):
    monkeypatch.setattr("cryoai.inference._N_SYNTHETIC", 100)
    images = ParticleStack.open(run.path.parent / "p.star").images(torch.arange(60))
    deviation = 0.5 * float(images.std())
    write_images(tmp_path / "noisy.mrcs", images + deviation * torch.randn(images.shape), PIXEL)
    # Amplitude contrast alone at no defocus: a CTF of 1.
    optics = OPTICS | {"rlnAmplitudeContrast": [1.0], "rlnSphericalAberration": [0.0]}
    columns = particle_columns(60, "noisy.mrcs") | {"rlnDefocusU": [0.0] * 60, "rlnDefocusV": [0.0] * 60}
    stack = ParticleStack.open(write_star(tmp_path / "noisy.star", columns, optics))
    # The first planes of an even box, which have no partner, are empty.
    run.write_map(run.map, torch.from_numpy(read_map(run.map).density) / deviation * particle_mask(BOX), PIXEL)

    def infer():
        predictor = PosePredictor.of_run(run, n_iterations=n_iterations, device=torch.device("cpu"))
        return predictor.infer(stack).poses

    before = infer()
    flip_hand(run)
    after = infer()
    distance = angular_distance_in_degrees(after.rotations, mirrored(before.rotations))
    assert (distance < 0.1).float().mean() > 0.9
    assert (distance < 0.5).float().mean() > 0.97
    assert (after.shifts_in_angstroms - before.shifts_in_angstroms).norm(dim=1).median() < 0.05


@torch.no_grad()
def test_the_volume_becomes_its_mirror_image(phantom, run):
    points = 0.5 * (torch.rand(1000, 3) - 0.5)
    points[:200, 0] = 0
    for volume in (FourierNetVolume(BOX, width=16), VoxelVolume(phantom.density(BOX).float())):
        expected = volume(-points)
        save_volume(run.volume_weights, volume)
        flip_hand(run)
        volume.load_state_dict(safetensors.torch.load_file(run.volume_weights))
        torch.testing.assert_close(volume(points), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


# ------------------------------------------------------------------------------ all or nothing


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = {
    "a map that was cut short": ("map.mrc", cut_short, "cut short"),
    "a half map that is none": ("half_map_2.mrc", lambda p: p.write_bytes(b"x" * 5000), "not a readable MRC"),
    "no particles": ("particles.star", lambda p: p.unlink(), "no such file"),
    "no map": ("map.mrc", lambda p: p.unlink(), "no such file"),
    "psi beyond 180": ("particles.star", lambda p: write_angles(p, ["5", "-180.01", "5"]), "row 2 is '-180.01'"),
    "psi in another notation": ("encoder_particles.star", lambda p: write_angles(p, ["1e1"]), "row 1 is '1e1'"),
    "psi with a needless zero": ("particles.star", lambda p: write_angles(p, ["007"]), "row 1 is '007'"),
    "no psi": ("particles.star", lambda p: write_star(p, particle_columns(3), OPTICS), "rlnAnglePsi"),
    "an encoder that is none": ("encoder.safetensors", lambda p: p.write_bytes(b"garbage" * 99), "safetensors"),
    "an encoder that was cut short": ("encoder.safetensors", cut_short, "safetensors"),
    "a volume in the encoder's place": (
        "encoder.safetensors",
        lambda p: shutil.copy(p.parent / "volume.safetensors", p),
        "not an encoder",
    ),
    "an encoder in the volume's place": (
        "volume.safetensors",
        lambda p: shutil.copy(p.parent / "encoder.safetensors", p),
        "not a volume",
    ),
    "a summary that is no JSON": ("summary.json", lambda p: p.write_text("{"), "JSON"),
    "an evaluation without fields": ("evaluation.json", lambda p: p.write_text("[]"), "no fields"),
}


@pytest.mark.parametrize(("name", "spoil", "named"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_flipped_leaves_all_others_as_they_were(run, name, spoil, named):
    spoil(run.path / name)
    before = contents(run)
    message = refusal(flip_hand, run)
    assert str(run.path / name) in message
    assert named in message
    assert contents(run) == before
    assert not [path for path in run.path.iterdir() if path.is_dir()]


def test_a_full_disk_leaves_all_files_as_they_were(run, monkeypatch):
    before = contents(run)
    write = Path.write_bytes

    def write_some(path, content):
        if "encoder" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_some)
    with pytest.raises(OSError, match="No space left"):
        flip_hand(run)
    assert contents(run) == before
    assert not [path for path in run.path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("n_moved", [0, 1, 5])
def test_a_flip_that_was_cut_short_while_files_were_moved_is_finished_by_the_next(run, tmp_path, monkeypatch, n_moved):
    before = contents(run)
    shutil.copytree(run.path, tmp_path / "whole")
    whole = RunFolder(tmp_path / "whole")
    flip_hand(whole)
    moved = []
    replace = Path.replace

    def replace_some(path, target):
        if path.is_file():
            if len(moved) == n_moved:
                raise KeyboardInterrupt
            moved.append(target)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            flip_hand(run)
    assert len(moved) == n_moved
    finished = flip_hand(run)
    assert finished.finished_an_earlier_one
    assert finished.flipped
    assert "finished now" in str(finished)
    assert contents(run) == contents(whole)
    flip_hand(run)
    assert contents(run) == before


def test_what_an_earlier_attempt_left_behind_is_not_used(run):
    before = contents(run)
    (run.path / ".hand-unfinished").mkdir()
    (run.path / ".hand-unfinished" / "map.mrc").write_bytes(b"half of a map")
    flip_hand(run)
    flip_hand(run)
    assert contents(run) == before


def test_a_run_without_an_encoder_or_of_an_earlier_version_is_flipped_as_well(run):
    networks = (run.encoder_weights, run.encoder_particles, run.volume_weights, run.evaluation)
    for path in (*networks, run.sharpened_map, run.local_resolution):
        path.unlink()
    before = contents(run)
    done = flip_hand(run)
    expected = ("half_map_1.mrc", "half_map_2.mrc", "map.mrc", "mask.mrc", "particles.star", "summary.json")
    assert done.files == expected
    flip_hand(run)
    assert contents(run) == before
