import json
import math
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import loop
from common.config import HumanInt, RunConfig, UserError
from common.device import Clock
from common.loop import (
    Interrupt,
    check_finite,
    clipped_norm,
    finished_summary,
    milestones,
    resolve_steps,
    restored,
    set_lr,
    training_loop,
    trapezoid,
    update,
)
from common.metrics import Metrics
from common.run import checkpoints, resume


def tiny() -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    adamw = torch.optim.AdamW([{"params": list(model.parameters()), "peak_lr": 0.5}], lr=0.5)
    return model, [adamw]


def backward(model: torch.nn.Module) -> torch.Tensor:
    loss = model(torch.ones(3, 2)).square().mean()
    loss.backward()
    return loss


# ---- schedules
@pytest.mark.parametrize(
    "progress, factor",
    [(0.01, 0.1), (0.05, 0.5), (0.1, 1.0), (0.6, 1.0), (0.8, 0.525), (1.0, 0.05)],
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
    ],
)
def test_resolve_steps_refuses_settings_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        resolve_steps(config(**changes), "tokens", "batch_tokens")


# ---- before the loop
def test_restored_undoes_steps_of_model_and_optimizer():
    model, optimizers = tiny()
    backward(model)
    update(optimizers)
    weight, state = model.weight.clone(), json.dumps(optimizers[0].state_dict(), default=str)
    with restored(model, *optimizers):
        for _ in range(3):
            backward(model)
            update(optimizers)
        assert not torch.equal(model.weight, weight)
    assert torch.equal(model.weight, weight)
    assert json.dumps(optimizers[0].state_dict(), default=str) == state


def test_an_unfinished_run_has_no_summary(tmp_path):
    assert finished_summary(tmp_path) is None


def test_a_finished_run_is_announced(tmp_path, capsys):
    (tmp_path / "summary.json").write_text('{"val_loss": 3.5}')
    assert finished_summary(tmp_path) == {"val_loss": 3.5}
    assert "is finished; delete the folder to train it again" in capsys.readouterr().out


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


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.inf), (2.0, math.nan, 1.0)])
def test_a_value_that_is_not_finite_names_step_and_remedy(tmp_path, values):
    (tmp_path / "checkpoints/0000003").mkdir(parents=True)
    message = "at step 7; .*last checkpoint is .*checkpoints/0000003; .* lower --muon_lr"
    with pytest.raises(UserError, match=message):
        check_finite(tmp_path, 7, "--muon_lr", *map(torch.tensor, values))


def test_finite_values_come_back_as_numbers(tmp_path):
    assert check_finite(tmp_path, 7, "--lr", torch.tensor(1.5), torch.tensor(2.0)) == [1.5, 2.0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_exit_code_and_the_next_one_acts_at_once(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        signal.raise_signal(number)
        assert interrupt.code == 128 + number
        assert signal.getsignal(number) == before


class Recording:
    """Stands for the functions that the loop calls, and notes the order and if the clock runs."""

    def __init__(self, monkeypatch, clock: Clock):
        self.events, self.running, self.clock = [], False, clock
        monkeypatch.setattr(clock, "start", lambda: self.tick(True))
        monkeypatch.setattr(clock, "stop", lambda: self.tick(False))
        for name, module in (("save_checkpoint", loop), ("stop", loop)):
            real = getattr(module, name)
            monkeypatch.setattr(module, name, self.wrap(name, real))

    def tick(self, running: bool) -> None:
        self.running = running

    def wrap(self, name: str, function):
        def call(*args, **kwargs):
            self.events.append((name, self.running))
            return function(*args, **kwargs)

        return call


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """A function that runs a loop of ten steps; returns the recording and the run folder."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a")
    (run / "checkpoints").mkdir(parents=True)

    def go(stop_at: int | None = None, **changes) -> tuple[Recording, Path]:
        cfg = config(run="a", log_every=1, save_every=0.5, eval_every=0.5, dtype="float32")
        cfg = SimpleNamespace(**vars(cfg) | changes)
        model, optimizers = tiny()
        state = resume(run, model, optimizers)
        clock = Clock(torch.device("cpu"), state["train_seconds"])
        budget = {"unit": "tokens", "per_step": 10, "flops": 1.0}
        metrics = Metrics(run, cfg, state["step"], 10, clock=clock, **budget)
        recording = Recording(monkeypatch, clock)
        metrics.log = recording.wrap("log", lambda *args: None)

        def evaluate(step: int) -> None:
            recording.events.append((f"evaluate {step}", recording.running))
            metrics.row(step=step, val_loss=1.0)

        with training_loop(cfg, metrics, model, optimizers, state, evaluate) as after_step:
            for step in range(state["step"] + 1, 11):
                assert recording.running
                loss = backward(model)
                update(optimizers)
                if step == stop_at:
                    signal.raise_signal(signal.SIGINT)
                after_step(step, loss=loss.item(), grad_norm=1.0, lr=0.5)
        return recording, run

    return go


def test_after_a_step_the_loop_logs_saves_and_evaluates_with_the_clock_stopped(steps):
    recording, _ = steps(log_every=5)
    expected = [
        *["log", "save_checkpoint", "evaluate 5"],
        *["log", "save_checkpoint", "evaluate 10"],
    ]
    assert recording.events == [(name, False) for name in expected]


def test_after_a_signal_the_loop_saves_and_stops_before_it_evaluates(steps, capsys):
    with pytest.raises(SystemExit) as end:
        steps(stop_at=5)
    assert end.value.code == 130
    assert "stopped at step 5 and saved; resume with --run a --resume" in capsys.readouterr().err
    assert [path.name for path in checkpoints(Path("runs/a"))] == ["0000005"]


def test_a_run_that_stopped_before_its_evaluation_is_evaluated_first(steps):
    with pytest.raises(SystemExit):
        steps(stop_at=5)
    recording, _ = steps()
    assert recording.events[0] == ("evaluate 5", False)


def test_the_checkpoint_has_step_and_seconds(steps):
    _, run = steps()
    state = json.loads((checkpoints(run)[-1] / "state.json").read_text())
    assert state.keys() == {"step", "train_seconds"}
    assert state["step"] == 10


def test_the_clock_counts_only_while_it_runs():
    clock = Clock(torch.device("cpu"), 100.0)
    clock.start()
    time.sleep(0.01)
    clock.stop()
    measured = clock.seconds
    time.sleep(0.01)
    assert measured > 100.0
    assert clock.seconds == measured
