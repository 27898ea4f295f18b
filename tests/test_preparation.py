"""Training that starts with the first block while another process prepares the rest."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, losses, script, sentences, train, weights, write_jsonl

from common.config import UserError
from common.disk import locked
from common.run import checkpoints
from data import text, tokens
from data.text import DataConfig, Tokens, prepare_splits, prepare_tokens
from data.tokenizer import load_tokenizer
from data.tokens import covered, open_tokens, token_batches, training_windows

EVERYTHING = 10**9
BLOCK = 1024
CPU = torch.device("cpu")
SHAPE = {"batch": 8, "seq_len": 32, "seed": 3, "device": CPU}
N_TOKENS = 10_000  # in 10 blocks; the training split of corpus.jsonl has more


@pytest.fixture
def cfg(workdir, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", BLOCK)
    monkeypatch.setattr(tokens, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(text, "SHARD_TOKENS", BLOCK)
    monkeypatch.setattr(text, "BATCH_DOCUMENTS", 16)
    return DataConfig(source="corpus.jsonl", tokenizer="bpe-300", val_fraction=0.2, val_tokens=500)


@pytest.fixture
def tokenizer(cfg):
    return load_tokenizer(cfg)


class LazyPreparation:
    """Stands for the process that prepares: prepares one block more whenever it is asked."""

    process = None

    def __init__(self, cfg, tokens, tokenizer, first):
        self.cfg, self.wanted, self.tokenizer, self.n = cfg, tokens, tokenizer, first

    def check(self) -> bool:
        wanted = {"val": self.cfg.val_tokens, "train": min(self.n, self.wanted)}
        prepare_splits(self.cfg, wanted, self.tokenizer)
        self.n += BLOCK
        return True


@pytest.fixture
def lazy(monkeypatch):
    monkeypatch.setattr(tokens, "Preparation", LazyPreparation)


def prepared_before(cfg, tokenizer, n: int = N_TOKENS + 1):
    """Training tokens that were prepared before they are opened, in another cache."""
    before = DataConfig(**{**vars(cfg), "cache": "before"})
    wanted = {"val": cfg.val_tokens, "train": n}
    prepare_splits(before, wanted, tokenizer)
    train = open_tokens(before, n, tokenizer)[1]
    assert train.complete
    return train


def stacked(train, first: int, steps: int, **changes) -> torch.Tensor:
    return torch.stack(list(token_batches(train, first, steps, **SHAPE | changes)))


# ---- order
@pytest.mark.usefixtures("lazy")
def test_batches_do_not_depend_on_how_far_preparation_is(cfg, tokenizer):
    steps = N_TOKENS // (8 * 32)
    _, train = open_tokens(cfg, N_TOKENS + 1, tokenizer)
    assert len(train) < 3 * BLOCK
    batches = stacked(train, 0, steps)
    assert torch.equal(batches, stacked(prepared_before(cfg, tokenizer), 0, steps))


@pytest.mark.usefixtures("lazy")
def test_batches_of_a_resumed_run_are_the_same(cfg, tokenizer):
    steps, train = N_TOKENS // (8 * 32), prepared_before(cfg, tokenizer)
    _, resumed = open_tokens(cfg, N_TOKENS + 1, tokenizer)
    assert torch.equal(stacked(resumed, 20, steps), stacked(train, 0, steps)[20:])


@pytest.mark.usefixtures("lazy")
def test_the_first_steps_wait_only_for_the_first_block(cfg, tokenizer):
    _, train = open_tokens(cfg, N_TOKENS + 1, tokenizer)
    batches = token_batches(train, 0, N_TOKENS // (8 * 32), **SHAPE)
    first = next(batches)
    assert len(train) < 4 * BLOCK
    ids = train.window(0, BLOCK + 1)
    assert set(first[:, 0].tolist()) <= set(ids.tolist())


def test_ranks_divide_each_batch(cfg, tokenizer):
    train = prepared_before(cfg, tokenizer)
    whole = stacked(train, 0, 9)
    parts = [stacked(train, 0, 9, rank=rank, ranks=4) for rank in range(4)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 38, 39])
@pytest.mark.usefixtures("lazy")
def test_covered_tokens_reach_the_end_of_the_last_block_that_was_used(cfg, tokenizer, step):
    _, train = open_tokens(cfg, N_TOKENS + 1, tokenizer)
    n_blocks = -(-step * 8 * 32 // BLOCK)
    expected = min(n_blocks * BLOCK + 1, N_TOKENS + 1) if step else 0
    assert covered(train, step, batch=8, seq_len=32) == expected


@pytest.mark.usefixtures("lazy")
def test_hashes_of_prefixes_do_not_depend_on_how_far_preparation_is(cfg, tokenizer):
    _, train = open_tokens(cfg, N_TOKENS + 1, tokenizer)
    before = prepared_before(cfg, tokenizer)
    for n in (700, 5000, 300):
        train.wait_for(n)
        assert train.prefix_sha256(n) == before.prefix_sha256(n)
    assert train.sha256 == before.sha256


# ---- sources with too few tokens
def test_a_source_that_turns_out_short_is_repeated_as_if_that_was_known(
    cfg, tokenizer, monkeypatch
):
    before = prepared_before(cfg, tokenizer, EVERYTHING)
    monkeypatch.setattr(tokens, "Preparation", LazyPreparation)
    _, train = open_tokens(cfg, EVERYTHING, tokenizer)
    steps = 3 * len(before) // (8 * 32)
    batches = stacked(train, 0, steps, allow_repeat=True)
    assert torch.equal(batches, stacked(before, 0, steps, allow_repeat=True))


@pytest.mark.usefixtures("lazy")
def test_a_source_that_turns_out_short_is_an_error_as_soon_as_that_is_known(cfg, tokenizer):
    _, train = open_tokens(cfg, 10**6 + 1, tokenizer)
    batches = token_batches(train, 0, 10**6 // (8 * 32), **SHAPE)
    next(batches)
    prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    n = Tokens(train.folder).starts[-1]
    message = (
        rf"--tokens is 1000000, but the training split has only {n} tokens; set --tokens "
        rf"{(n - 1) // 32 * 32}, add data, or pass --allow_repeat to train for \d+.\d epochs"
    )
    with pytest.raises(UserError, match=message):
        next(batches)


def test_a_short_source_is_an_error_before_training_if_that_is_known(cfg, tokenizer):
    train = prepared_before(cfg, tokenizer, EVERYTHING)
    with pytest.raises(UserError, match="pass --allow_repeat"):
        training_windows(train, len(train) // 32 + 1, 32, allow_repeat=False)


def test_fewer_tokens_than_one_sequence_are_an_error_even_with_repeats(cfg, tokenizer):
    train = prepared_before(cfg, tokenizer, EVERYTHING)
    with pytest.raises(UserError, match=rf"only {len(train)} tokens, but one sequence needs"):
        training_windows(train, 1, len(train), allow_repeat=True)


@pytest.mark.usefixtures("lazy")

# ---- without another process
def no_process(*args):
    raise AssertionError("a process was started")


@pytest.mark.parametrize("val_source", [None, "other.jsonl"])
def test_one_block_is_prepared_without_another_process(cfg, tokenizer, monkeypatch, val_source):
    write_jsonl("other.jsonl", sentences(40, seed=1))
    cfg.val_source = val_source
    monkeypatch.setattr(tokens, "Preparation", no_process)
    val, train = open_tokens(cfg, BLOCK + 1, tokenizer)
    assert len(val) >= 500
    assert len(train) == BLOCK + 1
    assert train.complete


def test_prepared_tokens_are_used_while_another_process_extends_them(cfg, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "Preparation", no_process)
    train = prepared_before(cfg, tokenizer)
    with locked(Path("before") / train.folder.name):
        assert train.sha256 == prepared_before_again(cfg, tokenizer).sha256


def prepared_before_again(cfg, tokenizer):
    again = DataConfig(**{**vars(cfg), "cache": "before"})
    return open_tokens(again, N_TOKENS + 1, tokenizer)[1]


def test_other_ranks_take_no_lock(cfg, tokenizer):
    prepare_splits(cfg, {"val": 500, "train": 3 * BLOCK}, tokenizer)
    (folder,) = Path("cache/tokens").glob("train-*")
    with locked(Path("cache") / folder.name):
        _, train = open_tokens(cfg, N_TOKENS + 1, tokenizer, prepare=False)
    assert not train.complete
    assert train.preparation is None


@pytest.mark.usefixtures("lazy")
def test_what_is_skipped_is_printed_once_when_preparation_is_complete(cfg, tokenizer, capsys):
    with open("corpus.jsonl", "a") as file:
        file.write('{"text": " "}\n')
    _, train = open_tokens(cfg, EVERYTHING, tokenizer)
    assert "train data" not in capsys.readouterr().out
    for _ in range(2):
        assert train.sha256
    assert capsys.readouterr().out.count("train data: skipped 1 document without text") == 1


# ---- the process that prepares
def small_process(*args):
    text.SHARD_TOKENS, text.BATCH_DOCUMENTS = BLOCK, 16
    real_process(*args)


def after_three_blocks(action, *args):
    """Prepare; from the end of the third block on, call action() after each batch."""
    add_tokens = text.add_tokens

    def patched(work, tokenizer):
        add_tokens(work, tokenizer)
        if work[-1][0].n_tokens > 3 * BLOCK:
            action()

    text.add_tokens = patched
    small_process(*args)


def stalled_process(*args):
    after_three_blocks(lambda: time.sleep(5), *args)


def fail():
    raise UserError("the hub is gone; try again")


def failing_process(*args):
    after_three_blocks(fail, *args)


real_process = tokens.prepare_beside


def test_a_killed_preparation_is_one_line_and_its_tokens_are_kept(cfg, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "prepare_beside", stalled_process)
    _, train = open_tokens(cfg, N_TOKENS + 1, tokenizer)
    batches = token_batches(train, 0, N_TOKENS // (8 * 32), **SHAPE)
    next(batches)
    train.preparation.process.kill()
    with pytest.raises(UserError, match="that prepares the data was killed by signal 9; check"):
        list(batches)
    first = (train.folder / "00000.bin").stat().st_mtime_ns
    prepare_splits(cfg, {"val": 500, "train": N_TOKENS + 1}, tokenizer)
    assert (train.folder / "00000.bin").stat().st_mtime_ns == first
    again = Tokens(train.folder, limit=N_TOKENS + 1)
    assert again.sha256 == prepared_before(cfg, tokenizer).sha256


def test_an_error_of_the_preparation_reaches_training_as_one_line(
    cfg, tokenizer, monkeypatch, capfd
):
    monkeypatch.setattr(tokens, "prepare_beside", failing_process)
    _, train = open_tokens(cfg, N_TOKENS + 1, tokenizer)
    with pytest.raises(UserError, match="^the hub is gone; try again$"):
        list(token_batches(train, 0, N_TOKENS // (8 * 32), **SHAPE))
    assert capfd.readouterr().err == ""


KILLED = """
import os, signal
from data import tokens
from data.text import DataConfig
from data.tokenizer import load_tokenizer
from test_preparation import BLOCK, N_TOKENS, stalled_process
tokens.prepare_beside, tokens.BLOCK_TOKENS = stalled_process, BLOCK
cfg = DataConfig(source="corpus.jsonl", tokenizer="bpe-300", val_fraction=0.2, val_tokens=500)
tokens.open_tokens(cfg, N_TOKENS + 1, load_tokenizer(cfg))[1].wait_for(3 * BLOCK)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_preparation_ends_when_training_is_killed(cfg):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    code = f"import sys; sys.path[:0] = {paths.split(os.pathsep)}\n{KILLED}"
    done = script("-c", code)  # returns when both have closed their standard output
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    (folder,) = Path("cache/tokens").glob("train-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert 3 * BLOCK < manifest["tokens"] < N_TOKENS
    assert list(Path("cache").rglob("*.tmp")) == []


def test_a_run_whose_preparation_waits_for_another_starts_with_the_first_block(
    cfg, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokens, "prepare_beside", small_process)
    prepare_splits(cfg, {"val": 500, "train": 2 * BLOCK}, tokenizer)
    (folder,) = Path("cache/tokens").glob("train-*")
    with locked(Path("cache") / folder.name):
        _, train = open_tokens(cfg, N_TOKENS + 1, tokenizer)
        batches = token_batches(train, 0, N_TOKENS // (8 * 32), **SHAPE)
        first = next(batches)
        assert not train.complete
    rest = list(batches)
    expected = stacked(prepared_before(cfg, tokenizer), 0, N_TOKENS // (8 * 32))
    assert torch.equal(torch.stack([first, *rest]), expected)


# ---- training
@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_resumed_over_the_end_of_a_block_is_bit_identical(cfg, dtype):
    """Of 10 blocks of 8 steps; the resumed run continues at step 44, while data are prepared."""
    settings = {"tokens": 10_240, "dtype": dtype, "eval_every": 0.5, "save_every": 0.55}
    train(run="whole", data__cache="before", **settings)
    train(run="a", **settings)
    Path("runs/a/summary.json").unlink()
    shutil.rmtree(checkpoints(Path("runs/a"))[-1])
    shutil.rmtree("cache/tokens")
    train(run="a", resume="true", **settings)
    assert losses("a") == losses("whole")
    for name, weight in weights("whole").items():
        assert torch.equal(weights("a")[name], weight), name
    summaries = (json.loads(Path(f"runs/{run}/summary.json").read_text()) for run in ("a", "whole"))
    first, second = (summary["train_sha256"] for summary in summaries)
    assert first == second


# ---- one pass over the source
@pytest.fixture
def reads(monkeypatch):
    """Numbers of the documents of the source that were read, in order."""

    def counted(*args):
        for i, record in enumerate(documents(*args)):
            read.append(i)
            yield record

    documents, read = text.documents, []
    monkeypatch.setattr(text, "documents", counted)
    return read


def test_one_pass_over_a_source_prepares_both_splits(cfg, tokenizer, reads):
    open_tokens(cfg, BLOCK + 1, tokenizer)
    assert reads == list(range(len(reads)))
    assert len(reads) < 300


def test_both_splits_in_one_pass_are_those_of_a_pass_for_each(cfg, tokenizer):
    both = prepare_splits(cfg, {"val": 500, "train": 3000}, tokenizer)
    cfg.cache = "elsewhere"
    for split, n in (("train", 3000), ("val", 500)):
        alone = prepare_tokens(cfg, split, n, tokenizer)
        assert Tokens(both[split]).sha256 == Tokens(alone).sha256


def test_a_pass_that_extends_one_split_leaves_the_other_as_it_is(cfg, tokenizer):
    before = prepare_splits(cfg, {"val": 500, "train": 500}, tokenizer)
    files = {path: path.read_bytes() for path in before["val"].iterdir()}
    prepare_splits(cfg, {"val": 500, "train": 5000}, tokenizer)
    assert {path: path.read_bytes() for path in before["val"].iterdir()} == files


@pytest.mark.parametrize("n_val, n_train", [(2000, 100), (100, 8000)])
def test_a_pass_from_different_positions_gives_the_same_tokens(cfg, tokenizer, n_val, n_train):
    prepare_tokens(cfg, "val", n_val, tokenizer)
    prepare_tokens(cfg, "train", n_train, tokenizer)
    folders = prepare_splits(cfg, {"val": EVERYTHING, "train": EVERYTHING}, tokenizer)
    cfg.cache = "elsewhere"
    whole = prepare_splits(cfg, {"val": EVERYTHING, "train": EVERYTHING}, tokenizer)
    for split, folder in folders.items():
        assert Tokens(folder).sha256 == Tokens(whole[split]).sha256


class Stopped(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("after", [3, 9, 15])
def test_an_interrupted_pass_resumes_with_the_same_tokens(cfg, tokenizer, monkeypatch, after):
    def interrupted(*args):
        calls.append(1)
        if len(calls) > after:
            raise Stopped
        add_tokens(*args)

    add_tokens, calls = text.add_tokens, []
    wanted = {"val": 1500, "train": N_TOKENS}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(text, "add_tokens", interrupted)
        prepare_splits(cfg, wanted, tokenizer, first=BLOCK)
    folders = prepare_splits(cfg, wanted, tokenizer, first=BLOCK)
    cfg.cache = "elsewhere"
    for split, folder in prepare_splits(cfg, wanted, tokenizer).items():
        assert Tokens(folders[split]).sha256 == Tokens(folder).sha256


def test_validation_comes_before_the_second_block(cfg, tokenizer, monkeypatch):
    def recorded(folder, batches, manifest):
        save_shard(folder, batches, manifest)
        saved.append((manifest["request"]["split"], len(manifest["shards"])))

    save_shard, saved = text.save_shard, []
    monkeypatch.setattr(text, "save_shard", recorded)
    prepare_splits(cfg, {"val": 2000, "train": N_TOKENS}, tokenizer, first=BLOCK + 1)
    assert saved.index(("val", 2)) < saved.index(("train", 2))


def test_a_signal_while_a_shard_is_saved_leaves_no_temporary_file(cfg, tokenizer, monkeypatch):
    def signalled(path):
        signal.raise_signal(signal.SIGINT)
        return file_sha256(path)

    file_sha256 = text.file_sha256
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(text, "file_sha256", signalled)
        prepare_tokens(cfg, "train", EVERYTHING, tokenizer)
    (folder,) = Path("cache/tokens").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["00000.bin", "manifest.json"]
    assert len(Tokens(folder)) > BLOCK


def test_the_order_of_tokens_does_not_depend_on_what_waits(cfg, tokenizer, monkeypatch):
    whole = prepared_before(cfg, tokenizer, EVERYTHING)
    cfg.val_tokens, sizes = EVERYTHING, []
    for held in (0, 3000, EVERYTHING):
        monkeypatch.setattr(text, "HELD_CHARACTERS", held)
        cfg.cache = f"held-{held}"
        found = prepare_splits(cfg, {"val": 10**9, "train": 10**9}, tokenizer, first=BLOCK)
        assert np.array_equal(
            Tokens(found["train"]).window(0, len(whole)), whole.window(0, len(whole))
        )
        sizes.append(Tokens(found["val"]).sha256)
    assert len(set(sizes)) == 1
