"""What the benchmarks count, read and make; none of the programs that they compare is run."""

import argparse
import doctest
import importlib
import json
import pickle
import sys
import time
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from cryoai.alignment import FrameChange, change_frame
from cryoai.formats.mrc import read_map, write_map
from cryoai.formats.star import read_star
from cryoai.pose_files import read_poses
from cryoai.poses import angular_distance_in_degrees, rotation_grid
from cryoai.simulation import protein_like_phantom, simulate
from stacks import files_in, plain_parse

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import honest_fsc
import page
import peer_programs
import peers
import robustness
import watched

TASK = peer_programs.Task(
    stack=Path("/data/particles.star"),
    n_particles=10_000,
    n_pixels=64,
    mask_diameter_in_angstroms=299.0,
    n_threads=2,
    seed=0,
)
# As version 3.1.3 prints it, a bar of progress over the other.
RELION_BAR = """ OrientationalSampling= 15 NrOrientations= 4608
=============================
 {title} 5 of 300
000/??? sec ~~(,_,">                                                          [oo]\r   1/  33 sec .~~(,_,">"""
RELION_ROWS = """
# version 30001

data_particles

loop_
_rlnImageName #1
_rlnAngleRot #2
_rlnClassNumber #3
000001@particles.mrcs    63.698102            1
000002@particles.mrcs     0.000000            0
000003@particles.mrcs   -29.659680            1

"""


@pytest.mark.parametrize("module", ["honest_fsc", "peer_programs"])
def test_the_examples_of_the_benchmarks_are_right(module):
    result = doctest.testmod(importlib.import_module(module))
    assert (result.failed, result.attempted > 0) == (0, True)


# ------------------------------------------------------------------------------ the clock


def test_time_is_shared_out_over_the_steps_that_it_was_spent_on(tmp_path):
    timetable = watched.Timetable()
    timetable.advance(0.5, 10, 5)
    timetable.advance(2.5, 40, 20)
    spent = [(step.share, step.seconds, step.cpu_seconds) for step in timetable.steps]
    assert spent == [(1.0, 20.0, 10.0), (1.0, 20.0, 10.0), (0.5, 10.0, 5.0)]
    timetable.unfinished = watched.StepTime(0.0, 3.0, 1.0)
    timetable.write(tmp_path / "times.json")
    again = watched.Timetable.read(tmp_path / "times.json")
    assert (again.place, again.seconds, again.cpu_seconds, again.finished) == (2.5, 53.0, 26.0, False)
    again.rewind(2)
    assert (again.place, again.seconds) == (2.0, 40.0)
    assert watched.Timetable.read(tmp_path / "absent.json").place == 0


def test_the_whole_is_extrapolated_phase_by_phase():
    phases = (watched.Phase("few", (100,) * 2), watched.Phase("many", (500,) * 4, like="few"))
    timetable = watched.Timetable()
    assert timetable.extrapolated_seconds(phases) is None
    timetable.advance(1.0, 30, 0)
    # 0.3 s for an image, of which there are 2,200
    assert timetable.extrapolated_seconds(phases) == pytest.approx(660)
    timetable.advance(2.0, 30, 0)
    timetable.advance(2.5, 25, 0)
    assert timetable.seconds_per_image(phases) == {"few": pytest.approx(0.3), "many": pytest.approx(0.1)}
    assert timetable.extrapolated_seconds(phases) == pytest.approx(60 + 200)
    unlike = (phases[0], watched.Phase("other", (1,)))
    assert timetable.extrapolated_seconds(unlike) == pytest.approx(60 + 50)
    timetable.rewind(2)
    assert timetable.extrapolated_seconds(unlike) is None
    assert timetable.extrapolated_seconds(()) is None


STEPS = """
import pathlib, sys, time
last, stop = int(sys.argv[1]), pathlib.Path(sys.argv[2])
for number in range(1, last + 1):
    for _ in range(20):
        time.sleep(0.01)
        if stop.exists():
            sys.exit("asked to stop")
    print(number, flush=True)
"""


