"""Files on disk: complete or absent, locked while they are written, and known by their hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from common.config import UserError

PATIENCE = 20.0  # seconds to wait for another process that builds the same folder


# ---- writing
def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file completely or not at all. Raises UserError if the disk is full."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with tmp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}; free disk space or fix the permissions"
        ) from error


@contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Convert errors from writing `path` in the cache into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path}: {error.strerror or error}; free disk space, "
            "fix the permissions or set another --data.cache, then start again"
        ) from error


# ---- folders of the cache
@contextmanager
def locked(path: Path, patience: float = -1) -> Iterator[None]:
    """Hold a lock on a file or folder in the cache; waits while another process holds it.

    If `patience` is not negative, continues without the lock after that many seconds. The lock file
    is .NAME.lock next to `path`. The operating system releases the lock when the process ends for
    any reason, so a lock file left on disk never blocks another process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that is preparing {path}", flush=True)
        with suppress(Timeout):
            lock.acquire(timeout=patience)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def building(folder: Path) -> Iterator[Path | None]:
    """A temporary folder to fill, which then becomes `folder`; None if `folder` exists.

    `folder` is complete or absent. If two processes build it at the same time, the second waits; if
    the wait exceeds PATIENCE, for example because the first is suspended, it builds the folder too.
    """
    if folder.is_dir():
        yield None
        return
    with locked(folder, PATIENCE):
        if folder.is_dir():
            yield None
            return
        remove_abandoned(folder)
        tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            tmp.mkdir()
            yield tmp
            with suppress(OSError):  # another process has built it in the meantime
                tmp.rename(folder)
            assert folder.is_dir(), f"{tmp} could not be renamed"
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove temporary folders that processes left when they died while building `folder`."""
    for tmp in folder.parent.glob(f".{folder.name}.*.tmp"):
        try:
            os.kill(int(tmp.name.split(".")[-2]), 0)  # signal 0 only checks that it is alive
        except ProcessLookupError:
            shutil.rmtree(tmp, ignore_errors=True)


# ---- hashes
def sha256_of(value) -> str:
    """Hex sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
