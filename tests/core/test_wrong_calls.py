"""What `lsuv_` and `critical_std` say to whoever calls them in a wrong way: what was wrong, and the way out."""

import pytest
import torch
from audit import parameter_bits
from models import mlp, rows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_lsuv import lsuv_
from fastai_lsuv.init import critical_std

LONGEST = 800  # characters: PyTorch's own list of what a convolution takes is among them


class Trainer:
    "Has a model, as a Learner has."

    def __init__(self):
        self.model = mlp(10, 8, 3)


WRONG_CALLS = {
    "targets": (lambda net: lsuv_(net, (rows(), torch.arange(64))), "give it without the targets, lsuv_(model, xb)"),
    "a list": (lambda net: lsuv_(net, [rows(), torch.arange(64)]), "a tuple or list of inputs is unpacked"),
    "names": (lambda net: lsuv_(net, {"pixels": rows()}), "under the names that the forward has"),
    "NumPy": (lambda net: lsuv_(net, rows().cpu().numpy()), "torch.as_tensor(array)"),
    "NumPy in a tuple": (lambda net: lsuv_(net, (rows().cpu().numpy(),)), "torch.as_tensor(array)"),
    "NumPy by name": (lambda net: lsuv_(net, {"input": rows().cpu().numpy()}), "torch.as_tensor(array)"),
    "DataLoader": (lambda net: lsuv_(net, DataLoader(TensorDataset(rows()))), "the inputs of one batch of it"),
    "an iterator": (lambda net: lsuv_(net, iter(DataLoader(rows()))), "expected a tensor, or a tuple, list or mapping"),
    "a data set": (lambda net: lsuv_(net, TensorDataset(rows())), "the batch is a TensorDataset: expected a tensor"),
    "None": (lambda net: lsuv_(net, None), "the batch is a NoneType: expected a tensor"),
    "swapped": (lambda net: lsuv_(rows(), net), "expected lsuv_(model, batch), in this order"),
    "no model": (lambda net: lsuv_(rows(), rows()), "model is a Tensor: expected a torch.nn.Module"),
    "a Learner": (lambda net: lsuv_(Trainer(), rows()), "learn.lsuv_init() initialises the model"),
    "empty": (lambda net: lsuv_(net, rows()[:0]), "the batch is empty, with an input of shape (0, 10)"),
    "positional": (lambda net: lsuv_(net, rows(), 0.0, 1.0), "lsuv_() takes its options by name: mean=…, std=…"),
    "near miss": (lambda net: lsuv_(net, rows(), sdt=1), "unexpected option 'sdt'; the nearest is 'std'"),
    "std": (lambda net: lsuv_(net, rows(), std=rows()), "std=a Tensor of shape (64, 10): expected a number"),
    "modules": (lambda net: lsuv_(net, rows(), modules=[rows()]), "modules=[a Tensor of shape (64, 10)]: expected a"),
    "elsewhere": (lambda net: lsuv_(net, rows(), exclude=mlp(10, 8, 3)), "exclude: a Sequential is not a part of this"),
    "init": (lambda net: lsuv_(net, rows(), init=nn.init.zeros_(rows())), "init=a Tensor of shape (64, 10): expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_call_says_what_is_wrong_and_shows_no_numbers(case):
    call, text = WRONG_CALLS[case]
    net = mlp(10, 8, 3)
    before = parameter_bits(net)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as e:
        call(net)
    assert text in str(e.value)
    assert "tensor([" not in str(e.value)
    assert "array([" not in str(e.value)
    assert len(str(e.value)) < LONGEST
    assert parameter_bits(net) == before


def test_an_error_of_the_model_s_own_gets_no_hint_on_the_batch():
    with pytest.raises(RuntimeError) as e:
        lsuv_(mlp(10, 8, 3), (rows()[:, :5],))
    assert str(e.value).endswith("the model is unchanged")


def test_an_input_may_be_empty_beside_one_that_is_not():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 8)

        def forward(self, x, memory):
            return self.layer(torch.cat([memory, x]))

    assert lsuv_(Remembering(), (rows(), rows()[:0])).converged


@pytest.mark.parametrize("act", ["tanh", nn.Tanh, None, 100], ids=str)
def test_critical_std_says_what_an_activation_is(act):
    with pytest.raises(TypeError, match=r"expected a function of tensors, such as torch.tanh or nn.Tanh\(\)"):
        critical_std(act, 100)
