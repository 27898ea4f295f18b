"""Finding, naming and refusing run folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import MODULES, flags_of, script, train, train_stage

import generate
import train_llm
import train_multimodal
import train_vqvae
from common.config import UserError, flatten, load_config, saved_config
from common.disk import building
from common.run import check_run, find_run, git_state
from pretrained import read_pretrained

COMMIT = "b2c9ea088fbf532d035815d6a8d86331bb2d90cc"


def run_of_an_earlier_version(name: str) -> None:
    """A run folder as commit b2c9ea0 left it: its config names no stage."""
    (Path("runs") / name / "checkpoints/0000010").mkdir(parents=True)
    config = {"run": name, "tokens": 2560, "model": {"d_model": 32, "affixes": 512}}
    Path(f"runs/{name}/config.yaml").write_text(yaml.safe_dump(config))
    Path(f"runs/{name}/env.json").write_text(json.dumps({"commit": COMMIT}))


EARLIER = (
    "error: runs/old was made by an earlier version of this code "
    f"(commit {COMMIT}); use that version, or train again under another --run"
)


@pytest.mark.parametrize(
    "command",
    [
        ["train_llm.py", "--run", "old", "--resume"],
        ["train_vqvae.py", "--run", "old", "--resume"],
        ["train_multimodal.py", "--run", "old", "--resume"],
        ["train_multimodal.py", "--vqvae", "old", *flags_of(train_multimodal)],
        ["generate.py", "old", "--prompt", "x"],
        ["generate.py", "runs/old/checkpoints/0000010", "--prompt", "x"],
        ["-m", "tools.score_images", "old"],
    ],
    ids=lambda command: " ".join(command)[:50],
)
def test_a_run_of_an_earlier_version_is_one_line_that_names_its_commit(workdir, command):
    run_of_an_earlier_version("old")
    done = script(*command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [EARLIER]


def test_the_newest_run_is_named_even_if_an_earlier_version_made_it(workdir):
    run_of_an_earlier_version("old")
    done = script("generate.py", "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["newest run: runs/old", EARLIER]


def test_a_language_model_of_an_earlier_version_is_refused_as_initial_weights(workdir):
    run_of_an_earlier_version("old")
    with pytest.raises(UserError, match=f"runs/old was made by an earlier version.*{COMMIT}"):
        read_pretrained("old")


def test_a_run_made_outside_git_is_refused_too(workdir):
    run_of_an_earlier_version("old")
    Path("runs/old/env.json").unlink()
    with pytest.raises(UserError, match="earlier version of this code \\(unknown commit\\)"):
        saved_config(Path("runs/old"))


# ---- settings and stages
@pytest.fixture
def run_a(workdir):
    """The folder of a short run of train_llm.py, made at COMMIT according to its env.json."""
    train(run="a", tokens=256)
    run = Path("runs/a")
    env = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(env | {"commit": COMMIT}))
    return run


def add_setting(run: Path, group: str | None, key: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (config[group] if group else config)[key] = 15.0
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("group, key", [("model", "softcap"), ("data", "pack"), (None, "swa")])
def test_an_unknown_setting_of_a_run_to_resume_is_named_with_the_commit(run_a, group, key):
    add_setting(run_a, group, key)
    name = f"{group}.{key}" if group else key
    message = f"^runs/a/config.yaml sets {name}, which this version does not support; .*{COMMIT}"
    with pytest.raises(UserError, match=message):
        load_config(train_llm.Config, ["--run", "a", "--resume"])


def test_an_unknown_model_setting_of_a_run_to_generate_from_is_named_with_the_commit(run_a):
    add_setting(run_a, "model", "softcap")
    message = f"^runs/a/config.yaml sets .*softcap, which this version does not support; .*{COMMIT}"
    with pytest.raises(UserError, match=message):
        generate.main(load_config(generate.Config, ["a", "--prompt", "x"]))


@pytest.mark.parametrize("module", [train_vqvae, train_multimodal])
def test_a_run_cannot_be_resumed_by_the_script_of_another_stage(run_a, module):
    with pytest.raises(UserError, match="runs/a is of stage llm; resume it with train_llm.py"):
        load_config(module.Config, ["--run", "a", "--resume"])


def test_the_saved_config_has_every_auto_filled_in(run_a):
    assert [key for key, value in flatten(saved_config(run_a)).items() if value == "auto"] == []


@pytest.mark.parametrize("stage", ["llm", "vqvae"])
def test_the_saved_config_names_its_stage(workdir, stage):
    train_stage(MODULES[stage], run="a")
    assert saved_config(Path("runs/a"))["stage"] == stage


@pytest.mark.parametrize("stage", MODULES)
def test_an_unnamed_run_is_named_after_its_stage(workdir, stage):
    cfg = MODULES[stage].Config()
    check_run(cfg)
    assert cfg.run.startswith(f"{stage}-20")


# ---- finding a run
@pytest.fixture
def two_runs(workdir):
    train(run="a", tokens=256)
    train(run="b", tokens=256)
    for checkpoint in Path("runs/b/checkpoints").iterdir():
        os.utime(checkpoint, (1, 1))


@pytest.mark.parametrize("name", ["a", "runs/a", "runs/a/checkpoints/0000002"])
def test_a_run_is_found_by_name_folder_or_checkpoint(two_runs, name):
    run, checkpoint, config = find_run(name)
    assert (run, checkpoint) == (Path("runs/a"), Path("runs/a/checkpoints/0000002"))
    assert config["run"] == "a"


def test_without_a_name_the_newest_run_is_found(two_runs, capsys):
    assert find_run("")[0] == Path("runs/a")
    assert "newest run: runs/a" in capsys.readouterr().err


def test_an_unknown_run_lists_the_existing_ones(two_runs):
    with pytest.raises(UserError, match="there is no run 'c'; existing runs: a, b"):
        find_run("c")


def test_a_folder_without_a_checkpoint_is_refused(two_runs):
    with pytest.raises(UserError, match="runs has no checkpoint"):
        find_run("runs")


def test_without_any_run_the_remedy_is_to_train_one(workdir):
    with pytest.raises(UserError, match="there is no run in runs/ yet; train one first"):
        find_run("")


# ---- folders of the cache
def fill(tmp: Path) -> None:
    (tmp / "file").write_text("whole")


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_is_built_once(workdir):
    folder = Path("cache/x/y")
    with building(folder) as tmp:
        assert not folder.exists()
        fill(tmp)
    with building(folder) as tmp:
        assert tmp is None
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_folder_whose_building_fails_does_not_exist(workdir):
    with pytest.raises(KeyboardInterrupt), building(Path("cache/x")) as tmp:
        fill(tmp)
        raise KeyboardInterrupt
    assert not [path for path in Path("cache").iterdir() if path.is_dir()]


def test_a_folder_is_built_although_another_process_is_suspended_in_building_it(workdir):
    """Process 1 holds the lock and does not go on before process 2 has ended."""
    code = (
        "from pathlib import Path; import common.disk as disk; disk.PATIENCE = 0.1\n"
        "with disk.building(Path('cache/x')) as tmp: (tmp / 'file').write_text('whole')"
    )
    with building(Path("cache/x")) as tmp:
        done = script("-c", code)
        assert done.returncode == 0, done.stderr
        assert "waiting for another process that is preparing cache/x" in done.stdout
        fill(tmp)
    assert Path("cache/x/file").read_text() == "whole"
    assert not list(Path("cache").glob(".*.tmp"))


def test_what_a_dead_process_left_is_removed_and_what_a_live_one_builds_is_not(workdir):
    dead, live = (Path(f"cache/.x.{pid}.tmp") for pid in (dead_process(), os.getppid()))
    dead.mkdir(parents=True)
    live.mkdir()
    with building(Path("cache/x")) as tmp:
        fill(tmp)
    assert (dead.exists(), live.exists()) == (False, True)


def test_reading_the_commit_writes_nothing_into_the_checkout(tmp_path, monkeypatch):
    """A killed `git status` that refreshes the index would leave .git/index.lock behind."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@example.org"]
    (tmp_path / "a.py").write_text("1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    os.utime(tmp_path / "a.py", (1, 1))  # so that git would refresh the index
    index = (tmp_path / ".git/index").read_bytes()
    monkeypatch.setattr("common.run.ROOT", tmp_path)
    assert git_state()["dirty"] is False
    assert (tmp_path / ".git/index").read_bytes() == index


@pytest.mark.parametrize(
    "file, dirty",
    [("b.py", True), ("common/b.py", True), ("data/b.py", True), ("exports/a/model.py", False)],
)
def test_code_is_dirty_if_a_file_that_its_hash_covers_is_not_committed(
    tmp_path, monkeypatch, file, dirty
):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr("common.run.ROOT", tmp_path)
    before = git_state()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("1\n")
    after = git_state()
    assert (before["dirty"], after["dirty"]) == (False, dirty)
    assert (before["code_sha256"] != after["code_sha256"]) is dirty
