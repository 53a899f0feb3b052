"""Does it train, and what helps? Some 300 networks on Fashion-MNIST, each with several initialisations.

    python nbs/study.py            # the short form: some 40 minutes on two cores
    python nbs/study.py --full     # more seeds and learning rates, and 10,000 layers

Each run initialises a network on 256 images, measures it there, trains it for one epoch of `fit_one_cycle` with Adam on
8,000 images of 14x14, and counts its right answers on the 10,000 validation images. Results go to `nbs/study.csv`, one
line a run; runs that are there already are not made again, so that an interrupted study goes on where it was. Tables and
figures are made from that file by `study_results.py` and `study_figures.py`.
"""

import argparse
import csv
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass, fields
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import fastai.callback.schedule  # noqa: F401  (`fit_one_cycle`)
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from fastprogress.fastprogress import progress_bar
from study_networks import NETS
from torch import nn

from fastai_lsuv import lsuv_
from fastai_lsuv.demo import ACTIVATIONS, fashion_dls
from fastai_lsuv.init import critical_std, delta_orthogonal_, looks_linear_

CSV = Path(__file__).parent / "study.csv"
MEASURED = ["n_layers", "has_norms", "std", "signal", "spread", "left", "least_left", "grad", "growth", "verdict"]
COLUMNS = [*MEASURED, "taken", "accuracy", "seconds"]

# --- initialisations ------------------------------------------------------------------------------------------------

CLASSICAL = {"He": partial(nn.init.kaiming_normal_, nonlinearity="relu"), "orthogonal": nn.init.orthogonal_}
LSUV = {
    "LSUV": {},
    "LSUV orthogonal": {"init": nn.init.orthogonal_, "mean": None},  # the paper's
    "LSUV delta-orthogonal": {"init": delta_orthogonal_},
    "LSUV mirrored": {"init": looks_linear_},  # and std=critical_std(act, depth)
    "LSUV residual": {"residual": True},
    "LSUV auto": {"init": "auto"},
}
PLAIN = ["default", *CLASSICAL, *(name for name in LSUV if name != "LSUV residual")]
SHORTCUTS = ["default", "LSUV", "LSUV residual", "LSUV auto"]
NORMS = ["default", "LSUV", "LSUV auto"]


@dataclass(frozen=True)
class Run:
    net: str
    act: str
    depth: int  # layers with weights; blocks of a transformer
    width: int
    init: str
    lr: float
    seed: int


def initialised(run: Run) -> tuple[nn.Module, str]:
    "The run's network before training, and what `init=\"auto\"` says of its choice."
    set_seed(run.seed)
    model = NETS[run.net](run.act, run.depth, run.width)
    if run.init in CLASSICAL:
        for m in model.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                CLASSICAL[run.init](m.weight)
                nn.init.zeros_(m.bias)
    if run.init in LSUV:
        options = dict(LSUV[run.init])
        if run.init == "LSUV mirrored":
            options["std"] = critical_std(ACTIVATIONS[run.act](), run.depth)
        return model, lsuv_(model, sample(), **options).init
    return model, ""


# --- one run --------------------------------------------------------------------------------------------------------


@cache
def data() -> DataLoaders:
    return fashion_dls(size=14, n_train=8000, bs=64, val_bs=1000)


def sample() -> torch.Tensor:
    "256 training images."
    return data().train_ds[:256][0]


def measured(model: nn.Module) -> dict[str, object]:
    """What the report says of a network as it stands, as `MEASURED`.

    Standard deviation, signal and spread are those of the last hidden layer; `left` is the product of signal and spread
    there or at the head, whichever is more, and `least_left` the least of the hidden layers. `grad` is the elasticity of
    the first layer, and `growth` that over what a linear network with as many values there has.
    """
    report = lsuv_(model, sample(), mean=None, std=None)
    rows = report.to_frame()
    left, hidden = rows.signal_after * rows.spread_after.fillna(1), rows.iloc[:-1]
    norms = any("Norm" in type(m).__name__ for m in model.modules())
    values = [len(rows), norms, *hidden.iloc[-1][["std_after", "signal_after", "spread_after"]]]
    values += [left.iloc[-2:].max(), left.iloc[:-1].min(), rows.grad_after.iloc[0]]
    values += [rows.grad_after.iloc[0] / (n_values(model) / 10) ** 0.5, report.verdict]
    return dict(zip(MEASURED, values, strict=True))


def n_values(model: nn.Module) -> int:
    "Of an image, at the output of the first layer."
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    sizes: list[int] = []
    handle = first.register_forward_hook(lambda m, args, out: sizes.append(out.numel()))
    with torch.no_grad():
        model.eval()(sample()[:1])
    handle.remove()
    model.train()
    return sizes[0]


