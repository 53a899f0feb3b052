"""`residual=True`: the last layer of each residual branch is found from the data; their sum stays bounded."""

import re
import warnings
from fnmatch import fnmatch
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from audit import fingerprint, moved, outputs_of, parameter_bits, rng_print
from fastai.layers import ResBlock
from fastai.learner import Learner
from fastai.vision.core import TensorImage
from fastai.vision.models.xresnet import XResNet, xresnet18
from models import convnet, images, mlp, rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    T5Config,
    T5Model,
)

from fastai_lsuv import LSUVCallback, LSUVReport, lsuv_
from fastai_lsuv.demo import digits_dls
from fastai_lsuv.report import Row

TEXT = dict(input_ids=torch.randint(0, 100, (4, 12), generator=torch.Generator().manual_seed(0)))
SMALL = dict(vocab_size=100, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
BERT = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
T5 = dict(vocab_size=100, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16)


def at_end(report):
    return [row.name for row in report if "ends a branch" in row.reason]


def opened(net):
    "With the gains at the ends of its branches no longer 0, where it starts as if it had no branches."
    for name, p in net.named_parameters():
        if name.endswith("conv3.gain"):
            nn.init.ones_(p)
    return net


# --- which layers -----------------------------------------------------------------------------------------------------

FOUND = {  # the model, a batch, wildcards for the layers that end its branches, how often that is
    "ResNet-18 without norms": (
        lambda: torchvision.models.resnet18(norm_layer=lambda c: nn.Identity()),
        images(4, side=64),
        ["*.conv2"],
        8,
    ),
    "ResNet-50 without norms": (
        lambda: torchvision.models.resnet50(norm_layer=lambda c: nn.Identity()),
        images(4, side=64),
        ["*.conv3"],
        16,
    ),
    "xresnet": (
        lambda: XResNet(partial(ResBlock, norm_type=None), 1, [2, 2, 2, 2], n_out=10, widen=0.25),
        images(4, side=64),
        ["*.convpath.1.0"],
        8,
    ),
    "ConvNeXt, LayerScale": (lambda: torchvision.models.convnext_tiny(), images(2, side=64), ["*.block.5"], 18),
    "ViT, nn.MultiheadAttention": (
        lambda: torchvision.models.vit_b_16(image_size=64),
        images(2, side=64),
        ["*.self_attention", "*.mlp.3"],
        24,
    ),
    "nn.TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True), 3, enable_nested_tensor=False
        ),
        torch.randn(4, 6, 32),
        ["*.self_attn", "*.linear2"],
        6,
    ),
    "timm, scaled weights": (lambda: opened(timm.create_model("nfnet_f0")), images(2, side=64), ["stages.*.conv3"], 12),
    "timm, two attentions side by side": (
        lambda: timm.create_model("vit_small_patch16_18x2_224", img_size=64),
        images(2, side=64),
        ["blocks.*.proj", "*.fc2"],
        72,
    ),
    "timm, MLP mixer": (lambda: timm.create_model("mixer_s16_224", img_size=64), images(2, side=64), ["*.fc2"], 16),
    "GPT-2": (lambda: GPT2LMHeadModel(GPT2Config(**SMALL)), TEXT, ["*.c_proj"], 6),
    "GPT-J, attention and MLP side by side": (
        lambda: GPTJForCausalLM(GPTJConfig(**SMALL, rotary_dim=8)),
        TEXT,
        ["*.out_proj", "*.fc_out"],
        6,
    ),
    "BERT, norms behind the sum": (lambda: BertModel(BertConfig(**BERT)), TEXT, ["*.output.dense"], 6),
    "ALBERT, shared layers": (
        lambda: AlbertModel(AlbertConfig(**BERT, embedding_size=16)),
        TEXT,
        ["*.attention.dense", "*.ffn_output"],
        6,
    ),
    "T5": (
        lambda: T5Model(T5Config(**T5)),
        TEXT | dict(decoder_input_ids=TEXT["input_ids"]),
        ["*Attention.o", "*.wo"],
        10,
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_ends_of_branches_are_found(case):
    make, batch, patterns, n = FOUND[case]
    torch.manual_seed(0)
    net = make()
    report = lsuv_(net, batch, residual=True, modules=None)
    layers = [row.name for row in report if any(fnmatch(row.name, p) for p in patterns) and row.status != "skipped"]
    assert at_end(report) == layers and layers
    for row in report:
        if row.status == "corrected":
            assert row.std_after == pytest.approx(n**-0.5 if row.name in layers else 1, abs=1e-3), row
    assert re.search(rf"{len(layers)} branch ends at {n**-0.5:.4f}"[:-1], report.summary())


@pytest.mark.parametrize(
    "make,batch",
    [
        (lambda: torchvision.models.resnet18(), images(2, side=64)),
        (lambda: torchvision.models.densenet121(), images(2, side=64)),
        (lambda: timm.create_model("efficientnet_b0"), images(2, side=64)),
        (lambda: timm.create_model("hrnet_w18_small"), images(2, side=64)),
        (lambda: xresnet18(), images(2, side=64)),
        (lambda: timm.create_model("resnet18", zero_init_last=True), images(2, side=64)),
        (convnet, images()),
        (lambda: mlp(10, 20, 5), rows()),
    ],
    ids=[
        "ResNet-18",
        "DenseNet",
        "EfficientNet",
        "HRNet",
        "xresnet, norms from 0",
        "timm ResNet-18, norms from 0",
        "plain",
        "MLP",
    ],
)
def test_a_norm_behind_the_last_layer_or_no_sum_at_all_leaves_nothing_to_bound(make, batch):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"residual=True changes nothing: no residual branch ends in a layer"):
        report = lsuv_(make(), batch, residual=True)
    assert not at_end(report) and "branch" not in report.summary()


