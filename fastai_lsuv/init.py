"""Initialisers for very deep plain networks, in the style of `torch.nn.init`: in place, for `init=` or on their own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fastai_lsuv.core.errors import shown

__all__ = ["critical_std", "delta_orthogonal_", "looks_linear_"]


def delta_orthogonal_(
    tensor: Tensor,  # weight of a linear, convolution or transposed convolution layer: 2 dimensions or more
    gain: float = 1.0,  # the value of all singular values of the matrix in the centre
    groups: int = 1,  # groups of the convolution; each gets its own matrix
    generator: torch.Generator | None = None,  # `None`: PyTorch's global generator
) -> Tensor:  # the same tensor
    """Fill the centre of the kernel with an orthogonal matrix and the rest with zeros (Xiao et al. 2018).

    See arXiv:1806.05393. A convolution then starts as the same rotation at every position. It preserves lengths, angles
    and, in the backward pass, gradients, whatever the depth. If the layer has more outputs than inputs or fewer, the
    matrix is semi-orthogonal: its columns or its rows are orthonormal. For a linear layer, this is
    `nn.init.orthogonal_`.

    The centre of a kernel of even size is at `size // 2`, as in `nn.init.dirac_`. Kernels that don't overlap (patches,
    where the stride equals the size) would see only one position in each patch: use `nn.init.orthogonal_` for those.

    Raises:
        ValueError: the tensor has fewer than 2 dimensions, or its first dimension isn't divisible by `groups`.

    Example:
        >>> import torch
        >>> from fastai_lsuv.init import delta_orthogonal_
        >>> weight = delta_orthogonal_(torch.empty(32, 16, 3, 3))
        >>> centre = weight[:, :, 1, 1]
        >>> torch.allclose(centre.T @ centre, torch.eye(16), atol=1e-5), weight[:, :, 0, 0].any().item()
        (True, False)
    """
    blocks = _centre_blocks(tensor, groups, "delta_orthogonal_")
    return _fill(tensor, [_orthogonal(rows, columns, tensor, generator) for rows, columns in blocks], gain)


def looks_linear_(
    tensor: Tensor,  # weight of a linear, convolution or transposed convolution layer: 2 dimensions or more
    gain: float = 1.0,  # the value of all singular values of the map that a pair of channels sees
    groups: int = 1,  # groups of the convolution
    transposed: bool = False,  # whether the first dimension counts the inputs, as in transposed convolutions
    first: bool = False,  # whether the layer sees the data rather than the mirrored outputs of another layer
    generator: torch.Generator | None = None,  # `None`: PyTorch's global generator
) -> Tensor:  # the same tensor
    """Mirror the weights, so that a ReLU network starts out linear (Balduzzi et al. 2017, arXiv:1702.08591).

    The second half of the outputs is the negative of the first half, and the second half of the inputs is subtracted
    from the first: the weight is [[V, -V], [-V, V]] with V delta-orthogonal (see `delta_orthogonal_`), and V stacked on
    -V in the `first` layer. Because relu(z) - relu(-z) = z, what is cut off in one half arrives through the other. A
    network of such layers is f(x) = V…V x, an odd function: f(-x) = -f(x). With another activation φ instead of ReLU,
    each pair of channels sees the odd function φ(z) - φ(-z).

    If the number of outputs is odd, the last output has no mirror image. If the number of inputs is odd and not 1, the
    weights of the last input start at zero. A grouped layer cannot subtract channels across groups. If the number of
    groups is even, they are paired, and both groups of a pair get the same delta-orthogonal weights, so that the
    network stays odd. In depthwise layers the weights have one sign, because a ReLU channel that is negated is dead.

    Raises:
        ValueError: the tensor has fewer than 2 dimensions, or its first dimension isn't divisible by `groups`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastai_lsuv import lsuv_
        >>> from fastai_lsuv.init import looks_linear_
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> x = torch.randn(64, 16)
        >>> report = lsuv_(model, x, mean=None, init=looks_linear_)
        >>> torch.allclose(model(-x), -model(x), atol=1e-5)
        True
    """
    blocks = _centre_blocks(tensor, groups, "looks_linear_")
    if groups > 1:
        return _fill(tensor, _paired_groups(blocks, tensor, transposed, first, generator), gain)
    ((rows, columns),) = blocks
    n_out, n_in = (columns, rows) if transposed else (rows, columns)
    half = (n_out + 1) // 2
    if first or n_in < 2:
        core = _orthogonal(half, n_in, tensor, generator)
    else:
        v = _orthogonal(half, n_in // 2, tensor, generator)
        core = torch.cat([v, -v, v.new_zeros(half, n_in % 2)], 1)
    mirrored = torch.cat([core[: n_out // 2], -core[: n_out // 2], core[n_out // 2 :]])
    return _fill(tensor, [mirrored.T if transposed else mirrored], gain)


def critical_std(
    act: Callable[[Tensor], Tensor],  # elementwise activation, such as `torch.tanh` or `nn.Sigmoid()`
    depth: int,  # number of layers
) -> float:  # at most 1
    """Return the `std` for `LSUVCallback(init=looks_linear_, std=…)` at which gradients pass through `depth` layers.

    In a mirrored network, a pair of channels sees the odd function ψ(z) = φ(z) - φ(-z) of a roughly Gaussian z with
    standard deviation s. LSUV makes s the same in every layer. The variance of gradients and the distance between
    similar inputs then grow by a factor χ = s² E[ψ'²] / E[ψ²] per layer (mean field theory: Poole et al. 2016,
    arXiv:1606.05340; Schoenholz et al. 2017, arXiv:1611.01232). By Poincaré's inequality χ ≥ 1, with equality only
    where ψ is linear: at any s for ReLU, leaky ReLU, GELU and SiLU, and in the limit of small s for tanh and sigmoid.
    The result is the largest s ≤ 1 with χ^depth ≤ e; for tanh, this is about (3 / (4 depth))^(1/4).

    Raises:
        ValueError: `depth` is below 1, or the activation has no odd part (|z|, z²), so that mirrored weights cancel it.
        TypeError: `act` is the name or the class of an activation rather than a function of tensors.

    Example:
        >>> from torch import nn
        >>> from fastai_lsuv.init import critical_std
        >>> critical_std(nn.ReLU(), depth=100), round(critical_std(nn.Tanh(), depth=100), 2)
        (1.0, 0.33)
    """
    given: Any = act
    if isinstance(given, type) or not callable(given):
        raise TypeError(f"act={shown(given)}: expected a function of tensors, such as torch.tanh or nn.Tanh()")
    if depth < 1:
        raise ValueError(f"depth={depth!r}: expected a whole number of at least 1")
    return largest_std([(act, depth)])


def largest_std(
    layers: Sequence[tuple[Callable[[Tensor], Tensor], int]],  # activations, and how many layers each is behind
) -> float:
    """Return the largest std up to 1 with which a gradient grows by less than e; see `critical_std`."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)

    def growth(s: float) -> float:
        """Of the variance of gradients, from the last layer to the first, as a logarithm."""
        return sum(n * _log_growth(act, s * z, s, density) for act, n in layers)

    low, high = 1e-3, 1.0
    if growth(high) <= 1:
        return high
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if growth(middle) <= 1 else (low, middle)
    return low


