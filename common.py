"""What the scripts share: configuration, device, schedules, run folder, checkpoints, interruption."""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

RUNS = Path("runs")


class UserError(Exception):
    """What the user asked for cannot be done: one line with value, place and remedy."""


class Count(int):
    """A whole number that may be written 300k, 20M, 1B or 1e6."""

    def __new__(cls, value):
        if isinstance(value, str):
            match = re.fullmatch(r"(-?\d[\d_]*(?:\.\d+)?(?:e\+?\d+)?)([kMB]?)", value.strip())
            number = (
                float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[2]]
                if match
                else math.nan
            )
            if not number.is_integer():
                raise ValueError(
                    f"{value!r} is no count: write a whole number such as 500000, 300k, 20M or 1B"
                )
            value = number
        return super().__new__(cls, value)


register_type(Count, serializer=int, deserializer=Count)
set_parsing_settings(docstring_parse_attribute_docstrings=True)


# -------------------------------------------------------------------------------------------------- configuration
@dataclasses.dataclass
class RunConfig:
    """What every training script takes."""

    run: str = "auto"
    """Name of the run's folder under runs/."""
    resume: bool = False
    """Go on from the run's newest checkpoint."""
    seed: int = 0
    """Of the weights, the order of the data and the samples."""
    eval_every: float = 0.25
    """Share of the budget between evaluations; 0 evaluates at the end only."""
    save_every: float = 0.1
    """Share of the budget between checkpoints; 0 saves at the end only."""
    log_every: int | Literal["auto"] = "auto"
    """Steps between printed lines; auto: some 50 lines a run. metrics.jsonl has every step."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation, weights stay float32; auto: bfloat16 where the device has it."""
    compile: bool | Literal["auto"] = "auto"
    """Use torch.compile; auto: on a GPU."""
    micro_batch: int | Literal["auto"] = "auto"
    """Sequences or pictures a forward pass; less needs less memory, the batch stays the same. auto: chosen here."""
    gpu_hourly_usd: float = 0.0
    """Price of the machine, for cost_usd in summary.json."""
    wandb: bool = False
    """Log to Weights & Biases too."""


# What may differ between a run and its resumption: it changes where and how often, not what is trained.
MACHINE_KEYS = {
    "resume",
    "device",
    "dtype",
    "compile",
    "micro_batch",
    "save_every",
    "eval_every",
    "log_every",
    "wandb",
    "gpu_hourly_usd",
}


def load_config(config_class, argv: list[str] | None = None):
    """The dataclass filled from its defaults, then `--config FILE.yaml`, then flags.

    With `--resume`, the run's own config.yaml comes before the file and the flags. Raises UserError.
    """
    script = sys.modules[config_class.__module__]
    parser = ArgumentParser(
        prog=Path(script.__file__).name,
        description=script.__doc__.split("\n\n")[0],
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the settings below"
    )
    parser.add_class_arguments(config_class, as_positional=True)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # --resume alone means --resume true
            action.nargs, action.const = "?", True
        if action.dest == "run" and not action.option_strings:  # find_run takes the newest
            action.nargs, action.required, action.default = "?", False, ""
    argv, files = list(sys.argv[1:] if argv is None else argv), []
    while at := [
        i for i, word in enumerate(argv) if word.split("=")[0] == "--config"
    ]:  # wherever they stand, flags win
        files += [
            argv.pop(at[0]) for _ in range(1 if "=" in argv[at[0]] else 2) if at[0] < len(argv)
        ]
    try:
        values = parser.parse_args(argv := files + argv)
        if values.get("resume"):
            saved = RUNS / str(values.run) / "config.yaml"
            parser.default_config_files = [str(saved)] if saved.exists() else []
            values = parser.parse_args(argv)
        values.pop("config")
        return config_class(**vars(parser.instantiate(values)))
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(one_line(str(error), parser)) from error


def one_line(message: str, parser: ArgumentParser) -> str:
    """A parser's message on one line, with the nearest key where an unknown one was given."""
    message = re.sub(r"Parser key \"(.*?)\":", r"--\1:", message).replace("Not of type Count: ", "")
    message = re.sub(r"Does not validate against any.*?Errors:", "", message, flags=re.S)
    unknown = re.search(
        r"(?:unrecognized arguments: --|does not accept option '|Option ')([\w.]+)", message
    )
    if unknown:
        group = re.search(r"Group '(\w+)'", message)
        name = f"{group[1]}.{unknown[1]}" if group else unknown[1]
        near = difflib.get_close_matches(name, [action.dest for action in parser._actions], n=1)
        message += (
            f" - did you mean {near[0]}?" if near else " - see --help for the settings there are"
        )
    return " ".join(message.split())


