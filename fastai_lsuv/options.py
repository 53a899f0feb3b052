"""What `lsuv_` can be asked for, checked before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from fastai_lsuv.modules import Choice


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `lsuv_`."""

    mean: float | None = 0.0
    std: float | None = 1.0
    per_channel: bool = False
    modules: Choice = None
    exclude: Choice = None
    init: Callable[[Tensor], Any] | None = None
    tol: float = 1e-3
    max_iter: int = 10

    def __post_init__(self) -> None:
        for name in ("mean", "std", "tol", "max_iter"):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (value is None and name in ("mean", "std")):
                raise TypeError(f"{name}={value!r}: expected a number")
        if self.mean is not None and not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean!r}: expected a finite number, or None to leave means alone")
        if self.std is not None and not 0 < self.std < math.inf:
            raise ValueError(f"std={self.std!r}: expected a positive finite number, or None to leave stds alone")
        if not 0 < self.tol < math.inf:
            raise ValueError(f"tol={self.tol!r}: expected a positive finite number")
        if self.max_iter < 1 or self.max_iter != int(self.max_iter):
            raise ValueError(f"max_iter={self.max_iter!r}: expected a whole number of at least 1")
        if self.init is not None and not callable(self.init):
            raise TypeError(f"init={self.init!r}: expected an in-place initialiser such as nn.init.orthogonal_")

    @property
    def only_measures(self) -> bool:
        """Whether nothing is to be changed."""
        return self.mean is None and self.std is None
