"""DESIGN section 5: what a Learner has trained is never rewritten, and a decision belongs to the model it is about."""

import copy
import gc
import pickle
import warnings
import weakref
from collections import OrderedDict
from contextlib import suppress
from functools import partial

import cloudpickle
import pytest
import torch
from audit import call, parameter_bits
from fastai.vision.all import (
    SGD,
    Adam,
    Callback,
    CancelFitException,
    OptimWrapper,
    Recorder,
    load_learner,
)
from learners import Spy, body_and_head, digits, learner, ran, small_cnn
from torch import nn

from fastai_lsuv import LSUVCallback, LSUVReport
from fastai_lsuv.core.errors import CannotRun

SHAPE = {"n": 64, "bs": 16}


@pytest.fixture(scope="module")
def dls():
    return digits(**SHAPE)


@pytest.fixture
def make(dls, tmp_path):
    return partial(learner, dls, path=tmp_path, splitter=body_and_head)


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("LSUV")]


def runs_in_the_next_fit(learn, cbs=LSUVCallback, **kwargs):
    "True if LSUV rewrites the weights when it comes to this Learner now."
    before = parameter_bits(learn.model)
    learn.fit(1, cbs=[cbs, spy := Spy()] if cbs else (spy := Spy()), **kwargs)
    assert (spy.states[0] != before) == ("lsuv_report" in vars(learn))
    return ran(learn)


# --- trained by this Learner ------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "Adam": Adam,
    "SGD": SGD,
    "SGD with momentum": partial(SGD, mom=0.9),
    "PyTorch's SGD": partial(OptimWrapper, opt=torch.optim.SGD),
    "PyTorch's Adam": partial(OptimWrapper, opt=torch.optim.Adam),
}


def exported(learn):
    learn.export()
    with pytest.warns(UserWarning, match="insecure"):
        loaded = load_learner(learn.path / "export.pkl")
    loaded.dls = learn.dls
    return loaded


def without_recorder(learn):
    learn.remove_cb(Recorder)


def lr_find(learn):
    learn.lr_find(num_it=8, show_plot=False)


SINCE = {
    "nothing": lambda learn: None,
    "unfreeze": lambda learn: learn.unfreeze(),
    "freeze and unfreeze": lambda learn: learn.freeze() or learn.unfreeze(),
    "create_opt": lambda learn: learn.create_opt(),
    "no optimizer": lambda learn: setattr(learn, "opt", None),
    "another optimizer": lambda learn: setattr(learn, "opt_func", SGD) or learn.create_opt(),
    "validate": lambda learn: learn.validate() and None,
    "get_preds": lambda learn: learn.get_preds() and None,
    "summary": lambda learn: learn.summary() and None,
    "export": exported,
    "deep copy": copy.deepcopy,
    "pickle": lambda learn: pickle.loads(pickle.dumps(learn)),
    "no Recorder": without_recorder,
}


@pytest.mark.parametrize("since", SINCE)
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_what_it_trained_is_left_alone_whatever_became_of_the_optimizer(make, capsys, opt, since):
    learn = make(opt_func=OPTIMIZERS[opt])
    learn.fit(1)
    learn = SINCE[since](learn) or learn
    capsys.readouterr()
    assert not runs_in_the_next_fit(learn)
    (line,) = lines(capsys)
    assert line.startswith("LSUV: not run: this network looks trained (")
    assert line.endswith("). Usually right, nothing to do. To overwrite its weights anyway: learn.lsuv_init()")


@pytest.mark.parametrize("opt", ["Adam", "SGD"])
def test_also_with_a_new_optimizer_for_the_fit(make, opt):
    learn = make(opt_func=OPTIMIZERS[opt])
    learn.fit(1)
    assert not runs_in_the_next_fit(learn, reset_opt=True)


@pytest.mark.parametrize("fit", ["fit_one_cycle", "fit_flat_cos", "fine_tune"])
@pytest.mark.parametrize("since", ["nothing", "unfreeze", "no optimizer"])
def test_also_where_lr_find_came_after_a_fit_with_a_schedule(make, fit, since):
    learn = make(opt_func=SGD)
    getattr(learn, fit)(1)
    SINCE[since](learn)
    lr_find(learn)
    assert not runs_in_the_next_fit(learn)