def run_script(config_class, main) -> None:
    """Run main on the command line's configuration, or without a class on its words; a UserError is one line, exit code 2."""
    try:
        main(load_config(config_class) if config_class else sys.argv[1:])
    except UserError as error:
        stop(str(error), 2)
    except torch.OutOfMemoryError as error:
        stop(
            f"out of memory ({str(error).splitlines()[0]}); lower --micro_batch: the batch stays, in more pieces",
            2,
        )
    except KeyboardInterrupt:
        stop("interrupted", 130)


def stop(message: str, code: int):
    print(f"error: {message}" if code == 2 else message, file=sys.stderr)
    sys.exit(code)


def to_plain(cfg) -> dict:
    """The config as plain nested dicts of numbers and strings, for YAML and comparison."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def check_positive(cfg, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name} is {getattr(cfg, name)}: it must be positive")


def check_not_negative(cfg, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name} is {getattr(cfg, name)}: it must not be negative")


def check_shares(cfg, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(
                f"--{name} {getattr(cfg, name)} is no share: it must lie between 0 and 1"
            )


# --------------------------------------------------------------------------------------------------------- device
def resolve_device(cfg) -> torch.device:
    """Replace `auto` in cfg.device, cfg.dtype and, if it has it, cfg.compile by what this machine has; the device."""
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(cfg.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {cfg.device} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    if cfg.dtype == "auto":  # emulated bf16, as on a T4, is slower than fp32
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.dtype = "bfloat16" if native else "float32"
    if getattr(cfg, "compile", None) == "auto":
        cfg.compile = device.type == "cuda"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where something is left in fp32
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = [
        *re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else ""),
        platform.machine(),
    ][0]
    return f"{device.type} ({model}, {torch.get_num_threads()} threads)"


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process held so far: on the GPU if it is on one, else its resident set; in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if Path(
        "/proc/self/status"
    ).exists():  # Linux: ru_maxrss would begin with what the parent process held
        return (
            int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
            * 1024
            / 1e9
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def fitting_sequences(cfg, device: torch.device) -> float:
    """How many sequences of cfg.model a forward and backward pass has room for; elsewhere, how many are fast."""
    m = cfg.model
    if device.type != "cuda":
        return 1024 / m.seq_len  # more outgrows a CPU's caches, docs/LOG.md
    floats = (
        m.seq_len * m.n_layers * (20 * m.d_model + 4 * m.d_ff)
    )  # kept for the backward pass, measured at 88M
    memory = torch.cuda.get_device_properties(device).total_memory
    return 0.6 * memory / (floats * torch.finfo(getattr(torch, cfg.dtype)).bits / 8)


class Clock:
    """Seconds between start() and stop(), summed up; the device's work is waited for."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.device, self.seconds, self.began = device, seconds, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.began = self.now()

    def stop(self) -> None:
        self.seconds += self.now() - self.began


# ------------------------------------------------------------------------------------------------------ schedules
def trapezoid(progress: float, warmup: float, cooldown: float, floor: float) -> float:
    """Learning-rate factor at progress in (0, 1]: up over `warmup`, 1, then straight down to `floor` over `cooldown`.

    Warm-up and cooldown are fractions of the budget (arXiv 2405.18392). The first step has progress 1 / steps, so
    that it is never 0, the last has 1.
    """
    rise = progress / warmup if warmup else 1.0
    fall = floor + (1 - floor) * (1 - progress) / cooldown if cooldown else 1.0
    return min(1.0, rise, fall)


def ramp(progress: float, start: float, end: float, length: float) -> float:
    """From start to end in a straight line over the first `length` of the budget, then end."""
    return start + (end - start) * min(1.0, progress / length) if length else end


def milestones(steps: int, fraction: float) -> set[int]:
    """The steps at which a multiple of `fraction` of the budget is reached, and the last; 0: the last alone."""
    return {steps} | {
        math.ceil(k * fraction * steps - 1e-9)
        for k in range(1, int(1 / fraction) + 1 if fraction else 1)
    }


