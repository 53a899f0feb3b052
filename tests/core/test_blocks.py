"""Where one exact step is impossible: shared and tied weights, blocks, the course's layers."""

import copy

import pytest
import torch
from audit import audit, moved, outputs_of, parameter_bits
from checks import assert_exact
from fastai.layers import flatten_model
from models import (
    ConvLayer,
    GeneralReLU,
    Offset,
    PlainLinear,
    Residual,
    Shared,
    TiedDecoder,
    TiedPair,
    TwoHeads,
    convnet,
    course_net,
    images,
    mlp,
    rows,
)
from torch import nn

from fastai_lsuv import lsuv_


def conv_relu(depth=3, width=8):
    convs = [nn.Sequential(nn.Conv2d(width if i else 3, width, 3), nn.ReLU(inplace=True)) for i in range(depth)]
    return nn.Sequential(*convs, nn.Flatten(), nn.LazyLinear(4))


def ready(net, x):
    "The model with its lazy layers made real."
    with torch.no_grad():
        net(x)
    return net


# --- one layer, several calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [torch.relu, torch.tanh, lambda x: x.clone().relu_()], ids=["relu", "tanh", "in place"])
@pytest.mark.parametrize("n", [2, 3])
def test_a_layer_that_feeds_itself_is_pooled_over_its_calls(n, act):
    torch.manual_seed(2)
    net, x = Shared(n, act), rows()
    bits = parameter_bits(net)
    report = lsuv_(net, x, max_iter=20)
    assert report["shared"].n_calls == n and report.converged
    assert_exact(net, x, report, bits)
    assert 3 <= report.n_forward <= 3 + 20


def test_two_calls_side_by_side_are_pooled():
    net, x = TwoHeads(), (rows(), rows(seed=2) * 3)
    bits = parameter_bits(net)
    report = lsuv_(net, x)
    assert_exact(net, x, report, bits)
    assert report["tower"].n_calls == 2 and report.converged and [row.name for row in report] == ["tower", "head"]


def test_extra_passes_are_bounded_and_failure_is_said():
    "A recurrence that can't settle in one extra pass: the row says so with the numbers that the audit sees."
    net, x = Shared(6, torch.relu), rows()
    report = lsuv_(net, x, max_iter=1)
    assert report.n_forward <= 4
    r = {r.name: r for r in audit(net, x)}["shared"]
    row = report["shared"]
    assert row.std_after == pytest.approx(r.std, rel=1e-4)
    assert (row.status == "not_converged") == (abs(r.std - 1) > 1e-3 or abs(r.mean) > 1e-3)
    assert report.converged == (row.status != "not_converged")


def test_a_shared_layer_does_not_spoil_the_others():
    net, x = Shared(3), rows()
    lsuv_(net, x, max_iter=20)
    for r in audit(net, x):
        if r.name != "shared":
            assert abs(r.std - 1) <= 1e-3 and abs(r.mean) <= 1e-3, r.name


# --- one weight, several layers ---------------------------------------------------------------------------------------


def test_of_two_tied_layers_the_first_to_run_is_corrected():
    net, x = TiedPair(), rows()
    bits = parameter_bits(net)
    report = lsuv_(net, x)
    assert_exact(net, x, report, bits)
    assert report["a"].status == "corrected" and (report["b"].status, report["b"].reason) == ("skipped", "tied weight")
    assert net.a.weight is net.b.weight and "b.bias" not in moved(bits, net)


def test_a_decoder_tied_to_an_embedding_is_left_alone():
    net, x = TiedDecoder(), torch.arange(60).reshape(6, 10) % 30
    bits = parameter_bits(net)
    report = lsuv_(net, x)
    assert (report["decoder"].status, report["decoder"].reason) == ("skipped", "tied weight")
    assert moved(bits, net) == {"body.weight", "body.bias"}
    assert_exact(net, x, report, bits)
    assert report["body"].std_after == pytest.approx(1, abs=1e-3)


def test_tied_to_a_layer_that_was_not_chosen_is_skipped():
    net, x = TiedPair(), rows()
    bits = parameter_bits(net)
    report = lsuv_(net, x, exclude="a")
    assert (report["b"].status, report["b"].reason) == ("skipped", "tied weight")
    assert not moved(bits, net) & {"a.weight", "b.weight", "a.bias", "b.bias"}


