"""The known layer types are a shortcut past the probe: both say the same. And what the zoo taught."""

import itertools

import pytest
import torch
from audit import moved, parameter_bits
from checks import assert_exact
from models import images, rows
from torch import nn

from fastai_lsuv import lsuv_
from fastai_lsuv.core.affine import AFFINE_TYPES, GAIN_TYPES, RECURRENT_TYPES, known_parameters
from fastai_lsuv.core.probe import find_affine_parameters

VOLUME = {1: (3, 4, 12), 2: (3, 4, 9, 9), 3: (3, 4, 6, 6, 6)}
CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
SHAPES = [
    dict(kernel_size=3),
    dict(kernel_size=1),
    dict(kernel_size=3, stride=2),
    dict(kernel_size=2, dilation=2),
    dict(kernel_size=3, padding=1),
]
CASES = [
    (kind, dims, shape, groups, bias)
    for (kind, dims), shape, groups, bias in itertools.product(CONVS.items(), SHAPES, (1, 2, 4), (True, False))
]


def run_of(layer):
    def run(x):
        with torch.no_grad():
            return layer(x)

    return run


def assert_agree(layer, x, mixing=True):
    "Weight, bias, what an initialiser is for, and how channels are told apart."
    known, probed = (
        known_parameters(layer, layer._parameters),
        find_affine_parameters(run_of(layer), list(layer.parameters()), x, mixing),
    )
    assert probed is not None and probed.weight is known.weight and probed.bias is known.bias
    assert probed.gain == pytest.approx(1, abs=1e-3)
    assert len(probed.matrices) == 1 and probed.matrices[0] is known.matrices[0]
    if probed.per_channel is None:
        return  # grouped transposed ones: their channels are no single dimension of the weight
    y = layer(x)
    assert probed.channel_dim(y) == known.channel_dim(y) % y.dim()
    factor = torch.rand(y.shape[known.channel_dim(y)]) + 0.5
    expected, got = (torch.broadcast_to(c.per_channel(factor), layer.weight.shape) for c in (known, probed))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind,dims,shape,groups,bias", CASES, ids=lambda o: getattr(o, "__name__", str(o)))
def test_convolutions(kind, dims, shape, groups, bias):
    "But for one: depthwise and of size 1 a convolution is a gain, parted from those of norms by its type alone."
    layer, x = kind(4, 8, groups=groups, bias=bias, **shape), torch.randn(VOLUME[dims])
    mixing = not (groups == 4 and shape["kernel_size"] == 1)
    assert_agree(layer, x, mixing)
    if not mixing:
        assert find_affine_parameters(run_of(layer), list(layer.parameters()), x) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10), (2, 3, 5, 10), (10,)], ids=str)
@pytest.mark.parametrize("n_out", [1, 8, 10])
def test_linear(n_out, shape, bias):
    assert_agree(nn.Linear(10, n_out, bias=bias), torch.randn(shape))


@pytest.mark.parametrize("weight", [lambda w: w.mul_(1e-2), lambda w: w.mul_(1e2)], ids=["small", "large"])
def test_weights_smaller_and_larger_than_usual(weight):
    layer = nn.Linear(10, 8)
    with torch.no_grad():
        weight(layer.weight)
    assert_agree(layer, torch.randn(6, 10))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    assert_agree(nn.Linear(10, 8).to(dtype), torch.randn(6, 10).to(dtype))


def test_every_known_type_is_tried():
    assert set(AFFINE_TYPES) == {nn.Linear, *CONVS}


GAINS = {
    nn.BatchNorm1d: lambda: (nn.BatchNorm1d(8), torch.randn(6, 8)),
    nn.BatchNorm2d: lambda: (nn.BatchNorm2d(3), images()),
    nn.InstanceNorm2d: lambda: (nn.InstanceNorm2d(3, affine=True), images()),
    nn.LayerNorm: lambda: (nn.LayerNorm(10), rows()),
    nn.GroupNorm: lambda: (nn.GroupNorm(2, 4), torch.randn(3, 4, 5)),
    nn.PReLU: lambda: (nn.PReLU(), rows()),
    nn.Embedding: lambda: (nn.Embedding(9, 4), torch.arange(9)),
    nn.EmbeddingBag: lambda: (nn.EmbeddingBag(9, 4), torch.arange(9)[:, None]),
}


@pytest.mark.parametrize("kind", GAINS, ids=lambda kind: kind.__name__)
def test_what_is_passed_over_the_probe_passes_over_too(kind):
    layer, x = GAINS[kind]()
    assert issubclass(kind, GAIN_TYPES)
    assert find_affine_parameters(run_of(layer), list(layer.parameters()), x) is None


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_probe_finds_nothing_in_recurrent_weights(kind):
    layer = kind(6, 5, batch_first=True)
    assert isinstance(layer, RECURRENT_TYPES)
    assert find_affine_parameters(run_of(layer), list(layer.parameters()), torch.randn(4, 7, 6)) is None


