"""Measured in the precision in which training computes: under its autocast, with a cache of its own."""

import copy
from statistics import median

import feeds
import pytest
import torch
import torchvision.models as tv
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from audit import audit, differences, fingerprint, outputs_of, parameter_bits
from fastai.torch_core import default_device, to_float
from fastai.vision.all import Callback, CancelFitException
from learners import Spy, exact, learner, ran
from models import Shared, Stumble, Tally, convnet, images, rows
from torch import nn
from zoo import xresnet18

from fastai_lsuv import LSUVCallback, lsuv_

DEVICE = default_device().type
EPS = torch.finfo(torch.bfloat16).eps
N = 16


def bf16(**kwargs):
    return torch.autocast(DEVICE, torch.bfloat16, **kwargs)


class InBF16(Callback):
    "What fastai's `MixedPrecision` does, on the CPU, too: its own always says 'cuda'."

    order = 10

    def before_fit(self):
        self.autocast = bf16()

    def before_batch(self):
        self.autocast.__enter__()

    def after_pred(self):
        self.learn.pred = to_float(self.pred)

    def after_loss(self):
        self.autocast.__exit__(None, None, None)

    def after_fit(self):
        self.autocast = None


class FromInit(InBF16):
    def __init__(self):
        self.autocast = bf16()

    def before_fit(self):
        pass

    def after_fit(self):
        pass


class EachBatch(InBF16):
    def before_fit(self):
        pass

    def before_batch(self):
        self.autocast = bf16()
        super().before_batch()


class LeftEarly(InBF16):
    "The loss is no part of it."

    def after_pred(self):
        self.autocast.__exit__(None, None, None)
        super().after_pred()

    def after_loss(self):
        pass


class Uncached(InBF16):
    def before_fit(self):
        self.autocast = bf16(cache_enabled=False)


class AndRewrites(InBF16):
    def before_batch(self):
        super().before_batch()
        self.learn.xb = (self.x * 3 - 1,)


VARIANTS = [InBF16, FromInit, EachBatch, LeftEarly, Uncached]


class Dtypes(nn.Module):
    "Keeps the dtypes that come by."

    def __init__(self):
        super().__init__()
        self.seen = Tally()

    def forward(self, x):
        self.seen.append(x.dtype)
        return x


class Look(Callback):
    "Keeps the model as the first epoch finds it, and ends the fit."

    order = 90

    def before_epoch(self):
        self.found = copy.deepcopy(self.learn.model)
        raise CancelFitException


def audited(model, x):
    "In a context of its own, whose cache is empty."
    with bf16():
        return audit(model, x)


def loaders(x=None):
    return feeds.loaders(images(N) if x is None else x, bs=8)


def state():
    return [
        torch.is_autocast_enabled(DEVICE),
        torch.get_autocast_dtype(DEVICE),
        torch.is_autocast_cache_enabled(),
        nesting(),
    ]


def nesting():
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def allowed(r, row=None):
    "A few roundings, of the output before and after."
    return 1e-3 + 4 * EPS * max(1.0, abs(r.mean) / r.std, *([abs(row.mean_before) / row.std_before] if row else []))


def assert_near(records, report):
    "Each layer within a few roundings, most far nearer: casts of the weights as they were would be off by far."
    for r in records:
        row = report[r.name]
        assert row.status in ("corrected", "unchanged"), row
        assert abs(r.std - 1) <= allowed(r, row), (r.name, r.std)
        if r.has_bias:
            assert abs(r.mean) <= allowed(r, row), (r.name, r.mean)
        assert (row.mean_after, row.std_after) == (pytest.approx(r.mean, abs=1e-4), pytest.approx(r.std, rel=1e-4))
    assert median(abs(r.std - 1) for r in records) <= EPS / 2
    assert median(abs(report[r.name].std_before - 1) for r in records) > 0.05, "far off before"


