"""The Bootstrap stage: starts in two halves, and whether they found one structure."""

from dataclasses import replace

import pytest
import torch

from cryoai.alignment import FrameChange, change_frame
from cryoai.bootstrap import BootstrapSchedule
from cryoai.fourier import fourier_shell_correlation
from cryoai.poses import Poses
from cryoai.reconstruction import particle_mask
from cryoai.search import Candidates
from cryoai.symmetry.averaging import symmetrized_map
from cryoai.symmetry.groups import PointGroup
from cryoai.training.stages import Bootstrap, StartAgreement
from cryoai.training.stages.bootstrap import _Pair, _Start
from oracles import random_rotations
from posed_particles import (
    BOX,
    PIXEL,
    RADIUS,
    clean_images,
    finish,
    noisy,
    particles_of,
    protein,
    random_poses,
    reference_of,
)
from properties import unchanged

N, STEPS = 120, 10
SCHEDULE = BootstrapSchedule(
    n_steps=STEPS, batch_size=30, last_radius=RADIUS, n_rotations=600, shift_step_in_boxes=0.03, n_shift_steps=2
)
# Uneven on purpose: 70 in the one half and 50 in the other.
HALF_SET = (torch.arange(N) * 7 % 12 >= 7).long()


@pytest.fixture(autouse=True)
def _no_search_for_symmetry(monkeypatch, request):
    """It takes longer than all the rest of a comparison; two tests are about it."""
    if "symmetric" not in request.node.name:
        monkeypatch.setattr("cryoai.training.stages.bootstrap.find_symmetry", lambda *_maps: ())


@pytest.fixture
def _no_alignment(monkeypatch):
    """Where it does not matter how far starts agree."""
    unmoved = FrameChange(torch.eye(3), mirrored=False, shift=torch.zeros(3))
    monkeypatch.setattr("cryoai.training.stages.bootstrap.align_maps", lambda *_maps, **_options: unmoved)
    monkeypatch.setattr("cryoai.training.stages.bootstrap._N_TURNS", 1)


@pytest.fixture
def images():
    return noisy(clean_images(protein(), random_poses(N)))


@pytest.fixture
def _small_halves_will_do(monkeypatch):
    monkeypatch.setattr("cryoai.training.stages.bootstrap._FEWEST_IN_A_HALF", 20)


@pytest.fixture
def _never_alike(monkeypatch):
    monkeypatch.setattr(StartAgreement, "is_one_structure", property(lambda _self: False))


C1 = PointGroup.named("C1")


def bootstrap(images, path, *, n_starts=2, max_starts=2, max_images=100):
    return Bootstrap(
        particles_of(images, path),
        HALF_SET,
        SCHEDULE,
        C1,
        n_starts=n_starts,
        max_starts=max_starts,
        max_images=max_images,
        generator=torch.Generator().manual_seed(0),
    )


# ------------------------------------------------------------------------------ how many starts, and of what


@pytest.mark.usefixtures("_never_alike", "_no_alignment")
@pytest.mark.parametrize(("n_starts", "max_starts", "n_steps"), [(1, 1, STEPS), (1, 2, 4 * STEPS), (2, 3, 5 * STEPS)])
def test_as_long_as_no_two_agree_more_and_longer_starts_are_made(images, tmp_path, n_starts, max_starts, n_steps):
    stage = bootstrap(images, tmp_path / "images", n_starts=n_starts, max_starts=max_starts)
    made = []
    while not stage.finished:
        made.append(stage.step())
        assert 0 <= stage.progress <= 1
    assert stage.progress == 1
    assert len(made) == n_steps
    assert [m.start for m in made] == sorted(m.start for m in made)
    assert made[-1].start == max_starts
    assert made[-1].band_limit == RADIUS
    result = stage.result()
    assert (result.start_agreement is None) == (max_starts == 1)
    assert result.reference.max_radius == RADIUS


@pytest.mark.usefixtures("_no_alignment")
def test_starts_that_agree_are_the_last(images, tmp_path, monkeypatch):
    monkeypatch.setattr(StartAgreement, "is_one_structure", property(lambda _self: True))
    stage = bootstrap(images, tmp_path / "images", max_starts=6)
    assert finish(stage).start == 2


