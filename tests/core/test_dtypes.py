"""Models in half and in double precision: right as far as the type can be, and `not_converged` where it can't."""

import copy

import pytest
import torch
from audit import audit, parameter_bits
from fastai.callback.fp16 import ModelToHalf
from fastai.torch_core import to_float, to_half
from fastai.vision.all import Callback
from feeds import loaders
from learners import Spy, learner
from models import convnet, images, mlp, rows
from torch import nn
from zoo import xresnet18

from fastai_lsuv import LSUVCallback, lsuv_


def allowed(r, row, dtype):
    "1e-3; in half precision a few roundings more, of the output before and after."
    if dtype == torch.float64:
        return 1e-3
    return 1e-3 + 4 * torch.finfo(dtype).eps * max(1.0, abs(r.mean) / r.std, abs(row.mean_before) / row.std_before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("build", [convnet, xresnet18])
def test_models_in_another_dtype(build, dtype):
    torch.manual_seed(1)
    net, x = build().to(dtype), images(8, side=32, dtype=dtype)
    report = lsuv_(net, x)
    assert {p.dtype for p in net.parameters()} == {dtype}
    for r in audit(net, x):
        row = report[r.name]
        tol = allowed(r, row, dtype)
        right = abs(r.std - 1) <= tol and (not r.has_bias or abs(r.mean) <= tol)
        assert row.status == ("corrected" if right else "not_converged"), row
        assert right, (r.name, r.mean, r.std)
    if dtype == torch.float64:
        assert max(abs(r.std - 1) for r in audit(net, x)) < 1e-9


class ToHalf(Callback):
    "`NonNativeMixedPrecision` as far as the CPU goes."

    order = 10

    def before_batch(self):
        self.learn.xb = to_half(self.xb)

    def after_pred(self):
        self.learn.pred = to_float(self.pred)


@pytest.mark.cpu  # fastai's Recorder keeps its losses there, where these tests make everything
def test_a_model_that_is_made_half_for_the_fit():
    learn = learner(loaders(images(16), bs=8), convnet(), cbs=[ModelToHalf(), ToHalf()])
    learn.fit(1, 1e-5, cbs=[LSUVCallback(), spy := Spy().watch(images(16)[:8].half())])
    assert {v[1] for v in spy.states[0].values()} == {torch.float16}
    assert {row.status for row in learn.lsuv_report} == {"corrected"}
    for r in spy.audits[0]:
        assert max(abs(r.std - 1), abs(r.mean)) <= allowed(r, learn.lsuv_report[r.name], torch.float16)
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("std", "scale"), [(1e5, 1.0), (1.0, 1e-6)], ids=["an output", "a weight"])
def test_what_the_dtype_cannot_hold_is_not_converged(std, scale):
    "It would overflow fp16: named, and no infinite weight."
    net = nn.Sequential(nn.Linear(10, 8, bias=False), nn.Linear(8, 3)).half()
    report = lsuv_(net, rows(dtype=torch.float16) * scale, std=std)
    assert report["0"].status == "not_converged"
    assert not report.converged
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"modules": nn.Sequential}])
@pytest.mark.parametrize(("scale", "status"), [(1e-41, "not_converged"), (1e-37, "corrected"), (1e36, "corrected")])
def test_a_signal_at_the_ends_of_single_precision_leaves_finite_weights(scale, status, options):
    "To bring a denormal one to 1 takes a factor that is infinite in the weight's dtype: not done, and said."
    net, x = nn.Sequential(nn.Sequential(nn.Linear(10, 8), nn.Softsign()), nn.Linear(8, 3)), rows()
    with torch.no_grad():
        for p in net[0].parameters():
            p.mul_(scale)
    report = lsuv_(net, x, **options)
    assert all(p.isfinite().all() for p in net.parameters()), report
    if "modules" not in options:
        assert report["0.0"].status == status, report


@pytest.mark.parametrize(
    "options",
    [{}, {"per_channel": True}, {"modules": nn.Module.children}, {"init": "auto"}],
    ids=["default", "by channel", "blocks", "auto"],
)
def test_a_default_device_elsewhere_changes_nothing(options):
    "What is measured stays where the model is: with a GPU as the default device, a model may be on the CPU."
    net, x = mlp(10, *[16] * 40, 3, act=nn.Tanh), rows()  # so deep that "auto" looks for another way
    twin = copy.deepcopy(net)
    lsuv_(net, x, **options)
    with torch.device("meta"):
        lsuv_(twin, x, **options)
    assert parameter_bits(twin) == parameter_bits(net)


class Transposing(nn.Module):
    "A layer that hands on a view in which values of a channel don't lie as they would in a fresh tensor."

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n) / n)

    def forward(self, x):
        return (x @ self.weight).transpose(1, 2)


class TakesAView(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = Transposing(8), nn.Linear(40, 4)

    def forward(self, x):
        return self.head(self.tokens(x).transpose(1, 2).view(len(x), -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_handed_on_lies_in_memory_as_before(dtype):
    report = lsuv_(TakesAView().to(dtype), torch.randn(16, 5, 8).to(dtype))
    assert [row.status for row in report] == ["corrected"] * 2
