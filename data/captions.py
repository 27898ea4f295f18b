"""Captions, and images as cached image tokens.

The caption of an image in an epoch is a pure function of (index, epoch), like its augmentation. So
resuming is exact and image tokens can be cached.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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
    """Caption of an image: from its class label, different in each epoch, or else its own."""
    if isinstance(data, ShapesDataset):
        return shapes.scene(data.seed, index).caption
    if data.classes:
        rng = np.random.default_rng((index, epoch, 1))
        return label_caption(data.classes[data.labels[index]], rng)
    return data.captions[index]


def caption_tokenizer(cfg, data: ImageDataset | ShapesDataset):
    """The tokenizer cfg.tokenizer; a bpe-N is trained on captions of the data. Raises UserError."""

    def texts() -> Iterator[str]:
        return (caption(data, i, 0) for i in evenly_spaced(len(data), TOKENIZER_CAPTIONS))

    return load_tokenizer(cfg, f"captions of {data.id}", texts)


# ---- image tokens
class ImageTokenCache:
    """Image tokens by row in a sparse uint16 file, encoded when first requested.

    Stores token + 1, so that 0 marks a row that has not been encoded.
    """

    def __init__(self, cache_dir: str, key: dict, n_rows: int, n_image_tokens: int):
        self.path = Path(cache_dir) / "image_tokens" / f"{digest(key)}.u16"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:  # new rows are holes in the file until written
            file.truncate(max(file.tell(), n_rows * n_image_tokens * 2))
        # (rows, n_image_tokens)
        self.stored = np.memmap(self.path, np.uint16, mode="r+").reshape(-1, n_image_tokens)

    def get(self, rows: Sequence[int], encode: Callable[[list[int]], Tensor]) -> Tensor:
        """Image tokens int64 (N, n_image_tokens) of rows; encode(rows) makes those not stored."""
        missing = [row for row in dict.fromkeys(rows) if not self.stored[row].all()]
        if missing:
            self.stored[missing] = encode(missing).cpu().numpy() + 1
        return torch.from_numpy(self.stored[list(rows)].astype(np.int64)) - 1  # (N, n_image_tokens)


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
        """Image tokens (B, n_image_tokens), on the CPU, of what read() returned."""
        return self.encode(content).cpu() if self.cache is None else content


def tokenized(
    data: ImageDataset | ShapesDataset,
    encode: Callable[[Tensor], Tensor],
    *,
    cache_dir: str,
    weights_sha256: str,
    n_epochs: int,
    augment: bool,
    n_image_tokens: int,
    cached: bool,
) -> TokenizedImages:
    """TokenizedImages of n_epochs epochs, with a cache if `cached`.

    `encode` must be determined by weights_sha256, the hash of the VQ-VAE's weights.
    """
    key = {"weights": weights_sha256, "images": data.id, "augment": augment}
    cache = None
    if cached:
        cache = ImageTokenCache(cache_dir, key, len(data) * n_epochs, n_image_tokens)
    return TokenizedImages(data, encode, augment=augment, cache=cache)
