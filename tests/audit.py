"""Independent measurement, nothing of ours imported: what layers really put out, and what a model is to the bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_map_only

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)


@dataclass
class Record:
    "What one affine layer put out in one clean pass: `mean` and `std` over all its calls, the same by output channel."

    name: str
    module: nn.Module
    has_bias: bool
    n_calls: int = 0
    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    all_alike: bool = True  # all samples, where there are several
    channel_n: int = 0
    channel_mean: torch.Tensor | None = None
    channel_m2: torch.Tensor | None = None

    @property
    def std(self):
        return (self.m2 / (self.n - 1)) ** 0.5 if self.n > 1 else float("nan")

    @property
    def channel_std(self):
        return (self.channel_m2 / (self.channel_n - 1)).sqrt()

    @property
    def finite(self):
        return bool(np.isfinite(self.mean) and np.isfinite(self.m2))

    @property
    def constant(self):
        "Whether the output does not depend on the input: the same for every sample or, but for rounding, everywhere."
        if self.all_alike:
            return True
        if self.channel_n > 1:
            return bool((self.channel_std <= 1e-6 * self.channel_mean.abs()).all())
        return self.n > 1 and self.std <= 1e-6 * abs(self.mean)

    def add(self, out):
        "Merge one call's output (Chan et al. 1979), in float64."
        out = first_tensor(out).detach().double()
        self.n_calls += 1
        if not out.numel():
            return  # a head that was shown nothing
        self.all_alike &= len(out) > 1 and bool((out == out[:1]).all())
        n, mean = out.numel(), out.mean().item()
        m2 = (out - mean).square().sum().item()
        delta, total = mean - self.mean, self.n + n
        self.mean, self.m2 = self.mean + delta * n / total, self.m2 + m2 + delta * delta * self.n * n / total
        self.n = total
        self._add_channels(by_channel(self.module, out))

    def _add_channels(self, out):
        n, mean = out.shape[1], out.mean(1)
        m2 = (out - mean[:, None]).square().sum(1)
        if self.channel_mean is None:
            self.channel_n, self.channel_mean, self.channel_m2 = n, mean, m2
        else:
            delta, total = mean - self.channel_mean, self.channel_n + n
            self.channel_m2 = self.channel_m2 + m2 + delta.square() * (self.channel_n * n / total)
            self.channel_mean, self.channel_n = self.channel_mean + delta * n / total, total


def by_channel(module, out):
    "`out` as channels × values: the last axis of a `Linear`, the one before the spatial axes of a convolution."
    if isinstance(module, nn.Linear):
        return out.reshape(-1, out.shape[-1]).T
    axis = out.dim() - 1 - (module.weight.dim() - 2)
    return out.movedim(axis, 0).flatten(1)


def first_tensor(out):
    "The first tensor of an output: tuple, list, mapping, nested."
    if isinstance(out, torch.Tensor):
        return out
    for o in out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else ():
        if (t := first_tensor(o)) is not None:
            return t
    return None


def call(model, batch):
    "The model on the inputs `batch`, brought to its device: a tensor, a tuple or list of arguments, or keywords."
    if isinstance(batch, Mapping):
        return model(**beside(model, dict(batch)))
    batch = beside(model, batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def beside(model, o):
    "`o` with all of its tensors on the model's device."
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), None)
    return o if device is None else tree_map_only(torch.Tensor, lambda t: t.to(device), o)


def audit(model, batch, *, channels=True) -> list[Record]:
    "One clean pass as training sees it; a record for each affine layer that ran, in the order of their first calls."
    records, handles = {}, []

    def watch(name, m):
        def hook(m, args, out):
            if m not in records:
                records[m] = Record(name, m, m.bias is not None)
            records[m].add(out)

        handles.append(m.register_forward_hook(hook, prepend=True))

    for name, m in model.named_modules():
        if isinstance(m, AFFINE):
            watch(name, m)
    try:
        with as_in_training(model):
            call(model, batch)
    finally:
        for h in handles:
            h.remove()
    return list(records.values())


def n_calls(model, batch, modules) -> dict[nn.Module, int]:
    "How often the forward of each of `modules` runs in a clean pass."
    counts, handles = dict.fromkeys(modules, 0), []
    if not counts:
        return counts

    def watch(m):
        def hook(m, args):
            counts[m] += 1

        handles.append(m.register_forward_pre_hook(hook))

    for m in counts:
        watch(m)
    try:
        with as_in_training(model):
            call(model, batch)
    finally:
        for h in handles:
            h.remove()
    return counts


def outputs_of(model, batch, names) -> dict[str, tuple[float, float]]:
    "(mean, std) of the first tensor that each named module gives out, over all its calls, in a clean pass."
    seen, handles = {}, []
    if not names:
        return {}

    def watch(name):
        hook = lambda m, args, out: seen.setdefault(name, []).append(
            first_tensor(out).detach().double().flatten().clone()
        )
        handles.append(model.get_submodule(name).register_forward_hook(hook, prepend=True))

    for name in names:
        watch(name)
    try:
        with as_in_training(model):
            call(model, batch)
    finally:
        for h in handles:
            h.remove()
    return {name: (torch.cat(o).mean().item(), torch.cat(o).std().item()) for name, o in seen.items()}


@contextmanager
def as_in_training(model):
    """Eval mode, norms with running statistics on the batch's own, no fast path for inference.

    Attributes (training flags, hidden states), buffers and random streams are as before afterwards."""
    attributes = [(m, dict(vars(m))) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    flags = [(m, m.training) for m in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    buffers = [(b, b.clone()) for b in model.buffers()]
    rng, handles = rng_state(), []
    model.eval()
    for m in model.modules():
        if isinstance(m, _NormBase) and m.running_mean is not None:
            handles.append(m.register_forward_pre_hook(_batch_statistics))
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for h in handles:
            h.remove()
        for m, old in attributes:
            for key in vars(m).keys() - old.keys():
                delattr(m, key)
            vars(m).update(old)
        for m, training in flags:
            m.training = training
        with torch.no_grad():
            for b, old in buffers:
                b.copy_(old)
        set_rng_state(rng)


def _batch_statistics(m, args):
    "A norm layer with one value per channel has no batch statistics: it keeps to its running ones."
    x = args[0]
    m.training = x.numel() // x.shape[1] > 1 if x.dim() > 1 else False


def rng_state():
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpus


def set_rng_state(state):
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    torch.cuda.set_rng_state_all(state[3])


def rng_print():
    "All random streams as one comparable value."
    py, (kind, keys, *rest), cpu, on_gpus = rng_state()
    return py, kind, keys.tobytes(), tuple(rest), *(t.numpy().tobytes() for t in (cpu, *on_gpus))


def bits(t):
    "A tensor to the bit, wherever it is: type, dtype, shape, memory layout and bytes."
    if t is None or isinstance(t, UninitializedParameter):
        return type(t)
    raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return type(t), t.dtype, tuple(t.shape), t.stride(), raw


def fingerprint(model) -> dict:
    "All that tells a model: values to the bit, flags, gradients, hooks, attributes and which objects they are."
    prints = {}
    for name, m in model.named_modules(remove_duplicate=False):
        prints["module", name] = Is(m), type(m), m.training
        for key, value in vars(m).items():
            if key in HOOKS:
                prints["hooks", name, key] = [(k, Is(v)) for k, v in (value or {}).items()]
            elif key in ("_parameters", "_buffers", "_modules"):
                prints["keys", name, key] = list(value)
            else:
                prints["attr", name, key] = value if isinstance(value, PLAIN) else Is(value)
    for name, p in model.named_parameters(remove_duplicate=False):
        prints["param", name] = Is(p), bits(p)
        prints["requires_grad", name] = p.requires_grad, p.is_leaf
        prints["grad", name] = None if p.grad is None else (Is(p.grad), bits(p.grad))
        if not isinstance(p, UninitializedParameter):
            prints["layout", name] = p.dtype, p.device, tuple(p.shape), p.stride()
    for name, b in model.named_buffers(remove_duplicate=False):
        prints["buffer", name] = Is(b), b.device, bits(b)
    return prints


class Is:
    "Equal to nothing but the same object, which it keeps alive so that no other takes its address."

    def __init__(self, o):
        self.o = o

    def __eq__(self, other):
        return isinstance(other, Is) and self.o is other.o

    def __hash__(self):
        return id(self.o)

    def __repr__(self):
        return f"<{type(self.o).__name__} at {id(self.o):x}>"


def differences(before: dict, after: dict, but=()) -> list:
    "Keys of two fingerprints that differ; values of parameters named in `but` may (the object must be the same)."
    out = []
    for key in dict.fromkeys(itertools.chain(before, after)):
        old, new = before.get(key), after.get(key)
        if key[0] == "param" and key[1] in but:
            old, new = old and old[0], new and new[0]
        if old != new:
            out.append(key)
    return out


def parameter_bits(model):
    return {n: bits(p) for n, p in model.named_parameters(remove_duplicate=False)}


def moved(before: dict, model) -> set[str]:
    "Names of the parameters whose bits are no longer those in `before` (from `parameter_bits`)."
    now = parameter_bits(model)
    assert before.keys() == now.keys()
    return {n for n in now if now[n] != before[n]}


@contextmanager
def watching_affine(model, saw):
    "Call `saw(name, out)` with each affine layer's output, before anything that works in place can touch it."
    handles = [
        m.register_forward_hook(lambda m, args, out, name=name: saw(name, first_tensor(out)), prepend=True)
        for name, m in model.named_modules()
        if isinstance(m, AFFINE)
    ]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def signal(model, batch) -> dict[str, float]:
    """The share of each affine layer's std that is due to the input, by name, in the order in which they run.

    It is the std over the batch at the same place (root mean square over the places) over the std of all values: 0
    where all samples look the same. A layer's calls are taken together; a batch of one has none (NaN)."""
    seen = {}

    def saw(name, out):
        seen.setdefault(name, []).append(out.detach().double().flatten(1))

    with watching_affine(model, saw), as_in_training(model):
        call(model, batch)
    places = {name: torch.cat(calls, 1) for name, calls in seen.items()}
    return {n: (y.var(0).mean() / y.var()).sqrt().item() if len(y) > 1 else np.nan for n, y in places.items()}


def elasticity(model, batch, seed=0) -> dict[str, float]:
    """How much larger a small relative change of each affine layer's output is once it arrives at the model's, by name.

    It is |g| |y| / (|v| |out|) for a layer's output y, a random direction v and the gradient g of <out, v> at y. A
    layer's calls are taken together; a layer that the output does not depend on has 0."""
    edges, norms = {}, {}

    def saw(name, out):
        edges.setdefault(name, []).append(torch.autograd.graph.get_gradient_edge(out))
        norms.setdefault(name, []).append(out.detach().double().norm().item())

    with as_in_training(model), torch.enable_grad():
        with watching_affine(model, saw):
            out = first_tensor(call(model, batch))
        v = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
        every = [edge for calls in edges.values() for edge in calls]
        grads = iter(torch.autograd.grad(out, every, v, allow_unused=True))
    found, scale = {}, (v.double().norm() * out.detach().double().norm()).item()
    for name, calls in norms.items():
        g = [0.0 if grad is None else grad.double().norm().item() for grad in itertools.islice(grads, len(calls))]
        found[name] = float(np.linalg.norm(g) * np.linalg.norm(calls) / scale)
    return found
