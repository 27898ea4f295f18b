"""Records: what follows from their trials, the pages and images made from them, and their checks.

docs/records/DATE-NAME/ holds record.json, diff.patch (recipe code only), README.md, and each trial
in trials/seedN/. The baseline's trials are in baseline/seedN/, unless another record already has
them: then record.json names that record's folder and the sha256 of its trial files. Only name,
date, who and note are typed by a person; the rest follows from the trials.
"""

import glob
import hashlib
import json
import os
import shlex
import shutil
import stat
import statistics
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import train_llm
from common.config import UserError, flatten
from common.disk import write_text
from tools.trials import (
    BUDGETS,
    P_WORSE,
    SCHEMA,
    Trial,
    changed_settings,
    check_sides,
    column,
    compare,
    comparison_table,
    duration,
    lines_of_code,
    load_trials,
    markdown_table,
    read_data,
    statistics_of,
    stdev,
    verdict,
)

DOCS = Path("docs")
MAX_BYTES = 1_000_000  # per file; the files of a record need about a tenth of this
COLUMNS = "#,date,val loss,val bpb,train loss,time,tokens/s,tokens,parameters,device,who"
Curve = tuple[list[int], list[float], list[float]]  # tokens, mean validation loss, stdev


@dataclass
class Record:
    folder: Path
    metadata: dict  # record.json
    trials: list[Trial]
    baseline: list[Trial]

    @property
    def tokens(self) -> int:
        return self.trials[0].config["tokens"]

    @property
    def data(self) -> tuple[str, str]:
        """What two records must share for their losses to be comparable."""
        return self.trials[0].summary["train_sha256"], self.trials[0].summary["val_sha256"]

    @property
    def val_loss(self) -> float:
        return self.metadata["statistics"]["new"]["val_loss"]["mean"]


