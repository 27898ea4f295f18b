"""loss.png: what it shows, and that it stays readable."""

import json
import math
import random
from pathlib import Path

import pytest
from helpers import train
from matplotlib.figure import Figure

from common.metrics import plot_loss, read_metrics, smoothed

VAL_LOSS = 2.468


def curve(step: int, steps: int) -> float:
    return 2 + 8 * math.exp(-50 * step / steps)


def write_metrics(run: Path, unit: str, steps: int = 400) -> list[float]:
    """A run whose losses fall from 10 to 2 with noise, and its validation losses; per step, 1000
    units.

    Returns the training losses.
    """
    noise = random.Random(0)
    losses = [curve(step, steps) + noise.gauss(0, 0.1) for step in range(1, steps + 1)]
    rows = [{"step": i, unit: 1000 * i, "loss": loss} for i, loss in enumerate(losses, 1)]
    for step in (steps // 2, steps):
        rows.append({"step": step, unit: 1000 * step, "val_loss": VAL_LOSS})
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return losses


@pytest.fixture
def axes(tmp_path, monkeypatch, request):
    """The axes of a plot against a unit, and the training losses of its run."""
    figures, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    losses = write_metrics(tmp_path / "run", request.param)
    plot_loss(tmp_path / "run", request.param)
    return figures[0].axes[0], losses


tokens = pytest.mark.parametrize("axes", ["tokens"], indirect=True)
every_unit = pytest.mark.parametrize("axes", ["tokens", "images", "sequences"], indirect=True)


@every_unit
def test_the_smoothed_loss_lies_over_the_paler_raw_one(axes):
    ax, losses = axes
    raw, mean, val = ax.lines
    assert list(raw.get_ydata()) == losses
    assert list(mean.get_ydata()) == smoothed(losses)
    assert list(val.get_ydata()) == [VAL_LOSS, VAL_LOSS]
    assert raw.get_alpha() < 0.5 and raw.get_linewidth() < mean.get_linewidth()
    assert raw.get_zorder() <= mean.get_zorder() <= val.get_zorder()


@every_unit
def test_the_legend_has_the_final_values(axes):
    ax, losses = axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    final = sum(losses[-20:]) / 20
    assert labels == [f"training, smoothed: {final:.3f}", "validation: 2.468"]


@tokens
def test_the_budget_is_in_units_that_people_read(axes):
    ax, _ = axes
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert "100k" in labels and "400k" in labels


@every_unit
def test_the_first_losses_do_not_compress_the_rest(axes):
    ax, losses = axes
    low, high = ax.get_ylim()
    assert low <= min(losses) and max(losses[20:]) <= high < 4 < max(losses)


@pytest.mark.parametrize(
    "axes, scale", [("tokens", "linear"), ("images", "log")], indirect=["axes"]
)
def test_only_the_loss_of_a_vqvae_has_a_logarithmic_axis(axes, scale):
    assert axes[0].get_yscale() == scale


# ---- smoothing
@pytest.mark.parametrize("n", [1, 2, 19, 400])
def test_smoothing_keeps_a_constant(n):
    assert smoothed([3.0] * n) == pytest.approx([3.0] * n)


def test_smoothing_removes_noise_without_lagging_behind():
    noise = random.Random(1)
    clean = [curve(step, 1000) for step in range(1000)]
    mean = smoothed([value + noise.gauss(0, 0.3) for value in clean])
    late = [abs(a - b) for a, b in zip(mean, clean, strict=True)][200:]
    assert sum(late) / len(late) < 0.06  # 0.24 without smoothing
    early = [a / b for a, b in zip(smoothed(clean), clean, strict=True)][:200]
    assert min(early) > 0.99 and max(early) < 1.1


def test_the_last_smoothed_loss_is_the_train_loss_of_the_summary(workdir):
    summary = train(run="a", tokens=12_800, allow_repeat="true")
    losses = [row["loss"] for row in read_metrics(Path("runs/a")) if "loss" in row]
    assert smoothed(losses)[-1] == pytest.approx(summary["train_loss"])
