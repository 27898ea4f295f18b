"""What a run reports: metrics.jsonl and progress lines, then loss.png and summary.json."""

import ast
import hashlib
import inspect
import json
import os
import sys
import textwrap
import time
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from pathlib import Path

from torch import nn
from tqdm import tqdm

from common.config import UserError
from common.device import Clock, device_name, peak_flops, peak_memory_gb
from common.disk import write_text
from common.distributed import n_ranks, rank
from common.run import writing
from common.wandb_run import WandbRun


class Metrics:
    """Writes metrics.jsonl, progress lines and, if cfg.wandb is set, Weights & Biases.

    On a terminal a progress bar replaces the lines. Nothing is written before open(), and nothing
    on ranks other than 0.

    Args:
        started: when the script started, by time.perf_counter().
        state: the state of the run, as returned by `resume`.
        steps: last step of the run.
        clock: measures training time; must be stopped when `log` and `finish` read it.
        unit, per_step: what the budget counts ("tokens", "images" or "sequences"), and how many
            of them a step takes.
        flops: FLOPs of a step, forward and backward.
    """

    def __init__(
        self,
        run: Path,
        cfg,
        state: dict,
        steps: int,
        *,
        started: float,
        clock: Clock,
        unit: str,
        per_step: int,
        flops: float,
    ):
        self.run, self.cfg, self.state, self.steps, self.clock = run, cfg, state, steps, clock
        self.unit, self.per_step, self.flops = unit, per_step, flops
        peak = peak_flops(clock.device, cfg.dtype)
        self.peak = peak and peak * n_ranks()
        self.started, self.first_step_seconds = started, state["seconds_to_first_step"]
        self.wait_seconds = state["data_wait_seconds"]
        self.last_step, self.last_seconds = state["step"], clock.seconds
        self.last_wait = self.wait_seconds
        self.tty = sys.stderr.isatty() and rank() == 0
        self.file = self.bar = self.wandb = None

    def open(self) -> None:
        """Open metrics.jsonl and drop the rows written after the checkpoint. Raises UserError."""
        if rank():
            return
        step, path = self.state["step"], self.run / "metrics.jsonl"
        expected = self.state.get("rows", rows_sha256(b""))
        text = path.read_bytes()[: expected["bytes"]] if path.exists() else b""
        if rows_sha256(text) != expected:
            raise UserError(
                f"{path} does not match the checkpoint of step {step}; restore it, or delete "
                f"{self.run} and train again"
            )
        write_text(path, text.decode())
        self.file = path.open("a", buffering=1, encoding="utf-8")
        self.bar = tqdm(
            total=self.steps, initial=step, unit="step", dynamic_ncols=True, disable=not self.tty
        )
        if self.cfg.wandb:
            self.wandb = WandbRun(self.run, self.cfg)
            for row in read_metrics(self.run):  # those that W&B does not have yet
                self.wandb.add(row["step"], row)

    def row(self, *, step: int, **values) -> None:
        """Append a row of values at a step, with the amount of the budget used so far."""
        row = {"step": step, self.unit: step * self.per_step, **values}
        if self.file:
            self.file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.add(step, row)

    def text_samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        """Show prompts and their continuations in Weights & Biases, before the row of the step."""
        if self.wandb:
            rows = [[step, *pair] for pair in zip(prompts, texts, strict=True)]
            self.wandb.add_table(step, ["step", "prompt", "continuation"], rows)

    def image_samples(self, step: int, path: Path, caption: str) -> None:
        """Show an image file in Weights & Biases, before the row of the step."""
        if self.wandb:
            self.wandb.add_image(step, path, caption)

    def first_step_done(self) -> None:
        """Note how long the run took to its first step, unless it was resumed after that."""
        if self.first_step_seconds is None:
            self.first_step_seconds = time.perf_counter() - self.started

    def progress(self) -> dict:
        """What a checkpoint stores about time."""
        return {
            "train_seconds": self.clock.seconds,
            "data_wait_seconds": self.wait_seconds,
            "seconds_to_first_step": self.first_step_seconds,
        }

    def log(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        """Show progress, and the speed and the time spent waiting for data since the last call."""
        n_steps = step - self.last_step
        seconds = (self.clock.seconds - self.last_seconds) / n_steps
        wait = (self.wait_seconds - self.last_wait) / n_steps
        self.last_step, self.last_seconds = step, self.clock.seconds
        self.last_wait = self.wait_seconds
        speed = self.per_step / seconds
        digits = 0 if speed > 10 else 2
        mfu = self.flops / seconds / self.peak if self.peak else None
        memory = peak_memory_gb(self.clock.device)
        eta = timedelta(seconds=round(seconds * (self.steps - step)))
        text = (
            f"{step / self.steps:.0%} | {step * self.per_step:,} {self.unit} | loss {loss:.4f} | "
            f"lr {lr:.4g} | gnorm {grad_norm:.3f} | "
            f"{seconds * 1e3:.0f} ms | data {wait * 1e3:.0f} ms | "
            f"{speed:,.{digits}f} {self.unit}/s | mfu {f'{mfu:.1%}' if mfu else '-'} | "
            f"mem {memory:.1f} GB | eta {eta}"
        )
        if self.tty:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)
        else:
            print(f"step {step}/{self.steps} | {text}", flush=True)
        if self.wandb:
            values = {f"{self.unit}_per_second": speed, "step_seconds": seconds}
            values |= {"data_wait_seconds": wait, "mfu": mfu, "peak_memory_gb": memory}
            self.wandb.add(step, {k: v for k, v in values.items() if v is not None})

    def line(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.tty:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def sync(self) -> dict:
        """Flush the rows to disk, so that metrics.jsonl has every step that a checkpoint covers.

        Returns what a checkpoint stores about the rows: {"bytes", "sha256"}.
        """
        os.fsync(self.file.fileno())
        return rows_sha256((self.run / "metrics.jsonl").read_bytes())

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            with suppress(OSError):  # a full disk, which row() has already reported
                self.file.close()

    def stopped(self) -> None:
        """Note that the run ends before its last step."""
        if self.wandb:
            self.wandb.finish()

    def finish(self, model: nn.Module, tokens: int, **results) -> dict:
        """Plot loss.png, then write, print and return summary.json; only rank 0 has a summary.

        Args:
            tokens: tokens trained on.
            results: the stage's own entries, such as val_loss.
        """
        if rank():
            return {}
        last_rows = [row for row in read_metrics(self.run) if row["step"] > 0.95 * self.steps]
        losses = [row["loss"] for row in last_rows if "loss" in row]
        seconds, budget, n = self.clock.seconds, self.steps * self.per_step, n_ranks()
        summary = {
            **results,
            "train_loss": sum(losses) / len(losses),  # mean over the last 5% of the budget
            self.unit: budget,
            "tokens": tokens,
            "steps": self.steps,
            "params": sum(p.numel() for p in model.parameters()),
            "seed": self.cfg.seed,
            **self.progress(),
            f"{self.unit}_per_second": budget / seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": self.flops * self.steps / seconds / self.peak if self.peak else None,
            "peak_memory_gb": peak_memory_gb(self.clock.device),
            "device": device_name(self.clock.device) + (f", {n} processes" if n > 1 else ""),
            **{key: self.state["code"][-1][key] for key in ("commit", "dirty", "code_sha256")},
            "code": self.state["code"],
            "inputs": self.state["inputs"],
            "cost_usd": seconds / 3600 * self.cfg.gpu_hourly_usd,
        }
        with writing(self.run, self.run / "summary.json"):
            plot_loss(self.run, self.unit)
            write_text(self.run / "summary.json", json.dumps(summary, indent=2))
        flat = {key: value for key, value in summary.items() if key not in ("code", "inputs")}
        for key, value in flat.items():
            if value is not None and not key.endswith(("sha256", "commit", "dirty")):
                print(f"{key}: {f'{value:.6g}' if isinstance(value, float) else value}")
        print(f"saved in {self.run}")
        if self.wandb:
            self.wandb.finish(flat)
        return summary


def rows_sha256(text: bytes) -> dict:
    """Length and hash of the rows of a metrics.jsonl."""
    return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, except a last row that was truncated by a kill.

    Raises UserError if any other row is damaged.
    """
    path, rows = run / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0  # every row has a step
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                return rows
            raise UserError(
                f"{path} is damaged at line {number}; restore it, or delete {run} and train again"
            ) from error
    return rows


def evaluations(run: Path) -> list[dict]:
    """The rows of metrics.jsonl that have a validation loss."""
    return [row for row in read_metrics(run) if "val_loss" in row]


def ast_sha256(function) -> str:
    """sha256 of a function's syntax tree: formatting, comments and docstrings do not change it.

    The tree is unparsed before hashing, because `ast.dump` differs between Python versions.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def smoothed(values: list[float]) -> list[float]:
    """The mean of the values around each value: at most 5% of all on each side.

    Early on, where losses fall fast, it is a quarter of the values so far. The last mean is that of
    the last 5%, which summary.json has as train_loss.
    """
    n, sums = len(values), [0.0, *accumulate(values)]
    window = n - int(0.95 * n)
    means = []
    for i in range(n):
        side = min(window, i // 4 + 1)
        first, end = max(0, i + 1 - side), min(n, i + side)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


LOSSES = {  # what the loss of a run is, by the unit of its budget
    "tokens": "loss (nats per token)",
    "images": "loss (1: predicting the mean color)",
    "sequences": "loss (nats per image token)",
}


def plot_loss(run: Path, unit: str) -> None:
    """Plot the losses in metrics.jsonl against the budget as loss.png.

    The axis leaves out the first 5% of the training losses, which can be far above the rest.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    train, val = [row for row in read_metrics(run) if "loss" in row], evaluations(run)
    losses, val_losses = [row["loss"] for row in train], [row["val_loss"] for row in val]
    means, budget = smoothed(losses), [row[unit] for row in train]
    shown = losses[len(losses) // 20 :] + val_losses

    fig = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    ax = fig.subplots()
    ax.plot(budget, losses, color="C0", lw=0.8, alpha=0.3)
    ax.plot(budget, means, color="C0", lw=2, label=f"training, smoothed: {means[-1]:#.4g}")
    label = f"validation: {val_losses[-1]:#.4g}"
    ax.plot([row[unit] for row in val], val_losses, "o-", color="C1", lw=2, label=label)
    if unit == "images":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(min(shown), max(shown))
    ax.set_xlim(0)
    ax.set_xlabel(unit, fontsize=12)
    ax.set_ylabel(LOSSES[unit], fontsize=12)
    ax.set_title(run.name, fontsize=13)
    ax.tick_params(labelsize=11)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=12, loc="upper right")
    fig.savefig(run / "loss.png")
