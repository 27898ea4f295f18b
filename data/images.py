"""Image data: source -> small square images on disk -> batches in [-1, 1].

Images are decoded and cropped square once, and stored as raw uint8. Validation images are prepared
first, and images with the same pixels are excluded from training, whatever their file or source.
The augmentation of an image in an epoch is a pure function of (index, epoch), so resuming is exact
and image tokens can be cached.
"""

import hashlib
import json
import math
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from common.config import UserError
from common.device import to_device
from common.disk import building, cache_errors, file_sha256, write_text
from data import shapes
from data.image_source import (
    Records,
    content_key,
    count,
    decode_image,
    open_image,
    open_source,
    read_caption,
    readable,
    source_files,
)
from data.source import digest, file_stats

N_SHAPES = {"train": 1_000_000, "val": 10_000}  # rendered scenes that count as one epoch


@dataclass
class ImageConfig:
    """Images and captions."""

    source: str = "uoft-cs/cifar10"
    """Training images: a hub dataset OWNER/NAME or OWNER/NAME:CONFIG; a folder of .parquet files or
    of images (in class folders, or with captions in metadata.csv, .jsonl or .parquet); a path or
    glob of .parquet files; or `shapes` (scenes of colored shapes with captions, rendered as
    needed). Parquet files need an image column. Captions come from a column text, caption or
    captions (a string, or a list from which each epoch picks one) or else from class labels."""
    val_source: str | None = None
    """Validation images, in the same formats as data.source. null, or the same as data.source: use
    its test or validation split (folders or parquet files named train and test) or, if it has none,
    hold out a fraction of its images (data.val_fraction). Images that are also in the validation
    set are excluded from training."""
    val_fraction: float = 0.05
    """Fraction of images held out for validation, between 0 and 1 (exclusive); at least one image
    is held out. A hash of its pixels decides whether an image is held out. Used only if there is
    neither data.val_source nor a test or validation split."""
    augment: bool = True
    """Augment training images: shift by up to 1/8 of the side, vary brightness and contrast, and
    flip horizontally if captions are made from class labels. Has no effect on `shapes`."""
    cache: str = "cache"
    """Folder for decoded images, image tokens and tokenizers."""
    retry_seconds: float = 60.0
    """Seconds to keep retrying a hub request that fails with a transient error."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"--data.val_fraction is {self.val_fraction}; it must be between 0 and 1, exclusive"
            )
        if self.val_source == self.source != "shapes":  # validation must not be trained on
            self.val_source = None

    def source_of(self, split: str) -> str:
        """Source of "train" or "val"."""
        return self.val_source if split == "val" and self.val_source else self.source


# ---- preparation
def choose_split(cfg: ImageConfig, split: str) -> tuple[Records, float, list[str]]:
    """Records that contain the split "train" or "val", the fraction of them held out for validation
    (0 if validation has its own records), and notes about what is not used. Raises UserError.
    """
    source = cfg.source_of(split)
    splits, notes = open_source(source, cfg.retry_seconds)
    val_name = next((name for name in ("test", "validation", "val") if name in splits), None)
    train_name = "train" if "train" in splits else next(iter(splits))
    chosen = val_name if split == "val" and val_name else train_name
    used = {chosen} if cfg.val_source else {train_name, val_name}
    unused = [name for name in splits if name not in used]
    if unused:
        notes.append(f"{source}: not used: {' and '.join(unused)} (of {', '.join(splits)})")
    if split == "val" and not cfg.val_source:
        notes = []  # the notes of the training split say the same
    return splits[chosen], 0.0 if cfg.val_source or val_name else cfg.val_fraction, notes


def image_request(cfg: ImageConfig, split: str, size: int) -> dict:
    """Everything that determines the prepared images of a split, except which images are excluded
    from training. Raises UserError.
    """
    sources = [source for source in (cfg.source, cfg.val_source) if source not in (None, "shapes")]
    return {
        "source": cfg.source,
        "val_source": cfg.val_source,
        "files": [file_stats(source_files(source)) for source in sources],
        "split": split,
        "val_fraction": cfg.val_fraction,
        "size": size,
    }


def prepare_images(cfg: ImageConfig, split: str, size: int) -> Path:
    """Folder with the images of a split ("train" or "val"), cropped square and all of one side, at
    most `size`.

    For training images, prepares the validation images first, to exclude them. Raises UserError.
    """
    request, val = image_request(cfg, split, size), None
    if split == "train" and cfg.source_of("val") != "shapes":
        val = read_manifest(prepare_images(cfg, "val", size))
        request["val_images"] = digest(val["keys"])
    folder = Path(cfg.cache) / "images" / f"{split}-{digest(request)}"
    with cache_errors(folder), building(folder) as tmp:
        if tmp is not None:
            manifest = write_images(tmp / "images.bin", cfg, split, size, val)
            manifest["request"] = request
            manifest["digest"] = digest(manifest)
            write_text(tmp / "manifest.json", json.dumps(manifest))
    return folder


def write_images(
    path: Path, cfg: ImageConfig, split: str, size: int, val: dict | None, below: float = 0.0
) -> dict:
    """Write the pixels of a split, except images in the validation manifest `val`; returns the new
    manifest. If images are held out, those at a position < `below` are too. Raises UserError.
    """
    records, fraction, notes = choose_split(cfg, split)
    fraction = max(fraction, below)
    side, source = stored_side(records, size), cfg.source_of(split)
    excluded, keys = set(val["keys"] if val else ()), set()
    captions, sha256, lowest = [], hashlib.sha256(), []
    n_seen, n_enlarged, n_replaced = 0, 0, 0
    progress = tqdm(records.read(), f"decoding {split}", records.n, disable=not sys.stderr.isatty())
    with path.open("wb") as file:
        for name, encoded, value in progress:
            n_seen += 1
            image = decode_image(encoded, name)
            key = content_key(image).hex()
            lowest = sorted({*lowest, position(key)})[:2]
            if key in excluded or (split == "val" and fraction and position(key) >= fraction):
                continue
            if split == "val":
                keys.add(key)
            captions.append(read_caption(value, records, name))
            pixels = square(image, side).tobytes()  # (side, side, 3)
            sha256.update(pixels)
            file.write(pixels)
            n_enlarged += min(image.size) < side
            n_replaced += "\ufffd" in str(captions[-1])
        file.flush()
        os.fsync(file.fileno())
    if not captions and split == "val" and fraction and len(lowest) == 2:
        return write_images(path, cfg, split, size, val, below=lowest[1])  # hold out one image
    if not captions:
        around = sorted(map(position, excluded))[-2:]
        raise UserError(no_images(cfg, split, fraction, n_seen, around))
    n_excluded = 0 if fraction else n_seen - len(captions)
    lines = [
        (1, f"{split} images stored at {side} x {side} pixels"),
        (n_enlarged, f"{count(n_enlarged, 'smaller image')} upscaled"),
        (below, "held out one image, because data.val_fraction is too small for more"),
        (
            n_excluded,
            f"{n_excluded} of {count(n_seen, 'image')} excluded (also in the validation set)",
        ),
        (n_replaced, f"invalid characters replaced by U+FFFD in {count(n_replaced, 'caption')}"),
    ]
    notes += [f"{source}: " + "; ".join(line for number, line in lines if number)]
    return {
        "count": len(captions),
        "side": side,
        "classes": records.classes,
        "sha256": sha256.hexdigest(),
        "captions": captions if records.column else None,
        "keys": sorted(keys),
        "notes": notes,
    }


def stored_side(records: Records, size: int) -> int:
    """min(size, the largest short edge of all images), from the headers of the image files.

    The largest, so that a single small image does not lower the resolution. Raises UserError.
    """
    side = 0
    for name, encoded, _ in records.read():
        with readable(name), open_image(encoded) as image:
            side = max(side, min(image.size))
        if side >= size:
            return size
    return side


def square(image: Image.Image, side: int) -> Image.Image:
    """Center square of an image, resized to side x side pixels."""
    if image.size == (side, side):
        return image
    w, h = image.size
    edge = min(w, h)
    box = ((w - edge) / 2, (h - edge) / 2, (w + edge) / 2, (h + edge) / 2)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def position(key: str) -> float:
    """Position of an image in [0, 1), from its key; below the held-out fraction is validation."""
    return int(key[:16], 16) / 2**64


def no_images(
    cfg: ImageConfig, split: str, fraction: float, n_seen: int, around: Sequence[float]
) -> str:
    """Error message for a split without images, with a remedy that works.

    A held-out fraction between the two positions `around` leaves an image to train on.
    """
    source = cfg.source_of(split)
    if not n_seen:
        return f"data source {source} has no images in its {split} split; add images"
    if not fraction:
        return (
            f"all {count(n_seen, 'training image')} of data source {source} are also validation "
            "images; pass another --data.val_source"
        )
    advice = "pass more distinct images or a --data.val_source"
    if len(around) == 2:
        low, high = around
        floors = (math.floor(high * 10**n) / 10**n for n in range(1, 20))
        advice = f"set --data.val_fraction to {next(x for x in floors if low < x <= high)}"
    return (
        f"--data.val_fraction {fraction} leaves none of the {n_seen} images in data source "
        f"{source} for the {split} split; {advice}"
    )


def read_manifest(folder: Path) -> dict:
    """Manifest of a prepared folder. Raises UserError if it is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest.pop("digest") != digest(manifest):
            raise ValueError("the digest differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'manifest.json'} is damaged; delete {folder} to prepare it again"
        ) from error
    return manifest


