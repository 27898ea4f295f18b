"""Train a transformer on captions and image tokens in one sequence (text-to-image from scratch).

    python train_multimodal.py --config configs/multimodal_cifar10.yaml --vqvae NAME   # one GPU
    python train_multimodal.py --config configs/multimodal_demo.yaml --vqvae NAME      # a laptop
    python train_multimodal.py --run NAME --resume               # continue a stopped run
    torchrun --nproc_per_node=4 -- train_multimodal.py --vqvae NAME ...                # more GPUs

--vqvae NAME is a run of train_vqvae.py. A sequence is
`[BOS] caption <seg_start> image tokens <seg_end> [EOS]`.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.config import (
    HumanInt,
    RunConfig,
    UserError,
    check_betas,
    check_fractions,
    check_not_negative,
    check_positive,
    run_script,
)
from common.device import (
    Clock,
    fitting_sequences,
    pinned,
    to_device,
)
from common.disk import file_sha256
from common.distributed import (
    agree_on_compile,
    average,
    check_divisible,
    join_ranks,
    n_ranks,
    rank,
    share,
    weighted_mean,
)
from common.loop import (
    average_gradients,
    clipped_norm,
    finished_summary,
    print_setup,
    resolve_steps,
    set_lr,
    training_loop,
    trapezoid,
    update,
    warming_up,
)
from common.metrics import Metrics, evaluations
from common.run import check_run, find_run, origin, resume, save_checkpoint
from data.captions import TokenizedImages, caption, caption_tokenizer, tokenized
from data.images import ImageConfig, image_grid, load_images, to_float, to_uint8
from data.order import batch_epochs, batch_indices, evenly_spaced, prefetch
from data.source import digest
from data.text import DataConfig, Tokens, prepare_tokens
from model import Llama, ModelConfig
from multimodal import ImageTextFormat, image_text_losses, plain_text_loss
from muon import build_optimizers
from pretrained import initial_weights, initialize
from sampling import check_guidance, generate_images, load_vqvae
from vqvae import VQVAE


@dataclass
class CaptionConfig(ImageConfig):
    """Images, captions and their tokenizer."""

    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"
    """Tokenizer of the captions: a hub name, a local folder, or bpe-N for a byte-level BPE with N
    entries trained on the captions."""


@dataclass
class Config(RunConfig):
    """Settings of a text-and-image run; `auto` is resolved and printed at the start."""

    stage: Literal["multimodal"] = "multimodal"
    """Stage that the run belongs to; fixed for this script."""
    vqvae: str = ""
    """Required: the train_vqvae.py run (name, folder or checkpoint) to use as the image tokenizer.
    The new run keeps a copy of it."""
    init_from: str = ""
    """Language model to start from, with the same model shape and tokenizer: a train_llm.py run
    (name, folder or checkpoint) or a folder of tools/export_hf.py. Its pointer, if any, is left
    out. Empty: random initialization."""
    sequences: HumanInt = HumanInt("1M")
    """Budget in training sequences."""
    batch_sequences: int = 128
    """Sequences per step."""
    text_frac: float = 0.0
    """Fraction of the sequences in each batch that are plain text, which preserves the language
    modeling ability of --init_from. 0: no plain text."""
    text_source: str | dict[str, float] = field(default_factory=lambda: DataConfig().source)
    """Source of the plain text: anything that --data.source of train_llm.py accepts."""
    caption_dropout: float = 0.1
    """Fraction of captions dropped in training (caption dropout), which enables classifier-free
    guidance. 0: no dropout."""
    caption_weight: float = 0.1
    """Weight of the caption loss; the image loss has weight 1."""
    muon_lr: float = 0.02
    """Muon's peak learning rate, for the weight matrices of the blocks."""
    muon_wd: float | Literal["auto"] = "auto"
    """Muon's weight decay. auto: 4 / (muon_lr * steps), but at most 0.02 / muon_lr."""
    adamw_lr: float = 0.005
    """AdamW's peak learning rate, for embeddings and norms."""
    adamw_beta2: float = 0.98
    """AdamW's decay rate of the second moment."""
    warmup_frac: float = 0.02
    """Fraction of the budget for the linear learning-rate warm-up. 0: no warm-up."""
    cooldown_frac: float = 0.6
    """Final fraction of the budget over which the learning rate decays linearly to lr_floor times
    its peak. 0: no cooldown."""
    lr_floor: float = 0.05
    """Final learning rate as a fraction of the peak."""
    eval_every: float = 0.1
    """Fraction of the budget between evaluations. 0: evaluate only at the end."""
    eval_sequences: int = 500
    """Validation images per evaluation, evenly spaced over all of them."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of the images generated at every evaluation. Empty: captions of validation images."""
    sample_n: int = 16
    """Images generated at every evaluation, always with the same seeds. 0: none."""
    guidance: float = 3.0
    """Scale of classifier-free guidance for images sampled at evaluations, and the default of
    generate.py for this run. 0: ignore the prompt; 1: no guidance; more than 1: follow the prompt
    more strongly."""
    temperature: float = 1.0
    """Sampling temperature for images sampled at evaluations, and the default of generate.py for
    this run. 0: always the most likely token; 1: the model's own distribution."""
    top_p: float = 1.0
    """Nucleus sampling for images sampled at evaluations, and the default of generate.py for this
    run: sample from the most likely tokens whose probabilities add up to top_p. 1: all tokens."""
    data: CaptionConfig = field(default_factory=CaptionConfig)
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            vocab_size=50_178,
            d_model=512,
            n_layers=8,
            n_heads=8,
            n_kv_heads=4,
            d_ff=896,
            seq_len=1060,
            value_embed=True,
            canon=3,
            n_image_positions=1024,
        )
    )


