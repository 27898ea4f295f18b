"""The part of a training loop that is the same in every script: everything around the step."""

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import UserError, check_fractions, check_not_negative, check_positive, stop
from common.device import device_name
from common.metrics import Metrics, evaluations
from common.run import checkpoints, save_checkpoint


# ---- schedules
def resolve_steps(cfg, budget: str, batch: str) -> int:
    """Steps in the budget cfg.BUDGET at cfg.BATCH per step; fills in cfg.log_every.

    Raises UserError for settings that every script has and that are out of range.
    """
    check_positive(cfg, budget, batch)
    check_not_negative(cfg, "seed")
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
    count = int(1 / fraction) if fraction else 0
    return {steps, *(math.ceil(k * fraction * steps - 1e-9) for k in range(1, count + 1))}


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
    print(f"{run} is finished; delete the folder to train it again")
    return json.loads((run / "summary.json").read_text())


def print_setup(cfg, run: Path, first: int, origin: str = "from scratch", **lines: str) -> None:
    """Print what is about to run: the run, the device, and `lines`, each after its name."""
    start = f"resumed at step {first}" if first else origin
    compiled = "compiled" if cfg.compile else "not compiled"
    device = f"{device_name(torch.device(cfg.device))}, {cfg.dtype}, {compiled}"
    for name, text in {"run": f"{run}, {start}", "device": device, **lines}.items():
        print(name, text, flush=True)


@contextmanager
def restored(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Restore model and optimizers on exit, so that warm-up steps leave no trace."""
    parts = [model, *optimizers]
    before = [deepcopy(part.state_dict()) for part in parts]
    yield
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


def check_finite(run: Path, step: int, lr_flag: str, *values: Tensor) -> list[float]:
    """The values, scalars that start with the loss and end with the gradient norm, as floats.

    Raises UserError if one of them is not finite, so that the run stops before the weights change.
    """
    numbers = torch.stack(values).tolist()
    if not math.isfinite(sum(numbers)):
        saved = checkpoints(run)
        last = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was saved"
        raise UserError(
            f"loss {numbers[0]}, gradient norm {numbers[-1]} at step {step}; stopped before "
            f"updating the weights ({last}); start a new run with a lower {lr_flag}"
        )
    return numbers


class Interrupt:
    """Context in which SIGINT and SIGTERM set `code` to 128 + signal; a second one stops now."""

    def __enter__(self):
        self.code = 0
        self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number: int, frame) -> None:
        self.code = 128 + number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def training_loop(
    cfg,
    metrics: Metrics,
    model: nn.Module,
    optimizers: list,
    state: dict,
    evaluate: Callable[[int], None],
) -> Iterator[Callable]:
    """Run the clock and yield `after_step`, to be called after every step of the loop.

    after_step(step, loss=, grad_norm=, lr=, **values) records the step, then at the intervals of
    cfg logs, saves, stops if a signal asked for it, and calls evaluate(step), in this order and
    with the clock stopped. `state` is what a checkpoint stores beside step and train_seconds.
    A run that stopped between saving and evaluating is evaluated first.
    """
    run, steps, clock = metrics.run, metrics.steps, metrics.clock
    evals, saves = milestones(steps, cfg.eval_every), milestones(steps, cfg.save_every)

    def after_step(step: int, *, loss: float, grad_norm: float, lr: float, **values) -> None:
        metrics.row(step=step, loss=loss, **values, grad_norm=grad_norm, lr=lr)
        log = step % cfg.log_every == 0 or step == steps
        save = step in saves or interrupt.code
        if not (log or save or step in evals):
            return
        clock.stop()
        if log:
            metrics.log(step, loss, lr, grad_norm)
        if save:
            progress = {"step": step, "train_seconds": clock.seconds}
            save_checkpoint(run, model, optimizers, state | progress)
        if interrupt.code:
            metrics.close()
            resume = f"resume with --run {cfg.run} --resume"
            stop(f"stopped at step {step} and saved; {resume}", interrupt.code)
        if step in evals:
            evaluate(step)
        clock.start()

    first = state["step"]
    if first in evals and first not in {row["step"] for row in evaluations(run)}:
        evaluate(first)
    with Interrupt() as interrupt:
        clock.start()
        yield after_step
