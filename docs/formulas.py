"""Formulas as drawings, set by matplotlib when the site is built: no script, no font and no network is needed."""

from __future__ import annotations

import html
import re

from docutils import nodes
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

EM = 100  # units of the drawing
SIZE = 115  # of the letters, to look as large as the text around them
FONT = FontProperties(math_fontfamily="stix")
COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}


def drawn(tex: str) -> str:
    """Return a formula in the colour of the text, on its line; who hears the page is told the TeX."""
    braced = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", " ".join(tex.split()))  # matplotlib wants the braces
    path = TextPath((0, 0), f"${braced}$", size=SIZE, prop=FONT)
    box = path.get_extents()
    steps = [COMMANDS[code] + " ".join(f"{x:.0f}" for x in xy) for xy, code in path.iter_segments() if code in COMMANDS]
    commands = "".join("Z" if step.startswith("Z") else step for step in steps)
    place = f"height:{box.height / EM:.2f}em;vertical-align:{box.y0 / EM:.2f}em"
    view = f"{box.x0:.0f} {-box.y1:.0f} {box.width:.0f} {box.height:.0f}"
    return (
        f'<svg class="formula" role="img" aria-label="{html.escape(tex)}" style="{place}" viewBox="{view}">'
        f'<path fill="currentColor" transform="scale(1 -1)" d="{commands}"/></svg>'
    )


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula in a line."""
    translator.body.append(drawn(node.astext()))
    raise nodes.SkipNode


def block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on a line of its own."""
    translator.body.append(f'<div class="formula">{drawn(node.astext())}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Take the place of MathJax."""
    app.add_html_math_renderer("drawn", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
