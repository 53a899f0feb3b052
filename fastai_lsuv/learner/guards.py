"""Guards: what has been decided about a Learner's model, and the signs that it was trained or loaded.

A decision (it has had LSUV, or was refused it) belongs to a model, is made once, and is kept in the Learner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from fastai.learner import Recorder, SkipToEpoch
from torch import nn
from torch.nn.parameter import is_lazy

from fastai_lsuv.report import LSUVReport

if TYPE_CHECKING:
    from fastai.learner import Learner

_REPORT, _DECIDED = "lsuv_report", "_lsuv_decided"  # attributes of the Learner


@dataclass
class Decision:
    """What was decided about a model."""

    report: LSUVReport | None = None  # it has had LSUV
    refused: str = ""  # or will not have it: the sign that it was trained
    told: bool = False  # the user knows of the refusal, or of layers that were frozen and are no longer


class Layers(WeakSet[nn.Module]):
    """The modules of a model that have weights of their own, held weakly; pickles and deep copies hold their copies."""

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """Return those of `model`. Norms and wrappers have none, so that they may come and go."""
        return cls(m for m in model.modules() if any(is_lazy(p) or p.dim() > 1 for p in m.parameters(recurse=False)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Layers, (list(self),)


def decision_on(learn: Learner) -> Decision | None:
    """Return what has been decided about the model that the Learner has now."""
    layers, decision = vars(learn).get(_DECIDED, (Layers(), None))
    return decision if Layers.of(learn.model) <= layers else None


def keep(learn: Learner, decision: Decision, layers: Layers | None = None) -> None:
    """Keep a decision about the Learner's model, or the one that has these layers; one on another model goes."""
    vars(learn)[_DECIDED] = layers or Layers.of(learn.model), decision
    vars(learn).pop(_REPORT, None)
    if decision.report is not None:
        vars(learn)[_REPORT] = decision.report


def judge(learn: Learner) -> Decision | None:
    """Return a refusal if the model shows that it was trained, None if it is fresh."""
    sign = next(_signs_of_training(learn), None)
    return Decision(refused=sign) if sign else None


def _signs_of_training(learn: Learner) -> Iterator[str]:
    yield from _signs_of_norms(learn.model)
    yield from _signs_of_this_learner(learn)
    if any(_has_stepped(opt, learn.model) for opt in (learn.opt, getattr(learn.opt, "opt", None))):
        yield "the optimizer has made steps"
    for cb in learn.cbs:
        if isinstance(cb, SkipToEpoch) and cb._skip_to > 0:
            yield f"training starts at epoch {cb._skip_to}"


def _signs_of_norms(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        named = repr(name.replace("_orig_mod.", "")) if name else type(module).__name__
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
    own, seen = Layers.of(learn.model), vars(learn).get(_DECIDED, (None,))[0]
    if seen is not None and own & seen:
        yield f"{len(own & seen)} of its {len(own)} layers have been in use before"
    if _looked_for_a_learning_rate(learn, is_new=seen is not None):
        return
    if "smooth_loss" in vars(learn) and seen is None:  # else it tells of the model before this one
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
