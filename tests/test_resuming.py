"""Runs that are stopped, by whatever, and go on where they were."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from cryoai.cli import main
from cryoai.formats.mrc import read_map
from cryoai.formats.snapshots import DamagedSnapshotError, read_snapshot, write_snapshot
from cryoai.particle_stack import ParticleStack
from cryoai.pose_files import read_poses
from cryoai.poses import Poses
from cryoai.runs import RunFolder
from cryoai.simulation import protein_like_phantom, simulate
from cryoai.training.loop import reconstruct
from cryoai.training.monitor import Monitor
from cryoai.training.refining import refine
from cryoai.training.resuming import resume
from cryoai.training.settings import RefineSettings, Settings
from killing import killed_at
from stacks import files_in, refusal

pytestmark = pytest.mark.slow

N, BOX, PIXEL = 160, 32, 7.0
QUICK = {
    "device": "cpu",
    # More particles than map and encoder are made from, in two blocks.
    "max_particles": 100,
    "checkpoint_seconds": 0,
    "bootstrap": {"n_steps": 10, "batch_size": 20, "n_rotations": 600, "n_starts": 1, "max_starts": 1},
    "amortized": {
        "n_steps": 4,
        "n_fit_steps": 2,
        "wake_batch_size": 4,
        "sleep_batch_size": 4,
        "encoder_width": 4,
        "n_hypotheses": 2,
        "volume_width": 16,
    },
    "placement": {"n_rotations": 600, "n_iterations": 1},
    "refinement": {"max_rounds": 3, "n_iterations": 1},
}


@pytest.fixture(autouse=True, scope="module")
def _as_often_as_asked():
    """However slow the disk is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryoai.training.checkpoints._SHARE_OF_WORK", 0)
        yield


def settings(**changes):
    return Settings.assemble("auto", None, {**QUICK, **changes})


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("particles")
    options = {"n_pixels": BOX, "pixel_size_in_angstroms": PIXEL, "shift_standard_deviation_in_angstroms": 5.0}
    return simulate(protein_like_phantom(0), folder, n_particles=N, snr=1.0, seed=0, **options)


@pytest.fixture(scope="module")
def stack(simulated):
    return ParticleStack.open(simulated.particles)


@pytest.fixture(scope="module")
def never_stopped(stack, tmp_path_factory):
    return reconstruct(stack, tmp_path_factory.mktemp("whole") / "run", settings())


def n_steps_of(result):
    return len(result.run.metrics.read_text().splitlines())


def check_same(found, whole):
    assert torch.equal(found.poses.rotations, whole.poses.rotations)
    assert torch.equal(found.poses.shifts_in_angstroms, whole.poses.shifts_in_angstroms)
    assert torch.equal(found.map, whole.map)
    assert torch.equal(found.half_maps.first, whole.half_maps.first)
    assert torch.equal(found.confidence, whole.confidence)
    assert found.verdict == whole.verdict
    assert set(files_in(found.run.path)) == set(files_in(whole.run.path))
    for name in ("particles.star", "encoder_particles.star", "fsc.csv", "encoder.safetensors", "map_sharpened.mrc"):
        assert content(found.run.path / name) == content(whole.run.path / name)


def content(path):
    """Bytes of a file; of a map without its header, which holds the time."""
    return path.read_bytes()[1024 if path.suffix == ".mrc" else 0 :]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.75, 0.97])
def test_a_run_that_was_killed_goes_on_to_the_same_result_to_the_last_bit(stack, never_stopped, tmp_path, share):
    run = tmp_path / "run"
    killed_at(max(1, round(share * n_steps_of(never_stopped))), lambda: reconstruct(stack, run, settings()))
    assert not (run / "summary.json").exists()
    check_same(resume(run), never_stopped)


def test_a_run_that_is_killed_again_and_again_comes_to_its_end(stack, never_stopped, tmp_path):
    run = tmp_path / "run"
    # More than the stages have that begin again.
    killed_at(16, lambda: reconstruct(stack, run, settings()))
    n_kills = 1
    while n_kills < 20:
        try:
            killed_at(16, lambda: resume(run))
        except pytest.fail.Exception:  # it was not killed any more
            break
        n_kills += 1
    assert n_kills > 1
    found = RunFolder.open(run)
    assert torch.equal(read_poses(found.particles).rotations, read_poses(never_stopped.run.particles).rotations)
    assert (read_map(found.map).density == read_map(never_stopped.run.map).density).all()
    # No step is counted twice, and none is missing.
    stages = [
        [json.loads(line)["stage"] for line in r.metrics.read_text().splitlines()] for r in (found, never_stopped.run)
    ]
    assert stages[0] == stages[1]


def test_competing_starts_go_on_to_the_same_result(stack, tmp_path):
    amortized = {**QUICK["amortized"], "n_steps": 10, "n_starts": 3, "first_radius": 4}
    chosen = settings(stages=("amortized", "refinement"), amortized=amortized)
    whole = reconstruct(stack, tmp_path / "whole", chosen)
    for step in (2, 4, 6, 9, 12):
        run = tmp_path / str(step)
        killed_at(step, lambda run=run: reconstruct(stack, run, chosen))
        check_same(resume(run), whole)


