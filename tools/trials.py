"""Trials of a recipe: read from run folders, checked, compared. The rules are those of docs/CONTRIBUTING.md."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import yaml
from scipy.stats import ttest_ind

from common import UserError, flatten
from metrics import read_metrics

FIGURES = (
    "val_loss",
    "val_bpb",
    "train_loss",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_gb",
)
NEEDED = (
    *FIGURES,
    "tokens",
    "steps",
    "params",
    "seed",
    "device",
    "commit",
    "dirty",
    "code_sha256",
    "train_sha256",
    "val_sha256",
    "tokenizer_sha256",
    "evaluation_sha256",
)
FIXED = {
    "training data": "train_sha256",
    "validation set": "val_sha256",
    "tokenizer": "tokenizer_sha256",
    "evaluation": "evaluation_sha256",
}
INCIDENTAL = {
    "run",
    "seed",
    "resume",
    "save_every",
    "eval_every",
    "log_every",
    "wandb",
    "gpu_hourly_usd",
    "sample_prompts",
    "sample_tokens",
    "device",
    "data.cache",
    "data.source",
    "data.val_source",
    "data.tokenizer",
}  # no part of a recipe
BUDGETS = {
    "small": 1_000_000,
    "8M": 8_000_000,
    "20M": 20_000_000,
    "100M": 100_000_000,
    "1B": 1_000_000_000,
}
MAX_PARAMS, SMALL_MAX_PARAMS, MIN_SEEDS = 90_000_000, 7_000_000, 3
P_LOSS = 0.01  # chance at which a loss that is no lower passes for lower
P_TIME = 0.001  # the same of time; stricter, so that both together stay below 2%, and because a machine's speed drifts
P_WORSE = 0.05  # a loss that is higher at this p is not "equal within noise"


@dataclass
class Trial:
    """A finished run of train_llm.py, or what a record keeps of one."""

    path: Path
    config: dict  # flat: {"model.d_ff": 1024, ...}
    summary: dict
    env: dict
    rows: list[dict]
    planned: int  # number of seeds asked for

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
        raise UserError(
            f"{folder} is not finished (it has no summary.json): run the command of its trials again"
            if known
            else f"{folder} is no run folder (it has no config.yaml)"
        )
    try:
        config = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
        summary, env = (
            json.loads((folder / name).read_text()) for name in ("summary.json", "env.json")
        )
        plan = folder / "trials.json"
        planned = json.loads(plan.read_text())["seeds"] if plan.exists() else 0
        missing = [key for key in NEEDED if key not in summary] + [
            key for key in ("cpus", "torch", "command") if key not in env
        ]
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{folder} is damaged: {str(error).splitlines()[0]}") from error
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]} in its summary: only runs of this version's train_llm.py compare"
        )
    for key in FIGURES:
        if not isinstance(summary[key], (int, float)) or not math.isfinite(summary[key]):
            raise UserError(
                f"{folder} has {key} {summary[key]}: a trial that failed counts, so the recipe fails with it"
            )
    rows = read_metrics(folder)
    last = next((row for row in reversed(rows) if "val_loss" in row), {})
    if [last.get(key) for key in ("step", "val_loss", "val_bpb")] != [
        summary[key] for key in ("steps", "val_loss", "val_bpb")
    ]:
        raise UserError(
            f"{folder}: summary.json does not say what the last evaluation in metrics.jsonl says"
        )
    return Trial(folder, config, summary, env, rows, planned)


def column(trials: list[Trial], key: str) -> list[float]:
    return [trial.summary[key] for trial in trials]


def spread(values: list[float]) -> float:
    """Sample standard deviation; of a single value nan."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def trials_table(trials: list[Trial]) -> str:
    """Each trial, then mean and sample standard deviation, as a Markdown table."""
    lines = [
        "| seed | val loss | bits per byte | train loss | seconds | tokens/s | memory, GB |",
        "| --- " * 7 + "|",
    ]
    formats = (".4f", ".4f", ".4f", ".1f", ",.0f", ".2f")
    for name, row in [
        *((t.summary["seed"], [t.summary[key] for key in FIGURES]) for t in trials),
        ("mean", [statistics.mean(column(trials, key)) for key in FIGURES]),
        ("sd", [spread(column(trials, key)) for key in FIGURES]),
    ]:
        lines.append(f"| {name} | " + " | ".join(f"{v:{f}}" for v, f in zip(row, formats)) + " |")
    return "\n".join(lines) + "\n"