def test_also_where_a_short_lr_find_came_after_a_fit_without_a_schedule(tmp_path):
    "Shorter than an epoch, as it is on all but toy data."
    for fit, trained in ((lambda learn: learn.fit(1), True), (lambda learn: learn.validate(), False)):
        learn = learner(digits(200, 8), opt_func=SGD, path=tmp_path)
        fit(learn)
        lr_find(learn)
        assert runs_in_the_next_fit(learn) != trained


@pytest.mark.parametrize("stop", [KeyboardInterrupt, CancelFitException, ZeroDivisionError])
def test_also_where_the_fit_was_cut_short(make, stop):
    class Cut(Callback):
        def after_batch(self):
            raise stop("cut")

    learn = make(opt_func=SGD)
    with suppress(stop):
        learn.fit(1, cbs=Cut())
    assert not runs_in_the_next_fit(learn, reset_opt=True)


def test_also_by_another_learner_around_the_same_model(make, dls):
    "Larger images, say."
    first = make(opt_func=SGD)
    first.fit(1)
    assert not runs_in_the_next_fit(learner(dls, first.model, path=first.path))


def test_also_where_a_learner_keeps_no_record(make):
    learn = make(opt_func=SGD)
    learn.remove_cb(Recorder)
    learn.fit(1)
    assert not runs_in_the_next_fit(learn, reset_opt=True)


def test_the_sign_is_named(make, capsys):
    said = []
    for norm, part in (
        (nn.BatchNorm2d, "batch norm `0.1` has counted 3 batches"),
        (None, "this Learner has trained it"),
    ):
        learn = make(model=small_cnn(norm), opt_func=SGD)
        learn.fit(1)
        capsys.readouterr()
        learn.fit(1, cbs=LSUVCallback())
        (line,) = lines(capsys)
        assert f"({part})" in line
        said.append(line)


# --- no training ------------------------------------------------------------------------------------------------------


def validated(learn):
    learn.validate()
    learn.get_preds()


def cancelled(learn):
    class Never(Callback):
        def before_batch(self):
            raise CancelFitException

    learn.fit(1, cbs=Never())


def failed(learn):
    learn.loss_func, loss = (lambda *args: 1 / 0), learn.loss_func
    with pytest.raises(ZeroDivisionError):
        learn.fit(1)
    learn.loss_func = loss


def twice(learn):
    lr_find(learn)
    lr_find(learn)


NO_TRAINING = {
    "lr_find": lr_find,
    "lr_find twice": twice,
    "lr_find and a new optimizer": lambda learn: lr_find(learn) or learn.create_opt(),
    "validation": validated,
    "a fit without a batch": cancelled,
    "a fit that failed at once": failed,
    "an optimizer": lambda learn: learn.create_opt(),
    "frozen and unfrozen": lambda learn: learn.freeze() or learn.unfreeze(),
    "initialised by hand": lambda learn: learn.model.apply(by_hand) and None,
}


def by_hand(module):
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)


@pytest.mark.parametrize("opt", ["Adam", "SGD", "PyTorch's Adam"])
@pytest.mark.parametrize("what", NO_TRAINING)
def test_what_trains_nothing_is_no_sign(make, what, opt):
    learn = make(opt_func=OPTIMIZERS[opt])
    NO_TRAINING[what](learn)
    assert runs_in_the_next_fit(learn)


def test_initialised_by_hand_after_the_callback_came(make):
    learn = make(cbs=LSUVCallback())
    learn.model.apply(by_hand)
    assert runs_in_the_next_fit(learn, cbs=None)


# --- decisions belong to a model --------------------------------------------------------------------------------------


def load(learn):
    learn.model.load_state_dict(small_cnn().state_dict())


def test_one_callback_object_for_several_learners(make):
    "Each model is judged by itself, whatever was decided about those before."
    cb = LSUVCallback()
    for loaded in (True, False, True, False):
        learn = make(cbs=cb)
        if loaded:
            load(learn)
        learn.fit(1)
        assert ran(learn) == (not loaded)


