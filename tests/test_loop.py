import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import MODULES, train_stage

from common import loop
from common.config import HumanInt, RunConfig, UserError
from common.device import Clock
from common.loop import (
    Interrupt,
    clipped_norm,
    finished_summary,
    milestones,
    resolve_steps,
    set_lr,
    state_norm,
    training_loop,
    trapezoid,
    update,
    warming_up,
)
from common.metrics import Metrics, read_metrics
from common.run import checkpoints, resume


def tiny() -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    groups = [{"params": list(model.parameters()), "peak_lr": 0.5}]
    adamw = torch.optim.AdamW(groups, lr=0.5, fused=True)
    return model, [adamw]


def backward(model: torch.nn.Module) -> torch.Tensor:
    loss = model(torch.ones(3, 2)).square().mean()
    loss.backward()
    return loss


# ---- schedules
@pytest.mark.parametrize(
    "progress, factor",
    [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.6, 1.0), (0.8, 0.525), (1.0, 0.05)],
)
def test_trapezoid_rises_stays_and_falls(progress, factor):
    assert trapezoid(progress, 0.1, 0.4, 0.05) == pytest.approx(factor)


def test_trapezoid_falls_at_every_step_of_the_cooldown():
    factors = [trapezoid(step / 100, 0.1, 0.4, 0.05) for step in range(60, 101)]
    assert factors == sorted(factors, reverse=True)
    assert len(set(factors)) == 41


@pytest.mark.parametrize("progress", [0.01, 0.5, 1.0])
def test_trapezoid_without_warm_up_and_cooldown_is_constant(progress):
    assert trapezoid(progress, 0, 0, 0) == 1.0


@pytest.mark.parametrize(
    "steps, fraction, expected",
    [
        (244, 0.25, {61, 122, 183, 244}),
        (10, 0.1, set(range(1, 11))),
        (7, 0, {7}),
        (3, 0.1, {1, 2, 3}),
    ],
)
def test_milestones(steps, fraction, expected):
    assert milestones(steps, fraction) == expected


def test_set_lr_scales_every_group_from_its_own_peak():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [w], "peak_lr": lr} for w, lr in zip(weights, (0.5, 0.1), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=9.0)
    set_lr([optimizer], 0.1)
    set_lr([optimizer], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]


def config(**changes) -> SimpleNamespace:
    settings = {"tokens": 1000, "batch_tokens": 10, "warmup_frac": 0.0, "cooldown_frac": 0.5}
    return SimpleNamespace(**vars(RunConfig()) | settings | changes)


def test_resolve_steps_counts_whole_steps_and_spaces_the_log():
    cfg = config(tokens=1009)
    assert (resolve_steps(cfg, "tokens", "batch_tokens"), cfg.log_every) == (100, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": HumanInt(9)}, "--tokens 9 is less than one step of --batch_tokens 10; set"),
        ({"batch_tokens": 0}, "--batch_tokens is 0; it must be positive"),
        ({"save_every": 1.5}, "--save_every is 1.5; it must be between 0 and 1"),
        ({"seed": -1}, "--seed is -1; it must not be negative"),
        ({"log_every": 0}, "--log_every is 0; it must be positive"),
        ({"warmup_frac": 0.6}, "--warmup_frac 0.6 and --cooldown_frac 0.5 add up to more than 1"),
    ],
)
def test_resolve_steps_refuses_settings_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        resolve_steps(config(**changes), "tokens", "batch_tokens")


# ---- before the loop
def states(model: torch.nn.Module, optimizers: list) -> str:
    """Everything in model and optimizers, tensors with all digits."""
    parts = [part.state_dict() for part in (model, *optimizers)]
    return json.dumps(parts, default=torch.Tensor.tolist)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_warming_up_undoes_steps_of_model_and_optimizer(steps_before):
    model, optimizers = tiny()
    for _ in range(steps_before):
        backward(model)
        update(optimizers)
    before = states(model, optimizers)
    with warming_up(model, *optimizers):
        for _ in range(3):
            backward(model)
            update(optimizers)
        assert states(model, optimizers) != before
    assert states(model, optimizers) == before


