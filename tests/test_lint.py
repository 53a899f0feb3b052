"The code is as tidy as `pyproject.toml` asks for."

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "tool", [["ruff", "check", "--no-cache", "--quiet", "."], ["mypy", "--no-error-summary"]], ids=lambda t: t[0]
)
def test_nothing_to_complain_about(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
