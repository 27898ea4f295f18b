"""The commands in the documentation are understood by the scripts that they call."""

import ast
import re
import shlex

import pytest
from helpers import ROOT

import generate
import train_llm
import train_multimodal
import train_vqvae
from common.config import UserError, load_config
from tools import bench, evaluate, export_hf, ladder, playground, record, scaling, score_images

CONFIGS = {
    "train_llm.py": train_llm.Config,
    "train_vqvae.py": train_vqvae.Config,
    "train_multimodal.py": train_multimodal.Config,
    "generate.py": generate.Config,
    "-m tools.bench": bench.Config,
    "-m tools.export_hf": export_hf.Config,
    "-m tools.evaluate": evaluate.Config,
    "-m tools.playground": playground.Config,
    "-m tools.score_images": score_images.Config,
    "-m tools.record trials": record.TrialsConfig,
    "-m tools.ladder train": ladder.TrainConfig,
    "-m tools.ladder report": ladder.ReportConfig,
}
# Commands without a config class; `python -m pytest` and the like are not the project's.
OTHERS = {f"-m tools.record {name}" for name in ("compare", "submit", "check", "publish")}
FOREIGN = {"-m pytest", "-m ruff", "-m pip"}

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "Makefile", "*.py", "tools/*.py")
    for path in ROOT.glob(pattern)
)
HISTORY = {"docs/LOG.md", "docs/LEADERBOARD.md"}  # commands of their time
WITHOUT_COMMANDS = {
    "docs/DEPENDENCIES.md",
    "docs/RELIABILITY.md",
    "image_metrics.py",
    "model.py",
    "multimodal.py",
    "muon.py",
    "pretrained.py",
    "sampling.py",
    "vqvae.py",
    "tools/classifier.py",
    "tools/extras.py",
    "tools/leaderboard.py",
    "tools/modeling_blueberry.py",
    "tools/shapes_checker.py",
    "tools/trials.py",
}
COMMAND = re.compile(r"python ((?:-m |\w+\.py)(?:[^\n`#|\\]|\\\n)*)")


def page_text(page: str) -> str:
    """The text of a page: of a Python file its docstring, of the Makefile what make would run."""
    text = (ROOT / page).read_text()
    if page.endswith(".py"):
        return ast.get_docstring(ast.parse(text)) or ""
    return re.sub(r"\$\(if .*?--resume\)|\$\(ARGS\)", "", text.replace("$(PY)", "python"))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(program, arguments) of every command in a text that starts with `python`."""
    split = [shlex.split(command.replace("\\\n", " ")) for command in COMMAND.findall(text)]
    found = []
    for words in split:
        is_command = {*words[1:2]} & {"tools.record", "tools.ladder"}
        n = 3 if is_command else 2 if words[0] == "-m" else 1
        found.append((" ".join(words[:n]), words[n:]))
    return found


def check_command(program: str, arguments: list[str]) -> None:
    """Raises UserError or exits if a program does not understand its arguments."""
    words = [word for word in arguments if word != "--help"]
    if program in CONFIGS:
        load_config(CONFIGS[program], words)
    elif program == "-m tools.record submit":
        record.submit_options([*words, "--who", "me"])
    elif program == "-m tools.scaling":
        scaling.parse(words)
    elif program in OTHERS:
        assert program.endswith("compare") == ("--" in words)
    else:
        assert program in FOREIGN, f"there is no program {program}"


@pytest.mark.parametrize("page", [p for p in PAGES if p not in HISTORY | WITHOUT_COMMANDS])
def test_a_page_has_commands_and_the_scripts_understand_them(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(page_text(page))
    assert found, f"{page} has no command; list it in WITHOUT_COMMANDS if that is right"
    for program, arguments in found:
        check_command(program, arguments)


@pytest.mark.parametrize("page", sorted(WITHOUT_COMMANDS))
def test_a_page_listed_as_having_no_commands_has_none(page):
    assert page in PAGES
    assert commands(page_text(page)) == []


@pytest.mark.parametrize(
    "line, error",
    [
        ("    python train_llm.py --tokns 20M --run first  # a comment", UserError),
        ("`python generate.py demo --prompts x`", UserError),
        ("    python -m tools.record trials --tokns 20M", UserError),
        ("    python -m tools.record submit name --rns a", SystemExit),
        ("    python -m tools.record compare a b", AssertionError),
        ("    python -m tools.records check", AssertionError),
        ("    .venv/bin/python train.py --tokens 20M", AssertionError),
    ],
)
def test_a_wrong_command_is_noticed(line, error):
    ((program, arguments),) = commands(line)
    with pytest.raises(error):
        check_command(program, arguments)


def test_a_command_over_two_lines_is_read_whole():
    ((_, arguments),) = commands("python generate.py demo \\\n    --prompt 'a b'\n")
    assert arguments == ["demo", "--prompt", "a b"]


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_links_to_files_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if "://" not in link and not (folder / link).exists()] == []


README = (ROOT / "README.md").read_text()
FILES = set(re.findall(r"[\w/]+\.(?:py|yaml|md)", README)) - {"FILE.yaml"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_named_in_the_readme_exist(name):
    assert (ROOT / name).exists()


def named_tests() -> list[tuple[str, str]]:
    text = (ROOT / "docs/RELIABILITY.md").read_text()
    return re.findall(r"`(test_\w+): (\w+)`", text)


@pytest.mark.parametrize("file, name", named_tests())
def test_a_promise_names_a_test_that_exists(file, name):
    assert f"def test_{name}(" in (ROOT / "tests" / f"{file}.py").read_text()
