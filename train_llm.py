"""Train the language model on streamed web text and measure its validation loss.

python train_llm.py --tokens 20M                              # 88M parameters, one GPU
python train_llm.py --config configs/llm_demo.yaml            # minutes on a laptop, no GPU, no network
python train_llm.py --run NAME --resume                       # go on where NAME stopped
python train_llm.py --config configs/llm_small.yaml --data.source 'books/*.txt' --data.val_fraction 0.2
"""

import hashlib
import json
import math
import time
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

import torch

from common import (
    Clock,
    Count,
    Interrupt,
    RunConfig,
    UserError,
    check_not_negative,
    check_positive,
    check_run,
    check_shares,
    checkpoints,
    device_name,
    fitting_sequences,
    load_checkpoint,
    milestones,
    open_run,
    ramp,
    resolve_device,
    run_script,
    save_checkpoint,
    stop,
    trapezoid,
)
from data.text import DataConfig, Tokens, batches, digest, eval_windows, prepare
from data.tokenizer import load_tokenizer, spelling
from generate import write_samples
from metrics import Metrics, ast_sha256, evaluated, read_metrics
from model import Llama, ModelConfig
from muon import build_optimizers


@dataclass
class Config(RunConfig):
    """Settings of a run. `auto` is filled in and printed at the start."""

    tokens: Count = Count("8M")
    """Budget: tokens to train on. The benchmarks are 8M, 20M, 100M and 1B."""
    batch_tokens: Count | Literal["auto"] = "auto"
    """Tokens a step; auto: about a thousandth of the budget, in a power of two of sequences, at most some 16,384."""
    allow_repeat: bool = False
    """Go through the data again when there is less than the budget, instead of stopping with an error."""
    muon_lr: float | Literal["auto"] = "auto"
    """Peak learning rate of the blocks' matrices; auto: 0.015 up to 20M tokens, then falling with tokens^(-1/6)."""
    muon_wd: float | Literal["auto"] = "auto"
    """Weight decay of the same; auto: 2 / (muon_lr * steps), so that at the peak rate a run decays by e^-2, but at most
    0.02 / muon_lr."""
    adamw_lr: float | Literal["auto"] = "auto"
    """Peak learning rate of embeddings, norms and Canon layers, 0.3 of it of affixes; auto: 0.006 up to 20M tokens, then falling with
    tokens^(-1/3)."""
    adamw_wd: float = 0.0
    """Weight decay of the same."""
    adamw_beta2: float | Literal["auto"] = "auto"
    """Decay of AdamW's second moment; auto: a half-life of an eighth of the budget, at most 5M tokens."""
    warmup_frac: float = 0.0
    """Share of the budget over which the learning rate rises."""
    cooldown_frac: float = 0.8
    """Share of the budget over which it falls at the end."""
    lr_floor: float = 0.02
    """What it falls to, as a share of the peak."""
    momentum_warmup_frac: float | Literal["auto"] = "auto"
    """Share of the budget over which Muon's momentum rises from 0.85 to 0.95; auto: 0.15, at most 300 steps."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    eval_tokens: Count = Count("1M")
    """Validation tokens scored by an evaluation, spread evenly over those prepared."""
    sample_prompts: list[str] = field(
        default_factory=lambda: ["The reason why the sky is blue is", "Once upon a time"]
    )
    """Prompts continued at every evaluation."""
    sample_tokens: int = 64
    """Length of those continuations."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(n_layers=21, affixes=1024, value_shortcut=True, canon=3)
    )


