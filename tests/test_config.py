import dataclasses
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, flags, flags_of, script, train

import generate
import train_llm
import train_multimodal
import train_vqvae
from common.config import HumanInt, UserError, load_config, run_script, to_plain
from common.run import check_run, open_run
from model import Llama
from vqvae import VQVAE

CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
STAGES = {"llm": train_llm, "vqvae": train_vqvae, "multimodal": train_multimodal}


def stage_of(path: Path):
    return STAGES[path.stem.split("_")[0]]


# ---- numbers
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
def test_integers_may_be_written_with_a_suffix(written, number):
    assert HumanInt(written) == number


@pytest.mark.parametrize("written", ["20X", "1.5", "M", "", "1e-3", "20MM"])
def test_other_text_is_not_an_integer(written):
    with pytest.raises(ValueError, match="is not an integer"):
        HumanInt(written)


# ---- files and flags
@pytest.mark.parametrize("files", [["--config", "c.yaml"], ["--config=c.yaml"]])
def test_flags_override_files_wherever_they_stand(workdir, files):
    Path("c.yaml").write_text("tokens: 20M\nadamw_wd: 3e-4\nmodel:\n  n_layers: 3\n  d_ff: 64\n")
    Path("later.yaml").write_text("muon_lr: 0.5\n")
    argv = ["--model.d_ff", "96", *files, "--muon_lr", "1e-2", "--config", "later.yaml"]
    cfg = load_config(train_llm.Config, argv)
    values = (cfg.tokens, cfg.adamw_wd, cfg.muon_lr, cfg.model.n_layers, cfg.model.d_ff)
    assert values == (20_000_000, 3e-4, 0.01, 3, 96)


def test_settings_that_are_not_given_keep_their_defaults(workdir):
    cfg = load_config(train_llm.Config, ["--model.d_ff", "96"])
    assert cfg.model.n_heads == train_llm.Config().model.n_heads


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_makes_a_model_of_at_most_90m_parameters(path):
    module = stage_of(path)
    cfg = load_config(module.Config, ["--config", str(path)])
    module.resolve_recipe(cfg)
    with torch.device("meta"):
        model = VQVAE(cfg.model) if module is train_vqvae else Llama(cfg.model)
    assert 1e5 < sum(p.numel() for p in model.parameters()) < 90e6


@pytest.mark.parametrize("name", ["llm_88m", "vqvae_cifar10", "multimodal_cifar10"])
def test_the_reference_files_equal_the_defaults(name):
    path = ROOT / f"configs/{name}.yaml"
    config_class = stage_of(path).Config
    assert load_config(config_class, ["--config", str(path)]) == config_class()


def test_the_multimodal_model_has_40m_parameters():
    with torch.device("meta"):
        model = Llama(train_multimodal.Config().model)
    assert 39e6 < model.n_params() < 41e6


@pytest.mark.parametrize(
    "name, text_tokens", [("cifar10", 49_152), ("cifar10_32", 400), ("demo", 400)]
)
def test_the_multimodal_model_fits_the_image_tokenizer(name, text_tokens):
    multimodal, vqvae = (
        load_config(module.Config, ["--config", str(ROOT / f"configs/{stage}_{name}.yaml")]).model
        for stage, module in (("multimodal", train_multimodal), ("vqvae", train_vqvae))
    )
    assert multimodal.vocab_size == text_tokens + 2 + vqvae.codebook_size
    assert vqvae.grid**2 == multimodal.n_image_positions < multimodal.seq_len


@pytest.mark.parametrize("stage", STAGES)
def test_the_resolved_config_of_a_run_gives_the_same_run(workdir, stage):
    module = STAGES[stage]
    cfg = load_config(module.Config, flags_of(module, run="a"))
    module.resolve_recipe(cfg)
    open_run(cfg, check_run(cfg), lambda folder: None).release()
    again = load_config(module.Config, ["--config", "runs/a/config.yaml"])
    module.resolve_recipe(again)
    assert to_plain(again) == to_plain(cfg)
    assert again.stage == stage


def test_the_config_of_another_stage_is_refused(workdir):
    train(run="a", tokens=256)
    with pytest.raises(UserError, match="--stage: .*llm"):
        load_config(train_vqvae.Config, ["--config", "runs/a/config.yaml"])


