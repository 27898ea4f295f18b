import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_llm
from cross_entropy import ChunkedCrossEntropy
from model import KVCache, Llama, ModelConfig, sample
from muon import build_optimizers
from tools.bench import apertus

CONFIG = ModelConfig(
    vocab_size=101, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=24
)
EXTRAS = replace(CONFIG, affixes=40, value_shortcut=True, canon=3)


def make(config=CONFIG, seed=0, std=0.2, **kwargs) -> Llama:
    """A model whose weights are large enough for every part to matter to the logits."""
    model = Llama(config, **kwargs)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * std
                + (p.ndim == 1)
            )
        if config.affixes:
            model.spelling.random_(-1, config.affixes, generator=torch.Generator().manual_seed(1))
    return model


def tokens(batch, length, seed=0):
    return torch.randint(
        CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def test_same_logits_as_transformers_apertus():
    model = make()
    x = tokens(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x), apertus(model).eval()(input_ids=x).logits, atol=1e-4, rtol=1e-4
        )


def test_chunked_loss_and_gradients_equal_the_plain_ones(monkeypatch):
    monkeypatch.setattr(
        "cross_entropy.CHUNK_LOGITS", 7 * 101
    )  # 7 rows at a time, the last chunk shorter
    h, w = torch.randn(24, 16, requires_grad=True), torch.randn(101, 16, requires_grad=True)
    targets = torch.randint(101, (24,))
    plain = F.cross_entropy(h @ w.T, targets)
    expected = torch.autograd.grad(3 * plain, (h, w))
    chunked = ChunkedCrossEntropy.apply(h, w, targets)
    torch.testing.assert_close(chunked, plain)
    for ours, theirs in zip(torch.autograd.grad(3 * chunked, (h, w)), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ChunkedCrossEntropy.apply(h, w, targets), plain)


def test_affixes_add_to_the_vectors_of_the_tokens_that_have_them():
    model = make(replace(CONFIG, affixes=40))
    by_hand = torch.stack(
        [
            own + sum(model.affixes.weight[i] for i in row if i >= 0)
            for own, row in zip(model.embed.weight, model.spelling)
        ]
    )
    torch.testing.assert_close(model.vectors(slice(None)), by_hand)
    plain = make()
    plain.load_state_dict(
        {
            **{k: v for k, v in model.state_dict().items() if k in plain.state_dict()},
            "embed.weight": by_hand,
        }
    )
    torch.testing.assert_close(model(tokens(2, 24)), plain(tokens(2, 24)))  # as input and as output


def test_a_token_never_seen_moves_with_those_that_share_its_affixes():
    model = Llama(EXTRAS)
    model.init_weights(torch.Generator().manual_seed(0))
    model.spelling[[7, 8, 90], 0] = 3
    before = model.vectors(slice(None)).detach().clone()
    x = tokens(8, 24).clamp(max=80)
    for optimizer in build_optimizers(
        model, muon_lr=0.02, muon_wd=0, adamw_lr=0.01, adamw_wd=0, adamw_beta2=0.99
    ):
        model(x, x.roll(1)).backward()
        optimizer.step()
    moved = model.vectors(slice(None)) - before
    shared = model.affixes.weight[3]
    assert shared.abs().min() > 0 and torch.equal(model.affixes.weight[4], torch.zeros(32))
    own = model.embed.weight - before
    torch.testing.assert_close(moved[90] - own[90], shared)
    torch.testing.assert_close(moved[91], own[91])


def test_values_read_the_embedding_of_their_token_in_every_layer():
    model, x, seen = make(EXTRAS), tokens(2, 24), []
    for block in model.blocks:
        block.attn.v_embed_proj.register_forward_hook(
            lambda module, inputs, output: seen.append((module, output))
        )
    logits, embedded = model(x), F.rms_norm(model.vectors(x), (32,))
    assert [module for module, _ in seen] == [block.attn.v_embed_proj for block in model.blocks]
    for module, output in seen:
        torch.testing.assert_close(output, embedded @ module.weight.T)
    torch.nn.init.zeros_(model.blocks[-1].attn.v_embed_proj.weight)
    assert not torch.allclose(model(x), logits)


