"""Kills, full disks, damaged files and concurrent processes: no run is lost, nothing is left over.

`make test` runs a short form; `make test-faults` runs hundreds of kills and long runs.
"""

import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from faults import (
    FULL_DISK,
    PHASES,
    SETTINGS,
    SIGNALS,
    Attempt,
    Fault,
    Reference,
    Tally,
    chdir,
    copy,
    damaged,
    outcome,
    survive,
    tree,
    wrong_exit,
)
from helpers import losses

from common.run import checkpoints

KILL_SEED = 20261125
KILLS = 60  # per phase and stage in `make test-faults`


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, Reference]:
    """Undisturbed runs by stage, made when first asked for."""

    class References(dict):
        def __missing__(self, stage: str) -> Reference:
            self[stage] = Reference.make(stage, tmp_path_factory.mktemp(stage))
            return self[stage]

    return References()


@pytest.fixture
def reference(references, request) -> Reference:
    return references[request.param]


def in_full(*values):
    """Parameters that only the full form tests."""
    return pytest.param(*values, marks=pytest.mark.faults)


every_stage = pytest.mark.parametrize("reference", SETTINGS, indirect=True)
every_stage_in_full = pytest.mark.parametrize(
    "reference", ["llm", in_full("vqvae"), in_full("multimodal")], indirect=True
)
llm = pytest.mark.parametrize("reference", ["llm"], indirect=True)


def check_finishes(reference: Reference, folder: Path, **changes) -> None:
    """The same command again finishes the run, bit for bit and without leftovers."""
    done = Attempt(folder, reference.stage, **changes).wait()
    assert (done.code, done.errors) == (0, "")
    assert reference.differences(folder) == []


# ---- kills
@every_stage
def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(reference, tmp_path):
    rng, tally = random.Random(KILL_SEED), Tally()
    for phases in (PHASES[:1] * 4, PHASES[1:]):
        numbers = rng.sample(SIGNALS * 2, len(phases))
        faults = [reference.moment(rng, *pair) for pair in zip(phases, numbers, strict=True)]
        survive(reference, tmp_path / phases[0], faults, tally)
    assert not tally.problems(), tally.problems()
    assert sum(tally.kills.values()) >= 4


@pytest.mark.parametrize(
    "reference, phase", [("llm", "save"), in_full("multimodal", "evaluate")], indirect=["reference"]
)
def test_a_kill_at_any_file_operation_of_a_checkpoint_costs_no_run(reference, phase, tmp_path):
    tally = Tally()
    faults = [Fault(signal.SIGKILL, phase, operation=n) for n in range(1, 9)]
    survive(reference, tmp_path / "work", faults, tally)
    assert not tally.problems(), tally.problems()
    assert sum(tally.kills.values()) == 8


@llm
@pytest.mark.parametrize("phase", ["log", "evaluate"])
@pytest.mark.parametrize("number", [SIGNALS[1], *map(in_full, SIGNALS[2:])])
def test_a_signal_during_logging_or_evaluation_saves_the_step(reference, phase, number, tmp_path):
    folder = copy(reference.fresh, tmp_path / "work")
    done = Attempt(folder, "llm", Fault(number, phase, occurrence=1)).wait()
    assert done.code == 128 + number
    assert wrong_exit(done, folder) is None


@pytest.mark.faults
@every_stage
def test_no_run_is_lost_in_hundreds_of_kills(reference, tmp_path, record_property):
    rng, tally = random.Random(KILL_SEED + 1), Tally()
    for i in range(KILLS * len(PHASES)):
        wanted = [
            (phase, number)
            for phase in PHASES
            for number in SIGNALS
            if tally.kills[phase, number] < KILLS // len(SIGNALS)
        ]
        if not wanted:
            break
        chosen = sorted(rng.sample(wanted, min(5, len(wanted))), key=wanted.index)
        faults = [reference.moment(rng, *pair) for pair in chosen]
        survive(reference, tmp_path / str(i), faults, tally)
    record_property("table", tally.rows(reference.stage))
    assert not tally.problems(), tally.problems()
    assert not wanted, f"too few kills: {wanted}"


