"""Two results side by side: whose particles are the same, in which frame they agree, and how well."""

import csv
import json
import math
import pickle
import shutil
import struct

import numpy as np
import pytest
import roma
import torch
from scipy.spatial.transform import Rotation

from cryoai.alignment import FrameChange
from cryoai.comparison import compare, compare_maps
from cryoai.formats.mrc import MrcMap, read_map, write_map
from cryoai.formats.table import ImageReferences
from cryoai.image_matching import ListedImages, match_images
from cryoai.pose_files import pose_columns
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.report.comparison_figure import draw_comparison
from cryoai.runs import RunFolder
from oracles import GaussianPhantom, random_rotations
from properties import unchanged
from stacks import files_in, particle_columns, refusal, write_images, write_star

N, PIXEL = 200, 3.0
hands = pytest.mark.parametrize("mirrored", [False, True])


@pytest.fixture
def helix():
    """A helix of Gaussians that a mirror makes another one: one turn and a half, heavier at one end."""
    turn = torch.linspace(0, 3 * math.pi, 10, dtype=torch.float64)
    centres = torch.stack([4.5 * turn.cos(), 4.5 * turn.sin(), 1.1 * turn - 5], dim=1)
    return GaussianPhantom(centres, 0.6 + 0.1 * turn, torch.full((10,), 1.3, dtype=torch.float64))


def truth(n=N):
    return Poses(random_rotations(n).float(), 4 * torch.randn(n, 2))


def perturbed(poses, degrees, angstroms):
    """The poses off by so much each (N,), in random directions."""
    n = len(poses)
    axes, directions = torch.randn(n, 3), torch.randn(n, 2)
    turns = roma.rotvec_to_rotmat(torch.deg2rad(degrees)[:, None] * axes / axes.norm(dim=1, keepdim=True))
    moves = angstroms[:, None] * directions / directions.norm(dim=1, keepdim=True)
    return Poses(turns @ poses.rotations, poses.shifts_in_angstroms + moves)


def some_frame(mirrored):
    return FrameChange(random_rotations(1, 7)[0].float(), mirrored, torch.tensor([8.0, -5.0, 11.0]))


def image_names(n=N, stack="images.mrcs"):
    return [f"{i + 1:06d}@{stack}" for i in range(n)]


def write_poses(path, poses, names, rows=None):
    """A STAR file with some of the rows of poses (N,), in that order."""
    rows = range(len(poses)) if rows is None else rows
    angles, origins = (x[list(rows)].astype(str) for x in vars(pose_columns(poses)).values())
    columns = particle_columns(len(angles)) | {"rlnImageName": [names[row] for row in rows]}
    columns |= dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles.T.tolist(), strict=True))
    columns |= dict(zip(("rlnOriginXAngst", "rlnOriginYAngst"), origins.T.tolist(), strict=True))
    return write_star(path, columns)


def write_pickle(path, poses, extent):
    value = poses.rotations.transpose(-1, -2).numpy()
    if extent is not None:
        value = (value, (poses.shifts_in_angstroms / extent).numpy())
    path.write_bytes(pickle.dumps(value))
    return path


def write_dataset(path, poses, names, pixel_size=1.5):
    fields = [("uid", "<u8"), ("blob/path", "S80"), ("blob/idx", "<u4"), ("alignments3D/pose", "<f4", (3,))]
    fields += [("alignments3D/shift", "<f4", (2,)), ("alignments3D/psize_A", "<f4")]
    records = np.zeros(len(poses), dtype=fields)
    records["uid"] = np.arange(len(poses)) + 7
    records["blob/idx"] = [int(name.partition("@")[0]) - 1 for name in names]
    records["blob/path"] = [name.partition("@")[2].encode() for name in names]
    records["alignments3D/pose"] = Rotation.from_matrix(poses.rotations.double().numpy()).as_rotvec()
    records["alignments3D/shift"] = poses.shifts_in_angstroms / pixel_size
    records["alignments3D/psize_A"] = pixel_size
    with path.open("wb") as file:
        np.save(file, records, allow_pickle=False)
    return path


