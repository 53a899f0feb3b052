"""`python -m fastai_lsuv`: what it prints and draws, and what it says to wrong arguments."""

import pytest
from matplotlib.image import imread

from fastai_lsuv.demo import main


def test_both_runs_are_shown_side_by_side(tmp_path, capsys):
    main(["--depth", "5", "--width", "8", "--epochs", "1", "--out", str(tmp_path / "x.png")])
    printed = capsys.readouterr().out
    for text in (
        "default weights: 5 layers",
        "LSUV: 5 layers",
        "LSUV: 5 of 5 layers right",
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
