import os

# The models here are so small that a second thread only costs time.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from helpers import sentences, write_jsonl


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working directory with corpus.jsonl: 300 documents, about 15,000 tokens."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("corpus.jsonl", sentences(300))
    return tmp_path
