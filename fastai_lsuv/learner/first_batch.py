"""One batch from a Learner, without a trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from random import Random
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fastai.data.load import DataLoader
from fastai.torch_core import get_random_states, set_random_states
from fastcore.foundation import L
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader

from fastai_lsuv.core.errors import add_to_message
from fastai_lsuv.learner.replay import Replay

if TYPE_CHECKING:
    from fastai.learner import Learner

_SHARED = (type, FunctionType, ModuleType, nn.Module, torch.Tensor)  # not parts of a loader
_MANY = 2**24  # longer arrays are the data itself rather than indices


@contextmanager
def as_fed(
    learn: Learner,
    batch: Any = None,  # a batch as the DataLoaders give it, `(xb, yb)`; `None` takes one from `learn.dls.train`
    begun: float = -math.inf,  # callbacks of a smaller order have had their `before_fit`
) -> Iterator[tuple[Any, ...]]:
    """The inputs of one training batch as the model will be fed them, for a `with` block in the training's autocast.

    Split and moved as the Learner does it, and rewritten as other callbacks will in `before_batch`. Random streams,
    the DataLoader, the callbacks and the Learner are as before.

    Raises:
        ValueError: the Learner has no DataLoaders, or that for training no batch.
        TypeError: `batch` is no tuple or list.
    """
    with _kept_random_states(), ExitStack() as stack:
        if batch is None:
            if learn.dls is None:
                raise ValueError("the Learner has no DataLoaders to take a batch from; lsuv_(model, xb) needs none")
            try:
                batch = _one_batch(learn.dls.train)
            except Exception as error:
                add_to_message(error, f"LSUV stopped while it took a batch from {type(learn.dls.train).__name__}")
                raise
        elif not isinstance(batch, (tuple, list)):
            raise TypeError(f"batch is a {type(batch).__name__}: expected a tuple as the DataLoaders give it, (xb, yb)")
        replay = Replay(learn, learn._set_device(batch), begun)
        inputs = replay.inputs()
        for autocast in replay.autocasts():
            stack.enter_context(autocast)
        yield inputs


def _one_batch(dl: Iterable[Any]) -> Any:
    """The batch that a training loop over `dl` would see first (on this rank), fetched in this process.

    Raises:
        ValueError: there is none.
    """
    with _untouched(dl):
        batch = next(iter(_single_process(dl)), None)
    if batch is None:
        raise ValueError(f"{type(dl).__name__} has no batch: is it empty, or smaller than a batch with `drop_last`?")
    return batch


@contextmanager
def _kept_random_states() -> Iterator[None]:
    states = get_random_states()
    try:
        yield
    finally:
        set_random_states(**states)


def _single_process(dl: Iterable[Any]) -> Iterable[Any]:
    """A view of a DataLoader without workers, whose start would be slow and draw random numbers."""
    if not isinstance(dl, TorchDataLoader):
        return dl
    view = copy.copy(dl)  # PyTorch forbids to set these on a loader that is made, for the sake of running workers
    vars(view).update(
        num_workers=0, persistent_workers=False, prefetch_factor=None, timeout=0, worker_init_fn=None, _iterator=None
    )
    return view


@contextmanager
def _untouched(dl: Iterable[Any]) -> Iterator[None]:
    """The DataLoader and its parts as before: attributes, lists, arrays of indices, generators of its own."""
    parts = _parts(dl)
    attributes = [(vars(part), dict(vars(part))) for part in parts]
    contents = [(held, held[:] if isinstance(held, list) else held.copy()) for held in _containers(parts)]
    streams = [(restore, copy.deepcopy(state)) for part in parts for state, restore in _streams(part)]
    try:
        if isinstance(dl, DataLoader):
            dl.fake_l.num_workers = 0
        yield
    finally:
        for current, saved in attributes:
            put_back(current, saved)
        for held, content in contents:
            held[:] = content
        for restore, state in streams:
            restore(state)


def _parts(dl: Any) -> list[Any]:
    """The loader, what it holds (dataset, sampler, …), and what that holds."""
    found, newest = {id(dl): dl}, [dl]
    for _ in range(2):
        held = [o for part in newest if hasattr(part, "__dict__") for o in vars(part).values()]
        newest = [o for o in held if id(o) not in found and hasattr(o, "__dict__") and not isinstance(o, _SHARED)]
        found.update({id(o): o for o in newest})
    return [o for o in found.values() if hasattr(o, "__dict__")]


def _containers(parts: list[Any]) -> list[Any]:
    """Lists and arrays of indices in the attributes of the parts, which may be shuffled in place (`LMDataLoader`)."""
    values = [value.items if isinstance(value, L) else value for part in parts for value in vars(part).values()]
    found = {id(o): o for o in values if isinstance(o, list) or _is_small_array(o)}
    return list(found.values())


def _is_small_array(o: object) -> bool:
    return type(o) is np.ndarray and o.ndim == 1 and o.size < _MANY and o.flags.writeable


def _streams(part: Any) -> Iterator[tuple[Any, Callable[[Any], object]]]:
    """States of the random generators that a part holds, Python's, numpy's and torch's, and what puts each back."""
    for held in vars(part).values():
        if isinstance(held, torch.Generator):
            yield held.get_state(), held.set_state
        elif isinstance(held, Random):
            yield held.getstate(), held.setstate
        elif isinstance(held, np.random.RandomState):
            yield held.get_state(), held.set_state
        elif isinstance(held, np.random.Generator):
            yield held.bit_generator.state, partial(setattr, held.bit_generator, "state")


def put_back(current: dict[str, Any], saved: dict[str, Any]) -> None:
    """Give a dict the entries that it had, touching only what differs."""
    for name in current.keys() - saved.keys():
        del current[name]
    for name, value in saved.items():
        if name not in current or current[name] is not value:
            current[name] = value