# ---- recipe
def resolve_recipe(cfg: Config) -> tuple[int, int]:
    """Fill in what follows from the budget; returns the steps and the plain-text sequences in each.

    Raises UserError.
    """
    check_positive(cfg, "muon_lr", "adamw_lr", "eval_sequences", "top_p")
    check_not_negative(cfg, "caption_weight", "sample_n", "temperature")
    check_guidance(cfg)
    check_fractions(cfg, "top_p", "text_frac", "caption_dropout", "lr_floor")
    check_betas(cfg, "adamw_beta2")
    steps = resolve_steps(cfg, "sequences", "batch_sequences")
    n_text = round(cfg.text_frac * cfg.batch_sequences)
    if cfg.text_frac and not 0 < n_text < cfg.batch_sequences:
        raise UserError(
            f"--text_frac {cfg.text_frac} makes {n_text} of {cfg.batch_sequences} sequences text; "
            "set it to 0, or so that each batch has both text and images"
        )
    for name, part in (("subwords", "subword embeddings are"), ("pointer", "the pointer is")):
        if value := getattr(cfg.model, name):
            raise UserError(
                f"--model.{name} is {value}, but {part} for text-only models; set it to 0"
            )
    if cfg.muon_wd == "auto":
        cfg.muon_wd = min(4 / steps, 0.02) / cfg.muon_lr
    check_not_negative(cfg, "muon_wd")
    return steps, n_text


def resolve_micro_batch(cfg: Config, n_text: int, device: torch.device) -> None:
    """Fill in cfg.micro_batch by what fits the device. Raises UserError."""
    check_divisible(cfg, "batch_sequences", cfg.batch_sequences)
    check_divisible(cfg, "text_frac", n_text)
    if cfg.micro_batch == "auto":
        most = cfg.batch_sequences // n_ranks()
        cfg.micro_batch = max(1, min(most, int(fitting_sequences(cfg, device))))
    check_positive(cfg, "micro_batch")


# ---- data
def open_vqvae(cfg: Config, parent: Path | None, device: torch.device) -> tuple[VQVAE, Path]:
    """The frozen VQ-VAE and its checkpoint: the copy in the run being continued, or else --vqvae.

    Raises UserError.
    """
    if not cfg.vqvae:
        raise UserError("--vqvae is missing; pass a run of train_vqvae.py")
    has_copy = parent is not None and (parent / "vqvae").exists()
    run, checkpoint, _ = find_run(str(parent / "vqvae") if has_copy else cfg.vqvae)
    if not has_copy and not (run / "summary.json").exists():
        print(f"note: {run} is not finished; its checkpoint {checkpoint.name} is used")
    return load_vqvae(str(checkpoint), device, getattr(torch, cfg.dtype)), checkpoint