# ---- full disks and folders that cannot be written
DISK_FULL = [  # (stage, what the line must name, when the disk is full)
    ("llm", "cache/tokenizers", Fault(FULL_DISK, path="cache/tokenizers", operation=1)),
    in_full("llm", "cache/tokens", Fault(FULL_DISK, path="cache/tokens", operation=1)),
    ("llm", "cache/tokens", Fault(FULL_DISK, path="cache/tokens/train", operation=6)),
    ("llm", r"runs/\.?a", Fault(FULL_DISK, path="runs/", operation=1)),
    ("llm", "runs/a/metrics.jsonl", Fault(FULL_DISK, "train", occurrence=4)),
    in_full("llm", "runs/a/checkpoints", Fault(FULL_DISK, "save", occurrence=1)),
    ("llm", "runs/a/checkpoints", Fault(FULL_DISK, "save", occurrence=3)),
    ("llm", "runs/a/samples", Fault(FULL_DISK, "evaluate", path="samples", operation=1)),
    in_full("llm", "runs/a", Fault(FULL_DISK, "evaluate", occurrence=2)),
    ("llm", "runs/a", Fault(FULL_DISK, "finish")),
    in_full("vqvae", "cache/images", Fault(FULL_DISK, path="cache/images", operation=1)),
    ("vqvae", "cache/images", Fault(FULL_DISK, path="images.bin", operation=1)),
    in_full("vqvae", "runs/a/samples", Fault(FULL_DISK, "evaluate", path="samples", operation=1)),
    ("multimodal", "cache/image_tokens", Fault(FULL_DISK, path="image_tokens", operation=1)),
    in_full("multimodal", "cache/image_tokens|runs/a", Fault(FULL_DISK, "train", occurrence=2)),
    in_full("multimodal", r"runs/\.?a", Fault(FULL_DISK, path="runs/", operation=1)),
    in_full("multimodal", "runs/a/best", Fault(FULL_DISK, "evaluate", path="best/", operation=1)),
]


@pytest.mark.parametrize("reference, place, fault", DISK_FULL, indirect=["reference"])
def test_a_full_disk_is_one_line_and_costs_no_run(reference, place, fault, tmp_path):
    folder = copy(reference.fresh, tmp_path / "work")
    check_one_line(Attempt(folder, reference.stage, fault).wait(), place)
    assert damaged(folder) == []
    check_finishes(reference, folder)
    assert tree(folder) == tree(reference.folder)


def check_one_line(done: Attempt, *patterns: str) -> None:
    """The process refused with exit code 2 and one line in which every pattern occurs."""
    lines = done.errors.splitlines()
    assert (done.code, len(lines)) == (2, 1), f"exit code {done.code}: {lines[-4:]}"
    assert lines[0].startswith("error: ")
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]


@llm
@pytest.mark.parametrize("name", [*map(in_full, ["runs", "runs/a"]), "cache", "runs/a/checkpoints"])
def test_a_read_only_folder_is_one_line_and_costs_no_run(reference, name, tmp_path):
    folder = copy(reference.fresh, tmp_path / "work")
    if name.startswith("runs/a"):
        Attempt(folder, "llm", Fault(signal.SIGTERM, "train", occurrence=3)).wait()
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name).chmod(0o555)
    done = Attempt(folder, "llm", obeys=True).wait()
    (folder / name).chmod(0o755)
    check_one_line(done, f"{name}\\b", "[Pp]ermission")
    check_finishes(reference, folder)


@llm
@pytest.mark.parametrize("name", [*map(in_full, ["runs", "cache/tokens"]), "cache"])
def test_a_file_in_place_of_a_folder_is_one_line(reference, name, tmp_path):
    folder = copy(reference.fresh, tmp_path / "work")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    check_one_line(Attempt(folder, "llm").wait(), f"{name}\\b")
    (folder / name).unlink()
    check_finishes(reference, folder)


