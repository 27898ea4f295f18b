"""Measure this code against others, side by side in one run.

python -m tools.bench training       # tokens/s against transformers' Apertus of the same shape with AdamW
python -m tools.bench extras         # tokens/s of training with what the default adds to a plain Llama, against without
python -m tools.bench drawing        # visual words/s of the 40M model with a cache against without
python -m tools.bench loss           # peak memory of the loss and its gradient against one full tensor of logits
"""

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

import train_llm
import train_multimodal
import train_vqvae
from common import (
    Clock,
    Count,
    check_positive,
    device_name,
    peak_memory_gb,
    resolve_device,
    run_script,
)
from cross_entropy import ChunkedCrossEntropy
from model import KVCache, Llama, ModelConfig
from muon import build_optimizers


@dataclass
class Config:
    """What to measure."""

    what: Literal["training", "extras", "drawing", "loss"]
    """The speed of training, against another's or of our model without its extras, of drawing, or the memory of the loss."""
    rounds: int = 5
    """Times that each side is measured, by turns."""
    steps: int = 3
    """Training steps a time."""
    words: int = 256
    """Visual words drawn a time, of the 1,024 of a picture."""
    batch_tokens: Count = Count(4096)
    """Tokens a step, in one forward pass."""
    loss_tokens: Count = Count(16_384)
    """Positions of the loss measurement."""
    loss_vocab: Count = Count(49_152)
    """Vocabulary of the loss measurement."""
    device: str = "auto"
    """cpu, cuda, ...; auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto: bfloat16 where the device has it."""
    compile: bool | Literal["auto"] = "auto"
    """Compile both sides; auto: on a GPU."""
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


def apertus(model: Llama):
    """transformers' implementation of the same architecture (arXiv 2509.14233), with the weights of `model`."""
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
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = (
        weights["lm_head.weight"] * c.d_model**0.5
    )  # where we scale, they do not
    theirs.load_state_dict(weights)
    return theirs


def training(cfg: Config, device: torch.device) -> None:
    """Print tokens/s of this code with Muon and of transformers with AdamW, and their ratio."""
    dtype = getattr(torch, cfg.dtype)
    ours = Llama(cfg.model, compute_dtype=dtype)
    ours.init_weights()
    theirs = apertus(ours).to(device)
    theirs.model.embed_tokens.weight = (
        theirs.lm_head.weight
    )  # tied as ours: only the speed matters here
    their_forward = torch.compile(theirs) if cfg.compile else theirs

    def their_loss(inputs, targets):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return their_forward(input_ids=inputs, labels=inputs, shift_labels=targets).loss

    race(
        cfg,
        device,
        {
            "blueberry, Muon": our_side(cfg, ours.to(device)),
            "transformers Apertus, AdamW": (
                their_loss,
                [torch.optim.AdamW(theirs.parameters(), lr=1e-3)],
            ),
        },
    )


def extras(cfg: Config, device: torch.device) -> None:
    """Print tokens/s of training with the affixes, value shortcut and Canon layers of train_llm.py, and without, and their ratio."""
    sides, ours = {}, train_llm.Config().model
    for name, source in [("with extras", ours), ("without", ModelConfig())]:
        config = replace(
            cfg.model,
            affixes=source.affixes,
            value_shortcut=source.value_shortcut,
            canon=source.canon,
        )
        model = Llama(config, compute_dtype=getattr(torch, cfg.dtype))
        model.init_weights()
        if config.affixes:
            model.spelling[:, :7].random_(
                0, config.affixes
            )  # seven of them, as a token has on average
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
    """Train the sides {name: (loss, optimizers)} by turns and compare their tokens/s."""
    shape = (cfg.batch_tokens // cfg.model.seq_len, cfg.model.seq_len + 1)
    windows = torch.randint(cfg.model.vocab_size, shape, device=device)
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    speeds = {name: [] for name in sides}
    for turn in range(cfg.rounds + 1):  # the first is warm-up
        for name, (loss, optimizers) in sides.items():
            clock = Clock(device)
            clock.start()
            for _ in range(cfg.steps):
                loss(inputs, targets).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            clock.stop()
            if turn:
                speeds[name].append(cfg.steps * inputs.numel() / clock.seconds)
    compare(speeds)


def compare(speeds: dict[str, list[float]]) -> None:
    """Print the tokens/s of two sides, measured by turns, and their ratio."""
    for name, values in speeds.items():
        print(
            f"{name}: {statistics.median(values):,.1f} tokens/s (from {min(values):,.1f} to {max(values):,.1f})"
        )
    ratios = [a / b for a, b in zip(*speeds.values())]
    print(
        f"ratio: {statistics.median(ratios):.2f}, median of {len(ratios)} (from {min(ratios):.2f} to {max(ratios):.2f})"
    )


@torch.no_grad()
def drawing(cfg: Config, device: torch.device) -> None:
    """Print visual words/s of one picture with a cache, and of computing the whole sequence for every word."""
    config, codes = train_multimodal.Config().model, train_vqvae.Config().model.codebook_size
    model, rows = (
        Llama(config, compute_dtype=getattr(torch, cfg.dtype)),
        slice(config.vocab_size - codes, None),
    )
    model.init_weights()
    model.to(device)
    prompt = torch.zeros(1, 8, dtype=torch.long, device=device)

    def draw(cached: bool) -> None:
        cache = KVCache(config, 1, 8 + cfg.words, device, model.compute_dtype) if cached else None
        tokens = prompt
        for _ in range(cfg.words):
            word = (
                model.head(model.hidden(tokens, cache)[:, -1], rows).argmax(-1, keepdim=True)
                + rows.start
            )
            tokens = word if cached else torch.cat((tokens, word), dim=1)

    speeds = {"with a cache": [], "without": []}
    for turn in range(cfg.rounds + 1):  # the first is warm-up
        for name, values in speeds.items():
            clock = Clock(device)
            clock.start()
            draw(name == "with a cache")
            clock.stop()
            if turn:
                values.append(cfg.words / clock.seconds)
    compare(speeds)


def loss(cfg: Config, device: torch.device) -> float:
    """Print and return the GB by which loss and gradient raise the peak of memory."""
    dtype, d_model = getattr(torch, cfg.dtype), cfg.model.d_model
    h = torch.randn(cfg.loss_tokens, d_model, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(cfg.loss_vocab, d_model, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(cfg.loss_vocab, (cfg.loss_tokens,), device=device)
    before, start = peak_memory_gb(device), time.perf_counter()
    ChunkedCrossEntropy.apply(h, weight, targets).backward()
    used, seconds = peak_memory_gb(device) - before, time.perf_counter() - start
    full = 4 * cfg.loss_tokens * cfg.loss_vocab / 1e9
    print(
        f"loss and gradient of {cfg.loss_tokens} x {cfg.loss_vocab}, d_model {d_model}: {used:.2f} GB "
        f"in {seconds:.1f} s; one fp32 tensor of logits: {full:.2f} GB"
    )
    return used


def main(cfg: Config) -> None:
    check_positive(cfg, "rounds", "steps", "words", "batch_tokens", "loss_tokens", "loss_vocab")
    device = resolve_device(cfg)
    print(
        f"{device_name(device)}, {cfg.dtype}, torch {torch.__version__}, {'compiled' if cfg.compile else 'not compiled'}"
    )
    {"training": training, "extras": extras, "drawing": drawing, "loss": loss}[cfg.what](
        cfg, device
    )


if __name__ == "__main__":
    run_script(Config, main)
