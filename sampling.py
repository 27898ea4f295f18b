"""Text continuations and images from a trained run."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
import transformers
from tokenizers.decoders import DecodeStream
from torch import Tensor
from tqdm import tqdm

from common.config import UserError, build_from_saved, check_not_negative, first_line
from common.device import resolve_device
from common.disk import file_sha256, write_text
from common.run import find_run, load_checkpoint
from data.source import digest
from data.text import encode, end_of_text
from model import Llama, ModelConfig, eagerly
from multimodal import ImageTextFormat
from vqvae import VQVAE, VQVAEConfig


# ---- loading
@dataclass
class LoadedRun:
    """A run's model and what belongs to it; vqvae and format are None for a language model."""

    run: Path
    config: dict
    model: Llama
    tokenizer: transformers.PreTrainedTokenizerFast
    vqvae: VQVAE | None = None
    format: ImageTextFormat | None = None


def load_run(name: str, cfg) -> LoadedRun:
    """A language-model or multimodal run (name, folder or checkpoint) on cfg.device.

    Raises UserError.
    """
    run, checkpoint, config = find_run(name)
    if config["stage"] == "vqvae":
        raise UserError(
            f"{run} is a VQ-VAE run, which cannot generate by itself; pass a run of train_llm.py "
            f"or of train_multimodal.py --vqvae {run.name}"
        )
    device = resolve_device(cfg)
    shape = build_from_saved(ModelConfig, config.get("model"), run)
    model = Llama(shape, compute_dtype=getattr(torch, cfg.dtype))
    state = load_checkpoint(checkpoint, model)
    model = model.for_inference().to(device)
    tokenizer = saved_tokenizer(run, state)
    loaded = LoadedRun(run, config, model, tokenizer)
    if config["stage"] == "multimodal":
        loaded.vqvae = load_vqvae(str(run / "vqvae"), device, model.compute_dtype)
        weights = find_run(str(run / "vqvae"))[1] / "model.safetensors"
        if file_sha256(weights) != state["inputs"].get("vqvae"):
            raise UserError(
                f"{run / 'vqvae'} is not the VQ-VAE that {run} was trained with; restore the "
                "original folder, or train again under another --run"
            )
        loaded.format = ImageTextFormat(tokenizer, loaded.vqvae.config, model.config)
    return loaded


def saved_tokenizer(run: Path, state: dict):
    """The tokenizer in a run folder; `state` is the state of one of the run's checkpoints.

    Raises UserError if it is missing, damaged or not the one that the checkpoint was trained with.
    """
    folder = run / "tokenizer"
    remedy = "restore the original folder, or train again under another --run"
    try:
        if not folder.is_dir():
            raise FileNotFoundError("there is no such folder")
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        found = digest(tokenizer.backend_tokenizer.to_str())
        expected = state.get("inputs", {}).get("tokenizer")
    except Exception as error:  # the parsers raise many exception types
        raise UserError(f"{folder} is damaged ({first_line(error)}); {remedy}") from error
    if found != expected or end_of_text(tokenizer) is None:
        raise UserError(f"{folder} is not the tokenizer that {run} was trained with; {remedy}")
    return tokenizer


def load_vqvae(name: str, device: torch.device, dtype: torch.dtype) -> VQVAE:
    """The frozen VQ-VAE of a train_vqvae.py run, with weights in dtype. Raises UserError."""
    run, checkpoint, config = find_run(name)
    if config["stage"] != "vqvae":
        raise UserError(f"{run} is not a train_vqvae.py run; pass one with --vqvae")
    vqvae = VQVAE(build_from_saved(VQVAEConfig, config.get("model"), run), compute_dtype=dtype)
    load_checkpoint(checkpoint, vqvae)
    for p in vqvae.parameters():  # cast once; the codebook, which is a buffer, stays fp32
        p.data = p.data.to(dtype)
    return vqvae.to(device).eval().requires_grad_(False)


# ---- text
def prompt_ids(tokenizer, prompt: str, seq_len: int) -> list[int]:
    """End-of-text and the ids of a prompt. Raises UserError if they exceed the context length."""
    ids = [end_of_text(tokenizer), *encode(tokenizer, [prompt])[0]]
    if len(ids) > seq_len:
        raise UserError(
            f"the prompt {shorten(prompt, 40)!r} has {len(ids)} tokens, but the model's context is "
            f"{seq_len}; shorten it"
        )
    return ids


