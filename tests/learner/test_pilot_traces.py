"""Callbacks and Learners after a pilot fit are as if there had been none."""

import gc
import os
import queue
import random
import re
import tempfile
import threading
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from audit import bits, parameter_bits, rng_print
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.hook import HookCallback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.vision.all import Callback, ProgressCallback
from fastcore.foundation import L
from feeds import complaints, loaders
from learners import Spy, digits, learner, ran, seed, small_cnn
from torch import nn

from fastai_lsuv import LSUVCallback

MEASURE = dict(mean=None, std=None)  # then weights, losses and metrics are those of a fit without it, too


class Affine(Callback):
    def before_batch(self):
        self.learn.xb = (self.x * 7 + 3,)


class Counts(Affine):
    "Counts, lists and tensors of its own."

    def __init__(self):
        self.calls, self.by_kind, self.means, self.last = 0, {"train": [], "valid": []}, torch.zeros(3), None

    def before_batch(self):
        super().before_batch()
        self.calls, self.last = self.calls + 1, self.x
        self.by_kind["train" if self.training else "valid"].append(self.iter)
        self.means[self.calls % 3] += 1


class Tells(Affine):
    "Counts and lists on the Learner."

    def before_batch(self):
        super().before_batch()
        self.learn.batches_seen += len(self.x)
        self.learn.log_of_means.append(float(self.x.mean()))


class TellsAnother(Affine):
    "Counts on another callback."

    def before_batch(self):
        super().before_batch()
        self.recorder.batches_counted = getattr(self.recorder, "batches_counted", 0) + 1


class Decays(Affine):
    "Rewrites, and turns down the learning rate with every batch."

    def before_batch(self):
        super().before_batch()
        for h in self.opt.hypers:
            h["lr"] *= 0.9


class Attacks(Callback):
    "Asks the model which way the images hurt it most (Goodfellow et al. 2015)."

    def before_batch(self):
        with torch.enable_grad():
            x = self.x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(self.loss_func(self.model(x), *self.yb), x)
        self.learn.xb = (self.x + 0.1 * grad.sign(),)


class Draws(Affine):
    "From Python's, numpy's and torch's streams, and from one of its own."

    def __init__(self):
        self.own = torch.Generator().manual_seed(3)

    def before_batch(self):
        self.learn.xb = (
            self.x * torch.rand(()) + torch.rand((), generator=self.own) + random.random() + np.random.rand(),
        )


class Listener(Callback):
    "Keeps a list of all events that reach it."

    order = 70

    def __init__(self):
        self.events = []


for _event in (
    "before_fit",
    "before_epoch",
    "before_train",
    "before_batch",
    "after_pred",
    "after_loss",
    "after_batch",
    "after_train",
    "after_fit",
):
    setattr(Listener, _event, lambda self, name=_event: self.events.append(name))

COMPANY = {
    "by value": Affine,
    "counts": Counts,
    "tells the Learner": Tells,
    "tells another": TellsAnother,
    "decays": Decays,
    "draws": Draws,
    "attacks": Attacks,
    "listens": Listener,
    "MixUp": MixUp,
    "CutMix": CutMix,
    "ChannelsLast": ChannelsLast,
    "GradientAccumulation": partial(GradientAccumulation, 50),
    "GradientClip": partial(GradientClip, 0.01),
    "fp16": MixedPrecision,
    "bf16": partial(MixedPrecision, AMPMode.BF16),
    "a schedule": lambda: ParamScheduler({"mom": SchedCos(0.9, 0.5)}),
}
COMPANY["all of them"] = lambda: [
    COMPANY[name]()
    for name in (
        "by value",
        "counts",
        "decays",
        "draws",
        "listens",
        "MixUp",
        "ChannelsLast",
        "GradientAccumulation",
        "GradientClip",
        "bf16",
        "a schedule",
    )
]


def plain(o, depth=4):
    "Something as values that can be compared."
    if isinstance(o, torch.Tensor):
        return bits(o)
    if isinstance(o, torch.Generator):
        return bits(o.get_state())
    if isinstance(o, dict):
        return {k: plain(v, depth - 1) for k, v in o.items()}
    if isinstance(o, (list, tuple)) or type(o).__name__ == "L":
        return [plain(v, depth - 1) for v in o]
    if isinstance(o, Callback) and depth == 4:
        return {k: plain(v, depth - 1) for k, v in vars(o).items() if k != "learn"}
    return o if isinstance(o, (int, float, str, bool, type(None))) else type(o).__name__


