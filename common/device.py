"""The device: choosing it, its name, memory and speed. All device-specific calls are here."""

import math
import os
import platform
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

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

# Training on a CPU, docs/LOG.md 2026-11-28: speed without compilation as a fraction of that of
# large matrix products, the fraction of the time that compilation saves, and seconds to compile a
# layer.
CPU_EFFICIENCY = 0.6
COMPILE_GAIN = 0.2
COMPILE_SECONDS = 6.0


def resolve_device(cfg) -> torch.device:
    """The device of cfg; replaces `auto` in cfg.device and cfg.dtype.

    Of several processes on a machine, each gets a device of its own. Raises UserError if the device
    cannot be used.
    """
    if cfg.device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        cfg.device = found.type if found else "cpu"
    try:
        device = torch.device(cfg.device)
        if device.type != "cpu" and device.index is None:
            select_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(
            f"--device {cfg.device} cannot be used: {reason}; try --device cpu"
        ) from error
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if has_fast_bfloat16(device) else "float32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    return device


def select_device(device: torch.device) -> None:
    """Make the device of this process's local rank the current one.

    Raises UserError, or RuntimeError if there is no device.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    available = torch.accelerator.device_count()
    if not available:
        raise RuntimeError(f"PyTorch finds no {device.type} device")
    if processes > available:
        raise UserError(
            f"torchrun started {processes} processes on this machine, but it has {available} "
            f"{device.type} devices; pass --nproc_per_node={available}"
        )
    torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bf16 in hardware, and no slower than fp32.

    Emulated bf16, as on a T4, is slower. So is that of Intel CPUs with AVX512-BF16 but without AMX
    (0.5 times the speed of fp32), while AMD's is faster, docs/LOG.md 2026-11-28.
    """
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.12 and later
        if not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16")):
            return False
        # one thread, because several wait for each other if the machine is busy
        speeds = [matmul_flops(device, dtype, n_threads=1) for dtype in ("bfloat16", "float32")]
        return speeds[0] > speeds[1]
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    module = torch.get_device_module(device)  # CUDA, ROCm (also named cuda) and XPU
    return module.is_bf16_supported(including_emulation=False)


def device_name(device: torch.device) -> str:
    if device.type != "cpu":
        get_name = getattr(torch.get_device_module(device), "get_device_name", None)
        return get_name(device) if get_name else device.type
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    model = models[0] if models else platform.machine()
    return f"{device.type} ({model}, {torch.get_num_threads()} threads)"


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in 10^9 bytes: GPU memory on a GPU, else its resident set.

    NaN if the system does not report it (Windows).
    """
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.max_memory_allocated() / 1e9
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
    if device.type not in ("cuda", "xpu"):
        return 1024 / m.seq_len  # more outgrows a CPU's caches, docs/LOG.md
    # activations kept for the backward pass, measured at 88M parameters
    floats = m.seq_len * m.n_layers * (20 * m.d_model + 4 * m.d_ff)
    size = floats * torch.finfo(getattr(torch, cfg.dtype)).bits / 8
    if m.pointer:  # the backward pass holds five (seq_len, seq_len) matrices in fp32 at its peak
        size += 5 * 4 * m.seq_len**2
    _, memory = torch.accelerator.get_memory_info()
    return 0.6 * memory / size


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of the device in this dtype, or None where it is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if re.search(rf"\b{key}\b", name)), None)


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory from which a GPU copies without making the host wait."""
    return x.pin_memory() if device.type == "cuda" else x


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host does not wait for a copy from pinned memory."""
    return x.to(device, non_blocking=device.type == "cuda")


@cache
def matmul_flops(device: torch.device, dtype: str, n_threads: int | None = None) -> float:
    """Speed of matrix products on the device in FLOP/s: the best of many short ones, because other
    work on the machine interrupts some of them. On a CPU n_threads limits the threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads or before)
    x = torch.randn(512, 512, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(40):
        clock = Clock(device)
        clock.start()
        x @ x
        clock.stop()
        seconds.append(clock.seconds)
    torch.set_num_threads(before)
    return 2 * 512**3 / min(seconds)


def resolve_compile(cfg, device: torch.device, flops: float, n_layers: int) -> None:
    """Replace `auto` in cfg.compile, for training that takes `flops` FLOPs.

    On a CPU, compiling has to repay itself, and it needs a C++ compiler.
    """
    if cfg.compile != "auto":
        return
    cfg.compile = device.type == "cuda"
    if device.type == "cpu":
        seconds = training_seconds(device, cfg.dtype, flops)
        cfg.compile = COMPILE_GAIN * seconds > COMPILE_SECONDS * n_layers and has_compiler()


def training_seconds(device: torch.device, dtype: str, flops: float) -> float:
    """Estimate of how long training takes on a CPU, without compilation."""
    return flops / (CPU_EFFICIENCY * matmul_flops(device, dtype))


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler; prints a line if it does not."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        print("no C++ compiler found: training without torch.compile, which is slower", flush=True)
        return False
    return True


def record_kernels(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run a step and return a function that runs it again.

    On a CUDA GPU it replays the step's kernels (a CUDA graph), which takes one launch instead of
    one per kernel. The step must not wait for the device, and what it reads and writes must stay at
    its address. On other devices it is the step itself.
    """
    if device.type != "cuda":
        step()
        return step
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()  # loads libraries and allocates workspaces, which a capture must not do
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a thread that prepares batches may allocate memory meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    return graph.replay


class Clock:
    """Seconds between start() and stop(), accumulated; waits for the device's work to finish."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.device, self.seconds, self.started = device, seconds, None

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.started = self.now()

    def stop(self) -> None:
        if self.started is not None:
            self.seconds += self.now() - self.started
        self.started = None
