import os

os.environ["OMP_NUM_THREADS"] = "1"  # models here are so small that a second thread only costs time

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = {"tokens": "2560", "batch_tokens": "128", "eval_tokens": "256", "sample_tokens": "4", "device": "cpu",
        "data.source": "corpus.jsonl", "data.tokenizer": "bpe-300", "data.val_tokens": "1000", "data.val_fraction": "0.2",
        "model.vocab_size": "300", "model.d_model": "32", "model.n_layers": "2", "model.n_heads": "4",
        "model.n_kv_heads": "2", "model.d_ff": "64", "model.seq_len": "32"}


def sentences(n: int, seed: int = 0) -> list[str]:
    """n different little documents with umlauts, emoji and line breaks in them."""
    rng = random.Random(seed)
    nouns, verbs = ["a fox", "the Bär", "one 🦊", "my sister", "no frog"], ["sees", "eats", "über-likes", "draws"]
    return [f"{i}: " + ".\n".join(f"{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)}" for _ in range(rng.randint(1, 9)))
            for i in range(n)]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder to work in, with corpus.jsonl of 300 documents, some 15,000 tokens."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(300)))
    return tmp_path


def flags(**changes) -> list[str]:
    """The command line of a tiny run; a changed setting is named with __ for the dot."""
    settings = TINY | {key.replace("__", "."): str(value) for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in settings.items()]


def train(**changes) -> dict:
    """Train in this process."""
    import train_llm
    from common import load_config
    return train_llm.main(load_config(train_llm.Config, flags(**changes)))


def script(name: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would."""
    return subprocess.run([sys.executable, str(ROOT / name), *args], capture_output=True, text=True, timeout=300, **kwargs)
