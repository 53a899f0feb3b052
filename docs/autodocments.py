"""Autodoc shows what fastcore's docments say: the comment behind each parameter, delegated ones too."""

from __future__ import annotations

import inspect
import re
from typing import Any

from fastcore.docments import docments
from sphinx.application import Sphinx


def meanings(obj: Any) -> dict[str, str]:
    """The comments behind the parameters of a function or class, delegated ones included, and `return`."""
    known = inspect.signature(obj).parameters
    target = getattr(obj.__init__ if inspect.isclass(obj) else obj, "__delwrap__", None)
    delegated = meanings(target) if target else {}
    own = {name: " ".join(text.split()) for name, text in docments(obj, returns=True).items() if text}
    return {name: text for name, text in delegated.items() if name in known} | {
        name: text for name, text in own.items() if name in known or name == "return"
    }


def sections(what: str, obj: Any) -> list[str]:
    """The docstring sections `Args` and `Returns`, with the types as they are written."""
    function = obj.fget if isinstance(obj, property) else obj
    signature, texts = inspect.signature(function), meanings(function)
    args = [f"    {n} ({p.annotation}): {texts.get(n, '')}" for n, p in signature.parameters.items() if n != "self"]
    returns = [] if what == "class" else [f"    {signature.return_annotation}: {texts.get('return', '')}"]
    return [
        line for title, lines in (("Args:", args), ("Returns:", returns)) if lines for line in ("", title, *lines, "")
    ]


def add_docments(_: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put these sections before those that the docstring has, and bars as in |x| where reStructuredText takes them."""
    if what in ("class", "function", "method", "property"):
        first = next((i for i, line in enumerate(lines) if re.fullmatch(r"(Raises|Examples?):", line)), len(lines))
        lines[first:first] = sections(what, obj)
    lines[:] = [re.sub(r"(`[^`]*`)|\|(?! )", lambda m: m[1] or r"\|", line) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", add_docments, priority=400)
    return {"parallel_read_safe": True}
