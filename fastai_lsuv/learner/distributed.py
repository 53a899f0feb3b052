"""The processes that train one model together: one set of weights, statistics of all their batches, one end."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastai_lsuv.core.errors import add_to_message

T = TypeVar("T")

_FAILED = -1


class Ranks:
    """This process alone; and what all processes share, which `Together` extends to several.

    As a context manager: an error in the block on any rank ends the block on all of them, with that error.
    """

    rank, size = 0, 1

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        pass

    def extremes(self, label: str, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value over all ranks."""
        return low, high

    def every(self, label: str, holds: Tensor) -> Tensor:
        """Whether it holds on all ranks."""
        return holds

    def first(self, label: str, value: T) -> T:
        """The value that rank 0 has."""
        return value

    def share(self, label: str, tensors: Iterable[Tensor], remember: Callable[[Tensor], None]) -> None:
        """Give each tensor the value that it has on rank 0, in place; `remember` is called with those that change."""

    def agree(self, label: str, what: object) -> None:
        """Wait for the others, and make sure that they have the same."""

    def finish(self) -> None:
        """Wait until all have come to the end; no rank can fail the others from here on."""


class FailedElsewhere(BaseException):
    """Ends the work of a rank when another one has failed; no `except Exception` on the way holds it up."""


class Together(Ranks):
    """The ranks of the default process group, which call the same methods with the same labels in the same order.

    Each exchange begins with a word from every rank: what it is about to exchange, or that it has failed. So a rank
    that fails, or runs other layers than the rest, ends all of them at once, instead of having them wait for it.

    Raises:
        RuntimeError: the ranks aren't at the same place.
        Exception: what another rank raised.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu") if "cpu:gloo" in dist.get_backend_config() else device
        self.open = True  # whether the others still listen

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or not self.open:
            return
        if not isinstance(error, FailedElsewhere):
            self._gather(torch.tensor([_FAILED]))
        self.open = False
        failures: list[Any] = [None] * self.size
        dist.all_gather_object(failures, None if isinstance(error, FailedElsewhere) else _packed(error))
        if isinstance(error, FailedElsewhere):
            rank, failure = next((r, f) for r, f in enumerate(failures) if f is not None)
            raise _unpacked(rank, *failure) from None

    def extremes(self, label: str, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value over all ranks."""
        lows, highs = torch.stack(self._exchange(label, torch.stack([low, high]))).unbind(1)
        return lows.min().to(low.device), highs.max().to(high.device)

    def every(self, label: str, holds: Tensor) -> Tensor:
        """Whether it holds on all ranks."""
        return torch.stack(self._exchange(label, holds.reshape(1))).all().to(holds.device)

    def first(self, label: str, value: T) -> T:
        """The value that rank 0 has."""
        self._meet(label)
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def share(self, label: str, tensors: Iterable[Tensor], remember: Callable[[Tensor], None]) -> None:
        """Give each tensor the value that it has on rank 0, in place; `remember` is called with those that change."""
        tensors = list(tensors)
        self.agree(label, [(tuple(t.shape), str(t.dtype)) for t in tensors])
        with torch.no_grad():
            for tensor in tensors:
                if self.rank:
                    remember(tensor)
                value = tensor.detach().contiguous()
                raw = value.reshape(-1).view(torch.uint8).to(self.device)  # bytes: no backend knows all dtypes
                dist.broadcast(raw, src=0)
                if self.rank:
                    tensor.copy_(raw.to(tensor.device).view(value.dtype).reshape(tensor.shape))

    def agree(self, label: str, what: object) -> None:
        """Wait for the others, and make sure that they have the same."""
        self._meet(f"{label}: {what}")

    def finish(self) -> None:
        """Wait until all have come to the end; no rank can fail the others from here on."""
        self._meet("the end")
        self.open = False

    def _exchange(self, label: str, own: Tensor) -> list[Tensor]:
        self._meet(label)
        return self._gather(own)

    def _meet(self, label: str) -> None:
        """Make sure that all ranks are at the same place, and none has failed."""
        codes = [int(code) for code in self._gather(torch.tensor([zlib.crc32(label.encode())]))]
        if _FAILED in codes:
            raise FailedElsewhere
        if len(set(codes)) > 1:
            self.open = False  # each of them is here, and sees it
            raise RuntimeError(
                f"the {self.size} ranks don't run the same model in the same way: "
                f"rank {self.rank} came to {label[:200]!r}, others didn't"
            )

    def _gather(self, own: Tensor) -> list[Tensor]:
        own = own.to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return parts


def _packed(error: BaseException) -> tuple[bytes | None, str]:
    text = f"{type(error).__name__}: {error}"
    try:
        return pickle.dumps(error), text
    except Exception:
        return None, text


def _unpacked(rank: int, pickled: bytes | None, text: str) -> BaseException:
    """The same error where its type allows it, naming the rank on which it was raised."""
    try:
        error = pickle.loads(pickled) if pickled else RuntimeError(text)
    except Exception:
        error = RuntimeError(text)
    add_to_message(error, f"(on rank {rank})")
    return error