# ----------------------------------------------------------------------------------------------------- run folder
def check_run(cfg) -> Path:
    """The folder runs/NAME if cfg may use it: a new one, or with cfg.resume one of the same settings. Raises UserError."""
    if cfg.run == "auto":
        if cfg.resume:
            raise UserError("--resume needs the name of a run: --run NAME")
        cfg.run = f"{Path(sys.modules[type(cfg).__module__].__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"\w[\w.+-]*", cfg.run):
        raise UserError(f"--run {cfg.run!r} is no name: use letters, digits, '.', '_', '+', '-'")
    run = RUNS / cfg.run
    if not cfg.resume:
        if run.exists():
            raise UserError(
                f"{run} exists: go on with --resume, choose another --run, or delete the folder"
            )
        return run
    if not (run / "config.yaml").exists():
        raise UserError(f"--resume: there is no run at {run}; leave --resume away to start it")
    now, saved = flatten(to_plain(cfg)), flatten(yaml.safe_load((run / "config.yaml").read_text()))
    for key in now:
        if now[key] != saved.get(key) and key not in MACHINE_KEYS:
            raise UserError(
                f"--resume with --{key} {now[key]}, but {run}/config.yaml has {saved.get(key)}: leave it away, "
                "or start another run"
            )
    return run


def open_run(cfg, run: Path) -> None:
    """Make the folder if need be, with the resolved config.yaml, and note in env.json what runs where."""
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


def flatten(tree: dict, prefix: str = "") -> dict:
    """{'model': {'d_ff': 8}} -> {'model.d_ff': 8}."""
    flat = {}
    for key, value in tree.items():
        flat.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def git_state() -> dict:
    """sha256 of the code that trains, its commit, whether Python files differ from it; the last two None outside git."""
    here = Path(__file__).parent
    code = hashlib.sha256(
        b"".join(p.read_bytes() for p in sorted([*here.glob("*.py"), *here.glob("data/*.py")]))
    ).hexdigest()
    try:
        commit, changes = (
            subprocess.check_output(
                ["git", *command.split()], cwd=here, text=True, stderr=subprocess.DEVNULL
            )
            for command in ("rev-parse HEAD", "status --porcelain -- *.py")
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None, "code_sha256": code}
    return {"commit": commit.strip(), "dirty": bool(changes), "code_sha256": code}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


# ---------------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(
    run: Path,
    model: nn.Module,
    optimizers: list,
    state: dict,
    place: str = "checkpoints",
    keep: int = 2,
) -> None:
    """Write PLACE/STEP under a temporary name, sync, rename; keep the newest of them. state must hold `step`."""
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
    shutil.rmtree(folder, ignore_errors=True)  # one of a run that was resumed from before it
    tmp.rename(folder)
    for old in checkpoints(run, place)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run: Path, place: str = "checkpoints") -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run / place).glob("[0-9]*") if path.is_dir())


def find_run(name: str) -> tuple[Path, Path, dict]:
    """Run folder, checkpoint and config of a run: its name, its folder, one of its checkpoints, or "" for the newest run.

    Of a run that keeps its best weights apart these are taken, otherwise the newest. Raises UserError.
    """
    if not name and (
        newest := max(RUNS.glob("*/checkpoints/[0-9]*"), key=os.path.getmtime, default=None)
    ):
        name = str(newest.parents[1])
        print(f"newest run: {name}", file=sys.stderr)
    path = next((p for p in (RUNS / name, Path(name)) if name and p.is_dir()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in RUNS.glob("*") if p.is_dir())) or "none"
        raise UserError(
            f"there is no run {name!r}; the runs here are: {known}"
            if name
            else "there is no run here yet"
        )
    run = path if (path / "config.yaml").exists() else path.parent.parent
    folder = path if run != path else [None, *checkpoints(run), *checkpoints(run, "best")][-1]
    if folder is None or not (run / "config.yaml").exists():
        raise UserError(f"{path} has no checkpoint: give a run folder or one of its checkpoints")
    return run, folder, yaml.safe_load((run / "config.yaml").read_text())


def load_checkpoint(folder: Path, model: nn.Module, optimizers: list = ()) -> dict:
    """Fill model and optimizers from a checkpoint folder and return its state. Raises UserError."""
    try:
        weights = load_file(folder / "model.safetensors")
        state = json.loads((folder / "state.json").read_text())
        moments = (
            torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
            if optimizers
            else []
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder} is damaged ({reason}): delete it to go on from the one before"
        ) from error
    have = {name: tuple(w.shape) for name, w in weights.items()}
    want = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise UserError(
                f"{folder} is of another shape: {name} is {have.get(name)}, the model's is {want.get(name)}; "
                "set model.* as in the run's config.yaml"
            )
    model.load_state_dict(weights)
    for optimizer, saved in zip(optimizers, moments):
        optimizer.load_state_dict(saved)
    return state


class Interrupt:
    """Within it SIGINT and SIGTERM set `code` for the loop to stop after its step; a second one stops at once."""

    def __enter__(self):
        self.code, self.before = (
            0,
            {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)},
        )
        return self

    def note(self, number: int, frame) -> None:
        self.code = 128 + number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
