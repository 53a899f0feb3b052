"""A forward pass as training will see it: everything restored afterwards, parameters rolled back on error."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastai_lsuv.core.errors import name_module_at_work
from fastai_lsuv.core.hooks import eagerly
from fastai_lsuv.core.modules import is_scripted, open_modules
from fastai_lsuv.learner.distributed import Ranks

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a forward


class RandomState:
    """The random streams of Python, numpy and torch (CPU, and each accelerator that is in use) at one moment."""

    def __init__(self) -> None:
        self.python = random.getstate()
        self.numpy = np.random.get_state() if (np := sys.modules.get("numpy")) else None
        self.torch = torch.get_rng_state()
        # asking for the state of a device that nobody has used yet would start it
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self.mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        """Put all streams back to that moment."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)


class ModuleState:
    """All that a forward pass may leave on a module and its children, parameters' values apart.

    Training flags, hidden states and caches are attributes, kept as they are bound (a list that the forward appends to
    keeps what is appended); buffers are kept by value, too.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in open_modules(root)]
        self.scripted = [(m, m.training) for m in root.modules() if is_scripted(m)]
        self.values = [(buffer, buffer.clone()) for buffer in root.buffers()]
        self.wanted: list[tuple[dict[str, Any], str, Any]] = []  # attributes that were changed on purpose

    def adopt(self, change: Callable[[], None]) -> None:
        """Make a change of attributes that later calls of `restore` leave in place."""
        before = [dict(attributes) for attributes in self._attributes()]
        change()
        for now, old in zip(self._attributes(), before, strict=True):
            self.wanted += [(now, key, value) for key, value in now.items() if old.get(key, self) is not value]

    def restore(self, adopted: bool = True) -> None:
        """Put everything back, but for adopted changes."""
        for module, attributes, parameters, buffers in self.modules:
            put_back(vars(module), attributes)
            put_back(module._parameters, parameters)
            put_back(module._buffers, buffers)
        for module, training in self.scripted:
            module.training = training
        with torch.no_grad():  # batch norm updates its statistics without a trace in their `_version`
            for buffer, value in self.values:
                buffer.copy_(value)
        for attributes, key, value in self.wanted if adopted else ():
            attributes[key] = value

    def _attributes(self) -> list[dict[str, Any]]:
        return [m.__dict__ for m, *_ in self.modules]


def put_back(current: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Give a dict the entries that it had, touching only what differs."""
    for name in current.keys() - saved.keys():
        del current[name]
    for name, value in saved.items():
        if name not in current or current[name] is not value:
            current[name] = value


