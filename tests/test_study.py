"""The study in nbs/: nothing is run twice, its networks are what the tables call them, and its tables are right."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.layers import flatten_model
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "nbs"))
import study


def test_the_full_study_contains_the_short_one():
    short, full = list(study.runs()), list(study.runs(full=True))
    assert len(short) == len(set(short)) and len(full) == len(set(full)) and set(short) < set(full)


@pytest.mark.parametrize("act", study.ACTS)
@pytest.mark.parametrize("depth", [5, 17])
def test_thin_nets_have_their_layers_and_nothing_else(act, depth):
    net = study.thin_cnn(act, depth, 8)
    layers = flatten_model(net)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in layers) == depth and net(
        torch.randn(2, 1, 8, 8)
    ).shape == (2, 10)
    assert {type(m) for m in layers} <= {nn.Conv2d, nn.Linear, nn.Flatten, type(study.ACTS[act])}


@pytest.mark.parametrize("net", study.NETS)
def test_other_nets_take_digits(net):
    assert study.NETS[net]()(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_what_was_run_is_not_run_again(tmp_path, monkeypatch, capsys):
    runs = [study.Run("table", "relu", 5, 4, init, 1e-3, 1, 0) for init in ("default", "LSUV mirrored")]
    monkeypatch.setattr(study, "CSV", tmp_path / "study.csv")
    monkeypatch.setattr(study, "runs", lambda full=False: runs[:1])
    study.study(workers=1)
    first = study.CSV.read_text()
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda workers, context, settle: ThreadPoolExecutor(workers))
    monkeypatch.setattr(study, "runs", lambda full=False: runs)
    study.study(workers=1)
    assert study.CSV.read_text().startswith(first) and not study.remaining(full=False)
    df = study.read()
    assert list(df.init) == ["default", "LSUV mirrored"] and df.accuracy.between(0, 1).all()
    assert "1 runs to make" in capsys.readouterr().out
    study.study(workers=1)
    assert len(study.read()) == 2


def test_a_run_is_the_same_each_time():
    run = study.Run("table", "tanh", 5, 4, "LSUV", 3e-3, 1, 7)
    a, b = study.train(run), study.train(run)
    assert a["accuracy"] == b["accuracy"] and a["steps"] == b["steps"]


def results():
    """For one initialisation accuracy rises from .2 to .8 over two decades, for the other it is .5 throughout; one seed
    is .1 above, one below."""
    rows = [
        dict(
            net="relu", init=init, lr=lr, seed=seed, accuracy=acc + (seed - 1) * 0.1, steps=steps if acc > 0.3 else None
        )
        for init, accs in {"LSUV": [0.2, 0.5, 0.8], "default": [0.5, 0.5, 0.5]}.items()
        for lr, acc, steps in zip([1e-3, 1e-2, 1e-1], accs, [90, 60, 30])
        for seed in range(3)
    ]
    return pd.DataFrame(rows)


def test_tables():
    best, area = study.best(results()), study.area(results())
    row = best.loc["relu", "LSUV"]
    np.testing.assert_allclose(
        row[["lr", "median", "low", "high", "runs", "steps"]].astype(float), [0.1, 0.8, 0.7, 0.9, 3, 30]
    )
    assert area["relu", "LSUV"] == pytest.approx(0.5) and area["relu", "default"] == pytest.approx(0.5)


def test_figures():
    df = results().assign(depth=17, part="table")
    ax = study.plot_table(df).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["default", "LSUV"] and [t.get_text() for t in ax.texts] == [
        ".50",
        ".80",
    ]
    (ax,) = study.plot_depth(df).axes
    assert ax.get_title() == "relu"


@pytest.mark.parametrize("table", study.tables(), ids=["plain", "norms", "deep"])
def test_the_page_s_tables_are_what_the_study_prints(table):
    assert table in (study.HERE.parent / "docs" / "when_it_helps.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "act, depth, width, least",
    [
        ("sigmoid", 17, 24, 0.9),
        ("relu", 100, 24, 0.95),
        ("relu", 100, 25, 0.94),
        ("leaky 1/3", 100, 24, 0.95),
        ("tanh", 100, 24, 0.95),
    ],
)
def test_the_recorded_depths_hold_for_every_seed(act, depth, width, least):
    runs = study.read().query('part == "deep" and net == @act and depth == @depth and width == @width')
    assert len(runs) >= 3 and runs.accuracy.min() >= least


def test_bounded_branches_undo_the_harm_where_no_norm_holds_them():
    norms = study.read().query('part == "norms"')
    for net in ("xresnet, no norm in blocks", "100 residual blocks, no norm"):
        runs = norms[norms.net == net]
        steps = runs.assign(steps=runs.steps.fillna(np.inf)).groupby(["lr", "init"]).steps.median().unstack()
        assert (
            len(steps) >= 3
            and (steps["LSUV residual"] < steps["LSUV"]).all()
            and (steps["default"] < steps["LSUV"]).all()
        )
        area = study.area(runs)[net]
        assert area["LSUV residual"] > area["LSUV"] + 0.01 and area["LSUV residual"] == pytest.approx(
            area["default"], abs=0.015
        )


@pytest.mark.slow
@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_a_hundred_plain_layers_train(act):
    assert study.train(study.Run("deep", act, 100, 16, "LSUV mirrored", 1e-3, 2, 3))["accuracy"] > 0.8
