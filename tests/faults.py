"""Kill training and fill its disk for real, at chosen moments.

A fork server imports everything once. Every attempt to train is a forked process, so that a kill
costs a fraction of a second. It announces its phases to the tests, and counts its file operations.
"""

import ctypes
import inspect
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from helpers import MODULES, ROOT, flags_of, losses, sentences, write_jsonl
from PIL import Image
from safetensors.torch import load_file

import common.device
import common.loop
import data.text
from common.config import run_script
from common.metrics import Metrics, evaluations
from common.run import checkpoints

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = [  # what else would be imported again in every attempt
    "datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch._dynamo",
    "transformers.models.auto",
]
FORKS.set_forkserver_preload(["faults", *PRELOADED])
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])

PHASES = ("prepare", "train", "log", "save", "evaluate", "finish")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FULL_DISK = 0  # a fault that is no signal
WEIGHTS = ("model.safetensors", "optimizer.pt")
TIMEOUT = 120  # seconds without news from an attempt

PETS = {"data__source": "pets", "data__val_fraction": 0.3}
SETTINGS = {
    "llm": {},
    "vqvae": {**PETS, "images": 160},
    "multimodal": {
        **PETS,
        "vqvae": "v",
        "sequences": 80,
        "text_frac": 0.25,
        "text_source": "corpus.jsonl",
        "model__vocab_size": 318,
    },
}


@dataclass
class Fault:
    """A signal number, or FULL_DISK, at a moment.

    The moment is the start of the `occurrence`-th `phase` ("": the process) and then `delay`
    seconds later or, if it is None, at the `operation`-th file operation on a path that contains
    `path` (0: at once).
    """

    action: int
    phase: str = ""
    occurrence: int = 1
    operation: int = 0
    path: str = ""
    delay: float | None = None


# ---- in the forked process
class Announcer:
    """Announces phases as (phase, file operations in the one before) and brings the fault about."""

    def __init__(self, parent, fault: Fault | None):
        self.parent, self.fault, self.phase, self.operations = parent, fault, "prepare", 0
        self.seen, self.armed, self.n_matching = Counter(), False, 0

    def enter(self, phase: str) -> None:
        self.parent.send((phase, self.operations))
        self.phase, self.operations = phase, 0
        self.seen[phase] += 1
        fault = self.fault
        if fault and fault.delay is None and fault.phase in ("", phase):
            self.armed = self.armed or not fault.phase or self.seen[phase] == fault.occurrence
            if self.armed and fault.operation == 0:
                self.act()

    def act(self) -> None:
        fault, self.fault, self.armed = self.fault, None, False
        if fault.action == FULL_DISK:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        else:
            self.parent.send(("fault", self.operations))
            os.kill(os.getpid(), fault.action)

    def audit(self, event: str, args: tuple) -> None:
        """Count what creates, renames and deletes files."""
        if event == "open":
            relevant = not isinstance(args[0], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            relevant = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if not relevant:
            return
        self.operations += 1
        if self.armed and self.fault.path in os.fsdecode(args[0]):
            self.n_matching += 1
            if self.n_matching == self.fault.operation:
                self.act()

    def around(self, phase: str, function: Callable) -> Callable:
        def announced(*args, **kwargs):
            before = self.phase
            self.enter(phase)
            result = function(*args, **kwargs)
            self.enter(before)
            return result

        return announced

    def announce(self, module) -> None:
        """Make a stage announce its phases."""
        training_loop = module.training_loop

        @contextmanager
        def announced(*args, **kwargs):
            call = inspect.signature(training_loop).bind(*args, **kwargs)
            call.arguments["evaluate"] = self.around("evaluate", call.arguments["evaluate"])
            with training_loop(*call.args, **call.kwargs) as after_step:
                self.enter("train")
                yield after_step
            self.enter("finish")

        module.training_loop = announced
        common.loop.save_checkpoint = self.around("save", common.loop.save_checkpoint)
        Metrics.log = self.around("log", Metrics.log)


def obey_permissions() -> None:
    """Make root obey file permissions as others do: give up all capabilities, see capset(2)."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


def attempt(folder: Path, stage: str, argv: list[str], parent, errors, fault, obeys, env) -> None:
    """Run a stage's script as its command line does, with standard error sent to the tests."""
    os.chdir(folder)
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors.fileno(), 2)
    if obeys and os.getuid() == 0:
        obey_permissions()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # both may have been ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    data.text.SHARD_TOKENS, data.text.BATCH_DOCUMENTS = 2000, 16  # several shards
    # measuring takes longer than the training
    common.device.matmul_flops = lambda device, dtype: 1e12
    module, name = MODULES[stage], f"train_{stage}.py"
    sys.argv = [name, *argv]
    announcer = Announcer(parent, fault)
    announcer.announce(module)
    sys.addaudithook(announcer.audit)

    def main(cfg) -> None:
        announcer.enter("prepare")
        module.main(cfg)

    run_script(main, module.Config, prog=name, description=module.__doc__)


