"""Text data: documents of a source -> token shards on disk -> batches.

A source is prepared once: documents are tokenized in batches, each after an end-of-text token, and
written as uint16 shards with a manifest. Batches are then a pure function of (seed, step), so
resuming is exact.
"""

import hashlib
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.config import HumanInt, UserError
from common.disk import cache_errors, file_sha256, locked, write_text
from data.hub import hub_revisions
from data.order import batch_indices, prefetch
from data.source import (
    BUILT_IN,
    IDS,
    PART_CHARACTERS,
    as_mix,
    boundary,
    content_hash,
    digest,
    document_parts,
    documents,
    file_stats,
    local_files,
    n_characters,
    only_document_size,
)

SHARD_TOKENS = 8_000_000  # a killed preparation loses at most this much work
BATCH_DOCUMENTS = 256  # tokenized at a time: enough for all cores, few enough to bound memory
BATCH_CHARACTERS = 8_000_000
ENCODE_CHARACTERS = 2_000_000  # per tokenizer call, which needs 100 bytes per character
BOUNDARY_CHARACTERS = 10_000  # how far before a split position to look for a line end


@dataclass
class DataConfig:
    """Text data."""

    source: str | dict[str, float] = field(
        default_factory=lambda: {
            "HuggingFaceTB/smollm-corpus:fineweb-edu-dedup": 0.7,
            "HuggingFaceTB/smollm-corpus:cosmopedia-v2": 0.3,
        }
    )
    """Training text: a hub dataset OWNER/NAME or OWNER/NAME:CONFIG (streamed); a folder, path or
    glob of files of one type: .parquet, JSON (.jsonl, .ndjson, .json) or plain text (such as .txt
    and .md, one document per file), optionally compressed (.gz, .bz2, .xz, .zst); `stdlib` (the
    source code of this Python's standard library); or a mix {source: weight}, in which each source
    contributes text in proportion to its weight. Documents longer than 1,000,000 characters are
    split at line ends into several documents. If folders or files are named train, validation and
    test, only train is read."""
    val_source: str | dict[str, float] | None = None
    """Validation text, in the same formats as data.source; documents with the same text are
    excluded from training. null, or the same as data.source: hold out a fraction of its documents
    (data.val_fraction)."""
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"
    """Tokenizer: a hub name, a local folder, or bpe-N for a byte-level BPE with N entries (257 to
    65536) trained on the training source."""
    text_column: str = "text"
    """Column that holds the text. A source with a column `input_ids` is treated as tokenized,
    and its text is not read."""
    val_fraction: float = 0.05
    """Fraction of documents held out for validation, between 0 and 1 (exclusive), chosen by a hash
    of their content. If the source is a single document, its end is held out. Has no effect if
    data.val_source is set."""
    val_tokens: HumanInt = HumanInt("1M")
    """Number of validation tokens to prepare, rounded up to whole documents."""
    cache: str = "cache"
    """Folder for token shards and tokenizers."""
    retry_seconds: float = 60.0
    """Seconds to keep retrying a hub request that fails with a transient error."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"--data.val_fraction is {self.val_fraction}; it must be between 0 and 1, exclusive"
            )
        if self.val_tokens <= 0:
            raise ValueError(f"--data.val_tokens is {self.val_tokens}; it must be positive")
        if self.val_source == self.source:  # validation must not be trained on
            self.val_source = None


# ---- documents
class Document(NamedTuple):
    """A document of a source and the split that it belongs to."""

    record: dict  # {"input_ids": ids} or {column: text}
    split: str  # "train", "val" or "excluded"
    hash: float  # of its content; validation if below the held-out fraction
    key: float  # equal for texts that differ only in surrounding whitespace, and for their ids


def end_of_text(tokenizer) -> int | None:
    """The id placed before every document: the tokenizer's eos, or its bos if it has no eos."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. Special tokens that appear in a text are encoded as ordinary text."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return tokenizer(texts, return_attention_mask=False, **options)["input_ids"] if texts else []


