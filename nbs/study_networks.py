"""The study's networks, for images of 14x14: plain, residual and normalised ones."""

from functools import partial

import torch
from fastai.layers import ResBlock
from fastai.vision.models.xresnet import XResNet
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer

from fastai_lsuv.demo import ACTIVATIONS


def plain_cnn(act: str, depth: int, width: int, norm: type[nn.Module] | None = None) -> nn.Module:
    "3x3 convolutions, three of which halve the image (two at once, one halfway), and a linear head; no shortcuts."
    n_convs = depth - 1
    halving, layers, n_in = (0, 1, max(2, n_convs // 2)), [], 1
    for i in range(n_convs):
        layers.append(nn.Conv2d(n_in, width, 3, stride=2 if i in halving else 1, padding=1))
        layers += [norm(width)] if norm else []
        layers.append(ACTIVATIONS[act]())
        n_in = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4, 10))


def mlp(act: str, depth: int, width: int, norm: type[nn.Module] | None = None) -> nn.Module:
    "Linear layers of one width on the pixels, and a head."
    layers, n_in = [], 14 * 14
    for _ in range(depth - 1):
        layers += [nn.Linear(n_in, width), *([norm(width)] if norm else []), ACTIVATIONS[act]()]
        n_in = width
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(n_in, 10))


class Residual(nn.Module):
    "x + f(x), and nothing that holds either."

    def __init__(self, act: str, width: int):
        super().__init__()
        conv = partial(nn.Conv2d, width, width, 3, padding=1)
        self.branch = nn.Sequential(ACTIVATIONS[act](), conv(), ACTIVATIONS[act](), conv())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


def residual_cnn(act: str, depth: int, width: int) -> nn.Module:
    "Two convolutions that halve the image, residual blocks of two, a linear head; no norms."
    stem = [nn.Conv2d(1, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)]
    blocks = [Residual(act, width) for _ in range((depth - 3) // 2)]
    return nn.Sequential(*stem, *blocks, ACTIVATIONS[act](), nn.Flatten(), nn.Linear(width * 16, 10))


def xresnet(act: str, depth: int, width: int, **block: object) -> nn.Module:
    "fastai's, small."
    return XResNet(partial(ResBlock, **block), 1, [2, 2, 2, 2], c_in=1, n_out=10, stem_szs=(8, 16, 64), widen=0.25)


class ThreeChannels(nn.Module):
    "Grey images for networks that want colour."

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(-1, 3, -1, -1)


def convnext(act: str, depth: int, width: int) -> nn.Module:
    blocks = [CNBlockConfig(width, 2 * width, 3), CNBlockConfig(2 * width, None, 3)]
    return nn.Sequential(ThreeChannels(), nn.Upsample(scale_factor=2), ConvNeXt(blocks, num_classes=10))


def vit(act: str, depth: int, width: int) -> nn.Module:
    return nn.Sequential(ThreeChannels(), VisionTransformer(14, 2, depth, 4, width, 2 * width, num_classes=10))


NETS = {
    "plain CNN": plain_cnn,
    "MLP": mlp,
    "CNN with batch norm": partial(plain_cnn, norm=nn.BatchNorm2d),
    "MLP with layer norm": partial(mlp, norm=nn.LayerNorm),
    "residual CNN": residual_cnn,
    "xresnet": xresnet,
    "xresnet, no norm in blocks": partial(xresnet, norm_type=None),
    "ConvNeXt": convnext,
    "ViT": vit,
}
