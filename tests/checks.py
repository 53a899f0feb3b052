"""What must hold after LSUV, said once: every layer at its target by the audit, or skipped for a true reason."""

from __future__ import annotations

import math

import torch
from audit import as_in_training, audit, call, first_tensor, moved, outputs_of

STATUSES = ("corrected", "unchanged", "skipped", "not_converged")
TOL = 1e-3  # DESIGN section 3


def assert_exact(model, batch, report, before, *, mean=0.0, std=1.0, tol=TOL, may_fail=()):
    """All at the same time: each affine layer that ran is at (`mean`, `std`), or its row says truly why not.

    `before` is `parameter_bits` of the untouched model; layers in `may_fail` may be `not_converged`."""
    records = audit(model, batch)
    assert records or len(report), "nobody saw a layer"
    changed = moved(before, model)
    for r in records:
        row = report[r.name]
        assert row.n_calls == r.n_calls, r.name
        assert row.status in STATUSES and row.reason is not None, row
        if row.status == "skipped":
            own = {n for n, _ in model.named_parameters(remove_duplicate=False) if n.rpartition(".")[0] == r.name}
            if "tied" not in row.reason:
                assert not own & changed, f"{r.name} is skipped but {own & changed} moved"
            assert_true_reason(model, batch, row, r)
        elif r.name not in may_fail:
            assert row.status in ("corrected", "unchanged"), row
            assert_at(r, mean, std, tol)
        assert_measured(row, r)
    assert_others(model, batch, report, records, std, tol)
    return records


def assert_others(model, batch, report, records, std, tol):
    "Units of no type that the audit knows (which can be shifted, it can't tell): std, and what the row says of it."
    names = {row.name for row in report if row.status in ("corrected", "unchanged")} - {r.name for r in records}
    for name, (got_mean, got_std) in outputs_of(model, batch, names).items():
        row = report[name]
        assert abs(got_std - std) <= tol, f"{name}: std {got_std} not {std}"
        assert math.isclose(row.std_after, got_std, rel_tol=1e-4), row
        assert math.isclose(row.mean_after, got_mean, rel_tol=1e-4, abs_tol=1e-4 * std), row


def assert_at(r, mean, std, tol=TOL):
    assert abs(r.std - std) <= tol, f"{r.name}: std {r.std} not {std}"
    if r.has_bias:
        assert abs(r.mean - mean) <= tol, f"{r.name}: mean {r.mean} not {mean}"


def assert_measured(row, r):
    "The row's `after` is what the audit sees: a measurement, never a prediction."
    if not r.finite or r.n < 2:
        return
    assert math.isclose(row.std_after, r.std, rel_tol=1e-4, abs_tol=1e-5), (row, r.std)
    assert math.isclose(row.mean_after, r.mean, rel_tol=1e-4, abs_tol=1e-4 * max(r.std, 0.1)), (row, r.mean)


def assert_true_reason(model, batch, row, r):
    "What the row gives as its reason for being skipped is the case."
    m, reason = r.module, row.reason
    if reason == "frozen":
        assert not all(p.requires_grad for p in m.parameters(recurse=False))
    elif reason == "constant output":
        assert r.constant, (row, r.mean, r.std, r.channel_mean, r.channel_std)
    elif reason == "non-finite output":
        assert not r.finite
    elif reason == "too few values":
        assert r.n < 2 or r.channel_n < 2, (row, r.n)
    elif reason == "tied weight":
        assert any(p is m.weight for o in model.modules() if o is not m for p in o.parameters(recurse=False))
    elif reason == "weight has no effect on scale":
        assert math.isclose(doubled := std_with_doubled_weight(model, batch, r), r.std, rel_tol=0.05), (
            row,
            r.std,
            doubled,
        )
    else:
        raise AssertionError(f"{row.name} ran, yet is {row.status} for {reason!r}")


def std_with_doubled_weight(model, batch, r):
    "The layer's std when its weight (or what it is made from) is doubled and nothing else."
    seen = []
    hook = r.module.register_forward_hook(
        lambda m, a, o: seen.append(first_tensor(o).double().std().item()), prepend=True
    )
    weights = {p: p.detach().clone() for p in r.module.parameters() if p.dim() > 1}
    assert weights, r.name
    with torch.no_grad(), as_in_training(model):
        for p in weights:
            p.mul_(2)
        call(model, batch)
        for p, value in weights.items():
            p.copy_(value)
    hook.remove()
    return seen[0]


def row_values(report):
    "A report as plain values, to compare two."
    names = (
        "name",
        "type",
        "n_calls",
        "mean_before",
        "std_before",
        "mean_after",
        "std_after",
        "n_iter",
        "status",
        "reason",
    )
    return [tuple(map(repr, (getattr(row, n) for n in names))) for row in report]  # repr: NaN equals no NaN
