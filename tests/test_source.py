import bz2
import gzip
import itertools
import json
import lzma
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import sentences, write_jsonl

from common.config import UserError, first_line
from data import source
from data.files import parquet_records, split_files, walk
from data.source import content_hash, digest, documents, local_files


def texts(source, n: int | None = None, column: str = "text") -> list[str]:
    """The first n texts of a source, all by default."""
    return [record[column] for record in itertools.islice(documents(source, column, {}), n)]


def counted(source) -> dict:
    """What is counted when a source is read."""
    counts = Counter()
    list(documents(source, "text", {}, counts=counts))
    return {name: n for name, n in counts.items() if n}


def write_parquet(path: str, **columns) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def touch(*names: str) -> list[Path]:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"text of {name}")
    return sorted(Path(name) for name in names)


# ---- mixes
def test_a_mix_contributes_text_in_proportion_to_its_weights(workdir):
    for letter in "ab":
        write_jsonl(f"{letter}.jsonl", [f"{letter * (50 + i % 7)} {i}" for i in range(2000)])
    mixed = texts({"a.jsonl": 0.7, "b.jsonl": 0.3}, 900)
    n_characters = {letter: sum(len(t) for t in mixed if t[0] == letter) for letter in "ab"}
    assert n_characters["a"] / sum(n_characters.values()) == pytest.approx(0.7, abs=0.01)


def test_a_token_id_counts_as_four_characters_in_a_mix(workdir):
    write_jsonl("text.jsonl", ["x" * 40] * 500)
    Path("ids.jsonl").write_text('{"input_ids": [1, 2, 3, 4, 5]}\n' * 500)
    mix = documents({"text.jsonl": 0.5, "ids.jsonl": 0.5}, "text", {})
    n_ids = sum("input_ids" in record for record in itertools.islice(mix, 300))
    assert n_ids == pytest.approx(200, abs=2)


def test_a_mix_ends_with_its_first_exhausted_source(workdir):
    write_jsonl("one.jsonl", ["x" * 10])
    assert len(texts({"one.jsonl": 0.5, "corpus.jsonl": 0.5})) < 10


def test_standard_library_is_a_source_of_python_code():
    assert sum("def " in text for text in texts("stdlib", 20)) > 10


def test_standard_library_has_a_fixed_order():
    assert texts("stdlib", 20) == texts("stdlib", 20)


# ---- order
def order_of_datasets(files: list[Path]) -> list[str]:
    """Texts in the order of a shuffled stream of `datasets`."""
    loader, options = {
        ".jsonl": ("json", {}),
        ".parquet": ("parquet", {}),
        ".txt": ("text", {"sample_by": "document"}),
    }[files[0].suffix]
    options |= {"data_files": [str(file) for file in files], "split": "train", "streaming": True}
    stream = datasets.load_dataset(loader, **options)
    return [r["text"] for r in stream.shuffle(seed=0, buffer_size=source.SHUFFLE_BUFFER)]


def write_records(suffix: str, sizes: list[int]) -> list[Path]:
    """Files of the given numbers of records, 00.SUFFIX, 01.SUFFIX and so on."""
    for i, n in enumerate(sizes):
        records, path = [f"{i} {k}" for k in range(n)], f"files/{i:02d}{suffix}"
        if suffix == ".parquet":
            write_parquet(path, text=records, n=list(range(n)))
        else:
            touch(path)
            if suffix == ".jsonl":
                write_jsonl(path, records)
    return sorted(Path("files").glob(f"*{suffix}"))


@pytest.mark.parametrize(
    "suffix, sizes",
    [
        (".parquet", [230]),
        (".jsonl", [90, 125, 17]),
        (".parquet", [7] * 23 + [50, 1, 199]),
        (".jsonl", [7] * 23 + [50, 1, 199]),
        (".txt", [1] * 130),
    ],
)
def test_local_files_are_read_in_the_order_of_datasets(workdir, monkeypatch, suffix, sizes):
    monkeypatch.setattr(source, "SHUFFLE_BUFFER", 100)
    monkeypatch.setattr(source, "TABLE_RECORDS", 10)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    files = write_records(suffix, sizes)
    expected = order_of_datasets(files)
    assert len(expected) == sum(sizes)
    assert texts("files") == expected


def test_records_are_shuffled(workdir):
    assert texts("corpus.jsonl") != sentences(300)
    assert sorted(texts("corpus.jsonl")) == sorted(sentences(300))


def test_the_shuffle_buffer_is_bounded_in_bytes(workdir, monkeypatch):
    monkeypatch.setattr(source, "SHUFFLE_BYTES", 1000)
    write_jsonl("long.jsonl", [f"{i:04d}" * 25 for i in range(200)])
    n_read, n_written, most = itertools.count(), 0, 0
    read = source.json_records
    monkeypatch.setattr(
        source, "json_records", lambda file: (next(n_read) * 0 or r for r in read(file))
    )
    for n_written, _ in enumerate(documents("long.jsonl", "text", {}), 1):
        most = max(most, int(repr(n_read)[6:-1]) - n_written)
    assert n_written == 200
    assert most <= 10