# --- recurrent layers are named --------------------------------------------------------------------------------------


class Loop(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.unused, self.head = kind(10, 6), kind(10, 6), nn.Linear(6, 3)

    def forward(self, x):
        if not isinstance(self.cell, nn.RNNCellBase):
            return self.head(self.cell(x)[0])
        out = self.cell(x)
        return self.head(out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize(
    "options", [{}, {"init": nn.init.orthogonal_}, {"modules": ["cell", "head"]}], ids=["default", "init", "modules"]
)
def test_recurrent_weights_are_named_and_left_alone(kind, options):
    net, x = Loop(kind), rows()
    bits = parameter_bits(net)
    report = lsuv_(net, x, **options)
    assert (report["cell"].status, report["cell"].reason) == ("skipped", "recurrent weights")
    assert report["head"].status == "corrected" and moved(bits, net) == {"head.weight", "head.bias"}
    if "modules" not in options:
        assert report["unused"].reason == "never called"


# --- several outputs, starved heads, rounding ------------------------------------------------------------------------


class Router(nn.Module):
    "Scores, and the shares that come of them: those change with the weights, too. (Mixtures of experts.)"

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 10) * 0.01)

    def forward(self, x):
        scores = x @ self.w.T
        return scores, scores.softmax(1)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts, self.head = Router(), nn.Linear(10, 4 * 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head((self.experts(x).reshape(len(x), 4, 6) * self.router(x)[1][..., None]).sum(1))


def test_all_outputs_of_a_layer_are_those_of_its_corrected_weights():
    net, x = Routed(), rows()
    before, bits = net.router(x)[1], parameter_bits(net)
    report = lsuv_(net, x)
    assert (before - net.router(x)[1]).abs().max() > 0.3, "the shares depend on the weights"
    assert report.n_forward == 3 and report["router"].status == "corrected"
    assert_exact(net, x, report, bits)


class Detector(nn.Module):
    "A head on what scores high: nothing does in the untouched network."

    def __init__(self):
        super().__init__()
        self.score, self.head = nn.Linear(10, 1), nn.Linear(10, 4)

    def forward(self, x):
        return self.head(x[self.score(x)[:, 0] > self.least])


@pytest.mark.parametrize("least,status", [(1.0, "corrected"), (1e6, "skipped")])
def test_a_head_that_gets_values_only_once_the_layers_before_it_are_right(least, status):
    net, x = Detector(), rows()
    net.least = least
    with torch.no_grad():
        net.score.weight.mul_(1e-3)
    bits = parameter_bits(net)
    report = lsuv_(net, x)
    assert report["head"].status == status and report["head"].reason == (
        "" if status == "corrected" else "too few values"
    )
    assert ("head.weight" in moved(bits, net)) == (status == "corrected")
    assert_exact(net, x, report, bits)
    assert lsuv_(net, x, mean=None, std=None)["head"].reason == report["head"].reason


@pytest.mark.parametrize("least,is_new", [(1.0, True), (1e6, False)])
def test_such_a_head_is_initialised_like_all_others(least, is_new):
    net, x = Detector(), rows()
    net.least = least
    with torch.no_grad():
        net.score.weight.mul_(1e-3)
    bits = parameter_bits(net)
    report = lsuv_(net, x, init=nn.init.orthogonal_)
    w = net.head.weight.detach()
    assert (
        torch.allclose(w @ w.T, (w @ w.T)[0, 0] * torch.eye(4), atol=1e-5)
        == is_new
        == ("head.weight" in moved(bits, net))
    )
    assert_exact(net, x, report, bits)


def test_a_mean_that_leaves_too_few_digits_for_one_step():
    "As gMLP's gates begin: weights of nearly zero, a bias of 1; what the next layers see of them is mostly rounding."
    torch.manual_seed(0)
    gate, net = nn.Linear(10, 10), nn.Sequential()
    with torch.no_grad():
        gate.weight.mul_(1e-6)
        gate.bias.fill_(1)
    net = nn.Sequential(gate, nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    x, bits = rows(), parameter_bits(net)
    report = lsuv_(net, x)
    assert_exact(net, x, report, bits)
    assert report.n_forward == 5


def test_masks_are_no_bad_batch():
    layer, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(4, 8, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    assert lsuv_(layer, dict(src=x, src_mask=mask)).converged
    for bad in (mask.masked_fill(mask == 0, float("-inf")), mask - 1, mask.abs(), mask * 0):
        with pytest.raises(ValueError, match="NaN or infinity"):
            lsuv_(layer, dict(src=x, src_mask=bad))
