"""The language model: a Llama-style decoder (arXiv 2302.13971) in one file.

RMSNorm before each sublayer, rotary positions, grouped-query attention with QK-norm, a squared-ReLU
MLP (arXiv 2109.08668), no biases, tied input and output embeddings. Weights are fp32; the forward
pass casts them to `compute_dtype` where they are used, so the optimizer always sees full precision.
`Llama.for_inference` casts them once.

Five optional additions, each off at 0 or False in ModelConfig:

- subwords: as in fastText (arXiv 1607.04606), a token's embedding is its own vector plus the
  vectors of its prefixes, suffixes, lowercase form and letter case, which other tokens share.
- value_embed: every layer adds a projection of the normalized token embedding to the attention
  values, so deep layers still know which token each position holds (value embeddings).
- canon: before attention and before the MLP, a Canon layer (arXiv 2512.17351) adds the few
  preceding positions to each position with a learned weight per channel.
- pointer: with a learned probability, the next token is copied from the context (pointer sentinel
  mixture, arXiv 1609.07843), so the model need not learn in its weights that texts repeat words.
- n_image_positions: a learned embedding per position of an image tells the model which image
  position the next token fills.

Shapes: B batch, T positions, V vocabulary, C d_model, H query heads, G key/value heads, D head
dimension, F hidden width of the MLP, N = B * T.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SUBWORDS = 10  # per token: 4 prefixes, 4 suffixes, the lowercase form, the letter case

# Most logits the loss holds at a time, 128 MB in fp32: large for a GPU, good on a CPU, docs/LOG.md
CHUNK_LOGITS = 2**25


KEY_BLOCK = 128  # decoding attends to this many cached positions, or a multiple of it


# ---- config


@dataclass
class ModelConfig:
    """Shape of the model."""

    vocab_size: int = 49_152
    """Number of token embeddings, at most 65,536. Text: at least the size of the tokenizer. With
    images: exactly the size of the tokenizer + 2 + the number of codes."""
    d_model: int = 512
    """Width of the residual stream in channels; a multiple of 2 * n_heads."""
    n_layers: int = 22
    """Number of transformer blocks."""
    n_heads: int = 8
    """Number of query heads in each attention layer."""
    n_kv_heads: int = 4
    """Number of key/value heads in each attention layer (grouped-query attention); must divide
    n_heads."""
    d_ff: int = 2048
    """Hidden width of the MLP in channels."""
    seq_len: int = 2048
    """Maximum sequence length in tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies (RoPE)."""
    subwords: int = 0
    """Number of subword embeddings (prefixes, suffixes, lowercase forms, letter case) that tokens
    share, added to each token's own embedding; 0 turns subwords off."""
    value_embed: bool = False
    """Add a projection of the normalized token embedding to the attention values in every layer."""
    canon: int = 0
    """Number of preceding positions that Canon layers add, with a learned weight per channel, to
    the inputs of attention and MLP; 0 turns Canon layers off."""
    pointer: int = 0
    """Width in channels of the queries and keys of the pointer, which copies tokens of the context;
    0 turns it off. Text-only models."""
    n_image_positions: int = 0
    """Number of image tokens per image; a learned embedding of the image position is added where
    the next token is an image token; 0 for text-only models."""

    def __post_init__(self):
        if self.vocab_size > 65_536:
            raise ValueError(
                f"model.vocab_size is {self.vocab_size}; it must be at most 65536 to fit the "
                "uint16 token files"
            )
        can_be_zero = ("subwords", "value_embed", "canon", "pointer", "n_image_positions")
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name not in can_be_zero):
                raise ValueError(
                    f"model.{name} is {value}; "
                    f"it must be {'0 or more' if name in can_be_zero else 'positive'}"
                )
            limit = 1000 if name == "n_layers" else 2**20  # more would hang or overflow
            if name != "rope_theta" and value > limit:
                raise ValueError(f"model.{name} is {value}; it must be at most {limit}")
        if not self.rope_theta >= 1:  # also true for NaN
            raise ValueError(f"model.rope_theta is {self.rope_theta}; it must be at least 1")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"model.d_model {self.d_model} does not split into {self.n_heads} heads of even "
                f"size; set it to a multiple of {2 * self.n_heads}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_heads {self.n_heads} is not divisible by model.n_kv_heads "
                f"{self.n_kv_heads}; set model.n_kv_heads to a divisor of {self.n_heads}"
            )
        if self.canon >= self.seq_len:
            raise ValueError(
                f"model.canon is {self.canon}; it must be less than model.seq_len {self.seq_len}"
            )

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


