"""The run folder runs/NAME: its config, provenance and checkpoints."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from common.config import MACHINE_KEYS, RUNS, UserError, flatten, saved_config, to_plain
from common.device import device_name

ROOT = Path(__file__).parent.parent


# ---- folder
def check_run(cfg) -> Path:
    """The folder of cfg.run: a new one, or with cfg.resume an existing one with the same settings.

    Raises UserError.
    """
    if cfg.run == "auto":
        if cfg.resume:
            raise UserError("--resume needs the name of a run; add --run NAME")
        cfg.run = f"{cfg.stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"\w[\w.+-]*", cfg.run):
        raise UserError(f"--run {cfg.run!r} is not a valid name; use letters, digits, '._+-'")
    run = RUNS / cfg.run
    if not cfg.resume:
        if run.exists():
            raise UserError(f"{run} exists; add --resume, choose another --run or delete it")
        return run
    if not (run / "config.yaml").exists():
        remedy = f"delete {run} and omit --resume" if run.exists() else "omit --resume"
        raise UserError(f"--resume: {run} has no config.yaml; to start a new run, {remedy}")
    now, saved = flatten(to_plain(cfg)), flatten(saved_config(run))
    for key, value in now.items():
        if value != saved.get(key) and key not in MACHINE_KEYS:
            raise UserError(
                f"--{key} is {value}, but {run} was started with {saved.get(key)}; "
                f"omit --{key} or start another run"
            )
    return run


def open_run(cfg, run: Path) -> None:
    """Create the folder with the resolved config if it is new; write env.json either way."""
    if not run.exists():
        (run / "checkpoints").mkdir(parents=True)
        (run / "samples").mkdir()
        plain = {key: value for key, value in to_plain(cfg).items() if key != "resume"}
        write_text(run / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    env = {
        **git_state(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "device": device_name(torch.device(cfg.device)),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    write_text(run / "env.json", json.dumps(env, indent=2))


def git_state() -> dict:
    """The sha256 of the training code, its commit, and whether Python files differ from it.

    Commit and `dirty` are None outside a git checkout.
    """
    files = sorted(
        path for folder in ("", "common/", "data/") for path in ROOT.glob(f"{folder}*.py")
    )
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    def git(*args: str) -> str:
        command = ["git", *args]
        return subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None, "code_sha256": code}
    return {"commit": commit.strip(), "dirty": bool(changes), "code_sha256": code}


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def find_run(name: str) -> tuple[Path, Path, dict]:
    """(run folder, checkpoint, config) of a run's name, its folder or one of its checkpoints.

    "" stands for the newest run. The best weights are taken if the run keeps them, otherwise the
    newest. Raises UserError.
    """
    if not name:
        name = newest_run()
    path = next((p for p in (RUNS / name, Path(name)) if p.is_dir()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in RUNS.glob("*") if p.is_dir())) or "none"
        raise UserError(f"there is no run {name!r}; existing runs: {known}")
    is_run = (path / "config.yaml").exists()
    run = path if is_run else path.parent.parent
    candidates = [*checkpoints(run), *checkpoints(run, "best")] if is_run else [path]
    if not candidates or not (run / "config.yaml").exists():
        raise UserError(f"{path} has no checkpoint; train it first, or pass another run")
    return run, candidates[-1], saved_config(run)


def newest_run() -> str:
    """The folder of the run that saved a checkpoint last. Raises UserError if there is none."""
    saved = max(RUNS.glob("*/checkpoints/[0-9]*"), key=os.path.getmtime, default=None)
    if saved is None:
        raise UserError(f"there is no run in {RUNS}/ yet; train one first")
    print(f"newest run: {saved.parents[1]}", file=sys.stderr)
    return str(saved.parents[1])


# ---- checkpoints
def checkpoints(run: Path, place: str = "checkpoints") -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / place).glob("[0-9]*") if path.is_dir())


def save_checkpoint(
    run: Path,
    model: nn.Module,
    optimizers: list,
    state: dict,
    *,
    place: str = "checkpoints",
    keep: int = 2,
) -> None:
    """Write PLACE/STEP under a temporary name, sync and rename it; keep the newest `keep`.

    `state` must contain `step`.
    """
    folder = run / place / f"{state['step']:07d}"
    tmp = folder.with_name(f".{folder.name}.tmp")
    for leftover in folder.parent.glob(".*.tmp"):
        shutil.rmtree(leftover)
    tmp.mkdir(parents=True)
    save_file(model.state_dict(), tmp / "model.safetensors")
    torch.save([o.state_dict() for o in optimizers], tmp / "optimizer.pt")
    (tmp / "state.json").write_text(json.dumps(state, indent=2))
    for file in tmp.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was resumed from before it
    tmp.rename(folder)
    for old in checkpoints(run, place)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, model: nn.Module, optimizers: list = ()) -> dict:
    """Load a checkpoint folder into model and optimizers; returns its state. Raises UserError."""
    try:
        weights = load_file(folder / "model.safetensors")
        state = json.loads((folder / "state.json").read_text())
        moments = []
        if optimizers:
            file = folder / "optimizer.pt"
            moments = torch.load(file, weights_only=True, map_location="cpu")
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder} is damaged ({reason}); delete it to use the previous checkpoint, or train "
            "again if there is none"
        ) from error
    saved = {name: tuple(w.shape) for name, w in weights.items()}
    expected = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise UserError(
                f"{folder} does not fit the model: {name} has shape {saved.get(name)}, expected "
                f"{expected.get(name)}; set model.* as in the run's config.yaml"
            )
    model.load_state_dict(weights)
    for optimizer, saved_state in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict(saved_state)
    return state


def resume(run: Path, model: nn.Module, optimizers: list) -> dict:
    """Load the newest checkpoint, if there is one; returns its state, at least step and seconds."""
    saved = checkpoints(run)
    if not saved:
        return {"step": 0, "train_seconds": 0.0}
    return load_checkpoint(saved[-1], model, optimizers)
