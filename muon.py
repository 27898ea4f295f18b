"""Muon: update a matrix by its orthogonalized momentum (kellerjordan.github.io/posts/muon).

Each projection of a block is a separate matrix and is orthogonalized on its own, because the polar
factor of stacked matrices is not the stack of their polar factors. Weights of the same shape are
updated as one batch. AdamW updates all other parameters.

Shapes: N matrices of a batch, R rows, C columns.
"""

import torch
from torch import Tensor, nn

# Polar Express (arXiv 2505.16932): odd quintic polynomials, each optimal for the interval of
# singular values that the previous one leaves. They include the paper's safety factor of 1.02,
# which the normalization in `orthogonalize` applies too.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# Optimizer groups by the ending of the parameter name: Muon, then AdamW with two learning rates
GROUPS = {
    "muon": ("_proj.weight",),
    "adamw": ("embed.weight", "image_positions.weight", "norm.weight", "canon.weight"),
    "subwords": ("subwords.weight",),
}


# ---- update


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate the polar factor UV^T of each matrix USV^T in a batch (N, R, C), R <= C.

    The singular values of the result are about 0.7 to 1.2; those that were below about 1e-3 of the
    Frobenius norm are still smaller. A zero matrix stays zero. The result has the input's dtype.
    """
    assert matrices.shape[-2] <= matrices.shape[-1], (
        f"{tuple(matrices.shape)} is tall; transpose it"
    )
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in COEFFICIENTS:  # x <- a x + (b x x^T + c (x x^T)^2) x, (N, R, C)
        gram = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def muon_update(grads: Tensor, momentum: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Average grads into momentum (N, R, C) in place; return orthogonalized Nesterov momentum."""
    momentum.lerp_(grads, 1 - beta)
    return orthogonalize(grads.lerp(momentum, beta).to(dtype)).to(grads.dtype)


def wide(matrix: Tensor) -> Tensor:
    """The matrix, transposed if it has more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


# ---- optimizer


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay.

    Args:
        params: 2-D weights; those of the same shape up to transposition are updated as one batch.
        lr: step size; an update has singular values near lr, times sqrt(R / C) for a tall matrix.
        weight_decay: each step multiplies the weights by 1 - lr * weight_decay.
        momentum: decay of the gradient average; `group["momentum"]` may be changed between steps.
        dtype: precision of the orthogonalization; bf16 is enough where it is fast. The momentum
            keeps the dtype of the weights.
        compile: compile the update with torch.compile.
    """

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ):
        shapes: dict[tuple, list] = {}
        for p in params:
            assert p.ndim == 2, f"Muon updates matrices, not a parameter of shape {tuple(p.shape)}"
            shapes.setdefault(tuple(wide(p).shape), []).append(p)
        groups = [{"params": batch} for batch in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        self.update = (
            torch.compile(muon_update, dynamic=False, fullgraph=True) if compile else muon_update
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            grads = torch.stack([wide(p.grad) for p in params])  # (N, R, C)
            state = self.state[params[0]]  # the batch's momentum is kept with its first weight
            if not state:
                state["momentum"] = torch.zeros_like(grads)
            beta = torch.tensor(group["momentum"])  # a tensor, so a new value does not recompile
            update = self.update(grads, state["momentum"], beta, self.dtype)  # (N, R, C)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            for p, u in zip(params, update, strict=True):
                R, C = p.shape
                p.add_(u if R <= C else u.mT, alpha=-lr * max(1, R / C) ** 0.5)


def build_optimizers(
    model: nn.Module,
    *,
    muon_lr: float,
    muon_wd: float,
    adamw_lr: float,
    adamw_wd: float,
    adamw_beta2: float,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> list[torch.optim.Optimizer]:
    """[Muon for the projections in model.blocks, AdamW for all other parameters of a Llama].

    Each group keeps its learning rate as `group["peak_lr"]`. `dtype` and `compile` are Muon's.
    Raises AssertionError if a parameter belongs to no group or to several.
    """
    params = dict(model.named_parameters())
    names = {group: [n for n in params if n.endswith(GROUPS[group])] for group in GROUPS}
    misplaced = [n for n in params if sum(n in group for group in names.values()) != 1]
    assert not misplaced, f"parameters that are not in exactly one optimizer group: {misplaced}"

    muon = Muon(
        [params[n] for n in names["muon"]],
        lr=muon_lr,
        weight_decay=muon_wd,
        dtype=dtype,
        compile=compile,
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [params[n] for n in names["adamw"]]},
            # 0.3: a token has about seven subwords, which move it together; best of 0.1, 0.3 and
            # 1 at 250,000 tokens, docs/LOG.md 2026-11-24
            {"params": [params[n] for n in names["subwords"]], "lr": 0.3 * adamw_lr},
        ],
        lr=adamw_lr,
        weight_decay=adamw_wd,
        betas=(0.9, adamw_beta2),
        eps=1e-10,  # gradients of rare tokens are about 1e-6; 1e-8 would shorten their steps
        fused=True,
    )
    for group in muon.param_groups + adamw.param_groups:
        group["peak_lr"] = group["lr"]
    return [muon, adamw]
