"""Through which parameters a layer is scaled and shifted; and the layer types of which that is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# y = Wx + b, W in `weight` and b in `bias`. A shortcut past the probe, which finds the same.
AFFINE_TYPES = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
# Own parameters, but none that is summed over the input: the probe would find the same.
GAIN_TYPES = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip
# Weights that meet what they have put out before, through nonlinear gates: no parameter carries the output's scale.
RECURRENT_TYPES = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class AffineParameters:
    """Parameters through which a layer's output y = weight·(…) + bias is scaled and shifted."""

    weight: Tensor  # the output less its shift is linear in it
    bias: Tensor | None = None  # adding 1 to it adds `gain` to every output
    gain: float = 1.0
    matrices: tuple[Tensor, ...] = ()  # the weights that an initialiser is for: `weight`, or those that it is a gain of
    # one factor per channel, in a shape that multiplies `weight`; and where the channels are in an output
    per_channel: Callable[[Tensor], Tensor] | None = None
    channel_dim: Callable[[Tensor], int] | None = None
    partners: tuple[Tensor, ...] = ()  # weights whose results add up with that of `weight`: scaled with it

    @property
    def scaled(self) -> list[Tensor]:
        """What is scaled."""
        return [self.weight, *self.partners]

    @property
    def all(self) -> list[Tensor]:
        """What a correction changes: what is scaled, and then the bias."""
        return self.scaled if self.bias is None else [*self.scaled, self.bias]

    def of(self, twins: Mapping[Tensor, Tensor]) -> AffineParameters:
        """Return the same of a module that is built alike, given its parameter for each parameter here."""
        bias = None if self.bias is None else twins[self.bias]
        matrices, partners = (tuple(twins[p] for p in which) for which in (self.matrices, self.partners))
        return replace(self, weight=twins[self.weight], bias=bias, matrices=matrices, partners=partners)


def known_parameters(module: nn.Module, own: Mapping[str, Tensor | None]) -> AffineParameters:
    """Return the affine parameters of a layer of a known type: its weight and bias, of its `own` parameters."""
    weight = own["weight"]
    assert weight is not None
    return AffineParameters(
        weight=weight,
        bias=own["bias"],
        matrices=(weight,),
        per_channel=lambda factor: _per_output_channel(module, factor),
        channel_dim=lambda output: _channel_dim(module, output),
    )


def is_known_affine(module: nn.Module) -> bool:
    """True if `module` computes what PyTorch's own Linear or convolution does, on parameters that are its own.

    Not so: a subclass with a forward of its own, a weight computed from others (weight norm, parametrizations).
    """
    own = module._parameters
    return (
        any(isinstance(module, base) and _computes_as(module, base) for base in AFFINE_TYPES)
        and own.get("weight") is not None
        and "bias" in own
    )


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    methods = ("forward", "_conv_forward", "__call__")
    return not vars(module).keys() & {"forward", "_conv_forward"} and all(
        getattr(type(module), name, None) is getattr(base, name, None) for name in methods
    )


def _channel_dim(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output.dim() - 1
    return output.dim() - len(module.kernel_size) - 1  # type: ignore[arg-type]  # batched or not


def _per_output_channel(module: nn.Module, factor: Tensor) -> Tensor:
    """One factor for each output channel of a known affine layer, in a shape that multiplies its weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, _TRANSPOSED):  # (in, out/groups, ...): each group of inputs feeds its own outputs
        groups, inputs = module.groups, weight.shape[0] // module.groups
        factor = factor.view(groups, 1, -1).expand(groups, inputs, -1).reshape(weight.shape[:2])
        return factor.reshape(*factor.shape, *[1] * (weight.dim() - 2))
    return factor.reshape(-1, *[1] * (weight.dim() - 1))


def exposes_bias(module: nn.Module) -> bool:
    """True if a block shows a number as its `bias`: the fast.ai course's `ConvLayer`, whose bias is `-relu.sub`."""
    exposed = getattr(type(module), "bias", None)
    return isinstance(exposed, property) and exposed.fset is not None and isinstance(module.bias, (float, int, Tensor))


def get_bias(module: nn.Module) -> Any:
    """Return the bias that a block exposes: a number or a tensor."""
    value = module.bias
    return value.detach().clone() if isinstance(value, Tensor) else value


def set_bias(module: nn.Module, value: Any) -> None:
    """Set the bias that a block exposes, in place where it is a parameter."""
    current = module.bias
    if isinstance(current, nn.Parameter):
        current.data.copy_(torch.as_tensor(value))
    else:
        module.bias = value
