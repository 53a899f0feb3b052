"""Statistics are those of each layer's own output: whole and exact if small, within 2% of the std if sampled."""

from collections import OrderedDict

import pytest
import torch
import torch._dynamo  # here, since its import sets warnings filters
from fastai.torch_core import TensorBase
from learners import scans
from models import Shared, images, mlp, rows
from recorded import Checkpointed, fed
from torch import nn
from witness import assert_as_seen, assert_close, close, measured, records
from zoo import ZOO, xresnet18, zoo

from fastai_lsuv.recording.sampling import SAMPLE


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("two inputs", "by keyword", "siamese", "course")])
def test_all_layers_of_the_zoo(name):
    "In place, shared, tied, attention, weight norm, never run in this mode: whatever is called and small, exactly."
    rec, seen = fed(*zoo(name))
    assert_as_seen(rec, seen)


def test_two_inputs():
    model, batch = zoo("siamese")
    rec, seen = fed(model, *batch)
    assert_as_seen(rec, seen)
    assert seen[0]["tower"] and rec.to_frame().layer.tolist().count("tower") == 2, "both calls pooled"


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU,
        nn.ReLU6,
        nn.Hardtanh,
        nn.LeakyReLU,
        nn.ELU,
        nn.SELU,
        nn.CELU,
        nn.SiLU,
        nn.Hardswish,
        nn.Mish,
        nn.Dropout,
    ],
)
def test_an_activation_in_place_behind_the_layer(act):
    "The layer's own output, not what the next one made of it."
    rec, seen = fed(nn.Sequential(nn.Linear(10, 16), act(inplace=True), nn.Linear(16, 4)), rows())
    assert_as_seen(rec, seen)
    assert ("1" in rec.layer_names) == (act is not nn.Dropout)


def test_activations_of_other_libraries():
    import timm.layers as tl
    from fastai.layers import MishJitAutoFn  # noqa: F401

    acts = [
        nn.GELU(),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.Softplus(),
        nn.PReLU(),
        nn.Softmax(-1),
        nn.GLU(),
        tl.Swish(),
        tl.Mish(),
        tl.GELU(),
    ]
    layers = [nn.Linear(8, 8), *acts[:6], nn.Linear(8, 16), *acts[6:]]
    rec, seen = fed(nn.Sequential(*layers), rows(d=8))
    assert_as_seen(rec, seen)
    assert len(rec.layer_names) >= len(layers) - 3 and {"0", "1", "2", "3", "4", "5", "6", "7", "8"} <= set(
        rec.layer_names
    )


# --- large outputs ----------------------------------------------------------------------------------------------------


def index(shape, axis):
    "Of each value, its place along `axis`."
    return (
        torch.arange(shape[axis]).view([-1 if i == axis % len(shape) else 1 for i in range(len(shape))]).expand(shape)
    )


