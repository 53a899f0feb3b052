"""What `ActivationStatsRecorder` records and when: each real training batch, and nothing else."""

import math
from functools import partial

import pytest
import torch
from audit import call
from fastai.vision.all import (
    Callback,
    CancelBatchException,
    CancelTrainException,
    FetchPredsCallback,
    GradientAccumulation,
    MixUp,
)
from feeds import loaders
from learners import digits, learner, small_cnn, two_groups
from torch import nn
from witness import COLUMNS, Witness, assert_as_seen, hooks_on, records, skin

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback

LAYERS = ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1", "1.3"]


@pytest.fixture(scope="module")
def dls():
    return digits()  # 3 training batches of 32 and 2 of validation


@pytest.fixture
def make(dls, tmp_path):
    return partial(learner, dls, path=tmp_path)


def fitted(learn, *fits, **options):
    "Runs each of `fits` with a recorder and a witness beside it."
    learn.add_cbs([rec := ActivationStatsRecorder(**options), seen := Witness(valid=options.get("valid", False))])
    for fit in fits or [lambda learn: learn.fit(1)]:
        fit(learn)
    return rec, seen.records


# --- real training batches, and nothing else --------------------------------------------------------------------------


def test_a_record_for_each_training_batch(make):
    rec, seen = fitted(make(), lambda learn: learn.fit(2))
    assert len(seen) == 6
    assert_as_seen(rec, seen)
    frame = rec.to_frame()
    assert list(frame.columns) == COLUMNS
    assert [*frame.groupby("step", sort=False).epoch.first()] == [0, 0, 0, 1, 1, 1] and [*frame.step.unique()] == [
        *range(6)
    ]
    assert set(frame.fit) == {0} and set(frame.phase) == {"train"}
    assert rec.layer_names == LAYERS == [*frame.layer.unique()], (
        "leaves with parameters, and activations; no container, no Flatten"
    )


def test_before_the_first_fit_it_is_empty_but_readable():
    rec = ActivationStatsRecorder()
    assert rec.layer_names == [] and len(rec.to_frame()) == 0 and len(rec.stats) == 0 and len(rec.summary()) == 0
    assert list(rec.to_frame().columns) == COLUMNS


def context(learn):
    with learn:
        call(learn.model, torch.zeros(2, 1, 8, 8))


OTHERS = {
    "lr_find": lambda learn: learn.lr_find(num_it=7, show_plot=False),
    "validate": lambda learn: learn.validate(),
    "on training data": lambda learn: learn.validate(ds_idx=0),
    "get_preds": lambda learn: learn.get_preds(),
    "of training data": lambda learn: learn.get_preds(ds_idx=0),
    "predict": lambda learn: learn.predict(learn.dls.valid_ds[0][0]),
    "tta": lambda learn: learn.tta(n=2),
    "with learn": context,
    "summary": lambda learn: learn.summary(),
    "with losses": lambda learn: learn.get_preds(with_loss=True),
    "lsuv_init": lambda learn: learn.lsuv_init(),
    "the model itself": lambda learn: call(learn.model.train(), torch.zeros(2, 1, 8, 8)),
    "fit(0)": lambda learn: learn.fit(0),
}


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_nothing_else_is_recorded(make, other, valid):
    "Before the first fit, between two and after the last."
    learn = make()
    rec, _seen = fitted(
        learn,
        OTHERS[other],
        lambda learn: learn.fit(1),
        OTHERS[other],
        lambda learn: learn.fit(1),
        OTHERS[other],
        valid=valid,
    )
    frame = rec.to_frame()
    assert len(records(rec, "train")) == 6 and [*frame[frame.phase == "train"].step.unique()] == [*range(6)]
    assert len(records(rec, "valid")) == (4 if valid else 0)
    assert [*frame.fit.unique()] == ([1, 3] if other == "fit(0)" else [0, 1])
    assert not hooks_on(learn.model)


@pytest.mark.parametrize("valid", [False, True])
def test_predictions_fetched_inside_a_fit_are_not(make, dls, valid):
    rec, _ = fitted(
        make(cbs=FetchPredsCallback(dl=dls.train.new(shuffle=False), reorder=False)),
        lambda learn: learn.fit(2),
        valid=valid,
    )
    assert len(records(rec, "train")) == 6 and len(records(rec, "valid")) == (4 if valid else 0)


class Meddler(Callback):
    "Runs the model by itself at every event of a training batch but the one for it."

    def __init__(self, order):
        self.order, self.x = order, torch.randn(4, 1, 8, 8) * 100

    def ask(self):
        with torch.no_grad():
            call(self.learn.model, self.x)

    before_epoch = before_train = after_loss = before_step = after_batch = after_epoch = before_validate = ask


