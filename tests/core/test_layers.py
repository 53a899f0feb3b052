"""What can be corrected: the known layers, and what the one rule of DESIGN section 4 finds."""

import copy

import pytest
import timm.layers as tl
import torch
from audit import audit, moved, outputs_of, parameter_bits
from checks import assert_exact, assert_true_reason
from models import (
    Attention,
    Bilinear,
    Conv1D,
    Doubled,
    Named,
    PlainLinear,
    Rectified,
    Standardised,
    Unpack,
    convnet,
    images,
    old_weight_norm,
    rows,
)
from torch import nn
from torch.nn.utils import parametrizations

from fastai_lsuv import lsuv_

VOLUME = {1: (6, 4, 12), 2: (6, 4, 9, 9), 3: (6, 4, 6, 6, 6)}
CONVS = [
    (nn.Conv1d, 1),
    (nn.Conv2d, 2),
    (nn.Conv3d, 3),
    (nn.ConvTranspose1d, 1),
    (nn.ConvTranspose2d, 2),
    (nn.ConvTranspose3d, 3),
]


def exactly(net, x, **kwargs):
    "LSUV, and the audit's verdict on it."
    bits = parameter_bits(net)
    report = lsuv_(net, x, **kwargs)
    assert_exact(net, x, report, bits, **{k: kwargs[k] for k in ("mean", "std") if k in kwargs})
    return report


def at_target(net, x, name, report):
    "The named unit, of whatever type, puts out mean 0 and std 1."
    assert report[name].status == "corrected", report[name]
    mean, std = outputs_of(net, x, [name])[name]
    assert abs(std - 1) <= 1e-3 and abs(mean) <= 1e-3, (name, mean, std)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("conv,dims", CONVS)
def test_every_convolution(conv, dims, groups, bias):
    layers = [
        conv(4, 4, 3, groups=groups, bias=bias),
        nn.ReLU(inplace=True),
        conv(4, 6, 3, stride=2, groups=groups, bias=bias),
    ]
    report = exactly(nn.Sequential(*layers), torch.randn(VOLUME[dims]) * 3 + 1)
    assert [row.status for row in report] == ["corrected"] * 2
    assert [row.type for row in report] == [conv.__name__] * 2


@pytest.mark.parametrize("shape", [(32, 10), (4, 7, 10), (2, 3, 5, 10), (10,)])
def test_linear_on_any_number_of_axes(shape):
    assert exactly(nn.Sequential(nn.Linear(10, 8)), torch.randn(shape)).converged


def test_unbatched_convolution():
    assert exactly(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)), images(1)[0]).converged


def test_a_bare_layer_is_a_model_too():
    layer, x = nn.Linear(10, 8), rows()
    report = lsuv_(layer, x)
    assert len(report) == 1 and report.converged
    assert audit(layer, x)[0].std == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype):
    "Half precision: a few eps of the compute type more (DESIGN section 3)."
    net, x = convnet(depth=3).to(dtype), images(dtype=dtype)
    bits = parameter_bits(net)
    report = lsuv_(net, x)
    tol = 1e-3 + (4 * torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0)
    assert_exact(net, x, report, bits, tol=tol, may_fail={row.name for row in report if row.status == "not_converged"})
    for r in audit(net, x):
        assert abs(r.std - 1) <= tol and abs(r.mean) <= tol, (r.name, r.mean, r.std)
    assert {p.dtype for p in net.parameters()} == {dtype}


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e6])
def test_inputs_of_any_scale(scale):
    assert exactly(convnet(), images() * scale).converged


@pytest.mark.parametrize("ratio", [10, 1000])
@pytest.mark.parametrize("where", ["bias", "input"])
def test_a_mean_that_dwarfs_the_std(where, ratio):
    net, x = nn.Sequential(nn.Linear(10, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)), rows()
    with torch.no_grad():
        if where == "bias":
            net[0].bias.fill_(2.0 * ratio)
        else:
            net[0].weight[:], x = net[0].weight[0].abs(), x + 3 * ratio
    assert abs(audit(net, x)[0].mean) > ratio * audit(net, x)[0].std
    assert exactly(net, x).converged


def test_channels_last_stays_channels_last():
    net, x = convnet().to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last)
    strides = [p.stride() for p in net.parameters()]
    assert exactly(net, x).converged
    assert [p.stride() for p in net.parameters()] == strides


