"""A chart in a notebook that is drawn anew while training goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

SHARE = 0.01  # of the training time, at most
_FIRST = 0.3  # seconds that the first drawing is expected to take


class LiveChart:
    """Shows a figure in the cell that trains, and replaces it as often as `SHARE` allows; nothing in a terminal."""

    def __init__(self, draw: Callable[[], Figure]) -> None:
        self._draw = draw
        self._handle: Any = None  # of IPython's display
        self._due = time.perf_counter() + _FIRST / SHARE

    def refresh(self, at_end: bool = False) -> None:
        """Draw it if it is time, or at the end in any case."""
        begun = time.perf_counter()
        if not in_notebook() or (begun < self._due and not at_end):
            return
        ipython = sys.modules["IPython"].display
        image = ipython.Image(_png(self._draw()))
        if self._handle is None:
            self._handle = ipython.display(image, display_id=True)
        else:
            self._handle.update(image)
        now = time.perf_counter()
        self._due = now + (now - begun) / SHARE


def in_notebook() -> bool:
    """True if a Jupyter kernel runs this, and not a terminal or a script."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def _png(figure: Figure) -> bytes:
    """The figure as an image; closed, so that the notebook doesn't show it a second time."""
    plt.close(figure)
    return figure.as_png()  # type: ignore[attr-defined]