def train(run: Run) -> dict[str, object]:
    "What `COLUMNS` hold. Seconds are those of the processor."
    start = time.process_time()
    model, taken = initialised(run)
    found = measured(model) | {"taken": taken}
    set_seed(run.seed)
    adam = partial(OptimWrapper, opt=partial(torch.optim.Adam, fused=True))
    learn = Learner(data(), model, opt_func=adam, metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, run.lr)
    seconds = round(time.process_time() - start, 1)
    return found | {"accuracy": round(learn.recorder.values[-1][-1], 4), "seconds": seconds}


def settle() -> None:
    "A process of the study: one thread, and no word on what loss and accuracy show anyway."
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


# --- all runs -------------------------------------------------------------------------------------------------------

BLOCKS = [  # network, activations, depths, width, initialisations, seeds
    ("plain CNN", [*ACTIVATIONS], [5, 17, 50, 100], 16, PLAIN, 1),
    ("plain CNN", [*ACTIVATIONS], [17], 16, PLAIN, 3),
    ("plain CNN", ["relu", "tanh"], [5, 50, 100], 16, ["default", "LSUV", "LSUV mirrored", "LSUV auto"], 3),
    ("plain CNN", ["relu", "tanh", "sigmoid"], [17, 50], 32, ["default", "LSUV", "LSUV mirrored", "LSUV auto"], 1),
    ("plain CNN", ["relu", "tanh"], [200], 16, ["LSUV", "LSUV mirrored", "LSUV auto"], 1),
    ("MLP", ["relu", "tanh", "sigmoid"], [5, 17, 50, 100], 64, PLAIN, 1),
    ("CNN with batch norm", ["relu", "tanh"], [17, 50, 100], 16, NORMS, 1),
    ("MLP with layer norm", ["relu", "tanh"], [17, 50, 100], 64, NORMS, 1),
    ("residual CNN", ["relu"], [17, 49, 101], 16, SHORTCUTS, 3),
    ("xresnet", ["relu"], [20], 16, SHORTCUTS, 3),
    ("xresnet, no norm in blocks", ["relu"], [20], 16, SHORTCUTS, 3),
    ("ConvNeXt", ["gelu"], [6], 24, SHORTCUTS, 3),
    ("ViT", ["gelu"], [2], 32, SHORTCUTS, 3),
]
DEEPEST = ("plain CNN", ["relu", "tanh"], [1000, 10_000], 16, ["LSUV auto"], 1)


def rates(depth: int, full: bool) -> list[float]:
    "Learning rates: the deeper a network, the lower, for so many small steps add up."
    if depth >= 1000:
        return [0.1 / depth]
    lrs = [1e-3, 3e-3] if depth < 30 else [3e-4, 1e-3]
    return [1e-4, 3e-4, 1e-3, 3e-3, 1e-2] if full else lrs


def runs(full: bool = False) -> Iterator[Run]:
    "All runs, those of the first seed first, so that an unfinished study has something to say about everything."
    net, acts, depths, width, inits, seeds = DEEPEST
    blocks = [*BLOCKS, (net, acts, depths if full else depths[:1], width, inits, seeds)]
    found: dict[Run, None] = {}
    for seed, (net, acts, depths, width, inits, seeds) in product(range(5), blocks):
        if seed < (5 if full and seeds > 1 else seeds):
            for depth, act, init in product(depths, acts, inits):
                found |= {Run(net, act, depth, width, init, lr, seed): None for lr in rates(depth, full)}
    yield from found


def read() -> pd.DataFrame:
    "What has been run."
    columns = [f.name for f in fields(Run)] + COLUMNS
    return pd.read_csv(CSV) if CSV.exists() else pd.DataFrame(columns=columns)


def remaining(full: bool) -> list[Run]:
    done = {Run(*row) for row in read()[[f.name for f in fields(Run)]].itertuples(index=False)}
    return [run for run in runs(full) if run not in done]


def estimate(todo: list[Run]) -> float:
    "Seconds of one core: as measured in runs of the same network, else in proportion to its depth."
    known = read().groupby(["net", "depth", "width"]).seconds.median().to_dict()
    return sum(known.get((run.net, run.depth, run.width), 1 + 0.06 * run.depth) for run in todo)


def study(full: bool = False, workers: int = 2) -> None:
    "Make all runs that are not there yet."
    todo = remaining(full)
    print(f"{len(todo)} runs to make, about {estimate(todo) / 60 / workers:.0f} minutes with {workers} processes")
    new = not CSV.exists()
    with CSV.open("a", newline="") as file, ProcessPoolExecutor(workers, get_context("spawn"), settle) as pool:
        out = csv.writer(file)
        if new:
            out.writerow([*(f.name for f in fields(Run)), *COLUMNS])
        futures = {pool.submit(train, run): run for run in todo}
        for done in progress_bar(as_completed(futures), total=len(todo)):
            out.writerow([*astuple(futures[done]), *(done.result()[column] for column in COLUMNS)])
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more seeds and learning rates, and 10,000 layers")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default 2)")
    args = parser.parse_args()
    study(args.full, args.workers)


if __name__ == "__main__":
    main()
