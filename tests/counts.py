"""What LSUV and the recorder have a device do, counted on the CPU: operations, memory traffic, and waits."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from fastai.data.core import DataLoaders
from learners import learner
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from fastai_lsuv import ActivationStatsRecorder, lsuv_
from fastai_lsuv.core import attempt, statistics

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
FETCHES = "tolist", "cpu"  # no operations on a CPU, but on a device they wait, too
VIEWS = (
    *("view", "as_strided", "detach", "alias", "expand", "permute", "transpose"),
    *("aten.t.", "squeeze", "select", "slice", "split"),
)

# the code that an accelerator runs: there is a single place that tells whether values are at hand
as_on_a_device = partial(patch.object, statistics, "at_hand", lambda x: False)


class Fetches(TorchFunctionMode):
    "Counts how often values go to the host."

    n = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.n += getattr(func, "__name__", "") in FETCHES
        return func(*args, **(kwargs or {}))


class Counts(TorchDispatchMode):
    "Operations, bytes that they read and write, and reads of values."

    def __init__(self):
        super().__init__()
        self.operations, self.bytes, self.fetches = Counter(), 0, Fetches()

    def __enter__(self):
        self.fetches.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fetches.__exit__(*error)

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
        return self.fetches.n + sum(self.operations[w] for w in WAITS)


def size(t):
    return t.numel() * t.element_size()


# --- LSUV -------------------------------------------------------------------------------------------------------------


def plain_cnn(depth, width=32, norm=False):
    layers = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 3, width, 3, padding=1)]
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def plain_mlp(depth, width=32):
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


class Cost(NamedTuple):
    "Beyond the forward's own."

    operations: float  # for each layer and pass
    traffic: float  # outputs that are read or written, for each pass
    waits: int  # in all of it


# measured by a pass of its own, of a few samples
without_gradient = partial(patch.object, attempt.Backprop, "gradients", lambda self, sizes: {})


def of_lsuv(model, x, **options):
    model.train()  # as LSUV measures: norms on the batch's statistics
    outputs = []
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(lambda m, args, out: outputs.append(size(out))) for m in layers]
    with torch.no_grad(), Counts() as forward:
        model(x)
    for handle in handles:
        handle.remove()
    with as_on_a_device(), without_gradient(), Counts() as whole:
        report = lsuv_(model, x, **options)
    assert report.converged and len(report) == len(layers)
    operations = (whole.total - report.n_forward * forward.total) / len(layers) / report.n_forward
    traffic = (whole.bytes - report.n_forward * forward.bytes) / sum(outputs) / report.n_forward
    return Cost(operations, traffic, whole.waits)


# --- the recorder -----------------------------------------------------------------------------------------------------


def of_a_training(model, steps, x, *cbs):
    data = [(x, torch.arange(len(x)) % 3)] * steps
    dls = DataLoaders(*(DataLoader(data[:k], batch_size=None) for k in (steps, 1)))
    learn = learner(dls, model, metrics=[], cbs=[*cbs])
    with learn.no_logging(), Counts() as counts:
        learn.fit(1)
    return counts.total


def of_a_step(make, x, **options):
    "Operations by which a recorded step is longer, once the buffers are there."
    plain, recorded = (
        [of_a_training(make(), steps, x, *cbs()) for steps in (3, 13)]
        for cbs in (list, lambda: [ActivationStatsRecorder(**options)])
    )
    return ((recorded[1] - recorded[0]) - (plain[1] - plain[0])) / 10
