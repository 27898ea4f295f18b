"""Train the visual tokenizer: pictures to a grid of visual words and back, from nothing but pictures.

python train_vqvae.py --config configs/vqvae_cifar10.yaml     # 128 x 128 to 32 x 32 of 1,024 words, one GPU
python train_vqvae.py --config configs/vqvae_demo.yaml        # a minute on a laptop, no GPU, no network
python train_vqvae.py --run NAME --resume                     # go on where NAME stopped
"""

import json
import math
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    Clock,
    Count,
    Interrupt,
    RunConfig,
    UserError,
    check_not_negative,
    check_positive,
    check_run,
    check_shares,
    checkpoints,
    device_name,
    load_checkpoint,
    milestones,
    open_run,
    resolve_device,
    run_script,
    save_checkpoint,
    stop,
    trapezoid,
)
from data.images import (
    ImageConfig,
    load_pictures,
    load_pixels,
    picks,
    plain_pictures,
    scaled,
    sheet,
    spread,
    to_uint8,
)
from data.order import prefetch
from metrics import Metrics, evaluated, read_metrics
from vqvae import VARIANCE, VQVAE, Quantizer, VQVAEConfig

START_PICTURES, START_VECTORS = (
    256,
    65_536,
)  # for the k-means start: few pictures hold few of the colours
PROBE_PICTURES = 1000


@dataclass
class Config(RunConfig):
    """Settings of a run. `auto` is filled in and printed at the start."""

    images: Count = Count("400k")
    """Budget: pictures seen, or crops of them."""
    batch_images: int = 64
    """Pictures a step."""
    crop: int = 0
    """Side of the random crops to train on, a multiple of model.downsample; 0 trains on whole pictures."""
    lr: float = 1e-3
    """AdamW's peak learning rate."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    commit: float = 0.25
    """Weight of the commitment loss, which holds features near their codes."""
    warmup_frac: float = 0.05
    """Share of the budget over which the learning rate rises."""
    cooldown_frac: float = 0.5
    """Share of the budget over which it falls to nothing at the end."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    revive_every: int = 20
    """Steps between looks for dead codes, until 0.8 of the budget; the codes rest from 0.95 of it."""
    eval_images: int = 500
    """Validation pictures of an evaluation, spread evenly over those there are."""
    probe_steps: int = 500
    """Training steps of the probe that says, at the end, how hard codes are to predict; 0 leaves it out."""
    data: ImageConfig = field(default_factory=ImageConfig)
    model: VQVAEConfig = field(default_factory=VQVAEConfig)


