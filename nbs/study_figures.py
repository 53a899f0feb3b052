"""What the study found, as figures, from `study.csv`.

    python nbs/study_figures.py    # draws them, beside this file
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from study import CSV, PLAIN, read
from study_networks import ACTIVATIONS
from study_results import COMPARED, DEAD, FAILS, LOST, at_best_rate, deep, interval, networks, plain

from fastai_lsuv.plots.palette import INK, LOOKS
from fastai_lsuv.plots.style import finish, legend, mark_level, new_figure, scale_accuracy

CHANCE = 0.1


def plot_signal(found: pd.DataFrame) -> Figure:
    "Accuracy, as a share of the best of its cell, over the signal, coloured by the gradient."
    fig = new_figure(8, 4.8)
    ax = fig.subplots()
    grad, seen = found.growth.astype(float).clip(1e-4, 1e4), found.left.where(found["std"] > DEAD, 0).clip(1e-3)
    for norms, marker in ((False, "o"), (True, "D")):
        part = found[found.has_norms == norms]
        points = ax.scatter(
            seen[part.index], part.share, c=grad[part.index], norm=LogNorm(1e-4, 1e4), cmap="coolwarm", s=22,
            marker=marker, edgecolors=INK, linewidths=0.4,
        )  # fmt: skip
        ax.scatter([], [], marker=marker, color="white", edgecolors=INK, label=f"{'with' if norms else 'without'} norms")
    mark_level(ax, FAILS, "fails below")
    mark_level(ax, CHANCE * (found.share / found.accuracy).median(), "chance", dash=":")
    ax.axvline(LOST, color=INK, linewidth=1.0, linestyle="-.", zorder=1, label="signal lost to the left")
    ax.set(xscale="log", xlabel="signal × spread at the end, before training; at 0.001 what is less", ylim=(0, 1.05))
    ax.set_ylabel("accuracy after training,\nas a share of the best of its kind")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend(ax, columns=3)
    fig.colorbar(points, label="growth of the gradient", extend="both")
    healthy = found.verdict.str.startswith("healthy")
    finish(fig, f"{_trained(found[healthy])} networks called healthy train, {_trained(found[~healthy])} called otherwise")
    return fig


def _trained(found: pd.DataFrame) -> str:
    return f"{(~found.fails).sum()} of {len(found)}"


def heatmap(ax: Axes, values: pd.DataFrame, title: str) -> None:
    ax.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    ticks = {"xticks": range(values.shape[1]), "yticks": range(values.shape[0])}
    ax.set(**ticks, xticklabels=values.columns, yticklabels=values.index, title=title)
    ax.tick_params(axis="x", labelsize="small")


def write_values(ax: Axes, values: pd.DataFrame) -> None:
    "Into a heatmap, once the figure is finished: white on dark."
    for i, j in np.ndindex(*values.shape):
        value = values.iloc[i, j]
        ax.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", color="white" if value < 0.5 else INK)


def plot_table(df: pd.DataFrame) -> Figure:
    "Two maps of plain layers of one depth, initialisations by activations: at the better learning rate, and at the other one."
    means = df.groupby(["init", "act", "lr"]).accuracy.mean().groupby(["init", "act"])
    order = [name for name in PLAIN if name in set(df.init)]
    maps = {name: values.unstack("act").loc[order] for name, values in (("better", means.max()), ("worse", means.min()))}
    fig = new_figure(10, 4.2)
    axes = fig.subplots(1, 2, sharey=True)
    for ax, (name, values) in zip(axes, maps.items(), strict=True):
        heatmap(ax, values, f"accuracy at the {name} of two learning rates\n(chance: {CHANCE})")
    trained = (maps["better"] > FAILS * maps["better"].max()).sum(axis=1)
    counts = ", ".join(f"{trained[name]} with {_short(name)}" for name in COMPARED if name in trained)
    finish(fig, f"{df.depth.iloc[0]} plain layers: of {maps['better'].shape[1]} activations train {counts}")
    for ax, values in zip(axes, maps.values(), strict=True):
        write_values(ax, values)
    return fig


def plot_depth(df: pd.DataFrame) -> Figure:
    "Accuracy over depth, for each activation a panel; bars are 95% confidence intervals."
    acts = [act for act in ACTIVATIONS if act in set(df.act)]
    inits = [init for init in COMPARED if init in set(df.init)]
    fig = new_figure(4.2 * len(acts), 3.8)
    axes = fig.subplots(1, len(acts), sharey=True, squeeze=False)[0]
    best = at_best_rate(df)
    for ax, act in zip(axes, acts, strict=True):
        scale_accuracy(ax, CHANCE)
        for init in inits:
            color, marker, dash = LOOKS[init]
            runs = best[(best.act == act) & (best.init == init)].groupby("depth").accuracy
            bars = runs.agg(interval)
            ax.errorbar(bars.index, runs.mean(), bars, fmt=marker + dash, color=color, label=init, capsize=2)
        depths = sorted(df.depth.unique())
        ax.set(xscale="log", title=act, xlabel="layers")
        ax.set_xticks(depths, [str(d) for d in depths])
        ax.minorticks_off()
    axes[0].set_ylabel("validation accuracy")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(inits) + 1, frameon=False)
    means = best.groupby(["depth", "init"]).accuracy.mean().unstack()[inits].dropna()
    reached = ", ".join(f"{mean:.0%} with {_short(init)}" for init, mean in means.iloc[-1].items())
    finish(fig, f"{means.index[-1]} plain layers: {reached}")
    return fig


def _short(init: str) -> str:
    return init.removeprefix("LSUV ")


def main() -> None:
    df, here = read(), CSV.parent
    plot_signal(networks(df)).savefig(here / "study_signal.png", dpi=120)
    plot_table(plain(df)).savefig(here / "study_table.png", dpi=120)
    plot_depth(deep(df)).savefig(here / "study_depth.png", dpi=120)


if __name__ == "__main__":
    main()
