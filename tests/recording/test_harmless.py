"""Training with the recorder is training without it, to the bit; and whatever ends it, nothing stays behind."""

import copy
import os
import pickle
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from audit import bits, parameter_bits
from fastai.vision.all import Callback, CrossEntropyLossFlat, GradientAccumulation, MixUp
from feeds import loaders
from learners import Spy, digits, learner, seed, small_cnn
from models import Stumble
from recorded import Checkpointed
from torch import nn
from witness import Witness, assert_as_seen, close, hooks_on, records, skin

import fastai_lsuv
from fastai_lsuv import ActivationStatsRecorder

HERE = Path(__file__).parents[1]
ALL = dict(with_hist=True, with_grad=True, valid=True)


@pytest.fixture(scope="module")
def dls():
    return digits()


@pytest.fixture
def make(dls, tmp_path):
    return partial(learner, dls, path=tmp_path)


# --- the same training ------------------------------------------------------------------------------------------------


def dropping():
    return nn.Sequential(small_cnn(nn.BatchNorm2d), nn.Dropout(0.3), nn.Linear(10, 10))


class Noise(nn.Module):
    "Draws numbers whenever it runs."

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) + 0.1 * np.random.rand() + 0.1 * random.random()


def noisy():
    return nn.Sequential(small_cnn(), Noise(), nn.Linear(10, 10))


def optimizer_bits(learn):
    return [{k: bits(v) if isinstance(v, torch.Tensor) else v for k, v in s.items()} for s in learn.opt.state.values()]


def everything(learn, train, **options):
    "All that tells trainings apart: weights, buffers, gradients, the optimizer, batches, random streams, losses."
    spy, _rec = Spy(), ActivationStatsRecorder(**options) if options or options == {} else None
    learn.add_cb(spy)
    train(learn)
    return dict(
        weights=parameter_bits(learn.model),
        buffers=[bits(b) for b in learn.model.buffers()],
        grads=[bits(p.grad) for p in learn.model.parameters()],
        opt=optimizer_bits(learn),
        seen=spy.seen,
        streams=spy.streams,
        losses=learn.recorder.values,
        training=[m.training for m in learn.model.modules()],
        skin=skin(learn.model),
    )


