"""A hub that fails: default data through 503s, cut and stalled bodies; the remedy of each error."""

import json
import os
import re
import shutil
import threading
from functools import partial
from pathlib import Path

import datasets
import httpx2
import numpy as np
import pytest
from helpers import TINY, script, sentences
from huggingface_hub import constants
from PIL import Image
from stand_in_hub import Fault, StandInHub

import train_llm
from common.config import UserError, load_config
from data import hub as hub_module
from data.hub import hub_revisions, hub_splits, hub_stream, hub_tokenizer, retrying
from data.images import ImageConfig, prepare_images
from data.text import DataConfig, Tokens, prepare_tokens
from data.tokenizer import load_tokenizer, train_bpe

EVERYTHING = 10**9
TEXTS, TOKENIZER, IMAGES = "HuggingFaceTB/smollm-corpus", DataConfig().tokenizer, "uoft-cs/cifar10"
CONFIGS = ("fineweb-edu-dedup", "cosmopedia-v2")
MANY = "acme/many-files"
ALWAYS = 10**6


def write_parquet(folder: Path, name: str, **columns) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / name)


def write_images(folder: Path) -> None:
    """40 images in the schema of CIFAR-10, ten of them in the test split."""
    labels = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"img": datasets.Image(), "label": labels})
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    for split, part in (("train", pixels[:30]), ("test", pixels[30:])):
        columns = {"img": [Image.fromarray(p) for p in part], "label": [0, 1] * (len(part) // 2)}
        folder.mkdir(parents=True, exist_ok=True)
        data = datasets.Dataset.from_dict(columns, features=features)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Repositories with the names of the default data, tiny."""
    root = tmp_path_factory.mktemp("hub")
    texts = root / "datasets" / TEXTS
    card = "---\nconfigs:\n"
    for seed, config in enumerate(CONFIGS):
        card += f"- config_name: {config}\n  data_files: {config}/train-*.parquet\n"
        for part in range(2):
            name = f"train-{part:05d}-of-00002.parquet"
            write_parquet(texts / config, name, text=sentences(150, 10 * seed + part), n=[1] * 150)
    (texts / "README.md").write_text(card + "---\n")
    train_bpe("bpe-400", sentences(300)).save_pretrained(root / "models" / TOKENIZER)
    (root / "models" / TOKENIZER / "config.json").write_text('{"model_type": "llama"}')
    write_images(root / "datasets" / IMAGES / "plain_text")
    for i in range(13):
        texts = [f"file {i}, record {j}" for j in range(300 + 97 * i)]
        write_parquet(root / "datasets" / MANY, f"train-{i:05d}-of-00013.parquet", text=texts)
    write_parquet(root / "datasets/acme/test-only", "test.parquet", text=["a"])
    write_parquet(root / "datasets/acme/script", "train.parquet", text=["a"])
    (root / "datasets/acme/script/script.py").write_text("open('ran', 'w')")
    coded = shutil.copytree(root / "models" / TOKENIZER, root / "models/acme/coded")
    config = json.loads((coded / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "code.Tokenizer"]}
    (coded / "tokenizer_config.json").write_text(json.dumps(config))
    (coded / "code.py").write_text("open('ran', 'w')")
    return root


@pytest.fixture
def hub(root, tmp_path, monkeypatch):
    """The stand-in in place of the hub, with an empty cache and short waits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr(hub_module, "MAX_WAIT", 0.01)
    with StandInHub(root) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def offline(monkeypatch):
    """Call it to switch offline mode on, as HF_HUB_OFFLINE=1 does."""

    def switch():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    return switch


def prepared_tokens(cache: str, seconds: float = 5) -> dict[str, str]:
    """Hashes of the tokens of the default sources."""
    cfg = DataConfig(cache=cache, val_tokens=EVERYTHING, retry_seconds=seconds)
    tokenizer = load_tokenizer(cfg)
    folders = {s: prepare_tokens(cfg, s, EVERYTHING, tokenizer) for s in ("train", "val")}
    return {split: Tokens(folder).sha256 for split, folder in folders.items()}


def prepared_images(cache: str) -> dict[str, bytes]:
    """Pixels of the default image source."""
    cfg = ImageConfig(cache=cache, retry_seconds=5)
    folders = {split: prepare_images(cfg, split, 32) for split in ("train", "val")}
    return {split: (folder / "images.bin").read_bytes() for split, folder in folders.items()}


@pytest.fixture(scope="module")
def undisturbed() -> dict:
    """Results without faults, by the function that makes them."""
    return {}


def check_survives(hub, undisturbed: dict, prepare, faults: list[Fault]) -> None:
    """Preparing the same data gives the same result through faults."""
    if prepare not in undisturbed:
        undisturbed[prepare] = prepare("undisturbed")
        for folder in (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE):
            shutil.rmtree(folder, ignore_errors=True)
    hub.faults = faults
    assert prepare("disturbed") == undisturbed[prepare]


def each_kind(pattern: str, times: int = 3) -> list:
    body = f"(GET|POST).*{pattern}"
    faults = [
        Fault("status", pattern, times),
        Fault("status", pattern, times, status=429, headers={"Retry-After": "0"}),
        Fault("cut", body, times, n_bytes=40),
        Fault("short", body, times, n_bytes=40),
        Fault("stall", body, 1, n_bytes=40),
    ]
    return [pytest.param([f], id=f"{f.kind} {f.status} {f.pattern} {f.times}") for f in faults]


# ---- default data through faults
@pytest.mark.parametrize("faults", each_kind("") + each_kind("parquet")[2:])
def test_default_texts_are_the_same_after_faults(hub, undisturbed, faults):
    check_survives(hub, undisturbed, prepared_tokens, faults)
    assert faults[0].times == 0


@pytest.mark.parametrize("faults", each_kind("") + each_kind("parquet", 1)[2:])
def test_default_images_are_the_same_after_faults(hub, undisturbed, faults):
    check_survives(hub, undisturbed, prepared_images, faults)
    assert faults[0].times == 0


PLACES = ("/api/", "/tree/", "README", "json", "train-00000", "00001-of", "test-00000")


@pytest.mark.faults
@pytest.mark.parametrize("prepare", [prepared_tokens, prepared_images])
@pytest.mark.parametrize(
    "faults", [case for place in PLACES for n in (1, 8) for case in each_kind(place, n)]
)
def test_default_data_are_the_same_after_faults_anywhere(hub, undisturbed, prepare, faults):
    check_survives(hub, undisturbed, prepare, faults)


def default_flags(stage: str, **changes) -> list[str]:
    """The command line of a tiny run on the default data."""
    defaults = ("data.source", "data.tokenizer")
    tiny = {key: value for key, value in TINY[stage].items() if key not in defaults}
    return [f"--{key}={value}" for key, value in (tiny | {"run": "default"} | changes).items()]


def test_the_default_run_survives_faults(hub, capsys):
    hub.faults = [Fault("status", times=3), Fault("cut", "GET.*parquet", 3), Fault("stall", "GET")]
    flags = default_flags("train_llm", **{"model.vocab_size": 400, "data.retry_seconds": 5})
    assert train_llm.main(load_config(train_llm.Config, flags))["tokens"] == 2560
    assert capsys.readouterr().out.count("; retrying in ") == 7


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["train_llm", "train_vqvae"])
def test_the_default_command_survives_faults(hub, stage):
    hub.faults = [Fault("status", times=3), Fault("cut", "GET.*parquet", 3), Fault("stall", "GET")]
    changes = {"model.vocab_size": 400} if stage == "train_llm" else {}
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": "home", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    done = script(f"{stage}.py", *default_flags(stage, **changes), env=env)
    assert (done.returncode, done.stdout.count("; retrying in ") > 0) == (0, True), done.stderr


# ---- streams
def test_a_stream_has_the_order_of_datasets(hub):
    (revision,) = hub_revisions([MANY], 5).values()
    options = {"revision": revision, "split": "train", "streaming": True}
    expected = datasets.load_dataset(MANY, **options).shuffle(seed=0, buffer_size=10_000)
    assert list(hub_stream(MANY, revision, 5)) == list(expected)


def test_a_stream_that_breaks_continues_at_the_same_record(hub, monkeypatch):
    (revision,) = hub_revisions([MANY], 5).values()
    expected = list(hub_stream(MANY, revision, 5))
    shuffle, breaks = datasets.IterableDataset.shuffle, [7, 250, 1000]

    def broken(stream, n):
        for i, record in enumerate(stream):
            if i == n:
                raise httpx2.ReadError("connection lost")
            yield record

    def shuffle_and_break(self, **options):
        stream = shuffle(self, **options)
        return broken(stream, breaks.pop()) if breaks else stream

    monkeypatch.setattr(datasets.IterableDataset, "shuffle", shuffle_and_break)
    assert list(hub_stream(MANY, revision, 5)) == expected
    assert breaks == []


def test_a_preparation_that_the_hub_stopped_continues(hub, undisturbed):
    if prepared_tokens not in undisturbed:
        undisturbed[prepared_tokens] = prepared_tokens("undisturbed")
    hub.faults = [Fault("status", "cosmopedia.*parquet", ALWAYS)]
    with pytest.raises(UserError, match="keeps responding with 503"):
        prepared_tokens("stopped", seconds=0.2)
    hub.faults = []
    assert prepared_tokens("stopped") == undisturbed[prepared_tokens]


# ---- errors
PRIVATE = {"X-Error-Code": "RepoNotFound"}
GATED = {"X-Error-Code": "GatedRepo"}
BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}
LIMIT = {"Retry-After": "300"}


