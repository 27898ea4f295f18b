"""Records on disk: what follows from their trials, the pages and pictures they make, and whether all of it agrees.

docs/records/DATE-NAME/ holds record.json, diff.patch, README.md, and each trial in trials/seedN/, of the baseline in
baseline/seedN/. Only name, date, who and note are anyone's word: the rest follows from the trials.
"""

import hashlib
import json
import shlex
import shutil
import statistics
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import train_llm
from common import UserError, write_text
from tools.trials import (
    BUDGETS,
    P_WORSE,
    Trial,
    changed_settings,
    check_pair,
    check_side,
    column,
    compare,
    comparison_table,
    lines_of_code,
    load_trials,
    minutes,
    spread,
    statistics_of,
    verdict,
)

DOCS = Path("docs")
MAX_ROWS = 500  # training steps of a trial that a record keeps: a trial of 1B tokens has 61,035


@dataclass
class Record:
    folder: Path
    said: dict  # record.json
    trials: list[Trial]
    baseline: list[Trial]

    @property
    def tokens(self) -> int:
        return self.trials[0].config["tokens"]

    @property
    def data(self) -> tuple[str, str]:
        """What two records must share for their losses to compare."""
        return self.trials[0].summary["train_sha256"], self.trials[0].summary["val_sha256"]


def copy_trials(trials: list[Trial], folder: Path) -> None:
    """Keep what a record needs of each trial: all of its evaluations, and every k-th step if there are many."""
    for trial in trials:
        place = folder / f"seed{trial.summary['seed']}"
        place.mkdir(parents=True)
        for name in ("config.yaml", "summary.json", "env.json", "trials.json"):
            if (trial.path / name).exists():
                shutil.copy(trial.path / name, place / name)
        every = -(-trial.summary["steps"] // MAX_ROWS)
        rows = [row for row in trial.rows if "val_loss" in row or row["step"] % every == 0]
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def accepted_evaluations() -> dict[str, str]:
    """{sha256 of the code that scores: why it is accepted}. Raises UserError."""
    path = DOCS / "records" / "evaluations.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): run this in the project's folder"
        ) from error


def derive(folder: Path, new: list[Trial], base: list[Trial]) -> dict:
    """What record.json says beside name, date, who and note. Raises UserError where the trials do not hold."""
    check_pair(base, new) if base else check_side(new)
    first, patch = new[0], (folder / "diff.patch").read_text()
    for trial in (*base, *new):
        if trial.summary["dirty"] or not trial.summary["commit"]:
            raise UserError(
                f"{trial.path} ran code that is in no commit: commit it, then make the trials again"
            )
    if (code := first.summary["evaluation_sha256"]) not in accepted_evaluations():
        raise UserError(
            f"{first.path} was scored by other code ({code[:12]}) than docs/records/evaluations.json lists: "
            "the evaluation is fixed"
        )
    program, *words = new[-1].env[
        "command"
    ]  # the last one's: it may have been extended by more seeds
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("record.json", "README.md")
    )
    return {
        "tokens": first.config["tokens"],
        "machine": first.machine,
        "command": f"python {'-m tools.record' if program == 'record.py' else program} {shlex.join(words)}",
        "commit": first.summary["commit"],
        "baseline_commit": base[0].summary["commit"] if base else None,
        "settings": changed_settings(base[0], first) if base else {},
        "lines": lines_of_code(patch),
        "statistics": statistics_of(base, new),
        "files": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
    }


