"""Data that isn't shuffled, so that a test knows the first batch: 48 images, or any other columns."""

from __future__ import annotations

import torch
import torch.utils.data as tud
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader

N = 48


class Columns(tud.Dataset):
    "Map-style data from whole columns: tensors, or dicts of tensors."

    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[-1])

    def __getitem__(self, i):
        return tuple({k: v[i] for k, v in c.items()} if isinstance(c, dict) else c[i] for c in self.columns)


def pixels(side=8, n=N):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(2))


def loaders(x=None, bs=16):
    "The same for training and validation; the first batch is `x[:bs]`."
    data = Columns(pixels() if x is None else x, torch.arange(N if x is None or isinstance(x, dict) else len(x)) % 10)
    return DataLoaders(*(DataLoader(data, bs=bs) for _ in range(2)))


def complaints(recwarn):
    "But for those that a GPU's kernels make of the deterministic algorithms that conftest.py asks for."
    said = [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    return [message for message in said if "deterministic" not in message]
