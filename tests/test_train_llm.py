import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, flags, losses, sentences, train, weights, write_jsonl
from transformers import AutoTokenizer

import train_llm
from common.config import UserError, load_config
from common.metrics import evaluations, read_metrics
from common.run import checkpoints, save_checkpoint
from data.tokenizer import token_subwords
from model import MAX_SUBWORDS, Llama, ModelConfig

KILL_SEED = 20261125


def same(a: str, b: str) -> bool:
    """Whether two runs logged the same losses and ended with the same weights."""
    theirs = weights(a)
    return losses(a) == losses(b) and all(torch.equal(theirs[k], w) for k, w in weights(b).items())


def start(**changes) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train_llm.py"), *flags(**changes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, run: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(s >= step for s, *_ in losses(run)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{run} did not reach step {step}"
        time.sleep(0.01)


# ---- a whole run
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder, summary and output lines of a run of 90 steps."""
    folder = tmp_path_factory.mktemp("llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_jsonl("corpus.jsonl", sentences(300))
        process = start(run="a", tokens=11_520, data__val_tokens="2k", gpu_hourly_usd=36)
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    run = folder / "runs/a"
    return run, json.loads((run / "summary.json").read_text()), out.splitlines()


def test_every_step_is_recorded(run):
    rows = [row for row in read_metrics(run[0]) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 91))


def test_evaluations_are_at_quarters_of_the_budget(run):
    assert [row["step"] for row in evaluations(run[0])] == [23, 45, 68, 90]


def test_the_first_loss_is_that_of_a_uniform_guess(run):
    assert read_metrics(run[0])[0]["loss"] == pytest.approx(math.log(300), rel=0.05)


def test_the_loss_falls(run):
    assert 0.5 < run[1]["val_loss"] < 3.5


def test_the_learning_rate_falls_from_the_peak_to_the_floor(run):
    rates = [row["lr"] for row in read_metrics(run[0]) if "loss" in row]
    assert rates[0] == 0.015
    assert rates[-1] == pytest.approx(0.02 * 0.015)


def test_the_summary_has_the_last_evaluation(run):
    assert run[1]["val_loss"] == evaluations(run[0])[-1]["val_loss"]


def test_the_summary_has_the_budget(run):
    assert (run[1]["tokens"], run[1]["steps"]) == (11_520, 90)


@pytest.mark.parametrize(
    "key", ["val_bpb", "params", "seed", "mfu", "peak_memory_gb", "device", "commit", "dirty"]
)
def test_the_summary_has(run, key):
    assert key in run[1]


def test_the_training_loss_is_the_mean_over_the_last_twentieth(run):
    rows = [row for row in read_metrics(run[0]) if "loss" in row]
    assert run[1]["train_loss"] == pytest.approx(sum(row["loss"] for row in rows[-5:]) / 5)


def test_speed_and_cost_follow_from_the_training_time(run):
    seconds = run[1]["train_seconds"]
    assert seconds > 0
    assert run[1]["tokens_per_second"] == pytest.approx(11_520 / seconds)
    assert run[1]["cost_usd"] == pytest.approx(0.01 * seconds)


def test_the_last_two_checkpoints_are_kept(run):
    assert [path.name for path in checkpoints(run[0])] == ["0000081", "0000090"]


def test_the_run_folder_has_plot_samples_and_environment(run):
    assert (run[0] / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((run[0] / "samples").iterdir())) == 4
    assert json.loads((run[0] / "env.json").read_text())["torch"] == torch.__version__


def test_without_a_terminal_every_logged_step_is_a_line(run):
    assert sum(line.startswith("step ") for line in run[2]) == 90
    assert not any("\r" in line for line in run[2])


@pytest.mark.parametrize(
    "part", ["step 1/90", "1%", "tokens/s", "lr 0.015", "gnorm", "ms", "mfu -", "mem", "eta"]
)
def test_the_step_line_has(run, part):
    assert part in next(line for line in run[2] if line.startswith("step "))


def test_the_output_ends_with_the_run_folder(run):
    assert run[2][-1] == "saved in runs/a"


@pytest.mark.parametrize("name", ["run", "device", "model", "data", "batch", "recipe"])
def test_the_start_of_the_output_describes(run, name):
    assert any(line.startswith(f"{name} ") for line in run[2])


# ---- data and model
def test_without_a_gpu_a_long_run_names_the_demo(workdir, monkeypatch, capsys):
    monkeypatch.setattr("common.device.matmul_flops", lambda device, dtype: 1e5)
    train(run="a", compile="false")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "no GPU" in line)
    assert re.search(r"about \d+\.\d hours here; --config configs/llm_demo.yaml", line)


def test_without_a_gpu_a_short_run_does_not(workdir, capsys):
    train(run="a", tokens=256)
    assert "no GPU" not in capsys.readouterr().out


def test_the_model_knows_the_subwords_of_the_tokenizer(workdir):
    train(run="a", tokens=256)
    tokenizer = AutoTokenizer.from_pretrained("runs/a/tokenizer")
    table = token_subwords(tokenizer, 1024, MAX_SUBWORDS)
    assert torch.equal(weights("a")["token_subwords"], table)
    assert weights("a")["subwords.weight"].any()


def test_bits_per_byte_are_those_of_the_text(workdir):
    """All of the validation text is scored, so nats over its bytes can be counted by hand."""
    summary = train(run="a", data__val_tokens="1M", eval_tokens="1M")
    (folder,) = Path("cache/tokens").glob("val-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    nats = summary["val_loss"] * manifest["tokens"]
    assert summary["val_bpb"] == pytest.approx(nats / math.log(2) / manifest["bytes"])


def test_the_summary_names_the_code_that_the_run_began_with(workdir, monkeypatch):
    state = {"commit": "first", "dirty": False, "code_sha256": "0"}

    def commit_meanwhile(*args):
        state["commit"] = "second"
        return 1.0

    monkeypatch.setattr("common.run.git_state", lambda: dict(state))
    monkeypatch.setattr(train_llm, "evaluate", commit_meanwhile)
    assert train(run="a", tokens=256)["commit"] == "first"
    assert state["commit"] == "second"


# ---- reproducibility
def test_evaluating_and_saving_more_often_change_nothing(workdir):
    train(run="a", eval_every=0)
    train(run="b", eval_every=0.05, save_every=0)
    assert same("a", "b")


def test_another_seed_is_another_run(workdir):
    train(run="a", tokens=640)
    train(run="b", tokens=640, seed=1)
    assert not same("a", "b")


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_accumulation_does_not_change_the_training(workdir, micro_batch):
    train(run="one", micro_batch=1, tokens=1280)
    train(run="many", micro_batch=micro_batch, tokens=1280)
    for name, weight in weights("one").items():
        torch.testing.assert_close(weights("many")[name], weight, atol=2e-4, rtol=1e-3)
    expected = [loss for _, loss, _ in losses("one")]
    assert [loss for _, loss, _ in losses("many")] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("compile", ["true", "false"])
def test_warm_up_of_compiled_code_leaves_no_trace(workdir, monkeypatch, compile):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compiled.append(f) or f)
    train(run="plain", compile="false")
    train(run="other", compile=compile)
    assert len(compiled) == (3 if compile == "true" else 0)  # the model and Muon's two functions
    assert same("plain", "other")
    assert not any("_orig_mod" in name for name in weights("other"))


# ---- stopping and resuming
@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(workdir, monkeypatch):
    """Killed twice at random steps, over the end of an epoch and of several shards."""
    changes = {"tokens": 76_800, "allow_repeat": "true", "save_every": 0.01, "eval_every": 0.1}
    changes["log_every"] = 5
    monkeypatch.setattr("data.text.BATCH_DOCUMENTS", 16)
    monkeypatch.setattr("data.text.SHARD_TOKENS", 2000)
    train(run="whole", **changes)
    (folder,) = Path("cache/tokens").glob("train-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["shards"]) > 2
    assert manifest["tokens"] < 76_800
    kill_steps = sorted(random.Random(KILL_SEED).sample(range(20, 500), 2))
    print(f"seed {KILL_SEED}: killed at steps {kill_steps}")
    for kill_step in kill_steps:
        resume = {"resume": "true"} if Path("runs/killed").exists() else {}
        process = start(run="killed", **changes, **resume)
        wait_for_step(process, "killed", kill_step)
        process.kill()
        process.wait()
        assert not Path("runs/killed/summary.json").exists()
    train(run="killed", resume="true", **changes)
    assert same("whole", "killed")
    assert evaluations(Path("runs/whole")) == evaluations(Path("runs/killed"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_names_the_command_to_resume(workdir, number, code):
    settings = {"allow_repeat": "true", "save_every": 0, "eval_every": 0, "log_every": 1}
    process = start(run="a", tokens=12_800_000, **settings)
    wait_for_step(process, "a", 5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "--run a --resume" in errors
    (checkpoint,) = checkpoints(Path("runs/a"))
    assert json.loads((checkpoint / "state.json").read_text())["step"] == losses("a")[-1][0]


def test_a_run_that_stopped_between_saving_and_evaluating_is_evaluated(workdir, monkeypatch):
    changes = {"run": "a", "eval_every": 0.5, "save_every": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(train_llm, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(**changes)
    assert [path.name for path in checkpoints(Path("runs/a"))] == ["0000010"]
    train(resume="true", **changes)
    assert [row["step"] for row in evaluations(Path("runs/a"))] == [10, 20]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(workdir, monkeypatch):
    forward, forwards = Llama.forward, []

    def poisoned(self, *args, **kwargs):
        forwards.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs) * (math.nan if sum(forwards) > 11 else 1)

    monkeypatch.setattr(Llama, "forward", poisoned)
    message = "loss nan.* at step 12; .*continue from runs/a/checkpoints/0000010"
    with pytest.raises(UserError, match=message):
        train(run="a", micro_batch=4)
    assert losses("a")[-1][0] == 11


def test_a_wrong_path_is_found_before_a_tokenizer_is_loaded(workdir, monkeypatch):
    monkeypatch.setattr(train_llm, "load_tokenizer", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="data source nowhere.txt matches no file"):
        train(run="a", data__source="nowhere.txt")


def test_resume_needs_only_the_name(workdir):
    summary = train(run="a")
    Path("runs/a/summary.json").unlink()
    shutil.rmtree(checkpoints(Path("runs/a"))[-1])
    cfg = load_config(train_llm.Config, ["--run", "a", "--resume"])
    assert train_llm.main(cfg)["val_loss"] == summary["val_loss"]
    # rows after the checkpoint are not there twice
    assert [step for step, *_ in losses("a")] == list(range(1, 21))


def test_resume_without_a_run_is_refused(workdir):
    with pytest.raises(
        UserError, match="runs/a has no config.yaml; to start a new run, omit --resume"
    ):
        train(run="a", resume="true")


@pytest.mark.parametrize("key, value", [("muon_lr", 0.01), ("model__d_ff", 96), ("tokens", 5120)])
def test_resume_refuses_settings_that_change_the_training(workdir, key, value):
    train(run="a", tokens=256)
    flag = key.replace("__", ".")
    with pytest.raises(UserError, match=rf"--{flag} is {value}, but .*; omit --{flag}"):
        train(run="a", resume="true", **{"tokens": 256, key: value})


def test_a_finished_run_is_left_alone(workdir, capsys):
    summary = train(run="a")
    before = Path("runs/a/metrics.jsonl").stat().st_mtime_ns
    assert train(run="a", resume="true") == summary
    assert "runs/a is finished" in capsys.readouterr().out
    assert Path("runs/a/metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_is_never_overwritten(workdir):
    train(run="a", tokens=256)
    with pytest.raises(UserError, match="runs/a exists"):
        train(run="a", tokens=256)


# ---- checkpoints
def test_a_failed_save_leaves_the_earlier_checkpoints_intact(workdir, monkeypatch):
    train(run="a")
    run = Path("runs/a")

    def contents() -> dict[str, bytes]:
        return {p.name: (p / "model.safetensors").read_bytes() for p in checkpoints(run)}

    before = contents()
    monkeypatch.setattr(torch, "save", lambda *args: 1 / 0)  # fails after the weights are written
    model = Llama(ModelConfig(300, 32, 2, 4, 2, 64, 32))
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(run, model, [torch.optim.SGD(model.parameters())], {"step": 21})
    assert contents() == before


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_named(workdir, file):
    train(run="a")
    Path("runs/a/summary.json").unlink()
    path = checkpoints(Path("runs/a"))[-1] / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="checkpoints/0000020 is damaged .*; delete it") as error:
        train(run="a", resume="true")
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_shape_is_refused(workdir):
    train(run="a")
    Path("runs/a/summary.json").unlink()
    config = Path("runs/a/config.yaml")
    config.write_text(config.read_text().replace("d_ff: 64", "d_ff: 96"))
    message = r"down_proj.weight has shape \(32, 64\), expected \(32, 96\)"
    with pytest.raises(UserError, match=message):
        train(run="a", resume="true", model__d_ff=96)


# ---- momentum
def test_muon_gets_the_momentum_of_the_settings(workdir, monkeypatch):
    build, made = train_llm.build_optimizers, []

    def record(*args, **settings):
        made.extend(build(*args, **settings))
        return made

    monkeypatch.setattr(train_llm, "build_optimizers", record)
    train(muon_momentum=0.7, tokens=128)
    assert {group["momentum"] for group in made[0].param_groups} == {0.7}


# ---- short sequences
def test_halves_have_the_inputs_and_targets_of_the_whole():
    windows = torch.arange(26).view(2, 13)
    halves = train_llm.split(windows, 2)  # (4, 7)
    assert torch.equal(halves[:, :-1].reshape(2, 12), windows[:, :-1])
    assert torch.equal(halves[:, 1:].reshape(2, 12), windows[:, 1:])


@pytest.mark.parametrize(("fraction", "n_short"), [(0.5, 4), (0.25, 2), (0, 0), (1, 8)])
def test_sequences_are_half_as_long_in_the_first_fraction_of_the_budget(
    workdir, monkeypatch, capsys, fraction, n_short
):
    backward, seen = train_llm.backward, []

    def record(model, windows, micro_batch):
        seen.append((*windows.shape, micro_batch))
        return backward(model, windows, micro_batch)

    monkeypatch.setattr(train_llm, "backward", record)
    train(short_seq_frac=fraction, tokens=8 * 128, batch_tokens=128, micro_batch=2)
    assert seen == [(8, 17, 4)] * n_short + [(4, 33, 2)] * (8 - n_short)
    halves = f" (8 of 16 in the first {fraction:.0%})" if fraction else ""
    assert f"128 tokens: 4 sequences of 32{halves}, 2 per forward pass" in capsys.readouterr().out


def test_short_sequences_count_fewer_flops_for_attention(workdir, monkeypatch):
    flops = []
    monkeypatch.setattr(train_llm, "warn_if_slow", lambda cfg, total, device: flops.append(total))
    for fraction in (0, 0.5, 1):
        train(run=f"short-{fraction}", short_seq_frac=fraction, tokens=128)
    full, mixed, short = flops
    assert short < mixed < full
    assert mixed == pytest.approx((full + short) / 2)


def test_odd_sequences_cannot_be_halved(workdir):
    with pytest.raises(UserError, match="seq_len 33 is odd.* set --short_seq_frac 0"):
        train(model__seq_len=33, batch_tokens=33)
    train(model__seq_len=33, batch_tokens=33, tokens=66, short_seq_frac=0)
