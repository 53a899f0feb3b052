"""A dozen of the architectures in `python tests/conformance`, each hard in a way of its own; and that run itself."""

import json
import warnings

import pandas as pd
import pytest
import torch
from audit import audit
from conformance import runner, tables
from conformance.architecture import Architecture, Built
from conformance.verdict import Verdict, judge
from models import convnet, images
from torch import nn

import fastai_lsuv

DOZEN = {  # path: reasons that must be there
    "timm/mlp_mixer": {"constant output"},  # gMLP: a head of zeros, gates whose mean dwarfs their std
    "timm/sequencer": {"recurrent weights", "constant output"},
    "torchvision/swin_v2_t": set(),  # weights used functionally beside biases of which one is zeroed
    "timm/csatv2": {"constant output"},  # a constant positional input
    "timm/nfnet": {"constant output"},  # `ScaledStdConv2d`: its gain carries the scale
    "timm/vision_transformer_hybrid": {"weight has no effect on scale"},  # weight standardisation
    "torchvision/efficientnet_b0": set(),  # 1×1 maps, stochastic depth
    "torchvision detection/retinanet_resnet50_fpn": set(),  # one head on five levels, dict out
    "fastai/AWD_LSTM classifier": {"recurrent weights"},
    "Hugging Face/ALBERT": {"tied weight"},  # one layer three times
    "Hugging Face/Mixtral": set(),  # a router: which experts are asked depends on its weights
    "Hugging Face/GPT-2": {"tied weight"},  # `Conv1D`
    "Hugging Face/Wav2Vec2": set(),  # weight norm
    "torch.nn/Transformer, masks": set(),
    "torch.nn/TransformerEncoder, padding": set(),
}
ALL = runner.architectures()


@pytest.mark.parametrize("path", DOZEN)
def test_every_layer_is_right_or_named_with_a_reason_that_is_true(path):
    with warnings.catch_warnings():
        verdict = judge(ALL[path])  # transformers sets filters when it loads a model's code
    assert verdict.outcome == "right", verdict.faults
    assert set(verdict.skipped) == DOZEN[path] and verdict.layers > 0


def test_the_zoo_is_whole():
    import timm.models

    families = {a.family for a in ALL.values()}
    assert {
        "timm",
        "torchvision",
        "torchvision segmentation",
        "torchvision detection",
        "torchvision video",
        "fastai",
        "torch.nn",
    } < families
    assert {a.name for a in ALL.values() if a.family == "timm"} == set(timm.models.list_modules())


# --- the judge -------------------------------------------------------------------------------------------------------


def small():
    return Architecture("small", "net", lambda: Built(convnet(), images(), "four layers"))


@pytest.mark.parametrize(
    "spoil,fault",
    [
        (lambda net, report: net[0].weight.data.mul_(1.01), "std"),
        (lambda net, report: net[2].bias.data.add_(0.01), "mean"),
        (lambda net, report: net.register_buffer("extra", torch.ones(1)), "not only weights"),
        (lambda net, report: net.eval(), "not only weights"),
        (lambda net, report: torch.rand(1), "random streams"),
        (lambda net, report: setattr(report, "rows", report.rows[1:]), "not in the report"),
        (lambda net, report: setattr(report, "n_forward", 5), "5 passes"),
        (lambda net, report: object.__setattr__(report.rows[0], "status", "skipped"), "skipped"),
    ],
)
def test_the_judge_sees(spoil, fault, monkeypatch):
    def spoiled(model, batch):
        report = fastai_lsuv.lsuv_(model, batch)
        spoil(model, report)
        return report

    assert judge(small()).outcome == "right"
    monkeypatch.setattr("conformance.verdict.lsuv_", spoiled)
    verdict = judge(small())
    assert verdict.outcome == "wrong" and any(fault in f for f in verdict.faults), verdict.faults


@pytest.mark.parametrize(
    "reason",
    [
        "constant output",
        "non-finite output",
        "too few values",
        "tied weight",
        "weight has no effect on scale",
        "frozen",
        "never called",
        "recurrent weights",
        "bad weather",
    ],
)
def test_the_judge_believes_no_reason(reason, monkeypatch):
    def lying(model, batch):
        model[0].weight.data, kept = model[0].weight.data.clone(), model[0].weight.data
        report = fastai_lsuv.lsuv_(model, batch, exclude="0")
        row = fastai_lsuv.lsuv_(model, batch, mean=None, std=None)[0]
        for key, value in dict(status="skipped", reason=reason).items():
            object.__setattr__(row, key, value)
        report.rows = (row, *report.rows)
        model[0].weight.data = kept
        return report

    monkeypatch.setattr("conformance.verdict.lsuv_", lying)
    assert judge(small()).outcome == "wrong"


def test_what_cannot_be_built_or_crashes_is_listed():
    def fails():
        raise ImportError("no such thing")

    assert judge(Architecture("small", "none", fails)).faults == ["ImportError: no such thing"]
    wrong_input = Architecture("small", "net", lambda: Built(nn.Linear(4, 4), torch.randn(2, 3)))
    assert judge(wrong_input).outcome == "crashed"


def test_empty_outputs_are_calls_without_values():
    (record,) = audit(nn.Sequential(nn.Linear(4, 3)), torch.empty(0, 4))
    assert (record.n_calls, record.n) == (1, 0)


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def verdicts():
    return [
        Verdict("timm", "a", "right", "a_1", 10, 5, 4, 1, {"constant output": 1}, 3, 1.0),
        Verdict("fastai", "b", "wrong", "", 10, 2, 1, 0, {}, 3, 1.0, ["std | 2"]),
    ]


def test_rows_come_back_from_the_file_if_the_code_is_the_same(verdicts, tmp_path):
    for v in verdicts:
        tables.append(tmp_path / "t.csv", v, "now")
    assert tables.read(tmp_path / "t.csv", {"timm/a": "now", "fastai/b": "now"}) == verdicts
    assert tables.read(tmp_path / "t.csv", {"timm/a": "later", "fastai/b": "now"}) == verdicts[1:]
    assert json.loads(pd.read_csv(tmp_path / "t.csv").skipped[0]) == {"constant output": 1}


def test_tables_count_and_hide_nothing(verdicts, tmp_path):
    assert "1 of 2 architectures right" in tables.summary(
        verdicts
    ) and "of 7 layers 5 at their target" in tables.summary(verdicts)
    assert "| std \\| 2" in tables.markdown(verdicts) and "1 constant output" in tables.markdown(verdicts)
    page = tmp_path / "layers.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.put_into(page, "new")
    assert page.read_text() == f"before\n{tables.BEGIN}\nnew\n{tables.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no"):
        tables.put_into(page, "new")


def test_one_that_hangs_or_dies_ends_nothing_else(monkeypatch):
    import os
    import time

    monkeypatch.setattr(
        runner,
        "architectures",
        lambda: {
            "small/hang": Architecture("small", "hang", lambda: time.sleep(60)),
            "small/die": Architecture("small", "die", lambda: os._exit(3)),
        },
    )
    assert runner.judge_apart("small/hang", 0.5, 8).faults == ["no answer after 0 s"]
    assert runner.judge_apart("small/die", 60, 8).faults == ["the process ended with 3"]
