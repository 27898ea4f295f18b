"""Measure this machine, and how fast this code runs on it: one table and one JSON file.

    python -m tools.bench                               # everything, in minutes
    python -m tools.bench --only training,generation --out fast.json
    python -m tools.bench --shape tiny                  # whether everything runs, in seconds

What is compared takes turns within one run, so that other work on the machine affects both sides.
tools/scaling.py turns the files into the tables of docs/SCALING.md.

Shapes: B batch, T positions, V vocabulary, N image tokens per image.
"""

import io
import itertools
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import transformers
from torch import Tensor

import train_llm
import train_multimodal
import train_vqvae
from common.config import HumanInt, UserError, check_positive, run_script, to_plain
from common.device import Clock, device_name, peak_flops, peak_memory_gb, resolve_device
from common.disk import write_text
from common.loop import clipped_norm, update
from common.run import git_state
from data.order import read_ahead
from data.text import BATCH_DOCUMENTS, DataConfig, Tokens, encode, prepare_splits, training_records
from data.tokenizer import train_bpe
from model import Llama, ModelConfig
from multimodal import ImageTextFormat
from muon import build_optimizers
from sampling import generate_text, sample_image_tokens
from vqvae import VQVAE, VQVAEConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of everything that is measured."""

    text: ModelConfig  # plain; the default recipe adds train_llm.py's subwords, Canon layers, ...
    batch_tokens: tuple[int, ...]  # per training step; transformers is compared at the last one
    image: ModelConfig  # of the text-to-image model
    vqvae: VQVAEConfig
    images: int  # per training step of the VQ-VAE
    matmul: int  # side of the square matrices
    copied: int  # fp32 numbers of a copy: more than the caches hold
    text_tokens: int  # generated per text
    image_tokens: int  # generated per image
    prepared_tokens: int
    seconds: float = 2.0  # that a measurement repeats for, unless `repeats` calls take longer


IMAGE = train_multimodal.Config().model
LARGE = Shape(
    text=ModelConfig(),
    batch_tokens=(8192, 16_384),
    image=IMAGE,
    vqvae=VQVAEConfig(),
    images=64,
    matmul=8192,
    copied=2**28,
    text_tokens=256,
    image_tokens=1024,
    prepared_tokens=2**22,
)
SMALL = replace(
    LARGE,
    text=ModelConfig(  # as in configs/llm_small.yaml
        vocab_size=8192, d_model=256, n_layers=6, n_heads=4, n_kv_heads=2, d_ff=1024, seq_len=256
    ),
    batch_tokens=(1024, 4096),
    images=8,
    matmul=2048,
    copied=2**27,
    text_tokens=128,
    image_tokens=144,
    prepared_tokens=2**21,
)
TINY = Shape(
    text=ModelConfig(
        vocab_size=320, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=32, seq_len=32
    ),
    batch_tokens=(64,),
    image=replace(IMAGE, vocab_size=320, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1),
    vqvae=VQVAEConfig(image_size=16, codebook_size=16, width=8, n_blocks=1),
    images=2,
    matmul=64,
    copied=2**16,
    text_tokens=8,
    image_tokens=16,
    prepared_tokens=2**14,
    seconds=0.02,
)
SHAPES = {"88M": LARGE, "small": SMALL, "tiny": TINY}


@dataclass
class Config:
    """What to measure, and how."""

    only: str = ""
    """Groups to measure, separated by commas: training, transformers, generation, vqvae, data.
    Empty: all of them. The ceilings of the device are always measured."""
    out: str = "bench.json"
    """JSON file to write the results to."""
    shape: Literal["auto", "small", "88M", "tiny"] = "auto"
    """Size of the language model and of its batches: small is the small benchmark; tiny only checks
    that everything runs. auto: small on a CPU, 88M elsewhere."""
    image_tokens: HumanInt | Literal["auto"] = "auto"
    """Tokens per generated image, a square of at most 1,024. auto: 144 on a CPU, 1,024 elsewhere,
    16 if the shape is tiny."""
    repeats: int = 5
    """Number of values that the median of a row is taken from."""
    device: str = "auto"
    """Device: cpu, cuda, mps, ... auto: the accelerator that PyTorch finds, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 where the hardware computes it faster, otherwise float32."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to use torch.compile for training. auto: only on a CUDA GPU, because on a CPU it
    takes longer than everything else."""


# ---- measuring
class Bench:
    """The settings of a run of this tool, and the rows measured so far."""

    def __init__(self, cfg: Config, device: torch.device, shape: Shape):
        self.cfg, self.device, self.shape, self.rows = cfg, device, shape, []
        self.dtype = getattr(torch, cfg.dtype)

    def add(self, group: str, name: str, unit: str, values: list[float]) -> None:
        """Add a row with the median, minimum and maximum of `values`."""
        middle, low, high = statistics.median(values), min(values), max(values)
        row = {"group": group, "name": name, "unit": unit}
        self.rows.append(row | {"median": middle, "min": low, "max": high, "n": len(values)})

    def value(self, group: str, name: str) -> float:
        """The median of a row."""
        rows = {(row["group"], row["name"]): row["median"] for row in self.rows}
        return rows[group, name]

    def seconds(self, sides: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds per call of each side, a value per round; the sides alternate.

        The calls before the first round decide how many calls a value averages.
        """
        counts, times = {}, {name: [] for name in sides}
        for name, run in sides.items():
            once = self.timed(run, 1)
            if once < self.shape.seconds:  # the first call may include set-up
                once = self.timed(run, 1)
            counts[name] = max(1, int(self.shape.seconds / self.cfg.repeats / max(once, 1e-6)))
        for _ in range(self.cfg.repeats):
            for name, run in sides.items():
                times[name].append(self.timed(run, counts[name]) / counts[name])
        return times

    def timed(self, run: Callable[[], object], n: int) -> float:
        """Seconds of n calls, until the device has finished."""
        clock = Clock(self.device)
        clock.start()
        for _ in range(n):
            run()
        clock.stop()
        return clock.seconds