def write_assets(tokenizer, checkpoint: Path, folder: Path) -> None:
    """Copy tokenizer and VQ-VAE into a run folder, so that it does not depend on other runs."""
    tokenizer.save_pretrained(folder / "tokenizer")
    target = folder / "vqvae" / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("optimizer.pt"))
    shutil.copy(checkpoint.parent.parent / "config.yaml", folder / "vqvae")


def tokenize_images(
    cfg: Config, vqvae: VQVAE, checkpoint: Path, data, n_images: int
) -> TokenizedImages:
    """Image tokens of a dataset: for n_images training images, or 0 for validation.

    On a CPU they are cached on disk. A GPU encodes training images again in every step, so
    augmented epochs take no disk space.
    """
    size, device = vqvae.config.image_size, torch.device(cfg.device)

    def encode(pixels: Tensor) -> Tensor:
        parts = [to_float(part, size, device) for part in pixels.split(32)]
        return torch.cat([vqvae.encode(part).flatten(1) for part in parts])  # (B, N)

    return tokenized(
        data,
        encode,
        cache_dir=cfg.data.cache,
        encoder={
            "weights": file_sha256(checkpoint / "model.safetensors"),
            "config": asdict(vqvae.config),
            "dtype": cfg.dtype,
            "device": device.type,
        },
        augment=cfg.data.augment and n_images > 0,
        n_image_tokens=vqvae.config.grid**2,
        cached=device.type == "cpu" or n_images == 0,
    )


def validation_set(
    cfg: Config, fmt: ImageTextFormat, images: TokenizedImages
) -> tuple[Tensor, Tensor, int]:
    """Validation sequences (N, T), their starts (N,) and how many captions were truncated."""
    indices = evenly_spaced(len(images.data), cfg.eval_sequences)
    captions = [caption(images.data, i, 0) for i in indices]
    codes = images.read(indices, [0] * len(indices))  # (N, image tokens)
    prompts = [fmt.prompt(text, truncate=True) for text in captions]
    tokens, starts = fmt.sequences(prompts, codes)
    lengths = [len(fmt.text_tokens(text)) for text in captions]
    return tokens, starts, sum(length > fmt.caption_tokens for length in lengths)


def sample_prompts(cfg: Config, fmt: ImageTextFormat, val) -> list[str]:
    """cfg.sample_n prompts to generate images for. Raises UserError for one that does not fit."""
    for prompt in cfg.sample_prompts:
        fmt.prompt(prompt)  # raises now, not at the first evaluation
    validation = [caption(val, i, 0) for i in evenly_spaced(len(val), cfg.sample_n)]
    prompts = cfg.sample_prompts or validation
    return [prompts[i % len(prompts)] for i in range(cfg.sample_n)]


def write_image_samples(
    cfg: Config,
    metrics: Metrics,
    step: int,
    model: Llama,
    vqvae: VQVAE,
    fmt: ImageTextFormat,
    prompts: list[str],
) -> None:
    """Write an image for each prompt, with the same seeds every time, to samples/STEP.png."""
    images = generate_images(
        model,
        vqvae,
        fmt,
        prompts,
        [cfg.seed + i for i in range(len(prompts))],
        guidance=cfg.guidance,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        truncate=True,
    )
    path = metrics.run / "samples" / f"{step:07d}.png"
    image_grid(to_uint8(images), min(8, len(prompts)), titles=prompts).save(path)
    metrics.image_samples(step, path, f"step {step}, each image under its prompt")


def load_text(cfg: Config, tokenizer, n_windows: int) -> Tokens:
    """Plain text for n_windows sequences of seq_len tokens. Raises UserError."""
    text_config = DataConfig(
        source=cfg.text_source,
        tokenizer=cfg.data.tokenizer,
        cache=cfg.data.cache,
        retry_seconds=cfg.data.retry_seconds,
    )
    needed = n_windows * cfg.model.seq_len + 1
    text = Tokens(prepare_tokens(text_config, "train", needed, tokenizer), limit=needed)
    if len(text) <= cfg.model.seq_len:
        raise UserError(
            f"--text_source {cfg.text_source} has {len(text)} tokens, fewer than one sequence of "
            f"{cfg.model.seq_len}; add text"
        )
    return text


