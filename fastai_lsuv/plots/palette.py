"""One colour for one thing, in all figures: of the package, its demo, the notebooks and the study.

A hue stands for a way to initialise a network; colour-blind eyes tell the hues apart (Okabe and Ito's palette, and a
purple of Paul Tol's). A place in an order, such as a layer's depth, is a colour from dark to light.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

__all__ = ["GREY", "INK", "LOOKS", "PALE", "Look", "by_order"]

INK, GREY, PALE = "#333333", "#8C8C8C", "#E4E4E4"
ORDERED = ("viridis", 0.0, 0.8)  # even to the eye and to colour-blind eyes; its end is too pale for white paper


class Look(NamedTuple):
    """Of a curve."""

    color: str
    marker: str
    dash: str = "-"


LOOKS: Mapping[str, Look] = MappingProxyType(
    {
        "default": Look("#D55E00", "o"),
        "He": Look("#E69F00", "P"),
        "course's loop": Look(INK, "X"),
        "LSUV": Look("#0072B2", "s"),
        "LSUV mirrored": Look("#009E73", "^"),
        "LSUV residual": Look("#56B4E9", "v"),
        "LSUV auto": Look("#882E72", "D", "--"),  # it chooses one of the others, and then lies on its curve
    }
)


def by_order(n: int) -> list[str]:
    """A colour for each of n things that stand in an order, from dark to light."""
    name, first, last = ORDERED
    return [to_hex(color) for color in matplotlib.colormaps[name](np.linspace(first, last, n))]
