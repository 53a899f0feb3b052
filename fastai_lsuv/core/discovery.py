"""Which layers a model has on this batch, in what order they run, and what they put out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastai_lsuv.core.affine import (
    AffineParameters,
    exposes_bias,
    is_known_affine,
    known_parameters,
)
from fastai_lsuv.core.branches import branch_ends
from fastai_lsuv.core.dry_run import After, DryRun
from fastai_lsuv.core.gradient import Backprop
from fastai_lsuv.core.layers import Layer, mark_frozen, mark_starved, mark_tied
from fastai_lsuv.core.modules import has_parameters, is_scripted, named_modules
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.priors import find_priors, keep_priors
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.core.products import Products
from fastai_lsuv.core.reasons import Note, Skip
from fastai_lsuv.core.selection import chosen, is_pattern, names_in
from fastai_lsuv.core.statistics import Moments, fetched, with_signal
from fastai_lsuv.core.use import home_of, is_any_used_by_root, is_uncertain, own_of_root, why_not
from fastai_lsuv.core.watch import LISTED_TYPES, Watch


class Discovery:
    """The layers of a model, in execution order; those that were never called come last.

    Each holds the moments of its output in the first pass, in which the model was untouched.
    """

    def __init__(self, dry_run: DryRun, options: Options) -> None:
        self.dry_run, self.options = dry_run, options
        self.backprop = Backprop(dry_run, is_due=options.only_measures)
        self.priors = find_priors(dry_run)
        self.products, self.watch = self._first_look()
        self.layers = [*self._called(self.watch.seen)]
        if self.products is not None and options.modules is None:
            self._name_what_is_multiplied(self.products)
        self.layers += self._never_called({p for layer in self.layers for p in layer.weights})
        self.look([x for x in self.layers if x.careful and x.before and not x.before.is_finite], "before")
        mark_frozen(self.layers, self.dry_run)
        mark_tied(self.layers, self.dry_run, self._only_shows)
        mark_starved(self.layers)
        if self.products is not None and not options.only_measures:
            keep_priors(self.layers, self.priors, self.products.heads)

    def again(self, options: Options) -> Discovery:
        """Return the same before anything was corrected, to try another way; what it finds belongs to it alone."""
        new = copy.copy(self)
        new.options, new.watch = options, self.watch.fork()
        new.layers = [
            replace(x, notes=[*x.notes], left=[*x.left], target=replace(x.target, std=options.std)) for x in self.layers
        ]
        return new

    @cached_property
    def branch_ends(self) -> list[nn.Module]:
        """Layers with which residual branches end: it takes a pass to find them."""
        return branch_ends(self.dry_run, [layer.module for layer in self.layers if not layer.skipped])

    # passes

    def _first_look(self) -> tuple[Products | None, Watch]:
        judged, products = own_of_root(self.dry_run), None
        if self.priors or any(is_uncertain(m) for m in self.dry_run.names):
            products = Products(self.dry_run.weights, judged, self.priors)
            self.backprop.is_due = False  # products are followed without
        watch = self._watch(products)
        if products is None and is_any_used_by_root(self.dry_run, watch):
            products = Products(self.dry_run.weights, judged, self.priors)
            self.backprop.is_due = False
            watch = self._watch(products)
        watch.products = None
        return products, watch

    def _watch(self, products: Products | None) -> Watch:
        watch = Watch(self.dry_run, self.options, products)
        watched = [m for m in self.dry_run.names if not is_scripted(m) and (m in watch.wanted or has_parameters(m))]
        if self.backprop.is_due:
            done = watch.fork()
            if self.backprop.can_see(
                lambda: done.run(watched, dict.fromkeys(watched, self.backprop.see), with_grad=True)
            ):
                return done
        watch.run(watched)
        return watch

    def look(
        self, layers: Iterable[Layer], when: str, also: Iterable[nn.Module] = (), backprop: Backprop | None = None
    ) -> None:
        """Measure what layers put out in a clean pass, `before` or `after`, and watch others for a call."""
        by_module = {layer.module: layer for layer in layers}
        measured: dict[nn.Module, Moments] = {}

        def see(module: nn.Module, call: Any, output: Any) -> None:
            if backprop is not None:
                backprop.see(module, call, output)
            if (y := first_tensor(output)) is not None:
                layer = by_module[module]
                channels = layer.channel_dim(y) if self.options.per_channel else None
                now = with_signal(y, channels, layer.careful, with_spread=when == "after")
                measured[module] = measured[module].merge(now) if module in measured else now

        after: dict[nn.Module, After] = dict.fromkeys(by_module, see)
        if backprop is not None:
            after.setdefault(self.dry_run.model, backprop.see)
        if by_module or also or when == "after":
            self.watch.run(also, after, with_grad=backprop is not None)
        seen = dict(zip(measured, fetched([*measured.values()]), strict=True))
        for module, layer in by_module.items():
            setattr(layer, when, seen.get(module))

    def _look_with_grad(self, layers: Sequence[Layer], also: Sequence[nn.Module], backprop: Backprop) -> bool:
        """Measure as ever, and have a gradient come through; return whether that can be done."""
        known, self.watch = self.watch, self.watch.fork()
        if not backprop.can_see(lambda: self.look(layers, "after", also, backprop)):
            self.watch = known
        return backprop.is_due

    def look_again(self, backprop: Backprop) -> tuple[list[Layer], list[Layer]]:
        """Measure the corrected network; return layers that run only now, and those that run no longer."""
        known = [x for x in self.layers if x.module in self.watch.seen]
        unseen = self._unseen()
        measured = [x for x in known if self.watch.seen[x.module].measured is not None]
        if not (backprop.is_due and self._look_with_grad(measured, unseen, backprop)):
            self.look(measured, "after", unseen)
        new = {layer.module: layer for layer in self._called(m for m in unseen if m in self.watch.seen)}
        for layer in new.values():
            layer.before, layer.after = None, layer.before
        mark_frozen([*new.values()], self.dry_run)
        mark_tied([*known, *new.values()], self.dry_run, self._only_shows)
        self.layers[:] = [*known, *new.values(), *(x for x in self.layers if x.module not in self.watch.seen)]
        asleep = [x for x in known if x.after is None and self.watch.seen[x.module].measured and not x.skipped]
        woken = [x for x in known if x.after is not None and x.skipped is Skip.NEVER_CALLED]
        for layer in woken:
            layer.skipped = None
        return [*(x for x in new.values() if not x.skipped), *woken], asleep

    def _unseen(self) -> list[nn.Module]:
        gone_by = self.watch.seen.keys() | self.watch.templates
        return [m for m in self.dry_run.names if m not in gone_by and not is_scripted(m) and has_parameters(m)]

    # rows

    def _called(self, modules: Iterable[nn.Module]) -> Iterator[Layer]:
        """Layers among modules that ran."""
        meant = None if self.options.modules is None else self._picked_by_user()
        for module in modules:
            is_wanted = self.watch.is_judged(module) if meant is None else module in meant and self._is_measured(module)
            if is_wanted:
                yield self._layer(module)

    def _is_measured(self, module: nn.Module) -> bool:
        seen = self.watch.seen[module]
        return self.watch.is_judged(module) and (seen.measured is not None or seen.is_transformed)

    def _picked_by_user(self) -> set[nn.Module]:
        """What the user chose; of the modules that a pattern matches, the layers if there are any."""
        patterns = names_in(self.options.modules)
        if not patterns:
            return self.watch.wanted
        picked: set[nn.Module] = set()
        for pattern in patterns:
            matched = chosen(self.dry_run.model, pattern)
            layers = [m for m in matched if self.watch.is_layer(m)] if is_pattern(pattern) else []
            picked.update(layers or matched)
        return picked

    def _never_called(self, used: set[Tensor]) -> Iterator[Layer]:
        by_default = self.options.modules is None
        scripted = [m for m in self.dry_run.names if is_scripted(m)]
        inside_scripted = {inner for m in scripted for inner in m.modules() if inner is not m}
        if self.products is not None:
            used |= self.products.all_multiplied
        for module, name in self.dry_run.names.items():
            if module in self.watch.seen or module in self.watch.excluded or not has_parameters(module):
                continue
            if is_scripted(module):
                if module in self.watch.wanted or (by_default and module not in inside_scripted):
                    yield Layer(name, module, None, target=self.options.target, skipped=Skip.SCRIPTED)
                continue
            is_template = module in self.watch.templates
            trains = any(p.requires_grad for p in module.parameters(recurse=False))
            adopted = (is_template and not trains) or any(p in used for p in self.dry_run.working(module).values())
            if module in self.watch.wanted or (by_default and isinstance(module, LISTED_TYPES) and not adopted):
                known = is_known_affine(module)
                affine = known_parameters(module, self.dry_run.working(module)) if known else None
                why = Skip.TRANSFORMED if is_template else Skip.NEVER_CALLED
                yield Layer(name, module, affine, target=self.options.target, skipped=why)

    def _layer(self, module: nn.Module) -> Layer:
        seen, watch = self.watch.seen[module], self.watch
        extreme = seen.measured is not None and not all(0 < std < torch.inf for std in seen.measured.std)
        layer = Layer(
            self.dry_run.names[module],
            module,
            seen.affine or seen.gain,
            n_calls=seen.n_calls,
            has_more_outputs=seen.has_more_outputs,
            eps=seen.eps,
            before=seen.measured,
            careful=extreme and seen.read_once,
            target=self.options.target,
        )
        if why := why_not(module, seen, is_chosen=module in watch.wanted):
            layer.skip(why)
        elif layer.affine is None:
            self._set_up_block(layer)
        first = next((m for m in watch.order if watch.is_layer(m)), None)
        layer.is_first = (layer.owner or module) is first
        if not layer.can_shift:
            layer.keep_mean(Note.NO_BIAS)
        if self.options.per_channel and (layer.is_block or layer.affine is None or layer.affine.channel_dim is None):
            layer.skip(layer.skipped or Skip.MODE)
        return layer

    def _set_up_block(self, block: Layer) -> None:
        block.is_block = True
        shown = self.dry_run.copy(block.module)  # its properties may be code of the user's
        block.exposed_bias = exposes_bias(shown)
        watch = self.watch
        inside = {m for _, m in named_modules(block.module)} - watch.excluded
        layers = [m for m in watch.order if m in inside and watch.seen[m].affine is not None]
        weight = getattr(shown, "weight", None)  # of a block: a property that exposes it
        exposed = [m for m in layers if watch.seen[m].affine.weight is weight]  # type: ignore[union-attr]
        own = self.dry_run.working(block.module)
        carriers = [p for which in watch.seen[block.module].multiplied for p in which]
        if layers:
            block.owner = (exposed or layers)[-1]
            block.affine = watch.seen[block.owner].affine
        elif isinstance(weight, nn.Parameter):  # a layer that does more than its type says
            block.affine = AffineParameters(own["weight"], own.get("bias"), matrices=(own["weight"],))  # type: ignore[arg-type]
        elif len(carriers) == 1:  # or whose weight is made from another
            block.affine = AffineParameters(carriers[0], own.get("bias"), matrices=(carriers[0],))
        else:
            block.skip(Skip.NO_AFFINE_LAYER)

    def _name_what_is_multiplied(self, products: Products) -> None:
        """See to it that each weight that meets the input belongs to a layer, corrected or not."""
        rows = {layer.module: layer for layer in self.layers}
        in_hand = {p for layer in self.layers for p in layer.touched}
        for which in products.multiplied:
            module, names = home_of(which, self.dry_run, self.watch.seen)
            if not which.isdisjoint(in_hand) or module is None or module in self.watch.excluded:
                continue
            if module not in rows:  # a table of entries that is a weight, too
                rows[module] = self._layer(module)
                self.layers.append(rows[module])
            rows[module].name_weights(names)

    def _only_shows(self, module: nn.Module, p: Tensor) -> bool:
        """Whether a module ran and has a parameter that it doesn't use itself: one of a layer inside it."""
        if self.products is None or module not in self.watch.seen or not is_uncertain(module):
            return False
        users = {self.dry_run.original(w): users for w, users in self.products.users.items()}
        return module not in users.get(p, set())
