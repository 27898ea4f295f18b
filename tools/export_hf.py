"""Export the language model of a run as a folder for the transformers library, and publish it.

    python -m tools.export_hf NAME exports/NAME                     # a run or a checkpoint
    python -m tools.export_hf NAME exports/NAME --push USER/REPO    # also upload it to the hub

`AutoModelForCausalLM.from_pretrained("exports/NAME", trust_remote_code=True)` loads it; a model
without value embeddings, Canon layers and pointer needs no trust_remote_code. Of a multimodal run,
the text part is exported. The tokenizer puts an end-of-text token before every text, as training
did.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import transformers
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from common.config import UserError, first_line, run_script
from common.metrics import evaluations
from common.run import find_run
from data.source import as_mix
from data.text import end_of_text
from model import Llama
from pretrained import export_settings, is_plain, load_checkpoint_of, to_apertus

CODE = Path(__file__).parent / "modeling_blueberry.py"
MODEL = Path(__file__).parent.parent / "model.py"
REPOSITORY = r"[\w.-]+/[\w.-]+"


@dataclass
class Config:
    """What to export, and where."""

    run: str
    """Name of a run under runs/, a run folder or one of its checkpoints."""
    out: str
    """Folder to write; it must not exist."""
    push: str | None = None
    """Repository USER/REPO on the Hugging Face hub to upload the folder to; it is created if it
    does not exist. Needs a token: `hf auth login` or HF_TOKEN. null: do not upload."""


# ---- model
def text_model(run: Path, checkpoint: Path, config: dict) -> tuple[Llama, object]:
    """The language model in a checkpoint, with subwords folded, and its tokenizer.

    Of a multimodal run, the text part: without image tokens and image positions. Raises UserError.
    """
    model, tokenizer = load_checkpoint_of(run, checkpoint, config)
    model = model.for_inference()
    if config["stage"] == "llm":
        return model, tokenizer
    weights = model.state_dict()
    weights["embed.weight"] = weights["embed.weight"][: len(tokenizer)].clone()  # (text tokens, C)
    del weights["image_positions.weight"]
    model = Llama(replace(model.config, vocab_size=len(tokenizer), n_image_positions=0))
    model.load_state_dict(weights)
    return model, tokenizer


def write_model(model: Llama, eot: int, n_tokens: int, folder: Path) -> None:
    """Write weights, config.json, generation_config.json and, if it is needed, the code.

    `eot` is the id of end-of-text, and n_tokens the number of the tokenizer's entries.
    """
    weights, shape = model.state_dict(), model.config
    plain = is_plain(shape)
    if plain:
        weights = to_apertus(weights, shape.d_model)
    else:
        weights = {f"model.{name}": weight for name, weight in weights.items()}
        text = CODE.read_text(encoding="utf-8")
        relative = text.replace("\nfrom model import", "\nfrom .model import")
        assert relative != text, f"{CODE} has no import from model.py"
        (folder / CODE.name).write_text(relative, encoding="utf-8")
        shutil.copy(MODEL, folder / MODEL.name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": eot, "eos_token_id": eot}
    name = "Apertus" if plain else "Blueberry"
    # pad_token_id is null, because it would keep the embedding of end-of-text from being trained
    config = {"architectures": [f"{name}ForCausalLM"], "dtype": "float32", "pad_token_id": None}
    if not plain:
        classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "ForCausalLM"}
        config["auto_map"] = {auto: f"{CODE.stem}.{name}{own}" for auto, own in classes.items()}
    write_json(folder / "config.json", config | ids | export_settings(shape))
    generation = ids | {"pad_token_id": eot}
    if n_tokens < shape.vocab_size:  # as in generate.py, entries without a token never appear
        generation["suppress_tokens"] = list(range(n_tokens, shape.vocab_size))
    write_json(folder / "generation_config.json", generation)


def write_tokenizer(tokenizer, seq_len: int, folder: Path) -> None:
    """Write the tokenizer, which then puts an end-of-text token before every text."""
    eot = end_of_text(tokenizer)
    token = tokenizer.convert_ids_to_tokens(eot)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False  # in transformers, text may contain special tokens
    backend.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, eot)]
    )
    backend.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), token)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "padding_side": "left"}
    settings |= {"model_max_length": seq_len, "model_input_names": ["input_ids", "attention_mask"]}
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---- model card
CARD = """---
{header}
---

# {name}

A language model with {params:,} parameters, trained {origin} with Blueberry, the 5-dollar LLM.

