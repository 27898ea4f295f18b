"""Picture data: source -> small square pictures and captions -> batches in [-1, 1]; captions and codes -> sequences.

Pictures are decoded and cut square once, and kept as raw uint8. What a picture looks like and what is said of it in
the d-th pass over the data is a pure function of (index, d), so resuming is exact and codes can be cached.
"""

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
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

from common import UserError, write_text
from data import shapes
from data.order import batch_indices
from data.text import NO_NETWORK, digest, file_sha256, in_validation, reason, revisions

OFFLINE = NO_NETWORK.replace("'folder/*.parquet'", "FOLDER or 'folder/*.parquet'").replace(
    "llm_demo", "vqvae_demo"
)
SHAPES = {"train": 1_000_000, "val": 10_000}  # drawn scenes that count as one pass
TEMPLATES = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a photograph of {}",
    "a small photo of {}",
    "{}",
    "a snapshot of {}",
    "this is {}",
    "here is {}",
    "a low-resolution photo of {}",
    "a thumbnail of {}",
    "a blurry photo of {}",
    "a color photo of {}",
    "a close-up of {}",
    "a tiny picture of {}",
    "draw {}",
    "show me {}",
    "a picture that shows {}",
    "there is {} in this picture",
    "one can see {}",
    "look, {}",
)
SYNONYMS = {
    "airplane": ("plane", "aeroplane"),
    "automobile": ("car",),
    "ship": ("boat",),
    "truck": ("lorry",),
    "deer": ("stag",),
    "dog": ("hound",),
    "frog": ("toad",),
    "horse": ("pony",),
}


