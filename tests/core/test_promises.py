"""DESIGN section 3 on the whole zoo: only weights and biases move, nothing is left behind, honest where it cannot."""

import warnings

import pytest
import torch
from audit import bits, differences, fingerprint, moved, parameter_bits, rng_print, rng_state, set_rng_state
from checks import assert_exact, row_values
from fastai.vision.core import TensorImage
from models import Auxiliary, Shared, convnet, images, mlp, rows
from torch import nn
from zoo import ZOO, zoo

from fastai_lsuv import lsuv_


@pytest.mark.parametrize("name", ZOO)
def test_only_weights_and_biases_move(name):
    model, batch = zoo(name)
    model.train()
    frozen_flags = [m for i, m in enumerate(model.modules()) if i % 3 == 2]
    for m in frozen_flags:
        m.training = False  # a mixture of flags, all to be restored
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    model.register_forward_hook(user_hook)
    before, rng = fingerprint(model), rng_print()
    grad = torch.is_grad_enabled()
    report = lsuv_(model, batch)
    after = fingerprint(model)
    norms = {n for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm, nn.Embedding))}
    may = {n for n, _ in model.named_parameters(remove_duplicate=False) if n.rpartition(".")[0] not in norms}
    assert not differences(before, after, but=may)
    assert rng_print() == rng and torch.is_grad_enabled() == grad
    assert any(row.status == "corrected" for row in report) and report.converged


def user_hook(m, args, out):
    return None


@pytest.mark.parametrize("name", [name for name in ZOO if name != "noisy"])  # which samples: see below
def test_exact_over_the_zoo(name):
    model, batch = zoo(name)
    before = parameter_bits(model)
    report = lsuv_(model, batch)
    assert_exact(model, batch, report, before)


@pytest.mark.parametrize("name", ZOO)
def test_two_runs_give_the_same_bits(name):
    (model, batch), (other, _) = zoo(name, seed=4), zoo(name, seed=4)
    rng = rng_state()
    a = lsuv_(model, batch)
    set_rng_state(rng)
    b = lsuv_(other, batch)
    assert row_values(a) == row_values(b)
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in other.parameters()]


def test_every_pass_starts_from_the_same_random_state():
    "A model that samples is measured on the same noise before, while correcting and after."
    model, x = zoo("noisy")
    report = lsuv_(model, x)
    for row in report:
        assert abs(row.std_after - 1) <= 1e-3 and abs(row.mean_after) <= 1e-3, row
    again = lsuv_(model, x, mean=None, std=None)  # the streams are where they were: the same noise once more
    assert [row.std_after for row in again] == [row.std_after for row in report]


def test_the_network_itself_is_what_training_will_see():
    "Dropout off, functional or not; norms on the batch's own statistics, their buffers as before."

    class Functional(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, self.training)

    net, x = convnet(norm=nn.BatchNorm2d), images()
    net.insert(3, Functional())
    net[1].running_mean.fill_(100.0)
    net[1].running_var.fill_(9.0)
    report = lsuv_(net.train(), x)
    assert_exact(net, x, report, parameter_bits(net))
    assert (
        net.training
        and net[3].training
        and bool((net[1].running_mean == 100).all())
        and net[1].num_batches_tracked == 0
    )


def test_a_norm_with_one_value_per_channel_keeps_to_its_running_statistics():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    x = images(1)
    before = fingerprint(net)
    report = lsuv_(net, x)
    assert report.converged
    assert_exact(net, x, report, parameter_bits(net))
    assert not differences(
        before, fingerprint(net), but={"0.weight", "0.bias", "4.weight", "4.bias", "2.weight", "2.bias"}
    )


def test_the_callers_grad_mode_and_graph_are_left_alone():
    net, x = mlp(10, 8, 3), rows().requires_grad_()
    lsuv_(net, x)
    assert x.grad is None and all(p.grad is None and p.requires_grad and p.is_leaf for p in net.parameters())
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with torch.no_grad():
        lsuv_(net, rows())
    net(rows()).sum().backward()


def test_an_optimizer_made_before_trains_every_parameter():
    net, x = convnet(), images()
    opt = torch.optim.Adam(net.parameters())
    lsuv_(net, x)
    b = parameter_bits(net)
    net(x).square().mean().backward()
    opt.step()
    assert moved(b, net) == set(b)