def story(company, capsys, **lsuv):
    "Two fits with these callbacks, and all that can be told of them."
    seed(23)
    learn = learner(digits(64, 16), nn.Sequential(small_cnn(nn.BatchNorm2d), nn.Dropout(0.2)))
    learn.batches_seen, learn.log_of_means = 0, []
    learn.add_cbs([*L(COMPANY[company]()), ProgressCallback(), spy := Spy()])
    seed(42)
    learn.fit_one_cycle(2, 1e-3, cbs=LSUVCallback(verbose=False, **lsuv) if lsuv else None)
    learn.fit(1)
    recorder, table = (
        learn.recorder,
        [re.sub(r"\d\d:\d\d", "", line) for line in re.split(r"[\r\n]", capsys.readouterr().out) if "%" not in line],
    )
    return dict(
        streams=rng_print(),
        batches=spy.seen,
        epochs=spy.streams,
        hypers=plain(list(learn.opt.hypers)),
        schedule=plain(recorder.hps),
        rates=recorder.lrs,
        kept={cb.name: plain(cb) for cb in learn.cbs if cb not in (spy, recorder, learn.progress)},
        attributes=set(vars(learn)) - {"lsuv_report"},
        loss=type(learn.loss_func),
        cbs=[type(cb) for cb in learn.cbs],
        shapes=[[len(recorder.values), len(recorder.losses)], recorder.iters],
        told=[learn.batches_seen, learn.log_of_means, getattr(recorder, "batches_counted", 0)],
        weights=parameter_bits(learn.model),
        buffers={n: bits(b) for n, b in learn.model.named_buffers()},
        losses=plain(recorder.losses),
        values=plain(recorder.values),
        table=[line.strip() for line in table],
    )


OF_WEIGHTS = {"weights", "buffers", "losses", "values", "table"}


@pytest.mark.parametrize("company", COMPANY)
def test_all_is_as_if_it_had_not_been_there(company, capsys):
    measured, corrected, without = (story(company, capsys, **lsuv) for lsuv in (MEASURE, dict(std=1.0), {}))
    assert not {k for k in without if measured[k] != without[k]}
    of_weights = OF_WEIGHTS | ({"batches"} if company == "attacks" else set())
    assert not {k for k in without if corrected[k] != without[k]} - of_weights
    assert corrected["weights"] != without["weights"]
    assert len(corrected["table"]) == len(without["table"])


def test_the_story_tells_of_each_of_them():
    "So that the test above can fail."
    assert plain(Counts()) != plain(Affine())
    a, b = Draws(), Draws()
    torch.rand((), generator=a.own)
    assert plain(a) != plain(b)
    c = Counts()
    c.by_kind["train"].append(1)
    assert plain(c) != plain(Counts())


def test_batches_made_beforehand_are_not_rewritten_once_more():
    "In place, on tensors that the dataset hands out each time: training sees x+1, x+2, …, as it would have."

    def add(self):
        self.x.add_(1)

    seen = []
    for lsuv in (True, False):
        x = torch.rand(4, 16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        data = [(b, torch.arange(16) % 10) for b in x]
        learn = learner(DataLoaders(*(DataLoader(data, bs=None) for _ in range(2))), small_cnn())
        learn.fit(1, cbs=[Callback(before_batch=add), spy := Spy(), *([LSUVCallback()] if lsuv else [])])
        seen.append([s[1] for s in spy.seen])
        assert ran(learn) == lsuv
    assert seen[0] == seen[1]


# --- what they do to the model, the loss and other objects of the Learner is done to copies ---------------------------


class Scales(Affine):
    "The weights, too."

    def before_batch(self):
        super().before_batch()
        for p in self.model.parameters():
            p.data.mul_(1.01)


class ScalesByOptimizer(Affine):
    def before_batch(self):
        super().before_batch()
        for p in self.opt.all_params():
            p[0].data.mul_(1.01)


class Hooks(HookCallback):
    def hook(self, m, i, o):
        return float(o.mean())

    def before_batch(self):
        self.learn.xb = (self.x * 7 + 3,)


class HalvesGradients(Affine):
    def before_fit(self):
        self.handles = [p.register_hook(lambda g: g * 0.5) for p in self.model.parameters()]

    def after_fit(self):
        [h.remove() for h in self.handles]


class CountsOnTheLoss(Affine):
    def before_fit(self):
        self.learn.loss_func.n_fits = getattr(self.loss_func, "n_fits", 0) + 1


@pytest.mark.parametrize("make", [Scales, ScalesByOptimizer, Hooks, HalvesGradients, CountsOnTheLoss])
def test_what_a_rewriter_does_to_the_model_the_optimizer_and_the_loss_is_not_done_beforehand(make):
    ends = []
    for lsuv in (True, False):
        learn = learner(loaders(), small_cnn(), cbs=make())
        learn.fit(1, cbs=[LSUVCallback(verbose=False, **MEASURE)] if lsuv else [])
        ends.append(
            [
                parameter_bits(learn.model),
                [len(m._forward_hooks) for m in learn.model.modules()],
                getattr(learn.loss_func, "n_fits", 0),
            ]
        )
    assert ends[0] == ends[1]


# --- who looks on -----------------------------------------------------------------------------------------------------


class Prints(Callback):
    def before_batch(self):
        print("mean", round(float(self.x.mean()), 3))


class Steps(Callback):
    "A scheduler of the user's own, that says what it does."

    def before_batch(self):
        self.opt.set_hyper("lr", 1e-3 / (1 + self.train_iter))
        print("rate", self.opt.hypers[-1]["lr"])


@pytest.mark.parametrize("make", [Prints, Steps])
def test_what_is_printed_on_trial_is_not_seen(make, capsys):
    learner(loaders(), small_cnn()).fit(1, cbs=[make(), LSUVCallback(verbose=False)])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith(("mean", "rate"))]) == 6


