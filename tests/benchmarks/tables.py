"""What was measured, as `docs/costs.md` shows it: the device over every number."""

from __future__ import annotations

from fastai_lsuv.plots.palette import GREY, LOOKS, Look
from fastai_lsuv.plots.style import finish, new_figure

KIND = {"cpu": "on a CPU", "cuda": "on a GPU"}


def table(*lines):
    "Markdown; the first line is the head."
    head, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def measured(device, machine, rounds, command):
    "The sentence that goes above a table."
    return f"Measured **{KIND[device]}** ({machine}), medians of {min(rounds)} to {max(rounds)} rounds, by `{command}`:"


# --- lsuv_ ------------------------------------------------------------------------------------------------------------


def costs(device, rows):
    "In forward passes."
    head = (
        f"model, {KIND[device]}",
        "`lsuv_`, all of it",
        "one forward pass",
        "correcting pass",
        "memory beyond a forward pass (the weights take)",
    )
    more = ("largest output",) if device == "cuda" else ("package `lsuv`", "the course's loop")
    return table((*head, *more), *([*ours(r), *(largest(r) if device == "cuda" else others(r))] for r in rows))


def ours(r):
    missed = "" if r["whole"] <= r["goal"] else f" (goal: {r['goal']}×)"
    return (
        f"{r['name']}, {' × '.join(map(str, r['shape']))}",
        f"**{r['whole']:.2f}×**{missed}",
        f"{r['forward'] * 1000:.0f} ms",
        f"{r['correcting']:.2f}×",
        f"{r['memory'] / 1e6:.0f} MB ({r['weights'] / 1e6:.0f} MB)",
    )


def largest(r):
    return (f"{r['largest'] / 1e6:.0f} MB",)


def others(r):
    return [
        f"{r[label + '_passes']} passes, {r[label]:.0f}× ({r[label] / r['whole']:.0f} times as much)"
        for label in ("package", "course")
    ]


def by_depth(machine, depths, times):
    "In a sentence."
    first, last = times[0], times[-1]
    ours, course = (last[of] / first[of] for of in ("ours", "course"))
    return (
        f"On a CPU ({machine}) `lsuv_` takes {ours:.0f} times as long for {depths[-1]:,} linear layers (32 wide, "
        f"32 rows) as for {depths[0]}, the loop {course:,.0f} times: {last['ours']:.1f} s against "
        f"{last['course']:.0f} s in {last['course_passes']:,} passes."
    )


def figure(depths, times):
    "Seconds over depth, both axes logarithmic: a line of slope 1 beside one of slope 2."
    fig = new_figure(7, 4.2)
    ax = fig.subplots()
    for key, label, (color, marker, dash) in (
        ("course", "the course's loop", LOOKS["course's loop"]),
        ("ours", "lsuv_", LOOKS["LSUV"]),
        ("forward", "one forward pass", Look(GREY, ".")),
    ):
        seconds = [t[key] for t in times]
        ax.plot(depths, seconds, dash, marker=marker, color=color)
        ax.annotate(label, (depths[-1], seconds[-1]), (8, 0), textcoords="offset points", va="center")
    ax.set(xscale="log", yscale="log", xlabel="layers", ylabel="seconds on a CPU")
    ax.set_xticks(depths, [f"{d:,}" for d in depths], minor=False)
    ax.minorticks_off()
    course, ours = (times[-1][key] for key in ("course", "ours"))
    finish(fig, f"{depths[-1]:,} layers: {ours:.1f} s with lsuv_, {course:.0f} s with the course's loop")
    return fig


# --- the recorder -----------------------------------------------------------------------------------------------------


def recording(device, columns):
    "Training steps, as multiples of those without a callback; empty where it was not measured."
    kinds = dict.fromkeys(kind for c in columns for kind in c["ratios"])
    head = [f"training step {KIND[device]}, with", *(c["name"] for c in columns)]
    rows = ([kind, *(f"{c['ratios'][kind]:.3f}×" if kind in c["ratios"] else "" for c in columns)] for kind in kinds)
    return table(head, *rows)


# --- counts -----------------------------------------------------------------------------------------------------------


def counts_of_lsuv(rows):
    head = (
        "`lsuv_`, beyond the forward's own",
        "operations for each layer and pass",
        "outputs read or written, for each pass",
        "waits for the device, in all",
    )
    return table(head, *([name, f"{c.operations:.1f}", f"{c.traffic:.2f}", str(c.waits)] for name, c in rows))


def counts_of_recording(rows):
    head = "`ActivationStatsRecorder`", "operations for each recorded module", "for all of them together, for each step"
    return table(head, *([name, f"{of_one:.0f}", f"{of_all:.0f}"] for name, of_one, of_all in rows))
