import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags_of, script, train, train_stage
from PIL import Image
from test_vqvae import noisy

import generate
import train_multimodal
import train_vqvae
from common import UserError, load_config
from data.stream import Stream
from metrics import read_metrics
from model import KVCache, Llama, ModelConfig
from tools import score_images
from vqvae import VQVAE, VQVAEConfig

CODES = VQVAEConfig(image_size=16, downsample=4, codebook_size=16, width=8, n_blocks=1)


class Letters:
    """A tokenizer of single letters: a is 1, b is 2, ...; 0 ends a text."""

    eos_token_id, bos_token_id = 0, None

    def __len__(self):
        return 27

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) - 96 for c in text]}


def tiny(seed: int = 0) -> tuple[Llama, Stream]:
    config = ModelConfig(
        vocab_size=45,
        d_model=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        d_ff=64,
        seq_len=26,
        cells=16,
    )
    return noisy(Llama(config)), Stream(Letters(), CODES, config)


def drawn(model, stream, prompts, seeds, **settings):
    settings = dict(guidance=2.0, temperature=1.0, top_k=0, top_p=1.0) | settings
    return generate.draw_codes(
        model, stream, [stream.prompt(p) for p in prompts], seeds, **settings
    )


def sequences(stream, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(16, (len(captions), 16), generator=torch.Generator().manual_seed(1))
    return stream.sequences([stream.prompt(c) for c in captions], codes)


def test_the_sequence_is_as_promised():
    _, stream = tiny()
    tokens, starts = stream.sequences(
        [stream.prompt("frog"), stream.null(stream.prompt("ab"))], torch.arange(16).expand(2, -1)
    )
    assert tokens[0].tolist() == [
        0,
        6,
        18,
        15,
        7,
        27,
        *range(29, 45),
        28,
        0,
        0,
        0,
    ] and starts.tolist() == [5, 3]
    assert tokens[1, :4].tolist() == [0, 0, 0, 27]  # the null caption is as long as the caption
    where, cells = stream.layout(starts, 26)
    assert where[0, :6].tolist() == [[i, i] for i in range(6)]  # text stands as in one dimension
    assert where[0, 6:22].tolist() == [
        [6 + r, 6 + c] for r in range(4) for c in range(4)
    ] and where[0, 22].tolist() == [10, 10]
    assert (
        cells[0].tolist() == [-1] * 5 + list(range(16)) + [-1] * 5
    )  # from <seg_start> on each predicts the next


def test_positions_of_text_change_nothing():
    model, _ = tiny()
    tokens, where, none = (
        torch.randint(0, 27, (2, 20)),
        torch.arange(20)[:, None].expand(2, 20, 2),
        torch.full((2, 20), -1),
    )
    torch.testing.assert_close(model.hidden(tokens), model.hidden(tokens, layout=(where, none)))
    moved, told = where.clone(), none.clone()
    moved[:, 10, 1] += 3
    told[:, 10] = 3
    for layout in ((moved, none), (where, told)):
        assert not torch.allclose(
            model.hidden(tokens)[:, 10:], model.hidden(tokens, layout=layout)[:, 10:]
        )


def test_losses_are_the_full_softmax_over_what_may_follow():
    model, stream = tiny()
    tokens, starts = sequences(stream, ["frog", "ab"])
    told = torch.tensor([True, False])
    image, text = train_multimodal.picture_losses(model, stream, tokens, starts, told)
    hidden = model.hidden(tokens, layout=stream.layout(starts, 26))
    log_probs = F.linear(hidden, model.embed.weight).log_softmax(-1)  # (2, 26, 45)
    legal = log_probs - log_probs[..., 29:].logsumexp(
        -1, keepdim=True
    )  # renormalized over visual words
    nats = [
        -legal[b, starts[b] + i, tokens[b, starts[b] + i + 1]] for b in range(2) for i in range(16)
    ]
    torch.testing.assert_close(image, torch.stack(nats).mean())
    words = log_probs[0] - log_probs[0, :, :28].logsumexp(-1, keepdim=True)
    torch.testing.assert_close(
        text, torch.stack([-words[i, tokens[0, i + 1]] for i in range(5)]).mean()
    )


def test_losses_compile_as_one_graph():
    model, stream = tiny()
    tokens, starts = sequences(stream, ["frog", "ab"])
    told = torch.tensor([True, False])
    compiled = torch.compile(
        lambda *args: train_multimodal.picture_losses(model, stream, *args),
        dynamic=False,
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(
        compiled(tokens, starts, told),
        train_multimodal.picture_losses(model, stream, tokens, starts, told),
    )


def test_cached_drawing_follows_the_full_forward():
    model, stream = tiny()
    tokens, starts = sequences(stream, ["frog", "toad"])
    where, cells = stream.layout(starts, 22)
    full, cache = (
        model.hidden(tokens[:, :22], layout=(where, cells)),
        KVCache(model.config, 2, 22, torch.device("cpu"), torch.float32),
    )
    steps = [
        model.hidden(tokens[:, a:b], cache, (where[:, a:b], cells[:, a:b]))
        for a, b in [(0, 6), *((i, i + 1) for i in range(6, 22))]
    ]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)
    likeliest = drawn(model, stream, ["frog"], [0], temperature=0, guidance=1)[0]
    tokens, starts = stream.sequences([stream.prompt("frog")], likeliest[None])
    logits = model.head(model.hidden(tokens, layout=stream.layout(starts, 26)), stream.code_rows)
    assert torch.equal(logits[0, 5:21].argmax(-1), likeliest)


def test_guidance_goes_from_null_to_prompt_and_beyond():
    model, stream = tiny()
    same = drawn(model, stream, ["frog"], [3], guidance=1)
    nearly = drawn(model, stream, ["frog"], [3], guidance=1 + 1e-6)  # through both halves
    assert torch.equal(same, nearly) and not torch.equal(
        same, drawn(model, stream, ["frog"], [3], guidance=4)
    )
    assert torch.equal(
        drawn(model, stream, ["frog"], [3], guidance=0),
        drawn(model, stream, ["toad"], [3], guidance=0),
    )


def test_a_picture_does_not_depend_on_those_beside_it():
    model, stream = tiny()
    three = drawn(model, stream, ["frog", "toad", "frog"], [5, 6, 5])
    assert torch.equal(three[0], three[2]) and torch.equal(
        three[1:2], drawn(model, stream, ["toad"], [6])
    )
    vqvae = noisy(VQVAE(CODES))
    pictures = generate.draw(
        model, vqvae, stream, ["ab", "frog", "ab", "toad"], [1, 5, 2, 6], batch=2
    )
    for i, (caption, seed) in enumerate(
        [("ab", 1), ("frog", 5), ("ab", 2), ("toad", 6)]
    ):  # of any length, in order
        torch.testing.assert_close(
            vqvae.decode(drawn(model, stream, [caption], [seed]).view(1, 4, 4)), pictures[i : i + 1]
        )


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=9.0), dict(top_k=3), dict(top_p=0.5), dict(temperature=0), dict(guidance=7)],
)
def test_only_visual_words_come_between_the_markers(settings):
    model, stream = tiny()
    with torch.no_grad():
        model.embed.weight[: stream.first_code] *= 50  # text would win everywhere
    for seed in range(5):
        codes = drawn(model, stream, ["frog", "toad"], [seed, seed + 50], **settings)
        assert codes.shape == (2, 16) and codes.min() >= 0 and codes.max() < 16