# ---- formats
JSON = '{"text": "one", "x": 1}\n\n{"x": "a", "text": "two"}\r\n{"text": "three", "y": [1]}'


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", JSON.encode()),
        ("A.NDJSON", JSON.encode()),
        ("a.json", JSON.encode()),
        ("a.json", json.dumps([{"text": t} for t in ("one", "two", "three")], indent=1).encode()),
        ("a.json", b'["one", "two", "three"]'),
        ("a.jsonl", b"\xef\xbb\xbf" + JSON.encode()),
        ("a.jsonl", JSON.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(JSON.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(JSON.encode())),
        ("a.jsonl.xz", lzma.compress(JSON.encode())),
        ("a.jsonl.zst", pa.compress(JSON.encode(), "zstd", asbytes=True)),
    ],
)
def test_json_files_are_read(workdir, name, content):
    Path(name).write_bytes(content)
    assert sorted(texts(name)) == ["one", "three", "two"]


def test_one_json_object_may_span_lines(workdir):
    Path("a.json").write_text(json.dumps({"text": "one", "x": {}}, indent=2))
    assert texts("a.json") == ["one"]


@pytest.mark.parametrize("name", ["a.md", "a.TXT", "a.Markdown", "a.rst", "a.text", "a.txt.gz"])
@pytest.mark.parametrize(
    "content", ["ä\nb".encode(), b"\xef\xbb\xbf\xc3\xa4\nb", "ä\r\nb".encode("utf-16")]
)
def test_plain_text_files_are_one_document_each(workdir, name, content):
    Path(name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    assert texts(name) == ["ä\nb"]


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.string_view()])
def test_parquet_strings_of_any_type_are_read(workdir, type):
    write_parquet("a.parquet", text=pa.array(["one", None, "two"], type))
    assert sorted(texts("a.parquet")) == ["one", "two"]


def test_only_the_text_column_of_parquet_is_read(workdir):
    write_parquet("a.parquet", text=["one"], image=[b"\xff"])
    assert list(parquet_records(Path("a.parquet"), ["text"])) == [{"text": "one"}]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", b'{"text": "cut \\ud83d here"}\n{"text": "fine"}'),
        ("a.jsonl", b'{"text": "cut \xff here"}\n{"text": "fine"}'),
    ],
)
def test_invalid_characters_are_replaced_and_counted(workdir, name, content):
    Path(name).write_bytes(content)
    assert sorted(texts(name)) == ["cut \ufffd here", "fine"]
    assert counted(name) == {"replaced": 1, "replaced_in": name}


def test_bytes_of_parquet_strings_that_are_not_utf8_are_replaced(workdir):
    offsets = pa.array([0, 4, 8], pa.int32()).buffers()[1]
    column = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"caf\xe9fine"))
    write_parquet("a.parquet", text=column, raw=pa.array([b"\xff", b"\xfe"]))
    assert sorted(texts("a.parquet")) == ["caf\ufffd", "fine"]


