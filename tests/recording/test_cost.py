"""What it costs, told by counting: no synchronisation in a hook, bounded memory, nothing kept alive."""

import gc
import inspect
import weakref

import pytest
import torch
from counts import of_a_step
from fastai.data.core import DataLoaders
from fastai.vision.all import Callback
from feeds import loaders
from learners import learner, small_cnn
from models import Stumble, mlp, rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from witness import held, records

from fastai_lsuv import ActivationStatsRecorder

ALL = dict(with_hist=True, with_grad=True)


# --- nothing waits for the device -------------------------------------------------------------------------------------


class NoLook(TorchDispatchMode):
    "Operations that need a value on the host, or bring it there, are errors."

    BANNED = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "bincount",
        "allclose",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        if name in self.BANNED:
            raise AssertionError(f"{name} waits for the device")
        if name == "index" and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            raise AssertionError("a mask as an index waits for the device")
        if name in ("_to_copy", "copy_") and (kwargs or {}).get("pin_memory"):
            raise AssertionError("pinned")
        return func(*args, **(kwargs or {}))


class Guarded(nn.Module):
    "The model and its backward, watched."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with NoLook():
            return self.net(x)


class WatchesBackward(Callback):
    order = 100

    def before_backward(self):
        self.mode = NoLook()
        self.mode.__enter__()

    def after_backward(self):
        self.mode.__exit__(None, None, None)


