"""The one line that says what `lsuv_` did and whether the network can be trained."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from fastai_lsuv.core.reasons import Note

if TYPE_CHECKING:
    from fastai_lsuv.report import LSUVReport, Row

_MEAN_KEPT = {Note.NO_BIAS.value, Note.ONE_SIGN.value, Note.PRIOR.value}
_TOLD = {Note.OTHERS.value: "", Note.BIAS_MOVED.value: " (exclude= leaves it)"}  # of layers on target, as well


def summary_line(report: LSUVReport) -> str:
    """Return how many layers, what was skipped and why, worst mean and std before → after, seconds, and the verdict."""
    if not report.rows:
        return f"LSUV: nothing to correct, {report.seconds:.2f} s"
    left = _left(report)
    layers = ", ".join([*_counts(report), *left[:1]])
    numbers = ", ".join([*_numbers(report), f"{report.seconds:.2f} s"])
    init = [f'init="auto" {report.init}'] if report.init else []
    return "LSUV: " + "; ".join([layers, *left[1:], numbers, *init, judged(report)])


def judged(report: LSUVReport) -> str:
    """Return whether the network can be trained, and what to do about it."""
    return f"{report.verdict} ({report.remedy})" if report.remedy else report.verdict


def _only_measured(report: LSUVReport) -> bool:
    return report.mean is None and report.std is None


def _counts(report: LSUVReport) -> list[str]:
    """How many layers are on target, by what it took."""
    done = [row.status for row in report.rows if row.status in ("corrected", "unchanged")]
    if _only_measured(report):
        return [f"{len(done)} measured"] * bool(done)
    return [f"{n} {status}" for status, n in Counter(done).items()]


def _numbers(report: LSUVReport) -> list[str]:
    """The worst mean and std, and those of branch ends."""
    done = [row for row in report.rows if row.status != "skipped"]
    numbers = []
    for what, asked, wanted in (("mean", report.mean, report.mean or 0.0), ("std", report.std, report.std or 1.0)):
        excused = _MEAN_KEPT if what == "mean" else {Note.ENDS_BRANCH.value}
        judged = [row for row in done if not excused & row.notes]
        if not judged or (asked is None and not _only_measured(report)):  # left alone: neither right nor wrong
            continue
        before, after = (_farthest(judged, f"{what}_{when}", wanted) for when in ("before", "after"))
        numbers.append(f"worst {what} {before}" if _only_measured(report) else f"worst {what} {before} → {after}")
    if at_end := [row for row in done if Note.ENDS_BRANCH.value in row.notes]:
        usual = median(row.std_after for row in at_end)
        ends = f"{len(at_end)} branch end{'s' * (len(at_end) > 1)}"
        numbers.append(f"{ends} at {_farthest(at_end, 'std_after', usual)}")
    return numbers


def _left(report: LSUVReport) -> list[str]:
    """What isn't on target, by reason."""
    groups = defaultdict(list)
    for row in report.rows:
        if row.status in ("skipped", "not_converged"):
            groups[row.status.replace("_", " "), row.reason].append(row.name or row.type)
    told = defaultdict(list)
    for row in report.rows:
        for note in row.reason.split("; ") if row.status != "skipped" else ():
            if (phrase := note.partition(": ")[0]) in _TOLD:
                told[note.replace(": ", " (") + ")" * (": " in note) + _TOLD[phrase]].append(row.name or row.type)
    left = [
        f"{len(names)} {status}{f' ({reason})' if reason else ''}: {few(names)}"
        for (status, reason), names in groups.items()
    ]
    return left + [f"{note} in {len(names)}: {few(names)}" for note, names in told.items()]


def number(x: float) -> str:
    """Return a number as it is printed."""
    if math.isnan(x):
        return "-"
    return f"{x:.4f}" if 1e-3 <= abs(x) < 1e4 or x == 0 else f"{x:.1e}"


def _farthest(rows: Sequence[Row], column: str, wanted: float) -> str:
    """The value that is farthest from the target."""
    values = [getattr(row, column) for row in rows]
    return number(max(values, key=lambda x: abs(x - wanted) if not math.isnan(x) else float("inf")))


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many there are beyond."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
