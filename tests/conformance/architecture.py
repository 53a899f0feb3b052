"What a family lists: architectures by name, each with a function that builds it."

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Built:
    "A model with random weights, a batch as `lsuv_` takes it, and what it is in full."

    model: nn.Module
    batch: Any
    variant: str = ""


@dataclass(frozen=True)
class Architecture:
    family: str
    name: str
    build: Callable[[], Built]

    @property
    def path(self):
        return f"{self.family}/{self.name}"