class Writes(Callback):
    "Keeps what it sees, and writes it to a file that can't be copied."

    def __init__(self, path):
        self.file, self.kept = path.open("a"), []

    def before_batch(self):
        self.kept.append(float(self.x.mean()))
        self.file.write(f"{self.kept[-1]}\n")


def test_a_logger_of_the_user_s_own_sees_one_batch_more_on_a_copy(tmp_path, recwarn):
    cb = Writes(tmp_path / "log.txt")
    learner(loaders(), small_cnn()).fit(1, cbs=[cb, LSUVCallback()])
    cb.file.close()
    assert len(cb.kept) == 6
    assert (tmp_path / "log.txt").read_text().splitlines() == [str(v) for v in [cb.kept[0], *cb.kept]]
    assert not complaints(recwarn)


def scheduled(calls):
    return ParamScheduler({"mom": lambda pct: calls.append(pct) or 0.9})


def hooked(calls):
    return HookCallback(every=1, hook=lambda m, i, o: calls.append(1))


@pytest.mark.parametrize("make", [scheduled, hooked])
def test_fastai_s_own_watchers_take_no_part(make):
    counts = []
    for lsuv in ([], [LSUVCallback(verbose=False, **MEASURE)]):
        calls = []
        learner(loaders(), small_cnn()).fit(1, cbs=[make(calls), *lsuv])
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


class Settings(Affine):
    "Changes settings that hold for all, and leaves them; a training undoes them in its own way."

    def before_batch(self):
        super().before_batch()
        torch.set_grad_enabled(False)
        torch.autocast("cpu", torch.bfloat16).__enter__()
        warnings.simplefilter("error")
        warnings.warn("not now", stacklevel=1)


def test_settings_for_all_are_set_back(recwarn):
    learn = learner(loaders(), small_cnn(), cbs=Settings())
    before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), list(warnings.filters)
    with pytest.warns(UserWarning, match="Settings.before_batch failed in the trial run"):
        learn.lsuv_init()
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), list(warnings.filters)) == before


class Closes(Affine):
    "Closes its file when it goes."

    def __init__(self, path):
        self.file = path.open("a")

    def before_batch(self):
        super().before_batch()
        self.file.write("x")

    def __del__(self):
        self.file.close()


class Queued(Affine):
    "Hands what it sees to a thread, and waits for the answer."

    def __init__(self, path):
        self.asked, self.told = queue.Queue(1), queue.Queue(1)
        threading.Thread(target=self.answer, args=(self.asked, self.told), daemon=True).start()

    @staticmethod
    def answer(asked, told):
        while (x := asked.get()) is not None:
            told.put(x * 7 + 3)

    def before_batch(self):
        self.asked.put(self.x)
        self.learn.xb = (self.told.get(timeout=20),)


class Temporary(Affine):
    "Has a file that is deleted with what opened it."

    def __init__(self, path):
        self.file = tempfile.NamedTemporaryFile(dir=path.parent)  # noqa: SIM115

    def before_batch(self):
        super().before_batch()
        assert os.path.exists(self.file.name)


@pytest.mark.parametrize("make", [Closes, Queued, Temporary])
@pytest.mark.filterwarnings("ignore:LSUV")
def test_what_a_copy_shares_outlives_it(make, tmp_path):
    learn = learner(loaders(), small_cnn(), cbs=make(tmp_path / "log"))
    learn.lsuv_init()
    gc.collect()
    learn.fit(1)