class Net(nn.Module):
    "Two blocks of two layers, and a way to add."

    def __init__(self, add, d=12):
        super().__init__()
        self.add, self.first, self.head = add, nn.Linear(10, d), nn.Linear(d, 3)
        self.inner, self.last = (nn.ModuleList(nn.Linear(d, d) for _ in range(2)) for _ in range(2))
        self.gain = nn.Parameter(torch.full((d,), 0.5))

    def forward(self, x):
        x = self.first(x)
        for inner, last in zip(self.inner, self.last):
            x = self.add(self, x, inner, last)
        return self.head(x)


def in_place(net, x, inner, last):
    x += last(inner(x).relu())
    return x


WAYS = {
    "plus": lambda net, x, inner, last: x + last(inner(x).relu()),
    "the other way round": lambda net, x, inner, last: last(inner(x).relu()) + x,
    "minus": lambda net, x, inner, last: x - last(inner(x).relu()),
    "torch.add": lambda net, x, inner, last: torch.add(x, last(inner(x).tanh()), alpha=0.5),
    "in place": in_place,
    "through views": lambda net, x, inner, last: (x.T + last(inner(x).relu()).T).T,
    "through dropout": lambda net, x, inner, last: x + F.dropout(last(inner(x)), training=net.training),
    "through a gain": lambda net, x, inner, last: x + net.gain * last(inner(x).relu()),
    "through ReLU": lambda net, x, inner, last: x + last(inner(x).relu()).relu(),
    "through a gate": lambda net, x, inner, last: x + inner(x).sigmoid() * last(x),
    "out=": lambda net, x, inner, last: torch.add(x, last(inner(x).relu()), out=x),
    "through pooling": lambda net, x, inner, last: x + F.max_pool1d(last(inner(x).relu()), 3, 1, 1),
    "through a leaky ReLU by hand": lambda net, x, inner, last: x + (y := last(inner(x).relu())).where(y > 0, 0.1 * y),
    "rsub": lambda net, x, inner, last: torch.rsub(last(inner(x).relu()), x),
    "lerp": lambda net, x, inner, last: torch.lerp(x, last(inner(x).relu()), 0.5),
    "noise before it": lambda net, x, inner, last: x + last((inner(x) + 0.1 * torch.randn_like(x)).relu()),
    "gathered in zeros": lambda net, x, inner, last: (
        x + torch.zeros_like(x).index_add_(0, torch.arange(len(x)), last(inner(x).relu()))
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_add(way):
    net, x = Net(WAYS[way]), rows()
    report = lsuv_(net, x, residual=True)
    assert at_end(report) == ["last.0", "last.1"] and report.converged
    for row in report:
        assert outputs_of(net, x, [row.name])[row.name][1] == pytest.approx(
            0.5**0.5 if row.name.startswith("last") else 1, abs=1e-3
        )


def test_what_fastai_feeds_and_what_fills_a_buffer_is_followed():
    def through_buffer(net, x, inner, last):
        y, f = torch.empty_like(x), last(inner(x).relu())
        y[:, 4:], y[:, :4] = f[:, 4:], f[:, :4]
        return x + y

    for add, x in ((through_buffer, rows()), (WAYS["plus"], TensorImage(rows()))):
        assert at_end(lsuv_(Net(add), x, residual=True)) == ["last.0", "last.1"]


def test_squeeze_and_excite_leaves_the_scale_to_what_it_weighs():
    net = Net(
        lambda net, x, inner, last: x + (y := last(inner(x).relu())) * net.gate(y.mean(0, keepdim=True)).sigmoid()
    )
    net.gate = nn.Linear(12, 12)
    assert at_end(lsuv_(net, rows(), residual=True)) == ["last.0", "last.1"]


def test_inputs_in_an_object_of_ones_own_are_followed_from_the_first_layer():
    net = Net(WAYS["plus"])
    net.register_forward_pre_hook(lambda module, args: (args[0].x,))
    assert at_end(lsuv_(net, (SimpleNamespace(x=rows()),), residual=True)) == ["last.0", "last.1"]


@pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "supports_higher_order_operators"), reason="this PyTorch shows them to no mode"
)
def test_attention_of_higher_order_is_followed():
    attention = pytest.importorskip("torch.nn.attention.flex_attention")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return x + self.out(attention.flex_attention(q, k, v).transpose(1, 2).flatten(2))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is slow, uncompiled
        report = lsuv_(nn.Sequential(nn.Linear(10, 16), Block(), Block()), torch.randn(4, 8, 10), residual=True)
    assert at_end(report) == ["1.out", "2.out"]


