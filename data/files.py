"""Local files of text and image sources: finding them, their splits, and reading them.

Files are read in constant memory, and every error names the file.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from common.config import UserError, first_line

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "val", "valid", "dev"), "val"
)
# Such as train-00000-of-00001, test_0 and validation-00000-of-00001-0a1b2c3d4e5f6789.
SPLIT_STEM = re.compile(rf"({'|'.join(SPLITS)})([-_]?\d+)?([-_]of[-_]\d+)?([-_][0-9a-f]{{8,}})?")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex")
COMPRESSED = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(str(path), compression="zstd"),
}
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose byte order mark is a prefix of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PARQUET_BATCH = 64  # records decoded at a time: bounds memory even for long texts or large images


# ---- finding files
def walk(folder: Path) -> list[Path]:
    """Sorted files below a folder; symbolic links are followed, each folder is visited once.

    Names that start with a dot and `__MACOSX` are skipped. Raises UserError for a folder that
    cannot be listed, a broken link, or anything else that is not a file.
    """
    found, visited = [], set()

    def failed(error: OSError):
        raise UserError(f"cannot list {error.filename}: {error.strerror}; check its permissions")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=failed):
        real = os.path.realpath(parent)
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        found += [Path(parent, name) for name in names if name[0] != "."]
    for file in found:
        check_regular(file)
    return sorted(found)


def check_regular(file: Path) -> None:
    """Raises UserError if a path is not a regular file; reading a pipe, for example, could hang."""
    if not file.exists():
        problem = "is a broken symbolic link" if file.is_symlink() else "does not exist"
        raise UserError(f"{file} {problem}; remove or restore it")
    if not stat.S_ISREG(file.stat().st_mode):
        raise UserError(f"{file} is not a regular file; remove it or pass other files")


def split_name(file: Path) -> str | None:
    """The split that a file is named after ("train", "val" or "test"), if any."""
    match = SPLIT_STEM.fullmatch(file.name.partition(".")[0].lower())
    return SPLITS[match[1]] if match else None


def split_files(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files of each split: "train", and "val" or "test" or both; {} if the files have no splits.

    Top-level folders train, test, validation, val, valid and dev of `root` are splits if together
    they hold every file. Parquet and JSON files may also be named after their split, followed only
    by numbers or hashes. Raises UserError if only some of the files are named after a split.
    """
    tops = [file.relative_to(root).parts[:-1][:1] for file in files]
    by_folder = [SPLITS.get(top[0].lower()) if top else None for top in tops]
    named = [split_name(file) if file_kind(file) in ("parquet", "json") else None for file in files]
    for splits in (by_folder, named):
        if not {"train"} < set(splits) - {None}:
            continue
        if None not in splits:
            return {
                name: [file for file, split in zip(files, splits, strict=True) if split == name]
                for name in ("train", "val", "test")
                if name in splits
            }
        if splits is named:
            other = next(s for s in splits if s not in ("train", None))
            raise UserError(
                f"{files[splits.index(other)]} is named after a split, but "
                f"{files[splits.index(None)]} is not; pass the files to train on, as in "
                f"'{root}/train*', or move the others elsewhere"
            )
    return {}


def file_kind(file: Path) -> str | None:
    """How a file is read: "parquet", "json" or "text"; None for any other type."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return "parquet"
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "json" if last in JSON_SUFFIXES else "text" if last in TEXT_SUFFIXES else None


# ---- reading files
@contextmanager
def named_errors(file: Path) -> Iterator[None]:
    """Convert errors from reading a file into a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot read {file}: {reason}; check that the file is intact and readable"
        ) from error


def parquet_records(file: Path, columns: list[str]) -> Iterator[dict]:
    """Records {column: value} of a parquet file, with those of `columns` that the file has.

    Bytes in strings that are not valid UTF-8 become U+FFFD. Raises UserError, which names the file.
    """
    check_regular(file)
    with named_errors(file), pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):  # an iterator keeps all that it has read
            for batch in parquet.iter_batches(PARQUET_BATCH, row_groups=[group], columns=columns):
                values = {
                    name: column_values(array)
                    for name, array in zip(batch.schema.names, batch.columns, strict=True)
                }
                yield from ({name: values[name][i] for name in values} for i in range(len(batch)))


def parquet_columns(file: Path) -> list[str]:
    """Names of a parquet file's columns. Raises UserError, which names the file."""
    check_regular(file)
    with named_errors(file):
        return pq.read_schema(file).names


def column_values(array: pa.Array) -> list:
    """The values of a column as Python objects."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in values]


@contextmanager
def open_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file, compressed or not: UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Invalid bytes become U+FFFD. Raises UserError, which names the file.
    """
    check_regular(file)
    with named_errors(file):
        opener = COMPRESSED.get(file.suffix.lower(), io.FileIO)
        with io.BufferedReader(opener(file)) as stream:
            start = stream.peek(4)
            encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
            yield io.TextIOWrapper(stream, encoding, "replace", newline)


def json_records(file: Path) -> Iterator:
    """Values in a JSON Lines file, or in a file that is one JSON array or one multi-line object.

    Raises UserError, which names the file and line.
    """
    with open_text(file, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and (line.startswith("[") or line.strip() == "{"):
                whole = parse_json(line + lines.read(), file, number)
                yield from whole if isinstance(whole, list) else [whole]
            elif line.strip():
                yield parse_json(line, file, number)


def parse_json(text: str, file: Path, number: int):
    """The value of a JSON text that starts at line `number` of a file. Raises UserError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        number += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", first_line(error))
        raise UserError(
            f"{file}, line {number}: invalid JSON ({reason}); correct or remove it"
        ) from error


def text_blocks(file: Path, size: int) -> Iterator[str]:
    """The text of a file in blocks of `size` characters; line endings become \\n.

    Raises UserError, which names the file.
    """
    with open_text(file) as stream:
        yield from iter(lambda: stream.read(size), "")