def steps(tmp_path, n, limit, *, stop_file, environment=None):
    """Run a program of steps of 0.2 s; its times and its status."""
    timetable = watched.Timetable.read(tmp_path / "times.json")
    log = tmp_path / "log.txt"
    status = watched.run_watched(
        [sys.executable, "-c", STEPS, str(n), str(tmp_path / "stop")],
        timetable,
        tmp_path / "times.json",
        place=lambda: float(len(log.read_text().splitlines())),
        ended_well=lambda status: status == 0,
        stop_file=stop_file,
        limit_in_seconds=limit,
        cwd=tmp_path,
        environment=environment or {},
        log=log,
    )
    return timetable, status


def test_a_program_is_followed_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "_POLL_IN_SECONDS", 0.02)
    timetable, status = steps(tmp_path, 3, 60, stop_file=None)
    assert (status, timetable.finished, timetable.place) == (0, True, 3.0)
    assert all(0.15 < step.seconds < 5 for step in timetable.steps)
    assert watched.Timetable.read(tmp_path / "times.json").finished


@pytest.mark.parametrize("asked", [True, False])
def test_a_program_is_stopped_at_the_limit_and_what_it_did_is_kept(tmp_path, monkeypatch, asked):
    monkeypatch.setattr(watched, "_POLL_IN_SECONDS", 0.02)
    stop_file = tmp_path / "stop"
    started = time.monotonic()
    timetable, status = steps(tmp_path, 1000, 0.5, stop_file=stop_file if asked else None)
    assert time.monotonic() - started < 20
    assert (status, timetable.finished, stop_file.exists()) == (None, False, asked)
    assert ("asked to stop" in (tmp_path / "log.txt").read_text()) == asked
    assert 1 <= timetable.place < 5
    assert 0.5 <= timetable.seconds < 2
    kept = watched.Timetable.read(tmp_path / "times.json")
    assert (kept.place, kept.finished) == (timetable.place, False)


def test_a_program_that_fails_is_not_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "_POLL_IN_SECONDS", 0.02)
    (tmp_path / "stop").touch()
    timetable, status = steps(tmp_path, 3, 60, stop_file=None)
    assert (status, timetable.finished) == (1, False)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs the process table of Linux")
def test_the_processor_time_of_a_program_includes_that_of_what_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "_POLL_IN_SECONDS", 0.02)
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    child = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {burn!r}]); time.sleep(0.3)"
    timetable = watched.Timetable()
    log = tmp_path / "log.txt"
    arguments = {"place": lambda: 0.0, "stop_file": None, "limit_in_seconds": 60, "cwd": tmp_path, "environment": {}}
    arguments["ended_well"] = lambda status: status == 0
    command = [sys.executable, "-c", child]
    assert watched.run_watched(command, timetable, tmp_path / "times.json", log=log, **arguments) == 0
    assert 0.35 < timetable.cpu_seconds < 5


# ------------------------------------------------------------------------------ the programs


@pytest.mark.parametrize("title", ["Stochastic Gradient Descent iteration", "Expectation iteration"])
def test_relion_is_followed_by_its_bars_of_progress(title):
    printed = RELION_BAR.format(title=title)
    assert peer_programs.relion_place("") == 0
    assert peer_programs.relion_place(printed) == pytest.approx(4 + 1 / 60)
    half = printed + f'\r  16/  18 sec {"." * 30}~~(,_,">'
    assert peer_programs.relion_place(half) == 4.5
    done = half + f"\r  18/  18 sec {'.' * 60}\n Maximization ...\n000/??? sec ~~(,_,"
    assert peer_programs.relion_place(done) == 5
    assert peer_programs.relion_place(done + "\n Auto-refine: Iteration= 6\n Auto-refine: Resolution= 56") == 5


