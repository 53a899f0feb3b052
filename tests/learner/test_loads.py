"""DESIGN section 5: a network that was trained or loaded is left alone, a line says so; `lsuv_init` is the door."""

import copy
import pickle
from collections import OrderedDict
from functools import partial

import pytest
import torch
from audit import audit, moved, parameter_bits
from fastai.vision.all import SGD, OptimWrapper
from learners import Spy, body_and_head, digits, exact, learner, ran, small_cnn
from torch import nn

from fastai_lsuv import LSUVCallback, LSUVReport


@pytest.fixture(scope="module")
def dls():
    return digits()


@pytest.fixture
def make(dls, tmp_path):
    return partial(learner, dls, path=tmp_path)


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "lsuv" in line.lower()]


class Layered(nn.Module):
    "A norm over features, whose weight is not what it was made with."

    def __init__(self):
        super().__init__()
        self.net, self.norm = small_cnn(n_out=16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.norm(self.net(x)))


def drawn(model, name):
    with torch.no_grad():
        model.get_submodule(name).weight.uniform_(0.5, 1.5)
    return model


def trained(learn):
    "By this Learner, before it knew of LSUV."
    learn.fit(1)


def trained_elsewhere(learn):
    learn.model.train()(learn.dls.one_batch()[0])


def loaded(learn):
    torch.save(small_cnn().state_dict(), learn.path / "other.pth")
    (learn.path / "models").mkdir(exist_ok=True)
    torch.save(small_cnn().state_dict(), learn.path / "models" / "other.pth")
    learn.load("other", with_opt=False)


def loaded_with_optimizer(learn):
    other = learner(learn.dls, path=learn.path)
    other.fit(1)
    other.save("whole")
    learn.load("whole")


def state_dict_loaded(learn):
    learn.model.load_state_dict(small_cnn().state_dict())


def submodule_loaded(learn):
    learn.model[0].load_state_dict(small_cnn()[0].state_dict())


def leaf_loaded(learn):
    learn.model[0][0].load_state_dict(small_cnn()[0][0].state_dict())


def nothing(learn):
    pass


TRAINED = {
    "optimizer with steps": (small_cnn, trained),
    "batch norm that has counted": (partial(small_cnn, nn.BatchNorm2d), trained_elsewhere),
    "batch norm with drawn weights": (lambda: drawn(small_cnn(nn.BatchNorm2d), "0.1"), nothing),
    "group norm with drawn weights": (lambda: drawn(small_cnn(partial(nn.GroupNorm, 2)), "0.1"), nothing),
    "layer norm with drawn weights": (lambda: drawn(Layered(), "norm"), nothing),
}
LOADED = {
    "learn.load": loaded,
    "learn.load with optimizer": loaded_with_optimizer,
    "load_state_dict": state_dict_loaded,
    "of the body": submodule_loaded,
    "of one layer": leaf_loaded,
}


def assert_left_alone(learn, capsys, **fit):
    start = parameter_bits(learn.model)
    learn.add_cb(spy := Spy())
    capsys.readouterr()
    learn.fit(**{"n_epoch": 1} | fit)
    (line,) = lines(capsys)
    assert "lsuv_init" in line
    assert not ran(learn)
    if spy.states:
        assert spy.states[0] == start
    learn.fit(1)
    assert not ran(learn), "nor in the fit after that"
    assert isinstance(learn.lsuv_init(), LSUVReport)


@pytest.mark.parametrize("door", ["Learner", "add_cb", "fit"])
@pytest.mark.parametrize("how", TRAINED)
def test_trained(make, capsys, how, door):
    model, do = TRAINED[how]
    learn = make(model=model(), cbs=LSUVCallback() if door == "Learner" and do is not trained else None)
    do(learn)
    if door != "fit" and not learn._grab_cbs(LSUVCallback):
        learn.add_cb(LSUVCallback())
    assert_left_alone(learn, capsys, **({"cbs": LSUVCallback()} if door == "fit" else {}))


@pytest.mark.parametrize("door", ["Learner", "add_cb"])
@pytest.mark.parametrize("how", LOADED)
def test_loaded(make, capsys, how, door):
    learn = make(cbs=LSUVCallback() if door == "Learner" else None)
    if door == "add_cb":
        learn.add_cb(LSUVCallback())
    LOADED[how](learn)
    assert_left_alone(learn, capsys)


def test_a_trained_optimizer_tells_of_a_load_before_the_learner_knew_of_lsuv(make, capsys):
    learn = make()
    loaded_with_optimizer(learn)
    assert_left_alone(learn, capsys, cbs=LSUVCallback())


def test_loaded_after_a_validation(make, capsys):
    learn = make(cbs=LSUVCallback())
    learn.validate()
    state_dict_loaded(learn)
    assert_left_alone(learn, capsys)


