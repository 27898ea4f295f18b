import dataclasses
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flags, script

import generate
import train_llm
import train_multimodal
import train_vqvae
from common import (
    Count,
    UserError,
    check_run,
    load_config,
    milestones,
    open_run,
    ramp,
    run_script,
    to_plain,
    trapezoid,
)
from model import Llama
from tools import bench, record, score_images
from vqvae import VQVAE

CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


@pytest.mark.parametrize(
    "written, number",
    [
        ("20M", 20_000_000),
        ("300k", 300_000),
        ("1B", 10**9),
        ("1.5M", 1_500_000),
        ("8_192", 8192),
        ("1e6", 10**6),
        (7, 7),
    ],
)
def test_counts(written, number):
    assert Count(written) == number


@pytest.mark.parametrize("written", ["20X", "1.5", "M", "", "1e-3", "20MM"])
def test_what_is_no_count(written):
    with pytest.raises(ValueError, match="is no count"):
        Count(written)


def test_flags_go_before_the_file_and_the_file_before_defaults(workdir):
    Path("c.yaml").write_text("tokens: 20M\nadamw_wd: 3e-4\nmodel:\n  n_layers: 3\n  d_ff: 64\n")
    Path("later.yaml").write_text("muon_lr: 0.5\nadamw_wd: 3e-4\n")
    for files in (["--config", "c.yaml"], ["--config=c.yaml"]):
        cfg = load_config(
            train_llm.Config,
            [*files, "--model.d_ff", "96", "--muon_lr", "1e-2", "--config", "later.yaml"],
        )
        assert cfg == load_config(
            train_llm.Config,
            ["--model.d_ff=96", *files, "--config=later.yaml", "--muon_lr", "1e-2"],
        )
    assert (cfg.tokens, cfg.adamw_wd, cfg.muon_lr, cfg.model.n_layers, cfg.model.d_ff) == (
        20_000_000,
        3e-4,
        0.01,
        3,
        96,
    )
    assert cfg.model.n_heads == train_llm.Config().model.n_heads


STAGES = {"llm": train_llm, "vqvae": train_vqvae, "multimodal": train_multimodal}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_makes_a_model(path):
    module = STAGES[path.stem.split("_")[0]]
    cfg = load_config(module.Config, ["--config", str(path)])
    module.resolve_recipe(cfg)
    with torch.device("meta"):
        model = VQVAE(cfg.model) if module is train_vqvae else Llama(cfg.model)
    assert 1e5 < sum(p.numel() for p in model.parameters()) < 90e6


@pytest.mark.parametrize("name", ["llm_88m", "vqvae_cifar10", "multimodal_cifar10"])
def test_the_real_files_say_what_the_defaults_are(name):
    module = STAGES[name.split("_")[0]]
    assert (
        load_config(module.Config, ["--config", str(ROOT / f"configs/{name}.yaml")])
        == module.Config()
    )


def test_the_multimodal_model_has_40m_parameters_and_fits_the_visual_tokenizer():
    config, vqvae = train_multimodal.Config().model, train_vqvae.Config().model
    with torch.device("meta"):
        assert 39e6 < Llama(config).n_params() < 41e6
    assert (
        config.vocab_size == 49_152 + 2 + vqvae.codebook_size
        and vqvae.grid**2 == 1024 < config.seq_len
    )


def test_resolved_config_of_a_run_gives_the_same_run(workdir):
    cfg = load_config(train_llm.Config, flags(muon_lr=3e-4, run="a"))
    train_llm.resolve_recipe(cfg)
    open_run(cfg, check_run(cfg))
    again = load_config(train_llm.Config, ["--config", "runs/a/config.yaml"])
    train_llm.resolve_recipe(again)
    assert to_plain(again) == to_plain(cfg) and "auto" not in (
        cfg.muon_wd,
        cfg.adamw_lr,
        cfg.adamw_beta2,
    )


