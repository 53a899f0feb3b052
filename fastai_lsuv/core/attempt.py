"""One way to initialise a network, and what has come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from fastai_lsuv.core.correction import Correction
from fastai_lsuv.core.discovery import Discovery
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.core.errors import add_to_message
from fastai_lsuv.core.evidence import trainability
from fastai_lsuv.core.gradient import Backprop
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.reasons import Note, Skip
from fastai_lsuv.core.rows import may_get_better, status_of
from fastai_lsuv.core.statistics import at_least_single
from fastai_lsuv.core.verdict import Trainability
from fastai_lsuv.init import for_layer


@dataclass(frozen=True)
class Attempt:
    """Layers as they were corrected, or only measured, and whether the network can be trained so."""

    options: Options
    layers: list[Layer]
    trainability: Trainability

    @property
    def n_right(self) -> int:
        """How many layers are as they should be."""
        return sum(status_of(layer, self.options) in ("corrected", "unchanged") for layer in self.layers)


def attempt(discovery: Discovery, options: Options) -> Attempt:
    """Correct the layers that have been found, as far as it is asked for, and judge what has come of it."""
    dry_run, layers = discovery.dry_run, discovery.layers
    backprop = discovery.backprop if options.only_measures else Backprop(dry_run, is_due=True)
    if options.only_measures:
        for layer in layers:
            layer.after = layer.before
    else:
        if options.residual:
            _bound_branches(layers, discovery.branch_ends)
        _correct(dry_run, discovery, options, backprop)
    found = backprop.gradients({layer.module: layer.after.rms for layer in layers if layer.after})
    for layer in layers:
        layer.grad = found[layer.module].elasticity if layer.module in found else math.nan
    return Attempt(options, layers, trainability(dry_run, layers, found))


def _correct(dry_run: DryRun, discovery: Discovery, options: Options, backprop: Backprop) -> None:
    """Make correcting passes until nothing more is to be done, and measure the result in a clean one.

    It ends: shared layers are turned `max_iter` times at most, a layer is examined, put back or taken for a block once,
    rounding is polished away twice at most, and layers that run only now are taken up in `max_iter` looks at most.
    """
    layers, n_looks = discovery.layers, 0
    for layer in layers:
        if layer.skipped is Skip.TOO_FEW:
            layer.skipped = None  # it may get more values than in the untouched network, as a detector's heads do
        _reinitialise(layer, options, dry_run)
    correction = Correction(dry_run, layers, options)
    while correction.make_pass() or _look(correction, discovery, backprop, is_last=n_looks == options.max_iter):
        n_looks += 1


def _look(correction: Correction, discovery: Discovery, backprop: Backprop, is_last: bool) -> bool:
    """Measure what has been reached, and return whether another pass is needed."""
    options = correction.options
    woken, asleep = discovery.look_again(backprop)
    correction.leave(dict.fromkeys(asleep, Skip.NEVER_CALLED))
    for layer in () if is_last else woken:
        _reinitialise(layer, options, correction.dry_run)
        correction.take_up(layer)
    has_more = correction.has_more_to_do([layer for layer in discovery.layers if may_get_better(layer, options)])
    if has_more := has_more or (bool(woken) and not is_last):
        backprop.begin()
    return has_more


def _bound_branches(layers: list[Layer], ends: list[nn.Module]) -> None:
    """Want less of the layers that end residual branches."""
    for layer in layers:
        if layer.module in ends:
            layer.target = layer.target.for_branch(len(ends))
            layer.note(Note.ENDS_BRANCH)


def _reinitialise(layer: Layer, options: Options, dry_run: DryRun) -> None:
    """Apply `init`, in fp32 and without gradients, to the weights of a layer that will be corrected."""
    if not callable(options.init) or layer.skipped or layer.affine is None:
        return
    init = for_layer(options.init, layer.owner or layer.module, layer.is_first)
    dry_run.keep(layer.touched)
    with torch.no_grad():
        for weight in layer.affine.matrices:
            if weight.count_nonzero():  # zeros are there on purpose
                wide = at_least_single(weight.dtype)
                fresh = weight.detach().to(wide, memory_format=torch.contiguous_format, copy=True)
                try:
                    init(fresh)
                except Exception as error:
                    name = getattr(options.init, "__name__", repr(options.init))
                    add_to_message(error, f"in init={name} on a weight of {layer.name!r}, shape {tuple(weight.shape)}")
                    raise
                weight.copy_(fresh)
        if layer.affine.bias is not None and layer.affine.weight.count_nonzero():
            layer.affine.bias.zero_()
