"""`LSUVReport`: rows in execution order, also by name; table, HTML, frame, figure; plain numbers that pickle."""

import math
import os
import pickle
import pickletools
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from checks import STATUSES
from matplotlib.figure import Figure
from models import Backwards, convnet, images, mlp, rows
from torch import nn

from fastai_lsuv import LSUVReport, lsuv_
from fastai_lsuv.report import Row

COLUMNS = [
    *("name", "type", "n_calls", "mean_before", "std_before", "mean_after", "std_after", "n_iter", "status", "reason"),
    *("signal_before", "signal_after", "spread_after", "grad_after"),
]
GOLDEN = Path(__file__).parent / "golden"
NAN = float("nan")


def row(name, kind, n_calls, moments, signal=(NAN,) * 4, n_iter=0, status="unchanged", reason=""):
    return Row(name, kind, n_calls, *moments, n_iter, status, reason, *signal)


def made_up():
    "A report of all that can be in one; numbers do not depend on any arithmetic."
    frozen = (0.3, 0.31, 0.8, 1.0)
    rows = [
        row(
            "0.conv",
            "Conv2d",
            1,
            (0.0123456, 0.2345678, 1.2e-9, 1.0000001),
            (0.6789, 0.6543, 0.75, 12.345),
            1,
            "corrected",
        ),
        row(
            "0.up.conv",
            "ConvTranspose2d",
            1,
            (-3.5e-6, 4.25e-8, -2e-8, 0.9999999),
            (1.23e-8, 0.5, 0.6, 0.0021),
            1,
            "corrected",
        ),
        row(
            "block",
            "Sequential",
            1,
            (123456.0, 98765.4, 0.5641, 1.0002),
            (0.1, 0.2, 0.9, 123456.0),
            4,
            "corrected",
            "one sign, mean kept",
        ),
        row("shared", "Linear", 3, (0.1, 0.2, 0.0123, 0.9), n_iter=10, status="not_converged"),
        row("there", "Linear", 1, (0.0, 1.0, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0)),
        row("head", "Linear", 1, (0.5, 0.25, 0.5, 0.25), frozen, 0, "skipped", "frozen"),
        row("body.0", "Linear", 1, (0.5, 0.25, 0.4, 0.2), frozen, 0, "skipped", "frozen"),
        row("aux", "Linear", 0, (NAN,) * 4, status="skipped", reason="never called"),
    ]
    return LSUVReport(rows, n_forward=13, seconds=1.25, verdict="signal lost from shared on", remedy="some remedy")


@pytest.fixture(scope="module")
def real():
    net = convnet()
    net[2].weight.requires_grad_(False)
    return lsuv_(net, images())


def test_it_is_a_sequence_also_by_name(real):
    assert isinstance(real, Sequence)
    assert len(real) == len(list(real)) == 5
    assert real[0] is real["0"]
    assert real[-1] is real[len(real) - 1] is real["10"]
    assert [row.name for row in real[1:3]] == ["2", "4"]
    assert real[0] in real
    with pytest.raises(KeyError, match="nonsense"):
        real["nonsense"]
    with pytest.raises(IndexError):
        real[99]


def test_a_row_has_the_design_s_fields_as_plain_values(real):
    for row in real:
        for name, kind in zip(COLUMNS, (str, str, int, *[float] * 4, int, str, str, *[float] * 4), strict=True):
            assert type(getattr(row, name)) is kind, name
        assert row.status in STATUSES
    assert type(real.seconds) is float
    assert real.seconds > 0
    assert type(real.n_forward) is int
    assert real.converged is True


def test_names_are_those_of_the_model():
    net = Backwards()
    modules = dict(net.named_modules())
    for row in lsuv_(net, rows()):
        assert type(modules[row.name]).__name__ == row.type


def test_frame(real):
    frame = real.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == COLUMNS
    assert list(frame["name"]) == [row.name for row in real]
    assert frame["std_after"].dtype == float
    assert list(LSUVReport([], 1, 0.0).to_frame().columns) == COLUMNS


def test_pickles_without_a_tensor_or_a_module(real):
    raw = pickle.dumps(real)
    again = pickle.loads(raw)
    assert (repr(again), again.n_forward, again.seconds) == (repr(real), real.n_forward, real.seconds)
    names = {arg for op, arg, _ in pickletools.genops(raw) if isinstance(arg, str)}
    assert not [n for n in names if n.startswith("torch")]
    assert len(raw) < 200 * (len(real) + 3)


def test_status_counts(real):
    assert [row.status for row in real].count("skipped") == 1
    assert real["2"].n_iter == 0
    assert real["0"].n_iter == 1
    assert made_up().converged is False


@pytest.mark.parametrize(
    "option,value",
    [
        ("display.max_rows", 4),
        ("display.width", 20),
        ("display.max_columns", 2),
        ("display.max_colwidth", 5),
        ("display.precision", 1),
    ],
)
def test_the_table_does_not_depend_on_pandas_settings(option, value):
    text, markup = repr(made_up()), made_up()._repr_html_()
    with pd.option_context(option, value):
        assert (repr(made_up()), made_up()._repr_html_()) == (text, markup)


