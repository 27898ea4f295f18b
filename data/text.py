"""Text data: corpus -> documents -> token shards on disk -> batches.

A corpus is prepared once: documents are tokenized in batches, each behind the tokenizer's end-of-text id, and written
as uint16 shards with a manifest. Batches are then a pure function of (seed, step, rank), so resuming is exact.
"""

import hashlib
import itertools
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import Count, UserError, write_text
from data.order import batch_indices, prefetch

SHARD_TOKENS = 8_000_000  # a kill costs at most this much work
BATCH_DOCUMENTS = (
    256  # tokenized at a time: enough to keep all cores busy, little enough for flat memory
)
SHUFFLE_BUFFER = 10_000  # documents a stream is shuffled through: corpora lie sorted by origin
NO_NETWORK = "without network give local files (--data.source 'folder/*.parquet'), or try --config configs/llm_demo.yaml"
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}


@dataclass
class DataConfig:
    """Text data."""

    source: str | dict[str, float] = field(
        default_factory=lambda: {
            "HuggingFaceTB/smollm-corpus:fineweb-edu-dedup": 0.7,
            "HuggingFaceTB/smollm-corpus:cosmopedia-v2": 0.3,
        }
    )
    """Where text comes from: a hub dataset NAME or NAME:CONFIG (streamed), a folder, path or glob of .parquet, .jsonl
    or .txt files, `stdlib` (this Python's standard library), or a mix {source: share of the text}."""
    val_source: str | dict[str, float] | None = None
    """Validation text of its own; null holds out val_fraction of the source's documents."""
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"
    """Hub name or local folder of a tokenizer, or bpe-N: a byte-level BPE of N entries trained on the source."""
    text_column: str = "text"
    """Column with the text. A source with a column `input_ids` is taken as tokenized already."""
    val_fraction: float = 0.05
    """Share of documents, chosen by their hash, that validation has to itself."""
    val_tokens: Count = Count("1M")
    """Validation tokens to prepare, rounded up to whole documents."""
    cache: str = "cache"
    """Folder for token shards and tokenizers."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction {self.val_fraction} must lie between 0 and 1")
        if self.val_tokens <= 0:
            raise ValueError(f"data.val_tokens {self.val_tokens} must be positive")


# ------------------------------------------------------------------------------------------------------- documents
def documents(
    source: str | dict[str, float], column: str, revisions: dict[str, str]
) -> Iterator[dict]:
    """Rows of a source, or of a mix whose sources take turns so that each has its share of the text.

    The order depends on the arguments alone. A mix ends with the first of its sources. Raises UserError.
    """
    shares = source if isinstance(source, dict) else {source: 1.0}
    if not shares or min(shares.values()) <= 0:
        raise UserError(f"data source {source}: give at least one source, and positive shares")
    streams = {name: rows(name, column, revisions.get(name)) for name in shares}
    taken = dict.fromkeys(shares, 0)
    while True:
        name = min(shares, key=lambda n: taken[n] / shares[n])
        row = next(streams[name], None)
        if row is None:
            return
        taken[name] += 4 * len(row["input_ids"]) if "input_ids" in row else len(row[column])
        yield row


def rows(source: str, column: str, revision: str | None) -> Iterator[dict]:
    """Shuffled rows of one source, each with `input_ids` or a text that is not blank. Raises UserError."""
    if source == "stdlib":
        root, skip = (
            Path(sysconfig.get_path("stdlib")),
            {"site-packages", "dist-packages", "test", "tests", "idle_test"},
        )
        paths = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
        random.Random(0).shuffle(paths)
        yield from (
            {column: text}
            for p in paths
            if (text := p.read_text(encoding="utf-8", errors="replace")).strip()
        )
        return
    import datasets

    datasets.disable_progress_bars()
    files = local_files(source)
    try:
        if files:
            loader = LOADERS[Path(files[0]).suffix]
            options = {"sample_by": "document"} if loader == "text" else {}
            stream = datasets.load_dataset(
                loader, data_files=files, split="train", streaming=True, **options
            )
        else:
            name, _, config = source.partition(":")
            stream = datasets.load_dataset(
                name, config or None, split="train", streaming=True, revision=revision
            )
        for row in stream.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER):
            text = row.get(column)
            if "input_ids" in row:
                yield {"input_ids": row["input_ids"]}
            elif column not in row:
                raise UserError(
                    f"data source {source} has no column {column!r} but {', '.join(row)}: "
                    "set --data.text_column"
                )
            elif text is not None and not isinstance(text, str):
                raise UserError(
                    f"data source {source}: column {column!r} holds {type(text).__name__}, not text"
                )
            elif text and text.strip():
                yield {column: text}
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub client raise dozens of kinds
        remedy = "is the file damaged, or no text?" if files else NO_NETWORK
        raise UserError(f"cannot read data source {source}: {reason(error)}; {remedy}") from error


def reason(error: Exception) -> str:
    """The first line of what an exception says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def local_files(source: str) -> list[str]:
    """The files that a folder, path or glob stands for, sorted; none if it names a hub dataset. Raises UserError."""
    path = Path(source).expanduser()
    found = (
        [str(p) for p in path.rglob("*") if p.suffix in LOADERS]
        if path.is_dir()
        else glob(str(path))
    )
    suffixes = {Path(f).suffix for f in found}
    if not found and (
        path.is_dir()
        or path.suffix in LOADERS
        or path.is_absolute()
        or source[:1] in ("", ".", "~")
        or any(c in source for c in "*?[")
    ):
        raise UserError(f"data source {source}: there is no such .parquet, .jsonl or .txt file")
    if found and (len(suffixes) > 1 or not suffixes <= LOADERS.keys()):
        raise UserError(
            f"data source {source} has files of kind {', '.join(sorted(suffixes)) or 'unknown'}: give files "
            "of one kind, .parquet, .jsonl or .txt"
        )
    return sorted(found)