# ---- in the tests
class Attempt:
    """A forked process that trains in `folder`, disturbed by a Fault if there is one. With `obeys`
    it has no more rights than the permissions of files give it. `env` is added to its environment.

    Attributes after `wait`: `code`, its exit code as a shell gives it; `errors`, its standard
    error; `phase`, where the fault happened (None: it did not); `log`, [phase, its start in
    seconds, its file operations] of every phase.
    """

    def __init__(
        self, folder: Path, stage: str, fault: Fault | None = None, obeys=False, env=(), **changes
    ):
        self.stage, self.fault, self.phase, self.log = stage, fault, None, []
        resume = {"resume": "true"} if (folder / "runs/a").exists() else {}
        settings = SETTINGS[stage] | {"run": "a"} | resume | changes
        argv = flags_of(MODULES[stage], **settings)
        self.messages, to_parent = FORKS.Pipe(duplex=False)
        self.stderr, to_stderr = FORKS.Pipe(duplex=False)
        args = (folder, stage, argv, to_parent, to_stderr, fault, obeys, dict(env))
        with mock.patch.dict(os.environ, PYTHONPATH=PATHS):  # for the preloading
            forkserver.ensure_running()
        self.process = FORKS.Process(target=attempt, args=args)
        self.process.start()
        to_parent.close()
        to_stderr.close()

    def next_phase(self) -> str | None:
        """The next phase announced, None at the end; after the fault, "fault"."""
        if not self.messages.poll(TIMEOUT):
            self.process.kill()
            raise TimeoutError(f"{self.stage} hangs in {self.log[-1:]}, {self.fault}")
        try:
            phase, operations = self.messages.recv()
        except EOFError:
            return None
        if phase == "fault":
            self.phase = self.log[-1][0]
            return phase
        if self.log:
            self.log[-1][2] = operations
        self.log.append([phase, time.monotonic(), 0])
        return phase

    def until(self, phase: str) -> "Attempt":
        """Wait until a phase begins, or for "fault"."""
        while self.next_phase() != phase:
            assert self.process.exitcode is None, os.read(self.stderr.fileno(), 10_000).decode()
        return self

    def kill(self) -> None:
        """Send the fault's signal after its delay, unless the process has ended by then."""
        time.sleep(self.fault.delay)
        while self.messages.poll():
            if self.next_phase() is None:
                return
        self.phase = self.log[-1][0]
        self.send(self.fault.action)

    def send(self, number: int) -> None:
        try:
            os.kill(self.process.pid, number)
        except ProcessLookupError:
            self.phase = None

    def wait(self) -> "Attempt":
        n_seen, fault = 0, self.fault
        while phase := self.next_phase():
            if fault and fault.delay is not None and phase == fault.phase:
                n_seen += 1
                if n_seen == fault.occurrence:
                    self.kill()
        self.process.join(TIMEOUT)
        code = self.process.exitcode
        self.code = 128 - code if code < 0 else code
        chunks = iter(lambda: os.read(self.stderr.fileno(), 1 << 16), b"")
        self.errors = b"".join(chunks).decode(errors="replace")
        return self