@pytest.mark.parametrize("make", VARIANTS)
def test_every_kind_of_autocast_callback(make, recwarn):
    net, before = nn.Sequential(*convnet(), Dtypes()), state()
    net.insert(1, Dtypes())
    learn = learner(loaders(), net, cbs=make())
    learn.fit(1, cbs=[LSUVCallback(), look := Look()])
    assert_near(audited(look.found, images(N)[:8]), learn.lsuv_report)
    assert set(net[1].seen) == set(net[-1].seen) == {torch.bfloat16}
    assert state() == before
    assert not [w for w in recwarn if "LSUV" in str(w.message)]


class Evaluates(Callback):
    "Uses autocast for something of its own, and ends the fit when it likes."

    order = 80

    def before_epoch(self):
        with bf16():
            self.out = self.learn.model(torch.ones(1, 3, 16, 16, device=DEVICE))
        raise CancelFitException


@pytest.mark.parametrize("cast", [True, False])
def test_a_callback_that_uses_autocast_for_something_else(cast, recwarn):
    "It is not what the training computes in, and its going wrong ahead of time takes nobody's autocast away."
    learn = learner(loaders(), nn.Sequential(*convnet(), Dtypes()), cbs=[InBF16()] if cast else [])
    learn.fit(1, cbs=[LSUVCallback(), Evaluates()])
    assert set(learn.model[-1].seen[:3]) == {torch.bfloat16 if cast else torch.float32}
    assert not [w for w in recwarn if "LSUV" in str(w.message)]


class Accelerated(Callback):
    "Wraps the model as fastai's `DistributedTrainer` does, whose precision `accelerate launch` decides."

    order = 11

    def __init__(self):
        self.accelerator = Accelerator(cpu=DEVICE == "cpu")

    def before_fit(self):
        self.plain, self.learn.model = self.learn.model, self.accelerator.prepare(self.learn.model)

    def after_fit(self):
        self.learn.model = self.accelerator.unwrap_model(self.learn.model, keep_fp32_wrapper=False)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_the_precision_of_accelerate(precision, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    AcceleratorState._reset_state(True)
    try:
        net, before = nn.Sequential(*convnet(), Dtypes()), state()
        learn = learner(loaders(), net, cbs=Accelerated())
        learn.fit(1, cbs=LSUVCallback(verbose=False))
        assert set(net[-1].seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert state() == before
    finally:
        AcceleratorState._reset_state(True)


def test_the_inputs_may_be_rewritten_by_it_too():
    learn = learner(loaders(), convnet(), cbs=AndRewrites())
    learn.fit(1, cbs=[LSUVCallback(), look := Look()])
    assert_near(audited(look.found, images(N)[:8] * 3 - 1), learn.lsuv_report)


def test_also_by_lsuv_init():
    learn, before = learner(loaders(), nn.Sequential(*convnet(), Dtypes()), cbs=InBF16()), state()
    learn.lsuv_init()
    assert_near(audited(learn.model, images(N)[:8]), learn.lsuv_report)
    assert set(learn.model[-1].seen) == {torch.bfloat16}
    assert state() == before
    assert not hasattr(learn.in_bf16, "autocast"), "the callback has had no `before_fit`"


@pytest.mark.parametrize("build", [tv.mobilenet_v2, tv.resnet18, xresnet18])
def test_architectures(build):
    torch.manual_seed(1)
    x = images(N, side=64)
    learn = learner(loaders(x), build(), cbs=InBF16())
    learn.fit(1, cbs=[LSUVCallback(), look := Look()])
    records = audited(look.found, x[:8])
    assert len(records) >= 20
    assert_near(records, learn.lsuv_report)


def test_blocks_and_shared_layers():
    block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU())
    net = nn.Sequential(
        block(3, 8),
        block(8, 8),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh()),
        nn.Sequential(nn.Flatten(), nn.Linear(1568, 10)),
    )
    learn = learner(loaders(), net, cbs=InBF16())
    learn.lsuv_init(modules=nn.Module.children)
    with bf16():
        seen = outputs_of(net, images(N)[:8], [row.name for row in learn.lsuv_report])
    assert [row.name for row in learn.lsuv_report] == list("0123")
    for row in learn.lsuv_report:
        right = abs(seen[row.name][1] - 1) <= 1e-3 + 4 * EPS and (
            "kept" in row.reason or abs(seen[row.name][0]) <= 1e-3 + 4 * EPS
        )
        assert row.status == ("corrected" if right else "not_converged"), (row, seen[row.name])
    assert [row.status for row in learn.lsuv_report if row.name != "2"] == ["corrected"] * 3, "the tanh cannot reach 1"

    net, x = Shared().to(DEVICE), rows().to(DEVICE)
    with bf16():
        report = lsuv_(net, x)
    with bf16():
        records = audit(net, x)
    assert [r.n_calls for r in records] == [1, 3, 1]
    assert_near(records, report)


