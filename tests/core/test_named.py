"""Whatever a forward multiplies its input by belongs to a row: corrected, or named, for a reason that is true."""

import pytest
import torch
import torch.nn.functional as F
from audit import moved, outputs_of, parameter_bits
from torch import nn
from torch.nn.utils import parametrize

from fastai_lsuv import lsuv_


def phrase(row):
    return row.reason.partition(":")[0]


class Layer(nn.Module):
    "A layer of its own: parameters by name, and what it does with them."

    def __init__(self, forward, **shapes):
        super().__init__()
        self.f = forward
        for name, shape in shapes.items():
            dtype = torch.complex64 if name.startswith("c") else torch.float32
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype) * 0.3))

    def forward(self, *xs):
        return self.f(self, *xs)


def behind(layer, n=16):
    "A net whose first module is the layer."
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(n, 3))


def x(*shape):
    return torch.randn(*(shape or (64, 8)), generator=torch.Generator().manual_seed(1))


class Noisy(nn.Module):
    "Noise in weight and bias, in evaluation, too (Fortunato et al. 2017)."

    def __init__(self):
        super().__init__()
        self.mu_w, self.sigma_w = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.rand(16, 8))
        self.mu_b, self.sigma_b = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.rand(16))
        self.register_buffer("noise_w", torch.randn(16, 8))
        self.register_buffer("noise_b", torch.randn(16))

    def forward(self, x):
        return F.linear(x, self.mu_w + self.sigma_w * self.noise_w, self.mu_b + self.sigma_b * self.noise_b)


ADDING_UP = {
    "two": Layer(lambda m, x: x @ m.u + x.flip(-1) @ m.v + m.b, u=(8, 16), v=(8, 16), b=(16,)),
    "three, no bias": Layer(lambda m, x: x @ m.u + x.roll(1, 0) @ m.v + x**2 @ m.w, u=(8, 16), v=(8, 16), w=(8, 16)),
    "noisy": Noisy(),
    "einsum": Layer(
        lambda m, x: torch.einsum("bi,io->bo", x, m.u) + torch.einsum("bi,oi->bo", x.flip(0), m.v), u=(8, 16), v=(16, 8)
    ),
    "bases and a root": Layer(
        lambda m, x: x @ torch.einsum("b,bio->io", m.a, m.bases) + x.flip(0) @ m.root,
        a=(3,),
        bases=(3, 8, 16),
        root=(8, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADDING_UP)
@pytest.mark.parametrize("is_root", [False, True], ids=["inside", "alone"])
def test_weights_whose_results_add_up_are_scaled_together(kind, is_root):
    layer = ADDING_UP[kind]
    net, name = (layer, "") if is_root else (behind(layer), "0")
    report = lsuv_(net, x())
    assert report[name].status in ("corrected", "unchanged"), report
    assert abs(outputs_of(net, x(), [name])[name][1] - 1) < 1e-3


NAMED = {
    "power": (lambda m, x: x @ m.w**2, dict(w=(8, 16)), "not affine: w"),
    "abs": (lambda m, x: x @ m.w.abs(), dict(w=(8, 16)), "not affine: w"),
    "softplus": (lambda m, x: F.linear(x, F.softplus(m.w)), dict(w=(16, 8)), "not affine: w"),
    "squashed": (lambda m, x: (3 * x @ m.w).tanh(), dict(w=(8, 16)), "not affine: w"),
    "two nonlinear": (
        lambda m, x: (x @ m.u).tanh() + x @ m.v.exp(),
        dict(u=(8, 16), v=(8, 16)),
        "several weights: u, v",
    ),
    "in the middle": (lambda m, x: x + (x @ m.w).repeat(1, 1), dict(w=(8, 8)), "not affine: w"),
    "complex": (lambda m, x: (x.to(torch.complex64) @ m.c).real, dict(c=(8, 16)), "complex: c"),
    "spectral": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.c, n=8),
        dict(c=(5,)),
        "complex: c",
    ),
}


@pytest.mark.parametrize("kind", NAMED)
def test_what_is_not_corrected_is_named(kind):
    forward, shapes, reason = NAMED[kind]
    torch.manual_seed(0)
    layer = Layer(forward, **shapes)
    net = behind(layer, layer(x()).shape[-1])
    bits = parameter_bits(net)
    report = lsuv_(net, x())
    assert (report["0"].status, report["0"].reason) == ("skipped", reason), report
    assert not {n for n in moved(bits, net) if n.startswith("0.")}
    assert reason in report.summary()


