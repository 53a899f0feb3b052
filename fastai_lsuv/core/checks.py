"""Whether a model and a batch are such that something can be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from fastai_lsuv.core.dry_run import Call
from fastai_lsuv.core.errors import CannotRun, is_of_model
from fastai_lsuv.core.statistics import Measured


def check_model(model: object) -> None:
    """Raise unless it is a model with all its parameters."""
    if not isinstance(model, nn.Module):
        of_learner = isinstance(getattr(model, "model", None), nn.Module)
        hint = "; of a Learner, learn.lsuv_init() initialises the model" if of_learner else ""
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module{hint}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"{name!r} is lazy and not initialised yet: send a batch through the model first")


def as_call(batch: Any) -> Call:
    """Return a forward's arguments for a batch: a tensor, a tuple or list of inputs, or a mapping of keyword inputs."""
    if isinstance(batch, nn.Module):
        raise TypeError(f"batch is a {type(batch).__name__}: expected lsuv_(model, batch), in this order")
    if hasattr(batch, "one_batch") or isinstance(batch, DataLoader):
        raise TypeError(f"batch is a {type(batch).__name__}: expected tensors, such as the inputs of one batch of it")
    call = _arguments(batch)
    if any(isinstance(x, np.ndarray) for x in (*call[0], *call[1].values())):
        raise TypeError("the batch contains NumPy arrays: expected tensors; convert with torch.as_tensor(array)")
    return call


def _arguments(batch: Any) -> Call:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def hint_for(batch: Any, error: Exception) -> str:
    """Return how the model is called with a batch, if it may be for this that it failed; else nothing."""
    if not is_of_model(error) or isinstance(batch, Tensor):
        return ""
    if isinstance(batch, (tuple, list, Mapping)):
        if not isinstance(error, TypeError) or "argument" not in str(error) or not batch:
            return ""
        if isinstance(batch, Mapping):
            return "a mapping of inputs is unpacked, model(**inputs): give it under the names that the forward has"
        return "a tuple or list of inputs is unpacked, model(*inputs): give it without the targets, lsuv_(model, xb)"
    return f"the batch is a {type(batch).__name__}: expected a tensor, or a tuple, list or mapping of inputs"


def check_inputs(call: Call) -> None:
    """Raise if there is nothing in the inputs, or infinite values in one that is no mask."""
    tensors = [x for x in tree_leaves(call) if isinstance(x, Tensor)]
    if tensors and not any(x.numel() for x in tensors):
        raise CannotRun(f"the batch is empty, with an input of shape {tuple(tensors[0].shape)}")
    for x in _floats(call):
        with suppress(NotImplementedError, RuntimeError):  # sparse and nested tensors, and others that can't be asked
            if not bool((x.isfinite() | x.isnan() | _is_mask(x)).all()):
                raise _bad(x)


def check_outputs(outputs: Sequence[Measured], call: Call) -> None:
    """Raise if NaN of an input gets everywhere. A model may fill it itself; then it is none of our business."""
    measurable = [seen for seen in outputs if seen.n > 1]
    if measurable and not any(seen.is_finite for seen in measurable):
        for x in _floats(call):
            with suppress(NotImplementedError, RuntimeError):
                if bool(x.isnan().any()):
                    raise _bad(x)


def _floats(call: Call) -> list[Tensor]:
    return [x for x in tree_leaves(call) if isinstance(x, Tensor) and x.is_floating_point()]


def _bad(x: Tensor) -> ValueError:
    return ValueError(f"the batch has NaN or infinity in an input of shape {tuple(x.shape)}")


def _is_mask(x: Tensor) -> Tensor:
    """Whether a tensor is nothing but zeros and minus infinities: added to attention scores, it switches some off."""
    return ((x == 0) | (x == -torch.inf)).all() & (x == 0).any()
