"""The language model: a Llama-style decoder (arXiv 2302.13971) in one file.

RMSNorm before each sublayer, rotary positions, grouped-query attention with QK-norm, a squared-ReLU MLP
(arXiv 2109.08668), no biases, input and output embeddings tied. Weights are fp32; the forward casts them
to `compute_dtype` where they are used, so the optimizer always sees full precision.

Shapes: B batch, T positions, V vocabulary, C d_model, H heads, G key/value heads, D head dimension.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cross_entropy import ChunkedCrossEntropy

SPELLING = 10  # affixes a token has at most


@dataclass
class ModelConfig:
    """Shape of the model."""

    vocab_size: int = 49_152
    """Rows of the embedding; at least the number of tokenizer entries, at most 65,536."""
    d_model: int = 512
    """Width of the residual stream."""
    n_layers: int = 22
    """Number of blocks."""
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int = 4
    """Key and value heads; divides n_heads."""
    d_ff: int = 2048
    """Hidden width of the MLP."""
    seq_len: int = 2048
    """Positions a sequence has at most."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    affixes: int = 0
    """Vectors for parts of spelling (beginnings, ends, letter case) that tokens share; 0: each token has its own alone."""
    value_shortcut: bool = False
    """Values of every layer read the embedding of their token too."""
    canon: int = 0
    """Canon layers: earlier positions added, weighted by channel, to what attention and MLP read; 0: none."""
    cells: int = 0
    """Cells of a picture's grid: a learned vector for each is added where its visual word is predicted; 0 for text."""

    def __post_init__(self):
        for name in (
            "vocab_size",
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "d_ff",
            "seq_len",
            "rope_theta",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be positive")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"model.d_model {self.d_model} does not split into {self.n_heads} heads of even size: "
                f"choose a multiple of {2 * self.n_heads}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_heads {self.n_heads} is not divisible by model.n_kv_heads {self.n_kv_heads}"
            )
        for name in ("affixes", "canon", "cells"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must not be negative")
        if self.canon >= self.seq_len:
            raise ValueError(
                f"model.canon is {self.canon}: it must be less than model.seq_len {self.seq_len}"
            )
        if self.vocab_size > 65_536:
            raise ValueError(
                f"model.vocab_size {self.vocab_size} does not fit the uint16 token files: at most 65536"
            )

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


class Linear(nn.Linear):
    """A linear map without bias whose fp32 weight is cast to the input's dtype."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned gain (arXiv 1910.07467)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each (seq_len, D/2), fp32 (arXiv 2104.09864)."""
    freqs = config.rope_theta ** (-torch.arange(0, config.d_head, 2).double() / config.d_head)
    angles = torch.outer(torch.arange(config.seq_len).double(), freqs)
    return angles.cos().float(), angles.sin().float()


def axial(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a rotary table for row and column coordinates (B, T, 2): (B, T, D/2), even pairs by row, odd by column.

    Where both coordinates are equal, as in text, these are the rows of one dimension (interleaved M-RoPE, arXiv 2409.12191).
    """
    rows, columns = table[positions].unbind(2)  # (B, T, D/2) each
    odd = torch.arange(table.shape[-1], device=table.device) % 2 == 1
    return torch.where(odd, columns, rows)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (B, T, H, D) by angles ([B,] T, D/2); dimension i is paired with i + D/2 as in Hugging Face Llama."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # ([B,] T, 1, D/2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class KVCache:
    """What decoding keeps of the positions seen so far, so that it computes each once: keys, values, what Canon layers saw."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (2, config.n_layers, batch, config.n_kv_heads, max_len, config.d_head)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.recent: dict[Canon, Tensor] = {}  # (B, canon, C) each
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, each (B, G, T, D), behind what `layer` holds; return all of it. `Llama` moves `length`."""
        end = self.length + k.shape[2]
        self.kv[0, layer, :, :, self.length : end] = k
        self.kv[1, layer, :, :, self.length : end] = v
        return self.kv[0, layer, :, :, :end], self.kv[1, layer, :, :, :end]


class Canon(nn.Module):
    """Canon layer (arXiv 2512.17351): a position plus the few before it, each weighted by channel, a short causal convolution."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.canon, config.d_model))

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        n, T = len(self.weight), x.shape[1]
        past = cache.recent.get(self) if cache is not None else None
        x = F.pad(x, (0, 0, n, 0)) if past is None else torch.cat((past, x), dim=1)  # (B, n + T, C)
        if cache is not None:
            cache.recent[self] = x[:, -n:]
        return x[:, n:] + sum(
            x[:, n - i : n - i + T] * w for i, w in enumerate(self.weight.to(x.dtype), start=1)
        )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.d_head = layer, config.d_head
        kv_dim = config.n_kv_heads * config.d_head
        self.q_proj = Linear(config.d_model, config.d_model)
        self.k_proj = Linear(config.d_model, kv_dim)
        self.v_proj = Linear(config.d_model, kv_dim)
        self.o_proj = Linear(config.d_model, config.d_model)
        self.v_embed_proj = Linear(config.d_model, kv_dim) if config.value_shortcut else None
        self.q_norm = RMSNorm(config.d_head)
        self.k_norm = RMSNorm(config.d_head)

    def forward(
        self, x: Tensor, embedded: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if (
            self.v_embed_proj is not None
        ):  # value embeddings as projections: deep layers do not lose which token it was
            v = v + self.v_embed_proj(embedded)
        q, k, v = (y.view(B, T, -1, self.d_head) for y in (q, k, v))  # (B, T, H or G, D)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, D)
        mask, causal = None, True
        if cache is not None:
            past = cache.length
            k, v = cache.append(self.layer, k, v)  # (B, G, past + T, D)
            if past:  # is_causal would align the mask with the first key, not the last; one position sees them all
                mask = (
                    torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
                    if T > 1
                    else None
                )
                causal = False
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.d_model)
        self.mlp = MLP(config)
        self.attn_canon, self.mlp_canon = (
            (Canon(config), Canon(config)) if config.canon else (None, None)
        )

    def forward(
        self, x: Tensor, embedded: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None
    ) -> Tensor:
        h = self.attn_norm(x)
        x = x + self.attn(
            self.attn_canon(h, cache) if self.attn_canon else h, embedded, cos, sin, cache
        )
        h = self.mlp_norm(x)
        return x + self.mlp(self.mlp_canon(h, cache) if self.mlp_canon else h)


class Llama(nn.Module):
    """The decoder. `compute_dtype` is the dtype of activations; weights stay fp32."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model)
        self.cells = nn.Embedding(config.cells, config.d_model) if config.cells else None
        self.affixes = nn.Embedding(config.affixes, config.d_model) if config.affixes else None
        if config.affixes:  # which of them each token has, -1 for none: data.tokenizer.spelling
            self.register_buffer(
                "spelling", torch.full((config.vocab_size, SPELLING), -1, dtype=torch.int32)
            )
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew. Raises ValueError at a parameter this does not know."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(p)
            elif name.endswith(("affixes.weight", "canon.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                raise ValueError(
                    f"no initialization for parameter {name} of shape {tuple(p.shape)}"
                )

    def vectors(self, tokens: Tensor | slice) -> Tensor:
        """Embeddings (..., C) of tokens or of rows of the vocabulary: own vectors plus those of affixes (arXiv 1607.04606)."""
        own = self.embed.weight[tokens] if isinstance(tokens, slice) else self.embed(tokens)
        if self.affixes is None:
            return own
        padded = F.pad(self.affixes.weight, (0, 0, 1, 0))  # row 0 stands for none
        bags = self.spelling[tokens].flatten(0, -2) + 1
        return own + F.embedding_bag(bags, padded, mode="sum", padding_idx=0).view_as(own)

    @torch.no_grad()
    def fold(self) -> "Llama":
        """Add the affixes to the embedding for good: the same function as a plain table, for when training is over."""
        self.embed.weight.copy_(self.vectors(slice(None)))
        self.config, self.affixes, self.spelling = replace(self.config, affixes=0), None, None
        return self

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        layout: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, C), for tokens (B, T).

        With a cache, `tokens` follow the positions the cache holds, and the cache takes them in. The layout of a
        sequence with a picture is the row and column of each token (B, T, 2) and the cell (B, T) whose word it predicts,
        -1 for none; without one, tokens stand in a row.
        """
        past, T = cache.length if cache is not None else 0, tokens.shape[1]
        assert past + T <= self.config.seq_len, (
            f"{past} + {T} positions, seq_len is {self.config.seq_len}"
        )
        x = self.vectors(tokens)  # (B, T, C)
        if layout is None:
            cos, sin = self.cos[past : past + T], self.sin[past : past + T]
        else:
            positions, cells = layout
            cos, sin = axial(self.cos, positions), axial(self.sin, positions)
            x = x + self.cells(cells.clamp(min=0)) * (cells >= 0)[..., None]
        # scaled, because what suits the tied head as weights is small beside what the blocks add (arXiv 1706.03762)
        x = x.to(self.compute_dtype) * math.sqrt(self.config.d_model)
        embedded = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        for block in self.blocks:
            x = block(x, embedded, cos, sin, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def head(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Logits (..., V) in fp32 of hidden x (..., C), over the given rows of the vocabulary alone."""
        return F.linear(x, self.vectors(rows).to(x.dtype)).float()

    def loss(self, x: Tensor, targets: Tensor, rows: slice = slice(None)) -> Tensor:
        """Mean loss in nats per token of hidden x (B, T, C), over the given rows; targets (B, T) count from the first."""
        return ChunkedCrossEntropy.apply(x.flatten(0, 1), self.vectors(rows), targets.flatten())

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits (B, T, V) in fp32 for tokens (B, T), or with targets (B, T) the mean loss in nats per token."""
        x = self.hidden(tokens, cache)
        return self.head(x) if targets is None else self.loss(x, targets)

    def n_params(self) -> int:
        """Weights in all, the tied embedding counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Forward and backward FLOPs a training token: 6 a matrix weight, plus causal attention over seq_len."""
        matrices = sum(
            p.numel()
            for name, p in self.named_parameters()
            if name.endswith(("embed.weight", "_proj.weight"))
        )
        return 6 * matrices + 6 * self.config.n_layers * self.config.d_model * self.config.seq_len

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_tokens: int,
        *,
        generators: Sequence[torch.Generator],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        rows: slice = slice(None),
    ) -> Iterator[Tensor]:
        """Yield the tokens that follow prompt (B, T), one (B,) at a time, at most until seq_len is full.

        Row i draws from generators[i] alone, so a row does not depend on the rows beside it. Only the given rows of the
        vocabulary, a slice from 0 on, may follow.
        """
        B, T = prompt.shape
        assert len(generators) == B, f"{len(generators)} generators for {B} rows"
        end = min(T + max_tokens, self.config.seq_len)
        cache = KVCache(self.config, B, end, prompt.device, self.compute_dtype)
        tokens = prompt
        for _ in range(end - T):
            logits = self.head(self.hidden(tokens, cache)[:, -1], rows)  # (B, V)
            uniforms = torch.cat([torch.rand(1, generator=g) for g in generators]).to(logits.device)
            tokens = sample(logits, uniforms, temperature, top_k, top_p)[:, None]  # (B, 1)
            yield tokens[:, 0]


def sample(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """The token of each row of logits (B, V) where its cumulative probability passes uniforms (B,) in [0, 1): (B,).

    temperature 0 takes the likeliest; top_k > 0 keeps the k likeliest; top_p < 1 keeps the smallest set of
    tokens whose probabilities reach p (arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        outside = sorted_probs.cumsum(-1) - sorted_probs >= top_p  # the first token always stays
        probs = probs.masked_fill(outside.scatter(1, order, outside), 0)
    mass = probs.double().cumsum(-1)  # in fp32 a uniform near 1 could pass the end
    return (mass <= uniforms[:, None] * mass[:, -1:]).sum(-1)
