"""The part of a training loop that is the same in every script: everything around the step."""

import gc
import json
import math
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
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
from common.distributed import (
    average,
    broadcast,
    is_lost_rank,
    largest,
    leave_ranks,
    n_ranks,
    rank,
    same_on_all,
)
from common.metrics import Metrics, evaluations
from common.run import checkpoints, is_locked, open_run, origin, save_checkpoint, writing
from common.wandb_run import check_wandb


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
    processes = f", {n_ranks()} processes" if n_ranks() > 1 else ""
    device = f"{device_name(torch.device(cfg.device))}, {cfg.dtype}, {compiled}{processes}"
    for name, text in {"run": f"{run}, {start}", "device": device, **lines}.items():
        print(name, text, flush=True)


def remove_broken_libraries() -> None:
    """Delete empty libraries in the compiler's cache.

    A compilation that was killed leaves them there, and the next one would fail to load them.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # not needed without compilation

    def is_empty(path: Path) -> bool:
        return path.exists() and path.stat().st_size == 0

    if empty := [path for path in Path(cache_dir()).rglob("*.so") if is_empty(path)]:
        time.sleep(5)  # another process may be linking some of them now
        for path in filter(is_empty, empty):
            path.unlink(missing_ok=True)


@contextmanager
def warming_up(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Restore model and optimizers on exit, so that steps run for compilation do not affect
    training.

    Raises UserError if compilation fails.
    """
    print("compiling, which can take a few minutes", flush=True)
    remove_broken_libraries()
    parts = [model, *optimizers]
    before = [deepcopy(part.state_dict()) for part in parts]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the compiler about itself
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
def update(optimizers: list, found_inf: Tensor | None = None) -> None:
    """Apply the gradients and clear them.

    Where found_inf () is 1, weights and optimizer state stay as they are; the device decides, so
    the host does not wait for it.
    """
    for optimizer in optimizers:
        optimizer.found_inf = found_inf  # Muon and PyTorch's fused AdamW read it
        optimizer.step()
        optimizer.zero_grad()


def average_gradients(model: nn.Module, *values: Tensor) -> None:
    """Average the gradients, and the values of a step, over the processes that train together."""
    average([*(p.grad for p in model.parameters()), *values])


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


def not_finite_message(cfg, step: int, lr: str, row: dict, weights: float) -> str:
    """What is not finite, and how to continue; `lr` is the name of the setting to lower."""
    saved = checkpoints(RUNS / cfg.run)
    names = (f"{cfg.run}-{i}" for i in count(2))
    command = f"--run {next(name for name in names if not (RUNS / name).exists())}"
    where = "start again"
    if saved:
        where = f"continue from {saved[-1]} (or, if that fails too, start again)"
        command = f"--resume {saved[-1]} {command}"
    return (
        f"loss {row['loss']}, gradient norm {row['grad_norm']}, norm of weights and optimizer "
        f"state {weights} at step {step}; stopped; {where} with a lower "
        f"learning rate: {command} --{lr} {getattr(cfg, lr) / 2:.3g}"
    )


