"""What `lsuv_` can be asked for, checked before anything is touched."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, TypeVar

from fastai_lsuv.core.errors import shown
from fastai_lsuv.core.selection import Choice
from fastai_lsuv.core.target import Target

AUTO: Literal["auto"] = "auto"  # an `init`: chosen from what is measured

P = ParamSpec("P")
T = TypeVar("T")


def with_options(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function whose options are keyword-only say what is wrong with those that it can't take."""

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
        parameters = inspect.signature(checked).parameters  # with those that `delegates` has added
        known = [key for key in parameters if key != "self"]
        options = [key for key in known if parameters[key].kind is inspect.Parameter.KEYWORD_ONLY]
        for key in kwargs.keys() - parameters.keys():
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise TypeError(f"{name}() got an unexpected option {key!r}; the nearest is {near!r}")
        if len(args) > len(parameters) - len(options):
            raise TypeError(f"{name}() takes its options by name: {'=…, '.join(options[:3])}=…")
        return function(*args, **kwargs)

    return checked


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
            raise ValueError("residual=True with std=None: it limits the std of the branches, so that it needs one")

    def _check_types(self) -> None:
        for name in ("mean", "std", "tol", "max_iter"):
            value: Any = getattr(self, name)
            kind: Any = Integral if name == "max_iter" else Real  # NumPy's numbers are such numbers, too
            optional = name in ("mean", "std") and value is None
            if not optional and (not isinstance(value, kind) or isinstance(value, bool)):
                raise TypeError(f"{name}={shown(value)}: expected a {'whole number' if kind is Integral else 'number'}")
        for name in ("per_channel", "residual"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={shown(getattr(self, name))}: expected True or False")
        init: Any = self.init
        if not (init is None or init == AUTO or callable(init)):
            expected = "an in-place initialiser such as nn.init.orthogonal_, or 'auto'"
            raise TypeError(f"init={shown(init)}: expected {expected}")

    @property
    def target(self) -> Target:
        """What is wanted of a layer that can be scaled and shifted."""
        return Target(self.mean, self.std)

    @property
    def only_measures(self) -> bool:
        """Whether nothing is to be changed."""
        return self.mean is None and self.std is None