def test_cryodrgn_is_followed_by_its_lines():
    printed = "(INFO) (abinit.py) # [Train Epoch: 0/30] [5000/20000 particles]\n"
    assert peer_programs.cryodrgn_place("", 10_000) == 0
    assert peer_programs.cryodrgn_place(printed, 10_000) == 0.5
    printed += "# =====> Pretrain Epoch: 0 finished in 0:00:14.363080; total loss = 0.988599\n"
    assert peer_programs.cryodrgn_place(printed, 10_000) == 1
    assert peer_programs.cryodrgn_place(printed + "# [Train Epoch: 1/30] [5000/20000 particles]", 10_000) == 1.25


def test_relion_goes_on_from_the_last_iteration_that_is_whole(tmp_path):
    program = peer_programs.RelionStart(TASK, tmp_path, "relion_")
    assert (program.last_step(), program.poses(), program.map()) == (0, None, None)
    assert "--denovo_3dref" in program.command()
    assert program.command()[program.command().index("--i") + 1] == "/data/particles.star"
    for name in ("optimiser.star", "model.star", "data.star", "class001.mrc"):
        (tmp_path / f"run_it005_{name}").write_text(RELION_ROWS)
    (tmp_path / "run_it010_optimiser.star").touch()
    (tmp_path / "RELION_JOB_ABORT_NOW").touch()
    program.prepare()
    assert not program.stop_file.exists()
    assert program.checkpoint() == 5
    assert program.command()[:3] == ["relion_refine", "--continue", f"{tmp_path}/run_it005_optimiser.star"]
    assert "--denovo_3dref" not in program.command()
    assert program.map() == tmp_path / "run_it005_class001.mrc"
    rows = [line.split()[0] for line in program.poses().read_text().splitlines() if "@" in line]
    assert rows == ["000001@particles.mrcs", "000003@particles.mrcs"]


def test_a_run_of_ours_is_done_when_its_summary_is_there_whatever_its_verdict(tmp_path):
    program = peer_programs.CryoaiRun(TASK, tmp_path)
    (tmp_path / "run").mkdir()
    assert (program.ended_well(1), program.map()) == (False, None)
    (tmp_path / "run" / "summary.json").touch()
    assert (program.ended_well(3), program.map()) == (True, tmp_path / "run" / "map.mrc")


def test_relion_treats_as_many_images_as_its_schedule_says():
    sizes = [n for phase in peer_programs.RelionStart(TASK, Path("x"), "").phases for n in phase.images_of_steps]
    assert (len(sizes), sizes[0], sizes[50], sizes[150], sizes[-1]) == (300, 100, 100, 300, 500)


def test_cryodrgn_is_never_resumed_where_it_loses_its_poses(tmp_path):
    program = peer_programs.CryodrgnRun(TASK, tmp_path, "cryodrgn")
    assert (program.checkpoint(), program.poses(), program.map()) == (0, None, None)
    resumed = {}
    for epoch in range(6):
        (tmp_path / f"weights.{epoch}.pkl").touch()
        assert program.last_step() == epoch  # the poses of this epoch are not there yet
        (tmp_path / f"pose.{epoch}.pkl").touch()
        assert program.last_step() == epoch + 1
        resumed[epoch] = Path(program.command()[-1]).name
    # Epochs 1 to 3 search; after them the table of poses is not filled from what was found.
    assert [resumed[epoch] for epoch in (0, 2, 3, 4, 5)] == [f"weights.{epoch}.pkl" for epoch in (0, 2, 2, 4, 5)]


@pytest.mark.parametrize(("column", "set_to_zero"), [("_rlnPhaseShift #5", False), ("_rlnVoltage #5", True)])
def test_a_phase_shift_that_no_column_gives_is_zero_and_not_undefined(tmp_path, monkeypatch, column, set_to_zero):
    stack = tmp_path / "particles.star"
    stack.write_text(column)
    called = []
    monkeypatch.setattr(peer_programs.subprocess, "run", lambda command, **_: called.append(command))
    peer_programs.CryodrgnRun(replace(TASK, stack=stack), tmp_path, "cryodrgn").prepare()
    assert ("--ps" in called[0]) == set_to_zero


