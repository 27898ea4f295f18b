"""Wrong input to any script or tool: one line on standard error, exit code 2, nothing left behind.

The table below holds one wrong input per line. Each runs in this process through `run_script`; a
few of them also run as real processes.
"""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from helpers import MODULES, flags_of, script, sentences, train, train_stage, write_jsonl
from safetensors.torch import load_file, save_file

from common.config import run_script
from common.disk import file_sha256
from common.run import checkpoints

PROGRAMS = {
    "llm": "train_llm",
    "vqvae": "train_vqvae",
    "multimodal": "train_multimodal",
    "generate": "generate",
    "record": "tools.record",
    "score": "tools.score_images",
    "bench": "tools.bench",
    "scaling": "tools.scaling",
}
BASE = {"vqvae": {"images": 16}, "multimodal": {"sequences": 8, "vqvae": "v"}}  # one or two steps


# ---- running a program
class Outcome(NamedTuple):
    """How a program ended; `new_runs` are the folders in runs/ that it left behind."""

    code: int
    out: str
    err: str
    new_runs: set[str]


def runs() -> set[str]:
    return set(os.listdir("runs")) if Path("runs").exists() else set()


def run_program(name: str, argv: list[str], stdin: str = "") -> Outcome:
    """What a program does with these arguments, in this process. Other exceptions pass through."""
    module, before, out, err = importlib.import_module(PROGRAMS[name]), runs(), *streams()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [PROGRAMS[name], *argv])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                run_script(module.main, getattr(module, "Config", None))
        except SystemExit as stopped:
            code = stopped.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Outcome(code or 0, out.getvalue(), err.getvalue(), runs() - before)


def streams() -> tuple[io.StringIO, io.StringIO]:
    return io.StringIO(), io.StringIO()


def arguments(program: str, argv: list[str]) -> list[str]:
    """The arguments after those of a tiny run, if the program trains."""
    if program not in MODULES or "--resume" in argv:
        return argv
    return [*flags_of(MODULES[program], run="new", **BASE.get(program, {})), *argv]


