import pytest
import torch

from model import Llama, ModelConfig
from muon import Muon, build_optimizers, orthogonalize

SHAPES = {"wide": (24, 64), "tall": (64, 24), "square": (48, 48)}
LEARNING_RATES = {
    "muon_lr": 0.02,
    "muon_wd": 0.1,
    "adamw_lr": 0.005,
    "adamw_wd": 0.2,
    "adamw_beta2": 0.97,
}


def random_params(shapes, generator) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def reference_step(weight, momentum, grad, lr, wd, beta):
    """New weight and momentum of one matrix in float64, with the polar factor from the SVD."""
    momentum = beta * momentum + (1 - beta) * grad
    u, _, vt = torch.linalg.svd(beta * momentum + (1 - beta) * grad, full_matrices=False)
    scale = max(1, grad.shape[0] / grad.shape[1]) ** 0.5
    return weight * (1 - lr * wd) - lr * scale * u @ vt, momentum


# ---- orthogonalization


def singular_values(shape, dtype):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.linalg.svdvals(orthogonalize(x).double())


@pytest.mark.parametrize("shape", [(24, 64), (64, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_of_wide_matrices_become_about_one(shape, dtype):
    values = singular_values(shape, dtype)
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_most_singular_values_of_square_matrices_become_about_one(dtype):
    """The smallest ones of a square matrix are too small for five iterations."""
    values = singular_values((48, 48), dtype)
    assert 0.7 < values.median() < 1.3
    assert values.max() < 1.3


def test_orthogonalize_approximates_the_polar_factor():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, 64, dtype=torch.float64, generator=generator)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(orthogonalize(x), u @ vt, atol=0.06, rtol=0)


def test_orthogonalize_rejects_tall_matrices():
    with pytest.raises(AssertionError, match="64, 24"):
        orthogonalize(torch.ones(1, 64, 24))


# ---- Muon


def test_matrices_of_one_shape_up_to_transposition_form_one_group():
    optimizer = Muon(random_params(SHAPES.values(), torch.Generator()), lr=0.1)
    groups = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[SHAPES["wide"], SHAPES["tall"]], [SHAPES["square"]]]


@pytest.mark.parametrize("changed_momentum", [None, 0.5], ids=["constant", "changed"])
def test_steps_follow_a_float64_reference(changed_momentum):
    generator = torch.Generator().manual_seed(0)
    names = [*SHAPES, "tall again"]
    params = random_params([*SHAPES.values(), SHAPES["tall"]], generator)
    optimizer = Muon(params, lr=0.1, weight_decay=0.5, momentum=0.9)
    weights = [p.detach().double() for p in params]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step in range(4):
        if step == 2 and changed_momentum is not None:
            for group in optimizer.param_groups:
                group["momentum"] = changed_momentum
        beta = optimizer.param_groups[0]["momentum"]
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator)
            weights[i], momenta[i] = reference_step(
                weights[i], momenta[i], p.grad.double(), 0.1, 0.5, beta
            )
        optimizer.step()
    for name, p, weight in zip(names, params, weights, strict=True):
        distance = (p.double() - weight).norm() / (4 * 0.1 * min(p.shape) ** 0.5)
        assert distance < 0.15, f"{name}: off by {distance:.3f} of the distance covered"


def test_zero_gradient_only_decays_the_weights():
    p = torch.nn.Parameter(torch.ones(8, 8))
    p.grad = torch.zeros(8, 8)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((8, 8), 0.95))


def test_saved_state_continues_bit_for_bit():
    def run(reload_at: int | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        params = random_params(SHAPES.values(), generator)
        optimizer = Muon(params, lr=0.1)
        for step in range(4):
            if step == reload_at:
                saved = optimizer.state_dict()
                optimizer = Muon(params, lr=0.7)
                optimizer.load_state_dict(saved)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in params])

    assert torch.equal(run(None), run(2))


def test_muon_rejects_a_vector():
    with pytest.raises(AssertionError, match=r"\(8,\)"):
        Muon([torch.nn.Parameter(torch.ones(8))], lr=0.1)


# ---- optimizer groups


@pytest.fixture
def model():
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    extras = {"subwords": 9, "value_embed": True, "canon": 3, "n_image_positions": 4}
    return Llama(ModelConfig(**shape, d_ff=64, seq_len=16, **extras))


def names_in(optimizer, model) -> list[list[str]]:
    """Parameter names of each group of an optimizer."""
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def test_every_parameter_is_in_exactly_one_group(model):
    groups = [
        g
        for optimizer in build_optimizers(model, **LEARNING_RATES)
        for g in names_in(optimizer, model)
    ]
    names = [name for name, _ in model.named_parameters()]
    assert sorted(name for group in groups for name in group) == sorted(names)


def test_muon_gets_the_projections_of_the_blocks(model):
    muon, _ = build_optimizers(model, **LEARNING_RATES)
    names = [name for group in names_in(muon, model) for name in group]
    projections = ["q", "k", "v", "o", "v_embed", "up", "down"]
    assert sorted(name.split(".")[-2] for name in names) == sorted(
        2 * [f"{p}_proj" for p in projections]
    )


def test_subwords_have_their_own_group(model):
    _, adamw = build_optimizers(model, **LEARNING_RATES)
    assert names_in(adamw, model)[1] == ["subwords.weight"]


def test_muon_groups_have_their_settings(model):
    muon, _ = build_optimizers(model, **LEARNING_RATES)
    settings = {
        (g["lr"], g["peak_lr"], g["weight_decay"], g["momentum"]) for g in muon.param_groups
    }
    assert settings == {(0.02, 0.02, 0.1, 0.95)}


@pytest.mark.parametrize(("group", "lr"), [(0, 0.005), (1, 0.0015)], ids=["adamw", "subwords"])
def test_adamw_groups_have_their_settings(model, group, lr):
    _, adamw = build_optimizers(model, **LEARNING_RATES)
    g = adamw.param_groups[group]
    assert (g["lr"], g["peak_lr"], g["weight_decay"], g["betas"]) == (lr, lr, 0.2, (0.9, 0.97))


def test_a_parameter_without_a_group_is_named(model):
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="extra"):
        build_optimizers(model, **LEARNING_RATES)
