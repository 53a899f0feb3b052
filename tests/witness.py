"""What layers put out in real training, measured whole and in float64 by hooks of its own. Nothing of ours imported."""

from __future__ import annotations

import gc
import sys
import types

import numpy as np
import torch
from audit import first_tensor
from fastai.vision.all import Callback
from torch import nn

COLUMNS = [
    "fit",
    "epoch",
    "step",
    "phase",
    "layer",
    "mean",
    "std",
    "near_zero",
    "sparsity",
    "at_limit",
    "signal",
    "update",
    "dead_units",
]


class Witness(Callback):
    "For each batch of training (if `valid`, of validation) a dict: layer → mean, std, near-zero share of its calls."

    order = 95  # after all that rewrites a batch

    def __init__(self, valid=False, near_zero=0.05):
        self.records, self.valid, self.near_zero, self.calls, self.handles = [], valid, near_zero, None, []

    def before_fit(self):
        if self.handles:
            return  # something else that fires it, inside of a fit
        for name, m in self.learn.model.named_modules():
            self.handles.append(
                m.register_forward_hook(self.hook(name.replace("_orig_mod.", "").removeprefix("module.")), prepend=True)
            )

    def hook(self, name):
        def see(m, args, out):
            out = first_tensor(out)
            if self.calls is not None and out is not None and out.numel():
                self.calls.setdefault(name, []).append(out.detach().double().flatten().clone())

        return see

    def before_batch(self):
        self.calls = {} if self.training or self.valid else None

    def after_pred(self):
        if self.calls is not None:
            self.records.append({n: measured(torch.cat(o), self.near_zero) for n, o in self.calls.items()})
        self.calls = None

    def after_fit(self):
        for h in self.handles:
            h.remove()
        self.handles = []


def measured(x, near_zero=0.05):
    x = x.detach().double().flatten()
    return x.mean().item(), x.std().item(), (x.abs() <= near_zero).double().mean().item(), len(x)


def records(rec, phase=None):
    "The recorder's frame as the witness tells it: a dict for each record in the order in which they were made."
    frame = rec.to_frame()
    if phase is not None:
        frame = frame[frame.phase == phase]
    found, last = [], None
    for row in frame.itertuples(index=False):
        if row[:4] != last or row.layer in found[-1]:
            found.append({})  # (validation batches in a row have the same numbers)
        found[-1][row.layer], last = (row.mean, row.std, row.near_zero), row[:4]
    return found


def assert_close(got, want, rel=1e-5, few=2**12):
    """Mean and std to `rel` of the std and to the float's rounding; the near-zero share exactly, or to three points if
    counted in a sample."""
    (mean, std, zero), (true_mean, true_std, true_zero, n) = got, want
    tol = rel * (abs(np.nan_to_num(true_std)) + 1e-3 * abs(true_mean)) + 1e-7 * abs(true_mean)
    assert abs(mean - true_mean) <= tol, f"mean {mean} not {true_mean} (std {true_std})"
    assert abs(std - true_std) <= tol or (np.isnan(std) and np.isnan(true_std)), f"std {std} not {true_std}"
    assert abs(zero - true_zero) <= (1e-6 if n <= few else 0.03), f"near zero {zero} not {true_zero}"


def close(*args, **kwargs):
    try:
        assert_close(*args, **kwargs)
    except AssertionError:
        return False
    return True


def assert_as_seen(rec, seen, rel=1e-5, phase=None):
    "Each record is what the witness saw, layer for layer; all layers that were called, and no other, are in it."
    found = records(rec, phase)
    assert len(found) == len(seen) and seen, f"{len(found)} records of {len(seen)} batches"
    for got, want in zip(found, seen):
        assert got.keys() == want.keys() & set(rec.layer_names), got.keys() ^ (want.keys() & set(rec.layer_names))
        for layer in got:
            try:
                assert_close(got[layer], want[layer], rel)
            except AssertionError as e:
                raise AssertionError(f"{layer}: {e}") from None


def hooks_on(model):
    "All hooks on a model's modules."
    return [
        h
        for m in model.modules()
        for name, hooks in vars(m).items()
        if "hooks" in name and isinstance(hooks, dict)
        for h in hooks.values()
    ]


def skin(model):
    "What a module is beyond its values: the attributes of each, and all hooks."
    return {name: sorted(vars(m)) for name, m in model.named_modules()}, len(hooks_on(model))


def held(root, but=()):
    "Bytes of all that `root` leads to, not through `but`, modules, classes and code."
    seen, todo, total = {id(o) for o in but}, [root], 0
    while todo:
        o = todo.pop()
        if id(o) in seen or isinstance(
            o, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, nn.Module)
        ):
            continue
        seen.add(id(o))
        if isinstance(o, torch.Tensor):
            total += 0 if (where := o.untyped_storage().data_ptr()) in seen else o.untyped_storage().nbytes()
            seen.add(where)
        elif isinstance(o, np.ndarray):
            total += o.nbytes
        else:
            total += sys.getsizeof(o, 0)
        todo += gc.get_referents(o)
    return total
