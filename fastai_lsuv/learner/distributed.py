"""The processes that train one model together: one decision, one set of weights, one end."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastai_lsuv.core.errors import add_to_message

if TYPE_CHECKING:
    from fastai.learner import Learner

T = TypeVar("T")


class OneProcess:
    """This process alone."""

    rank = 0

    def first(self, ask: Callable[[], T]) -> T:
        """Return what rank 0 answers."""
        return ask()

    def initialise(self, model: nn.Module, fed: AbstractContextManager[Any], run: Callable[[Any], T]) -> T:
        """Return what `run` makes of the model with the call that it is fed, in that context."""
        with fed as call:
            return run(call)


class DistributedGroup(OneProcess):
    """The ranks of the default process group, which all call the same methods in the same order.

    Whatever a rank does that may fail, it does in `_together`; between those, ranks only hand on bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def first(self, ask: Callable[[], T]) -> T:
        """Return what rank 0 answers, on all of them."""
        with self._together():
            packed = self._pack(ask())
        return cast(T, self._unpack(packed))

    def initialise(self, model: nn.Module, fed: AbstractContextManager[Any], run: Callable[[Any], T]) -> T:
        """Run rank 0's weights on rank 0's call everywhere, and return rank 0's result; all end with its weights.

        Each rank is fed a batch of its own first, whose autocast it needs. If anything fails on any of them, each has
        its own weights again.
        """
        weights = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
        own = [t.detach().clone() for t in weights]
        try:
            with ExitStack() as stack:
                with self._together():
                    packed = self._pack((stack.enter_context(fed), own))
                call, firsts = self._unpack(packed)
                with self._together():
                    _copy(firsts, weights)
                    packed = self._pack((run(call), [t.detach() for t in weights]))
                result, firsts = self._unpack(packed)
                with self._together():
                    _copy(firsts, weights)
            return cast(T, result)
        except BaseException:
            _copy(own, weights)
            raise

    @contextmanager
    def _together(self) -> Iterator[None]:
        """End the block on all ranks with the error of the one on which it fails."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
        failures: list[Any] = [None] * self.size
        dist.all_gather_object(failures, error and _packed_error(error))
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise _unpacked_error(rank, *failure)

    def _pack(self, value: object) -> tuple[bytes, str] | None:
        """Return a value of rank 0 as bytes, with the device of its tensors."""
        if self.rank:
            return None
        packed = io.BytesIO()
        torch.save(value, packed)
        return packed.getvalue(), str(self.device)

    def _unpack(self, packed: tuple[bytes, str] | None) -> Any:
        """Return the value of rank 0, with its tensors on this rank's device."""
        box: list[Any] = [packed]
        dist.broadcast_object_list(box, src=0)
        with self._together():
            value, device = box[0]
            return torch.load(io.BytesIO(value), {device: str(self.device)}, weights_only=False)


def group_of(learn: Learner) -> OneProcess:
    """Return all processes that train this Learner's model, if fastai's `DistributedTrainer` says there are several."""
    several = "distributed_trainer" in vars(learn) and dist.is_available() and dist.is_initialized()
    return DistributedGroup(next(learn.model.parameters()).device) if several else OneProcess()


def _copy(values: list[Tensor], to: list[Tensor]) -> None:
    if [v.shape for v in values] != [t.shape for t in to]:
        raise RuntimeError("the ranks don't train the same model: its parameters and buffers differ in shape")
    with torch.no_grad():
        for value, tensor in zip(values, to, strict=True):
            tensor.copy_(value)


def _packed_error(error: BaseException) -> tuple[bytes | None, str]:
    text = f"{type(error).__name__}: {error}"
    try:
        return pickle.dumps(error), text
    except Exception:
        return None, text


def _unpacked_error(rank: int, pickled: bytes | None, text: str) -> BaseException:
    """Return the same error where its type allows it, naming the rank on which it was raised."""
    try:
        error = pickle.loads(pickled) if pickled else RuntimeError(text)
    except Exception:
        error = RuntimeError(text)
    add_to_message(error, f"(on rank {rank})")
    return error
