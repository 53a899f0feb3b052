"""Observe, correct, observe: `lsuv_`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from fastai_lsuv.core.branches import branch_ends
from fastai_lsuv.core.checks import check_inputs, check_model, check_outputs
from fastai_lsuv.core.correction import Correction
from fastai_lsuv.core.discovery import Discovery
from fastai_lsuv.core.dry_run import Call, DryRun
from fastai_lsuv.core.errors import add_to_message
from fastai_lsuv.core.gradient import elasticities
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.random_state import kept_random_state
from fastai_lsuv.core.reasons import Note, Skip
from fastai_lsuv.core.selection import Choice
from fastai_lsuv.core.statistics import Measured, at_least_single
from fastai_lsuv.core.target import EXACT, Target
from fastai_lsuv.init import for_layer
from fastai_lsuv.report import LSUVReport, Row

_EPS_OF_HALF = 1e-4  # fp16 and bf16 have a larger one
_LARGE = 1e4  # |mean| / std, or std, at which fp32 outputs are rounded to about 1e-3


def lsuv_(
    model: nn.Module,  # changed in place: weights and biases, nothing else
    batch: Any,  # a tensor → `model(x)`, a tuple or list → `model(*xs)`, a mapping → `model(**kw)`
    *,
    mean: float | None = 0.0,  # wanted mean of each layer's output, where it can be shifted; `None`: nothing is shifted
    std: float | None = 1.0,  # wanted standard deviation; `None`: nothing is scaled. Both `None`: only measure
    per_channel: bool = False,  # each output channel by itself (Krähenbühl et al. 2016, arXiv:1511.06856)
    modules: Choice = None,  # which layers: `None` = all affine ones; types, names with wildcards, modules, a function
    exclude: Choice = None,  # the same forms, taken away from `modules` with everything beneath them
    init: Callable[..., Any] | None = None,  # in-place initialiser of each chosen weight first, biases are zeroed
    tol: float = 1e-3,  # for blocks and shared layers, where one step is not exact; of `std` where that is below 1
    max_iter: int = 10,  # steps at most, for the same
    residual: bool = False,  # the last layers of n residual branches get std/√n: their sum doesn't grow with depth
) -> LSUVReport:  # one row per layer, in execution order: moments before and after, status, reason
    """Scale and shift each layer's weights so that its output on `batch` has the wanted mean and standard deviation.

    Layer-sequential unit variance (Mishkin & Matas 2016, arXiv:1511.06422) with the fast.ai course's mean correction,
    exact for all layers at once, in three forward passes whatever the depth (`residual` takes a fourth): the hook that
    measures a layer corrects it and hands on the corrected output. In place and silent, like `torch.nn.init`.

    Raises:
        ValueError: an option out of its range, a pattern that matches nothing, a batch with infinity or with NaN that
            the model doesn't fill, lazy modules that have not seen a batch yet.
        TypeError: an option of a wrong type, or a batch that isn't tensors.
        RuntimeError: the model can't be copied, or reaches its own layers in a way that no copy can follow.
        Exception: whatever a forward pass raises, with the module at work in its message. The model is then
            bit-for-bit what it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastai_lsuv import lsuv_
        >>> model, x = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 5)), torch.randn(64, 20)
        >>> report = lsuv_(model, x, init=nn.init.orthogonal_)
        >>> report.converged, report.n_forward, round(model(x).std().item(), 3)
        (True, 3, 1.0)
    """
    options = Options(mean, std, per_channel, modules, exclude, init, tol, max_iter, residual)
    call = as_call(batch)
    try:
        return run(model, call, options)
    except TypeError as error:
        if call[0] and batch is not call[0][0] and "positional argument" in str(error):
            add_to_message(error, "a tuple or list of inputs is unpacked, model(*inputs): give it without the targets")
        raise


def run(model: nn.Module, call: Call, options: Options, as_it_stands: bool = False) -> LSUVReport:
    """`lsuv_` on the arguments of a forward; of a model that is `as_it_stands` when training calls it."""
    started = time.perf_counter()
    check_model(model)
    check_inputs(call)
    with kept_random_state():
        discovery = _discover(model, call, options, as_it_stands)
        dry_run, layers = discovery.dry_run, discovery.layers
        check_outputs([layer.before for layer in layers if layer.before], call)
        if options.residual and not options.only_measures:
            _bound_branches(dry_run, layers, options)
        if options.only_measures:
            for layer in layers:
                layer.after = layer.before
        else:
            _correct(dry_run, discovery, options)
        if not layers:
            warnings.warn(f"{type(dry_run.model).__name__} has nothing to correct: no affine layer", stacklevel=3)
        grads = elasticities(dry_run, [layer.module for layer in layers if layer.after])
        rows = [_row(layer, options, grads.get(layer.module, math.nan)) for layer in layers]
        report = LSUVReport(rows, dry_run.n_forward, time.perf_counter() - started, options.mean, options.std)
    dry_run.hand_over()  # last, so that whatever is interrupted has changed nothing
    return report


def _discover(model: nn.Module, call: Call, options: Options, as_it_stands: bool) -> Discovery:
    """Look at the layers: without gradients, unless the forward itself asks for some (forces, penalties)."""
    try:
        return Discovery(DryRun(model, call, as_it_stands), options)
    except RuntimeError as error:
        if "grad" not in str(error):
            raise
    return Discovery(DryRun(model, call, as_it_stands, with_grad=True), options)


def as_call(batch: Any) -> Call:
    """Return a forward's arguments for a batch: a tensor, a tuple or list of inputs, or a mapping of keyword inputs."""
    if isinstance(batch, nn.Module):
        raise TypeError(f"batch is a {type(batch).__name__}: expected lsuv_(model, batch), in this order")
    if isinstance(batch, np.ndarray) or hasattr(batch, "one_batch") or isinstance(batch, DataLoader):
        how = "torch.as_tensor(batch)" if isinstance(batch, np.ndarray) else "the inputs of one batch of it"
        raise TypeError(f"batch is a {type(batch).__name__}: expected tensors, such as {how}")
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _correct(dry_run: DryRun, discovery: Discovery, options: Options) -> None:
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
    while correction.make_pass() or _look(correction, discovery, options, is_last=n_looks == options.max_iter):
        n_looks += 1


