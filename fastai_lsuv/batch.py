"""One batch from a Learner, without a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from fastai.data.load import DataLoader
from fastai.torch_core import get_random_states, set_random_states
from torch.utils.data import DataLoader as TorchDataLoader

if TYPE_CHECKING:
    from fastai.learner import Learner


def inputs_of(
    learn: Learner,
    batch: Any = None,  # a batch as the DataLoaders give it, `(xb, yb)`; `None` takes one from `learn.dls.train`
) -> tuple[Any, ...]:
    """The inputs of one training batch, split and moved as the Learner does it.

    Random streams, the DataLoader and the Learner's own `xb` and `yb` are afterwards as before.

    Raises:
        ValueError: the DataLoader has no batch.
        TypeError: `batch` is no tuple or list.
    """
    if batch is None:
        batch = one_batch(learn.dls.train)
    elif not isinstance(batch, (tuple, list)):
        raise TypeError(f"batch is a {type(batch).__name__}: expected a tuple as the DataLoaders give it, (xb, yb)")
    with _kept_attributes(learn, "xb", "yb"):
        learn._split(learn._set_device(batch))
        return tuple(learn.xb)


def one_batch(dl: Iterable[Any]) -> Any:
    """The batch that a training loop over `dl` would see first, fetched in this process.

    Raises:
        ValueError: there is none.
    """
    states = get_random_states()
    try:
        with _untouched(dl):
            batch = next(iter(_single_process(dl)), None)
    finally:
        set_random_states(**states)
    if batch is None:
        raise ValueError(f"{type(dl).__name__} has no batch: is it empty, or smaller than a batch with `drop_last`?")
    return batch


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
    """Generators of the DataLoader itself, and what fastai's notes on it while it runs, as before."""
    generators = _generators(dl)
    states = [g.get_state() for g in generators]
    rng = getattr(dl, "rng", None)
    rng_state = rng.getstate() if isinstance(rng, Random) else None
    attributes = dict(vars(dl)) if isinstance(dl, DataLoader) else None
    workers = dl.fake_l.num_workers if isinstance(dl, DataLoader) else 0
    try:
        if isinstance(dl, DataLoader):
            dl.fake_l.num_workers = 0
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if attributes is not None:
            dl.fake_l.num_workers = workers  # type: ignore[attr-defined]
            vars(dl).clear()
            vars(dl).update(attributes)
        if rng_state is not None:
            rng.setstate(rng_state)  # type: ignore[union-attr]


def _generators(dl: Any) -> list[torch.Generator]:
    """Torch generators of the loader and its samplers."""
    batches = getattr(dl, "batch_sampler", None)
    found = [
        getattr(o, "generator", None)
        for o in (dl, getattr(dl, "sampler", None), batches, getattr(batches, "sampler", None))
    ]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


@contextmanager
def _kept_attributes(obj: object, *names: str) -> Iterator[None]:
    kept = {name: vars(obj)[name] for name in names if name in vars(obj)}
    try:
        yield
    finally:
        for name in names:
            vars(obj).pop(name, None)
        vars(obj).update(kept)
