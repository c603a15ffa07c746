"""Images at the working box that are kept for other runs: shared where they are the same, and never half of them."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from cryoai.checks.resources import estimate_need
from cryoai.cli import main
from cryoai.formats.snapshots import DamagedSnapshotError, read_snapshot, write_snapshot
from cryoai.image_cache import CachedImages
from cryoai.particle_stack import ParticleStack
from cryoai.particles import prepare_particles
from cryoai.poses import Poses
from cryoai.simulation import protein_like_phantom, simulate
from cryoai.training import steps
from cryoai.training.loop import reconstruct
from cryoai.training.monitor import Monitor
from cryoai.training.refining import refine
from cryoai.training.resuming import resume
from cryoai.training.settings import RefineSettings, Settings
from killing import killed_at
from stacks import files_in, particle_columns, refusal, write_images, write_star

N, IMAGE_BOX, BOX = 24, 36, 32
IMAGES = np.random.default_rng(7).normal(size=(N, IMAGE_BOX, IMAGE_BOX)).astype(np.float32)
CONSTANT = 5


@pytest.fixture
def folder(tmp_path):
    """Of particles, one of which cannot be used."""
    folder = tmp_path / "particles"
    folder.mkdir()
    images = IMAGES.copy()
    images[CONSTANT] = 1
    write_images(folder / "images.mrcs", images)
    write_star(folder / "p.star", particle_columns(N))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def place(cache, folder, box=BOX, share=0.1):
    stack = ParticleStack.open(folder / "p.star")
    return CachedImages.place(cache, stack, box, max_faulty_share=share, device=torch.device("cpu"))


def nothing(_):
    pass


def surprised(line):
    raise AssertionError(line)


def make(where):
    return where.make(progress=nothing, say=surprised)


def check_same(found, expected):
    rows = torch.arange(expected.n_particles)
    assert torch.equal(found.batch(rows).coefficients, expected.batch(rows).coefficients)
    for name, values in vars(expected.optics).items():
        assert torch.equal(getattr(found.optics, name), values), name
    assert torch.equal(found.stack_rows, expected.stack_rows)
    assert found.contrast == expected.contrast
    assert found.faults == expected.faults
    assert (found.n_pixels, found.pixel_size_in_angstroms) == (expected.n_pixels, expected.pixel_size_in_angstroms)


# ------------------------------------------------------------------------------ what is shared


def test_what_is_found_is_what_was_prepared_to_the_last_bit(folder, cache, tmp_path):
    stack = ParticleStack.open(folder / "p.star")
    expected = prepare_particles(stack, BOX, tmp_path / "images", max_faulty_share=0.1)
    assert place(cache, folder).find() is None
    assert not cache.exists()
    check_same(make(place(cache, folder)), expected)
    check_same(place(cache, folder).find(), expected)
    (entry,) = cache.iterdir()
    assert files_in(entry) == ["images.f16", "lock", "record.safetensors"]
    assert (entry / "images.f16").read_bytes() == (tmp_path / "images").read_bytes()


def with_poses(folder):
    angles = {name: [10.0 * i for i in range(N)] for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")}
    write_star(folder / "p.star", particle_columns(N) | angles | {"rlnRandomSubset": [1, 2] * (N // 2)})


def moved(folder):
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


@pytest.mark.parametrize("change", [with_poses, moved])
def test_the_same_images_are_found_whatever_else_is_different(folder, cache, change):
    make(place(cache, folder))
    change(folder)
    assert place(cache, folder).find() is not None


def one_pixel(folder):
    with mrcfile.mmap(folder / "images.mrcs", mode="r+") as file:
        file.data[3, 2, 1] += 1


def copied(folder):
    (folder / "images.mrcs").write_bytes((folder / "images.mrcs").read_bytes())


def without_a_row(folder):
    write_star(folder / "p.star", {name: cells[:-1] for name, cells in particle_columns(N).items()})


def other_defocus(folder):
    write_star(folder / "p.star", particle_columns(N) | {"rlnDefocusU": [12345] * N})


def other_rows(folder):
    write_star(folder / "p.star", {name: cells[::-1] for name, cells in particle_columns(N).items()})


@pytest.mark.parametrize("change", [one_pixel, copied, without_a_row, other_defocus, other_rows])
def test_other_images_are_not_found(folder, cache, change):
    make(place(cache, folder))
    change(folder)
    assert place(cache, folder).find() is None
    make(place(cache, folder))
    assert len(files_in(cache)) == 2


def test_another_box_is_not_found(folder, cache):
    make(place(cache, folder))
    assert place(cache, folder, box=IMAGE_BOX).find() is None
    assert make(place(cache, folder, box=IMAGE_BOX)).n_pixels == IMAGE_BOX
    assert place(cache, folder).find().n_pixels == BOX


def test_images_that_cannot_be_used_are_judged_and_named_anew(folder, cache):
    assert [fault.row for fault in make(place(cache, folder, share=0.5)).faults] == [CONSTANT]
    message = refusal(place(cache, folder, share=0).find)
    assert f"row {CONSTANT + 1} ({CONSTANT + 1}@{folder}/images.mrcs) is constant" in message
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    (fault,) = place(cache, elsewhere).find().faults
    assert fault.image == f"{CONSTANT + 1}@{elsewhere}/images.mrcs"


def test_too_many_that_cannot_be_used_leave_no_images(folder, cache):
    where = place(cache, folder, share=0)
    assert "too many images cannot be used" in refusal(make, where)
    assert files_in(where.path) == ["lock"]


def test_the_check_before_a_run_knows_that_the_images_are_elsewhere(cache):
    own, shared = (estimate_need(1000, BOX, 600, where) for where in (None, cache))
    assert shared.scratch_in_bytes == own.scratch_in_bytes * 400 // 1000
    assert own.folder_in_bytes - shared.folder_in_bytes == own.scratch_in_bytes - shared.scratch_in_bytes


# ------------------------------------------------------------------------------ killed, damaged, full, two at once

KILLED = """
import os, sys, torch
from pathlib import Path
from cryoai import image_cache
from cryoai.particle_stack import ParticleStack
def killed(*_): os.kill(os.getpid(), 9)
cache, particles, moment = sys.argv[1:]
if moment == "record": image_cache.write_snapshot = killed
where = image_cache.CachedImages.place(
    Path(cache), ParticleStack.open(particles), 32, max_faulty_share=0.1, device=torch.device("cpu")
)
where.make(progress=killed if moment == "images" else lambda _: None, say=print)
"""


@pytest.mark.parametrize(("moment", "left"), [("images", "unfinished.f16"), ("record", "images.f16")])
def test_what_a_killed_process_wrote_is_never_taken_for_whole(folder, cache, moment, left):
    ended = subprocess.run([sys.executable, "-c", KILLED, cache, folder / "p.star", moment], check=False)
    assert ended.returncode == -signal.SIGKILL
    where = place(cache, folder)
    assert set(files_in(where.path)) == {left, "lock"}
    assert where.find() is None
    made = make(where)
    assert files_in(where.path) == ["images.f16", "lock", "record.safetensors"]
    check_same(where.find(), made)


class Stopped(BaseException):
    """What no code expects."""


def test_a_process_that_is_stopped_leaves_nothing(folder, cache):
    def stop(_):
        raise Stopped

    where = place(cache, folder)
    with pytest.raises(Stopped):
        where.make(progress=stop, say=surprised)
    assert files_in(where.path) == ["lock"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("name", "damage"),
    [("images.f16", cut), ("images.f16", remove), ("record.safetensors", cut), ("record.safetensors", flip)],
)
def test_damaged_images_are_made_again_and_that_is_said(folder, cache, name, damage):
    where = place(cache, folder)
    whole = make(where)
    expected = whole.batch(torch.arange(N - 1)).coefficients
    damage(where.path / name)
    assert where.find() is None
    lines = []
    where.make(progress=nothing, say=lines.append)
    assert lines == [f"the images at the working box in {where.path} are damaged: made again"]
    assert torch.equal(where.find().batch(torch.arange(N - 1)).coefficients, expected)


def test_of_two_at_once_the_second_waits_for_the_images_of_the_first(folder, cache):
    begun, go_on, made = threading.Event(), threading.Event(), []

    def hold(_):
        begun.set()
        assert go_on.wait(20)

    first = threading.Thread(target=lambda: made.append(place(cache, folder).make(progress=hold, say=surprised)))
    first.start()
    assert begun.wait(20)
    done, lines = [], []

    def wait(n_done):
        done.append(n_done)
        go_on.set()

    second = place(cache, folder)
    found = second.make(progress=wait, say=lines.append)
    first.join()
    check_same(found, made[0])
    assert lines == [f"another process is preparing the same images in {second.path}: waiting for it"]
    # It was called while it waited, and read no image.
    assert set(done) == {0}


HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"


def test_where_the_first_of_two_is_killed_the_second_makes_the_images(folder, cache):
    where, lines, done = place(cache, folder), [], []
    where.path.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLD, where.lock], stdout=subprocess.PIPE) as process:
        process.stdout.readline()

        def wait(n_done):
            done.append(n_done)
            process.kill()

        where.make(progress=wait, say=lines.append)
    assert len(lines) == 1
    assert (done[0], done[-1]) == (0, N)
    assert where.find() is not None


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["os.posix_fallocate", "os.fsync"])
def test_a_full_disk_ends_prepare_in_one_line_and_leaves_no_images(folder, cache, monkeypatch, capsys, call):
    arguments = ["prepare", str(folder / "p.star"), str(cache), "--max-faulty-share", "0.1", "--box", str(BOX)]
    with monkeypatch.context() as patch:
        patch.setattr(call, no_room)
        assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    (entry,) = cache.iterdir()
    assert files_in(entry) == ["lock"]
    assert main(arguments) == 0


def test_a_cache_that_is_no_folder_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot make or write to the folder" in refusal(make, place(tmp_path / "file", folder))


def test_a_file_system_without_locks_is_refused(folder, cache, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert "cannot lock files (No locks available); give a cache on another" in refusal(make, place(cache, folder))


def test_a_record_of_a_version_with_other_parts_is_no_record(tmp_path, monkeypatch):
    fields = {"rotations": None, "translations": None}
    code = {"module": "cryoai.poses", "class": "Poses", "fields": fields}
    monkeypatch.setattr("cryoai.formats.snapshots._encoded", lambda *_: code)
    write_snapshot(tmp_path / "record", Poses(torch.eye(3)[None], torch.zeros(1, 2)))
    with pytest.raises(DamagedSnapshotError, match="Poses: written by a version of cryoai where it had other parts"):
        read_snapshot(tmp_path / "record")


def resident_files_in_megabytes():
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) / 1000


def test_images_that_were_read_do_not_stay_in_memory(tmp_path, monkeypatch):
    n, box = 2000, 128
    path = write_images(tmp_path / "images.mrcs", np.zeros((n, box, box)))
    stack = ParticleStack.open(write_star(tmp_path / "p.star", particle_columns(n)))
    monkeypatch.setattr("cryoai.particle_stack._MAPPED_BYTES", 2**24)
    before = resident_files_in_megabytes()
    most = before
    for rows in torch.arange(n).split(100):
        stack.stored_images(rows)
        most = max(most, resident_files_in_megabytes())
    assert most - before < 40 < path.stat().st_size / 1e6


# ------------------------------------------------------------------------------ cryoai prepare


def test_prepare_says_what_it_did_and_does_nothing_the_second_time(folder, cache, output):
    arguments = ("prepare", folder / "p.star", cache, "--max-faulty-share", "0.1", "--box", BOX)
    first, faults = output(*arguments).splitlines()
    (entry,) = cache.iterdir()
    size = (entry / "images.f16").stat().st_size / 1e9
    pattern = rf"{N - 1} images at the working box, {BOX} px of 3\.38 Å, ([\d.e-]+) GB, in [\d.]+ s, [\d,]+ images per "
    match = re.match(pattern, first)
    assert match
    assert float(match[1]) == pytest.approx(size, rel=0.01)
    assert first.endswith(f": {entry}")
    assert faults.startswith("1 images that cannot be used")
    before = (entry / "images.f16").stat()
    assert output(*arguments).strip().endswith(f"are there already: {entry}")
    assert (entry / "images.f16").stat() == before


@pytest.mark.parametrize(
    ("flags", "rule"),
    [(("--box", "33"), "setting box"), (("--seed", "-1"), "setting seed"), (("--box", "64"), "--box 64: the images")],
)
def test_prepare_refuses_what_reconstruct_refuses(folder, cache, complaint, flags, rule):
    assert complaint("prepare", folder / "p.star", cache, *flags).startswith(rule)
    assert not cache.exists()


# ------------------------------------------------------------------------------ runs

QUICK = {
    "device": "cpu",
    "stages": ("bootstrap",),
    "checkpoint_seconds": 0,
    "bootstrap": {"n_steps": 10, "batch_size": 20, "n_rotations": 600, "n_starts": 1, "max_starts": 1},
    "placement": {"n_rotations": 600, "n_iterations": 0},
}
N_OF_RUN = 120


def settings(**changes):
    return Settings.assemble("auto", None, {**QUICK, **changes})


@pytest.fixture(scope="module", autouse=True)
def _no_look_for_symmetry():
    """It takes most of the time of such small runs, and comes long after the images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryoai.findings.find_symmetry", lambda *_: ())
        yield


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("particles")
    options = {"n_pixels": 32, "pixel_size_in_angstroms": 7.0, "snr": 1.0, "seed": 0}
    return simulate(protein_like_phantom(0), folder, n_particles=N_OF_RUN, **options)


