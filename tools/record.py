"""Train several seeds of a recipe, compare two recipes, and submit an improvement as a record.

python -m tools.record trials --run base --seeds 5 --tokens 8M
python -m tools.record compare 'runs/base-seed*' -- 'runs/new-seed*'    # 3 seeds or more each
python -m tools.record submit short-cooldown --baseline 'runs/base-seed*' \\
    --runs 'runs/new-seed*' --note "cooldown over 0.4 of the run"
python -m tools.record check      # verify all records, the leaderboard and its images
python -m tools.record check ../pull-request    # check an untrusted checkout without running it
python -m tools.record publish    # regenerate the leaderboard and its images, e.g. after a merge
"""

import argparse
import copy
import dataclasses
import gc
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import train_llm
from common.config import RUNS, UserError, load_config, run_script, stop
from common.disk import write_text
from common.run import git_state
from tools import leaderboard
from tools.leaderboard import (
    DOCS,
    Record,
    all_records,
    check_rank,
    copy_trials,
    derive,
    readme,
    store_baseline,
)
from tools.trials import (
    changed_settings,
    check_sides,
    comparison_table,
    lines_of_code,
    load_trials,
    read_data,
    statistics_of,
    trials_table,
    verdict,
)

# The code of a recipe, as git pathspecs; the last line is for commits before common/ was a package.
RECIPE = ["train_llm.py", "model.py", "muon.py", "common", "data", "configs/llm_*.yaml"]
RECIPE += [f":(exclude)data/{name}.py" for name in ("images", "shapes", "captions")]
RECIPE += ["common.py", "metrics.py", "cross_entropy.py"]


@dataclass
class TrialsConfig(train_llm.Config):
    """Settings of `trials`: the number of seeds, and every setting of train_llm.py."""

    run: str = "auto"
    """Required: NAME of the trials, which become the runs NAME-seed0, NAME-seed1 and so on."""
    seed: int = 0
    """Do not set; use --seeds."""
    resume: bool = False
    """Do not set; interrupted trials always resume."""
    seeds: int = 5
    """Number of trials N, with seeds 0 to N - 1."""


def trials(argv: list[str]) -> None:
    """Train one run per seed in one process: runs/NAME-seed0, -seed1, ... Raises UserError.

    Finished trials are kept and interrupted ones are resumed.
    """
    cfg = load_config(
        TrialsConfig,
        argv,
        prog="python -m tools.record trials",
        description="Train one run per seed; the same command resumes after an interruption.",
    )
    if cfg.run == "auto":
        raise UserError("trials need a name; pass --run NAME to make runs/NAME-seed0 and so on")
    if cfg.seed or cfg.resume:
        raise UserError(
            "trials take the seeds 0 to N - 1 and resume by themselves; "
            "omit --seed and --resume, and set --seeds N"
        )
    if cfg.seeds < 1:
        raise UserError(f"--seeds is {cfg.seeds}; it must be positive")
    code = git_state()
    names = [f"{cfg.run}-seed{seed}" for seed in range(cfg.seeds)]
    for name in names:
        env = RUNS / name / "env.json"
        if env.exists() and code_of(env) != code["code_sha256"]:
            raise UserError(
                f"{RUNS / name} was made by different code; choose another --run or delete it"
            )
    if code["dirty"] or not code["commit"]:
        print("uncommitted code: `compare` accepts these trials, `submit` will not", flush=True)
    settings = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(train_llm.Config)}
    for seed, name in enumerate(names):
        print(f"trial {seed + 1} of {cfg.seeds}", flush=True)
        changes = {"run": name, "seed": seed, "resume": (RUNS / name).exists()}
        try:
            train_llm.main(train_llm.Config(**copy.deepcopy(settings) | changes))
        except SystemExit as error:
            message = f"trial {seed + 1} of {cfg.seeds} stopped; repeat this command to resume it"
            stop(message, error.code)
        gc.collect()  # free this trial's model before the next one is made
        for finished in names[: seed + 1]:  # the number of seeds, so that none can be left out
            write_text(RUNS / finished / "trials.json", json.dumps({"seeds": cfg.seeds}))
    text = trials_table(load_trials([RUNS / name for name in names]))
    write_text(RUNS / f"{cfg.run}-trials.md", text)
    print(f"\n{text}", flush=True)


def code_of(env: Path) -> str | None:
    """The code_sha256 in an env.json, None if the file is damaged."""
    try:
        return read_data(env).get("code_sha256")
    except Exception:  # the parser raises many exception types
        return None


def compare(argv: list[str]) -> None:
    """Print the statistics of both sides, the verdict and what changed. Raises UserError."""
    if argv.count("--") != 1 or "--" in (argv[0], argv[-1]):
        raise UserError("compare needs run folders on both sides of `--`: BASE... -- NEW...")
    middle = argv.index("--")
    base, new = load_trials(argv[:middle]), load_trials(argv[middle + 1 :])
    check_sides(base, new)
    print(comparison_table(statistics_of(base, new)))
    for key, (before, after) in changed_settings(base[0], new[0]).items():
        print(f"{key}: {before} -> {after}")
    if any(trial.summary["dirty"] or not trial.summary["commit"] for trial in (*base, *new)):
        print("lines of code: unknown, because some trials ran uncommitted code")
    else:
        lines = lines_of_code(patch_between(base[0].summary["commit"], new[0].summary["commit"]))
        print(f"lines of code: {lines['added']} added, {lines['removed']} removed")


