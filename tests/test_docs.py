"""The commands in the documentation are understood by the scripts that they call."""

import re
import shlex
from types import SimpleNamespace

import pytest
from helpers import ROOT

import generate
import train_llm
import train_multimodal
import train_vqvae
from common.config import UserError, load_config
from tools import bench, record, score_images

SCRIPTS = {
    "train_llm.py": train_llm,
    "train_vqvae.py": train_vqvae,
    "train_multimodal.py": train_multimodal,
    "generate.py": generate,
    "-m tools.bench": bench,
    "-m tools.score_images": score_images,
    "-m tools.record trials": SimpleNamespace(Config=record.TrialsConfig),
}
NAMES = "|".join(map(re.escape, SCRIPTS))
COMMAND = re.compile(rf"python ({NAMES})(?!\")((?:[^\n`#|\\]|\\+\n)*)")
PAGES = [
    "README.md",
    "README_Multimodal.md",
    "docs/SETUP_INSTRUCTIONS.md",
    "docs/CONTRIBUTING.md",
    "Makefile",
    *[name for name in SCRIPTS if name.endswith(".py")],
    "tools/bench.py",
    "tools/score_images.py",
    "tools/record.py",
]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of every command in a page."""
    text = re.sub(r"\$\(if .*?--resume\)", "", text.replace("$(PY)", "python"))  # the Makefile's
    found = COMMAND.findall(text)
    return [(name, shlex.split(re.sub(r"\\+\n", " ", rest))) for name, rest in found]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_commands_and_the_scripts_understand_them(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands((ROOT / page).read_text())
    assert found, f"{page} has no command"
    for name, arguments in found:
        words = [word for word in arguments if word not in ("--resume", "--help")]
        load_config(SCRIPTS[name].Config, words)


def test_a_wrong_flag_in_a_command_would_be_found():
    ((name, arguments),) = commands("    python train_llm.py --tokns 20M --run first  # a comment")
    with pytest.raises(UserError, match="tokns"):
        load_config(SCRIPTS[name].Config, arguments)


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