def test_poses_of_cryodrgn_are_judged_in_angstroms_and_without_regard_to_the_frame(tmp_path):
    pixel_size = 7.0
    size = {"n_particles": 200, "n_pixels": 32, "pixel_size_in_angstroms": pixel_size}
    shifted = {"shift_standard_deviation_in_angstroms": 6.0}
    simulation = simulate(protein_like_phantom(0), tmp_path, snr=1, seed=0, **size, **shifted)
    true = read_poses(simulation.truth)
    # What abinit writes: the rotations of another frame and hand, transposed, and shifts in pixels.
    frame = FrameChange(rotation_grid(50)[17], True, torch.zeros(3))
    other = frame.of_poses(true)
    folder = tmp_path / "cryodrgn"
    folder.mkdir()
    found = (other.rotations.transpose(1, 2).numpy(), (other.shifts_in_angstroms / pixel_size).numpy())
    (folder / "pose.1.pkl").write_bytes(pickle.dumps(found))
    (folder / "pose.0.pkl").touch()
    density = torch.from_numpy(read_map(simulation.true_map).density)
    write_map(folder / "reconstruct.1.mrc", change_frame(density, frame).numpy(), pixel_size)
    for epoch in (0, 1):
        (folder / f"weights.{epoch}.pkl").touch()
    program = peer_programs.CryodrgnRun(replace(TASK, n_pixels=32), folder, "cryodrgn")
    judged = peers.judged(program, simulation.truth, simulation.true_map, 32 * pixel_size)
    assert "poses_refused" not in judged, judged["poses_refused"]
    assert judged["poses"]["median_rotation_error_in_degrees"] < 0.05
    assert judged["poses"]["median_shift_error_in_angstroms"] < 0.01
    assert judged["poses"]["mirrored"]
    assert judged["map"]["resolution_at_fsc_0.5"] == pytest.approx(2 * pixel_size, rel=0.07)
    assert judged["map"]["correlation"] > 0.99


# ------------------------------------------------------------------------------ hard stacks

SIZE = robustness.Size(n_particles=40, n_pixels=32, pixel_size_in_angstroms=7.0)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    for seed in (0, 1):
        phantom = protein_like_phantom(seed)
        write_map(folder / f"{seed}.mrc", phantom.density, phantom.pixel_size_in_angstroms)
    return argparse.Namespace(map=folder / "0.mrc", foreign=folder / "1.mrc", defocus_table=None)


def images(path):
    with mrcfile.open(path) as file:
        return np.array(file.data)


def made(condition, folder, maps):
    return robustness.make_stack(condition, 3, SIZE, maps, folder)


def test_a_run_is_shown_the_particles_and_nothing_of_the_truth(maps, tmp_path):
    stack = made(robustness.Condition(), tmp_path, maps)
    assert files_in(stack.particles.parent) == ["particles.mrcs", "particles.star"]
    assert read_star(stack.particles).poses is None
    assert stack.truth.parent != stack.particles.parent
    assert len(read_star(stack.truth).poses.angles_in_degrees) == 40
    assert not stack.false.any()


def test_false_images_stand_in_the_rows_that_the_truth_leaves_out(maps, tmp_path):
    plain = images(made(robustness.Condition(snr=1e4), tmp_path / "plain", maps).particles.with_suffix(".mrcs"))
    noise = made(robustness.Condition(snr=1e4, share_noise=0.2), tmp_path / "noise", maps)
    foreign = made(robustness.Condition(snr=1e4, share_foreign=0.25), tmp_path / "foreign", maps)
    assert (noise.false.sum(), foreign.false.sum()) == (8, 10)
    for stack in (noise, foreign):
        found = images(stack.particles.with_suffix(".mrcs"))
        np.testing.assert_array_equal(found[~stack.false], plain[~stack.false])
        names = plain_parse(stack.truth)["particles"]["rlnImageName"]
        assert [int(name.split("@")[0]) - 1 for name in names] == np.flatnonzero(~stack.false).tolist()
    alone = images(noise.particles.with_suffix(".mrcs"))[noise.false]
    assert alone.std() == pytest.approx(1, rel=0.03)
    others = images(foreign.particles.with_suffix(".mrcs"))[foreign.false]
    assert others.var(axis=(1, 2)).min() > 100
    assert (
        max(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in zip(others, plain[foreign.false], strict=True))
        < 0.97
    )
    assert files_in(tmp_path / "foreign") == ["hidden", "particles"]