def content_key(record: dict, tokenizer=None) -> float:
    """Hash of a document's text without surrounding whitespace; ids are decoded if possible."""
    (content,) = record.values()
    if IDS in record and tokenizer is not None:
        check_ids(content, tokenizer)
        content = tokenizer.decode(
            content, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    return content_hash(content.strip() if isinstance(content, str) else content)


def check_ids(ids: list, tokenizer) -> None:
    """Raises UserError unless ids of a document are entries of the tokenizer."""
    if not 0 <= min(ids) <= max(ids) < len(tokenizer):
        raise UserError(
            f"input_ids range from {min(ids)} to {max(ids)}, but the tokenizer has "
            f"{len(tokenizer)} entries; set --data.tokenizer to the tokenizer that produced them"
        )


def split_documents(
    cfg: DataConfig, request: dict, revisions: dict, *, tokenizer=None, excluded=(), counts=None
) -> Iterator[Document]:
    """The documents of a request, each with the split that it belongs to.

    A document goes to the split of the first one with the same key, so that no text is in two
    splits. Documents with a key in `excluded`, the keys of validation documents, are excluded.
    Raises UserError.
    """
    source, column, fraction = (request[k] for k in ("source", "text_column", "holdout_fraction"))
    size = only_document_size(source, column) if fraction else None
    if size is not None:
        (name,) = as_mix(source)
        yield from split_by_position(document_parts(name, column, counts), size, fraction)
        return
    is_val = {}  # by key
    for record in documents(source, column, revisions, cfg.retry_seconds, counts):
        key = content_key(record, tokenizer)
        (content,) = record.values()
        hashed = content_hash(content)
        if fraction:
            split = "val" if is_val.setdefault(key, hashed < fraction) else "train"
        else:
            split = "excluded" if key in excluded else request["split"]
        yield Document(record, split, hashed, key)


def split_by_position(parts: Iterable[dict], size: int, fraction: float) -> Iterator[Document]:
    """The parts of a single document of `size` characters; its end is validation."""
    cut = size - max(1, round(size * fraction))
    for part in parts:
        ((name, content),) = part.items()
        here = min(max(cut, 0), len(content))
        if 0 < here < len(content) and isinstance(content, str):
            start = max(here // 2, here - BOUNDARY_CHARACTERS)
            here = boundary(content, start, here) or here
        cut -= len(content)
        for split, piece in (("train", content[:here]), ("val", content[here:])):
            if piece if name == IDS else piece.strip():
                yield Document(
                    {name: piece}, split, content_hash(piece), content_key({name: piece})
                )


def training_records(cfg: DataConfig) -> Iterator[dict]:
    """Training documents of a config: {"input_ids": ids} or {column: text}. Raises UserError."""
    request = token_request(cfg, "train", "")
    revisions = hub_revisions(request["hub_datasets"], cfg.retry_seconds)
    for document in split_documents(cfg, request, revisions):
        if document.split == "train":
            yield document.record


# ---- preparation
def token_request(cfg: DataConfig, split: str, tokenizer_hash: str) -> dict:
    """Everything that determines the prepared tokens, except how many training tokens there are.

    Raises UserError.
    """
    source = cfg.val_source if split == "val" and cfg.val_source is not None else cfg.source
    names = [name for name in as_mix(source) if name not in BUILT_IN]
    files = {name: file_stats(local_files(name).train) for name in names}
    return {
        "source": source,
        "files": files,
        "hub_datasets": [name for name in names if not files[name]],
        "python": sys.version if "stdlib" in as_mix(source) else None,
        "split": split,
        "holdout_fraction": cfg.val_fraction if cfg.val_source is None else 0.0,
        "text_column": cfg.text_column,
        "tokenizer": tokenizer_hash,
        # so that a larger validation set never replaces a smaller one
        "val_tokens": cfg.val_tokens if split == "val" else None,
    }


def prepare_tokens(cfg: DataConfig, split: str, tokens: int, tokenizer) -> Path:
    """Folder with at least `tokens` tokens of a split ("train" or "val"), or all the source has.

    Tokens of an earlier or interrupted preparation are kept and extended: the token stream does not
    depend on how many calls prepared it. With data.val_source, training documents with the text of
    a prepared validation document are excluded. Prints what is not used. Raises UserError.
    """
    folder = prepared(cfg, split, tokens, tokenizer)
    print_notes(read_manifest(folder))
    return folder


def prepared(cfg: DataConfig, split: str, tokens: int, tokenizer) -> Path:
    """The folder of prepare_tokens. Raises UserError."""
    request, excluded = token_request(cfg, split, digest(tokenizer.backend_tokenizer.to_str())), ()
    if split == "train" and cfg.val_source is not None:
        excluded = read_manifest(prepared(cfg, "val", cfg.val_tokens, tokenizer))["keys"]
        request["excluded"] = digest(excluded)
    folder = Path(cfg.cache) / "tokens" / f"{split}-{digest(request)}"
    lock = Path(cfg.cache) / folder.name  # outside tokens/, which holds only prepared folders
    with cache_errors(folder), locked(lock):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):  # left by a process that was killed
            leftover.unlink()
        manifest = read_manifest(folder) or {
            "request": request,
            "revisions": hub_revisions(request["hub_datasets"], cfg.retry_seconds),
            "complete": False,
            **dict.fromkeys(("records", "documents", "excluded", "bytes", "tokens"), 0),
            "hashes": [],  # minimum and maximum so far
            "keys": [],
            "counts": {},
            "shards": [],
        }
        if manifest["tokens"] < tokens and not manifest["complete"]:
            extend(folder, manifest, tokens, cfg, tokenizer, set(excluded))
    return folder


def extend(
    folder: Path, manifest: dict, tokens: int, cfg: DataConfig, tokenizer, excluded: set
) -> None:
    """Tokenize until the folder has `tokens` tokens or the source ends. Raises UserError.

    If it is interrupted, the tokens produced so far are saved.
    """
    counts, request = Counter(), manifest["request"]
    stream = split_documents(
        cfg,
        request,
        manifest["revisions"],
        tokenizer=tokenizer,
        excluded=excluded,
        counts=counts,
    )
    stream = itertools.islice(stream, manifest["records"], None)
    label = f"tokenizing {request['split']}"
    options = {"unit": "tok", "unit_scale": True, "disable": not sys.stderr.isatty()}
    with tqdm(desc=label, total=tokens, initial=manifest["tokens"], **options) as bar:
        while manifest["tokens"] < tokens and not manifest["complete"]:
            n_wanted = min(SHARD_TOKENS, tokens - manifest["tokens"])
            batches = []
            try:
                while n_wanted > 0 and not (batches and batches[-1].is_last):
                    batch = next_batch(stream, manifest["request"]["split"], tokenizer)
                    batches.append(batch)
                    n_wanted -= batch.n_tokens
                    bar.update(batch.n_tokens)
            finally:
                if batches:
                    save_shard(folder, batches, manifest, counts)


class Batch(NamedTuple):
    """Tokens of consecutive documents of a stream."""

    pieces: list[np.ndarray]  # uint16 (N,) for each document of the split
    keys: list[float]  # of the documents of the split
    hashes: list[float]  # of all documents
    n_excluded: int
    n_bytes: int  # of text in the split
    is_last: bool  # the stream has ended

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.pieces))


