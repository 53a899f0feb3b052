"""Every kind of Learner that fastai makes: its batch as the model gets it, every layer at its target at the start."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch
import torch.utils.data as tud
from audit import AFFINE, moved, parameter_bits
from checks import assert_exact
from fastai.callback.core import Callback
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.tabular.all import CategoryBlock as TabularCategory
from fastai.text.all import (
    AWD_LSTM,
    Categorize,
    LMDataLoader,
    Numericalize,
    Pad_Chunk,
    SortedDL,
    awd_lstm_clas_config,
    awd_lstm_lm_config,
    language_model_learner,
    text_classifier_learner,
)
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    IntToFloatTensor,
    MaskBlock,
    PILImageBW,
    ProgressCallback,
    Resize,
    ToTensor,
    TransformBlock,
    fastuple,
    resnet18,
    unet_learner,
    vision_learner,
    xresnet18,
)
from learners import digits, items, learner, ran
from sklearn.datasets import load_diabetes, load_wine
from torch import nn

from fastai_lsuv import LSUVCallback


class Start(Callback):
    "Keeps the state in which the first epoch finds the model."

    order = 90
    state = None

    def before_epoch(self):
        if self.state is None:
            self.state = {name: value.clone() for name, value in self.learn.model.state_dict().items()}


def fitted(learn, batch=None, **options):
    "An epoch of `learn` with LSUV: the model before it, the model as training found it, the inputs of the batch."
    learn.remove_cb(ProgressCallback)
    batch = batch or first_batch(learn.dls.train)
    xb = tuple(batch[: getattr(learn.dls, "n_inp", len(batch) - 1)])
    before = parameter_bits(learn.model)
    learn.fit(1, 1e-4, cbs=[LSUVCallback(batch=batch, **options), start := Start()])
    assert ran(learn), "LSUV was not run"
    assert moved(before, learn.model), "nothing trains"
    learn.model.load_state_dict(start.state)
    return before, xb


def first_batch(dl):
    return dl.one_batch() if isinstance(dl, DataLoader) else next(iter(dl))


def assert_right(learn, before, xb, **kwargs):
    "Every layer that the audit knows, at any depth, is at mean 0 and std 1, or its row says truly why not."
    records = assert_exact(learn.model, xb, learn.lsuv_report, before, **kwargs)
    asleep = {n for n, m in learn.model.named_modules() if isinstance(m, AFFINE)} - {r.name for r in records}
    assert {learn.lsuv_report[n].reason for n in asleep} <= {"never called", "tied weight"}
    return {row.name: row.reason for row in learn.lsuv_report if row.status == "skipped"}


# --- vision -----------------------------------------------------------------------------------------------------------


def pictures(side=32):
    return digits(48, 16, item_tfms=Resize(side))


@pytest.mark.parametrize(
    "arch", [resnet18, "resnet10t", "convnext_atto"], ids=["torchvision", "timm resnet", "timm convnext"]
)
def test_vision_learner(arch):
    learn = vision_learner(pictures(), arch, pretrained=False, n_in=1)
    assert not assert_right(learn, *fitted(learn))


def test_unet_learner():
    images = [image for image, _ in items(24)]
    block = DataBlock(
        (ImageBlock(PILImageBW), MaskBlock(["paper", "ink"])),
        get_x=lambda i: images[i],
        get_y=lambda i: (images[i] > 99).astype(np.uint8),
        splitter=IndexSplitter(range(16, 24)),
        item_tfms=Resize(32),
    )
    learn = unet_learner(
        block.dataloaders(range(24), bs=8, num_workers=0),
        resnet18,
        pretrained=False,
        n_in=1,
        n_out=2,
        self_attention=False,
    )
    assert not assert_right(learn, *fitted(learn))


def test_xresnet():
    learn = learner(pictures(), xresnet18(n_out=10, c_in=1))
    assert not assert_right(learn, *fitted(learn))


# --- several inputs, and inputs in tuples and dicts -------------------------------------------------------------------


class Tower(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )


class Siamese(nn.Module):
    "fastai's tutorial: one encoder for both images, a head on what it says of the two."

    def __init__(self):
        super().__init__()
        self.encoder, self.head = Tower(), nn.Sequential(nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, 2))

    def forward(self, a, b):
        return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))


class Tupled(Siamese):
    def forward(self, pair):
        return super().forward(*pair)


class Keyed(Siamese):
    def forward(self, pair):
        assert isinstance(pair, Mapping)
        return super().forward(pair["left"], pair["right"])


class Nested(Siamese):
    def forward(self, pair, scale):
        return super().forward(pair["images"][0] * scale[:, None, None, None], pair["images"][1])


class ImageTuple(fastuple):
    "Of the same tutorial."

    @classmethod
    def create(cls, pair):
        return cls(tuple(PILImageBW.create(o) for o in pair))


def tuples_of_images():
    (images, labels), n = zip(*items(128)), 64
    block = DataBlock(
        (TransformBlock(type_tfms=ImageTuple.create, item_tfms=ToTensor, batch_tfms=IntToFloatTensor), CategoryBlock),
        get_x=lambda i: [images[i], images[i + n]],
        get_y=lambda i: str(labels[i] == labels[i + n]),
        splitter=IndexSplitter(range(48, 64)),
        item_tfms=Resize(8),
    )
    return block.dataloaders(range(n), bs=16, num_workers=0)


class Couples(tud.Dataset):
    def __init__(self, form, n=48):
        self.form, self.x, self.n = form, torch.rand(n, 2, 1, 8, 8, generator=torch.Generator().manual_seed(n)), n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        a, b = self.x[i]
        pair = {
            "two": (a, b),
            "tuple": ((a, b * 3 + 1),),
            "dict": ({"right": b * 3 + 1, "left": a},),
            "nested": ({"images": [a, b * 3 + 1]}, b.mean() + 2),
        }[self.form]
        return *pair, i % 2


def couples(kind, form, **kwargs):
    make = {"torch": tud.DataLoader, "fastai": DataLoader, "TfmdDL": TfmdDL}[kind]
    dls = DataLoaders(*(make(Couples(form, n), batch_size=16, **kwargs) for n in (48, 16)))
    if kind != "TfmdDL":
        dls.n_inp = 2 if form in ("two", "nested") else 1
    return dls


MODELS = {"two": Siamese, "tuple": Tupled, "dict": Keyed, "nested": Nested}


@pytest.mark.parametrize("kind", ["torch", "fastai", "TfmdDL"])
@pytest.mark.parametrize("form", MODELS)
def test_siamese(kind, form):
    learn = learner(couples(kind, form), MODELS[form]())
    before, xb = fitted(learn, next(iter(learn.dls.train)))
    assert len(xb) == (2 if form in ("two", "nested") else 1)
    assert not assert_right(learn, before, xb)
    assert [(row.name, row.n_calls) for row in learn.lsuv_report] == [
        ("encoder.0", 2),
        ("encoder.2", 2),
        ("head.0", 1),
        ("head.2", 1),
    ]


@pytest.mark.parametrize("form", MODELS)
def test_siamese_on_the_batch_that_the_loader_gives(form):
    "None given: the first of a loader that doesn't shuffle."
    learn = learner(couples("torch", form), MODELS[form](), cbs=LSUVCallback())
    batch, before = next(iter(learn.dls.train)), parameter_bits(learn.model)
    learn.fit(1, cbs=(start := Start()))
    learn.model.load_state_dict(start.state)
    assert not assert_right(learn, before, tuple(batch[:-1]))


def test_tuples_of_images():
    learn = learner(tuples_of_images(), Tupled())
    before, xb = fitted(learn)
    assert isinstance(xb[0], tuple) and len(xb) == 1
    assert not assert_right(learn, before, xb)


# --- texts ------------------------------------------------------------------------------------------------------------

SMALL = {"emb_sz": 20, "n_hid": 30, "n_layers": 2}
WORDS = ["xxunk", "xxpad", "xxbos", *(f"w{i}" for i in range(37))]


def texts(n=60, least=5, most=40):
    rng = np.random.default_rng(3)
    return [["xxbos", *rng.choice(WORDS[3:], rng.integers(least, most))] for _ in range(n)]


def lm_loaders():
    splits = [list(range(45)), list(range(45, 60))]
    return Datasets(texts(), [[Numericalize(WORDS)]], splits=splits, dl_type=LMDataLoader).dataloaders(
        bs=8, seq_len=12, num_workers=0
    )


def classifier_loaders(bs=8):
    lines = texts()
    dsets = Datasets(
        list(range(60)),
        [[lambda i: lines[i], Numericalize(WORDS)], [lambda i: str(i % 3), Categorize()]],
        splits=[list(range(45)), list(range(45, 60))],
        dl_type=SortedDL,
    )
    return dsets.dataloaders(bs=bs, num_workers=0, before_batch=Pad_Chunk(seq_len=12))


def recurrent(prefix):
    return {f"{prefix}rnns.{i}.module": "recurrent weights" for i in range(2)}


def test_language_model_learner_with_tied_weights():
    learn = language_model_learner(lm_loaders(), AWD_LSTM, config=awd_lstm_lm_config | SMALL, pretrained=False)
    before, xb = fitted(learn)
    assert assert_right(learn, before, xb) == {"1.decoder": "tied weight"} | recurrent("0.")
    assert not moved(before, learn.model), "the only layer is skipped, and training starts from what was there"


def test_language_model_learner_with_weights_of_its_own():
    learn = language_model_learner(
        lm_loaders(), AWD_LSTM, config=awd_lstm_lm_config | SMALL | {"tie_weights": False}, pretrained=False
    )
    before, xb = fitted(learn)
    assert assert_right(learn, before, xb) == recurrent("0.")
    assert moved(before, learn.model) == {"1.decoder.weight", "1.decoder.bias"}


def test_text_classifier_learner_on_padded_batches():
    learn = text_classifier_learner(
        classifier_loaders(), AWD_LSTM, config=awd_lstm_clas_config | SMALL, seq_len=12, max_len=24, pretrained=False
    )
    learn.unfreeze()
    before, xb = fitted(learn)
    assert (xb[0] == 1).any(), "no padding"
    assert assert_right(learn, before, xb) == recurrent("0.module.")
    assert {n.split(".")[0] for n in moved(before, learn.model)} == {"1"}, "the encoder has no affine layer"


# --- tables and ratings -----------------------------------------------------------------------------------------------


def wine(cats=True, conts=True):
    frame = load_wine(as_frame=True).frame
    names = list(frame)[:-1]
    frame["target"] = frame["target"].astype(str)
    for name in names[:3]:
        frame[f"{name} class"] = pd.qcut(frame[name], 4, labels=False).astype(str)
    frame.loc[::9, names[4]] = np.nan
    return TabularDataLoaders.from_df(
        frame,
        procs=[Categorify, FillMissing, Normalize],
        cat_names=[f"{n} class" for n in names[:3]] if cats else [],
        cont_names=names[3:] if conts else [],
        y_names="target",
        y_block=TabularCategory(),
        valid_idx=list(range(0, 178, 4)),
        bs=32,
    )


def diabetes():
    frame = load_diabetes(as_frame=True).frame.astype(np.float32)
    return TabularDataLoaders.from_df(
        frame, procs=[Normalize], cont_names=list(frame)[:-1], y_names="target", valid_idx=list(range(100)), bs=64
    )


@pytest.mark.parametrize("which", ["both", "categories", "numbers", "regression"])
def test_tabular_learner(which):
    dls = diabetes() if which == "regression" else wine(which != "numbers", which != "categories")
    learn = tabular_learner(
        dls, layers=[20, 10], **({"n_out": 1, "loss_func": nn.MSELoss()} if which == "regression" else {})
    )
    before, xb = fitted(learn)
    assert [t.shape[1] > 0 for t in xb] == [
        which in ("both", "categories", "numbers") and bool(learn.model.embeds),
        which != "categories",
    ]
    assert not assert_right(learn, before, xb)


def ratings():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "user": rng.integers(0, 12, 240),
            "title": rng.integers(0, 20, 240),
            "rating": rng.integers(1, 6, 240).astype(np.float32),
        }
    )
    return CollabDataLoaders.from_df(frame, bs=48, seed=2)


def test_collab_learner_with_a_network():
    learn = collab_learner(ratings(), use_nn=True, layers=[20, 10], y_range=(0, 5.5))
    assert not assert_right(learn, *fitted(learn))


def test_collab_learner_with_dot_products_has_nothing_to_correct_and_trains():
    learn = collab_learner(ratings(), n_factors=8, y_range=(0, 5.5))
    learn.remove_cb(ProgressCallback)
    before = parameter_bits(learn.model)
    with pytest.warns(UserWarning, match="nothing to correct"):
        learn.fit(1, cbs=[LSUVCallback(), start := Start()])
    assert len(learn.lsuv_report) == 0
    assert moved(before, learn.model) == set(before)
    learn.model.load_state_dict(start.state)
    assert not moved(before, learn.model)
