"""tools.ladder: what it trains, what it reports, what it refuses, and how certain its fits are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from helpers import ROOT, TINY, script
from matplotlib.figure import Figure

import train_llm
from common.config import HumanInt, UserError
from common.loop import milestones
from common.run import git_state
from model import Llama
from tools import ladder
from tools.ladder import BATCH, NAMES, SHAPES, PowerLaw, needed, run_config
from tools.trials import load_trial

# Losses by tokens in millions, close to those measured on books
PUBLISHED = {0.25: 5.535, 0.5: 5.193, 0.75: 5.008, 1: 4.894, 1.5: 4.730, 2: 4.642, 2.5: 4.565}
PUBLISHED |= {3: 4.524, 3.5: 4.508, 4: 4.457}
DEFAULT = {"250k": 5.2165, "500k": 4.897, "1M": 4.629, "2M": 4.410, "4M": 4.230}


def fake(name: str, losses: dict[float, float], source: str = "books.parquet", **changes) -> Path:
    """A finished run of a ladder with these losses, without training."""
    run = Path("runs") / f"ladder-{name}"
    run.mkdir(parents=True)
    steps = {int(1e6 * millions) // BATCH: loss for millions, loss in losses.items()}
    rows = [
        {"step": step, "tokens": BATCH * step, "val_loss": loss, "val_bpb": loss / 3}
        for step, loss in steps.items()
    ]
    budget = int(1e6 * max(losses))
    summary = dict.fromkeys(("train_loss", "train_seconds", "tokens_per_second"), 1.0)
    summary |= dict.fromkeys(("val_sha256", "tokenizer_sha256", "evaluation_sha256"), "a" * 64)
    summary |= {"code_sha256": "c" * 64, "train_sha256": f"first {budget}", **rows[-1]}
    summary |= {"steps": rows[-1]["step"], "params": 6_426_624, "val_tokens": 65_536, "seed": 0}
    summary |= {"device": "cpu", "commit": "c" * 40, "dirty": False, "peak_memory_gb": 1.0}
    config = {"stage": "llm", "tokens": budget, "dtype": "float32", "data": {"source": source}}
    env = {"cpus": 2, "torch": "2.13.0", "command": ["ladder.py", "train"], "code_sha256": "c" * 64}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "summary.json").write_text(json.dumps(summary | changes))
    (run / "env.json").write_text(json.dumps(env))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A ladder of which the runs of 6x256 are finished."""
    monkeypatch.chdir(tmp_path)
    fake("6x256-published-4M", PUBLISHED)
    for budget, loss in DEFAULT.items():
        fake(f"6x256-default-{budget}", {HumanInt(budget) / 1e6: loss}, params=6_927_744)


def report(capsys, *argv: str) -> str:
    capsys.readouterr()
    ladder.main(["report", *argv])
    return capsys.readouterr().out


