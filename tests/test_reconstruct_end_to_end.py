"""From a STAR file to a run folder: a small run of all stages on simulated particles."""

import csv
import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cryoai.alignment import FrameChange
from cryoai.evaluation import map_errors, pose_errors
from cryoai.formats.mrc import read_map
from cryoai.fourier import fourier_shell_correlation
from cryoai.particle_stack import ParticleStack
from cryoai.pose_files import read_poses
from cryoai.simulation import protein_like_phantom, simulate
from cryoai.training.loop import reconstruct
from cryoai.training.settings import Settings
from stacks import files_in, needs_relion, plain_parse, refusal, run_relion, write_star

pytestmark = pytest.mark.slow

N, BOX, PIXEL = 1000, 32, 7.0
SETTINGS = {
    "bootstrap": {"n_steps": 60, "batch_size": 100, "n_rotations": 2304, "n_starts": 1, "max_starts": 1},
    "amortized": {
        "n_steps": 30,
        "n_fit_steps": 50,
        "wake_batch_size": 16,
        "sleep_batch_size": 64,
        "encoder_width": 8,
        "n_hypotheses": 4,
        "volume_width": 64,
    },
}
SMALLEST = {
    "bootstrap": {"n_steps": 10, "batch_size": 20, "n_rotations": 600, "n_starts": 1, "max_starts": 1},
    "amortized": {
        "n_steps": 2,
        "n_fit_steps": 2,
        "wake_batch_size": 4,
        "sleep_batch_size": 4,
        "encoder_width": 4,
        "n_hypotheses": 2,
        "volume_width": 16,
    },
    "placement": {"n_rotations": 600, "n_iterations": 1},
    "refinement": {"max_rounds": 2, "n_iterations": 1},
}


def settings(values, **changes):
    return Settings.assemble("auto", None, {**values, "device": "cpu", **changes})


def checksums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("particles")
    options = {"n_pixels": BOX, "pixel_size_in_angstroms": PIXEL, "shift_standard_deviation_in_angstroms": 5.0}
    return simulate(protein_like_phantom(0), folder, n_particles=N, snr=1.0, seed=0, **options)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    options = {"n_pixels": BOX, "pixel_size_in_angstroms": PIXEL}
    return simulate(protein_like_phantom(1), folder, n_particles=60, snr=1.0, seed=0, **options)


@pytest.fixture(scope="module")
def few_by_encoder_alone(few, tmp_path_factory):
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("alone") / "run"
    return reconstruct(ParticleStack.open(few.particles), run, settings(SMALLEST, stages=("amortized",)))


@pytest.fixture(scope="module")
def finished(simulated, tmp_path_factory):
    """The result of the run, and the checksums of its input before."""
    torch.set_num_threads(1)
    before = checksums(simulated.particles.parent)
    run = tmp_path_factory.mktemp("runs") / "first"
    return reconstruct(ParticleStack.open(simulated.particles), run, settings(SETTINGS)), before


@pytest.fixture(scope="module")
def result(finished):
    return finished[0]


def test_most_poses_are_right(result, simulated):
    truth = read_poses(simulated.truth)
    errors = pose_errors(result.poses, truth)
    assert errors.median_rotation_error_in_degrees < 5
    assert errors.within_10_degrees > 0.8
    assert errors.median_shift_error_in_angstroms < 0.5 * PIXEL


