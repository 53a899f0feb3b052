"""DESIGN section 6, the frame: the batch that LSUV sees, and that training is as if nothing had looked at its data."""

import gc
import random
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.utils.data as tud
from audit import audit, bits, differences, fingerprint, moved, parameter_bits
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.vision.all import CrossEntropyLossFlat, Learner, RandomCrop, RandTransform, aug_transforms
from learners import Spy, digits, exact, learner, ran, seed, small_cnn
from models import Stumble
from torch import nn

from fastai_lsuv import LSUVCallback


class Jittered(tud.Dataset):
    "Map-style data, augmented from all three random streams."

    def __init__(self, n=80):
        self.x, self.n = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(2)), n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + torch.rand(1, 8, 8)
        return self.x[i] + noise, i % 10


class Flipped(RandTransform):
    "An item transform of the user's own, from Python's stream."

    def encodes(self, x: torch.Tensor):
        return x.flip(-1) if random.random() < 0.5 else x


def fastai_loaders(**kwargs):
    return DataLoaders(DataLoader(Jittered(), bs=16, shuffle=True, **kwargs), DataLoader(Jittered(32), bs=16, **kwargs))


def torch_loaders(**kwargs):
    return DataLoaders(
        tud.DataLoader(Jittered(), 16, shuffle=True, **kwargs), tud.DataLoader(Jittered(32), 16, **kwargs)
    )


def weighted_loaders():
    sampler = tud.WeightedRandomSampler(torch.rand(80), 80)
    return DataLoaders(tud.DataLoader(Jittered(), 16, sampler=sampler), tud.DataLoader(Jittered(32), 16))


def own_generator_loaders():
    return DataLoaders(
        tud.DataLoader(Jittered(), 16, shuffle=True, generator=torch.Generator().manual_seed(3)),
        tud.DataLoader(Jittered(32), 16),
    )


LOADERS = {
    "fastai": fastai_loaders,
    "fastai, dropping the last": partial(fastai_loaders, drop_last=True),
    "torch": torch_loaders,
    "torch, weighted": weighted_loaders,
    "torch, a generator": own_generator_loaders,
    "fastai, workers": partial(fastai_loaders, num_workers=2),
    "torch, workers": partial(torch_loaders, num_workers=2),
    "images": partial(digits, 64, 16, item_tfms=RandomCrop(8)),
    "images, by the item": partial(digits, 64, 16, item_tfms=Flipped),
    "images, by the batch": partial(digits, 64, 16, batch_tfms=aug_transforms(size=8)),
}


def trained(loaders, how="plainly", epochs=2, **options):
    "A Learner after training, with LSUV or without; and what training saw: its batches, the random streams at each."
    seed(23)
    learn = learner(loaders(), nn.Sequential(small_cnn(), nn.Dropout(0.2)))
    seed(42)
    if how == "lsuv_init":
        learn.lsuv_init(**options)
    learn.fit(epochs, cbs=[spy := Spy(), *([LSUVCallback(**options)] if how == "callback" else [])])
    return learn, spy


@pytest.mark.parametrize("how", LOADERS)
def test_training_sees_the_batches_it_would_have_seen(how):
    "Same data, same order, same augmentation, same dropout: every batch to the bit, and the random streams at each."
    learn, seen = trained(LOADERS[how], "callback")
    _, without = trained(LOADERS[how])
    assert ran(learn)
    assert len(seen.seen) == len(without.seen) > 4
    for i, (a, b) in enumerate(zip(seen.seen, without.seen, strict=True)):
        assert a[:2] == b[:2], f"batch {i} is another one"
        assert a[2] == b[2], f"the random streams differ at batch {i}"
    assert seen.streams == without.streams


@pytest.mark.parametrize("how", ["fastai", "torch", "images"])
def test_also_after_lsuv_init(how):
    assert trained(LOADERS[how], "lsuv_init")[1].seen == trained(LOADERS[how])[1].seen


def test_also_with_a_batch_of_one_s_own():
    b = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    assert trained(fastai_loaders, "callback", batch=b)[1].seen == trained(fastai_loaders)[1].seen