def per_second(amount: float, seconds: list[float]) -> list[float]:
    return [amount / value for value in seconds]


def ratios(a: list[float], b: list[float]) -> list[float]:
    """a / b of every round."""
    return [x / y for x, y in zip(a, b, strict=True)]


# ---- ceilings
def ceilings(bench: Bench) -> None:
    """Speed of large matrix products and of copies on this device, in the dtypes used."""
    n, size, device = bench.shape.matmul, bench.shape.copied, bench.device
    for name in dict.fromkeys(("float32", bench.cfg.dtype)):
        dtype = getattr(torch, name)
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        source = torch.ones(size, device=device, dtype=dtype)
        copy = partial(torch.zeros_like(source).copy_, source)
        times = bench.seconds({"matmul": partial(torch.mm, a, b), "copy": copy})
        teraflops = per_second(2 * n**3 / 1e12, times["matmul"])
        bench.add("ceiling", f"matrix product, {name}", "TFLOP/s", teraflops)
        gigabytes = per_second(2 * source.nbytes / 1e9, times["copy"])  # read and written
        bench.add("ceiling", f"copy, {name}", "GB/s", gigabytes)


# ---- training
def default_recipe(config: ModelConfig) -> ModelConfig:
    """A plain shape with what train_llm.py adds by default."""
    default = train_llm.Config().model
    names = ("subwords", "value_embed", "canon", "pointer")
    return replace(config, **{name: getattr(default, name) for name in names})


