"""`update`: ‖Δw‖ / ‖w‖ of each layer and step, beside what a callback of its own measures on whole weights."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from fastai.vision.all import SGD, Adam, Callback, CancelStepException, GradientAccumulation, Lamb, ranger
from feeds import loaders
from learners import learner, small_cnn, two_groups
from models import mlp, rows
from recorded import fed
from torch import nn

from fastai_lsuv import ActivationStatsRecorder


class Measures(Callback):
    "The same of each layer's parameters, whole and in float64."

    order = 96

    def __init__(self):
        self.seen, self.before = [], {}

    def before_batch(self):
        if self.training:
            self.before = self.weights()

    def after_batch(self):
        if self.training:
            pairs = {n: (w, self.before[n]) for n, w in self.weights().items()}
            self.seen.append({n: ((w - v).norm() / v.norm()).item() for n, (w, v) in pairs.items()})

    def weights(self):
        named = {n: list(m.parameters(recurse=False)) for n, m in self.learn.model.named_modules()}
        return {n: torch.cat([p.detach().double().flatten() for p in ps]) for n, ps in named.items() if ps}


def updates(rec):
    frame = rec.to_frame()
    return [dict(zip(rows.layer, rows["update"])) for _, rows in frame.groupby("step")]


def recorded(model=None, cbs=(), epochs=1, lr=1e-3, **kwargs):
    learn = learner(loaders(), model or small_cnn(), cbs=[rec := ActivationStatsRecorder(), *cbs], **kwargs)
    learn.add_cb(measures := Measures())
    learn.fit(epochs, lr)
    return rec, measures.seen


def assert_as_measured(rec, seen, rel=0.05):
    found = updates(rec)
    assert len(found) == len(seen) and seen
    for got, want in zip(found, seen):
        for layer in want.keys() & got.keys():
            assert got[layer] == pytest.approx(want[layer], rel=rel, abs=1e-9), layer


@pytest.mark.parametrize(
    "opt_func",
    [SGD, Adam, partial(SGD, mom=0.9, wd=0.1), partial(Adam, decouple_wd=True, wd=0.3), Lamb, ranger],
    ids=["sgd", "adam", "momentum and decay", "adamw", "lamb", "ranger"],
)
def test_under_any_optimizer(opt_func):
    rec, seen = recorded(opt_func=opt_func, epochs=2)
    assert_as_measured(rec, seen, rel=1e-3)
    assert max(seen[0].values()) > 0


def test_of_large_weights_a_sample_is_enough():
    "Also of an embedding of which a batch touches few rows."

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.wide, self.head = nn.Embedding(20_000, 64), nn.Linear(64, 4000), nn.Linear(4000, 3)

        def forward(self, x):
            return self.head(self.wide(self.embed(x)).relu()).mean(1)

    torch.manual_seed(0)
    x = torch.randint(20_000, (64, 10))
    for opt_func in (SGD, Adam):
        torch.manual_seed(0)
        rec, _ = fed(Reads(), x, cbs=[measures := Measures()], opt_func=opt_func)
        assert_as_measured(rec, measures.seen)


def test_layers_without_weights_have_none():
    rec, _ = recorded()
    of_relu = rec.to_frame().query("layer == '0.1'")
    assert of_relu["update"].isna().all() and len(of_relu) == 3


def test_frozen_layers_have_none(tmp_path):
    learn = two_groups(loaders(), path=tmp_path, cbs=(rec := ActivationStatsRecorder()))
    learn.freeze()
    learn.fit(1)
    frame = rec.to_frame().set_index("layer")["update"]
    assert frame["0.0"].isna().all()
    assert (frame["1.3"] > 0).all()
    learn.unfreeze()
    learn.fit(1)
    assert rec.to_frame().query("layer == '0.0' and fit == 1")["update"].gt(0).all()


def test_steps_that_change_nothing_are_zero():
    "All but each second one accumulate gradients."
    rec, seen = recorded(cbs=[GradientAccumulation(32)], lr=0.1)
    assert_as_measured(rec, seen, rel=1e-3)
    of_head = [step["1.3"] for step in updates(rec)]
    assert of_head[0] == 0 and of_head[1] > 0


class Skips(Callback):
    "As mixed precision does where a gradient overflows."

    order = 20

    def before_step(self):
        raise CancelStepException


def test_skipped_steps_are_zero():
    rec, _ = recorded(cbs=[Skips()])
    assert rec.to_frame()["update"].dropna().eq(0).all()


def test_weights_that_begin_at_zero_are_told_from_those_that_do_not_move():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    rec, _ = recorded(model)
    first, second, _ = (step["1"] for step in updates(rec))
    assert first == math.inf and 0 < second < 10


def test_a_weight_in_two_layers_counts_in_both():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    rec, _ = fed(Tied(), rows(), opt_func=Adam)
    for step in updates(rec):
        assert step["a"] == step["b"] > 0


def test_what_is_done_to_the_weights_between_steps_does_not_count():
    "As an average of weights is swapped in for validation."

    class Swaps(Callback):
        def before_validate(self):
            self.kept = [p.detach().clone() for p in self.learn.model.parameters()]
            with torch.no_grad():
                [p.mul_(0) for p in self.learn.model.parameters()]

        def after_validate(self):
            with torch.no_grad():
                [p.copy_(q) for p, q in zip(self.learn.model.parameters(), self.kept)]

    (plain, _), (swapped, _) = recorded(epochs=2), recorded(epochs=2, cbs=[Swaps()])
    assert [*plain.to_frame()["update"].dropna()] == [*swapped.to_frame()["update"].dropna()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_precisions(dtype):
    rec, _ = fed(mlp(10, 16, 4).to(dtype), rows().to(dtype), cbs=[measures := Measures()], opt_func=Adam)
    assert_as_measured(rec, measures.seen, rel=1e-3)
    assert any(value > 0 for step in measures.seen for value in step.values())


def test_validation_has_none():
    learn = learner(loaders(), cbs=[rec := ActivationStatsRecorder(valid=True)])
    learn.fit(1)
    frame = rec.to_frame().query("phase == 'valid'")
    assert len(frame) and frame[["update", "dead_units"]].isna().all(axis=None)


def test_in_summary():
    rec, seen = recorded()
    assert rec.summary().loc["1.3", "last_update"] == pytest.approx(seen[-1]["1.3"], rel=1e-3)
    assert np.isnan(rec.summary().loc["0.1", "last_update"])
