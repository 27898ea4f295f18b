"""The leaderboard: several seeds of a recipe, the comparison of two, and the record that a better one makes.

python -m tools.record trials --run base --seeds 5 --tokens 8M
python -m tools.record compare 'runs/base-seed*' -- 'runs/new-seed*'
python -m tools.record submit short-cooldown --baseline 'runs/base-seed*' --runs 'runs/new-seed*' --note "cooldown 0.4"
python -m tools.record check      # do all records, the page and its pictures hold?
python -m tools.record publish    # make page and pictures anew, after a merge say
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

import train_llm
from common import RUNS, UserError, git_state, load_config, run_script, stop, write_text
from tools import leaderboard
from tools.leaderboard import (
    DOCS,
    Record,
    all_records,
    check_first,
    copy_trials,
    derive,
    publish,
    readme,
)
from tools.trials import (
    changed_settings,
    check_pair,
    check_side,
    comparison_table,
    lines_of_code,
    load_trials,
    statistics_of,
    trials_table,
    verdict,
)


@dataclass
class TrialsConfig(train_llm.Config):
    """Settings of the trials: the number of seeds, and all of train_llm.py."""

    seeds: int = 5
    """Trials to make, with seeds 0 to N - 1."""


def trials(argv: list[str]) -> None:
    """Train a config once a seed, in one process, as runs/NAME-seed0, -seed1, ...; finished ones stay. Raises UserError."""
    cfg = load_config(TrialsConfig, argv)
    if cfg.run == "auto":
        raise UserError("trials need a name: --run NAME makes runs/NAME-seed0 and so on")
    if cfg.seed or cfg.resume:
        raise UserError(
            "trials take seeds 0 to N - 1 and go on by themselves: leave --seed and --resume away, give --seeds N"
        )
    if cfg.seeds < 1:
        raise UserError(f"--seeds is {cfg.seeds}: it must be positive")
    base, code = (
        {f.name: getattr(cfg, f.name) for f in dataclasses.fields(train_llm.Config)},
        git_state(),
    )
    names = [f"{cfg.run}-seed{seed}" for seed in range(cfg.seeds)]
    for name in names:
        env = RUNS / name / "env.json"
        if env.exists() and json.loads(env.read_text()).get("code_sha256") != code["code_sha256"]:
            raise UserError(
                f"{RUNS / name} was made by other code than this: choose another --run, or delete that one"
            )
    if code["dirty"] or not code["commit"]:
        print(
            "the code is not committed: fine to compare, but `submit` will need trials of a commit",
            flush=True,
        )
    for seed, name in enumerate(names):
        print(f"trial {seed + 1} of {cfg.seeds}", flush=True)
        try:
            train_llm.main(
                train_llm.Config(
                    **copy.deepcopy(base)
                    | {"run": name, "seed": seed, "resume": (RUNS / name).exists()}
                )
            )
        except SystemExit as end:
            stop(
                f"trial {seed + 1} of {cfg.seeds} stopped: the same `trials` command goes on",
                end.code,
            )
        gc.collect()  # the trial's model, before the next one is made
        for done in names[: seed + 1]:
            write_text(
                RUNS / done / "trials.json", json.dumps({"seeds": cfg.seeds})
            )  # so that none can be left out later
    text = trials_table(load_trials([RUNS / name for name in names]))
    (RUNS / f"{cfg.run}-trials.md").write_text(text)
    print(f"\n{text}", flush=True)


def compare(argv: list[str]) -> None:
    """Show both sides and the verdict. Raises UserError."""
    if argv.count("--") != 1 or "--" in (argv[0], argv[-1]):
        raise UserError(
            "compare takes run folders or patterns on both sides of `--`: compare BASE... -- NEW..."
        )
    middle = argv.index("--")
    base, new = load_trials(argv[:middle]), load_trials(argv[middle + 1 :])
    check_pair(base, new)
    print(comparison_table(statistics_of(base, new)))
    for key, (before, after) in changed_settings(base[0], new[0]).items():
        print(f"{key}: {before} -> {after}")
    if any(trial.summary["dirty"] or not trial.summary["commit"] for trial in (*base, *new)):
        print("lines of code: not known, some trials ran code that is in no commit")
    else:
        lines = lines_of_code(patch_between(base[0].summary["commit"], new[0].summary["commit"]))
        print(f"lines of code: {lines['added']} added, {lines['removed']} removed")


def patch_between(before: str, after: str) -> str:
    """What a recipe's code changes. Raises UserError where a commit is not in this checkout."""
    command = ["git", "diff", before, after, "--", "*.py", "configs", "requirements.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"no difference between commits {before[:12]} and {after[:12]}: {done.stderr.strip().splitlines()[0]}"
        )
    return done.stdout


