"""Python files as pages, so that a link to one holds in the repository and in the site alike."""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.parsers import Parser

ROOT = Path(__file__).resolve().parent.parent


class PythonFile(Parser):
    """The file as it is, out of the contents and the search."""

    supported = ("python-file",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Make a title and a block of code of it."""
        name = Path(document["source"]).relative_to(ROOT).as_posix()
        flags = [nodes.field("", nodes.field_name("", flag), nodes.field_body()) for flag in ("orphan", "nosearch")]
        code = nodes.literal_block(inputstring, inputstring, language="python", linenos=True)
        document += nodes.docinfo("", *flags)
        document += nodes.section("", nodes.title("", name), code, ids=["source"], names=["source"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Read `.py` files, too."""
    app.add_source_suffix(".py", "python-file")
    app.add_source_parser(PythonFile)
    return {"parallel_read_safe": True}
