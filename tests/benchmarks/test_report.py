"""The report writes what it counts, and says so where it has nothing to measure on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")


def report(*args):
    command = [sys.executable, "tests/benchmarks/report.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = report("--device", "cuda")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["--device cuda: PyTorch finds no NVIDIA GPU"]


def test_the_counts_on_the_page_are_those_of_today():
    written = re.search(r"<!-- counts: .*? -->\n(.*?)<!-- end of counts -->", PAGE, flags=re.S)[1]
    if f"PyTorch {torch.__version__.partition('+')[0]};" not in written:
        pytest.skip("counted with another PyTorch")
    assert report("--only", "counts", "--dry").stdout.endswith(written)


@pytest.mark.parametrize("block", ["costs", "depth", "recording", "costs on a GPU", "recording on a GPU"])
def test_no_number_without_its_device(block):
    text = re.search(rf"<!-- {block}: .*? -->\n(.*?)<!-- end of {block} -->", PAGE, flags=re.S)[1]
    assert ("on a gpu" if block.endswith("GPU") else "on a cpu") in text.lower()
