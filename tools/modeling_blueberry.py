"""Blueberry models for the transformers library; tools/export_hf.py copies it beside model.py."""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import KEY_BLOCK, Canon, KVCache, Llama, ModelConfig, rotary_table


class BlueberryConfig(PretrainedConfig):
    """The settings of model.ModelConfig; the usual names of transformers work too."""

    model_type = "blueberry"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "seq_len",
    }

    def __init__(self, *, use_cache: bool = True, **kwargs):
        for field in fields(ModelConfig):
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": True} | kwargs)

    def shape(self) -> ModelConfig:
        return ModelConfig(
            **{field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        )


class BlueberryCache(KVCache):
    """A KVCache that grows with its sequence and that beam search can reorder."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def advance(self, T: int) -> Tensor:
        size = self.keys[0].shape[2]
        if self.length + T > size:
            # at least double, so that decoding seldom copies
            more = -(-max(T, size) // KEY_BLOCK) * KEY_BLOCK
            self.keys = [F.pad(x, (0, 0, 0, more)) for x in self.keys]  # (B, G, size + more, D)
            self.values = [F.pad(x, (0, 0, 0, more)) for x in self.values]
            self.pointer_keys = F.pad(self.pointer_keys, (0, 0, 0, more))  # (B, size + more, P)
            self.tokens = F.pad(self.tokens, (0, more))  # (B, size + more + 1)
        return super().advance(T)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue sequences beam_idx (B,) of the batch."""
        self.keys = [x[beam_idx] for x in self.keys]
        self.values = [x[beam_idx] for x in self.values]
        self.recent = {layer: x[beam_idx] for layer, x in self.recent.items()}
        self.pointer_keys, self.tokens = self.pointer_keys[beam_idx], self.tokens[beam_idx]
        self.n_padding = self.n_padding[beam_idx]


class BlueberryForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model of model.py with the interface of transformers.

    It refuses what model.py cannot compute: `inputs_embeds`, `position_ids`, hidden states,
    attention weights, gradient checkpointing, assisted generation, and more positions than the
    model's context, where generation ends.
    """

    config_class = BlueberryConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _is_stateful = True  # a Canon layer cannot undo its last inputs

    def __init__(self, config: BlueberryConfig):
        super().__init__(config)
        self.model = Llama(config.shape())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Llama):  # not in the file of weights
            module.cos, module.sin = (x.to(module.cos.device) for x in rotary_table(module.config))
        elif isinstance(module, Canon) or module is getattr(self.model.pointer, "sentinel", None):
            nn.init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed

    def set_input_embeddings(self, embed: nn.Embedding) -> None:
        self.model.embed = embed

    def _prepare_generated_length(self, generation_config, **kwargs):
        """Stop where the context is full, as generate.py does."""
        config = super()._prepare_generated_length(generation_config, **kwargs)
        config.max_length = min(config.max_length, self.config.seq_len)
        return config

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a BlueberryCache

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: BlueberryCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T, V) in fp32 of input_ids (B, T); with a pointer, log-probabilities.

        Args:
            attention_mask: (B, T), 0 for padding, which may stand anywhere. With past_key_values:
                (B, past + T), without padding in the last T.
            labels: (B, T), the input_ids to score, or -100; the loss is the mean in nats.
            use_cache: whether to return past_key_values; default: config.use_cache, not in training
            logits_to_keep: how many of the last logits to return, or their indices; 0: all.

        Raises ValueError for a mask or a length that the model does not support.
        """
        model, cache = self.model, past_key_values
        if model.cos.dtype != torch.float32:  # .to(dtype) has cast the angles as well
            self._init_weights(model)
        model.compute_dtype = model.embed.weight.dtype
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        past = cache.length if cache is not None else 0
        check_positions(past + input_ids.shape[1], self.config.seq_len)
        keep = kept_positions(attention_mask, input_ids, cache)  # (B, T) or None
        order = None
        if cache is None and (use_cache or keep is not None):
            B, T = input_ids.shape
            n_padding = input_ids.new_zeros(B) if keep is None else (~keep).sum(1)  # (B,)
            device, dtype = input_ids.device, model.compute_dtype
            cache = BlueberryCache(model.config, B, T, device, dtype, n_padding)
            if keep is not None:
                order = keep.int().argsort(dim=1, stable=True)  # (B, T), padding first
                input_ids = input_ids.gather(1, order)
        hidden = model.hidden(input_ids, cache)  # (B, T, C)
        copies = model.copies(hidden, input_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep

        def rows(x: Tensor) -> Tensor:
            """Of x (B, T, ...), the positions to keep, in the order of the input."""
            if order is not None:
                x = x.gather(1, order.argsort(dim=1)[..., None].expand_as(x))  # (B, T, ...)
            return x[:, kept]

        if copies is not None:
            copies = copies._replace(log_probs=rows(copies.log_probs))
        logits = model.head(rows(hidden), copies=copies)  # (B, kept, V)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
        output = CausalLMOutputWithPast(loss, logits, cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output


def check_positions(n: int, seq_len: int) -> None:
    if n > seq_len:
        raise ValueError(
            f"the sequence has {n} positions, but the model's context is {seq_len}; shorten it"
        )


def kept_positions(
    attention_mask: Tensor | None, input_ids: Tensor, cache: BlueberryCache | None
) -> Tensor | None:
    """Which of input_ids (B, T) are not padding, (B, T), or None if all are known to count.

    Raises ValueError for a mask of another shape, or with padding after cached positions.
    """
    if attention_mask is None:
        return None
    B, T = input_ids.shape
    expected = (B, T + (cache.length if cache is not None else 0))
    if tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {expected}: the "
            "batch, and the cached positions plus the new ones"
        )
    keep = attention_mask.bool()
    if cache is not None and ((~keep).sum(1) != cache.n_padding).any():
        raise ValueError(
            "attention_mask hides cached or new positions; after the first call, it may hide only "
            "the padding of that call"
        )
    return None if keep.all() else keep[:, -T:]
