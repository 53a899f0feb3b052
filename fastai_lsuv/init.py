"""Initialisers for very deep plain networks, in `torch.nn.init`'s style: in place, for `init=` or on their own."""

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
    tensor: Tensor,  # weight of a linear or convolution layer, transposed ones too: 2 dimensions or more
    gain: float = 1.0,  # all singular values of the matrix in the centre
    groups: int = 1,  # of the convolution; each group gets a matrix of its own
    generator: torch.Generator | None = None,  # `None`: torch's own random stream
) -> Tensor:  # the same tensor
    """An orthogonal matrix in the centre of the kernel, zeros around it (Xiao et al. 2018, arXiv:1806.05393).

    At the start a convolution then is the same rotation at every position, so that it keeps lengths, angles and, going
    backwards, gradients, whatever the depth. Where the layer grows or shrinks, the matrix is semi-orthogonal: its rows
    or its columns are orthonormal. A linear layer's weight is all centre: there it is `nn.init.orthogonal_`.

    The centre of an even kernel is at `size // 2`, as in `nn.init.dirac_`. A kernel that does not overlap its
    neighbours (patches: stride = size) would see one position in each patch only: use `nn.init.orthogonal_` there.

    Raises:
        ValueError: fewer than 2 dimensions, or a first dimension that is not divisible by `groups`.

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
    tensor: Tensor,  # weight of a linear or convolution layer, transposed ones too: 2 dimensions or more
    gain: float = 1.0,  # all singular values of the map that a pair of channels sees
    groups: int = 1,  # of the convolution
    transposed: bool = False,  # whether inputs are the tensor's first dimension, as in transposed convolutions
    first: bool = False,  # whether the layer sees the data, and not the mirrored outputs of another one
    generator: torch.Generator | None = None,  # `None`: torch's own random stream
) -> Tensor:  # the same tensor
    """Mirrored weights with which a rectifier network starts linear (Balduzzi et al. 2017, arXiv:1702.08591).

    The second half of the outputs is the first one's negative, and the second half of the inputs is subtracted from the
    first: [[V, -V], [-V, V]] with V delta-orthogonal (see `delta_orthogonal_`), and [V, -V] over one another in the
    `first` layer. As relu(z) - relu(-z) = z, what was cut off on one side arrives on the other, and a network of such
    layers is f(x) = V…V x, an odd function: f(-x) = -f(x). With another activation φ in place of ReLU, each pair of
    channels sees the odd function φ(z) - φ(-z).

    Of an odd number of outputs the last has no mirror image, and of an odd number of inputs (a single one aside) the
    weights of the last start at zero. A grouped layer cannot subtract channels of another group: an even number of
    groups is paired, and both of a pair get the same delta-orthogonal weights, so that the network stays odd; single
    channels (depthwise layers) are passed on with weights of one sign, for a rectified channel that is negated is dead.

    Raises:
        ValueError: fewer than 2 dimensions, or a first dimension that is not divisible by `groups`.

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
    act: Callable[[Tensor], Tensor],  # elementwise activation, `torch.tanh` or `nn.Sigmoid()`
    depth: int,  # number of layers
) -> float:  # at most 1
    """The `std` for `LSUVCallback(init=looks_linear_, std=…)` with which gradients pass through `depth` layers.

    In a mirrored network a pair of channels sees the odd function ψ(z) = φ(z) - φ(-z) of a roughly Gaussian z of
    standard deviation s. LSUV holds s the same in every layer, so that the variance of gradients and the distance of
    near-by inputs grow in each layer by χ = s² E[ψ'²] / E[ψ²] (mean field theory: Poole et al. 2016, arXiv:1606.05340;
    Schoenholz et al. 2017, arXiv:1611.01232). By Poincaré's inequality χ ≥ 1, and χ = 1 only where ψ is linear: for
    ReLU, leaky ReLU, GELU and SiLU at any s, for tanh and sigmoid the better, the smaller s. The result is the largest
    s ≤ 1 at which χ^depth ≤ e; for tanh about (3 / (4 depth))^(1/4).

    Raises:
        ValueError: depth below 1, or an activation without an odd part (|z|, z²), which mirrored weights cancel.
        TypeError: the name or the class of an activation in place of a function of tensors.

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

    `groups` (`nn.init.dirac_` has it, too) and `transposed` of a convolution, and `first`: whether no other layer ran
    before it.
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
