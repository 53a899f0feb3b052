"""Passes run on copies: whatever a forward leaves behind, the model and the batch are as they were."""

import copy
import dataclasses
import functools
import random
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
import torch.ao.quantization as tq
from audit import differences, fingerprint
from learners import digits, learner, ran
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import BertConfig, BertModel

from fastai_lsuv import LSUVCallback, lsuv_
from fastai_lsuv.core.copies import copied

MEASURE = {"mean": None, "std": None}


def x():
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(3))


class Keeping(nn.Module):
    "Two layers, and `kept`, which each forward changes and reads."

    def __init__(self, kept):
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(8, 8), nn.Linear(8, 3), kept

    def forward(self, x):
        return self.b(self.a(x).relu() * (1 + 0.1 * self.change(self.kept, x)))


class State:
    def __init__(self):
        self.n = 0


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


@dataclasses.dataclass
class Membrane:
    potential: object = 0.0
    spikes: list = dataclasses.field(default_factory=list)


def grow(kept, x):
    kept.append(float(x.mean()))
    return len(kept)


def count(kept, x):
    kept["calls"] = kept.get("calls", 0) + 1
    return kept["calls"]


def step(kept, x):
    kept.n += 1
    return kept.n


def fire(kept, x):
    kept.potential = kept.potential + 1.0
    kept.spikes.append(kept.potential)
    return kept.potential


def add(kept, x):
    kept.add(len(kept))
    return len(kept)


def write(kept, x):
    kept[0] += 1
    return float(kept[0])


def write_inner(kept, x):
    kept["layers"][0].append(1)
    return len(kept["layers"][0])


KEPT = {  # what is kept, how a forward changes it, what it is as plain values
    "list": (list, grow, list),
    "deque": (lambda: deque(maxlen=4), grow, list),
    "dict": (dict, count, dict),
    "ordered dict": (OrderedDict, count, dict),
    "counter": (Counter, count, dict),
    "default dict": (lambda: defaultdict(int), count, dict),
    "set": (set, add, set),
    "nested": (lambda: {"layers": ([],)}, write_inner, repr),
    "object": (State, step, lambda o: o.n),
    "slots": (Slotted, step, lambda o: o.n),
    "dataclass": (Membrane, fire, dataclasses.astuple),
    "tensor": (lambda: torch.zeros(1), write, torch.Tensor.tolist),
    "array": (lambda: np.zeros(2), write, np.ndarray.tolist),
    "bytes": (lambda: bytearray(2), write, bytes),
    "torch's generator": (
        lambda: torch.Generator().manual_seed(1),
        lambda g, x: torch.rand((), generator=g).item(),
        lambda g: g.get_state().tolist(),
    ),
    "Python's generator": (lambda: random.Random(1), lambda g, x: g.random(), random.Random.getstate),
    "numpy's generator": (
        lambda: np.random.default_rng(1),
        lambda g, x: float(g.random()),
        lambda g: str(g.bit_generator.state),
    ),
    "numpy's old generator": (
        lambda: np.random.RandomState(1),
        lambda g, x: float(g.rand()),
        lambda g: g.get_state()[2],
    ),
}


@pytest.mark.parametrize("options", [{}, MEASURE], ids=["corrected", "measured"])
@pytest.mark.parametrize("kind", KEPT)
def test_every_pass_begins_with_the_first_state_and_leaves_it(kind, options):
    make, change, plain = KEPT[kind]
    net = Keeping(make())
    net.change = change
    before = copy.deepcopy(plain(net.kept))
    report = lsuv_(net, x(), **options)
    assert plain(net.kept) == before
    assert net.kept is not None
    if not options:
        assert report.converged
        assert report.n_forward == 3


def untouched_but(net, batch, *moved, **options):
    "Run LSUV; nothing of the model is different but the parameters named."
    before = fingerprint(net)
    report = lsuv_(net, batch, **options)
    assert not differences(before, fingerprint(net), but=moved)
    return report