@pytest.mark.parametrize(
    ("first", "door"),
    [
        ("had LSUV", "Learner"),
        ("had LSUV", "fit"),
        ("was loaded", "Learner"),  # from `fit`, the refusal goes with its callback: see below
        ("was never fitted", "Learner"),
        ("was never fitted", "fit"),
    ],
)
@pytest.mark.parametrize("opt", ["Adam", "SGD"])
def test_another_model_in_the_same_learner_is_judged_afresh(make, first, door, opt):
    learn = make(cbs=(cb := LSUVCallback()), opt_func=OPTIMIZERS[opt])
    if first == "was loaded":
        load(learn)
    if first != "was never fitted":
        learn.fit(1)
    assert ran(learn) == (first == "had LSUV")
    if door == "fit":
        learn.remove_cb(cb)
    old, learn.model = learn.model, small_cnn()
    before = parameter_bits(old)
    learn.fit(1, reset_opt=True, cbs=[spy := Spy()] + [LSUVCallback()] * (door == "fit"))
    assert ran(learn)
    assert spy.states[0] != parameter_bits(small_cnn())
    assert parameter_bits(old) == before
    report = learn.lsuv_report
    learn.fit(1, reset_opt=True)
    assert learn.lsuv_report is report


def test_another_model_that_is_refused_takes_the_report_with_it(make, capsys):
    learn = make(cbs=LSUVCallback())
    learn.fit(1)
    learn.model = small_cnn(nn.BatchNorm2d)
    call(learn.model.train(), learn.dls.one_batch()[0])
    capsys.readouterr()
    learn.fit(1, reset_opt=True)
    assert not ran(learn)
    assert "has counted 1 batch)" in lines(capsys)[0]


def test_another_model_that_this_learner_trained_in_between(make):
    learn = make(opt_func=SGD)
    learn.fit(1, cbs=LSUVCallback())
    learn.model = small_cnn()
    learn.fit(1, reset_opt=True)
    bits = parameter_bits(learn.model)
    learn.fit(1, cbs=[LSUVCallback(), spy := Spy()])
    assert spy.states[0] == bits


