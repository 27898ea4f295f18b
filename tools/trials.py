"""Trials of a recipe: load, check and compare them. docs/CONTRIBUTING.md states the rules."""

import json
import math
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from glob import glob
from itertools import pairwise
from pathlib import Path

import yaml
from scipy.stats import t as student_t
from scipy.stats import ttest_ind

from common.config import UserError, first_line, flatten
from common.disk import file_sha256
from common.metrics import evaluations

MEASURES = {  # key in summary.json: (title in tables, number format)
    "val_loss": ("validation loss, nats per token", ".4f"),
    "val_bpb": ("bits per byte", ".4f"),
    "train_loss": ("training loss", ".4f"),
    "train_seconds": ("training time, seconds", ".1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "peak_memory_gb": ("peak memory, GB", ".2f"),
}
FIXED = {  # what the two sides of a comparison must share: key in summary.json
    "training data": "train_sha256",
    "validation set": "val_sha256",
    "tokenizer": "tokenizer_sha256",
    "evaluation": "evaluation_sha256",
}
SCHEMA = {  # what the files of a trial must contain: {file: {key: type}}
    "config.yaml": {"tokens": int},
    "summary.json": {
        **dict.fromkeys(MEASURES, int | float),
        **dict.fromkeys(FIXED.values(), str),
        **dict.fromkeys(("tokens", "steps", "params", "val_tokens"), int),
        "seed": int,
        "device": str,
        "commit": str | None,
        "dirty": bool | None,
        "code_sha256": str,
    },
    "env.json": {"cpus": int, "torch": str, "command": list},
}
NON_RECIPE_SETTINGS = {  # settings that are not part of a recipe
    "stage",
    "run",
    "seed",
    "init_from",
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
}
BUDGETS = {
    "small": 1_000_000,
    "8M": 8_000_000,
    "20M": 20_000_000,
    "100M": 100_000_000,
    "1B": 1_000_000_000,
}
MAX_PARAMS, SMALL_MAX_PARAMS, MIN_SEEDS, MAX_SEEDS = 90_000_000, 7_000_000, 3, 1000
MIN_PAIRS = 5  # seeds on both sides that a paired test needs; docs/LOG.md 2026-11-28
P_LOSS = 0.01  # the probability of accepting a loss that is not lower
# The probability of accepting a training time that is not lower. It is stricter so that both
# together stay below 2%, and because a machine's speed drifts.
P_TIME = 0.001
P_WORSE = 0.05  # a loss that is higher at this p is not "equal within noise"


@dataclass
class Trial:
    """A finished run of train_llm.py, or the part of it that a record stores."""

    path: Path
    config: dict  # flat: {"model.d_ff": 1024, ...}
    summary: dict
    env: dict
    evaluations: list[dict]  # the rows of metrics.jsonl that have a val_loss
    planned: int  # number of seeds asked for; 0 if unknown
    benchmarks: dict[str, float]  # scores in evals.json

    @property
    def machine(self) -> str:
        return f"{self.summary['device']}, {self.env['cpus']} CPUs, torch {self.env['torch']}"


def load_trials(paths: Iterable[str | Path]) -> list[Trial]:
    """The trials in the folders that match these paths or patterns, by seed. Raises UserError."""
    folders = []
    for pattern in map(str, paths):
        matches = sorted(path for path in map(Path, glob(pattern)) if path.is_dir())
        if not matches:
            raise UserError(f"no run folder matches {pattern}; check the path")
        folders += matches
    trials = [load_trial(folder) for folder in dict.fromkeys(folders)]
    return sorted(trials, key=lambda trial: trial.summary["seed"])


def load_trial(folder: Path) -> Trial:
    """Raises UserError if the run is unfinished, damaged, failed or not from train_llm.py."""
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is not a run folder (it has no config.yaml); check the path")
    if not (folder / "summary.json").exists():
        raise UserError(
            f"{folder} is not finished (it has no summary.json); run its `trials` command again"
        )
    try:
        config, summary, env = (read_data(folder / name) for name in SCHEMA)
        config, plan = flatten(config), folder / "trials.json"
        planned = read_data(plan)["seeds"] if plan.exists() else 0
        rows = evaluations(folder)
    except UserError:
        raise
    except Exception as error:  # the parsers raise many exception types
        raise UserError(f"{folder} is damaged ({first_line(error)}); rerun this trial") from error
    stage = config.get("stage", "llm")  # trials of the oldest records name no stage
    if stage != "llm":
        raise UserError(f"{folder} is a run of stage {stage}; trials are runs of train_llm.py")
    for name, values in zip(SCHEMA, (config, summary, env), strict=True):
        check_values(folder, name, values)
    if type(planned) is not int or not 0 <= max(planned, summary["seed"]) < MAX_SEEDS:
        raise UserError(f"{folder}: seeds must be from 0 to {MAX_SEEDS - 1}; rerun this trial")
    if len(summary.get("code") or []) > 1:
        raise UserError(
            f"{folder} was trained by {len(summary['code'])} versions of the code (`code` in "
            "summary.json); train it again from scratch with one version"
        )
    keys = ("step", "val_loss", "val_bpb")
    last = [rows[-1].get(key) for key in keys] if rows else []
    is_valid = all(is_number(row.get(key)) for row in rows for key in (*keys, "tokens"))
    if not is_valid or last != [summary["steps"], summary["val_loss"], summary["val_bpb"]]:
        raise UserError(
            f"{folder}: summary.json and the last evaluation in metrics.jsonl disagree; "
            "rerun this trial"
        )
    benchmarks = load_benchmarks(folder, summary["steps"])
    return Trial(folder, config, summary, env, rows, planned, benchmarks)


def load_benchmarks(folder: Path, steps: int) -> dict[str, float]:
    """{task, metric and hash of the inputs: score} of evals.json, without tasks that had a limit.

    Raises UserError if the file, which may be untrusted, is damaged or of other weights than those
    after the last step.
    """
    path = folder / "evals.json"
    if not path.exists():
        return {}
    try:
        stored = read_data(path)
        scores = {
            f"{task} {metric}, inputs {result['inputs_sha256'][:8]}": score["value"]
            for task, result in stored["tasks"].items()
            if result["limit"] is None
            for metric, score in result["metrics"].items()
        }
        pattern = r"[\w.-]+ [\w.,-]+, inputs [0-9a-f]{8}"
        for name, value in scores.items():
            if not re.fullmatch(pattern, name, re.ASCII) or not is_number(value):
                raise ValueError(f"{name!r} is {value!r}")
        step = int(re.fullmatch(r"checkpoints/(\d+)", stored["checkpoint"])[1])
        weights = folder / stored["checkpoint"] / "model.safetensors"  # a record has none
        is_same = not weights.exists() or file_sha256(weights) == stored["weights_sha256"]
    except Exception as error:  # the parsers raise many exception types
        raise UserError(f"{path} is damaged ({first_line(error)}); delete it") from error
    if step != steps or not is_same:
        raise UserError(f"{path} is not of the weights after step {steps}; evaluate them again")
    return scores


def read_data(path: Path) -> dict:
    """The object in a JSON or YAML file, which may be untrusted.

    May raise any type of exception if the file is not valid.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        value = json.loads(text)
    else:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        if any(isinstance(event, yaml.AliasEvent) for event in events):  # may grow exponentially
            raise ValueError(f"{path.name} has a YAML alias")
        value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} contains no settings")
    return value


def is_number(value) -> bool:
    """Whether a value is a finite number that is small enough for statistics."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e15


def check_values(folder: Path, name: str, values: dict) -> None:
    """Raises UserError unless the values in a trial's file have the types in SCHEMA.

    Commit and command must also be safe to print and to paste into a terminal.
    """
    for key, kind in SCHEMA[name].items():
        if key not in values:
            raise UserError(f"{folder} has no {key} in {name}; rerun this trial")
        value = values[key]
        if key in MEASURES and not is_number(value):
            raise UserError(f"{folder} has {key} {value}; a failed trial disqualifies its recipe")
        good = isinstance(value, kind) and (kind is not int or is_number(value))
        if key == "commit" and value is not None:
            good = good and re.fullmatch("[0-9a-f]{7,64}", value)
        if key == "command":
            words = value if good and value else [None]
            good = all(isinstance(word, str) and word.isprintable() for word in words)
            good = good and re.fullmatch(r"[\w.-]+\.py", words[0])
        if not good:
            raise UserError(f"{folder} has {key} {value!r} in {name}; rerun this trial")


def column(trials: list[Trial], key: str) -> list[float]:
    return [trial.summary[key] for trial in trials]


def stdev(values: list[float]) -> float:
    """Sample standard deviation; nan for a single value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def markdown_table(rows: list[list]) -> str:
    """A Markdown table whose first row is the header."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def trials_table(trials: list[Trial]) -> str:
    """One row for each trial, then mean and sample standard deviation, as a Markdown table."""
    columns = {key: column(trials, key) for key in MEASURES}
    rows = [[trial.summary["seed"], *(trial.summary[key] for key in MEASURES)] for trial in trials]
    rows.append(["mean", *map(statistics.mean, columns.values())])
    rows.append(["sd", *map(stdev, columns.values())])
    titles, formats = zip(*MEASURES.values(), strict=True)
    return markdown_table(
        [["seed", *titles]] + [[name, *map(format, values, formats)] for name, *values in rows]
    )


def check_side(trials: list[Trial]) -> None:
    """Raises UserError unless these are all trials, at least 3, of one recipe, code and machine."""
    first, seeds = trials[0], column(trials, "seed")
    for before, trial in pairwise(trials):
        if before.summary["seed"] == trial.summary["seed"]:
            raise UserError(
                f"{before.path} and {trial.path} have the same seed {trial.summary['seed']}; "
                "pass each trial once"
            )
    for trial in trials[1:]:
        for key, (value, other) in changed_settings(first, trial).items():
            raise UserError(
                f"{first.path} and {trial.path} are not trials of one recipe: {key} is "
                f"{value} and {other}"
            )
        for name, a, b in [
            ("code", first.summary["code_sha256"], trial.summary["code_sha256"]),
            ("machine", first.machine, trial.machine),
        ]:
            if a != b:
                raise UserError(f"{first.path} and {trial.path} differ in {name}: {a} and {b}")
    planned = max(trial.planned for trial in trials)
    missing = sorted(set(range(max(planned, seeds[-1] + 1))) - set(seeds))
    if missing:
        raise UserError(
            f"seed {missing[0]} of {first.path} is missing; every seed counts, so add its trial"
        )
    if len(trials) < MIN_SEEDS:
        raise UserError(
            f"{first.path} is one of {len(trials)} trials; "
            f"each side needs at least {MIN_SEEDS} seeds; run more trials"
        )
    if len(set(column(trials, "val_loss"))) < len(trials):
        raise UserError(
            f"two trials of {first.path} have the same validation loss to the last digit, "
            "so one is a copy; rerun it"
        )
    params = first.summary["params"]
    for trial in trials:
        if start := trial.config.get("init_from"):
            raise UserError(
                f"{trial.path} started from {start!r}, whose training is not part of its budget; "
                "train without --init_from"
            )
    cap = SMALL_MAX_PARAMS if first.config["tokens"] == BUDGETS["small"] else MAX_PARAMS
    if params > cap:
        raise UserError(f"{first.path} has {params:,} parameters; this budget allows {cap:,}")


def check_sides(base: list[Trial], new: list[Trial]) -> None:
    """Raises UserError unless both sides are complete and share what is fixed; base may be []."""
    check_side(new)
    if not base:
        return
    check_side(base)
    a, b = base[0], new[0]
    for trial in new:
        if trial.path.resolve() in [other.path.resolve() for other in base]:
            raise UserError(f"{trial.path} is on both sides; pass it on one")
    for name, x, y in [
        ("budget", a.config["tokens"], b.config["tokens"]),
        ("machine", a.machine, b.machine),
        *((name, a.summary[key], b.summary[key]) for name, key in FIXED.items()),
    ]:
        if x != y:
            raise UserError(f"{a.path} and {b.path} differ in {name}: {x} and {y}")
    ratios = [trial.summary["val_bpb"] / trial.summary["val_loss"] for trial in (*base, *new)]
    if max(ratios) > min(ratios) * (1 + 1e-9):
        raise UserError(
            f"{a.path} and {b.path} differ in the ratio of bits per byte to loss: "
            "they were not evaluated the same way"
        )


def changed_settings(base: Trial, new: Trial) -> dict[str, list]:
    """{setting: [before, after]} for the settings that are part of a recipe."""
    keys = sorted((base.config.keys() | new.config.keys()) - NON_RECIPE_SETTINGS)
    pairs = {key: [base.config.get(key), new.config.get(key)] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def lines_of_code(patch: str) -> dict[str, int]:
    """Number of lines that a git patch adds to and removes from Python files."""
    lines, in_python = {"added": 0, "removed": 0}, False
    for line in patch.splitlines():
        if line.startswith("diff --git "):
            in_python = line.endswith(".py")
        elif in_python and line[:1] in "+-" and not line.startswith(("+++ ", "--- ")):
            lines["added" if line[0] == "+" else "removed"] += 1
    return lines


def summarize(trials: list[Trial]) -> dict:
    """n, parameters, and mean and sample standard deviation of each measure.

    Also those of the benchmark scores that all trials have, if there are any.
    """

    def mean_sd(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.mean(values), "sd": stdev(values)}

    shared = set.intersection(*(set(trial.benchmarks) for trial in trials))
    scores = {name: mean_sd([t.benchmarks[name] for t in trials]) for name in sorted(shared)}
    return (
        {"n": len(trials), "params": trials[0].summary["params"]}
        | {key: mean_sd(column(trials, key)) for key in MEASURES}
        | ({"benchmarks": scores} if scores else {})
    )


def compare(
    base_loss: list[float],
    new_loss: list[float],
    base_seconds: list[float],
    new_seconds: list[float],
) -> dict:
    """Compare losses (nats per token) and training times (seconds), each in the order of seeds.

    Losses: a paired t-test over the seeds of both sides if there are at least MIN_PAIRS, otherwise
    Welch's. Times: always Welch's, because steady drift of the machine looks like a gain in pairs.
    p_lower and p_faster are one-sided: the probability of a difference at least this large if the
    new recipe is no better.
    """
    pairs = min(len(base_loss), len(new_loss))
    if pairs >= MIN_PAIRS:
        comparison = paired_test(base_loss[:pairs], new_loss[:pairs])
    else:
        comparison = welch_test(base_loss, new_loss)
    comparison |= {
        "time_ratio": statistics.mean(new_seconds) / statistics.mean(base_seconds),
        "p_faster": welch_test(base_seconds, new_seconds)["p_lower"],
    }
    return comparison | {"improvement": verdict(comparison)[0]}


def welch_test(base: list[float], new: list[float]) -> dict:
    """Difference of the means, its 95% interval and p of Welch's t-test (Biometrika 34, 1947)."""
    low, high = ttest_ind(new, base, equal_var=False).confidence_interval(0.95)
    return {
        "difference": statistics.mean(new) - statistics.mean(base),
        "ci95": [low, high],
        "p_lower": ttest_ind(new, base, equal_var=False, alternative="less").pvalue,
    }


def paired_test(base: list[float], new: list[float]) -> dict:
    """The same of a paired t-test, its name, and the differences; entry i of both sides is a pair.

    Statistics without a name (`test`) are Welch's.
    """
    differences = [b - a for a, b in zip(base, new, strict=True)]
    mean, df = statistics.mean(differences), len(differences) - 1
    error = stdev(differences) / math.sqrt(len(differences))
    half_width = student_t.ppf(0.975, df) * error
    return {
        "difference": mean,
        "ci95": [mean - half_width, mean + half_width],
        # error is 0 if a change, e.g. of speed, leaves every loss as it was
        "p_lower": student_t.cdf(mean / max(error, sys.float_info.min), df),
        "test": "paired t-test",
        "differences": differences,
    }


def verdict(comparison: dict) -> tuple[bool, str]:
    """Whether the new recipe is an improvement, and why: lower loss, or equal loss in less time."""
    change, p = comparison["difference"], comparison["p_lower"]
    ratio, p_time = comparison["time_ratio"], comparison["p_faster"]
    time = f"{ratio:.2f}x the training time"
    if p < P_LOSS:
        return True, f"the loss is lower by {-change:.4f} (p = {p:.3g}) at {time}"
    if 1 - p < P_WORSE:
        return False, f"the loss is higher by {change:.4f} (p = {1 - p:.3g}); loss outranks speed"
    if p_time < P_TIME:
        return True, f"the loss is equal within noise at {time} (p = {p_time:.3g})"
    return False, (
        f"the loss is not lower ({change:+.4f}, p = {p:.3g}, must be below {P_LOSS}) and "
        f"training is not faster ({time}, p = {p_time:.3g}, must be below {P_TIME})"
    )


def statistics_of(base: list[Trial], new: list[Trial]) -> dict:
    """Summaries of both sides and their comparison, or of new alone; six significant digits."""
    stats = {"new": summarize(new)}
    if base:
        sides = [column(side, key) for key in ("val_loss", "train_seconds") for side in (base, new)]
        stats |= {"base": summarize(base)} | compare(*sides)
    return json.loads(json.dumps(stats), parse_float=lambda text: float(f"{float(text):.6g}"))


def duration(seconds: float) -> str:
    m, s = divmod(round(seconds), 60)
    return f"{m}m{s:02d}s" if m < 60 else f"{m // 60}h{m % 60:02d}m"


def comparison_table(stats: dict) -> str:
    """The statistics of both sides as a Markdown table, then the difference and the verdict."""
    titles = {"base": "baseline", "new": "new"}
    sides = {titles[key]: stats[key] for key in titles if key in stats}
    rows = [["", *(f"{name} (n = {side['n']})" for name, side in sides.items())]]
    for key, (title, form) in MEASURES.items():
        values = [side[key] for side in sides.values()]
        rows.append([title, *(f"{v['mean']:{form}} ± {v['sd']:{form}}" for v in values)])
    rows.append(["parameters", *(f"{side['params']:,}" for side in sides.values())])
    benchmarks = [side.get("benchmarks", {}) for side in sides.values()]
    for name in dict.fromkeys(name for scores in benchmarks for name in scores):
        values = [scores.get(name) for scores in benchmarks]
        rows.append([name, *(f"{v['mean']:.4f} ± {v['sd']:.4f}" if v else "" for v in values)])
    text = markdown_table(rows)
    if "base" in stats:
        low, high = stats["ci95"]
        good, reason = verdict(stats)
        test = stats.get("test", "Welch's t-test")
        if differences := stats.get("differences"):
            text += f"\n{differences_table(differences)}"
        text += (
            f"\nDifference in validation loss: {stats['difference']:+.4f} "
            f"(95% confidence interval {low:+.4f} to {high:+.4f};\n"
            f"{test}, one-sided p = {stats['p_lower']:.3g}). "
            f"Training time: {stats['time_ratio']:.3f}x the baseline's "
            f"(p = {stats['p_faster']:.3g}).\n\n"
            f"{'Improvement' if good else 'No improvement'}: {reason}.\n"
        )
    return text


def differences_table(differences: list[float]) -> str:
    """New minus baseline validation loss of each seed, mean and stdev, as a Markdown table."""
    summary = f"{statistics.mean(differences):+.4f} ± {stdev(differences):.4f}"
    cells = [f"{difference:+.4f}" for difference in differences]
    return markdown_table(
        [["seed", *range(len(cells)), "mean ± sd"], ["new - baseline", *cells, summary]]
    )
