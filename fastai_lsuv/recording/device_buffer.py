"""What waits on a device to leave it together."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

T = TypeVar("T")


class DeviceBuffer(Generic[T]):
    """Statistics that wait on their device, to leave it together."""

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._labels: list[T] = []
        self._table: Tensor | None = None

    @property
    def full(self) -> bool:
        """True if there is no room for more."""
        return len(self._labels) == self.size

    def add(self, label: T, values: Tensor) -> None:
        """Keep a label on the host and values, of the same shape and device each time, where they are."""
        if self._table is None:
            self._table = values.new_empty(self.size, *values.shape)
        self._table[len(self._labels)] = values
        self._labels.append(label)

    def empty(self) -> list[tuple[T, npt.NDArray[np.float32]]]:
        """All that waits, as arrays on the host: the only wait for the device."""
        if self._table is None:
            return []
        labels, self._labels = self._labels, []
        return list(zip(labels, self._table[: len(labels)].cpu().numpy().copy(), strict=True))
