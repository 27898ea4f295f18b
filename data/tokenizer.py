"""Tokenizers: from the hub, from a local folder, or a byte-level BPE trained on the data source."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import tokenizers
import torch
import transformers

from common.config import UserError
from data.source import digest, documents, first_line, hub_revisions, in_validation
from data.text import DataConfig, end_of_text, holdout_fraction, token_request

BPE_CHARACTERS = 50_000_000  # text to train a BPE on; more changes little and takes minutes


def load_tokenizer(
    cfg, corpus: str | None = None, texts: Callable[[], Iterator[str]] | None = None
):
    """The tokenizer cfg.tokenizer, cached so that downloading or training happens once.

    A BPE is trained on texts(), identified by `corpus`; if both are None, on the training documents
    of the DataConfig `cfg`. Raises UserError.
    """
    name, cache = cfg.tokenizer, Path(cfg.cache) / "tokenizers"
    if name.startswith("bpe-"):
        folder = cache / f"{name}-{digest(corpus or token_request(cfg, 'train', name))}"
        if not folder.is_dir():
            save(train_bpe(name, texts() if texts else training_texts(cfg)), folder)
    else:
        folder = Path(name) if Path(name).is_dir() else cache / name.replace("/", "--")
    try:
        if not folder.is_dir():
            # fails at once where from_pretrained would retry for minutes
            huggingface_hub.HfApi().model_info(name)
        location = str(folder) if folder.is_dir() else name
        tokenizer = transformers.AutoTokenizer.from_pretrained(location)
    except Exception as error:  # the hub client and the parsers raise many exception types
        raise UserError(
            f"cannot load tokenizer {name}: {first_line(error)}; set --data.tokenizer to a local "
            "folder with tokenizer.json, or to bpe-8192 to train one"
        ) from error
    if not tokenizer.is_fast or end_of_text(tokenizer) is None:
        raise UserError(
            f"tokenizer {name} needs a tokenizer.json and an eos or bos token; pass another one, "
            "or bpe-8192 to train one"
        )
    if not folder.is_dir():
        save(tokenizer, folder)
    return tokenizer


def save(tokenizer, folder: Path) -> None:
    """Write a tokenizer under a temporary name and rename it, so it is complete or absent."""
    tmp = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    tokenizer.save_pretrained(tmp)
    tmp.rename(folder)


def training_texts(cfg: DataConfig) -> Iterator[str]:
    """Training documents until they hold BPE_CHARACTERS characters. Raises UserError."""
    n_left = BPE_CHARACTERS
    revisions = hub_revisions(token_request(cfg, "train", cfg.tokenizer)["hub_datasets"])
    for record in documents(cfg.source, cfg.text_column, revisions):
        if "input_ids" in record:
            raise UserError(
                f"--data.tokenizer {cfg.tokenizer} cannot be trained: data source {cfg.source} "
                "holds token ids, not text; pass the tokenizer that made them"
            )
        if not in_validation(record, holdout_fraction(cfg)):
            yield record[cfg.text_column]
            n_left -= len(record[cfg.text_column])
        if n_left <= 0:
            return


def train_bpe(name: str, texts: Iterator[str]):
    """A byte-level BPE (arXiv 1508.07909) with N entries, for the name bpe-N. Raises UserError."""
    size = name.removeprefix("bpe-")
    if not size.isdigit() or not 257 <= int(size) <= 65_536:
        raise UserError(f"--data.tokenizer is {name}; N in bpe-N must be from 257 to 65536")
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
