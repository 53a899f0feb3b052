"""Fashion-MNIST from the files that torchvision or Debian leave, digits from scikit-learn: batches, shapes, errors."""

import gzip
import random

import numpy as np
import pytest
import torch
from audit import rng_print
from fastai.vision.all import Learner, accuracy
from torch import nn

from fastai_lsuv import LSUVCallback
from fastai_lsuv.data import DEBIAN, fashion_dls

N_TRAIN, N_VALID = 40, 20


def idx(array):
    "An array of bytes in the files' format: two zeros, the type, the number of axes, their lengths."
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def files():
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": rng.integers(0, 256, (N_TRAIN, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(N_TRAIN) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (N_VALID, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(N_VALID) % 10,
    }


@pytest.fixture
def torchvisions(tmp_path):
    "A `root` as torchvision leaves it, which keeps the compressed files beside the others."
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in files().items():
        (folder / name).write_bytes(idx(array))
        (folder / f"{name}.gz").write_bytes(b"not looked at")
    return tmp_path


@pytest.fixture
def debians(tmp_path):
    for name, array in files().items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


@pytest.fixture(params=["torchvisions", "debians"])
def root(request):
    return request.getfixturevalue(request.param)


def test_both_layouts_are_read(root):
    dls = fashion_dls(root, n_train=N_TRAIN, bs=8)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c, len(dls.vocab)) == (N_TRAIN, N_VALID, 10, 10)
    x, y = dls.train_ds.tensors
    assert x.shape == (N_TRAIN, 1, 28, 28)
    assert sorted(y.tolist()) == sorted(files()["train-labels-idx1-ubyte"].tolist())
    torch.testing.assert_close(torch.stack(torch.std_mean(x)), torch.tensor([1.0, 0.0]), atol=1e-5, rtol=0)
    pixels = torch.tensor(files()["t10k-images-idx3-ubyte"][:, None] * 1.0)
    valid = dls.valid_ds.tensors[0].double()
    torch.testing.assert_close((valid - valid.mean()) / valid.std(), (pixels - pixels.mean()) / pixels.std())


def test_images_keep_their_labels(root):
    images, labels = files()["train-images-idx3-ubyte"], files()["train-labels-idx1-ubyte"]
    x, y = fashion_dls(root, n_train=5, bs=5).train.one_batch()
    for image, label in zip(x.cpu(), y.cpu()):
        found = [np.corrcoef(image.flatten(), other.flatten())[0, 1] for other in images]
        assert labels[np.argmax(found)] == label, max(found)


def test_images_are_scaled_down_by_averaging(root):
    full, half = (fashion_dls(root, size=size, n_train=N_TRAIN).valid_ds.tensors[0] for size in (28, 14))
    means = nn.functional.avg_pool2d(full, 2).flatten()
    assert half.shape == (N_VALID, 1, 14, 14)
    assert np.corrcoef(means, half.flatten())[0, 1] == pytest.approx(1)


def test_every_epoch_has_every_image_once_in_another_order(root):
    train = fashion_dls(root, n_train=N_TRAIN, bs=8).train
    first, second = ([x[:, 0, 0, 0] for x, _ in train] for _ in range(2))
    assert len(first) == 5
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat(first).sort()[0], torch.cat(second).sort()[0])


def test_the_seed_makes_the_choice_and_the_order_and_leaves_the_global_state(root):
    before = rng_print()
    a, b, c = (fashion_dls(root, n_train=16, bs=4, seed=seed) for seed in (1, 1, 2))
    assert rng_print() == before
    random.seed(5)
    batches = [torch.stack([x for x, _ in dls.train]) for dls in (a, b, c)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_a_learner_needs_nothing_more_than_them(root):
    dls = fashion_dls(root, size=8, n_train=N_TRAIN, bs=8)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), metrics=accuracy, cbs=LSUVCallback())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert learn.lsuv_report.converged


def test_where_there_are_no_files_the_error_names_the_places_and_the_ways_to_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="FashionMNIST") as raised:
        fashion_dls(tmp_path)
    for text in (str(tmp_path / "FashionMNIST"), "download=True", "dataset-fashion-mnist"):
        assert text in str(raised.value)


@pytest.mark.parametrize("n_train", [0, N_TRAIN + 1])
def test_no_more_images_than_there_are(debians, n_train):
    with pytest.raises(ValueError, match="40 training images"):
        fashion_dls(debians, n_train=n_train)


@pytest.mark.skipif(not DEBIAN.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_images():
    dls = fashion_dls(DEBIAN, size=14, n_train=1000)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (1000, 10_000)
    assert torch.bincount(dls.valid_ds.tensors[1]).tolist() == [1000] * 10
    y = dls.train_ds.tensors[1]
    assert torch.bincount(y).min() > 50
    assert fashion_dls(n_train=1).valid.one_batch()[0].shape == (128, 1, 28, 28)
