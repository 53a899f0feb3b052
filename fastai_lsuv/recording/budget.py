"""How often to record, so that it costs a small share of the training time: measured as it goes."""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median
from typing import Any

import torch

SHARE = 0.02  # of the training time
_FIRST = 50  # as rarely as this until it is known what it costs


class Clock:
    """Times of the host: what a step takes on the CPU."""

    def mark(self) -> Any:
        """A moment."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float | None:
        """The time between two moments; None if it can't be told yet."""
        return float(end - begin)


class DeviceClock(Clock):
    """Times of a CUDA device, at which the host has long gone ahead: read when they are there, and never waited for."""

    def mark(self) -> Any:
        """A moment of the device's own."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float | None:
        """The time between two moments; None if the device has not come to the second yet."""
        return begin.elapsed_time(end) / 1000 if end.query() else None


class Budget:
    """Chooses steps to be recorded, by how long those last that are and those that are not.

    Medians of the last steps of both kinds: neither a first step, which sets up things, nor a pause counts. It begins
    rarely, and becomes twice as frequent at most from one recorded step to the next.
    """

    def __init__(self, clock: Clock, share: float = SHARE) -> None:
        self.every = _FIRST
        self._clock, self._share = clock, share
        self._until_next = 0  # steps
        self._last: tuple[Any, bool] | None = None  # when the last step began, and whether it was recorded
        self._unread: deque[tuple[Any, Any, bool]] = deque(maxlen=100)
        self._plain: deque[float] = deque(maxlen=25)
        self._recorded: deque[float] = deque(maxlen=5)

    def begin_step(self, is_first: bool) -> bool:  # is_first: of an epoch; the time before it was not a step's
        """Return whether the step that begins now is to be recorded."""
        now = self._clock.mark()
        if self._last is not None and not is_first:
            self._unread.append((self._last[0], now, self._last[1]))
        self._read()
        is_due = self._until_next <= 0
        if is_due:
            self.every = self._affordable()
            self._until_next = self.every
        self._until_next -= 1
        self._last = now, is_due
        return is_due

    def _read(self) -> None:
        while self._unread and (seconds := self._clock.seconds(*self._unread[0][:2])) is not None:
            (self._recorded if self._unread.popleft()[2] else self._plain).append(seconds)

    def _affordable(self) -> int:
        if len(self._recorded) < 3 or len(self._plain) < 3:
            return _FIRST
        plain = median(self._plain)
        cost = max(median(self._recorded) - plain, 0.0)
        wanted = math.ceil(cost / (self._share * plain)) if plain > 0 else _FIRST
        return max(wanted, self.every // 2, 2)  # every other step at most: those between are the measure
