"""`init="auto"`: the user's weights where they can be trained, else what is best by measurement; at most ten passes."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from audit import differences, fingerprint, parameter_bits, rng_print
from checks import row_values
from models import convnet, images
from torch import nn

from fastai_lsuv import lsuv_
from fastai_lsuv.core.activation import activations
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.demo import digits_dls, plain_cnn
from fastai_lsuv.init import critical_std


@pytest.fixture(scope="module")
def batch():
    return torch.as_tensor(digits_dls().one_batch()[0])


def made(*args, **kwargs):
    torch.manual_seed(0)
    return plain_cnn(*args, **kwargs)


def test_healthy_weights_are_kept_to_the_bit(batch):
    plain, auto = made(), made()
    expected = lsuv_(plain, batch)
    report = lsuv_(auto, batch, init="auto")
    assert parameter_bits(auto) == parameter_bits(plain)
    assert row_values(report) == row_values(expected)
    assert report.n_forward == 3
    assert report.init == "kept your weights: healthy after plain LSUV"


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU])
@pytest.mark.parametrize("depth", [60, 100])
def test_deep_networks_become_healthy(act, depth, batch):
    net, rng = made(depth, 16, act), rng_print()
    before = fingerprint(net)
    report = lsuv_(net, batch, init="auto")
    assert report.verdict == "healthy", report.summary()
    assert report.converged
    assert report.n_forward <= 10
    assert rng_print() == rng
    assert not differences(before, fingerprint(net), but=set(parameter_bits(net)))


@pytest.mark.parametrize("kind", ["odd", "grouped", "transposed", "1d", "3d", "functional", "mixed"])
def test_layers_of_all_kinds(kind):
    net, x = KINDS[kind]()
    plain = lsuv_(net, x, mean=None, std=None)
    report = lsuv_(net, x, init="auto")
    assert report.converged, report
    assert report.n_forward <= 10
    assert report.verdict == "healthy", (plain.summary(), report.summary())


def stack(n, layer, act, *head):
    return nn.Sequential(*(m for i in range(n) for m in (layer(i), act(i))), *head)


class Functional(nn.Module):
    def __init__(self, depth=60):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


relu = lambda i: nn.ReLU()
KINDS = {
    "odd": lambda: (stack(60, lambda i: nn.Linear(33, 33), relu), torch.randn(64, 33)),
    "grouped": lambda: (
        stack(60, lambda i: nn.Conv2d(32, 32, 3, padding=1, groups=2), relu),
        torch.randn(32, 32, 6, 6),
    ),
    "transposed": lambda: (
        stack(60, lambda i: nn.ConvTranspose2d(16, 16, 3, padding=1), relu),
        torch.randn(32, 16, 6, 6),
    ),
    "1d": lambda: (stack(60, lambda i: nn.Conv1d(16, 16, 3, padding=1), relu), torch.randn(32, 16, 12)),
    "3d": lambda: (stack(60, lambda i: nn.Conv3d(16, 16, 3, padding=1), relu), torch.randn(16, 16, 4, 4, 4)),
    "functional": lambda: (Functional(), torch.randn(64, 32)),
    "mixed": lambda: (
        stack(60, lambda i: nn.Linear(32, 32), lambda i: nn.ReLU() if i % 3 else nn.Tanh()),
        torch.randn(64, 32),
    ),
}


def test_frozen_and_excluded_layers_keep_their_weights(batch):
    net = made(60, 16)
    net.conv5.requires_grad_(False)
    before = parameter_bits(net)
    report = lsuv_(net, batch, init="auto", exclude="conv9")
    after = parameter_bits(net)
    assert "looks_linear_" in report.init or "delta_orthogonal_" in report.init
    assert report["conv5"].status == "skipped"
    assert {n for n in after if after[n] == before[n]} == {f"conv{i}.{p}" for i in (5, 9) for p in ("weight", "bias")}


def test_it_says_what_was_taken_and_why(batch):
    report = lsuv_(made(100, 16, nn.Tanh), batch, init="auto")
    assert re.match(r"chose (looks_linear_|delta_orthogonal_), std=0\.3", report.init)
    assert report.init.endswith("(after plain LSUV: gradient explodes towards conv1)")
    assert f'init="auto" {report.init}' in report.summary()
    assert report.std < 1


def test_an_interrupt_changes_nothing(batch, monkeypatch):
    net = made(60, 16)
    before, n = fingerprint(net), []

    def interrupted(self, *args, **kwargs):
        n.append(1)
        if len(n) == 6:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    forward = DryRun.forward
    monkeypatch.setattr(DryRun, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lsuv_(net, batch, init="auto")
    assert fingerprint(net) == before


def test_only_measuring_tries_nothing(batch):
    net = made(60, 16)
    before = fingerprint(net)
    report = lsuv_(net, batch, init="auto", mean=None, std=None)
    assert report.n_forward == 1
    assert fingerprint(net) == before


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU(inplace=True)], ids=repr)
def test_activations_are_found_by_values_alone(act):
    net, x = nn.Sequential(nn.Linear(8, 64), act, nn.Linear(64, 64), act, nn.Linear(64, 3)), torch.randn(256, 8)
    lsuv_(net, x)
    found = activations(DryRun(net, ((x,), {})), [net[0], net[2], net[4]])
    assert len(found) == 2
    z = torch.linspace(-2, 2, 41, dtype=torch.float64, device="cpu")
    assert torch.allclose(found[0](z), act(z.clone()), atol=0.02)
    assert critical_std(found[0], 50) == pytest.approx(critical_std(act, 50), rel=0.1)


def test_what_is_no_function_of_each_value_is_no_activation():
    net = nn.Sequential(nn.Linear(8, 64), nn.Softmax(1), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 3))
    found = activations(DryRun(net, ((torch.randn(256, 8),), {})), [net[0], net[2], net[4]])
    assert len(found) <= 1  # a norm of alike samples nearly is one


def test_a_convnet_with_norms_is_left_alone():
    report = lsuv_(convnet(), images(), init="auto")
    assert report.init == "kept your weights: healthy after plain LSUV"


@pytest.mark.parametrize("init", ["orthogonal", 3, "Auto"])
def test_other_words_are_refused(init):
    with pytest.raises(TypeError, match="init="):
        lsuv_(nn.Linear(3, 3), torch.randn(8, 3), init=init)


class FixedBatch(nn.Module):
    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.layers = stack(60, lambda i: nn.Linear(32, 32), lambda i: act())

    def forward(self, x):
        return self.layers(x.view(64, 32))


@pytest.mark.parametrize("act", [nn.ReLU, nn.Softshrink])
def test_what_can_t_be_found_out_is_judged_by_measurement_alone(act):
    report = lsuv_(FixedBatch(act), torch.randn(64, 32), init="auto")
    assert report.n_forward <= 10


def test_in_inference_mode():
    with torch.inference_mode():
        net = stack(60, lambda i: nn.Linear(32, 32), relu)
        assert lsuv_(net, torch.randn(64, 32), init="auto").n_forward <= 10


class Rounds(nn.Module):
    "Layers that are called several times take more passes."

    def __init__(self, n, rounds):
        super().__init__()
        self.layers, self.rounds = stack(n, lambda i: nn.Linear(32, 32), lambda i: nn.Sigmoid()), rounds

    def forward(self, x):
        for _ in range(self.rounds):
            x = self.layers(x)
        return x


class Square(nn.Module):
    def forward(self, x):
        return x**2


@pytest.mark.parametrize(
    "make",
    [lambda: Rounds(5, 4), lambda: Rounds(10, 3), lambda: stack(60, lambda i: nn.Linear(32, 32), lambda i: Square())],
    ids=["5 x 4", "10 x 3", "squares"],
)
def test_at_most_ten_passes_and_nothing_worse_than_plain(make):
    torch.manual_seed(0)
    net, x = make(), torch.randn(64, 32)
    plain = lsuv_(copy.deepcopy(net), x)
    report = lsuv_(net, x, init="auto")
    assert report.n_forward <= max(10, plain.n_forward)
    assert sum(r.status == "not_converged" for r in report) <= sum(r.status == "not_converged" for r in plain)


class Residual(nn.Module):
    "Takes more passes for each attempt, as none can be made with gradients."

    def __init__(self):
        super().__init__()
        self.layers = stack(60, lambda i: nn.Linear(32, 32), relu)
        self.branch = stack(1, lambda i: nn.Linear(32, 32), relu, nn.Linear(32, 32))

    def forward(self, x):
        x = self.layers(x)
        return torch.from_numpy((x + self.branch(x)).numpy())


def test_no_pass_is_made_for_a_look_at_what_there_is_no_room_to_try():
    assert lsuv_(Residual(), torch.randn(16, 32), init="auto").n_forward <= 10


def test_branches_that_are_not_there_are_said_once(recwarn):
    lsuv_(made(60, 16), torch.as_tensor(digits_dls().one_batch()[0]), init="auto", residual=True)
    told = [w for w in recwarn if "residual=True changes nothing" in str(w.message)]
    assert len(told) == 1
    assert told[0].filename == __file__
