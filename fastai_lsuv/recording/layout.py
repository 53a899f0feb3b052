"""Where samples of several tensors lie in one buffer, as tables of indices that look at all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastai_lsuv.core.signal import distance
from fastai_lsuv.recording.sampling import FEW, FEWER, Spots

CHUNK = 64  # values in a row of the buffer; each row of a sample has whole rows of its own
_MANY = 100  # of fewer values some are always near their limit
Indices = npt.NDArray[np.int64]


class Layout:
    """A buffer of rows of `CHUNK` values for samples of different sizes, and what finds each sample's values in it.

    Sums over a sample are sums over rows, and then over a table of its rows: the number of operations is the same for
    three samples as for three hundred. The last two rows hold zeros and NaN: tables of different lengths are filled
    up with them. Tables are made on the host and go to the buffer's device without a wait.

    A sample's own rows, one for each part of the batch, begin with a row of the buffer. So what the parts have at the
    same place stands one below the other, in rows of the buffer that belong to one *group*.
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
        self.wide = np.array([-(-s.size[1] // CHUNK) for s in spots])  # rows of the buffer to each of a sample's own
        self.n_rows = self.wide * [s.size[0] for s in spots]
        self.rows = int(self.n_rows.sum())  # of samples
        self.starts = _before(self.n_rows) * CHUNK
        self.samples_of_layer = np.bincount(layers, minlength=n_layers)
        self.few_of = {s: _few(s) for s in set(spots)}  # most layers are like others

    def region(self, buffer: Tensor, i: int) -> Tensor:
        """The part of the buffer for sample `i`, in its rows."""
        return buffer.as_strided(self.spots[i].size, (int(self.wide[i]) * CHUNK, 1), int(self.starts[i]))

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
        spare = np.ones((self.rows + 1, CHUNK), bool)
        for s, start, wide in zip(self.spots, self.starts // CHUNK, self.wide, strict=True):
            spare[start : start + s.size[0] * wide].reshape(s.size[0], -1)[:, : s.size[1]] = False
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

    # of the parts of a batch

    @cached_property
    def groups(self) -> int:
        """How many groups of rows there are; and one more for each of the last two rows."""
        return int(self.wide.sum())

    @cached_property
    def group_of_row(self) -> Tensor:
        """For each row of the buffer the group of those with which it shares its places."""
        of_samples = [
            np.tile(np.arange(first, first + wide), s.size[0])
            for s, first, wide in zip(self.spots, _before(self.wide), self.wide, strict=True)
        ]
        return self._there(np.concatenate([*of_samples, [self.groups, self.groups + 1]]))

    @cached_property
    def group_table(self) -> Tensor:
        """(samples, most groups): the groups of each; filled up with that of zeros."""
        return self._there(_table(self.wide, self.groups))

    @cached_property
    def parts(self) -> Tensor:
        """How many rows each sample has."""
        return self._there(np.array([s.size[0] for s in self.spots], np.float32))

    @cached_property
    def signal_scale(self) -> Tensor:
        """Degrees of freedom of all values over those within places; NaN where there is nothing to compare."""
        within = np.array([(s.size[0] - 1) * s.size[1] or np.nan for s in self.spots])
        return self._there(((self.n_values - 1) / within).astype(np.float32))

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

    def _each(self) -> Iterator[tuple[Spots, int]]:
        return zip(self.spots, self.starts, strict=True)

    def _there(self, table: npt.NDArray[np.int64 | np.float32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(table)).to(self.device, non_blocking=True)


def _few(spots: Spots) -> Indices:
    """Places of about `FEW` values of a sample in its part of the buffer."""
    row, column = np.divmod(np.arange(0, spots.values, distance(spots.n, spots.values / FEW)), spots.size[1])
    return row * (-(-spots.size[1] // CHUNK) * CHUNK) + column


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
