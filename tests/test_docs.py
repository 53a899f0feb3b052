"""What is public is documented, in docstrings that run, and the site that shows it builds without a warning."""

import doctest
import html
import inspect
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
from autodocments import meanings  # noqa: E402  (what the site shows)

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


def test_the_reference_shows_everything_with_the_comment_of_every_parameter(site):
    page = (site / "docs" / "reference.html").read_text(encoding="utf-8")
    comments = [(name, *comment) for name in PUBLIC | MEMBERS for comment in meanings(function(name)).items()]
    missing = [(name, of) for name, of, meaning in comments if meaning.replace("`", "") not in entry(page, name)]
    assert comments and not missing


def entry(page, name):
    "The words that the reference has for a name."
    found = re.search(rf'<dt [^>]*id="[\w.]*\b{re.escape(name)}".*?</dt>\n<dd>(.*?)(?=<dt class="sig|\Z)', page, re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", found[1])).split()) if found else ""


def test_pages_link_to_pages_of_the_site(site):
    "Relative links in the repository become links in the site; what the site needs, it has."
    pages = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *(f"nbs/{p.name}" for p in (ROOT / "nbs").glob("*.ipynb"))]
    assert not [(page, target) for page in pages for target in broken_links((site / page).with_suffix(".html"))]


def broken_links(page):
    "Links of a page that lead nowhere, or to what is no page of the site."
    for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith(("data:", "mailto:")):
            continue
        if not (page.parent / target).exists() or target.endswith((".md", ".ipynb")):
            yield target


def test_every_page_is_in_the_contents(site):
    contents = (site / "README.html").read_text(encoding="utf-8")
    pages = {p.relative_to(site).as_posix() for folder in ("docs", "nbs") for p in (site / folder).glob("*.html")}
    assert pages and all(f'href="{page}"' in contents for page in pages)
    assert "url=README.html" in (site / "index.html").read_text(encoding="utf-8")
