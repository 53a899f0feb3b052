"""Whether a network can be trained: the words, where they point, and that they agree with training."""

import math

import pytest
import torch
import torchvision.models as tv
from models import mlp, rows
from torch import nn

from fastai_lsuv import lsuv_
from fastai_lsuv.core.options import AUTO, Options
from fastai_lsuv.core.verdict import EXPLODES, VANISHES, Evidence, Trainability, remedy
from fastai_lsuv.demo import digits_dls, plain_cnn

NAN = math.nan


def of(signals, growth=None, n_norms=0):
    pairs = zip(signals, growth or [1.0] * len(signals), strict=True)
    return Trainability([Evidence(f"l{i}", s, g) for i, (s, g) in enumerate(pairs)], n_norms)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (of([0.9, 0.8, 0.7, 0.6]), "healthy"),
        (of([0.9, 0.5, 0.09, 0.01]), "signal lost from l2 on"),
        (of([0.0, 0.0]), "signal lost from l0 on"),
        (of([0.9, 0.05, 0.8, 0.7]), "healthy"),  # a gate that is nearly constant
        (of([0.9, 0.05, 0.8, 0.02]), "healthy"),  # a head whose inputs have a mean
        (of([NAN, NAN]), "not judged"),
        (of([]), "not judged"),
        (of([0.9] * 4, growth=[2 * EXPLODES, 9.0, 3.0, 1.0]), "gradient explodes towards l0"),
        (of([0.9] * 4, growth=[2 * EXPLODES, 9.0, 3.0, 1.0], n_norms=4), "healthy"),
        (of([0.9] * 8, growth=[EXPLODES / 2, 2 * EXPLODES, *[1.0] * 6]), "gradient explodes towards l1"),
        (of([0.9] * 4, growth=[VANISHES / 2, 0.1, 0.3, 1.0]), "gradient vanishes towards l0"),
        (of([0.9] * 4, growth=[NAN, NAN, 0.3, 1.0]), "healthy"),
        (of([NAN] * 4, growth=[2 * EXPLODES, 9.0, 3.0, 1.0]), "gradient explodes towards l0"),
        (of([NAN] * 4, n_norms=4), "not judged"),
        (of([0.9] * 4, growth=[0.0, 0.0, 0.3, 1.0]), "gradient vanishes towards l0"),
        (of([0.05] * 4, growth=[2 * EXPLODES, 9.0, 3.0, 1.0]), "signal lost from l0 on"),
    ],
)  # fmt: skip
def test_the_words(found, verdict):
    assert found.verdict == verdict


def test_the_remedy_goes_with_it():
    lost = of([0.9, 0.05, 0.0])
    assert remedy(lost, Options()) == 'try init="auto", which looks for better weights'
    assert "auto" not in remedy(lost, Options(init=AUTO))
    assert remedy(lost, Options(mean=None, std=None)) == "LSUV may fix this"
    assert "normalise" in remedy(of([0.05, 0.0]), Options())
    assert "norms" in remedy(of([0.9] * 4, n_norms=4), Options())
    assert remedy(of([0.9] * 4), Options()) == ""
    assert remedy(of([]), Options()) == ""
    assert "several inputs" in remedy(of([NAN] * 4, n_norms=4), Options())


@pytest.fixture(scope="module")
def batch():
    return torch.as_tensor(digits_dls().one_batch()[0])


@pytest.mark.parametrize(
    ("depth", "act", "verdict"),
    [
        (17, nn.ReLU, "healthy"),
        (17, nn.Tanh, "healthy"),
        (100, nn.ReLU, "signal lost from conv"),
        (17, nn.Sigmoid, "signal lost from conv"),
        (100, nn.Tanh, "gradient explodes towards conv1"),
    ],
)
def test_of_plain_networks(depth, act, verdict, batch):
    torch.manual_seed(0)
    report = lsuv_(plain_cnn(depth, 16, act), batch)
    assert report.converged
    assert report.verdict.startswith(verdict), report
    assert report.summary().endswith(f"{report.verdict} ({report.remedy})" if report.remedy else report.verdict)


