"""What is left after LSUV: nothing but changed weights, on the model, in what is saved of it, and in memory."""

import copy
import gc
import pickle
import sys
import types
from collections import Counter, OrderedDict

import pytest
import torch
from audit import HOOKS
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.text.models.awdlstm import WeightDropout
from fastai.vision.all import CrossEntropyLossFlat, MixUp, SaveModelCallback, xresnet18
from learners import digits, learner, ran, small_cnn
from models import Residual, Shared, mlp, old_weight_norm, rows
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader as TorchLoader

from fastai_lsuv import LSUVCallback, lsuv_

# --- nothing on the model ---------------------------------------------------------------------------------------------


def images_as_rows(*layers):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), *layers)


MODELS = {
    "plain": small_cnn,
    "batch norm": lambda: small_cnn(nn.BatchNorm2d),
    "xresnet": lambda: xresnet18(n_out=10, c_in=1),
    "shared": lambda: images_as_rows(nn.ReLU(inplace=True), Shared(), nn.Linear(3, 10)),
    "weight norm": lambda: images_as_rows(nn.ReLU(), old_weight_norm(nn.Linear(10, 10))),
    "parametrized": lambda: images_as_rows(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(10, 10))),
    "residual": lambda: images_as_rows(Residual(nn.Linear(10, 10), nn.ReLU(inplace=True), nn.Linear(10, 10))),
    "attention": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Linear(64, 16),
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        nn.Flatten(),
        nn.Linear(16, 10),
    ),
    "recurrent": lambda: nn.Sequential(
        nn.Flatten(1, 2), WeightDropout(nn.LSTM(8, 8, batch_first=True), 0.2), Last(), nn.Linear(8, 10)
    ),
}
OPTIONS = {
    "plainly": {},
    "by channel": {"per_channel": True},
    "orthogonal": {"init": nn.init.orthogonal_},
    "children": {"modules": nn.Module.children},
}
CASES = [
    *((m, "plainly") for m in MODELS),
    *(("batch norm", o) for o in OPTIONS if o != "plainly"),
    ("residual", "children"),
]


class Last(nn.Module):
    def forward(self, out):
        return out[0][:, -1]


def fitted(model, cbs=None, init=None, epochs=1, **kwargs):
    learn = learner(digits(64, 16, **kwargs), MODELS[model]() if isinstance(model, str) else model, cbs=cbs)
    if init is not None:
        learn.lsuv_init(**init)
    if epochs:
        learn.fit(epochs)
    return learn


def skin(model):
    "All that hangs on modules, parameters, buffers: names, kinds, numbers of hooks; of plain values the value itself."
    for name, m in model.named_modules(remove_duplicate=False):
        for key, value in vars(m).items():
            yield (
                name,
                key,
                type(value),
                len(value or ())
                if key in HOOKS or isinstance(value, (dict, OrderedDict, list, set))
                else value
                if isinstance(value, (str, int, float))
                else None,
            )
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        yield (
            name,
            type(t),
            sorted(vars(t)),
            t.requires_grad,
            t.is_leaf,
            t.grad is None,
            t.stride(),
            t.storage_offset(),
            t.untyped_storage().nbytes(),
            t._backward_hooks and len(t._backward_hooks),
        )
        yield name, t._post_accumulate_grad_hooks and len(t._post_accumulate_grad_hooks)


@pytest.mark.parametrize(("model", "options"), CASES)
@pytest.mark.parametrize("how", ["callback", "lsuv_init"])
def test_nothing_hangs_on_the_model(model, options, how):
    "Hook dictionaries of all kinds, attributes, parameters and their attributes: as after a fit without."
    done = fitted(
        model,
        LSUVCallback(**OPTIONS[options]) if how == "callback" else None,
        OPTIONS[options] if how == "lsuv_init" else None,
    )
    assert ran(done)
    assert list(skin(done.model)) == list(skin(fitted(model).model))


def test_nor_where_it_declined_or_was_never_reached():
    plainly = list(skin(fitted("plain").model))
    loaded = learner(digits(64, 16), small_cnn(), cbs=LSUVCallback())
    loaded.model.load_state_dict(small_cnn().state_dict())
    loaded.fit(1)
    assert not ran(loaded)
    removed = learner(digits(64, 16), small_cnn(), cbs=(cb := LSUVCallback()))
    removed.remove_cb(cb)
    removed.fit(1)
    assert not ran(removed)
    for learn in (loaded, removed):
        assert list(skin(learn.model)) == plainly


def reachable(root):
    "All objects that `root` leads to, not through what all share: classes, modules of code, globals of functions."
    seen, todo = {id(root): root}, [root]
    while todo:
        o = todo.pop()
        refs = [o.__closure__, o.__defaults__, o.__dict__] if isinstance(o, types.FunctionType) else gc.get_referents(o)
        for r in refs:
            if id(r) not in seen and not isinstance(r, (type, types.ModuleType, types.BuiltinFunctionType)):
                seen[id(r)] = r
                todo.append(r)
    return list(seen.values())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("epochs", [0, 1])
def test_the_model_leads_to_no_learner_no_data_and_nothing_of_ours(model, epochs):
    learn = fitted(model, LSUVCallback(), epochs=epochs)
    found = [o for o in reachable(learn.model) if isinstance(o, (Learner, Callback, DataLoaders, DataLoader))]
    assert not found, {type(o).__name__ for o in found}
    if epochs:
        assert not [
            o
            for o in reachable(learn.model)
            if type(o).__module__.split(".")[0] == "fastai_lsuv" or getattr(o, "__module__", None) == "fastai_lsuv"
        ]


def test_that_search_finds_what_is_there():
    learn = fitted("plain", LSUVCallback(), epochs=0)
    learn.model[0].register_forward_hook(lambda *args: learn and None)
    assert [o for o in reachable(learn.model) if o is learn]


# --- nothing in what is saved of it -----------------------------------------------------------------------------------


class Keeper(Callback):
    "Keeps all inputs."

    def before_fit(self):
        self.seen = []

    def before_batch(self):
        self.seen.append(self.learn.xb[0].clone())


def saved(o, path):
    torch.save(o, path / "o.pth")
    return (path / "o.pth").stat().st_size


@pytest.mark.cpu  # in pickles, storages of a GPU have names of varying length
@pytest.mark.parametrize("model", ["plain", "batch norm", "attention", "residual", "shared"])
@pytest.mark.parametrize("how", ["callback", "lsuv_init"])
def test_copies_of_the_model_are_as_large_as_without(model, how, tmp_path):
    done, plainly = (
        fitted(model, LSUVCallback() if how == "callback" else None, {} if how == "lsuv_init" else None),
        fitted(model),
    )
    for size in (
        lambda m: len(pickle.dumps(m)),
        lambda m: saved(m, tmp_path),
        lambda m: len(pickle.dumps(copy.deepcopy(m))),
        lambda m: saved(m.state_dict(), tmp_path),
    ):
        assert size(done.model) == size(plainly.model)
    learners = count(Learner)
    twin = copy.deepcopy(done.model)
    assert count(Learner) == learners, "copied a Learner with the model"
    assert len(reachable(twin)) <= len(reachable(copy.deepcopy(plainly.model)))


@pytest.mark.parametrize(
    "cbs",
    [lambda: [LSUVCallback()], lambda: [LSUVCallback(), SaveModelCallback()]],
    ids=["alone", "with another that saves"],
)
def test_an_export_holds_no_batch(cbs, tmp_path):
    "As large whatever the batches, and without the bytes of any."
    sizes = {}
    for bs in (8, 96):
        learn = learner(digits(128, bs), small_cnn(), path=tmp_path, cbs=cbs())
        learn.fit(1, cbs=(keeper := Keeper()))
        learn.lsuv_init()
        learn.export()
        raw = (tmp_path / "export.pkl").read_bytes()
        assert not [x for batch in keeper.seen for x in batch if x.cpu().numpy().tobytes()[64:192] in raw], (
            "an image of a batch"
        )
        sizes[bs] = len(raw)
    assert abs(sizes[96] - sizes[8]) < 64


# --- nothing in memory ------------------------------------------------------------------------------------------------


def count(*kinds):
    "How many objects of each kind are alive."
    gc.collect()
    found = [type(o) for o in gc.get_objects()]
    return [sum(issubclass(t, kind) for t in found) for kind in kinds]


class Few:
    n_inp = 1

    def __init__(self):
        self.x = torch.randn(8, 10)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.x[i], i % 3


def one_learner(how):
    torch.manual_seed(3)
    learn = learner(
        DataLoaders(DataLoader(Few(), bs=8), DataLoader(Few(), bs=8)),
        mlp(10, 8, 8, 3),
        metrics=[],
        loss_func=CrossEntropyLossFlat(),
        cbs=None if how in ("plain", "lsuv_init") else LSUVCallback(verbose=False),
    )
    if how == "lsuv_init":
        learn.lsuv_init()
    if how in ("plain", "one step"):
        learn.fit(1)
    if how == "declined":
        learn.model.load_state_dict(learn.model.state_dict())
        learn.fit(1)
    if how == "failed":
        learn.model.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn.fit(1)


def population():
    gc.collect()
    return Counter(type(o).__qualname__ for o in gc.get_objects())


@pytest.mark.parametrize("how", ["made", "lsuv_init", "one step", "declined", "failed"])
def test_100_learners_made_and_dropped_leave_nothing(how, nothing_left_behind):
    "Live objects of every kind, and the memory that our code holds: as many after 100 as after a few."

    def cohort(n):
        for _ in range(n):
            one_learner(how)
        nothing_left_behind.clear()  # the check after each test keeps hooked modules alive
        return population(), sys.getallocatedblocks()

    cohort(5)
    (before, blocks), (after, more) = cohort(3), cohort(100)
    grown = {k: n - before[k] for k, n in after.items() if n - before[k] >= 10}
    assert not grown, "objects that stay"
    assert more - blocks < 1_000, "memory that stays, ten objects a Learner"


