"""Every option, and every form of `modules` and `exclude` (DESIGN section 2)."""

from functools import partial

import numpy as np
import pytest
import torch
from audit import audit, fingerprint, moved, outputs_of, parameter_bits, rng_print
from checks import assert_exact, row_values
from models import Backwards, ConvLayer, TiedPair, convnet, course_net, images, mlp, rows
from torch import nn

from fastai_lsuv import lsuv_


def names(report):
    return [row.name for row in report]


def corrected(report):
    return [row.name for row in report if row.status == "corrected"]


# --- mean and std -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (0.5, 2.0), (-3.0, 0.1), (0.0, 30.0)])
def test_targets(mean, std):
    net, x = convnet(), images()
    bits = parameter_bits(net)
    assert_exact(net, x, lsuv_(net, x, mean=mean, std=std), bits, mean=mean, std=std, tol=1e-3 * max(1, std))


@pytest.mark.parametrize("modules", [None, nn.Module.children])
@pytest.mark.parametrize("std", [1e-4, 1e-6])
def test_a_small_std_is_met_as_exactly_as_one_of_1(std, modules):
    "1e-3 of it, not 1e-3: a layer with four times the std isn't there already."
    net, x = mlp(10, 16, 16, 3, act=nn.Tanh), rows()
    lsuv_(net, x, std=4 * std, modules=modules)
    report = lsuv_(net, x, std=std, modules=modules)
    assert report.converged and len(corrected(report)) >= 3, report
    for row in report:
        assert outputs_of(net, x, [row.name])[row.name][1] == pytest.approx(std, rel=1e-3), row


@pytest.mark.parametrize("std", [1e6, 1e15])
def test_a_large_std_is_met_as_far_as_single_precision_goes(std):
    net, x = convnet(), images()
    report = lsuv_(net, x, std=std)
    assert report.converged and report.n_forward == 3, report
    for r in audit(net, x):
        assert r.std == pytest.approx(std, rel=1e-6) and abs(r.mean) <= 1e-6 * std


def test_a_large_signal_is_centred_as_far_as_single_precision_goes():
    net, x = mlp(10, 16, 3), rows()
    with torch.no_grad():
        net[0].weight.mul_(1e12)
    assert lsuv_(net, x, std=None).converged
    for r in audit(net, x):
        assert abs(r.mean) <= 1e-6 * r.std


def test_a_bias_free_layer_has_its_std_corrected_and_its_mean_left():
    net, x = mlp(10, 16, 3, bias=False), rows()
    ratio = [r.mean / r.std for r in audit(net, x)][0]
    report = lsuv_(net, x, mean=0.5)
    first = audit(net, x)[0]
    assert first.std == pytest.approx(1, abs=1e-3) and first.mean == pytest.approx(ratio, rel=1e-3)
    assert report.converged and corrected(report) == ["0", "2"]


def test_mean_none_shifts_nothing():
    net, x = mlp(10, 16, 3), rows()
    before, first = [p.clone() for p in net[0].parameters()], audit(net, x)[0]
    report = lsuv_(net, x, mean=None)
    assert report.converged
    for r in audit(net, x):
        assert r.std == pytest.approx(1, abs=1e-3)
    scale = 1 / first.std
    torch.testing.assert_close(net[0].weight, before[0] * scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net[0].bias, before[1] * scale, rtol=1e-4, atol=1e-6)
    assert report["0"].mean_after == pytest.approx(first.mean * scale, rel=1e-3)


def test_std_none_scales_nothing():
    net, x = mlp(10, 16, 3), rows()
    bits, first = parameter_bits(net), audit(net, x)[0]
    report = lsuv_(net, x, std=None, mean=0.25)
    assert moved(bits, net) == {"0.bias", "2.bias"} and report.converged
    for r in audit(net, x):
        assert r.mean == pytest.approx(0.25, abs=1e-3)
    assert report["0"].std_after == pytest.approx(first.std, rel=1e-4)


