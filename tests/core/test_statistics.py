"""Moments of a tensor against float64 numpy: no overflow, no cancellation, whatever the dtype and the memory layout."""

import math

import numpy as np
import pytest
import torch
from counts import as_on_a_device

from fastai_lsuv.core import statistics
from fastai_lsuv.core.statistics import moments

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def truth(x):
    x = x.detach().double().cpu().numpy()
    return x.size, x.mean(), x.std(ddof=1)


def agrees(x, rel=1e-4, careful=False):
    "n exactly; std relatively; mean within the same fraction of std, or as far as single precision can tell."
    m, (n, mean, std) = moments(x, careful=careful), truth(x)
    assert float(m.n) == n
    assert math.isclose(float(m.std), std, rel_tol=rel), (float(m.std), std)
    assert abs(float(m.mean) - mean) <= max(rel * std, 1e-7 * abs(mean)), (float(m.mean), mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (7,), (64, 10), (4, 8, 33, 31), (2, 3, 4, 5, 6)])
def test_plain(dtype, shape):
    agrees(torch.randn(shape).mul(3).add(1).to(dtype))


# bfloat16 rounds the last of them to a constant
@pytest.mark.parametrize(
    ("dtype", "ratio"), [(d, r) for d in DTYPES for r in (10, 100, 1e4) if (d, r) != (torch.bfloat16, 1e4)]
)
def test_a_mean_that_dwarfs_the_std(dtype, ratio):
    "E[x²] − E[x]² loses everything here in single precision; the truth is that of the rounded values."
    x = (torch.randn(50_000).double() + ratio).to(dtype)
    agrees(x, rel=3e-4, careful=True)


@pytest.mark.parametrize("ratio", [-1e4, 1e5, 1e6])
def test_double_precision_goes_further(ratio):
    agrees(torch.randn(50_000, dtype=torch.float64) + ratio)


@pytest.mark.parametrize(
    "dtype,scale",
    [
        (torch.float16, 3e4),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e150),
        (torch.float64, 1e-140),
    ],
)
def test_squares_neither_overflow_nor_vanish(dtype, scale):
    x = torch.rand(20_000, dtype=torch.float64).mul(2).sub(0.7).mul(scale).to(dtype)
    agrees(x, rel=1e-3, careful=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0, 1, 100])
@pytest.mark.parametrize("n", [999, 1000, 1001, 50_002])
def test_half_precision_on_a_device(dtype, ratio, n, monkeypatch):
    "Copied in single precision part by part."
    monkeypatch.setattr(statistics, "_PART", 1000)
    with as_on_a_device():
        agrees((torch.randn(n).double() + ratio).to(dtype), rel=3e-4)
        constant = moments(torch.full((n,), -0.1, dtype=dtype))
    assert float(constant.std) <= 1e-7


def test_sums_in_half_precision_do_not_overflow():
    agrees(torch.full((100_000,), 600.0, dtype=torch.float16) + torch.randn(100_000).half(), careful=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_tensor_of_millions(dtype):
    agrees(torch.randn(16, 64, 56, 56).add(0.5).to(dtype))


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "strided": lambda x: x[:, ::2, 1::3],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "flipped": lambda x: x.flip(0)[1:],
    "narrowed": lambda x: x.narrow(2, 3, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout):
    x = LAYOUTS[layout](torch.randn(4, 6, 17, 15) * torch.arange(1, 16) + 2)
    agrees(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1000.0])
def test_a_constant_has_no_spread(dtype, value):
    x = torch.full((3, 1000), value, dtype=dtype)
    m = moments(x, careful=True)
    assert float(m.mean) == pytest.approx(x.double().mean().item(), rel=1e-6)
    assert 0 <= float(m.std) <= 1e-6 * abs(value)


def test_the_tensor_is_left_alone():
    x = torch.randn(64, 32, requires_grad=True)
    kept = x.detach().clone()
    moments(x)
    assert torch.equal(x, kept) and x.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_show(bad):
    x = torch.randn(1000)
    x[17] = bad
    assert not math.isfinite(float(moments(x).std))


@pytest.mark.parametrize("cuts", [(1,), (500,), (999,), (1, 2, 3), (100, 400, 401, 990)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_merged_parts_are_the_whole(cuts, offset):
    x = torch.cat([torch.randn(500), torch.randn(500) * 5 + 2]) + offset
    parts = [moments(p) for p in torch.tensor_split(x, cuts)]
    whole, (n, mean, std) = parts[0], truth(x)
    for p in parts[1:]:
        whole = whole.merge(p)
    assert (
        float(whole.n) == n
        and float(whole.std) == pytest.approx(std, rel=3e-4)
        and float(whole.mean) == pytest.approx(mean, abs=1e-3)
    )
    assert float(moments(x).std) == pytest.approx(float(whole.std), rel=3e-4)


def test_merging_changes_neither_side_and_does_not_care_about_order():
    a, b = moments(torch.randn(300) * 2), moments(torch.randn(50) + 7)
    kept = [float(v) for m in (a, b) for v in (m.n, m.mean, m.std)]
    ab, ba = a.merge(b), b.merge(a)
    assert [float(v) for m in (a, b) for v in (m.n, m.mean, m.std)] == kept
    assert float(ab.std) == pytest.approx(float(ba.std), rel=1e-6) and float(ab.mean) == pytest.approx(
        float(ba.mean), rel=1e-6
    )


def test_a_single_value_merges():
    m = moments(torch.tensor([3.0])).merge(moments(torch.tensor([5.0])))
    assert (float(m.n), float(m.mean), float(m.std)) == (2, 4, pytest.approx(2**0.5))


@pytest.mark.parametrize("n", [1, 0])
def test_too_few_values_are_counted(n):
    assert float(moments(torch.ones(n)).n) == n


def test_numpy_agrees_with_the_truth_used_here():
    x = torch.randn(1000)
    assert truth(x)[2] == pytest.approx(x.std().item(), rel=1e-5) and np.isclose(
        truth(x)[1], x.mean().item(), atol=1e-6
    )