# --- the one rule: found by probing, not by type ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_probe_and_shortcut_agree_on_linear(bias):
    "A look-alike that is no `nn.Linear` gets what `nn.Linear` gets."
    torch.manual_seed(1)
    known = nn.Sequential(nn.Linear(10, 8, bias=bias), nn.ReLU(inplace=True), nn.Linear(8, 3, bias=bias))
    probed = nn.Sequential(PlainLinear(10, 8, bias=bias), nn.ReLU(inplace=True), PlainLinear(8, 3, bias=bias))
    probed.load_state_dict(known.state_dict())
    a, b = lsuv_(known, rows()), lsuv_(probed, rows())
    for p, q in zip(known.parameters(), probed.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for row, other in zip(a, b):
        assert (row.name, row.status, row.reason) == (other.name, other.status, other.reason)


@pytest.mark.parametrize("conv,dims", CONVS)
def test_probe_and_shortcut_agree_on_convolutions(conv, dims):
    "The same layer inside a module of its own that calls the functional form: no leaf type to know it by."

    class Functional(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.weight, self.bias, self.transposed = layer.weight, layer.bias, "Transpose" in conv.__name__

        def forward(self, x):
            name = f"conv_transpose{dims}d" if self.transposed else f"conv{dims}d"
            return getattr(nn.functional, name)(x, self.weight, self.bias)

    known = nn.Sequential(conv(4, 6, 3), nn.ReLU())
    probed = nn.Sequential(Functional(copy.deepcopy(known[0])), nn.ReLU())
    x = torch.randn(VOLUME[dims]) * 2 + 1
    lsuv_(known, x)
    report = lsuv_(probed, x)
    at_target(probed, x, "0", report)
    for p, q in zip(known.parameters(), probed.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_subclass_with_an_affine_forward_of_its_own():
    net, x = nn.Sequential(Doubled(3, 8, 3), nn.ReLU(inplace=True), Doubled(8, 4, 3)), images()
    assert exactly(net, x).converged


def test_a_subclass_whose_forward_is_not_affine_is_not_centred_to_death():
    net, x = nn.Sequential(Rectified(10, 8), nn.Linear(8, 3)), rows()
    report = lsuv_(net, x)
    active = (net[0](x) > 0).float().mean().item()
    assert active > 0.2, f"{active:.0%} of the outputs are left alive"
    at_target(net, x, "1", report)


@pytest.mark.parametrize(
    "build,name",
    [
        (lambda: nn.Sequential(Conv1D(8, 10), nn.GELU(), Conv1D(6, 8)), "0"),
        (Bilinear, "bi"),
        (
            lambda: nn.Sequential(
                parametrizations.weight_norm(nn.Linear(10, 8)), nn.ReLU(inplace=True), nn.Linear(8, 3)
            ),
            "0",
        ),
        (lambda: nn.Sequential(old_weight_norm(nn.Linear(10, 8)), nn.ReLU(inplace=True), nn.Linear(8, 3)), "0"),
    ],
    ids=["Conv1D", "Bilinear", "weight_norm", "old weight_norm"],
)
def test_units_found_by_the_rule(build, name):
    net, x = build(), rows()
    report = lsuv_(net, x)
    at_target(net, x, name, report)
    for r in audit(net, x):
        assert abs(r.std - 1) <= 1e-3, r.name


def test_weight_norm_moves_its_gain_and_not_its_direction():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(10, 8)))
    bits = parameter_bits(net)
    lsuv_(net, rows())
    assert moved(bits, net) == {"0.bias", "0.parametrizations.weight.original0"}


def test_scaled_weight_standardisation_is_corrected_by_its_gain():
    net, x = nn.Sequential(tl.ScaledStdConv2d(3, 8, 3), nn.ReLU(inplace=True), tl.ScaledStdConv2d(8, 4, 3)), images()
    bits = parameter_bits(net)
    report = lsuv_(net, x)
    at_target(net, x, "0", report)
    at_target(net, x, "2", report)
    assert moved(bits, net) == {"0.gain", "0.bias", "2.gain", "2.bias"}


@pytest.mark.parametrize(
    "conv",
    [Standardised, lambda *a: tl.StdConv2d(*a, eps=1e-6), lambda *a: tl.StdConv2d(*a, eps=1e-5)],
    ids=["hand-made", "timm", "timm, larger epsilon"],
)
def test_weight_standardisation_is_left_alone(conv):
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), conv(8, 4, 3)), images()
    bits = parameter_bits(net)
    row = lsuv_(net, x)["2"]
    assert (row.status, row.reason) == ("skipped", "weight has no effect on scale")
    assert not {n for n in moved(bits, net) if n.startswith("2.")}
    assert_true_reason(net, x, row, audit(net, x)[-1])


@pytest.mark.parametrize(
    "norm,reason",
    [(parametrizations.spectral_norm, "weight has no effect on scale"), (parametrizations.orthogonal, "not affine")],
    ids=["spectral norm", "orthogonal: what it is made from carries integer signs, which doubling doubles"],
)
def test_weights_whose_scale_is_fixed_are_left_alone(norm, reason):
    net, x = nn.Sequential(norm(nn.Linear(10, 8))), rows()
    bits = parameter_bits(net)
    row = lsuv_(net, x)[0]
    assert row.status == "skipped" and row.reason.partition(":")[0] == reason, row
    assert not moved(bits, net)


def test_attention_is_corrected_through_its_output_projection():
    net, x = Attention(), rows().reshape(8, 8, 10)
    report = lsuv_(net, x)
    at_target(net, x, "attn", report)
    at_target(net, x, "head", report)
    assert "attn.out_proj" not in {row.name for row in report if row.status == "corrected"}


@pytest.mark.parametrize("kind", ["tuple", "dict", "nested"])
def test_the_first_tensor_of_several_outputs_counts(kind):
    net, x = Unpack(Named(kind)), rows()
    report = lsuv_(net, x, modules=["inner", "head"])
    at_target(net, x, "inner", report)
    at_target(net, x, "head", report)
