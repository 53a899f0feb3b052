"""Gradients, precisions, compilers and memory formats: what training does to a model, and the recorder sees through."""

import pytest
import torch
import torch._dynamo  # here, since its import sets warnings filters
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision as OnTheGPU
from fastai.vision.all import SGD, GradientAccumulation, default_device
from feeds import loaders
from learners import learner, small_cnn
from models import Shared, images, mlp, rows
from recorded import Checkpointed, fed
from torch import nn
from torch.amp import GradScaler
from witness import assert_as_seen, records
from zoo import xresnet18

from fastai_lsuv import ActivationStatsRecorder

DEVICE = default_device().type


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- gradients --------------------------------------------------------------------------------------------------------


def of_outputs(model, x, loss):
    "name → gradient of the loss by each module's output, by autograd itself."
    outs = {}
    handles = [
        m.register_forward_hook(lambda m, a, o, n=n: outs.setdefault(n, []).append(o), prepend=True)
        for n, m in model.named_modules()
        if n
    ]
    value = loss(model(x))
    for h in handles:
        h.remove()
    names = [(n, o) for n, os in outs.items() for o in os if o.requires_grad]
    grads = {}
    for (n, _), g in zip(names, torch.autograd.grad(value, [o for _, o in names], allow_unused=True)):
        if g is not None:
            grads.setdefault(n, []).append(g)
    return {n: torch.cat([g.double().flatten() for g in gs]) for n, gs in grads.items()}


def assert_gradients(rec, want, scale=1.0, rel=1e-4):
    frame = rec.to_frame()
    first = frame[frame.step == 0].set_index("layer")
    assert len(first) and set(first.index[first.grad_std.notna()]) == set(want) & set(rec.layer_names)
    for name, row in first.iterrows():
        if name not in want:
            continue
        mean, std = want[name].mean().item() / scale, want[name].std().item() / scale
        assert (
            abs(row.grad_mean - mean) <= rel * std + 1e-7 * abs(mean) + 1e-12
            and abs(row.grad_std - std) <= rel * std + 1e-7 * abs(mean) + 1e-12
        ), (
            name,
            row.grad_mean,
            mean,
            row.grad_std,
            std,
        )


def mean(out):
    return out.float().mean()


NETS = {
    "mlp": lambda: (mlp(10, 16, 16, 3), rows()),
    "shared": lambda: (Shared(3), rows()),
    "convolutions": lambda: (small_cnn(), images(8, 1, 8)),
}


@pytest.mark.parametrize("net", NETS)
def test_gradients_are_those_of_autograd(net):
    model, x = NETS[net]()
    if net == "convolutions":
        [setattr(m, "inplace", False) for m in model.modules() if isinstance(m, nn.ReLU)]
    want = of_outputs(model, x, mean)
    rec, seen = fed(model, x, with_grad=True)
    assert [*rec.to_frame().columns][-2:] == ["grad_mean", "grad_std"]
    assert_as_seen(rec, seen)
    assert_gradients(rec, want)


