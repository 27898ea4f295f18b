"""Configuration: dataclass defaults, then a YAML file, then flags; errors as one line."""

import dataclasses
import difflib
import json
import math
import re
import sys
from pathlib import Path
from typing import Literal

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type

RUNS = Path("runs")


class UserError(Exception):
    """Wrong input: one line with the value, the place and a remedy that works."""


class HumanInt(int):
    """An integer that may be written as 300k, 20M, 1B or 1e6; otherwise raises ValueError."""

    def __new__(cls, value):
        if isinstance(value, str):
            value = cls.parse(value)
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
    resume: bool = False
    """Continue from the newest checkpoint of --run."""
    seed: int = 0
    """Random seed of the initial weights, the data order and the samples."""
    eval_every: float = 0.25
    """Fraction of the budget between evaluations. 0: evaluate only at the end."""
    save_every: float = 0.1
    """Fraction of the budget between checkpoints. 0: save only at the end."""
    log_every: int | Literal["auto"] = "auto"
    """Steps between printed lines; metrics.jsonl has every step. auto: about 50 lines per run."""
    device: str = "auto"
    """Device to train on: cpu, cuda, cuda:1, ... auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; master weights stay float32. auto: bfloat16 on GPUs with native bfloat16,
    otherwise float32."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to use torch.compile. auto: only on a GPU."""
    micro_batch: int | Literal["auto"] = "auto"
    """Sequences (or images) per forward pass. Smaller values use less memory; the batch size and
    the result do not change. auto: as many as fit in GPU memory; on a CPU, about 1,024 tokens. In
    train_vqvae.py, auto is the whole batch."""
    gpu_hourly_usd: float = 0.0
    """Price of the machine in US dollars per hour, used for cost_usd in summary.json."""
    wandb: bool = False
    """Whether to log to Weights & Biases as well."""


# Settings that may differ when a run is resumed: they do not change what is trained.
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


# ---- parsing
def load_config(
    config_class,
    argv: list[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
):
    """A `config_class` from its defaults, then `--config FILE.yaml`, then flags in `argv`.

    With `--resume`, the run's own config.yaml comes before the file and the flags. `prog` and the
    first paragraph of `description` head the help. Raises UserError.
    """
    description = (description or "").split("\n\n")[0]
    parser = ArgumentParser(
        prog=prog, description=description, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_class_arguments(config_class, as_positional=True)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # --resume alone means --resume true
            action.nargs, action.const = "?", True
        if action.dest == "run" and not action.option_strings:  # without it: the newest run
            action.nargs, action.required, action.default = "?", False, ""
    argv = files_first(list(sys.argv[1:] if argv is None else argv))
    try:
        values = parser.parse_args(argv)
        if values.get("resume"):
            run = RUNS / str(values.run)
            if (run / "config.yaml").exists():
                known = {action.dest for action in parser._actions}
                check_resumable(run, config_class.stage, known)
                parser.default_config_files = [str(run / "config.yaml")]
            values = parser.parse_args(argv)
        values.pop("config")
        return config_class(**vars(parser.instantiate(values)))
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(one_line(str(error), parser)) from error


def files_first(argv: list[str]) -> list[str]:
    """The arguments with every `--config FILE` in front, so that flags always override files."""
    files, flags = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            files += [word, *[value for value in [next(words, None)] if value is not None]]
        elif word.startswith("--config="):
            files.append(word)
        else:
            flags.append(word)
    return files + flags


def one_line(message: str, parser: ArgumentParser) -> str:
    """A parser's message as one line, with the closest setting if an unknown one was given."""
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
    return " ".join(message.split())


# ---- entry point
def run_script(main, config_class=None, *, prog=None, description=None) -> None:
    """Call `main` with the config from the command line, or with its words if there is no class.

    A UserError becomes one line on standard error and exit code 2.
    """
    try:
        if config_class is None:
            main(sys.argv[1:])
        else:
            main(load_config(config_class, prog=prog, description=description))
    except UserError as error:
        stop(str(error), 2)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        remedy = "lower --micro_batch (training), --n (generate.py) or --batch (score_images)"
        stop(f"out of memory ({reason}); {remedy}", 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)


def stop(message: str, code: int):
    """Print a message to standard error and exit with `code`."""
    print(f"error: {message}" if code == 2 else message, file=sys.stderr)
    sys.exit(code)


# ---- saved configs
def to_plain(cfg) -> dict:
    """The config as nested dicts of numbers and strings, for YAML and for comparing."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def flatten(tree: dict, prefix: str = "") -> dict:
    """{'model': {'d_ff': 8}} -> {'model.d_ff': 8}."""
    flat = {}
    for key, value in tree.items():
        is_tree = isinstance(value, dict)
        flat.update(flatten(value, f"{prefix}{key}.") if is_tree else {prefix + key: value})
    return flat


def saved_config(run: Path) -> dict:
    """The config.yaml of a run folder. Raises UserError if an earlier version wrote it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    if not isinstance(config, dict) or "stage" not in config:
        raise UserError(
            f"{run} was made by an earlier version of this code ({made_by(run)}); "
            "use that version, or train again under another --run"
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
    names = {f"{group}.{key}" for group in groups for key in config.get(group) or {}}
    unknown = sorted((names | config.keys()) - known - groups)
    if unknown:
        raise UserError(
            f"{run}/config.yaml sets {unknown[0]}, which this version does not support; use the "
            f"version that made it ({made_by(run)}), or train again under another --run"
        )


def build_from_saved(config_class, values: dict, run: Path):
    """A config dataclass from values saved in a run. Raises UserError for unknown settings."""
    check_saved_keys(values, {field.name for field in dataclasses.fields(config_class)}, run)
    return config_class(**values)


def made_by(run: Path) -> str:
    """The commit in a run's env.json, in words."""
    try:
        commit = json.loads((run / "env.json").read_text())["commit"]
    except (OSError, ValueError, KeyError):
        commit = None
    return f"commit {commit}" if commit else "unknown commit"


# ---- checks
def check_positive(cfg, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name} is {getattr(cfg, name)}; it must be positive")


def check_not_negative(cfg, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name} is {getattr(cfg, name)}; it must not be negative")


def check_fractions(cfg, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"--{name} is {getattr(cfg, name)}; it must be between 0 and 1")