def test_also_with_an_init_that_draws_numbers():
    assert trained(fastai_loaders, "callback", init=nn.init.orthogonal_)[1].seen == trained(fastai_loaders)[1].seen


def test_training_is_reproducible():
    ends = [parameter_bits(trained(fastai_loaders, "callback")[0].model) for _ in range(2)]
    assert ends[0] == ends[1]


def test_the_batches_are_random_at_all():
    "So that the tests above can fail."
    images = [s[1] for s in trained(fastai_loaders)[1].seen if s[0]]
    assert images[: len(images) // 2] != images[len(images) // 2 :]


@pytest.mark.parametrize("how", ["fastai", "torch", "images"])
def test_the_learner_is_as_it_would_have_been(how):
    "No attribute more or less than without, but the report."
    with_it, without = trained(LOADERS[how], "callback")[0], trained(LOADERS[how])[0]
    assert set(vars(with_it)) ^ set(vars(without)) == {"lsuv_report"}


def test_lsuv_init_leaves_nothing_of_the_batch_behind():
    learn = learner(fastai_loaders(), small_cnn())
    before, loader = dict(vars(learn)), dict(vars(learn.dls.train))
    learn.lsuv_init()
    assert {k: v for k, v in vars(learn).items() if k != "lsuv_report"} == before
    assert vars(learn.dls.train) == loader


def test_nothing_is_left_on_the_model():
    learn, other = trained(fastai_loaders, "callback")[0], trained(fastai_loaders)[0]
    for (name, m), o in zip(learn.model.named_modules(), other.model.modules(), strict=True):
        assert vars(m).keys() == vars(o).keys(), name
        for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_post_hooks"):
            assert len(getattr(m, key)) == len(getattr(o, key)), (name, key)


# --- which batch ------------------------------------------------------------------------------------------------------


class Pairs(tud.Dataset):
    "Two inputs and a target."

    def __init__(self, n=64):
        self.a, self.b, self.n = torch.randn(n, 10), torch.randn(n, 4) * 3, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.a[i], self.b[i], i % 2


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(10, 6), nn.Linear(4, 6), nn.Linear(12, 2)

    def forward(self, a, b):
        return self.head(torch.cat([self.a(a), self.b(b)], 1).relu_())


def pairs(kind):
    if kind == "fastai":
        dls = DataLoaders(*(DataLoader(Pairs(n), bs=32) for n in (64, 32)))
    else:
        dls = DataLoaders(*(tud.DataLoader(Pairs(n), 32) for n in (64, 32)))
    dls.n_inp = 2
    return dls


@pytest.mark.parametrize("kind", ["fastai", "torch"])
def test_several_inputs_are_split_as_the_learner_does(kind):
    learn = learner(pairs(kind), Siamese(), cbs=LSUVCallback())
    batch = next(iter(learn.dls.train))
    learn.add_cb(spy := Spy().watch((batch[0], batch[1])))
    learn.fit(1)
    assert [row.name for row in learn.lsuv_report] == ["a", "b", "head"]
    assert exact(spy.audits[0])


@pytest.mark.parametrize("kind", ["fastai", "torch"])
def test_a_batch_with_several_inputs_can_be_given(kind):
    learn = learner(pairs(kind), Siamese())
    a, b, y = next(iter(learn.dls.train))
    learn.lsuv_init(batch=(a + 1, b * 7, y))
    assert exact(audit(learn.model, (a + 1, b * 7)))


@pytest.mark.parametrize("kind", ["torch", "fastai"])
def test_the_first_batch_of_a_loader_without_shuffling(kind):
    make = (lambda n: tud.DataLoader(Pairs(n), 32)) if kind == "torch" else (lambda n: DataLoader(Pairs(n), bs=32))
    dls = DataLoaders(make(64), make(32))
    dls.n_inp = 2
    learn = learner(dls, Siamese())
    a, b, _ = next(iter(dls.train))
    learn.lsuv_init()
    assert exact(audit(learn.model, (a, b)))


def test_the_given_batch_is_left_as_it_was():
    learn = learner(fastai_loaders(), nn.Sequential(nn.ReLU(inplace=True), small_cnn()))
    b = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    kept = bits(b[0])
    learn.lsuv_init(batch=b)
    assert bits(b[0]) == kept


# --- when it fails ----------------------------------------------------------------------------------------------------


def test_a_learner_without_data_is_told_so():
    learn = Learner(None, small_cnn(), loss_func=CrossEntropyLossFlat())
    before = parameter_bits(learn.model)
    with pytest.raises(ValueError, match=r"no DataLoaders .* lsuv_\(model, xb\)"):
        learn.lsuv_init()
    assert parameter_bits(learn.model) == before


def empty(kind):
    few = Jittered(4)
    train = DataLoader(few, bs=16, drop_last=True) if kind == "fastai" else tud.DataLoader(few, 16, drop_last=True)
    return DataLoaders(train, tud.DataLoader(Jittered(32), 16))


@pytest.mark.parametrize("kind", ["fastai", "torch"])
def test_an_empty_loader_is_a_clear_error(kind):
    learn = learner(empty(kind), small_cnn(), cbs=LSUVCallback())
    before = fingerprint(learn.model)
    with pytest.raises(ValueError, match="(?i)batch|empty"):
        learn.fit(1)
    with pytest.raises(ValueError, match="(?i)batch|empty"):
        learn.lsuv_init()
    assert not ran(learn)
    assert not [d for d in differences(before, fingerprint(learn.model)) if d[0] in ("param", "buffer", "attr")]
    learn.dls = fastai_loaders()
    learn.fit(1)
    assert ran(learn)


@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError("no luck"),
        lambda: RuntimeError(),
        lambda: KeyError("no luck"),
        lambda: KeyError(3),
        lambda: KeyboardInterrupt(),
    ],
    ids=["message", "none", "key", "number", "interrupt"],
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_aborts_the_fit_and_the_next_fit_tries_again(error, at):
    error = error()
    cause, body = str(next(iter(error.args), "")), small_cnn()
    body[1].insert(1, Stumble(error, at))
    learn = learner(fastai_loaders(), body, cbs=LSUVCallback())
    start = parameter_bits(learn.model)
    with pytest.raises(type(error)) as e:
        learn.fit(1)
    if not isinstance(error, KeyboardInterrupt):
        assert "1.1" in str(e.value), "the module at work"
        assert cause in str(e.value)
    assert not ran(learn)
    assert not moved(start, learn.model)
    learn.fit(1, cbs=(spy := Spy()))
    assert ran(learn)
    assert len([n for n in start if start[n] != spy.states[0][n]]) == len(start)


