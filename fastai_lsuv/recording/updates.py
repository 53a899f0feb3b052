"""How far a training step moves the weights of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor, nn

from fastai_lsuv.core.signal import distance
from fastai_lsuv.core.statistics import at_least_single, in_memory_order

SAMPLE = 2**15  # values of one parameter, or somewhat more or less, evenly spread; all of a smaller one


class Updates:
    """‖Δw‖ / ‖w‖ of each layer from `begin()` to `ratios()`, whatever changes its weights in between.

    All parameters of a layer that train count together. It takes few operations for all layers at once, which wait for
    nothing; what is kept in between is a copy of a sample.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._n_layers = len(layers)
        self._parameters = [(i, ref(p)) for i, layer in enumerate(layers) for p in layer.parameters()]
        self._watched: list[tuple[int, Tensor]] = []
        self._before: list[Tensor] = []  # samples
        self._tables: tuple[object, tuple[Tensor, ...]] = None, ()  # of what trained in the last step

    @torch.no_grad()
    def begin(self) -> None:
        """Copy samples of what trains now."""
        alive = ((i, p) for i, parameter in self._parameters if (p := parameter()) is not None)
        self._watched = [(i, p) for i, p in alive if _trains(p)]
        now = [_sample(p) for _, p in self._watched]
        if [*map(_kind, now)] != [*map(_kind, self._before)]:
            self._before = [torch.empty_like(w, dtype=at_least_single(w.dtype)) for w in now]
        if now:
            torch._foreach_copy_(self._before, now)

    @torch.no_grad()
    def ratios(self, device: torch.device) -> Tensor:
        """A value a layer; NaN for one in which nothing trains."""
        watched, self._watched = self._watched, []
        now = [_sample(p) for _, p in watched]
        if not now or [w.shape for w in now] != [w.shape for w in self._before]:
            return torch.full((self._n_layers,), torch.nan, device=device)
        sizes = torch._foreach_norm(self._before)
        torch._foreach_sub_(self._before, now)
        changes = torch._foreach_norm(self._before)
        norms = torch.stack([n.to(device, torch.float32, non_blocking=True) for n in (*changes, *sizes)])
        samples = [(i, w.numel() / p.numel()) for (i, p), w in zip(watched, now, strict=True)]
        layers, shares, nothing = self._tables_of(samples, device)
        squares = norms.view(2, -1).square() / shares
        change, size = squares.new_zeros(2, self._n_layers).index_add_(1, layers, squares).sqrt_()
        return torch.where(change == 0, 0.0, change / size) + nothing

    def _tables_of(self, samples: list[tuple[int, float]], device: torch.device) -> tuple[Tensor, ...]:
        """The layer of each sample, its share of all values, and NaN for layers that have none."""
        if self._tables[0] != (samples, device):
            layers = torch.tensor([i for i, _ in samples])
            shares = torch.tensor([share for _, share in samples])
            nothing = torch.full((self._n_layers,), torch.nan).index_fill_(0, layers, 0.0)
            there = tuple(t.to(device, non_blocking=True) for t in (layers, shares, nothing))
            self._tables = (samples, device), there
        return self._tables[1]


def _trains(p: Tensor) -> bool:
    """True if a parameter requires a gradient, and is one whose values can be looked at like any tensor's."""
    is_plain = type(p) is nn.Parameter and p.layout is torch.strided and not p.is_meta
    return p.requires_grad and is_plain and p.numel() > 0


def _sample(p: Tensor) -> Tensor:
    """Values of a parameter that are evenly spread: a view of it, or the parameter itself."""
    n = p.numel()
    return p if n <= SAMPLE else in_memory_order(p)[:: distance(n, n / SAMPLE)]


def _kind(w: Tensor) -> tuple[object, ...]:
    return w.shape, w.dtype, w.device
