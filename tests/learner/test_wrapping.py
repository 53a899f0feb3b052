"""Others copy, wrap, save or compile the model: they find LSUV's weights, and LSUV what it would have found alone."""

import copy
import gc
from functools import partial

import pytest
import torch
import torch._dynamo  # here, since its import sets warnings filters
from audit import audit, bits, parameter_bits
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision, ModelToHalf
from fastai.callback.hook import ActivationStats, HookCallback
from fastai.callback.schedule import LRFinder, ParamScheduler
from fastai.distributed import DistributedTrainer, ParallelTrainer
from fastai.optimizer import SGD
from fastai.vision.all import Callback, EarlyStoppingCallback, Recorder, SaveModelCallback, TrainEvalCallback
from feeds import loaders, pixels
from learners import Spy, exact, learner, ran, small_cnn
from models import rows
from torch import nn

from fastai_lsuv import LSUVCallback, lsuv_

X = pixels()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(model=None, **kwargs):
    return learner(loaders(), model if model is not None else small_cnn(), **kwargs)


def started(model=None, **kwargs):
    "The weights with which a plain model starts after LSUV."
    make(model, **kwargs).fit(1, cbs=[LSUVCallback(verbose=False), spy := Spy()])
    return spy.states[0]


# --- its place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [TrainEvalCallback, ChannelsLast, ModelToHalf])
def test_after_what_prepares_the_model(other):
    assert other.order < LSUVCallback.order


@pytest.mark.parametrize(
    "other",
    [
        LRFinder,
        DistributedTrainer,
        SaveModelCallback,
        MixedPrecision,
        Recorder,
        ParamScheduler,
        EarlyStoppingCallback,
        Callback,
    ],
)
def test_before_what_copies_wraps_or_saves_it(other):
    assert LSUVCallback.order < other.order


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("other", [ParallelTrainer, TrainEvalCallback, ChannelsLast])
def test_sorted_as_the_learner_sorts_them(other, before):
    "Also where an order follows from `run_after` and `run_before`, whichever was added first."
    learn = make()
    cb = other(None) if other is ParallelTrainer else other()
    learn.add_cbs([LSUVCallback(), cb] if before else [cb, LSUVCallback()])
    names = [type(cb) for cb in learn.cbs.sorted("order")]
    assert (names.index(LSUVCallback) < names.index(other)) == (other is ParallelTrainer)


class EMA(Callback):
    "Copies the model when training begins."

    def __init__(self, order):
        self.order = order

    def before_fit(self):
        self.copied, self.mine = copy.deepcopy(self.learn.model), parameter_bits(self.learn.model)


@pytest.mark.parametrize("order", [0, 1, 9, 10, 11, 60, 99])
def test_copies_have_the_corrected_weights(order):
    learn = make(cbs=EMA(order))
    learn.fit(1, cbs=LSUVCallback())
    assert exact(audit(learn.ema.copied, X[:16]))
    assert parameter_bits(learn.ema.copied) == learn.ema.mine
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.ema.copied.modules())


