"""Tokenizers: from the hub, from a local folder, or a byte-level BPE trained on the data source."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tokenizers
import torch
import transformers

from common.config import UserError, first_line
from common.disk import building, write_text
from data.hub import hub_tokenizer
from data.source import digest
from data.text import DataConfig, end_of_text, token_request, training_records

BPE_CHARACTERS = 50_000_000  # text to train a BPE on; more changes little but takes minutes
MAX_ENTRIES = 65_536  # token shards are uint16
SHA256 = "sha256"  # file with the hash of a cached tokenizer


def load_tokenizer(
    cfg,
    corpus: str | None = None,
    texts: Callable[[], Iterator[str]] | None = None,
    saved: Path | None = None,
):
    """The tokenizer of a run if the folder `saved` exists, otherwise cfg.tokenizer.

    Downloaded and trained tokenizers are cached. A BPE is trained on texts(), identified by
    `corpus`; if both are None, on the training documents of the DataConfig `cfg`. Raises UserError.
    """
    if saved is not None and saved.is_dir():
        return read_tokenizer(
            cfg.tokenizer, saved, "restore the original folder, or train again from scratch"
        )
    name, local = cfg.tokenizer, Path(cfg.tokenizer).expanduser()
    if name.startswith("bpe-"):
        request = corpus or token_request(cfg, "train", name)
        return cached(
            name,
            Path(cfg.cache) / "tokenizers" / f"{name}-{digest(request)}",
            lambda: train_bpe(name, texts() if texts else training_texts(cfg)),
        )
    if local.is_dir():
        remedy = "correct --data.tokenizer, or set it to bpe-8192 to train one"
        return read_tokenizer(name, local, remedy)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(
            f"--data.tokenizer {name} is neither a folder nor a hub name OWNER/NAME; set it to a "
            "folder with tokenizer.json, or to bpe-8192 to train one"
        )
    return cached(
        name,
        Path(cfg.cache) / "tokenizers" / name.replace("/", "--"),
        lambda: download(name, cfg.retry_seconds),
    )


def cached(name: str, folder: Path, make: Callable):
    """The tokenizer in a cache folder, created by make() if it is missing. Raises UserError."""
    with building(folder) as tmp:
        if tmp is not None:
            save(make(), tmp)
    remedy, sha256 = f"delete {folder} to create it again", folder / SHA256
    if sha256.exists() and sha256.read_bytes().decode("latin-1") != files_sha256(folder):
        raise UserError(f"tokenizer {name} in {folder} is damaged; {remedy}")
    return read_tokenizer(name, folder, remedy)


def save(tokenizer, folder: Path) -> None:
    """Write a tokenizer with a hash of its files. Raises UserError."""
    try:
        tokenizer.save_pretrained(folder)
        write_text(folder / SHA256, files_sha256(folder))
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise UserError(
            f"cannot write {folder}: {first_line(error)}; free disk space or fix the permissions"
        ) from error


def files_sha256(folder: Path) -> str:
    """Hex sha256 of the files of a tokenizer."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != SHA256)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def read_tokenizer(name: str, folder: Path, remedy: str):
    """The tokenizer in a folder; code in the folder is never run. Raises UserError."""
    try:
        has_code = names_code(folder / "tokenizer_config.json")
        options = {"local_files_only": True, "trust_remote_code": False}
        if names_code(folder / "config.json"):  # of a model, whose class only that code defines
            options["config"] = transformers.PretrainedConfig()
        if not has_code:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # the parsers raise many exception types
        is_there = (folder / "tokenizer.json").exists()
        reason = first_line(error) if is_there else "it has no tokenizer.json"
        raise UserError(
            f"cannot load tokenizer {name} from {folder}: {reason}; {remedy}"
        ) from error
    if has_code:
        raise UserError(
            f"tokenizer {name} comes with code (auto_map), which is never run; choose another one, "
            "or bpe-8192 to train one"
        )
    check_tokenizer(name, tokenizer)
    return tokenizer


