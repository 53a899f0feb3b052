"""One batch from a Learner as its model will get it, without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np
from fastai.torch_core import get_random_states, set_random_states
from torch import Tensor
from torch.utils.data import IterableDataset

from fastai_lsuv.core.errors import add_to_message
from fastai_lsuv.learner.loaders import loader_copy
from fastai_lsuv.learner.pilot import LOADERS, Call, UnknownInputs, first_call

if TYPE_CHECKING:
    from fastai.learner import Learner


_EXPECTED = "expected one batch as the DataLoaders give it, (xb, yb)"


@contextmanager
def as_fed(
    learn: Learner,
    batch: Any = None,  # a batch as the DataLoaders give it, `(xb, yb)`; `None` takes one from `learn.dls.train`
    begun: float = -math.inf,  # callbacks of a smaller order have had their `before_fit`
) -> Iterator[Call]:
    """What the model is called with in the first step of training, for a `with` block in the training's autocast.

    In the block the model is in the mode in which that call finds it. Random streams, the DataLoader, its data, the
    callbacks and the Learner are as before.

    Raises:
        ValueError: the Learner has no DataLoaders, or its training DataLoader has no batch.
        TypeError: `batch` is a single input, or DataLoaders.
        UnknownInputs: the block fails, with inputs that may not be those of training.
    """
    check_batch(batch)
    with _kept_random_states(), ExitStack() as stack:
        try:
            fed = first_call(learn, _own_batch(learn) if batch is None else batch, begun)
        except UnknownInputs as error:
            if batch is None or isinstance(batch, (tuple, list)):
                raise
            raise TypeError(f"batch is a {type(batch).__name__}: {_EXPECTED}") from error
        for setting in fed.settings:
            stack.enter_context(setting)
        try:
            yield fed.call
        except Exception as error:
            if fed.doubt is None:
                raise
            raise UnknownInputs(f"{fed.doubt}: {str(error).partition(chr(10))[0]}") from error


def check_batch(batch: Any) -> None:
    """Raise if this can't be a batch of inputs and targets from a DataLoader."""
    if isinstance(batch, (*LOADERS, Tensor, np.ndarray, Number, str)):
        raise TypeError(f"batch is a {type(batch).__name__}: {_EXPECTED}")


def _own_batch(learn: Learner) -> Any:
    """The batch that a training loop would see first.

    Raises:
        ValueError: there is none.
    """
    if learn.dls is None:
        raise ValueError("the Learner has no DataLoaders to take a batch from; lsuv_(model, xb) needs none")
    dl = learn.dls.train
    try:
        batch = _first_of(dl)
    except Exception as error:
        add_to_message(error, f"LSUV stopped while taking a batch from {type(dl).__name__}")
        raise
    if batch is None:
        raise ValueError(f"{type(dl).__name__} has no batch: it is empty, or smaller than one batch with `drop_last`")
    return batch


def _first_of(dl: Iterable[Any]) -> Any:
    """The first batch, fetched in this process, as workers take their time to start; by workers where only they can.

    Each of them may have a part of an `IterableDataset`, and files of its own that `worker_init_fn` has opened.
    """
    own = loader_copy(dl)
    workers = _workers_of(own)
    if workers.get("num_workers", 0) == 0:
        return next(iter(own), None)
    if isinstance(getattr(own, "dataset", None), IterableDataset):
        return _first_of_workers(dl)
    workers.update(num_workers=0, persistent_workers=False, prefetch_factor=None, timeout=0)
    try:
        return next(iter(own), None)
    except Exception as error:
        with suppress(Exception):
            return _first_of_workers(dl)
        raise error from None


def _first_of_workers(dl: Iterable[Any]) -> Any:
    own = loader_copy(dl)
    _workers_of(own).update(persistent_workers=False)
    return next(iter(own), None)


def _workers_of(dl: Any) -> dict[str, Any]:
    """Where a loader keeps what concerns its workers. (PyTorch's forbids to set these once it is made.)"""
    return vars(getattr(dl, "fake_l", dl)) if isinstance(dl, LOADERS) else {}


@contextmanager
def _kept_random_states() -> Iterator[None]:
    states = get_random_states()
    try:
        yield
    finally:
        set_random_states(**states)
