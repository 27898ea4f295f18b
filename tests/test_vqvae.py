import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags_of, train_stage
from PIL import Image
from vector_quantize_pytorch import VectorQuantize

import train_vqvae
from common import UserError
from metrics import read_metrics
from vqvae import COLOUR_SCALE, VQVAE, Quantizer, VQVAEConfig

SMALL = VQVAEConfig(image_size=32, downsample=4, codebook_size=16, width=8, n_blocks=2)


def noisy(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every weight drawn anew, so that nothing is zero by initialization."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    return model


def vectors(n: int = 200, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_nearest_code_is_that_of_brute_force():
    quantizer, z = Quantizer(16, 8), vectors()
    assert torch.equal(
        quantizer(z), torch.stack([((quantizer.codes - v) ** 2).sum(1).argmin() for v in z])
    )


def test_update_and_revival_are_those_of_the_library():
    """vector-quantize-pytorch replaces dead codes by random vectors in training, at the end of a forward pass."""
    ours = Quantizer(16, 8)
    theirs = VectorQuantize(
        8, codebook_size=16, decay=0.99, rotation_trick=False, threshold_ema_dead_code=1e-9
    ).train()
    book = theirs._codebook
    book.embed.data[0], book.embed_avg.data[0], book.cluster_size.data[0] = (
        ours.codes,
        ours.sums,
        ours.counts,
    )
    for seed in range(5):
        z = vectors(seed=seed)
        indices = ours(z)
        assert torch.equal(indices, theirs(z[None])[1][0])
        ours.update(z, indices)
        torch.testing.assert_close(ours.codes, book.embed[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.counts, book.cluster_size[0])
    threshold = ours.counts.median().item()
    book.threshold_ema_dead_code = book.reset_cluster_size = threshold
    book.replace_sample_fn = lambda samples, n: samples[
        :, torch.randint(200, (n,), generator=torch.Generator().manual_seed(7))
    ]
    dead = ours.counts < threshold
    book.expire_codes_(z[None])
    assert (
        ours.revive(z, threshold, torch.Generator().manual_seed(7)) == dead.sum()
        and 0 < dead.sum() < 16
    )
    for mine, other in (
        (ours.codes, book.embed),
        (ours.sums, book.embed_avg),
        (ours.counts, book.cluster_size),
    ):
        torch.testing.assert_close(mine, other[0])
    assert torch.equal(ours.sums[dead], ours.codes[dead] * threshold)


def test_update_by_its_formula():
    quantizer, z = Quantizer(4, 2), vectors(dim=2)
    codes, indices = quantizer.codes.clone(), quantizer(vectors(dim=2))
    quantizer.update(z, indices)
    n = torch.tensor([0.99 + 0.01 * (indices == k).sum() for k in range(4)])
    m = torch.stack([0.99 * codes[k] + 0.01 * z[indices == k].sum(0) for k in range(4)])
    smoothed = (n + 1e-5) / (n.sum() + 4e-5) * n.sum()
    torch.testing.assert_close(quantizer.codes, m / smoothed[:, None])


def test_k_means_finds_clusters():
    centres = 10 * vectors(16, seed=1)
    quantizer = Quantizer(16, 8)
    quantizer.start(
        centres.repeat(50, 1) + 0.01 * vectors(800), torch.Generator().manual_seed(0), per_step=80
    )
    assert torch.cdist(centres, quantizer.codes).min(1).values.max() < 0.02
    torch.testing.assert_close(quantizer.counts, torch.full((16,), 5.0))  # of 80 vectors a step
    torch.testing.assert_close(quantizer.sums, 5 * quantizer.codes)


def test_gradient_goes_straight_through():
    model = noisy(VQVAE(SMALL))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z = model.features(x).detach().requires_grad_()
    model.features = lambda _: z
    back, *_ = model(x)
    back.square().sum().backward()
    quantized = model.lookup(
        model.quantizer(z.permute(0, 2, 3, 1).flatten(0, 2).detach()).view(2, 8, 8)
    ).requires_grad_()
    model.render(quantized).square().sum().backward()
    torch.testing.assert_close(
        z.grad, quantized.grad, atol=1e-4, rtol=1e-4
    )  # sums in another order, by machine and draw
    assert z.grad.abs().mean() > 0.01


def test_stored_codes_decode_to_the_reconstruction():
    model = noisy(VQVAE(SMALL))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    back, commit, found, codes = model(x)
    assert torch.equal(model.encode(x), codes) and codes.shape == (2, 8, 8)
    torch.testing.assert_close(model.decode(codes), back.clamp(-1, 1))
    torch.testing.assert_close(
        commit, (found - model.quantizer.codes[codes.flatten()]).square().mean()
    )


def test_it_compiles_as_one_graph():
    model, x = noisy(VQVAE(SMALL)), torch.rand(2, 3, 32, 32) * 2 - 1
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    for traced, plain in zip(compiled(x), model(x)):
        torch.testing.assert_close(traced, plain)


def test_bf16_computes_near_fp32_and_codes_stay_fp32():
    exact, rough = (noisy(VQVAE(SMALL, dtype)) for dtype in (torch.float32, torch.bfloat16))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    a, b = exact.features(x), rough.features(x)
    assert (
        b.dtype == torch.float32
        and (a - b).abs().mean() < 0.05 * a.abs().mean()
        and not torch.equal(a, b)
    )
    assert {p.dtype for p in rough.state_dict().values()} == {torch.float32}


def test_untrained_it_is_a_palette_and_a_crop_is_coded_as_in_the_whole():
    model, x = VQVAE(SMALL), torch.rand(1, 3, 32, 32) * 2 - 1
    small = F.interpolate(x, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(model.features(x)[:, :3], COLOUR_SCALE * small)
    torch.testing.assert_close(
        model.render(model.features(x)), F.interpolate(small, size=(32, 32), mode="bilinear")
    )
    wide = noisy(VQVAE(VQVAEConfig(image_size=96, codebook_size=16, width=8, n_blocks=2)))
    x = (
        torch.rand(1, 3, 96, 96) * 2 - 1
    )  # two blocks and a first convolution see 5 cells around one
    torch.testing.assert_close(
        wide.features(x)[..., 7:17, 7:17], wide.features(x[..., 8:88, 8:88])[..., 5:15, 5:15]
    )


def test_measures():
    a = torch.rand(2, 3, 16, 16) * 2 - 1
    assert train_vqvae.psnr(a, a).min() > 60 and train_vqvae.ssim(a, a).tolist() == pytest.approx(
        [1, 1]
    )
    grey = torch.zeros(1, 3, 16, 16)
    assert train_vqvae.psnr(grey, grey + 2 / 255 * 10).item() == pytest.approx(
        10 * math.log10(255**2 / 100)
    )
    flat = train_vqvae.ssim(
        grey, grey + 0.4
    ).item()  # flat pictures: what is left is the term of the means
    assert flat == pytest.approx((2 * 0.5 * 0.7 + 1e-4) / (0.5**2 + 0.7**2 + 1e-4), rel=1e-3)
    assert train_vqvae.ssim(a, -a).max() < 0
    rng = np.random.default_rng(0)
    random, rows = (
        torch.from_numpy(rng.integers(0, 8, (160, 8, 8))),
        torch.arange(8).expand(60, 8, 8),
    )
    assert train_vqvae.probe_nats(random[:100], random[100:], 8, 20) > math.log(8) - 0.2
    assert train_vqvae.probe_nats(rows, rows[:9], 8, 200) < 0.05


def vqvae(**changes) -> dict:
    return train_stage(train_vqvae, **changes)


def test_training_beats_the_palette_and_resumes_bit_for_bit(workdir, capsys):
    size = dict(images=2400, probe_steps=50, model__codebook_size=64, model__width=24)
    whole = vqvae(run="whole", **size)
    assert (
        whole["val_psnr"] > whole["palette_psnr"] + 0.5
        and whole["codes_used"] > 40
        and whole["probe_nats"] < math.log(64)
    )
    assert {
        "val_loss",
        "val_psnr_p5",
        "val_ssim",
        "code_perplexity",
        "params",
        "images_per_second",
        "device",
    } <= whole.keys()
    assert "collapsed" not in capsys.readouterr().out
    assert (
        Image.open("runs/whole/samples/0000300.png").width > 8 * 32
        and Path("runs/whole/loss.png").exists()
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(
            train_vqvae.Interrupt,
            "__enter__",
            lambda self: (setattr(self, "code", 130), setattr(self, "before", {}), self)[-1],
        )
        vqvae(run="cut", **size)  # stops after a step, as for SIGINT
    assert stopped.value.code == 130
    again = vqvae(run="cut", resume="true", **size)
    assert (
        read_metrics(Path("runs/whole")) == read_metrics(Path("runs/cut"))
        and again["val_psnr"] == whole["val_psnr"]
    )


def test_a_collapsed_codebook_is_told(workdir, capsys):
    for i in range(40):
        folder = Path("red") / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / f"{i}.png")
    vqvae(run="red", images=160, data__source="red", data__val_source="red")
    assert "warning: only 1 of 16 codes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, says",
    {
        "--model.image_size=30": "not divisible by model.downsample 4: set it to 28",
        "--crop=6": "--crop 6 must be a multiple",
        "--model.code_dim=2": "code_dim is 2",
        "--images=3": "less than one step",
        "--data.source=none": "none",
        "--data.source=none.parquet": "there is no such folder or .parquet file",
        "--micro_batch=3": "does not divide",
    }.items(),
)
def test_bad_input_is_one_clear_line(workdir, flag, says):
    from common import load_config

    with pytest.raises(UserError) as error:
        train_vqvae.main(load_config(train_vqvae.Config, [*flags_of(train_vqvae, run="new"), flag]))
    assert (
        says in str(error.value) and "\n" not in str(error.value) and not Path("runs/new").exists()
    )