def test_complex_layers():
    net = nn.Sequential(nn.Linear(8, 4, dtype=torch.complex64), Layer(lambda m, z: z.abs()), nn.Linear(4, 3))
    report = lsuv_(net, x().to(torch.complex64))
    assert [(row.name, row.status, phrase(row)) for row in report] == [
        ("0", "skipped", "complex"),
        ("2", "corrected", ""),
    ]


def test_weights_ahead_of_the_one_that_is_corrected_are_named():
    net = behind(Layer(lambda m, x: (x @ m.w1).relu() @ m.w2 + m.b, w1=(8, 20), w2=(20, 16), b=(16,)))
    report = lsuv_(net, x())
    assert (report["0"].status, report["0"].reason) == ("corrected", "other weights kept: w1")
    assert "other weights kept (w1)" in report.summary() and report["0"].notes == {"other weights kept"}


NO_ROWS = {
    "gain": (lambda m, x: x * m.w, dict(w=(8,))),
    "position": (lambda m, x: x + m.w, dict(w=(8,))),
    "class token": (lambda m, x: torch.cat([m.w.expand(len(x), 8), x], 1)[:, :8], dict(w=(1, 8))),
    "table": (lambda m, x: x + m.w[torch.arange(len(x)) % 5], dict(w=(5, 8))),
    "entry compared with the input": (lambda m, x: x + (x @ m.w[torch.arange(4)].T).mean(1, True), dict(w=(5, 8))),
    "made for a sum": (lambda m, x: x + (torch.eye(8) @ m.w).mean(0), dict(w=(8, 8))),
}


@pytest.mark.parametrize("kind", NO_ROWS)
@pytest.mark.parametrize("where", ["inside", "with a layer inside", "root"])
def test_no_rows_for_what_is_not_multiplied(kind, where):
    forward, shapes = NO_ROWS[kind]
    layer = Layer(forward, **shapes)
    if where == "inside":
        net = nn.Sequential(layer, nn.Linear(8, 3))
    else:
        layer.inner = nn.Linear(8, 8)
        layer.f = lambda m, x: forward(m, m.inner(x).relu())
        net = layer if where == "root" else nn.Sequential(layer, nn.Linear(8, 3))
    assert {row.type for row in lsuv_(net, x())} == {"Linear"}


def test_a_codebook_that_is_compared_with_the_input_is_named():
    net = behind(Layer(lambda m, x: m.codes((x @ m.codes.weight.T).argmax(-1)) + x))
    net[0].codes = nn.Embedding(5, 8)
    net[2] = nn.Linear(8, 3)
    assert phrase(lsuv_(net, x())["0.codes"]) == "tied weight"


# --- a model with weights of its own is not run for them --------------------------------------------------------------


class Root(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.f, self.runs = forward, []
        self.body, self.fc = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4)
        self.table, self.gain = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.ones(5))
        self.layers = nn.ModuleList([nn.Linear(5, 5)])

    def forward(self, x):
        RUNS.append(1)
        return self.f(self, self.body(x))


RUNS = []
ROOTS = {
    "table": (lambda m, h: m.fc(h) @ m.table, "corrected", "no bias, mean kept"),
    "table and gain": (lambda m, h: (m.fc(h) @ m.table) * m.gain, "corrected", "no bias, mean kept"),
    "table under tanh": (lambda m, h: (m.fc(h) @ m.table).tanh(), "skipped", "not affine: table"),
    "beside a residual": (lambda m, h: m.fc(h) @ m.table + h[:, :5], "skipped", "not affine: table"),
    "layers used by the root": (
        lambda m, h: F.linear(m.fc(h) @ m.table, m.layers[0].weight, m.layers[0].bias),
        "corrected",
        "other weights kept: table",
    ),
}


@pytest.mark.parametrize("kind", ROOTS)
def test_every_run_of_the_model_is_counted(kind):
    forward, status, reason = ROOTS[kind]
    torch.manual_seed(0)
    net = Root(forward)
    RUNS.clear()
    report = lsuv_(net, x())
    assert len(RUNS) == report.n_forward <= 4
    assert (report[""].status, report[""].reason) == (status, reason), report
    if status == "corrected":
        assert abs(net(x()).std().item() - 1) < 1e-3


# --- reasons are true -------------------------------------------------------------------------------------------------


class Of(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, w):
        return self.f(w)


@pytest.mark.parametrize(
    "f,reason",
    [
        (torch.abs, ""),
        (lambda w: 2 * w, ""),
        (lambda w: w + torch.eye(16), "not affine"),
        (lambda w: w / w.norm(), "weight has no effect on scale"),
    ],
    ids=["abs", "double", "plus I", "normalised"],
)
def test_weights_made_from_others(f, reason):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    parametrize.register_parametrization(net[2], "weight", Of(f))
    report = lsuv_(net, x())
    assert (report["2"].status, phrase(report["2"])) == ("skipped" if reason else "corrected", reason), report


