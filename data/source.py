"""Data sources: a hub dataset (streamed), local files, a weighted mix, or `stdlib` -> text records.

Also helpers for data preparation: the local files of a source, and hashes.
"""

import hashlib
import itertools
import json
import os
import random
import re
import shlex
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import numpy as np

from common.config import UserError
from data.files import (
    JSON_SUFFIXES,
    SPLITS,
    TEXT_SUFFIXES,
    check_regular,
    file_kind,
    json_records,
    parquet_columns,
    parquet_records,
    split_files,
    text_blocks,
    walk,
)
from data.hub import SHUFFLE_BUFFER, hub_stream

# Streams are shuffled, because corpora are sorted by origin. The order is that of `datasets` 5.2
# with .shuffle(seed=0, buffer_size=10_000): tables of records (single records for text files) are
# taken in turn from up to ten groups of files.
SHUFFLE_GROUPS = 10
TABLE_RECORDS = SHUFFLE_BUFFER // SHUFFLE_GROUPS
SHUFFLE_BYTES = 128_000_000  # bounds memory, regardless of the length of documents
PART_CHARACTERS = 1_000_000  # longer documents are split into parts
PEEK_RECORDS = 1000  # a source whose first records have no text is rejected
END_OF_TABLE = object()
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folders, for `stdlib`
ABOUT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|contributing|citation|dataset_infos?)\b.*", re.I
)
FILE_TYPES = f".parquet, {', '.join(JSON_SUFFIXES)} or {', '.join(TEXT_SUFFIXES)}"
IDS = "input_ids"


# ---- records
def as_mix(source: str | dict[str, float]) -> dict[str, float]:
    """A source as a mix {source: weight}."""
    return source if isinstance(source, dict) else {source: 1.0}


def documents(
    source: str | dict[str, float],
    column: str,
    revisions: dict[str, str],
    seconds: float = 60.0,
    counts: Counter | None = None,
) -> Iterator[dict]:
    """Documents of a source, or of a mix whose sources alternate in proportion to their weights:
    {"input_ids": ids}, or {column: text} with non-blank text of at most PART_CHARACTERS.

    The order depends only on the first three arguments. A mix ends when one of its sources does.
    Failing hub requests are retried for `seconds`. Records that are changed or skipped are counted
    in `counts`. Raises UserError.
    """
    weights = as_mix(source)
    if not weights or min(weights.values()) <= 0:
        raise UserError(
            f"data source {source} must name at least one source and have only positive weights, "
            "as in {a.jsonl: 0.7, b.jsonl: 0.3}"
        )
    counts = Counter() if counts is None else counts
    streams = {
        name: records(Reader(name, column, counts), revisions.get(name), seconds)
        for name in weights
    }
    n_taken = dict.fromkeys(weights, 0)  # characters
    while True:
        name = min(weights, key=lambda name: n_taken[name] / weights[name])
        record = next(streams[name], None)
        if record is None:
            return
        n_taken[name] += n_characters(record)
        yield record


def n_characters(record: dict) -> int:
    """Number of characters of a document; a token id counts as four."""
    (content,) = record.values()
    return len(content) * (4 if IDS in record else 1)


def records(reader: "Reader", revision: str | None, seconds: float) -> Iterator[dict]:
    """Shuffled documents of one source. Raises UserError."""
    source = reader.source
    if source in BUILT_IN:
        for text in BUILT_IN[source]():
            yield from filter(None, reader.documents({reader.column: text}))
        return
    files = list(local_files(source).train)
    if files:
        np.random.default_rng(0).shuffle(files)
        groups = np.array_split(np.arange(len(files)), min(SHUFFLE_GROUPS, len(files)))
        streams = [reader.read(files[i] for i in group) for group in groups]
        tables = interleaved(streams, 1 if file_kind(files[0]) == "text" else TABLE_RECORDS)
        yield from filter(None, shuffled(tables))
    else:
        for record in hub_stream(source, revision, seconds):  # in shuffled order
            yield from filter(None, reader.documents(record))
    reader.check_texts()


