"""Generate text or images with a trained model.

    python generate.py NAME --prompt "Once upon a time"        # a run, its folder or a checkpoint
    python generate.py NAME --prompt FILE:story.txt --n 4 --temperature 0.8 --top_p 0.95
    echo "def main" | python generate.py NAME
    python generate.py NAME --prompt "A photo of a frog" --n 16 --guidance 2 --out frog.png

Without NAME the newest run is used.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL.PngImagePlugin import PngInfo

from common.config import UserError, check_positive, run_script
from common.device import record_kernels
from data.images import image_grid, to_uint8
from model import eagerly
from sampling import (
    LoadedRun,
    check_sampling,
    generate_images,
    generate_text,
    load_run,
    numbered,
    resolve_sampling,
)

MAX_N = 10_000
MAX_PROMPT = 10_000_000  # characters; more than any context holds


@dataclass
class Config:
    """What to generate, and how."""

    run: str
    """Name of a run under runs/, a run folder or one of its checkpoints. Omitted: the newest
    run."""
    prompt: str | None = None
    """Text to continue, or description of an image. FILE:path reads it from a file; null reads
    standard input. A final line break is dropped."""
    kind: Literal["auto", "text", "image"] = "auto"
    """What to generate. auto: images if the run can generate them, otherwise text."""
    n: int = 1
    """Number of continuations or images, at most 10,000."""
    max_tokens: int = 200
    """Maximum length of a continuation in tokens; generation also stops when prompt and
    continuation reach the model's seq_len."""
    temperature: float | Literal["auto"] = "auto"
    """Sampling temperature. 0: always the most likely token; 1: the model's own distribution.
    auto: 0.8 for text, the value in the run's config.yaml for images."""
    top_k: int = 0
    """Sample from the k most likely tokens. 0: from all."""
    top_p: float | Literal["auto"] = "auto"
    """Sample from the most likely tokens whose probabilities add up to top_p (nucleus sampling).
    auto: 1 for text, the value in the run's config.yaml for images."""
    guidance: float | Literal["auto"] = "auto"
    """Scale of classifier-free guidance: how strongly images follow the prompt. 0: ignore the
    prompt; 1: no guidance; more than 1: follow it more strongly. auto: the value in the run's
    config.yaml."""
    seed: int = 0
    """Random seed. Continuation or image i uses seed + i, so it does not depend on n."""
    out: str | None = None
    """PNG file to write. If n is more than 1, it is a grid, and each image is also saved in a
    folder of the same name. null: a file in runs/NAME/generated/."""
    device: str = "auto"
    """Device: cpu, cuda, mps, ... auto: the accelerator that PyTorch finds, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 where the hardware computes it faster, otherwise float32."""
    cuda_graphs: bool = True
    """On a CUDA GPU, record the kernels of a decoding step once and replay them for every token.
    No effect on other devices."""


def read_prompt(prompt: str | None) -> str:
    """The prompt, or the contents of FILE:path or of standard input. Raises UserError."""
    place = "--prompt"
    try:
        if prompt is None:
            place = "the prompt from standard input"
            if sys.stdin is None or sys.stdin.isatty():
                raise UserError(
                    "there is no prompt; pass --prompt TEXT, --prompt FILE:path or pipe it"
                )
            prompt = sys.stdin.read(MAX_PROMPT + 1).rstrip("\n")
        elif prompt.startswith("FILE:"):
            place, path = f"--prompt {prompt}", Path(prompt.removeprefix("FILE:"))
            if path.exists() and not path.is_file():
                raise UserError(f"{place} is not a file; pass a text file")
            with path.open(encoding="utf-8") as file:
                prompt = file.read(MAX_PROMPT + 1).rstrip("\n")
        prompt.encode()  # an argument or a pipe may hold bytes that are not UTF-8
    except (OSError, ValueError) as error:
        remedy = "check the path" if isinstance(error, OSError) else "pass UTF-8 text"
        raise UserError(f"{place} cannot be read: {error}; {remedy}") from error
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"{place} has more than {MAX_PROMPT:,} characters; shorten it")
    return prompt


