"""Biases that were set on purpose: all alike and not 0, as no initialiser of PyTorch's leaves them.

In a head such a bias says what is to be expected before anything is learned, as a detector's -4.6 does (Lin et al.
2017, arXiv:1708.02002, section 4.1): there the output keeps its mean. What is ahead of another layer is
centred as ever, with a note: that layer would take any mean up into its own bias.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor, nn

from fastai_lsuv.core.affine import is_known_affine
from fastai_lsuv.core.bulk import alike, on_host
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.modules import is_scripted
from fastai_lsuv.core.reasons import Note


def find_priors(dry_run: DryRun) -> dict[nn.Module, float]:
    """Return the layers of known types whose bias was set on purpose, and the value."""
    layers = [m for m in dry_run.names if not is_scripted(m) and is_known_affine(m)]
    biased = [(m, b) for m in layers if (b := m._parameters["bias"]) is not None and _has_value(b)]
    found = {}
    for (m, bias), (low, high) in zip(biased, _ends([b for _, b in biased]), strict=True):
        n_inputs = m.weight.numel() // bias.numel()  # type: ignore[operator]
        drawn = 1 / math.sqrt(max(n_inputs, 1)) if bias.numel() == 1 else 0.0  # the largest that PyTorch draws
        if low == high and abs(low) > 1.01 * drawn:
            found[m] = low
    return found


def keep_priors(layers: Iterable[Layer], priors: Mapping[nn.Module, float], heads: Collection[nn.Module]) -> None:
    """Have heads keep their mean whose bias was set on purpose; say of other layers that such a bias is moved."""
    for layer in layers:
        if layer.module not in priors or layer.skipped or layer.before is None:
            continue
        bias, mean, std = priors[layer.module], fmean(layer.before.mean), fmean(layer.before.std)
        counts = abs(bias) > std and abs(mean - bias) < abs(bias) / 2
        if not counts:  # as in a layer that has been centred
            continue
        if layer.module in heads:
            layer.target = replace(layer.target, mean=mean)
            layer.note(Note.PRIOR)
        elif layer.target.mean is not None:
            layer.note(Note.BIAS_MOVED)


def _ends(biases: Sequence[Tensor]) -> list[tuple[float, float]]:
    """The least and the largest value of each."""
    groups, found = alike(biases), dict[int, tuple[float, float]]()
    with torch.no_grad():
        rows = [torch.stack([biases[i].reshape(-1) for i in which]) for which in groups]
        home = iter(on_host([end for of_shape in rows for end in of_shape.aminmax(dim=1)]))
    for which in groups:
        found |= zip(which, zip(next(home), next(home), strict=True), strict=True)
    return [found[i] for i in range(len(biases))]


def _has_value(bias: Tensor) -> bool:
    return bias.numel() > 0 and bias.is_floating_point() and not bias.is_meta