@pytest.fixture
def disk(tmp_path):
    """A function that sets the size in kB of a small disk (tmpfs), and the disk's folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kilobytes: int, *options: str) -> int:
        options = ",".join([f"size={kilobytes}k", *options])
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        return subprocess.run(command, capture_output=True).returncode

    if resize(1000):
        pytest.skip("only root can mount a small disk")
    yield lambda kilobytes: resize(kilobytes, "remount"), folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.faults
@every_stage
def test_a_disk_that_is_full_again_and_again_costs_no_run(reference, disk, record_property):
    resize, folder = disk
    folder = copy(reference.fresh, folder / "work")
    size = sum(path.stat().st_blocks for path in folder.rglob("*")) // 2
    for n_full in range(200):
        assert resize(size + 24 * n_full) == 0
        done = Attempt(folder, reference.stage).wait()
        if done.code == 0:
            break
        check_one_line(done, "(runs|cache)/")
        assert damaged(folder) == []
    record_property("table", [f"{reference.stage}: {n_full} times no space left on the disk"])
    assert n_full > 5
    assert reference.differences(folder) == []
    assert tree(folder) == tree(reference.folder)


# ---- damaged files
@pytest.fixture(scope="module")
def stopped(references, tmp_path_factory):
    """By stage: a folder with a run that was stopped after some checkpoints and evaluations."""

    class Stopped(dict):
        def __missing__(self, stage: str) -> Path:
            folder = copy(references[stage].fresh, tmp_path_factory.mktemp("stopped") / stage)
            done = Attempt(folder, stage, Fault(signal.SIGTERM, "train", occurrence=25)).wait()
            assert done.code == 143, done.errors
            assert len(checkpoints(folder / "runs/a")) == 2
            self[stage] = folder
            return folder

    return Stopped()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    """Exchange a file or folder with the one before it: of the other checkpoint, or shard."""
    others = sorted(path.parent.glob(f"*{path.suffix}"))
    if path.parent.parent.name == "checkpoints":
        others = sorted(path.parent.parent.glob(f"*/{path.name}"))
    before = others[others.index(path) - 1]
    spare = path.with_name("spare")
    path.rename(spare)
    before.rename(path)
    spare.rename(before)


def rename(path: Path) -> None:
    path.rename(path.with_name("0000099"))


CHECKPOINT = "runs/a/checkpoints/*"
SHARD, MANIFEST = "cache/tokens/train-*/*.bin", "cache/tokens/train-*/manifest.json"
IMAGES = "cache/images/train-*"
DAMAGES = [
    ("llm", CHECKPOINT, [swap, rename]),
    ("llm", f"{CHECKPOINT}/model.safetensors", [flip, swap, truncate, empty, delete]),
    ("llm", f"{CHECKPOINT}/optimizer.pt", [flip, swap, truncate, empty, delete]),
    ("llm", f"{CHECKPOINT}/state.json", [flip, swap, truncate, empty, delete]),
    ("llm", SHARD, [flip, swap, truncate, empty, delete]),
    ("llm", MANIFEST, [flip, truncate, empty]),
    ("llm", "cache/tokens/val-*/*.bin", [flip]),
    ("llm", "runs/a/tokenizer/tokenizer.json", [flip]),
    ("llm", "runs/a/config.yaml", [truncate]),
    ("vqvae", f"{IMAGES}/images.bin", [flip, truncate, empty, delete]),
    ("vqvae", f"{IMAGES}/manifest.json", [flip, truncate, empty, delete]),
    ("multimodal", "runs/a/vqvae/checkpoints/*/model.safetensors", [flip]),
]
EVERY_DAMAGE = [(stage, path, ways[0]) for stage, path, ways in DAMAGES]
EVERY_DAMAGE += [in_full(stage, path, how) for stage, path, ways in DAMAGES for how in ways[1:]]
IRREPLACEABLE = ("runs/a/tokenizer", "runs/a/config.yaml")  # to be restored from a backup


def name(value) -> str:
    return value.__name__ if callable(value) else str(value)


def named_path(line: str) -> str:
    return re.search(r"(?:runs/a|cache)[\w./-]*\w", line)[0]


def follow_remedy(folder: Path, line: str) -> None:
    """Delete what the line says; "it" is what the line names first."""
    remedy = re.search(r"delete (\S+)", line)[1]
    path = folder / (named_path(line) if remedy == "it" else remedy)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("reference, pattern, how", EVERY_DAMAGE, indirect=["reference"], ids=name)
def test_a_damaged_file_is_named_and_the_remedy_works(reference, stopped, pattern, how, tmp_path):
    folder = copy(stopped[reference.stage], tmp_path / "work")
    path = sorted(folder.glob(pattern))[-1]
    how(path)
    done = Attempt(folder, reference.stage).wait()
    check_one_line(done, "runs/a|cache/")
    named = folder / named_path(done.errors)
    assert path.is_relative_to(named) or path.parent == named.parent, done.errors
    for _ in range(3):  # a swap damages two checkpoints
        if done.code == 2 and not pattern.startswith(IRREPLACEABLE):
            follow_remedy(folder, done.errors)
            done = Attempt(folder, reference.stage).wait()
    if not pattern.startswith(IRREPLACEABLE):
        assert (done.code, reference.differences(folder)) == (0, []), done.errors


@pytest.mark.parametrize("reference", ["multimodal"], indirect=True)
@pytest.mark.parametrize("how", [flip, *map(in_full, [truncate, empty, delete])])
def test_damaged_image_tokens_are_encoded_again(reference, stopped, how, tmp_path):
    folder = copy(stopped["multimodal"], tmp_path / "work")
    for path in (folder / "cache/image_tokens").iterdir():
        if not path.name.startswith("."):
            how(path)
    check_finishes(reference, folder)


@every_stage_in_full
def test_metrics_cut_in_mid_line_are_completed(reference, stopped, tmp_path):
    folder = copy(stopped[reference.stage], tmp_path / "work")
    path = folder / "runs/a/metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 9')
    check_finishes(reference, folder)


def change_loss(path: Path) -> None:
    path.write_text(re.sub(r'(?<="loss": )\d', "9", path.read_text(), count=1))


@llm
@pytest.mark.parametrize("how", [change_loss, *map(in_full, [empty, delete])])
def test_metrics_without_the_rows_up_to_the_checkpoint_are_refused(
    reference, stopped, how, tmp_path
):
    folder = copy(stopped["llm"], tmp_path / "work")
    how(folder / "runs/a/metrics.jsonl")
    check_one_line(Attempt(folder, "llm").wait(), "runs/a/metrics.jsonl")


# ---- other places, other processes
@every_stage_in_full
def test_a_run_resumes_in_another_place(reference, stopped, tmp_path):
    copy(stopped[reference.stage], tmp_path / "first").rename(tmp_path / "second")
    check_finishes(reference, tmp_path / "second")


@every_stage
def test_a_run_resumes_with_its_cache_in_another_place(reference, stopped, tmp_path):
    folder = copy(stopped[reference.stage], tmp_path / "work")
    (folder / "cache").rename(tmp_path / "moved")
    check_finishes(reference, folder, data__cache=tmp_path / "moved")


def frozen(folder: Path, stage: str, fault: Fault, **changes) -> Attempt:
    """A process that stopped (SIGSTOP) at the fault's moment, and still holds its locks."""
    return Attempt(folder, stage, fault, **changes).until("fault")


