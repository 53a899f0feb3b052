"""Observe, correct, observe: `lsuv_`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from fastai_lsuv.core.blocks import is_right
from fastai_lsuv.core.branches import branch_ends
from fastai_lsuv.core.correction import Correction
from fastai_lsuv.core.discovery import survey
from fastai_lsuv.core.dry_run import Rehearsal
from fastai_lsuv.core.errors import add_to_message
from fastai_lsuv.core.exact import EXACT
from fastai_lsuv.core.hooks import hooked
from fastai_lsuv.core.layers import TOO_FEW, Unit
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.core.selection import Choice
from fastai_lsuv.core.statistics import Moments, fetched, moments
from fastai_lsuv.init import for_layer
from fastai_lsuv.learner.distributed import Ranks
from fastai_lsuv.report import ENDS_BRANCH, LSUVReport, Row

_EPS_OF_HALF = 1e-4  # fp16 and bf16 have a larger one
_LARGE = 1e4  # |mean| / std, or std, at which fp32 outputs are rounded to about 1e-3


def lsuv_(
    model: nn.Module,  # changed in place: weights and biases, nothing else
    batch: Any,  # a tensor → `model(x)`, a tuple or list → `model(*xs)`, a mapping → `model(**kw)`
    *,
    mean: float | None = 0.0,  # wanted mean of each unit's output, where it can be shifted; `None`: nothing is shifted
    std: float | None = 1.0,  # wanted standard deviation; `None`: nothing is scaled. Both `None`: only measure
    per_channel: bool = False,  # each output channel by itself (Krähenbühl et al. 2016, arXiv:1511.06856)
    modules: Choice = None,  # which units: `None` = all affine layers; types, names with wildcards, modules, a function
    exclude: Choice = None,  # the same forms, taken away from `modules` with everything beneath them
    init: Callable[..., Any] | None = None,  # in-place initialiser of each chosen weight first, biases are zeroed
    tol: float = 1e-3,  # for blocks and shared layers, where one step is not exact; of `std` where that is below 1
    max_iter: int = 10,  # steps at most, for the same
    residual: bool = False,  # the last layers of n residual branches get std/√n: their sum doesn't grow with depth
) -> LSUVReport:  # a row for each unit, in execution order: moments before and after, status, reason
    """Scale and shift each layer's weights so that its output on `batch` has the wanted mean and standard deviation.

    Layer-sequential unit variance (Mishkin & Matas 2016, arXiv:1511.06422) with the fast.ai course's mean correction,
    exact for all layers at once, in three forward passes whatever the depth (`residual` takes a fourth): the hook that
    measures a layer corrects it and hands on the corrected output. In place and silent, like `torch.nn.init`.

    Raises:
        ValueError: an option out of its range, a pattern that matches nothing, a batch with NaN or infinity, lazy
            modules that have not seen a batch yet.
        TypeError: an option of a wrong type.
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
    return run(model, batch, options, Ranks())


def run(model: nn.Module, batch: Any, options: Options, ranks: Ranks) -> LSUVReport:
    """`lsuv_` on one process or on several, each with a batch of its own; on several, inside `with ranks`."""
    started = time.perf_counter()
    _check(model, batch)
    with Rehearsal(model, batch, ranks) as rehearsal:
        units = survey(rehearsal, options)
        if not units:
            warnings.warn(f"{type(model).__name__} has nothing to correct: no affine layer", stacklevel=3)
        if options.residual:
            _bound_branches(rehearsal, units, options)
        if not options.only_measures:
            for unit in units:
                if unit.reason == TOO_FEW:
                    unit.reconsider()
                _reinitialise(unit, options, rehearsal)
            correction = Correction(rehearsal, units, options)
            correction.run()
        _observe(rehearsal, units, options)
        while not options.only_measures and correction.put_right([u for u in units if _may_get_better(u)]):
            correction.run()
            _observe(rehearsal, units, options)
        ranks.finish()
    rows = [_row(unit) for unit in units]
    return LSUVReport(rows, rehearsal.n_forward, time.perf_counter() - started, options.mean, options.std)


