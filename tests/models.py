"""A small zoo: models that are hard for layer-wise initialisation, and batches for them. Nothing of ours imported."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# --- batches ----------------------------------------------------------------------------------------------------------


def images(n=8, c=3, side=16, seed=1, dtype=torch.float32):
    "Noise with a mean and a scale of its own, as images are before anyone normalises them."
    return drawn(torch.rand, n, c, side, side, seed=seed).mul(2).add(0.3).to(dtype)


def rows(n=64, d=10, seed=1, dtype=torch.float32):
    return drawn(torch.randn, n, d, seed=seed).mul(3).add(1).to(dtype)


def drawn(distribution, *shape, seed):
    return distribution(*shape, generator=torch.Generator().manual_seed(seed))


# --- plain nets ------------------------------------------------------------------------------------------------------


def mlp(*sizes, act=nn.ReLU, bias=True, inplace=False):
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(n_in, n_out, bias=bias), act(inplace=True) if inplace else act()]
    return nn.Sequential(*layers[:-1])


def convnet(depth=4, width=8, act=partial(nn.ReLU, inplace=True), norm=None, drop=0.0, n_out=10, bias=True):
    "Convolutions, activations that overwrite them, perhaps norms and dropout; a linear head."
    layers = []
    for i in range(depth):
        layers.append(nn.Conv2d(width if i else 3, width, 3, padding=1, bias=bias))
        if norm is not None:
            layers.append(norm(width))
        layers.append(act())
        if drop:
            layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(width * 4, n_out))


class Residual(nn.Module):
    "x + body(x), the sum overwritten by its activation."

    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return F.relu_(x + self.body(x))


class Backwards(nn.Module):
    "Runs its layers in the reverse of the order in which they are registered."

    def __init__(self, d=8):
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(d, 3), nn.Linear(d, d), nn.Linear(10, d)

    def forward(self, x):
        return self.last(F.relu_(self.middle(F.relu_(self.first(x)))))


class TwoInputs(nn.Module):
    "Takes (a, b), positionally or by keyword; gives out a dict."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(10, 6), nn.Linear(4, 6), nn.Linear(12, 2)

    def forward(self, a, b, scale=1.0):
        h = torch.cat([self.a(a).relu_(), self.b(b) * scale], 1)
        return {"logits": self.head(h), "features": [h]}


class Named(nn.Module):
    "A layer inside that puts out `kind` of something: the first tensor counts."

    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(10, 8), kind

    def forward(self, x):
        y = self.fc(x)
        return {"tuple": (y, x), "dict": {"y": y, "x": x}, "nested": ({"deep": [y]}, x)}[self.kind]


class Unpack(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(8, 2)

    def forward(self, x):
        out = self.inner(x)
        while not isinstance(out, torch.Tensor):
            out = next(iter(out.values())) if isinstance(out, dict) else out[0]
        return self.head(out)


# --- weights that belong to more than one ----------------------------------------------------------------------------


class Shared(nn.Module):
    "One linear layer called `n` times, a nonlinearity between."

    def __init__(self, n=3, act=torch.relu):
        super().__init__()
        self.first, self.shared, self.last, self.n, self.act = (
            nn.Linear(10, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
            n,
            act,
        )

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.n):
            x = self.shared(self.act(x))
        return self.last(self.act(x))


class TwoHeads(nn.Module):
    "One layer applied to two inputs side by side (siamese): its calls do not feed each other."

    def __init__(self):
        super().__init__()
        self.tower, self.head = nn.Linear(10, 8), nn.Linear(16, 3)

    def forward(self, a, b):
        return self.head(torch.cat([self.tower(a), self.tower(b)], 1).relu())


class TiedPair(nn.Module):
    "Two linear layers with one weight; each has its own bias."

    def __init__(self, d=8):
        super().__init__()
        self.first, self.a, self.b, self.last = nn.Linear(10, d), nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.last(self.b(self.a(self.first(x).relu()).relu()).relu())


class TiedDecoder(nn.Module):
    "A language model's decoder tied to its embedding."

    def __init__(self, vocab=30, d=8):
        super().__init__()
        self.embed, self.body, self.decoder = nn.Embedding(vocab, d), nn.Linear(d, d), nn.Linear(d, vocab)
        self.decoder.weight = self.embed.weight

    def forward(self, ids):
        return self.decoder(torch.tanh(self.body(self.embed(ids))))


# --- units that no list of types knows -------------------------------------------------------------------------------


class PlainLinear(nn.Module):
    "What `nn.Linear` does, and no subclass of it: only the rule of what carries scale and shift can find it."

    def __init__(self, n_in, n_out, bias=True):
        super().__init__()
        base = nn.Linear(n_in, n_out, bias=bias)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv1D(nn.Module):
    "Hugging Face's `Conv1D` of GPT-2: a linear layer with its weight the other way round."

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Doubled(nn.Conv2d):
    "A subclass with a forward of its own, still affine: twice the convolution and once its bias."

    def forward(self, x):
        return 2 * self._conv_forward(x, self.weight, None) + self.bias[:, None, None]


class Rectified(nn.Linear):
    "A subclass with a forward of its own that is not affine."

    def forward(self, x):
        return super().forward(x).relu()


class Standardised(nn.Conv2d):
    "Weight standardisation with a small epsilon: the weight's scale has no effect."

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-6)
        return self._conv_forward(x, w, self.bias)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.bi, self.head = nn.Bilinear(10, 10, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.bi(x, x.flip(1)).relu())


class Attention(nn.Module):
    "Self-attention whose `out_proj` is applied functionally, its forward never called."

    def __init__(self, d=16):
        super().__init__()
        self.embed, self.attn, self.head = (
            nn.Linear(10, d),
            nn.MultiheadAttention(d, 4, batch_first=True),
            nn.Linear(d, 3),
        )

    def forward(self, x):
        return self.head((h := self.embed(x)) + self.attn(h, h, h)[0])


def old_weight_norm(layer):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


# --- forwards that misbehave -----------------------------------------------------------------------------------------


class Tally(list):
    "A list that a copy of a model shares with it: what a test notes in it of passes is seen from outside."

    def __deepcopy__(self, memo):
        return self


class Stumble(nn.Module):
    "Raises `error` at its `at`-th call."

    def __init__(self, error, at=1):
        super().__init__()
        self.error, self.at, self.calls = error, at, Tally([0])

    def forward(self, x):
        self.calls[0] += 1
        if self.calls[0] == self.at:
            raise self.error
        return x


class Picky(Exception):
    "An exception that can't be built from a message alone."

    def __init__(self, code, where):
        super().__init__(f"{code} at {where}")
        self.code, self.where = code, where


class Noisy(nn.Module):
    "Samples in every mode, as a variational auto-encoder does."

    def __init__(self):
        super().__init__()
        self.mu, self.sigma, self.out = nn.Linear(10, 8), nn.Linear(10, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.mu(x) + torch.randn(len(x), 8, device=x.device) * self.sigma(x))


class Auxiliary(nn.Module):
    "A head that runs in training only (inception, googlenet)."

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(10, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        return (self.head(h := self.body(x).relu()), *([self.aux(h)] if self.training else []))


# --- the course's layers (fast.ai part 2, 2019, notebook 07a_lsuv) ---------------------------------------------------


class GeneralReLU(nn.Module):
    inplace = True  # as in the course; today's autograd refuses to go back through it

    def __init__(self, leak=None, sub=None, maxv=None):
        super().__init__()
        self.leak, self.sub, self.maxv = leak, sub, maxv

    def forward(self, x):
        x = F.leaky_relu(x, self.leak) if self.leak is not None else F.relu(x)
        if self.sub is not None:
            x = x.sub_(self.sub) if self.inplace else x - self.sub
        if self.maxv is not None:
            x = x.clamp_max_(self.maxv) if self.inplace else x.clamp_max(self.maxv)
        return x


class ConvLayer(nn.Module):
    "The course's block: its bias is what its rectifier subtracts."

    def __init__(self, ni, nf, ks=3, stride=2, sub=0.0, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(ni, nf, ks, padding=ks // 2, stride=stride, bias=True)
        self.relu = GeneralReLU(sub=sub, **kwargs)

    def forward(self, x):
        return self.relu(self.conv(x))

    @property
    def bias(self):
        return -self.relu.sub

    @bias.setter
    def bias(self, v):
        self.relu.sub = -v

    @property
    def weight(self):
        return self.conv.weight


class Offset(nn.Module):
    "A block that shows a parameter as its bias: what it adds behind its rectifier."

    def __init__(self, n_in, n_out):
        super().__init__()
        self.fc, self.offset = nn.Linear(n_in, n_out), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return self.fc(x).relu_() + self.offset

    @property
    def bias(self):
        return self.offset

    @bias.setter
    def bias(self, v):
        self.offset.data.copy_(torch.as_tensor(v))

    @property
    def weight(self):
        return self.fc.weight


def course_net(n_in=1, nfs=(8, 16, 32, 64, 64), n_out=10, **kwargs):
    "`get_cnn_model` of the course."
    sizes = [n_in, *nfs]
    convs = [ConvLayer(a, b, 5 if i == 0 else 3, **kwargs) for i, (a, b) in enumerate(zip(sizes, sizes[1:]))]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], n_out))
