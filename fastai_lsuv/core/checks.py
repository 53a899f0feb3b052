"""Whether a model and a batch are such that something can be measured."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from fastai_lsuv.core.dry_run import Call
from fastai_lsuv.core.statistics import Measured


def check_model(model: nn.Module) -> None:
    """Raise unless it is a model with all its parameters."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"{name!r} is lazy and not initialised yet: send a batch through the model first")


def check_inputs(call: Call) -> None:
    """Raise if an input has infinite values and is no mask."""
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