@pytest.mark.parametrize(
    "fault, message",
    [
        (Fault("status", status=401, headers=PRIVATE), "that you can access; check the name"),
        (Fault("status", status=404, headers=PRIVATE), "that you can access; check the name"),
        (Fault("status", status=401, headers=BAD_TOKEN), "not accept your access token; log in"),
        (Fault("status", "resolve", status=403, headers=GATED), "is gated; accept its terms at ht"),
        (Fault("status", status=403), r"denies access to it \(403\); log in .* as a user with ac"),
        (
            Fault("status", status=429, headers=LIMIT),
            r"rate-limiting .* \(429\); wait 300 s and try ag",
        ),
        (Fault("status", status=503), "keeps responding with 503 Service Unavailable; try again"),
        (Fault("cut", n_bytes=9), r"cannot be read \(peer closed .*\); try again later"),
        (Fault("short", n_bytes=9), r"cannot be read \(incomplete response\); try again later"),
        (Fault("stall", n_bytes=9), r"cannot be read \(no response within 0.3 s\); try again"),
    ],
    ids=lambda case: f"{case.kind} {case.status}" if isinstance(case, Fault) else "",
)
@pytest.mark.parametrize("kind", ["data source", "tokenizer"])
def test_an_error_of_the_hub_has_a_remedy_that_fits(hub, kind, fault, message):
    fault.times = ALWAYS
    hub.faults = [fault]
    name = MANY if kind == "data source" else TOKENIZER
    load = hub_splits if kind == "data source" else hub_tokenizer
    with pytest.raises(UserError, match=f"^cannot load {kind} {name}: .*{message}") as caught:
        load(name, 0.1)
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