def generate_text(
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
    record: Callable = eagerly,
    out=None,
) -> list[str]:
    """n continuations of a prompt, each ended by end-of-text or after max_tokens.

    Prompt and first continuation are streamed to the file `out`. Only complete characters are
    written; bytes that do not form one are dropped. For `record` see Llama.decode. Raises UserError
    if the prompt is too long.
    """
    ids = prompt_ids(tokenizer, prompt, model.config.seq_len)
    if out:
        print(prompt, end="", flush=True, file=out)
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    settings |= {"top_k": top_k, "top_p": top_p, "record": record}
    seeds = [seed + i for i in range(n)]
    return continuations(model, tokenizer, [ids] * n, seeds, out=out, **settings)


def continuations(
    model: Llama, tokenizer, prompts: list[list[int]], seeds: list[int], *, out=None, **settings
) -> list[str]:
    """A continuation of each prompt, see text_pieces. The first one is streamed to the file `out`.

    Without `out`, tokens are read 16 at a time.
    """
    texts = [""] * len(prompts)
    settings |= {"block": 1 if out else 16}
    for pieces in text_pieces(model, tokenizer, prompts, seeds, **settings):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        if out:
            print(pieces[0], end="", flush=True, file=out)
    return texts


def text_pieces(
    model: Llama,
    tokenizer,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    block: int = 1,
    **settings,
) -> Iterator[list[str]]:
    """Yield the next piece of each continuation whenever `block` tokens have been generated.

    The prompts all have one length. Continuation i depends on seeds[i] alone. Reading tokens makes
    the host wait for the device, so a larger block is faster.
    """
    eot, n = end_of_text(tokenizer), len(prompts)
    decoders = [DecodeStream(skip_special_tokens=True) for _ in range(n)]
    ended = [False] * n
    tokens = model.generate(
        torch.tensor(prompts, device=model.embed.weight.device),  # (n, T)
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        vocab_slice=slice(len(tokenizer)),
        **settings,
    )
    for rows in iter(lambda: list(islice(tokens, block)), []):
        pieces = [""] * n
        for i, row in enumerate(torch.stack(rows, dim=1).tolist()):  # (n, block)
            for token in row:
                ended[i] = ended[i] or token == eot
                if ended[i]:
                    break
                piece = decoders[i].step(tokenizer.backend_tokenizer, token) or ""
                pieces[i] += piece.replace("\ufffd", "")
        yield pieces
        if all(ended):
            break


def write_text_samples(
    path: Path, model: Llama, tokenizer, prompts: list[str], max_tokens: int, seed: int
) -> list[str]:
    """Write every prompt with a continuation sampled at temperature 0.8 to a file.

    Returns the continuations.
    """
    model = model.for_inference()
    ids = [prompt_ids(tokenizer, prompt, model.config.seq_len) for prompt in prompts]
    texts = [""] * len(prompts)
    for group in equal_length_batches(ids, batch=16):
        batch, seeds = [ids[i] for i in group], [seed] * len(group)
        settings = {"max_tokens": max_tokens, "temperature": 0.8}
        parts = continuations(model, tokenizer, batch, seeds, **settings)
        for i, text in zip(group, parts, strict=True):
            texts[i] = text
    write_text(path, "\n".join(numbered(prompts, texts)) + "\n")
    return texts


def numbered(prompts: list[str], texts: list[str]) -> Iterator[str]:
    """Each prompt and its continuation under a line with its number."""
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
        yield f"--- {i}/{len(texts)}\n{prompt}{text}"


# ---- images
def image_tokens(
    model: Llama,
    fmt: ImageTextFormat,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    record: Callable = eagerly,
) -> Iterator[Tensor]:
    """Yield the image tokens (B,), counted from 0, of B prompts of one length, in raster order.

    Image i depends on seeds[i] alone. With classifier-free guidance other than 1, an empty prompt
    runs beside each prompt in the same batch.
    """
    n, N, device = len(prompts[0]), fmt.n_image_tokens, model.embed.weight.device
    uncond = [fmt.uncond(prompt) for prompt in prompts] if guidance != 1 else None
    tokens = model.generate(
        torch.tensor(prompts, device=device),  # (B, n)
        N,
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_slice=fmt.code_slice,
        uncond=uncond and torch.tensor(uncond, device=device),  # (B, n)
        guidance=guidance,
        # of one sequence: they depend only on the length of the prompt
        positions=fmt.position_ids(torch.tensor([n - 1], device=device), n + N),
        record=record,
    )
    for token in tokens:
        yield token - fmt.first_code  # (B,)