# ------------------------------------------------------------------------------ the same images


def listed(*names, path="p"):
    numbers, _, stacks = zip(*(name.partition("@") for name in names), strict=True)
    known = tuple(dict.fromkeys(stacks))
    references = ImageReferences(
        known, np.array([known.index(s) for s in stacks], np.int32), np.array([int(i) - 1 for i in numbers], np.int32)
    )
    return ListedImages(path, len(names), references)


def pairs(first, second):
    matching = match_images(first, second)
    assert matching.by_name
    assert matching.n_only_in_first == first.n_rows - len(matching)
    assert matching.n_only_in_second == second.n_rows - len(matching)
    return list(zip(matching.first.tolist(), matching.second.tolist(), strict=True))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # The row means nothing, the number and the stack everything.
        (["1@a.mrcs", "2@a.mrcs", "1@b.mrcs"], ["1@b.mrcs", "2@a.mrcs", "1@a.mrcs"], [(0, 2), (1, 1), (2, 0)]),
        (["1@a.mrcs", "2@a.mrcs", "5@a.mrcs"], ["7@a.mrcs", "000005@a.mrcs"], [(2, 1)]),
        # Folders, the mark of cryoSPARC and RELION's suffix do not matter.
        (["1@Extract/job7/mic/a.mrcs"], ["1@/data/project/Extract/job7/mic/a.mrcs"], [(0, 0)]),
        (["1@Extract/job7/mic/a.mrcs"], ["1@elsewhere/a.mrcs"], [(0, 0)]),
        (["3@>J7/extract/a.mrc"], ["3@J7/extract/a.mrcs"], [(0, 0)]),
        (["3@./J7/a.mrc"], ["3@J7//a.mrc"], [(0, 0)]),
        # The full name comes first: another of that file name is another stack.
        (["1@x/a.mrcs"], ["1@y/a.mrcs", "1@x/a.mrcs"], [(0, 1)]),
        (["1@x/a.mrcs", "1@z/a.mrcs"], ["1@y/a.mrcs", "1@x/a.mrcs"], [(0, 1), (1, 0)]),
        # Folders tell apart what file names do not, from whatever folder they start.
        (["1@1/a.mrcs", "1@2/a.mrcs"], ["1@p/2/a.mrcs", "1@p/1/a.mrcs"], [(0, 1), (1, 0)]),
        # One stack under two names.
        (["1@>J7/a.mrc", "2@J7/a.mrc"], ["2@J7/a.mrc", "1@J7/a.mrc"], [(0, 1), (1, 0)]),
    ],
)
def test_images_are_found_by_their_names(first, second, expected):
    assert pairs(listed(*first), listed(*second)) == expected
    assert sorted(pairs(listed(*second), listed(*first))) == sorted((b, a) for a, b in expected)


def test_stacks_that_cannot_be_told_apart_are_left_out_and_counted():
    matching = match_images(
        listed("1@x/a.mrcs", "1@y/a.mrcs", "1@b.mrcs"), listed("1@b.mrcs", "1@v/a.mrcs", "1@w/a.mrcs")
    )
    assert (matching.first.tolist(), matching.second.tolist()) == ([2], [0])
    assert (matching.n_only_in_first, matching.n_only_in_second, matching.n_ambiguous) == (2, 2, 2)
    assert "2 stacks left out" in str(matching)


