"""The leaderboard: several seeds of a recipe, the comparison of two, and the record that a better one makes.

    python -m tools.record trials --run base --seeds 5 --tokens 8M
    python -m tools.record compare 'runs/base-seed*' -- 'runs/new-seed*'
    python -m tools.record submit short-cooldown --baseline 'runs/base-seed*' --runs 'runs/new-seed*' --note "cooldown 0.4"
    python -m tools.record check
"""

import copy
import dataclasses
import gc
import json
import sys
from dataclasses import dataclass

import train_llm
from common import RUNS, UserError, git_state, load_config, stop
from tools.trials import load_trials, trials_table


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
        raise UserError("trials take seeds 0 to N - 1 and go on by themselves: leave --seed and --resume away, give --seeds N")
    if cfg.seeds < 1:
        raise UserError(f"--seeds is {cfg.seeds}: it must be positive")
    base, code = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(train_llm.Config)}, git_state()
    if code["dirty"] or not code["commit"]:
        print("the code is not committed: fine to compare, but `submit` will need trials of a commit", flush=True)
    names = [f"{cfg.run}-seed{seed}" for seed in range(cfg.seeds)]
    for name in names:
        env = RUNS / name / "env.json"
        if env.exists() and json.loads(env.read_text())["code_sha256"] != code["code_sha256"]:
            raise UserError(f"{RUNS / name} was made by other code than this: choose another --run, or delete that one")
    for seed, name in enumerate(names):
        print(f"trial {seed + 1} of {cfg.seeds}", flush=True)
        train_llm.main(train_llm.Config(**copy.deepcopy(base) | {"run": name, "seed": seed,
                                                                 "resume": (RUNS / name).exists()}))
        gc.collect()  # the trial's model, before the next one is made
    text = trials_table(load_trials([RUNS / name for name in names]))
    (RUNS / f"{cfg.run}-trials.md").write_text(text)
    print(f"\n{text}", flush=True)


def main(argv: list[str]) -> None:
    commands = {"trials": trials}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv[0] not in commands:
        raise UserError(f"{argv[0]!r} is no command: use {', '.join(commands)}")
    commands[argv[0]](argv[1:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        stop(str(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)
