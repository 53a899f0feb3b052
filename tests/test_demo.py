"""`python -m fastai_lsuv`: what it prints and draws, on how many threads, and what it says to wrong arguments."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from fastai_lsuv import demo
from fastai_lsuv.demo import main

ROOT = Path(__file__).parent.parent


def test_both_runs_are_shown_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(torch, "set_num_threads")  # called as a function, it runs on as many threads as its caller
    main(["--depth", "5", "--width", "8", "--epochs", "1", "--out", str(tmp_path / "x.png")])
    printed = capsys.readouterr().out
    for text in (
        "default weights: 5 layers",
        "LSUV: 5 layers",
        "LSUV: 5 corrected",
        "activations over the training",
        "verdict",
        "validation accuracy",
        str(tmp_path / "x.png"),
        str(tmp_path / "x_activations.png"),
    ):
        assert text in printed, text
    table = printed.split("activations over the training")[1].split("validation accuracy")[0]
    assert [line.split()[0] for line in table.strip().splitlines()[2:]] == [
        "conv1",
        "act1",
        "conv2",
        "act2",
        "conv3",
        "act3",
        "conv4",
        "act4",
        "head",
    ]
    for name in ("x.png", "x_activations.png"):
        assert imread(tmp_path / name).shape[1] > 1000


@pytest.mark.parametrize(
    "args, says",
    [
        (["--depth", "2"], "from 3 to 1000"),
        (["--lr", "0"], "above 0"),
        (["--out", "x.jpg"], ".png"),
        (["--act", "step"], "invalid choice"),
        (["--epochs", "1.5"], "whole number"),
    ],
)
def test_a_wrong_argument_ends_it_at_once_in_one_line(args, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and says in err and len(err.strip().splitlines()) == 1


def test_its_first_line_is_its_own(tmp_path):
    "Not what fastai and PyTorch say to each other as they are imported."
    arguments = ["--depth", "3", "--width", "1", "--epochs", "1", "--out", tmp_path / "x.png"]
    done = subprocess.run(
        [sys.executable, "-m", "fastai_lsuv", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0] == "default weights: 3 layers, relu, fit_one_cycle(1, 0.001)"


@pytest.fixture
def two_threads():
    "The process has two threads, and has them again."
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("asked_for, threads", [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)], ids=["unasked", "asked"])
def test_a_process_of_its_own_has_one_thread_unless_asked_for_more(asked_for, threads, two_threads, monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "main", lambda: seen.append(torch.get_num_threads()))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in asked_for.items():
        monkeypatch.setenv(name, value)
    runpy.run_module("fastai_lsuv", run_name="__main__")
    assert seen == [threads]
