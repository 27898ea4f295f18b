import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers

from common.config import UserError
from data import tokenizer as tokenizer_module
from data.text import DataConfig
from data.tokenizer import load_tokenizer, subwords, token_subwords

CASE = {
    "a space before, lowercase": "case (True, False, False, True, False)",
    "lowercase": "case (False, False, False, True, False)",
    "a digit": "case (False, False, False, False, True)",
}
WALKING = {"^w", "^wa", "^wal", "^walk", "g$", "ng$", "ing$", "king$", "=walking"}


@pytest.fixture
def cfg(workdir):
    return DataConfig(source="corpus.jsonl", tokenizer="bpe-300", val_fraction=0.2)


# ---- loading
def test_bpe_loses_nothing(cfg):
    tokenizer = load_tokenizer(cfg)
    awkward = "naïve 🦊🏽 \t\n\n  日本 \x00"
    assert tokenizer.decode(tokenizer(awkward)["input_ids"]) == awkward


def test_bpe_has_the_requested_number_of_entries(cfg):
    assert len(load_tokenizer(cfg)) == 300


def test_bpe_is_trained_once(cfg, monkeypatch):
    expected = load_tokenizer(cfg)("a fox")["input_ids"]
    monkeypatch.setattr(tokenizer_module, "train_bpe", None)
    assert load_tokenizer(cfg)("a fox")["input_ids"] == expected


def test_bpe_is_trained_on_the_given_texts_under_the_name_of_their_corpus(cfg, monkeypatch):
    trained_on = []

    def train_bpe(name, texts):
        trained_on.append(list(texts))
        return tokenizer_on_source

    tokenizer_on_source = load_tokenizer(cfg)
    monkeypatch.setattr(tokenizer_module, "train_bpe", train_bpe)
    for corpus in ("captions of a", "captions of a", "captions of b"):
        load_tokenizer(cfg, corpus, lambda: iter(["red", "green"]))
    assert trained_on == [["red", "green"]] * 2


def test_bpe_is_not_trained_on_validation_documents(cfg):
    every = set(tokenizer_module.training_texts(cfg))
    cfg.val_source = "corpus.jsonl"
    assert len(every) < len(set(tokenizer_module.training_texts(cfg))) == 300


def test_bpe_cannot_be_trained_on_token_ids(cfg):
    Path("ids.jsonl").write_text('{"input_ids": [1, 2]}\n')
    cfg.source = "ids.jsonl"
    with pytest.raises(UserError, match="ids.jsonl holds token ids, not text; pass the tokenizer"):
        load_tokenizer(cfg)


@pytest.mark.parametrize("name", ["bpe-10", "bpe-x", "bpe-70000"])
def test_bpe_sizes_out_of_range_are_refused(cfg, name):
    cfg.tokenizer = name
    with pytest.raises(UserError, match=f"is {name}; N in bpe-N must be from 257 to 65536"):
        load_tokenizer(cfg)


def test_unpaired_surrogates_in_texts_become_replacement_characters(cfg):
    tokenizer = load_tokenizer(cfg, "captions", lambda: iter(["a \ud800 fox"] * 9))
    assert "\ufffd" in tokenizer.decode(range(len(tokenizer)))


