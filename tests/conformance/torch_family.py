"PyTorch's own transformers and recurrent networks."

from __future__ import annotations

import torch
from torch import nn

from .architecture import Architecture, Built
from .inputs import noise, padding, tokens


def architectures():
    yield of(
        "Transformer",
        lambda: (nn.Transformer(32, 4, 2, 2, 64, batch_first=True), (noise(4, 20, 32), noise(4, 12, 32, seed=1))),
    )
    yield of(
        "Transformer, masks",
        lambda: (
            nn.Transformer(32, 4, 2, 2, 64, batch_first=True),
            dict(
                src=noise(4, 20, 32),
                tgt=noise(4, 12, 32, seed=1),
                src_key_padding_mask=padding(4, 20),
                tgt_mask=nn.Transformer.generate_square_subsequent_mask(12),
                tgt_is_causal=True,
            ),
        ),
    )
    yield of(
        "Transformer, norm first",
        lambda: (nn.Transformer(32, 4, 2, 2, 64, norm_first=True), (noise(20, 4, 32), noise(12, 4, 32, seed=1))),
    )
    yield of(
        "TransformerEncoder, padding",
        lambda: (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3),
            dict(src=noise(4, 20, 32), src_key_padding_mask=padding(4, 20)),
        ),
    )
    yield of(
        "MultiheadAttention",
        lambda: (
            nn.MultiheadAttention(32, 4, kdim=16, vdim=24, batch_first=True),
            (noise(4, 20, 32), noise(4, 12, 16, seed=1), noise(4, 12, 24, seed=2)),
        ),
    )
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        yield of(kind.__name__, lambda kind=kind: (Recurrent(kind), tokens()))
    yield of("LSTMCell", lambda: (Cell(), tokens()))
    yield of("LSTM, projected and packed", lambda: (Packed(), tokens()))


def of(name, make):
    def build():
        torch.manual_seed(0)
        return Built(*make())

    return Architecture("torch.nn", name, build)


class Recurrent(nn.Module):
    "A classifier of sequences."

    def __init__(self, kind):
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(100, 16),
            kind(16, 24, 2, batch_first=True, bidirectional=True),
            nn.Linear(48, 3),
        )

    def forward(self, ids):
        return self.head(self.body(self.embed(ids))[0][:, -1])


class Cell(nn.Module):
    "A loop of one's own around a cell."

    def __init__(self):
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(100, 16), nn.LSTMCell(16, 24), nn.Linear(24, 3)

    def forward(self, ids):
        state = None
        for x in self.embed(ids).unbind(1):
            state = self.cell(x, state)
        return self.head(state[0])


class Packed(nn.Module):
    "Sequences of different lengths, packed; the layer's output is no tensor."

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(100, 16),
            nn.LSTM(16, 24, proj_size=8, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, ids):
        x = nn.utils.rnn.pack_padded_sequence(self.embed(ids), torch.arange(len(ids), 0, -1) * 8, batch_first=True)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.body(x)[0], batch_first=True)[0])
