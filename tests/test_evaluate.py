import json
import math
import re
import shutil
import socket
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
import yaml
from helpers import noisy, script, sentences, train, train_stage, write_jsonl
from safetensors.torch import load_file

import train_vqvae
from common.config import UserError, load_config
from common.disk import file_sha256
from common.run import checkpoints, save_checkpoint
from data.text import encode, end_of_text
from sampling import load_run
from tools import evaluate

pytestmark = pytest.mark.extra

CHOICES = [
    {"question": "one 🦊 sees", "choices": ["my sister", "no frog", "the Bär"], "label": 1},
    {"question": "3: the Bär über-likes", "choices": ["a", "the Bär. a fox"], "label": 0},
    {"question": " ".join(["my sister draws"] * 20), "choices": ["a fox", "no frog"], "label": 1},
]
TEXTS = [{"text": text} for text in ("the Bär eats my sister", "7: no frog draws one 🦊")]
CHOICE_TASK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
LAST_WORD_TASK = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}


def write_task(name: str, task: dict, documents: list[dict], folder: str = "tasks") -> None:
    """A task file in the harness's format, and its data."""
    data = Path(folder) / f"{name}.jsonl"
    data.parent.mkdir(exist_ok=True)
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": "cache/datasets"},
        "test_split": "test",
        "metadata": {"version": 2.0},
    }
    data.with_suffix(".yaml").write_text(yaml.safe_dump(source | task))


def run_tool(*args: str) -> dict:
    flags = ["--include_path", "tasks", "--device", "cpu", "--dtype", "float32"]
    return evaluate.main(load_config(evaluate.Config, [*args[:1], *flags, *args[1:]]))


def error_of(*args: str) -> str:
    with pytest.raises(UserError) as error:
        run_tool(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def refuse(*args):
    raise AssertionError("a test uses the network")


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A working directory with runs/m, a model with all extras and random weights, and tasks."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_jsonl("corpus.jsonl", sentences(300))
        extras = {"model__subwords": 50, "model__value_embed": True, "model__canon": 3}
        train(run="m", tokens=640, **extras, model__pointer=8)
        model = noisy(load_run("m", SimpleNamespace(device="cpu", dtype="float32")).model)
        add_weights(Path("runs/m"), model)
        write_task("choice", CHOICE_TASK, CHOICES)
        write_task("last_word", LAST_WORD_TASK, TEXTS)
    return folder


def add_weights(run: Path, model: torch.nn.Module) -> None:
    """Save a newer checkpoint whose weights are those of `model` where the names agree."""
    last = checkpoints(run)[-1]
    state = json.loads((last / "state.json").read_text())
    del state["sha256"]
    weights = load_file(last / "model.safetensors") | model.state_dict()
    holder = SimpleNamespace(state_dict=lambda: weights)
    save_checkpoint(run, holder, [], state | {"step": state["step"] + 1})


@pytest.fixture
def workspace(template, tmp_path, monkeypatch):
    """A copy of the template in which the network cannot be used."""
    shutil.copytree(template, tmp_path / "workspace")
    monkeypatch.chdir(tmp_path / "workspace")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "workspace"


# ---- scores
def log_likelihood(loaded, context: str, answer: str, first: list[int]) -> tuple[float, bool]:
    """Log-likelihood of an answer by our own forward pass, and whether it is the most likely.

    `first` are the tokens before the context.
    """
    n_prompt = len(first) + len(encode(loaded.tokenizer, [context])[0])
    ids = torch.tensor([*first, *encode(loaded.tokenizer, [context + answer])[0]])  # (T + 1,)
    n_answer = len(ids) - n_prompt
    ids = ids[-loaded.model.config.seq_len - 1 :]
    log_probs = loaded.model(ids[None, :-1])[0].log_softmax(-1)[-n_answer:]  # (n_answer, V)
    answer_ids = ids[-n_answer:, None]  # (n_answer, 1)
    total = log_probs.gather(1, answer_ids).sum().item()
    return total, bool((log_probs.argmax(-1) == answer_ids[:, 0]).all())


@pytest.fixture(scope="session")
def evaluated(template):
    """Results of both tasks, what the harness found, and the loaded run."""
    import lm_eval

    found, harness = {}, lm_eval.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(template)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)

        def spy(*args, **kwargs):
            result = harness(*args, **kwargs)
            found.update(result["samples"])
            return result

        patch.setattr(lm_eval, "evaluate", spy)
        results = run_tool("m", "--tasks", "choice,last_word")
        stored = json.loads(Path("runs/m/evals.json").read_text())
        Path("runs/m/evals.json").unlink()
        loaded = load_run("m", SimpleNamespace(device="cpu", dtype="float32"))
    return SimpleNamespace(results=results, samples=found, stored=stored, loaded=loaded)