class ActNorm(nn.Module):
    "Sets its scale and shift from the first batch (Kingma & Dhariwal 2018)."

    def __init__(self, n):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.ready = False

    def forward(self, x):
        if not self.ready:
            self.scale.data.copy_(1 / x.std(0))
            self.shift.data.copy_(-x.mean(0) / x.std(0))
            self.ready = True
        return x * self.scale + self.shift


class Codebook(nn.Module):
    "Moves its codes towards what is near them, with every forward."

    def __init__(self, n):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(4, n), requires_grad=False)

    def forward(self, x):
        nearest = torch.cdist(x, self.codes).argmin(1)
        with torch.no_grad():
            self.codes.lerp_(x[:4], 0.1)
        return x + (self.codes[nearest] - x).detach()


class Momentum(nn.Module):
    "A key encoder that follows the query encoder, and a queue (He et al. 2020)."

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 4)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", torch.randn(16, 4))
        self.at = 0

    def forward(self, x):
        with torch.no_grad():
            for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                k.lerp_(q, 0.5)
            keys = self.key(x)
            self.queue[self.at : self.at + 4] = keys[:4]
            self.at = (self.at + 4) % 16
        return self.query(x) @ self.queue.t()


class Merging(nn.Module):
    "An adapter that is merged into the weight in evaluation."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            sign = -1 if mode else 1
            self.weight.data += sign * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x):
        y = x @ self.weight.t()
        return y if self.merged else y + x @ self.down.t() @ self.up.t()


class Late(nn.Module):
    "Makes a layer when it first runs, and a buffer that grows."

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), None
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        if self.second is None:
            self.second = nn.Linear(6, 3)
        self.seen = torch.cat([self.seen, x.mean()[None]])
        return self.second(self.first(x))


class Hooking(nn.Module):
    "Hangs a hook on a layer of its own, as transformers' models do."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.states = nn.Linear(8, 8), nn.Linear(8, 3), []

    def forward(self, x):
        self.a.register_forward_hook(lambda m, args, out: self.states.append(out))
        return self.b(self.a(x).relu())


WRITERS = {
    "max_norm": (lambda: nn.Sequential(nn.Embedding(50, 8, max_norm=1.0), nn.Flatten(), nn.Linear(40, 4)), "2"),
    "act norm": (lambda: nn.Sequential(nn.Linear(8, 8), ActNorm(8), nn.Linear(8, 3)), "0 2"),
    "codebook": (lambda: nn.Sequential(nn.Linear(8, 8), Codebook(8), nn.Linear(8, 3)), "0 2"),
    "momentum": (Momentum, "query"),
    "merging": (lambda: nn.Sequential(nn.Linear(8, 8), Merging(), nn.Linear(8, 3)), "0 1 2"),
    "late": (Late, "first"),
    "hooking": (Hooking, "a b"),
}


@pytest.mark.parametrize("options", [{}, MEASURE], ids=["corrected", "measured"])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_forward_writes_to_parameters_buffers_and_hooks_goes_with_the_copy(kind, options):
    make, layers = WRITERS[kind]
    net = make()
    batch = torch.randint(50, (32, 5)) if kind == "max_norm" else x()
    named = [n for n, _ in net.named_parameters() if n.rpartition(".")[0] in layers.split()]
    report = untouched_but(net, batch, *(() if options else named), **options)
    assert len(report) >= 1


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_a_transformer_that_collects_what_its_layers_put_out_collects_as_much_as_before(option):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = BertConfig(vocab_size=50, attn_implementation="eager", **sizes, **{option: True})
    net, ids = BertModel(config).eval(), torch.randint(3, 50, (2, 12))
    states = {"output_hidden_states": lambda out: out.hidden_states, "output_attentions": lambda out: out.attentions}

    def hooks():
        return sum(len(m._forward_hooks) for m in net.modules())

    before = hooks()
    lsuv_(net, dict(input_ids=ids))
    assert hooks() == before
    assert len(states[option](net(ids))) == 2 + (option == "output_hidden_states")


