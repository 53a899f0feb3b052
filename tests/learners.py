"""Real Learners on small real data (scikit-learn's digits), and a spy that writes down what training sees."""

from __future__ import annotations

import functools
import random
from functools import partial

import numpy as np
import torch
from audit import audit, bits, parameter_bits, rng_print
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    CrossEntropyLossFlat,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    ItemGetter,
    Learner,
    PILImageBW,
    ProgressCallback,
    accuracy,
    default_device,
    params,
)
from sklearn.datasets import load_digits
from torch import nn

scans = functools.cache(partial(load_digits, return_X_y=True))


def items(n=160):
    "(image, label) pairs."
    x, y = scans()
    return [(np.uint8(x[i].reshape(8, 8) * 15), str(y[i])) for i in range(n)]


def digits(n=160, bs=32, item_tfms=None, batch_tfms=None, **kwargs):
    "Digits as fastai's images: everything that fastai does with a Learner works on them."
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock),
        get_items=items,  # (fastai makes a string of the source, whether it prints it or not)
        getters=[ItemGetter(0), ItemGetter(1)],
        splitter=IndexSplitter(range(n * 3 // 4, n)),
        item_tfms=item_tfms,
        batch_tfms=batch_tfms,
    )
    return block.dataloaders(n, bs=bs, num_workers=kwargs.pop("num_workers", 0), **kwargs)


def small_cnn(norm=None, n_out=10):
    "Body (the first two convolutions) and head, with activations that overwrite; perhaps norms."
    torch.manual_seed(5)
    mid = [norm(8)] if norm is not None else []
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), *mid, nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(inplace=True)
        ),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, n_out)),
    )


def body_and_head(model):
    return [params(model[0]), params(model[1])]


def learner(dls=None, model=None, path=".", **kwargs):
    "A Learner without progress bars."
    seed(11)
    model = model if model is not None else small_cnn()
    if default_device().type != "cpu":
        model.to(default_device())  # before the test looks at it for the first time
    learn = Learner(
        dls if dls is not None else digits(),
        model,
        path=path,
        **{"loss_func": CrossEntropyLossFlat(), "metrics": accuracy} | kwargs,
    )
    return learn.remove_cb(ProgressCallback)


def seed(n):
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)


def ran(learn):
    return "lsuv_report" in vars(learn)


class Spy(Callback):
    "Writes down the model as each epoch finds it, every batch as the model gets it, and the random streams."

    order = 90

    def __init__(self):
        self.states, self.audits, self.seen, self.streams, self.batch = [], [], [], [], None

    def before_epoch(self):
        self.states.append(parameter_bits(self.learn.model))
        self.streams.append(rng_print())
        if self.batch is not None:
            self.audits.append(audit(self.learn.model, self.batch))

    def before_batch(self):
        self.seen.append((self.learn.training, [bits(t) for t in (*self.learn.xb, *self.learn.yb)], rng_print()))

    def watch(self, batch):
        self.batch = batch
        return self


def exact(records):
    return all(abs(r.std - 1) <= 1e-3 and (not r.has_bias or abs(r.mean) <= 1e-3) for r in records)


two_groups = partial(learner, splitter=body_and_head)