@pytest.fixture(scope="module")
def stack(simulated):
    return ParticleStack.open(simulated.particles)


@pytest.fixture(scope="module")
def alone(stack, tmp_path_factory):
    """A run without a cache."""
    return reconstruct(stack, tmp_path_factory.mktemp("alone") / "run", settings())


def log_of(result):
    return (result.run.path / "log.txt").read_text(encoding="utf-8")


def check_same_result(found, expected):
    assert torch.equal(found.map, expected.map)
    assert torch.equal(found.poses.rotations, expected.poses.rotations)
    assert files_in(found.run.path) == files_in(expected.run.path)
    assert (found.run.path / "particles.star").read_bytes() == (expected.run.path / "particles.star").read_bytes()


@pytest.mark.slow
def test_runs_of_another_seed_or_contrast_share_images_and_change_no_result(stack, alone, cache, tmp_path, monkeypatch):
    first = reconstruct(stack, tmp_path / "first", settings(cache=cache))
    assert "found in" not in log_of(first)
    check_same_result(first, alone)
    (entry,) = cache.iterdir()
    for name, value in (("seed", 1), ("contrast", "dark")):
        changes = {name: value}
        with monkeypatch.context() as patch:
            patch.setattr("cryoai.image_cache.prepare_particles", surprised)
            found = reconstruct(stack, tmp_path / name, settings(cache=cache, **changes))
        assert f"prepare    images at the working box found in {entry}" in log_of(found)
        by_itself = reconstruct(stack, tmp_path / f"{name}_alone", settings(**changes))
        check_same_result(found, by_itself)
        assert not torch.equal(found.map, first.map)
        assert about_contrast(found) == about_contrast(by_itself)
    assert "protein is dark (as stated" in about_contrast(found)
    assert "protein is bright (detected" in about_contrast(first)
    assert files_in(cache) == [entry.name]


