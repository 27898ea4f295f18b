"""Train a transformer on captions and pictures in one stream of words and visual words.

    python train_multimodal.py --config configs/multimodal_cifar10.yaml --vqvae NAME      # 40M parameters, one GPU
    python train_multimodal.py --config configs/multimodal_demo.yaml --vqvae NAME         # minutes on a laptop
    python train_multimodal.py --run NAME --resume                                        # go on where NAME stopped

NAME after --vqvae is a run of train_vqvae.py. A sequence is `[BOS] caption <seg_start> visual words <seg_end> [EOS]`.
"""

import json
import math
import shutil
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

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
    find_run,
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
from data.images import (
    CodeCache,
    ImageConfig,
    load_pictures,
    load_pixels,
    picks,
    scaled,
    sheet,
    spread,
    to_uint8,
)
from data.order import batch_indices, prefetch
from data.stream import Stream
from data.text import DataConfig, Tokens, file_sha256, prepare
from data.tokenizer import load_tokenizer
from generate import draw, load_vqvae
from metrics import Metrics, evaluated, read_metrics
from model import Llama, ModelConfig
from muon import build_optimizers

TOKENIZER_CAPTIONS = 20_000  # captions that a bpe-N tokenizer is trained on


@dataclass
class CaptionConfig(ImageConfig):
    """Pictures, captions and their tokenizer."""

    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"
    """Hub name or local folder of a tokenizer, or bpe-N: a byte-level BPE of N entries trained on the captions."""


@dataclass
class Config(RunConfig):
    """Settings of a run. `auto` is filled in and printed at the start."""

    vqvae: str = ""
    """Run of train_vqvae.py that turns pictures into visual words; the new run keeps a copy of it."""
    init_from: str = ""
    """Run of train_llm.py of the same shape and tokenizer whose weights to start from; empty: from scratch."""
    sequences: Count = Count("1M")
    """Budget: sequences to train on."""
    batch_sequences: int = 128
    """Sequences a step."""
    text_mix: float = 0.0
    """Share of the sequences that are plain text, so that the model goes on writing."""
    text_source: str | dict[str, float] = field(default_factory=lambda: DataConfig().source)
    """Where that text comes from, as train_llm.py's --data.source."""
    null_prob: float = 0.1
    """Share of captions put out of sight, for guidance."""
    text_weight: float = 0.1
    """Weight of the captions' loss beside the pictures'."""
    muon_lr: float = 0.02
    """Muon's peak learning rate, for the matrices of the blocks."""
    muon_wd: float | Literal["auto"] = "auto"
    """Muon's weight decay; auto: lr * wd * steps is 4, but lr * wd at most 0.02."""
    adamw_lr: float = 0.005
    """AdamW's peak learning rate, for embeddings and norms."""
    adamw_beta2: float = 0.98
    """Decay of AdamW's second moment."""
    warmup_frac: float = 0.02
    """Share of the budget over which the learning rate rises."""
    cooldown_frac: float = 0.6
    """Share of the budget over which it falls at the end."""
    lr_floor: float = 0.05
    """What it falls to, as a share of the peak."""
    momentum_warmup_frac: float | Literal["auto"] = "auto"
    """Share of the budget over which Muon's momentum rises from 0.85 to 0.95; auto: 0.15, at most 300 steps."""
    eval_every: float = 0.1
    """Share of the budget between evaluations; 0 evaluates at the end only."""
    eval_sequences: int = 500
    """Validation pictures of an evaluation, spread evenly over those there are."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts drawn at every evaluation, with the same seeds; empty: captions of validation pictures."""
    sample_n: int = 16
    """Pictures drawn then; 0: none."""
    guidance: float = 2.0
    """How far pictures follow the prompt: in training, and where generate.py is not told otherwise."""
    temperature: float = 1.0
    """Temperature of pictures, likewise."""
    top_p: float = 1.0
    """Their likeliest visual words that together reach this probability, likewise."""
    data: CaptionConfig = field(default_factory=CaptionConfig)
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            vocab_size=50_178,
            d_model=512,
            n_layers=8,
            n_heads=8,
            n_kv_heads=4,
            d_ff=1024,
            seq_len=1060,
            cells=1024,
        )
    )


