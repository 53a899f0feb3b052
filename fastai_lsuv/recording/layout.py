"""Where samples of several tensors lie in one buffer, as tables of indices that look at all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastai_lsuv.recording.sampling import FEW, FEWER, Spots, distance

CHUNK = 256  # values in a row of the buffer; each sample has whole rows of its own
_MANY = 100  # of fewer values some are always near their limit
Indices = npt.NDArray[np.int64]


class Layout:
    """A buffer of rows of `CHUNK` values for samples of different sizes, and what finds each sample's values in it.

    Sums over a sample are sums over rows, and then over a table of its rows: the number of operations is the same for
    three samples as for three hundred. The last two rows hold zeros and NaN: tables of different lengths are filled
    up with them. Tables are made on the host and go to the buffer's device without a wait.
    """

    def __init__(
        self,
        spots: Sequence[Spots],  # of each sample
        layers: Sequence[int],  # to which it belongs; several samples if it was called several times
        n_layers: int,
        device: torch.device,
    ) -> None:
        self.spots, self.layers, self.n_layers, self.device = spots, np.asarray(layers), n_layers, device
        self.n_values = np.array([s.values for s in spots])
        rows = -(-self.n_values // CHUNK)
        self.first_row = np.cumsum(rows) - rows
        self.rows = int(rows.sum())  # of samples
        self.starts = self.first_row * CHUNK
        self._rows_of_each = [np.arange(first, first + n) for first, n in zip(self.first_row, rows, strict=True)]

    def region(self, buffer: Tensor, i: int) -> Tensor:
        """The part of the buffer for sample `i`, in rows of the halves."""
        start = int(self.starts[i])
        return buffer.view(-1)[start : start + self.spots[i].values].view(self.spots[i].size)

    def new_buffer(self) -> Tensor:
        """A buffer without samples, and zeros where none will be."""
        buffer = torch.zeros(self.rows + 2, CHUNK, device=self.device)
        buffer[-1].fill_(torch.nan)
        return buffer

    # of all values

    @cached_property
    def sample_of_row(self) -> Tensor:
        """For each row of the buffer the sample to which it belongs."""
        rows = [np.full(len(rows), i) for i, rows in enumerate(self._rows_of_each)]
        return self._there(np.concatenate([*rows, [0, 0]]))

    @cached_property
    def row_table(self) -> Tensor:
        """(samples, most rows): the rows of each."""
        return self._there(_filled_up(self._rows_of_each, self.rows))

    @cached_property
    def padding(self) -> Tensor:
        """Places in the buffer that belong to no sample."""
        ends = [*self.starts[1:], self.rows * CHUNK]
        spare = [np.arange(a + n, b) for a, n, b in zip(self.starts, self.n_values, ends, strict=True)]
        return self._there(np.concatenate([*spare, np.arange(self.rows * CHUNK, (self.rows + 1) * CHUNK)]))

    @cached_property
    def counts(self) -> Tensor:
        """How many values each sample has."""
        return self._there(self.n_values.astype(np.float32))

    # of a few of them

    @cached_property
    def few(self) -> Tensor:
        """Places of about `FEW` values of each sample, in rows of `CHUNK`, and one row more; the rest are of NaN."""
        nan = (self.rows + 1) * CHUNK
        return self._there(np.concatenate([*(_padded(few, nan) for few in self._few), np.full(CHUNK, nan)]))

    @cached_property
    def few_counts(self) -> Tensor:
        """How many these are."""
        return self._there(np.array([len(few) for few in self._few], np.float32))

    @cached_property
    def few_table(self) -> Tensor:
        """(samples, most rows): the rows of `few` that belong to each; filled up with its last, of NaN only."""
        return self._there(_filled_up(self._few_rows, self._few_rows[-1][-1] + 1))

    @cached_property
    def sample_of_few(self) -> Tensor:
        """For each row of `few` the sample to which it belongs."""
        return self._there(np.concatenate([*(np.full(len(rows), i) for i, rows in enumerate(self._few_rows)), [0]]))

    @cached_property
    def fewer(self) -> Tensor:
        """(samples, about `FEWER`): places of values of each; those of small samples come several times."""
        taken = [few[:: distance(s.n, len(few) / FEWER)] for few, s in zip(self._few, self.spots, strict=True)]
        width = max(map(len, taken))
        return self._there(np.stack([np.resize(places, width) for places in taken]))

    @cached_property
    def are_many(self) -> Tensor:
        """Whether a sample has so many values that not some of them are always near their limit."""
        return self._there((self.n_values >= _MANY).astype(np.float32))

    @cached_property
    def first_half(self) -> Tensor:
        """(samples, about `FEWER`): places of values in the first half of the batch; then places of zeros."""
        return self._there(_filled_up([places for places, _ in self._pairs], self.rows * CHUNK))

    @cached_property
    def second_half(self) -> Tensor:
        """Places of their counterparts in the second half."""
        return self._there(_filled_up([places + half for places, half in self._pairs], self.rows * CHUNK))

    @cached_property
    def signal_scale(self) -> Tensor:
        """From the norm of their differences to a std; NaN where a batch has no halves."""
        counts = np.array([len(places) for places, _ in self._pairs], np.float32)
        return self._there((2 * np.where(counts > 0, counts, np.nan)).astype(np.float32) ** -0.5)

    # of layers

    @cached_property
    def is_one_each(self) -> bool:
        """True if every layer has one sample."""
        return self.layers.tolist() == [*range(self.n_layers)]

    @cached_property
    def layer_table(self) -> Tensor:
        """(layers, most samples): the samples of each; filled up with one behind the last."""
        return self._there(_filled_up(self._samples_of_each, len(self.spots)))

    @cached_property
    def sample_sizes(self) -> Tensor:
        """How many values the whole tensor had of which each is a sample."""
        return self._there(np.array([s.n for s in self.spots], np.float32))

    @cached_property
    def sizes(self) -> Tensor:
        """(layers, most samples): how many values the whole tensors had of which these samples are; else 0."""
        sizes = np.array([*(s.n for s in self.spots), 0], np.float32)
        return self._there(sizes[_filled_up(self._samples_of_each, -1)])

    @cached_property
    def _samples_of_each(self) -> list[Indices]:
        return [np.flatnonzero(self.layers == i) for i in range(self.n_layers)]

    @cached_property
    def _few(self) -> list[Indices]:
        return [
            np.arange(start, start + s.values, distance(s.n, s.values / FEW))
            for s, start in zip(self.spots, self.starts, strict=True)
        ]

    @cached_property
    def _few_rows(self) -> list[Indices]:
        rows = [-(-len(few) // CHUNK) for few in self._few]
        return np.split(np.arange(sum(rows)), np.cumsum(rows)[:-1])

    @cached_property
    def _pairs(self) -> list[tuple[Indices, int]]:
        """For each sample places in the first half of its batch, if it has two, and how far their counterparts are."""
        found = []
        for s, start in zip(self.spots, self.starts, strict=True):
            halves, of_half = s.size
            places = np.arange(start, start + of_half, distance(s.n, of_half / FEWER))
            found.append((places if halves == 2 else places[:0], of_half))
        return found

    def _there(self, table: npt.NDArray[np.int64 | np.float32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(table)).to(self.device, non_blocking=True)


def _padded(places: Indices, fill: int) -> Indices:
    """Places, and so many of `fill` that they are whole rows."""
    return np.pad(places, (0, -len(places) % CHUNK), constant_values=fill)


def _filled_up(rows: Sequence[Indices], fill: int) -> Indices:
    """A table whose rows are as long as the longest."""
    width = max(1, *map(len, rows)) if len(rows) else 1
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=fill) for row in rows])