WRAPPED = {
    "in another": lambda m: nn.Sequential(m),
    "its parts": lambda m: nn.Sequential(*m),
    "compiled": partial(torch.compile, backend="eager"),
    "data parallel": nn.DataParallel,
    "with other norms": nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_model_in_other_clothes_is_the_same_model(make, capsys, how):
    learn = make(model=small_cnn(), cbs=LSUVCallback(), opt_func=SGD)
    learn.fit(1)
    report, bits = learn.lsuv_report, [*parameter_bits(learn.model).values()]
    learn.model, learn.splitter = WRAPPED[how](learn.model), lambda m: [*m.parameters()]
    capsys.readouterr()
    learn.fit(1, reset_opt=True, cbs=(spy := Spy()))
    assert [*spy.states[0].values()] == bits
    assert learn.lsuv_report is report
    assert not lines(capsys)


def test_a_new_head_on_a_body_that_was_trained(make, capsys):
    "Not rewritten, and said."
    learn = make(cbs=LSUVCallback(), opt_func=SGD)
    learn.fit(1)
    learn.model[1] = small_cnn()[1]
    bits = parameter_bits(learn.model)
    capsys.readouterr()
    learn.fit(1, reset_opt=True, cbs=(spy := Spy()))
    assert spy.states[0] == bits
    assert "(2 of its 4 layers have been in use before)" in lines(capsys)[0]


COPIES = {
    "deep copy": copy.deepcopy,
    "pickle": lambda learn: pickle.loads(pickle.dumps(learn)),
    "cloudpickle": lambda learn: cloudpickle.loads(cloudpickle.dumps(learn)),
    "export": exported,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("refused", [True, False])
def test_copies_of_a_learner_know_what_was_decided(make, capsys, how, refused):
    learn = make(cbs=LSUVCallback(), opt_func=SGD)
    if refused:
        load(learn)
    else:
        learn.lsuv_init()
    twin = COPIES[how](learn)
    for each in (twin, learn):
        bits = parameter_bits(each.model)
        capsys.readouterr()
        each.fit(1, reset_opt=True, cbs=[LSUVCallback(), spy := Spy()])
        assert spy.states[0] == bits
        assert len(lines(capsys)) == refused, "each is told once"


@pytest.mark.parametrize("how", COPIES)
def test_copies_after_a_refused_fit_are_not_told_again(make, capsys, how):
    learn = make(cbs=LSUVCallback())
    load(learn)
    learn.fit(1)
    capsys.readouterr()
    assert not runs_in_the_next_fit(COPIES[how](learn), cbs=None)
    assert not lines(capsys)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_learner_watch_their_own_model(make, how):
    learn = make(cbs=LSUVCallback())
    twin = COPIES[how](learn)
    load(twin)
    for each in (learn, twin):
        each.fit(1)
    assert ran(learn)
    assert not ran(twin)


def test_a_load_is_remembered_when_the_callback_that_saw_it_is_gone(make):
    learn = make(cbs=LSUVCallback())
    load(learn)
    learn.remove_cb(LSUVCallback)
    assert not runs_in_the_next_fit(learn)
    assert {type(m._load_state_dict_post_hooks) for m in learn.model.modules()} == {OrderedDict}


@pytest.mark.parametrize("swapped", [False, True])
def test_where_a_refusal_is_gone_with_its_callback_the_learner_s_own_signs_tell(make, capsys, swapped):
    "Of another model as well: without the callback, nobody knows which of them was trained."
    learn = make(cbs=LSUVCallback(), opt_func=SGD)
    load(learn)
    learn.fit(1)
    learn.remove_cb(LSUVCallback)
    if swapped:
        learn.model = small_cnn()
    capsys.readouterr()
    assert not runs_in_the_next_fit(learn, reset_opt=True)
    assert "(this Learner has trained it)" in lines(capsys)[0]


@pytest.mark.parametrize("copied", [False, True])
def test_a_callback_takes_no_refusal_to_another_learner(make, copied):
    "Neither as a verdict nor as a sign that the other Learner's fits were of some other model."
    first = make(cbs=(cb := LSUVCallback()))
    load(first)
    first.fit(1)
    first.remove_cb(cb)
    cb = copy.deepcopy(cb) if copied else cb
    trained = make(opt_func=SGD)
    trained.fit(1)
    assert not runs_in_the_next_fit(exported(trained), cbs=cb)
    assert runs_in_the_next_fit(make(), cbs=cb)


def test_a_refusal_is_told_once_in_both_halves_of_fine_tune(make, capsys):
    learn = make(model=small_cnn(nn.BatchNorm2d))
    call(learn.model.train(), learn.dls.one_batch()[0])
    learn.fine_tune(1, cbs=LSUVCallback())
    assert len(lines(capsys)) == 1


def test_layers_unfrozen_since_are_told_once_whichever_callback_comes(make, capsys):
    learn = make()
    learn.freeze()
    learn.fit(1, cbs=LSUVCallback())
    learn.unfreeze()
    capsys.readouterr()
    for told in (1, 0):
        learn.fit(1, cbs=LSUVCallback())
        assert len(lines(capsys)) == told


# --- what a Learner holds of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True])
def test_a_learner_holds_nothing_of_ours_but_the_report(make, refused):
    learn, other = make(model=small_cnn(), cbs=LSUVCallback()), make(model=small_cnn())
    for each in (learn, other):
        if refused:
            load(each)
        each.fit(1)
    learn.remove_cb(LSUVCallback)
    assert set(vars(learn)) ^ set(vars(other)) == (set() if refused else {"lsuv_report"})


def test_the_report_keeps_no_model_and_pickles_as_if_no_learner_had_it(make):
    learn = make(cbs=LSUVCallback())
    learn.fit(1)
    report, model = learn.lsuv_report, weakref.ref(learn.model)
    plain = LSUVReport(report.rows, report.n_forward, report.seconds)
    assert len(pickle.dumps(report)) == len(pickle.dumps(plain))
    assert vars(copy.copy(report)) == vars(copy.deepcopy(report)) == vars(plain)
    del learn
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("how", ["deep copy", "pickle", "export"])
def test_copies_where_the_model_that_was_watched_is_gone(make, how):
    learn = make(cbs=LSUVCallback())
    learn.model = small_cnn()
    gc.collect()
    assert runs_in_the_next_fit(COPIES[how](learn), cbs=None)


@pytest.mark.parametrize("between", ["nothing", "another model"])
def test_a_deep_copy_s_report_is_about_the_copy_s_model(make, between):
    learn = make(cbs=LSUVCallback(), opt_func=SGD)
    learn.fit(1)
    twin = copy.deepcopy(learn)
    twin.fit(1)
    if between == "another model":
        twin.model = small_cnn()
    report = twin.lsuv_report
    twin.fit(1, reset_opt=True)
    assert (twin.lsuv_report is report) == (between == "nothing")


def test_a_run_that_was_declined_is_no_run(make, capsys, monkeypatch):
    def declined(*args, **kwargs):
        raise CannotRun("no luck")

    learn = make(cbs=LSUVCallback(), opt_func=SGD)
    with monkeypatch.context() as patch:
        patch.setattr("fastai_lsuv.callback._initialise", declined)
        learn.lr_find(num_it=8, show_plot=False)
    assert lines(capsys) == ["LSUV: not run, because no luck"]
    assert learn.lsuv.report is None
    with pytest.raises(AttributeError, match="a fit went on without it, because no luck; once"):
        learn.lsuv_report  # noqa: B018
    assert runs_in_the_next_fit(learn, cbs=None)


# --- no report --------------------------------------------------------------------------------------------------------

NO_REPORT = {
    "no callback": (lambda learn: None, r"fit with LSUVCallback\(\), or call learn.lsuv_init\(\)"),
    "no fit yet": (lambda learn: learn.add_cb(LSUVCallback()), "when the first fit begins"),
    "refused": (lambda learn: load(learn.add_cb(LSUVCallback())), "weights were loaded into it"),
    "only measured": (lambda learn: learn.lsuv_init(mean=None, std=None), "fit with"),
}


@pytest.mark.parametrize("case", NO_REPORT)
def test_where_there_is_no_report_the_error_says_why(make, case):
    do, text = NO_REPORT[case]
    do(learn := make())
    assert not hasattr(learn, "lsuv_report")
    assert "lsuv_report" not in vars(learn)
    with pytest.raises(AttributeError, match=text):
        learn.lsuv_report  # noqa: B018


def test_other_attributes_are_asked_of_the_model_as_ever(make):
    learn = make()
    assert learn.named_parameters == learn.model.named_parameters
    with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'nothing'"):
        learn.nothing  # noqa: B018
    del learn.__dict__["model"]
    with pytest.raises(AttributeError, match="model"):
        learn.lsuv_report  # noqa: B018


# --- learn.lsuv_init --------------------------------------------------------------------------------------------------


def test_the_callback_s_options_and_batch_are_the_defaults_of_lsuv_init(make):
    batch = torch.randn(8, 1, 8, 8), torch.arange(8)
    learn = make(cbs=LSUVCallback(batch=batch, std=0.5, exclude="1.*"))
    assert [row.name for row in learn.lsuv_init(mean=None)] == ["0.0", "0.2"]
    with torch.no_grad():
        out = call(learn.model[0][0], batch[0])
    assert out.std().item() == pytest.approx(0.5, abs=1e-3)
    assert [row.name for row in learn.lsuv_init(exclude=None, std=2)] == ["0.0", "0.2", "1.0", "1.3"]


# --- initialised on request -------------------------------------------------------------------------------------------


def warned_by_lsuv_init(learn, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn.lsuv_init(**options)
    return [str(w.message) for w in caught if "lsuv_init" in str(w.message)]


def test_lsuv_init_warns_that_it_overwrote_what_was_trained(make):
    learn = make(small_cnn(nn.BatchNorm2d))
    assert not warned_by_lsuv_init(learn)
    learn.fit(1)
    (line,) = warned_by_lsuv_init(learn)
    assert line.startswith("lsuv_init() overwrote a network that looks trained (batch norm `0.1` has counted 3 ")


def test_it_warns_where_lsuv_came_before_the_training_as_well(make):
    learn = make(cbs=LSUVCallback())
    learn.fit(1)
    (line,) = warned_by_lsuv_init(learn)
    assert "(the optimizer has made steps)" in line


def test_it_does_not_warn_of_a_new_head_or_a_diagnosis(make):
    learn = make()
    learn.fit(1)
    assert not warned_by_lsuv_init(learn, mean=None, std=None)
    learn.freeze()
    assert not warned_by_lsuv_init(learn)