def resolve_recipe(cfg: Config) -> int:
    """Fill in what the budget decides and return the number of steps. Raises UserError."""
    check_positive(cfg, "tokens", "eval_tokens")
    if cfg.model.cells:
        raise UserError(f"--model.cells {cfg.model.cells}: text has no cells; leave it at 0")
    if cfg.batch_tokens == "auto":
        sequences = min(16_384, cfg.tokens / 1000) / cfg.model.seq_len
        cfg.batch_tokens = cfg.model.seq_len * 2 ** max(0, round(math.log2(sequences)))
    check_positive(cfg, "batch_tokens")
    if cfg.batch_tokens % cfg.model.seq_len:
        raise UserError(
            f"--batch_tokens {cfg.batch_tokens} is not divisible by --model.seq_len {cfg.model.seq_len}: "
            f"set it to {(cfg.batch_tokens // cfg.model.seq_len + 1) * cfg.model.seq_len}"
        )
    steps = cfg.tokens // cfg.batch_tokens
    if steps < 1:
        raise UserError(
            f"--tokens {cfg.tokens} is less than one step of --batch_tokens {cfg.batch_tokens}"
        )
    if cfg.muon_lr == "auto":
        cfg.muon_lr = 0.015 * min(1.0, 20e6 / cfg.tokens) ** (1 / 6)
    if cfg.muon_wd == "auto":
        cfg.muon_wd = min(2 / steps, 0.02) / cfg.muon_lr
    if cfg.adamw_lr == "auto":
        cfg.adamw_lr = 0.006 * min(1.0, 20e6 / cfg.tokens) ** (1 / 3)
    if cfg.adamw_beta2 == "auto":
        cfg.adamw_beta2 = 0.5 ** (cfg.batch_tokens / min(5e6, cfg.tokens / 8))
    if cfg.momentum_warmup_frac == "auto":
        cfg.momentum_warmup_frac = min(0.15, 300 / steps)
    if cfg.log_every == "auto":
        cfg.log_every = max(1, steps // 50)
    check_positive(cfg, "muon_lr", "adamw_lr", "log_every", "sample_tokens")
    check_not_negative(cfg, "seed", "muon_wd", "adamw_wd", "grad_clip")
    check_shares(
        cfg, "warmup_frac", "cooldown_frac", "lr_floor", "eval_every", "save_every", "adamw_beta2"
    )
    return steps


def resolve_micro_batch(cfg: Config, device: torch.device) -> None:
    """Fill in cfg.micro_batch by what the device holds. Raises UserError."""
    sequences = cfg.batch_tokens // cfg.model.seq_len
    if cfg.micro_batch == "auto":
        fits = max(1, fitting_sequences(cfg, device))
        cfg.micro_batch = max(
            n for n in range(1, sequences + 1) if sequences % n == 0 and n <= fits
        )
    check_positive(cfg, "micro_batch")
    if sequences % cfg.micro_batch:
        raise UserError(
            f"--micro_batch {cfg.micro_batch} does not divide the {sequences} sequences of a step "
            f"(batch_tokens {cfg.batch_tokens} / seq_len {cfg.model.seq_len})"
        )


def backward(model, windows: torch.Tensor, micro_batch: int) -> torch.Tensor:
    """Accumulate the gradient of the mean loss over windows (N, T + 1); return that loss."""
    total = torch.zeros((), device=windows.device)
    parts = windows.split(micro_batch)
    for part in parts:
        loss = model(part[:, :-1], part[:, 1:]) / len(parts)
        loss.backward()
        total += loss.detach()
    return total


def matmul_flops(device: torch.device) -> float:
    """fp32 matrix FLOP/s of the device, measured in a fraction of a second."""
    x = torch.randn(1024, 1024, device=device)
    x @ x
    start = time.perf_counter()
    for _ in range(5):
        x @ x
    return 5 * 2 * 1024**3 / (time.perf_counter() - start)


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


def main(cfg: Config) -> dict:
    """Train as cfg says and return the summary. Raises UserError."""
    # ---- set-up
    steps = resolve_recipe(cfg)
    device = resolve_device(cfg)
    resolve_micro_batch(cfg, device)
    run = check_run(cfg)
    if (run / "summary.json").exists():
        print(f"{run} is finished; delete the folder to train it anew")
        return json.loads((run / "summary.json").read_text())
    seq_len, batch = cfg.model.seq_len, cfg.batch_tokens // cfg.model.seq_len

    # ---- data
    tokenizer = load_tokenizer(cfg.data)
    if len(tokenizer) > cfg.model.vocab_size:
        raise UserError(
            f"tokenizer {cfg.data.tokenizer} has {len(tokenizer)} entries, --model.vocab_size is "
            f"{cfg.model.vocab_size}: set it to {len(tokenizer)} or more"
        )
    val = Tokens(prepare(cfg.data, "val", cfg.data.val_tokens, tokenizer))
    val_windows = eval_windows(val, seq_len, cfg.eval_tokens // seq_len)
    # the last input has a target too; the whole budget whatever the batch, so that its sha256 is that of the data alone
    train = Tokens(prepare(cfg.data, "train", cfg.tokens + 1, tokenizer), limit=cfg.tokens + 1)
    n_windows = min((len(train) - 1) // seq_len, steps * batch)
    passes = steps * batch / max(1, n_windows)
    if n_windows < 1 or passes > 1 and not cfg.allow_repeat:
        raise UserError(
            f"--tokens {cfg.tokens}: the data source holds only {len(train)} tokens; lower the budget to "
            f"{n_windows * seq_len}, give more data, or set --allow_repeat for {passes:.1f} passes"
        )
    open_run(cfg, run)
    tokenizer.save_pretrained(run / "tokenizer")

    # ---- model
    model = Llama(cfg.model, compute_dtype=getattr(torch, cfg.dtype))
    model.init_weights(torch.Generator().manual_seed(cfg.seed))
    if cfg.model.affixes:
        model.spelling[: len(tokenizer)] = spelling(tokenizer, cfg.model.affixes)
    model.to(device)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if cfg.compile else model

    # ---- optimizers
    muon, adamw = optimizers = build_optimizers(
        model,
        muon_lr=cfg.muon_lr,
        muon_wd=cfg.muon_wd,
        adamw_lr=cfg.adamw_lr,
        adamw_wd=cfg.adamw_wd,
        adamw_beta2=cfg.adamw_beta2,
        dtype=model.compute_dtype,
        compile=cfg.compile,
    )

    # ---- resume
    state = {"step": 0, "train_seconds": 0.0}
    if saved := checkpoints(run):
        state = load_checkpoint(saved[-1], model, optimizers)
    first, clock = state["step"], Clock(device, state["train_seconds"])
    matrices = sum(p.numel() for group in muon.param_groups for p in group["params"])
    print(
        f"run {run}, {f'resumed at step {first}' if first else 'from scratch'}\n"
        f"device {device_name(device)}, {cfg.dtype}, {'compiled' if cfg.compile else 'not compiled'}\n"
        f"model {model.n_params():,} parameters, {matrices:,} with Muon, the others with AdamW\n"
        f"data {len(train):,} tokens, {passes:.2f} passes; validation on {val_windows[:, 1:].numel():,} of {len(val):,}\n"
        f"steps {steps} of {cfg.batch_tokens:,} tokens: {batch} sequences of {seq_len}, {cfg.micro_batch} at a time\n"
        f"recipe muon_lr {cfg.muon_lr:.4g}, muon_wd {cfg.muon_wd:.4g}, adamw_lr {cfg.adamw_lr:.4g}, "
        f"adamw_beta2 {cfg.adamw_beta2:.5g}",
        flush=True,
    )
    if device.type == "cpu":
        # training reaches some 0.6 of the speed of plain matrix products, docs/LOG.md
        hours = (
            (steps - first)
            * cfg.batch_tokens
            * model.flops_per_token()
            / (0.6 * matmul_flops(device))
            / 3600
        )
        if hours > 0.5:
            print(
                f"no GPU: about {hours:.1f} hours here; --config configs/llm_demo.yaml takes minutes",
                flush=True,
            )

    # ---- warm-up
    if cfg.compile:
        before = deepcopy([model.state_dict(), *(o.state_dict() for o in optimizers)])
        for _ in range(2):
            backward(
                forward,
                torch.zeros(cfg.micro_batch, seq_len + 1, dtype=torch.long, device=device),
                cfg.micro_batch,
            )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        evaluate(forward, val_windows[: cfg.micro_batch], cfg.micro_batch, device)
        for part, state_dict in zip([model, *optimizers], before):
            part.load_state_dict(state_dict)

    # ---- loop
    metrics = Metrics(
        run,
        cfg,
        first,
        steps,
        clock=clock,
        unit="tokens",
        per_step=cfg.batch_tokens,
        flops=cfg.batch_tokens * model.flops_per_token(),
    )

    def evaluate_now(step: int) -> None:
        loss = evaluate(forward, val_windows, cfg.micro_batch, device)
        bpb = loss / math.log(2) / val.bytes_per_token
        metrics.row(step=step, val_loss=loss, val_bpb=bpb)
        metrics.line(f"val {step}/{steps} | loss {loss:.4f} | bpb {bpb:.4f}")
        if cfg.sample_prompts:
            samples = run / "samples" / f"{step:07d}.txt"
            write_samples(
                samples, model, tokenizer, cfg.sample_prompts, cfg.sample_tokens, cfg.seed
            )

    evals, saves = milestones(steps, cfg.eval_every), milestones(steps, cfg.save_every)
    if first in evals and not evaluated(run, first):
        evaluate_now(first)
    with Interrupt() as interrupt:
        clock.start()
        for step, windows in enumerate(
            batches(
                train,
                first,
                steps,
                batch=batch,
                seq_len=seq_len,
                n_windows=n_windows,
                seed=cfg.seed,
                device=device,
            ),
            start=first + 1,
        ):
            factor = trapezoid(step / steps, cfg.warmup_frac, cfg.cooldown_frac, cfg.lr_floor)
            for group in (*muon.param_groups, *adamw.param_groups):
                group["lr"] = group["peak_lr"] * factor
            for group in muon.param_groups:
                group["momentum"] = ramp(step / steps, 0.85, 0.95, cfg.momentum_warmup_frac)
            loss = backward(forward, windows, cfg.micro_batch)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if cfg.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip, norm)
            loss, norm = torch.stack([loss, norm]).tolist()
            if not math.isfinite(loss + norm):
                raise UserError(
                    f"loss {loss}, gradient norm {norm} at step {step}: stopped before the weights changed; "
                    f"the last checkpoint is {[None, *checkpoints(run)][-1]}; try a lower --muon_lr"
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            metrics.row(step=step, loss=loss, grad_norm=norm, lr=cfg.muon_lr * factor)

            log, save = step % cfg.log_every == 0 or step == steps, step in saves or interrupt.code
            if not (log or save or step in evals):
                continue
            clock.stop()  # what follows is not training
            if log:
                metrics.log(step, loss, cfg.muon_lr * factor, norm)
            if save:
                save_checkpoint(
                    run, model, optimizers, {"step": step, "train_seconds": clock.seconds}
                )
            if interrupt.code:
                metrics.close()
                stop(
                    f"stopped at step {step}, saved; go on with --run {cfg.run} --resume",
                    interrupt.code,
                )
            if step in evals:
                evaluate_now(step)
            clock.start()

    # ---- summary
    last = next(row for row in reversed(read_metrics(run)) if "val_loss" in row)
    return metrics.finish(
        model,
        steps * cfg.batch_tokens,
        val_loss=last["val_loss"],
        val_bpb=last["val_bpb"],
        val_tokens=val_windows[:, 1:].numel(),
        val_sha256=hashlib.sha256(val_windows.numpy()).hexdigest(),
        train_sha256=train.sha256,
        tokenizer_sha256=digest(tokenizer.backend_tokenizer.to_str()),
        evaluation_sha256=evaluation_sha256(),
    )


if __name__ == "__main__":
    run_script(Config, main)