def batch_reader(
    cfg: Config, fmt: ImageTextFormat, images: TokenizedImages, text: Tokens | None, n_text: int
) -> Callable[[int], tuple]:
    """A function from step to this rank's prompts, has_caption (B,), image content and text
    windows.
    """
    train, n_images = images.data, cfg.batch_sequences - n_text
    device = torch.device(cfg.device)

    def read(step: int) -> tuple[list[list[int]], Tensor, Tensor, Tensor | None]:
        indices = share(batch_indices(step, n_images, len(train), cfg.seed))
        epochs = share(batch_epochs(step, n_images, len(train)))
        captions = [caption(train, i, e) for i, e in zip(indices, epochs, strict=True)]
        prompts = [fmt.prompt(text, truncate=True) for text in captions]
        uniforms = np.random.default_rng((cfg.seed, step)).random(n_images)
        has_caption = share(uniforms >= cfg.caption_dropout)
        for i in np.flatnonzero(~has_caption):
            prompts[i] = fmt.uncond(prompts[i])
        windows = None
        if text:
            n_windows = (len(text) - 1) // cfg.model.seq_len
            chosen = share(batch_indices(step, n_text, n_windows, cfg.seed))
            windows = pinned(text.windows(chosen, cfg.model.seq_len), device)  # (n_text, T + 1)
        content = pinned(images.read(indices, epochs), device)
        return prompts, pinned(torch.from_numpy(has_caption), device), content, windows

    return read


# ---- training and evaluation
def make_losses(cfg: Config, model: Llama, fmt: ImageTextFormat) -> tuple[Callable, Callable]:
    """The losses of sequences with an image and of plain text, compiled if cfg.compile."""

    def image_text(*sequences: Tensor) -> tuple[Tensor, Tensor]:
        return image_text_losses(model, fmt, *sequences)

    def plain_text(windows: Tensor) -> Tensor:
        return plain_text_loss(model, fmt, windows)

    if not cfg.compile:
        return image_text, plain_text
    settings = {"dynamic": False, "fullgraph": True}
    return torch.compile(image_text, **settings), torch.compile(plain_text, **settings)


def backward(
    cfg: Config, losses: tuple[Callable, Callable], sequences: tuple, windows: Tensor | None
) -> Tensor:
    """Accumulate the gradient; returns the mean losses (3,) of images, captions and plain text.

    `sequences` are tokens (B, T), starts (B,) and has_caption (B,); windows are plain text
    (N, T + 1).
    """
    image_text, plain_text = losses
    n_images = len(sequences[0])
    batch = n_images + (0 if windows is None else len(windows))
    total = torch.zeros(3, device=sequences[0].device)
    _, starts, has_caption = sequences
    n_scored = (starts * has_caption).float().mean()
    average([n_scored])
    for part in zip(*(t.split(cfg.micro_batch) for t in sequences), strict=True):
        image, text = image_text(*part, n_scored)
        fraction = len(part[0]) / n_images
        loss = (image + cfg.caption_weight * text) * fraction
        (loss * n_images / batch).backward()
        total[:2] += torch.stack([image, text]).detach() * fraction
    for part in windows.split(cfg.micro_batch) if windows is not None else ():
        loss, fraction = plain_text(part), len(part) / len(windows)
        (loss * fraction * len(windows) / batch).backward()
        total[2] += loss.detach() * fraction
    return total


@torch.no_grad()
def evaluate(
    image_text: Callable, tokens: Tensor, starts: Tensor, micro_batch: int, device: torch.device
) -> tuple[float, float]:
    """Mean losses of image tokens and captions over sequences (N, T), in nats per token."""
    total, n_scored = torch.zeros(2), starts.float().mean().to(device)
    parts = zip(tokens.split(micro_batch), starts.split(micro_batch), strict=True)
    for part, start in parts:
        has_caption = torch.ones(len(part), dtype=torch.bool, device=device)
        values = image_text(part.to(device), start.to(device), has_caption, n_scored)
        total += torch.stack(values).cpu() * len(part) / len(tokens)
    return total[0].item(), total[1].item()


def save_if_best(run: Path, model: Llama, state: dict) -> None:
    """Save the weights if state["val_loss"] is the lowest so far."""
    if state["val_loss"] < min((row["val_loss"] for row in evaluations(run)), default=math.inf):
        save_checkpoint(run, model, [], state, place="best", keep=1)


