"""What the callback and `learn.lsuv_init` say: of options, of a run that was declined, of how far they are."""

import pytest
import torch
from fastai.vision.all import Learner, NonNativeMixedPrecision, ProgressCallback
from learners import digits, learner, ran, small_cnn
from torch import nn

from fastai_lsuv import LSUVCallback
from fastai_lsuv.learner import progress


@pytest.fixture(scope="module")
def dls():
    return digits(64, 16)


# --- options ----------------------------------------------------------------------------------------------------------


def test_the_callback_shows_its_options():
    assert repr(LSUVCallback()) == "LSUVCallback"
    assert repr(LSUVCallback(std=0.5, verbose=False)) == "LSUVCallback(verbose=False, std=0.5)"
    assert repr(LSUVCallback(init=nn.init.orthogonal_)) == "LSUVCallback(init=orthogonal_)"
    batch = torch.zeros(4, 3), torch.zeros(4)
    assert repr(LSUVCallback(batch=batch)) == "LSUVCallback(batch=(a Tensor of shape (4, 3), a Tensor of shape (4,)))"


WRONG_OPTIONS = {
    "positional": (
        lambda: LSUVCallback(0.5),
        r"LSUVCallback\(\) takes its options by name: batch=…, verbose=…, mean=…",
    ),
    "several": (lambda: LSUVCallback(None, True, 0.5), r"LSUVCallback\(\) takes its options by name"),
    "near miss": (lambda: LSUVCallback(exclud="head"), r"unexpected option 'exclud'; the nearest is 'exclude'"),
    "a tensor": (lambda: LSUVCallback(batch=torch.zeros(4)), r"batch is a Tensor: expected one batch .* \(xb, yb\)"),
    "a number": (lambda: LSUVCallback(batch=64), r"batch is a int: expected one batch .* \(xb, yb\)"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_a_wrong_option_is_told_at_once(case):
    make, text = WRONG_OPTIONS[case]
    with pytest.raises(TypeError, match=text):
        make()


def test_lsuv_init_says_the_same_of_its_options(dls):
    learn = learner(dls)
    with pytest.raises(TypeError, match=r"lsuv_init\(\) got an unexpected option 'stdd'; the nearest is 'std'"):
        learn.lsuv_init(stdd=1)
    with pytest.raises(TypeError, match=r"lsuv_init\(\) takes its options by name: mean=…, std=…, per_channel=…"):
        learn.lsuv_init(None, 0.5)


def test_of_two_callbacks_the_one_that_is_not_used_is_named(dls, capsys):
    learn = learner(dls)
    learn.fit(1, cbs=[LSUVCallback(std=1.0), LSUVCallback(std=0.5)])
    assert learn.lsuv_report.std == 1.0
    assert "; not used, as LSUV runs once per model: LSUVCallback(std=0.5)\n" in capsys.readouterr().out


# --- declined ---------------------------------------------------------------------------------------------------------


def empty(learn):
    xb, yb = learn.dls.one_batch()
    return xb[:0], yb[:0]


def test_an_empty_batch_is_no_reason_to_end_a_fit(dls, capsys):
    learn = learner(dls)
    learn.add_cb(LSUVCallback(batch=empty(learn))).fit(1)
    assert not ran(learn)
    assert "LSUV: not run, because the batch is empty, with an input of shape (0, 1, 8, 8)\n" in capsys.readouterr().out
    with pytest.raises(AttributeError, match=r"a fit went on without it, because the batch is empty"):
        learn.lsuv_report  # noqa: B018
    with pytest.raises(RuntimeError, match=r"the batch is empty"):
        learner(dls).lsuv_init(empty(learn))


@pytest.mark.cpu
def test_mixed_precision_that_needs_a_gpu_is_told_in_one_line(dls, capsys):
    learn = learner(dls, cbs=[NonNativeMixedPrecision(), LSUVCallback()])
    with pytest.warns(UserWarning, match="NonNative") as caught, pytest.raises(AssertionError, match="requires a GPU"):
        learn.fit(1)
    told = [str(w.message) for w in caught if "NonNative" in str(w.message)]
    assert len(told) == 1
    assert told[0].endswith("AssertionError: Mixed-precision training requires a GPU, remove the call `to_fp16`")
    assert len(capsys.readouterr().out.splitlines()) == 1


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bars(monkeypatch):
    "The progress bars that LSUV makes; each has `seen`, the numbers that it was given, and whether it `ended`."
    made = []

    class Bar:
        def __init__(self, gen, leave):
            self.total, self.leave, self.seen, self.ended = len(gen), leave, [], False
            made.append(self)

        def update(self, n):
            self.seen.append(n)

        def on_iter_end(self):
            self.ended = True

    monkeypatch.setattr(progress, "progress_bar", Bar)
    return made


def impatient(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)


def with_bars(dls, **kwargs):
    return Learner(dls, small_cnn(), **kwargs)


def test_a_bar_counts_the_layers_of_all_passes(dls, bars, monkeypatch):
    impatient(monkeypatch)
    report = with_bars(dls).lsuv_init()
    (bar,) = bars
    assert bar.total == report.n_forward * len(report)
    assert bar.seen == [*range(bar.total)]
    assert bar.ended
    assert not bar.leave


def test_there_is_none_where_lsuv_is_quick(dls, bars):
    with_bars(dls).lsuv_init()
    assert not bars


def test_there_is_none_in_a_learner_without_bars_or_for_a_silent_callback(dls, bars, monkeypatch):
    impatient(monkeypatch)
    learn = with_bars(dls)
    with learn.no_bar():
        learn.lsuv_init()
    learn = with_bars(dls, cbs=LSUVCallback(verbose=False))
    learn.fit(1)
    assert ran(learn)
    assert not bars


def test_there_is_one_in_a_fit(dls, bars, monkeypatch):
    impatient(monkeypatch)
    learn = with_bars(dls, cbs=LSUVCallback())
    learn.fit(1)
    assert len(bars) == 1
    assert learn._grab_cbs(ProgressCallback)


def test_a_bar_goes_with_an_error(dls, bars, monkeypatch):
    impatient(monkeypatch)
    learn = with_bars(dls)
    learn.model[1][3] = nn.Linear(7, 10)
    with pytest.raises(RuntimeError):
        learn.lsuv_init()
    (bar,) = bars
    assert bar.ended