def test_gradients_of_an_output_that_is_overwritten():
    "Of the layer's own output, before the in-place activation: as if it had not been in place."
    x, want = images(8, 1, 8), None
    apart = small_cnn()
    for m in apart.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    want = of_outputs(apart, x, mean)
    rec, seen = fed(small_cnn(), x, with_grad=True)
    assert_as_seen(rec, seen)
    assert_gradients(rec, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing(use_reentrant):
    "Where the outputs of the first pass take part in the backward, theirs; never an error."
    rec, _ = fed(Checkpointed(use_reentrant, mlp(10, 16, 3)), rows(), with_grad=True)
    assert len(rec.to_frame()) == 6


def test_frozen_layers_have_no_gradient_and_validation_neither(tmp_path):
    model = small_cnn()
    model[0].requires_grad_(False)
    learn = learner(loaders(), model, path=tmp_path, cbs=(rec := ActivationStatsRecorder(with_grad=True, valid=True)))
    learn.fit(1)
    frame = rec.to_frame()
    train, valid = (frame[frame.phase == p] for p in ("train", "valid"))
    assert (
        train[train.layer.str.startswith("0.")].grad_std.isna().all()
        and train[train.layer.str.startswith("1.")].grad_std.notna().all()
    )
    assert len(valid) and valid.grad_std.isna().all()


def test_gradients_with_every_and_accumulation(tmp_path):
    learn = learner(
        loaders(),
        path=tmp_path,
        cbs=[GradientAccumulation(32), rec := ActivationStatsRecorder(with_grad=True, every=2)],
    )
    learn.fit(2)
    assert rec.to_frame().grad_std.notna().all() and [*rec.to_frame().step.unique()] == [0, 2, 4]


# --- precision --------------------------------------------------------------------------------------------------------


class MixedPrecision(OnTheGPU):
    "fastai's own, on the CPU, too: it always says 'cuda'."

    def before_fit(self):
        self.autocast, self.learn.scaler, self.scales = (
            torch.autocast(DEVICE, torch.bfloat16),
            GradScaler(DEVICE, init_scale=2.0**12),
            [],
        )


def test_under_autocast(tmp_path):
    "Outputs in bf16 are measured as they are."
    rec, seen = fed(small_cnn(nn.BatchNorm2d), images(16, 1, 8), cbs=MixedPrecision(), batches=3)
    assert_as_seen(rec, seen)


def test_gradients_are_divided_by_the_loss_scale():
    model, x = mlp(10, 32, 32, 3), rows()
    with torch.autocast("cpu", torch.bfloat16):
        want = of_outputs(model, x, lambda out: mean(out) * 2.0**12)
    rec, seen = fed(model, x, cbs=MixedPrecision(), with_grad=True)
    assert_as_seen(rec, seen)
    assert_gradients(rec, want, 2.0**12, 0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precisions(dtype):
    rec, seen = fed(mlp(10, 16, 16, 3).to(dtype), rows(dtype=dtype))
    assert_as_seen(rec, seen)


def test_channels_last(tmp_path):
    rec, seen = fed(xresnet18(), images(4, 3, 32), cbs=ChannelsLast())
    assert_as_seen(rec, seen, 0.02)


# --- compiled ---------------------------------------------------------------------------------------------------------


def compiled(model, how, backend):
    if how == "torch.compile":
        return torch.compile(model, backend=backend)
    model.compile(backend=backend)
    return model


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "run before"])
@pytest.mark.parametrize(
    ("how", "backend"),
    [("torch.compile", "eager"), ("torch.compile", "aot_eager"), (".compile()", "eager"), (".compile()", "aot_eager")],
)
def test_compiled_models(how, backend, warm, tmp_path):
    "Recorded like the plain one, by plain names, and trained to the same weights; other batches stay compiled."

    def trained(model, **options):
        learn = learner(loaders(), model, path=tmp_path, opt_func=SGD, lr=0.1)
        if warm:
            learn.validate(), learn.fit(1)
        learn.fit(1, cbs=(rec := ActivationStatsRecorder(**options)))
        return rec, [p.detach().clone() for p in model.parameters()]

    (plain, want), (rec, got) = trained(small_cnn()), trained(compiled(small_cnn(), how, backend))
    assert rec.layer_names == plain.layer_names
    a, b = plain.to_frame(), rec.to_frame()
    assert [*a.layer] == [*b.layer] and len(a) == 3 * 7
    assert torch.allclose(torch.tensor(a["std"].values), torch.tensor(b["std"].values), rtol=1e-4)
    for p, q in zip(want, got):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    rec, got = trained(compiled(small_cnn(), how, backend), every=2)
    assert len(records(rec)) == 2


def test_a_compiled_part():
    model = small_cnn()
    model[0] = torch.compile(model[0], backend="eager")
    rec, _seen = fed(model, images(8, 1, 8))
    assert rec.layer_names == ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1", "1.3"]
    assert len(records(rec)) == 2 and {*records(rec)[0]} == {*rec.layer_names}
