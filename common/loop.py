"""The part of a training loop that is the same in every script: everything around the step."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import (
    RUNS,
    UserError,
    check_fractions,
    check_not_negative,
    check_positive,
    stop,
    stop_signals,
)
from common.device import device_name
from common.metrics import Metrics, check_wandb, evaluations
from common.run import checkpoints, open_run, origin, save_checkpoint, writing


# ---- schedules
def resolve_steps(cfg, budget: str, batch: str) -> int:
    """Number of steps in the budget cfg.BUDGET at cfg.BATCH per step; fills in cfg.log_every.

    Raises UserError if a setting that all scripts share is out of range.
    """
    check_positive(cfg, budget, batch)
    check_not_negative(cfg, "seed", "gpu_hourly_usd")
    if cfg.seed >= 2**32:
        raise UserError(f"--seed is {cfg.seed}; it must be less than 2^32 = {2**32}")
    check_fractions(cfg, "eval_every", "save_every", "warmup_frac", "cooldown_frac")
    if cfg.warmup_frac + cfg.cooldown_frac > 1:
        raise UserError(
            f"--warmup_frac {cfg.warmup_frac} and --cooldown_frac {cfg.cooldown_frac} add up to "
            "more than 1; lower one of them"
        )
    total, per_step = getattr(cfg, budget), getattr(cfg, batch)
    steps = total // per_step
    if steps < 1:
        raise UserError(
            f"--{budget} {total} is less than one step of --{batch} {per_step}; "
            f"set --{budget} to {per_step} or more"
        )
    if cfg.log_every == "auto":
        cfg.log_every = max(1, steps // 50)
    check_positive(cfg, "log_every")
    check_wandb(cfg)
    return steps


def trapezoid(progress: float, warmup: float, cooldown: float, floor: float) -> float:
    """Learning-rate factor at `progress` in (0, 1]: linear warm-up, constant, linear cooldown.

    Warm-up and cooldown are fractions of the budget (arXiv 2405.18392); `floor` is the factor at
    progress 1. The first step has progress 1 / steps, so its factor is never 0.
    """
    rise = progress / warmup if warmup else 1.0
    fall = floor + (1 - floor) * (1 - progress) / cooldown if cooldown else 1.0
    return min(1.0, rise, fall)


def milestones(steps: int, fraction: float) -> set[int]:
    """The steps that complete a multiple of `fraction` of the budget, and the last step."""
    if not fraction:
        return {steps}
    fraction = max(fraction, 1 / steps)
    return {
        steps,
        *(math.ceil(k * fraction * steps - 1e-9) for k in range(1, int(1 / fraction) + 1)),
    }


def set_lr(optimizers: list, factor: float) -> None:
    """Set every learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


# ---- before the loop
def finished_summary(run: Path) -> dict | None:
    """The summary of a finished run, announced on the terminal; None if it is not finished."""
    if not (run / "summary.json").exists():
        return None
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{run}/summary.json is damaged; delete it and resume with --run {run.name} --resume"
        ) from error
    print(f"{run} is finished; delete the folder to train it again")
    return summary


def print_setup(cfg, run: Path, first: int, origin: str = "from scratch", **lines: str) -> None:
    """Print what is about to run: the run, the device, and `lines`, each after its name."""
    start = f"resumed at step {first}" if first else origin
    compiled = "compiled" if cfg.compile else "not compiled"
    device = f"{device_name(torch.device(cfg.device))}, {cfg.dtype}, {compiled}"
    for name, text in {"run": f"{run}, {start}", "device": device, **lines}.items():
        print(name, text, flush=True)


