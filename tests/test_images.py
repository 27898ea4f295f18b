import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from common import UserError
from data import images
from data.images import (
    CodeCache,
    ImageConfig,
    Shapes,
    load_pictures,
    load_pixels,
    picks,
    plain_pictures,
    scaled,
    sheet,
)

CPU = torch.device("cpu")


def picture(i: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


@pytest.fixture
def pets(workdir):
    """A folder in the imagefolder layout with 20 cats and 20 dogs, and the same as hub-like parquet with labels."""
    for i in range(40):
        folder = Path("pets") / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i:02d}.png")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    datasets.Dataset.from_dict(
        {"img": [picture(i) for i in range(40)], "label": [i % 2 for i in range(40)]},
        features=features,
    ).to_parquet("pets.parquet")
    return ImageConfig(source="pets", val_fraction=0.3)


def contents(data) -> set[bytes]:
    return {data.pixels(i).tobytes() for i in range(len(data))}


def test_folder_and_parquet_hold_the_same_pictures_and_no_one_is_on_both_sides(pets):
    sides = {}
    for source in ("pets", "pets.parquet", "pet*.parquet"):
        train, val = (
            load_pictures(ImageConfig(source=source, val_fraction=0.3), split, 64)
            for split in ("train", "val")
        )
        assert (
            len(train) + len(val) == 40
            and 4 <= len(val) <= 20
            and not contents(train) & contents(val)
        )
        assert train.classes == ["cat", "dog"] and train.side == 32
        sides[source] = contents(train), contents(val)
    assert sides["pets"] == sides["pets.parquet"] == sides["pet*.parquet"]
    index = next(i for i in range(len(train)) if train.labels[i] == 1)
    assert any(
        (train.pixels(index).transpose(1, 2, 0) == np.asarray(picture(i))).all()
        for i in range(1, 40, 2)
    )


def test_a_split_or_source_of_its_own_is_validation(pets):
    for i in range(6):
        Path(f"own/{('train', 'test')[i % 2]}/cat").mkdir(parents=True, exist_ok=True)
        picture(100 + i).save(f"own/{('train', 'test')[i % 2]}/cat/{i}.png")
    assert [
        len(load_pictures(ImageConfig(source="own"), split, 32)) for split in ("train", "val")
    ] == [3, 3]
    other = ImageConfig(source="pets", val_source="own")
    assert [len(load_pictures(other, split, 32)) for split in ("train", "val")] == [40, 3]


def test_other_sizes_are_cut_square_and_made_small(workdir):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200  # the middle square
    Path("a/x").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(wide).save(f"a/x/{i}.png")
    data = load_pictures(ImageConfig(source="a", val_source="a"), "train", 16)
    assert (
        data.side == 16 and (abs(data.pixels(0).astype(int) - 200) < 20).all()
    )  # edges see a little beyond
    assert plain_pictures(data, [0, 1], 32, CPU).shape == (2, 3, 32, 32)


def test_text_columns_are_captions_and_never_mirrored(pets):
    meta = [{"file_name": f"{i}.png", "text": f"a cat left of {i} dogs"} for i in range(4)]
    Path("said").mkdir()
    Path("said/metadata.jsonl").write_text("\n".join(map(json.dumps, meta)))
    for i in range(4):
        Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 7, (32, 1, 3))).save(
            f"said/{i}.png"
        )
    said = load_pictures(ImageConfig(source="said", val_source="said"), "train", 32, captions=True)
    assert said.caption(2, 0) == said.caption(2, 5) == "a cat left of 2 dogs"
    rises = [np.diff(said.augmented(0, d)[0, 0].astype(int)[8:24]).sum() > 0 for d in range(30)]
    assert all(rises)  # brighter to the right, always
    pet = load_pictures(pets, "train", 32)
    pet.raw = np.tile(np.arange(32, dtype=np.uint8)[None, None, :, None] * 7, (len(pet), 32, 1, 3))
    rises = [np.diff(pet.augmented(0, d)[0, 0].astype(int)[8:24]).sum() > 0 for d in range(30)]
    assert 5 < sum(rises) < 25


def test_augmentation_is_a_function_of_picture_and_pass(pets):
    data = load_pictures(pets, "train", 32)
    draws = [data.augmented(3, d).tobytes() for d in range(10)]
    assert draws == [data.augmented(3, d).tobytes() for d in range(10)] and len(set(draws)) == 10
    plain = plain_pictures(data, [3], 32, CPU)
    assert torch.equal(plain[0], torch.from_numpy(data.pixels(3).copy()).float() / 127.5 - 1)
    assert not torch.equal(plain, scaled(load_pixels(data, [3], [0]), 32, CPU))
    assert plain.min() >= -1 and plain.max() <= 1