def test_a_tied_bias_alone_does_not_move_twice():
    net, x = mlp(10, 8, 8, 8), rows()
    net[4].bias = net[2].bias
    bits = parameter_bits(net)
    report = lsuv_(net, x)
    for r in audit(net, x):
        if report[r.name].status == "corrected":
            assert abs(r.mean) <= 1e-3 and abs(r.std - 1) <= 1e-3, r.name
    assert report["2"].status != report["4"].status or not moved(bits, net) & {"2.bias", "4.bias"}


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_conv_and_relu_as_children_live_on():
    "Driving the mean of a rectified output to 0 kills it (10 steps leave 9% active): only its std is set."
    x = images()
    net = ready(conv_relu(), x)
    report = lsuv_(net, x, modules=nn.Module.children)
    assert [row.name for row in report] == ["0", "1", "2", "4"]  # Flatten has nothing to correct
    outs = outputs_of(net, x, [row.name for row in report])
    with torch.no_grad():
        h = x
        for i in range(3):
            h, row = net[i](h), report[i]
            assert (row.status, row.reason) == ("corrected", "one sign, mean kept"), row
            assert abs(outs[row.name][1] - 1) <= 3e-3 and row.mean_after > 0.1
            assert (h > 0).float().mean() > 0.2, f"block {i} is dying"
    assert abs(outs["4"][0]) <= 3e-3 and abs(outs["4"][1] - 1) <= 3e-3 and report.converged


@pytest.mark.parametrize(
    "act,std",
    [(nn.LeakyReLU(0.3), 1.0), (nn.ELU(), 1.0), (nn.Tanh(), 0.5), (nn.Hardtanh(), 0.4)],
    ids=["leaky", "elu", "tanh", "hardtanh"],
)
def test_a_block_with_two_signs_gets_both(act, std):
    net, x = (
        nn.Sequential(nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), act), nn.Linear(16, 4)),
        rows(),
    )
    bits = parameter_bits(net)
    report = lsuv_(net, x, modules=["0"], std=std, max_iter=20)
    mean, got = outputs_of(net, x, ["0"])["0"]
    assert report["0"].status == "corrected" and abs(mean) <= 3e-3 and abs(got - std) <= 3e-3
    assert moved(bits, net) <= {"0.2.weight", "0.2.bias"}, "not through its last affine layer"
    assert report.n_forward == 3, "iterates on the block alone"
    assert report["0"].n_iter <= 20 and report["0"].std_after == pytest.approx(got, rel=1e-4)


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.Mish()], ids=["gelu", "silu", "mish"])
@pytest.mark.parametrize("gain", [0.1, 1.0, 10.0])
def test_a_block_with_one_sign_at_the_wanted_std_only(act, gain):
    "A small signal passes GELU nearly straight; at std 1 hardly anything is below 0, and mean 0 is out of reach."
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3), act), nn.Sequential(nn.Conv2d(16, 16, 3), act)), images()
    for block in net:
        block[0].weight.data *= gain
    for row in lsuv_(net, x, modules=nn.Module.children):
        mean, std = outputs_of(net, x, [row.name])[row.name]
        assert (
            (row.status, row.reason) == ("corrected", "one sign, mean kept")
            and abs(std - 1) <= 3e-3
            and row.n_iter <= 10
        ), row
        assert row.mean_after == pytest.approx(mean, abs=1e-4) and mean > 0.1


def test_a_block_that_overwrites_its_input():
    "Run again, it starts from the input as it was."

    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            return nn.functional.leaky_relu(self.fc(x.mul_(0.5).add_(1)), 0.3)

    net, x = nn.Sequential(nn.Linear(10, 16), Overwriting(), nn.Linear(16, 4)), rows()
    report = lsuv_(net, x, modules=[net[0], net[1], net[2]])
    assert report.converged
    for mean, std in outputs_of(net, x, ["1", "2"]).values():
        assert (mean, std) == (pytest.approx(0, abs=3e-3), pytest.approx(1, abs=3e-3))


def test_a_wish_that_cannot_come_true_is_not_converged():
    "No weight brings a tanh's output to std 3."
    net, x = nn.Sequential(nn.Sequential(nn.Linear(10, 8), nn.Tanh()), nn.Linear(8, 4)), rows()
    report = lsuv_(net, x, modules=["0", "1"], std=3.0)
    mean, std = outputs_of(net, x, ["0"])["0"]
    row = report["0"]
    assert row.status == "not_converged" and not report.converged and row.n_iter <= 10
    assert row.std_after == pytest.approx(std, rel=1e-4) and row.mean_after == pytest.approx(mean, abs=1e-4)
    assert all(p.isfinite().all() and p.abs().max() < 1e4 for p in net.parameters())
    assert outputs_of(net, x, ["1"])["1"][1] == pytest.approx(3, abs=3e-3), (
        "the layer behind it is corrected all the same"
    )


def test_residual_blocks():
    torch.manual_seed(1)
    body = [
        Residual(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)
    ]
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), *body), images()
    bits = parameter_bits(net)
    assert_exact(net, x, lsuv_(net, x), bits)  # layer by layer
    report = lsuv_(net, x, modules=Residual, std=2.0)  # and as blocks: their sums
    for row in report:
        if row.status == "corrected":
            assert outputs_of(net, x, [row.name])[row.name][1] == pytest.approx(2, abs=3e-3)
        else:
            assert row.status == "not_converged" and not report.converged


