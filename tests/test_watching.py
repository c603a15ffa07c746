"""Following a folder: nothing half-written is posed, everything whole is, once for each of its states."""

import math
import os
import shutil
import time

import numpy as np
import pytest
import torch

from cryoai.particle_stack import ParticleStack
from cryoai.watching import FollowedFolder
from stacks import files_in, particle_columns, refusal, write_images, write_star

IMAGES = np.random.default_rng(0).normal(size=(6, 32, 32)).astype(np.float32)
SECOND = 10**9


class Followed:
    """A followed folder whose particles are read, and written as they are in place of being posed."""

    def __init__(self, folder):
        self.source, self.results = folder / "arriving", folder / "posed"
        self.source.mkdir(exist_ok=True)
        self.posed, self.said = [], []
        self.restart()

    def restart(self):
        self.folder = FollowedFolder(self.source, self.results, self.pose, self.said.append, 0.01)

    def pose(self, source, result):
        stack = ParticleStack.open(source)
        stack.images(torch.arange(stack.n_particles))
        shutil.copyfile(source, result)
        self.posed.append((source.name, stack.n_particles))

    def looks(self, n):
        return [self.folder.look() for _ in range(n)]

    def arrives(self, name="p", n=3):
        (self.source / f"{name}.mrcs").unlink(missing_ok=True)
        write_images(self.source / f"{name}.mrcs", IMAGES[:n])
        return write_star(self.source / f"{name}.star", particle_columns(n, f"{name}.mrcs"))


def made_at(path, seconds_from_now):
    """Set when a file was last changed, so that nothing hangs on how finely the clock of the disk ticks."""
    moment = time.time_ns() + int(seconds_from_now * SECOND)
    os.utime(path, ns=(moment, moment))


@pytest.fixture
def followed(tmp_path):
    return Followed(tmp_path)


# ------------------------------------------------------------------------------ whole files


def test_a_file_is_posed_at_the_second_look_that_finds_it_the_same_and_then_left_alone(followed):
    followed.arrives()
    assert followed.looks(5) == [0, 1, 0, 0, 0]
    assert followed.posed == [("p.star", 3)]
    assert files_in(followed.results) == ["p.star"]
    assert followed.said == []


def test_several_files_are_posed_in_the_order_of_their_names_and_nothing_but_star_files_is(followed):
    followed.looks(1)
    followed.arrives("b", 2)
    followed.arrives("a", 4)
    (followed.source / "notes.txt").write_text("not for you")
    (followed.source / "older").mkdir()
    shutil.copy(followed.source / "a.star", followed.source / "older" / "c.star")
    assert followed.looks(2) == [0, 2]
    followed.arrives("c", 1)
    assert followed.looks(3) == [0, 1, 0]
    assert followed.posed == [("a.star", 4), ("b.star", 2), ("c.star", 1)]


def test_a_changed_file_is_posed_again(followed):
    made_at(followed.arrives(n=3), -100)
    followed.looks(2)
    made_at(followed.results / "p.star", -50)
    made_at(followed.arrives(n=5), -10)
    assert followed.looks(4) == [0, 1, 0, 0]
    assert followed.posed == [("p.star", 3), ("p.star", 5)]


def test_a_file_that_changes_while_it_is_posed_is_posed_again(followed, monkeypatch):
    made_at(followed.arrives(n=3), -100)
    pose = followed.pose

    def disturbed(source, result):
        pose(source, result)
        if len(followed.posed) == 1:
            # Read before it changed, written after.
            made_at(followed.arrives(n=5), -10)

    monkeypatch.setattr(followed.folder, "pose", disturbed)
    followed.looks(5)
    assert followed.posed == [("p.star", 3), ("p.star", 5)]


@pytest.mark.parametrize("hours", [-1, 1])
def test_the_clock_of_whoever_writes_the_files_may_be_wrong(followed, hours):
    made_at(followed.arrives(n=3), 3600 * hours)
    followed.looks(5)
    assert followed.posed == [("p.star", 3)]
    made_at(followed.arrives(n=5), 3600 * hours + 60)
    followed.looks(5)
    assert followed.posed == [("p.star", 3), ("p.star", 5)]


def test_after_a_restart_only_what_has_no_newer_result_is_posed(followed):
    for name, age in (("new", 10), ("old", 100), ("never", 100)):
        made_at(followed.arrives(name), -age)
    followed.looks(2)
    for name in ("new", "old"):
        made_at(followed.results / f"{name}.star", -50)
    (followed.results / "never.star").unlink()
    followed.posed.clear()
    followed.restart()
    assert followed.looks(3) == [0, 2, 0]
    assert followed.posed == [("never.star", 3), ("new.star", 3)]


# ------------------------------------------------------------------------------ half-written files


def test_a_file_that_grows_between_looks_is_left_until_it_rests(followed):
    star = followed.arrives(n=6)
    whole = star.read_text()
    rows = whole.splitlines(keepends=True)
    for n_missing in (5, 4, 3, 2):
        star.write_text("".join(rows[:-n_missing]))
        assert followed.looks(1) == [0]
    star.write_text(whole)
    assert followed.looks(4) == [0, 1, 0, 0]
    assert followed.posed == [("p.star", 6)]
    assert followed.said == []


