import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, flags

import train_llm
from common import UserError
from tools import leaderboard, record, trials

FIXED = {
    "val_tokens": 65_536,
    "device": "GPU",
    "dirty": False,
    "code_sha256": "code",
    "train_sha256": "t" * 64,
    "val_sha256": "v" * 64,
    "tokenizer_sha256": "k" * 16,
    "params": 6_400_000,
    "mfu": None,
    "cost_usd": 0.0,
}


def git(*args: str) -> str:
    return subprocess.run(
        ["git", "-c", "user.name=Ada", "-c", "user.email=a@b.c", *args],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def fake_run(
    name: str,
    seed: int,
    loss: float,
    seconds: float = 100.0,
    tokens: int = 1_000_000,
    config=None,
    **summary,
) -> Path:
    """A run folder as train_llm.py leaves it, of a training that was not."""
    folder = Path("runs") / f"{name}-seed{seed}"
    folder.mkdir(parents=True)
    settings = {
        "run": folder.name,
        "seed": seed,
        "tokens": tokens,
        "cooldown_frac": 0.6,
        "model": {"d_model": 256},
    } | (config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    summary = (
        FIXED
        | {
            "val_loss": loss,
            "val_bpb": loss * 0.358,
            "train_loss": loss - 0.1,
            "tokens": tokens,
            "steps": 244,
            "seed": seed,
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gb": 1.0,
            "commit": git("rev-parse", "HEAD"),
            "evaluation_sha256": train_llm.evaluation_sha256(),
        }
        | summary
    )
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "env.json").write_text(
        json.dumps(
            {
                "cpus": 2,
                "torch": "2.13.0",
                "command": ["record.py", "trials", "--run", name, "--note", "a b"],
            }
        )
    )
    rows = [{"step": s, "tokens": s * 4096, "loss": 9 - s / 100} for s in range(1, 245)]
    rows += [
        {
            "step": s,
            "tokens": s * 4096,
            "val_loss": summary["val_loss"] + (244 - s) / 200,
            "val_bpb": summary["val_bpb"] + (244 - s),
        }
        for s in (122, 244)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def fake_side(name: str, mean: float, n: int = 5, **changes) -> None:
    for seed in range(n):
        fake_run(
            name, seed, mean + 0.003 * (-1) ** seed + 0.0001 * seed, seconds=100 + seed, **changes
        )


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git checkout with a commit of the baseline, and a second one with a line of code more; runs of both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs/records").mkdir(parents=True)
    (tmp_path / "docs/images").mkdir()
    for name in ("evaluations.json", "quoted.md"):
        shutil.copy(ROOT / "docs/records" / name, tmp_path / "docs/records" / name)
    Path("model.py").write_text("x = 1\n")
    git("init", "-q")
    git("add", "model.py")
    git("commit", "-qm", "one")
    fake_side("base", 4.8)
    Path("model.py").write_text("x = 1\ny = 2\n")
    git("commit", "-qam", "two")
    fake_side("new", 4.7, config={"cooldown_frac": 0.5})
    return tmp_path


def submit(name: str = "cooler", base: str | None = "runs/base-*", new: str = "runs/new-*") -> None:
    record.main(
        [
            "submit",
            name,
            *(["--baseline", base] if base else []),
            "--runs",
            new,
            "--note",
            "cooldown | half",
            "--who",
            "Ada",
        ]
    )


def written() -> list[str]:
    return sorted(str(p) for p in Path("docs").rglob("*"))


def problems() -> str:
    with pytest.raises(UserError) as error:
        record.main(["check"])
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- statistics
def accepted(gain: float, n_base: int, n_new: int) -> int:
    """Improvements found in 1,000 comparisons of a known truth: the loss falls by `gain` sigmas, the time is the same."""
    rng = random.Random(n_base + n_new)

    def side(mean, sigma, n):
        return [rng.gauss(mean, sigma) for _ in range(n)]

    return sum(
        trials.compare(
            side(4.8, 0.003, n_base),
            side(4.8 - gain * 0.003, 0.003, n_new),
            side(300, 3, n_base),
            side(300, 3, n_new),
        )["improvement"]
        for _ in range(1000)
    )


@pytest.mark.parametrize("n_base, n_new", [(3, 3), (5, 5), (7, 5)])
def test_no_change_is_accepted_in_at_most_two_of_a_hundred_draws(n_base, n_new):
    assert 1 <= accepted(0, n_base, n_new) <= 20


def test_a_gain_of_three_sigmas_is_found():
    assert accepted(3, 7, 5) >= 950  # five seeds against seven; five against five find some 920


def test_the_verdict_puts_loss_before_speed():
    base, fast, slow = (
        [4.800, 4.803, 4.797, 4.801, 4.799],
        [90, 90.1, 90.2, 89.9, 90.3],
        [110, 110.1, 110.2, 109.9, 110.3],
    )
    same, lower, higher = (
        [x + 0.0002 for x in base],
        [x - 0.05 for x in base],
        [x + 0.05 for x in base],
    )
    time = [100, 100.1, 100.2, 99.9, 100.3]
    for losses, seconds, good, words in [
        (lower, slow, True, "lower by 0.05"),
        (same, fast, True, "equal within noise"),
        (same, time, False, "neither is the loss lower"),
        (higher, fast, False, "higher by 0.05"),
        (same, slow, False, "1.10 of the time"),
    ]:
        found = trials.compare(base, losses, time, seconds)
        assert found["improvement"] is good and words in trials.verdict(found)[1]
    low, high = trials.compare(base, lower, time, time)["ci95"]
    assert low < -0.05 < high < 0
    # by hand: equal variances of 5e-6 and n = 5, so df = 8, t = -0.05 / sqrt(2 * 5e-6 / 5), quantile 2.306
    assert (high - low) / 2 == pytest.approx(2.306 * (2 * 5e-6 / 5) ** 0.5, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------- trials
def test_trials_train_each_seed_once_and_go_on(workdir, capsys, monkeypatch):
    argv = ["trials", *flags(tokens=640), "--run", "a", "--seeds"]
    real, made = train_llm.main, []

    def stopped(cfg):
        made.append(cfg.run)
        if cfg.seed == 1 and len(made) == 2:
            raise SystemExit(130)
        return real(cfg)

    monkeypatch.setattr(train_llm, "main", stopped)
    with pytest.raises(SystemExit) as end:
        record.main([*argv, "3"])
    assert (
        end.value.code == 130
        and "trial 2 of 3 stopped: the same `trials` command goes on" in capsys.readouterr().err
    )
    before = Path("runs/a-seed0/summary.json").stat().st_mtime_ns
    record.main([*argv, "3"])
    assert Path("runs/a-seed0/summary.json").stat().st_mtime_ns == before
    found = trials.load_trials(["runs/a-seed*"])
    losses = [trial.summary["val_loss"] for trial in found]
    assert [trial.summary["seed"] for trial in found] == [0, 1, 2] and len(set(losses)) == 3
    assert [trial.config["run"] for trial in found] == ["a-seed0", "a-seed1", "a-seed2"] and found[
        0
    ].planned == 3
    table = Path("runs/a-trials.md").read_text()
    assert f"| mean | {sum(losses) / 3:.4f} |" in table and table in capsys.readouterr().out
    with pytest.raises(UserError, match="--cooldown_frac 0.3, but"):
        record.main([*argv, "3", "--cooldown_frac", "0.3"])
    monkeypatch.setattr(
        record, "git_state", lambda: {"commit": "x", "dirty": False, "code_sha256": "other"}
    )
    with pytest.raises(UserError, match="runs/a-seed0 was made by other code"):
        record.main([*argv, "3"])


def test_data_hashes_do_not_depend_on_the_recipe_and_do_on_the_data(workdir):
    def train(run, **changes):
        record.main(["trials", *flags(tokens=1000, run=run, **changes), "--seeds", "1"])
        summary = json.loads(Path(f"runs/{run}-seed0/summary.json").read_text())
        return {key: summary[key] for key in trials.FIXED.values()}

    a = train("a", data__tokenizer="bpe-300")
    assert train("b", batch_tokens=96, model__d_ff=32, muon_lr=0.01) == a
    context, fewer = train("c", model__seq_len=64, batch_tokens=128), train("d", eval_tokens=128)
    assert (
        {key for key in a if context[key] != a[key]}
        == {key for key in a if fewer[key] != a[key]}
        == {"val_sha256"}
    )
    assert train("e", data__tokenizer="bpe-290")["tokenizer_sha256"] != a["tokenizer_sha256"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trials"], "trials need a name"),
        (["trials", "--run", "a", "--seed", "3"], "leave --seed and --resume away"),
        (["trials", "--run", "a", "--seeds", "0"], "--seeds is 0"),
        (["trials", "--run", "a", "--sedes", "3"], "did you mean seeds"),
        (["check", "all"], "check takes nothing more, not 'all'"),
        (["compare"], "both sides of `--`"),
        (["compare", "a", "b"], "both sides of `--`"),
        (["rank"], "'rank' is no command"),
        (["compare", "none*", "--", "runs/new-*"], "no run folder matches none*"),
    ],
)
def test_bad_commands_are_one_line(project, argv, message):
    with pytest.raises(UserError) as error:
        record.main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- compare
def edit(file: str, **changes) -> None:
    path = Path(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED = {
    "other data": (dict(train_sha256="x"), "differ in training data"),
    "other validation": (dict(val_sha256="x"), "differ in validation"),
    "other tokenizer": (dict(tokenizer_sha256="x"), "differ in tokenizer"),
    "other machine": (dict(device="T4"), "differ in machine"),
    "other evaluation": (dict(evaluation_sha256="x"), "differ in evaluation"),
    "too large": (dict(params=7_100_000), "the cap is 7,000,000"),
    "other bits": (dict(val_bpb=1.6), "differ in the bits"),
    "other budget": (dict(tokens=2_000_000), "differ in budget"),
    "too large for a GPU": (
        dict(tokens=8_000_000, params=90_000_001),
        "90,000,001 parameters: the cap is 90,000,000",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_compare_is_refused(project, case):
    changes, message = REFUSED[case]
    fake_side("odd", 4.7, **changes)
    with pytest.raises(UserError, match=message) as error:
        record.main(["compare", "runs/base-*", "--", "runs/odd-*"])
    assert "runs/odd-seed0" in str(error.value) and "\n" not in str(error.value)


def test_trials_must_be_whole_and_of_one_kind(project):
    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            submit()
        assert "\n" not in str(error.value) and not [p for p in written() if "cooler" in p]

    keep = Path("keep")
    shutil.copytree("runs", keep)

    def restore():
        shutil.rmtree("runs")
        shutil.copytree(keep, "runs")

    shutil.rmtree("runs/new-seed1")
    refused("seed 1 is missing")
    (
        shutil.rmtree("runs/new-seed2"),
        shutil.rmtree("runs/new-seed3"),
        shutil.rmtree("runs/new-seed4"),
    )
    refused("needs 3 seeds")
    restore()
    shutil.rmtree("runs/new-seed4")
    Path("runs/new-seed0/trials.json").write_text('{"seeds": 5}')
    refused("seed 4 is missing")
    restore()
    Path("runs/new-seed2/summary.json").unlink()
    refused("runs/new-seed2 is not finished")
    restore()
    edit("runs/new-seed2/summary.json", val_loss=float("nan"))
    refused("runs/new-seed2 has val_loss nan")
    restore()
    edit("runs/new-seed2/summary.json", val_loss=4.1)
    refused("does not say what the last evaluation")
    restore()
    edit("runs/new-seed2/summary.json", code_sha256="x")
    refused("are not of one code")
    restore()
    Path("runs/new-seed2/config.yaml").write_text(
        Path("runs/new-seed2/config.yaml").read_text().replace("0.5", "0.4")
    )
    refused("not trials of one recipe: cooldown_frac is 0.5 and 0.4")
    restore()
    shutil.copytree("runs/new-seed2", "runs/new-seed5")
    refused("have the same seed 2")
    edit("runs/new-seed5/summary.json", seed=5)
    refused("same loss to the last digit")
    restore()
    (Path("runs/new-seed2/summary.json")).write_text("{")
    refused("runs/new-seed2 is damaged")
    restore()
    edit("runs/new-seed2/summary.json", dirty=True)
    refused("^runs/new-seed2 ran code that is in no commit")
    restore()
    with pytest.raises(UserError, match="runs/base-seed0 is on both sides"):
        record.main(["compare", "runs/base-*", "--", "runs/base-*"])


def test_compare_shows_figures_verdict_and_what_changed(project, capsys):
    record.main(["compare", "runs/base-*", "--", *map(str, Path("runs").glob("new-*"))])
    out = capsys.readouterr().out
    for part in (
        "baseline (n = 5)",
        "4.8008 ± 0.0033",
        "4.7008 ± 0.0033",
        "-0.1000 (95%",
        "6,400,000",
        "Time: 1.000 of",
        "1.00 ± 0.00",
        "\nImprovement: the loss is lower by 0.1000",
        "cooldown_frac: 0.6 -> 0.5",
        "lines of code: 1 added, 0 removed",
    ):
        assert part in out


# -------------------------------------------------------------------------------------------------- submit and check
def test_a_record_is_written_and_holds(project, capsys):
    submit("first", None, "runs/base-*")
    submit()
    record.main(["check"])
    assert "2 records hold" in capsys.readouterr().out
    (folder,) = Path("docs/records").glob("*-cooler")
    said = json.loads((folder / "record.json").read_text())
    assert said["lines"] == {"added": 1, "removed": 0} and said["settings"] == {
        "cooldown_frac": [0.6, 0.5]
    }
    assert (
        said["command"] == "python -m tools.record trials --run new --note 'a b'"
        and "+y = 2" in (folder / "diff.patch").read_text()
    )
    page = Path("docs/LEADERBOARD.md").read_text()
    rows = [
        line.split(" | ")
        for line in page.splitlines()
        if line.startswith(("| 1", "| 2")) and "Ada" in line
    ]
    assert [row[2] for row in rows] == [
        "4.8008 ± 0.0033 (5)",
        "4.7008 ± 0.0033 (5)",
    ] and "cooldown \\| half" in page
    assert [h for h in page.splitlines() if h.startswith("## ")] == [
        "## small: 1M tokens, no GPU",
        "## 8M tokens",
        "## 20M tokens",
        "## 100M tokens",
        "## 1B tokens",
        "## Quoted, not measured again",
    ]
    assert (
        page.count("No record yet.") == 4
        and "GPU, 2 CPUs, torch 2.13.0" in (folder / "README.md").read_text()
    )
    assert Path("docs/images/leaderboard-small.png").read_bytes()[:4] == b"\x89PNG"
    before = written()
    for name, base, new, message in [
        ("cooler", "runs/base-*", "runs/new-*", "exists: choose another name"),
        ("a/b", "runs/base-*", "runs/new-*", "'a/b' is no name"),
        ("worse", "runs/new-*", "runs/base-*", "behind the record cooler"),
        ("alone", None, "runs/new-*", "has no baseline"),
        ("none", "runs/base-*", "runs/none*", "no run folder matches"),
    ]:
        with pytest.raises(UserError, match=message):
            submit(name, base, new)
        assert written() == before


def test_no_improvement_is_no_record(project):
    fake_side("same", 4.8001)
    with pytest.raises(UserError, match="no improvement: neither is the loss lower"):
        submit(new="runs/same-*")
    assert not [p for p in written() if "cooler" in p]


def test_a_long_trial_is_thinned_and_any_budget_has_its_table(project):
    for seed in range(3):
        folder = fake_run("long", seed, 4.0 + seed, tokens=300_000, steps=2000)
        rows = [{"step": s, "tokens": s, "loss": 1.0} for s in range(1, 2001)]
        rows.append(
            {"step": 2000, "tokens": 2000, "val_loss": 4.0 + seed, "val_bpb": (4.0 + seed) * 0.358}
        )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    submit("long", None, "runs/long-*")
    record.main(["check"])
    (file,) = Path("docs/records").glob("*/trials/seed0/metrics.jsonl")
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(kept) == 501 and kept[-1]["val_loss"] == 4.0
    assert "## 300,000 tokens" in Path("docs/LEADERBOARD.md").read_text()


def forge(kind: str, folder: Path) -> None:
    trial, page = folder / "trials/seed3", Path("docs/LEADERBOARD.md")
    said = json.loads((folder / "record.json").read_text())
    if kind == "mean":
        said["statistics"]["new"]["val_loss"]["mean"] = 4.6
    elif kind == "verdict":
        said["statistics"]["p_lower"] = 1e-9
    elif kind == "schema":
        said["stars"] = 5
    elif kind == "who":
        said["who"] = " "
    elif kind == "lines":
        said["lines"]["added"] = 0
    (folder / "record.json").write_text(json.dumps(said))
    if kind == "dropped seed":
        shutil.rmtree(folder / "trials/seed4")
    elif kind == "dropped seed, all else made anew":
        Path(folder / "trials/seed0/trials.json").write_text('{"seeds": 5}')
        shutil.rmtree(folder / "trials/seed4")
    elif kind == "no trials":
        shutil.rmtree(folder / "trials")
    elif kind == "number in a trial":
        edit(trial / "summary.json", val_loss=4.5)
    elif kind == "number in a trial and its metrics":
        edit(trial / "summary.json", train_seconds=50.0)
    elif kind == "evaluation":
        for side in ("trials", "baseline"):
            for file in folder.glob(f"{side}/*/summary.json"):
                edit(file, evaluation_sha256="x")
    elif kind == "parameters":
        edit(trial.with_name("seed0") / "summary.json", params=7_000_001)
    elif kind == "patch":
        (folder / "diff.patch").write_text("")
    elif kind == "patch gone":
        (folder / "diff.patch").unlink()
    elif kind == "page":
        page.write_text(page.read_text().replace("4.7008", "4.6008"))
    elif kind == "readme":
        (folder / "README.md").write_text("The best.\n")
    elif kind == "picture":
        leaderboard.draw(
            Path("docs/images/leaderboard-small.png"), {"other": ([1, 2], [3.0, 2.0], [0.1, 0.1])}
        )
    elif kind == "renamed":
        folder.rename(folder.with_name("2020-01-01-cooler"))


@pytest.mark.parametrize(
    "kind, found",
    {
        "mean": "statistics.new.val_loss.mean is not what the trials give",
        "verdict": "statistics.p_lower is not",
        "schema": "stars is not",
        "who": "must be lines of text",
        "lines": "lines.added is not",
        "dropped seed": "files.trials/seed4",
        "no trials": "no run folder matches",
        "dropped seed, all else made anew": "seed 4 is missing",
        "number in a trial": "does not say what the last evaluation",
        "number in a trial and its metrics": "files.trials/seed3/summary.json is not",
        "evaluation": "the evaluation is fixed",
        "parameters": "the cap is 7,000,000",
        "patch": "diff.patch is not",
        "patch gone": "has no diff.patch",
        "page": "LEADERBOARD.md is not what",
        "readme": "README.md is not what its record makes",
        "picture": "does not show its records",
        "renamed": "as in the folder's name",
    }.items(),
)
def test_check_catches(project, kind, found):
    submit("first", None, "runs/base-*")
    submit()
    (folder,) = Path("docs/records").glob("*-cooler")
    forge(kind, folder)
    assert found in problems()


def test_check_catches_a_changed_evaluation_in_the_tree(project, monkeypatch):
    submit("first", None, "runs/base-*")
    monkeypatch.setattr(train_llm, "evaluate", lambda *args: 0.0)
    assert "evaluate() is not one" in problems()


def test_check_catches_a_record_without_gain(project):
    fake_side("same", 4.8001)
    submit()
    shutil.rmtree("docs/records")  # as if `submit` had not refused
    (Path("docs/records")).mkdir()
    for name in ("evaluations.json", "quoted.md"):
        shutil.copy(ROOT / "docs/records" / name, Path("docs/records") / name)
    real = trials.compare
    trials.compare = lambda *args: real(*args) | {"improvement": True}
    try:
        submit("lucky", new="runs/same-*")
    finally:
        trials.compare = real
    assert "statistics.improvement is not what the trials give" in problems()
    (folder,) = Path("docs/records").glob("*-lucky")
    sides = [trials.load_trials([folder / side / "*"]) for side in ("trials", "baseline")]
    edit(folder / "record.json", **leaderboard.derive(folder, *sides))
    assert "is no record: neither is the loss lower" in problems()


def test_the_records_of_this_project_hold(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    record.main(["check"])
    assert "records hold" in capsys.readouterr().out