def test_an_optimizer_wrapped_around_torch_s_with_steps(make, capsys):
    learn = make(opt_func=partial(OptimWrapper, opt=torch.optim.Adam))
    learn.fit(1)
    learn.add_cb(LSUVCallback())
    assert_left_alone(learn, capsys)


@pytest.mark.parametrize("door", ["Learner", "fit"])
def test_a_training_that_is_resumed(make, capsys, door):
    learn = make(cbs=LSUVCallback() if door == "Learner" else None)
    start = parameter_bits(learn.model)
    learn.add_cb(spy := Spy())
    learn.fit(2, start_epoch=1, cbs=LSUVCallback() if door == "fit" else None)
    (line,) = lines(capsys)
    assert "lsuv_init" in line
    assert not ran(learn)
    assert spy.states[0] == start


def test_says_why_with_a_reason_of_its_own(make, capsys):
    "Different causes, different words."
    said = []
    for how in ("optimizer with steps", "batch norm that has counted", "batch norm with drawn weights"):
        model, do = TRAINED[how]
        learn = make(model=model())
        do(learn)
        capsys.readouterr()
        learn.fit(1, cbs=LSUVCallback())
        said += lines(capsys)
    learn = make(cbs=LSUVCallback())
    state_dict_loaded(learn)
    learn.fit(1)
    said += lines(capsys)
    assert len(set(said)) == 4


def test_silent_when_asked(make, capsys):
    learn = make(cbs=LSUVCallback(verbose=False))
    state_dict_loaded(learn)
    learn.fit(1)
    assert not ran(learn)
    assert not lines(capsys)


# --- and what shows nothing of the kind runs --------------------------------------------------------------------------


def zeroed(model):
    nn.init.zeros_(model[0][1].weight)
    return model


FRESH = {
    "batch norm": partial(small_cnn, nn.BatchNorm2d),
    "zero-initialised batch norm": lambda: zeroed(small_cnn(nn.BatchNorm2d)),
    "norm without weights": partial(small_cnn, partial(nn.BatchNorm2d, affine=False)),
    "layer norm": Layered,
    "norm that keeps no count": partial(small_cnn, partial(nn.BatchNorm2d, track_running_stats=False)),
    "group norm": partial(small_cnn, partial(nn.GroupNorm, 2)),
    "instance norm": partial(small_cnn, nn.InstanceNorm2d),
}


@pytest.mark.parametrize("how", FRESH)
def test_fresh_networks_with_norms_run(make, how):
    learn = make(model=FRESH[how](), cbs=LSUVCallback())
    learn.fit(1)
    assert ran(learn)


def test_gradients_that_are_there_are_no_trace(make):
    "Those of a first look by hand, sparse ones too."
    for model in (small_cnn(), nn.Sequential(nn.Flatten(), Looked(), nn.Linear(4, 10))):
        learn = make(model=model, cbs=LSUVCallback(), opt_func=SGD)
        x, y = learn.dls.one_batch()
        learn.loss_func(learn.model(x), y).backward()
        learn.fit(1)
        assert ran(learn)


class Looked(nn.Module):
    "Looks its first pixel up."

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 4, sparse=True)

    def forward(self, x):
        return self.table((x[:, 0] > 0).long())


def test_a_fresh_optimizer_is_no_trace(make):
    learn = make(cbs=LSUVCallback())
    learn.create_opt()
    learn.fit(1)
    assert ran(learn)


def test_loads_before_the_learner_was_made_are_not_seen(make):
    "A plain net without norms shows nothing: an honest limit."
    model = small_cnn()
    model.load_state_dict(small_cnn().state_dict())
    learn = make(model=model, cbs=LSUVCallback())
    learn.fit(1)
    assert ran(learn)


def test_another_model_s_load_does_not_count(make):
    learn = make(cbs=LSUVCallback())
    small_cnn().load_state_dict(small_cnn().state_dict())
    other = make()
    loaded(other)
    learn.fit(1)
    assert ran(learn)


# --- learn.lsuv_init: always ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [*TRAINED, *LOADED])
@pytest.mark.parametrize("with_callback", [True, False])
def test_the_explicit_door_always_opens(make, how, with_callback):
    model, do = TRAINED.get(how) or (small_cnn, LOADED[how])
    learn = make(model=model(), cbs=LSUVCallback() if with_callback and do is not trained else None)
    do(learn)
    b = learn.dls.one_batch()
    report = learn.lsuv_init(batch=b)
    assert report is learn.lsuv_report
    assert exact(audit(learn.model, b[0]))
    assert report.converged


