from string import ascii_lowercase

import pytest
import torch
import torch.nn.functional as F
from helpers import noisy
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from common.config import UserError
from model import KVCache, Llama, ModelConfig
from multimodal import ImageTextFormat, image_text_losses, plain_text_loss
from sampling import equal_length_batches, generate_images, sample_image_tokens
from vqvae import VQVAE, VQVAEConfig

CODES = VQVAEConfig(image_size=16, downsample=4, codebook_size=16, width=8, n_blocks=1)
MODEL = ModelConfig(
    vocab_size=45,
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    d_ff=64,
    seq_len=26,
    n_image_positions=16,
)


FROG_TOAD = ["frog", "toad"]


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per letter: a is 1, b is 2, ...; 0 is end-of-text."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", *ascii_lowercase])}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def model() -> Llama:
    return noisy(Llama(MODEL))


@pytest.fixture(scope="module")
def fmt() -> ImageTextFormat:
    return ImageTextFormat(letters(), CODES, MODEL)


def random_sequences(fmt, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences with these captions and random image tokens, and their starts."""
    codes = torch.randint(16, (len(captions), 16), generator=torch.Generator().manual_seed(1))
    return fmt.sequences([fmt.prompt(caption) for caption in captions], codes)


def sample_codes(model, fmt, captions: list[str], seeds: list[int], **settings) -> torch.Tensor:
    settings = {"guidance": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    prompts = [fmt.prompt(caption) for caption in captions]
    return sample_image_tokens(model, fmt, prompts, seeds, **settings)


# ---- format
def test_sequence_is_caption_then_image_tokens_between_markers(fmt):
    codes = torch.arange(16)[None]
    tokens, starts = fmt.sequences([fmt.prompt("frog")], codes)
    frog, image = [6, 18, 15, 7], range(29, 45)
    assert tokens[0].tolist() == [0, *frog, 27, *image, 28, 0, 0, 0]
    assert starts.tolist() == [5]


def test_sequences_have_the_lengths_of_their_own_prompts(fmt):
    captions = ["a", "abcdef", "frog"]
    tokens, starts = random_sequences(fmt, captions)
    codes = torch.randint(16, (3, 16), generator=torch.Generator().manual_seed(1))
    for caption, row, start, image in zip(captions, tokens, starts, codes, strict=True):
        expected = [*fmt.prompt(caption), *(image + fmt.first_code), fmt.seg_end]
        assert row.tolist() == expected + [0] * (26 - len(expected))
        assert start == len(caption) + 1


def test_sequences_need_an_image_per_prompt(fmt):
    with pytest.raises(AssertionError, match=r"codes \(2, 16\) for 1 prompts of 16 codes"):
        fmt.sequences([fmt.prompt("frog")], torch.zeros(2, 16, dtype=torch.long))


def test_sequences_are_built_on_the_device_of_the_codes_without_waiting_for_it(fmt):
    """Tensors on the meta device have no values, so reading one is an error."""
    codes = torch.zeros(1, 16, dtype=torch.long, device="meta")
    assert all(result.is_meta for result in fmt.sequences([fmt.prompt("frog")], codes))


def test_unconditional_prompt_is_empty_and_as_long_as_the_prompt(fmt):
    assert fmt.uncond(fmt.prompt("ab")) == [0, 0, 0, 27]


def test_prompt_that_is_too_long_is_refused(fmt):
    with pytest.raises(UserError, match="prompt has 7 tokens, but the model takes at most 6"):
        fmt.prompt("abcdefg")


def test_prompt_that_is_too_long_can_be_truncated(fmt):
    assert fmt.prompt("abcdefg", truncate=True) == fmt.prompt("abcdef")


@pytest.mark.parametrize("caption", ["", "\n", "  "])
def test_empty_prompt_is_refused(fmt, caption):
    with pytest.raises(UserError, match="the prompt is empty; describe an image"):
        fmt.prompt(caption)


def test_position_ids_count_up_in_text_and_follow_the_grid_in_an_image(fmt):
    position_ids, _ = fmt.position_ids(torch.tensor([5]), 26)
    ids = position_ids[0].tolist()
    assert ids[:6] == [[i, i] for i in range(6)]
    assert ids[6:22] == [[6 + row, 6 + column] for row in range(4) for column in range(4)]
    assert ids[22:] == [[i, i] for i in range(10, 14)]


def test_target_positions_are_those_of_the_next_image_token(fmt):
    _, target_positions = fmt.position_ids(torch.tensor([5, 3]), 26)
    assert target_positions[0].tolist() == [-1] * 5 + list(range(16)) + [-1] * 5
    assert target_positions[1].tolist() == [-1] * 3 + list(range(16)) + [-1] * 7


@pytest.mark.parametrize(
    "codes, changes, message",
    [
        ({"codebook_size": 8}, {}, "set it to 37 or choose another --vqvae"),
        ({"downsample": 8}, {}, "the VQ-VAE's grid is 2 x 2; set it to 4"),
        (
            {},
            {"seq_len": 20},
            "--model.seq_len is 20; set it to 20 plus the length of the longest caption",
        ),
    ],
)
def test_format_refuses_parts_that_do_not_fit_together(codes, changes, message):
    with pytest.raises(UserError) as error:
        ImageTextFormat(
            letters(), VQVAEConfig(**vars(CODES) | codes), ModelConfig(**vars(MODEL) | changes)
        )
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- model inputs
def text_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text tokens (2, 20) with the position ids and target positions of text."""
    tokens = torch.randint(0, 27, (2, 20), generator=torch.Generator().manual_seed(0))
    position_ids = torch.arange(20)[:, None].expand(2, 20, 2).clone()
    return tokens, position_ids, torch.full((2, 20), -1)


def test_text_with_explicit_position_ids_has_the_default_hidden_states(model):
    tokens, position_ids, target_positions = text_inputs()
    explicit = model.hidden(tokens, None, position_ids, target_positions)
    torch.testing.assert_close(explicit, model.hidden(tokens))


@pytest.mark.parametrize("changed", ["row", "column", "target position"])
def test_hidden_states_depend_on_the_inputs_of_this_and_earlier_positions(model, changed):
    tokens, position_ids, target_positions = text_inputs()
    if changed == "target position":
        target_positions[:, 10] = 3
    else:
        position_ids[:, 10, ["row", "column"].index(changed)] += 3
    before, after = model.hidden(tokens), model.hidden(tokens, None, position_ids, target_positions)
    torch.testing.assert_close(after[:, :10], before[:, :10])
    assert not torch.allclose(after[:, 10], before[:, 10])
    assert not torch.allclose(after[:, 11:], before[:, 11:])


# ---- losses
def full_log_probs(model, fmt, tokens, starts) -> torch.Tensor:
    """Log-probabilities (B, T, V) over the whole vocabulary."""
    hidden = model.hidden(tokens, None, *fmt.position_ids(starts, tokens.shape[1]))
    return F.linear(hidden, model.embed.weight).log_softmax(-1)


def test_image_loss_is_the_cross_entropy_among_image_tokens(model, fmt):
    tokens, starts = random_sequences(fmt, ["frog", "ab"])
    image, _ = image_text_losses(model, fmt, tokens, starts, torch.tensor([True, False]))
    log_probs = full_log_probs(model, fmt, tokens, starts)
    legal = log_probs - log_probs[..., 29:].logsumexp(-1, keepdim=True)
    places = [(b, int(starts[b]) + i) for b in range(2) for i in range(16)]
    nats = [-legal[b, t, tokens[b, t + 1]] for b, t in places]
    torch.testing.assert_close(image, torch.stack(nats).mean())


def test_text_loss_is_the_cross_entropy_of_captions_among_text_tokens(model, fmt):
    """The second caption was dropped and is not scored; <seg_start> after the first one is."""
    tokens, starts = random_sequences(fmt, ["frog", "ab"])
    _, text = image_text_losses(model, fmt, tokens, starts, torch.tensor([True, False]))
    log_probs = full_log_probs(model, fmt, tokens, starts)
    legal = log_probs - log_probs[..., :28].logsumexp(-1, keepdim=True)
    nats = [-legal[0, t, tokens[0, t + 1]] for t in range(5)]
    torch.testing.assert_close(text, torch.stack(nats).mean())


def test_text_loss_is_zero_if_all_captions_are_dropped(model, fmt):
    tokens, starts = random_sequences(fmt, ["frog", "ab"])
    _, text = image_text_losses(model, fmt, tokens, starts, torch.tensor([False, False]))
    assert text.item() == 0


def test_plain_text_loss_is_the_cross_entropy_among_text_tokens(model, fmt):
    windows = torch.randint(0, 28, (2, 21), generator=torch.Generator().manual_seed(0))
    logits = F.linear(model.hidden(windows[:, :-1]), model.embed.weight[:28])  # (2, 20, 28)
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(plain_text_loss(model, fmt, windows), expected)


def test_losses_are_computed_without_waiting_for_the_device(fmt):
    model, codes = Llama(MODEL).to("meta"), torch.zeros(1, 16, dtype=torch.long, device="meta")
    tokens, starts = fmt.sequences([fmt.prompt("frog")], codes)
    image, text = image_text_losses(model, fmt, tokens, starts, starts > 0)
    (image + text + plain_text_loss(model, fmt, tokens)).backward()
    assert model.embed.weight.grad.is_meta


def test_losses_compile_as_one_graph(model, fmt):
    def losses(tokens, starts, has_caption):
        return image_text_losses(model, fmt, tokens, starts, has_caption)

    inputs = (*random_sequences(fmt, ["frog", "ab"]), torch.tensor([True, False]))
    compiled = torch.compile(losses, dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), losses(*inputs))


