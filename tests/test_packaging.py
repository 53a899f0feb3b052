"""What is in the wheel and in the sdist, and that CITATION.cff speaks of this version."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastai_lsuv

ROOT = Path(__file__).parent.parent
VERSION = fastai_lsuv.__version__


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "Both, built from this folder."
    path = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", path], cwd=ROOT, capture_output=True, check=True)
    return path


def files(*folders):
    "What git would keep of these folders."
    found = (p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file())
    return {p.relative_to(ROOT).as_posix() for p in found if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}


def test_the_wheel_is_the_package_and_nothing_else(dist):
    names = set(zipfile.ZipFile(dist / f"fastai_lsuv-{VERSION}-py3-none-any.whl").namelist())
    info = {n for n in names if n.startswith(f"fastai_lsuv-{VERSION}.dist-info/")}
    assert names - info == files("fastai_lsuv") and "fastai_lsuv/py.typed" in names
    assert {n.split("/", 1)[1] for n in info} == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}


def test_the_sdist_has_what_its_tests_need(dist):
    with tarfile.open(dist / f"fastai_lsuv-{VERSION}.tar.gz") as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames()}
    alone = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "llms.txt", "pyproject.toml"}
    alone |= {".gitignore"}
    assert files("fastai_lsuv", "tests", "nbs", "docs") | alone <= names
    assert {n.split("/")[0] for n in names} == {"fastai_lsuv", "tests", "nbs", "docs", "PKG-INFO"} | alone


def test_what_the_wheel_holds_imports(dist, tmp_path):
    zipfile.ZipFile(next(dist.glob("*.whl"))).extractall(tmp_path)
    code = "import fastai_lsuv; print(fastai_lsuv.__version__, fastai_lsuv.__file__)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [VERSION, str(tmp_path / "fastai_lsuv" / "__init__.py")]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", text, re.M)[1] == VERSION and "arXiv:1511.06422" in text
