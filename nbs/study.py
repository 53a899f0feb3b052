"""Does LSUV help, and when? Plain, normalised and very deep networks on scikit-learn's digits.

    python nbs/study.py            # the short form
    python nbs/study.py --full     # more learning rates, seeds and depths, and 1,000 layers

Each run is a fastai Learner's `fit_one_cycle` with Adam. Results go to `nbs/study.csv`, one line a run; runs that are
there already are not made again, so that an interrupted study goes on where it was. Figures go beside it.
"""

import argparse
import csv
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import fastai.callback.schedule  # `fit_one_cycle`
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.models.xresnet import XResNet
from fastai.layers import ResBlock
from fastprogress.fastprogress import progress_bar
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer

from fastai_lsuv import LSUVCallback
from fastai_lsuv.demo import digits_dls
from fastai_lsuv.init import critical_std, delta_orthogonal_, looks_linear_

HERE = Path(__file__).parent
CSV = HERE / "study.csv"
ENOUGH = 0.8  # the accuracy to which steps are counted, over the last ten training batches

# --- networks -----------------------------------------------------------------------------------------------------------


class Maxout(nn.Module):
    "The larger of each two neighbouring channels."
    def forward(self, x): return x.unflatten(1, (-1, 2)).amax(2)


class ThreeChannels(nn.Module):
    "Grey images for networks that want colour."
    def forward(self, x): return x.expand(-1, 3, -1, -1)


ACTS = {"maxout": Maxout(), "relu": nn.ReLU(), "leaky 1/3": nn.LeakyReLU(1 / 3), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid()}


def thin_cnn(act, depth, width):
    "After FitNets: depth - 1 thin 3x3 convolutions, two of which halve the image, and a linear head; no norms, no shortcuts."
    pieces = 2 if act == "maxout" else 1
    blocks, n_in = [], 1
    for i in range(depth - 1):
        stride = 2 if i in ((depth - 1) // 3, 2 * (depth - 1) // 3) else 1
        blocks.append(nn.Sequential(nn.Conv2d(n_in, width * pieces, 3, stride=stride, padding=1), ACTS[act]))
        n_in = width
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width * 4, 10))


class Residual(nn.Module):
    "x + f(x), and nothing that holds either."
    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
    def forward(self, x): return x + self.branch(x)


def residual_cnn(n, width):
    "A convolution, n residual blocks of two, a linear head; no norms."
    return nn.Sequential(nn.Conv2d(1, width, 3, stride=2, padding=1), *(Residual(width) for _ in range(n)), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 10))


NETS = {
    "xresnet": lambda: XResNet(ResBlock, 1, [1, 1, 1, 1], c_in=1, n_out=10, stem_szs=(8, 16, 64), widen=.25),
    "xresnet, no norm in blocks": lambda: XResNet(partial(ResBlock, norm_type=None), 1, [3, 3, 3, 3], c_in=1, n_out=10, stem_szs=(8, 16, 64), widen=.25),
    "100 residual blocks, no norm": lambda: residual_cnn(100, 8),
    "ConvNeXt": lambda: nn.Sequential(ThreeChannels(), ConvNeXt([CNBlockConfig(24, 48, 3), CNBlockConfig(48, None, 3)], num_classes=10)),
    "ViT": lambda: nn.Sequential(ThreeChannels(), VisionTransformer(8, 2, 4, 4, 32, 64, num_classes=10)),
}

# --- initialisations --------------------------------------------------------------------------------------------------------

CLASSICAL = {"Xavier": nn.init.xavier_uniform_, "He": partial(nn.init.kaiming_normal_, nonlinearity="relu"), "orthonormal": nn.init.orthogonal_}
LSUV = {
    "LSUV (paper)": dict(init=nn.init.orthogonal_, mean=None),
    "LSUV": dict(),
    "LSUV per channel": dict(per_channel=True),
    "LSUV behind act.": dict(modules=nn.Module.children),  # a convolution and its activation, as one
    "LSUV delta-orthogonal": dict(init=delta_orthogonal_),
    "LSUV mirrored": dict(init=looks_linear_),  # and std=critical_std(act, depth)
}
INITS = ["default", *CLASSICAL, *LSUV]
RESIDUAL = {"LSUV residual": dict(residual=True)}
STDS = {f"LSUV mirrored, std {std:g}": dict(init=looks_linear_, std=std) for std in [.05, .1, .2, .5, 1, 2]}


def initialise(model, run):
    "Weights for the classical ones, a callback for the others."
    if run.init in CLASSICAL:
        for m in model.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                CLASSICAL[run.init](m.weight)
                if m.bias is not None: nn.init.zeros_(m.bias)
    options = (LSUV | RESIDUAL | STDS).get(run.init)
    if run.init == "LSUV mirrored" and run.net in ACTS and run.net != "maxout":  # of which a mirrored pair is linear
        options = options | dict(std=critical_std(ACTS[run.net], run.depth))
    return [LSUVCallback(verbose=False, **options)] if options is not None else []