def patterns(shape):
    "Values that differ by their place in every way that a regular sample could miss."
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    last, first = index(shape, -1), index(shape, 0)
    yield "noise", noise * 3 + 1
    yield "border", noise + 10 * ((last == 0) | (last == shape[-1] - 1))
    yield "ramp", noise * 0.1 + last / shape[-1]
    yield "items", noise + 8 * (first % 2)
    yield "checks", noise * 0.1 + (last + first) % 2
    for n in (n for n in (2, 4, 16, 256) if noise.numel() % n == 0):
        yield f"period {n}", noise * 0.1 + torch.arange(noise.numel()).view(shape) % n
    if len(shape) > 2:
        channel, row = index(shape, 1), index(shape, -2)
        yield "channels", noise + channel % 8
        yield "one half", noise * 0.1 + (channel < shape[1] // 2)
        yield "all borders", noise + 6 * ((last == 0) | (last == shape[-1] - 1) | (row == 0) | (row == shape[-2] - 1))
        yield "rectified", (noise + 2 * torch.sin(channel.float())).relu()


class Emit(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.register_buffer("x", x)

    def forward(self):
        return self.x


class Emits(nn.Module):
    def __init__(self, xs):
        super().__init__()
        self.emit, self.w = nn.ModuleDict({f"as {k}": Emit(x) for k, x in xs.items()}), nn.Parameter(torch.ones(()))

    def forward(self, x):
        for e in self.emit.values():
            e()
        return x.mean() * self.w


SHAPES = [
    (4, 64, 64, 64),
    (4, 256, 32, 32),
    (1, 256, 56, 56),
    (32, 197, 96),
    (1, 3, 256, 256),
    (64, 4096),
    (1, 1, 2**18),
    (7, 33, 33, 33),
    (64, 256, 4, 4),
    (4, 17, 768),
    (6, 10, 7, 11, 13),
    (30, 10, 7, 11, 13),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sampled_without_aliasing(shape, layout):
    "Mean and std within 2% of the std, the near-zero share within two points, in whichever order the values lie."
    xs = dict(patterns(shape))
    if layout == "channels last":
        if len(shape) != 4:
            pytest.skip("images only")
        xs = {k: x.contiguous(memory_format=torch.channels_last) for k, x in xs.items()}
    if layout == "transposed":
        xs = {k: x.transpose(0, -1).contiguous().transpose(0, -1) for k, x in xs.items()}
    assert next(iter(xs.values())).numel() > SAMPLE, "no sample, no test"
    rec, _seen = fed(Emits(xs), torch.zeros(4, 1), batches=1, modules="emit.*")
    (found,) = records(rec)
    assert found.keys() == {f"emit.as {k}" for k in xs}
    assert {
        k: found[f"emit.as {k}"] for k, x in xs.items() if not close(found[f"emit.as {k}"], measured(x), 0.02)
    } == {}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_real_convolutions(layout):
    "Borders, where padding makes the values others, are neither missed nor over-represented."
    model, x = xresnet18().to(memory_format=layout), images(8, 3, 64).contiguous(memory_format=layout)
    rec, seen = fed(model, x, batches=1)
    assert 8 * 32 * 32 * 32 > 4 * SAMPLE, "the stem"
    assert_as_seen(rec, seen, 0.02)


def signal(y):
    "Of the whole output, by the definition."
    y = y.detach().double()
    return (y.var(0).mean() / y.var()).sqrt().item()


@pytest.mark.parametrize("n", [64, 12, 37])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["", "channels last"])
def test_signal_is_that_of_the_whole_output(n, layout):
    "Of images that are images, upsampled: neighbours are alike, and borders for all inputs."
    x = torch.tensor(scans()[0][:n].reshape(n, 1, 8, 8)).float().repeat_interleave(3, 1)
    x = nn.functional.interpolate((x - 4.88) / 6.02, size=48, mode="bilinear").contiguous(memory_format=layout)
    torch.manual_seed(0)
    model, outputs = xresnet18().to(memory_format=layout), {}

    def see(name):
        return lambda m, args, out: outputs.update({name: signal(out)}) if name not in outputs else None

    handles = [m.register_forward_hook(see(name), prepend=True) for name, m in model.named_modules()]
    rec, _ = fed(model, x, batches=1)
    [handle.remove() for handle in handles]
    found = dict(zip(rec.to_frame().layer, rec.to_frame().signal))
    assert len(found) > 40 and {k: v for k, v in found.items() if abs(v - outputs[k]) > 0.025} == {}


def test_the_signal_of_what_is_alike_for_all_inputs_is_zero_and_of_one_input_unknown():
    alike = torch.randn(1, 6, 4).expand(8, 6, 4).clone()
    xs = {"alike": alike, "all": torch.randn(8, 6, 4), "constant": torch.ones(8, 6), "single": torch.randn(1, 24)}
    rec, _ = fed(Emits(xs), torch.zeros(4, 1), batches=1, modules="emit.*")
    found = dict(zip(rec.to_frame().layer, rec.to_frame().signal))
    assert found["emit.as alike"] < 1e-3 and found["emit.as constant"] == 0
    assert found["emit.as all"] == pytest.approx(signal(xs["all"]), abs=1e-4)
    assert found["emit.as single"] != found["emit.as single"]


def test_a_wide_convolution_of_large_maps():
    conv = nn.Conv2d(1, 256, 3, padding=1)
    with torch.no_grad():
        conv.bias.copy_(torch.linspace(-1, 1, 256))
    rec, seen = fed(nn.Sequential(conv, nn.ReLU(inplace=True), nn.Conv2d(256, 2, 1)), images(2, 1, 64) + 3, batches=1)
    assert_as_seen(rec, seen, 0.02)


def test_small_ones_exactly_whatever_their_layout():
    n = int(SAMPLE**0.5) // 8 * 8
    x = torch.randn(8, n // 8, n) * 5 + 2
    xs = {
        "all": x,
        "transposed": x.transpose(0, 2),
        "sliced": x[:, ::2],
        "expanded": x[:1].expand(4, -1, -1),
        "one": torch.tensor([3.0]),
        "scalar": torch.tensor(3.0),
        "integers": torch.arange(12),
        "half": x.half(),
        "bf16": x.bfloat16(),
        "double": x.double(),
        "constant": torch.full((100,), 7.0),
        "shifted": x + 1e4,
        "tiny": x * 1e-30,
        "large": x * 1e25,
        "subclass": TensorBase(x),
    }
    rec, _seen = fed(Emits(xs), torch.zeros(4, 1), batches=1, modules="emit.*")
    (found,) = records(rec)
    for k, x in xs.items():
        if k in ("integers",) and f"emit.as {k}" not in found:
            continue
        assert_close(found[f"emit.as {k}"], measured(x), 2e-4 if k == "shifted" else 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_seen(value):
    x = torch.randn(SAMPLE // 2)
    x[77] = value
    rec, _ = fed(Emits({"bad": x, "empty": torch.zeros(0, 3)}), torch.zeros(4, 1), batches=1, modules="emit.*")
    assert not torch.tensor(records(rec)[0]["emit.as bad"][1]).isfinite()
    assert "emit.as empty" not in records(rec)[0]


# --- outputs that aren't a tensor -------------------------------------------------------------------------------------


class Puts(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(10, 8), kind

    def forward(self, x):
        y = self.fc(x)
        return {
            "tuple": lambda: (y, x),
            "dict": lambda: {"y": y, "x": x},
            "nested": lambda: ([(y,)], x),
            "ordered": lambda: OrderedDict(y=y, x=x),
            "none first": lambda: (None, y),
            "nothing": lambda: None,
            "numbers": lambda: (3, "a"),
        }[self.kind]()


class Takes(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.puts, self.head = Puts(kind), nn.Linear(10, 2)

    def forward(self, x):
        self.puts(x)
        return self.head(x)


@pytest.mark.parametrize("kind", ["tuple", "dict", "nested", "ordered", "none first", "nothing", "numbers"])
def test_the_first_tensor_of_what_a_layer_puts_out(kind):
    rec, seen = fed(Takes(kind), rows(), modules=["puts", "puts.fc", "head"])
    assert_as_seen(rec, [{k: v for k, v in r.items() if k != "puts"} for r in seen]) if kind in (
        "nothing",
        "numbers",
    ) else None
    if kind in ("nothing", "numbers"):
        return
    for got, want in zip(records(rec), seen):
        assert_close(got["puts"], want["puts.fc"])


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(layer):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = layer(10, 8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    rec, seen = fed(Reads(), torch.randn(8, 5, 10))
    assert rec.layer_names == ["rnn", "head"]
    assert_as_seen(rec, seen)


def test_awd_lstm():
    "Its wrappers call their layers by ways of their own; the LSTMs are there all the same."
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model

    model = get_language_model(AWD_LSTM, 30, dict(awd_lstm_lm_config, emb_sz=12, n_hid=16, n_layers=2))
    rec, seen = fed(model, torch.randint(30, (6, 9)), batches=3)
    assert_as_seen(rec, seen)
    lstms = [n for n, m in model.named_modules() if isinstance(m, nn.LSTM)]
    assert len(lstms) == 2 and set(lstms) | {"1.decoder"} <= set(records(rec)[0]), "all that run"


def test_a_layer_called_several_times_is_pooled():
    rec, seen = fed(Shared(4), rows())
    assert_as_seen(rec, seen)


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.never, self.n = nn.Linear(10, 4), nn.Linear(10, 4), nn.Linear(10, 4), 0

    def forward(self, x):
        self.n += 1
        return (self.a if self.n % 2 else self.b)(x)


def test_modules_that_are_not_called():
    "Absent or NaN where they aren't, at no other's cost, and readable."
    rec, seen = fed(Sometimes(), rows(), batches=5, with_hist=True)
    assert rec.layer_names == ["a", "b", "never"]
    assert_as_seen(rec, seen)
    assert [*records(rec)[1]] == ["b"]
    assert rec.hist("never").shape[0] == rec.hist("a").shape[0] and len(rec.summary()) in (2, 3)
    for name in ("never", "b"):
        rec.layer_stats(name), rec.color_dim(name), rec.plot_layer_stats(name)
    rec.plot_stats(), rec.color_dim(), rec.dead_chart()


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, with_grad):
    "The second pass, in the backward, is none of the batch's; and it runs as it must."
    rec, seen = fed(Checkpointed(use_reentrant, mlp(10, 16, 16, 3)), rows(), batches=3, with_grad=with_grad)
    assert_as_seen(rec, seen)


@pytest.mark.parametrize("how", ["plain", "torch.compile", ".compile()"])
def test_the_model_itself(how):
    "Where it is a layer, or chosen: its own output, once."
    model = nn.Linear(10, 3)
    if how == ".compile()":
        model.compile(backend="eager")
    rec, seen = fed(torch.compile(model, backend="eager") if how == "torch.compile" else model, rows(), with_grad=True)
    assert rec.layer_names == [""] and len(rec.summary()) == 1
    assert_as_seen(rec, seen)
    rec, seen = fed(mlp(10, 16, 3), rows(), modules=nn.Module)
    assert rec.layer_names == ["", "0", "1", "2"]
    assert_as_seen(rec, seen)