def image_name(prompt: str, seed: int) -> str:
    """The name of the PNG file of an image."""
    name = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]
    name = name.encode()[:200].decode(errors="ignore")  # file systems allow 255 bytes
    return f"{name or 'image'}-{seed}.png"


def image_metadata(**values) -> PngInfo:
    """What a PNG file says about how its image was generated."""
    metadata = PngInfo()
    for key, value in values.items():
        metadata.add_itxt(key, str(value))
    return metadata


def image_path(cfg: Config, run: Path, prompt: str) -> Path:
    """The PNG file to write, after a check that its folder is writable. Raises UserError."""
    path = Path(cfg.out) if cfg.out else run / "generated" / image_name(prompt, cfg.seed)
    if path.suffix != ".png":
        raise UserError(f"--out {path} is not a .png file; end its name in .png")
    folder = path.parent if cfg.n == 1 else path.with_suffix("")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"--out {path} exists and is not a file; choose another path")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {path} cannot be written: {reason}; choose another path") from error
    return path


def recorder(cfg: Config) -> Callable:
    """How decoding steps are repeated, see Llama.decode."""
    return partial(record_kernels, device=torch.device(cfg.device)) if cfg.cuda_graphs else eagerly


def save_images(cfg: Config, loaded: LoadedRun, prompt: str) -> Path:
    """Generate cfg.n images and write them; returns the file to look at. Raises UserError."""
    loaded.format.prompt(prompt)  # raises before anything is written
    path = image_path(cfg, loaded.run, prompt)
    seeds = [cfg.seed + i for i in range(cfg.n)]
    names = ("guidance", "temperature", "top_k", "top_p")
    settings = {name: getattr(cfg, name) for name in names}
    images = to_uint8(
        generate_images(
            loaded.model,
            loaded.vqvae,
            loaded.format,
            [prompt] * cfg.n,
            seeds,
            record=recorder(cfg),
            progress=True,
            **settings,
        )
    )
    for seed, pixels in zip(seeds, images, strict=True):
        metadata = image_metadata(prompt=prompt, seed=seed, **settings, run=loaded.run.name)
        file = path if cfg.n == 1 else path.with_suffix("") / f"{seed}.png"
        image_grid(pixels[None], 1, gap=0).save(file, pnginfo=metadata)
    if cfg.n > 1:
        image_grid(images, min(cfg.n, 8), heading=prompt).save(path)
    return path


def main(cfg: Config) -> list[str] | Path:
    """Print and return continuations, or write images and return the file. Raises UserError."""
    check_positive(cfg, "n", "max_tokens")
    if cfg.n > MAX_N:
        raise UserError(f"--n is {cfg.n}; it must be at most {MAX_N}")
    prompt = read_prompt(cfg.prompt)
    loaded = load_run(cfg.run, cfg)
    makes_images = loaded.vqvae is not None
    if not makes_images and (cfg.kind == "image" or cfg.out):
        raise UserError(
            f"{loaded.run} is a language model and cannot generate images; pass a run of "
            "train_multimodal.py, or omit --kind image and --out"
        )
    if makes_images and cfg.kind != "text":
        resolve_sampling(cfg, loaded)
        path = save_images(cfg, loaded, prompt)
        print(path)
        return path
    cfg.temperature = 0.8 if cfg.temperature == "auto" else cfg.temperature
    cfg.top_p = 1.0 if cfg.top_p == "auto" else cfg.top_p
    check_sampling(cfg)
    texts = generate_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        cfg.n,
        seed=cfg.seed,
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        record=recorder(cfg),
        out=sys.stdout if cfg.n == 1 else None,
    )
    print("" if cfg.n == 1 else "\n".join(numbered([prompt] * cfg.n, texts)))
    return texts


if __name__ == "__main__":
    run_script(main, Config, prog="generate.py", description=__doc__)