def test_without_a_bias_nothing_is_left_to_do_if_nothing_is_scaled():
    net, x = nn.Sequential(nn.Linear(10, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)), rows()
    weight = net[0].weight.detach().clone()
    report = lsuv_(net, x, std=None)
    assert [row.status for row in report] == ["unchanged", "corrected"]
    assert torch.equal(net[0].weight, weight)


def test_both_none_is_a_free_diagnosis():
    net, x = convnet(norm=nn.BatchNorm2d), images()
    before, rng = fingerprint(net), rng_print()
    report = lsuv_(net, x, mean=None, std=None)
    assert fingerprint(net) == before and rng_print() == rng
    assert report.n_forward == 1 and not corrected(report)
    for r in audit(net, x):
        row = report[r.name]
        assert (row.mean_after, row.std_after) == (row.mean_before, row.std_before)
        assert row.std_after == pytest.approx(r.std, rel=1e-4) and row.n_calls == r.n_calls == 1


def test_what_is_there_already_is_unchanged():
    net, x = convnet(), images()
    lsuv_(net, x)
    bits = parameter_bits(net)
    again = lsuv_(net, x)
    assert {row.status for row in again} == {"unchanged"} and again.converged
    assert not moved(bits, net)
    assert row_values(again) == row_values(lsuv_(net, x))


# --- per_channel ------------------------------------------------------------------------------------------------------


CHANNELS = [
    (partial(nn.Linear, 10, 6), (64, 10)),
    (partial(nn.Linear, 10, 6), (8, 5, 10)),
    (partial(nn.Conv1d, 4, 6, 3), (6, 4, 12)),
    (partial(nn.Conv2d, 4, 6, 3, groups=2), (6, 4, 9, 9)),
    (partial(nn.Conv2d, 4, 8, 3, groups=4), (6, 4, 9, 9)),
    (partial(nn.Conv3d, 4, 6, 3), (6, 4, 6, 6, 6)),
    (partial(nn.ConvTranspose1d, 4, 6, 3), (6, 4, 12)),
    (partial(nn.ConvTranspose2d, 4, 6, 3, groups=2), (6, 4, 9, 9)),
    (partial(nn.ConvTranspose2d, 4, 8, 3, groups=4), (6, 4, 9, 9)),
    (partial(nn.ConvTranspose3d, 4, 6, 3), (6, 4, 6, 6, 6)),
]


@pytest.mark.parametrize(
    ("layer", "shape"), CHANNELS, ids=lambda v: v.func.__name__ if isinstance(v, partial) else str(len(v))
)
@pytest.mark.parametrize("after", [partial(nn.ReLU, inplace=True), nn.Identity], ids=["in place", "plain"])
def test_each_channel_by_itself(layer, shape, after):
    net, x = nn.Sequential(layer(), after()), torch.randn(shape) * 3 + 1
    report = lsuv_(net, x, per_channel=True, mean=0.5, std=2.0)
    assert corrected(report) == ["0"] and report.n_forward == 3
    r = audit(net, x)[0]
    torch.testing.assert_close(r.channel_std, torch.full_like(r.channel_std, 2.0), rtol=0, atol=1e-3)
    torch.testing.assert_close(r.channel_mean, torch.full_like(r.channel_mean, 0.5), rtol=0, atol=1e-3)


def test_per_channel_without_bias():
    net, x = convnet(bias=False), images()
    lsuv_(net, x, per_channel=True)
    for r in audit(net, x):
        torch.testing.assert_close(r.channel_std, torch.ones_like(r.channel_std), rtol=0, atol=1e-3)


def test_per_channel_is_not_for_blocks():
    net, x = course_net(), images(16, 1, 28)
    bits = parameter_bits(net)
    report = lsuv_(net, x, per_channel=True, modules=ConvLayer)
    assert {(row.status, row.reason) for row in report} == {("skipped", "excluded by mode")} and not moved(bits, net)


def test_per_channel_with_a_dead_channel_stays_finite():
    net, x = nn.Sequential(nn.Linear(10, 6), nn.ReLU()), rows()
    with torch.no_grad():
        net[0].weight[2] = 0
    lsuv_(net, x, per_channel=True)
    assert all(p.isfinite().all() for p in net.parameters()) and not net[0].weight[2].any()
    assert net[0].weight.abs().max() < 1e3


