"""DESIGN section 3 on networks people use: exact, all layers at once, in three passes, or truly named."""

import pickle

import pytest
import torch
from audit import audit, differences, fingerprint, outputs_of, parameter_bits, rng_print
from checks import assert_exact
from zoo import ARCHITECTURES, architecture

from fastai_lsuv import lsuv_

MAY_SKIP = {"vit_b_32": {"heads.head"}}  # torchvision makes this head of zeros


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_at_its_target_at_the_end(name):
    model, x = architecture(name)
    calls = []
    # a probe may run the model on a single sample
    model.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    before, rng, bits = fingerprint(model), rng_print(), parameter_bits(model)
    report = lsuv_(model, x)
    assert report.n_forward == 3
    assert calls.count(len(x)) == 3, calls
    assert rng_print() == rng
    changed = differences(before, fingerprint(model), but={n for n in bits if n.endswith(("weight", "bias"))})
    assert not changed, changed

    records = assert_exact(model, x, report, bits)
    assert {r.name for r in records if report[r.name].status == "skipped"} <= MAY_SKIP.get(name, set())
    assert report.converged
    ran = {r.name for r in records}
    assert [row.name for row in report if row.name in ran] == [r.name for r in records], "not in the order of execution"
    assert [row.name for row in pickle.loads(pickle.dumps(report))] == [row.name for row in report]


def test_attention_of_vit_is_corrected_through_its_output_projection():
    model, x = architecture("vit_b_32")
    report = lsuv_(model, x)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert len(names) == 12
    for name, (mean, std) in outputs_of(model, x, names).items():
        assert report[name].status in ("corrected", "unchanged")
        assert abs(std - 1) <= 1e-3 and abs(mean) <= 1e-3, (name, mean, std)


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_before_is_the_untouched_network(name):
    model, x = architecture(name)
    untouched = {r.name: r for r in audit(model, x)}
    report = lsuv_(model, x)
    assert max(abs(r.std - 1) for r in untouched.values()) > 0.2
    for n, r in untouched.items():
        assert report[n].std_before == pytest.approx(r.std, rel=1e-4), n
        assert report[n].mean_before == pytest.approx(r.mean, rel=1e-3, abs=1e-4 * r.std), n
