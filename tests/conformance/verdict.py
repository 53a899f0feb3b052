"""What `lsuv_` made of an architecture, by the audit: every layer at its target or named with a true reason."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from audit import AFFINE, audit, differences, fingerprint, moved, n_calls, outputs_of, parameter_bits, rng_print
from checks import TOL, assert_at, assert_measured, assert_true_reason
from torch import nn

from fastai_lsuv import lsuv_

RIGHT = ("corrected", "unchanged")
LINEAR_ALIKE = (
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)  # weights on inputs, and none of `AFFINE`


@dataclass
class Verdict:
    "One line of the table."

    family: str
    name: str
    outcome: str = ""  # right, wrong, not built, crashed
    model: str = ""
    parameters: int = 0
    layers: int = 0  # rows of the report
    right: int = 0  # of them: mean 0 and std 1, or std 1 where there is no bias
    mean_kept: int = 0  # of these: no bias, or one sign
    skipped: dict[str, int] = field(default_factory=dict)  # how many, by reason
    passes: int = 0
    seconds: float = 0.0  # of `lsuv_`
    faults: list[str] = field(default_factory=list)


COLUMNS = [f.name for f in fields(Verdict)]


def judge(architecture) -> Verdict:
    verdict = Verdict(architecture.family, architecture.name)
    try:
        built = architecture.build()
    except Exception as e:
        verdict.outcome, verdict.faults = "not built", [f"{type(e).__name__}: {e}"]
        return verdict
    verdict.model, verdict.parameters = built.variant, sum(p.numel() for p in built.model.parameters())
    try:
        _run(verdict, built.model, built.batch)
    except Exception as e:
        verdict.outcome = "crashed"
        verdict.faults.append(f"{type(e).__name__}: {e}")
    else:
        verdict.outcome = "wrong" if verdict.faults else "right"
    return verdict


def _run(verdict, model, batch):
    before, bits, rng = fingerprint(model), parameter_bits(model), rng_print()
    report = lsuv_(model, batch)
    verdict.layers, verdict.passes, verdict.seconds = len(report), report.n_forward, round(report.seconds, 2)
    verdict.right = sum(row.status in RIGHT for row in report)
    verdict.mean_kept = sum(row.status in RIGHT and "mean kept" in row.reason for row in report)
    verdict.skipped = dict(Counter(row.reason.partition(":")[0] for row in report if row.status == "skipped"))
    faults = verdict.faults
    with noting(faults):
        assert rng_print() == rng, "random streams moved"
    with noting(faults):
        changed = differences(before, fingerprint(model), but=set(bits))
        assert not changed, f"not only weights and biases moved: {changed[:5]}"
    with noting(faults):
        strange = sorted(n for n in moved(bits, model) if not _may_move(n, model, report))
        assert not strange, f"moved, but belong to no corrected layer: {strange[:5]}"
    with noting(faults):
        shared = any(row.n_calls > 1 for row in report if row.status != "skipped")
        rounded = any(abs(row.mean_before) > 1e4 * row.std_before > 0 for row in report)  # too few digits for one step
        assert report.n_forward == 3 or shared or (rounded and report.n_forward <= 7), f"{report.n_forward} passes"
    del before, bits
    check_layers(model, batch, report, faults)


def _may_move(parameter, model, report):
    "Whether a parameter is one of a layer that was corrected, or of something inside it."
    places = {id(model.get_submodule(row.name)): row for row in report if row.status != "skipped"}
    parts = parameter.split(".")[:-1]
    return any(id(model.get_submodule(".".join(parts[:i]))) in places for i in range(len(parts) + 1))


def check_layers(model, batch, report, faults):
    "Each layer that ran, and each row."
    records = {r.name: r for r in audit(model, batch)}
    rows = {row.name: row for row in report}
    for r in records.values():
        with noting(faults):
            assert r.name in rows, f"{r.name} ({type(r.module).__name__}) ran and is not in the report"
            row = rows[r.name]
            assert row.n_calls == r.n_calls, f"{r.name}: {row.n_calls} calls reported, {r.n_calls} made"
            assert row.status != "not_converged", (
                f"{r.name}: not converged, mean {r.mean:.4g}, std {r.std:.4g} in {r.n} values"
            )
            if row.status == "skipped":
                assert_true_reason(model, batch, row, r)
            elif "one sign" in row.reason or "prior bias" in row.reason:
                assert abs(r.std - 1) <= TOL, f"{r.name}: std {r.std}"
            else:
                assert_at(r, 0.0, 1.0)
            assert_measured(row, r)
    others = [row for row in report if row.name not in records]
    _check_others(model, batch, others, faults)
    _check_named(model, batch, rows, faults)


def _check_others(model, batch, rows, faults):
    "Units whose type the audit doesn't know, and those that didn't run."
    seen = outputs_of(model, batch, [row.name for row in rows if row.status in RIGHT])
    calls = n_calls(model, batch, [model.get_submodule(row.name) for row in rows])
    for row in rows:
        with noting(faults):
            module = model.get_submodule(row.name)
            assert row.status != "not_converged", (
                f"{row.name} ({row.type}): not converged, {row.mean_after:.4g}, {row.std_after:.4g}"
            )
            if row.status in RIGHT:
                mean, std = seen[row.name]
                assert abs(std - 1) <= TOL, f"{row.name} ({row.type}): std {std}"
                if not row.reason:
                    assert abs(mean) <= TOL, f"{row.name} ({row.type}): mean {mean}"
            elif row.reason == "never called":
                assert calls[module] == 0, f"{row.name} was called {calls[module]} times"
            elif row.reason == "scripted":
                assert isinstance(module, torch.jit.ScriptModule), row.name
            elif row.reason == "recurrent weights":
                assert isinstance(module, (nn.RNNBase, nn.RNNCellBase)), row.name
            elif row.reason == "tied weight":
                elsewhere = {p for m in model.modules() if m is not module for p in m.parameters(recurse=False)}
                assert elsewhere & set(module.parameters(recurse=False)), row.name
            elif row.reason.partition(":")[0] in ("several weights", "not affine", "complex"):
                assert calls[module], f"{row.name} is skipped for {row.reason!r}, but never called"
            else:
                raise AssertionError(f"{row.name} ({row.type}): skipped for {row.reason!r}, which nobody checked")


def _check_named(model, batch, rows, faults):
    "Nothing is left out: what has a weight for its input is in the report, or another layer is corrected through it."
    candidates = {
        name: m
        for name, m in model.named_modules()
        if name not in rows and (isinstance(m, (*AFFINE, *LINEAR_ALIKE)) or type(m).__name__ == "Conv1D")
    }
    calls = n_calls(model, batch, candidates.values())
    for name, m in candidates.items():
        parents = [name[:i] for i, c in enumerate(name) if c == "."] + [""]
        used = calls[m] == 0 and any(p in rows for p in parents)
        with noting(faults):
            assert used, f"{name} ({type(m).__name__}), called {calls[m]} times, is not in the report"


@contextmanager
def noting(faults):
    "A failed assertion is one fault of several, not the end."
    try:
        yield
    except AssertionError as e:
        faults.append(str(e).splitlines()[0] if str(e) else "assertion failed")
