"""The first pass: which units a model has on this batch, in what order they run, and what they put out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastai_lsuv.core.dry_run import Rehearsal
from fastai_lsuv.core.hooks import hooked
from fastai_lsuv.core.layers import Unit, exposed_shift, mark_frozen, mark_starved, mark_tied
from fastai_lsuv.core.modules import is_scripted, open_modules
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.probe import Carriers, find_carriers, first_tensor, known_carriers, small_noise
from fastai_lsuv.core.selection import (
    AFFINE_TYPES,
    GAIN_TYPES,
    RECURRENT_TYPES,
    chosen,
    excluded,
    is_known_affine,
    is_pattern,
    names_in,
)
from fastai_lsuv.core.statistics import Moments, fetched, moments

_LISTED_TYPES = (*AFFINE_TYPES, *RECURRENT_TYPES)  # in the report in any case, with a reason if they are left alone


def survey(rehearsal: Rehearsal, options: Options) -> list[Unit]:
    """Run the model once, unchanged, and say what can be corrected in it: units in execution order.

    Units that were never called come last. Each unit holds the moments of its output in that pass.
    """
    watch = _Watch(rehearsal, options)
    with hooked({m: watch.see for m in open_modules(rehearsal.model) if m in watch.wanted or any_parameters(m)}):
        rehearsal.forward()
    watch.last_output = None
    watch.moments = dict(zip(watch.moments, fetched([*watch.moments.values()]), strict=True))
    units = list(watch.units())
    mark_frozen(units)
    mark_tied(rehearsal.model, units)
    mark_starved(units)
    rehearsal.ranks.agree("what can be corrected", [_outline(unit) for unit in units])
    return units


def _outline(unit: Unit) -> tuple[object, ...]:
    return unit.name, unit.n_calls, unit.is_block, unit.reason, unit.status, [tuple(p.shape) for p in unit.touched]


def any_parameters(module: nn.Module) -> bool:
    """Whether the module or a child of it has a parameter."""
    return next(module.parameters(), None) is not None


@dataclass
class _Watch:
    rehearsal: Rehearsal
    options: Options
    calls: Counter[nn.Module] = field(default_factory=Counter)  # in the order in which first calls ended
    order: list[nn.Module] = field(default_factory=list)  # all calls, in the order in which they ended
    found: dict[nn.Module, Carriers | None] = field(default_factory=dict)  # affine layers: what the probe says
    gains: dict[nn.Module, Carriers] = field(default_factory=dict)  # chosen ones that aren't layers, but have a scale
    # what the probe said of the first of several modules with the same code, configuration and kind of input
    known: dict[Any, tuple[list[Tensor], Carriers | None]] = field(default_factory=dict)
    moments: dict[nn.Module, Moments] = field(default_factory=dict)
    eps: dict[nn.Module, float] = field(default_factory=dict)
    with_more_outputs: set[nn.Module] = field(default_factory=set)  # than the tensor that is measured
    last_output: Tensor | None = None  # a module that hands on what one inside it has put out is no layer of its own

    def __post_init__(self) -> None:
        model = self.rehearsal.model
        self.names = {m: name for name, m in model.named_modules()}
        self.excluded = excluded(model, self.options.exclude)
        self.wanted = set() if self.options.modules is None else set(chosen(model, self.options.modules))

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: count, examine, measure."""
        if self.rehearsal.replaying or not _has_tensor(args, kwargs):
            return  # without an input it makes a weight for its parent: a parametrization
        self.calls[module] += 1
        self.order.append(module)
        y = first_tensor(output)
        if module not in self.found:
            handed_on = y is not None and self.last_output is y and module not in self.wanted
            self.found[module] = None if handed_on else self._examine(module, (args, kwargs))
        if self._is_judged(module) and y is not None:
            self._measure(module, y)
            if any(isinstance(o, Tensor) and o is not y for o in tree_leaves(output)):
                self.with_more_outputs.add(module)
        self.last_output = y

    def _is_judged(self, module: nn.Module) -> bool:
        meant = module in self.wanted or (self.options.modules is None and self._is_layer(module))
        return meant and module not in self.excluded and any_parameters(module)

    def _is_layer(self, module: nn.Module) -> bool:
        return self.found.get(module) is not None or isinstance(module, _LISTED_TYPES)

    def _measure(self, module: nn.Module, y: Tensor) -> None:
        carriers = self._carriers(module)
        by_channel = self.options.per_channel and carriers is not None and carriers.channel_dim is not None
        own = moments(y, carriers.channel_dim(y) if by_channel else None)  # type: ignore[union-attr,misc]
        now = self.rehearsal.ranks.moments(self.names[module], own)
        self.eps[module] = torch.finfo(y.dtype).eps
        self.moments[module] = self.moments[module].merge(now) if module in self.moments else now

    def _carriers(self, module: nn.Module) -> Carriers | None:
        return self.found.get(module) or self.gains.get(module)

    def _examine(self, module: nn.Module, call: Any) -> Carriers | None:
        if is_known_affine(module):
            return known_carriers(module)
        parameters = [p for p in self._own_parameters(module) if p.is_floating_point() and p.numel()]
        without = isinstance(module, RECURRENT_TYPES) or (isinstance(module, GAIN_TYPES) and module not in self.wanted)
        if not parameters or without:
            return None
        alike = _signature(module, call)
        if alike is not None and alike in self.known:
            first, answer = self.known[alike]
            layer = answer and answer.of(dict(zip(first, parameters, strict=True)))
        else:
            layer = self._probe(module, parameters, call, mixing=True)
            if alike is not None:
                self.known[alike] = (parameters, layer)
        if layer is None and module in self.wanted and (gain := self._probe(module, parameters, call, mixing=False)):
            self.gains[module] = gain
        return layer

    def _probe(self, module: nn.Module, parameters: list[Tensor], call: Any, mixing: bool) -> Carriers | None:
        contains_layers = any(m in self.calls and self._is_layer(m) for m in module.modules() if m is not module)
        with self.rehearsal.replay(module, unseen=True) as run:
            attempts = [small_noise(call, samples=1 if contains_layers else 2)]
            if not contains_layers:  # to run those on the whole batch would cost as much as a pass
                attempts.append(call)
            for inputs in attempts:
                # a module may refuse fewer samples or other values, in ways of its own
                with suppress(Exception):
                    return find_carriers(run, parameters, inputs, mixing, contains_layers)
        return None

    def _own_parameters(self, module: nn.Module) -> Iterator[Tensor]:
        """Its parameters and those of children whose forward has not run: it must use them itself, if anyone does."""
        yield from (p for p in module._parameters.values() if p is not None)
        for child in module.children():
            if child not in self.calls and not is_scripted(child):
                yield from self._own_parameters(child)

    def units(self) -> Iterator[Unit]:
        """All units, those that ran in the order in which they ended first, then those that never ran."""
        by_default = self.options.modules is None
        picked = [m for m in self.calls if m in self.moments]
        if not by_default:
            picked = [m for m in self.calls if m in self._picked_by_user() and m in self.moments]
        units = [self._unit(module) for module in picked]
        used = {p for unit in units for p in unit.parameters}
        yield from units
        inside_scripted = {inner for m in self.names if is_scripted(m) for inner in m.modules() if inner is not m}
        for module, name in self.names.items():
            if module in self.calls or module in self.excluded or not any_parameters(module):
                continue
            if is_scripted(module):
                if module in self.wanted or (by_default and module not in inside_scripted):
                    yield Unit(name, module, None, self.options, status="skipped", reason="scripted")
                continue
            adopted = any(p in used for p in module.parameters(recurse=False))
            if module in self.wanted or (by_default and isinstance(module, _LISTED_TYPES) and not adopted):
                carriers = known_carriers(module) if is_known_affine(module) else None
                yield Unit(name, module, carriers, self.options, status="skipped", reason="never called")

    def _picked_by_user(self) -> set[nn.Module]:
        """What the user chose; of the modules that a pattern matches, the layers if there are any."""
        patterns = names_in(self.options.modules)
        if not patterns:
            return self.wanted
        picked: set[nn.Module] = set()
        for pattern in patterns:
            matched = chosen(self.rehearsal.model, pattern)
            layers = [m for m in matched if self._is_layer(m)] if is_pattern(pattern) else []
            picked.update(layers or matched)
        return picked

    def _unit(self, module: nn.Module) -> Unit:
        unit = Unit(
            self.names[module],
            module,
            self._carriers(module),
            self.options,
            n_calls=self.calls[module],
            has_more_outputs=module in self.with_more_outputs,
            eps=self.eps[module],
            before=self.moments[module],
        )
        if isinstance(module, RECURRENT_TYPES):
            unit.skip("recurrent weights")
        elif unit.carriers is None:
            self._set_up_block(unit)
        unit.is_first = (unit.layer or module) is next((m for m in self.order if self._is_layer(m)), None)
        if not unit.can_shift:
            unit.reason = unit.reason or "no bias, mean kept"
        if self.options.per_channel and (unit.is_block or unit.carriers is None or unit.carriers.channel_dim is None):
            unit.skip("excluded by mode")
        return unit

    def _set_up_block(self, unit: Unit) -> None:
        unit.is_block = True
        unit.shift = exposed_shift(unit.module)
        inside = set(unit.module.modules()) - self.excluded
        layers = [m for m in self.order if m in inside and self.found.get(m) is not None]
        weight = getattr(unit.module, "weight", None)  # of a block: a property that exposes it
        exposed = [m for m in layers if self.found[m].weight is weight]  # type: ignore[union-attr]
        if layers:
            unit.layer = (exposed or layers)[-1]
            unit.carriers = self.found[unit.layer]
        elif isinstance(weight, nn.Parameter):  # a layer that does more than its type says
            unit.carriers = Carriers(weight, unit.module._parameters.get("bias"), matrices=(weight,))
        elif isinstance(unit.module, AFFINE_TYPES):  # its weight is made from others in which it isn't linear
            unit.skip("weight has no effect on scale")
        else:
            unit.skip("no affine layer")


