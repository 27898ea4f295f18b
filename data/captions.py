"""Captions, and images as cached image tokens.

The caption of an image in an epoch is a pure function of (index, epoch), like its augmentation. So
resuming is exact and image tokens can be cached.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from common.disk import cache_errors
from data import shapes
from data.images import ImageDataset, ShapesDataset, load_pixels
from data.order import evenly_spaced
from data.source import digest
from data.tokenizer import load_tokenizer

TOKENIZER_CAPTIONS = 20_000  # captions that a bpe-N tokenizer is trained on
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


# ---- captions
def article(noun: str) -> str:
    """A noun with its indefinite article, chosen by the first letter."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def label_caption(name: str, rng: np.random.Generator) -> str:
    """Random caption for a class name; "a photo of a NAME" is the most common."""
    noun = name.replace("_", " ").lower()
    if noun in SYNONYMS and rng.random() < 0.25:
        noun = str(rng.choice(SYNONYMS[noun]))
    template = TEMPLATES[0]
    if rng.random() >= 0.3:
        template = TEMPLATES[rng.integers(len(TEMPLATES))]
    text = template.format(article(noun))
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text


def caption(data: ImageDataset | ShapesDataset, index: int, epoch: int) -> str:
    """Caption of an image in an epoch: made from its class label, or else its own caption.

    The template for a label, or one of several captions, is chosen at random in each epoch.
    """
    if isinstance(data, ShapesDataset):
        return shapes.scene(data.seed, index).caption
    rng = np.random.default_rng((index, epoch, 1))
    if data.classes:
        return label_caption(data.classes[data.labels[index]], rng)
    own = data.captions[index]
    return own if isinstance(own, str) else own[rng.integers(len(own))]


def caption_tokenizer(cfg, data: ImageDataset | ShapesDataset, saved: Path | None = None):
    """The tokenizer in the folder `saved`, or else cfg.tokenizer; bpe-N is trained on the captions
    of the data. Raises UserError.
    """

    def texts() -> Iterator[str]:
        return (caption(data, i, 0) for i in evenly_spaced(len(data), TOKENIZER_CAPTIONS))

    return load_tokenizer(cfg, f"captions of {data.id}", texts, saved=saved)


# ---- image tokens
class ImageTokenCache:
    """Image tokens in a sparse file, one row per image and epoch, encoded when first requested.

    A row is the tokens as uint16, followed by their crc32. A row without a valid crc32 was never
    written (it reads as zeros), was truncated by a kill or is damaged; it is encoded again.
    Processes may share the file. Raises UserError if it cannot be read or written.
    """

    def __init__(self, cache_dir: str, key: dict, n_image_tokens: int):
        self.row_bytes = 2 * n_image_tokens + 4
        self.path = Path(cache_dir) / "image_tokens" / f"{digest(key)}.rows"
        with cache_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()

    def get(self, rows: Sequence[int], encode: Callable[[list[int]], Tensor]) -> Tensor:
        """Image tokens int64 (N, n_image_tokens) of rows; encode(rows) computes missing ones."""
        with cache_errors(self.path), self.path.open("rb") as file:
            found = {row: self.load(file, row) for row in rows}
        missing = [row for row, tokens in found.items() if tokens is None]
        if missing:
            encoded = encode(missing).cpu().numpy().astype("<u2")  # (missing, n_image_tokens)
            found |= zip(missing, encoded, strict=True)
            with cache_errors(self.path), self.path.open("r+b") as file:
                for row in missing:
                    data = found[row].tobytes()
                    file.seek(row * self.row_bytes)
                    file.write(data + zlib.crc32(data).to_bytes(4, "little"))
        return torch.from_numpy(np.stack([found[row] for row in rows]).astype(np.int64))

    def load(self, file: BinaryIO, row: int) -> np.ndarray | None:
        """Stored tokens uint16 (n_image_tokens,) of a row, None if there are none."""
        file.seek(row * self.row_bytes)
        data = file.read(self.row_bytes)
        if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
            return None
        return np.frombuffer(data[:-4], "<u2")


@dataclass
class TokenizedImages:
    """Image tokens of a dataset: cached on disk or, without a cache, encoded batch by batch.

    encode maps pixels (B, 3, s, s) uint8 to image tokens (B, n_image_tokens).
    """

    data: ImageDataset | ShapesDataset
    encode: Callable[[Tensor], Tensor]
    augment: bool
    cache: ImageTokenCache | None

    def read(self, indices: Sequence[int], epochs: Sequence[int]) -> Tensor:
        """Image tokens (B, n_image_tokens) int64 from the cache, or pixels (B, 3, s, s) uint8 if
        there is no cache, so that a GPU encodes in the training loop while the CPU reads ahead.

        Without augmentation, every epoch counts as epoch 0.
        """
        if not self.augment:
            epochs = [0] * len(indices)
        rows = [e * len(self.data) + i for i, e in zip(indices, epochs, strict=True)]
        if self.cache is None:
            return self.pixels(rows)
        return self.cache.get(rows, lambda missing: self.encode(self.pixels(missing)))

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Pixels (B, 3, s, s) uint8 of cache rows; row = epoch * len(data) + index."""
        indices = [row % len(self.data) for row in rows]
        epochs = [row // len(self.data) for row in rows] if self.augment else None
        return load_pixels(self.data, indices, epochs)

    def tokens(self, content: Tensor) -> Tensor:
        """Image tokens (B, n_image_tokens) of what read() returned; encoded ones are on the
        encoder's device.
        """
        return self.encode(content) if self.cache is None else content


def tokenized(
    data: ImageDataset | ShapesDataset,
    encode: Callable[[Tensor], Tensor],
    *,
    cache_dir: str,
    encoder: dict,
    augment: bool,
    n_image_tokens: int,
    cached: bool,
) -> TokenizedImages:
    """TokenizedImages, with a cache if `cached`.

    `encoder` must contain everything that determines the output of `encode`: the VQ-VAE's weights
    and config, its compute dtype and its device.
    """
    cache = None
    if cached:
        key = {"encoder": encoder, "images": data.id, "augment": augment, "tokens": n_image_tokens}
        cache = ImageTokenCache(cache_dir, key, n_image_tokens)
    return TokenizedImages(data, encode, augment=augment, cache=cache)
