"""The correcting pass: each layer is measured and corrected as it runs, and hands on the corrected output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastai_lsuv.core.affine import is_known_affine
from fastai_lsuv.core.blocks import correct_in_pass
from fastai_lsuv.core.copies import copied
from fastai_lsuv.core.dry_run import Call, DryRun
from fastai_lsuv.core.exact import Step, exact_step, outcomes, rescale, scaled, variances_of_biases
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.core.reasons import Note, Skip
from fastai_lsuv.core.shared import SharedLayers
from fastai_lsuv.core.statistics import Measured, Moments, moments

_MOST_POLISHED = 2  # passes more for what rounding has put off
_HAD_ITS_EFFECT = 0.02  # generous to half precisions: what isn't linear misses by far


class Correction:
    """Correcting passes over the layers that nothing speaks against: one, or more where calls share weights."""

    def __init__(self, dry_run: DryRun, layers: list[Layer], options: Options) -> None:
        self.dry_run, self.options = dry_run, options
        self.layers = {layer.module: layer for layer in layers if not layer.skipped}
        self.shared = SharedLayers(dry_run, options)
        self.unproven: dict[Layer, list[Tensor]] = {}  # layers that the probe found, with their weights before the step
        self.examined: set[Layer] = set()  # every value of their output is looked at
        self.n_polished = 0
        self.bias_vars: dict[Layer, Tensor] = {}  # before the pass
        self._begin_pass()

    def _begin_pass(self) -> None:
        self.snapshots: dict[nn.Module, tuple[nn.Module, Call]] = {}  # of modules that run again
        self.steps: dict[Layer, Step] = {}
        self.uncorrectable: dict[Layer, Skip] = {}  # in this pass: the next one may see other inputs
        self.shared.begin_pass()

    def make_pass(self) -> bool:
        """Make a correcting pass; return whether it takes another."""
        self._begin_pass()
        self.bias_vars = variances_of_biases([*self.layers.values()])
        run_again = [m for m, layer in self.layers.items() if layer.runs_again]
        self.dry_run.forward(dict.fromkeys(self.layers, self._see), dict.fromkeys(run_again, self._keep_state))
        suspects = self._read_steps() - self.examined
        self.examined |= suspects
        shared = {layer: _why_uncorrectable(seen) for layer, seen in self.shared.measured().items()}
        self.uncorrectable |= {layer: why for layer, why in shared.items() if why}
        return self.shared.move(but=set(self.uncorrectable)) or bool(suspects) or self._settle()

    def _keep_state(self, module: nn.Module, call: Call) -> None:
        self.snapshots[module] = self.dry_run.snapshot(module), copied(call)

    def _see(self, module: nn.Module, call: Call, output: Any) -> Any:
        """Measure a call, correct the layer, and return what the corrected layer would have put out."""
        y, layer = first_tensor(output), self.layers[module]
        if y is None:
            return None
        if layer.is_shared:
            return self._shared(layer, output, y)
        seen = self._moments(layer, y)
        if layer.is_block:
            measured = seen.on_host()
            if why := _why_uncorrectable(measured):
                self.uncorrectable[layer] = why
                return None
            return correct_in_pass(layer, y, measured, *self.snapshots.pop(module), self.dry_run, self.options)
        return self._exact(layer, output, y, seen)

    def _moments(self, layer: Layer, y: Tensor) -> Moments:
        by_channel = self.options.per_channel and not layer.is_block
        return moments(y, layer.channel_dim(y) if by_channel else None, layer.careful)

    def _exact(self, layer: Layer, output: Any, y: Tensor, seen: Moments) -> Any:
        """One exact step, for a layer that is called once."""
        if seen.n < 2:
            self.uncorrectable[layer] = Skip.TOO_FEW
            return output
        step = exact_step(layer, y, seen, self.bias_vars.get(layer), examine=layer in self.examined)
        if not is_known_affine(layer.module) and layer not in self.unproven:
            self.unproven[layer] = [w.detach().clone() for w in layer.weights]
        assert layer.affine is not None
        rescale(layer.affine, step.scale, step.shift)
        self.dry_run.keep(layer.weights)
        self.steps[layer] = step
        if layer.runs_again:  # how the weight acts on its other outputs (which experts a router chose) nobody knows
            snapshot, call = self.snapshots.pop(layer.module)
            with self.dry_run.replay(layer.module, snapshot) as run:
                return run(call)
        return _with_first(output, y, scaled(layer, y, step))

    def _shared(self, layer: Layer, output: Any, y: Tensor) -> Any:
        is_first_call = layer not in self.shared.settings and layer not in self.shared.pooled
        was_right = layer.before is not None and layer.target.error(layer.before) <= self.options.tol / 2
        if is_first_call and not layer.is_block and not was_right:
            output = self._exact(layer, output, y, self._moments(layer, y))  # a good start for the calls that follow
            y = first_tensor(output)  # type: ignore[assignment]
        self.shared.add_call(layer, y, self._moments(layer, y))
        return output

    # between passes

    def _read_steps(self) -> set[Layer]:
        """Read what became of all exact steps, the only wait for the device; return layers that need a closer look."""
        suspects = set()
        for layer, outcome in zip(self.steps, outcomes([*self.steps.values()]), strict=True):
            layer.n_iter += outcome.changed
            layer.ratio = max(layer.ratio, outcome.ratio)
            if layer.is_shared:
                continue  # that was one call of several
            if outcome.suspect:
                suspects.add(layer)
            if not outcome.finite:
                self.uncorrectable[layer] = Skip.NOT_FINITE
            elif outcome.constant and (not layer.n_iter or layer in self.examined):
                self.uncorrectable[layer] = Skip.CONSTANT
            elif outcome.constant:
                layer.note(Note.CONSTANT_CHANNELS)
        return suspects

    def _settle(self) -> bool:
        """Skip what could not be corrected; return whether a layer was put back, so that those behind it are off."""
        return self.leave(self.uncorrectable)

    def take_up(self, layer: Layer) -> None:
        """Correct a layer, too, from the next pass on."""
        self.layers[layer.module] = layer

    def leave(self, layers: Mapping[Layer, Skip]) -> bool:
        """Leave layers as they were before; return whether any had been changed."""
        for layer, why in layers.items():
            layer.skip(why)
            del self.layers[layer.module]
            self.shared.drop(layer)
            self.dry_run.biases.pop(layer.module, None)
        return self.dry_run.put_back([w for layer in layers for w in layer.touched])

    # after a look at the results

    def has_more_to_do(self, missed: list[Layer]) -> bool:
        """Get ready for another pass, if one is worth it; return whether it is. `missed` are layers that aren't right.

        A layer that the probe found may be linear for the probe's noise and not for this input. And where the mean
        dwarfs the std, the output was rounded before it was corrected, and what is behind has seen the rounding.
        """
        self.shared.n_moves = 0
        if self._take_back_nonlinear():
            return True
        rounded = any(
            not (layer.skipped or layer.is_block or layer.is_shared) and _is_scalable(layer.after) for layer in missed
        )
        self.n_polished += rounded
        return rounded and self.n_polished <= min(_MOST_POLISHED, self.options.max_iter - 1)

    def _take_back_nonlinear(self) -> bool:
        """Take back layers that one step didn't put right, so that they count as blocks; return whether there are any.

        Those of the first one's type; what comes behind may be off because of them.
        """
        wrong = [layer for layer in self.layers.values() if self._was_not_linear(layer)]
        for layer in wrong:
            if type(layer.module) is type(wrong[0].module):
                for w, value in zip(layer.weights, self.unproven[layer], strict=True):
                    w.data.copy_(value)
                layer.is_block, layer.n_iter = True, 0
        return bool(wrong)

    def _was_not_linear(self, layer: Layer) -> bool:
        judged = layer in self.unproven and not (layer.is_block or layer.is_shared or self.options.per_channel)
        if not judged or not layer.n_iter or layer.after is None:
            return False
        return not layer.target.error(layer.after) <= _HAD_ITS_EFFECT * max(1.0, layer.target.std or 1.0)


def _is_scalable(seen: Measured | None) -> bool:
    return seen is not None and not _why_uncorrectable(seen)


def _why_uncorrectable(seen: Measured) -> Skip | None:
    """Why an output can't be scaled, if so."""
    if seen.n < 2:
        return Skip.TOO_FEW
    if not all(map(math.isfinite, seen.std)):
        return Skip.NOT_FINITE
    return None if min(seen.std) > 0 else Skip.CONSTANT


def _with_first(output: Any, y: Tensor, corrected: Tensor) -> Any:
    """The output with its first tensor replaced."""
    return corrected if output is y else tree_map(lambda o: corrected if o is y else o, output)
