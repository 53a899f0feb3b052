"""Reading a recorder: its frame, fastai's interface, thinning, and figures."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.hook import ActivationStats
from fastcore.foundation import L
from feeds import loaders
from learners import learner, small_cnn
from matplotlib.figure import Figure
from models import mlp, rows
from recorded import fed
from torch import nn
from witness import records

from fastai_lsuv import ActivationStatsRecorder
from fastai_lsuv.recording.description import HIST_BINS, HIST_RANGE

ALL = dict(with_hist=True, with_grad=True, valid=True)


def recorded(*epochs, model=None, tmp_path=".", cbs=(), **options):
    learn = learner(
        loaders(), model or small_cnn(), path=tmp_path, cbs=[rec := ActivationStatsRecorder(**options), *cbs]
    )
    for n in epochs or (2,):
        learn.fit(n)
    return rec


# --- fastai's interface, beside fastai's own --------------------------------------------------------------------------


class Theirs(ActivationStats):
    "fastai's, which forgets at each fit; only for one."


@pytest.fixture(scope="module")
def beside():
    model = small_cnn()
    layers = [model[0][0], model[0][1], model[1][0], model[1][1], model[1][3]]
    theirs = Theirs(modules=layers, with_hist=True)
    return recorded(2, model=model, modules=layers, cbs=[theirs], with_hist=True), theirs, layers


def test_stats_as_fastai_s(beside):
    ours, theirs, _ = beside
    assert isinstance(ours.stats, L) and len(ours.stats) == len(theirs.stats) == 6
    for mine, other in zip(ours.stats, theirs.stats):
        assert len(mine) == len(other) == 5
        for a, b in zip(mine, other):
            for key in ("mean", "std"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5)
            assert isinstance(a["mean"], float)


def test_near_zero_is_of_the_absolute_value(beside):
    "fastai's counts all that is below, negative values, too; they agree where there are none."
    ours, theirs, layers = beside
    for i, layer in enumerate(layers):
        a, b = (np.array(o.layer_stats(i)[2]) for o in (ours, theirs))
        assert a.shape == b.shape == (6,)
        if isinstance(layer, nn.ReLU):
            assert np.allclose(a, b, atol=0.03 if i < 2 else 1e-6), "the first one is sampled"
        else:
            assert (a < b).all()


def test_layer_stats_as_fastai_s(beside):
    ours, theirs, _ = beside
    for i in (*range(5), -1):
        a, b = ours.layer_stats(i), theirs.layer_stats(i)
        assert isinstance(a, L) and len(a) == len(b) == 3
        for x, y in zip(a[:2], b[:2]):
            assert np.allclose(list(x), list(y), rtol=1e-4, atol=1e-5)
        assert [*map(list, ours.layer_stats(ours.layer_names[i]))] == [*map(list, a)]


def test_hist_as_fastai_s(beside):
    "A column a record, log1p of counts; half of its bins are those of fastai's from 0 to 5, but the last one is open."
    ours, theirs, _ = beside
    assert (HIST_BINS, tuple(HIST_RANGE)) == (40, (-5.0, 5.0))
    for i in range(5):
        a, b = ours.hist(i), theirs.hist(i)
        assert a.shape == b.shape == (40, 6) and a.dtype == b.dtype == torch.float32
        assert torch.equal(a, ours.hist(ours.layer_names[i]))
        a, b = a[20:39], b[:19]
        if i < 2:
            assert ((a.expm1() - b.expm1()).abs().sum(0) <= 0.1 * b.expm1().sum(0)).all(), "sampled"
        else:
            torch.testing.assert_close(a, b)


def test_hist_of_known_values():
    class Knows(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.out = nn.Parameter(torch.zeros(())), nn.Identity()

        def forward(self, x):
            return self.out(x).mean() + self.w

    x = torch.tensor([0.0, 0.1, 0.26, -0.26, 3.1, -9.9, 9.99, -0.01]).view(8, 1)
    rec, _ = fed(Knows(), x, batches=1, modules="out", with_hist=True)
    counts = rec.hist("out").expm1().round().int()[:, 0]
    want = torch.zeros(40, dtype=torch.int)
    for i, n in {0: 1, 18: 1, 19: 1, 20: 2, 21: 1, 32: 1, 39: 1}.items():
        want[i] = n
    assert torch.equal(counts, want)


def test_histograms_of_sampled_outputs_keep_their_scale():
    "As many values as fastai would count, to a few per cent: layers of all sizes are on one scale."
    x = torch.randn(64, 3, 32, 32).abs()
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())
    theirs = ActivationStats(modules=[model[1]], with_hist=True)
    rec, _ = fed(model, x, batches=1, cbs=[theirs], modules=[model[1]], with_hist=True)
    a, b = (o.hist(0).as_subclass(torch.Tensor).expm1().flatten() for o in (rec, theirs))
    a, b = a[20:], b[:20]
    assert a.sum().item() == pytest.approx(b.sum().item(), rel=0.01)
    assert (a - b).abs().sum() <= 0.1 * b.sum()


def test_training_records_only():
    rec = recorded(2, **ALL)
    assert len(rec.stats) == len(rec.layer_stats(0)[0]) == rec.hist(0).shape[1] == 6
    assert len(records(rec, "valid")) == 6


def test_readable_in_the_middle_of_a_fit():
    "What came before the batch at hand."
    from fastai.vision.all import Callback

    class Reads(Callback):
        order = 99

        def __init__(self):
            self.seen = []

        def before_batch(self):
            self.seen.append((len(rec.stats), len(records(rec)), rec.hist(0).shape[1], len(rec.summary())))

    learn = learner(loaders(), cbs=[rec := ActivationStatsRecorder(with_hist=True), reads := Reads()])
    learn.fit(1)
    assert [s[:3] for s in reads.seen] == [(n, n, n) for n in (0, 1, 2, 3, 3, 3)]
    assert [s[3] for s in reads.seen] == [0, *[7] * 5]


# --- errors -----------------------------------------------------------------------------------------------------------


READERS = ["layer_stats", "hist", "color_dim", "plot_layer_stats"]


@pytest.mark.parametrize("reader", READERS)
def test_a_layer_that_is_not_there(reader):
    rec = recorded(1, with_hist=True)
    with pytest.raises((KeyError, ValueError), match=r"0\.0") as e:
        getattr(rec, reader)("0.0x")
    assert "0.0x" in str(e.value)
    for i in (7, -8):
        with pytest.raises((IndexError, ValueError), match=str(i)):
            getattr(rec, reader)(i)


@pytest.mark.parametrize(
    "read",
    [lambda rec: rec.hist(0), lambda rec: rec.color_dim(0), lambda rec: rec.color_dim(), lambda rec: rec.dead_chart()],
    ids=["hist", "color_dim", "all", "dead_chart"],
)
def test_histograms_that_were_not_asked_for(read):
    rec = recorded(1)
    try:
        read(rec)
    except ValueError as e:
        assert "with_hist=True" in str(e)
    else:
        assert isinstance(read(rec), Figure), "only the dead chart can do without"


# --- thinning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_records", [1, 2, 3, 4, 5, 10, 11])
@pytest.mark.parametrize("options", [{}, dict(every=2), dict(with_hist=True)], ids=str)
def test_every_other_old_record_goes_and_the_newest_stays(max_records, options):
    every = options.get("every", 1)
    rec, seen = fed(mlp(10, 4, 3), rows(4), batches=57, max_records=max_records, **options)
    steps = [*rec.to_frame().step.unique()]
    assert 1 <= len(steps) <= max_records
    assert max_records == 1 or len(steps) >= max_records // 2
    assert steps[-1] == 56 // every * every, "the newest"
    gaps = np.diff(steps)
    spacing = gaps[0] if len(gaps) > 1 else every
    if len(gaps) > 1:
        assert (gaps[:-1] == spacing).all() and gaps[-1] <= spacing, "evenly spaced, but for the newest"
    assert np.log2(spacing / every) % 1 == 0, "doubled"
    for got, step in zip(records(rec), steps):
        for layer in got:
            assert got[layer] == pytest.approx(seen[step][layer][:3], rel=1e-4, abs=1e-5)


def test_the_bound_is_each_layer_s_and_of_both_phases():
    rec = recorded(10, max_records=8, valid=True)
    counts = rec.to_frame().groupby(["layer", "phase"]).size()
    assert (counts <= 8).all() and len(counts) == 14


class Spikes(nn.Module):
    "Puts out another scale at one step."

    def __init__(self, at):
        super().__init__()
        self.fc, self.n, self.at = nn.Linear(10, 4), 0, at

    def forward(self, x):
        self.n += 1
        return self.fc(x) * ({self.at: 1e3, self.at + 7: 1e-3}.get(self.n - 1, 1))


def test_running_extremes_survive_thinning():
    rec, seen = fed(Spikes(13), rows(), batches=50, modules=lambda m: [m], max_records=4)
    (name,) = rec.layer_names
    row, stds, zeros = rec.summary().loc[name], *([s[name][i] for s in seen] for i in (1, 2))
    assert not {13, 20} & {*rec.to_frame().step}, "else it is no test"
    assert (
        row.max_std == pytest.approx(max(stds), rel=1e-3)
        and row.min_std == pytest.approx(min(stds), rel=1e-3)
        and row.max_near_zero == pytest.approx(max(zeros), abs=1e-3)
    )
    assert row.first_std == pytest.approx(stds[0], rel=1e-3) and row.last_std == pytest.approx(stds[-1], rel=1e-3)


# --- figures ----------------------------------------------------------------------------------------------------------


def many(n, fits=(2,), **options):
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(10, 10), nn.ReLU()) for _ in range(n // 2)]
    learn = learner(
        loaders(),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10), *layers, nn.Linear(10, 10)),
        cbs=[rec := ActivationStatsRecorder(**options)],
    )
    for f in fits:
        learn.fit(f)
    return rec


PLOTS = {
    "plot_stats": lambda rec: rec.plot_stats(),
    "color_dim": lambda rec: rec.color_dim(),
    "dead_chart": lambda rec: rec.dead_chart(),
    "color_dim of one": lambda rec: rec.color_dim(0),
    "plot_layer_stats": lambda rec: rec.plot_layer_stats(-1),
}


@pytest.mark.parametrize("n", [5, 30])
@pytest.mark.parametrize("plot", PLOTS)
def test_figures(plot, n, tmp_path):
    "Each names its axes, marks the epochs, fits on a screen, can be saved, and leaves pyplot's settings alone."
    rec = many(n, with_hist=True, with_grad=True, valid=True)
    rc, numbers = dict(matplotlib.rcParams), plt.get_fignums()
    fig = PLOTS[plot](rec)
    assert isinstance(fig, Figure)
    assert dict(matplotlib.rcParams) == rc and len(plt.get_fignums()) == len(numbers) + 1, "as fastai's, of pyplot"
    fig.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 2000
    width, height = fig.get_size_inches()
    assert width <= 20 and height <= 40
    words = " ".join(t.get_text() for t in fig.findobj(matplotlib.text.Text)).lower()
    if plot != "color_dim of one":
        assert any(ax.get_xlabel() for ax in fig.axes) or fig.get_supxlabel(), "the horizontal axis has a name"
    assert "step" in words or "batch" in words or "record" in words or plot == "color_dim of one"
    for legend in [ax.get_legend() for ax in fig.axes if ax.get_legend()] + fig.legends:
        assert len(legend.get_texts()) <= 12, "no legend of 30 colours"


@pytest.mark.parametrize("plot", [*PLOTS][:3])
def test_all_layers_are_there_by_name(plot):
    rec = many(5, with_hist=True)
    words = [t.get_text() for t in PLOTS[plot](rec).findobj(matplotlib.text.Text)]
    for name in rec.layer_names:
        assert any(name in w for w in words), name


def test_epochs_are_marked():
    one, three = (many(5, fits=(n,), with_hist=True) for n in (1, 3))

    def marks(rec):
        return sum(len(ax.lines) + len(ax.collections) + len(ax.texts) for ax in rec.plot_stats().axes)

    assert marks(three) > marks(one)


@pytest.mark.parametrize("plot", PLOTS)
def test_figures_of_odd_histories(plot):
    "Nothing yet, one record, exploded values, a layer that never ran."
    empty = ActivationStatsRecorder(with_hist=True)
    try:
        assert isinstance(PLOTS[plot](empty), Figure)
    except (ValueError, IndexError) as e:
        assert "record" in str(e) or "layer" in str(e)

    def bad(m):
        with torch.no_grad():
            m[0][0].weight.mul_(float("nan")), m[1][3].bias.mul_(float("inf"))
        return m

    for rec in (recorded(1, max_records=1, with_hist=True), recorded(1, model=bad(small_cnn()), with_hist=True)):
        PLOTS[plot](rec).canvas.draw()