def test_graphs_for_training_and_evaluation_stay_what_they_were():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.b(nn.functional.dropout(self.a(x).relu(), 0.5, self.training))

    net = create_feature_extractor(Net(), ["b"]).train()
    assert lsuv_(net, x()).converged
    assert net.training
    assert not torch.equal(net(x())["b"], net(x())["b"]), "dropout is at work"
    net.eval()
    assert torch.equal(net(x())["b"], net(x())["b"])


def test_observers_of_quantisation_keep_their_sizes():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).train()
    net.qconfig = tq.get_default_qat_qconfig("fbgemm")
    tq.prepare_qat(net, inplace=True)
    untouched_but(net, torch.randn(32, 1, 8, 8), "0.weight", "0.bias", "3.weight", "3.bias")


class Graph:
    def __init__(self, x):
        self.x, self.layers = x, []


class OnGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, g):
        g.x = self.a(g.x).relu()
        g.layers.append(g.x)
        g.x = self.b(g.x)
        return g.x


@pytest.mark.parametrize("wrap", [lambda g: (g,), lambda g: {"g": g}, lambda g: [g]], ids=["tuple", "mapping", "list"])
def test_an_object_that_the_forward_writes_to_is_the_caller_s_and_as_it_was(wrap):
    graph = Graph(x())
    report = lsuv_(OnGraph(), wrap(graph))
    assert report.converged
    assert report.n_forward == 3
    assert torch.equal(graph.x, x())
    assert graph.layers == []


def test_inputs_that_are_written_to_in_place_are_as_they_were():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, inputs):
            inputs["x"].add_(1)
            inputs["seen"].append(1)
            return self.fc(inputs["x"])

    inputs = {"x": x(), "seen": []}
    lsuv_(Adds(), (inputs,))
    assert torch.equal(inputs["x"], x())
    assert inputs["seen"] == []


# --- how a model refers to its parts --------------------------------------------------------------------------------


class Referring(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.lock, self.data = nn.Linear(8, 8), nn.Linear(8, 3), threading.Lock(), TensorDataset(x())
        a, layers, me = self.a, {"a": [self.a]}, weakref.ref(self)
        self.run = {
            "method": self.first,
            "lambda over itself": lambda x: self.a(x),
            "closure over a layer": lambda x: a(x),
            "lambda with a default": lambda x, a=a: a(x),
            "closure over containers": lambda x: layers["a"][0](x),
            "partial": functools.partial(Referring.first, self),
            "partial of a layer": functools.partial(a),
            "decorated": functools.wraps(self.first)(lambda x: self.first(x)),
            "weak reference": lambda x: me().a(x),
            "list": [self.a],
        }[how]
        self.me = me

    def first(self, x):
        return self.a(x)

    def forward(self, x):
        run = self.run[0] if isinstance(self.run, list) else self.run
        return self.b(run(x).relu())


HOW = (
    "lambda with a default",
    "method",
    "lambda over itself",
    "closure over a layer",
    "closure over containers",
    "partial",
    "partial of a layer",
    "decorated",
    "list",
)


@pytest.mark.parametrize("how", HOW)
def test_however_a_model_refers_to_its_layers_the_copy_runs_its_own(how):
    net = Referring(how)
    report = untouched_but(net, x(), "a.weight", "a.bias", "b.weight", "b.bias")
    assert [row.status for row in report] == ["corrected", "corrected"]
    assert report.converged


def test_what_cannot_be_copied_or_is_data_is_shared():
    net = Referring("method")
    new = copied(net)
    assert new.lock is net.lock
    assert new.data is net.data
    assert new.me() is new
    assert new.a is not net.a
    assert torch.equal(new.a.weight, net.a.weight)


def test_tensors_that_are_no_leaves_are_copied_without_their_graph():
    net = nn.Linear(3, 3)
    net.result = net(torch.randn(2, 3))
    assert net.result.grad_fn is not None
    assert copied(net).result.grad_fn is None


def test_parts_that_are_one_object_are_one_in_the_copy():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    net.again, net.weight = [layer], layer.weight
    new = copied(net)
    assert new[0] is new[2] is new.again[0]
    assert new.weight is new[0].weight is not layer.weight


def test_a_model_that_refers_to_itself_is_copied():
    net = nn.Sequential(nn.Linear(3, 3))
    net.myself = [net]
    assert copied(net).myself[0][0] is not net[0]


def test_a_compiled_or_replicated_model_is_copied_as_a_plain_one():
    net = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Linear(3, 3)))
    assert type(copied(net)[1]) is nn.Linear
    for wrapped in (torch.compile(net), nn.DataParallel(net), nn.DataParallel(torch.compile(net))):
        assert type(copied(wrapped)) is nn.Sequential


