import pytest
import torch
import torch.nn.functional as F
from helpers import noisy
from vector_quantize_pytorch import VectorQuantize

from vqvae import COLOR_SCALE, VQVAE, Block, Quantizer, VQVAEConfig

SMALL = VQVAEConfig(image_size=32, downsample=4, codebook_size=16, width=8, n_blocks=2)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def random_vectors(n: int = 200, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def random_images(n: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size) * 2 - 1


# ---- configuration
@pytest.mark.parametrize(
    "values, message",
    [
        ({"image_size": 0}, "model.image_size is 0; it must be positive"),
        ({"encoder_kernel": -1}, "model.encoder_kernel is -1; it must be positive"),
        ({"image_size": 30}, "model.image_size 30 is not divisible .* 4; set it to 28"),
        ({"image_size": 2}, "model.image_size is 2; it must be at least 11"),
        ({"image_size": 13, "downsample": 8}, "13 is not divisible .* 8; set it to 16"),
        ({"image_size": 5000}, "model.image_size is 5000; it must be at most 4096"),
        ({"code_dim": 2}, "model.code_dim is 2; it must be at least 3"),
        ({"codebook_size": 65_536}, "model.codebook_size is 65536; it must be at most 65535"),
        ({"encoder_kernel": 2}, "model.encoder_kernel is 2; it must be odd"),
    ],
)
def test_config_rejects_impossible_values(values, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**values)


# ---- quantizer
def test_quantizer_selects_the_nearest_code():
    quantizer, z = Quantizer(16, 8), random_vectors()
    nearest = [((quantizer.codes - v) ** 2).sum(1).argmin() for v in z]
    assert torch.equal(quantizer(z), torch.stack(nearest))


def reference_quantizer(ours: Quantizer, **options):
    """The same codebook in vector-quantize-pytorch: the module and its codebook."""
    K, D = ours.codes.shape
    theirs = VectorQuantize(D, codebook_size=K, decay=ours.decay, rotation_trick=False, **options)
    book = theirs._codebook
    book.embed.data[0], book.embed_avg.data[0] = ours.codes, ours.sums
    book.cluster_size.data[0] = ours.counts
    return theirs.train(), book


def test_update_matches_vector_quantize_pytorch():
    ours = Quantizer(16, 8)
    theirs, book = reference_quantizer(ours, threshold_ema_dead_code=0)
    for seed in range(5):
        z = random_vectors(seed=seed)
        indices = ours(z)
        assert torch.equal(indices, theirs(z[None])[1][0])
        ours.update(z, indices)
        torch.testing.assert_close(ours.codes, book.embed[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.counts, book.cluster_size[0])


def test_update_follows_the_formula():
    quantizer, z = Quantizer(4, 2, decay=0.9, eps=0.5), random_vectors(dim=2)
    codes, indices = quantizer.codes.clone(), quantizer(z)
    quantizer.update(z, indices)
    counts = torch.tensor([0.9 + 0.1 * (indices == k).sum() for k in range(4)])
    sums = torch.stack([0.9 * codes[k] + 0.1 * z[indices == k].sum(0) for k in range(4)])
    smoothed = (counts + 0.5) / (counts.sum() + 4 * 0.5) * counts.sum()
    torch.testing.assert_close(quantizer.codes, sums / smoothed[:, None])


def test_totals_count_the_vectors_of_each_code_even_of_codes_without_any():
    indices = torch.tensor([3, 0, 3, 2])
    counts, sums = Quantizer(5, 2).totals(torch.arange(8.0).view(4, 2), indices)
    assert counts.tolist() == [1, 0, 1, 2, 0]
    assert sums.tolist() == [[2, 3], [0, 0], [6, 7], [4, 6], [0, 0]]


def test_number_of_used_codes_counts_each_code_once():
    assert Quantizer(16, 8).n_used(torch.tensor([7, 0, 7, 15, 0])) == 3


def quantizer_with_unused_codes() -> tuple[Quantizer, torch.Tensor, float, torch.Tensor]:
    """A quantizer after one update, its vectors, a count threshold, and the codes below it."""
    quantizer, z = Quantizer(16, 8), random_vectors()
    quantizer.update(z, quantizer(z))
    threshold = quantizer.counts.median().item()
    return quantizer, z, threshold, quantizer.counts < threshold


def test_revive_matches_vector_quantize_pytorch():
    ours, z, threshold, _ = quantizer_with_unused_codes()
    _, book = reference_quantizer(ours, threshold_ema_dead_code=threshold)

    def same_vectors(samples, n):
        generator = torch.Generator().manual_seed(7)
        return samples[:, torch.randint(200, (n,), generator=generator)]

    book.replace_sample_fn = same_vectors
    book.expire_codes_(z[None])
    ours.revive(z, threshold, torch.Generator().manual_seed(7))
    torch.testing.assert_close(ours.codes, book.embed[0])
    torch.testing.assert_close(ours.sums, book.embed_avg[0])
    torch.testing.assert_close(ours.counts, book.cluster_size[0])


@pytest.mark.parametrize("n_dead", [0, 1, 7, 16])
def test_revive_gives_the_dead_codes_in_order_as_many_draws_as_there_are(n_dead):
    quantizer, z = Quantizer(16, 8), random_vectors()
    dead = torch.randperm(16)[:n_dead].sort().values
    quantizer.counts[dead] = 0.1
    chosen = torch.randint(200, (n_dead,), generator=torch.Generator().manual_seed(7))
    codes, sums = quantizer.codes.clone(), quantizer.sums.clone()
    codes[dead], sums[dead] = z[chosen], z[chosen] * 0.3
    assert quantizer.revive(z, 0.3, torch.Generator().manual_seed(7)) == n_dead
    assert torch.equal(quantizer.codes, codes)
    assert torch.equal(quantizer.sums, sums)
    assert torch.equal(quantizer.counts, torch.ones(16).index_fill(0, dead, 0.3))


def test_codebook_is_updated_without_waiting_for_the_device():
    """Tensors on the meta device have no values, so reading one, or a shape that depends on one, is
    an error.
    """
    quantizer, z = Quantizer(16, 8).to("meta"), torch.empty(200, 8, device="meta")
    indices = quantizer(z)
    quantizer.update(z, indices)
    assert quantizer.n_used(indices).is_meta
    assert quantizer.revive(z, 0.3, torch.Generator()).is_meta


def test_revive_replaces_only_codes_below_the_threshold():
    quantizer, z, threshold, unused = quantizer_with_unused_codes()
    before = quantizer.codes.clone()
    n_revived = quantizer.revive(z, threshold, torch.Generator())
    changed = (quantizer.codes != before).any(1)
    assert 0 < n_revived < 16
    assert n_revived == unused.sum()
    assert torch.equal(changed, unused)


def test_revived_codes_are_input_vectors_and_stay_there_at_an_empty_update():
    quantizer, z, threshold, unused = quantizer_with_unused_codes()
    quantizer.revive(z, threshold, torch.Generator())
    revived = quantizer.codes[unused]
    assert all((z == code).all(1).any() for code in revived)
    quantizer.update(z[:0], torch.empty(0, dtype=torch.long))
    torch.testing.assert_close(quantizer.codes[unused], revived, rtol=1e-3, atol=1e-3)


def clustered_quantizer() -> tuple[torch.Tensor, Quantizer]:
    """16 cluster centers, and a quantizer initialized with 50 vectors around each of them."""
    centers, quantizer = 10 * random_vectors(16, seed=1), Quantizer(16, 8)
    z = centers.repeat(50, 1) + 0.01 * random_vectors(800)
    quantizer.kmeans_init(z, torch.Generator().manual_seed(0), per_step=80)
    return centers, quantizer


def test_kmeans_init_finds_the_clusters():
    centers, quantizer = clustered_quantizer()
    assert torch.cdist(centers, quantizer.codes).min(1).values.max() < 0.02


def test_kmeans_init_scales_the_statistics_to_one_step():
    _, quantizer = clustered_quantizer()
    torch.testing.assert_close(quantizer.counts, torch.full((16,), 5.0))  # 80 vectors per step
    torch.testing.assert_close(quantizer.sums, 5 * quantizer.codes)


def test_kmeans_init_needs_a_vector_per_code():
    with pytest.raises(AssertionError, match="16 codes needs at least 16 vectors, not 15"):
        Quantizer(16, 8).kmeans_init(random_vectors(15), torch.Generator(), per_step=1)


# ---- network
def test_gradient_passes_straight_through_the_quantizer(monkeypatch):
    model, x = noisy(VQVAE(SMALL)), random_images()
    z = model.features(x).detach().requires_grad_()
    monkeypatch.setattr(model, "features", lambda _: z)
    reconstruction, _, _, codes = model(x)
    reconstruction.square().sum().backward()
    quantized = model.lookup(codes).requires_grad_()
    model.render(quantized).square().sum().backward()
    assert z.grad.abs().mean() > 0.01
    torch.testing.assert_close(z.grad, quantized.grad, atol=1e-4, rtol=1e-4)


def test_encode_returns_the_codes_of_the_forward_pass():
    model, x = noisy(VQVAE(SMALL)), random_images()
    codes = model(x)[3]
    assert codes.shape == (2, 8, 8)
    assert torch.equal(model.encode(x), codes)


def test_decode_returns_the_clipped_reconstruction():
    model, x = noisy(VQVAE(SMALL)), random_images()
    reconstruction, _, _, codes = model(x)
    assert reconstruction.abs().max() > 1
    torch.testing.assert_close(model.decode(codes), reconstruction.clamp(-1, 1))


def test_commitment_loss_is_the_squared_distance_between_features_and_codes():
    model, x = noisy(VQVAE(SMALL)), random_images()
    _, commit_loss, vectors, codes = model(x)
    distance = (vectors - model.quantizer.codes[codes.flatten()]).square().mean()
    torch.testing.assert_close(commit_loss, distance)


def test_commitment_loss_trains_the_encoder_only():
    model = noisy(VQVAE(SMALL))
    model(random_images())[1].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.decoder.parameters())


def test_forward_returns_features_without_a_gradient():
    model, x = noisy(VQVAE(SMALL)), random_images()
    vectors = model(x)[2]
    assert not vectors.requires_grad
    assert torch.equal(vectors, model.features(x).permute(0, 2, 3, 1).reshape(-1, 8))


def test_block_starts_as_the_identity_plus_a_bias():
    block, x = Block(8, 3), torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block(x), x + block.conv2.bias[:, None, None])


