"""Image data: source -> small square images on disk -> batches in [-1, 1].

Images are decoded and cropped square once, and stored as raw uint8. The augmentation of an image in
an epoch is a pure function of (index, epoch), so resuming is exact and image tokens can be cached.
"""

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from common.config import UserError
from common.run import write_text
from data import shapes
from data.source import (
    OFFLINE_REMEDY,
    digest,
    file_sha256,
    file_stats,
    first_line,
    hub_revisions,
    in_validation,
)

N_SHAPES = {"train": 1_000_000, "val": 10_000}  # rendered scenes that count as one epoch


@dataclass
class ImageConfig:
    """Images and captions."""

    source: str = "uoft-cs/cifar10"
    """Training images: a hub dataset NAME or NAME:CONFIG; a folder of .parquet files or in the
    imagefolder layout of `datasets`; a path or glob of .parquet files; or `shapes` (scenes of
    colored shapes with captions, rendered as needed)."""
    val_source: str | None = None
    """Validation images, in the same formats as data.source. null: use the test or validation split
    of data.source or, if it has none, hold out a fraction of its images (data.val_fraction)."""
    val_fraction: float = 0.05
    """Fraction of images held out for validation, between 0 and 1 (exclusive), chosen by a hash of
    their pixels. Used only if there is neither data.val_source nor a test or validation split."""
    augment: bool = True
    """Augment training images: shift by up to 1/8 of the side, vary brightness and contrast, and
    flip horizontally if captions are made from class labels. Has no effect on `shapes`."""
    cache: str = "cache"
    """Folder for decoded images, image tokens and tokenizers."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"--data.val_fraction is {self.val_fraction}; it must be between 0 and 1, exclusive"
            )

    def source_of(self, split: str) -> str:
        """Source of "train" or "val"."""
        return self.val_source if split == "val" and self.val_source else self.source


# ---- sources
def open_source(source: str) -> datasets.DatasetDict:
    """The splits of a source. Raises UserError."""
    path = Path(source).expanduser()
    files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else sorted(glob(str(path)))
    is_path = path.suffix or path.is_absolute() or source[:1] in ("", ".", "~")
    if is_path and not path.is_dir() and not files:
        raise UserError(
            f"data source {source} is neither a folder nor a .parquet file; check the path"
        )
    if any(Path(file).suffix != ".parquet" for file in files):
        raise UserError(
            f"data source {source} has files that are not .parquet; pass .parquet files or a "
            "folder of images"
        )
    datasets.disable_progress_bars()
    try:
        if files:
            return datasets.load_dataset("parquet", data_files=files)
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path))
        name, _, config = source.partition(":")
        # hub_revisions fails at once where load_dataset would retry for minutes
        return datasets.load_dataset(name, config or None, revision=hub_revisions([name])[name])
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub client raise many exception types
        remedy = OFFLINE_REMEDY
        if files or path.is_dir():
            remedy = "check that the files are intact and hold images"
        raise UserError(
            f"cannot read data source {source}: {first_line(error)}; {remedy}"
        ) from error


def choose_split(cfg: ImageConfig, split: str) -> tuple[datasets.Dataset, float]:
    """Records that contain "train" or "val", and the fraction of them held out for validation; 0 if
    all of them belong to the split. Raises UserError.
    """
    splits = open_source(cfg.source_of(split))
    val_name = next((name for name in ("test", "validation", "val") if name in splits), None)
    if split == "val" and val_name:
        return splits[val_name], 0.0
    train_name = "train" if "train" in splits else next(iter(splits))
    return splits[train_name], 0.0 if cfg.val_source or val_name else cfg.val_fraction


def is_image(feature) -> bool:
    """Whether a column holds images; some libraries write them as structs of bytes and path."""
    is_struct = isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    return is_struct or isinstance(feature, datasets.Image)


def find_columns(
    source: str, records: datasets.Dataset
) -> tuple[str, str | None, list[str] | None]:
    """Names of the image column and of the caption column, and class names if captions are labels.

    Raises UserError.
    """
    types = records.features
    image = next((name for name in types if is_image(types[name])), None)
    if image is None:
        raise UserError(
            f"data source {source} has no column of images, only {', '.join(types)}; pass a source "
            "that holds images"
        )
    text = next((name for name in ("text", "caption") if name in types), None)
    labels = (name for name in types if isinstance(types[name], datasets.ClassLabel))
    caption = text or next(labels, None)
    return image, caption, None if text or caption is None else types[caption].names


# ---- preparation
def image_request(cfg: ImageConfig, split: str, size: int) -> dict:
    """Everything that determines the prepared images."""
    files = []
    for source in filter(None, (cfg.source, cfg.val_source)):
        for path in (Path(source).expanduser(), *map(Path, glob(source))):
            files += [path] if path.is_file() else sorted(path.rglob("*.*"))
    return {
        "source": cfg.source,
        "val_source": cfg.val_source,
        "files": file_stats(files),
        "split": split,
        "val_fraction": cfg.val_fraction,
        "size": size,
    }


def prepare_images(cfg: ImageConfig, split: str, size: int) -> Path:
    """Folder with the images of a split ("train" or "val"), cropped square to one side <= size.

    Written under a temporary name and renamed, so the folder is complete or absent. Raises
    UserError.
    """
    request = image_request(cfg, split, size)
    folder = Path(cfg.cache) / "images" / f"{split}-{digest(request)}"
    if folder.is_dir():
        return folder
    source = cfg.source_of(split)
    records, fraction = choose_split(cfg, split)
    image_column, caption_column, classes = find_columns(source, records)
    records = records.cast_column(image_column, datasets.Image(decode=False))
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    side, captions = None, []
    with (tmp / "images.bin").open("wb") as file:
        progress = tqdm(records, desc=f"decoding {split}", disable=not sys.stderr.isatty())
        for i, record in enumerate(progress):
            image = decode_image(record[image_column], i, source)
            side = side or min(*image.size, size)
            pixels = np.asarray(square(image, side))  # (side, side, 3)
            if fraction and in_validation({"": pixels.ravel()}, fraction) != (split == "val"):
                continue
            captions.append(read_caption(record, caption_column, i, source))
            file.write(pixels.tobytes())
    if not captions:
        raise UserError(
            f"data source {source} has no images for the {split} split; provide more images or set "
            "another --data.val_fraction"
        )
    manifest = {
        "request": request,
        "count": len(captions),
        "side": side,
        "classes": classes,
        "sha256": file_sha256(tmp / "images.bin"),
        "captions": captions if caption_column else None,
    }
    write_text(tmp / "manifest.json", json.dumps(manifest))
    tmp.rename(folder)
    return folder


def decode_image(encoded: dict | None, index: int, source: str) -> Image.Image:
    """RGB image from {"bytes", "path"}. Raises UserError."""
    try:
        return datasets.Image().decode_example(encoded).convert("RGB")
    except Exception as error:  # PIL raises many exception types
        name = (encoded or {}).get("path") or f"number {index}"
        raise UserError(
            f"image {name} of {source} cannot be read: {first_line(error)}; fix or remove it"
        ) from error


def read_caption(record: dict, column: str | None, index: int, source: str) -> str | int | None:
    """Caption or label of a record, None if column is None. Raises UserError if it is empty."""
    caption = record[column] if column else None
    if column and (caption is None or caption == -1 or not str(caption).strip()):
        raise UserError(
            f"image number {index} of {source} has nothing in column {column!r}; add a caption or "
            "remove the image"
        )
    return caption


def square(image: Image.Image, side: int) -> Image.Image:
    """Center square of an image, resized to side x side pixels."""
    if image.size == (side, side):
        return image
    w, h = image.size
    edge = min(w, h)
    box = ((w - edge) / 2, (h - edge) / 2, (w + edge) / 2, (h + edge) / 2)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


# ---- datasets
class ImageDataset:
    """A prepared split.

    `side` is the side in pixels, `id` the sha256 of all pixels. `classes` and `labels` (N,) are the
    class names and class numbers if captions are made from labels, else None. `captions` is the
    list of captions or class numbers, None if the source has neither.
    """

    def __init__(self, folder: Path):
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            self.side, self.id = manifest["side"], manifest["sha256"]
            self.classes, self.captions = manifest["classes"], manifest["captions"]
            shape = (manifest["count"], self.side, self.side, 3)  # (N, s, s, 3)
            self.raw = np.memmap(folder / "images.bin", np.uint8, mode="r", shape=shape)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is damaged; delete it to prepare it again") from error
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
    """Images of "train" or "val", prepared if necessary.

    Raises UserError, also if `captions` are required and the source has none.
    """
    source = cfg.source_of(split)
    if source == "shapes":
        return ShapesDataset(split, size)
    data = ImageDataset(prepare_images(cfg, split, size))
    if captions and data.captions is None:
        raise UserError(
            f"data source {source} has no captions; add a column `text` or `caption`, or class "
            "labels with names"
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
    images = pixels.to(device).float() / 127.5 - 1
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