def next_batch(stream: Iterator[Document], split: str, tokenizer) -> Batch:
    """The next documents of a stream, those of the split tokenized. Raises UserError."""
    batch, size, is_last = [], 0, True
    for document in stream:
        batch.append(document)
        size += n_characters(document.record)
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            is_last = False
            break
    kept = [document for document in batch if document.split == split]
    pieces, n_bytes = tokenize([document.record for document in kept], tokenizer)
    return Batch(
        pieces,
        [document.key for document in kept],
        [document.hash for document in batch],
        sum(document.split == "excluded" for document in batch),
        n_bytes,
        is_last,
    )


def save_shard(folder: Path, batches: list[Batch], manifest: dict, counts: Counter) -> None:
    """Write the tokens of batches as a shard, unless there are none, and extend the manifest."""
    shard = np.concatenate([np.empty(0, np.uint16), *(p for b in batches for p in b.pieces)])
    hashes = [*manifest["hashes"], *(value for batch in batches for value in batch.hashes)]
    new = manifest | {
        "complete": batches[-1].is_last,
        "records": manifest["records"] + sum(len(batch.hashes) for batch in batches),
        "documents": manifest["documents"] + sum(len(batch.keys) for batch in batches),
        "excluded": manifest["excluded"] + sum(batch.n_excluded for batch in batches),
        "bytes": manifest["bytes"] + sum(batch.n_bytes for batch in batches),
        "tokens": manifest["tokens"] + len(shard),
        "hashes": [min(hashes, default=0.0), max(hashes, default=0.0)],
        "counts": dict(counts),
    }
    request = manifest["request"]
    if request["split"] == "val" and not request["holdout_fraction"]:  # excluded from training
        new["keys"] = manifest["keys"] + [key for batch in batches for key in batch.keys]
    if len(shard):
        path = folder / f"{len(manifest['shards']):05d}.bin"
        write_array(path, shard)
        entry = {"file": path.name, "tokens": len(shard), "sha256": file_sha256(path)}
        new["shards"] = [*manifest["shards"], entry]
    write_text(folder / "manifest.json", json.dumps(new | {"digest": digest(new)}, indent=1))
    manifest.update(new)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array's bytes completely or not at all."""
    tmp = path.with_name(f"{path.name}.tmp")
    try:
        with tmp.open("wb") as file:
            file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    except OSError as error:
        error.filename = str(path)  # a failed write does not name it
        tmp.unlink(missing_ok=True)
        raise