@dataclass
class ImageConfig:
    """Pictures and captions."""

    source: str = "uoft-cs/cifar10"
    """Where pictures come from: a hub dataset NAME or NAME:CONFIG, a folder (of parquet files, or in the imagefolder
    layout of `datasets`), a path or glob of .parquet files, or `shapes`, drawn by rule without end."""
    val_source: str | None = None
    """Validation pictures of their own; null takes the source's test or validation split, or else holds out
    val_fraction of the pictures."""
    val_fraction: float = 0.05
    """Share of pictures, chosen by their hash, that validation has to itself where there is no split for it."""
    augment: bool = True
    """Shift pictures a little, change their brightness and mirror those with labels; not for `shapes`."""
    cache: str = "cache"
    """Folder for decoded pictures, codes and tokenizers."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction {self.val_fraction} must lie between 0 and 1")


# -------------------------------------------------------------------------------------------------------- sources
def open_source(source: str) -> datasets.DatasetDict:
    """The splits of a source. Raises UserError."""
    path = Path(source).expanduser()
    files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else sorted(glob(str(path)))
    if (
        not path.is_dir()
        and not files
        and (path.suffix or path.is_absolute() or source[:1] in ("", ".", "~"))
    ):
        raise UserError(f"data source {source}: there is no such folder or .parquet file")
    if files and {Path(file).suffix for file in files} != {".parquet"}:
        raise UserError(f"data source {source}: give .parquet files, or a folder of pictures")
    datasets.disable_progress_bars()
    try:
        if files:
            return datasets.load_dataset("parquet", data_files=files)
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path))
        name, _, config = source.partition(":")
        revision = revisions({"files": {name: []}})[
            name
        ]  # fails at once where load_dataset would retry for minutes
        return datasets.load_dataset(name, config or None, revision=revision)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub client raise dozens of kinds
        remedy = "are these pictures?" if files or path.is_dir() else OFFLINE
        raise UserError(f"cannot read data source {source}: {reason(error)}; {remedy}") from error


def choose_split(cfg: ImageConfig, split: str) -> tuple[str, datasets.Dataset, float]:
    """Source, rows of a split ("train" or "val"), and the share of them that is held out by hash. Raises UserError."""
    own = split == "val" and cfg.val_source is not None
    source = cfg.val_source if own else cfg.source
    found = open_source(source)
    held = next((name for name in ("test", "validation", "val") if name in found), None)
    train = "train" if "train" in found else next(iter(found))
    if split == "val" and held:
        return source, found[held], 0.0
    return source, found[train], 0.0 if own or cfg.val_source or held else cfg.val_fraction


def columns(source: str, rows: datasets.Dataset) -> tuple[str, str | None, list[str] | None]:
    """Names of the picture and the caption column, and the class names if captions are labels. Raises UserError."""
    kinds = rows.features
    picture = next(
        (
            name
            for name, kind in kinds.items()
            if isinstance(kind, datasets.Image)
            or isinstance(kind, dict)
            and kind.keys() == {"bytes", "path"}
        ),
        None,
    )
    if picture is None:
        raise UserError(f"data source {source} has no column of pictures but {', '.join(kinds)}")
    text = next((name for name in ("text", "caption") if name in kinds), None)
    label = next(
        (name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)), None
    )
    return picture, text or label, None if text or label is None else kinds[label].names


# ----------------------------------------------------------------------------------------------------- preparation
def prepare(cfg: ImageConfig, split: str, size: int) -> Path:
    """Have the pictures of a split on disk, cut square and at most `size` pixels a side; return their folder.

    All are kept at the side of the first. Written under a temporary name, so never half there. Raises UserError.
    """
    names = {"source": cfg.source, "val_source": cfg.val_source}
    paths = [
        path
        for name in names.values()
        if name
        for path in (Path(name).expanduser(), *map(Path, glob(name)))
    ]
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.*")))
    ]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    wanted = {
        **names,
        "files": stats,
        "split": split,
        "val_fraction": cfg.val_fraction,
        "size": size,
    }
    folder = Path(cfg.cache) / "pictures" / f"{split}-{digest(wanted)}"
    if folder.is_dir():
        return folder
    source, rows, fraction = choose_split(cfg, split)
    picture_column, caption_column, classes = columns(source, rows)
    rows = rows.cast_column(picture_column, datasets.Image(decode=False))
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    side, captions = None, []
    with (tmp / "pictures.bin").open("wb") as out:
        for i, row in enumerate(
            tqdm(rows, desc=f"decoding {split}", disable=not sys.stderr.isatty())
        ):
            try:
                picture = datasets.Image().decode_example(row[picture_column]).convert("RGB")
            except Exception as error:  # PIL raises dozens of kinds
                name = (row[picture_column] or {}).get("path") or f"number {i}"
                raise UserError(
                    f"picture {name} of {source} cannot be read: {reason(error)}; mend or remove it"
                ) from error
            side = side or min(*picture.size, size)
            pixels = np.asarray(square(picture, side))
            if fraction and in_validation({"": pixels.ravel()}, fraction) != (split == "val"):
                continue
            caption = row[caption_column] if caption_column else None
            if caption_column and (caption is None or caption == -1 or not str(caption).strip()):
                raise UserError(
                    f"picture number {i} of {source} has nothing in column {caption_column!r}"
                )
            captions.append(caption)
            out.write(pixels.tobytes())
    if not captions:
        raise UserError(
            f"data source {source} has no pictures for {split}: give more, or another --data.val_fraction"
        )
    manifest = {
        "request": wanted,
        "count": len(captions),
        "side": side,
        "classes": classes,
        "sha256": file_sha256(tmp / "pictures.bin"),
        "captions": captions if caption_column else None,
    }
    write_text(tmp / "manifest.json", json.dumps(manifest))
    tmp.rename(folder)
    return folder


def square(picture: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture at side x side pixels."""
    (w, h), edge = picture.size, min(picture.size)
    box = ((w - edge) / 2, (h - edge) / 2, (w + edge) / 2, (h + edge) / 2)
    return (
        picture
        if picture.size == (side, side)
        else picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
    )


