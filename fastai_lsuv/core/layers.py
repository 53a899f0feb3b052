"""What is measured and corrected: a layer or block with the parameters that carry its scale and shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastai_lsuv.core.options import Options
from fastai_lsuv.core.probe import Carriers
from fastai_lsuv.core.statistics import Moments

TOO_FEW = "too few values"


@dataclass(eq=False)
class Unit:
    """A layer or block whose output is measured and, if nothing speaks against it, corrected."""

    name: str
    module: nn.Module
    carriers: Carriers | None  # None: a block without an affine layer
    options: Options  # what is wanted of it
    is_block: bool = False  # corrected by trying, through `layer`
    layer: nn.Module | None = None  # whose carriers a block uses, if not its own
    reason: str = ""  # why it is skipped, or what the user should know
    status: str = ""
    n_iter: int = 0
    ratio: float = 0.0  # |mean| / std of the output when it was corrected
    is_first: bool = False  # no other layer has run before it: it sees the data
    n_calls: int = 0
    has_more_outputs: bool = False  # tensors beside the one that is measured
    eps: float = 0.0  # spacing of the output's dtype at 1
    before: Moments | None = None
    after: Moments | None = None
    shift: Shift | None = None  # where a block shows a `bias` of its own

    def skip(self, reason: str) -> None:
        """Leave it as it is, for a reason."""
        self.status, self.reason, self.n_iter = "skipped", reason, 0

    def note(self, what: str) -> None:
        """Say something about a unit that is corrected all the same."""
        if what not in self.reason:
            self.reason = f"{self.reason}; {what}" if self.reason else what

    def reconsider(self) -> None:
        """Correct it after all, if it gets more values than in the untouched network, as a detector's heads may."""
        self.status, self.reason = "", "" if self.can_shift else "no bias, mean kept"

    @property
    def is_shared(self) -> bool:
        """Called several times in a pass, so that its calls can only be judged together."""
        return self.n_calls > 1

    @property
    def can_shift(self) -> bool:
        """Whether the mean of the output can be moved."""
        return self.shift is not None or (self.carriers is not None and self.carriers.bias is not None)

    @property
    def parameters(self) -> list[Tensor]:
        """What a correction changes."""
        return self.carriers.parameters if self.carriers else []

    @property
    def touched(self) -> list[Tensor]:
        """What a correction or an initialiser changes."""
        return [*self.parameters, *self.carriers.matrices] if self.carriers else []

    def channel_dim(self, y: Tensor, per_channel: bool) -> int | None:
        """Dimension of the output that counts the channels, if they are to be told apart."""
        known = per_channel and self.carriers is not None and self.carriers.channel_dim is not None
        return self.carriers.channel_dim(y) if known else None  # type: ignore[union-attr,misc]


@dataclass(frozen=True)
class Shift:
    """The `bias` property of a block, as in the fast.ai course's `ConvLayer`, whose bias is `-relu.sub`."""

    module: nn.Module

    @property
    def value(self) -> Any:
        """The bias now: a number or a tensor."""
        value = self.module.bias
        return value.detach().clone() if isinstance(value, Tensor) else value

    def set(self, value: Any) -> None:
        """Set it, in place where it is a parameter."""
        current = self.module.bias
        if isinstance(current, nn.Parameter):
            current.data.copy_(torch.as_tensor(value))
        else:
            self.module.bias = value


def exposed_shift(module: nn.Module) -> Shift | None:
    """The module's `bias` if it is a property that can be set and holds a number."""
    exposed = getattr(type(module), "bias", None)
    if isinstance(exposed, property) and exposed.fset and isinstance(module.bias, (float, int, Tensor)):
        return Shift(module)
    return None


def mark_frozen(units: list[Unit]) -> None:
    """Only what trains is corrected."""
    for unit in units:
        if not unit.status and not all(p.requires_grad for p in unit.parameters):
            unit.skip("frozen")


def mark_starved(units: list[Unit]) -> None:
    """Nothing can be said of a single value."""
    for unit in units:
        if not unit.status and unit.before is not None and unit.before.n < 2:
            unit.skip(TOO_FEW)


def mark_tied(model: nn.Module, units: list[Unit]) -> None:
    """Of units with a weight in common the first keeps it; a weight that something else uses, too, is nobody's."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p.data_ptr(), set()).add(module)
    sharing: dict[int, list[Unit]] = {}
    for unit in units:
        for carrier in unit.parameters:
            sharing.setdefault(carrier.data_ptr(), []).append(unit)
    for address, users in sharing.items():
        at_home = {inner for unit in users for inner in (unit.layer or unit.module).modules()}
        used_elsewhere = bool(owners.get(address, set()) - at_home)
        _mark(users if used_elsewhere else users[1:], first_runs=not users[0].status)


def _mark(users: list[Unit], first_runs: bool) -> None:
    for unit in users:
        if not unit.status or (unit.reason == "never called" and first_runs):
            unit.skip("tied weight")