def _has_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(o, Tensor) for o in args) or any(isinstance(o, Tensor) for o in tree_leaves((args, kwargs)))


def _signature(module: nn.Module, call: Any) -> tuple[Any, ...] | None:
    """What decides how a module uses its parameters: its types and plain attributes, the kinds of its inputs.

    Sizes and other whole numbers count as 0, 1 or many, fractions by their sign, so that layers of different widths
    are examined once; the correcting pass will see whether that was right. None if it can't be told: hooks ahead of
    the forward may make the weight.
    """
    if any(m._forward_pre_hooks for m in module.modules()):
        return None
    internal = vars(nn.Module()).keys()
    attributes = [
        (name, type(m), *((key, _coarse(value)) for key, value in sorted(vars(m).items()) if key not in internal))
        for name, m in module.named_modules()
    ]
    parameters = [(name, _coarse(p)) for name, p in module.named_parameters()]
    signature = (tuple(attributes), tuple(parameters), tuple(_coarse(o) for o in tree_leaves(call)))
    try:
        hash(signature)
    except TypeError:
        return None
    return signature


def _coarse(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(min(size, 2) for size in value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(_coarse(o) for o in value)
    if type(value) is float:
        return (value > 0) - (value < 0)
    return min(value, 2) if type(value) is int else value
