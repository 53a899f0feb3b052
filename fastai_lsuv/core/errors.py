"""What an error says of where it happened."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_STOPPED = "LSUV stopped"


class CannotRun(RuntimeError):
    """LSUV can't do its work here, though training may do its own: its message is a reason, in one line."""


def name_module_at_work(error: BaseException, names: Mapping[nn.Module, str]) -> None:
    """Add the innermost of the named modules in the error's traceback to its message, once."""
    if any(isinstance(arg, str) and _STOPPED in arg for arg in error.args):
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
    add_to_message(error, f"{_STOPPED} in {where}; the model is as it was")


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
