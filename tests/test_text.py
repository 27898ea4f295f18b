import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, sentences, write_jsonl

from common.config import UserError
from data import source, text
from data.text import (
    DataConfig,
    Tokens,
    encode,
    eval_windows,
    prepare_tokens,
    training_records,
)
from data.tokenizer import load_tokenizer

EVERYTHING = 10**9


@pytest.fixture
def cfg(workdir):
    return DataConfig(source="corpus.jsonl", tokenizer="bpe-300", val_fraction=0.2)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(text, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(text, "SHARD_TOKENS", 500)


@pytest.fixture
def tokenizer(cfg):
    return load_tokenizer(cfg)


def token_stream(folder: Path) -> np.ndarray:
    tokens = Tokens(folder)
    return tokens.window(0, len(tokens))


def split_documents(tokenizer, folder: Path) -> list[str]:
    """The documents of a prepared folder, decoded."""
    ids = token_stream(folder)
    starts = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert starts[0] == 0
    return [tokenizer.decode(part[1:]) for part in np.split(ids, starts[1:])]


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# ---- splits
def test_every_document_is_in_exactly_one_split(cfg, tokenizer):
    train = split_documents(tokenizer, prepare_tokens(cfg, "train", EVERYTHING, tokenizer))
    val = split_documents(tokenizer, prepare_tokens(cfg, "val", EVERYTHING, tokenizer))
    assert sorted(train + val) == sorted(sentences(300))
    assert 0.1 < len(val) / 300 < 0.3


def test_validation_tokens_do_not_depend_on_the_training_budget(cfg, tokenizer):
    prepare_tokens(cfg, "train", 100, tokenizer)
    before = token_stream(prepare_tokens(cfg, "val", 500, tokenizer))[:500]
    prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    after = token_stream(prepare_tokens(cfg, "val", EVERYTHING, tokenizer))[:500]
    assert np.array_equal(before, after)


def test_a_validation_source_is_the_whole_validation_split(cfg, tokenizer):
    Path("other.txt").write_text("Another text.")
    cfg.val_source = "other.txt"
    folder = prepare_tokens(cfg, "val", EVERYTHING, tokenizer)
    assert split_documents(tokenizer, folder) == ["Another text."]


def test_with_a_validation_source_all_documents_are_for_training(cfg, tokenizer, capsys):
    Path("other.txt").write_text("Another text.")
    cfg.val_source = "other.txt"
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert len(split_documents(tokenizer, folder)) == 300
    assert "excluded" not in capsys.readouterr().out


@pytest.mark.parametrize("n_starts", [1, 2])
def test_training_documents_that_are_in_the_validation_source_are_excluded(
    cfg, tokenizer, capsys, n_starts
):
    write_jsonl("val.jsonl", [f" {document}\n" for document in sentences(300)[:60]])
    cfg.val_source = "val.jsonl"
    for _ in range(n_starts):  # printed each time
        capsys.readouterr()
        folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert sorted(split_documents(tokenizer, folder)) == sorted(sentences(300)[60:])
    assert manifest_of(folder)["excluded"] == 60
    printed = capsys.readouterr().out
    assert "train data: excluded 60 documents (also in --data.val_source)" in printed


def write_ids(path: str, tokenizer, documents: list[str]) -> None:
    ids = [[tokenizer.eos_token_id, *tokenizer(document)["input_ids"]] for document in documents]
    pq.write_table(pa.table({"input_ids": ids}), path)


@pytest.mark.parametrize("with_ids", ["train", "val"])
def test_the_same_text_as_ids_is_excluded(cfg, tokenizer, with_ids):
    documents = {"train": sentences(300), "val": sentences(300)[:60]}
    for split, texts in documents.items():
        write_jsonl(f"{split}_.jsonl", texts)
    write_ids("ids.parquet", tokenizer, documents[with_ids])
    cfg.source, cfg.val_source = "train_.jsonl", "val_.jsonl"
    if with_ids == "train":
        cfg.source = "ids.parquet"
    else:
        cfg.val_source = "ids.parquet"
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert sorted(split_documents(tokenizer, folder)) == sorted(sentences(300)[60:])


@pytest.mark.parametrize("variant", ["{}\n", "\n {}  ", "ids"])
def test_variants_of_a_text_are_in_the_same_split(cfg, tokenizer, variant):
    write_jsonl("corpus.jsonl", sentences(300))
    if variant == "ids":
        write_ids("more.parquet", tokenizer, sentences(300))
        cfg.source = {"corpus.jsonl": 0.5, "more.parquet": 0.5}
    else:
        write_jsonl("both.jsonl", sentences(300) + [variant.format(t) for t in sentences(300)])
        cfg.source = "both.jsonl"
    train, val = (
        {
            t.strip()
            for t in split_documents(tokenizer, prepare_tokens(cfg, s, EVERYTHING, tokenizer))
        }
        for s in ("train", "val")
    )
    assert len(val) > 20
    assert not train & val


def test_the_validation_choice_of_texts_is_that_of_the_raw_text(cfg, tokenizer):
    write_jsonl("spaced.jsonl", [f"{t}\n" for t in sentences(300)])
    cfg.source = "spaced.jsonl"
    val = split_documents(tokenizer, prepare_tokens(cfg, "val", EVERYTHING, tokenizer))
    assert sorted(val) == sorted(
        f"{t}\n" for t in sentences(300) if source.content_hash(f"{t}\n") < cfg.val_fraction
    )


def test_first_choices_are_those_of_a_dict(monkeypatch):
    monkeypatch.setattr(text.FirstChoices, "N_RECENT", 7)
    rng, expected, choices = np.random.default_rng(0), {}, text.FirstChoices()
    for key, choice in zip(
        (rng.integers(0, 60, 500) / 60).tolist(), rng.random(500) < 0.5, strict=True
    ):
        assert choices.setdefault(key, bool(choice)) is expected.setdefault(key, bool(choice))
    assert len(choices.keys) > 40


def test_the_train_split_of_a_source_is_prepared_and_the_others_are_named(cfg, tokenizer, capsys):
    Path("d").mkdir()
    write_jsonl("d/train.jsonl", sentences(300)[:200])
    write_jsonl("d/test.jsonl", sentences(300)[200:])
    cfg.source = "d"
    found = [
        document
        for split in ("train", "val")
        for document in split_documents(tokenizer, prepare_tokens(cfg, split, 10**9, tokenizer))
    ]
    assert sorted(found) == sorted(sentences(300)[:200])
    assert "set --data.val_source d/test.jsonl" in capsys.readouterr().out


# ---- a single document
LINES = "\n".join(f"{i}: {document}" for i, document in enumerate(sentences(40)))


def single(name: str, content: str) -> str:
    Path(name).write_text(json.dumps({"text": content}) if name.endswith("l") else content)
    return name


def joined(tokenizer, cfg, split: str) -> str:
    return "".join(split_documents(tokenizer, prepare_tokens(cfg, split, EVERYTHING, tokenizer)))


@pytest.mark.parametrize("name", ["book.txt", "book.jsonl"])
@pytest.mark.parametrize("part_characters", [1_000_000, 500])
def test_a_single_document_is_split_at_a_line_near_its_end(
    cfg, tokenizer, monkeypatch, name, part_characters
):
    monkeypatch.setattr(source, "PART_CHARACTERS", part_characters)
    cfg.source = single(name, LINES)
    train, val = joined(tokenizer, cfg, "train"), joined(tokenizer, cfg, "val")
    assert train + val == LINES
    assert train.endswith("\n")
    assert 0.15 < len(val) / len(LINES) < 0.3


@pytest.mark.parametrize(
    "content, last", [("a title\n" + "many words " * 99, " "), ("x" * 500, "x"), ("xy", "x")]
)
def test_a_single_document_without_lines_is_split_at_a_space_or_anywhere(
    cfg, tokenizer, content, last
):
    cfg.source = single("book.txt", content)
    train, val = joined(tokenizer, cfg, "train"), joined(tokenizer, cfg, "val")
    assert train + val == content
    assert train[-1] == last
    assert 0.15 < len(val) / len(content) <= 0.5


def test_a_single_document_of_ids_is_split_by_position(cfg, tokenizer):
    Path("ids.jsonl").write_text(json.dumps({"input_ids": list(range(1, 101))}))
    cfg.source = "ids.jsonl"
    splits = [token_stream(prepare_tokens(cfg, s, EVERYTHING, tokenizer)) for s in ("train", "val")]
    assert [ids.tolist() for ids in splits] == [list(range(1, 81)), list(range(81, 101))]


def test_a_tokenizer_for_a_single_document_is_trained_on_its_training_part(cfg):
    cfg.source = single("book.txt", LINES)
    assert LINES.startswith("".join(record["text"] for record in training_records(cfg)))


# ---- preparation
def test_preparing_in_pieces_gives_the_same_tokens(cfg, tokenizer, small_shards):
    for tokens in (100, 4000, EVERYTHING):
        folder = prepare_tokens(cfg, "train", tokens, tokenizer)
    cfg.cache = "elsewhere"
    at_once = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert len(list(folder.glob("*.bin"))) > 3
    assert np.array_equal(token_stream(folder), token_stream(at_once))


def test_manifest_counts_documents_and_tokens(cfg, tokenizer, small_shards):
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    manifest = manifest_of(folder)
    assert manifest["complete"]
    assert manifest["records"] == 300
    assert manifest["documents"] == len(split_documents(tokenizer, folder))
    assert manifest["tokens"] == len(token_stream(folder))


def killed_preparation(cfg):
    """Prepare, and exit without clean-up while the third shard is written."""
    text.BATCH_DOCUMENTS, text.SHARD_TOKENS = 16, 500
    file_sha256 = text.file_sha256

    def killing(path: Path) -> str:
        if path.name == "00002.bin":
            os._exit(9)
        return file_sha256(path)

    text.file_sha256 = killing
    prepare_tokens(cfg, "train", EVERYTHING, load_tokenizer(cfg))


class Stopped(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("error", [UserError("the hub is gone"), Stopped()])
def test_an_interrupted_preparation_saves_its_tokens(
    cfg, tokenizer, small_shards, monkeypatch, error
):
    monkeypatch.setattr(text, "SHARD_TOKENS", EVERYTHING)
    whole = token_stream(prepare_tokens(cfg, "train", EVERYTHING, tokenizer))
    cfg.cache = "elsewhere"

    def failing(*args):
        yield from itertools.islice(documents(*args), 100)
        raise error

    documents = text.documents
    monkeypatch.setattr(text, "documents", failing)
    with pytest.raises(type(error)):
        prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    (folder,) = Path("elsewhere/tokens").glob("train-*")
    assert manifest_of(folder)["records"] == 96
    first = (folder / "00000.bin").read_bytes()
    monkeypatch.setattr(text, "documents", documents)
    resumed = token_stream(prepare_tokens(cfg, "train", EVERYTHING, tokenizer))
    assert (folder / "00000.bin").read_bytes() == first
    assert np.array_equal(resumed, whole)


def test_leftovers_of_a_killed_preparation_are_removed(cfg, tokenizer):
    folder = prepare_tokens(cfg, "train", 100, tokenizer)
    (folder / "00001.bin.tmp").write_bytes(b"half")
    prepare_tokens(cfg, "train", 100, tokenizer)
    assert sorted(path.name for path in folder.iterdir()) == ["00000.bin", "manifest.json"]


PREPARE = """
import time
from data import text
from data.tokenizer import load_tokenizer
cfg = text.DataConfig(source="corpus.jsonl", tokenizer="bpe-300", val_fraction=0.2)
text.BATCH_DOCUMENTS, text.SHARD_TOKENS = 4, 50
tokenizer = load_tokenizer(cfg)
print("ready", flush=True)
input()
print(text.Tokens(text.prepare_tokens(cfg, "train", 10**9, tokenizer)).sha256)
"""


def test_two_processes_prepare_the_same_data_at_once(cfg):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options = pipes | {"env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    both = [subprocess.Popen([sys.executable, "-c", PREPARE], **options) for _ in range(2)]
    for process in both:
        while "ready" not in process.stdout.readline():
            assert process.poll() is None
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0].splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] == Tokens(*Path("cache/tokens").glob("train-*")).sha256


def test_a_full_disk_names_the_file_and_preparation_continues(cfg, tokenizer):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write cache/.*00000.bin: .*; free disk space"):
            prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert manifest_of(folder)["complete"]


def test_tokens_do_not_depend_on_the_size_of_batches(cfg, tokenizer, monkeypatch):
    whole = token_stream(prepare_tokens(cfg, "train", EVERYTHING, tokenizer))
    monkeypatch.setattr(text, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(text, "ENCODE_CHARACTERS", 100)
    cfg.cache = "elsewhere"
    assert np.array_equal(token_stream(prepare_tokens(cfg, "train", EVERYTHING, tokenizer)), whole)


def test_what_is_skipped_or_changed_is_printed_at_every_start(cfg, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(source, "PART_CHARACTERS", 300)
    documents = [{"text": t} for t in [*sentences(300), "", "x\ud83d", "y" * 400, "z" * 700]]
    Path("odd.jsonl").write_text("\n".join(map(json.dumps, documents)))
    cfg.source = "odd.jsonl"
    for _ in range(2):
        prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
        printed = capsys.readouterr().out
        assert "train data: skipped 1 document without text" in printed
        assert (
            "train data: found U+FFFD (invalid characters) in 1 document, first in odd.jsonl\n"
            in printed
        )
        assert "train data: split 2 documents longer than" in printed


def test_killed_preparation_resumes_after_its_last_shard(cfg, tokenizer, small_shards):
    process = multiprocessing.get_context("spawn").Process(target=killed_preparation, args=(cfg,))
    process.start()
    process.join()
    assert process.exitcode == 9
    (folder,) = Path("cache/tokens").glob("train-*")
    first_written = (folder / "00000.bin").stat().st_mtime_ns
    resumed = token_stream(prepare_tokens(cfg, "train", EVERYTHING, tokenizer))
    assert (folder / "00000.bin").stat().st_mtime_ns == first_written
    cfg.cache = "elsewhere"
    whole = token_stream(prepare_tokens(cfg, "train", EVERYTHING, tokenizer))
    assert np.array_equal(resumed, whole)


def test_a_second_request_uses_the_prepared_tokens(cfg, tokenizer, monkeypatch):
    folder = prepare_tokens(cfg, "train", 1000, tokenizer)
    monkeypatch.setattr(text, "tokenize", None)
    assert prepare_tokens(cfg, "train", 1000, tokenizer) == folder


def test_a_changed_file_is_prepared_again(cfg, tokenizer):
    folder = prepare_tokens(cfg, "train", 1000, tokenizer)
    Path("corpus.jsonl").write_text('{"text": "new"}\n' * 9)
    assert prepare_tokens(cfg, "train", 1000, tokenizer) != folder


@pytest.fixture
def hub(cfg, tokenizer, monkeypatch):
    """Calls of hub_stream, which yields records without end for any dataset."""

    def hub_stream(*args):
        calls.append(args)
        yield from ({"text": f"document {i} of an endless stream"} for i in n_read)

    calls, n_read = [], itertools.count()
    monkeypatch.setattr(source, "hub_stream", hub_stream)
    monkeypatch.setattr(
        text, "hub_revisions", lambda names, seconds: {name: f"sha of {name}" for name in names}
    )
    cfg.source, cfg.retry_seconds = "some/stream:part", 7.0
    return calls, n_read


def test_an_endless_stream_is_read_only_as_far_as_needed(cfg, tokenizer, hub):
    folder = prepare_tokens(cfg, "train", 20_000, tokenizer)
    assert 20_000 <= len(Tokens(folder)) < 30_000
    assert next(hub[1]) < 2000


def test_a_hub_dataset_is_streamed_from_a_fixed_commit(cfg, tokenizer, hub, monkeypatch):
    prepare_tokens(cfg, "train", 100, tokenizer)
    monkeypatch.setattr(text, "hub_revisions", None)  # known from the first time
    prepare_tokens(cfg, "train", 20_000, tokenizer)
    assert hub[0] == [("some/stream:part", "sha of some/stream:part", 7.0)] * 2


def test_a_prepared_hub_dataset_is_not_requested_again(cfg, tokenizer, hub, monkeypatch):
    folder = prepare_tokens(cfg, "train", 100, tokenizer)
    monkeypatch.setattr(text, "hub_revisions", None)
    assert prepare_tokens(cfg, "train", 100, tokenizer) == folder
    assert len(hub[0]) == 1


# ---- kinds of sources
@pytest.fixture
def with_other_validation(cfg):
    write_jsonl("other.jsonl", sentences(20, seed=1))
    cfg.val_source = "other.jsonl"


def write_txt() -> None:
    Path("more").mkdir()
    for i, document in enumerate(sentences(300)):
        Path(f"more/{i}.txt").write_text(document)


@pytest.mark.usefixtures("with_other_validation")
def test_a_parquet_file_is_read_from_its_text_column(cfg, tokenizer):
    table = pa.table({"body": sentences(300), "n": list(range(300))})
    pq.write_table(table, "a.parquet")
    write_jsonl("other.jsonl", sentences(20, seed=1))
    Path("other.jsonl").write_text(Path("other.jsonl").read_text().replace('"text"', '"body"'))
    cfg.source, cfg.text_column = "a.parquet", "body"
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert sorted(split_documents(tokenizer, folder)) == sorted(sentences(300))


@pytest.mark.usefixtures("with_other_validation")
@pytest.mark.parametrize(
    "source, documents",
    [
        ("more", sentences(300)),
        ("more/*.txt", sentences(300)),
        ("more/7.txt", sentences(300)[7:8]),
    ],
)
def test_a_text_file_is_one_document(cfg, tokenizer, source, documents):
    write_txt()
    cfg.source = source
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert sorted(split_documents(tokenizer, folder)) == sorted(documents)
    assert manifest_of(folder)["bytes"] == sum(len(document.encode()) for document in documents)


@pytest.mark.usefixtures("with_other_validation")
def test_ready_input_ids_are_used_as_they_are(cfg, tokenizer):
    ids = [tokenizer(document)["input_ids"] for document in sentences(300)]
    pq.write_table(pa.table({"input_ids": ids}), "a.parquet")
    cfg.source = "a.parquet"
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert sorted(token_stream(folder)) == sorted(itertools.chain(*ids))
    n_bytes = sum(len(document.encode()) for document in sentences(300))
    assert manifest_of(folder)["bytes"] == n_bytes


@pytest.mark.parametrize("ids", [[5, 1.5], ["a"], [[1], [2]], [10**30]])
def test_input_ids_that_are_no_integers_are_refused(cfg, tokenizer, ids):
    Path("ids.jsonl").write_text(json.dumps({"input_ids": ids}))
    cfg.source, cfg.val_source = "ids.jsonl", "corpus.jsonl"
    with pytest.raises(UserError, match="ids.jsonl: column 'input_ids' does not hold lists of int"):
        prepare_tokens(cfg, "train", 100, tokenizer)


def test_special_tokens_in_a_text_are_ordinary_text(cfg, tokenizer):
    write_jsonl("special.jsonl", [f"{i} <|endoftext|> is a token" for i in range(50)])
    cfg.source = "special.jsonl"
    ids = token_stream(prepare_tokens(cfg, "train", EVERYTHING, tokenizer))
    n_documents = manifest_of(*Path("cache/tokens").glob("train-*"))["documents"]
    assert (ids == tokenizer.eos_token_id).sum() == n_documents


def test_encoding_keeps_ordinary_text_and_the_tokenizer_as_they_are(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    ids = encode(tokenizer, ["<|endoftext|>", *sentences(20)])
    assert tokenizer.decode(ids[0]) == "<|endoftext|>"
    assert tokenizer.eos_token_id not in ids[0]
    assert tokenizer.backend_tokenizer.to_str() == before
    assert ids[1:] == [tokenizer(document)["input_ids"] for document in sentences(20)]


def test_input_ids_beyond_the_tokenizer_are_refused(cfg, tokenizer):
    Path("ids.jsonl").write_text('{"input_ids": [5, 300]}\n')
    cfg.source, cfg.val_source = "ids.jsonl", "corpus.jsonl"
    with pytest.raises(UserError, match="range from 5 to 300, but the tokenizer has 300 entries"):
        prepare_tokens(cfg, "train", 100, tokenizer)


# ---- tokens
def test_windows_cross_shards(cfg, tokenizer, small_shards):
    tokens = Tokens(prepare_tokens(cfg, "train", EVERYTHING, tokenizer))
    whole = np.concatenate(tokens.shards)
    assert len(tokens.shards) > 5
    for start in (0, *(tokens.starts[1:-2] - 1), len(tokens) - 700):
        expected = whole[start : start + 700]
        assert np.array_equal(tokens.window(int(start), len(expected)), expected)


def test_a_limit_cuts_tokens_and_hash(cfg, tokenizer, small_shards):
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    tokens = Tokens(folder, limit=1234)
    head = token_stream(folder)[:1234].astype("<u2")
    assert len(tokens) == 1234
    assert tokens.sha256 == hashlib.sha256(head.tobytes()).hexdigest()


@pytest.fixture
def val_tokens(cfg, tokenizer):
    return Tokens(prepare_tokens(cfg, "val", EVERYTHING, tokenizer))


@pytest.mark.parametrize("window, start", [(0, 0), (-1, -33)])
def test_validation_windows_reach_both_ends_of_the_tokens(val_tokens, window, start):
    first = start % len(val_tokens)
    windows = eval_windows(val_tokens, 32, 5)
    assert windows.shape == (5, 33)
    assert windows[window].tolist() == val_tokens.window(first, 33).tolist()


def test_validation_windows_are_at_most_those_that_do_not_overlap(val_tokens):
    assert len(eval_windows(val_tokens, 32, EVERYTHING)) == (len(val_tokens) - 1) // 32


def test_too_little_validation_text_is_refused(val_tokens):
    with pytest.raises(UserError, match="fewer than one sequence of 100000; provide more"):
        eval_windows(val_tokens, 100_000, 5)


# ---- errors
@pytest.mark.parametrize("setting", [{"val_fraction": 0}, {"val_fraction": 1}, {"val_tokens": 0}])
def test_settings_out_of_range_are_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"--data.{name} is {setting[name]}; it must be"):
        DataConfig(**setting)


def test_a_source_of_blank_documents_is_refused(cfg, tokenizer):
    Path("blank.jsonl").write_text('{"text": "  "}\n{"text": null}\n')
    cfg.source, cfg.val_source = "blank.jsonl", "corpus.jsonl"
    with pytest.raises(UserError, match="blank.jsonl has no text in column 'text'"):
        prepare_tokens(cfg, "train", 100, tokenizer)


@pytest.mark.parametrize("n", [2, 3, 9])
@pytest.mark.parametrize("fraction, split", [(1e-9, "val"), (1 - 1e-9, "train")])
def test_a_split_without_documents_names_a_fraction_that_works(cfg, tokenizer, n, fraction, split):
    write_jsonl("few.jsonl", sentences(n))
    cfg.source, cfg.val_fraction = "few.jsonl", fraction
    message = rf"none of the {n} documents in .* few.jsonl is in the {split} split"
    with pytest.raises(UserError, match=message) as error:
        Tokens(prepare_tokens(cfg, split, 100, tokenizer))
    advice = str(error.value).split("--data.val_fraction ")[1].split(",")[0]
    assert len(advice) < 8  # as few digits as possible
    cfg.val_fraction = float(advice)
    for name in ("train", "val"):
        assert len(Tokens(prepare_tokens(cfg, name, 100, tokenizer))) > 0


def test_training_text_that_is_all_in_the_validation_source_is_refused(cfg, tokenizer):
    cfg.val_source = "corpus.jsonl"
    with pytest.raises(UserError, match="300 documents .* all are also in --data.val_source"):
        Tokens(prepare_tokens(cfg, "train", 100, tokenizer))


def flip_bit(folder: Path) -> None:
    data = bytearray((folder / "00000.bin").read_bytes())
    data[100] ^= 1
    (folder / "00000.bin").write_bytes(data)


def delete_shard(folder: Path) -> None:
    (folder / "00000.bin").unlink()


@pytest.mark.parametrize("damage", [flip_bit, delete_shard])
def test_a_damaged_shard_is_named_with_the_folder_to_delete(cfg, tokenizer, damage):
    folder = prepare_tokens(cfg, "train", 1000, tokenizer)
    damage(folder)
    with pytest.raises(
        UserError, match=r"00000.bin is damaged .*sha256.*delete cache/tokens/train"
    ):
        Tokens(folder)


def swap_shards(folder: Path) -> None:
    (folder / "00000.bin").rename(folder / "x")
    (folder / "00001.bin").rename(folder / "00000.bin")
    (folder / "x").rename(folder / "00001.bin")


def test_swapped_shards_are_refused(cfg, tokenizer, small_shards):
    folder = prepare_tokens(cfg, "train", 3000, tokenizer)
    swap_shards(folder)
    with pytest.raises(UserError, match=r"00000.bin is damaged"):
        Tokens(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: manifest[:9],
        lambda manifest: "[]",
        lambda manifest: "{}",
        lambda manifest: manifest.replace('"documents": ', '"documents": 1'),
        lambda manifest: manifest.replace('"train"', '"val"'),
    ],
)
def test_a_damaged_manifest_is_refused_and_the_remedy_works(cfg, tokenizer, damage):
    folder = prepare_tokens(cfg, "train", 1000, tokenizer)
    before, path = token_stream(folder), folder / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=f"manifest.json is damaged; delete {folder} to prepare"):
        prepare_tokens(cfg, "train", 1000, tokenizer)
    shutil.rmtree(folder)
    assert np.array_equal(token_stream(prepare_tokens(cfg, "train", 1000, tokenizer)), before)


def test_a_prepared_folder_under_another_name_is_refused(cfg, tokenizer):
    train = prepare_tokens(cfg, "train", 1000, tokenizer)
    val = prepare_tokens(cfg, "val", 1000, tokenizer)
    shutil.rmtree(val)
    train.rename(val)
    with pytest.raises(UserError, match="manifest.json is damaged"):
        prepare_tokens(cfg, "val", 1000, tokenizer)


def test_a_built_in_source_is_not_looked_up_on_the_hub(cfg, monkeypatch):
    tokenizer, asked = load_tokenizer(cfg), []
    monkeypatch.setitem(text.BUILT_IN, "mine", lambda: iter(["one text", " ", "another text"]))
    monkeypatch.setattr(text, "hub_revisions", lambda names, seconds: asked.extend(names) or {})
    cfg.source, cfg.val_source = "mine", "corpus.jsonl"
    tokens = Tokens(prepare_tokens(cfg, "train", 10**9, tokenizer))
    assert asked == []
    ids = tokens.window(0, len(tokens))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "one textanother text"