def new_model(bench: Bench, config: ModelConfig) -> Llama:
    """A model with random weights on the device."""
    model = Llama(config, compute_dtype=bench.dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    if config.subwords:  # seven per token, the average of a real tokenizer
        model.token_subwords[:, :7].random_(0, config.subwords)
    return model.to(bench.device)


def training_side(bench: Bench, model: Llama, compile: bool) -> tuple[Callable, list]:
    """The loss of a model as a function of inputs and targets, and its optimizers."""
    optimizers = build_optimizers(
        model,
        muon_lr=1e-3,
        muon_wd=0.1,
        adamw_lr=1e-3,
        adamw_wd=0,
        adamw_beta2=0.95,
        dtype=model.compute_dtype,
        compile=compile,
    )
    return torch.compile(model, dynamic=False, fullgraph=True) if compile else model, optimizers


def random_windows(bench: Bench, batch_tokens: int) -> tuple[Tensor, int]:
    """Windows (B, T + 1) of a training step, and how many of them train_llm.py takes at a time."""
    config = bench.shape.text
    cfg = train_llm.Config(batch_tokens=batch_tokens, dtype=bench.cfg.dtype, model=config)
    train_llm.resolve_micro_batch(cfg, bench.device)
    shape = (batch_tokens // config.seq_len, config.seq_len + 1)
    return torch.randint(config.vocab_size, shape).to(bench.device), cfg.micro_batch  # (B, T + 1)


def step(forward: Callable, optimizers: list, windows: Tensor, micro_batch: int) -> None:
    """Gradient and update, without reading the data or measuring the gradient norm."""
    train_llm.backward(forward, windows, micro_batch)
    update(optimizers)


def training(bench: Bench) -> None:
    """Speed of train_llm.py's default recipe at the shape, and what its steps are made of."""
    model = new_model(bench, default_recipe(bench.shape.text))
    forward, optimizers = training_side(bench, model, bench.cfg.compile)
    flops, peak = model.flops_per_token(), peak_flops(bench.device, bench.cfg.dtype)
    ceiling = 1e12 * bench.value("ceiling", f"matrix product, {bench.cfg.dtype}")
    reset_peak_memory(bench.device)
    for batch_tokens in bench.shape.batch_tokens:
        windows, micro_batch = random_windows(bench, batch_tokens)

        def train(windows: Tensor = windows, micro_batch: int = micro_batch) -> None:
            train_llm.backward(forward, windows, micro_batch)
            clipped_norm(model)
            update(optimizers)

        train()  # compiles
        seconds = bench.seconds({"step": train})["step"]
        speeds = per_second(batch_tokens, seconds)
        parts = [
            part_seconds(bench.device, model, forward, optimizers, windows, micro_batch)
            for _ in range(bench.cfg.repeats)
        ]
        measured = {
            ("speed", "tokens/s"): speeds,
            ("of the matrix-product ceiling", "%"): [100 * v * flops / ceiling for v in speeds],
            ("MFU", "%"): [100 * v * flops / peak for v in speeds] if peak else [],
            ("step", "ms"): [1e3 * value for value in seconds],
        }
        measured |= {(name, "ms"): [1e3 * part[name] for part in parts] for name in parts[0]}
        for (name, unit), values in measured.items():
            if values:
                bench.add("training", f"{batch_tokens:,} tokens a step: {name}", unit, values)
    where = "this process" if bench.device.type == "cpu" else "GPU memory"
    bench.add("training", f"peak memory, {where}", "GB", [peak_memory_gb(bench.device)])


def reset_peak_memory(device: torch.device) -> None:
    """On a CPU the peak is that of the process and cannot be reset."""
    if device.type in ("cuda", "xpu"):
        torch.accelerator.reset_peak_memory_stats()


def part_seconds(
    device: torch.device,
    model: Llama,
    forward: Callable,
    optimizers: list,
    windows: Tensor,
    micro_batch: int,
) -> dict[str, float]:
    """Seconds of each part of a training step, waiting for the device after each."""
    names = ("forward and loss gradient", "backward", "gradient norm", "Muon", "AdamW")
    clocks = [Clock(device) for _ in names]
    for part in windows.split(micro_batch):
        with running(clocks[0]):
            loss = forward(part[:, :-1], part[:, 1:])
        with running(clocks[1]):
            loss.backward()
    with running(clocks[2]):
        clipped_norm(model)
    for clock, optimizer in zip(clocks[3:], optimizers, strict=True):
        with running(clock):
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return {name: clock.seconds for name, clock in zip(names, clocks, strict=True)}


@contextmanager
def running(clock: Clock) -> Iterator[None]:
    clock.start()
    yield
    clock.stop()


# ---- comparison with transformers
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


def their_side(bench: Bench, model: Llama, dtype: torch.dtype, compile: bool) -> tuple:
    """As training_side, for transformers with AdamW; dtype is that of autocast."""
    theirs = apertus(model).to(bench.device)
    # tied like ours; the missing scale does not matter here, because only speed is measured
    theirs.model.embed_tokens.weight = theirs.lm_head.weight
    forward = torch.compile(theirs, dynamic=False) if compile else theirs

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32):
            return forward(input_ids=inputs, labels=inputs, shift_labels=targets.contiguous()).loss

    return loss, [torch.optim.AdamW(theirs.parameters(), lr=1e-3, fused=True)]


def comparison(bench: Bench) -> None:
    """Training speed against transformers: the same plain shape, batch and micro-batch.

    transformers has no Muon, so it trains with AdamW.
    """
    plain = new_model(bench, bench.shape.text)
    dtype, batch_tokens = bench.cfg.dtype, bench.shape.batch_tokens[-1]
    ours, full = f"plain Llama, {dtype}", "default recipe"
    theirs, theirs_fp32 = f"transformers, {dtype}", "transformers, float32"
    sides = {
        full: training_side(bench, new_model(bench, default_recipe(bench.shape.text)), False),
        ours: training_side(bench, plain, False),
        theirs: their_side(bench, plain, bench.dtype, False),
    }
    pairs = [(ours, theirs), (full, ours)]
    if dtype != "float32":
        sides[theirs_fp32] = their_side(bench, plain, torch.float32, False)
        pairs.append((ours, theirs_fp32))
    if bench.cfg.compile:
        sides[f"{ours}, compiled"] = training_side(bench, plain, True)
        sides[f"{theirs}, compiled"] = their_side(bench, plain, bench.dtype, True)
        pairs.append((f"{ours}, compiled", f"{theirs}, compiled"))
    windows, micro_batch = random_windows(bench, batch_tokens)
    steps = {name: partial(step, *side, windows, micro_batch) for name, side in sides.items()}
    for run in steps.values():
        run()  # compiles
    times = bench.seconds(steps)
    speeds = {name: per_second(batch_tokens, values) for name, values in times.items()}
    for name, values in speeds.items():
        bench.add("transformers", f"{batch_tokens:,} tokens a step: {name}", "tokens/s", values)
    for a, b in pairs:
        bench.add("transformers", f"{a} / {b}", "x", ratios(speeds[a], speeds[b]))


# ---- generation
def word_tokenizer(size: int):
    """A tokenizer of `size` entries, the words w0, w1, ...; the last one is end-of-text."""
    words = {f"w{i}": i for i in range(size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"w{size - 1}")


def generation(bench: Bench) -> None:
    """Tokens/s of text and images, one at a time and 16 at once."""
    text_generation(bench)
    image_generation(bench)


def text_generation(bench: Bench) -> None:
    """Tokens/s of text with the shape's default recipe."""
    config, length = bench.shape.text, bench.shape.text_tokens
    model = new_model(bench, default_recipe(config)).for_inference()
    tokenizer = word_tokenizer(config.vocab_size)

    def generate(n: int) -> None:
        # at this temperature an untrained model repeats the last token and never ends a text
        texts = generate_text(
            model, tokenizer, "w1 w2 w3 w4", n, seed=0, max_tokens=length, temperature=0.01
        )
        assert all(text.count("w") == length for text in texts), texts

    times = bench.seconds({"batch 1": partial(generate, 1), "batch 16": partial(generate, 16)})
    for (name, seconds), n in zip(times.items(), (1, 16), strict=True):
        speeds = per_second(n * length, seconds)
        bench.add("generation", f"text of {length} tokens, {name}", "tokens/s", speeds)


def image_generation(bench: Bench) -> None:
    """Tokens/s of images without guidance, and against a full forward pass for every token."""
    shape, N = bench.shape, bench.cfg.image_tokens
    codes = replace(shape.vqvae, image_size=math.isqrt(N) * shape.vqvae.downsample)
    n_text = shape.image.vocab_size - 2 - codes.codebook_size
    config = replace(shape.image, n_image_positions=N, seq_len=N + 36)
    model = new_model(bench, config).for_inference()
    fmt = ImageTextFormat(word_tokenizer(n_text), codes, config)
    prompt = fmt.prompt("w1 w2 w3 w4")
    settings = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def generate(n: int) -> None:
        sample_image_tokens(model, fmt, [prompt] * n, list(range(n)), **settings)

    stride = max(1, N // 16)  # a forward pass of every length would take minutes
    lengths = range(len(prompt) + stride // 2, len(prompt) + N, stride)
    tokens = torch.tensor([prompt + [fmt.first_code] * N], device=bench.device)  # (1, T)

    @torch.no_grad()
    def recompute() -> None:
        for length in lengths:
            model.head(model.hidden(tokens[:, :length])[:, -1], fmt.code_slice)

    times = bench.seconds(
        {"1": partial(generate, 1), "16": partial(generate, 16), "recompute": recompute}
    )
    one, many = per_second(N, times["1"]), per_second(16 * N, times["16"])
    whole = per_second(len(lengths), times["recompute"])
    add = partial(bench.add, "generation")
    add(f"image of {N} tokens, batch 1", "tokens/s", one)
    add(f"image of {N} tokens, batch 16", "tokens/s", many)
    add(f"image of {N} tokens, recomputing the sequence", "tokens/s", whole)
    add("image: batch 16 / batch 1", "x", ratios(many, one))
    add("image: batch 1 / recomputing the sequence", "x", ratios(one, whole))


# ---- VQ-VAE
def vqvae(bench: Bench) -> None:
    """Training speed of train_vqvae.py on whole images."""
    cfg = train_vqvae.Config(model=bench.shape.vqvae, batch_images=bench.shape.images)
    cfg.micro_batch, size = cfg.batch_images, cfg.model.image_size
    model = VQVAE(cfg.model, compute_dtype=bench.dtype).to(bench.device)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if bench.cfg.compile else model
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images = 2 * torch.rand(cfg.batch_images, 3, size, size, device=bench.device) - 1

    def step() -> None:
        _, vectors, codes = train_vqvae.backward(forward, images, cfg)
        update([adamw])
        model.quantizer.update(vectors, codes)

    step()  # compiles
    seconds = bench.seconds({"step": step})["step"]
    name = f"{size} x {size} pixels, {cfg.batch_images} a step"
    bench.add("vqvae", name, "images/s", per_second(cfg.batch_images, seconds))


# ---- data
def data(bench: Bench) -> None:
    """Preparation of text against the bare tokenizer, and reading of batches."""
    wanted = bench.shape.prepared_tokens
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        texts = first_texts(DataConfig(source="stdlib"), 4 * wanted)
        source = Path(folder, "texts.jsonl")  # finding the files of stdlib takes time of its own
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        # texts held out from stdlib would be held out here again
        settings = {"val_fraction": 0.2, "val_tokens": wanted // 20, "cache": f"{folder}/first"}
        cfg = DataConfig(source=str(source), **settings)
        tokenizer = train_bpe("bpe-1024", texts)
        train, n_prepared = prepare(cfg, wanted, tokenizer)
        caches = (f"{folder}/{i}" for i in itertools.count())

        def tokenize() -> int:
            batches = (
                texts[i : i + BATCH_DOCUMENTS] for i in range(0, len(texts), BATCH_DOCUMENTS)
            )
            return sum(len(ids) for batch in batches for ids in encode(tokenizer, batch))

        n_bare = tokenize()
        times = bench.seconds(
            {
                "bare": tokenize,
                "prepare": lambda: prepare(replace(cfg, cache=next(caches)), wanted, tokenizer),
            }
        )
        reading(bench, train)
    bare, prepared = per_second(n_bare, times["bare"]), per_second(n_prepared, times["prepare"])
    bench.add("data", "bare tokenizer", "tokens/s", bare)
    bench.add("data", "preparation", "tokens/s", prepared)
    bench.add("data", "preparation / bare tokenizer", "x", ratios(prepared, bare))


def first_texts(cfg: DataConfig, characters: int) -> list[str]:
    """The first training documents, with at least so many characters in all."""
    texts, size = [], 0
    for record in training_records(cfg):
        texts.append(record[cfg.text_column])
        size += len(texts[-1])
        if size >= characters:
            break
    return texts


def prepare(cfg: DataConfig, tokens: int, tokenizer) -> tuple[Tokens, int]:
    """Training tokens in a new cache, and the number of all tokens prepared there."""
    wanted = {"train": tokens, "val": cfg.val_tokens}
    # as the process does that prepares data beside training
    folders = prepare_splits(cfg, wanted, tokenizer, tokens, read=read_ahead)
    splits = {split: Tokens(folder) for split, folder in folders.items()}
    return splits["train"], sum(map(len, splits.values()))


def reading(bench: Bench, tokens: Tokens) -> None:
    """Time to read the data of a training step and move it to the device."""
    seq_len, rng = bench.shape.text.seq_len, random.Random(0)
    n_windows = (len(tokens) - 1) // seq_len
    for batch_tokens in bench.shape.batch_tokens:

        def read(batch: int = batch_tokens // seq_len) -> None:
            indices = [rng.randrange(n_windows) for _ in range(batch)]
            tokens.windows(indices, seq_len).to(bench.device)

        milliseconds = [1e3 * value for value in bench.seconds({"read": read})["read"]]
        bench.add("data", f"reading {batch_tokens:,} tokens", "ms", milliseconds)


# ---- results
def machine(cfg: Config, device: torch.device) -> dict:
    """What the numbers depend on besides the settings."""
    return {
        "device": device_name(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **git_state(),
        "date": date.today().isoformat(),
    }


def number(value: float) -> str:
    """Three significant digits, and all digits before the decimal point."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 6)}f}"


def table(rows: list[dict]) -> str:
    """The rows as text, in columns."""
    lines = [("group", "measurement", "median", "min", "max", "unit", "n")]
    for row in rows:
        numbers = (number(row[key]) for key in ("median", "min", "max"))
        lines.append((row["group"], row["name"], *numbers, row["unit"], str(row["n"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        [cell.ljust(w) if i in (0, 1, 5) else cell.rjust(w) for i, (cell, w) in enumerate(pairs)]
        for pairs in (zip(line, widths, strict=True) for line in lines)
    )
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


GROUPS = {
    "training": training,
    "transformers": comparison,
    "generation": generation,
    "vqvae": vqvae,
    "data": data,
}


def resolve(cfg: Config, device: torch.device) -> list[str]:
    """Fill in what is `auto` and return the groups to measure. Raises UserError."""
    check_positive(cfg, "repeats")
    names = [name.strip() for name in cfg.only.split(",")] if cfg.only else list(GROUPS)
    for name in names:
        if name not in GROUPS:
            raise UserError(f"--only has {name!r}; choose from {', '.join(GROUPS)}")
    if cfg.shape == "auto":
        cfg.shape = "small" if device.type == "cpu" else "88M"
    if cfg.image_tokens == "auto":
        cfg.image_tokens = SHAPES[cfg.shape].image_tokens
    side = math.isqrt(max(0, cfg.image_tokens))
    if side**2 != cfg.image_tokens or not 3 <= side <= 32:
        raise UserError(
            f"--image_tokens is {cfg.image_tokens}; set it to a square from 9 to 1024, such as 256"
        )
    if cfg.compile == "auto":
        cfg.compile = device.type == "cuda"
    return names


def check_out(path: Path) -> None:
    """Raises UserError unless the results can be written to the path, before anything runs."""
    if path.suffix != ".json" or (path.exists() and not path.is_file()):
        raise UserError(f"--out {path} is not the name of a .json file; pass one, like bench.json")
    if path.exists() and '"machine"' not in path.read_text(errors="replace"):
        raise UserError(f"--out {path} exists and is not a result of this tool; pass another name")
    if not path.parent.is_dir():
        raise UserError(f"--out {path} is in a folder that does not exist; create it first")


def main(cfg: Config) -> dict:
    """Measure, print the table, and write and return the results. Raises UserError."""
    start = time.perf_counter()
    device = resolve_device(cfg)
    names = resolve(cfg, device)
    check_out(Path(cfg.out))
    bench = Bench(cfg, device, SHAPES[cfg.shape])
    compiled = "compiled" if cfg.compile else "not compiled"
    print(f"{device_name(device)}, {cfg.dtype}, {compiled}, torch {torch.__version__}")
    for name, measure in {"ceiling": ceilings, **{name: GROUPS[name] for name in names}}.items():
        print(f"{time.perf_counter() - start:4.0f} s: measuring {name}", flush=True)
        measure(bench)
    seconds = time.perf_counter() - start
    results = {
        "machine": machine(cfg, device),
        "settings": to_plain(cfg),
        "seconds": seconds,
        "rows": bench.rows,
    }
    write_text(Path(cfg.out), json.dumps(results, indent=1) + "\n")
    print(f"\n{table(bench.rows)}\n\n{seconds:.0f} seconds; saved in {cfg.out}")
    return results


if __name__ == "__main__":
    run_script(main, Config, prog="python -m tools.bench", description=__doc__)
