import json
import shutil
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from common.config import UserError
from data.image_source import content_key, decode_image
from data.images import (
    ImageConfig,
    ShapesDataset,
    image_grid,
    load_images,
    load_pixels,
    to_float,
    to_uint8,
    unaugmented_images,
)

CPU = torch.device("cpu")
RAMP = np.arange(32, dtype=np.uint8) * 7  # brighter to the right


def random_image(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def write_parquet(path: str, feature=None, **columns) -> str:
    """A parquet file with a column img of images and a second column of the given feature."""
    (other,) = columns.keys() - {"img"}
    features = datasets.Features({"img": datasets.Image(), other: feature})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


@pytest.fixture
def pets(workdir):
    """Folder pets/ in the imagefolder layout with 20 cats and 20 dogs; the same in pets.parquet."""
    for i in range(40):
        folder = Path("pets", ("cat", "dog")[i % 2])
        folder.mkdir(parents=True, exist_ok=True)
        random_image(i).save(folder / f"{i:02d}.png")
    feature = datasets.ClassLabel(names=["cat", "dog"])
    images = [random_image(i) for i in range(40)]
    write_parquet("pets.parquet", feature, img=images, label=[0, 1] * 20)
    return ImageConfig(source="pets", val_fraction=0.3)


def contents(data, n: int | None = None) -> set[bytes]:
    """Pixels of the first n images, all by default."""
    return {data.pixels(i).tobytes() for i in range(n or len(data))}


# ---- sources and splits
every_form = pytest.mark.parametrize("source", ["pets", "pets.parquet", "pet*.parquet"])


@every_form
def test_every_image_is_in_exactly_one_split(pets, source):
    config = ImageConfig(source=source, val_fraction=0.3)
    train, val = (load_images(config, split, 64) for split in ("train", "val"))
    assert len(train) + len(val) == 40
    assert 4 <= len(val) <= 20
    assert not contents(train) & contents(val)


@every_form
def test_the_form_of_a_source_does_not_change_its_splits(pets, source):
    config = ImageConfig(source=source, val_fraction=0.3)
    for split in ("train", "val"):
        expected = contents(load_images(pets, split, 64))
        assert contents(load_images(config, split, 64)) == expected


@every_form
def test_images_keep_their_pixels_side_and_labels(pets, source):
    data = load_images(ImageConfig(source=source, val_source="shapes"), "train", 64)
    assert data.side == 32
    assert data.classes == ["cat", "dog"]
    labels = {data.pixels(i).tobytes(): label for i, label in enumerate(data.labels)}
    for i in range(40):
        pixels = np.asarray(random_image(i)).transpose(2, 0, 1)
        assert labels[pixels.tobytes()] == i % 2


@pytest.fixture
def own_test_split(workdir):
    """Folder own/ with three images in train/ and two in test/."""
    for i in range(5):
        folder = Path("own", ("train", "test")[i % 2], "cat")
        folder.mkdir(parents=True, exist_ok=True)
        random_image(100 + i).save(folder / f"{i}.png")


@pytest.mark.parametrize("split, n_images", [("train", 3), ("val", 2)])
def test_the_test_split_of_a_source_is_validation(own_test_split, split, n_images):
    assert len(load_images(ImageConfig(source="own"), split, 32)) == n_images


@pytest.mark.parametrize("split, n_images", [("train", 40), ("val", 2)])
def test_the_test_split_of_a_validation_source_is_validation(pets, own_test_split, split, n_images):
    config = ImageConfig(source="pets", val_source="own")
    assert len(load_images(config, split, 32)) == n_images


def test_larger_images_are_cropped_to_the_center_and_resized(workdir):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200  # the center square
    Path("a/x").mkdir(parents=True)
    Image.fromarray(wide).save("a/x/0.png")
    data = load_images(ImageConfig(source="a", val_source="shapes"), "train", 16)
    assert data.pixels(0).shape == (3, 16, 16)
    # bicubic resampling near the edges reads a little beyond the crop
    assert (abs(data.pixels(0).astype(int) - 200) < 20).all()


def test_prepared_images_are_reused(pets, monkeypatch):
    load_images(pets, "train", 32)
    monkeypatch.setattr("data.images.open_source", None)
    assert len(load_images(pets, "train", 32)) > 0


def test_a_changed_file_is_prepared_again(pets):
    before = load_images(pets, "train", 32).id
    for i in (0, 2, 4, 6, 8, 10):
        random_image(200 + i).save(f"pets/cat/{i:02d}.png")
    assert load_images(pets, "train", 32).id != before


# ---- validation images are not trained on
@pytest.fixture
def overlap(pets, own_test_split):
    """own/test with two images of pets and one of own/train, as files of another type."""
    for path in ("pets/cat/00.png", "pets/dog/01.png", "own/train/cat/0.png"):
        Image.open(path).save(f"own/test/cat/{Path(path).stem}.bmp")


@pytest.mark.parametrize("source, n_images", [("pets", 38), ("pets.parquet", 38), ("own", 2)])
def test_validation_images_are_not_trained_on(overlap, source, n_images):
    config = ImageConfig(source=source, val_source=None if source == "own" else "own")
    train, val = (load_images(config, split, 32) for split in ("train", "val"))
    assert (len(train), len(val)) == (n_images, 5)
    assert not contents(train) & contents(val)


def test_images_left_out_of_training_are_counted_on_every_start(overlap, capsys):
    for _ in range(2):
        load_images(ImageConfig(source="pets", val_source="own"), "train", 32)
        expected = "; 2 of 40 images excluded (also in the validation set)"
        assert expected in capsys.readouterr().out


def test_images_are_compared_at_full_size(workdir):
    for folder, shade in (("train", 10), ("test", 11)):  # equal when reduced to one pixel
        Path("set", folder).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 10, np.uint8)).save(f"set/{folder}/0.png")
        image = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
        image.putpixel((0, 0), (shade, 0, 0))
        image.save(f"set/{folder}/1.png")
    assert len(load_images(ImageConfig(source="set"), "train", 1)) == 1