def tokenize(batch: list[dict], tokenizer) -> tuple[list[np.ndarray], int]:
    """Token ids of each record as uint16 (N,), end-of-text first, and the total bytes of text.

    Existing `input_ids` are kept unchanged and come after the texts; their byte count is the number
    of characters in the names of their tokens, which is exact for a byte-level BPE.
    """
    texts = [next(iter(record.values())) for record in batch if IDS not in record]
    ready = [record[IDS] for record in batch if IDS in record]
    n_bytes = sum(len(text.encode()) for text in texts)
    pieces, start = [], end_of_text(tokenizer)
    for group in groups(texts, ENCODE_CHARACTERS):
        pieces += [np.array([start, *ids], np.uint16) for ids in encode(tokenizer, group)]
    for ids in ready:
        pieces.append(np.array(ids, np.uint16))
        n_bytes += sum(map(len, tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)))
    return pieces, n_bytes


def groups(texts: list[str], limit: int) -> Iterator[list[str]]:
    """Consecutive texts in groups of about `limit` characters."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= limit:
            yield group
            group, size = [], 0
    yield group


def read_manifest(folder: Path) -> dict | None:
    """Manifest of a prepared folder, None before its first shard. Raises UserError if damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        saved = manifest.pop("digest")
        assert saved == digest(manifest), saved
        assert folder.name.endswith(digest(manifest["request"])), folder.name
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} is damaged; delete {folder} to prepare it again") from error
    return manifest


def print_notes(manifest: dict) -> None:
    """Print what was ignored, skipped, changed or excluded in a prepared source."""
    request, counts = manifest["request"], manifest["counts"]
    split, source = request["split"], request["source"]
    if split == "train" or not request["holdout_fraction"]:  # once for a source
        for name in as_mix(source):
            if name not in BUILT_IN:
                for line in local_files(name).notes(name):
                    print(line)
    place = counts.get("replaced_in")
    for n, text in (
        (counts.get("blank"), "skipped {} without text"),
        (counts.get("replaced"), f"found U+FFFD (invalid characters) in {{}}, first in {place}"),
        (counts.get("split"), f"split {{}} longer than {PART_CHARACTERS:,} characters"),
        (manifest["excluded"], "excluded {} (also in --data.val_source)"),
    ):
        if n:
            documents = f"{n:,} document{'s' if n > 1 else ''}"
            print(f"{split} data: {text.format(documents)}", flush=True)