def test_a_surrogate_pair_is_one_character(workdir):
    Path("a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert texts("a.jsonl") == ["😀"]


def test_records_without_text_are_skipped_and_counted(workdir):
    records = [{"text": " \n"}, {"text": None}, {"other": 1}, {"text": "words"}]
    Path("gaps.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert texts("gaps.jsonl") == ["words"]
    assert counted("gaps.jsonl") == {"blank": 3}


def test_a_parquet_file_without_the_column_is_skipped_and_counted(workdir):
    write_parquet("d/a.parquet", text=["one"])
    write_parquet("d/b.parquet", other=[1, 2])
    assert texts("d") == ["one"]
    assert counted("d") == {"blank": 2}


# ---- long documents
LONG = "".join(f"line {i}\n" for i in range(100))


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
@pytest.mark.parametrize("text", [LONG, LONG.replace("\n", " "), "x" * 1000])
def test_a_long_document_is_split_at_boundaries(workdir, monkeypatch, name, text):
    monkeypatch.setattr(source, "PART_CHARACTERS", 100)
    Path(name).write_text(text if name == "long.txt" else json.dumps({"text": text}))
    found = list(source.document_parts(name, "text"))
    parts = [record["text"] for record in found]
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 100
    assert min(map(len, parts[:-1])) > 50
    assert {part[-1] for part in parts} == {text[-1]}
    assert counted(name) == {"split": 1}


def test_a_document_of_the_limit_is_not_split(workdir, monkeypatch):
    monkeypatch.setattr(source, "PART_CHARACTERS", 100)
    Path("a.txt").write_text("x" * 100)
    assert texts("a.txt") == ["x" * 100]


# ---- bad input
@pytest.mark.parametrize(
    "source, content, message",
    [
        ("missing.parquet", None, "missing.parquet matches no file"),
        ("nowhere/*.txt", None, r"nowhere/\*.txt matches no file"),
        ("./nothing", None, "./nothing matches no file"),
        ("a/b/c", None, "a/b/c matches no file"),
        ("wikitext", None, "wikitext is neither a local file or folder nor a hub dataset OWNER/"),
        ("image.png", b"x", "files of type .png; use files of one type"),
        ("bad.jsonl", b"", "bad.jsonl has no text; add some"),
        ("bad.jsonl", b'{"title": "x"}\n', "no column 'text', only title .*--data.text_column"),
        ("bad.jsonl", b'{"text": " ", "n": 1}', r"no text in column 'text', only text, n \(in 1 "),
        ("bad.jsonl", b'{"text": 5}\n', "holds int, not text"),
        ("bad.jsonl", b'{"input_ids": "5"}\n', "holds str, not ids"),
        ("bad.jsonl", b'{"text": "x"}\n[1]', "bad.jsonl has a record of type list, not an object"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": ', "bad.jsonl, line 2: invalid JSON"),
        ("bad.json", b'[\n{"text": "x"},\n{"text" 5}]', "bad.json, line 3: invalid JSON"),
        ("bad.jsonl", b"[" * 100_000, "bad.jsonl, line 1: invalid JSON"),
        ("bad.jsonl", b"\xff\xfe\x00rubbish", "bad.jsonl, line 1: invalid JSON"),
        ("bad.parquet", b"rubbish", "cannot read bad.parquet: .*check that the file is intact"),
        ("bad.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "cannot read bad.txt.gz: "),
        ({}, None, "at least one source"),
        ({"corpus.jsonl": -1}, None, "positive weights"),
    ],
)
def test_a_bad_source_gives_one_line_that_names_it(workdir, source, content, message):
    if content is not None:
        Path(source).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        texts(source)
    assert "\n" not in str(error.value)


def test_an_empty_text_file_is_refused(workdir):
    Path("empty.txt").write_text("")
    with pytest.raises(UserError, match="^data source empty.txt has no text; add some$"):
        list(documents("empty.txt", "text", {}))


def test_a_source_without_text_is_refused_after_its_first_records(workdir, monkeypatch):
    monkeypatch.setattr(source, "PEEK_RECORDS", 10)
    Path("a.jsonl").write_text('{"title": "x"}\n' * 20 + '{"text": "late"}\n')
    with pytest.raises(UserError, match=r"only title \(in 10 records\)"):
        texts("a.jsonl")


def test_a_truncated_parquet_file_among_many_is_named(workdir):
    for name in "abc":
        write_parquet(f"d/{name}.parquet", text=sentences(100))
    data = Path("d/b.parquet").read_bytes()
    Path("d/b.parquet").write_bytes(data[:50] + bytes(400) + data[450:])
    with pytest.raises(UserError, match="cannot read d/b.parquet"):
        texts("d")


def make_pipe(path: Path):
    os.mkfifo(path)


def make_broken_link(path: Path):
    path.symlink_to("nothing")


@pytest.mark.parametrize(
    "source, make, message",
    [
        *((source, make_pipe, "is not a regular file") for source in ("d", "d/x.txt", "d/*.txt")),
        *((source, make_broken_link, "is a broken symbolic link") for source in ("d", "d/x.txt")),
        ("d/*.txt", Path.mkdir, "is not a regular file"),
    ],
)
def test_what_is_not_a_file_is_named_and_never_opened(workdir, source, make, message):
    touch("d/a.txt")
    make(Path("d/x.txt"))
    with pytest.raises(UserError, match=f"d/x.txt {message}"):
        texts(source)


@pytest.mark.parametrize("make", [make_pipe, make_broken_link])
def test_a_folder_with_what_is_not_a_file_is_refused_whatever_its_name(workdir, make):
    touch("d/a.txt")
    make(Path("d/x"))
    with pytest.raises(UserError, match="d/x is "):
        walk(Path("d"))


# ---- files of a folder
def test_files_of_a_folder_are_found_at_any_depth_in_sorted_order(workdir):
    touch("t/b.txt", "t/a.md", "t/sub/c.TXT", "t/.hidden/x.txt", "t/._a.txt", "t/__MACOSX/a.txt")
    assert [str(file) for file in local_files("t").train] == ["t/a.md", "t/b.txt", "t/sub/c.TXT"]
    assert local_files("t").notes("t") == []


def test_a_link_to_a_folder_is_followed_without_looping(workdir):
    touch("t/a.txt", "elsewhere/b.txt")
    Path("t/loop").symlink_to("../t")
    Path("t/more").symlink_to("../elsewhere")
    assert walk(Path("t")) == [Path("t/a.txt"), Path("t/more/b.txt")]


def test_a_folder_of_two_types_is_refused(workdir):
    touch("mixed/a.txt", "mixed/b.jsonl")
    with pytest.raises(UserError, match="files of type .jsonl, .txt"):
        local_files("mixed")


def test_files_about_the_data_are_ignored_and_named(workdir):
    touch("d/README.md", "d/LICENSE", "d/LICENSE.txt", "d/a.jsonl", "d/b.png")
    files = local_files("d")
    assert files.train == [Path("d/a.jsonl")]
    assert files.notes("d") == [
        "data source d: ignoring LICENSE, LICENSE.txt, README.md and 1 more"
    ]


def test_a_folder_with_nothing_but_a_readme_is_that_document(workdir):
    touch("d/README.md")
    assert texts("d") == ["text of d/README.md"]


def test_a_hub_name_has_no_local_files(workdir):
    assert local_files("some/dataset:part").train == []


def test_a_file_with_special_characters_in_its_name_is_found(workdir):
    touch("a[1]*.txt")
    assert texts("a[1]*.txt") == ["text of a[1]*.txt"]


# ---- splits
@pytest.mark.parametrize(
    "names, expected",
    [
        (["train/a.txt", "test/a.txt"], {"train": [1], "test": [0]}),
        (["Train/x/a.txt", "valid/a.txt"], {"train": [0], "val": [1]}),
        (["train/a.txt", "test/a.txt", "b.txt"], {}),
        (["train/a.txt", "b/test/a.txt"], {}),
        (["test/a.txt", "val/b.txt"], {}),
        (["train/a.txt", "train/b.txt"], {}),
        (["train.parquet", "val.parquet"], {"train": [0], "val": [1]}),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
            + ["data/validation-00000-of-00001-0a1b2c3d4e5f6789.parquet"],
            {"train": [0, 1], "val": [2]},
        ),
        (
            ["train_0.jsonl", "test_0.jsonl.gz", "dev.jsonl"],
            {"train": [2], "test": [1], "val": [0]},
        ),
        (["en-train.parquet", "en-test.parquet"], {}),
        (["trains.parquet", "testing.parquet"], {}),
        (["train.txt", "test.txt"], {}),
        (["test.parquet", "other.parquet"], {}),
        (["train.parquet", "other.parquet"], {}),
    ],
)
def test_splits_are_those_that_hold_every_file(workdir, names, expected):
    files = touch(*(f"d/{name}" for name in names))
    splits = split_files(files, Path("d"))
    assert splits == {name: [files[i] for i in indices] for name, indices in expected.items()}


def test_a_mixture_of_split_names_and_others_is_refused(workdir):
    files = touch("d/train.parquet", "d/test-0.parquet", "d/other.parquet")
    message = "d/test-0.parquet is named after a split, but d/other.parquet is not"
    with pytest.raises(UserError, match=message):
        split_files(files, Path("d"))


@pytest.mark.parametrize(
    "names, remedy",
    [
        (["train-0.parquet", "val-0.parquet"], "d/val-0.parquet"),
        (["train-0.parquet", "val-0.parquet", "val-1.parquet"], "'d/val-*'"),
        (["train/a.parquet", "val/a.parquet", "val/b.parquet"], "d/val"),
        (["a/train-0.parquet", "a/val-0.parquet", "b/val-1.parquet"], "'d/[*][*]/val-*'"),
    ],
)
def test_only_the_train_split_is_read_and_the_note_says_how_to_use_the_other(
    workdir, names, remedy
):
    for name in names:
        write_parquet(f"d/{name}", text=[name])
    assert texts("d") == [names[0]]
    (note,) = local_files("d").notes("d")
    argument = note.rpartition("--data.val_source ")[2]
    assert "not using the val split (d/" in note
    assert sorted(texts(argument.strip("'"))) == [name for name in names if "val" in name]


# ---- hashes
def test_hashes_of_texts_are_uniform():
    hashes = [content_hash(text) for text in sentences(300)]
    assert 30 < sum(value < 0.2 for value in hashes) < 90
    assert all(0 <= value < 1 for value in hashes)


def test_a_hash_of_ids_does_not_depend_on_their_container():
    ids = list(range(20))
    assert content_hash(ids) == content_hash(np.array(ids, np.uint16)) != content_hash(ids[1:])


def test_digest_of_a_dict_does_not_depend_on_key_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


@pytest.mark.parametrize(
    "message, line", [("\none\ntwo", "one"), ("one.\ntwo", "one"), ("", "ValueError")]
)
def test_first_line_of_an_error(message, line):
    assert first_line(ValueError(message)) == line
