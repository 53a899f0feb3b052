"""How training calls its model is found out by a pilot fit: whatever the Learner, its loop and its callbacks do."""

import copy
import subprocess
import sys
from contextlib import contextmanager
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import torch.utils.data as tud
from audit import audit, bits, parameter_bits
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.vision.all import Callback, CancelTrainException, CrossEntropyLossFlat, Learner, default_device
from fastai.vision.gan import GANLearner
from feeds import N, complaints, loaders, pixels
from learners import exact, learner, ran, small_cnn
from torch import nn

from fastai_lsuv import LSUVCallback

X = pixels()[:16]


class Found(Callback):
    "The model as the first epoch will find it."

    order = 90

    def before_fit(self):
        self.model_found = copy.deepcopy(self.learn.model)


def fitted(kind, dls, model, cbs=(), **kwargs):
    "A Learner of this kind after a fit, and the records of the network that its first epoch found."
    learn = kind(dls, model, loss_func=CrossEntropyLossFlat(), cbs=[LSUVCallback(verbose=False), *cbs], **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=(found := Found()))
    return learn, found.model_found


# --- Learners with a loop of their own --------------------------------------------------------------------------------


def step(self):
    self("after_pred")
    self.loss_grad = self.loss_func(self.pred, *self.yb)
    self.loss = self.loss_grad.clone()
    self("after_loss")
    if self.training:
        self("before_backward")
        self.loss_grad.backward()
        self("after_backward")
        self.opt.step()
        self.opt.zero_grad()


class Halved(Learner):
    def _do_one_batch(self):
        self.pred = self.model(self.xb[0] / 2)
        step(self)


class Split(Learner):
    def _split(self, b):
        self.xb, self.yb = (b[0] / 2,), b[1:]


class OneBatch(Learner):
    def one_batch(self, i, b):
        super().one_batch(i, (b[0] / 2, b[1]))


class AllBatches(Learner):
    def all_batches(self):
        self.n_iter = len(self.dl)
        for i, (x, y) in enumerate(self.dl):
            self.one_batch(i, (x / 2, y))


class InTurn(Learner):
    "Validates first, then trains on two loaders in turn."

    def _do_epoch(self):
        self._do_epoch_validate()
        for dl in (self.dls.train, self.dls.train):
            self.dl = dl
            self._with_events(self.all_batches, "train", CancelTrainException)

    def _do_one_batch(self):
        if self.training:
            self.xb = (self.xb[0] / 2,)
        super()._do_one_batch()


class NoEvents(Learner):
    "A loop without events and without batches of fastai's."

    def _do_fit(self):
        for x, y in self.dls.train:
            self.loss_func(self.model(x / 2), y).backward()
            self.opt.step()
            self.opt.zero_grad()


class Careful(Learner):
    "Skips a batch that fails, whatever it is."

    def _do_one_batch(self):
        try:
            self.pred = self.model(self.xb[0] / 2)
        except:  # noqa: E722
            return
        step(self)


def by_attribute(*args, **kwargs):
    "The method is put on the Learner itself."
    learn = Learner(*args, **kwargs)
    learn._do_one_batch = MethodType(Halved._do_one_batch, learn)
    return learn


def by_closure(*args, **kwargs):
    learn = Learner(*args, **kwargs)
    learn._split = lambda b: vars(learn).update(xb=(b[0] / 2,), yb=b[1:])
    return learn


class Part(Learner):
    "Calls what is around the model."

    def _do_one_batch(self):
        around = nn.Sequential(nn.Identity(), self.model)
        self.pred = around(self.xb[0] / 2)
        step(self)


OWN = (Halved, Split, OneBatch, AllBatches, InTurn, NoEvents, Careful, by_attribute, by_closure, Part)


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_a_loop_of_its_own(kind, recwarn):
    learn, found = fitted(kind, loaders(), small_cnn())
    assert exact(records := audit(found, X / 2)), records
    assert ran(learn)
    assert not complaints(recwarn)


class Tokens(nn.Module):
    "Keyword inputs, as a transformer takes them."

    def __init__(self):
        super().__init__()
        self.emb, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, ids, mask=None, scale=1.0):
        return self.head(scale * (self.fc(self.emb(ids)).relu() * mask[..., None]).mean(1))


class Unpacks(Learner):
    def _do_one_batch(self):
        self.pred = self.model(**self.xb[0])
        step(self)


class Mixed(Learner):
    def _do_one_batch(self):
        self.pred = self.model(self.xb[0]["ids"], mask=self.xb[0]["mask"], scale=3.0)
        step(self)


