import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import flags_of, script, sentences, train, train_stage, weights, write_jsonl
from PIL import Image

import common.loop
import generate
import train_multimodal
import train_vqvae
from common.config import UserError, load_config
from common.metrics import evaluations, read_metrics
from common.run import find_run
from pretrained import load_checkpoint_of
from vqvae import VQVAE

PETS = {"data__source": "pets", "data__val_source": "pets_val", "data__augment": "false"}


def write_pets() -> None:
    """Write twelve different images, three of each of four plain colors, to pets/COLOR/*.png, and
    nearly the same to pets_val.
    """
    colors = {
        "red": (220, 30, 30),
        "green": (30, 200, 30),
        "blue": (30, 30, 220),
        "black": (0,) * 3,
    }
    for i in range(12):
        name, color = list(colors.items())[i % 4]
        pixels = np.full((32, 32, 3), color, np.uint8)
        pixels[: 4 * (i // 4), :8] = 255  # a white mark on the left tells them apart
        for folder in ("pets", "pets_val"):
            Path(f"{folder}/{name}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(f"{folder}/{name}/{i}.png")
            pixels[-1, -1] ^= 1


def multimodal(**changes) -> dict:
    return train_stage(train_multimodal, **PETS | {"vqvae": "v"} | changes)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working directory with pets/, a VQ-VAE of them (runs/v) and a corpus.jsonl."""
    folder = tmp_path_factory.mktemp("multimodal")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_pets()
        write_jsonl("corpus.jsonl", sentences(300))
        train_stage(train_vqvae, run="v", images=160, **PETS)
    return folder


@pytest.fixture(autouse=True)
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def summary(workspace) -> dict:
    """The summary of runs/m, which has learned the pets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return multimodal(run="m", sequences=1600, adamw_lr=0.01)


def generated(*args: str) -> Path | list[str]:
    """What generate.py returns for the prompt "a photo of a blue"."""
    prompt = ["--prompt", "a photo of a blue"]
    return generate.main(load_config(generate.Config, [*args, *prompt]))


# ---- training
def test_training_learns_the_images(summary):
    assert summary["val_loss"] < 0.2


@pytest.mark.parametrize(
    "key", ["val_caption_loss", "bits_per_image_token", "best_step", "sequences_per_second"]
)
def test_summary_has_the_key(summary, key):
    assert key in summary


def test_samples_are_generated_at_every_evaluation(summary):
    steps = [row["step"] for row in evaluations(Path("runs/m"))]
    assert len(steps) == 10
    samples = sorted(path.name for path in Path("runs/m/samples").iterdir())
    assert samples == [f"{step:07d}.png" for step in steps]


# ---- generate.py
@pytest.mark.parametrize("seed", range(3))
def test_generated_images_have_the_color_in_the_prompt(summary, tmp_path, seed):
    image = Image.open(generated("m", "--seed", str(seed), "--out", str(tmp_path / "blue.png")))
    mean = np.asarray(image)[:, 16:].mean((0, 1))  # the mark is on the left
    assert np.abs(mean - (30, 30, 220)).max() < 40


def test_several_images_are_saved_as_a_grid_and_one_by_one(summary, tmp_path):
    path = generated("m", "--n", "3", "--out", str(tmp_path / "new/blue.png"))
    assert path == tmp_path / "new/blue.png"
    assert Image.open(path).width > 3 * 32
    assert {p.name for p in (tmp_path / "new/blue").iterdir()} == {"0.png", "1.png", "2.png"}


def test_image_i_of_several_is_the_one_of_seed_i(summary, tmp_path):
    generated("m", "--n", "3", "--out", str(tmp_path / "blue.png"))
    alone = generated("m", "--seed", "2")
    assert alone.parent == Path("runs/m/generated")
    several = Image.open(tmp_path / "blue/2.png")
    assert np.array_equal(np.asarray(Image.open(alone)), np.asarray(several))


@pytest.mark.parametrize(
    "key, value",
    [("prompt", "a photo of a blue"), ("seed", "1"), ("guidance", "3.0"), ("run", "m")],
)
def test_image_files_record_how_they_were_generated(summary, tmp_path, key, value):
    path = generated("m", "--seed", "1", "--out", str(tmp_path / "blue.png"))
    assert Image.open(path).text[key] == value


def test_run_folder_alone_is_enough_to_generate(summary, tmp_path, monkeypatch):
    expected = Image.open(generated("m"))
    shutil.copytree("runs/m", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(np.asarray(Image.open(generated("elsewhere"))), np.asarray(expected))


def test_run_generates_text_too(summary, capsys):
    (text,) = generated("m", "--kind", "text", "--max_tokens", "8")
    assert text
    assert "<" not in text  # no marker, no image token
    assert capsys.readouterr().out == f"a photo of a blue{text}\n"


# ---- resuming and the cache of image tokens
def stop_after_one_step(patch) -> None:
    """Let the next training loop find SIGINT (exit code 130) after its first step."""
    enter = common.loop.Interrupt.__enter__

    def interrupted(self):
        enter(self)
        self.code = 130
        return self

    patch.setattr(common.loop.Interrupt, "__enter__", interrupted)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of images in each call of VQVAE.encode from now on."""
    sizes, encode = [], VQVAE.encode

    def counting(self, images):
        sizes.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(VQVAE, "encode", counting)
    return sizes


def test_run_resumes_bit_for_bit():
    whole = multimodal(run="whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_after_one_step(patch)
        multimodal(run="cut")
    assert stopped.value.code == 130
    assert [path.name for path in Path("runs/cut/checkpoints").iterdir()] == ["0000001"]
    resumed = multimodal(run="cut", resume="true")
    assert read_metrics(Path("runs/cut")) == read_metrics(Path("runs/whole"))
    assert resumed["val_loss"] == whole["val_loss"]


def test_each_image_is_encoded_once(encoded, tmp_path):
    cache = {"data__cache": str(tmp_path)}
    multimodal(run="first", **cache)
    assert sum(encoded) == 12 + 8  # for training and for validation
    multimodal(run="second", **cache)
    assert sum(encoded) == 12 + 8  # for training and for validation


def test_an_unfinished_vqvae_is_announced(capsys):
    shutil.copytree("runs/v", "runs/half")
    multimodal(run="late", sequences=8)
    assert "not finished" not in capsys.readouterr().out
    Path("runs/half/summary.json").unlink()
    multimodal(run="early", vqvae="half", sequences=8)
    assert "note: runs/half is not finished; its checkpoint 0000" in capsys.readouterr().out


def test_another_vqvae_encodes_the_images_again(encoded, tmp_path):
    cache = {"data__cache": str(tmp_path)}
    multimodal(run="before", **cache)
    train_stage(train_vqvae, run="w", images=320, **PETS)
    encoded.clear()
    multimodal(run="after", vqvae="w", **cache)
    assert sum(encoded) == 12 + 8  # for training and for validation


def test_augmented_images_are_encoded_in_every_epoch(encoded, tmp_path):
    multimodal(run="augmented", data__augment="true", data__cache=str(tmp_path))
    assert sum(encoded) == 8 + 64  # 8 for validation, 64 in 5.3 epochs of training


# ---- training options
@pytest.mark.parametrize(
    "caption_dropout, has_caption", [(1, {False}), (0, {True}), (0.5, {True, False})]
)
def test_dropped_captions_are_not_scored(caption_dropout, has_caption):
    run = f"dropout{caption_dropout}"
    settings = {"batch_sequences": 1, "sequences": 30, "eval_every": 0, "sample_n": 0}
    multimodal(run=run, caption_dropout=caption_dropout, **settings)
    rows = read_metrics(Path("runs") / run)
    assert {row["caption_loss"] > 0 for row in rows if "caption_loss" in row} == has_caption


def test_weights_with_the_lowest_validation_loss_are_kept_and_used():
    diverging = {"adamw_lr": 10, "warmup_frac": 1, "cooldown_frac": 0}  # rises until the end
    multimodal(run="unstable", sequences=80, sample_n=0, **diverging)
    losses = {row["step"]: row["val_loss"] for row in evaluations(Path("runs/unstable"))}
    best = min(losses, key=losses.get)
    assert len(losses) == 10
    assert best < 10
    assert find_run("unstable")[1] == Path(f"runs/unstable/best/{best:07d}")
    assert json.loads(Path("runs/unstable/summary.json").read_text())["best_step"] == best


@pytest.fixture(scope="module")
def language_model(workspace) -> dict:
    """Settings of a run that starts from a language model and trains on text and images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        train(run="lm", tokens=1280, model__n_heads=2, model__n_kv_heads=1, model__pointer=8)
    tokenizer = "runs/lm/tokenizer"
    return {"data__tokenizer": tokenizer, "text_frac": 0.25, "text_source": "corpus.jsonl"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__value_embed": "false"}, "set --model.value_embed True"),
        ({"model__canon": 0}, "set --model.canon 3"),
        ({"model__n_heads": 4}, "set --model.n_heads 2"),
        ({"data__tokenizer": "bpe-300"}, "lm has another tokenizer"),
    ],
)
def test_language_model_of_another_shape_is_refused(language_model, changes, message):
    with pytest.raises(UserError, match=message):
        multimodal(run="refused", init_from="lm", **language_model | changes)


def test_run_from_a_language_model_starts_with_its_text_loss(language_model):
    settings = {"sequences": 16, "muon_lr": 1e-9, "adamw_lr": 1e-9, **language_model}
    summary = multimodal(run="from-lm", init_from="lm", caption_weight=0, **settings)
    multimodal(run="from-scratch", **settings)
    (pretrained, _), (random, _) = (
        [row["plain_text_loss"] for row in read_metrics(Path(f"runs/{run}")) if "loss" in row]
        for run in ("from-lm", "from-scratch")
    )
    assert pretrained < random - 0.3
    assert summary["sequences"] == 16  # text and images


def test_run_from_a_language_model_takes_over_every_weight_but_the_pointer(language_model):
    settings = {"sequences": 8, "muon_lr": 1e-12, "adamw_lr": 1e-12, "muon_wd": 0}
    multimodal(run="same", init_from="lm", **settings | language_model)
    ours, theirs = weights("same"), load_checkpoint_of(*find_run("lm"))[0].for_inference()
    expected = {name: weight for name, weight in theirs.state_dict().items() if name in ours}
    assert theirs.state_dict().keys() - expected.keys() == {
        f"pointer.{part}.weight" for part in ("q_proj", "k_proj", "q_norm", "k_norm", "sentinel")
    }
    assert ours.keys() - expected.keys() == {"image_positions.weight"}
    for name, weight in expected.items():
        n = min(len(weight), 300)
        torch.testing.assert_close(ours[name][:n], weight[:n], atol=1e-6, rtol=0)


# ---- errors
@pytest.fixture(scope="module")
def other_runs(workspace, language_model, summary):
    """VQ-VAEs that do not fit the model: runs/coarse has a 4 x 4 grid, runs/few has 8 codes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        train_stage(train_vqvae, run="coarse", images=8, model__downsample=8)
        train_stage(train_vqvae, run="few", images=8, model__codebook_size=8)
        Path("file").write_text("")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--vqvae=coarse", "the VQ-VAE's grid is 4 x 4; set it to 16"),
        ("--vqvae=few", "the 8 codes of the VQ-VAE need 310; set it to 310"),
        ("--vqvae=", "--vqvae is missing; pass a run of train_vqvae.py"),
        ("--vqvae=lm", "runs/lm is not a train_vqvae.py run"),
        ("--init_from=v", "--init_from v: runs/v is not a train_llm.py run"),
        ("--top_p=0", "--top_p is 0.0; it must be positive"),
        ("--model.subwords=5", "--model.subwords is 5, but subword embeddings are for text-only"),
        ("--model.pointer=5", "--model.pointer is 5, but the pointer is for text-only models"),
        (f"--sample_prompts=['{'z' * 99}']", "the prompt has 99 tokens"),
        ("--text_frac=0.01", "--text_frac 0.01 makes 0 of 8 sequences text"),
        ("--caption_dropout=2", "--caption_dropout is 2.0; it must be between 0 and 1"),
    ],
)
def test_invalid_setting_is_a_one_line_error_and_starts_no_run(other_runs, flag, message):
    flags = [*flags_of(train_multimodal, run="new", vqvae="v", **PETS), flag]
    with pytest.raises(UserError) as error:
        train_multimodal.main(load_config(train_multimodal.Config, flags))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("runs/new").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["v"], "runs/v is a VQ-VAE run, which cannot generate by itself"),
        (["m", "--prompt="], "the prompt is empty; describe an image"),
        (["m", "--prompt=\n"], "the prompt is empty; describe an image"),
        (["m", f"--prompt={'z' * 99}"], "the prompt has 99 tokens, but the model takes at most 32"),
        (["m", "--guidance=-1"], "--guidance is -1.0; it must not be negative"),
        (["m", "--n=0"], "--n is 0; it must be positive"),
        (["m", "--out=file/x.png"], "--out file/x.png cannot be written"),
        (["m", "--out=x.gif"], "--out x.gif is not a .png file"),
    ],
)
def test_invalid_request_for_images_is_a_one_line_error_and_writes_no_file(
    other_runs, args, message
):
    before = sorted(Path().rglob("*.*"))
    with pytest.raises(UserError) as error:
        generate.main(load_config(generate.Config, ["--prompt=frog", *args]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(Path().rglob("*.*")) == before


def test_script_reports_a_user_error_on_standard_error_with_exit_code_2(summary):
    done = script("generate.py", "m", "--prompt", "")
    assert done.returncode == 2
    assert done.stderr == "error: the prompt is empty; describe an image\n"
