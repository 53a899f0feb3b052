"""The README's code runs, its commands are the ones that CI runs, and what it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^##+ (.+)$", README, flags=re.M)
ANCHORS = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in HEADINGS}
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_blocks_run(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    report = namespace.get("report") or namespace["learn"].lsuv_report
    assert report.converged and len(report) >= 2
    if "recorder" in namespace:
        assert len(namespace["frame"]) == 33 * 22
    assert capsys.readouterr().out


def test_there_is_a_block_for_the_learner_one_for_plain_pytorch_and_one_for_the_recorder():
    assert len(BLOCKS) == 3 and "LSUVCallback()" in BLOCKS[0] and "lsuv_(" in BLOCKS[1] and "Recorder(" in BLOCKS[2]


def test_the_first_block_is_eight_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 8


@pytest.mark.parametrize("target", [t for t in re.findall(r"\]\(([^)]+)\)", README) if "://" not in t])
def test_links_into_the_repository_lead_somewhere(target):
    path, _, anchor = target.partition("#")
    assert (ROOT / path).exists()
    assert not anchor or anchor in ANCHORS
