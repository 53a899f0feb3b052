"fastai's own: vision, text, tabular, collaborative filtering."

from __future__ import annotations

import fastai.vision.models.xresnet as xresnet
import torch
from fastai.collab import EmbeddingDotBias
from fastai.layers import SimpleSelfAttention
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from fastai.text.models.core import get_language_model, get_text_classifier
from fastai.vision.gan import basic_critic, basic_generator
from fastai.vision.learner import create_body, create_head, create_unet_model, create_vision_model
from torch import nn
from torchvision.models import resnet18

from .architecture import Architecture, Built
from .inputs import crops, noise, tokens

XRESNETS = (
    "xresnet18",
    "xresnet34",
    "xresnet50",
    "xresnet18_deep",
    "xresnet18_deeper",
    "xse_resnet18",
    "xresnext18",
    "xse_resnext18",
)
CATEGORIES = [(10, 5), (4, 3), (20, 8)]  # categorical columns: cardinality, width of the embedding


def architectures():
    for name in XRESNETS:
        yield of(name, lambda name=name: (getattr(xresnet, name)(n_out=10), crops(side=64)))
    yield of("xresnet18 with self-attention", lambda: (xresnet.xresnet18(n_out=10, sa=True), crops(side=64)))
    yield of(
        "xresnet18 1d", lambda: (xresnet.xresnet18(n_out=10, ndim=1, c_in=2, stem_szs=(16, 16, 64)), noise(8, 2, 256))
    )
    yield of("vision model", lambda: (create_vision_model(resnet18, 10, pretrained=False), crops(side=64)))
    yield of("DynamicUnet", lambda: (create_unet_model(resnet18, 3, (64, 64), pretrained=False), crops(side=64)))
    yield of(
        "DynamicUnet with self-attention",
        lambda: (
            create_unet_model(resnet18, 3, (64, 64), pretrained=False, self_attention=True, blur=True),
            crops(side=64),
        ),
    )
    yield of(
        "AWD_LSTM language model", lambda: (get_language_model(AWD_LSTM, 100, small(awd_lstm_lm_config)), tokens())
    )
    yield of(
        "AWD_LSTM classifier",
        lambda: (get_text_classifier(AWD_LSTM, 100, 3, seq_len=24, config=small(awd_lstm_clas_config)), tokens()),
    )
    yield of("TabularModel", lambda: (TabularModel(CATEGORIES, 5, 3, [64, 32]), (tokens(64, 3, 3), noise(64, 5))))
    yield of(
        "EmbeddingNN",
        lambda: (TabularModel([(30, 8), (40, 8)], 0, 1, [32], y_range=(0, 5)), (tokens(64, 2, 30), torch.empty(64, 0))),
    )
    yield of("EmbeddingDotBias", lambda: (EmbeddingDotBias(8, 30, 40, y_range=(0, 5)), tokens(64, 2, 30)))
    yield of("Siamese", lambda: (Siamese(), (crops(side=64), crops(side=64, seed=1))))
    yield of("GAN generator", lambda: (basic_generator(32, 3, in_sz=16, n_features=16), noise(8, 16)))
    yield of("GAN critic", lambda: (basic_critic(64, 3, n_features=16), crops(side=64)))
    yield of(
        "SimpleSelfAttention", lambda: (nn.Sequential(nn.Conv2d(3, 16, 3), SimpleSelfAttention(16)), crops(side=16))
    )


def of(name, make):
    def build():
        torch.manual_seed(0)
        return Built(*make())

    return Architecture("fastai", name, build)


def small(config):
    return config | dict(emb_sz=40, n_hid=48, n_layers=3)


class Siamese(nn.Module):
    "The one of fastai's tutorial: one body for two images, a head on both."

    def __init__(self):
        super().__init__()
        self.encoder, self.head = create_body(resnet18(), pretrained=False), create_head(512 * 2, 2, ps=0.5)[2:]
        self.pool = create_head(512, 2)[:2]

    def forward(self, a, b):
        return self.head(torch.cat([self.pool(self.encoder(a)), self.pool(self.encoder(b))], dim=1))
