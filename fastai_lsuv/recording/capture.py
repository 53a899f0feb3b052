"""Watching the layers of a model while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fastai_lsuv.core.mode import eagerly
from fastai_lsuv.core.modules import has_parameters
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.recording.description import FEATURES, HIST_BINS, describe, describe_moments
from fastai_lsuv.recording.graph import followed_by_relu
from fastai_lsuv.recording.samples import Samples
from fastai_lsuv.recording.units import Units, channel_dims
from fastai_lsuv.recording.updates import Updates

_OF_TRAINING = ("update", "dead_units")


class Capture:
    """Samples of the outputs of some layers, and of the gradients of these, step by step; in training also how far
    the weights move, and which units fire.

    Hooks hang from `watch()` to `stop()` only, ahead of all others, so that they see the layer's own output. What
    cannot be recorded is left out from then on.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], with_grad: bool = False) -> None:
        self.with_grad = with_grad
        self.outputs, self.gradients = Samples(len(layers)), Samples(len(layers))
        self.updates: Updates | None = Updates(layers)  # none: they can't be had
        self.units = Units(len(layers), channel_dims(model, layers))
        self.failed: dict[int, str] = {}  # why a layer can't be recorded
        self._layers = [ref(layer) for layer in layers]
        self._plain = {i for i, layer in enumerate(layers) if not has_parameters(layer)}
        self._nodes: dict[int, Any] | None = {}  # of the layers' outputs, until it is known what follows them
        self._watching = ExitStack()
        self._in_training = False

    def watch(self, in_training: bool) -> None:
        """Begin a step; compiled modules run as plain ones, so that they can be seen."""
        self.stop()
        self.outputs.forget()
        self.gradients.forget()
        self._in_training = in_training
        if in_training:
            self.units.begin()
            self._begin_updates()
        self._watching.enter_context(eagerly())
        for i, layer in enumerate(self._layers):
            if (module := layer()) is not None and i not in self.failed:
                handle = module.register_forward_hook(partial(self._see, i), prepend=True)
                self._watching.callback(handle.remove)

    def stop(self) -> None:
        """See nothing more, but for gradients of what was seen."""
        self._watching.close()

    def statistics(self, near_zero: float, with_hist: bool, loss_scale: Tensor | float = 1.0) -> Tensor:
        """A row a layer: the columns of `columns(…)`, NaN for what was not there to see."""
        table = describe(*self.outputs.gathered(), near_zero=near_zero, with_hist=with_hist)
        table = torch.cat([table, self._of_training(std=table[:, 1])], 1)
        if not self.with_grad:
            return table
        if self.gradients.empty:
            gradients = table.new_full((len(table), 2), torch.nan)
        else:
            gradients = describe_moments(*self.gradients.gathered()).to(table.device) / loss_scale
        return torch.cat([table, gradients], 1)

    def _see(self, i: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        try:
            y = output if type(output) is Tensor else first_tensor(output)
            if y is None or not y.is_floating_point():
                return
            _take(self.outputs, i, y)
            if self._in_training:
                self._see_units(i, args, y)
            if self.with_grad and y.requires_grad:
                y.register_hook(partial(self._see_gradient, i))
        except Exception as error:  # an output of a kind that nobody has thought of must not end a training
            self.failed[i] = f"{type(error).__name__}: {error}"

    def see_loss(self, loss: object) -> None:
        """Find out by the loss's graph, once, which layers are followed by a function that rectifies."""
        if self._nodes is None or not self._in_training:
            return
        nodes, self._nodes = self._nodes, None
        if isinstance(loss, Tensor):
            self.units.rectified = followed_by_relu(nodes, loss) - self._plain
        self.units.drop(self.units.channel_dims.keys() - self._plain - self.units.rectified)

    def _see_units(self, i: int, args: tuple[Any, ...], y: Tensor) -> None:
        """Of activations, which work value by value, and of layers that have one behind them."""
        if i in self._plain:
            x = args[0] if args and type(args[0]) is Tensor else first_tensor(args)
            if x is None or x.shape != y.shape:
                return
        if self._nodes is not None and y.grad_fn is not None:
            self._nodes[i] = y.grad_fn
        if i not in self.units.channel_dims or (self._nodes is not None and i not in self._plain):
            return  # what follows a layer is known from the second step on
        try:
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                self.units.see(i, y)
        except Exception:  # of numbers that can't be compared there are no units
            self.units.drop([i])

    def _begin_updates(self) -> None:
        try:
            if self.updates is not None:
                self.updates.begin()
        except Exception:  # parameters of a kind that nobody has thought of
            self.updates = None

    def _of_training(self, std: Tensor) -> Tensor:
        """The columns of `_OF_TRAINING`."""
        missing = torch.full_like(std, torch.nan)
        if not self._in_training:
            return torch.stack([missing, missing], 1)
        update = missing
        try:
            if self.updates is not None:
                update = self.updates.ratios(std.device)
        except Exception:
            self.updates = None
        return torch.stack([update, self.units.dead(std)], 1)

    def _see_gradient(self, i: int, gradient: Tensor) -> None:
        try:
            _take(self.gradients, i, gradient)
        except Exception as error:
            self.failed[i] = f"{type(error).__name__}: {error}"


def _take(samples: Samples, i: int, x: Tensor) -> None:
    """Without a graph, and without a say of fastai's types of tensors in each operation."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        samples.take(i, x)


def columns(with_hist: bool, with_grad: bool) -> list[str]:
    """Names of the columns of `Capture.statistics`; all of a histogram have the name `hist`."""
    return [*FEATURES, *["hist"] * (HIST_BINS * with_hist), *_OF_TRAINING, *["grad_mean", "grad_std"][: 2 * with_grad]]