class Pictures:
    """A prepared split: `pixels`, `caption`, and `labels` (N,) with `classes` where captions are made from labels."""

    def __init__(self, folder: Path):
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            shape = (manifest["count"], 3, manifest["side"], manifest["side"])
            raw = np.memmap(
                folder / "pictures.bin", np.uint8, mode="r", shape=(shape[0], *shape[2:], 3)
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is damaged: delete it to prepare it again") from error
        self.raw, self.side, self.classes, self.captions = (
            raw,
            manifest["side"],
            manifest["classes"],
            manifest["captions"],
        )
        self.id, self.labels = (
            manifest["sha256"],
            np.array(manifest["captions"]) if manifest["classes"] else None,
        )

    def __len__(self) -> int:
        return len(self.raw)

    def pixels(self, index: int) -> np.ndarray:
        """A picture as (3, s, s) uint8."""
        return self.raw[index].transpose(2, 0, 1)

    def augmented(self, index: int, draw: int) -> np.ndarray:
        """The picture shifted by up to an eighth with its edges mirrored, perhaps flipped, perhaps of other brightness."""
        rng, pixels = np.random.default_rng((index, draw)), self.pixels(index)
        ys, xs = (
            reflected(np.arange(self.side) + shift, self.side)
            for shift in rng.integers(-(self.side // 8), self.side // 8 + 1, size=2)
        )
        if self.classes and rng.random() < 0.5:  # a caption might say left or right
            xs = xs[::-1]
        pixels = pixels[:, ys[:, None], xs]
        if rng.random() < 0.3:
            contrast, brightness = rng.uniform(0.9, 1.1), rng.uniform(-12, 12)
            pixels = np.clip((pixels - 127.5) * contrast + 127.5 + brightness, 0, 255).astype(
                np.uint8
            )
        return pixels

    def caption(self, index: int, draw: int) -> str:
        """What is said of the picture in pass `draw`."""
        if self.classes:
            return label_caption(
                self.classes[self.labels[index]], np.random.default_rng((index, draw, 1))
            )
        return self.captions[index]


def reflected(positions: np.ndarray, side: int) -> np.ndarray:
    """Positions outside 0 to side - 1 mirrored there."""
    return side - 1 - np.abs(side - 1 - np.abs(positions))


def article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def label_caption(name: str, rng: np.random.Generator) -> str:
    """One of many ways to name a class; "a photo of a NAME" more often than the others."""
    noun = name.replace("_", " ").lower()
    if noun in SYNONYMS and rng.random() < 0.25:
        noun = str(rng.choice(SYNONYMS[noun]))
    template = TEMPLATES[0 if rng.random() < 0.3 else rng.integers(len(TEMPLATES))]
    caption = template.format(article(noun))
    return caption[0].upper() + caption[1:] if rng.random() < 0.5 else caption


class Shapes:
    """Drawn scenes, with the interface of Pictures. Colour-shape pairs that are held out occur in no split."""

    classes = labels = None

    def __init__(self, split: str, side: int):
        self.side, self.seed, self.n = side, 0 if split == "train" else 1, SHAPES[split]
        self.id, self.captions = f"shapes-{split}-{side}", self

    def __len__(self) -> int:
        return self.n

    def pixels(self, index: int) -> np.ndarray:
        return shapes.draw(shapes.scene(self.seed, index), self.side).transpose(2, 0, 1)

    def caption(self, index: int, draw: int) -> str:
        return shapes.scene(self.seed, index).caption


def load_pictures(
    cfg: ImageConfig, split: str, size: int, captions: bool = False
) -> Pictures | Shapes:
    """The pictures of "train" or "val", prepared if need be. Raises UserError, with `captions` also where there are none."""
    if (cfg.val_source if split == "val" and cfg.val_source else cfg.source) == "shapes":
        return Shapes(split, size)
    found = Pictures(prepare(cfg, split, size))
    if captions and found.captions is None:
        raise UserError(
            f"data source {cfg.source} has neither labels with names nor a column `text`: captions are needed"
        )
    return found


# --------------------------------------------------------------------------------------------------------- batches
def load_pixels(
    data: Pictures | Shapes, indices: Sequence[int], draws: Sequence[int] | None
) -> Tensor:
    """Pictures (B, 3, s, s) uint8 as they are stored, augmented for their pass unless draws is None."""
    plain = draws is None or isinstance(data, Shapes)
    return torch.from_numpy(
        np.stack(
            [
                data.pixels(i) if plain else data.augmented(i, d)
                for i, d in zip(indices, draws or indices)
            ]
        )
    )


def scaled(pixels: Tensor, size: int, device: torch.device) -> Tensor:
    """Pixels (B, 3, s, s) uint8 as pictures (B, 3, size, size) in [-1, 1] on the device."""
    pictures = pixels.to(device).float() / 127.5 - 1
    return (
        pictures
        if pixels.shape[-1] == size
        else F.interpolate(pictures, size=(size, size), mode="bilinear")
    )


def plain_pictures(
    data: Pictures | Shapes, indices: Sequence[int], size: int, device: torch.device
) -> Tensor:
    """Pictures (B, 3, size, size) in [-1, 1] on the device, as they are."""
    return scaled(load_pixels(data, indices, None), size, device)


def picks(step: int, batch: int, n: int, seed: int) -> tuple[list[int], list[int]]:
    """Which pictures of n a step sees, and in which pass over them each is: every picture once a pass."""
    return batch_indices(step, batch, n, seed), [
        i // n for i in range(step * batch, (step + 1) * batch)
    ]


def spread(data: Pictures | Shapes, count: int) -> list[int]:
    """At most `count` indices spread evenly over the data: sources may be sorted by class."""
    return np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int).tolist()


class CodeCache:
    """Codes of (index, draw) in a sparse file of uint16, filled as they are asked for; 0 stands for not yet there."""

    def __init__(self, cache: str, key: dict, n_rows: int, image_tokens: int):
        self.path = Path(cache) / "codes" / f"{digest(key)}.u16"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:  # new rows are holes in the file until they are written
            file.truncate(max(file.tell(), n_rows * image_tokens * 2))
        self.rows = np.memmap(self.path, np.uint16, mode="r+").reshape(-1, image_tokens)

    def get(self, wanted: Sequence[int], encode: Callable[[list[int]], Tensor]) -> Tensor:
        """Codes (N, image_tokens) int64 of the wanted rows; `encode` makes those of the rows it is given."""
        if missing := [row for row in dict.fromkeys(wanted) if not self.rows[row].all()]:
            self.rows[missing] = encode(missing).cpu().numpy() + 1
        return torch.from_numpy(self.rows[list(wanted)].astype(np.int64)) - 1


# -------------------------------------------------------------------------------------------------------- pictures
def to_uint8(pictures: Tensor) -> np.ndarray:
    """Pictures (B, 3, S, S) in [-1, 1] as (B, S, S, 3) uint8."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sheet(
    pictures: np.ndarray, columns: int, titles: Sequence[str] = (), heading: str = "", gap: int = 2
) -> Image.Image:
    """Pictures (N, S, S, 3) uint8 side by side, under a heading and each under its title, if there are any.

    Small pictures are enlarged, pixel by pixel, until a title of four lines has room.
    """
    scale = -(-128 // pictures.shape[1]) if titles else 1
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    n, side = pictures.shape[:2]
    top, head = 16 if heading else 0, 50 if titles else 0
    wide, high = columns * (side + gap) + gap, top + -(-n // columns) * (side + head + gap) + gap
    paper = Image.new("RGB", (wide, high), "lightgray")  # a picture may be white
    pen = ImageDraw.Draw(paper)
    for i, picture in enumerate(pictures):
        x, y = gap + i % columns * (side + gap), top + gap + i // columns * (side + head + gap)
        paper.paste(Image.fromarray(picture), (x, y + head))
        if titles:
            pen.multiline_text(
                (x, y), "\n".join(textwrap.wrap(titles[i], side // 6)[:4]), fill="black", spacing=1
            )
    pen.text((gap, 2), heading, fill="black")
    return paper
