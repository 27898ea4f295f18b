"""The loss of a head with tens of thousands of outputs, without ever holding all of its logits."""

import torch
from torch import Tensor

CHUNK_LOGITS = (
    2**25
)  # the loss has this many logits at a time, 128 MB in fp32: large for a GPU, good on a CPU, docs/LOG.md


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear head, a slice of positions at a time.

    The gradients are taken in the forward pass, while a slice's logits are at hand: neither the (N, V) logits
    nor a second computation of them is needed. The idea is Liger Kernel's (arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        w = weight.to(h.dtype)
        train = ctx.needs_input_grad[0]
        grad_h = torch.empty_like(h) if train else None
        grad_w = torch.zeros_like(weight) if train else None
        total = torch.zeros((), device=h.device)
        rows = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(h), rows):
            part, target = h[start : start + rows], targets[start : start + rows, None]
            log_probs = (part @ w.T).log_softmax(-1, dtype=torch.float32)  # (rows, V)
            picked = log_probs.gather(1, target)
            total -= picked.sum()
            if train:
                grad = log_probs.exp_()  # softmax, then minus one at the target
                grad = grad.scatter_add_(1, target, torch.full_like(picked, -1.0)).to(h.dtype)
                grad_h[start : start + rows] = grad @ w
                grad_w += grad.T @ part
        ctx.save_for_backward(grad_h, grad_w)
        return total / len(h)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_h, grad_w = ctx.saved_tensors
        scale = grad_loss / len(grad_h)
        return grad_h * scale, grad_w * scale, None
