"""All or nothing: bad input, a forward pass that raises or is interrupted. The model is what it was, no hook left."""

import inspect
from collections import OrderedDict

import pytest
import torch
from audit import differences, fingerprint, rng_print
from models import GeneralReLU, Offset, Picky, Stumble, convnet, course_net, images, mlp, rows
from torch import nn

from fastai_lsuv import LSUVCallback, lsuv_

NAN, INF = float("nan"), float("inf")


class untouched:
    "The model inside is to the bit what it was, hooks, flags, buffers and random streams included."

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before, self.rng = fingerprint(self.model), rng_print()

    def __exit__(self, kind, error, tb):
        assert not differences(self.before, fingerprint(self.model))
        assert rng_print() == self.rng and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    dict(std=0),
    dict(std=-1.0),
    dict(std=NAN),
    dict(std=INF),
    dict(mean=NAN),
    dict(mean=INF),
    dict(tol=0),
    dict(tol=-1e-3),
    dict(tol=NAN),
    dict(max_iter=0),
    dict(max_iter=-1),
    dict(init="orthogonal"),
    dict(init=3),
    dict(std="1"),
    dict(mean="0"),
    dict(max_iter=2.5),
    dict(modules=3),
    dict(exclude=3.5),
    dict(modules=[3]),
    dict(modules="nothing"),
    dict(exclude="nothing"),
]


@pytest.mark.parametrize("option", BAD, ids=str)
def test_bad_options(option):
    net = convnet(norm=nn.BatchNorm2d)
    with untouched(net), pytest.raises((ValueError, TypeError)) as e:
        lsuv_(net, images(), **option)
    assert next(iter(option)) in str(e.value)


@pytest.mark.parametrize("option", [o for o in BAD if not o.keys() & {"modules", "exclude"}], ids=str)
def test_bad_options_of_the_callback_are_refused_at_once(option):
    with pytest.raises((ValueError, TypeError)):
        LSUVCallback(**option)


@pytest.mark.parametrize("which", ["modules", "exclude"])
@pytest.mark.parametrize(
    "pattern,nearest", [("layr1", "layer1"), ("*.convv", ".conv"), (["layer2.*", "layer3.cnv"], "layer3.conv")]
)
def test_a_pattern_that_matches_nothing_names_the_nearest(which, pattern, nearest):
    net = Chain({f"layer{i}": nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 3, 1))) for i in (1, 2, 3)})
    with untouched(net), pytest.raises(ValueError) as e:
        lsuv_(net, images(), **{which: pattern})
    wrong = pattern if isinstance(pattern, str) else pattern[-1]
    assert repr(wrong) in str(e.value) and nearest in str(e.value).replace(wrong, "")


class Chain(nn.Module):
    def __init__(self, layers):
        super().__init__()
        for n, m in layers.items():
            self.add_module(n, m)

    def forward(self, x):
        for m in self.children():
            x = m(x)
        return x


def test_a_module_from_elsewhere_is_refused():
    net, other = mlp(10, 8, 3), nn.Linear(10, 8)
    with untouched(net), pytest.raises(ValueError):
        lsuv_(net, rows(), modules=[other])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_batch(bad):
    "One bad pixel: a clear error, or every layer behind it skipped for what it is. Nothing moves."
    net, x = convnet(norm=nn.BatchNorm2d), images()
    x[0, 0, 0, 0] = bad
    with untouched(net):
        try:
            report = lsuv_(net, x)
        except ValueError as e:
            assert "nan" in str(e).lower() or "finite" in str(e).lower()
        else:
            assert {(row.status, row.reason) for row in report} == {("skipped", "non-finite output")}


def test_lazy_modules_not_yet_initialised():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    with untouched(net), pytest.raises((ValueError, TypeError), match="(?i)lazy|initiali") as e:
        lsuv_(net, images())
    assert "2" in str(e.value)
    assert isinstance(net[2].weight, nn.parameter.UninitializedParameter)


@pytest.mark.parametrize(
    "build", [lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), lambda: nn.Sequential(nn.MaxPool2d(2)), nn.Identity]
)
def test_nothing_to_correct_is_a_warning_and_an_empty_report(build):
    net = build()
    with untouched(net), pytest.warns(UserWarning, match="(?i)nothing|no "):
        report = lsuv_(net, images())
    assert (
        len(report) == 0
        and list(report) == []
        and isinstance(repr(report), str)
        and isinstance(report._repr_html_(), str)
    )


@pytest.mark.parametrize("batch", [None, "a batch", 3, (), {}], ids=repr)
def test_a_batch_that_is_none(batch):
    net = mlp(10, 8, 3)
    with untouched(net), pytest.raises((ValueError, TypeError)):
        lsuv_(net, batch)


def test_an_empty_batch():
    net = mlp(10, 8, 3)
    with untouched(net), pytest.raises(RuntimeError, match="the batch is empty"):
        lsuv_(net, rows()[:0])


