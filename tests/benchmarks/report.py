"""Measures everything and writes it into the README and `nbs/lsuv_cost.png`: `python tests/benchmarks/report.py`.

About ten minutes on two cores. With `--dry` it prints, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler has much to say where there is no GPU
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import matplotlib  # noqa: E402
import torch  # noqa: E402
from contenders import MODELS  # noqa: E402
from costs import DEPTHS, Turns, by_depth, memory, others  # noqa: E402
from fastprogress.fastprogress import progress_bar  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from recording import CALLBACKS  # noqa: E402
from recording import MODELS as TRAINED  # noqa: E402
from recording import Turns as TrainingTurns  # noqa: E402

COMMAND = "python tests/benchmarks/report.py"
FIGURE = ROOT / "nbs" / "lsuv_cost.png"
HEAD = (
    "model",
    "one forward pass",
    "correcting pass",
    "`lsuv_`, all of it",
    "memory beyond a forward pass (the weights take)",
    "package `lsuv`",
    "the course's loop",
)


def costs(name, budget):
    "A row of the table, in forward passes."
    turns = Turns(name)
    for _ in range(turns.rounds_in(budget)):
        turns.round()
    counts = others(name)
    forward = turns.seconds("forward")

    def cost(passes, beside):
        return passes.n * turns.ratio("eval") + beside / forward

    row = dict(
        name=name,
        shape=MODELS[name][1],
        rounds=len(turns.rows),
        forward=forward,
        correcting=turns.ratio("correcting"),
        whole=turns.ratio("whole"),
        eval=turns.ratio("eval"),
        package_passes=counts["package"].n,
        course_passes=counts["course"].n,
        package=cost(counts["package"], counts["package"].beside),
        course=cost(counts["course"], 0.0),
    )
    one, ours, size = memory(name)
    return row | dict(memory=ours - one, size=size)


def cells(r):
    def other(label):
        return f"{r[label + '_passes']} passes, {r[label]:.0f}× ({r[label] / r['whole']:.0f} times as much)"

    shape = " × ".join(map(str, r["shape"]))
    return (
        f"{r['name']}, {shape}",
        f"{r['forward'] * 1000:.0f} ms",
        f"{r['correcting']:.2f}×",
        f"**{r['whole']:.2f}×**",
        f"{r['memory'] / 1e6:.0f} MB ({r['size'] / 1e6:.0f} MB)",
        other("package"),
        other("course"),
    )


def markdown(rows):
    return "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, ["---"] * len(HEAD), *map(cells, rows)))


def machine():
    try:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        cpu = platform.processor() or platform.machine()
    return f"one thread of an {cpu}, float32, PyTorch {torch.__version__.partition('+')[0]}"


def figure(depths, times):
    "Seconds over depth, both axes logarithmic: a line of slope 1 beside one of slope 2."
    fig = Figure(figsize=(6, 4), layout="constrained")
    ax = fig.subplots()
    for key, label, marker in (
        ("course", "the course's loop", "s"),
        ("ours", "lsuv_", "o"),
        ("forward", "one forward pass", "."),
    ):
        ax.plot(depths, [t[key] for t in times], marker=marker, label=label)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="layers",
        ylabel="seconds",
        title="Linear beside quadratic: the cost of depth",
    )
    ax.set_xticks(depths, [str(d) for d in depths], minor=False)
    ax.minorticks_off()
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def depth_sentence(times):
    first, last = times[0], times[-1]
    ours, course = (last[of] / first[of] for of in ("ours", "course"))
    return (
        f"From {DEPTHS[0]} to {DEPTHS[-1]:,} linear layers (32 wide, 32 rows) `lsuv_` takes {ours:.0f} times as "
        f"long, the loop {course:,.0f} times: {last['ours']:.1f} s against {last['course']:.0f} s in "
        f"{last['course_passes']:,} passes."
    )


def steps(name, budget):
    "A column of the recorder's table: time of a training step, of one without a callback."
    turns = TrainingTurns(name)
    for _ in range(turns.rounds_in(3 * budget)):
        turns.round()
    return dict(name=name, rounds=len(turns.rows), **{kind: turns.ratio(kind) for kind in CALLBACKS})


def recorder_table(columns):
    lines = [["recording", *(c["name"] for c in columns)], ["---"] * (1 + len(columns))]
    lines += [[kind, *(f"{c[kind]:.3f}×" for c in columns)] for kind in CALLBACKS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured(results):
    rounds = [r["rounds"] for r in results]
    return f"\n\nMeasured on {machine()}, medians of {min(rounds)} to {max(rounds)} rounds, by `{COMMAND}`."


def into_readme(block, text):
    "Put it between its markers."
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new, n = re.subn(
        rf"(<!-- {block}: .*? -->\n).*?(\n<!-- end of {block} -->)", lambda m: m[1] + text + m[2], old, flags=re.S
    )
    if n != 1:
        raise ValueError(f'{path}: expected one pair of markers "{block}", found {n}')
    path.write_text(new, encoding="utf-8")


def report_costs(bar, budget):
    rows, times = [costs(name, budget) for name in bar(MODELS)], [by_depth(d) for d in bar(DEPTHS)]
    figure(DEPTHS, times).savefig(FIGURE, dpi=120)
    return f"{markdown(rows)}\n\n{depth_sentence(times)}{measured(rows)}"


def report_recording(bar, budget):
    columns = [steps(name, budget) for name in bar(TRAINED)]
    return recorder_table(columns) + measured(columns)


REPORTS = dict(costs=report_costs, recording=report_recording)  # by the README's markers


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="print, and leave the README as it is")
    parser.add_argument("--seconds", type=float, default=15, help="for the rounds of each model (three at least)")
    parser.add_argument("--only", choices=REPORTS, help="one of the reports")
    args = parser.parse_args()
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    warnings.simplefilter("ignore")
    for block, report in REPORTS.items():
        if args.only in (None, block):
            print(text := report(progress_bar, args.seconds))
            if not args.dry:
                into_readme(block, text)


if __name__ == "__main__":
    main()