# ---- batches
class Tokens:
    """First `limit` tokens of a prepared folder (None: all), memory-mapped.

    `sha256` is the hash of these tokens as little-endian uint16. Raises UserError if there are no
    tokens or a shard has changed since it was written.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        manifest = read_manifest(folder)
        if not manifest["shards"]:
            raise UserError(no_tokens(manifest))
        paths = [folder / shard["file"] for shard in manifest["shards"]]
        for path, shard in zip(paths, manifest["shards"], strict=True):
            if not path.exists() or file_sha256(path) != shard["sha256"]:
                raise UserError(
                    f"{path} is damaged (its sha256 differs from the manifest); delete {folder} to "
                    "prepare it again"
                )
        self.shards = [np.memmap(path, dtype=np.uint16, mode="r") for path in paths]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])  # (n_shards + 1,)
        self.bytes_per_token = manifest["bytes"] / manifest["tokens"]  # of the whole folder
        self.n = min(int(self.starts[-1]), limit or sys.maxsize)
        sha256 = hashlib.sha256()
        for start, shard in zip(self.starts[:-1], self.shards, strict=True):
            sha256.update(shard[: max(0, self.n - start)].data)
        self.sha256 = sha256.hexdigest()

    def __len__(self) -> int:
        return self.n

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length - 1 as int64 (length,), across shards where necessary."""
        end = start + length
        assert 0 <= start < end <= self.n, f"window {start} to {end} of {self.n} tokens"
        first = np.searchsorted(self.starts, start, side="right") - 1
        last = np.searchsorted(self.starts, end)
        shards = zip(self.starts[first:last], self.shards[first:last], strict=True)
        parts = [shard[max(0, start - offset) : end - offset] for offset, shard in shards]
        return np.concatenate(parts).astype(np.int64)  # (length,)

    def windows(self, indices, seq_len: int) -> Tensor:
        """Windows of seq_len + 1 tokens that start at multiples of seq_len: int64 (N, seq_len + 1).

        Inputs are [:, :-1] and targets [:, 1:].
        """
        windows = [self.window(int(i) * seq_len, seq_len + 1) for i in indices]
        return torch.from_numpy(np.stack(windows))  # (N, seq_len + 1)


def no_tokens(manifest: dict) -> str:
    """Why a prepared split is empty, and what to do about it."""
    request, (least, greatest) = manifest["request"], manifest["hashes"]
    remedy = "pass validation text with --data.val_source"
    if not request["holdout_fraction"]:
        remedy = "all are also in --data.val_source, so pass other text there or omit it"
    elif least < greatest:  # a fraction between them gives both splits a document
        rounded = (math.ceil(least * 10**digits) / 10**digits for digits in range(1, 18))
        fraction = next((f for f in rounded if least < f <= greatest), greatest)
        remedy = f"set --data.val_fraction {fraction}, add documents, or {remedy}"
    return (
        f"none of the {manifest['records']} documents in data source {request['source']} is in the "
        f"{request['split']} split; {remedy}"
    )


def token_batches(
    tokens: Tokens,
    first: int,
    steps: int,
    *,
    batch: int,
    seq_len: int,
    n_windows: int,
    seed: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Windows (batch, seq_len + 1) on the device for steps first to steps - 1."""

    def read(step: int) -> Tensor:
        windows = tokens.windows(batch_indices(step, batch, n_windows, seed), seq_len)
        return windows.pin_memory() if device.type == "cuda" else windows

    ready = prefetch(read, first, steps, device)
    return (windows.to(device, non_blocking=True) for windows in ready)


def eval_windows(tokens: Tokens, seq_len: int, count: int) -> Tensor:
    """At most `count` windows evenly spaced over the tokens: int64 (N, seq_len + 1).

    Raises UserError.
    """
    count = min(count, (len(tokens) - 1) // seq_len)
    if count < 1:
        raise UserError(
            f"validation has {len(tokens)} tokens, fewer than one sequence of {seq_len}; provide "
            "more documents, a larger --data.val_fraction, or a --data.val_source"
        )
    starts = np.linspace(0, len(tokens) - seq_len - 1, count).astype(int)
    windows = [tokens.window(int(start), seq_len + 1) for start in starts]
    return torch.from_numpy(np.stack(windows))  # (N, seq_len + 1)