def resolve_recipe(cfg: Config) -> int:
    """Fill in what the budget decides and return the number of steps. Raises UserError."""
    check_positive(cfg, "images", "batch_images", "lr", "revive_every", "eval_images")
    check_not_negative(cfg, "seed", "weight_decay", "commit", "grad_clip", "probe_steps", "crop")
    check_shares(cfg, "warmup_frac", "cooldown_frac", "eval_every", "save_every")
    steps = cfg.images // cfg.batch_images
    if steps < 1:
        raise UserError(
            f"--images {cfg.images} is less than one step of --batch_images {cfg.batch_images}"
        )
    if cfg.crop % cfg.model.downsample or cfg.crop > cfg.model.image_size:
        raise UserError(
            f"--crop {cfg.crop} must be a multiple of --model.downsample {cfg.model.downsample}, at most "
            f"--model.image_size {cfg.model.image_size}"
        )
    if cfg.log_every == "auto":
        cfg.log_every = max(1, steps // 50)
    if cfg.micro_batch == "auto":
        cfg.micro_batch = cfg.batch_images
    check_positive(cfg, "log_every", "micro_batch")
    if cfg.batch_images % cfg.micro_batch:
        raise UserError(
            f"--micro_batch {cfg.micro_batch} does not divide --batch_images {cfg.batch_images}"
        )
    return steps


def random_crops(pictures: Tensor, crop: int, downsample: int, rng: np.random.Generator) -> Tensor:
    """A crop (B, 3, crop, crop) of each picture (B, 3, S, S), aligned with the grid."""
    corners = downsample * rng.integers(
        0, (pictures.shape[-1] - crop) // downsample + 1, size=(len(pictures), 2)
    )
    return torch.stack([p[:, y : y + crop, x : x + crop] for p, (y, x) in zip(pictures, corners)])


def backward(forward, pictures: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulate the gradient over pictures (B, 3, S, S); the loss terms (2,), all features (N, D) and codes (N,)."""
    terms, vectors, codes = [], [], []
    parts = pictures.split(cfg.micro_batch)
    for part in parts:
        reconstruction, commit, found, chosen = forward(part)
        error = F.mse_loss(reconstruction, part) / VARIANCE
        ((error + cfg.commit * commit) / len(parts)).backward()
        terms.append(torch.stack([error, commit]).detach())
        vectors.append(found)
        codes.append(chosen.flatten())
    return torch.stack(terms).mean(0), torch.cat(vectors), torch.cat(codes)


# ----------------------------------------------------------------------------------------------------- evaluation
def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of pictures (B, 3, S, S) in [-1, 1], as 8-bit pictures."""
    eight_bit = lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round()  # noqa: E731
    mse = (
        (eight_bit(a) - eight_bit(b)).square().mean((1, 2, 3)).clamp(min=1e-2)
    )  # equal pictures have 68 dB, not infinity
    return 10 * torch.log10(255**2 / mse)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (B,) of pictures (B, 3, S, S) in [-1, 1] (Wang et al. 2004: Gaussian of 1.5 over 11 x 11)."""
    gauss = torch.exp(-torch.arange(-5.0, 6.0, device=a.device).square() / (2 * 1.5**2))
    window = torch.outer(gauss, gauss).div(gauss.sum() ** 2).expand(3, 1, 11, 11)
    mean = lambda x: F.conv2d(x, window, groups=3)  # noqa: E731
    a, b = (a + 1) / 2, (b + 1) / 2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean(
        (1, 2, 3)
    )


@torch.no_grad()
def evaluate(model: VQVAE, pictures: Tensor, batch: int, device: torch.device) -> dict:
    """How well pictures (N, 3, S, S) come back, and how much of the codebook they use."""
    ratios, similar, error = [], [], 0.0
    counts = torch.zeros(model.config.codebook_size, device=device)
    for part in pictures.split(batch):
        part = part.to(device)
        codes = model.encode(part)
        back = model.decode(codes)
        ratios.append(psnr(back, part))
        similar.append(ssim(back, part))
        error += F.mse_loss(back, part).item() * len(part) / len(pictures)
        counts += codes.flatten().bincount(minlength=len(counts))
    ratios, p = torch.cat(ratios), counts / counts.sum()
    return {
        "val_loss": error / VARIANCE,
        "val_psnr": ratios.mean().item(),
        "val_psnr_p5": ratios.quantile(0.05).item(),
        "val_ssim": torch.cat(similar).mean().item(),
        "codes_used": int((counts > 0).sum()),
        "code_perplexity": math.exp(-torch.special.xlogy(p, p).sum().item()),
    }


def palette_psnr(
    train: Tensor, val: Tensor, config: VQVAEConfig, generator: torch.Generator
) -> float:
    """PSNR of val (N, 3, S, S) with no network: a k-means palette of `train`, one colour a cell, made smooth again.

    A tokenizer that stays below this learned nothing worth its training.
    """
    small = lambda x: F.interpolate(x, scale_factor=1 / config.downsample, mode="bilinear")  # noqa: E731
    palette = Quantizer(config.codebook_size, 3).to(train.device)
    colours = small(train).permute(0, 2, 3, 1).reshape(-1, 3)
    palette.start(
        colours[torch.randperm(len(colours), generator=generator)[:START_VECTORS].to(train.device)],
        generator,
        1,
    )
    found = []
    for part in val.to(train.device).split(50):
        cells = small(part)  # (B, 3, h, h)
        near = palette.codes[palette(cells.permute(0, 2, 3, 1).reshape(-1, 3))]
        back = near.view(len(part), *cells.shape[2:], 3).permute(0, 3, 1, 2)
        found.append(
            psnr(F.interpolate(back, scale_factor=config.downsample, mode="bilinear"), part)
        )
    return torch.cat(found).mean().item()


def probe_nats(train: Tensor, val: Tensor, codebook_size: int, steps: int) -> float:
    """How hard codes (N, h, h) are to predict: the loss on val, in nats a code, of a small network trained on the six
    causal neighbours (two to the left, left-up, up, right-up, two up). A transformer that is not below it is broken.
    """

    def neighbours(codes: Tensor) -> tuple[Tensor, Tensor]:
        h = codes.shape[1]
        padded = F.pad(codes, (2, 1, 2, 0), value=codebook_size)
        shifts = ((0, 1), (0, 2), (1, 1), (1, 0), (1, -1), (2, 0))  # up, left
        near = torch.stack(
            [padded[:, 2 - up : 2 - up + h, 2 - left : 2 - left + h] for up, left in shifts], dim=-1
        )
        return near.flatten(0, 2), codes.flatten()  # (N h h, 6), (N h h,)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embed = nn.Embedding(codebook_size + 1, 32)
        network = nn.Sequential(
            embed, nn.Flatten(), nn.Linear(6 * 32, 256), nn.SiLU(), nn.Linear(256, codebook_size)
        )
    network.to(train.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    inputs, targets = neighbours(train)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        batch = torch.randint(len(targets), (4096,), generator=generator).to(train.device)
        F.cross_entropy(network(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs, targets = neighbours(val)
    with torch.no_grad():
        losses = [
            F.cross_entropy(network(x), y, reduction="sum")
            for x, y in zip(inputs.split(65_536), targets.split(65_536))
        ]
    return sum(losses).item() / len(targets)


def main(cfg: Config) -> dict:
    """Train as cfg says and return the summary. Raises UserError."""
    # ---- set-up
    steps = resolve_recipe(cfg)
    device = resolve_device(cfg)
    run = check_run(cfg)
    if (run / "summary.json").exists():
        print(f"{run} is finished; delete the folder to train it anew")
        return json.loads((run / "summary.json").read_text())

    # ---- data
    size, shape = cfg.model.image_size, cfg.model
    val = load_pictures(cfg.data, "val", size)
    train = load_pictures(cfg.data, "train", size)
    val_pictures = plain_pictures(val, spread(val, cfg.eval_images), size, torch.device("cpu"))
    start = plain_pictures(train, spread(train, START_PICTURES), size, device)
    if len(start) * shape.grid**2 < shape.codebook_size:
        raise UserError(
            f"{len(train)} pictures have {len(start) * shape.grid**2} cells, fewer than --model.codebook_size "
            f"{shape.codebook_size}: give more pictures, or fewer codes"
        )
    open_run(cfg, run)

    def read(step: int) -> Tensor:
        indices, draws = picks(step, cfg.batch_images, len(train), cfg.seed)
        return load_pixels(train, indices, draws if cfg.data.augment else None)

    # ---- model
    generator = torch.Generator().manual_seed(cfg.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = VQVAE(cfg.model, compute_dtype=getattr(torch, cfg.dtype)).to(device)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if cfg.compile else model

    # ---- optimizers
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True
    )

    # ---- resume
    state = {"step": 0, "train_seconds": 0.0}
    cells = (cfg.crop or size) // shape.downsample
    if saved := checkpoints(run):
        state = load_checkpoint(saved[-1], model, [optimizer])
    else:
        state["palette_psnr"] = palette_psnr(start, val_pictures, shape, generator)
        with torch.no_grad():
            vectors = torch.cat([model(part)[2] for part in start.split(32)])
        few = torch.randperm(len(vectors), generator=generator)[:START_VECTORS].to(device)
        model.quantizer.start(vectors[few], generator, per_step=cfg.batch_images * cells**2)
    first, clock = state["step"], Clock(device, state["train_seconds"])
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 4)
    print(
        f"run {run}, {f'resumed at step {first}' if first else 'from scratch'}\n"
        f"device {device_name(device)}, {cfg.dtype}, {'compiled' if cfg.compile else 'not compiled'}\n"
        f"model {sum(p.numel() for p in model.parameters()):,} parameters, {size} x {size} pixels to {shape.grid} x "
        f"{shape.grid} of {shape.codebook_size} codes\n"
        f"data {len(train):,} pictures, {cfg.images / len(train):.2f} passes; validation on {len(val_pictures)} of {len(val):,}\n"
        f"steps {steps} of {cfg.batch_images} {f'crops of {cfg.crop}' if cfg.crop else 'pictures'}, {cfg.micro_batch} at a time\n"
        f"bar a palette of {shape.codebook_size} colours without a network: {state['palette_psnr']:.2f} dB",
        flush=True,
    )

    # ---- warm-up
    if cfg.compile:
        before = deepcopy([model.state_dict(), optimizer.state_dict()])
        side = cfg.crop or size
        for _ in range(2):
            backward(forward, torch.zeros(cfg.micro_batch, 3, side, side, device=device), cfg)
            optimizer.step()
            optimizer.zero_grad()
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])

    # ---- loop
    metrics = Metrics(
        run,
        cfg,
        first,
        steps,
        clock=clock,
        unit="images",
        per_step=cfg.batch_images,
        flops=6 * weights * cells**2 * cfg.batch_images,
    )

    def evaluate_now(step: int) -> None:
        found = evaluate(model, val_pictures, min(50, cfg.micro_batch), device)
        metrics.row(step=step, **found)
        metrics.line(
            f"val {step}/{steps} | psnr {found['val_psnr']:.2f} dB (5% below {found['val_psnr_p5']:.2f}) | ssim "
            f"{found['val_ssim']:.4f} | codes {found['codes_used']} | perplexity {found['code_perplexity']:.0f}"
        )
        if found["codes_used"] < shape.codebook_size / 10:
            metrics.line(
                f"warning: only {found['codes_used']} of {shape.codebook_size} codes are in use: the codebook has "
                "collapsed, or the pictures hold no more"
            )
        some = val_pictures[:12].to(device)
        rows = np.concatenate([to_uint8(some), to_uint8(model.decode(model.encode(some)))])
        sheet(rows, columns=len(some)).save(run / "samples" / f"{step:07d}.png")

    evals, saves = milestones(steps, cfg.eval_every), milestones(steps, cfg.save_every)
    if first in evals and not evaluated(run, first):
        evaluate_now(first)
    with Interrupt() as interrupt:
        clock.start()
        for step, pixels in enumerate(prefetch(read, first, steps, device), start=first + 1):
            lr = cfg.lr * trapezoid(step / steps, cfg.warmup_frac, cfg.cooldown_frac, 0.0)
            optimizer.param_groups[0]["lr"] = lr
            pictures = scaled(pixels, size, device)
            if cfg.crop:
                pictures = random_crops(
                    pictures, cfg.crop, shape.downsample, np.random.default_rng((cfg.seed, step))
                )
            terms, vectors, codes = backward(forward, pictures, cfg)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if cfg.grad_clip:
                nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip, norm)
            loss, commit, norm = *terms.tolist(), norm.item()
            if not math.isfinite(loss + commit + norm):
                raise UserError(
                    f"loss {loss}, gradient norm {norm} at step {step}: stopped before the weights changed; "
                    f"the last checkpoint is {[None, *checkpoints(run)][-1]}; try a lower --lr"
                )
            optimizer.step()
            optimizer.zero_grad()
            if step <= 0.95 * steps:
                model.quantizer.update(vectors, codes)
            revived = 0
            if step % cfg.revive_every == 0 and step <= 0.8 * steps:
                generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
                revived = model.quantizer.revive(
                    vectors, 0.1 * len(vectors) / shape.codebook_size, generator
                )
            metrics.row(
                step=step,
                loss=loss,
                commit=commit,
                codes=len(codes.unique()),
                revived=revived,
                grad_norm=norm,
                lr=lr,
            )

            log, save = step % cfg.log_every == 0 or step == steps, step in saves or interrupt.code
            if not (log or save or step in evals):
                continue
            clock.stop()  # what follows is not training
            if log:
                metrics.log(step, loss, lr, norm)
            if save:
                save_checkpoint(
                    run, model, [optimizer], state | {"step": step, "train_seconds": clock.seconds}
                )
            if interrupt.code:
                metrics.close()
                stop(
                    f"stopped at step {step}, saved; go on with --run {cfg.run} --resume",
                    interrupt.code,
                )
            if step in evals:
                evaluate_now(step)
            clock.start()

    # ---- summary
    last = next(row for row in reversed(read_metrics(run)) if "val_loss" in row)
    found = {key: last[key] for key in last if key not in ("step", "images")} | {
        "palette_psnr": state["palette_psnr"]
    }
    if cfg.probe_steps:
        print("probing how hard the codes are to predict", flush=True)
        some = plain_pictures(train, spread(train, PROBE_PICTURES), size, torch.device("cpu"))
        codes = [
            torch.cat([model.encode(part.to(device)) for part in pictures.split(50)])
            for pictures in (some, val_pictures)
        ]
        found["probe_nats"] = probe_nats(*codes, shape.codebook_size, cfg.probe_steps)
    return metrics.finish(model, steps * cfg.batch_images * cells**2, **found)


if __name__ == "__main__":
    run_script(Config, main)
