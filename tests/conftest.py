import os

os.environ["OMP_NUM_THREADS"] = "1"  # models here are so small that a second thread only costs time

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = {
    "tokens": "2560",
    "batch_tokens": "128",
    "eval_tokens": "256",
    "sample_tokens": "4",
    "device": "cpu",
    "data.source": "corpus.jsonl",
    "data.tokenizer": "bpe-300",
    "data.val_tokens": "1000",
    "data.val_fraction": "0.2",
    "model.vocab_size": "300",
    "model.d_model": "32",
    "model.n_layers": "2",
    "model.n_heads": "4",
    "model.n_kv_heads": "2",
    "model.d_ff": "64",
    "model.seq_len": "32",
}


def sentences(n: int, seed: int = 0) -> list[str]:
    """n different little documents with umlauts, emoji and line breaks in them."""
    rng = random.Random(seed)
    nouns, verbs = (
        ["a fox", "the Bär", "one 🦊", "my sister", "no frog"],
        ["sees", "eats", "über-likes", "draws"],
    )
    return [
        f"{i}: "
        + ".\n".join(
            f"{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)}"
            for _ in range(rng.randint(1, 9))
        )
        for i in range(n)
    ]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder to work in, with corpus.jsonl of 300 documents, some 15,000 tokens."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(300)))
    return tmp_path


VQVAE = {
    "images": "320",
    "batch_images": "8",
    "eval_images": "16",
    "device": "cpu",
    "data.source": "shapes",
    "probe_steps": "0",
    "model.image_size": "32",
    "model.downsample": "4",
    "model.codebook_size": "16",
    "model.width": "16",
    "model.n_blocks": "1",
}
MULTIMODAL = {
    "sequences": "64",
    "batch_sequences": "8",
    "eval_sequences": "8",
    "sample_n": "2",
    "device": "cpu",
    "data.source": "shapes",
    "data.tokenizer": "bpe-300",
    "model.vocab_size": "318",
    "model.d_model": "32",
    "model.n_layers": "2",
    "model.n_heads": "2",
    "model.n_kv_heads": "1",
    "model.d_ff": "64",
    "model.seq_len": "100",
    "model.cells": "64",
}


def flags_of(module, **changes) -> list[str]:
    """The command line of a tiny run of a script; a changed setting is named with __ for the dot."""
    tiny = {"train_llm": TINY, "train_vqvae": VQVAE, "train_multimodal": MULTIMODAL}[
        module.__name__
    ]
    settings = tiny | {key.replace("__", "."): str(value) for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in settings.items()]


def train_stage(module, **changes) -> dict:
    """Train in this process."""
    from common import load_config

    return module.main(load_config(module.Config, flags_of(module, **changes)))


def flags(**changes) -> list[str]:
    import train_llm

    return flags_of(train_llm, **changes)


def train(**changes) -> dict:
    import train_llm

    return train_stage(train_llm, **changes)


def script(name: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *args],
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )
