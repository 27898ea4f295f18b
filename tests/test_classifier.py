import pytest
import torch

import tools.classifier as tc
from common.config import UserError

CPU = torch.device("cpu")


def random_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_float(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def stripes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy uint8 images (n, 3, 32, 32) of stripes with random phase and color, and their labels.

    The stripes are vertical (0), horizontal (1) or diagonal (2).
    """
    rng = random_generator(seed)
    labels = torch.randint(3, (n,), generator=rng)
    slopes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])[labels]  # (n, 2)
    x_slope, y_slope = slopes.T[..., None, None]  # (n, 1, 1) each
    ramp = torch.arange(32.0)
    phases = 9 * torch.rand(n, 1, 1, generator=rng)
    waves = (x_slope * ramp + y_slope * ramp[:, None] + phases).sin()  # (n, 32, 32)
    amplitudes = 60 * torch.rand(n, 3, 1, 1, generator=rng) + 40
    noise = 20 * torch.randn(n, 3, 32, 32, generator=rng)
    return (128 + amplitudes * waves[:, None] + noise).clamp(0, 255).byte(), labels


# ---- training
def train(seed: int) -> tc.Classifier:
    recipe = tc.Recipe(width=4, epochs=6, batch=32, lr=0.2)
    images, labels = stripes(384, 0)
    return tc.train_classifier(images, labels, 3, recipe, seed, CPU, torch.float32, str)


@pytest.fixture(scope="module")
def classifier() -> tc.Classifier:
    return train(seed=0)


def test_classifier_learns_to_distinguish_stripes(classifier):
    images, labels = stripes(200, 1)
    logits, features = tc.judge(classifier, to_float(images), batch=64)
    assert (logits.argmax(1) == labels).float().mean() > 0.95
    assert features.shape == (200, 16)


@pytest.mark.parametrize("contrast", [0.0, 0.5])
def test_larger_images_are_averaged_over_areas(classifier, contrast):
    images = to_float(stripes(20, 1)[0])
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3)  # (20, 3, 128, 128)
    fine_stripes = contrast * (-1.0) ** torch.arange(128)  # (128,), 0 on average
    logits = tc.judge(classifier, large + fine_stripes)[0]
    assert torch.allclose(logits, tc.judge(classifier, images)[0], atol=1e-4)


def test_training_is_reproducible_and_leaves_the_global_generator_alone(classifier):
    torch.rand(1)  # the state at the start must not matter
    state = torch.get_rng_state()
    repeated = train(seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weights in classifier.state_dict().items():
        assert torch.equal(repeated.state_dict()[name], weights), name


def test_training_depends_on_the_seed(classifier):
    images = to_float(stripes(20, 1)[0])
    logits, other = (tc.judge(model, images)[0] for model in (classifier, train(seed=1)))
    assert not torch.allclose(logits, other, atol=0.1)


def test_training_stops_when_the_loss_is_not_finite():
    recipe = tc.Recipe(width=4, epochs=3, batch=32, lr=float("inf"))
    with pytest.raises(UserError, match="loss nan in epoch 1; lower the recipe's lr inf"):
        tc.train_classifier(*stripes(128, 0), 3, recipe, 0, CPU, torch.float32, str)


def test_first_layer_whitens_patches_after_training_too(classifier):
    images = to_float(stripes(384, 0)[0])  # those of the training
    outputs = classifier.whiten(images)[:, :12].transpose(0, 1).flatten(1)  # (12, M)
    assert torch.allclose(outputs.cov(), torch.eye(12), atol=0.1)


def test_judgment_of_an_image_is_that_of_its_mirror_image(classifier):
    images = to_float(stripes(20, 1)[0])
    logits, mirrored = tc.judge(classifier, images)[0], tc.judge(classifier, images.flip(3))[0]
    assert torch.allclose(logits, mirrored, atol=1e-4)
    assert not torch.allclose(classifier(images), classifier(images.flip(3)), atol=1e-2)


# ---- saving and loading
def load(cache, images=None, epochs=2) -> tuple[torch.Tensor, int]:
    """Logits of a loaded classifier and the number of epochs that were trained for it."""
    lines = []
    default, labels = stripes(64, 0)
    images = default if images is None else images
    recipe = tc.Recipe(width=4, epochs=epochs, batch=32)
    model = tc.load_classifier(
        cache, images, labels, 3, recipe, 0, CPU, torch.float32, lines.append
    )
    n_epochs = sum("epoch " in line for line in lines)
    return tc.judge(model, to_float(stripes(8, 1)[0]))[0], n_epochs


def test_stopped_training_continues_after_its_last_epoch(tmp_path):
    recipe = tc.Recipe(width=4, epochs=3, batch=32)

    def weights(cache: str, progress) -> dict[str, torch.Tensor]:
        args = (tmp_path / cache, *stripes(64, 0), 3, recipe, 0, CPU, torch.float32, progress)
        return tc.load_classifier(*args).state_dict()

    def stop_in_last_epoch(line: str) -> None:
        if "epoch 3/3" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights("stopped", stop_in_last_epoch)
    lines, whole = [], weights("whole", str)
    for name, resumed in weights("stopped", lines.append).items():
        assert torch.equal(resumed, whole[name]), name
    assert [line.split(" |")[0] for line in lines[1:]] == ["classifier: epoch 3/3"]
    assert not list(tmp_path.glob("*/.*.pt"))


def test_training_rejects_a_damaged_checkpoint(tmp_path):
    checkpoint, recipe = tmp_path / "state.pt", tc.Recipe(width=4, epochs=2, batch=32)

    def train() -> None:
        args = (*stripes(64, 0), 3, recipe, 0, CPU, torch.float32, str, checkpoint)
        tc.train_classifier(*args)

    train()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state\.pt is damaged \(.*\); delete it"):
        train()


def test_second_load_reads_the_saved_classifier(tmp_path):
    trained, epochs = load(tmp_path)
    loaded, further_epochs = load(tmp_path)
    assert (epochs, further_epochs) == (2, 0)
    assert torch.equal(trained, loaded)


@pytest.mark.parametrize("change", [{"images": 255 - stripes(64, 0)[0]}, {"epochs": 3}])
def test_other_images_or_recipe_train_another_classifier(tmp_path, change):
    load(tmp_path)
    assert load(tmp_path, **change)[1] == change.get("epochs", 2)
    assert len(list(tmp_path.glob("classifier-*"))) == 2


def test_loading_rejects_a_damaged_classifier(tmp_path):
    load(tmp_path)
    (file,) = tmp_path.glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"classifier-\w+ is damaged .*; delete it"):
        load(tmp_path)


# ---- augmentation
def test_augmentation_mirrors_and_shifts_by_at_most_two_pixels():
    ramp = torch.arange(32.0).expand(64, 3, 32, 32)
    middle = tc.augment(ramp, 2, random_generator(0))[:, 0, 0, 16]
    assert set(middle.tolist()) == {*range(13, 19)}  # 16 +- 2, and mirrored 15 +- 2


# ---- distances
@pytest.fixture(scope="module")
def standard_normal() -> torch.Tensor:
    """Samples (4000, 6) with mean 0 and covariance 1 up to rounding."""
    z = torch.randn(4000, 6, dtype=torch.float64, generator=random_generator(0))
    return torch.linalg.qr(z - z.mean(0))[0] * 3999**0.5


def test_frechet_distance_has_its_closed_form_for_independent_features(standard_normal):
    a = standard_normal * torch.arange(1.0, 7)
    b = standard_normal * torch.tensor([3.0, 1, 0, 2, 5, 1]) + torch.tensor([1.0, 2, 0, 0, 0, 3])
    # squared differences of the means and of the standard deviations
    expected = (1 + 4 + 9) + (4 + 1 + 9 + 4 + 0 + 25)
    assert tc.frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)
    assert tc.frechet_distance(b, a) == pytest.approx(expected, abs=1e-6)
    assert tc.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def correlated_features(seed: int) -> torch.Tensor:
    samples = torch.randn(400, 5, generator=random_generator(seed), dtype=torch.float64)
    mixing = torch.randn(5, 5, generator=random_generator(seed + 9), dtype=torch.float64)
    return samples @ mixing  # (400, 5)


def test_frechet_distance_has_its_closed_form_for_correlated_features():
    a, b = correlated_features(1), correlated_features(2)
    cov_a, cov_b = a.T.cov(), b.T.cov()  # (5, 5) each
    means = (a.mean(0) - b.mean(0)).square().sum()
    mixed = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()  # trace of (A^.5 B A^.5)^.5
    expected = means + cov_a.trace() + cov_b.trace() - 2 * mixed
    assert tc.frechet_distance(a, b) == pytest.approx(expected.item())


def test_kernel_distance_separates_different_distributions(standard_normal):
    x, y = standard_normal.chunk(2)  # (2000, 6) each
    assert abs(tc.kernel_distance(x, y, 200, 20)) < 0.05
    assert tc.kernel_distance(x, y + 0.5, 200, 20) > 1


def test_kernel_distance_is_the_unbiased_squared_mmd(standard_normal):
    x, y = standard_normal[:4], standard_normal[4:8]
    pairs = ((x, x), (y, y), (x, y))
    xx, yy, xy = ((u @ v.T / 6 + 1) ** 3 for u, v in pairs)  # (4, 4) each
    expected = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / 12 - 2 * xy.mean()
    assert tc.kernel_distance(x, y, subsets=3) == pytest.approx(expected.item())


def test_diversity_is_the_mean_cosine_distance_within_classes():
    features = torch.randn(9, 5, generator=random_generator(0))
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])  # class 2 has no pair and is omitted
    distances = 1 - torch.cosine_similarity(features[:, None], features, dim=-1)  # (9, 9)
    zero = distances[:4, :4].sum().item() / 12
    one = distances[4:8, 4:8].sum().item() / 12
    assert tc.diversity(features, labels) == pytest.approx((zero + one) / 2, rel=1e-5)


def test_diversity_of_a_collapsed_class_is_zero():
    direction = torch.randn(1, 5, generator=random_generator(0))
    features = direction * torch.tensor([[2.0], [1.0], [0.5]])  # (3, 5), equal up to scale
    assert tc.diversity(features, torch.zeros(3)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_nearest_matches_brute_force(chunk):
    rng = random_generator(0)
    pool = torch.randint(256, (50, 12), generator=rng, dtype=torch.uint8)
    others = torch.randint(256, (15, 12), generator=rng, dtype=torch.uint8)
    queries = torch.cat([others, pool[[49, 3]]])  # (17, 12)
    distances = (queries[:, None].double() - pool.double()).norm(dim=2)  # (17, 50)
    index, distance = tc.nearest(queries, pool, chunk)
    assert torch.equal(index, distances.argmin(1))
    assert torch.allclose(distance, distances.amin(1))
    assert (distance[15:] == 0).all()  # exactly, for copies