def test_a_file_whose_images_are_still_being_written_is_left_until_they_are_there_and_that_is_said_once(followed):
    star = followed.arrives(n=6)
    stack = followed.source / "p.mrcs"
    whole = stack.read_bytes()
    for n_bytes in (600, 1024, 9000, len(whole) - 1):
        stack.write_bytes(whole[:n_bytes])
        followed.said.clear()
        assert followed.looks(4) == [0, 0, 0, 0]
        assert len(followed.said) == 1
        assert followed.said[0].startswith("p.star is left until it is whole: ")
        assert "p.mrcs" in followed.said[0]
        assert "\n" not in followed.said[0]
    stack.write_bytes(whole)
    assert followed.looks(3) == [1, 0, 0]
    assert followed.posed == [("p.star", 6)]
    assert star.read_bytes() == (followed.results / "p.star").read_bytes()


def test_a_file_that_comes_before_its_images_waits_for_them_and_a_new_reason_is_said_again(followed):
    star = followed.arrives(n=3)
    stack = followed.source / "p.mrcs"
    stack.rename(followed.source / "elsewhere")
    assert followed.looks(3) == [0, 0, 0]
    write_images(stack, IMAGES[:2])
    assert followed.looks(3) == [0, 0, 0]
    assert ["not found" in line for line in followed.said] == [True, False]
    assert "which has 2" in followed.said[1]
    write_images(stack.with_suffix(".new"), IMAGES[:3])
    stack.with_suffix(".new").replace(stack)
    assert followed.looks(2) == [1, 0]
    assert followed.posed == [(star.name, 3)]


HALF_WRITTEN = {
    "nothing": "",
    "a name of a table": "data_optics\n",
    "the start of a loop": "data_particles\n\nloop_\n",
    "a name of a column": "data_particles\n\nloop_\n_rlnImageName #1\n",
    "a name without a value": "data_optics\n\n_rlnVoltage",
    "a row with too much": "data_particles\n\nloop_\n_rlnImageName #1\n1@p.mrcs\n2@p.mrcs 3@p.mrcs\n",
    "an open quotation": "data_particles\n\nloop_\n_rlnImageName #1\n_rlnDefocusU #2\n1@p.mrcs 'x\n",
    "what is no text": "data_particles\n\nloop_\n_rlnImageName #1\n\0\0\0\0",
}


@pytest.mark.parametrize("text", HALF_WRITTEN.values(), ids=HALF_WRITTEN)
def test_a_file_that_rests_half_written_is_left_with_a_word_and_posed_when_it_is_whole(followed, text):
    star = followed.arrives(n=3)
    whole = star.read_text()
    star.write_text(text)
    assert followed.looks(4) == [0, 0, 0, 0]
    assert len(followed.said) == 1
    assert followed.said[0].startswith("p.star is left until it is whole: ")
    star.write_text(whole)
    assert followed.looks(3) == [0, 1, 0]
    assert followed.posed == [("p.star", 3)]


def test_a_file_that_cannot_be_read_does_not_hold_up_the_others(followed):
    followed.arrives("b")
    (followed.source / "a.star").write_text("rubbish")
    assert followed.looks(3) == [0, 1, 0]
    assert followed.posed == [("b.star", 3)]
    assert len(followed.said) == 1


# ------------------------------------------------------------------------------ following


def test_following_ends_when_nothing_new_has_come_for_so_long(followed):
    followed.arrives()
    started = time.monotonic()
    followed.folder.follow(0.2)
    assert 0.2 <= time.monotonic() - started < 2
    assert followed.posed == [("p.star", 3)]


def test_what_comes_in_time_prolongs_the_following(followed, monkeypatch):
    followed.arrives("0")
    pose = followed.pose

    def and_another(source, result):
        pose(source, result)
        if len(followed.posed) < 4:
            followed.arrives(str(len(followed.posed)))
        time.sleep(0.1)

    monkeypatch.setattr(followed.folder, "pose", and_another)
    followed.folder.follow(0.3)
    assert [name for name, _ in followed.posed] == ["0.star", "1.star", "2.star", "3.star"]


def test_what_is_there_already_is_posed_however_short_the_patience(followed):
    followed.arrives()
    followed.folder.seconds_between_looks = 5.0
    started = time.monotonic()
    followed.folder.follow(0.2)
    assert followed.posed == [("p.star", 3)]
    assert time.monotonic() - started < 4


def test_an_interruption_ends_a_following_for_ever(followed, monkeypatch):
    followed.arrives()

    def interrupt(_source, _result):
        raise KeyboardInterrupt

    monkeypatch.setattr(followed.folder, "pose", interrupt)
    with pytest.raises(KeyboardInterrupt):
        followed.folder.follow(math.inf)


# ------------------------------------------------------------------------------ folders


def follow(source, results):
    return FollowedFolder(source, results, lambda _source, _result: None, lambda _line: None)


def test_the_results_folder_is_made_and_may_lie_in_the_followed_one(followed):
    followed.folder = FollowedFolder(
        followed.source, followed.source / "x" / "posed", followed.pose, followed.said.append
    )
    followed.arrives()
    assert followed.looks(4) == [0, 1, 0, 0]
    assert files_in(followed.source / "x" / "posed") == ["p.star"]


def test_folders_that_cannot_be_followed_or_written_to_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for missing in (tmp_path / "nowhere", tmp_path / "file"):
        assert f"--watch {missing}: no such folder" in refusal(follow, missing, tmp_path / "out")
    for same in (tmp_path / "in", tmp_path / "link", tmp_path / "in" / ".." / "in"):
        assert "same folder" in refusal(follow, tmp_path / "in", same)
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        assert str(place) in refusal(follow, tmp_path / "in", place)
    assert (tmp_path / "file").read_text() == "mine"
    assert files_in(tmp_path / "in") == []
