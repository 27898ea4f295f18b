import itertools
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences

from common import UserError
from data import text
from data.text import (
    DataConfig,
    Tokens,
    batch_indices,
    batches,
    documents,
    eval_windows,
    in_validation,
    prepare,
)
from data.tokenizer import affixes, load_tokenizer, spelling
from model import SPELLING

EVERYTHING = 10**9


@pytest.fixture
def cfg(workdir):
    return DataConfig(source="corpus.jsonl", tokenizer="bpe-300", val_fraction=0.2)


def stream(folder) -> np.ndarray:
    tokens = Tokens(folder)
    return tokens.window(0, len(tokens))


def split_documents(tokenizer, folder) -> list[str]:
    """The documents a prepared folder holds, read back."""
    ids = stream(folder)
    starts = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert starts[0] == 0
    return [tokenizer.decode(part[1:]) for part in np.split(ids, starts[1:])]


def test_every_document_is_on_exactly_one_side(cfg):
    tokenizer = load_tokenizer(cfg)
    train = split_documents(tokenizer, prepare(cfg, "train", EVERYTHING, tokenizer))
    val = split_documents(tokenizer, prepare(cfg, "val", EVERYTHING, tokenizer))
    assert sorted(train + val) == sorted(sentences(300))
    assert 0.1 < len(val) / 300 < 0.3


def test_validation_does_not_depend_on_the_training_budget_or_file_order(cfg):
    tokenizer = load_tokenizer(cfg)
    prepare(cfg, "train", 100, tokenizer)
    before = stream(prepare(cfg, "val", 500, tokenizer))[:500]
    prepare(cfg, "train", EVERYTHING, tokenizer)
    assert np.array_equal(before, stream(prepare(cfg, "val", EVERYTHING, tokenizer))[:500])
    fraction = [in_validation({"text": t}, 0.2) for t in sentences(300)]
    assert (
        fraction == [in_validation({"text": t}, 0.2) for t in sentences(300)]
        and 30 < sum(fraction) < 90
    )


def test_validation_source_of_its_own_leaves_all_of_the_source_for_training(cfg):
    Path("other.txt").write_text("Quite another text.")
    cfg.val_source = "other.txt"
    tokenizer = load_tokenizer(cfg)
    assert split_documents(tokenizer, prepare(cfg, "val", EVERYTHING, tokenizer)) == [
        "Quite another text."
    ]
    assert len(split_documents(tokenizer, prepare(cfg, "train", EVERYTHING, tokenizer))) == 300


