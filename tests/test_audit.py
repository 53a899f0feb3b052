"""The audit itself, against numbers worked out by hand: a judge that can be wrong judges nothing."""

import math

import pytest
import torch
from audit import audit, differences, fingerprint, rng_print
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
