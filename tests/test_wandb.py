"""--wandb: what Weights & Biases gets, read back from the logs that it writes in offline mode."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from helpers import (
    MODULES,
    ROOT,
    STAGES,
    flags,
    script,
    sentences,
    train,
    train_stage,
    weights,
    write_jsonl,
)
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

import train_llm
from common.config import UserError, load_config, saved_config
from common.loop import AfterStep
from common.metrics import read_metrics
from common.run import checkpoints
from common.wandb_run import WandbRun

RUN = Path("runs/a")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # a process started here gets its own


# ---- reading what wandb wrote
def records(log: Path) -> list[Record]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format.

    Blocks have 32 KiB; a record is cut into parts, each after its checksum, length and kind (1: a
    whole record, 2 to 4: its first, a middle and its last part).
    """
    data, at, parts, found = log.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (room := 32_768 - at % 32_768) < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def items(update) -> dict:
    """Keys and values of a record; a nested key is joined by dots."""
    return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in update}


def logs(run: Path = RUN) -> list[Path]:
    """The complete logs of a run's processes, oldest first."""
    wandb.teardown()  # waits until everything is written
    return sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime)


def logged(kind: str, run: Path = RUN) -> list:
    """The records of one kind in all logs of a run."""
    found = [record for log in logs(run) for record in records(log)]
    return [getattr(r, kind) for r in found if r.WhichOneof("record_type") == kind]


def history(run: Path = RUN) -> list[dict]:
    """The rows that W&B shows of a run."""
    return [items(row.item) for row in logged("history", run)]


def steps(run: Path = RUN) -> list[int]:
    return [row["_step"] for row in history(run)]


def run_ids(run: Path = RUN) -> set[str]:
    return {record.run_id for record in logged("run", run)}


def file_of(row: dict, run: Path) -> Path:
    """The table or image in a row of a run that one process trained."""
    (log,) = logs(run)
    return log.parent / "files" / row["samples.path"]