def load_record(folder: Path) -> Record:
    """Raises UserError where anything in the folder disagrees with the trials in it."""
    try:
        said = json.loads((folder / "record.json").read_text())
        words = {key: said[key] for key in ("name", "date", "who", "note")}
        named = folder.name == f"{date.fromisoformat(said['date'])}-{said['name']}"
        valid = all(
            isinstance(word, str) and word.strip() and "\n" not in word for word in words.values()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/record.json is no record: {error!r}") from error
    if not named or not valid:
        raise UserError(
            f"{folder}/record.json: name, date (YYYY-MM-DD), who and note must be lines of text, the first two as in "
            "the folder's name"
        )
    if not (folder / "diff.patch").exists():
        raise UserError(f"{folder} has no diff.patch")
    new = load_trials([folder / "trials" / "*"])
    base = load_trials([folder / "baseline" / "*"]) if (folder / "baseline").exists() else []
    if where := differing(said, words | derive(folder, new, base)):
        raise UserError(f"{folder}/record.json: {where} is not what the trials give")
    if base and not said["statistics"]["improvement"]:
        raise UserError(f"{folder} is no record: {verdict(said['statistics'])[1]}")
    return Record(folder, said, new, base)


def differing(a, b, name: str = "") -> str:
    """Name of the first place where two trees differ, or an empty string."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return "" if a == b else name
    return next(
        (
            found
            for key in sorted(a.keys() | b.keys())
            if (found := differing(a.get(key), b.get(key), f"{name}.{key}".lstrip(".")))
        ),
        "",
    )


def all_records() -> list[Record]:
    """Oldest first; of one day, the highest loss first. Raises UserError."""
    records = [
        load_record(folder)
        for folder in sorted((DOCS / "records").glob("[!.]*"))
        if folder.is_dir()
    ]
    return sorted(
        records,
        key=lambda r: (
            r.said["date"],
            bool(r.baseline),
            -r.said["statistics"]["new"]["val_loss"]["mean"],
        ),
    )


def check_first(record: Record, records: list[Record]) -> None:
    """Raises UserError unless a record has a baseline or is the first of its table, and is no worse than the others there."""
    if not (rivals := [r for r in records if r.tokens == record.tokens and r.data == record.data]):
        return
    if not record.baseline:
        raise UserError(
            f"{record.folder} has no baseline, but its table has a record: measure --baseline on your machine"
        )
    best = min(rivals, key=lambda r: r.said["statistics"]["new"]["val_loss"]["mean"])
    found = compare(
        *(
            column(side, key)
            for key in ("val_loss", "train_seconds")
            for side in (best.trials, record.trials)
        )
    )
    if found["p_lower"] > 1 - P_WORSE:
        raise UserError(
            f"{record.folder} is behind the record {best.said['name']}: {verdict(found)[1]}"
        )


# --------------------------------------------------------------------------------------------------------------- pages
def readme(said: dict) -> str:
    """The page of a record."""
    settings = "".join(
        f"| `{key}` | {before} | {after} |\n" for key, (before, after) in said["settings"].items()
    )
    against = (
        f" The baseline's commit is `{said['baseline_commit']}`."
        if said["baseline_commit"]
        else " It has no baseline."
    )
    return (
        f"# {said['name']}\n\n{said['note']}\n\n{said['date']}, by {said['who']}, on {said['machine']}.\n\n"
        f"    git checkout {said['commit']}\n    {said['command']}\n\n{comparison_table(said['statistics'])}\n"
        + (f"| setting | baseline | new |\n| --- | --- | --- |\n{settings}\n" if settings else "")
        + f"Lines of code: {said['lines']['added']} added, {said['lines']['removed']} removed ([diff.patch](diff.patch))."
        f"{against} Every trial: [trials](trials/).\n"
    )


def label(tokens: int) -> str:
    return next(
        (name for name, budget in BUDGETS.items() if budget == tokens),
        f"{tokens:,}-tokens".replace(",", "_"),
    )


def picture(tokens: int) -> Path:
    return DOCS / "images" / f"leaderboard-{label(tokens)}.png"


def leaderboard(records: list[Record]) -> str:
    """The page of all records: one table a budget, in it one for each data set."""
    text = (
        "# Leaderboard\n\nMeasured improvements, oldest first: the last row of a table is the one to beat. How to add one: "
        "[CONTRIBUTING.md](CONTRIBUTING.md).\nLosses are nats per token on held-out text: mean ± sample standard deviation "
        "over n seeds. Times are training alone and compare\non one machine only. Each text has a table of its own. Made by "
        "`python -m tools.record submit` from [records/](records/);\nedits here do not last.\n"
    )
    budgets = [*BUDGETS.values(), *sorted({r.tokens for r in records} - set(BUDGETS.values()))]
    for tokens in budgets:
        mine = [r for r in records if r.tokens == tokens]
        name = label(tokens).replace("_", ",").replace("-", " ")
        text += f"\n## {'small: 1M tokens, no GPU' if name == 'small' else name if 'tokens' in name else f'{name} tokens'}\n"
        text += (
            f"\n![validation loss against tokens](images/{picture(tokens).name})\n"
            if mine
            else "\nNo record yet.\n"
        )
        for data in dict.fromkeys(r.data for r in mine):
            rows = [r for r in mine if r.data == data]
            first = rows[0].trials[0]
            source = ", ".join(
                str(value) if key == "data.source" else key.removeprefix("data.source.")
                for key, value in first.config.items()
                if key.startswith("data.source")
            )
            text += (
                f"\nText {source} `{data[0][:12]}`, validation `{data[1][:12]}` ({first.summary['val_tokens']:,} tokens), "
                f"tokenizer `{first.summary['tokenizer_sha256'][:12]}`:\n\n"
                "| # | date | val loss | val bpb | train loss | time | tokens/s | tokens | parameters | GPU | who | "
                "what changed | link |\n" + "| --- " * 13 + "|\n"
            )
            for number, r in enumerate(rows, start=1):
                new, one = r.said["statistics"]["new"], r.trials[0].summary
                mean = {
                    key: figure["mean"] for key, figure in new.items() if isinstance(figure, dict)
                }
                cells = [
                    number,
                    r.said["date"],
                    f"{mean['val_loss']:.4f} ± {new['val_loss']['sd']:.4f} ({new['n']})",
                    f"{mean['val_bpb']:.4f}",
                    f"{mean['train_loss']:.4f}",
                    minutes(mean["train_seconds"]),
                    f"{mean['tokens_per_second']:,.0f}",
                    f"{one['tokens']:,}",
                    f"{new['params']:,}",
                    one["device"],
                    r.said["who"],
                    r.said["note"],
                    f"[record](records/{r.folder.name}/)",
                ]
                text += "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"
    return text + "\n" + (DOCS / "records" / "quoted.md").read_text()


def curves(records: list[Record]) -> dict[str, tuple[list, list, list]]:
    """{record: (tokens, mean validation loss, standard deviation)} over the evaluations that all of its trials have."""
    found = {}
    for r in records:
        losses = [
            {row["tokens"]: row["val_loss"] for row in trial.rows if "val_loss" in row}
            for trial in r.trials
        ]
        at = sorted(set.intersection(*map(set, losses)))
        values = [[loss[tokens] for loss in losses] for tokens in at]
        found[r.said["name"]] = (
            at,
            [statistics.mean(v) for v in values],
            [spread(v) for v in values],
        )
    return found


def draw(path: Path, lines: dict[str, tuple[list, list, list]]) -> None:
    """The validation losses of a budget's records; what is drawn is noted in the file, so that `check` sees a stale one."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8, 5), dpi=120, layout="tight")
    ax = fig.subplots()
    for name, (tokens, mean, sd) in lines.items():
        ax.errorbar(tokens, mean, yerr=sd, marker="o", capsize=3, label=f"{name}: {mean[-1]:.4f}")
    ax.set(xlabel="tokens", ylabel="validation loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, metadata={"Description": digest_of(lines)})


def digest_of(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def publish(records: list[Record]) -> None:
    """Write LEADERBOARD.md, its pictures and the records' pages."""
    for record in records:
        write_text(record.folder / "README.md", readme(record.said))
    for tokens in sorted({r.tokens for r in records}):
        draw(picture(tokens), curves([r for r in records if r.tokens == tokens]))
    write_text(DOCS / "LEADERBOARD.md", leaderboard(records))


def check() -> list[str]:
    """What is wrong with the records, the page and the pictures: a line each."""
    from PIL import Image

    problems = []
    if train_llm.evaluation_sha256() not in accepted_evaluations():
        problems.append(
            "train_llm.py: evaluate() is not one that docs/records/evaluations.json lists: the evaluation is fixed"
        )
    for folder in sorted((DOCS / "records").glob("[!.]*")):
        if folder.is_dir():
            try:
                record = load_record(folder)
                if (folder / "README.md").read_text() != readme(record.said):
                    problems.append(f"{folder}/README.md is not what its record makes")
            except (UserError, OSError) as error:
                problems.append(str(error))
    if problems:
        return problems
    records = all_records()
    for i, record in enumerate(records):
        try:
            check_first(record, records[:i])
        except UserError as error:
            problems.append(str(error))
    if not (DOCS / "LEADERBOARD.md").exists() or (
        DOCS / "LEADERBOARD.md"
    ).read_text() != leaderboard(records):
        problems.append(
            "docs/LEADERBOARD.md is not what the records make: run python -m tools.record publish"
        )
    for tokens in sorted({r.tokens for r in records}):
        drawn = digest_of(curves([r for r in records if r.tokens == tokens]))
        if (
            not picture(tokens).exists()
            or Image.open(picture(tokens)).text.get("Description") != drawn
        ):
            problems.append(
                f"{picture(tokens)} does not show its records: run python -m tools.record publish"
            )
    return problems
