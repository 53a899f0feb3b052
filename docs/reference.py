"""Writes `docs/reference.md`, from the docstrings and the comment behind each parameter: `python docs/reference.py`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference.md"
sys.path.insert(0, str(ROOT))  # this package, whatever is installed

import fastai.learner  # noqa: E402
from fastcore.docments import docments  # noqa: E402

import fastai_lsuv  # noqa: E402
from fastai_lsuv import demo, init, report  # noqa: E402
from fastai_lsuv.recording.reading import Reading  # noqa: E402
from fastai_lsuv.recording.verdicts import verdicts  # noqa: E402

# Heading: what is under it, by the name under which users know it; a class with the class that has its methods.
CONTENTS: dict[str, dict[str, Any]] = {
    "Initialise": {
        "lsuv_": fastai_lsuv.lsuv_,
        "LSUVCallback": fastai_lsuv.LSUVCallback,
        "Learner.lsuv_init": fastai.learner.Learner.lsuv_init,
    },
    "What was done": {"LSUVReport": fastai_lsuv.LSUVReport, "Row": report.Row},
    "Activations during training": {
        "ActivationStatsRecorder": fastai_lsuv.ActivationStatsRecorder,
        "verdicts": verdicts,
    },
    "Very deep plain networks": {name: getattr(init, name) for name in init.__all__},
    "The demo's parts": {"digits_dls": demo.digits_dls, "fashion_dls": demo.fashion_dls, "plain_cnn": demo.plain_cnn},
}
METHODS_OF = {"LSUVReport": fastai_lsuv.LSUVReport, "ActivationStatsRecorder": Reading}
CHOICE = """## `Choice`

Which modules are meant, in `modules` and `exclude`: a type or a tuple of types; a name, or a list of names, with
wildcards (`"encoder.*"`); a module of the model, or a list of them; a function from the model to modules
(`nn.Module.children`); or `None`, for which each function has its own meaning.
"""


def meanings(obj: Any) -> dict[str, str]:
    """Return the comments behind the parameters of a function or class, delegated ones included, and `return`."""
    known = inspect.signature(obj).parameters
    target = getattr(obj.__init__ if inspect.isclass(obj) else obj, "__delwrap__", None)
    delegated = meanings(target) if target else {}
    own = {name: " ".join(text.split()) for name, text in docments(obj, returns=True).items() if text}
    return {name: text for name, text in delegated.items() if name in known} | {
        name: text for name, text in own.items() if name in known or name == "return"
    }


def entry(name: str, obj: Any, level: int = 3) -> Iterator[str]:
    """Yield the paragraphs on a public name."""
    function = obj.fget if isinstance(obj, property) else obj
    file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").relative_to(ROOT).as_posix()
    text, *sections = re.split(r"^(Raises|Examples?):\n", inspect.cleandoc(function.__doc__), flags=re.M)
    yield f"{'#' * level} `{name}`"
    yield f"```python\n{signature(name, obj)}\n```"
    yield text.strip()
    yield from parameters(function)
    yield from (part for pair in zip(sections[::2], sections[1::2], strict=True) for part in section(*pair))
    yield f"[Source](../{file})"


def signature(name: str, obj: Any) -> str:
    """Return how a name is called, on as many lines as it takes."""
    if isinstance(obj, property):
        return name
    parts = [re.sub(r"<\w+ '?[\w.]*?(\w+)'?( at 0x\w+)?>", r"\1", str(p)) for p in bare(obj)]  # a class by its name
    star = next((i for i, p in enumerate(bare(obj)) if p.kind is p.KEYWORD_ONLY), None)
    if star is not None:
        parts.insert(star, "*")
    line = f"{name}({', '.join(parts)})"
    return line if len(line) <= 80 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + ")"


def bare(obj: Any) -> list[inspect.Parameter]:
    """Return the parameters without their types."""
    found = inspect.signature(obj).parameters.values()
    return [p.replace(annotation=inspect.Parameter.empty) for p in found if p.name != "self"]


def parameters(function: Any) -> Iterator[str]:
    """Yield what parameters and result mean."""
    texts, found = meanings(function), inspect.signature(function)
    given = [p for p in found.parameters.values() if p.name != "self"]
    if given:
        yield "\n".join(f"* `{p.name}` ({typed(p.annotation)}): {texts.get(p.name, '')}" for p in given)
    if not inspect.isclass(function):
        yield f"**Returns** {typed(found.return_annotation)}: {texts.get('return', '')}"


def typed(annotation: str) -> str:
    """Return a type, with a link where it is ours."""
    return f"[`{annotation}`](#choice)" if annotation == "Choice" else f"`{annotation}`"


def section(title: str, text: str) -> Iterator[str]:
    """Yield a docstring's section."""
    text = inspect.cleandoc(text)
    if title == "Raises":
        errors = re.split(r"^(\w+): ", text, flags=re.M)[1:]
        pairs = zip(errors[::2], errors[1::2], strict=True)
        yield "**Raises**\n" + "".join(f"\n* `{error}`: {' '.join(why.split())}" for error, why in pairs)
    else:
        code = re.sub(r" *# doctest:.*", "", text)
        yield f"```python\n{code}\n```"


def page() -> str:
    """Return all of it."""
    parts = ["# Reference", "Written by `python docs/reference.py` from the docstrings."]
    for heading, names in CONTENTS.items():
        parts.append(f"## {heading}")
        for name, obj in names.items():
            parts += entry(name, obj)
            members = vars(METHODS_OF[name]).items() if name in METHODS_OF else ()
            for member, method in members:
                if not member.startswith("_"):
                    parts += entry(f"{name}.{member}", method, level=4)
    return "\n\n".join([*parts, CHOICE])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