@pytest.mark.parametrize("how", ["made", "lsuv_init", "one step"])
def test_a_dropped_learner_is_gone(how, nothing_left_behind):
    nothing_left_behind.clear()
    before = count(Learner, nn.Module, torch.Tensor)
    one_learner(how)
    nothing_left_behind.clear()
    assert count(Learner, nn.Module, torch.Tensor) == before


class Storages(TorchDispatchMode):
    "The bytes of the tensors that operations made, but for `known` ones and their views: those alive, most at a time."

    def __init__(self, known):
        super().__init__()
        self.alive, self.peak = {}, 0
        self.known = [StorageWeakRef(t.untyped_storage()) for t in known]
        self.addresses = {ref.cdata for ref in self.known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.note(t.untyped_storage())
        self.peak = max(self.peak, self.held())
        return out

    def note(self, storage):
        ref = StorageWeakRef(storage)
        if ref.cdata not in self.addresses:
            self.alive.setdefault(ref.cdata, (ref, storage.nbytes()))

    def held(self):
        self.alive = {k: (ref, n) for k, (ref, n) in self.alive.items() if not ref.expired()}
        return sum(n for _, n in self.alive.values())


def peak(net, *inputs, f):
    "Most bytes in tensors made while `f` ran, and what is left of them."
    with Storages([*net.parameters(), *net.buffers(), *inputs]) as mode:
        f()
    gc.collect()
    return mode.peak, mode.held()


def deep(width=192, depth=16, frozen=0, norm=False):
    torch.manual_seed(1)
    layers = [
        nn.Sequential(nn.Linear(width, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU(inplace=True))
        for _ in range(depth)
    ]
    net = nn.Sequential(*layers)
    for layer in net[:frozen]:
        layer.requires_grad_(False)
    return net


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


MEMORY = {
    "plainly": ({}, {}),
    "half of it frozen": ({"frozen": 8}, {}),
    "by channel": ({}, {"per_channel": True}),
    "batch norms": ({"norm": True}, {}),
    "an initialiser": ({}, {"init": nn.init.normal_}),
    "measured only": ({}, {"mean": None, "std": None}),
    "some layers": ({}, {"modules": ["0.*", "1.*", "2.*", "3.*"]}),
    "blocks": ({}, {"modules": nn.Module.children}),
}


@pytest.mark.parametrize("case", MEMORY)
def test_one_copy_of_the_weights_and_a_few_activations(case):
    "Passes run on a copy of the model; nothing else grows with it but a few samples, through which a gradient comes."
    arguments, options = MEMORY[case]
    net, x = deep(**arguments), rows(96, 192)
    weights, activation, layer = size(net.parameters()), size([x]), size(net[0][0].parameters())
    with torch.no_grad():
        forward, _ = peak(net, x, f=lambda: net(x))
    most, left = peak(net, x, f=lambda: lsuv_(net, x, **options))
    buffers = size(net.buffers())
    assert most - forward <= weights + buffers + 6 * activation + 2 * layer, (
        f"{(most - forward) / weights:.2f} copies of the weights"
    )
    assert left == 0, "the report holds no tensor, the model none beyond its own"
    assert most - forward >= 0.9 * weights, "not the copy that passes run on: does the probe see tensors at all?"


@pytest.mark.parametrize("given", [True, False], ids=["a batch", "from the loader"])
def test_a_learner_needs_copies_of_the_batch_beyond_that(given, monkeypatch):
    "It is fetched, moved, tried on callbacks and fed: some copies, whatever the model's depth."
    monkeypatch.undo()  # what looks for hooks keeps each model alive that has had one, the pilot's copy among them
    net, x = deep(), rows(96, 192)
    batch = x, torch.arange(96) % 3
    learn = learner(DataLoaders(*(TorchLoader([*zip(*batch)], 96) for _ in range(2))), net, metrics=[], cbs=MixUp())
    with torch.no_grad():
        forward, _ = peak(net, x, f=lambda: net(x))
    most, left = peak(net, *batch, f=lambda: learn.lsuv_init(batch=batch if given else None))
    assert 0.9 * size(net.parameters()) <= most - forward <= size(net.parameters()) + 10 * size(batch)
    assert left < 100, "no batch"


def test_the_memory_of_a_rolled_back_run_is_free_again():
    net, x = deep(), rows(64, 192)
    net.append(nn.Linear(7, 3))

    def run():
        with pytest.raises(RuntimeError):
            lsuv_(net, x)

    assert peak(net, x, f=run)[1] == 0