# ---- building blocks


class Linear(nn.Linear):
    """A linear map without bias whose fp32 weight is cast to the input's dtype."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))  # (..., d_out)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned gain (arXiv 1910.07467)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles (arXiv 2104.09864), each (seq_len, D/2), fp32."""
    freqs = config.rope_theta ** (-torch.arange(0, config.d_head, 2).double() / config.d_head)
    angles = torch.outer(torch.arange(config.seq_len).double(), freqs)  # (seq_len, D/2)
    return angles.cos().float(), angles.sin().float()


def rotary_2d(table: Tensor, position_ids: Tensor) -> Tensor:
    """Look up a rotary table (seq_len, D/2) at rows and columns (B, T, 2): (B, T, D/2).

    Even frequencies encode the row, odd ones the column (interleaved M-RoPE, arXiv 2409.12191).
    Where row equals column, as in text, the result is that of one-dimensional positions.
    """
    row, column = table[position_ids].unbind(2)  # (B, T, D/2) each
    odd = torch.arange(table.shape[-1], device=table.device) % 2 == 1  # (D/2,)
    return torch.where(odd, column, row)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, H, D) by angles ([B,] T, D/2), pairing i with i + D/2 as Hugging Face Llama."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # ([B,] T, 1, D/2)
    x1, x2 = x.float().chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)  # (B, T, H, D)


class KVCache:
    """Keys, values and recent Canon inputs of past positions, so each is computed only once.

    The buffers keep their shapes and addresses, and the position is a tensor, so the kernels of a
    decoding step can be recorded and run again for later positions. `extent` is the exception: a
    recording is valid until the positions exceed it.

    Sequences of different lengths are padded on the left, with n_padding (B,) positions each, which
    change nothing: their hidden states are 0, and other positions do not attend to them.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        device: torch.device,
        dtype: torch.dtype,
        n_padding: Tensor | None = None,
    ):
        S = -(-max_len // KEY_BLOCK) * KEY_BLOCK
        shape = (batch, config.n_kv_heads, S, config.d_head)  # (B, G, S, D) for each layer
        # zeros: attention multiplies unused positions by 0, so they must be finite
        layers = range(config.n_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.recent: dict[Canon, Tensor] = {}  # last inputs of each Canon layer, (B, canon, C)
        self.pointer_keys = torch.zeros(batch, S, config.pointer, device=device, dtype=dtype)
        # one more than S, because the last key goes with the token after it
        self.tokens = torch.zeros(batch, S + 1, device=device, dtype=torch.long)
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # `length` on the device
        self.length = 0
        self.n_padding = n_padding
        self.heads_per_group = config.n_heads // config.n_kv_heads

    def advance(self, T: int) -> Tensor:
        """Make room for T more positions and return their indices (T,)."""
        device, dtype = self.position.device, self.values[0].dtype
        self.index = self.position + torch.arange(T, device=device)  # (T,)
        self.position += T
        self.length += T
        self.extent = -(-self.length // KEY_BLOCK) * KEY_BLOCK
        keys, queries = torch.arange(self.extent, device=device), self.index[:, None]  # (T, 1)
        hidden = (keys > queries)[None]  # (1, T, extent)
        if self.n_padding is not None:
            padding = (keys < self.n_padding[:, None])[:, None]  # (B, 1, extent)
            # padding attends to itself, because attention to nothing is not a number
            hidden = hidden | (padding & (keys != queries))  # (B, T, extent)
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -math.inf)
        self.mask = mask.repeat(1, self.heads_per_group, 1)[:, None]  # (1 or B, 1, H/G * T, extent)
        return self.index

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, G, T, D) and return a layer's first `extent` keys and values."""
        keys, values = self.keys[layer], self.values[layer]  # (B, G, S, D) each
        keys.index_copy_(2, self.index, k)
        values.index_copy_(2, self.index, v)
        return keys[:, :, : self.extent], values[:, :, : self.extent]  # (B, G, extent, D) each

    def append_pointer(self, keys: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys (B, T, P) and tokens (B, T); return `extent` keys and the token after each."""
        self.pointer_keys.index_copy_(1, self.index, keys)
        self.tokens.index_copy_(1, self.index, tokens)
        return self.pointer_keys[:, : self.extent], self.tokens[:, 1 : self.extent + 1]


def eagerly(step: Callable[[], None]) -> Callable[[], None]:
    """Run a decoding step and return a function that runs it again: the step itself."""
    step()
    return step


class Canon(nn.Module):
    """Canon layer (arXiv 2512.17351): a residual, causal depthwise convolution over positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.canon, config.d_model))

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        K, T = len(self.weight), x.shape[1]
        past = cache.recent.get(self) if cache is not None else None  # (B, K, C)
        x = F.pad(x, (0, 0, K, 0)) if past is None else torch.cat((past, x), dim=1)  # (B, K + T, C)
        if past is not None:
            past.copy_(x[:, -K:])  # in place: its address must not change
        elif cache is not None:
            cache.recent[self] = x[:, -K:].clone()  # (B, K, C)
        return x[:, K:] + sum(
            x[:, K - i : K - i + T] * w for i, w in enumerate(self.weight.to(x.dtype), start=1)
        )  # (B, T, C)


