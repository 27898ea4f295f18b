"""What a training step must not do: wait for the device, compile again, collect garbage."""

import gc
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import MODULES, STAGES, train_stage
from torch import Tensor
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

BATCH = {"llm": ("tokens", 128), "vqvae": ("images", 8), "multimodal": ("sequences", 8)}


@pytest.fixture
def train(workdir):
    """Trains a stage for a number of steps, with an evaluation at the end only."""

    def run(stage: str, steps: int, **changes) -> dict:
        budget, per_step = BATCH[stage]
        if stage == "multimodal" and not Path("runs/codes").exists():
            train_stage(MODULES["vqvae"], run="codes", images=16)
        if stage == "multimodal":
            changes |= {"vqvae": "codes"}
        once = {"log_every": steps, "save_every": 0, "eval_every": 0}
        settings = {budget: per_step * steps, "warmup_frac": 0, "cooldown_frac": 0} | once
        return train_stage(MODULES[stage], **settings | {"run": f"{stage}-{steps}"} | changes)

    return run


# ---- synchronization
# On a GPU the host waits for the value of the first, and for the size of the result of the others.
OPS = ["_local_scalar_dense", "equal", "is_nonzero", "nonzero", "_unique2", "bincount"]
OPS += ["masked_select"]
READS = [Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu]  # some of them call no operator


class Operators(TorchDispatchMode):
    """Counts operators for which the host waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.n = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(i is not None and i.dtype == torch.bool for i in indices)
        self.n[name] += name in OPS or masked
        return func(*args, **kwargs or {})


class Reads(TorchFunctionMode):
    """Counts the methods of tensors that bring values to the host."""

    def __init__(self):
        super().__init__()
        self.n = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.n[getattr(func, "__name__", "")] += func in READS
        return func(*args, **kwargs or {})


def waits(train, stage: str, steps: int, **changes) -> Counter:
    """How often a run of `steps` steps waits for the device, by the reason."""
    with Operators() as operators, Reads() as reads:
        train(stage, steps, **changes)
    return +(operators.n + reads.n)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_never_waits_for_the_device(train, stage):
    changes = {"revive_every": 3} if stage == "vqvae" else {}
    if stage == "multimodal":
        train(stage, 12, run="first")  # caches the image tokens
    six, twelve = (waits(train, stage, steps, **changes) for steps in (6, 12))
    assert six["tolist"] > 0  # the evaluation and the numbers of the last step
    assert twelve == six


READ = {
    "item": lambda loss: loss.item(),
    "tolist": lambda loss: loss.tolist(),
    "float": float,
    "if": bool,
    "numpy": lambda loss: loss.numpy(),
    "cpu": lambda loss: loss.cpu(),
    "boolean mask": lambda loss: loss[loss > 0],
    "unique": lambda loss: loss.unique(),
    "nonzero": lambda loss: loss.nonzero(),
    "bincount": lambda loss: loss.int().bincount(),
}


@pytest.mark.parametrize("name", READ)
def test_reading_a_loss_counts_as_waiting(name):
    with Operators() as operators, Reads() as reads:
        READ[name](torch.ones(1))
    assert (operators.n + reads.n).total() > 0


# ---- compilation
UNEVEN = {
    "llm": {"eval_tokens": 32 * 5, "micro_batch": 2},
    "vqvae": {"micro_batch": 4, "eval_images": 10},
    "multimodal": {"eval_sequences": 7, "micro_batch": 3},
}


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_compiled_after_the_warm_up(train, stage, monkeypatch):
    module, compiled = MODULES[stage], []
    training_loop = module.training_loop

    @contextmanager
    def counted(*args, **kwargs):
        compiled.append(counters["stats"]["unique_graphs"])
        with training_loop(*args, **kwargs) as after_step:
            yield after_step
        compiled.append(counters["stats"]["unique_graphs"])

    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(module, "training_loop", counted)
    train(stage, 6, compile="true", eval_every=0.5, **UNEVEN[stage])
    assert 0 < compiled[0] == compiled[1]
    assert not counters["graph_break"]


# ---- garbage collection
def test_garbage_is_not_collected_between_steps(train, monkeypatch):
    module, enabled = MODULES["vqvae"], []
    update = module.update

    def observed(*args):
        enabled.append(gc.isenabled())
        update(*args)

    monkeypatch.setattr(module, "update", observed)
    train("vqvae", 2)
    assert enabled == [False, False]
    assert gc.isenabled()


def test_garbage_is_collected_again_after_an_error(train, monkeypatch):
    def failing(*args):
        raise RuntimeError("failed on purpose")

    monkeypatch.setattr(MODULES["vqvae"], "update", failing)
    with pytest.raises(RuntimeError, match="failed on purpose"):
        train("vqvae", 2)
    assert gc.isenabled()
