"""Write text with a trained model.

    python generate.py NAME --prompt "Once upon a time"           # NAME under runs/, a run folder or a checkpoint
    python generate.py NAME --prompt FILE:story.txt --n 4 --temperature 0.8 --top_p 0.95
    echo "def main" | python generate.py NAME
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from tokenizers.decoders import DecodeStream

from common import RUNS, UserError, check_positive, checkpoints, load_checkpoint, resolve_device, run_script, write_text
from data.text import end_of_text
from model import Llama, ModelConfig


@dataclass
class Config:
    """What to write, and how."""
    run: str
    """Name of a run under runs/, a run folder, or one of its checkpoints."""
    prompt: str | None = None
    """Text to continue; FILE:path reads it from a file, and without it standard input is read; a last line
    break of either is dropped."""
    n: int = 1
    """How many continuations."""
    max_tokens: int = 200
    """Longest continuation, in tokens; the model's seq_len ends it too."""
    temperature: float = 0.8
    """0 always takes the likeliest token, 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together reach this probability."""
    seed: int = 0
    """Continuation i draws with seed + i, so it does not depend on n."""
    device: str = "auto"
    """cpu, cuda, ...; auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto: bfloat16 where the device has it."""


def load_run(name: str, cfg) -> tuple[Llama, object]:
    """Model and tokenizer of a run (name, folder, or checkpoint folder). Raises UserError."""
    import transformers
    path = next((p for p in (Path(name), RUNS / name) if p.is_dir()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in RUNS.glob("*") if p.is_dir())) or "none"
        raise UserError(f"there is no run {name!r}; the runs here are: {known}")
    run = path if (path / "config.yaml").exists() else path.parent.parent
    folder = path if run != path else [None, *checkpoints(run)][-1]
    if folder is None or not (run / "config.yaml").exists():
        raise UserError(f"{path} has no checkpoint: give a run folder or one of its checkpoints")
    device = resolve_device(cfg)
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    model = Llama(ModelConfig(**config), compute_dtype=getattr(torch, cfg.dtype))
    load_checkpoint(folder, model)
    return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(run / "tokenizer")


def continuations(model: Llama, tokenizer, prompt: str, n: int, *, seed: int, max_tokens: int, temperature: float,
                  top_k: int = 0, top_p: float = 1.0, out=None) -> list[str]:
    """n continuations of a prompt, each ended by end-of-text or max_tokens; prompt and first go to `out` as it grows.

    Characters are written once they are whole; bytes that make none are dropped. Raises UserError.
    """
    eot, seq_len = end_of_text(tokenizer), model.config.seq_len
    ids = [eot, *tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]]
    if len(ids) > seq_len:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context {seq_len}: shorten it")
    if out:
        print(prompt, end="", flush=True, file=out)
    device = model.embed.weight.device
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(n)]
    streams = [DecodeStream(skip_special_tokens=True) for _ in range(n)]
    texts, ended = [""] * n, [False] * n
    for tokens in model.generate(torch.tensor([ids] * n, device=device), max_tokens, generators=generators,
                                 temperature=temperature, top_k=top_k, top_p=top_p):
        for i, token in enumerate(tokens.tolist()):
            ended[i] = ended[i] or token == eot
            if not ended[i] and token < len(tokenizer):
                piece = (streams[i].step(tokenizer.backend_tokenizer, token) or "").replace("\ufffd", "")
                texts[i] += piece
                if out and i == 0:
                    print(piece, end="", flush=True, file=out)
        if all(ended):
            break
    return texts


def write_samples(path: Path, model: Llama, tokenizer, prompts: list[str], max_tokens: int, seed: int) -> None:
    """Write each prompt with a sampled continuation to a file."""
    texts = [continuations(model, tokenizer, prompt, 1, seed=seed, max_tokens=max_tokens, temperature=0.8)[0]
             for prompt in prompts]
    write_text(path, "\n".join(f"--- {i}/{len(texts)}\n{p}{text}" for i, (p, text) in enumerate(zip(prompts, texts), 1)) + "\n")


def read_prompt(prompt: str | None) -> str:
    """The prompt itself, the contents of FILE:path, or of standard input. Raises UserError."""
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("no prompt: give --prompt TEXT, --prompt FILE:path, or text on standard input")
        return sys.stdin.read().rstrip("\n")
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt {prompt} cannot be read: {error}") from error


def main(cfg: Config) -> list[str]:
    """Print and return the continuations. Raises UserError."""
    check_positive(cfg, "n", "max_tokens")
    if cfg.temperature < 0 or cfg.top_k < 0 or not 0 < cfg.top_p <= 1:
        raise UserError(f"temperature {cfg.temperature}, top_k {cfg.top_k}, top_p {cfg.top_p}: the first two must not be "
                        "negative, top_p must lie in (0, 1]")
    prompt = read_prompt(cfg.prompt)
    model, tokenizer = load_run(cfg.run, cfg)
    out = sys.stdout if cfg.n == 1 else None
    texts = continuations(model, tokenizer, prompt, cfg.n, seed=cfg.seed, max_tokens=cfg.max_tokens,
                          temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, out=out)
    if out:
        print()
    for i, text in enumerate(texts if not out else [], 1):
        print(f"--- {i}/{cfg.n}\n{prompt}{text}")
    return texts


if __name__ == "__main__":
    run_script(Config, main)
