"""What the recorder says and does about what it sees: a line at the end, an early end, a chart while it trains."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import Callback
from feeds import loaders
from learners import learner, small_cnn
from torch import nn

from fastai_lsuv import ActivationStatsRecorder
from fastai_lsuv.recording.live import LiveChart


class Explodes(Callback):
    "Makes the second convolution's weights a million times as large before a step."

    order = -50

    def __init__(self, step):
        self.step, self.n = step, -1

    def before_batch(self):
        self.n += self.training
        if self.training and self.n == self.step:
            with torch.no_grad():
                self.learn.model[0][2].weight.mul_(1e6)


def fitted(*cbs, epochs=4, lr=1e-3, model=None, **options):
    learn = learner(loaders(), model or small_cnn(), cbs=[rec := ActivationStatsRecorder(**options), *cbs])
    with np.errstate(all="ignore"):
        learn.fit(epochs, lr)
    return learn, rec


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("ActivationStatsRecorder")]


# --- the line at the end ----------------------------------------------------------------------------------------------


def test_nothing_is_said_of_a_healthy_training(capsys):
    fitted()
    assert lines(capsys) == []


def test_the_first_layer_of_the_gravest_kind_is_named_with_a_remedy(capsys):
    fitted(Explodes(5))
    (line,) = lines(capsys)
    assert "0.2: exploding (std" in line and "learning rate" in line


def test_not_learning(capsys):
    "No layer at this learning rate is healthy but those without weights."
    _, rec = fitted(lr=1e-7)
    (line,) = lines(capsys)
    assert "0.0: not learning (mean update" in line and "Raise the learning rate" in line
    of_weights = rec.summary().loc[lambda s: s.last_update.notna()]
    assert set(of_weights.verdict) == {"not learning"}


def test_too_fast(capsys):
    "Of a network whose norms hold its scale."
    _, rec = fitted(lr=3.0, model=small_cnn(nn.BatchNorm2d), epochs=5)
    assert "too fast" in set(rec.summary().verdict)
    assert len(lines(capsys)) == 1


def test_a_few_steps_tell_nothing_of_a_learning_rate(capsys):
    fitted(lr=1e-7, epochs=1)
    assert lines(capsys) == []


def test_another_fit_is_judged_by_itself():
    learn, rec = fitted(lr=1e-7)
    learn.fit(4, 1e-3)
    assert "not learning" not in set(rec.summary().verdict)


def test_silence_when_asked_for(capsys):
    fitted(Explodes(5), verbose=False)
    assert lines(capsys) == []


# --- an early end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop_on",
    ["exploding", ["dying", "exploding"], lambda s: (s.last_std > 1e3).any()],
    ids=["one", "several", "function"],
)
def test_it_ends_the_fit_in_the_batch_in_which_it_happens(stop_on, capsys):
    learn, rec = fitted(Explodes(5), stop_on=stop_on)
    assert rec.to_frame().step.max() == 5 and len(rec.to_frame()) == 6 * 7
    (line,) = lines(capsys)
    assert "stopped after step 5" in line
    if not callable(stop_on):
        assert "0.2: exploding" in line
    assert learn.opt is not None and not any(p.grad is not None and p.grad.any() for p in learn.model.parameters())
    learn.fit(1)
    assert rec.to_frame().fit.max() == 1, "the next fit is another matter"


def test_it_says_what_a_function_says(capsys):
    fitted(stop_on=lambda s: "enough of it" if len(s) == 7 else "")
    assert "enough of it" in lines(capsys)[0]


def test_a_healthy_training_goes_on_to_its_end():
    _, rec = fitted(stop_on=["exploding", "dying", "dead units", "too fast", "not learning"])
    assert rec.to_frame().step.max() == 11


def test_all_else_of_the_batch_has_happened():
    "The loss is logged, and whoever listens to the end of a fit is told."

    class Listens(Callback):
        heard = ()

        def after_cancel_fit(self):
            self.heard = (*self.heard, "cancelled")

        def after_fit(self):
            self.heard = (*self.heard, "over")

    learn, _ = fitted(Explodes(5), listens := Listens(), stop_on="exploding", verbose=False)
    assert listens.heard == ("cancelled", "over")
    assert len(learn.recorder.losses) == 6


# --- wrong options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ActivationStatsRecorder(evry=2), "'evry'.*'every'"),
        (lambda: ActivationStatsRecorder(with_histograms=True), "'with_histograms'.*'with_hist'"),
        (lambda: ActivationStatsRecorder(True), "modules"),
        (lambda: ActivationStatsRecorder(10), "modules"),
        (lambda: ActivationStatsRecorder(stop_on=3), "stop_on=3"),
    ],
)
def test_options_that_there_are_not(make, says):
    with pytest.raises(TypeError, match=says):
        make()


def test_verdicts_that_there_are_not():
    with pytest.raises(ValueError, match="'explodes' is no verdict.*'exploding'"):
        ActivationStatsRecorder(stop_on="explodes")


# --- live -------------------------------------------------------------------------------------------------------------


class Notebook:
    "Keeps what is displayed."

    def __init__(self):
        self.shown, self.handles = [], 0

    def displays(self, image, display_id):
        self.handles += 1
        self.shown.append(image)
        return SimpleNamespace(update=self.shown.append)


@pytest.fixture
def notebook(monkeypatch):
    book = Notebook()
    monkeypatch.setattr("fastai_lsuv.recording.live.in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", book.displays)
    monkeypatch.setattr("IPython.display.Image", lambda png: png)
    return book


def test_a_chart_is_shown_once_and_replaced(notebook):
    numbers = plt.get_fignums()
    fitted(live=True)
    assert notebook.handles == 1 and notebook.shown[-1].startswith(b"\x89PNG")
    assert plt.get_fignums() == numbers, "or the notebook would show it again"


def test_drawing_takes_a_hundredth_of_the_time(notebook, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def draw():
        now[0] += 0.5
        return plt.figure(FigureClass=type(ActivationStatsRecorder().plot_stats()))

    chart = LiveChart(draw)
    while now[0] < 1000:
        now[0] += 0.1
        chart.refresh()
    assert 15 <= len(notebook.shown) <= 20
    chart.refresh(at_end=True)
    assert notebook.handles == 1


def test_in_a_terminal_there_is_none(capsys):
    numbers = plt.get_fignums()
    fitted(live=True)
    assert plt.get_fignums() == numbers and capsys.readouterr().out.count("\n") == 4, "the epochs"
