"""What a run reports: metrics.jsonl and progress lines, then loss.png and summary.json."""

import ast
import hashlib
import inspect
import io
import json
import os
import secrets
import sys
import textwrap
import time
from contextlib import redirect_stderr, suppress
from datetime import timedelta
from pathlib import Path

from torch import nn
from tqdm import tqdm

from common.config import UserError, first_line, to_plain
from common.device import Clock, device_name, peak_flops, peak_memory_gb
from common.disk import write_text
from common.distributed import n_ranks, rank
from common.run import writing


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
            self.wandb = open_wandb(self.run, self.cfg)

    def row(self, *, step: int, **values) -> None:
        """Append a row of values at a step, with the amount of the budget used so far."""
        row = {"step": step, self.unit: step * self.per_step, **values}
        if self.file:
            self.file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=step)

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
        mfu = f"{self.flops / seconds / self.peak:.1%}" if self.peak else "-"
        eta = timedelta(seconds=round(seconds * (self.steps - step)))
        text = (
            f"{step / self.steps:.0%} | {step * self.per_step:,} {self.unit} | loss {loss:.4f} | "
            f"lr {lr:.4g} | gnorm {grad_norm:.3f} | "
            f"{seconds * 1e3:.0f} ms | data {wait * 1e3:.0f} ms | "
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
        nested = ("code", "inputs")  # long, and in the file
        shown = {key: value for key, value in summary.items() if key not in nested}
        print("\n".join(f"{key}: {value}" for key, value in shown.items()))
        print(f"saved in {self.run}")
        return summary


def rows_sha256(text: bytes) -> dict:
    """Length and hash of the rows of a metrics.jsonl."""
    return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def check_wandb(cfg) -> None:
    """Raises UserError if cfg.wandb is set, but Weights & Biases cannot be used."""
    if not cfg.wandb:
        return
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled"):
        return
    reason = "there is no API key"
    try:
        with redirect_stderr(io.StringIO()):  # wandb prints lines of its own
            if wandb.login(prompt=False):
                return
    except Exception as error:  # wandb raises many exception types
        reason = first_line(error)
    raise UserError(
        f"--wandb is set, but {reason}; run `wandb login`, set WANDB_API_KEY, or set "
        "WANDB_MODE=offline to log to the run folder"
    )


def open_wandb(run: Path, cfg):
    """The Weights & Biases run of a run folder, the same one after --resume. Raises UserError."""
    import wandb

    file = run / "wandb_id"
    if not file.exists():
        write_text(file, secrets.token_hex(4))
    try:
        return wandb.init(
            project="blueberry",
            name=cfg.run,
            id=file.read_text(),
            resume="allow",
            dir=run.resolve(),  # the wandb service has its own working directory
            config=to_plain(cfg),
        )
    except Exception as error:  # wandb raises many exception types
        raise UserError(
            f"--wandb failed: {first_line(error)}; check the network and the key, or set "
            "WANDB_MODE=offline"
        ) from error


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
