"""The batch that LSUV is given by a Learner's own loader is the first that training sees, whatever gives it."""

import itertools

import pytest
import torch
import torch.utils.data as tud
from audit import parameter_bits
from checks import assert_exact
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.vision.all import CrossEntropyLossFlat
from learners import learner, seed
from torch import nn

from fastai_lsuv import LSUVCallback


class First(Callback):
    "Keeps the state in which the first epoch finds the model, and the first batch."

    order = 90
    state = x = None

    def before_epoch(self):
        if self.state is None:
            self.state = {name: value.clone() for name, value in self.learn.model.state_dict().items()}

    def before_batch(self):
        if self.x is None:
            self.x = self.learn.xb[0].clone()


class Stream(tud.IterableDataset):
    "Nothing to index; the same each time. (fastai's fit asks for a length.)"

    def __init__(self, n=48):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        return (
            (torch.full((1, 8, 8), i / 9.0).sin() + torch.arange(64.0).view(1, 8, 8).cos() * i, i % 10)
            for i in range(self.n)
        )


class Endless:
    "Has an `__iter__` only: the loader is told how many to take."

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return itertools.chain(Stream(self.n), Stream(self.n))


class Numbered(tud.Dataset):
    def __init__(self, n=48):
        self.items = list(Stream(n))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


FROM = {
    "torch": lambda n: tud.DataLoader(Numbered(n), 16),
    "torch, workers": lambda n: tud.DataLoader(Numbered(n), 16, num_workers=2),
    "torch, workers that persist": lambda n: tud.DataLoader(Numbered(n), 16, num_workers=2, persistent_workers=True),
    "torch, iterable": lambda n: tud.DataLoader(Stream(n), 16),
    "torch, iterable, workers": lambda n: tud.DataLoader(Stream(n), 16, num_workers=1),
    "fastai": lambda n: DataLoader(Numbered(n), bs=16),
    "fastai, workers": lambda n: DataLoader(Numbered(n), bs=16, num_workers=2),
    "fastai, workers that persist": lambda n: DataLoader(Numbered(n), bs=16, num_workers=2, persistent_workers=True),
    "fastai, iterable": lambda n: DataLoader(Stream(n), bs=16),
    "fastai, a generator function with n": lambda n: DataLoader(Endless(n), bs=16, n=n),
    "a list of batches": lambda n: [*tud.DataLoader(Numbered(n), 16)],
}


@pytest.mark.parametrize("loader", FROM)
def test_the_batch_is_the_first_that_training_sees(loader):
    "None given; the loaders don't shuffle."
    seed(3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 10))
    learn = learner(
        DataLoaders(FROM[loader](48), FROM[loader](16)), model, metrics=[], loss_func=CrossEntropyLossFlat()
    )
    x, before = next(iter(FROM["torch"](48)))[0], parameter_bits(model)
    learn.fit(1, 1e-4, cbs=[LSUVCallback(), first := First()])
    for dl in learn.dls.loaders:
        isinstance(dl, list) or vars(dl).pop(
            "_iterator", None
        )  # persistent workers end here, not when garbage is collected
    assert torch.equal(first.x, x)
    model.load_state_dict(first.state)
    assert len(assert_exact(model, x, learn.lsuv_report, before)) == 2