def test_held_out_particles_are_never_drawn_and_no_more_are_read_than_allowed(images, tmp_path):
    stage = bootstrap(images, tmp_path / "images", n_starts=1, max_starts=1, max_images=60)
    (drawn,) = stage.subsets
    assert torch.equal(stage.search.subset, drawn)
    assert not torch.isin(stage.held_out, drawn).any()
    assert len(stage.held_out) + len(drawn) == 60
    assert len(stage.held_out) == 20


@pytest.mark.usefixtures("_no_alignment")
def test_a_set_too_small_to_be_divided_is_seen_whole_by_every_start_and_the_likeliest_wins(images, tmp_path):
    stage = bootstrap(images, tmp_path / "images", max_starts=3)
    finish(stage)
    assert len(stage.subsets) == 1
    assert len(HALF_SET[stage.subsets[0]].unique()) == 2
    result = stage.result()
    assert result.half_references is None
    likeliest = max(stage.ended, key=lambda start: float(start.held_out.log_likelihoods.mean()))
    assert result.reference is likeliest.reference


@pytest.mark.parametrize(("n_starts", "n_needed", "divided"), [(2, 29, True), (2, 30, False), (1, 1, False)])
def test_a_set_is_divided_if_both_halves_are_large_enough_and_there_are_two_starts(
    images, tmp_path, monkeypatch, n_starts, n_needed, divided
):
    monkeypatch.setattr("cryoai.training.stages.bootstrap._FEWEST_IN_A_HALF", n_needed)
    stage = bootstrap(images, tmp_path / "images", n_starts=n_starts)
    n_of_each = [int((HALF_SET[torch.cat(stage.subsets)] == half).sum()) for half in (0, 1)]
    assert min(n_of_each) == 29
    assert len(stage.subsets) == (2 if divided else 1)


@pytest.mark.usefixtures("_small_halves_will_do", "_no_alignment")
@pytest.mark.parametrize("changed", [0, 1])
def test_a_start_sees_the_images_of_its_half_and_no_other(images, tmp_path, changed):
    """To the last bit, the noise of the images included."""
    other = torch.where((changed == HALF_SET)[:, None], 3 * images.roll(1, 0), images)
    stages = [bootstrap(pixels, tmp_path / name) for pixels, name in ((images, "plain"), (other, "changed"))]
    for stage in stages:
        for half in (0, 1):
            assert (HALF_SET[stage.subsets[half]] == half).all()
        finish(stage)
    plain, altered = ([start.reference for start in stage.ended] for stage in stages)
    assert [start.half for start in stages[0].ended] == [0, 1]
    assert torch.equal(plain[1 - changed].density, altered[1 - changed].density)
    assert torch.equal(plain[1 - changed].noise.variance, altered[1 - changed].noise.variance)
    assert not torch.equal(plain[changed].density, altered[changed].density)


@pytest.mark.usefixtures("_small_halves_will_do", "_never_alike", "_no_alignment")
def test_later_starts_see_the_halves_by_turns_and_are_compared_with_those_of_the_other(images, tmp_path):
    stage = bootstrap(images, tmp_path / "images", max_starts=4)
    finish(stage)
    assert [start.half for start in stage.ended] == [0, 1, 0, 1]
    assert len(stage.pairs) == 4
    assert all({pair.first.half, pair.second.half} == {0, 1} for pair in stage.pairs)
    result = stage.result()
    best = max(stage.pairs, key=lambda pair: pair.agreement.poses + pair.agreement.maps)
    assert result.start_agreement is best.agreement
    assert result.reference is best.first.reference
    assert result.reference is result.half_references[best.first.half]


# ------------------------------------------------------------------------------ two starts side by side


def start(density, rotations, half, log_likelihood=0.0):
    n = len(rotations)
    poses = Poses(rotations[:, None].float(), torch.zeros(n, 1, 2))
    return _Start(reference_of(density), Candidates(poses, torch.full((n, 1), log_likelihood)), half)