# ---- datasets
class ImageDataset:
    """A prepared split.

    `side` is the side in pixels, `id` the sha256 of all pixels, captions and class names. `classes`
    and `labels` (N,) are the class names and class numbers if captions are made from labels, else
    None. `captions` holds a caption, several captions or a class number of each image; it is None
    if the source has neither. Raises UserError if the folder is damaged.
    """

    def __init__(self, folder: Path):
        manifest = read_manifest(folder)
        self.side, self.notes = manifest["side"], manifest["notes"]
        self.classes, self.captions = manifest["classes"], manifest["captions"]
        shape = (manifest["count"], self.side, self.side, 3)  # (N, s, s, 3)
        path = folder / "images.bin"
        intact = path.is_file() and path.stat().st_size == math.prod(shape)
        if not intact or file_sha256(path) != manifest["sha256"]:
            raise UserError(
                f"{path} is damaged (its sha256 differs from the manifest); delete {folder} to "
                "prepare it again"
            )
        self.raw = np.memmap(path, np.uint8, mode="r", shape=shape)
        content = [manifest["sha256"], self.classes, self.captions]
        self.id = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self.labels = np.array(self.captions) if self.classes else None

    def __len__(self) -> int:
        return len(self.raw)

    def pixels(self, index: int) -> np.ndarray:
        """Pixels (3, s, s) uint8 of an image."""
        return self.raw[index].transpose(2, 0, 1)  # (3, s, s)

    def augmented(self, index: int, epoch: int) -> np.ndarray:
        """Pixels (3, s, s) uint8, randomly shifted with mirrored edges, flipped and brightened."""
        rng = np.random.default_rng((index, epoch))
        positions, limit = np.arange(self.side), self.side // 8
        dy, dx = rng.integers(-limit, limit + 1, size=2)
        ys, xs = reflect(positions + dy, self.side), reflect(positions + dx, self.side)
        if self.classes and rng.random() < 0.5:  # other captions might say left or right
            xs = xs[::-1]
        pixels = self.pixels(index)[:, ys[:, None], xs]  # (3, s, s)
        if rng.random() < 0.3:
            contrast, brightness = rng.uniform(0.9, 1.1), rng.uniform(-12, 12)
            changed = (pixels - 127.5) * contrast + 127.5 + brightness
            pixels = np.clip(changed, 0, 255).astype(np.uint8)
        return pixels


