"""What a run stores about its data, code and settings, and what --resume accepts and refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    MODULES,
    flags,
    losses,
    sentences,
    train,
    train_stage,
    weights,
    write_jsonl,
)

import train_llm
from common.config import UserError, load_config, run_script, saved_config
from common.disk import file_sha256, sha256_of
from common.metrics import evaluations, read_metrics
from common.run import checkpoints, lock_run, open_run, save_checkpoint

RUN = Path("runs/a")


def unfinish(run: Path = RUN, keep: int = 1) -> None:
    """Put a finished run back to the checkpoint before its last one."""
    (run / "summary.json").unlink()
    for folder in checkpoints(run)[keep:]:
        shutil.rmtree(folder)


def state(run: Path = RUN) -> dict:
    return json.loads((checkpoints(run)[-1] / "state.json").read_text())


def resumed(**changes) -> dict:
    """Resume runs/a as its owner would, with its name alone and these flags."""
    settings = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return train_llm.main(load_config(train_llm.Config, ["--run=a", "--resume", *settings]))


@pytest.fixture
def halfway(workdir):
    """runs/whole, and runs/a that is the same but stands at step 18 of 20."""
    train(run="whole")
    train(run="a")
    unfinish()


# ---- what a run was trained on
@pytest.mark.parametrize("stage, names", [("llm", "train val tokenizer"), ("vqvae", "train val")])
def test_a_run_stores_hashes_of_what_it_is_trained_on(workdir, stage, names):
    summary = train_stage(MODULES[stage], run="a")
    assert list(state()["inputs"]) == names.split()
    assert summary["inputs"] == state()["inputs"]


def test_a_multimodal_run_stores_hashes_of_vqvae_and_plain_text_too(workdir):
    train_stage(MODULES["vqvae"], run="v")
    text = {"text_frac": 0.25, "text_source": "corpus.jsonl"}
    summary = train_stage(MODULES["multimodal"], run="a", vqvae="v", **text)
    assert list(summary["inputs"]) == ["train", "val", "tokenizer", "vqvae", "text"]


def change_state(change) -> None:
    """Change the state in the newest checkpoint of runs/a as a program would, hash included."""
    path = checkpoints(RUN)[-1] / "state.json"
    stored = json.loads(path.read_text())
    hashes = stored.pop("sha256")
    change(stored)
    hashes["state.json"] = sha256_of(stored)
    path.write_text(json.dumps(stored | {"sha256": hashes}))


@pytest.mark.parametrize("name", ["train", "val", "tokenizer"])
def test_resume_refuses_data_that_is_not_what_the_run_was_trained_on(halfway, name):
    change_state(lambda stored: stored["inputs"].update({name: "another"}))
    with pytest.raises(UserError, match="is not what runs/a/checkpoints/0000018 was trained on"):
        resumed()


def test_resume_refuses_a_source_whose_text_was_replaced(halfway):
    before = (RUN / "tokenizer/tokenizer.json").read_bytes()
    write_jsonl("corpus.jsonl", sentences(300, seed=1))
    with pytest.raises(UserError, match="^the training data is not what .* was trained on"):
        resumed()
    assert (RUN / "tokenizer/tokenizer.json").read_bytes() == before


def test_resume_uses_the_tokenizer_of_the_run(halfway):
    shutil.rmtree("cache")  # a tokenizer trained again would be equal; a damaged copy is not
    (RUN / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="runs/a/tokenizer"):
        resumed()


def test_data_and_cache_may_lie_elsewhere(halfway):
    Path("moved").mkdir()
    shutil.move("cache", "moved/cache")
    shutil.move("corpus.jsonl", "moved/corpus.jsonl")
    resumed(data__source="moved/corpus.jsonl", data__cache="moved/cache")
    assert losses("a") == losses("whole")


def test_sampling_settings_may_differ(halfway):
    resumed(sample_prompts='["7:"]', sample_tokens=2)
    assert (RUN / "samples/0000020.txt").read_text().startswith("--- 1/1\n7:")


def test_a_hand_edited_config_is_refused(halfway):
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    (RUN / "config.yaml").write_text(yaml.safe_dump(config | {"muon_lr": 0.001}))
    with pytest.raises(UserError, match="config.yaml or .* has changed since it was saved"):
        resumed()


def test_a_config_without_a_setting_is_refused_by_its_name(halfway):
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    del config["grad_clip"]
    (RUN / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="config.yaml has no grad_clip; .* version that made"):
        resumed()


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00", "stage: text"])
def test_a_config_that_is_no_config_is_refused(halfway, text):
    (RUN / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="runs/a/config.yaml is damaged|unknown commit|commit .*"):
        resumed()


def test_a_checkpoint_of_an_earlier_version_is_refused_by_its_commit(halfway):
    path = checkpoints(RUN)[-1] / "state.json"
    path.write_text(json.dumps({"step": 18, "train_seconds": 1.0}))
    with pytest.raises(UserError, match="saved by an earlier version of this code .*commit"):
        resumed()


def test_a_checkpoint_without_the_time_spent_on_data_is_of_an_earlier_version(halfway):
    old = {key: value for key, value in state().items() if key != "data_wait_seconds"}
    hashes = old.pop("sha256") | {"state.json": sha256_of(old)}
    path = checkpoints(RUN)[-1] / "state.json"
    path.write_text(json.dumps(old | {"sha256": hashes}))
    with pytest.raises(UserError, match="saved by an earlier version of this code .*commit"):
        resumed()


def test_two_checkpoints_whose_folders_were_exchanged_are_refused(workdir):
    train(run="a")
    unfinish(keep=2)
    older, newer = checkpoints(RUN)
    older.rename(RUN / "old")
    newer.rename(older)
    (RUN / "old").rename(newer)
    with pytest.raises(UserError, match="0000020 is damaged .state.json says step 18"):
        resumed()


class Planted:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_a_planted_pickle_is_refused(halfway):
    folder = checkpoints(RUN)[-1]
    torch.save([Planted()], folder / "optimizer.pt")
    stored = json.loads((folder / "state.json").read_text())
    stored["sha256"]["optimizer.pt"] = file_sha256(folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="0000018 is damaged .Weights only load failed"):
        resumed()
    assert not Path("planted").exists()
    torch.load(folder / "optimizer.pt", weights_only=False)
    assert Path("planted").exists()  # so the pickle was a dangerous one


# ---- the code
def test_every_version_of_the_code_is_in_the_summary(halfway, monkeypatch, capsys):
    (before,) = state()["code"]
    after = {"commit": "b" * 40, "dirty": False, "code_sha256": "b" * 64}
    monkeypatch.setattr("common.run.git_state", lambda: dict(after))
    summary = resumed()
    assert summary["code"] == [before, after | {"step": 18}]
    assert (summary["commit"], summary["dirty"]) == ("b" * 40, False)
    assert "note: the code has changed since step 18" in capsys.readouterr().out


def test_code_that_did_not_change_is_named_once(halfway, capsys):
    assert len(resumed()["code"]) == 1
    assert "code has changed" not in capsys.readouterr().out


# ---- a new run from a checkpoint of another one
def branch(*words: str) -> dict:
    parent = str(checkpoints(RUN)[0])
    return train_llm.main(load_config(train_llm.Config, ["--resume", parent, *words]))


@pytest.fixture
def parent(workdir):
    train(run="a")
    assert [folder.name for folder in checkpoints(RUN)] == ["0000018", "0000020"]


def test_a_checkpoint_starts_a_new_run_with_another_learning_rate(parent):
    branch("--run=b", "--muon_lr=0.001")
    old, new = ({step: loss for step, loss, _ in losses(run)} for run in "ab")
    assert [new[step] for step in range(1, 20)] == [old[step] for step in range(1, 20)]
    assert new[20] != old[20]  # step 19 was the first with the new rate
    assert saved_config(Path("runs/b"))["muon_lr"] == 0.001


def test_the_run_that_a_branch_comes_from_stays_as_it_was(parent):
    files = {path: path.stat().st_mtime_ns for path in RUN.rglob("*") if path.name != ".lock"}
    branch("--run=b", "--muon_lr=0.001")
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_branch_resumes_like_any_run(parent):
    branch("--run=b", "--muon_lr=0.001")
    branch("--run=c", "--muon_lr=0.001")
    unfinish(Path("runs/c"))
    train_llm.main(load_config(train_llm.Config, ["--run=c", "--resume"]))
    assert losses("b") == losses("c")
    assert weights("b").keys() == weights("c").keys()
    assert all((weights("b")[name] == w).all() for name, w in weights("c").items())


def test_the_config_of_a_branch_repeats_it(parent):
    branch("--run=b", "--muon_lr=0.001")
    again = ["--config=runs/b/config.yaml", "--run=c"]
    train_llm.main(load_config(train_llm.Config, again))
    assert losses("b") == losses("c")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--run=b", "--tokens=5120"], "--tokens is 5120, but runs/a was started with 2560"),
        (["--run=b", "--batch_tokens=64", "--micro_batch=1"], "--batch_tokens is 64, but"),
        (["--run=b", "--model.d_ff=96"], "--model.d_ff is 96, but"),
        (["--run=b", "--data.val_fraction=0.3"], "--data.val_fraction is 0.3, but"),
        ([], "runs/a exists; name the run that is to start from the checkpoint: --run NEW_NAME"),
    ],
)
def test_a_branch_shares_budget_batch_data_and_model(parent, words, message):
    with pytest.raises(UserError, match=message):
        branch(*words)


@pytest.mark.parametrize("path", ["runs/a", "runs/a/checkpoints/9", "nowhere", "runs"])
def test_what_is_not_a_checkpoint_is_refused(parent, path):
    words = flags(run="b", resume=path)
    with pytest.raises(UserError, match=f"--resume {path} is not a checkpoint; pass runs/NAME"):
        train_llm.main(load_config(train_llm.Config, words))


def test_the_best_checkpoint_goes_with_a_branch_if_it_is_not_later(workdir):
    vqvae, multimodal = MODULES["vqvae"], MODULES["multimodal"]
    train_stage(vqvae, run="v")
    train_stage(multimodal, run="a", vqvae="v", eval_every=0.25, save_every=0.5)
    best = checkpoints(RUN, "best")[0].name
    for number, folder in enumerate(checkpoints(RUN)):
        name = f"b{number}"
        words = ["--resume", str(folder), "--run", name, "--eval_every=0"]
        multimodal.main(load_config(multimodal.Config, words))
        kept = [path.name for path in checkpoints(Path("runs") / name, "best")]
        assert (best in kept) == (int(best) <= int(folder.name)) or "0000008" in kept


def test_a_best_checkpoint_of_steps_that_are_repeated_is_removed(workdir):
    train(run="a")
    unfinish()
    later = RUN / "best/0000020"
    shutil.copytree(checkpoints(RUN)[0], later)
    resumed(eval_every=0)
    assert not later.exists()


# ---- one process, whole folders
def test_a_run_that_another_process_trains_is_refused(halfway):
    lock = lock_run(RUN)
    with pytest.raises(UserError, match="another process is training runs/a; wait until it ends"):
        resumed()
    lock.release()
    resumed()


def test_a_lock_file_that_nobody_holds_blocks_nobody(halfway):
    (RUN / ".lock").write_text("12345")
    assert resumed()["steps"] == 20


def new_run(assets=lambda folder: None) -> None:
    cfg = load_config(train_llm.Config, flags(run="b", seed=3))
    train_llm.resolve_recipe(cfg)
    open_run(cfg, Path("runs/b"), assets).release()


def test_a_run_folder_appears_only_when_it_is_complete(workdir):
    def assets(folder: Path) -> None:
        assert not Path("runs/b").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_run(assets)
    assert os.listdir("runs") == []


def test_what_a_killed_start_left_is_removed(workdir):
    Path("runs/.b.tmp/checkpoints").mkdir(parents=True)
    Path("runs/.b.tmp/config.yaml.tmp").write_text("half")
    new_run()
    assert os.listdir("runs") == ["b"]
    assert not list(Path("runs/b").glob("*.tmp"))


def test_a_start_that_fails_in_the_first_step_leaves_no_folder(workdir, monkeypatch):
    monkeypatch.setattr(train_llm, "backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(run="a")
    assert os.listdir("runs") == []


def test_a_run_that_fails_after_a_step_is_kept(workdir, monkeypatch):
    real, calls = train_llm.backward, []

    def failing(*args):
        calls.append(1)
        return real(*args) if len(calls) < 3 else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_llm, "backward", failing)
        train(run="a")
    assert [row["step"] for row in read_metrics(RUN)] == [1, 2]
    assert resumed()["steps"] == 20


def test_what_a_kill_left_half_written_is_removed_on_resume(halfway):
    leftovers = [RUN / "summary.json.tmp", RUN / "checkpoints/.0000020.tmp"]
    leftovers[0].write_text("{")
    leftovers[1].mkdir()
    resumed()
    assert not any(path.exists() for path in leftovers)


@pytest.mark.parametrize("fails", ["rename", "rmtree"])
def test_a_kill_while_checkpoints_are_replaced_leaves_only_complete_ones(
    workdir, monkeypatch, fails
):
    """Saving a step again and removing an old checkpoint, stopped at every call that changes it."""
    train(run="a")
    target = (Path, "rename") if fails == "rename" else (shutil, "rmtree")
    real = getattr(*target)
    model, number = train_llm.Llama(train_llm.ModelConfig(300, 32, 2, 4, 2, 64, 32)), 0
    while True:
        calls = iter(range(99))

        def stopping(*args, calls=calls, number=number, **kwargs):
            if next(calls) == number:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(*target, stopping)
        try:
            save_checkpoint(RUN, model, [], {"step": 20})
        except KeyboardInterrupt:
            number += 1
        else:
            break
        for folder in checkpoints(RUN):
            assert (folder / "state.json").exists() and (folder / "model.safetensors").exists()
    assert number >= 1


# ---- metrics
def test_a_row_cut_short_by_a_kill_is_written_again(halfway):
    path = RUN / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    resumed()
    assert losses("a") == losses("whole")


def test_a_damaged_row_among_others_is_named(halfway):
    path = RUN / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "{\n", *lines[4:]]))
    with pytest.raises(UserError, match="metrics.jsonl does not match the checkpoint of step 18"):
        resumed()


def test_a_row_after_the_checkpoint_is_never_trusted(halfway):
    """The evaluation of the checkpoint's own step is not covered by its hash: it is repeated."""
    train_llm.main(load_config(train_llm.Config, ["--run=a", "--resume"]))
    unfinish(keep=2)
    path = RUN / "metrics.jsonl"
    *rows, last = path.read_text().splitlines()
    assert "val_loss" in last
    path.write_text("\n".join([*rows, last.replace("val_loss", "vbl_loss")]) + "\n")
    assert resumed()["val_loss"] == json.loads(last)["val_loss"]