def test_preparing_in_pieces_gives_the_same_stream(cfg, monkeypatch):
    monkeypatch.setattr(text, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(text, "SHARD_TOKENS", 2000)
    tokenizer = load_tokenizer(cfg)
    for tokens in (100, 4000, EVERYTHING):
        folder = prepare(cfg, "train", tokens, tokenizer)
    pieces, n_shards = stream(folder), len(list(folder.glob("*.bin")))
    cfg.cache = "elsewhere"
    whole = prepare(cfg, "train", EVERYTHING, tokenizer)
    assert np.array_equal(pieces, stream(whole)) and n_shards > 3
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["documents"] == len(split_documents(tokenizer, whole))
    assert manifest["tokens"] == len(pieces) and manifest["complete"]


def killed_preparation(cfg):
    """Prepare, and die without a word while the third shard is written."""
    import os

    text.BATCH_DOCUMENTS, text.SHARD_TOKENS = 16, 2000
    original = text.file_sha256
    text.file_sha256 = lambda path: os._exit(9) if path.name == "00002.bin" else original(path)
    prepare(cfg, "train", EVERYTHING, load_tokenizer(cfg))


def test_interrupted_preparation_goes_on_where_it_was(cfg, monkeypatch):
    process = multiprocessing.get_context("spawn").Process(target=killed_preparation, args=(cfg,))
    process.start()
    process.join()
    assert process.exitcode == 9
    monkeypatch.setattr(text, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(text, "SHARD_TOKENS", 2000)
    tokenizer = load_tokenizer(cfg)
    (folder,) = Path("cache/tokens").glob("train-*")
    first = (folder / "00000.bin").stat().st_mtime_ns
    resumed = stream(prepare(cfg, "train", EVERYTHING, tokenizer))
    assert (folder / "00000.bin").stat().st_mtime_ns == first
    cfg.cache = "elsewhere"
    assert np.array_equal(resumed, stream(prepare(cfg, "train", EVERYTHING, tokenizer)))


def test_second_request_uses_what_is_there_and_a_changed_file_does_not(cfg, monkeypatch):
    tokenizer = load_tokenizer(cfg)
    folder = prepare(cfg, "train", 1000, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(text, "tokenize", None)
        assert prepare(cfg, "train", 1000, tokenizer) == folder
    Path("corpus.jsonl").write_text('{"text": "new"}\n' * 9)
    assert prepare(cfg, "train", 1000, tokenizer) != folder


@pytest.mark.parametrize("kind", ["parquet", "txt", "folder", "glob", "input_ids"])
def test_kinds_of_sources(cfg, kind):
    import datasets

    tokenizer = load_tokenizer(cfg)
    docs = sentences(300)
    Path("more").mkdir()
    if kind == "parquet":
        datasets.Dataset.from_dict({"body": docs, "n": list(range(300))}).to_parquet(
            "more/a.parquet"
        )
        cfg.source, cfg.text_column = "more/a.parquet", "body"
    elif kind == "input_ids":
        ids = [tokenizer(doc)["input_ids"] for doc in docs]
        datasets.Dataset.from_dict({"input_ids": ids}).to_parquet("more/a.parquet")
        cfg.source = "more/a.parquet"
    else:
        for i, doc in enumerate(docs):
            Path(f"more/{i}.txt").write_text(doc)
        cfg.source = {"txt": "more/7.txt", "folder": "more", "glob": "more/*.txt"}[kind]
        docs = [docs[7]] if kind == "txt" else docs
    cfg.val_source = "corpus.jsonl"
    folder = prepare(cfg, "train", EVERYTHING, tokenizer)
    if kind == "input_ids":
        assert tokenizer.eos_token_id not in stream(folder)
        assert sorted(tokenizer.decode(stream(folder))) == sorted("".join(docs))
    else:
        assert sorted(split_documents(tokenizer, folder)) == sorted(docs)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["bytes"] == sum(len(doc.encode()) for doc in docs)


def test_mix_has_the_shares_asked_for(cfg):
    for name, letter in (("a", "a"), ("b", "b")):
        Path(f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"text": f"{letter * (50 + i % 7)} {i}"}) + "\n" for i in range(2000)
            )
        )
    taken = {"a": 0, "b": 0}
    for row in documents({"a.jsonl": 0.7, "b.jsonl": 0.3}, "text", {}):
        taken[row["text"][0]] += len(row["text"])
        if sum(taken.values()) > 50_000:
            break
    assert taken["a"] / sum(taken.values()) == pytest.approx(0.7, abs=0.01)


def test_an_endless_stream_is_read_no_further_than_needed(cfg, monkeypatch):
    tokenizer, read = load_tokenizer(cfg), []

    def endless(*_):
        for i in itertools.count():
            read.append(i)
            yield {"text": f"document {i} of a stream without end"}

    monkeypatch.setattr(text, "rows", endless)
    cfg.source = "some/stream"
    monkeypatch.setattr(text, "revisions", lambda wanted: {})
    folder = prepare(cfg, "train", 20_000, tokenizer)
    assert 20_000 <= Tokens(folder).n < 30_000 and len(read) < 2000


def test_standard_library_is_a_source(cfg):
    first = [row for row, _ in zip(documents("stdlib", "text", {}), range(20))]
    again = [row for row, _ in zip(documents("stdlib", "text", {}), range(20))]
    assert first == again and sum("def " in row["text"] for row in first) > 10


def test_tokenizer_trained_on_the_source_loses_nothing_and_is_trained_once(cfg, monkeypatch):
    tokenizer = load_tokenizer(cfg)
    awkward = "naïve 🦊🏽 \t\n\n  日本 \x00"
    assert tokenizer.decode(tokenizer(awkward)["input_ids"]) == awkward and len(tokenizer) == 300
    monkeypatch.setattr("data.tokenizer.train_bpe", None)
    assert load_tokenizer(cfg)("a fox")["input_ids"] == tokenizer("a fox")["input_ids"]