# --- modules and exclude ----------------------------------------------------------------------------------------------

FORMS = {  # form: (modules, the units of `convnet` that it means)
    "a type": (nn.Conv2d, ["0", "2", "4"]),
    "types": ((nn.Conv2d, nn.Linear), ["0", "2", "4", "8"]),
    "a name": ("2", ["2"]),
    "a wildcard": ("[02]", ["0", "2"]),
    "names": (["8", "2"], ["2", "8"]),
    "names and wildcards": (["[24]", "8"], ["2", "4", "8"]),
    "a function": (lambda m: [m[0], m[8]], ["0", "8"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_modules(form):
    net, x = convnet(depth=3), images()
    chosen, wanted = FORMS[form]
    bits = parameter_bits(net)
    report = lsuv_(net, x, modules=chosen)
    assert names(report) == corrected(report) == wanted
    assert {n.split(".")[0] for n in moved(bits, net)} == set(wanted)
    for r in audit(net, x):
        if r.name in wanted:
            assert r.std == pytest.approx(1, abs=1e-3) and abs(r.mean) <= 1e-3


def test_modules_as_a_list_of_modules():
    net, x = convnet(depth=3), images()
    assert names(lsuv_(net, x, modules=[net[4], net[0]])) == ["0", "4"]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_exclude(form):
    net, x = convnet(depth=3), images()
    left_out, unwanted = FORMS[form]
    bits = parameter_bits(net)
    wanted = [n for n in ("0", "2", "4", "8") if n not in unwanted]
    if not wanted:
        with pytest.warns(UserWarning):
            assert len(lsuv_(net, x, exclude=left_out)) == 0
        assert not moved(bits, net)
        return
    report = lsuv_(net, x, exclude=left_out)
    assert names(report) == wanted and {n.split(".")[0] for n in moved(bits, net)} == set(wanted)


def test_exclude_as_a_list_of_modules_and_with_modules():
    net, x = convnet(depth=3), images()
    assert names(lsuv_(net, x, exclude=[net[8]])) == ["0", "2", "4"]
    assert names(lsuv_(convnet(depth=3), x, modules=nn.Conv2d, exclude="2")) == ["0", "4"]


def test_exclude_takes_what_lies_beneath_as_well():
    net, x = nn.Sequential(convnet(depth=2), nn.Linear(10, 4)), images()
    assert names(lsuv_(net, x, exclude="0")) == ["1"]


def test_wildcards_cross_dots_and_choose_layers():
    net, x = nn.Sequential(course_net(), nn.Linear(10, 4)), images(16, 1, 28)
    assert names(lsuv_(net, x, modules="0.*")) == [f"0.{i}.conv" for i in range(5)] + ["0.7"]
    assert names(lsuv_(net, x, modules="*.conv")) == [f"0.{i}.conv" for i in range(5)]


def test_a_name_chooses_exactly_that_module():
    net, x = nn.Sequential(mlp(10, 8, 8), nn.Tanh(), nn.Linear(8, 3)), rows()
    bits = parameter_bits(net)
    report = lsuv_(net, x, modules="0")
    assert names(report) == ["0"] and report[0].type == "Sequential"
    assert "corrected" == report[0].status and not {n for n in moved(bits, net) if n.startswith("2")}
    mean, std = outputs_of(net, x, ["0"])["0"]
    assert abs(mean) <= 3e-3 and abs(std - 1) <= 3e-3


def test_rows_are_in_the_order_of_execution():
    net, x = Backwards(), rows()
    report = lsuv_(net, x)
    assert names(report) == ["first", "middle", "last"]
    assert_exact(net, x, report, parameter_bits(net))
    assert names(lsuv_(Backwards(), x, modules=["last", "first"])) == ["first", "last"]


# --- init -------------------------------------------------------------------------------------------------------------


def test_orthogonal_init_is_step_one_of_the_paper():
    net, x = convnet(), images()
    bits, rng = parameter_bits(net), rng_print()
    assert_exact(net, x, lsuv_(net, x, init=nn.init.orthogonal_), bits)
    assert rng_print() == rng
    for m in net:
        if isinstance(m, nn.Conv2d):
            w = m.weight.detach().flatten(1)
            gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
            torch.testing.assert_close(
                gram, torch.eye(len(gram)) * gram[0, 0], rtol=1e-3, atol=1e-3 * gram[0, 0].item()
            )


def test_init_zeroes_biases_first_and_only_of_what_is_chosen():
    net, x = mlp(10, 16, 16, 3), rows()
    bits = parameter_bits(net)
    lsuv_(net, x, init=nn.init.orthogonal_, modules="2", mean=None)
    assert not net[2].bias.any() and moved(bits, net) == {"2.weight", "2.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_init_runs_in_single_precision(dtype):
    seen = []

    def init(w):
        seen.append(w.dtype)
        nn.init.orthogonal_(w)

    net, x = mlp(10, 16, 3).to(dtype), rows(dtype=dtype)
    lsuv_(net, x, init=init)
    assert set(seen) == {torch.float32} and len(seen) == 2 and net[0].weight.dtype == dtype


def test_init_leaves_zero_weights_and_undoes_what_is_skipped():
    net, x = mlp(10, 16, 16, 3), rows()
    with torch.no_grad():
        net[4].weight.zero_()
        net[4].bias.uniform_()
    net[2].weight.requires_grad_(False)
    bits = parameter_bits(net)
    report = lsuv_(net, x, init=nn.init.orthogonal_)
    assert [(row.status, row.reason) for row in report][1:] == [("skipped", "frozen"), ("skipped", "constant output")]
    assert moved(bits, net) == {"0.weight", "0.bias"}


def test_an_init_that_kills_every_layer_is_undone():
    net, x = mlp(10, 16, 3), rows()
    bits = parameter_bits(net)
    report = lsuv_(net, x, init=nn.init.zeros_)
    assert {row.status for row in report} == {"skipped"} and not moved(bits, net)


def test_what_is_undone_is_undone_to_the_bit():
    "Also where a bias was -0, which equals the 0 that `init` puts there."
    net, x = mlp(10, 8, 3), rows()
    with torch.no_grad():
        net[0].bias.fill_(-0.0)
        net[0].weight.fill_(0.0)
        net[0].weight[0] = 1
        net[2].bias.fill_(-0.0)
    bits = parameter_bits(net)
    report = lsuv_(net, x, init=nn.init.zeros_)
    assert {row.status for row in report} == {"skipped"}
    assert not moved(bits, net)


def test_layers_behind_one_whose_init_was_undone_are_right_all_the_same():
    def init(w):
        nn.init.zeros_(w) if len(w) == 12 else nn.init.orthogonal_(w)

    net, x = mlp(10, 16, 12, 8, 3), rows()
    bits = parameter_bits(net)
    report = lsuv_(net, x, init=init)
    assert [row.reason for row in report if row.status == "skipped"] == ["constant output"]
    assert not moved(bits, net) & {"2.weight", "2.bias"}
    for r in audit(net, x):
        if r.name != "2":
            assert (r.std, r.mean) == (pytest.approx(1, abs=1e-3), pytest.approx(0, abs=1e-3)), r.name


def test_init_is_applied_once_to_a_tied_weight():
    seen = []

    def init(w):
        seen.append(1)
        nn.init.orthogonal_(w)

    lsuv_(TiedPair(), rows(), init=init, modules=["a", "b"])
    assert len(seen) == 1


# --- slips ------------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers():
    options = dict(std=np.float32(0.5), mean=np.float64(0), max_iter=np.int64(3), tol=np.float32(1e-3))
    assert lsuv_(mlp(10, 8, 3), rows(), **options).converged


@pytest.mark.parametrize("option", ["per_channel", "residual"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_yes_or_no_is_true_or_false(option, value):
    with pytest.raises(TypeError, match=f"{option}={value!r}: expected True or False"):
        lsuv_(mlp(10, 8, 3), rows(), **{option: value})


def test_a_report_knows_its_layers_by_name():
    report = lsuv_(mlp(10, 8, 3), rows())
    assert "0" in report
    assert "1" not in report
    assert report[0] in report
