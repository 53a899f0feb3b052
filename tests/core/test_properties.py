"""Random architectures (hypothesis): exact at the end, all or nothing, nothing moved but weights and biases."""

import itertools

import torch
import torch.nn.functional as F
from audit import audit, differences, fingerprint, moved, outputs_of, parameter_bits, rng_print
from checks import assert_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import PlainLinear
from torch import nn

from fastai_lsuv import lsuv_

TRY = settings(deadline=None, max_examples=100, derandomize=True, suppress_health_check=list(HealthCheck))
WIDTH = 6
ACTS = {
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x),
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "leaky_": lambda x: F.leaky_relu_(x, 0.1),
    "mul_": lambda x: x.mul_(0.5).add_(0.1),
    "none": lambda x: x,
}


class Act(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return ACTS[self.name](x)


class Branches(nn.Module):
    "The branches' sum, or their concatenation mixed back to the width."

    def __init__(self, branches, mix):
        super().__init__()
        self.branches, self.mix = nn.ModuleList(branches), mix

    def forward(self, x):
        outs = [b(x.clone()) for b in self.branches]
        return self.mix(torch.cat(outs, 1)) if self.mix is not None else sum(outs[1:], outs[0])


class Skip(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x.clone())


class Plan(dict):
    "Shared by all copies of a model."

    def __deepcopy__(self, memo):
        return self


class Tap(nn.Module):
    "Passes on, and fails at its `at`-th call (outside of what a fingerprint sees)."

    def __init__(self):
        super().__init__()
        self.plan = Plan()

    def forward(self, x):
        self.plan["calls"] = self.plan.get("calls", 0) + 1
        if self.plan["calls"] == self.plan.get("at"):
            raise self.plan["error"]
        return x


class Case(tuple):
    "A network and its batch, printed so that a failure can be read."

    def __repr__(self):
        return f"{self[0]} on {self[1].dtype} {tuple(self[1].shape)}, {self[1].mean():.3g} ± {self[1].std():.3g}"


@st.composite
def nets(draw, dtypes=(torch.float32, torch.float64)):
    "A network of random depth and shape, on images or on rows, and a batch for it."
    conv = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    shared = draw(st.booleans())
    pool = [layer(draw, conv, WIDTH)] if shared else []
    body = [block(draw, conv, pool, 2) for _ in range(draw(st.integers(1, 5)))]
    head = (
        [nn.Flatten(), nn.Linear(WIDTH * 36 if conv else WIDTH, draw(st.integers(1, 5)))] if draw(st.booleans()) else []
    )
    net = nn.Sequential(layer(draw, conv, WIDTH), Tap(), *body, Tap(), *head)
    dtype = draw(st.sampled_from(dtypes))
    x = torch.randn(8, WIDTH, 6, 6) if conv else torch.randn(32, WIDTH)
    x = x * draw(st.sampled_from([0.01, 1.0, 50.0])) + draw(st.sampled_from([0.0, 1.0]))
    return Case((net.to(dtype).train(draw(st.booleans())), x.to(dtype)))


def layer(draw, conv, n_in):
    bias = draw(st.booleans())
    if not conv:
        return draw(st.sampled_from([nn.Linear, PlainLinear]))(n_in, WIDTH, bias=bias)
    kind = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]))
    return kind(n_in, WIDTH, 3, padding=1, bias=bias, groups=draw(st.sampled_from([1, 2])))


def norm(draw, conv):
    plain = [nn.BatchNorm2d if conv else nn.BatchNorm1d, lambda n: nn.GroupNorm(2, n)]
    return draw(st.sampled_from(plain))(WIDTH)


def block(draw, conv, pool, depth):
    kinds = ["layer", "layer", "norm", "drop"] + ["shared"] * len(pool) + ["skip", "sum", "cat"] * bool(depth)
    kind, act = draw(st.sampled_from(kinds)), Act(draw(st.sampled_from(sorted(ACTS))))
    if kind == "layer":
        return nn.Sequential(layer(draw, conv, WIDTH), act)
    if kind == "norm":
        return nn.Sequential(layer(draw, conv, WIDTH), norm(draw, conv), act)
    if kind == "drop":
        return nn.Sequential(layer(draw, conv, WIDTH), act, nn.Dropout(0.5))
    if kind == "shared":
        return nn.Sequential(pool[0], act)
    inner = lambda: block(draw, conv, pool, depth - 1)
    if kind == "skip":
        return Skip(inner())
    return Branches([inner(), inner()], layer(draw, conv, 2 * WIDTH) if kind == "cat" else None)


def sharing(net, x):
    return [r.name for r in audit(net, x) if r.n_calls > 1]