BAD = {
    "--modle.n_layers=3": "modle.n_layers",
    "--model.n_layer=3": "did you mean model.n_layers?",
    "--tokens=20X": "'20X' is no count",
    "--model.n_layers=2.5": "--model.n_layers: Expected a <class 'int'>. Got value: 2.5",
    "--muon_lr=fast": "--muon_lr: ",
    "--tokens=-5": "--tokens is -5",
    "--tokens=0": "--tokens is 0",
    "--model.d_ff=0": "model.d_ff is 0",
    "--model.n_kv_heads=3": "n_heads 4 is not divisible by model.n_kv_heads 3",
    "--model.vocab_size=70000": "uint16",
    "--batch_tokens=100": "100 is not divisible by --model.seq_len 32: set it to 128",
    "--micro_batch=3": "3 does not divide the 4 sequences",
    "--micro_batch=0": "--micro_batch is 0",
    "--config=none.yaml": "none.yaml",
    "--cooldown_frac=2": "--cooldown_frac 2.0 is no share",
    "--device=gpu": "--device gpu",
    "--run=a/b": "'a/b' is no name",
    "--tokens=100": "less than one step",
    "--data.val_fraction=1": "val_fraction",
    "--data.source=none.parquet": "none.parquet",
    "--data.tokenizer=bpe-5": "257",
    "--model.vocab_size=299": "--model.vocab_size is 299",
    "--tokens=1M": "lower the budget to",
    "--run=taken": "--resume, choose another --run",
    "--data.val_source=empty.txt": "empty.txt",
    "--seed=-1": "--seed is -1",
    "--model.cells=4": "--model.cells 4: text has no cells",
    "--model.canon=32": "model.canon is 32",
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_input_is_one_clear_line(workdir, flag):
    Path("runs/taken").mkdir(parents=True)
    Path("empty.txt").write_text("")
    with pytest.raises(UserError) as error:
        train_llm.main(load_config(train_llm.Config, [*flags(run="new"), flag]))
    assert BAD[flag] in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs/new").exists() and not list(Path("runs/taken").iterdir())


def test_unknown_key_in_a_file_is_refused(workdir):
    Path("c.yaml").write_text("model:\n  n_layer: 3\n")
    with pytest.raises(UserError, match="n_layer.*did you mean model.n_layers"):
        load_config(train_llm.Config, ["--config", "c.yaml"])


def test_bad_input_ends_a_script_with_one_line_and_code_2(workdir):
    done = script("train_llm.py", "--tokens", "20X")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: --tokens: .*'20X' is no count: .*\n", done.stderr)


def test_out_of_memory_names_the_flag_to_lower(monkeypatch, capsys):
    def main(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("sys.argv", ["train_llm.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(train_llm.Config, main)
    assert stop.value.code == 2 and re.fullmatch(
        r"error: out of memory .*lower --micro_batch.*\n", capsys.readouterr().err
    )


def test_help_lists_every_setting_with_its_default(workdir):
    done = script("train_llm.py", "--help")
    for field in dataclasses.fields(train_llm.Config):
        assert f"--{field.name}" in done.stdout
    assert "--model.n_layers" in done.stdout and "Query heads. (type: int, default: 8)" in " ".join(
        done.stdout.split()
    )


def test_schedules():
    factors = [trapezoid(step / 100, 0.1, 0.4, 0.05) for step in range(1, 101)]
    assert (
        factors[0] == pytest.approx(0.1)
        and factors[9:60] == [1.0] * 51
        and factors[-1] == pytest.approx(0.05)
    )
    assert all(a > b for a, b in zip(factors[60:], factors[61:])) and all(
        a < b for a, b in zip(factors[:9], factors[1:])
    )
    assert [trapezoid(step / 100, 0, 0, 0) for step in range(1, 101)] == [1.0] * 100
    assert [ramp(p, 0.85, 0.95, 0.2) for p in (0.1, 0.2, 1.0)] == pytest.approx([0.9, 0.95, 0.95])
    assert ramp(0.01, 0.85, 0.95, 0) == 0.95


def test_milestones():
    assert milestones(244, 0.25) == {61, 122, 183, 244}
    assert (
        milestones(10, 0.1) == set(range(1, 11))
        and milestones(7, 0) == {7}
        and milestones(3, 0.1) == {1, 2, 3}
    )


def test_recipe_follows_the_budget():
    small, large = train_llm.Config(), train_llm.Config(tokens=Count("1B"))
    assert (train_llm.resolve_recipe(small), train_llm.resolve_recipe(large)) == (976, 61_035)
    assert (small.batch_tokens, large.batch_tokens) == (8192, 16_384)
    assert (small.muon_lr, small.adamw_lr) == (0.015, 0.006)
    assert (large.muon_lr, large.adamw_lr) == pytest.approx((0.00781, 0.00163), rel=1e-2)
    assert (
        small.muon_lr * small.muon_wd * 976
        == pytest.approx(2)
        == large.muon_lr * large.muon_wd * 61_035
    )
    tiny = train_llm.Config(tokens=Count("100k"))
    assert (
        train_llm.resolve_recipe(tiny) == 48
        and tiny.batch_tokens == 2048
        and tiny.muon_lr * tiny.muon_wd == pytest.approx(0.02)
    )
    assert (
        small.adamw_beta2 ** (1e6 / 8192)
        == pytest.approx(0.5)
        == large.adamw_beta2 ** (5e6 / 16_384)
    )


@pytest.mark.parametrize(
    "page",
    [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "train_llm.py",
        ROOT / "generate.py",
        ROOT / "README_Multimodal.md",
        ROOT / "train_vqvae.py",
        ROOT / "train_multimodal.py",
        ROOT / "tools/bench.py",
        ROOT / "tools/score_images.py",
        ROOT / "tools/record.py",
    ],
    ids=lambda path: path.name,
)
def test_commands_in_the_docs_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = {
        "train_llm.py": train_llm,
        "train_vqvae.py": train_vqvae,
        "train_multimodal.py": train_multimodal,
        "generate.py": generate,
        "-m tools.bench": bench,
        "-m tools.score_images": score_images,
        "-m tools.record trials": SimpleNamespace(Config=record.TrialsConfig),
    }
    commands = re.findall(
        rf"python ({'|'.join(map(re.escape, scripts))})((?:[^\n`#|\\]|\\\n)*)", page.read_text()
    )
    assert commands or page.parent.name == "docs"
    for name, rest in commands:
        arguments = [
            a for a in shlex.split(rest.replace("\\\n", " ")) if a not in ("--resume", "--help")
        ]
        load_config(scripts[name].Config, arguments)
