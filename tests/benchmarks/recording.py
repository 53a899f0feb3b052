"""What recording activations costs: training with no callback, with fastai's `ActivationStats`, with ours, in turns."""

from __future__ import annotations

import gc
import os
import time
from functools import partial
from pathlib import Path
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
    "nothing": list,
    "fastai's `ActivationStats`": lambda: [
        ActivationStats(include_paramless=True)
    ],  # activations as well, as ours does
    "the same, histograms": lambda: [ActivationStats(include_paramless=True, with_hist=True)],
    "`ActivationStatsRecorder`": lambda: [ActivationStatsRecorder()],
    "`ActivationStatsRecorder`, histograms": lambda: [ActivationStatsRecorder(with_hist=True)],
}


def small_mlp(depth, width=50):
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


MODELS = {  # name: builder, shape of the batch, batches in a turn
    "xresnet18, 64 × 3 × 64 × 64": (partial(xresnet18, n_out=10), (64, 3, 64, 64), 2),
    "MLP of 21 layers, 64 × 50": (partial(small_mlp, 20), (64, 50), 100),
}


def learner(build, shape, n, callbacks):
    "A Learner whose epoch is one turn: the same batch `n` times."
    torch.manual_seed(0)
    batches = [(torch.randn(shape), torch.randint(10, shape[:1]))] * n
    learn = Learner(
        DataLoaders(batches, [], device=torch.device("cpu")),
        build(),
        loss_func=nn.functional.cross_entropy,
        opt_func=SGD,
        lr=1e-3,
        cbs=callbacks,
    )
    return learn.remove_cb(ProgressCallback)


def seconds(learn):
    with learn.no_logging():
        started = time.perf_counter()
        learn.fit(1)
        return time.perf_counter() - started


class Turns:
    "Learners that train in turns, one epoch each, so that whatever else the machine does hits all alike."

    def __init__(self, name):
        self.learners = {kind: learner(*MODELS[name], make()) for kind, make in CALLBACKS.items()}
        self.rows = []
        for learn in self.learners.values():
            seconds(learn)  # warms up

    def round(self):
        "One turn of each, each with one of nothing before and behind it."
        row, before = {}, seconds(self.learners["nothing"])
        for kind, learn in self.learners.items():
            took = seconds(learn)
            behind = seconds(self.learners["nothing"])
            row[kind] = 2 * took / (before + behind)
            before = behind
        self.rows.append(row)

    def rounds_in(self, budget):
        "How many rounds, five at least, a time in seconds is enough for."
        started = time.perf_counter()
        self.round()
        return max(4, int(budget / (time.perf_counter() - started)))

    def ratio(self, kind):
        return median(row[kind] for row in self.rows)


def resident():
    "Bytes of memory that this process has, as Linux counts it."
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(steps=20_000, every=1):
    "Bytes that this process grew by over the second half of so many steps of 50 layers with histograms."
    recorder = ActivationStatsRecorder(with_hist=True, every=every)
    learn = learner(partial(small_mlp, 25, width=8), (16, 8), steps // 2, [recorder])
    assert seconds(learn) and len(recorder.layer_names) == 51
    half = resident()
    seconds(learn)
    return resident() - half, len(recorder.to_frame()) // 51