def test_metrics_that_lack_steps_of_the_checkpoint_are_refused(halfway):
    path = RUN / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[3:]))
    with pytest.raises(UserError, match="metrics.jsonl does not match the checkpoint of step 18"):
        resumed()


def test_an_evaluation_is_recorded_when_its_samples_are_written(workdir, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_llm, "write_text_samples", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run="a", eval_every=0.5, save_every=0.5)
    assert evaluations(RUN) == []
    resumed()
    assert [path.name for path in sorted((RUN / "samples").iterdir())] == [
        "0000010.txt",
        "0000020.txt",
    ]


# ---- secrets
TOKEN = "hf_" + "abcDEF0123" * 4


@pytest.mark.parametrize("setting", ["data.source", "data.tokenizer", "data.cache", "run"])
def test_settings_with_an_access_token_are_refused_and_not_repeated(setting):
    words = [f"--{setting}", f"https://someone:{TOKEN}@example.org/x"]
    with pytest.raises(UserError, match="^the settings contain an access token") as error:
        load_config(train_llm.Config, words)
    assert TOKEN not in str(error.value)


def test_an_unknown_flag_with_a_token_is_not_repeated(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_llm.py", "--hf_token", TOKEN])
    with pytest.raises(SystemExit, match="2"):
        run_script(train_llm.main, train_llm.Config)
    assert "unrecognized arguments: --hf_token [redacted]" in capsys.readouterr().err


def test_secrets_of_the_environment_never_reach_the_run(workdir, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    monkeypatch.setattr("sys.argv", ["train_llm.py", "--note", "0123456789abcdef" * 3])
    train(run="a", tokens=256)
    assert json.loads((RUN / "env.json").read_text())["command"][-1] == "[redacted]"
    with pytest.raises(UserError, match="contain an access token"):
        train(run="b", data__cache="0123456789abcdef" * 3)
