"""The visual tokenizer: a picture as a grid of words from a codebook (VQ-VAE, arXiv 1711.00937), in one file.

Encoder and decoder work at the resolution of the grid; `downsample` x `downsample` pixels are channels there. The
first three code dimensions carry the cell's colour past both networks, so an untrained model is a palette coder and
training adds to it. Every norm is over the channels of one cell: statistics over the picture would leak into the
words and would differ between a crop and the whole.

Shapes: B batch, S image_size, h rows and columns of the grid, K codebook_size, D code_dim, N vectors.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLOUR_SCALE = (
    4.0  # of the colour dimensions in the code, so that the nearest code is near in colour first
)
VARIANCE = 0.25  # of pixels in [-1, 1]: the reconstruction loss is 1 for a picture's mean colour


@dataclass
class VQVAEConfig:
    """Shape of the visual tokenizer."""

    image_size: int = 128
    """Side of a picture in pixels."""
    downsample: int = 4
    """Pixels a side of a grid cell: 4 makes a 32 x 32 grid of a 128-pixel picture."""
    codebook_size: int = 1024
    """Visual words."""
    code_dim: int = 8
    """Dimensions of a code; few keep all codes in use."""
    width: int = 128
    """Channels of encoder and decoder."""
    n_blocks: int = 3
    """Residual blocks of each."""
    encoder_kernel: int = 1
    """Cells a side that the encoder's convolutions see; with 1 a word tells of its own cell alone, which is a little less
    exact than 3 and easier to predict."""

    def __post_init__(self):
        for name in (
            "image_size",
            "downsample",
            "codebook_size",
            "code_dim",
            "width",
            "n_blocks",
            "encoder_kernel",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be positive")
        if self.image_size % self.downsample:
            raise ValueError(
                f"model.image_size {self.image_size} is not divisible by model.downsample {self.downsample}: "
                f"set it to {self.image_size // self.downsample * self.downsample or self.downsample}"
            )
        if self.code_dim < 3:
            raise ValueError(
                f"model.code_dim is {self.code_dim}: three dimensions carry the colour, give 3 or more"
            )
        if self.codebook_size > 65_535:
            raise ValueError(
                f"model.codebook_size {self.codebook_size} does not fit the uint16 caches: at most 65535"
            )
        if self.encoder_kernel % 2 == 0:
            raise ValueError(
                f"model.encoder_kernel {self.encoder_kernel} has no middle: give an odd number"
            )

    @property
    def grid(self) -> int:
        """Rows and columns of the grid."""
        return self.image_size // self.downsample


class Quantizer(nn.Module):
    """A codebook that follows the vectors it stands for, by exponential moving averages (arXiv 1711.00937, A.1).

    Everything here is fp32 and outside the gradient. Per code: `codes` (K, D) itself, `counts` (K,) how many vectors
    a step it stands for, `sums` (K, D) what they add up to.
    """

    def __init__(self, size: int, dim: int, decay: float = 0.99, eps: float = 1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("codes", torch.randn(size, dim))
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, vectors: Tensor) -> Tensor:
        """Indices (N,) of the nearest codes of vectors (N, D). By differences: TF32 products would miss the nearest."""
        distances = torch.cdist(
            vectors.float(), self.codes, compute_mode="donot_use_mm_for_euclid_dist"
        )  # (N, K)
        return distances.argmin(1)

    def totals(self, vectors: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How many of vectors (N, D) each code got, (K,), and their sum, (K, D)."""
        counts = torch.bincount(indices, minlength=len(self.codes)).float()
        return counts, torch.zeros_like(self.sums).index_add_(0, indices, vectors.float())

    @torch.no_grad()
    def start(
        self, vectors: Tensor, generator: torch.Generator, per_step: int, rounds: int = 10
    ) -> None:
        """Make the codes the k-means of vectors (N, D), N >= K: k-means++ seeds, then Lloyd's algorithm.

        The counts become those that per_step such vectors a step would lead to.
        """
        n, vectors = len(vectors), vectors.float()
        assert n >= len(self.codes), f"{n} vectors for {len(self.codes)} codes"
        draws = torch.rand(len(self.codes), generator=generator).tolist()
        nearest = torch.full((n,), torch.inf, device=vectors.device)
        pick = int(draws[0] * n)
        for i in range(len(self.codes)):
            self.codes[i] = vectors[pick]
            nearest = torch.minimum(nearest, (vectors - vectors[pick]).square().sum(1))
            mass = nearest.double().cumsum(
                0
            )  # the next seed: in proportion to the squared distance from those there are
            pick = min(n - 1, int(torch.searchsorted(mass, draws[i] * mass[-1])))
        for _ in range(rounds):
            counts, sums = self.totals(vectors, self(vectors))
            self.codes.copy_(
                torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], self.codes)
            )
        self.counts.copy_(counts.clamp(min=1) * per_step / n)
        self.sums.copy_(self.codes * self.counts[:, None])

    @torch.no_grad()
    def update(self, vectors: Tensor, indices: Tensor) -> None:
        """Move each code towards the mean of the vectors (N, D) that it is nearest to; counts are Laplace-smoothed."""
        counts, sums = self.totals(vectors, indices)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        n, k = self.counts.sum(), len(self.codes)
        smoothed = (self.counts + self.eps) / (n + k * self.eps) * n
        self.codes.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def revive(self, vectors: Tensor, threshold: float, generator: torch.Generator) -> int:
        """Put codes that stand for fewer than `threshold` vectors a step on random ones of vectors (N, D); how many.

        All their statistics start anew: with the old sums a code would jump back at the next update.
        """
        dead = (self.counts < threshold).nonzero()[:, 0]
        picks = torch.randint(len(vectors), (len(dead),), generator=generator).to(vectors.device)
        self.codes[dead] = vectors[picks].float()
        self.counts[dead] = threshold
        self.sums[dead] = self.codes[dead] * threshold
        return len(dead)


