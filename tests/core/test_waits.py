"""On an accelerator the passes never wait for the device: no value is read in a hook, and all of them leave it in bulk.

Tried on the CPU by the code that an accelerator runs: there is a single place that tells whether values are at hand.
"""

import pytest
import torch
from audit import parameter_bits
from checks import assert_exact
from models import convnet, images, mlp, rows
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import architecture

from fastai_lsuv import lsuv_
from fastai_lsuv.core import statistics
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.core.statistics import fetched, moments

COPIES = {
    "cpu",
    "item",
    "tolist",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
    "nonzero",
    "equal",
}


class Reads(TorchDispatchMode):
    "Fails where one value is read."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), (
            "waits for the device"
        )
        return func(*args, **(kwargs or {}))


class Fetches(TorchFunctionMode):
    "Fails where a tensor goes to the host."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        to_host = any(isinstance(a, str) and a == "cpu" for a in args[1:])  # not a device: that of a weight is meant
        assert getattr(func, "__name__", "") not in COPIES and not to_host, f"waits for the device: {func}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def passes_on_a_device(monkeypatch):
    "No value is at hand, and none may be asked for during a pass."
    monkeypatch.setattr(statistics, "at_hand", lambda x: False)
    forward, n = DryRun.forward, []

    def watched(self, *args, **options):
        n.append(1)
        with Reads(), Fetches():
            forward(self, *args, **options)

    monkeypatch.setattr(DryRun, "forward", watched)
    return n


def custom():
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14, 8), nn.Tanh(), nn.Linear(8, 2, bias=False)
    )


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "make,batch",
    [
        (lambda: mlp(10, 16, 16, 3), rows),
        (convnet, images),
        (lambda: convnet(norm=nn.BatchNorm2d), images),
        (custom, lambda: torch.randn(16, 3, 16)),
        (lambda: mlp(10, 8, 3).double(), lambda: rows().double()),
        (lambda: mlp(10, 8, 3).bfloat16(), lambda: rows().bfloat16()),
    ],
    ids=["mlp", "convnet", "batch norm", "conv1d, no bias", "float64", "bfloat16"],
)
def test_no_pass_waits(passes_on_a_device, make, batch, per_channel):
    report = lsuv_(make(), batch(), per_channel=per_channel)
    assert len(passes_on_a_device) == report.n_forward == 3
    assert all(row.status == "corrected" for row in report)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_exact_without_a_look(passes_on_a_device, name):
    model, x = architecture(name)
    before = parameter_bits(model)
    report = lsuv_(model, x)
    assert_exact(model, x, report, before)
    assert report.converged and len(passes_on_a_device) == 3


@pytest.mark.parametrize(
    "option", [dict(mean=None), dict(std=None), dict(mean=None, std=None), dict(std=0.5, mean=0.1)]
)
def test_whatever_is_wanted(passes_on_a_device, option):
    lsuv_(convnet(), images(), **option)
    assert passes_on_a_device


def test_what_cannot_be_corrected_is_found_without_a_look(passes_on_a_device):
    net = mlp(10, 8, 8, 8, 3)
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.fill_(-1.0)  # what follows has nothing but its bias
        net[6].weight[0, 0] = float("nan")
    assert [row.reason for row in lsuv_(net, rows())] == ["", "constant output", "constant output", "non-finite output"]


def test_the_trap_catches():
    x = torch.ones(3)
    for look in (
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 1),
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: x.tolist(),
        lambda: torch.equal(x, x),
    ):
        with pytest.raises(AssertionError, match="waits"), Reads(), Fetches():
            look()


def test_fetched_are_the_same_numbers_in_one_copy():
    seen = [
        moments(torch.randn(50)),
        moments(torch.randn(4, 5, 6), 1),
        moments(torch.randn(3, 2), 1),
        moments(torch.randn(9)),
    ]
    home = fetched(seen)
    assert [m.n for m in home] == [m.n for m in seen] == [50, 24, 3, 9]
    for a, b in zip(home, seen):
        assert [*a.mean] == b.mean.reshape(-1).tolist() and [*a.std] == b.std.reshape(-1).tolist()
    assert fetched([]) == []
