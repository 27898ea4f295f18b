"""The Hugging Face hub: downloads with retries, and a specific error message for each failure.

Only this module uses the network. A request that fails with a transient error is retried in the
HTTP client, below the hub's libraries, so that they keep their position in a file or a stream.
"""

import itertools
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx2
import huggingface_hub
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from common.config import UserError, first_line

SHUFFLE_BUFFER = 10_000  # records in a stream's shuffle buffer; corpora are sorted by origin
STREAM_BATCH = 100  # records read at a time: few, so that the first ones arrive quickly
MAX_WAIT = 16.0  # seconds between two attempts, unless the hub asks for more
TRANSIENT_ERRORS = (
    httpx2.TimeoutException,
    httpx2.NetworkError,
    httpx2.RemoteProtocolError,
    httpx2.ProxyError,
    httpx2.DecodingError,
    json.JSONDecodeError,  # a truncated response
)
TOKENIZER_FILES = [
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
]
LOG_IN = "log in (`hf auth login`, or set HF_TOKEN)"
ALTERNATIVES = {
    "data source": "use local files ('folder/*.parquet') or a config that downloads nothing "
    "(configs/*_demo.yaml)",
    "tokenizer": "set --data.tokenizer to a local folder with tokenizer.json, or to bpe-8192 to "
    "train one",
}
T = TypeVar("T")


# ---- retries
def retrying(action: Callable[[], T], what: str, seconds: float) -> T:
    """The result of action(), retried while it fails with transient errors.

    Uses exponential backoff with jitter, and waits at least as long as the hub asks. Each retry
    prints a line. Raises the last error if it is not transient, after `seconds` of failures, or at
    once if the hub asks for a wait beyond that.
    """
    deadline = None
    for attempt in itertools.count(1):
        try:
            return action()
        except Exception as error:
            now = time.monotonic()
            deadline = now + seconds if deadline is None else deadline
            asked = requested_wait(error)
            if not is_transient(error) or now + asked >= deadline:
                raise
            # SystemRandom leaves the seeded generator of `random` alone
            backoff = min(MAX_WAIT, 2 ** (attempt - 1)) * random.SystemRandom().uniform(0.5, 1)
            wait = max(asked, min(backoff, deadline - now))
            reason = describe(error)
        line = f"hub: {reason} for {what}; retrying in {wait:.1f} s (attempt {attempt + 1})"
        print(line, flush=True)
        time.sleep(wait)


def hub_cause(error: Exception) -> Exception:
    """The error of the hub client that caused an error, or the error itself."""
    link = error
    while link is not None and not isinstance(link, UserError):  # a UserError was already retried
        if isinstance(link, httpx2.HTTPError | OfflineModeIsEnabled):
            return link
        link = link.__cause__
    return error