class Shell(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Wraps(Callback):
    "For the length of the fit, as `ParallelTrainer` does."

    def before_fit(self):
        self.learn.model = Shell(self.learn.model)

    def after_fit(self):
        self.learn.model = self.learn.model.module


@pytest.mark.parametrize("wraps", [Wraps, partial(ParallelTrainer, None)], ids=["Wraps", "ParallelTrainer"])
def test_a_model_that_is_wrapped_for_the_fit(wraps):
    learn = make(cbs=wraps())
    learn.fit(1, cbs=[LSUVCallback(), spy := Spy().watch(X[:16])])
    assert exact(spy.audits[0])
    assert [row.name for row in learn.lsuv_report] == ["0.0", "0.2", "1.0", "1.3"]
    learn.fit(1, cbs=spy)
    assert ran(learn)
    assert spy.states[1] != spy.states[0]


@pytest.mark.parametrize("how", [dict(every_epoch=True), dict(at_end=True), dict()], ids=str)
def test_what_is_saved_are_the_corrected_weights(how, tmp_path):
    "Nothing is learned here, so that every file has the weights of the start."
    learn = make(path=tmp_path, opt_func=partial(SGD, mom=0.0, wd=0.0), wd=0.0)
    learn.fit(1, 0.0, cbs=[SaveModelCallback(**how), LSUVCallback(verbose=False)])
    (file,) = (tmp_path / "models").iterdir()
    saved = small_cnn()
    saved.load_state_dict(torch.load(file))
    assert exact(audit(saved, X[:16]))
    assert parameter_bits(saved) == parameter_bits(learn.model) == started()
    report = learn.lsuv_report
    learn.fit(1, 0.0, cbs=LSUVCallback())
    assert learn.lsuv_report is report


def test_lr_find_saves_them_and_brings_them_back(tmp_path):
    class Seen(LRFinder):
        def before_fit(self):
            super().before_fit()
            self.saved = torch.load(next((self.path / self.model_dir).glob("*/_tmp.pth")), weights_only=False)["model"]

    learn = make(path=tmp_path)
    learn.fit(1, cbs=[finder := Seen(num_it=6), LSUVCallback()])
    assert {n: bits(p)[-1] for n, p in finder.saved.items()} == {n: p[-1] for n, p in started().items()}
    assert parameter_bits(learn.model) == started()


# --- hooks of others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(with_hist=True), dict(every=2)], ids=str)
def test_activation_stats_are_of_training_alone(options):
    "Measured only, so that there is the same to see: as many records, each the same to the bit."
    seen = []
    for lsuv in (True, False):
        learn = make()
        learn.add_cb(stats := ActivationStats(**options))
        learn.fit(2, cbs=LSUVCallback(mean=None, std=None, verbose=False) if lsuv else None)
        seen.append(
            [
                [{k: bits(v) if isinstance(v, torch.Tensor) else v for k, v in layer.items()} for layer in batch]
                for batch in stats.stats
            ]
        )
    assert seen[0] == seen[1]
    assert len(seen[0]) == (3 if options.get("every") else 6)


@pytest.mark.parametrize(
    "rewriter",
    [None, lambda self: setattr(self.learn, "xb", (self.recorder and self.x * 2,))],
    ids=["alone", "with a rewriter"],
)
def test_hooks_of_others_outlive_what_lsuv_drops(rewriter):
    "fastai's hook callbacks take their hooks away when they are deleted, a copy of one would, too."
    learn = make(cbs=[Callback(before_batch=rewriter)] if rewriter else None)
    learn.add_cbs([stats := ActivationStats(), Callback(before_train=lambda self: gc.collect())])
    learn.fit(1, cbs=LSUVCallback(verbose=False))
    assert all(layer is not None for batch in stats.stats for layer in batch)


def test_activation_stats_of_a_first_fit_show_the_corrected_layers():
    learn = make(cbs=ActivationStats())
    learn.fit(1, 0.0, cbs=LSUVCallback())
    assert all(
        abs(layer["std"] - 1) <= 1e-3 and abs(layer["mean"]) <= 1e-3 for layer in learn.activation_stats.stats[0][:1]
    )
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_hooks_of_another_callback_see_what_they_would_have_seen_when_their_turn_comes():
    "What a `HookCallback` has stored at the end of a batch is of that batch."
    learn, stored = make(), []
    take = Callback(after_batch=lambda self: stored.append(list(self.hook.hooks.stored)) if self.training else None)

    class Hook(HookCallback):
        def hook(self, m, i, o):
            return len(o), float(o.mean())

    learn.fit(1, 0.0, cbs=[Hook(modules=[learn.model[0][0]]), LSUVCallback(), take])
    assert [s[0][0] for s in stored] == [16] * 3
    assert abs(stored[0][0][1]) <= 1e-3


# --- compiled ---------------------------------------------------------------------------------------------------------


def stripped(named):
    return {n.replace("_orig_mod.", "").removeprefix("module."): v for n, v in named.items()}


class Backend:
    "Compiles with PyTorch's backend of that name, and counts."

    def __init__(self, name):
        self.name, self.n = name, 0

    def __call__(self, graph, inputs):
        self.n += 1
        return torch._dynamo.lookup_backend(self.name)(graph, inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["torch.compile", "in place", "a part"])
def test_compiled_models_start_from_the_same_weights(how, backend):
    net = small_cnn()
    if how == "torch.compile":
        net = torch.compile(net, backend=backend)
    elif how == "in place":
        net.compile(backend=backend)
    else:
        net[0] = torch.compile(net[0], backend=backend)
    learn = make(net)
    learn.fit(1, cbs=[LSUVCallback(), spy := Spy()])
    assert stripped(spy.states[0]) == started()
    assert [row.status for row in learn.lsuv_report] == ["corrected"] * 4
    assert stripped({row.name: 1 for row in learn.lsuv_report}).keys() == {"0.0", "0.2", "1.0", "1.3"}
    assert stripped(parameter_bits(learn.model)) != started(), "and it learns"


class Around(nn.Module):
    "A class of one's own around a net: PyTorch before 2.11 doesn't compile its own containers in place."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_what_was_compiled_before_stays_compiled_and_computes_with_the_new_weights(how):
    net, backend, x = Around(small_cnn()), Backend("eager"), X[:16]
    plain = copy.deepcopy(net)
    if how == "torch.compile":
        compiled = torch.compile(net, backend=backend)
    else:
        net.compile(backend=backend)
        compiled = net
    compiled(x)
    assert backend.n == 1
    report = lsuv_(compiled, x)
    assert report.converged
    assert report.n_forward == 3
    lsuv_(plain, x)
    assert torch.equal(compiled(x), plain(x))
    assert backend.n == 1, "compiled once more"
    assert exact(audit(net, x)) if how == "torch.compile" else exact(audit(plain, x))


def test_data_parallel():
    "Without a GPU it hands its inputs through; the report's names are those of the wrapped model."
    learn = make(nn.DataParallel(small_cnn()))
    learn.fit(1, cbs=[LSUVCallback(), spy := Spy().watch(X[:16])])
    assert exact(spy.audits[0])
    assert stripped(spy.states[0]) == started()
    assert stripped({row.name: 1 for row in learn.lsuv_report}).keys() == {"0.0", "0.2", "1.0", "1.3"}


# --- scripted ---------------------------------------------------------------------------------------------------------


def part():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 8)), nn.Tanh())