FRAME = FrameChange(random_rotations(1, seed=5)[0].float(), mirrored=True, shift=torch.tensor([1.5, -1.0, 0.5]))


@pytest.mark.parametrize(
    ("mirrored", "half_of_likelier", "likelier_comes_first"), [(False, 0, True), (True, 1, True), (True, 0, False)]
)
def test_the_less_likely_map_is_turned_as_a_whole_to_the_frame_of_the_other(
    mirrored, half_of_likelier, likelier_comes_first
):
    """It was made elsewhere in space, and of the other hand."""
    frame = replace(FRAME, mirrored=mirrored)
    poses = random_poses(100)
    there = frame.of_poses(Poses(poses.rotations, torch.zeros(100, 2)))
    likelier = start(protein(), poses.rotations, half_of_likelier, 5.0)
    other = start(change_frame(protein(), frame), there.rotations, 1 - half_of_likelier, 4.0)
    with unchanged(likelier.reference, other.reference):
        pair = _Pair.of(*((likelier, other) if likelier_comes_first else (other, likelier)), PIXEL, C1)
    assert pair.agreement.poses == 1
    assert pair.agreement.maps > 0.9
    assert pair.agreement.is_one_structure
    references = pair.half_references()
    assert references[half_of_likelier] is likelier.reference
    moved, mask = references[1 - half_of_likelier].density, particle_mask(BOX)
    assert fourier_shell_correlation(moved * mask, protein() * mask)[1 : RADIUS + 1].min() > 0.97


def test_the_agreement_of_poses_is_the_share_of_particles_posed_alike():
    rotations = random_rotations(200)
    other = rotations.clone()
    # Flipped about the view's x axis: 180 degrees away, whatever the frame.
    other[:50] = other[:50] @ torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    pair = _Pair.of(start(protein(), rotations, 0), start(protein(), other, 1), PIXEL, C1)
    assert pair.agreement.poses == pytest.approx(0.75, abs=0.02)
    assert pair.agreement.maps > 0.9


# Rings of many units are not found, and must be asked for.
@pytest.mark.parametrize(("name", "asked"), [("C3", "C1"), ("D2", "C1"), ("D2", "D2"), ("C12", "C12")])
def test_of_a_symmetric_molecule_equivalent_poses_count_as_alike(name, asked):
    group = PointGroup.named(name)
    density = symmetrized_map(protein(), group)
    # Its axes are where a start left them.
    turned = change_frame(density, replace(FRAME, mirrored=False))
    turn = FRAME.rotation.double()
    rotations = turn @ random_rotations(200)
    operators = group.operators.double()[torch.arange(200) % len(group)]
    other = turn @ operators @ turn.T @ rotations
    pair = _Pair.of(start(turned, rotations, 0), start(turned, other, 1), PIXEL, PointGroup.named(asked))
    assert pair.agreement.poses > 0.95


def blob(seed):
    """A positive map of nothing, as a start from images of noise ends with: smooth, in the middle of its box."""
    noise = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))
    spectrum = torch.fft.fftn(noise)
    k = torch.fft.fftfreq(BOX) * BOX
    radius = (k[:, None, None] ** 2 + k[:, None] ** 2 + k**2).sqrt()
    return torch.fft.ifftn(spectrum * (radius <= RADIUS)).real.clamp_min(0) * particle_mask(BOX)


@pytest.mark.parametrize("seed", range(3))
def test_maps_of_noise_with_poses_of_their_own_are_not_one_structure(seed):
    first, second = (start(blob(10 * seed + i), random_rotations(200, 2 * seed + i), i) for i in (0, 1))
    agreement = _Pair.of(first, second, PIXEL, C1).agreement
    assert agreement.poses < 0.2
    assert agreement.maps < 0.6
    assert not agreement.is_one_structure


def test_different_proteins_with_poses_of_their_own_are_not_one_structure():
    pair = _Pair.of(
        start(protein(0), random_rotations(200), 0), start(protein(1), random_rotations(200, 1), 1), PIXEL, C1
    )
    assert not pair.agreement.is_one_structure