def test_affixes_are_what_spellings_share():
    walking = {
        "^w",
        "^wa",
        "^wal",
        "^walk",
        "g$",
        "ng$",
        "ing$",
        "king$",
        "=walking",
        "case (True, False, False, True, False)",
    }
    assert (
        affixes("\u0120walking") == affixes("\u2581walking") == walking
    )  # a space before it, in two tokenizers' writing
    assert affixes("walking") ^ walking == {
        "case (True, False, False, True, False)",
        "case (False, False, False, True, False)",
    }
    assert affixes("\u0120Walking") & walking == walking - {
        "case (True, False, False, True, False)"
    }
    assert affixes("\u0120") == {
        "=",
        "case (True, False, False, False, False)",
    } and "case (False, False, False, False, True)" in affixes("7")


def test_spelling_numbers_the_commonest_affixes(cfg):
    tokenizer = load_tokenizer(cfg)
    entries = [affixes(token) for token in tokenizer.convert_ids_to_tokens(range(300))]
    every, few = spelling(tokenizer, 10**6), spelling(tokenizer, 20)
    assert every.shape == few.shape == (300, SPELLING) and few.max() == 19
    assert [(row >= 0).sum().item() for row in every] == [len(entry) for entry in entries]
    sharers = (few == 0).any(
        1
    )  # number 0 is the commonest: one set of entries, and no affix has more
    assert any(
        sharers.tolist() == [affix in entry for entry in entries] for affix in set.union(*entries)
    )
    assert sharers.sum() == max(
        sum(affix in entry for entry in entries) for affix in set.union(*entries)
    )


def test_tokenizer_of_the_hub_is_asked_for_once(cfg, monkeypatch):
    import transformers

    local, load = load_tokenizer(cfg), transformers.AutoTokenizer.from_pretrained
    cfg.tokenizer = "somebody/some-tokenizer"
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name: name)
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda name: local if name == cfg.tokenizer else load(name),
    )
    load_tokenizer(cfg)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    assert load_tokenizer(cfg).get_vocab() == local.get_vocab()


def test_hub_dataset_is_streamed_and_pinned_to_a_commit(cfg, monkeypatch):
    import datasets
    import huggingface_hub

    asked = []
    local = datasets.load_dataset("json", data_files="corpus.jsonl", split="train", streaming=True)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or local
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda self, name: type("Info", (), {"sha": f"sha of {name}"}),
    )
    tokenizer = load_tokenizer(cfg)
    cfg.source = "some/set:part"
    folder = prepare(cfg, "train", 100, tokenizer)
    assert asked[-1] == (
        ("some/set", "part"),
        {"split": "train", "streaming": True, "revision": "sha of some/set"},
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", None
    )  # not asked again: neither to use it nor to go on
    n = len(asked)
    assert prepare(cfg, "train", 100, tokenizer) == folder and len(asked) == n


def test_batches_are_each_window_once_a_pass_in_an_order_of_the_seed():
    n, batch = 10, 4
    order = [i for step in range(5) for i in batch_indices(step, batch, n, seed=0)]
    assert (
        sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    )
    assert order != [i for step in range(5) for i in batch_indices(step, batch, n, seed=1)]
    for step in range(5):
        ranks = [batch_indices(step, batch, n, seed=0, rank=r, world=2) for r in range(2)]
        assert ranks[0] + ranks[1] == batch_indices(step, batch, n, seed=0)


