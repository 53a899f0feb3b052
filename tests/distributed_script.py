"""What each process does in test_distributed.py: train in `distrib_ctx` on data of its own, and tell what it saw."""

from __future__ import annotations

import os
import random
import traceback
from contextlib import redirect_stdout
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from audit import bits
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from models import Picky, Stumble
from torch import nn

from fastai_lsuv import ActivationStatsRecorder, LSUVCallback, lsuv_


def main(job, rank, port, folder, options):
    "Run `job` as one of two ranks; result and output go to files in `folder`. (More threads than cores would spin.)"
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    DistributedDL._broadcast = broadcast_on_the_cpu
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100 + rank)
    with (folder / f"{rank}.txt").open("w") as out, redirect_stdout(out):
        try:
            result = job(rank, **options)
        except BaseException as e:
            result = {"died": f"{type(e).__name__}: {e}\n{traceback.format_exc()}"}
    torch.save(result, folder / f"{rank}.pt")
    os._exit(0)  # a farewell to the process group may wait for ever for a rank that is gone already


def broadcast_on_the_cpu(self, t, rank):
    "fastai's goes over the GPU."
    t = torch.tensor(list(t))
    dist.broadcast(t, rank)
    return t.tolist()


# --- models -----------------------------------------------------------------------------------------------------------


def conv(n_in, n_out, *more):
    return nn.Conv2d(n_in, n_out, 3, 2, 1), *more, nn.ReLU(inplace=True)


class Either(nn.Module):
    "Which layer runs depends on the data, and so on the rank."

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(64, 8), nn.Linear(8, 10), nn.Linear(8, 10)

    def forward(self, x):
        return (self.left if x.mean() > 1 else self.right)(self.first(x.flatten(1)).relu())


MODELS = {
    "plain": lambda *stumble: nn.Sequential(*conv(1, 8), *stumble, *conv(8, 8), nn.Flatten(), nn.Linear(32, 10)),
    "norms": lambda: nn.Sequential(
        *conv(1, 8, nn.BatchNorm2d(8)), *conv(8, 8, nn.BatchNorm2d(8)), nn.Flatten(), nn.Linear(32, 10)
    ),
    "blocks": lambda: nn.Sequential(
        nn.Sequential(*conv(1, 8)), nn.Sequential(*conv(8, 8), nn.Flatten()), nn.Sequential(nn.Linear(32, 10))
    ),
    "either": Either,
}
ERRORS = {
    "value": lambda: ValueError("record 7 is broken"),
    "memory": lambda: torch.OutOfMemoryError("record 7 is too large"),
    "none": lambda: RuntimeError(),
    "its own": lambda: Picky(7, "a record"),
    "interrupt": lambda: KeyboardInterrupt(),
}


# --- data: other images on each rank ----------------------------------------------------------------------------------


class Images:
    n_inp = 1

    def __init__(self, rank, n=64, error=None):
        self.x, self.n, self.error = images(rank, n), n, error

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if self.error is not None:
            raise self.error
        return self.x[i], i % 10


def images(rank, n):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(7 + rank)) * (rank + 1) + 3 * rank


def loaders(rank, error=None):
    return DataLoaders(DataLoader(Images(rank, 64, error), bs=16, shuffle=True), DataLoader(Images(rank, 32), bs=16))


def own_batch(rank):
    return images(rank + 2, 24 - 8 * rank), torch.arange(24 - 8 * rank) % 10


# --- what is seen -----------------------------------------------------------------------------------------------------


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Look(Callback):
    "The model when LSUV is done, before anything wraps it; then as the first batch finds it; and all batches."

    order = LSUVCallback.order + 1e-3

    def __init__(self):
        self.after, self.first, self.seen = None, None, []

    def before_fit(self):
        self.after = state(self.learn.model)

    def before_batch(self):
        if self.first is None:
            self.first = state(getattr(self.learn.model, "module", self.learn.model))
        self.seen.append([bits(t) for t in (*self.learn.xb, *self.learn.yb)])


def learner(rank, model, dls=None, **kwargs):
    return Learner(dls or loaders(rank), model, loss_func=nn.CrossEntropyLoss(), **kwargs).remove_cb(ProgressCallback)


def together(learn):
    return learn.distrib_ctx(cpu=True, sync_bn=False)


def rows(learn):
    return [vars(row) for row in getattr(learn, "lsuv_report", ())]


