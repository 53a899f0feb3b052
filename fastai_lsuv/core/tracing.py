"""What sees every operation of a pass, and where the tensors lie that it works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

SHAPED = [  # operations that take no more than the shape of another tensor
    getattr(torch.ops.aten, name)
    for name in (
        *(f"{what}_like" for what in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")),
        *(f"new_{what}" for what in ("empty", "empty_strided", "full", "ones", "zeros")),
    )
]


class Trace(TorchDispatchMode):
    """Sees every operation, whatever runs it."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and to import what would skip it takes seconds."""
        return False


def tensors(nested: Any) -> list[Tensor]:
    """Return all tensors of what an operation takes or gives."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        return tensors([*nested.values()])
    return [x for o in nested for x in tensors(o)] if isinstance(nested, (list, tuple)) else []


def placed(nested: Any) -> Iterator[tuple[Tensor, StorageWeakRef]]:
    """All tensors with the memory they lie in, which a weak reference keeps from being taken for another one.

    Views of it are the same to all.
    """
    for x in tensors(nested):
        with suppress(NotImplementedError):  # of a device that has no memory
            yield x, StorageWeakRef(_values(x).untyped_storage())


def _values(x: Tensor) -> Tensor:
    """What isn't zero of a sparse tensor."""
    if x.layout is torch.sparse_coo:
        return x._values()
    return x if x.layout is torch.strided or x.layout is torch.jagged else x.values()
