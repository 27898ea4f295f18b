import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from model import ChunkedCrossEntropy, KVCache, Llama, ModelConfig, sample
from muon import build_optimizers

SHAPE = {"vocab_size": 101, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "seq_len": 24}
PLAIN = ModelConfig(n_layers=3, **SHAPE)
EXTRAS = replace(PLAIN, subwords=40, value_embed=True, canon=3, pointer=16)
IMAGES = replace(PLAIN, n_image_positions=4)
plain_and_extras = pytest.mark.parametrize("config", [PLAIN, EXTRAS], ids=["plain", "extras"])


def make_model(config=PLAIN, seed=0, std=0.2, **kwargs) -> Llama:
    """A model whose weights are large enough for every part to matter to the logits."""
    model = Llama(config, **kwargs)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.copy_(noise * std + (p.ndim == 1))
        if config.subwords:
            generator = torch.Generator().manual_seed(1)
            model.token_subwords.random_(-1, config.subwords, generator=generator)
    return model


def random_tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PLAIN.vocab_size, (batch, length), generator=generator)


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def make_cache(batch, config=PLAIN, n_padding=None):
    return KVCache(config, batch, 24, torch.device("cpu"), torch.float32, n_padding)


# ---- config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 0}, "model.n_layers is 0; it must be positive"),
        ({"d_ff": -4}, "model.d_ff is -4; it must be positive"),
        ({"canon": -1}, "model.canon is -1; it must be 0 or more"),
        ({"pointer": -1}, "model.pointer is -1; it must be 0 or more"),
        ({"canon": 2048}, "model.canon is 2048; it must be less than model.seq_len 2048"),
        ({"n_kv_heads": 3}, "model.n_heads 8 is not divisible by model.n_kv_heads 3"),
        ({"d_model": 33}, "model.d_model 33 does not split into 8 heads .* a multiple of 16"),
        ({"vocab_size": 70_000}, "model.vocab_size is 70000; it must be at most 65536"),
    ],
)
def test_config_rejects_an_invalid_shape(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


def test_default_model_has_89_million_parameters():
    with torch.device("meta"):
        assert round(Llama(ModelConfig()).n_params() / 1e6) == 89


def test_train_llm_default_is_slightly_larger_than_the_plain_model():
    import train_llm

    with torch.device("meta"):
        plain, default = Llama(ModelConfig()), Llama(train_llm.Config().model)
    assert plain.n_params() < default.n_params() < 90e6


# ---- initialization


def test_init_weights_initializes_every_parameter():
    model = Llama(replace(EXTRAS, n_image_positions=4))
    for p in model.parameters():
        torch.nn.init.constant_(p, math.nan)
    model.init_weights()
    assert [name for name, p in model.named_parameters() if not torch.isfinite(p).all()] == []


def test_init_weights_rejects_an_unknown_parameter():
    model = Llama(PLAIN)
    model.extra = torch.nn.Parameter(torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match="extra"):
        model.init_weights()


def test_initial_loss_equals_uniform_guessing():
    model = Llama(PLAIN)
    model.init_weights(torch.Generator().manual_seed(0))
    x = random_tokens(8, 24)
    assert model(x, x.roll(1)).item() == pytest.approx(math.log(PLAIN.vocab_size), rel=0.05)


# ---- forward pass


def test_logits_equal_those_of_transformers_apertus():
    from tools.bench import apertus

    model, x = make_model(), random_tokens(2, 24)
    with torch.no_grad():
        expected = apertus(model).eval()(input_ids=x).logits
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


@plain_and_extras
def test_no_position_attends_to_a_later_one(config):
    model, x = make_model(config), random_tokens(1, 24)
    changed = x.clone()
    changed[0, 10] += 1
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@plain_and_extras
def test_bf16_loss_is_close_to_fp32(config):
    x = random_tokens(2, 24)
    exact = make_model(config)(x, x.roll(1)).item()
    rounded = make_model(config, compute_dtype=torch.bfloat16)(x, x.roll(1)).item()
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


@plain_and_extras
def test_bf16_model_keeps_weights_and_gradients_in_fp32(config):
    model, x = make_model(config, compute_dtype=torch.bfloat16), random_tokens(2, 24)
    model(x, x.roll(1)).backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@plain_and_extras
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_compiles_as_one_graph(dtype, config, monkeypatch):
    """aot_eager traces and differentiates as torch.compile does, without a C++ compiler."""
    monkeypatch.setattr("model.CHUNK_LOGITS", 128 * 101)
    model, x = make_model(config, compute_dtype=dtype), random_tokens(6, 24)  # two chunks
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    params = list(model.parameters())
    eager, traced = model(x, x.roll(1)), compiled(x, x.roll(1))
    torch.testing.assert_close(traced, eager)
    atol = 1e-5 if dtype == torch.float32 else 1e-2
    grads = zip(
        torch.autograd.grad(traced, params), torch.autograd.grad(eager, params), strict=True
    )
    for actual, expected in grads:
        torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x.roll(1)), eager.detach())


