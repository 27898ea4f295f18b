"""Tokenizers: from the hub, from a local folder, or a byte-level BPE trained on the data source."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import tokenizers
import torch
import transformers

from common import UserError
from data.text import (
    DataConfig,
    digest,
    documents,
    end_of_text,
    held_out,
    in_validation,
    reason,
    request,
    revisions,
)
from model import SPELLING

BPE_CHARACTERS = 50_000_000  # text a BPE is trained on; more changes little and takes minutes


def load_tokenizer(
    cfg, corpus: str | dict | None = None, texts: Callable[[], Iterator[str]] | None = None
):
    """The tokenizer that cfg names, kept in the cache so that hub or training is needed once. Raises UserError.

    A BPE is trained on `texts`, of which `corpus` says what they are; without, on the training documents of a DataConfig.
    """
    name, cache = cfg.tokenizer, Path(cfg.cache) / "tokenizers"
    if name.startswith("bpe-"):
        folder = cache / f"{name}-{digest(corpus or request(cfg, 'train', name))}"
        if not folder.is_dir():
            save(train_bpe(name, texts() if texts else training_texts(cfg)), folder)
    else:
        folder = Path(name) if Path(name).is_dir() else cache / name.replace("/", "--")
    try:
        if not folder.is_dir():
            huggingface_hub.HfApi().model_info(
                name
            )  # fails at once where from_pretrained would retry for minutes
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name
        )
    except Exception as error:  # the hub client and the parsers raise dozens of kinds
        raise UserError(
            f"cannot load tokenizer {name}: {reason(error)}; without network give a local folder "
            "with tokenizer.json, or bpe-8192 to train one, or try --config configs/llm_demo.yaml"
        ) from error
    if not tokenizer.is_fast or end_of_text(tokenizer) is None:
        raise UserError(f"tokenizer {name} must have a tokenizer.json and an eos or bos token")
    if not folder.is_dir():
        save(tokenizer, folder)
    return tokenizer


def save(tokenizer, folder: Path) -> None:
    tmp = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    tokenizer.save_pretrained(tmp)
    tmp.rename(folder)


def training_texts(cfg: DataConfig) -> Iterator[str]:
    """Training documents of a source, as many as a BPE is trained on. Raises UserError."""
    left = BPE_CHARACTERS
    for row in documents(
        cfg.source, cfg.text_column, revisions(request(cfg, "train", cfg.tokenizer))
    ):
        if "input_ids" in row:
            raise UserError(
                f"--data.tokenizer {cfg.tokenizer}: data source {cfg.source} holds ids, not text"
            )
        if not in_validation(row, held_out(cfg)):
            yield row[cfg.text_column]
            left -= len(row[cfg.text_column])
        if left <= 0:
            return


def train_bpe(name: str, texts: Iterator[str]):
    """A byte-level BPE (arXiv 1508.07909) of as many entries as its name says. Raises UserError."""
    size = name.removeprefix("bpe-")
    if not size.isdigit() or not 257 <= int(size) <= 65_536:
        raise UserError(
            f"--data.tokenizer {name}: the size must be from 257 to 65536, as in bpe-8192"
        )
    print(f"training a tokenizer of {size} entries", flush=True)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=int(size),
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def affixes(token: str) -> set[str]:
    """What the spelling of a vocabulary entry shares with others: beginnings, ends, the word without its case, its case."""
    word = token.lstrip(
        "\u0120\u2581"
    )  # how byte-level BPE and SentencePiece write the space before a word
    low = word.lower()
    case = (word != token, word[:1].isupper(), word[1:].isupper(), word.isalpha(), word.isdigit())
    ends = {part for k in range(1, 5) if k <= len(low) for part in (f"^{low[:k]}", f"{low[-k:]}$")}
    return {*ends, f"={low}", f"case {case}"}


def spelling(tokenizer, n: int) -> torch.Tensor:
    """For each entry of the vocabulary which of the n commonest affixes it has, (V, SPELLING) of 0 to n - 1, -1 for none."""
    entries = [affixes(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    counts = Counter(affix for entry in entries for affix in entry)
    number = {
        affix: i
        for i, affix in enumerate(sorted(counts, key=lambda affix: (-counts[affix], affix))[:n])
    }
    found = torch.full((len(entries), SPELLING), -1, dtype=torch.int32)
    for row, entry in zip(found, entries):
        known = sorted(number[affix] for affix in entry if affix in number)
        row[: len(known)] = torch.tensor(known, dtype=torch.int32)
    return found