def test_it_opens_again_and_again_with_its_own_options(make):
    learn, b = make(cbs=LSUVCallback()), None
    learn.fit(1)
    b = learn.dls.one_batch()
    for std in (0.5, 2.0):
        learn.lsuv_init(batch=b, std=std)
        for r in audit(learn.model, b[0]):
            assert r.std == pytest.approx(std, abs=1e-3 * max(1, std))


def test_the_fit_after_it_does_not_run_it_again(make, capsys):
    learn = make(cbs=LSUVCallback())
    report, bits = learn.lsuv_init(), parameter_bits(learn.model)
    capsys.readouterr()
    learn.add_cb(spy := Spy())
    learn.fit(1)
    assert spy.states[0] == bits
    assert learn.lsuv_report is report
    assert not lines(capsys)


def test_its_report_outlives_a_load(make, capsys):
    learn = make(cbs=LSUVCallback())
    report = learn.lsuv_init()
    learn.save("initialised")
    learn.load("initialised", with_opt=False)
    capsys.readouterr()
    learn.fit(1)
    assert learn.lsuv_report is report
    assert not lines(capsys)


def test_frozen_layers_stay_frozen_there_too(make):
    learn = make(splitter=body_and_head)
    learn.freeze()
    bits = parameter_bits(learn.model)
    assert [row.reason for row in learn.lsuv_init()][:2] == ["frozen"] * 2
    assert moved(bits, learn.model) == {n for n in bits if n.startswith("1.")}


def test_the_optimizer_made_before_keeps_its_parameters(make):
    learn = make()
    learn.fit(1)
    learn.lsuv_init()
    bits = parameter_bits(learn.model)
    learn.fit(1)
    assert moved(bits, learn.model) == set(bits)


def test_a_diagnosis_is_not_an_initialisation(make):
    "Both targets `None`: measured, nothing changed, and the first fit still does its work."
    learn = make(cbs=LSUVCallback())
    bits = parameter_bits(learn.model)
    report = learn.lsuv_init(mean=None, std=None)
    assert not moved(bits, learn.model)
    assert report.n_forward == 1
    learn.add_cb(spy := Spy())
    learn.fit(1)
    assert len([n for n in bits if bits[n] != spy.states[0][n]]) == len(bits)


# --- watching for loads -----------------------------------------------------------------------------------------------


def hooks(model):
    return [m._load_state_dict_post_hooks for m in model.modules()]


def test_a_model_saved_before_the_first_fit_is_the_plain_one(make):
    "Nothing of ours, nothing that needs fastcore, the user's own hooks as they are; what loads into it is its affair."
    plain, learn = make(), make(cbs=LSUVCallback())
    raw = pickle.dumps(learn.model)
    assert len(raw) == len(pickle.dumps(plain.model))
    assert b"fastai" not in raw
    assert b"fastcore" not in raw
    for module in learn.model.modules():
        module.register_load_state_dict_post_hook(nothing_to_say)
    for twin in (copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))):
        assert {type(h) for h in hooks(twin)} == {OrderedDict}
        assert {tuple(h.values()) for h in hooks(twin)} == {(nothing_to_say,)}
        twin.load_state_dict(small_cnn().state_dict())
    learn.fit(1)
    assert ran(learn)


def nothing_to_say(module, keys):
    pass


@pytest.mark.parametrize("removed", ["while it is watched", "afterwards"])
def test_hooks_of_the_user_s_are_called_and_can_be_removed(make, removed):
    model, calls = small_cnn(), []
    layer = model[0][0]
    before = layer.register_load_state_dict_post_hook(lambda *_: calls.append("before"))
    learn = make(model=model, cbs=LSUVCallback())
    meanwhile = layer.register_load_state_dict_post_hook(lambda *_: calls.append("meanwhile"))
    model.load_state_dict(small_cnn().state_dict())
    assert calls == ["before", "meanwhile"]
    if removed == "afterwards":
        learn.fit(1)
        assert {type(h) for h in hooks(model)} == {OrderedDict}
    before.remove()
    meanwhile.remove()
    assert not layer._load_state_dict_post_hooks
    model.load_state_dict(small_cnn().state_dict())
    assert calls == ["before", "meanwhile"]


def test_two_learners_that_watch_one_model(make):
    "Both see the load; what hangs on the model goes with the last of them."
    model = small_cnn()
    first, second, third = (make(model=model, cbs=LSUVCallback()) for _ in range(3))
    del third
    state_dict_loaded(first)
    for learn in (first, second):
        learn.fit(1)
        assert not ran(learn)
    assert {type(h) for h in hooks(model)} == {OrderedDict}


def test_lazy_layers_are_watched_like_others(make):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10))
    learn = make(model=model, cbs=LSUVCallback())
    learn.model.eval()(learn.dls.one_batch()[0])
    learn.fit(1)
    assert [row.status for row in learn.lsuv_report] == ["corrected"] * 2
