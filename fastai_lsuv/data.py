"""Two data sets of small grey images in ten classes: scikit-learn's digits, and Fashion-MNIST."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter, ItemGetter
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import default_device, no_random
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import TensorDataset

__all__ = ["digits_dls", "fashion_dls"]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def digits_dls(
    bs: int = 64,  # images in a batch
    seed: int = 42,  # seed of the split and of the shuffling
    valid_pct: float = 0.2,  # share of the images held out for validation, the same for each digit
) -> DataLoaders:  # with 1,437 training and 360 validation images
    """Return DataLoaders for scikit-learn's digits: 1,797 scans of handwritten digits, in ten classes.

    Inputs are float tensors of shape (bs, 1, 8, 8), normalised by the mean and std of the training images; targets are
    the digits, 0 to 9. The same seed gives the same batches, and the global random state is left as it was. The images
    come from `sklearn.datasets.load_digits` and go through fastai's `DataBlock`.

    Example:
        >>> from fastai_lsuv.demo import digits_dls
        >>> xb, yb = digits_dls().one_batch()
        >>> xb.shape, yb.shape
        (torch.Size([64, 1, 8, 8]), torch.Size([64]))
    """
    images, digits = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    train, valid = train_test_split(range(len(x)), test_size=valid_pct, random_state=seed, stratify=digits)
    std, mean = torch.std_mean(x[train])
    block = DataBlock(
        blocks=(TransformBlock, CategoryBlock),
        get_items=lambda images: list(zip(images, digits.tolist(), strict=True)),  # of a source fastai makes a string
        get_x=ItemGetter(0),
        get_y=ItemGetter(1),
        splitter=IndexSplitter(valid),
    )
    with no_random(seed):  # a fastai DataLoader seeds its shuffling from Python's `random`
        return block.dataloaders((x - mean) / std, bs=bs, num_workers=0)


def fashion_dls(
    root: str | Path | None = None,  # folder of the files, or of torchvision's datasets; `None`: `data`, or Debian's
    size: int = 28,  # height and width of the images, scaled down by averaging
    n_train: int = 60_000,  # number of training images, drawn at random
    bs: int = 64,  # images in a batch
    seed: int = 42,  # seed of that draw and of the shuffling
    val_bs: int | None = None,  # images in a validation batch; `None`: twice `bs`
) -> DataLoaders:  # with `n_train` training and 10,000 validation images
    """Return DataLoaders for Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): photos of clothes, in ten classes.

    Inputs are float tensors of shape (bs, 1, size, size), normalised by the mean and std of the training images;
    targets are the classes, 0 to 9, whose names are in `dls.vocab`. The same seed gives the same batches, and the
    global random state is left as it was. All images are held in memory, so that a batch takes hardly any time.

    The files come from `torchvision.datasets.FashionMNIST("data", download=True)`, or from the package
    `dataset-fashion-mnist` of Debian and Ubuntu.

    Raises:
        FileNotFoundError: the files are in none of these places.
        ValueError: `n_train` is below 1 or above the number of images.

    Example:
        >>> from fastai_lsuv.demo import fashion_dls
        >>> xb, yb = fashion_dls("data", size=14, n_train=1000).one_batch()  # doctest: +SKIP
        >>> xb.shape, yb.shape  # doctest: +SKIP
        (torch.Size([64, 1, 14, 14]), torch.Size([64]))
    """
    folder = _fashion_folder(root)
    x, y = _read_idx(folder, "train-images-idx3-ubyte"), _read_idx(folder, "train-labels-idx1-ubyte")
    if not 1 <= n_train <= len(x):
        raise ValueError(f"n_train={n_train}: there are {len(x)} training images")
    chosen = np.random.default_rng(seed).permutation(len(x))[:n_train]
    train = _scaled(x[chosen], size)
    valid = _scaled(_read_idx(folder, "t10k-images-idx3-ubyte"), size)
    std, mean = torch.std_mean(train)
    train_ds = _Clothes((train - mean) / std, torch.tensor(y[chosen], dtype=torch.long))
    valid_ds = _Clothes((valid - mean) / std, torch.tensor(_read_idx(folder, "t10k-labels-idx1-ubyte")).long())
    with no_random(seed):  # a fastai DataLoader seeds its shuffling from Python's `random`
        train_dl = _TensorDL(train_ds, bs=bs, shuffle=True, drop_last=True)
        valid_dl = _TensorDL(valid_ds, bs=val_bs or 2 * bs)
    return DataLoaders(train_dl, valid_dl, device=default_device())


class _Clothes(TensorDataset):
    """What a Learner asks of its data: the number of classes, their names, the loss."""

    c, vocab, loss_func = len(CLOTHES), CLOTHES, CrossEntropyLossFlat()


class _TensorDL(DataLoader):
    """A DataLoader that takes a batch out of its dataset at once."""

    def create_batches(self, samps: Iterable[int]) -> Iterator[Any]:
        """Index the dataset by the lists of numbers, not by one number after the other."""
        return map(self.dataset.__getitem__, self.chunkify(samps))


def _fashion_folder(root: str | Path | None) -> Path:
    places = [Path("data/FashionMNIST/raw"), DEBIAN]
    if root is not None:
        places = [Path(root) / "FashionMNIST/raw", Path(root)]
    for place in places:
        if any(place.glob("train-images-idx3-ubyte*")):
            return place
    raise FileNotFoundError(
        f"Fashion-MNIST is in none of {', '.join(map(str, places))}: get it with "
        f"`torchvision.datasets.FashionMNIST({str(root or 'data')!r}, download=True)`, or on Debian and Ubuntu with "
        "`apt-get install dataset-fashion-mnist`"
    )


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Return a file in the format of MNIST: a number of axes, their lengths, and bytes; it may be compressed."""
    path = folder / name
    data = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{name}.gz").read_bytes())
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 * (1 + data[3])).reshape(shape)


def _scaled(images: NDArray[np.uint8], size: int) -> Tensor:
    pixels = torch.from_numpy(images.astype(np.float32))[:, None]
    return torch.nn.functional.interpolate(pixels, size=(size, size), mode="area") if size != 28 else pixels
