"""The README and the pages of the site: their code runs, what they link to is there, their tables name everything."""

import inspect
import re
from pathlib import Path

import pytest

from fastai_lsuv import ActivationStatsRecorder, lsuv_
from fastai_lsuv.core.reasons import Note, Skip
from fastai_lsuv.recording import verdicts
from fastai_lsuv.report import STATUSES, Row

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
WRITTEN = [name for name in PAGES if name != "reference"]  # by hand; the examples of the reference are docstrings'


def blocks(text):
    "What is in its fenced blocks of Python."
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def anchors(text):
    "Of its headings, as code hosts and MyST make them."
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    "Targets of links and images that are in the repository."
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]


def folder(name):
    return ROOT if name == "README" else ROOT / "docs"


@pytest.mark.parametrize("name", [name for name in WRITTEN if blocks(PAGES[name])])
def test_code_blocks_run_one_after_the_other(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for i, code in enumerate(blocks(PAGES[name])):
        exec(compile(code, f"{name} {i}", "exec"), namespace)
        report = namespace.get("report") or namespace["learn"].lsuv_report
        assert report.converged
        assert len(report) >= 2
        assert capsys.readouterr().out


def test_the_readme_is_one_page():
    assert len(PAGES["README"].split()) <= 900


def test_the_readme_s_first_block_is_a_learner_with_the_callback_in_eight_lines():
    first = blocks(PAGES["README"])[0]
    assert "cbs=LSUVCallback()" in first
    assert len([line for line in first.splitlines() if line.strip()]) <= 8


@pytest.mark.parametrize("name", PAGES)
def test_links_into_the_repository_lead_somewhere(name):
    for target in links(PAGES[name]):
        path, _, anchor = target.partition("#")
        file = folder(name) / path
        assert file.exists(), target
        if anchor:
            text = file.read_text(encoding="utf-8") if path else PAGES[name]
            assert anchor in anchors(text), target


@pytest.mark.parametrize("name", WRITTEN)
def test_formulas_are_ended(name):
    assert PAGES[name].count("$$") % 2 == 0


# --- tables -----------------------------------------------------------------------------------------------------------


def first_column(page):
    "The code in the first column of all tables of a page."
    rows = re.findall(r"^\| (.*?) \|", PAGES[page], flags=re.M)
    return {code.partition("=")[0] for row in rows for code in re.findall(r"`([^`]+)`", row)}


def test_every_option_has_its_row():
    options = set(inspect.signature(lsuv_).parameters) - {"model", "batch"}
    assert first_column("options") == options


def test_every_option_of_the_recorder_has_its_row():
    assert set(inspect.signature(ActivationStatsRecorder).parameters) - {"unknown"} <= first_column("recorder")


def test_every_verdict_has_its_row():
    told = set(re.findall(r"^ *\* `([\w ]+)`: ", verdicts.verdicts.__doc__, flags=re.M))
    assert told <= first_column("recorder")
    assert len(told) > 3


def row_of(verdict):
    "Its rule on the page, and in the docstring."
    page = re.search(rf"^\| `{verdict}` \|.*$", PAGES["recorder"], flags=re.M)
    docstring = re.search(rf"\* `{verdict}`:[^*]*", verdicts.verdicts.__doc__)
    return page[0], docstring[0]


@pytest.mark.parametrize(
    ("verdict", "threshold"),
    [
        ("exploding", f"{verdicts.EXPLODING:,.0f}"),
        ("dying", f"{verdicts.DYING:.0%}"),
        ("vanishing", f"{verdicts.VANISHING:g}"),
        ("too fast", f"{verdicts.LEARNING[1]:.0%}"),
        ("not learning", f"{verdicts.LEARNING[0]:.3%}"),
        ("saturated", f"{verdicts.SATURATED:.0%}"),
    ],
)
def test_the_rules_of_verdicts_name_their_thresholds(verdict, threshold):
    assert all(threshold in rule for rule in row_of(verdict)), row_of(verdict)


def test_the_page_names_the_band_of_the_figure():
    low, high = verdicts.WORKS
    assert f"between {low:g} and {high:g}, the green band" in re.sub("([1-9])e-0", r"\1e-", PAGES["recorder"])


def test_every_status_reason_and_column_of_a_report_is_explained():
    columns = list(Row.__dataclass_fields__)
    phrases = [*STATUSES, *columns, *(phrase.value for phrase in (*Skip, *Note))]
    assert [phrase for phrase in phrases if f"`{phrase}" not in PAGES["report"]] == []