def ours(evaluated, name: str, first: list[int] | None = None) -> list[list[tuple[float, bool]]]:
    """For each document of a task, our log-likelihood of each answer."""
    first = [end_of_text(evaluated.loaded.tokenizer)] if first is None else first
    return [
        [log_likelihood(evaluated.loaded, *pair, first) for pair in sample["arguments"]]
        for sample in evaluated.samples[name]
    ]


def theirs(evaluated, name: str) -> list[list[tuple[float, bool]]]:
    """For each document of a task, the harness's log-likelihood of each answer."""
    return [sample["filtered_resps"] for sample in evaluated.samples[name]]


@pytest.mark.parametrize("name", ["choice", "last_word"])
def test_log_likelihoods_of_the_harness_equal_our_forward_pass(evaluated, name):
    flat = [
        [score for document in side for score, _ in document]
        for side in (ours(evaluated, name), theirs(evaluated, name))
    ]
    assert flat[0] == pytest.approx(flat[1], abs=1e-3)


@pytest.mark.parametrize("name", ["choice", "last_word"])
def test_every_context_starts_with_end_of_text(evaluated, name):
    without = ours(evaluated, name, first=[])
    for document, other in zip(theirs(evaluated, name)[:2], without[:2], strict=True):
        assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(document, other, strict=True))


def test_accuracies_follow_from_our_log_likelihoods(evaluated):
    n_right = n_right_normalized = 0
    for document, scores in zip(CHOICES, ours(evaluated, "choice"), strict=True):
        totals = [score for score, _ in scores]
        per_letter = [s / len(c) for s, c in zip(totals, document["choices"], strict=True)]
        n_right += totals.index(max(totals)) == document["label"]
        n_right_normalized += per_letter.index(max(per_letter)) == document["label"]
    metrics = evaluated.results["choice"]["metrics"]
    assert metrics["acc"]["value"] == pytest.approx(n_right / 3)
    assert metrics["acc_norm"]["value"] == pytest.approx(n_right_normalized / 3)


def test_perplexity_and_accuracy_of_last_words_follow_from_our_log_likelihoods(evaluated):
    scores = [score for (score,) in ours(evaluated, "last_word")]
    metrics = evaluated.results["last_word"]["metrics"]
    mean = sum(score for score, _ in scores) / len(scores)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(-mean), rel=1e-3)
    assert metrics["acc"]["value"] == sum(greedy for _, greedy in scores) / len(scores)