# ---- the three stages
@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """A folder with a run of each stage with --wandb, and plain-STAGE without."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        write_jsonl("corpus.jsonl", sentences(300))
        for stage in STAGES:
            vqvae = {"vqvae": "vqvae"} if stage == "multimodal" else {}
            torch.manual_seed(3)
            train_stage(MODULES[stage], run=stage, wandb="true", **vqvae)
            torch.manual_seed(4)
            train_stage(MODULES[stage], run=f"plain-{stage}", **vqvae)
    return folder / "runs"


@pytest.mark.parametrize("stage", STAGES)
def test_training_is_the_same_with_and_without_wandb(stages, stage, monkeypatch):
    monkeypatch.chdir(stages.parent)
    with_wandb, without = weights(stage), weights(f"plain-{stage}")
    assert with_wandb.keys() == without.keys()
    assert all(torch.equal(with_wandb[name], without[name]) for name in without)


@pytest.mark.parametrize("stage", STAGES)
def test_wandb_has_the_resolved_config(stages, stage):
    (record, *_) = logged("run", stages / stage)
    config = items(record.config.update)
    expected = saved_config(stages / stage)
    assert record.display_name == stage
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("stage", STAGES)
def test_wandb_has_one_row_per_step_with_everything_in_metrics_jsonl(stages, stage):
    expected = {}
    for row in read_metrics(stages / stage):
        expected.setdefault(row["step"], {}).update(row)
    rows = history(stages / stage)
    assert [row["_step"] for row in rows] == list(expected)
    for row, values in zip(rows, expected.values(), strict=True):
        assert {key: row[key] for key in values} == values


@pytest.mark.parametrize(
    "stage, unit", [("llm", "tokens"), ("vqvae", "images"), ("multimodal", "sequences")]
)
def test_wandb_has_speed_and_memory(stages, stage, unit):
    row = history(stages / stage)[-1]
    per_step = row[unit] / row["step"]
    assert row[f"{unit}_per_second"] == pytest.approx(per_step / row["step_seconds"])
    assert 0 <= row["data_wait_seconds"] < row["step_seconds"]
    assert row["peak_memory_gb"] > 0.01


@pytest.mark.parametrize("stage", ["llm", "multimodal"])
def test_wandb_has_both_learning_rates(stages, stage):
    config = saved_config(stages / stage)
    rows = history(stages / stage)
    peaks = (config["muon_lr"], config["adamw_lr"])
    factors = [[row["lr"] / peaks[0], row["adamw_lr"] / peaks[1]] for row in rows]
    assert all(muon == pytest.approx(adamw) for muon, adamw in factors)
    assert max(factors)[0] == pytest.approx(1)
    assert factors[-1][0] < 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_wandb_ends_with_the_summary_of_the_run(stages, stage):
    summary = json.loads((stages / stage / "summary.json").read_text())
    found = {}
    for record in logged("summary", stages / stage):
        found |= items(record.update)
    expected = {key: value for key, value in summary.items() if key not in ("code", "inputs")}
    assert {key: found[key] for key in expected} == expected
    assert [record.exit_code for record in logged("exit", stages / stage)] == [0]


def test_text_samples_are_a_table_of_step_prompt_and_continuation(stages):
    rows = [row for row in history(stages / "llm") if "val_loss" in row]
    prompts = saved_config(stages / "llm")["sample_prompts"]
    assert [row["_step"] for row in rows] == [5, 10, 15, 20]
    for row in rows:
        table = json.loads(file_of(row, stages / "llm").read_text())
        assert table["columns"] == ["step", "prompt", "continuation"]
        assert [line[:2] for line in table["data"]] == [[row["step"], p] for p in prompts]
        sample = (stages / f"llm/samples/{row['step']:07d}.txt").read_text()
        parts = [f"--- {i}/2\n{p}{text}\n" for i, (_, p, text) in enumerate(table["data"], 1)]
        assert "".join(parts) == sample


@pytest.mark.parametrize(
    "stage, caption", [("vqvae", "originals over"), ("multimodal", "each image under its prompt")]
)
def test_image_grids_are_images_with_a_caption(stages, stage, caption):
    rows = [row for row in history(stages / stage) if "val_loss" in row]
    assert len(rows) > 1
    for row in rows:
        assert row["samples._type"] == "image-file"
        assert f"step {row['step']}, {caption}" in row["samples.caption"]
        shown = Image.open(file_of(row, stages / stage))
        sample = Image.open(stages / stage / f"samples/{row['step']:07d}.png")
        assert shown.tobytes() == sample.tobytes()


# ---- resumed runs
def resumed(**changes) -> dict:
    time.sleep(1)  # wandb names the folder of a process after the second in which it starts
    settings = [f"--{key}={value}" for key, value in changes.items()]
    return train_llm.main(load_config(train_llm.Config, ["--run=a", "--resume", *settings]))


def back_to_step_18() -> None:
    """Put a finished run of 20 steps back to the checkpoint before its last one."""
    (RUN / "summary.json").unlink()
    os.rename(checkpoints(RUN)[-1], RUN / "last")


def stop_at(step: int, monkeypatch) -> None:
    """Send SIGTERM right after the checkpoint of a step, before its evaluation."""
    save = AfterStep.save

    def save_and_stop(after_step: AfterStep) -> None:
        save(after_step)
        if after_step.step == step:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(AfterStep, "save", save_and_stop)
        train(run="a", wandb="true")
    assert stopped.value.code == 143


def test_repeated_steps_are_not_sent_again(workdir):
    train(run="a", wandb="true")
    back_to_step_18()
    resumed()
    assert len(logs()) == 2
    assert len(run_ids()) == 1
    assert steps() == [*range(1, 21)]


def test_an_evaluation_after_resuming_is_in_the_row_of_its_step(workdir, monkeypatch):
    stop_at(10, monkeypatch)
    assert steps() == [*range(1, 10)]
    resumed()
    assert len(run_ids()) == 1
    assert steps() == [*range(1, 21)]
    assert [row["_step"] for row in history() if "val_loss" in row] == [5, 10, 15, 20]
    assert all("loss" in row for row in history())


def test_a_run_that_stops_early_is_not_shown_as_finished(workdir, monkeypatch):
    stop_at(10, monkeypatch)
    assert [record.exit_code for record in logged("exit")] == [1]


@pytest.mark.slow
def test_a_killed_run_loses_no_step(workdir):
    settings = {"tokens": "12800", "allow_repeat": "true", "save_every": 0.1, "log_every": 1}
    command = flags(run="a", wandb="true", **settings)
    with start(command) as process:
        wait_for(lambda: len(read_metrics(RUN)) > 30, process)
        process.kill()
    first = steps()
    resumed()
    assert len(first) < 100
    assert len(run_ids()) == 1
    assert sorted(set(steps())) == [*range(1, 101)]


def test_a_step_counts_as_sent_once_wandb_has_written_its_log(tmp_path, monkeypatch):
    """Two seconds per step, and wandb writes its log every two seconds."""
    run = SimpleNamespace(offline=True, log=lambda values, step, commit: None)
    monkeypatch.setattr(wandb, "init", lambda **settings: run)
    monkeypatch.setattr(time, "monotonic", lambda: 2.0 * logger.step if logger else 0.0)
    logger = None
    logger = WandbRun(tmp_path, load_config(train_llm.Config, flags(run="a")))
    stored = []
    for step in range(1, 11):
        logger.add(step, {"val_loss": 1.0})
        stored.append(json.loads((tmp_path / "wandb.json").read_text())["step"])
    assert stored == [0, 0, 0, 0, 0, 3, 3, 3, 6, 6]


def test_a_branch_is_a_run_of_its_own_with_the_steps_before_it(workdir):
    train(run="a", wandb="true")
    train(run="b", wandb="true", resume="runs/a/checkpoints/0000018")
    assert run_ids() != run_ids(Path("runs/b"))
    assert steps(Path("runs/b")) == [*range(1, 21)]


def test_a_run_resumed_with_wandb_sends_the_steps_before(workdir, monkeypatch):
    train(run="a")
    back_to_step_18()
    resumed(wandb="true")
    assert steps() == [*range(1, 21)]


@pytest.mark.parametrize("has", [0, 7, 12])
def test_a_run_resumed_online_sends_what_the_server_does_not_have(tmp_path, monkeypatch, has):
    """The server has the steps up to `has`; this machine has sent those up to 9."""
    sent = []
    run = SimpleNamespace(
        offline=False,
        starting_step=has + 1,
        log=lambda values, step, commit: sent.append(step),
    )
    monkeypatch.setattr(wandb, "init", lambda **settings: run)
    (tmp_path / "wandb.json").write_text('{"id": "0123abcd", "step": 9}')
    logger = WandbRun(tmp_path, load_config(train_llm.Config, flags(run="a")))
    for step in range(1, 16):
        logger.add(step, {"loss": 1.0})
    assert sent == [*range(has + 1, 15)]  # 15 is sent when the next step comes


def test_a_damaged_wandb_json_is_one_line(workdir):
    train(run="a", wandb="true")
    back_to_step_18()
    (RUN / "wandb.json").write_text("{")
    with pytest.raises(UserError, match="^runs/a/wandb.json is damaged; delete it"):
        resumed()


# ---- failures
def start(command: list[str], **env: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, str(ROOT / "train_llm.py"), *command]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, "it ended too early"
        time.sleep(0.01)


def wandb_service(parent: int) -> int:
    """The process id of the service that wandb started for a process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().rpartition(")")
        except OSError:  # it has ended in the meantime
            continue
        if "wandb-core" in name and int(rest.split()[1]) == parent:
            return int(folder.name)
    raise AssertionError("wandb has no service")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_training_survives_the_death_of_wandb(workdir):
    settings = {"tokens": "12800", "allow_repeat": "true", "save_every": 0.5, "log_every": 1}
    train(run="plain", **settings)
    with start(flags(run="a", wandb="true", **settings)) as process:
        wait_for(lambda: len(read_metrics(RUN)) > 30, process)
        os.kill(wandb_service(process.pid), signal.SIGKILL)
        out = process.stdout.read()
    assert process.returncode == 0
    (line,) = [line for line in out.splitlines() if line.startswith("warning: wandb failed (")]
    assert line.endswith("training continues without it until the run is resumed")
    plain, survived = weights("plain"), weights("a")
    assert all(torch.equal(plain[name], survived[name]) for name in plain)
    assert len(history()) < 100