def test_a_refinement_that_was_killed_goes_on_to_the_same_result(simulated, tmp_path):
    stack = ParticleStack.open(simulated.truth)
    chosen = RefineSettings(device="cpu", checkpoint_seconds=0, max_rounds=2, n_iterations=1, symmetry="C2")
    whole = refine(stack, tmp_path / "whole", chosen)
    for share in (0.1, 0.5, 0.9):
        run = tmp_path / str(share)
        step = max(1, round(share * n_steps_of(whole)))
        killed_at(step, lambda run=run: refine(stack, run, chosen))
        found = resume(run)
        assert torch.equal(found.poses.rotations, whole.poses.rotations)
        assert torch.equal(found.map, whole.map)
        assert (run / "particles.star").read_bytes() == (tmp_path / "whole" / "particles.star").read_bytes()


@pytest.fixture
def unfinished(stack, tmp_path):
    """The folder of a run that was killed in the middle."""
    run = tmp_path / "run"
    killed_at(12, lambda: reconstruct(stack, run, settings()))
    return run


def checkpoints_of(run):
    return sorted((run / "checkpoints").glob("checkpoint_*"))


def test_the_last_two_checkpoints_are_kept_and_the_older_serves_where_the_newer_is_damaged(unfinished, never_stopped):
    _older, newer = checkpoints_of(unfinished)
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    check_same(resume(unfinished), never_stopped)
    assert f"{newer}: its checksum is wrong" in (unfinished / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_without_any_whole_checkpoint_a_run_begins_again(unfinished, never_stopped, cut):
    for path in checkpoints_of(unfinished):
        path.write_bytes(path.read_bytes()[:cut])
    (unfinished / "prepared_images.f16").unlink()
    check_same(resume(unfinished), never_stopped)


def test_a_run_that_was_moved_goes_on(unfinished, never_stopped, tmp_path):
    moved = unfinished.rename(tmp_path / "elsewhere")
    check_same(resume(moved), never_stopped)


def test_checkpoints_are_no_more_often_than_was_asked_for(stack, tmp_path):
    run = tmp_path / "run"
    killed_at(12, lambda: reconstruct(stack, run, settings(checkpoint_seconds=1000)))
    assert checkpoints_of(run) == []


# ------------------------------------------------------------------------------ what is refused


def copy_of_particles(simulated, folder):
    folder.mkdir()
    for name in ("particles.star", "particles.mrcs"):
        (folder / name).write_bytes((simulated.particles.parent / name).read_bytes())
    return folder / "particles.star"


def changed_defocus(particles):
    lines = particles.read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if "@" in line) + 3
    old = lines[row].split()[2]
    lines[row] = lines[row].replace(old, "12345.000000", 1)
    particles.write_text("\n".join(lines) + "\n")


def without_a_row(particles):
    particles.write_text("\n".join(particles.read_text().rstrip().splitlines()[:-1]) + "\n")


def other_images(particles):
    stack = particles.with_suffix(".mrcs")
    content = bytearray(stack.read_bytes())
    content[1024:] = os.urandom(4) + content[1028:]
    stack.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_defocus, "defocus_u_in_angstroms of row 4 is 12345.0, and was"),
        (without_a_row, "159 rows, and 160 then"),
        (other_images, "the images have changed"),
    ],
)
def test_particles_that_have_changed_are_refused_with_what_is_different(simulated, tmp_path, change, named):
    particles, run = copy_of_particles(simulated, tmp_path / "particles"), tmp_path / "run"
    killed_at(12, lambda: reconstruct(ParticleStack.open(particles), run, settings()))
    change(particles)
    before = files_in(run)
    message = refusal(resume, run)
    assert "not the particles that the run" in message
    assert named in message
    assert files_in(run) == before


def test_settings_that_have_changed_are_refused_by_name(unfinished):
    path = unfinished / "settings.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    assert "changed since the run began: -seed = 0; +seed = 1" in refusal(resume, unfinished)


def test_what_is_no_stopped_run_is_refused(never_stopped, tmp_path, complaint):
    assert "is finished" in complaint("resume", never_stopped.run.path)
    assert "not the folder of a run" in complaint("resume", tmp_path / "none")


def test_a_new_run_is_not_begun_where_one_was_stopped(unfinished, stack, complaint):
    before = files_in(unfinished)
    message = complaint("reconstruct", stack.table.path, unfinished)
    assert f"go on with it: cryoai resume {unfinished}" in message
    assert files_in(unfinished) == before


HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"


