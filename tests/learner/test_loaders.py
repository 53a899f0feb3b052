"""Training sees the same batches with LSUV as without, to the bit, whatever loader; and what the exceptions are."""

import itertools
import random
from collections import Counter, deque
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.utils.data as tud
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.tabular.all import Categorify, Normalize, RandomSplitter, TabDataLoader, TabularPandas, TabWeightedDL
from fastai.text.all import Categorize, LMDataLoader, Numericalize, Pad_Chunk, SortedDL
from fastai.vision.all import (
    CrossEntropyLossFlat,
    Dihedral,
    RandomResizedCrop,
    Resize,
    Rotate,
    Transform,
    aug_transforms,
)
from learners import Spy, digits, learner, ran, seed, small_cnn
from torch import nn

from fastai_lsuv import LSUVCallback


class Table(tud.Dataset):
    "Map-style; `noise` draws from where the user likes."

    def __init__(self, n=80, noise=lambda: 0.0):
        self.x, self.n, self.noise = torch.randn(n, 10, generator=torch.Generator().manual_seed(2)), n, noise

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.x[i] + self.noise(), i % 5


class Stream(tud.IterableDataset):
    "Begins anew whenever it is asked, in another order each time."

    def __init__(self, n=80):
        self.rows = Table(n)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return (self.rows[i] for i in random.sample(range(len(self.rows)), len(self.rows)))


def drawn():
    return random.random() + np.random.rand() + torch.rand(10)


# --- loaders ----------------------------------------------------------------------------------------------------------


def loaders(make, noise=drawn, valid=None):
    return lambda: DataLoaders(make(Table(80, noise)), (valid or make)(Table(32, noise)))


def torch_dl(ds, workers=0, **kwargs):
    return tud.DataLoader(
        ds, **({} if "batch_sampler" in kwargs else {"batch_size": 16}), num_workers=workers, **kwargs
    )


def batches_of(sampler):
    return tud.BatchSampler(sampler, 16, drop_last=False)


def generator(n=3):
    return torch.Generator().manual_seed(n)


