"""LSUV and the recorder, end to end: what LSUV promises of a network is what the first batch of training shows."""

from functools import partial

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from learners import digits, learner, small_cnn
from models import convnet
from torch import nn
from zoo import xresnet18

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback


class Images:
    n_inp = 1

    def __init__(self, n, side=32, c=3):
        self.x, self.y = (
            torch.rand(n, c, side, side, generator=torch.Generator().manual_seed(6)) * 3 + 1,
            torch.arange(n) % 10,
        )

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


def wide():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 3, 2, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(256, 40),
    )


CASES = {
    "digits": (lambda: digits(512, 128), wide),
    "tanh": (
        lambda: digits(512, 128),
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)
        ),
    ),
    "a deep one": (lambda: loaders(128, 32), lambda: convnet(12, 16, n_out=40)),
    "norms": (lambda: loaders(128, 32), lambda: convnet(6, 16, norm=nn.BatchNorm2d, n_out=40)),
    "xresnet18": (lambda: loaders(96, 32), xresnet18),
}


def loaders(n, bs):
    return DataLoaders(DataLoader(Images(n), bs=bs, shuffle=True), DataLoader(Images(bs), bs=bs))


@pytest.mark.parametrize("given", [True, False], ids=["a batch", "from the loader"])
@pytest.mark.parametrize("case", CASES)
def test_the_first_batch_of_training_is_at_mean_0_and_std_1(case, given, tmp_path):
    "A different batch than LSUV saw; every corrected layer of at least 1,000 values within 0.15."
    dls, build = (f() if i == 0 else f for i, f in enumerate(CASES[case]))
    torch.manual_seed(2)
    model = build()
    learn = learner(dls, model, path=tmp_path, metrics=[])
    batch = None
    if given:
        xs = list(dls.train)
        batch = xs[-1]
    rec = ActivationStatsRecorder(modules=nn.Module, exclude=None)
    learn.add_cbs([LSUVCallback(batch=batch, verbose=False), rec])
    sizes = {}

    def note(name, m, args, out):
        sizes[name] = out.numel()

    handles = [m.register_forward_hook(partial(note, n)) for n, m in model.named_modules() if n]
    learn.fit(1)
    for h in handles:
        h.remove()
    first = rec.to_frame().query("step == 0").set_index("layer")
    corrected = [
        row for row in learn.lsuv_report if row.status in ("corrected", "unchanged") and sizes[row.name] >= 1000
    ]
    assert len(corrected) >= len(learn.lsuv_report) - 2
    for row in corrected:
        got, module = first.loc[row.name], model.get_submodule(row.name)
        assert abs(got["std"] - 1) <= 0.15, (row.name, got["std"])
        if module.bias is not None:
            assert abs(got["mean"]) <= 0.15, (row.name, got["mean"])


def test_the_recorder_sees_no_pass_of_lsuv_and_lsuv_no_hook_of_the_recorder(tmp_path):
    learn = learner(
        digits(), small_cnn(), path=tmp_path, cbs=[LSUVCallback(verbose=False), rec := ActivationStatsRecorder()]
    )
    learn.fit(1)
    learn.lsuv_init()
    assert [*rec.to_frame().step.unique()] == [0, 1, 2]
    alone = learner(digits(), small_cnn(), path=tmp_path, cbs=LSUVCallback(verbose=False))
    alone.fit(1)
    assert [row.std_before for row in alone.lsuv_report] != []
    for p, q in zip(alone.model.parameters(), learner(digits(), small_cnn(), path=tmp_path).model.parameters()):
        assert p.shape == q.shape