def submit(argv: list[str]) -> None:
    """Write docs/records/DATE-NAME and the pages that follow from it, or nothing. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="record.py submit",
        allow_abbrev=False,
        description="Write docs/records/DATE-NAME and the leaderboard, or nothing.",
    )
    parser.error = lambda message: stop(f"submit: {message}", 2)
    parser.add_argument("name", help="of the record: letters, digits, '.', '-'")
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        help="run folders or patterns; only a table's first record has none",
    )
    parser.add_argument("--runs", nargs="+", required=True, help="run folders or patterns")
    parser.add_argument("--note", required=True, help="what changed, in a sentence")
    parser.add_argument("--who", help="name for the table (default: git's user.name)")
    cfg = parser.parse_args(argv)
    who = (
        cfg.who
        or subprocess.run(
            ["git", "config", "user.name"], capture_output=True, text=True
        ).stdout.strip()
    )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", cfg.name):
        raise UserError(f"{cfg.name!r} is no name for a record: use letters, digits, '.', '-'")
    for option, text in (("who", who), ("note", cfg.note)):
        if not text.strip() or "\n" in text:
            raise UserError(f"--{option} {text!r}: it must be a line of text")
    records, today = all_records(), date.today().isoformat()
    if taken := [r.folder for r in records if r.said["name"] == cfg.name]:
        raise UserError(f"{taken[0]} exists: choose another name")
    new, base = load_trials(cfg.runs), load_trials(cfg.baseline) if cfg.baseline else []
    check_pair(base, new) if base else check_side(new)
    folder = DOCS / "records" / f"{today}-{cfg.name}"
    draft = folder.with_name(f".{folder.name}.tmp")
    try:
        copy_trials(new, draft / "trials")
        copy_trials(base, draft / "baseline")
        patch = (
            patch_between(base[0].summary["commit"], new[0].summary["commit"])
            if base and new[0].summary["commit"]
            else ""
        )
        (draft / "diff.patch").write_text(patch)
        said = {"name": cfg.name, "date": today, "who": who, "note": cfg.note}
        said |= derive(draft, new, base)
        record = Record(folder, said, new, base)
        check_first(record, records)
        if base and not said["statistics"]["improvement"]:
            raise UserError(
                f"no improvement: {verdict(said['statistics'])[1]}; docs/LOG.md is the place for it"
            )
        (draft / "record.json").write_text(json.dumps(said, indent=1) + "\n")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    publish(all_records())
    print(
        f"{folder} and docs/LEADERBOARD.md are written: commit both, and put this into the pull request\n\n{readme(said)}"
    )


def check(argv: list[str]) -> None:
    """Whether records, page and pictures hold. Raises UserError."""
    if problems := leaderboard.check():
        raise UserError("\nerror: ".join(problems))
    print(f"{len(all_records())} records hold")


def main(argv: list[str]) -> None:
    commands = {
        "trials": trials,
        "compare": compare,
        "submit": submit,
        "check": check,
        "publish": lambda argv: publish(all_records()),
    }
    if (
        not argv
        or argv[0] in ("-h", "--help")
        or argv[0] in ("compare", "check", "publish")
        and {"-h", "--help"} & {*argv}
    ):
        print(__doc__)
        return
    if argv[0] not in commands:
        raise UserError(f"{argv[0]!r} is no command: use {', '.join(commands)}")
    if argv[0] in ("check", "publish") and argv[1:]:
        raise UserError(f"{argv[0]} takes nothing more, not {argv[1]!r}")
    commands[argv[0]](argv[1:])


if __name__ == "__main__":
    run_script(None, main)