class HuggingFace(Learner):
    "The loader gives one dict, labels and all."

    def _split(self, b):
        self.yb = (b.pop("labels"),)
        self.xb = (b,)

    _do_one_batch = Unpacks._do_one_batch


IDS, MASK, Y = torch.arange(N * 5).reshape(N, 5) % 20, torch.arange(N * 5).reshape(N, 5) % 3 > 0, torch.arange(N) % 10
PAIRS = [({"ids": i, "mask": m}, y) for i, m, y in zip(IDS, MASK, Y, strict=True)]
DICTS = [{"ids": i, "mask": m, "labels": y} for i, m, y in zip(IDS, MASK, Y, strict=True)]
FED = {"ids": IDS[:16], "mask": MASK[:16]}


def torch_loaders(data):
    return DataLoaders(tud.DataLoader(data, 16), tud.DataLoader(data, 16))


@pytest.mark.parametrize(
    ("kind", "data", "fed"),
    [
        pytest.param(Unpacks, PAIRS, FED, id="unpacks"),
        pytest.param(Mixed, PAIRS, FED | {"scale": 3.0}, id="mixed"),
        pytest.param(HuggingFace, DICTS, FED, id="dict batches"),
    ],
)
def test_a_model_called_by_keyword(kind, data, fed, recwarn):
    _, found = fitted(kind, torch_loaders(data), Tokens())
    assert exact(records := audit(found, fed)), records
    assert len(records) == 2
    assert not complaints(recwarn)


def test_a_batch_of_one_s_own_for_it_stays_what_it_was():
    learn = HuggingFace(torch_loaders(DICTS), Tokens(), loss_func=CrossEntropyLossFlat())
    batch = {"ids": IDS[16:40], "mask": MASK[16:40], "labels": Y[16:40]}
    learn.lsuv_init(batch=batch)
    assert exact(audit(learn.model, {"ids": IDS[16:40], "mask": MASK[16:40]}))
    assert list(batch) == ["ids", "mask", "labels"]


def test_without_dataloaders():
    learn = Learner(None, small_cnn(), loss_func=CrossEntropyLossFlat(), cbs=MixUp())
    learn.lsuv_init(batch=(X, torch.arange(16) % 10))
    assert learn.lsuv_report.converged
    assert learn.dls is None
    learn.remove_cb(MixUp).lsuv_init(batch=(X * 3, torch.arange(16) % 10))
    assert exact(audit(learn.model, X * 3))


@pytest.mark.parametrize("batch", [loaders(), loaders().train, X, X.numpy()], ids=lambda b: type(b).__name__)
def test_what_is_no_batch_is_said_in_one_line(batch):
    learn = learner(loaders(), small_cnn())
    before = parameter_bits(learn.model)
    with pytest.raises(TypeError, match=rf"batch is a {type(batch).__name__}: expected .*\(xb, yb\)$"):
        learn.lsuv_init(batch=batch)
    assert parameter_bits(learn.model) == before


# --- callbacks that ask the model, or switch it -----------------------------------------------------------------------


class Attacks(Callback):
    "Asks the model which way the images hurt it most (Goodfellow et al. 2015)."

    def before_batch(self):
        x = self.x.clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self.loss_func(self.model(x), *self.yb), x)
        self.learn.xb = (self.x + 0.1 * grad.sign(),)


def test_a_callback_that_calls_the_model_itself(recwarn):
    model = small_cnn(nn.BatchNorm2d)
    learn = learner(loaders(), model, cbs=Attacks())
    twin = copy.deepcopy(model).train()
    learn.lsuv_init()
    x, y = (t.to(default_device()) for t in (X, torch.arange(16) % 10))
    (grad,) = torch.autograd.grad(F.cross_entropy(twin(x.requires_grad_()), y), x)
    assert exact(audit(learn.model, x.detach() + 0.1 * grad.sign()))
    assert model[0][1].num_batches_tracked == 0, "a copy was asked"
    assert not complaints(recwarn)


class Switched(nn.Module):
    "Two networks, of which one runs at a time."

    def __init__(self):
        super().__init__()
        self.generator, self.critic, self.mode = nn.Linear(10, 64), small_cnn(), "critic"

    def forward(self, x):
        return self.critic(x) if self.mode == "critic" else self.generator(x).tanh()


class Switch(Callback):
    "Begins with the generator, whose input is the target."

    def before_fit(self):
        self.learn.model.mode = "generator"

    def before_batch(self):
        if self.model.mode == "generator":
            self.learn.xb, self.learn.yb = (F.one_hot(self.y, 10).float(),), (self.x.flatten(1),)


