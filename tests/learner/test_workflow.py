"""DESIGN section 5 on real Learners: when LSUV runs, once, and above all when it must not."""

import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from audit import moved, parameter_bits
from fastai.vision.all import (
    SGD,
    Callback,
    CancelFitException,
    ClassificationInterpretation,
    FetchPredsCallback,
    Interpretation,
    OptimWrapper,
    SaveModelCallback,
)
from learners import Spy, body_and_head, digits, exact, learner, ran, small_cnn
from models import Stumble
from torch import nn

from fastai_lsuv import LSUVCallback


@pytest.fixture(scope="module")
def dls():
    return digits()


@pytest.fixture
def make(dls, tmp_path):
    return partial(learner, dls, path=tmp_path)


def fit_lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "lsuv" in line.lower()]


# --- the first real fit -----------------------------------------------------------------------------------------------

FITS = {
    "fit": lambda learn, **k: learn.fit(1, **k),
    "fit_one_cycle": lambda learn, **k: learn.fit_one_cycle(1, 1e-3, **k),
    "fit_flat_cos": lambda learn, **k: learn.fit_flat_cos(1, 1e-3, **k),
    "fit_sgdr": lambda learn, **k: learn.fit_sgdr(1, 1, 1e-3, **k),
    "lr_find": lambda learn, **k: learn.lr_find(num_it=10, show_plot=False),
    "fine_tune": lambda learn, **k: learn.fine_tune(1, **k),
}
DOORS = ["Learner", "class to Learner", "add_cb", "fit", "class to fit"]


# lr_find takes no callbacks
@pytest.mark.parametrize(
    ("how", "door"), [(h, d) for h in FITS for d in DOORS if not (h == "lr_find" and d.endswith("fit"))]
)
def test_the_first_fit_starts_from_corrected_weights(make, how, door):
    cb = LSUVCallback if door.startswith("class") else LSUVCallback()
    learn = make(cbs=cb if door.endswith("Learner") else None)
    if door == "add_cb":
        learn.add_cb(cb)
    spy = Spy().watch(learn.dls.train.new(shuffle=False).one_batch()[0])
    learn.add_cb(spy)
    assert not ran(learn)
    FITS[how](learn, **({"cbs": cb} if door.endswith("fit") else {}))
    assert ran(learn)
    assert [row.name for row in learn.lsuv_report] == ["0.0", "0.2", "1.0", "1.3"]
    assert all(row.status == "corrected" for row in learn.lsuv_report)
    for r in spy.audits[0]:
        assert 0.6 < r.std < 1.6, "another batch of the same data, and training starts from 1"


@pytest.mark.parametrize("how", FITS)
def test_exact_on_its_batch_when_training_starts(make, how):
    learn = make()
    b = learn.dls.one_batch()
    learn.add_cbs([LSUVCallback(batch=b), spy := Spy().watch(b[0])])
    FITS[how](learn)
    assert exact(spy.audits[0])
    assert learn.lsuv.report is learn.lsuv_report


def test_the_batch_of_the_loader_is_what_is_measured(tmp_path):
    learn = learner(digits(shuffle=False), path=tmp_path, cbs=LSUVCallback())
    learn.add_cb(spy := Spy().watch(next(iter(learn.dls.train))[0]))
    learn.fit(1)
    assert exact(spy.audits[0])


def test_its_place_is_after_the_device_and_before_what_copies_or_saves():
    assert -1 < LSUVCallback.order < 0


def test_every_corrected_parameter_is_trained(make):
    learn = make()
    learn.create_opt()
    learn.add_cbs([LSUVCallback(), spy := Spy()])
    start = parameter_bits(learn.model)
    learn.fit(2, 1e-2)
    assert len(moved(start, learn.model)) == len(start)
    assert all(spy.states[0][n] != spy.states[1][n] for n in start), "a parameter that no longer trains"
    assert {id(p) for p in learn.opt.all_params().itemgot(0)} == {id(p) for p in learn.model.parameters()}


# --- later fits: never again ------------------------------------------------------------------------------------------

LATER = {
    "fit": lambda learn: learn.fit(1),
    "a new instance": lambda learn: learn.fit(1, cbs=LSUVCallback()),
    "the class": lambda learn: learn.fit_one_cycle(1, cbs=LSUVCallback),
    "added": lambda learn: learn.add_cb(LSUVCallback()).fit(1),
    "a new optimizer": lambda learn: learn.fit(1, reset_opt=True),
    "fine_tune": lambda learn: learn.fine_tune(1, cbs=LSUVCallback()),
    "lr_find": lambda learn: learn.lr_find(num_it=5, show_plot=False),
}