@plain_and_extras
def test_flops_per_token_match_the_count_of_torch(config):
    model, x = Llama(config), random_tokens(2, 24)
    # MATH: the counter does not count fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    # counted by torch, not us
    masked_half = (6 * config.n_layers * config.d_model + 3 * config.pointer) * config.seq_len
    counted = counter.get_total_flops() / x.numel()
    assert model.flops_per_token() + masked_half == pytest.approx(counted, rel=0.002)


# ---- subwords


def test_embedding_is_the_token_vector_plus_its_subword_vectors():
    model = make_model(replace(PLAIN, subwords=40))
    expected = model.embed.weight.detach().clone()
    for token, subwords in enumerate(model.token_subwords):
        expected[token] += model.subwords.weight[subwords[subwords >= 0]].sum(0)
    torch.testing.assert_close(model.embed_tokens(slice(None)), expected)
    torch.testing.assert_close(model.embed_tokens(slice(7, 20)), expected[7:20])
    x = random_tokens(2, 24)
    torch.testing.assert_close(model.embed_tokens(x), expected[x])


def test_training_moves_an_unseen_token_that_shares_a_subword():
    model = Llama(EXTRAS)
    model.init_weights(torch.Generator().manual_seed(0))
    model.token_subwords[[7, 8, 90], 0] = 3
    before = model.embed_tokens(slice(None)).detach().clone()
    x = random_tokens(8, 24).clamp(max=80)  # token 90 is never seen
    options = {"muon_lr": 0.02, "muon_wd": 0, "adamw_lr": 0.01, "adamw_wd": 0, "adamw_beta2": 0.99}
    for optimizer in build_optimizers(model, **options):
        model(x, x.roll(1)).backward()
        optimizer.step()
    own = model.embed.weight - before
    moved = model.embed_tokens(slice(None)) - before
    shared = model.subwords.weight[3]
    assert shared.abs().min() > 0
    torch.testing.assert_close(moved[90] - own[90], shared)
    torch.testing.assert_close(moved[91], own[91])


def test_training_leaves_a_subword_without_tokens_at_zero():
    model = Llama(EXTRAS)
    model.init_weights(torch.Generator().manual_seed(0))
    model.token_subwords[7, 0] = 3
    x = random_tokens(8, 24)
    model(x, x.roll(1)).backward()
    assert model.subwords.weight.grad[3].any()
    assert not model.subwords.weight.grad[4].any()


# ---- inference


def test_inference_model_without_subwords_is_the_same_function():
    model, x = make_model(EXTRAS), random_tokens(2, 24)
    torch.testing.assert_close(model.for_inference()(x), model(x))


def test_inference_model_has_no_subwords():
    model, expected = make_model(EXTRAS).for_inference(), Llama(replace(EXTRAS, subwords=0))
    assert model.config == expected.config
    assert model.state_dict().keys() == expected.state_dict().keys()


@plain_and_extras
def test_inference_model_has_weights_of_the_compute_dtype_and_fp32_angles(config):
    model = make_model(config, compute_dtype=torch.bfloat16).for_inference()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cos.dtype == model.sin.dtype == torch.float32


@plain_and_extras
def test_casting_weights_once_gives_the_logits_of_casting_them_in_every_step(config):
    model, x = make_model(config, compute_dtype=torch.bfloat16), random_tokens(2, 24)
    assert torch.equal(model.for_inference()(x), model(x))


