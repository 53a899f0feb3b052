"timm: of each of its modules the architecture with the fewest parameters."

from __future__ import annotations

import timm
import timm.models
import torch

from .architecture import Architecture, Built
from .inputs import crops

SMALLER = {"deepseek_vit": {"depth": 4}}  # there is none below 400 M parameters


def architectures():
    for module in timm.models.list_modules():
        yield Architecture("timm", module, lambda module=module: build(module))


def build(module):
    name, smaller = smallest(module), SMALLER.get(module, {})
    config = timm.get_pretrained_cfg(name)
    channels, default = config.input_size[0], config.input_size[-1]
    half = max(default // 64 * 32, 32)  # less to compute, where the architecture takes it
    options = [(side, kwargs) for side in (min(half, 128), half) for kwargs in ({}, {"img_size": side})] + [
        (default, {})
    ]
    if config.fixed_input_size:
        options = [(side, kwargs) for side, kwargs in options if kwargs or side == default]
    for side, kwargs in options:
        torch.manual_seed(0)
        try:
            model, x = timm.create_model(name, **kwargs, **smaller), crops(channels=channels, side=side)
            with torch.no_grad():
                model.eval()(x)
        except Exception:
            if (side, kwargs) == options[-1]:
                raise
        else:
            return Built(model.train(), x, ", ".join([name, f"{side} px", *(f"{k} {v}" for k, v in smaller.items())]))
    raise AssertionError


def smallest(module):
    "The name of the module's model with the fewest parameters; those that are there to test timm apart."
    names = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
    return min(names, key=n_parameters)


def n_parameters(name):
    with torch.device("meta"):
        try:
            return sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception:
            return float("inf")  # some compute with values while they are built
