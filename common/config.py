"""Configuration: dataclass defaults, then a YAML file, then flags; errors as one line."""

import dataclasses
import difflib
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Literal, get_args

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type

RUNS = Path("runs")
STAGES = ("llm", "vqvae", "multimodal")


class UserError(Exception):
    """An input error: one line with the value, the setting or file, and a remedy that works."""


def first_line(error: Exception) -> str:
    """First line of an exception's message without its period, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].removesuffix(".")


class HumanInt(int):
    """An integer that may be written as 300k, 20M, 1B or 1e6. Raises ValueError for other input."""

    def __new__(cls, value):
        if isinstance(value, str):
            value = cls.parse(value)
        elif not isinstance(value, int | float) or value != int(value):
            raise ValueError(f"{value!r} is not an integer")
        return super().__new__(cls, value)

    @staticmethod
    def parse(text: str) -> float:
        match = re.fullmatch(r"(-?\d[\d_]*(?:\.\d+)?(?:e\+?\d+)?)([kMB]?)", text.strip())
        scale = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}
        number = float(match[1]) * scale[match[2]] if match else math.nan
        if not number.is_integer():
            raise ValueError(
                f"{text!r} is not an integer; write for example 500000, 300k, 20M or 1B"
            )
        return number


register_type(HumanInt, serializer=int, deserializer=HumanInt)
set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclasses.dataclass
class RunConfig:
    """Settings that every training script has."""

    run: str = "auto"
    """Name of the run; its folder is runs/NAME. auto: the stage and the current time."""
    resume: bool | str = False
    """Continue --run from its newest checkpoint. If set to a checkpoint folder, start the new run
    --run from that checkpoint, with the settings of the run that saved it; learning rates, weight
    decay and schedule may change, but not the budget, batch size, data or model."""
    seed: int = 0
    """Random seed of the initial weights, the data order and the samples."""
    eval_every: float = 0.25
    """Fraction of the budget between evaluations. 0: evaluate only at the end."""
    save_every: float = 0.1
    """Fraction of the budget between checkpoints. 0: save only at the end."""
    log_every: int | Literal["auto"] = "auto"
    """Steps between printed lines; metrics.jsonl has every step. auto: about 50 lines per run."""
    device: str = "auto"
    """Device to train on: cpu, cuda, cuda:1, mps, xpu, ... auto: the accelerator that PyTorch
    finds, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; master weights stay float32. auto: bfloat16 where the hardware computes it
    faster (most GPUs, CPUs with AMX, AMD CPUs with AVX512-BF16), otherwise float32."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to use torch.compile. auto: on CUDA GPUs, and on a CPU with a C++ compiler if the
    run is long enough to repay the compilation."""
    micro_batch: int | Literal["auto"] = "auto"
    """Sequences (or images) per forward pass of each process. Smaller values use less memory; the
    batch size and the result do not change. auto: as many as fit in GPU memory; on a CPU, about
    1,024 tokens. In train_vqvae.py, auto is the whole batch."""
    gpu_hourly_usd: float = 0.0
    """Price of the machine in US dollars per hour, used for cost_usd in summary.json."""
    wandb: bool = False
    """Whether to log to Weights & Biases as well."""


# Settings that may change when a run is resumed, because they do not affect training. The location
# of the data may change because a run stores hashes of its data.
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
    "sample_prompts",
    "sample_tokens",
    "sample_n",
    "guidance",
    "temperature",
    "top_p",
    "text_source",
    "data.source",
    "data.val_source",
    "data.cache",
    "data.retry_seconds",
}


# ---- parsing
def load_config(
    config_class,
    argv: list[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
):
    """A `config_class` from its defaults, then `--config FILE.yaml`, then flags in `argv`.

    With `--resume`, the config.yaml of the run to continue is applied before the file and the
    flags. The help starts with `prog` and the first paragraph of `description`. Raises UserError.
    """
    description = (description or "").split("\n\n")[0]
    parser = ArgumentParser(
        prog=prog, description=description, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_class_arguments(config_class, as_positional=True)
    positionals = [action.dest for action in parser._actions if not action.option_strings]
    for action in parser._actions:
        if getattr(action, "_typehint", None) in (bool, bool | str):  # --resume: --resume true
            action.nargs, action.const = "?", True
        if action.dest == "run" and positionals == ["run"]:  # without it: the newest run
            action.nargs, action.required, action.default = "?", False, ""
        if action.dest == "runs" and not action.option_strings:  # any number of them
            action.nargs, action.required, action.default, action._typehint = "*", False, [], str
            action.metavar = "RUN"
    argv = files_first(list(sys.argv[1:] if argv is None else argv))
    for word in argv:
        if word.startswith("--config="):
            check_file(Path(word.removeprefix("--config=")), parser)
    try:
        values = parser.parse_args(argv)
        if values.get("resume"):
            run = RUNS / str(values.run)
            if values.resume is not True:
                run = Path(values.resume).resolve().parent.parent
            if (run / "config.yaml").exists():
                known = {action.dest for action in parser._actions}
                check_resumable(run, config_class.stage, known)
                check_file(run / "config.yaml", parser)
                parser.default_config_files = [str(run / "config.yaml")]
            values = parser.parse_args(argv)
        values.pop("config")
        cfg = config_class(**vars(parser.instantiate(values)))
    except (ArgumentError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(one_line(str(error), parser)) from error
    check_values(cfg)
    settings = json.dumps(dataclasses.asdict(cfg), default=str, ensure_ascii=False)
    if redact(settings) != settings:
        raise UserError(
            "the settings contain an access token or a password, which would be stored in the run; "
            "omit it and set HF_TOKEN or WANDB_API_KEY in the environment"
        )
    return cfg


def files_first(argv: list[str]) -> list[str]:
    """The arguments with every `--config FILE` in front, so that flags always override files."""
    files, flags = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            value = next(words, None)
            files.append(word if value is None else f"--config={value}")
        elif word.startswith("--config="):
            files.append(word)
        else:
            flags.append(word)
    return files + flags


def check_file(path: Path, parser: ArgumentParser) -> None:
    """Raises UserError unless a file of settings can be read."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        settings = read_yaml(path)
        groups = {action.dest.split(".")[0] for action in parser._actions if "." in action.dest}
        for group in groups & settings.keys():
            if not isinstance(settings[group], dict):
                raise ValueError(f"{group} contains no settings")
        types = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
        for name, value in flatten(settings).items():  # the parser accepts null for any type
            if value is None and type(None) not in get_args(types.get(name)):
                raise ValueError(f"{name} is null")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--config {path} cannot be read: {reason}; pass a YAML file of NAME: VALUE lines"
        ) from error