def workspace(folder: Path, stage: str) -> Path:
    """A folder with corpus.jsonl, pets/ and, if the stage needs it, the VQ-VAE runs/v."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "corpus.jsonl", sentences(300))
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / f"pets/{'abc'[i % 3]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    if stage == "multimodal":
        done = Attempt(folder, "vqvae", run="v").wait()
        assert done.code == 0, done.errors
        shutil.rmtree(folder / "cache")
    return folder


def copy(folder: Path, target: Path) -> Path:
    """A copy with the same times, so that prepared data has the same names in both."""
    return Path(shutil.copytree(folder, target))


def tree(folder: Path) -> Counter:
    """The files below a folder and how many there are of each, without locks and shards. The
    numbers of checkpoints are left out, because a stopped run saved one more.
    """
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()]
    ignored = re.compile(r"(^|/)\.[^/]*lock$|tokens/.*/\d+\.bin$")
    kept = [path for path in paths if not ignored.search(path)]
    return Counter(re.sub(r"/checkpoints/\d+/", "/checkpoints/STEP/", path) for path in kept)


def outcome(folder: Path, run: str = "a") -> dict:
    """What must not depend on faults: steps, losses, evaluations, the weights and optimizers."""
    with chdir(folder):
        path = Path("runs") / run
        newest = checkpoints(path)[-1]
        files = {name: (newest / name).read_bytes() for name in WEIGHTS}
        return {"losses": losses(run), "evaluations": evaluations(path), **files}


@contextmanager
def chdir(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def damaged(folder: Path) -> list[str]:
    """The listed checkpoints of runs/a that cannot be loaded."""
    bad, run = [], folder / "runs/a"
    for path in checkpoints(run) + checkpoints(run, "best"):
        try:
            json.loads((path / "state.json").read_text())
            load_file(path / "model.safetensors")
            if path.parent.name != "best":
                torch.load(path / "optimizer.pt", weights_only=True)
        except Exception as error:
            bad.append(f"{path.parent.name}/{path.name} is listed but damaged: {error}")
    return bad


@dataclass
class Reference:
    """A stage, a fresh folder for it, and what an undisturbed run makes of it."""

    stage: str
    fresh: Path
    folder: Path
    log: list

    @classmethod
    def make(cls, stage: str, folder: Path) -> "Reference":
        fresh = workspace(folder / "fresh", stage)
        whole = copy(fresh, folder / "whole")
        done = Attempt(whole, stage).wait()
        assert done.code == 0, done.errors
        return cls(stage, fresh, whole, [*done.log, ["end", time.monotonic(), 0]])

    def moment(self, rng: random.Random, phase: str, action: int) -> Fault:
        """A random moment of a phase: its start, just before a file operation, or any time."""
        pairs = zip(self.log[:-1], self.log[1:], strict=True)
        spans = [(after[1] - now[1], now[2]) for now, after in pairs if now[0] == phase]
        occurrence = rng.randint(1, min(3, len(spans)))
        seconds, operations = spans[occurrence - 1]
        if rng.random() < 0.5:
            return Fault(action, phase, occurrence, operation=rng.randint(0, operations))
        return Fault(action, phase, occurrence, delay=rng.uniform(0, seconds))

    def differences(self, folder: Path) -> list[str]:
        ours, theirs = outcome(folder), outcome(self.folder)
        return [
            f"{key} differ from the undisturbed run" for key in ours if ours[key] != theirs[key]
        ]


@dataclass
class Tally:
    """Kills by phase and signal, and what went wrong."""

    kills: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)

    def problems(self) -> str:
        return "\n".join(self.lost + self.leftovers + self.exits)

    def rows(self, stage: str) -> list[str]:
        """Lines of a table: kills by phase and signal, and what went wrong."""
        names = [signal.Signals(number).name for number in SIGNALS]
        rows = [["kills", *names, "all"]]
        for phase in PHASES:
            counts = [self.kills[phase, number] for number in SIGNALS]
            rows.append([phase, *counts, sum(counts)])
        lines = [f"{stage:12}" + "".join(f"{cell!s:>10}" for cell in row) for row in rows]
        wrong = f"{len(self.lost)} runs lost, {len(self.leftovers)} leftover files"
        return [*lines, f"{stage:12}{wrong}, {len(self.exits)} wrong exits"]


def wrong_exit(done: Attempt, folder: Path) -> str | None:
    """What is wrong with how a process ended after a signal; None if nothing is."""
    number, lines = done.fault.action, done.errors.splitlines()
    if number == signal.SIGKILL or (done.code == 0 and done.phase in ("evaluate", "finish")):
        return None
    if done.code != 128 + number or len(lines) != 1:
        return f"exit code {done.code}, standard error {lines[-3:]}"
    with chdir(folder):
        saved, rows = checkpoints(Path("runs/a")), losses("a")
    steps = [int(path.name) for path in saved], [row[0] for row in rows]
    if done.phase not in ("prepare", "finish") and steps[0][-1:] != steps[1][-1:]:
        return f"steps {steps[1][-1:]} are done, but {steps[0]} are saved: {lines[0]}"
    return None


def survive(reference: Reference, folder: Path, faults: list[Fault], tally: Tally) -> None:
    """Train in `folder` with one kill after the other, then to the end; count in the tally."""
    copy(reference.fresh, folder)
    history, attempts = [], []
    for fault in [*faults, None]:
        done = Attempt(folder, reference.stage, fault).wait()
        attempts.append(done)
        if done.phase:
            history.append(f"{done.phase} {signal.Signals(fault.action).name} {fault}")
            tally.kills[done.phase, fault.action] += 1
            wrong = wrong_exit(done, folder)
            tally.exits += [f"{reference.stage} {history}: {wrong}"] if wrong else []
            tally.lost += [f"{reference.stage} {history}: {bad}" for bad in damaged(folder)]
        if (folder / "runs/a/summary.json").exists():
            break
    if attempts[-1].code and not attempts[-1].phase:
        tally.lost.append(f"{reference.stage} {history}: {attempts[-1].errors.strip()[-500:]}")
        return
    tally.lost += [f"{reference.stage} {history}: {d}" for d in reference.differences(folder)]
    ours, theirs = tree(folder), tree(reference.folder)
    left = [*(ours - theirs), *(theirs - ours)]
    tally.leftovers += [f"{reference.stage} {history}: {path}" for path in left]
    shutil.rmtree(folder)
