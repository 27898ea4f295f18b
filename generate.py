"""Write text or draw pictures with a trained model.

    python generate.py NAME --prompt "Once upon a time"           # NAME under runs/, a run folder or a checkpoint
    python generate.py NAME --prompt FILE:story.txt --n 4 --temperature 0.8 --top_p 0.95
    echo "def main" | python generate.py NAME
    python generate.py NAME --prompt "A photo of a frog" --n 16 --guidance 2 --out frog.png

Without NAME it is the newest run.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL.PngImagePlugin import PngInfo
from tokenizers.decoders import DecodeStream
from torch import Tensor
from tqdm import tqdm

from common import (
    UserError,
    check_not_negative,
    check_positive,
    find_run,
    load_checkpoint,
    resolve_device,
    run_script,
    write_text,
)
from data.images import sheet, to_uint8
from data.stream import Stream
from data.text import end_of_text
from model import KVCache, Llama, ModelConfig, sample
from vqvae import VQVAE, VQVAEConfig


@dataclass
class Config:
    """What to write or draw, and how."""

    run: str
    """Name of a run under runs/, a run folder, or one of its checkpoints; none: the newest run."""
    prompt: str | None = None
    """Text to continue, or what to draw; FILE:path reads it from a file, and without it standard input is read; a last
    line break of either is dropped."""
    kind: Literal["auto", "text", "image"] = "auto"
    """What to make; auto: pictures if the run can, else text."""
    n: int = 1
    """How many continuations or pictures."""
    max_tokens: int = 200
    """Longest continuation, in tokens; the model's seq_len ends it too."""
    temperature: float | Literal["auto"] = "auto"
    """0 always takes the likeliest token, 1 samples from the model's own distribution; auto: 0.8 for text, for pictures
    as in the run's config.yaml."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 from all."""
    top_p: float | Literal["auto"] = "auto"
    """Sample from the likeliest tokens that together reach this probability; auto: 1 for text, as temperature for pictures."""
    guidance: float | Literal["auto"] = "auto"
    """How far pictures follow the prompt: 1 as the model learned it, more goes away from pictures without a prompt, 0
    does not look at it; auto: as in the run's config.yaml."""
    seed: int = 0
    """Continuation or picture i draws with seed + i, so it does not depend on n."""
    out: str | None = None
    """PNG file for the picture, or for a sheet of the n, which then lie in a folder of that name; null: in the run's
    folder drawn/."""
    device: str = "auto"
    """cpu, cuda, ...; auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto: bfloat16 where the device has it."""


@dataclass
class Loaded:
    """A run's model with what belongs to it; vqvae and stream are None unless it draws."""

    run: Path
    config: dict
    model: Llama
    tokenizer: object
    vqvae: VQVAE | None = None
    stream: Stream | None = None


def load_run(name: str, cfg) -> Loaded:
    """A text or multimodal run (name, folder, or checkpoint folder) on cfg.device. Raises UserError."""
    import transformers

    run, folder, config = find_run(name)
    if "images" in config:
        raise UserError(
            f"{run} is a VQ-VAE, which neither writes nor draws by itself: name a run of train_llm.py or "
            f"train_multimodal.py --vqvae {run.name}"
        )
    device = resolve_device(cfg)
    model = Llama(ModelConfig(**config["model"]), compute_dtype=getattr(torch, cfg.dtype))
    load_checkpoint(folder, model)
    loaded = Loaded(
        run,
        config,
        model.fold().to(device).eval(),
        transformers.AutoTokenizer.from_pretrained(run / "tokenizer"),
    )
    if "vqvae" in config:
        loaded.vqvae = load_vqvae(str(run / "vqvae"), device, model.compute_dtype)
        loaded.stream = Stream(loaded.tokenizer, loaded.vqvae.config, model.config)
    return loaded


def load_vqvae(name: str, device: torch.device, dtype: torch.dtype) -> VQVAE:
    """The visual tokenizer of a run of train_vqvae.py. Raises UserError."""
    run, folder, config = find_run(name)
    if "images" not in config:
        raise UserError(f"{run} is no run of train_vqvae.py: name one that is as --vqvae")
    vqvae = VQVAE(VQVAEConfig(**config["model"]), compute_dtype=dtype)
    load_checkpoint(folder, vqvae)
    return vqvae.to(device).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------- text