def http_status(error: Exception) -> int | None:
    """The HTTP status code of an error, None if there was no response."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def is_transient(error: Exception) -> bool:
    """Whether a request that failed like this may succeed later."""
    error = hub_cause(error)
    status = http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    # the hub client's message for a file of the wrong size
    return isinstance(error, TRANSIENT_ERRORS) or "Consistency check failed" in str(error)


def requested_wait(error: Exception) -> float:
    """Seconds that the hub asks clients to wait before the next request, 0 if it does not say."""
    response = getattr(hub_cause(error), "response", None)
    if response is None:
        return 0.0
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    seconds = response.headers.get("Retry-After", "")
    return float(seconds) if seconds.isdigit() else 0.0


def describe(error: Exception) -> str:
    """What went wrong with a request, in a few words and without a URL."""
    error = hub_cause(error)
    if http_status(error) is not None:
        return f"{error.response.status_code} {error.response.reason_phrase}".strip()
    if isinstance(error, httpx2.TimeoutException):
        return f"no response within {constants.HF_HUB_DOWNLOAD_TIMEOUT} s"
    if isinstance(error, json.JSONDecodeError):
        return "incomplete response"
    return first_line(error)


class HubClient(httpx2.Client):
    """HTTP client of the hub's libraries, with finite timeouts and retries for each request.

    A request that keeps failing for `seconds` raises UserError, which the libraries neither retry
    nor mistake for a missing file.
    """

    seconds = 60.0

    def send(self, request: httpx2.Request, **options) -> httpx2.Response:
        if is_offline_mode():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        kind, name = repository(request.url.path)
        if not name:  # usage statistics, which may fail
            return super().send(request, **options)
        # some of the libraries' requests have no time limit
        limit = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        request.extensions["timeout"] = limit.as_dict()
        rest = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if rest:
            print(f"hub: resuming a download of {name} at byte {rest[1]}", flush=True)
        try:
            return retrying(partial(self.attempt, request, **options), name, self.seconds)
        except Exception as error:
            if not is_transient(error):
                raise
            raise hub_error(error, kind, name) from error

    def attempt(
        self, request: httpx2.Request, *, stream: bool = False, **options
    ) -> httpx2.Response:
        """The response to one attempt. Raises HfHubHTTPError or httpx2.TransportError."""
        response = super().send(request, stream=stream, **options)
        if response.status_code in (408, 429) or response.status_code >= 500:
            response.read()
            hf_raise_for_status(response)
        block = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if block and not stream and response.is_success:
            n_expected = int(block[2]) - int(block[1]) + 1
            if len(response.content) != n_expected:  # a proxy may send a wrong Content-Length
                raise httpx2.RemoteProtocolError(
                    f"{len(response.content)} of {n_expected} bytes received"
                )
        return response


huggingface_hub.set_client_factory(HubClient)
huggingface_hub.utils.logging.set_verbosity_error()  # its own messages about retries contain URLs


def repository(path: str) -> tuple[str, str]:
    """("data source" or "tokenizer", OWNER/NAME) of the repository in a URL's path.

    The name is empty if there is none.
    """
    name = "([^/]+/[^/]+)"
    match = re.search(f"/api/(datasets|models)/{name}|/(datasets)?/?{name}/resolve/", path)
    if match is None:
        return "tokenizer", ""
    kind = "data source" if "datasets" in match.group(1, 3) else "tokenizer"
    return kind, match[2] or match[4]


def from_hub(action: Callable[[], T], kind: str, name: str, seconds: float) -> T:
    """The result of action(); its hub requests are retried for `seconds` each. Raises UserError."""
    HubClient.seconds = seconds
    try:
        return retrying(action, name, seconds)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub client raise many exception types
        raise hub_error(error, kind, name) from error


# ---- errors
def hub_error(error: Exception, kind: str, name: str) -> UserError:
    """The UserError for a failed request; `kind` is "data source" or "tokenizer"."""
    error = hub_cause(error)
    problem, remedy = describe(error), ALTERNATIVES[kind]
    status = http_status(error)
    repo, _, config = name.partition(":")
    configs = re.search(r"(?:Available|available configs): (\[.*\])", str(error))
    again = f"try again later (prepared data is kept), or {remedy}"
    if is_offline_mode():
        problem = "it is neither a local folder nor cached, and HF_HUB_OFFLINE prevents downloads"
        remedy = f"unset HF_HUB_OFFLINE, or {remedy}"
    elif configs:
        problem = f"it has no config {config!r}" if config else "it has several configs"
        choices = re.findall(r"'(.+?)'", configs[1])
        remedy = f"pass one of {', '.join(f'{repo}:{choice}' for choice in choices)}"
    elif isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
        problem = "it is gated"
        folder = "datasets/" if kind == "data source" else ""
        remedy = f"accept its terms at {constants.ENDPOINT}/{folder}{repo} and {LOG_IN}"
    elif isinstance(error, RevisionNotFoundError):
        problem = "the revision that was prepared is no longer on the hub"
        remedy = "pass another --data.cache to prepare the current revision"
    elif status == 401 and "credentials" in str(error):
        problem = "the hub does not accept your access token"
        remedy = "log in again (`hf auth login`), or correct or unset HF_TOKEN"
    elif status in (401, 404):
        problem = f"{repo} is neither a local folder nor a hub repository that you can access"
        remedy = f"check the name, {LOG_IN}, or {remedy}"
    elif status == 403:
        problem, remedy = "the hub denies access to it (403)", f"{LOG_IN} as a user with access"
    elif status == 429:
        wait = requested_wait(error)
        problem = "the hub is rate-limiting your requests (429)"
        remedy = f"wait {wait:.0f} s" if wait else "wait a few minutes"
        remedy = f"{remedy} and try again (prepared data is kept), or {LOG_IN} for a higher limit"
    elif status is not None and status >= 500:
        problem, remedy = f"the hub keeps responding with {problem}", again
    elif isinstance(error, httpx2.ConnectError):
        problem = f"no connection to {constants.ENDPOINT} ({problem})"
        remedy = f"check the network; {again}"
    elif is_transient(error):
        problem, remedy = f"the hub cannot be read ({problem})", again
    return UserError(f"cannot load {kind} {name}: {problem}; {remedy}")


# ---- downloads
def hub_revisions(names: Iterable[str], seconds: float) -> dict[str, str]:
    """Current commit of each hub dataset NAME or NAME:CONFIG, to read the same data later.

    Raises UserError.
    """
    api = huggingface_hub.HfApi()
    return {
        name: from_hub(
            partial(api.dataset_info, name.partition(":")[0]), "data source", name, seconds
        ).sha
        for name in names
    }


def hub_stream(name: str, revision: str | None, seconds: float) -> Iterator[dict]:
    """Records of the split "train" of a hub dataset NAME or NAME:CONFIG, shuffled with seed 0.

    The order depends only on the arguments, not on failed requests or on the contents of a cache.
    Raises UserError.
    """
    import datasets

    datasets.disable_progress_bars()
    repo, _, config = name.partition(":")
    stream, n_done = None, 0

    def open_stream() -> Iterator[dict]:
        options = {"split": "train", "streaming": True, "revision": revision}
        # an empty cache, because `datasets` falls back to cached data if it cannot reach the hub
        with tempfile.TemporaryDirectory() as cache:
            dataset = datasets.load_dataset(repo, config or None, cache_dir=cache, **options)
        shuffled = dataset.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
        return itertools.islice(shuffled, n_done, None)

    def next_batch() -> list[dict]:
        nonlocal stream
        try:
            stream = stream or open_stream()
            return list(itertools.islice(stream, STREAM_BATCH))
        except BaseException:
            stream = None  # after an error, the stream would appear to be exhausted
            raise

    batch = from_hub(next_batch, "data source", name, seconds)
    while batch:
        yield from batch
        n_done += len(batch)
        batch = from_hub(next_batch, "data source", name, seconds)


def hub_splits(name: str, seconds: float):
    """All splits of a hub dataset NAME or NAME:CONFIG, as a datasets.DatasetDict.

    Data that `datasets` has cached is not downloaded again; offline, the newest cached copy is
    used. Raises UserError.
    """
    import datasets

    datasets.disable_progress_bars()
    repo, _, config = name.partition(":")
    revision = None if is_offline_mode() else hub_revisions([name], seconds)[name]

    def download():
        builder = datasets.load_dataset_builder(repo, config or None, revision=revision)
        if revision is None:
            print(f"hub: offline; using the copy of {name} in {builder.cache_dir}")
        elif builder.hash != revision:  # `datasets` fell back to a cached revision
            raise UserError(
                f"data source {name} cannot be read from the hub, and the cache has only another "
                "revision; try again later, or set HF_HUB_OFFLINE=1 to use the cached one"
            )
        builder.download_and_prepare()
        return builder.as_dataset()

    return from_hub(download, "data source", name, seconds)


def hub_tokenizer(name: str, seconds: float) -> Path:
    """Folder with the files of a tokenizer, downloaded unless the hub client has cached them.

    Raises UserError.
    """
    download = partial(huggingface_hub.snapshot_download, name, allow_patterns=TOKENIZER_FILES)

    def find() -> Path:
        with suppress(LocalEntryNotFoundError):
            folder = Path(download(local_files_only=True))
            # an interrupted download may lack these files
            if (folder / "tokenizer.json").exists() and (folder / "tokenizer_config.json").exists():
                return folder
        return Path(download())

    return from_hub(find, "tokenizer", name, seconds)
