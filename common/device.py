"""The device: choosing it, its name, memory and speed. All device-specific calls are here."""

import math
import platform
import re
import time
from pathlib import Path

import torch

from common.config import UserError, first_line

# Dense bf16 tensor-core peaks in FLOP/s, from the vendors' data sheets.
PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "A10G": 70e12,
}


def resolve_device(cfg) -> torch.device:
    """The device of cfg; replaces `auto` in cfg.device, cfg.dtype and, if present, cfg.compile.

    Raises UserError if the device cannot be used.
    """
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(cfg.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(
            f"--device {cfg.device} cannot be used: {reason}; try --device cpu"
        ) from error
    if cfg.dtype == "auto":  # emulated bf16, as on a T4, is slower than fp32
        cuda = device.type == "cuda"
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.dtype = "bfloat16" if native else "float32"
    if getattr(cfg, "compile", None) == "auto":
        cfg.compile = device.type == "cuda"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    model = models[0] if models else platform.machine()
    return f"{device.type} ({model}, {torch.get_num_threads()} threads)"


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in 10^9 bytes: GPU memory on a GPU, else its resident set.

    NaN if the system does not report it (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss starts at the parent's resident set
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def fitting_sequences(cfg, device: torch.device) -> float:
    """Sequences of cfg.model per forward and backward pass: what fits a GPU, what suits a CPU."""
    m = cfg.model
    if device.type != "cuda":
        return 1024 / m.seq_len  # more outgrows a CPU's caches, docs/LOG.md
    # activations kept for the backward pass, measured at 88M parameters
    floats = m.seq_len * m.n_layers * (20 * m.d_model + 4 * m.d_ff)
    memory = torch.cuda.get_device_properties(device).total_memory
    return 0.6 * memory / (floats * torch.finfo(getattr(torch, cfg.dtype)).bits / 8)


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of the device in this dtype, or None where it is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if re.search(rf"\b{key}\b", name)), None)


def matmul_flops(device: torch.device) -> float:
    """Speed of fp32 matrix products on the device in FLOP/s, measured in a fraction of a second."""
    x = torch.randn(1024, 1024, device=device)
    x @ x
    start = time.perf_counter()
    for _ in range(5):
        x @ x
    return 5 * 2 * 1024**3 / (time.perf_counter() - start)


class Clock:
    """Seconds between start() and stop(), accumulated; waits for the device's work to finish."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.device, self.seconds, self.started = device, seconds, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.started = self.now()

    def stop(self) -> None:
        self.seconds += self.now() - self.started