@pytest.mark.parametrize("opt", [None, partial(SGD, mom=0.0)], ids=["Adam", "stateless"])
@pytest.mark.parametrize("first", ["Learner", "fit"])
@pytest.mark.parametrize("later", LATER)
def test_a_later_fit_does_not_run_it_again(make, capsys, later, first, opt):
    learn = make(cbs=LSUVCallback() if first == "Learner" else None, **({"opt_func": opt} if opt else {}))
    learn.fit(1, cbs=LSUVCallback() if first == "fit" else None)
    report, trained = learn.lsuv_report, parameter_bits(learn.model)
    learn.add_cb(spy := Spy())
    capsys.readouterr()
    LATER[later](learn)
    assert spy.states[0] == trained
    assert learn.lsuv_report is report
    assert not fit_lines(capsys)


def test_lr_find_restores_to_the_lsuv_weights_and_the_fit_after_it_starts_there(make, capsys):
    learn = make()
    b = learn.dls.one_batch()
    learn.add_cbs([LSUVCallback(batch=b), spy := Spy().watch(b[0])])
    learn.lr_find(num_it=10, show_plot=False)
    report, found = learn.lsuv_report, parameter_bits(learn.model)
    assert found == spy.states[0]
    capsys.readouterr()
    learn.fit(1)
    assert spy.states[-1] == found
    assert exact(spy.audits[-1])
    assert learn.lsuv_report is report
    assert not fit_lines(capsys)


@pytest.mark.parametrize("cbs", [LSUVCallback, LSUVCallback()], ids=["two instances", "one instance"])
def test_fine_tune_s_second_half_does_not_run_it(make, cbs):
    learn = make(splitter=body_and_head)
    learn.add_cb(spy := Spy())
    learn.fine_tune(1, freeze_epochs=1, cbs=cbs)
    assert len(spy.states) == 2
    assert {n for n in spy.states[0] if spy.states[0][n] != spy.states[1][n]} == {
        n for n in spy.states[0] if n.startswith("1.")
    }


@pytest.mark.parametrize("stop", [KeyboardInterrupt, CancelFitException, ZeroDivisionError])
def test_after_a_fit_that_was_cut_short_it_does_not_run_again(make, stop):
    def cut(self):
        raise stop("cut")

    learn = make(cbs=LSUVCallback())
    with nullcontext() if stop is CancelFitException else pytest.raises(stop):
        learn.fit(1, cbs=Callback(after_batch=cut))
    report, bits = learn.lsuv_report, parameter_bits(learn.model)
    learn.add_cb(spy := Spy())
    learn.fit(1, reset_opt=True)
    assert spy.states[0] == bits
    assert learn.lsuv_report is report


# --- what fires `before_fit` and is no fit ----------------------------------------------------------------------------


def in_context(learn):
    with learn:
        learn.model(learn.dls.one_batch()[0])


NEVER = {
    "validate": lambda learn: learn.validate(),
    "validate(cbs)": lambda learn: learn.validate(cbs=LSUVCallback()),
    "get_preds": lambda learn: learn.get_preds(),
    "get_preds(cbs)": lambda learn: learn.get_preds(cbs=LSUVCallback()),
    "get_preds of the training set": lambda learn: learn.get_preds(ds_idx=0, with_loss=True),
    "predict": lambda learn: learn.predict(learn.dls.valid_ds.items[0][0]),
    "tta": lambda learn: learn.tta(n=2),
    "with learn": in_context,
    "show_results": lambda learn: learn.show_results(max_n=2),
    "summary": lambda learn: learn.summary(),
    "Interpretation": lambda learn: Interpretation.from_learner(learn).top_losses(2),
    "ClassificationInterpretation": lambda learn: ClassificationInterpretation.from_learner(learn).confusion_matrix(),
}


@pytest.mark.parametrize("what", NEVER)
def test_what_is_no_fit_never_runs_it(make, capsys, what):
    learn = make(cbs=LSUVCallback())
    start = parameter_bits(learn.model)
    NEVER[what](learn)
    assert not ran(learn)
    assert not moved(start, learn.model)
    assert not [
        line for line in fit_lines(capsys) if line.strip(" -") != "LSUVCallback"
    ]  # `summary` lists the callbacks
    learn.add_cb(spy := Spy())
    learn.fit(1)  # and the first fit does
    assert ran(learn)
    assert len([n for n in start if start[n] != spy.states[0][n]]) == len(start)


@pytest.mark.parametrize("what", NEVER)
def test_nor_after_a_fit(make, what):
    learn = make(cbs=LSUVCallback())
    learn.fit(1)
    report, trained = learn.lsuv_report, parameter_bits(learn.model)
    NEVER[what](learn)
    assert learn.lsuv_report is report
    assert not moved(trained, learn.model)


def test_nor_after_a_fit_that_failed(make):
    "Having come through `Learner.fit` once, and out again by an exception, is not being in a fit."
    learn = make(model=nn.Sequential(*small_cnn(), Stumble(RuntimeError("once"))), cbs=LSUVCallback())
    with pytest.raises(RuntimeError, match="once"):
        learn.fit(1)
    start = parameter_bits(learn.model)
    for what in ("validate", "get_preds", "with learn", "tta"):
        NEVER[what](learn)
    assert not ran(learn)
    assert not moved(start, learn.model)
    learn.fit(1)
    assert ran(learn)


