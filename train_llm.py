"""Train a language model on streamed web text and measure its validation loss.

python train_llm.py --tokens 20M                              # 88M parameters, one GPU
python train_llm.py --config configs/llm_demo.yaml            # a laptop, no GPU, no network
python train_llm.py --run NAME --resume                       # continue a stopped run
torchrun --nproc_per_node=4 -- train_llm.py --tokens 1B       # several GPUs
python train_llm.py --config configs/llm_small.yaml --data.source 'books/*.txt'
python train_llm.py --init_from NAME --data.tokenizer runs/NAME/tokenizer --data.source 'x/*.txt'
"""

import hashlib
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.config import (
    HumanInt,
    RunConfig,
    UserError,
    check_betas,
    check_fractions,
    check_not_negative,
    check_positive,
    run_script,
)
from common.device import (
    Clock,
    fitting_sequences,
    training_seconds,
)
from common.distributed import (
    agree_on_compile,
    check_divisible,
    join_ranks,
    n_ranks,
    rank,
    share,
    weighted_mean,
)
from common.loop import (
    average_gradients,
    clipped_norm,
    finished_summary,
    print_setup,
    resolve_steps,
    set_lr,
    training_loop,
    trapezoid,
    update,
    warming_up,
)
from common.metrics import Metrics, ast_sha256, evaluations
from common.run import check_run, origin, resume
from data.source import digest
from data.text import DataConfig, eval_windows, token_request
from data.tokenizer import load_tokenizer, token_subwords
from data.tokens import covered, open_tokens, token_batches, training_windows
from model import MAX_SUBWORDS, Llama, ModelConfig
from muon import build_optimizers
from pretrained import Pretrained, initial_weights, initialize
from sampling import prompt_ids, write_text_samples