def patch_between(before: str, after: str) -> str:
    """The changes to recipe code between two commits. Raises UserError if a commit is missing."""
    command = ["git", "diff", "--no-ext-diff", "--no-textconv", before, after, "--", *RECIPE]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode:
        reason = process.stderr.strip().splitlines()[0]
        raise UserError(
            f"cannot compare commits {before[:12]} and {after[:12]} ({reason}); fetch both"
        )
    return process.stdout


def submit_options(argv: list[str]) -> argparse.Namespace:
    """The checked command line of `submit`. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.record submit",
        allow_abbrev=False,
        description="Write docs/records/DATE-NAME and the leaderboard; on error, write nothing.",
    )
    parser.error = lambda message: stop(f"submit: {message}", 2)
    runs = "run folders or glob patterns"
    parser.add_argument("name", help="name of the record: letters, digits, '.' and '-'")
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        help=f"{runs} of the baseline; omit only for the first record of a table",
    )
    parser.add_argument("--runs", nargs="+", required=True, help=f"{runs} of the new recipe")
    parser.add_argument("--note", required=True, help="what changed, in one sentence")
    parser.add_argument("--who", help="your name in the leaderboard (default: git's user.name)")
    options = parser.parse_args(argv)
    if not options.who:
        command = ["git", "config", "user.name"]
        options.who = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", options.name):
        raise UserError(f"{options.name!r} is not a record name; use letters, digits, '.' and '-'")
    for key in ("who", "note"):
        text = getattr(options, key)
        if not text.strip() or not text.isprintable():
            raise UserError(f"--{key} is {text!r}; it must be one line of text")
    return options


def submit(argv: list[str]) -> None:
    """Write docs/records/DATE-NAME and the pages made from it, or nothing. Raises UserError."""
    options, today = submit_options(argv), date.today().isoformat()
    records = all_records()
    for record in records:
        if record.metadata["name"] == options.name:
            raise UserError(f"{record.folder} exists; choose another name")
    new, base = load_trials(options.runs), load_trials(options.baseline)
    check_sides(base, new)
    folder = DOCS / "records" / f"{today}-{options.name}"
    draft = folder.with_name(f".{folder.name}.tmp")
    for leftover in draft.parent.glob(".*.tmp"):  # left by a process that was killed
        shutil.rmtree(leftover)
    try:
        copy_trials(new, draft / "trials")
        source = store_baseline(base, draft / "baseline")
        commits = [side[0].summary["commit"] for side in (base, new) if side]
        patch = patch_between(*commits) if len(commits) == 2 and all(commits) else ""
        (draft / "diff.patch").write_text(patch)
        metadata = {"name": options.name, "date": today, "who": options.who, "note": options.note}
        metadata |= derive(draft, new, base, source)
        check_rank(Record(folder, metadata, new, base), records)
        if base and not metadata["statistics"]["improvement"]:
            reason = verdict(metadata["statistics"])[1]
            raise UserError(f"no improvement: {reason}; describe it in docs/LOG.md instead")
        (draft / "record.json").write_text(json.dumps(metadata, indent=1) + "\n")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    leaderboard.publish(all_records())
    print(f"wrote {folder} and docs/LEADERBOARD.md; commit both and open a pull request with this")
    print(f"text:\n\n{readme(metadata)}")


def check(argv: list[str]) -> None:
    """Verify records, page and images, here or in another checkout. Raises UserError.

    From another checkout only data is read, so an untrusted one is safe to check.
    """
    docs = Path(*argv, "docs")
    problems = leaderboard.unsafe_files(docs) or leaderboard.check(docs)
    if problems:
        raise UserError("\nerror: ".join(map(printable, problems)))
    print(f"{len(leaderboard.record_folders(docs))} records are valid")


def printable(text: str) -> str:
    """The text with line breaks and terminal codes escaped; untrusted files may contain them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def publish(argv: list[str]) -> None:
    """Regenerate page, images and the README.md of each record. Raises UserError."""
    leaderboard.publish(all_records())


def main(argv: list[str]) -> None:
    commands = {f.__name__: f for f in (trials, compare, submit, check, publish)}
    name, *rest = argv or ["--help"]
    help_wanted = "-h" in rest or "--help" in rest
    if name in ("-h", "--help") or (help_wanted and name in ("compare", "check", "publish")):
        print(__doc__)
        return
    if name not in commands:
        raise UserError(f"{name!r} is not a command; use {', '.join(commands)}")
    extra = rest[{"check": 1, "publish": 0}.get(name, len(rest)) :]
    if extra:
        raise UserError(f"{name} does not take {extra[0]!r}; omit it")
    commands[name](rest)


if __name__ == "__main__":
    run_script(main)