def _check(model: nn.Module, batch: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected a torch.nn.Module")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"{name!r} is lazy and not initialised yet: send a batch through the model first")
    for x in tree_leaves(batch):
        if isinstance(x, Tensor) and x.is_floating_point() and not bool((x.isfinite() | _is_mask(x)).all()):
            raise ValueError(f"the batch has NaN or infinity in an input of shape {tuple(x.shape)}")


def _is_mask(x: Tensor) -> Tensor:
    """Whether a tensor is nothing but zeros and minus infinities: added to attention scores, it switches some off."""
    return ((x == 0) | (x == -torch.inf)).all() & (x == 0).any()


def _bound_branches(rehearsal: Rehearsal, units: list[Unit], options: Options) -> None:
    """Want less of the layers that end residual branches."""
    ends = branch_ends(rehearsal, [unit.module for unit in units if not unit.status])
    at_end = [unit for unit in units if unit.module in ends]
    rehearsal.ranks.agree("which layers end residual branches", [len(ends), *(unit.name for unit in at_end)])
    if not at_end:
        why = "no residual branch ends in a layer that is corrected and whose scale comes to the sum"
        warnings.warn(f"residual=True changes nothing: {why}", stacklevel=4)
    for unit in at_end:
        unit.options = options.for_branches(len(ends))
        unit.note(ENDS_BRANCH)


def _reinitialise(unit: Unit, options: Options, rehearsal: Rehearsal) -> None:
    """Apply `init`, in fp32 and without gradients, to the weights of a unit that will be corrected."""
    if options.init is None or unit.status or unit.carriers is None:
        return
    undo = rehearsal.undo
    init = for_layer(options.init, unit.layer or unit.module, unit.is_first)
    with torch.no_grad():
        for weight in unit.carriers.matrices:
            if weight.count_nonzero():  # zeros are there on purpose
                undo.remember(weight)
                wide = torch.promote_types(weight.dtype, torch.float32)
                fresh = weight.detach().to(wide, memory_format=torch.contiguous_format, copy=True)
                try:
                    init(fresh)
                except Exception as error:
                    name = getattr(options.init, "__name__", repr(options.init))
                    add_to_message(error, f"in init={name} on a weight of {unit.name!r}, shape {tuple(weight.shape)}")
                    raise
                weight.copy_(fresh)
        if unit.carriers.bias is not None and unit.carriers.weight.count_nonzero():
            undo.remember(unit.carriers.bias)
            unit.carriers.bias.zero_()
    rehearsal.ranks.share(unit.name, unit.touched, undo.remember)  # each rank has random numbers of its own


def _observe(rehearsal: Rehearsal, units: list[Unit], options: Options) -> None:
    """Measure every unit in a clean pass."""
    if options.only_measures:
        for unit in units:
            unit.after = unit.before
        return
    by_module = {unit.module: unit for unit in units}
    for unit in units:
        unit.after = None

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if (y := first_tensor(output)) is not None:
            unit = by_module[module]
            now = rehearsal.ranks.moments(unit.name, moments(y, unit.channel_dim(y, options.per_channel)))
            unit.after = unit.after.merge(now) if unit.after else now

    with hooked(dict.fromkeys((unit.module for unit in units if unit.before), see)):
        rehearsal.forward()
    measured = [unit for unit in units if unit.after]
    for unit, home in zip(measured, fetched([unit.after for unit in measured if unit.after]), strict=True):
        unit.after = home


def _row(unit: Unit) -> Row:
    if not unit.status:
        unit.status = _status(unit)
    before, after = _numbers(unit.before, unit.options), _numbers(unit.after, unit.options)
    return Row(
        unit.name, type(unit.module).__name__, unit.n_calls, *before, *after, unit.n_iter, unit.status, unit.reason
    )


def _status(unit: Unit) -> str:
    if unit.options.only_measures:
        return "unchanged"
    if not _is_right(unit):
        return "not_converged"
    return "corrected" if unit.n_iter else "unchanged"


def _may_get_better(unit: Unit) -> bool:
    """Whether it isn't right, or only by the allowance for a mean that dwarfed the std, as it may do no longer."""
    return not _is_right(unit) or (unit.ratio > _LARGE and not _is_right(unit, exactly=True))


def _is_right(unit: Unit, exactly: bool = False) -> bool:
    if unit.after is None:
        return False
    options = unit.options
    tol = options.tol if unit.is_block or unit.is_shared else EXACT
    centred = unit.can_shift and "mean kept" not in unit.reason
    return is_right(unit.after, options, tol + (0.0 if exactly else _rounding(unit)), centred)


def _rounding(unit: Unit) -> float:
    """What the output's precision allows to be off: a few eps, times |mean| / std where the mean dwarfs the std."""
    options = unit.options
    assert unit.after is not None
    std = options.std or float(unit.after.std.max())
    size = max(1.0, unit.ratio, abs(options.mean or 0.0) / std) * max(1.0, std)
    return 4 * unit.eps * size if unit.eps > _EPS_OF_HALF or size > _LARGE else 0.0


def _numbers(seen: Moments | None, options: Options) -> tuple[float, float]:
    """Mean and std, of the channels those farthest from the wanted ones."""
    if seen is None:
        return float("nan"), float("nan")
    return _farthest(seen.mean, options.mean or 0.0), _farthest(seen.std, options.std or 1.0)


def _farthest(values: Tensor, wanted: float) -> float:
    return float(values if not values.dim() else values[(values - wanted).abs().argmax()])
