"""A fit that LSUV aborts: the cause named, the model to the bit what it was, nothing left; the next fit tries again."""

from contextlib import contextmanager

import pytest
import torch
import torch.utils.data as tud
from audit import audit, differences, fingerprint, rng_print
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Transform
from fastai.vision.all import Callback, CancelFitException
from learners import Spy, exact, learner, ran, seed, small_cnn
from models import Picky, Stumble
from torch import nn

from fastai_lsuv import LSUVCallback


class Fragile(tud.Dataset):
    "Raises for one item, or for each, as long as there is an `error`."

    def __init__(self, error=None, at=3, n=48):
        self.error, self.at, self.n = error, at, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if self.error is not None and self.at in (i, None):
            raise self.error
        return torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)), i % 10


def loaders(kind="fastai", data=None, **kwargs):
    data = Fragile() if data is None else data
    if kind == "torch":
        return DataLoaders(*(tud.DataLoader(d, 16, **kwargs) for d in (data, Fragile())))
    return DataLoaders(*(DataLoader(d, bs=16, **kwargs) for d in (data, Fragile())))


def first_batch():
    return torch.stack([Fragile()[i][0] for i in range(16)])


def normed(*more):
    net = small_cnn(nn.BatchNorm2d)
    for m in more:
        net[1].insert(1, m)
    net[0].eval()  # flags that are not all alike
    return net


def make(model=None, cbs=None, **kwargs):
    return learner(
        loaders(**kwargs), normed() if model is None else model, cbs=[LSUVCallback(verbose=False), *(cbs or [])]
    )


def state(cb):
    return {k: v for k, v in vars(cb).items() if k not in ("_learn", "learn")}


@contextmanager
def aborted(learn, kind, match=None):
    "The fit inside raises this, after LSUV has put everything back."
    model, report, loss, rng = fingerprint(learn.model), ran(learn), learn.loss_func, rng_print()
    cbs, attributes = {id(cb): state(cb) for cb in learn.cbs if cb.order < 60}, set(vars(learn))
    with pytest.raises(kind, match=match) as e:
        yield e
    assert type(e.value) is kind
    assert not differences(model, fingerprint(learn.model))
    assert ran(learn) == report
    assert learn.loss_func is loss
    assert rng_print() == rng
    assert {id(cb): state(cb) for cb in learn.cbs if cb.order < 60} == cbs
    assert set(vars(learn)) - attributes <= {"opt", "epoch", "loss", "train_iter", "pct_train"}, (
        "but what fastai itself sets until then"
    )
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def succeeds(learn, batch=None):
    "The next fit tries again."
    learn.fit(1, cbs=(spy := Spy().watch(first_batch() if batch is None else batch)))
    assert ran(learn)
    assert len(spy.audits[0]) == 4
    assert exact(spy.audits[0])


# --- in the model -----------------------------------------------------------------------------------------------------

ERRORS = {
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory: no luck"),
    "its own": lambda: Picky(3, "no luck"),
    "not there": lambda: NotImplementedError("no luck"),
    "a number first": lambda: IndexError(7, "no luck"),
}


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", ERRORS)
def test_in_the_middle_of_a_pass(kind, at):
    error = ERRORS[kind]()
    learn = make(normed(Stumble(error, at)))
    with aborted(learn, type(error)) as e:
        learn.fit(1)
    said = " ".join(map(str, e.value.args))
    assert "no luck" in said
    assert "1.1" in said
    assert said.count("LSUV stopped") == 1
    succeeds(learn)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_stop_iteration_ends_the_fit_and_not_the_round_of_callbacks(at):
    "fastai calls callbacks by `map`, which would take it for their end: the fit would go on, others unprepared."
    learn = make(normed(Stumble(StopIteration("no luck"), at)))
    before = fingerprint(learn.model)
    with pytest.raises((StopIteration, RuntimeError)) as e:
        learn.fit(1)
    assert "no luck" in str(e.value)
    assert "1.1" in str(e.value)
    assert not ran(learn)
    assert not differences(before, fingerprint(learn.model))
    succeeds(learn)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [lambda: RuntimeError("no luck"), KeyboardInterrupt], ids=["error", "interrupt"])
def test_in_a_hook_of_the_user_s(error, before, at):
    error, learn, calls = error(), make(), []

    def hook(*_):
        calls.append(1)
        if len(calls) == at:
            raise error

    layer = learn.model[1][0]
    layer.register_forward_pre_hook(hook) if before else layer.register_forward_hook(hook)
    with aborted(learn, type(error)) as e:
        learn.fit(1)
    if isinstance(error, RuntimeError):
        assert "no luck" in str(e.value)
        assert "1.0" in str(e.value)
    succeeds(learn)


@pytest.mark.parametrize("at", [2, 3, 5])
def test_in_a_block_that_is_being_tried(at):
    block = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), Stumble(torch.OutOfMemoryError("no luck"), at))
    learn = learner(
        loaders(), nn.Sequential(nn.Flatten(), block, nn.Linear(32, 10)), cbs=LSUVCallback(modules=nn.Module.children)
    )
    with aborted(learn, torch.OutOfMemoryError, r"no luck[\s\S]*1\.2"):
        learn.fit(1)
    learn.fit(1)
    assert ran(learn)


def test_in_an_initialiser():
    def init(w):
        if w.shape[0] == 10:
            raise ZeroDivisionError("no luck")
        return nn.init.orthogonal_(w)

    learn = learner(loaders(), normed(), cbs=LSUVCallback(init=init))
    with aborted(learn, ZeroDivisionError, "no luck") as e:
        learn.fit(1)
    assert "'1.3'" in str(e.value)
    learn.remove_cb(LSUVCallback).add_cb(LSUVCallback(init=nn.init.orthogonal_, verbose=False))
    succeeds(learn)