def _log_growth(act: Callable[[Tensor], Tensor], values: Tensor, s: float, density: Tensor) -> float:
    """Growth by one layer, log χ, at Gaussian values of std s."""
    x = values.clone().requires_grad_()
    with torch.enable_grad():
        psi = act(x * 1) - act(-x)  # not a leaf, for activations that work in place
        (slope,) = torch.autograd.grad(psi.sum(), x)
    ratio = s**2 * (slope.square() * density).sum() / (psi.detach().square() * density).sum()
    if not 0 < ratio < math.inf:
        raise ValueError(f"act={shown(act)}: expected an activation with an odd part, φ(z) - φ(-z) not zero")
    return math.log(ratio)


def for_layer(init: Callable[..., Any], layer: nn.Module, first: bool) -> Callable[[Tensor], Any]:
    """Return the initialiser, given what it has parameters for and a weight cannot show.

    That is, `groups` (which `nn.init.dirac_` also has) and `transposed` of a convolution, and `first`: whether no other
    layer ran before it.
    """
    facts: dict[str, Any] = {"first": first}
    if isinstance(layer, _ConvNd):
        facts |= {"groups": layer.groups, "transposed": isinstance(layer, _ConvTransposeNd)}
    try:
        known = inspect.signature(init).parameters
    except (TypeError, ValueError):  # of a builtin
        return init
    known_facts = {name: fact for name, fact in facts.items() if name in known}
    return partial(init, **known_facts) if known_facts else init


def _centre_blocks(tensor: Tensor, groups: int, name: str) -> list[tuple[int, int]]:
    """Rows and columns of each group's matrix."""
    if tensor.dim() < 2:
        raise ValueError(f"{name}: a tensor of shape {tuple(tensor.shape)}, expected 2 dimensions or more")
    rows, columns = tensor.shape[:2]
    if groups < 1 or rows % groups:
        raise ValueError(f"{name}: groups={groups!r}, expected a divisor of the first dimension, {rows}")
    return [(rows // groups, columns)] * groups


def _orthogonal(rows: int, columns: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)  # there is no QR of half precisions
    matrix = torch.empty(rows, columns, dtype=dtype, device=like.device)
    return nn.init.orthogonal_(matrix, generator=generator) if matrix.numel() else matrix


def _paired_groups(
    blocks: list[tuple[int, int]], like: Tensor, transposed: bool, first: bool, generator: torch.Generator | None
) -> list[Tensor]:
    n_pairs = len(blocks) // 2 if len(blocks) % 2 == 0 and not first else 0
    matrices = [_orthogonal(rows, columns, like, generator) for rows, columns in blocks[n_pairs:]]
    if not first and blocks[0][0 if transposed else 1] == 1:
        matrices = [matrix.abs() for matrix in matrices]
    return matrices * 2 if n_pairs else matrices


def _fill(tensor: Tensor, matrices: list[Tensor], gain: float) -> Tensor:
    """Zeros, and in the centre of the kernel the groups' matrices one over the other."""
    with torch.no_grad():
        tensor.zero_()
        if tensor.numel():
            centre = tensor
            for size in tensor.shape[2:]:
                centre = centre.select(2, size // 2)
            centre.copy_(gain * torch.cat(matrices))
    return tensor
