"""Score the images that a multimodal run generates: do they show what the prompt says?

    python -m tools.score_images NAME --n 64         # a run of train_multimodal.py

Images of `shapes` are scored by a rule-based checker, labeled images by a classifier. The
classifier is trained once on real images and never used in a training loss; distances between its
features are comparable only within this project. Writes scores.json, scores.png and, for labeled
images, classes.png and confusion.png.

Shapes: N images, S image side, G side of the token grid, D feature dimension, K codebook size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import (
    UserError,
    build_from_saved,
    check_not_negative,
    check_positive,
    run_script,
)
from common.device import resolve_device
from common.disk import write_text
from data import shapes
from data.captions import article
from data.images import (
    ImageConfig,
    ImageDataset,
    image_grid,
    load_images,
    to_uint8,
    unaugmented_images,
)
from data.order import evenly_spaced
from multimodal import image_hidden
from sampling import LoadedRun, generate_images, load_run, resolve_sampling
from tools.classifier import (
    RECIPES,
    Classifier,
    diversity,
    frechet_distance,
    judge,
    kernel_distance,
    load_classifier,
    nearest,
)
from tools.shapes_checker import check
from train_multimodal import CaptionConfig

SCENES_SEED = 2  # of the scenes to generate; training and validation have 0 and 1
N_SHOWN = 16  # images of each kind in scores.png


@dataclass
class Config:
    """What to generate, and how to judge it."""

    run: str
    """Name of a run under runs/, a run folder or one of its checkpoints. Omitted: the newest
    run."""
    n: int | Literal["auto"] = "auto"
    """Number of images to generate, at most 100,000. For shapes: n with color-shape pairs seen in
    training and n with unseen pairs. auto: 1000 on a GPU, otherwise 64."""
    n_real: int | Literal["auto"] = "auto"
    """Number of real test images to compare with. auto: at most 100,000 on a GPU, otherwise
    1000."""
    n_classify: int | Literal["auto"] = "auto"
    """Number of real test images that the model itself classifies, by the caption under which its
    loss is lowest. 0: none; auto: 1000 on a GPU, otherwise 20."""
    classifier: Literal["auto", "gpu", "cpu"] = "auto"
    """Recipe of the classifier in tools/classifier.py. auto: gpu on a GPU, otherwise cpu."""
    guidance: float | Literal["auto"] = "auto"
    """Scale of classifier-free guidance: how strongly images follow the prompt. 0: ignore the
    prompt; 1: no guidance; more than 1: follow it more strongly. auto: the value in the run's
    config.yaml."""
    temperature: float | Literal["auto"] = "auto"
    """Sampling temperature. 0: always the most likely token; 1: the model's own distribution.
    auto: the value in the run's config.yaml."""
    top_p: float | Literal["auto"] = "auto"
    """Sample from the most likely tokens whose probabilities add up to top_p (nucleus sampling).
    auto: the value in the run's config.yaml."""
    top_k: int = 0
    """Sample from the k most likely tokens. 0: from all."""
    seed: int = 0
    """Random seed. Image i uses seed + i."""
    batch: int | Literal["auto"] = "auto"
    """Images to generate at a time. auto: 250 on a GPU, otherwise 32."""
    device: str = "auto"
    """Device: cpu, cuda, mps, ... auto: the accelerator that PyTorch finds, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 where the hardware computes it faster, otherwise float32."""


def generate_all(cfg: Config, loaded: LoadedRun, captions: list[str]) -> Tensor:
    """An image for each caption, (N, 3, S, S) in [-1, 1]; prints how many captions it truncates."""
    lengths = [len(loaded.format.text_tokens(caption)) for caption in captions]
    limit = loaded.format.caption_tokens
    n_truncated = sum(length > limit for length in lengths)
    if n_truncated:
        print(f"{n_truncated} of {len(captions)} captions truncated to {limit} tokens", flush=True)
    return generate_images(
        loaded.model,
        loaded.vqvae,
        loaded.format,
        captions,
        [cfg.seed + i for i in range(len(captions))],
        guidance=cfg.guidance,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        batch=cfg.batch,
        truncate=True,
        progress=True,
    )


def reconstruct(loaded: LoadedRun, images: Tensor) -> Tensor:
    """Images (N, 3, S, S) encoded and decoded by the VQ-VAE."""
    codes = (loaded.vqvae.encode(part) for part in images.split(32))  # (B, G, G) each
    return torch.cat([loaded.vqvae.decode(part) for part in codes])