def reflect(positions: np.ndarray, side: int) -> np.ndarray:
    """Positions with those outside 0 to side - 1 mirrored at the edges."""
    return side - 1 - np.abs(side - 1 - np.abs(positions))


class ShapesDataset:
    """Rendered scenes with the interface of ImageDataset; a scene has its own caption.

    Held-out color-shape pairs are in neither split.
    """

    classes = labels = captions = None

    def __init__(self, split: str, side: int):
        self.side = side
        self.seed = 0 if split == "train" else 1
        self.n = N_SHAPES[split]
        self.id = f"shapes-{split}-{side}"

    def __len__(self) -> int:
        return self.n

    def pixels(self, index: int) -> np.ndarray:
        """Pixels (3, s, s) uint8 of a scene."""
        return shapes.render(shapes.scene(self.seed, index), self.side).transpose(2, 0, 1)


def load_images(
    cfg: ImageConfig, split: str, size: int, captions: bool = False
) -> ImageDataset | ShapesDataset:
    """Images of "train" or "val", prepared if necessary. Prints how they are stored, and what part
    of the source is not used.

    Raises UserError, also if `captions` are required and the source has none.
    """
    source = cfg.source_of(split)
    if source == "shapes":
        return ShapesDataset(split, size)
    data = ImageDataset(prepare_images(cfg, split, size))
    for note in data.notes:
        print(note)
    if captions and data.captions is None:
        raise UserError(
            f"data source {source} has no captions; add a column `text` or `caption`, or class "
            "labels with names (in a folder of images: a metadata.jsonl, or a subfolder per class)"
        )
    return data


