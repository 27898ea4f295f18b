.PHONY: setup demo demo-images test test-faults lint check

PYTHON ?= python3
PY := .venv/bin/python
# Set-up runs again only when the requirements change.
STAMP := .venv/installed

setup: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"error: Python {sys.version.split()[0]} is too old; install 3.11 or newer and pass it with make PYTHON=python3.11")'
	@echo "setting up .venv; this takes a few minutes and prints nothing"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: setup
	$(PY) train_llm.py --config configs/llm_demo.yaml --run demo $(if $(wildcard runs/demo),--resume)
	$(PY) generate.py demo --prompt "def __init__(self" --max_tokens 120 --n 3 --temperature 0.8

demo-images: setup
	$(PY) train_vqvae.py --config configs/vqvae_demo.yaml --run demo-vqvae $(if $(wildcard runs/demo-vqvae),--resume)
	$(PY) train_multimodal.py --config configs/multimodal_demo.yaml --vqvae demo-vqvae --run demo-images $(if $(wildcard runs/demo-images),--resume)
	$(PY) -m tools.score_images demo-images --n 32
	$(PY) generate.py demo-images --prompt "a photo of a large red circle on a white background" --n 8

test: setup
	$(PY) -m pytest

# kills, disk faults, a failing hub, long runs and extended fuzzing: about half an hour
test-faults: setup
	$(PY) -m pytest -m faults
	BLUEBERRY_FUZZ_EXAMPLES=2000 $(PY) -m pytest tests/test_fuzz.py

lint: setup
	$(PY) -m ruff check
	$(PY) -m ruff format --check

check: setup
	$(PY) -m tools.record check
