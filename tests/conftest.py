import os
import signal

# The models here are so small that a second thread only costs time.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from helpers import sentences, write_jsonl

# A background job of a shell script ignores SIGINT, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working directory with corpus.jsonl: 300 documents, about 15,000 tokens."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("corpus.jsonl", sentences(300))
    return tmp_path


def pytest_terminal_summary(terminalreporter):
    """Print the tables that tests recorded with record_property("table", lines)."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for line in dict(report.user_properties).get("table", []) if report.when == "call" else []:
            terminalreporter.write_line(line)
