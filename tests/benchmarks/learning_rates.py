"""Which updates go with which learning rate: eleven networks at fifteen. `python learning_rates.py FILE.csv`

A row of the file is one training; those that are in it are not run again.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.basics import SGD, Adam, DataLoaders, Learner, accuracy, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.data.core import TfmdDL
from sklearn.datasets import load_digits
from torch import nn

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback

RATES = np.logspace(-7, 0, 15)
EPOCHS, BATCH = 5, 64


def mlp(act, depth=4, width=64):
    layers = [m for i in range(depth) for m in (nn.Linear(width if i else 64, width), act())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def cnn(act=nn.ReLU, norm=False, depth=5, width=16):
    layers = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 1, width, 3, 2 if i in (1, 3) else 1, 1)]
        layers += [nn.BatchNorm2d(width)] * norm + [act()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4, 10))


class Residual(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm_a, self.norm_b, self.act = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x):
        return self.act(x + self.norm_b(self.b(self.act(self.norm_a(self.a(x))))))


def resnet():
    body = nn.Conv2d(1, 16, 3, padding=1), *(Residual() for _ in range(3))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


class OverRows(nn.Module):
    "Reads an image row by row."

    def __init__(self, body, width=32):
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(8, width), body, nn.Linear(width, 10)

    def forward(self, x):
        y = self.body(self.embed(x.squeeze(1)))
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


def transformer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
    return OverRows(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def timm_net(name, **kwargs):
    import timm

    return timm.create_model(name, in_chans=1, num_classes=10, **kwargs)


convnext = partial(timm_net, "convnext_atto", depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), patch_size=1)
vit = partial(timm_net, "vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=48, depth=3, num_heads=3)

NETWORKS = {  # how it is made, the optimizer, whether LSUV is used
    "mlp, relu": (partial(mlp, nn.ReLU), Adam, False),
    "mlp, tanh, sgd": (partial(mlp, nn.Tanh), SGD, False),
    "mlp, gelu, lsuv": (partial(mlp, nn.GELU, 6), Adam, True),
    "cnn, relu, lsuv": (cnn, Adam, True),
    "cnn, batch norm": (partial(cnn, norm=True), Adam, False),
    "cnn, batch norm, sgd": (partial(cnn, norm=True), partial(SGD, mom=0.9), False),
    "resnet": (resnet, Adam, False),
    "gru": (lambda: OverRows(nn.GRU(32, 32, batch_first=True)), Adam, False),
    "transformer": (transformer, Adam, False),
    "convnext": (convnext, Adam, False),
    "vit": (vit, Adam, False),
}


def loaders():
    x, y = load_digits(return_X_y=True)
    x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) - 4.88) / 6.02
    items = list(zip(x, torch.tensor(y)))
    return DataLoaders(TfmdDL(items[:1400], BATCH, shuffle=True, drop_last=True), TfmdDL(items[1400:], 400))


def trained(name, rate):
    set_seed(0)
    make, opt_func, lsuv = NETWORKS[name]
    recorder = ActivationStatsRecorder(verbose=False)
    cbs = [recorder, *[LSUVCallback(verbose=False)] * lsuv]
    options = dict(loss_func=nn.functional.cross_entropy, metrics=accuracy, opt_func=opt_func)
    learn = Learner(loaders(), make(), cbs=cbs, **options)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(), np.errstate(all="ignore"):
        learn.fit_one_cycle(EPOCHS, rate)
    loss, share = learn.recorder.values[-1][-2:]
    facts = {layer: x for layer, x in recorder._history.facts().items() if x.has_matrix and x.n_updates}
    quantiles = np.nanquantile([x.mean_update for x in facts.values()], [0, 0.5, 1])
    steps = recorder.to_frame().pivot_table(index="step", columns="layer", values="update")[[*facts]]
    of_layers = steps.replace(np.inf, np.nan).agg(["mean", "median", "max"], axis=0)
    return [name, rate, share, loss, *quantiles, *of_layers.median(axis=1), *of_layers.max(axis=1)]


SUMS = ["mean", "middle", "most"]  # over the steps of a layer
OF_LAYERS = [f"{which}_{sum_}" for which in ("median", "highest") for sum_ in SUMS]
COLUMNS = ["network", "rate", "accuracy", "loss", "lowest", "median", "highest", *OF_LAYERS]


def main(path):
    torch.set_num_threads(1)
    if not path.exists():
        pd.DataFrame(columns=COLUMNS).to_csv(path, index=False)
    for rate in sorted(RATES, key=lambda rate: abs(np.log10(rate) + 1.5)):
        for name in NETWORKS:
            done = pd.read_csv(path)
            if not ((done.network == name) & np.isclose(done.rate, rate, rtol=1e-3)).any():
                row = [f"{v:.4g}" if isinstance(v, float) else v for v in trained(name, float(rate))]
                pd.DataFrame([row], columns=COLUMNS).to_csv(path, mode="a", header=False, index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
