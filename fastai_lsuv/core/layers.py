"""What is measured and corrected: a layer or block, with the parameters that scale and shift its output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastai_lsuv.core.affine import AffineParameters
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.core.reasons import Note, Skip
from fastai_lsuv.core.statistics import Measured
from fastai_lsuv.core.target import Target

_OF_WEIGHTS = (Skip.SEVERAL, Skip.NOT_AFFINE, Skip.COMPLEX, Note.OTHERS)


@dataclass(eq=False)
class Layer:
    """A layer or block whose output is measured and, if nothing speaks against it, corrected.

    A block isn't affine in its parameters: it is corrected by trying, through the last affine layer inside it.
    """

    name: str
    module: nn.Module  # of the model itself
    affine: AffineParameters | None  # working weights; None: a block without an affine layer
    n_calls: int = 0
    has_more_outputs: bool = False  # tensors beside the one that is measured
    eps: float = 0.0  # spacing of the output's dtype at 1
    is_first: bool = False  # no other layer has run before it: it sees the data
    owner: nn.Module | None = None  # whose affine parameters a block uses, if not its own
    exposed_bias: bool = False  # a block that shows a `bias` of its own, through which it is shifted
    before: Measured | None = None  # of the untouched network
    careful: bool = False  # its values are so large or small that a device has to read them twice

    target: Target = field(default_factory=lambda: Target(0.0, 1.0))  # without a mean where that is kept
    is_block: bool = False
    skipped: Skip | None = None
    notes: list[Note] = field(default_factory=list)
    n_iter: int = 0  # corrections made
    ratio: float = 0.0  # |mean| / std of the output when it was corrected
    after: Measured | None = None
    grad: float = math.nan  # elasticity of the output, in the end
    left: list[str] = field(default_factory=list)  # names of weights in it that meet the input and are not corrected

    def skip(self, why: Skip) -> None:
        """Leave it as it is."""
        self.skipped, self.n_iter = why, 0

    def note(self, what: Note) -> None:
        """Say something about a layer that is corrected all the same."""
        if what not in self.notes:
            self.notes.append(what)

    def name_weights(self, names: list[str]) -> None:
        """Say which weights are left as they are."""
        self.left += [name for name in names if name not in self.left]
        if not self.skipped:
            self.note(Note.OTHERS)

    def keep_mean(self, why: Note) -> None:
        """Have its mean left alone."""
        if self.target.mean is not None or why is Note.NO_BIAS:
            self.note(why)
        self.target = self.target.without_mean()

    @property
    def shown_name(self) -> str:
        """Its name, or the type of a model that is a layer itself."""
        return self.name or type(self.module).__name__

    @property
    def reason(self) -> str:
        """Why it is skipped, or what else there is to say; behind a colon, of which weights."""
        phrases: list[Skip] | list[Note] = [self.skipped] if self.skipped else self.notes
        which = f": {', '.join(self.left)}"
        return "; ".join(f"{x.value}{which}" if x in _OF_WEIGHTS and self.left else x.value for x in phrases)

    @property
    def is_shared(self) -> bool:
        """Called several times in a pass, so that its calls can only be judged together."""
        return self.n_calls > 1

    @property
    def can_shift(self) -> bool:
        """Whether the mean of the output can be moved."""
        return self.exposed_bias or (self.affine is not None and self.affine.bias is not None)

    @property
    def runs_again(self) -> bool:
        """Whether only another run of it alone can tell what it puts out when it has been corrected."""
        return (self.is_block and not self.is_shared) or self.has_more_outputs

    @property
    def weights(self) -> list[Tensor]:
        """What a correction changes."""
        return self.affine.all if self.affine else []

    @property
    def touched(self) -> list[Tensor]:
        """What a correction or an initialiser changes."""
        return [*self.weights, *self.affine.matrices] if self.affine else []

    def channel_dim(self, y: Tensor) -> int | None:
        """Dimension of the output that counts the channels, if that is known."""
        known = self.affine is not None and self.affine.channel_dim is not None
        return self.affine.channel_dim(y) if known else None  # type: ignore[union-attr,misc]


def mark_frozen(layers: list[Layer], dry_run: DryRun) -> None:
    """Only what trains is corrected."""
    for layer in layers:
        if not layer.skipped and not all(dry_run.original(w).requires_grad for w in layer.weights):
            layer.skip(Skip.FROZEN)


def mark_starved(layers: list[Layer]) -> None:
    """Nothing can be said of a single value."""
    for layer in layers:
        if not layer.skipped and layer.before is not None and layer.before.n < 2:
            layer.skip(Skip.TOO_FEW)


def mark_tied(layers: list[Layer], dry_run: DryRun, only_shows: Callable[[nn.Module, Tensor], bool]) -> None:
    """Of layers with a weight in common the first keeps it; a weight that something else uses, too, is nobody's."""
    owners = _owners(dry_run, only_shows)
    sharing: dict[int, list[Layer]] = {}
    for layer in layers:
        for w in layer.weights:
            sharing.setdefault(_address(dry_run.original(w)), []).append(layer)
    for address, users in sharing.items():
        at_home = {inner for layer in users for inner in (layer.owner or layer.module).modules()}
        used_elsewhere = bool(owners.get(address, set()) - at_home)
        first_runs = not users[0].skipped
        for layer in users if used_elsewhere else users[1:]:
            if not layer.skipped or (layer.skipped is Skip.NEVER_CALLED and first_runs):
                layer.skip(Skip.TIED)


def _owners(dry_run: DryRun, only_shows: Callable[[nn.Module, Tensor], bool]) -> dict[int, set[nn.Module]]:
    owners: dict[int, set[nn.Module]] = {}
    for module in dry_run.names:
        for p in module.parameters(recurse=False):
            if not only_shows(module, p):
                owners.setdefault(_address(p), set()).add(module)
    return owners


def _address(p: Tensor) -> int:
    """Where a parameter lies; what is empty lies nowhere."""
    return p.data_ptr() or id(p)