@pytest.mark.parametrize("order", [-30, 50, 100])
def test_passes_of_other_callbacks_outside_of_a_batch_are_not(make, order):
    rec, seen = fitted(make(cbs=Meddler(order)), lambda learn: learn.fit(2))
    assert_as_seen(rec, seen)


class Validates(Callback):
    "Asks for a validation of its own, with all its events, `before_fit` among them."

    def after_train(self):
        self.learn.validate(), self.learn.get_preds(), self.model.train()


@pytest.mark.parametrize("valid", [False, True])
def test_a_whole_validation_in_the_middle_of_a_fit_ends_nothing(make, valid):
    rec = ActivationStatsRecorder(valid=valid)
    make(cbs=[rec, Validates()]).fit(2)
    index = rec.to_frame().drop_duplicates(["phase", "step", "epoch"])
    assert list(index[index.phase == "train"].step) == list(range(6)) and set(index.fit) == {0}
    assert sum(index.phase == "valid") == (2 if valid else 0)


def test_validation_when_asked_for(make):
    rec, seen = fitted(make(), lambda learn: learn.fit(2), valid=True)
    assert len(seen) == 10
    assert_as_seen(rec, seen)
    frame = rec.to_frame()
    phases = frame.drop_duplicates(["epoch", "phase"])
    assert [*phases.phase] == ["train", "valid"] * 2
    assert {*frame[(frame.phase == "valid") & (frame.epoch == 0)].step} == {3}, "the step count at that moment"


def test_lsuv_s_passes_are_not(make):
    rec, seen = fitted(make(cbs=LSUVCallback(verbose=False)), lambda learn: learn.fit(1))
    assert len(seen) == 3
    assert_as_seen(rec, seen)


# --- several fits, one history ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["Learner", "fit"])
def test_several_fits_are_one_history(make, door):
    learn = make()
    rec, seen = ActivationStatsRecorder(), Witness()
    if door == "Learner":
        learn.add_cbs([rec, seen])
    for epochs in (1, 2):
        learn.fit(epochs, cbs=[rec, seen] if door == "fit" else None)
    assert_as_seen(rec, seen.records)
    assert [*rec.to_frame().drop_duplicates("step")[["fit", "epoch", "step"]].itertuples(index=False, name=None)] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        *((1, e, 3 + 3 * e + i) for e in (0, 1) for i in range(3)),
    ]


def test_both_phases_of_fine_tune(dls, tmp_path):
    rec, seen = fitted(two_groups(dls, path=tmp_path), lambda learn: learn.fine_tune(2, freeze_epochs=1))
    assert len(seen) == 9 and set(rec.to_frame().fit) == {0, 1}
    assert_as_seen(rec, seen)


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_each_nth_batch(make, every):
    rec, seen = fitted(make(), lambda learn: learn.fit(3), lambda learn: learn.fit(1), every=every)
    assert [*rec.to_frame().step.unique()] == [s for s in range(12) if s % every == 0]
    assert_as_seen(rec, seen[::every])


def test_each_nth_validation_batch_is_counted_anew(tmp_path):
    "From the first one of each epoch, whatever the step."
    rec, seen = fitted(learner(loaders(), path=tmp_path), lambda learn: learn.fit(2), valid=True, every=2)
    assert len(seen) == 12
    assert_as_seen(rec, [seen[i] for i in (0, 2, *(3, 5), 7, *(9, 11))])
    assert len(records(rec, "valid")) == 4


def test_another_model_in_the_same_learner(make):
    learn = make()
    rec, seen = fitted(learn)
    learn.model = small_cnn()
    learn.create_opt()
    learn.fit(1)
    assert len(records(rec)) == 6
    assert_as_seen(rec, seen)


# --- batches that end early -------------------------------------------------------------------------------------------


class Cancel(Callback):
    def __init__(self, event, at=(1, 3), order=20):
        self.event, self.at, self.order, self.n = event, at, order, -1

    def before_batch(self):
        self.n += self.training
        self.stop("before_batch")

    def after_pred(self):
        self.stop("after_pred")

    def after_loss(self):
        self.stop("after_loss")

    def stop(self, event):
        if self.training and event == self.event and self.n in self.at:
            raise CancelBatchException


