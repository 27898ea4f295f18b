"""Score what a multimodal run draws: is the picture what was asked?

    python -m tools.score_images NAME --n 64         # a run of train_multimodal.py

For `shapes` a checker reads the pixels. For labelled pictures a classifier, trained once on the real ones and never a
loss, judges; distances between its features compare within this project alone. Writes scores.json and scores.png.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import (
    UserError,
    check_not_negative,
    check_positive,
    resolve_device,
    run_script,
    write_text,
)
from data import shapes
from data.images import (
    ImageConfig,
    Pictures,
    article,
    load_pictures,
    plain_pictures,
    sheet,
    spread,
    to_uint8,
)
from generate import Loaded, draw, load_run, resolve_sampling
from tools.classifier import (
    RECIPES,
    diversity,
    frechet_distance,
    judge,
    kernel_distance,
    load_classifier,
    nearest,
)
from tools.shapes_checker import check
from train_multimodal import picture_hidden

SCENES = 2  # seed of the scenes that are asked for; training and validation have 0 and 1
BESIDE = 16  # drawn pictures shown beside the real training picture nearest to them


@dataclass
class Config:
    """What to draw, and by what to judge it."""

    run: str
    """Name of a run under runs/, a run folder, or one of its checkpoints; none: the newest run."""
    n: int | Literal["auto"] = "auto"
    """Pictures to draw, for shapes of pairs seen in training and as many of unseen ones; auto: 1000 on a GPU, else 64."""
    n_real: int | Literal["auto"] = "auto"
    """Real test pictures to hold against them; auto: all on a GPU, else 1000."""
    n_argmin: int | Literal["auto"] = "auto"
    """Real test pictures to classify by the model's own loss; auto: 1000 on a GPU, else 20; 0: none."""
    classifier: Literal["auto", "gpu", "cpu"] = "auto"
    """Recipe of the classifier in tools/classifier.py; auto: by the device."""
    guidance: float | Literal["auto"] = "auto"
    """How far pictures follow the prompt; this and the next two: auto is as in the run's config.yaml."""
    temperature: float | Literal["auto"] = "auto"
    """1 samples from the model's own distribution."""
    top_p: float | Literal["auto"] = "auto"
    """Sample from the likeliest visual words that together reach this probability."""
    top_k: int = 0
    """Sample from the k likeliest visual words; 0 from all."""
    seed: int = 0
    """Picture i draws with seed + i."""
    batch: int | Literal["auto"] = "auto"
    """Pictures drawn at a time; auto: 250 on a GPU, else 32."""
    device: str = "auto"
    """cpu, cuda, ...; auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto: bfloat16 where the device has it."""


def draw_all(cfg: Config, loaded: Loaded, captions: list[str]) -> Tensor:
    """A picture for each caption, (N, 3, S, S) in [-1, 1]."""
    return draw(
        loaded.model,
        loaded.vqvae,
        loaded.stream,
        captions,
        [cfg.seed + i for i in range(len(captions))],
        guidance=cfg.guidance,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        batch=cfg.batch,
        bar=True,
    )


def reconstructed(loaded: Loaded, pictures: Tensor) -> Tensor:
    """Pictures (N, 3, S, S) through the visual tokenizer and back."""
    return torch.cat(
        [loaded.vqvae.decode(loaded.vqvae.encode(part)) for part in pictures.split(32)]
    )


# ---------------------------------------------------------------------------------------------------------- shapes
def shares(captions: list[str], pictures: np.ndarray) -> dict[str, float]:
    """Of the pictures (N, S, S, 3) whose captions state an attribute, the share that has it right."""
    results = [check(caption, picture) for caption, picture in zip(captions, pictures)]
    names = dict.fromkeys(name for result in results for name in result)
    return {
        name: float(np.mean([result[name] for result in results if name in result]))
        for name in sorted(names)
    }