def about_contrast(result):
    return re.search(r"protein is .*", log_of(result))[0]


@pytest.mark.slow
def test_prepare_chooses_the_particles_that_reconstruct_chooses(stack, cache, tmp_path, output):
    output("prepare", stack.table.path, cache, "--max-particles", 100, "--seed", 3)
    found = reconstruct(stack, tmp_path / "found", settings(cache=cache, max_particles=100, seed=3))
    assert "images at the working box found in" in log_of(found)
    assert "100 of 120 particles" in log_of(found)
    check_same_result(found, reconstruct(stack, tmp_path / "alone", settings(max_particles=100, seed=3)))
    assert len(files_in(cache)) == 1
    output("prepare", stack.table.path, cache, "--max-particles", 100, "--seed", 4)
    assert len(files_in(cache)) == 2


@pytest.mark.slow
def test_refine_finds_what_was_prepared_for_reconstruct(simulated, cache, tmp_path, output):
    output("prepare", simulated.particles, cache)
    stack = ParticleStack.open(simulated.truth)
    chosen = {"device": "cpu", "max_rounds": 1, "n_iterations": 1, "symmetry": "C2"}
    found = refine(stack, tmp_path / "found", RefineSettings(**chosen, cache=cache))
    assert "images at the working box found in" in log_of(found)
    check_same_result(found, refine(stack, tmp_path / "alone", RefineSettings(**chosen)))


