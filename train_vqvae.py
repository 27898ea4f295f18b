"""Train the image tokenizer (a VQ-VAE) from scratch: images to a grid of discrete codes and back.

python train_vqvae.py --config configs/vqvae_cifar10.yaml     # 32 x 32 codes per image, one GPU
python train_vqvae.py --config configs/vqvae_demo.yaml        # a laptop, no GPU, no network
python train_vqvae.py --run NAME --resume                     # continue a stopped run
torchrun --nproc_per_node=4 -- train_vqvae.py --config configs/vqvae_cifar10.yaml  # more GPUs
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import (
    HumanInt,
    RunConfig,
    UserError,
    check_not_negative,
    check_positive,
    run_script,
)
from common.device import Clock, pinned
from common.distributed import (
    agree_on_compile,
    check_divisible,
    gather,
    join_ranks,
    n_ranks,
    rank,
    share,
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
from common.run import check_run, resume
from data.images import (
    ImageConfig,
    image_grid,
    load_images,
    load_pixels,
    to_float,
    to_uint8,
    unaugmented_images,
)
from data.order import batch_epochs, batch_indices, evenly_spaced, prefetch
from image_metrics import KMEANS_VECTORS, palette_psnr, probe_nats, reconstruction_metrics
from vqvae import VARIANCE, VQVAE, VQVAEConfig

KMEANS_IMAGES = 256  # for the initial codebook: a few images have only a few colors
PROBE_CODES = 1_024_000  # that the probe trains on: 500 steps are two epochs


@dataclass
class Config(RunConfig):
    """Settings of a VQ-VAE run; `auto` is resolved and printed at the start."""

    stage: Literal["vqvae"] = "vqvae"
    """Stage that the run belongs to; fixed for this script."""
    images: HumanInt = HumanInt("400k")
    """Budget in training images (or crops), counting repeats."""
    batch_images: int = 64
    """Images per step."""
    crop: int = 0
    """Side of random training crops in pixels, a multiple of model.downsample. 0: whole images."""
    lr: float = 1e-3
    """AdamW's peak learning rate."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    commit_weight: float = 0.25
    """Weight of the commitment loss, which keeps encoder outputs close to their codes."""
    edge_weight: float = 0.0
    """Weight of the error of differences between neighboring pixels (gradient difference loss,
    arXiv 1511.05440), which keeps edges sharp at the expense of PSNR. 0: none."""
    warmup_frac: float = 0.05
    """Fraction of the budget for the linear learning-rate warm-up. 0: no warm-up."""
    cooldown_frac: float = 0.5
    """Final fraction of the budget over which the learning rate decays linearly to 0."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient. 0: no clipping."""
    revive_every: int = 20
    """Steps between replacements of unused codes. Replacement stops after 80% of the budget; after
    95% the codebook is frozen."""
    eval_images: int = 500
    """Validation images per evaluation, evenly spaced over all of them."""
    probe_steps: int = 500
    """Training steps of the small network that measures, at the end of the run, how predictable
    codes are. 0: skip it."""
    data: ImageConfig = field(default_factory=ImageConfig)
    model: VQVAEConfig = field(default_factory=VQVAEConfig)


def resolve_recipe(cfg: Config) -> int:
    """Fill in what follows from the budget and return the number of steps. Raises UserError."""
    check_positive(cfg, "lr", "revive_every", "eval_images")
    check_not_negative(cfg, "weight_decay", "commit_weight", "edge_weight", "grad_clip")
    check_not_negative(cfg, "probe_steps", "crop")
    steps = resolve_steps(cfg, "images", "batch_images")
    if cfg.crop % cfg.model.downsample or cfg.crop > cfg.model.image_size:
        raise UserError(
            f"--crop is {cfg.crop}; it must be a multiple of --model.downsample "
            f"{cfg.model.downsample} and at most --model.image_size {cfg.model.image_size}"
        )
    return steps


