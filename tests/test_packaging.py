"""Requirements, their documentation, and what the make targets install."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, script

FILES = ("requirements.txt", "requirements-extra.txt", "requirements-dev.txt")
DOCS = (ROOT / "docs/DEPENDENCIES.md").read_text()


def requirements(file: str) -> list[str]:
    """The requirements in a file, without comments and references to other files."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("-r ")]


def package(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def documented(file: str) -> list[str]:
    """The packages in the table that follows a file's heading in docs/DEPENDENCIES.md."""
    section = DOCS.partition(f"## {file}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\S+) \| \S.* \| \S.* \|$", section, flags=re.M)
    return [row for row in rows if row not in ("package", "---")]


# ---- requirement files
@pytest.mark.parametrize("requirement", [line for file in FILES for line in requirements(file)])
def test_a_requirement_is_pinned_exactly(requirement):
    assert re.fullmatch(r"[\w-]+(\[\w+\])?==\d+(\.\d+)+", requirement)


def test_no_package_is_in_two_files():
    names = [
        package(line).lower().replace("_", "-") for file in FILES for line in requirements(file)
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("file", FILES[1:])
def test_the_other_files_include_the_training_requirements(file):
    assert "-r requirements.txt" in (ROOT / file).read_text().splitlines()


@pytest.mark.parametrize("file", FILES)
def test_every_requirement_is_documented_and_nothing_else(file):
    assert documented(file) == [package(line) for line in requirements(file)]


# ---- make
PIP = """
Collecting torch==2.13.0 (from -r requirements.txt (line 1))
  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (900.1 MB)
Requirement already satisfied: tqdm
Collecting PyYAML (from transformers)
  Downloading PyYAML-6.0.3-cp311-cp311-manylinux_2_28_x86_64.whl (770 kB)
Processing /wheels/numpy-2.4.6.whl (from -r requirements.txt (line 2))
Installing collected packages: numpy, torch
Successfully installed numpy-2.4.6 torch-2.13.0
"""
PROGRESS = """\
  torch==2.13.0
  downloading torch-2.13.0 (900.1 MB)
  PyYAML
  numpy-2.4.6.whl
  installing them
"""
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip install "*) cat pip.log; for last; do :; done; [ "$last" != "$FAILING" ] ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a copy of the Makefile whose Python only pretends to install packages.

    Installing the requirements file `failing` fails.
    """
    for file in ("Makefile", *FILES):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "pip.log").write_text(PIP.lstrip())
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON.format(python=sys.executable))
    fake.chmod(0o755)

    def run(*args: str, failing: str = "none") -> subprocess.CompletedProcess:
        inherited = ("MAKEFLAGS", "MAKELEVEL")  # the tests may run under make themselves
        env = {name: value for name, value in os.environ.items() if name not in inherited}
        command = ["make", f"PYTHON={fake}", *args]
        return subprocess.run(
            command, cwd=tmp_path, env=env | {"FAILING": failing}, capture_output=True, text=True
        )

    return run


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


INSTALLS = [("setup", "requirements-dev.txt"), ("extra", "requirements-extra.txt")]


@needs_make
@pytest.mark.parametrize("target, file", INSTALLS)
def test_an_installation_prints_a_line_per_package(make, target, file):
    result = make(target)
    assert result.returncode == 0
    assert result.stdout.rpartition(file)[2].partition("\n")[2] == PROGRESS


@needs_make
@pytest.mark.parametrize("target, file", INSTALLS)
def test_an_installation_that_fails_stops_make_and_is_repeated(make, target, file):
    assert make(target, failing=file).returncode != 0
    assert PROGRESS in make(target).stdout


@needs_make
@pytest.mark.parametrize("target, file", INSTALLS)
def test_what_is_installed_is_not_installed_again(make, target, file):
    make(target)
    assert PROGRESS not in make(target).stdout


@needs_make
@pytest.mark.parametrize(
    "target", ["setup", "demo", "demo-images", "cifar", "test", "lint", "check"]
)
def test_no_target_of_the_core_installs_extras(make, target):
    plan = make("--dry-run", target).stdout
    assert "-r requirements-dev.txt" in plan
    assert "requirements-extra.txt" not in plan


@needs_make
@pytest.mark.parametrize("target", ["extra", "eval", "test-extra", "test-browser"])
def test_a_target_that_needs_extras_installs_them(make, target):
    assert "-r requirements-extra.txt" in make("--dry-run", target).stdout


@needs_make
def test_make_eval_passes_the_run_and_the_options(make):
    plan = make("--dry-run", "eval", "RUN=demo", "ARGS=--limit 10").stdout
    assert "-m tools.evaluate demo --limit 10\n" in plan


@needs_make
def test_make_cifar_reads_the_source_and_resumes_the_stages_that_have_begun(make, tmp_path):
    def stages() -> list[str]:
        plan = make("--dry-run", "cifar", "SOURCE=my images").stdout
        lines = [line for line in plan.splitlines() if "train_" in line or "score_images" in line]
        assert ['--data.source "my images"' in line for line in lines] == [True, True, False]
        return ["--resume" in line for line in lines]

    assert stages() == [False, False, False]
    (tmp_path / "runs/cifar-vqvae").mkdir(parents=True)
    assert stages() == [True, False, False]
    (tmp_path / "runs/cifar").mkdir()
    assert stages() == [True, True, False]


# ---- markers
def test_make_test_runs_no_test_that_needs_extras(tmp_path):
    """A copy of this project's settings, with a test of each kind."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    names = ("extra", "browser", "faults", "slow")
    marked = [f"@pytest.mark.{name}\ndef test_{name}():\n    pass\n" for name in names]
    (tmp_path / "tests/test_kinds.py").write_text("import pytest\n\n" + "\n".join(marked))
    result = script("-m", "pytest", "--collect-only", "--numprocesses=0", cwd=tmp_path)
    assert re.findall(r"::(\w+)", result.stdout) == ["test_slow"]
