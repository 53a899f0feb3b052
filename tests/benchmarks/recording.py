"""What recording activations costs: training with no callback, with fastai's `ActivationStats`, with ours, in turns."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
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
from measuring import seconds
from torch import nn

from fastai_lsuv import ActivationStatsRecorder

NOTHING, OURS = "nothing", "`ActivationStatsRecorder`"
HISTOGRAMS, GRADIENTS, AUTO = f"{OURS}, histograms", f"{OURS}, gradients", f'{OURS}, `every="auto"`'
FASTAI, FASTAI_HISTOGRAMS = "fastai's `ActivationStats`", "the same, histograms"

CALLBACKS = {  # makes the callbacks
    NOTHING: list,
    FASTAI: lambda: [ActivationStats(include_paramless=True)],  # activations as well, as ours does
    FASTAI_HISTOGRAMS: lambda: [ActivationStats(include_paramless=True, with_hist=True)],
    OURS: lambda: [ActivationStatsRecorder()],
    HISTOGRAMS: lambda: [ActivationStatsRecorder(with_hist=True)],
    GRADIENTS: lambda: [ActivationStatsRecorder(with_grad=True)],
    AUTO: lambda: [ActivationStatsRecorder(every="auto")],
}


@dataclass(frozen=True)
class Training:
    "A model, its batch, on a device, and what trains side by side."

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    steps: int  # in a turn
    without: tuple[str, ...] = ()  # what takes too long there, or too many steps
    device: str = "cpu"

    @property
    def kinds(self):
        return [kind for kind in CALLBACKS if kind not in self.without]


def small_mlp(depth, width=50):
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


XRESNET = partial(xresnet18, n_out=10), (64, 3, 64, 64)
MLP = partial(small_mlp, 20), (64, 50)
ENOUGH = 300  # steps, for "auto" to find out how often it can record

MODELS = {
    "xresnet18, 64 × 3 × 64 × 64": Training(*XRESNET, 2, without=(AUTO,)),
    "MLP of 21 layers, 64 × 50": Training(*MLP, ENOUGH),
}
ON_A_GPU = {
    name: Training(*model, 60, without=(FASTAI, FASTAI_HISTOGRAMS), device="cuda")
    for name, model in zip(MODELS, (XRESNET, MLP))
}


def learner(training, callbacks):
    "A Learner whose epoch is one turn: the same batch again and again."
    torch.manual_seed(0)
    x, y = torch.randn(training.shape), torch.randint(10, training.shape[:1])
    batches = [(x.to(training.device), y.to(training.device))] * training.steps
    learn = Learner(
        DataLoaders(batches, [], device=torch.device(training.device)),
        training.make(),
        loss_func=nn.functional.cross_entropy,
        opt_func=SGD,
        lr=1e-3,
        cbs=callbacks,
    )
    return learn.remove_cb(ProgressCallback)


def turn(learn):
    "Seconds of one."
    with learn.no_logging():
        return seconds(learn.fit, 1)


class Turns:
    "Learners that train in turns, one epoch each, so that whatever else the machine does hits all alike."

    def __init__(self, training):
        self.learners = {kind: learner(training, CALLBACKS[kind]()) for kind in training.kinds}
        self.rows = []
        for learn in self.learners.values():
            turn(learn)  # warms up

    def round(self):
        "One turn of each, each with one of nothing before and behind it."
        row, before = {}, turn(self.learners[NOTHING])
        for kind, learn in self.learners.items():
            took = turn(learn)
            behind = turn(self.learners[NOTHING])
            row[kind] = 2 * took / (before + behind)
            before = behind
        self.rows.append(row)

    def rounds_in(self, budget):
        "How many rounds, five at least, a time in seconds is enough for."
        return max(4, int(budget / seconds(self.round)))

    def ratio(self, kind):
        return median(row[kind] for row in self.rows)


def resident():
    "Bytes of memory that this process has, as Linux counts it."
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(steps=20_000, every=1):
    "Bytes that this process grew by over the second half of so many steps of 50 layers with histograms."
    recorder = ActivationStatsRecorder(with_hist=True, every=every)
    learn = learner(Training(partial(small_mlp, 25, width=8), (16, 8), steps // 2), [recorder])
    assert turn(learn) and len(recorder.layer_names) == 51
    half = resident()
    turn(learn)
    return resident() - half, len(recorder.to_frame()) // 51