With transformers {version}, the version it was exported with:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})
model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))
```
{code}
## Results

{results}

## Training

```
{command}
```

Code: commit {commit}. Settings:

```yaml
{recipe}
```

## Limits

- It is a base model: it continues text. It was not trained to follow instructions or to refuse any,
  and nothing checks what it writes.
- It has seen only its training data (data.source above), once or a few times, so it knows little
  and invents much.
- Its context is {context} tokens; longer inputs are an error.
- The tokenizer puts an end-of-text token before every text, as in training.
{image_tokens}"""
CUSTOM_CODE = """
The architecture is not part of transformers. `trust_remote_code=True` runs `modeling_blueberry.py`
and `model.py` of this folder, so read them first. Beam search, padding on either side and a cache
are supported; `inputs_embeds`, `position_ids`, hidden states, attention weights, gradient
checkpointing and assisted generation are not.
"""
IMAGE_TOKENS = """
## Image tokens

This is the text part of a model that also generates images: its vocabulary has the {n_text} text
tokens only. The whole model continues with `<seg_start>` ({start}), `<seg_end>` ({end}) and the
{n_codes} image tokens from {first} to {last}, in sequences
`[BOS] text <seg_start> image tokens <seg_end> [EOS]`. To generate images, use the run itself with
generate.py. Unless text_frac or init_from is set above, the text part has seen only captions.
"""


NOT_RECIPE = ("stage", "run", "resume", "wandb", "device", "gpu_hourly_usd", "sample_prompts")


def model_card(run: Path, checkpoint: Path, config: dict, model: Llama, folder: str) -> str:
    """README.md of an export: results, data, recipe, command and limits."""
    env, plain = read_json(run / "env.json"), is_plain(model.config)
    recipe = {key: value for key, value in config.items() if key not in NOT_RECIPE}
    recipe["data"] = {key: value for key, value in config["data"].items() if key != "cache"}
    return CARD.format(
        header=yaml.safe_dump(header(config["data"]["source"]), sort_keys=False).strip(),
        name=run.name,
        origin=f"from {config['init_from']}" if config.get("init_from") else "from scratch",
        version=transformers.__version__,
        folder=folder,
        params=model.n_params(),
        trust="" if plain else ", trust_remote_code=True",
        code="" if plain else CUSTOM_CODE,
        results=results_table(run, checkpoint),
        command=shlex.join(["python", *env.get("command", [])]),
        commit=env.get("commit") or "unknown",
        recipe=yaml.safe_dump(recipe, sort_keys=False).strip(),
        context=model.config.seq_len,
        image_tokens=image_tokens(config, model.config.vocab_size),
    )


def header(source: str | dict) -> dict:
    """The metadata of a model card; of the data sources, it lists those on the hub."""
    names = [name.partition(":")[0] for name in as_mix(source)]
    on_hub = [n for n in names if re.fullmatch(REPOSITORY, n) and not Path(n).exists()]
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    return metadata | ({"datasets": sorted(set(on_hub))} if on_hub else {})


RESULTS = {  # what the model card shows of summary and evaluations: (label, number format)
    "val_loss": ("validation loss, nats per token", ".4f"),
    "val_bpb": ("validation loss, bits per byte", ".4f"),
    "step": ("training steps", ",d"),
    "tokens": ("training tokens", ",d"),
    "params": ("parameters in training", ",d"),
    "train_seconds": ("training time in seconds", ",.0f"),
    "device": ("trained on", ""),
    "cost_usd": ("cost in US dollars", ".2f"),
    "note": ("note", ""),
}


def results_table(run: Path, checkpoint: Path) -> str:
    """The last evaluation before a checkpoint and, if the run ended there, its summary."""
    step, summary = int(checkpoint.name), read_json(run / "summary.json")
    values = {}
    for row in evaluations(run):
        if row["step"] <= step:
            values = row
    values |= {"step": step}
    if summary.get("steps") == step:
        values |= summary
    else:
        values["note"] = f"exported after step {step}, before the training had finished"
    lines = [
        f"| {label} | {values[key]:{form}} |"
        for key, (label, form) in RESULTS.items()
        if values.get(key)
    ]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def image_tokens(config: dict, n_text: int) -> str:
    """What a model card says about the image tokens that are not exported."""
    if config["stage"] == "llm":
        return ""
    first, size = n_text + 2, config["model"]["vocab_size"]
    ids = {"start": n_text, "end": n_text + 1, "first": first, "last": size - 1}
    return IMAGE_TOKENS.format(n_text=f"{n_text:,}", n_codes=f"{size - first:,}", **ids)


def read_json(path: Path) -> dict:
    """The values in a JSON file of a run, none if there is no such file. Raises UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); restore or delete it") from error


# ---- export
def export(name: str, out: Path, repository: str | None = None) -> Path:
    """Write the language model of a run to a new folder `out` and return it.

    `repository` is the name that the model card uses instead of the folder. Raises UserError.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; delete it or choose another folder")
    run, checkpoint, config = find_run(name)
    if config["stage"] == "vqvae":
        raise UserError(
            f"{run} is a VQ-VAE run, which has no language model; pass a run of train_llm.py or "
            "train_multimodal.py"
        )
    model, tokenizer = text_model(run, checkpoint, config)
    tmp = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # left by a process that was killed
        tmp.mkdir(parents=True)
        write_model(model, end_of_text(tokenizer), len(tokenizer), tmp)
        write_tokenizer(tokenizer, model.config.seq_len, tmp)
        card = model_card(run, checkpoint, config, model, repository or str(out))
        (tmp / "README.md").write_text(card, encoding="utf-8")
        tmp.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {out}: {reason}; choose another folder") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub and return its address. Raises UserError."""
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # the hub's client raises many exception types
        raise UserError(
            f"cannot upload to {repository}: {first_line(error)}; check the network and the token "
            f"(hf auth login), then run: hf upload {repository} {folder}"
        ) from error


def main(cfg: Config) -> Path:
    """Export, and upload if cfg.push is set. Raises UserError."""
    if cfg.push is not None and not re.fullmatch(REPOSITORY, cfg.push):
        raise UserError(f"--push is {cfg.push!r}; it must be USER/REPO")
    out = export(cfg.run, Path(cfg.out), cfg.push)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"wrote {out}: {size / 1e6:,.1f} MB")
    if cfg.push:
        print(push(out, cfg.push))
    return out


if __name__ == "__main__":
    run_script(main, Config, prog="python -m tools.export_hf", description=__doc__)
