"""What several test files share: tiny settings, a small corpus, and running a stage or a script."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.config import load_config
from common.metrics import read_metrics
from common.run import checkpoints

ROOT = Path(__file__).parent.parent
STAGES = ("llm", "vqvae", "multimodal")

TINY = {  # fp32, because bf16 takes twice the time where matrices are this small
    "train_llm": {
        "tokens": "2560",
        "batch_tokens": "128",
        "eval_tokens": "256",
        "sample_tokens": "4",
        "device": "cpu",
        "dtype": "float32",
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
    },
    "train_vqvae": {
        "images": "320",
        "batch_images": "8",
        "eval_images": "16",
        "device": "cpu",
        "dtype": "float32",
        "data.source": "shapes",
        "probe_steps": "0",
        "model.image_size": "32",
        "model.downsample": "4",
        "model.codebook_size": "16",
        "model.width": "16",
        "model.n_blocks": "1",
    },
    "train_multimodal": {
        "sequences": "64",
        "batch_sequences": "8",
        "eval_sequences": "8",
        "sample_n": "2",
        "device": "cpu",
        "dtype": "float32",
        "data.source": "shapes",
        "data.tokenizer": "bpe-300",
        "model.vocab_size": "318",
        "model.d_model": "32",
        "model.n_layers": "2",
        "model.n_heads": "2",
        "model.n_kv_heads": "1",
        "model.d_ff": "64",
        "model.seq_len": "100",
        "model.n_image_positions": "64",
    },
}


MODULES = {stage: importlib.import_module(f"train_{stage}") for stage in STAGES}


def sentences(n: int, seed: int = 0) -> list[str]:
    """n different short documents with umlauts, emoji and line breaks in them."""
    rng = random.Random(seed)
    nouns = ["a fox", "the Bär", "one 🦊", "my sister", "no frog"]
    verbs = ["sees", "eats", "über-likes", "draws"]

    def sentence() -> str:
        return f"{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)}"

    return [f"{i}: " + ".\n".join(sentence() for _ in range(rng.randint(1, 9))) for i in range(n)]


def write_jsonl(path: str, texts: list[str]) -> None:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def flags_of(module, **changes) -> list[str]:
    """The command line of a tiny run; `__` in the name of a changed setting stands for a dot."""
    renamed = {key.replace("__", "."): str(value) for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in (TINY[module.__name__] | renamed).items()]


def train_stage(module, **changes) -> dict:
    """Train a stage in this process and return its summary."""
    return module.main(load_config(module.Config, flags_of(module, **changes)))


def flags(**changes) -> list[str]:
    return flags_of(MODULES["llm"], **changes)


def train(**changes) -> dict:
    return train_stage(MODULES["llm"], **changes)


def script(name: str, *args: str, env=os.environ, **kwargs) -> subprocess.CompletedProcess:
    """Run one of the project's scripts, a module after -m or code after -c, as a user would."""
    program = [name] if name in ("-m", "-c") else [str(ROOT / name)]
    env = env | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *program, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, **kwargs)


def noisy(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every weight random, so that nothing is zero by initialization."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    return model


def weights(run: str) -> dict[str, torch.Tensor]:
    """The weights in the newest checkpoint of runs/RUN."""
    return load_file(checkpoints(Path("runs") / run)[-1] / "model.safetensors")


def losses(run: str) -> list[tuple]:
    """(step, loss, gradient norm) of every training step of runs/RUN."""
    rows = read_metrics(Path("runs") / run)
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
