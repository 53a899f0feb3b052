"""The figures of activations over training: frames in, figures out, whatever was recorded."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fastai_lsuv.plots.curves import plot_layer, plot_runs, plot_stats
from fastai_lsuv.plots.maps import MAX_COLUMNS, plot_dead, plot_hist, plot_hists
from fastai_lsuv.plots.panels import MAX_POINTS

NAN, INF = float("nan"), float("inf")


def made(n_layers=5, n_records=40, every=1, per_epoch=20, fits=1, grads=False, near_zero=0.4):
    "A healthy run: `step` counts on over the fits, `epoch` begins anew in each."
    rng = np.random.default_rng(0)
    per_fit = -(-n_records // fits)
    rows = [
        dict(
            fit=r // per_fit,
            epoch=r % per_fit * every // per_epoch,
            step=r * every,
            phase="train",
            layer=f"layers.{i}.conv",
            mean=0.1 * rng.normal(),
            std=1 + 0.1 * rng.random(),
            near_zero=near_zero,
            grad_mean=1e-6 * rng.normal(),
            grad_std=1e-5,
        )
        for r in range(n_records)
        for i in range(n_layers)
    ]
    frame = pd.DataFrame(rows)
    return frame if grads else frame.drop(columns=["grad_mean", "grad_std"])


def validated(frame):
    "The same run with two validation batches at the end of each epoch."
    last = frame.groupby(["epoch", "layer"], as_index=False).last().assign(phase="valid")
    return pd.concat(
        [frame, last.assign(step=last.step + 1, mean=0.0), last.assign(step=last.step + 1, mean=1.0)], ignore_index=True
    )


def hists(n_layers=5, n_records=40, bins=40):
    rng = np.random.default_rng(0)
    return {f"layers.{i}.conv": np.log1p(rng.poisson(50.0, (bins, n_records))) for i in range(n_layers)}


def records(frame):
    return frame.loc[frame.phase == "train", ["fit", "epoch", "step"]].drop_duplicates()


def curves(ax):
    return [line for line in ax.lines if line.get_label().startswith("layers")]


def panels(fig):
    return [ax for ax in fig.axes if curves(ax)]


def words(fig):
    return " ".join(t.get_text() for t in fig.findobj(plt.Text))


def marks(ax):
    return sorted({line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1]})


def triangles(ax):
    return [
        (float(x), line.get_marker()) for line in ax.lines if line.get_marker() in ("^", "v") for x in line.get_xdata()
    ]


def drawn(fig):
    "The figure, really drawn; a warning is an error."
    assert isinstance(fig, Figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(fig).draw()  # the canvas that a plain `Figure` comes with draws nothing
    return fig


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 60])
def test_a_panel_a_quantity_and_a_curve_a_layer(n):
    fig = drawn(plot_stats(made(n)))
    assert [len(curves(ax)) for ax in panels(fig)] == [n, n, n]
    assert [ax.get_ylabel() for ax in panels(fig)] == ["mean of the output", "std of the output", "share near zero"]
    assert "step" in panels(fig)[-1].get_xlabel()
    frame = made(n)
    first = frame[frame.layer == "layers.0.conv"]
    for ax, quantity in zip(panels(fig), ("mean", "std", "near_zero")):
        np.testing.assert_array_equal(curves(ax)[0].get_xdata(), first["step"])
        np.testing.assert_array_equal(curves(ax)[0].get_ydata(), first[quantity])


def test_layers_are_in_the_order_in_which_they_appear():
    frame = made(3).replace({"layers.0.conv": "layers.z", "layers.1.conv": "layers.a"})
    assert [line.get_label() for line in curves(panels(plot_stats(frame))[0])] == [
        "layers.z",
        "layers.a",
        "layers.2.conv",
    ]


def test_gradients_have_panels_where_they_were_recorded():
    labels = [ax.get_ylabel() for ax in panels(drawn(plot_stats(made(grads=True))))]
    assert labels[3:] == ["mean of the gradient", "std of the gradient"]
    assert len(panels(drawn(plot_layer(made(grads=True), "layers.1.conv")))) == 5


def test_few_layers_are_told_apart_and_named_one_by_one():
    fig = drawn(plot_stats(made(5)))
    for ax in panels(fig):
        assert len({(line.get_color(), line.get_linestyle()) for line in curves(ax)}) == 5
        names = [t for t in ax.texts if t.get_text().startswith("layers")]
        assert {t.get_text() for t in names} == {f"layers.{i}.conv" for i in range(5)}
        boxes = sorted((t.get_window_extent() for t in names), key=lambda b: b.y0)
        assert not [1 for a, b in zip(boxes, boxes[1:]) if a.shrunk(1, 0.9).overlaps(b.shrunk(1, 0.9))]
        assert fig.bbox.x1 >= max(b.x1 for b in boxes)


def test_ten_layers_with_the_same_numbers_have_names_that_do_not_overlap():
    fig = drawn(plot_stats(made(10).assign(mean=0.0, std=1.0)))
    for ax in panels(fig):
        boxes = sorted(
            (t.get_window_extent() for t in ax.texts if t.get_text().startswith("layers")), key=lambda b: b.y0
        )
        assert len(boxes) == 10
        assert not [1 for a, b in zip(boxes, boxes[1:]) if a.shrunk(1, 0.9).overlaps(b.shrunk(1, 0.9))]


def test_many_layers_are_coloured_by_depth_and_the_extremes_named():
    frame = made(60)
    frame.loc[frame.layer == "layers.17.conv", "std"] = 50.0
    fig = drawn(plot_stats(frame))
    for ax in panels(fig):
        light = [np.dot(to_rgb(line.get_color()), (0.2126, 0.7152, 0.0722)) for line in curves(ax)]
        assert (np.diff(light) > 0).all(), "depth must be seen in grey, too"
        assert light[-1] < 0.75, "too pale for white paper"
        assert len([t for t in ax.texts if t.get_text().startswith("layers")]) == 2
    assert "layers.17.conv" in {t.get_text() for t in panels(fig)[1].texts}
    bar = next(ax for ax in fig.axes if not curves(ax))
    names = [t.get_text() for t in bar.get_yticklabels()]
    assert (names[0], names[-1]) == ("layers.0.conv", "layers.59.conv")
    assert len(names) < 15


@pytest.mark.parametrize("low,high,scale", [(0.5, 1.5, "linear"), (1e-6, 1.0, "log"), (1.0, 1e6, "log")])
def test_std_is_on_a_log_axis_where_it_spans_decades(low, high, scale):
    frame = made(2).assign(std=lambda f: np.where(f.layer == "layers.0.conv", low, high))
    assert panels(drawn(plot_stats(frame)))[1].get_yscale() == scale


@pytest.mark.parametrize("mean,scale", [(0.3, "linear"), (5.0, "linear"), (1e5, "symlog"), (-1e5, "symlog")])
def test_mean_is_on_a_symlog_axis_where_it_is_wild(mean, scale):
    frame = made(2).assign(mean=lambda f: np.where(f.layer == "layers.0.conv", 0.1, mean))
    assert panels(drawn(plot_stats(frame)))[0].get_yscale() == scale


def test_the_share_is_always_on_the_whole_scale():
    ax = panels(drawn(plot_stats(made(near_zero=0.0))))[2]
    assert ax.get_ylim()[0] < 0 < 1 < ax.get_ylim()[1]
    assert "100%" in {t.get_text() for t in ax.get_yticklabels()}


def test_epochs_are_marked_and_numbered():
    fig = drawn(plot_stats(made(n_records=60)))
    for ax in panels(fig):
        assert marks(ax) == [0, 20, 40]
    assert [t.get_text() for t in panels(fig)[0].texts if not t.get_text().startswith("layers")] == [
        "epoch",
        "0",
        "1",
        "2",
    ]


def test_fits_are_marked_stronger_and_numbered():
    ax = panels(drawn(plot_stats(made(n_records=80, fits=2))))[0]
    assert marks(ax) == [0, 20, 40, 60]
    width = {line.get_xdata()[0]: line.get_linewidth() for line in ax.lines if list(line.get_ydata()) == [0, 1]}
    assert width[0] == width[40] > width[20] == width[60]
    assert [t.get_text() for t in ax.texts if not t.get_text().startswith("layers")] == [
        "epoch",
        "0",
        "1",
        "0",
        "1",
        "fit",
        "0",
        "1",
    ]


@pytest.mark.parametrize("fits", [1, 90])
def test_many_marks_are_thinned_out_evenly(fits):
    fig = drawn(plot_stats(made(2, 180, per_epoch=1 if fits == 1 else 2, fits=fits)))
    at = marks(panels(fig)[0])
    assert 10 <= len(at) <= 21
    assert np.ptp(np.diff(at)) <= 1
    numbers = [t.get_window_extent() for t in panels(fig)[0].texts if t.get_text().isdigit()]
    assert not [1 for i, a in enumerate(numbers) for b in numbers[:i] if a.overlaps(b)]


def test_the_beginning_of_a_fit_is_kept_before_that_of_an_epoch():
    frame = made(2, 100, per_epoch=1)
    frame["fit"] = (frame.step >= 37).astype(int)
    assert 37 in marks(panels(plot_stats(frame))[0])


def test_validation_is_circles_at_the_average_of_its_batches():
    fig = drawn(plot_stats(validated(made(2))))
    ax = panels(fig)[0]
    circles = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_linestyle() for line in circles] == ["None"] * 2
    np.testing.assert_allclose(circles[0].get_xdata(), [20, 40])
    np.testing.assert_allclose(circles[0].get_ydata(), [0.5, 0.5])
    assert [len(line.get_xdata()) for line in curves(ax)] == [40, 40]
    assert "validation" in panels(fig)[-1].get_xlabel()
    assert "validation" not in words(plot_stats(made(2)))


@pytest.mark.parametrize("value,mark", [(INF, "^"), (-INF, "v"), (NAN, None)])
def test_what_is_not_finite_is_a_triangle_or_a_gap_and_said(value, mark):
    frame = made(3)
    frame.loc[(frame.layer == "layers.1.conv") & (frame.step >= 25), "mean"] = value
    fig = drawn(plot_stats(frame))
    assert triangles(panels(fig)[0]) == ([(25.0, mark)] if mark else [])
    assert np.isfinite(panels(fig)[0].get_ylim()).all()
    assert "first not finite at step 25, in layers.1.conv" in words(fig)


def test_zero_on_a_log_axis_is_a_triangle_below():
    frame = made(3)
    frame.loc[frame.layer == "layers.0.conv", "std"] = 100.0
    frame.loc[(frame.layer == "layers.2.conv") & frame.step.between(10, 20), "std"] = 0.0
    assert triangles(panels(drawn(plot_stats(frame)))[1]) == [(10.0, "v")]


def test_a_layer_that_is_not_called_leaves_a_gap_and_is_no_news():
    frame = made(3)
    gap = (frame.layer == "layers.1.conv") & frame.step.between(10, 19)
    fig = drawn(plot_stats(frame[~gap]))
    assert np.isnan(curves(panels(fig)[0])[1].get_ydata()).sum() == 10
    frame.loc[gap, ["mean", "std", "near_zero"]] = NAN
    assert "not finite" not in words(drawn(plot_stats(frame))) + words(fig)


def test_thousands_of_records_are_medians_in_a_band_that_no_spike_escapes():
    frame = made(2, 3000)
    frame.loc[(frame.layer == "layers.1.conv") & (frame.step == 1234), "mean"] = 7.0
    for fig in (drawn(plot_stats(frame)), drawn(plot_layer(frame, "layers.1.conv"))):
        ax = panels(fig)[0]
        assert all(len(line.get_xdata()) <= MAX_POINTS for line in curves(ax))
        assert max(path.vertices[:, 1].max() for band in ax.collections for path in band.get_paths()) == 7.0
        assert "medians of 12 records" in words(fig)
    frame.loc[(frame.layer == "layers.1.conv") & (frame.step == 1500), "mean"] = INF
    assert len(triangles(panels(drawn(plot_stats(frame)))[0])) == 1


def test_records_may_be_thinned_and_unevenly_spaced():
    frame = made(3, 300)
    frame = frame[(frame.step % 8 == 0) | (frame.step > 280)]
    x = curves(panels(drawn(plot_stats(frame)))[0])[0].get_xdata()
    np.testing.assert_array_equal(x, frame["step"].unique())
    drawn(plot_dead(frame))


def test_one_layer_side_by_side():
    fig = drawn(plot_layer(validated(made(5)), "layers.3.conv"))
    assert [len(curves(ax)) for ax in panels(fig)] == [1, 1, 1]
    assert len({round(ax.get_position().y0, 2) for ax in panels(fig)}) == 1
    assert all(ax.get_ylabel() for ax in panels(fig))
    assert "layers.3.conv" in words(fig)
    with pytest.raises(ValueError, match=r"'layers.9'.*'layers.0.conv'"):
        plot_layer(made(2), "layers.9")


# --- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 60])
def test_the_dead_chart_has_a_row_a_layer_the_first_on_top(n):
    frame = made(n).assign(near_zero=lambda f: f.layer.str.extract(r"(\d+)")[0].astype(float) / 60)
    fig = drawn(plot_dead(frame))
    ax, bar = fig.axes
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), np.repeat(np.arange(n)[:, None] / 60, 40, axis=1), atol=1e-9)
    assert image.get_clim() == (0, 1)
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"layers.{i}.conv" for i in range(n)]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert marks(ax) == [0, 20]
    assert "step" in ax.get_xlabel()
    assert "near zero" in bar.get_ylabel()
    boxes = sorted((t.get_window_extent() for t in ax.get_yticklabels()), key=lambda b: b.y0)
    assert not [1 for a, b in zip(boxes, boxes[1:]) if a.shrunk(1, 0.8).overlaps(b.shrunk(1, 0.8))]


def test_the_dead_chart_says_how_many_are_dead():
    frame = made(5)
    frame.loc[frame.layer.isin(["layers.1.conv", "layers.2.conv"]) & (frame.step > 20), "near_zero"] = 0.97
    frame.loc[(frame.layer == "layers.2.conv") & (frame.step > 30), "near_zero"] = 1.0
    assert "at the end 2 above 90%, the most in layers.2.conv: 100%" in words(plot_dead(frame))


def test_the_dead_chart_is_of_training_and_leaves_gaps():
    frame = made(2)
    frame = validated(frame)[
        ~((frame.layer == "layers.1.conv") & (frame.step == 7)).reindex(range(len(validated(frame))), fill_value=False)
    ]
    values = np.ma.filled(drawn(plot_dead(frame)).axes[0].images[0].get_array(), NAN)
    assert values.shape == (2, 40)
    assert np.argwhere(np.isnan(values)).tolist() == [[1, 7]]


def test_a_gap_is_hatched_and_has_no_colour_of_the_map_s():
    gap = drawn(plot_dead(made(2).query('layer == "layers.0.conv" or step != 7'))).axes[0]
    assert gap.patch.get_hatch() and gap.images[0].cmap(np.ma.masked)[3] == 0


def test_dark_is_dead_in_grey_too_and_shares_are_not_exaggerated_by_averaging():
    frame = made(1, 2 * MAX_COLUMNS).assign(near_zero=lambda f: (f.step % 2).astype(float))
    image = drawn(plot_dead(frame)).axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), 0.5)
    assert image.get_array().shape[1] == MAX_COLUMNS
    light = image.cmap(np.linspace(0, 1, 50))[:, :3] @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(light) < 0).all()


def test_a_record_holds_until_the_next_one():
    fig = drawn(plot_hist(np.ones((4, 3)), pd.DataFrame(dict(fit=0, epoch=0, step=[0, 10, 12])), "conv", (0, 8)))
    assert fig.axes[0].get_xlim() == (0, 18)
    assert fig.axes[0].get_ylim() == (0, 8)


def test_a_histogram_has_axes_marks_and_a_scale():
    counts = hists()["layers.1.conv"]
    fig = drawn(plot_hist(counts, records(made()), "layers.1.conv"))
    ax, bar = fig.axes
    np.testing.assert_allclose(ax.images[0].get_array(), counts)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step, in training batches", "value of the activations")
    assert marks(ax) == [0, 20]
    assert "count" in bar.get_ylabel()
    assert "layers.1.conv" in words(fig)


def test_a_histogram_in_the_user_s_axes_leaves_their_figure_alone():
    fig, (ax, other) = plt.subplots(1, 2)
    face = ax.get_facecolor()
    assert plot_hist(hists()["layers.1.conv"], records(made()), "layers.1.conv", ax=ax) is ax
    assert fig.axes == [ax, other]
    assert (ax.get_title(), ax.get_facecolor(), len(ax.images)) == ("layers.1.conv", face, 1)
    drawn(fig)


@pytest.mark.parametrize("n", [1, 5, 30])
def test_all_histograms_are_on_one_scale(n):
    fig = drawn(plot_hists(hists(n), records(made())))
    maps = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title() for ax in maps] == [f"layers.{i}.conv" for i in range(n)]
    assert {ax.images[0].get_clim() for ax in maps} == {(0, max(h.max() for h in hists(n).values()))}
    assert len(fig.axes) == n + 1
    titles = [ax.title.get_window_extent() for ax in maps]
    assert not [1 for i, a in enumerate(titles) for b in titles[:i] if a.overlaps(b)]


# --- all of them ------------------------------------------------------------------------------------------------------


ALL = dict(
    stats=plot_stats,
    dead=plot_dead,
    layer=lambda f: plot_layer(f, "layers.0.conv"),
    hist=lambda f: plot_hist(hists(1, len(records(f)))["layers.0.conv"], records(f), "layers.0.conv"),
    hists=lambda f: plot_hists(hists(3, len(records(f))), records(f)),
)


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_one_record_is_enough(plot):
    drawn(plot(made(n_records=1)))


@pytest.mark.parametrize("plot", [plot_stats, plot_dead])
def test_no_record_is_said(plot):
    assert "nothing recorded" in words(drawn(plot(made().iloc[:0])))


def test_only_validation_can_be_drawn():
    for plot in (plot_stats, plot_dead):
        drawn(plot(made(n_records=3).assign(phase="valid")))


def test_two_runs_stand_side_by_side():
    fig = plot_runs({"before": made(20), "after": made(20, n_records=7)})
    of_both = panels(fig)
    before, after = of_both[:3], of_both[3:]
    assert [before[0].get_title(), after[0].get_title()] == ["before", "after"]
    assert [max(len(line.get_xdata()) for line in ax.lines) for ax in (before[0], after[0])] == [40, 7], "all records"
    assert not any(ax.collections for ax in of_both), "a band where every record is drawn"
    assert [ax.get_ylim() for ax in before] == [ax.get_ylim() for ax in after]
    assert len({ax.get_xlim() for ax in of_both}) == 1
    drawn(fig)
    runs = {
        "before": made(2).assign(std=0.5),
        "after": made(2).assign(std=lambda f: 1.0 + 2 * (f.layer == "layers.0.conv")),
    }
    assert "std in the end 0.5 with before, 1 to 3 with after" in words(plot_runs(runs))


def kinds():
    "A run with many layers of two kinds: of some there are updates, of the others dead units."
    frame = made(12)
    activations = [f"layers.{i}.conv" for i in range(1, 12, 2)]
    of_activation = frame.layer.isin(activations)
    return frame.assign(
        dead_units=np.where(of_activation, 0.1, NAN), update=np.where(of_activation, NAN, 1e-3)
    ), activations


def test_no_panel_is_empty_and_none_is_left_out():
    frame, activations = kinds()
    fig = drawn(plot_stats(frame, activations, band=(1e-4, 1e-2)))
    found = panels(fig)
    assert fig.axes[:-1] == found, "all but the colour bar"
    places = [ax.get_subplotspec() for ax in found]
    assert sorted((p.rowspan.start, p.colspan.start) for p in places) == [(i, j) for i in range(4) for j in range(2)]
    left, right = (ax.get_ylabel() for ax in (found[3], found[7]))
    assert left.startswith("update") and right.startswith("dead units")
    assert [bool(ax.get_xlabel()) for ax in found] == [False, False, False, True] * 2
    for ax in (found[3], found[7]):
        assert [t for t in ax.get_yticklabels() if t.get_visible() and t.get_text()], "a scale of its own"


def test_the_colour_bar_and_the_green_band_are_explained():
    frame, activations = kinds()
    assert "colour of a curve: its layer" in words(drawn(plot_stats(frame, activations)))
    assert "green" not in words(plot_stats(frame, activations))
    assert "green: known to work" in words(plot_stats(frame, activations, band=(1e-4, 1e-2)))


def test_logarithmic_axes_say_so():
    frame = made(2).assign(std=lambda f: np.where(f.layer == "layers.0.conv", 1, 100), mean=lambda f: 50 * f["std"])
    mean, std, near_zero = (ax.get_ylabel() for ax in panels(plot_stats(frame)))
    assert mean == "mean of the output\n(log beyond ±1)"
    assert std == "std of the output (log)"
    assert near_zero == "share near zero"


def test_the_title_says_where_the_stds_began_and_ended():
    frame = made(2).assign(std=lambda f: np.where(f.layer == "layers.0.conv", 1.0, 1.0 + f.step))
    assert "40 records: std 1 at first, 1 to 40 in the end" in words(plot_stats(frame))
    assert "40 records: std 1 at first, 40 in the end" in words(plot_layer(frame, "layers.1.conv"))
