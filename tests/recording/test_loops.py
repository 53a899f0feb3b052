"""Whoever runs the model in a batch of a fit, and however: it is recorded, or it is said that it was not."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch._dynamo  # here, since its import sets warnings filters
from fastai.callback.core import Callback, CancelBatchException
from fastai.learner import CancelTrainException, Learner, Recorder
from fastai.vision.all import CrossEntropyLossFlat, ProgressCallback
from feeds import loaders
from learners import seed, small_cnn
from models import mlp, rows
from recorded import fed
from torch import nn
from witness import Witness, assert_as_seen, hooks_on, records

from fastai_lsuv import ActivationStatsRecorder

# --- Learners of one's own -------------------------------------------------------------------------------------------


class TwoLoaders(Learner):
    def _do_epoch(self):
        for dl in (self.dls.train, self.dls.train):
            self.dl = dl
            self._with_events(self.all_batches, "train", CancelTrainException)
        self._do_epoch_validate()


class OwnLoop(Learner):
    def _do_epoch(self):
        self.dl = self.dls.train
        self.n_iter = len(self.dl)
        self("before_train")
        for i, b in enumerate(self.dl):
            self.one_batch(i, b)
        self("after_train")
        self._do_epoch_validate()


class OwnFit(Learner):
    def _do_fit(self):
        for epoch in range(self.n_epoch):
            self.epoch = epoch
            self("before_epoch")
            self._do_epoch_train()
            self("after_epoch")


class Step(Learner):
    def _do_one_batch(self):
        self.pred = self.forward(*self.xb)
        self("after_pred")
        self.loss_grad = self.loss_func(self.pred, *self.yb)
        self.loss = self.loss_grad.clone()
        self("after_loss")
        if self.training:
            self._do_grad_opt()


class Parts(Step):
    def forward(self, x):
        return self.model[1](self.model[0](x))


class Twice(Step):
    def forward(self, x):
        return self.model(x) + self.model(x.flip(-1))


class CompiledHandle(Step):
    def forward(self, x):
        if not hasattr(self, "handle"):
            self.handle = torch.compile(self.model, backend="eager")
        return self.handle(x)


def made(kind, *cbs, model=None, dls=None, **kwargs):
    seed(11)
    learn = kind(
        dls or loaders(),
        small_cnn() if model is None else model,
        loss_func=CrossEntropyLossFlat(),
        cbs=[*cbs],
        **kwargs,
    )
    return learn.remove_cb(ProgressCallback)


@pytest.mark.parametrize("options", [{}, dict(with_grad=True, with_hist=True)], ids=str)
@pytest.mark.parametrize("kind", [Learner, TwoLoaders, OwnLoop, OwnFit, Parts, Twice, CompiledHandle])
def test_learners_of_one_s_own(kind, options):
    def trained(*cbs):
        learn = made(kind, *cbs)
        learn.fit(2, 1e-2)
        return learn, [p.detach().clone() for p in learn.model.parameters()]

    _, without = trained()
    learn, weights = trained(rec := ActivationStatsRecorder(**options), seen := Witness())
    assert len(records(rec)) == learn.train_iter == (12 if kind is TwoLoaders else 6)
    if kind is not CompiledHandle:  # the witness' hooks were compiled with it, and see nothing
        assert_as_seen(rec, seen.records)
    assert all(torch.equal(a, b) for a, b in zip(without, weights)) and not hooks_on(learn.model)


class StepsInAfterPred(Callback):
    "A loss that is made, and stepped, in `after_pred`."

    def after_pred(self):
        if self.training:
            self.learn.loss = self.learn.pred.square().mean()
            self.learn.loss.backward()
            self.opt.step()
            self.opt.zero_grad()


@pytest.mark.parametrize("with_grad", [False, True])
def test_a_training_without_a_loss_of_fastai_s(with_grad):
    rec = ActivationStatsRecorder(with_grad=with_grad)
    x = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows(64)), batch_size=8)
    learn = made(Learner, StepsInAfterPred(), rec, model=nn.Linear(10, 8), dls=_dls(x))
    learn.remove_cb(Recorder)
    learn.fit(1)
    assert len(rec.stats) == 8
    assert not with_grad or rec.to_frame().grad_std.gt(0).all()


def _dls(x):
    from fastai.data.core import DataLoaders

    return DataLoaders(x, x)


# --- what can't be recorded is said once ------------------------------------------------------------------------------


class Everything(Callback):
    "The whole step in `before_batch`."

    def before_batch(self):
        if self.training:
            self.learn.pred = self.model(*self.xb)
            raise CancelBatchException


@pytest.mark.parametrize("verbose", [True, False])
def test_batches_in_which_nothing_was_seen(verbose, capsys):
    learn = made(Learner, ActivationStatsRecorder(verbose=verbose), Everything())
    learn.remove_cb(Recorder)
    learn.fit(2)
    said = [line for line in capsys.readouterr().out.splitlines() if "ActivationStatsRecorder" in line]
    assert len(said) == verbose and all("none of 6 batches was recorded" in line for line in said)


def test_nothing_is_said_of_a_fit_of_which_no_batch_was_due(capsys):
    learn = made(Learner, rec := ActivationStatsRecorder(every=100))
    learn.fit(1)
    learn.fit(1)
    assert len(records(rec)) == 1 and "none of" not in capsys.readouterr().out


class Odd(nn.Module):
    "Puts out what no sample can be taken of."

    def forward(self, x):
        return x.detach().to_sparse()


class WithOdd(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd, self.fc = Odd(), nn.Linear(10, 3)

    def forward(self, x):
        self.odd(x)
        return self.fc(x)


def test_an_output_that_cannot_be_recorded_ends_nothing(capsys):
    made(
        Learner, rec := ActivationStatsRecorder(), model=WithOdd(), dls=_dls([(rows(16), torch.arange(16) % 3)] * 3)
    ).fit(1)
    assert [list(record) for record in records(rec)] == [["fc"]] * 3
    said = [line for line in capsys.readouterr().out.splitlines() if "ActivationStatsRecorder" in line]
    assert len(said) == 1 and "could not be recorded: odd" in said[0]


# --- out of sight -----------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    "Anyone's own layer, which does more than to compute."

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return x


def test_no_layer_is_run_on_made_up_numbers():
    def run(*cbs):
        model = nn.Sequential(mlp(10, 8), Counts(), nn.Linear(8, 10))
        fed(model, rows(), batches=3, cbs=[*cbs])
        return model[1].seen

    assert run() == run(ActivationStatsRecorder())


class Copies(Callback):
    "Copies, pickles and looks at the model whenever anything happens, before and after all others."

    def __init__(self, order):
        self.order, self.left = order, []

    def __call__(self, event):
        if hasattr(self, "learn") and self.learn is not None:
            twin, file = copy.deepcopy(self.learn.model), io.BytesIO()
            pickle.dump(self.learn.model, file)
            self.left += [event] * (len(hooks_on(twin)) + (b"fastai_lsuv" in file.getvalue()))


@pytest.mark.parametrize("order", [-100, 50, 1e9])
def test_copies_in_the_middle_of_a_fit_have_nothing_of_ours(order):
    rec = ActivationStatsRecorder(with_grad=True, with_hist=True, valid=True)
    made(Learner, rec, copies := Copies(order)).fit(2)
    assert not copies.left and len(records(rec, "train")) == 6


class Asks(Callback):
    "Runs the model by itself after the forward."

    def __init__(self, order):
        self.order = order

    def after_pred(self):
        with torch.no_grad():
            self.learn.model(self.learn.xb[0] * 100)


@pytest.mark.parametrize("order", [-100, 50, 1e9])
def test_passes_that_callbacks_make_behind_the_forward_are_not_seen(order):
    plain, asked = ([ActivationStatsRecorder(), *cbs] for cbs in ([], [Asks(order)]))
    for cbs in (plain, asked):
        made(Learner, *cbs).fit(1)
    assert plain[0].to_frame().equals(asked[0].to_frame())


# --- names ------------------------------------------------------------------------------------------------------------


def part_compiled(model):
    model[1] = torch.compile(model[1], backend="eager")
    return model


WRAPPED = {
    "plain": lambda model: model,
    "compiled": partial(torch.compile, backend="eager"),
    "spread": nn.DataParallel,
    "spread and compiled": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "a part compiled": part_compiled,
    "a part spread": lambda model: nn.Sequential(model[0], nn.DataParallel(model[1])),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_names_are_those_of_the_plain_model(how):
    chosen = {
        None: ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1", "1.3"],
        "1.*": ["1.0", "1.1", "1.2", "1.3"],
        "1": ["1"],
        nn.Conv2d: ["0.0", "0.2", "1.0"],
    }
    for modules, names in chosen.items():
        learn = made(Learner, rec := ActivationStatsRecorder(modules=modules), model=WRAPPED[how](small_cnn()))
        learn.fit(1)
        assert rec.layer_names == names and [*records(rec)[0]] == names, modules
    torch._dynamo.reset()


# --- several models ---------------------------------------------------------------------------------------------------


def test_a_second_model_is_judged_by_itself():
    rec = ActivationStatsRecorder()
    for scale in (300.0, 1.0):  # by the first one's numbers the second would have vanished
        model = mlp(10, 16, 16, 3)
        with torch.no_grad():
            model[0].weight.mul_(scale)
        dls = _dls([(rows(16), torch.arange(16) % 3)] * 3)
        made(Learner, rec, model=model, dls=dls).fit(1, 1e-6)
    assert rec.summary().verdict.tolist() == ["healthy"] * len(rec.layer_names)
    assert rec.summary().first_std.max() < 10 and set(rec.to_frame().fit) == {0, 1}