@pytest.mark.parametrize(
    "hook",
    [lambda m, a, out: out * 2 + 1, lambda m, a, out: out.mul_(3).relu_(), lambda m, a, out: None],
    ids=["replaces", "overwrites", "looks"],
)
@pytest.mark.parametrize("prepend", [True, False])
def test_a_hook_of_the_users_on_a_layer(hook, prepend):
    "Whatever it does to the output, what counts is what the layer itself puts out; and it stays where it was."
    net, x = convnet(), images()
    net[2].register_forward_hook(hook, prepend=prepend)
    before, kept = parameter_bits(net), fingerprint(net)
    report = lsuv_(net, x)
    assert_exact(net, x, report, before)
    assert not differences(kept, fingerprint(net), but=set(before))


def test_a_tensor_of_a_class_of_its_own():
    "fastai's images keep their class through the network; weights never take it on."
    net, x = convnet(), TensorImage(images())
    before, kept = parameter_bits(net), fingerprint(net)
    report = lsuv_(net, x)
    assert_exact(net, x, report, before)
    assert not differences(kept, fingerprint(net), but=set(before))
    assert all(type(p) is nn.Parameter and type(p.data) is torch.Tensor for p in net.parameters())


def test_the_batch_is_left_as_it_was():
    net, x = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)), images() - 1
    kept = x.clone()
    lsuv_(net, x)
    assert torch.equal(x, kept)
    lsuv_(net, [x])
    assert torch.equal(x, kept)


def test_it_is_silent(capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lsuv_(convnet(), images())
    assert capfd.readouterr() == ("", "") and not caught


# --- what it cannot correct: as it was to the bit, and named ----------------------------------------------------------


def skipped(net, x, name, reason, **kwargs):
    before = parameter_bits(net)
    report = lsuv_(net, x, **kwargs)
    row = report[name]
    assert (row.status, row.reason) == ("skipped", reason), row
    assert not {n for n in moved(before, net) if n.rpartition(".")[0] == name}
    assert_exact(net, x, report, before)
    return row


@pytest.mark.parametrize("which", [["weight"], ["bias"], ["weight", "bias"]])
def test_frozen(which):
    net = mlp(10, 8, 8, 3)
    for n in which:
        getattr(net[2], n).requires_grad_(False)
    skipped(net, rows(), "2", "frozen")


def test_never_called():
    net, x = Auxiliary(), rows()
    before = parameter_bits(net)
    row = lsuv_(net, x)["aux"]
    assert (row.status, row.reason, row.n_calls) == ("skipped", "never called", 0)
    assert moved(before, net) == {"body.weight", "body.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("bias", [0.0, 0.1, 1000.0])
def test_constant_output(bias):
    "Exactly constant, or constant but for rounding."
    net = mlp(10, 8, 8, 3)
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.fill_(bias)
    skipped(net, rows(), "2", "constant output")


def test_a_dead_rectifier_makes_what_follows_constant():
    net = mlp(10, 8, 8, 3)
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.fill_(-1.0)
    report = lsuv_(net, rows())
    assert [row.status for row in report] == ["corrected", "skipped", "skipped"]


def test_too_few_values():
    skipped(mlp(10, 8, 1), rows(1), "2", "too few values")


def test_one_sample_with_one_output():
    net, x = nn.Sequential(nn.Linear(10, 1)), rows(1)
    skipped(net, x, "0", "too few values")


def test_one_value_per_channel_is_too_few_for_per_channel():
    net, x = nn.Sequential(nn.Linear(10, 8)), rows(1)
    before = parameter_bits(net)
    row = lsuv_(net, x, per_channel=True)[0]
    assert (row.status, row.reason) == ("skipped", "too few values") and not moved(before, net)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_named_where_they_sit(bad):
    net = mlp(10, 8, 8, 3)
    with torch.no_grad():
        net[2].weight[0, 0] = bad
    before = parameter_bits(net)
    report = lsuv_(net, rows())
    assert report["0"].status == "corrected"
    assert (report["2"].status, report["2"].reason) == ("skipped", "non-finite output")
    assert not {n for n in moved(before, net) if n.startswith("2.")}


def test_a_skipped_layer_does_not_spoil_the_others():
    net, x = convnet(), images()
    for p in net[2].parameters():
        p.requires_grad_(False)
    report = lsuv_(net, x)
    assert [row.name for row in report if row.status == "skipped"] == ["2"]
    assert_exact(net, x, report, parameter_bits(net))


def test_shared_and_skipped_at_once():
    net, x = Shared(2), rows()
    net.shared.weight.requires_grad_(False)
    before = parameter_bits(net)
    report = lsuv_(net, x)
    assert report["shared"].reason == "frozen" and report.n_forward == 3
    assert not moved(before, net) & {"shared.weight", "shared.bias"}