def train(rank, model="plain", given=True, lsuv=True, loaded=(), done=(), **options):
    "One epoch of both together, then one of each alone."
    net = MODELS[model]()
    own, inputs = state(net), []
    if model == "norms":
        own |= {n: b.copy_(torch.rand_like(b)).clone() for n, b in net.named_buffers() if "running" in n}
    learn = learner(rank, net, cbs=LSUVCallback(batch=own_batch(rank) if given else None, **options) if lsuv else None)
    if rank in loaded:
        net.load_state_dict(own)
    if rank in done:
        own = learn.lsuv_init(own_batch(rank)) and state(net)
    watch = net.register_forward_pre_hook(
        lambda m, args: inputs.append(args[0].clone()) if look.after is None else None
    )
    learn.add_cb(look := Look())
    with together(learn):
        learn.fit(1)
    watch.remove()
    end, report = state(net), getattr(learn, "lsuv_report", None)
    learn.remove_cb(look).add_cb(again := Look())
    result = {
        "own": own,
        "after": look.after,
        "first": look.first,
        "seen": look.seen,
        "rows": rows(learn),
        "ran": report is not None,
        "end": end,
        "inputs": inputs,
        "unwrapped": learn.model is net,
    }
    learn.fit(1)
    return result | {"second": again.first, "same report": getattr(learn, "lsuv_report", None) is report}


def lsuv_init(rank, models=("plain", "plain")):
    "The explicit door, inside the context."
    net, error = MODELS[models[rank]](), ""
    own, learn = state(net), learner(rank, net)
    with together(learn):
        try:
            learn.lsuv_init(own_batch(rank))
        except RuntimeError as e:
            error = str(e)
    return {"own": own, "after": state(net), "rows": rows(learn), "error": error}


def fails(rank, where, kind, on=1):
    "An error in the data, in the `where`-th pass of the model or in its batch, on rank `on` only; then another try."
    error = ERRORS[kind]() if rank == on else None
    net = MODELS["plain"](Stumble(error, where if rank == on and isinstance(where, int) else 0))
    own = state(net)
    batch = own_batch(rank)
    if where == "nan" and rank == on:
        batch[0][3, 0, 0, 0] = float("nan")
    learn = learner(rank, net, loaders(rank, error if where == "data" else None))
    result = {"own": own}
    with together(learn):
        try:
            learn.fit(1, cbs=LSUVCallback(batch=None if where == "data" else batch))
        except BaseException as e:
            result |= {"error": type(e).__name__, "text": str(e)}
        result |= {
            "left": state(net),
            "ran": "lsuv_report" in vars(learn),
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()),
        }
        learn.dls = loaders(rank)
        learn.add_cb(look := Look()).fit(1, cbs=LSUVCallback(batch=own_batch(rank)))
    return result | {"after": look.after, "ran again": "lsuv_report" in vars(learn)}


def fine_tune(rank):
    net = MODELS["blocks"]()
    learn = learner(rank, net, splitter=lambda m: [list(m[:2].parameters()), list(m[2].parameters())])
    with together(learn):
        learn.fine_tune(1, cbs=LSUVCallback)
    return {"rows": rows(learn), "after": state(net)}


def recorded(rank, folder):
    "Two epochs together and one alone, with a recorder; what the first forward put out."
    net, outputs = MODELS["norms"](), {}

    def note(name, m, args, out):
        outputs.setdefault(name, (out.mean().item(), out.std().item()))

    handles = [m.register_forward_hook(partial(note, name), prepend=True) for name, m in net.named_modules()]
    rec = ActivationStatsRecorder(modules=nn.Conv2d, fname=folder / "log.csv", with_grad=True)
    learn = learner(rank, net, cbs=rec)
    with together(learn):
        learn.fit(2)
    for handle in handles:
        handle.remove()
    both = {
        "frame": rec.to_frame(),
        "layers": rec.layer_names,
        "outputs": outputs,
        "log": (folder / "log.csv").read_text() if rank == 0 else "",
        "end": state(net),
        "hooks": sum(len(m._forward_hooks) for m in net.modules()),
    }
    dist.barrier()
    return both


def alone(rank):
    "When training together is over, rank 0 initialises another model by itself. (fastai's own `fit` would wait.)"
    learn = learner(rank, MODELS["plain"]())
    with together(learn):
        learn.fit(1)
    if rank:
        return {}
    other = learner(rank, MODELS["plain"]())
    return {"rows": [*other.lsuv_init(own_batch(0))], "again": [*lsuv_(MODELS["plain"](), own_batch(0)[0])]}