def test_inference_model_shares_weights_that_need_no_cast():
    model = make_model(PLAIN)
    shared = zip(model.parameters(), model.for_inference().parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_making_an_inference_model_leaves_model_and_random_numbers_alone(dtype):
    model = make_model(EXTRAS, compute_dtype=dtype)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    model.for_inference()
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- value embeddings


def test_every_layer_projects_the_normalized_embedding_into_its_values():
    model, x, outputs = make_model(EXTRAS), random_tokens(2, 24), []
    projections = [block.attn.v_embed_proj for block in model.blocks]
    for projection in projections:
        projection.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(x)
    embedding = F.rms_norm(model.embed_tokens(x), (32,))
    for projection, output in zip(projections, outputs, strict=True):
        torch.testing.assert_close(output, embedding @ projection.weight.T)


def test_value_embeddings_change_the_logits():
    model, x = make_model(EXTRAS), random_tokens(2, 24)
    before = model(x)
    torch.nn.init.zeros_(model.blocks[-1].attn.v_embed_proj.weight)
    assert not torch.allclose(model(x), before)


# ---- Canon layers


@pytest.mark.parametrize(
    ("norm", "canon", "reader"),
    [("attn_norm", "attn_canon", "attn.q_proj"), ("mlp_norm", "mlp_canon", "mlp.up_proj")],
)
def test_canon_layer_adds_weighted_preceding_positions(norm, canon, reader):
    model, inputs, outputs = make_model(EXTRAS), {}, {}

    def remember(module, args, output):
        inputs[module], outputs[module] = args[0], output

    block = model.blocks[1]
    norm, canon, reader = map(block.get_submodule, (norm, canon, reader))
    norm.register_forward_hook(remember)
    reader.register_forward_hook(remember)
    model(random_tokens(2, 24))
    expected = outputs[norm].clone()
    for t in range(24):
        for i in range(1, min(t, 3) + 1):
            expected[:, t] += canon.weight[i - 1] * outputs[norm][:, t - i]
    torch.testing.assert_close(inputs[reader], expected)


def test_canon_weights_start_at_zero():
    model = make_model(EXTRAS)
    model.init_weights()
    weights = [p for name, p in model.named_parameters() if "canon" in name]
    assert len(weights) == 2 * EXTRAS.n_layers
    assert not any(p.any() for p in weights)


# ---- pointer


def repeated_tokens(batch, length):
    """Few different tokens, so that most have several earlier occurrences to copy."""
    return random_tokens(batch, length) % 5


@torch.no_grad()
def naive_probabilities(model, x):
    """Probabilities (B, T, V) of a model with a pointer, one position and one copy at a time."""
    hidden, pointer = model.hidden(x).double(), model.pointer.double()
    probs = (hidden @ model.embed_tokens(slice(None)).double().T).softmax(-1)
    for row, h, tokens in zip(probs, hidden, x, strict=True):
        q, k = (
            F.rms_norm(h @ proj.weight.T, (16,), eps=1e-6) * norm.weight
            for proj, norm in ((pointer.q_proj, pointer.q_norm), (pointer.k_proj, pointer.k_norm))
        )
        for t in range(len(tokens)):
            generate = 7 * (t + 1) * (h[t] @ pointer.sentinel.weight[0]).exp()
            weights = [(q[t] @ k[i] / 4).exp() for i in range(t)]
            total = generate + sum(weights)
            row[t] *= generate / total
            for i, weight in enumerate(weights):
                row[t, tokens[i + 1]] += weight / total
    return probs


@pytest.mark.parametrize("config", [replace(PLAIN, pointer=16), EXTRAS], ids=["alone", "extras"])
def test_pointer_adds_the_probability_of_copying_the_token_after_each_earlier_position(config):
    x = repeated_tokens(2, 24)
    actual = make_model(config)(x).exp().double()
    expected = naive_probabilities(make_model(config), x)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(actual.sum(-1), torch.ones(2, 24).double(), atol=1e-6, rtol=0)


def test_first_position_of_a_text_copies_nothing():
    model, x = make_model(EXTRAS), random_tokens(2, 24)
    expected = model.head(model.hidden(x)).log_softmax(-1)
    torch.testing.assert_close(model(x)[:, 0], expected[:, 0])
    assert not torch.allclose(model(x)[:, 1], expected[:, 1])


def test_a_new_model_copies_an_eighth_at_equal_scores():
    model, x = Llama(EXTRAS), random_tokens(2, 24)
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(model.pointer.q_proj.weight)
    copied = 1 - model.copies(model.hidden(x), x).log_probs[..., 0].exp()
    t = torch.arange(24).expand(2, -1)  # also the number of tokens to copy from
    torch.testing.assert_close(copied, t / (t + 7 * (t + 1)))


def test_pointer_learns_to_copy_what_a_model_without_it_has_not_learned_yet():
    """The second half of each sequence repeats its first half, which is random."""
    losses = []
    for config in (PLAIN, replace(PLAIN, pointer=16)):
        model = Llama(config)
        model.init_weights(torch.Generator().manual_seed(0))
        options = {"muon_lr": 0.02, "muon_wd": 0, "adamw_lr": 0.01, "adamw_wd": 0}
        optimizers = build_optimizers(model, **options, adamw_beta2=0.95)
        for step in range(80):
            x = random_tokens(16, 12, seed=step).repeat(1, 2)
            loss = F.cross_entropy(model(x)[:, 12:-1].flatten(0, 1), x[:, 13:].flatten())
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3
    assert losses[1] < 0.3


@pytest.mark.parametrize("parts", [[24], [5, 7, 12], [9, *[1] * 15]], ids=str)
def test_padding_on_the_left_is_never_copied(parts):
    model, x, n_padding = make_model(EXTRAS), repeated_tokens(3, 24), torch.tensor([0, 1, 6])
    with torch.no_grad():
        cache = make_cache(3, EXTRAS, n_padding)
        logits = torch.cat([model(part, cache=cache) for part in x.split(parts, dim=1)], dim=1)
        assert logits.isfinite().all()
        for row, tokens, n in zip(logits, x, n_padding, strict=True):
            torch.testing.assert_close(row[n:], model(tokens[None, n:])[0], atol=1e-5, rtol=1e-5)


def test_probabilities_over_a_vocab_slice_sum_to_one_and_copy_as_before():
    model, x = make_model(EXTRAS), repeated_tokens(2, 24)
    hidden = model.hidden(x)
    copies = model.copies(hidden, x)
    over_slice = model.head(hidden, slice(9), copies).exp()
    torch.testing.assert_close(over_slice.sum(-1), torch.ones(2, 24))
    generate = copies.log_probs[..., :1].exp()
    copied = model(x).exp() - generate * model.head(hidden).softmax(-1)
    expected = generate * model.head(hidden)[..., :9].softmax(-1) + copied[..., :9]
    torch.testing.assert_close(over_slice, expected, atol=1e-6, rtol=1e-4)


# ---- image positions


def text_positions(length):
    """Position ids of text: row and column are equal; no position predicts an image token."""
    index = torch.arange(length).expand(2, -1)
    return torch.stack((index, index), dim=-1), torch.full((2, length), -1)


def test_position_ids_of_text_equal_the_default():
    model, x = make_model(IMAGES), random_tokens(2, 24)
    position_ids, target_positions = text_positions(24)
    actual = model.hidden(x, position_ids=position_ids, target_positions=target_positions)
    torch.testing.assert_close(actual, model.hidden(x))


@pytest.mark.parametrize("axis", [0, 1], ids=["row", "column"])
def test_both_coordinates_of_position_ids_matter(axis):
    model, x = make_model(IMAGES), random_tokens(2, 24)
    position_ids, target_positions = text_positions(24)
    moved = position_ids.clone()
    moved[:, 10, axis] += 3
    before = model.hidden(x, position_ids=position_ids, target_positions=target_positions)
    after = model.hidden(x, position_ids=moved, target_positions=target_positions)
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_image_position_embedding_is_added_where_an_image_token_is_predicted():
    model, x, inputs = make_model(IMAGES), random_tokens(2, 24), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    position_ids, target_positions = text_positions(24)
    target_positions[:, 6:10] = torch.arange(4)
    model.hidden(x, position_ids=position_ids, target_positions=target_positions)
    expected = model.embed_tokens(x)
    expected[:, 6:10] += model.image_positions.weight
    torch.testing.assert_close(inputs[0], expected * 32**0.5)


def test_hidden_rejects_position_ids_without_target_positions():
    with pytest.raises(AssertionError, match="pass both or neither"):
        make_model(IMAGES).hidden(random_tokens(2, 24), position_ids=text_positions(24)[0])


# ---- decoding with a cache


@plain_and_extras
@pytest.mark.parametrize("length", [1, 23, 24])
def test_cached_decoding_equals_the_full_forward(length, config):
    model, x = make_model(config), random_tokens(3, 24)
    with torch.no_grad():
        cache = make_cache(3, config)
        parts = [model(x[:, :length], cache=cache)]
        parts += [model(x[:, t : t + 1], cache=cache) for t in range(length, 24)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_cache_accepts_several_positions_at_once_and_keeps_sequences_apart(row):
    model, x = make_model(EXTRAS), random_tokens(3, 24)
    with torch.no_grad():
        cache = make_cache(3, EXTRAS)
        parts = [model(part, cache=cache) for part in x.split([5, 7, 12], dim=1)]
        actual, expected = torch.cat(parts, dim=1)[row], model(x[row : row + 1])[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_forward_rejects_more_positions_than_seq_len():
    model, x, cache = make_model(), random_tokens(3, 24), make_cache(batch=3)
    model(x, cache=cache)
    with pytest.raises(AssertionError, match="24 . 1 positions, seq_len is 24"):
        model(x[:, :1], cache=cache)


@plain_and_extras
def test_decoding_across_blocks_of_keys_equals_the_full_forward(config, monkeypatch):
    monkeypatch.setattr("model.KEY_BLOCK", 8)
    model, x = make_model(config), random_tokens(3, 24)
    with torch.no_grad():
        cache = make_cache(3, config)
        parts = [model(part, cache=cache) for part in x.split([7, *[1] * 10, 5, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(x), atol=1e-5, rtol=1e-5)


# ---- recording a decoding step


class Recording(TorchDispatchMode):
    """Records the operations of a function and repeats them, as a CUDA graph does with kernels:
    Python does not run again, and tensors from outside the function keep their addresses.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result

    def repeat(self):
        new = {}  # id of a recorded tensor: the tensor that replaces it

        def replaced(value):
            return new.get(id(value), value)

        for op, args, kwargs, old in self.calls:
            args, kwargs = tree_map(replaced, (args, kwargs))
            pairs = zip(tree_leaves(old), tree_leaves(op(*args, **kwargs)), strict=True)
            new.update({id(before): after for before, after in pairs})


def recorder(recordings: list):
    """The argument `record` of generate: records each step that it is given into `recordings`."""

    def record(step):
        with Recording() as recording:
            step()
        recordings.append(recording)
        return recording.repeat

    return record


@plain_and_extras
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 40, "top_p": 0.9}, {"guidance": 2.0, "vocab_slice": slice(50, 99)}],
    ids=["all tokens", "top-k and top-p", "guidance"],
)
def test_recorded_steps_generate_the_same_tokens(options, config, monkeypatch):
    monkeypatch.setattr("model.KEY_BLOCK", 8)
    if "guidance" in options:  # only images need it, and their models have no pointer
        config = replace(config, pointer=0)
    model, x, recordings = make_model(config, std=0.05), random_tokens(2, 3), []
    if "guidance" in options:
        options = options | {"uncond": random_tokens(2, 3, seed=1)}
    expected = list(model.generate(x, 21, generators=generators(2), **options))
    settings = {"generators": generators(2), "record": recorder(recordings)} | options
    actual = list(model.generate(x, 21, **settings))
    assert len(set(torch.stack(expected).flatten().tolist())) > 5
    assert torch.equal(torch.stack(actual), torch.stack(expected))
    assert len(recordings) == 3  # one for each block of 8 keys


def test_recorded_steps_generate_the_same_image_tokens(monkeypatch):
    monkeypatch.setattr("model.KEY_BLOCK", 8)
    model, x = make_model(IMAGES, std=0.1), random_tokens(2, 3)
    position_ids, target_positions = text_positions(24)
    position_ids[:, 5:, 1] += 2
    target_positions[:, 6:10] = torch.arange(4)
    settings = {"positions": (position_ids, target_positions), "temperature": 0}
    expected = list(model.generate(x, 20, generators=generators(2), **settings))
    settings |= {"record": recorder([])}
    actual = list(model.generate(x, 20, generators=generators(2), **settings))
    assert torch.equal(torch.stack(actual), torch.stack(expected))


def test_decoding_step_does_not_wait_for_the_device():
    recordings, options = [], {"temperature": 1, "top_k": 9, "top_p": 0.9}
    settings = {"generators": generators(2), "record": recorder(recordings)} | options
    list(make_model(EXTRAS).generate(random_tokens(2, 3), 21, **settings))
    names = {op.name() for recording in recordings for op, *_ in recording.calls}
    assert "aten::index_copy_" in names
    waiting = "item is_nonzero _local_scalar_dense nonzero masked_select _unique2 bincount equal"
    assert names.isdisjoint(f"aten::{name}" for name in waiting.split())


# ---- generation and sampling


@plain_and_extras
def test_greedy_generation_equals_argmax_of_full_forwards(config):
    model, x = make_model(config), random_tokens(2, 3)
    if config.pointer:
        model.pointer.q_norm.weight.data *= 20  # what fits well is copied
    generated = list(model.generate(x, 100, generators=generators(2), temperature=0))
    assert len(generated) == 21  # it stops when seq_len is full
    with torch.no_grad():
        for _ in range(21):
            x = torch.cat((x, model(x)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(torch.stack(generated, dim=1), x[:, 3:])


def test_generated_sequence_does_not_depend_on_its_batch():
    model, x = make_model(std=0.05), random_tokens(1, 4)
    alone = list(model.generate(x, 12, generators=generators(1, seed=2)))
    batch = list(model.generate(x.expand(5, -1), 12, generators=generators(5)))
    assert torch.equal(torch.stack(alone, dim=1)[0], torch.stack(batch, dim=1)[2])


def test_sequences_of_a_batch_start_with_different_tokens():
    model, x = make_model(std=0.05), random_tokens(1, 4)
    first = next(model.generate(x.expand(5, -1), 12, generators=generators(5)))
    assert len(set(first.tolist())) > 1


@plain_and_extras
def test_generation_stays_inside_the_vocab_slice(config):
    model, x = make_model(config, std=0.05), random_tokens(5, 4) % 7
    sampled = model.generate(x, 20, generators=generators(5), vocab_slice=slice(7))
    assert max(int(tokens.max()) for tokens in sampled) <= 6


LOGITS = torch.tensor([[1.0, 4.0, 3.0, 2.0]]).repeat(1000, 1)  # probabilities .03 .64 .24 .09
UNIFORMS = torch.arange(1000) / 1000  # starts at 0, which must not select a removed token


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 2, 3}),
        ({"temperature": 0}, {1}),
        ({"temperature": 0.01}, {1}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 1e-9}, {1}),
        ({"top_p": 1e-320}, {1}),
        ({"temperature": 1e-320}, {1}),
        ({"top_p": 0.8}, {1, 2}),
    ],
    ids=str,
)
def test_sampling_options_limit_the_tokens(options, expected):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    assert set(sample(LOGITS, UNIFORMS, **options).tolist()) == expected


def test_sampled_frequencies_equal_the_probabilities():
    frequencies = sample(LOGITS, UNIFORMS, 1.0, 0, 1.0).bincount() / 1000
    torch.testing.assert_close(frequencies, LOGITS[0].softmax(0), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("top_k", "expected"), [(0, 3), (2, 2)])
def test_largest_uniform_below_one_selects_the_last_allowed_token(top_k, expected):
    assert sample(LOGITS[:1], torch.tensor([1 - 2**-24]), 1.0, top_k, 1.0).item() == expected


# ---- loss


@plain_and_extras
def test_loss_is_the_mean_next_token_loss(config):
    model, x = make_model(config), random_tokens(2, 9)
    log_probs = model(x[:, :-1]).log_softmax(-1)
    expected = -log_probs.gather(2, x[:, 1:, None]).mean()
    torch.testing.assert_close(model(x[:, :-1], x[:, 1:]), expected)


def test_loss_over_a_vocab_slice_normalizes_over_the_slice():
    model, targets = make_model(), random_tokens(2, 24) % 50
    hidden = model.hidden(random_tokens(2, 24))
    expected = F.cross_entropy(model.head(hidden)[..., 20:70].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(hidden, targets, slice(20, 70)), expected)


def chunked_loss_inputs():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(300, 16, generator=generator).requires_grad_()
    weight = torch.randn(101, 16, generator=generator).requires_grad_()
    return h, weight, torch.randint(101, (300,), generator=generator)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_chunked_loss_equals_cross_entropy(grad, monkeypatch):
    monkeypatch.setattr("model.CHUNK_LOGITS", 128 * 101)  # 128 positions per chunk, 44 in the last
    h, weight, targets = chunked_loss_inputs()
    with torch.set_grad_enabled(grad):
        chunked = ChunkedCrossEntropy.apply(h, weight, targets)
    torch.testing.assert_close(chunked, F.cross_entropy(h @ weight.T, targets))


def test_chunked_gradients_equal_those_of_cross_entropy(monkeypatch):
    monkeypatch.setattr("model.CHUNK_LOGITS", 128 * 101)
    h, weight, targets = chunked_loss_inputs()
    chunked = torch.autograd.grad(3 * ChunkedCrossEntropy.apply(h, weight, targets), (h, weight))
    expected = torch.autograd.grad(3 * F.cross_entropy(h @ weight.T, targets), (h, weight))
    torch.testing.assert_close(chunked, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens", [repeated_tokens, random_tokens])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_loss_with_a_pointer_equals_cross_entropy_of_the_logits(grad, tokens, monkeypatch):
    monkeypatch.setattr("model.CHUNK_LOGITS", 128 * 101)
    model, windows = make_model(EXTRAS), tokens(7, 25)
    x, targets = windows[:, :-1], windows[:, 1:]  # 168 positions, 128 in the first chunk
    with torch.set_grad_enabled(grad):
        expected = F.cross_entropy(model(x).flatten(0, 1), targets.flatten())
        actual = model(x, targets)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tokens", [repeated_tokens, random_tokens])
def test_gradients_with_a_pointer_equal_those_of_cross_entropy(tokens, monkeypatch):
    monkeypatch.setattr("model.CHUNK_LOGITS", 128 * 101)
    model, windows = make_model(EXTRAS), tokens(7, 25)
    x, targets = windows[:, :-1], windows[:, 1:]
    names, params = zip(*model.named_parameters(), strict=True)
    loss = 3 * F.cross_entropy(model(x).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(loss, params)
    actual = torch.autograd.grad(3 * model(x, targets), params)
    for name, ours, theirs in zip(names, actual, expected, strict=True):
        assert theirs.abs().max() > 1e-4, name
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3, msg=name)


def test_gradients_with_a_pointer_are_finite_at_a_loss_above_100():
    """1 over the probability of a token that is not copied is infinite in fp32."""
    model, x = make_model(EXTRAS), random_tokens(2, 24)
    hidden = 100 * model.hidden(x).detach()
    hidden.requires_grad_()
    targets = torch.full_like(x, 7)
    loss = model.loss(hidden, targets, copies=model.copies(hidden / 100, x))
    assert loss > 100
    loss.backward()
    assert hidden.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.pointer.parameters())


@pytest.mark.parametrize(
    ("logits", "expected"),
    [(300 * 101, [256, 44]), (255 * 101, [128, 128, 44]), (7 * 101, [128, 128, 44])],
    ids=["rounded down", "one less", "at least 128"],
)
def test_loss_chunks_are_multiples_of_128_positions(logits, expected, monkeypatch):
    monkeypatch.setattr("model.CHUNK_LOGITS", logits)
    sizes, log_softmax = [], torch.Tensor.log_softmax

    def spy(x, *args, **kwargs):
        sizes.append(len(x))
        return log_softmax(x, *args, **kwargs)

    monkeypatch.setattr("torch.Tensor.log_softmax", spy)
    ChunkedCrossEntropy.apply(*chunked_loss_inputs())
    assert sizes == expected


LOSS_MEMORY = """
import torch
from common.device import peak_memory_gb
from model import ChunkedCrossEntropy

device = torch.device("cpu")
h = torch.randn(16_384, 16, requires_grad=True)
weight = torch.randn(49_152, 16).mul_(0.02).requires_grad_()
targets = torch.randint(len(weight), (len(h),))
before = peak_memory_gb(device)
ChunkedCrossEntropy.apply(h, weight, targets).backward()
print(peak_memory_gb(device) - before)
"""


def test_loss_of_the_default_vocabulary_uses_less_memory_than_its_logits():
    # a process of its own, because peak memory never falls
    args = [sys.executable, "-c", LOSS_MEMORY]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.1 < float(done.stdout) < 1.2  # GB; all logits take 3.2
