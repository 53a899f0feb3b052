"""What LSUV costs on a device, counted on the CPU: operations and memory traffic beyond the forward's own, and waits."""

from collections import Counter

import pytest
import torch
import torchvision.models as tv
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastai_lsuv import lsuv_
from fastai_lsuv.core import statistics

MOST_OPERATIONS = 14  # for each layer and pass
MOST_TRAFFIC = 2.2  # outputs that are read or written, for each pass: 1.7 is what can't be avoided
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
VIEWS = ("view", "detach", "alias", "expand", "permute", "transpose", "aten.t.", "squeeze", "select", "slice", "split")


class Counts(TorchDispatchMode):
    "Operations, bytes that they read and write, and reads of a value."

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.operations[func] += 1
        if not any(view in str(func) for view in VIEWS):
            read = tree_leaves((args, {k: v for k, v in (kwargs or {}).items() if k != "out"}))
            self.bytes += sum(size(t) for t in [*read, *tree_leaves(output)] if isinstance(t, torch.Tensor))
        return output

    @property
    def total(self):
        return sum(self.operations.values())

    @property
    def waits(self):
        return sum(self.operations[w] for w in WAITS)


def size(t):
    return t.numel() * t.element_size()


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    monkeypatch.setattr(statistics, "at_hand", lambda x: False)


def plain_cnn(depth, width=32, norm=False):
    layers = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 3, width, 3, padding=1)]
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def mlp(depth, width=32):
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


def costs(model, x, **options):
    "Operations for each layer and pass, outputs of traffic for each pass, and waits."
    model.eval()
    outputs = []
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(lambda m, args, out: outputs.append(size(out))) for m in layers]
    with torch.no_grad(), Counts() as forward:
        model(x)
    for handle in handles:
        handle.remove()
    with Counts() as whole:
        report = lsuv_(model.train(), x, **options)
    assert report.converged and len(report) == len(layers)
    operations = (whole.total - report.n_forward * forward.total) / len(layers) / report.n_forward
    traffic = (whole.bytes - report.n_forward * forward.bytes) / sum(outputs) / report.n_forward
    return operations, traffic, whole.waits


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: plain_cnn(10), lambda: torch.randn(16, 3, 32, 32)),
        (lambda: mlp(20), lambda: torch.randn(1024, 32)),
    ],
    ids=["plain cnn", "mlp"],
)
def test_few_operations_and_little_traffic(make, batch):
    operations, traffic, _ = costs(make(), batch())
    assert operations <= MOST_OPERATIONS
    assert traffic <= MOST_TRAFFIC


@pytest.mark.parametrize("options", [{"per_channel": True}, {"std": 0.5, "mean": 0.1}], ids=str)
def test_little_traffic_whatever_is_wanted(options):
    _, traffic, _ = costs(plain_cnn(10), torch.randn(16, 3, 32, 32), **options)
    assert traffic <= MOST_TRAFFIC


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_as_many_operations_for_each_layer_however_many_there_are(norm):
    x = torch.randn(4, 3, 8, 8)
    (few, _, _), (many, _, _) = (costs(plain_cnn(depth, 8, norm), x) for depth in (5, 40))
    assert many <= few


@pytest.mark.parametrize("make", [lambda n: plain_cnn(n, 8), mlp], ids=["plain cnn", "mlp"])
def test_as_many_waits_however_many_layers_there_are(make):
    x = torch.randn(4, 3, 8, 8) if make(1)[0].weight.dim() == 4 else torch.randn(64, 32)
    (_, _, few), (_, _, many) = (costs(make(depth), x) for depth in (3, 30))
    assert many == few <= 2


def vit(depth):
    return tv.VisionTransformer(16, 8, depth, 2, 16, 32, num_classes=3)


def convnext(depth):
    return tv.ConvNeXt([tv.convnext.CNBlockConfig(8, None, depth)], stochastic_depth_prob=0.2, num_classes=3)


@pytest.mark.parametrize("make", [vit, convnext])
def test_blocks_of_one_kind_are_probed_once(make):
    counts = []
    for depth in (2, 8):
        model, x = make(depth), torch.randn(4, 3, 16, 16)
        with Counts() as whole:
            lsuv_(model, x)
        counts.append(whole.waits)
    assert counts[1] == counts[0]