def dummy_batch(cfg: Config, fmt: ImageTextFormat, n_text: int, device: torch.device) -> tuple:
    """Sequences and plain text of the shapes of a training batch, for compiling."""
    n_images, T = cfg.batch_sequences - n_text, cfg.model.seq_len
    n_images, n_text = n_images // n_ranks(), n_text // n_ranks()
    zeros = torch.zeros(n_images, dtype=torch.long, device=device)
    tokens = torch.full((n_images, T), fmt.first_code, device=device)
    windows = torch.zeros(n_text, T + 1, dtype=torch.long, device=device) if n_text else None
    return (tokens, zeros + 1, zeros > 0), windows


def flops_per_sequence(model: Llama, codebook_size: int) -> float:
    """Forward and backward FLOPs: the blocks, the head over image tokens and causal attention."""
    c = model.config
    weights = sum(p.numel() for p in model.blocks.parameters()) + codebook_size * c.d_model
    return c.seq_len * (6 * weights + 6 * c.n_layers * c.d_model * c.seq_len)


def describe(
    cfg: Config, run: Path, first: int, model: Llama, fmt: ImageTextFormat, data: str
) -> None:
    """Print what is about to run."""
    in_blocks = sum(p.numel() for p in model.blocks.parameters())
    n_codes = fmt.vocab_size - fmt.first_code
    print_setup(
        cfg,
        run,
        first,
        origin=f"from {cfg.init_from}" if cfg.init_from else "from scratch",
        model=f"{model.n_params():,} parameters, {in_blocks:,} in blocks; {fmt.n_text:,} text and "
        f"{n_codes:,} image tokens",
        data=data,
        batch=f"{cfg.batch_sequences} sequences, {cfg.micro_batch} per forward pass",
        recipe=f"muon_lr {cfg.muon_lr:.4g}, muon_wd {cfg.muon_wd:.4g}, adamw_lr {cfg.adamw_lr:.4g}",
    )


def describe_data(images: TokenizedImages, n_images: int, val: TokenizedImages, n_val: int) -> str:
    """What the model is trained on, n_images in all, and validated on, n_val images."""
    where = f"cached in {images.cache.path}" if images.cache else "encoded while training"
    epochs = n_images / len(images.data)
    return (
        f"{len(images.data):,} images, {epochs:.2f} epochs, image tokens {where}; "
        f"validation on {n_val} of {len(val.data):,}"
    )