# --- one run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    part: str
    net: str  # an activation, for thin CNNs
    depth: int  # of thin CNNs
    width: int
    init: str
    lr: float
    epochs: int
    seed: int


class StepsTo(Callback):
    "The first step at which ten training batches in a row were right often enough."
    def before_fit(self): self.seen, self.steps = [], None
    def after_pred(self): self.seen += [accuracy(self.pred, self.y).item()] if self.training else []
    def after_batch(self):
        if self.steps is None and np.mean(self.seen[-10:]) >= ENOUGH and len(self.seen) >= 10: self.steps = len(self.seen)


@cache
def batches():
    "The digits as two tensors: at 8x8, collating images one by one takes longer than a training step."
    def loader(items, bs, sampler):
        data = TensorDataset(*map(torch.stack, zip(*items)))
        return DataLoader(data, sampler=BatchSampler(sampler(data), bs, drop_last=False), batch_size=None)
    dls = digits_dls()
    return DataLoaders(loader(dls.train_ds, 64, RandomSampler), loader(dls.valid_ds, 360, SequentialSampler))


def train(run):
    "The run's validation accuracy, steps and seconds."
    dls, start = batches(), time.perf_counter()
    set_seed(run.seed)
    model = NETS[run.net]() if run.net in NETS else thin_cnn(run.net, run.depth, run.width)
    count = StepsTo()
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy, cbs=[count, *initialise(model, run)])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(run.epochs, run.lr)
    return dict(accuracy=learn.recorder.values[-1][-1], steps=count.steps, seconds=round(time.perf_counter() - start, 1))


def settle():
    "A process of the study: one thread, and no word on what loss and accuracy show anyway."
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

# --- all runs ---------------------------------------------------------------------------------------------------------------


def runs(full=False):
    "All runs, those of the first seed first, so that an unfinished study has something to say about everything."
    for seed in range(5 if full else 3):
        yield from (Run("deep", a, d, w, "LSUV mirrored", lr, e, seed) for a, d, w, lr, e in deep(full))
        lrs = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2] if full else [1e-3, 3e-3, 1e-2]
        yield from (Run("table", a, 17, 16, i, lr, 5, seed) for i, lr, a in product(INITS, lrs, ACTS))
        inits = [*(INITS if full else ["default", "LSUV"]), *RESIDUAL]
        yield from (Run("norms", n, 0, 0, i, lr, 5, seed) for i, lr, n in product(inits, lrs, NETS))
        acts, inits = (ACTS, INITS) if full else (["relu", "tanh"], ["default", "LSUV (paper)", "LSUV", "LSUV mirrored"])
        yield from (Run("depth", a, d, 16, i, 1e-3, 5, seed) for d, a, i in product([5, 50, 100], acts, inits))
        yield from (Run("std", "tanh", 100, 16, i, lr, 5, seed) for i, lr in product(["LSUV mirrored", *STDS], [3e-4, 1e-3] if full else [1e-3]))
        if full and seed == 0: yield Run("deep", "relu", 10_000, 16, "LSUV mirrored", 1e-5, 2, seed)


def deep(full):
    "The one setting for depth, `LSUVCallback(init=looks_linear_, std=critical_std(act, depth))`: layers, width, learning rate, epochs."
    yield from [("sigmoid", 17, 24, 1e-2, 10), ("relu", 100, 24, 3e-4, 5), ("relu", 100, 25, 3e-4, 5), ("leaky 1/3", 100, 24, 3e-4, 5), ("tanh", 100, 24, 3e-4, 5)]
    if full: yield from [("relu", 1000, 16, 1e-4, 5), ("tanh", 1000, 16, 1e-4, 5)]


def read():
    "What has been run."
    columns = [f.name for f in fields(Run)] + ["accuracy", "steps", "seconds"]
    return pd.read_csv(CSV) if CSV.exists() else pd.DataFrame(columns=columns)


def remaining(full):
    done = {Run(*row) for row in read()[[f.name for f in fields(Run)]].itertuples(index=False)}
    return [run for run in runs(full) if run not in done]


def estimate(todo):
    "Seconds of one core: as measured in runs of the same network, else in proportion to its depth."
    known = read().assign(each=lambda df: df.seconds / df.epochs).groupby(["net", "depth", "width"]).each.median().to_dict()
    return sum(run.epochs * known.get((run.net, run.depth, run.width), .02 * (run.depth or 20)) for run in todo)


def study(full=False, workers=2):
    "Make all runs that are not there yet."
    todo = remaining(full)
    print(f"{len(todo)} runs to make, about {estimate(todo) / 60 / workers:.0f} minutes with {workers} processes "
          f"(all that the full study lacks: {estimate(remaining(True)) / 60 / workers:.0f} minutes)")
    new = not CSV.exists()
    with CSV.open("a", newline="") as file, ProcessPoolExecutor(workers, get_context("spawn"), settle) as pool:
        out = csv.writer(file)
        if new: out.writerow([*(f.name for f in fields(Run)), "accuracy", "steps", "seconds"])
        futures = {pool.submit(train, run): run for run in todo}
        for done in progress_bar(as_completed(futures), total=len(todo)):
            out.writerow([*astuple(futures[done]), *done.result().values()])
            file.flush()