class Undo:
    """First values of what is changed, so that all of it can be taken back: one copy of each changed weight."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._setters: dict[object, tuple[Callable[[Any], None], Any]] = {}

    def remember(self, tensor: Tensor) -> None:
        """Keep the value of `tensor`, if this is the first time."""
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = (tensor, tensor.detach().clone())

    def remember_value(self, key: object, value: Any, setter: Callable[[Any], None]) -> Any:
        """Keep a value that `setter` puts back, if this is the first time; returns the kept one."""
        return self._setters.setdefault(key, (setter, value))[1]

    def take_back(self, tensor: Tensor) -> bool:
        """Put one tensor back to its first value; returns whether it had another."""
        if id(tensor) not in self._tensors:
            return False
        first = self._tensors[id(tensor)][1]
        changed = not torch.equal(tensor, first)
        with torch.no_grad():
            tensor.copy_(first)  # also where they are equal: -0.0 and 0.0 are
        return changed

    def rollback(self) -> None:
        """Take everything back, to the bit; what can't be doesn't keep the rest from it."""
        with torch.no_grad(), ExitStack() as stack:
            for tensor, value in self._tensors.values():
                stack.callback(tensor.copy_, value)
            for setter, value in self._setters.values():
                stack.callback(setter, value)


class Rehearsal:
    """Forward passes of `model` on `batch` as training will see them, as a context manager.

    Eval mode, but normalisation layers use the batch's statistics as they will in training; no gradients. Every pass
    starts from the same random state, buffers and attributes, and at the end all of them are as before. If the block
    is left by an exception, parameters noted in `undo` are rolled back, and the error names the module at work.
    Of several ranks all begin with the parameters and buffers of rank 0.
    """

    def __init__(self, model: nn.Module, batch: Any, ranks: Ranks | None = None) -> None:
        self.model, self.ranks = model, ranks or Ranks()
        self.call = as_call(batch)
        self.undo, self._own = Undo(), Undo()  # of what is corrected, of what other ranks had
        self.n_forward = 0  # whole-model passes so far
        self._states: list[ModuleState] = []  # of the model, and of a module that runs again
        self.replaying = False  # a single module is being run again: hooks must not count that as a call

    def __enter__(self) -> Rehearsal:
        try:
            weights = [*self.model.parameters(), *self.model.buffers()]
            self.ranks.share("parameters and buffers", weights, self._own.remember)
        except BaseException:
            self._own.rollback()
            raise
        self._random, self._state = RandomState(), ModuleState(self.model)
        self._states = [self._state]
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        self._cache = torch.is_autocast_cache_enabled()
        try:
            self._norms = _norms_of_training(self.model)
        finally:
            self._state.restore()
        self._singles = [
            n.register_forward_pre_hook(_one_value_a_channel_uses_running_statistics, prepend=True)
            for n in self._norms
            if not is_scripted(n)
        ]
        torch.backends.mha.set_fastpath_enabled(False)  # training doesn't take it, nor its nested tensors
        torch.set_autocast_cache_enabled(False)  # it would hand out casts of weights as they were before a step
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with ExitStack() as stack:  # last in, first out, and each whatever becomes of the others
            if error is not None:
                stack.callback(self._own.rollback)
            stack.callback(torch.clear_autocast_cache)  # an enclosing autocast's is of weights that have changed
            stack.callback(torch.set_autocast_cache_enabled, self._cache)
            stack.callback(torch.backends.mha.set_fastpath_enabled, self._fastpath)
            stack.callback(self._random.restore)
            stack.callback(self._state.restore, adopted=error is None)
            for handle in self._singles:
                stack.callback(handle.remove)
            if error is not None:
                name_module_at_work(error, self.model)
                stack.callback(self.undo.rollback)

    def forward(self) -> None:
        """One pass of the whole model, from the state in which it was found."""
        self._state.restore()
        self._random.restore()
        self.model.eval()
        for norm in self._norms:
            norm.training = True
        args, kwargs = copied(self.call)
        with torch.no_grad(), eagerly():
            self.model(*args, **kwargs)
        self.n_forward += 1

    def adopt(self, change: Callable[[], None]) -> None:
        """Make a change of attributes, as `bias` properties do, that is to stay."""
        inner, *outer = reversed(self._states)
        for state in outer:
            inner, change = state, partial(inner.adopt, change)
        inner.adopt(change)

    @contextmanager
    def replay(self, module: nn.Module, unseen: bool = False) -> Iterator[Callable[[Call], Any]]:
        """Run one module again, on inputs of choice, from the same random state each time.

        Meant for a hook in the middle of a pass; the pass goes on from where it was. With `unseen`, no forward hook
        inside the module sees it: the user's keep what they have of the pass.
        """
        hooks = [(m, m._forward_hooks) for m in open_modules(module)] if unseen else []
        for m, _ in hooks:
            m._forward_hooks = OrderedDict()
        now, state = RandomState(), ModuleState(module)
        was, self.replaying = self.replaying, True
        self._states.append(state)

        def run(call: Call) -> Any:
            state.restore()
            now.restore()
            args, kwargs = copied(call)
            with torch.no_grad(), eagerly():
                return module(*args, **kwargs)

        try:
            yield run
        finally:
            self.replaying = was
            self._states.pop()
            state.restore()
            for m, kept in hooks:
                m._forward_hooks = kept
            now.restore()


def as_call(batch: Any) -> Call:
    """Arguments of the forward for a batch: a tensor, a tuple or list of inputs, or a mapping of keyword inputs."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def copied(call: Call) -> Call:
    """The same arguments with tensors of their own, safe from changes in place."""
    args, kwargs = tree_map(lambda o: o.clone() if isinstance(o, Tensor) else o, call)
    return tuple(args), dict(kwargs)


def _norms_of_training(model: nn.Module) -> list[nn.Module]:
    """Modules with running statistics that will use the batch's in training, models that freeze theirs respected."""
    model.train()
    statistics = {"running_mean", "running_var"}
    return [m for m in model.modules() if m.training and statistics & dict(m.named_buffers(recurse=False)).keys()]


def _one_value_a_channel_uses_running_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Training raises on a single value per channel, whose variance is undefined."""
    x = args[0] if args else None
    if isinstance(x, Tensor) and x.dim() > 1:
        has_statistics = any(norm._buffers.get(name) is not None for name in ("running_mean", "running_var"))
        norm.training = not has_statistics or x.numel() > _channel_groups(norm, x)


def _channel_groups(norm: nn.Module, x: Tensor) -> int:
    per_sample = isinstance(norm, nn.modules.instancenorm._InstanceNorm)
    return x.shape[0] * x.shape[1] if per_sample else x.shape[1]