def main(cfg: Config) -> dict:
    """Train as cfg says and return the summary. Raises UserError."""
    # ---- set-up
    started = time.perf_counter()
    steps, n_text = resolve_recipe(cfg)
    device = join_ranks(cfg)
    resolve_micro_batch(cfg, n_text, device)
    run = check_run(cfg)
    if summary := finished_summary(run):
        return summary
    batch, n_images = cfg.batch_sequences, cfg.batch_sequences - n_text

    # ---- data
    parent = origin(cfg, run)
    vqvae, vqvae_checkpoint = open_vqvae(cfg, parent, device)
    train, val = (
        load_images(cfg.data, split, vqvae.config.image_size, captions=True)
        for split in ("train", "val")
    )
    tokenizer = caption_tokenizer(cfg.data, train, saved=parent and parent / "tokenizer")
    source = initial_weights(cfg, tokenizer, parent)
    fmt = ImageTextFormat(tokenizer, vqvae.config, cfg.model)
    images = tokenize_images(cfg, vqvae, vqvae_checkpoint, train, steps * n_images)
    val_images = tokenize_images(cfg, vqvae, vqvae_checkpoint, val, 0)
    *val_set, n_truncated = validation_set(cfg, fmt, val_images)  # (N, T), (N,), int
    own_val = [share(tensor) for tensor in val_set]
    prompts = sample_prompts(cfg, fmt, val)
    text = load_text(cfg, tokenizer, steps * n_text) if n_text else None

    # ---- model
    model = Llama(cfg.model, compute_dtype=getattr(torch, cfg.dtype))
    model.init_weights(torch.Generator().manual_seed(cfg.seed))
    initialize(model, source, len(tokenizer))
    model.to(device)
    flops = batch * flops_per_sequence(model, vqvae.config.codebook_size)  # of a step
    agree_on_compile(cfg, device, steps * flops, cfg.model.n_layers)
    losses = make_losses(cfg, model, fmt)

    # ---- optimizers
    optimizers = build_optimizers(
        model,
        muon_lr=cfg.muon_lr,
        muon_wd=cfg.muon_wd,
        adamw_lr=cfg.adamw_lr,
        adamw_wd=0.0,
        adamw_beta2=cfg.adamw_beta2,
        dtype=model.compute_dtype,
        compile=cfg.compile,
    )

    # ---- resume
    vqvae_sha256 = file_sha256(vqvae_checkpoint / "model.safetensors")
    tokenizer_sha256 = digest(tokenizer.backend_tokenizer.to_str())
    inputs = {"train": train.id, "val": val.id, "tokenizer": tokenizer_sha256}
    inputs |= {"vqvae": vqvae_sha256, **({"text": text.sha256} if text else {})}
    state = resume(cfg, run, model, optimizers, lambda step: inputs)
    first, clock = state["step"], Clock(device, state["train_seconds"])
    data = describe_data(images, steps * n_images, val_images, len(val_set[0]))
    truncated = f"{n_truncated} validation captions truncated to {fmt.caption_tokens} tokens"
    describe(cfg, run, first, model, fmt, f"{data}; {truncated}")

    # ---- warm-up
    if cfg.compile:
        with warming_up(model, *optimizers):
            for _ in range(2):
                backward(cfg, losses, *dummy_batch(cfg, fmt, n_text, device))
                update(optimizers, torch.zeros((), device=device))
            n = cfg.micro_batch + len(own_val[0]) % cfg.micro_batch  # both sizes
            evaluate(losses[0], *(t[:n] for t in own_val), cfg.micro_batch, device)

    # ---- loop
    units = {"unit": "sequences", "per_step": batch, "flops": flops}
    metrics = Metrics(run, cfg, state, steps, started=started, clock=clock, **units)

    def evaluate_now(step: int) -> None:
        values = evaluate(losses[0], *own_val, cfg.micro_batch, device)
        image, caption = weighted_mean(values, len(own_val[0]))
        if rank():
            return
        save_if_best(run, model, state | {"step": step, "val_loss": image})
        nats = f"image tokens {image:.4f} nats, {image / math.log(2):.3f} bits"
        metrics.line(f"val {step}/{steps} | {nats} | captions {caption:.4f}")
        if prompts:
            write_image_samples(cfg, metrics, step, model, vqvae, fmt, prompts)
        # last: marks a complete evaluation
        metrics.row(step=step, val_loss=image, val_caption_loss=caption)

    assets = partial(write_assets, tokenizer, vqvae_checkpoint)
    read = batch_reader(cfg, fmt, images, text, n_text)
    batches = prefetch(read, first, steps, device)
    names = ("loss", "caption_loss", "plain_text_loss")[: 3 if n_text else 2]
    with training_loop(cfg, metrics, model, optimizers, state, evaluate_now, assets) as after_step:
        for step, (batch_prompts, has_caption, content, windows) in after_step.batches(batches):
            progress = step / steps
            factor = trapezoid(progress, cfg.warmup_frac, cfg.cooldown_frac, cfg.lr_floor)
            set_lr(optimizers, factor)
            tokens, starts = fmt.sequences(batch_prompts, images.tokens(content))
            sequences = tuple(to_device(t, device) for t in (tokens, starts, has_caption))
            windows = to_device(windows, device) if n_text else None
            total = backward(cfg, losses, sequences, windows)
            average_gradients(model, total)
            norm = clipped_norm(model)
            update(optimizers, after_step.found_inf(total, norm))
            values = dict(zip(names, total, strict=False))
            rates = {"lr": cfg.muon_lr * factor, "adamw_lr": cfg.adamw_lr * factor}
            after_step(step, **values, grad_norm=norm, **rates)

    # ---- summary
    rows = evaluations(run)
    best = min(rows, key=lambda row: row["val_loss"])
    return metrics.finish(
        model,
        steps * batch * cfg.model.seq_len,
        val_loss=best["val_loss"],
        val_caption_loss=best["val_caption_loss"],
        best_step=best["step"],
        val_last=rows[-1]["val_loss"],
        bits_per_image_token=best["val_loss"] / math.log(2),
        vqvae_sha256=vqvae_sha256,
    )


if __name__ == "__main__":
    run_script(main, Config, prog="train_multimodal.py", description=__doc__)
