"""Finding, naming and refusing run folders."""

import json
import os
from pathlib import Path

import pytest
import yaml
from helpers import MODULES, flags_of, script, train, train_stage

import generate
import train_llm
import train_multimodal
import train_vqvae
from common.config import UserError, load_config, saved_config
from common.run import check_run, find_run

COMMIT = "b2c9ea088fbf532d035815d6a8d86331bb2d90cc"


def run_of_an_earlier_version(name: str) -> None:
    """A run folder as commit b2c9ea0 left it: its config names no stage."""
    (Path("runs") / name / "checkpoints/0000010").mkdir(parents=True)
    config = {"run": name, "tokens": 2560, "model": {"d_model": 32, "affixes": 512}}
    Path(f"runs/{name}/config.yaml").write_text(yaml.safe_dump(config))
    Path(f"runs/{name}/env.json").write_text(json.dumps({"commit": COMMIT}))


@pytest.mark.parametrize(
    "command",
    [
        ["train_llm.py", "--run", "old", "--resume"],
        ["train_vqvae.py", "--run", "old", "--resume"],
        ["train_multimodal.py", "--run", "old", "--resume"],
        ["train_multimodal.py", "--vqvae", "old", *flags_of(train_multimodal)],
        ["generate.py", "old", "--prompt", "x"],
        ["generate.py", "--prompt", "x"],
        ["-m", "tools.score_images", "old"],
    ],
    ids=lambda command: " ".join(command)[:50],
)
def test_a_run_of_an_earlier_version_is_one_line_that_names_its_commit(workdir, command):
    run_of_an_earlier_version("old")
    done = script(*command)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: runs/old was made by an earlier version of this code, ")
    assert COMMIT in line
    assert "Traceback" not in done.stderr


def test_a_run_made_outside_git_is_refused_too(workdir):
    run_of_an_earlier_version("old")
    Path("runs/old/env.json").unlink()
    with pytest.raises(UserError, match="earlier version of this code, outside a git checkout"):
        saved_config(Path("runs/old"))


@pytest.mark.parametrize("group, key", [("model", "softcap"), (None, "swa")])
def test_a_setting_that_this_version_does_not_know_is_named_with_the_commit(workdir, group, key):
    train(run="a", tokens=256)
    path = Path("runs/a/config.yaml")
    config = yaml.safe_load(path.read_text())
    (config[group] if group else config)[key] = 15.0
    path.write_text(yaml.safe_dump(config))
    commit = json.loads(Path("runs/a/env.json").read_text())["commit"]
    with pytest.raises(UserError, match=f"{key}, which this version does not know; .*{commit}"):
        load_config(train_llm.Config, ["--run", "a", "--resume"])


def test_a_model_setting_that_this_version_does_not_know_stops_generate(workdir):
    train(run="a", tokens=256)
    path = Path("runs/a/config.yaml")
    path.write_text(path.read_text().replace("model:\n", "model:\n  softcap: 15.0\n"))
    with pytest.raises(UserError, match="softcap, which this version does not know"):
        generate.main(load_config(generate.Config, ["a", "--prompt", "x"]))


def test_a_run_cannot_be_resumed_by_the_script_of_another_stage(workdir):
    train(run="a", tokens=256)
    with pytest.raises(UserError, match="runs/a is of stage llm; resume it with train_llm.py"):
        load_config(train_vqvae.Config, ["--run", "a", "--resume"])


@pytest.mark.parametrize("stage", ["llm", "vqvae"])
def test_the_saved_config_names_its_stage(workdir, stage):
    train_stage(MODULES[stage], run="a")
    assert saved_config(Path("runs/a"))["stage"] == stage


def test_an_unnamed_run_is_named_after_its_stage(workdir):
    cfg = train_llm.Config()
    check_run(cfg)
    assert cfg.run.startswith("llm-20")


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
