"""With `--device cuda`: what a test of the algorithm makes lies on the GPU, with the numbers that it has on the CPU."""

from __future__ import annotations

import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

LEFT_ALONE = ("fastai_lsuv", "torch.nn.utils")  # a user's default device is the CPU; so is that of a batch's lengths
FILLS = {getattr(torch.Tensor, f"{name}_") for name in ("bernoulli", "exponential", "normal", "random", "uniform")}


class MadeOnTheCPU(TorchFunctionMode):
    """A factory that is told no device, and what fills a tensor at random: both run on the CPU, with its random stream
    or its generator, and the result goes to `device`.

    What the package makes itself is left alone."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.factories = device, _device_constructors()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if sys._getframe(1).f_globals.get("__name__", "").startswith(LEFT_ALONE):
            return func(*args, **kwargs)
        if func in self.factories and kwargs.get("device") is None and "out" not in kwargs:
            needs_grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(self.device).requires_grad_(needs_grad)
        if func in FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return self.fill(func, *args, **kwargs)
        return func(*args, **kwargs)

    def fill(self, func, tensor, *args, **kwargs):
        generator = kwargs.get("generator")
        if tensor.device != self.device or (generator is not None and generator.device == self.device):
            return func(tensor, *args, **kwargs)
        with torch.no_grad():
            return tensor.copy_(func(torch.empty_like(tensor, device="cpu"), *args, **kwargs))