def interleaved(streams: list[Iterator], table_records: int) -> Iterator:
    """Tables of records from each stream in turn, with END_OF_TABLE after each."""
    while streams:
        for stream in list(streams):
            n = 0
            for record in itertools.islice(stream, table_records):
                n += 1
                yield record
            if n:
                yield END_OF_TABLE
            if n < table_records:
                streams.remove(stream)


def shuffled(tables: Iterator) -> Iterator[dict | None]:
    """Records shuffled through a buffer that is bounded in records and in bytes."""
    rng = np.random.default_rng(0)
    buffer = []
    size = 0
    for record in tables:
        if record is not END_OF_TABLE:
            buffer.append(packed(record))
            size += len(buffer[-1][1])
        is_full = record is END_OF_TABLE and len(buffer) >= SHUFFLE_BUFFER
        if is_full or size >= SHUFFLE_BYTES:
            order = rng.permutation(len(buffer))
            n_out = len(buffer) - min(SHUFFLE_BUFFER, len(buffer)) // 2
            yield from (unpacked(*buffer[i]) for i in order[:n_out])
            buffer = [buffer[i] for i in order[n_out:]]
            size = sum(len(data) for _, data in buffer)
    yield from (unpacked(*buffer[i]) for i in rng.permutation(len(buffer)))


def packed(record: dict | None) -> tuple[str, bytes]:
    """The column and content of a record as compact bytes: a str needs up to 4 bytes per character,
    a list of ids 36 bytes per id.
    """
    if record is None:
        return "", b""
    ((name, content),) = record.items()
    return name, content.encode() if name != IDS else np.array(content, np.int64).tobytes()


def unpacked(name: str, data: bytes) -> dict | None:
    if not data:
        return None
    return {name: data.decode() if name != IDS else np.frombuffer(data, np.int64).tolist()}


@dataclass
class Reader:
    """Reads the documents of one source and counts what it skips and changes."""

    source: str
    column: str
    counts: Counter
    n_records: int = 0
    n_texts: int = 0
    columns: dict[str, None] = field(default_factory=dict)  # names seen, in order

    def __post_init__(self):
        self.place = self.source  # or the file being read

    def read(self, files: Iterable[Path]) -> Iterator[dict | None]:
        """Documents of files in order, None for a record without text. Raises UserError."""
        for file in files:
            self.place, kind = str(file), file_kind(file)
            if kind == "text":
                yield from self.split(text_blocks(file, PART_CHARACTERS))
            elif kind == "json":
                for record in json_records(file):
                    if isinstance(record, str):
                        record = {self.column: record}
                    if not isinstance(record, dict):
                        raise UserError(
                            f"{file} has a record of type {type(record).__name__}, not an object; "
                            'write each record as {"text": ...}'
                        )
                    yield from self.documents(record)
            else:
                names = parquet_columns(file)
                wanted = [IDS if IDS in names else self.column]
                for record in parquet_records(file, wanted):
                    yield from self.documents(record or dict.fromkeys(names))

    def documents(self, record: dict) -> Iterator[dict | None]:
        """The document of a record, in parts if it is long; None if it has no text."""
        self.columns |= dict.fromkeys(record)
        name = IDS if IDS in record else self.column
        content = record.get(name)
        if content is not None and not isinstance(content, list if name == IDS else str):
            kind = "ids" if name == IDS else "text"
            raise UserError(
                f"data source {self.source}: column {name!r} holds {type(content).__name__}, not "
                f"{kind}; set --data.text_column to a column of text"
            )
        if name == IDS and content:
            self.check_integers(content)
            yield {IDS: content}
            self.n_records += 1
            self.n_texts += 1
        else:
            text = content or ""
            starts = range(0, len(text), PART_CHARACTERS)
            yield from self.split(text[i : i + PART_CHARACTERS] for i in starts)

    def check_integers(self, ids: list) -> None:
        """Raises UserError unless ids are integers that int64 can hold."""
        if not all(isinstance(i, int) and abs(i) < 2**63 for i in ids):
            raise UserError(
                f"{self.place}: column {IDS!r} does not hold lists of integers; rename the column "
                "to read the text instead"
            )

    def split(self, blocks: Iterable[str]) -> Iterator[dict | None]:
        """Parts {column: text} of one text that is given in blocks, None if it is blank."""
        n_parts = 0
        for part in parts(blocks):
            if "\ufffd" in part:
                self.counts["replaced"] += 1
                self.counts.setdefault("replaced_in", self.place)
            if part.strip():
                n_parts += 1
                yield {self.column: part}
        self.n_records += 1
        self.n_texts += n_parts > 0
        self.counts["split"] += n_parts > 1
        if not n_parts:
            self.counts["blank"] += 1
            yield None
            if self.n_records == PEEK_RECORDS:
                self.check_texts()

    def check_texts(self) -> None:
        """Raises UserError if no record so far has text."""
        if not self.n_texts and not self.columns:  # plain text
            raise UserError(f"data source {self.source} has no text; add some")
        if not self.n_texts:
            columns = f", only {', '.join(self.columns)}" if self.columns else ""
            problem = "text in column" if self.column in self.columns else "column"
            raise UserError(
                f"data source {self.source} has no {problem} {self.column!r}{columns} (in "
                f"{self.n_records} records); set --data.text_column to a column of text"
            )


