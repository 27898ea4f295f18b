"""Image tokenizer: an image as a grid of codebook indices (VQ-VAE, arXiv 1711.00937), in one file.

The encoder folds every patch of `downsample` x `downsample` pixels into channels, so encoder and
decoder both work at the resolution of the token grid. The first three code dimensions carry each
patch's color past both networks: an untrained model is a palette coder, and training adds detail.
Norms act on the channels of one grid position. Statistics over the whole image would leak into
every token and would differ between a crop and the full image.

Shapes: B batch, S image_size, G side of the token grid, K codebook_size, D code_dim, N vectors,
C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLOR_SCALE = 4.0  # scale of the color dimensions: the nearest code must first be near in color
VARIANCE = 0.25  # of pixels in [-1, 1]: predicting an image's mean color has a loss of about 1


@dataclass
class VQVAEConfig:
    """Architecture of the image tokenizer."""

    image_size: int = 128
    """Side length of the square images, in pixels."""
    downsample: int = 4
    """Side length in pixels of the patch that each image token encodes; 4 turns a 128-pixel image
    into 32 x 32 tokens."""
    codebook_size: int = 1024
    """Number of codes in the codebook, which is the number of distinct image tokens."""
    code_dim: int = 8
    """Dimensions of each code, at least 3; low-dimensional codes are less likely to go unused."""
    width: int = 128
    """Channels of the encoder and of the decoder."""
    n_blocks: int = 3
    """Residual blocks in the encoder, and as many in the decoder."""
    encoder_kernel: int = 1
    """Kernel size of the encoder's convolutions, in grid positions; must be odd. With 1 each token
    depends on its own patch only: slightly less accurate than 3, but easier to predict."""

    def __post_init__(self):
        if self.codebook_size > 65_535:
            raise ValueError(
                f"model.codebook_size is {self.codebook_size}; it must be at most 65535 to fit the "
                "uint16 token cache"
            )
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"model.{name} is {value}; it must be positive")
            limit = {"image_size": 4096, "n_blocks": 1000}.get(name, 65_536)
            if value > limit:  # more would hang or overflow
                raise ValueError(f"model.{name} is {value}; it must be at most {limit}")
        if self.image_size < 11:
            raise ValueError(
                f"model.image_size is {self.image_size}; it must be at least 11, the SSIM window"
            )
        if self.image_size % self.downsample:
            below = self.image_size // self.downsample * self.downsample
            remedy = below if below >= 11 else below + self.downsample
            raise ValueError(
                f"model.image_size {self.image_size} is not divisible by model.downsample "
                f"{self.downsample}; set it to {remedy}"
            )
        if self.code_dim < 3:
            raise ValueError(
                f"model.code_dim is {self.code_dim}; it must be at least 3, one per color channel"
            )
        if self.encoder_kernel % 2 == 0:
            raise ValueError(f"model.encoder_kernel is {self.encoder_kernel}; it must be odd")

    @property
    def grid(self) -> int:
        """Side length of the grid of image tokens."""
        return self.image_size // self.downsample


class Quantizer(nn.Module):
    """Codebook that tracks its vectors with exponential moving averages (arXiv 1711.00937, A.1).

    All buffers are fp32 and receive no gradient: `codes` (K, D), `counts` (K,) the average number
    of vectors per step assigned to each code, `sums` (K, D) the average sum of those vectors.
    """

    def __init__(self, size: int, dim: int, decay: float = 0.99, eps: float = 1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("codes", torch.randn(size, dim))
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the indices (N,) of the codes nearest to vectors (N, D)."""
        exact = "donot_use_mm_for_euclid_dist"  # TF32 matrix products would miss the nearest code
        return torch.cdist(vectors.float(), self.codes, compute_mode=exact).argmin(1)  # (N,)

    def totals(self, vectors: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number (K,) and the sum (K, D) of the vectors (N, D) assigned to each code."""
        ones = torch.ones_like(indices, dtype=torch.float32)  # (N,)
        # bincount would wait for the device to learn the size of its output
        counts = torch.zeros_like(self.counts).index_add_(0, indices, ones)  # (K,)
        return counts, torch.zeros_like(self.sums).index_add_(0, indices, vectors.float())  # (K, D)

    def n_used(self, indices: Tensor) -> Tensor:
        """Return the number of distinct codes, (), in indices (N,)."""
        return torch.zeros_like(self.counts, dtype=torch.bool).index_fill_(0, indices, True).sum()

    @torch.no_grad()
    def kmeans_init(
        self, vectors: Tensor, generator: torch.Generator, per_step: int, rounds: int = 10
    ) -> None:
        """Set the codes to the k-means centroids of vectors (N, D), where N >= K.

        Seeds with k-means++ (Arthur and Vassilvitskii, 2007), then runs `rounds` iterations of
        Lloyd's algorithm. The counts are set as if each training step saw `per_step` vectors.
        """
        N, K = len(vectors), len(self.codes)
        assert N >= K, f"k-means of {K} codes needs at least {K} vectors, not {N}"
        vectors = vectors.float()
        uniform = torch.rand(K, generator=generator).tolist()
        nearest = torch.full((N,), torch.inf, device=vectors.device)  # squared distance to a seed
        seed = int(uniform[0] * N)
        for i in range(K):
            self.codes[i] = vectors[seed]
            nearest = torch.minimum(nearest, (vectors - vectors[seed]).square().sum(1))  # (N,)
            # the next seed is sampled by squared distance to the seeds so far
            cumulative = nearest.double().cumsum(0)  # (N,)
            seed = min(N - 1, int(torch.searchsorted(cumulative, uniform[i] * cumulative[-1])))
        for _ in range(rounds):
            counts, sums = self.totals(vectors, self(vectors))
            self.codes.copy_(  # a code without vectors stays where it is
                torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], self.codes)
            )
        self.counts.copy_(counts.clamp(min=1) * per_step / N)
        self.sums.copy_(self.codes * self.counts[:, None])

    @torch.no_grad()
    def update(self, vectors: Tensor, indices: Tensor) -> None:
        """Move each code toward the mean of the vectors (N, D) with its index in indices (N,).

        Means are sums divided by Laplace-smoothed counts.
        """
        counts, sums = self.totals(vectors, indices)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        n, K = self.counts.sum(), len(self.codes)
        smoothed = (self.counts + self.eps) / (n + K * self.eps) * n  # (K,)
        self.codes.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def revive(self, vectors: Tensor, threshold: float, generator: torch.Generator) -> Tensor:
        """Replace codes whose count is below `threshold` with random vectors of (N, D).

        Returns the number of replaced codes, (). Their counts and sums are reset too: with the old
        sums a code would jump back at the next update. The generator is on the CPU.
        """
        cuda = vectors.is_cuda  # elsewhere a copy that the host does not wait for may lose its data
        # a draw per code, used or not, because waiting for the number of dead codes is slow
        shape = self.counts.shape
        draws = torch.randint(len(vectors), shape, generator=generator, pin_memory=cuda)  # (K,)
        draws = draws.to(vectors.device, non_blocking=cuda)
        dead = self.counts < threshold  # (K,)
        rank = dead.cumsum(0) - 1  # (K,), of a dead code among the dead; -1 is valid, but not used
        chosen = vectors[draws[rank]].float()  # (K, D)
        self.codes.copy_(chosen.where(dead[:, None], self.codes))
        self.sums.copy_((chosen * threshold).where(dead[:, None], self.sums))
        self.counts.masked_fill_(dead, threshold)
        return dead.sum()


class Conv(nn.Conv2d):
    """Size-preserving convolution of stride 1; casts its fp32 weights to the input's dtype."""

    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)


