"""Measure this code against an alternative, alternating between both in one run.

    python -m tools.bench training    # tokens/s against transformers' Apertus with AdamW
    python -m tools.bench extras      # tokens/s with and without the default's additions to Llama
    python -m tools.bench decoding    # image tokens/s of the 40M model with and without a KV cache
    python -m tools.bench loss        # peak memory of the loss against one tensor of all logits

Shapes: B batch, T positions, N positions of the loss, V vocabulary, C d_model.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

import train_llm
import train_multimodal
import train_vqvae
from common.config import HumanInt, UserError, check_positive, run_script
from common.device import Clock, device_name, peak_memory_gb, resolve_device
from common.loop import update
from model import ChunkedCrossEntropy, KVCache, Llama, ModelConfig
from muon import build_optimizers


@dataclass
class Config:
    """What to measure, and how."""

    what: Literal["training", "extras", "decoding", "loss"]
    """Measurement. training: speed against transformers; extras: speed with and without the
    additions to a plain Llama; decoding: speed with and without a KV cache; loss: peak memory of
    the loss and its gradient."""
    rounds: int = 5
    """Number of times that each side is measured; the sides alternate."""
    steps: int = 3
    """Training steps per measurement."""
    image_tokens: int = 256
    """Image tokens to decode per measurement, at most 1,024 (one image)."""
    batch_tokens: HumanInt = HumanInt(4096)
    """Tokens per training step, in one forward pass."""
    loss_tokens: HumanInt = HumanInt(16_384)
    """Number of positions in the loss measurement."""
    loss_vocab: HumanInt = HumanInt(49_152)
    """Vocabulary size in the loss measurement."""
    device: str = "auto"
    """Device: cpu, cuda, ... auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on GPUs with native bfloat16, otherwise float32."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to use torch.compile, on both sides. auto: only on a GPU."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            vocab_size=8192,
            d_model=256,
            n_layers=6,
            n_heads=4,
            n_kv_heads=2,
            d_ff=1024,
            seq_len=256,
        )
    )


# ---- training speed
def apertus(model: Llama):
    """The same architecture (arXiv 2509.14233) from transformers, with the weights of `model`."""
    from transformers import ApertusConfig, ApertusForCausalLM

    c = model.config
    theirs = ApertusForCausalLM(
        ApertusConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            hidden_act="relu2",
            rms_norm_eps=1e-6,
            max_position_embeddings=c.seq_len,
            tie_word_embeddings=False,
            pad_token_id=None,  # the default id may exceed a tiny vocabulary
            attn_implementation="sdpa",
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    )
    names = {
        "blocks.": "layers.",
        "attn.": "self_attn.",
        "attn_norm.": "attention_layernorm.",
        "mlp_norm.": "feedforward_layernorm.",
        "embed.": "embed_tokens.",
    }
    weights = {}
    for name, weight in model.state_dict().items():
        parts = [f"{part}." for part in name.removesuffix(".weight").split(".")]
        weights["model." + "".join(names.get(part, part) for part in parts) + "weight"] = weight
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # (V, C)
    # our forward pass scales embeddings by sqrt(d_model), theirs does not
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] * c.d_model**0.5
    theirs.load_state_dict(weights)
    return theirs


def training(cfg: Config, device: torch.device) -> None:
    """Compare the tokens/s of this code with Muon and of transformers with AdamW."""
    dtype = getattr(torch, cfg.dtype)
    ours = Llama(cfg.model, compute_dtype=dtype)
    ours.init_weights()
    theirs = apertus(ours).to(device)
    # tied like ours; the missing scale does not matter here, because only speed is measured
    theirs.model.embed_tokens.weight = theirs.lm_head.weight
    their_forward = torch.compile(theirs) if cfg.compile else theirs

    def their_loss(inputs, targets):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return their_forward(input_ids=inputs, labels=inputs, shift_labels=targets).loss

    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    sides = {
        "blueberry, Muon": our_side(cfg, ours.to(device)),
        "transformers Apertus, AdamW": (their_loss, [adamw]),
    }
    race(cfg, device, sides)


def extras(cfg: Config, device: torch.device) -> None:
    """Compare the tokens/s of training with the extras that train_llm.py uses and without them."""
    sides = {}
    for name, source in [("with extras", train_llm.Config().model), ("without", ModelConfig())]:
        switches = ("subwords", "value_embed", "canon")
        config = replace(cfg.model, **{switch: getattr(source, switch) for switch in switches})
        model = Llama(config, compute_dtype=getattr(torch, cfg.dtype))
        model.init_weights()
        if config.subwords:  # seven per token, the average of a real tokenizer
            model.token_subwords[:, :7].random_(0, config.subwords)
        sides[name] = our_side(cfg, model.to(device))
    race(cfg, device, sides)


def our_side(cfg: Config, model: Llama) -> tuple:
    """The loss of a model as a function of inputs and targets, and its optimizers."""
    optimizers = build_optimizers(
        model,
        muon_lr=1e-3,
        muon_wd=0,
        adamw_lr=1e-3,
        adamw_wd=0,
        adamw_beta2=0.95,
        dtype=model.compute_dtype,
        compile=cfg.compile,
    )
    return torch.compile(model) if cfg.compile else model, optimizers


