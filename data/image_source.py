"""Image sources: a hub dataset, .parquet files or a folder of images -> records of encoded images
and captions; decoding to RGB.
"""

import csv
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import glob
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from common.config import UserError, first_line
from data.files import (
    check_regular,
    json_records,
    open_text,
    parquet_records,
    split_files,
    walk,
)
from data.hub import hub_splits

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # captions of an image folder
BINARY_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
CAPTION_COLUMNS = ("text", "caption", "captions")
Image.init()
# Pillow runs Ghostscript for EPS and cannot decode the others.
FORMATS = [f for f in Image.ID if f not in {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}]
SUFFIXES = {s for s, format in Image.registered_extensions().items() if format in FORMATS}


# ---- sources
@dataclass
class Records:
    """One split of a source.

    `read` yields (name, encoded image, caption or label) for each of the n images; an encoded image
    is a path, bytes, or a struct of bytes and path. `column` is the column of captions or labels,
    None if there is none. `classes` are the class names if captions are made from labels.
    """

    n: int
    read: Callable[[], Iterator[tuple]]
    column: str | None
    classes: list[str] | None


def source_files(source: str) -> list[Path]:
    """Sorted files of a folder, path or glob; empty if `source` names a hub dataset.

    Raises UserError.
    """
    path = Path(source).expanduser()
    files = []
    if source:
        files = walk(path) if path.is_dir() else sorted(map(Path, glob(str(path))))
    if source and not files and path.is_dir():
        raise UserError(
            f"data source {source} is a folder without files; pass a folder of images or .parquet "
            "files"
        )
    is_hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+(:.+)?", source) and not path.exists()
    if not files and (not is_hub_name or path.suffix.lower() in {".parquet", *SUFFIXES}):
        raise UserError(
            f"data source {source} matches no local files and is not a hub dataset OWNER/NAME; "
            "check the path"
        )
    return files


def open_source(source: str, retry_seconds: float) -> tuple[dict[str, Records], list[str]]:
    """The splits of a source, and notes about files and columns not used. Raises UserError."""
    files = source_files(source)
    if not files:
        return hub_source(source, retry_seconds)
    path = Path(source).expanduser()
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    metadata = [file for file in files if images and file.name in METADATA]
    parquet = [f for f in files if f.suffix.lower() == ".parquet" and f not in metadata]
    ignored = sorted({*files} - {*images, *metadata, *parquet})
    if not path.is_dir() and len(parquet) < len(files):
        raise UserError(
            f"data source {source} has files that are not .parquet; pass .parquet files or a "
            "folder of images"
        )
    if images and parquet:
        raise UserError(
            f"data source {source} holds both images and .parquet files ({images[0]} and "
            f"{parquet[0]}); pass a folder or glob of one kind"
        )
    if not images and not parquet:
        raise UserError(
            f"data source {source} holds neither images nor .parquet files, only files like "
            f"{files[0]}; pass a folder of images (unpack archives first) or .parquet files"
        )
    notes = []
    if ignored:
        notes.append(
            f"{source}: {count(len(ignored), 'non-image file')} ignored, such as {ignored[0]}"
        )
    if images:
        splits, more = folder_source(source, path, images, metadata)
    else:
        splits, more = parquet_source(source, parquet)
    return splits, notes + more