@every_stage_in_full
def test_a_second_process_on_a_run_is_refused_until_the_first_is_dead(reference, tmp_path):
    folder = copy(reference.fresh, tmp_path / "work")
    first = frozen(folder, reference.stage, Fault(signal.SIGSTOP, "train", occurrence=3))
    try:
        check_one_line(Attempt(folder, reference.stage).wait(), r"runs/a\b")
    finally:
        first.send(signal.SIGKILL)
    first.wait()
    check_finishes(reference, folder)
    assert tree(folder) == tree(reference.folder)


@every_stage
@pytest.mark.parametrize("operation", [9, in_full(2)])
def test_two_processes_on_one_fresh_cache_both_succeed(reference, operation, tmp_path):
    folder = copy(reference.fresh, tmp_path / "work")
    moment = Fault(signal.SIGSTOP, path="cache", operation=operation)
    first = frozen(folder, reference.stage, moment)
    second = Attempt(folder, reference.stage, run="b")
    time.sleep(0.2)
    first.send(signal.SIGCONT)
    for done in (first.wait(), second.wait()):
        assert (done.code, done.errors) == (0, "")
    assert reference.differences(folder) == []
    assert outcome(folder, "b") == outcome(folder)
    assert tree(folder / "cache") == tree(reference.folder / "cache")