# ---- batches
def load_pixels(
    data: ImageDataset | ShapesDataset, indices: Sequence[int], epochs: Sequence[int] | None
) -> Tensor:
    """Pixels (B, 3, s, s) uint8, augmented for the epochs; epochs None: not augmented."""
    if epochs is None or isinstance(data, ShapesDataset):
        pixels = [data.pixels(i) for i in indices]
    else:
        pixels = [data.augmented(i, epoch) for i, epoch in zip(indices, epochs, strict=True)]
    return torch.from_numpy(np.stack(pixels))  # (B, 3, s, s)


def to_float(pixels: Tensor, size: int, device: torch.device) -> Tensor:
    """Pixels (B, 3, s, s) uint8 as images (B, 3, size, size) in [-1, 1] on the device."""
    images = to_device(pixels, device).float() / 127.5 - 1
    if pixels.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear")  # (B, 3, size, size)


def unaugmented_images(
    data: ImageDataset | ShapesDataset, indices: Sequence[int], size: int, device: torch.device
) -> Tensor:
    """Images (B, 3, size, size) in [-1, 1] on the device, without augmentation."""
    return to_float(load_pixels(data, indices, None), size, device)


# ---- images for people to look at
def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, 3, S, S) in [-1, 1] as (B, S, S, 3) uint8 on the CPU."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()  # (B, S, S, 3)


def image_grid(
    images: np.ndarray, columns: int, titles: Sequence[str] = (), heading: str = "", gap: int = 2
) -> Image.Image:
    """Images (N, S, S, 3) uint8 in a grid with a heading above it and a title above each image, if
    given. Gaps are in pixels.

    With titles, small images are enlarged by repeating pixels, so that four lines of title fit.
    """
    scale = -(-128 // images.shape[1]) if titles else 1
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)  # (N, side, side, 3)
    n, side = images.shape[:2]
    heading_height, title_height = 16 if heading else 0, 50 if titles else 0
    n_rows, cell_height = -(-n // columns), side + title_height + gap
    width, height = columns * (side + gap) + gap, heading_height + n_rows * cell_height + gap
    grid = Image.new("RGB", (width, height), "lightgray")  # shows the border of a white image
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x = gap + i % columns * (side + gap)
        y = heading_height + gap + i // columns * cell_height
        grid.paste(Image.fromarray(image), (x, y + title_height))
        if titles:
            lines = textwrap.wrap(titles[i], side // 6)[:4]
            draw.multiline_text((x, y), "\n".join(lines), fill="black", spacing=1)
    draw.text((gap, 2), heading, fill="black")
    return grid
