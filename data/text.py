"""Text data: documents of a source -> token shards on disk -> batches.

A source is prepared once: documents are tokenized in batches, each after an end-of-text token, and
written as uint16 shards with a manifest. Batches are then a pure function of (seed, step), so
resuming is exact.
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.config import HumanInt, UserError
from common.run import write_text
from data.order import batch_indices, prefetch
from data.source import (
    BUILT_IN,
    as_mix,
    digest,
    documents,
    file_sha256,
    file_stats,
    hub_revisions,
    in_validation,
    local_files,
)

SHARD_TOKENS = 8_000_000  # an interrupted preparation loses at most this much work
BATCH_DOCUMENTS = 256  # tokenized at a time: enough for all cores, few enough for flat memory


@dataclass
class DataConfig:
    """Text data."""

    source: str | dict[str, float] = field(
        default_factory=lambda: {
            "HuggingFaceTB/smollm-corpus:fineweb-edu-dedup": 0.7,
            "HuggingFaceTB/smollm-corpus:cosmopedia-v2": 0.3,
        }
    )
    """Training text: a hub dataset NAME or NAME:CONFIG (streamed); a folder, path or glob of
    .parquet, .jsonl or .txt files; `stdlib` (the source of this Python's standard library); or a
    mix {source: weight}, to which each source contributes text in proportion to its weight."""
    val_source: str | dict[str, float] | None = None
    """Validation text, in the same formats as data.source. null: hold out a fraction of the
    documents of data.source (data.val_fraction)."""
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"
    """Tokenizer: a hub name, a local folder, or bpe-N for a byte-level BPE with N entries (257 to
    65536) trained on the training source."""
    text_column: str = "text"
    """Column that holds the text. A source with a column `input_ids` is treated as tokenized,
    and its text is not read."""
    val_fraction: float = 0.05
    """Fraction of documents held out for validation, between 0 and 1 (exclusive), chosen by a hash
    of their content. Has no effect if data.val_source is set."""
    val_tokens: HumanInt = HumanInt("1M")
    """Number of validation tokens to prepare, rounded up to whole documents."""
    cache: str = "cache"
    """Folder for token shards and tokenizers."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"--data.val_fraction is {self.val_fraction}; it must be between 0 and 1, exclusive"
            )
        if self.val_tokens <= 0:
            raise ValueError(f"--data.val_tokens is {self.val_tokens}; it must be positive")


# ---- preparation
def end_of_text(tokenizer) -> int | None:
    """The id placed before every document: the tokenizer's eos, or its bos if it has no eos."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


def holdout_fraction(cfg: DataConfig) -> float:
    """Fraction of the source's documents that is held out for validation."""
    return cfg.val_fraction if cfg.val_source is None else 0.0


def token_request(cfg: DataConfig, split: str, tokenizer_hash: str) -> dict:
    """Everything that determines the prepared tokens, except how many training tokens there are.

    Raises UserError.
    """
    source = cfg.val_source if split == "val" and cfg.val_source is not None else cfg.source
    names = [name for name in as_mix(source) if name not in BUILT_IN]
    files = {name: file_stats(local_files(name)) for name in names}
    return {
        "source": source,
        "files": files,
        "hub_datasets": [name for name in names if not files[name]],
        "python": sys.version if "stdlib" in as_mix(source) else None,
        "split": split,
        "holdout_fraction": holdout_fraction(cfg),
        "text_column": cfg.text_column,
        "tokenizer": tokenizer_hash,
        # so that a larger validation set never replaces a smaller one
        "val_tokens": cfg.val_tokens if split == "val" else None,
    }


def prepare_tokens(cfg: DataConfig, split: str, tokens: int, tokenizer) -> Path:
    """Folder with at least `tokens` tokens of a split ("train" or "val"), or all the source has.

    Tokens of an earlier or interrupted preparation are kept and extended: the token stream does not
    depend on how many calls prepared it. Raises UserError.
    """
    request = token_request(cfg, split, digest(tokenizer.backend_tokenizer.to_str()))
    folder = Path(cfg.cache) / "tokens" / f"{split}-{digest(request)}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder) or {
        "request": request,
        "revisions": hub_revisions(request["hub_datasets"]),
        "complete": False,
        **dict.fromkeys(("records", "documents", "bytes", "tokens"), 0),
        "shards": [],
    }
    stream = documents(request["source"], cfg.text_column, manifest["revisions"])
    stream = itertools.islice(stream, manifest["records"], None)
    n_done = manifest["tokens"]
    quiet = manifest["complete"] or n_done >= tokens or not sys.stderr.isatty()
    label = f"tokenizing {split}"
    with tqdm(
        desc=label, total=tokens, initial=n_done, unit="tok", unit_scale=True, disable=quiet
    ) as bar:
        while manifest["tokens"] < tokens and not manifest["complete"]:
            n_wanted = min(SHARD_TOKENS, tokens - manifest["tokens"])
            shard = next_shard(stream, n_wanted, manifest, tokenizer, bar)
            save_shard(folder, shard, manifest)
    return folder


