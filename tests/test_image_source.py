"""Reading image sources: splits, columns, captions, and the conversion of every mode to RGB."""

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.config import UserError
from data.image_source import decode_image, open_source, to_rgb
from data.images import ImageConfig, load_images

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def random_image(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def save_images(*paths: str) -> None:
    """A different image for each path."""
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        random_image(zlib.crc32(path.encode())).save(path)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def load_all(source: str, size: int = 8, captions: bool = False):
    """All images of a source, none of them held out."""
    return load_images(ImageConfig(source=source, val_source="shapes"), "train", size, captions)


def load_both(source: str):
    config = ImageConfig(source=source, val_fraction=0.4)
    return load_images(config, "train", 8), load_images(config, "val", 8)


# ---- splits of folders
def class_called_train(i: int) -> str:
    return f"set/{('car', 'plane', 'train')[i % 3]}/{i:02d}.png"


def files_called_test(i: int) -> str:
    return f"set/{('glass', 'steel')[i % 2]}/{'test' if i < 10 else 'train'}-{i:02d}.png"


def only_a_test_folder(i: int) -> str:
    return f"set/test/{('cat', 'dog')[i % 2]}/{i:02d}.png"


def a_class_beside_splits(i: int) -> str:
    return f"set/{('train', 'test', 'pipe')[i % 3]}/{i:02d}.png"


def splits_further_down(i: int) -> str:
    return f"set/a/{('train', 'test')[i % 2]}/{i:02d}.png"


@pytest.mark.parametrize(
    "path",
    [
        class_called_train,
        files_called_test,
        only_a_test_folder,
        a_class_beside_splits,
        splits_further_down,
    ],
)
def test_names_that_are_not_splits_mean_nothing(workdir, path):
    save_images(*[path(i) for i in range(30)])
    train, val = load_both("set")
    pixels = [{d.pixels(i).tobytes() for i in range(len(d))} for d in (train, val)]
    assert len(pixels[0] | pixels[1]) == len(train) + len(val) == 30
    assert len(train.classes) == len({Path(path(i)).parent.name for i in range(30)})


@pytest.mark.parametrize("name", ["test", "validation", "val", "Valid", "dev"])
def test_top_level_folders_that_hold_everything_are_splits(workdir, name):
    save_images(*[f"set/train/{c}/{i}.png" for i in range(3) for c in ("cat", "dog")])
    save_images(f"set/{name}/dog/0.png", f"set/{name}/cat/1.png")
    train, val = load_both("set")
    assert (len(train), len(val)) == (6, 2)
    assert train.classes == val.classes == ["cat", "dog"]
    assert val.labels.tolist() == [0, 1]


def test_split_folders_are_not_classes(workdir):
    save_images("set/train/0.png", "set/train/1.png", "set/val/0.png")
    train, val = load_both("set")
    assert train.classes is None and train.captions is None
    assert (len(train), len(val)) == (2, 1)


def test_a_split_that_is_not_used_is_named(workdir, capsys):
    save_images("set/train/0.png", "set/val/0.png", "set/test/0.png")
    load_both("set")
    assert "set: not used: val (of train, val, test)" in capsys.readouterr().out.splitlines()


def test_missing_class_labels_are_explained(workdir, capsys):
    save_images("set/cat/0.png", "set/dog/0.png", "set/cover.png")
    assert load_all("set").classes is None
    assert "no class labels, because images are at different folder de" in capsys.readouterr().out


# ---- splits of parquet files
def write_set(path: str, n: int, **changes) -> None:
    """A parquet file of n images, different for each path, with a caption each."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(path.encode())
    images = [{"bytes": encoded(random_image(seed + i)), "path": f"{i}.png"} for i in range(n)]
    columns = {"img": pa.array(images, IMAGE), "text": pa.array(["a cat"] * n), **changes}
    pq.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), path)


@pytest.mark.parametrize("source", ["set", "set/data/*.parquet"])
@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001", "test-00000-of-00001"),
        ("train", "validation_0"),
        ("train/0", "test/0"),
    ],
)
def test_parquet_files_named_after_splits_are_splits(workdir, source, names):
    for name, n in zip(names, (4, 2), strict=True):
        write_set(f"set/data/{name}.parquet", n)
    if "/" in names[0]:
        source = "set/data"
    train, val = load_both(source)
    assert (len(train), len(val)) == (4, 2)


def test_parquet_files_not_named_after_splits_are_one_set(workdir):
    write_set("set/test-tubes.parquet", 9)
    write_set("set/trains.parquet", 9)
    train, val = load_both("set")
    assert len(train) + len(val) == 18


def test_a_mixture_of_split_names_and_others_is_refused(workdir):
    for name in ("train-0", "test-0", "extra"):
        write_set(f"set/{name}.parquet", 2)
    with pytest.raises(UserError, match="set/test-0.parquet is named .* but set/extra.parquet"):
        load_both("set")


# ---- files
def test_files_that_are_not_images_are_counted(workdir, capsys):
    save_images("set/a/0.png", "set/b/1.png")
    for name in ("Thumbs.db", "notes.txt", ".DS_Store", "a/.hidden.png", "__MACOSX/0.png"):
        Path("set", name).parent.mkdir(exist_ok=True)
        Path("set", name).write_text("not an image")
    assert len(load_all("set")) == 2
    printed = capsys.readouterr().out
    assert "set: 2 non-image files ignored, such as set/Thumbs.db" in printed


def test_archives_are_not_unpacked(workdir):
    save_images("in/0.png")
    shutil.make_archive("set/images", "zip", "in")
    with pytest.raises(UserError, match="only files like set/images.zip; .*unpack archives first"):
        load_all("set")
    save_images("set/0.png")
    assert len(load_all("set")) == 1


def test_images_beside_parquet_files_are_refused(workdir):
    write_set("set/0.parquet", 1)
    save_images("set/cover.png")
    with pytest.raises(
        UserError, match="both images and .parquet files .set/cover.png and set/0.p"
    ):
        load_all("set")


def test_symbolic_links_are_followed(workdir):
    save_images("elsewhere/0.png", "set/1.png")
    os.symlink("../elsewhere/0.png", "set/0.png")
    assert len(load_all("set")) == 2


def test_a_broken_symbolic_link_is_named(workdir):
    save_images("set/1.png")
    os.symlink("../missing.png", "set/0.png")
    with pytest.raises(UserError, match="set/0.png is a broken symbolic link"):
        load_all("set")


def test_a_damaged_parquet_file_is_named(workdir):
    write_set("set/0.parquet", 2)
    write_set("set/1.parquet", 2)
    Path("set/1.parquet").write_bytes(Path("set/1.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read set/1.parquet"):
        load_all("set")


def test_damaged_column_types_are_reported(workdir):
    table = pa.table({"img": [b""]}).replace_schema_metadata({"huggingface": '{"info": null}'})
    pq.write_table(table, "set.parquet")
    with pytest.raises(
        UserError, match="cannot read set.parquet: .*; check that the file is intact"
    ):
        load_all("set.parquet")


def test_parquet_files_with_different_columns_are_refused(workdir):
    write_set("set/0.parquet", 2)
    write_set("set/1.parquet", 2, text=None, caption=pa.array(["a", "b"]))
    with pytest.raises(
        UserError, match="set/1.parquet has different image or .* than set/0.parquet"
    ):
        load_all("set")


# ---- columns
@pytest.mark.parametrize("name", ["image", "img", "jpg", "jpeg", "PNG", "webp", "picture"])
@pytest.mark.parametrize("dtype", [pa.binary(), pa.large_binary()])
def test_bytes_in_a_column_named_after_images_are_images(workdir, name, dtype):
    images = pa.array([encoded(random_image(0))], dtype)
    pq.write_table(pa.table({"id": [b"7"], name: images}), "set.parquet")
    assert (load_all("set.parquet").raw[0] == np.asarray(random_image(0))).all()


@pytest.mark.parametrize(
    "columns, expected, line",
    [
        ({}, "a cat", None),
        ({"caption": pa.array(["a dog"])}, "a cat", "caption column 'text'; not used: 'caption'"),
        ({"text": None, "captions": pa.array(["a dog"])}, "a dog", None),
        ({"image": pa.array([None], IMAGE)}, "a cat", "image column 'img'.*used: 'image'"),
        ({"text": pa.array(["a"], pa.large_string())}, "a", None),
    ],
)
def test_the_columns_of_images_and_captions(workdir, capsys, columns, expected, line):
    write_set("set.parquet", 1, **columns)
    assert load_all("set.parquet").captions == [expected]
    printed = capsys.readouterr().out
    assert (line is None) == ("not used" not in printed)
    if line:
        assert line.split(".*")[-1] in printed


def test_captions_that_are_not_strings_are_refused(workdir):
    write_set("set.parquet", 2, text=pa.array([1, 2]))
    with pytest.raises(UserError, match=r"column 'text' holds Value\('int64'\), not strings"):
        load_all("set.parquet")


def test_images_may_have_several_captions(workdir):
    write_set("set.parquet", 2, text=None, captions=pa.array([["a cat", "a pet"], ["a dog"]]))
    assert load_all("set.parquet").captions == [["a cat", "a pet"], ["a dog"]]


@pytest.mark.parametrize("texts", [[], ["a cat", " "], ["a cat", None]])
def test_an_empty_list_of_captions_is_refused(workdir, texts):
    captions = pa.array([["a dog"], texts], pa.list_(pa.string()))
    write_set("set.parquet", 2, text=None, captions=captions)
    with pytest.raises(
        UserError, match="image number 1 of set.parquet has .* in column 'captions'"
    ):
        load_all("set.parquet")


@pytest.mark.parametrize("label", [-1, None])
def test_an_image_without_a_label_is_refused(workdir, label):
    features = datasets.Features({"img": datasets.Image(), "n": datasets.ClassLabel(names=["a"])})
    columns = {"img": [random_image(0)] * 2, "n": [0, label]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet("set.parquet")
    with pytest.raises(UserError, match=f"image number 1 of set.parquet has {label} in column 'n'"):
        load_all("set.parquet")


# ---- hub datasets
def test_a_hub_dataset_is_read_by_its_columns_and_splits(workdir, monkeypatch):
    features = datasets.Features({"img": datasets.Image(), "n": datasets.ClassLabel(names=["a"])})
    splits = {
        name: datasets.Dataset.from_dict(
            {"img": [random_image(seed) for seed in seeds], "n": [0] * len(seeds)},
            features=features,
        )
        for name, seeds in {"train": (0, 1, 2), "test": (3, 1)}.items()
    }
    monkeypatch.setattr("data.image_source.hub_splits", lambda name, seconds: splits)
    train, val = load_both("owner/name:config")
    assert (len(train), len(val)) == (2, 2)
    assert (train.raw[1] == np.asarray(random_image(2))).all()
    assert val.classes == ["a"] and val.labels.tolist() == [0, 0]
    splits["test"] = splits["train"].select([0, 1])
    shutil.rmtree(next(Path("cache/images").glob("val-*")))
    assert [len(data) for data in load_both("owner/name:config")] == [1, 2]


# ---- captions in metadata files
def write_csv(records: list[dict]) -> None:
    lines = [",".join(f'"{value}"' for value in record.values()) for record in records]
    Path("set/metadata.csv").write_text("\n".join([",".join(records[0]), *lines]), "utf-8")


def write_jsonl(records: list[dict]) -> None:
    Path("set/metadata.jsonl").write_text("\n".join(map(json.dumps, records)))


def write_parquet(records: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(records), "set/metadata.parquet")


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_metadata_names_the_captions_of_images(workdir, write):
    save_images("set/b/0.png", "set/a/1.png")
    names = {"b/0.png": "a cät", "a/1.png": "7"}
    write([{"file_name": name, "n": 1, "caption": text} for name, text in names.items()])
    data = load_all("set")
    assert data.captions == ["a cät", "7"] and data.classes is None
    assert (data.raw[1] == np.asarray(Image.open("set/a/1.png"))).all()


def test_an_image_may_have_several_lines_of_metadata(workdir):
    save_images("set/0.png")
    write_jsonl([{"file_name": "0.png", "text": text} for text in ("a cat", "a pet")])
    assert load_all("set").captions == ["a cat", "a pet"]


def test_metadata_in_split_folders_is_read(workdir):
    save_images("set/train/0.png", "set/test/1.png")
    for split, i in (("train", 0), ("test", 1)):
        line = json.dumps({"file_name": f"{i}.png", "text": f"a {split}"})
        Path("set", split, "metadata.jsonl").write_text(line)
    assert [data.captions for data in load_both("set")] == [["a train"], ["a test"]]


def test_images_without_metadata_are_counted(workdir, capsys):
    save_images("set/0.png", "set/1.png", "set/2.png")
    write_jsonl([{"file_name": "1.png", "text": "a cat"}])
    assert len(load_all("set")) == 1
    assert "set: 2 images ignored (not listed in metadata.jsonl)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing.png", "../secret.png", "/etc/passwd", None])
def test_metadata_that_names_no_image_of_the_folder_is_refused(workdir, name):
    save_images("set/0.png", "secret.png")
    write_jsonl([{"file_name": name, "text": "a cat"}])
    with pytest.raises(UserError, match=f"set/metadata.jsonl names {name!r} in column 'file_name'"):
        load_all("set")


def test_metadata_without_file_names_lists_its_columns(workdir):
    Image.new("RGB", (8, 8)).save("a.png")
    Path("set").mkdir()
    Path("a.png").rename("set/a.png")
    Path("set/metadata.jsonl").write_text('{"filename": "a.png", "text": "a square"}\n')
    with pytest.raises(UserError, match="no column 'file_name', only filename, text; rename"):
        open_source("set", 0.0)


def test_metadata_without_captions_leaves_class_labels(workdir, capsys):
    save_images("set/a/0.png", "set/b/1.png")
    write_csv([{"file_name": "a/0.png", "size": "3"}])
    assert load_all("set").classes == ["a", "b"]
    assert "set/metadata.csv has no captions and is not used" in capsys.readouterr().out


def test_invalid_characters_in_captions_are_counted(workdir, capsys):
    save_images("set/0.png")
    write_jsonl([{"file_name": "0.png", "text": "a \ud83d cat"}])
    assert load_all("set").captions == ["a \ufffd cat"]
    assert "invalid characters replaced by U+FFFD in 1 caption" in capsys.readouterr().out


# ---- modes
GRAY, COLOR = (102, 102, 102), (200, 100, 50)
LOSSLESS = ["PNG", "TIFF", "WEBP", "GIF", "BMP", "TGA", "PPM", "JPEG2000", "PCX", "QOI", "ICNS"]


def close(image: Image.Image, color: tuple, tolerance: int) -> bool:
    """Whether an RGB image is of one color."""
    assert image.mode == "RGB"
    return bool((abs(np.asarray(image).astype(int) - color) <= tolerance).all())


@pytest.mark.parametrize(
    "mode, value, formats, color",
    [
        ("1", 1, ["PNG", "TIFF", "GIF", "BMP", "PPM", "PCX", "WEBP", "JPEG"], (255, 255, 255)),
        ("L", 102, [*LOSSLESS[:-2], "JPEG", "AVIF", "SGI"], GRAY),
        ("RGB", COLOR, [*LOSSLESS, "JPEG", "AVIF", "SGI"], COLOR),
        ("RGBX", (*COLOR, 0), ["TIFF", "WEBP", "JPEG"], COLOR),
        ("CMYK", (55, 155, 205, 0), ["JPEG", "TIFF", "JPEG2000", "WEBP"], COLOR),
        # no TIFF: before version 13, Pillow cannot read the YCbCr TIFF files that it writes
        ("YCbCr", (124, 86, 182), ["JPEG", "JPEG2000", "WEBP"], COLOR),
        ("HSV", (14, 191, 200), ["WEBP"], COLOR),
        ("RGBA", (*COLOR, 255), [f for f in LOSSLESS if f not in ("PCX", "PPM")], COLOR),
        ("LA", (102, 255), ["PNG", "TIFF", "WEBP", "TGA", "JPEG2000"], GRAY),
        ("I;16", 26_200, ["PNG", "TIFF", "PPM", "JPEG2000"], GRAY),
        ("I;16B", 26_200, ["PNG", "TIFF"], GRAY),
        ("I;16L", 26_200, ["TIFF"], GRAY),
        ("I", 26_200, ["PPM"], GRAY),
        # what transparency hides does not show, and half of it mixes with white
        ("RGBA", (*COLOR, 0), ["PNG", "TIFF", "WEBP", "TGA", "GIF", "QOI"], (255, 255, 255)),
        ("RGBA", (*COLOR, 127), ["PNG", "TIFF", "WEBP", "TGA"], (227, 178, 153)),
        ("LA", (102, 0), ["PNG", "TIFF", "WEBP", "TGA"], (255, 255, 255)),
        ("RGBa", (0, 0, 0, 0), ["WEBP", "AVIF"], (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(mode, value, formats, color):
    options = {"WEBP": {"lossless": True}}
    for format in formats:
        file = encoded(Image.new(mode, (8, 8), value), format, **options.get(format, {}))
        tolerance = 6 if format in ("JPEG", "AVIF") or mode in ("YCbCr", "HSV") else 2
        assert close(decode_image(file, format), color, tolerance), format


@pytest.mark.parametrize("mode", ["LA", "PA", "La", "RGBA", "RGBa"])
def test_transparency_in_memory_becomes_white(mode):
    assert close(to_rgb(Image.new(mode, (2, 2))), (255, 255, 255), 0)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bit_gray_in_memory_is_scaled(mode):
    assert close(to_rgb(Image.new(mode, (2, 2), 26_200)), GRAY, 0)


@pytest.mark.parametrize(
    "mode, format", [("I", "TIFF"), ("F", "TIFF"), ("F", "PPM"), ("LAB", "TIFF")]
)
def test_a_mode_without_a_range_is_refused(mode, format):
    message = f"image x.tif cannot be read: mode {mode} has no defined conversion"
    with pytest.raises(UserError, match=message):
        decode_image(encoded(Image.new(mode, (8, 8)), format), "x.tif")


@pytest.mark.parametrize("format", ["PNG", "GIF", "TIFF"])
@pytest.mark.parametrize("transparent", [(255, 255, 255), None])
def test_a_transparent_palette_entry_becomes_white(format, transparent):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *COLOR])
    options = {"transparency": 1} if transparent and format != "TIFF" else {}
    expected = transparent if options else COLOR
    assert close(decode_image(encoded(image, format, **options), "x"), expected, 0)


def png(bits: int, color_type: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of 4 x 1 pixels with a transparent color."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 4, 1, bits, color_type, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (*parts, (b"IEND", b"")))


@pytest.mark.parametrize(
    "bits, row, expected",
    [
        (1, bytes([0b0101_0000]), [0, 255, 0, 255]),
        (2, bytes([0b00_01_10_11]), [0, 255, 170, 255]),
        (4, bytes([0x01, 0x2F]), [0, 255, 34, 255]),
        (8, bytes([0, 1, 2, 255]), [0, 255, 2, 255]),
        (16, struct.pack(">4H", 0, 1, 257, 65535), [0, 255, 1, 255]),
    ],
)
def test_the_transparent_gray_of_a_png_becomes_white(bits, row, expected):
    image = decode_image(png(bits, 0, row, struct.pack(">H", 1)), "x")
    assert np.asarray(image)[0, :, 0].tolist() == expected


def test_the_transparent_color_of_a_png_becomes_white():
    file = png(8, 2, bytes([*COLOR, 1, 2, 3, *COLOR, 4, 5, 6]), struct.pack(">3H", *COLOR))
    expected = [[255] * 3, [1, 2, 3], [255] * 3, [4, 5, 6]]
    assert np.asarray(decode_image(file, "x"))[0].tolist() == expected


def tiff(bits: int, photometric: int, data: bytes) -> bytes:
    """A gray TIFF of 2 x 1 pixels."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (278, 1)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in (*tags, (279, len(data)))]
    ifd = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + ifd


@pytest.mark.parametrize(
    "file, expected",
    [
        (tiff(16, 1, struct.pack("<2H", 0, 26_200)), [0, 102]),
        (tiff(16, 0, struct.pack("<2H", 0, 26_200)), [255, 153]),  # white is zero
        (tiff(12, 1, bytes([0xFF, 0xF6, 0x66]) + b"\0"), [255, 102]),
    ],
)
def test_gray_of_a_tiff_is_scaled_by_its_range(file, expected):
    assert np.asarray(decode_image(file, "x"))[0, :, 0].tolist() == expected


def test_a_transparent_16_bit_color_is_refused():
    with pytest.raises(UserError, match="transparent 16-bit color; save it with an alpha channel"):
        decode_image(png(16, 2, bytes(24), struct.pack(">3H", 1, 1, 1)), "x")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_orientation_of_exif_is_applied(format):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    turned = decode_image(encoded(image, format, exif=exif), "x")
    assert turned.size == (8, 16)
    assert turned.getpixel((4, 2))[0] > 200 > 50 > turned.getpixel((4, 13))[0]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(format):
    frames = [Image.new("RGB", (8, 8), color) for color in (COLOR, (0, 0, 0))]
    file = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert close(decode_image(file, "x"), COLOR, 4)


# ---- files that hold no image
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "QOI"])
def test_a_truncated_image_is_named(format):
    file = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), format)
    with pytest.raises(UserError, match="image cat.x cannot be read: .*; fix or remove it"):
        decode_image(file[: len(file) // 2], "cat.x")


@pytest.mark.parametrize(
    "content", [b"", b"not an image", None, {"bytes": None, "path": None}, "missing.png"]
)
def test_what_is_not_an_image_is_named(workdir, content):
    with pytest.raises(UserError, match="image cat.x cannot be read: .*; fix or remove it"):
        decode_image(content, "cat.x")


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    with pytest.raises(UserError, match="image cat.x cannot be read: .*decompression bomb"):
        decode_image(encoded(random_image(0)), "cat.x")


def test_postscript_is_not_run():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with pytest.raises(UserError, match="not an image"):
        decode_image(postscript, "cat.x")