def test_a_module_is_copied_whatever_it_says_about_copies():
    class Refuses(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is only one of me")

    class Shares(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    class Drops(nn.Linear):
        def __getstate__(self):
            return {k: v for k, v in vars(self).items() if k != "scale"}

        def forward(self, x):
            return super().forward(x) * self.scale

    net = nn.Sequential(Refuses(8, 8), Shares(8, 8), Drops(8, 3))
    net[2].scale = 2.0
    report = untouched_but(net, x(), *(n for n, _ in net.named_parameters()))
    assert [row.status for row in report] == ["corrected"] * 3


class Singleton:
    "There is one, whoever asks for it."

    one = None

    def __new__(cls):
        cls.one = cls.one or super().__new__(cls)
        return cls.one


def test_an_object_of_which_there_is_one_stays_the_one():
    net = nn.Linear(8, 3)
    net.registry, net.registry.layer = Singleton(), net
    lsuv_(net, x())
    assert Singleton.one.layer is net


GLOBAL = nn.Linear(8, 8)


class ByGlobalName(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = GLOBAL, nn.Linear(8, 3)

    def forward(self, x):
        return self.b(GLOBAL(x))


def test_layers_that_no_copy_can_follow_are_not_run_behind_the_user_s_back():
    net = ByGlobalName()
    before = fingerprint(net)
    with pytest.raises(RuntimeError, match="reaches 'a' of the model"):
        lsuv_(net, x())
    assert not differences(before, fingerprint(net))


@pytest.mark.cpu  # fastai's Recorder keeps its losses there, where these tests make everything
def test_such_a_network_is_trained_without(capsys):
    learn = learner(digits(64, 16), nn.Sequential(nn.Flatten(), nn.Linear(64, 8), ByGlobalName(), nn.Linear(3, 10)))
    learn.fit(1, cbs=LSUVCallback())
    assert not ran(learn)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "LSUV" in line]
    assert line.startswith("LSUV: not run, because the forward reaches '2.a'")


def test_buffers_of_parametrizations_stay_what_they_were():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    untouched_but(net, x(), *(n for n, _ in net.named_parameters()))


def test_weights_that_are_one_in_memory_are_one_in_the_copy():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight.data = net[0].weight.data
    report = lsuv_(net, x())
    assert report["2"].reason == "tied weight"
    assert report["2"].std_after == pytest.approx(net(x()).std().item(), rel=1e-5)


class Forces(nn.Module):
    "Asks autograd for the slope of its own energy (Hamiltonian networks, force fields)."

    def __init__(self, layers):
        super().__init__()
        self.net = layers

    def forward(self, x):
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


class Own(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_in, n_out))

    def forward(self, x):
        return x @ self.w


@pytest.mark.parametrize("kind", [nn.Linear, Own])
def test_a_forward_that_needs_gradients_gets_them(kind):
    net = Forces(nn.Sequential(kind(8, 32), nn.Tanh(), kind(32, 1)))
    report = lsuv_(net, x())
    assert report["net.0"].status == "corrected"
    assert net.net[0](x()).std().item() == pytest.approx(1, abs=1e-3)
    assert all(p.grad is None for p in net.parameters())


def test_a_fit_s_hooks_of_the_user_s_are_seen_by_the_user():
    "A closure's own list is no part of the model: what a hook notes in it is noted in each pass, as ever."
    net, seen = nn.Sequential(nn.Linear(8, 3)), []
    net[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    report = lsuv_(net, x())
    assert len(seen) == report.n_forward == 3
