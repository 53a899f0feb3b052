"""The share of an output's std that is due to the input: as the audit measures it, on a sample, without a wait."""

import math

import pytest
import torch
from audit import signal as audited
from counts import Counts
from models import mlp, rows
from torch import nn
from zoo import ARCHITECTURES, architecture

from fastai_lsuv import lsuv_
from fastai_lsuv.core.signal import looks, signal
from fastai_lsuv.demo import digits_dls, plain_cnn

ENOUGH = 0.02


def shares(x):
    found = signal(x)
    if found is None:
        return math.nan, math.nan
    ((_, numbers),) = looks([found])
    return found.shares(*numbers[0].tolist())


def share(x):
    return shares(x)[0]


def exact(x):
    x = x.double().flatten(1)
    return min((x.var(0).mean() / x.var()).sqrt().item(), 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_every_layer_as_audited(name):
    model, x = architecture(name)
    before = audited(model, x)
    report = lsuv_(model, x)
    after = audited(model, x)
    rows = [row for row in report if row.name in after and row.n_calls == 1 and row.std_after > 0]
    assert len(rows) > 5
    off = {r.name: (r.signal_after, after[r.name]) for r in rows if abs(r.signal_after - after[r.name]) > ENOUGH}
    off |= {r.name: (r.signal_before, before[r.name]) for r in rows if abs(r.signal_before - before[r.name]) > ENOUGH}
    assert not off


@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (300, 16, 14, 14), (512, 2048), (16, 197, 768), (3, 5)], ids=str)
@pytest.mark.parametrize("common", [0.0, 1.0, 10.0])
def test_of_large_outputs_by_a_sample(shape, common):
    x = torch.randn(shape) + common * torch.randn(1, *shape[1:])
    assert share(x) == pytest.approx(exact(x), abs=ENOUGH)


def test_of_any_layout():
    x = torch.randn(8, 16, 28, 28) + torch.randn(1, 16, 28, 28)
    wanted = exact(x)
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.half(),
        x.double(),
    ):
        assert share(same) == pytest.approx(wanted, abs=ENOUGH), same.stride()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_at_any_scale(scale):
    x = torch.randn(64, 32) + 3 * torch.randn(1, 32)
    assert share(x * scale) == pytest.approx(exact(x), abs=1e-6)


def test_all_alike_is_nothing_and_all_different_is_all():
    assert share(torch.randn(1, 100).expand(16, 100).contiguous()) == 0
    assert share(torch.randn(256, 100)) > 0.99


@pytest.mark.parametrize(
    "x", [torch.randn(1, 8), torch.ones(4, 8), torch.tensor(1.0), torch.randn(0, 8), torch.randn(4, 0)]
)
def test_where_it_has_no_meaning_it_is_nan(x):
    assert math.isnan(share(x))


def test_a_batch_of_one_has_none_and_is_not_said_to_be_lost():
    report = lsuv_(mlp(10, 8, 3), rows()[:1].repeat(1, 1))
    assert all(math.isnan(row.signal_after) for row in report)
    assert report.verdict == "not judged"


def spread(x):
    return shares(x)[1]


def exact_spread(x):
    "By the definition: the eigenvalues of the covariance, of as many equal ones as there can be 1."
    x = x.double().flatten(1)
    variances = torch.linalg.svdvals(x - x.mean(0)).square()
    ratio = (variances.sum().square() / variances.square().sum()).item()
    return (1 - 1 / ratio) / (1 - 1 / (len(x) - 1))


@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (100, 512), (16, 5)], ids=str)
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_the_spread_over_directions(shape, common):
    x = torch.randn(shape) + common * torch.randn(shape[0], *[1] * (len(shape) - 1)) * torch.randn(1, *shape[1:])
    assert spread(x + 5) == pytest.approx(exact_spread(x), abs=ENOUGH)


def test_on_one_line_there_is_no_spread_though_the_signal_is_all_there():
    x = torch.randn(64, 1) ** 3 * torch.randn(1, 100)
    assert share(x) > 0.9
    assert spread(x) == pytest.approx(0, abs=1e-6)
    assert spread(torch.randn(64, 100)) > 0.95


def test_a_few_loud_inputs_are_no_spread():
    x = torch.randn(64, 100)
    x[0] *= 1000
    assert share(x) > 0.9
    assert spread(x) < 0.1


@pytest.mark.parametrize("x", [torch.randn(2, 8), torch.randn(8, 1), torch.randn(8)], ids=lambda x: str(x.shape))
def test_of_two_samples_or_of_one_value_each_there_is_none(x):
    assert math.isnan(spread(x))


def test_it_dies_in_a_deep_network_at_std_1():
    net, x = plain_cnn(depth=60, act=nn.Sigmoid), digits_dls().one_batch()[0]
    report = lsuv_(net, x)
    assert report[0].signal_after > 0.5
    assert report[-2].signal_after < 0.01
    assert report[-2].std_after == pytest.approx(1, abs=1e-3)


def test_it_takes_a_view_and_a_few_operations():
    x = torch.randn(16, 64, 28, 28)
    with Counts() as counts:
        signal(x, with_spread=False)
    assert counts.total <= 6
    assert counts.bytes < 4 * 2 * 16 * 64 * 28 * 28, "reads a part only"