def test_model_compiles_as_one_graph():
    model, x = noisy(VQVAE(SMALL)), random_images()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(traced, eager)


def test_bf16_features_are_close_to_fp32_features():
    x = random_images()
    exact, rough = (noisy(VQVAE(SMALL, t)).features(x) for t in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().mean() < 0.05 * exact.abs().mean()


def test_bf16_images_are_close_to_fp32_images():
    z = torch.randn(2, 8, 8, 8)
    exact, rough = (noisy(VQVAE(SMALL, t)).render(z) for t in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().mean() < 0.05 * exact.abs().mean()


def test_weights_and_codes_stay_fp32_in_bf16():
    state = VQVAE(SMALL, torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_untrained_features_are_the_patch_colors():
    model, x = VQVAE(SMALL), random_images()
    colors = F.interpolate(x, size=(8, 8), mode="bilinear")
    features = model.features(x)
    torch.testing.assert_close(features[:, :3], COLOR_SCALE * colors)
    assert not features[:, 3:].any()


def test_untrained_decoder_upsamples_the_patch_colors():
    model, x = VQVAE(SMALL), random_images()
    colors = F.interpolate(x, size=(8, 8), mode="bilinear")
    upsampled = F.interpolate(colors, size=(32, 32), mode="bilinear")
    torch.testing.assert_close(model.render(model.features(x)), upsampled)


@pytest.mark.parametrize("kernel, margin", [(1, 0), (3, 5)])  # five convolutions in the encoder
def test_crop_has_the_features_of_the_full_image(kernel, margin):
    config = VQVAEConfig(
        image_size=96, codebook_size=16, width=8, n_blocks=2, encoder_kernel=kernel
    )
    model, x = noisy(VQVAE(config)), random_images(1, 96)
    full = model.features(x)[..., 2:22, 2:22]
    crop = model.features(x[..., 8:88, 8:88])
    inside = slice(margin, 20 - margin)
    torch.testing.assert_close(crop[..., inside, inside], full[..., inside, inside])


@pytest.mark.parametrize("kernel, n_changed", [(1, 1), (3, 64)])
def test_kernel_1_encodes_each_patch_on_its_own(kernel, n_changed):
    config = VQVAEConfig(image_size=32, codebook_size=16, width=8, encoder_kernel=kernel)
    model, x = noisy(VQVAE(config)), random_images(1)
    changed = x.clone()
    changed[..., 16:20, 16:20] = 0  # the pixels of one patch
    difference = (model.features(x) != model.features(changed)).any(1)
    assert difference.sum() == n_changed
