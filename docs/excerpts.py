"""Search results with excerpts also where the site is opened as files, which a browser's script may not fetch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

FILE = "_static/excerpts.js"
SCRIPT = """
if (location.protocol === "file:") {
  const root = new URL("./", location.href).href;
  window.fetch = async (url) => ({
    text: async () => pages[new URL(url, location.href).href.replace(root, "").replace(/[?#].*/, "")] ?? "",
  });
}
"""


def on_search_page(app: Sphinx, page: str, *_: Any) -> None:
    """Only there is it needed."""
    if page == "search":
        app.add_js_file(Path(FILE).name)


def write(app: Sphinx, error: Exception | None) -> None:
    """Write what all pages say, with their sections, which the search looks for."""
    if error is None and app.builder.name == "html":
        files = {f"{page}.html": Path(app.outdir, f"{page}.html") for page in sorted(app.env.found_docs)}
        found = {url: text_of(file.read_text(encoding="utf-8")) for url, file in files.items()}
        Path(app.outdir, FILE).write_text(f"const pages = {json.dumps(found)};\n{SCRIPT}", encoding="utf-8")


def text_of(page: str) -> str:
    """Return the main part of a page, without marks other than those of its sections."""
    main = page.partition("<article")[2].partition(">")[2].partition("</article>")[0]
    return "<div role='main'>" + re.sub(r"<(?!/?section\b)[^>]*>", " ", main) + "</div>"


def setup(app: Sphinx) -> dict[str, bool]:
    """When the site is written."""
    app.connect("html-page-context", on_search_page)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
