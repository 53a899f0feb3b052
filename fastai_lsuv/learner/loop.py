"""Which part of fastai's training loop is at work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from types import FrameType
from typing import Any

from fastai.learner import Learner


def came_through_fit(learn: Learner) -> bool:
    """Whether the current event was fired by `learn.fit`.

    `validate`, `get_preds`, `tta`, `with learn:` and others also fire `before_fit` and `after_fit`, and nothing in the
    Learner's attributes tells them apart: only the stack frames do.
    """
    return next(_methods_at_work(learn, ("fit", "__enter__", "__exit__")), None) == "fit"


def phase_of_batch(learn: Learner) -> str | None:
    """Return `train` or `valid` if the current event is about a batch of the fit itself, whatever loop the Learner has.

    None otherwise, such as when a callback asks for predictions in the middle of the fit.
    """
    at_work = _methods_at_work(learn, ("_call_one", "validate", "get_preds", "fit"))
    is_own = tuple(islice(at_work, 2)) == ("_call_one", "fit")  # the event is not fired within another one
    return ("train" if learn.training else "valid") if is_own else None


def at_end_of_next_stage(learn: Learner, do: Callable[[], None]) -> None:
    """Call `do` when the next stage of the Learner's loop (the coming epoch, say) ends, whatever ends it.

    fastai tells no callback about an exception or an interrupt. The Learner's method is replaced only briefly: from
    now until that stage begins, before its first event.
    """
    usual, own = learn._with_events, vars(learn).get("_with_events")

    def stage(*args: Any, **kwargs: Any) -> None:
        vars(learn).pop("_with_events", None)
        if own is not None:
            learn._with_events = own
        try:
            usual(*args, **kwargs)
        finally:
            do()

    learn._with_events = stage


def _methods_at_work(learn: Learner, among: tuple[str, ...]) -> Iterator[str]:
    """Names of the Learner's methods that are running, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # asking for a frame's locals copies them, which would keep them alive, so compare the name first
        if frame.f_code.co_name in among and frame.f_locals.get("self") is learn:
            yield frame.f_code.co_name
        frame = frame.f_back
