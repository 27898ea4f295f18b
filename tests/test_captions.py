import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from common.config import UserError
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


@pytest.fixture
def pets(workdir):
    """20 random images with the labels cat and dog in turn, not held out."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    columns = {"img": [Image.fromarray(p) for p in pixels], "label": [0, 1] * 10}
    datasets.Dataset.from_dict(columns, features=features).to_parquet("pets.parquet")
    config = ImageConfig(source="pets.parquet", val_source="shapes")
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


def test_each_epoch_takes_one_of_several_captions(pets):
    pets.classes, pets.captions = None, [["a cat", "a pet", "an animal"]]
    texts = [caption(pets, 0, epoch) for epoch in range(30)]
    assert set(texts) == {"a cat", "a pet", "an animal"}
    assert texts == [caption(pets, 0, epoch) for epoch in range(30)]


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
        encoder={"weights": "some weights"},
        augment=augment,
        n_image_tokens=3,
        cached=cached,
    )


either_way = pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])


class Rows:
    """Encodes row r as the tokens r, 0, 65535, and remembers which rows it encoded."""

    def __init__(self):
        self.encoded = []

    def __call__(self, rows: list[int]) -> torch.Tensor:
        self.encoded.extend(rows)
        return self.tokens(rows)

    @staticmethod
    def tokens(rows: list[int]) -> torch.Tensor:
        return torch.tensor([[row, 0, 65_535] for row in rows])


def token_cache(weights: str = "a") -> ImageTokenCache:
    return ImageTokenCache("cache", {"weights": weights}, 3)


def test_token_cache_encodes_each_row_once(workdir):
    encode = Rows()
    for rows in ([5, 2, 5], [5, 19], [2, 19, 5]):
        assert torch.equal(token_cache().get(rows, encode), Rows.tokens(rows))
    assert encode.encoded == [5, 2, 19]


def test_token_caches_of_different_keys_are_separate(workdir):
    for weights, token in (("a", 1), ("b", 2)):
        tokens = token_cache(weights).get(
            [5], lambda rows, token=token: torch.full((len(rows), 3), token)
        )
        assert tokens.tolist() == [[token] * 3]


def test_rows_that_were_never_written_are_encoded(workdir):
    token_cache().get([7], Rows())
    encode = Rows()
    assert torch.equal(token_cache().get([0, 7], encode), Rows.tokens([0, 7]))
    assert encode.encoded == [0]


@pytest.mark.parametrize("byte", range(10))
def test_a_damaged_row_is_encoded_again(workdir, byte):
    cache = token_cache()
    cache.get([0, 1, 2], Rows())
    content = bytearray(cache.path.read_bytes())
    content[10 + byte] ^= 1  # a row has 3 tokens of 2 bytes and 4 bytes of crc32
    cache.path.write_bytes(content)
    for expected in ([1], []):
        encode = Rows()
        assert torch.equal(cache.get([0, 1, 2], encode), Rows.tokens([0, 1, 2]))
        assert encode.encoded == expected


@pytest.mark.parametrize("n_bytes, n_left", [(0, 0), (15, 1), (29, 2)])
def test_rows_cut_off_are_encoded_again(workdir, n_bytes, n_left):
    cache = token_cache()
    cache.get([0, 1, 2], Rows())
    with cache.path.open("r+b") as file:
        file.truncate(n_bytes)
    encode = Rows()
    assert torch.equal(cache.get([0, 1, 2], encode), Rows.tokens([0, 1, 2]))
    assert encode.encoded == [0, 1, 2][n_left:]


def test_two_users_of_a_token_cache_share_rows(workdir):
    first, second, encode = token_cache(), token_cache(), Rows()
    first.get([3], encode)
    second.get([1, 3], encode)
    first.get([1], encode)
    assert encode.encoded == [3, 1]


def test_a_full_disk_is_reported_for_image_tokens(workdir):
    resource = pytest.importorskip("resource")
    cache = token_cache()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (995, limits[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write {cache.path}: File too large; free dis"):
            cache.get([99], Rows())
        assert cache.get([98], Rows()).tolist() == Rows.tokens([98]).tolist()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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


@pytest.mark.parametrize("change", [{"encoder": {"dtype": "bfloat16"}}, {"n_image_tokens": 2}])
def test_the_encoder_and_the_number_of_tokens_decide_the_cache(pets, change):
    options = {"encoder": {"dtype": "float32"}, "n_image_tokens": 3, "augment": False}
    paths = {
        tokenized(pets, Encoder(), cache_dir="cache", cached=True, **options | more).cache.path
        for more in ({}, change)
    }
    assert len(paths) == 2