def check_side(trials: list[Trial]) -> None:
    """Raises UserError unless these are all the trials, three or more, of one recipe, code and machine."""
    first, seeds = trials[0], [trial.summary["seed"] for trial in trials]
    for before, trial in zip(trials, trials[1:]):
        if before.summary["seed"] == trial.summary["seed"]:
            raise UserError(
                f"{before.path} and {trial.path} have the same seed {trial.summary['seed']}: give each trial once"
            )
    for trial in trials[1:]:
        for key in sorted(first.config.keys() | trial.config.keys()):
            if key not in INCIDENTAL and first.config.get(key) != trial.config.get(key):
                raise UserError(
                    f"{first.path} and {trial.path} are not trials of one recipe: {key} is "
                    f"{first.config.get(key)} and {trial.config.get(key)}"
                )
        for what, a, b in [
            ("code", first.summary["code_sha256"], trial.summary["code_sha256"]),
            ("machine", first.machine, trial.machine),
        ]:
            if a != b:
                raise UserError(f"{first.path} and {trial.path} are not of one {what}: {a} and {b}")
    n = max(trial.planned for trial in trials)
    if missing := sorted(set(range(max(n, seeds[-1] + 1))) - set(seeds)):
        raise UserError(
            f"seed {missing[0]} is missing beside {first.path}: all seeds from 0 count, none is left out"
        )
    if len(trials) < MIN_SEEDS:
        raise UserError(
            f"{first.path} is one of {len(trials)} trials: a comparison needs {MIN_SEEDS} seeds or more on each side"
        )
    if len(set(column(trials, "val_loss"))) < len(trials):
        raise UserError(
            f"{first.path} and its like: two seeds have the same loss to the last digit, so one is a copy"
        )
    budget, params = first.config["tokens"], first.summary["params"]
    if params > (cap := SMALL_MAX_PARAMS if budget == BUDGETS["small"] else MAX_PARAMS):
        raise UserError(f"{first.path} has {params:,} parameters: the cap is {cap:,}")


def check_pair(base: list[Trial], new: list[Trial]) -> None:
    """Raises UserError unless both sides are whole and differ in nothing that is fixed."""
    check_side(base)
    check_side(new)
    a, b = base[0], new[0]
    for trial in new:
        if trial.path.resolve() in [other.path.resolve() for other in base]:
            raise UserError(f"{trial.path} is on both sides")
    for what, x, y in [
        ("budget", a.config["tokens"], b.config["tokens"]),
        ("machine", a.machine, b.machine),
        *((what, a.summary[key], b.summary[key]) for what, key in FIXED.items()),
    ]:
        if x != y:
            raise UserError(f"{a.path} and {b.path} differ in {what}: {x} and {y}")
    scores = [trial.summary["val_bpb"] / trial.summary["val_loss"] for trial in (*base, *new)]
    if max(scores) > min(scores) * (1 + 1e-9):
        raise UserError(
            f"{a.path} and {b.path} differ in the bits per byte that a nat is: not one evaluation"
        )


def changed_settings(base: Trial, new: Trial) -> dict[str, list]:
    """{setting: [before, after]} of what defines the recipe."""
    keys = sorted((base.config.keys() | new.config.keys()) - INCIDENTAL)
    return {
        key: [base.config.get(key), new.config.get(key)]
        for key in keys
        if base.config.get(key) != new.config.get(key)
    }


def lines_of_code(patch: str) -> dict[str, int]:
    """Lines that a git patch adds to and removes from Python files, tests aside."""
    found, counts = {"added": 0, "removed": 0}, False
    for line in patch.splitlines():
        if line.startswith("diff --git "):
            path = line.rpartition(" b/")[2]
            counts = path.endswith(".py") and not path.startswith("tests/")
        elif counts and line[:1] in "+-" and not line.startswith(("+++ ", "--- ")):
            found["added" if line[0] == "+" else "removed"] += 1
    return found


def summarize(trials: list[Trial]) -> dict:
    """n, parameters, and mean and sample standard deviation of each figure."""
    return {"n": len(trials), "params": trials[0].summary["params"]} | {
        key: {"mean": statistics.mean(column(trials, key)), "sd": spread(column(trials, key))}
        for key in FIGURES
    }