# --- what comes out ---------------------------------------------------------------------------------------------------------


def tidy(df):
    "In the order of the study, for tables."
    orders = dict(net=[*ACTS, *NETS], init=[*INITS, *RESIDUAL, *STDS])
    return df.assign(**{c: pd.Categorical(df[c].astype(str), [v for v in o if v in set(df[c])]) for c, o in orders.items()})


def by_lr(df): return tidy(df).groupby(["net", "init", "lr"], observed=True)


def best(df):
    "Each network and initialisation at the learning rate with the best median: rate, median, lowest and highest accuracy, median of steps."
    found = by_lr(df).agg(median=("accuracy", "median"), low=("accuracy", "min"), high=("accuracy", "max"), runs=("accuracy", "size"),
                          steps=("steps", lambda s: s.fillna(np.inf).median())).reset_index()
    return found.loc[found.groupby(["net", "init"], observed=True)["median"].idxmax()].set_index(["net", "init"])


def area(df):
    "Mean accuracy over the learning rates (the area under its curve over log lr, as a share): robustness."
    medians = by_lr(df).accuracy.median().unstack("lr")
    x = np.log(medians.columns.to_numpy(float))
    return pd.Series(np.trapezoid(medians, x, axis=1) / (x[-1] - x[0]), medians.index)


def heatmap(ax, table, title):
    ax.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    ax.set(xticks=range(table.shape[1]), yticks=range(table.shape[0]), xticklabels=table.columns, yticklabels=table.index, title=title)
    for i, j in np.ndindex(*table.shape):
        value = table.iloc[i, j]
        ax.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", color="white" if value < .5 else "black")


def plot_table(df):
    "Two maps, initialisations by activations: accuracy at the best learning rate, and over all of them."
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    heatmap(axes[0], best(df)["median"].unstack("net"), "accuracy at the best learning rate")
    heatmap(axes[1], area(df).unstack("net"), "mean over the learning rates")
    return fig


COLORS = ["#D55E00", "#56B4E9", "#0072B2", "#009E73"]  # told apart by colour-blind eyes (Okabe & Ito)


def plot_depth(df):
    "Accuracy over depth at one learning rate, for each activation a panel."
    df = tidy(df[df.lr == 1e-3])
    nets = [n for n in ACTS if n in set(df.net)]
    fig, axes = plt.subplots(1, len(nets), figsize=(4.5 * len(nets), 3.2), sharey=True, squeeze=False, layout="constrained")
    for ax, net in zip(axes[0], nets):
        medians = df[df.net == net].groupby(["depth", "init"], observed=True).accuracy.median().unstack()
        medians.plot(ax=ax, style=["o:", "s--", "^-.", "D-"], color=COLORS, logx=True, title=net, legend=False)
        ax.set(xlabel="layers", ylabel="accuracy", xticks=sorted(df.depth.unique()), xticklabels=sorted(df.depth.unique()), ylim=(0, 1))
        ax.minorticks_off()
    axes[0, 0].legend(fontsize="small")
    return fig


def depth_runs(df):
    "The part on depth with the table's 17 layers among them."
    chosen = df[df.part == "depth"]
    return pd.concat([chosen, df[(df.part == "table") & df.net.isin(chosen.net) & df.init.isin(chosen.init)]])


def tables():
    "The site's three (docs/when_it_helps.md), as Markdown: plain networks, normalised ones, deep ones. Medians over the seeds; in brackets lowest and highest."
    df = tidy(read())
    plain = best(df[df.part == "table"])["median"].unstack("net")
    found = best(df[df.part == "norms"])
    others = spread(found).unstack("net").drop(index="LSUV (paper)", errors="ignore")
    groups = df[df.part == "deep"].groupby(["net", "depth", "width", "lr", "epochs"], observed=True)
    deeper = groups.accuracy.agg(median="median", low="min", high="max", runs="size").reset_index()
    deeper = deeper.assign(accuracy=spread(deeper), lr=deeper.lr.map("{:g}".format)).drop(columns=["median", "low", "high"]).set_index("net")
    return [markdown(plain.map(two_digits), "17 plain layers"), markdown(others, "accuracy"), markdown(deeper, "activation")]


def two_digits(x): return f"{x:.2f}".lstrip("0")


def spread(df): return df["median"].map("{:.3f}".format) + " (" + df.low.map("{:.3f}".format) + "–" + df.high.map("{:.3f}".format) + ")"


def markdown(table, corner):
    rows = [[corner, *table.columns], ["---"] * (table.shape[1] + 1), *([name, *row] for name, row in zip(table.index, table.to_numpy()))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def figures():
    df = read()
    plot_table(df[df.part == "table"]).savefig(HERE / "study_table.png", dpi=100)
    plot_depth(depth_runs(df)).savefig(HERE / "study_depth.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more learning rates, seeds and depths, and 1,000 layers")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default 2)")
    args = parser.parse_args()
    study(args.full, args.workers)
    figures()
    print(*tables(), sep="\n\n")


if __name__ == "__main__": main()
