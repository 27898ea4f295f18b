"""Data parallelism: two processes train as one does, and one that dies costs nothing."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from faults import Attempt, outcome, workspace
from helpers import MODULES, ROOT, STAGES, flags_of, losses, sentences, write_jsonl

from common.config import UserError
from common.distributed import share
from common.metrics import evaluations
from common.run import checkpoints

SETTINGS = {  # 50 steps
    "llm": {
        "tokens": 6400,
        "batch_tokens": 128,
        "allow_repeat": "true",
        "muon_lr": 0.003,  # at higher rates, differences of rounding grow during training
        "adamw_lr": 0.001,
    },
    "vqvae": {"images": 400, "revive_every": 5},
    "multimodal": {"sequences": 400, "caption_dropout": 0.3},
}
SCHEDULE = {"save_every": 0.5, "eval_every": 0.5}


def start(folder: Path, stage: str, n: int, **changes) -> list[Attempt]:
    """Start a stage's training as runs/a in n processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    envs = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(n)] if n > 1 else [{}]
    settings = SCHEDULE | SETTINGS[stage] | changes
    return [
        Attempt(folder, stage, env={key: str(value) for key, value in env.items()}, **settings)
        for env in envs
    ]


def train(folder: Path, stage: str, n: int, **changes) -> None:
    for attempt in start(folder, stage, n, **changes):
        attempt.wait()
        assert attempt.code == 0, attempt.errors


def forget_second_half(folder: Path) -> None:
    """Make the finished run stop at its first checkpoint."""
    (folder / "runs/a/summary.json").unlink()
    shutil.rmtree(checkpoints(folder / "runs/a")[-1])


def assert_same_losses(folder: Path, other: Path, rel: float) -> None:
    curves = []
    for place in (folder, other):
        with chdir(place):
            scores = [row["val_loss"] for row in evaluations(Path("runs/a"))]
            curves.append([loss for _, loss, _ in losses("a")] + scores)
    assert len(curves[0]) == 52
    assert curves[0] == pytest.approx(curves[1], rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_does_and_each_resumes_what_the_other_began(tmp_path, stage):
    one = workspace(tmp_path / "one", stage)
    two = Path(shutil.copytree(one, tmp_path / "two"))
    train(one, stage, 1)
    train(two, stage, 2)
    assert_same_losses(one, two, rel=1e-4)
    for folder, n in ((one, 2), (two, 1)):
        forget_second_half(folder)
        train(folder, stage, n)
    assert_same_losses(one, two, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_with_one_line_and_loses_nothing(tmp_path, rank):
    folder = workspace(tmp_path / "killed", "llm")
    settings = {"log_every": 5, "eval_every": 0, "save_every": 0.2}
    attempts = start(folder, "llm", 2, **settings)
    victim, other = attempts[rank], attempts[1 - rank]
    attempts[0].until("save").until("log")  # step 10 is saved, step 15 is done
    victim.send(signal.SIGKILL)
    other.wait()
    assert other.code == 2
    assert len(other.errors.splitlines()) == 1, other.errors
    saved = int(checkpoints(folder / "runs/a")[-1].name)
    message = f"another process of this run died; step {saved} is saved, resume"
    if rank == 0:
        message = "the process that saves this run died; resume"
    assert f"error: {message} with --run a --resume" in other.errors
    assert rank == 0 or saved >= 15
    victim.process.join()
    train(folder, "llm", 2, **settings)
    whole = workspace(tmp_path / "whole", "llm")
    train(whole, "llm", 2, **settings)
    assert outcome(folder) == outcome(whole)


def test_a_batch_that_does_not_divide_is_one_line(tmp_path):
    first, second = start(workspace(tmp_path, "llm"), "llm", 2, batch_tokens=96)
    first.wait()
    assert first.code == 2
    assert first.errors == (
        "error: --batch_tokens 96 makes 3 items per step, which 2 processes cannot share equally; "
        "set --nproc_per_node to a divisor\n"
    )
    second.process.kill()  # as torchrun does


def torchrun(folder: Path, **changes) -> subprocess.Popen:
    write_jsonl(folder / "corpus.jsonl", sentences(300))
    settings = SETTINGS["llm"] | {"tokens": "128M", "log_every": 1, "compile": "false"} | changes
    arguments = flags_of(MODULES["llm"], **settings)
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    command = [sys.executable, *program, str(ROOT / "train_llm.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes
    )


def test_fewer_items_than_processes_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="3 items cannot be divided among 4 processes; lower"):
        share([1, 2, 3])


@pytest.mark.slow
def test_torchrun_names_the_run_once_and_an_interrupt_saves_it(tmp_path):
    process = torchrun(tmp_path)
    assert any(line.startswith("step 3/") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    (run,) = (tmp_path / "runs").iterdir()
    (line,) = (line for line in errors.splitlines() if "and saved; resume with" in line)
    assert f"resume with --run {run.name} --resume" in line
    assert len(checkpoints(run)) == 1