# ---- files
def digest_of(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """{path in folder: sha256} of its files, except the two that are made from the others."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.name not in ("record.json", "README.md")
    }


def copy_trials(trials: list[Trial], folder: Path) -> None:
    """Copy what a record stores of each trial; of its metrics, the evaluations."""
    for trial in trials:
        place = folder / f"seed{trial.summary['seed']}"
        place.mkdir(parents=True)
        for name in (*SCHEMA, "trials.json", "evals.json"):
            if (trial.path / name).exists():
                shutil.copy(trial.path / name, place / name)
        lines = [json.dumps(row) + "\n" for row in trial.evaluations]
        (place / "metrics.jsonl").write_text("".join(lines))


def stored_trials(records: Path) -> dict[str, Path]:
    """{"RECORD/trials" or "RECORD/baseline": its folder} for all trials in docs/records."""
    sides = [records.glob(f"[!.]*/{side}") for side in ("trials", "baseline")]
    return {f"{path.parent.name}/{path.name}": path for side in sides for path in sorted(side)}


def store_baseline(base: list[Trial], folder: Path) -> str | None:
    """Copy trials to folder, or return the name of the stored trials that equal them."""
    copy_trials(base, folder)
    copied = file_hashes(folder)
    for name, path in stored_trials(folder.parent.parent).items():
        if file_hashes(path) == copied:
            shutil.rmtree(folder)
            return name
    return None


def load_baseline(folder: Path, source: str | None) -> list[Trial]:
    """The baseline from folder/baseline, or from the stored trials `source`. Raises UserError."""
    copied = folder / "baseline"
    if source is None:
        return load_stored(copied) if copied.exists() else []
    if copied.exists():
        raise UserError(f"{folder} has a copied baseline and refers to {source}; delete one")
    stored = stored_trials(folder.parent)
    if str(source) not in stored:
        raise UserError(f"{folder}: its baseline {source} is not in docs/records; restore it")
    return load_stored(stored[source])


def load_stored(folder: Path) -> list[Trial]:
    """The trials in a folder of a record. Raises UserError."""
    return load_trials([Path(glob.escape(str(folder))) / "*"])


def unsafe_files(docs: Path) -> list[str]:
    """Problems with records, pages and images in docs/ that are not small regular files, one line
    each.

    In an untrusted checkout, a symbolic link could point anywhere, and reading a pipe would hang.
    """
    places = [docs, docs / "records", docs / "images", docs / "LEADERBOARD.md"]
    for top in places[1:3]:
        for folder, folders, files in os.walk(top, followlinks=False):
            places += [Path(folder, name) for name in folders + files]
    problems = []
    for path in places:
        try:
            status = path.lstat()
        except OSError as error:
            return [f"cannot read {path} ({error.strerror}); run this in a checkout, or pass one"]
        is_file = stat.S_ISREG(status.st_mode)
        if not is_file and not stat.S_ISDIR(status.st_mode):
            problems.append(
                f"{path} is neither a folder nor a regular file; replace it with a copy"
            )
        if is_file and status.st_size > MAX_BYTES:
            problems.append(f"{path} has more than {MAX_BYTES:,} bytes; make it smaller")
    return problems


# ---- records
def accepted_evaluations() -> dict[str, str]:
    """{sha256 of the code that evaluates: why it is accepted}. Raises UserError."""
    path = DOCS / "records" / "evaluations.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); run this in the project folder") from error


def derive(folder: Path, new: list[Trial], base: list[Trial], source: str | None) -> dict:
    """Everything in record.json except name, date, who and note.

    Args:
        source: name of the stored trials that are the baseline; None if it is a copy.

    Raises UserError if the trials are not those of a record.
    """
    check_sides(base, new)
    first = new[0]
    for trial in (*base, *new):
        if trial.summary["dirty"] or not trial.summary["commit"]:
            raise UserError(f"{trial.path} ran uncommitted code; commit it, then rerun all trials")
    evaluation = first.summary["evaluation_sha256"]
    if evaluation not in accepted_evaluations():
        raise UserError(
            f"{first.path} was evaluated by code ({evaluation[:12]}) that is not in "
            "docs/records/evaluations.json; the evaluation is fixed"
        )
    stored = stored_trials(folder.parent)
    program, *words = new[-1].env["command"]  # the last: it may have added seeds to the others
    program = "-m tools.record" if program == "record.py" else program
    return {
        "tokens": first.config["tokens"],
        "machine": first.machine,
        "command": f"python {program} {shlex.join(words)}",
        "commit": first.summary["commit"],
        "baseline_commit": base[0].summary["commit"] if base else None,
        "baseline_from": source,
        "baseline_sha256": digest_of(file_hashes(stored[source])) if source else None,
        "settings": changed_settings(base[0], first) if base else {},
        "lines": lines_of_code((folder / "diff.patch").read_text(errors="replace")),
        "statistics": statistics_of(base, new),
        "files": file_hashes(folder),
    }


def load_record(folder: Path) -> Record:
    """Raises UserError if anything in the folder disagrees with the trials."""
    try:
        metadata = read_data(folder / "record.json")
        typed = {key: metadata[key] for key in ("name", "date", "who", "note")}
        source, patch = metadata["baseline_from"], folder / "diff.patch"
        expected = f"{date.fromisoformat(typed['date'])}-{typed['name']}"
        written = flatten(metadata)
    except Exception as error:  # the parser raises many exception types
        raise UserError(f"{folder}/record.json is not a record ({error!r}); restore it") from error
    valid = [isinstance(t, str) and t.strip() and t.isprintable() for t in typed.values()]
    if folder.name != expected or not all(valid):
        raise UserError(
            f"{folder}/record.json: name, date (YYYY-MM-DD), who and note must each be one line "
            "of text, and the folder must be named DATE-NAME"
        )
    if not patch.exists():
        raise UserError(f"{folder} has no diff.patch; restore it")
    new, base = load_stored(folder / "trials"), load_baseline(folder, source)
    derived = flatten(typed | derive(folder, new, base, source))
    for key in sorted(written.keys() | derived.keys()):
        if written.get(key) != derived.get(key):
            raise UserError(f"{folder}/record.json: {key} does not follow from the trials")
    if base and not metadata["statistics"]["improvement"]:
        raise UserError(f"{folder} is not a record: {verdict(metadata['statistics'])[1]}")
    return Record(folder, metadata, new, base)


def record_folders(docs: Path) -> list[Path]:
    return sorted(path for path in (docs / "records").glob("[!.]*") if path.is_dir())


def all_records(docs: Path = DOCS) -> list[Record]:
    """Oldest first; within a day, records without a baseline, then higher loss, come first.

    Raises UserError.
    """
    records = [load_record(folder) for folder in record_folders(docs)]
    return sorted(records, key=lambda r: (r.metadata["date"], bool(r.baseline), -r.val_loss))


def check_rank(record: Record, records: list[Record]) -> None:
    """Check a record against the earlier ones of its budget and data.

    Raises UserError if there are any and the record has no baseline or is worse than the best.
    """
    rivals = [r for r in records if r.tokens == record.tokens and r.data == record.data]
    if not rivals:
        return
    if not record.baseline:
        raise UserError(
            f"{record.folder} has no baseline, but its table already has a record; "
            "measure a baseline on your machine and pass it with --baseline"
        )
    best = min(rivals, key=lambda r: r.val_loss)
    keys, sides = ("val_loss", "train_seconds"), (best.trials, record.trials)
    comparison = compare(*(column(side, key) for key in keys for side in sides))
    if comparison["p_lower"] > 1 - P_WORSE:
        raise UserError(
            f"{record.folder} is behind the record {best.metadata['name']}: "
            f"{verdict(comparison)[1]}"
        )


# ---- pages and images
def readme(metadata: dict) -> str:
    """README.md of a record."""
    commit, source = metadata["baseline_commit"], metadata["baseline_from"]
    place = f"../{source}/" if source else "baseline/"
    baseline = f"Baseline: commit `{commit}`, [trials]({place})." if commit else "No baseline."
    settings = [[f"`{key}`", *pair] for key, pair in metadata["settings"].items()]
    table = markdown_table([["setting", "baseline", "new"], *settings]) + "\n" if settings else ""
    lines = metadata["lines"]
    return (
        f"# {metadata['name']}\n\n{metadata['note']}\n\n"
        f"{metadata['date']}, by {metadata['who']}, on {metadata['machine']}.\n\n"
        f"    git checkout {metadata['commit']}\n    {metadata['command']}\n\n"
        f"{comparison_table(metadata['statistics'])}\n{table}"
        f"Lines of code: {lines['added']} added, {lines['removed']} removed "
        f"([diff.patch](diff.patch)).\n{baseline}\nNew: [trials](trials/).\n"
    )


def label(tokens: int) -> str:
    names = {budget: name for name, budget in BUDGETS.items()}
    return names.get(tokens, f"{tokens:,}")


def image_name(tokens: int) -> str:
    return f"leaderboard-{label(tokens).replace(',', '')}.png"


def leaderboard(records: list[Record], docs: Path = DOCS) -> str:
    """The page of all records: a section for each budget with a table for each training text."""
    text = (
        "# Leaderboard\n\n"
        "Measured improvements, oldest first: the last row of a table is the one to beat.\n"
        "[CONTRIBUTING.md](CONTRIBUTING.md) explains how to add one. Losses are nats per token on\n"
        "held-out text: mean ± sample standard deviation (number of seeds). Times count training\n"
        "only and are comparable on one machine only. Each training text has its own table.\n"
        "`python -m tools.record submit` generates this page from [records/](records/);\n"
        "do not edit it by hand.\n"
    )
    budgets = [*BUDGETS.values(), *sorted({r.tokens for r in records} - set(BUDGETS.values()))]
    for tokens in budgets:
        small = tokens == BUDGETS["small"]
        title = "small: 1M tokens, no GPU" if small else f"{label(tokens)} tokens"
        text += f"\n## {title}\n\n"
        group = [r for r in records if r.tokens == tokens]
        if group:
            text += f"![validation loss against tokens](images/{image_name(tokens)})\n"
        else:
            text += "No record yet.\n"
        for data in dict.fromkeys(r.data for r in group):
            text += f"\n{data_table([r for r in group if r.data == data])}"
    return text + "\n" + (docs / "records" / "quoted.md").read_text(errors="replace")


def data_table(records: list[Record]) -> str:
    """The table of the records that share budget and data, below a line that names the data."""
    first = records[0].trials[0]
    sources = {key: value for key, value in first.config.items() if key.startswith("data.source")}
    names = [
        str(value) if key == "data.source" else key.removeprefix("data.source.")
        for key, value in sources.items()
    ]
    hashes = {key: first.summary[f"{key}_sha256"][:12] for key in ("train", "val", "tokenizer")}
    rows = [[*COLUMNS.split(","), "what changed", "link"]]
    for number, r in enumerate(records, start=1):
        new, one = r.metadata["statistics"]["new"], r.trials[0].summary
        row = [
            number,
            r.metadata["date"],
            f"{r.val_loss:.4f} ± {new['val_loss']['sd']:.4f} ({new['n']})",
            f"{new['val_bpb']['mean']:.4f}",
            f"{new['train_loss']['mean']:.4f}",
            duration(new["train_seconds"]["mean"]),
            f"{new['tokens_per_second']['mean']:,.0f}",
            f"{one['tokens']:,}",
            f"{new['params']:,}",
            one["device"],
            r.metadata["who"],
            r.metadata["note"],
            f"[record](records/{r.folder.name}/)",
        ]
        rows.append(row)
    return (
        f"Training text {', '.join(names)} `{hashes['train']}`, validation text `{hashes['val']}`\n"
        f"({first.summary['val_tokens']:,} tokens), tokenizer `{hashes['tokenizer']}`:\n\n"
        + markdown_table(rows)
    )


def curves(records: list[Record]) -> dict[str, Curve]:
    """The curve of each record, by name, over the evaluations that all of its trials have."""
    by_name = {}
    for r in records:
        losses = [{row["tokens"]: row["val_loss"] for row in t.evaluations} for t in r.trials]
        shared = sorted(set.intersection(*map(set, losses)))
        values = [[loss[tokens] for loss in losses] for tokens in shared]
        by_name[r.metadata["name"]] = (
            shared,
            [statistics.mean(v) for v in values],
            [stdev(v) for v in values],
        )
    return by_name


def plot(path: Path, by_name: dict[str, Curve]) -> None:
    """Write curves as a PNG that holds their digest, so that `check` can tell if it is stale."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    fig = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    ax = fig.subplots()
    for name, (tokens, mean, sd) in by_name.items():
        ax.errorbar(tokens, mean, yerr=sd, marker="o", capsize=3, label=f"{name}: {mean[-1]:.4f}")
    ax.set_xlabel("tokens", fontsize=12)
    ax.set_ylabel("validation loss (nats per token)", fontsize=12)
    ax.tick_params(labelsize=11)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=12)
    fig.savefig(path, metadata={"Description": digest_of(by_name)})


