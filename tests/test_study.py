"""The study in nbs/: nothing is run twice, its networks are what the tables call them, and its numbers are right."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.layers import flatten_model
from matplotlib.colors import to_hex
from test_data import idx
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "nbs"))
import study
import study_figures as figures
import study_networks
import study_results as results

from fastai_lsuv.data import fashion_dls
from fastai_lsuv.demo import ACTIVATIONS
from fastai_lsuv.plots.palette import LOOKS


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "The study on 600 random images in whose corner stands the class, and its results in a file of their own."
    rng = np.random.default_rng(0)
    for part, n in (("train", 320), ("t10k", 280)):
        labels = np.arange(n) % 10
        images = rng.integers(0, 256, (n, 28, 28))
        images[np.arange(n), :14, :14] = labels[:, None, None] * 25
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    dls = fashion_dls(tmp_path, size=14, n_train=320, bs=32)
    monkeypatch.setattr(study, "data", lambda: dls)
    monkeypatch.setattr(study, "CSV", tmp_path / "study.csv")
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda workers, context, settle: ThreadPoolExecutor(workers))


def run(net="plain CNN", act="relu", depth=5, width=4, init="LSUV", lr=1e-3, seed=0):
    return study.Run(net, act, depth, width, init, lr, seed)


def test_the_full_study_contains_the_short_one():
    short, full = list(study.runs()), list(study.runs(full=True))
    assert len(short) == len(set(short))
    assert len(full) == len(set(full))
    assert set(short) < set(full)


def test_it_is_about_as_many_networks_as_it_says():
    assert len({(r.net, r.act, r.depth, r.width, r.init) for r in study.runs()}) > 300


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("depth", [5, 17])
def test_plain_nets_have_their_layers_and_nothing_else(act, depth):
    net = study_networks.plain_cnn(act, depth, 8)
    layers = flatten_model(net)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in layers) == depth
    assert {type(m) for m in layers} <= {nn.Conv2d, nn.Linear, nn.Flatten, ACTIVATIONS[act]}


@pytest.mark.parametrize("block", study.BLOCKS, ids=lambda block: block[0])
def test_nets_take_the_images(block):
    net, acts, depths, width, _, _ = block
    model = study_networks.NETS[net](acts[0], depths[0], width)
    assert model(torch.randn(2, 1, 14, 14)).shape == (2, 10)


@pytest.mark.parametrize("net, depth", [("MLP", 17), ("residual CNN", 17), ("CNN with batch norm", 17)])
def test_depth_is_the_number_of_layers_with_weights(net, depth):
    layers = study_networks.NETS[net]("relu", depth, 8).modules()
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in layers) == depth


@pytest.mark.parametrize("init", ["default", *study.CLASSICAL, *study.LSUV])
def test_what_is_measured_and_reached(init, tiny):
    net = "residual CNN" if init == "LSUV residual" else "plain CNN"
    found = study.train(run(net, init=init, lr=1e-2))
    assert list(found) == study.COLUMNS
    assert (found["n_layers"], found["has_norms"]) == (5, False)
    assert 0 < found["left"] <= 1
    assert 0 <= found["accuracy"] <= 1
    if init == "LSUV":
        assert found["std"] == pytest.approx(1, abs=1e-3)


def test_what_was_run_is_not_run_again(tiny, monkeypatch, capsys):
    all_runs = [run(init=init) for init in ("default", "LSUV mirrored")]
    monkeypatch.setattr(study, "runs", lambda full=False: all_runs[:1])
    study.study(workers=1)
    first = study.CSV.read_text()
    monkeypatch.setattr(study, "runs", lambda full=False: all_runs)
    study.study(workers=1)
    assert study.CSV.read_text().startswith(first)
    assert not study.remaining(full=False)
    assert list(study.read().init) == ["default", "LSUV mirrored"]
    assert "1 runs to make" in capsys.readouterr().out
    study.study(workers=1)
    assert len(study.read()) == 2


def test_a_run_is_the_same_each_time(tiny):
    a, b = (study.train(run(act="tanh", lr=3e-3, seed=7)) for _ in range(2))
    a.pop("seconds"), b.pop("seconds")
    assert a == b


# --- what comes out ---------------------------------------------------------------------------------------------------


def outcomes():
    """Two cells: in one LSUV reaches .8 at the better rate, default .1; in the other both .6. Seeds differ by .01."""
    reached = {("relu", "LSUV"): 0.8, ("relu", "default"): 0.1, ("tanh", "LSUV"): 0.6, ("tanh", "default"): 0.6}
    rows = [
        dict(act=act, init=init, lr=lr, seed=seed, accuracy=accuracy - slower + seed / 100)
        for (act, init), accuracy in reached.items()
        for lr, slower in [(1e-3, 0.0), (3e-3, 0.05)]
        for seed in range(3)
    ]
    df = pd.DataFrame(rows).assign(net="plain CNN", depth=17, width=16, has_norms=False, std=1.0, growth=1.0)
    fails = df.accuracy < 0.3
    verdict = np.where(fails, "signal lost from 3 on", "healthy")
    return df.assign(signal=np.where(fails, 0.01, 0.5), left=np.where(fails, 0.01, 0.5), verdict=verdict)


def test_each_initialisation_counts_at_its_better_rate():
    best = results.at_best_rate(outcomes())
    assert set(best.lr) == {1e-3}
    assert len(best) == 12


def test_intervals_are_those_of_seeds_and_of_images():
    one, three = pd.Series([0.5]), pd.Series([0.4, 0.5, 0.6])
    assert results.interval(one) == pytest.approx(1.96 * 0.5 / 100)
    assert results.interval(three) == pytest.approx(np.hypot(0.0098, 4.3027 * 0.1 / 3**0.5), rel=1e-3)
    assert results.with_interval(one) == "50.0 ± 1.0"


def test_tables_have_means_and_intervals():
    table = results.table(outcomes(), "act")
    assert list(table.index) == ["default", "LSUV"]
    assert table.loc["LSUV", "relu"].startswith("81.0 ± ")
    assert results.markdown(table, "layers").splitlines()[0] == "| layers | relu | tanh |"


def test_comparisons_are_paired():
    rng = np.random.default_rng(0)
    df = outcomes()
    df.accuracy += rng.normal(0, 1e-4, len(df))
    found = results.compared(df, "LSUV", "default")
    assert (found["pairs"], round(found["points"])) == (6, 35)
    assert found["low"] < 35 < found["high"]
    assert results.compared(df[df.act == "relu"], "LSUV", "default")["p"] < 1e-4
    assert results.compared(df[df.act == "tanh"], "LSUV", "default")["p"] > 0.01


def test_failing_is_under_half_of_the_best_of_its_kind():
    found = results.networks(outcomes())
    assert len(found) == 12
    assert set(found[found.fails].init + found[found.fails].act) == {"defaultrelu"}
    assert results.roc_auc(found)["signal, spread and gradient"] == 1
    assert results.verdicts(found).fail.to_dict() == {"healthy": 0, "signal lost": 3}


def test_auto_is_held_against_the_best_by_hand():
    df = outcomes()
    auto = df[df.init == "LSUV"].assign(init="LSUV auto", accuracy=lambda d: d.accuracy - 0.02)
    cells = results.against(pd.concat([df, auto]))
    assert (cells.best - cells["LSUV auto"]).round(3).tolist() == [0.02, 0.02]
    assert cells.loc[("plain CNN", "relu")].by.item() == "LSUV"


def words(fig):
    return " ".join(t.get_text() for t in fig.findobj(plt.Text))


def test_the_signal_is_on_a_log_axis_that_says_so():
    fig = figures.plot_signal(results.networks(outcomes()))
    assert fig.axes[0].get_xscale() == "log"
    assert fig.axes[0].get_xlabel().endswith("(log)")
    assert "9 of 9 networks called healthy train, 0 of 3 called otherwise" in words(fig)


def test_the_map_has_a_number_in_each_field():
    fig = figures.plot_table(outcomes())
    assert [t.get_text() for t in fig.axes[0].texts] == [".11", ".61", ".81", ".61"]
    assert "17 plain layers: of 2 activations train 1 with default, 2 with LSUV" in words(fig)


def test_depth_has_a_panel_for_each_activation_with_chance_in_it():
    fig = figures.plot_depth(outcomes())
    assert [ax.get_title() for ax in fig.axes] == ["relu", "tanh"]
    assert all(0.1 in line.get_ydata() and line.get_label() == "chance" for ax in fig.axes for line in ax.lines[:1])
    assert "17 plain layers: 36% with default, 71% with LSUV" in words(fig)


def test_one_way_to_initialise_has_one_colour():
    lines = {c.get_label(): c for ax in figures.plot_depth(outcomes()).axes for c in ax.containers}
    assert {name: to_hex(bars[0].get_color()) for name, bars in lines.items()} == {
        name: LOOKS[name].color.lower() for name in ("default", "LSUV")
    }


# --- what was found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, name", [*enumerate(["plain", "depth", "others"])])
def test_the_tables_in_the_documentation_are_what_the_study_prints(number, name):
    page = study.CSV.parent.parent / "docs" / "when_it_helps.md"
    assert results.tables()[number] in page.read_text(encoding="utf-8")


def test_every_run_of_the_short_study_is_there():
    assert not study.remaining(full=False)


def test_signal_and_gradient_tell_what_trains():
    found = results.networks(study.read())
    assert len(found) >= 200
    assert results.roc_auc(found)["after LSUV"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_a_hundred_plain_layers_train(act):
    pytest.importorskip("torchvision")
    try:
        study.data()
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])
    assert study.train(run(act=act, depth=100, width=16, init="LSUV auto", lr=3e-4, seed=3))["accuracy"] > 0.6