def test_captions_of_labels_are_many_and_name_the_class(pets):
    data = load_pictures(pets, "train", 32)
    said = [data.caption(0, d) for d in range(300)]
    names = ("dog", "hound") if data.labels[0] else ("cat",)
    assert all(any(name in caption.lower() for name in names) for caption in said)
    assert (
        len({caption.lower() for caption in said}) > 20
        and 60 < sum(c[0].isupper() for c in said) < 240
    )
    assert sum(c.lower().startswith("a photo of a ") for c in said) > 60 and said == [
        data.caption(0, d) for d in range(300)
    ]
    assert images.article("airplane") == "an airplane" and images.article("ship") == "a ship"


def test_every_picture_comes_once_a_pass():
    seen = [pair for step in range(5) for pair in zip(*picks(step, 4, 10, seed=1))]
    assert sorted(i for i, draw in seen if draw == 0) == list(range(10)) and {
        d for _, d in seen
    } == {0, 1}


def test_codes_are_made_once(workdir):
    asked = []

    def encode(rows):
        asked.extend(rows)
        return torch.tensor([[row, 0, 65_534] for row in rows])

    for n_rows in (8, 20):  # opened again, and with more rows
        cache = CodeCache("cache", {"weights": "a"}, n_rows, 3)
        assert cache.get([5, 2, 5], encode).tolist() == [
            [5, 0, 65_534],
            [2, 0, 65_534],
            [5, 0, 65_534],
        ]
    assert asked == [5, 2] and cache.get([19], encode).tolist() == [[19, 0, 65_534]]
    CodeCache("cache", {"weights": "b"}, 8, 3).get([5], encode)
    assert asked == [5, 2, 19, 5]


def test_shapes_are_endless_and_validation_has_its_own():
    train, val = Shapes("train", 32), Shapes("val", 32)
    assert train.caption(7, 0) == train.caption(7, 3) and train.pixels(7).shape == (3, 32, 32)
    assert not contents_of(train, 50) & contents_of(val, 50)


def contents_of(data, n: int) -> set[bytes]:
    return {data.pixels(i).tobytes() for i in range(n)}


def test_sheet_shows_every_picture_and_its_title():
    pictures = np.stack([np.full((16, 16, 3), 10 * i, np.uint8) for i in range(5)])
    plain, titled = (
        np.asarray(sheet(pictures, 3)),
        np.asarray(sheet(pictures, 3, titles=["a long title " * 9] * 5)),
    )
    assert (
        all((plain == 10 * i).all(-1).sum() == 256 for i in range(1, 5))
        and titled.shape[0] > plain.shape[0]
    )


@pytest.mark.parametrize(
    "make, says",
    [
        (
            lambda: Path("pets/cat/00.png").write_bytes(b"no picture"),
            "00.png of pets cannot be read",
        ),
        (
            lambda: Path("pets/cat/00.png").write_bytes(Path("pets/cat/02.png").read_bytes()[:500]),
            "00.png of pets cannot be read",
        ),
    ],
)
def test_a_broken_picture_is_named(pets, make, says):
    make()
    with pytest.raises(UserError, match=says):
        load_pictures(pets, "train", 32)
    assert not list(Path("cache").rglob("manifest.json"))  # nothing half-done is taken for whole


def test_sources_without_pictures_or_captions(pets):
    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet("text.parquet")
    with pytest.raises(UserError, match="no column of pictures but text, n"):
        load_pictures(ImageConfig(source="text.parquet"), "train", 32)
    datasets.Dataset.from_dict(
        {"img": [picture(1)], "n": [3]},
        features=datasets.Features({"img": datasets.Image(), "n": datasets.Value("int64")}),
    ).to_parquet("bare.parquet")
    bare = ImageConfig(source="bare.parquet", val_source="bare.parquet")
    assert len(load_pictures(bare, "train", 32)) == 1  # enough for a VQ-VAE
    with pytest.raises(UserError, match="neither labels with names nor a column `text`"):
        load_pictures(bare, "train", 32, captions=True)
    datasets.Dataset.from_dict(
        {"img": [picture(1), None], "text": ["a", "b"]},
        features=datasets.Features({"img": datasets.Image(), "text": datasets.Value("string")}),
    ).to_parquet("gap.parquet")
    with pytest.raises(UserError, match="picture number 1 of gap.parquet cannot be read"):
        load_pictures(ImageConfig(source="gap.parquet", val_source="gap.parquet"), "train", 32)