CASES = {
    "plainly": ({}, {}),
    "all options": ({}, ALL),
    "every third": ({}, dict(every=3, **ALL)),
    "few records": ({}, dict(max_records=2, **ALL)),
    "blocks": ({}, dict(modules=nn.Module.children, **ALL)),
    "mixup": (dict(cbs=lambda: MixUp()), ALL),
    "accumulation": (dict(cbs=lambda: GradientAccumulation(64)), ALL),
    "dropout and norms": (dict(model=dropping), ALL),
    "noise": (dict(model=noisy), ALL),
    "checkpointing": (dict(model=lambda: Checkpointed(False, dropping())), ALL),
    "a log": ({}, dict(fname="log.csv", **ALL)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "train",
    [
        lambda learn: learn.fit_one_cycle(2, 1e-2),
        lambda learn: (learn.lr_find(num_it=5, show_plot=False), learn.fine_tune(1), learn.validate()),
    ],
    ids=["one cycle", "find, tune"],
)
def test_training_is_the_same_to_the_bit(tmp_path, case, train):
    how, options = CASES[case]

    def run(**recorder):
        cbs = [how["cbs"]()] if "cbs" in how else []
        if recorder:
            cbs.append(ActivationStatsRecorder(**recorder["options"]))
        model = how.get("model", small_cnn)()
        seed(17)
        learn = learner(
            digits(96),
            model,
            path=tmp_path,
            cbs=cbs,
            splitter=lambda m: [list(m.parameters())[:4], list(m.parameters())[4:]],
        )
        return everything(learn, train), [cb for cb in cbs if isinstance(cb, ActivationStatsRecorder)]

    if "fname" in options:
        options = options | {"fname": tmp_path / options["fname"]}
    (without, _), (with_it, (rec,)) = run(), run(options=options)
    assert len(rec.to_frame())
    for key in without:
        assert without[key] == with_it[key], key


@pytest.mark.slow
def test_with_several_workers(tmp_path):
    def run(cbs):
        seed(17)
        learn = learner(digits(96, num_workers=2), small_cnn(), path=tmp_path, cbs=cbs)
        return everything(learn, lambda learn: learn.fit(2))

    without, with_it = run([]), run([ActivationStatsRecorder(**ALL)])
    for key in without:
        assert without[key] == with_it[key], key


# --- whatever ends it -------------------------------------------------------------------------------------------------


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ctx.error


class Backfires(nn.Module):
    def __init__(self):
        super().__init__()
        self.error = None

    def forward(self, x):
        return x if self.error is None else Fails.apply(x, self.error)


class Loss:
    def __init__(self):
        self.f, self.error = CrossEntropyLossFlat(), None

    def __call__(self, *args):
        if self.error is not None:
            raise self.error
        return self.f(*args)


class Raises(Callback):
    "Raises `error` at the second batch's `event`."

    def __init__(self, event=None, error=None, order=50):
        self.event, self.error, self.order, self.n = event, error, order, 0

    def __call__(self, event):
        if event == "before_batch" and self.training:
            self.n += 1
        if event == self.event and self.error is not None and self.n >= 2:
            raise self.error


PLACES = [
    "model",
    "inner hook",
    "loss",
    "backward",
    *(f"{e} {o}" for e in ("before_batch", "after_pred") for o in (-30, 50, 100)),
    "before_batch 1000",
    "after_loss 50",
    "after_batch 100",
    "before_validate 50",
]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_no_hook_is_left_when_an_error_or_an_interrupt_ends_it(place, kind, tmp_path):
    "At once, while the error is being handled, not after the next event; and the next fit records as ever."
    error, stumble, back, loss, cb = kind("broken"), Stumble(None, 0), Backfires(), Loss(), Raises()
    model = nn.Sequential(*small_cnn(), stumble, back)
    learn = learner(
        loaders(), model, path=tmp_path, loss_func=loss, metrics=[], cbs=[rec := ActivationStatsRecorder(**ALL), cb]
    )
    before, ran = skin(model), [False]
    if place == "model":
        stumble.error, stumble.at = error, 2
    elif place == "inner hook":
        cb.order, cb.event = 50, None
        handle = model[1][0].register_forward_hook(lambda *args: (_ for _ in ()).throw(error))
        before = skin(model)
    elif place == "loss":
        loss.error = error
    elif place == "backward":
        back.error = error
    else:
        cb.event, order = place.split()
        cb.order, cb.error = int(order), error
    try:
        learn.fit(1)
    except BaseException as e:
        assert type(e) is kind
        ran[0] = True
        assert skin(model) == before, "while it is being handled"
    assert ran[0]
    if place == "inner hook":
        handle.remove()
    stumble.error, stumble.at, back.error, loss.error, cb.event = None, 0, None, None, None
    kept = len(records(rec))
    learn.add_cb(seen := Witness(valid=True)).fit(2)
    frame = rec.to_frame()
    assert frame.step.is_monotonic_increasing
    again = frame[frame.fit == frame.fit.max()]
    assert len(again[again.phase == "train"].step.unique()) == 6
    assert records(rec)[kept:][-1].keys() == {*rec.layer_names}
    got = records(rec)[-len(seen.records) :]
    for one, other in zip(got, seen.records):
        assert one.keys() <= other.keys() and all(close(one[layer], other[layer]) for layer in one)
    assert not hooks_on(model)


def test_what_was_recorded_before_an_error_is_kept(tmp_path):
    model = nn.Sequential(*small_cnn(), Stumble(RuntimeError("broken"), 3))
    learn = learner(loaders(), model, path=tmp_path, cbs=[rec := ActivationStatsRecorder(), seen := Witness()])
    with pytest.raises(RuntimeError, match="broken"):
        learn.fit(1)
    assert_as_seen(rec, seen.records[:2])
    model[-1].at = 0
    learn.fit(1)
    assert_as_seen(rec, seen.records)  # and nothing of the batch that it ended


def test_removed_in_the_middle_of_a_fit(make):
    class Removes(Callback):
        def after_batch(self):
            if self.iter == 1 and hasattr(self.learn, "activation_stats_recorder"):
                self.learn.remove_cb(rec)

    learn = make(cbs=[rec := ActivationStatsRecorder(), Removes()])
    learn.fit(2)
    assert not hooks_on(learn.model) and 1 <= len(records(rec)) <= 2


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_of_a_recorder_and_of_a_learner(make, copied, tmp_path):
    learn = make(cbs=ActivationStatsRecorder(fname=tmp_path / "log.csv", **ALL))
    twin = copied(learn)  # before any fit
    twin.activation_stats_recorder.fname = None
    twin.fit(1)
    assert len(twin.activation_stats_recorder.to_frame()) and not len(learn.activation_stats_recorder.to_frame())
    learn.fit(1)
    twin = copied(learn)
    frame = learn.activation_stats_recorder.to_frame()
    assert twin.activation_stats_recorder.to_frame().equals(frame)
    twin.fit(1)
    assert len(
        records(twin.activation_stats_recorder, "train")
    ) == 6 and learn.activation_stats_recorder.to_frame().equals(frame), "each has a history of its own"
    rec = ActivationStatsRecorder(**ALL)
    learn.fit(1, cbs=rec)
    again = copied(rec)
    assert again.to_frame().equals(rec.to_frame()) and again.layer_names == rec.layer_names
    assert torch.equal(again.hist("0.0"), rec.hist("0.0")) and again.summary().equals(rec.summary())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("place", ["loss", "model"])
def test_copies_after_an_interrupt(make, copied, place):
    "With all records up to it, and fit for another fit; without the samples of the batch that it ended."
    loss, stumble = Loss(), Stumble(None, 0)
    learn = make(model=nn.Sequential(*small_cnn(), stumble), loss_func=loss)
    rec = ActivationStatsRecorder(modules=nn.Conv2d, **ALL)
    learn.fit(1, cbs=rec)
    if place == "loss":
        loss.error = KeyboardInterrupt()
    else:
        stumble.error, stumble.at = KeyboardInterrupt(), stumble.calls[0] + 2
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=rec)  # (with fastai's loader in it the Learner itself can't be copied now)
    twin, loss.error, stumble.error, stumble.at = copied(rec), None, None, 0
    assert len(records(twin, "train")) == (3 if place == "loss" else 4)
    make(cbs=twin).fit(1)
    assert len(twin.to_frame().step.unique()) >= 6 and twin.layer_names == rec.layer_names


