"""DESIGN section 8: imports run downwards only, and the algorithm knows nothing of fastai."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastai_lsuv

PACKAGE = Path(fastai_lsuv.__file__).parent
ORDER = [
    "core.errors",
    "core.bulk",
    "core.signal",
    "core.statistics",
    "core.random_state",
    "core.reasons",
    "core.modules",
    "core.selection",
    "core.target",
    "core.options",
    "core.affine",
    "core.copies",
    "core.mode",
    "core.dry_run",
    "core.checks",
    "core.signature",
    "core.tracing",
    "core.linearity",
    "core.products",
    "init",
    "core.probe",
    "core.gradient",
    "core.activation",
    "core.verdict",
    "core.layers",
    "core.priors",
    "core.watch",
    "core.use",
    "core.branches",
    "core.discovery",
    "core.exact",
    "core.iterated",
    "core.blocks",
    "core.shared",
    "core.correction",
    "plots.palette",
    "plots.style",
    "plots.names",
    "plots.panels",
    "plots.layers",
    "plots.curves",
    "plots.maps",
    "summary",
    "report",
    "core.evidence",
    "core.rows",
    "core.attempt",
    "core.automatic",
    "core.lsuv",
    "learner.loop",
    "learner.loads",
    "learner.guards",
    "learner.distributed",
    "learner.loaders",
    "learner.settings",
    "learner.pilot",
    "learner.first_batch",
    "learner.progress",
    "callback",
    "recording.sampling",
    "recording.layout",
    "recording.samples",
    "recording.description",
    "recording.layers",
    "recording.updates",
    "recording.units",
    "recording.graph",
    "recording.capture",
    "recording.device_buffer",
    "recording.budget",
    "recording.session",
    "recording.verdicts",
    "recording.arguments",
    "recording.history",
    "recording.live",
    "recording.reading",
    "recording.logs",
    "recorder",
    "data",
    "demo",
]
FILES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p
    for p in sorted(PACKAGE.rglob("*.py"))
    if not p.stem.startswith("__")
}
IN_CORE = [name for name in FILES if name.startswith("core.")]
IN_PLOTS = [name for name in FILES if name.startswith("plots.")]


def imports(name):
    "Names of the modules that a module imports, wherever in its text; not those for the type checker only."
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def ours(name):
    "The modules of the package that a module imports."
    return {n.removeprefix("fastai_lsuv.") for n in imports(name)} & set(FILES)


def test_every_module_has_its_place():
    assert set(FILES) == set(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name):
    assert not ours(name) & set(ORDER[ORDER.index(name) :])


@pytest.mark.parametrize("name", IN_CORE)
def test_the_algorithm_imports_no_fastai(name):
    assert not {n for n in imports(name) if n.split(".")[0] in ("fastai", "fastcore")}


@pytest.mark.parametrize("name", IN_PLOTS)
def test_figures_know_of_frames_only(name):
    assert ours(name) <= {"plots.palette", "plots.style", "plots.names", "plots.panels"}


def test_importing_says_nothing_and_leaves_the_plotting_backend_alone():
    code = (
        'import warnings; warnings.simplefilter("error", UserWarning); import fastai.vision.all, matplotlib; '
        "import torch, random; before = random.getstate(), torch.get_rng_state().tolist(), matplotlib.get_backend(); "
        "import fastai_lsuv; "
        "assert before == (random.getstate(), torch.get_rng_state().tolist(), matplotlib.get_backend())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "fastai_lsuv" not in done.stderr


def test_nothing_but_fastai_and_torch_is_needed():
    extras = ("accelerate", "wandb", "tensorboard", "timm", "transformers", "pytest", "hypothesis", "accelerate.utils")
    packages = "fastai_lsuv, fastai_lsuv.demo, fastai_lsuv.init"
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); import {packages}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
