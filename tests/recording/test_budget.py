"""`every="auto"`: a share of the training time, whatever a step and a record cost."""

import pytest
from feeds import loaders
from learners import learner

from fastai_lsuv import ActivationStatsRecorder
from fastai_lsuv.recording.budget import SHARE, Budget, Clock


class Pretended(Clock):
    "Time passes as the test says; a device is so many marks behind."

    def __init__(self, behind=0):
        self.now, self.marks, self.behind = 0.0, 0, behind

    def mark(self):
        self.marks += 1
        return self.now, self.marks

    def seconds(self, begin, end):
        return end[0] - begin[0] if self.marks - end[1] >= self.behind else None


def trained(steps, plain, cost, setup=0.0, behind=0, epoch=1000):
    "Which steps were recorded, and the time that it took beyond the training's own."
    budget, clock, due = Budget(clock := Pretended(behind)), clock, []
    for step in range(steps):
        if budget.begin_step(step % epoch == 0):
            due.append(step)
            clock.now += cost(step) if callable(cost) else cost
            clock.now += setup if len(due) == 1 else 0.0
        clock.now += plain(step) if callable(plain) else plain
        if step % epoch == epoch - 1:
            clock.now += 1000.0  # validation
    return due


@pytest.mark.parametrize("behind", [0, 7])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.3, 1.0, 5.0])
def test_the_budget_is_kept_and_used(ratio, behind):
    due = trained(10_000, 0.01, 0.01 * ratio, setup=0.5, behind=behind)
    later = [step for step in due if step >= 5_000]
    share = len(later) * ratio / 5_000
    assert share <= SHARE + 1e-9, share
    assert share >= SHARE / 2 or len(later) >= 2_400, "every other step at most"
    assert due[0] == 0


def test_pauses_are_no_costs():
    due = trained(4_000, lambda step: 10.0 if step % 97 == 0 else 0.01, 0.001, epoch=100)
    assert len([step for step in due if step >= 2_000]) >= 300


def test_it_follows_when_recording_becomes_dearer():
    due = trained(20_000, 0.01, lambda step: 0.0001 if step < 5_000 else 0.01)
    early, late = (sum(a <= step < a + 4_000 for step in due) for a in (1_000, 16_000))
    assert early > 1_900 and late <= 80 + 1, (early, late)


def test_the_steps_recorded_are_in_the_frame(tmp_path):
    rec = ActivationStatsRecorder(every="auto", valid=True)
    learner(loaders(), path=tmp_path, cbs=rec).fit(3)
    frame = rec.to_frame()
    assert frame[frame.phase == "train"].step.unique().tolist() == [0], "nothing is known yet of what it costs"
    assert len(frame[frame.phase == "valid"])
