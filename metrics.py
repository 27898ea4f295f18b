"""What a run reports: metrics.jsonl and progress lines while it trains, loss.png and summary.json at its end."""

import ast
import hashlib
import inspect
import json
import re
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common import Clock, device_name, git_state, peak_memory_gb, to_plain, write_text

# Dense bf16 tensor-core peaks in FLOP/s, from the makers' data sheets.
PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "A10G": 70e12,
}


class Metrics:
    """metrics.jsonl, the terminal and, if asked for, wandb. On a terminal a bar stands for the progress lines.

    Args:
        step, steps: where the run stands and ends.
        clock: counts the training; it must be stopped when `log` and `finish` read it.
        unit, per_step: what the budget counts ("tokens", "images" or "sequences"), and how many a step takes.
        flops: of a step, forward and backward.
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
        kept = [
            row for row in read_metrics(run) if row["step"] <= step
        ]  # what followed the checkpoint comes again
        write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self.file = (run / "metrics.jsonl").open("a", buffering=1)
        self.run, self.cfg, self.steps, self.clock = run, cfg, steps, clock
        self.unit, self.per_step, self.flops = unit, per_step, flops
        self.peak, self.mark = peak_flops(clock.device, cfg.dtype), (step, clock.seconds)
        self.tty, self.wandb = sys.stderr.isatty(), None
        self.code = git_state()  # now: a commit made while the run goes on is not what it ran
        self.bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not self.tty
        )
        if cfg.wandb:
            import wandb

            self.wandb = wandb.init(
                project="blueberry", name=cfg.run, dir=run, config=to_plain(cfg)
            )

    def row(self, *, step: int, **values) -> None:
        """Add a row of values at a step; how much of the budget that is goes with them."""
        row = {"step": step, self.unit: step * self.per_step, **values}
        self.file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=step)

    def log(self, step: int, loss: float, lr: float, norm: float) -> None:
        """Show how far training is and how fast it was since the last time."""
        seconds = (self.clock.seconds - self.mark[1]) / (step - self.mark[0])
        self.mark, speed = (step, self.clock.seconds), self.per_step / seconds
        text = (
            f"{step / self.steps:.0%} | {step * self.per_step:,} {self.unit} | loss {loss:.4f} | lr {lr:.4g} | "
            f"gnorm {norm:.3f} | {seconds * 1e3:.0f} ms | {speed:,.{0 if speed > 10 else 2}f} {self.unit}/s | "
            f"mfu {f'{self.flops / seconds / self.peak:.1%}' if self.peak else '-'} | "
            f"mem {peak_memory_gb(self.clock.device):.1f} GB | "
            f"eta {timedelta(seconds=round(seconds * (self.steps - step)))}"
        )
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text) if self.tty else print(
            f"step {step}/{self.steps} | {text}", flush=True
        )

    def line(self, text: str) -> None:
        tqdm.write(text) if self.tty else print(text, flush=True)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()

    def finish(self, model: nn.Module, tokens: int, **found) -> dict:
        """Close, draw loss.png, then write, print and return summary.json: `found` and what every run has."""
        self.close()
        plot_loss(self.run, self.unit)
        tail = [
            r["loss"]
            for r in read_metrics(self.run)
            if "loss" in r and r["step"] > 0.95 * self.steps
        ]
        seconds = self.clock.seconds
        summary = {
            **found,
            "train_loss": sum(tail) / len(tail),  # mean over the last 5% of the budget
            self.unit: self.steps * self.per_step,
            "tokens": tokens,
            "steps": self.steps,
            "params": sum(p.numel() for p in model.parameters()),
            "seed": self.cfg.seed,
            "train_seconds": seconds,
            f"{self.unit}_per_second": self.steps * self.per_step / seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": self.flops * self.steps / seconds / self.peak if self.peak else None,
            "peak_memory_gb": peak_memory_gb(self.clock.device),
            "device": device_name(self.clock.device),
            **self.code,
            "cost_usd": seconds / 3600 * self.cfg.gpu_hourly_usd,
        }
        write_text(self.run / "summary.json", json.dumps(summary, indent=2))
        print("\n".join(f"{key}: {value}" for key, value in summary.items()))
        return summary


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The device's peak in FLOP/s for this dtype, or None where it is not known: no MFU is better than a wrong one."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if re.search(rf"\b{key}\b", name)), None)


def ast_sha256(function) -> str:
    """sha256 of a function's syntax tree: formatting, comments and docstrings do not change it.

    The tree is unparsed before hashing, because `ast.dump` differs between Python versions.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, up to one that a kill cut short."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def evaluated(run: Path, step: int) -> bool:
    """Whether there is an evaluation of a step: a run may have stopped between saving and evaluating."""
    return any(row["step"] == step and "val_loss" in row for row in read_metrics(run))


def plot_loss(run: Path, unit: str) -> None:
    """Draw the training and validation losses of metrics.jsonl against the budget as loss.png."""
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    fig = Figure(figsize=(8, 5), dpi=120, layout="tight")
    ax = fig.subplots()
    ax.plot([r[unit] for r in train], [r["loss"] for r in train], lw=0.8, alpha=0.6, label="train")
    ax.plot([r[unit] for r in val], [r["val_loss"] for r in val], "o-", label="validation")
    for r in val:
        ax.annotate(
            f"{r['val_loss']:.3f}",
            (r[unit], r["val_loss"]),
            (0, 6),
            textcoords="offset points",
            ha="center",
        )
    loss = (
        "reconstruction loss (1: a picture's mean)" if unit == "images" else "loss (nats per token)"
    )
    ax.set(xlabel=unit, ylabel=loss, title=run.name)
    if unit == "images":
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(run / "loss.png")
