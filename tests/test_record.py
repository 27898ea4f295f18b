import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
from datetime import date
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, flags, script
from scipy.stats import ttest_rel

import train_llm
from common.config import UserError, to_plain
from common.metrics import ast_sha256
from tools import leaderboard, record, trials

SUMMARY = {
    "val_tokens": 65_536,
    "device": "GPU",
    "dirty": False,
    "code_sha256": "c" * 64,
    "train_sha256": "t" * 64,
    "val_sha256": "v" * 64,
    "tokenizer_sha256": "k" * 16,
    "params": 6_400_000,
    "peak_memory_gb": 1.0,
    "mfu": None,
    "cost_usd": 0.0,
}
COMMAND = ["record.py", "trials", "--run", "new", "--note", "a b"]


def git(*args: str) -> str:
    command = ["git", "-c", "user.name=Ada", "-c", "user.email=a@b.c", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def metric_rows(summary: dict) -> list[dict]:
    """The rows of metrics.jsonl: every training step, and an evaluation at the middle and end."""
    rows, steps = [], summary["steps"]
    for step in range(1, steps + 1):
        place = {"step": step, "tokens": step * (summary["tokens"] // steps)}
        rows.append(place | {"loss": 4.5 + 1 / step, "grad_norm": 1 / (step + 2), "lr": 0.015})
        if step in (steps // 2, steps):
            scores = {key: summary[key] + (steps - step) / 200 for key in ("val_loss", "val_bpb")}
            rows.append(place | scores)
    return rows


def fake_run(
    name: str,
    seed: int,
    loss: float,
    *,
    seconds: float = 100.0,
    tokens: int = 1_000_000,
    steps: int = 244,
    config: dict | None = None,
    **summary,
) -> Path:
    """A run folder like those of train_llm.py, without training."""
    folder = Path("runs") / f"{name}-seed{seed}"
    folder.mkdir(parents=True)
    settings = {"stage": "llm", "cooldown_frac": 0.6, "model": {"d_model": 256}}
    settings |= (config or {}) | {"run": folder.name, "seed": seed, "tokens": tokens}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    measured = {"val_loss": loss, "val_bpb": loss * 0.358, "train_loss": loss - 0.1}
    speed = {"train_seconds": seconds, "tokens_per_second": tokens / seconds}
    code = {"commit": git("rev-parse", "HEAD"), "evaluation_sha256": train_llm.evaluation_sha256()}
    budget = {"tokens": tokens, "steps": steps, "seed": seed}
    summary = SUMMARY | measured | speed | code | budget | summary
    (folder / "summary.json").write_text(json.dumps(summary))
    env = {"cpus": 2, "torch": "2.13.0", "python": "3.12.1", "command": COMMAND}
    (folder / "env.json").write_text(json.dumps(env))
    lines = [json.dumps(row) + "\n" for row in metric_rows(summary)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def fake_side(name: str, mean: float, n: int = 5, noise: float = 0.003, **changes) -> None:
    for seed in range(n):
        loss = mean + noise * (-1) ** seed + 0.0001 * seed
        fake_run(name, seed, loss, seconds=100 + seed, **changes)


def submit(name: str = "cooler", base: str | None = "runs/base-*", new: str = "runs/new-*") -> None:
    baseline = ["--baseline", base] if base else []
    note = ["--note", "cooldown | half", "--who", "Ada"]
    record.main(["submit", name, *baseline, "--runs", new, *note])


def submit_error(*args) -> str:
    with pytest.raises(UserError) as error:
        submit(*args)
    return str(error.value)


def problems() -> str:
    """What `check` reports."""
    with pytest.raises(UserError) as error:
        record.main(["check"])
    return str(error.value)


def edit(path: Path | str, **changes) -> None:
    """Change entries of a JSON file."""
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def folder_of(name: str) -> Path:
    """The folder of a record."""
    (folder,) = Path("docs/records").glob(f"*-{name}")
    return folder


def metadata_of(name: str) -> dict:
    return json.loads((folder_of(name) / "record.json").read_text())


def written() -> list[str]:
    return sorted(str(path) for path in Path("docs").rglob("*"))


def copy_project(source: Path, tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(source, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def command(monkeypatch):
    """The command line that trials record; that of a test worker is not one to repeat."""
    monkeypatch.setattr("sys.argv", ["record.py", "trials"])


@pytest.fixture(scope="session")
def project_template(tmp_path_factory):
    """A git checkout with two commits, the second one line longer, and five runs of each."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("docs/records").mkdir(parents=True)
        Path("docs/images").mkdir()
        for name in ("evaluations.json", "quoted.md"):
            shutil.copy(ROOT / "docs/records" / name, Path("docs/records") / name)
        Path("model.py").write_text("x = 1\n")
        git("init", "-q")
        git("add", "model.py")
        git("commit", "-qm", "one")
        fake_side("base", 4.8)
        Path("model.py").write_text("x = 1\ny = 2\n")
        git("commit", "-qam", "two")
        fake_side("new", 4.7, config={"cooldown_frac": 0.5})
    return folder


@pytest.fixture
def project(project_template, tmp_path, monkeypatch):
    """The template, without records."""
    return copy_project(project_template, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def copied_template(project_template, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copied")
    with pytest.MonkeyPatch.context() as patch:
        copy_project(project_template, folder, patch)
        submit()
    return folder / "project"


@pytest.fixture
def copied(copied_template, tmp_path, monkeypatch):
    """A project with one record, `cooler`, that has a copy of its baseline."""
    return copy_project(copied_template, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def referring_template(project_template, tmp_path_factory):
    folder = tmp_path_factory.mktemp("referring")
    with pytest.MonkeyPatch.context() as patch:
        copy_project(project_template, folder, patch)
        submit("first", None, "runs/base-*")
        submit()
    return folder / "project"


@pytest.fixture
def referring(referring_template, tmp_path, monkeypatch):
    """A project with two records: the baseline of `cooler` is the trials of `first`."""
    return copy_project(referring_template, tmp_path, monkeypatch)


# ---- statistics
def n_accepted(gain: float, n_base: int, n_new: int, correlation: float = 0) -> int:
    """Improvements accepted in 1,000 comparisons with a loss lower by `gain` sigmas, equal time.

    Args:
        correlation: of the losses of both sides at the same seed.
    """
    rng = random.Random(n_base + n_new)

    def sample(mean, sigma, n):
        return [rng.gauss(mean, sigma) for _ in range(n)]

    def losses(mean, shared):
        own = sample(mean, 0.003 * (1 - correlation) ** 0.5, len(shared))
        return [x + 0.003 * correlation**0.5 * z for x, z in zip(own, shared, strict=True)]

    total = 0
    for _ in range(1000):
        shared = sample(0, 1, max(n_base, n_new))
        sides = losses(4.8, shared[:n_base]), losses(4.8 - gain * 0.003, shared[:n_new])
        seconds = sample(300, 3, n_base), sample(300, 3, n_new)
        total += trials.compare(*sides, *seconds)["improvement"]
    return total


@pytest.mark.parametrize(
    "n_base, n_new, correlation", [(3, 3, 0), (5, 5, 0), (5, 5, 0.9), (7, 5, 0.9)]
)
def test_no_change_is_accepted_in_at_most_two_of_a_hundred_comparisons(n_base, n_new, correlation):
    assert 1 <= n_accepted(0, n_base, n_new, correlation) <= 20


def test_a_gain_of_one_sigma_is_accepted_if_the_seed_moves_both_sides_alike():
    assert n_accepted(1, 5, 5, 0.95) >= 960  # Welch's test accepts 110


def test_a_gain_of_three_sigmas_is_accepted():
    assert n_accepted(3, 7, 7) >= 950


LOSS = [4.800, 4.803, 4.797, 4.801, 4.799]
SAME_LOSS = [4.802, 4.799, 4.800, 4.798, 4.801]
LOWER, HIGHER = ([x + change for x in SAME_LOSS] for change in (-0.05, 0.05))
SECONDS = [100, 100.1, 100.2, 99.9, 100.3]
FASTER, SLOWER = ([x + change for x in SECONDS] for change in (-10, 10))


@pytest.mark.parametrize(
    "losses, seconds, good, reason",
    [
        (LOWER, SLOWER, True, "lower by 0.0500"),
        (SAME_LOSS, FASTER, True, "equal within noise"),
        (SAME_LOSS, SECONDS, False, "the loss is not lower"),
        (HIGHER, FASTER, False, "higher by 0.0500"),
        (SAME_LOSS, SLOWER, False, "1.10x the training time"),
    ],
)
def test_the_verdict_puts_loss_before_speed(losses, seconds, good, reason):
    comparison = trials.compare(LOSS, losses, SECONDS, seconds)
    verdict = trials.verdict(comparison)
    assert comparison["improvement"] is good
    assert verdict[0] is good
    assert reason in verdict[1]


def test_the_interval_of_welch_agrees_with_a_calculation_by_hand():
    comparison = trials.compare(LOSS[:3], [x - 0.05 for x in LOSS[:3]], SECONDS, SECONDS)
    low, high = comparison["ci95"]
    # equal variances of 9e-6 and n = 3: df = 4, standard error sqrt(2 * 9e-6 / 3), quantile 2.776
    assert (high - low) / 2 == pytest.approx(2.776 * (2 * 9e-6 / 3) ** 0.5, rel=1e-3)
    assert (high + low) / 2 == pytest.approx(-0.05)
    assert comparison["difference"] == pytest.approx(-0.05)


def test_the_interval_of_pairs_agrees_with_a_calculation_by_hand():
    low, high = trials.compare(LOSS, LOWER, SECONDS, SECONDS)["ci95"]
    # differences -0.05 + (2, -4, 3, -3, 2) / 1000: variance 1.05e-5, df = 4, quantile 2.776
    assert (high - low) / 2 == pytest.approx(2.776 * (1.05e-5 / 5) ** 0.5, rel=1e-3)
    assert (high + low) / 2 == pytest.approx(-0.05)


# ---- pairs of seeds
NOISY = [4.80, 4.83, 4.79, 4.82, 4.81, 4.84, 4.78]
STEADY_GAIN = [0.010, 0.012, 0.009, 0.011, 0.010, 0.009, 0.011]
NOISY_LOWER = [x - gain for x, gain in zip(NOISY, STEADY_GAIN, strict=True)]


def compare_losses(base: list[float], new: list[float], new_seconds: float = 100) -> dict:
    """A comparison with training times that differ by the machine's noise alone, or by 10%."""
    return trials.compare(
        base,
        new,
        [100 + i / 100 for i in range(len(base))],
        [new_seconds + i / 100 for i in range(len(new))],
    )


@pytest.mark.parametrize("n", [5, 7])
def test_a_small_steady_gain_is_accepted_from_five_pairs_on(n):
    comparison = compare_losses(NOISY[:n], NOISY_LOWER[:n])
    assert comparison["improvement"]
    assert comparison["p_lower"] == pytest.approx(
        ttest_rel(NOISY_LOWER[:n], NOISY[:n], alternative="less").pvalue
    )
    assert trials.welch_test(NOISY[:n], NOISY_LOWER[:n])["p_lower"] > 0.1


@pytest.mark.parametrize("n_base, n_new", [(3, 3), (4, 4), (7, 4), (4, 7)])
def test_fewer_than_five_shared_seeds_are_compared_by_welch(n_base, n_new):
    base, new = NOISY[:n_base], NOISY_LOWER[:n_new]
    comparison = compare_losses(base, new)
    assert comparison.items() >= trials.welch_test(base, new).items()
    assert not comparison["improvement"]
    assert "test" not in comparison


@pytest.mark.parametrize("n_base, n_new", [(7, 5), (5, 7)])
def test_only_the_shared_seeds_are_pairs(n_base, n_new):
    pairs = compare_losses(NOISY[:5], NOISY_LOWER[:5])
    comparison = compare_losses(NOISY[:n_base], NOISY_LOWER[:n_new])
    assert comparison["differences"] == pytest.approx([-gain for gain in STEADY_GAIN[:5]])
    for key in ("difference", "ci95", "p_lower"):
        assert comparison[key] == pairs[key]


@pytest.mark.parametrize(
    "t, seconds, good, reason",
    [
        (-3.76, 100, True, "the loss is lower"),  # 3.747: quantile 0.99 of t with df = 4
        (-3.73, 100, False, "the loss is not lower"),
        (2.12, 90, True, "equal within noise"),  # 2.132: quantile 0.95
        (2.14, 90, False, "the loss is higher"),
    ],
)
def test_pairs_keep_the_limits_of_p(t, seconds, good, reason):
    # deviations of -2, -1, 0, 1, 2 thousandths: standard error sqrt(2.5 / 5) thousandths
    changes = [(t * 0.5**0.5 + deviation) / 1000 for deviation in (-2, -1, 0, 1, 2)]
    new = [x + change for x, change in zip(NOISY, changes, strict=False)]
    assert trials.verdict(compare_losses(NOISY[:5], new, seconds))[0] is good
    assert reason in trials.verdict(compare_losses(NOISY[:5], new, seconds))[1]


@pytest.mark.parametrize("change, p", [(-0.25, 0), (0, 0.5), (0.25, 1)])
def test_equal_differences_have_a_p_and_an_interval(change, p):
    base = [4.5, 4.75, 5.0, 4.25, 5.25]  # with 0.25, exact in binary
    comparison = compare_losses(base, [x + change for x in base])
    assert comparison["p_lower"] == p
    assert comparison["ci95"] == [change, change]
    assert comparison["improvement"] is (change < 0)


def test_times_that_drift_are_not_compared_in_pairs():
    drifting = [100, 110, 120, 130, 140]
    comparison = trials.compare(LOSS, SAME_LOSS, drifting, [x - 1 for x in drifting])
    assert comparison["p_faster"] > 0.1
    assert not comparison["improvement"]


@pytest.fixture
def noisy(project):
    """Seven trials with noisy losses, and five that are lower by about the same at each seed."""
    for seed in range(7):
        fake_run("noisy", seed, NOISY[seed], seconds=100 + seed)
    for seed in range(5):
        fake_run("steady", seed, NOISY_LOWER[seed], seconds=100 + seed)


def test_compare_prints_the_test_and_each_difference(noisy, capsys):
    record.main(["compare", "runs/noisy-*", "--", "runs/steady-*"])
    out = capsys.readouterr().out
    expected = [
        "| seed | 0 | 1 | 2 | 3 | 4 | mean ± sd |\n",
        "| -0.0100 | -0.0120 | -0.0090 | -0.0110 | -0.0100 | -0.0104 ± 0.0011 |\n",
        "loss: -0.0104 (95% confidence interval -0.0118 to -0.0090;\npaired t-test, one-sided p = ",
    ]
    assert [part for part in expected if part not in out] == []


def test_the_order_of_the_runs_does_not_matter(noisy, capsys):
    base, new = (sorted(map(str, Path("runs").glob(f"{s}-*"))) for s in ("noisy", "steady"))
    record.main(["compare", *base, "--", *new])
    in_order = capsys.readouterr().out
    record.main(["compare", *base[::-1], "--", *new[2:], *new[:2]])
    assert capsys.readouterr().out == in_order


def test_a_record_says_how_its_seeds_were_compared(noisy):
    submit("steady", "runs/noisy-*", "runs/steady-*")
    stats = metadata_of("steady")["statistics"]
    assert stats["test"] == "paired t-test"
    assert stats["differences"] == pytest.approx([-gain for gain in STEADY_GAIN[:5]])
    record.main(["check"])


def test_a_record_of_three_seeds_is_compared_by_welch(project):
    remove("base-seed3", "base-seed4", "new-seed3", "new-seed4")
    submit()
    page = (folder_of("cooler") / "README.md").read_text()
    assert "Welch's t-test" in page
    assert "| seed |" not in page
    assert "test" not in metadata_of("cooler")["statistics"]


def test_a_faster_recipe_with_the_same_losses_makes_a_valid_record(project):
    for seed in range(5):
        base = json.loads(Path(f"runs/base-seed{seed}/summary.json").read_text())
        fake_run("fast", seed, base["val_loss"], seconds=50 + seed)
    submit("fast", new="runs/fast-*")
    assert metadata_of("fast")["statistics"]["ci95"] == [0, 0]
    record.main(["check"])


def test_a_record_that_is_steadily_behind_the_best_is_refused(copied):
    fake_side("behind", 4.7005)
    error = submit_error("behind", "runs/base-*", "runs/behind-*")
    assert "is behind the record cooler: the loss is higher by 0.0005" in error


# ---- evaluation hash
ORIGINAL = "def f(x, scale=2):\n    total = x * scale\n    return [total, 'a']\n"
SAME_CODE = {
    "docstring": ORIGINAL.replace("    total", '    """Doc."""\n    total', 1),
    "comment": ORIGINAL.replace("scale\n", "scale  # a comment\n"),
    "line breaks": ORIGINAL.replace("x * scale", "(\n        x\n        * scale\n    )"),
    "quotes and trailing comma": ORIGINAL.replace("[total, 'a']", '[total, "a",]'),
    "blank line and indentation": ORIGINAL.replace("    ", "  ").replace("  total", "\n  total", 1),
}
OTHER_CODE = {
    "operator": ORIGINAL.replace("*", "+"),
    "default": ORIGINAL.replace("scale=2", "scale=3"),
    "string": ORIGINAL.replace("'a'", "'b'"),
    "statement": ORIGINAL.replace("    return", "    total += 1\n    return"),
    "order": ORIGINAL.replace("[total, 'a']", "['a', total]"),
}


def hash_of(source: str, folder: Path) -> str:
    """ast_sha256 of the function f in a module with this source."""
    path = folder / f"module{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ast_sha256(module.f)


@pytest.mark.parametrize("change", SAME_CODE)
def test_formatting_and_docstrings_do_not_change_the_hash_of_a_function(tmp_path, change):
    assert SAME_CODE[change] != ORIGINAL
    assert hash_of(SAME_CODE[change], tmp_path) == hash_of(ORIGINAL, tmp_path)


@pytest.mark.parametrize("change", OTHER_CODE)
def test_changed_code_changes_the_hash_of_a_function(tmp_path, change):
    assert hash_of(OTHER_CODE[change], tmp_path) != hash_of(ORIGINAL, tmp_path)


# ---- trials
@pytest.fixture
def interrupted(workdir, monkeypatch, capsys):
    """The command of three trials that was interrupted in the second, and what it printed."""
    argv, train = ["trials", *flags(tokens=640), "--run", "a", "--seeds", "3"], train_llm.main

    def main(cfg):
        if cfg.seed == 1:
            raise SystemExit(130)
        return train(cfg)

    with monkeypatch.context() as patch:
        patch.setattr(train_llm, "main", main)
        with pytest.raises(SystemExit) as error:
            record.main(argv)
    return argv, error.value.code, capsys.readouterr().err


def test_an_interrupted_trial_stops_the_others(interrupted):
    _, code, message = interrupted
    assert code == 130
    assert "trial 2 of 3 stopped; repeat this command to resume it" in message
    assert not Path("runs/a-seed2").exists()


def test_trials_train_every_seed_once_and_resume(interrupted, capsys):
    finished = Path("runs/a-seed0/metrics.jsonl")
    before = finished.stat().st_mtime_ns
    record.main(interrupted[0])
    made = trials.load_trials(["runs/a-seed*"])
    losses = trials.column(made, "val_loss")
    assert finished.stat().st_mtime_ns == before
    assert trials.column(made, "seed") == [0, 1, 2]
    assert len(set(losses)) == 3
    assert [trial.config["run"] for trial in made] == ["a-seed0", "a-seed1", "a-seed2"]
    assert [trial.planned for trial in made] == [3, 3, 3]
    table = Path("runs/a-trials.md").read_text()
    assert f"| mean | {sum(losses) / 3:.4f} |" in table
    assert table in capsys.readouterr().out


def test_trials_do_not_resume_with_another_setting(interrupted):
    with pytest.raises(UserError, match="cooldown_frac is 0.3"):
        record.main([*interrupted[0], "--cooldown_frac", "0.3"])


def test_trials_do_not_resume_with_other_code(interrupted, monkeypatch):
    other = {"commit": "x", "dirty": False, "code_sha256": "other"}
    monkeypatch.setattr(record, "git_state", lambda: other)
    with pytest.raises(UserError, match="runs/a-seed0 was made by different code"):
        record.main(interrupted[0])


@pytest.fixture
def hashes(workdir):
    """A function that makes a trial with changed settings and returns the hashes of its data."""

    def train(run: str, **changes) -> dict:
        record.main(["trials", *flags(tokens=1000, run=run, **changes), "--seeds", "1"])
        summary = json.loads(Path(f"runs/{run}-seed0/summary.json").read_text())
        return {key: summary[key] for key in trials.FIXED.values()}

    return train


def test_data_hashes_do_not_depend_on_the_recipe(hashes):
    assert hashes("a", batch_tokens=96, model__d_ff=32, muon_lr=0.01) == hashes("b")


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"model__seq_len": 64}, "val_sha256"),
        ({"eval_tokens": 128}, "val_sha256"),
        ({"data__tokenizer": "bpe-290"}, "tokenizer_sha256"),
        ({"data__val_fraction": 0.3}, "train_sha256"),
    ],
)
def test_data_hashes_depend_on_the_data(hashes, changes, key):
    assert hashes("a", **changes)[key] != hashes("b")[key]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trials"], "trials need a name"),
        (["trials", "--run", "a", "--seed", "3"], "omit --seed and --resume"),
        (["trials", "--run", "a", "--seeds", "0"], "--seeds is 0"),
        (["trials", "--run", "a", "--sedes", "3"], "did you mean --seeds"),
        (["check", "none"], "cannot read none/docs (No such file or directory)"),
        (["check", ".", ".."], "check does not take '..'; omit it"),
        (["publish", "all"], "publish does not take 'all'; omit it"),
        (["compare"], "both sides of `--`"),
        (["compare", "a", "b"], "both sides of `--`"),
        (["compare", "a", "--"], "both sides of `--`"),
        (["rank"], "'rank' is not a command"),
        (["compare", "none*", "--", "runs/new-*"], "no run folder matches none*"),
    ],
)
def test_bad_commands_are_one_line(project, argv, message):
    with pytest.raises(UserError) as error:
        record.main(argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv", [[], ["--help"], ["compare", "--help"], ["check", "-h"]])
def test_help_names_every_command(argv, capsys):
    record.main(argv)
    words = set(capsys.readouterr().out.split())
    assert {"trials", "compare", "submit", "check", "publish"} <= words


def test_the_help_of_submit_needs_no_valid_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("docs/records/2020-01-01-bad").mkdir(parents=True)
    with pytest.raises(SystemExit) as error:
        record.main(["submit", "--help"])
    assert error.value.code == 0
    assert "omit only for the first record of a table" in " ".join(capsys.readouterr().out.split())


# ---- compare
REFUSED = {
    "training data": {"train_sha256": "x"},
    "validation set": {"val_sha256": "x"},
    "tokenizer": {"tokenizer_sha256": "x"},
    "machine": {"device": "T4"},
    "evaluation": {"evaluation_sha256": "x"},
    "budget": {"tokens": 2_000_000},
    "the ratio of bits per byte to loss": {"val_bpb": 1.6},
}
TOO_MANY_PARAMETERS = [
    (1_000_000, 7_000_001, "7,000,001 parameters; this budget allows 7,000,000"),
    (8_000_000, 90_000_001, "90,000,001 parameters; this budget allows 90,000,000"),
]


def compare_error(new: str) -> str:
    with pytest.raises(UserError) as error:
        record.main(["compare", "runs/base-*", "--", new])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("fixed", REFUSED)
def test_sides_that_differ_in_what_is_fixed_are_refused(project, fixed):
    fake_side("odd", 4.7, **REFUSED[fixed])
    message = compare_error("runs/odd-*")
    assert f"runs/base-seed0 and runs/odd-seed0 differ in {fixed}" in message


def test_trials_that_started_from_another_model_are_refused(project):
    fake_side("odd", 4.7, config={"init_from": "runs/large"})
    assert "runs/odd-seed0 started from 'runs/large'" in compare_error("runs/odd-*")


@pytest.mark.parametrize("tokens, params, message", TOO_MANY_PARAMETERS)
def test_models_above_the_cap_are_refused(project, tokens, params, message):
    fake_side("odd", 4.7, tokens=tokens, params=params)
    assert compare_error("runs/odd-*") == f"runs/odd-seed0 has {message}"


def test_a_run_cannot_be_on_both_sides(project):
    assert "runs/base-seed0 is on both sides" in compare_error("runs/base-*")


def test_compare_prints_statistics_verdict_and_changes(project, capsys):
    record.main(["compare", "runs/base-*", "--", *map(str, Path("runs").glob("new-*"))])
    out = capsys.readouterr().out
    expected = [
        "|  | baseline (n = 5) | new (n = 5) |",
        "| validation loss, nats per token | 4.8008 ± 0.0033 | 4.7008 ± 0.0033 |",
        "| peak memory, GB | 1.00 ± 0.00 | 1.00 ± 0.00 |",
        "| parameters | 6,400,000 | 6,400,000 |",
        "Difference in validation loss: -0.1000 (95% confidence interval",
        "Training time: 1.000x the baseline's",
        "\nImprovement: the loss is lower by 0.1000",
        "\ncooldown_frac: 0.6 -> 0.5\n",
        "\nlines of code: 1 added, 0 removed\n",
    ]
    assert [part for part in expected if part not in out] == []


def test_the_stage_in_a_config_is_not_a_change(project, capsys):
    for path in Path("runs").glob("base-*/config.yaml"):
        path.write_text(path.read_text().replace("stage: llm\n", ""))
    record.main(["compare", "runs/base-*", "--", "runs/new-*"])
    assert "stage" not in capsys.readouterr().out


# ---- bad trials
def remove(*names: str) -> None:
    for name in names:
        shutil.rmtree(f"runs/{name}")


def remove_the_last_planned_seed() -> None:
    remove("new-seed4")
    Path("runs/new-seed0/trials.json").write_text('{"seeds": 5}')


def change_config(old: str, new: str) -> None:
    path = Path("runs/new-seed2/config.yaml")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def change_summary(**changes) -> None:
    edit("runs/new-seed2/summary.json", **changes)


def copy_a_trial(**changes) -> None:
    shutil.copytree("runs/new-seed2", "runs/new-seed5")
    edit("runs/new-seed5/summary.json", **changes)


BAD_TRIALS = {
    "seed 1 of runs/new-seed0 is missing": lambda: remove("new-seed1"),
    "seed 4 of runs/new-seed0 is missing": remove_the_last_planned_seed,
    "needs at least 3 seeds": lambda: remove("new-seed2", "new-seed3", "new-seed4"),
    "runs/new-seed2 is not finished": Path("runs/new-seed2/summary.json").unlink,
    "runs/new-seed2 is not a run folder": Path("runs/new-seed2/config.yaml").unlink,
    "runs/new-seed2 is damaged": lambda: Path("runs/new-seed2/summary.json").write_text("{"),
    "runs/new-seed2 has no val_loss": lambda: Path("runs/new-seed2/summary.json").write_text("{}"),
    "runs/new-seed2 is a run of stage vqvae": lambda: change_config("llm", "vqvae"),
    "runs/new-seed2 has val_loss nan": lambda: change_summary(val_loss=float("nan")),
    "the last evaluation in metrics.jsonl disagree": lambda: change_summary(val_loss=4.1),
    "runs/new-seed2 differ in code": lambda: change_summary(code_sha256="x"),
    "cooldown_frac is 0.5 and 0.4": lambda: change_config("0.5", "0.4"),
    "have the same seed 2": copy_a_trial,
    "same validation loss to the last digit": lambda: copy_a_trial(seed=5),
    "runs/new-seed2 ran uncommitted code": lambda: change_summary(dirty=True),
}


@pytest.mark.parametrize("message", BAD_TRIALS)
def test_bad_trials_make_no_record(project, message):
    BAD_TRIALS[message]()
    error = submit_error()
    assert message in error
    assert "\n" not in error
    assert not list(Path("docs/records").glob("*cooler*"))


# ---- submit
def test_a_record_is_written_and_valid(referring, capsys):
    record.main(["check"])
    assert "2 records are valid" in capsys.readouterr().out


def test_a_record_says_what_follows_from_its_trials(copied):
    metadata = metadata_of("cooler")
    assert metadata["lines"] == {"added": 1, "removed": 0}
    assert metadata["settings"] == {"cooldown_frac": [0.6, 0.5]}
    assert metadata["command"] == "python -m tools.record trials --run new --note 'a b'"
    assert "+y = 2" in (folder_of("cooler") / "diff.patch").read_text()
    assert "GPU, 2 CPUs, torch 2.13.0" in (folder_of("cooler") / "README.md").read_text()


def test_the_leaderboard_has_a_row_for_each_record(referring):
    page = Path("docs/LEADERBOARD.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if "| Ada |" in line]
    assert [row[2] for row in rows] == ["4.8008 ± 0.0033 (5)", "4.7008 ± 0.0033 (5)"]
    assert [row[9] for row in rows] == ["GPU", "GPU"]
    assert page.count("cooldown \\| half") == 2
    assert "| parameters | device | who |" in page


def test_the_leaderboard_has_a_section_for_each_budget(referring):
    page = Path("docs/LEADERBOARD.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## small: 1M tokens, no GPU",
        "## 8M tokens",
        "## 20M tokens",
        "## 100M tokens",
        "## 1B tokens",
        "## Quoted, not reproduced here",
    ]
    assert page.count("No record yet.") == 4


def test_another_budget_has_its_own_section_and_image(project):
    fake_side("odd", 4.0, n=3, tokens=300_000)
    submit("odd", None, "runs/odd-*")
    assert "\n## 300,000 tokens\n" in Path("docs/LEADERBOARD.md").read_text()
    assert Path("docs/images/leaderboard-300000.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "name, base, new, message",
    [
        ("cooler", "runs/base-*", "runs/new-*", "exists; choose another name"),
        ("a/b", "runs/base-*", "runs/new-*", "'a/b' is not a record name"),
        ("worse", "runs/new-*", "runs/base-*", "behind the record cooler"),
        ("alone", None, "runs/new-*", "has no baseline"),
        ("none", "runs/base-*", "runs/none*", "no run folder matches"),
    ],
)
def test_a_refused_record_writes_nothing(referring, name, base, new, message):
    before = written()
    assert message in submit_error(name, base, new)
    assert written() == before


def test_no_improvement_makes_no_record(project):
    fake_side("same", 4.8001, noise=-0.003)
    before = written()
    error = submit_error("cooler", "runs/base-*", "runs/same-*")
    assert "no improvement: the loss is not lower" in error
    assert written() == before


def test_a_record_stores_evaluations_but_not_training_steps(copied):
    files = sorted(folder_of("cooler").glob("*/*/metrics.jsonl"))
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert len(files) == 10
    assert {tuple(row["step"] for row in trial) for trial in rows} == {(122, 244)}
    assert all("val_loss" in row for trial in rows for row in trial)


def test_a_patch_holds_recipe_code_only(project):
    recipe = ["common/run.py", "configs/llm_a.yaml", "data/text.py", "model.py", "muon.py"]
    recipe += ["train_llm.py", "metrics.py"]
    others = ["tests/test_a.py", "tools/a.py", "docs/a.md", "README.md", "requirements.txt"]
    others += ["data/images.py", "data/shapes.py", "data/captions.py", "train_vqvae.py"]
    others += ["configs/vqvae_demo.yaml"]
    for path in map(Path, recipe + others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("z = 3\n")
    git("add", ".")
    git("commit", "-qm", "three")
    fake_side("many", 4.7)
    submit("many", new="runs/many-*")
    patch = (folder_of("many") / "diff.patch").read_text()
    paths = [line.split(" b/")[1] for line in patch.splitlines() if line.startswith("diff --git")]
    assert sorted(paths) == sorted(recipe)
    # six Python files of one line; model.py had one, which is replaced
    assert metadata_of("many")["lines"] == {"added": 6, "removed": 1}


def test_a_record_of_three_seeds_with_its_baseline_weighs_less_than_60_kb(project):
    config = to_plain(train_llm.Config())
    fake_side("small", 4.8, n=3, steps=976, config=config)
    line = "    x = self.norm(x) + self.attn(x)  # a line of code of ordinary length\n"
    Path("model.py").write_text(line * 200)  # as much as the largest record so far
    Path("tests").mkdir()
    Path("tests/test_model.py").write_text(line * 1000)
    git("add", "model.py", "tests")
    git("commit", "-qm", "three")
    fake_side("large", 4.7, n=3, steps=976, config=config | {"lr_floor": 0.1})
    submit("large", "runs/small-*", "runs/large-*")
    files = [path for path in folder_of("large").rglob("*") if path.is_file()]
    assert len(list(folder_of("large").glob("*/*/metrics.jsonl"))) == 6
    assert sum(path.stat().st_size for path in files) < 60_000


# ---- baselines stored by reference
def test_a_baseline_without_a_record_is_copied(copied):
    assert (folder_of("cooler") / "baseline/seed4/summary.json").exists()
    assert metadata_of("cooler")["baseline_from"] is None


def test_a_baseline_with_a_record_is_stored_by_reference(referring):
    first = folder_of("first")
    assert not (folder_of("cooler") / "baseline").exists()
    assert metadata_of("cooler")["baseline_from"] == f"{first.name}/trials"
    assert f"(../{first.name}/trials/)" in (folder_of("cooler") / "README.md").read_text()


def test_a_reference_keeps_the_statistics_of_the_baseline(referring):
    stats = [metadata_of(name)["statistics"] for name in ("first", "cooler")]
    assert stats[1]["base"] == stats[0]["new"]


def test_the_copied_baseline_of_another_record_is_stored_by_reference(copied):
    fake_side("colder", 4.6)
    submit("colder", new="runs/colder-*")
    assert metadata_of("colder")["baseline_from"] == f"{folder_of('cooler').name}/baseline"
    assert not (folder_of("colder") / "baseline").exists()


def test_a_baseline_can_be_the_trials_of_a_record_on_disk(copied):
    fake_side("colder", 4.6)
    submit("colder", f"{folder_of('cooler')}/trials/*", "runs/colder-*")
    assert metadata_of("colder")["baseline_from"] == f"{folder_of('cooler').name}/trials"


def test_a_baseline_that_differs_from_the_recorded_one_is_copied(copied):
    edit("runs/base-seed3/env.json", python="3.13.0")
    fake_side("colder", 4.6)
    submit("colder", new="runs/colder-*")
    assert metadata_of("colder")["baseline_from"] is None
    assert (folder_of("colder") / "baseline").exists()


# ---- check
def forge_metadata(change) -> None:
    """Apply `change` to the metadata of `cooler`."""
    metadata = metadata_of("cooler")
    change(metadata)
    (folder_of("cooler") / "record.json").write_text(json.dumps(metadata))


def set_metadata(**changes) -> None:
    edit(folder_of("cooler") / "record.json", **changes)


def forge_trial(file: str, **changes) -> None:
    edit(folder_of("cooler") / file, **changes)


def forge_evaluation() -> None:
    for path in folder_of("cooler").glob("*/*/summary.json"):
        edit(path, evaluation_sha256="x")


def forge_the_plan_of_fewer_seeds() -> None:
    (folder_of("cooler") / "trials/seed0/trials.json").write_text('{"seeds": 5}')
    shutil.rmtree(folder_of("cooler") / "trials/seed4")


def forge_page(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def forge_image() -> None:
    curve = ([1, 2], [3.0, 2.0], [0.1, 0.1])
    leaderboard.plot(Path("docs/images/leaderboard-small.png"), {"other": curve})


FORGERIES = {
    "statistics.new.val_loss.mean does not follow": lambda: forge_metadata(
        lambda metadata: metadata["statistics"]["new"]["val_loss"].update(mean=4.6)
    ),
    "statistics.p_lower does not follow": lambda: forge_metadata(
        lambda metadata: metadata["statistics"].update(p_lower=1e-9)
    ),
    "statistics.test does not follow": lambda: forge_metadata(
        lambda metadata: metadata["statistics"].pop("test")
    ),
    "statistics.differences does not follow": lambda: forge_metadata(
        lambda metadata: metadata["statistics"]["differences"].pop()
    ),
    "stars does not follow": lambda: set_metadata(stars=5),
    "must each be one line of text": lambda: set_metadata(who=" "),
    "lines.added does not follow": lambda: set_metadata(lines={"added": 0, "removed": 0}),
    "is not a record (KeyError('note'))": lambda: forge_metadata(
        lambda metadata: metadata.pop("note")
    ),
    "files.trials/seed4/config.yaml does not follow": lambda: shutil.rmtree(
        folder_of("cooler") / "trials/seed4"
    ),
    "no run folder matches": lambda: shutil.rmtree(folder_of("cooler") / "trials"),
    "seed 4 of": forge_the_plan_of_fewer_seeds,
    "the last evaluation in metrics.jsonl disagree": lambda: forge_trial(
        "trials/seed3/summary.json", val_loss=4.5
    ),
    "files.trials/seed3/summary.json does not follow": lambda: forge_trial(
        "trials/seed3/summary.json", train_seconds=103.00000001
    ),
    "files.baseline/seed3/summary.json does not follow": lambda: forge_trial(
        "baseline/seed3/summary.json", train_seconds=103.00000001
    ),
    "the evaluation is fixed": forge_evaluation,
    "this budget allows 7,000,000": lambda: forge_trial(
        "trials/seed0/summary.json", params=7_000_001
    ),
    "files.diff.patch does not follow": lambda: (folder_of("cooler") / "diff.patch").write_text(""),
    "has no diff.patch": lambda: (folder_of("cooler") / "diff.patch").unlink(),
    "LEADERBOARD.md is stale": lambda: forge_page(Path("docs/LEADERBOARD.md"), "4.7008", "4.6008"),
    "README.md is stale": lambda: forge_page(folder_of("cooler") / "README.md", "4.7008", "4.6008"),
    "leaderboard-small.png is stale": forge_image,
    "the folder must be named DATE-NAME": lambda: folder_of("cooler").rename(
        "docs/records/2020-01-01-cooler"
    ),
    "baseline_commit does not follow": lambda: shutil.rmtree(folder_of("cooler") / "baseline"),
}


@pytest.mark.parametrize("problem", FORGERIES)
def test_check_finds_a_forgery(copied, problem):
    FORGERIES[problem]()
    assert problem in problems()


# ---- benchmarks
SCIQ = "sciq acc, inputs aaaaaaaa"


def add_benchmarks(side: str, **changes) -> None:
    """Write evals.json into the runs of a side: SciQ on all documents, PIQA with a limit."""
    for seed, folder in enumerate(sorted(Path("runs").glob(f"{side}-*"))):
        task = {"metrics": {"acc": {"value": 0.25 + seed / 100, "stderr": 0.01}}, "limit": None}
        task["inputs_sha256"] = "a" * 64
        evals = {"checkpoint": "checkpoints/0000244", "weights_sha256": "b" * 64}
        evals |= {"tasks": {"sciq": task, "piqa": task | {"limit": 10}}} | changes
        (folder / "evals.json").write_text(json.dumps(evals))


@pytest.fixture
def benchmarked(project):
    """A record whose new trials, but not its baseline, have benchmark scores."""
    add_benchmarks("new")
    submit()
    return folder_of("cooler")


def test_a_record_has_mean_and_deviation_of_benchmarks_on_all_documents(benchmarked):
    page = (benchmarked / "README.md").read_text()
    assert f"| {SCIQ} |  | 0.2700 ± 0.0158 |" in page
    assert "piqa" not in page
    record.main(["check"])


def test_scores_that_some_trial_lacks_are_omitted(project):
    add_benchmarks("new")
    Path("runs/new-seed2/evals.json").unlink()
    submit()
    assert "sciq" not in (folder_of("cooler") / "README.md").read_text()


def test_scores_on_other_inputs_are_not_in_the_same_row(project):
    add_benchmarks("base", tasks=one_task("sciq", 0.5))
    add_benchmarks("new")
    for path in Path("runs").glob("base-*/evals.json"):
        path.write_text(path.read_text().replace("a" * 64, "c" * 64))
    submit()
    page = (folder_of("cooler") / "README.md").read_text()
    assert "| sciq acc, inputs cccccccc | 0.5000 ± 0.0000 |  |" in page
    assert f"| {SCIQ} |  | 0.2700 ± 0.0158 |" in page


def test_check_finds_forged_benchmarks(benchmarked):
    path = benchmarked / "trials/seed3/evals.json"
    path.write_text(path.read_text().replace("0.28", "0.38"))
    assert "files.trials/seed3/evals.json does not follow" in problems()


def test_benchmarks_of_other_weights_are_refused(project):
    add_benchmarks("new")
    weights = Path("runs/new-seed1/checkpoints/0000244/model.safetensors")
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"others")
    message = "runs/new-seed1/evals.json is not of the weights after step 244"
    assert message in submit_error()


def one_task(name: str, value) -> dict:
    return {name: {"limit": None, "inputs_sha256": "a" * 64, "metrics": {"acc": {"value": value}}}}


BAD_BENCHMARKS = {
    "other step": ({"checkpoint": "checkpoints/0000200"}, "is not of the weights"),
    "other place": ({"checkpoint": "../0000244"}, "is damaged"),
    "no tasks": ({"tasks": None}, "is damaged"),
    "a score that is a list": (
        {"tasks": one_task("a", [])},
        "is damaged",
    ),
    "a score that is not finite": (
        {"tasks": one_task("a", math.nan)},
        "is damaged",
    ),
    "a task with terminal codes": (
        {"tasks": one_task("\x1b[2J", 1)},
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", BAD_BENCHMARKS)
def test_bad_benchmarks_are_refused(project, case):
    changes, message = BAD_BENCHMARKS[case]
    add_benchmarks("new", **changes)
    assert f"runs/new-seed0/evals.json {message}" in submit_error()


# ---- checkouts of strangers
TRAPS = {  # files that would leave a trace if anything of the checkout ran
    "conftest.py": "",
    "sitecustomize.py": "",
    "usercustomize.py": "",
    "train_llm.py": "",
    "yaml.py": "",
    "tools/__init__.py": "",
    "tools/record.py": "",
    "tools/leaderboard.py": "",
    "common/config.py": "",
    "docs/records/__init__.py": "",
    ".git/hooks/post-checkout": "#!/bin/sh\ntouch {trace}\n",
    ".gitattributes": "* diff=trap filter=trap\n",
    ".git/config": '[diff "trap"]\n\ttextconv = touch {trace}\n[core]\n\tfsmonitor = touch {trace}',
    "matplotlibrc": "backend: module://trap",
    "trap.py": "",
}


@pytest.fixture
def stranger(copied_template, tmp_path, monkeypatch):
    """The checkout of a pull request with traps in it, seen from another checkout; the trace."""
    folder, trace = tmp_path / "stranger[1]", tmp_path / "trace"
    shutil.copytree(copied_template / "docs", folder / "docs")
    for name, text in TRAPS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        default = f"open({str(trace)!r}, 'w').close()\n"
        path.write_text(text.replace("{trace}", str(trace)) or default)
        path.chmod(0o755)
    shutil.copytree(ROOT / "docs", tmp_path / "mine/docs")
    monkeypatch.chdir(tmp_path / "mine")
    return folder, trace


def test_check_runs_nothing_of_another_checkout(stranger):
    folder, trace = stranger
    done = script("-m", "tools.record", "check", str(folder), cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "1 records are valid\n"), done.stderr
    assert not trace.exists()


def test_the_traps_work(stranger):
    folder, trace = stranger
    script("-m", "tools.record", "check", cwd=folder)
    assert trace.exists()


def test_check_of_another_checkout_uses_the_evaluations_accepted_here(stranger):
    folder, _ = stranger
    Path("docs/records/evaluations.json").write_text('{"0": "none"}')
    with pytest.raises(UserError, match="the evaluation is fixed"):
        record.main(["check", str(folder)])


def record_in(checkout: Path) -> Path:
    (folder,) = checkout.glob("docs/records/*-cooler")
    return folder


def link_out(checkout: Path) -> None:
    """Replace a trial by a link to the same files outside of the record."""
    trial = record_in(checkout) / "trials/seed0"
    trial.rename(checkout / "outside")
    trial.symlink_to(checkout / "outside")


def link_record(checkout: Path) -> None:
    record_in(checkout).rename(checkout / "outside")
    (checkout / "docs/records/2026-01-01-cooler").symlink_to(checkout / "outside")


def link_file(checkout: Path) -> None:
    path = record_in(checkout) / "diff.patch"
    path.unlink()
    path.symlink_to("/etc/passwd")


def link_docs(checkout: Path) -> None:
    (checkout / "docs").rename(checkout / "outside")
    (checkout / "docs").symlink_to(checkout / "outside")


def link_image(checkout: Path) -> None:
    (checkout / "docs/images/x.png").symlink_to("/dev/zero")


def pipe(checkout: Path) -> None:
    os.mkfifo(record_in(checkout) / "trials/seed0/notes")


def rewrite(path: str, data: bytes):
    """A function that overwrites a file of the record in a checkout."""
    return lambda checkout: (record_in(checkout) / path).write_bytes(data)


def change_in(path: str, **changes):
    """A function that changes entries of a JSON file of the record in a checkout."""
    return lambda checkout: edit(record_in(checkout) / path, **changes)


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i},' * 9}]\n" for i in range(9))
HOSTILE = {
    "a link to a folder outside": (link_out, "neither a folder nor a regular file"),
    "a record that is a link": (link_record, "neither a folder nor a regular file"),
    "a link to a system file": (link_file, "neither a folder nor a regular file"),
    "docs that are a link": (link_docs, "neither a folder nor a regular file"),
    "an image that is a link": (link_image, "neither a folder nor a regular file"),
    "a pipe": (pipe, "neither a folder nor a regular file"),
    "a huge file": (rewrite("diff.patch", b"x" * 1_000_001), "more than 1,000,000 bytes"),
    "a patch that is no text": (rewrite("diff.patch", bytes(range(256))), "files.diff.patch"),
    "a baseline outside": (
        change_in("record.json", baseline_from="../../.."),
        "refers to ../../..",
    ),
    "an absolute baseline": (change_in("record.json", baseline_from="/etc"), "refers to /etc"),
    "seeds in halves": (rewrite("trials/seed0/trials.json", b'{"seeds": 5.5}'), "seeds must be"),
    "nested JSON": (rewrite("record.json", b"[" * 100_000), "is not a record"),
    "JSON that is a list": (rewrite("record.json", b"[]"), "is not a record"),
    "a note with terminal codes": (change_in("record.json", note="\x1b[2J"), "one line of text"),
    "a note with a line break": (change_in("record.json", note="a\nb"), "one line of text"),
    "nested settings": (rewrite("trials/seed0/config.yaml", b"[" * 10_000), "seed0 is damaged"),
    "settings that grow": (rewrite("trials/seed0/config.yaml", LAUGHS.encode()), "a YAML alias"),
    "settings that run code": (
        rewrite("trials/seed0/config.yaml", b"a: !!python/object/apply:os.abort []"),
        "seed0 is damaged",
    ),
    "metrics that are a list": (rewrite("trials/seed0/metrics.jsonl", b"[]\n[]\n"), "seed0"),
    "a number that is a list": (change_in("trials/seed0/summary.json", params=[]), "params []"),
    "a number that is true": (change_in("trials/seed0/summary.json", steps=True), "steps True"),
    "a number without end": (change_in("trials/seed0/summary.json", val_loss=1e300), "1e+300"),
    "seeds without end": (rewrite("trials/seed0/trials.json", b'{"seeds": 1e14}'), "seeds must be"),
    "a commit that is an option": (
        change_in("trials/seed0/summary.json", commit="--output=x"),
        "commit '--output=x'",
    ),
    "a command that is two": (
        change_in("trials/seed0/env.json", command=["a.py; reboot"]),
        "command ['a.py; reboot']",
    ),
    "a device with terminal codes": (
        change_in("trials/seed0/summary.json", device="\x1b[2J"),
        "differ in machine: \\x1b[2J",
    ),
    "two versions of the code": (
        change_in("trials/seed0/summary.json", code=[{"commit": "a"}, {"commit": "b"}]),
        "seed0 was trained by 2 versions of the code",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_records_are_refused_in_printable_lines(stranger, case):
    folder, trace = stranger
    change, message = HOSTILE[case]
    change(folder)
    with pytest.raises(UserError) as error:
        record.main(["check", str(folder)])
    assert message in str(error.value)
    assert str(error.value).replace("\n", "").isprintable()
    assert not trace.exists()


def test_an_image_of_a_stranger_is_not_decoded(stranger):
    folder, _ = stranger
    path = folder / "docs/images/leaderboard-small.png"
    digest = leaderboard.image_digest(path)
    chunks = path.read_bytes()
    start = chunks.index(b"IDAT") + 4
    path.write_bytes(chunks[:start] + b"\0" * (len(chunks) - start))
    assert leaderboard.image_digest(path) == digest
    path.write_bytes(b"no image")
    assert leaderboard.image_digest(path) is None


def test_the_draft_of_a_killed_submission_does_not_stop_the_next(project):
    draft = Path(f"docs/records/.{date.today().isoformat()}-cooler.tmp/trials")
    draft.mkdir(parents=True)
    submit()
    record.main(["check"])
    assert not list(Path("docs/records").glob(".*"))


def rename_of_first() -> None:
    folder_of("first").rename("docs/records/2020-01-01-first")


def rewrite_first() -> None:
    """Change a trial of `first` and everything that follows from it."""
    folder = folder_of("first")
    edit(folder / "trials/seed3/summary.json", train_seconds=50.0)
    made = trials.load_trials([folder / "trials/*"])
    edit(folder / "record.json", **leaderboard.derive(folder, made, [], None))


FORGED_REFERENCES = {
    "wrong hash": (
        lambda: set_metadata(baseline_sha256="0" * 64),
        "baseline_sha256 does not follow from the trials",
    ),
    "missing record": (
        lambda: shutil.rmtree(folder_of("first")),
        "-first/trials is not in docs/records",
    ),
    "renamed record": (rename_of_first, "-first/trials is not in docs/records"),
    "missing trial": (
        lambda: shutil.rmtree(folder_of("first") / "trials/seed4"),
        "-cooler/record.json: baseline_sha256 does not follow from the trials",
    ),
    "changed trial": (
        lambda: edit(folder_of("first") / "trials/seed3/env.json", python="3.9"),
        "-cooler/record.json: baseline_sha256 does not follow from the trials",
    ),
    "rewritten record": (
        rewrite_first,
        "-cooler/record.json: baseline_sha256 does not follow from the trials",
    ),
    "no reference": (lambda: set_metadata(baseline_from=None), "baseline_commit does not follow"),
    "own trials": (
        lambda: set_metadata(baseline_from=f"{folder_of('cooler').name}/trials"),
        "is on both sides",
    ),
    "outside of the records": (
        lambda: set_metadata(baseline_from="../../runs"),
        "its baseline ../../runs is not in docs/records",
    ),
    "not a name": (lambda: set_metadata(baseline_from=[]), "its baseline [] is not in docs"),
    "copy and reference": (
        lambda: shutil.copytree(folder_of("first") / "trials", folder_of("cooler") / "baseline"),
        "has a copied baseline and refers to",
    ),
}


@pytest.mark.parametrize("case", FORGED_REFERENCES)
def test_check_finds_a_forged_reference(referring, case):
    forge, problem = FORGED_REFERENCES[case]
    forge()
    assert problem in problems()


def test_check_finds_a_changed_evaluation_in_the_code(copied, monkeypatch):
    def evaluate(*args):
        return 0.0

    monkeypatch.setattr(train_llm, "evaluate", evaluate)
    assert "train_llm.py: evaluate() has hash" in problems()


def test_publish_repairs_the_pages(copied):
    Path("docs/LEADERBOARD.md").write_text("stale")
    forge_image()
    record.main(["publish"])
    record.main(["check"])


@pytest.fixture
def lucky(project, monkeypatch):
    """A record without an improvement, as if `submit` had not refused it."""
    fake_side("same", 4.8001, noise=-0.003)
    real = trials.compare
    with monkeypatch.context() as patch:
        patch.setattr(trials, "compare", lambda *args: real(*args) | {"improvement": True})
        submit("lucky", new="runs/same-*")
    return folder_of("lucky")


def test_check_finds_a_forged_verdict(lucky):
    assert "statistics.improvement does not follow" in problems()


def test_check_finds_a_record_without_an_improvement(lucky):
    sides = [trials.load_trials([lucky / side / "*"]) for side in ("trials", "baseline")]
    edit(lucky / "record.json", **leaderboard.derive(lucky, *sides, None))
    assert "-lucky is not a record: the loss is not lower" in problems()


def test_the_records_of_this_project_are_valid(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    record.main(["check"])
    assert "records are valid" in capsys.readouterr().out


def test_every_record_of_this_project_weighs_less_than_60_kb():
    sizes = {
        folder.name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in (ROOT / "docs/records").iterdir()
        if folder.is_dir()
    }
    assert {name: size for name, size in sizes.items() if size >= 60_000} == {}
