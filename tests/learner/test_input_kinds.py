"""Inputs of every kind on their way through callbacks: other dtypes, shapes, numbers of inputs, dicts, mixed images."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from audit import audit
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.mixup import CutMix, MixUp
from fastai.vision.all import Callback
from feeds import N, complaints, loaders, pixels
from learners import Spy, exact, learner, small_cnn
from models import Tally
from torch import nn

from fastai_lsuv import LSUVCallback


def feed(learn, x):
    learn.xb = (x,)


def rewriter(f):
    return Callback(before_batch=lambda self: feed(self.learn, f(*self.xb)))


def unpacked(f):
    return Callback(before_batch=lambda self: setattr(self.learn, "xb", f(*self.xb)))


class Deletes(Callback):
    def before_batch(self):
        del self.x["labels"]


class Located(nn.Module):
    "An image, and where its pixels are."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 6), nn.Linear(2, 6), nn.Linear(12, 10)

    def forward(self, x, where):
        return self.head(torch.cat([self.a(x.flatten(1)), self.b(where)], 1).relu())


class Tokens(nn.Module):
    "Keyword inputs, as a transformer takes them."

    def __init__(self):
        super().__init__()
        self.emb, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, ids, mask=None):
        return self.head((self.fc(self.emb(ids)).relu() * mask[..., None]).mean(1))


class Wrapped(nn.Module):
    "Takes a dict for what it wraps."

    def __init__(self):
        super().__init__()
        self.inner = Tokens()

    def forward(self, kw):
        return self.inner(**kw)


TOKENS = {"ids": torch.arange(N * 5).reshape(N, 5) % 20, "mask": torch.arange(N * 5).reshape(N, 5) % 3 > 0}
HEAD = {k: v[:16] for k, v in TOKENS.items()}
PLACES = torch.arange(32.0).reshape(16, 2)
KINDS = {  # name: (data, callback, model, what the model is fed first)
    "bytes to floats": (
        lambda: (pixels() * 255).byte(),
        lambda: rewriter(lambda x: x.float() / 255),
        small_cnn,
        lambda: (pixels()[:16] * 255).byte().float() / 255,
    ),
    "to double": (
        pixels,
        lambda: rewriter(torch.Tensor.double),
        lambda: small_cnn().double(),
        lambda: pixels()[:16].double(),
    ),
    "cropped": (
        partial(pixels, 12),
        lambda: rewriter(lambda x: x[..., 2:10, 1:9]),
        small_cnn,
        lambda: pixels(12)[:16, :, 2:10, 1:9],
    ),
    "padded": (
        partial(pixels, 6),
        lambda: rewriter(lambda x: F.pad(x, (1, 1, 1, 1), value=5.0)),
        small_cnn,
        lambda: F.pad(pixels(6)[:16], (1, 1, 1, 1), value=5.0),
    ),
    "another input": (
        pixels,
        lambda: unpacked(lambda x: (x, PLACES.to(x.device))),
        Located,
        lambda: (pixels()[:16], PLACES),
    ),
    "dict": (lambda: TOKENS, lambda: None, Wrapped, lambda: (HEAD,)),
    "dict, unpacked": (
        lambda: TOKENS,
        lambda: unpacked(lambda d: (d["ids"], d["mask"])),
        Tokens,
        lambda: (HEAD["ids"], HEAD["mask"]),
    ),
    "dict, less": (
        lambda: TOKENS | {"labels": torch.arange(N)},
        lambda: unpacked(lambda d: ({k: d[k] for k in ("ids", "mask")},)),
        Wrapped,
        lambda: (HEAD,),
    ),
    "dict, popped": (
        lambda: TOKENS | {"labels": torch.arange(N)},
        lambda: Callback(before_batch=lambda self: self.x.pop("labels")),
        Wrapped,
        lambda: (HEAD,),
    ),
    "dict, deleted": (lambda: TOKENS | {"labels": torch.arange(N)}, Deletes, Wrapped, lambda: (HEAD,)),
    "dict, updated": (
        lambda: {"ids": TOKENS["ids"]},
        lambda: Callback(before_batch=lambda self: self.x.update(mask=self.x["ids"] > 4)),
        Wrapped,
        lambda: ({"ids": HEAD["ids"], "mask": HEAD["ids"] > 4},),
    ),
    "dict, more": (
        lambda: {"ids": TOKENS["ids"]},
        lambda: unpacked(lambda d: (d.update(mask=d["ids"] > 4) or d,)),
        Wrapped,
        lambda: ({"ids": HEAD["ids"], "mask": HEAD["ids"] > 4},),
    ),
}


@pytest.mark.parametrize("how", KINDS)
def test_inputs_of_every_kind(how, recwarn):
    data, cb, model, wanted = (f() for f in KINDS[how])
    learn = learner(loaders(data), model, cbs=cb)
    learn.fit(1, cbs=[LSUVCallback(), spy := Looks().watch(wanted)])
    assert spy.audits[0]
    assert exact(spy.audits[0])
    assert not complaints(recwarn)


class Looks(Spy):
    "Audits, and takes no notice of batches, whose inputs may be no tensors."

    def before_batch(self):
        pass


# --- fastai's own -----------------------------------------------------------------------------------------------------


class Tap(nn.Module):
    "Keeps all that the model is fed."

    def __init__(self):
        super().__init__()
        self.fed = Tally()

    def forward(self, x):
        self.fed.append(x.clone())
        return x


def mixed_up(fed, raw):
    "Whether each image lies on the way from itself to another."
    way = (raw[None] - raw[:, None]).flatten(2)  # i, j, pixel
    gone = (fed - raw).flatten(1)[:, None]
    share = (gone * way).sum(-1, keepdim=True) / way.square().sum(-1, keepdim=True).clamp_min(1e-9)
    return bool(((gone - share * way).abs().amax(-1).amin(1) < 1e-5).all())


def cut_mixed(fed, raw):
    return torch.equal(fed.sort(0).values, raw.sort(0).values)  # at every pixel the same values, in another order


@pytest.mark.parametrize(
    ("mix", "fits"), [(MixUp, mixed_up), (partial(CutMix, 100.0), cut_mixed)], ids=["MixUp", "CutMix"]
)
def test_mixed_images_are_what_is_measured(mix, fits, recwarn):
    learn, mix = learner(loaders(), nn.Sequential(tap := Tap(), *small_cnn()), cbs=LSUVCallback()), mix()
    loss, during = learn.loss_func, []
    at_epoch = Callback(before_epoch=lambda self: during.append(audit(self.model, tap.fed[0])))
    in_batch = Callback(
        after_pred=lambda self: (
            during.append(getattr(self.loss_func, "__self__", None) is mix) if self.training else None
        )
    )
    learn.fit(1, cbs=[mix, at_epoch, in_batch])
    fed, raw = tap.fed[0].cpu(), pixels()[:16]
    assert not torch.equal(fed, raw)
    assert fits(fed, raw)
    assert exact(during[0])
    assert during[1:] == [True] * 3, "the loss that mixes is that of the callback itself"
    assert learn.loss_func is loss
    assert not complaints(recwarn)


def test_channels_last():
    learn = learner(
        loaders(),
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)),
        cbs=ChannelsLast(),
    )
    learn.fit(1, cbs=[LSUVCallback(), spy := Spy().watch(pixels()[:16])])
    assert exact(spy.audits[0])
    assert learn.model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert not learn.model[2].weight.is_contiguous()
