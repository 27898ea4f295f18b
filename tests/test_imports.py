"""Structure of the code: which imports are allowed, and how long functions and lines may be."""

import ast
import re

import pytest
from helpers import ROOT

COMMON = ("config", "device", "disk", "distributed", "run", "wandb_run", "metrics", "loop")
SCRIPTS = {"train_llm", "train_vqvae", "train_multimodal", "generate"}
LEAVES = {"model", "vqvae", "muon"}
MIDDLE = {"sampling", "multimodal", "image_metrics", "pretrained"}
PROJECT = {"common", "data", "tools"} | SCRIPTS | LEAVES | MIDDLE


def files(*patterns: str) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)
    )


# Globs, not `git ls-files`: the tests also run without git.
CODE = files("*.py", "common/**/*.py", "data/**/*.py", "tools/**/*.py")
TESTS = files("tests/**/*.py")
PAGES = files("*.md", "docs/*.md", ".github/**/*.md")
GENERATED = {"docs/LEADERBOARD.md"}


# ---- imports
def imports(path: str, source: str) -> list[str]:
    """Dotted names of the project's modules that a file imports, wherever the import stands."""
    package = path.rpartition("/")[0].replace("/", ".")
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = [package if node.level else "", node.module or ""]
            module = ".".join(part for part in parts if part)
            is_package = module in ("common", "data", "tools")
            names += [f"{module}.{a.name}" for a in node.names] if is_package else [module]
    return [name for name in names if name.split(".")[0] in PROJECT]


def forbidden_imports(path: str, source: str) -> list[str]:
    """The imports of a file that DESIGN's rules forbid."""
    folder, _, name = path.removesuffix(".py").rpartition("/")
    if folder == "common":
        lower = COMMON[: COMMON.index(name)] if name in COMMON else ()
        allowed = {f"common.{module}" for module in lower}
        return [module for module in imports(path, source) if module not in allowed]
    if folder == "data":
        allowed = {"common", "data"}
    elif folder == "tools":
        allowed = PROJECT
    elif name in LEAVES:
        allowed = set()
    else:
        allowed = {"common", "data"} | LEAVES | MIDDLE
    return [name for name in imports(path, source) if name.split(".")[0] not in allowed]


@pytest.mark.parametrize("path", CODE)
def test_modules_import_only_what_is_below_them(path):
    assert forbidden_imports(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "path, line, found",
    [
        ("model.py", "import common.config", "common.config"),
        ("vqvae.py", "from model import Llama", "model"),
        ("muon.py", "from data.text import Tokens", "data.text"),
        ("common/__init__.py", "from common.loop import trapezoid", "common.loop"),
        ("common/config.py", "from common.device import Clock", "common.device"),
        ("common/device.py", "from .metrics import Metrics", "common.metrics"),
        ("common/run.py", "from common import loop", "common.loop"),
        ("common/run.py", "from . import loop", "common.loop"),
        ("common/metrics.py", "from data.order import prefetch", "data.order"),
        ("common/loop.py", "import muon", "muon"),
        ("data/text.py", "from model import Llama", "model"),
        ("data/images.py", "import vqvae", "vqvae"),
        ("data/source.py", "from tools import bench", "tools.bench"),
        ("data/captions.py", "import train_vqvae", "train_vqvae"),
        ("sampling.py", "from generate import Config", "generate"),
        ("image_metrics.py", "from train_vqvae import main", "train_vqvae"),
        ("multimodal.py", "from tools import bench", "tools.bench"),
        ("train_llm.py", "from train_vqvae import Config", "train_vqvae"),
        ("train_vqvae.py", "import os, generate as g", "generate"),
        ("train_multimodal.py", "from tools.trials import compare", "tools.trials"),
        ("generate.py", "def f():\n    import train_llm", "train_llm"),
    ],
)
def test_a_forbidden_import_is_found(path, line, found):
    source = (ROOT / path).read_text()
    assert forbidden_imports(path, f"{source}\n{line}\n") == [found]


@pytest.mark.parametrize(
    "path, line",
    [
        ("common/loop.py", "from common.metrics import Metrics"),
        ("data/text.py", "from data.order import prefetch"),
        ("sampling.py", "from multimodal import ImageTextFormat"),
        ("train_llm.py", "from sampling import load_run"),
        ("tools/bench.py", "import train_llm"),
        ("model.py", "import torch"),
    ],
)
def test_an_allowed_import_is_not_reported(path, line):
    assert forbidden_imports(path, line) == []


def test_every_module_at_the_top_has_a_rule():
    top = {path.removesuffix(".py") for path in CODE if "/" not in path}
    assert top == SCRIPTS | LEAVES | MIDDLE


# ---- devices
def device_calls(path: str, source: str) -> list[str]:
    """The lines with device-specific calls in a file that must not have any."""
    if path in ("common/device.py", "tools/bench.py"):
        return []
    pattern = r"torch\.cuda|from torch import .*\bcuda\b"
    return [line for line in source.splitlines() if re.search(pattern, line)]


@pytest.mark.parametrize("path", CODE)
def test_device_specific_calls_are_in_one_module(path):
    assert device_calls(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("line", ["torch.cuda.synchronize()", "from torch import cuda"])
@pytest.mark.parametrize("path", ["model.py", "train_llm.py", "common/loop.py"])
def test_a_device_specific_call_is_found(path, line):
    assert device_calls(path, f"import torch\n{line}\n") == [line]


# ---- lengths
def long_functions(source: str) -> dict[str, int]:
    """{name: lines} of functions over 60 lines, or over 120 if they are called main."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    lengths = [(node.name, node.end_lineno - node.lineno + 1) for node in nodes]
    return {name: n for name, n in lengths if n > (120 if name == "main" else 60)}


@pytest.mark.parametrize("path", CODE)
def test_functions_are_short(path):
    assert long_functions((ROOT / path).read_text()) == {}


@pytest.mark.parametrize(
    "name, lines, is_long",
    [("f", 60, False), ("f", 61, True), ("main", 120, False), ("main", 121, True)],
)
@pytest.mark.parametrize("place", ["{}", "class A:\n{}"], ids=["function", "method"])
def test_a_long_function_is_found(name, lines, is_long, place):
    indent = " " if place.startswith("class") else ""
    function = f"{indent}def {name}():\n" + f"{indent} pass\n" * (lines - 1)
    assert long_functions(place.format(function)) == ({name: lines} if is_long else {})


def long_lines(path: str, source: str) -> list[str]:
    """The lines over 100 characters, except tables and URLs in Markdown."""
    exempt = re.compile(r"\||.*https?://") if path.endswith(".md") else re.compile(r"(?!)")
    return [line for line in source.splitlines() if len(line) > 100 and not exempt.match(line)]


@pytest.mark.parametrize("path", [p for p in CODE + TESTS + PAGES if p not in GENERATED])
def test_lines_have_at_most_100_characters(path):
    assert long_lines(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "path, start, length, is_long",
    [
        ("model.py", "x", 100, False),
        ("model.py", "x", 101, True),
        ("model.py", "| ", 101, True),
        ("model.py", "# https://x", 101, True),
        ("README.md", "x", 101, True),
        ("README.md", "| ", 101, False),
        ("README.md", "[a](https://x", 101, False),
    ],
)
def test_a_long_line_is_found(path, start, length, is_long):
    line = start.ljust(length, "x")
    assert long_lines(path, f"short\n{line}\n") == ([line] if is_long else [])
