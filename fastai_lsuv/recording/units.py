"""Which units of the activations have fired in an epoch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastai_lsuv.core.modules import named_modules

_STILL = 1e-3  # of the layer's std: a unit that moves less than this does not fire
_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)


@dataclass
class Range:
    """The lowest and the highest value of each channel in one call of a layer, over the batches of an epoch."""

    layer: int
    low: Tensor
    high: Tensor


class Units:
    """The range of each channel of some layers over the batches of an epoch.

    Exact: each output is read whole. A channel is a place in an output's second dimension behind a convolution, and in
    its last one behind other layers.
    """

    def __init__(self, n_layers: int, channel_dims: Mapping[int, int]) -> None:
        self.n_layers, self.channel_dims = n_layers, channel_dims  # of the layers that may be looked at
        self.rectified: frozenset[int] = frozenset()  # layers that a functional ReLU follows
        self._ranges: dict[tuple[int, int], Range] = {}  # by layer and call
        self._calls = [0] * n_layers
        self._tables: tuple[object, tuple[Tensor, ...]] = None, ()

    def new_epoch(self) -> None:
        """Forget what has fired."""
        self._ranges = {}

    def begin(self) -> None:
        """Begin a step."""
        self._calls = [0] * self.n_layers

    def see(self, layer: int, x: Tensor) -> None:
        """Take notice of one call's output."""
        if x.dim() < 2 or not x.numel() or x.is_nested:
            return
        low, high = _extremes(x, self.channel_dims[layer])
        call, self._calls[layer] = self._calls[layer], self._calls[layer] + 1
        known = self._ranges.get((layer, call))
        if known is None or known.low.shape != low.shape or known.low.device != low.device:
            self._ranges[layer, call] = Range(layer, low.float(), high.float())
        else:
            torch.minimum(known.low, low, out=known.low)
            torch.maximum(known.high, high, out=known.high)

    def drop(self, layers: Collection[int]) -> None:
        """Look at some layers no more."""
        self.channel_dims = {i: dim for i, dim in self.channel_dims.items() if i not in layers}
        self._ranges = {key: known for key, known in self._ranges.items() if known.layer not in layers}

    def dead(self, std: Tensor) -> Tensor:
        """The share of each layer's channels that did not fire, given its std; NaN of others.

        Of a layer whose lowest value is 0, as a ReLU's is, a channel fires if it has a value above 0; of any other, if
        it moves by more than a part in a thousand of the std.
        """
        ranges = list(self._ranges.values())
        if not ranges:
            return torch.full_like(std, torch.nan)
        low, high = (torch.cat([getattr(r, end).to(std.device) for r in ranges]) for end in ("low", "high"))
        layer, rectified, channels = self._tables_of([(r.layer, len(r.low)) for r in ranges], std.device)
        low, high = (torch.where(rectified, end.clamp(min=0.0), end) for end in (low, high))
        lowest = std.new_full((self.n_layers,), torch.inf).scatter_reduce_(0, layer, low, "amin")
        is_still = high - low <= _STILL * std.index_select(0, layer)
        is_dead = torch.where(lowest.index_select(0, layer) == 0, high <= 0, is_still)
        return std.new_zeros(self.n_layers).index_add_(0, layer, is_dead.to(std.dtype)) / channels

    def _tables_of(self, ranges: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, ...]:
        """The layer of each channel, whether a ReLU follows it, and how many channels each layer has."""
        if self._tables[0] != (ranges, self.rectified, device):
            layer = torch.tensor([i for i, n in ranges for _ in range(n)])
            rectified = torch.tensor([i in self.rectified for i, n in ranges for _ in range(n)])
            channels = torch.bincount(layer, minlength=self.n_layers).float()
            channels[channels == 0] = torch.nan
            there = tuple(t.to(device, non_blocking=True) for t in (layer, rectified, channels))
            self._tables = (ranges, self.rectified, device), there
        return self._tables[1]


def channel_dims(model: nn.Module, layers: Sequence[nn.Module]) -> dict[int, int]:
    """Return the dimension that counts the channels in the output of each layer, by the layer's place.

    It is that of the last layer, up to it in the order of registration, of which it is known.
    """
    found, dim = {}, 1
    place = {layer: i for i, layer in enumerate(layers)}
    for _, module in named_modules(model):
        if isinstance(module, _CHANNELS_SECOND + _CHANNELS_LAST):
            dim = 1 if isinstance(module, _CHANNELS_SECOND) else -1
        if module in place:
            found[place[module]] = dim
    return found


def _extremes(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of each channel, read in the order in which they lie in memory."""
    if dim % x.dim() == x.dim() - 1 or x.stride(dim) == 1:
        rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
        return rows.amin(0), rows.amax(0)
    rows = x.flatten(dim + 1)
    return rows.amin(-1).amin(0), rows.amax(-1).amax(0)