def test_no_first_fit_is_made_of_one_that_was_aborted():
    "It is reported, printed and marked by the fit that succeeded only."
    learn = make(normed(Stumble(RuntimeError("no luck"), 3)))
    with aborted(learn, RuntimeError):
        learn.fit(1)
    assert learn.lsuv.report is None
    assert learn.opt is not None
    opt = learn.opt
    succeeds(learn)
    assert learn.opt is opt
    assert learn.lsuv.report is learn.lsuv_report


# --- in the data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        lambda: ValueError("no luck"),
        ValueError,
        lambda: KeyError("no luck"),
        lambda: FileNotFoundError(2, "no luck", "img.png"),
        lambda: Picky(3, "no luck"),
    ],
    ids=["message", "none", "key", "file", "its own"],
)
@pytest.mark.parametrize(("kind", "workers"), [("fastai", 0), ("fastai", 2), ("torch", 0), ("torch", 2)])
def test_in_the_dataset(kind, workers, error):
    "Of its own type, the cause named; whatever the workers, whom LSUV leaves alone."
    error = error()
    hopeful, data = "no luck" not in str(error), Fragile(error)
    learn = make(kind=kind, data=data, num_workers=workers)
    with aborted(learn, type(error)) as e:
        learn.fit(1)
    assert hopeful or "no luck" in " ".join(map(str, (*e.value.args, e.value)))
    data.error = None
    succeeds(learn)


@pytest.mark.parametrize("kind", ["fastai", "torch"])
def test_interrupted_in_the_dataset(kind):
    data = Fragile(KeyboardInterrupt())
    learn = make(kind=kind, data=data)
    with aborted(learn, KeyboardInterrupt):
        learn.fit(1)
    data.error = None
    succeeds(learn)


def test_the_loader_is_as_before_a_failure():
    "The batches of the next fit are those of a fit that never failed."
    seen = []
    for error in (ValueError("no luck"), None):
        seed(3)
        data = Fragile(error, None)
        learn = make(data=data, shuffle=True)
        before = dict(vars(learn.dls.train))
        if error:
            with aborted(learn, ValueError):
                learn.fit(1)
            assert vars(learn.dls.train) == before
        data.error = None
        seed(4)
        learn.fit(1, cbs=(spy := Spy()))
        seen.append(spy.seen)
    assert seen[0] == seen[1]


class Broken(Transform):
    def encodes(self, x: torch.Tensor):
        raise RuntimeError("no luck")


def test_in_a_batch_transform_and_in_the_collation():
    def collate(items):
        raise TypeError("no luck")

    for kind, kwargs in ((RuntimeError, dict(after_batch=Broken())), (TypeError, dict(create_batch=collate))):
        learn = make(**kwargs)
        with aborted(learn, kind, "no luck"):
            learn.fit(1)


def test_a_failure_in_a_later_item_is_the_training_s_own():
    "LSUV has run by then, and does not again."
    data = Fragile(ValueError("no luck"), at=40)
    learn = make(data=data)
    with pytest.raises(ValueError, match="no luck"):
        learn.fit(1)
    report = learn.lsuv_report
    data.error = None
    learn.fit(1)
    assert learn.lsuv_report is report


# --- in callbacks that are asked --------------------------------------------------------------------------------------


class Interrupted(Callback):
    "The user presses the key when one of its kind first comes to this event."

    left = []

    def __init__(self, event="before_batch"):
        self.event, self.count = event, 0

    def before_fit(self):
        self.at("before_fit")

    def before_train(self):
        self.at("before_train")

    def before_batch(self):
        self.at("before_batch")
        self.learn.xb = (self.x * 7 + 3,)

    def at(self, event):
        self.count += 1
        if event == self.event and self.left:
            self.left.clear()
            raise KeyboardInterrupt


@pytest.mark.parametrize("event", ["before_fit", "before_train", "before_batch"])
def test_interrupted_in_a_callback_that_is_asked(event):
    Interrupted.left[:] = [True]
    learn = make(cbs=[MixUp(), cb := Interrupted(event)])
    with aborted(learn, KeyboardInterrupt):
        learn.fit(1)
    assert cb.count == 0, "it was a copy"
    learn.remove_cb(MixUp)
    succeeds(learn, first_batch() * 7 + 3)


class WithAutocast(Callback):
    order = 10

    def before_fit(self):
        self.context = torch.autocast("cpu", torch.bfloat16)

    def before_batch(self):
        self.context.__enter__()

    def after_loss(self):
        self.context.__exit__(None, None, None)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_under_what_was_asked_of_callbacks(at):
    "With inputs rewritten and an autocast entered, out of memory: neither is left."
    learn = make(normed(Stumble(torch.OutOfMemoryError("no luck"), at)), cbs=[MixUp(), WithAutocast()])
    with aborted(learn, torch.OutOfMemoryError, r"no luck[\s\S]*1\.1"):
        learn.fit(1)
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()
    learn.fit(1)
    assert ran(learn)


def test_by_lsuv_init_as_well():
    learn = make(normed(Stumble(torch.OutOfMemoryError("no luck"), 2)))
    with aborted(learn, torch.OutOfMemoryError, r"no luck[\s\S]*1\.1"):
        learn.lsuv_init()
    learn.lsuv_init()
    assert exact(audit(learn.model, first_batch()))


def test_a_fit_that_another_callback_cancels_before_it_began():
    "LSUV has run: the weights are initialised, once."

    def cancel(self):
        raise CancelFitException

    learn = make()
    learn.fit(1, cbs=Callback(before_fit=cancel))
    report = learn.lsuv_report
    learn.fit(1)
    assert learn.lsuv_report is report