def test_empty_libraries_of_a_killed_compilation_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "ab"
    folder.mkdir()
    for name, content in (("broken", b""), ("whole", b"ELF"), ("linking", b"")):
        (folder / f"{name}.so").write_bytes(content)
    # meanwhile, another process finishes its library
    monkeypatch.setattr(time, "sleep", lambda _: (folder / "linking.so").write_bytes(b"ELF"))
    with warming_up(torch.nn.Linear(1, 1)):
        assert {path.name for path in folder.iterdir()} == {"whole.so", "linking.so"}


def test_a_compiler_that_fails_is_one_line_that_names_the_flag():
    model, optimizers = tiny()
    message = r"^torch.compile failed \(no C\+\+ compiler\); pass --compile false$"
    with pytest.raises(UserError, match=message), warming_up(model, *optimizers):
        raise RuntimeError("\nno C++ compiler\nlong trace")


def test_an_unfinished_run_has_no_summary(tmp_path):
    assert finished_summary(tmp_path) is None


def test_a_finished_run_is_announced(tmp_path, capsys):
    (tmp_path / "summary.json").write_text('{"val_loss": 3.5}')
    assert finished_summary(tmp_path) == {"val_loss": 3.5}
    assert "is finished; delete the folder to train it again" in capsys.readouterr().out


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"val_lo')
    with pytest.raises(UserError, match="summary.json is damaged; delete it and resume with"):
        finished_summary(tmp_path)


# ---- in the loop
def test_clipped_norm_is_the_norm_before_clipping():
    model, _ = tiny()
    backward(model)
    norm = clipped_norm(model)
    assert clipped_norm(model, norm.item() / 2).item() == pytest.approx(norm.item())
    assert clipped_norm(model).item() == pytest.approx(norm.item() / 2, rel=1e-4)


def test_update_applies_and_clears_the_gradients():
    model, optimizers = tiny()
    backward(model)
    before = model.weight.clone()
    update(optimizers)
    assert not torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_update_with_found_inf_changes_nothing():
    model, optimizers = tiny()
    backward(model)
    update(optimizers)
    before = states(model, optimizers)
    model.weight.grad = torch.full_like(model.weight, math.nan)
    update(optimizers, torch.tensor(1.0))
    assert states(model, optimizers) == before


def test_state_norm_is_that_of_weights_and_moments():
    model, optimizers = tiny()
    backward(model)
    update(optimizers)
    tensors = [*model.parameters()]
    for state in optimizers[0].state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    expected = torch.cat([t.detach().flatten() for t in tensors]).norm()
    torch.testing.assert_close(state_norm(model, optimizers), expected)