def resolve_micro_batch(cfg: Config) -> None:
    """Fill in cfg.micro_batch; at most a rank's share of a step. Raises UserError."""
    check_divisible(cfg, "batch_images", cfg.batch_images)
    images = cfg.batch_images // n_ranks()
    if cfg.micro_batch == "auto":
        cfg.micro_batch = images
    check_positive(cfg, "micro_batch")
    if n_ranks() > 1:  # a run that one process started may have more
        cfg.micro_batch = min(cfg.micro_batch, images)
    if images % cfg.micro_batch:
        raise UserError(
            f"--micro_batch {cfg.micro_batch} does not divide --batch_images {cfg.batch_images}; "
            "choose a divisor or omit it"
        )


def random_crops(images: Tensor, crop: int, corners: np.ndarray) -> Tensor:
    """Crops (B, 3, crop, crop) of images (B, 3, S, S) at corners (B, 2), the tops and lefts."""
    pairs = zip(images, corners.tolist(), strict=True)
    crops = torch.stack([image[:, y : y + crop, x : x + crop] for image, (y, x) in pairs])
    return crops.contiguous(memory_format=torch.channels_last)  # as whole images are


def random_corners(cfg: Config, step: int) -> np.ndarray:
    """Corners (batch_images, 2) of a step's crops, aligned with the grid of codes."""
    downsample = cfg.model.downsample
    choices = (cfg.model.image_size - cfg.crop) // downsample + 1
    rng = np.random.default_rng((cfg.seed, step))
    return downsample * rng.integers(0, choices, size=(cfg.batch_images, 2))  # (batch_images, 2)


def edge_error(error: Tensor) -> Tensor:
    """Mean squared difference of neighboring pixels of (B, 3, S, S), summed over both axes, ()."""
    return error.diff(dim=2).square().mean() + error.diff(dim=3).square().mean()


