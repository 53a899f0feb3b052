"""What it costs to record activations: a training step without a callback, with fastai's `ActivationStats`, with ours."""
from __future__ import annotations

import time
from statistics import median

import torch
from fastai.callback.hook import ActivationStats
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.vision.models.xresnet import xresnet18
from torch import nn

from fastai_lsuv import ActivationStatsRecorder

CALLBACKS = {  # name: makes the callbacks
    'nothing': lambda: [],
    "fastai's": lambda: [ActivationStats()],
    "fastai's, histograms": lambda: [ActivationStats(with_hist=True)],
    'ours': lambda: [ActivationStatsRecorder()],
    'ours, histograms': lambda: [ActivationStatsRecorder(with_hist=True)],
}


def small_mlp(depth=20, width=50):
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


MODELS = {  # name: builder, shape of the batch, batches in a turn
    'xresnet18, 64 × 64, batch 64': (lambda: xresnet18(n_out=10), (64, 3, 64, 64), 2),
    'MLP of 21 layers, width 50, batch 64': (small_mlp, (64, 50), 100),
}


def learner(name, callbacks):
    "A Learner whose epoch is one turn: the same batch, again and again."
    build, shape, n = MODELS[name]
    torch.manual_seed(0)
    batches = [(torch.randn(shape), torch.randint(10, shape[:1]))] * n
    return Learner(DataLoaders(batches, [], device=torch.device('cpu')), build(), loss_func=nn.functional.cross_entropy,
                   opt_func=SGD, lr=1e-3, cbs=callbacks).remove_cb(ProgressCallback)


def seconds(learn):
    started = time.perf_counter()
    with learn.no_logging(), learn.no_mbar(): learn._do_epoch_train()
    return time.perf_counter() - started


class Turns:
    "Learners that train in turns, one epoch each, so that whatever else the machine does hits all alike."

    def __init__(self, name):
        self.learners = {kind: learner(name, make()) for kind, make in CALLBACKS.items()}
        self.ratios = {kind: [] for kind in CALLBACKS}

    def round(self):
        "One turn of each, beside the mean of two without a callback, one before all and one behind."
        took = {kind: timed_fit(learn) for kind, learn in self.learners.items()}
        bare = (took['nothing'] + timed_fit(self.learners['nothing'])) / 2
        for kind, t in took.items(): self.ratios[kind].append(t / bare)

    def medians(self): return {kind: median(ratios) for kind, ratios in self.ratios.items()}


def timed_fit(learn):
    with learn.no_logging(), learn.no_mbar():
        started = time.perf_counter()
        learn.fit(1)
        return time.perf_counter() - started