FRESH_PROCESS = """
import sys, warnings
warnings.simplefilter('ignore')
import numpy as np, torch
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
x = torch.from_numpy(np.load(sys.argv[2]))
with torch.no_grad(): np.save(sys.argv[3], learn.model.eval()(x).numpy())
assert learn.predict(np.zeros((8, 8), np.uint8))
rec = learn.activation_stats_recorder
before = len(rec.to_frame().step.unique())
rec.summary(), rec.layer_names
from learners import digits
learn.dls = digits()
learn.fit(1)
print(before, len(rec.to_frame().step.unique()))
"""


@pytest.mark.slow
def test_exported_and_loaded_in_a_new_process(make, tmp_path):
    learn = make(cbs=ActivationStatsRecorder(with_hist=True, with_grad=True))
    learn.fit(1)
    learn.export()
    x = torch.rand(4, 1, 8, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    path = [str(HERE), str(Path(fastai_lsuv.__file__).parents[1]), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *(str(tmp_path / n) for n in ("export.pkl", "x.npy", "out.npy"))],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert np.array_equal(np.load(tmp_path / "out.npy"), learn.model.eval().cpu()(x).numpy())
    before, after = map(int, done.stdout.split()[-2:])
    assert after - before == 3


def test_an_export_holds_no_batch(tmp_path):
    class Keeper(Callback):
        def before_fit(self):
            self.seen = []

        def before_batch(self):
            self.seen.append(self.learn.xb[0].clone())

    learn = learner(digits(64, 16), small_cnn(), path=tmp_path, cbs=ActivationStatsRecorder(**ALL))
    learn.fit(1, cbs=(keeper := Keeper()))
    learn.export()
    raw = (tmp_path / "export.pkl").read_bytes()
    assert not [x for batch in keeper.seen for x in batch if x.cpu().numpy().tobytes()[64:192] in raw]