def test_images_of_another_shape_are_other_images():
    assert content_key(Image.new("RGB", (2, 8))) != content_key(Image.new("RGB", (8, 2)))


def test_training_images_are_prepared_again_if_validation_gains_one_of_them(pets, own_test_split):
    config = ImageConfig(source="pets", val_source="own")
    assert len(load_images(config, "train", 32)) == 40
    shutil.copy("pets/cat/00.png", "own/test/cat")
    assert len(load_images(config, "train", 32)) == 39


def test_duplicates_share_a_split(pets):
    shutil.copytree("pets/cat", "pets/dog/copies")
    train, val = (load_images(pets, split, 32) for split in ("train", "val"))
    assert len(train) + len(val) == 60
    assert not contents(train) & contents(val)


def test_a_source_validated_on_itself_is_refused(pets):
    message = "all 40 training images of data source pets are also validation images; pass another"
    with pytest.raises(UserError, match=message):
        load_images(ImageConfig(source="pets", val_source="pets.parquet"), "train", 32)


# ---- stored size
@pytest.mark.parametrize("size, side", [(16, 16), (64, 32)])
def test_the_largest_short_edge_decides_the_stored_side(pets, capsys, size, side):
    random_image(0).resize((6, 90)).save("pets/cat/00.png")
    for split in ("train", "val"):
        assert load_images(pets, split, size).side == side
    printed = capsys.readouterr().out
    assert f"pets: train images stored at {side} x {side} pixels" in printed
    assert printed.count("; 1 smaller image upscaled") == 1


# ---- what identifies the data
@pytest.mark.parametrize(
    "feature, values",
    [
        (datasets.Value("string"), ["a cat", "a dog"]),
        (datasets.ClassLabel(names=["cat", "dog"]), [0, 1]),
    ],
)
def test_the_id_depends_on_captions_and_labels(workdir, feature, values):
    ids = set()
    for texts in (values, values[::-1]):
        source = write_parquet("x.parquet", feature, img=[*map(random_image, (0, 1))], text=texts)
        ids.add(load_images(ImageConfig(source=source, val_source="shapes"), "train", 32).id)
    assert len(ids) == 2


