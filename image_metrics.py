"""Image tokenizer metrics: PSNR, SSIM, a palette baseline, and the predictability of the codes.

Shapes: B and N images, S image side, G side of the token grid, K codebook size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae import VARIANCE, VQVAE, Quantizer, VQVAEConfig

KMEANS_VECTORS = 65_536  # at most this many vectors initialize a codebook


# ---- reconstruction quality
def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, 3, S, S) in [-1, 1], rounded to 8 bits.

    Identical images have 68 dB, not infinity.
    """
    a, b = (((x.clamp(-1, 1) + 1) * 127.5).round() for x in (a, b))  # 0 to 255
    mse = (a - b).square().mean((1, 2, 3)).clamp(min=1e-2)  # (B,)
    return 10 * torch.log10(255**2 / mse)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (B,) of images (B, 3, S, S) in [-1, 1] (Wang et al., 2004).

    Local statistics are weighted by an 11 x 11 Gaussian window with a standard deviation of 1.5.
    """
    gauss = torch.exp(-torch.arange(-5.0, 6.0, device=a.device).square() / (2 * 1.5**2))
    window = torch.outer(gauss, gauss).div(gauss.sum() ** 2).expand(3, 1, 11, 11)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)  # (B, 3, S - 10, S - 10)

    a, b = (a + 1) / 2, (b + 1) / 2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return similarity.mean((1, 2, 3))  # (B,)


@torch.no_grad()
def reconstruction_metrics(
    model: VQVAE, images: Tensor, batch: int, device: torch.device
) -> dict[str, float]:
    """Reconstruction quality and codebook usage for images (N, 3, S, S) in [-1, 1].

    Runs `batch` images at a time on `device`. Returns val_loss (mean squared error / VARIANCE),
    val_psnr and val_psnr_p5 (mean and 5th percentile, dB), val_ssim, codes_used (of K) and
    code_perplexity (exponential of the entropy of code frequencies, 1 to K).
    """
    psnrs, ssims, mse = [], [], 0.0
    counts = torch.zeros(model.config.codebook_size, device=device)  # (K,)
    for part in images.split(batch):
        part = part.to(device)
        codes = model.encode(part)  # (B, G, G)
        decoded = model.decode(codes)  # (B, 3, S, S)
        psnrs.append(psnr(decoded, part))
        ssims.append(ssim(decoded, part))
        mse += F.mse_loss(decoded, part).item() * len(part) / len(images)
        counts += codes.flatten().bincount(minlength=len(counts))
    p = counts / counts.sum()
    return {
        "val_loss": mse / VARIANCE,
        "val_psnr": torch.cat(psnrs).mean().item(),
        "val_psnr_p5": torch.cat(psnrs).quantile(0.05).item(),
        "val_ssim": torch.cat(ssims).mean().item(),
        "codes_used": int((counts > 0).sum()),
        "code_perplexity": math.exp(-torch.special.xlogy(p, p).sum().item()),
    }


# ---- baselines
def palette_psnr(
    train: Tensor, val: Tensor, config: VQVAEConfig, generator: torch.Generator
) -> float:
    """Mean PSNR in dB on val (N, 3, S, S) of a color palette without a network.

    The palette is the k-means of the patch colors of train (N, 3, S, S). Each patch takes its
    nearest color, and bilinear upsampling smooths the result. A trained tokenizer must beat it.
    """
    side, palette = config.downsample, Quantizer(config.codebook_size, 3).to(train.device)
    colors = F.interpolate(train, scale_factor=1 / side, mode="bilinear")  # (N, 3, G, G)
    colors = colors.permute(0, 2, 3, 1).reshape(-1, 3)  # (N G G, 3)
    chosen = torch.randperm(len(colors), generator=generator)[:KMEANS_VECTORS]
    palette.kmeans_init(colors[chosen.to(train.device)], generator, per_step=1)
    psnrs = []
    for part in val.to(train.device).split(50):
        colors = F.interpolate(part, scale_factor=1 / side, mode="bilinear")  # (B, 3, G, G)
        codes = palette(colors.permute(0, 2, 3, 1).reshape(-1, 3))  # (B G G,)
        # (B G G, 3) to (B, G, G, 3) to (B, 3, G, G)
        nearest = palette.codes[codes].view(len(part), *colors.shape[2:], 3).permute(0, 3, 1, 2)
        psnrs.append(psnr(F.interpolate(nearest, scale_factor=side, mode="bilinear"), part))
    return torch.cat(psnrs).mean().item()


def probe_nats(train: Tensor, val: Tensor, codebook_size: int, steps: int) -> float:
    """Cross-entropy in nats per code of a small network that predicts val codes (N, G, G).

    The network sees six causal neighbors of each code and trains on train (N, G, G) for `steps`
    steps. It measures how predictable the codes are: a transformer that is not better is broken.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Embedding(codebook_size + 1, 32),
            nn.Flatten(),
            nn.Linear(6 * 32, 256),
            nn.SiLU(),
            nn.Linear(256, codebook_size),
        ).to(train.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    inputs, targets = causal_neighbors(train, codebook_size), train.flatten()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        batch = torch.randint(len(targets), (4096,), generator=generator).to(train.device)
        F.cross_entropy(network(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs, targets = causal_neighbors(val, codebook_size), val.flatten()
    with torch.no_grad():
        losses = [
            F.cross_entropy(network(x), y, reduction="sum")
            for x, y in zip(inputs.split(65_536), targets.split(65_536), strict=True)
        ]
    return sum(losses).item() / len(targets)


def causal_neighbors(codes: Tensor, padding: int) -> Tensor:
    """Six codes (N G G, 6) that precede each of codes (N, G, G); `padding` outside the image."""
    G = codes.shape[1]
    padded = F.pad(codes, (2, 1, 2, 0), value=padding)  # (N, G + 2, G + 3)
    shifts = ((0, 1), (0, 2), (1, 1), (1, 0), (1, -1), (2, 0))  # rows up, columns to the left
    near = [padded[:, 2 - up : 2 - up + G, 2 - left : 2 - left + G] for up, left in shifts]
    return torch.stack(near, dim=-1).flatten(0, 2)  # (N G G, 6)