def test_under_autocast():
    net, x = Net(WAYS["plus"]), rows(256)
    with torch.autocast("cpu", torch.bfloat16):
        report = lsuv_(net, x, residual=True)
    assert at_end(report) == ["last.0", "last.1"] and report.converged


@pytest.mark.cpu  # fastai's Recorder keeps its losses there, where these tests make everything
def test_the_callback_has_it_too():
    learn = Learner(
        digits_dls(),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), Block(32), Block(32), nn.Linear(32, 10)),
        cbs=LSUVCallback(residual=True, verbose=False),
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert at_end(learn.lsuv_report) == ["2.f.3", "3.f.3"]


def rms_norm(y):
    return y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6)


def standardised(y):
    return (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(
    "squash",
    [
        torch.tanh,
        lambda y: F.layer_norm(y, y.shape[1:]),
        rms_norm,
        standardised,
        F.normalize,
        lambda y: y * y.sigmoid(),
    ],
    ids=["tanh", "norm", "RMS norm by hand", "norm by hand", "length 1", "swish by hand"],
)
def test_what_does_not_come_to_the_sum_with_its_scale_ends_nothing(squash):
    with pytest.warns(UserWarning, match="changes nothing"):
        report = lsuv_(Net(lambda net, x, inner, last: x + squash(last(inner(x).relu()))), rows(), residual=True)
    assert {round(row.std_after, 3) for row in report} == {1.0}


@pytest.mark.parametrize("squash", [torch.tanh, F.gelu, rms_norm], ids=["tanh", "GELU", "norm"])
def test_nor_where_its_output_is_so_small_that_all_scales(squash):
    net = Net(lambda net, x, inner, last: x + squash(last(inner(x).relu())))
    with torch.no_grad():
        for last in net.last:
            last.weight.mul_(1e-6), last.bias.mul_(1e-6)
    with pytest.warns(UserWarning, match="changes nothing"):
        report = lsuv_(net, rows(), residual=True)
    assert {round(row.std_after, 3) for row in report} == {1.0}


def test_two_layers_side_by_side_are_no_residual_branch():
    with pytest.warns(UserWarning, match="changes nothing"):
        lsuv_(Net(lambda net, x, inner, last: (inner(x) + last(x)).relu()), rows(), residual=True)


def test_a_frozen_end_is_left_alone_and_not_counted():
    net = Net(WAYS["plus"])
    net.last[0].requires_grad_(False)
    report = lsuv_(net, rows(), residual=True)
    assert (
        at_end(report) == ["last.1"]
        and report["last.1"].std_after == pytest.approx(1, abs=1e-3)
        and report["last.0"].reason == "frozen"
    )


# --- what it is good for ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.f = nn.Sequential(nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))

    def forward(self, x):
        return x + self.f(x)


def stream(net, x):
    "Standard deviations of what the blocks put out."
    stds = []
    with torch.no_grad():
        for layer in net:
            x = layer(x)
            if isinstance(layer, Block):
                stds.append(x.std().item())
    return stds


@pytest.mark.parametrize("depth", [5, 100])
def test_the_stream_is_bounded_whatever_the_depth(depth):
    "Its variance grows from 1 to about 2; without, by 1 a block."
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(10, 64), *(Block(64) for _ in range(depth)), nn.Linear(64, 3)), rows(256)
    lsuv_(net, x)
    assert stream(net, x)[-1] > 0.8 * (1 + depth) ** 0.5
    lsuv_(net, x, residual=True)
    assert max(stream(net, x)) == pytest.approx(2**0.5, rel=0.15)