@pytest.mark.parametrize("stage", MODULES)
def test_a_number_that_is_not_finite_stops_a_script_with_the_weights_before_it(
    workdir, monkeypatch, stage
):
    module, changes = MODULES[stage], {"log_every": 100, "eval_every": 0, "save_every": 0}
    if stage == "multimodal":
        train_stage(MODULES["vqvae"], run="v", images=8)
        changes["vqvae"] = "v"
    norms, kept = [], []

    def poisoned(model, *args):
        norms.append(clipped_norm(model, *args))
        if len(norms) == 3:
            kept.append((model, deepcopy(model.state_dict())))
            next(model.parameters()).grad.fill_(math.nan)
            return torch.tensor(math.nan)
        return norms[-1]

    monkeypatch.setattr(module, "clipped_norm", poisoned)
    with pytest.raises(UserError, match=r"gradient norm nan, .* at step 3; stopped; start again"):
        train_stage(module, run="a", **changes)
    assert len(norms) > 3  # noticed at the end, and no step after the third changed anything
    ((model, before),) = kept
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not Path("runs/a/checkpoints").exists() or not checkpoints(Path("runs/a"))


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_sets_the_exit_code_and_the_next_one_acts_at_once(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        signal.raise_signal(number)
        assert interrupt.code == 128 + number
        assert signal.getsignal(number) == before


class Recording:
    """The order in which the loop called its functions, each with whether the clock was running."""

    def __init__(self, monkeypatch):
        self.events, self.running = [], False
        monkeypatch.setattr(Clock, "start", lambda clock: self.set_running(True))
        monkeypatch.setattr(Clock, "stop", lambda clock: self.set_running(False))
        for name in ("save_checkpoint", "stop"):
            monkeypatch.setattr(loop, name, self.recorded(name, getattr(loop, name)))
        monkeypatch.setattr(Metrics, "log", self.recorded("log", lambda *args: None))

    def set_running(self, running: bool) -> None:
        self.running = running

    def recorded(self, name: str, function):
        def call(*args, **kwargs):
            self.events.append((name, self.running))
            return function(*args, **kwargs)

        return call


@pytest.fixture
def recording(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Recording(monkeypatch)


@dataclasses.dataclass
class LoopConfig(RunConfig):
    run: str = "a"
    log_every: int = 1
    save_every: float = 0.5
    eval_every: float = 0.5
    dtype: str = "float32"
    device: str = "cpu"
    lr: float = 0.5


def run_loop(
    recording: Recording,
    stop_at: int | str | None = None,
    plant: Callable = lambda step, model, optimizers: 1.0,
    batches: Iterable = range(10),
    **changes,
) -> None:
    """Train runs/a to step 10, or send a signal at step `stop_at` or in "evaluate STEP".

    `plant` is called before each update and returns the gradient norm.
    """
    run, (model, optimizers) = Path("runs/a"), tiny()
    cfg = LoopConfig(resume=run.exists(), **changes)
    state = resume(cfg, run, model, optimizers, lambda step: {"train": "0"})
    clock = Clock(torch.device("cpu"), state["train_seconds"])
    units = {"unit": "tokens", "per_step": 10, "flops": 1.0}
    metrics = Metrics(run, cfg, state, 10, started=0.0, clock=clock, **units)

    def evaluate(step: int) -> None:
        recording.events.append((f"evaluate {step}", recording.running))
        if stop_at == f"evaluate {step}":
            signal.raise_signal(signal.SIGINT)
        metrics.row(step=step, val_loss=1.0)

    with training_loop(cfg, metrics, model, optimizers, state, evaluate) as after_step:
        for step, _ in after_step.batches(batches):
            assert recording.running
            loss = backward(model)
            norm = torch.tensor(plant(step, model, optimizers))
            update(optimizers, after_step.found_inf(loss, norm))
            if step == stop_at:
                signal.raise_signal(signal.SIGINT)
            after_step(step, loss=loss.detach(), grad_norm=norm, lr=0.5)


def planted(step: int, where: str, number: float) -> Callable:
    """For `plant` of run_loop: at a step, a number in the gradient norm, weights or moments."""

    def plant(now: int, model, optimizers) -> float:
        places = {"weights": model.weight.data}
        for state in optimizers[0].state.values():
            places["moment"] = state["exp_avg_sq"]
        if now == step and where in places:
            places[where].flatten()[-1] = number
        return number if now == step and where == "norm" else 1.0

    return plant


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_value_that_is_not_finite_names_step_and_command(recording, number):
    command = "--resume runs/a/checkpoints/0000005 --run a-2 --lr 0.25$"
    message = f"gradient norm {number}, .* at step 7; stopped; continue from .*{command}"
    with pytest.raises(UserError, match=message):
        run_loop(recording, plant=planted(7, "norm", number), log_every=100)
    assert [row["step"] for row in read_metrics(Path("runs/a")) if "loss" in row] == [*range(1, 7)]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weights", "moment"])
def test_a_number_in_model_or_optimizer_that_is_not_finite_is_never_saved(recording, where, number):
    with pytest.raises(UserError, match="loss nan|norm of weights and optimizer state (nan|inf)"):
        run_loop(recording, plant=planted(10, where, number), log_every=100)
    assert [path.name for path in checkpoints(Path("runs/a"))] == ["0000005"]


def test_the_command_names_a_run_that_does_not_exist(recording):
    Path("runs/a-2").mkdir(parents=True)
    with pytest.raises(UserError, match="start again with a lower .*: --run a-3 --lr 0.25$"):
        run_loop(recording, plant=planted(2, "norm", math.nan), log_every=100)


def test_after_a_step_the_loop_logs_saves_and_evaluates_with_the_clock_stopped(recording):
    run_loop(recording, log_every=5)
    halves = [["log", "save_checkpoint", f"evaluate {step}"] for step in (5, 10)]
    names = ["log", *halves[0], *halves[1]]  # the first step is logged too
    assert recording.events == [(name, False) for name in names]


@pytest.mark.parametrize("stop_at", [3, 5])  # 5: also a step to save and evaluate at
def test_after_a_signal_the_loop_logs_saves_and_stops_before_it_evaluates(recording, stop_at):
    with pytest.raises(SystemExit):
        run_loop(recording, stop_at, log_every=stop_at)
    names = ["log", "log", "save_checkpoint", "stop"]
    assert recording.events == [(name, False) for name in names]


def test_after_a_signal_in_an_evaluation_the_loop_saves_and_stops(recording):
    with pytest.raises(SystemExit):
        run_loop(recording, "evaluate 5", log_every=5, save_every=0)
    names = ["log", "log", "evaluate 5", "save_checkpoint", "stop"]
    assert recording.events == [(name, False) for name in names]
    recording.events.clear()
    run_loop(recording, log_every=5)
    assert recording.events[0] == ("log", False)  # it was evaluated


def test_after_a_signal_the_loop_names_the_command_to_resume(recording, capsys):
    with pytest.raises(SystemExit) as end:
        run_loop(recording, stop_at=3)
    assert end.value.code == 130
    assert "stopped at step 3 and saved; resume with --run a --resume" in capsys.readouterr().err
    assert [path.name for path in checkpoints(Path("runs/a"))] == ["0000003"]


def test_a_run_that_stopped_before_its_evaluation_is_evaluated_first(recording):
    with pytest.raises(SystemExit):
        run_loop(recording, stop_at=5)
    recording.events.clear()
    run_loop(recording)
    assert recording.events[0] == ("evaluate 5", False)


def test_a_run_that_stopped_between_evaluations_is_not_evaluated_first(recording):
    with pytest.raises(SystemExit):
        run_loop(recording, stop_at=3)
    recording.events.clear()
    run_loop(recording, log_every=5)
    assert recording.events[0] == ("log", False)


def failing(n: int) -> Iterator[int]:
    """n batches, then an error of the data."""
    yield from range(n)
    raise UserError("the hub does not answer")


def test_the_last_step_is_saved_if_there_is_no_further_batch(recording):
    with pytest.raises(UserError, match="the hub does not answer"):
        run_loop(recording, batches=failing(7), log_every=100)
    assert [path.name for path in checkpoints(Path("runs/a"))] == ["0000005", "0000007"]
    run_loop(recording)
    assert [row["step"] for row in read_metrics(Path("runs/a")) if "loss" in row] == [*range(1, 11)]


def test_waiting_for_data_is_counted(recording):
    slow = (time.sleep(0.01) for _ in range(10))
    run_loop(recording, batches=slow)
    state = json.loads((checkpoints(Path("runs/a"))[-1] / "state.json").read_text())
    assert state["data_wait_seconds"] >= 0.1


def test_every_step_is_recorded_at_any_interval(recording):
    run_loop(recording, log_every=5, eval_every=0, save_every=0)
    rows = [row for row in read_metrics(Path("runs/a")) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 11))


def test_the_checkpoint_has_step_and_seconds(recording):
    run_loop(recording)
    state = json.loads((checkpoints(Path("runs/a"))[-1] / "state.json").read_text())
    assert state.keys() == {
        "step",
        "train_seconds",
        "data_wait_seconds",
        "seconds_to_first_step",
        "inputs",
        "recipe",
        "code",
        "rows",
        "sha256",
    }
    assert state["step"] == 10


def test_the_clock_counts_only_while_it_runs(monkeypatch):
    times = iter([10.0, 13.0, 50.0, 51.0])
    monkeypatch.setattr(Clock, "now", lambda clock: next(times))
    clock = Clock(torch.device("cpu"), 100.0)
    for _ in range(2):
        clock.start()
        clock.stop()
    assert clock.seconds == 100.0 + 3.0 + 1.0