@every_stage
def test_after_a_kill_in_preparation_a_waiting_process_succeeds(reference, tmp_path):
    folder = copy(reference.fresh, tmp_path / "work")
    first = frozen(folder, reference.stage, Fault(signal.SIGSTOP, path="cache", operation=6))
    second = Attempt(folder, reference.stage)
    time.sleep(0.2)
    first.send(signal.SIGKILL)
    first.wait()
    done = second.wait()
    assert (done.code, done.errors) == (0, "")
    assert reference.differences(folder) == []
    assert tree(folder) == tree(reference.folder)


# ---- long runs
LONG = {
    "tokens": 20_000 * 32,
    "batch_tokens": 32,
    "allow_repeat": "true",
    "eval_every": 0,
    "save_every": 0.05,
    "model__d_model": 8,
    "model__n_layers": 1,
    "model__n_heads": 2,
    "model__n_kv_heads": 1,
    "model__d_ff": 8,
    "model__subwords": 0,
}


def resident_mb(pid: int) -> float:
    """Resident memory of a process in 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s*(\d+) kB", status)[1]) * 1024 / 1e6


@pytest.mark.faults
@llm
def test_memory_stays_flat_over_20000_steps(reference, tmp_path, record_property):
    folder = copy(reference.fresh, tmp_path / "work")
    process = Attempt(folder, "llm", **LONG).until("train")
    metrics = folder / "runs/a/metrics.jsonl"
    points = [(0, time.monotonic(), 0.0)]  # (step, seconds, resident MB)
    while points[-1][0] < 19_500:
        time.sleep(0.1)
        step = metrics.read_text().count("\n")
        points.append((step, time.monotonic(), resident_mb(process.process.pid)))
    assert process.wait().code == 0, process.errors
    start, early, first, third, last = (
        next(point for point in points if point[0] >= step)
        for step in (0, 2000, 5000, 15_000, 19_500)
    )
    ms = [(b[1] - a[1]) / (b[0] - a[0]) * 1e3 for a, b in [(start, first), (third, last)]]
    line = (
        f"{early[2]:.1f} MB at step {early[0]}, {last[2]:.1f} MB at step {last[0]}; "
        f"{ms[0]:.2f} ms per step in the first quarter, {ms[1]:.2f} ms in the last"
    )
    record_property("table", [line])
    assert last[2] < early[2] + 5, line


@pytest.mark.faults
@llm
def test_a_long_run_killed_in_mid_line_resumes_with_every_step(reference, tmp_path):
    folder = copy(reference.fresh, tmp_path / "work")
    settings = LONG | {"tokens": 2000 * 32}
    Attempt(folder, "llm", Fault(signal.SIGKILL, "save", occurrence=9), **settings).wait()
    path = folder / "runs/a/metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert Attempt(folder, "llm", **settings).wait().code == 0
    with chdir(folder):
        assert [row[0] for row in losses("a")] == list(range(1, 2001))
