from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from model import Llama, ModelConfig
from muon import COEFFICIENTS, Muon, build_optimizers, orthogonalize

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


def set_random_grads(params, generator) -> None:
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def weights_after_steps(steps: int, found_inf=None) -> torch.Tensor:
    """All weights after some steps: batches of one, three and two matrices."""
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES.values(), SHAPES["tall"], (8, 8), (16, 48), (48, 16)]
    params = random_params([(8, 8), *shapes], generator)
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    optimizer.found_inf = found_inf
    for _ in range(steps):
        set_random_grads(params, generator)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


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


@pytest.mark.parametrize("shape", [(24, 64), (48, 48)], ids=["wide", "square"])
def test_orthogonalize_applies_the_polynomials_of_polar_express(shape):
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.norm(dim=1, keepdim=True) * 1.02 + 1e-6)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalize(x), (u * s[:, None]) @ vt)


@pytest.mark.parametrize("shape", [(64, 256), (64, 96), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [2, 3, 4, 9])
def test_no_singular_value_exceeds_1_2_when_they_decay(shape, dtype, decay):
    """Rounding errors of a Gram matrix exceed its smallest eigenvalues, as they do in training."""
    R, C = shape
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(8, R, R, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(8, C, R, generator=generator)).Q
    x = u * torch.logspace(0, -decay, R) @ v.mT  # singular values 1 to 10^-decay
    values = torch.linalg.svdvals(orthogonalize(x.to(dtype)).double())
    assert values.max() < 1.2


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 0.78), (torch.float32, 0.56)], ids=["bf16", "fp32"]
)
def test_sharing_gram_matrices_saves_matrix_products(dtype, limit):
    """Five polynomials of a 1:4 matrix, each from its own Gram matrix, cost 90 R^3."""
    R = 16
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.ones(3, R, 4 * R, dtype=dtype))
    assert counter.get_total_flops() < limit * 3 * 90 * R**3


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


@pytest.mark.parametrize("step", [0, 2], ids=["first step", "later step"])
def test_found_inf_skips_weights_and_momentum(step):
    generator = torch.Generator().manual_seed(0)
    optimizer = Muon(random_params(SHAPES.values(), generator), lr=0.1, weight_decay=0.5)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(step):
        set_random_grads(params, generator)
        optimizer.step()
    weights = [p.detach().clone() for p in params]
    momenta = [state["momentum"].clone() for state in optimizer.state.values()]
    params[0].grad = torch.full_like(params[0], torch.nan)
    params[1].grad = torch.full_like(params[1], torch.inf)
    params[2].grad = torch.ones_like(params[2])
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, params, weights))
    after = [state["momentum"] for state in optimizer.state.values()]
    expected = momenta or [torch.zeros_like(momentum) for momentum in after]
    assert all(map(torch.equal, after, expected))


def test_found_inf_of_zero_changes_nothing():
    assert torch.equal(weights_after_steps(3), weights_after_steps(3, found_inf=torch.zeros(())))


def test_a_step_reads_no_value_from_the_device():
    """Tensors on the meta device have no values: reading one raises."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES.values()]
    optimizer = Muon(params, lr=0.1, weight_decay=0.1)
    optimizer.found_inf = torch.zeros((), device="meta")
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()


def test_a_compiled_update_never_recompiles(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=counter))
    generator = torch.Generator().manual_seed(0)
    params = random_params(SHAPES.values(), generator)
    optimizer = Muon(params, lr=0.1, weight_decay=0.1, compile=True)
    set_random_grads(params, generator)
    optimizer.step()
    compiled = counter.frame_count
    assert compiled
    for step in range(3):
        set_random_grads(params, generator)
        optimizer.found_inf = torch.full((), float(step == 1))
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = 0.01 * step, 0.9 + 0.01 * step
        optimizer.step()
    assert counter.frame_count == compiled


def test_muon_rejects_a_vector():
    with pytest.raises(AssertionError, match=r"\(8,\)"):
        Muon([torch.nn.Parameter(torch.ones(8))], lr=0.1)


# ---- several ranks


def run_rank(rank: int, n_ranks: int, folder) -> None:
    store = dist.FileStore(str(folder / "store"), n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
    torch.save(weights_after_steps(3), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_make_the_steps_of_one(tmp_path):
    """Some batches have an odd number of matrices or only one."""
    torch.multiprocessing.start_processes(
        run_rank, args=(2, tmp_path), nprocs=2, start_method="fork"
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(*ranks)
    torch.testing.assert_close(ranks[0], weights_after_steps(3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n_ranks", "expected"), [(1, 5), (2, 3), (4, 2), (8, 1)])
def test_each_rank_orthogonalizes_its_share(n_ranks, expected, monkeypatch):
    sizes = []
    pretend_ranks(monkeypatch, n_ranks, gather=lambda parts, part: None)
    optimizer = Muon(random_params(5 * [(8, 16)], torch.Generator()), lr=0.1)
    optimizer.orthogonalize = lambda matrices: sizes.append(len(matrices)) or matrices
    set_random_grads(optimizer.param_groups[0]["params"], torch.Generator())
    optimizer.step()
    assert sizes == [expected]


def pretend_ranks(monkeypatch, n_ranks: int, gather) -> None:
    """Make torch.distributed look as on the first of several ranks."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: n_ranks)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_gather", gather)


@pytest.mark.parametrize("step", [0, 1], ids=["first step", "later step"])
def test_a_failed_collective_leaves_weights_and_momentum(step, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    params = random_params(SHAPES.values(), generator)
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    for _ in range(step):
        set_random_grads(params, generator)
        optimizer.step()
    weights = [p.detach().clone() for p in params]
    momenta = [state["momentum"].clone() for state in optimizer.state.values()]

    def fail_for_squares(parts, part):
        if part.shape[1] == part.shape[2]:  # the last group
            raise RuntimeError("connection closed by peer")

    pretend_ranks(monkeypatch, 2, fail_for_squares)
    set_random_grads(params, generator)
    with pytest.raises(RuntimeError, match="closed by peer"):
        optimizer.step()
    assert all(map(torch.equal, params, weights))
    assert all(map(torch.equal, momenta, [s["momentum"] for s in optimizer.state.values()]))


# ---- optimizer groups


@pytest.fixture
def model():
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    extras = {"subwords": 9, "value_embed": True, "canon": 3, "pointer": 8, "n_image_positions": 4}
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


def test_muon_gets_the_projections_of_the_blocks_and_the_pointer(model):
    muon, _ = build_optimizers(model, **LEARNING_RATES)
    names = [name for group in names_in(muon, model) for name in group]
    projections = ["q", "k", "v", "o", "v_embed", "up", "down"]
    assert sorted(name.split(".")[-2] for name in names) == sorted(
        f"{p}_proj" for p in 2 * projections + ["q", "k"]
    )


def test_adamw_gets_the_sentinel_of_the_pointer(model):
    _, adamw = build_optimizers(model, **LEARNING_RATES)
    assert "pointer.sentinel.weight" in names_in(adamw, model)[0]


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
