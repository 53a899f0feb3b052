"""What an error says of where it happened."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

_STOPPED = "LSUV stopped"


class CannotRun(RuntimeError):
    """LSUV can't do its work here, though training may do its own: its message is a reason, in one line."""


class _Short(reprlib.Repr):
    """Values as a message can show them: no tensor by its numbers, no module by all that is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_instance(self, x: object, level: int) -> str:
        if isinstance(x, (Tensor, np.ndarray)):
            return f"a {type(x).__name__} of shape {tuple(x.shape)}"
        if isinstance(x, nn.Module):
            return f"a {type(x).__name__}"
        return getattr(x, "__qualname__", None) or super().repr_instance(x, level)


def shown(value: object) -> str:
    """Return a value as a message shows it, in one short line."""
    return _Short().repr(value)


def is_of_model(error: BaseException) -> bool:
    """True if a module was at work when the error was raised."""
    return any(isinstance(arg, str) and _STOPPED in arg for arg in error.args)


def name_module_at_work(error: BaseException, names: Mapping[nn.Module, str]) -> None:
    """Add the innermost of the named modules in the error's traceback to its message, once."""
    if is_of_model(error):
        return
    at_work, step = None, error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            at_work = owner
        step = step.tb_next
    if at_work is None:
        return
    where = f"`{names[at_work]}` ({type(at_work).__name__})" if names[at_work] else f"the {type(at_work).__name__}"
    add_to_message(error, f"{_STOPPED} in {where}; the model is unchanged")


def add_to_message(error: BaseException, text: str) -> None:
    """Put a line behind the message of an error, whose type stays."""
    args = list(error.args) or [""]
    if not isinstance(args[0], str) and not isinstance(error, OSError):
        args = [str(error)]  # fastai shows the first argument only
    where = next((i for i, arg in enumerate(args) if isinstance(arg, str)), 0)  # OSError: a number, then the message
    args[where] = f"{args[where]}\n{text}".lstrip()
    error.args = tuple(args)
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror}\n{text}"