def test_random_accuracy_is_that_of_guessing_among_the_choices(evaluated):
    assert evaluated.results["choice"]["random"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert evaluated.results["last_word"]["random"] is None


def test_inputs_that_the_context_is_too_short_for_are_counted(evaluated):
    result = evaluated.results["choice"]
    assert (result["inputs"], result["truncated"]) == (7, 2)


# ---- evals.json
def test_evals_json_tells_what_was_evaluated(evaluated, template):
    (weights,) = template.glob("runs/m/checkpoints/0000006/model.safetensors")
    stored, task = evaluated.stored, evaluated.stored["tasks"]["choice"]
    assert stored["tasks"] == evaluated.results
    assert stored["checkpoint"] == "checkpoints/0000006"
    assert stored["weights_sha256"] == file_sha256(weights)
    assert stored["lm_eval"] == sys.modules["lm_eval"].__version__
    assert stored["torch"] == torch.__version__
    assert (task["documents"], task["limit"], task["task_version"]) == (3, None, 2.0)
    assert (task["dataset"], task["revision"], task["num_fewshot"]) == ("json", None, 0)


def inputs_sha256() -> str:
    return run_tool("m", "--tasks", "choice")["choice"]["inputs_sha256"]


@pytest.mark.parametrize(
    "change", [{"question": "who?"}, {"choices": ["my sister", "no frog", "a fox"]}, {"label": 2}]
)
def test_hash_of_the_inputs_changes_with_each_part_of_a_document(workspace, change):
    before = inputs_sha256()
    write_task("choice", CHOICE_TASK, [CHOICES[0] | change, *CHOICES[1:]])
    assert inputs_sha256() != before


def test_hash_of_the_inputs_depends_on_nothing_else(workspace):
    before = inputs_sha256()
    write_task("choice", CHOICE_TASK, [document | {"id": 1} for document in CHOICES])
    assert inputs_sha256() == before


def stored_tasks(run: str = "m") -> dict:
    return json.loads(Path(f"runs/{run}/evals.json").read_text())["tasks"]


def test_other_tasks_are_added(workspace, capsys):
    run_tool("m", "--tasks", "choice")
    run_tool("m", "--tasks", "last_word")
    assert list(stored_tasks()) == ["choice", "last_word"]
    assert "replacing" not in capsys.readouterr().out


def test_results_of_other_weights_are_replaced_with_a_note(workspace, capsys):
    run_tool("m", "--tasks", "choice")
    run_tool(str(checkpoints(Path("runs/m"))[0]), "--tasks", "last_word")
    assert list(stored_tasks()) == ["last_word"]
    assert "results of other weights, versions or dtype; replacing" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_with_a_limit_does_not_replace_one_without(workspace, capsys, dtype):
    run_tool("m", "--tasks", "choice")
    result = run_tool("m", "--tasks", "choice", "--limit", "2", "--dtype", dtype)["choice"]
    assert (result["documents"], result["limit"]) == (2, 2)
    assert (stored_tasks()["choice"]["documents"], stored_tasks()["choice"]["limit"]) == (3, None)
    assert "keeping them" in capsys.readouterr().out


def test_a_limit_above_the_number_of_documents_is_no_limit(workspace):
    assert run_tool("m", "--tasks", "choice", "--limit", "9")["choice"]["limit"] is None


def test_an_interrupted_evaluation_keeps_the_tasks_that_are_complete(workspace, monkeypatch):
    real = evaluate.evaluate

    def interrupted(model, task, cfg):
        if task.task_name == "last_word":
            raise KeyboardInterrupt
        return real(model, task, cfg)

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tool("m", "--tasks", "choice,last_word")
    assert list(stored_tasks()) == ["choice"]
    assert not list(Path("runs/m").glob("*.tmp"))


def test_the_script_prints_a_table(workspace):
    flags = ["--tasks", "choice", "--include_path", "tasks", "--device", "cpu"]
    done = script("-m", "tools.evaluate", "m", *flags)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["task", "metric", "value", "random", "documents"] in lines
    assert ["choice", "acc_norm"] in [line[:2] for line in lines]
    assert "choice: 2 of 7 inputs lost their beginning" in done.stdout


# ---- pins
@cache
def harness_tasks() -> dict[str, Path]:
    """The task files of the installed lm_eval."""
    import lm_eval

    files = Path(lm_eval.__file__).parent.glob("tasks/*/*.yaml")
    names = {file: re.search(r"^task: (\w+)$", file.read_text(), re.M) for file in files}
    return {name[1]: file for file, name in names.items() if name}


def include(name: str, **changes) -> None:
    """Put a pinned task in the folder of task files, so that the others need not be indexed."""
    task = {"include": str(harness_tasks()[name])} | changes
    Path(f"tasks/{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.parametrize("name", evaluate.PINNED)
def test_the_installed_tasks_are_the_pinned_ones(workspace, name):
    include(name)
    _, names = evaluate.find_tasks(name, "tasks")
    assert names == [name]


def test_another_version_of_a_pinned_task_is_refused(workspace):
    include("sciq", metadata={"version": 1.1})
    assert "task sciq has dataset allenai/sciq and version 1.1" in error_of("m", "--tasks", "sciq")


def test_another_dataset_of_a_pinned_task_is_refused(workspace):
    include("piqa", dataset_path="ybisk/piqa")
    assert "task piqa has dataset ybisk/piqa" in error_of("m", "--tasks", "piqa")


LETTERS = ["A", "B", "C", "D"]
ANIMALS = ["a fox", "the Bär", "one 🦊", "no frog"]
QUESTION = {"choices": {"text": ANIMALS, "label": LETTERS}, "answerKey": "B"}
DISTRACTORS = {f"distractor{i}": ANIMALS[i] for i in (1, 2, 3)}
WINOGRANDE = {"sentence": "a fox sees a frog, so _ eats.", "option1": "it", "option2": "he"}
DOCUMENTS = {  # one in the schema of each pinned dataset, the customary metrics, and the choices
    "hellaswag": (
        {
            "activity_label": "Eat",
            "ctx_a": "a fox",
            "ctx_b": "it",
            "endings": ANIMALS,
            "label": "1",
        },
        ["acc", "acc_norm"],
        4,
    ),
    "arc_easy": ({"id": "1", "question": "who?"} | QUESTION, ["acc", "acc_norm"], 4),
    "arc_challenge": ({"id": "1", "question": "who?"} | QUESTION, ["acc", "acc_norm"], 4),
    "piqa": ({"goal": "eat", "sol1": "a", "sol2": "b", "label": 1}, ["acc", "acc_norm"], 2),
    "lambada_openai": ({"text": "one 🦊 sees a fox"}, ["perplexity", "acc"], None),
    "winogrande": (WINOGRANDE | {"answer": "2"}, ["acc"], 2),
    "openbookqa": ({"id": "1", "question_stem": "who"} | QUESTION, ["acc", "acc_norm"], 4),
    "sciq": (
        {"question": "who?", "support": "it", "correct_answer": ANIMALS[0]} | DISTRACTORS,
        ["acc", "acc_norm"],
        4,
    ),
}


@pytest.fixture
def stand_in(workspace, monkeypatch):
    """A stand-in for datasets.load_dataset with a document for each pinned task.

    It has the last call and, if a test sets it, the revision that is in the cache.
    """
    import datasets

    real, state = datasets.load_dataset, SimpleNamespace(call=None, cached=None)
    of_dataset = {pin.dataset: name for name, pin in evaluate.PINNED.items()}

    def load_dataset(path, name=None, **options):
        state.call = path, options
        file = f"{of_dataset[path]}.jsonl"
        Path(file).write_text(json.dumps(DOCUMENTS[of_dataset[path]][0]) + "\n")
        data = dict.fromkeys(("train", "validation", "test"), file)
        revision = state.cached or options["revision"]
        return real("json", data_files=data, cache_dir=str(Path("cache") / revision))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


@pytest.mark.parametrize("name", evaluate.PINNED)
def test_pinned_tasks_are_evaluated_at_their_revision(stand_in, name):
    include(name)
    result, pin = run_tool("m", "--tasks", name)[name], evaluate.PINNED[name]
    _, metrics, n_choices = DOCUMENTS[name]
    assert stand_in.call == (pin.dataset, {"revision": pin.revision})
    assert (result["dataset"], result["revision"]) == (pin.dataset, pin.revision)
    assert list(result["metrics"]) == metrics
    assert result["random"] == (1 / n_choices if n_choices else None)


def test_a_cached_copy_of_another_revision_is_refused(stand_in):
    include("sciq")
    stand_in.cached = "0" * 40
    assert "the cache has only another revision of allenai/sciq" in error_of("m", "--tasks", "sciq")


def test_a_hub_that_does_not_respond_is_one_line(workspace, monkeypatch):
    import datasets

    include("sciq")

    def load_dataset(path, name=None, **options):
        raise ConnectionError("no route") from httpx2.ConnectError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(evaluate, "HUB_SECONDS", 0)
    message = error_of("m", "--tasks", "sciq")
    assert message.startswith("task sciq: cannot load data source allenai/sciq: no connection to")
    assert message.endswith("or pass --tasks with local data (--include_path)")


# ---- bad input
def nothing(*args):
    raise AssertionError("work before all input was checked")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "choise"], "--tasks: 'choise' is not a task of lm_eval or --include_path"),
        (["--tasks", ""], "--tasks: '' is not a task"),
        (["--tasks", "my_group"], "'my_group' is a group of tasks"),
        (["--tasks", "story"], "--tasks: story compares generated text"),
        (["--limit", "0"], "--limit is 0; it must be positive"),
        (["--batch_size", "0"], "--batch_size is 0; it must be positive"),
        (["--include_path", "cache"], "--include_path cache has no .yaml files"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used"),
    ],
)
def test_bad_input_is_one_line_before_any_work(workspace, monkeypatch, flags, message):
    from lm_eval.tasks import TaskManager

    write_task("story", {"output_type": "generate_until"}, TEXTS)
    Path("tasks/group.yaml").write_text("group: my_group\ntask: [choice]\n")
    real = TaskManager.__init__

    def without_defaults(self, include_path, include_defaults=False):  # they take 10 seconds
        real(self, include_path=include_path, include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", without_defaults)
    monkeypatch.setattr(evaluate, "export", nothing)
    monkeypatch.setattr(evaluate, "load_task", nothing)
    assert message in error_of("m", "--tasks", "choice", *flags)


def damage_yaml() -> None:
    Path("tasks/choice.yaml").write_text("task: [choice\n")


def damage_template() -> None:
    write_task("choice", CHOICE_TASK | {"doc_to_text": "{{question"}, CHOICES)


def damage_column() -> None:
    write_task("choice", CHOICE_TASK, [{"question": "who?"}])


def damage_data() -> None:
    Path("tasks/choice.jsonl").write_text("{")


def remove_data() -> None:
    Path("tasks/choice.jsonl").unlink()


def empty_data() -> None:
    Path("tasks/choice.jsonl").write_text("")


DAMAGES = {
    damage_yaml: "task file tasks/choice.yaml cannot be read",
    damage_template: "choice.yaml cannot be loaded",
    damage_column: "choice.yaml cannot be loaded",
    damage_data: "choice.yaml cannot be loaded",
    remove_data: "choice.yaml cannot be loaded",
    empty_data: "choice.yaml cannot be loaded",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tasks_are_one_line(workspace, damage):
    damage()
    assert DAMAGES[damage] in error_of("m", "--tasks", "choice")


def test_an_answer_longer_than_the_context_is_one_line(workspace):
    write_task("choice", CHOICE_TASK, [CHOICES[0] | {"choices": ["fox", "fox " * 50]}])
    assert "tokens, but the model's context is 32" in error_of("m", "--tasks", "choice")


def test_damaged_results_are_one_line_before_any_work(workspace, monkeypatch):
    monkeypatch.setattr(evaluate, "export", nothing)
    Path("runs/m/evals.json").write_text('{"tasks": 3}')
    assert error_of("m", "--tasks", "choice") == "runs/m/evals.json is damaged; delete it"


def test_a_vqvae_run_is_refused(workspace):
    train_stage(train_vqvae, run="v", images=8)
    assert "runs/v is a VQ-VAE run" in error_of("v", "--tasks", "choice")


def test_a_run_without_a_checkpoint_is_refused(workspace):
    shutil.rmtree("runs/m/checkpoints")
    assert "runs/m has no checkpoint" in error_of("m", "--tasks", "choice")


@pytest.mark.parametrize("package", ["lm_eval", "accelerate"])
def test_a_missing_package_is_one_line(workspace, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert error_of("m", "--tasks", "choice").startswith(f"{package} is not installed")


def test_the_script_ends_with_code_2_for_an_unknown_run(workspace):
    done = script("-m", "tools.evaluate", "n")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there is no run 'n'" in done.stderr
