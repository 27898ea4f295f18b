"""Muon: update a matrix by its orthogonalized momentum (kellerjordan.github.io/posts/muon).

Each projection of a block is a separate matrix and is orthogonalized on its own, because the polar
factor of stacked matrices is not the stack of their polar factors. Weights of the same shape are
updated as one batch, which is divided among the ranks of torch.distributed. AdamW updates all other
parameters.

Shapes: N matrices of a batch, R rows, C columns.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    "adamw": (
        "embed.weight",
        "image_positions.weight",
        "norm.weight",
        "canon.weight",
        "sentinel.weight",
    ),
    "subwords": ("subwords.weight",),
}


# ---- update


def polynomial_groups(R: int, C: int, dtype: torch.dtype) -> list[tuple]:
    """COEFFICIENTS, divided into groups of polynomials that share one Gram matrix.

    A Gram matrix x x^T and the product with x cost 4 R^2 C FLOPs; updating the Gram matrix and the
    product of the factors instead costs 6 R^3, which pays for wide matrices. But rounding gives a
    Gram matrix wrong and even negative eigenvalues, and each polynomial amplifies them. Measured on
    the momenta of a training run: in fp32, one group of five changes the result by 0.2%. In bf16,
    groups of 1, 2 and 2 are as accurate as single polynomials (singular values up to 1.16); with
    2 and 3, singular values reach 7, and with 2, 2 and 1, 45,000.
    """
    if 2 * C < 3 * R:
        return [(polynomial,) for polynomial in COEFFICIENTS]
    if dtype == torch.bfloat16:
        return [COEFFICIENTS[:1], COEFFICIENTS[1:3], COEFFICIENTS[3:]]
    return [COEFFICIENTS]


def factor(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a I + b A + c A^2 for each Gram matrix A = x x^T of a batch (N, R, R).

    Its product with x is the polynomial a x + b x^3 + c x^5 of the singular values.
    """
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # (N, R, R)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate the polar factor UV^T of each matrix USV^T in a batch (N, R, C), R <= C.

    The singular values of the result are about 0.7 to 1.2; those that were below about 1e-3 of the
    Frobenius norm are still smaller. A zero matrix stays zero. The result has the input's dtype.
    """
    R, C = matrices.shape[-2:]
    assert R <= C, f"{tuple(matrices.shape)} is tall; transpose it"
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for first, *others in polynomial_groups(R, C, x.dtype):
        gram = x @ x.mT  # (N, R, R)
        last = product = factor(gram, *first)  # (N, R, R)
        for polynomial in others:
            gram = last @ gram @ last  # (N, R, R), Gram matrix of product @ x
            last = factor(gram, *polynomial)  # (N, R, R)
            product = last @ product  # (N, R, R)
        x = product @ x  # (N, R, C)
    return x


def orthogonalize_across_ranks(orthogonalize, matrices: Tensor) -> Tensor:
    """orthogonalize(matrices) for matrices (N, R, C) that all ranks hold; each computes a part."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return orthogonalize(matrices)
    N, n_ranks = len(matrices), dist.get_world_size()
    size = -(-N // n_ranks)  # matrices per rank; the last ranks may get zeros
    padded = F.pad(matrices, (0, 0, 0, 0, 0, size * n_ranks - N))  # (size * n_ranks, R, C)
    part = orthogonalize(padded[dist.get_rank() * size :][:size])  # (size, R, C)
    gathered = torch.empty_like(padded)
    dist.all_gather(list(gathered.split(size)), part)
    return gathered[:N]  # (N, R, C)


def average(
    grads: Tensor, momentum: Tensor, beta: Tensor, found_inf: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """New momentum and Nesterov momentum in dtype, (N, R, C) each.

    If found_inf () is 1, they are the old momentum and zero.
    """
    skip = found_inf > 0
    new = torch.where(skip, momentum, momentum.lerp(grads, 1 - beta))  # (N, R, C)
    return new, grads.lerp(new, beta).masked_fill(skip, 0).to(dtype)


def wide(matrix: Tensor) -> Tensor:
    """The matrix, transposed if it has more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


# ---- optimizer


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay.

    As for torch's fused AdamW, the attribute `found_inf` may hold a float tensor () on the device
    of the weights: if it is 1, a step changes neither weights nor momentum. A step never waits for
    the device. With several ranks, all must hold the same weights and gradients: each
    orthogonalizes its part of every batch, but keeps the momentum of all matrices. If that
    communication fails, weights and momentum are still those from before the step.

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
        self.average, self.orthogonalize = average, orthogonalize
        if compile:
            self.average = torch.compile(average, dynamic=False, fullgraph=True)
            self.orthogonalize = torch.compile(orthogonalize, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self) -> None:
        device = self.param_groups[0]["params"][0].device
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            found_inf = torch.zeros((), device=device)

        results = []  # computed for all groups first, so a failing collective changes nothing
        for group in self.param_groups:
            params = group["params"]
            grads = torch.stack([wide(p.grad) for p in params])  # (N, R, C)
            state = self.state.get(params[0])  # the batch's momentum is kept with its first weight
            momentum = state["momentum"] if state else torch.zeros_like(grads)
            # a tensor, so a new value does not recompile; filled on the device, so nothing waits
            beta = torch.full((), group["momentum"], dtype=grads.dtype, device=device)
            momentum, nesterov = self.average(grads, momentum, beta, found_inf, self.dtype)
            update = orthogonalize_across_ranks(self.orthogonalize, nesterov)  # (N, R, C)
            results.append((momentum, update))

        for group, (momentum, update) in zip(self.param_groups, results, strict=True):
            params, lr = group["params"], group["lr"]
            self.state[params[0]]["momentum"] = momentum
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"] * (1 - found_inf))
            for p, u in zip(params, update.to(momentum.dtype), strict=True):
                R, C = p.shape
                p.add_(u if R <= C else u.mT, alpha=-lr * max(1, R / C) ** 0.5)


def build_optimizers(
    model: nn.Module,
    *,
    muon_lr: float,
    muon_wd: float,
    muon_momentum: float = 0.95,
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
        momentum=muon_momentum,
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