def row_of(text: str, *start: str) -> list[str]:
    """The cells of the first table row that starts with these cells."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return next(row for row in rows if row[: len(start)] == list(start))


def error(*argv: str) -> str:
    with pytest.raises(UserError) as raised:
        ladder.main(list(argv))
    return str(raised.value)


# ---- which runs
@pytest.mark.parametrize(
    "name, params",
    [
        ("6x256-published-4M", 6_426_624),
        ("12x256-published-3M", 10_755_840),
        ("21x128-published-4M", 4_840_128),
        ("12x384-published-1.5M", 22_621_056),
    ],
)
def test_the_shapes_have_these_parameters_without_additions(name, params):
    assert name in NAMES
    with torch.device("meta"):
        assert Llama(run_config(name, []).model).n_params() == params


def test_the_published_runs_have_the_published_recipe():
    cfg = run_config("6x256-published-4M", [])
    assert (cfg.tokens, cfg.batch_tokens, cfg.muon_lr, cfg.muon_wd) == (4_000_000, 4096, 0.024, 0)
    assert (cfg.cooldown_frac, cfg.warmup_frac, cfg.adamw_wd, cfg.grad_clip) == (0, 0, 0.2, 1)
    assert (cfg.model.subwords, cfg.model.value_embed, cfg.model.canon) == (0, False, 0)


def test_the_default_runs_have_the_defaults():
    cfg, default = run_config("12x256-default-1M", []), train_llm.Config()
    for key in ("batch_tokens", "muon_lr", "muon_wd", "adamw_lr", "cooldown_frac", "grad_clip"):
        assert getattr(cfg, key) == getattr(default, key)
    for key in ("subwords", "value_embed", "canon"):
        assert getattr(cfg.model, key) == getattr(default.model, key)
    assert (cfg.model.n_layers, cfg.model.d_model) == (12, 256)


@pytest.mark.parametrize("name", [name for name in NAMES if "default" in name])
def test_the_published_run_is_evaluated_after_as_many_tokens_as_a_default_run(name):
    shape, _, budget = name.split("-")
    own = run_config(name, [])
    tokens = train_llm.resolve_recipe(own) * own.batch_tokens
    published = run_config(f"{shape}-published-{SHAPES[shape][2]}", [])
    evaluated = milestones(train_llm.resolve_recipe(published), published.eval_every)
    assert tokens == HumanInt(budget) // BATCH * BATCH
    assert tokens // BATCH in evaluated


def test_runs_share_the_flags_that_change_no_recipe():
    flags = ["--seed=3", "--dtype=float32", "--data.source=x.txt", "--save_every=0.5"]
    for name in NAMES[:2]:
        cfg = run_config(name, flags)
        assert (cfg.seed, cfg.dtype, cfg.data.source, cfg.save_every) == (
            3,
            "float32",
            "x.txt",
            0.5,
        )


@pytest.mark.parametrize(
    "flag",
    ["--tokens=2M", "--cooldown_frac=0.5", "--model.n_layers=3", "--eval_every=0.5", "--resume"]
    + ["--init_from=demo", f"--config={ROOT}/configs/llm_demo.yaml"],
)
def test_a_flag_that_changes_a_recipe_is_refused(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "the ladder sets" in error("train", flag)
    assert not Path("runs").exists()


def test_a_pattern_that_matches_no_run_is_answered_with_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error("train", "--only=6x256-default-300k")
    assert "--only '6x256-default-300k' matches no run" in message
    assert "6x256-default-250k, " in message


# ---- training
SHARED = {k: v for k, v in TINY["train_llm"].items() if k not in ("tokens", "batch_tokens")}
TINY_SHAPE = ([f"--{key}={value}" for key, value in SHARED.items()], ("4096", "8192"), "8192", 0.5)
TINY_NAMES = ["tiny-published-8192", "tiny-default-8192", "tiny-default-4096"]


@pytest.fixture
def tiny(workdir, monkeypatch):
    """A ladder of one tiny shape, with data."""
    monkeypatch.setattr(ladder, "SHAPES", {"tiny": TINY_SHAPE})
    monkeypatch.setattr(ladder, "NAMES", TINY_NAMES)
    monkeypatch.setattr(ladder, "FITTED", "tiny")
    monkeypatch.setattr("sys.argv", ["ladder.py", "train"])


@pytest.fixture
def trained(monkeypatch):
    """The settings of the runs that would be trained."""
    configs = []
    monkeypatch.setattr(train_llm, "main", configs.append)
    return configs


def test_a_ladder_resumes_keeps_what_is_finished_and_is_reported(tiny, monkeypatch, capsys):
    names = ["tiny-published-8192", "tiny-default-4096"]
    monkeypatch.setattr(ladder, "NAMES", names)
    argv, train = ["train", "--run=x"], train_llm.main

    def main(cfg):
        if "default" in cfg.run:
            raise SystemExit(130)
        return train(cfg)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train_llm, "main", main)
        ladder.main(argv)
    assert stopped.value.code == 130
    assert "x-tiny-default-4096 stopped; repeat this command" in capsys.readouterr().err
    assert row_of(report(capsys, "--run=x"), "missing")[1] == "tiny-default-4096"
    finished = Path("runs/x-tiny-published-8192/metrics.jsonl")
    before = finished.stat().st_mtime_ns
    ladder.main(argv)
    assert finished.stat().st_mtime_ns == before
    runs = [load_trial(Path("runs") / f"x-{name}") for name in names]
    losses = [run.evaluations[i]["val_loss"] for run, i in zip(runs, (0, -1), strict=True)]
    row = row_of(report(capsys, "--run=x"), "tiny")
    assert row[2:6] == ["4096", *(f"{x:.4f}" for x in losses), f"{losses[1] - losses[0]:+.4f}"]


def test_a_run_with_a_folder_is_resumed(tiny, trained):
    run = Path("runs/ladder-tiny-default-4096")
    run.mkdir(parents=True)
    (run / "env.json").write_text(json.dumps(git_state()))
    ladder.main(["train", "--only=tiny-*"])
    assert [(cfg.run, cfg.resume) for cfg in trained] == [
        ("ladder-tiny-published-8192", False),
        ("ladder-tiny-default-8192", False),
        ("ladder-tiny-default-4096", True),
    ]
    assert type(trained[0]) is train_llm.Config  # `only` is not stored in a run


def test_a_run_that_another_process_is_training_is_skipped(tiny, trained, capsys):
    Path("runs").mkdir()
    with FileLock("runs/.ladder-tiny-default-8192.lock"):
        ladder.main(["train", "--only=*-default-*"])
    assert [cfg.run for cfg in trained] == ["ladder-tiny-default-4096"]
    assert "another process is training ladder-tiny-default-8192" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, finished, kept",
    [
        ("tiny-default-8192", True, False),
        ("tiny-default-8192", False, False),
        ("tiny-published-8192", False, False),
        ("tiny-published-8192", True, True),
    ],
)
def test_only_a_finished_published_run_may_be_of_other_code(tiny, trained, name, finished, kept):
    run = fake(name, {0.008192: 4.0})
    if not finished:
        (run / "summary.json").unlink()
    if kept:
        ladder.main(["train"])
    else:
        message = error("train")
        assert f"ladder-{name} was made by different code; choose another --run" in message
    assert len(trained) == (3 if kept else 0)


# ---- tokens for a loss
@pytest.mark.parametrize(
    "loss, text",
    [
        (4.0, "1M (1.00x)"),
        (3.5, "1.41M (1.41x)"),  # the middle in log tokens
        (3.0, "2M (2.00x)"),
        (2.9, "4M (4.00x)"),
        (4.1, "<1M (<1.00x)"),
        (2.8, ">8M (>8.00x)"),
    ],
)
def test_tokens_for_a_loss_are_interpolated_or_bounded(loss, text):
    tokens = [1_000_000, 2_000_000, 4_000_000, 8_000_000]
    assert needed(loss, (tokens, [4.0, 3.0, 2.9, 2.95]), 1e6) == text


def test_the_report_compares_the_recipes_at_each_budget(measured, capsys):
    text = report(capsys)
    assert row_of(text, "6x256", "6.4M / 6.9M", "1M")[3:] == [
        *("4.8940", "4.6290", "-0.2650"),
        *("2.08M (2.08x)", "504k (0.50x)", "4.00x"),
    ]
    sizes = "6.4M / 6.9M"
    assert row_of(text, "6x256", sizes, "250k")[6:] == ["476k (1.91x)", "-", "16.00x"]
    assert row_of(text, "6x256", sizes, "4M")[6:] == [">4M (>1.00x)", "1.72M (0.43x)", "1.00x"]
    assert row_of(text, "12x256")[1:] == ["- / -", "1M", *["-"] * 6]


def test_the_report_says_how_runs_were_made_and_which_are_missing(measured, capsys):
    fake("12x256-default-1M", {1: 4.6}, seed=7, dirty=True)
    text = report(capsys)
    missing = [name for name in NAMES if not name.startswith("6x256") and "12x256-d" not in name]
    assert row_of(text, "missing")[1] == "; ".join(missing)
    assert row_of(text, "machine")[1] == "cpu, 2 CPUs, torch 2.13.0"
    assert row_of(text, "dtype, seed")[1] == "float32, 0; float32, 7"
    assert row_of(text, "commit")[1] == f"{'c' * 40}; {'c' * 40} dirty"
    assert row_of(text, "training text")[1] == "data.source books.parquet"
    assert row_of(text, "validation set")[1] == "a" * 12


def test_a_report_of_one_run_has_its_losses_and_no_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fake("6x256-published-4M", PUBLISHED)
    text = report(capsys)
    assert row_of(text, "6x256", "6.4M / -", "2M")[3:5] == ["4.6420", "-"]
    assert "A fit needs the published run and four budgets of the default at 6x256." in text


@pytest.mark.parametrize(
    "name, losses, changes, what",
    [
        ("12x256-default-1M", {1: 4.6}, {"val_sha256": "b"}, "validation set"),
        ("12x256-default-1M", {1: 4.6}, {"tokenizer_sha256": "b"}, "tokenizer"),
        ("12x256-default-1M", {1: 4.6}, {"evaluation_sha256": "b"}, "evaluation"),
        ("12x256-default-1M", {1: 4.6}, {"code_sha256": "b"}, "code"),
        ("12x256-default-1M", {1: 4.6}, {"train_sha256": "b"}, "first 1,000,000 training tokens"),
        ("12x256-published-3M", {3: 4.6}, {"source": "other.txt"}, "data.source"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(measured, name, losses, changes, what):
    fake(name, losses, **changes)
    message = error("report")
    assert f"ladder-{name} differ in {what}: " in message
    assert "delete one of them and train it again" in message


def test_published_runs_may_be_of_other_code(measured, capsys):
    fake("12x256-published-3M", {1: 4.8, 3: 4.6}, code_sha256="b")
    assert row_of(report(capsys), "12x256")[3] == "4.8000"


# ---- fits
def exact(tokens: list[float]) -> np.ndarray:
    return 3.4 + 1.2 * np.array(tokens) ** -0.28


BUDGETS = [250_000, 500_000, 1_000_000, 2_000_000, 4_000_000]
MILLIONS = [tokens / 1e6 for tokens in BUDGETS]


def test_a_fit_recovers_a_power_law():
    law = PowerLaw(BUDGETS, list(exact(MILLIONS)))
    assert law.betas[law.best] == pytest.approx(0.28)
    best, low, high = law([8e6, np.inf])
    assert best == pytest.approx([exact([8])[0], 3.4])
    assert (low < best).all() and (best < high).all()


@pytest.mark.parametrize("millions", [1, 8])
def test_the_range_of_a_prediction_is_that_of_the_allowed_curves(millions):
    losses = exact(MILLIONS) + np.array([0.004, -0.006, 0.001, 0.005, -0.003])
    law = PowerLaw(BUDGETS, list(losses))
    at_1m, B, beta = np.meshgrid(  # E + B, because E and B alone are hardly determined
        np.linspace(4.58, 4.62, 61), np.linspace(0.9, 1.6, 141), np.linspace(0.2, 0.4, 101)
    )
    curves = [at_1m - B + B * x**-beta for x in (*MILLIONS, millions)]
    sse = sum((x - y) ** 2 for x, y in zip(curves[:-1], losses, strict=True))
    values = curves[-1][sse <= sse.min() + 3.84 * law.sigma**2]
    _, low, high = law([1e6 * millions])[:, 0]
    assert [values.min(), values.max()] == pytest.approx([low, high], abs=0.001)


def test_the_range_of_a_prediction_holds_the_truth_in_about_95_of_100_ladders():
    noise = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        law = PowerLaw(BUDGETS, list(exact(MILLIONS) + noise.normal(0, ladder.NOISE, 5)))
        _, low, high = law([8e6])[:, 0]
        hits += low <= exact([8])[0] <= high
    assert 0.92 <= hits / 300 <= 0.99


def test_larger_residuals_make_a_prediction_less_certain():
    widths = []
    for noise in (0.0, 0.02):
        law = PowerLaw(BUDGETS, list(exact(MILLIONS) + noise * np.array([1, -1, 1, -1, 1])))
        _, low, high = law([8e6])[:, 0]
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_the_limit_of_a_curve_is_not_negative():
    law = PowerLaw(BUDGETS, [6.0, 4.5, 3.0, 1.5, 0.1])  # linear in log tokens: no limit
    assert law.E[law.best] >= 0 and (law.E[law.allowed] >= 0).all()


def test_the_report_extrapolates_with_ranges(measured, capsys):
    text = report(capsys)
    assert row_of(text, "published", "10")[2:] == [
        *("0.0128", "3.589 (3.266 to 3.800)"),
        *("0.294 (0.236 to 0.350)", "4.294 (4.262 to 4.323)"),
    ]
    assert "At 8M tokens, default minus published: -0.214 (-0.260 to -0.166)." in text
    assert "27.4M (3.42x),\nbetween 17.4M (2.17x) and 56.8M (7.10x)." in text


# ---- page and plot
def test_the_report_rewrites_the_tables_of_a_page(measured, capsys):
    page = Path("page.md")
    marks = "".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in ("ladder", "fits", "runs"))
    page.write_text(f"# Title\n{marks}after\n")
    assert report(capsys, "--write=page.md") == ""
    text = page.read_text()
    assert text.startswith("# Title\n") and text.endswith("after\n") and "old" not in text
    assert row_of(text, "6x256", "6.4M / 6.9M", "1M")[3] == "4.8940"
    assert [x for x in text.splitlines() if len(x) > 100 and not x.startswith("|")] == []
    report(capsys, "--write=page.md")
    assert page.read_text() == text


def test_the_plot_shows_every_loss_and_both_fits(measured, monkeypatch, capsys):
    fake("21x128-default-1M", {1: 4.725})
    figures, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    for name in ("a.png", "b.png"):
        report(capsys, f"--plot={name}")
    (ax,) = figures[0].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert drawn["published, 6x256"] == list(PUBLISHED.values())
    assert drawn["default, 6x256"] == list(DEFAULT.values())
    assert drawn["default, 21x128"] == [4.725]
    assert len(ax.lines) == 5 and len(ax.collections) == 2  # fits and their ranges
    assert max(ax.lines[-1].get_xdata()) == pytest.approx(8e6)
    assert [tick.get_text() for tick in ax.get_xticklabels()][:2] == ["250k", "500k"]
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    "argv, part",
    [
        (["report", "--run=none"], "no run runs/none-* is finished; train one or pass another"),
        (["report", "--write=page.md"], "the page has no <!-- ladder -->"),
        (["reports"], "'reports' is not a command; use train or report"),
    ],
)
def test_wrong_input_is_answered_with_a_remedy(measured, argv, part):
    Path("page.md").write_text("# No tables\n")
    assert part in error(*argv)
    assert Path("page.md").read_text() == "# No tables\n"


@pytest.mark.parametrize("command, flag", [("train", "--only ONLY"), ("report", "--plot PLOT")])
def test_help_is_that_of_the_command(command, flag):
    text = script("-m", "tools.ladder", command, "--help").stdout
    assert text.startswith(f"usage: python -m tools.ladder {command} [") and flag in text


@pytest.mark.parametrize(
    "argv, part",
    [
        (["report", "--write=none.md"], "none.md: No such file or directory; check the path"),
        (["train", "--tokens=1M"], "--tokens is 1000000, but the ladder sets tokens itself"),
    ],
)
def test_wrong_input_gives_one_line_and_code_2(measured, argv, part):
    process = script("-m", "tools.ladder", *argv)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ") and part in process.stderr
    assert process.stderr.count("\n") == 1
