import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, train
from safetensors.torch import load_file
from transformers import AutoTokenizer

import train_llm
from common import UserError, checkpoints, save_checkpoint
from data.tokenizer import spelling
from metrics import read_metrics
from model import Llama


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(Path("runs") / run)[-1] / "model.safetensors")


def losses(run: str) -> list[tuple]:
    return [
        (row["step"], row["loss"], row["grad_norm"])
        for row in read_metrics(Path("runs") / run)
        if "loss" in row
    ]


def same(a: str, b: str) -> bool:
    return losses(a) == losses(b) and all(
        torch.equal(weights(a)[k], w) for k, w in weights(b).items()
    )


def start(**changes) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_llm.py"), *flags(**changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, run: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(s >= step for s, *_ in (losses(run) if Path("runs", run).exists() else [])):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)


def test_loss_falls_and_the_run_folder_is_whole(workdir, capsys):
    summary = train(run="a", tokens=11_520, data__val_tokens="2k", gpu_hourly_usd=36)
    rows = read_metrics(Path("runs/a"))
    train_rows, val_rows = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in train_rows] == list(range(1, 91)) and [
        r["step"] for r in val_rows
    ] == [23, 45, 68, 90]
    assert (
        train_rows[0]["loss"] == pytest.approx(math.log(300), rel=0.05)
        and 0.5 < summary["val_loss"] < 3.5
    )
    assert train_rows[0]["lr"] == 0.015 and train_rows[-1]["lr"] == pytest.approx(0.02 * 0.015)
    assert summary == json.loads(Path("runs/a/summary.json").read_text())
    assert (
        summary["val_loss"] == val_rows[-1]["val_loss"]
        and summary["tokens"] == 11_520
        and summary["steps"] == 90
    )
    assert {
        "val_bpb",
        "train_loss",
        "params",
        "seed",
        "train_seconds",
        "tokens_per_second",
        "mfu",
        "peak_memory_gb",
        "device",
        "commit",
        "dirty",
        "cost_usd",
    } <= summary.keys()
    assert summary["train_loss"] == pytest.approx(sum(r["loss"] for r in train_rows[-5:]) / 5)
    assert summary["tokens_per_second"] == pytest.approx(11_520 / summary["train_seconds"])
    assert (
        summary["cost_usd"] == pytest.approx(0.01 * summary["train_seconds"])
        and summary["train_seconds"] > 0
    )
    bytes_per_token = summary["val_loss"] / math.log(2) / summary["val_bpb"]
    assert 1 < bytes_per_token < 6
    assert [p.name for p in checkpoints(Path("runs/a"))] == ["0000081", "0000090"]
    assert (
        Path("runs/a/loss.png").read_bytes()[:4] == b"\x89PNG"
        and len(list(Path("runs/a/samples").iterdir())) == 4
    )
    assert json.loads(Path("runs/a/env.json").read_text())["torch"] == torch.__version__
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 90 and "\r" not in "".join(lines)
    for part in ("step 1/90", "1%", "tokens/s", "lr 0.015", "gnorm", "ms", "mfu -", "mem", "eta"):
        assert part in lines[0]


def test_training_knows_how_the_tokenizer_spells(workdir):
    train(run="a", tokens=256)
    tokenizer = AutoTokenizer.from_pretrained("runs/a/tokenizer")
    assert (
        torch.equal(weights("a")["spelling"], spelling(tokenizer, 1024))
        and weights("a")["affixes.weight"].any()
    )


def test_summary_names_the_code_that_the_run_began_with(workdir, monkeypatch):
    state = {"commit": "first", "dirty": False, "code_sha256": "0"}

    def commit_meanwhile(*args):
        state["commit"] = "second"
        return 1.0

    monkeypatch.setattr("metrics.git_state", lambda: dict(state))
    monkeypatch.setattr(train_llm, "evaluate", commit_meanwhile)
    assert train(run="a", tokens=256)["commit"] == "first" and state["commit"] == "second"


