"""The notebooks as committed: executed, of this package alone, small, linked to what is there. (nbmake runs them.)"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
each = pytest.mark.parametrize("nb", NBS, ids=lambda p: p.stem)


def cells(nb, kind):
    return [c for c in json.loads(nb.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def text(cell):
    return "".join(cell["source"])


@each
def test_every_cell_was_run_from_top_to_bottom_without_an_error(nb):
    code = cells(nb, "code")
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]


@each
def test_there_is_a_figure(nb):
    assert any("image/png" in o.get("data", {}) for c in cells(nb, "code") for o in c["outputs"])


@each
def test_nothing_tells_of_the_machine_it_was_run_on(nb):
    assert not re.findall(r"site-packages|/tmp/|/root/|/home/|/usr/|C:\\\\", nb.read_text(encoding="utf-8"))


@each
def test_links_lead_somewhere(nb):
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(map(text, cells(nb, "markdown")))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = nb.parent / path if path else nb
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(file):
    "Of its headings: in a notebook as Jupyter makes them, in Markdown as GitHub does."
    jupyter = file.suffix == ".ipynb"
    lines = "\n".join(map(text, cells(file, "markdown"))) if jupyter else file.read_text(encoding="utf-8")
    titles = [line.lstrip("# ") for line in lines.splitlines() if line.startswith("#")]
    return {t.replace(" ", "-") if jupyter else re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def test_all_together_are_small():
    files = [p for p in (ROOT / "nbs").iterdir() if p.suffix in (".ipynb", ".png")]
    assert len(files) > 4 and sum(p.stat().st_size for p in files) < 6_000_000
