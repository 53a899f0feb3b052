"""Guards: what has been decided about a Learner's model, and the signs that it was trained or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from fastai.learner import Recorder, SkipToEpoch
from torch import nn
from torch.nn.parameter import is_lazy

from fastai_lsuv.learner.loads import was_loaded
from fastai_lsuv.report import LSUVReport, Row
from fastai_lsuv.summary import few

if TYPE_CHECKING:
    from fastai.callback.core import Callback
    from fastai.learner import Learner

_REPORT = "lsuv_report"  # attribute of the Learner
_DECISION = "_decision"  # of the report and the callback


@dataclass
class Decision:
    """What was decided about a model: it has had LSUV, as its report keeps, or is refused it, as a callback keeps.

    A copy, like one that was loaded, doesn't know the model: it is about the one of the Learner that it came with.
    """

    layers: WeakSet[nn.Module] | None  # of the model; None in a copy
    refused: str = ""  # the sign that it was trained; empty: it has had LSUV
    told: bool = False  # the user knows of the refusal, or of layers that were frozen and are no longer

    def is_about(self, model: nn.Module) -> bool:
        """True if all layers of the model are those of the one that this was decided about."""
        return self.layers is not None and _layers_of(model) <= self.layers

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"layers": None}


def _layers_of(model: nn.Module) -> WeakSet[nn.Module]:
    """Return the modules with weights of their own. Norms and wrappers have none, so that they may come and go."""
    return WeakSet(m for m in model.modules() if any(is_lazy(p) or p.dim() > 1 for p in m.parameters(recurse=False)))


def decision_on(learn: Learner) -> Decision | None:
    """Return what has been decided about the model that the Learner has now."""
    return next((decision for decision in _kept(learn) if decision.is_about(learn.model)), None)


def refusal(learn: Learner) -> str | None:
    """Return the sign for which the Learner's model will not have LSUV: empty if it has had it, None if it is fresh."""
    decision = decision_on(learn)
    return next(_signs_of_training(learn), None) if decision is None else decision.refused


def sign_of_training(learn: Learner) -> str:
    """Return a sign that the Learner's model has been trained, whether or not it has had LSUV; empty if there is none.

    A model that has had LSUV was fresh then, so that only what came later counts.
    """
    return refusal(learn) or next(chain(_signs_of_norms(learn.model), _signs_of_steps(learn)), "")


def what_was_overwritten(report: LSUVReport, sign: str) -> str:
    """Return a warning where an LSUV that was asked for has changed a network with a sign of training; else nothing.

    Frozen layers keep what they have learned: the others are then taken for a new head, for which LSUV is right.
    """
    is_new_head = any(row.reason == "frozen" for row in report)
    if not sign or is_new_head or not any(row.n_iter for row in report):
        return ""
    return f"lsuv_init() overwrote a network that looks trained ({sign}). Load its weights again if you still need them"


def keep(learn: Learner, report: LSUVReport) -> None:
    """Keep the report of the LSUV that the Learner's model has had."""
    report._decision = Decision(_layers_of(learn.model))
    vars(learn)[_REPORT] = report


def settle(learn: Learner, cb: Callback, sign: str) -> Decision:
    """Have the callback keep what a `refusal` decides, which may be that of another process; return it."""
    decision = vars(cb)[_DECISION] = decision_on(learn) or Decision(_layers_of(learn.model), sign)
    if sign:
        vars(learn).pop(_REPORT, None)  # one on another model
    return decision


def what_to_tell(learn: Learner, decision: Decision) -> str:
    """Return, once, why LSUV doesn't run, or which layers were frozen when it ran and train from now on."""
    if decision.told:
        return ""
    if decision.refused:
        line = (
            f"LSUV: not run: this network looks trained ({decision.refused}). Usually right, nothing to do. "
            "To overwrite its weights anyway: learn.lsuv_init()"
        )
    else:
        thawed = _thawed(learn.model, vars(learn).get(_REPORT, ()))
        line = f"LSUV: {len(thawed)} layers were frozen when it ran, and so were not corrected: {few(thawed)}"
        line *= bool(thawed)
    decision.told = bool(line)
    return line


def _thawed(model: nn.Module, report: Iterable[Row]) -> list[str]:
    modules = dict(model.named_modules())
    frozen = [row.name for row in report if row.reason == "frozen" and row.name in modules]
    return [name for name in frozen if all(p.requires_grad for p in modules[name].parameters())]