def count(n: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def hub_source(name: str, retry_seconds: float) -> tuple[dict[str, Records], list[str]]:
    """Splits of a hub dataset and notes, as in open_source."""
    splits = hub_splits(name, retry_seconds)
    image, caption, classes, notes = find_columns(name, next(iter(splits.values())).features)

    def read(split: datasets.Dataset) -> Iterator[tuple]:
        if isinstance(split.features[image], datasets.Image):
            split = split.cast_column(image, datasets.Image(decode=False))
        for i, record in enumerate(split.select_columns([c for c in (image, caption) if c])):
            yield f"number {i} of {name}", record[image], record.get(caption)

    found = {
        key: Records(len(split), partial(read, split), caption, classes)
        for key, split in splits.items()
    }
    return found, notes


def parquet_source(source: str, files: list[Path]) -> tuple[dict[str, Records], list[str]]:
    """Splits of .parquet files and notes, as in open_source."""
    found = []
    for file in files:
        found.append(find_columns(str(file), column_types(file)))
        if found[-1][:3] != found[0][:3]:
            raise UserError(
                f"{file} has different image or caption columns or class names than {files[0]}; "
                "pass files with the same columns"
            )
    image, caption, classes, notes = found[0]

    def read(files: list[Path]) -> Iterator[tuple]:
        for file in files:
            records = parquet_records(file, [c for c in (image, caption) if c])
            for i, record in enumerate(records):
                yield f"number {i} of {file}", record[image], record.get(caption)

    def records(files: list[Path]) -> Records:
        n = sum(pq.read_metadata(file).num_rows for file in files)
        return Records(n, partial(read, files), caption, classes)

    root = Path(os.path.commonpath([file.parent for file in files]))
    splits = split_files(files, root) or {"train": files}
    return {name: records(part) for name, part in splits.items()}, notes


def column_types(file: Path) -> datasets.Features:
    """Types of the columns of a .parquet file. Raises UserError."""
    check_regular(file)
    try:
        return datasets.Features.from_arrow_schema(pq.read_schema(file))
    except Exception as error:  # pyarrow and datasets raise many exception types
        raise UserError(
            f"cannot read {file}: {first_line(error)}; check that the file is intact"
        ) from error


def folder_source(
    source: str, root: Path, images: list[Path], metadata: list[Path]
) -> tuple[dict[str, Records], list[str]]:
    """Splits of a folder of images and notes, as in open_source.

    Captions come from metadata files; without them, the folders that hold the images are classes.
    """
    notes, classes = [], None
    splits = split_files(images, root) or {"train": images}
    column, rows = read_metadata(metadata, set(images))
    if column:
        n_unnamed = len({*images} - {image for image, _ in rows})
        if n_unnamed:
            notes.append(
                f"{source}: {count(n_unnamed, 'image')} ignored (not listed in "
                f"{' or '.join(sorted({file.name for file in metadata}))})"
            )
    else:
        if metadata:
            notes.append(f"{source}: {metadata[0]} has no captions and is not used")
        folders = [image.relative_to(root).parts[len(splits) > 1 : -1] for image in images]
        names = sorted({folder[-1] for folder in folders if folder})
        depths = set(map(len, folders))
        if len(names) > 1 and len(depths) > 1:
            deepest, shallowest = (images[folders.index(f(folders, key=len))] for f in (max, min))
            notes.append(
                f"{source}: no class labels, because images are at different folder depths, such "
                f"as {shallowest} and {deepest}"
            )
        elif len(names) > 1:
            column, classes = "label", names
        rows = [
            (image, names.index(folder[-1]) if classes else None)
            for image, folder in zip(images, folders, strict=True)
        ]
    found = {}
    for name, part in splits.items():
        members = set(part)
        chosen = [(str(image), image, caption) for image, caption in rows if image in members]
        found[name] = Records(len(chosen), partial(iter, chosen), column, classes)
    return found, notes


def read_metadata(files: list[Path], images: set[Path]) -> tuple[str | None, list[tuple]]:
    """The caption column of metadata files, None if there is none, and (image, caption) of each
    line. Raises UserError for a line that does not name an image.
    """
    lines = [(file, line) for file in files for line in metadata_lines(file)]
    column = next((c for c in CAPTION_COLUMNS if any(c in line for _, line in lines)), None)
    rows = []
    for file, line in lines if column else ():
        if "file_name" not in line:
            raise UserError(
                f"{file} has no column 'file_name', only {', '.join(map(str, line))}; rename the "
                "column that names the images"
            )
        name = line["file_name"]
        image = file.parent / os.path.normpath(str(name))
        if image not in images:
            raise UserError(
                f"{file} names {name!r} in column 'file_name', which is not an image in "
                f"{file.parent}; correct or remove that line"
            )
        rows.append((image, line.get(column)))
    return column, rows


def metadata_lines(file: Path) -> Iterator[dict]:
    """Lines {column: value} of a metadata file. Raises UserError."""
    if file.suffix == ".parquet":
        yield from parquet_records(file, ["file_name", *CAPTION_COLUMNS])
    elif file.suffix == ".csv":
        with open_text(file, newline="") as lines:
            try:
                yield from csv.DictReader(lines)
            except csv.Error as error:
                raise UserError(f"cannot read {file}: {error}; correct the file") from error
    else:
        for record in json_records(file):
            if not isinstance(record, dict):
                raise UserError(f"{file} has a line that is not a JSON object; correct the file")
            yield record


def is_image(name: str, feature) -> bool:
    """Whether a column holds images: by its type, or as bytes in a column named after images."""
    is_struct = isinstance(feature, dict) and {"bytes"} <= feature.keys() <= {"bytes", "path"}
    is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    named = is_binary and name.lower() in BINARY_IMAGE_COLUMNS
    return is_struct or named or isinstance(feature, datasets.Image)


def is_text(feature) -> bool:
    """Whether a column holds strings or lists of strings."""
    feature = getattr(feature, "feature", feature)
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def find_columns(source: str, types: dict) -> tuple[str, str | None, list[str] | None, list[str]]:
    """The image column, the caption column, class names if captions are labels, and notes about
    other columns that could have been used.

    Images: the first image column. Captions: the first of text, caption and captions, else the
    first column of class labels. Raises UserError.
    """
    images = [name for name in types if is_image(name, types[name])]
    if not images:
        raise UserError(
            f"data source {source} has no image column, only {', '.join(types)}; pass a source "
            "that has one"
        )
    labels = [name for name in types if isinstance(types[name], datasets.ClassLabel)]
    texts = [name for name in CAPTION_COLUMNS if name in types and name not in labels]
    for name in texts[:1]:
        if not is_text(types[name]):
            raise UserError(
                f"data source {source}: column {name!r} holds {types[name]}, not strings; convert "
                "or rename it"
            )
    captions = [*texts, *labels]
    image, caption = images[0], next(iter(captions), None)
    notes = []
    if len(images) > 1 or len(captions) > 1:
        notes.append(
            f"{source}: image column {image!r}, caption column {caption!r}; not used: "
            f"{', '.join(map(repr, images[1:] + captions[1:]))}"
        )
    return image, caption, types[caption].names if caption in labels else None, notes


def read_caption(value, records: Records, name: str) -> str | list[str] | int | None:
    """Caption, captions or label of an image, None if the source has none.

    Unpaired surrogates become U+FFFD. Raises UserError if it is missing or empty.
    """
    if records.column is None:
        return None
    texts = value if isinstance(value, list) else [value]
    if records.classes:
        is_valid = value in range(len(records.classes))
    else:
        is_valid = texts and all(isinstance(text, str) and text.strip() for text in texts)
    if not is_valid:
        raise UserError(
            f"image {name} has {value!r} in column {records.column!r}, not a caption or a class "
            "number; add a caption or remove the image"
        )
    if records.classes:
        return value
    texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]
    return texts if isinstance(value, list) else texts[0]


