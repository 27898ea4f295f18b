"""Muon (Keller Jordan, kellerjordan.github.io/posts/muon): momentum, made orthogonal, as the update of a matrix.

Every projection of the blocks is one matrix: they are never fused, because the orthogonal factor of a stack
is not the stack of the factors. Weights of one shape are worked on as one batch. Everything else goes to AdamW.
"""

import torch
from torch import Tensor, nn

# Polar Express (arXiv 2505.16932): odd quintic polynomials, each the best for the interval that the one before leaves,
# with the paper's safety factor of 1.02, which the normalization below also takes into account.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The orthogonal polar factor UV^T of each matrix USV^T in a batch (N, rows, cols), rows <= cols.

    Singular values come out in about [0.7, 1.2], in the dtype given; those below some 1e-3 of the Frobenius norm
    are still on their way to 1. A zero matrix stays zero.
    """
    assert matrices.shape[-2] <= matrices.shape[-1], (
        f"{tuple(matrices.shape)} is tall: give the transpose"
    )
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a
        )  # ax + (b XX' + c (XX')^2) x
    return x


def muon_update(grads: Tensor, momentum: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Move momentum (N, rows, cols) towards grads, in place, and return its orthogonalized Nesterov look-ahead."""
    momentum.lerp_(grads, 1 - beta)
    return orthogonalize(grads.lerp(momentum, beta).to(dtype)).to(grads.dtype)


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if that has the fewer rows."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay.

    Args:
        params: 2-D weights; those that agree in shape up to transposition are updated as one batch.
        lr: length of a step; the update has singular values near 1, times sqrt(rows / cols) for a tall matrix.
        weight_decay: p shrinks by lr * weight_decay a step.
        momentum: decay of the gradient average.
        dtype: precision of the orthogonalization; bf16 is enough where it is fast, the state stays fp32.
        compile: compile the update.
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
            assert p.ndim == 2, f"Muon takes matrices, not shape {tuple(p.shape)}"
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
            grads = torch.stack([wide(p.grad) for p in params])  # (N, rows, cols)
            state = self.state[params[0]]  # one momentum for the batch, kept with its first weight
            if not state:
                state["momentum"] = torch.zeros_like(grads)
            beta = torch.tensor(
                group["momentum"]
            )  # a tensor, so that a new value compiles nothing anew
            update = self.update(grads, state["momentum"], beta, self.dtype)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            for p, u in zip(params, update):
                rows, cols = p.shape
                p.add_(u if rows <= cols else u.mT, alpha=-lr * max(1, rows / cols) ** 0.5)


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
) -> list:
    """[Muon over the projections in model.blocks, AdamW over all others]; each group remembers its peak_lr.

    Affixes take 0.3 of adamw_lr: a token has some seven, which move it together (0.1, 0.3 and 1 were tried, docs/LOG.md).
    """
    groups = {"muon": [], "affixes": [], "rest": []}
    for name, p in model.named_parameters():
        groups[
            "muon"
            if name.endswith("_proj.weight")
            else "affixes"
            if name == "affixes.weight"
            else "rest"
        ].append(p)
    optimizers = [
        Muon(groups["muon"], lr=muon_lr, weight_decay=muon_wd, dtype=dtype, compile=compile),
        # eps: with the default 1e-8 rarely seen tokens would move by less than they should (gradients are ~1e-6)
        torch.optim.AdamW(
            [{"params": groups["rest"]}, {"params": groups["affixes"], "lr": 0.3 * adamw_lr}],
            lr=adamw_lr,
            weight_decay=adamw_wd,
            betas=(0.9, adamw_beta2),
            eps=1e-10,
            fused=True,
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