# ---- recipe
@pytest.mark.parametrize(
    "tokens, steps, batch_tokens, muon_lr, adamw_lr",
    [("8M", 976, 8192, 0.015, 0.01122), ("1B", 61_035, 16_384, 0.00781, 0.00305)],
)
def test_the_recipe_follows_from_the_budget(tokens, steps, batch_tokens, muon_lr, adamw_lr):
    cfg = train_llm.Config(tokens=HumanInt(tokens))
    assert train_llm.resolve_recipe(cfg) == steps
    assert cfg.batch_tokens == batch_tokens
    assert (cfg.muon_lr, cfg.adamw_lr) == pytest.approx((muon_lr, adamw_lr), rel=1e-2)
    assert cfg.muon_lr * cfg.muon_wd * steps == pytest.approx(2)


def test_the_learning_rate_of_embeddings_grows_with_the_square_root_of_depth():
    shapes = [dataclasses.replace(train_llm.Config().model, n_layers=n) for n in (6, 24)]
    shallow, deep = (train_llm.Config(model=shape) for shape in shapes)
    for cfg in (shallow, deep):
        train_llm.resolve_recipe(cfg)
    assert (shallow.adamw_lr, deep.adamw_lr) == pytest.approx((0.006, 0.012))


@pytest.mark.parametrize("tokens, half_life", [("8M", 1e6), ("1B", 5e6)])
def test_the_half_life_of_the_second_moment_follows_from_the_budget(tokens, half_life):
    cfg = train_llm.Config(tokens=HumanInt(tokens))
    train_llm.resolve_recipe(cfg)
    assert cfg.adamw_beta2 ** (half_life / cfg.batch_tokens) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "tokens, momentum", [("1M", 0.9201), ("100k", 0.9), ("20M", 0.9361), ("1B", 0.95)]
)
def test_the_momentum_follows_from_the_steps(tokens, momentum):
    cfg = train_llm.Config(tokens=HumanInt(tokens))
    cfg.model.seq_len = 256 if tokens == "1M" else cfg.model.seq_len
    train_llm.resolve_recipe(cfg)
    assert cfg.muon_momentum == pytest.approx(momentum, abs=1e-4)


def test_the_weight_decay_of_a_short_run_is_capped():
    cfg = train_llm.Config(tokens=HumanInt("100k"))
    assert train_llm.resolve_recipe(cfg) == 48
    assert cfg.muon_lr * cfg.muon_wd == pytest.approx(0.02)


# ---- wrong input
BAD = {
    "--modle.n_layers=3": "modle.n_layers",
    "--model.n_layer=3": "did you mean --model.n_layers?",
    "--tokens=20X": "'20X' is not an integer",
    "--model.n_layers=2.5": "--model.n_layers: Expected a <class 'int'>. Got value: 2.5",
    "--muon_lr=fast": "--muon_lr: ",
    "--tokens=-5": "--tokens is -5",
    "--tokens=0": "--tokens is 0",
    "--model.d_ff=0": "model.d_ff is 0",
    "--model.n_kv_heads=3": "n_heads 4 is not divisible by model.n_kv_heads 3",
    "--model.vocab_size=70000": "uint16",
    "--batch_tokens=100": "100 is not divisible by --model.seq_len 32; set it to 128",
    "--micro_batch=3": "3 does not divide the 4 sequences",
    "--micro_batch=0": "--micro_batch is 0",
    "--config=none.yaml": "none.yaml",
    "--cooldown_frac=2": "--cooldown_frac is 2.0; it must be between 0 and 1",
    "--adamw_beta2=1": "--adamw_beta2 is 1.0; it must be at least 0 and less than 1",
    "--muon_momentum=-0.1": "--muon_momentum is -0.1; it must be at least 0 and less than 1",
    "--short_seq_frac=2": "--short_seq_frac is 2.0; it must be between 0 and 1",
    "--device=gpu": "--device gpu",
    "--run=a/b": "'a/b' is not a valid name",
    "--tokens=100": "less than one step",
    "--data.val_fraction=1": "val_fraction",
    "--data.source=none.parquet": "none.parquet",
    "--data.tokenizer=bpe-5": "257",
    "--model.vocab_size=299": "--model.vocab_size is 299",
    "--tokens=1M": "; set --tokens ",
    "--run=taken": "add --resume, choose another --run",
    "--data.val_source=empty.txt": "empty.txt",
    "--seed=-1": "--seed is -1",
    "--model.n_image_positions=4": "a language model has no image positions; set it to 0",
    "--model.canon=32": "model.canon is 32",
    "--model.pointer=-1": "model.pointer is -1",
    "--stage=vqvae": "--stage: ",
}


