"""What is thought of a run, from what was measured of it."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoai.commands.running import EXIT_STATUS
from cryoai.validation.defects import MapDefect
from cryoai.verdict import Evidence, judge

GOOD = Evidence(
    starts_agree=True,
    halves_are_independent=True,
    n_resolved_shells=20,
    better_than_noise=0.99,
    found_of_synthetic=0.98,
    misfit=-0.3,
    sure=0.95,
    orientations_are_preferred=False,
    orientations_are_collapsed=False,
    resolution_is_anisotropic=False,
    cone_area_ratio=0.9,
    defects=(),
    contrast_is_clear=True,
    likely_symmetry=None,
)
# One thing that is not good, what is said of it, and whether it alone makes a run a failure.
ALONE = {
    "one start": ({"starts_agree": None}, "found once, from one start", False),
    "starts disagree": ({"starts_agree": False}, "no two of the independent starts found the same", True),
    "halves began with one map": ({"halves_are_independent": False}, "began with one map", False),
    "hardly better than noise": ({"better_than_noise": 0.24}, "only 24% of the particles fit the map better", True),
    "not much better than noise": ({"better_than_noise": 0.59}, "only 59% of the particles fit the map better", False),
    "synthetic ones not found": ({"found_of_synthetic": 0.3}, "of this very map only 30% were posed rightly", False),
    "fit is worse": ({"misfit": -2.34}, "fit the map 2.3 standard deviations worse", False),
    "given halves are new": ({"given_halves_are_new": True}, "the half sets were drawn anew", False),
    "few poses are sure": ({"sure": 0.4}, "only 40% of the poses are more likely right", False),
    "no shell": ({"n_resolved_shells": 0}, "agree in 0 shells only", True),
    "three shells": ({"n_resolved_shells": 3}, "agree in 3 shells only", True),
    "poses collapsed": ({"orientations_are_collapsed": True}, "given the same few orientations", False),
    "preferred and anisotropic": (
        {"orientations_are_preferred": True, "resolution_is_anisotropic": True, "cone_area_ratio": 0.41},
        "the orientations are preferred so much that the resolution differs by direction (area ratio 0.41)",
        False,
    ),
    "very anisotropic": (
        {"resolution_is_anisotropic": True, "cone_area_ratio": 0.12},
        "the resolution differs by direction (area ratio 0.12)",
        False,
    ),
    "contrast": ({"contrast_is_clear": False}, "whether protein is bright or dark", False),
    "symmetry": ({"symmetry_asked": "D2", "symmetry_share": 0.77}, "before D2 was imposed, only 77% of", False),
    "symmetry never seen": ({"symmetry_asked": "C7"}, "C7 was imposed, and before too little was seen", False),
} | {defect.name: ({"defects": (defect,)}, defect.value, False) for defect in MapDefect}
HARMLESS = [
    {"misfit": -1.9},
    {"misfit": 3.0},
    {"better_than_noise": 0.6},
    {"found_of_synthetic": 0.5},
    {"sure": 0.5},
    {"n_resolved_shells": 4},
    {"symmetry_asked": "C4", "symmetry_share": 0.97},
    {"likely_symmetry": "D2"},
    {"orientations_are_preferred": True},
    {"orientations_are_preferred": True, "cone_area_ratio": 0.3},
    {"resolution_is_anisotropic": True, "cone_area_ratio": 0.5},
    # Without Refinement nothing was rehearsed.
    {"better_than_noise": None, "found_of_synthetic": None, "misfit": None, "sure": None},
]


def test_a_run_without_a_doubt_is_solved():
    verdict = judge(GOOD)
    assert (verdict.status, verdict.doubts, verdict.reasons) == ("solved", (), ())


@pytest.mark.parametrize("change", HARMLESS, ids=str)
def test_what_is_good_enough_is_solved(change):
    assert judge(replace(GOOD, **change)).status == "solved"


@pytest.mark.parametrize("case", ALONE)
def test_every_doubt_is_raised_by_itself_and_says_what_to_do(case):
    change, words, is_fatal = ALONE[case]
    verdict = judge(replace(GOOD, **change))
    assert len(verdict.doubts) == len(verdict.reasons) == 1
    assert verdict.doubts[0].is_fatal == is_fatal
    assert verdict.status == ("failed" if is_fatal else "ambiguous")
    what, _, advice = verdict.reasons[0].partition("; ")
    assert words in what
    assert len(advice) > 15
    assert "\n" not in verdict.reasons[0]


def test_every_shape_that_failures_have_has_its_own_words_and_two_their_own_advice():
    reasons = [judge(replace(GOOD, defects=(defect,))).reasons[0] for defect in MapDefect]
    assert len(set(reasons)) == len(MapDefect)
    assert "larger box" in judge(replace(GOOD, defects=(MapDefect.BOX_TOO_SMALL,))).reasons[0]
    assert "--contrast" in judge(replace(GOOD, defects=(MapDefect.NEGATIVE_CONTRAST,))).reasons[0]


def test_the_gravest_reasons_come_first_and_the_others_in_the_order_in_which_things_are_asked():
    changes = [ALONE[case][0] for case in ("one start", "contrast", "few poses are sure", "three shells")]
    first, second = tuple(MapDefect)[:2]
    changes += [ALONE["hardly better than noise"][0], ALONE["symmetry"][0], {"defects": (first, second)}]
    verdict = judge(replace(GOOD, **{name: value for change in changes for name, value in change.items()}))
    assert verdict.status == "failed"
    expected = [
        "only 24% of the particles",
        "the half maps agree in 3 shells",
        "the structure was found once",
        "only 40% of the poses",
        f"the map shows a known failure: {first.value}",
        f"the map shows a known failure: {second.value}",
        "the images do not say clearly",
        "before D2 was imposed",
    ]
    assert len(verdict.reasons) == len(expected)
    assert all(reason.startswith(words) for reason, words in zip(verdict.reasons, expected, strict=True))
    assert [doubt.is_fatal for doubt in verdict.doubts] == [True] * 2 + [False] * 6


def test_a_map_of_which_no_pose_is_right_is_a_failure():
    none = replace(GOOD, sure=0.0, found_of_synthetic=0.01)
    assert judge(none).status == "failed"
    # There is nothing to export.
    assert not any("--keep-confident" in reason for reason in judge(none).reasons)
    assert judge(replace(none, sure=0.06)).status == judge(replace(none, found_of_synthetic=0.06)).status == "ambiguous"
    assert "--keep-confident" in judge(replace(GOOD, sure=0.3)).reasons[0]


def test_where_poses_were_given_nothing_is_said_of_starts():
    given_poses = replace(GOOD, starts_agree=None, halves_are_independent=False, poses_were_given=True)
    assert judge(given_poses).status == "solved"
    few = judge(replace(given_poses, sure=0.1))
    assert few.status == "ambiguous"
    assert "cryoai reconstruct" in few.reasons[0]
    assert "cryoai reconstruct" not in judge(replace(GOOD, sure=0.1)).reasons[0]


SHARES = st.one_of(st.none(), st.floats(0, 1))
EVIDENCE = st.builds(
    Evidence,
    starts_agree=st.sampled_from([True, False, None]),
    halves_are_independent=st.booleans(),
    n_resolved_shells=st.integers(0, 60),
    better_than_noise=SHARES,
    found_of_synthetic=SHARES,
    misfit=st.one_of(st.none(), st.floats(-30, 5)),
    sure=SHARES,
    orientations_are_preferred=st.booleans(),
    orientations_are_collapsed=st.booleans(),
    resolution_is_anisotropic=st.booleans(),
    cone_area_ratio=st.floats(0, 1),
    defects=st.lists(st.sampled_from(MapDefect), unique=True).map(tuple),
    contrast_is_clear=st.booleans(),
    likely_symmetry=st.sampled_from([None, "C3"]),
    symmetry_asked=st.just("C3"),
    symmetry_share=SHARES,
    poses_were_given=st.booleans(),
    given_halves_are_new=st.booleans(),
)


@given(EVIDENCE)
def test_whatever_else_is_true_nothing_is_solved_that_was_not_found_twice_independently(evidence):
    verdict = judge(evidence)
    if not evidence.poses_were_given:
        if evidence.starts_agree is False:
            assert verdict.status == "failed"
        if verdict.status == "solved":
            assert evidence.starts_agree
            assert evidence.halves_are_independent
    better = evidence.better_than_noise
    if evidence.n_resolved_shells < 4 or (better is not None and better < 0.25):
        assert verdict.status == "failed"
    assert (verdict.status == "solved") == (not verdict.doubts)
    assert (verdict.status == "failed") == any(doubt.is_fatal for doubt in verdict.doubts)
    ranks = [not doubt.is_fatal for doubt in verdict.doubts]
    assert ranks == sorted(ranks)
    assert len(set(verdict.reasons)) == len(verdict.reasons)


def test_all_evidence_counts_or_is_named():
    """Each field changes a verdict or its words in one of the cases above, or is there to be told only."""
    told_only = {"likely_symmetry"}
    changed = {name for change, _, _ in ALONE.values() for name in change} | {"poses_were_given"}
    assert {field.name for field in fields(Evidence)} == changed | told_only


def test_each_verdict_has_an_exit_status_and_only_solved_is_success():
    assert EXIT_STATUS == {"solved": 0, "ambiguous": 3, "failed": 1}
