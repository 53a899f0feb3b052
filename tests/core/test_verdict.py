"""Whether a network can be trained: the words, where they point, and that they agree with training."""

import math

import pytest
import torch
import torchvision.models as tv
from models import mlp, rows
from torch import nn

from fastai_lsuv import lsuv_
from fastai_lsuv.core.options import AUTO, Options
from fastai_lsuv.core.statistics import Measured
from fastai_lsuv.core.verdict import EXPLODES, VANISHES, Trainability, remedy
from fastai_lsuv.demo import digits_dls, plain_cnn

NAN = math.nan


def of(signals, excess=None, spreads=None, n_norms=0):
    n = len(signals)
    seen = [Measured(9, (0.0,), (1.0,), s, a) for s, a in zip(signals, spreads or [1.0] * n, strict=True)]
    return Trainability([f"l{i}" for i in range(n)], seen, excess or [1.0] * n, n_norms)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (of([0.9, 0.8, 0.7, 0.6]), "healthy"),
        (of([0.9, 0.5, 0.09, 0.01]), "signal lost from l2 on"),
        (of([0.0, 0.0]), "signal lost from l0 on"),
        (of([0.9, 0.05, 0.8, 0.7]), "healthy"),  # a gate that is nearly constant
        (of([0.9, 0.05, 0.8, 0.02]), "healthy"),  # a head whose inputs have a mean
        (of([0.9, 0.9, 0.9, 0.9], spreads=[0.9, 0.5, 0.1, 0.0]), "signal lost from l2 on"),
        (of([0.9, 0.9, 0.9, 0.9], spreads=[0.9, 0.9, 0.9, NAN]), "healthy"),
        (of([NAN, NAN]), "healthy"),
        (of([]), "healthy"),
        (of([0.9] * 4, excess=[2 * EXPLODES, 9.0, 3.0, 1.0]), "gradient explodes towards l0"),
        (of([0.9] * 4, excess=[2 * EXPLODES, 9.0, 3.0, 1.0], n_norms=4), "healthy"),
        (of([0.9] * 8, excess=[EXPLODES / 2, 2 * EXPLODES, *[1.0] * 6]), "gradient explodes towards l1"),
        (of([0.9] * 4, excess=[VANISHES / 2, 0.1, 0.3, 1.0]), "gradient vanishes towards l0"),
        (of([0.9] * 4, excess=[NAN, NAN, 0.3, 1.0]), "healthy"),
        (of([0.05] * 4, excess=[2 * EXPLODES, 9.0, 3.0, 1.0]), "signal lost from l0 on"),
    ],
)  # fmt: skip
def test_the_words(found, verdict):
    assert found.verdict == verdict


def test_the_remedy_goes_with_it():
    lost = of([0.9, 0.05, 0.0])
    assert remedy(lost, Options()) == 'init="auto" looks for better weights'
    assert "auto" not in remedy(lost, Options(init=AUTO))
    assert "norms" in remedy(of([0.9] * 4, n_norms=4), Options())
    assert remedy(of([0.9] * 4), Options()) == ""


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