def test_defoci_are_wrong_in_what_the_run_is_shown_alone(maps, tmp_path):
    stack = made(robustness.Condition(defocus_error_in_angstroms=500), tmp_path, maps)
    shown, true = read_star(stack.particles), read_star(stack.truth)
    errors = shown.defocus_u_in_angstroms - true.defocus_u_in_angstroms
    np.testing.assert_allclose(shown.defocus_v_in_angstroms - true.defocus_v_in_angstroms, errors, atol=1e-5)
    assert 350 < errors.std() < 650
    assert abs(errors.mean()) < 250


def test_as_many_particles_as_said_lie_near_one_axis_turned_in_the_plane_at_random():
    rotations = robustness.rotations_near_one_axis(4000, 0.5, seed=2)
    torch.testing.assert_close(rotations.mT @ rotations, torch.eye(3).expand(4000, 3, 3), atol=1e-5, rtol=0)
    directions = rotations[:, :, 2]
    counts = (directions @ directions.T > np.cos(np.deg2rad(25))).sum(1)
    centre = directions[counts.argmax()]
    for _ in range(10):
        centre = torch.nn.functional.normalize(directions[directions @ centre > np.cos(np.deg2rad(25))].mean(0), dim=0)
    cosines = directions @ centre
    near = cosines > np.cos(np.deg2rad(25))
    # Of the half that looks from anywhere, the cap has (1 - cos 25°) / 2 = 4.7 per cent.
    assert near.float().mean() == pytest.approx(0.5 + 0.5 * 0.0468, abs=0.015)
    # Uniform on the cap: half of it is within 17.6° of its axis.
    assert (cosines[near] > np.cos(np.deg2rad(17.6))).float().mean() == pytest.approx(0.5, abs=0.04)
    turned = angular_distance_in_degrees(rotations[near][:-1], rotations[near][1:])
    assert turned.median() > 60
    assert robustness.rotations_near_one_axis(10, 0.0, seed=2) is None


def test_false_particles_are_caught_below_what_most_others_have(tmp_path):
    false = np.arange(100) % 5 == 0
    merit = np.where(false, 0.0, np.linspace(0.5, 1, 100))
    merit[[0, 5]] = 0.9
    header = "data_particles\n\nloop_\n_rlnImageName #1\n_rlnParticleFigureOfMerit #2\n"
    path = tmp_path / "particles.star"
    path.write_text(header + "".join(f"{i + 1:06d}@a.mrcs {m:.6f}\n" for i, m in enumerate(merit)))
    found = robustness.caught(path, false)
    assert (found["n"], found["caught"]) == (20, 0.9)
    assert found["confidence_of_95_percent_of_the_others"] == pytest.approx(np.quantile(merit[~false], 0.05), abs=1e-5)
    assert robustness.caught(path, np.zeros(100, dtype=bool)) is None
    path.write_text(path.read_text().replace("_rlnParticleFigureOfMerit", "_rlnSomethingElse"))
    assert robustness.caught(path, false) is None


# ------------------------------------------------------------------------------ what is made of results


def result(seed, reported, true, verdict=None, within=0.99):
    poses = {"within_5_degrees": within, "median_rotation_error_in_degrees": 0.5}
    return {
        "seed": seed,
        "seconds": 200.0,
        "exit_status": 0,
        "verdict": verdict,
        "false_particles": None,
        "extent_in_angstroms": 352.0,
        "reported_resolution_in_angstroms": reported,
        "poses": poses,
        "true_resolution_in_angstroms": true,
    }


