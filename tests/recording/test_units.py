"""`dead_units`: the share of an activation's channels that did not fire once in an epoch."""

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback
from feeds import loaders
from learners import learner
from recorded import fed
from torch import nn
from torch.nn import functional as F

from fastai_lsuv import ActivationStatsRecorder


def dead(rec, layer):
    return [*rec.to_frame().query("layer == @layer")["dead_units"]]


class Emits(nn.Module):
    "Puts out what it is told, batch by batch, through an activation that does nothing more to it."

    def __init__(self, *batches):
        super().__init__()
        self.batches, self.n, self.w, self.act = batches, 0, nn.Parameter(torch.zeros(())), nn.LeakyReLU(1.0)

    def forward(self, x):
        self.n += 1
        return self.act(self.batches[(self.n - 1) % len(self.batches)]).mean() + self.w


def shares(*batches, **options):
    rec, _ = fed(Emits(*batches), torch.zeros(4, 1), batches=len(batches), modules="act", **options)
    return dead(rec, "act")


def rectified(n=16, channels=8, side=12):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(0)).relu()


def test_channels_that_are_always_zero():
    x = rectified()
    x[:, :6] = 0
    assert shares(x) == [0.75]


@pytest.mark.parametrize("value", [1e-30, 1.0])
def test_one_value_above_zero_revives_a_unit(value):
    "Wherever it is in an output of many values."
    x = rectified(n=64, channels=32, side=32)
    x[:, :4] = 0
    x[37, 2, 17, 29] = value
    assert shares(x) == [3 / 32]


def test_a_unit_is_alive_if_it_fires_in_any_batch_of_the_epoch():
    "And has to fire again in the next one."
    first, second, third = rectified(), rectified(), rectified()
    first[:, :4] = 0
    second[:, 2:] = 0
    third[:, :] = 0
    third[0, 0, 0, 0] = 1
    assert shares(first, second, third) == [0.5, 0.25, 0.25]
    rec, _ = fed(
        Emits(first, second, third), torch.zeros(4, 1), batches=1, modules="act", train=lambda learn: learn.fit(3)
    )
    assert dead(rec, "act") == [0.5, 7 / 8, 0.75], "each second batch is a validation's"
    assert rec.summary().loc["act", "dead_units"] == 0.75


def test_others_are_dead_where_they_do_not_move():
    "By more than a part in a thousand of the layer's std, whatever value they stand at."
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).tanh()
    x[:, :3] = -1 + 1e-5 * torch.rand(64, 3)
    x[:, 3] = 0.01 * torch.randn(64)
    assert shares(x) == pytest.approx([0.3])