def continuations(
    model: Llama,
    tokenizer,
    prompt: str,
    n: int,
    *,
    seed: int,
    max_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    out=None,
) -> list[str]:
    """n continuations of a prompt, each ended by end-of-text or max_tokens; prompt and first go to `out` as it grows.

    Characters are written once they are whole; bytes that make none are dropped. Raises UserError.
    """
    eot, seq_len = end_of_text(tokenizer), model.config.seq_len
    ids = [eot, *tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]]
    if len(ids) > seq_len:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model's context {seq_len}: shorten it"
        )
    if out:
        print(prompt, end="", flush=True, file=out)
    device = model.embed.weight.device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    streams = [DecodeStream(skip_special_tokens=True) for _ in range(n)]
    texts, ended = [""] * n, [False] * n
    for tokens in model.generate(
        torch.tensor([ids] * n, device=device),
        max_tokens,
        generators=generators,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        rows=slice(len(tokenizer)),
    ):
        for i, token in enumerate(tokens.tolist()):
            ended[i] = ended[i] or token == eot
            if not ended[i]:
                piece = (streams[i].step(tokenizer.backend_tokenizer, token) or "").replace(
                    "\ufffd", ""
                )
                texts[i] += piece
                if out and i == 0:
                    print(piece, end="", flush=True, file=out)
        if all(ended):
            break
    return texts


def write_samples(
    path: Path, model: Llama, tokenizer, prompts: list[str], max_tokens: int, seed: int
) -> None:
    """Write each prompt with a sampled continuation to a file."""
    texts = [
        continuations(
            model, tokenizer, prompt, 1, seed=seed, max_tokens=max_tokens, temperature=0.8
        )[0]
        for prompt in prompts
    ]
    write_text(
        path,
        "\n".join(
            f"--- {i}/{len(texts)}\n{p}{text}" for i, (p, text) in enumerate(zip(prompts, texts), 1)
        )
        + "\n",
    )