@pytest.mark.parametrize("order", [-30, 20, 100])
@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_loss"])
def test_cancelled_batches(make, event, order):
    "Its record is there, or (cancelled too early) not; the others' records are as if nothing had happened."
    learn = make(cbs=Cancel(event, order=order))
    rec, seen = fitted(learn, lambda learn: learn.fit(2))
    found = records(rec)
    assert len(found) in ({"before_batch": [4], "after_pred": [4, 6], "after_loss": [6]}[event])
    if len(found) == len(seen):
        assert_as_seen(rec, seen)
    assert len(set(rec.to_frame().step)) == len(found), "a step each"
    assert not hooks_on(learn.model)


def test_a_batch_that_is_cancelled_ahead_of_the_forward(make):
    "By a hook of the model, say, after all callbacks: nothing of the recorder stays on the model."
    learn, calls = make(), []

    def stop(m, args):
        calls.append(1)
        if len(calls) == 3:
            raise CancelBatchException

    handle = learn.model.register_forward_pre_hook(stop)
    before = skin(learn.model)

    class Looks(Callback):
        order = math.inf

        def after_train(self):
            self.skin = skin(self.learn.model)

    learn.add_cbs([rec := ActivationStatsRecorder(), looks := Looks()]).fit(1)
    assert looks.skin == before and len(records(rec)) == 2
    handle.remove()


class Short(Callback):
    def after_batch(self):
        if self.training and self.iter == 1:
            raise CancelTrainException


def test_shortened_epochs(make):
    rec, seen = fitted(make(cbs=Short()), lambda learn: learn.fit(2))
    assert len(seen) == 4 and [*rec.to_frame().step.unique()] == [*range(4)]
    assert_as_seen(rec, seen)


def test_gradient_accumulation(make):
    "Every batch, whether the optimizer steps after it or not."
    rec, seen = fitted(make(cbs=GradientAccumulation(64)), lambda learn: learn.fit(2))
    assert len(seen) == 6
    assert_as_seen(rec, seen)


def test_what_the_model_was_fed(make):
    rec, seen = fitted(make(cbs=MixUp()), lambda learn: learn.fit(1))
    assert_as_seen(rec, seen)


# --- which layers -----------------------------------------------------------------------------------------------------


CHOICES = {
    "a type": (dict(modules=nn.ReLU), ["0.1", "0.3", "1.1"]),
    "types": (dict(modules=(nn.Conv2d, nn.Flatten)), ["0.0", "0.2", "1.0", "1.2"]),
    "a name": (dict(modules="1.3"), ["1.3"]),
    "patterns": (dict(modules=["0.*", "1"]), ["0.0", "0.1", "0.2", "0.3", "1"]),
    "blocks": (dict(modules=nn.Module.children), ["0", "1"]),
    "without": (dict(exclude=nn.ReLU), ["0.0", "0.2", "1.0", "1.3"]),
    "some without": (dict(modules="0.*", exclude=["0.2"]), ["0.0", "0.1", "0.3"]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_any_module_may_be_chosen(make, choice):
    options, names = CHOICES[choice]
    rec, seen = fitted(make(), **options)
    assert rec.layer_names == names
    assert_as_seen(rec, seen)


def test_modules_themselves(make):
    learn = make()
    rec, seen = fitted(learn, modules=[learn.model[1][0], learn.model[0]])
    assert rec.layer_names == ["0", "1.0"], "in the order of their registration"
    assert_as_seen(rec, seen)


BAD = [
    (dict(every=0), ValueError),
    (dict(every=-1), ValueError),
    (dict(every=1.5), TypeError),
    (dict(near_zero=-1e-3), ValueError),
    (dict(near_zero=float("nan")), ValueError),
    (dict(near_zero="0"), TypeError),
    (dict(max_records=0), ValueError),
    (dict(max_records="many"), TypeError),
]


@pytest.mark.parametrize(("options", "error"), BAD)
def test_bad_values_are_told_at_once(options, error):
    ((name, value),) = options.items()
    with pytest.raises(error, match=name) as e:
        ActivationStatsRecorder(**options)
    assert str(value) in str(e.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(modules="nowhere.*"), ValueError),
        (dict(exclude="nowhere"), ValueError),
        (dict(modules=nn.LSTM), ValueError),
        (dict(modules=3), TypeError),
    ],
)
def test_a_choice_of_nothing_ends_the_fit_before_it_begins(make, options, error):
    learn = make()
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(error, match="modules|exclude"):
        learn.fit(1, cbs=ActivationStatsRecorder(**options))
    assert all(torch.equal(p, q) for p, q in zip(before, learn.model.parameters())) and not hooks_on(learn.model)


def test_near_zero_is_what_one_asks_for(make):
    learn = make()
    learn.add_cbs([rec := ActivationStatsRecorder(near_zero=0.3), seen := Witness(near_zero=0.3)]).fit(1)
    assert_as_seen(rec, seen.records)