class Conv(nn.Conv2d):
    """A convolution of stride 1 that keeps the size and whose fp32 weights are cast to the input's dtype."""

    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)


class CellNorm(nn.Module):
    """Root-mean-square norm over the channels of each cell of (B, C, h, h), with a learned gain."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight.to(x.dtype)


class Block(nn.Module):
    """Pre-activation residual block; it starts as the identity."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.norm1, self.conv1 = CellNorm(channels), Conv(channels, channels, kernel)
        self.norm2, self.conv2 = CellNorm(channels), Conv(channels, channels, kernel)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder. `compute_dtype` is the dtype of activations; weights and codes stay fp32."""

    def __init__(self, config: VQVAEConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        pixels, width = 3 * config.downsample**2, config.width
        blocks = lambda kernel: [Block(width, kernel) for _ in range(config.n_blocks)]  # noqa: E731
        near = config.encoder_kernel
        self.encoder = nn.Sequential(
            Conv(pixels, width, near),
            *blocks(near),
            CellNorm(width),
            Conv(width, config.code_dim, 1),
        )
        self.quantizer = Quantizer(config.codebook_size, config.code_dim)
        self.decoder = nn.Sequential(
            Conv(config.code_dim, width, 3), *blocks(3), CellNorm(width), Conv(width, pixels, 3)
        )
        for last in (
            self.encoder[-1],
            self.decoder[-1],
        ):  # what the colours miss is learned, from nothing
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def features(self, pictures: Tensor) -> Tensor:
        """What is quantized: (B, D, h, h) in fp32 for pictures (B, 3, S, S) in [-1, 1]."""
        side = self.config.downsample
        x = F.pixel_unshuffle(pictures.to(self.compute_dtype), side)  # (B, 3 side^2, h, h)
        z = self.encoder(x).float()
        colours = F.interpolate(
            pictures.float(), scale_factor=1 / side, mode="bilinear"
        )  # (B, 3, h, h)
        return z + F.pad(COLOUR_SCALE * colours, (0, 0, 0, 0, 0, z.shape[1] - 3))

    def render(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in fp32, not clipped, from quantized features (B, D, h, h)."""
        side = self.config.downsample
        detail = F.pixel_shuffle(
            self.decoder(z.to(self.compute_dtype)), side
        ).float()  # (B, 3, S, S)
        return detail + F.interpolate(z[:, :3] / COLOUR_SCALE, scale_factor=side, mode="bilinear")

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reconstruction (B, 3, S, S), commitment loss, features as vectors (N, D), and their codes (B, h, h).

        The gradient passes straight through the quantizer to the encoder.
        """
        z = self.features(pictures)
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)  # (B h h, D)
        codes = self.quantizer(vectors.detach()).view(len(z), *z.shape[2:])
        quantized = self.lookup(codes)
        commit = F.mse_loss(z, quantized)
        return self.render(z + (quantized - z).detach()), commit, vectors.detach(), codes

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, h, h) as quantized features (B, D, h, h)."""
        return F.embedding(codes, self.quantizer.codes).permute(0, 3, 1, 2)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Codes (B, h, h) of pictures (B, 3, S, S) in [-1, 1]."""
        z = self.features(pictures)
        return self.quantizer(z.permute(0, 2, 3, 1).flatten(0, 2)).view(len(z), *z.shape[2:])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] from codes (B, h, h)."""
        return self.render(self.lookup(codes)).clamp(-1, 1)
