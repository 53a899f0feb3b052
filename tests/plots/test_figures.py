"""What holds for all figures: same in a dark notebook, told apart by colour-blind eyes, nothing of pyplot's touched."""

from io import BytesIO

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from test_activations import drawn, hists, made, panels, records
from test_report import made_up

from fastai_lsuv.plots.curves import plot_layer, plot_runs, plot_stats
from fastai_lsuv.plots.layers import plot_demo
from fastai_lsuv.plots.maps import plot_dead, plot_hist, plot_hists
from fastai_lsuv.plots.palette import INK, LOOKS
from fastai_lsuv.plots.panels import MAX_NAMED, styles

FIGURES = dict(
    report=lambda: made_up().plot(),
    demo=lambda: plot_demo(
        pd.DataFrame(dict(a=[0.5, 0.1], b=[1.0, 1.0])), pd.DataFrame(dict(a=[0.1, 0.1], b=[0.5, 0.9]), index=[1, 2])
    ),
    stats=lambda: plot_stats(made(3)),
    many=lambda: plot_stats(made(20)),
    runs=lambda: plot_runs(dict(a=made(3), b=made(3))),
    layer=lambda: plot_layer(made(3), "layers.0.conv"),
    dead=lambda: plot_dead(made(3)),
    hist=lambda: plot_hist(hists()["layers.0.conv"], records(made()), "layers.0.conv"),
    hists=lambda: plot_hists(hists(), records(made())),
)
each = pytest.mark.parametrize("plot", FIGURES.values(), ids=FIGURES)


# --- dark and light ---------------------------------------------------------------------------------------------------


@each
def test_a_user_s_style_changes_no_pixel(plot):
    def pixels(fig):
        return np.asarray(drawn(fig).canvas.buffer_rgba())

    plain = pixels(plot())
    for style in (
        "dark_background",
        {"axes.prop_cycle": plt.cycler(color=["red"], linestyle=[":"], marker=["*"], linewidth=[5], alpha=[0.3])},
    ):
        with plt.style.context(style):
            np.testing.assert_array_equal(pixels(plot()), plain)


@each
def test_the_paper_is_white_whatever_figures_are_saved_on(plot):
    "Older versions of matplotlib's dark style, and many a user's, save on black: dark ink on black paper."
    png = BytesIO()
    with plt.rc_context({"savefig.facecolor": "black", "figure.facecolor": "black"}):
        fig = plot()
        fig.savefig(png)
        shown = plt.imread(BytesIO(fig.as_png()))
    for pixels in (plt.imread(BytesIO(png.getvalue())), shown):
        np.testing.assert_array_equal(pixels[:3, :3], 1.0)


def test_whoever_asks_for_other_paper_gets_it():
    png = BytesIO()
    made_up().plot().savefig(png, facecolor="yellow")
    np.testing.assert_array_equal(plt.imread(BytesIO(png.getvalue()))[0, 0], (1, 1, 0, 1))


@each
def test_all_that_is_written_can_be_read(plot):
    "Dark ink; at a notebook's 72 dots an inch no letter under 8 points."
    for text in drawn(plot()).findobj(plt.Text):
        if text.get_text():
            assert (text.get_color(), text.get_fontsize() >= 8) == (INK, True), text.get_text()


@each
def test_it_is_one_of_pyplot_s_and_settings_are_left_alone(plot):
    rc, numbers = dict(matplotlib.rcParams), plt.get_fignums()
    figure = drawn(plot())
    assert dict(matplotlib.rcParams) == rc
    assert plt.get_fignums() == [*numbers, figure.number]


@pytest.mark.parametrize(
    "plot", [plot_stats, plot_dead, lambda f: plot_layer(f, "layers.0.conv"), lambda f: plot_runs(dict(a=f))]
)
def test_a_frame_is_left_as_it_is(plot):
    frame = made(3)
    plot(frame)
    pd.testing.assert_frame_equal(frame, made(3))


@pytest.mark.parametrize("size", [1.0, 2.5, 4.0, 7.0])
def test_ticks_on_both_sides_of_zero_do_not_overlap(size):
    "Of means that are far smaller than 1, as those of gradients, and spread over decades."
    frame = made(4, grads=True).assign(grad_mean=lambda f: size * f.grad_mean * np.where(f.step % 7, 1, 30))
    ax = panels(drawn(plot_stats(frame)))[3]
    boxes = [t.get_window_extent() for t in ax.get_yticklabels() if t.get_text()]
    assert ax.get_yscale() == "symlog" and len(boxes) >= 3
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(1, 0.8).overlaps(b.shrunk(1, 0.8))]


# --- colour-blind eyes ------------------------------------------------------------------------------------------------


SIGHT = dict(  # linear RGB to linear RGB (Machado et al. 2009, severity 1)
    normal=np.eye(3),
    protan=np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    deutan=np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]),
    tritan=np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]),
)
TO_CONES = np.array(
    [[0.412221, 0.536333, 0.051446], [0.211903, 0.680700, 0.107397], [0.088302, 0.281719, 0.629979]]
)  # Oklab (Ottosson 2020)
TO_LAB = np.array([[0.210454, 0.793618, -0.004072], [1.977998, -2.428592, 0.450594], [0.025904, 0.782772, -0.808676]])
APART = 0.08  # in Oklab, where differences of .02 are just noticeable


def seen(color, sight):
    "A colour in Oklab, as these eyes see it."
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return TO_LAB @ np.cbrt(TO_CONES @ np.clip(SIGHT[sight] @ linear, 0, 1))


def distance(a, b, sight):
    return np.linalg.norm(seen(a, sight) - seen(b, sight))


def test_the_simulation_knows_what_is_known():
    """White and red have Ottosson's values; and of what tells two of matplotlib's colours apart a deuteranope has less
    than half for red and green, and most for blue and orange."""
    np.testing.assert_allclose([seen("white", sight) for sight in SIGHT], [[1, 0, 0]] * 4, atol=2e-3)
    np.testing.assert_allclose(seen("#ff0000", "normal"), (0.628, 0.2249, 0.1258), atol=1e-3)
    red, green, blue, orange = "#d62728", "#2ca02c", "#1f77b4", "#ff7f0e"
    assert distance(red, green, "deutan") < 0.5 * distance(red, green, "normal")
    assert distance(blue, orange, "deutan") > 0.8 * distance(blue, orange, "normal")


@pytest.mark.parametrize("sight", SIGHT)
def test_layers_of_one_dash_are_told_apart(sight):
    looks = styles(MAX_NAMED)
    assert min(distance(a, b, sight) for i, (a, x) in enumerate(looks) for b, y in looks[:i] if x == y) > APART


@pytest.mark.parametrize("sight", SIGHT)
def test_initialisations_are_told_apart_by_colour_and_by_marker(sight):
    colors = [look.color for look in LOOKS.values()]
    assert min(distance(a, b, sight) for i, a in enumerate(colors) for b in colors[:i]) > APART
    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS)
    assert distance(LOOKS["default"].color, LOOKS["LSUV"].color, sight) > 2 * APART


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("name", ["viridis", "magma_r"])
def test_maps_go_from_dark_to_light_for_all_eyes(name, sight):
    light = np.array([seen(color, sight)[0] for color in matplotlib.colormaps[name](np.linspace(0, 1, 25))])
    assert (np.diff(light) > 0).all() or (np.diff(light) < 0).all()