def test_canon_layers_add_the_positions_before_by_channel_before_attention_and_mlp():
    model, x = make(EXTRAS), tokens(2, 24)
    block, inputs = model.blocks[1], {}
    for module in (block.attn_norm, block.mlp_norm):
        module.register_forward_hook(lambda module, args, output: inputs.update({module: output}))
    for module in (block.attn.q_proj, block.mlp.up_proj):
        module.register_forward_hook(lambda module, args, output: inputs.update({module: args[0]}))
    model(x)
    for norm, canon, reader in [
        (block.attn_norm, block.attn_canon, block.attn.q_proj),
        (block.mlp_norm, block.mlp_canon, block.mlp.up_proj),
    ]:
        by_hand = inputs[norm].clone()
        for t in range(24):
            for i in range(1, min(t, 3) + 1):
                by_hand[:, t] += canon.weight[i - 1] * inputs[norm][:, t - i]
        torch.testing.assert_close(inputs[reader], by_hand)
    model.init_weights()
    assert not any(
        p.any() for name, p in model.named_parameters() if "canon" in name
    )  # training starts as a plain model


def test_a_folded_model_is_the_same_function_without_affixes():
    model, x = make(EXTRAS), tokens(2, 24)
    before = model(x)
    folded, plain = model.fold(), Llama(replace(EXTRAS, affixes=0))
    assert (
        folded.n_params() == plain.n_params()
        and folded.state_dict().keys() == plain.state_dict().keys()
    )
    torch.testing.assert_close(folded(x), before)


@pytest.mark.parametrize("config", [CONFIG, EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_compiles_as_one_graph(dtype, config, monkeypatch):
    """Traced and differentiated as torch.compile does it, without the code generation that needs a C++ compiler."""
    monkeypatch.setattr("cross_entropy.CHUNK_LOGITS", 7 * 101)
    model, x = make(config, compute_dtype=dtype), tokens(2, 24)
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    params = list(model.parameters())
    plain, traced = model(x, x.roll(1)), compiled(x, x.roll(1))
    torch.testing.assert_close(traced, plain)
    for a, b in zip(torch.autograd.grad(traced, params), torch.autograd.grad(plain, params)):
        torch.testing.assert_close(a, b, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x.roll(1)), plain.detach())


def test_loss_of_88m_shape_stays_far_below_one_tensor_of_logits():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.bench",
            "loss",
            "--device=cpu",
            "--model.d_model=16",
            "--model.n_heads=2",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    gigabytes = float(done.stdout.split("d_model 16: ")[1].split(" GB")[0])
    assert 0.1 < gigabytes < 1.2, done.stdout  # logits alone would be 3.2 GB


def test_loss_is_the_mean_next_token_loss():
    model = make()
    x = tokens(2, 9)
    logits = model(x[:, :-1])
    by_hand = -torch.stack(
        [logits[b, t].log_softmax(-1)[x[b, t + 1]] for b in range(2) for t in range(8)]
    ).mean()
    torch.testing.assert_close(model(x[:, :-1], x[:, 1:]), by_hand)


def test_fresh_model_is_as_wrong_as_guessing():
    model = Llama(CONFIG)
    model.init_weights()
    x = tokens(8, 24)
    assert model(x, x.roll(1)).item() == pytest.approx(math.log(CONFIG.vocab_size), rel=0.05)


def test_every_weight_is_initialized():
    model = Llama(CONFIG)
    for p in model.parameters():
        torch.nn.init.constant_(p, math.nan)
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in (*model.parameters(), *model.buffers()))
    model.extra = torch.nn.Parameter(torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match="extra"):
        model.init_weights()


@pytest.mark.parametrize("config", [CONFIG, EXTRAS], ids=["plain", "extras"])
def test_no_position_sees_a_later_one(config):
    model = make(config)
    x = tokens(1, 24)
    y = x.clone()
    y[0, 10] += 1
    a, b = model(x), model(y)
    assert torch.equal(a[:, :10], b[:, :10]) and not torch.allclose(a[:, 10:], b[:, 10:])