# ---- sampling
def test_cached_decoding_equals_the_full_forward_pass(model, fmt):
    tokens, starts = random_sequences(fmt, ["frog", "toad"])
    position_ids, target_positions = fmt.position_ids(starts, 22)
    full = model.hidden(tokens[:, :22], None, position_ids, target_positions)
    cache = KVCache(MODEL, 2, 22, torch.device("cpu"), torch.float32)
    pieces = [slice(0, 6), *(slice(t, t + 1) for t in range(6, 22))]
    steps = [
        model.hidden(tokens[:, s], cache, position_ids[:, s], target_positions[:, s])
        for s in pieces
    ]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)


def test_most_likely_image_tokens_are_those_of_the_full_forward_pass(model, fmt):
    codes = sample_codes(model, fmt, ["frog"], [0], temperature=0, guidance=1)
    tokens, starts = fmt.sequences([fmt.prompt("frog")], codes)
    hidden = model.hidden(tokens, None, *fmt.position_ids(starts, 26))
    logits = model.head(hidden[:, 5:21], fmt.code_slice)  # (1, 16, 16)
    assert torch.equal(logits.argmax(-1), codes)


def test_guidance_0_ignores_the_caption(model, fmt):
    frog, toad = (sample_codes(model, fmt, [caption], [3], guidance=0) for caption in FROG_TOAD)
    assert torch.equal(frog, toad)