def test_without_a_connection_the_error_says_so(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no connection to http://127.0.0.1:9 \(.*; check the n"):
        hub_revisions([MANY], 0.1)


@pytest.mark.parametrize(
    "name, message",
    [
        (f"{TEXTS}:web", "it has no config 'web'; pass one of .*:fineweb-edu-dedup, .*:cosmo"),
        (TEXTS, "it has several configs; pass one of .*:fineweb-edu-dedup, .*:cosmo"),
        ("acme/no-such-name", "acme/no-such-name is neither a local folder nor a hub repository"),
        ("acme/script", "Dataset scripts are no longer supported, but found script.py"),
        ("acme/test-only", r"Bad split: train. Available splits: \['test'\]; use local files"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(hub, name, message):
    with pytest.raises(UserError, match=message):
        revision = hub_revisions([name], 5)[name]
        next(hub_stream(name, revision, 5))


def test_code_in_a_repository_never_runs(hub):
    with pytest.raises(UserError, match="acme/coded comes with code .*, which is never run"):
        load_tokenizer(DataConfig(tokenizer="acme/coded"))
    assert not Path("ran").exists()


def test_images_of_another_revision_are_never_used_silently(hub, root):
    hub_splits(MANY, 5)
    card = root / "datasets" / MANY / "README.md"
    card.write_text("# another revision")
    hub.faults = [Fault("status", "resolve", ALWAYS)]
    with pytest.raises(UserError, match="only another revision; try again later, or set HF_HUB_O"):
        hub_splits(MANY, 0.1)
    card.unlink()


def test_a_stream_never_uses_what_datasets_has_cached(hub):
    hub_splits(MANY, 5)
    hub.faults = [Fault("status", "resolve", ALWAYS)]
    with pytest.raises(UserError, match="keeps responding with 503"):
        next(hub_stream(MANY, hub_revisions([MANY], 5)[MANY], 0.1))


def test_access_tokens_are_neither_printed_nor_stored(hub, monkeypatch, capfd):
    secret = "hf_" + "s" * 30
    monkeypatch.setenv("HF_TOKEN", secret)
    hub.faults = [Fault("status", times=2), Fault("cut", "GET.*parquet", 2)]
    prepared_tokens("cache")
    hub.faults = [Fault("status", times=ALWAYS)]
    with pytest.raises(UserError) as caught:
        hub_revisions([MANY], 0.1)
    stored = b"".join(path.read_bytes() for path in Path().rglob("*") if path.is_file())
    assert secret not in str(caught.value) + "".join(capfd.readouterr())
    assert secret.encode() not in stored


# ---- caches
def test_prepared_data_need_no_hub(hub, offline):
    expected = prepared_tokens("cache"), prepared_images("cache")
    offline()
    shutil.rmtree(constants.HF_HUB_CACHE)
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE)
    hub.requests.clear()
    assert (prepared_tokens("cache"), prepared_images("cache")) == expected
    assert hub.requests == []


def test_offline_a_tokenizer_comes_from_the_cache_of_the_hub_client(hub, offline):
    expected = load_tokenizer(DataConfig(cache="a")).get_vocab()
    offline()
    assert load_tokenizer(DataConfig(cache="b")).get_vocab() == expected


def test_a_cached_tokenizer_is_not_asked_for_again(hub):
    load_tokenizer(DataConfig(cache="a"))
    hub.requests.clear()
    load_tokenizer(DataConfig(cache="b"))
    assert hub.requests == []


def test_offline_images_come_from_the_cache_of_datasets(hub, offline, capsys):
    expected = prepared_images("a")
    offline()
    assert prepared_images("b") == expected
    assert f"hub: offline; using the copy of {IMAGES} in " in capsys.readouterr().out


@pytest.mark.parametrize("load", [prepared_tokens, prepared_images])
def test_offline_what_is_not_cached_is_refused(hub, offline, load):
    offline()
    with pytest.raises(
        UserError, match="nor cached, and HF_HUB_OFFLINE prevents.*; unset HF_HUB_O"
    ):
        load("cache")


def test_two_loads_of_a_tokenizer_into_a_fresh_cache_succeed(hub):
    hub.faults = [Fault("stall", "GET.*tokenizer.json")]  # both are at work at the same time
    found = []
    load = partial(load_tokenizer, DataConfig(retry_seconds=5))
    threads = [threading.Thread(target=lambda: found.append(load().get_vocab())) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]


# ---- retries
def failing(n: int, error: Exception):
    """An action that raises an error n times, then returns the number of calls."""
    calls = []

    def action() -> int:
        calls.append(0)
        if len(calls) <= n:
            raise error
        return len(calls)

    return action


def test_each_retry_prints_a_line(monkeypatch, capsys):
    monkeypatch.setattr(hub_module, "MAX_WAIT", 0.01)
    assert retrying(failing(2, httpx2.ReadError("connection lost")), "acme/set", 5) == 3
    assert re.fullmatch(
        r"hub: connection lost for acme/set; retrying in 0.0 s \(attempt 2\)\n"
        r"hub: connection lost for acme/set; retrying in 0.0 s \(attempt 3\)\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize(
    "error, seconds", [(ValueError("a bug"), 5), (httpx2.ReadError("lost"), 0)], ids=str
)
def test_permanent_errors_and_no_budget_are_not_retried(error, seconds):
    with pytest.raises(type(error)):
        retrying(failing(1, error), "acme/set", seconds)


def test_waits_grow_exponentially_up_to_a_limit(monkeypatch):
    waits = []
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    retrying(failing(7, httpx2.ReadError("lost")), "acme/set", 60)
    limits = [1, 2, 4, 8, 16, 16, 16]
    assert all(n / 2 <= wait <= n for wait, n in zip(waits, limits, strict=True))