def parts(blocks: Iterable[str]) -> Iterator[str]:
    """A text in parts of at most PART_CHARACTERS, split after a line end, a space, or anywhere.

    Unpaired surrogates become U+FFFD.
    """
    text = ""
    for block in blocks:
        text += without_surrogates(block)
        while len(text) > PART_CHARACTERS:
            half = PART_CHARACTERS // 2
            cut = boundary(text, half, PART_CHARACTERS) or PART_CHARACTERS
            yield text[:cut]
            text = text[cut:]
    yield text


def without_surrogates(text: str) -> str:
    """The text with unpaired surrogates, which no tokenizer accepts, replaced by U+FFFD."""
    try:
        text.encode()  # much faster than a search
        return text
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)


def boundary(text: str, start: int, end: int) -> int:
    """Position in (start, end] after the last line end, else the last space; 0 if none."""
    return text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1


def document_parts(source: str, column: str, counts: Counter | None = None) -> Iterator[dict]:
    """The documents of a local source in the order of its files. Raises UserError."""
    reader = Reader(source, column, Counter() if counts is None else counts)
    return filter(None, reader.read(local_files(source).train))


def only_document_size(source: str | dict[str, float], column: str) -> int | None:
    """Size of the only document of a local source, in characters or token ids; None if the source
    has several documents, or is a hub dataset or a mix. Raises UserError.
    """
    name, *others = as_mix(source)
    if others or name in BUILT_IN:
        return None
    reader, size = Reader(name, column, Counter()), 0
    for record in filter(None, reader.read(local_files(name).train)):
        if reader.n_texts:
            return None
        size += sum(map(len, record.values()))
    return size or None


