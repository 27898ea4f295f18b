"""Generated settings, flags and files: a step runs, or one line says why not.

`make test` tries a few dozen examples of each kind; `make test-faults` sets
BLUEBERRY_FUZZ_EXAMPLES to 2,000.
"""

import dataclasses
import importlib
import os
import random
import shutil
import typing
from pathlib import Path

import pytest
import yaml
from helpers import MODULES, ROOT, TINY, sentences, train, train_stage, write_jsonl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_bad_input import BASE, PROGRAMS, run_program

from common.run import checkpoints

EXAMPLES = int(os.environ.get("BLUEBERRY_FUZZ_EXAMPLES", 0))  # 0: a few, always the same
CONFIGS = {
    name: importlib.import_module(PROGRAMS[name]).Config
    for name in ("llm", "vqvae", "multimodal", "generate", "score", "bench")
}
REQUIRED = {  # the smallest useful arguments of each program
    **{name: TINY[f"train_{name}"] | {"run": "new"} for name in MODULES},
    "generate": {"prompt": "a fox", "max_tokens": "3"},
    "score": {"n": "2", "n_real": "20", "n_classify": "1", "batch": "2"},
    "bench": {"shape": "tiny", "only": "vqvae", "repeats": "1", "device": "cpu"},
}
REQUIRED["llm"]["tokens"] = "256"
for name, values in BASE.items():
    REQUIRED[name] |= {key: str(value) for key, value in values.items()}
WORDS = {  # arguments without a flag
    "generate": st.sampled_from(["lm", "m", "v", "none", "runs/lm", "../x", "a\0b", "x" * 300]),
    "score": st.sampled_from(["m", "lm", "none", "."]),
}
SLOW = {  # settings that only make a program run longer: not worth a try with large values
    *("tokens", "images", "sequences", "repeats", "shape", "only", "image_tokens", "probe_steps"),
    *("max_tokens", "n", "n_real", "n_classify", "sample_n", "sample_tokens", "eval_images"),
    *("batch_tokens", "batch_images", "batch_sequences", "compile"),
}
HOSTILE = st.sampled_from(
    ["0", "-1", "nan", ".nan", ".inf", "-.inf", "1e308", "1e-320", str(10**18), str(10**30), ""]
    + ["null", "true", "[]", "[1, 2]", "{a: 1}", "{", "'", "x" * 5000, "é🦊", "\x1b[2J", "a\0b"]
    + [".", "/dev/null", "corpus.jsonl", "lm", "FILE:corpus.jsonl", "auto", "1M"]
)
TEXT = st.text(st.characters(exclude_characters="/~."))  # paths would lead out of the folder
SMALL = st.integers(1, 9).map(str) | st.floats(0, 1).map(str)