def test_a_relu_that_is_always_on_is_not_dead():
    x = rectified()
    x[:, 0] = 3.0
    assert shares(x) == [0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_any_layout(layout):
    x = rectified().contiguous(memory_format=layout)
    x[:, 1] = 0
    assert shares(x) == [1 / 8]


class Kills(nn.Module):
    "Of so many units so many are dead."

    def __init__(self, layer, act, n_dead):
        super().__init__()
        self.layer, self.act = layer, act
        with torch.no_grad():
            self.layer.bias[:n_dead] = -1000

    def forward(self, x):
        return self.act(self.layer(x))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.ELU()], ids=str)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(8, 20), (16, 8)),
        (lambda: nn.Linear(8, 20), (16, 5, 8)),
        (lambda: nn.Linear(8, 20), (16, 5, 6, 8)),
        (lambda: nn.Conv1d(8, 20, 3), (16, 8, 30)),
        (lambda: nn.Conv2d(8, 20, 3), (16, 8, 9, 9)),
        (lambda: nn.ConvTranspose2d(8, 20, 3), (16, 8, 9, 9)),
        (lambda: nn.Sequential(nn.Conv2d(8, 20, 3), nn.GroupNorm(4, 20)), (16, 8, 9, 9)),
    ],
    ids=["linear", "sequence", "channels last", "conv1d", "conv2d", "transposed", "norm"],
)
def test_channels_are_where_the_layer_before_has_them(act, layer, shape):
    layer = layer()
    if isinstance(layer, nn.Sequential):
        layer.bias = layer[1].bias
    rec, _ = fed(Kills(layer, act, 15), torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert dead(rec, "act") == [0.75, 0.75]
    assert rec.summary().loc["act", "verdict"] in ("dead units", "dying")


class Functional(nn.Module):
    def __init__(self, act, norm=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.act, self.head = act, nn.Linear(8, 10)
        with torch.no_grad():
            (self.norm if norm else self.conv).bias[:6] = -100

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("act", [F.relu, torch.relu, lambda x: x.relu_()], ids=["F", "torch", "in place"])
def test_a_functional_relu_is_told_of_the_layer_before(act):
    learn = learner(loaders(), Functional(act), cbs=[rec := ActivationStatsRecorder()])
    learn.fit(2, 1e-5)
    assert set(dead(rec, "conv")[1:]) == {0.75}
    assert np.isnan(dead(rec, "head")).all()
    row = rec.summary().loc["conv"]
    assert row.verdict == "dead units" and "75%" in row.because


def test_a_norm_in_between_is_where_it_is_told():
    learn = learner(loaders(), Functional(F.relu, norm=True), cbs=[rec := ActivationStatsRecorder()])
    learn.fit(1, 1e-5)
    assert set(dead(rec, "norm")[1:]) == {0.75}
    assert np.isnan(dead(rec, "conv")).all()


def test_a_layer_in_front_of_a_module_has_no_units_of_its_own():
    "It is the activation that has them; and negative means in front of anything else are nobody's death."
    learn = learner(loaders(), Functional(nn.ReLU()), cbs=[rec := ActivationStatsRecorder()])
    learn.fit(1, 1e-5)
    assert np.isnan(dead(rec, "conv")).all() and set(dead(rec, "act")) == {0.75}
    learn = learner(loaders(), Functional(F.softplus), cbs=[rec := ActivationStatsRecorder()])
    learn.fit(1, 1e-5)
    assert np.isnan(dead(rec, "conv")).all()


def test_one_module_in_several_places():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(10, 4), nn.Linear(4, 12), nn.ReLU()
            with torch.no_grad():
                self.b.weight.abs_(), self.b.bias.zero_()
                self.a.bias[:2] = -1000
                self.b.bias[:6] = -1000

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    rec, _ = fed(Shares(), torch.randn(500, 10))
    assert dead(rec, "act") == [0.5, 0.5]


def test_only_training_counts():
    "A unit that fires in validation only is dead."

    class Mode(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(10, 4), nn.ReLU()

        def forward(self, x):
            return self.act(self.fc(x) - 1000 * self.training)

    rec, _ = fed(Mode(), torch.randn(16, 10), valid=True, train=lambda learn: learn.fit(2))
    assert set(rec.to_frame().query("layer == 'act' and phase == 'train'")["dead_units"]) == {1.0}


def test_over_the_recorded_batches():
    silent, loud = torch.zeros(4, 6), torch.ones(4, 6)
    assert shares(silent, loud, silent, loud, every=2) == [1, 1]


def test_a_function_that_only_reshapes_is_no_activation():
    class Pools(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    model = nn.Sequential(nn.Conv2d(1, 4, 3), Pools(), nn.Linear(4, 10))
    learn = learner(loaders(), model, cbs=[rec := ActivationStatsRecorder()])
    learn.fit(1)
    assert np.isnan(dead(rec, "1")).all()


class Ends(Callback):
    def after_batch(self):
        raise RuntimeError("on purpose")


def test_nothing_of_the_graph_is_kept():
    learn = learner(loaders(), Functional(F.relu), cbs=[rec := ActivationStatsRecorder(), Ends()])
    with pytest.raises(RuntimeError):
        learn.fit(1)
    assert rec._session.capture._nodes is None
