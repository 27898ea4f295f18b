import pytest
import torch

import tools.classifier as tc
from common import UserError

CPU, RNG = torch.device("cpu"), torch.Generator()


def stripes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n noisy uint8 pictures with upright, lying or slanted stripes of any phase and colour: labels 0, 1, 2."""
    labels, ramp = torch.randint(3, (n,), generator=RNG.manual_seed(seed)), torch.arange(32.0)
    slope = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])[labels].T[
        ..., None, None
    ]  # (2, n, 1, 1)
    waves = (
        slope[0] * ramp + slope[1] * ramp[:, None] + 9 * torch.rand(n, 1, 1, generator=RNG)
    ).sin()  # (n, 32, 32)
    pictures = 128 + (60 * torch.rand(n, 3, 1, 1, generator=RNG) + 40) * waves[:, None]
    return (pictures + 20 * torch.randn(n, 3, 32, 32, generator=RNG)).clamp(0, 255).byte(), labels


def test_learns_to_tell_stripes_apart_the_same_way_for_the_same_seed():
    def train(seed):
        return tc.train_classifier(
            *stripes(384, 0),
            3,
            tc.Recipe(4, 6, 32, lr=0.2),
            seed,
            CPU,
            torch.float32,
            lambda line: None,
        )

    (pictures, labels), first = stripes(200, 1), train(0)
    logits, features = tc.judge(first, pictures := pictures.float() / 127.5 - 1, batch=64)
    assert (logits.argmax(1) == labels).float().mean() > 0.95 and features.shape == (200, 16)
    large = pictures[:20].repeat_interleave(4, 2).repeat_interleave(4, 3)  # (20, 3, 128, 128)
    fine = (0.3 + torch.rand(1)) * (-1.0) ** torch.arange(
        128
    )  # 0 over an area; the draw must not change what follows
    assert all(
        torch.allclose(tc.judge(first, x)[0], logits[:20], atol=1e-4) for x in (large, large + fine)
    )
    same, other = (tc.judge(train(seed), pictures, batch=64)[0] for seed in (0, 1))
    assert torch.equal(same, logits) and not torch.allclose(other, logits, atol=0.1)


def test_trained_once_for_the_same_pictures_and_recipe(tmp_path):
    def load(pictures, epochs=2):
        lines, recipe = [], tc.Recipe(width=4, epochs=epochs, batch=32)
        made = tc.load_classifier(
            tmp_path, pictures, labels, 3, recipe, 0, CPU, torch.float32, lines.append
        )
        return tc.judge(made, stripes(8, 1)[0].float() / 127.5 - 1)[0], len(lines)

    pictures, labels = stripes(64, 0)
    (first, trained), (again, trained_again) = load(pictures), load(pictures.clone())
    assert (trained, trained_again) == (2, 0) and torch.equal(first, again)
    (file,) = tmp_path.glob("*/*.safetensors")
    assert (
        load(255 - pictures)[1] == 2
        and load(pictures, epochs=3)[1] == 3
        and len(list(tmp_path.iterdir())) == 3
    )
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(UserError, match=r"classifier-\w+ is damaged .* delete it"):
        load(pictures)


def test_augment_mirrors_shifts_and_blanks():
    ramp = (torch.arange(32.0) + 1).expand(64, 3, 32, 32)  # the value tells the column
    blanked, moved = (
        tc.augment(ramp, tc.Recipe(cutout=side), RNG.manual_seed(0)) for side in (8, 0)
    )
    assert ((blanked == 0).sum((1, 2, 3)) == 3 * 8 * 8).all() and (moved > 0).all()
    assert set(moved[:, 0, 0, 16].tolist()) == {*range(12, 22)}  # 17 +- 4, mirrored 16 +- 4


def test_frechet_and_kernel_distance():
    z = torch.randn(4000, 6, dtype=torch.float64, generator=RNG.manual_seed(0))
    z = torch.linalg.qr(z - z.mean(0))[0] * 3999**0.5  # mean 0 and covariance 1 to rounding
    a, b = (
        z * torch.arange(1.0, 7),
        z * torch.tensor([3.0, 1, 0, 2, 5, 1]) + torch.tensor([1.0, 2, 0, 0, 0, 3]),
    )
    expected = (1 + 4 + 9) + (
        4 + 1 + 9 + 4 + 0 + 25
    )  # squared differences of the means and of the deviations
    assert [tc.frechet_distance(*pair) for pair in ((a, b), (b, a), (a, a))] == pytest.approx(
        [expected, expected, 0], abs=1e-6
    )
    x, y = z.chunk(2)
    assert (
        abs(tc.kernel_distance(x, y, 200, 20)) < 0.05
        and tc.kernel_distance(x, y + 0.5, 200, 20) > 1
    )
    xx, yy, xy = ((u[:4] @ v[:4].T / 6 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    expected = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / 12 - 2 * xy.mean()
    assert tc.kernel_distance(x[:4], y[:4], subsets=3) == pytest.approx(expected.item())


def test_diversity_falls_when_a_class_collapses():
    f, labels = (
        torch.randn(9, 5, generator=RNG.manual_seed(0)),
        torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2]),
    )
    pairs = 1 - torch.cosine_similarity(f[:, None], f, dim=-1)  # (9, 9)
    zero, one = pairs[:4, :4].sum().item() / 12, pairs[4:8, 4:8].sum().item() / 12
    spread, collapsed = (
        tc.diversity(f, labels),
        tc.diversity(torch.cat([f[:1] * 2, f[:1], f[:1], f[:1], f[4:]]), labels),
    )
    assert [spread, collapsed] == pytest.approx(
        [(zero + one) / 2, one / 2], rel=1e-5
    )  # class 2 has no pair


def test_nearest_is_brute_force_in_any_chunks():
    pool = torch.randint(256, (50, 12), generator=RNG.manual_seed(0), dtype=torch.uint8)
    queries = torch.cat(
        [torch.randint(256, (15, 12), generator=RNG, dtype=torch.uint8), pool[[49, 3]]]
    )
    pairs = (queries[:, None].double() - pool.double()).norm(dim=2)  # (17, 50)
    for index, distance in (tc.nearest(queries, pool, chunk) for chunk in (1, 7, 100)):
        assert (
            torch.equal(index, pairs.argmin(1))
            and torch.allclose(distance, pairs.amin(1))
            and (distance[15:] == 0).all()
        )


def test_frechet_distance_of_correlated_features():
    a, b = (
        torch.randn(400, 5, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        @ torch.randn(5, 5, generator=torch.Generator().manual_seed(s + 9), dtype=torch.float64)
        for s in (1, 2)
    )
    A, B, apart = a.T.cov(), b.T.cov(), a.mean(0) - b.mean(0)
    cross = torch.linalg.eigvals(A @ B).real.sqrt().sum()  # the trace of (A^.5 B A^.5)^.5
    assert tc.frechet_distance(a, b) == pytest.approx(
        (apart @ apart + A.trace() + B.trace() - 2 * cross).item()
    )