def test_a_block_without_an_affine_layer_says_so():
    net = nn.Sequential(nn.Sequential(nn.PReLU(), nn.MaxPool1d(2)), nn.Linear(5, 3))
    row = lsuv_(net, rows(), modules=["0", "1"])["0"]
    assert (row.status, row.reason) == ("skipped", "no affine layer")


def test_a_block_that_normalises_last_is_left_alone():
    net, x = nn.Sequential(nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8, affine=False)), nn.Linear(8, 3)), rows()
    bits = parameter_bits(net)
    row = lsuv_(net, x, modules=["0"], std=2.0)[0]
    assert (row.status, row.reason) == ("skipped", "weight has no effect on scale") and not moved(bits, net)


# --- the founding article's children, the course's ConvLayer ----------------------------------------------------------


@pytest.mark.parametrize("init", [None, nn.init.kaiming_normal_], ids=["default", "kaiming"])
@pytest.mark.parametrize("leak", [None, 0.1])
def test_the_course_s_layers_reach_mean_0_and_std_1(leak, init):
    "The notebook's own loop ends with means of 0.09–0.31."
    net, x = course_net(leak=leak), images(64, 1, 28)
    if init is not None:
        for m in net:
            if isinstance(m, ConvLayer):
                init(m.conv.weight)
    report = lsuv_(net, x, modules=nn.Module.children)
    assert [row.name for row in report] == ["0", "1", "2", "3", "4", "7"] and report.converged
    assert {row.type for row in report} == {"ConvLayer", "Linear"}
    for name, (mean, std) in outputs_of(net, x, [row.name for row in report]).items():
        assert abs(mean) <= 3e-3 and abs(std - 1) <= 3e-3, (name, mean, std)
        assert report[name].mean_after == pytest.approx(mean, abs=1e-4) and report[name].status == "corrected"
    with torch.no_grad():
        h = x
        for m in net[:5]:
            h = m(h)
            assert (h + m.relu.sub > 0).float().mean() > 0.2, "the rectifier is dying"
    assert all(isinstance(m.relu.sub, float) for m in net[:5]), "a Python float has become something else"


def test_the_course_s_layers_keep_on_training(monkeypatch):
    monkeypatch.setattr(GeneralReLU, "inplace", False)
    net, x = course_net(), images(32, 1, 28)
    params = list(net.parameters())
    lsuv_(net, x, modules=nn.Module.children)
    assert all(p is q for p, q in zip(params, net.parameters()))
    opt, bits = torch.optim.SGD(params, 0.1), parameter_bits(net)
    nn.functional.cross_entropy(net(x), torch.arange(32) % 10).backward()
    opt.step()
    assert len(moved(bits, net)) == len(params)


def test_a_parameter_shown_as_bias():
    net, x = nn.Sequential(Offset(10, 8), Offset(8, 8), nn.Linear(8, 3)), rows()
    bits, params = parameter_bits(net), list(net.parameters())
    report = lsuv_(net, x, modules=nn.Module.children)
    assert report.converged
    for mean, std in outputs_of(net, x, "012").values():
        assert (mean, std) == (pytest.approx(0, abs=3e-3), pytest.approx(1, abs=3e-3))
    assert all(p is q for p, q in zip(params, net.parameters(), strict=True))
    assert {"0.offset", "1.offset"} <= moved(bits, net)


def test_the_course_s_layers_one_by_one_are_convolutions():
    "Without `modules`, the layers inside are the units, and the rectifier's `sub` is left as it is."
    net, x = course_net(), images(32, 1, 28)
    bits = parameter_bits(net)
    report = lsuv_(net, x)
    assert_exact(net, x, report, bits)
    assert [row.name for row in report] == [f"{i}.conv" for i in range(5)] + ["7"] and all(
        m.relu.sub == 0.0 for m in net[:5]
    )


def test_children_of_a_plain_net_are_its_layers():
    net, x = convnet(), images()
    other = copy.deepcopy(net)
    a, b = lsuv_(net, x), lsuv_(other, x, modules=nn.Module.children)
    assert [(row.name, row.status) for row in a] == [(row.name, row.status) for row in b]
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_every_leaf_by_fastai_s_flatten_model():
    net, x = nn.Sequential(mlp(10, 8, 8), nn.Sequential(nn.ReLU(), PlainLinear(8, 3))), rows()
    report = lsuv_(net, x, modules=flatten_model)
    assert [row.name for row in report] == ["0.0", "0.2", "1.1"] and report.converged
