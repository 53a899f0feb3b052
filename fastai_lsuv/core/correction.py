"""The correcting pass: each unit is measured and corrected in its own hook, and hands on the corrected output."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastai_lsuv.core.blocks import correct_block, error, one_sided
from fastai_lsuv.core.dry_run import Call, Rehearsal, copied
from fastai_lsuv.core.exact import one_step, scaled
from fastai_lsuv.core.hooks import hooked
from fastai_lsuv.core.iterated import Broyden, Dial, correct
from fastai_lsuv.core.layers import TOO_FEW, Unit
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.core.selection import is_known_affine
from fastai_lsuv.core.statistics import Moments, moments

_MOST_POLISHED = 2  # rounds more for what rounding has put off
_HAD_ITS_EFFECT = 0.02  # generous to half precisions: what isn't linear misses by far


class Correction:
    """Correcting passes over the units that nothing speaks against: one, or more where calls share weights."""

    def __init__(self, rehearsal: Rehearsal, units: list[Unit], options: Options) -> None:
        self.rehearsal, self.options = rehearsal, options
        self.units = {unit.module: unit for unit in units if not unit.status}
        self.inputs: dict[nn.Module, Call] = {}  # of modules that run again
        self.first: dict[Unit, list[Tensor]] = {}  # weights of layers that the probe found, before their step
        self.dials: dict[Unit, Dial] = {}  # of shared units
        self.turned: list[Unit] = []  # units whose dials are being turned together
        self.solver = Broyden()
        self.n_polished = 0
        self.best: tuple[float, list[Tensor]] = (math.inf, [])  # least error, and the dials' positions then

    def run(self) -> None:
        """Make passes until every unit is settled, `max_iter` at most."""
        for i in range(self.options.max_iter + 1):
            self.first_pass, self.last_turn = i == 0, i == self.options.max_iter - 1
            self.flags: dict[Unit, Tensor] = {}
            self.hopeless: dict[Unit, str] = {}  # in this pass: the next one may see other inputs
            self.pooled: dict[Unit, Moments] = {}  # over the calls of each shared unit
            self.one_sided: dict[Unit, bool] = {}
            run_again = [m for m, unit in self.units.items() if _runs_again(unit)]
            with hooked(dict.fromkeys(self.units, self._see), dict.fromkeys(run_again, self._keep_input)):
                self.rehearsal.forward()
            self.inputs.clear()
            self._read_flags()
            if i < self.options.max_iter and self._turn_dials():
                continue
            if not self._settle():
                break

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.rehearsal.replaying:
            self.inputs[module] = copied((args, kwargs))

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: measure, correct, and hand on what the corrected unit would have put out."""
        y, unit = first_tensor(output), self.units.get(module)
        if self.rehearsal.replaying or y is None or unit is None or unit.status:
            return None
        if unit.is_shared:
            return self._shared(unit, output, y)
        if unit.is_block:
            return self._block(unit, y, self.inputs.pop(module))
        return self._single(unit, output, y)

    def _moments(self, unit: Unit, y: Tensor) -> Moments:
        own = moments(y, unit.channel_dim(y, self.options.per_channel and not unit.is_block))
        return self.rehearsal.ranks.moments(unit.name, own)

    def _one_sided(self, unit: Unit, y: Tensor, seen: Moments) -> bool:
        return one_sided(unit, y, seen, self.rehearsal.ranks)

    # one exact step, for a layer that is called once

    def _single(self, unit: Unit, output: Any, y: Tensor) -> Any:
        seen = self._moments(unit, y)
        if seen.n < 2:
            self.hopeless[unit] = TOO_FEW
            return output
        step = one_step(unit, y, seen, self.rehearsal.ranks)
        if not is_known_affine(unit.module) and unit not in self.first:
            self.first[unit] = [p.detach().clone() for p in unit.parameters]
        for p in unit.parameters:
            self.rehearsal.undo.remember(p)
        correct(unit, step.scale, step.shift)
        self.flags[unit] = step.flags
        if _runs_again(unit):  # how the weight acts on its other outputs (which experts a router chose) nobody knows
            with self.rehearsal.replay(unit.module) as run:
                return run(self.inputs.pop(unit.module))
        return _with_first(output, y, scaled(unit, y, step))

    def _read_flags(self) -> None:
        """Read the flags of all single steps at once: the only wait for the device."""
        flags = torch.stack([*self.flags.values()]).tolist() if self.flags else []
        for unit, (changed, constant, not_finite, ratio) in zip(self.flags, flags, strict=True):
            unit.n_iter += int(changed)
            unit.ratio = max(unit.ratio, ratio)
            if unit.is_shared:
                continue  # that was one call of several
            if not_finite or (constant and not unit.n_iter):
                self.hopeless[unit] = "non-finite output" if not_finite else "constant output"
            elif constant:
                unit.note("constant output")  # in some channels

    def _settle(self) -> bool:
        """Skip what could not be corrected; returns whether a unit was put back, so that those behind it are off."""
        put_back = [self._skip(unit, reason) for unit, reason in self.hopeless.items()]
        return any(put_back)

    def _skip(self, unit: Unit, reason: str) -> bool:
        """Put a unit back to its first weights; returns whether it had others."""
        unit.skip(reason)
        del self.units[unit.module]
        if unit in self.dials:
            self.dials.pop(unit).reset()
        changed = [self.rehearsal.undo.take_back(p) for p in unit.touched]
        return any(changed)

    # after a look at the results

    def put_right(self, missed: list[Unit]) -> bool:
        """Get ready for another run, if one is worth it: returns whether it is. `missed` are units that are not right.

        A layer that the probe found may be linear for the probe's noise and not for this input. And where the mean
        dwarfs the std, the output was rounded before it was corrected, and what is behind has seen the rounding.
        """
        if self._take_back_nonlinear():
            return True
        rounded = any(not (u.status or u.is_block or u.is_shared) and _is_scalable(u.after) for u in missed)
        self.n_polished += rounded
        return rounded and self.n_polished <= _MOST_POLISHED

    def _take_back_nonlinear(self) -> bool:
        """Take back layers that one step didn't put right, so that they count as blocks; returns whether there are any.

        Those of the first one's type; what comes behind may be off because of them.
        """
        wrong = [unit for unit in self.units.values() if self._was_not_linear(unit)]
        for unit in wrong:
            if type(unit.module) is type(wrong[0].module):
                with torch.no_grad():
                    for p, value in zip(unit.parameters, self.first[unit], strict=True):
                        p.copy_(value)
                unit.is_block, unit.n_iter = True, 0
        return bool(wrong)

    def _was_not_linear(self, unit: Unit) -> bool:
        judged = unit in self.first and not (unit.status or unit.is_block or unit.is_shared or self.options.per_channel)
        if not judged or not unit.n_iter or unit.after is None:
            return False
        allowed = _HAD_ITS_EFFECT * max(1.0, unit.options.std or 1.0)
        return not error(unit.after, unit.options, unit.can_shift) <= allowed

    # a block that is called once: it is run again, alone, until it is right

    def _block(self, unit: Unit, y: Tensor, call: Call) -> Any:
        seen = self._moments(unit, y)
        if reason := _hopeless(seen):
            self.hopeless[unit] = reason
            return None
        shifts = unit.can_shift and (unit.shift is not None or not self._one_sided(unit, y, seen))
        self._note_kept_mean(unit, shifts)
        dial = Dial(unit, self.rehearsal, shifts, seen)
        with self.rehearsal.replay(unit.module) as run:

            def measure() -> Moments:
                return self._moments(unit, _first(run(call)))

            right = correct_block(unit, dial, seen, measure)
            if dial.shifts and not right and self._has_become_one_sided(unit, _first(run(call))):
                dial.reset()
                unit.n_iter = 0
                self._note_kept_mean(unit, False)
                dial = Dial(unit, self.rehearsal, False, seen)
                correct_block(unit, dial, seen, measure)
            return run(call) if unit.n_iter else None

    def _has_become_one_sided(self, unit: Unit, y: Tensor) -> bool:
        """Whether the output had two signs only while it was small, as that of GELU, which is nearly linear there."""
        return unit.n_iter > 0 and unit.shift is None and self._one_sided(unit, y, self._moments(unit, y))

    def _note_kept_mean(self, unit: Unit, shifts: bool) -> None:
        if unit.can_shift and not shifts and self.options.mean is not None:
            unit.note("one sign, mean kept")

    # a unit that is called several times: judged over all its calls, turned between passes

    def _shared(self, unit: Unit, output: Any, y: Tensor) -> Any:
        if self.first_pass and unit not in self.pooled and not unit.is_block and not self._was_right(unit):
            output = self._single(unit, output, y)  # a good start for the calls that follow
            y = _first(output)
        now = self._moments(unit, y)
        self.pooled[unit] = self.pooled[unit].merge(now) if unit in self.pooled else now
        if now.n > 1:
            one_sided = unit.is_block and self._one_sided(unit, y, now)
            self.one_sided[unit] = one_sided and self.one_sided.get(unit, True)
        return output

    def _was_right(self, unit: Unit) -> bool:
        return unit.before is not None and error(unit.before, unit.options, unit.can_shift) <= self.options.tol / 2

    def _set_up_dials(self, shared: dict[Unit, Moments]) -> None:
        for unit, seen in shared.items():
            if unit not in self.dials:
                shifts = unit.can_shift and (unit.shift is not None or not self.one_sided.get(unit))
                self._note_kept_mean(unit, shifts)
                self.dials[unit] = Dial(unit, self.rehearsal, shifts, seen)
        if self.turned != list(shared):  # other unknowns than before
            self.turned, self.solver, self.best = list(shared), Broyden(), (math.inf, [])

    def _turn_dials(self) -> bool:
        """Turn the dials of all shared units together, unless all are right; returns whether they were turned."""
        self.hopeless |= {unit: reason for unit, seen in self.pooled.items() if (reason := _hopeless(seen))}
        shared = {unit: seen for unit, seen in self.pooled.items() if unit not in self.hopeless}
        self._set_up_dials(shared)
        errors = [error(seen, unit.options, self.dials[unit].shifts) for unit, seen in shared.items()]
        if max(errors, default=0.0) <= self.options.tol / 2:
            return False
        here = [self.dials[unit].position for unit in shared]
        self.best = min(self.best, (max(errors), here), key=lambda pair: pair[0])
        image = [self.dials[unit].image(seen) for unit, seen in shared.items()]
        target = self.solver.next(torch.cat(here), torch.cat(image)).split([len(p) for p in here])
        for unit, position in zip(shared, self.best[1] if self.last_turn else target, strict=True):
            self.dials[unit].turn(position)
            unit.n_iter += 1
        return True


def _runs_again(unit: Unit) -> bool:
    """Whether only another run of the unit alone can tell what it puts out when it has been corrected."""
    return (unit.is_block and not unit.is_shared) or unit.has_more_outputs


def _is_scalable(seen: Moments | None) -> bool:
    return seen is not None and not _hopeless(seen)


def _hopeless(seen: Moments) -> str:
    """Why an output can't be scaled, if so."""
    if seen.n < 2:
        return TOO_FEW
    if not bool(seen.std.isfinite().all()):
        return "non-finite output"
    return "" if bool((seen.std > 0).all()) else "constant output"


def _first(output: Any) -> Tensor:
    y = first_tensor(output)
    assert y is not None
    return y


def _with_first(output: Any, y: Tensor, corrected: Tensor) -> Any:
    """The output with its first tensor replaced."""
    return corrected if output is y else tree_map(lambda o: corrected if o is y else o, output)