def score_shapes(cfg: Config, loaded: Loaded) -> tuple[dict, list]:
    """Scores by the checker, and a row of pictures for the sheet."""
    size, scores, shown = loaded.vqvae.config.image_size, {}, []
    for name in ("seen", "unseen"):
        scenes = [shapes.scene(SCENES, i, unseen=name == "unseen") for i in range(cfg.n)]
        captions = [scene.caption for scene in scenes]
        rendered = np.stack([shapes.draw(scene, size) for scene in scenes])
        pictures = (
            torch.from_numpy(rendered)
            .permute(0, 3, 1, 2)
            .to(loaded.model.embed.weight.device)
            .float()
            / 127.5
            - 1
        )
        drawn = to_uint8(draw_all(cfg, loaded, captions))
        scores[name] = {
            "drawn": shares(captions, drawn),
            "ceiling_reconstructed": shares(captions, to_uint8(reconstructed(loaded, pictures))),
            "ceiling_rendered": shares(captions, rendered),
        }
        shown += list(zip(captions, drawn))[:16]
    return scores, shown


# -------------------------------------------------------------------------------------------------- labelled pictures
def thumbnails(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, S, S) in [-1, 1] as the classifier sees them: uint8 (N, 3, 32, 32) on the CPU."""
    small = F.interpolate(pictures, size=(32, 32), mode="area")
    return ((small.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def in_parts(indices: list[int], size: int = 500) -> list[list[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


@torch.no_grad()
def argmin_accuracy(
    loaded: Loaded, data: Pictures, indices: list[int], captions: list[str]
) -> float:
    """Share of real pictures whose label has the caption under which the model finds the picture likeliest."""
    prompts, right = [loaded.stream.prompt(caption) for caption in captions], 0
    size, device = loaded.vqvae.config.image_size, loaded.model.embed.weight.device
    for i in indices:
        codes = loaded.vqvae.encode(plain_pictures(data, [i], size, device)).flatten(1).cpu()
        tokens, starts = (
            t.to(device) for t in loaded.stream.sequences(prompts, codes.expand(len(prompts), -1))
        )
        _, before, wanted = picture_hidden(loaded.model, loaded.stream, tokens, starts)
        logits = loaded.model.head(before, loaded.stream.code_rows)  # (classes, image_tokens, K)
        nats = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").sum(1)
        right += int(nats.argmin()) == data.labels[i]
    return right / len(indices)


def score_labelled(cfg: Config, loaded: Loaded, data_config: ImageConfig) -> tuple[dict, list]:
    """Scores by the classifier, and for the sheet drawn pictures with the nearest real training ones."""
    size, device = loaded.vqvae.config.image_size, loaded.model.embed.weight.device

    def real_pictures(data: Pictures, indices: list[int]) -> Tensor:
        return plain_pictures(data, indices, size, device)

    train, test = (
        load_pictures(data_config, split, size, captions=True) for split in ("train", "val")
    )
    if train.classes is None or test.classes != train.classes:
        raise UserError(
            f"data source {data_config.source} has captions but no labels: there is nothing to judge by"
        )
    if cfg.n < 2 or cfg.n_real <= len(test.classes):
        raise UserError(
            f"--n {cfg.n} and --n_real {cfg.n_real}: distances need 2 drawn and {len(test.classes) + 1} real pictures"
        )
    everything = list(range(len(train)))
    real = torch.cat([thumbnails(real_pictures(train, part)) for part in in_parts(everything)])
    name = cfg.classifier if cfg.classifier != "auto" else "gpu" if device.type == "cuda" else "cpu"
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
    classifier = load_classifier(
        Path(data_config.cache),
        real,
        torch.from_numpy(train.labels),
        len(train.classes),
        RECIPES[name],
        0,
        device,
        dtype,
        progress=lambda line: print(line, flush=True),
    )

    def judged(pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (N,) and features (N, d) of thumbnails."""
        logits, features = judge(classifier, pictures.float() / 127.5 - 1)
        return logits.argmax(1), features

    tested = spread(test, cfg.n_real)
    labels = torch.from_numpy(test.labels[tested])
    shown, back = [], []
    for part in in_parts(tested):
        pictures = real_pictures(test, part)
        shown.append(thumbnails(pictures))
        back.append(thumbnails(reconstructed(loaded, pictures)))
    (real_class, real_features), (back_class, back_features) = (
        judged(torch.cat(shown)),
        judged(torch.cat(back)),
    )
    asked = torch.arange(cfg.n) % len(train.classes)
    captions = [
        f"a photo of {article(train.classes[label].replace('_', ' ').lower())}" for label in asked
    ]
    drawn = draw_all(cfg, loaded, captions)
    small = thumbnails(drawn)
    drawn_class, drawn_features = judged(small)
    others = judged(
        real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: cfg.n]]
    )[1]
    scores = {
        "class_accuracy": {
            "drawn": (drawn_class == asked).float().mean().item(),
            "ceiling_reconstructed": (back_class == labels).float().mean().item(),
            "ceiling_real": (real_class == labels).float().mean().item(),
        },
        "frechet_distance": {
            "drawn": frechet_distance(drawn_features, real_features),
            "reconstructed": frechet_distance(back_features, real_features),
            "floor_real": frechet_distance(others, real_features),
        },
        "kernel_distance": {
            "drawn": kernel_distance(drawn_features, real_features),
            "floor_real": kernel_distance(others, real_features),
        },
        # of pictures of one class, so there must be two of one
        "diversity": {
            "drawn": diversity(drawn_features, asked) if cfg.n > len(train.classes) else None,
            "real": diversity(real_features, labels),
        },
        "classifier": name,
        "n_real": len(tested),
    }
    if cfg.n_argmin:
        own = [f"a photo of {article(name.replace('_', ' ').lower())}" for name in train.classes]
        scores["argmin_accuracy"] = argmin_accuracy(loaded, test, spread(test, cfg.n_argmin), own)
        scores["n_argmin"] = min(cfg.n_argmin, len(test))
    closest = nearest(small[:BESIDE].flatten(1), real.flatten(1))[0].tolist()
    beside = to_uint8(real_pictures(train, closest))
    pairs = zip(captions, to_uint8(drawn[:BESIDE]), beside)
    return scores, [
        entry
        for caption, picture, near in pairs
        for entry in ((caption, picture), ("nearest real", near))
    ]


