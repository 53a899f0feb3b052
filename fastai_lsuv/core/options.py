"""What `lsuv_` can be asked for, checked before anything is touched."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

from fastai_lsuv.core.selection import Choice
from fastai_lsuv.core.target import Target

AUTO: Literal["auto"] = "auto"  # an `init`: chosen from what is measured


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `lsuv_`."""

    mean: float | None = 0.0
    std: float | None = 1.0
    per_channel: bool = False
    modules: Choice = None
    exclude: Choice = None
    init: Callable[..., Any] | Literal["auto"] | None = None
    tol: float = 1e-3
    max_iter: int = 10
    residual: bool = False

    @classmethod
    def of(cls, name: str, kwargs: Mapping[str, Any]) -> Options:
        """Options from keyword arguments of the function `name`, which an error quotes."""
        known = [field.name for field in fields(cls)]
        for key in kwargs:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise TypeError(f"{name}() got an unexpected option {key!r}; the nearest is {near!r}")
        return cls(**kwargs)

    def __post_init__(self) -> None:
        self._check_types()
        if self.mean is not None and not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean!r}: expected a finite number, or None to leave means alone")
        if self.std is not None and not 0 < self.std < math.inf:
            raise ValueError(f"std={self.std!r}: expected a positive finite number, or None to leave stds alone")
        if not 0 < self.tol < math.inf:
            raise ValueError(f"tol={self.tol!r}: expected a positive finite number")
        if self.max_iter < 1:
            raise ValueError(f"max_iter={self.max_iter!r}: expected a whole number of at least 1")
        if self.residual and self.std is None and self.mean is not None:
            raise ValueError("residual=True with std=None: it is by their std that branches are bounded")

    def _check_types(self) -> None:
        for name in ("mean", "std", "tol", "max_iter"):
            value: Any = getattr(self, name)
            kind: Any = Integral if name == "max_iter" else Real  # NumPy's numbers are such numbers, too
            optional = name in ("mean", "std") and value is None
            if not optional and (not isinstance(value, kind) or isinstance(value, bool)):
                raise TypeError(f"{name}={value!r}: expected a {'whole number' if kind is Integral else 'number'}")
        for name in ("per_channel", "residual"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected True or False")
        init: Any = self.init
        if not (init is None or init == AUTO or callable(init)):
            expected = "an in-place initialiser such as nn.init.orthogonal_, or 'auto'"
            raise TypeError(f"init={init!r}: expected {expected}")

    @property
    def target(self) -> Target:
        """What is wanted of a layer that can be scaled and shifted."""
        return Target(self.mean, self.std)

    @property
    def only_measures(self) -> bool:
        """Whether nothing is to be changed."""
        return self.mean is None and self.std is None
