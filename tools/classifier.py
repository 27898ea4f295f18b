"""A small image classifier that judges generated images, and distances between its features.

The classifier is trained from scratch on real images and is never part of a loss, so its judgment
does not depend on the model that generated the images. Its features replace Inception features:
distances are comparable for the same recipe and seed, but not with published ones.
Shapes: N images of side S, feature dimension D.
"""

import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from torch import Tensor, nn

from common.config import UserError, first_line
from common.device import Clock
from common.disk import file_sha256, locked, write_text
from common.loop import trapezoid, update

SIDE = 32  # side in pixels of the images that the network reads


@dataclass
class Recipe:
    """Hyperparameters of a classifier."""

    width: int = 64  # channels after the first pooling; features have four times as many
    epochs: int = 12
    batch: int = 256
    lr: float = 0.4  # peak, after a linear warm-up; then linear decay to 0
    warmup: float = 0.2  # fraction of the steps
    momentum: float = 0.85
    weight_decay: float = 5e-4
    label_smoothing: float = 0.2
    shift: int = 2  # of training images, in pixels at most


RECIPES = {"gpu": Recipe(), "cpu": Recipe(width=32, epochs=7)}  # "cpu": minutes on two cores


def convolution(d_in: int, d_out: int, *pool: nn.Module) -> list[nn.Module]:
    """A 3 x 3 convolution, which passes its input through at first, with norm and activation."""
    conv = nn.Conv2d(d_in, d_out, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:d_in])
    return [conv, *pool, nn.BatchNorm2d(d_out, momentum=0.4), nn.GELU()]