def resolve_recipe(cfg: Config) -> tuple[int, int]:
    """Fill in what the budget decides; the number of steps and the rows of plain text in each. Raises UserError."""
    check_positive(cfg, "sequences", "batch_sequences", "muon_lr", "adamw_lr", "eval_sequences")
    check_not_negative(cfg, "seed", "text_weight", "sample_n", "guidance", "temperature")
    check_shares(
        cfg,
        "top_p",
        "text_mix",
        "null_prob",
        "adamw_beta2",
        "warmup_frac",
        "cooldown_frac",
        "lr_floor",
        "eval_every",
        "save_every",
    )
    steps, text_rows = (
        cfg.sequences // cfg.batch_sequences,
        round(cfg.text_mix * cfg.batch_sequences),
    )
    if steps < 1:
        raise UserError(
            f"--sequences {cfg.sequences} is less than one step of --batch_sequences {cfg.batch_sequences}"
        )
    if cfg.text_mix and not 0 < text_rows < cfg.batch_sequences:
        raise UserError(
            f"--text_mix {cfg.text_mix} makes {text_rows} of {cfg.batch_sequences} sequences text: it must be some"
        )
    if cfg.model.affixes:
        raise UserError(
            f"--model.affixes {cfg.model.affixes}: visual words have no spelling; leave it at 0"
        )
    if cfg.muon_wd == "auto":
        cfg.muon_wd = min(4 / steps, 0.02) / cfg.muon_lr
    if cfg.momentum_warmup_frac == "auto":
        cfg.momentum_warmup_frac = min(0.15, 300 / steps)
    if cfg.log_every == "auto":
        cfg.log_every = max(1, steps // 50)
    check_not_negative(cfg, "muon_wd")
    check_positive(cfg, "log_every")
    return steps, text_rows


# ------------------------------------------------------------------------------------------------------------ loss
def picture_hidden(
    model: Llama, stream: Stream, tokens: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For sequences (B, T): hidden states (B, T, C), those that predict visual words (B, image_tokens, C), their codes."""
    hidden = model.hidden(tokens, layout=stream.layout(starts, tokens.shape[1]))
    places = starts[:, None] + torch.arange(
        stream.image_tokens, device=tokens.device
    )  # (B, image_tokens)
    before = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    return hidden, before, tokens.gather(1, places + 1) - stream.first_code


def picture_losses(
    model: Llama, stream: Stream, tokens: Tensor, starts: Tensor, told: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean losses, in nats a token, of the visual words and of the captions of sequences (B, T).

    At every position it is known what may follow: visual words are scored among visual words alone, words of a caption
    among words and <seg_start>; <seg_end> and [EOS] are certain. Captions where `told` (B,) is false are not scored.
    """
    hidden, before, codes = picture_hidden(model, stream, tokens, starts)
    image = model.loss(before, codes, stream.code_rows)
    L = stream.caption_tokens + 1
    spoken = (torch.arange(L, device=tokens.device) < starts[:, None]) & told[:, None]  # (B, L)
    words = tokens[:, 1 : L + 1].where(spoken, -100)
    logits = model.head(hidden[:, :L], stream.text_rows)  # (B, L, words and <seg_start>)
    text = F.cross_entropy(
        logits.flatten(0, 1), words.flatten(), ignore_index=-100, reduction="sum"
    )
    return image, text / spoken.sum().clamp(min=1)


def text_loss(model: Llama, stream: Stream, windows: Tensor) -> Tensor:
    """Mean loss in nats per token of plain text, windows (B, T + 1)."""
    return model.loss(model.hidden(windows[:, :-1]), windows[:, 1:], stream.text_rows)


@torch.no_grad()
def evaluate(
    losses, tokens: Tensor, starts: Tensor, micro_batch: int, device: torch.device
) -> tuple[float, float]:
    """Mean losses of visual words and captions over sequences (N, T)."""
    total = torch.zeros(2)
    for part, start in zip(tokens.split(micro_batch), starts.split(micro_batch)):
        told = torch.ones(len(part), dtype=torch.bool, device=device)
        total += (
            torch.stack(losses(part.to(device), start.to(device), told)).cpu()
            * len(part)
            / len(tokens)
        )
    return total[0].item(), total[1].item()


def start_from(model: Llama, name: str, tokenizer) -> None:
    """Give the model the weights of a language-model run, all but the rows of visual words. Raises UserError."""
    run, folder, config = find_run(name)
    if "tokens" not in config:
        raise UserError(f"--init_from {name} is no run of train_llm.py")
    shape, wanted = ModelConfig(**config["model"]), model.config
    for key in (
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "d_ff",
        "rope_theta",
        "value_shortcut",
        "canon",
    ):
        if getattr(shape, key) != getattr(wanted, key):
            raise UserError(
                f"--init_from {name} has model.{key} {getattr(shape, key)}, this run {getattr(wanted, key)}: "
                f"set --model.{key} {getattr(shape, key)}"
            )
    theirs = transformers.AutoTokenizer.from_pretrained(
        run / "tokenizer"
    ).backend_tokenizer.to_str()
    if theirs != tokenizer.backend_tokenizer.to_str():
        raise UserError(
            f"--init_from {name} has another tokenizer: set --data.tokenizer {run / 'tokenizer'}"
        )
    source = Llama(shape)
    load_checkpoint(folder, source)
    weights = source.fold().state_dict()
    words = min(len(tokenizer), shape.vocab_size)
    weights["cells.weight"] = model.cells.weight.detach()
    weights["embed.weight"] = torch.cat(
        [weights["embed.weight"][:words], model.embed.weight.detach()[words:]]
    )
    model.load_state_dict(weights)


def main(cfg: Config) -> dict:
    """Train as cfg says and return the summary. Raises UserError."""
    # ---- set-up
    steps, text_rows = resolve_recipe(cfg)
    device = resolve_device(cfg)
    if cfg.micro_batch == "auto":
        cfg.micro_batch = max(1, min(cfg.batch_sequences, int(fitting_sequences(cfg, device))))
    check_positive(cfg, "micro_batch")
    run = check_run(cfg)
    if (run / "summary.json").exists():
        print(f"{run} is finished; delete the folder to train it anew")
        return json.loads((run / "summary.json").read_text())
    if not cfg.vqvae:
        raise UserError(
            "--vqvae is missing: name a run of train_vqvae.py, which makes visual words of pictures"
        )
    copied = run / "vqvae"
    vqvae_run, vqvae_folder, _ = find_run(str(copied) if copied.exists() else cfg.vqvae)
    vqvae = load_vqvae(str(vqvae_folder), device, getattr(torch, cfg.dtype))
    size, rows = vqvae.config.image_size, cfg.batch_sequences - text_rows

    # ---- data
    val = load_pictures(cfg.data, "val", size, captions=True)
    train = load_pictures(cfg.data, "train", size, captions=True)
    tokenizer = load_tokenizer(
        cfg.data,
        f"captions of {train.id}",
        lambda: (train.caption(i, 0) for i in spread(train, TOKENIZER_CAPTIONS)),
    )
    stream = Stream(tokenizer, vqvae.config, cfg.model)
    vqvae_sha256 = file_sha256(vqvae_folder / "model.safetensors")

    def caching(data, n_draws: int, augment: bool) -> CodeCache:
        key = {"weights": vqvae_sha256, "pictures": data.id, "augment": augment}
        return CodeCache(cfg.data.cache, key, len(data) * n_draws, stream.image_tokens)

    def encode(data, indices: list[int], draws: list[int] | None) -> Tensor:
        pixels = load_pixels(data, indices, draws)
        return torch.cat(
            [vqvae.encode(scaled(part, size, device)).flatten(1) for part in pixels.split(32)]
        )

    passes = -(-steps * rows // len(train))
    cache = caching(train, passes, cfg.data.augment) if device.type == "cpu" else None
    prompts = cfg.sample_prompts or [val.caption(i, 0) for i in spread(val, cfg.sample_n)]
    prompts = [prompts[i % len(prompts)] for i in range(cfg.sample_n)]
    for prompt in cfg.sample_prompts:
        stream.prompt(
            prompt
        )  # raises now what would otherwise stop the run at its first evaluation
    checked = spread(val, cfg.eval_sequences)
    val_codes = caching(val, 1, False).get(checked, lambda missing: encode(val, missing, None))
    captions = [val.caption(i, 0) for i in checked]
    val_tokens, val_starts = stream.sequences(
        [stream.prompt(caption, cut=True) for caption in captions], val_codes
    )
    n_cut = sum(len(stream.words(caption)) > stream.caption_tokens for caption in captions)
    text = None
    if text_rows:
        texts = DataConfig(
            source=cfg.text_source, tokenizer=cfg.data.tokenizer, cache=cfg.data.cache
        )
        needed = steps * text_rows * cfg.model.seq_len + 1
        text = Tokens(prepare(texts, "train", needed, tokenizer), limit=needed)
        if len(text) <= cfg.model.seq_len:
            raise UserError(
                f"--text_source {cfg.text_source} has {len(text)} tokens, fewer than one sequence of "
                f"{cfg.model.seq_len}: give more text"
            )

    def read(step: int):
        indices, draws = picks(step, rows, len(train), cfg.seed)
        prompts = [stream.prompt(train.caption(i, d), cut=True) for i, d in zip(indices, draws)]
        told = np.random.default_rng((cfg.seed, step)).random(rows) >= cfg.null_prob
        prompts = [prompt if said else stream.null(prompt) for prompt, said in zip(prompts, told)]
        draws = draws if cfg.data.augment else None
        if cache:
            wanted = [d * len(train) + i for i, d in zip(indices, draws or [0] * rows)]
            content = cache.get(
                wanted,
                lambda missing: encode(
                    train,
                    [row % len(train) for row in missing],
                    draws and [row // len(train) for row in missing],
                ),
            )
        else:
            content = load_pixels(train, indices, draws)
        windows = None
        if text:
            n_windows = (len(text) - 1) // cfg.model.seq_len
            windows = text.windows(
                batch_indices(step, text_rows, n_windows, cfg.seed), cfg.model.seq_len
            ).to(device)
        return prompts, torch.from_numpy(told), content, windows

    # ---- model
    model = Llama(cfg.model, compute_dtype=getattr(torch, cfg.dtype))
    model.init_weights(torch.Generator().manual_seed(cfg.seed))
    if cfg.init_from:
        start_from(model, cfg.init_from, tokenizer)
    model.to(device)
    open_run(cfg, run)
    tokenizer.save_pretrained(run / "tokenizer")
    if not copied.exists():
        tmp = run / "vqvae.tmp"
        shutil.copytree(
            vqvae_folder,
            tmp / "checkpoints" / vqvae_folder.name,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("optimizer.pt"),
        )
        shutil.copy(vqvae_run / "config.yaml", tmp)
        tmp.rename(copied)

    def losses(tokens: Tensor, starts: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        return picture_losses(model, stream, tokens, starts, told)

    def plain(windows: Tensor) -> Tensor:
        return text_loss(model, stream, windows)

    if cfg.compile:
        losses, plain = (torch.compile(f, dynamic=False, fullgraph=True) for f in (losses, plain))

    def backward(tokens: Tensor, starts: Tensor, told: Tensor, windows: Tensor | None) -> Tensor:
        """Accumulate the gradient; the mean losses (3,) of visual words, captions and plain text."""
        found = torch.zeros(3, device=device)
        for part in zip(*(t.split(cfg.micro_batch) for t in (tokens, starts, told))):
            image, caption = losses(*part)
            share = len(part[0]) / len(tokens)
            ((image + cfg.text_weight * caption) * share * rows / cfg.batch_sequences).backward()
            found[:2] += torch.stack([image, caption]).detach() * share
        for part in windows.split(cfg.micro_batch) if windows is not None else ():
            loss, share = plain(part), len(part) / len(windows)
            (loss * share * text_rows / cfg.batch_sequences).backward()
            found[2] += loss.detach() * share
        return found

    # ---- optimizers
    muon, adamw = optimizers = build_optimizers(
        model,
        muon_lr=cfg.muon_lr,
        muon_wd=cfg.muon_wd,
        adamw_lr=cfg.adamw_lr,
        adamw_wd=0.0,
        adamw_beta2=cfg.adamw_beta2,
        dtype=model.compute_dtype,
        compile=cfg.compile,
    )

    # ---- resume
    state = {"step": 0, "train_seconds": 0.0}
    if saved := checkpoints(run):
        state = load_checkpoint(saved[-1], model, optimizers)
    first, clock = state["step"], Clock(device, state["train_seconds"])
    block_weights = sum(p.numel() for p in model.blocks.parameters())
    print(
        f"run {run}, {f'resumed at step {first}' if first else f'from {cfg.init_from}' if cfg.init_from else 'from scratch'}\n"
        f"device {device_name(device)}, {cfg.dtype}, {'compiled' if cfg.compile else 'not compiled'}\n"
        f"model {model.n_params():,} parameters, {block_weights:,} in blocks; {stream.n_text:,} words, "
        f"{vqvae.config.codebook_size:,} visual words\n"
        f"data {len(train):,} pictures, {steps * rows / len(train):.2f} passes; validation on {len(val_tokens)} of {len(val):,}; "
        f"codes {'kept in ' + str(cache.path) if cache else 'made on the fly'}\n"
        f"captions of up to {stream.caption_tokens} tokens, longer ones are cut: {n_cut} of those for validation\n"
        f"steps {steps} of {rows} pictures of {stream.image_tokens} visual words"
        + (f" and {text_rows} texts" if text_rows else "")
        + f", {cfg.micro_batch} at a time\n"
        f"recipe muon_lr {cfg.muon_lr:.4g}, muon_wd {cfg.muon_wd:.4g}, adamw_lr {cfg.adamw_lr:.4g}",
        flush=True,
    )

    # ---- warm-up
    if cfg.compile:
        before = deepcopy([model.state_dict(), *(o.state_dict() for o in optimizers)])
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.long, device=device)  # noqa: E731
        for _ in range(2):
            backward(
                zeros(rows, cfg.model.seq_len) + stream.first_code,
                zeros(rows) + 1,
                zeros(rows) > 0,
                zeros(text_rows, cfg.model.seq_len + 1) if text_rows else None,
            )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for part, state_dict in zip([model, *optimizers], before):
            part.load_state_dict(state_dict)

    # ---- loop
    per_token = 6 * (block_weights + vqvae.config.codebook_size * cfg.model.d_model)
    per_token += 6 * cfg.model.n_layers * cfg.model.d_model * cfg.model.seq_len
    metrics = Metrics(
        run,
        cfg,
        first,
        steps,
        clock=clock,
        unit="sequences",
        per_step=cfg.batch_sequences,
        flops=per_token * cfg.model.seq_len * cfg.batch_sequences,
    )

    def evaluate_now(step: int) -> None:
        image, caption = evaluate(losses, val_tokens, val_starts, cfg.micro_batch, device)
        if image < min(
            (row["val_loss"] for row in read_metrics(run) if "val_loss" in row), default=math.inf
        ):
            save_checkpoint(run, model, [], {"step": step, "val_loss": image}, place="best", keep=1)
        metrics.row(step=step, val_loss=image, val_text_loss=caption)
        metrics.line(
            f"val {step}/{steps} | visual words {image:.4f} nats, {image / math.log(2):.3f} bits | captions {caption:.4f}"
        )
        if prompts:
            pictures = to_uint8(
                draw(
                    model,
                    vqvae,
                    stream,
                    prompts,
                    [cfg.seed + i for i in range(len(prompts))],
                    guidance=cfg.guidance,
                    temperature=cfg.temperature,
                    top_p=cfg.top_p,
                    cut=True,
                )
            )
            sheet(pictures, min(8, len(prompts)), titles=prompts).save(
                run / "samples" / f"{step:07d}.png"
            )

    evals, saves = milestones(steps, cfg.eval_every), milestones(steps, cfg.save_every)
    if first in evals and not evaluated(run, first):
        evaluate_now(first)
    with Interrupt() as interrupt:
        clock.start()
        for step, (asked, told, content, windows) in enumerate(
            prefetch(read, first, steps, device), start=first + 1
        ):
            factor = trapezoid(step / steps, cfg.warmup_frac, cfg.cooldown_frac, cfg.lr_floor)
            for group in (*muon.param_groups, *adamw.param_groups):
                group["lr"] = group["peak_lr"] * factor
            for group in muon.param_groups:
                group["momentum"] = ramp(step / steps, 0.85, 0.95, cfg.momentum_warmup_frac)
            codes = (
                content if cache else vqvae.encode(scaled(content, size, device)).flatten(1).cpu()
            )
            tokens, starts = stream.sequences(asked, codes)
            found = backward(tokens.to(device), starts.to(device), told.to(device), windows)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            loss, caption, written, norm = torch.cat([found, norm[None]]).tolist()
            if not math.isfinite(loss + caption + written + norm):
                raise UserError(
                    f"loss {loss}, gradient norm {norm} at step {step}: stopped before the weights changed; "
                    f"the last checkpoint is {[None, *checkpoints(run)][-1]}; try a lower --muon_lr"
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            extra = {"plain_text_loss": written} if text_rows else {}
            metrics.row(
                step=step,
                loss=loss,
                text_loss=caption,
                **extra,
                grad_norm=norm,
                lr=cfg.muon_lr * factor,
            )

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
    rows_seen = [row for row in read_metrics(run) if "val_loss" in row]
    best = min(rows_seen, key=lambda row: row["val_loss"])
    return metrics.finish(
        model,
        steps * cfg.batch_sequences * cfg.model.seq_len,
        val_loss=best["val_loss"],
        val_text_loss=best["val_text_loss"],
        best_step=best["step"],
        val_last=rows_seen[-1]["val_loss"],
        bits_per_visual_word=best["val_loss"] / math.log(2),
        vqvae_sha256=vqvae_sha256,
    )


if __name__ == "__main__":
    run_script(Config, main)
