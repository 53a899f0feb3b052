"""A fit of any model on any inputs, with a recorder and a witness beside it."""

from __future__ import annotations

import torch
from fastai.data.core import DataLoaders
from fastai.optimizer import Adam
from learners import learner
from torch import nn
from torch.utils.checkpoint import checkpoint
from witness import Witness, skin

from fastai_lsuv import ActivationStatsRecorder


class OneValue(nn.Module):
    "A loss that any output has."

    def forward(self, out, y):
        leaves = [
            t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()
        ]
        return sum(t.float().mean() for t in leaves)


def fed(model, *inputs, bs=None, batches=2, cbs=(), train=lambda learn: learn.fit(1), opt_func=Adam, **options):
    "A fit of `model` on `batches` batches of `inputs`, with a recorder and a witness beside it."
    bs = bs or len(inputs[0])
    data = [(*inputs, torch.zeros(bs))] * batches
    dls = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=None) for _ in range(2)))
    dls.n_inp = len(inputs)
    learn = learner(dls, model, loss_func=OneValue(), metrics=[], cbs=cbs, lr=1e-4, opt_func=opt_func)
    learn.add_cbs([rec := ActivationStatsRecorder(**options), seen := Witness()])
    before = skin(model)
    train(learn)
    assert skin(model) == before
    return rec, seen.records


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant, net):
        super().__init__()
        self.net, self.use_reentrant = net, use_reentrant

    def forward(self, x):
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.use_reentrant)
