"""The run folder runs/NAME: its config, provenance and checkpoints."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from common.config import (
    MACHINE_KEYS,
    RUNS,
    UserError,
    first_line,
    flatten,
    made_by,
    redact,
    saved_config,
    to_plain,
)
from common.device import device_name
from common.disk import file_sha256, sha256_of, write_text
from common.distributed import rank, same_on_all

ROOT = Path(__file__).parent.parent


# ---- folder
def check_run(cfg) -> Path:
    """The folder of cfg.run: a new one, or with --resume an existing one whose settings match cfg.

    Only rank 0 checks it. Raises UserError.
    """
    if cfg.run == "auto":
        if cfg.resume:
            raise UserError("--resume needs the name of a run; add --run NAME")
        cfg.run = same_on_all(f"{cfg.stage}-{time.strftime('%Y%m%d-%H%M%S')}")
    if rank():
        return RUNS / cfg.run
    if not re.fullmatch(r"\w[\w.+-]{0,99}", cfg.run):
        raise UserError(
            f"--run {cfg.run!r} is not a valid name; use up to 100 letters, digits and '._+-'"
        )
    run = RUNS / cfg.run
    if cfg.resume is not True:
        if run.exists():
            remedy = "add --resume, choose another --run or delete it"
            if cfg.resume:
                remedy = "name the run that is to start from the checkpoint: --run NEW_NAME"
            raise UserError(f"{run} exists; {remedy}")
        if cfg.resume:
            check_same_settings(cfg, branch_parent(cfg), FIXED_IN_BRANCH)
        return run
    if not (run / "config.yaml").exists():
        remedy = f"delete {run} and omit --resume" if run.exists() else "omit --resume"
        raise UserError(f"--resume: {run} has no config.yaml; to start a new run, {remedy}")
    check_same_settings(cfg, run, r"(?!run$).*")
    lock_run(run).release()  # fail now rather than after data preparation
    return run


# Settings (a regular expression) that a run started from another run's checkpoint must share with
# it: they define what a step is and which model the weights fit.
FIXED_IN_BRANCH = r"stage|tokens|images|sequences|batch_\w+|crop|text_frac|data\..*|model\..*"


def check_same_settings(cfg, run: Path, pattern: str) -> None:
    """Raises UserError if a setting that matches the pattern differs from the run's, apart from
    MACHINE_KEYS.
    """
    now, saved = flatten(to_plain(cfg)), flatten(saved_config(run))
    for key, value in now.items():
        if key in MACHINE_KEYS or not re.fullmatch(pattern, key) or value == saved.get(key):
            continue
        if key not in saved:
            raise UserError(
                f"{run}/config.yaml has no {key}; restore it, or use the version that made the run "
                f"({made_by(run)})"
            )
        remedy = "start another run"
        if not re.fullmatch(FIXED_IN_BRANCH, key) and (last := checkpoints(run)[-1:]):
            remedy = f"start a new run from a checkpoint: --resume {last[0]} --run NEW_NAME"
        raise UserError(
            f"--{key} is {value}, but {run} was started with {saved[key]}; omit --{key} or {remedy}"
        )


def branch_parent(cfg) -> Path:
    """The run that saved the checkpoint cfg.resume. Raises UserError."""
    checkpoint = Path(cfg.resume)
    run = checkpoint.parent.parent
    if not checkpoint.is_dir() or not (run / "config.yaml").exists():
        raise UserError(
            f"--resume {cfg.resume} is not a checkpoint; pass runs/NAME/checkpoints/STEP, or "
            "--resume alone to continue --run"
        )
    return run


def origin(cfg, run: Path) -> Path | None:
    """The run that cfg continues: `run`, the run of the checkpoint cfg.resume, or None."""
    if cfg.resume is True:
        return run
    return branch_parent(cfg) if cfg.resume else None


def lock_run(folder: Path) -> FileLock:
    """The acquired lock of a run folder; the system releases it when the process ends.

    Raises UserError if another process has it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process is training {folder}; wait until it ends, or choose another --run"
        ) from None
    return lock


def is_locked(folder: Path) -> bool:
    """Whether a process that is alive has the lock of a run folder."""
    try:
        lock_run(folder).release()
    except UserError:
        return True
    return False


