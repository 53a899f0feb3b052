"""What the model is fed: callbacks that rewrite the inputs in `before_batch` are heeded, however they do it."""

import pytest
import torch
from audit import audit, bits
from fastai.learner import before_batch_cb
from fastai.vision.all import Callback
from feeds import complaints, loaders, pixels
from learners import Spy, exact, learner, small_cnn

from fastai_lsuv import LSUVCallback

# --- rewriters, all to 7x + 3 -----------------------------------------------------------------------------------------


class Affine(Callback):
    def before_batch(self):
        self.learn.xb = (self.x * 7 + 3,)


class Inherited(Affine):
    pass


class Extended(Affine):
    def before_batch(self):
        if self.training:
            self.seen = self.iter
        super().before_batch()


class Helper(Callback):
    def before_batch(self):
        self.rewrite(*self.xb)

    def rewrite(self, x):
        self.learn.xb = (x * 7 + 3,)


def feed(learn, x):
    learn.xb = (x,)


class Elsewhere(Callback):
    "Hands the Learner to a function that does it."

    def before_batch(self):
        feed(self.learn, self.x * 7 + 3)


class InPlace(Callback):
    def before_batch(self):
        self.x.mul_(7).add_(3)


class Slice(Callback):
    def before_batch(self):
        self.learn.xb[0][...] = self.xb[0] * 7 + 3


class BySetattr(Callback):
    def before_batch(self):
        for name, value in {"xb": (self.x * 7 + 3,)}.items():
            setattr(self.learn, name, value)


class Both(Callback):
    def before_batch(self):
        self.learn.xb, self.learn.yb = (self.x * 7 + 3,), (self.y.flip(0),)


class OnlyTraining(Affine):
    run_valid = False


class Early(Affine):
    order = -30


class Late(Affine):
    order = 80


class FromFit(Callback):
    def before_fit(self):
        self.a, self.b = 7, 3

    def before_batch(self):
        self.learn.xb = (self.x * self.a + self.b,)

    def after_fit(self):
        self.a = self.b = None


class FromTrain(FromFit):
    def before_fit(self):
        self.a = 7

    def before_train(self):
        self.b = 3


class FromEpoch(FromFit):
    def before_fit(self):
        self.a = 7

    def before_epoch(self):
        self.b = 3 + self.epoch


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


def affine(self):
    self.learn.xb = (self.x * 7 + 3,)


def scale_and_shift(x):
    x.mul_(7).add_(3)


class InPlaceElsewhere(Callback):
    def before_batch(self):
        scale_and_shift(self.x)


class Augmented(Callback):
    def before_batch(self):
        for x in self.xb:
            x *= 7
            x += 3


class Out(Callback):
    def before_batch(self):
        torch.add(self.x * 7, 3, out=self.x)


class Decorated(Callback):
    @torch.no_grad()
    def before_batch(self):
        self.learn.xb = (self.x * 7 + 3,)


class Transform:
    def __call__(self, x):
        return x.mul_(7).add_(3)

    def on(self, learn):
        learn.xb = (learn.x * 7 + 3,)


class Held(Callback):
    "An object that it holds sets the Learner's inputs."

    def __init__(self):
        self.tfm = Transform()

    def before_batch(self):
        self.tfm.on(self.learn)


class HeldInPlace(Held):
    "An object that it holds writes into them."

    def before_batch(self):
        self.tfm(self.x)


class HeldFunction(Callback):
    def __init__(self, f=affine):
        self.f = f

    def before_batch(self):
        self.f(self)


REWRITERS = {
    c.__name__: c
    for c in (
        Affine,
        Inherited,
        Extended,
        Helper,
        Elsewhere,
        InPlace,
        Slice,
        BySetattr,
        Both,
        OnlyTraining,
        Early,
        Late,
        FromFit,
        FromTrain,
        FromEpoch,
        FromTheStart,
        Holder,
        InPlaceElsewhere,
        Augmented,
        Out,
        Decorated,
        Held,
        HeldInPlace,
        HeldFunction,
    )
}
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


@pytest.mark.parametrize("how", ["Affine", "InPlace", "FromFit", "FromTrain", "before_batch_cb"])
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