def test_a_wanted_std_counts_for_the_branches_too():
    net, x = Net(WAYS["plus"]), rows()
    report = lsuv_(net, x, std=3, residual=True)
    assert report["last.0"].std_after == pytest.approx(3 / 2**0.5, abs=3e-3) and report[
        "inner.0"
    ].std_after == pytest.approx(3, abs=3e-3)


# --- manners ----------------------------------------------------------------------------------------------------------


def test_it_takes_one_pass_more_and_leaves_no_trace():
    torch.manual_seed(0)
    net, x = torchvision.models.resnet18(norm_layer=lambda c: nn.Identity()), images(4, side=64)
    bits, before, stream_before = parameter_bits(net), fingerprint(net), rng_print()
    report = lsuv_(net, x, residual=True)
    assert report.n_forward == 4 and rng_print() == stream_before
    assert moved(bits, net) == {
        f"{row.name}.{p}" for row in report for p in ("weight", "bias") if p == "weight" or row.name == "fc"
    }
    assert fingerprint(net).keys() == before.keys()


def test_a_batch_norm_counts_its_batches_once_if_at_all():
    "Operations that are tried with twice their input must not show in buffers."
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lsuv_(net, images(), residual=True)
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())


@pytest.mark.parametrize(
    "options,error",
    [(dict(residual=1), TypeError), (dict(residual="yes"), TypeError), (dict(residual=True, std=None), ValueError)],
)
def test_bad_values_leave_the_model_alone(options, error):
    net = Net(WAYS["plus"])
    bits = parameter_bits(net)
    with pytest.raises(error, match="residual="):
        lsuv_(net, rows(), **options)
    assert not moved(bits, net)


def test_the_summary_tells_the_branch_that_is_farthest_off():
    rows = [
        Row(
            f"{i}",
            "Linear",
            1,
            0.0,
            1.0,
            0.0,
            std,
            1,
            "corrected" if std == 0.5 else "not_converged",
            "ends a branch",
        )
        for i, std in enumerate([0.5, 0.5, 0.7, 0.5])
    ]
    line = LSUVReport(rows, 4, 1.0).summary()
    assert line.startswith("LSUV: 3 corrected, 1 not converged (ends a branch): 2; worst mean 0.0000 → 0.0000"), line
    assert ", 4 branch ends at 0.7000, 1.00 s" in line, line
