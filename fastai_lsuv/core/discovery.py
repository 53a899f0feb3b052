"""The first pass: which layers a model has on this batch, in what order they run, and what they put out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastai_lsuv.core import statistics
from fastai_lsuv.core.affine import (
    AFFINE_TYPES,
    GAIN_TYPES,
    RECURRENT_TYPES,
    AffineParameters,
    exposes_bias,
    is_known_affine,
    known_parameters,
)
from fastai_lsuv.core.dry_run import Call, DryRun
from fastai_lsuv.core.layers import Layer, mark_frozen, mark_starved, mark_tied
from fastai_lsuv.core.modules import has_parameters, is_scripted, named_modules
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.probe import find_affine_parameters, first_tensor, signature, small_noise
from fastai_lsuv.core.reasons import Note, Skip
from fastai_lsuv.core.selection import chosen, excluded, is_pattern, names_in
from fastai_lsuv.core.statistics import Moments, fetched, moments

_LISTED_TYPES = (*AFFINE_TYPES, *RECURRENT_TYPES)  # in the report in any case, with a reason if they are left alone


def discover(dry_run: DryRun, options: Options) -> list[Layer]:
    """Run the model once, unchanged, and return what can be corrected in it, in execution order.

    Layers that were never called come last. Each layer holds the moments of its output in that pass.
    """
    watch = _Watch(dry_run, options)
    watched = [m for m in dry_run.names if not is_scripted(m) and (m in watch.wanted or has_parameters(m))]
    dry_run.forward(dict.fromkeys(watched, watch.see))
    watch.last_output = None
    watch.fetch()
    layers = list(watch.layers())
    overflown = [x for x in layers if x.careful and x.before is not None and not x.before.is_finite]
    measure(dry_run, overflown, options, "before")
    mark_frozen(layers, dry_run)
    mark_tied(layers, dry_run)
    mark_starved(layers)
    return layers


def measure(dry_run: DryRun, layers: list[Layer], options: Options, when: str) -> None:
    """Measure what layers put out in a clean pass, and note it as their moments `before` or `after`."""
    if not layers:
        return
    measured: dict[nn.Module, Moments] = {}
    by_module = {layer.module: layer for layer in layers}

    def see(module: nn.Module, call: Call, output: Any) -> None:
        if (y := first_tensor(output)) is not None:
            layer = by_module[module]
            now = moments(y, layer.channel_dim(y) if options.per_channel else None, layer.careful)
            measured[module] = measured[module].merge(now) if module in measured else now

    dry_run.forward(dict.fromkeys(by_module, see))
    seen = dict(zip(measured, fetched([*measured.values()]), strict=True))
    for module, layer in by_module.items():
        setattr(layer, when, seen.get(module))


@dataclass
class _Watch:
    dry_run: DryRun
    options: Options
    calls: Counter[nn.Module] = field(default_factory=Counter)  # in the order in which first calls ended
    order: list[nn.Module] = field(default_factory=list)  # all calls, in the order in which they ended
    found: dict[nn.Module, AffineParameters | None] = field(default_factory=dict)  # of layers, as the probe sees them
    gains: dict[nn.Module, AffineParameters] = field(default_factory=dict)  # chosen modules that only have a scale
    # what the probe said of the first of several modules with the same code, configuration and kind of input
    known: dict[Any, tuple[list[Tensor], AffineParameters | None]] = field(default_factory=dict)
    moments: dict[nn.Module, Moments] = field(default_factory=dict)
    eps: dict[nn.Module, float] = field(default_factory=dict)
    read_once: set[nn.Module] = field(default_factory=set)  # whose squares may have left the range of their type
    with_more_outputs: set[nn.Module] = field(default_factory=set)  # than the tensor that is measured
    last_output: Tensor | None = None  # a module that hands on what one inside it has put out is no layer of its own

    def __post_init__(self) -> None:
        model = self.dry_run.model
        self.names = self.dry_run.names
        self.excluded = excluded(model, self.options.exclude)
        self.wanted = set() if self.options.modules is None else set(chosen(model, self.options.modules))

    def see(self, module: nn.Module, call: Call, output: Any) -> None:
        """Count, examine and measure a call."""
        if not _has_tensor(call):
            return  # without an input it makes a weight for its parent: a parametrization
        self.calls[module] += 1
        self.order.append(module)
        y = first_tensor(output)
        if module not in self.found:
            handed_on = y is not None and self.last_output is y and module not in self.wanted
            self.found[module] = None if handed_on else self._examine(module, call)
        if self._is_judged(module) and y is not None:
            self._measure(module, y)
            if any(isinstance(o, Tensor) and o is not y for o in tree_leaves(output)):
                self.with_more_outputs.add(module)
        self.last_output = y

    def _is_judged(self, module: nn.Module) -> bool:
        meant = module in self.wanted or (self.options.modules is None and self._is_layer(module))
        return meant and module not in self.excluded and has_parameters(module)

    def _is_layer(self, module: nn.Module) -> bool:
        return self.found.get(module) is not None or isinstance(module, _LISTED_TYPES)

    def _measure(self, module: nn.Module, y: Tensor) -> None:
        affine = self._affine(module)
        by_channel = self.options.per_channel and affine is not None and affine.channel_dim is not None
        now = moments(y, affine.channel_dim(y) if by_channel else None)  # type: ignore[union-attr,misc]
        self.eps[module] = torch.finfo(y.dtype).eps
        if not statistics.at_hand(y):
            self.read_once.add(module)
        self.moments[module] = self.moments[module].merge(now) if module in self.moments else now

    def _affine(self, module: nn.Module) -> AffineParameters | None:
        return self.found.get(module) or self.gains.get(module)

    # which of its parameters scale and shift a module's output

    def _examine(self, module: nn.Module, call: Call) -> AffineParameters | None:
        if is_known_affine(module):
            return known_parameters(module, self.dry_run.working(module))
        parameters = [p for p in self._own_parameters(module) if p.is_floating_point() and p.numel()]
        without = isinstance(module, RECURRENT_TYPES) or (isinstance(module, GAIN_TYPES) and module not in self.wanted)
        if not parameters or without:
            return None
        alike = signature(module, call)
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

    def _probe(self, module: nn.Module, parameters: list[Tensor], call: Call, mixing: bool) -> AffineParameters | None:
        inside = [m for _, m in named_modules(module) if m is not module]
        contains_layers = any(m in self.calls and self._is_layer(m) for m in inside)
        with self.dry_run.replay(module, self.dry_run.snapshot(module, with_hooks=False)) as run:
            attempts = [small_noise(call, samples=1 if contains_layers else 2)]
            if not contains_layers:  # to run those on the whole batch would cost as much as a pass
                attempts.append(call)
            for inputs in attempts:
                # a module may refuse fewer samples or other values, in ways of its own
                with suppress(Exception):
                    return find_affine_parameters(run, parameters, inputs, mixing, contains_layers)
        return None

    def _own_parameters(self, module: nn.Module) -> Iterator[Tensor]:
        """Its parameters and those of children whose forward has not run: it must use them itself, if anyone does."""
        yield from (p for p in self.dry_run.working(module).values() if p is not None)
        for child in module.children():
            if child not in self.calls and not is_scripted(child):
                yield from self._own_parameters(child)

    # the result

    def fetch(self) -> None:
        """Bring all moments to the host."""
        self.measured = dict(zip(self.moments, fetched([*self.moments.values()]), strict=True))

    def layers(self) -> Iterator[Layer]:
        """All layers, those that ran in the order in which they ended first, then those that never ran."""
        picked = [m for m in self.calls if m in self.moments]
        if self.options.modules is not None:
            meant = self._picked_by_user()
            picked = [m for m in picked if m in meant]
        found = [self._layer(module) for module in picked]
        yield from found
        yield from self._never_called({p for layer in found for p in layer.weights})

    def _never_called(self, used: set[Tensor]) -> Iterator[Layer]:
        by_default = self.options.modules is None
        inside_scripted = {inner for m in self.names if is_scripted(m) for inner in m.modules() if inner is not m}
        for module, name in self.names.items():
            if module in self.calls or module in self.excluded or not has_parameters(module):
                continue
            if is_scripted(module):
                if module in self.wanted or (by_default and module not in inside_scripted):
                    yield Layer(name, module, None, target=self.options.target, skipped=Skip.SCRIPTED)
                continue
            adopted = any(p in used for p in self.dry_run.working(module).values())
            if module in self.wanted or (by_default and isinstance(module, _LISTED_TYPES) and not adopted):
                known = is_known_affine(module)
                affine = known_parameters(module, self.dry_run.working(module)) if known else None
                yield Layer(name, module, affine, target=self.options.target, skipped=Skip.NEVER_CALLED)

    def _picked_by_user(self) -> set[nn.Module]:
        """What the user chose; of the modules that a pattern matches, the layers if there are any."""
        patterns = names_in(self.options.modules)
        if not patterns:
            return self.wanted
        picked: set[nn.Module] = set()
        for pattern in patterns:
            matched = chosen(self.dry_run.model, pattern)
            layers = [m for m in matched if self._is_layer(m)] if is_pattern(pattern) else []
            picked.update(layers or matched)
        return picked

    def _layer(self, module: nn.Module) -> Layer:
        seen = self.measured[module]
        extreme = not all(0 < std < torch.inf for std in seen.std)
        layer = Layer(
            self.names[module],
            module,
            self._affine(module),
            n_calls=self.calls[module],
            has_more_outputs=module in self.with_more_outputs,
            eps=self.eps[module],
            before=seen,
            careful=extreme and module in self.read_once,
            target=self.options.target,
        )
        if isinstance(module, RECURRENT_TYPES):
            layer.skip(Skip.RECURRENT)
        elif layer.affine is None:
            self._set_up_block(layer)
        first = next((m for m in self.order if self._is_layer(m)), None)
        layer.is_first = (layer.owner or module) is first
        if not layer.can_shift:
            layer.keep_mean(Note.NO_BIAS)
        if self.options.per_channel and (layer.is_block or layer.affine is None or layer.affine.channel_dim is None):
            layer.skip(Skip.MODE)
        return layer

    def _set_up_block(self, block: Layer) -> None:
        block.is_block = True
        block.exposed_bias = exposes_bias(block.module)
        inside = {m for _, m in named_modules(block.module)} - self.excluded
        layers = [m for m in self.order if m in inside and self.found.get(m) is not None]
        weight = getattr(block.module, "weight", None)  # of a block: a property that exposes it
        exposed = [m for m in layers if self.dry_run.original(self.found[m].weight) is weight]  # type: ignore[union-attr]
        if layers:
            block.owner = (exposed or layers)[-1]
            block.affine = self.found[block.owner]
        elif isinstance(weight, nn.Parameter):  # a layer that does more than its type says
            own = self.dry_run.working(block.module)
            block.affine = AffineParameters(own["weight"], own.get("bias"), matrices=(own["weight"],))  # type: ignore[arg-type]
        elif isinstance(block.module, AFFINE_TYPES):  # its weight is made from others in which it isn't linear
            block.skip(Skip.NO_EFFECT)
        else:
            block.skip(Skip.NO_AFFINE_LAYER)


def _has_tensor(call: Call) -> bool:
    return any(isinstance(o, Tensor) for o in call[0]) or any(isinstance(o, Tensor) for o in tree_leaves(call))