def fuzz(share: float):
    """Settings of a test that tries this share of all examples."""
    return settings(
        max_examples=max(1, round((EXAMPLES or 100) * share)),
        deadline=None,
        derandomize=not EXAMPLES,
        phases=[Phase.generate],  # shrinking would take minutes, and examples are small
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def names(config) -> list[str]:
    """The dotted names of a config's settings."""
    found = []
    for field in dataclasses.fields(config):
        kind = typing.get_type_hints(config)[field.name]
        nested = dataclasses.is_dataclass(kind)
        found += [f"{field.name}.{name}" for name in names(kind)] if nested else [field.name]
    return found


@st.composite
def changes(draw, program: str) -> dict[str, str]:
    """One to three settings of a program with plausible or hostile values."""
    known = [name for name in names(CONFIGS[program]) if name != "run" or program not in WORDS]
    chosen = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    return {name: draw(SMALL if name in SLOW else HOSTILE | SMALL | TEXT) for name in chosen}


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory):
    """A working directory with a run of each stage: lm, v and m."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        write_jsonl("corpus.jsonl", sentences(300))
        train(run="lm", tokens=256)
        train_stage(MODULES["vqvae"], run="v", **BASE["vqvae"])
        train_stage(MODULES["multimodal"], run="m", **BASE["multimodal"])
        yield


def check(program: str, argv: list[str], stdin: str = "") -> None:
    """Run a program. Fails unless it succeeds or says in one line why not, leaving no run.

    A run whose loss is not finite after its first step keeps its folder.
    """
    done = run_program(program, argv, stdin)
    for name in done.new_runs:
        shutil.rmtree(Path("runs") / name)
    if not done.code:
        return
    assert done.code == 2, done
    assert done.err.startswith("error: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert not done.new_runs or "stopped before updating" in done.err, done


# ---- settings
@pytest.mark.parametrize("program", CONFIGS)
@fuzz(0.07)
@given(data=st.data())
def test_any_flags_run_a_step_or_make_one_line(program, data):
    chosen = REQUIRED[program] | data.draw(changes(program))
    words = [data.draw(WORDS[program])] if program in WORDS else []
    check(program, [*words, *(f"--{name}={value}" for name, value in chosen.items())])


@pytest.mark.parametrize("program", CONFIGS)
@fuzz(0.03)
@given(data=st.data())
def test_any_config_file_runs_a_step_or_makes_one_line(program, data):
    tree: dict = {}
    for name, value in (REQUIRED[program] | data.draw(changes(program))).items():
        *groups, key = name.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        try:
            place[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            place[key] = value
    Path("c.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8", errors="replace")
    words = [data.draw(WORDS[program])] if program in WORDS else []
    check(program, [*words, "--config=c.yaml"])


@fuzz(0.04)
@given(words=st.lists(HOSTILE | TEXT | st.just("--"), max_size=4), data=st.data())
def test_any_words_for_the_records_make_one_line(words, data):
    command = data.draw(st.sampled_from(["trials", "compare", "submit", "check", ""]))
    check("record", [*([command] if command else []), *words])


@fuzz(0.04)
@given(prompt=st.text() | st.text().map(lambda text: text * 50), run=st.sampled_from(["lm", "m"]))
def test_any_prompt_is_continued_or_makes_one_line(prompt, run):
    check("generate", [run, "--max_tokens=2"], stdin=prompt)


# ---- files
def mutated(data: bytes, seed: int) -> bytes:
    """Bytes of a file with random damage: replaced, cut, repeated or altered in a few places."""
    rng = random.Random(seed)
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 9)):
        i = rng.randrange(len(damaged) + 1)
        damaged[i : i + rng.choice((0, 1, 20))] = rng.choice(
            (b"", rng.randbytes(1), b"null", b"-1", b"1e999", b"[]", b"{}", b'"', b"\n", b"9" * 25)
        )
    return bytes(damaged)


RUN_FILES = {  # {files of a run: how to read them}
    "config.yaml": ["generate", "score", "resume"],
    "tokenizer/tokenizer.json": ["generate"],
    "tokenizer/tokenizer_config.json": ["generate"],
    "model.safetensors": ["generate", "resume"],
    "optimizer.pt": ["resume"],
    "state.json": ["generate", "resume"],
    "summary.json": ["resume"],
    "metrics.jsonl": ["resume"],
    "env.json": ["generate", "resume"],
}


@fuzz(0.16)
@given(
    file=st.sampled_from(sorted(RUN_FILES)),
    source=st.sampled_from(["lm", "m"]),
    seed=st.integers(0, 2**32),
)
def test_a_damaged_run_is_read_or_makes_one_line(file, source, seed):
    run = Path("runs/bad")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(Path("runs") / source, run)
    path = run / file
    if "." in file and not path.exists() and "/" not in file:
        path = checkpoints(run)[-1] / file
    path.write_bytes(mutated(path.read_bytes(), seed))
    how = random.Random(seed).choice(RUN_FILES[file])
    if how == "resume":
        if file != "summary.json":
            (run / "summary.json").unlink(missing_ok=True)
        check("llm" if source == "lm" else "multimodal", ["--run=bad", "--resume"])
    elif how == "score":
        check("score", ["bad", "--n=2", "--n_classify=0"])
    else:
        check("generate", ["bad", "--prompt=a fox", "--max_tokens=2"])


@fuzz(0.04)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_a_damaged_record_is_valid_or_makes_one_line_per_problem(data, seed):
    shutil.rmtree("docs", ignore_errors=True)
    shutil.copytree(ROOT / "docs", "docs")
    files = [path for path in Path("docs/records").rglob("*") if path.is_file()]
    path = data.draw(st.sampled_from(sorted(files)))
    path.write_bytes(mutated(path.read_bytes(), seed))
    done = run_program("record", ["check"])
    assert done.code in (0, 2), done
    assert all(line.startswith("error: ") for line in done.err.splitlines()), done.err


@pytest.fixture(scope="module")
def samples(workspace) -> dict[str, bytes]:
    """An intact file of each format that users supply, by suffix."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    Path("formats").mkdir()
    texts = sentences(40)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "formats/a.parquet")
    write_jsonl("formats/a.jsonl", texts)
    Path("formats/a.txt").write_text("\n".join(texts))
    for suffix in ("png", "jpg", "gif"):
        Image.effect_noise((32, 32), 50).convert("L").save(f"formats/a.{suffix}")
    return {path.suffix: path.read_bytes() for path in Path("formats").iterdir()}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt", ".json", ".md"])
@fuzz(0.02)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_text_file_is_trained_on_or_makes_one_line(samples, suffix, seed):
    shutil.rmtree("texts", ignore_errors=True)
    Path("texts").mkdir()
    intact = samples.get(suffix) or samples[".txt"]
    Path(f"texts/a{suffix}").write_bytes(mutated(intact, seed))
    flags = REQUIRED["llm"] | {"data.source": "texts", "data.val_tokens": "40"}
    flags |= {"data.tokenizer": "tok", "data.cache": "texts/cache", "allow_repeat": "true"}
    if not Path("tok").exists():
        shutil.copytree("runs/lm/tokenizer", "tok")
    check("llm", [f"--{name}={value}" for name, value in flags.items()])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif"])
@fuzz(0.02)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_image_is_trained_on_or_makes_one_line(samples, suffix, seed):
    shutil.rmtree("images", ignore_errors=True)
    Path("images").mkdir()
    for i in range(3):
        Path(f"images/{i}{suffix}").write_bytes(samples[suffix] + bytes(i))
    Path(f"images/bad{suffix}").write_bytes(mutated(samples[suffix], seed))
    flags = REQUIRED["vqvae"] | {"data.source": "images", "data.cache": "images-cache"}
    flags |= {"data.val_source": "images", "model.codebook_size": "4"}
    check("vqvae", [f"--{name}={value}" for name, value in flags.items()])
    shutil.rmtree("images-cache", ignore_errors=True)