@pytest.fixture
def pets(workdir):
    """Twelve pictures, three of each of four plain colours in folders of that name, and a VQ-VAE of them."""
    for i in range(12):
        name, color = [
            ("red", (220, 30, 30)),
            ("green", (30, 200, 30)),
            ("blue", (30, 30, 220)),
            ("black", (0, 0, 0)),
        ][i % 4]
        pixels = np.full((32, 32, 3), color, np.uint8)
        pixels[: 4 * (i // 4), :8] = 255  # so that no two are the same
        Path(f"pets/{name}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(f"pets/{name}/{i}.png")
    source = dict(data__source="pets", data__val_source="pets", data__augment="false")
    train_stage(train_vqvae, run="v", images=160, **source)
    return source | dict(vqvae="v")


def multimodal(**changes) -> dict:
    return train_stage(train_multimodal, **changes)


def test_planted_pictures_come_back_from_their_captions(pets, capsys):
    summary = multimodal(run="m", sequences=1600, adamw_lr=0.01, **pets)
    assert (
        summary["val_loss"] < 0.2
        and {"val_text_loss", "bits_per_visual_word", "best_step", "sequences_per_second"}
        <= summary.keys()
    )
    path = generate.main(
        load_config(
            generate.Config,
            ["m", "--prompt", "a photo of a blue", "--n", "3", "--out", "o/blue.png"],
        )
    )
    assert path == Path("o/blue.png") and Image.open(path).width > 3 * 32
    for seed in range(3):
        with Image.open(f"o/blue/{seed}.png") as picture:
            assert np.abs(np.asarray(picture)[:, 16:].mean((0, 1)) - (30, 30, 220)).max() < 40
            assert (
                picture.text["prompt"] == "a photo of a blue"
                and picture.text["seed"] == str(seed)
                and picture.text["guidance"] == "2.0"
            )
    Path("runs/v").rename("elsewhere")  # the run keeps its own copy
    one = generate.main(
        load_config(generate.Config, ["m", "--prompt", "a photo of a blue", "--seed", "2"])
    )
    assert np.array_equal(
        np.asarray(Image.open(one)), np.asarray(Image.open("o/blue/2.png"))
    ) and one.parent == Path("runs/m/drawn")
    text = generate.main(
        load_config(
            generate.Config, ["m", "--prompt", "a photo", "--kind", "text", "--max_tokens", "8"]
        )
    )
    assert isinstance(text[0], str) and "<" not in text[0]
    scores = score_images.main(
        load_config(score_images.Config, ["m", "--n", "8", "--n_argmin", "8"])
    )
    assert (
        json.loads(Path("runs/m/scores.json").read_text()) == scores
        and scores["classifier"] == "cpu"
        and Path("runs/m/scores.png").exists()
    )
    assert scores["diversity"]["drawn"] >= 0
    few = score_images.main(load_config(score_images.Config, ["m", "--n", "4", "--n_argmin", "0"]))
    assert few["diversity"]["drawn"] is None and "argmin_accuracy" not in few
    assert scores["argmin_accuracy"] >= 0.75 and scores["class_accuracy"].keys() == {
        "drawn",
        "ceiling_reconstructed",
        "ceiling_real",
    }


def test_resuming_is_exact_and_codes_are_made_once(pets, monkeypatch):
    encoded = []
    original = VQVAE.encode
    monkeypatch.setattr(
        VQVAE,
        "encode",
        lambda self, pictures: (encoded.append(len(pictures)), original(self, pictures))[1],
    )
    whole = multimodal(run="whole", **pets)
    assert (
        sum(encoded) == 12
    )  # each picture once: without augmentation they are the same for training and validation
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(
            train_multimodal.Interrupt,
            "__enter__",
            lambda self: (setattr(self, "code", 130), setattr(self, "before", {}), self)[-1],
        )
        multimodal(run="cut", **pets)
    again = multimodal(run="cut", resume="true", **pets)
    assert (
        read_metrics(Path("runs/whole")) == read_metrics(Path("runs/cut"))
        and again["val_loss"] == whole["val_loss"]
    )
    assert sum(encoded) == 12
    train_stage(train_vqvae, run="w", images=320, **{k: v for k, v in pets.items() if k != "vqvae"})
    encoded.clear()
    multimodal(run="other", **pets | dict(vqvae="w"))
    assert sum(encoded) == 12
    multimodal(run="moved", **pets | dict(data__augment="true"))
    assert sum(encoded) > 24


def test_captions_are_put_out_of_sight_and_the_best_weights_are_kept(pets):
    for null_prob, seen in ((1, {False}), (0, {True}), (0.5, {True, False})):
        run = f"n{null_prob}"
        multimodal(
            run=run,
            null_prob=null_prob,
            batch_sequences=1,
            sequences=30,
            eval_every=0.1,
            adamw_lr=0.3,
            **pets,
        )
        rows = read_metrics(Path("runs") / run)
        assert {row["text_loss"] > 0 for row in rows if "loss" in row} == seen
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    best = min(losses, key=losses.get)
    assert generate.find_run(run)[1] == Path(f"runs/{run}/best/{best:07d}") and len(losses) == 10
    assert json.loads(Path(f"runs/{run}/summary.json").read_text())["best_step"] == best


def test_text_beside_pictures_and_from_a_language_model(pets):
    train(run="lm", tokens=1280, model__n_heads=2, model__n_kv_heads=1)
    text = dict(data__tokenizer="runs/lm/tokenizer", text_mix=0.25, text_source="corpus.jsonl")
    with pytest.raises(UserError, match="set --model.value_shortcut True"):
        multimodal(run="m", init_from="lm", **text, **pets)
    with pytest.raises(UserError, match="set --model.canon 3"):
        multimodal(run="m", init_from="lm", model__value_shortcut="true", **text, **pets)
    summary = multimodal(
        run="m",
        init_from="lm",
        model__value_shortcut="true",
        model__canon=3,
        sequences=16,
        muon_lr=1e-9,
        adamw_lr=1e-9,
        text_weight=0,
        **text,
        **pets,
    )
    rows = [row for row in read_metrics(Path("runs/m")) if "loss" in row]
    fresh = multimodal(run="f", sequences=16, muon_lr=1e-9, adamw_lr=1e-9, **text, **pets)
    start = [row for row in read_metrics(Path("runs/f")) if "loss" in row]
    assert (
        rows[0]["plain_text_loss"] < start[0]["plain_text_loss"] - 0.3
        and summary["sequences"] == fresh["sequences"] == 16
    )


def test_shapes_are_scored_by_the_checker(workdir):
    train_stage(train_vqvae, run="v", model__image_size=64, model__downsample=8)
    multimodal(run="m", vqvae="v", sequences=16, data__tokenizer="bpe-400", model__vocab_size=418)
    scores = score_images.main(load_config(score_images.Config, ["m", "--n", "6"]))
    for pairs in ("seen", "unseen"):
        assert scores[pairs]["ceiling_rendered"]["all"] == 1 and scores[pairs]["drawn"]["all"] < 0.5
        assert {"color", "shape", "count", "all"} <= scores[pairs]["drawn"].keys()
    assert Image.open("runs/m/scores.png").width > 8 * 64


def test_bad_input_is_one_clear_line(pets):
    train(run="lm", tokens=1280)
    multimodal(run="m", sequences=8, **pets)
    train_stage(train_vqvae, run="coarse", model__downsample=8)
    train_stage(train_vqvae, run="few", model__codebook_size=8)
    Path("file").write_text("")
    cases = {
        (
            train_multimodal,
            "--vqvae=coarse",
        ): "does not fit the VQ-VAE's 4 x 4 grid: set them to 16",
        (train_multimodal, "--vqvae=few"): "the 8 codes of the VQ-VAE",
        (train_multimodal, "--vqvae="): "--vqvae is missing",
        (train_multimodal, "--vqvae=lm"): "is no run of train_vqvae.py",
        (train_multimodal, "--model.affixes=5"): "--model.affixes 5: visual words have no spelling",
        (train_multimodal, "--init_from=lm"): "set --model.n_heads 4",
        (train_multimodal, "--sample_prompts=['%s']" % ("z" * 99)): "99 tokens",
        (train_multimodal, "--text_mix=0.01"): "makes 0 of 8 sequences text",
        (generate, "lm --out x.png"): "is a language model and cannot draw",
        (generate, "lm --kind image"): "cannot draw",
        (generate, "m --prompt="): "the prompt is empty",
        (generate, "m --prompt=\n"): "the prompt is empty",
        (generate, "m --guidance=-1"): "--guidance is -1.0",
        (generate, "m --n=0"): "--n is 0",
        (generate, "m --prompt=" + "z" * 99): "the prompt has 99 tokens, the model takes 32",
        (generate, "m --out=file/x.png"): "file/x.png cannot be written",
        (generate, "m --out=x.gif"): "give the name of a .png file",
        (generate, "v"): "is a VQ-VAE",
        (score_images, "lm"): "draws nothing",
        (score_images, "m --n 1"): "distances need 2 drawn",
    }
    for (module, line), says in cases.items():
        args = (
            [*flags_of(train_multimodal, run="new", **pets), line]
            if module is train_multimodal
            else line.split()
        )
        if module is generate and "--prompt" not in line:
            args += ["--prompt", "frog"]
        with pytest.raises(UserError) as error:
            module.main(load_config(module.Config, args))
        assert says in str(error.value) and "\n" not in str(error.value), line
        assert not Path("runs/new").exists() and not list(Path().glob("x.*"))
    done = script("generate.py", "m", "--prompt", "")
    assert done.returncode == 2 and done.stderr == "error: the prompt is empty: say what to draw\n"
