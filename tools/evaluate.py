"""Evaluate a language model on standard benchmarks with lm-evaluation-harness.

    python -m tools.evaluate NAME                      # a run, its folder or one of its checkpoints
    python -m tools.evaluate NAME --tasks piqa,sciq --limit 100
    python -m tools.evaluate NAME --tasks mine --include_path FOLDER    # tasks of your own

Needs requirements-extra.txt. The run is exported as tools/export_hf.py does and scored by the
harness's own code; nothing is generated. As in training, every text starts with an end-of-text
token. Results are added to evals.json in the run folder after each task.
"""

import difflib
import json
import logging
import os
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import transformers

from common.config import UserError, check_positive, first_line, redact, run_script
from common.device import device_name, resolve_device
from common.disk import file_sha256, sha256_of, write_text
from common.run import find_run
from data.hub import ALTERNATIVES, from_hub
from data.text import encode, end_of_text
from tools.export_hf import export
from tools.extras import require


class Pin(NamedTuple):
    """What a standard task must consist of, so that its results can be compared."""

    dataset: str
    revision: str  # commit on the hub
    version: float  # of the task in lm_eval: its prompts and metrics


ARC = "210d026faf9955653af8916fad021475a3f00453"
PINNED = {
    "hellaswag": Pin("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76", 1.0),
    "arc_easy": Pin("allenai/ai2_arc", ARC, 1.0),
    "arc_challenge": Pin("allenai/ai2_arc", ARC, 1.0),
    "piqa": Pin("baber/piqa", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1", 1.0),
    "lambada_openai": Pin(
        "EleutherAI/lambada_openai", "900124bf3b8235c6daf21033af9948b3f07346c4", 1.0
    ),
    "winogrande": Pin("allenai/winogrande", "01e74176c63542e6b0bcb004dcdea22d94fb67b5", 1.0),
    "openbookqa": Pin("allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", 1.0),
    "sciq": Pin("allenai/sciq", "2c94ad3e1aafab77146f384e23536f97a4849815", 1.0),
}
HUB_SECONDS = 60.0  # how long a failing request to the hub is repeated
BOOTSTRAP = 1000  # resamples for the standard error of a perplexity; it is then exact to 2%


@dataclass
class Config:
    """What to evaluate, and on which tasks."""

    run: str
    """Name of a run under runs/, a run folder or one of its checkpoints. Omitted: the newest
    run."""
    tasks: str = ",".join(PINNED)
    """Names of lm-evaluation-harness tasks, separated by commas."""
    include_path: str | None = None
    """Folder with task files of your own in the harness's YAML format. Relative paths of data files
    in them start at the current folder."""
    limit: int | None = None
    """Number of documents of each task to evaluate, to try it out. null: all of them."""
    batch_size: int = 16
    """Number of texts to evaluate at a time."""
    device: str = "auto"
    """Device: cpu, cuda, mps, ... auto: the accelerator that PyTorch finds, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 where the hardware computes it faster, otherwise float32."""


# ---- tasks
def find_tasks(tasks: str, include_path: str | None):
    """The harness's task manager and the names of the tasks. Downloads nothing.

    Raises UserError for a task that does not exist or differs from its pin, and for files in
    `include_path` that cannot be read.
    """
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    if include_path is not None:
        check_task_files(Path(include_path))
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= manager.task_index.keys():  # indexing the harness's tasks takes 10 seconds
        manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_subtasks:
            close = difflib.get_close_matches(name, manager.all_subtasks, n=1)
            remedy = "pass names of single tasks, and the folder of your own with --include_path"
            remedy = f"did you mean {close[0]}?" if close else remedy
            kind = "is a group of tasks" if name in manager.all_tasks else "is not a task"
            raise UserError(f"--tasks: {name!r} {kind} of lm_eval or --include_path; {remedy}")
        task = manager.task_index[name].cfg
        if task.get("output_type", "generate_until") == "generate_until":
            raise UserError(
                f"--tasks: {name} compares generated text, which this tool does not; pass tasks "
                "whose output_type is multiple_choice, loglikelihood or loglikelihood_rolling"
            )
        pin = PINNED.get(name)
        found = task.get("dataset_path"), (task.get("metadata") or {}).get("version")
        if pin and found != (pin.dataset, pin.version):
            raise UserError(
                f"task {name} has dataset {found[0]} and version {found[1]}, but results are only "
                f"comparable with {pin.dataset} and {pin.version}; install lm_eval as "
                "requirements-extra.txt says, and give tasks in --include_path other names"
            )
    return manager, names


def check_task_files(folder: Path) -> None:
    """Raises UserError unless the folder has task files, all readable; lm_eval skips others."""
    from lm_eval.tasks._yaml_loader import load_yaml

    files = sorted(folder.glob("**/*.yaml"))
    if not files:
        raise UserError(f"--include_path {folder} has no .yaml files; pass a folder of task files")
    for file in files:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # the parser raises many exception types
            reason = " ".join(str(error).split())
            raise UserError(f"task file {file} cannot be read: {reason}; correct it") from error


def load_task(manager, name: str):
    """A task with its data, which may be downloaded; a pinned task has its pinned revision.

    Raises UserError.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    file, pin = manager.task_index[name].yaml_path, PINNED.get(name)
    dataset = str(manager.task_index[name].cfg.get("dataset_path"))

    def load():
        task = load_yaml(file)
        if pin:
            options = task.get("dataset_kwargs") or {}
            task["dataset_kwargs"] = options | {"revision": pin.revision}
        return manager.load([task])["tasks"][name]

    try:
        if "/" in dataset and not Path(dataset).exists():
            task = from_hub(load, "data source", dataset, HUB_SECONDS)
        else:
            task = load()
    except UserError as error:
        text = str(error).replace(
            ALTERNATIVES["data source"], "pass --tasks with local data (--include_path)"
        )
        raise UserError(f"task {name}: {text}") from error
    except Exception as error:  # datasets, jinja2 and lm_eval raise many exception types
        reason = " ".join(first_line(error).split())
        raise UserError(
            f"task {name} in {file} cannot be loaded: {reason}; correct it (paths of data files "
            "start at the current folder)"
        ) from error
    files = [file["filename"] for split in task.dataset.values() for file in split.cache_files]
    if pin and not all(pin.revision in file for file in files):  # `datasets` falls back to those
        raise UserError(
            f"task {name}: the hub cannot be reached, and the cache has only another revision of "
            f"{dataset} than {pin.revision}; try again later"
        )
    return task


# ---- model
def harness_model(folder: Path, device: torch.device, seq_len: int, cfg: Config):
    """The harness's model for an exported run."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):
        """Tokenizes as in training, and remembers which inputs the context is too short for."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.truncated: set[tuple[str, str]] = set()

        def tok_encode(self, string: str, **options) -> list[int]:
            return encode(self.tokenizer, [string])[0]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            prompt, answer = super()._encode_pair(context, continuation)
            prompt = [self.prefix_token_id, *prompt]
            if len(answer) > self.max_length:
                raise UserError(
                    f"an answer has {len(answer)} tokens, but the model's context is "
                    f"{self.max_length}; omit its task, or pass a run with a larger model.seq_len"
                )
            if len(prompt) + len(answer) > self.max_length + 1:  # the last token is not an input
                self.truncated.add((context, continuation))
            return prompt, answer

    options = {"local_files_only": True, "trust_remote_code": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, cfg.dtype), **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    return Scorer(
        model.to(device),
        tokenizer=tokenizer,
        max_length=seq_len,
        batch_size=cfg.batch_size,
        prefix_token_id=end_of_text(tokenizer),
        softmax_dtype="float32",
    )


# ---- results
def evaluate(model, task, cfg: Config) -> dict:
    """The scores of a model on one task, and what they depend on."""
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    name = task.task_name
    task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"  # its worker processes would inherit our signal handlers
    with redirect_stdout(sys.stderr):  # the harness prints
        found = lm_eval.evaluate(
            model, {"tasks": {name: task}}, limit=cfg.limit, bootstrap_iters=BOOTSTRAP
        )
    samples, pin, version = found["samples"][name], PINNED.get(name), found["versions"][name]
    inputs = [arguments for sample in samples for arguments in sample["arguments"]]
    is_choice = task.OUTPUT_TYPE == "multiple_choice"
    return {
        "metrics": metrics_of(found["results"][name]),
        "random": sum(1 / len(s["resps"]) for s in samples) / len(samples) if is_choice else None,
        "documents": len(samples),
        "limit": cfg.limit if len(samples) < len(task.eval_docs) else None,
        "inputs": len(inputs),
        "truncated": sum(arguments in model.truncated for arguments in inputs),
        "num_fewshot": found["n-shot"][name],
        "task_version": version if isinstance(version, int | float) else None,
        "dataset": task.DATASET_PATH,
        "revision": pin.revision if pin else None,
        "inputs_sha256": sha256_of([inputs, [str(sample["target"]) for sample in samples]]),
        "device": device_name(model.device),
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": ["-m", "tools.evaluate", *map(redact, sys.argv[1:])],
    }


def metrics_of(scores: dict) -> dict[str, dict]:
    """{metric: {"value": ..., "stderr": ... or None}} of the harness's {"METRIC,FILTER": value}."""
    metrics = {}
    for key, value in scores.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = scores[f"{metric}_stderr,{filter_name}"]  # "N/A" for a single document
            error = stderr if isinstance(stderr, float) else None
            metrics[key.removesuffix(",none")] = {"value": value, "stderr": error}
    return metrics


def stored_results(path: Path) -> dict:
    """What is in evals.json, if it exists. Raises UserError if it is damaged."""
    if not path.exists():
        return {"tasks": {}}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if all("limit" in result for result in stored["tasks"].values()):
            return stored
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise UserError(f"{path} is damaged; delete it")


def store(path: Path, origin: dict, name: str, result: dict) -> None:
    """Add a task's result to evals.json.

    The file holds results of one origin (weights, versions, dtype); those of another are replaced.
    A result with a limit does not replace one of all documents.
    """
    stored = stored_results(path)
    old = stored.pop("tasks")
    kept = {task: r for task, r in old.items() if task != name} if stored == origin else {}
    lost = [r for task, r in old.items() if task not in kept]
    if result["limit"] is not None and any(r["limit"] is None for r in lost):
        print(f"{path} has results without --limit; keeping them instead of this one of {name}")
        return
    if old and stored != origin:
        print(f"{path} has results of other weights, versions or dtype; replacing them")
    write_text(path, json.dumps(origin | {"tasks": kept | {name: result}}, indent=1) + "\n")


def table(results: dict[str, dict]) -> str:
    """A line for each metric of each task."""
    rows = [("task", "metric", "value", "random", "documents")]
    for name, result in results.items():
        for metric, score in result["metrics"].items():
            form = ".4f" if score["value"] < 100 else ".4g"  # perplexities may be huge
            value = format(score["value"], form)
            value += "" if score["stderr"] is None else f" ± {score['stderr']:{form}}"
            chance = result["random"] if metric.startswith("acc") else None
            chance = "-" if chance is None else f"{chance:.4f}"
            rows.append((name, metric, value, chance, f"{result['documents']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---- script
def main(cfg: Config) -> dict:
    """Evaluate the tasks, write evals.json and print a table. Raises UserError."""
    check_positive(cfg, "batch_size", *(["limit"] if cfg.limit is not None else []))
    lm_eval, _ = require("lm_eval"), require("accelerate")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    run, checkpoint, config = find_run(cfg.run)
    stored_results(run / "evals.json")
    manager, names = find_tasks(cfg.tasks, cfg.include_path)
    device = resolve_device(cfg)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        exported = export(str(checkpoint), Path(folder) / "model")
        tasks = {name: load_task(manager, name) for name in names}
        model = harness_model(exported, device, config["model"]["seq_len"], cfg)
    origin = {
        "checkpoint": str(checkpoint.relative_to(run)),
        "weights_sha256": file_sha256(checkpoint / "model.safetensors"),
        "lm_eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "dtype": cfg.dtype,
    }
    for name, task in tasks.items():
        print(f"evaluating {checkpoint} on {name}", flush=True)
        results[name] = evaluate(model, task, cfg)
        store(run / "evals.json", origin, name, results[name])
    print(table(results))
    for name, result in results.items():
        if result["truncated"]:
            print(
                f"{name}: {result['truncated']:,} of {result['inputs']:,} inputs lost their "
                f"beginning, because the model's context is {model.max_length} tokens"
            )
    print(run / "evals.json")
    return results


if __name__ == "__main__":
    run_script(main, Config, prog="python -m tools.evaluate", description=__doc__)