def test_a_switch_in_the_model(recwarn):
    learn = learner(loaders(), Switched(), loss_func=nn.MSELoss(), metrics=[], cbs=Switch())
    critic = parameter_bits(learn.model.critic)
    learn.lsuv_init()
    assert learn.model.mode == "critic"
    assert parameter_bits(learn.model.critic) == critic
    records = audit(learn.model.generator, F.one_hot(torch.arange(16) % 10, 10).float())
    assert exact(records), records
    assert not complaints(recwarn)


@pytest.mark.parametrize("gen_first", [True, False])
def test_fastai_s_gan(gen_first, recwarn):
    data = [(torch.randn(12), x) for x in pixels().flatten(1)]
    generator, critic = (nn.Sequential(nn.Linear(i, 16), nn.ReLU(), nn.Linear(16, o)) for i, o in ((12, 64), (64, 1)))
    learn = GANLearner.wgan(torch_loaders(data), generator, critic, gen_first=gen_first, switch_eval=False)
    learn.lsuv_init()
    runs, rests = (generator, critic) if gen_first else (critic, generator)
    records = audit(runs, torch.stack([pair[not gen_first] for pair in data[:16]]))
    assert exact(records), records
    assert not {row.name.split(".")[0] for row in learn.lsuv_report if row.status == "corrected"} & {
        name for name, part in learn.model.named_children() if part is rests
    }
    assert not complaints(recwarn)


# --- precision --------------------------------------------------------------------------------------------------------


@contextmanager
def a_note():
    yield


@contextmanager
def in_bf16():
    with torch.autocast("cpu", torch.bfloat16):
        yield


class Dtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.dtype)
        return x


class BF16Learner(Learner):
    "Computes its predictions under an autocast of its own."

    def _do_one_batch(self):
        with a_note(), in_bf16():
            self.pred = self.model(*self.xb)
        self.pred = self.pred.float()
        step(self)


def test_the_autocast_of_a_learner():
    learn, _ = fitted(BF16Learner, loaders(), nn.Sequential(*small_cnn(), tap := Dtypes()))
    assert tap.seen[: learn.lsuv_report.n_forward] == [torch.bfloat16] * learn.lsuv_report.n_forward
    assert not torch.is_autocast_enabled("cpu")


HELPERS = """
import sys; sys.path[:0] = {paths!r}
import test_pilot
from contextlib import ExitStack
class BF16(test_pilot.Callback):
    def before_batch(self):
        self.stack = ExitStack()
        self.stack.enter_context(test_pilot.a_note())
        self.stack.enter_context(test_pilot.in_bf16())
    def after_loss(self): self.stack.close()
net = test_pilot.nn.Sequential(*test_pilot.small_cnn(), tap := test_pilot.Dtypes())
learn, _ = test_pilot.fitted(test_pilot.Learner, test_pilot.loaders(), net, [BF16()])
assert set(tap.seen[:learn.lsuv_report.n_forward]) == {{test_pilot.torch.bfloat16}}, tap.seen
"""


@pytest.mark.parametrize("seed", ["0", "1"])
def test_an_autocast_found_whatever_the_seed_of_hashes(seed):
    code = HELPERS.format(paths=sys.path)
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- where it can't be found out --------------------------------------------------------------------------------------


class Encoder(Learner):
    "Calls parts of the model."

    def _do_one_batch(self):
        self.pred = self.model.head(self.model.fc(self.model.emb(self.xb[0]["ids"])).mean(1))
        step(self)


def test_lsuv_declines_and_training_goes_on(capsys):
    learn = Encoder(torch_loaders(PAIRS), Tokens(), loss_func=CrossEntropyLossFlat(), cbs=LSUVCallback())
    start = parameter_bits(learn.model)
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match="Encoder doesn't call its model"):
        learn.fit(1)
    assert not ran(learn)
    assert parameter_bits(learn.model) != start
    lines = [line for line in capsys.readouterr().out.splitlines() if "LSUV" in line]
    assert len(lines) == 1
    assert lines[0].startswith("LSUV: not run, because Encoder doesn't call its model, and the model can't be called")


def test_what_was_asked_for_raises():
    learn = Encoder(torch_loaders(PAIRS), Tokens(), loss_func=CrossEntropyLossFlat())
    start, batch = parameter_bits(learn.model), bits(IDS)
    with (
        pytest.warns(UserWarning, match="Encoder"),
        pytest.raises(RuntimeError, match="Encoder doesn't call its model"),
    ):
        learn.lsuv_init()
    assert parameter_bits(learn.model) == start
    assert bits(IDS) == batch
