import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from data.captions import (
    SYNONYMS,
    TEMPLATES,
    ImageTokenCache,
    article,
    caption,
    caption_tokenizer,
    label_caption,
    tokenized,
)
from data.images import ImageConfig, ShapesDataset, load_images, load_pixels

N_EPOCHS = 3


@pytest.fixture
def pets(workdir):
    """20 random images with the labels cat and dog in turn, not held out."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    columns = {"img": [Image.fromarray(p) for p in pixels], "label": [0, 1] * 10}
    datasets.Dataset.from_dict(columns, features=features).to_parquet("pets.parquet")
    config = ImageConfig(source="pets.parquet", val_source="pets.parquet")
    return load_images(config, "train", 16, captions=True)


# ---- captions
@pytest.mark.parametrize("noun, text", [("airplane", "an airplane"), ("ship", "a ship")])
def test_the_article_fits_the_noun(noun, text):
    assert article(noun) == text


@pytest.mark.parametrize("index, names", [(0, ("cat",)), (1, ("dog", *SYNONYMS["dog"]))])
def test_captions_made_from_a_label_name_its_class(pets, index, names):
    texts = [caption(pets, index, epoch).lower() for epoch in range(300)]
    assert all(any(name in text for name in names) for text in texts)


def test_captions_made_from_a_label_are_many(pets):
    texts = [caption(pets, 1, epoch) for epoch in range(300)]
    assert len({text.lower() for text in texts}) > 20


def test_half_of_the_captions_made_from_a_label_are_capitalized(pets):
    texts = [caption(pets, 1, epoch) for epoch in range(300)]
    assert 100 < sum(text[0].isupper() for text in texts) < 200


def test_the_first_template_is_the_most_common(pets):
    texts = [caption(pets, 0, epoch).lower() for epoch in range(300)]
    counts = [texts.count(template.format("a cat")) for template in TEMPLATES]
    assert counts[0] > 60
    assert max(counts[1:]) < counts[0] / 2


def test_captions_are_a_function_of_index_and_epoch(pets):
    texts = [caption(pets, 0, epoch) for epoch in range(30)]
    assert texts == [caption(pets, 0, epoch) for epoch in range(30)]
    assert texts != [caption(pets, 2, epoch) for epoch in range(30)]  # another cat


def test_underscores_in_class_names_become_spaces():
    assert "pickup truck" in label_caption("pickup_truck", np.random.default_rng(0)).lower()


@pytest.mark.parametrize("epoch", [0, 5])
def test_an_own_caption_is_the_same_in_every_epoch(pets, epoch):
    pets.classes, pets.captions = None, ["a cat left of 2 dogs"]
    assert caption(pets, 0, epoch) == "a cat left of 2 dogs"


def test_a_rendered_scene_has_a_fixed_caption_of_its_own():
    data = ShapesDataset("train", 32)
    assert caption(data, 7, 0) == caption(data, 7, 3) != caption(data, 8, 0)


def test_a_caption_tokenizer_is_trained_on_captions(pets):
    class Config:
        tokenizer, cache = "bpe-300", "cache"

    tokenizer = caption_tokenizer(Config, pets)
    assert len(tokenizer) == 300
    assert len(tokenizer("a photo of a cat")["input_ids"]) < len("a photo of a cat") / 2


# ---- image tokens
class Encoder:
    """Stands for a VQ-VAE: the first three values of the first channel are the image tokens."""

    def __init__(self):
        self.n_images = 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.n_images += len(pixels)
        return pixels[:, 0, 0, :3].long()  # (B, 3)


def tokenized_pets(pets, encode, augment: bool, cached: bool):
    return tokenized(
        pets,
        encode,
        cache_dir="cache",
        weights_sha256="some weights",
        n_epochs=N_EPOCHS,
        augment=augment,
        n_image_tokens=3,
        cached=cached,
    )


either_way = pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])


def test_token_cache_encodes_each_row_once(workdir):
    requested = []

    def encode(rows):
        requested.extend(rows)
        return torch.tensor([[row, 0, 65_534] for row in rows])

    first = ImageTokenCache("cache", {"weights": "a"}, 8, 3)
    assert first.get([5, 2, 5], encode).tolist() == [[row, 0, 65_534] for row in (5, 2, 5)]
    larger = ImageTokenCache("cache", {"weights": "a"}, 20, 3)  # opened again, with more rows
    assert larger.get([5, 19], encode).tolist() == [[row, 0, 65_534] for row in (5, 19)]
    assert requested == [5, 2, 19]


def test_token_caches_of_different_keys_are_separate(workdir):
    for weights, token in (("a", 1), ("b", 2)):
        cache = ImageTokenCache("cache", {"weights": weights}, 8, 3)
        tokens = cache.get([5], lambda rows, token=token: torch.full((len(rows), 3), token))
        assert tokens.tolist() == [[token] * 3]


@either_way
@pytest.mark.parametrize("augment", [True, False], ids=["augmented", "not augmented"])
def test_image_tokens_are_those_of_the_pixels_in_their_epoch(pets, augment, cached):
    indices, epochs = [3, 4, 3], [0, 1, 2]
    images = tokenized_pets(pets, Encoder(), augment, cached)
    tokens = images.tokens(images.read(indices, epochs))
    pixels = load_pixels(pets, indices, epochs if augment else None)
    assert torch.equal(tokens, Encoder()(pixels))


def test_without_a_cache_pixels_are_read_and_encoded_later(pets):
    encode = Encoder()
    content = tokenized_pets(pets, encode, augment=True, cached=False).read([3, 4], [0, 0])
    assert encode.n_images == 0
    assert torch.equal(content, load_pixels(pets, [3, 4], [0, 0]))


@pytest.mark.parametrize("augment, n_encoded", [(True, 4), (False, 2)])
def test_a_cache_encodes_an_augmented_image_once_per_epoch(pets, augment, n_encoded):
    encode = Encoder()
    images = tokenized_pets(pets, encode, augment, cached=True)
    for epoch in (0, 1, 0):
        images.read([3, 4], [epoch, epoch])
    assert encode.n_images == n_encoded


def test_caches_with_and_without_augmentation_are_separate(pets):
    paths = {tokenized_pets(pets, Encoder(), a, cached=True).cache.path for a in (True, False)}
    assert len(paths) == 2
