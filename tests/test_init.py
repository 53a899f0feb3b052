"""Initialisers for very deep nets: the singular values and symmetries they are for, whatever the shape; and `init=`."""

import inspect
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from audit import rng_print
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import images, mlp, rows
from torch import nn

from fastai_lsuv import lsuv_
from fastai_lsuv.init import critical_std, delta_orthogonal_, looks_linear_

TRY = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
INITS = delta_orthogonal_, looks_linear_
kernels = st.lists(st.integers(1, 5), max_size=3)
sizes = st.integers(1, 13)
CONV = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
TRANSPOSED = None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d


def centre(w):
    return w[(slice(None), slice(None), *(k // 2 for k in w.shape[2:]))]


def layer(n_in, n_out, kernel, transposed=False, groups=1):
    "A bias-free layer with output as large as the input, at odd kernels."
    if not kernel:
        return nn.Linear(n_in, n_out, bias=False)
    kind = (TRANSPOSED if transposed else CONV)[len(kernel)]
    return kind(n_in, n_out, kernel, padding=tuple(k // 2 for k in kernel), groups=groups, bias=False).double()


def data(n_in, kernel, n=3):
    return torch.randn(n, n_in, *(k + 2 for k in kernel), dtype=torch.double if kernel else None)


# --- delta-orthogonal -------------------------------------------------------------------------------------------------


@TRY
@given(sizes, sizes, kernels, st.floats(0.1, 3))
def test_delta_orthogonal_singular_values_and_zeros_around(n_out, n_in, kernel, gain):
    w = torch.randn(n_out, n_in, *kernel, dtype=torch.double)
    assert delta_orthogonal_(w, gain) is w
    torch.testing.assert_close(torch.linalg.svdvals(centre(w)), torch.full((min(n_out, n_in),), gain, dtype=w.dtype))
    assert w.count_nonzero() == centre(w).count_nonzero()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("n_in, n_out", [(8, 8), (8, 16), (16, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_delta_orthogonal_keeps_lengths_where_the_layer_does_not_shrink(groups, n_in, n_out, transposed):
    "Each group by itself; a shrinking layer projects, so that no length grows."
    net, x = layer(n_in, n_out, (3, 3), transposed, groups), data(n_in, (3, 3))
    delta_orthogonal_(net.weight, groups=groups)
    length, was = net(x).norm(dim=1), x.norm(dim=1)
    if n_out >= n_in:
        torch.testing.assert_close(length, was)
    else:
        assert (length <= was + 1e-9).all() and (length < was - 0.1).any()


def test_a_linear_layer_s_is_orthogonal_s():
    a, b = torch.empty(7, 5), torch.empty(7, 5)
    torch.testing.assert_close(
        delta_orthogonal_(a, generator=torch.Generator().manual_seed(3)),
        nn.init.orthogonal_(b, generator=torch.Generator().manual_seed(3)),
    )


def test_an_even_kernel_s_centre_is_dirac_s():
    a, b = torch.empty(4, 4, 2, 4), torch.empty(4, 4, 2, 4)
    assert torch.equal(delta_orthogonal_(a).abs().sum((0, 1)) > 0, nn.init.dirac_(b).abs().sum((0, 1)) > 0)


# --- looks-linear -----------------------------------------------------------------------------------------------------


@TRY
@given(sizes, st.integers(2, 13), sizes, kernels, st.booleans(), st.floats(0.1, 3))
def test_a_looks_linear_relu_pair_is_odd_and_linear(n_in, hidden, n_out, kernel, transposed, gain):
    "Also with odd channel counts: the hidden channel without a mirror image is not looked at yet."
    kernel = [k | 1 for k in kernel]
    first, second = layer(n_in, hidden, kernel, transposed), layer(hidden, n_out, kernel, transposed)
    looks_linear_(first.weight, gain, transposed=transposed and bool(kernel), first=True)
    looks_linear_(second.weight, transposed=transposed and bool(kernel))
    f = lambda x: second(F.relu(first(x)))
    x, y = data(n_in, kernel), data(n_in, kernel)
    torch.testing.assert_close(f(-x), -f(x))
    torch.testing.assert_close(f(x + 2 * y), f(x) + 2 * f(y), rtol=1e-4, atol=1e-5)
    assert f(x).abs().sum() > 0


@TRY
@given(sizes, sizes, st.booleans())
def test_looks_linear_singular_values_of_what_a_pair_sees(n_out, n_in, transposed):
    "V: from the differences of mirrored inputs to the outputs that have a mirror image, and the one that has none."
    shape = (n_in, n_out) if transposed else (n_out, n_in)
    w = looks_linear_(torch.randn(*shape, 3, dtype=torch.double), 1.5, transposed=transposed)[..., 1]
    if transposed:
        w = w.T
    v = w[:, : n_in // 2 or 1]
    v = torch.cat([v[: n_out // 2], v[n_out // 2 * 2 :]])
    torch.testing.assert_close(torch.linalg.svdvals(v), torch.full((min(v.shape),), 1.5, dtype=w.dtype))
    torch.testing.assert_close(w[: n_out // 2], -w[n_out // 2 : n_out // 2 * 2])


@pytest.mark.parametrize(
    "act", [F.relu, F.leaky_relu, torch.tanh, F.silu, lambda x: F.leaky_relu(x, 1 / 3)], ids=lambda f: f.__name__
)
def test_a_deep_looks_linear_net_is_odd_with_any_activation(act):
    layers = [layer(3, 8, (3, 3)), *(layer(8, 8, (3, 3)) for _ in range(6)), layer(8, 5, (3, 3))]
    for i, m in enumerate(layers):
        looks_linear_(m.weight, first=not i)

    def f(x):
        for m in layers[:-1]:
            x = act(m(x))
        return layers[-1](x)

    x = data(3, (3, 3))
    torch.testing.assert_close(f(-x), -f(x))
    assert f(x).std() > 0.01


@pytest.mark.parametrize("groups, width", [(2, 8), (4, 8), (8, 8), (4, 12)])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_layers_between_keep_it_odd_and_alive(groups, width, transposed):
    layers = layer(3, width, (3, 3)), layer(width, 2 * width, (3, 3), transposed, groups), layer(2 * width, 4, (3, 3))
    looks_linear_(layers[0].weight, first=True)
    looks_linear_(layers[1].weight, groups=groups, transposed=transposed)
    looks_linear_(layers[2].weight)
    hidden = lambda x: F.relu(layers[1](F.relu(layers[0](x))))
    x = data(3, (3, 3), n=16)
    torch.testing.assert_close(layers[2](hidden(-x)), -layers[2](hidden(x)))
    assert (hidden(x).amax((0, 2, 3)) > 0).sum() >= width


def test_depthwise_layers_pass_rectified_channels_on():
    m = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    looks_linear_(m.weight, groups=6)
    x = torch.rand(2, 6, 5, 5)
    torch.testing.assert_close(m(x), x)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_memory_formats_stay(init, dtype):
    w = nn.Conv2d(4, 8, 3).weight.detach().to(dtype).to(memory_format=torch.channels_last)
    was = w.stride()
    init(w)
    assert w.dtype == dtype and w.stride() == was and w.isfinite().all() and w.any()


@pytest.mark.parametrize("init", INITS)
def test_parameters_are_filled_without_a_graph_and_from_the_generator_alone(init):
    m, g = nn.Conv2d(4, 8, 3), torch.Generator()
    before = rng_print()
    one = init(m.weight, generator=g.manual_seed(5)).detach().clone()
    two = init(m.weight, generator=g.manual_seed(5)).detach()
    assert torch.equal(one, two) and m.weight.is_leaf and m.weight.grad_fn is None and rng_print() == before


@pytest.mark.parametrize("init", INITS)
def test_impossible_shapes(init):
    with pytest.raises(ValueError, match=r"shape \(5,\), expected 2 dim"):
        init(torch.empty(5))
    with pytest.raises(ValueError, match="groups=3, expected a divisor of the first dimension, 4"):
        init(torch.empty(4, 2, 3), groups=3)
    with pytest.raises(ValueError, match="groups=0"):
        init(torch.empty(4, 2, 3), groups=0)
    assert init(torch.empty(0, 3)).shape == (0, 3)


# --- as `init=` -------------------------------------------------------------------------------------------------------


def relu_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


@pytest.mark.parametrize("init", INITS)
def test_as_init_in_a_net_of_many_kinds(init):
    net = relu_net()
    report = lsuv_(net, images(), init=init)
    assert report.converged and {row.status for row in report} <= {"corrected", "unchanged"}


def test_as_init_looks_linear_is_told_what_it_needs():
    "The first layer, groups, transposed layers: after LSUV without a shift the whole net is odd."
    net, x = relu_net(), images()
    x = x - x.mean()
    report = lsuv_(net, x, init=looks_linear_, mean=None)
    assert report.converged
    torch.testing.assert_close(net(-x), -net(x), rtol=1e-4, atol=1e-5)


def test_first_is_the_net_s_first_layer_not_the_first_that_was_chosen():
    net, x = mlp(10, 16, 16, 3), rows()
    lsuv_(net, x, init=looks_linear_, modules="2", mean=None)
    w = net[2].weight
    torch.testing.assert_close(w[:, :8], -w[:, 8:])
    lsuv_(net, x, init=looks_linear_, mean=None)
    w = net[0].weight.detach()
    torch.testing.assert_close(w[:8], -w[8:])
    assert torch.linalg.matrix_rank(w) == 8 and not torch.allclose(w[:, :5], -w[:, 5:])


def test_first_in_blocks():
    net, x = (
        nn.Sequential(nn.Sequential(nn.Linear(10, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())),
        rows(),
    )
    seen = []

    def init(w, first):
        seen.append(first)
        nn.init.orthogonal_(w)

    lsuv_(net, x, init=init, modules=nn.Module.children)
    assert seen == [True, False]


def test_any_initialiser_is_told_what_it_has_parameters_for():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=3), nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.LazyLinear(2)
    )
    x, seen = images(), []
    net(x)

    def init(w, transposed=None, *, groups=None):
        seen.append((transposed, groups))
        nn.init.orthogonal_(w)

    lsuv_(net, x, init=init)
    assert seen == [(False, 1), (False, 3), (True, 1), (None, None)]
    lsuv_(net[:2], x, init=nn.init.dirac_)
    torch.testing.assert_close(
        *(w / w.max() for w in (net[1].weight.detach(), nn.init.dirac_(torch.empty(6, 2, 3, 3), groups=3)))
    )
    lsuv_(net, x, init=partial(looks_linear_, gain=2.0))
    lsuv_(net, x, init=lambda w: w.normal_())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_on_timm_s_models(init, name):
    kw = dict(img_size=32) if "vit" in name else {}
    net = timm.create_model(name, pretrained=False, **kw)
    report = lsuv_(net, images(8, 3, 32), init=init, mean=None)
    assert report.converged and sum(row.status == "skipped" for row in report) <= 1
    assert all(abs(row.std_after - 1) < 2e-3 for row in report if row.status != "skipped")


def test_they_take_what_torch_s_take():
    for init in INITS:
        assert {"tensor", "gain", "generator"} <= set(inspect.signature(init).parameters) & {
            *inspect.signature(nn.init.orthogonal_).parameters
        }


# --- the std for a depth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [torch.relu, nn.ReLU(inplace=True), nn.LeakyReLU(1 / 3), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Identity()],
    ids=lambda act: act.__name__ if act is torch.relu else str(act),
)
def test_any_std_does_where_the_odd_part_is_linear(act):
    assert critical_std(act, 5) == critical_std(act, 10_000) == 1


@pytest.mark.parametrize("depth", [1000, 10_000])
def test_critical_std_of_tanh_is_that_of_the_series(depth):
    "s² E[ψ'²] / E[ψ²] = 1 + 4/3 s⁴ + … for tanh; and a sigmoid is half a tanh of half its input."
    assert critical_std(torch.tanh, depth) == pytest.approx((3 / 4 / depth) ** 0.25, rel=0.05)
    assert critical_std(torch.sigmoid, depth) == pytest.approx(2 * critical_std(torch.tanh, depth), rel=1e-6)


def test_critical_std_falls_with_depth():
    stds = [critical_std(torch.tanh, depth) for depth in (1, 3, 10, 30, 100, 300, 1000)]
    assert stds[0] == 1 and stds[1:] == sorted(stds[1:], reverse=True) and len(set(stds[1:])) == 6


@pytest.mark.parametrize("act", [nn.Tanh(), nn.Sigmoid()], ids=str)
def test_gradients_pass_through_at_the_critical_std_and_explode_at_1(act):
    "In a real network: from the last layer to the first the gradient's variance grows e-fold at most, or little more."
    depth, width = 60, 128

    def growth(std):
        net = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), act)))
        x = torch.randn(64, width)
        lsuv_(net, x, init=looks_linear_, std=std)
        zs = []
        for m in net:
            x = m(x)
            if isinstance(m, nn.Linear):
                x.retain_grad()
                zs.append(x)
        (x * torch.randn_like(x)).sum().backward()
        return (zs[0].grad.square().mean() / zs[-1].grad.square().mean()).item()

    assert 1 / 2 < growth(critical_std(act, depth)) < 2 * torch.e
    assert growth(4.0) > 100


@pytest.mark.parametrize("act", [torch.abs, torch.square, torch.sign, lambda z: z * torch.inf])
def test_critical_std_refuses_what_mirroring_cancels(act):
    with pytest.raises(ValueError, match="odd part"):
        critical_std(act, 10)


@pytest.mark.parametrize("depth", [0, -3])
def test_critical_std_refuses_impossible_depths(depth):
    with pytest.raises(ValueError, match=f"depth={depth}"):
        critical_std(torch.tanh, depth)
