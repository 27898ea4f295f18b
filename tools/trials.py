"""Trials of a recipe: read from run folders, checked, compared. The rules are those of docs/CONTRIBUTING.md."""

import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import yaml

from common import UserError, flatten
from metrics import read_metrics

FIGURES = ("val_loss", "val_bpb", "train_loss", "train_seconds", "tokens_per_second", "peak_memory_gb")
NEEDED = (*FIGURES, "tokens", "steps", "params", "seed", "device", "commit", "dirty", "code_sha256", "train_sha256", "val_sha256",
          "tokenizer_sha256", "evaluation_sha256")


@dataclass
class Trial:
    """A finished run of train_llm.py, or what a record keeps of one."""
    path: Path
    config: dict  # flat: {"model.d_ff": 1024, ...}
    summary: dict
    env: dict
    rows: list[dict]

    @property
    def machine(self) -> str:
        return f"{self.summary['device']}, {self.env['cpus']} CPUs, torch {self.env['torch']}"


def load_trials(paths: Iterable[str | Path]) -> list[Trial]:
    """The trials in these folders, or matching these patterns, by seed. Raises UserError."""
    folders = []
    for pattern in map(str, paths):
        found = sorted(p for p in map(Path, glob(pattern)) if p.is_dir())
        if not found:
            raise UserError(f"no run folder matches {pattern}")
        folders += found
    trials = [load_trial(folder) for folder in dict.fromkeys(folders)]
    return sorted(trials, key=lambda trial: trial.summary["seed"])


def load_trial(folder: Path) -> Trial:
    """Raises UserError where the run is not whole."""
    if not (folder / "summary.json").exists():
        known = (folder / "config.yaml").exists()
        raise UserError(f"{folder} is not finished (it has no summary.json): run the command of its trials again"
                        if known else f"{folder} is no run folder (it has no config.yaml)")
    try:
        config = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
        summary, env = (json.loads((folder / name).read_text()) for name in ("summary.json", "env.json"))
        missing = [key for key in NEEDED if key not in summary] + [key for key in ("cpus", "torch", "command") if key not in env]
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{folder} is damaged: {str(error).splitlines()[0]}") from error
    if missing:
        raise UserError(f"{folder} has no {missing[0]} in its summary: only runs of this version's train_llm.py compare")
    for key in FIGURES:
        if not isinstance(summary[key], (int, float)) or not math.isfinite(summary[key]):
            raise UserError(f"{folder} has {key} {summary[key]}: a trial that failed counts, so the recipe fails with it")
    rows = read_metrics(folder)
    last = next((row for row in reversed(rows) if "val_loss" in row), {})
    if (last.get("step"), last.get("val_loss"), last.get("val_bpb")) != tuple(summary[k] for k in ("steps", "val_loss", "val_bpb")):
        raise UserError(f"{folder}: summary.json does not say what the last evaluation in metrics.jsonl says")
    return Trial(folder, config, summary, env, rows)


def column(trials: list[Trial], key: str) -> list[float]:
    return [trial.summary[key] for trial in trials]


def spread(values: list[float]) -> float:
    """Sample standard deviation; of a single value nan."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def trials_table(trials: list[Trial]) -> str:
    """Each trial, then mean and sample standard deviation, as a Markdown table."""
    lines = ["| seed | val loss | bits per byte | train loss | seconds | tokens/s | memory, GB |", "| --- " * 7 + "|"]
    formats = (".4f", ".4f", ".4f", ".1f", ",.0f", ".2f")
    for name, row in [*((t.summary["seed"], [t.summary[key] for key in FIGURES]) for t in trials),
                      ("mean", [statistics.mean(column(trials, key)) for key in FIGURES]),
                      ("sd", [spread(column(trials, key)) for key in FIGURES])]:
        lines.append(f"| {name} | " + " | ".join(f"{v:{f}}" for v, f in zip(row, formats)) + " |")
    return "\n".join(lines) + "\n"