@pytest.mark.slow
def test_a_run_goes_on_whether_its_images_are_still_there_or_not(stack, alone, cache, tmp_path, monkeypatch):
    for name in ("there", "gone"):
        killed_at(5, lambda name=name: reconstruct(stack, tmp_path / name, settings(cache=cache)))
        assert "prepared_images.f16" not in files_in(tmp_path / name)
    with monkeypatch.context() as patch:
        # Nor is the contrast decided again, which may take a search.
        patch.setattr(steps, "CachedImages", surprised)
        check_same_result(resume(tmp_path / "there"), alone)
    assert len(files_in(cache)) == 1
    shutil.rmtree(cache)
    check_same_result(resume(tmp_path / "gone"), alone)
    assert len(files_in(cache)) == 1


@pytest.mark.slow
def test_a_run_on_a_full_cache_says_so_in_one_line_and_goes_on_when_there_is_room(
    stack, alone, cache, tmp_path, monkeypatch, capsys
):
    (tmp_path / "settings.toml").write_text(settings(cache=cache).to_toml())
    command = ["reconstruct", str(stack.table.path), str(tmp_path / "run"), "--settings"]
    with monkeypatch.context() as patch:
        # The check of the particles, which comes first, still has room.
        rooms = iter([os.posix_fallocate])
        patch.setattr("os.posix_fallocate", lambda *given: next(rooms, no_room)(*given))
        assert main([*command, str(tmp_path / "settings.toml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(cache) in line
    assert f"mend that, then go on with: cryoai resume {tmp_path / 'run'}" in line
    check_same_result(resume(tmp_path / "run"), alone)


@pytest.mark.slow
def test_a_run_that_waits_for_another_can_be_stopped(stack, alone, cache, tmp_path, capsys):
    some = stack.take(stack.order_of_images())
    where = CachedImages.place(cache, some, 32, max_faulty_share=0.02, device=torch.device("cpu"))
    where.path.mkdir(parents=True)
    (tmp_path / "settings.toml").write_text(settings(cache=cache).to_toml())
    command = ["reconstruct", str(stack.table.path), str(tmp_path / "run"), "--settings"]
    advance = Monitor.advance

    def stop(self, progress, headline=""):
        os.kill(os.getpid(), signal.SIGTERM)
        advance(self, progress, headline)

    with subprocess.Popen([sys.executable, "-c", HOLD, where.lock], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Monitor, "advance", stop)
            assert main([*command, str(tmp_path / "settings.toml")]) == 128 + signal.SIGTERM
        process.kill()
    said = capsys.readouterr()
    assert "waiting for it" in said.out
    assert "stopped by SIGTERM, its work is saved" in said.err
    check_same_result(resume(tmp_path / "run"), alone)


def test_the_folder_is_the_same_from_wherever_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in (Settings, RefineSettings):
        assert kind(cache="images").cache == tmp_path / "images"
    assert RefineSettings(mask="mask.mrc").mask == tmp_path / "mask.mrc"