def test_steps_missing_after_a_failure_are_sent_by_resuming(workdir, monkeypatch):
    log = wandb.Run.log

    def fail_at_step_7(run, values, step, commit):
        if step == 7:
            raise ConnectionResetError("Connection lost")
        log(run, values, step=step, commit=commit)

    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, "log", fail_at_step_7)
        train(run="a", wandb="true")
    assert steps() == [*range(1, 7)]
    back_to_step_18()
    resumed()
    assert steps() == [*range(1, 7), *range(1, 21)]  # it does not know what arrived


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(workdir, monkeypatch):
    monkeypatch.setattr(train_llm, "backward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(run="a", wandb="true")
    assert not RUN.exists()


# ---- without --wandb, without a key, and on several ranks
def test_wandb_is_imported_only_when_used(workdir):
    code = "import sys, train_llm, generate; sys.exit('wandb' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_wandb_without_a_key_is_refused_before_any_work(workdir):
    secret_free = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    env = secret_free | {"HOME": str(workdir), "NETRC": str(workdir / "none")}
    command = [*flags(run="a", wandb="true")]
    done = script("train_llm.py", *command, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --wandb is set, but there is no API key; run `wandb login`")
    assert not Path("runs").exists() and not Path("cache").exists()


def test_without_the_flag_wandb_is_not_imported(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    train(run="a")
    with pytest.raises(ImportError):
        train(run="b", wandb="true")


@pytest.mark.slow
def test_only_one_of_two_ranks_logs(workdir):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    done = script("-m", *torchrun, str(ROOT / "train_llm.py"), *flags(run="a", wandb="true"))
    assert done.returncode == 0, done.stderr
    assert len(logs()) == 1
    assert steps() == [*range(1, 21)]
