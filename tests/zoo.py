"""What every guarantee is tried on: the architectures people use, and one small model for each difficulty."""

from __future__ import annotations

from functools import partial

import torch
import torchvision.models as tv
from models import (
    Attention,
    Auxiliary,
    Backwards,
    Bilinear,
    Conv1D,
    Noisy,
    PlainLinear,
    Residual,
    TiedDecoder,
    TiedPair,
    TwoHeads,
    TwoInputs,
    convnet,
    course_net,
    images,
    mlp,
    old_weight_norm,
    rows,
)
from torch import nn

# --- torchvision and fastai, at the smallest size that each can take -------------------------------------------------


def xresnet18():
    from fastai.vision.models.xresnet import xresnet18

    return xresnet18(n_out=10)


ARCHITECTURES = {  # name: (builder, side of the image, images)
    "alexnet": (tv.alexnet, 96, 8),
    "vgg11": (tv.vgg11, 64, 4),
    "resnet18": (tv.resnet18, 64, 8),
    "resnet50": (tv.resnet50, 64, 8),
    "mobilenet_v2": (tv.mobilenet_v2, 64, 8),
    "densenet121": (tv.densenet121, 64, 8),
    "convnext_tiny": (tv.convnext_tiny, 64, 4),
    "efficientnet_b0": (tv.efficientnet_b0, 64, 8),
    "squeezenet1_1": (tv.squeezenet1_1, 64, 8),
    "swin_t": (tv.swin_t, 64, 4),
    "vit_b_32": (partial(tv.vit_b_32, image_size=64), 64, 4),
    "xresnet18": (xresnet18, 64, 8),
}


def architecture(name, seed=0):
    "The named architecture, freshly initialised, and a batch for it."
    build, side, n = ARCHITECTURES[name]
    torch.manual_seed(seed)
    return build(), images(n, 3, side)


# --- all of the above that every guarantee is tried on ---------------------------------------------------------------

ZOO = {  # name: (builder, batch), the batch as lsuv_ takes it
    "mlp": (lambda: mlp(10, 16, 16, 3), lambda: rows()),
    "mlp, in place": (lambda: mlp(10, 16, 16, 3, inplace=True), lambda: rows()),
    "no biases": (lambda: mlp(10, 16, 16, 3, bias=False), lambda: rows()),
    "convnet": (convnet, lambda: images()),
    "batch norm, dropout": (lambda: convnet(norm=nn.BatchNorm2d, drop=0.3), lambda: images()),
    "group norm": (lambda: convnet(norm=partial(nn.GroupNorm, 2)), lambda: images()),
    "residual": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            *(
                Residual(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
                for _ in range(3)
            ),
            nn.Flatten(),
            nn.LazyLinear(4),
        ),
        lambda: images(),
    ),
    "backwards": (Backwards, lambda: rows()),
    "two inputs": (TwoInputs, lambda: (rows(), rows(d=4, seed=2))),
    "by keyword": (TwoInputs, lambda: dict(b=rows(d=4, seed=2), a=rows(), scale=2.0)),
    "siamese": (TwoHeads, lambda: (rows(), rows(seed=2) * 3)),
    "tied pair": (TiedPair, lambda: rows()),
    "tied decoder": (TiedDecoder, lambda: torch.arange(60).reshape(6, 10) % 30),
    "look-alike": (lambda: nn.Sequential(PlainLinear(10, 8), nn.ReLU(), PlainLinear(8, 3, bias=False)), lambda: rows()),
    "gpt layers": (lambda: nn.Sequential(Conv1D(8, 10), nn.GELU(), Conv1D(3, 8)), lambda: rows()),
    "bilinear": (Bilinear, lambda: rows()),
    "attention": (Attention, lambda: rows().reshape(8, 8, 10)),
    "transformer": (
        lambda: nn.Sequential(
            nn.Linear(10, 16), nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=True), nn.Linear(16, 3)
        ),
        lambda: rows().reshape(8, 8, 10),
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(10, 8)), nn.ReLU(), nn.Linear(8, 3)),
        lambda: rows(),
    ),
    "weight norm, old": (
        lambda: nn.Sequential(old_weight_norm(nn.Linear(10, 8)), nn.ReLU(), nn.Linear(8, 3)),
        lambda: rows(),
    ),
    "noisy": (Noisy, lambda: rows()),
    "auxiliary": (Auxiliary, lambda: rows()),
    "course": (course_net, lambda: images(16, 1, 28)),
}


def zoo(name, seed=0):
    "A freshly made model of the zoo, its lazy layers made real, and its batch."
    build, batch = ZOO[name]
    torch.manual_seed(seed)
    model, batch = build(), batch()
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        with torch.no_grad():
            model(batch)
    return model, batch