def next_shard(
    stream: Iterator[dict], n_wanted: int, manifest: dict, tokenizer, bar: tqdm
) -> np.ndarray:
    """Next n_wanted or more tokens of the stream, fewer if it ends: uint16 (N,).

    Adds the records, documents and bytes read to the manifest. Raises UserError.
    """
    split, fraction = manifest["request"]["split"], manifest["request"]["holdout_fraction"]
    pieces, n_tokens = [np.empty(0, np.uint16)], 0
    while n_tokens < n_wanted and not manifest["complete"]:
        batch = list(itertools.islice(stream, BATCH_DOCUMENTS))
        kept = [r for r in batch if not fraction or in_validation(r, fraction) == (split == "val")]
        new_pieces, n_bytes = tokenize(kept, tokenizer)
        n_new = sum(map(len, new_pieces))
        pieces += new_pieces
        n_tokens += n_new
        manifest["records"] += len(batch)
        manifest["documents"] += len(kept)
        manifest["bytes"] += n_bytes
        manifest["complete"] = len(batch) < BATCH_DOCUMENTS
        bar.update(n_new)
    return np.concatenate(pieces)  # (N,)


def save_shard(folder: Path, shard: np.ndarray, manifest: dict) -> None:
    """Write a shard, unless it is empty, and the manifest that lists it."""
    if len(shard):
        path = folder / f"{len(manifest['shards']):05d}.bin"
        tmp = path.with_suffix(f".{os.getpid()}.tmp")
        shard.tofile(tmp)
        tmp.replace(path)
        entry = {"file": path.name, "tokens": len(shard), "sha256": file_sha256(path)}
        manifest["shards"].append(entry)
        manifest["tokens"] += len(shard)
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))


def tokenize(batch: list[dict], tokenizer) -> tuple[list[np.ndarray], int]:
    """Token ids of each record as uint16 (N,), end-of-text first, and the bytes of text in all.

    Ready `input_ids` stay as they are; their byte count is the number of characters in the names of
    their tokens, which is exact for a byte-level BPE. Raises UserError.
    """
    texts = [next(iter(record.values())) for record in batch if "input_ids" not in record]
    ready = [record["input_ids"] for record in batch if "input_ids" in record]
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    pieces = []
    if texts:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = tokenizer(texts, **options)["input_ids"]
        pieces = [np.array([end_of_text(tokenizer), *ids], dtype=np.uint16) for ids in encoded]
    for ids in ready:
        if len(ids) and not 0 <= min(ids) <= max(ids) < len(tokenizer):
            raise UserError(
                f"input_ids range from {min(ids)} to {max(ids)}, but the tokenizer has "
                f"{len(tokenizer)} entries; pass the tokenizer that made them with --data.tokenizer"
            )
        pieces.append(np.array(ids, dtype=np.uint16))
        n_bytes += sum(map(len, tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)))
    return pieces, n_bytes


def read_manifest(folder: Path) -> dict | None:
    """Manifest of a prepared folder, None before its first shard. Raises UserError if damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        n_tokens = sum(shard["tokens"] for shard in manifest["shards"])
        assert manifest["tokens"] == n_tokens, f"{manifest['tokens']} tokens, shards {n_tokens}"
        assert manifest.keys() >= {"request", "revisions", "records", "bytes"}, manifest.keys()
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} is damaged; delete {folder} to prepare it again") from error
    return manifest


# ---- batches
class Tokens:
    """First `limit` tokens of a prepared folder (None: all), memory-mapped.

    `sha256` is the hash of these tokens as little-endian uint16. Raises UserError if there are no
    tokens or a shard has changed since it was written.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        manifest = read_manifest(folder)
        if not manifest["shards"]:
            request, n_records = manifest["request"], manifest["records"]
            remedy = "pass a source that holds text"
            if n_records:
                fraction = f"set another --data.val_fraction (now {request['holdout_fraction']})"
                remedy = f"{fraction} or pass a --data.val_source; a .txt file is one document"
            raise UserError(
                f"none of the {n_records} documents in data source {request['source']} is in the "
                f"{request['split']} split; {remedy}"
            )
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