@TRY
@given(nets())
def test_exact_at_the_end_and_nothing_else_moved(case):
    net, x = case
    before, bits, rng = fingerprint(net), parameter_bits(net), rng_print()
    report = lsuv_(net, x, max_iter=20)
    norms = [n for n, m in net.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm))]
    may = {n for n in bits if n.rpartition(".")[0] not in norms}
    assert not differences(before, fingerprint(net), but=may) and rng_print() == rng

    shared = sharing(net, x)
    assert_exact(net, x, report, bits, may_fail=shared)
    for name, (mean, std) in outputs_of(net, x, lookalikes(net, report)).items():
        if report[name].n_calls == 1:
            assert abs(std - 1) <= 1e-3, name
        if report[name].n_calls == 1 and net.get_submodule(name).bias is not None:
            assert abs(mean) <= 1e-3, name
    if not shared and all(row.n_calls <= 1 for row in report):
        assert report.n_forward == 3
    assert report.converged == all(row.status != "not_converged" for row in report)
    moved_only_by_rows = {row.name for row in report if row.status in ("corrected", "not_converged")}
    assert {n.rpartition(".")[0] for n in moved(bits, net)} <= with_aliases(net, moved_only_by_rows)


def lookalikes(net, report):
    return [
        n
        for n, m in net.named_modules()
        if isinstance(m, PlainLinear) and report[n].status in ("corrected", "unchanged")
    ]


def with_aliases(net, names):
    "The names, and every other name under which the same module can be reached."
    modules = {id(net.get_submodule(n)) for n in names}
    return {n for n, m in net.named_modules(remove_duplicate=False) if id(m) in modules}


@TRY
@given(nets(), st.sampled_from([RuntimeError, KeyError, KeyboardInterrupt, ValueError]), st.integers(1, 3), st.data())
def test_all_or_nothing_under_a_failure_anywhere(case, kind, at, data):
    net, x = case
    taps = [(n, m) for n, m in net.named_modules() if isinstance(m, Tap)]
    name, tap = data.draw(st.sampled_from(taps))
    tap.plan.update(at=at, error=kind("injected"))
    before, rng = fingerprint(net), rng_print()
    try:
        lsuv_(net, x)
    except kind as e:
        if kind is not KeyboardInterrupt:
            assert "injected" in str(e) and name in str(e), e
    else:
        raise AssertionError(f"{kind.__name__} in pass {at} was swallowed")
    assert not differences(before, fingerprint(net)) and rng_print() == rng
    tap.plan.clear()
    lsuv_(net, x)


@TRY
@given(nets(dtypes=(torch.float16, torch.bfloat16)))
def test_half_precision_is_right_to_a_few_eps(case):
    net, x = case
    eps = torch.finfo(x.dtype).eps
    report = lsuv_(net, x)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    for r in audit(net, x):
        if report[r.name].status == "corrected" and r.n_calls == 1:
            of_bias = r.module.bias.abs().max().item() if r.has_bias else 0  # Wx has the mean that the bias takes away
            tol = 1e-3 + 4 * eps * max(1, abs(r.mean) / r.std, of_bias / r.std)
            assert abs(r.std - 1) <= tol and (not r.has_bias or abs(r.mean) <= tol), (r.name, r.mean, r.std)


@TRY
@given(nets(), st.floats(-2, 2), st.floats(0.05, 20))
def test_any_target(case, mean, std):
    net, x = case
    bits = parameter_bits(net)
    report = lsuv_(net, x, mean=mean, std=std, max_iter=20)
    assert_exact(net, x, report, bits, mean=mean, std=std, tol=1e-3 * max(1, std), may_fail=sharing(net, x))


@TRY
@given(nets())
def test_a_second_run_finds_nothing_to_do(case):
    net, x = case
    first = lsuv_(net, x, max_iter=20)
    bits, settled = parameter_bits(net), first.converged
    again = lsuv_(net, x, max_iter=20)
    if settled:
        assert not moved(bits, net) and not [row for row in again if row.status == "corrected"], f"{first}\n{again}"
    assert [row.name for row in again] == [row.name for row in first]


@TRY
@given(nets(), st.data())
def test_frozen_layers_are_untouched(case, data):
    net, x = case
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, PlainLinear, nn.Conv2d, nn.ConvTranspose2d))]
    frozen = [m for m in layers if data.draw(st.booleans())]
    for p in itertools.chain(*(m.parameters() for m in frozen)):
        p.requires_grad_(False)
    bits = parameter_bits(net)
    report = lsuv_(net, x, max_iter=20)
    assert_exact(net, x, report, bits, may_fail=sharing(net, x))
    assert not {n for n in moved(bits, net) if any(net.get_parameter(n) is p for m in frozen for p in m.parameters())}
