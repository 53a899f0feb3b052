"""The public surface, to the letter: a change is a decision, never an accident. UPDATE_GOLDEN=1 writes it anew."""

import inspect
import os
from pathlib import Path

from fastai.learner import Learner

import fastai_lsuv
from fastai_lsuv import ActivationStatsRecorder, LSUVCallback, LSUVReport, lsuv_
from fastai_lsuv.recording.reading import Reading

GOLDEN = Path(__file__).parent / "golden" / "signatures.txt"


def surface():
    "One line a public name, with its parameters and defaults."
    for name in sorted(fastai_lsuv.__all__):
        yield f"{name}{signature(getattr(fastai_lsuv, name))}"
    for cls, where in ((LSUVReport, LSUVReport), (ActivationStatsRecorder, Reading)):
        for name in sorted(vars(where)):
            if not name.startswith("_"):
                yield f"{cls.__name__}.{name}{signature(inspect.getattr_static(where, name))}"
    yield f"Learner.lsuv_init{signature(Learner.lsuv_init)}"


def signature(o):
    "Names and defaults; annotations are mypy's business."
    if isinstance(o, property) or not callable(o):
        return ""
    sig = inspect.signature(o)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in sig.parameters.values()]
    return str(sig.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_golden_signatures():
    text = "\n".join(surface()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def options(f):
    return {
        n: p.default
        for n, p in inspect.signature(f).parameters.items()
        if n not in ("model", "batch", "self", "verbose")
    }


def test_the_design_s_options_everywhere():
    "`lsuv_`, the callback and `learn.lsuv_init` take the same options with the same defaults."
    wanted = dict(
        mean=0.0,
        std=1.0,
        per_channel=False,
        modules=None,
        exclude=None,
        init=None,
        tol=1e-3,
        max_iter=10,
        residual=False,
    )
    assert options(lsuv_) == options(LSUVCallback) == options(Learner.lsuv_init) == wanted
    assert inspect.signature(LSUVCallback).parameters["verbose"].default is True
    assert inspect.signature(LSUVCallback).parameters["batch"].default is None


def test_a_star_import_is_safe():
    space = {}
    exec("from fastai_lsuv import *", space)
    assert set(space) - {"__builtins__"} == set(fastai_lsuv.__all__) >= {"LSUVCallback", "LSUVReport", "lsuv_"}


def test_it_has_a_version_and_is_typed():
    assert isinstance(fastai_lsuv.__version__, str)
    assert (Path(fastai_lsuv.__file__).parent / "py.typed").exists()
