"""How a gradient travels: as the audit measures it, from one backward pass of a few samples that leaves nothing."""

import math

import pytest
import torch
from audit import elasticity, fingerprint, rng_print
from models import convnet, images, mlp, rows
from torch import nn
from zoo import ARCHITECTURES, architecture

from fastai_lsuv import lsuv_
from fastai_lsuv.core.gradient import SAMPLES, WHOLE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_every_layer_as_audited(name):
    model, x = architecture(name)
    report = lsuv_(model, x)
    if name == "vit_b_32":  # whose head is of zeros
        assert all(math.isnan(row.grad_after) for row in report)
        return
    wanted = elasticity(model, x[:SAMPLES])
    judged = [row for row in report if row.n_calls == 1 and wanted.get(row.name, 0) > 0]
    assert len(judged) > 5
    for row in judged:  # two random gradients
        assert 0.3 < row.grad_after / wanted[row.name] < 3, row


def test_only_some_of_the_batch_is_run_for_it():
    net, sizes = mlp(10, 8, 3), []
    net.register_forward_pre_hook(lambda m, args: sizes.append((len(args[0]), torch.is_grad_enabled())))
    lsuv_(net, torch.randn(200, 10))
    assert sizes == [(200, False)] * 3 + [(SAMPLES, True)]


def test_it_leaves_nothing():
    net, x = convnet(), images()
    lsuv_(net, x)
    before, rng = fingerprint(net), rng_print()
    lsuv_(net, x, mean=None, std=None)
    assert fingerprint(net) == before
    assert rng_print() == rng
    assert all(p.grad is None for p in net.parameters())


def test_gradients_that_are_there_stay():
    net, x = mlp(10, 8, 3), rows()
    net(x).sum().backward()
    kept = [p.grad.clone() for p in net.parameters()]
    lsuv_(net, x)
    assert all(torch.equal(p.grad, old) for p, old in zip(net.parameters(), kept, strict=True))


class NoGrad(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            return x * 2


class Rounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no gradient comes through here")


class Rounding(nn.Module):
    def forward(self, x):
        return Rounds.apply(x)


class ToNumpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.cpu().numpy()).to(x.device)


class OnlyWhole(nn.Module):
    "A model that knows how many there are: too many for a gradient from all."

    def forward(self, x):
        return x.view(80, -1)


class OnlyWithout(nn.Module):
    "A model that refuses to run with gradients, in words of its own."

    def __init__(self, error):
        super().__init__()
        self.layers, self.error = mlp(10, 8, 3), error

    def forward(self, x):
        if torch.is_grad_enabled():
            raise self.error
        return self.layers(x)


@pytest.mark.parametrize("error", [ValueError("no"), AssertionError("no"), RuntimeError("out of memory")], ids=repr)
@pytest.mark.parametrize("options", [{}, {"mean": None, "std": None}], ids=["correct", "measure"])
def test_a_model_that_runs_only_without_is_measured_without(error, options):
    report = lsuv_(OnlyWithout(error), rows(), **options)
    assert {row.status for row in report} == {"unchanged" if options else "corrected"}
    assert all(math.isnan(row.grad_after) for row in report)


@pytest.mark.parametrize("part", [NoGrad, Rounding, ToNumpy, OnlyWhole])
def test_where_no_gradient_comes_through_it_is_nan(part):
    net = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), part(), nn.Linear(8, 3))
    if part is ToNumpy:
        net.requires_grad_(False)
    report = lsuv_(net, torch.randn(80, 10))
    assert len(report) == 2
    assert math.isnan(report[0].grad_after)
    assert report.verdict == ("not judged" if part is ToNumpy else "healthy"), "frozen layers aren't judged"


def test_everything_frozen():
    net = mlp(10, 8, 3).requires_grad_(False)
    assert all(math.isnan(row.grad_after) for row in lsuv_(net, rows(), mean=None, std=None))


def test_an_activation_in_place_behind_it_changes_nothing():
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(10, 8), nn.ReLU(inplace), nn.Linear(8, 3))
        grads.append([row.grad_after for row in lsuv_(net, rows())])
    assert grads[0] == grads[1]