@needs_relion
def test_relion_makes_our_map_from_our_particles_file(result, simulated):
    # RELION finds images from the folder it runs in.
    folder = simulated.particles.parent
    shutil.copy(result.run.particles, folder / "posed.star")
    run_relion("relion_reconstruct", folder, "--i", "posed.star", "--o", "theirs.mrc", "--ctf", "--pad", "2")
    theirs = torch.from_numpy(read_map(folder / "theirs.mrc").density)
    mask = result.half_maps.mask
    fsc = fourier_shell_correlation(result.map * mask, theirs * mask)[1 : result.half_maps.n_resolved_shells + 1]
    for name in ("posed.star", "theirs.mrc"):
        (folder / name).unlink()
    # Where the data end, the two programs spread the last coefficients over the grid differently: 0.988 and
    # 0.971 in the last two shells.
    assert fsc[: BOX // 2 - 2].min() > 0.99
    assert fsc.min() > 0.96


def test_the_half_maps_agree_nearly_to_nyquist_and_the_map_is_the_true_one(result, simulated):
    assert result.halves_are_independent
    assert result.half_maps.n_resolved_shells >= BOX // 2 - 2
    expected = BOX * PIXEL / result.half_maps.n_resolved_shells
    assert result.resolution_in_angstroms == pytest.approx(expected)
    frame = pose_errors(result.poses, read_poses(simulated.truth)).frame
    truth = torch.from_numpy(read_map(simulated.true_map).density)
    errors = map_errors(result.map, truth, PIXEL, frame)
    assert errors.resolution_at_half_in_angstroms < 24
    # The density is that of the truth, bright where it is bright.
    assert errors.fsc[1:8].min() > 0.8
    unmoved = map_errors(result.map, truth, PIXEL, FrameChange(torch.eye(3), not frame.mirrored, torch.zeros(3)))
    assert unmoved.fsc[1:8].mean() < errors.fsc[1:8].mean()


def test_the_input_is_left_as_it_was(finished, simulated):
    assert checksums(simulated.particles.parent) == finished[1]


def test_the_run_folder_holds_what_it_promises_and_no_scratch_file(result):
    assert files_in(result.run.path) == [
        "command.txt",
        "encoder.safetensors",
        "encoder_particles.star",
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
        "validation.png",
        "volume.safetensors",
    ]
    assert list(result.run.tensorboard.iterdir())


@pytest.mark.parametrize("max_particles", [50_000, 110])
def test_images_without_use_are_set_aside_and_their_rows_kept(tmp_path, max_particles):
    made = simulate(
        protein_like_phantom(1), tmp_path, n_particles=200, n_pixels=32, pixel_size_in_angstroms=7.0, snr=1.0, seed=1
    )
    stack = tmp_path / "particles.mrcs"
    stack.write_bytes(stack.read_bytes()[:-10])
    images = np.memmap(stack, np.float32, "r+", offset=1024, shape=(199, 32, 32))
    images[7, 3, 3], images[20, 0, 0], images[90] = np.nan, np.inf, 1.5
    images.flush()
    changes = {"max_particles": max_particles, "max_faulty_share": 0.04}
    result = reconstruct(ParticleStack.open(made.particles), tmp_path / "run", settings(SMALLEST, **changes))
    rows = {7, 20, 90, 199}
    assert {fault.row for fault in result.faults} == rows
    written, given = (plain_parse(path)["particles"] for path in (result.run.particles, made.particles))
    assert written["rlnImageName"] == given["rlnImageName"]
    assert [int(cell) for cell in written["cryoaiQuarantined"]] == [int(row in rows) for row in range(200)]
    with result.run.quarantine.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert {int(row["row"]) - 1: row["reason"] for row in listed} == {f.row: f.reason for f in result.faults}
    assert json.loads(result.run.summary.read_text())["n_quarantined"] == 4
    sources = result.sources
    assert sources.from_encoder + sources.from_search == 196
    assert torch.equal(result.poses.shifts_in_angstroms[sorted(rows)], torch.zeros(4, 2))


@pytest.mark.parametrize("max_particles", [50_000, 150])
def test_the_order_of_the_rows_changes_nothing(tmp_path, max_particles):
    made = simulate(
        protein_like_phantom(1), tmp_path, n_particles=200, n_pixels=32, pixel_size_in_angstroms=7.0, snr=1.0, seed=1
    )
    table = plain_parse(made.particles)
    order = np.random.default_rng(0).permutation(200)
    shuffled = {name: [cells[i] for i in order] for name, cells in table["particles"].items()}
    other = write_star(tmp_path / "shuffled.star", shuffled, table["optics"])
    chosen = settings(SMALLEST, max_particles=max_particles)
    first = reconstruct(ParticleStack.open(made.particles), tmp_path / "first", chosen)
    second = reconstruct(ParticleStack.open(other), tmp_path / "second", chosen)
    assert torch.equal(first.map, second.map)
    assert torch.equal(first.poses.rotations[order], second.poses.rotations)
    assert torch.equal(first.poses.shifts_in_angstroms[order], second.poses.shifts_in_angstroms)
    halves = [plain_parse(result.run.particles)["particles"]["rlnRandomSubset"] for result in (first, second)]
    assert [halves[0][i] for i in order] == halves[1]


def test_too_many_images_without_use_stop_the_run_and_leave_nothing(tmp_path):
    made = simulate(
        protein_like_phantom(1), tmp_path, n_particles=60, n_pixels=32, pixel_size_in_angstroms=7.0, snr=1.0, seed=1
    )
    np.memmap(tmp_path / "particles.mrcs", np.float32, "r+", offset=1024, shape=(60, 32, 32))[[3, 9]] = 0.0
    message = refusal(reconstruct, ParticleStack.open(made.particles), tmp_path / "run", settings(SMALLEST))
    assert "row 4 (4@" in message
    assert "row 10 (10@" in message
    assert not (tmp_path / "run").exists()


def test_maps_and_curve_on_disk_are_those_of_the_result(result):
    local = result.findings.local_resolution_in_angstroms
    pairs = [
        (result.run.map, result.map),
        (result.run.mask, result.half_maps.mask),
        (result.run.sharpened_map, result.findings.sharpened.density),
        (result.run.local_resolution, torch.where(local.isfinite(), local, 0.0)),
    ]
    pairs += zip(result.run.half_maps, (result.half_maps.first, result.half_maps.second), strict=True)
    for path, density in pairs:
        found = read_map(path)
        np.testing.assert_array_equal(found.density, density.numpy())
        assert found.pixel_size_in_angstroms == pytest.approx(PIXEL)
    with result.run.fsc.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["shell"]) for row in rows] == list(range(BOX // 2 + 1))
    curves, controls = result.half_maps.correlation, result.controls
    columns = {
        "fsc": result.half_maps.fsc,
        "unmasked": curves.unmasked.values,
        "masked": curves.masked.values,
        "phases_randomised": curves.randomised.values,
        "noise_only": controls.noise_only,
        "shuffled_poses": controls.shuffled_poses,
    }
    assert list(rows[0]) == ["shell", "period_in_angstroms", *columns]
    for name, curve in columns.items():
        np.testing.assert_allclose([float(row[name]) for row in rows], curve.numpy(), atol=1e-6)
    assert float(rows[-1]["period_in_angstroms"]) == pytest.approx(2 * PIXEL)


def test_the_particles_come_back_row_by_row_with_poses_and_half_sets(result, simulated):
    before, after = (plain_parse(path)["particles"] for path in (simulated.particles, result.run.particles))
    for column, cells in before.items():
        assert after[column] == cells
    added = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnRandomSubset"]
    added.append("rlnParticleFigureOfMerit")
    assert sorted(set(after) - set(before)) == sorted(added)
    assert sorted(set(after["rlnRandomSubset"])) == ["1", "2"]
    assert after["rlnRandomSubset"].count("1") == N // 2
    poses = read_poses(result.run.particles)
    torch.testing.assert_close(poses.rotations, result.poses.rotations, atol=1e-5, rtol=0)
    torch.testing.assert_close(poses.shifts_in_angstroms, result.poses.shifts_in_angstroms, atol=1e-4, rtol=0)
    merit = np.array(after["rlnParticleFigureOfMerit"], dtype=float)
    np.testing.assert_allclose(merit, result.confidence.numpy(), atol=1e-6)
    encoder = plain_parse(result.run.encoder_particles)["particles"]
    assert "rlnParticleFigureOfMerit" not in encoder
    assert encoder["rlnImageName"] == before["rlnImageName"]
    assert encoder["rlnAngleRot"] != after["rlnAngleRot"]


def test_the_summary_counts_every_particle(result):
    summary = json.loads(result.run.summary.read_text())
    sources = summary["pose_sources"]
    assert sources["from_encoder"] + sources["from_search"] == summary["n_particles"] == N
    # Fewer particles than the pilot are all searched for.
    assert sources["searched"] == result.sources.searched == N
    assert 0 <= sources["encoder_and_search_agree"] <= N
    assert 0 <= sources["moved_by_refinement"] <= N
    assert sources["from_search"] == result.sources.from_search > 0
    assert (summary["box_in_pixels"], summary["pixel_size_in_angstroms"]) == (BOX, PIXEL)
    assert summary["resolution_in_angstroms"] == pytest.approx(result.resolution_in_angstroms)
    assert summary["contrast"]["sign"] == 1
    assert summary["start_agreement"] is None
    seconds = summary["seconds_per_stage"]
    stages = ["prepare", "bootstrap", "amortized", "placement", "refinement", "validation", "rehearsal"]
    assert list(seconds) == stages
    assert sum(seconds.values()) <= summary["seconds"] + 0.1


def test_the_summary_says_what_to_think_of_the_result(result):
    summary = json.loads(result.run.summary.read_text())
    # One start, and so few particles that both halves began with its map: believed by half.
    assert summary["verdict"] == {"status": "ambiguous", "reasons": list(result.verdict.reasons)}
    assert [reason.split(";")[0] for reason in result.verdict.reasons] == [
        "the structure was found once, from one start",
        "both halves of the particles began with one map, so that their agreement says less",
    ]
    assert all(reason in result.run.log.read_text(encoding="utf-8") for reason in result.verdict.reasons)
    assert (summary["halves_are_independent"], summary["halves_began_apart"]) == (True, False)
    by_name = summary["resolutions_in_angstroms"]
    assert set(by_name) == {"unmasked", "masked", "randomised", "corrected"}
    assert by_name["corrected"]["at_fsc_0.143"] == summary["resolution_in_angstroms"]
    assert summary["map_defects"] == summary["symmetries"] == []
    assert summary["orientations"]["effective_share"] > 0.8
    assert summary["orientations"]["densest_tenth_share"] == pytest.approx(0.1, abs=0.05)
    assert summary["orientations"]["cone_area_ratio"] > 0.8


def test_the_particles_are_told_from_noise_and_the_confidence_is_the_share_of_right_poses(result, simulated):
    summary = json.loads(result.run.summary.read_text())
    controls = summary["controls"]
    assert controls["n_images"] == N
    assert controls["better_than_noise"] > 0.95
    # What was found of synthetic particles is what was found of the real ones.
    truth = read_poses(simulated.truth)
    within_10 = pose_errors(result.poses, truth).within_10_degrees
    assert controls["found_of_synthetic"] == pytest.approx(within_10, abs=0.05)
    assert summary["confidence"]["mean"] == pytest.approx(within_10, abs=0.05)
    assert summary["confidence"]["mean"] == pytest.approx(float(result.confidence.mean()), abs=1e-4)
    # Where orientations do not count any more, images at the poses of others make nothing that agrees.
    assert result.controls.shuffled_poses[9:].abs().max() < 0.15
    # Images of noise, laid over one map, make a map like it (Henderson 2013); but less so than particles.
    assert (result.controls.noise_only < result.half_maps.fsc - 0.05)[2:].all()
    assert result.half_maps.fsc[9:15].min() > 0.9


def test_every_step_of_every_stage_is_in_the_metrics(result):
    lines = [json.loads(line) for line in result.run.metrics.read_text().splitlines()]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    counts = {stage: sum(line["stage"] == stage for line in lines) for stage in ("bootstrap", "amortized", "placement")}
    assert counts["bootstrap"] == SETTINGS["bootstrap"]["n_steps"]
    assert counts["amortized"] == SETTINGS["amortized"]["n_fit_steps"] + SETTINGS["amortized"]["n_steps"]
    assert counts["placement"] == 4  # chunks of 256 that never mix the halves
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    for stage in ("prepare", "bootstrap", "amortized", "placement", "refinement", "validation", "rehearsal"):
        assert f"{stage:<10} done" in result.run.log.read_text(encoding="utf-8")


def test_the_settings_on_disk_repeat_the_run(result):
    assert Settings.assemble("auto", result.run.settings, {}) == settings(SETTINGS)


def test_the_weights_on_disk_are_whole(result):
    encoder, volume = (load_file(path) for path in (result.run.encoder_weights, result.run.volume_weights))
    weights = {name.removeprefix("encoder."): value for name, value in encoder.items()}
    # Real and imaginary parts of 12 rings; six numbers of a rotation, two of a shift, one score.
    assert weights["features.0.convolution.weight"].shape == (8, 24, 1, 9)
    assert weights["head.2.weight"].shape == (9, 16, 1, 1)
    assert volume["modulant.output.weight"].shape == (2, 64)
    assert all(torch.isfinite(value).all() for value in (*encoder.values(), *volume.values()))


def test_one_seed_gives_one_result_to_the_last_bit_and_another_seed_another(few, tmp_path):
    found = [
        reconstruct(ParticleStack.open(few.particles), tmp_path / str(i), settings(SMALLEST, seed=seed))
        for i, seed in enumerate((5, 5, 6))
    ]
    assert torch.equal(found[0].poses.rotations, found[1].poses.rotations)
    assert torch.equal(found[0].poses.shifts_in_angstroms, found[1].poses.shifts_in_angstroms)
    assert torch.equal(found[0].map, found[1].map)
    assert not torch.equal(found[0].poses.rotations, found[2].poses.rotations)
    assert plain_parse(found[0].run.particles) == plain_parse(found[1].run.particles)


@pytest.mark.parametrize(
    ("stages", "independent", "with_encoder"),
    [
        (("bootstrap",), False, False),
        (("amortized",), False, True),
        (("bootstrap", "refinement"), True, False),
        (("amortized", "refinement"), True, True),
    ],
)
def test_any_choice_of_stages_leads_to_a_map(few, tmp_path, stages, independent, with_encoder):
    particles = ParticleStack.open(few.particles)
    found = reconstruct(particles, tmp_path / "run", settings(SMALLEST, stages=stages))
    assert torch.isfinite(found.map).all()
    assert found.halves_are_independent == independent
    # Without Refinement there is nothing to rehearse, and nobody says how sure a pose is.
    assert (found.confidence is not None) == (found.controls is not None) == independent
    assert found.verdict.status != "solved"
    assert found.run.encoder_weights.exists() == found.run.encoder_particles.exists() == with_encoder
    assert found.sources.from_encoder == (60 if stages[0] == "amortized" else 0)
    assert found.sources.from_search == found.sources.searched == 60 - found.sources.from_encoder
    assert found.run.summary.is_file()


# Each of the settings of the encoder's stage that choose between ways of doing it.
CHOICES = [
    {"encoder": "convolutional"},
    {"encoder_input": "plain"},
    {"symmetrization": "half-turn"},
    {"volume": "voxels"},
    {"wake_interval": 1},
    {"first_radius": 4},
    {"encoder_width": 8},
    {"n_hypotheses": 4},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: next(iter(choice)))
def test_every_choice_of_the_encoder_s_stage_leads_to_a_map_and_to_another_one(
    few, few_by_encoder_alone, tmp_path, choice
):
    plain = few_by_encoder_alone
    amortized = {**SMALLEST["amortized"], **choice}
    changes = {"stages": ("amortized",), "amortized": amortized}
    found = reconstruct(ParticleStack.open(few.particles), tmp_path / "run", settings(SMALLEST, **changes))
    assert torch.isfinite(found.map).all()
    assert not torch.equal(found.map, plain.map)
    assert found.run.encoder_weights.is_file()


def test_the_choices_of_the_encoder_s_stage_are_all_that_makes_their_runs_differ(few, few_by_encoder_alone, tmp_path):
    again = reconstruct(ParticleStack.open(few.particles), tmp_path / "run", settings(SMALLEST, stages=("amortized",)))
    assert torch.equal(again.map, few_by_encoder_alone.map)


@pytest.fixture(scope="module")
def completed(simulated, tmp_path_factory):
    """The same particles, of which less than half were trained on."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("completed") / "run"
    return reconstruct(ParticleStack.open(simulated.particles), run, settings(SETTINGS, max_particles=450))


def test_particles_that_were_not_trained_on_are_posed_at_the_end_as_well_as_the_others(completed, simulated):
    truth = read_poses(simulated.truth)
    errors = pose_errors(completed.poses, truth)
    assert errors.n_particles == N
    assert errors.median_rotation_error_in_degrees < 6
    assert errors.within_10_degrees > 0.75
    assert files_in(completed.run.path).count("prepared_block.f16") == 0


def test_particles_that_were_not_trained_on_enter_the_half_maps_of_their_half_set(completed, simulated, tmp_path):
    stages = [json.loads(line)["stage"] for line in completed.run.metrics.read_text().splitlines()]
    assert sorted(set(stages), key=stages.index)[-2:] == ["completion", "rehearsal"]
    rows = plain_parse(completed.run.particles)["particles"]
    assert len(rows["rlnRandomSubset"]) == N
    assert set(rows["rlnRandomSubset"]) == {"1", "2"}
    # Fewer particles make a map that agrees with itself less far.
    stack = ParticleStack.open(simulated.particles)
    without = reconstruct(stack.take(torch.arange(450)), tmp_path / "run", settings(SETTINGS, seed=0))
    shell = slice(6, 14)
    assert completed.half_maps.fsc[shell].mean() > without.half_maps.fsc[shell].mean()


def test_a_run_that_trains_on_all_particles_has_nothing_to_complete(result):
    assert "completion" not in result.run.metrics.read_text()


@pytest.fixture(scope="module")
def apart(simulated, tmp_path_factory):
    """The same particles, each half of which finds its own map."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("apart") / "run"
    bootstrap = SETTINGS["bootstrap"] | {"n_starts": 2, "max_starts": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryoai.training.stages.bootstrap._FEWEST_IN_A_HALF", 400)
        chosen = settings({"bootstrap": bootstrap}, stages=("bootstrap", "refinement"))
        return reconstruct(ParticleStack.open(simulated.particles), run, chosen)


def test_two_halves_that_began_apart_find_one_structure_and_the_run_is_solved(apart):
    assert apart.halves_began_apart
    assert apart.start_agreement.is_one_structure
    assert apart.start_agreement.poses > 0.7
    assert (apart.verdict.status, apart.verdict.reasons) == ("solved", ())
    summary = json.loads(apart.run.summary.read_text())
    assert summary["verdict"] == {"status": "solved", "reasons": []}
    assert summary["halves_began_apart"] is True
    assert summary["start_agreement"]["poses"] == pytest.approx(apart.start_agreement.poses)
    assert "by independent half maps that began apart" in apart.run.log.read_text(encoding="utf-8")


def test_halves_that_began_apart_end_in_one_frame_and_one_hand_with_the_right_poses(apart, simulated):
    truth = read_poses(simulated.truth)
    everything = pose_errors(apart.poses, truth)
    assert everything.within_10_degrees > 0.9
    half_set = np.array(plain_parse(apart.run.particles)["particles"]["rlnRandomSubset"], dtype=int)
    for half in (1, 2):
        rows = torch.from_numpy(half_set == half)
        errors = pose_errors(apart.poses[rows], truth[rows])
        assert errors.mirrored == everything.mirrored
        # The frame is that of all particles, to a few degrees that the halves' maps may be turned by.
        assert errors.median_rotation_error_in_degrees > everything.median_rotation_error_in_degrees - 1.5
    assert apart.half_maps.n_resolved_shells >= BOX // 2 - 3