# ---- attention


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.d_head = layer, config.d_head
        kv_dim = config.n_kv_heads * config.d_head
        self.q_proj = Linear(config.d_model, config.d_model)
        self.k_proj = Linear(config.d_model, kv_dim)
        self.v_proj = Linear(config.d_model, kv_dim)
        self.o_proj = Linear(config.d_model, config.d_model)
        self.v_embed_proj = Linear(config.d_model, kv_dim) if config.value_embed else None
        self.q_norm = RMSNorm(config.d_head)
        self.k_norm = RMSNorm(config.d_head)

    def forward(
        self, x: Tensor, embedding: Tensor | None, cos: Tensor, sin: Tensor, cache: KVCache | None
    ) -> Tensor:
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.d_head)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.d_head)  # (B, T, G, D)
        v = self.v_proj(x)  # (B, T, G * D)
        if self.v_embed_proj is not None:
            v = v + self.v_embed_proj(embedding)  # (B, T, G * D)
        v = v.view(B, T, -1, self.d_head)  # (B, T, G, D)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, D)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = cache.append(self.layer, k, v)  # (B, G, extent, D)
            # the query heads of a group share its keys, so they are treated as further positions
            grouped = q.reshape(B, k.shape[1], -1, self.d_head)  # (B, G, H/G * T, D)
            y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=cache.mask)
            y = y.view(q.shape)
        # y: (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


# ---- MLP


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        # squared ReLU, arXiv 2109.08668
        return self.down_proj(F.relu(self.up_proj(x)).square())  # (B, T, F) inside, (B, T, C) out


# ---- block


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.d_model)
        self.mlp = MLP(config)
        self.attn_canon = Canon(config) if config.canon else None
        self.mlp_canon = Canon(config) if config.canon else None

    def forward(
        self, x: Tensor, embedding: Tensor | None, cos: Tensor, sin: Tensor, cache: KVCache | None
    ) -> Tensor:
        h = self.attn_norm(x)
        h = self.attn_canon(h, cache) if self.attn_canon is not None else h
        x = x + self.attn(h, embedding, cos, sin, cache)
        h = self.mlp_norm(x)
        h = self.mlp_canon(h, cache) if self.mlp_canon is not None else h
        return x + self.mlp(h)


# ---- pointer


class Copies(NamedTuple):
    """What each position's next token may be copied from."""

    log_probs: Tensor  # (B, T, 1 + S), fp32: of generating the token, and of copying each of these:
    tokens: Tensor  # (B, S)


