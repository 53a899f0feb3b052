"""The batch that LSUV is given by a Learner's own loader is the first that training sees, whatever gives it."""

import itertools
import multiprocessing

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


def net():
    seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 10))


@pytest.mark.parametrize("loader", FROM)
def test_the_batch_is_the_first_that_training_sees(loader):
    "None given; the loaders don't shuffle."
    model = net()
    learn = learner(
        DataLoaders(FROM[loader](48), FROM[loader](16)), model, metrics=[], loss_func=CrossEntropyLossFlat()
    )
    x, before = next(iter(FROM["torch"](48)))[0], parameter_bits(model)
    learn.fit(1, 1e-4, cbs=[LSUVCallback(), first := First()])
    for dl in learn.dls.loaders:
        isinstance(dl, list) or vars(dl).pop(
            "_iterator", None
        )  # persistent workers end here, not when garbage is collected
    assert torch.equal(first.x.cpu(), x)
    model.load_state_dict(first.state)
    assert len(assert_exact(model, x, learn.lsuv_report, before)) == 2


# --- data that only workers can fetch ---------------------------------------------------------------------------------


class Stored(Numbered):
    "Its file is opened in each worker, never in this process."

    file = None

    def open(self):
        self.file = self.items

    def __getitem__(self, i):
        return self.file[i]


class OnlyInWorkers(Numbered):
    def __getitem__(self, i):
        assert tud.get_worker_info() is not None, "a handle that isn't made for this process"
        return super().__getitem__(i)


class Sharded(Stream):
    "Each worker has a part of its own; of a stream all have the same generator."

    def __iter__(self):
        info = tud.get_worker_info()
        return itertools.islice(super().__iter__(), info.id if info else 0, None, info.num_workers if info else 1)


class Split(Stream):
    "Divided by `worker_init_fn`, as PyTorch's documentation has it."

    start, step = 0, 1

    def __iter__(self):
        return itertools.islice(super().__iter__(), self.start, None, self.step)


def opens(_):
    tud.get_worker_info().dataset.open()


def divides(worker):
    info = tud.get_worker_info()
    info.dataset.start, info.dataset.step = worker, info.num_workers


class Opening(DataLoader):
    "fastai's hook for the same."

    def wif(self):
        self.dataset.open()


BY_WORKERS = {
    "torch, a file": lambda n: tud.DataLoader(Stored(n), 16, num_workers=2, worker_init_fn=opens),
    "torch, a file, workers that persist": lambda n: tud.DataLoader(
        Stored(n), 16, num_workers=1, worker_init_fn=opens, persistent_workers=True
    ),
    "torch, a handle": lambda n: tud.DataLoader(OnlyInWorkers(n), 16, num_workers=1),
    "torch, shards": lambda n: tud.DataLoader(Sharded(n), 8, num_workers=2),
    "torch, divided": lambda n: tud.DataLoader(Split(n), 8, num_workers=2, worker_init_fn=divides),
    "fastai, a file": lambda n: Opening(Stored(n), bs=16, num_workers=2),
    "fastai, a handle": lambda n: DataLoader(OnlyInWorkers(n), bs=16, num_workers=1),
    "fastai, shards": lambda n: DataLoader(Sharded(n), bs=8, num_workers=2),
}


@pytest.mark.parametrize("loader", BY_WORKERS)
def test_workers_fetch_what_only_they_can(loader):
    x = next(iter(BY_WORKERS[loader](48)))[0]
    learn = learner(DataLoaders(BY_WORKERS[loader](48), BY_WORKERS[loader](16)), net(), metrics=[])
    before = parameter_bits(learn.model), dict(vars(learn.dls.train)), dict(vars(learn.dls.train.dataset))
    learn.lsuv_init()
    assert before[1:] == (dict(vars(learn.dls.train)), dict(vars(learn.dls.train.dataset)))
    assert not multiprocessing.active_children()
    assert len(assert_exact(learn.model, x, learn.lsuv_report, before[0])) == 2
    learn.fit(1, 1e-4, cbs=(first := First()))
    for dl in learn.dls.loaders:
        vars(dl).pop("_iterator", None)
    assert torch.equal(first.x.cpu(), x)


def test_a_loader_without_workers_fails_with_the_data_s_own_error():
    dls = DataLoaders(*(tud.DataLoader(Stored(48), 16) for _ in range(2)))
    learn = learner(dls, net(), metrics=[])
    with pytest.raises(TypeError, match="(?s)not subscriptable.*while taking a batch from DataLoader"):
        learn.lsuv_init()