class Shows(nn.Module):
    def __init__(self, n_in, n_out, pad):
        super().__init__()
        self.conv, self.pad = nn.Conv1d(n_in, n_out, 3), pad
        self.weight, self.bias = self.conv.weight, self.conv.bias

    def forward(self, x):
        return F.pad(self.conv(x), (1, 1)) if self.pad == "after" else self.conv(F.pad(x, (1, 1)))


@pytest.mark.parametrize("pad", ["before", "after"])
def test_a_wrapper_that_shows_the_weight_of_its_child(pad):
    report = lsuv_(nn.Sequential(Shows(3, 16, pad), nn.ReLU(), Shows(16, 8, pad)), x(16, 3, 32))
    assert [(row.name, row.status) for row in report] == [("0.conv", "corrected"), ("2.conv", "corrected")]


def test_a_wrapper_that_uses_the_weight_of_its_child_is_tied():
    net = Layer(lambda m, x: F.linear(m.enc(x).relu(), m.weight.T))
    net.enc = nn.Linear(8, 16)
    net.weight = net.enc.weight
    assert lsuv_(nn.Sequential(net), x())["0.enc"].reason == "tied weight"


def test_empty_weights_are_not_tied_to_each_other():
    net = Layer(lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)], 1))
    net.a, net.b, net.c = nn.Linear(8, 0), nn.Linear(8, 0), nn.Linear(8, 4)
    report = lsuv_(nn.Sequential(net), x())
    assert "tied weight" not in {row.reason for row in report} and report["0.c"].status == "corrected"


def test_a_functional_template_is_no_layer():
    net = Layer(
        lambda m, x: torch.func.functional_call(m.template, {"weight": m.w, "bias": m.b}, (x,)), w=(16, 8), b=(16,)
    )
    net.template = nn.Linear(8, 16).requires_grad_(False)
    report = lsuv_(nn.Sequential(net, nn.Tanh(), nn.Linear(16, 3)), x())
    assert [(row.name, row.status) for row in report] == [("0", "corrected"), ("2", "corrected")]


def test_an_ensemble_by_vmap():
    members = [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)) for _ in range(4)]
    params, _ = torch.func.stack_module_state(members)
    net = Layer(lambda m, x: torch.vmap(lambda p: torch.func.functional_call(m.template, p, (x,)))(m.stacked()))
    net.template = members[0].requires_grad_(False)
    for name, p in params.items():
        net.register_parameter(name.replace(".", "_"), nn.Parameter(p.detach()))
    net.stacked = lambda: {name: getattr(net, name.replace(".", "_")) for name in params}
    report = lsuv_(nn.Sequential(net), x())
    assert {row.name for row in report} == {"0"}, report


def test_a_layer_under_vmap_is_named():
    net = Layer(lambda m, x: m.out(torch.vmap(m.inner)(x)))
    net.inner, net.out = nn.Linear(8, 16), nn.Linear(16, 3)
    report = lsuv_(net, x())
    assert (report["inner"].reason, report["out"].status) == ("inside a transform", "corrected")


class Out:
    def __init__(self, y):
        self.y = y


class Wrapping(nn.Linear):
    def forward(self, x):
        return Out(super().forward(x))


def test_outputs_that_are_own_objects():
    net = nn.Sequential(Wrapping(8, 16), Of(lambda out: out.y.tanh()), nn.Linear(16, 3))
    report = lsuv_(net, x())
    assert [row.status for row in report] == ["corrected", "corrected"] and report.n_forward == 3
    assert abs(net[0](x()).y.std().item() - 1) < 1e-3


class Gate(nn.Module):
    "Runs more of its layers the larger the signal is: an early exit the other way round."

    def __init__(self, least, most=1e9):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.least, self.most = least, most

    def forward(self, x):
        h = self.first(x)
        return self.out(self.second(h) if self.least < h.std() < self.most else h)


def test_what_runs_only_after_the_correction_is_corrected():
    net = Gate(0.9)
    report = lsuv_(net, x())
    assert {row.name: row.status for row in report} == dict.fromkeys(["first", "second", "out"], "corrected")
    assert report["second"].std_before != report["second"].std_before and abs(report["second"].std_after - 1) < 1e-3
    assert report.converged and report.n_forward <= 6


