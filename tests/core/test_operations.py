"""What LSUV costs on a device, counted on the CPU: operations, memory traffic and waits beyond the forward's."""

import pytest
import torch
import torchvision.models as tv
from counts import Counts, as_on_a_device, of_lsuv, plain_cnn, plain_mlp

from fastai_lsuv import lsuv_

MOST_OPERATIONS = 14  # for each layer and pass
OF_A_NORM = 4  # copies of its buffers, for each pass
MOST_TRAFFIC = 2.2  # outputs that are read or written, for each pass: 1.7 is what can't be avoided
MOST_WAITS = 9  # in all passes together


@pytest.mark.parametrize(
    ("make", "shape", "most"),
    [
        (lambda: plain_cnn(10), (32, 3, 32, 32), MOST_OPERATIONS),
        (lambda: plain_cnn(10, norm=True), (32, 3, 32, 32), MOST_OPERATIONS + OF_A_NORM),
        (lambda: plain_mlp(20, 128), (16384, 128), MOST_OPERATIONS),
    ],
    ids=["plain cnn", "batch norm", "mlp"],
)
def test_few_operations_and_little_traffic(make, shape, most):
    operations, traffic, _ = of_lsuv(make(), torch.randn(shape))
    assert operations <= most
    assert traffic <= MOST_TRAFFIC


@pytest.mark.parametrize("options", [{"per_channel": True}, {"std": 0.5, "mean": 0.1}], ids=str)
def test_little_traffic_whatever_is_wanted(options):
    _, traffic, _ = of_lsuv(plain_cnn(10), torch.randn(32, 3, 32, 32), **options)
    assert traffic <= MOST_TRAFFIC


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_as_many_operations_for_each_layer_however_many_there_are(norm):
    x = torch.randn(4, 3, 8, 8)
    (few, _, _), (many, _, _) = (of_lsuv(plain_cnn(depth, 8, norm), x) for depth in (5, 40))
    assert many <= few


@pytest.mark.parametrize("make", [lambda n: plain_cnn(n, 8), plain_mlp], ids=["plain cnn", "mlp"])
def test_as_many_waits_however_many_layers_there_are(make):
    x = torch.randn(4, 3, 8, 8) if make(1)[0].weight.dim() == 4 else torch.randn(64, 32)
    (_, _, few), (_, _, many) = (of_lsuv(make(depth), x) for depth in (3, 30))
    assert many == few <= MOST_WAITS


def vit(depth):
    return tv.VisionTransformer(16, 8, depth, 2, 16, 32, num_classes=3)


def convnext(depth):
    return tv.ConvNeXt([tv.convnext.CNBlockConfig(8, None, depth)], stochastic_depth_prob=0.2, num_classes=3)


@pytest.mark.parametrize("make", [vit, convnext])
def test_blocks_of_one_kind_are_probed_once(make):
    counts = []
    for depth in (2, 8):
        model, x = make(depth), torch.randn(4, 3, 16, 16)
        with as_on_a_device(), Counts() as whole:
            lsuv_(model, x)
        counts.append(whole.waits)
    assert counts[1] == counts[0]