def test_wrong_options_abort_the_fit_before_anything_is_changed():
    learn = learner(fastai_loaders(), small_cnn(), cbs=LSUVCallback(modules="0.konv"))
    start = parameter_bits(learn.model)
    with pytest.raises(ValueError, match="0.konv"):
        learn.fit(1)
    assert not ran(learn)
    assert not moved(start, learn.model)


def test_a_model_with_nothing_to_correct_trains_on():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(10, 10)

        def forward(self, x):
            return self.emb(x.flatten(1)[:, 0].abs().long() % 10)

    learn = learner(fastai_loaders(), Scale(), cbs=LSUVCallback())
    with pytest.warns(UserWarning, match="(?i)nothing|no "):
        learn.fit(1)
    learn.fit(1)


def model_of_a_learner(fitted):
    "A model, and a weak reference to its former Learner. (A frame that is alive may keep a copy of its locals.)"
    learn = learner(fastai_loaders(), small_cnn(), cbs=LSUVCallback())
    if fitted:
        learn.fit(1)
    return learn.model, weakref.ref(learn)


@pytest.mark.parametrize("fitted", [False, True])
def test_no_reference_from_the_model_to_the_learner(fitted):
    model, alive = model_of_a_learner(fitted)
    gc.collect()
    assert alive() is None, "the model keeps its Learner alive"
    assert len(list(model.parameters())) == 8


def test_loss_functions_and_metrics_are_not_called():
    called = []

    class Loss(CrossEntropyLossFlat):
        def __call__(self, *args):
            called.append(1)
            return super().__call__(*args)

    learn = learner(fastai_loaders(), small_cnn(), loss_func=Loss(), metrics=[])
    learn.lsuv_init()
    assert not called