def test_what_runs_no_longer_is_as_it_was():
    net = Gate(0.0, 0.9)
    bits = parameter_bits(net)
    report = lsuv_(net, x())
    assert (report["second"].status, report["second"].reason, report["second"].n_calls) == (
        "skipped",
        "never called",
        0,
    )
    assert not {n for n in moved(bits, net) if n.startswith("second")} and report.converged


# --- inputs that can't be checked -------------------------------------------------------------------------------------


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, adj):
        return adj @ self.b(torch.relu(adj @ self.a(x)))


@pytest.mark.parametrize("layout", ["to_dense", "to_sparse", "to_sparse_csr"])
def test_sparse_inputs(layout):
    adj = getattr((torch.rand(20, 20) > 0.7).float().to_sparse(), layout)()
    assert lsuv_(Graph(), (x(20, 8), adj)).converged


def test_nested_inputs():
    nested = torch.nested.nested_tensor([x(5, 8), x(3, 8)], layout=torch.jagged)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    report = lsuv_(net, nested)
    assert report.converged and abs(net(nested).values().std().item() - 1) < 1e-3, report


def test_packed_inputs():
    net = Layer(lambda m, packed: m.out(m.inner(packed.data)))
    net.inner, net.out = nn.Linear(8, 16), nn.Linear(16, 3)
    packed = nn.utils.rnn.pack_sequence([x(5, 8), x(3, 8)])
    assert lsuv_(net, (packed,)).converged


def test_nan_that_the_model_fills():
    net = Layer(lambda m, x: m.out(m.inner(x.nan_to_num())))
    net.inner, net.out = nn.Linear(8, 16), nn.Linear(16, 3)
    batch = x()
    batch[0, 0] = torch.nan
    assert lsuv_(net, batch).converged


def test_nan_in_one_branch():
    net = Layer(lambda m, x: m.good(x.nan_to_num()) + m.bad(x).nan_to_num())
    net.good, net.bad = nn.Linear(8, 3), nn.Linear(8, 3)
    batch = x()
    batch[0, 0] = torch.nan
    report = lsuv_(net, batch)
    assert (report["good"].status, report["bad"].reason) == ("corrected", "non-finite output")


# --- biases that were set on purpose ----------------------------------------------------------------------------------


def detector(bias, n_out=20):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, n_out, 3))
    nn.init.normal_(net[2].weight, std=0.01)
    nn.init.constant_(net[2].bias, bias)
    return net


@pytest.mark.parametrize("bias,n_out", [(-4.6, 20), (-2.19, 3), (-4.6, 1), (3.0, 4)])
@pytest.mark.parametrize(
    "options", [{}, {"mean": None}, {"init": nn.init.orthogonal_}], ids=["default", "mean", "init"]
)
def test_a_prior_is_kept(bias, n_out, options):
    net, batch = detector(bias, n_out), x(8, 3, 16, 16)
    row = lsuv_(net, batch, **options)["2"]
    y = net(batch)
    assert row.status == "corrected" and "prior bias, mean kept" in row.reason
    assert abs(y.std().item() - 1) < 1e-3 and abs(y.mean().item() - bias) < 0.1
    again = lsuv_(net, batch, **options)["2"]
    assert again.status == "unchanged" or options.get("init")


def test_ahead_of_another_layer_it_is_moved_with_a_note():
    net = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 3))
    nn.init.constant_(net[0].bias, -3.0)
    report = lsuv_(net, x())
    assert report["0"].reason == "constant bias moved" and abs(report["0"].mean_after) < 1e-3
    assert "constant bias moved (exclude= leaves it) in 1: 0" in report.summary()


def test_a_bias_that_was_drawn_is_no_prior():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    assert lsuv_(net, x())["2"].reason == "" == lsuv_(net, x())["2"].reason


@pytest.mark.parametrize("shape", [(), (1,), (1, 4)], ids=str)
def test_biases_of_unusual_shapes(shape):
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].bias, net[4].bias = (nn.Parameter(torch.randn(shape)) for _ in range(2))
    assert [row.status for row in lsuv_(net, x())] == ["corrected"] * 3


class OnTransformed(nn.Module):
    "Runs a network of its own on tensors made from that network's parameters."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return torch.func.functional_call(self.net, {k: v * 1.0 for k, v in self.net.named_parameters()}, (x,))


def test_layers_that_run_on_tensors_made_from_their_parameters_are_named():
    report = lsuv_(nn.Sequential(OnTransformed(), nn.Linear(3, 2)), torch.randn(32, 8))
    assert [(row.name, row.reason) for row in report if row.status == "skipped"] == [
        ("0.net.0", "inside a transform"),
        ("0.net.2", "inside a transform"),
    ]
    assert report["1"].status == "corrected"