def publish(records: list[Record]) -> None:
    """Write LEADERBOARD.md, its images and the README.md of each record."""
    for record in records:
        write_text(record.folder / "README.md", readme(record.metadata))
    for tokens in sorted({r.tokens for r in records}):
        plot(
            DOCS / "images" / image_name(tokens), curves([r for r in records if r.tokens == tokens])
        )
    write_text(DOCS / "LEADERBOARD.md", leaderboard(records))


# ---- check
def check(docs: Path = DOCS) -> list[str]:
    """What is wrong with the records, the page and the images in a docs/ folder: one line each.

    Always uses the code and the accepted evaluations of this checkout.
    """
    problems = []
    if train_llm.evaluation_sha256() not in accepted_evaluations():
        problems.append(
            f"train_llm.py: evaluate() has hash {train_llm.evaluation_sha256()}, which "
            "docs/records/evaluations.json does not list; the evaluation is fixed"
        )
    for folder in record_folders(docs):
        try:
            record = load_record(folder)
            if (folder / "README.md").read_text() != readme(record.metadata):
                problems.append(f"{folder}/README.md is stale; run python -m tools.record publish")
        except (UserError, OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        return problems
    records = all_records(docs)
    for i, record in enumerate(records):
        try:
            check_rank(record, records[:i])
        except UserError as error:
            problems.append(str(error))
    return problems + stale_pages(docs, records)


def stale_pages(docs: Path, records: list[Record]) -> list[str]:
    """A line for the page and each image in docs/ that is not up to date with the records."""
    stale = []
    page = docs / "LEADERBOARD.md"
    if not page.exists() or page.read_text(errors="replace") != leaderboard(records, docs):
        stale.append(page)
    for tokens in sorted({r.tokens for r in records}):
        path = docs / "images" / image_name(tokens)
        if image_digest(path) != digest_of(curves([r for r in records if r.tokens == tokens])):
            stale.append(path)
    return [f"{path} is stale; run python -m tools.record publish" for path in stale]


def image_digest(path: Path) -> str | None:
    """The digest in a PNG that `plot` wrote, without decoding its pixels; None if there is none."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Description")
    except Exception:  # PIL raises many exception types
        return None
