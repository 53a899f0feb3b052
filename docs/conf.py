"""How the site is built: `python -m sphinx -W -c docs . build/site`, from the repository's root."""

import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # this package, whatever is installed; and the extensions

import fastai_lsuv  # noqa: E402

project = "fastai_lsuv"
author = copyright = "fastai_lsuv contributors"
version = release = fastai_lsuv.__version__

# Pages stay where they are, so that their links to one another hold in the repository and in the site alike.
root_doc = "docs/index"
include_patterns = ["CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "nbs/*.md", "nbs/*.ipynb", "fastai_lsuv/**.py"]
extensions = ["myst_nb", "sphinx_copybutton", "formulas", "sources", "excerpts"]

nb_merge_streams = True
nb_execution_mode = "off"  # the notebooks are committed as they ran; the tests run them again
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["myst.header"]

smartquotes_action = "D"  # dashes only: quotes may be code
html_math_renderer = "drawn"

html_theme = "furo"  # light and dark, no font or script from elsewhere
html_title = f"fastai_lsuv {version}"
templates_path = ["_templates"]
html_additional_pages = {"index": "start.html"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["../llms.txt"]  # which leads to the pages as Markdown, beside those as HTML
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def setup(app: Sphinx) -> None:
    """Fit the sources, as they are read, for the site."""

    def fit(_: Sphinx, page: str, source: list[str]) -> None:
        if page.startswith("nbs/"):  # Jupyter's anchors are written with capitals, MyST's and GitHub's without
            source[0] = re.sub(r"\]\((\w+\.ipynb)?#[\w-]+\)", lambda link: link[0].lower(), source[0])
        else:  # a number and its interval stay on one line
            source[0] = source[0].replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")

    def copy_markdown(_: Sphinx, error: Exception | None) -> None:
        for page in [] if error else app.env.found_docs:
            source = app.env.doc2path(page)
            if source.suffix in (".md", ".ipynb"):
                shutil.copy(source, Path(app.outdir, page).with_suffix(source.suffix))

    app.connect("source-read", fit)
    app.connect("build-finished", copy_markdown)
