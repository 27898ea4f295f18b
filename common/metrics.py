"""What a run reports: metrics.jsonl and progress lines, then loss.png and summary.json."""

import ast
import hashlib
import inspect
import json
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

from torch import nn
from tqdm import tqdm

from common.config import to_plain
from common.device import Clock, device_name, peak_flops, peak_memory_gb
from common.run import git_state, write_text


class Metrics:
    """Writes metrics.jsonl, progress lines and, if cfg.wandb is set, Weights & Biases.

    On a terminal a progress bar replaces the lines.

    Args:
        step, steps: current and last step of the run.
        clock: measures training time; must be stopped when `log` and `finish` read it.
        unit, per_step: what the budget counts ("tokens", "images" or "sequences"), and how many
            of them a step takes.
        flops: FLOPs of a step, forward and backward.
    """

    def __init__(
        self,
        run: Path,
        cfg,
        step: int,
        steps: int,
        *,
        clock: Clock,
        unit: str,
        per_step: int,
        flops: float,
    ):
        # rows after the checkpoint will be written again
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self.file = (run / "metrics.jsonl").open("a", buffering=1)
        self.run, self.cfg, self.steps, self.clock = run, cfg, steps, clock
        self.unit, self.per_step, self.flops = unit, per_step, flops
        self.peak = peak_flops(clock.device, cfg.dtype)
        self.last_step, self.last_seconds = step, clock.seconds
        self.code = git_state()  # taken now: a commit made later is not what this run executed
        self.tty = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not self.tty
        )
        self.wandb = None
        if cfg.wandb:
            import wandb

            self.wandb = wandb.init(
                project="blueberry", name=cfg.run, dir=run, config=to_plain(cfg)
            )

    def row(self, *, step: int, **values) -> None:
        """Append a row of values at a step, with the part of the budget used so far."""
        row = {"step": step, self.unit: step * self.per_step, **values}
        self.file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=step)

    def log(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        """Show progress, and the speed since the last call."""
        seconds = (self.clock.seconds - self.last_seconds) / (step - self.last_step)
        self.last_step, self.last_seconds = step, self.clock.seconds
        speed = self.per_step / seconds
        digits = 0 if speed > 10 else 2
        mfu = f"{self.flops / seconds / self.peak:.1%}" if self.peak else "-"
        eta = timedelta(seconds=round(seconds * (self.steps - step)))
        text = (
            f"{step / self.steps:.0%} | {step * self.per_step:,} {self.unit} | loss {loss:.4f} | "
            f"lr {lr:.4g} | gnorm {grad_norm:.3f} | {seconds * 1e3:.0f} ms | "
            f"{speed:,.{digits}f} {self.unit}/s | mfu {mfu} | "
            f"mem {peak_memory_gb(self.clock.device):.1f} GB | eta {eta}"
        )
        if self.tty:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)
        else:
            print(f"step {step}/{self.steps} | {text}", flush=True)

    def line(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.tty:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()

    def finish(self, model: nn.Module, tokens: int, **results) -> dict:
        """Close, plot loss.png, then write, print and return summary.json.

        Args:
            tokens: tokens trained on.
            results: the stage's own entries, such as val_loss.
        """
        self.close()
        plot_loss(self.run, self.unit)
        last_rows = [row for row in read_metrics(self.run) if row["step"] > 0.95 * self.steps]
        losses = [row["loss"] for row in last_rows if "loss" in row]
        seconds, budget = self.clock.seconds, self.steps * self.per_step
        summary = {
            **results,
            "train_loss": sum(losses) / len(losses),  # mean over the last 5% of the budget
            self.unit: budget,
            "tokens": tokens,
            "steps": self.steps,
            "params": sum(p.numel() for p in model.parameters()),
            "seed": self.cfg.seed,
            "train_seconds": seconds,
            f"{self.unit}_per_second": budget / seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": self.flops * self.steps / seconds / self.peak if self.peak else None,
            "peak_memory_gb": peak_memory_gb(self.clock.device),
            "device": device_name(self.clock.device),
            **self.code,
            "cost_usd": seconds / 3600 * self.cfg.gpu_hourly_usd,
        }
        write_text(self.run / "summary.json", json.dumps(summary, indent=2))
        print("\n".join(f"{key}: {value}" for key, value in summary.items()))
        print(f"saved in {self.run}")
        return summary


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, without a last one that a kill cut short."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
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


def plot_loss(run: Path, unit: str) -> None:
    """Plot the training and validation losses of metrics.jsonl against the budget as loss.png."""
    from matplotlib.figure import Figure

    train, val = [row for row in read_metrics(run) if "loss" in row], evaluations(run)
    fig = Figure(figsize=(8, 5), dpi=120, layout="tight")
    ax = fig.subplots()
    ax.plot([r[unit] for r in train], [r["loss"] for r in train], lw=0.8, alpha=0.6, label="train")
    ax.plot([r[unit] for r in val], [r["val_loss"] for r in val], "o-", label="validation")
    for r in val:
        label, point = f"{r['val_loss']:.3f}", (r[unit], r["val_loss"])
        ax.annotate(label, point, (0, 6), textcoords="offset points", ha="center")
    images = unit == "images"
    loss = "loss (1: predicting the mean color)" if images else "loss (nats per token)"
    ax.set(xlabel=unit, ylabel=loss, title=run.name)
    if images:
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(run / "loss.png")