class Interrupt:
    """Context in which SIGINT, SIGTERM and SIGHUP set `code` to 128 + signal; a second signal
    stops at once, except under torchrun, which passes on a signal that the terminal already sent.
    """

    code = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.handle) for number in stop_signals()}
        return self

    def handle(self, number: int, frame) -> None:
        self.code = 128 + number
        if n_ranks() == 1:
            self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class AfterStep:
    """Called after each step: records the step, then logs, saves and evaluates, in this order, at
    the intervals in cfg and with the clock stopped. After a signal, saves and stops the run, either
    before the evaluation or right after it.

    What a step returns stays on the device until a step at which something is printed or written;
    until then, the host does not wait for the device.
    """

    def __init__(
        self, cfg, metrics: Metrics, model, optimizers, state: dict, evaluate, inputs=None
    ):
        self.cfg, self.metrics, self.run, self.steps = cfg, metrics, metrics.run, metrics.steps
        self.model, self.optimizers, self.state, self.evaluate = model, optimizers, state, evaluate
        self.inputs = inputs or (lambda step: state["inputs"])
        self.evals = milestones(self.steps, cfg.eval_every)
        self.saves = milestones(self.steps, cfg.save_every)
        self.interrupt, self.called, self.saved = Interrupt(), False, state["step"]
        self.step, self.rows, self.bad = state["step"], [], torch.zeros(())

    def batches(self, batches: Iterable) -> Iterator[tuple]:
        """Yield (step, batch) for the remaining steps, timing how long the batches take.

        If there is no batch (UserError), because data could not be downloaded for instance, the
        last step is saved.
        """
        remaining = iter(batches)
        for step in range(self.state["step"] + 1, self.steps + 1):
            start = time.perf_counter()
            try:
                batch = next(remaining)
            except UserError:
                self.metrics.clock.stop()
                if self.called:
                    self.save_if_needed()
                raise
            self.metrics.wait_seconds += time.perf_counter() - start
            yield step, batch

    def found_inf(self, *values: Tensor) -> Tensor:
        """1 () on the device if a value of this step or of an earlier one is not finite, else 0."""
        finite = torch.stack([value.isfinite().all() for value in values]).all()
        self.bad = torch.maximum(self.bad.to(finite.device), (~finite).float())
        return self.bad

    def __call__(self, step: int, *, loss, grad_norm, lr: float, **values) -> None:
        first, self.called = not self.called, True
        self.step = step
        self.rows.append({"step": step, "loss": loss, **values, "grad_norm": grad_norm, "lr": lr})
        log = first or step % self.cfg.log_every == 0 or step == self.steps
        if not (log or step in self.saves or step in self.evals or self.asked_to_stop()):
            return
        self.metrics.clock.stop()
        row = self.write_rows()
        if first:
            self.metrics.first_step_done()
        if log:
            self.metrics.log(step, row["loss"], lr, row["grad_norm"])
        if step in self.saves:
            self.save()
        self.stop_if_asked()
        if step in self.evals:
            self.evaluate_now(step)
            self.stop_if_asked()
        self.metrics.clock.start()

    def write_rows(self) -> dict:
        """Fetch the rows since the last call, check and write them; returns the last.

        Raises UserError if a value, a weight or the optimizer state is not finite.
        """
        rows, self.rows = self.rows, []
        tensors = [value for row in rows for value in row.values() if torch.is_tensor(value)]
        tensors.append(state_norm(self.model, self.optimizers))
        numbers = torch.stack([tensor.to(tensors[0].device).float() for tensor in tensors]).tolist()
        fetched = iter(zip(numbers, tensors, strict=True))
        for row in rows:
            for name, value in row.items():
                if torch.is_tensor(value):
                    number, tensor = next(fetched)
                    row[name] = number if tensor.is_floating_point() else int(number)
            if not all(map(math.isfinite, row.values())):
                self.stop_not_finite(row, numbers[-1])
            with writing(self.run, self.run / "metrics.jsonl"):
                self.metrics.row(**row)
        if not math.isfinite(numbers[-1]):
            self.stop_not_finite(rows[-1], numbers[-1])
        return rows[-1]

    def stop_not_finite(self, row: dict, weights: float) -> None:
        lr = "lr" if hasattr(self.cfg, "lr") else "muon_lr"
        raise UserError(not_finite_message(self.cfg, row["step"], lr, row, weights))

    def save(self) -> None:
        self.saved = self.step
        if rank() == 0:
            self.state["inputs"] = self.inputs(self.step)
            progress = {"step": self.step, **self.metrics.progress(), "rows": self.metrics.sync()}
            save_checkpoint(self.run, self.model, self.optimizers, self.state | progress)

    def evaluate_now(self, step: int) -> None:
        with writing(self.run, self.run / "samples"):
            self.evaluate(step)
        gc.collect()  # it is off between evaluations

    def asked_to_stop(self) -> int:
        """The exit code if a signal asked a rank to stop, else 0: all ranks stop at one step."""
        return largest(self.interrupt.code)

    def stop_if_asked(self) -> None:
        if code := self.asked_to_stop():
            self.save_if_needed()
            leave_ranks()  # torchrun stops all ranks when one has ended
            resume = f"resume with --run {self.cfg.run} --resume"
            stop(f"stopped at step {self.step} and saved; {resume}", code)

    def save_if_needed(self) -> None:
        if self.rows:
            self.write_rows()
        if self.saved != self.step:
            self.save()


@contextmanager
def training_loop(
    cfg,
    metrics: Metrics,
    model: nn.Module,
    optimizers: list,
    state: dict,
    evaluate: Callable[[int], None],
    assets: Callable[[Path], None] = lambda folder: None,
    inputs: Callable[[int], dict] | None = None,
) -> Iterator[AfterStep]:
    """Lock the run, create its folder if it is new, and yield the function to call after a step:
    after_step(step, loss=, grad_norm=, lr=, **values).

    `state` is what a checkpoint stores in addition to its progress; `assets` writes the files of a
    new run folder other than its config; `inputs` are those of `resume`. If the run stopped between
    saving and evaluating, it is evaluated first. A new run folder is removed if no step completes.
    """
    run, first = metrics.run, state["step"]
    after_step = AfterStep(cfg, metrics, model, optimizers, state, evaluate, inputs)

    def fill(folder: Path) -> None:
        assets(folder)
        if cfg.resume:
            start_from(origin(cfg, run), folder, first)
            save_checkpoint(folder, model, optimizers, state)

    broadcast(model)
    lock = open_run(cfg, run, fill) if rank() == 0 else None
    try:
        metrics.open()
        if rank() == 0:
            forget_later(run, first)
        if same_on_all(first in after_step.evals and not is_evaluated(run, first)):
            after_step.evaluate_now(first)
        with after_step.interrupt, no_garbage_collection(), lost_ranks_reported(after_step):
            metrics.clock.start()
            yield after_step
            leave_ranks()
    except BaseException:
        metrics.stopped()
        if not (after_step.called or cfg.resume is True) and lock:
            shutil.rmtree(run)
        raise
    finally:
        metrics.close()
        if lock:
            lock.release()


@contextmanager
def lost_ranks_reported(after_step: AfterStep) -> Iterator[None]:
    """If another rank dies, save the last complete step and raise UserError.

    A step exchanges everything before it changes the weights, so they are those of that step. If
    rank 0, which saves, is the one that died, rank 1 reports it. The others exit without a line.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        resume = f"resume with --run {after_step.cfg.run} --resume"
        if rank():
            if rank() == 1 and not is_locked(after_step.run):  # the lock of rank 0 died with it
                print(f"error: the process that saves this run died; {resume}", file=sys.stderr)
            sys.exit(2)
        after_step.metrics.clock.stop()
        remedy = "start again"
        if after_step.called:
            after_step.save_if_needed()
            remedy = f"step {after_step.step} is saved, {resume}"
        raise UserError(f"another process of this run died; {remedy}") from error


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's garbage collector would stop the host for milliseconds at arbitrary steps."""
    enabled = gc.isenabled()
    gc.freeze()  # what exists now is not searched at evaluations either
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def is_evaluated(run: Path, step: int) -> bool:
    return step in {row["step"] for row in evaluations(run)}


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
