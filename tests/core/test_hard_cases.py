"""Cases in which a simpler implementation goes wrong: each was seen to."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch._dynamo  # here, since its import sets warnings filters
import torch.nn.functional as F
from audit import audit, differences, fingerprint, parameter_bits, rng_print
from fastai.callback.hook import hook_outputs
from fastai.learner import Learner
from models import Tally
from torch import nn

from fastai_lsuv import LSUVCallback, lsuv_
from fastai_lsuv.core.blocks import correct_block
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.statistics import moments
from fastai_lsuv.core.target import Target
from fastai_lsuv.demo import digits_dls, plain_cnn


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-3, 3)


class Squashed(nn.Module):
    "Linear for the probe's noise, not for a large input."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 4) * 1e-4)

    def forward(self, x):
        return (x @ self.w).tanh()


@pytest.mark.parametrize("first", [Clamped(8, 4), Squashed()], ids=["clamped", "squashed"])
def test_what_is_not_linear_on_the_real_input_does_not_mislead_the_layers_behind_it(first):
    net, x = nn.Sequential(first, nn.Linear(4, 3)), torch.randn(64, 8) * 50
    report = lsuv_(net, x)
    assert report["1"].status == "corrected"
    behind = audit(net, x)[-1]
    assert abs(behind.std - 1) <= 1e-3 and abs(behind.mean) <= 1e-3


class Gated(nn.Module):
    "A parameter of its own and a layer inside: the probe runs it again."

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.g = nn.Parameter(torch.full((8, 1, 1), 0.5))

    def forward(self, x):
        return x + self.g * self.c(x).relu()


class Skipping(nn.Module):
    "Takes a stored output from fastai's hook, as DynamicUnet does."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.d, self.e = nn.Conv2d(3, 8, 3, padding=1), Gated(), nn.Conv2d(8, 4, 3), nn.Conv2d(12, 4, 3)
        self.hooks = hook_outputs([self.b.c], detach=False)

    def forward(self, x):
        x = self.d(self.b(self.a(x)))
        return self.e(torch.cat([x, F.interpolate(self.hooks[0].stored, x.shape[-2:])], 1))


def test_the_users_hooks_do_not_see_the_probe():
    net, x, seen = Skipping(), torch.randn(4, 3, 8, 8), []
    handle = net.b.c.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    report = lsuv_(net, x)
    assert seen == [4, 4, 4] and report.n_forward == 3
    handle.remove()
    assert all(abs(r.std - 1) <= 1e-3 and abs(r.mean) <= 1e-3 for r in audit(net, x))
    net.hooks.remove()


class Masked(nn.Module):
    "A transformer with a padding mask, whose fast path makes nested tensors in eval mode and no child is called."

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.e, self.t, self.h = nn.Embedding(20, 16, padding_idx=0), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x):
        return self.h(self.t(self.e(x), src_key_padding_mask=(x == 0)).mean(1))


def test_padding_masks():
    net, x = Masked(), torch.randint(1, 20, (8, 10))
    for i in range(8):
        x[i, 3 + i :] = 0  # at the end, as the fast path wants it
    fastpath = torch.backends.mha.get_fastpath_enabled()
    report = lsuv_(net, x)
    assert {row.status for row in report} == {"corrected"} and len(report) == 7 and report.n_forward == 3
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_a_constant_channel_is_told_and_the_others_are_right():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(64, 8)
    net[0].weight.data[3] = 0
    report = lsuv_(net, x, per_channel=True)
    assert (report["0"].status, report["0"].reason) == ("not_converged", "constant output") and not report.converged
    stds = audit(net, x)[0].channel_std
    assert stds[3] == 0 and all(abs(s - 1) <= 1e-3 for i, s in enumerate(stds) if i != 3)


@pytest.mark.cpu  # Dynamo follows the audit's hooks into what makes tensors on a GPU
@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_compiled_models_are_corrected_without_compiling_anything(how):
    net, x, compiled = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(32, 4), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    if how == "in place":
        net.compile(backend=backend)
    report = lsuv_(net if how == "in place" else torch.compile(net, backend=backend), x)
    assert [row.status for row in report] == ["corrected", "corrected"] and not compiled
    assert all(abs(r.std - 1) <= 1e-3 and abs(r.mean) <= 1e-3 for r in audit(net, x))


def test_a_model_with_nothing_to_correct():
    with pytest.warns(UserWarning, match="nothing to correct"):
        report = lsuv_(nn.Sequential(nn.ReLU()), torch.randn(3, 4))
    assert len(report) == 0 and report.converged
    assert (
        report.summary().startswith("LSUV: nothing to correct")
        and repr(report) == report.summary()
        and report._repr_html_()
    )


class Drawing(nn.Module):
    "Draws from all three streams, and says what it drew."

    def __init__(self):
        super().__init__()
        self.drawn = Tally()

    def forward(self, x):
        self.drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return x * (1 + sum(self.drawn[-1]))


def test_every_pass_draws_the_same_and_the_streams_are_as_before():
    probed = OneBias()  # in the first pass, whose noise must not be drawn from the pass's stream
    net, x = nn.Sequential(nn.Linear(4, 8), probed, Drawing(), nn.Linear(8, 2)), torch.randn(32, 4)
    before = rng_print()
    assert lsuv_(net, x).converged
    assert rng_print() == before
    assert len(net[2].drawn) == 3 and len(set(net[2].drawn)) == 1


def test_scripted_parts_are_left_alone():
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4))
    net = nn.Sequential(nn.Linear(4, 4), scripted, nn.BatchNorm1d(4), nn.Linear(4, 2))
    bits = parameter_bits(scripted)
    report = lsuv_(net, torch.randn(32, 4))
    assert [row.name for row in report if row.status == "corrected"] == ["0", "3"] and parameter_bits(scripted) == bits


class Fixed(nn.Module):
    "A block with a `bias` that can't be set."

    def __init__(self):
        super().__init__()
        self.c = nn.Linear(4, 4)

    def forward(self, x):
        return F.leaky_relu(self.c(x), 0.3)

    @property
    def bias(self):
        return self.c.bias.mean()


def test_a_property_that_cannot_be_set_is_not_tried():
    net = nn.Sequential(Fixed(), nn.Linear(4, 2))
    report = lsuv_(net, torch.randn(64, 4), modules=nn.Module.children)
    assert report.converged and abs(report["0"].mean_after) <= 1e-3


def test_a_rollback_that_fails_for_one_weight_still_restores_everything_else():
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2))
    net[2].weight = nn.Parameter(torch.randn(1, 8).expand(8, 8))  # can't be written to
    x = torch.randn(32, 8)
    bits, before, rng = parameter_bits(net), fingerprint(net), rng_print()
    with pytest.raises(RuntimeError):
        lsuv_(net, x)
    assert not differences(before, fingerprint(net)) and rng_print() == rng and parameter_bits(net) == bits


def test_init_on_channels_last_weights():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    assert lsuv_(net, torch.randn(4, 3, 9, 9), init=nn.init.orthogonal_).converged
    assert net[2].weight.is_contiguous(memory_format=torch.channels_last)


class OneBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x @ self.w + self.b


def test_one_bias_for_all_channels_cannot_go_by_channel():
    (row,) = lsuv_(nn.Sequential(OneBias()), torch.randn(32, 8), per_channel=True)
    assert (row.status, row.reason) == ("skipped", "excluded by mode")
    assert lsuv_(nn.Sequential(OneBias()), torch.randn(32, 8)).converged


class Moved:
    "A scale that writes down its positions."

    def __init__(self):
        self.position, self.past = torch.zeros(1, dtype=torch.float64), []

    def image(self, seen):
        return self.position - math.log(seen.std[0])

    def move(self, position, running):
        self.position = position
        self.past.append(position)


def test_a_block_that_does_not_get_there_is_left_at_its_best_step():
    stds, setting = iter([0.8, 0.9, 0.6]), Moved()
    run = lambda std=None: moments(torch.tensor([-1.0, 1.0]).double() / 2**0.5 * (std or next(stds))).on_host()
    block = Layer("block", nn.Identity(), None, target=Target(None, 1.0))
    correct_block(block, setting, run(0.5), run, Options(max_iter=3))
    assert len(setting.past) == 4 and setting.position == setting.past[1]


def test_a_shared_block_of_one_sign_keeps_its_mean_and_says_so():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    (row,) = lsuv_(nn.Sequential(block, block, block), torch.randn(64, 4), modules=nn.Module.children)
    assert (row.status, row.reason, row.n_calls) == ("corrected", "one sign, mean kept", 3)


# --- a refusal holds for good, and no hook stays ---------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    learn = Learner(digits_dls(), plain_cnn(4), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    return learn


def fit(learn, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.0, **kwargs)
    return "lsuv_report" in vars(learn)


@pytest.mark.cpu  # fastai's Recorder keeps its losses there, where these tests make everything
def test_a_refusal_outlives_the_sign_that_led_to_it(trained, capsys):
    trained.add_cb(LSUVCallback())
    assert not fit(trained) and "lsuv_init" in capsys.readouterr().out
    assert not fit(trained, reset_opt=True)
    twin = copy.deepcopy(trained)
    assert not fit(twin, reset_opt=True)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        {"max_iter": float("inf")},
        {"max_iter": 2.5},
        {"mean": True},
        {"std": True},
        {"exclude": 0},
        {"exclude": ""},
        {"modules": lambda m: None},
    ],
    ids=lambda option: " ".join(option),
)
def test_odd_options(option):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = fingerprint(net)
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        lsuv_(net, torch.randn(8, 4), **option)
    assert not differences(before, fingerprint(net))


@pytest.mark.parametrize("empty", [[], (), None])
def test_to_exclude_nothing_is_no_error(empty):
    assert len(lsuv_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(8, 4), exclude=empty)) == 2


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match=r"LSUVCallback\(\).*'stdd'.*'std'"):
        LSUVCallback(stdd=1)


@pytest.mark.parametrize("batch", [torch.randn(4, 1, 8, 8), {"x": torch.randn(4, 1, 8, 8)}], ids=["tensor", "dict"])
def test_a_batch_that_is_no_tuple(batch):
    learn = Learner(digits_dls(), plain_cnn(4))
    with pytest.raises(TypeError, match=r"batch.*\(xb, yb\)"):
        learn.lsuv_init(batch)


def test_a_mean_for_a_layer_of_constant_output_whose_std_is_left_alone():
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4, bias=False))
    nn.init.zeros_(net[1].weight)
    report = lsuv_(net, torch.randn(16, 8), mean=0.3, std=None)
    assert [row.status for row in report] == ["corrected", "skipped"]