class Pointer(nn.Module):
    """Pointer sentinel mixture (arXiv 1609.07843) over final hidden states.

    A position compares itself to each earlier one and copies the token that followed it, as a
    neural cache does (arXiv 1612.04426).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.q_proj = Linear(config.d_model, config.pointer)
        self.k_proj = Linear(config.d_model, config.pointer)
        self.q_norm = RMSNorm(config.pointer)
        self.k_norm = RMSNorm(config.pointer)
        self.sentinel = Linear(config.d_model, 1)

    def forward(self, x: Tensor, tokens: Tensor, cache: KVCache | None) -> Copies:
        """For hidden states x (B, T, C) after tokens (B, T)."""
        T, P = x.shape[1], self.q_norm.weight.shape[0]
        q, keys = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))  # (B, T, P) each
        if cache is None:
            index = torch.arange(T, device=x.device)
            keys, tokens = keys[:, :-1], tokens[:, 1:]  # S = T - 1
        else:
            index = cache.index
            keys, tokens = cache.append_pointer(keys, tokens)  # S = extent
        positions = torch.arange(tokens.shape[1], device=x.device)
        hidden = (positions >= index[:, None])[None]  # (1, T, S)
        if cache is not None and cache.n_padding is not None:
            hidden = hidden | (positions < cache.n_padding[:, None])[:, None]  # (B, T, S)
        scores = (q @ keys.mT).float() * P**-0.5  # (B, T, S)
        scores = scores.masked_fill(hidden, -math.inf)
        # relative to the number of tokens that could be copied: of 8, 1 is copied at equal scores
        n = (~hidden).sum(-1, keepdim=True)  # (1 or B, T, 1)
        sentinel = self.sentinel(x).float() + torch.log(7 * (n + 1))  # (B, T, 1)
        return Copies(torch.cat((sentinel, scores), dim=-1).log_softmax(-1), tokens)


# ---- Llama


class Llama(nn.Module):
    """The decoder. `compute_dtype` is the dtype of activations; weights stay fp32."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model)
        self.image_positions = (
            nn.Embedding(config.n_image_positions, config.d_model)
            if config.n_image_positions
            else None
        )
        self.pointer = Pointer(config) if config.pointer else None
        self.subwords = nn.Embedding(config.subwords, config.d_model) if config.subwords else None
        if config.subwords:  # subwords of each token, -1 for none; filled in by the training script
            self.register_buffer(
                "token_subwords",
                torch.full((config.vocab_size, MAX_SUBWORDS), -1, dtype=torch.int32),
            )
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialize every parameter. Raises ValueError if a parameter has no rule here."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(p)
            elif name.endswith(("subwords.weight", "canon.weight", "sentinel.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                raise ValueError(f"no initialization for parameter {name}; add a rule for it")

    def embed_tokens(self, tokens: Tensor | slice) -> Tensor:
        """Embeddings (..., C) of tokens (...) or of a slice of the vocabulary.

        An embedding is the token's own vector plus those of its subwords (arXiv 1607.04606).
        """
        own = self.embed.weight[tokens] if isinstance(tokens, slice) else self.embed(tokens)
        if self.subwords is None:
            return own
        padded = F.pad(self.subwords.weight, (0, 0, 1, 0))  # (1 + subwords, C); index 0 means none
        bags = self.token_subwords[tokens].flatten(0, -2) + 1  # (tokens, MAX_SUBWORDS)
        # the sum of each token's subwords, (tokens, C) viewed as (..., C)
        return own + F.embedding_bag(bags, padded, mode="sum", padding_idx=0).view_as(own)

    @torch.no_grad()
    def for_inference(self) -> "Llama":
        """The same function with weights in `compute_dtype` and subwords folded into `embed`.

        Weights that already have that dtype are shared with this model rather than copied.
        """
        weights = {name: p.to(self.compute_dtype) for name, p in self.named_parameters()}
        weights["embed.weight"] = self.embed_tokens(slice(None)).to(self.compute_dtype)
        weights.pop("subwords.weight", None)
        with torch.device("meta"):
            model = Llama(replace(self.config, subwords=0), self.compute_dtype)
        model.load_state_dict({k: w.detach() for k, w in weights.items()}, assign=True)
        model.cos, model.sin = self.cos, self.sin  # angles stay fp32
        return model.eval().requires_grad_(False)

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        position_ids: Tensor | None = None,
        target_positions: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, C) of tokens (B, T).

        Args:
            tokens: (B, T); with a cache, they follow the positions it holds and are added to it.
            cache: keys and values of earlier positions.
            position_ids: (B, T, 2), row and column of each token; default: 0, 1, 2, ... for both.
            target_positions: (B, T), image position whose token each position predicts, or -1;
                given together with position_ids or not at all.
        """
        T = tokens.shape[1]
        past = cache.length if cache is not None else 0
        assert past + T <= self.config.seq_len, (
            f"{past} + {T} positions, seq_len is {self.config.seq_len}"
        )
        assert (position_ids is None) == (target_positions is None), (
            "only one of position_ids and target_positions is given; pass both or neither"
        )
        x = self.embed_tokens(tokens)  # (B, T, C)
        index = slice(T) if cache is None else cache.advance(T)
        if cache is not None and cache.n_padding is not None:
            index = index - cache.n_padding[:, None]  # (B, T), negative for padding
            x = x * (index >= 0)[..., None]
            index = index.clamp(min=0)
        if position_ids is None:
            cos, sin = self.cos[index], self.sin[index]  # ([B,] T, D/2) each
        else:
            # (B, T, D/2) each
            cos, sin = rotary_2d(self.cos, position_ids), rotary_2d(self.sin, position_ids)
            x = x + (
                self.image_positions(target_positions.clamp(min=0))  # (B, T, C)
                * (target_positions >= 0)[..., None]  # (B, T, 1)
            )
        # scaled: the std that suits the tied head is small next to block outputs (arXiv 1706.03762)
        x = x.to(self.compute_dtype) * math.sqrt(self.config.d_model)
        embedding = F.rms_norm(x, x.shape[-1:], eps=1e-6) if self.config.value_embed else None
        for block in self.blocks:
            x = block(x, embedding, cos, sin, cache)
        return self.norm(x)

    def copies(self, x: Tensor, tokens: Tensor, cache: KVCache | None = None) -> Copies | None:
        """What the pointer, if any, copies after hidden states x (B, T, C) of tokens (B, T)."""
        return self.pointer(x, tokens, cache) if self.pointer is not None else None

    def head(
        self, x: Tensor, vocab_slice: slice = slice(None), copies: Copies | None = None
    ) -> Tensor:
        """Logits (..., V) in fp32 of hidden states x (..., C), over a slice of the vocabulary.

        With copies, x is (B, T, C), the slice starts at 0 and holds the context's tokens, and the
        logits are log-probabilities.
        """
        logits = F.linear(x, self.embed_tokens(vocab_slice).to(x.dtype)).float()  # (..., V)
        if copies is None:
            return logits
        weights = copies.log_probs.exp()  # (B, T, 1 + S)
        tokens = copies.tokens[:, None].expand_as(weights[..., 1:])  # (B, T, S)
        probs = logits.softmax(-1) * weights[..., :1]  # (B, T, V)
        probs = probs.scatter_add(-1, tokens, weights[..., 1:])
        return probs.clamp(min=torch.finfo(probs.dtype).tiny).log()

    def loss(
        self,
        x: Tensor,
        targets: Tensor,
        vocab_slice: slice = slice(None),
        copies: Copies | None = None,
    ) -> Tensor:
        """Mean loss in nats per token of hidden states x (B, T, C) over a slice of the vocabulary.

        Targets (B, T) are indices into the slice.
        """
        mixture = ()
        if copies is not None:
            match = copies.tokens[:, None] == targets[..., None]  # (B, T, S)
            copied = (copies.log_probs[..., 1:].exp() * match).sum(-1)  # (B, T)
            mixture = (copies.log_probs[..., 0].flatten(), copied.flatten())
        return ChunkedCrossEntropy.apply(
            x.flatten(0, 1), self.embed_tokens(vocab_slice), targets.flatten(), *mixture
        )

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits (B, T, V) in fp32 for tokens (B, T); with targets (B, T), mean nats per token."""
        x = self.hidden(tokens, cache)
        copies = self.copies(x, tokens, cache)
        return (
            self.head(x, copies=copies) if targets is None else self.loss(x, targets, copies=copies)
        )

    def n_params(self) -> int:
        """Number of parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: float | None = None) -> float:
        """Training FLOPs per token: 6 per matrix weight, plus causal attention over seq_len.

        The default is config.seq_len; attention is linear in it, so it may be a mean. The pointer
        has only the scores, half of what a layer of attention of its width computes.
        """
        seq_len = seq_len or self.config.seq_len
        matrices = self.embed.weight.numel() + sum(
            m.weight.numel() for m in self.modules() if isinstance(m, Linear)
        )
        channels = self.config.n_layers * self.config.d_model + self.config.pointer / 2
        return 6 * (matrices + channels * seq_len)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor,
        max_tokens: int,
        *,
        generators: Sequence[torch.Generator],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        vocab_slice: slice = slice(None),
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        positions: Sequence[Tensor] = (),
        record: Callable = eagerly,
    ) -> Iterator[Tensor]:
        """Yield the tokens (B,) that follow prompt (B, T), one position at a time.

        Stops after max_tokens or when seq_len is full. Sequence i samples from generators[i] only,
        so it does not depend on the rest of the batch. Only tokens of `vocab_slice` are generated.
        See `sample` for temperature, top_k and top_p, and `decode` for positions and record.

        With classifier-free guidance (arXiv 2207.12598), the prompts `uncond` (B, T) without the
        condition run in the same batch, and log-probabilities are
        uncond + guidance * (cond - uncond).
        """
        B, T = prompt.shape
        assert len(generators) == B, f"{len(generators)} generators for a batch of {B}"
        n = max(0, min(max_tokens, self.config.seq_len - T))
        # all random numbers at once: a copy to the device per token would make the device wait
        uniforms = torch.stack([torch.rand(n, generator=g) for g in generators], dim=1)  # (n, B)
        uniforms = uniforms.to(prompt.device)
        first = vocab_slice.start or 0

        def choose(logits: Tensor, i: Tensor) -> Tensor:
            if uncond is not None:
                with_condition, without = logits.log_softmax(-1).chunk(2)  # (B, V) each
                logits = without + guidance * (with_condition - without)
            tokens = sample(logits, uniforms[i][0], temperature, top_k, top_p) + first  # (B,)
            return tokens if uncond is None else tokens.repeat(2)  # (B or 2B,)

        rows = prompt if uncond is None else torch.cat((prompt, uncond))  # (B or 2B, T)
        for tokens in self.decode(rows, n, choose, vocab_slice, positions, record):
            yield tokens[:B]

    @torch.inference_mode()
    def decode(
        self,
        prompt: Tensor,
        n: int,
        choose: Callable[[Tensor, Tensor], Tensor],
        vocab_slice: slice = slice(None),
        positions: Sequence[Tensor] = (),
        record: Callable = eagerly,
    ) -> Iterator[Tensor]:
        """Yield the n tokens (B,) that follow prompt (B, T), one position at a time.

        Args:
            choose: returns tokens (B,), given their logits (B, V) over `vocab_slice` and i (1,),
                which counts the tokens from 0.
            vocab_slice: a slice of the vocabulary.
            positions: position_ids (1 or B, T + n, 2) and target_positions (1 or B, T + n), see
                `hidden`; empty for text.
            record: runs a function and returns one that runs it again. The shapes and addresses of
                all tensors that a decoding step reads and writes are fixed for KEY_BLOCK positions,
                so `record` may record the kernels of the step.
        """
        B, T = prompt.shape
        cache = KVCache(self.config, B, T + n, prompt.device, self.compute_dtype)
        chosen = prompt.new_empty(n, B)
        last = prompt[:, -1:].clone()  # (B, 1)

        def step(tokens: Tensor) -> None:
            index = cache.position + torch.arange(tokens.shape[1], device=tokens.device)
            x = self.hidden(tokens, cache, *(p[:, index] for p in positions))  # (B, T, C)
            copies = self.copies(x, tokens, cache)
            if copies is not None:
                copies = copies._replace(log_probs=copies.log_probs[:, -1:])
            logits = self.head(x[:, -1:], vocab_slice, copies)[:, 0]  # (B, V)
            i = cache.position - T  # (1,)
            new = choose(logits, i)  # (B,)
            chosen.index_copy_(0, i, new[None])
            last.copy_(new[:, None])

        again = None
        for i in range(n):
            if i == 0:
                step(prompt)
            else:
                cache.length = T + i - 1  # `again` may not run the Python code that counts it
                if i == 1 or cache.length % KEY_BLOCK == 0:
                    again = record(partial(step, last))
                else:
                    again()
            yield chosen[i]


# ---- sampling


def sample(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Sample one token per sequence (B,) from logits (B, V) by inverting the distribution function.

    Args:
        logits: (B, V).
        uniforms: (B,), random numbers in [0, 1).
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep only the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to p (arXiv 1904.09751);
            1 keeps all.
    """
    if temperature < 1e-6:  # the logits would overflow, and the result is the same
        return logits.argmax(-1)  # (B,)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        outside = sorted_probs.cumsum(-1) - sorted_probs >= top_p
        outside[:, 0] = False  # the first token always stays, even if top_p rounds to 0
        probs = probs.masked_fill(outside.scatter(1, order, outside), 0)
    mass = probs.double().cumsum(-1)  # fp64: fp32 sums lose the rare tokens of a large vocabulary
    return (mass <= uniforms[:, None] * mass[:, -1:]).sum(-1)  # (B,)


# ---- loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean loss in nats of hidden states (N, C), head weight (V, C) and targets (N,).

    With a pointer, the probability of a target is exp(log_generate) * softmax + copied, (N,) each.

    It never holds all (N, V) logits: it works on a chunk of positions at a time and computes the
    gradients in the forward pass, while the chunk's logits exist, so nothing is computed twice. The
    idea is Liger Kernel's (arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        log_generate: Tensor | None = None,
        copied: Tensor | None = None,
    ) -> Tensor:
        w = weight.to(h.dtype)
        train = ctx.needs_input_grad[0]
        grad_h = torch.empty_like(h) if train else None
        grad_w = torch.zeros_like(weight) if train else None
        grads = []  # of log_generate and copied for each chunk, (size,) each
        total = torch.zeros((), device=h.device)
        # matrix products on tensor cores run in tiles of up to 128 rows; a partial tile is wasted
        size = max(128, CHUNK_LOGITS // len(weight) // 128 * 128)
        for start in range(0, len(h), size):
            chunk = h[start : start + size]  # (size, C)
            target = targets[start : start + size, None]  # (size, 1)
            log_probs = (chunk @ w.T).log_softmax(-1, dtype=torch.float32)  # (size, V)
            correct = log_probs.gather(1, target)  # (size, 1)
            generated = correct  # log of the target's probability without copying, (size, 1)
            if copied is not None:
                part = slice(start, start + size)
                generated = correct + log_generate[part, None]  # (size, 1)
                correct = torch.logaddexp(generated, copied[part, None].log())  # (size, 1)
            total -= correct.sum()
            if train:
                grad = log_probs.exp_()  # softmax, (size, V)
                grad.scatter_add_(1, target, torch.full_like(correct, -1.0))  # minus 1 at target
                if copied is not None:
                    share = (generated - correct).exp()  # that generating has in it, (size, 1)
                    grad *= share
                    # clamped: infinity times the 0 of a token that is not copied is not a number
                    grads.append((-share[:, 0], -(-correct[:, 0]).clamp(max=80).exp()))
                grad = grad.to(h.dtype)
                grad_h[start : start + size] = grad @ w  # (size, C)
                grad_w += grad.T @ chunk  # (V, C)
        grads = [torch.cat(parts) for parts in zip(*grads, strict=True)]
        ctx.save_for_backward(grad_h, grad_w, *grads)
        return total / len(h)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_h, grad_w, *grads = ctx.saved_tensors
        scale = grad_loss / len(grad_h)
        others = [grad * scale for grad in grads] or [None, None]
        return grad_h * scale, grad_w * scale, None, *others
