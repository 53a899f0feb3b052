"""DESIGN section 5: export, deep copies, pickles: they load in a new process, never run again, carry no data."""

import copy
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from audit import call, moved, parameter_bits
from learners import Spy, body_and_head, digits, exact, learner, ran, small_cnn
from torch import nn

import fastai_lsuv
from fastai_lsuv import LSUVCallback

HERE = Path(__file__).parents[1]
SENTINEL = 1234.5678

FRESH_PROCESS = """
import sys, warnings
warnings.simplefilter('ignore')
import numpy as np, torch
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
x = torch.from_numpy(np.load(sys.argv[2]))
learn.model.eval()
with torch.no_grad(): np.save(sys.argv[3], learn.model(x).numpy())
assert learn.predict(np.zeros((8, 8), np.uint8))
print('lsuv_report' in vars(learn), len(getattr(learn, 'lsuv_report', ())))
from learners import Spy, digits
from audit import parameter_bits
loaded = parameter_bits(learn.model)
learn.dls = digits()
spy = Spy()
learn.fit(1, cbs=spy)
assert spy.states[0] == loaded, 'ran again'
"""


@pytest.fixture(scope="module")
def dls():
    return digits()


@pytest.fixture
def make(dls, tmp_path):
    return partial(learner, dls, path=tmp_path)


def in_a_new_process(folder, x):
    "What a fresh interpreter makes of an exported Learner: its predictions and what it prints."
    np.save(folder / "x.npy", x.numpy())
    path = [str(HERE), str(Path(fastai_lsuv.__file__).parents[1]), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    args = [sys.executable, "-c", FRESH_PROCESS, *(str(folder / n) for n in ("export.pkl", "x.npy", "out.npy"))]
    done = subprocess.run(args, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "out.npy"), done.stdout


@pytest.mark.parametrize("door", ["Learner", "fit"])
def test_exported_and_loaded_in_a_new_process(make, tmp_path, door):
    learn = make(model=small_cnn(nn.BatchNorm2d), cbs=LSUVCallback() if door == "Learner" else None)
    learn.fit(1, cbs=LSUVCallback() if door == "fit" else None)
    report, bits = learn.lsuv_report, parameter_bits(learn.model)
    learn.export()
    assert not moved(bits, learn.model)
    x = torch.randn(16, 1, 8, 8)
    preds, out = in_a_new_process(tmp_path, x)
    learn.model.eval()
    with torch.no_grad():
        assert learn.model.cpu()(x).numpy().tobytes() == preds.tobytes()
    assert out.splitlines()[0] == f"True {len(report)}"
    assert not [line for line in out.splitlines() if line.startswith("LSUV")]
    learn.fit(1)  # exporting has not confused the Learner that goes on
    assert learn.lsuv_report is report


def test_an_export_before_any_fit_loads(make, tmp_path):
    learn = make(cbs=LSUVCallback(init=nn.init.orthogonal_, modules=nn.Conv2d))
    learn.create_opt()
    learn.export()
    from fastai.learner import load_learner

    with pytest.warns(UserWarning, match="insecure"):
        loaded = load_learner(tmp_path / "export.pkl", cpu=False)
    assert not moved(parameter_bits(learn.model), loaded.model)
    loaded.dls = learn.dls
    loaded.validate()
    assert not ran(loaded)


def marked():
    "A large batch that can be recognised by its bytes."
    return torch.full((256, 1, 8, 8), SENTINEL) + torch.randn(256, 1, 8, 8), torch.arange(256) % 10


def carries(raw, batch):
    return batch[0][7].numpy().tobytes()[:64] in raw


def test_a_given_batch_is_not_exported(make, tmp_path):
    batch = marked()
    learn = make(cbs=LSUVCallback(batch=batch))
    for _ in range(2):  # before and after the first fit
        learn.export()
        raw = (tmp_path / "export.pkl").read_bytes()
        assert not carries(raw, batch)
        assert len(raw) < 1_000_000
        learn.fit(1)
    assert ran(learn)


def test_an_export_carries_no_more_than_it_would_without(make, tmp_path):
    sizes = []
    for cbs in (None, LSUVCallback()):
        learn = make(cbs=cbs)
        learn.fit(1)
        learn.export()
        sizes.append((tmp_path / "export.pkl").stat().st_size)
    assert sizes[1] - sizes[0] < 10_000


@pytest.mark.parametrize("fitted", [False, True])
def test_the_model_alone_is_the_model_alone(make, tmp_path, fitted):
    "`torch.save(model)`, its deep copy and its pickle bring no Learner and no data with them."
    plain, learn = make(), make(cbs=LSUVCallback(batch=marked()))
    for each in (plain, learn):
        if fitted:
            each.fit(1)
    sizes = []
    for each in (plain, learn):
        torch.save(each.model, tmp_path / "model.pth")
        sizes.append((tmp_path / "model.pth").stat().st_size)
    assert sizes[1] - sizes[0] < 5_000
    again = torch.load(tmp_path / "model.pth", weights_only=False)
    assert not moved(parameter_bits(learn.model), again)
    x, twin = torch.randn(4, 1, 8, 8), copy.deepcopy(learn.model)
    assert torch.equal(call(twin, x), call(learn.model, x))
    assert not moved(parameter_bits(learn.model), pickle.loads(pickle.dumps(learn.model)))


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), lambda o: cloudpickle.loads(cloudpickle.dumps(o))],
    ids=["deepcopy", "pickle", "cloudpickle"],
)
def test_copies_of_a_fitted_learner_do_not_run_it_again(make, how):
    learn = make(cbs=LSUVCallback())
    learn.fit(1)
    twin = how(learn)
    bits = parameter_bits(twin.model)
    assert bits == parameter_bits(learn.model)
    assert [row.name for row in twin.lsuv_report] == [row.name for row in learn.lsuv_report]
    twin.add_cb(spy := Spy())
    twin.fit(1, reset_opt=True)
    assert spy.states[0] == bits


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda o: cloudpickle.loads(cloudpickle.dumps(o))], ids=["deepcopy", "cloudpickle"]
)
def test_copies_of_a_learner_before_its_first_fit_each_run_their_own(make, how):
    learn = make(splitter=body_and_head)
    batch = learn.dls.one_batch()
    learn.add_cb(LSUVCallback())
    twin = how(learn)
    for each in (twin, learn):
        assert not ran(each)
        each.add_cb(spy := Spy())
        start = parameter_bits(each.model)
        each.fit(1)
        assert ran(each)
        assert spy.states[0] != start
    assert twin.lsuv_report is not learn.lsuv_report
    twin.lsuv_init(batch=batch)


def test_loading_into_the_twin_leaves_the_original_alone(make):
    learn = make(cbs=LSUVCallback())
    twin = copy.deepcopy(learn)
    twin.model.load_state_dict(small_cnn().state_dict())
    learn.fit(1)
    assert ran(learn)
    twin.fit(1)
    assert not ran(twin)


def test_the_callback_itself_pickles(make):
    cb = pickle.loads(pickle.dumps(LSUVCallback(std=0.5, exclude="1.*")))
    learn = make(cbs=cb)
    learn.fit(1)
    assert [row.name for row in learn.lsuv_report] == ["0.0", "0.2"]


def test_save_and_load_of_the_learner_s_weights(make):
    learn = make(cbs=LSUVCallback())
    b = learn.dls.one_batch()
    learn.lsuv_init(batch=b)
    bits = parameter_bits(learn.model)
    learn.save("after")
    learn.fit(1)
    learn.load("after")
    assert parameter_bits(learn.model) == bits
    from audit import audit

    assert exact(audit(learn.model, b[0]))