def stdlib_texts() -> Iterator[str]:
    """Source files of this Python's standard library, without its tests, shuffled."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    return (path.read_text(encoding="utf-8", errors="replace") for path in paths)


BUILT_IN = {"stdlib": stdlib_texts}  # sources made here rather than read from files or the hub


# ---- files
@dataclass
class LocalFiles:
    """The files of a local source; `train` is empty if the source is not local."""

    train: list[Path] = field(default_factory=list)
    other_splits: dict[str, list[Path]] = field(default_factory=dict)  # "val", "test": not read
    ignored: list[Path] = field(default_factory=list)  # files that hold no data

    def notes(self, source: str) -> list[str]:
        """Lines that say which files are not used."""
        lines = []
        if self.ignored:
            names = ", ".join(file.name for file in self.ignored[:3])
            more = len(self.ignored) - 3
            names += f" and {more} more" if more > 0 else ""
            lines.append(f"data source {source}: ignoring {names}")
        for split, files in self.other_splits.items():
            names = f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
            lines.append(
                f"data source {source}: not using the {split} split ({names}); to validate on it, "
                f"set --data.val_source {pattern(files)}"
            )
        return lines


def pattern(files: list[Path]) -> str:
    """A path or glob that matches a split's files, quoted for a shell."""
    if len(files) == 1:
        return shlex.quote(str(files[0]))
    folder = Path(os.path.commonpath([file.parent for file in files]))
    if folder.name.lower() in SPLITS:
        return shlex.quote(str(folder))
    start = os.path.commonprefix([file.name for file in files])
    depth = "**" if len({file.parent for file in files}) > 1 else ""
    return shlex.quote(str(folder / depth / f"{start}*"))


def local_files(source: str) -> LocalFiles:
    """Files of a folder, path or glob; none if `source` names a hub dataset. Raises UserError."""
    path = Path(source).expanduser()
    if not source:
        raise UserError("data source '' is empty; set --data.source")
    if path.is_dir():
        return folder_files(source, path)
    files = [path] if path.exists() else sorted(map(Path, glob(str(path), recursive=True)))
    if not files:
        check_hub_name(source)
        return LocalFiles()
    for file in files:
        check_regular(file)
    check_types(source, files)
    root = Path(os.path.commonpath([file.parent for file in files]))
    return with_splits(files, root, [])


def folder_files(source: str, folder: Path) -> LocalFiles:
    """Files of a folder, except those about the data, such as a README. Raises UserError."""
    files = walk(folder)
    typed = [file for file in files if file_kind(file)]
    data = [file for file in typed if not ABOUT_DATA.fullmatch(file.name)] or typed
    if not data:
        raise UserError(f"data source {source} has no text files ({FILE_TYPES}); check the path")
    check_types(source, data)
    return with_splits(data, folder, [file for file in files if file not in data])


def check_types(source: str, files: list[Path]) -> None:
    """Raises UserError unless all files are of one type."""
    kinds = {file_kind(file) for file in files}
    if None in kinds or len(kinds) > 1:
        suffixes = {
            "".join(file.suffixes[-2:]) or f"{file.name} without a suffix" for file in files
        }
        raise UserError(
            f"data source {source} has files of type {', '.join(sorted(suffixes))}; use files of "
            f"one type: {FILE_TYPES}"
        )


def with_splits(files: list[Path], root: Path, ignored: list[Path]) -> LocalFiles:
    splits = split_files(files, root)
    return LocalFiles(splits.pop("train", files), splits, ignored)


def check_hub_name(source: str) -> None:
    """Raises UserError if a source that is not a local file cannot be a hub dataset either."""
    name = source.partition(":")[0]
    is_path = source[:1] in ("", ".", "~", "/") or any(c in source for c in "*?[")
    if is_path or file_kind(Path(source)) or name.count("/") > 1:
        raise UserError(f"data source {source} matches no file; check the path")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"data source {source} is neither a local file or folder nor a hub dataset OWNER/NAME; "
            "check the name"
        )


# ---- hashes
def content_hash(content: str | list[int]) -> float:
    """Hash of a text or of ids, from 0 to 1 (exclusive)."""
    if isinstance(content, str):
        data = content.encode("utf-8", "replace")
    else:
        data = np.asarray(content, "<u4").tobytes()
    hashed = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64


def digest(value) -> str:
    """First 16 hex digits of the sha256 of a text or of a JSON value."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_stats(files: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    """(path, size in bytes, modification time in ns) of each file, to detect changed files."""
    stats = ((str(file), os.stat(file)) for file in files)
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