def test_the_id_depends_on_the_names_of_classes(workdir):
    ids = set()
    for names in (["cat", "dog"], ["cat", "fox"]):
        feature = datasets.ClassLabel(names=names)
        source = write_parquet("x.parquet", feature, img=[random_image(0)], label=[0])
        ids.add(load_images(ImageConfig(source=source, val_source="shapes"), "train", 32).id)
    assert len(ids) == 2


# ---- augmentation
def test_augmentation_is_a_function_of_index_and_epoch(pets):
    data = load_images(pets, "train", 32)
    images = [data.augmented(3, epoch).tobytes() for epoch in range(10)]
    assert images == [data.augmented(3, epoch).tobytes() for epoch in range(10)]
    assert len(set(images)) == 10


def n_unflipped(data) -> int:
    """Of 30 augmentations of RAMP, those that get brighter to the right."""
    n_images = len(data)
    data.raw = np.broadcast_to(RAMP[None, None, :, None], (n_images, 32, 32, 3))
    rows = [data.augmented(0, epoch)[0, 0, 8:24].astype(int) for epoch in range(30)]
    return sum(row[-1] > row[0] for row in rows)


def test_images_with_labels_are_flipped_half_of_the_time(pets):
    assert 5 < n_unflipped(load_images(pets, "train", 32)) < 25


def test_images_with_captions_are_never_flipped(workdir):
    columns = {"img": [random_image(0)], "text": ["a cat left of a dog"]}
    source = write_parquet("said.parquet", datasets.Value("string"), **columns)
    data = load_images(ImageConfig(source=source, val_source="shapes"), "train", 32)
    assert n_unflipped(data) == 30


def test_pixels_are_augmented_only_for_epochs(pets):
    data = load_images(pets, "train", 32)
    plain = torch.from_numpy(np.stack([data.pixels(3)]))
    assert torch.equal(load_pixels(data, [3], None), plain)
    assert not torch.equal(load_pixels(data, [3], [0]), plain)


def test_captions_of_an_image_folder_come_from_its_metadata(workdir):
    Path("said").mkdir()
    for i in range(4):
        random_image(i).save(f"said/{i}.png")
    metadata = [{"file_name": f"{i}.png", "text": f"a cat left of {i} dogs"} for i in range(4)]
    Path("said/metadata.jsonl").write_text("\n".join(map(json.dumps, metadata)))
    config = ImageConfig(source="said", val_source="shapes")
    data = load_images(config, "train", 32, captions=True)
    assert data.captions == [f"a cat left of {i} dogs" for i in range(4)]
    assert data.classes is None and data.labels is None


# ---- rendered shapes
def test_splits_of_rendered_shapes_do_not_overlap():
    assert not contents(ShapesDataset("train", 32), 50) & contents(ShapesDataset("val", 32), 50)


def test_rendered_shapes_have_the_requested_size():
    assert load_images(ImageConfig(source="shapes"), "val", 24).pixels(7).shape == (3, 24, 24)


def test_rendered_shapes_are_not_augmented():
    data = ShapesDataset("train", 32)
    assert torch.equal(load_pixels(data, [7, 8], [0, 3]), load_pixels(data, [7, 8], None))


# ---- pixel values
def test_black_and_white_are_minus_one_and_one():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    images = to_float(pixels, 8, CPU)
    assert (images[0] == -1).all() and (images[1] == 1).all()


def test_pixels_survive_conversion_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    back = torch.from_numpy(to_uint8(to_float(pixels, 16, CPU))).permute(0, 3, 1, 2)
    assert torch.equal(back, pixels)


def test_images_are_resized_to_the_requested_size(pets):
    data = load_images(pets, "train", 32)
    assert unaugmented_images(data, [0, 1], 48, CPU).shape == (2, 3, 48, 48)


