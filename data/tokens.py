"""Training tokens that another process may still be preparing, and batches of them.

Training starts when the validation set and the first block of training tokens are on disk. The
order of windows is permuted within blocks, so it does not depend on how far preparation is.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from tqdm import tqdm

from common.config import Interrupted, UserError, first_line
from data.order import BLOCK_TOKENS, batch_indices, prefetch, read_ahead
from data.source import digest
from data.text import (
    DataConfig,
    Tokens,
    prepare_splits,
    print_notes,
    read_manifest,
    token_folder,
    token_request,
)

POLL_SECONDS = 0.05  # between two looks at what another process has prepared
GRACE_SECONDS = 20.0  # for preparation to end after a signal: a few batches of documents


# ---- the process that prepares
class Preparation:
    """A process that prepares both splits. It ends when this process does, for any reason, and
    keeps what it has.
    """

    def __init__(self, cfg: DataConfig, tokens: int, tokenizer, first: int):
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=prepare_beside, args=(theirs,), daemon=True)
        with without_main_module(), without_terminal_signals():
            self.process.start()
        theirs.close()
        self.error = None
        job = pickle.dumps((cfg, tokens, tokenizer, first))
        # in a thread, because the process first imports for seconds and a pipe holds only 64 KiB
        threading.Thread(target=self.send, args=(job,), daemon=True).start()

    def send(self, job: bytes) -> None:
        with suppress(OSError):  # check() reports that the process has ended
            self.connection.send_bytes(job)

    def check(self) -> bool:
        """Whether it is still running. Raises UserError if it failed."""
        code = self.process.exitcode
        if code and self.error is None:
            try:
                self.error = self.connection.recv()
            except (EOFError, OSError):
                how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
                self.error = (
                    f"the process that prepares the data {how}; check that there is enough memory, "
                    "then start again (prepared data is kept)"
                )
        if code:
            raise UserError(self.error)
        return code is None


@contextmanager
def without_main_module() -> Iterator[None]:
    """Keep a process that is spawned in this context from importing the main script."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def without_terminal_signals() -> Iterator[None]:
    """Block SIGINT and SIGHUP, which a terminal sends to all processes, in a process that is
    spawned in this context; its parent decides.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # by itself it would start in here and unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_beside(connection) -> None:
    """Main function of the process that prepares.

    Sends the message of an error and exits with code 2; after SIGTERM, exits with 128 + SIGTERM.
    """
    code = 128 + signal.SIGTERM
    try:
        signal.signal(signal.SIGTERM, end_soon)
        threading.Thread(target=end_with_parent, daemon=True).start()
        if hasattr(os, "nice"):
            os.nice(10)  # training comes first
        tqdm.set_lock(threading.RLock())  # os._exit would leak the semaphore in its own lock
        cfg, tokens, tokenizer, first = pickle.loads(connection.recv_bytes())
        wanted = {"val": cfg.val_tokens, "train": tokens}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            tempfile.tempdir = folder  # also for the thread that reads
            prepare_splits(cfg, wanted, tokenizer, first, read=read_ahead)
        code = 0
    except Interrupted:
        pass
    except Exception as error:
        message = str(error)
        if not isinstance(error, UserError):
            message = (
                f"preparing the data failed ({type(error).__name__}: {first_line(error)}); start "
                "again (prepared data is kept)"
            )
        connection.send(message)
        code = 2
    finally:
        # Python's own exit crashes if the thread that reads is in a library just then
        os._exit(code)


def end_soon(number: int, frame) -> None:
    """Signal handler: raises Interrupted, and exits if that has no effect."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, [128 + number])
    timer.daemon = True
    timer.start()
    raise Interrupted(number)


