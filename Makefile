.PHONY: setup extra demo demo-images cifar figures eval test test-faults test-extra test-browser lint check

PYTHON ?= python3
PY := .venv/bin/python
# images of make cifar
SOURCE ?= uoft-cs/cifar10
# Set-up runs again only when the requirements change.
STAMP := .venv/installed
EXTRA_STAMP := .venv/installed-extra

# Install a requirements file. Of pip's output, print a line per package and per large download.
define INSTALL
@{ $(PY) -m pip install --disable-pip-version-check --progress-bar off -r $(1) || echo failed; } | \
	while read -r word name rest; do case "$$word $$rest" in \
		Collecting*|Processing*) echo "  $${name##*/}" ;; \
		Downloading*[MG]B\)) echo "  downloading $${name%%-[cp][py]*} $$rest" ;; \
		Installing*) echo "  installing them" ;; \
		failed*) exit 1 ;; \
	esac; done
@touch $@
endef

setup: $(STAMP)

# packages of the playground, the evaluation and their tests
extra: $(EXTRA_STAMP)

$(STAMP): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"error: Python {sys.version.split()[0]} is too old; install 3.11 or newer and pass it with make PYTHON=python3.11")'
	@echo "setting up .venv with the packages of requirements-dev.txt; this takes a few minutes"
	@$(PYTHON) -m venv .venv
	$(call INSTALL,requirements-dev.txt)

$(EXTRA_STAMP): requirements-extra.txt $(STAMP)
	@echo "adding the packages of requirements-extra.txt to .venv"
	$(call INSTALL,requirements-extra.txt)

demo: setup
	$(PY) train_llm.py --config configs/llm_demo.yaml --run demo $(if $(wildcard runs/demo),--resume)
	$(PY) generate.py demo --prompt "def __init__(self" --max_tokens 120 --n 3 --temperature 1

demo-images: setup
	$(PY) train_vqvae.py --config configs/vqvae_demo.yaml --run demo-vqvae $(if $(wildcard runs/demo-vqvae),--resume)
	$(PY) train_multimodal.py --config configs/multimodal_demo.yaml --vqvae demo-vqvae --run demo-images $(if $(wildcard runs/demo-images),--resume)
	$(PY) -m tools.score_images demo-images --n 100
	$(PY) generate.py demo-images --prompt "a photo of a large red circle on a white background" --n 8

# CIFAR-10 at 32 x 32 pixels, about 90 minutes on two CPU cores; if interrupted, run it
# again: it continues. SOURCE=FOLDER reads a folder with train.parquet and test.parquet.
cifar: setup
	$(PY) train_vqvae.py --config configs/vqvae_cifar10_32.yaml --data.source "$(SOURCE)" --run cifar-vqvae $(if $(wildcard runs/cifar-vqvae),--resume)
	$(PY) train_multimodal.py --config configs/multimodal_cifar10_32.yaml --data.source "$(SOURCE)" --vqvae cifar-vqvae --run cifar $(if $(wildcard runs/cifar),--resume)
	$(PY) -m tools.score_images cifar --n 1000 --n_real 5000 --n_classify 200

# the figures of the READMEs, from the runs of make demo and make demo-images
figures: demo demo-images
	cp runs/demo/loss.png docs/images/demo_loss.png
	cp runs/demo-images/scores.png docs/images/demo_shapes.png
	cp runs/demo-vqvae/samples/0000800.png docs/images/demo_reconstructions.png
	$(PY) -m tools.record publish

# make eval RUN=demo ARGS="--limit 100"; without RUN, the newest run
eval: extra
	$(PY) -m tools.evaluate $(RUN) $(ARGS)

test: setup
	$(PY) -m pytest

# kills, disk faults, a failing hub, long runs and extended fuzzing: about half an hour
test-faults: setup
	$(PY) -m pytest -m faults
	BLUEBERRY_FUZZ_EXAMPLES=2000 $(PY) -m pytest tests/test_fuzz.py

# tests that need the extra packages
test-extra: extra
	$(PY) -m pytest -m "extra and not browser"

# tests of the playground in Chromium or Chrome
test-browser: extra
	$(PY) -m pytest -m browser

lint: setup
	$(PY) -m ruff check
	$(PY) -m ruff format --check

check: setup
	$(PY) -m tools.record check
