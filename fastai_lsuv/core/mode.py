"""The mode in which passes run: training, without what training draws at random."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastai_lsuv.core.modules import is_scripted

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def as_in_training(with_grad: bool) -> Iterator[None]:
    """Settings for a pass: nothing compiled, no fast path of inference, no casts of weights from before a step.

    There are gradients only if the forward itself needs them.
    """
    fastpath, cache = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # training doesn't take it, nor its nested tensors
        torch.set_autocast_cache_enabled(False)  # it would hand out casts of weights as they were before a step
        with torch.set_grad_enabled(with_grad), eagerly():
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)
        torch.backends.mha.set_fastpath_enabled(fastpath)


def set_mode(copy: nn.Module, frozen: Collection[nn.Module]) -> None:
    """Evaluation, but for modules with running statistics that will use the batch's in training.

    A model that freezes its norms does so in a `train` of its own.
    """
    copy.train()
    norms = [m for m in copy.modules() if m.training and m not in frozen and _has_running_statistics(m)]
    copy.eval()
    for norm in norms:
        norm.training = True
        if not is_scripted(norm):
            prepend(norm, _one_value_a_channel_uses_running_statistics)


def _has_running_statistics(module: nn.Module) -> bool:
    return any(module._buffers[name] is not None for name in ("running_mean", "running_var") if name in module._buffers)


def _one_value_a_channel_uses_running_statistics(
    norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Training raises on a single value per channel, whose variance is undefined."""
    x = args[0] if args else None
    if isinstance(x, Tensor) and x.dim() > 1:
        norm.training = not _has_running_statistics(norm) or x.numel() > _channel_groups(norm, x)


def _channel_groups(norm: nn.Module, x: Tensor) -> int:
    per_sample = isinstance(norm, nn.modules.instancenorm._InstanceNorm)
    return x.shape[0] * x.shape[1] if per_sample else x.shape[1]


def prepend(copy: nn.Module, hook: PreHook) -> None:
    """Hang a pre-hook on a copy, ahead of all others, under a number that PyTorch gives to none."""
    copy._forward_pre_hooks[id(hook)] = hook
    copy._forward_pre_hooks.move_to_end(id(hook), last=False)  # type: ignore[attr-defined]
    copy._forward_pre_hooks_with_kwargs[id(hook)] = True


def take_down(copy: nn.Module) -> None:
    """Take away what `prepend` hung on a copy and its parts: a forward may have shown them to somebody."""
    for module in copy.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if key == id(hook)]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def take_down_backward_hooks(copy: nn.Module) -> None:
    """Have a copy see no gradient."""
    for module in copy.modules():
        module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()


def eagerly() -> AbstractContextManager[Any]:
    """Compiled modules run as plain ones: every hook fires, and nothing is compiled for the sake of a few passes."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and to import it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
