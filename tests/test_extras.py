"""Nothing but the tools that need an extra package imports one, and they say how to install it."""

import ast
import re
import sys

import pytest
from helpers import ROOT, script
from test_packaging import package, requirements

from common.config import UserError
from tools.extras import require

CODE = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "common/*.py", "data/*.py", "tools/*.py")
    for path in ROOT.glob(pattern)
)
PROJECT = {path.removesuffix(".py").partition("/")[0] for path in CODE}
MODULES = {"pillow": "PIL", "PyYAML": "yaml"}  # where the name differs
# required by a package of requirements.txt, docs/DEPENDENCIES.md
INDIRECT = {"huggingface_hub", "tokenizers", "pyarrow"}


def modules(file: str) -> list[str]:
    """The modules of the packages in a requirements file."""
    names = [package(line) for line in requirements(file)]
    return [MODULES.get(name, name.replace("-", "_")) for name in names]


EXTRAS = modules("requirements-extra.txt")
ALLOWED = {*sys.stdlib_module_names, *PROJECT, *INDIRECT, *modules("requirements.txt")}


# ---- require
def test_require_returns_a_module_that_is_installed():
    assert require("json.decoder") is sys.modules["json.decoder"]


@pytest.mark.parametrize("name", ["package_that_is_missing", "package_that_is_missing.part"])
def test_require_names_a_missing_package_and_how_to_install_it(name):
    message = (
        "package_that_is_missing is not installed; "
        "run make extra, or pip install -r requirements-extra.txt"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        require(name)


@pytest.mark.parametrize(
    "content, error",
    [
        ("import package_that_is_missing", ModuleNotFoundError),
        ("from json import name_that_is_missing", ImportError),
        ("raise RuntimeError", RuntimeError),
    ],
)
def test_an_error_inside_an_installed_package_is_not_disguised(
    tmp_path, monkeypatch, content, error
):
    (tmp_path / "damaged.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error):
        require("damaged")


# ---- imports
def imported(source: str) -> set[str]:
    """The top-level names of the modules that a file imports, wherever the import stands."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    parts = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    return {name.partition(".")[0] for name in plain + parts}


@pytest.mark.parametrize("path", [path for path in CODE if not path.startswith("tools/")])
def test_the_core_imports_only_packages_of_requirements_txt(path):
    assert imported((ROOT / path).read_text()) - ALLOWED == set()


@pytest.mark.parametrize(
    "line, found",
    [
        ("import gradio as gr", {"gradio"}),
        ("def f():\n    from lm_eval.models import huggingface", {"lm_eval"}),
        ("import torch, starlette.responses", {"starlette"}),
        ("from PIL import Image\nfrom . import config", set()),
    ],
)
def test_an_import_of_an_extra_is_found(line, found):
    assert imported(line) - ALLOWED == found


# ---- without the extras
HIDE = f"""
import runpy, sys
from importlib import import_module
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
def find_all_but_extras(name, *args):
    return None if name.partition(".")[0] in {EXTRAS} else find_spec(name, *args)
PathFinder.find_spec = staticmethod(find_all_but_extras)
"""


def without_extras(code: str, **kwargs):
    """Run code in a process in which the extra packages do not exist."""
    return script("-c", HIDE + code, **kwargs)


def test_every_module_can_be_imported_without_the_extras():
    names = [path.removesuffix(".py").replace("/", ".") for path in CODE]
    names = [name.removesuffix(".__init__") for name in names]
    done = without_extras(f"for name in {names}: print(import_module(name).__name__)")
    assert done.stdout.split() == names, done.stderr


@pytest.mark.parametrize("name", EXTRAS)
def test_the_extras_are_hidden_from_these_tests(name):
    done = without_extras(f"import {name}")
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


@pytest.mark.parametrize("tool, package", [("evaluate", "lm_eval"), ("playground", "gradio")])
def test_a_tool_without_its_package_prints_one_line(tool, package, tmp_path):
    run = f"runpy.run_module('tools.{tool}', run_name='__main__', alter_sys=True)"
    done = without_extras(f"sys.argv = ['']\n{run}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: {package} is not installed; run make extra.*\n", done.stderr)
