"""How it is measured: side by side in one process, in turns, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import copy
from statistics import median

import torch
from contenders import (
    Passes,
    as_lsuv_measures,
    correcting_pass,
    course,
    forward_pass,
    in_eval_mode,
    mlp,
    package,
    whole,
)
from measuring import peak_bytes, seconds
from torch import nn


class Turns:
    "Rounds of measurements of one model; in each, everything once, and a plain forward pass before and after."

    def __init__(self, case):
        self.model, self.x = case.build()
        self.first = copy.deepcopy(self.model.state_dict())
        self.rows = []

    def fresh(self):
        self.model.load_state_dict(self.first)
        return self.model.train()

    def beside(self):
        "Seconds of all but the whole."
        row = dict(
            eval=seconds(forward_pass, in_eval_mode(self.fresh()), self.x),
            forward=seconds(forward_pass, as_lsuv_measures(self.fresh()), self.x),
        )
        with correcting_pass(self.fresh(), self.x) as correct:
            row["correcting"] = seconds(correct)
        return row

    def round(self):
        row = self.beside()
        row["whole"] = seconds(whole, self.fresh(), self.x)
        self.add(row)

    def add(self, row):
        row["forward"] = (row["forward"] + seconds(forward_pass, as_lsuv_measures(self.fresh()), self.x)) / 2
        self.rows.append(row)

    def rounds_in(self, budget):
        "How many rounds, three at least, a time (in seconds) is enough for; a round is some nine passes. Warms up."
        forward_pass(as_lsuv_measures(self.fresh()), self.x)
        return max(3, min(25, int(budget / 9 / seconds(forward_pass, self.model, self.x))))

    def ratio(self, of, to="forward"):
        "Median over the rounds."
        return median(row[of] / row[to] for row in self.rows)

    def seconds(self, of):
        return median(row[of] for row in self.rows)


def others(case):
    """The same work by the package and by the course's loop, on a small batch.

    Their forward passes are counted, and the package's time beside them (its orthogonal initialisation above all) is
    measured: neither grows with the batch. What a pass takes is measured on the large batch, in eval mode.
    """
    counts = {}
    for label, run in (("package", package), ("course", course)):
        model, x = case.build(small=True)
        with Passes(model) as counts[label]:
            run(model.eval(), x)
    return counts


def memory(case):
    "Bytes: peak of one forward pass, peak of LSUV, what the weights and buffers take, and the largest output."
    model, x = case.build()
    held = sum(t.nbytes for t in model.state_dict().values())
    largest = largest_output(as_lsuv_measures(model), x)
    one, ours = (
        peak_bytes(case.device, run, mode(model), x)
        for run, mode in ((forward_pass, as_lsuv_measures), (whole, nn.Module.train))
    )
    return one, ours, held, largest


def largest_output(model, x):
    "Of all layers."
    sizes = [0]
    hooks = [
        m.register_forward_hook(lambda m, args, out: sizes.append(out.nbytes if isinstance(out, torch.Tensor) else 0))
        for m in model.modules()
    ]
    forward_pass(model, x)
    for hook in hooks:
        hook.remove()
    return max(sizes)


DEPTHS = 10, 50, 200, 1000


def by_depth(depth, width=32, n=32):
    "Seconds of one forward pass, of LSUV and of the course's loop, on a plain network of so many layers."
    torch.manual_seed(0)
    first, x = mlp(depth, width), torch.randn(n, width)

    def fresh():
        return copy.deepcopy(first)

    forward_pass(fresh(), x)
    times = dict(
        forward=median(seconds(forward_pass, m, x) for m in [fresh()] * 9),
        ours=median(seconds(whole, fresh(), x) for _ in range(5)),
    )
    with Passes(model := fresh()) as passes:
        times["course"] = seconds(course, model, x)
    return times | dict(course_passes=passes.n)