def test_guidance_1_follows_the_caption(model, fmt):
    frog, toad = (sample_codes(model, fmt, [caption], [3], guidance=1) for caption in FROG_TOAD)
    assert not torch.equal(frog, toad)


def test_guidance_1_skips_the_unconditional_half_without_changing_the_result(model, fmt):
    conditional = sample_codes(model, fmt, ["frog"], [3], guidance=1)
    both_halves = sample_codes(model, fmt, ["frog"], [3], guidance=1 + 1e-6)
    assert torch.equal(conditional, both_halves)


def test_guidance_above_1_changes_the_result(model, fmt):
    conditional = sample_codes(model, fmt, ["frog"], [3], guidance=1)
    assert not torch.equal(conditional, sample_codes(model, fmt, ["frog"], [3], guidance=4))


def test_image_tokens_depend_on_their_own_prompt_and_seed_only(model, fmt):
    three = sample_codes(model, fmt, ["frog", "toad", "frog"], [5, 6, 5])
    assert torch.equal(three[0], three[2])
    assert torch.equal(three[1:2], sample_codes(model, fmt, ["toad"], [6]))


def test_images_of_captions_of_any_length_are_returned_in_order(model, fmt):
    vqvae = noisy(VQVAE(CODES))
    captions, seeds = ["ab", "frog", "ab", "toad"], [1, 5, 2, 6]
    images = generate_images(model, vqvae, fmt, captions, seeds, batch=2)
    for caption, seed, image in zip(captions, seeds, images, strict=True):
        codes = sample_codes(model, fmt, [caption], [seed]).view(1, 4, 4)
        torch.testing.assert_close(image[None], vqvae.decode(codes))


def test_batches_hold_prompts_of_one_length_and_every_prompt_once():
    prompts = [[0] * n for n in (3, 2, 3, 3, 2, 3)]
    assert equal_length_batches(prompts, 3) == [[1, 4], [0, 2, 3], [5]]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 9.0}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"guidance": 7}],
    ids=str,
)
def test_only_image_tokens_are_sampled_even_if_text_is_more_likely(fmt, settings):
    model = noisy(Llama(MODEL))
    with torch.no_grad():
        model.embed.weight[: fmt.first_code] *= 50
    for seed in range(5):
        codes = sample_codes(model, fmt, FROG_TOAD, [seed, seed + 50], **settings)
        assert codes.shape == (2, 16)
        assert 0 <= codes.min() <= codes.max() < 16