def open_run(cfg, run: Path, assets: Callable[[Path], None]) -> FileLock:
    """Lock the run. If it is new, first create its folder with its config and what `assets` writes.

    A new folder appears under its name only when it is complete. Files that a killed process left
    half-written are removed. Raises UserError.
    """
    if cfg.resume is True:
        lock = lock_run(run)
    else:
        folder = RUNS / f".{run.name}.tmp"
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_run(folder)
        try:
            with writing(run, run):
                fill_run(cfg, folder, assets)
                folder.rename(run)
        except BaseException:
            lock.release()
            shutil.rmtree(folder)
            raise
    for leftover in (*run.glob("*.tmp"), *run.glob("*/*.tmp")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    write_environment(cfg, run)
    return lock


def fill_run(cfg, folder: Path, assets: Callable[[Path], None]) -> None:
    """Write everything that a new run folder starts with."""
    for leftover in folder.iterdir():  # left by a process that was killed while writing it
        if leftover.name != ".lock":
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    (folder / "checkpoints").mkdir()
    (folder / "samples").mkdir()
    plain = {k: v for k, v in to_plain(cfg).items() if k != "resume" or v}
    write_text(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    write_environment(cfg, folder)
    assets(folder)


def write_environment(cfg, run: Path) -> None:
    """Write env.json: the machine, code and command of the process that starts or resumes a run."""
    env = {
        **git_state(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "device": device_name(torch.device(cfg.device)),
        "command": [Path(sys.argv[0]).name, *map(redact, sys.argv[1:])],
    }
    write_text(run / "env.json", json.dumps(env, indent=2))


def git_state() -> dict:
    """The sha256 of the training code, its commit, and whether the code differs from it.

    Commit and `dirty` are None outside a git checkout.
    """
    files = sorted(
        path for folder in ("", "common/", "data/") for path in ROOT.glob(f"{folder}*.py")
    )
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    def git(*args: str) -> str:
        # without the optional locks, a kill cannot leave .git/index.lock behind
        command = ["git", "--no-optional-locks", *args]
        return subprocess.check_output(command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)

    try:
        code_files = [f":(glob){folder}*.py" for folder in ("", "common/", "data/")]
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--", *code_files)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None, "code_sha256": code}
    return {"commit": commit.strip(), "dirty": bool(changes), "code_sha256": code}


def find_run(name: str) -> tuple[Path, Path, dict]:
    """(run folder, checkpoint, config) for a run's name, its folder or one of its checkpoints.

    "" means the newest run. Of a run, uses the best checkpoint if there is one, otherwise the
    newest. Raises UserError.
    """
    if not name:
        name = newest_run()
    path = next((p for p in (RUNS / name, Path(name)) if p.is_dir()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in RUNS.glob("*") if p.is_dir())) or "none"
        raise UserError(f"there is no run {name!r}; existing runs: {known}")
    if (path / "config.json").exists():
        raise UserError(f"{path} is an exported folder; pass the run that it was made from")
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

    `state` must contain `step`. Raises UserError if the disk is full.
    """
    folder = run / place / f"{state['step']:07d}"
    tmp = folder.with_name(f".{folder.name}.tmp")
    with writing(run, folder):
        remove_temporary(folder.parent)
        tmp.mkdir(parents=True)
        save_file(model.state_dict(), tmp / "model.safetensors")
        if optimizers:
            save_states([o.state_dict() for o in optimizers], tmp / "optimizer.pt")
        for file in tmp.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        hashes = {file.name: file_sha256(file) for file in sorted(tmp.iterdir())}
        hashes["state.json"] = sha256_of(state)
        write_text(tmp / "state.json", json.dumps(state | {"sha256": hashes}, indent=2))
        if folder.exists():  # left by a run that was resumed from an earlier checkpoint
            folder.rename(folder.with_name(f".{folder.name}.old.tmp"))
        tmp.rename(folder)
        for old in checkpoints(run, place)[:-keep]:  # a kill must not leave a partial checkpoint
            old.rename(old.with_name(f".{old.name}.old.tmp"))
        remove_temporary(folder.parent)


def save_states(states: list[dict], path: Path) -> None:
    """torch.save that raises OSError if the file cannot be written."""
    try:
        torch.save(states, path)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # its writer has several messages for a full disk
        raise OSError(errno.EIO, "the file could not be written completely") from error


def remove_temporary(folder: Path) -> None:
    """Remove incomplete and obsolete checkpoints from a folder of checkpoints."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)


@contextmanager
def writing(run: Path, path: Path) -> Iterator[None]:
    """Convert errors from writing `path` into a UserError that says how to continue the run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        remove_temporary(path.parent)
        kept, then = "", "start the run again"
        if run.exists():
            then = f"continue with --run {run.name} --resume"
        if saved := checkpoints(run):
            kept = f" (the last checkpoint, {saved[-1]}, is intact)"
        raise UserError(
            f"cannot write {path}: {reason}{kept}; free disk space or fix the permissions, then "
            f"{then}"
        ) from error


def load_checkpoint(folder: Path, model: nn.Module, optimizers: list = ()) -> dict:
    """Load a checkpoint folder into model and optimizers; returns its state.

    Raises UserError, including when a file has changed since it was saved.
    """
    names = ["model.safetensors", "optimizer.pt"][: 2 if optimizers else 1]
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if "sha256" not in state:
            raise UserError(earlier_version(folder))
        hashes = state.pop("sha256")
        found = {name: file_sha256(folder / name) for name in names}
        for name, value in {**found, "state.json": sha256_of(state)}.items():
            if value != hashes[name]:
                raise ValueError(f"the sha256 of {name} differs from the one in state.json")
        if int(folder.name) != state["step"]:
            raise ValueError(f"state.json says step {state['step']}")
        weights = load_file(folder / "model.safetensors")
        moments = []
        if optimizers:
            file = folder / "optimizer.pt"
            moments = torch.load(file, weights_only=True, map_location="cpu")
    except UserError:
        raise
    except Exception as error:  # the parsers raise many exception types
        raise UserError(damage_message(folder, error)) from error
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
        groups = [{**group} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved_state)
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)  # this run's learning rates, even if it started from another run
    return state


def earlier_version(checkpoint: Path) -> str:
    """That a checkpoint is too old for this code, and what to do about it."""
    return (
        f"{checkpoint} was saved by an earlier version of this code "
        f"({made_by(checkpoint.parent.parent)}); use that version, or train again under another "
        "--run"
    )


def damage_message(folder: Path, error: Exception) -> str:
    """What is wrong with a checkpoint, and what to do about it."""
    reason = first_line(error)
    if isinstance(error, KeyError):
        reason = f"state.json has no {error}"
    run = folder.parent.parent
    earlier = [path for path in checkpoints(run, folder.parent.name) if path.name < folder.name]
    remedy = f"delete it to use {earlier[-1]}" if earlier else f"delete {run} and train again"
    if run.name == "vqvae" and not earlier:  # the copy in a multimodal run
        remedy = f"delete {run} to copy it from --vqvae again"
    return f"{folder} is damaged ({reason}); {remedy}"


# ---- resume
INPUTS = {  # what a run is trained on: (its name in messages, the setting that selects it)
    "train": ("training data", "--data.source"),
    "val": ("validation data", "--data.val_source or --data.source"),
    "tokenizer": ("tokenizer", "the run's tokenizer folder"),
    "vqvae": ("VQ-VAE", "--vqvae"),
    "text": ("plain text", "--text_source"),
}


def resume(
    cfg,
    run: Path,
    model: nn.Module,
    optimizers: list,
    inputs: Callable[[int], dict[str, str]],
) -> dict:
    """Load the checkpoint that cfg.resume asks for; returns the state of the run.

    The state has step, train_seconds, data_wait_seconds, seconds_to_first_step, `inputs` (hashes of
    what the run is trained on up to a step, a function of that step), `recipe` (hash of its
    settings) and `code` (every version of the code that trained it, with its first step). Raises
    UserError if the checkpoint was trained on different inputs or, when continuing the same run,
    with different settings.
    """
    settings = flatten(to_plain(cfg)).items()
    recipe = sha256_of({k: v for k, v in settings if k not in MACHINE_KEYS and k != "run"})
    state = {"step": 0, "train_seconds": 0.0, "data_wait_seconds": 0.0, "code": []}
    state["seconds_to_first_step"] = None
    saved = checkpoints(run)[-1:] if cfg.resume is True else [Path(p) for p in [cfg.resume] if p]
    if saved:
        (folder,) = saved
        state = load_checkpoint(folder, model, optimizers)
        if "data_wait_seconds" not in state:
            raise UserError(earlier_version(folder))
        for name, value in inputs(state["step"]).items():
            what, setting = INPUTS[name]
            if state["inputs"].get(name) != value:
                raise UserError(
                    f"the {what} is not what {folder} was trained on; restore {setting} as it was, "
                    "or train again under another --run"
                )
        if cfg.resume is True and state["recipe"] != recipe:
            raise UserError(
                f"{run}/config.yaml or {folder} has changed since it was saved; restore it, or "
                "train again under another --run"
            )
    return state | {"inputs": inputs(state["step"]), "recipe": recipe, "code": code_history(state)}


def code_history(state: dict) -> list[dict]:
    """The versions of the code that trained a run, each with the last step before it."""
    history, now = state["code"], git_state()
    if history and history[-1]["code_sha256"] == now["code_sha256"]:
        return history
    if history:
        before = f"{history[-1]['commit']} to {now['commit']}"
        print(f"note: the code has changed since step {state['step']} ({before})", flush=True)
    return [*history, {**now, "step": state["step"]}]