def hard_runs():
    lost = {"seed": 0, "seconds": 90.0, "exit_status": 1, "message": "no map", "false_particles": None}
    runs = {
        "snr_0.1": [result(0, 11.0, 11.0, "solved"), result(1, 352 / 31, 352 / 29, "solved")],
        "snr_0.03": [result(0, 352 / 20, 352 / 19, "ambiguous"), result(1, 22.0, None, "failed", within=0.01)],
        "noise_only": [lost],
    }
    settings = {"n_particles": 10_000, "box": 64, "pixel_size": 5.5, "map": "80S.mrc"}
    return {"hardware": "2 cores", "date": "2026-11-24", "commit": "abcdef012", "settings": settings, "runs": runs}


def test_claims_that_are_better_than_the_truth_by_more_than_a_shell_are_counted():
    found = honest_fsc.claims(hard_runs())
    assert [(claim.condition, claim.seed, claim.excess) for claim in found] == [
        ("snr_0.1", 0, 0),
        ("snr_0.1", 1, 2),
        ("snr_0.03", 0, 1),
        ("snr_0.03", 1, 16),
    ]
    said = "2 of 4 runs report a resolution that is better than the truth by more than 1 shell; 1 of them call"
    assert said in honest_fsc.table_of(found)
    assert "| snr_0.03 | 1 | failed | 22.0 Å (shell 16) | none | +16 |" in honest_fsc.table_of(found)


def stage(**changed):
    poses = {"within_5_degrees": 0.997, "median_rotation_error_in_degrees": 0.49}
    density = {"resolution_at_fsc_0.5": 11.0, "resolution_at_fsc_0.143": None}
    whole = {
        "program": "cryoai 1",
        "start": "from nothing",
        "command": "cryoai reconstruct",
        "finished": True,
        "seconds": 300.0,
        "n_steps": 1,
        "steps_done": 1.0,
        "extrapolated_seconds": None,
        "poses": poses,
        "map": density,
    }
    return whole | changed


def test_the_page_tells_lower_bounds_from_times(tmp_path):
    stopped = stage(program="RELION 3.1.3", finished=False, seconds=3600.0, steps_done=73.25, n_steps=300)
    settings = {"n_particles": 10_000, "n_pixels": 64, "pixel_size_in_angstroms": 5.5, "stack": "80S", "n_threads": 2}
    report = {
        "hardware": "2 cores",
        "date": "2026-11-24",
        "commit": "abcdef012",
        "settings": settings,
        "stages": {"cryoai": stage(), "relion-start": stopped | {"extrapolated_seconds": 20_000, "poses": None}},
    }
    (tmp_path / "peers.json").write_text(json.dumps(report))
    (tmp_path / "hard.json").write_text(json.dumps(hard_runs()))
    hard = tmp_path / "hard.json"
    text = page.write_page(tmp_path / "peers.json", hard, hard, tmp_path / "docs").read_text()
    assert "| cryoai reconstruct, from nothing (cryoai 1) | 5.0 min | 1 × | 99.7% | 0.49° | 11.0 Å | – |" in text
    assert "| ≥ 60.0 min, 73.2 of 300 steps; in all about 5.6 h | ≥ 12 × | – | – | 11.0 Å | – |" in text
    assert "| SNR 0.03 | 2 | 1 | 1 ambiguous, 1 failed | 50.0% | 0.50° | – |" in text
    assert "| nothing but noise | 1 | – | 1 exit status 1 | – | – | – |" in text
    assert "Wrong maps that are called solved: 0." in text
    assert files_in(tmp_path / "docs" / "images") == ["honest_fsc.png", "peers.png"]
    only = page.write_page(tmp_path / "absent.json", hard, tmp_path / "absent.json", tmp_path / "docs").read_text()
    assert "other programs" not in only
    assert "Hard stacks" in only
