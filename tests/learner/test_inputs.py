"""What the model is fed: callbacks that rewrite the inputs in `before_batch` are heeded, however they do it."""

import threading

import pytest
import torch
from audit import audit, bits
from fastai.data.load import DataLoader
from fastai.learner import before_batch_cb
from fastai.vision.all import Callback
from feeds import complaints, loaders, pixels
from learners import Spy, exact, learner, small_cnn

from fastai_lsuv import LSUVCallback

# --- rewriters, all to 7x + 3, one for each way -----------------------------------------------------------------------


class Affine(Callback):
    def before_batch(self):
        self.learn.xb = (self.x * 7 + 3,)


class Inherited(Affine):
    pass


class InPlace(Callback):
    def before_batch(self):
        self.x.mul_(7).add_(3)


class Both(Callback):
    def before_batch(self):
        self.learn.xb, self.learn.yb = (self.x * 7 + 3,), (self.y.flip(0),)


class OnlyTraining(Affine):
    run_valid = False


class Early(Affine):
    order = -30


class Late(Affine):
    order = 80


class FromEvents(Callback):
    "Needs all events on the way."

    def before_fit(self):
        self.a = 7

    def before_epoch(self):
        self.b = 1 + self.epoch

    def before_train(self):
        self.c = 2

    def before_batch(self):
        self.learn.xb = (self.x * self.a + self.b + self.c,)

    def after_fit(self):
        self.a = self.b = self.c = None


class BeforeTheLoop(Callback):
    "Has no `before_batch`: it puts a transform of batches on the Learner's own split."

    def before_train(self):
        split = type(self.learn)._split
        self.learn._split = lambda b: split(self.learn, [b[0] * 7 + 3, b[1]])

    def after_train(self):
        del self.learn._split


class FromTheStart(Affine):
    "Needs what the Learner says of itself at its first batch."

    def before_batch(self):
        if self.training and self.train_iter == 0:
            assert (self.epoch, self.n_epoch, self.iter, self.n_iter, self.pct_train) == (0, 1, 0, 3, 0.0)
            assert self.dl is self.dls.train
            assert self.model.training
        super().before_batch()


class Holder(Affine):
    "Keeps what it belongs to."

    def before_fit(self):
        self.kept = [self.learn, self.model, self.dls, self.opt]

    def before_batch(self):
        assert next(self.kept[1].parameters()).device == self.x.device
        super().before_batch()


class Transform:
    def on(self, learn):
        learn.xb = (learn.x * 7 + 3,)


class Held(Callback):
    "An object that it holds sets the Learner's inputs."

    def __init__(self):
        self.tfm = Transform()

    def before_batch(self):
        self.tfm.on(self.learn)


class Locked(Affine):
    "Holds what can't be copied."

    def __init__(self):
        self.lock = threading.Lock()

    def before_batch(self):
        with self.lock:
            super().before_batch()


class Steps(Affine):
    "A schedule of the user's own; before the first fit the Learner has no optimizer."

    def before_batch(self):
        self.opt.set_hyper("lr", 1e-3 / (1 + self.train_iter))
        super().before_batch()


class SecondLoader(Callback):
    "Takes numbers from a loader of its own (semi-supervised training)."

    def __init__(self):
        self.dl = DataLoader([(torch.tensor(7.0), torch.tensor(3.0))] * 64, bs=1, shuffle=True)

    def before_train(self):
        self.it = iter(self.dl)

    def before_batch(self):
        a, b = next(self.it)
        self.learn.xb = (self.x * a.item() + b.item(),)


def affine(self):
    self.learn.xb = (self.x * 7 + 3,)


KINDS = (Affine, Inherited, InPlace, Both, OnlyTraining, Early, Late, FromEvents, BeforeTheLoop, FromTheStart, Holder,
         Held, Locked, Steps, SecondLoader)  # fmt: skip
REWRITERS = {kind.__name__: kind for kind in KINDS}
REWRITERS |= {
    "function": lambda: Callback(before_batch=affine),
    "before_batch_cb": lambda: before_batch_cb(lambda self, xb, yb: ((xb[0] * 7 + 3,), yb)),
}


@pytest.mark.parametrize("where", ["Learner", "fit"])
@pytest.mark.parametrize("how", REWRITERS)
def test_statistics_are_those_of_the_rewritten_inputs(how, where, recwarn):
    cb = REWRITERS[how]()
    learn = learner(loaders(), small_cnn(), cbs=cb if where == "Learner" else None)
    spy = Spy().watch(pixels()[:16] * 7 + 3)
    learn.fit(1, cbs=[LSUVCallback(), spy, *([cb] if where == "fit" else [])])
    assert len(spy.audits[0]) == 4
    assert exact(spy.audits[0])
    assert not complaints(recwarn)


@pytest.mark.parametrize("how", ["Affine", "InPlace", "FromEvents", "Steps", "SecondLoader", "before_batch_cb"])
def test_also_by_lsuv_init(how, recwarn):
    learn = learner(loaders(), small_cnn(), cbs=REWRITERS[how]())
    before, cb = dict(vars(learn)), dict(vars(learn.cbs[-1]))
    learn.lsuv_init()
    assert exact(audit(learn.model, pixels()[:16] * 7 + 3))
    assert {k: v for k, v in vars(learn).items() if k != "lsuv_report"} == before
    assert vars(learn.cbs[-1]) == cb
    assert not complaints(recwarn)


def test_also_with_a_batch_of_one_s_own_which_stays_what_it_was():
    b = pixels()[16:32], torch.arange(16) % 10
    kept, learn = bits(b[0]), learner(loaders(), small_cnn(), cbs=InPlace())
    spy = Spy().watch(b[0] * 7 + 3)
    learn.fit(1, cbs=[LSUVCallback(batch=b), spy])
    assert exact(spy.audits[0])
    assert bits(b[0]) == kept


@pytest.mark.parametrize("first", ["times", "plus"])
def test_several_rewrite_in_their_order(first):
    times, plus = (
        before_batch_cb(lambda self, xb, yb: ((xb[0] * 7,), yb)),
        before_batch_cb(lambda self, xb, yb: ((xb[0] + 3,), yb)),
    )
    times.order, plus.order = (1, 2) if first == "times" else (2, 1)
    spy = Spy().watch(pixels()[:16] * 7 + 3 if first == "times" else (pixels()[:16] + 3) * 7)
    learner(loaders(), small_cnn()).fit(1, cbs=[times, LSUVCallback(), plus, spy])
    assert exact(spy.audits[0])


@pytest.mark.parametrize("switch", ["run", "run_train"])
def test_a_callback_that_is_switched_off_is_not_heeded(switch):
    cb = Affine()
    setattr(cb, switch, False)
    learner(loaders(), small_cnn()).fit(1, cbs=[cb, LSUVCallback(), spy := Spy().watch(pixels()[:16])])
    assert exact(spy.audits[0])