@pytest.mark.parametrize("model", [None, "a model", nn.Linear, lambda x: x], ids=["none", "str", "class", "function"])
def test_what_is_no_model(model):
    with pytest.raises((TypeError, ValueError)):
        lsuv_(model, rows())


# --- a pass that raises -----------------------------------------------------------------------------------------------

ERRORS = {
    "with a message": lambda: RuntimeError("no luck"),
    "of a value": lambda: ValueError("no luck"),
    "of a key": lambda: KeyError("no luck"),
    "without a message": lambda: RuntimeError(),
    "assertion": lambda: AssertionError(),
    "its own": lambda: Picky(3, "no luck"),
    "not a string": lambda: OSError(5, "no luck"),
    "memory": lambda: MemoryError(),
    "interrupt": lambda: KeyboardInterrupt(),
    "exit": lambda: SystemExit(2),
    "stop": lambda: StopIteration(),
}


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", ERRORS)
def test_a_forward_pass_that_raises(kind, at):
    "In the first, the correcting and the last pass."
    error = ERRORS[kind]()
    net = convnet(norm=nn.BatchNorm2d, drop=0.2)
    net.insert(7, Stumble(error, at))
    with untouched(net), pytest.raises(type(error)) as e:
        lsuv_(net, images(), init=nn.init.orthogonal_)
    assert type(e.value) is type(error) and net[7].calls >= [at], "and is tried again at most"
    if kind not in ("interrupt", "exit", "stop"):
        said = " ".join(map(str, e.value.args))
        assert "7" in said and said.count("no luck") == str(ERRORS[kind]()).count("no luck"), said
    assert lsuv_(net, images()).converged  # and the next try works


def test_the_error_names_the_innermost_module():
    net = nn.Sequential(nn.Linear(10, 8), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 3))))
    with untouched(net), pytest.raises(RuntimeError, match=r"1\.1\.1") as e:
        lsuv_(net, rows())
    assert "mat1 and mat2" in str(e.value)  # PyTorch's own words are kept


def test_a_wrong_batch_names_the_first_layer():
    net = mlp(10, 8, 3)
    with untouched(net), pytest.raises(RuntimeError, match="0"):
        lsuv_(net, rows(d=7))


@pytest.mark.parametrize(
    "make",
    [lambda: RuntimeError("bad init"), lambda: Picky(3, "init"), KeyboardInterrupt],
    ids=["message", "its own", "interrupt"],
)
def test_an_init_that_raises(make):
    done, error = [], make()

    def init(w):
        if done:
            raise error
        done.append(nn.init.orthogonal_(w))

    net = convnet()
    with untouched(net), pytest.raises(type(error)):
        lsuv_(net, images(), init=init)


def test_a_function_for_modules_that_raises():
    net = convnet()
    with untouched(net), pytest.raises(ZeroDivisionError):
        lsuv_(net, images(), modules=lambda m: 1 / 0)


class Interrupted(GeneralReLU):
    "Is interrupted at its `at`-th call."

    def __init__(self, at):
        super().__init__(sub=0.0)
        self.stumble = Stumble(KeyboardInterrupt(), at)

    def forward(self, x):
        return self.stumble(super().forward(x))


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_interrupted_inside_a_block_that_is_being_iterated(at):
    "The course's layers: a Python float is among what has to be put back."
    net = course_net()
    net[2].relu = Interrupted(at)
    with untouched(net), pytest.raises(KeyboardInterrupt):
        lsuv_(net, images(16, 1, 28), modules=nn.Module.children)
    assert all(isinstance(m.relu.sub, float) and m.relu.sub == 0 for m in net[:5])


@pytest.mark.parametrize("at", [1, 2, 3])
def test_interrupted_after_a_parameter_shown_as_bias_was_set(at):
    net = nn.Sequential(Offset(10, 8), Offset(8, 8), Stumble(KeyboardInterrupt(), at), nn.Linear(8, 3))
    with untouched(net), pytest.raises(KeyboardInterrupt):
        lsuv_(net, rows(), modules=nn.Module.children)


def test_a_hook_of_the_users_that_raises():
    net = convnet()

    def hook(m, args, out):
        raise RuntimeError("from a hook")

    net[2].register_forward_hook(hook)
    with untouched(net), pytest.raises(RuntimeError, match="from a hook"):
        lsuv_(net, images())


def test_bad_options_have_the_defaults_of_the_design():
    d = {n: p.default for n, p in inspect.signature(lsuv_).parameters.items()}
    assert d == dict(
        model=inspect._empty,
        batch=inspect._empty,
        mean=0.0,
        std=1.0,
        per_channel=False,
        modules=None,
        exclude=None,
        init=None,
        tol=1e-3,
        max_iter=10,
        residual=False,
    )
