"""What is compared: models, a forward pass as LSUV makes it, `lsuv_`, the package `lsuv`, the fast.ai course's loop."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torchvision.models as tv
from torch import nn

from fastai_lsuv import lsuv_
from fastai_lsuv.core.correction import Correction
from fastai_lsuv.core.discovery import Discovery
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.core.options import Options


def mlp(depth=100, width=512):
    "As many linear layers as `depth`, ReLU between."
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Case:
    "A model and its batch, on a device."

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    small: tuple[int, ...] = ()  # of the batch on which the others' passes are counted
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.preserve_format
    goal: float = 3.5  # forward passes, for all of `lsuv_`

    def build(self, small=False):
        "A freshly initialised model and its batch."
        torch.manual_seed(0)
        with torch.device(self.device):
            model, x = self.make(), torch.randn(self.small if small else self.shape)
        layout = dict(dtype=self.dtype, memory_format=self.memory_format)
        return model.to(**layout), x.to(**layout)


SMALL = 2, 3, 64, 64

MODELS = {
    "ResNet-50": Case(tv.resnet50, (16, 3, 128, 128), SMALL),
    "VGG-16-BN": Case(tv.vgg16_bn, (16, 3, 128, 128), SMALL),
    "ViT-B/16": Case(partial(tv.vit_b_16, image_size=128), (16, 3, 128, 128), (1, 3, 128, 128)),
    "ConvNeXt-T": Case(tv.convnext_tiny, (16, 3, 128, 128), SMALL),
    "MobileNetV2": Case(tv.mobilenet_v2, (16, 3, 128, 128), SMALL),
    "MLP, 100 layers": Case(mlp, (512, 512), (8, 512)),
}

on_a_gpu = partial(Case, device="cuda")
half = partial(on_a_gpu, tv.resnet50, (256, 3, 224, 224), memory_format=torch.channels_last, goal=5)

ON_A_GPU = {
    "ResNet-50": on_a_gpu(tv.resnet50, (256, 3, 224, 224)),
    "VGG-16-BN": on_a_gpu(tv.vgg16_bn, (128, 3, 224, 224)),
    "ViT-B/16": on_a_gpu(tv.vit_b_16, (256, 3, 224, 224)),
    "ConvNeXt-T": on_a_gpu(tv.convnext_tiny, (256, 3, 224, 224)),
    "MobileNetV2": on_a_gpu(tv.mobilenet_v2, (256, 3, 224, 224)),
    "MLP, 100 layers": on_a_gpu(mlp, (4096, 512), goal=8),
    "ResNet-50, small batch": on_a_gpu(tv.resnet50, (16, 3, 224, 224), goal=8),
    "ResNet-50, bf16, channels-last": half(dtype=torch.bfloat16),
    "ResNet-50, fp16, channels-last": half(dtype=torch.float16),
}


# --- one forward pass -------------------------------------------------------------------------------------------------


def in_eval_mode(model):
    return model.eval()


def as_lsuv_measures(model):
    "Eval mode, but batch norms on the batch's own statistics, as training will see it."
    model.eval()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.train()
    return model


def forward_pass(model, x):
    with torch.no_grad():
        model(x)


# --- ours -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def correcting_pass(model, x) -> Iterator:
    "The second of the three passes alone, ready to be run: measure and correct every layer, from its hook."
    dry_run = DryRun(model, ((x,), {}))
    yield Correction(dry_run, Discovery(dry_run, Options()).layers, Options()).make_pass


whole = lsuv_


# --- the others -------------------------------------------------------------------------------------------------------


def package(model, x):
    "`lsuv` from PyPI with its default settings; it prints, which is caught."
    from lsuv import lsuv_with_singlebatch

    with contextlib.redirect_stdout(io.StringIO()):
        lsuv_with_singlebatch(model, x)


def course(model, x, max_steps=10):
    """The loop of the fast.ai course (part 2, 2019, notebook 07a_lsuv; Jeremy Howard, Apache-2.0), on all layers.

    As published, but for what it can't do: layers without a bias keep their mean, layers that don't run are left out,
    and each loop ends after `max_steps` (where the bias alone spreads more than is wanted it has no end).
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    for m in running(model, layers, x):
        lsuv_module(model, m, x, max_steps)


@torch.no_grad()
def lsuv_module(mdl, m, xb, max_steps):
    stat = {}

    def append_stat(mod, inp, outp):
        stat.update(mean=outp.data.mean().item(), std=outp.data.std().item())

    h = m.register_forward_hook(append_stat)
    steps = 0
    while m.bias is not None and mdl(xb) is not None and abs(stat["mean"]) > 1e-3 and (steps := steps + 1) <= max_steps:
        m.bias -= stat["mean"]
    steps = 0
    while mdl(xb) is not None and abs(stat["std"] - 1) > 1e-3 and (steps := steps + 1) <= max_steps:
        m.weight.data /= stat["std"]
    h.remove()


def running(model, layers, x):
    "Those of the layers whose forward runs."
    ran = set()
    hooks = [m.register_forward_hook(lambda m, args, out: ran.add(m)) for m in layers]
    type(model).forward(model, x)  # not a pass of the loop's: no hook on the model counts it
    for h in hooks:
        h.remove()
    return [m for m in layers if m in ran]


class Passes:
    "Counts the forward passes of a model for the length of a `with` block, and the seconds spent in and beside them."

    def __init__(self, model):
        self.model, self.n, self.inside = model, 0, 0.0

    def __enter__(self):
        def before(m, args):
            self.n += 1
            self.entered = time.perf_counter()

        def after(m, args, out):
            self.inside += time.perf_counter() - self.entered

        self.hooks = [self.model.register_forward_pre_hook(before), self.model.register_forward_hook(after)]
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.beside = time.perf_counter() - self.started - self.inside
        for h in self.hooks:
            h.remove()