class RMSNorm2d(nn.Module):
    """RMSNorm over the channels of each grid position of (B, C, G, G), with a learned gain."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight.to(x.dtype)


class Block(nn.Module):
    """Pre-activation residual block; it starts as the identity plus a bias."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.norm1, self.conv1 = RMSNorm2d(channels), Conv(channels, channels, kernel)
        self.norm2, self.conv2 = RMSNorm2d(channels), Conv(channels, channels, kernel)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder.

    Activations have dtype `compute_dtype`. In training, weights are fp32; codes always are.
    """

    def __init__(self, config: VQVAEConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        width, kernel, pixels = config.width, config.encoder_kernel, 3 * config.downsample**2
        self.encoder = nn.Sequential(
            Conv(pixels, width, kernel),
            *(Block(width, kernel) for _ in range(config.n_blocks)),
            RMSNorm2d(width),
            Conv(width, config.code_dim, 1),
        )
        self.quantizer = Quantizer(config.codebook_size, config.code_dim)
        self.decoder = nn.Sequential(
            Conv(config.code_dim, width, 3),
            *(Block(width, 3) for _ in range(config.n_blocks)),
            RMSNorm2d(width),
            Conv(width, pixels, 3),
        )
        for last in (self.encoder[-1], self.decoder[-1]):
            nn.init.zeros_(last.weight)  # zero-initialized, so training starts from the palette
            nn.init.zeros_(last.bias)

    def features(self, images: Tensor) -> Tensor:
        """Return the fp32 features (B, D, G, G) to quantize of images (B, 3, S, S) in [-1, 1]."""
        side = self.config.downsample
        patches = F.pixel_unshuffle(images.to(self.compute_dtype), side)  # (B, 3 side^2, G, G)
        z = self.encoder(patches).float()  # (B, D, G, G)
        # (B, 3, G, G), then zero-padded to (B, D, G, G)
        colors = F.interpolate(images.float(), scale_factor=1 / side, mode="bilinear")
        return z + F.pad(COLOR_SCALE * colors, (0, 0, 0, 0, 0, z.shape[1] - 3))

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the quantized features (B, D, G, G) of codes (B, G, G)."""
        return F.embedding(codes, self.quantizer.codes).permute(0, 3, 1, 2)  # (B, D, G, G)

    def render(self, z: Tensor) -> Tensor:
        """Return fp32 images (B, 3, S, S), not clipped, from quantized features (B, D, G, G)."""
        side = self.config.downsample
        x = F.pixel_shuffle(self.decoder(z.to(self.compute_dtype)), side).float()  # (B, 3, S, S)
        return x + F.interpolate(z[:, :3] / COLOR_SCALE, scale_factor=side, mode="bilinear")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reconstruct images (B, 3, S, S) in [-1, 1].

        Returns the reconstruction (B, 3, S, S), the commitment loss, the features as vectors
        (N, D), and their codes (B, G, G). The gradient passes straight through the quantizer.
        """
        z = self.features(images)
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)  # (B G G, D)
        codes = self.quantizer(vectors.detach()).view(len(z), *z.shape[2:])  # (B, G, G)
        quantized = self.lookup(codes)
        commit_loss = F.mse_loss(z, quantized)
        return self.render(z + (quantized - z).detach()), commit_loss, vectors.detach(), codes

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes (B, G, G) of images (B, 3, S, S) in [-1, 1]."""
        z = self.features(images)
        # (B, D, G, G) to vectors (B G G, D) to codes (B G G,) to (B, G, G)
        return self.quantizer(z.permute(0, 2, 3, 1).flatten(0, 2)).view(len(z), *z.shape[2:])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return images (B, 3, S, S) in [-1, 1] from codes (B, G, G)."""
        return self.render(self.lookup(codes)).clamp(-1, 1)
