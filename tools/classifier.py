"""The judge of drawn pictures: a small classifier trained from scratch on real ones, and distances between features.

It is never part of a loss, so what it says of drawn pictures is independent of what drew them. Its features stand in
for Inception's: distances compare under one recipe and seed, not with published ones. Shapes: N pictures of side S.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from torch import Tensor, nn

from common import Clock, UserError, trapezoid

SIDE = 32  # pixels the network reads


@dataclass
class Recipe:
    """How a classifier is made."""

    width: int = 64  # channels after the first halving; the features have four times as many
    epochs: int = 30
    batch: int = 512
    lr: float = 0.4  # the peak, reached in a straight line in the first `warmup` of the steps; then down to 0
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    crop: int = 4  # pixels a picture is shifted at most, its border reflected
    cutout: int = 8  # side of the square that is blanked (arXiv 1708.04552); 0: none


# The second is for minutes on two cores: smaller batches make the most of few epochs, which cutout would only slow.
RECIPES = {"gpu": Recipe(), "cpu": Recipe(width=16, epochs=10, batch=256, lr=0.2, cutout=0)}


def conv(d_in: int, d_out: int, *pool: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(d_in, d_out, 3, padding=1, bias=False), *pool, nn.BatchNorm2d(d_out), nn.ReLU()
    )


class Classifier(nn.Module):
    """A residual net (arXiv 1512.03385) of ten convolutions and a linear head, for float pictures in [-1, 1]."""

    def __init__(self, n_classes: int, width: int):
        super().__init__()
        # few channels where there are many pixels: there a channel costs the most and brings the least
        widths = [width // 2, width, 4 * width, 4 * width]
        self.stem = conv(3, widths[0])
        self.downs = nn.ModuleList(conv(a, b, nn.MaxPool2d(2)) for a, b in pairwise(widths))
        self.branches = nn.ModuleList(nn.Sequential(conv(d, d), conv(d, d)) for d in widths[1:])
        self.head = nn.Linear(widths[-1], n_classes)
        self.to(memory_format=torch.channels_last)

    def features(self, pictures: Tensor) -> Tensor:
        """(N, d) for pictures (N, 3, S, S), S a multiple of 32; larger ones are reduced by averaging over areas."""
        side = pictures.shape[-1]
        assert pictures.shape[1:] == (3, side, side) and side % SIDE == 0, (
            f"pictures {tuple(pictures.shape)}"
        )
        x = F.avg_pool2d(pictures, side // SIDE).contiguous(
            memory_format=torch.channels_last
        )  # (N, 3, 32, 32)
        x = self.stem(x)
        for down, branch in zip(self.downs, self.branches):
            x = down(x)
            x = x + branch(x)
        return x.mean((2, 3))  # (N, d, 4, 4) to (N, d)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))  # (N, classes)


def augment(pictures: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mirrored, shifted and partly blanked copies of pictures (B, 3, 32, 32); drawn on the CPU for any device."""
    flip, top, left, hole_top, hole_left = torch.rand(5, len(pictures), generator=generator).to(
        pictures.device
    )
    pictures = torch.where((flip < 0.5)[:, None, None, None], pictures.flip(3), pictures)
    windows = (
        F.pad(pictures, [recipe.crop] * 4, mode="reflect").unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    )
    shifts, places = 2 * recipe.crop + 1, SIDE - recipe.cutout + 1
    pictures = windows[
        torch.arange(len(pictures)), :, (top * shifts).long(), (left * shifts).long()
    ]  # (B, 3, S, S)
    pixels = torch.arange(SIDE, device=pictures.device)
    rows, columns = (
        pixels - (draw * places).long()[:, None] for draw in (hole_top, hole_left)
    )  # (B, S) from a corner
    hole = ((rows >= 0) & (rows < recipe.cutout))[:, :, None] & (
        (columns >= 0) & (columns < recipe.cutout)
    )[:, None, :]
    return pictures.masked_fill(hole[:, None], 0.0)


