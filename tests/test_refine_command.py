"""cryoai refine: poses that came with the particles, made better, and what is refused."""

import json
import math

import numpy as np
import pytest
import roma
import torch

from cryoai.bootstrap import BootstrapSchedule, Reference, held_out_poses
from cryoai.cli import main
from cryoai.formats.cryosparc import write_cryosparc
from cryoai.formats.mrc import MrcMap, read_map, write_map
from cryoai.fourier import fourier_shell_correlation, soft_sphere
from cryoai.half_maps import HalfMaps
from cryoai.imaging import ImagingModel
from cryoai.particle_stack import ParticleStack
from cryoai.particles import prepare_particles
from cryoai.pose_files import read_poses
from cryoai.poses import Poses, angular_distance_in_degrees, rotation_grid, rotations_to_euler_angles
from cryoai.simulation import protein_like_phantom, resample_map, simulate
from cryoai.symmetry.averaging import symmetrized_map
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
from cryoai.training import refining
from cryoai.training.refining import refine
from cryoai.training.settings import RefineSettings
from cryoai.training.stages import trial_poses
from cryoai.training.stages.base import half_sets_at
from cryoai.volumes import SampledVolume
from stacks import files_in, plain_parse, refusal, write_star

pytestmark = pytest.mark.slow

N, BOX, PIXEL = 300, 32, 7.0
WRONG_ROWS = torch.arange(N) % 10 == 0
# With a symmetry none is looked for.
QUICK = {"device": "cpu", "max_rounds": 1, "n_iterations": 1, "symmetry": "C2"}


def made(source, folder, n, **options):
    folder.mkdir()
    return simulate(
        source,
        folder,
        n_particles=n,
        n_pixels=options.pop("n_pixels", BOX),
        pixel_size_in_angstroms=PIXEL,
        snr=options.pop("snr", 0.5),
        seed=options.pop("seed", 0),
        shift_standard_deviation_in_angstroms=5.0,
        **options,
    )