def test_default_weights_have_lost_it_too(batch):
    torch.manual_seed(0)
    report = lsuv_(plain_cnn(), batch, mean=None, std=None)
    assert report.verdict.startswith("signal lost from conv")


def test_a_signal_that_has_died_by_its_scale_is_lost(batch):
    "All the difference between images is there, but at a std of 1e-13."
    torch.manual_seed(0)
    net = plain_cnn(60, 16, nn.SiLU)
    for m in net:
        if hasattr(m, "weight"):
            nn.init.orthogonal_(m.weight)
            nn.init.zeros_(m.bias)
    report = lsuv_(net, batch, mean=None, std=None)
    assert report[-2].std_after < 1e-8
    assert report.verdict.startswith("signal lost from conv"), report


def test_a_norm_for_every_few_layers_holds_the_scale():
    report = lsuv_(tv.resnet18(num_classes=10), torch.randn(16, 3, 64, 64))
    assert report.verdict == "healthy"
    assert report.remedy == "norms hold the scale: little to gain"


@pytest.mark.parametrize("n_out", [1, 2])
def test_few_outputs_are_no_loss(n_out):
    report = lsuv_(mlp(10, 32, n_out), rows())
    assert report.verdict == "healthy", report


def test_a_head_of_zeros_says_nothing():
    net = mlp(10, 32, 3)
    nn.init.zeros_(net[-1].weight)
    assert lsuv_(net, rows()).verdict == "healthy"


def dead():
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(32, 32, bias=False), nn.ReLU())))
    net[0].weight.data.abs_()
    return net, -torch.randn(64, 32).abs()


def exploded():
    net = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(60)))
    for layer in net:
        layer.weight.data.mul_(20)
    return net, torch.randn(64, 32)


class Sign(nn.Module):
    def forward(self, x):
        return torch.sign(x)


def signs():
    return nn.Sequential(nn.Linear(32, 32), Sign(), nn.Linear(32, 3)), torch.randn(64, 32)


@pytest.mark.parametrize(
    ("made", "options", "verdict"),
    [
        (dead, {}, "signal lost from 2 on"),
        (exploded, {"mean": None, "std": None}, "signal lost from"),
        (signs, {}, "gradient vanishes towards 0"),
    ],
    ids=["dead", "exploded", "no gradient"],
)  # fmt: skip
def test_what_is_exactly_nothing_or_infinite_counts(made, options, verdict):
    net, x = made()
    assert lsuv_(net, x, **options).verdict.startswith(verdict)


def test_a_network_of_which_nothing_can_be_corrected_is_not_judged():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 8, 4)

        def forward(self, x):
            return self.rnn(x)[0]

    report = lsuv_(Recurrent(), torch.randn(16, 5, 8))
    assert (report.verdict, report.remedy) == ("not judged", "")


@pytest.mark.parametrize("n_out", [1, 3])
def test_a_batch_of_one_shows_no_signal(n_out):
    report = lsuv_(mlp(10, 32, n_out), rows(1))
    assert report.verdict == "not judged", report
    assert report.summary().endswith("; not judged (the signal can only be measured on several inputs)")


def test_auto_keeps_the_weights_of_a_network_that_cannot_be_judged():
    report = lsuv_(mlp(10, 32, 3), rows(1), init="auto")
    assert report.init == "kept your weights: not judged after plain LSUV"
    assert report.n_forward == 3


def test_of_a_layer_that_is_called_often_the_strongest_gradient_counts():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.h, self.out = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            state = torch.zeros(len(x), 32)
            for t in range(30):
                state = torch.tanh(self.inp(x[:, t]) + 0.3 * self.h(state))
            return self.out(state)

    assert lsuv_(Loop(), torch.randn(64, 30, 4)).verdict == "healthy"