def compare(
    base_loss: list[float],
    new_loss: list[float],
    base_seconds: list[float],
    new_seconds: list[float],
) -> dict:
    """Welch's t-test (Biometrika 34, 1947) of losses (nats per token) and of training times, and the verdict.

    p_lower and p_faster are one-sided: how likely a difference like this one is if the new recipe is no better.
    """
    loss = ttest_ind(new_loss, base_loss, equal_var=False)
    low, high = loss.confidence_interval(0.95)
    p_lower = ttest_ind(new_loss, base_loss, equal_var=False, alternative="less").pvalue
    p_faster = ttest_ind(new_seconds, base_seconds, equal_var=False, alternative="less").pvalue
    found = {
        "difference": statistics.mean(new_loss) - statistics.mean(base_loss),
        "ci95": [low, high],
        "p_lower": p_lower,
        "time_ratio": statistics.mean(new_seconds) / statistics.mean(base_seconds),
        "p_faster": p_faster,
    }
    return found | {"improvement": verdict(found)[0]}


def verdict(found: dict) -> tuple[bool, str]:
    """Whether a comparison is an improvement, and why: a lower loss, or an equal one in less time."""
    change, p, ratio, p_time = (
        found[key] for key in ("difference", "p_lower", "time_ratio", "p_faster")
    )
    if p < P_LOSS:
        return True, f"the loss is lower by {-change:.4f} (p = {p:.3g}), in {ratio:.2f} of the time"
    if 1 - p < P_WORSE:
        return (
            False,
            f"the loss is higher by {change:.4f} (p = {1 - p:.3g}), and loss goes before speed",
        )
    if p_time < P_TIME:
        return (
            True,
            f"the loss is equal within noise and training takes {ratio:.2f} of the time (p = {p_time:.3g})",
        )
    return False, (
        f"neither is the loss lower ({change:+.4f}, p = {p:.3g}; needed: below {P_LOSS}) nor training faster "
        f"({ratio:.2f} of the time, p = {p_time:.3g}; needed: below {P_TIME})"
    )


def statistics_of(base: list[Trial], new: list[Trial]) -> dict:
    """Of the new trials and, if there is one, their baseline and the comparison; six significant digits."""
    found = {"new": summarize(new)}
    if base:
        found |= {"base": summarize(base)} | compare(
            *(column(side, key) for key in ("val_loss", "train_seconds") for side in (base, new))
        )
    return json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.6g}"))


def minutes(seconds: float) -> str:
    m, s = divmod(round(seconds), 60)
    return f"{m}m{s:02d}s" if m < 60 else f"{m // 60}h{m % 60:02d}m"


def comparison_table(found: dict) -> str:
    """The statistics of both sides as a Markdown table, then difference and verdict."""
    sides = [side for side in ("base", "new") if side in found]
    titles = {"base": "baseline", "new": "new"}
    rows = [
        ["", *(f"{titles[side]} (n = {found[side]['n']})" for side in sides)],
        ["---"] * (len(sides) + 1),
    ]
    for key, name, form in [
        ("val_loss", "validation loss, nats per token", ".4f"),
        ("val_bpb", "bits per byte", ".4f"),
        ("train_loss", "training loss", ".4f"),
        ("train_seconds", "training, seconds", ".1f"),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("peak_memory_gb", "peak memory, GB", ".2f"),
    ]:
        rows.append(
            [
                name,
                *(f"{found[s][key]['mean']:{form}} ± {found[s][key]['sd']:{form}}" for s in sides),
            ]
        )
    rows.append(["parameters", *(f"{found[side]['params']:,}" for side in sides)])
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
    if "base" in found:
        low, high = found["ci95"]
        good, reason = verdict(found)
        text += (
            f"\nDifference in validation loss: {found['difference']:+.4f} (95% confidence interval {low:+.4f} to "
            f"{high:+.4f}; Welch's t-test, one-sided p = {found['p_lower']:.3g}). Time: {found['time_ratio']:.3f} of "
            f"the baseline's (p = {found['p_faster']:.3g}).\n\n{'Improvement' if good else 'No improvement'}: {reason}.\n"
        )
    return text
