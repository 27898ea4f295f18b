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
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.config import HumanInt, UserError, stop_signals
from common.disk import cache_errors, file_sha256, locked, write_text
from data.hub import hub_revisions
from data.order import BLOCK_TOKENS
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

SHARD_TOKENS = BLOCK_TOKENS  # a shard is on disk when training needs its block
BATCH_DOCUMENTS = 256  # tokenized at a time: enough for all cores, few enough to bound memory
BATCH_CHARACTERS = 8_000_000
ENCODE_CHARACTERS = 2_000_000  # per tokenizer call, which needs 100 bytes per character
HELD_CHARACTERS = 64_000_000  # of training text that waits while validation is tokenized
HELD_BATCHES = 8  # whose validation documents make one tokenizer call, for all cores
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
    backend = tokenizer.backend_tokenizer  # the Python layer above it takes a fifth of the time
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return [text.ids for text in backend.encode_batch_fast(texts, add_special_tokens=False)]


def content_key(record: dict, hashed: float, tokenizer=None) -> float:
    """Hash of a document's text without surrounding whitespace; ids are decoded if possible.

    `hashed` is the hash of its content.
    """
    (content,) = record.values()
    if IDS in record:
        if tokenizer is None:
            return hashed
        check_ids(content, tokenizer)
        text = tokenizer.decode(
            content, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return content_hash(text.strip())
    text = content.strip()
    return hashed if len(text) == len(content) else content_hash(text)


def check_ids(ids: list, tokenizer) -> None:
    """Raises UserError unless ids of a document are entries of the tokenizer."""
    if not 0 <= min(ids) <= max(ids) < len(tokenizer):
        raise UserError(
            f"input_ids range from {min(ids)} to {max(ids)}, but the tokenizer has "
            f"{len(tokenizer)} entries; set --data.tokenizer to the tokenizer that produced them"
        )


class FirstChoices:
    """The first choice made for each key, as from dict.setdefault, in 9 bytes per key."""

    N_RECENT = 50_000  # keys in a dict, which takes 150 bytes for each

    def __init__(self):
        self.keys, self.choices = np.empty(0), np.empty(0, bool)  # (N,) in the order of the keys
        self.recent = {}

    def setdefault(self, key: float, choice: bool) -> bool:
        i = int(np.searchsorted(self.keys, key))
        if i < len(self.keys) and self.keys[i] == key:
            return bool(self.choices[i])
        choice = self.recent.setdefault(key, choice)
        if len(self.recent) >= self.N_RECENT:
            keys = np.sort(np.fromiter(self.recent, float))
            choices = np.array([self.recent[key] for key in keys.tolist()])
            places = np.searchsorted(self.keys, keys)
            self.keys = np.insert(self.keys, places, keys)
            self.choices = np.insert(self.choices, places, choices)
            self.recent = {}
        return choice


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
    is_val = FirstChoices()  # by key
    for record in documents(source, column, revisions, cfg.retry_seconds, counts):
        (content,) = record.values()
        hashed = content_hash(content)
        key = content_key(record, hashed, tokenizer)
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
                hashed = content_hash(piece)
                yield Document({name: piece}, split, hashed, content_key({name: piece}, hashed))


def training_records(cfg: DataConfig) -> Iterator[dict]:
    """Training documents of a config: {"input_ids": ids} or {column: text}. Raises UserError."""
    request = token_request(cfg, "train", "")
    revisions = hub_revisions(request["hub_datasets"], cfg.retry_seconds)
    for document in split_documents(cfg, request, revisions):
        if document.split == "train":
            yield document.record


# ---- preparation
def token_request(
    cfg: DataConfig, split: str, tokenizer_hash: str, excluded: list[float] | None = None
) -> dict:
    """Everything that determines the prepared tokens, except how many training tokens there are.

    `excluded` are the keys of documents in data.val_source. Raises UserError.
    """
    source = cfg.val_source if split == "val" and cfg.val_source is not None else cfg.source
    names = [name for name in as_mix(source) if name not in BUILT_IN]
    files = {name: file_stats(local_files(name).train) for name in names}
    request = {
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
    return request if excluded is None else request | {"excluded": digest(excluded)}


def prepare_tokens(cfg: DataConfig, split: str, tokens: int, tokenizer) -> Path:
    """Folder with at least `tokens` tokens of a split ("train" or "val"), or all the source has.

    See prepare_splits. Prints what is not used. Raises UserError.
    """
    folder = prepare_splits(cfg, {split: tokens}, tokenizer)[split]
    print_notes(read_manifest(folder))
    return folder


def prepare_splits(
    cfg: DataConfig,
    wanted: dict[str, int],
    tokenizer,
    first: int = sys.maxsize,
    read: Callable[[Iterator], Iterator] = iter,
) -> dict[str, Path]:
    """Folders by split ("train", "val") with at least the wanted tokens, or all the source has.

    Tokens of an earlier or interrupted preparation are kept and extended: the token stream does not
    depend on how many calls prepared it. Splits of one source are prepared in one pass over it.
    With data.val_source, training documents with the text of a prepared validation document are
    excluded, so validation is prepared too. Once there are `first` training tokens, validation
    comes before further ones. `read` iterates over batches of documents. Raises UserError.
    """
    tokenizer_hash = digest(tokenizer.backend_tokenizer.to_str())
    options = {"tokenizer": tokenizer, "first": first, "read": read}
    if cfg.val_source is None:
        requests = {split: token_request(cfg, split, tokenizer_hash) for split in wanted}
        return prepare_source(cfg, requests, wanted, **options)
    request = token_request(cfg, "val", tokenizer_hash)
    val_tokens = {"val": wanted.get("val", cfg.val_tokens)}
    folders = prepare_source(cfg, {"val": request}, val_tokens, **options)
    if "train" in wanted:
        keys = read_manifest(folders["val"])["keys"]
        request = token_request(cfg, "train", tokenizer_hash, keys)
        requests, options["excluded"] = {"train": request}, set(keys)
        folders |= prepare_source(cfg, requests, wanted, **options)
    return folders


def prepare_source(
    cfg: DataConfig, requests: dict[str, dict], wanted: dict[str, int], **options
) -> dict[str, Path]:
    """Folders with the wanted tokens of requests for splits of one source. Raises UserError."""
    folders = {split: token_folder(cfg, request) for split, request in requests.items()}
    with ExitStack() as stack:
        stack.enter_context(cache_errors(Path(cfg.cache) / "tokens"))
        for folder in sorted(folders.values()):  # in one order, so that no two processes deadlock
            # the lock is outside tokens/, which holds only prepared folders
            stack.enter_context(locked(Path(cfg.cache) / folder.name))
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):  # left by a process that was killed
                leftover.unlink()
        manifests = {split: read_manifest(folder) for split, folder in folders.items()}
        known = [manifest["revisions"] for manifest in manifests.values() if manifest]
        if len(known) < len(folders):
            names = next(iter(requests.values()))["hub_datasets"]
            revisions = known[0] if known else hub_revisions(names, cfg.retry_seconds)
        splits = []
        for split in sorted(folders, reverse=True):  # val before train
            manifest = manifests[split] or new_manifest(requests[split], revisions)
            splits.append(Split(folders[split], manifest, wanted[split]))
        unfinished = [split for split in splits if not split.is_done]
        while unfinished:
            revisions = unfinished[0].manifest["revisions"]
            same = [split for split in unfinished if split.manifest["revisions"] == revisions]
            fill(same, cfg, **options)
            unfinished = [split for split in unfinished if split not in same]
    return folders


def token_folder(cfg: DataConfig, request: dict) -> Path:
    return Path(cfg.cache) / "tokens" / f"{request['split']}-{digest(request)}"


def new_manifest(request: dict, revisions: dict) -> dict:
    return {
        "request": request,
        "revisions": revisions,
        "complete": False,
        **dict.fromkeys(("records", "documents", "excluded", "bytes", "tokens"), 0),
        "hashes": [],  # minimum and maximum so far
        "keys": [],
        "counts": {},
        "shards": [],
    }


class DocumentBatch(NamedTuple):
    """Consecutive documents of a stream."""

    start: int  # index of the first document
    documents: list[Document]
    n_characters: int
    counts: dict  # of what was skipped and changed so far
    is_last: bool  # the stream has ended


def document_batches(
    stream: Iterator[Document], start: int, counts: Counter
) -> Iterator[DocumentBatch]:
    """The documents of a stream from index `start` on, in batches."""
    stream, is_last = itertools.islice(stream, start, None), False
    while not is_last:
        batch, size, is_last = [], 0, True
        for document in stream:
            batch.append(document)
            size += n_characters(document.record)
            if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
                is_last = False
                break
        yield DocumentBatch(start, batch, size, dict(counts), is_last)
        start += len(batch)


class Batch(NamedTuple):
    """Tokens of consecutive documents of a stream."""

    pieces: list[np.ndarray]  # uint16 (N,) for each document of the split
    keys: list[float]  # of the documents of the split
    hashes: list[float]  # of all documents
    n_excluded: int
    n_bytes: int  # of text in the split
    counts: dict
    is_last: bool  # the stream has ended


@dataclass
class Split:
    """A folder of prepared tokens that is extended to `wanted` tokens."""

    folder: Path
    manifest: dict
    wanted: int
    waiting: deque[DocumentBatch] = field(default_factory=deque)
    unsaved: list[Batch] = field(default_factory=list)

    def __post_init__(self):
        self.n_tokens, self.is_complete = self.manifest["tokens"], self.manifest["complete"]

    @property
    def is_done(self) -> bool:
        return self.n_tokens >= self.wanted or self.is_complete

    @property
    def name(self) -> str:
        return self.manifest["request"]["split"]

    def own(self, batch: DocumentBatch) -> list[Document]:
        """Documents of a batch that are beyond what the folder has."""
        return batch.documents[max(0, self.manifest["records"] - batch.start) :]

    def take(self, batch: DocumentBatch) -> None:
        """Let a batch wait to be tokenized if this split needs it."""
        if not self.is_done and (self.own(batch) or batch.is_last):
            self.waiting.append(batch)

    def add(self, batch: Batch) -> None:
        """Add the tokens of a batch; saves them if a shard is complete or nothing is missing."""
        self.unsaved.append(batch)
        self.n_tokens += sum(map(len, batch.pieces))
        self.is_complete = batch.is_last
        n_shards = (max(1, self.manifest["tokens"]) - 1) // SHARD_TOKENS + 1
        # one more, because the last input of a block has a target too
        if self.is_done or self.n_tokens > n_shards * SHARD_TOKENS:
            self.save()

    def save(self) -> None:
        if self.unsaved:
            with uninterrupted():
                batches, self.unsaved = self.unsaved, []
                save_shard(self.folder, batches, self.manifest)


def fill(
    splits: list[Split], cfg: DataConfig, tokenizer, first: int, read: Callable, excluded=()
) -> None:
    """Tokenize until all splits, training last, are done or the source ends. Raises UserError.

    If it is interrupted, the tokens produced so far are saved.
    """
    counts, manifest = Counter(), splits[0].manifest
    stream = split_documents(
        cfg,
        manifest["request"],
        manifest["revisions"],
        tokenizer=tokenizer,
        excluded=excluded,
        counts=counts,
    )
    start = min(split.manifest["records"] for split in splits)
    names = " and ".join(split.name for split in splits)
    total = sum(split.wanted for split in splits[:-1]) + min(splits[-1].wanted, first)
    n_done = sum(split.n_tokens for split in splits)
    options = {"unit": "tok", "unit_scale": True, "disable": not sys.stderr.isatty()}
    with tqdm(desc=f"tokenizing {names}", total=total, initial=n_done, **options) as bar:
        try:
            for batch in read(document_batches(stream, start, counts)):
                for split in splits:
                    split.take(batch)
                tokenize_waiting(splits, first, tokenizer, batch.is_last)
                bar.update(sum(split.n_tokens for split in splits) - bar.n)
                if splits[-1].n_tokens >= first and all(split.is_done for split in splits[:-1]):
                    bar.close()  # training starts and prints its own lines
                if all(split.is_done for split in splits):
                    break
        finally:
            for split in splits:
                split.save()


def tokenize_waiting(splits: list[Split], first: int, tokenizer, is_last: bool) -> None:
    """Tokenize the batches that wait; if the last split has `first` tokens, its batches wait until
    the others are done or there are too many of them.
    """
    *others, last = splits
    if last.n_tokens >= first and not all(split.is_done for split in others):
        for split in others:
            if len(split.waiting) >= HELD_BATCHES or is_last:
                add_tokens([(split, batch) for batch in split.waiting], tokenizer)
                split.waiting.clear()
        while sum(batch.n_characters for batch in last.waiting) > HELD_CHARACTERS:
            add_tokens([(last, last.waiting.popleft())], tokenizer)
        if not all(split.is_done for split in others):
            return
    while any(split.waiting for split in splits):
        oldest = [(split, split.waiting.popleft()) for split in splits if split.waiting]
        add_tokens(oldest, tokenizer)


def add_tokens(work: list[tuple[Split, DocumentBatch]], tokenizer) -> None:
    """Tokenize batches in one call and add each to its split, unless that is done by then."""
    records = []
    for split, batch in work:
        kept = [document.record for document in split.own(batch) if document.split == split.name]
        records.append(sorted(kept, key=lambda record: IDS in record))  # texts first
    pieces, n_bytes = map(iter, tokenize(list(itertools.chain(*records)), tokenizer))
    for (split, batch), group in zip(work, records, strict=True):
        own = split.own(batch)
        tokens = Batch(
            list(itertools.islice(pieces, len(group))),
            [document.key for document in own if document.split == split.name],
            [document.hash for document in own],
            sum(document.split == "excluded" for document in own),
            sum(itertools.islice(n_bytes, len(group))),
            batch.counts,
            batch.is_last,
        )
        if not split.is_done:
            split.add(tokens)


def save_shard(folder: Path, batches: list[Batch], manifest: dict) -> None:
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
        "counts": batches[-1].counts,
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


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Postpone the signals that stop this process to the end of the context."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    received = []
    before = {n: signal.signal(n, lambda n, _: received.append(n)) for n in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def tokenize(records: list[dict], tokenizer) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of each record as uint16 (N,), end-of-text first, and the bytes of its text.

    Existing `input_ids` are kept unchanged; their byte count is the number of characters in the
    names of their tokens, which is exact for a byte-level BPE.
    """
    start = end_of_text(tokenizer)
    texts = [next(iter(record.values())) for record in records if IDS not in record]
    batches = (encode(tokenizer, group) for group in groups(texts, ENCODE_CHARACTERS))
    encoded = zip(itertools.chain.from_iterable(batches), texts, strict=True)
    pieces, n_bytes = [], []
    for record in records:
        if IDS in record:
            ids = record[IDS]
            names = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
            pieces.append(np.array(ids, np.uint16))
            n_bytes.append(sum(map(len, names)))
        else:
            ids, text = next(encoded)
            pieces.append(np.array([start, *ids], np.uint16))
            n_bytes.append(len(text.encode()))
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

    Raises UserError if there are no tokens or a shard has changed since it was written.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder, self.limit = folder, limit or sys.maxsize
        self.shards, self.starts = [], np.zeros(1, np.int64)  # (n_shards + 1,)
        self.hashes = {0: hashlib.sha256()}  # by number of tokens
        manifest = read_manifest(folder)
        if not manifest["shards"]:
            raise UserError(no_tokens(manifest))
        self.map_shards(manifest)
        self.bytes_per_token = manifest["bytes"] / manifest["tokens"]  # of the whole folder

    def map_shards(self, manifest: dict) -> None:
        """Map the shards of a manifest that are new, up to the limit. Raises UserError."""
        for shard in manifest["shards"][len(self.shards) :]:
            if self.starts[-1] >= self.limit:
                return
            path = self.folder / shard["file"]
            if not path.exists() or file_sha256(path) != shard["sha256"]:
                raise UserError(
                    f"{path} is damaged (its sha256 differs from the manifest); delete "
                    f"{self.folder} to prepare it again"
                )
            self.shards.append(np.memmap(path, dtype=np.uint16, mode="r"))
            # last, because another thread may be reading
            self.starts = np.append(self.starts, self.starts[-1] + shard["tokens"])

    def __len__(self) -> int:
        return min(int(self.starts[-1]), self.limit)

    @property
    def sha256(self) -> str:
        """Hash of all tokens as little-endian uint16."""
        return self.prefix_sha256(len(self))

    def prefix_sha256(self, n: int) -> str:
        """Hash of the first n tokens as little-endian uint16; continues from shorter prefixes."""
        assert n <= len(self), f"{n} of {len(self)} tokens"
        done = max(length for length in self.hashes if length <= n)
        sha256 = self.hashes[done].copy()
        for start, shard in zip(self.starts[:-1], self.shards, strict=False):
            sha256.update(shard[max(0, done - start) : max(0, n - start)].data)
        self.hashes[n] = sha256
        return sha256.hexdigest()

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length - 1 as int64 (length,), across shards where necessary."""
        end = start + length
        assert 0 <= start < end <= len(self), f"window {start} to {end} of {len(self)} tokens"
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