@pytest.mark.parametrize("what", ["validate", "tta"])
def test_a_learner_that_is_used_inside_another_s_fit(make, what):
    "A teacher, say: its own `fit` is not the one that is running."
    teacher = make(cbs=LSUVCallback())
    start = parameter_bits(teacher.model)

    def ask(self):
        NEVER[what](teacher)

    make(cbs=LSUVCallback()).fit(1, cbs=Callback(before_epoch=ask))
    assert not ran(teacher)
    assert not moved(start, teacher.model)


def test_predictions_fetched_inside_a_fit(make):
    learn = make(cbs=[LSUVCallback(), FetchPredsCallback()])
    learn.add_cb(spy := Spy())
    learn.fit(2)
    assert learn.lsuv_report is learn.lsuv.report
    assert len(spy.states) == 2


def test_a_best_model_saved_and_loaded_inside_the_first_fit(make, capsys):
    learn = make(cbs=LSUVCallback())
    learn.fit(2, cbs=SaveModelCallback())
    assert ran(learn)
    capsys.readouterr()
    learn.fit(1)
    assert not fit_lines(capsys)


# --- frozen layers ----------------------------------------------------------------------------------------------------


def test_only_what_trains_is_corrected(make):
    learn = make(splitter=body_and_head, cbs=LSUVCallback())
    learn.freeze()
    start = parameter_bits(learn.model)
    learn.add_cb(spy := Spy())
    learn.fit(1)
    assert [(row.name, row.status, row.reason) for row in learn.lsuv_report][:2] == [
        ("0.0", "skipped", "frozen"),
        ("0.2", "skipped", "frozen"),
    ]
    assert [row.status for row in learn.lsuv_report][2:] == ["corrected"] * 2
    assert {n for n in start if start[n] != spy.states[0][n]} == {n for n in start if n.startswith("1.")}


def test_layers_unfrozen_without_having_been_corrected_are_named(make, capsys):
    learn = make(splitter=body_and_head, cbs=LSUVCallback())
    learn.fine_tune(1)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "not corrected" in line]
    assert len(lines) == 1, out
    assert "0.0" in lines[0] or "2" in lines[0]
    learn.fit(1)
    assert "not corrected" not in capsys.readouterr().out, "said twice"


def test_no_such_line_where_nothing_was_frozen(make, capsys):
    learn = make(cbs=LSUVCallback())
    learn.fine_tune(1)
    assert "not corrected" not in capsys.readouterr().out


# --- the line it prints -----------------------------------------------------------------------------------------------


def test_one_summary_line_says_it_all(make, capsys):
    learn = make(splitter=body_and_head, cbs=LSUVCallback())
    learn.freeze()
    learn.fit(1)
    (line,) = fit_lines(capsys)
    report = learn.lsuv_report
    assert line.startswith("LSUV: 2 corrected, 2 skipped (frozen): 0.0, 0.2; ")
    assert re.search("mean.*→.*std.*→", line)
    assert f"{report.seconds:.1f}" in line or f"{report.seconds:.2f}" in line


def test_silent_when_asked(make, capsys):
    learn = make(cbs=LSUVCallback(verbose=False))
    learn.fit(1)
    assert ran(learn)
    assert not fit_lines(capsys)


def test_options_reach_the_algorithm(make):
    learn = make()
    b = learn.dls.one_batch()
    learn.add_cbs([LSUVCallback(batch=b, std=0.5, mean=0.25, exclude="1.*"), spy := Spy().watch(b[0])])
    learn.fit(1)
    assert [row.name for row in learn.lsuv_report] == ["0.0", "0.2"]
    for r in spy.audits[0][:2]:
        assert (r.std, r.mean) == (pytest.approx(0.5, abs=1e-3), pytest.approx(0.25, abs=1e-3))


def test_optim_wrapper_and_other_optimizers(make):
    learn = make(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=LSUVCallback())
    learn.add_cb(spy := Spy())
    learn.fit(2)
    assert all(spy.states[0][n] != spy.states[1][n] for n in spy.states[0])


@pytest.mark.parametrize(("options", "said"), [({"std": 0.5}, True), ({}, False)], ids=["other", "the same"])
def test_two_callbacks_with_different_options_are_told_of(options, said, capsys):
    learn = learner(digits(64, 16), small_cnn(), cbs=[LSUVCallback(), LSUVCallback(**options)])
    learn.fit(1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "LSUV" in line]
    assert len(lines) == 1
    assert ("not used, as LSUV runs once per model: LSUVCallback(std=0.5)" in lines[0]) == said
    assert learn.lsuv_report.std == 1
