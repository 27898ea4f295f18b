"""Every remedy that an error message gives is followed: the failing command, then the advised one.

A row has a name, the failing command, what its message must say, and the advised change: flags that
are appended to the command (later flags win) with groups of the message filled in, a whole command,
or a function that does what the message says by hand before the command is repeated.
"""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from helpers import MODULES, flags_of, sentences, train_stage, write_jsonl
from PIL import Image

import generate
from common.config import run_script
from common.run import checkpoints
from tools import record, score_images

PROGRAMS = {f"train_{stage}.py": (m.main, m.Config) for stage, m in MODULES.items()}
PROGRAMS |= {"generate.py": (generate.main, generate.Config)}
PROGRAMS |= {"score_images": (score_images.main, score_images.Config)}
PROGRAMS |= {"record": (record.main, None)}
SHORT = {"llm": {"tokens": 640}, "vqvae": {"images": 40}, "multimodal": {"sequences": 16}}


def run(command: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    program, *words = command
    main, config = PROGRAMS[program]
    monkeypatch.setattr(sys, "argv", [program, *words])
    capsys.readouterr()
    try:
        run_script(main, config)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def new(stage: str, *words: str, **changes) -> list[str]:
    """The command of a short run `b` of a stage."""
    settings = {"run": "b", **SHORT[stage], **changes}
    if stage == "multimodal":
        settings.setdefault("vqvae", "v")
    return [f"train_{stage}.py", *flags_of(MODULES[stage], **settings), *words]


llm, vqvae, multimodal = ((lambda *w, s=s, **k: new(s, *w, **k)) for s in MODULES)
RESUME = ["train_llm.py", "--run=a", "--resume"]
PROMPT = "generate.py a --prompt 'a fox' --max_tokens 3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a corpus, images, a VQ-VAE `v`, a language model `a` and image models `m`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_jsonl("corpus.jsonl", sentences(300))
        write_jsonl("few.jsonl", sentences(6))
        for i in range(12):
            Path(f"pets/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
            color = (20 * i, 255 - 20 * i, 7 * i)
            Image.new("RGB", (32, 32), color).save(f"pets/{'ab'[i % 2]}/{i}.png")
        train_stage(MODULES["vqvae"], run="v", **SHORT["vqvae"])
        train_stage(MODULES["llm"], run="a", save_every=0.4, model__pointer=8, **SHORT["llm"])
        train_stage(MODULES["multimodal"], run="m", vqvae="v", **SHORT["multimodal"])
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


# ---- settings: flags are appended to the command
SETTINGS = [
    # name, command, message, flags
    ("tokens", llm(tokens=64), r"set --tokens to (\d+) or more", "--tokens={0}"),
    ("batch", llm(batch_tokens=100), r"set it to (\d+)", "--batch_tokens={0}"),
    ("eval_tokens", llm(eval_tokens=16), r"seq_len \((\d+)\)", "--eval_tokens={0}"),
    ("few tokens", llm(tokens=640_000), r"set --tokens (\d+), add", "--tokens={0}"),
    ("repeat", llm(tokens=20_000), "pass --(allow_repeat)", "--{0}"),
    ("vocabulary", llm(model__vocab_size=299), r"set it to (\d+) or", "--model.vocab_size={0}"),
    ("micro batch", llm(micro_batch=3), "choose a divisor", "--micro_batch=2"),
    ("heads", llm(model__d_model=36), r"multiple of (\d+)", "--model.d_model={0}"),
    ("kv heads", llm(model__n_kv_heads=3), r"divisor of (\d+)", "--model.n_kv_heads={0}"),
    ("image positions", llm(model__n_image_positions=4), "to 0", "--model.n_image_positions=0"),
    ("schedule", llm(warmup_frac=0.5), "lower one of them", "--warmup_frac=0.1"),
    ("seed", llm(seed=2**32), r"less than 2\^32", f"--seed={2**32 - 1}"),
    ("column", llm(data__text_column="words"), "(text)", "--data.text_column={0}"),
    ("prompt", llm(sample_prompts=f'["{"a fox " * 40}"]'), "shorten it", "--sample_prompts=[a]"),
    (
        "tokenizer",
        llm(data__tokenizer="bpe-9", sample_prompts="[a]"),
        "from (257) to",
        "--data.tokenizer=bpe-{0}",
    ),
    ("tokenizer name", llm(data__tokenizer="bpe"), "bpe-8192", "--data.tokenizer=bpe-300"),
    (
        "validation",
        llm(tokens=128, data__source="few.jsonl", data__val_fraction=0.0001, eval_tokens=32),
        r"--data.val_fraction.*?(0\.\d+)",
        "--data.val_fraction={0}",
    ),
    ("name", llm(run="a"), "choose another --run", "--run=b"),
    ("bad name", llm(run="a/b"), "use up to 100 letters", "--run=b"),
    ("crop", vqvae(crop=6), "multiple of --model.downsample (4)", "--crop=8"),
    ("vqvae micro batch", vqvae(micro_batch=3), "choose a divisor", "--micro_batch=4"),
    (
        "codebook",
        vqvae(model__codebook_size=2000, data__source="pets", data__val_fraction=0.3),
        r"yield only (\d+) vectors; lower --model.codebook_size",
        "--model.codebook_size={0}",
    ),
    ("image vocabulary", multimodal(model__vocab_size=5), r"to (\d+)", "--model.vocab_size={0}"),
    (
        "image grid",
        multimodal(model__n_image_positions=5),
        r"set it to (\d+)",
        "--model.n_image_positions={0}",
    ),
    ("context", multimodal(model__seq_len=64), r"set it to (\d+) plus", "--model.seq_len=100"),
    ("text", multimodal(text_frac=0.01), "both text and images", "--text_frac=0.25"),
    ("subwords", multimodal(model__subwords=4), "set it to 0", "--model.subwords=0"),
    ("pointer", multimodal(model__pointer=8), "set it to 0", "--model.pointer=0"),
    ("vqvae", multimodal(vqvae=""), "pass a run of train_vqvae.py", "--vqvae=v"),
    ("not a vqvae", multimodal(vqvae="a"), "pass one with --vqvae", "--vqvae=v"),
    (
        "initial weights",
        multimodal(init_from="a", data__tokenizer="runs/a/tokenizer", model__value_embed=False),
        r"set (--model\.\w+) (\S+)",
        "--model.n_heads=4 --model.n_kv_heads=2 --model.value_embed=True",
    ),
    (
        "initial tokenizer",
        multimodal("--model.n_heads=4", "--model.n_kv_heads=2", "--init_from=a"),
        r"set --data.tokenizer (\S+)",
        "--data.tokenizer={0}",
    ),
    ("unknown setting", llm("--muon_rate=1"), r"did you mean (--muon_lr)", None),
]


@pytest.mark.parametrize(
    "command, message, advised", [row[1:] for row in SETTINGS], ids=[row[0] for row in SETTINGS]
)
def test_the_advised_setting_works(here, monkeypatch, capsys, command, message, advised):
    if any("text_frac" in word for word in command):
        command = [*command, "--text_source=corpus.jsonl"]
    code, errors = run(command, monkeypatch, capsys)
    found = re.search(message, errors)
    assert code == 2 and found, errors
    if advised is None:  # the flag itself is what was advised
        command, advised = command[:-1], f"{found[1]}=0.01"
    code, errors = run([*command, *advised.format(*found.groups()).split()], monkeypatch, capsys)
    assert code == 0, errors


# ---- runs: what the message says is done by hand, then the command is repeated
def damage(pattern: str) -> None:
    """Flip a byte in the newest file that matches."""
    path = sorted(Path().glob(pattern))[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unfinish(name: str) -> None:
    Path(f"runs/{name}/summary.json").unlink()


def damaged_checkpoint() -> None:
    unfinish("a")
    damage("runs/a/checkpoints/*/model.safetensors")


def damaged_summary() -> None:
    Path("runs/a/summary.json").write_text('{"val')


def damaged_copy_of_the_vqvae() -> None:
    unfinish("m")
    damage("runs/m/vqvae/checkpoints/*/model.safetensors")


def damaged_shard() -> None:
    damage("cache/tokens/train-*/*.bin")


def damaged_tokenizer() -> None:
    # of texts and of captions: which of them comes last differs between machines
    for path in Path("cache/tokenizers").glob("bpe-300-*/tokenizer.json"):
        damage(str(path))


def damaged_metrics() -> None:
    unfinish("a")
    path = Path("runs/a/metrics.jsonl")
    path.write_text("{\n" + path.read_text())


def lost_config() -> None:
    Path("runs/a/config.yaml").unlink()


def unfinished() -> None:
    unfinish("a")


def unreadable_image() -> None:
    Path("pets/a/0.png").write_text("no image")


def nothing() -> None:
    pass


def delete(found: re.Match) -> None:
    path = Path(found[1])
    shutil.rmtree(path) if path.is_dir() else path.unlink()


REPAIRS = [
    # name, fault, command, message with what to delete, command after that (None: the same)
    (
        "checkpoint",
        damaged_checkpoint,
        RESUME,
        r"(\S+0000005) is damaged.*; delete it to use",
        None,
    ),
    ("summary", damaged_summary, RESUME, r"(\S+) is damaged; delete it and resume with", None),
    (
        "copy of the VQ-VAE",
        damaged_copy_of_the_vqvae,
        ["train_multimodal.py", "--run=m", "--resume"],
        "; delete (runs/m/vqvae) to copy it from --vqvae again",
        None,
    ),
    ("shard", damaged_shard, llm(), r"delete (cache/tokens/\S+)", None),
    ("tokenizer", damaged_tokenizer, llm(), r"delete (cache/tokenizers/[\w.-]+)", None),
    (
        "metrics",
        damaged_metrics,
        RESUME,
        r"does not match the checkpoint of step 5; restore it, or delete (\S+)",
        llm(run="a"),
    ),
    ("config", lost_config, RESUME, r"delete (\S+) and omit --resume", llm(run="a")),
    (
        "image",
        unreadable_image,
        vqvae(data__source="pets", data__val_fraction=0.3),
        r"image (\S+) .*remove it",
        None,
    ),
]


@pytest.mark.parametrize(
    "fault, command, message, then", [row[1:] for row in REPAIRS], ids=[row[0] for row in REPAIRS]
)
def test_the_advised_repair_works(here, monkeypatch, capsys, fault, command, message, then):
    fault()
    code, errors = run(command, monkeypatch, capsys)
    found = re.search(message, errors)
    assert code == 2 and found, errors
    delete(found)
    code, errors = run(then or command, monkeypatch, capsys)
    assert code == 0, errors


# ---- commands: the message holds the flags of another command
COMMANDS = [
    # name, fault, command, message, advised command
    (
        "exists",
        unfinished,
        llm(run="a"),
        "add (--resume) to|add (--resume),",
        "train_llm.py --run a --resume",
    ),
    ("missing", nothing, [*RESUME[:1], "--run=b", "--resume"], "omit --resume", shlex.join(llm())),
    (
        "another rate",
        unfinished,
        [*RESUME, "--muon_lr=0.003"],
        r"(--resume runs/a/checkpoints/\d+) --run NEW_NAME",
        "train_llm.py {0} --run b --muon_lr=0.003",
    ),
    (
        "stage",
        nothing,
        ["train_vqvae.py", *RESUME[1:]],
        r"resume it with (\S+)",
        "{0} --run a --resume",
    ),
    (
        "unknown run",
        nothing,
        shlex.split(PROMPT.replace(" a ", " x ")),
        "existing runs: (a), m, v",
        PROMPT,
    ),
    (
        "vqvae alone",
        nothing,
        ["generate.py", "v", "--prompt", "x"],
        "pass a run of train_llm.py",
        PROMPT,
    ),
    (
        "image of a language model",
        nothing,
        shlex.split(f"{PROMPT} --kind image"),
        "pass a run of train_multimodal.py",
        "generate.py m --prompt 'a red circle' --kind image",
    ),
    (
        "suffix",
        nothing,
        shlex.split("generate.py m --prompt 'a red circle' --out x.gif"),
        r"end its name in \.png",
        "generate.py m --prompt 'a red circle' --out x.png",
    ),
    (
        "long prompt",
        nothing,
        ["generate.py", "a", "--prompt", "a fox " * 40],
        "shorten it",
        PROMPT,
    ),
]


@pytest.mark.parametrize(
    "fault, command, message, advised",
    [row[1:] for row in COMMANDS],
    ids=[row[0] for row in COMMANDS],
)
def test_the_advised_command_works(here, monkeypatch, capsys, fault, command, message, advised):
    fault()
    code, errors = run(command, monkeypatch, capsys)
    found = re.search(message, errors)
    assert code == 2 and found, errors
    code, errors = run(shlex.split(advised.format(*found.groups())), monkeypatch, capsys)
    assert code == 0, errors


# ---- faults of the machine
def test_the_command_after_a_loss_that_is_not_finite_works(here, monkeypatch, capsys):
    real, steps = MODULES["llm"].backward, []

    def exploding(*args):
        steps.append(1)
        return real(*args) * (float("nan") if len(steps) > 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(MODULES["llm"], "backward", exploding)
        code, errors = run(llm(save_every=0.4), monkeypatch, capsys)
    assert code == 2
    command = re.search(r"--resume runs/b/checkpoints/\d+ --run b-2 --muon_lr \S+", errors)[0]
    code, errors = run(["train_llm.py", *command.split()], monkeypatch, capsys)
    assert code == 0, errors
    assert json.loads(Path("runs/b-2/summary.json").read_text())["steps"] == 5


def test_compile_false_works_where_compiling_fails(here, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(MODULES["llm"].torch, "compile", lambda model, **_: broken)
    code, errors = run(llm(compile="true"), monkeypatch, capsys)
    assert code == 2
    assert "pass --compile false" in errors
    assert run(llm(compile="false"), monkeypatch, capsys)[0] == 0


def test_a_run_can_be_resumed_after_the_disk_was_full(here, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("common.run.save_file", full)
        code, errors = run(llm(save_every=0.4), monkeypatch, capsys)
    assert code == 2
    advice = re.search("continue with (--run b --resume)", errors)[1]
    assert run(["train_llm.py", *advice.split()], monkeypatch, capsys)[0] == 0
    assert [path.name for path in checkpoints(Path("runs/b"))] == ["0000004", "0000005"]
