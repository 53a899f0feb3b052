"""A progress bar like those of fastai, if LSUV takes a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastai.callback.progress import ProgressCallback, progress_bar
from torch import nn

if TYPE_CHECKING:
    from fastai.learner import Learner

_PATIENCE = 3.0  # seconds without a bar


@contextmanager
def progress_of(learn: Learner, with_bar: bool = True) -> Iterator[Callable[[], None] | None]:
    """Yield what to call each time a layer has run; a bar appears after some seconds and goes away with the block.

    Yield None if bars aren't wanted or the Learner has none.
    """
    if not (with_bar and learn._grab_cbs(ProgressCallback)):
        yield None
        return
    bar = _LateBar(_expected_calls(learn.model))
    try:
        yield bar.advance
    finally:
        bar.close()


def _expected_calls(model: nn.Module) -> int:
    """Return how often layers run: all with parameters in the first pass, those with a matrix in the next two."""
    own = [[*m.parameters(recurse=False)] for m in model.modules()]
    return sum(bool(parameters) + 2 * any(p.dim() > 1 for p in parameters) for parameters in own)


class _LateBar:
    """Counts to `total`; where blocks are iterated, it goes on counting but stops just before the end of the bar."""

    def __init__(self, total: int) -> None:
        self.total, self.n, self.started = total, 0, time.time()
        self.bar: Any = None

    def advance(self) -> None:
        """Count one more."""
        self.n += 1
        if self.bar is None and time.time() - self.started >= _PATIENCE:
            self.bar = progress_bar(range(self.total), leave=False)
            self.bar.comment = "LSUV"
            self.bar.update(0)
            self.bar.start_t = self.started
        if self.bar is not None and self.n < self.total:  # at the total it would end
            self.bar.update(self.n)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.on_iter_end()
