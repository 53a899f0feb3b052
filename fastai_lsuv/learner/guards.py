"""Signs that a network has been trained or loaded, so that its weights must not be rewritten."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from fastai.learner import SkipToEpoch
from fastcore.basics import noop
from torch import nn

from fastai_lsuv.core.modules import open_modules

if TYPE_CHECKING:
    from fastai.learner import Learner

T = TypeVar("T")


def signs_of_training(learn: Learner) -> Iterator[str]:
    """What about the Learner says that its network isn't fresh, in words that follow "because"."""
    if _has_stepped(learn.opt):
        yield "the optimizer has made steps"
    for name, buffer in learn.model.named_buffers():
        if name.rpartition(".")[2] == "num_batches_tracked" and int(buffer) > 0:
            yield f"{name} is {int(buffer)}"
            break
    for name, module in learn.model.named_modules():
        if (weight := _norm_weight(module)) is not None and bool((weight != weight.flatten()[0]).any()):
            yield f"the weights of the normalisation layer {name!r} differ"
            break
    for cb in learn.cbs:
        if isinstance(cb, SkipToEpoch) and cb._skip_to > 0:
            yield f"training starts at epoch {cb._skip_to}"


def _has_stepped(opt: Any) -> bool:
    """Whether an optimizer (fastai's, or PyTorch's in an OptimWrapper) holds anything that only a step makes."""
    flags = {"do_wd", "force_train"}  # set by the Learner beforehand
    states = [getattr(o, "state", None) or {} for o in (opt, getattr(opt, "opt", None))]
    return any(key not in flags for state in states for of_parameter in state.values() for key in of_parameter)


def _norm_weight(module: nn.Module) -> torch.Tensor | None:
    weight = getattr(module, "weight", None)
    is_norm = "norm" in type(module).__name__.lower()
    return weight if is_norm and isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.numel() else None


class LoadWatch:
    """Notes that weights were loaded into a model or any part of it.

    Hangs a hook on each module that has parameters, since `load_encoder` and the like load into a part. The hook
    refers to no Learner. A pickled model carries a `noop` in its place, a deep copy a watch of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.loaded = False
        self.handles = [
            m.register_load_state_dict_post_hook(self) for m in open_modules(model) if m._parameters or m._buffers
        ]

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Note it: the hook that PyTorch calls after a load."""
        self.loaded = True

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadWatch:
        return copied(self, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (noop, None)


def copied(obj: T, memo: dict[int, Any]) -> T:
    """A deep copy of all attributes, whatever the class says about pickling."""
    new = memo[id(obj)] = object.__new__(type(obj))
    vars(new).update(copy.deepcopy(vars(obj), memo))
    return new