def test_of_the_last_layer_it_is_one():
    assert lsuv_(mlp(10, 8, 3), rows())[-1].grad_after == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_first_samples_may_be_quieter_or_louder_than_the_others(scale):
    net = nn.Sequential(nn.Linear(10, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    x = torch.randn(200, 10)
    x[:SAMPLES] *= scale
    report = lsuv_(net, x)
    assert report[-1].grad_after == pytest.approx(1)
    assert report.verdict == "healthy"


def test_of_a_single_value():
    assert lsuv_(mlp(10, 8, 1), torch.randn(1, 10))[-1].grad_after == pytest.approx(1)


def test_hooks_on_gradients_see_training_s_only():
    net, seen = mlp(10, 8, 3), []
    net[0].register_full_backward_hook(lambda *args: seen.append("hook"))
    net[2].register_full_backward_pre_hook(lambda *args: seen.append("pre"))
    report = lsuv_(net, rows())
    assert seen == []
    assert report[0].grad_after > 0
    net(rows()).sum().backward()
    assert len(seen) == 2


def test_nothing_is_said_of_gradients(recwarn):
    net = mlp(10, 8, 3)
    net[0].register_full_backward_hook(lambda *args: None)
    lsuv_(net, rows())
    assert [str(w.message) for w in recwarn] == []


def test_a_batch_that_can_t_be_cut_is_left_alone():
    class Graph:
        def __init__(self, x):
            self.x = x

    class OfGraphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.sizes = mlp(10, 8, 3), []

        def forward(self, graph):
            if torch.is_grad_enabled():
                raise AssertionError("the whole batch with gradients")
            return self.layers(graph.x)

    report = lsuv_(OfGraphs(), (Graph(torch.randn(100, 10)),))
    assert all(math.isnan(row.grad_after) for row in report)
    assert report.verdict == "healthy"


RUNS = []


class Counting(nn.Module):
    "Notes how many samples it runs on, and whether with gradients."

    def forward(self, x):
        RUNS.append((len(x), torch.is_grad_enabled()))
        return x


MEASURES = {"mean": None, "std": None}


@pytest.mark.parametrize(
    ("n", "options", "runs"),
    [
        (WHOLE, {}, [(WHOLE, False), (WHOLE, False), (WHOLE, True)]),
        (WHOLE + 1, {}, [(WHOLE + 1, False)] * 3 + [(SAMPLES, True)]),
        (WHOLE, MEASURES, [(WHOLE, True)]),
        (WHOLE + 1, MEASURES, [(WHOLE + 1, False), (SAMPLES, True)]),
    ],
)
def test_every_run_is_counted_and_a_small_batch_needs_none_of_its_own(n, options, runs):
    net = nn.Sequential(Counting(), *mlp(10, 8, 3))
    RUNS.clear()
    report = lsuv_(net, rows()[:1].repeat(n, 1) + torch.randn(n, 10), **options)
    assert RUNS == runs
    assert report.n_forward == len(runs)
    assert not any(math.isnan(row.grad_after) for row in report)


class Refusing(nn.Module):
    "Can't be run with gradients, as what writes to its own weight can't."

    def __init__(self, message):
        super().__init__()
        self.weight, self.message = nn.Parameter(torch.ones(8)), message

    def forward(self, x):
        if torch.is_grad_enabled():
            raise RuntimeError(self.message)
        return x * self.weight


@pytest.mark.parametrize("options", [{}, MEASURES], ids=["corrected", "measured"])
def test_what_cannot_run_with_gradients_is_measured_without(options):
    net = nn.Sequential(nn.Linear(10, 8), Refusing("a leaf Variable that requires grad"), nn.Linear(8, 3))
    report = lsuv_(net, rows(), **options)
    assert report.converged or options
    assert all(math.isnan(row.grad_after) for row in report)
    assert [row.n_calls for row in report] == [1] * len(report)


class Once(nn.Module):
    "Raises in its third run, whatever that is for."

    def forward(self, x):
        RUNS.append(len(x))
        if len(RUNS) == 3:
            raise RuntimeError("too hot")
        return x


def test_another_error_is_the_model_s():
    net = nn.Sequential(nn.Linear(10, 8), Once(), nn.Linear(8, 3))
    before = fingerprint(net)
    RUNS.clear()
    with pytest.raises(RuntimeError, match="too hot"):
        lsuv_(net, rows())
    assert fingerprint(net) == before