def read_yaml(path: Path) -> dict:
    """The settings in a YAML file. Raises OSError, ValueError, RecursionError or YAMLError."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError("it contains no settings")
    return settings


def one_line(message: str, parser: ArgumentParser) -> str:
    """A parser's message as one line; for an unknown setting, it suggests the closest one."""
    message = re.sub(r"Parser key \"(.*?)\":", r"--\1:", message)
    message = message.replace("Not of type HumanInt: ", "")
    message = re.sub(r"Does not validate against any.*?Errors:", "", message, flags=re.S)
    pattern = r"(?:unrecognized arguments: --|does not accept option '|Option ')([\w.]+)"
    unknown = re.search(pattern, message)
    if unknown:
        group = re.search(r"Group '(\w+)'", message)
        name = f"{group[1]}.{unknown[1]}" if group else unknown[1]
        settings = [action.dest for action in parser._actions]
        close = difflib.get_close_matches(name, settings, n=1)
        message += f" - did you mean --{close[0]}?" if close else " - --help lists all settings"
    elif extra := re.search(r"unrecognized arguments: (\S+)", message):
        is_config = extra[1].endswith((".yaml", ".yml"))
        message += (
            f" - did you mean --config {extra[1]}?"
            if is_config
            else (" - put a value with spaces or a pattern such as 'books/*.txt' in quotes")
        )
    return " ".join(message.split())


# ---- entry point
class Interrupted(KeyboardInterrupt):
    """Raised for a signal other than SIGINT that asks the process to stop."""

    def __init__(self, number: int):
        self.number = number


def raise_interrupted(number: int, frame) -> None:
    raise Interrupted(number)


def stop_signals() -> list[int]:
    """The signals that ask this process to stop, except ignored ones (nohup ignores SIGHUP)."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def run_script(main, config_class=None, *, prog=None, description=None) -> None:
    """Call `main` with the config from the command line, or with sys.argv[1:] if `config_class` is
    None.

    A UserError prints one line to standard error and exits with code 2. On SIGINT, SIGTERM and
    SIGHUP, the script cleans up and exits with code 128 + the signal number.
    """
    for number in stop_signals():
        if number != signal.SIGINT:
            signal.signal(number, raise_interrupted)
    try:
        if config_class is None:
            main(sys.argv[1:])
        else:
            main(load_config(config_class, prog=prog, description=description))
    except UserError as error:
        stop(str(error), 2)
    except KeyboardInterrupt as error:
        stop("interrupted", 128 + getattr(error, "number", signal.SIGINT))
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stop("interrupted: standard output was closed", 128 + 13)
    except OSError as error:
        reason = f"{error.filename or 'a file'}: {error.strerror or error}"
        stop(f"{reason}; check the path and the disk", 2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        remedy = "lower --micro_batch (training), --n (generate.py), --batch or --batch_size"
        stop(f"out of memory ({reason}); {remedy}, or use a smaller model", 2)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the device or on the CPU."""
    signs = "can't allocate", "not enough memory", "size calculation overflowed", "Invalid buffer"
    on_device = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return on_device or any(sign in str(error) for sign in signs)


def redact(text: str) -> str:
    """The text with access tokens and passwords redacted: those in the environment, and strings
    that look like one.
    """
    for name, value in os.environ.items():
        if re.search("TOKEN|KEY|SECRET|PASSWORD", name) and len(value) >= 8:
            text = text.replace(value, "[redacted]")
    return re.sub(r"\bhf_\w{20,}|(?<=://)[^/@\s]+(?=@)", "[redacted]", text)


