"""The random streams of a process, kept and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The streams of Python, numpy and torch (CPU, and each accelerator that is in use) at one moment."""

    def __init__(self) -> None:
        self.python = random.getstate()
        self.numpy = np.random.get_state() if (np := sys.modules.get("numpy")) else None
        self.torch = torch.get_rng_state()
        # asking for the state of a device that nobody has used yet would start it
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self.mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        """Put all streams back to that moment."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put all streams back to where they were before a `with` block."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()
