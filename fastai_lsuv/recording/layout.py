"""Where samples of several tensors lie in one buffer, as tables of indices that look at all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        layers: Sequence[int],  # to which it belongs, in ascending order; several of one that was called so often
        n_layers: int,
        device: torch.device,
    ) -> None:
        self.spots, self.device = spots, device
        self.n_values = np.array([s.values for s in spots])
        self.n_rows = -(-self.n_values // CHUNK)
        self.rows = int(self.n_rows.sum())  # of samples
        self.starts = _before(self.n_rows) * CHUNK
        self.samples_of_layer = np.bincount(layers, minlength=n_layers)
        self.few_of = {s: _few(s) for s in set(spots)}  # most layers are like others

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
        return self._there(np.append(np.repeat(np.arange(len(self.spots)), self.n_rows), [0, 0]))

    @cached_property
    def row_table(self) -> Tensor:
        """(samples, most rows): the rows of each."""
        return self._there(_table(self.n_rows, self.rows))

    @cached_property
    def padding(self) -> Tensor:
        """Places in the buffer that belong to no sample."""
        spare = np.ones((self.rows + 1) * CHUNK, bool)
        for start, n in zip(self.starts, self.n_values, strict=True):
            spare[start : start + n] = False
        return self._there(np.flatnonzero(spare))

    @cached_property
    def counts(self) -> Tensor:
        """How many values each sample has."""
        return self._there(self.n_values.astype(np.float32))

    # of a few of them

    @cached_property
    def few(self) -> Tensor:
        """Places of about `FEW` values of each sample, in rows of `CHUNK`, and one row more; the rest are of NaN."""
        filled = {s: _whole_rows(few) for s, few in self.few_of.items()}
        places = np.concatenate([filled[s] + start for s, start in self._each()])
        nan = (self.rows + 1) * CHUNK
        return self._there(np.append(np.where(places < 0, nan, places), np.full(CHUNK, nan)))

    @cached_property
    def few_counts(self) -> Tensor:
        """How many these are."""
        return self._there(np.array([len(self.few_of[s]) for s in self.spots], np.float32))

    @cached_property
    def few_table(self) -> Tensor:
        """(samples, most rows): the rows of `few` that belong to each; filled up with its last, of NaN only."""
        return self._there(_table(self._few_rows, int(self._few_rows.sum())))

    @cached_property
    def sample_of_few(self) -> Tensor:
        """For each row of `few` the sample to which it belongs."""
        return self._there(np.append(np.repeat(np.arange(len(self.spots)), self._few_rows), 0))

    @cached_property
    def fewer(self) -> Tensor:
        """(samples, about `FEWER`): places of values of each; those of small samples come several times."""
        taken = {s: few[:: distance(s.n, len(few) / FEWER)] for s, few in self.few_of.items()}
        width = max(map(len, taken.values()))
        filled = {s: np.resize(places, width) for s, places in taken.items()}
        return self._there(np.stack([filled[s] + start for s, start in self._each()]))

    @cached_property
    def are_many(self) -> Tensor:
        """Whether a sample has so many values that not some of them are always near their limit."""
        return self._there((self.n_values >= _MANY).astype(np.float32))

    @cached_property
    def first_half(self) -> Tensor:
        """(samples, about `FEWER`): places of values in the first half of the batch; then places of zeros."""
        return self._there(self._in_half(0))

    @cached_property
    def second_half(self) -> Tensor:
        """Places of their counterparts in the second half."""
        return self._there(self._in_half(1))

    @cached_property
    def signal_scale(self) -> Tensor:
        """From the norm of their differences to a std; NaN where a batch has no halves."""
        counts = np.array([len(self._pairs[s]) for s in self.spots], np.float32)
        return self._there((2 * np.where(counts > 0, counts, np.nan)).astype(np.float32) ** -0.5)

    # of layers

    @cached_property
    def is_one_each(self) -> bool:
        """True if every layer has one sample."""
        return bool((self.samples_of_layer == 1).all())

    @cached_property
    def layer_table(self) -> Tensor:
        """(layers, most samples): the samples of each; filled up with one behind the last."""
        return self._there(_table(self.samples_of_layer, len(self.spots)))

    @cached_property
    def sizes(self) -> Tensor:
        """(layers, most samples): how many values the whole tensors had of which these samples are; else 0."""
        sizes = np.array([*(s.n for s in self.spots), 0], np.float32)
        return self._there(sizes[_table(self.samples_of_layer, -1)])

    @cached_property
    def sample_sizes(self) -> Tensor:
        """How many values the whole tensor had of which each is a sample."""
        return self._there(np.array([s.n for s in self.spots], np.float32))

    @cached_property
    def _few_rows(self) -> Indices:
        return np.array([-(-len(self.few_of[s]) // CHUNK) for s in self.spots])

    @cached_property
    def _pairs(self) -> dict[Spots, Indices]:
        """Places in the first half of a batch, if it has two."""
        return {s: np.arange(0, s.size[1] * (s.size[0] - 1), distance(s.n, s.size[1] / FEWER)) for s in self.few_of}

    def _in_half(self, which: int) -> Indices:
        width = max([1, *map(len, self._pairs.values())])
        table = np.full((len(self.spots), width), self.rows * CHUNK)
        for line, (s, start) in zip(table, self._each(), strict=True):
            line[: len(self._pairs[s])] = self._pairs[s] + (start + which * s.size[1])
        return table

    def _each(self) -> Iterator[tuple[Spots, int]]:
        return zip(self.spots, self.starts, strict=True)

    def _there(self, table: npt.NDArray[np.int64 | np.float32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(table)).to(self.device, non_blocking=True)


def _few(spots: Spots) -> Indices:
    """Places of about `FEW` values of a sample."""
    return np.arange(0, spots.values, distance(spots.n, spots.values / FEW))


def _before(counts: Indices) -> Indices:
    """How many there are before each."""
    return np.cumsum(counts) - counts


def _table(counts: Indices, fill: int) -> Indices:
    """The numbers of things of which each has so many, one after the other, in lines as long as the longest."""
    within = np.arange(counts.max(initial=1))
    return np.where(within < counts[:, None], _before(counts)[:, None] + within, fill)


def _whole_rows(places: Indices) -> Indices:
    """Places, and so many far below 0 that they are whole rows."""
    return np.append(places, np.full(-len(places) % CHUNK, np.iinfo(np.int64).min // 2))