def in_validation(row: dict, fraction: float) -> bool:
    """Whether a document is held out: decided by its content alone, so a copy of it falls on the same side."""
    (content,) = row.values()
    content = (
        content.encode("utf-8", "replace")
        if isinstance(content, str)
        else np.asarray(content, "<u4").tobytes()
    )
    return (
        int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < fraction * 2**64
    )


# ----------------------------------------------------------------------------------------------------- preparation
def end_of_text(tokenizer) -> int | None:
    """The id that stands before every document: the tokenizer's eos, or its bos where it has no eos."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


def held_out(cfg: DataConfig) -> float:
    return cfg.val_fraction if cfg.val_source is None else 0.0


def request(cfg: DataConfig, split: str, tokenizer_hash: str) -> dict:
    """Everything that decides which tokens a preparation yields, except how many of them."""
    source = cfg.val_source if split == "val" and cfg.val_source is not None else cfg.source
    shares = source if isinstance(source, dict) else {source: 1.0}
    files = {
        name: [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in local_files(name)]
        for name in shares
        if name != "stdlib"
    }
    return {
        "source": source,
        "files": files,
        "python": sys.version if "stdlib" in shares else None,
        "split": split,
        "held_out": held_out(cfg),
        "text_column": cfg.text_column,
        "tokenizer": tokenizer_hash,
        "val_tokens": cfg.val_tokens if split == "val" else None,
    }  # so that a larger set never stands in for it


def digest(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def prepare(cfg: DataConfig, split: str, tokens: int, tokenizer) -> Path:
    """Have at least `tokens` tokens of a split ("train" or "val") on disk, or all there are; return their folder.

    What an earlier or interrupted preparation left is kept and extended: the stream of tokens is the same however many
    pieces it was made in. Raises UserError.
    """
    wanted = request(cfg, split, digest(tokenizer.backend_tokenizer.to_str()))
    folder = Path(cfg.cache) / "tokens" / f"{split}-{digest(wanted)}"
    folder.mkdir(parents=True, exist_ok=True)
    done = read_manifest(folder) or {
        "request": wanted,
        "revisions": revisions(wanted),
        "complete": False,
        "rows": 0,
        "documents": 0,
        "bytes": 0,
        "tokens": 0,
        "shards": [],
    }
    stream = itertools.islice(
        documents(wanted["source"], cfg.text_column, done["revisions"]), done["rows"], None
    )
    with tqdm(
        total=tokens,
        initial=done["tokens"],
        unit="tok",
        unit_scale=True,
        desc=f"tokenizing {split}",
        disable=done["complete"] or done["tokens"] >= tokens or not sys.stderr.isatty(),
    ) as bar:
        while done["tokens"] < tokens and not done["complete"]:
            shard, size = [], 0
            while size < min(SHARD_TOKENS, tokens - done["tokens"]) and not done["complete"]:
                batch = list(itertools.islice(stream, BATCH_DOCUMENTS))
                mine = [
                    r
                    for r in batch
                    if not wanted["held_out"]
                    or in_validation(r, wanted["held_out"]) == (split == "val")
                ]
                pieces, n_bytes = tokenize(mine, tokenizer)
                shard += pieces
                size += sum(map(len, pieces))
                done["rows"] += len(batch)
                done["documents"] += len(mine)
                done["bytes"] += n_bytes
                done["complete"] = len(batch) < BATCH_DOCUMENTS
                bar.update(sum(map(len, pieces)))
            if size:
                path = folder / f"{len(done['shards']):05d}.bin"
                tmp = path.with_suffix(f".{os.getpid()}.tmp")
                np.concatenate(shard).tofile(tmp)
                tmp.replace(path)
                done["shards"].append(
                    {"file": path.name, "tokens": size, "sha256": file_sha256(path)}
                )
                done["tokens"] += size
            write_text(folder / "manifest.json", json.dumps(done, indent=1))
    return folder


def tokenize(batch: list[dict], tokenizer) -> tuple[list[np.ndarray], int]:
    """uint16 ids of each document, end-of-text first, and the bytes of text they stand for together.

    Ready `input_ids` stay as they are; their bytes are the characters of the tokens' names, as in every byte-level BPE.
    Raises UserError.
    """
    texts = [next(iter(row.values())) for row in batch if "input_ids" not in row]
    ready = [row["input_ids"] for row in batch if "input_ids" in row]
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    pieces = []
    if texts:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        pieces = [np.array([end_of_text(tokenizer), *ids], dtype=np.uint16) for ids in encoded]
    for ids in ready:
        if len(ids) and not 0 <= min(ids) <= max(ids) < len(tokenizer):
            raise UserError(
                f"input_ids reach {max(ids)}, the tokenizer has {len(tokenizer)} entries: name the tokenizer "
                "they were made with as --data.tokenizer"
            )
        pieces.append(np.array(ids, dtype=np.uint16))
        n_bytes += sum(map(len, tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)))
    return pieces, n_bytes


def revisions(wanted: dict) -> dict[str, str]:
    """The commit of each hub dataset in a request, so that what is prepared later comes from the same one."""
    import huggingface_hub

    found = {}
    for name, files in wanted["files"].items():
        if not files:
            try:
                found[name] = huggingface_hub.HfApi().dataset_info(name.partition(":")[0]).sha
            except Exception as error:  # as in rows()
                raise UserError(
                    f"cannot find data source {name} on the hub: {reason(error)}; {NO_NETWORK}"
                ) from error
    return found


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a preparation, or None before its first shard. Raises UserError where it is damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        manifest["revisions"], manifest["rows"], manifest["bytes"]
        assert manifest["tokens"] == sum(shard["tokens"] for shard in manifest["shards"])
        return manifest
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is damaged: delete {folder} to prepare it again") from error


# --------------------------------------------------------------------------------------------------------- batches
class Tokens:
    """The first `limit` tokens of a prepared folder, memory-mapped; `sha256` is that of their little-endian uint16.

    Raises UserError if there are none, or if a shard is not the one that was written.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        manifest = read_manifest(folder)
        if not manifest["shards"]:
            source, split, rows = (
                manifest["request"]["source"],
                manifest["request"]["split"],
                manifest["rows"],
            )
            raise UserError(
                f"none of the {rows} documents in data source {source} is for {split}"
                + (
                    "; set another --data.val_fraction (0.2, say), or name a --data.val_source"
                    if rows
                    else ": it is empty"
                )
            )
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            if not path.exists() or file_sha256(path) != shard["sha256"]:
                raise UserError(
                    f"{path} is damaged (not the sha256 of the manifest): delete {folder} to prepare it again"
                )
        self.shards = [
            np.memmap(folder / shard["file"], dtype=np.uint16, mode="r")
            for shard in manifest["shards"]
        ]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.bytes_per_token = manifest["bytes"] / manifest["tokens"]  # of the whole folder
        self.n = min(int(self.starts[-1]), limit or sys.maxsize)
        sha256 = hashlib.sha256()
        for start, shard in zip(self.starts, self.shards):
            sha256.update(shard[: max(0, self.n - start)].data)
        self.sha256 = sha256.hexdigest()

    def __len__(self) -> int:
        return self.n

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length as int64 (length,), across shards where need be."""
        assert 0 <= start <= start + length <= self.n, f"window {start}+{length} of {self.n} tokens"
        parts, i = [], int(np.searchsorted(self.starts, start, side="right")) - 1
        while length > 0:
            part = self.shards[i][start - self.starts[i] :][:length]
            parts.append(part)
            start, length, i = start + len(part), length - len(part), i + 1
        return np.concatenate(parts).astype(np.int64)

    def windows(self, indices, seq_len: int) -> torch.Tensor:
        """Windows of seq_len + 1 tokens at multiples of seq_len: (N, T + 1); inputs [:, :-1], targets [:, 1:]."""
        return torch.from_numpy(
            np.stack([self.window(int(i) * seq_len, seq_len + 1) for i in indices])
        )


def batches(
    tokens: Tokens,
    first: int,
    steps: int,
    *,
    batch: int,
    seq_len: int,
    n_windows: int,
    seed: int,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Batches (batch, T + 1) of steps first to steps - 1 on the device."""

    def read(step: int) -> torch.Tensor:
        windows = tokens.windows(batch_indices(step, batch, n_windows, seed), seq_len)
        return windows.pin_memory() if device.type == "cuda" else windows

    return (
        windows.to(device, non_blocking=True) for windows in prefetch(read, first, steps, device)
    )


def eval_windows(tokens: Tokens, seq_len: int, count: int) -> torch.Tensor:
    """At most `count` windows of seq_len + 1 tokens, spread evenly over the stream: (N, T + 1). Raises UserError."""
    count = min(count, (len(tokens) - 1) // seq_len)
    if count < 1:
        raise UserError(
            f"validation has {len(tokens)} tokens, fewer than one sequence of {seq_len}: give more documents, "
            "a larger --data.val_fraction, or a --data.val_source"
        )
    starts = np.linspace(0, len(tokens) - seq_len - 1, count).astype(int)
    return torch.from_numpy(np.stack([tokens.window(int(start), seq_len + 1) for start in starts]))
