"The code is as tidy as `pyproject.toml` asks for, and the tests can be told by their names."

import re
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


def test_no_name_of_a_test_is_another_in_another_process(request):
    "As an address would make it; pytest-xdist needs the same names in all of its processes."
    assert not [item.nodeid for item in request.session.items if re.search(r"\bat 0x[0-9a-f]+", item.nodeid)]
