"""What one pass shows of each module: how often it runs, what it puts out, and through which parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
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
    is_known_affine,
    known_parameters,
)
from fastai_lsuv.core.copies import copied, tensors_in
from fastai_lsuv.core.dry_run import After, Before, Call, DryRun
from fastai_lsuv.core.modules import has_parameters, is_scripted, named_modules, within_reach
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.probe import find_affine_parameters, first_tensor, small_noise
from fastai_lsuv.core.products import Products, Weights
from fastai_lsuv.core.selection import chosen, excluded
from fastai_lsuv.core.signature import signature
from fastai_lsuv.core.statistics import Measured, Moments, fetched, with_signal

_PLAIN = (int, float, complex, str, bytes, type(None))  # values in an output that have nothing to do with its scale
LISTED_TYPES = (*AFFINE_TYPES, *RECURRENT_TYPES)  # in the report in any case, with a reason if they are left alone


@dataclass
class Seen:
    """What is known of a module that ran."""

    n_calls: int = 0
    affine: AffineParameters | None = None  # of a layer, as the probe sees it
    gain: AffineParameters | None = None  # of a chosen module that only has a scale
    multiplied: list[Weights] = field(default_factory=list)  # its weights that meet the input in a product
    moments: Moments | None = None  # on the device
    measured: Measured | None = None  # the same on the host, after the pass
    eps: float = 0.0
    read_once: bool = False  # its squares may have left the range of their type
    has_more_outputs: bool = False  # than the tensor that is measured
    is_transformed: bool = False  # its output is no plain tensor, as inside `vmap`


class Watch:
    """Looks at the calls of modules, in one pass or more."""

    def __init__(self, dry_run: DryRun, options: Options, products: Products | None = None) -> None:
        self.dry_run, self.options, self.products = dry_run, options, products
        self.excluded = excluded(dry_run.model, options.exclude)
        self.wanted = set() if options.modules is None else set(chosen(dry_run.model, options.modules))
        self.seen: dict[nn.Module, Seen] = {}  # in the order in which first calls ended
        self.order: list[nn.Module] = []  # all calls, in the order in which they ended
        self.templates: set[nn.Module] = set()  # modules that ran on other parameters than theirs
        # what the probe said of the first of several modules with the same code, configuration and kind of input
        self.read: set[nn.Module] = set()  # layers beneath the model of which somebody has asked a parameter
        self.known: dict[Any, tuple[list[Tensor], AffineParameters | None]] = {}
        self.last_output: Tensor | None = None  # a module that hands on what one inside it put out is no layer itself

    def fork(self) -> Watch:
        """Return one that knows the same, and learns by itself."""
        new = copy.copy(self)
        new.seen, new.order = dict(self.seen), [*self.order]
        return new

    def run(
        self, modules: Iterable[nn.Module], after: Mapping[nn.Module, After] | None = None, with_grad: bool = False
    ) -> None:
        """Make a pass, look at these, and have others looked at."""
        watched = list(modules)
        before: dict[nn.Module, Before] = {} if self.seen else {self.dry_run.model: self._enter}
        if self.products is not None:
            before |= dict.fromkeys(watched, self._enter)
        with self.products or nullcontext():
            see = {m: _in_turn(after[m], self.see) if after and m in after else self.see for m in watched}
            self.dry_run.forward({**(after or {}), **see}, before, with_grad=with_grad)
        self.last_output = None
        new = [self.seen[m] for m in watched if m in self.seen]
        measured = [(seen, seen.moments) for seen in new if seen.moments is not None]
        for (seen, _), values in zip(measured, fetched([on_device for _, on_device in measured]), strict=True):
            seen.measured = values

    def _enter(self, module: nn.Module, call: Call) -> None:
        if module is self.dry_run.model:
            for m in filter(is_known_affine, within_reach(module)):
                running = self.dry_run.running(m)
                running._parameters = _Noted(running._parameters, partial(self.read.add, m))
        if self.products is not None:
            self.products.enter(module, call)

    def see(self, module: nn.Module, call: Call, output: Any) -> None:
        """Count, examine and measure a call."""
        if self.products is None:
            self._see(module, call, output)
            return
        with self.products.paused():
            self._see(module, call, output)
            is_layer = module in self.seen and self.seen[module].affine is not None
            self.products.leave(module, call, output, is_layer or isinstance(module, LISTED_TYPES))

    def _see(self, module: nn.Module, call: Call, output: Any) -> None:
        if not _has_tensor(call):
            return  # without an input it makes a weight for its parent: a parametrization
        if self._is_template(module):
            self.templates.add(module)
            return
        y = first_tensor(output)
        is_first = module not in self.seen
        seen = self.seen.setdefault(module, Seen())
        seen.n_calls += 1
        self.order.append(module)
        seen.is_transformed |= y is not None and torch._C._functorch.is_functorch_wrapped_tensor(y)
        if seen.is_transformed:
            return
        if is_first:
            seen.multiplied = self._multiplied(module)
        if is_first and not (y is not None and self.last_output is y and module not in self.wanted):
            self._examine(module, call, y)
        if y is not None and self.is_judged(module):
            self._measure(module, y)
            seen.has_more_outputs |= any(o is not y and not isinstance(o, _PLAIN) for o in tree_leaves(output))
        self.last_output = y

    def _is_template(self, module: nn.Module) -> bool:
        """Whether a module has been given other parameters, as `torch.func.functional_call` does."""
        now = self.dry_run.running(module)._parameters
        return any(now.get(name) is not p for name, p in self.dry_run.working(module).items())

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a module is in the report by default."""
        seen = self.seen.get(module, Seen())
        return seen.affine is not None or bool(seen.multiplied) or isinstance(module, LISTED_TYPES)

    def is_judged(self, module: nn.Module) -> bool:
        """Whether it is wanted in the report, by the user or by default."""
        meant = module in self.wanted or (self.options.modules is None and self.is_layer(module))
        return meant and module not in self.excluded and has_parameters(module)

    def _measure(self, module: nn.Module, y: Tensor) -> None:
        seen = self.seen[module]
        affine = seen.affine or seen.gain
        by_channel = self.options.per_channel and affine is not None and affine.channel_dim is not None
        channels = affine.channel_dim(y) if by_channel else None  # type: ignore[union-attr,misc]
        now = with_signal(y, channels, careful=False, with_spread=self.options.only_measures)
        seen.eps = torch.finfo(y.dtype).eps
        seen.read_once |= not statistics.at_hand(y)
        seen.moments = now if seen.moments is None else seen.moments.merge(now)

    # which of its parameters scale and shift a module's output

    def _examine(self, module: nn.Module, call: Call, y: Tensor | None) -> None:
        seen = self.seen[module]
        if is_known_affine(module):
            seen.affine = None if seen.multiplied else known_parameters(module, self.dry_run.working(module))
            return
        parameters = [p for p in self._own_parameters(module) if p.is_floating_point() and p.numel()]
        without = isinstance(module, RECURRENT_TYPES) or (isinstance(module, GAIN_TYPES) and module not in self.wanted)
        if not parameters or without:
            return
        if module is self.dry_run.model:
            if self.products is not None and y is not None:  # to run it again would be to run the whole
                seen.affine = self.products.linearity.affine_parameters(y, seen.multiplied)
        elif self.products is None or seen.multiplied or module in self.wanted or not self._contains_layers(module):
            self._ask_probe(module, parameters, call)  # but for gains of what is inside, each of which would run it

    def _multiplied(self, module: nn.Module) -> list[Weights]:
        """Its weights that have met the input; of a layer of a known type only if it can't be corrected."""
        if is_known_affine(module):
            weight: Tensor = self.dry_run.working(module)["weight"]  # type: ignore[assignment]
            return [frozenset([weight])] if weight.is_complex() else []
        if self.products is None or isinstance(module, (*GAIN_TYPES, *RECURRENT_TYPES)):
            return []
        own = self._own_parameters(module)
        return [which for which in self.products.multiplied if not which.isdisjoint(own)]

    def _ask_probe(self, module: nn.Module, parameters: list[Tensor], call: Call) -> None:
        seen = self.seen[module]
        alike = signature(module, call)
        if alike is not None and alike in self.known:
            first, answer = self.known[alike]
            seen.affine = answer and answer.of(dict(zip(first, parameters, strict=True)))
        else:
            seen.affine = self._probe(module, parameters, call, mixing=True)
            if alike is not None:
                self.known[alike] = (parameters, seen.affine)
        if seen.affine is None and module in self.wanted:
            seen.gain = self._probe(module, parameters, call, mixing=False)

    def _probe(self, module: nn.Module, parameters: list[Tensor], call: Call, mixing: bool) -> AffineParameters | None:
        contains_layers = self._contains_layers(module)
        multiplied = [p for which in self.seen[module].multiplied for p in which if p.is_floating_point()]
        with self.dry_run.replay(module, self.dry_run.snapshot(module, with_hooks=False)) as run:
            attempts = [small_noise(call, samples=1 if contains_layers else 2)]
            if not contains_layers:  # to run those on the whole batch would cost as much as a pass
                attempts.append(call)
            for inputs in attempts:
                # a module may refuse fewer samples or other values, in ways of its own
                with suppress(Exception):
                    return find_affine_parameters(run, parameters, inputs, mixing, contains_layers, multiplied)
        return None

    def _contains_layers(self, module: nn.Module) -> bool:
        inside = [m for _, m in named_modules(module) if m is not module]
        return any(m in self.seen and self.is_layer(m) for m in inside)

    def _own_parameters(self, module: nn.Module) -> list[Tensor]:
        """Its parameters and those of children whose forward has not run: it must use them itself, if anyone does.

        But not those that it only shows, of a layer inside it.
        """
        ran = [m for m in module.modules() if m is not module and m in self.seen]
        inner = {p for m in ran for p in self.dry_run.working(m).values()}
        return [p for p in self._parameters(module) if p not in inner]

    def _parameters(self, module: nn.Module) -> Iterator[Tensor]:
        yield from (p for p in self.dry_run.working(module).values() if p is not None)
        for child in module.children():
            if child not in self.seen and not is_scripted(child):
                yield from self._parameters(child)


def _in_turn(first: After, then: After) -> After:
    def see(module: nn.Module, call: Call, output: Any) -> Any:
        first(module, call, output)
        return then(module, call, output)

    return see


def _has_tensor(call: Call) -> bool:
    return any(isinstance(o, Tensor) for o in call[0]) or next(tensors_in(call), None) is not None


class _Noted(dict[str, Any]):
    """Parameters that tell when one is asked for."""

    def __init__(self, parameters: Mapping[str, Any], tell: Callable[[], None]) -> None:
        super().__init__(parameters)
        self.tell = tell

    def __getitem__(self, name: str) -> Any:
        self.tell()
        return super().__getitem__(name)

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return copied({**self}, memo)