# ---- shapes
def fractions_correct(captions: list[str], images: np.ndarray) -> dict[str, float]:
    """For each attribute, the fraction of images (N, S, S, 3) that show it as their caption says.

    Only images whose caption states the attribute count.
    """
    results = [check(caption, image) for caption, image in zip(captions, images, strict=True)]
    names = {name for result in results for name in result}
    return {
        name: float(np.mean([result[name] for result in results if name in result]))
        for name in sorted(names)
    }


def score_shapes(cfg: Config, loaded: LoadedRun) -> tuple[dict, list]:
    """Scores by the checker, and captioned images (S, S, 3) to show."""
    size, device = loaded.vqvae.config.image_size, loaded.model.embed.weight.device
    scores, shown = {}, []
    for pairs in ("seen", "unseen"):
        scenes = [shapes.scene(SCENES_SEED, i, unseen=pairs == "unseen") for i in range(cfg.n)]
        captions = [scene.caption for scene in scenes]
        rendered = np.stack([shapes.render(scene, size) for scene in scenes])  # (N, S, S, 3)
        pixels = torch.from_numpy(rendered).permute(0, 3, 1, 2)  # (N, 3, S, S)
        reconstructed = reconstruct(loaded, pixels.to(device).float() / 127.5 - 1)
        generated = to_uint8(generate_all(cfg, loaded, captions))  # (N, S, S, 3)
        scores[pairs] = {
            "generated": fractions_correct(captions, generated),
            "ceiling_reconstructed": fractions_correct(captions, to_uint8(reconstructed)),
            "ceiling_rendered": fractions_correct(captions, rendered),
        }
        shown += list(zip(captions, generated, strict=True))[:N_SHOWN]
    return scores, shown


# ---- labeled images
def labeled_images(
    cfg: Config, config: ImageConfig, size: int
) -> tuple[ImageDataset, ImageDataset]:
    """Training and test images with class labels. Raises UserError."""
    train = load_images(config, "train", size, captions=True)
    test = load_images(config, "val", size, captions=True)
    if train.classes is None or test.classes != train.classes:
        raise UserError(
            f"data source {config.source} has captions but no class labels, or others in its test "
            "split, so no classifier can score it; pass a run on labeled images or shapes"
        )
    if cfg.n < 2 or cfg.n_real <= len(test.classes):
        raise UserError(
            f"--n is {cfg.n} and --n_real is {cfg.n_real}; distances need at least 2 generated and "
            f"{len(test.classes) + 1} real images"
        )
    return train, test


def batches(loaded: LoadedRun, data: ImageDataset, indices: Sequence[int]) -> Iterator[Tensor]:
    """Images (B, 3, S, S) of a dataset in [-1, 1], 500 at a time."""
    size, device = loaded.vqvae.config.image_size, loaded.model.embed.weight.device
    for start in range(0, len(indices), 500):
        yield unaugmented_images(data, indices[start : start + 500], size, device)


