import math

import pytest
import torch
import torch.nn.functional as F
from helpers import noisy
from scipy.ndimage import gaussian_filter

from image_metrics import (
    causal_neighbors,
    palette_psnr,
    probe_nats,
    psnr,
    reconstruction_metrics,
    ssim,
)
from vqvae import VARIANCE, VQVAE, VQVAEConfig

GRAY = torch.zeros(1, 3, 16, 16)
LEVEL = 2 / 255  # one of 256 levels in [-1, 1]
CPU = torch.device("cpu")
SMALL = VQVAEConfig(image_size=32, downsample=4, codebook_size=16, width=8, n_blocks=2)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def random_images(n: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size) * 2 - 1


# ---- PSNR
def test_psnr_of_a_known_difference():
    expected = 10 * math.log10(255**2 / 10**2)
    assert psnr(GRAY, GRAY + 10 * LEVEL).item() == pytest.approx(expected)


def test_psnr_of_identical_images_is_finite():
    a = random_images()
    assert psnr(a, a).tolist() == pytest.approx([10 * math.log10(255**2 / 0.01)] * 2)


def test_psnr_rounds_to_8_bits():
    assert psnr(GRAY + 0.1 * LEVEL, GRAY + 0.4 * LEVEL) == psnr(GRAY, GRAY)


def test_psnr_clips_to_the_pixel_range():
    assert psnr(GRAY + 1, GRAY + 5) == psnr(GRAY, GRAY)


# ---- SSIM
def test_ssim_of_identical_images_is_1():
    a = random_images()
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


def test_ssim_of_flat_images_compares_their_means():
    expected = (2 * 0.05 * 0.1 + 1e-4) / (0.05**2 + 0.1**2 + 1e-4)  # gray levels 0.05 and 0.1
    assert ssim(GRAY - 0.9, GRAY - 0.8).item() == pytest.approx(expected, rel=1e-3)


def test_ssim_of_inverted_images_is_negative():
    a = random_images()
    assert ssim(a, -a).max() < 0


def test_ssim_matches_scipy():
    a, b = random_images(), random_images()
    a, b = ((x.double().numpy() + 1) / 2 for x in (a, 0.7 * a + 0.3 * b))

    def mean(x):
        blurred = gaussian_filter(x, 1.5, radius=5, axes=(2, 3))
        return blurred[..., 5:-5, 5:-5]  # without the border

    ma, mb = mean(a), mean(b)
    covariance = mean(a * b) - ma * mb
    variances = mean(a * a) - ma**2 + mean(b * b) - mb**2
    luminance = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (variances + 9e-4)
    expected = (luminance * structure).mean((1, 2, 3))
    ours = ssim(*(torch.from_numpy(2 * x - 1).float() for x in (a, b)))
    assert ours.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


# ---- reconstruction
def test_reconstruction_metrics_match_their_definitions():
    model, images = noisy(VQVAE(SMALL)), random_images(7, 32)
    codes = model.encode(images)
    decoded = model.decode(codes)
    frequencies = codes.flatten().bincount(minlength=16) / codes.numel()
    entropy = torch.distributions.Categorical(frequencies).entropy().item()
    assert reconstruction_metrics(model, images, 7, CPU) == pytest.approx(
        {
            "val_loss": F.mse_loss(decoded, images).item() / VARIANCE,
            "val_psnr": psnr(decoded, images).mean().item(),
            "val_psnr_p5": psnr(decoded, images).quantile(0.05).item(),
            "val_ssim": ssim(decoded, images).mean().item(),
            "codes_used": len(codes.unique()),
            "code_perplexity": math.exp(entropy),
        },
        rel=1e-4,
    )


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_reconstruction_metrics_do_not_depend_on_the_batch_size(batch):
    model, images = noisy(VQVAE(SMALL)), random_images(7, 32)
    expected = reconstruction_metrics(model, images, 7, CPU)
    assert reconstruction_metrics(model, images, batch, CPU) == pytest.approx(expected, rel=1e-4)


# ---- palette baseline
def flat_images(n_colors: int) -> torch.Tensor:
    """32 images (32, 3, 16, 16) of one color each, from n_colors different ones."""
    colors = torch.linspace(-0.9, 0.9, n_colors).repeat_interleave(32 // n_colors)
    return colors[:, None, None, None].expand(-1, 3, 16, 16)


def palette_of_4(images: torch.Tensor) -> float:
    config = VQVAEConfig(image_size=16, downsample=4, codebook_size=4)
    return palette_psnr(images, images, config, torch.Generator().manual_seed(0))


def test_palette_reproduces_flat_images_of_its_colors():
    assert palette_of_4(flat_images(4)) > 60


def test_palette_of_too_few_colors_is_inexact():
    assert 10 < palette_of_4(flat_images(16)) < 30


def test_palette_is_upsampled_bilinearly():
    images = torch.linspace(-0.9, 0.9, 16).expand(8, 3, 16, 16)  # four columns of patch colors
    colors = F.interpolate(images, size=(4, 4), mode="bilinear")
    upsampled = F.interpolate(colors, size=(16, 16), mode="bilinear")
    assert palette_of_4(images) == pytest.approx(psnr(upsampled, images).mean().item())


def test_palette_is_fitted_to_at_most_kmeans_vectors_colors(monkeypatch):
    monkeypatch.setattr("image_metrics.KMEANS_VECTORS", 3)
    with pytest.raises(AssertionError, match="k-means of 4 codes needs at least 4 vectors, not 3"):
        palette_of_4(flat_images(4))


def test_palette_loses_detail_within_a_patch():
    black_and_white = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2 - 1.0  # checkerboard
    images = black_and_white.expand(8, 3, 16, 16)
    assert palette_of_4(images) == pytest.approx(psnr(GRAY, GRAY + 1).item(), abs=0.1)


# ---- predictability of codes
def test_random_codes_cannot_be_predicted():
    codes = torch.randint(0, 8, (160, 8, 8))
    assert probe_nats(codes[:100], codes[100:], 8, 20) > math.log(8) - 0.2


def test_regular_codes_can_be_predicted():
    codes = torch.arange(8).expand(60, 8, 8)
    assert probe_nats(codes, codes[:9], 8, 100) < 0.05


def test_probe_sees_six_causal_neighbors():
    codes = torch.arange(16).view(1, 4, 4)
    neighbors = causal_neighbors(codes, padding=99).view(4, 4, 6)
    assert neighbors[0, 0].tolist() == [99] * 6
    assert neighbors[2, 1].tolist() == [8, 99, 4, 5, 6, 1]
    assert neighbors[3, 3].tolist() == [14, 13, 10, 11, 99, 7]


def test_probe_leaves_the_global_random_state_unchanged():
    codes, before = torch.zeros(4, 8, 8, dtype=torch.long), torch.get_rng_state()
    probe_nats(codes, codes, 8, 1)
    assert torch.equal(torch.get_rng_state(), before)
