import pytest
import torch

from model import Llama, ModelConfig
from muon import Muon, build_optimizers, orthogonalize

SHAPES = {"wide": (24, 64), "tall": (64, 24), "square": (48, 48)}


def reference_step(weight, momentum, grad, lr, wd, beta):
    """Muon in float64, one matrix at a time, the polar factor from the SVD: new weight and momentum."""
    momentum = beta * momentum + (1 - beta) * grad
    u, _, vt = torch.linalg.svd(beta * momentum + (1 - beta) * grad, full_matrices=False)
    scale = max(1, grad.shape[0] / grad.shape[1]) ** 0.5
    return weight * (1 - lr * wd) - lr * scale * u @ vt, momentum


@pytest.mark.parametrize("shape", [(24, 64), (64, 256), (48, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_out_near_one(shape, dtype):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = torch.linalg.svdvals(orthogonalize(x).double())
    if shape[0] < shape[1]:
        assert values.min() > 0.6 and values.max() < 1.3
    else:  # the smallest of a square matrix are too small for five iterations
        assert 0.7 < values.median() < 1.3 and values.max() < 1.3


def test_direction_is_that_of_the_polar_factor():
    x = torch.randn(1, 24, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(orthogonalize(x), u @ vt, atol=0.06, rtol=0)


def test_steps_follow_a_float64_reference():
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in [*SHAPES.values(), (64, 24)]
    ]
    optimizer = Muon(params, lr=0.1, weight_decay=0.5, momentum=0.9)
    assert len(optimizer.param_groups) == 2  # wide and tall together, the square one alone
    expected = [(p.detach().double(), torch.zeros_like(p, dtype=torch.float64)) for p in params]
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        expected = [
            reference_step(w, m, p.grad.double(), 0.1, 0.5, 0.9)
            for (w, m), p in zip(expected, params)
        ]
        optimizer.step()
    for (weight, _), p, name in zip(expected, params, [*SHAPES, "tall again"]):
        distance = (p.double() - weight).norm() / (4 * 0.1 * min(p.shape) ** 0.5)
        assert distance < 0.15, f"{name}: {distance:.3f} of the way gone"


def test_zero_gradient_changes_nothing_but_by_decay():
    p = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = Muon([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros(8, 8)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((8, 8), 0.95))


def test_state_survives_saving():
    def run(stop: int | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES.values()
        ]
        optimizer = Muon(params, lr=0.1)
        for step in range(4):
            if step == stop:
                saved = optimizer.state_dict()
                optimizer = Muon(params, lr=0.7)
                optimizer.load_state_dict(saved)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in params])

    assert torch.equal(run(None), run(2))


def test_every_parameter_has_one_optimizer():
    model = Llama(
        ModelConfig(
            vocab_size=64,
            d_model=32,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            d_ff=64,
            seq_len=16,
            affixes=9,
            canon=3,
        )
    )
    muon, adamw = build_optimizers(
        model, muon_lr=0.02, muon_wd=0.1, adamw_lr=0.005, adamw_wd=0.2, adamw_beta2=0.97
    )
    names = {p: name for name, p in model.named_parameters()}
    in_muon = [names[p] for group in muon.param_groups for p in group["params"]]
    in_adamw = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted(in_muon + in_adamw) == sorted(names.values())
    assert len(in_muon) == 2 * 6 and all(name.endswith("_proj.weight") for name in in_muon)
    assert {group["peak_lr"] for group in muon.param_groups} == {0.02}
    assert [(g["peak_lr"], g["weight_decay"], g["betas"][1]) for g in adamw.param_groups] == [
        (0.005, 0.2, 0.97),
        (0.0015, 0.2, 0.97),
    ]
    assert [names[p] for p in adamw.param_groups[1]["params"]] == ["affixes.weight"]
