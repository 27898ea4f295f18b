"""docs/quickstart.ipynb, executed from the first cell to the last with a tiny budget."""

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, flags

pytestmark = pytest.mark.extra
NOTEBOOK = ROOT / "docs/quickstart.ipynb"
NOT_COPIED = (".git", ".venv", "cache", "runs", "wandb", "__pycache__", ".*_cache", ".hypothesis")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> str:
    """Address of a git repository with the files of this working tree."""
    folder = tmp_path_factory.mktemp("repository") / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    author = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder.as_uri()


@pytest.fixture
def execute(workdir, repository, monkeypatch):
    """Executes the notebook in an empty folder with other parameters; returns its cells by id."""
    import nbclient
    import nbformat

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # a test installs nothing
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(workdir / "jupyter"))  # no kernels of the user
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    options = " ".join(flags(data__source=workdir / "corpus.jsonl"))
    values = {"REPOSITORY": repository, "TOKENS": "2560", "RUN": "tiny", "OPTIONS": options}

    def run(**changes: str) -> dict:
        names = {}
        exec(cells["parameters"].source, names)
        assert names.keys() - {"__builtins__"} == values.keys()
        lines = [f"{name} = {value!r}" for name, value in (values | changes).items()]
        cells["parameters"].source = "\n".join(lines)
        client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
        client.execute(cwd=str(workdir))
        return cells

    run.cells, run.error = cells, nbclient.exceptions.CellExecutionError
    return run


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_the_notebook_trains_samples_and_plots(execute, workdir):
    cells = execute()
    run = workdir / "blueberry/runs/tiny"
    assert (run / "summary.json").exists()
    assert "--- 3/3\nOnce upon a time" in printed(cells["sample"]).replace("\r\n", "\n")
    (plot,) = cells["plot"].outputs
    assert base64.b64decode(plot.data["image/png"]) == (run / "loss.png").read_bytes()


@pytest.mark.parametrize(
    "changes, stopped, reason",
    [
        ({"REPOSITORY": "file:///missing"}, "clone", "set REPOSITORY"),
        ({"OPTIONS": "--tokns 1"}, "train", "did you mean --tokens"),
    ],
)
def test_a_cell_that_fails_stops_the_notebook(execute, changes, stopped, reason):
    with pytest.raises(execute.error, match="AssertionError"):
        execute(**changes)
    ran = [id for id, cell in execute.cells.items() if cell.get("execution_count")]
    assert ran[-1] == stopped
    assert reason in str(execute.cells[stopped].outputs)


def test_the_notebook_is_valid_and_stored_without_outputs():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