class Halving:
    "A sampler of the user's own, without a class of PyTorch's: the second half in random order, from Python's stream."

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter([*range(self.n // 2), *random.sample(range(self.n // 2, self.n), self.n - self.n // 2)])


class ByEpoch(Halving):
    "A sampler that seeds itself by the number of its epoch, which it counts."

    epoch = 0

    def __iter__(self):
        self.epoch += 1
        return iter(torch.randperm(self.n, generator=generator(self.epoch)).tolist())


class OwnOrder(Halving):
    "A sampler with a generator of its own."

    def __init__(self, n, rng):
        super().__init__(n)
        self.rng = rng

    def __iter__(self):
        return iter([*range(self.n // 2), *(self.n // 2 + i for i in self.permuted(self.n - self.n // 2))])

    def permuted(self, n):
        if isinstance(self.rng, random.Random):
            return self.rng.sample(range(n), n)
        return (
            torch.randperm(n, generator=self.rng) if isinstance(self.rng, torch.Generator) else self.rng.permutation(n)
        ).tolist()


class OwnNoise(Table):
    "Augments with a generator that belongs to it."

    def __init__(self, n=80):
        super().__init__(n, lambda: torch.from_numpy(self.rng.normal(size=10).astype(np.float32)))
        self.rng = np.random.default_rng(5)


class Split(Table):
    "Says of what the inputs are: the loader needn't look at an item to find out."

    n_inp = 1


class OwnTransform(Transform):
    "The same as a transform of fastai's."

    def __init__(self):
        self.rng = np.random.default_rng(6)

    def encodes(self, x: torch.Tensor):
        return x * float(self.rng.uniform(0.5, 2)) if x.is_floating_point() else x


class InPlace(TfmdDL):
    "A loader that shuffles an array of its own, again and again."

    def __init__(self, ds, **kwargs):
        super().__init__(ds, **kwargs)
        self.order = np.arange(len(ds))

    def get_idxs(self):
        np.random.shuffle(self.order)
        return self.order.tolist()


TORCH = {
    "shuffled": lambda ds: torch_dl(ds, shuffle=True),
    "a generator": lambda ds: torch_dl(ds, shuffle=True, generator=generator()),
    "a random sampler": lambda ds: torch_dl(ds, sampler=tud.RandomSampler(ds, replacement=True, num_samples=64)),
    "a sampler with a generator": lambda ds: torch_dl(ds, sampler=tud.RandomSampler(ds, generator=generator())),
    "weights": lambda ds: torch_dl(
        ds, sampler=tud.WeightedRandomSampler(torch.arange(len(ds)) + 1.0, 64, generator=generator())
    ),
    "a subset": lambda ds: torch_dl(ds, sampler=tud.SubsetRandomSampler(range(0, len(ds), 2), generator=generator())),
    "batches": lambda ds: torch_dl(ds, batch_sampler=batches_of(tud.RandomSampler(ds))),
    "batches with a generator": lambda ds: torch_dl(
        ds, batch_sampler=batches_of(tud.RandomSampler(ds, generator=generator()))
    ),
    "one by one, batched already": lambda ds: tud.DataLoader(
        [(torch.rand(8, 10) + i, torch.arange(8) % 5) for i in range(len(ds) // 8)], batch_size=None, shuffle=True
    ),
    "the user's own sampler": lambda ds: torch_dl(ds, sampler=Halving(len(ds))),
    "a sampler that counts its epochs": lambda ds: torch_dl(ds, sampler=ByEpoch(len(ds))),
    "workers": lambda ds: torch_dl(ds, 2, shuffle=True),
    "persistent workers": lambda ds: torch_dl(ds, 2, shuffle=True, persistent_workers=True),
    "persistent workers, a generator": lambda ds: torch_dl(
        ds, 1, shuffle=True, persistent_workers=True, generator=generator()
    ),
    "iterable": lambda ds: torch_dl(Stream(len(ds))),
    "iterable, workers": lambda ds: torch_dl(Stream(len(ds)), 1),
    "iterable, persistent workers": lambda ds: torch_dl(Stream(len(ds)), 1, persistent_workers=True),
}
shuffled = partial(DataLoader, bs=16, shuffle=True)
FASTAI = {
    "shuffled": shuffled,
    "workers": partial(shuffled, num_workers=2),
    "persistent workers": partial(shuffled, num_workers=2, persistent_workers=True),
    "iterable": lambda ds: DataLoader(Stream(len(ds)), bs=16),
    "iterable with n": lambda ds: DataLoader(Stream(len(ds)), bs=16, n=40),
    "iterable, workers": lambda ds: DataLoader(Stream(len(ds)), bs=16, num_workers=1),
    "TfmdDL": partial(TfmdDL, bs=16, shuffle=True, num_workers=0),
    "WeightedDL": lambda ds: WeightedDL(ds, bs=16, wgts=np.arange(len(ds)) + 1.0, shuffle=True, num_workers=0),
    "PartialDL": lambda ds: PartialDL(ds, bs=16, partial_n=40, num_workers=0),
    "PartialDL, workers": lambda ds: PartialDL(ds, bs=16, partial_n=40, num_workers=2),
    "an array shuffled in place": partial(InPlace, bs=16, num_workers=0),
    "its own shuffle_fn": partial(shuffled, shuffle_fn=lambda idxs: np.random.permutation(len(idxs)).tolist()),
    "a random transform of batches": partial(
        shuffled, after_batch=lambda b: (b[0] * torch.rand(1) + random.random(), b[1])
    ),
}


def images(**kwargs):
    return lambda: digits(64, 16, **kwargs)


IMAGES = {
    "by the item": images(item_tfms=[Resize(10), RandomResizedCrop(8, min_scale=0.5)]),
    "by the item, workers": images(
        item_tfms=RandomResizedCrop(8, min_scale=0.5), num_workers=2, persistent_workers=True
    ),
    "by the batch": images(batch_tfms=aug_transforms(size=8, max_warp=0.1)),
    "on the device, drawn by torch": images(
        batch_tfms=[Rotate(p=0.5, draw=lambda x: x.new_empty(len(x)).uniform_()), Dihedral()]
    ),
}

STREAMS = {
    "numpy": lambda: np.random.default_rng(7),
    "numpy's old one": lambda: np.random.RandomState(7),
    "python": lambda: random.Random(7),
    "torch": generator,
}
OWN = {
    **{
        f"a sampler, {k}": (
            lambda make=v: DataLoaders(torch_dl(Table(), sampler=OwnOrder(80, make())), torch_dl(Table(32)))
        )
        for k, v in STREAMS.items()
    },
    "a dataset, fastai": lambda: DataLoaders(shuffled(OwnNoise()), torch_dl(Table(32))),
    "a dataset, torch": lambda: DataLoaders(torch_dl(OwnNoise(), shuffle=True), torch_dl(Table(32))),
    "a transform of the loader": lambda: DataLoaders(
        TfmdDL(Split(), bs=16, num_workers=0, after_batch=[OwnTransform()]), torch_dl(Table(32))
    ),
}


class Listed(Table):
    "Its transforms are in a list."

    def __init__(self):
        super().__init__()
        self.tfms = [OwnTransform()]

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        for t in self.tfms:
            x = t(x)
        return x, y


class Turning(Table):
    "Keeps its turn in whatever it was given; `take` is how."

    def __init__(self, turn, take):
        super().__init__()
        self.turn, self.take = turn, take

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x * (1 + self.take(self.turn) % 7), y


def counted(c):
    c["turn"] += 1
    return c["turn"]


def rotated(d):
    d.rotate(1)
    return d[0]


def grown(held):
    held.add(len(held)) if isinstance(held, set) else held.append(len(held))
    return len(held)


class Turn:
    "In an object of a class of its own, which says how it is pickled."

    def __init__(self):
        self.n = 0

    def __getstate__(self):
        raise TypeError("not me")

    def next(self):
        self.n += 1
        return self.n


TURNS = {
    "a Counter": lambda: Turning(Counter(), counted),
    "a dict in a dict": lambda: Turning({"a": {"turn": 0}}, lambda d: counted(d["a"])),
    "a deque": lambda: Turning(deque(range(5)), rotated),
    "a set": lambda: Turning(set(), grown),
    "a list in a tuple": lambda: Turning(([],), lambda t: grown(t[0])),
    "itertools.count": lambda: Turning(itertools.count(), next),
    "itertools.cycle": lambda: Turning(itertools.cycle([2, 3, 5]), next),
    "an iterator": lambda: Turning(iter([*range(5000)]), next),
    "an array": lambda: Turning(np.zeros(3, int), lambda a: a.__iadd__(1)[0]),
    "a tensor": lambda: Turning(torch.zeros(3), lambda t: int(t.add_(1)[0])),
    "an object": lambda: Turning(Turn(), Turn.next),
    "a method of an object": lambda: Turning(Turn().next, lambda f: f()),
    "an object in a closure": lambda: Turning(closed(Turn()), lambda f: f()),
    "a partial": lambda: Turning(partial(Turn.next, Turn()), lambda f: f()),
}


def closed(turn):
    return lambda: turn.next()


OWN |= {
    "a transform with a generator, in a list of the dataset": lambda: DataLoaders(
        torch_dl(Listed(), shuffle=True), torch_dl(Table(32))
    ),
    **{
        f"{k}, torch": (lambda make=v: DataLoaders(torch_dl(make(), shuffle=True), torch_dl(Table(32))))
        for k, v in TURNS.items()
    },
    **{f"{k}, fastai": (lambda make=v: DataLoaders(shuffled(make()), torch_dl(Table(32)))) for k, v in TURNS.items()},
}

WORDS = ["xxunk", "xxpad", "xxbos", *(f"w{i}" for i in range(29))]


def lines(n=60):
    rng = np.random.default_rng(3)
    return [["xxbos", *rng.choice(WORDS[3:], rng.integers(4, 30))] for _ in range(n)]


SPLITS = [list(range(45)), list(range(45, 60))]


def language(**kwargs):
    return lambda: Datasets(lines(), [[Numericalize(WORDS)]], splits=SPLITS, dl_type=LMDataLoader).dataloaders(
        bs=8, seq_len=9, num_workers=0, **kwargs
    )


def sorted_by_length(**kwargs):
    def make():
        texts = lines()
        dsets = Datasets(
            range(60),
            [[lambda i: texts[i], Numericalize(WORDS)], [lambda i: str(i % 5), Categorize()]],
            splits=SPLITS,
            dl_type=SortedDL,
        )
        return dsets.dataloaders(bs=8, before_batch=Pad_Chunk(seq_len=9), **{"num_workers": 0} | kwargs)

    return make


def table(cls, **kwargs):
    def make():
        rng = np.random.default_rng(0)
        frame = pd.DataFrame(rng.normal(size=(120, 10)).astype(np.float32), columns=list("abcdefghij")).assign(
            y=rng.integers(0, 5, 120)
        )
        to = TabularPandas(
            frame,
            [Categorify, Normalize],
            cont_names=list("abcdefghij"),
            y_names="y",
            splits=RandomSplitter(seed=1)(range(120)),
        )
        return DataLoaders(cls(to.train, bs=16, shuffle=True, **kwargs), TabDataLoader(to.valid, bs=16))

    return make


OTHERS = {
    "LMDataLoader": language(),
    "LMDataLoader, uncached": language(cache=None),
    "SortedDL": sorted_by_length(),
    "SortedDL, workers": sorted_by_length(num_workers=2),
    "TabDataLoader": table(TabDataLoader),
    "TabDataLoader, dropping the last": table(TabDataLoader, drop_last=True),
    "TabWeightedDL": table(partial(TabWeightedDL, wgts=np.arange(96) + 1.0)),
}
CASES = {
    **{f"torch: {k}": loaders(v) for k, v in TORCH.items()},
    **{f"fastai: {k}": loaders(v) for k, v in FASTAI.items()},
    **{f"images: {k}": v for k, v in IMAGES.items()},
    **{f"own state: {k}": v for k, v in OWN.items()},
    **OTHERS,
}


# --- what training sees -----------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(len(WORDS), 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.emb(x).mean(1))


class Numbers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(10, 8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, *xs):
        return super().forward(xs[-1])  # of a table's inputs the last are the numbers


def model_for(case):
    if case.startswith("images"):
        return small_cnn()
    if case.startswith("LM"):
        return nn.Sequential(nn.Embedding(len(WORDS), 6), nn.Dropout(0.2), nn.Linear(6, len(WORDS)))
    return Pooled() if case.startswith("Sorted") else Numbers()


def seen(case, how, make=None, epochs=2, **options):
    "Every batch of a training, with LSUV or without, and the random streams at each."
    seed(23)
    learn = learner((make or CASES[case])(), model_for(case), metrics=[], loss_func=CrossEntropyLossFlat())
    seed(42)
    if how == "lsuv_init":
        learn.lsuv_init(**options)
    learn.fit(epochs, cbs=[spy := Spy(), *([LSUVCallback(**options)] if how == "callback" else [])])
    for dl in learn.dls.loaders:
        vars(dl).pop("_iterator", None)  # persistent workers end here, not when garbage is collected
    assert ran(learn) == (how != "plainly")
    if how != "plainly":
        assert [row.status for row in learn.lsuv_report] == ["corrected"] * len(learn.lsuv_report)
    return spy.seen


def assert_same(a, b):
    assert (found := first_difference(a, b)) is None, found


def first_difference(a, b):
    for i, (one, other) in enumerate(itertools.zip_longest(a, b)):
        if one is None or other is None or one[:2] != other[:2]:
            return f"batch {i} is another one"
        if one[2] != other[2]:
            return f"the random streams differ at batch {i}"
    return None


@pytest.mark.parametrize("case", CASES)
def test_the_same_batches_with_the_callback_as_without(case):
    plainly = seen(case, "plainly")
    assert len(plainly) > 6
    assert_same(plainly, seen(case, "callback"))


@pytest.mark.parametrize(
    "case",
    [
        "LMDataLoader",
        "SortedDL",
        "TabDataLoader",
        "torch: persistent workers, a generator",
        "fastai: WeightedDL",
        "fastai: PartialDL",
        "fastai: iterable",
    ],
)
def test_and_after_lsuv_init(case):
    assert_same(seen(case, "plainly"), seen(case, "lsuv_init"))


@pytest.mark.parametrize(
    "case", ["LMDataLoader", "SortedDL", "TabWeightedDL", "torch: shuffled", "torch: batches", "fastai: iterable"]
)
def test_the_order_is_random_at_all(case):
    "So that the tests above can fail."
    batches = [b for training, b, _ in seen(case, "plainly") if training]
    assert batches[: len(batches) // 2] != batches[len(batches) // 2 :]


# --- the exceptions that the documentation names ----------------------------------------------------------------------


def one_shot(n):
    return (row for row in [Table(n)[i] for i in range(n)])


class Sized:
    "Knows how many it gives; can give them once."

    def __init__(self, n):
        self.it, self.n = one_shot(n), n

    def __len__(self):
        return self.n

    def __iter__(self):
        return self.it


class Once(Sized, tud.IterableDataset):
    pass


EXCEPTIONS = {
    "a generator, fastai": lambda: DataLoaders(DataLoader(one_shot(80), bs=16, n=80), torch_dl(Table(32))),
    "a generator with a length, fastai": lambda: DataLoaders(DataLoader(Sized(80), bs=16), torch_dl(Table(32))),
    "a generator, torch": lambda: DataLoaders(torch_dl(Once(80)), torch_dl(Table(32))),
}


@pytest.mark.parametrize("case", EXCEPTIONS)
def test_the_documented_exceptions_are_exceptions_and_batch_is_the_way_out(case):
    epochs = 1
    batch = torch.randn(32, 10, generator=generator()), torch.arange(32) % 5
    plainly = seen(case, "plainly", EXCEPTIONS[case], epochs)
    assert_same(plainly, seen(case, "plainly", EXCEPTIONS[case], epochs))
    assert first_difference(plainly, seen(case, "callback", EXCEPTIONS[case], epochs)) is not None, (
        "no longer an exception: say so"
    )
    for how in ("callback", "lsuv_init"):
        assert_same(plainly, seen(case, how, EXCEPTIONS[case], epochs, batch=batch))
