"""Structure of the code: which imports are allowed, and how long functions and lines may be."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

COMMON = ("config", "device", "distributed", "run", "metrics", "loop")
SCRIPTS = {"train_llm", "train_vqvae", "train_multimodal", "generate"}
LEAVES = {"model", "vqvae", "muon"}
MIDDLE = {"sampling", "multimodal", "image_metrics"}
PROJECT = {"common", "data", "tools"} | SCRIPTS | LEAVES | MIDDLE

TRACKED = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
PYTHON = [path for path in TRACKED if path.endswith(".py")]
CODE = [path for path in PYTHON if not path.startswith("tests/")]
PAGES = [
    path
    for path in TRACKED
    if path.endswith(".md")
    and not path.startswith("docs/records/")
    and path not in ("docs/LOG.md", "docs/LEADERBOARD.md")
]


def imports(source: str) -> list[str]:
    """Dotted names of the project's modules that a source imports, wherever the import stands."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = node.module in ("common", "data", "tools")
            names += [f"{node.module}.{a.name}" for a in node.names] if package else [node.module]
    return [name for name in names if name.split(".")[0] in PROJECT]


def forbidden(path: str, source: str) -> list[str]:
    """The imports of a file that DESIGN's rules forbid."""
    folder, _, name = path.removesuffix(".py").rpartition("/")
    if folder == "common":
        lower = [f"common.{module}" for module in COMMON[: COMMON.index(name)]]
        return [module for module in imports(source) if module not in lower]
    if folder == "data":
        allowed = {"common", "data"}
    elif folder == "tools":
        allowed = PROJECT
    elif name in LEAVES:
        allowed = set()
    else:
        allowed = {"common", "data"} | LEAVES | MIDDLE
    return [module for module in imports(source) if module.split(".")[0] not in allowed]


@pytest.mark.parametrize("path", [path for path in CODE if not path.endswith("__init__.py")])
def test_modules_import_only_what_is_below_them(path):
    assert forbidden(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "path, line",
    [
        ("model.py", "import common.config"),
        ("vqvae.py", "from model import Llama"),
        ("muon.py", "from data.text import Tokens"),
        ("common/config.py", "from common.device import Clock"),
        ("common/run.py", "from common import loop"),
        ("common/metrics.py", "from data.order import prefetch"),
        ("data/text.py", "from model import Llama"),
        ("data/images.py", "import vqvae"),
        ("sampling.py", "from generate import Config"),
        ("multimodal.py", "from tools import bench"),
        ("train_llm.py", "from train_vqvae import Config"),
        ("generate.py", "def f():\n    import train_llm"),
        ("train_multimodal.py", "from tools.trials import compare"),
    ],
)
def test_a_forbidden_import_is_found(path, line):
    source = (ROOT / path).read_text()
    assert len(forbidden(path, f"{source}\n{line}\n")) == 1


@pytest.mark.parametrize("path", CODE)
def test_device_specific_calls_are_in_one_module(path):
    uses = "torch.cuda" in (ROOT / path).read_text()
    assert not uses or path in ("common/device.py", "tools/bench.py")


@pytest.mark.parametrize("path", CODE)
def test_functions_are_short(path):
    functions = [
        node
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    too_long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in functions
        if node.end_lineno - node.lineno + 1 > (120 if node.name == "main" else 60)
    }
    assert too_long == {}


@pytest.mark.parametrize("path", PYTHON + PAGES)
def test_lines_have_at_most_100_characters(path):
    lines = (ROOT / path).read_text().splitlines()
    is_page = path.endswith(".md")
    long = [line for line in lines if len(line) > 100]
    assert [line for line in long if not (is_page and re.match(r"\||.*https?://", line))] == []


def test_the_rules_cover_every_module_at_the_top():
    top = {Path(path).stem for path in CODE if "/" not in path}
    assert top == SCRIPTS | LEAVES | MIDDLE