# ---- decoding
@contextmanager
def readable(name: str) -> Iterator[None]:
    """Convert errors from reading an image into a UserError that names the image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except Exception as error:  # PIL raises many exception types
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "it is empty, damaged or not an image"
        raise UserError(f"image {name} cannot be read: {reason}; fix or remove it") from error


def open_image(encoded) -> Image.Image:
    """An image whose pixels are not decoded yet, from a path, bytes, or a struct of both."""
    if isinstance(encoded, dict):
        encoded = encoded.get("path") if encoded.get("bytes") is None else encoded["bytes"]
    if encoded is None:
        raise ValueError("it is missing")
    if not isinstance(encoded, bytes) and not os.path.isfile(encoded):
        raise ValueError("there is no such file")
    image = Image.open(BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=FORMATS)
    if 0 in image.size:
        raise ValueError("it has no pixels")
    return image


def decode_image(encoded, name: str) -> Image.Image:
    """The first frame as an RGB image, with EXIF orientation applied. Raises UserError."""
    with readable(name), open_image(encoded) as image:
        scale_transparency(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def scale_transparency(image: Image.Image) -> None:
    """Scale the transparent gray value of a 2-bit or 4-bit PNG as Pillow scales its pixels.

    Raises ValueError for 16-bit color: Pillow keeps only 8 bits, so colors that are similar to the
    transparent one would become transparent too.
    """
    if image.format != "PNG" or "transparency" not in image.info:
        return
    raw_mode = image.tile[0].args
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] *= 255 // (2 ** int(raw_mode[-1]) - 1)
    elif raw_mode == "RGB;16B":
        raise ValueError("it has a transparent 16-bit color; save it with an alpha channel")


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image in RGB. Raises ValueError for a mode without a defined conversion.

    | mode | conversion |
    | --- | --- |
    | 1, L, P, RGB, RGBX, CMYK, YCbCr, HSV | Pillow's |
    | LA, PA, La, RGBA, RGBa, or a transparent color | composited on white |
    | I;16, I;16L, I;16B, I;16N; I of PNG and PPM | gray from 0 to 65535 (12-bit TIFF: to 4095) |
    | other I, F, LAB, any other | rejected: value range or color space not known |
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return gray_to_rgb(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    opaque = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
    if image.mode not in (*opaque, "LA", "PA", "RGBA"):
        raise ValueError(f"mode {image.mode} has no defined conversion to 8-bit RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def gray_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grayscale as RGB; the transparent gray value becomes white."""
    tags = getattr(image, "tag_v2", {})  # of TIFF
    limit = 2 ** tags.get(258, (16,))[0] - 1  # bits per sample
    values = np.asarray(image).astype(np.float64)  # (H, W)
    gray = (values * 255 / limit).round()
    if tags.get(262) == 0:  # white is zero
        gray = 255 - gray
    gray[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(gray.clip(0, 255).astype(np.uint8)).convert("RGB")


def content_key(image: Image.Image) -> bytes:
    """Hash of the size and pixels of an RGB image before cropping: equal images have equal keys,
    regardless of their file format and of the side they are stored at.
    """
    return hashlib.blake2b(image.tobytes(), digest_size=16, salt=b"%dx%d" % image.size).digest()
