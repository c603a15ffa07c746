"""Several starts of Amortized, one of which goes on."""

import math
from dataclasses import dataclass, field

import pytest

from cryoai.training.stages import Contest, Estimate
from cryoai.training.stages.amortized_state import AmortizedMetrics


@dataclass
class FixedLosses:
    """A start that is awake at every other step, with losses that are known beforehand."""

    losses: list[float]
    n_fit_steps: int = 0
    n_steps: int = 40
    steps_done: int = 0
    calls: list[int] = field(default_factory=list)

    @property
    def finished(self):
        return self.steps_done >= self.n_steps

    def step(self):
        if self.n_fit_steps:
            self.n_fit_steps -= 1
            return AmortizedMetrics(0, 5, math.nan, math.nan, 0.5)
        self.steps_done += 1
        wake = self.losses[min(self.steps_done, len(self.losses)) - 1] if self.steps_done % 2 else math.nan
        return AmortizedMetrics(self.steps_done, 5, wake, 0.1, math.nan)

    def result(self):
        return Estimate(start_agreement=self.losses[0])


def run(contest):
    made = []
    while not contest.finished:
        metrics = contest.step()
        made.append((metrics.start, metrics.step, contest.progress))
    return made


def test_the_start_with_the_lowest_loss_at_the_end_of_its_trial_goes_on():
    # The second is best at first and at the very end, which is not asked; the third at the end of the trial.
    starts = [FixedLosses([5.0] * 40), FixedLosses([0.1] * 6 + [4.0] * 2 + [0.0] * 32), FixedLosses([9.0] * 6 + [3.0])]
    contest = Contest([lambda start=start: start for start in starts])
    made = run(contest)
    assert [start.steps_done for start in starts] == [8, 8, 40]
    result = contest.result()
    assert result.start_agreement == 9.0
    assert result.start_losses == (5.0, 4.0, 3.0)
    assert [m[:2] for m in made[-33:-31]] == [(3, 8), (3, 9)]


def test_progress_only_grows_and_ends_at_one():
    contest = Contest([lambda loss=loss: FixedLosses([loss] * 40) for loss in (2.0, 1.0, 3.0)])
    progress = [made[2] for made in run(contest)]
    assert progress == sorted(progress)
    assert progress[-1] == pytest.approx(1)
    assert len(progress) == 8 * 2 + 40


def test_starts_are_made_when_it_is_their_turn():
    made = []

    def start(number):
        made.append(number)
        return FixedLosses([float(number)] * 40)

    contest = Contest([lambda: start(1), lambda: start(2)])
    assert made == [1]
    for _ in range(8):
        contest.step()
    assert made == [1, 2]


def test_steps_that_fit_the_volume_do_not_count_for_the_trial():
    starts = [FixedLosses([2.0] * 40, n_fit_steps=5), FixedLosses([3.0] * 40, n_fit_steps=5)]
    contest = Contest([lambda start=start: start for start in starts])
    run(contest)
    assert [start.steps_done for start in starts] == [40, 8]


def test_a_start_whose_loss_was_never_measured_does_not_win():
    starts = [FixedLosses([math.nan] * 40), FixedLosses([7.0] * 40)]
    contest = Contest([lambda start=start: start for start in starts])
    run(contest)
    assert [start.steps_done for start in starts] == [8, 40]


def test_the_headline_says_which_start_it_is():
    contest = Contest([lambda: FixedLosses([1.0] * 40), lambda: FixedLosses([2.0] * 40)])
    assert contest.step().headline.startswith("start 1, wake loss 1.0")