def race(cfg: Config, device: torch.device, sides: dict[str, tuple]) -> None:
    """Compare the training speed of the sides {name: (loss, optimizers)}."""
    shape = (cfg.batch_tokens // cfg.model.seq_len, cfg.model.seq_len + 1)
    windows = torch.randint(cfg.model.vocab_size, shape, device=device)  # (B, T + 1)
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()  # (B, T) each

    def train(loss, optimizers) -> None:
        for _ in range(cfg.steps):
            loss(inputs, targets).backward()
            update(optimizers)

    functions = {name: partial(train, *side) for name, side in sides.items()}
    compare(cfg, device, functions, cfg.steps * inputs.numel())


def compare(
    cfg: Config, device: torch.device, sides: dict[str, Callable[[], None]], n_tokens: int
) -> None:
    """Run two sides alternately, n_tokens each time; print their tokens/s and the ratio."""
    speeds = {name: [] for name in sides}
    for turn in range(cfg.rounds + 1):  # the first is warm-up
        for name, run in sides.items():
            clock = Clock(device)
            clock.start()
            run()
            clock.stop()
            if turn:
                speeds[name].append(n_tokens / clock.seconds)
    for name, values in speeds.items():
        print(
            f"{name}: {statistics.median(values):,.1f} tokens/s "
            f"(from {min(values):,.1f} to {max(values):,.1f})"
        )
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    print(
        f"ratio: {statistics.median(ratios):.2f}, median of {len(ratios)} "
        f"(from {min(ratios):.2f} to {max(ratios):.2f})"
    )


# ---- decoding speed
@torch.no_grad()
def decoding(cfg: Config, device: torch.device) -> None:
    """Compare the image tokens/s of one image with a KV cache and with full forward passes."""
    config, n_codes = train_multimodal.Config().model, train_vqvae.Config().model.codebook_size
    code_slice = slice(config.vocab_size - n_codes, None)
    model = Llama(config, compute_dtype=getattr(torch, cfg.dtype))
    model.init_weights()
    model.to(device)
    prompt = torch.zeros(1, 8, dtype=torch.long, device=device)

    def decode(cache: KVCache | None) -> None:
        tokens = prompt
        for _ in range(cfg.image_tokens):
            logits = model.head(model.hidden(tokens, cache)[:, -1], code_slice)  # (1, n_codes)
            token = logits.argmax(-1, keepdim=True) + code_slice.start  # (1, 1)
            tokens = torch.cat((tokens, token), dim=1) if cache is None else token  # (1, T)

    def decode_with_cache() -> None:
        decode(KVCache(config, 1, 8 + cfg.image_tokens, device, model.compute_dtype))

    sides = {"with a cache": decode_with_cache, "without": partial(decode, None)}
    compare(cfg, device, sides, cfg.image_tokens)


# ---- loss memory
def loss(cfg: Config, device: torch.device) -> float:
    """Print and return by how many GB the loss and its gradient raise the peak memory."""
    dtype, d_model = getattr(torch, cfg.dtype), cfg.model.d_model
    h = torch.randn(cfg.loss_tokens, d_model, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(cfg.loss_vocab, d_model, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(cfg.loss_vocab, (cfg.loss_tokens,), device=device)  # (N,)
    before, start = peak_memory_gb(device), time.perf_counter()
    ChunkedCrossEntropy.apply(h, weight, targets).backward()  # h is (N, C), weight (V, C)
    used, seconds = peak_memory_gb(device) - before, time.perf_counter() - start
    full = 4 * cfg.loss_tokens * cfg.loss_vocab / 1e9
    print(
        f"loss and gradient of {cfg.loss_tokens} x {cfg.loss_vocab}, d_model {d_model}: "
        f"{used:.2f} GB in {seconds:.1f} s; one fp32 tensor of logits: {full:.2f} GB"
    )
    return used


def check(cfg: Config) -> None:
    """Raises UserError for settings that cannot be measured."""
    check_positive(
        cfg, "rounds", "steps", "image_tokens", "batch_tokens", "loss_tokens", "loss_vocab"
    )
    if cfg.image_tokens > 1024:
        raise UserError(f"--image_tokens is {cfg.image_tokens}; it must be at most 1024")
    if cfg.batch_tokens < cfg.model.seq_len:
        raise UserError(
            f"--batch_tokens {cfg.batch_tokens} is less than one sequence; set it to "
            f"--model.seq_len {cfg.model.seq_len} or more"
        )
    canon = train_llm.Config().model.canon
    if cfg.what == "extras" and cfg.model.seq_len <= canon:
        raise UserError(
            f"--model.seq_len is {cfg.model.seq_len}; the extras need at least {canon + 1}"
        )
    for name in ("subwords", "value_embed", "canon", "n_image_positions"):
        if getattr(cfg.model, name):
            raise UserError(
                f"--model.{name} is {getattr(cfg.model, name)}, but only a plain Llama can be "
                f"compared; omit --model.{name}"
            )


def main(cfg: Config) -> None:
    """Measure and print. Raises UserError."""
    check(cfg)
    device = resolve_device(cfg)
    compiled = "compiled" if cfg.compile else "not compiled"
    print(f"{device_name(device)}, {cfg.dtype}, torch {torch.__version__}, {compiled}")
    measurements = {"training": training, "extras": extras, "decoding": decoding, "loss": loss}
    measurements[cfg.what](cfg, device)


if __name__ == "__main__":
    run_script(main, Config, prog="python -m tools.bench", description=__doc__)