def test_two_processes_train_a_bpe_once(cfg, monkeypatch):
    train_bpe, trained, found = tokenizer_module.train_bpe, [], []

    def train_slowly(*args):
        trained.append(args)
        time.sleep(0.2)
        return train_bpe(*args)

    monkeypatch.setattr(tokenizer_module, "train_bpe", train_slowly)
    threads = [threading.Thread(target=lambda: found.append(load_tokenizer(cfg))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1 and found[0].get_vocab() == found[1].get_vocab()


def test_what_a_killed_process_left_is_not_taken_for_a_tokenizer(cfg, monkeypatch):
    def stop(tokenizer, folder):
        (folder / "tokenizer.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizer_module, "save", stop)
        load_tokenizer(cfg)
    assert len(load_tokenizer(cfg)) == 300
    assert not list(Path("cache/tokenizers").glob(".*.tmp"))


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b.replace(b"fox", b"fax", 1)])
def test_a_damaged_cached_tokenizer_names_the_folder_to_delete(cfg, damage):
    expected = load_tokenizer(cfg, "c", lambda: iter(["a fox"] * 9)).get_vocab()
    (file,) = Path("cache/tokenizers").glob("*/tokenizer.json")
    file.write_bytes(damage(file.read_bytes()))
    message = f"tokenizer bpe-300 in {file.parent} is damaged; delete {file.parent} to create"
    with pytest.raises(UserError, match=message):
        load_tokenizer(cfg, "c", lambda: iter(["a fox"] * 9))
    shutil.rmtree(file.parent)
    assert load_tokenizer(cfg, "c", lambda: iter(["a fox"] * 9)).get_vocab() == expected


def test_the_tokenizer_of_a_run_comes_from_the_run(cfg):
    load_tokenizer(cfg, "one", lambda: iter(["a fox"] * 9)).save_pretrained("saved")
    expected = transformers.AutoTokenizer.from_pretrained("saved").get_vocab()
    cfg.tokenizer = "somebody/other"
    assert load_tokenizer(cfg, saved=Path("saved")).get_vocab() == expected


def test_a_damaged_tokenizer_of_a_run_is_not_replaced(cfg):
    load_tokenizer(cfg).save_pretrained("saved")
    Path("saved/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="bpe-300 from saved: .*; restore the original folder"):
        load_tokenizer(cfg, saved=Path("saved"))


@pytest.mark.parametrize("name", ["folder", "./folder", "/a/folder", "~/folder", "my/own/folder"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_name_is_refused(cfg, name):
    cfg.tokenizer = name
    with pytest.raises(UserError, match=f"{name} is neither a folder nor a hub name OWNER/NAME"):
        load_tokenizer(cfg)


def test_a_folder_without_a_tokenizer_is_refused(cfg):
    Path("empty").mkdir()
    cfg.tokenizer = "empty"
    with pytest.raises(UserError, match="empty: it has no tokenizer.json; correct --data.tokeniz"):
        load_tokenizer(cfg)


@pytest.mark.parametrize(
    "ids, message",
    [
        (range(300, 65_537), "large has 65537 entries, .* hold at most 65536; choose a smaller"),
        ([400], "large has 301 entries with ids up to 400, so some ids are unused; choose"),
    ],
    ids=["many", "gaps"],
)
def test_ids_that_do_not_fit_token_shards_are_refused(cfg, ids, message):
    load_tokenizer(cfg).save_pretrained("large")
    file = Path("large/tokenizer.json")
    config = json.loads(file.read_text())
    config["model"]["vocab"] |= {f"word {i}": i for i in ids}
    file.write_text(json.dumps(config))
    cfg.tokenizer = "large"
    with pytest.raises(UserError, match=message):
        load_tokenizer(cfg)


def test_a_tokenizer_with_code_is_refused(cfg):
    load_tokenizer(cfg).save_pretrained("coded")
    file = Path("coded/tokenizer_config.json")
    config = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, "code.Tokens"]}}
    file.write_text(json.dumps(config))
    Path("coded/code.py").write_text("open('ran', 'w')")
    cfg.tokenizer = "coded"
    with pytest.raises(UserError, match="coded comes with code .*, which is never run"):
        load_tokenizer(cfg)
    assert not Path("ran").exists()


def test_a_tokenizer_without_an_end_of_text_token_is_refused(cfg):
    tokenizer = load_tokenizer(cfg)
    tokenizer.eos_token = None
    tokenizer.save_pretrained("no-eos")
    cfg.tokenizer = "no-eos"
    with pytest.raises(UserError, match="no-eos needs a tokenizer.json and an eos or bos token"):
        load_tokenizer(cfg)


# ---- subwords
@pytest.mark.parametrize("space", ["\u0120", "\u2581"])
def test_subwords_ignore_how_the_space_is_written(space):
    assert subwords(f"{space}walking") == WALKING | {CASE["a space before, lowercase"]}


def test_subwords_of_a_word_without_a_space_differ_only_in_case():
    assert subwords("walking") == WALKING | {CASE["lowercase"]}


def test_subwords_of_a_capitalized_word_differ_only_in_case():
    assert subwords("\u0120Walking") & subwords("\u0120walking") == WALKING


def test_subwords_of_a_space_are_the_empty_word():
    assert subwords("\u0120") == {"=", "case (True, False, False, False, False)"}


def test_subwords_mark_digits():
    assert CASE["a digit"] in subwords("7")


def test_token_subwords_list_every_subword_of_every_entry(cfg):
    tokenizer = load_tokenizer(cfg)
    entries = [subwords(token) for token in tokenizer.convert_ids_to_tokens(range(300))]
    table = token_subwords(tokenizer, 10**6, 10)
    assert table.shape == (300, 10) and table.dtype == torch.int32
    assert (table >= 0).sum(1).tolist() == [len(entry) for entry in entries]


def test_token_subwords_are_limited_to_the_most_common(cfg):
    tokenizer = load_tokenizer(cfg)
    entries = [subwords(token) for token in tokenizer.convert_ids_to_tokens(range(300))]
    table = token_subwords(tokenizer, 20, 10)
    assert table.max() == 19
    sizes = [(table == i).any(1).sum().item() for i in range(20)]
    assert sizes == sorted(sizes, reverse=True)
    largest = max(sum(subword in entry for entry in entries) for subword in set.union(*entries))
    assert sizes[0] == largest


def test_token_subwords_number_one_set_of_entries_per_subword(cfg):
    tokenizer = load_tokenizer(cfg)
    entries = [subwords(token) for token in tokenizer.convert_ids_to_tokens(range(300))]
    has_first = (token_subwords(tokenizer, 20, 10) == 0).any(1).tolist()
    expected = [[subword in entry for entry in entries] for subword in set.union(*entries)]
    assert has_first in expected
