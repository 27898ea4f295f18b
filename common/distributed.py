"""Data parallelism over the processes that torchrun started, with PyTorch's process groups.

Every process (rank) holds the whole model and its optimizer and works on its share of each batch.
Gradients are averaged once per step, so all ranks make the same update. Rank 0 writes all files. On
one rank every function here returns its argument.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.config import UserError
from common.device import resolve_compile, resolve_device


def rank() -> int:
    """Number of this process, counted from 0."""
    return int(os.environ.get("RANK", 0))


def n_ranks() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(cfg) -> torch.device:
    """This process's device, see resolve_device, after it joined the others that torchrun started.

    Only rank 0 prints to standard output. Raises UserError.
    """
    device = resolve_device(cfg)
    if n_ranks() == 1:
        return device
    backends = {"cpu": "gloo", device.type: dist.get_default_backend_for_device(device)}
    dist.init_process_group(",".join(f"{name}:{value}" for name, value in backends.items()))
    cfg.dtype = same_on_all(cfg.dtype)  # a CPU measures which one is faster
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    return device


def agree_on_compile(cfg, device: torch.device, flops: float, n_layers: int) -> None:
    """resolve_compile, with the same result on all ranks: the warm-up exchanges updates too."""
    resolve_compile(cfg, device, flops, n_layers)
    cfg.compile = same_on_all(cfg.compile)


def check_divisible(cfg, setting: str, amount: int) -> None:
    """Raises UserError unless the items per step that a setting asks for divide among the ranks."""
    if amount % n_ranks():
        raise UserError(
            f"--{setting} {getattr(cfg, setting)} makes {amount} items per step, which "
            f"{n_ranks()} processes cannot share equally; set --nproc_per_node to a divisor"
        )


def share(items):
    """This rank's consecutive part of a list or tensor. Raises UserError if there are too few."""
    n = len(items)
    if n < n_ranks():
        raise UserError(
            f"{n} items cannot be divided among {n_ranks()} processes; lower --nproc_per_node, or "
            "evaluate on more data"
        )
    return items[rank() * n // n_ranks() : (rank() + 1) * n // n_ranks()]


def same_on_all(value):
    """Rank 0's value, a picklable object."""
    values = [value]
    if n_ranks() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def broadcast(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    if n_ranks() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def average(tensors: list[Tensor]) -> None:
    """Average tensors of one dtype over ranks, in place."""
    if n_ranks() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])  # one message instead of hundreds
    dist.all_reduce(flat)
    flat /= n_ranks()
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def gather(x: Tensor) -> Tensor:
    """The ranks' tensors (N, ...), all of one shape, as one tensor (n_ranks * N, ...)."""
    if n_ranks() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(n_ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def weighted_mean(values: list[float], weight: int) -> list[float]:
    """The mean of each value over all ranks, which count by their weights."""
    if n_ranks() == 1:
        return values
    sums = torch.tensor([*values, 1.0], dtype=torch.float64) * weight
    dist.all_reduce(sums)
    return (sums[:-1] / sums[-1]).tolist()


def largest(value: int) -> int:
    """The largest value of all ranks."""
    if n_ranks() == 1:
        return value
    values = torch.tensor([value])
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def leave_ranks() -> None:
    """Wait for all ranks, then leave them."""
    if n_ranks() > 1:
        dist.barrier()
        dist.destroy_process_group()


def is_lost_rank(error: Exception) -> bool:
    """Whether a collective operation failed because another rank has ended."""
    return n_ranks() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