def test_windows_cross_shards_and_batches_start_anywhere(cfg, monkeypatch):
    monkeypatch.setattr(text, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(text, "SHARD_TOKENS", 500)
    tokens = Tokens(prepare(cfg, "train", EVERYTHING, load_tokenizer(cfg)))
    assert len(tokens.shards) > 5
    whole = np.concatenate(tokens.shards)
    for start in (0, *(tokens.starts[1:-1] - 1), len(tokens) - 700):
        assert np.array_equal(
            tokens.window(int(start), 700 if start < len(tokens) - 700 else 300)[:300],
            whole[start : start + 300],
        )
    settings = dict(batch=4, seq_len=32, n_windows=20, seed=3, device=torch.device("cpu"))
    run = list(batches(tokens, 0, 9, **settings))
    assert [tuple(b.shape) for b in run] == [(4, 33)] * 9
    assert all(
        torch.equal(a, b) for a, b in zip(run[4:], batches(tokens, 4, 9, **settings), strict=True)
    )


def test_validation_windows_are_spread_over_the_whole_stream(cfg):
    tokens = Tokens(prepare(cfg, "val", EVERYTHING, load_tokenizer(cfg)))
    windows = eval_windows(tokens, 32, 5)
    assert windows.shape == (5, 33)
    assert windows[0].tolist() == tokens.window(0, 33).tolist()
    assert windows[-1].tolist() == tokens.window(len(tokens) - 33, 33).tolist()
    assert len(eval_windows(tokens, 32, EVERYTHING)) == (len(tokens) - 1) // 32


def bad_source(content: bytes | None, name: str = "bad.jsonl"):
    if content is not None:
        Path(name).write_bytes(content)
    return name


@pytest.mark.parametrize(
    "source, says",
    [
        ("missing.parquet", "missing.parquet"),
        ("nowhere/*.txt", "nowhere"),
        ("./nothing", "./nothing"),
        (b"", "bad.jsonl"),
        (b'{"title": "x"}\n', "no column 'text' but title"),
        (b'{"text": 5}\n', "holds int, not text"),
        (b"\xff\xfe\x00rubbish", "bad.jsonl"),
        ({}, "at least one source"),
        ({"corpus.jsonl": -1}, "positive shares"),
    ],
)
def test_bad_sources_are_named_in_one_line(cfg, source, says):
    tokenizer = load_tokenizer(cfg)
    cfg.source = bad_source(source) if isinstance(source, bytes) else source
    cfg.val_source = "corpus.jsonl"
    with pytest.raises(UserError, match=".*") as error:
        Tokens(prepare(cfg, "train", 100, tokenizer))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_source_of_blank_documents_is_empty(cfg):
    tokenizer = load_tokenizer(cfg)
    cfg.source, cfg.val_source = bad_source(b'{"text": "  "}\n{"text": null}\n'), "corpus.jsonl"
    with pytest.raises(
        UserError,
        match="none of the 0 documents in data source bad.jsonl is for train: it is empty",
    ):
        Tokens(prepare(cfg, "train", 100, tokenizer))


def test_too_few_documents_for_validation_names_the_share_to_raise(cfg):
    tokenizer = load_tokenizer(cfg)
    Path("three.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(3)))
    cfg.source, cfg.val_fraction = "three.jsonl", 0.001
    with pytest.raises(
        UserError,
        match="none of the 3 documents in data source three.jsonl is for val; .*val_fraction",
    ):
        Tokens(prepare(cfg, "val", 100, tokenizer))


def test_damage_is_found_and_the_folder_named(cfg):
    tokenizer = load_tokenizer(cfg)
    folder = prepare(cfg, "train", 1000, tokenizer)
    shard = folder / "00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="sha256.*delete cache/tokens/train"):
        Tokens(folder)
    shard.unlink()
    with pytest.raises(UserError, match="delete cache/tokens/train"):
        Tokens(folder)
    (folder / "manifest.json").write_text('{"tokens": 5')
    with pytest.raises(UserError, match="manifest.json is damaged: delete"):
        prepare(cfg, "train", 1000, tokenizer)


def test_ids_beyond_the_tokenizer_are_refused(cfg):
    tokenizer = load_tokenizer(cfg)
    cfg.source, cfg.val_source = bad_source(b'{"input_ids": [5, 300]}\n'), "corpus.jsonl"
    with pytest.raises(UserError, match="reach 300, the tokenizer has 300"):
        prepare(cfg, "train", 100, tokenizer)


@pytest.mark.parametrize("name", ["bpe-10", "bpe-x", "bpe-70000"])
def test_bpe_sizes_out_of_range_are_refused(cfg, name):
    cfg.tokenizer = name
    with pytest.raises(UserError, match="from 257 to 65536"):
        load_tokenizer(cfg)


def test_without_the_hub_errors_name_the_alternatives(cfg, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    tokenizer = load_tokenizer(cfg)
    cfg.source = "some/dataset"
    with pytest.raises(
        UserError, match=r"some/dataset on the hub: no route to host; .*parquet.*llm_demo.yaml"
    ):
        prepare(cfg, "train", 100, tokenizer)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    cfg.tokenizer = "some/tokenizer"
    with pytest.raises(UserError, match="some/tokenizer: no route to host.*bpe-8192"):
        load_tokenizer(cfg)