# --- the cache --------------------------------------------------------------------------------------------------------


class FirstStep(Callback):
    "The model as the first epoch finds it, and its gradients after the first batch."

    order, run_valid = 90, False

    def before_epoch(self):
        self.twin = copy.deepcopy(self.learn.model)

    def after_backward(self):
        self.grads = {n: p.grad.clone() for n, p in self.learn.model.named_parameters()}
        self.batch = self.x, self.y
        raise CancelFitException


@pytest.mark.parametrize("make", VARIANTS)
def test_the_first_step_is_that_of_the_corrected_weights(make):
    "No cast of a weight from before, nor one made without gradients, is left for it."
    learn = learner(loaders(), convnet(), cbs=make())
    learn.fit(1, cbs=[LSUVCallback(), seen := FirstStep()])
    with bf16():
        pred = seen.twin(seen.batch[0]).float()
    learn.loss_func(pred, seen.batch[1]).backward()
    for name, p in seen.twin.named_parameters():
        assert p.grad.abs().sum() > 0, name
        assert torch.equal(p.grad, seen.grads[name]), name


@pytest.mark.parametrize("how", ["lsuv_", "fit"])
def test_inside_an_autocast_of_the_user_s(how):
    "Its cache, filled before, holds no old weights afterwards."
    net, x, before = convnet(), images(N)[:8].to(DEVICE), state()
    learn = learner(loaders(), net)
    with bf16():
        net(x)
        inside = state()
        report = lsuv_(net, x) if how == "lsuv_" else None
        if how == "fit":
            learn.fit(1, cbs=[LSUVCallback(), Look()])
            report = learn.lsuv_report
        assert state() == inside
        y = net(x)
        assert y.requires_grad
        assert_near(audit(net, x), report)  # in this context, on purpose
        y.float().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert state() == before


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_under_autocast_leaves_no_autocast(at):
    net = nn.Sequential(*convnet(), Stumble(RuntimeError("no luck"), at))
    learn, old, before, whole = learner(loaders(), net, cbs=InBF16()), parameter_bits(net), state(), fingerprint(net)
    with pytest.raises(RuntimeError, match="no luck"):
        learn.lsuv_init()
    assert state() == before
    assert parameter_bits(net) == old
    assert not differences(whole, fingerprint(net))
    learn.fit(1, cbs=[LSUVCallback(), look := Look()])
    assert_near(audited(look.found, images(N)[:8]), learn.lsuv_report)


@pytest.mark.cpu
@pytest.mark.parametrize("how", ["to_fp16", "to_bf16", "to_channelslast"])
def test_fastai_s_own_on_a_machine_without_a_gpu(how):
    "Where they change nothing, LSUV doesn't either; the same weights as without them."
    learn, plain = learner(loaders(), convnet()), learner(loaders(), copy.deepcopy(convnet()))
    plain.model.load_state_dict(learn.model.state_dict())
    getattr(learn, how)()
    for one in (learn, plain):
        one.fit(1, cbs=[LSUVCallback(), spy := Spy().watch(images(N)[:8])])
    assert exact(spy.audits[0])
    assert [row.std_after for row in learn.lsuv_report] == pytest.approx(
        [row.std_after for row in plain.lsuv_report], abs=1e-5
    )
    assert ran(learn)