def test_unaugmented_images_are_the_stored_ones(pets):
    data = load_images(pets, "train", 32)
    expected = torch.from_numpy(data.pixels(3).copy()).float() / 127.5 - 1
    assert torch.equal(unaugmented_images(data, [3], 32, CPU)[0], expected)


# ---- image grid
@pytest.fixture
def gray_images():
    return np.stack([np.full((16, 16, 3), 10 * i, np.uint8) for i in range(1, 6)])


@pytest.mark.parametrize("value", [10, 20, 30, 40, 50])
def test_an_image_grid_shows_every_image_once(gray_images, value):
    grid = np.asarray(image_grid(gray_images, 3))
    assert (grid == value).all(-1).sum() == 16 * 16


def test_an_image_grid_has_the_requested_number_of_columns(gray_images):
    assert image_grid(gray_images, 3, gap=2).size == (3 * 18 + 2, 2 * 18 + 2)


def test_titles_enlarge_small_images(gray_images):
    grid = np.asarray(image_grid(gray_images, 3, titles=["a long title " * 9] * 5))
    assert (grid == 10).all(-1).sum() == 128 * 128


@pytest.mark.parametrize("options", [{"heading": "A heading"}, {"titles": ["a title"] * 5}])
def test_text_in_an_image_grid_is_darker_than_its_background(options):
    light_images = np.full((5, 16, 16, 3), 250, np.uint8)
    assert np.asarray(image_grid(light_images, 3)).min() > 200
    assert np.asarray(image_grid(light_images, 3, **options)).min() < 100


# ---- errors
@pytest.mark.parametrize("fraction", [0, 1])
def test_validation_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(ValueError, match=f"val_fraction is {fraction}; it must be between"):
        ImageConfig(val_fraction=fraction)


def not_an_image(path: Path) -> None:
    path.write_bytes(b"not an image")


def half_an_image(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize("damage", [not_an_image, half_an_image])
def test_a_damaged_image_is_named(pets, damage):
    damage(Path("pets/cat/00.png"))
    with pytest.raises(
        UserError, match="image pets/cat/00.png cannot be read: .*; fix or remove it"
    ):
        load_images(pets, "train", 32)


def test_a_failed_preparation_leaves_no_prepared_folder(pets):
    not_an_image(Path("pets/cat/38.png"))
    with pytest.raises(UserError, match="38.png"):
        load_images(pets, "train", 32)
    assert not list(Path("cache").rglob("manifest.json"))
    random_image(38).save("pets/cat/38.png")
    assert len(load_images(pets, "train", 32)) > 20


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip])
@pytest.mark.parametrize("name", ["images.bin", "manifest.json"])
def test_a_damaged_prepared_folder_is_named_and_can_be_prepared_again(pets, name, damage):
    before = load_images(pets, "train", 32)
    (folder,) = Path("cache/images").glob("train-*")
    damage(folder / name)
    with pytest.raises(UserError, match=rf"is damaged.*; delete {folder} to prepare it again"):
        load_images(pets, "train", 32)
    shutil.rmtree(folder)
    assert load_images(pets, "train", 32).id == before.id