def test_bits_per_byte_are_those_of_the_text(workdir):
    """All of the validation text is scored, so nats over its bytes can be counted by hand."""
    summary = train(run="a", data__val_tokens="1M", eval_tokens="1M")
    (folder,) = Path("cache/tokens").glob("val-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    nats = summary["val_loss"] * manifest["tokens"]
    assert summary["val_bpb"] == pytest.approx(nats / math.log(2) / manifest["bytes"])


def test_two_runs_of_one_seed_are_the_same_and_evaluating_changes_nothing(workdir):
    train(run="a", eval_every=0)
    train(run="b", eval_every=0.05, save_every=0)
    train(run="c", seed=1)
    assert same("a", "b") and not same("a", "c")


def test_accumulation_does_not_change_the_training(workdir):
    for n in (1, 2, 4):
        train(run=f"m{n}", micro_batch=n, tokens=1280)
    for n in (2, 4):
        for name, weight in weights("m1").items():
            torch.testing.assert_close(weights(f"m{n}")[name], weight, atol=2e-4, rtol=1e-3)
        assert [x[1] for x in losses(f"m{n}")] == pytest.approx(
            [x[1] for x in losses("m1")], rel=1e-4
        )


def test_killed_run_goes_on_bit_for_bit(workdir, monkeypatch):
    """Killed at a random step, over the end of a pass and of several shards; twice."""
    changes = dict(tokens=76_800, allow_repeat="true", save_every=0.01, eval_every=0.1)
    monkeypatch.setattr("data.text.BATCH_DOCUMENTS", 16)
    monkeypatch.setattr("data.text.SHARD_TOKENS", 2000)
    train(run="whole", **changes)
    (folder,) = Path("cache/tokens").glob("train-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["shards"]) > 2 and manifest["tokens"] < 76_800
    for kill_at in sorted(random.sample(range(20, 500), 2)):
        process = start(
            run="killed", **changes, **({"resume": "true"} if Path("runs/killed").exists() else {})
        )
        wait_for_step(process, "killed", kill_at)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not Path("runs/killed/summary.json").exists()
    train(run="killed", resume="true", **changes)
    assert same("whole", "killed")
    val = [
        [r for r in read_metrics(Path("runs") / run) if "val_loss" in r]
        for run in ("whole", "killed")
    ]
    assert val[0] == val[1]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(workdir, number, code):
    process = start(run="a", tokens=12_800_000, allow_repeat="true", save_every=0, eval_every=0)
    wait_for_step(process, "a", 5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "--run a --resume" in errors
    (checkpoint,) = checkpoints(Path("runs/a"))
    assert json.loads((checkpoint / "state.json").read_text())["step"] == losses("a")[-1][0]


def test_run_stopped_between_saving_and_evaluating_is_evaluated_after_all(workdir, monkeypatch):
    changes = dict(run="a", eval_every=0.5, save_every=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(train_llm, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(**changes)
    assert [p.name for p in checkpoints(Path("runs/a"))] == ["0000010"]  # it saves first
    train(resume="true", **changes)
    assert [r["step"] for r in read_metrics(Path("runs/a")) if "val_loss" in r] == [10, 20]


def test_nan_loss_stops_before_the_weights_change(workdir, monkeypatch):
    forward, calls = Llama.forward, []

    def poisoned(self, *args, **kwargs):
        calls.append(self.training and kwargs.get("cache") is None and torch.is_grad_enabled())
        return forward(self, *args, **kwargs) * (math.nan if sum(calls) > 11 else 1)

    monkeypatch.setattr(Llama, "forward", poisoned)
    with pytest.raises(
        UserError, match="nan.*at step 12.*last checkpoint is runs/a/checkpoints/0000010"
    ):
        train(run="a", micro_batch=4)
    assert losses("a")[-1][0] == 11 and all(torch.isfinite(w).all() for w in weights("a").values())


def test_compiled_warm_up_leaves_no_trace(workdir, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compiled.append(f) or f)
    train(run="plain", compile="false")
    assert not compiled
    train(run="compiled", compile="true")
    assert len(compiled) == 2 and same("plain", "compiled")  # the model and Muon's update
    assert not any("_orig_mod" in name for name in weights("compiled"))


def test_resume_refuses_what_would_be_another_training(workdir):
    with pytest.raises(UserError, match="there is no run at runs/a"):
        train(run="a", resume="true")
    train(run="a")
    for key, value in {"muon_lr": 0.01, "model__d_ff": 96, "tokens": 5120}.items():
        with pytest.raises(
            UserError,
            match=rf"--resume with --{key.replace('__', '.')} {value}, but .*: leave it away",
        ):
            train(run="a", resume="true", **{key: value})


def test_finished_run_is_left_alone(workdir, capsys):
    summary = train(run="a")
    before = Path("runs/a/metrics.jsonl").stat().st_mtime_ns
    assert (
        train(run="a", resume="true") == summary and "runs/a is finished" in capsys.readouterr().out
    )
    assert Path("runs/a/metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="runs/a exists"):
        train(run="a")


def test_resume_needs_no_flags_but_the_name(workdir):
    from common import load_config

    summary = train(run="a")
    Path("runs/a/summary.json").unlink()
    shutil.rmtree(checkpoints(Path("runs/a"))[-1])
    cfg = load_config(train_llm.Config, ["--run", "a", "--resume", "true"])
    assert train_llm.main(cfg)["val_loss"] == summary["val_loss"]
    assert [step for step, *_ in losses("a")] == list(
        range(1, 21)
    )  # rows after the checkpoint are not there twice


def test_checkpoints_are_whole_or_absent(workdir, monkeypatch):
    train(run="a")
    run = Path("runs/a")
    before = {p.name: (p / "model.safetensors").read_bytes() for p in checkpoints(run)}
    monkeypatch.setattr(torch, "save", lambda *args: 1 / 0)  # dies half-way
    model = Llama(train_llm.Config().model.__class__(300, 32, 2, 4, 2, 64, 32))
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(run, model, [], {"step": 21})
    assert {p.name: (p / "model.safetensors").read_bytes() for p in checkpoints(run)} == before


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
def test_damaged_checkpoint_is_named(workdir, file):
    train(run="a")
    Path("runs/a/summary.json").unlink()
    path = checkpoints(Path("runs/a"))[-1] / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="checkpoints/0000020 is damaged .*: delete it") as error:
        train(run="a", resume="true")
    assert "\n" not in str(error.value)


def test_checkpoint_of_another_shape_is_refused(workdir):
    train(run="a")
    Path("runs/a/summary.json").unlink()
    config = Path("runs/a/config.yaml")
    config.write_text(config.read_text().replace("d_ff: 64", "d_ff: 96"))
    with pytest.raises(
        UserError,
        match=r"another shape: blocks.0.mlp.down_proj.weight is \(32, 64\), the model's is \(32, 96\)",
    ):
        train(run="a", resume="true", model__d_ff=96)


def test_wandb_logs_without_network(workdir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(run="a", wandb="true")
    (log,) = Path("runs/a/wandb").glob("offline-run-*/*.wandb")
    assert b"val_loss" in log.read_bytes()


def test_wandb_is_not_imported_unless_asked_for(workdir):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_llm, generate; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


def test_without_a_gpu_a_long_run_names_the_demo(workdir, monkeypatch, capsys):
    monkeypatch.setattr(train_llm, "matmul_flops", lambda device: 1e5)
    train(run="a")
    assert "no GPU: about" in (out := capsys.readouterr().out) and "configs/llm_demo.yaml" in out