def test_the_table_is_aligned(real):
    lines = repr(real).splitlines()
    head = next(line for line in lines if "status" in line and "name" in line)
    body = [line for line in lines if "Conv2d" in line or "Linear" in line]
    assert len(body) == len(real)
    at = head.index("status")
    assert {line[at:].split()[0] for line in body} == {row.status for row in real}
    assert {line[at - 1] for line in body} == {" "}
    assert "frozen" in repr(real)


def test_html_escapes_names():
    report = LSUVReport([Row("a<b>", "My<Type>", 1, 0.0, 1.0, 0.0, 1.0, 0, "unchanged", "")], 3, 0.1)
    markup = report._repr_html_()
    assert "<table" in markup
    assert "a&lt;b&gt;" in markup
    assert "<b>" not in markup
    assert "<Type>" not in markup


def test_golden_table():
    "The printed report, letter by letter; UPDATE_GOLDEN=1 writes it anew."
    for name, report in dict(report=made_up(), empty=LSUVReport([], n_forward=1, seconds=0.125)).items():
        golden(f"{name}.txt", repr(report) + "\n")
    golden("report.html", made_up()._repr_html_() + "\n")


def golden(name, text):
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(text, encoding="utf-8")
    assert text == (GOLDEN / name).read_text(encoding="utf-8")


# --- the figure -------------------------------------------------------------------------------------------------------


def many(n):
    "A signal that dies by decades, brought to 1."
    rows = [
        Row(
            f"layers.{i}.conv",
            "Conv2d",
            1,
            0.1 * 0.3**i,
            0.5**i,
            0.0,
            1.0,
            1,
            "corrected",
            "",
            0.7**i,
            0.9**i,
            0.75,
            2.0,
        )
        for i in range(n)
    ]
    return LSUVReport(rows, n_forward=3, seconds=0.1)


@pytest.mark.parametrize(
    "report",
    [made_up, lambda: many(1), lambda: many(5), lambda: many(150), lambda: LSUVReport([], 1, 0.0)],
    ids=["mixed", "1", "5", "150", "empty"],
)
def test_the_figure_draws(report, tmp_path):
    figure = report().plot()
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5_000


@pytest.mark.parametrize("n", [5, 150])
def test_the_figure_is_readable(n):
    "Before beside after, mean and std; log scale where the signal spans decades; labels that do not overlap."
    figure = many(n).plot()
    figure.canvas.draw()
    words = " ".join(t.get_text().lower() for t in figure.findobj(plt.Text))
    assert all(w in words for w in ("before", "after", "mean", "std"))
    assert "log" in {ax.get_yscale() for ax in figure.axes} | {ax.get_xscale() for ax in figure.axes}
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            boxes = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
            boxes.sort(key=lambda b: (b.x0, b.y0))
            assert not [1 for a, b in zip(boxes, boxes[1:]) if a.shrunk(0.8, 0.6).overlaps(b.shrunk(0.8, 0.6))]


def test_every_layer_is_in_the_figure():
    report = many(20)
    drawn = [len(line.get_ydata()) for line in report.plot().findobj(plt.Line2D)]
    assert drawn.count(20) >= 4


def test_plotting_changes_no_numbers(real):
    text = repr(real)
    real.plot()
    assert repr(real) == text


# --- the one line -----------------------------------------------------------------------------------------------------


def test_nan_rows_do_not_break_a_number():
    text = repr(made_up())
    assert not re.search(r"\bnan\b.*→|→.*\bnan\b", text)
    assert math.isnan(made_up()["aux"].std_after)


def test_a_report_of_a_model_that_is_one_layer():
    report = lsuv_(nn.Linear(10, 4), rows())
    assert len(report) == 1
    assert report[0].type == "Linear"
    assert "Linear" in repr(report)


def test_seconds_and_passes_are_said():
    report = lsuv_(mlp(10, 8, 3), rows())
    assert report.n_forward == 3
    assert f"{report.seconds:.2f}" in repr(report)


@pytest.mark.parametrize(
    "mean,std,told",
    [(0.0, 1.0, ["mean", "std"]), (None, 1.0, ["std"]), (0.0, None, ["mean"]), (None, None, ["mean", "std"])],
)
def test_the_line_judges_what_was_asked_for(mean, std, told):
    "What was left alone has neither got better nor worse; a mere measurement tells both."
    line = lsuv_(mlp(10, 8, 3), rows(), mean=mean, std=std).summary()
    assert re.findall(r"worst (\w+)", line) == told, line


class WithRNN(nn.Module):
    "An LSTM between two linear layers."

    def __init__(self):
        super().__init__()
        self.first, self.rnn, self.head = nn.Linear(10, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(self.first(x)[:, None])[0])


def test_the_summary_counts_what_was_done_and_names_what_was_not():
    line = lsuv_(WithRNN(), rows()).summary()
    assert line.startswith("LSUV: 2 corrected, 1 skipped (recurrent weights): rnn; worst mean "), line
    line = lsuv_(mlp(10, 8, 3), rows()).summary()
    assert line.startswith("LSUV: 2 corrected; worst mean "), line