def _kept(learn: Learner) -> list[Decision]:
    """Return what has been decided about this model of the Learner's and those before it."""
    keepers: list[Any] = [cb for cb in learn.cbs if cb.learn is learn]
    if (report := vars(learn).get(_REPORT)) is not None:
        vars(report).setdefault(_DECISION, Decision(None))
        keepers.insert(0, report)
    kept = [decision for keeper in keepers if isinstance(decision := vars(keeper).get(_DECISION), Decision)]
    for decision in kept:
        decision.layers = _layers_of(learn.model) if decision.layers is None else decision.layers
    return kept


def _signs_of_training(learn: Learner) -> Iterator[str]:
    if was_loaded(learn.model):
        yield "weights were loaded into it"
    yield from _signs_of_norms(learn.model)
    yield from _signs_of_this_learner(learn)
    yield from _signs_of_steps(learn)
    for cb in learn.cbs:
        if isinstance(cb, SkipToEpoch) and cb._skip_to > 0:
            yield f"training starts at epoch {cb._skip_to}"


def _signs_of_steps(learn: Learner) -> Iterator[str]:
    if any(_has_stepped(opt, learn.model) for opt in (learn.opt, getattr(learn.opt, "opt", None))):
        yield "the optimizer has made steps"


def _signs_of_norms(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        named = f"`{name.replace('_orig_mod.', '')}`" if name else type(module).__name__
        count = dict(module.named_buffers(recurse=False)).get("num_batches_tracked")
        if count is not None and int(count) > 0:
            yield f"batch norm {named} has counted {int(count)} batch{'es' * (int(count) > 1)}"
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and "norm" in type(module).__name__.lower() and _differ(weight):
            yield f"the weights of norm {named} differ"


def _differ(weight: torch.Tensor) -> bool:
    return not is_lazy(weight) and weight.dim() == 1 and bool((weight != weight[:1]).any())


def _signs_of_this_learner(learn: Learner) -> Iterator[str]:
    """What fits leave behind whatever the optimizer: the Recorder's smoothed loss, and gradients that were zeroed."""
    own, kept = _layers_of(learn.model), _kept(learn)
    if used := [layer for layer in own if any(layer in (decision.layers or ()) for decision in kept)]:
        yield f"{len(used)} of its {len(own)} layers have been in use before"
    if _looked_for_a_learning_rate(learn, is_new=bool(kept)):
        return
    if "smooth_loss" in vars(learn) and not kept:  # else it tells of the model before this one
        yield "this Learner has trained it"
    if _were_zeroed(p.grad for p in learn.model.parameters()):
        yield "an optimizer has zeroed its gradients"


def _looked_for_a_learning_rate(learn: Learner, is_new: bool) -> bool:
    """True if `lr_find` came last, which puts the weights back, and nothing tells of a fit before it.

    The Recorder keeps the learning rates of the last run only. But it has schedules (`hps`) from fits alone, and so has
    the Learner records of a whole epoch, training and validation, which a short `lr_find` leaves as they are.
    """
    recorder: dict[str, Any] = next((vars(cb) for cb in learn.cbs if isinstance(cb, Recorder)), {})
    ratios = [after / before for before, after in pairwise(recorder.get("lrs", ())) if before]
    if len(ratios) < 2 or min(ratios) <= 1 or max(ratios) - min(ratios) > 1e-6:  # not exponential
        return False
    of_an_epoch = len(recorder["metric_names"]) - 1 - recorder["add_time"]  # not the epoch itself, nor the time
    return is_new or not ("hps" in recorder or len(vars(learn).get("final_record", ())) == of_an_epoch)


def _were_zeroed(gradients: Iterable[torch.Tensor | None]) -> bool:
    first = next((g for g in gradients if g is not None and g.layout == torch.strided), None)
    return first is not None and not bool(first.any())


def _has_stepped(opt: Any, model: nn.Module) -> bool:
    """True if an optimizer (fastai's, or PyTorch's in an OptimWrapper) holds anything that only a step makes."""
    flags = {"do_wd", "force_train"}  # set by the Learner beforehand
    state = getattr(opt, "state", None) or {}
    return any(not flags.issuperset(state[p]) for p in model.parameters() if p in state)