# ---- what is wrong
def settings(**changes) -> Callable[[Path], None]:
    """Change settings in a run's config.yaml by hand; `__` stands for a dot, ... deletes."""

    def change(run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        for name, value in changes.items():
            tree, *keys = config, *name.split("__")
            for key in keys[:-1]:
                tree = tree[key]
            tree[keys[-1]] = value
            if value is ...:
                del tree[keys[-1]]
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    return change


def write(path: str, data: bytes) -> Callable[[Path], None]:
    """Overwrite a file of a run."""
    return lambda run: (run / path).write_bytes(data)


def remove(path: str) -> Callable[[Path], None]:
    """Remove a file or folder of a run."""

    def change(run: Path) -> None:
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink()

    return change


def in_checkpoint(name: str, data: bytes) -> Callable[[Path], None]:
    """Overwrite a file of a run's newest checkpoint."""
    return lambda run: (checkpoints(run)[-1] / name).write_bytes(data)


def add_entry_to_tokenizer(run: Path) -> None:
    path = run / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzzz"] = len(content["model"]["vocab"])
    path.write_text(json.dumps(content))


def exchange_vqvae(run: Path) -> None:
    """Change the weights of a run's VQ-VAE, as if its folder were copied from another run."""
    (checkpoint,) = checkpoints(run / "vqvae")
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, checkpoint / "model.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"]["model.safetensors"] = file_sha256(checkpoint / "model.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(state))


def fifo(run: Path) -> None:
    if not Path("pipe").exists():
        os.mkfifo("pipe")


FILES = {
    "broken.yaml": b"model: [1, 2\ntokens: {",
    "list.yaml": b"- tokens\n- 300\n",
    "word.yaml": b"tokens",
    "binary.yaml": bytes(range(256)),
    "latin1.yaml": b"run: caf\xe9\n",
    "unknown.yaml": b"tokenz: 300\n",
    "unknown-model.yaml": b"model:\n  n_layer: 3\n",
    "types.yaml": b"tokens: [1, 2]\n",
    "text.yaml": b"muon_lr: fast\n",
    "nan.yaml": b"muon_lr: .nan\n",
    "inf.yaml": b"adamw_wd: .inf\n",
    "huge.yaml": b"seed: 1" + b"0" * 30 + b"\n",
    "digits.yaml": b"tokens: 1" + b"0" * 5000 + b"\n",
    "empty.yaml": b"",
    "null-device.yaml": b"device: null\n",
    "comment.yaml": b"# tokens: 300\n",
    "null.yaml": b"model: null\n",
    "model-list.yaml": b"model: [1]\n",
    "deep.yaml": b"[" * 5000 + b"]" * 5000,
    "tag.yaml": b"run: !!python/object/apply:os.system ['touch pwned']\n",
    "twice.yaml": b"tokens: &a [*a]\n",
    "stage.yaml": b"stage: vqvae\n",
    "latin1.txt": b"caf\xe9",
    "nul.txt": b"a\0b" * 40,
    "long.txt": b"word " * 100,
    "huge.txt": b"x" * 10_000_001,
    "text.png": b"no image",
    "bad.jsonl": b'{"text": "a"}\n{"text": \n',
    "bad.parquet": b"PAR1 no parquet PAR1",
    "numbers.jsonl": b'{"text": 1}\n{"text": 2}\n',
    "column.jsonl": b'{"body": "a"}\n{"body": "b"}\n',
    "empty.jsonl": b"",
}


class Case(NamedTuple):
    program: str
    argv: list[str]
    message: str  # a part of the line
    change: Callable[[Path], object] | None = None  # makes runs/bad from a copy of ...
    source: str = "lm"


def config(name: str) -> list[str]:
    return [f"--config={name}.yaml"]


CASES = {
    # flags
    "unknown flag": Case("llm", ["--modle.n_layers=3"], "modle.n_layers"),
    "misspelled flag": Case("llm", ["--model.n_layer=3"], "did you mean --model.n_layers?"),
    "flag of another script": Case("vqvae", ["--muon_lr=0.1"], "muon_lr"),
    "stray word": Case("llm", ["now"], "now"),
    "number that is a word": Case("llm", ["--tokens=many"], "'many' is not an integer"),
    "unit that does not exist": Case("llm", ["--tokens=20X"], "'20X' is not an integer"),
    "empty number": Case("llm", ["--tokens="], "--tokens"),
    "null number": Case("llm", ["--tokens=null"], "--tokens"),
    "list for a number": Case("llm", ["--seed=[1]"], "--seed"),
    "fraction for an integer": Case("llm", ["--model.n_layers=2.5"], "--model.n_layers"),
    "infinite integer": Case("llm", ["--tokens=1e999"], "--tokens"),
    "nan": Case("llm", ["--adamw_lr=.nan"], "--adamw_lr"),
    "infinity": Case("llm", ["--muon_lr=1e999"], "--muon_lr is inf"),
    "price that is nan": Case("llm", ["--gpu_hourly_usd=.nan"], "--gpu_hourly_usd is nan"),
    "seed of generate.py beyond 64 bits": Case(
        "generate", ["lm", "--prompt=x", "--seed=99999999999999999999"], "--seed is 9999"
    ),
    "number beyond 64 bits": Case("llm", ["--seed=99999999999999999999"], "--seed"),
    "budget of zero": Case("llm", ["--tokens=0"], "--tokens is 0"),
    "negative budget": Case("vqvae", ["--images=-1"], "--images is -1"),
    "budget below a step": Case("multimodal", ["--sequences=1"], "less than one step"),
    "learning rate of zero": Case("llm", ["--muon_lr=0"], "--muon_lr is 0"),
    "negative weight decay": Case("llm", ["--adamw_wd=-1"], "--adamw_wd is -1.0"),
    "negative rate": Case("vqvae", ["--lr=-1"], "--lr is -1.0"),
    "negative seed": Case("vqvae", ["--seed=-1"], "--seed is -1"),
    "fraction above one": Case("llm", ["--cooldown_frac=2"], "--cooldown_frac is 2.0"),
    "schedule that overlaps": Case("llm", ["--warmup_frac=0.5"], "add up to more than 1"),
    "evaluation below the context": Case("llm", ["--eval_tokens=31"], "--eval_tokens 31"),
    "dtype that does not exist": Case("llm", ["--dtype=int4"], "--dtype"),
    "device that does not exist": Case("llm", ["--device=gpu"], "--device gpu"),
    "stage of another script": Case("llm", ["--stage=vqvae"], "--stage"),
    "run with a slash": Case("llm", ["--run=../x"], "'../x' is not a valid name"),
    "run without a name": Case("llm", ["--run="], "is not a valid name"),
    "run with a very long name": Case("llm", [f"--run={'x' * 300}"], "is not a valid name"),
    "run that exists": Case("llm", ["--run=lm"], "runs/lm exists"),
    "resume without a run": Case("llm", ["--resume"], "--resume needs the name of a run"),
    "resume of nothing": Case("llm", ["--resume", "--run=none"], "none"),
    "resume by another script": Case("vqvae", ["--resume", "--run=lm"], "stage llm"),
    # configurations that do not fit together
    "heads that do not divide": Case("llm", ["--model.d_model=30"], "--model.d_model"[2:]),
    "groups that do not divide": Case("llm", ["--model.n_kv_heads=3"], "n_kv_heads 3"),
    "canon longer than the context": Case("llm", ["--model.canon=32"], "model.canon is 32"),
    "vocabulary too small": Case("llm", ["--model.vocab_size=299"], "299"),
    "vocabulary too large": Case("llm", ["--model.vocab_size=70000"], "at most 65536"),
    "layers without end": Case("llm", ["--model.n_layers=1000000"], "at most 1000"),
    "width without end": Case("llm", ["--model.d_ff=1000000000000"], "at most 1048576"),
    "rope below one": Case("llm", ["--model.rope_theta=0.5"], "model.rope_theta is 0.5"),
    "pointer below zero": Case("llm", ["--model.pointer=-8"], "model.pointer is -8"),
    "images in a language model": Case("llm", ["--model.n_image_positions=4"], "set it to 0"),
    "batch that does not divide": Case("llm", ["--batch_tokens=100"], "set it to 128"),
    "micro batch that does not divide": Case("llm", ["--micro_batch=3"], "does not divide"),
    "crop above the image": Case("vqvae", ["--crop=64"], "--crop is 64"),
    "patch that does not divide": Case("vqvae", ["--model.downsample=5"], "not divisible"),
    "even kernel": Case("vqvae", ["--model.encoder_kernel=2"], "must be odd"),
    "code without colors": Case("vqvae", ["--model.code_dim=2"], "at least 3"),
    "codes beyond uint16": Case("vqvae", ["--model.codebook_size=70000"], "at most 65535"),
    "image that is tiny": Case("vqvae", ["--model.image_size=8"], "at least 11"),
    "image without end": Case("vqvae", ["--model.image_size=1000000"], "at most 4096"),
    "more codes than vectors": Case("vqvae", ["--model.codebook_size=40000"], "vectors"),
    "no VQ-VAE": Case("multimodal", ["--vqvae="], "--vqvae is missing"),
    "VQ-VAE that does not exist": Case("multimodal", ["--vqvae=none"], "'none'"),
    "VQ-VAE that is a language model": Case("multimodal", ["--vqvae=lm"], "not a train_vqvae.py"),
    "context without captions": Case("multimodal", ["--model.seq_len=60"], "--model.seq_len is 60"),
    "wrong image grid": Case("multimodal", ["--model.n_image_positions=9"], "set it to 64"),
    "pointer of images": Case("multimodal", ["--model.pointer=8"], "--model.pointer is 8"),
    "wrong joint vocabulary": Case("multimodal", ["--model.vocab_size=400"], "--model.vocab_size"),
    "start from another shape": Case("multimodal", ["--init_from=lm"], "--init_from lm"),
    "top_p above one": Case("multimodal", ["--top_p=1.5"], "--top_p is 1.5"),
    # YAML files
    "config that does not exist": Case("llm", config("none"), "none.yaml"),
    "config that is a folder": Case("llm", ["--config=runs"], "runs"),
    "config without a name": Case("llm", ["--config"], "--config"),
    **{
        f"config {name}": Case("llm", config(name), message)
        for name, message in {
            "broken": "broken.yaml",
            "list": "--config list.yaml cannot be read: it contains no settings",
            "word": "--config word.yaml cannot be read: it contains no settings",
            "empty": "--config empty.yaml cannot be read: it contains no settings",
            "comment": "--config comment.yaml cannot be read: it contains no settings",
            "binary": "--config binary.yaml cannot be read",
            "latin1": "--config latin1.yaml cannot be read",
            "unknown": "did you mean --tokens?",
            "unknown-model": "did you mean --model.n_layers?",
            "types": "--tokens",
            "text": "--muon_lr",
            "nan": "--muon_lr",
            "inf": "--adamw_wd",
            "huge": "--seed",
            "null-device": "device is null",
            "digits": "digits",
            "deep": "deep",
            "tag": "tag",
            "twice": "tokens",
            "stage": "--stage",
        }.items()
    },
    "model that is null": Case("llm", config("null"), "model"),
    "model that is a list": Case("llm", config("model-list"), "model"),
    "model that is a word": Case("llm", ["--model=small"], "--model"),
    "config that is a pipe": Case("llm", ["--config=pipe"], "--config pipe", fifo),
    # data
    "data that does not exist": Case("llm", ["--data.source=none.parquet"], "none.parquet"),
    "data without files": Case("llm", ["--data.source=empty"], "empty"),
    "damaged JSON": Case("llm", ["--data.source=bad.jsonl"], "bad.jsonl"),
    "damaged parquet": Case("llm", ["--data.source=bad.parquet"], "bad.parquet"),
    "numbers for text": Case("llm", ["--data.source=numbers.jsonl"], "numbers.jsonl"),
    "other column": Case("llm", ["--data.source=column.jsonl"], "body"),
    "file without records": Case("llm", ["--data.source=empty.jsonl"], "empty.jsonl"),
    "pipe for text": Case("llm", ["--data.source=pipe"], "pipe", fifo),
    "weight of zero": Case("llm", ["--data.source={corpus.jsonl: 0}"], "positive weights"),
    "tokenizer that is too small": Case("llm", ["--data.tokenizer=bpe-5"], "257"),
    "tokenizer without a size": Case("llm", ["--data.tokenizer=bpe-x"], "bpe-x"),
    "tokenizer folder without a tokenizer": Case("llm", ["--data.tokenizer=./runs"], "./runs"),
    "images that do not exist": Case("vqvae", ["--data.source=./none"], "./none"),
    "images that are text": Case("vqvae", ["--data.source=photos"], "photos"),
    "held-out fraction of one": Case("vqvae", ["--data.val_fraction=1"], "val_fraction"),
    # prompts and files of generate.py
    "run that does not exist": Case("generate", ["none", "--prompt=x"], "'none'"),
    "run that is a file": Case("generate", ["corpus.jsonl", "--prompt=x"], "corpus.jsonl"),
    "run that generates nothing": Case("generate", ["v", "--prompt=x"], "VQ-VAE run"),
    "image of a language model": Case("generate", ["lm", "--prompt=x", "--kind=image"], "language"),
    "no continuations": Case("generate", ["lm", "--prompt=x", "--n=0"], "--n is 0"),
    "too many continuations": Case("generate", ["lm", "--prompt=x", "--n=1000000000"], "10000"),
    "negative temperature": Case(
        "generate", ["lm", "--prompt=x", "--temperature=-1"], "--temperature is -1.0"
    ),
    "temperature nan": Case("generate", ["lm", "--prompt=x", "--temperature=.nan"], "temperature"),
    "guidance nan": Case("generate", ["m", "--prompt=x", "--guidance=.nan"], "guidance"),
    "guidance without end": Case("generate", ["m", "--prompt=x", "--guidance=1e9"], "at most 1000"),
    "image without a prompt": Case("generate", ["m", "--prompt="], "the prompt is empty"),
    "caption that is too long": Case("generate", ["m", "--prompt=FILE:long.txt"], "shorten it"),
    "prompt that is too long": Case("generate", ["lm", "--prompt=FILE:long.txt"], "shorten it"),
    "prompt with zeros": Case("generate", ["lm", "--prompt=FILE:nul.txt"], "shorten it"),
    "prompt without end": Case("generate", ["lm", "--prompt=FILE:huge.txt"], "characters"),
    "prompt file that does not exist": Case("generate", ["lm", "--prompt=FILE:none"], "FILE:none"),
    "prompt file that is a folder": Case("generate", ["lm", "--prompt=FILE:runs"], "not a file"),
    "prompt file that is a pipe": Case("generate", ["lm", "--prompt=FILE:pipe"], "pipe", fifo),
    "prompt file that is endless": Case("generate", ["lm", "--prompt=FILE:/dev/zero"], "not a"),
    "prompt file in Latin-1": Case("generate", ["lm", "--prompt=FILE:latin1.txt"], "UTF-8"),
    "prompt with half a character": Case("generate", ["lm", "--prompt=a\udcff"], "UTF-8"),
    "output that is no image": Case("generate", ["m", "--prompt=x", "--out=x.gif"], ".png"),
    "output that is a folder": Case("generate", ["m", "--prompt=x", "--out=dir.png"], "dir.png"),
    "output below a file": Case(
        "generate", ["m", "--prompt=x", "--out=corpus.jsonl/x.png"], "corpus.jsonl/x.png"
    ),
    # runs that are damaged or edited by hand
    "config of a run is broken": Case(
        "generate", ["bad", "--prompt=x"], "runs/bad/config.yaml", write("config.yaml", b"a: [")
    ),
    "config of a run is binary": Case(
        "generate", ["bad", "--prompt=x"], "config.yaml", write("config.yaml", bytes(range(256)))
    ),
    "config of a run is empty": Case(
        "generate", ["bad", "--prompt=x"], "config.yaml", write("config.yaml", b"")
    ),
    "config of a run is missing": Case(
        "generate", ["bad", "--prompt=x"], "runs/bad", remove("config.yaml")
    ),
    "config of a run without a stage": Case(
        "generate", ["bad", "--prompt=x"], "earlier version", settings(stage=...)
    ),
    "config of a run with another stage": Case(
        "generate", ["bad", "--prompt=x"], "stage", settings(stage="x")
    ),
    "config of a run without a model": Case(
        "generate", ["bad", "--prompt=x"], "config.yaml", settings(model=...)
    ),
    "model of a run that is a list": Case(
        "generate", ["bad", "--prompt=x"], "config.yaml", settings(model=[1])
    ),
    "model of a run without a setting": Case(
        "generate", ["bad", "--prompt=x"], "does not set canon", settings(model__canon=...)
    ),
    "model of a run with an unknown setting": Case(
        "generate", ["bad", "--prompt=x"], "sets experts", settings(model__experts=8)
    ),
    "model of a run with a word": Case(
        "generate", ["bad", "--prompt=x"], "d_model", settings(model__d_model="wide")
    ),
    "model of a run of another shape": Case(
        "generate", ["bad", "--prompt=x"], "does not fit the model", settings(model__d_ff=128)
    ),
    "sampling of a run that is a word": Case(
        "generate", ["bad", "--prompt=x"], "guidance", settings(guidance="much"), "m"
    ),
    "data of a run that is a list": Case(
        "score", ["bad", "--n=2"], "expected source", settings(data=[]), "m"
    ),
    "source of a run that is gone": Case(
        "score", ["bad", "--n=2"], "./gone", settings(data__source="./gone"), "m"
    ),
    "run without checkpoints": Case(
        "generate", ["bad", "--prompt=x"], "no checkpoint", remove("checkpoints")
    ),
    "weights that are text": Case(
        "generate", ["bad", "--prompt=x"], "damaged", in_checkpoint("model.safetensors", b"text")
    ),
    "state that is text": Case(
        "generate", ["bad", "--prompt=x"], "damaged", in_checkpoint("state.json", b"text")
    ),
    "state that is a list": Case(
        "generate", ["bad", "--prompt=x"], "runs/bad/ch", in_checkpoint("state.json", b"[]")
    ),
    "run without a tokenizer": Case(
        "generate", ["bad", "--prompt=x"], "runs/bad/tokenizer", remove("tokenizer")
    ),
    "tokenizer that is text": Case(
        "generate", ["bad", "--prompt=x"], "tokenizer", write("tokenizer/tokenizer.json", b"text")
    ),
    "tokenizer with another entry": Case(
        "generate", ["bad", "--prompt=x"], "not the tokenizer", add_entry_to_tokenizer
    ),
    "run without its VQ-VAE": Case(
        "generate", ["bad", "--prompt=x"], "runs/bad/vqvae", remove("vqvae"), "m"
    ),
    "run with another VQ-VAE": Case(
        "generate", ["bad", "--prompt=x"], "not the VQ-VAE", exchange_vqvae, "m"
    ),
    "resume with a broken config": Case(
        "llm", ["--run=bad", "--resume"], "config.yaml", write("config.yaml", b"a: [")
    ),
    "resume with a null": Case(
        "llm", ["--run=bad", "--resume"], "seed is null", settings(seed=None)
    ),
    "resume with an unknown setting": Case(
        "llm", ["--run=bad", "--resume"], "sets experts", settings(experts=8)
    ),
    "resume with a damaged summary": Case(
        "llm", ["--run=bad", "--resume"], "summary.json", write("summary.json", b"{")
    ),
    # tools
    "score of a language model": Case("score", ["lm"], "language model"),
    "score without images": Case("score", ["m", "--n=0"], "--n is 0"),
    "score without end": Case("score", ["m", "--n=1000000000"], "at most 100000"),
    "score in no batches": Case("score", ["m", "--batch=0"], "--batch is 0"),
    "measurement that does not exist": Case("bench", ["--only=speed"], "'speed'"),
    "shape that does not exist": Case("bench", ["--shape=huge"], "huge"),
    "no repeats": Case("bench", ["--repeats=0"], "--repeats is 0"),
    "more tokens than an image": Case("bench", ["--image_tokens=2000"], "from 9 to 1024"),
    "results in a folder": Case("bench", ["--out=photos"], ".json"),
    "results in a device": Case("bench", ["--out=/dev/null"], ".json"),
    "results in a missing folder": Case("bench", ["--out=none/a.json"], "create it"),
    "no results": Case("scaling", [], "files"),
    "results that do not exist": Case("scaling", ["none.json"], "none.json is not a result"),
    "results of another tool": Case("scaling", ["word.yaml"], "word.yaml is not a result"),
    "price of an unknown card": Case("scaling", ["a.json", "--price", "TPU=1"], "TPU=1"),
    "price in words": Case("scaling", ["a.json", "--price", "H100=cheap"], "H100=2.50"),
    "speed above the peak": Case("scaling", ["a.json", "--mfu", "0.5", "1.5"], "--mfu is 0.5 1.5"),
    "command that does not exist": Case("record", ["rank"], "'rank' is not a command"),
    "trials without a name": Case("record", ["trials"], "trials need a name"),
    "trials without seeds": Case("record", ["trials", "--run=t", "--seeds=0"], "--seeds is 0"),
    "trials of unreadable runs": Case("record", ["compare", "runs/v", "--", "runs/lm"], "runs/v"),
    "comparison of one side": Case("record", ["compare"], "both sides"),
    "submission without runs": Case("record", ["submit", "x", "--note=y"], "--runs"),
    "submission of nothing": Case(
        "record", ["submit", "x", "--note=y", "--who=z", "--runs=none"], "matches none"
    ),
    "submission with a broken name": Case(
        "record", ["submit", "../x", "--note=y", "--who=z", "--runs=r"], "record name"
    ),
    "submission with terminal codes": Case(
        "record", ["submit", "x", "--note=\x1b[2J", "--who=z", "--runs=r"], "--note"
    ),
    "check of no checkout": Case("record", ["check", "none"], "none/docs"),
    "check of two checkouts": Case("record", ["check", ".", ".."], "does not take '..'"),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working directory with a run of each stage (lm, v and m) and the files of FILES."""
    folder = tmp_path_factory.mktemp("bad_input")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, data in FILES.items():
            Path(name).write_bytes(data)
        for name in ("empty", "photos", "dir.png"):
            Path(name).mkdir()
        Path("photos/a.png").write_bytes(b"no image")
        write_jsonl("corpus.jsonl", sentences(300))
        train(run="lm", tokens=256)
        train_stage(MODULES["vqvae"], run="v", **BASE["vqvae"])
        train_stage(MODULES["multimodal"], run="m", **BASE["multimodal"])
    return folder


def prepare(case: Case) -> None:
    """Make runs/bad if the case needs it; remove what an earlier case has left."""
    bad = Path("runs/bad")
    for leftover in (bad, Path("runs/new")):
        shutil.rmtree(leftover, ignore_errors=True)
    if case.change:
        shutil.copytree(Path("runs") / case.source, bad)
        case.change(bad)


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_one_line_and_leaves_no_run(workspace, monkeypatch, name):
    monkeypatch.chdir(workspace)
    case = CASES[name]
    prepare(case)
    done = run_program(case.program, arguments(case.program, case.argv))
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: ")
    assert case.message in done.err
    assert done.new_runs == set()
    assert not Path("pwned").exists()


def test_the_table_names_at_least_eighty_wrong_inputs():
    assert len(CASES) >= 80


@pytest.mark.parametrize(
    "name",
    ["misspelled flag", "config broken", "prompt with half a character", "no repeats"],
)
def test_wrong_input_ends_a_real_process_the_same_way(workspace, name):
    case = CASES[name]
    module = PROGRAMS[case.program]
    program = ["-m", module] if "." in module else [f"{module}.py"]
    argv = [os.fsencode(word) for word in arguments(case.program, case.argv)]
    done = script(*program, *argv, cwd=workspace)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
