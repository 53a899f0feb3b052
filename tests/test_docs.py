"""What is public is documented, in docstrings that run, and the site that shows it builds without a warning."""

import doctest
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fastai.learner
import pytest

import fastai_lsuv
from fastai_lsuv import demo, init
from fastai_lsuv.recording.reading import Reading

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from reference import CONTENTS, PAGE, meanings, page  # noqa: E402  (what the site shows)

PUBLIC = (
    {name: getattr(fastai_lsuv, name) for name in fastai_lsuv.__all__}
    | {name: getattr(init, name) for name in init.__all__}
    | {
        "Learner.lsuv_init": fastai.learner.Learner.lsuv_init,
        "digits_dls": demo.digits_dls,
        "plain_cnn": demo.plain_cnn,
    }
)
MEMBERS = {
    f"{cls}.{name}": member
    for cls, where in (("LSUVReport", fastai_lsuv.LSUVReport), ("ActivationStatsRecorder", Reading))
    for name, member in vars(where).items()
    if not name.startswith("_")
}
A_SOURCE = re.compile(r"arXiv:\d{4}\.\d{5}|fastai `?[A-Z]\w+|fastai's `\w+`|torch\.nn\.init|sklearn\.\w+")
every = pytest.mark.parametrize("name", PUBLIC)
every_one_and_member = pytest.mark.parametrize("name", PUBLIC | MEMBERS)


def function(name):
    o = (PUBLIC | MEMBERS)[name]
    return o.fget if isinstance(o, property) else o


def parameters(name):
    return inspect.signature(function(name)).parameters.keys() - {"self"}


def examples(name):
    return doctest.DocTestParser().get_examples(PUBLIC[name].__doc__)


@every_one_and_member
def test_every_parameter_and_result_has_its_comment(name):
    wanted = parameters(name) if inspect.isclass(function(name)) else parameters(name) | {"return"}
    assert wanted == {n for n in meanings(function(name)) if n in wanted}


@every_one_and_member
def test_everything_says_what_it_means(name):
    meaning = inspect.cleandoc(function(name).__doc__).split("\n\n")[0].replace("\n", " ")
    assert 20 < len(meaning) and re.search(r"[.…]( |$)", meaning)


@every
def test_everything_names_its_source(name):
    assert A_SOURCE.search(PUBLIC[name].__doc__)


@every
def test_every_example_runs(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    case = doctest.DocTest(examples(name), {}, name, None, None, PUBLIC[name].__doc__)
    result = doctest.DocTestRunner().run(case)
    assert result.attempted >= 3 and not result.failed, capsys.readouterr().out


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_in_its_class_s_example(name):
    cls, member = name.split(".")
    assert re.search(rf"\.{member}\b", "".join(e.source for e in examples(cls)))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    "The site, built strictly and from scratch: the finished process."
    path = tmp_path_factory.mktemp("build") / "site"
    command = [sys.executable, "-W", "ignore", "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", path]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def site(build):
    return build.args[-1]


def test_the_site_builds_without_a_warning(build):
    assert (build.returncode, build.stdout, build.stderr) == (0, "", "")


def test_the_reference_is_written_from_the_docstrings_of_today():
    assert PAGE.read_text(encoding="utf-8") == page(), "python docs/reference.py writes it anew"


def test_the_reference_has_everything_public_with_the_comment_of_every_parameter():
    text = page()
    comments = [(name, *comment) for name in PUBLIC | MEMBERS for comment in meanings(function(name)).items()]
    assert PUBLIC.keys() - {name for names in CONTENTS.values() for name in names} == set()
    assert [(name, of) for name, of, meaning in comments if meaning not in entry(text, name)] == []


def entry(text, name):
    "What the reference has on a name."
    found = re.search(rf"^#+ `{re.escape(name)}`$(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    return found[1] if found else ""


def pages(site):
    "The pages that are read, by their path in the site; not those of the source."
    folders = [ROOT / "docs", ROOT / "nbs"]
    files = [path for folder in folders for path in folder.iterdir() if path.suffix in (".md", ".ipynb")]
    return {p.relative_to(ROOT).with_suffix(".html").as_posix(): site / p.relative_to(ROOT).with_suffix(".html")
            for p in [*files, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]}  # fmt: skip


def test_pages_link_to_pages_of_the_site(site):
    "Relative links in the repository become links in the site; what the site needs, it has."
    assert not [(name, target) for name, path in pages(site).items() for target in broken_links(path)]


def broken_links(page):
    "Links of a page that lead nowhere, or to what is no page of the site."
    for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith(("data:", "mailto:")):
            continue
        if not (page.parent / target).exists() or target.endswith((".md", ".ipynb", ".py")):
            yield target


def test_every_page_is_in_the_contents_and_the_site_begins_with_a_page_of_its_own(site):
    contents = (site / "docs" / "options.html").read_text(encoding="utf-8")
    for name in pages(site).keys() - {"docs/options.html", "docs/index.html"}:
        assert f'href="{os.path.relpath(name, "docs")}"' in contents, name
    assert "url=docs/index.html" in (site / "index.html").read_text(encoding="utf-8")


def test_formulas_are_formulas_without_a_script(site):
    for name, path in pages(site).items():
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.S)
        assert "$$" not in text, name
    text = (site / "nbs" / "02_how_lsuv_works.html").read_text(encoding="utf-8")
    assert text.count('<div class="formula"><svg') >= 2
    assert 'aria-label="\\sqrt n"' in text


def test_nothing_comes_from_the_network(site):
    for name, path in pages(site).items():
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)', path.read_text(encoding="utf-8")
        )
        assert not loaded, name


def test_search_has_excerpts_of_every_page_and_not_of_the_source(site):
    script = (site / "_static" / "excerpts.js").read_text(encoding="utf-8")
    texts = json.loads(script.removeprefix("const pages = ").partition(";\n")[0])
    assert "Once per model" in texts["docs/when_it_runs.html"]
    assert pages(site).keys() <= texts.keys()
    assert "excerpts.js" in (site / "search.html").read_text(encoding="utf-8")
    assert "excerpts.js" not in (site / "docs" / "options.html").read_text(encoding="utf-8")
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert "exploding" in index
    assert "_bound_branches" not in index


def test_llms_txt_leads_to_pages_that_are_there(site):
    "In its form (llmstxt.org): a title, a summary, and lists of links; on the site and in the repository."
    text = (site / "llms.txt").read_text(encoding="utf-8")
    title, blank, summary, *_ = text.splitlines()
    assert title.startswith("# ")
    assert not blank
    assert summary.startswith("> ")
    targets = re.findall(r"^- \[[^]]+\]\(([^)]+)\): ", text, re.M)
    assert len(targets) > 10
    assert [t for t in targets if not (site / t).exists() or not (ROOT / t).exists()] == []


def test_the_source_is_there_to_read(site):
    text = (site / "fastai_lsuv" / "core" / "lsuv.html").read_text(encoding="utf-8")
    assert "linenos" in text
    assert 'href="../fastai_lsuv/core/lsuv.html"' in (site / "docs" / "reference.html").read_text(encoding="utf-8")