@pytest.mark.parametrize(
    "options",
    [{}, dict(with_hist=True), ALL, dict(valid=True, **ALL)],
    ids=["plainly", "histograms", "all", "validation too"],
)
def test_no_hook_looks_at_a_value(options, tmp_path):
    "Small outputs and large, usual values and such as need care."
    for scale in (1.0, 1e-30, 1e30, float("nan")):
        model = Guarded(
            nn.Sequential(
                nn.Conv2d(1, 48, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(48, 8, 3, 2, 1),
                nn.Flatten(),
                nn.Linear(8 * 64, 10),
            )
        )
        with torch.no_grad():
            model.net[0].weight.mul_(scale)
        learn = learner(
            loaders(torch.rand(96, 1, 16, 16), bs=16),
            model,
            path=tmp_path,
            cbs=[rec := ActivationStatsRecorder(**options), WatchesBackward()],
            metrics=[],
        )
        learn.fit(1)
        assert len(records(rec, "train")) >= 3 and "0" in rec.layer_names[0]


def test_that_guard_guards():
    for look in (lambda x: x.item(), lambda x: bool(x > 0), lambda x: x[x > 0]):
        with pytest.raises(AssertionError), NoLook():
            look(torch.tensor(1.0))


# --- few operations ---------------------------------------------------------------------------------------------------


def pyramid(depth):
    "Each layer has its own width: no two outputs of one size."
    return mlp(10, *range(20, 20 + depth), 3)


@pytest.mark.parametrize("make", [lambda depth: mlp(10, *[16] * depth, 3), pyramid], ids=["one width", "all widths"])
@pytest.mark.parametrize(
    ("options", "of_a_layer", "of_all"), [({}, 2, 125), (dict(with_hist=True), 2, 150), (ALL, 4, 215)], ids=str
)
def test_a_view_and_a_copy_a_layer_and_the_rest_for_all_at_once(make, options, of_a_layer, of_all):
    "Of its weights nothing; of an activation's units the lowest and the highest value, and what they were before."
    few, many = (of_a_step(lambda depth=depth: make(depth), rows(16), **options) for depth in (4, 40))
    of_units = 6
    assert many - few == (of_a_layer * 2 + of_units) * 36, "36 layers and their activations more"
    assert few - of_a_layer * 9 - of_units * 4 <= of_all


def test_large_outputs_take_no_more():
    def cnn():
        return nn.Sequential(nn.Conv2d(1, 48, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12288, 3))

    assert of_a_step(cnn, torch.rand(16, 1, 16, 16)) <= 2 * 4 + 132


# --- bounded memory ---------------------------------------------------------------------------------------------------


class Weigh(Callback):
    "Bytes that the recorder holds, after each batch."

    order = 101

    def __init__(self, rec):
        self.rec, self.bytes = rec, []

    def after_batch(self):
        if self.training:
            self.bytes.append(held(vars(self.rec), but=[self.learn, self.learn.model, *self.learn.cbs]))


def long_fit(n, model=None, epochs=1, **options):
    "`n` batches an epoch."
    data = [(rows(4), torch.zeros(4, dtype=torch.long))] * n
    dls = DataLoaders(*(torch.utils.data.DataLoader(data[:k], batch_size=None) for k in (n, 1)))
    dls.n_inp = 1
    learn = learner(
        dls, model or mlp(10, 4, 4, 3), metrics=[], cbs=[rec := ActivationStatsRecorder(**options)], lr=1e-6
    )
    learn.add_cb(weigh := Weigh(rec))
    learn.fit(epochs)
    return rec, weigh.bytes


@pytest.mark.parametrize("options", [{}, ALL])
@pytest.mark.parametrize("max_records", [1, 7])
def test_memory_has_a_bound_that_max_records_sets(max_records, options):
    "Within an epoch, too: after 300 steps as much as after 150."
    rec, weights = long_fit(300, max_records=max_records, **options)
    assert len(records(rec)) <= max_records
    assert max(weights[150:]) <= 1.05 * max(weights[:150]), (max(weights[:150]), max(weights[150:]))


def test_memory_within_an_epoch_without_a_small_bound():
    "What grows is the history, by the size of a record; no buffer beside it."
    rec, weights = long_fit(500, epochs=1)
    layers, grown = len(rec.layer_names), weights[-1] - weights[250]
    assert len(records(rec)) == 500
    assert grown <= 250 * layers * 3 * 8 * 2.5 + 2**16


def test_the_default_keeps_100_layers_with_histograms_under_64_mb():
    model = nn.Sequential(nn.Linear(10, 4), *[nn.Linear(4, 4) for _ in range(99)])
    rec, weights = long_fit(110, model, with_hist=True, max_records=100)
    assert len(rec.layer_names) == 100
    default = inspect.signature(ActivationStatsRecorder).parameters["max_records"].default
    assert max(weights) * default / 100 < 64 * 2**20, f"{max(weights) * default / 100 / 2**20:.0f} MB"


# --- nothing kept alive -----------------------------------------------------------------------------------------------


class Outputs(Callback):
    "How many outputs and batches of earlier steps are alive at the start of each."

    order = 99

    def before_fit(self):
        self.refs, self.alive, self.handles = (
            [],
            [],
            [m.register_forward_hook(self.keep) for m in self.learn.model.modules()],
        )

    def keep(self, m, args, out):
        self.refs.append(weakref.ref(out))

    def before_batch(self):
        gc.collect()
        self.alive.append(sum(r() is not None for r in self.refs))
        self.refs += [weakref.ref(self.learn.xb[0]), weakref.ref(self.learn.yb[0])]

    def after_fit(self):
        for h in self.handles:
            h.remove()


@pytest.mark.parametrize("options", [{}, dict(valid=True, **ALL)])
def test_no_batch_and_no_output_is_kept(options, tmp_path):
    def alive(cbs):
        learn = learner(loaders(), small_cnn(), path=tmp_path, cbs=cbs)
        gc.freeze()  # all that was there before: a collection takes a tenth of the time
        try:
            learn.fit(2, cbs=(outputs := Outputs()))
        finally:
            gc.unfreeze()
        gc.collect()
        return outputs.alive, sum(r() is not None for r in outputs.refs)

    assert alive([ActivationStatsRecorder(**options)]) == alive([])


def test_a_recorder_does_not_keep_the_model(tmp_path, nothing_left_behind):
    learn = learner(loaders(), small_cnn(), path=tmp_path)
    rec, model = ActivationStatsRecorder(**ALL), weakref.ref(learn.model)
    learn.fit(1, cbs=rec)
    nothing_left_behind.clear()
    del learn
    gc.collect()
    assert model() is None
    rec.to_frame(), rec.summary(), rec.layer_names


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_recorder_does_not_keep_the_model_after_an_error(tmp_path, nothing_left_behind, error):
    learn = learner(loaders(), nn.Sequential(small_cnn(), Stumble(error("broken"), 3)), path=tmp_path)
    rec, block = ActivationStatsRecorder(modules="0.*", **ALL), weakref.ref(learn.model[0][0])
    with pytest.raises(error):
        learn.fit(1, cbs=rec)
    nothing_left_behind.clear()
    del learn
    gc.collect()
    assert block() is None
    assert len(records(rec)) == 2


def test_the_model_does_not_keep_the_recorder(tmp_path):
    learn = learner(loaders(), small_cnn(), path=tmp_path)
    rec = ActivationStatsRecorder(**ALL)
    learn.fit(1, cbs=rec)
    ref = weakref.ref(rec)
    del rec
    gc.collect()
    assert ref() is None
