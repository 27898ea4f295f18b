"""Weights of a trained language model as the start of another run, and their names in an export.

`tools/export_hf.py` writes a folder in one of two formats of the transformers library: "blueberry"
for models with value embeddings, Canon layers or a pointer, or "apertus", an architecture of
transformers that computes the same function as a model without them.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from common.config import UserError, build_from_saved, first_line
from common.run import checkpoints, find_run, load_checkpoint
from data.tokenizer import read_tokenizer
from model import Llama, ModelConfig
from sampling import saved_tokenizer

# Settings of a model that its weights depend on. Subword embeddings are folded into the token
# embeddings, and rotary positions have no weights, so neither `subwords` nor `seq_len` matters.
SHAPE = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "rope_theta")
SHAPE += ("value_embed", "canon", "pointer")

# What transformers calls the settings of an "apertus" model, and parts of its weights' names.
SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "seq_len",
}
PARTS = {
    "blocks": "layers",
    "attn": "self_attn",
    "attn_norm": "attention_layernorm",
    "mlp_norm": "feedforward_layernorm",
}


@dataclass
class Pretrained:
    """A trained language model with its subwords folded; weights are fp32."""

    shape: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: transformers.PreTrainedTokenizerFast
    tokenizer_folder: Path


# ---- formats
def is_plain(shape: ModelConfig) -> bool:
    """Whether the format "apertus" can hold the model, once its subwords are folded."""
    return not (shape.value_embed or shape.canon or shape.pointer)


def to_apertus(weights: dict[str, Tensor], d_model: int) -> dict[str, Tensor]:
    """Weights of a model without subwords under the names of the format "apertus".

    It does not scale its input embeddings by sqrt(d_model) as model.py does, so they become a table
    of their own.
    """
    renamed = {
        "lm_head.weight": weights["embed.weight"],
        "model.embed_tokens.weight": weights["embed.weight"] * math.sqrt(d_model),
    }
    for name, weight in weights.items():
        if name != "embed.weight":
            parts = [PARTS.get(part, part) for part in name.split(".")]
            renamed[".".join(["model", *parts])] = weight
    return renamed


def from_apertus(weights: dict[str, Tensor], d_model: int) -> dict[str, Tensor]:
    """The inverse of to_apertus. Raises ValueError if the two embedding tables differ."""
    ours = {theirs: part for part, theirs in PARTS.items()}
    embed, scaled = weights["lm_head.weight"], weights["model.embed_tokens.weight"]  # (V, C) each
    rounding, embed = torch.finfo(embed.dtype).eps, embed.float()
    if not torch.allclose(scaled.float(), embed * math.sqrt(d_model), rtol=2 * rounding, atol=0):
        raise ValueError(
            "its input and output embeddings have been trained separately, but model.py ties them"
        )
    renamed = {"embed.weight": embed}
    for name, weight in weights.items():
        if name not in ("lm_head.weight", "model.embed_tokens.weight"):
            parts = [ours.get(part, part) for part in name.split(".")[1:]]
            renamed[".".join(parts)] = weight
    return renamed


def read_shape(config: dict) -> ModelConfig:
    """The model shape in the config.json of an exported folder. Raises KeyError or ValueError."""
    if config["model_type"] == "blueberry":
        return ModelConfig(**{field.name: config[field.name] for field in fields(ModelConfig)})
    if config["model_type"] != "apertus" or config["hidden_act"] != "relu2":
        raise ValueError(f"model.py has no architecture {config['model_type']!r}")
    shape = {ours: config[theirs] for theirs, ours in SETTINGS.items()}
    return ModelConfig(**shape, rope_theta=config["rope_parameters"]["rope_theta"])


def export_settings(shape: ModelConfig) -> dict:
    """The config.json of an exported folder, in the format that holds the model."""
    if not is_plain(shape):
        return {"model_type": "blueberry", **asdict(shape)}
    return {
        "model_type": "apertus",
        **{theirs: getattr(shape, ours) for theirs, ours in SETTINGS.items()},
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
    }


# ---- loading
def read_pretrained(name: str) -> Pretrained:
    """The language model of a run (name, folder or checkpoint) or of an exported folder.

    Raises UserError.
    """
    try:
        return read_export(Path(name)) if (Path(name) / "config.json").exists() else read_run(name)
    except UserError as error:
        raise UserError(f"--init_from {name}: {error}") from error


def read_export(folder: Path) -> Pretrained:
    """The language model in a folder of tools/export_hf.py. Raises UserError."""
    try:
        shape = read_shape(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        weights = load_file(folder / "model.safetensors")
        if is_plain(shape) and "lm_head.weight" in weights:
            weights = from_apertus(weights, shape.d_model)
        else:
            weights = {key.removeprefix("model."): weight for key, weight in weights.items()}
        expected = Llama(shape).state_dict()
        for key in sorted(weights.keys() ^ expected.keys()):
            raise ValueError(f"model.safetensors {'has' if key in weights else 'lacks'} {key}")
        for key, weight in weights.items():
            if weight.shape != expected[key].shape:
                raise ValueError(f"{key} has shape {tuple(weight.shape)}")
    except Exception as error:  # the parsers raise many exception types
        reason = f"config.json has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            f"{folder} cannot be used ({reason}); pass a train_llm.py run, or a folder of "
            "tools/export_hf.py"
        ) from error
    weights = {key: weight.float() for key, weight in weights.items()}
    tokenizer = read_tokenizer(str(folder), folder, "export the run again")
    return Pretrained(shape, weights, tokenizer, folder)


def read_run(name: str) -> Pretrained:
    """The language model of a train_llm.py run. Raises UserError."""
    run, checkpoint, config = find_run(name)
    if config["stage"] != "llm":
        raise UserError(f"{run} is not a train_llm.py run; pass one, or omit --init_from")
    model, tokenizer = load_checkpoint_of(run, checkpoint, config)
    folded = model.for_inference()
    return Pretrained(folded.config, folded.state_dict(), tokenizer, run / "tokenizer")


def load_checkpoint_of(run: Path, checkpoint: Path, config: dict):
    """The model (fp32, on the CPU) and the tokenizer of a run's checkpoint. Raises UserError."""
    model = Llama(build_from_saved(ModelConfig, config.get("model"), run))
    return model, saved_tokenizer(run, load_checkpoint(checkpoint, model))