# ------------------------------------------------------------------------------------------------------- pictures
@torch.no_grad()
def draw_codes(
    model: Llama,
    stream: Stream,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    tick: Callable[[], object] = lambda: None,
) -> Tensor:
    """Codes (B, image_tokens) of a picture for each of B prompts of one length: visual words and nothing else.

    Picture i draws from seeds[i] alone. With guidance other than 1 the null prompt is continued beside each prompt, in
    the same batch, and log-probabilities are null + guidance * (prompt - null) (arXiv 2207.12598).
    """
    B, device = len(prompts), model.embed.weight.device
    halves = [prompts, [stream.null(prompt) for prompt in prompts]] if guidance != 1 else [prompts]
    tokens = torch.tensor(
        [prompt for half in halves for prompt in half], device=device
    )  # (B or 2B, T)
    uniforms = torch.stack(
        [torch.rand(stream.image_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    uniforms, n = uniforms.to(device), tokens.shape[1]
    positions, cells = stream.layout(
        torch.full((len(tokens),), n - 1, device=device), n + stream.image_tokens
    )
    cache = KVCache(model.config, len(tokens), n + stream.image_tokens, device, model.compute_dtype)
    codes = torch.empty(B, stream.image_tokens, dtype=torch.long, device=device)
    for i in range(stream.image_tokens):
        seen = slice(cache.length, cache.length + tokens.shape[1])
        hidden = model.hidden(tokens, cache, (positions[:, seen], cells[:, seen]))[
            :, -1
        ]  # (B or 2B, C)
        logits = model.head(hidden, stream.code_rows)  # (B or 2B, K)
        if guidance != 1:
            told, null = logits.log_softmax(-1).chunk(2)
            logits = null + guidance * (told - null)
        codes[:, i] = sample(logits, uniforms[:, i], temperature, top_k, top_p)
        tokens = (codes[:, i : i + 1] + stream.first_code).repeat(len(halves), 1)
        tick()
    return codes


def draw(
    model: Llama,
    vqvae: VQVAE,
    stream: Stream,
    captions: list[str],
    seeds: list[int],
    *,
    guidance: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch: int = 64,
    cut: bool = False,
    bar: bool = False,
) -> Tensor:
    """A picture for each caption, (N, 3, S, S) in [-1, 1]. Raises UserError for one too long, unless it is to be cut."""
    prompts = [stream.prompt(caption, cut) for caption in captions]
    codes = torch.empty(
        len(prompts), stream.image_tokens, dtype=torch.long, device=model.embed.weight.device
    )
    order = sorted(
        range(len(prompts)), key=lambda i: len(prompts[i])
    )  # prompts of one length make a batch
    groups = []
    for i in order:
        if not groups or len(groups[-1]) == batch or len(prompts[groups[-1][0]]) != len(prompts[i]):
            groups.append([])
        groups[-1].append(i)
    with tqdm(
        total=len(groups) * stream.image_tokens,
        desc="drawing",
        unit="word",
        leave=False,
        disable=not (bar and sys.stderr.isatty()),
    ) as progress:
        for group in groups:
            codes[group] = draw_codes(
                model,
                stream,
                [prompts[i] for i in group],
                [seeds[i] for i in group],
                guidance=guidance,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                tick=progress.update,
            )
    grids = codes.view(-1, stream.grid, stream.grid)
    return torch.cat([vqvae.decode(part) for part in grids.split(batch)])


def resolve_sampling(cfg, loaded: Loaded) -> None:
    """Fill in how to draw by what the run's config says. Raises UserError."""
    for name in ("guidance", "temperature", "top_p"):
        if getattr(cfg, name) == "auto":
            setattr(cfg, name, loaded.config[name])
    check_sampling(cfg)
    check_not_negative(cfg, "guidance")


def check_sampling(cfg) -> None:
    if cfg.temperature < 0 or cfg.top_k < 0 or not 0 < cfg.top_p <= 1:
        raise UserError(
            f"temperature {cfg.temperature}, top_k {cfg.top_k}, top_p {cfg.top_p}: the first two must not be "
            "negative, top_p must lie in (0, 1]"
        )


def picture_path(cfg: Config, run: Path, prompt: str) -> Path:
    """Where the picture goes, a file that can be written. Raises UserError."""
    name = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]
    path = Path(cfg.out) if cfg.out else run / "drawn" / f"{name or 'picture'}-{cfg.seed}.png"
    if path.suffix != ".png":
        raise UserError(f"--out {path}: give the name of a .png file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from error
    return path


def draw_files(cfg: Config, loaded: Loaded, prompt: str) -> Path:
    """Draw cfg.n pictures and write them; return the file to look at. Raises UserError."""
    loaded.stream.prompt(prompt)  # raises before anything is written
    path = picture_path(cfg, loaded.run, prompt)
    seeds = [cfg.seed + i for i in range(cfg.n)]
    pictures = to_uint8(
        draw(
            loaded.model,
            loaded.vqvae,
            loaded.stream,
            [prompt] * cfg.n,
            seeds,
            guidance=cfg.guidance,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            bar=True,
        )
    )
    for seed, pixels in zip(seeds, pictures):
        notes = PngInfo()
        for key, value in {
            "prompt": prompt,
            "seed": seed,
            "guidance": cfg.guidance,
            "temperature": cfg.temperature,
            "top_k": cfg.top_k,
            "top_p": cfg.top_p,
            "run": loaded.run.name,
        }.items():
            notes.add_itxt(key, str(value))
        file = path if cfg.n == 1 else path.with_suffix("") / f"{seed}.png"
        file.parent.mkdir(exist_ok=True)
        sheet(pixels[None], 1, gap=0).save(file, pnginfo=notes)
    if cfg.n > 1:
        sheet(pictures, min(cfg.n, 8), heading=prompt).save(path)
    return path


def read_prompt(prompt: str | None) -> str:
    """The prompt itself, the contents of FILE:path, or of standard input. Raises UserError."""
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError(
                "no prompt: give --prompt TEXT, --prompt FILE:path, or text on standard input"
            )
        return sys.stdin.read().rstrip("\n")
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt {prompt} cannot be read: {error}") from error


def main(cfg: Config) -> list[str] | Path:
    """Print and return continuations, or draw and return the file. Raises UserError."""
    check_positive(cfg, "n", "max_tokens")
    prompt = read_prompt(cfg.prompt)
    loaded = load_run(cfg.run, cfg)
    draws = loaded.vqvae is not None
    if not draws and (cfg.kind == "image" or cfg.out):
        raise UserError(
            f"{loaded.run} is a language model and cannot draw: name a run of train_multimodal.py, or leave "
            "--kind image and --out away"
        )
    if draws and cfg.kind != "text":
        resolve_sampling(cfg, loaded)
        path = draw_files(cfg, loaded, prompt)
        print(path)
        return path
    cfg.temperature, cfg.top_p = (
        default if value == "auto" else value
        for value, default in ((cfg.temperature, 0.8), (cfg.top_p, 1.0))
    )
    check_sampling(cfg)
    out = sys.stdout if cfg.n == 1 else None
    texts = continuations(
        loaded.model,
        loaded.tokenizer,
        prompt,
        cfg.n,
        seed=cfg.seed,
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        out=out,
    )
    if out:
        print()
    for i, text in enumerate(texts if not out else [], 1):
        print(f"--- {i}/{cfg.n}\n{prompt}{text}")
    return texts


if __name__ == "__main__":
    run_script(Config, main)