def end_with_parent() -> None:
    """Send this process SIGTERM when its parent ends, even if that was killed."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


# ---- prepared tokens
class TrainingTokens(Tokens):
    """First `limit` tokens of a folder that may still be growing; len() is what there is now.

    `preparation` is the process that prepares them, None if that is another run's or has finished.
    Raises UserError if the source has no training tokens or a shard is damaged.
    """

    def __init__(self, folder: Path, limit: int, preparation: Preparation | None, notes: bool):
        super().__init__(folder, limit)
        self.preparation, self.notes = preparation, notes
        self.lock, self.seen, self.complete = threading.Lock(), None, False
        self.refresh()

    def refresh(self) -> None:
        """Map what has been prepared since the last call. Raises UserError if preparation failed.

        Costs microseconds if nothing has changed.
        """
        with self.lock:  # training and the thread that reads ahead
            if self.complete:
                return
            if self.preparation is not None:
                self.preparation.check()
            stat = (self.folder / "manifest.json").stat()
            if self.seen == (stat.st_mtime_ns, stat.st_ino):
                return
            manifest = read_manifest(self.folder)
            self.map_shards(manifest)
            self.seen = stat.st_mtime_ns, stat.st_ino
            self.complete = manifest["complete"] or len(self) == self.limit
            if self.complete and self.notes:
                print_notes(manifest)

    def wait_for(self, n: int) -> None:
        """Wait until there are n tokens or the source has ended. Raises UserError."""
        self.refresh()
        while len(self) < n and not self.complete:
            time.sleep(POLL_SECONDS)
            self.refresh()

    @property
    def sha256(self) -> str:
        """Hash of all tokens up to the limit as little-endian uint16; waits for them."""
        self.wait_for(self.limit)
        return super().sha256


def open_tokens(
    cfg: DataConfig, tokens: int, tokenizer, prepare: bool = True
) -> tuple[Tokens, TrainingTokens]:
    """Validation tokens and the first `tokens` training tokens.

    Returns when the validation set and the first block of training tokens are on disk; a process of
    its own prepares the rest. If one block is all that is needed, this process prepares it. With
    `prepare` false, waits for what another process prepares. Raises UserError.
    """
    first = min(tokens, BLOCK_TOKENS + 1)
    folders = Folders(cfg, tokenizer)
    preparation = None
    if prepare and not folders.have(tokens):
        if tokens <= first:
            prepare_splits(cfg, {"val": cfg.val_tokens, "train": tokens}, tokenizer)
        else:
            preparation = Preparation(cfg, tokens, tokenizer, first)
    while not folders.have(first):
        if preparation is not None and not preparation.check():
            assert folders.have(first), f"{folders.val} and {folders.train} are not prepared"
        time.sleep(POLL_SECONDS)
    if prepare:
        print_notes(read_manifest(folders.val))
    val = Tokens(folders.val)
    return val, TrainingTokens(folders.train, tokens, preparation, notes=prepare)


class Folders:
    """The folders of both splits. `train` is None until `val` is prepared, because its name depends
    on the documents in data.val_source.
    """

    def __init__(self, cfg: DataConfig, tokenizer):
        self.cfg, self.tokenizer_hash = cfg, digest(tokenizer.backend_tokenizer.to_str())
        self.val = token_folder(cfg, token_request(cfg, "val", self.tokenizer_hash))
        self.train = None

    def have(self, tokens: int) -> bool:
        """Whether the validation set and `tokens` training tokens, or all of a source, are on disk.

        Raises UserError.
        """
        if not has_tokens(self.val, self.cfg.val_tokens):
            return False
        if self.train is None:
            excluded = read_manifest(self.val)["keys"] if self.cfg.val_source is not None else None
            request = token_request(self.cfg, "train", self.tokenizer_hash, excluded)
            self.train = token_folder(self.cfg, request)
        return has_tokens(self.train, tokens)


def has_tokens(folder: Path, n: int) -> bool:
    """Whether a folder holds n tokens, or all of its source. Raises UserError."""
    manifest = read_manifest(folder)
    return manifest is not None and (manifest["complete"] or manifest["tokens"] >= n)


# ---- batches
def training_windows(train: TrainingTokens, needed: int, seq_len: int, allow_repeat: bool) -> int:
    """Number of windows in an epoch: `needed`, or all that the source has if it has fewer; while
    that is not known, it is assumed to have enough. Raises UserError.
    """
    if not train.complete:
        return needed
    n_windows = min((len(train) - 1) // seq_len, needed)
    if n_windows < 1:
        raise UserError(
            f"the training split has only {len(train)} tokens, but one sequence needs "
            f"{seq_len + 1}; add data or lower --model.seq_len"
        )
    if needed > n_windows and not allow_repeat:
        raise UserError(
            f"--tokens is {train.limit - 1}, but the training split has only {len(train)} tokens; "
            f"set --tokens {n_windows * seq_len}, add data, or pass --allow_repeat to train for "
            f"{needed / n_windows:.1f} epochs"
        )
    return n_windows


def block_windows(seq_len: int) -> int:
    """Number of windows in a block, within which they are permuted."""
    return max(1, BLOCK_TOKENS // seq_len)


def covered(train: TrainingTokens, step: int, *, batch: int, seq_len: int) -> int:
    """Number of tokens up to the end of the last block that the first `step` steps use.

    Waits for them. Does not depend on how far preparation is. Raises UserError.
    """
    block = block_windows(seq_len)
    n_blocks = -(-step * batch // block)
    end = min(n_blocks * block * seq_len + 1, train.limit) if step else 0
    train.wait_for(end)
    return min(end, len(train))


def token_batches(
    train: TrainingTokens,
    first: int,
    steps: int,
    *,
    batch: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    allow_repeat: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Tensor]:
    """This rank's windows (batch / ranks, seq_len + 1) on the device for steps first to steps - 1.

    Waits for the block that a step needs. Raises UserError if preparation fails, or as soon as it
    is known that the source has too few tokens for an epoch of all steps and `allow_repeat` is
    false.
    """
    assert batch % ranks == 0, f"batch {batch} is not divisible by {ranks} ranks"
    share = batch // ranks

    def read(step: int) -> Tensor:
        covered(train, step + 1, batch=batch, seq_len=seq_len)
        n_windows = training_windows(train, steps * batch, seq_len, allow_repeat)
        indices = batch_indices(step, batch, n_windows, seed, block_windows(seq_len))
        windows = train.windows(indices[rank * share : (rank + 1) * share], seq_len)
        return windows.pin_memory() if device.type == "cuda" else windows

    ready = prefetch(read, first, steps, device)
    return (windows.to(device, non_blocking=True) for windows in ready)
