import io
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from helpers import noisy, script, sentences, train, write_jsonl

import generate
from common.config import UserError, load_config
from model import Llama, ModelConfig
from sampling import (
    generate_text,
    load_run,
    load_vqvae,
    numbered,
    prompt_ids,
    write_text_samples,
)
from vqvae import VQVAEConfig


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working directory with a language-model run of 50 steps, runs/a."""
    folder = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_jsonl("corpus.jsonl", sentences(300))
        train(run="a", tokens=6400)
    return folder


@pytest.fixture(autouse=True)
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def text_of(*args: str) -> list[str]:
    """Continuations that generate.py returns."""
    return generate.main(load_config(generate.Config, list(args)))


def load(name: str):
    return load_run(name, load_config(generate.Config, [name]))


# ---- finding the run
@pytest.mark.parametrize("place", ["runs/a", "runs/a/checkpoints/0000050", ""])
def test_folder_checkpoint_and_newest_run_give_the_text_of_the_name(place):
    settings = ("--prompt", "a fox", "--max_tokens", "20")
    assert text_of(*filter(None, [place]), *settings) == text_of("a", *settings)


def test_run_takes_precedence_over_a_folder_of_the_same_name(tmp_path, workspace, monkeypatch):
    settings = ("a", "--prompt", "a fox", "--max_tokens", "20")
    expected = text_of(*settings)
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(workspace / "runs")
    Path("a").mkdir()
    assert text_of(*settings) == expected


def test_checkpoint_has_the_weights_of_its_step():
    early, late = load("runs/a/checkpoints/0000045").model, load("a").model
    assert not torch.equal(early.embed.weight, late.embed.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_compute_dtype(dtype):
    cfg = load_config(generate.Config, ["a", "--dtype", dtype])
    assert {p.dtype for p in load_run("a", cfg).model.parameters()} == {getattr(torch, dtype)}


def test_vqvae_has_weights_of_the_compute_dtype_and_fp32_codes(monkeypatch):
    shape = VQVAEConfig(image_size=16, width=8, n_blocks=1, codebook_size=16)
    saved = {"stage": "vqvae", "model": vars(shape)}
    monkeypatch.setattr("sampling.find_run", lambda name: (Path(name), Path(name), saved))
    monkeypatch.setattr("sampling.load_checkpoint", lambda path, vqvae: noisy(vqvae))
    vqvae = load_vqvae("v", torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in vqvae.parameters()} == {torch.bfloat16}
    assert vqvae.quantizer.codes.dtype == torch.float32


# ---- output
def test_single_continuation_is_printed_after_its_prompt_and_nothing_else(capsys):
    (text,) = text_of("a", "--prompt", "a fox", "--max_tokens", "20")
    assert len(text) > 10
    assert capsys.readouterr().out == f"a fox{text}\n"


def test_several_continuations_are_printed_under_numbers(capsys):
    texts = text_of("a", "--prompt", "a fox", "--n", "2", "--max_tokens", "20")
    expected = f"--- 1/2\na fox{texts[0]}\n--- 2/2\na fox{texts[1]}\n"
    assert capsys.readouterr().out == expected


def test_continuations_of_one_prompt_differ_and_do_not_depend_on_n_or_their_place():
    settings = ("a", "--prompt", "a fox", "--max_tokens", "20", "--temperature", "1")
    four = text_of(*settings, "--n", "4")
    assert len(set(four)) > 1
    assert text_of(*settings, "--n", "2") == four[:2]
    assert text_of(*settings, "--seed", "2") == four[2:3]


# ---- prompts
@pytest.mark.parametrize(
    "args, stdin",
    [(["--prompt", "FILE:p.txt"], None), ([], "the Bär\n")],
    ids=["from a file", "from standard input"],
)
def test_prompt_can_come_from_elsewhere(args, stdin):
    Path("p.txt").write_text("the Bär\n")
    settings = ("a", "--temperature", "0", "--max_tokens", "9")
    (text,) = text_of(*settings, "--prompt", "the Bär")
    done = script("generate.py", *settings, *args, input=stdin)
    assert (done.stdout, done.returncode) == (f"the Bär{text}\n", 0), done.stderr


def test_prompt_may_fill_the_context_with_its_end_of_text_token():
    assert text_of("a", "--prompt", "q" * 31, "--max_tokens", "5") == [""]


def test_prompt_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="33 tokens, but the model's context is 32; shorten it"):
        text_of("a", "--prompt", "q" * 32)


def test_special_tokens_in_a_prompt_are_ordinary_text(monkeypatch):
    loaded, prompts = load("a"), []
    stub_generation(loaded.model, [])
    generate_stub = loaded.model.generate
    loaded.model.generate = lambda prompt, *args, **options: (
        prompts.append(prompt[0].tolist()) or generate_stub(prompt, *args, **options)
    )
    end = loaded.tokenizer.eos_token
    settings = {"seed": 0, "max_tokens": 9, "temperature": 1}
    generate_text(loaded.model, loaded.tokenizer, f"a{end}b", 1, **settings)
    assert prompts[0].count(loaded.tokenizer.eos_token_id) == 1  # only the one in front
    assert loaded.tokenizer.decode(prompts[0][1:]) == f"a{end}b"


# ---- files
@pytest.mark.parametrize("prompt", ["漢" * 300, "🐸" * 300, "x" * 300, "a\0b", "../../x"])
def test_the_default_file_of_an_image_is_below_the_run_and_has_a_valid_name(tmp_path, prompt):
    cfg = load_config(generate.Config, ["a", "--seed", str(2**62)])
    path = generate.image_path(cfg, tmp_path, prompt)
    assert path.parent == tmp_path / "generated"
    path.write_bytes(b"")  # raises for a name that the file system refuses


@pytest.mark.parametrize("n", ["1", "2"])
def test_the_test_for_writing_an_image_leaves_no_file(tmp_path, n):
    cfg = load_config(generate.Config, ["a", "--n", n, "--out", str(tmp_path / "new/x.png")])
    generate.image_path(cfg, tmp_path, "x")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---- decoding
def stub_generation(model, rows: list[list[int]]) -> None:
    """Let the model generate these tokens, one row per position."""
    model.generate = lambda prompt, *_, **__: iter([prompt.new_tensor(row) for row in rows])


@pytest.mark.parametrize(
    "keep, expected",
    [
        (slice(None), "x🐸y"),
        (slice(0, -2), "x"),  # the emoji is cut off
        ([0, 2, -1], "xy"),  # a stray byte of the emoji
    ],
    ids=["whole", "cut off", "stray byte"],
)
def test_only_complete_characters_are_written(keep, expected):
    loaded = load("a")
    ids = torch.tensor(loaded.tokenizer("x🐸y")["input_ids"])
    assert len(ids) > 4  # the emoji is several byte tokens
    stub_generation(loaded.model, ids[keep][:, None].tolist())
    out, settings = io.StringIO(), {"seed": 0, "max_tokens": 9, "temperature": 1}
    texts = generate_text(loaded.model, loaded.tokenizer, "", 1, **settings, out=out)
    assert texts == [expected]
    assert out.getvalue() == expected


def test_continuation_ends_at_end_of_text():
    loaded = load("a")
    a, b = loaded.tokenizer("ab")["input_ids"]
    end = loaded.tokenizer.eos_token_id
    stub_generation(loaded.model, [[a, a], [b, end], [end, b], [a, a]])
    settings = {"seed": 0, "max_tokens": 9, "temperature": 1}
    assert generate_text(loaded.model, loaded.tokenizer, "", 2, **settings) == ["ab", "a"]


def test_generation_stops_soon_after_all_continuations_have_ended():
    loaded = load("a")
    a, end = *loaded.tokenizer("a")["input_ids"], loaded.tokenizer.eos_token_id
    rows = chain([[a, end], [end, a]], repeat([a, a]))  # infinite
    loaded.model.generate = lambda prompt, *_, **__: (prompt.new_tensor(row) for row in rows)
    settings = {"seed": 0, "max_tokens": 9, "temperature": 1}
    assert generate_text(loaded.model, loaded.tokenizer, "", 2, **settings) == ["a", ""]


def test_stream_shows_each_token_before_the_next_is_generated():
    loaded, out, shown = load("a"), io.StringIO(), []
    ids = loaded.tokenizer("fox")["input_ids"]

    def generate_slowly(prompt, *_, **__):
        for token in ids:
            shown.append(out.getvalue())
            yield prompt.new_tensor([token])

    loaded.model.generate = generate_slowly
    settings = {"seed": 0, "max_tokens": 9, "temperature": 1}
    generate_text(loaded.model, loaded.tokenizer, "a ", 1, **settings, out=out)
    expected = [f"a {loaded.tokenizer.decode(ids[:n])}" for n in range(len(ids))]
    assert shown == expected


def test_decoding_steps_are_recorded_for_the_device(monkeypatch):
    recorded = []

    def record(step, device):
        recorded.append(device)
        step()
        return step

    monkeypatch.setattr("generate.record_kernels", record)
    text_of("a", "--prompt", "a fox", "--max_tokens", "5")
    text_of("a", "--prompt", "a fox", "--max_tokens", "5", "--cuda_graphs", "false")
    assert recorded == [torch.device("cpu")]


# ---- samples at an evaluation
def random_model(dtype: torch.dtype = torch.float32) -> Llama:
    """A model with every option of text models and the vocabulary of the run's tokenizer."""
    shape = {"vocab_size": 300, "d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    shape |= {"d_ff": 32, "seq_len": 32, "subwords": 8, "value_embed": True, "canon": 2}
    shape |= {"pointer": 8}
    model = noisy(Llama(ModelConfig(**shape), compute_dtype=dtype))
    model.embed.weight.data *= 0.3  # less certain of the next token
    return model


def test_samples_are_those_of_every_prompt_alone(tmp_path):
    """Two prompts have the same length and form a batch."""
    model, tokenizer, prompts = random_model(), load("a").tokenizer, ["qz", "qqz", "zq"]
    lengths = [len(prompt_ids(tokenizer, prompt, 32)) for prompt in prompts]
    assert lengths[0] == lengths[2] != lengths[1]
    write_text_samples(tmp_path / "x.txt", model, tokenizer, prompts, 9, seed=1)
    settings = {"seed": 1, "max_tokens": 9, "temperature": 0.8}
    alone = [generate_text(model, tokenizer, prompt, 1, **settings)[0] for prompt in prompts]
    assert alone[0] != alone[2]
    assert (tmp_path / "x.txt").read_text() == "\n".join(numbered(prompts, alone)) + "\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_leave_training_alone(dtype, tmp_path):
    model, tokenizer = random_model(dtype), load("a").tokenizer
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    write_text_samples(tmp_path / "x.txt", model, tokenizer, ["a fox"], 9, seed=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = torch.arange(20)[None]
    model(x, x).backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- errors
@pytest.mark.parametrize(
    "args, message",
    [
        (["nobody"], "there is no run 'nobody'; existing runs: a"),
        (["runs"], "runs has no checkpoint; train it first"),
        (["a", "--n", "0"], "--n is 0; it must be positive"),
        (["a", "--max_tokens", "0"], "--max_tokens is 0; it must be positive"),
        (["a", "--temperature", "-1"], "--temperature is -1.0; it must not be negative"),
        (["a", "--top_k", "-1"], "--top_k is -1; it must not be negative"),
        (["a", "--top_p", "0"], "--top_p is 0.0; it must be above 0"),
        (["a", "--kind", "image"], "runs/a is a language model and cannot generate images"),
        (["a", "--out", "x.png"], "runs/a is a language model and cannot generate images"),
        (["a", "--prompt", "FILE:none.txt"], "--prompt FILE:none.txt cannot be read"),
    ],
)
def test_invalid_input_is_a_one_line_error(args, message):
    prompt = [] if "--prompt" in args else ["--prompt", "x"]
    with pytest.raises(UserError) as error:
        text_of(*args, *prompt)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
