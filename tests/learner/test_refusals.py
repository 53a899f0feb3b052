"""Callbacks that fail in the pilot fit: they are left out, a warning names them, and training goes on."""

from functools import partial
from itertools import count

import pytest
from audit import audit, bits, rng_print
from fastai.callback.mixup import MixUp
from fastai.vision.all import CancelBatchException
from feeds import loaders, pixels
from learners import Spy, exact, learner, ran, small_cnn
from test_pilot_traces import Affine, plain

from fastai_lsuv import LSUVCallback


class Failing(Affine):
    "Raises the first time that one of its kind comes to an event."

    left = []  # the copies' as well

    def __init__(self, error, event="before_batch"):
        self.error, self.event = error, event

    def before_fit(self):
        self.perhaps("before_fit")

    def before_train(self):
        self.perhaps("before_train")

    def before_batch(self):
        self.perhaps("before_batch")
        super().before_batch()

    def perhaps(self, event):
        if event == self.event and self.left:
            raise self.left.pop() and self.error


class Generating(Affine):
    def __init__(self):
        self.factors = (7 for _ in count())

    def before_batch(self):
        self.learn.xb = (self.x * next(self.factors) + 3,)


class Uncopied(Affine):
    def __deepcopy__(self, memo):
        raise TypeError("not me")


def warned(caught, name):
    return [w for w in caught if issubclass(w.category, UserWarning) and name in str(w.message)]


REFUSALS = {
    "generator": Generating,
    "uncopied": Uncopied,
    "no message": lambda: Failing(RuntimeError()),
} | {event: partial(Failing, ValueError("no luck"), event) for event in ("before_fit", "before_train", "before_batch")}


@pytest.mark.parametrize("how", REFUSALS)
def test_one_that_cannot_be_asked_is_named_and_the_raw_batch_used(how):
    Failing.left[:] = [True]
    cb, learn = REFUSALS[how](), learner(loaders(), small_cnn())
    with pytest.warns(UserWarning, match=type(cb).__name__) as caught:
        learn.fit(1, cbs=[cb, LSUVCallback(), spy := Spy().watch(pixels()[:16])])
    assert len(warned(caught, type(cb).__name__)) == 1
    if how in ("before_batch", "before_fit", "before_train"):
        assert "no luck" in str(warned(caught, "Failing")[0].message)
    assert ran(learn)
    assert exact(spy.audits[0])
    assert len(spy.seen) == 6
    assert spy.seen[0][1][0] == bits(pixels()[:16] * 7 + 3), "training itself goes on as the callback has it"


def test_a_warning_as_often_as_it_is_tried():
    learn = learner(loaders(), small_cnn(), cbs=Generating())
    for _ in range(2):
        with pytest.warns(UserWarning, match="Generating"):
            learn.lsuv_init()
        assert exact(audit(learn.model, pixels()[:16]))


def test_nothing_is_left_of_an_attempt_that_failed():
    "Not what callbacks ahead of it did to the loss, the Learner and themselves."
    Failing.left[:] = [True]
    learn = learner(loaders(), small_cnn(), cbs=[MixUp(), late := Failing(ValueError("no luck"))])
    late.order, before, mix = 5, dict(vars(learn)), plain(learn.mix_up)
    rng = rng_print()
    with pytest.warns(UserWarning, match="Failing"):
        learn.lsuv_init()
    assert {k: v for k, v in vars(learn).items() if k != "lsuv_report"} == before
    assert plain(learn.mix_up) == mix
    assert rng_print() == rng


class Skips(Affine):
    "Leaves out every other batch."

    def before_batch(self):
        if self.iter % 2 == 0:
            raise CancelBatchException
        super().before_batch()


def test_a_batch_that_the_callback_leaves_out():
    seen = []
    for lsuv in (True, False):
        learn = learner(loaders(), small_cnn())
        learn.fit(1, cbs=[Skips(), *([LSUVCallback()] if lsuv else []), spy := Spy()])
        seen.append(spy.seen)
        assert ran(learn) == lsuv
    assert seen[0] == seen[1]
