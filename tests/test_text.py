import hashlib
import itertools
import json
import multiprocessing
import os
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import sentences, write_jsonl

from common.config import UserError
from data import text
from data.text import DataConfig, Tokens, eval_windows, prepare_tokens, token_batches
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


def test_with_a_validation_source_all_documents_are_for_training(cfg, tokenizer):
    Path("other.txt").write_text("Another text.")
    cfg.val_source = "other.txt"
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert len(split_documents(tokenizer, folder)) == 300


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


def test_an_endless_stream_is_read_only_as_far_as_needed(cfg, tokenizer, monkeypatch):
    n_read = itertools.count()

    def endless(*args):
        return (
            {"text": f"document {next(n_read)} of an endless stream"} for _ in itertools.count()
        )

    monkeypatch.setattr("data.source.records", endless)
    monkeypatch.setattr(text, "hub_revisions", lambda names: {})
    cfg.source = "some/stream"
    folder = prepare_tokens(cfg, "train", 20_000, tokenizer)
    assert 20_000 <= len(Tokens(folder)) < 30_000
    assert next(n_read) < 2000


# ---- kinds of sources
def write_parquet(columns: dict) -> str:
    datasets.Dataset.from_dict(columns).to_parquet("a.parquet")
    return "a.parquet"


def write_txt() -> str:
    Path("more").mkdir()
    for i, document in enumerate(sentences(300)):
        Path(f"more/{i}.txt").write_text(document)
    return "more"


def test_a_parquet_file_is_read_from_its_text_column(cfg, tokenizer):
    cfg.source = write_parquet({"body": sentences(300), "n": list(range(300))})
    cfg.text_column, cfg.val_source = "body", "corpus.jsonl"
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert sorted(split_documents(tokenizer, folder)) == sorted(sentences(300))


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
    cfg.source, cfg.val_source = source, "corpus.jsonl"
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert sorted(split_documents(tokenizer, folder)) == sorted(documents)
    assert manifest_of(folder)["bytes"] == sum(len(document.encode()) for document in documents)


def test_ready_input_ids_are_used_as_they_are(cfg, tokenizer):
    ids = [tokenizer(document)["input_ids"] for document in sentences(300)]
    cfg.source, cfg.val_source = write_parquet({"input_ids": ids}), "corpus.jsonl"
    folder = prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    assert sorted(token_stream(folder)) == sorted(itertools.chain(*ids))
    n_bytes = sum(len(document.encode()) for document in sentences(300))
    assert manifest_of(folder)["bytes"] == n_bytes


def test_input_ids_beyond_the_tokenizer_are_refused(cfg, tokenizer):
    Path("ids.jsonl").write_text('{"input_ids": [5, 300]}\n')
    cfg.source, cfg.val_source = "ids.jsonl", "corpus.jsonl"
    with pytest.raises(UserError, match="range from 5 to 300, but the tokenizer has 300 entries"):
        prepare_tokens(cfg, "train", 100, tokenizer)


@pytest.fixture
def hub_calls(cfg, tokenizer, monkeypatch):
    """Calls of datasets.load_dataset, which yields the corpus for any hub dataset."""

    class Info:
        def __init__(self, name):
            self.sha = f"sha of {name}"

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return corpus

    calls = []
    corpus = datasets.load_dataset("json", data_files="corpus.jsonl", split="train", streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: Info(name))
    cfg.source = "some/set:part"
    return calls


def test_a_hub_dataset_is_streamed_from_a_fixed_commit(cfg, tokenizer, hub_calls):
    prepare_tokens(cfg, "train", 100, tokenizer)
    expected = {"split": "train", "streaming": True, "revision": "sha of some/set"}
    assert hub_calls == [(("some/set", "part"), expected)]


def test_a_prepared_hub_dataset_is_not_requested_again(cfg, tokenizer, hub_calls, monkeypatch):
    folder = prepare_tokens(cfg, "train", 100, tokenizer)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", None)
    assert prepare_tokens(cfg, "train", 100, tokenizer) == folder
    assert len(hub_calls) == 1


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


def test_batches_start_at_any_step(cfg, tokenizer, small_shards):
    tokens = Tokens(prepare_tokens(cfg, "train", EVERYTHING, tokenizer))
    options = {"batch": 4, "seq_len": 32, "n_windows": 20, "seed": 3, "device": torch.device("cpu")}
    batches = list(token_batches(tokens, 0, 9, **options))
    assert [tuple(batch.shape) for batch in batches] == [(4, 33)] * 9
    resumed = list(token_batches(tokens, 4, 9, **options))
    assert torch.equal(torch.stack(batches[4:]), torch.stack(resumed))


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
    message = "none of the 0 documents in data source blank.jsonl is in the train split; pass a"
    with pytest.raises(UserError, match=message):
        Tokens(prepare_tokens(cfg, "train", 100, tokenizer))


def test_too_few_documents_for_validation_names_the_fraction_to_raise(cfg, tokenizer):
    write_jsonl("three.jsonl", sentences(3))
    cfg.source, cfg.val_fraction = "three.jsonl", 0.001
    message = "none of the 3 documents in .* three.jsonl is in the val split; .*--data.val_fraction"
    with pytest.raises(UserError, match=message):
        Tokens(prepare_tokens(cfg, "val", 100, tokenizer))


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


@pytest.mark.parametrize("content", ['{"tokens": 5', '{"tokens": 5, "shards": []}', "[]"])
def test_a_damaged_manifest_is_named_with_the_folder_to_delete(cfg, tokenizer, content):
    folder = prepare_tokens(cfg, "train", 1000, tokenizer)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json is damaged; delete cache/tokens/train"):
        prepare_tokens(cfg, "train", 1000, tokenizer)


def test_a_built_in_source_is_not_looked_up_on_the_hub(cfg, monkeypatch):
    tokenizer, asked = load_tokenizer(cfg), []
    monkeypatch.setitem(text.BUILT_IN, "mine", lambda: iter(["one text", " ", "another text"]))
    monkeypatch.setattr(text, "hub_revisions", lambda names: asked.extend(names) or {})
    cfg.source, cfg.val_source = "mine", "corpus.jsonl"
    tokens = Tokens(prepare_tokens(cfg, "train", 10**9, tokenizer))
    assert asked == []
    ids = tokens.window(0, len(tokens))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "one textanother text"