def names_code(path: Path) -> bool:
    """Whether a settings file of transformers, if it exists, refers to code beside it."""
    return path.exists() and "auto_map" in json.loads(path.read_text(encoding="utf-8"))


def check_tokenizer(name: str, tokenizer) -> None:
    """Raises UserError for a tokenizer that training cannot use."""
    if not tokenizer.is_fast or end_of_text(tokenizer) is None:
        raise UserError(
            f"tokenizer {name} needs a tokenizer.json and an eos or bos token; choose another one, "
            "or bpe-8192 to train one"
        )
    n_ids = max(tokenizer.get_vocab().values()) + 1
    if n_ids > MAX_ENTRIES:
        raise UserError(
            f"tokenizer {name} has {n_ids} entries, but token shards (uint16) hold at most "
            f"{MAX_ENTRIES}; choose a smaller one, or bpe-32768 to train one"
        )
    if n_ids > len(tokenizer):
        raise UserError(
            f"tokenizer {name} has {len(tokenizer)} entries with ids up to {n_ids - 1}, so some "
            "ids are unused; choose another one, or bpe-32768 to train one"
        )


def download(name: str, seconds: float):
    """The tokenizer of a hub repository. Raises UserError."""
    folder = hub_tokenizer(name, seconds)
    repository = folder.parent.parent  # in the hub client's cache, with the files of all snapshots
    return read_tokenizer(name, folder, f"delete {repository} to download it again")


def training_texts(cfg: DataConfig) -> Iterator[str]:
    """Training documents until they hold BPE_CHARACTERS characters. Raises UserError."""
    n_left = BPE_CHARACTERS
    for record in training_records(cfg):
        if "input_ids" in record:
            raise UserError(
                f"--data.tokenizer {cfg.tokenizer} cannot be trained: data source {cfg.source} "
                "holds token ids, not text; pass the tokenizer that produced them"
            )
        yield record[cfg.text_column]
        n_left -= len(record[cfg.text_column])
        if n_left <= 0:
            return


def train_bpe(name: str, texts: Iterable[str]):
    """A byte-level BPE (arXiv 1508.07909) with N entries, for the name bpe-N. Raises UserError."""
    size = name.removeprefix("bpe-")
    if not size.isdecimal() or not 257 <= int(size) <= MAX_ENTRIES:
        raise UserError(f"--data.tokenizer is {name}; N in bpe-N must be from 257 to {MAX_ENTRIES}")
    print(f"training a tokenizer with {size} entries", flush=True)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    # captions may contain unpaired surrogates, which are not valid Unicode text
    texts = (re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts)
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


# ---- subwords
def subwords(token: str) -> set[str]:
    """Features a vocabulary entry can share with others, after fastText (arXiv 1607.04606): its
    first and last 1 to 4 characters, the lowercase word, and its case.
    """
    word = token.lstrip("\u0120\u2581")  # a leading space in byte-level BPE and SentencePiece
    low = word.lower()
    case = (word != token, word[:1].isupper(), word[1:].isupper(), word.isalpha(), word.isdigit())
    lengths = range(1, min(4, len(low)) + 1)
    starts, ends = {f"^{low[:n]}" for n in lengths}, {f"{low[-n:]}$" for n in lengths}
    return {*starts, *ends, f"={low}", f"case {case}"}


def token_subwords(tokenizer, n_subwords: int, max_per_token: int) -> torch.Tensor:
    """Subwords of each vocabulary entry: int32 (V, max_per_token), padded with -1.

    The n_subwords most common subwords are numbered from 0, by falling frequency.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    entries = [subwords(token) for token in tokens]
    counts = Counter(subword for entry in entries for subword in entry)
    ranked = sorted(counts, key=lambda subword: (-counts[subword], subword))
    ids = {subword: i for i, subword in enumerate(ranked[:n_subwords])}
    table = torch.full((len(entries), max_per_token), -1, dtype=torch.int32)  # (V, max_per_token)
    for row, entry in zip(table, entries, strict=True):
        known = sorted(ids[subword] for subword in entry if subword in ids)
        row[: len(known)] = torch.tensor(known, dtype=torch.int32)
    return table