def stop(message: str, code: int):
    """Print a message to standard error and exit with `code`.

    Of several processes that stop for the same reason, only rank 0 prints it.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first and code == 2:  # torchrun ends this process if rank 0 reports the same error
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    if is_first or code == 2:
        print(redact(f"error: {message}" if code == 2 else message), file=sys.stderr)
    sys.exit(code)


# ---- saved configs
def to_plain(cfg) -> dict:
    """The config as nested dicts of numbers and strings, for YAML and for comparison."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def flatten(tree: dict, prefix: str = "") -> dict:
    """{'model': {'d_ff': 8}} -> {'model.d_ff': 8}."""
    flat = {}
    for key, value in tree.items():
        is_tree = isinstance(value, dict)
        flat.update(flatten(value, f"{prefix}{key}.") if is_tree else {f"{prefix}{key}": value})
    return flat


def saved_config(run: Path) -> dict:
    """The config.yaml of a run. Raises UserError if it is damaged or from an earlier version."""
    path = run / "config.yaml"
    try:
        config = read_yaml(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); restore the original file") from error
    if "stage" not in config:
        raise UserError(
            f"{run} was made by an earlier version of this code ({made_by(run)}); "
            "use that version, or train again under another --run"
        )
    if config["stage"] not in STAGES:
        raise UserError(
            f"{path} is damaged (stage {config['stage']!r} is not one of {', '.join(STAGES)}); "
            "restore the original file"
        )
    return config


def check_resumable(run: Path, stage: str, known: set[str]) -> None:
    """Raises UserError if a run is of another stage or has settings that are not in `known`."""
    saved = saved_config(run)
    if saved["stage"] != stage:
        script = f"train_{saved['stage']}.py"
        raise UserError(f"{run} is of stage {saved['stage']}; resume it with {script}")
    check_saved_keys(saved, known, run)


def check_saved_keys(config: dict, known: set[str], run: Path) -> None:
    """Raises UserError if a saved config has settings that this version does not know."""
    groups = {name.split(".")[0] for name in known if "." in name}
    trees = {group: tree for group in groups if isinstance(tree := config.get(group), dict)}
    names = {f"{group}.{key}" for group, tree in trees.items() for key in tree}
    unknown = sorted((names | set(map(str, config))) - known - groups)
    if unknown:
        raise UserError(
            f"{run}/config.yaml sets {unknown[0]}, which this version does not support; use the "
            f"version that made it ({made_by(run)}), or train again under another --run"
        )


def build_from_saved(config_class, values, run: Path):
    """A config dataclass from the values {name: value} that a run saved for it.

    Raises UserError for unknown, missing or invalid settings.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    try:
        if not isinstance(values, dict):
            raise TypeError(f"expected {', '.join(names)}, found {values!r}")
        check_saved_keys(values, set(names), run)
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"it does not set {missing[0]}")
        return config_class(**vars(parser.parse_object(values)))
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(
            f"{run}/config.yaml is not valid ({one_line(str(error), parser)}); "
            f"restore it, or use the version that made it ({made_by(run)})"
        ) from error


def made_by(run: Path) -> str:
    """The commit in a run's env.json, in words."""
    try:
        commit = json.loads((run / "env.json").read_text())["commit"]
    except (OSError, ValueError, KeyError):
        commit = None
    return f"commit {commit}" if commit else "unknown commit"


# ---- checks
def check_values(cfg) -> None:
    """Raises UserError for a number that is not finite or does not fit in 64 bits, and for a NUL
    character, which no path may contain.
    """
    for name, value in flatten(dataclasses.asdict(cfg)).items():
        if isinstance(value, int | float) and not abs(value) < 2**63:  # nan compares as false
            raise UserError(f"--{name} is {value}; use a finite number below 2^63")
        if "\0" in name or (isinstance(value, str) and "\0" in value and name != "prompt"):
            where = name.replace("\0", "NUL")
            raise UserError(f"--{where} is {value!r}; remove the NUL character")


MAX_SETTING = 1e12  # limit for float settings; larger values overflow


def check_positive(cfg, *names: str) -> None:
    for name in names:
        check_range(cfg, name, getattr(cfg, name) > 0, "be positive")


def check_not_negative(cfg, *names: str) -> None:
    for name in names:
        check_range(cfg, name, getattr(cfg, name) >= 0, "not be negative")


def check_fractions(cfg, *names: str) -> None:
    for name in names:
        check_range(cfg, name, 0 <= getattr(cfg, name) <= 1, "be between 0 and 1")


def check_betas(cfg, *names: str) -> None:
    for name in names:
        check_range(cfg, name, 0 <= getattr(cfg, name) < 1, "be at least 0 and less than 1")


def check_range(cfg, name: str, valid: bool, expected: str) -> None:
    """Raises UserError if the setting is not `valid`, not finite or above MAX_SETTING."""
    value = getattr(cfg, name)
    if not valid:
        raise UserError(f"--{name} is {value}; it must {expected}")
    if isinstance(value, float) and not value <= MAX_SETTING:
        raise UserError(f"--{name} is {value}; it must be at most {MAX_SETTING:,.0f}")