def sample_image_tokens(
    model: Llama,
    fmt: ImageTextFormat,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    on_token: Callable[[], object] = lambda: None,
    **settings,
) -> Tensor:
    """Image tokens (B, N), see image_tokens. `on_token` is called after each token."""
    codes = []
    for token in image_tokens(model, fmt, prompts, seeds, **settings):
        codes.append(token)
        on_token()
    return torch.stack(codes, dim=1)  # (B, N)


def growing_images(
    model: Llama, vqvae: VQVAE, fmt: ImageTextFormat, caption: str, seeds: list[int], **settings
) -> Iterator[Tensor]:
    """Yield images (B, 3, S, S) in [-1, 1] of a caption after each row of their image tokens.

    What is not sampled yet is gray. The last images are those of generate_images, as are the
    settings. Raises UserError for a caption that is too long.
    """
    prompts, size = [fmt.prompt(caption)] * len(seeds), vqvae.config.image_size
    codes = []
    for token in image_tokens(model, fmt, prompts, seeds, **settings):
        codes.append(token)
        if len(codes) % fmt.grid == 0:
            grids = torch.stack(codes, dim=1).view(len(seeds), -1, fmt.grid)  # (B, R, G)
            images = vqvae.decode(grids)  # (B, 3, R S / G, S)
            yield F.pad(images, (0, 0, 0, size - images.shape[2]))  # (B, 3, S, S)


def generate_images(
    model: Llama,
    vqvae: VQVAE,
    fmt: ImageTextFormat,
    captions: list[str],
    seeds: list[int],
    *,
    guidance: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch: int = 64,
    truncate: bool = False,
    record: Callable = eagerly,
    progress: bool = False,
) -> Tensor:
    """An image for every caption, (B, 3, S, S) in [-1, 1].

    For `record` see Llama.decode. Raises UserError for a caption that is too long, unless
    `truncate` is set.
    """
    model = model.for_inference()
    prompts = [fmt.prompt(caption, truncate) for caption in captions]
    device = model.embed.weight.device
    codes = torch.empty(len(prompts), fmt.n_image_tokens, dtype=torch.long, device=device)
    groups = equal_length_batches(prompts, batch)
    settings = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    with tqdm(
        total=len(groups) * fmt.n_image_tokens,
        desc="generating",
        unit="token",
        leave=False,
        disable=not (progress and sys.stderr.isatty()),
    ) as bar:
        for group in groups:
            codes[group] = sample_image_tokens(
                model,
                fmt,
                [prompts[i] for i in group],
                [seeds[i] for i in group],
                record=record,
                on_token=bar.update,
                **settings,
            )
    grids = codes.view(-1, fmt.grid, fmt.grid)  # (B, G, G)
    return torch.cat([vqvae.decode(part) for part in grids.split(batch)])


def equal_length_batches(prompts: list[list[int]], batch: int) -> list[list[int]]:
    """Indices of prompts in batches of at most `batch`, all of one length within a batch."""
    groups: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        same_length = groups and len(prompts[groups[-1][0]]) == len(prompts[i])
        if not same_length or len(groups[-1]) == batch:
            groups.append([])
        groups[-1].append(i)
    return groups


# ---- settings
def resolve_sampling(cfg, loaded: LoadedRun) -> None:
    """Replace `auto` in the settings for images by the run's own values. Raises UserError."""
    for name in ("guidance", "temperature", "top_p"):
        if getattr(cfg, name) != "auto":
            continue
        value = loaded.config.get(name)
        if not isinstance(value, int | float):
            raise UserError(
                f"{loaded.run}/config.yaml sets {name} to {value!r}, not a number; pass --{name}"
            )
        setattr(cfg, name, value)
    check_sampling(cfg)
    check_guidance(cfg)


def check_sampling(cfg) -> None:
    """Raises UserError for sampling settings out of range."""
    check_not_negative(cfg, "temperature", "top_k")
    if not 0 < cfg.top_p <= 1:
        raise UserError(f"--top_p is {cfg.top_p}; it must be above 0 and at most 1")


def check_guidance(cfg) -> None:
    """Raises UserError for a guidance scale that is negative or makes logits overflow."""
    check_not_negative(cfg, "guidance")
    if cfg.guidance > 1000:
        raise UserError(f"--guidance is {cfg.guidance}; it must be at most 1000")