class Classifier(nn.Module):
    """A convolutional network for float images in [-1, 1], after airbench94 (arXiv 2404.00498).

    The first convolution whitens patches of 2 x 2 pixels and is not trained.
    """

    def __init__(self, n_classes: int, width: int):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2).requires_grad_(False)
        widths = [24, width, 4 * width, 4 * width]
        layers = [nn.GELU()]
        for d_in, d_out in pairwise(widths):
            layers += convolution(d_in, d_out, nn.MaxPool2d(2)) + convolution(d_out, d_out)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], n_classes)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def init_whitening(self, images: Tensor) -> None:
        """Set the first convolution to the scaled principal components of the patches of images
        (N, 3, 32, 32), and their negatives.
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (N, 3, 31, 31, 2, 2)
        vectors = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)  # (M, 12)
        values, components = torch.linalg.eigh(vectors.double().T.cov())  # (12,), (12, 12)
        filters = (components / (values + 5e-4).sqrt()).T.view(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat((filters, -filters)))
        self.whiten.bias.zero_()

    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) of images (N, 3, S, S); S is a multiple of 32, average-pooled to 32."""
        shape, side = tuple(images.shape), images.shape[-1]
        assert shape[1:] == (3, side, side) and side % SIDE == 0, f"images of shape {shape}"
        x = F.avg_pool2d(images, side // SIDE)  # (N, 3, 32, 32)
        x = self.whiten(x.contiguous(memory_format=torch.channels_last))  # (N, 24, 31, 31)
        return self.layers(x).mean((2, 3))  # (N, D, 3, 3) -> (N, D)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # (N, classes)


# ---- training
def augment(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Randomly mirrored copies of images (B, 3, 32, 32), shifted by at most `shift` pixels.

    The border is reflected. The random numbers come from the CPU, so they are the same for all
    devices.
    """
    random = torch.rand(3, len(images), generator=generator).to(images.device)  # (3, B)
    images = torch.where((random[0] < 0.5)[:, None, None, None], images.flip(3), images)
    images = F.pad(images, [shift] * 4, mode="reflect")  # (B, 3, S + 2 shift, S + 2 shift)
    windows = images.unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # (B, 3, 2 shift + 1, 2 shift + 1, S, S)
    top, left = (random[1:] * (2 * shift + 1)).long()  # (B,) each
    return windows[torch.arange(len(images)), :, top, left]  # (B, 3, S, S)


def untrained(
    images: Tensor, n_classes: int, recipe: Recipe, seed: int, device: torch.device
) -> tuple[Classifier, torch.optim.Optimizer]:
    """A classifier for images such as uint8 (N, 3, 32, 32), in training mode, and its optimizer."""
    with torch.random.fork_rng(devices=[]):  # modules initialize from the global generator
        torch.default_generator.manual_seed(seed)
        model = Classifier(n_classes, recipe.width).to(device).train()
    model.init_whitening(images[:5000].cpu().float() / 127.5 - 1)  # in fp64, which MPS lacks
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
    return model, optimizer


def train_classifier(
    images: Tensor,
    labels: Tensor,
    n_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress=print,
    checkpoint: Path | None = None,
) -> Classifier:
    """Train on uint8 images (N, 3, 32, 32) and labels (N,); returns the classifier in eval mode.

    Weights are float32, the computation is in `dtype`. `progress` is called with a line per epoch.
    If `checkpoint` is given, the state is saved there after each epoch, and training continues from
    that file if it exists. Raises UserError if the loss is not finite or that file is damaged.
    """
    assert images.dtype == torch.uint8 and images.shape == (len(labels), 3, SIDE, SIDE), (
        f"{images.dtype} images {tuple(images.shape)} for {len(labels)} labels"
    )
    images, labels = images.to(device), labels.to(device)
    generator = torch.Generator().manual_seed(seed)
    model, optimizer = untrained(images, n_classes, recipe, seed, device)
    clock = Clock(device)
    batch = min(recipe.batch, len(images))
    steps = len(images) // batch  # per epoch, each of which leaves out a different remainder
    first = load_state(checkpoint, model, optimizer, generator) if checkpoint else 0
    for epoch in range(first, recipe.epochs):
        clock.start()
        totals = torch.zeros(2, device=device)  # loss and accuracy
        order = torch.randperm(len(images), generator=generator).to(device)  # (N,)
        for step in range(steps):
            done = (epoch * steps + step + 1) / (recipe.epochs * steps)
            factor = trapezoid(done, recipe.warmup, 1 - recipe.warmup, 0.0)
            optimizer.param_groups[0]["lr"] = recipe.lr * factor
            indices = order[step * batch : (step + 1) * batch]  # (B,)
            y = labels[indices]  # (B,)
            x = images[indices].float() / 127.5 - 1  # (B, 3, 32, 32)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(augment(x, recipe.shift, generator))  # (B, classes)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
            loss.backward()
            update([optimizer])
            totals += torch.stack([loss.detach(), (logits.argmax(1) == y).float().mean()])
        clock.stop()
        loss, accuracy = (totals / steps).tolist()
        progress(
            f"classifier: epoch {epoch + 1}/{recipe.epochs} | loss {loss:.3f} | "
            f"accuracy on training batches {accuracy:.3f} | {clock.seconds:.1f} s"
        )
        if not math.isfinite(loss):
            remedy = f"lower the recipe's lr {recipe.lr}"
            raise UserError(f"classifier: loss {loss} in epoch {epoch + 1}; {remedy}")
        if checkpoint:
            save_state(checkpoint, epoch + 1, model, optimizer, generator)
    return model.eval()


def save_state(path: Path, epochs: int, model: nn.Module, optimizer, generator) -> None:
    """Save the state of the training after some epochs."""
    tmp = path.with_name(f"{path.name}.tmp")
    torch.save((epochs, model.state_dict(), optimizer.state_dict(), generator.get_state()), tmp)
    tmp.replace(path)


def load_state(path: Path, model: nn.Module, optimizer, generator) -> int:
    """Load the state of the training, if it was saved, and return the number of epochs.

    Raises UserError if the file is damaged.
    """
    if not path.exists():
        return 0
    try:
        epochs, weights, momenta, random = torch.load(path, weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(momenta)
        generator.set_state(random)
    except Exception as error:  # the parser raises many exception types
        raise UserError(
            f"{path} is damaged ({first_line(error)}); delete it to train the classifier again"
        ) from error
    return epochs


def load_classifier(
    cache: Path,
    images: Tensor,
    labels: Tensor,
    n_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress=print,
) -> Classifier:
    """The classifier for these images, recipe and seed, trained once and kept in folder `cache`.

    Raises UserError if the loss is not finite or a saved file is damaged.
    """
    data = [
        hashlib.sha256(t.cpu().contiguous().numpy()).hexdigest() for t in (images, labels.long())
    ]
    key = {"recipe": asdict(recipe), "seed": seed, "n_classes": n_classes, "data": data}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"classifier-{digest}"
    checkpoint = folder.with_name(f".{folder.name}.pt")
    with locked(folder):
        if not folder.exists():
            progress(
                f"training a classifier on {len(images):,} images, {recipe.epochs} epochs; it is "
                f"kept in {folder}"
            )
            trained = train_classifier(
                images, labels, n_classes, recipe, seed, device, dtype, progress, checkpoint
            )
            tmp = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(tmp, ignore_errors=True)  # left by a process that was killed
            tmp.mkdir()
            save_file(
                {name: tensor.contiguous() for name, tensor in trained.state_dict().items()},
                tmp / "classifier.safetensors",
            )
            sha256 = file_sha256(tmp / "classifier.safetensors")
            write_text(tmp / "classifier.json", json.dumps({**key, "sha256": sha256}, indent=2))
            tmp.rename(folder)
            checkpoint.unlink()
    model = Classifier(n_classes, recipe.width)
    try:
        weights = (folder / "classifier.safetensors").read_bytes()
        sha256 = json.loads((folder / "classifier.json").read_text())["sha256"]
        if hashlib.sha256(weights).hexdigest() != sha256:
            raise ValueError("its sha256 differs from the one in classifier.json")
        model.load_state_dict(load(weights))
    except Exception as error:  # the parsers raise many exception types
        raise UserError(
            f"{folder} is damaged ({first_line(error)}); delete it to train the classifier again"
        ) from error
    return model.to(device).eval()


@torch.no_grad()
def judge(classifier: Classifier, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and features (N, D) of float images (N, 3, S, S), in float32.

    Features are averaged over an image and its mirror image. Both results are on the device of the
    images.
    """
    device, features = classifier.head.weight.device, []
    for part in images.split(batch):
        x = part.to(device)
        features.append((classifier.features(x) + classifier.features(x.flip(3))) / 2)
    features = torch.cat(features)  # (N, D)
    return classifier.head(features).to(images.device), features.to(images.device)


# ---- distances
def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features (N, D) and (M, D) (arXiv 1706.08500).

    Computed in float64; N and M must be at least 2. Finite samples add a bias of about 1 / N, so
    compare values for the same number of samples only.
    """
    assert min(len(a), len(b)) > 1, f"covariances of {len(a)} and {len(b)} samples"
    a, b = a.double(), b.to(a.device, torch.float64)
    cov_a, cov_b = a.T.cov(), b.T.cov()  # (D, D) each
    values, vectors = torch.linalg.eigh(cov_a)  # (D,), (D, D)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # (D, D)
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * mixed).item()


def kernel_distance(
    a: Tensor, b: Tensor, subset: int = 1000, subsets: int = 100, seed: int = 0
) -> float:
    """Unbiased squared MMD of features (N, D) and (M, D) (KID, arXiv 1801.01401).

    The kernel is (x.y / D + 1)^3, computed in float64. The result is the mean over `subsets` random
    subsets of min(subset, N, M) samples, which must be at least 2. For two samples of the same
    distribution its expectation is 0, so it may be negative.
    """
    m = min(subset, len(a), len(b))
    assert m > 1, f"an unbiased estimate from {m} samples"
    a, b = a.double(), b.to(a.device, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(subsets):
        x, y = (t[torch.randperm(len(t), generator=generator)[:m]] for t in (a, b))  # (m, D)
        # kernel matrices (m, m)
        xx, yy, xy = ((u @ v.T / a.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()).item() / (m * (m - 1))
        total += within - 2 * xy.mean().item()
    return total / subsets


def diversity(features: Tensor, labels: Tensor) -> float:
    """Mean cosine distance of two different features (N, D) of a class, averaged over classes.

    Classes with a single sample are omitted; at least one class must have two.
    """
    distances = []
    for label in labels.unique():
        f = F.normalize(features[labels == label].double(), dim=1)  # (n, D)
        n = len(f)
        if n > 1:  # the sum over all pairs is the square of the sum: no (n, n) matrix is needed
            similarity = (f.sum(0).square().sum() - f.square().sum()) / (n * (n - 1))
            distances.append(1 - similarity.item())
    assert distances, f"no class has two of the {len(labels)} samples"
    return sum(distances) / len(distances)


def nearest(queries: Tensor, pool: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Index (N,) and Euclidean distance (N,) of the nearest neighbor of queries (N, K) in a pool.

    The pool is (M, K); chunk x chunk pairs are compared at a time. In float64, because
    |p|^2 - 2 p.q cancels and TF32 would confuse neighbors.
    """
    indices, distances = [], []
    for q in (part.double() for part in queries.split(chunk)):  # (n, K)
        best = q.new_full((len(q),), math.inf)  # (n,), without |q|^2
        index = torch.zeros(len(q), dtype=torch.long, device=q.device)  # (n,)
        for start in range(0, len(pool), chunk):
            p = pool[start : start + chunk].double()  # (m, K)
            lowest, where = (p.square().sum(1) - 2 * q @ p.T).min(1)  # (n, m) -> (n,) each
            index = torch.where(lowest < best, where + start, index)
            best = torch.minimum(lowest, best)
        indices.append(index)
        distances.append((q - pool[index].double()).norm(dim=1))  # exactly 0 for a copy
    return torch.cat(indices), torch.cat(distances)
