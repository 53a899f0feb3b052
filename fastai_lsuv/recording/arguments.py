"""What `ActivationStatsRecorder` can be asked for, checked before any fit."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastai_lsuv.recording.verdicts import REMEDIES

_NAME = "ActivationStatsRecorder"


def check(modules: Any, every: Any, near_zero: Any, max_records: Any, stop_on: Any) -> None:
    """Refuse options of a wrong type or out of their range.

    Raises:
        TypeError, ValueError: with what was given, and what was expected.
    """
    if isinstance(modules, (bool, int, float)):
        raise TypeError(f"{_NAME}({modules!r}): the first option is `modules`, which layers to record; name all others")
    for name, value in (("every", 1 if every == "auto" else every), ("max_records", max_records)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected a whole number")
        if value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    if not isinstance(near_zero, (int, float)) or isinstance(near_zero, bool):
        raise TypeError(f"near_zero={near_zero!r}: expected a number")
    if not near_zero >= 0:
        raise ValueError(f"near_zero={near_zero!r}: expected a number of at least 0")
    _check_stop_on(stop_on)


def _check_stop_on(stop_on: Any) -> None:
    if callable(stop_on):
        return
    names = [stop_on] if isinstance(stop_on, str) else stop_on
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"stop_on={stop_on!r}: expected a verdict, several, or a function of `summary()`")
    for name in names:
        if name not in REMEDIES:
            raise ValueError(f"stop_on={stop_on!r}: {name!r} is no verdict; there are {', '.join(map(repr, REMEDIES))}")
