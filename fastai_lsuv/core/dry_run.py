"""Forward passes as training will see them, on copies of the model: the model itself is never at risk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fastai_lsuv.core.affine import get_bias, set_bias
from fastai_lsuv.core.bulk import on_host
from fastai_lsuv.core.copies import Memo, copied
from fastai_lsuv.core.errors import CannotRun, name_module_at_work
from fastai_lsuv.core.mode import as_in_training, prepend, set_mode, take_down, take_down_backward_hooks
from fastai_lsuv.core.modules import is_scripted, named_modules, open_modules, plain
from fastai_lsuv.core.random_state import RandomState, kept_random_state

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a forward
Before = Callable[[nn.Module, Call], None]
After = Callable[[nn.Module, Call, Any], Any]  # (module, call, output); what isn't None replaces the output
Run = Callable[[Call], Any]
Kept = tuple[dict[Tensor, Tensor], dict[nn.Module, Any]]  # values of weights, and biases that blocks expose
OnLayer = Callable[[], None]  # a module that a pass looks at has run


class DryRun:
    """Forward passes of copies of a model on copies of a batch, each from the state in which the model is.

    What a pass leaves behind goes with its copy; only the weights that are kept carry over from pass to pass, until
    `hand_over` gives them to the model. They are tensors of our own, here called the *working* weights.
    """

    def __init__(
        self, model: nn.Module, call: Call, as_it_stands: bool = False, with_grad: bool = False,
        on_layer: OnLayer | None = None,
    ) -> None:  # fmt: skip
        """`as_it_stands`: its modules are in the modes in which training calls them."""
        self._with_grad, self._on_layer = with_grad, on_layer
        self.model, self.call = plain(model), call
        frozen = [m for m in self.model.modules() if not m.training] if as_it_stands and model.training else []
        self.names = {module: name for name, module in named_modules(self.model)}
        self.n_forward = 0  # runs of the model so far
        self._random = RandomState()
        originals = [p for m in self.names if not is_scripted(m) for p in m._parameters.values() if p is not None]
        self._working = _copied_weights(originals)
        self._original = {working: original for original, working in self._working.items()}
        self._kept: set[Tensor] = set()  # working weights that have been given values of their own
        self.biases: dict[nn.Module, Any] = {}  # what blocks that expose a bias are to have in passes, and in the end
        self._copies: dict[nn.Module, nn.Module] = {}  # of all modules, in the pass at hand
        self._frozen = frozen  # modules that are in evaluation in training, too
        self._has_run = False
        self._next: nn.Module | None = None  # a copy for the pass to come

    # passes

    def forward(
        self,
        after: Mapping[nn.Module, After],
        before: Mapping[nn.Module, Before] | None = None,
        part: Callable[[Call], Call] | None = None,
        with_grad: bool = False,
    ) -> None:
        """Run a fresh copy of the model; `before` and `after` are called with the modules of the model itself.

        On the whole batch, or a part of it.
        """
        copy, before = self._fresh_copy(), before or {}
        self._random.restore()
        if with_grad:
            take_down_backward_hooks(copy)  # they are to see training's gradients only
        with as_in_training(self._with_grad or with_grad):
            for module in {**before, **after}:
                _Watched(self._copies[module], module, before.get(module), after.get(module), self._on_layer)
            args, kwargs = copied(part(self.call) if part else self.call)
            guard = register_module_forward_pre_hook(self._refuse_original)
            self.n_forward += 1
            try:
                copy(*args, **kwargs)
            except BaseException as error:
                name_module_at_work(error, {self._copies[m]: name for m, name in self.names.items()})
                raise
            finally:
                guard.remove()
                take_down(copy)
                for module in {**before, **after}:  # a cycle would keep it alive until the next garbage collection
                    del vars(self._copies[module])["forward"]
                self._copies = {}
        if not with_grad:  # behind one with, there is most likely no other
            self._next = self._copy_of_model()  # while a device is still at work

    def _refuse_original(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook of all modules there are: one of the model itself is not to run."""
        if module in self.names:
            raise CannotRun(f"the forward reaches {self.names[module]!r} of the model in a way that no copy can follow")

    def snapshot(self, module: nn.Module, with_hooks: bool = True) -> nn.Module:
        """Return a copy of a module as it is at this moment of the pass, on the working weights.

        Without their forward hooks, the user's see nothing of what it is run for.
        """
        snapshot = copied(self._copies[module], self._working_memo())
        for m in open_modules(snapshot):
            if getattr(vars(m).get("forward"), "__func__", None) is type(m).forward:
                del vars(m)["forward"]  # it was a watched one's; a cycle would keep all inputs alive
            if not with_hooks:
                m._forward_hooks = OrderedDict()
        return snapshot

    def copy(self, module: nn.Module) -> nn.Module:
        """Return a copy of a module as it is in the model, on the working weights."""
        return copied(module, {id(p): w for p, w in self._working.items()})

    @contextmanager
    def replay(self, module: nn.Module, snapshot: nn.Module) -> Iterator[Run]:
        """Run one module again, in the middle of a pass: each time as in the snapshot, from the same random state."""
        now = RandomState()

        def run(call: Call) -> Any:
            args, kwargs = copied(call)
            now.restore()
            copy = copied(snapshot, self._working_memo())
            try:
                return copy(*args, **kwargs)
            except Exception as error:
                prefix = self.names[module]
                name_module_at_work(error, {m: f"{prefix}.{name}".strip(".") for name, m in named_modules(copy)})
                raise

        with kept_random_state():
            yield run

    def _fresh_copy(self) -> nn.Module:
        """A copy of the model in the mode of training without dropout, on the working weights."""
        stale = [w for w in self._original if w not in self._kept] if self._has_run else []
        if stale:
            with torch.no_grad():  # a forward may have written to them
                torch._foreach_copy_(stale, [self._original[w] for w in stale])
        self._has_run = True
        copy, self._next = self._next or self._copy_of_model(), None
        in_copy = dict(named_modules(copy))
        self._copies = {module: in_copy[name] for module, name in self.names.items() if name in in_copy}
        for module, bias in self.biases.items():
            set_bias(self._copies[module], bias)
        set_mode(copy, [self._copies[m] for m in self._frozen if m in self._copies])
        return copy

    def _copy_of_model(self) -> nn.Module:
        try:
            return copied(self.model, {id(p): w for p, w in self._working.items()})
        except Exception as error:
            raise CannotRun(f"{type(self.model).__name__} can't be copied: {error}") from error

    def _working_memo(self) -> Memo:
        return {id(w): w for w in self._original}

    # weights

    def keep(self, weights: Iterable[Tensor]) -> None:
        """Have working weights carry over to later passes, and to the model in the end."""
        self._kept.update(weights)

    @property
    def weights(self) -> list[Tensor]:
        """All working weights."""
        return [*self._original]

    def working(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Return a module's own parameters as the passes use them, by name."""
        return {name: None if p is None else self._working[p] for name, p in module._parameters.items()}

    def running(self, module: nn.Module) -> nn.Module:
        """Return the copy of a module in the pass at hand."""
        return self._copies[module]

    def original(self, weight: Tensor) -> Tensor:
        """Return the model's parameter that a working weight stands for."""
        return self._original[weight]

    def put_back(self, weights: Sequence[Tensor]) -> bool:
        """Give working weights the model's values again; return whether any had others."""
        differ = on_host([(w != self._original[w]).any() for w in weights])
        for weight in weights:
            weight.data.copy_(self._original[weight])  # also where they are equal: -0.0 and 0.0 are
        self._kept.difference_update(weights)
        return any(differs for (differs,) in differ)

    def kept_state(self) -> Kept:
        """Return a copy of what is kept so far."""
        return {w: w.detach().clone() for w in self._kept}, {**self.biases}

    def begin_again(self) -> None:
        """Give up what is kept."""
        self.put_back([*self._kept])
        self.biases = {}

    def restore(self, kept: Kept) -> None:
        """Keep again what was kept once."""
        self.begin_again()
        values, self.biases = kept
        for w, value in values.items():
            w.data.copy_(value)
        self.keep(values)

    def hand_over(self) -> None:
        """Give the model what was kept: the weights in one call, which nothing interrupts halfway."""
        for name, p in self.model.named_parameters():
            if self._working.get(p) in self._kept and _is_expanded(p):
                raise RuntimeError(f"{name!r} can't be written to: it is expanded, several values are one in memory")
        first = {module: get_bias(module) for module in self.biases}
        try:
            for module, bias in self.biases.items():
                set_bias(module, bias)
            if self._kept:
                with torch.no_grad():
                    torch._foreach_copy_([self._original[w] for w in self._kept], list(self._kept))
        except BaseException:
            for module, bias in first.items():
                set_bias(module, bias)
            raise
        torch.clear_autocast_cache()  # an enclosing autocast's is of weights that have changed


class _Given:
    """Pre-hook: what a module is called with, before pre-hooks of the user's make something else of it."""

    call: Call | None = None

    def __call__(self, copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = (args, kwargs)

    def __deepcopy__(self, memo: Memo) -> _Given:
        return _Given()


class _Watched:
    """What a watched copy has for its forward: it reports each call, also one of `module.forward(…)` itself."""

    def __init__(
        self, copy: nn.Module, module: nn.Module, before: Before | None, after: After | None, on_layer: OnLayer | None
    ) -> None:
        self.forward: Any = copy.forward
        self.module, self.before, self.after, self.on_layer, self.given = module, before, after, on_layer, _Given()
        update_wrapper(self, copy.forward)
        vars(copy)["forward"] = self
        if before is not None:
            prepend(copy, self.given)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            self.before(self.module, self.given.call or (args, kwargs))
            self.given.call = None
        output = self.forward(*args, **kwargs)
        if self.after is None:
            return output
        with torch.no_grad():
            instead = self.after(self.module, (args, kwargs), output)
        if self.on_layer is not None:
            self.on_layer()
        return output if instead is None else instead

    def __deepcopy__(self, memo: Memo) -> Any:
        """A copy of a watched module isn't watched."""
        is_method = isinstance(self.forward, MethodType)
        return MethodType(self.forward.__func__, memo[id(self.forward.__self__)]) if is_method else self.forward


def _copied_weights(originals: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Copies of weights; those that are one in memory, though not one object, have one copy."""
    copies: dict[Any, Tensor] = {}
    place = {p: (p.data_ptr(), p.dtype, p.shape, p.stride()) if p.numel() else id(p) for p in originals}
    for p in originals:
        if place[p] not in copies:
            copies[place[p]] = copied(p)
    return {p: copies[place[p]] for p in originals}


def _is_expanded(t: Tensor) -> bool:
    return any(size > 1 and not stride for size, stride in zip(t.shape, t.stride(), strict=True))