def initial_weights(cfg, tokenizer, parent: Path | None) -> Pretrained | None:
    """The language model cfg.init_from, after a check that it fits cfg.model and the tokenizer.

    None if there is nothing to start from, or if `parent`, the run being resumed, has a checkpoint.
    A model of text and images starts without the pointer. Raises UserError.
    """
    name = cfg.init_from
    if not name or (parent is not None and checkpoints(parent)):
        return None
    source = read_pretrained(name)
    if cfg.model.n_image_positions:
        source.shape = replace(source.shape, pointer=0)
        weights = source.weights.items()
        source.weights = {key: w for key, w in weights if not key.startswith("pointer.")}
    for key in SHAPE:
        theirs, ours = getattr(source.shape, key), getattr(cfg.model, key)
        if theirs != ours:
            raise UserError(
                f"--init_from {name} has model.{key} {theirs}, but this run has {ours}; "
                f"set --model.{key} {theirs}"
            )
    if vocabulary(source.tokenizer) != vocabulary(tokenizer):
        raise UserError(
            f"--init_from {name} has another tokenizer; set --data.tokenizer "
            f"{source.tokenizer_folder}"
        )
    return source


def initialize(model: Llama, source: Pretrained | None, n_tokens: int) -> None:
    """Give a model the weights of `source`, if any; vocabulary entries that it lacks keep theirs.

    n_tokens is the number of the tokenizer's entries. Subword embeddings are already part of the
    token embeddings, so those of `model` must be 0, as they are initially.
    """
    if source is None:
        return
    # after the tokenizer's entries, a multimodal model has image tokens; other models have unused
    # entries, which have learned to be improbable
    rows = source.weights["embed.weight"]  # (V, C)
    rows = rows[: n_tokens if model.config.n_image_positions else model.config.vocab_size]
    weights = model.state_dict() | source.weights
    weights["embed.weight"] = torch.cat((rows, model.embed.weight.detach()[len(rows) :]))  # (V, C)
    model.load_state_dict(weights)


def vocabulary(tokenizer) -> dict:
    """What decides the ids of a text; an export differs in what is added around the text."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    keys = ("added_tokens", "normalizer", "pre_tokenizer", "model")
    return {key: settings[key] for key in keys}
