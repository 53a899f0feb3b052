"""Observe, correct, observe: `lsuv_`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from fastai_lsuv.core.attempt import attempt
from fastai_lsuv.core.automatic import Chosen, choose
from fastai_lsuv.core.checks import as_call, check_inputs, check_model, check_outputs, hint_for
from fastai_lsuv.core.discovery import Discovery
from fastai_lsuv.core.dry_run import Call, DryRun, OnLayer
from fastai_lsuv.core.errors import add_to_message
from fastai_lsuv.core.options import AUTO, Options, with_options
from fastai_lsuv.core.random_state import kept_random_state
from fastai_lsuv.core.rows import row_of
from fastai_lsuv.core.selection import Choice
from fastai_lsuv.core.verdict import remedy
from fastai_lsuv.report import LSUVReport


@with_options
def lsuv_(
    model: nn.Module,  # changed in place: its weights and biases, nothing else
    batch: Any,  # its inputs: a tensor → `model(x)`, a tuple or list → `model(*xs)`, a mapping → `model(**kw)`
    *,
    mean: float | None = 0.0,  # target mean of each layer's output, where it has a bias; `None`: leave means alone
    std: float | None = 1.0,  # target standard deviation; `None`: leave it alone. Both `None`: only measure
    per_channel: bool = False,  # correct each output channel separately (Krähenbühl et al. 2016, arXiv:1511.06856)
    modules: Choice = None,  # layers to correct; `None`: all affine ones. Types, names, wildcards, modules, a function
    exclude: Choice = None,  # layers to leave alone, with everything inside them; the same forms
    init: Callable[..., Any] | Literal["auto"] | None = None,  # in-place initialiser applied first, or "auto"
    tol: float = 1e-3,  # tolerance for blocks and shared layers, whose steps aren't exact; relative to a `std` below 1
    max_iter: int = 10,  # most steps for blocks and shared layers
    residual: bool = False,  # give the last layer of each of n residual branches std/√n, to bound their sum
) -> LSUVReport:  # one row per layer, in execution order: mean and std before and after, status, reason
    """Scale and shift each layer's weights so that its output on `batch` has the target mean and standard deviation.

    This is layer-sequential unit variance (LSUV; Mishkin & Matas 2016, arXiv:1511.06422) with the mean correction of
    the fast.ai course. It is exact for all layers at once and takes three forward passes, whatever the depth
    (`residual` takes a fourth), because the hook that measures a layer also corrects it and passes the corrected
    output on. Like the functions of `torch.nn.init`, it works in place and prints nothing.

    `init` is applied to each weight before it is corrected, and the bias is zeroed. `init="auto"` keeps the weights if
    plain LSUV makes the network trainable. Otherwise it tries bounded residual branches, mirrored weights and
    orthogonal weights, in at most ten passes, and takes the best by signal and gradient.

    How a gradient travels is measured by a backward pass. If the batch has at most 64 samples, it follows the last of
    the three passes, which then keeps its activations as a training step does; otherwise, it follows a fourth pass, on
    8 samples. With "auto", each initialisation that is tried gets one.

    Raises:
        ValueError: an option is out of range, a pattern matches nothing, the batch contains infinity, or NaN that the
            model doesn't fill, or lazy modules haven't seen a batch yet.
        TypeError: an option has the wrong type, or the batch doesn't consist of tensors.
        RuntimeError: the batch is empty, the model can't be copied, or it reaches its own layers in a way that no copy
            can follow.
        Exception: whatever a forward pass raises; its message then names the module at work. The model is left
            bit-for-bit unchanged.

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
    except Exception as error:
        if hint := hint_for(batch, error):
            add_to_message(error, hint)
        raise


def run(
    model: nn.Module, call: Call, options: Options, as_it_stands: bool = False, on_layer: OnLayer | None = None
) -> LSUVReport:
    """`lsuv_` on the arguments of a forward; of a model that is `as_it_stands` when training calls it.

    `on_layer` is called each time a module with parameters has run, in each pass.
    """
    started = time.perf_counter()
    check_model(model)
    check_inputs(call)
    with kept_random_state():
        discovery = _discover(model, call, options, as_it_stands, on_layer)
        dry_run = discovery.dry_run
        check_outputs([layer.before for layer in discovery.layers if layer.before], call)
        if options.residual and not options.only_measures and not discovery.branch_ends:
            why = "no residual branch ends in a layer that is corrected and whose scale comes to the sum"
            warnings.warn(f"residual=True changes nothing: {why}", stacklevel=4)
        chosen = choose(discovery, options) if options.init == AUTO else Chosen(attempt(discovery, options))
        done = chosen.taken
        if not done.layers:
            warnings.warn(f"{type(dry_run.model).__name__} has nothing to correct: no affine layer", stacklevel=4)
        report = LSUVReport(
            [row_of(layer, done.options) for layer in done.layers],
            dry_run.n_forward,
            time.perf_counter() - started,
            done.options.mean,
            done.options.std,
            verdict=done.trainability.verdict,
            remedy=remedy(done.trainability, options),
            init=chosen.story,
        )
    dry_run.hand_over()  # last, so that whatever is interrupted has changed nothing
    return report


def _discover(
    model: nn.Module, call: Call, options: Options, as_it_stands: bool, on_layer: OnLayer | None
) -> Discovery:
    """Look at the layers: without gradients, unless the forward itself asks for some (forces, penalties)."""
    try:
        return Discovery(DryRun(model, call, as_it_stands, on_layer=on_layer), options)
    except RuntimeError as error:
        if "grad" not in str(error):
            raise
    return Discovery(DryRun(model, call, as_it_stands, with_grad=True, on_layer=on_layer), options)
