"""What it is for: a plain deep network on digits that stays at chance without LSUV, and trains with it."""

import pytest
import torch
from audit import audit
from fastai.vision.all import CrossEntropyLossFlat, Learner, ProgressCallback, accuracy, set_seed
from torch import nn

from fastai_lsuv import LSUVCallback
from fastai_lsuv.demo import digits_dls, plain_cnn


def trained(cbs=None):
    set_seed(0)
    learn = Learner(digits_dls(), plain_cnn(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.fit_one_cycle(5, 1e-3)
    return learn, learn.recorder.values[-1][-1]


def test_the_demo_s_net_is_plain_and_deep():
    net = plain_cnn()
    weighted = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == 17
    assert not [m for m in net.modules() if "Norm" in type(m).__name__]
    x = digits_dls().one_batch()[0]
    stds = [r.std for r in audit(net, x)]
    assert stds[-1] < 0.1, "with default weights the signal dies"


@pytest.mark.slow
def test_without_it_stays_at_chance():
    assert trained()[1] < 0.2


@pytest.mark.slow
def test_with_it_trains():
    learn, score = trained(LSUVCallback())
    assert score > 0.85
    assert len(learn.lsuv_report) == 17
    assert learn.lsuv_report.converged
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