@pytest.mark.parametrize("flag", BAD)
def test_wrong_input_is_one_line_and_leaves_nothing_behind(workdir, flag):
    Path("runs/taken").mkdir(parents=True)
    Path("empty.txt").write_text("")
    with pytest.raises(UserError) as error:
        train_llm.main(load_config(train_llm.Config, [*flags(run="new"), flag]))
    assert BAD[flag] in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("runs/new").exists()
    assert not list(Path("runs/taken").iterdir())


def test_an_unknown_setting_in_a_file_is_refused(workdir):
    Path("c.yaml").write_text("model:\n  n_layer: 3\n")
    with pytest.raises(UserError, match="n_layer.*did you mean --model.n_layers"):
        load_config(train_llm.Config, ["--config", "c.yaml"])


def test_wrong_input_ends_a_script_with_exit_code_2(workdir):
    done = script("train_llm.py", "--tokens", "20X")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: --tokens: .*'20X' is not an integer; .*\n", done.stderr)


def test_out_of_memory_names_the_flag_to_lower(monkeypatch, capsys):
    def main(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("sys.argv", ["train_llm.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main, train_llm.Config)
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(r"error: out of memory .*lower --micro_batch.*\n", errors)


# ---- help
def setting_values(config, prefix: str = "") -> dict:
    """{name: default} of every setting, with those of data and model."""
    values = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        is_group = dataclasses.is_dataclass(value)
        values |= setting_values(value, f"{name}.") if is_group else {name: value}
    return values


@dataclasses.dataclass
class Help:
    """What `--help` of a script prints, as one line and as {setting: its lines as one}."""

    program: str
    defaults: dict
    purpose: str
    line: str
    entries: dict[str, str]


@pytest.fixture(scope="module", params=[train_llm, train_vqvae, train_multimodal, generate])
def printed(request):
    module, program = request.param, f"{request.param.__name__}.py"
    text = script(program, "--help").stdout
    blocks = [block.split("\n\n")[0].split() for block in re.split(r"\n  (?=\S)", text)]
    entries = {words[0].removeprefix("--").rstrip(","): " ".join(words) for words in blocks}
    config = module.Config("") if module is generate else module.Config()
    purpose = " ".join(module.__doc__.split("\n\n")[0].split())
    return Help(program, setting_values(config), purpose, " ".join(text.split()), entries)


@pytest.mark.parametrize("line", ['cache: "a\\0b"', 'source: {"a\\0b": 1.0}'])
def test_a_nul_character_in_a_file_of_settings_is_refused(workdir, line):
    Path("c.yaml").write_text(f"data: {{{line}}}\n")
    with pytest.raises(UserError, match="remove the NUL character"):
        load_config(train_llm.Config, ["--config", "c.yaml"])


@pytest.mark.parametrize(
    "words, advice",
    [
        (["configs/llm_demo.yaml"], "did you mean --config configs/llm_demo.yaml"),
        (["--data.source", "a.txt", "b.txt"], "a pattern such as 'books/\\*.txt' in quotes"),
    ],
)
def test_a_word_that_belongs_to_no_flag_is_explained(words, advice):
    with pytest.raises(UserError, match=advice):
        load_config(train_llm.Config, words)


def test_help_lists_every_setting(printed):
    assert [name for name in printed.defaults if name not in printed.entries] == []


def test_help_explains_every_setting_in_sentences(printed):
    entries = {name: printed.entries[name] for name in printed.defaults}
    sentences = re.compile(r"\S+ .*?[A-Z].{9,}[.] [(]type: .+, default: .*[)]")
    assert [name for name, entry in entries.items() if not sentences.fullmatch(entry)] == []


def test_help_ends_every_entry_with_the_default(printed):
    simple = {n: v for n, v in printed.defaults.items() if isinstance(v, int | float | str)}
    ends = {name: f"default: {value})".replace(" ", "") for name, value in simple.items()}
    entries = {name: printed.entries[name].replace(" ", "") for name in simple}  # breaks at hyphens
    assert [name for name in simple if not entries[name].endswith(ends[name])] == []


def test_help_starts_with_the_name_of_the_script(printed):
    assert printed.line.startswith(f"usage: {printed.program} ")


def test_help_has_the_purpose_of_the_script(printed):
    assert printed.purpose in printed.line.replace("- ", "-")  # argparse breaks lines at hyphens