def off_by(poses, degrees, seed=0):
    """Poses turned by so much about random axes, and moved by 3 Å."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(len(poses), 3, generator=generator)
    turns = roma.rotvec_to_rotmat(axes / axes.norm(dim=1, keepdim=True) * math.radians(degrees))
    moved = 3 * torch.randn(len(poses), 2, generator=generator)
    return Poses(turns @ poses.rotations, poses.shifts_in_angstroms + moved)


def rows_of(poses, index):
    return Poses(poses.rotations[index], poses.shifts_in_angstroms[index])


def with_poses(simulated, name, poses, **columns):
    """A STAR file beside the particles with these poses, and these columns."""
    tables = plain_parse(simulated.particles)
    angles = rotations_to_euler_angles(poses.rotations).T.tolist()
    tables["particles"] |= dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles, strict=True))
    shifts = poses.shifts_in_angstroms.T.tolist()
    tables["particles"] |= dict(zip(("rlnOriginXAngst", "rlnOriginYAngst"), shifts, strict=True))
    return write_star(simulated.particles.parent / name, tables["particles"] | columns, tables["optics"])


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    torch.set_num_threads(1)
    return made(protein_like_phantom(0), tmp_path_factory.mktemp("particles") / "first", N)


@pytest.fixture(scope="module")
def truth(simulated):
    return read_poses(simulated.truth)


@pytest.fixture(scope="module")
def given(simulated, truth):
    """Poses that are 6° off, and some of other images; with half sets."""
    half = [str(1 + (row % 3 == 0)) for row in range(N)]
    mixed = torch.where(WRONG_ROWS, (torch.arange(N) + 10) % N, torch.arange(N))
    return with_poses(simulated, "given.star", rows_of(off_by(truth, 6.0), mixed), rlnRandomSubset=half)


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "run"
    return main(["refine", str(given), str(run), "--device", "cpu"]), run


# ------------------------------------------------------------------------------ what comes out


def test_poses_that_are_some_degrees_off_end_near_the_truth_and_in_its_frame(finished, truth):
    status, run = finished
    assert status == 0
    found = read_poses(run / "particles.star")
    errors = angular_distance_in_degrees(found.rotations, truth.rotations)
    assert errors[~WRONG_ROWS].median() < 2.5
    assert (errors[~WRONG_ROWS] < 6.0).float().mean() > 0.95
    assert float((found.shifts_in_angstroms - truth.shifts_in_angstroms).norm(dim=1).median()) < 1.5


def test_the_map_is_the_true_one(finished, simulated):
    ours, mask, theirs = (
        torch.from_numpy(read_map(path).density)
        for path in (finished[1] / "map.mrc", finished[1] / "mask.mrc", simulated.true_map)
    )
    # Nothing is aligned: the poses say where the map is.
    assert fourier_shell_correlation(ours * mask, theirs * mask)[1:12].min() > 0.8


def test_the_run_folder_is_that_of_a_run_without_an_encoder(finished):
    assert files_in(finished[1]) == [
        "command.txt",
        "fsc.csv",
        "half_map_1.mrc",
        "half_map_2.mrc",
        "input_particles.star",
        "local_resolution.mrc",
        "log.txt",
        "map.mrc",
        "map_sharpened.mrc",
        "mask.mrc",
        "metrics.jsonl",
        "particles.star",
        "settings.toml",
        "summary.json",
        "tensorboard",
        *(["validation.png"] if (finished[1] / "validation.png").exists() else []),
    ]


def test_the_summary_says_where_poses_and_half_sets_came_from(finished, given):
    summary = json.loads((finished[1] / "summary.json").read_text())
    assert summary["given_poses"] == {"file": str(given), "half_sets": "file"}
    assert summary["verdict"] == {"status": "solved", "reasons": []}
    assert summary["start_agreement"] is None
    assert summary["pose_sources"]["given"] == N
    assert summary["pose_sources"]["from_encoder"] == summary["pose_sources"]["from_search"] == 0
    assert summary["pose_sources"]["moved_by_refinement"] > 0.8 * N
    assert 0.85 < summary["controls"]["better_than_noise"] < 0.97


def test_half_sets_of_the_file_stay_and_every_other_cell_too(finished, given):
    before, after = (plain_parse(path)["particles"] for path in (given, finished[1] / "particles.star"))
    assert after["rlnRandomSubset"] == before["rlnRandomSubset"]
    for column in set(before) - {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"}:
        assert after[column] == before[column]
    assert "half sets  those of the file" in (finished[1] / "log.txt").read_text()


def test_confidences_tell_particles_whose_given_pose_was_wrong(finished):
    cells = plain_parse(finished[1] / "particles.star")["particles"]["rlnParticleFigureOfMerit"]
    confidence = torch.tensor([float(cell) for cell in cells])
    assert confidence[~WRONG_ROWS].median() > 0.9
    assert confidence[WRONG_ROWS].max() < 0.5
    assert confidence[WRONG_ROWS].median() < 0.05


# ------------------------------------------------------------------------------ half sets


def test_the_order_of_the_rows_changes_nothing_and_half_sets_are_drawn_for_the_images(simulated, truth, tmp_path):
    tables = plain_parse(with_poses(simulated, "some.star", truth))
    order = np.random.default_rng(0).permutation(60)
    found = []
    for name, index in (("sorted", np.arange(60)), ("mixed", order)):
        rows = {column: [cells[i] for i in index] for column, cells in tables["particles"].items()}
        star = write_star(simulated.particles.parent / f"{name}.star", rows, tables["optics"])
        found.append(refine(ParticleStack.open(star), tmp_path / name, RefineSettings(**QUICK)))
    first, again = found
    assert torch.equal(first.map, again.map)
    assert torch.equal(first.poses.rotations[order], again.poses.rotations)
    halves = [plain_parse(result.run.particles)["particles"]["rlnRandomSubset"] for result in found]
    assert halves[0].count("1") == halves[0].count("2") == 30
    assert [halves[0][i] for i in order] == halves[1]
    assert first.given_poses.half_sets == "new"
    assert "half sets  drawn anew: " in first.run.log.read_text()
    # A molecule without the symmetry that was asked for.
    assert first.verdict.status != "solved"
    assert any(reason.startswith("before C2 was imposed, only ") for reason in first.verdict.reasons)


UNUSABLE = {
    "none": ({}, "no half sets (rlnRandomSubset); give --half-sets new"),
    "a third": (
        {"rlnRandomSubset": ["1", "2", "3"] * (N // 3)},
        "rlnRandomSubset of particle row 3 is neither 1 nor 2; mend it, or give --half-sets new",
    ),
    "a word": (
        {"rlnRandomSubset": ["1", "2"] * (N // 2 - 1) + ["1", "odd"]},
        f"rlnRandomSubset of particle row {N} is neither 1 nor 2",
    ),
    "one half": (
        {"rlnRandomSubset": ["2"] * N},
        f"rlnRandomSubset is 1 for 0 of {N} particles; 10% of them at least are needed in each half",
    ),
    "nearly one half": ({"rlnRandomSubset": ["2"] * 29 + ["1"] * (N - 29)}, f"rlnRandomSubset is 2 for 29 of {N} part"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_half_sets_that_are_asked_for_have_to_be_usable(case, simulated, truth, tmp_path, complaint):
    columns, message = UNUSABLE[case]
    star = with_poses(simulated, "unusable.star", truth, **columns)
    said = complaint("refine", star, tmp_path / "run", "--half-sets", "file")
    assert said.startswith(f"{star}: {message}")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("case", UNUSABLE)
def test_unless_asked_for_unusable_half_sets_are_left_aside(case, simulated, truth):
    columns, message = UNUSABLE[case]
    star = with_poses(simulated, "unusable.star", truth, **columns)
    half_set, why = refining._half_set_of_file(ParticleStack.open(star), RefineSettings())
    assert half_set is None
    assert why == f"drawn anew: {star}: {message.split(';')[0]}" or message in why


def test_usable_half_sets_are_taken_unless_new_ones_are_asked_for(given):
    stack = ParticleStack.open(given)
    cells = plain_parse(given)["particles"]["rlnRandomSubset"]
    for asked in (None, "file"):
        half_set, _ = refining._half_set_of_file(stack, RefineSettings(half_sets=asked))
        assert half_set.tolist() == [int(cell) - 1 for cell in cells]
    assert refining._half_set_of_file(stack, RefineSettings(half_sets="new"))[0] is None


# ------------------------------------------------------------------------------ poses of other images


@pytest.fixture(scope="module")
def prepared(simulated, tmp_path_factory):
    return prepare_particles(ParticleStack.open(simulated.particles), BOX, tmp_path_factory.mktemp("p") / "p", sign=1)


def advantage(prepared, poses, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half_set = torch.randperm(len(poses), generator=generator) % 2
    sets = half_sets_at(poses, prepared, half_set)
    half_maps = HalfMaps.of(sets, prepared.pixel_size_in_angstroms)
    return refining._advantage_of_own_poses(prepared, poses, half_set, sets, half_maps, generator)


@pytest.mark.parametrize("degrees", [0.0, 10.0, 20.0])
def test_images_prefer_their_own_poses_even_if_these_are_off(prepared, truth, degrees):
    assert advantage(prepared, off_by(truth, degrees)) > 2.5 * refining._LEAST_Z_SCORE


def test_images_do_not_care_which_of_other_images_poses_they_have(prepared, truth):
    found = []
    for seed in range(12):
        interchanged = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        found.append(advantage(prepared, rows_of(truth, interchanged), seed))
    # A standard normal deviate; of twelve the mean has a deviation of 0.29.
    assert abs(np.mean(found)) < 1.0
    assert 0.3 < np.std(found) < 2.0
    assert max(found) < refining._LEAST_Z_SCORE


WRONG = {
    "rows shuffled": lambda truth: rows_of(truth, torch.randperm(N)),
    "a row too late": lambda truth: rows_of(truth, torch.arange(N).roll(1)),
    "with right shifts only": lambda truth: Poses(
        rotation_grid(len(truth))[torch.randperm(N)], truth.shifts_in_angstroms
    ),
    "all the same": lambda truth: rows_of(truth, torch.zeros(N, dtype=torch.long)),
}


@pytest.mark.parametrize("case", WRONG)
def test_poses_of_other_images_are_refused_and_leave_nothing(case, simulated, truth, tmp_path, complaint):
    star = with_poses(simulated, "wrong.star", WRONG[case](truth))
    said = complaint("refine", star, tmp_path / "run")
    assert said.startswith(f"{star}: its poses do not fit its images, which agree with the half maps made at them no ")
    assert "give the file that the poses of these very images are in" in said
    assert files_in(tmp_path) == []


def test_noise_that_was_posed_to_look_like_a_molecule_is_not_called_solved(tmp_path):
    """Half maps of such images agree, because all were fitted to one map: "Einstein from noise"."""
    noise = made(protein_like_phantom(0), tmp_path / "noise", N, snr=1e-9)
    stack = ParticleStack.open(noise.particles)
    particles = prepare_particles(stack, BOX, tmp_path / "scratch", sign=1)
    density, rows = torch.from_numpy(read_map(noise.true_map).density), torch.arange(N)
    spectrum, shown = particles.power(rows, 10), ImagingModel(particles.disc, PIXEL, 10)
    volume = SampledVolume.from_map(density, 10)
    power = shown.predict(volume, Poses(rotation_grid(50), torch.zeros(50, 2)), particles.optics[:50]).abs().square()
    reference = Reference(density / power.mean().sqrt(), 10, spectrum)
    found = held_out_poses(particles, rows, reference, trial_poses(particles, BootstrapSchedule(), 2304)).poses[:, 0]
    star = with_poses(noise, "posed.star", found)
    result = refine(ParticleStack.open(star), tmp_path / "run", RefineSettings(device="cpu", contrast="bright"))
    assert result.half_maps.n_resolved_shells > 2
    assert result.verdict.status == "failed"
    assert "better than 95 % of images of pure noise" in result.verdict.reasons[0]


# ------------------------------------------------------------------------------ mask and symmetry


def test_a_mask_of_the_images_box_is_that_of_the_working_box_resampled(tmp_path):
    noise = made(protein_like_phantom(0), tmp_path / "images", 20, n_pixels=64)
    stack = ParticleStack.open(noise.particles)
    # Smooth enough for both grids, so that the sphere of the small box is what comes out.
    large, small = soft_sphere(64, 12.0, 12.0), soft_sphere(32, 6.0, 6.0)
    write_map(tmp_path / "large.mrc", large.numpy(), PIXEL)
    write_map(tmp_path / "small.mrc", small.numpy(), 2 * PIXEL)
    torch.testing.assert_close(refining._read_mask(tmp_path / "large.mrc", stack, 64), large)
    torch.testing.assert_close(refining._read_mask(tmp_path / "small.mrc", stack, 32), small)
    resampled = refining._read_mask(tmp_path / "large.mrc", stack, 32)
    torch.testing.assert_close(resampled, small, atol=5e-3, rtol=0)
    assert 0 <= float(resampled.min()) <= float(resampled.max()) <= 1


@pytest.fixture(scope="module")
def dimer(tmp_path_factory):
    """Particles with a 2-fold axis along z, two of them without a usable image; a mask; and their refinement."""
    torch.set_num_threads(1)
    folder, group, n = tmp_path_factory.mktemp("dimer"), PointGroup.named("C2"), 150
    source = resample_map(protein_like_phantom(0), 48, PIXEL * BOX / 48)
    density = symmetrized_map(torch.from_numpy(source.density), group).numpy()
    simulated = made(MrcMap(density, source.pixel_size_in_angstroms), folder / "particles", n, snr=0.2)
    # Each at one of the two poses that it cannot tell apart.
    true = read_poses(simulated.truth)
    turned = group.operators[torch.randint(2, (n,))] @ true.rotations
    star = with_poses(simulated, "given.star", off_by(Poses(turned, true.shifts_in_angstroms), 5.0))
    np.memmap(simulated.particles.with_suffix(".mrcs"), np.float32, "r+", offset=1024, shape=(n, BOX, BOX))[[3, 40]] = 0
    mask = soft_sphere(BOX, 9.0, 4.0)
    write_map(folder / "mask.mrc", mask.numpy(), PIXEL)
    settings = RefineSettings(device="cpu", symmetry="c2", mask=folder / "mask.mrc", max_rounds=3)
    return refine(ParticleStack.open(star), folder / "run", settings), star, true, mask


def test_symmetry_is_imposed_where_relion_has_its_axes(dimer):
    result, _, true, _ = dimer
    group = PointGroup.named("C2")
    error = symmetric_distance_in_degrees(result.poses.rotations, true.rotations, group)
    assert error.median() < 3.5
    for density in (result.half_maps.first, result.half_maps.second, result.map):
        assert fourier_shell_correlation(density, symmetrized_map(density, group))[1:12].min() > 0.98
    assert not any("was imposed" in reason for reason in result.verdict.reasons)
    assert "of the signal obeys C2" in result.run.log.read_text()


def test_half_maps_are_compared_in_the_mask_that_is_given(dimer):
    result, _, _, mask = dimer
    torch.testing.assert_close(result.half_maps.mask, mask)
    np.testing.assert_array_equal(read_map(result.run.mask).density, mask.numpy())
    masked = fourier_shell_correlation(result.half_maps.first * mask, result.half_maps.second * mask)
    torch.testing.assert_close(result.half_maps.correlation.masked.values, masked)


def test_images_without_use_are_set_aside_and_keep_their_row(dimer):
    result, star, _, _ = dimer
    assert [fault.row for fault in result.faults] == [3, 40]
    assert result.sources.given == 148
    cells = plain_parse(result.run.particles)["particles"]
    assert [row for row, cell in enumerate(cells["cryoaiQuarantined"]) if cell == "1"] == [3, 40]
    assert cells["rlnImageName"] == plain_parse(star)["particles"]["rlnImageName"]
    assert result.confidence[3] == 0


# ------------------------------------------------------------------------------ bad input


def masks(folder):
    good = soft_sphere(BOX, 9.0, 4.0).numpy()
    for name, density, pixel_size in (
        ("box", soft_sphere(BOX + 2, 9.0, 4.0).numpy(), PIXEL),
        ("pixel", good, 1.02 * PIXEL),
        ("high", 1.5 * good, PIXEL),
        ("low", good - 0.5, PIXEL),
        ("empty", 0.01 * good, PIXEL),
    ):
        write_map(folder / f"{name}.mrc", density, pixel_size)


BAD_FLAGS = {
    "a symmetry that does not exist": (("--symmetry", "D1"), "--symmetry D1: n of Dn is from 2 to 60"),
    "a symmetry of another kind": (("--symmetry", "helical"), "--symmetry helical: no such point group"),
    "a mask of another box": (("--mask", "box.mrc"), "34 voxels of 7 Å a side; 32 voxels of 7 Å are needed: resample"),
    "a mask of another pixel size": (("--mask", "pixel.mrc"), "32 voxels of 7.14 Å a side; 32 voxels of 7 Å are"),
    "a mask beyond 1": (("--mask", "high.mrc"), "its values are from 0 to 1.5; a mask is 1 inside"),
    "a mask below 0": (("--mask", "low.mrc"), "its values are from -0.5 to 0.5; a mask is 1 inside"),
    "an empty mask": (("--mask", "empty.mrc"), "it is empty, no voxel is above 0.5"),
    "a mask that is not there": (("--mask", "gone.mrc"), "no such file"),
    "no rounds": (("--max-rounds", "0"), "setting max_rounds: Input should be greater than or equal to 1"),
    "a box larger than the images": (("--box", "34"), "--box 34"),
    "half sets of a third kind": (("--half-sets", "odd"), "setting half_sets: "),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_wrong_flag_is_refused_in_one_line_and_nothing_is_left(case, given, tmp_path, complaint):
    (flag, value), message = BAD_FLAGS[case]
    masks(tmp_path)
    there = files_in(tmp_path)
    value = tmp_path / value if flag == "--mask" else value
    assert message in complaint("refine", given, tmp_path / "run", flag, value)
    assert files_in(tmp_path) == there


def test_particles_without_poses_are_refused(simulated, tmp_path, complaint):
    said = complaint("refine", simulated.particles, tmp_path / "run")
    names = "rlnAngleRot, rlnAngleTilt, rlnAnglePsi"
    assert said.startswith(f"{simulated.particles}: no poses to refine ({names}); give a file with poses")
    assert files_in(tmp_path) == []
    dataset = tmp_path / "particles.cs"
    table = ParticleStack.open(simulated.truth).table
    stack = str(simulated.particles.with_suffix(".mrcs").resolve())
    write_cryosparc(dataset, table, np.full(N, BOX), table.poses, contrast_sign=1, paths=[stack])
    records = np.load(dataset)
    with dataset.open("wb") as file:
        np.save(file, records[[name for name in records.dtype.names if not name.startswith("alignments3D")]])
    said = complaint("refine", dataset, tmp_path / "run")
    assert said.startswith(f"{dataset}: no poses to refine (alignments3D/pose, which may be in a --passthrough FILE)")
    assert files_in(tmp_path) == ["particles.cs"]


def test_a_run_folder_that_holds_anything_is_left_untouched(given, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert str(tmp_path) in refusal(refine, ParticleStack.open(given), tmp_path, RefineSettings(**QUICK))
    assert files_in(tmp_path) == ["notes.txt"]