@pytest.mark.parametrize("config", [CONFIG, EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("length", [1, 23, 24])
def test_cached_decoding_equals_the_full_forward(length, config):
    model, x = make(config), tokens(3, 24)
    with torch.no_grad():
        full = model(x)
        cache = KVCache(CONFIG, 3, 24, x.device, torch.float32)
        parts = [model(x[:, :length], cache=cache)]
        parts += [model(x[:, t : t + 1], cache=cache) for t in range(length, 24)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="seq_len is 24"):
        model(x[:, :1], cache=cache)


def test_cache_takes_several_positions_at_a_time_and_rows_do_not_mix():
    model, x = make(EXTRAS), tokens(3, 24)
    with torch.no_grad():
        cache = KVCache(CONFIG, 3, 24, x.device, torch.float32)
        parts = torch.cat([model(part, cache=cache) for part in x.split([5, 7, 12], dim=1)], dim=1)
        for row in range(3):
            torch.testing.assert_close(parts[row], model(x[row : row + 1])[0], atol=1e-5, rtol=1e-5)


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


@pytest.mark.parametrize("config", [CONFIG, EXTRAS], ids=["plain", "extras"])
def test_greedy_generation_equals_argmax_of_full_forwards(config):
    model, x = make(config), tokens(2, 3)
    with torch.no_grad():
        ours = torch.stack(
            list(model.generate(x, 100, generators=generators(2), temperature=0)), dim=1
        )
        for _ in range(21):
            x = torch.cat((x, model(x)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ours, x[:, 3:])  # and it ended when the context was full


def test_a_row_draws_the_same_whatever_is_beside_it():
    model, x = make(std=0.05), tokens(1, 4)
    alone = torch.stack(list(model.generate(x, 12, generators=generators(1, seed=2))), dim=1)
    beside = torch.stack(list(model.generate(x.expand(5, -1), 12, generators=generators(5))), dim=1)
    assert torch.equal(alone[0], beside[2])
    assert len(set(beside[:, 0].tolist())) > 1, "every row began with the same token"


def test_sampling_options():
    uniforms = torch.arange(1000) / 1000  # from 0 on: it must not fall on what is left out
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0]]).repeat(1000, 1)

    def drawn(temperature=1.0, top_k=0, top_p=1.0):
        return set(sample(logits, uniforms, temperature, top_k, top_p).tolist())

    assert (
        drawn(temperature=0)
        == {1}
        == drawn(top_k=1)
        == drawn(top_p=1e-9)
        == drawn(temperature=0.01)
    )
    assert drawn(top_k=2) == {1, 2} == drawn(top_p=0.8)  # probabilities 0.03, 0.64, 0.24, 0.09
    assert drawn() == {0, 1, 2, 3} == drawn(top_k=9)
    shares = sample(logits, uniforms, 1.0, 0, 1.0).bincount() / 1000
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=2e-3, rtol=0)
    end = torch.tensor([1 - 2**-24])  # the largest below 1 takes the last that is left in
    assert sample(logits[:1], end, 1.0, 0, 1.0) == 3 and sample(logits[:1], end, 1.0, 2, 1.0) == 2


def test_bf16_computes_near_fp32_and_keeps_fp32_weights():
    exact, rough = make(), make(compute_dtype=torch.bfloat16)
    x = tokens(2, 24)
    a, b = exact(x, x.roll(1)), rough(x, x.roll(1))
    b.backward()
    assert b.item() == pytest.approx(a.item(), rel=0.02) and b.item() != a.item()
    assert (
        {p.dtype for p in rough.parameters()}
        == {p.grad.dtype for p in rough.parameters()}
        == {torch.float32}
    )


@pytest.mark.parametrize("config", [CONFIG, EXTRAS], ids=["plain", "extras"])
def test_flops_match_those_counted_by_torch(config):
    model = Llama(config)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # it counts no fused attention
        F.cross_entropy(model(tokens(2, 24)).flatten(0, 1), tokens(2, 24).flatten()).backward()
    attention = (
        12 * CONFIG.n_layers * CONFIG.d_model * CONFIG.seq_len
    )  # torch counts the masked half too
    counted = counter.get_total_flops() / 48
    assert model.flops_per_token() + attention / 2 == pytest.approx(counted, rel=0.01)


def test_published_shape_has_88_million_parameters():
    with torch.device("meta"):
        plain, default = Llama(ModelConfig()), Llama(train_llm.Config().model)
    assert round(plain.n_params() / 1e6) == 89 and plain.n_params() < default.n_params() < 90e6


@pytest.mark.parametrize(
    "bad",
    [
        {"n_layers": 0},
        {"d_ff": -4},
        {"n_kv_heads": 3},
        {"d_model": 33},
        {"vocab_size": 70_000},
        {"canon": -1},
    ],
)
def test_impossible_shapes_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) + "|n_heads"):
        ModelConfig(**bad)