def backward(forward, images: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulate the gradient over images (B, 3, S, S).

    Returns the reconstruction and commitment losses (2,), all encoder outputs (N, D) and the
    codes (N,) that they were quantized to.
    """
    losses, vectors, codes = [], [], []
    parts = images.split(cfg.micro_batch)
    for part in parts:
        reconstruction, commit, part_vectors, part_codes = forward(part)
        error = F.mse_loss(reconstruction, part) / VARIANCE
        loss = error + cfg.commit_weight * commit
        if cfg.edge_weight:
            loss = loss + cfg.edge_weight * edge_error(reconstruction - part) / VARIANCE
        (loss / len(parts)).backward()
        losses.append(torch.stack([error, commit]).detach())  # (2,)
        vectors.append(part_vectors)
        codes.append(part_codes.flatten())
    return torch.stack(losses).mean(0), torch.cat(vectors), torch.cat(codes)


def init_codebook(model: VQVAE, images: Tensor, per_step: int, generator: torch.Generator) -> None:
    """Initialize the codebook by k-means over encoder outputs of images (N, 3, S, S)."""
    with torch.no_grad():
        vectors = torch.cat([model(part)[2] for part in images.split(32)])  # (N * G * G, D)
    chosen = torch.randperm(len(vectors), generator=generator)[:KMEANS_VECTORS]
    model.quantizer.kmeans_init(vectors[chosen.to(vectors.device)], generator, per_step=per_step)


def update_codebook(
    cfg: Config, model: VQVAE, vectors, codes, step: int, steps: int, found_inf: Tensor
) -> Tensor:
    """Move codes towards the vectors (N, D) quantized to them and replace unused codes, unless
    found_inf () is 1.

    Returns how many were replaced, ().
    """
    quantizer, revived = model.quantizer, torch.zeros((), dtype=torch.long, device=codes.device)
    before = [buffer.clone() for buffer in quantizer.buffers()]
    if step <= 0.95 * steps:
        quantizer.update(vectors, codes)
    if step % cfg.revive_every == 0 and step <= 0.8 * steps:
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        threshold = 0.1 * len(vectors) / cfg.model.codebook_size
        revived = quantizer.revive(vectors, threshold, generator)
    for buffer, old in zip(quantizer.buffers(), before, strict=True):
        buffer.copy_(old.where(found_inf > 0, buffer))
    return revived


def measure_probe(cfg: Config, model: VQVAE, train, val_images: Tensor, device) -> float:
    """How predictable codes are, in nats per code: the loss of a small network trained on them."""
    print("training a probe that predicts codes from their neighbors", flush=True)
    indices = evenly_spaced(len(train), PROBE_CODES // cfg.model.grid**2)
    images = unaugmented_images(train, indices, cfg.model.image_size, torch.device("cpu"))

    def encode(images: Tensor) -> Tensor:
        return torch.cat([model.encode(part.to(device)) for part in images.split(50)])  # (N, G, G)

    return probe_nats(encode(images), encode(val_images), cfg.model.codebook_size, cfg.probe_steps)


def write_reconstructions(metrics: Metrics, step: int, model: VQVAE, images: Tensor) -> None:
    """Write images (N, 3, S, S) in a row above their reconstructions to samples/STEP.png."""
    rows = np.concatenate([to_uint8(images), to_uint8(model.decode(model.encode(images)))])
    scale = -(-96 // len(rows[0]))  # small images are enlarged by repeating pixels
    rows = rows.repeat(scale, axis=1).repeat(scale, axis=2)  # (2 N, side, side, 3)
    path = metrics.run / "samples" / f"{step:07d}.png"
    image_grid(rows, columns=len(images)).save(path)
    metrics.image_samples(step, path, f"step {step}, originals over reconstructions")


def describe(
    cfg: Config, run: Path, first: int, model: VQVAE, train, n_scored: int, n_val: int, baseline
) -> None:
    """Print what is about to run."""
    size, grid, n_codes = cfg.model.image_size, cfg.model.grid, cfg.model.codebook_size
    params = sum(p.numel() for p in model.parameters())
    inputs = f"crops of {cfg.crop} pixels" if cfg.crop else "images"
    epochs = cfg.images / len(train)
    print_setup(
        cfg,
        run,
        first,
        model=f"{params:,} parameters, {size} x {size} pixels to {grid} x {grid} tokens of "
        f"{n_codes:,} codes",
        data=f"{len(train):,} images, {epochs:.2f} epochs; validation on {n_scored} of {n_val:,}",
        batch=f"{cfg.batch_images} {inputs}, {cfg.micro_batch} per forward pass",
        baseline=f"{baseline:.2f} dB: a palette of {n_codes:,} colors, no network",
    )


def main(cfg: Config) -> dict:
    """Train as cfg says and return the summary. Raises UserError."""
    # ---- set-up
    started = time.perf_counter()
    steps = resolve_recipe(cfg)
    device = join_ranks(cfg)
    resolve_micro_batch(cfg)
    run = check_run(cfg)
    if summary := finished_summary(run):
        return summary
    shape, size, batch = cfg.model, cfg.model.image_size, cfg.batch_images
    side = cfg.crop or size
    codes_per_step = batch * (side // shape.downsample) ** 2

    # ---- data
    val = load_images(cfg.data, "val", size)
    train = load_images(cfg.data, "train", size)
    val_indices = evenly_spaced(len(val), cfg.eval_images)
    val_images = unaugmented_images(val, val_indices, size, torch.device("cpu"))
    start_indices = evenly_spaced(len(train), KMEANS_IMAGES)
    start_images = unaugmented_images(train, start_indices, size, device)
    if len(start_images) * shape.grid**2 < shape.codebook_size:
        raise UserError(
            f"--model.codebook_size is {shape.codebook_size}, but the {len(start_images)} images "
            f"that initialize it yield only {len(start_images) * shape.grid**2} vectors; lower "
            "--model.codebook_size or --model.downsample, or add images (up to 256 are used)"
        )

    def read(step: int) -> Tensor:
        indices = share(batch_indices(step, batch, len(train), cfg.seed))
        epochs = share(batch_epochs(step, batch, len(train))) if cfg.data.augment else None
        return pinned(load_pixels(train, indices, epochs), device)  # (B, 3, s, s) uint8

    # ---- model
    generator = torch.Generator().manual_seed(cfg.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = VQVAE(shape, compute_dtype=getattr(torch, cfg.dtype)).to(device)
    flops = 6 * codes_per_step * sum(p.numel() for p in model.parameters() if p.ndim == 4)
    agree_on_compile(cfg, device, steps * flops, 2 * shape.n_blocks)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if cfg.compile else model

    # ---- optimizers
    adamw = torch.optim.AdamW(
        [{"params": list(model.parameters()), "peak_lr": cfg.lr}],
        lr=cfg.lr,
        betas=(0.9, 0.99),
        weight_decay=cfg.weight_decay,
        fused=True,
    )

    # ---- resume
    inputs = {"train": train.id, "val": val.id}
    state = resume(cfg, run, model, [adamw], lambda step: inputs)
    first, clock = state["step"], Clock(device, state["train_seconds"])
    if first == 0:
        state["palette_psnr"] = palette_psnr(start_images, val_images, shape, generator)
        init_codebook(model, start_images, codes_per_step, generator)
    describe(cfg, run, first, model, train, len(val_images), len(val), state["palette_psnr"])

    # ---- warm-up
    if cfg.compile:
        with warming_up(model, adamw):
            zeros = torch.zeros(cfg.micro_batch, 3, side, side, device=device)
            zeros = zeros.contiguous(memory_format=torch.channels_last)  # as real images are
            for _ in range(2):
                backward(forward, zeros, cfg)
                update([adamw], torch.zeros((), device=device))

    # ---- loop
    units = {"unit": "images", "per_step": batch, "flops": flops}
    metrics = Metrics(run, cfg, state, steps, started=started, clock=clock, **units)

    def evaluate_now(step: int) -> None:
        if rank():
            return
        values = reconstruction_metrics(model, val_images, min(50, cfg.micro_batch), device)
        used = values["codes_used"]
        metrics.line(
            f"val {step}/{steps} | psnr {values['val_psnr']:.2f} dB "
            f"(5th percentile {values['val_psnr_p5']:.2f}) | ssim {values['val_ssim']:.4f} | "
            f"codes {used} | perplexity {values['code_perplexity']:.0f}"
        )
        if used < shape.codebook_size / 10:
            metrics.line(
                f"warning: only {used} of {shape.codebook_size} codes are in use; the codebook "
                "has collapsed or the images have few colors"
            )
        write_reconstructions(metrics, step, model, val_images[:12].to(device))
        metrics.row(step=step, **values)  # last: marks a complete evaluation

    batches = prefetch(read, first, steps, device)
    with training_loop(cfg, metrics, model, [adamw], state, evaluate_now) as after_step:
        for step, pixels in after_step.batches(batches):
            progress = step / steps
            factor = trapezoid(progress, cfg.warmup_frac, cfg.cooldown_frac, 0.0)
            set_lr([adamw], factor)
            images = to_float(pixels, size, device)  # (B, 3, S, S)
            if cfg.crop:
                images = random_crops(images, cfg.crop, share(random_corners(cfg, step)))
            losses, vectors, codes = backward(forward, images, cfg)
            average_gradients(model, losses)
            vectors, codes = gather(vectors), gather(codes)  # (N, D), (N,) of all ranks
            norm = clipped_norm(model, cfg.grad_clip)
            found_inf = after_step.found_inf(losses, norm)
            update([adamw], found_inf)
            revived = update_codebook(cfg, model, vectors, codes, step, steps, found_inf)
            values = dict(zip(("loss", "commit"), losses, strict=True))
            values |= {"codes": model.quantizer.n_used(codes), "revived": revived}
            after_step(step, **values, grad_norm=norm, lr=cfg.lr * factor)

    # ---- summary
    last = evaluations(run)[-1]
    results = {key: last[key] for key in last if key not in ("step", "images")}
    results["palette_psnr"] = state["palette_psnr"]
    if cfg.probe_steps and rank() == 0:
        results["probe_nats"] = measure_probe(cfg, model, train, val_images, device)
    return metrics.finish(model, steps * codes_per_step, **results)


if __name__ == "__main__":
    run_script(main, Config, prog="train_vqvae.py", description=__doc__)