@dataclass
class Config(RunConfig):
    """Settings of a language-model run; `auto` is resolved and printed at the start."""

    stage: Literal["llm"] = "llm"
    """Stage that the run belongs to; fixed for this script."""
    init_from: str = ""
    """Language model to continue training, with a schedule of its own: a train_llm.py run (name,
    folder or checkpoint) or a folder of tools/export_hf.py, with the same model shape and
    tokenizer. Empty: random initialization."""
    tokens: HumanInt = HumanInt("8M")
    """Budget in training tokens. The benchmarks are 8M, 20M, 100M and 1B."""
    batch_tokens: HumanInt | Literal["auto"] = "auto"
    """Tokens per step. auto: about tokens / 1000, a power of two times the sequence length, at most
    16,384."""
    allow_repeat: bool = False
    """Whether to repeat the data if it has fewer tokens than the budget. false: stop with an
    error."""
    muon_lr: float | Literal["auto"] = "auto"
    """Muon's peak learning rate, for the weight matrices of blocks and pointer. auto: 0.015 up to
    20M tokens, then proportional to tokens^(-1/6)."""
    muon_wd: float | Literal["auto"] = "auto"
    """Muon's weight decay. auto: 2 / (muon_lr * steps), at most 0.02 / muon_lr. A run at the peak
    learning rate throughout would then shrink the weights to e^-2 of their size."""
    muon_momentum: float | Literal["auto"] = "auto"
    """Muon's momentum. auto: averages the gradients of about steps / 78 steps, at least 10 and at
    most 20, which is a momentum of 0.9 to 0.95."""
    adamw_lr: float | Literal["auto"] = "auto"
    """AdamW's peak learning rate, for embeddings, norms, Canon layers and the pointer's sentinel;
    subword embeddings use 0.3 times this. auto: 0.006 * sqrt(model.n_layers / 6) up to 20M tokens,
    then proportional to tokens^(-1/3)."""
    adamw_wd: float = 0.0
    """AdamW's weight decay."""
    adamw_beta2: float | Literal["auto"] = "auto"
    """AdamW's beta2, the decay rate of the second moment. auto: a half-life of 1/8 of the budget,
    at most 5M tokens."""
    warmup_frac: float = 0.0
    """Fraction of the budget for the linear learning-rate warm-up. 0: no warm-up."""
    cooldown_frac: float = 0.8
    """Final fraction of the budget over which the learning rate decays linearly to lr_floor times
    its peak. 0: no cooldown."""
    lr_floor: float = 0.02
    """Final learning rate as a fraction of the peak."""
    short_seq_frac: float = 0.5
    """Initial fraction of the budget in which each sequence is split into two halves, a warm-up of
    the sequence length. 0: full length from the start."""
    grad_clip: float = 0.0
    """Maximum norm of the gradient. 0: no clipping."""
    eval_tokens: HumanInt = HumanInt("1M")
    """Validation tokens per evaluation, in sequences evenly spaced over the validation set
    (data.val_tokens)."""
    sample_prompts: list[str] = field(
        default_factory=lambda: ["The reason why the sky is blue is", "Once upon a time"]
    )
    """Prompts that are continued at every evaluation."""
    sample_tokens: int = 64
    """Length in tokens of each continuation sampled at an evaluation."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            n_layers=21, subwords=1024, value_embed=True, canon=3, pointer=64
        )
    )


# ---- recipe
def resolve_recipe(cfg: Config) -> int:
    """Fill in what follows from the budget and return the number of steps. Raises UserError."""
    check_positive(cfg, "tokens", "eval_tokens", "sample_tokens")
    check_not_negative(cfg, "adamw_wd", "grad_clip")
    seq_len = cfg.model.seq_len
    if cfg.model.n_image_positions:
        raise UserError(
            f"--model.n_image_positions is {cfg.model.n_image_positions}, but a language model has "
            "no image positions; set it to 0"
        )
    if cfg.eval_tokens < seq_len:
        raise UserError(
            f"--eval_tokens {cfg.eval_tokens} is less than one sequence; set it to "
            f"--model.seq_len ({seq_len}) or more"
        )
    check_fractions(cfg, "short_seq_frac")
    if cfg.short_seq_frac and seq_len % 2:
        raise UserError(
            f"--model.seq_len {seq_len} is odd, so sequences cannot be split into halves; "
            "set --short_seq_frac 0"
        )
    if cfg.batch_tokens == "auto":
        sequences = min(16_384, cfg.tokens / 1000) / seq_len
        cfg.batch_tokens = seq_len * 2 ** max(0, round(math.log2(sequences)))
    if cfg.batch_tokens % seq_len:
        raise UserError(
            f"--batch_tokens {cfg.batch_tokens} is not divisible by --model.seq_len {seq_len}; "
            f"set it to {max(1, cfg.batch_tokens // seq_len + 1) * seq_len}"
        )
    steps = resolve_steps(cfg, "tokens", "batch_tokens")
    if cfg.muon_lr == "auto":
        cfg.muon_lr = 0.015 * min(1.0, 20e6 / cfg.tokens) ** (1 / 6)
    check_positive(cfg, "muon_lr")
    if cfg.muon_wd == "auto":
        cfg.muon_wd = min(2 / steps, 0.02) / cfg.muon_lr
    if cfg.muon_momentum == "auto":
        cfg.muon_momentum = 1 - 1 / min(20, max(10, steps / 78))
    if cfg.adamw_lr == "auto":
        depth = (cfg.model.n_layers / 6) ** 0.5
        cfg.adamw_lr = 0.006 * depth * min(1.0, 20e6 / cfg.tokens) ** (1 / 3)
    if cfg.adamw_beta2 == "auto":
        cfg.adamw_beta2 = 0.5 ** (cfg.batch_tokens / min(5e6, cfg.tokens / 8))
    check_positive(cfg, "adamw_lr")
    check_not_negative(cfg, "muon_wd")
    check_fractions(cfg, "lr_floor")
    check_betas(cfg, "muon_momentum", "adamw_beta2")
    return steps


def resolve_micro_batch(cfg: Config, device: torch.device) -> None:
    """Fill in cfg.micro_batch by what fits the device; at most a rank's share of a step.

    Raises UserError.
    """
    check_divisible(cfg, "batch_tokens", cfg.batch_tokens // cfg.model.seq_len)
    sequences = cfg.batch_tokens // cfg.model.seq_len // n_ranks()
    if cfg.micro_batch == "auto":
        limit = max(1, fitting_sequences(cfg, device))
        divisors = [n for n in range(1, sequences + 1) if sequences % n == 0]
        cfg.micro_batch = max(n for n in divisors if n <= limit)
    check_positive(cfg, "micro_batch")
    if n_ranks() > 1:  # a run that one process started may have more
        cfg.micro_batch = min(cfg.micro_batch, sequences)
    if sequences % cfg.micro_batch:
        raise UserError(
            f"--micro_batch {cfg.micro_batch} does not divide the {sequences} sequences of a step "
            f"(batch_tokens {cfg.batch_tokens} / seq_len {cfg.model.seq_len}); "
            "choose a divisor or omit it"
        )


# ---- data
def check_tokenizer(cfg: Config, tokenizer) -> None:
    """Raises UserError if the tokenizer does not fit the model or the prompts the context."""
    if len(tokenizer) > cfg.model.vocab_size:
        raise UserError(
            f"tokenizer {cfg.data.tokenizer} has {len(tokenizer)} entries, but --model.vocab_size "
            f"is {cfg.model.vocab_size}; set it to {len(tokenizer)} or more, or choose a smaller "
            "tokenizer"
        )
    for prompt in cfg.sample_prompts:
        prompt_ids(tokenizer, prompt, cfg.model.seq_len)


def write_assets(tokenizer, folder: Path) -> None:
    """Copy the tokenizer into a run folder."""
    tokenizer.save_pretrained(folder / "tokenizer")


# ---- model
def build_model(cfg: Config, tokenizer, source: Pretrained | None) -> Llama:
    """The model with the subwords of each token, and random weights or those of `source`."""
    model = Llama(cfg.model, compute_dtype=getattr(torch, cfg.dtype))
    model.init_weights(torch.Generator().manual_seed(cfg.seed))
    if cfg.model.subwords:
        table = token_subwords(tokenizer, cfg.model.subwords, MAX_SUBWORDS)
        model.token_subwords[: len(tokenizer)] = table
    initialize(model, source, len(tokenizer))
    return model


# ---- training and evaluation
def split(windows: Tensor, parts: int) -> Tensor:
    """Windows (N, T + 1) as windows (N * parts, T / parts + 1) with the same inputs and targets."""
    length = (windows.shape[1] - 1) // parts
    return windows.unfold(1, length + 1, length).flatten(0, 1)


def backward(model, windows: Tensor, micro_batch: int) -> Tensor:
    """Accumulate the gradient of the mean loss over windows (N, T + 1); returns that loss ()."""
    total = torch.zeros((), device=windows.device)
    parts = windows.split(micro_batch)
    for part in parts:
        loss = model(part[:, :-1], part[:, 1:]) / len(parts)
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(model, windows: torch.Tensor, micro_batch: int, device: torch.device) -> float:
    """Mean loss in nats per token over windows (N, T + 1)."""
    total = 0.0
    for part in windows.split(micro_batch):
        part = part.to(device)
        total += model(part[:, :-1], part[:, 1:]).item() * len(part)
    return total / len(windows)


def evaluation_sha256() -> str:
    """sha256 of the syntax tree of `evaluate`: losses compare only between runs that share it."""
    return ast_sha256(evaluate)


def warn_if_slow(cfg: Config, flops: float, device: torch.device) -> None:
    """Without a GPU, print how long the remaining FLOPs will take if that is over half an hour."""
    if device.type != "cpu":
        return
    hours = training_seconds(device, cfg.dtype, flops) / 3600
    if hours > 0.5:
        demo = "--config configs/llm_demo.yaml takes minutes"
        print(f"no GPU: this will take about {hours:.1f} hours here; {demo}", flush=True)


def describe(
    cfg: Config, run: Path, first: int, model: Llama, muon, train, val, val_windows, epochs
) -> None:
    """Print what is about to run."""
    matrices = sum(p.numel() for group in muon.param_groups for p in group["params"])
    scored = val_windows[:, 1:].numel()
    so_far = "" if train.complete else f" of {train.limit:,}, the rest is being prepared"
    prepared = f"{len(train):,} tokens{so_far}"
    seq_len = cfg.model.seq_len
    sequences = cfg.batch_tokens // seq_len
    halves = f" ({2 * sequences} of {seq_len // 2} in the first {cfg.short_seq_frac:.0%})"
    print_setup(
        cfg,
        run,
        first,
        origin=f"from {cfg.init_from}" if cfg.init_from else "from scratch",
        model=f"{model.n_params():,} parameters, {matrices:,} with Muon, the rest with AdamW",
        data=f"{prepared}, {epochs:.2f} epochs; validation on {scored:,} of {len(val):,} tokens",
        batch=f"{cfg.batch_tokens:,} tokens: {sequences} sequence{'s' * (sequences > 1)} of "
        f"{seq_len}{halves if cfg.short_seq_frac else ''}, {cfg.micro_batch} per forward pass",
        recipe=f"muon_lr {cfg.muon_lr:.4g}, muon_wd {cfg.muon_wd:.4g}, "
        f"muon_momentum {cfg.muon_momentum:.3g}, adamw_lr {cfg.adamw_lr:.4g}, "
        f"adamw_beta2 {cfg.adamw_beta2:.5g}",
    )


def main(cfg: Config) -> dict:
    """Train as cfg says and return the summary. Raises UserError."""
    # ---- set-up
    started = time.perf_counter()
    steps = resolve_recipe(cfg)
    device = join_ranks(cfg)
    resolve_micro_batch(cfg, device)
    run = check_run(cfg)
    if summary := finished_summary(run):
        return summary
    seq_len, batch = cfg.model.seq_len, cfg.batch_tokens // cfg.model.seq_len

    # ---- data
    parent = origin(cfg, run)
    token_request(cfg.data, "train", "")  # finds a wrong path before anything is downloaded
    tokenizer = load_tokenizer(cfg.data, saved=parent and parent / "tokenizer")
    check_tokenizer(cfg, tokenizer)
    source = initial_weights(cfg, tokenizer, parent)
    # One more than the budget, because the last input has a target too. Always the whole budget,
    # so that its sha256 depends on the data and not on the batch size.
    val, train = open_tokens(cfg.data, cfg.tokens + 1, tokenizer, prepare=rank() == 0)
    n_windows = training_windows(train, steps * batch, seq_len, cfg.allow_repeat)
    val_windows = eval_windows(val, seq_len, cfg.eval_tokens // seq_len)  # (N, T + 1)
    own_windows = share(val_windows)
    tokenizer_sha256 = digest(tokenizer.backend_tokenizer.to_str())

    # ---- model
    model = build_model(cfg, tokenizer, source).to(device)
    mean_length = seq_len * (1 - cfg.short_seq_frac / 2)
    flops = cfg.batch_tokens * model.flops_per_token(mean_length)  # of a step, on average
    agree_on_compile(cfg, device, steps * flops, cfg.model.n_layers)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if cfg.compile else model

    # ---- optimizers
    optimizers = build_optimizers(
        model,
        muon_lr=cfg.muon_lr,
        muon_wd=cfg.muon_wd,
        muon_momentum=cfg.muon_momentum,
        adamw_lr=cfg.adamw_lr,
        adamw_wd=cfg.adamw_wd,
        adamw_beta2=cfg.adamw_beta2,
        dtype=model.compute_dtype,
        compile=cfg.compile,
    )

    # ---- resume
    def inputs(step: int) -> dict[str, str]:
        train_sha256 = train.prefix_sha256(covered(train, step, batch=batch, seq_len=seq_len))
        return {"train": train_sha256, "val": val.sha256, "tokenizer": tokenizer_sha256}

    state = resume(cfg, run, model, optimizers, inputs)
    first, clock = state["step"], Clock(device, state["train_seconds"])
    describe(
        cfg, run, first, model, optimizers[0], train, val, val_windows, steps * batch / n_windows
    )
    warn_if_slow(cfg, (steps - first) * flops, device)

    # ---- warm-up
    if cfg.compile:
        with warming_up(model, *optimizers):
            zeros = torch.zeros(cfg.micro_batch, seq_len + 1, dtype=torch.long, device=device)
            for parts in (2, 1) if cfg.short_seq_frac else (1, 1):
                backward(forward, split(zeros, parts), cfg.micro_batch * parts)
                update(optimizers, torch.zeros((), device=device))
            last = cfg.micro_batch + len(own_windows) % cfg.micro_batch  # both sizes
            evaluate(forward, own_windows[:last], cfg.micro_batch, device)

    # ---- loop
    units = {"unit": "tokens", "per_step": cfg.batch_tokens, "flops": flops}
    metrics = Metrics(run, cfg, state, steps, started=started, clock=clock, **units)

    def evaluate_now(step: int) -> None:
        loss = evaluate(forward, own_windows, cfg.micro_batch, device)
        (loss,) = weighted_mean([loss], len(own_windows))
        bpb = loss / math.log(2) / val.bytes_per_token
        metrics.line(f"val {step}/{steps} | loss {loss:.4f} | bpb {bpb:.4f}")
        if cfg.sample_prompts and rank() == 0:
            path, prompts = run / "samples" / f"{step:07d}.txt", cfg.sample_prompts
            length, seed = cfg.sample_tokens, cfg.seed
            texts = write_text_samples(path, model, tokenizer, prompts, length, seed)
            metrics.text_samples(step, prompts, texts)
        metrics.row(step=step, val_loss=loss, val_bpb=bpb)  # last: marks a complete evaluation

    shape = {"batch": batch, "seq_len": seq_len, "seed": cfg.seed, "device": device}
    shape |= {"allow_repeat": cfg.allow_repeat, "rank": rank(), "ranks": n_ranks()}
    batches = token_batches(train, first, steps, **shape)  # (B, T + 1) each
    loop = partial(training_loop, cfg, metrics, model, optimizers, state, evaluate_now)
    with loop(partial(write_assets, tokenizer), inputs) as after_step:
        for step, windows in after_step.batches(batches):
            progress = step / steps
            factor = trapezoid(progress, cfg.warmup_frac, cfg.cooldown_frac, cfg.lr_floor)
            set_lr(optimizers, factor)
            parts = 2 if progress <= cfg.short_seq_frac else 1
            loss = backward(forward, split(windows, parts), cfg.micro_batch * parts)
            average_gradients(model, loss)
            norm = clipped_norm(model, cfg.grad_clip)
            update(optimizers, after_step.found_inf(loss, norm))
            rates = {"lr": cfg.muon_lr * factor, "adamw_lr": cfg.adamw_lr * factor}
            after_step(step, loss=loss, grad_norm=norm, **rates)

    # ---- summary
    last = evaluations(run)[-1]
    return metrics.finish(
        model,
        steps * cfg.batch_tokens,
        val_loss=last["val_loss"],
        val_bpb=last["val_bpb"],
        val_tokens=val_windows[:, 1:].numel(),
        val_sha256=hashlib.sha256(val_windows.numpy()).hexdigest(),
        train_sha256=train.sha256,
        tokenizer_sha256=tokenizer_sha256,
        evaluation_sha256=evaluation_sha256(),
    )


if __name__ == "__main__":
    run_script(main, Config, prog="train_llm.py", description=__doc__)