def _look(correction: Correction, discovery: Discovery, options: Options, is_last: bool) -> bool:
    """Measure what has been reached; return whether it takes another pass."""
    woken, asleep = discovery.look_again()
    correction.leave(dict.fromkeys(asleep, Skip.NEVER_CALLED))
    for layer in () if is_last else woken:
        _reinitialise(layer, options, correction.dry_run)
        correction.take_up(layer)
    has_more = correction.has_more_to_do([layer for layer in discovery.layers if _may_get_better(layer, options)])
    return has_more or (bool(woken) and not is_last)


def _bound_branches(dry_run: DryRun, layers: list[Layer], options: Options) -> None:
    """Want less of the layers that end residual branches."""
    ends = branch_ends(dry_run, [layer.module for layer in layers if not layer.skipped])
    at_end = [layer for layer in layers if layer.module in ends]
    if not at_end:
        why = "no residual branch ends in a layer that is corrected and whose scale comes to the sum"
        warnings.warn(f"residual=True changes nothing: {why}", stacklevel=4)
    for layer in at_end:
        layer.target = layer.target.for_branch(len(ends))
        layer.note(Note.ENDS_BRANCH)


def _reinitialise(layer: Layer, options: Options, dry_run: DryRun) -> None:
    """Apply `init`, in fp32 and without gradients, to the weights of a layer that will be corrected."""
    if options.init is None or layer.skipped or layer.affine is None:
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


def _row(layer: Layer, options: Options, grad: float) -> Row:
    before, after = _numbers(layer.before, layer.target), _numbers(layer.after, layer.target)
    status = "skipped" if layer.skipped else _status(layer, options)
    kind = type(layer.module).__name__
    n_calls = 0 if layer.skipped is Skip.NEVER_CALLED else layer.n_calls
    return Row(layer.name, kind, n_calls, *before, *after, grad, layer.n_iter, status, layer.reason)


def _status(layer: Layer, options: Options) -> str:
    if options.only_measures:
        return "unchanged"
    if not _is_right(layer, options):
        return "not_converged"
    return "corrected" if layer.n_iter else "unchanged"


def _may_get_better(layer: Layer, options: Options) -> bool:
    """Whether it isn't right, or only by the allowance for a mean that dwarfed the std, as it may do no longer."""
    return not _is_right(layer, options) or (layer.ratio > _LARGE and not _is_right(layer, options, exactly=True))


def _is_right(layer: Layer, options: Options, exactly: bool = False) -> bool:
    tol = options.tol if layer.is_block or layer.is_shared else EXACT
    allowed = tol + (0.0 if exactly else _rounding(layer))
    return layer.after is not None and layer.target.error(layer.after) <= allowed


def _rounding(layer: Layer) -> float:
    """What the output's precision allows to be off: a few eps, times |mean| / std where the mean dwarfs the std."""
    if layer.after is None:
        return 0.0
    std = layer.target.std or max(layer.after.std)
    size = max(1.0, layer.ratio, abs(layer.target.mean or 0.0) / std) * max(1.0, std)
    return 4 * layer.eps * size if layer.eps > _EPS_OF_HALF or size > _LARGE else 0.0


def _numbers(seen: Measured | None, target: Target) -> tuple[float, float, float]:
    """Mean and std, of the channels those farthest from the wanted ones, and signal."""
    if seen is None:
        return math.nan, math.nan, math.nan
    return _farthest(seen.mean, target.mean or 0.0), _farthest(seen.std, target.std or 1.0), seen.signal


def _farthest(values: Sequence[float], wanted: float) -> float:
    return max(values, key=lambda value: math.inf if math.isnan(value) else abs(value - wanted))
