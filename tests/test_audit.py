"""The audit itself, against numbers worked out by hand: a judge that can be wrong judges nothing."""

import math

import pytest
import torch
from audit import audit, differences, elasticity, fingerprint, rng_print, signal
from models import Shared, convnet, images, rows
from torch import nn


def by_name(records):
    return {r.name: r for r in records}


def test_numbers_are_those_of_the_output():
    net, x = nn.Sequential(nn.Linear(10, 6)), rows()
    out = net(x).double()
    r = audit(net, x)[0]
    assert math.isclose(r.mean, out.mean().item(), rel_tol=1e-9) and math.isclose(r.std, out.std().item(), rel_tol=1e-9)
    torch.testing.assert_close(r.channel_mean, out.mean(0))
    torch.testing.assert_close(r.channel_std, out.std(0))


@pytest.mark.parametrize(
    "layer,shape", [(nn.Conv2d(4, 6, 3, groups=2), (5, 4, 9, 9)), (nn.ConvTranspose1d(4, 6, 3), (5, 4, 9))]
)
def test_channels_of_convolutions(layer, shape):
    x = torch.randn(shape)
    out = layer(x).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(audit(nn.Sequential(layer), x)[0].channel_std, out.std(1))


def test_not_fooled_by_an_activation_that_overwrites():
    torch.manual_seed(3)
    fooled, plain = convnet(), convnet(act=nn.ReLU)
    plain.load_state_dict(fooled.state_dict())
    x = images()
    assert [(r.mean, r.std) for r in audit(fooled, x)] == [(r.mean, r.std) for r in audit(plain, x)]


def test_calls_of_a_shared_layer_are_pooled():
    net, x = Shared(3), rows()
    outs, h = [], net.first(x)
    for _ in range(3):
        outs.append(h := net.shared(h.relu()))
    r, out = by_name(audit(net, x))["shared"], torch.stack(outs).double()
    assert r.n_calls == 3 and math.isclose(r.std, out.std().item(), rel_tol=1e-6)
    torch.testing.assert_close(r.channel_mean, out.mean((0, 1)))


def test_sees_what_training_will_see_and_restores_it():
    net, x = convnet(norm=nn.BatchNorm2d, drop=0.5).train(), images()
    before, rng = fingerprint(net), rng_print()
    records = audit(net, x)
    assert not differences(before, fingerprint(net)) and rng_print() == rng
    h = net[1](net[0](x))  # the batch's own statistics, as in training
    assert math.isclose(records[1].std, net[4](h.relu()).double().std().item(), rel_tol=1e-5)  # and no dropout


@pytest.mark.parametrize(
    "change,key",
    [
        (lambda m: m[0].weight.data.view(-1)[0].mul_(1 + 1e-7), ("param", "0.weight")),
        (lambda m: m[0].bias.requires_grad_(False), ("requires_grad", "0.bias")),
        (lambda m: setattr(m[1], "training", False), ("module", "1")),
        (lambda m: m[1].running_mean.add_(1), ("buffer", "1.running_mean")),
        (lambda m: m[0].register_forward_hook(print), ("hooks", "0", "_forward_hooks")),
        (lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.data)), ("param", "0.weight")),
        (lambda m: setattr(m[0], "note", 1), ("attr", "0", "note")),
        (lambda m: setattr(m[0].weight, "grad", torch.zeros_like(m[0].weight)), ("grad", "0.weight")),
        (
            lambda m: setattr(m[0].weight, "data", m[0].weight.data.to(memory_format=torch.channels_last)),
            ("layout", "0.weight"),
        ),
    ],
)
def test_fingerprint_sees(change, key):
    net = convnet(norm=nn.BatchNorm2d)
    net.zero_grad()
    before = fingerprint(net)
    assert not differences(before, fingerprint(net))
    change(net)
    assert key in differences(before, fingerprint(net))


def test_fingerprint_forgives_only_the_values_it_is_told_to():
    net = convnet()
    before = fingerprint(net)
    net[0].weight.data.mul_(2)
    assert differences(before, fingerprint(net)) == [("param", "0.weight")]
    assert not differences(before, fingerprint(net), but={"0.weight"})
    net[0].weight = nn.Parameter(net[0].weight.data)
    assert differences(before, fingerprint(net), but={"0.weight"}) == [("param", "0.weight")]


def test_signal_is_what_the_input_tells_apart():
    net, x = nn.Sequential(nn.Linear(1, 1), nn.Flatten()), torch.randn(1000, 1)
    assert signal(net, x)["0"] == pytest.approx(1)
    wide = nn.Linear(1, 2)  # outputs x and x + 2: a std of 1 over the batch, of √2 altogether
    with torch.no_grad():
        wide.weight.fill_(1)
        wide.bias.copy_(torch.tensor([0.0, 2.0]))
    assert signal(wide, x)[""] == pytest.approx(0.5**0.5, abs=0.03)


def test_no_signal_where_all_samples_are_the_same():
    assert signal(nn.Linear(4, 3), torch.ones(8, 4))[""] == 0
    assert math.isnan(signal(nn.Linear(4, 3), rows(1)[:, :4])[""])


def test_elasticity_counts_relative_changes():
    net = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(5 * torch.eye(10))
        net[1].weight.copy_(0.01 * torch.eye(10))
    assert elasticity(net, rows()) == {"0": pytest.approx(1), "1": pytest.approx(1)}  # whatever the scales
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(10))
        net[1].bias = nn.Parameter(-net[0](rows()).mean(0) + 1)
    y = net[0](rows())
    assert elasticity(net, rows())["0"] == pytest.approx((y.norm() / net(rows()).norm()).item(), rel=1e-4)


def test_elasticity_is_not_fooled_by_an_activation_that_overwrites():
    torch.manual_seed(3)
    fooled, plain = convnet(), convnet(act=nn.ReLU)
    plain.load_state_dict(fooled.state_dict())
    x, before = images(), fingerprint(fooled)
    assert elasticity(fooled, x) == elasticity(plain, x) and not differences(before, fingerprint(fooled))


def test_a_layer_that_the_output_does_not_depend_on_has_no_elasticity():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(10, 2), nn.Linear(10, 2)

        def forward(self, x):
            return self.used(x) if self.unused(x) is not None else None

    assert elasticity(Unused(), rows()) == {"unused": 0, "used": pytest.approx(1)}