def test_two_processes_are_not_at_work_on_one_run(unfinished, complaint):
    command = [sys.executable, "-c", HOLD, unfinished / "at_work.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert "another process is at work" in complaint("resume", unfinished)
        process.kill()


# ------------------------------------------------------------------------------ signals and full disks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_run_with_its_work_saved_and_a_word_how_to_go_on(
    stack, never_stopped, tmp_path, capsys, number
):
    run, update, n = tmp_path / "run", Monitor.update, 0
    (tmp_path / "settings.toml").write_text(settings(checkpoint_seconds=1000).to_toml())

    def stop_soon(self, metrics, progress):
        nonlocal n
        n += 1
        if n == 11:
            os.kill(os.getpid(), number)
        update(self, metrics, progress)

    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "update", stop_soon)
        status = main(["reconstruct", str(stack.table.path), str(run), "--settings", str(tmp_path / "settings.toml")])
    assert status == 128 + number
    assert n == 11
    said = capsys.readouterr().err.splitlines()
    assert said == [f"cryoai: stopped by {number.name}, its work is saved; go on with: cryoai resume {run}"]
    assert signal.getsignal(number) is before
    assert len(checkpoints_of(run)) == 1
    assert torch.equal(resume(run).map, never_stopped.map)


def test_a_process_that_is_killed_leaves_a_run_that_goes_on(simulated, never_stopped, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "settings.toml").write_text(settings().to_toml())
    command = [sys.executable, "-m", "cryoai"]
    begin = [*command, "reconstruct", simulated.particles, run, "--settings", tmp_path / "settings.toml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(begin, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not checkpoints_of(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    assert checkpoints_of(run)
    ended = subprocess.run([*command, "resume", run], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode in (0, 1, 3), ended.stderr
    assert content(run / "map.mrc") == content(never_stopped.run.map)
    assert content(run / "particles.star") == content(never_stopped.run.particles)


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on_when_there_is_room(
    stack, never_stopped, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    (tmp_path / "settings.toml").write_text(settings().to_toml())
    with monkeypatch.context() as patch:
        # The check of the particles, which comes first, still has room.
        rooms = iter([os.posix_fallocate])
        patch.setattr("os.posix_fallocate", lambda *given: next(rooms, no_room)(*given))
        assert (
            main(["reconstruct", str(stack.table.path), str(run), "--settings", str(tmp_path / "settings.toml")]) == 1
        )
    (line,) = capsys.readouterr().err.splitlines()
    assert "prepared_images.f16: No space left on device" in line
    assert f"mend that, then go on with: cryoai resume {run}" in line
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_room)
        assert main(["resume", str(run)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    check_same(resume(run), never_stopped)


def no_room_for_tensors(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def no_memory(*_):
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize(
    ("place", "fault", "named"),
    [
        ("cryoai.formats.snapshots.save_file", no_room_for_tensors, "No space left on device"),
        ("cryoai.training.stages.rounds.refine_poses", no_memory, "memory does not suffice"),
    ],
)
def test_whatever_a_library_calls_it_a_lack_of_room_is_one_line_and_the_run_goes_on(
    unfinished, never_stopped, monkeypatch, capsys, place, fault, named
):
    with monkeypatch.context() as patch:
        patch.setattr(place, fault)
        assert main(["resume", str(unfinished)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert f"go on with: cryoai resume {unfinished}" in line
    check_same(resume(unfinished), never_stopped)


# ------------------------------------------------------------------------------ snapshots


def test_a_snapshot_comes_back_as_it_was(tmp_path):
    generator = torch.Generator().manual_seed(3)
    z = torch.view_as_complex(torch.randn(4, 2))
    shared = torch.arange(6.0)
    value = {
        "numbers": [1, -2.5, float("inf"), True, None, "a"],
        7: (z, shared, shared[2:], torch.tensor(3), torch.zeros(0, 3), torch.ones(1).expand(5)),
        "poses": Poses(torch.eye(3)[None], torch.ones(1, 2)),
        "state": generator.get_state(),
        "path": tmp_path,
    }
    write_snapshot(tmp_path / "snapshot.safetensors", value)
    found = read_snapshot(tmp_path / "snapshot.safetensors")
    assert found["numbers"] == value["numbers"]
    assert found["path"] == tmp_path
    for read, written in zip(found[7], value[7], strict=True):
        assert read.dtype == written.dtype
        assert torch.equal(read, written)
    assert torch.equal(found["poses"].shifts_in_angstroms, torch.ones(1, 2))
    again = torch.Generator()
    again.set_state(found["state"])
    assert torch.equal(torch.rand(3, generator=again), torch.rand(3, generator=generator))
    # What is read shares no memory.
    found[7][1][3] = -1
    assert found[7][2][1] == 3


class Foreign:
    """No dataclass."""


def test_a_snapshot_holds_nothing_that_it_cannot_give_back(tmp_path):
    with pytest.raises(TypeError, match="Foreign: cannot be part of a snapshot"):
        write_snapshot(tmp_path / "snapshot.safetensors", [Foreign()])
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(("module", "name"), [("os", "system"), ("cryoai.cli", "main"), ("cryoai.poses", "nothing")])
def test_a_snapshot_makes_nothing_but_dataclasses_of_the_package(tmp_path, monkeypatch, module, name):
    path = tmp_path / "snapshot.safetensors"
    monkeypatch.setattr("cryoai.formats.snapshots._encoded", lambda *_: {"module": module, "class": name, "fields": {}})
    write_snapshot(path, None)
    with pytest.raises(DamagedSnapshotError, match="no part of this version"):
        read_snapshot(path)
