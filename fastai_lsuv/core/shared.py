"""Layers that are called several times in a pass: judged over all their calls, and turned between passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastai_lsuv.core.blocks import is_one_sided
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.core.iterated import Broyden, ScaleAndShift
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.reasons import Note
from fastai_lsuv.core.statistics import Measured, Moments, fetched


class SharedLayers:
    """The shared layers of a model, whose scales and shifts act on each other and are found together."""

    def __init__(self, dry_run: DryRun, options: Options) -> None:
        self.dry_run, self.options = dry_run, options
        self.settings: dict[Layer, ScaleAndShift] = {}
        self.moved: list[Layer] = []  # layers whose scales and shifts are moved together
        self.solver = Broyden()
        self.best: tuple[float, list[Tensor]] = (math.inf, [])  # least error, and the positions then
        self.n_moves = 0
        self.begin_pass()

    def begin_pass(self) -> None:
        """Forget the calls of the last pass."""
        self.pooled: dict[Layer, Moments] = {}
        self.one_sided: dict[Layer, bool] = {}  # in all calls

    def add_call(self, layer: Layer, y: Tensor, now: Moments) -> None:
        """Note one call of a layer."""
        self.pooled[layer] = self.pooled[layer].merge(now) if layer in self.pooled else now
        if now.n > 1 and layer.is_block:
            self.one_sided[layer] = self.one_sided.get(layer, True) and is_one_sided(y, now.on_host())

    def drop(self, layer: Layer) -> None:
        """Leave a layer alone from now on."""
        self.settings.pop(layer, None)

    def measured(self) -> dict[Layer, Measured]:
        """Return the moments of each layer over all its calls."""
        return dict(zip(self.pooled, fetched([*self.pooled.values()]), strict=True))

    def move(self, but: set[Layer]) -> bool:
        """Move scale and shift of all layers together, unless all are right; return whether they were moved."""
        shared = {layer: seen for layer, seen in self.measured().items() if layer not in but}
        self._set_up(shared)
        worst = max((layer.target.error(seen) for layer, seen in shared.items()), default=0.0)
        if worst <= self.options.tol / 2 or self.n_moves == self.options.max_iter:
            return False
        self.n_moves += 1
        here = [self.settings[layer].position for layer in shared]
        self.best = min(self.best, (worst, here), key=lambda pair: pair[0])
        image = [self.settings[layer].image(seen) for layer, seen in shared.items()]
        target = self.solver.next(torch.cat(here), torch.cat(image)).split([len(p) for p in here])
        is_last = self.n_moves == self.options.max_iter
        for layer, position in zip(shared, self.best[1] if is_last else target, strict=True):
            self.settings[layer].move(position)
            layer.n_iter += 1
        return True

    def _set_up(self, shared: dict[Layer, Measured]) -> None:
        for layer, seen in shared.items():
            if layer not in self.settings:
                if layer.can_shift and not layer.exposed_bias and self.one_sided.get(layer):
                    layer.keep_mean(Note.ONE_SIGN)
                self.settings[layer] = ScaleAndShift(layer, self.dry_run, seen)
        if self.moved != list(shared):  # other unknowns than before
            self.moved, self.solver, self.best = list(shared), Broyden(), (math.inf, [])
