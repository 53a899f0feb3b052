"""What the layers of a model put out in one forward pass, and the gradients of that: statistics of samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastai_lsuv.core.hooks import eagerly, hooked
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.recording.sampling import FEATURES, HIST_BINS, describe, sample

T = TypeVar("T")
Samples = list[tuple[int, int, Tensor]]  # of one call each: the layer's index, number of values, a sample of them


class Capture:
    """Samples of the outputs of some layers in one forward pass of their model.

    A hook only copies a sample; what the samples show is computed for all layers together, on their device.
    """

    def __init__(self, n_layers: int, with_grad: bool = False) -> None:
        self.n_layers, self.with_grad = n_layers, with_grad
        self.complete = False  # whether the forward has come to its end
        self.outputs: Samples = []
        self.gradients: Samples = []

    def watch(
        self, model: nn.Module, layers: Sequence[nn.Module], forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run the model's forward with hooks on the layers; a compiled model runs as a plain one."""
        hooks = {layer: partial(self._see, i) for i, layer in enumerate(layers)}
        with eagerly(), hooked(hooks):
            output = forward(*args, **kwargs)
        if model in hooks:  # its own hooks run after its forward, when these are gone
            hooks[model](model, args, kwargs, output)
        self.complete = True
        return output

    def _see(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        y = first_tensor(output)
        if y is None or not y.numel():
            return
        self.outputs.append((i, y.numel(), sample(y)))
        if self.with_grad and y.requires_grad:
            y.register_hook(partial(_keep_sample, self.gradients, i))

    def statistics(self, near_zero: float, with_hist: bool, loss_scale: Tensor | float = 1.0) -> Tensor:
        """A row a layer: the columns of `columns(…)`, NaN for what was not there to see."""
        width = len(FEATURES) + HIST_BINS * with_hist
        found = _by_layer(self.outputs, partial(describe, near_zero=near_zero, with_hist=with_hist))
        parts = [_table(found, self.n_layers, width)]
        if self.with_grad:
            gradients = _by_layer(self.gradients, partial(describe, near_zero=near_zero))
            parts.append(_table(gradients, self.n_layers, len(FEATURES))[:, :2].to(parts[0].device) / loss_scale)
        return torch.cat(parts, 1)


class Outbox(Generic[T]):
    """Statistics that wait on their device, to leave it together."""

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._labels: list[T] = []
        self._table: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether there is no room for more."""
        return len(self._labels) == self.size

    def add(self, label: T, values: Tensor) -> None:
        """Keep a label on the host and values, of the same shape and device each time, where they are."""
        if self._table is None:
            self._table = values.new_empty(self.size, *values.shape)
        self._table[len(self._labels)] = values
        self._labels.append(label)

    def empty(self) -> list[tuple[T, npt.NDArray[np.float32]]]:
        """All that waits, as arrays on the host: the only wait for the device."""
        if self._table is None:
            return []
        labels, self._labels = self._labels, []
        return list(zip(labels, self._table[: len(labels)].cpu().numpy().copy(), strict=True))


def columns(with_hist: bool, with_grad: bool) -> list[str]:
    """Names of the columns of `Capture.statistics`; all of a histogram have the name `hist`."""
    return [*FEATURES, *["hist"] * (HIST_BINS * with_hist), *["grad_mean", "grad_std"][: 2 * with_grad]]


def _keep_sample(samples: Samples, i: int, gradient: Tensor) -> None:
    samples.append((i, gradient.numel(), sample(gradient)))


def _by_layer(samples: Samples, describe_rows: Callable[..., Tensor]) -> dict[int, Tensor]:
    """What the samples show, by layer; samples of one size are described together, calls of one layer pooled."""
    alike = defaultdict(list)
    for i, n, values in samples:
        alike[n, values.shape, values.device].append((i, values))
    calls = defaultdict(list)
    for (n, *_), group in alike.items():
        rows = describe_rows(torch.stack([values for _, values in group]), n)
        for (i, _), row in zip(group, rows.unbind(), strict=True):
            calls[i].append((n, row))
    return {i: of_layer[0][1] if len(of_layer) == 1 else _pooled(of_layer) for i, of_layer in calls.items()}


def _pooled(calls: list[tuple[int, Tensor]]) -> Tensor:
    """Of several calls together: mean and std as over all their values, shares by size, counts added up."""
    sizes, device = [n for n, _ in calls], calls[0][1].device
    rows, total = [row.to(device) for _, row in calls], sum(sizes)
    pooled = torch.stack([row * (n / total) for n, row in zip(sizes, rows, strict=True)]).sum(0)
    between = [(row[0] - pooled[0]).square() * n for n, row in zip(sizes, rows, strict=True)]
    within = [row[1].square() * (n - 1) for n, row in zip(sizes, rows, strict=True) if n > 1]
    pooled[1] = torch.stack([*between, *within]).sum().div(total - 1).sqrt()
    pooled[len(FEATURES) :] = torch.stack([row[len(FEATURES) :] for row in rows]).sum(0)
    return pooled


def _table(found: dict[int, Tensor], n_layers: int, width: int) -> Tensor:
    device = next(iter(found.values())).device if found else torch.device("cpu")
    missing = torch.full((width,), float("nan"), device=device)
    return torch.stack([found[i].to(device) if i in found else missing for i in range(n_layers)])