def main(cfg: Config) -> dict:
    """Draw, judge, write and return the scores. Raises UserError."""
    gpu = resolve_device(cfg).type == "cuda"
    for name, (large, small) in {
        "n": (1000, 64),
        "n_real": (100_000, 1000),
        "n_argmin": (1000, 20),
        "batch": (250, 32),
    }.items():
        if getattr(cfg, name) == "auto":
            setattr(cfg, name, large if gpu else small)
    check_positive(cfg, "n", "n_real", "batch")
    check_not_negative(cfg, "n_argmin")
    loaded = load_run(cfg.run, cfg)
    if loaded.vqvae is None:
        raise UserError(
            f"{loaded.run} is a language model and draws nothing: name a run of train_multimodal.py"
        )
    resolve_sampling(cfg, loaded)
    config = {key: value for key, value in loaded.config["data"].items() if key != "tokenizer"}
    if config["source"] == "shapes":
        scores, shown = score_shapes(cfg, loaded)
    else:
        scores, shown = score_labelled(cfg, loaded, ImageConfig(**config))
    scores |= {
        "n": cfg.n,
        "guidance": cfg.guidance,
        "temperature": cfg.temperature,
        "top_k": cfg.top_k,
        "top_p": cfg.top_p,
        "seed": cfg.seed,
    }
    write_text(loaded.run / "scores.json", json.dumps(scores, indent=2))
    sheet(
        np.stack([picture for _, picture in shown]), 8, titles=[title for title, _ in shown]
    ).save(loaded.run / "scores.png")
    print(json.dumps(scores, indent=2))
    print(loaded.run / "scores.png")
    return scores


if __name__ == "__main__":
    run_script(Config, main)
