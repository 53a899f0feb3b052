"""The verdicts of `summary()`: networks broken on purpose are told, healthy ones are left in peace."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.vision.all import SGD, Adam, CrossEntropyLossFlat
from learners import digits, learner
from torch import nn
from zoo import xresnet18

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback
from fastai_lsuv.recording.verdicts import LEARNING, WORKS

VERDICTS = {"exploding", "dying", "dead units", "vanishing", "too fast", "not learning", "saturated", "healthy"}
COLUMNS = [
    "verdict",
    "type",
    "first_std",
    "last_std",
    "min_std",
    "max_std",
    "max_near_zero",
    "last_mean",
    "dead_units",
    "last_update",
    "signal",
    "because",
]


@pytest.fixture(scope="module")
def dls():
    return digits(256, 32)


def trained(dls, model, lr=1e-3, epochs=3, cbs=(), opt_func=Adam, **options):
    learn = learner(dls, model, opt_func=opt_func, metrics=[], cbs=[rec := ActivationStatsRecorder(**options), *cbs])
    with np.errstate(all="ignore"):
        learn.fit(epochs, lr)
    summary = rec.summary()
    assert [*summary.columns] == COLUMNS and summary.index.name == "layer" and set(summary.verdict) <= VERDICTS
    return summary, rec


def deep(act=nn.ReLU, depth=8, scale=1.0, width=48, zero_bias=True):
    "A multilayer perceptron of Kaiming's or Xavier's weights, each times `scale`."
    torch.manual_seed(4)
    layers = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(width if i else 64, width), act()]
        nn.init.kaiming_normal_(layers[-2].weight) if act is nn.ReLU else nn.init.xavier_normal_(layers[-2].weight)
        layers[-2].weight.data.mul_(scale)
        if zero_bias:
            nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers, nn.Linear(width, 10))


def of(summary, kind):
    return summary[summary.type == kind]


# --- broken on purpose ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_dead_layer(dls, at):
    "A bias so low that no unit is ever active."
    model = deep()
    nn.init.constant_(model[1 + 2 * at].bias, -100)
    summary, _rec = trained(dls, model)
    row = summary.loc[str(2 + 2 * at)]
    assert row.verdict == "dying" and row.max_near_zero > 0.999 and row.type == "ReLU"
    before = [n for n in of(summary, "ReLU").index if int(n) < 2 + 2 * at]
    assert (summary.loc[before].verdict == "healthy").all(), "none before it"


def test_it_dies_of_its_learning_rate(dls):
    summary, rec = trained(dls, deep(), lr=1.0, epochs=4)
    last = rec.to_frame().groupby("layer").near_zero.last()
    dead = [n for n in of(summary, "ReLU").index if last[n] > 0.99]
    assert dead, "else it is no test"
    assert (summary.loc[dead].verdict == "dying").all()


def test_exploding_from_layer_to_layer(dls):
    summary, _ = trained(dls, deep(scale=10.0), lr=1e-5)
    linear = of(summary, "Linear")
    assert (linear.verdict[3:] == "exploding").all() and linear.last_std.iloc[-1] > 1e4
    assert (of(summary, "ReLU").verdict[3:] == "exploding").all()


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_exploding_in_time(dls, lr):
    "To infinity and NaN."
    torch.manual_seed(0)
    summary, rec = trained(dls, deep(partial(nn.LeakyReLU, 0.9)), lr=lr, opt_func=SGD, epochs=4)
    assert not np.isfinite(rec.to_frame()["std"]).all(), "else it is no test"
    assert (of(summary, "Linear").verdict == "exploding").all()


def test_growing_in_time(dls):
    "A thousand times its first std, all of it finite."
    model = deep(depth=3)

    class Grows(LSUVCallback.__mro__[1]):
        def after_batch(self):
            if self.training:
                self.learn.model[3].weight.data.mul_(2)

    summary, _rec = trained(dls, model, lr=1e-4, cbs=[Grows()])
    assert summary.loc["3"].last_std > 1e4 and summary.loc["3"].verdict == "exploding"
    assert summary.loc["1"].verdict == "healthy"


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_vanishing_from_layer_to_layer(dls, act):
    summary, _ = trained(dls, deep(act, scale=0.1), lr=1e-7)
    linear = of(summary, "Linear")
    assert linear.last_std.iloc[-2] < 1e-5
    assert (linear.verdict[3:-1] == "vanishing").all()
    assert "healthy" not in {*of(summary, act.__name__).verdict[3:]}


def test_shrinking_in_time(dls):
    class Shrinks(LSUVCallback.__mro__[1]):
        def after_batch(self):
            if self.training:
                for p in self.learn.model[3].parameters():
                    p.data.mul_(0.5)

    summary, _ = trained(dls, deep(nn.Tanh, depth=3), lr=1e-4, cbs=[Shrinks()])
    assert summary.loc["3"].verdict == "vanishing" and summary.loc["1"].verdict == "healthy"


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.Tanh, "Tanh"),
        (nn.Sigmoid, "Sigmoid"),
        (nn.Hardtanh, "Hardtanh"),
        (nn.Hardsigmoid, "Hardsigmoid"),
        (nn.Softsign, "Softsign"),
    ],
)
def test_saturated(dls, act, name):
    summary, _ = trained(dls, deep(act, scale=20.0 if act is not nn.Softsign else 200.0, depth=4), lr=1e-6)
    if act is nn.Softsign and (of(summary, name).verdict != "saturated").all():
        pytest.skip("not a bound that it reaches")
    assert (of(summary, name).verdict[1:] == "saturated").all(), summary


def test_extremes_that_thinning_dropped_count(dls):
    "A verdict does not depend on `max_records`."

    def again():
        torch.manual_seed(1), random.seed(1)
        return digits(128, 32)

    for scale in (0.1, 10.0):
        (a, _), (b, _) = (trained(again(), deep(scale=scale), lr=1e-5, max_records=n) for n in (2, 1000))
        assert a.equals(b)


# --- healthy ones -----------------------------------------------------------------------------------------------------


def assert_healthy(summary):
    sick = summary[summary.verdict != "healthy"]
    assert not len(sick), f"false alarms:\n{sick.to_string()}"


def cnn(act=partial(nn.ReLU, inplace=True), norm=None):
    layers = []
    for i, (a, b) in enumerate([(1, 16), (16, 16), (16, 32), (32, 32)]):
        layers += [nn.Conv2d(a, b, 3, 2 if i in (0, 2) else 1, 1), *([norm(b)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


@pytest.mark.parametrize(
    "act",
    [partial(nn.ReLU, inplace=True), nn.Tanh, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.Softplus],
    ids=lambda a: getattr(a, "__name__", "ReLU"),
)
def test_lsuv_d_networks_on_digits(dls, act):
    assert_healthy(trained(dls, cnn(act), epochs=4, cbs=[LSUVCallback(verbose=False)], with_grad=True)[0])


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])  # eight sigmoids in a row do lose the signal, and are told so
def test_lsuv_d_perceptrons(dls, act):
    assert_healthy(trained(dls, deep(act), epochs=4, cbs=[LSUVCallback(verbose=False)])[0])


def test_batch_norms(dls):
    assert_healthy(trained(dls, cnn(norm=nn.BatchNorm2d), epochs=4)[0])


def noise(n=4, bs=8, side=32):
    torch.manual_seed(9)
    return [(torch.randn(bs, 3, side, side), torch.arange(bs) % 10) for _ in range(n)]


def loaders_of(batches):
    dls = DataLoaders(*(torch.utils.data.DataLoader(batches, batch_size=None) for _ in range(2)))
    dls.n_inp = 1
    return dls


def vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10)


def convnext():
    import timm

    return timm.create_model("convnext_atto", num_classes=10, drop_path_rate=0.1)


@pytest.mark.parametrize("build", [xresnet18, vit, convnext], ids=lambda f: f.__name__)
@pytest.mark.parametrize("lsuv", [False, True], ids=["as it is made", "after LSUV"])
def test_architectures(build, lsuv):
    "Also those that begin with zeros in their residual branches."
    torch.manual_seed(3)
    assert_healthy(
        trained(loaders_of(noise()), build(), epochs=2, cbs=[LSUVCallback(verbose=False)] if lsuv else [])[0]
    )


def test_awd_lstm():
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model

    torch.manual_seed(3)
    model = get_language_model(AWD_LSTM, 40, dict(awd_lstm_lm_config, emb_sz=32, n_hid=64, n_layers=3))
    batches = [(x := torch.randint(40, (8, 20)), x) for _ in range(6)]
    from fastai.callback.rnn import ModelResetter

    learn = learner(
        loaders_of(batches),
        model,
        metrics=[],
        loss_func=lambda out, y: CrossEntropyLossFlat()(out[0] if isinstance(out, tuple) else out, y),
        cbs=[rec := ActivationStatsRecorder(), ModelResetter()],
    )
    learn.fit(3, 5e-3)
    assert_healthy(rec.summary())


def test_tabular_model():
    from fastai.tabular.model import TabularModel

    torch.manual_seed(3)
    model = TabularModel([(10, 5), (20, 8)], 6, 3, [64, 32])
    cats, conts = torch.stack([torch.randint(10, (64,)), torch.randint(20, (64,))], 1), torch.randn(64, 6)

    batches = [(cats, conts, cats[:, 0] % 3)] * 12
    dls = DataLoaders(*(torch.utils.data.DataLoader(batches, batch_size=None) for _ in range(2)))
    dls.n_inp = 2
    summary, _ = trained(dls, model, epochs=1)
    assert_healthy(summary)


class Gated(nn.Module):
    "A gate that is the same for all inputs, as many begin, beside the stream that it scales."

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        nn.init.zeros_(self.gate.weight)
        nn.init.normal_(self.gate.bias)

    def forward(self, x):
        x = self.stem(x.flatten(1))
        return self.head(x * self.gate(x.detach()).sigmoid())


def test_a_signal_that_later_layers_have_is_not_lost(dls):
    summary, _ = trained(dls, Gated(), epochs=1, lr=1e-4)
    assert summary.loc["gate", "signal"] < 0.1 < summary.loc["head", "signal"], "else it is no test"
    assert summary.loc["gate", "verdict"] == "healthy"


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainings():
    "Of eleven networks at fifteen learning rates, as `benchmarks/learning_rates.py` has measured them."
    return pd.read_csv(Path(__file__).parent.parent / "benchmarks" / "learning_rates.csv")


def test_the_best_learning_rates_are_not_complained_of(trainings):
    best = trainings.loc[trainings.groupby("network").accuracy.idxmax()]
    assert len(best) == 11
    assert best.median_mean.between(*LEARNING).all()
    assert best.median_mean.between(*WORKS).sum() >= 10


def test_rates_that_are_called_too_fast_or_not_learning_train_worse(trainings):
    best = trainings.groupby("network").accuracy.transform("max")
    low, high = LEARNING
    slow, fast = trainings[trainings.highest_mean < low], trainings[trainings.median_mean > high]
    assert slow.accuracy.max() < 0.25 and (slow.groupby("network").rate.min() < 2e-7).sum() == 11
    assert (fast.accuracy < best[fast.index] - 0.05).mean() >= 0.8, fast
