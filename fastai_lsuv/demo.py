"""A deep network on real images that fails to train with PyTorch's default weights and trains after LSUV."""

from __future__ import annotations

import argparse
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import fastai.callback.progress  # the progress bars
import fastai.callback.schedule  # noqa: F401  (`fit_one_cycle`)
import pandas as pd
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import no_random
from torch import nn

from fastai_lsuv.callback import LSUVCallback
from fastai_lsuv.data import digits_dls, fashion_dls
from fastai_lsuv.plots.curves import plot_runs
from fastai_lsuv.plots.layers import plot_demo
from fastai_lsuv.recorder import ActivationStatsRecorder

__all__ = ["digits_dls", "fashion_dls", "main", "plain_cnn"]

ACTIVATIONS = MappingProxyType(
    {
        "elu": nn.ELU,
        "gelu": nn.GELU,
        "leaky_relu": nn.LeakyReLU,
        "relu": nn.ReLU,
        "sigmoid": nn.Sigmoid,
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
    }
)
RUNS = ("default weights", "LSUV")


def plain_cnn(
    depth: int = 17,  # layers with weights: depth - 1 convolutions and a linear head; at least 3
    width: int = 24,  # channels of each convolution
    act: Callable[[], nn.Module] = nn.ReLU,  # makes the activation after each convolution
    n_out: int = 10,  # number of classes
) -> nn.Sequential:  # with layers `conv1`, `act1`, `conv2`, …, `head`
    """Return a plain deep CNN for 8x8 images with one channel: no normalisation, no shortcuts, default weights.

    Two of the 3x3 convolutions, one third and two thirds of the way down, halve the image: 8x8, 4x4, 2x2. The network
    is thin and deep, and as hard to train from scratch as the FitNets of the LSUV paper (Mishkin & Matas 2016,
    arXiv:1511.06422).

    Raises:
        ValueError: `depth` is below 3.

    Example:
        >>> import torch
        >>> from fastai_lsuv.demo import plain_cnn
        >>> plain_cnn(depth=5)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if depth < 3:
        raise ValueError(f"depth={depth}: a plain_cnn has at least 3 layers, two convolutions and the head")
    n_convs = depth - 1
    halving = (n_convs // 3, 2 * n_convs // 3)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(n_convs):
        stride = 2 if i in halving else 1
        layers[f"conv{i + 1}"] = nn.Conv2d(width if i else 1, width, kernel_size=3, stride=stride, padding=1)
        layers[f"act{i + 1}"] = act()
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(width * 2 * 2, n_out)
    return nn.Sequential(layers)


def main(
    argv: Sequence[str] | None = None,  # command-line arguments; `None`: those of the process
) -> None:
    """Train the same network twice, from default weights and with `LSUVCallback`, and show what differs.

    A bad argument ends with one line on stderr and exit code 2, before anything is trained.
    """
    args = _parser().parse_args(argv)
    learners, recorders = {}, {}
    for run, cbs in zip(RUNS, ([], [LSUVCallback(verbose=False)]), strict=True):
        print(f"{run}: {args.depth} layers, {args.act}, fit_one_cycle({args.epochs}, {args.lr:g})")
        recorders[run] = ActivationStatsRecorder()
        learners[run] = _train(args, [*cbs, recorders[run]])
        print()

    before, after = RUNS
    report = learners[after].lsuv_report.to_frame().set_index("name")
    stds = report[["std_before", "std_after"]].set_axis(RUNS, axis=1)
    accuracies = pd.DataFrame({run: _accuracies(learn) for run, learn in learners.items()})
    accuracies.index.name = "epoch"  # counted from 0, as in fastai's table
    activations = args.out.with_stem(f"{args.out.stem}_activations")

    plot_demo(stds, accuracies, chance=1 / learners[before].dls.c).savefig(args.out, dpi=120)
    plot_runs({run: recorder.to_frame() for run, recorder in recorders.items()}).savefig(activations, dpi=100)
    print(learners[after].lsuv_report)
    print(f"\nactivations over the training\n{_beside(recorders)}")
    print(f"\nvalidation accuracy\n{accuracies.to_string(float_format='{:.3f}'.format)}")
    print(f"\nfigures: {args.out}, {activations}")


def _beside(recorders: Mapping[str, ActivationStatsRecorder]) -> str:
    """The summaries of several runs as one table."""
    columns = ["first_std", "last_std", "max_near_zero", "verdict"]
    table = pd.concat({run: recorder.summary()[columns] for run, recorder in recorders.items()}, axis=1)
    return table.rename_axis(index=None).to_string(float_format="{:.3f}".format)


def _train(args: argparse.Namespace, cbs: list[Callback]) -> Learner:
    with no_random(args.seed):
        model = plain_cnn(args.depth, args.width, ACTIVATIONS[args.act])
        learn = Learner(digits_dls(seed=args.seed), model, metrics=accuracy, cbs=cbs)
        if sys.stdout.isatty():
            learn.fit_one_cycle(args.epochs, args.lr)
        else:  # fastprogress would fill a file or a pipe with its carriage returns
            learn.logger = lambda row: print("  ".join(_named(learn, row)))
            with learn.no_bar():
                learn.fit_one_cycle(args.epochs, args.lr)
    return learn


def _named(learn: Learner, row: Sequence[Any]) -> list[str]:
    values = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in row)
    return [f"{name} {value}" for name, value in zip(learn.recorder.metric_names, values, strict=True)]


def _accuracies(learn: Learner) -> list[float]:
    column = list(learn.recorder.metric_names[1:]).index("accuracy")  # `values` leave out the epoch's number
    return [row[column] for row in learn.recorder.values]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; the usage is there for who asks for `--help`."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fastai_lsuv",
        description="Train a plain deep CNN on scikit-learn's digits: with PyTorch's default weights, then with LSUV.",
        epilog="It runs on one thread, on which so small a network is fastest; OMP_NUM_THREADS sets another number.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--depth", type=_whole_number(3, 1000), default=17, help="layers with weights, the head included")
    add("--width", type=_whole_number(1, 1024), default=24, help="channels of each convolution")
    add("--act", choices=ACTIVATIONS, default="relu", help="activation after each convolution")
    add("--epochs", type=_whole_number(1, 1000), default=5, help="length of each of the two trainings")
    add("--lr", type=_learning_rate, default=1e-3, help="highest learning rate of the one-cycle schedule")
    add("--seed", type=_whole_number(0, 2**32 - 1), default=42, help="of the weights, the split and the batches")
    add(
        "--out",
        type=_png,
        default="lsuv_digits.png",
        help="the figure to write, and beside it one of the activations",
    )
    return parser


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _learning_rate(text: str) -> float:
    try:
        lr = float(text)
    except ValueError:
        lr = math.nan
    if not 0 < lr < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return lr


def _png(text: str) -> Path:
    """A path that can be written; better now than after the training."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path
