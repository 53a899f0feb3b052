"""Measures what things cost and writes it into `docs/costs.md`: `python tests/benchmarks/report.py`.

Some ten minutes on an idle machine; also writes `nbs/lsuv_cost.png`. With `--device cuda` it measures on a GPU instead,
in about seven minutes, and writes tables of its own. With `--dry` it prints, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE, FIGURE = ROOT / "docs" / "costs.md", ROOT / "nbs" / "lsuv_cost.png"
COMMAND = "python tests/benchmarks/report.py"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler has much to say where there is no GPU
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]
warnings.simplefilter("ignore")

import costs  # noqa: E402
import matplotlib  # noqa: E402
import recording  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
from contenders import MODELS, ON_A_GPU  # noqa: E402
from counts import of_a_step, of_lsuv, plain_cnn, plain_mlp  # noqa: E402
from fastprogress.fastprogress import progress_bar  # noqa: E402
from measuring import machine, version  # noqa: E402

# --- measuring --------------------------------------------------------------------------------------------------------


def cost(name, case, budget):
    "A row of the table, in forward passes."
    turns = costs.Turns(case)
    for _ in range(turns.rounds_in(budget)):
        turns.round()
    row = dict(
        name=name,
        shape=case.shape,
        goal=case.goal,
        rounds=len(turns.rows),
        forward=turns.seconds("forward"),
        correcting=turns.ratio("correcting"),
        whole=turns.ratio("whole"),
    )
    if case.small:
        row |= cost_of_others(case, turns)
    del turns  # the GPU's memory is for what comes
    one, ours, weights, largest = costs.memory(case)
    return row | dict(memory=ours - one, weights=weights, largest=largest)


def cost_of_others(case, turns):
    counts = costs.others(case)
    passes = {f"{label}_passes": counted.n for label, counted in counts.items()}
    of_a_pass, beside = turns.ratio("eval"), counts["package"].beside / turns.seconds("forward")
    return passes | dict(
        package=counts["package"].n * of_a_pass + beside,
        course=counts["course"].n * of_a_pass,
    )


def steps(name, training, budget):
    "A column of the recorder's table."
    turns = recording.Turns(training)
    for _ in range(turns.rounds_in(3 * budget)):
        turns.round()
    return dict(name=name, rounds=len(turns.rows), ratios={kind: turns.ratio(kind) for kind in training.kinds})


# --- reports ----------------------------------------------------------------------------------------------------------


def above(device, results):
    command = COMMAND if device == "cpu" else f"{COMMAND} --device {device}"
    return tables.measured(device, machine(device), [r["rounds"] for r in results], command) + "\n\n"


def report_costs(device, budget):
    rows = [cost(name, case, budget) for name, case in progress_bar((MODELS if device == "cpu" else ON_A_GPU).items())]
    return above(device, rows) + tables.costs(device, rows)


def report_depth(device, budget):
    times = [costs.by_depth(depth) for depth in progress_bar(costs.DEPTHS)]
    tables.figure(costs.DEPTHS, times).savefig(FIGURE, dpi=120)
    return tables.by_depth(machine(device), costs.DEPTHS, times)


def report_recording(device, budget):
    trainings = recording.MODELS if device == "cpu" else recording.ON_A_GPU
    columns = [steps(name, training, budget) for name, training in progress_bar(trainings.items())]
    return above(device, columns) + tables.recording(device, columns)


def report_counts(device, budget):
    images, rows = (16, 3, 32, 32), (1024, 32)
    lsuv = {
        "plain CNN, 10 layers, 16 × 3 × 32 × 32": (plain_cnn(10), images),
        "the same, 40 layers": (plain_cnn(40), images),
        "40 layers, with batch norms": (plain_cnn(40, norm=True), images),
        "MLP, 20 layers, 1024 × 32": (plain_mlp(20), rows),
    }
    counted = [(name, of_lsuv(model, torch.randn(shape))) for name, (model, shape) in progress_bar(lsuv.items())]
    above = f"Counted on a CPU, by the code that a GPU runs (PyTorch {version()}; `{COMMAND} --only counts`):"
    options = {"mean, std, share near zero": {}, "histograms": dict(with_hist=True), "gradients": dict(with_grad=True)}
    recorded = [(name, *of_one_and_all(**options)) for name, options in progress_bar(options.items())]
    return f"{above}\n\n{tables.counts_of_lsuv(counted)}\n\n{tables.counts_of_recording(recorded)}"


def of_one_and_all(few=8, many=80, **options):
    "Operations of a recorded step for each module, and for all together."
    of_few, of_many = (of_a_step(lambda n=n: plain_mlp(n // 2), torch.randn(16, 32), **options) for n in (few, many))
    of_one = (of_many - of_few) / (many - few)
    return of_one, of_few - few * of_one


REPORTS = {  # by the page's markers
    "cpu": dict(counts=report_counts, costs=report_costs, depth=report_depth, recording=report_recording),
    "cuda": dict(costs=report_costs, recording=report_recording),
}


def into_page(block, text):
    "Put it between its markers."
    old = PAGE.read_text(encoding="utf-8")
    markers = rf"(<!-- {block}: .*? -->\n).*?(<!-- end of {block} -->)"
    new, n = re.subn(markers, lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.S)
    if n != 1:
        raise ValueError(f'{PAGE}: expected one pair of markers "{block}", found {n}')
    PAGE.write_text(new, encoding="utf-8")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=REPORTS, default="cpu", help="what to measure on")
    parser.add_argument("--dry", action="store_true", help="print, and leave the page as it is")
    parser.add_argument("--seconds", type=float, default=15, help="for the rounds of each model (three at least)")
    parser.add_argument("--only", choices=REPORTS["cpu"], help="one of the reports")
    args = parser.parse_args()
    if args.only and args.only not in REPORTS[args.device]:
        parser.error(f"--only {args.only}: not on a GPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no NVIDIA GPU")
    return args


def main():
    args = arguments()
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    for name, report in REPORTS[args.device].items():
        if args.only in (None, name):
            print(text := report(args.device, args.seconds))
            if not args.dry:
                into_page(name if args.device == "cpu" else f"{name} {tables.KIND[args.device]}", text)


if __name__ == "__main__":
    main()
