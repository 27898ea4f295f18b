"""Captions and codes -> sequences of one vocabulary, and what is legal where in them."""

import torch
from torch import Tensor

from common import UserError
from data.text import end_of_text
from model import ModelConfig
from vqvae import VQVAEConfig


class Stream:
    """The one sequence of words and visual words: `[BOS] text <seg_start> codes <seg_end> [EOS]`.

    Ids: the tokenizer's text ids, then <seg_start>, <seg_end>, then the codes. Raises UserError where they do not fit.
    """

    def __init__(self, tokenizer, codes: VQVAEConfig, model: ModelConfig):
        self.tokenizer, self.grid, self.image_tokens, self.seq_len = (
            tokenizer,
            codes.grid,
            codes.grid**2,
            model.seq_len,
        )
        self.n_text = len(tokenizer)
        self.seg_start, self.seg_end, self.first_code = (
            self.n_text,
            self.n_text + 1,
            self.n_text + 2,
        )
        self.vocab_size = self.first_code + codes.codebook_size
        self.text_rows = slice(
            self.seg_start + 1
        )  # of the vocabulary: what may follow in a caption or plain text
        self.code_rows = slice(self.first_code, self.vocab_size)  # and in a picture
        self.eos = end_of_text(tokenizer)
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.eos
        self.caption_tokens = model.seq_len - self.image_tokens - 4
        if self.vocab_size != model.vocab_size:
            raise UserError(
                f"--model.vocab_size {model.vocab_size} does not fit {self.n_text} text entries, two markers and "
                f"the {codes.codebook_size} codes of the VQ-VAE: set it to {self.vocab_size}, or name another "
                "--vqvae"
            )
        if model.cells != self.image_tokens or not 1 <= self.caption_tokens <= 256:
            raise UserError(
                f"--model.cells {model.cells} with --model.seq_len {model.seq_len} does not fit the VQ-VAE's "
                f"{self.grid} x {self.grid} grid: set them to {self.image_tokens} and to "
                f"{self.image_tokens + 4} and the room for a caption (1 to 256 tokens), or name another --vqvae"
            )

    def words(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def prompt(self, caption: str, cut: bool = False) -> list[int]:
        """[BOS] caption <seg_start>. Raises UserError for none or one too long, unless it is to be cut."""
        words = self.words(caption)
        if not caption.strip():
            raise UserError("the prompt is empty: say what to draw")
        if len(words) > self.caption_tokens and not cut:
            raise UserError(
                f"the prompt has {len(words)} tokens, the model takes {self.caption_tokens}: shorten it"
            )
        return [self.bos, *words[: self.caption_tokens], self.seg_start]

    def null(self, prompt: list[int]) -> list[int]:
        """A prompt of the same length that says nothing, for guidance (arXiv 2207.12598)."""
        return [self.bos, *[self.eos] * (len(prompt) - 2), self.seg_start]

    def sequences(self, prompts: list[list[int]], codes: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences (B, seq_len), filled up with [EOS], and the places (B,) of their <seg_start>."""
        tokens = torch.full((len(prompts), self.seq_len), self.eos)
        for row, prompt, picture in zip(tokens, prompts, codes):
            n = len(prompt)
            row[:n] = torch.tensor(prompt)
            row[n : n + self.image_tokens] = picture + self.first_code
            row[n + self.image_tokens] = self.seg_end
        return tokens, torch.tensor([len(prompt) - 1 for prompt in prompts])

    def layout(self, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Row and column (B, length, 2) of each token of sequences with <seg_start> at `starts` (B,), and the cell
        (B, length) whose visual word it predicts, -1 for none.

        Text counts rows and columns up together, as in one dimension; a picture counts them from where the text ended;
        what follows goes on behind it.
        """
        index = torch.arange(length, device=starts.device)
        cells = index - starts[:, None]  # (B, length), 0 at <seg_start>
        past, first = cells - 1, starts[:, None] + 1
        inside = (past >= 0) & (past < self.image_tokens)
        text = torch.where(
            past >= self.image_tokens, index - self.image_tokens + self.grid, index.expand_as(past)
        )
        row = torch.where(inside, first + past // self.grid, text)
        column = torch.where(inside, first + past % self.grid, text)
        return torch.stack((row, column), dim=-1), cells.where(
            (cells >= 0) & (cells < self.image_tokens), -1
        )