def thumbnails(images: Tensor) -> Tensor:
    """Images (N, 3, S, S) in [-1, 1] as the classifier reads them: uint8 (N, 3, 32, 32), on CPU."""
    small = F.interpolate(images, size=(32, 32), mode="area")  # (N, 3, 32, 32)
    return ((small.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


@torch.no_grad()
def generative_accuracy(
    loaded: LoadedRun, data: ImageDataset, indices: list[int], captions: list[str]
) -> float:
    """Accuracy of the model as a classifier of real images.

    It picks the class under whose caption the loss of the image is lowest; `captions` has one per
    class.
    """
    model, fmt, device = loaded.model, loaded.format, loaded.model.embed.weight.device
    prompts, n_correct = [fmt.prompt(caption, truncate=True) for caption in captions], 0
    for i in indices:
        image = unaugmented_images(data, [i], loaded.vqvae.config.image_size, device)
        codes = loaded.vqvae.encode(image).flatten(1).cpu()  # (1, image tokens)
        tokens, starts = fmt.sequences(prompts, codes.expand(len(prompts), -1))
        _, before, targets = image_hidden(model, fmt, tokens.to(device), starts.to(device))
        logits = model.head(before, fmt.code_slice)  # (classes, image tokens, K)
        nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
        n_correct += int(nats.argmin()) == data.labels[i]
    return n_correct / len(indices)


def score_labeled(cfg: Config, loaded: LoadedRun, config: ImageConfig) -> tuple[dict, list]:
    """Scores by the classifier, and generated images, each with its nearest training image."""
    train, test = labeled_images(cfg, config, loaded.vqvae.config.image_size)
    train_small = torch.cat(  # (N, 3, 32, 32)
        [thumbnails(part) for part in batches(loaded, train, range(len(train)))]
    )
    classifier = load_classifier(
        Path(config.cache),
        train_small,
        torch.from_numpy(train.labels),
        len(train.classes),
        RECIPES[cfg.classifier],
        0,
        loaded.model.embed.weight.device,
        getattr(torch, cfg.dtype),
        progress=lambda line: print(line, flush=True),
    )

    test_indices = evenly_spaced(len(test), cfg.n_real)
    real, reconstructed = [], []
    for part in batches(loaded, test, test_indices):
        real.append(thumbnails(part))
        reconstructed.append(thumbnails(reconstruct(loaded, part)))
    class_captions = [
        f"a photo of {article(name.replace('_', ' ').lower())}" for name in train.classes
    ]
    labels = torch.arange(cfg.n) % len(train.classes)  # (n,)
    captions = [class_captions[label] for label in labels]
    images = generate_all(cfg, loaded, captions)  # (n, 3, S, S)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: cfg.n]
    small = {  # (N, 3, 32, 32) each
        "generated": thumbnails(images),
        "reconstructed": torch.cat(reconstructed),
        "real": torch.cat(real),
        "train": train_small[chosen],
    }

    test_labels = torch.from_numpy(test.labels[test_indices])
    scores = judged_scores(classifier, small, labels, test_labels, train.classes)
    plot_confusion(scores["confusion"], train.classes, loaded.run / "confusion.png")
    if cfg.n >= len(train.classes):
        plot_classes(to_uint8(images), train.classes, loaded.run / "classes.png")
    scores |= {"classifier": cfg.classifier, "n_real": len(test_indices)}
    if cfg.n_classify:
        indices = evenly_spaced(len(test), cfg.n_classify)
        scores["generative_accuracy"] = generative_accuracy(loaded, test, indices, class_captions)
        scores["n_classify"] = len(indices)

    closest, _ = nearest(small["generated"][:N_SHOWN].flatten(1), train_small.flatten(1))
    neighbors = to_uint8(next(batches(loaded, train, closest.tolist())))  # (N_SHOWN, S, S, 3)
    shown = zip(captions[:N_SHOWN], to_uint8(images[:N_SHOWN]), neighbors, strict=True)
    title = "nearest training image"
    return scores, [pair for text, a, b in shown for pair in ((text, a), (title, b))]


def judged_scores(
    classifier: Classifier,
    small: dict[str, Tensor],
    labels: Tensor,
    test_labels: Tensor,
    classes: list[str],
) -> dict:
    """Accuracies, confusion, distances and diversity of thumbnails (N, 3, 32, 32).

    `labels` (n,) are the requested classes of the generated images, `test_labels` (n_real,) those
    of real test images and of their reconstructions. Real training images give the floor.
    """
    # logits (N, classes) and features (N, D)
    judged = {kind: judge(classifier, x.float() / 127.5 - 1) for kind, x in small.items()}
    features = {kind: vectors for kind, (_, vectors) in judged.items()}
    real, n = features["real"], len(classes)
    expected = {
        "generated": labels,
        "ceiling_reconstructed": test_labels,
        "ceiling_real": test_labels,
    }
    counts = {}  # images of each expected (row) and predicted (column) class, (classes, classes)
    for kind, truth in expected.items():
        predicted = judged[kind.removeprefix("ceiling_")][0].argmax(1)
        counts[kind] = (truth * n + predicted).bincount(minlength=n * n).view(n, n)
    # None for a class without images
    by_class = {
        kind: [c[i, i].item() / total if (total := c[i].sum().item()) else None for i in range(n)]
        for kind, c in counts.items()
    }
    return {
        "class_accuracy": {kind: (c.trace() / c.sum()).item() for kind, c in counts.items()},
        "accuracy_by_class": {
            name: {kind: values[i] for kind, values in by_class.items()}
            for i, name in enumerate(classes)
        },
        "confusion": {kind: c.tolist() for kind, c in counts.items()},
        "frechet_distance": {
            "generated": frechet_distance(features["generated"], real),
            "reconstructed": frechet_distance(features["reconstructed"], real),
            "floor_real": frechet_distance(features["train"], real),
        },
        "kernel_distance": {
            "generated": kernel_distance(features["generated"], real),
            "floor_real": kernel_distance(features["train"], real),
        },
        "diversity": {  # needs two images of one class
            "generated": diversity(features["generated"], labels)
            if len(labels) > len(labels.unique())
            else None,
            "real": diversity(real, test_labels),
        },
    }


def plot_confusion(confusion: dict[str, list], classes: list[str], path: Path) -> None:
    """Plot the confusion matrices of generated, reconstructed and real images as a PNG."""
    from matplotlib.figure import Figure

    titles = {
        "generated": "generated",
        "ceiling_reconstructed": "real, encoded and decoded",
        "ceiling_real": "real",
    }
    fig = Figure(figsize=(15, 5.5), dpi=100, layout="constrained")
    for ax, (kind, title) in zip(fig.subplots(1, 3), titles.items(), strict=True):
        counts = np.array(confusion[kind], float)
        percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
        ax.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        if len(classes) <= 20:  # more would be unreadable
            for (row, column), value in np.ndenumerate(percent):
                color = "white" if value > 50 else "black"
                ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
            ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
            ax.set_yticks(range(len(classes)), classes)
        accuracy = counts.trace() / counts.sum()
        ax.set_title(f"{title}: {accuracy:.0%} correct")
        ax.set_xlabel("class that the classifier sees, % of the row")
        ax.set_ylabel("requested class" if kind == "generated" else "true class")
    fig.savefig(path, format="png")


def plot_classes(images: np.ndarray, classes: list[str], path: Path) -> None:
    """Plot up to 8 images of each class in a row beside its name, as a PNG.

    Image i of images (N, S, S, 3) is of class i % len(classes).
    """
    from matplotlib.figure import Figure

    n, side = len(classes), images.shape[1]
    columns = min(8, len(images) // n)
    rows = images[: columns * n].reshape(columns, n, *images.shape[1:]).swapaxes(0, 1)
    grid = image_grid(rows.reshape(-1, *images.shape[1:]), columns)
    fig = Figure(figsize=(1.3 + 0.7 * columns, 0.7 * n), dpi=100, layout="constrained")
    ax = fig.subplots()
    ax.imshow(grid, interpolation="nearest")
    ax.set_yticks([2 + side / 2 + i * (side + 2) for i in range(n)], classes)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    fig.savefig(path, format="png")


# ---- script
def main(cfg: Config) -> dict:
    """Generate, judge, write and return the scores. Raises UserError."""
    gpu = resolve_device(cfg).type == "cuda"
    defaults = {  # on a GPU and on a CPU
        "n": (1000, 64),
        "n_real": (100_000, 1000),
        "n_classify": (1000, 20),
        "batch": (250, 32),
        "classifier": ("gpu", "cpu"),
    }
    for name, (on_gpu, on_cpu) in defaults.items():
        if getattr(cfg, name) == "auto":
            setattr(cfg, name, on_gpu if gpu else on_cpu)
    check_positive(cfg, "n", "n_real", "batch")
    if cfg.n > 100_000:
        raise UserError(f"--n is {cfg.n}; it must be at most 100000")
    check_not_negative(cfg, "n_classify")
    loaded = load_run(cfg.run, cfg)
    if loaded.vqvae is None:
        raise UserError(
            f"{loaded.run} is a language model and cannot generate images; pass a run of "
            "train_multimodal.py"
        )
    resolve_sampling(cfg, loaded)
    data = build_from_saved(CaptionConfig, loaded.config.get("data"), loaded.run)
    if data.source == "shapes":
        scores, shown = score_shapes(cfg, loaded)
    else:
        scores, shown = score_labeled(cfg, loaded, data)
    for name in ("n", "guidance", "temperature", "top_k", "top_p", "seed"):
        scores[name] = getattr(cfg, name)
    write_text(loaded.run / "scores.json", json.dumps(scores, indent=2))
    titles, images = zip(*shown, strict=True)
    path = loaded.run / "scores.png"
    tmp = path.with_name(path.name + ".tmp")
    image_grid(np.stack(images), 8, titles=titles).save(tmp, "PNG")
    tmp.replace(path)
    long = ("accuracy_by_class", "confusion")
    print(json.dumps({name: value for name, value in scores.items() if name not in long}, indent=2))
    print(loaded.run / "scores.json", path)
    return scores


if __name__ == "__main__":
    run_script(main, Config, prog="python -m tools.score_images", description=__doc__)
