"""Which part of fastai's training loop is at work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby, islice
from types import FrameType

from fastai.learner import Learner

_PARTS = ("one_batch", "all_batches", "_do_epoch_train", "_do_epoch_validate", "_do_epoch", "validate", "get_preds")
_EPOCH = {"train": ("one_batch", "all_batches", "_do_epoch_train", "_do_epoch"),
          "valid": ("one_batch", "all_batches", "_do_epoch_validate", "_do_epoch")}  # fmt: skip


def came_through_fit(learn: Learner) -> bool:
    """Whether the event at hand was fired by `learn.fit`.

    `validate`, `get_preds`, `tta`, `with learn:` and others fire `before_fit` and `after_fit`, too, and nothing in the
    Learner's attributes tells them apart: only the frames do.
    """
    return next(_methods_at_work(learn, ("fit", "__enter__", "__exit__")), None) == "fit"


def phase_of_batch(learn: Learner) -> str | None:
    """`train` or `valid` if the batch at hand is one of a fit's own; None if a callback asked for predictions, say."""
    at_work = (name for name, _ in groupby(_methods_at_work(learn, _PARTS)))  # one that calls `super()` counts once
    innermost = tuple(islice(at_work, 4))
    return next((phase for phase, parts in _EPOCH.items() if innermost == parts), None)


def _methods_at_work(learn: Learner, among: tuple[str, ...]) -> Iterator[str]:
    """Names of the Learner's methods that are running, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # to ask for a frame's locals copies them, which would keep them alive: the name first
        if frame.f_code.co_name in among and frame.f_locals.get("self") is learn:
            yield frame.f_code.co_name
        frame = frame.f_back
