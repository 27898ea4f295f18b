"""Choosing device, dtype and compilation."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from common import device as module
from common.config import UserError
from common.device import (
    fitting_sequences,
    has_fast_bfloat16,
    matmul_flops,
    resolve_compile,
    resolve_device,
)
from model import Llama, ModelConfig

CPU = torch.device("cpu")
DAY = 1e16  # FLOPs that take more than a day on a laptop


def speeds(monkeypatch, bfloat16: float, float32: float) -> None:
    measured = {"bfloat16": bfloat16, "float32": float32}
    monkeypatch.setattr(module, "matmul_flops", lambda device, dtype, n_threads=0: measured[dtype])


def capabilities(monkeypatch, **found: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


# ---- device
def test_auto_takes_the_accelerator_that_torch_finds(monkeypatch):
    found = torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(module, "select_device", lambda device: None)
    cfg = SimpleNamespace(device="auto", dtype="float32")
    assert (resolve_device(cfg).type, cfg.device) == ("meta", "meta")


def test_auto_takes_the_cpu_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    cfg = SimpleNamespace(device="auto", dtype="float32")
    assert (resolve_device(cfg), cfg.device) == (CPU, "cpu")


def test_each_process_gets_a_device_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    module.select_device(torch.device("cuda"))
    assert chosen == [3]


def test_more_processes_than_devices_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes .* 2 cuda devices; pass --nproc_per_node=2"):
        module.select_device(torch.device("cuda"))


def test_a_device_that_is_not_there_is_an_error_with_or_without_torchrun(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(UserError, match="--device cuda cannot be used: PyTorch finds no cuda dev"):
        resolve_device(SimpleNamespace(device="cuda", dtype="float32"))


# ---- dtype
@pytest.mark.parametrize(
    "name, fast, expected",
    [
        ("avx512_bf16", True, True),
        ("amx_bf16", True, True),
        ("avx512_bf16", False, False),  # Intel without AMX
        ("avx2", True, False),  # emulated
    ],
)
def test_a_cpu_computes_in_bf16_if_that_is_native_and_faster(monkeypatch, name, fast, expected):
    capabilities(monkeypatch, **{name: True})
    speeds(monkeypatch, bfloat16=2e11 if fast else 5e10, float32=1e11)
    assert has_fast_bfloat16(CPU) == expected


@pytest.mark.parametrize("fast, dtype", [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_is_the_faster_one(monkeypatch, fast, dtype):
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda device: fast)
    cfg = SimpleNamespace(device="cpu", dtype="auto")
    resolve_device(cfg)
    assert cfg.dtype == dtype


def test_measuring_a_matrix_product_leaves_the_number_of_threads():
    before = torch.get_num_threads()
    assert matmul_flops(CPU, "float32", n_threads=before + 1) > 0
    assert torch.get_num_threads() == before


# ---- memory
def saved_bytes(config: ModelConfig) -> int:
    """Memory that a forward pass of one sequence keeps for the backward pass."""
    model, sizes = Llama(config), {}
    model.init_weights()
    x = torch.arange(config.seq_len)[None]

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = model(x, x)  # keeps the tensors alive, so their addresses differ
    assert loss > 0
    return sum(sizes.values())


def test_sequences_that_fit_a_gpu_leave_room_for_the_pointer(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 10**9))
    shape = {"vocab_size": 1024, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 16}
    plain = ModelConfig(n_layers=1, seq_len=1024, **shape)
    sides, gpu = (plain, replace(plain, pointer=8)), torch.device("cuda")
    kept = [saved_bytes(config) for config in sides]
    fitting = [
        fitting_sequences(SimpleNamespace(model=config, dtype="float32"), gpu) for config in sides
    ]
    without, with_pointer = (0.6e9 / n for n in fitting)  # bytes per sequence
    more = kept[1] - kept[0]  # the backward pass adds gradients as large as what was kept
    assert more < with_pointer - without < 3 * more


# ---- compilation
@pytest.mark.parametrize("flops, n_layers, expected", [(DAY, 6, True), (1e12, 6, False)])
def test_a_cpu_compiles_if_training_is_long_enough(monkeypatch, flops, n_layers, expected):
    speeds(monkeypatch, bfloat16=1e11, float32=1e11)
    cfg = SimpleNamespace(compile="auto", dtype="float32")
    resolve_compile(cfg, CPU, flops, n_layers)
    assert cfg.compile == expected


def test_without_a_compiler_a_line_says_so_and_training_is_not_compiled(monkeypatch, capsys):
    def missing():
        raise InvalidCxxCompiler

    speeds(monkeypatch, bfloat16=1e11, float32=1e11)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    cfg = SimpleNamespace(compile="auto", dtype="float32")
    resolve_compile(cfg, CPU, DAY, 6)
    assert cfg.compile is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "no C++ compiler found: training without torch.compile, which is slower"


@pytest.mark.parametrize("choice", [True, False])
def test_a_choice_is_kept(choice):
    cfg = SimpleNamespace(compile=choice, dtype="float32")
    resolve_compile(cfg, CPU, DAY, 6)
    assert cfg.compile is choice