def scripted(kind, module=None):
    module = part() if module is None else module
    return torch.jit.script(module) if kind == "script" else torch.jit.trace(module.eval(), torch.randn(2, 8)).train()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_scripted_parts_are_named_and_left_alone(kind, training):
    inside = nn.Sequential(nn.Linear(8, 8), nn.Sequential(scripted(kind), scripted(kind, nn.Sequential(nn.Tanh()))))
    net = nn.Sequential(nn.Linear(10, 8), scripted(kind), nn.ReLU(), inside, nn.Linear(8, 3)).train(training)
    net[3][1][0].train(not training)
    flags, old = {n: m.training for n, m in net.named_modules()}, {n: bits(t) for n, t in net.state_dict().items()}
    report = lsuv_(net, rows())
    named = [row for row in report if row.reason == "scripted"]
    assert [(row.name, row.status) for row in named] == [("1", "skipped"), ("3.1.0", "skipped")]
    assert (
        {row.name for row in report if row.status == "corrected"}
        == {"0", "3.0", "4"}
        == {row.name for row in report} - {"1", "3.1.0"}
    )
    assert {n: m.training for n, m in net.named_modules()} == flags
    changed = {n for n, t in net.state_dict().items() if bits(t) != old[n]}
    assert changed == {f"{n}.{p}" for n in ("0", "3.0", "4") for p in ("weight", "bias")}
    assert exact(
        [r for r in audit(unscripted(net) if kind == "script" else net, rows()) if r.name in ("0", "3.0", "4")]
    )
    assert "never called" not in repr(report)


def unscripted(net):
    "The same model in Python, whose norms the audit knows (a trace made in eval mode has no batch statistics)."
    plain = nn.Sequential(
        nn.Linear(10, 8),
        part(),
        nn.ReLU(),
        nn.Sequential(nn.Linear(8, 8), nn.Sequential(part(), nn.Tanh())),
        nn.Linear(8, 3),
    )
    plain.load_state_dict(net.state_dict())
    return plain


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_a_model_scripted_as_a_whole(kind):
    net = scripted(kind)
    old = parameter_bits(net)
    report = lsuv_(net, torch.randn(32, 8))
    assert [(row.name, row.status, row.reason) for row in report] == [("", "skipped", "scripted")]
    assert parameter_bits(net) == old


def test_a_scripted_part_in_a_learner(capsys):
    learn = make(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), scripted("script"), nn.Linear(8, 10)))
    learn.fit(1, cbs=LSUVCallback())
    assert "scripted" in capsys.readouterr().out
    assert learn.lsuv_report["2"].reason == "scripted"
    assert [row.status for row in learn.lsuv_report if row.name != "2"] == ["corrected"] * 2


def test_a_scripted_part_that_is_excluded_is_not_named():
    report = lsuv_(nn.Sequential(nn.Linear(10, 8), scripted("script")), rows(), exclude="1")
    assert [row.name for row in report] == ["0"]
