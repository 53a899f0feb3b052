"Batches of real images, and of what else there is to feed."

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

N = 4  # samples in a batch
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's


@cache
def _photographs():
    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images]).float() / 255
    return ((photos - MEAN) / STD).permute(0, 3, 1, 2)


def crops(n=N, channels=3, side=96, height=None, seed=0):
    "Random crops of scikit-learn's two photographs, resized and normalised as for ImageNet."
    rng, out = torch.Generator().manual_seed(seed), []
    photos, size = _photographs(), (height or side, side)
    for i in range(n):
        edge = int(torch.randint(100, 400, (), generator=rng))
        top, left = (int(torch.randint(0, limit - edge, (), generator=rng)) for limit in photos.shape[-2:])
        out.append(
            F.interpolate(
                photos[i % 2 : i % 2 + 1, :, top : top + edge, left : left + edge],
                size,
                mode="bilinear",
                antialias=True,
            )
        )
    x = torch.cat(out)
    return x.repeat(1, -(-channels // 3), 1, 1)[:, :channels].contiguous()


def clips(n=2, frames=16, side=112, seed=0):
    "Short videos: a window that moves over the photographs."
    still = crops(n, side=side + 2 * frames, seed=seed)
    return torch.stack([still[..., t : t + side, 2 * t : 2 * t + side] for t in range(frames)], 2).contiguous()


def tokens(n=N, length=32, vocab=100, seed=0):
    return torch.randint(1, vocab, (n, length), generator=torch.Generator().manual_seed(seed))


def padding(n=N, length=32):
    "Which places are padding: none in the first sequence, more in each that follows."
    return torch.arange(length) >= length - torch.arange(n)[:, None] * (length // (2 * n))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
