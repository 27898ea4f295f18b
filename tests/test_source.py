import itertools
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from helpers import sentences, write_jsonl

from common.config import UserError
from data.source import (
    digest,
    documents,
    file_sha256,
    first_line,
    hub_revisions,
    in_validation,
    local_files,
)


def texts(source, n: int | None = None, column: str = "text") -> list[str]:
    """The first n texts of a source, all by default."""
    return [record[column] for record in itertools.islice(documents(source, column, {}), n)]


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


def test_records_are_shuffled_in_a_fixed_order(workdir):
    first = texts("corpus.jsonl")
    assert first == texts("corpus.jsonl")
    assert first != sentences(300)
    assert sorted(first) == sorted(sentences(300))


def test_blank_and_missing_texts_are_skipped(workdir):
    records = [{"text": " \n"}, {"text": None}, {"text": "words"}]
    Path("gaps.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert texts("gaps.jsonl") == ["words"]


@pytest.mark.parametrize(
    "source, content, message",
    [
        ("missing.parquet", None, "missing.parquet matches no"),
        ("nowhere/*.txt", None, r"nowhere/\*.txt matches no"),
        ("./nothing", None, "./nothing matches no"),
        ("picture.png", b"x", "files of type .png; use files of one type"),
        ("bad.jsonl", b"", "cannot read data source bad.jsonl"),
        ("bad.jsonl", b'{"title": "x"}\n', "no column 'text', only title; set --data.text_column"),
        ("bad.jsonl", b'{"text": 5}\n', "holds int, not text"),
        ("bad.jsonl", b"\xff\xfe\x00rubbish", "cannot read data source bad.jsonl"),
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


def test_a_folder_of_mixed_file_types_is_refused(workdir):
    Path("mixed").mkdir()
    Path("mixed/a.txt").write_text("x")
    Path("mixed/b.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UserError, match="files of type .jsonl, .txt"):
        local_files("mixed")


def test_a_hub_name_has_no_local_files(workdir):
    assert local_files("some/dataset:part") == []


def test_files_of_a_folder_are_found_at_any_depth_in_sorted_order(workdir):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/README.md"):
        Path("texts", name).parent.mkdir(parents=True, exist_ok=True)
        Path("texts", name).write_text(name)
    assert local_files("texts") == ["texts/a.txt", "texts/b.txt", "texts/sub/c.txt"]


def test_hub_revision_is_that_of_the_dataset_without_its_config(monkeypatch):
    class Info:
        def __init__(self, name):
            self.sha = f"sha of {name}"

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: Info(name))
    assert hub_revisions(["some/set:part"]) == {"some/set:part": "sha of some/set"}


def test_an_unreachable_hub_is_reported_with_the_alternatives(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    message = r"some/set on the hub: no route to host; .*parquet.*configs/\*_demo.yaml"
    with pytest.raises(UserError, match=message):
        hub_revisions(["some/set"])


def test_validation_fraction_is_met_approximately():
    assert 30 < sum(in_validation({"text": text}, 0.2) for text in sentences(300)) < 90


def test_validation_choice_depends_only_on_the_content():
    small = [text for text in sentences(300) if in_validation({"text": text}, 0.1)]
    large = [text for text in sentences(300) if in_validation({"body": text}, 0.3)]
    assert set(small) < set(large)  # a larger fraction adds records and moves none


def test_validation_choice_of_ids_does_not_depend_on_their_container():
    ids = [list(range(i, i + 20)) for i in range(100)]
    as_lists = [in_validation({"input_ids": x}, 0.5) for x in ids]
    as_arrays = [in_validation({"input_ids": np.array(x, np.uint16)}, 0.5) for x in ids]
    assert as_lists == as_arrays
    assert 20 < sum(as_lists) < 80


def test_digest_of_a_dict_does_not_depend_on_key_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_file_sha256_is_that_of_the_bytes(workdir):
    Path("x").write_bytes(b"abc")
    assert file_sha256(Path("x")).startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize(
    "message, line", [("\none\ntwo", "one"), ("one.\ntwo", "one"), ("", "ValueError")]
)
def test_first_line_of_an_error(message, line):
    assert first_line(ValueError(message)) == line