def test_very_many_images_in_any_order_are_found():
    n = 300_000
    random = np.random.default_rng(0)
    names = tuple(f"folder/mic_{i:04d}.mrcs" for i in range(3000))
    stack, index = np.divmod(np.arange(n), 100)
    order = random.permutation(n)[: n // 2]
    first = ListedImages("a", n, ImageReferences(names, stack.astype(np.int32), index.astype(np.int32)))
    moved = tuple(f"/other/{name}" for name in names)
    second = ListedImages(
        "b", len(order), ImageReferences(moved, stack[order].astype(np.int32), index[order].astype(np.int32))
    )
    matching = match_images(first, second)
    assert np.array_equal(matching.first, np.sort(order))
    assert np.array_equal(order[matching.second], matching.first)


def test_images_that_no_file_shares_or_that_one_lists_twice_are_refused():
    assert "b.mrcs" in refusal(match_images, listed("1@a.mrcs"), listed("1@b.mrcs"))
    assert "shares no image" in refusal(match_images, listed("1@a.mrcs"), listed("2@a.mrcs"))
    message = refusal(match_images, listed("1@a.mrcs"), listed("1@a.mrcs", "2@a.mrcs", "1@a.mrcs", path="q"))
    assert message.startswith("q: rows 1 and 3 are both 1@a.mrcs")


# ------------------------------------------------------------------------------ poses


@hands
def test_particles_are_compared_by_name_in_whatever_order_and_frame_they_come(tmp_path, mirrored):
    reference = truth()
    # The error of a particle is in its number, so that a mistaken row shows.
    degrees, angstroms = torch.linspace(0.5, 4.5, N), torch.linspace(0.2, 1.8, N)
    found = some_frame(mirrored).of_poses(perturbed(reference, degrees, angstroms))
    rows = np.random.default_rng(0).permutation(N)[:150]
    first = write_poses(tmp_path / "a.star", found, image_names(stack="job1/images.mrcs"), rows)
    second = write_poses(tmp_path / "b.star", reference, image_names(stack="/data/images.mrcs"), range(20, N))
    comparison = compare(first, second)
    poses = comparison.poses
    kept = [row for row in rows if row >= 20]
    assert poses.images == [f"{row + 1}@job1/images.mrcs" for row in kept]
    assert (len(poses.matching), poses.matching.n_only_in_first) == (len(kept), 150 - len(kept))
    assert poses.matching.n_only_in_second == N - 20 - len(kept)
    assert comparison.frame.mirrored == mirrored
    # r = J Q^T r' undoes r' = Q J r, and J Q^T = (J Q^T J) J.
    back = some_frame(mirrored).rotation.T
    signs = torch.tensor([1.0, 1.0, -1.0])
    back = signs[:, None] * back * signs if mirrored else back
    assert angular_distance_in_degrees(comparison.frame.rotation, back) < 0.5
    # The frame itself is only known to some tenths.
    assert (poses.rotation_errors_in_degrees - degrees[kept]).abs().median() < 0.3
    assert (poses.shift_errors_in_angstroms - angstroms[kept]).abs().median() < 0.2
    assert poses.errors.median_rotation_error_in_degrees == pytest.approx(2.5, abs=0.4)
    assert poses.errors.within_5_degrees > 0.97
    assert comparison.maps is None


def test_the_frame_is_that_which_brings_the_first_onto_the_second(tmp_path):
    first, names = truth(), image_names()
    frame = some_frame(True)
    write_poses(tmp_path / "a.star", first, names)
    write_poses(tmp_path / "b.star", frame.of_poses(first), names)
    found = compare(tmp_path / "a.star", tmp_path / "b.star").frame
    assert found.mirrored
    assert angular_distance_in_degrees(found.rotation, frame.rotation) < 0.1
    assert (found.shift - frame.shift).norm() < 0.05


def test_what_is_said_is_what_is_found(tmp_path):
    poses = truth()
    write_poses(tmp_path / "a.star", poses, image_names())
    away = torch.tensor([0.0, 7.0, 60.0]).repeat_interleave(torch.tensor([120, 40, 40]))
    write_poses(tmp_path / "b.star", perturbed(poses, away, torch.zeros(N)), image_names())
    comparison = compare(tmp_path / "a.star", tmp_path / "b.star")
    report = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    assert report["poses"]["n_matched"] == N
    assert report["poses"]["matched_by"] == "image name"
    assert report["poses"]["within_5_degrees"] == pytest.approx(0.6)
    assert report["poses"]["within_10_degrees"] == pytest.approx(0.8)
    assert report["frame"]["mirrored"] is False
    assert np.array(report["frame"]["rotation"]) == pytest.approx(np.eye(3), abs=0.01)
    assert "map" not in report
    text = str(comparison)
    assert "200 in both, by image name" in text
    assert "60.0%" in text
    assert "the same" in text
    comparison.write_csv(tmp_path / "errors.csv")
    with (tmp_path / "errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "rotation_error_in_degrees", "shift_error_in_angstroms"]
    assert [row["image"] for row in rows] == [f"{i + 1}@images.mrcs" for i in range(N)]
    assert float(rows[130]["rotation_error_in_degrees"]) == pytest.approx(7, abs=0.2)
    assert float(rows[130]["shift_error_in_angstroms"]) < 0.1


def test_particles_that_a_run_set_aside_are_not_compared(tmp_path):
    poses, aside = truth(), [3, 50, 51]
    reference = write_poses(tmp_path / "b.star", poses, image_names(), range(N)[::-1])
    rotations = poses.rotations.clone()
    rotations[aside] = torch.eye(3)
    first = write_poses(tmp_path / "a.star", Poses(rotations, poses.shifts_in_angstroms), image_names())
    lines = first.read_text().replace("_rlnImageName #1", "_rlnImageName #1\n_cryoaiQuarantined #2").splitlines()
    for i, line in enumerate(lines):
        name, _, rest = line.partition(" ")
        if "@" in name:
            lines[i] = f"{name} {int(int(name[:6]) - 1 in aside)} {rest}"
    first.write_text("\n".join(lines) + "\n")
    for comparison in (compare(first, reference), compare(reference, first)):
        assert len(comparison.poses.matching) == N - 3
        assert comparison.poses.matching.n_without_pose == 3
        assert comparison.poses.rotation_errors_in_degrees.max() < 0.2
        assert not {f"{i + 1}@images.mrcs" for i in aside} & set(comparison.poses.images)
        assert "3 left out, whose image was unusable" in str(comparison)


def test_poses_that_have_nothing_in_common_say_nothing_of_a_hand(tmp_path):
    write_poses(tmp_path / "a.star", truth(), image_names())
    write_poses(tmp_path / "b.star", Poses(random_rotations(N, 5).float(), torch.zeros(N, 2)), image_names())
    assert "hand        not known" in str(compare(tmp_path / "a.star", tmp_path / "b.star"))


def test_a_cryosparc_dataset_is_compared_by_the_names_of_its_images(tmp_path):
    poses = truth()
    first = write_poses(tmp_path / "a.star", poses, image_names(stack="job/images.mrcs"), range(N)[::-1])
    second = write_dataset(tmp_path / "b.cs", poses, image_names(stack=">J7/imported/images.mrc"))
    comparison = compare(first, second)
    assert len(comparison.poses.matching) == N
    assert comparison.poses.matching.by_name
    assert comparison.poses.errors.median_rotation_error_in_degrees < 0.1
    assert comparison.poses.errors.median_shift_error_in_angstroms < 0.01


def test_images_named_in_a_passthrough_file_only_are_found_there(tmp_path):
    poses = truth()
    whole = np.load(write_dataset(tmp_path / "whole.cs", poses, image_names()))
    names = list(whole.dtype.names)
    for file, fields in (("poses", [n for n in names if "blob" not in n]), ("passthrough", names[:3])):
        part = np.empty(N, dtype=[(name, whole.dtype[name]) for name in fields])
        for name in fields:
            part[name] = whole[name]
        np.save(tmp_path / file, part if file == "poses" else part[::-1])
        (tmp_path / f"{file}.npy").rename(tmp_path / f"{file}.cs")
    star = write_poses(tmp_path / "a.star", poses, image_names())
    assert "--passthrough" in refusal(compare, star, tmp_path / "poses.cs")
    comparison = compare(star, tmp_path / "poses.cs", passthrough=[tmp_path / "passthrough.cs"])
    assert len(comparison.poses.matching) == N
    assert comparison.poses.errors.within_5_degrees == 1


# ------------------------------------------------------------------------------ poses without names


def test_a_pickle_is_compared_row_by_row_and_that_is_said(tmp_path):
    poses = truth()
    star = write_poses(tmp_path / "a.star", poses, image_names())
    file = write_pickle(tmp_path / "b.pkl", poses, 96.0)
    comparison = compare(star, file, extent_in_angstroms=96.0)
    assert "row order, since not both files name their images" in str(comparison)
    assert comparison.as_json()["poses"]["matched_by"] == "row order"
    assert comparison.poses.errors.within_5_degrees == 1
    assert comparison.poses.errors.median_shift_error_in_angstroms < 0.01
    assert comparison.poses.images[3] == "4@images.mrcs"
    # Names are there if one of the two has them.
    assert compare(file, star, extent_in_angstroms=96.0).poses.images[3] == "4@images.mrcs"
    assert compare(file, file, extent_in_angstroms=96.0).poses.images[3] == "row 4"
    fewer = write_poses(tmp_path / "c.star", poses, image_names(), range(N - 1))
    message = refusal(compare, file, fewer, extent_in_angstroms=96.0)
    assert "200 particles" in message
    assert "199" in message
    assert "b.pkl names no images" in message


def test_the_side_of_the_box_comes_from_the_images_the_run_or_the_user(tmp_path):
    poses, box = truth(40), 32
    names = image_names(40)
    star = write_poses(tmp_path / "a.star", poses, names)
    file = write_pickle(tmp_path / "b.pkl", poses, box * PIXEL)
    assert "--extent" in refusal(compare, star, file)
    assert "--extent" in refusal(compare, file, file)
    write_images(tmp_path / "images.mrcs", torch.randn(40, box, box))
    assert compare(star, file).poses.errors.median_shift_error_in_angstroms < 0.01
    (tmp_path / "images.mrcs").unlink()
    run = RunFolder.create(tmp_path / "run")
    shutil.copy(star, run.particles)
    run.write_json(run.summary, {"n_particles": 40})
    run.write_map(run.map, torch.randn(16, 16, 16), 2 * PIXEL)
    assert compare(run.path, file).poses.errors.median_shift_error_in_angstroms < 0.01
    assert compare(star, file, extent_in_angstroms=2 * box * PIXEL).poses.errors.median_shift_error_in_angstroms > 1
    rotations_only = write_pickle(tmp_path / "c.pkl", poses, None)
    assert compare(star, rotations_only).poses.errors.within_5_degrees == 1


# ------------------------------------------------------------------------------ maps


def write_phantom(path, phantom, n, pixel_size, frame=None):
    if frame is not None:
        phantom = phantom.moved(frame.rotation, frame.mirrored, frame.shift / pixel_size)
    write_map(path, phantom.density(n).float().numpy(), pixel_size)
    return path


@hands
@pytest.mark.parametrize("n", [28, 29])
def test_maps_are_aligned_and_compared_at_both_hands(helix, tmp_path, mirrored, n):
    frame = FrameChange(random_rotations(1, 3)[0].float(), mirrored, torch.tensor([4.0, -3.0, 2.0]))
    first = write_phantom(tmp_path / "a.mrc", helix, n, PIXEL)
    second = write_phantom(tmp_path / "b.mrc", helix, n, PIXEL, frame)
    comparison = compare(first, second)
    maps = comparison.maps
    assert comparison.poses is None
    assert comparison.frame.mirrored == mirrored
    assert angular_distance_in_degrees(comparison.frame.rotation, frame.rotation) < 0.5
    assert (comparison.frame.shift - frame.shift).norm() < 0.2
    assert (maps.best.errors.fsc[:9] > 0.99).all()
    assert maps.best.correlation > 0.99
    assert maps.other_hand.frame.mirrored != mirrored
    assert maps.other_hand.correlation < maps.best.correlation
    assert maps.other_hand.errors.fsc[3:8].mean() < 0.9
    report = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    assert report["map"]["aligned_by"] == "map"
    assert report["map"]["resolution_at_fsc_0.5"] <= n * PIXEL / 8
    assert report["map"]["other_hand"]["mirrored"] != mirrored
    assert len(report["map"]["fsc"]) == n // 2 + 1
    assert ("opposite" in str(comparison)) == mirrored
    assert "no particles" in refusal(comparison.write_csv, tmp_path / "errors.csv")
    assert files_in(tmp_path) == ["a.mrc", "b.mrc"]


def in_angstroms(phantom, pixel_size, n):
    """The map of a phantom whose lengths are in pixels of 3 Å, at another pixel size."""
    scale = PIXEL / pixel_size
    scaled = type(phantom)(phantom.centres * scale, phantom.amplitudes, phantom.widths * scale)
    return MrcMap(scaled.density(n).float().numpy(), pixel_size)


@pytest.mark.parametrize(
    ("pixel_size", "n", "expected"),
    [
        (3.0, 24, (24, 3.0)),
        # Finer pixels, a larger extent and a smaller one.
        (2.0, 48, (24, 3.0)),
        (2.2, 29, (24, 3.0)),
        (3.0, 40, (24, 3.0)),
        (4.0, 32, (32, 4.0)),
    ],
)
def test_maps_of_other_boxes_and_pixels_are_brought_to_the_coarser_grid(phantom, pixel_size, n, expected):
    first, second = in_angstroms(phantom, PIXEL, 24), in_angstroms(phantom, pixel_size, n)
    frame = FrameChange(torch.eye(3), False, torch.zeros(3))
    with unchanged(torch.from_numpy(first.density), torch.from_numpy(second.density)):
        comparison = compare_maps(first, second, frame)
    assert (comparison.n_pixels, comparison.pixel_size_in_angstroms) == pytest.approx(expected)
    assert comparison.framed_by_poses
    assert comparison.best.errors.fsc[:9].min() > 0.98
    assert comparison.best.correlation > 0.98
    assert comparison.other_hand.frame.mirrored


def test_a_large_box_is_compared_in_a_smaller_one(phantom, monkeypatch):
    monkeypatch.setattr("cryoai.comparison._LARGEST_BOX", 24)
    comparison = compare_maps(in_angstroms(phantom, 2.0, 36), in_angstroms(phantom, 2.0, 36), None)
    assert (comparison.n_pixels, comparison.pixel_size_in_angstroms) == pytest.approx((24, 3.0))
    assert comparison.best.correlation > 0.99


def test_maps_that_have_their_own_mirror_image_tell_no_hand(tmp_path):
    axis = torch.arange(24) - 12.0
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    flat = torch.exp(-(z**2) / 8 - ((x - 2) ** 2 + y**2) / 20) + torch.exp(
        -(z**2) / 8 - ((x + 2) ** 2 + (y - 4) ** 2) / 8
    )
    write_map(tmp_path / "a.mrc", flat.numpy(), PIXEL)
    assert "not known: these maps agree as well at both" in str(compare(tmp_path / "a.mrc", tmp_path / "a.mrc"))


# ------------------------------------------------------------------------------ runs


@pytest.fixture
def two_runs(helix, tmp_path):
    """Two runs of one molecule, the second mirrored, turned and moved, and not all of the same particles."""
    frame = some_frame(True)
    poses, runs = truth(), []
    for name, rows, posed, density in (
        ("a", range(N - 10), poses, helix.density(32)),
        ("b", range(5, N), frame.of_poses(poses), helix.moved(frame.rotation, True, frame.shift / PIXEL).density(32)),
    ):
        run = RunFolder.create(tmp_path / name)
        write_poses(run.particles, posed, image_names(), rows)
        run.write_map(run.map, density, PIXEL)
        run.write_json(run.summary, {"n_particles": len(rows)})
        runs.append(run)
    return runs


def test_two_runs_are_compared_by_poses_and_maps_in_the_frame_of_the_poses(two_runs):
    comparison = compare(two_runs[0].path, two_runs[1].path)
    matching = comparison.poses.matching
    assert (len(matching), matching.n_only_in_first, matching.n_only_in_second) == (N - 15, 5, 10)
    assert comparison.frame.mirrored
    assert comparison.maps.framed_by_poses
    assert comparison.maps.best.frame is comparison.frame
    assert (comparison.maps.best.errors.fsc[:9] > 0.99).all()
    assert not comparison.maps.other_hand.frame.mirrored
    assert comparison.maps.advantage_of_hand > 0.1
    text = str(comparison)
    assert "in the frame of the poses" in text
    assert "185 in both, by image name; 5 only in the first, 10 only in the second" in text


def test_of_a_run_that_is_compared_with_what_the_other_has(two_runs):
    run, other = two_runs
    assert compare(run.path, other.particles).maps is None
    maps_only = compare(run.path, other.map)
    assert maps_only.poses is None
    assert maps_only.frame.mirrored
    assert read_map(run.map).density.shape == (maps_only.maps.n_pixels,) * 3


def test_what_cannot_be_compared_is_refused_in_one_line(two_runs, tmp_path):
    run, other = two_runs
    assert "give two maps or two with poses" in refusal(compare, run.map, other.particles)
    assert "nowhere.star" in refusal(compare, run.path, tmp_path / "nowhere.star")
    assert "nowhere.mrc" in refusal(compare, run.map, tmp_path / "nowhere.mrc")
    assert "not the folder of a finished run" in refusal(compare, tmp_path, run.path)
    bare = write_star(tmp_path / "bare.star", particle_columns(5))
    assert "no poses" in refusal(compare, bare, run.path)
    two = write_poses(tmp_path / "two.star", truth(), image_names(), range(2))
    assert "shares only 2 images" in refusal(compare, two, run.particles)
    write_map(tmp_path / "flat.mrc", np.full((32, 32, 32), 2.5, np.float32), PIXEL)
    assert "all voxels of the map are 2.5" in refusal(compare, tmp_path / "flat.mrc", run.map)
    (tmp_path / "garbage.pkl").write_bytes(pickle.dumps({"poses": 3}))
    assert "garbage.pkl" in refusal(compare, tmp_path / "garbage.pkl", run.particles)


# ------------------------------------------------------------------------------ the picture


def png_size(path):
    start = path.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", start[16:24])


def test_a_picture_has_a_panel_for_all_that_was_compared(two_runs, tmp_path):
    run, other = two_runs
    (tmp_path / "pictures").mkdir()
    widths = []
    for name, first, second in (
        ("map", run.map, other.map),
        ("poses", run.particles, other.particles),
        ("all", run.path, other.path),
    ):
        path = tmp_path / "pictures" / f"{name}.png"
        draw_comparison(path, compare(first, second))
        widths.append(png_size(path)[0])
        assert path.stat().st_size > 20_000
    assert widths == sorted(set(widths))
    draw_comparison(tmp_path / "pictures" / "all.svg", compare(run.particles, run.particles))
    text = (tmp_path / "pictures" / "all.svg").read_text()
    assert text.startswith("<?xml")
    assert files_in(tmp_path / "pictures") == ["all.png", "all.svg", "map.png", "poses.png"]
    message = refusal(draw_comparison, tmp_path / "pictures" / "all.jpg", compare(run.particles, run.particles))
    assert ".png, .pdf or .svg" in message


def test_errors_that_are_all_zero_and_maps_without_a_common_shell_can_be_drawn(two_runs, tmp_path):
    run, _ = two_runs
    write_map(tmp_path / "noise.mrc", np.random.default_rng(0).normal(size=(32, 32, 32)).astype(np.float32), PIXEL)
    same, noise = compare(run.particles, run.particles), compare(run.map, tmp_path / "noise.mrc")
    assert same.poses.errors.median_rotation_error_in_degrees < 0.1
    assert math.isfinite(noise.maps.best.correlation)
    json.dumps(noise.as_json(), allow_nan=False)
    for name, comparison in (("same", same), ("noise", noise)):
        draw_comparison(tmp_path / f"{name}.png", comparison)
        assert png_size(tmp_path / f"{name}.png")[0] > 500