def train_classifier(
    pictures: Tensor,
    labels: Tensor,
    n_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress=print,
) -> Classifier:
    """A classifier in eval mode, of uint8 pictures (N, 3, 32, 32) and labels (N,); `progress` gets a line an epoch.

    Weights are fp32, the computation is in `dtype`. Raises UserError when the loss stops being a number.
    """
    assert pictures.dtype == torch.uint8 and pictures.shape == (len(labels), 3, SIDE, SIDE), (
        f"{pictures.shape}"
    )
    pictures, labels, generator = (
        pictures.to(device),
        labels.to(device),
        torch.Generator().manual_seed(seed),
    )
    with torch.random.fork_rng(devices=[]):  # modules draw their weights from the global generator
        torch.default_generator.manual_seed(seed)
        classifier = Classifier(n_classes, recipe.width).to(device).train()
    optimizer = torch.optim.SGD(
        classifier.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
    clock, batch = Clock(device), min(recipe.batch, len(pictures))
    per_epoch = len(pictures) // batch  # what is left over is another part in every epoch
    for epoch in range(recipe.epochs):
        clock.start()
        sums, order = (
            torch.zeros(2, device=device),
            torch.randperm(len(pictures), generator=generator).to(device),
        )
        for step in range(per_epoch):
            done = (epoch * per_epoch + step + 1) / (recipe.epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = recipe.lr * trapezoid(
                done, recipe.warmup, 1 - recipe.warmup, 0.0
            )
            picked = order[step * batch : (step + 1) * batch]
            x = augment(pictures[picked].float() / 127.5 - 1, recipe, generator)  # (B, 3, 32, 32)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = classifier(x)  # (B, classes)
            loss = F.cross_entropy(
                logits.float(), labels[picked], label_smoothing=recipe.label_smoothing
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sums += torch.stack(
                [loss.detach(), (logits.argmax(1) == labels[picked]).float().mean()]
            )
        clock.stop()
        loss, accuracy = (sums / per_epoch).tolist()
        progress(
            f"classifier: epoch {epoch + 1}/{recipe.epochs} | loss {loss:.3f} | accuracy on training batches "
            f"{accuracy:.3f} | {clock.seconds:.1f} s"
        )
        if not math.isfinite(loss):
            raise UserError(
                f"classifier: loss {loss} in epoch {epoch + 1}: lower the recipe's lr {recipe.lr}"
            )
    return classifier.eval()


def load_classifier(
    cache: Path,
    pictures: Tensor,
    labels: Tensor,
    n_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress=print,
) -> Classifier:
    """The classifier of these pictures, recipe and seed: trained once, kept in a folder of `cache`. Raises UserError."""
    data = [
        hashlib.sha256(t.cpu().contiguous().numpy()).hexdigest() for t in (pictures, labels.long())
    ]
    made_of = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "n_classes": n_classes,
        "data": data,
    }
    folder = (
        cache
        / f"classifier-{hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]}"
    )
    if not folder.exists():
        trained = train_classifier(
            pictures, labels, n_classes, recipe, seed, device, dtype, progress
        )
        tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        tmp.mkdir(parents=True)
        save_file(
            {name: w.contiguous() for name, w in trained.state_dict().items()},
            tmp / "classifier.safetensors",
        )
        sha256 = hashlib.sha256((tmp / "classifier.safetensors").read_bytes()).hexdigest()
        (tmp / "classifier.json").write_text(json.dumps({**made_of, "sha256": sha256}, indent=2))
        shutil.rmtree(tmp) if folder.exists() else tmp.rename(
            folder
        )  # another process may have been faster
    classifier = Classifier(n_classes, recipe.width)
    try:
        weights = (folder / "classifier.safetensors").read_bytes()
        if (
            hashlib.sha256(weights).hexdigest()
            != json.loads((folder / "classifier.json").read_text())["sha256"]
        ):
            raise ValueError("not the sha256 of classifier.json")
        classifier.load_state_dict(load(weights))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder} is damaged ({reason}): delete it to train the classifier again"
        ) from error
    return classifier.to(device).eval()


@torch.no_grad()
def judge(classifier: Classifier, pictures: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and features (N, d) in fp32 of float pictures (N, 3, S, S), where the pictures are."""
    device = classifier.head.weight.device
    features = torch.cat([classifier.features(part.to(device)) for part in pictures.split(batch)])
    return classifier.head(features).to(pictures.device), features.to(pictures.device)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians that fit features (N, d) and (M, d), in float64 (arXiv 1706.08500); N and M at least 2.

    Finite samples raise it, by about 1/N: compare equal numbers of them.
    """
    assert min(len(a), len(b)) > 1, f"covariances of {len(a)} and {len(b)} samples"
    a, b = a.double(), b.to(a.device, torch.float64)
    cov_a, cov_b = a.T.cov(), b.T.cov()  # (d, d)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (
        (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed
    ).item()


def kernel_distance(
    a: Tensor, b: Tensor, subset: int = 1000, subsets: int = 100, seed: int = 0
) -> float:
    """Unbiased squared MMD of features (N, d) and (M, d), kernel (x.y/d + 1)^3 (arXiv 1801.01401); N and M at least 2.

    The mean over random subsets of min(subset, N, M); for one distribution around 0, so by chance negative.
    """
    m = min(subset, len(a), len(b))
    assert m > 1, f"an unbiased estimate from {m} samples"
    a, b = a.double(), b.to(a.device, torch.float64)
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for _ in range(subsets):
        x, y = (t[torch.randperm(len(t), generator=generator)[:m]] for t in (a, b))  # (m, d)
        xx, yy, xy = (
            (u @ v.T / a.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))
        )  # (m, m)
        total += (xx.sum() - xx.trace() + yy.sum() - yy.trace()).item() / (
            m * (m - 1)
        ) - 2 * xy.mean().item()
    return total / subsets


def diversity(features: Tensor, labels: Tensor) -> float:
    """Mean cosine distance of two different features (N, d) of one class, averaged over classes with at least two."""
    spreads = []
    for label in labels.unique():
        f = F.normalize(features[labels == label].double(), dim=1)  # (n, d)
        if (
            len(f) > 1
        ):  # the sum over all pairs is the square of the sum: no (n, n) matrix is needed
            similarity = (f.sum(0).square().sum() - f.square().sum()) / (len(f) * (len(f) - 1))
            spreads.append(1 - similarity.item())
    assert spreads, f"no class has two of the {len(labels)} samples"
    return sum(spreads) / len(spreads)


def nearest(queries: Tensor, pool: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Index (N,) in pool (M, D) and Euclidean distance (N,) of what is nearest to each of queries (N, D).

    In float64, because |p|^2 - 2 p.q cancels and TF32 would mistake neighbours; chunk x chunk pairs at a time.
    """
    indices, distances = [], []
    for q in (part.double() for part in queries.split(chunk)):
        best, index = (
            q.new_full((len(q),), math.inf),
            torch.zeros(len(q), dtype=torch.long, device=q.device),
        )
        for start in range(0, len(pool), chunk):
            p = pool[start : start + chunk].double()
            low, where = (p.square().sum(1) - 2 * q @ p.T).min(
                1
            )  # (n,) of (n, chunk), |q|^2 left out
            index, best = torch.where(low < best, where + start, index), torch.minimum(low, best)
        indices.append(index)
        distances.append((q - pool[index].double()).norm(dim=1))  # taken anew: exactly 0 for a copy
    return torch.cat(indices), torch.cat(distances)
