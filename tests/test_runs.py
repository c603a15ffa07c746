import json
import math
import sys

import pytest
import torch

from cryoai.formats.mrc import read_map
from cryoai.runs import FscColumns, RunFolder
from stacks import files_in, refusal


def test_a_new_folder_is_made_with_its_parents_and_says_how_it_came_about(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cryoai", "reconstruct", "my particles.star"])
    run = RunFolder.create(tmp_path / "runs" / "first")
    assert files_in(run.path) == ["command.txt"]
    assert run.command.read_text() == "cryoai reconstruct 'my particles.star'\n"


def test_an_empty_folder_will_do_and_one_that_holds_anything_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    RunFolder.create(folder)
    before = folder.joinpath("command.txt").read_bytes()
    message = refusal(RunFolder.create, folder)
    assert str(folder) in message
    assert "not empty" in message
    assert files_in(folder) == ["command.txt"]
    assert folder.joinpath("command.txt").read_bytes() == before


@pytest.mark.parametrize("place", ["file", "file/run", "file/deep/run"])
def test_a_place_at_or_below_a_file_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / place) in refusal(RunFolder.create, tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"
    assert files_in(tmp_path) == ["file"]


def test_only_the_folder_of_a_finished_run_is_opened(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    assert "summary.json" in refusal(RunFolder.open, run.path)
    assert str(tmp_path / "none") in refusal(RunFolder.open, tmp_path / "none")
    run.write_json(run.summary, {"n_particles": 7})
    assert RunFolder.open(run.path) == run
    assert json.loads(run.summary.read_text()) == {"n_particles": 7}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.write_json(run.summary, {"n_particles": 7})
    before = run.summary.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        run.write_json(run.summary, {"n_particles": 8, "resolution": math.inf})
    with pytest.raises(UnicodeEncodeError):
        run.write_text(run.summary, "half of a file \ud800")
    assert run.summary.read_bytes() == before
    assert files_in(run.path) == ["command.txt", "summary.json"]


def test_maps_and_curves_are_written_as_they_are_read(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    density = torch.randn(8, 8, 8)
    run.write_map(run.map, density, 2.5)
    found = read_map(run.map)
    assert torch.equal(torch.from_numpy(found.density), density)
    assert found.pixel_size_in_angstroms == pytest.approx(2.5)
    run.write_fsc(FscColumns(torch.tensor([1.0, 0.9, 0.5, 0.1, -0.02])), 2.5)
    header, *rows = run.fsc.read_text().splitlines()
    assert header == "shell,period_in_angstroms,fsc"
    table = [[float(cell) for cell in row.split(",")] for row in rows]
    assert table[0] == [0, math.inf, 1]
    assert table[1:] == [[1, 20, 0.9], [2, 10, 0.5], [3, 6.6667, 0.1], [4, 5, -0.02]]


def test_the_curve_that_counts_stands_first_and_only_those_that_there_are_beside_it(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    fsc, masked, noise = torch.tensor([[1.0, 0.5, 0.1], [1.0, 0.6, 0.2], [0.9, -0.1, 0.05]], dtype=torch.float64)
    # Given in another order than they are written in.
    run.write_fsc(FscColumns(noise_only=noise, masked=masked, fsc=fsc), 3.0)
    assert run.fsc.read_text() == (
        "shell,period_in_angstroms,fsc,masked,noise_only\n"
        "0,inf,1.000000,1.000000,0.900000\n"
        "1,12.0000,0.500000,0.600000,-0.100000\n"
        "2,6.0000,0.100000,0.200000,0.050000\n"
    )
    everything = FscColumns(*torch.rand(6, 3))
    run.write_fsc(everything, 3.0)
    header, *rows = run.fsc.read_text().splitlines()
    names = ["fsc", "unmasked", "masked", "phases_randomised", "noise_only", "shuffled_poses"]
    assert header.split(",") == ["shell", "period_in_angstroms", *names]
    found = torch.tensor([[float(cell) for cell in row.split(",")[2:]] for row in rows])
    torch.testing.assert_close(found, torch.stack([getattr(everything, name) for name in names], 1), atol=1e-6, rtol=0)


def test_curves_of_different_lengths_are_not_written(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    with pytest.raises(ValueError, match="shorter"):
        run.write_fsc(FscColumns(torch.ones(5), masked=torch.ones(4)), 3.0)
    assert not run.fsc.exists()


def test_a_discarded_run_leaves_nothing_behind(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.tensorboard.mkdir()
    run.discard()
    assert files_in(tmp_path) == []
