"""After every test: nothing of ours left behind, neither a hook nor a setting."""

import functools
import gc
import random
import sys
import warnings
from functools import partial

import fastai.vision.all  # noqa: F401  (imports set filters and backends once, before any test looks at them)
import matplotlib
import numpy as np
import pytest
import sklearn.datasets  # noqa: F401
import timm  # noqa: F401
import torch
import torch.nn.modules.module as module_module
import torchvision  # noqa: F401
from torch import nn

import fastai_lsuv  # noqa: F401

matplotlib.use("Agg")


def pytest_collection_finish():
    "What is imported stays; tests that collect garbage needn't go through it every time."
    gc.freeze()


REGISTER = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def owner(fn):
    "The name of the module in which a hook was written, through partials, wrappers and bound methods."
    while isinstance(fn, partial) or hasattr(fn, "__wrapped__"):
        fn = fn.func if isinstance(fn, partial) else fn.__wrapped__
    return getattr(fn, "__module__", None) or type(fn).__module__


def ours(fn):
    return owner(fn).split(".")[0] == "fastai_lsuv"


def settings():
    "All that a library could have changed for everyone."
    return dict(
        filters=[f for f in warnings.filters if not torch_s(f)],
        rc=dict(matplotlib.rcParams),
        dtype=torch.get_default_dtype(),
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        autocast=torch.is_autocast_enabled("cpu"),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        threads=torch.get_num_threads(),
        fastpath=torch.backends.mha.get_fastpath_enabled(),
        new_method=nn.Module.__call__,
        hooks=[list(getattr(module_module, g)) for g in GLOBAL],
    )


def torch_s(warning_filter):
    "Of PyTorch before 2.10, which adds it whenever it compiles."
    return getattr(warning_filter[3], "pattern", None) == "torch.distributed"


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    "Keeps every module on which a hook is registered alive until the test is over, then looks for hooks of ours."
    hooked = {}
    for name in REGISTER:
        monkeypatch.setattr(nn.Module, name, recording(getattr(nn.Module, name), hooked))
    before = settings()
    yield hooked
    after = settings()
    changed = [k for k in before if before[k] != after[k]]
    assert not changed, f"changed for everyone: {changed}"
    left = [(type(m).__name__, h) for m in hooked.values() for h in hooks_of(m) if ours(h)]
    assert not left, f"hooks left on models: {left}"


def recording(register, hooked):
    @functools.wraps(register)
    def inner(self, *args, **kwargs):
        hooked[id(self)] = self
        return register(self, *args, **kwargs)

    return inner


def hooks_of(m):
    return [h for name in HOOKS for h in (getattr(m, name, None) or {}).values()]


@pytest.fixture(autouse=True)
def seeded():
    "Every test from the same random state, whatever ran before it."
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
