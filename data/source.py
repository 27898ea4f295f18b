"""Data sources: a hub dataset (streamed), local files, a weighted mix, or `stdlib` -> text records.

Also what data preparation shares: hashes, hub revisions and the choice of validation records.
"""

import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path

import numpy as np

from common.config import UserError

SHUFFLE_BUFFER = 10_000  # records a stream is shuffled through: corpora are sorted by origin
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folders, for `stdlib`
OFFLINE_REMEDY = (
    "check the name; without network access, use local files ('folder/*.parquet') or a config that "
    "downloads nothing (configs/*_demo.yaml)"
)


# ---- records
def as_mix(source: str | dict[str, float]) -> dict[str, float]:
    """A source as a mix {source: weight}."""
    return source if isinstance(source, dict) else {source: 1.0}


def documents(
    source: str | dict[str, float], column: str, revisions: dict[str, str]
) -> Iterator[dict]:
    """Records of a source, or of a mix whose sources alternate in proportion to their weights.

    The order depends only on the arguments. A mix ends when one of its sources does. Raises
    UserError.
    """
    weights = as_mix(source)
    if not weights or min(weights.values()) <= 0:
        raise UserError(
            f"data source {source} must name at least one source and have only positive weights, "
            "as in {a.jsonl: 0.7, b.jsonl: 0.3}"
        )
    streams = {name: records(name, column, revisions.get(name)) for name in weights}
    n_taken = dict.fromkeys(weights, 0)  # characters; an id counts as four
    while True:
        name = min(weights, key=lambda name: n_taken[name] / weights[name])
        record = next(streams[name], None)
        if record is None:
            return
        n_taken[name] += (
            4 * len(record["input_ids"]) if "input_ids" in record else len(record[column])
        )
        yield record


def records(source: str, column: str, revision: str | None) -> Iterator[dict]:
    """Shuffled records of one source: {"input_ids": ids}, or {column: text} with non-blank text.

    Raises UserError.
    """
    if source in BUILT_IN:
        yield from ({column: text} for text in BUILT_IN[source]() if text.strip())
        return
    files = local_files(source)
    try:
        for record in open_stream(source, files, revision):
            text = record.get(column)
            if "input_ids" in record:
                yield {"input_ids": record["input_ids"]}
            elif column not in record:
                raise UserError(
                    f"data source {source} has no column {column!r}, only {', '.join(record)}; "
                    "set --data.text_column to one of them"
                )
            elif text is not None and not isinstance(text, str):
                raise UserError(
                    f"data source {source}: column {column!r} holds {type(text).__name__}, not "
                    "text; set --data.text_column to a column of text"
                )
            elif text and text.strip():
                yield {column: text}
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub client raise many exception types
        remedy = "check that the files are intact and hold text" if files else OFFLINE_REMEDY
        raise UserError(
            f"cannot read data source {source}: {first_line(error)}; {remedy}"
        ) from error


def open_stream(source: str, files: list[str], revision: str | None) -> Iterable[dict]:
    """Shuffled stream of a source's local files or, if there are none, of a hub dataset."""
    import datasets

    datasets.disable_progress_bars()
    options = {"split": "train", "streaming": True}
    if files:
        loader = LOADERS[Path(files[0]).suffix]
        if loader == "text":
            options["sample_by"] = "document"
        stream = datasets.load_dataset(loader, data_files=files, **options)
    else:
        name, _, config = source.partition(":")
        stream = datasets.load_dataset(name, config or None, revision=revision, **options)
    return stream.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)


def stdlib_texts() -> Iterator[str]:
    """Source files of this Python's standard library, without its tests, shuffled."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    return (path.read_text(encoding="utf-8", errors="replace") for path in paths)


BUILT_IN = {"stdlib": stdlib_texts}  # sources made here rather than read from files or the hub


def local_files(source: str) -> list[str]:
    """Sorted files of a folder, path or glob; empty if `source` names a hub dataset.

    Raises UserError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = [str(file) for file in path.rglob("*") if file.suffix in LOADERS]
    else:
        files = glob(str(path))
    is_path = path.is_dir() or path.is_absolute() or path.suffix in LOADERS
    is_path = is_path or source[:1] in ("", ".", "~") or any(c in source for c in "*?[")
    if is_path and not files:
        raise UserError(
            f"data source {source} matches no {' or '.join(LOADERS)} file; check the path"
        )
    suffixes = {Path(file).suffix for file in files}
    if files and (len(suffixes) > 1 or not suffixes <= LOADERS.keys()):
        raise UserError(
            f"data source {source} has files of type {', '.join(sorted(suffixes)) or 'unknown'}; "
            f"use files of one type: {' or '.join(LOADERS)}"
        )
    return sorted(files)


def hub_revisions(names: Iterable[str]) -> dict[str, str]:
    """Current commit of each hub dataset NAME or NAME:CONFIG, to read the same data later.

    Raises UserError.
    """
    import huggingface_hub

    revisions = {}
    for name in names:
        try:
            revisions[name] = huggingface_hub.HfApi().dataset_info(name.partition(":")[0]).sha
        except Exception as error:  # the hub client raises many exception types
            raise UserError(
                f"cannot find data source {name} on the hub: {first_line(error)}; {OFFLINE_REMEDY}"
            ) from error
    return revisions


# ---- hashes
def in_validation(record: dict, fraction: float) -> bool:
    """Whether a record is held out. Depends only on its content, so duplicates share a split."""
    (content,) = record.values()
    if isinstance(content, str):
        data = content.encode("utf-8", "replace")
    else:
        data = np.asarray(content, "<u4").tobytes()
    hashed = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(hashed, "big") < fraction * 2**64


def digest(value) -> str:
    """First 16 hex digits of the sha256 of a text or of a JSON value."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file that is not empty."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def file_stats(files: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    """(path, size in bytes, modification time in ns) of each file, to detect changed files."""
    stats = ((str(file), os.stat(file)) for file in files)
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def first_line(error: Exception) -> str:
    """First line of an exception's message without its period, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].removesuffix(".")