def test_an_interrupted_preparation_leaves_nothing(pets, monkeypatch):
    monkeypatch.setattr("data.images.square", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        load_images(pets, "train", 32)
    assert not [path for path in Path("cache/images").iterdir() if path.is_dir()]


def test_two_preparations_at_once_both_succeed(pets, monkeypatch):
    ids, n_decoded = [], [0]
    second = threading.Thread(target=lambda: ids.append(load_images(pets, "train", 32).id))

    def decode(encoded, name):
        n_decoded[0] += 1
        if n_decoded[0] == 10:
            second.start()
            second.join(0.5)  # would finish or break the first one if nothing held it back
        return decode_image(encoded, name)

    monkeypatch.setattr("data.images.decode_image", decode)
    ids.append(load_images(pets, "train", 32).id)
    second.join()
    assert len(ids) == 2 and len(set(ids)) == 1
    assert n_decoded == [80]


def test_a_full_disk_is_reported(pets):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # of 40 * 3,072 bytes
    try:
        with pytest.raises(
            UserError, match="cannot write cache/images/val-.*: File too large; free"
        ):
            load_images(ImageConfig(source="pets", val_fraction=0.99), "val", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in Path("cache/images").iterdir() if path.is_dir()]


def test_an_empty_split_is_refused_with_a_fraction_that_works(pets):
    with pytest.raises(UserError, match="none of the 40 images .* for the train") as error:
        load_images(ImageConfig(source="pets", val_fraction=1 - 1e-9), "train", 32)
    works = float(str(error.value).rpartition(" ")[2])
    assert len(load_images(ImageConfig(source="pets", val_fraction=works), "train", 32)) == 1


def test_a_small_fraction_holds_out_one_image_and_says_so(pets, capsys):
    cfg = ImageConfig(source="pets", val_fraction=1e-9)
    assert [len(load_images(cfg, split, 32)) for split in ("train", "val")] == [39, 1]
    assert "held out one image, because data.val_fraction is too small" in capsys.readouterr().out


def test_validation_from_the_source_itself_is_held_out(pets):
    same = ImageConfig(source="pets", val_source="pets", val_fraction=0.3)
    null = ImageConfig(source="pets", val_fraction=0.3)
    ids = [[load_images(cfg, split, 32).id for split in ("train", "val")] for cfg in (same, null)]
    assert ids[0] == ids[1]


def test_a_set_of_one_image_cannot_be_split(workdir):
    Path("one").mkdir()
    random_image(0).save("one/0.png")
    with pytest.raises(UserError, match="pass more distinct images or a --data.val_source"):
        load_images(ImageConfig(source="one"), "train", 32)


@pytest.mark.parametrize(
    "source, message",
    [
        ("missing.parquet", "missing.parquet matches no local files"),
        ("./missing", "./missing matches no local files and is not a hub dataset OWNER/NAME"),
        ("missing", "source missing matches no"),
        ("a/b/c", "source a/b/c matches no"),
        ("", "source  matches no"),
        ("empty", "source empty is a folder without files; pass a folder of images"),
        ("corpus.jsonl", "corpus.jsonl has files that are not .parquet"),
    ],
)
def test_a_path_without_images_is_named(workdir, source, message):
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        load_images(ImageConfig(source=source), "train", 32)


def test_a_source_without_images_names_its_columns(workdir):
    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet("text.parquet")
    with pytest.raises(UserError, match="text.parquet has no image column, only text, n"):
        load_images(ImageConfig(source="text.parquet"), "train", 32)


@pytest.fixture
def bare(workdir):
    """A source of one image without a caption."""
    source = write_parquet("bare.parquet", datasets.Value("int64"), img=[random_image(1)], n=[3])
    return ImageConfig(source=source, val_source="shapes")


def test_images_do_not_need_captions_for_a_vqvae(bare):
    assert len(load_images(bare, "train", 32)) == 1


def test_required_captions_that_are_missing_are_reported(bare):
    with pytest.raises(UserError, match="bare.parquet has no captions; add a column `text`"):
        load_images(bare, "train", 32, captions=True)


@pytest.mark.parametrize(
    "image, text, message",
    [
        (None, "b", "image number 1 of gap.parquet cannot be read: it is missing"),
        (random_image(1), " ", "image number 1 of gap.parquet has ' ' in column 'text'"),
        (random_image(1), None, "image number 1 of gap.parquet has None in column 'text'"),
    ],
)
def test_a_missing_image_or_caption_is_named(workdir, image, text, message):
    images, texts = [random_image(0), image], ["a", text]
    source = write_parquet("gap.parquet", datasets.Value("string"), img=images, text=texts)
    with pytest.raises(UserError, match=message):
        load_images(ImageConfig(source=source, val_source="shapes"), "train", 32)