@contextmanager
def warming_up(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Restore model and optimizers on exit, so that steps run for compilation do not affect
    training.

    Raises UserError if compilation fails.
    """
    parts = [model, *optimizers]
    before = [deepcopy(part.state_dict()) for part in parts]
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler raises many exception types
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"torch.compile failed ({reason}); pass --compile false") from error
    for part, state in zip(parts, before, strict=True):
        part.load_state_dict(state)


# ---- in the loop
def update(optimizers: list) -> None:
    """Apply the gradients and clear them."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def clipped_norm(model: nn.Module, limit: float = 0.0) -> Tensor:
    """Norm of the gradient () before it is clipped to `limit`; 0 does not clip."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if limit:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def state_norm(model: nn.Module, optimizers: list) -> Tensor:
    """Norm () of all weights, buffers and optimizer state; not finite if any value is not."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for state in states for value in state.values() if torch.is_tensor(value)]
    return nn.utils.get_total_norm([t for t in tensors if t.is_floating_point() and t.ndim])


def check_finite(
    cfg, step: int, lr: str, model: nn.Module, optimizers: list, *values: Tensor
) -> list[float]:
    """The scalars `values` as floats; the first is the loss, the last the gradient norm.

    Raises UserError if a value, a weight or the optimizer state is not finite, so that the run
    stops before the weights change. `lr` is the name of the setting to lower.
    """
    norm = state_norm(model, optimizers).to(values[0].device)
    *numbers, weights = torch.stack([*values, norm]).tolist()
    if math.isfinite(sum(numbers) + weights):
        return numbers
    saved = checkpoints(RUNS / cfg.run)
    names = (f"{cfg.run}-{i}" for i in count(2))
    command = f"--run {next(name for name in names if not (RUNS / name).exists())}"
    where = "start again"
    if saved:
        where = f"continue from {saved[-1]} (or, if that fails too, start again)"
        command = f"--resume {saved[-1]} {command}"
    raise UserError(
        f"loss {numbers[0]}, gradient norm {numbers[-1]}, norm of weights and optimizer state "
        f"{weights} at step {step}; stopped before updating the weights; {where} with a lower "
        f"learning rate: {command} --{lr} {getattr(cfg, lr) / 2:.3g}"
    )


class Interrupt:
    """Context in which SIGINT, SIGTERM and SIGHUP set `code` to 128 + signal; a second signal
    stops at once.
    """

    code = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.handle) for number in stop_signals()}
        return self

    def handle(self, number: int, frame) -> None:
        self.code = 128 + number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class AfterStep:
    """Called after each step: records the step, then logs, saves and evaluates, in this order, at
    the intervals in cfg and with the clock stopped. After a signal, saves and stops the run, either
    before the evaluation or right after it.
    """

    def __init__(self, cfg, metrics: Metrics, model, optimizers, state: dict, evaluate):
        self.cfg, self.metrics, self.run, self.steps = cfg, metrics, metrics.run, metrics.steps
        self.model, self.optimizers, self.state, self.evaluate = model, optimizers, state, evaluate
        self.evals = milestones(self.steps, cfg.eval_every)
        self.saves = milestones(self.steps, cfg.save_every)
        self.interrupt, self.called, self.saved = Interrupt(), False, state["step"]

    def __call__(self, step: int, *, loss: float, grad_norm: float, lr: float, **values) -> None:
        metrics, self.called = self.metrics, True
        with writing(self.run, self.run / "metrics.jsonl"):
            metrics.row(step=step, loss=loss, **values, grad_norm=grad_norm, lr=lr)
        log = step % self.cfg.log_every == 0 or step == self.steps
        if not (log or step in self.saves or step in self.evals or self.interrupt.code):
            return
        metrics.clock.stop()
        if log:
            metrics.log(step, loss, lr, grad_norm)
        if step in self.saves:
            self.save(step)
        self.stop_if_asked(step)
        if step in self.evals:
            self.evaluate_now(step)
            self.stop_if_asked(step)
        metrics.clock.start()

    def save(self, step: int) -> None:
        progress = {"step": step, "train_seconds": self.metrics.clock.seconds}
        progress |= {"rows": self.metrics.sync()}
        save_checkpoint(self.run, self.model, self.optimizers, self.state | progress)
        self.saved = step

    def evaluate_now(self, step: int) -> None:
        with writing(self.run, self.run / "samples"):
            self.evaluate(step)

    def stop_if_asked(self, step: int) -> None:
        if self.interrupt.code:
            if self.saved != step:
                self.save(step)
            resume = f"resume with --run {self.cfg.run} --resume"
            stop(f"stopped at step {step} and saved; {resume}", self.interrupt.code)


@contextmanager
def training_loop(
    cfg,
    metrics: Metrics,
    model: nn.Module,
    optimizers: list,
    state: dict,
    evaluate: Callable[[int], None],
    assets: Callable[[Path], None] = lambda folder: None,
) -> Iterator[AfterStep]:
    """Lock the run, create its folder if it is new, and yield the function to call after a step:
    after_step(step, loss=, grad_norm=, lr=, **values).

    `state` is what a checkpoint stores in addition to step and train_seconds; `assets` writes the
    files of a new run folder other than its config. If the run stopped between saving and
    evaluating, it is evaluated first. A new run folder is removed if no step completes.
    """
    run, first = metrics.run, state["step"]
    after_step = AfterStep(cfg, metrics, model, optimizers, state, evaluate)

    def fill(folder: Path) -> None:
        assets(folder)
        if cfg.resume:
            start_from(origin(cfg, run), folder, first)
            save_checkpoint(folder, model, optimizers, state)

    lock = open_run(cfg, run, fill)
    try:
        metrics.open()
        forget_later(run, first)
        evaluated = {row["step"] for row in evaluations(run)}
        if first in after_step.evals and first not in evaluated:
            after_step.evaluate_now(first)
        with after_step.interrupt:
            metrics.clock.start()
            yield after_step
    except BaseException:
        if not (after_step.called or cfg.resume is True):
            shutil.rmtree(run)
        raise
    finally:
        metrics.close()
        lock.release()


def start_from(parent: Path, folder: Path, step: int) -> None:
    """Copy the metrics of the run `parent`, and its best checkpoints up to `step`, into a new run
    folder.
    """
    shutil.copy(parent / "metrics.jsonl", folder)
    for best in checkpoints(parent, "best"):
        if int(best.name) <= step:
            shutil.copytree(best, folder / "best" / best.name)


def forget_later(run: Path, step: int) -> None:
    """Remove best checkpoints of steps that will be repeated."""
    for best in checkpoints(run, "best"):
        if int(best.name) > step:
            shutil.rmtree(best)
