"""Text and images in one sequence: its format, its position ids and its losses.

A sequence is `[BOS] text <seg_start> image tokens <seg_end> [EOS]`. The vocabulary has the
tokenizer's entries first, then <seg_start>, <seg_end> and the codes of the VQ-VAE.

Shapes: B batch, T positions, N image tokens per image, C d_model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import UserError
from common.device import pinned, to_device
from data.text import encode, end_of_text
from model import Llama, ModelConfig
from vqvae import VQVAEConfig


class ImageTextFormat:
    """Builds sequences, prompts and position ids for one tokenizer, VQ-VAE and model.

    Raises UserError if the three do not fit together.
    """

    def __init__(self, tokenizer, codes: VQVAEConfig, model: ModelConfig):
        self.tokenizer, self.grid, self.seq_len = tokenizer, codes.grid, model.seq_len
        self.n_image_tokens = codes.grid**2
        self.n_text = len(tokenizer)
        self.seg_start, self.seg_end = self.n_text, self.n_text + 1
        self.first_code = self.n_text + 2
        self.vocab_size = self.first_code + codes.codebook_size
        self.text_slice = slice(self.seg_start + 1)  # what may follow in text: text or <seg_start>
        self.code_slice = slice(self.first_code, self.vocab_size)  # what may follow in an image
        self.eos = end_of_text(tokenizer)
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.eos
        self.caption_tokens = model.seq_len - self.n_image_tokens - 4
        if self.vocab_size != model.vocab_size:
            raise UserError(
                f"--model.vocab_size is {model.vocab_size}, but {self.n_text} text tokens, two "
                f"special tokens and the {codes.codebook_size} codes of the VQ-VAE need "
                f"{self.vocab_size}; set it to {self.vocab_size} or choose another --vqvae"
            )
        if model.n_image_positions != self.n_image_tokens:
            raise UserError(
                f"--model.n_image_positions is {model.n_image_positions}, but the VQ-VAE's "
                f"grid is {self.grid} x {self.grid}; set it to {self.n_image_tokens}"
            )
        if not 1 <= self.caption_tokens <= 256:
            raise UserError(
                f"--model.seq_len is {model.seq_len}; set it to {self.n_image_tokens + 4} plus the "
                "length of the longest caption (1 to 256 tokens)"
            )

    def text_tokens(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are encoded as ordinary text."""
        return encode(self.tokenizer, [text])[0]

    def prompt(self, caption: str, truncate: bool = False) -> list[int]:
        """[BOS] caption <seg_start>. Raises UserError if it is empty, or too long to fit."""
        tokens = self.text_tokens(caption)
        if not caption.strip():
            raise UserError("the prompt is empty; describe an image")
        if len(tokens) > self.caption_tokens and not truncate:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, but the model takes at most "
                f"{self.caption_tokens}; shorten it"
            )
        return [self.bos, *tokens[: self.caption_tokens], self.seg_start]

    def uncond(self, prompt: list[int]) -> list[int]:
        """Empty prompt of the same length, for classifier-free guidance (arXiv 2207.12598)."""
        return [self.bos, *[self.eos] * (len(prompt) - 2), self.seg_start]

    def sequences(self, prompts: list[list[int]], codes: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences (B, seq_len), padded with [EOS], and the position (B,) of each <seg_start>.

        codes are image tokens (B, N), counted from 0. The results are on their device, and with a
        GPU the host does not wait for it.
        """
        B, N, device = len(prompts), self.n_image_tokens, codes.device
        assert codes.shape == (B, N), f"codes {tuple(codes.shape)} for {B} prompts of {N} codes"
        longest = self.caption_tokens + 2
        padded = [prompt + [self.eos] * (longest - len(prompt)) for prompt in prompts]
        text = to_device(pinned(torch.tensor(padded), device), device)  # (B, longest)
        starts = (text == self.seg_start).int().argmax(1)  # (B,)
        tokens = F.pad(text, (0, self.seq_len - longest), value=self.eos)  # (B, seq_len)
        places = starts[:, None] + torch.arange(1, N + 1, device=device)  # (B, N)
        tokens.scatter_(1, places, codes.long() + self.first_code)
        tokens.scatter_(1, starts[:, None] + N + 1, self.seg_end)
        return tokens, starts

    def position_ids(self, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Position ids (B, length, 2) and target positions (B, length) of sequences.

        Position ids are row and column. In text both count up together, which is the
        one-dimensional case; an image counts them from where its caption ended. Target positions
        say which image token a position predicts, -1 for none. `starts` (B,) are the positions of
        <seg_start>.
        """
        index = torch.arange(length, device=starts.device)
        target = index - starts[:, None]  # (B, length), 0 at <seg_start>
        offset, first = target - 1, starts[:, None] + 1
        inside = (offset >= 0) & (offset < self.n_image_tokens)
        after = index - self.n_image_tokens + self.grid
        text = torch.where(offset >= self.n_image_tokens, after, index.expand_as(offset))
        row = torch.where(inside, first + offset // self.grid, text)
        column = torch.where(inside, first + offset % self.grid, text)
        predicts = (target >= 0) & (target < self.n_image_tokens)
        return torch.stack((row, column), dim=-1), target.where(predicts, -1)


# ---- losses
def image_hidden(
    model: Llama, fmt: ImageTextFormat, tokens: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of sequences (B, T), those that predict image tokens, and their targets.

    Returns (B, T, C), (B, N, C) and codes (B, N).
    """
    hidden = model.hidden(tokens, None, *fmt.position_ids(starts, tokens.shape[1]))
    steps = torch.arange(fmt.n_image_tokens, device=tokens.device)
    places = starts[:, None] + steps  # (B, N)
    index = places[..., None].expand(-1, -1, hidden.shape[-1])  # (B, N, C)
    return hidden, hidden.gather(1, index), tokens.gather(1, places + 1) - fmt.first_code


def image_text_losses(
    model: Llama,
    fmt: ImageTextFormat,
    tokens: Tensor,
    starts: Tensor,
    has_caption: Tensor,
    n_scored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean losses () of image tokens and captions over sequences (B, T), in nats per token.

    What may follow is known at every position: image tokens are scored among image tokens,
    caption tokens among text tokens and <seg_start>; <seg_end> and [EOS] are certain. Captions
    with has_caption (B,) false were dropped and are not scored.

    If the sequences are part of a batch, n_scored () is the mean number of scored caption tokens
    per sequence of that batch, so that the mean over its parts does not depend on the division.
    """
    hidden, before, codes = image_hidden(model, fmt, tokens, starts)
    image = model.loss(before, codes, fmt.code_slice)
    L = fmt.caption_tokens + 1
    in_caption = torch.arange(L, device=tokens.device) < starts[:, None]  # (B, L)
    scored = in_caption & has_caption[:, None]  # (B, L)
    targets = tokens[:, 1 : L + 1].where(scored, -100)  # (B, L)
    logits = model.head(hidden[:, :L], fmt.text_slice)  # (B, L, n_text + 1)
    text = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    if n_scored is None:
        n_scored = scored.sum() / len(tokens)
    return image, text / (n_scored * len(tokens)).clamp(min=1e-6)


def plain_text_loss(model: Llama, fmt: ImageTextFormat, windows: Tensor) -> Tensor:
    """Mean loss () in nats per token of plain text, windows (B, T + 1)."""
    return model.loss(model.hidden(windows[:, :-1]), windows[:, 1:], fmt.text_slice)
