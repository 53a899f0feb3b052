"""Samples of what the layers put out in one step: a copy each, into a buffer that stays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastai_lsuv.recording.layout import Layout
from fastai_lsuv.recording.sampling import Spots, plain_values


@dataclass(frozen=True)
class Slot:
    """A place in the buffer for a sample of tensors of one shape and layout."""

    shape: torch.Size
    stride: tuple[int, ...]
    spots: Spots
    region: Tensor

    def fits(self, x: Tensor) -> bool:
        """True if a tensor is of that shape and layout, on that device."""
        return x.shape == self.shape and x.stride() == self.stride and x.device == self.region.device


class Samples:
    """Samples of tensors that belong to layers, several to one, perhaps.

    The first step shows how large a buffer they need. From then on each is one copy into its place in it; and where a
    tensor is of another shape than in the last step, the buffer is made anew.
    """

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self._buffer: tuple[Tensor, Layout] | None = None
        self._slots: list[list[Slot]] = [[] for _ in range(n_layers)]
        self._calls = [0] * n_layers  # so far in this step
        self._loose: list[tuple[int, int, Slot]] = []  # (layer, call, …): without a place in the buffer

    @property
    def empty(self) -> bool:
        """True if nothing has come in this step."""
        return not any(self._calls)

    def take(self, layer: int, x: Tensor) -> None:
        """Copy a sample: one strided view and one copy."""
        call, slots = self._calls[layer], self._slots[layer]
        if call < len(slots) and slots[call].fits(x):
            slots[call].region.copy_(slots[call].spots.view(x))
        elif x.numel():
            self._loose.append((layer, call, _loose(x)))
        else:
            return
        self._calls[layer] = call + 1

    def forget(self) -> None:
        """Begin a new step."""
        self._calls = [0] * self.n_layers
        self._loose = []

    def gathered(self) -> tuple[Tensor, Layout]:
        """The buffer with all samples of this step, and where they are in it."""
        if self._buffer is None or self._loose or self._calls != [len(slots) for slots in self._slots]:
            self._buffer = self._arranged()
        return self._buffer

    def _arranged(self) -> tuple[Tensor, Layout]:
        """Make a place in a new buffer for each sample of this step."""
        found = [slots[:calls] for slots, calls in zip(self._slots, self._calls, strict=True)]
        for layer, call, slot in self._loose:
            found[layer][call:] = [slot]
        layers = [layer for layer, slots in enumerate(found) for _ in slots]
        slots = [slot for of_layer in found for slot in of_layer]
        layout = Layout([slot.spots for slot in slots], layers, self.n_layers, slots[0].region.device)
        buffer = layout.new_buffer()
        self._slots, self._loose = [[] for _ in found], []
        for i, (layer, slot) in enumerate(zip(layers, slots, strict=True)):
            region = layout.region(buffer, i).copy_(slot.region)
            self._slots[layer].append(replace(slot, region=region))
        return buffer, layout


def _loose(x: Tensor) -> Slot:
    values = plain_values(x)
    spots = Spots.of(values)
    return Slot(x.shape, () if x.is_nested else x.stride(), spots, spots.view(values).to(torch.float32, copy=True))
